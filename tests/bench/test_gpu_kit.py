"""The check on a GPU, bench/gpu: each section in tiny sizes on the played device, and run.sh."""

import fcntl
import functools
import json
import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest

from bench.gpu import check, clock, kit, probe, profiled, resume, run, sanitized, steps, warm
from mlpcore.backends import devices
from mlpcore.engine import capture
from tests.backends.cuda.emulator import device as emulator
from tests.backends.cuda.emulator.device import CpuDevice
from tests.backends.cuda.nvrtc import compile_kernels
from tests.backends.cuda.test_compile import FOUND

WITHOUT_PLUGINS = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}


@pytest.fixture
def played(monkeypatch):
    device = CpuDevice()
    monkeypatch.setitem(devices._opened, "cuda:0", device)
    return device


def entries(folder, name):
    result = json.loads((folder / f"{name}.json").read_text())
    assert set(result) == {"machine", "packages", "commit", name, "seconds"}
    assert result["seconds"].keys() == result[name].keys()
    assert {"cuda", "python", "versions"} <= result["machine"].keys()
    return result[name]


# -- sections on the played device -----------------------------------------------------------------


def test_the_check_passes_only_where_the_device_computes(played, monkeypatch, capsys):
    assert check.main() == 0
    assert "as on the CPU" in capsys.readouterr().out
    finish = emulator.finish
    monkeypatch.setattr(emulator, "finish", lambda *given: finish(*given) * 1.01)
    with pytest.raises(SystemExit, match="the GPU computes wrong losses"):
        check.main()


def test_the_probe_answers_every_question(played, tmp_path, capsys):
    assert probe.main(["--small", "--out", str(tmp_path)]) == 0
    found = entries(tmp_path, "probe")
    assert list(found) == ["rates", "launches", "epilogues", "choices", "resumed"]
    assert all(value > 0 for name in ("rates", "launches") for value in found[name].values())
    assert set(found["epilogues"]) == {
        f"{name} in {precision}"
        for name in ("identity", "relu", "gelu")
        for precision in ("float32", "tf32", "bfloat16", "float16")
    }
    for name, layer in found["epilogues"].items():
        bound = {"float32": 1e-5, "tf32": 2e-2, "bfloat16": 5e-2, "float16": 5e-3}[name.split()[-1]]
        assert [row["error"] < bound for row in (layer["apart"], *layer["joined"])] == [True] * 3, (
            name
        )
        assert layer["joined"][0]["NaN kept"], name
    ((name, row),) = found["choices"].items()
    assert name == "8 x 8 x 8 float32"
    assert row["chosen over best"] >= 1
    assert found["resumed"]["J, in the run and resumed"][0] > 0
    assert capsys.readouterr().out.splitlines()[-1] == "5 of 5 questions answered"


def test_the_probe_sees_an_epilogue_that_swallows_nan(played):
    multiply = played.multiply

    def swallowing(product, algorithm, left, right, result, bias, aux, workspace):
        multiply(product, algorithm, left, right, result, bias, aux, workspace)
        if product.epilogue == "relu":
            size = product.n * product.m
            there = np.ctypeslib.as_array((np.ctypeslib.ctypes.c_float * size).from_address(result))
            there[np.isnan(there)] = 0

    played.multiply = swallowing
    layer = probe.Layer(played, "float32", 8, 16, 16)
    relu = next(sigma for sigma in probe.OWN if sigma.name == "relu")
    assert layer.apart(relu)["NaN kept"]
    assert [row["NaN kept"] for row in layer.joined(relu)] == [False, False]


