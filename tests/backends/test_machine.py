"""CPUs and memory are counted as the process may use them, not as the machine has them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import mlpcore as mc
from mlpcore.backends import machine

V1 = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n"
V1 += "32 31 0:29 {} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
V2 = "31 23 0:28 {} /sys/fs/cgroup rw,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A writer of the files in which Linux tells of control groups, on a machine of 64 CPUs."""
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.delenv("LOKY_MAX_CPU_COUNT", raising=False)
    for name in ("sched_getaffinity", "process_cpu_count"):
        monkeypatch.delattr(os, name, raising=False)

    def write(group, mounts, **files):
        told = {
            "proc/self/cgroup": group,
            "proc/self/mountinfo": mounts,
            **{k.replace("__", "."): v for k, v in files.items()},
        }
        for name, text in told.items():
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return tmp_path

    return write


TOP = "sys/fs/cgroup"
CASES = {
    "v2, the top of a container": ("0::/\n", V2.format("/"), {f"{TOP}/cpu.max": "250000 100000\n"},
        3),
    "v2, no quota": ("0::/\n", V2.format("/"), {f"{TOP}/cpu.max": "max 100000\n"}, 64),
    "v2, its own group, not the top": ("0::/a/b\n", V2.format("/"),
        {f"{TOP}/a/b/cpu.max": "200000 100000"}, 2),
    "v2, a group above": (
        "0::/a/b\n", V2.format("/"),
        {f"{TOP}/a/b/cpu.max": "800000 100000", f"{TOP}/a/cpu.max": "400000 100000"}, 4,
    ),
    "v2, another's group": ("0::/a\n", V2.format("/"), {f"{TOP}/b/cpu.max": "100000 100000"}, 64),
    "v2, mounted from its own group": ("0::/docker/7\n", V2.format("/docker/7"),
        {f"{TOP}/cpu.max": "50000 100000"}, 1),
    "v2, a group beside the mount": ("0::/../x\n", V2.format("/"),
        {f"{TOP}/cpu.max": "100000 50000"}, 2),
    "v1": (
        "4:cpu,cpuacct:/job\n0::/\n", V1.format("/"),
        {f"{TOP}/cpu,cpuacct/job/cpu.cfs_quota_us": "300000",
            f"{TOP}/cpu,cpuacct/job/cpu.cfs_period_us": "100000"}, 3,
    ),
    "v1, no quota": (
        "4:cpu,cpuacct:/\n", V1.format("/"),
        {f"{TOP}/cpu,cpuacct/cpu.cfs_quota_us": "-1",
            f"{TOP}/cpu,cpuacct/cpu.cfs_period_us": "100000"}, 64,
    ),
    "no files at all": ("", "", {}, 64),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_quota_of_the_process_own_control_group_counts(tree, case):
    group, mounts, files, cpus = CASES[case]
    root = tree(group, mounts, **files)
    assert machine.usable_cpus(root) == cpus
    assert machine.describe_cpus(root) == (
        f"{cpus} of 64 (cgroup quota)" if cpus < 64 else "64 of 64"
    )


def test_the_lowest_limit_counts_and_is_named(tree, monkeypatch):
    root = tree("0::/\n", V2.format("/"), **{f"{TOP}/cpu.max": "800000 100000"})
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {*range(6)}, raising=False)
    assert machine.describe_cpus(root) == "6 of 64 (affinity)"
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "5")
    assert machine.describe_cpus(root) == "5 of 64 (LOKY_MAX_CPU_COUNT)"
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "0")
    assert machine.usable_cpus(root) == 1
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "many")
    assert machine.usable_cpus(root) == 6


def test_free_memory_is_that_of_the_process_own_control_group(tree):
    info = {"proc/meminfo": "MemTotal: 100 kB\nMemAvailable:   90 kB\n"}
    mine = {f"{TOP}/a/memory.max": "50000", f"{TOP}/a/memory.current": "20000"}
    assert machine.free_memory(tree("0::/a\n", V2.format("/"), **info)) == 90 << 10
    assert machine.free_memory(tree("0::/a\n", V2.format("/"), **info, **mine)) == 30000
    above = {f"{TOP}/memory.max": "30000", f"{TOP}/memory.current": "29000"}
    assert machine.free_memory(tree("0::/a\n", V2.format("/"), **info, **mine, **above)) == 1000
    assert (
        machine.free_memory(tree("0::/a\n", V2.format("/"), **info, **mine, **above) / "nowhere")
        is None
    )


CHILD = """
import os, sys, numpy as np
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}) if sys.argv[1] == "affinity" else None
import mlpcore as mc
from mlpcore.backends.numpy import blas
from mlpcore.engine import passes
seen, count = [], lambda: blas._libraries()[0].get_num_threads()
before = count()
def look(function):
    def looking(*arguments):
        seen.append(count())
        return function(*arguments)
    return looking
net = mc.MLP([8, 300, 300, 8], "relu")
trainer = mc.Trainer(net, "squared_error")
X = np.ones((1024, 8), np.float32)
step, passes._forward = trainer._step, look(passes._forward)
type(step)._stretch = lambda *_: None  # the calls of a step are made one by one
step._loss_and_squares, step.evaluate = look(step._loss_and_squares), look(step.evaluate)
trainer.step(X, X), trainer.gradient(X, X), trainer.evaluate(X, X), net.predict(X), net.forward(X)
info = mc.info()
print(info["cpus"], info["cpus usable"], trainer._step.lanes.threads, *seen, count() == before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("limit", ["affinity", "LOKY_MAX_CPU_COUNT"])
def test_no_thread_is_used_beyond_the_usable_cpus_although_blas_would(limit):
    """With one CPU allowed, BLAS uses one thread in each call of ours, and two again after it."""
    if limit == "affinity" and not hasattr(os, "sched_setaffinity"):
        pytest.skip("a system without affinities")
    env = {
        **os.environ,
        "OPENBLAS_NUM_THREADS": "2",
        "OMP_NUM_THREADS": "2",
        "PYTHONPATH": str(Path(mc.__file__).parents[1]),
    }
    env |= {limit: "1"} if limit != "affinity" else {}
    run = subprocess.run(
        [sys.executable, "-c", CHILD, limit], env=env, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [
        "1",
        "1",
        "of",
        str(os.cpu_count()),
        f"({limit})",
        "1",
        *"11111",
        "True",
    ]


@pytest.mark.parametrize("line", [b"40 23 0:50 / /mnt/\xff\xe9 rw - tmpfs tmpfs rw\n", b""])
def test_a_mount_point_of_any_bytes_hides_no_quota(line, tree):
    root = tree("0::/\n", V2.format("/"), **{f"{TOP}/cpu.max": "250000 100000\n"})
    mounts = root / "proc/self/mountinfo"
    mounts.write_bytes(line + mounts.read_bytes())
    assert machine.usable_cpus(root) == 3
