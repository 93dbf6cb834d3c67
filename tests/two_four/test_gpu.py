"""2:4 products by cuSPARSELt on a GPU: right for every kernel that is taken, under torch.compile and in CUDA graphs."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from torch.nn import functional

from compressor import checkpoint, exported, recipe
from compressor.progress import Progress
from compressor.run import run
from compressor.sparsity import lowest_of_groups
from compressor.two_four import product
from compressor.two_four.choice import Measuring
from compressor.two_four.runtime import install

GPU = torch.device("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(product.problem(GPU) is not None, reason="needs a GPU and a torch with cuSPARSELt"),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [64, 37])  # the second is padded
def test_the_product_is_that_of_the_dense_weight_under_compile_too(dtype, tokens):
    weight_OI = torch.randn(128, 64, device=GPU, dtype=dtype)
    weight_OI.masked_fill_(lowest_of_groups(weight_OI.float().abs(), 2, 4), 0)
    x, bias_O = torch.randn(tokens, 64, device=GPU, dtype=dtype), torch.randn(128, device=GPU, dtype=dtype)
    right = functional.linear(x, weight_OI, bias_O)
    packed = product.pack(weight_OI)
    right_ones: list[product.Algorithm] = []
    for kernel in product.candidates(x, packed, bias_O):
        try:
            off = product.difference(product.linear(x, packed, bias_O, 128, *kernel), right)
        except RuntimeError:
            product.settle()
            continue  # a kernel that does not take this shape
        assert off <= product.TOLERANCE[dtype]
        right_ones.append(kernel)
    kernel = right_ones[0]
    compiled = torch.compile(lambda x: product.linear(x, packed, bias_O, 128, *kernel) * 2, fullgraph=True)
    assert product.difference(compiled(x), right * 2) <= product.TOLERANCE[dtype]


@pytest.mark.parametrize("bias", [True, False])
def test_a_shape_is_measured_dense_and_sparse(bias):
    timed = product.measure(100, 64, 128, bias=bias, dtype=torch.bfloat16, device=GPU, turns=3)
    assert (len(timed.dense), len(timed.sparse)) == (3, 3), timed.note
    assert timed.error is not None
    assert timed.error <= product.TOLERANCE[torch.bfloat16]
    assert product.measure(100, 80, 128, bias=bias, dtype=torch.bfloat16, device=GPU, turns=3).note


@pytest.mark.parametrize("kind", ["sd3", "flux", "sdxl"])
def test_a_2_4_result_draws_the_same_by_the_runtime(kind, tmp_path: Path):
    data = {
        "model": str(tiny.save(kind, tmp_path / "model", torch.float16)),
        "device": "cuda",
        "prune": [{"magnitude": {"granularity": {"n_m": {"keep": 2, "of": 4}}}}],
        "report": {"images": 0},
        "output": str(tmp_path / "out"),
    }
    output = run(recipe.Recipe.model_validate(data), Progress())
    right = checkpoint.load(output, "cuda")
    loaded = exported.open_pipeline(output, "cuda", "torch-sparse")
    lines: list[str] = []
    measured = Measuring(loaded.dtype, GPU, 0.01, lines.append)  # so little that every shape with a kernel is taken
    forward = install(loaded.module, loaded.family, measured, lines.append)
    given = right.example_inputs()
    with torch.no_grad():
        expected = right.module(**given, return_dict=False)[0]
    for _ in range(2):  # recorded, then replayed
        found = loaded.module(**given, return_dict=False)[0]
        assert product.difference(found, expected) < 1e-2
    assert forward.sparse[0], lines
