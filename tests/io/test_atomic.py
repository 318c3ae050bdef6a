"""Whose file it is: links, devices, modes and owners, long names, several writers, and claims of
trainings.
"""

import contextlib
import errno
import fcntl
import os
import signal
import stat
import struct
import sys
import threading
import time
import traceback
import warnings

import pytest

from mlpcore.io import atomic, claims

ROOT = os.geteuid() == 0
NOBODY = 65534
ACL = "system.posix_acl_access"


def put(path, content=b"new", keep=1):
    with atomic.replacing(path, keep) as file:
        file.write(content)


def forked(work):
    """Begin a function in a child, which exits with 0, or with 1 if the function raised."""
    with warnings.catch_warnings():
        # BLAS has threads, which the child leaves alone
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child:
        return child
    try:
        work()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def ended(child):
    """Wait for a child; return its exit status, negative where a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)


# -- what is replaced, and what is written into ----------------------------------------------------


def test_a_device_a_pipe_and_a_socket_stay_what_they_are(tmp_path):
    put("/dev/null")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    content = bytes(range(256)) * 4096  # more than a pipe holds
    for name in ("pipe", "link"):
        child = forked(lambda name=name: put(tmp_path / name, content, keep=3))
        assert (tmp_path / "pipe").read_bytes() == content
        assert ended(child) == 0
    assert stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)
    with pytest.raises(OSError, match="'/dev/full' cannot be written: No space left"):
        put("/dev/full")
    assert sorted(os.listdir(tmp_path)) == ["link", "pipe"]


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "link"])
@pytest.mark.parametrize("place", ["pipe", ">", ">>"])
def test_standard_output_is_written_into_wherever_it_goes(name, place, tmp_path):
    if name == "link":
        name = tmp_path / "link"
        name.symlink_to("/dev/stdout")
    file, pipe = tmp_path / "file", os.pipe()
    file.write_bytes(b"before\n")
    before = os.stat(file).st_ino
    flags = os.O_WRONLY | {"pipe": 0, ">": os.O_TRUNC, ">>": os.O_APPEND}[place]

    def work():
        os.dup2(pipe[1] if place == "pipe" else os.open(file, flags), 1)
        os.write(1, b"begin\n")
        put(name)
        os.write(1, b"end\n")

    assert ended(forked(work)) == 0
    os.close(pipe[1])
    with open(pipe[0], "rb") as end:
        found = end.read() if place == "pipe" else file.read_bytes()
    assert found == (b"before\n" if place == ">>" else b"") + b"begin\nnewend\n"
    assert os.stat(file).st_ino == before


def test_the_file_at_the_end_of_a_link_is_replaced_and_its_versions_stand_beside_it(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "near").mkdir()
    (tmp_path / "near/one").symlink_to("../near/two")
    (tmp_path / "near/two").symlink_to(tmp_path / "far/file.x")
    for content in (b"1", b"2", b"3"):  # at first the link dangles
        put(tmp_path / "near/one", content, keep=2)
    assert {path.name: path.read_bytes() for path in (tmp_path / "far").iterdir()} == {
        "file.x": b"3",
        "file.1.x": b"2",
    }
    assert sorted(os.listdir(tmp_path / "near")) == ["one", "two"]
    assert os.readlink(tmp_path / "near/one") == "../near/two"
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match=r"a' cannot be written: .*symbolic links") as caught:
        put(tmp_path / "a")
    assert caught.value.errno == errno.ELOOP


def test_a_path_is_relative_to_the_working_directory_also_where_that_cannot_be_reached(
    tmp_path, monkeypatch
):
    (tmp_path / "above/here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "above/here")

    def work():
        if ROOT:
            os.chown(".", NOBODY, NOBODY)
            os.seteuid(NOBODY)
        with atomic.claimed("file") as place:
            put(place)
            put("file")

    (tmp_path / "above").chmod(0 if ROOT else 0o700)
    try:
        assert ended(forked(work)) == 0
    finally:
        (tmp_path / "above").chmod(0o700)
    assert (tmp_path / "above/here/file").read_bytes() == b"new"


def test_other_hard_links_keep_what_they_held(tmp_path):
    put(tmp_path / "file", b"old")
    os.link(tmp_path / "file", tmp_path / "other")
    put(tmp_path / "file")
    assert ((tmp_path / "file").read_bytes(), (tmp_path / "other").read_bytes()) == (b"new", b"old")


# -- mode and owner --------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [0o600, 0o640, 0o444, 0o666, 0o4755, 0o2755, 0o1604])
def test_a_replaced_file_keeps_its_mode_and_owner_and_is_private_until_then(wanted, tmp_path):
    path = tmp_path / "file"
    put(path, b"old")
    if ROOT:
        os.chown(path, NOBODY, 1234)
    path.chmod(wanted)
    before = os.stat(path)
    with atomic.replacing(path, 2) as file:
        file.write(b"new")
        assert stat.S_IMODE(os.fstat(file.fileno()).st_mode) == 0o600
    for place in (path, tmp_path / "file.1"):
        found = os.stat(place)
        assert (found.st_mode, found.st_uid, found.st_gid) == (
            before.st_mode,
            before.st_uid,
            before.st_gid,
        )


def test_a_new_file_follows_the_umask_which_no_other_thread_finds_changed(tmp_path, monkeypatch):
    """The umask is the whole process's: even to read it is to change it for a moment."""
    changed = os.umask

    def slow(mask):
        before = changed(mask)
        time.sleep(0.02)
        return before

    monkeypatch.setattr(os, "umask", slow)
    done, modes = threading.Event(), set()

    def others():
        number = 0
        while not done.is_set():
            number += 1
            with open(tmp_path / f"other {number % 50}", "x") as file:
                modes.add(stat.S_IMODE(os.fstat(file.fileno()).st_mode))
            os.unlink(file.name)

    before = changed(0o027)
    thread = threading.Thread(target=others)
    thread.start()
    try:
        for number in range(20):
            put(tmp_path / f"mine {number}", keep=2)
            put(tmp_path / f"mine {number}", keep=2)
    finally:
        done.set()
        thread.join()
        changed(before)
    assert modes == {0o640}
    assert {mode(tmp_path / name) for name in os.listdir(tmp_path)} == {0o640}


