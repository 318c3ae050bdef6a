"""The compiler and its cache folder, when they work and in all the ways in which they do not."""

import contextlib
import copy
import ctypes
import errno
import logging
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import mlpcore as mc
from mlpcore.backends.compiled import compiler
from mlpcore.backends.numpy import host
from mlpcore.cli import ahead, main
from mlpcore.core import sheet

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
ROOT = Path(mc.__file__).parents[1]
SEVEN = 'extern "C" void run(double* z) { *z = 7; }'
OUT = 'while [ "$1" != -o ]; do shift; done\n'  # $2 is the library then


@pytest.fixture(autouse=True)
def patch(tmp_path):
    """A process that has compiled nothing yet, with an empty cache; taken back before conftest.py
    looks for failures.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name, empty in (("_functions", {}), ("_took", {}), ("_failure", []), ("_unkept", [])):
            patch.setattr(compiler, name, empty)
        patch.setenv(compiler.CACHE, str(tmp_path / "cache"))
        for name in ("CXX", compiler.SWITCH):
            patch.delenv(name, raising=False)
        forget()
        yield patch
    forget()


def forget():
    for function in (compiler._find, compiler._why_never, host._say_once):
        function.cache_clear()


def start_again():
    """The state of a new process."""
    for state in (compiler._functions, compiler._took, compiler._failure, compiler._unkept):
        state.clear()
    forget()


def value(source=SEVEN):
    """The number that a source's function gives; None if it was not compiled."""
    run, z = compiler.load(source, "seven"), ctypes.c_double()
    if run is None:
        return None
    run(ctypes.byref(z))
    return z.value


def trained(dtype="float64", **options):
    """Parameters after three steps."""
    rng = np.random.default_rng(0)
    net = mc.MLP([3, 5, 2], "tanh", "softmax", dtype=dtype, device="cpu")
    trainer = mc.Trainer(net, optimizer=mc.Adam(0.1), **options)
    for _ in range(3):
        trainer.step(rng.standard_normal((8, 3)), rng.integers(0, 2, 8))
    return net.parameters.copy()


@pytest.fixture
def fake(tmp_path, patch):
    """Make a shell script the compiler."""

    def fake(lines):
        path = tmp_path / "fake-c++"
        path.write_text(f"#!/bin/sh\n{lines}\n")
        path.chmod(0o755)
        patch.setenv("CXX", str(path))
        forget()
        return path

    return fake


@pytest.fixture(scope="module")
def seven(tmp_path_factory):
    """Lines of a script that gives a library of SEVEN, as the compiler would."""
    return copying(SEVEN, tmp_path_factory.mktemp("seven"))


@pytest.fixture(scope="module")
def idle(tmp_path_factory):
    """Lines of a script whose libraries do nothing."""
    source = 'extern "C" { void run(const void*) {} void run_part(const void*, long, long) {} }'
    return copying(source, tmp_path_factory.mktemp("idle"))


def copying(source, folder):
    (folder / "source.cpp").write_text(source)
    command = ["g++", "-shared", "-fPIC", "-o", str(folder / "made.so"), str(folder / "source.cpp")]
    subprocess.run(command, check=True)
    return f'{OUT}cp {folder}/made.so "$2"'


def cache():
    """Names in the cache folder."""
    folder = compiler.cache_folder()
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def warnings(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


# -- no compiler -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("PATH", "/nowhere", r"no C\+\+ compiler \(g\+\+, clang\+\+, c\+\+\) is on .*apt install"),
        (compiler.SWITCH, "0", "MLPCORE_COMPILE is 0"),
        (compiler.SWITCH, "Off", "MLPCORE_COMPILE is Off"),
        ("CXX", "/no/such/g++ -DX", "CXX is '/no/such/g.*', which is not on the PATH: unset it"),
        ("CXX", "g++ '", "CXX is .* not on the PATH"),
    ],
)
def test_without_a_compiler_numpy_trains_and_info_says_why_once(name, text, reason, patch, caplog):
    compiled = trained()
    assert compiler.counts()[0] > 3
    start_again()
    patch.setenv(name, text)
    with caplog.at_level(logging.INFO, "mlpcore"):
        np.testing.assert_allclose(trained(), compiled, rtol=1e-12)
        trained()
    assert compiler.counts() == (0, 0, 0)
    said = [r.getMessage() for r in caplog.records if "NumPy computes" in r.getMessage()]
    assert len(said) == 1
    assert warnings(caplog) == (said if name == "CXX" else [])  # which somebody has set
    for line in (said[0], mc.info()["cpu passes"], compiler.why_not()):
        assert re.search(reason, line)


