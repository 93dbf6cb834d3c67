"""The Triton kernels in Triton's interpreter, against float64.

`test_interpreter.py` runs this in a process of its own, as the interpreter is switched on before triton is imported.
It multiplies no bfloat16.
"""

# Shapes: T tokens, K of a block's outputs, I inputs, O outputs.

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
from torch import Tensor

from compressor.calibration import Gradients, Moments, curvature, kernels, product_kernel
from compressor.calibration.product_kernel import Reading, Tiling, multiply, read
from tests.test_moments import assert_near, explicit

CPU = torch.device("cpu")
pytestmark = pytest.mark.gpu  # to be picked out together with the tests of `test_sweep_kernel.py`
WEIGHT = 1.0 + 2.0**-30  # 1 in float32
TILINGS = [Tiling(32, 32, 16, 2, 4, 3), Tiling(16, 64, 32, 1, 4, 3), Tiling(64, 16, 16, 3, 4, 3)]


@pytest.fixture(autouse=True, params=[False, True], ids=["loads", "engine"])
def _kernels_on_the_cpu(monkeypatch, request):
    monkeypatch.setattr(kernels, "of", lambda x: product_kernel if x.dtype in kernels.HALF else None)
    monkeypatch.setattr(product_kernel, "tiling_of", lambda _: TILINGS[0])
    monkeypatch.setattr(product_kernel, "has_engine", lambda _: request.param)


def engines(names: str, *cases: tuple) -> pytest.MarkDecorator:
    """Whether there is a copy engine, which takes part in products of widths that are multiples of 8, and what else."""
    place = "_kernels_on_the_cpu"
    ids = ["-".join(map(str, ("engine" if engine else "loads", *rest))) for engine, *rest in cases]
    return pytest.mark.parametrize((place, *names.split()), cases, ids=ids, indirect=[place])


def half(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).half()


@engines(
    "inputs second", (False, 24, True), (True, 24, True), (False, 77, True), *((False, i, False) for i in (24, 77))
)
def test_moments_are_those_that_explicit_sums_give(inputs, second):
    x = half(3, 67, inputs)
    rows_TI = x.flatten(0, 1)
    for token, value in ((0, "nan"), (31, "inf"), (32, "-inf"), (200, "nan")):
        rows_TI[token, token % inputs] = float(value)
    good_TI = rows_TI[rows_TI.isfinite().all(1)]
    before = x.clone()
    moments = Moments.empty(inputs, second, CPU)
    for weight in (0.8, WEIGHT):
        moments.add(x, weight)
    moments.finish()
    second_II, total_I, squares_I = explicit([good_TI, good_TI], [0.8, WEIGHT])
    assert_near(moments.total_I, total_I)
    assert_near(moments.squares_I, squares_I)
    assert (moments.second_II is not None) == second
    if moments.second_II is not None:
        assert_near(moments.second_II, second_II)
        assert torch.equal(moments.second_II, moments.second_II.T)
    assert (int(moments.tokens), int(moments.skipped)) == (2 * 197, 2 * 4)
    assert moments.weight.item() == pytest.approx(197 * (0.8 + WEIGHT), rel=1e-14)
    assert torch.equal(x.nan_to_num(), before.nan_to_num())


@engines("inputs", (False, 24), (True, 24), (False, 77))
def test_tokens_that_count_differently_are_summed_as_their_roots_say(inputs):
    x = half(3, 67, inputs)
    rows_TI = x.flatten(0, 1)
    for token, value in ((0, "nan"), (31, "inf"), (200, "-inf")):
        rows_TI[token, token % inputs] = float(value)
    root_T = torch.rand(201, generator=torch.Generator().manual_seed(2))
    moments = Moments.empty(inputs, True, CPU)
    for weight in (0.8, WEIGHT):
        moments.add(x, weight, root_T=root_T)
    moments.finish()
    good_T = rows_TI.isfinite().all(1)
    root_T = root_T[good_T]
    # of the halves that are multiplied
    scaled_TI = (rows_TI[good_T].float() * root_T[:, None]).half()
    second_II, _, squares_I = explicit([scaled_TI, scaled_TI], [0.8, WEIGHT])
    assert moments.second_II is not None
    assert_near(moments.second_II, second_II)
    assert_near(moments.squares_I, squares_I)
    assert_near(moments.total_I, (0.8 + WEIGHT) * (root_T.double() @ scaled_TI.double()))
    assert moments.weight.item() == pytest.approx((0.8 + WEIGHT) * root_T.double().square().sum().item(), rel=1e-6)
    assert (int(moments.tokens), int(moments.skipped)) == (2 * 198, 2 * 3)


