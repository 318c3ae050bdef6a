"""The counted launch plan: a tiny net by hand, and kernels that the model does not know."""

import re
from pathlib import Path

import numpy as np
import pytest

from bench import launch_plan
from bench.cases import CASES, Case, Point
from bench.launch_plan import Call, Moved, Multiplication, NotingDevice, count, least, moved
from mlpcore.backends.cuda import source as cuda_source
from mlpcore.backends.cuda.gemm import Product

TINY = Case("tiny", (8, 4, 3), "relu", "squared_error")
BATCH, PARAMETERS = 16, 8 * 4 + 4 * 3 + 4 + 3
X, Z1, Z2, W1, W2 = BATCH * 8, BATCH * 4, BATCH * 3, 8 * 4, 4 * 3  # entries; Y is as large as Z2


def tiny(precision="float32", epilogues=False):
    return count(TINY, Point("tiny", BATCH, "AdamW", precision, "cuda"), epilogues)


def test_the_kernels_of_a_tiny_net_are_what_one_counts_by_hand():
    plan = tiny()
    assert plan.kernels == {
        "set_slot": 1, "gather": 1, "product": 5, "bias_activation": 2, "elementwise_loss": 1,
        "activation_gradient": 1, "prepare_update": 1, "update": 1,
    }  # fmt: skip
    assert (plan.graphs, plan.singles, plan.nodes, plan.chain) == (1, 1, 12, 13)
    assert plan.fit_launches == 2 / 64


def test_the_bytes_of_a_tiny_net_are_what_one_counts_by_hand():
    forward = X + (X + W1) + (Z1 + 4) + (Z1 + W2) + (Z2 + 3)
    backward = (Z2 + Z2 + 1) + (Z1 + Z2) + (Z2 + W2) + (Z1 + Z1) + (X + Z1)
    assert tiny().moved.read == 4 * (forward + backward + PARAMETERS + 4 * PARAMETERS)
    forward = X + Z1 + Z1 + Z2 + Z2
    backward = (Z2 + 3) + W2 + Z1 + (Z1 + 4) + W1
    assert tiny().moved.written == 4 * (forward + backward + 3 * PARAMETERS)


def test_an_epilogue_takes_the_place_of_two_launches():
    apart, fused = tiny(), tiny(epilogues=True)
    assert (fused.kernels["product + relu"], fused.kernels["product + bias"]) == (1, 1)
    assert fused.nodes == apart.nodes - 2
    assert apart.moved.read - fused.moved.read == 4 * (Z1 + Z2)
    assert apart.moved.written - fused.moved.written == 4 * (Z1 + Z2)


def test_the_least_is_rows_and_the_passes_over_the_parameters():
    XY, step = X + Z2, Point("tiny", BATCH, "AdamW", "float32", "cuda")
    assert least(TINY, step, 132) == 4 * (XY + (1 + 6 + 2) * PARAMETERS)
    low = Point("tiny", BATCH, "AdamW", "bfloat16", "cuda")
    assert least(TINY, low, 132) == 4 * (XY + (6 + 2) * PARAMETERS) + 2 * 2 * PARAMETERS


def test_activations_count_where_they_cannot_stay_on_the_chip():
    case, low = CASES["wide"], "bfloat16"

    def added(batch):
        base = batch * 4 * 2 * 4096 + 4 * 8 * case.parameters + 2 * 2 * case.parameters
        return least(case, Point("wide", batch, "AdamW", low, "cuda"), 132) - base

    assert added(8) == 0  # in registers
    assert added(8192) == 2 * 2 * 8192 * 4096 * (3 + 4)
    narrow = Point("narrow", 2**18, "AdamW", "float16", "cuda")
    assert least(CASES["narrow"], narrow, 132) < 2**18 * 64 * 4 * 2 + 2**20  # one multiprocessor


def test_an_unknown_kernel_is_an_error_that_names_it():
    with pytest.raises(ValueError, match="the kernel 'no_such' reads and writes: add it to MODEL"):
        moved(Call("", "no_such<float, 4>", ()))


def test_a_source_without_its_constant_is_an_error():
    with pytest.raises(ValueError, match="the source of update<float> does not define writes"):
        moved(Call("struct Formula {};", "update<float>", (None,) * 5))


def test_every_kernel_of_a_step_is_in_the_model(root):
    text = "".join(path.read_text() for path in Path(root, "kernels").glob("*.cu"))
    kernels = re.findall(r"__global__\s+void\s+(?:__launch_bounds__\(.*?\)\s*)?(\w+)\(", text)
    assert set(kernels) - {"randomize"} == set(launch_plan.MODEL)


def test_a_product_that_accumulates_reads_its_result():
    product = Product(3, 5, 7, False, False, 3, 7, 3, "bfloat16", "float32", accumulate=True)
    assert moved(Multiplication(product, bias=False, aux=False)) == Moved(
        2 * (3 * 7 + 7 * 5) + 4 * 3 * 5, 4 * 3 * 5
    )


def test_a_bound_launch_notes_a_structured_argument_as_it_is_at_the_call():
    device = NotingDevice()
    slot = np.zeros((), [("step", "i8")])
    run = device.bind(device.kernel("", "set_slot<float>"), None, [slot])
    for step in (1, 2):
        slot["step"] = step
        run()
    assert [int(event.arguments[0]["step"]) for event in device.events] == [1, 2]


def test_targets_and_weights_count_in_the_callers_types():
    x, db = np.zeros((4, 8), np.float32), np.zeros(8, np.float32)
    rest = [np.zeros(1), None, x, db, None, None, None, 0, 4, 8, 0]
    call = Call(
        "",
        "elementwise_loss<float, unsigned char, double, Formula, 4, 256>",
        (x, *[None] * 4, 1, *rest),
    )
    assert moved(call) == Moved(128 + 32 * 1 + 4 * 8 + 8, 128 + 32)
    call = Call(
        "", "softmax_cross_entropy<float, short, float>", (x, *[None] * 4, 0, 1, *rest, np.inf)
    )
    assert moved(call) == Moved(128 + 4 * 2 + 8, 128 + 32)


@pytest.mark.parametrize("name", ["float", "half_t", "bfloat16_t", "long long", "unsigned char"])
def test_the_entries_of_every_source_type_are_known(name):
    assert name in cuda_source.TYPES.values()
    wanted = {"float": 4, "half_t": 2, "bfloat16_t": 2, "long long": 8, "unsigned char": 1}
    assert launch_plan.entry(name) == wanted[name]


def test_the_command_prints_a_table_and_says_what_it_counts(capsys):
    launch_plan.main(["--case", "latency"])
    head, rule, row, *_, legend = capsys.readouterr().out.strip().split("\n")
    assert head.count("|") == rule.count("|") == row.count("|") == len(launch_plan.HEAD) + 1
    assert row.startswith("| 256-256-256-256, float32, 128 rows | 14 | 1 + 1 | 0.0312 |")
    assert legend in launch_plan.LEGEND


def test_a_case_that_is_none_is_refused(capsys):
    with pytest.raises(SystemExit):
        launch_plan.main(["--case", "nothing"])
    assert "--case 'nothing': expected a part of one of wide/8192" in capsys.readouterr().err