def as_nobody(folder, work):
    """Run a function in a child that may write the folder, and not set owners."""
    folder.chmod(0o777)

    def unprivileged():
        os.chdir(folder)
        if ROOT:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        work()

    assert ended(forked(unprivileged)) == 0


def test_where_the_owner_cannot_be_kept_nobody_may_read_more(tmp_path):
    if not ROOT:  # every file of ours is ours
        return
    for wanted, expected in (
        (0o640, 0o600),
        (0o644, 0o644),
        (0o664, 0o644),
        (0o604, 0o604),
        (0o6755, 0o755),
        (0o600, 0o600),
    ):
        put(tmp_path / "file", b"old")
        (tmp_path / "file").chmod(wanted)
        as_nobody(tmp_path, lambda: put("file"))
        found = os.stat(tmp_path / "file")
        assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (
            expected,
            NOBODY,
            NOBODY,
        )
        os.unlink(tmp_path / "file")


def access_list(*entries):
    """A POSIX access control list, as Linux keeps it."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


NONE = 0xFFFFFFFF
# u::rw u:4321:r g::- m::r o::-
READER = access_list((1, 6, NONE), (2, 4, 4321), (4, 0, NONE), (16, 4, NONE), (32, 0, NONE))


def test_access_lists_and_user_attributes_are_kept_and_none_is_handed_down(tmp_path):
    path = tmp_path / "file"
    put(path, b"old")
    try:
        os.setxattr(path, ACL, READER)
        os.setxattr(path, "user.note", b"mine")
    except OSError:  # a file system that has none
        return
    put(path)
    assert (os.getxattr(path, ACL), os.getxattr(path, "user.note"), mode(path)) == (
        READER,
        b"mine",
        0o640,
    )
    if ROOT:  # the list can be kept by another owner, whose group is none of it
        as_nobody(tmp_path, lambda: put("file"))
        assert mode(path) == 0o600
    os.unlink(path)
    put(path, b"old")
    path.chmod(0o640)
    os.setxattr(tmp_path, "system.posix_acl_default", READER)
    put(path)
    assert (ACL in os.listxattr(path), mode(path)) == (False, 0o640)


# -- names -----------------------------------------------------------------------------------------


def killed(work):
    """Run a function in a child that kills itself in it."""
    assert ended(forked(work)) == -signal.SIGKILL


def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    "name", ["x" * 240, "x" * 251 + ".bin", "é" * 127, b"\xff\xfe" * 60 + b".x", b"\xff" * 255]
)
def test_a_name_may_be_as_long_as_the_file_system_allows_and_of_any_bytes(name, tmp_path):
    path = tmp_path / os.fsdecode(name)

    def half():
        with atomic.replacing(path) as file:
            file.write(b"half")
            file.flush()
            kill()

    killed(half)
    (left,) = os.listdir(tmp_path)
    assert len(os.fsencode(left)) <= max(115, len(os.fsencode(name)))
    put(path, b"1")
    put(path, b"2")
    assert os.listdir(tmp_path) == [path.name]
    assert path.read_bytes() == b"2"


def test_versions_whose_names_are_too_long_are_refused_before_anything_is_written(tmp_path):
    path = tmp_path / ("x" * 251 + ".bin")
    for attempt in (lambda: put(path, keep=2), lambda: atomic.claimed(path, 2).__enter__()):
        with pytest.raises(
            OSError, match=r"x\.bin' cannot be written: .*version 1 is too long"
        ) as caught:
            attempt()
        assert caught.value.errno == errno.ENAMETOOLONG
    with pytest.raises(OSError, match=r"x' cannot be written: .*too long"):
        put(tmp_path / ("x" * 256))
    assert os.listdir(tmp_path) == []
    put(tmp_path / ("x" * 249 + ".bin"), keep=10)
    put(tmp_path / ("x" * 249 + ".bin"), keep=10)
    assert len(os.listdir(tmp_path)) == 2


# -- what may fail ---------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_read_or_forced_costs_nothing(tmp_path):
    tmp_path.chmod(0o777)

    def work():
        os.chmod(".", 0o333)
        with pytest.raises(PermissionError):
            os.listdir()
        put("file", b"1", keep=2)
        put("file", b"2", keep=2)

    if ROOT:
        os.chown(tmp_path, NOBODY, NOBODY)
    try:
        as_nobody(tmp_path, work)
    finally:
        tmp_path.chmod(0o700)
    assert (tmp_path / "file").read_bytes() + (tmp_path / "file.1").read_bytes() == b"21"


def failing(function, number, only=lambda handle: True):
    """A function as a file system has it that lacks it: none such can be mounted by every user."""

    def fail(handle, *args):
        if only(handle):
            raise OSError(number, os.strerror(number))
        return function(handle, *args)

    return fail


def test_a_file_system_without_modes_owners_attributes_locks_or_forced_folders_will_do(
    tmp_path, monkeypatch
):
    path = tmp_path / "file"
    put(path, b"old")
    for name, number in (
        ("fchmod", errno.EPERM),
        ("fchown", errno.EPERM),
        ("listxattr", errno.ENOTSUP),
        ("link", errno.EPERM),
    ):
        monkeypatch.setattr(os, name, failing(getattr(os, name), number))
    monkeypatch.setattr(fcntl, "flock", failing(fcntl.flock, errno.ENOLCK))
    folders = failing(os.fsync, errno.EINVAL, lambda handle: stat.S_ISDIR(os.fstat(handle).st_mode))
    monkeypatch.setattr(os, "fsync", folders)
    with atomic.claimed(path, 3):
        put(path, b"1", keep=3)
        put(path, b"2", keep=3)
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == {
        "file": b"2", "file.1": b"1", "file.2": b"old"
    }  # fmt: skip


def test_a_file_that_cannot_be_forced_to_the_disk_fails_the_save(tmp_path, monkeypatch):
    path = tmp_path / "file"
    put(path, b"old")
    monkeypatch.setattr(os, "fsync", failing(os.fsync, errno.EIO))
    with pytest.raises(OSError, match="file' cannot be written: Input/output error"):
        put(path, keep=2)
    assert os.listdir(tmp_path) == ["file"]
    assert path.read_bytes() == b"old"


# -- several writers -------------------------------------------------------------------------------


def test_processes_that_number_the_versions_of_one_file_see_no_error_and_leave_whole_files(
    tmp_path,
):
    path = tmp_path / "file.x"

    def work(letter):
        for _ in range(60):
            put(path, letter * 1000, keep=4)

    children = [forked(lambda letter=letter: work(letter)) for letter in (b"a", b"b", b"c", b"d")]
    assert [ended(child) for child in children] == [0] * 4
    assert set(os.listdir(tmp_path)) <= {"file.x", "file.1.x", "file.2.x", "file.3.x"}
    for name in os.listdir(tmp_path):
        content = (tmp_path / name).read_bytes()
        assert (len(content), len({*content})) == (1000, 1)


@pytest.mark.parametrize("when", ["named", "linked", "copied"])
@pytest.mark.parametrize("claim", [False, True])
def test_a_writer_that_is_killed_while_it_numbers_leaves_nothing_after_the_next_save(
    claim, when, tmp_path, monkeypatch
):
    path = tmp_path / "file"
    put(path, b"1")
    if when == "copied":
        monkeypatch.setattr(os, "link", failing(os.link, errno.EPERM))

    def work():
        os.replace = kill
        put(path, b"2", keep=2)

    killed(work)
    assert len(os.listdir(tmp_path)) == 3
    if when == "named":  # as earlier versions of mlpcore did
        for name in os.listdir(tmp_path):
            if name != "file":
                os.unlink(tmp_path / name)
        os.link(path, tmp_path / ".file.previous")
    assert path.read_bytes() == b"1"
    with atomic.claimed(path, 2) if claim else contextlib.nullcontext():
        put(path, b"2")
        assert os.listdir(tmp_path) == ["file"]


# -- claims ----------------------------------------------------------------------------------------


def refused(path, attempt):
    with pytest.raises(OSError, match="another training") as caught:
        attempt()
    assert os.path.basename(path) in str(caught.value)
    assert caught.value.errno == errno.EBUSY


def claim(path):
    with atomic.claimed(path):
        pass


@pytest.mark.parametrize("there", [False, True])
def test_a_claimed_file_is_refused_to_others_and_its_holder_writes_it(there, tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "PATIENCE", 0.1)
    path = tmp_path / "file"
    (tmp_path / "link").symlink_to("file")
    if there:
        put(path, b"1")
    with atomic.claimed(path):
        refused(path, lambda: claim(path))
        refused("link", lambda: claim(tmp_path / "link"))
        for content in (b"2", b"3"):
            put(path, content, keep=2)
            for attempt in (claim, put):
                assert (
                    ended(forked(lambda attempt=attempt: refused(path, lambda: attempt(path)))) == 0
                )
            assert path.read_bytes() == content
        path.unlink()
        put(path, b"4", keep=2)
    for attempt in (claim, put):
        assert ended(forked(lambda attempt=attempt: attempt(path))) == 0
    assert sorted(os.listdir(tmp_path)) == ["file", "file.1", "link"]


def test_a_claim_ends_with_its_process_although_a_child_lives_on(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "PATIENCE", 0.1)
    path, told = tmp_path / "file", os.pipe()
    put(path)

    def work():
        with atomic.claimed(path):
            put(path, b"2")
            with atomic.replacing(path) as file:  # locked as well, and never finished
                file.write(b"half")
                forked(lambda: (os.write(told[1], b"%d\n" % os.getpid()), signal.pause()))
                signal.pause()

    child = forked(work)
    grandchild = int(os.read(told[0], 20))
    try:
        refused(path, lambda: claim(path))
        os.kill(child, signal.SIGKILL)
        ended(child)
        os.kill(grandchild, 0)
        claim(path)
        put(path, b"3")
        assert os.listdir(tmp_path) == ["file"]
    finally:
        os.kill(grandchild, signal.SIGKILL)


def test_of_two_trainings_that_began_without_a_file_the_first_to_write_keeps_it(tmp_path):
    path, told = tmp_path / "file", os.pipe()

    def work():
        os.read(told[0], 1)
        with atomic.claimed(path):
            put(path, b"theirs")

    child = forked(work)  # before the claim: it knows nothing of it
    with atomic.claimed(path):
        os.write(told[1], b"x")
        assert ended(child) == 0
        refused(path, lambda: put(path, b"ours"))
        assert path.read_bytes() == b"theirs"
        path.unlink()
        put(path, b"ours")
        os.rename(path, tmp_path / "moved")
        (tmp_path / "moved").with_name("copy").write_bytes(b"copy")
        os.rename(tmp_path / "copy", path)
        refused(path, lambda: put(path, b"ours"))
    assert path.read_bytes() == b"copy"


def test_a_version_that_is_a_second_name_of_the_file_is_no_other_trainings(tmp_path):
    path = tmp_path / "file"
    put(path, b"1")
    os.link(path, tmp_path / "file.1")  # as a writer leaves it that was killed after numbering
    with atomic.claimed(path, 2):
        put(path, b"2", keep=2)
    assert (path.read_bytes(), (tmp_path / "file.1").read_bytes()) == (b"2", b"1")


def test_a_moments_lock_is_waited_for_and_a_handle_is_left_to_nobody(tmp_path):
    path = tmp_path / "file"
    put(path)
    before = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0
    with open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # as one that writes it once does
        threading.Timer(0.1, fcntl.flock, (file, fcntl.LOCK_UN)).start()
        with atomic.claimed(path):
            put(path)
    put(path, keep=2)
    assert not claims.held
    assert not claims.registry
    assert sys.platform != "linux" or len(os.listdir("/proc/self/fd")) == before


class Interrupt(BaseException):
    """Comes like a signal's, between any two lines."""


def interrupted(work, number):
    """Run so many lines of atomic.py and claims.py; return True if that interrupted it."""
    lines = iter(range(number))

    def trace(frame, event, argument):
        if frame.f_code.co_filename not in (atomic.__file__, claims.__file__):
            return None
        if next(lines, None) is None:
            sys.settrace(None)
            raise Interrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    except Interrupt:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # an open file
@pytest.mark.parametrize("there", [False, True])
def test_an_interrupt_wherever_it_comes_leaves_neither_claim_nor_lock_nor_part(
    there, tmp_path, monkeypatch
):
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # it takes long
    # a tracer, unlike a signal, can come between a block and the release of its lock
    monkeypatch.setattr(claims, "guard", threading.RLock())
    path, number = tmp_path / "file", 0

    def work():
        with atomic.claimed(path, 2):
            put(path, keep=2)

    def again():
        path.unlink(missing_ok=True)
        if there:
            put(path)
        return interrupted(work, number)

    while again():
        number += 1
        assert not [*claims.registry, *claims.held]
        with atomic.claimed(path):
            put(path)
        assert {*os.listdir(tmp_path)} <= {"file", "file.1"}
    assert number > 100