def test_importing_and_asking_why_not_run_no_compiler(fake, tmp_path):
    fake(f"touch {tmp_path}/ran")
    code = "import mlpcore as mc; from mlpcore.backends.compiled import compiler as c; c.why_not()"
    process(code).communicate()
    assert not (tmp_path / "ran").exists()


def test_cxx_may_have_arguments_which_belong_to_the_key(patch):
    patch.setenv("CXX", "g++ -DNUMBER=5")
    source = SEVEN.replace("7", "NUMBER")
    assert value(source) == 5
    start_again()
    patch.setenv("CXX", "g++ -DNUMBER=6")
    assert value(source) == 6
    assert len(cache()) == 2


# -- compilers that fail ---------------------------------------------------------------------------

FAILURES = {
    "it reports an error": ("echo note >&2; echo x.cpp:1: error: no >&2; exit 1", "x.cpp:1: error"),
    "it is killed": ("kill -9 $$", "ended with code -9"),
    "it writes nothing": ("exit 0", "wrote no library"),
    "it writes rubbish": (f'{OUT}echo rubbish >"$2"', "invalid ELF header|too short"),
    "it writes another library": (f"{OUT}exec g++ -shared -xc++ /dev/null -o $2", "undefined.*run"),
    "it takes too long": ("sleep 60 & wait", "took more than 0.3 s"),
    "it cannot be run": ("#", "Exec format error"),
    "its words are no text": ("printf 'error \\377' >&2; exit 1", "error"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_after_a_failure_numpy_goes_on_with_one_warning_and_nothing_is_left(
    case, fake, patch, caplog, tmp_path
):
    lines, reason = FAILURES[case]
    script = fake(lines)
    if case == "it cannot be run":
        script.write_bytes(b"\0")
    patch.setattr(compiler, "SECONDS", 0.3 if "long" in case else 60)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    patch.setattr("tempfile.tempdir", str(temporary))
    began = time.perf_counter()
    found = trained()
    assert time.perf_counter() - began < 10
    (said,) = warnings(caplog)
    assert said.startswith(f"NumPy computes what would be compiled: {script}: ")
    assert re.search(reason, said)
    assert len(said) < 600
    assert cache() == [] == list(temporary.iterdir())
    assert "NumPy" in mc.info()["cpu passes"]
    patch.setenv(compiler.SWITCH, "0")
    np.testing.assert_array_equal(trained(), found)


def test_a_compiler_that_fails_half_way_leaves_a_trainer_that_works(fake, patch, caplog, tmp_path):
    fake(f"[ -e {tmp_path}/ran ] && exit 1; touch {tmp_path}/ran; exec g++ $*")
    found = trained()
    assert compiler.counts()[0] == len(warnings(caplog)) == 1
    start_again()
    patch.setenv(compiler.SWITCH, "0")
    np.testing.assert_allclose(found, trained(), rtol=1e-12)


def test_a_slow_compilers_children_are_ended_too(fake, patch, tmp_path):
    fake(f"(sleep 0.6; touch {tmp_path}/late) & wait")
    patch.setattr(compiler, "SECONDS", 0.2)
    assert value() is None
    time.sleep(0.8)
    assert not (tmp_path / "late").exists()


# -- cache folders that cannot be used -------------------------------------------------------------


def a_file(folder, patch):
    folder.write_text("")


def read_only(folder, patch):
    folder.mkdir()
    patch.setattr(tempfile, "mkdtemp", refusing(folder, errno.EROFS))


def full(folder, patch):
    folder.mkdir()
    patch.setattr(Path, "write_text", refusing(folder, errno.ENOSPC, Path.write_text))


def full_at_the_end(folder, patch):
    folder.mkdir()
    patch.setattr(os, "replace", refusing(folder, errno.EDQUOT, os.replace))


def of_others(folder, patch):
    folder.mkdir()
    os.chown(folder, 1234, -1) if os.geteuid() == 0 else patch.setattr(os, "geteuid", lambda: 1234)


def open_to_others(folder, patch):
    folder.mkdir()
    folder.chmod(0o777)


def without_a_home(folder, patch):
    patch.delenv(compiler.CACHE)
    patch.delenv("XDG_CACHE_HOME", raising=False)
    patch.setattr(Path, "home", refused_home)


def refused_home():
    raise RuntimeError("Could not determine home directory.")


def no_programs(folder, patch):
    """A folder on a file system that is mounted noexec."""
    folder.mkdir()
    patch.setattr(ctypes, "CDLL", refusing(folder, errno.EPERM, ctypes.CDLL))


def refusing(folder, code, function=tempfile.mkdtemp):
    """A function that fails for what lies in a folder."""

    def refusing(*given, **named):
        if any(str(folder) in str(x) for x in [*given, *named.values()]):
            raise OSError(code, os.strerror(code))
        return function(*given, **named)

    return refusing


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (a_file, "File exists"), (read_only, "Read-only"), (full, "No space left"),
        (full_at_the_end, "quota"), (of_others, "others may write to"),
        (open_to_others, "others may write to"), (without_a_home, "home directory"),
        (no_programs, "not permitted"),
    ],
)  # fmt: skip
def test_without_its_folder_it_compiles_for_this_process_and_warns_once(
    spoil, reason, patch, caplog, fake, seven, tmp_path
):
    fake(seven)
    folder, temporary = tmp_path / "cache", tmp_path / "temporary"
    temporary.mkdir()
    patch.setattr("tempfile.tempdir", str(temporary))
    spoil(folder, patch)
    assert value() == value(f"{SEVEN} // another") == 7
    (said,) = warnings(caplog)
    assert re.search(f"not kept for the next process: .*{reason}", said)
    assert list(temporary.iterdir()) == []
    assert not folder.is_dir() or cache() == []