@engines("inputs", (False, 68), (True, 72))
@pytest.mark.parametrize("tiling", TILINGS, ids=str)
@pytest.mark.parametrize("stretches", [1, 2])
def test_a_product_is_the_same_however_it_is_cut(inputs, tiling, stretches):
    x_TI = half(130, inputs)
    found = read(x_TI, total=False, squares=False)
    second_II = torch.ones(inputs, inputs)
    multiply(second_II, found, 0.5, tiling=tiling, stretches=stretches)
    expected_II = 1 + 0.5 * x_TI.double().T @ x_TI.double()
    assert_near(second_II.tril(), expected_II.tril())


@pytest.mark.parametrize("shape", [(0, 24), (1, 24), (8, 1, 24)])
def test_few_tokens_or_none_are_summed_as_any(shape):
    x = half(*shape)
    moments = Moments.empty(24, True, CPU)
    moments.add(x, 2.0)
    moments.finish()
    second_II, total_I, _ = explicit([x], [2.0])
    assert moments.second_II is not None
    assert_near(moments.second_II, second_II)
    assert_near(moments.total_I, total_I)
    assert int(moments.tokens) == x.numel() // 24


@engines("", (False,))
def test_many_tokens_and_wide_inputs_are_read_in_several_pieces():
    """More than one program's rows, columns and partial sums."""
    x_TI = half(4100, 300)
    x_TI[4099, 299] = torch.nan
    moments = Moments.empty(300, False, CPU)
    moments.add(x_TI, 1.0)
    assert_near(moments.total_I, x_TI[:-1].double().sum(0))
    assert_near(moments.squares_I, x_TI[:-1].double().square().sum(0))
    assert (int(moments.tokens), int(moments.skipped)) == (4099, 1)


def test_inputs_that_do_not_lie_next_to_each_other_are_read_as_well():
    for x_TI in (half(30, 50)[:, 7:31], half(24, 30).T, half(1, 24).expand(30, 24)):
        moments = Moments.empty(24, True, CPU)
        moments.add(x_TI, 1.0)
        moments.finish()
        assert moments.second_II is not None
        assert_near(moments.second_II, explicit([x_TI], [1.0])[0])


@engines("", (False,))
def test_bfloat16_is_read():
    x_TI = half(40, 24).bfloat16()
    x_TI[3, 23] = torch.inf
    found: Reading = read(x_TI, total=True, squares=False)
    assert found.row_K[:40].tolist() == [0, 1, 2, -1, *range(4, 40)]
    assert set(found.row_K[40:].tolist()) == {-1}
    assert int(found.bad_P.sum()) == 1
    assert found.total_PI is not None
    torch.testing.assert_close(found.total_PI.sum(0), torch.cat([x_TI[:3], x_TI[4:]]).float().sum(0))


@engines("outputs", (False, 72), (True, 80))
def test_gradients_are_multiplied_block_by_block(outputs, monkeypatch):
    monkeypatch.setattr(curvature, "BLOCK", 40)
    size = outputs // 2
    g_TO = half(2, 50, outputs)
    g_TO[1, 7, 3] = torch.inf
    finite_TO = g_TO.flatten(0, 1)[[i for i in range(100) if i != 57]].double()
    sums = Gradients.empty(outputs, CPU)
    sums.add(g_TO)
    sums.add(g_TO)
    sums.finish()
    assert sums.second_BKK.shape == (2, size, size)
    for b, second_KK in enumerate(sums.second_BKK):
        block_TK = finite_TO[:, size * b : size * b + size]
        assert_near(second_KK, 2 * block_TK.T @ block_TK)
    assert (int(sums.tokens), int(sums.skipped)) == (198, 2)
    root_T = torch.linspace(0, 1, 100)
    weighted = Gradients.empty(outputs, CPU)
    weighted.add(g_TO, 1.0, torch.tensor(2.0, dtype=torch.float64), root_T)
    scaled_TO = (g_TO.flatten(0, 1).float() * root_T[:, None]).half()[[i for i in range(100) if i != 57]].double()
    for b, second_KK in enumerate(weighted.second_BKK):
        block_TK = scaled_TO[:, size * b : size * b + size]
        assert_near(second_KK.tril(), (2 * block_TK.T @ block_TK).tril())