def test_a_run_resumed_another_way_fails_the_probe(played, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(probe, "QUESTIONS", (probe.resumed, probe.launches))
    monkeypatch.setitem(resume.CALLS, "go_on", lambda path: 0.0)
    assert probe.main(["--small", "--out", str(tmp_path)]) == 1
    found = entries(tmp_path, "probe")
    assert "resumed run differs: J 0.0" in found["resumed"]["failed"]
    assert found["launches"]
    assert capsys.readouterr().out.splitlines()[-1] == "1 of 2 questions answered; FAILED: resumed"


def test_instances_are_compiled_and_those_that_cannot_be_fail_the_section(played, tmp_path, capsys):
    assert warm.main(["--small", "--out", str(tmp_path)]) == 0
    (kernels,) = entries(tmp_path, "warm").values()
    assert len(kernels) == warm.SMALL
    kernel = played.kernel

    def broken(source, name):
        if name == "activation_gradient<float, Formula, 4, 256>":
            raise RuntimeError("no such thing")
        return kernel(source, name)

    played.kernel = broken
    assert warm.main(["--small", "--out", str(tmp_path)]) == 1
    (kernels,) = entries(tmp_path, "warm").values()
    assert "no such thing" in {facts.get("failed") for facts in kernels.values()}
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.match(
        r"2 of \d+ instances, 1 failed, 0 with local memory; FAILED: 0 activation_", last
    )


def test_steps_are_taken_apart(played, tmp_path, monkeypatch):
    monkeypatch.setattr(capture, "UNROLLED", 8)
    assert steps.main(["--small", "--out", str(tmp_path)]) == 0
    whole, chunked = entries(tmp_path, "steps").values()
    assert (whole["chunks"], whole["layers fused, of"][1]) == (1, 2)
    for words in (
        "step(X, Y), host us",
        "step(data), wall us",
        "graph us",
        "forward and backward us",
        "products us",
    ):
        assert whole[words] > 0
    assert whole["forward and backward over products"] > 0
    assert len(whole["algorithms"]) == 2 + 2 + 1
    assert (chunked["chunks"], chunked["rows of a chunk"]) == (14, 7)
    assert "graph us" not in chunked
    assert chunked["products us"] > 0


def test_every_headline_is_a_case_and_has_a_name_of_its_own():
    assert len({what.name for what in steps.HEADLINES}) == len(steps.HEADLINES)
    assert all(what.case in steps.CASES for what in (*steps.HEADLINES, *steps.SMALL))


def test_a_trace_becomes_a_table_of_kernels_and_the_gaps_before_them():
    def kernel(name, ts, dur, cat="kernel"):
        return {"cat": cat, "name": name, "ts": ts, "dur": dur}

    events = [
        kernel("gemm", 12, 10), kernel("gather", 0, 10),
        {"cat": "cpu_op", "name": "x", "ts": 0, "dur": 99},
        kernel("gather", 30, 12), kernel("gemm", 43, 12), kernel("Memset", 40, 1, "gpu_memset"),
    ]  # fmt: skip
    assert steps.table(events, runs=2) == {
        "gather": {"a run": 1, "us": 11, "gap before us": 4},
        "gemm": {"a run": 1, "us": 11, "gap before us": 1.5},
        "Memset": {"a run": 0.5, "us": 1, "gap before us": 0},
    }


def test_what_the_sanitizer_and_the_profiler_watch_runs(played, monkeypatch, capsys):
    assert sanitized.main(["steps"]) == 0
    tiny = functools.partial(sanitized.kernels, ("float32",), ((3, 5),))
    monkeypatch.setitem(sanitized.WATCHED, "kernels", tiny)
    assert sanitized.main(["kernels"]) == 0
    assert profiled.main(width=16, rows=8) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()][-2:] == [
        "kernels:",
        "losses",
    ]


def test_sections_are_about_the_gpu_and_say_so_where_there_is_none(tmp_path):
    words = ["--out", str(tmp_path)]
    starts = [functools.partial(section.main, words) for section in (probe, warm, steps)]
    for start in (
        *starts,
        check.main,
        profiled.main,
        lambda: sanitized.main(["steps"]),
        kit.opened,
    ):
        with pytest.raises(SystemExit, match=r"no GPU: .*CuPy is not installed"):
            start()