def test_a_read_only_folder_that_root_has_filled_is_read(fake, seven, patch, caplog):
    fake(seven)
    assert value() == 7
    start_again()
    patch.setattr(os, "geteuid", lambda: 1234)  # the folder is another's: ours if this is not root
    if os.geteuid() and os.getuid():
        pytest.skip("needs root")
    patch.setattr(tempfile, "mkdtemp", refusing(compiler.cache_folder(), errno.EROFS))
    assert value() == 7
    assert compiler.counts() == (0, 1, 0)
    assert not warnings(caplog)


def test_the_folder_is_made_for_the_user_alone_where_the_environment_says(patch, tmp_path):
    patch.delenv(compiler.CACHE)
    patch.setattr(sys, "platform", "linux")
    patch.setattr(Path, "home", lambda: tmp_path / "home")
    for xdg, expected in (("", "home/.cache"), ("relative", "home/.cache"), ("/", "xdg")):
        patch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg") if xdg == "/" else xdg)
        assert compiler.cache_folder() == tmp_path / expected / "mlpcore"
    assert not compiler._why_no_cache()
    assert compiler.cache_folder().stat().st_mode & 0o777 == 0o700


def test_the_working_directory_may_be_the_folder(fake, seven, patch, tmp_path):
    fake(seven)
    (tmp_path / "cache").mkdir()
    patch.chdir(tmp_path / "cache")
    patch.setenv(compiler.CACHE, ".")
    for counts in ((1, 0), (0, 1)):
        assert value() == 7
        assert compiler.counts()[:2] == counts
        start_again()


# -- libraries that must not be loaded -------------------------------------------------------------


def replace(library, content):
    """Give a library other content, in a new file: this process has mapped the old one."""
    library.unlink()
    library.write_bytes(content)


def truncated(library):
    replace(library, library.read_bytes()[:-100])


