"""2:4 products by cuSPARSELt on a GPU: right for every kernel that is taken, under torch.compile and in CUDA graphs."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from compressor import registry
from compressor.bench import models, networks
from compressor.bench.models import KnownModel
from compressor.sparsity import lowest_of_groups
from compressor.structure import find_targets
from compressor.two_four import product
from compressor.two_four.choice import Measuring
from compressor.two_four.layers import TwoFourLinear
from compressor.two_four.runtime import install

GPU = torch.device("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(product.problem(GPU) is not None, reason="needs a GPU and a torch with cuSPARSELt"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),  # torch 2.11's compiler uses what torch deprecates
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16])
@pytest.mark.parametrize("tokens", [512, 333])  # the second is padded
def test_the_product_is_that_of_the_dense_weight_under_compile_too(dtype, tokens):
    weight_OI = torch.randn(256, 512, device=GPU, dtype=dtype)
    weight_OI.masked_fill_(lowest_of_groups(weight_OI.float().abs(), 2, 4), 0)
    x, bias_O = torch.randn(tokens, 512, device=GPU, dtype=dtype), torch.randn(256, device=GPU, dtype=dtype)
    right = functional.linear(x, weight_OI, bias_O)
    packed = product.pack(weight_OI)
    right_ones: list[product.Algorithm] = []
    for kernel in product.candidates(x, packed, bias_O):
        try:
            off = product.difference(product.linear(x, packed, bias_O, 256, *kernel), right)
        except RuntimeError:
            product.settle()
            continue  # a kernel that does not take this shape
        assert off <= product.TOLERANCE[dtype]
        right_ones.append(kernel)
    kernel = right_ones[0]
    compiled = torch.compile(lambda x: product.linear(x, packed, bias_O, 256, *kernel) * 2, fullgraph=True)
    assert product.difference(compiled(x), right * 2) <= product.TOLERANCE[dtype]


@pytest.mark.parametrize("bias", [True, False])
def test_a_shape_is_measured_dense_and_sparse(bias):
    timed = product.measure(300, 512, 256, bias=bias, dtype=torch.bfloat16, device=GPU, turns=3)
    assert (len(timed.dense), len(timed.sparse)) == (3, 3), timed.note
    assert timed.error is not None
    assert timed.error <= product.TOLERANCE[torch.bfloat16]
    assert product.measure(300, 520, 256, bias=bias, dtype=torch.bfloat16, device=GPU, turns=3).note


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_a_2_4_network_computes_the_same_by_the_runtime(dtype):
    config = {**models.find("sd3-medium").config, "num_layers": 2, "num_attention_heads": 8}
    model = KnownModel("small", "sd3", {**config, "caption_projection_dim": 512}, ("num_layers",), tokens=300)
    family = registry.load("family", "sd3")
    network = networks.build(model, family, None, GPU, dtype)
    for target in find_targets(network, family):
        weight_OI = target.module.weight.data
        weight_OI.masked_fill_(lowest_of_groups(weight_OI.float().abs(), 2, 4), 0)
    given = networks.inputs(model, family, network, 2, 512)
    with torch.no_grad():
        expected = network(**given, return_dict=False)[0]
    lines: list[str] = []
    measured = Measuring(dtype, GPU, 0.01, lines.append)  # so little that every shape with a kernel is taken
    forward = install(network, family, measured, lines.append)
    for _ in range(2):  # recorded, then replayed
        found = network(**given, return_dict=False)[0]
        assert product.difference(found, expected) < 3e-2
    assert len(forward.sparse[0]) == len(find_targets_of(network)), lines


def find_targets_of(network: torch.nn.Module) -> list[str]:
    return [name for name, module in network.named_modules() if isinstance(module, TwoFourLinear)]