@pytest.mark.skipif(not FOUND and "CI" not in os.environ, reason="needs NVRTC")
def test_the_kits_own_kernels_compile():
    names = [f"{name}<0>" for name in ("one", "many", "record", "add")]
    found = compile_kernels(clock.SPIN, ["spin<0>"], "sm_90")
    found |= compile_kernels(probe.KERNELS, names, "sm_90")
    assert [kernel.spills for kernel in found.values()] == [0] * 5
    assert "globaltimer" in found["spin<0>"].ptx


# -- run.sh ----------------------------------------------------------------------------------------


def python(code):
    return [sys.executable, "-c", code]


def test_the_summary_names_each_section_its_verdict_and_its_last_line(tmp_path, capfd):
    chosen = {
        "good": run.Section(20, python("print('3 things measured')")),
        "bad": run.Section(20, python("print('half of it'); raise SystemExit('it is broken')")),
        "long": run.Section(
            1, python("import time; print('going on', flush=True); time.sleep(60)")
        ),
        "killed": run.Section(20, python("import os; os.kill(os.getpid(), 9)")),
        "tool": run.Section(20, ["no-such-tool"]),
    }
    outcomes = run.run(chosen, tmp_path)
    assert [outcome.status for outcome in outcomes] == [0, 1, 124, 137, 127]
    log, printed = (tmp_path / "log.txt").read_text(), capfd.readouterr().out
    assert "half of it" in log
    for text in (log, printed):
        summary = text[text.index("=== summary") :].splitlines()[1:]
        assert [re.sub(r" +\d+ s +", " | ", line) for line in summary] == [
            "good       ok | 3 things measured",
            "bad        FAILED (1) | it is broken",
            "long       STOPPED at its time limit | going on",
            "killed     FAILED (137) | it printed nothing",
            "tool       FAILED (127) | no-such-tool is not on PATH",
        ]


def test_what_a_section_has_started_ends_with_it(tmp_path):
    lock = tmp_path / "lock"
    child = f"import fcntl, time; f = open({str(lock)!r}, 'w'); fcntl.flock(f, fcntl.LOCK_EX); "
    child += "print('locked', flush=True); time.sleep(60)"
    parent = f"import subprocess as s; s.Popen({python(child)!r}, stdout=s.PIPE).stdout.readline()"
    (outcome,) = run.run({"left": run.Section(20, python(parent))}, tmp_path)
    assert outcome.status == 0
    begin = time.monotonic()
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
    assert time.monotonic() - begin < 30


def test_nothing_runs_on_a_gpu_that_does_not_compute(tmp_path, capsys):
    chosen = {
        "gpu": run.Section(20, python("raise SystemExit('no GPU: none')")),
        "probe": run.Section(20, python("")),
    }
    assert [outcome.name for outcome in run.run(chosen, tmp_path)] == ["gpu"]
    assert capsys.readouterr().out.splitlines()[-1] == "probe      not run"


def test_a_long_log_keeps_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "LOGGED", 100)
    run.run({"loud": run.Section(20, python("print('x' * 10000); print('the end')"))}, tmp_path)
    log = (tmp_path / "log.txt").read_text()
    assert len(log) < 400
    assert "the end" in log


def test_run_sh_fails_without_a_gpu_and_says_why_from_any_folder(tmp_path, root):
    command = ["bash", str(root / "bench" / "gpu" / "run.sh"), "probe", "tests"]
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "OUT": str(tmp_path / "out"),
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    gpu, *others = done.stdout[done.stdout.index("=== summary") :].splitlines()[1:]
    assert re.match(r"gpu +FAILED \(1\) +\d+ s  no GPU: ", gpu)
    assert others == ["probe      not run", "tests      not run"]
    assert (tmp_path / "out" / "log.txt").exists()
    unknown = subprocess.run(
        [*command, "prob"], capture_output=True, text=True, check=False, env=environment
    )
    assert unknown.returncode == 2
    assert "invalid choice: 'prob'" in unknown.stderr