def flipped(library):
    content = bytearray(library.read_bytes())
    content[len(content) // 2] ^= 4
    replace(library, content)


def emptied(library):
    replace(library, b"")


def no_library(library):
    """Rubbish under a name that fits it."""
    library.unlink()
    key = library.name.partition("-")[0]
    library.write_bytes(b"rubbish")
    library.rename(library.with_name(compiler._name(key, library)))


@pytest.mark.parametrize("spoil", [truncated, flipped, emptied, no_library])
def test_a_damaged_library_is_compiled_again(spoil, fake, seven, tmp_path, caplog):
    script = fake(f"echo >>{tmp_path}/ran\n{seven}")
    assert value() == 7
    start_again()
    assert value() == 7
    assert compiler.counts() == (0, 1, 0)
    (name,) = cache()
    spoil(compiler.cache_folder() / name)
    start_again()
    assert value() == 7
    assert cache() == [name]
    assert len((tmp_path / "ran").read_text()) == 2, script
    assert not warnings(caplog)


def test_another_processor_and_another_version_of_the_compiler_have_their_own(fake, seven, patch):
    script = fake(seven)
    for change in (
        lambda: None,
        lambda: patch.setattr(compiler, "_processor", lambda: "another"),
        lambda: os.utime(script, (1, 1)),
        lambda: patch.setattr(compiler, "FLAGS", (*compiler.FLAGS, "-DNEW")),
    ):
        change()
        start_again()
        assert value() == 7
        assert compiler.counts()[0] == 1
    assert len(cache()) == 4


# -- at the same time, and interrupted -------------------------------------------------------------

CALL = f"""
import ctypes
from mlpcore.backends.compiled import compiler
z = ctypes.c_double()
print(flush=True)
compiler.load({SEVEN!r})(ctypes.byref(z))
print(z.value)
"""


def process(code):
    """A Python process with this environment."""
    return subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for(condition):
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_two_processes_compile_one_source_at_once(fake, seven, tmp_path):
    wait = f"while [ $(ls {tmp_path}/cache | grep -c part) -lt 2 ]; do sleep 0.01; done"
    fake(f"{wait}\n{seven}\nsleep 0.05")
    both = [process(CALL) for _ in range(2)]
    assert [one.communicate(timeout=60)[0].split() for one in both] == [["7.0"], ["7.0"]]
    assert len(cache()) == 1
    assert value() == 7
    assert compiler.counts() == (0, 1, 0)


def test_threads_compile_a_source_once(fake, seven, tmp_path):
    fake(f"echo >>{tmp_path}/ran; sleep 0.1\n{seven}")
    found = []
    threads = [threading.Thread(target=lambda: found.append(value())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [7] * 4
    assert len((tmp_path / "ran").read_text()) == 1


def test_the_folder_of_a_killed_process_goes_after_a_day(fake, seven):
    fake("sleep 2")
    killed = process(CALL)
    wait_for(cache)
    killed.kill()
    killed.communicate()
    (left,) = cache()
    assert left.startswith("part-")
    fake(seven)
    assert value() == 7
    assert left in cache()
    os.utime(compiler.cache_folder() / left, (1, time.time() - compiler.STALE - 60))
    assert value(f"{SEVEN} // another") == 7
    assert left not in cache()
    assert len(cache()) == 2


def test_an_interrupt_ends_the_compiler_and_the_next_call_compiles(fake, seven, tmp_path):
    fake(f"touch {tmp_path}/ran; (sleep 0.5; touch {tmp_path}/late) & wait")

    def interrupt():
        wait_for((tmp_path / "ran").exists)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        value()
    thread.join()
    assert cache() == []
    fake(seven)
    assert value() == 7
    time.sleep(0.6)
    assert not (tmp_path / "late").exists()


def test_ctrl_c_in_the_terminal_does_not_reach_the_compiler(fake, seven, patch):
    """It goes to the whole group: `fit` with a checkpoint finishes its step, compiled as any."""
    fake(f"sleep 0.3\n{seven}")
    code = f"import signal; signal.signal(signal.SIGINT, lambda *_: None)\n{CALL}"
    child = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, text=True, process_group=0,
    )  # fmt: skip
    wait_for(cache)
    time.sleep(0.1)
    os.killpg(child.pid, signal.SIGINT)
    assert child.communicate(timeout=20)[0].split() == ["7.0"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_that_is_forked_during_a_compilation_compiles(fake, seven, tmp_path):
    fake(f"touch {tmp_path}/ran; sleep 0.3\n{seven}")
    found = []
    thread = threading.Thread(target=lambda: found.append(value()))
    thread.start()
    wait_for((tmp_path / "ran").exists)
    child = os.fork()
    if not child:
        signal.alarm(20)
        with contextlib.suppress(BaseException):
            os._exit(int(value() or 0))
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    thread.join()
    assert found == [7]


# -- the functions of a trainer --------------------------------------------------------------------


def test_the_log_says_what_was_compiled_and_nothing_of_what_was_there(caplog):
    with caplog.at_level(logging.INFO, "mlpcore"):
        trained("float32")
    said = [r.getMessage() for r in caplog.records if r.getMessage().startswith("compiled ")]
    assert len(said) == compiler.counts()[0] > 3
    assert any(re.fullmatch(r"compiled activate<float> in \d\.\d s", line) for line in said)
    start_again()
    caplog.clear()
    with caplog.at_level(logging.INFO, "mlpcore"):
        trained("float32")
    assert not caplog.records


def test_a_users_formulas_compile(patch):
    texts, load = [], compiler.load
    patch.setattr(compiler, "load", lambda text, *rest: texts.append(text) or load(text, *rest))
    bent = mc.Activation("bent", "s + a * (sqrt(s * s + 1) - 1)", parameter=0.5)
    rng = np.random.default_rng(0)
    net = mc.MLP([3, 5, 2], bent, dtype="float64")
    fourth = mc.Loss("fourth", "(z - y) ** 4", "4 * (z - y) ** 3")
    before = compiler.counts()[0]
    mc.Trainer(net, fourth).step(rng.standard_normal((9, 3)), rng.standard_normal((9, 2)))
    assert compiler.counts()[0] >= before + 4
    assert sum("sqrt" in text.partition("struct Formula")[2] for text in texts) > 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_of_a_net_in_use_goes_on_alike(copied):
    rng = np.random.default_rng(0)
    X, Y = rng.standard_normal((2, 8, 3))
    nets = [mc.MLP([3, 5, 3], "tanh", dtype="float64")]
    trainer = mc.Trainer(nets[0])
    trainer.step(X, Y)
    nets.append(copied(nets[0]))
    trainers = [mc.Trainer(net) for net in nets]
    np.testing.assert_array_equal(*(float(each.step(X, Y)) for each in trainers))
    np.testing.assert_array_equal(*(net.parameters for net in nets))


# -- mlpcore info --compile ------------------------------------------------------------------------


def test_after_compiling_ahead_trainings_find_their_passes(fake, idle, capsys):
    """The compiler is fake, and so are the passes: what they are asked for is looked at alone."""
    fake(idle)
    assert main(["info", "--compile"]) == 0
    made = compiler.counts()[0]
    assert made == len(cache()) > 50
    assert f"\n{made} passes of float32 compiled in " in capsys.readouterr().out
    X = np.full((9, 4), 0.25, np.float32)
    start_again()
    for activations, loss, optimizer in (
        (["gelu", "prelu"], "huber", mc.Lion()),
        (["sigmoid", "softmax"], "cross_entropy", mc.RMSprop()),
        (["relu", "sigmoid"], "binary_cross_entropy", mc.SGD(0.1, momentum=0.5, nesterov=True)),
        (["selu", "softplus"], "poisson", mc.Adam(0.5)),
    ):
        net = mc.MLP([4, 7, 4], *activations)
        trainer = mc.Trainer(net, loss, optimizer, on_non_finite="skip")
        trainer.fit(X, X, epochs=1, progress=False)
        net.predict(X)
    assert compiler.counts()[0] == 0
    start_again()
    assert main(["info", "--compile"]) == 0
    said = capsys.readouterr().out
    assert f"\n0 passes of float32 compiled in 0.0 s, {made} found in the cache" in said


def test_each_update_of_the_sheet_is_compiled_ahead():
    assert sorted(optimizer.row for optimizer in ahead.OPTIMIZERS) == sorted(sheet.UPDATES)


@pytest.mark.parametrize(("lines", "reason"), [("exit 3", "ended with code 3"), (None, "not on")])
def test_compiling_ahead_without_a_compiler_is_an_error(lines, reason, fake, patch, capsys):
    if lines:
        fake(lines)
    else:
        patch.setenv("CXX", "no-such-compiler")
    assert main(["info", "--compile", "--dtype", "float64"]) == 2
    assert re.search(
        f"--compile: expected a C.* that works; got none: .*{reason}", capsys.readouterr().err
    )