def test_results_go_to_a_fresh_folder_that_is_named(monkeypatch, capsys):
    monkeypatch.delenv("OUT", raising=False)
    nothing = dict.fromkeys(("gpu", "probe"), run.Section(9, python("")))
    monkeypatch.setattr(run, "sections", lambda out: nothing)
    folders = []
    for _ in range(2):
        assert run.main(["probe"]) == 0
        folders.append(capsys.readouterr().out.splitlines()[0].removeprefix("results: "))
        assert os.listdir(folders[-1]) == ["log.txt"]
    assert len(set(folders)) == 2


def test_a_folder_for_results_that_cannot_be_written_is_refused_by_its_name(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("OUT", str(tmp_path / "file"))
    with pytest.raises(SystemExit) as left:
        run.main(["probe"])
    assert left.value.code == 2
    assert (
        f"OUT must be a folder that can be written; got {tmp_path / 'file'}: "
        in capsys.readouterr().err
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kernels", "peers"])
def test_the_commands_of_other_scripts_are_understood_by_them(tmp_path, root, name):
    command = run.sections(tmp_path)[name].command
    environment = {**os.environ, "PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr  # 2 is argparse's
    assert "CUDA" in done.stderr


def test_all_sections_together_leave_eight_files_and_fit_two_calls_of_ten_minutes(tmp_path):
    every = run.sections(tmp_path)
    for names in ("gpu probe warm tests steps", "gpu tests kernels peers memcheck ncu"):
        assert sum(every[name].seconds for name in names.split()) <= 600
    words = {word for section in every.values() for word in section.command}
    modules = {word for word in words if word.startswith("bench.gpu.")}
    found = {f"bench.gpu.{file.stem}" for file in (run.ROOT / "bench" / "gpu").glob("*.py")}
    assert modules <= found
    assert found - modules == {
        f"bench.gpu.{name}" for name in ("__init__", "clock", "kit", "resume", "run")
    }


# -- the tests' guard ------------------------------------------------------------------------------


def pytest_run(folder, **environment):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "bench.gpu.guard",
        "-p",
        "no:cacheprovider",
        "-c",
        os.devnull,
    ]
    environment = {**os.environ, **WITHOUT_PLUGINS, **environment}
    return subprocess.run(
        [*command, "--rootdir", str(folder), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def broken_after_one(tmp_path):
    """A folder of three tests, and a CuPy whose context the second of them breaks."""
    (tmp_path / "cupy.py").write_text(
        "class CUDARuntimeError(RuntimeError): pass\n"
        "broken = []\n"
        "def deviceSynchronize():\n"
        "    if broken: raise CUDARuntimeError('an illegal memory access')\n"
    )
    there = "import types\nimport cupy\ncupy.cuda = types.SimpleNamespace(runtime=cupy)\n"
    (tmp_path / "conftest.py").write_text(there)
    (tmp_path / "test_three.py").write_text(
        "import cupy\ndef test_one(): pass\ndef test_two(): cupy.broken.append(1)\ndef "
        "test_three(): pass\n"
    )
    return tmp_path


def test_without_a_gpu_the_tests_are_a_failure_and_not_skipped(broken_after_one, root):
    done = pytest_run(broken_after_one, PYTHONPATH=str(root))
    assert done.returncode == 1
    assert "no GPU: " in done.stdout + done.stderr
    assert "passed" not in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("worker", [False, True], ids=["alone", "as a worker of pytest-xdist"])
def test_a_broken_context_ends_the_process_and_blames_its_test(broken_after_one, root, worker):
    if worker:
        with open(broken_after_one / "conftest.py", "a") as file:
            file.write("def pytest_configure(config): config.workerinput = {}\n")
    pretend = "from mlpcore.backends import devices\ndevices.why_no_cuda = lambda: ''\n"
    (broken_after_one / "sitecustomize.py").write_text(pretend)
    done = pytest_run(broken_after_one, PYTHONPATH=f"{broken_after_one}{os.pathsep}{root}")
    assert done.returncode == 86
    words = "test_two broke the CUDA context: an illegal memory access"
    assert words in done.stdout + done.stderr
    assert ("2 passed" in done.stdout) != worker  # a worker is gone at once
