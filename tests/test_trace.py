"""The meta-device twin's trace against a real forward of the network, and its operations against a count by hand."""

from __future__ import annotations

import math

import pytest
import torch
from compressor_obs_diff.weightings import Uniform
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from compressor.structure import find_targets, trace
from compressor.structure.trace import _ByShapes
from tests import tiny

KINDS = pytest.mark.parametrize("kind", list(tiny.KINDS))


@KINDS
def test_the_twin_is_on_the_meta_device_and_has_the_networks_shapes(kind):
    pipeline = tiny.load(kind)
    twin = pipeline.folder.twin()
    assert {p.device.type for p in twin.parameters()} == {"meta"}
    shapes = {name: p.shape for name, p in twin.named_parameters()}
    assert shapes == {name: p.shape for name, p in pipeline.module.named_parameters()}


@KINDS
def test_shared_inputs_tokens_and_constants_are_those_of_a_real_sampling(kind):
    pipeline = tiny.load(kind)
    trace = tiny.traced(pipeline)
    fed: dict[str, list[Tensor]] = {target.name: [] for target in pipeline.targets}
    for target in pipeline.targets:
        tiny.record_inputs(target.module, fed[target.name])
    calibration = tiny.calibrate(pipeline, ("a cat",), steps=3, packages=1, guidance=1.0)
    (package,) = calibration.packages(pipeline.targets[:1], "norms", tiny.no_workspace)
    calibration.collect(package, "norms", Uniform())
    assert {len(inputs) for inputs in fed.values()} == {3}
    first: dict[int, str] = {}
    for name, inputs in fed.items():
        assert trace.shared[name] == first.setdefault(id(inputs[0]), name)
        assert trace.tokens[name] == math.prod(inputs[0].shape[:-1])
        constant = all(torch.equal(inputs[0], x) for x in inputs[1:])
        assert (name in trace.constant) == constant


@pytest.mark.parametrize("kind", ["sd3", "sd35", "flux"])
def test_all_adaln_linears_are_fed_one_vector_a_sample_and_the_same_whatever_is_pruned(kind):
    pipeline = tiny.load(kind)
    found = find_targets(pipeline.module, pipeline.family, adaln=True)
    adaln = [target for target in found if target.layer.part == "adaln"]
    trace = tiny.traced(pipeline)
    assert {trace.shared[target.name] for target in adaln} == {adaln[0].name}
    assert {trace.tokens[target.name] for target in adaln} == {1}
    assert not {target.name for target in adaln} & trace.constant
    fed: dict[str, list[Tensor]] = {target.name: [] for target in adaln}
    for target in adaln:
        tiny.record_inputs(target.module, fed[target.name])
    calibration = tiny.calibrate(pipeline, ("a cat", "rain"), steps=3, packages=1, guidance=1.0)
    (package,) = calibration.packages(pipeline.targets[:1], "norms", tiny.no_workspace)
    for halved in (False, True):
        if halved:
            for target in found:
                target.module.weight.data[:, ::2] = 0
        calibration.collect(package, "norms", Uniform())
    for inputs in fed.values():
        assert len(inputs) == 6
        assert all(torch.equal(x, first) for x, first in zip(inputs, fed[adaln[0].name], strict=True))
        assert all(torch.equal(x, again) for x, again in zip(inputs[:3], inputs[3:], strict=True))
        assert inputs[0].shape == (2, adaln[0].inputs)
        assert not torch.equal(inputs[0][0], inputs[0][1])  # of two prompts
        assert not torch.equal(inputs[0], inputs[1])  # of two steps


def test_only_the_prompts_embedding_is_constant():
    for kind in tiny.KINDS:
        pipeline = tiny.load(kind)
        text = {t.name for t in pipeline.targets if t.name.endswith(("attn2.to_k", "attn2.to_v"))}
        expected = text if tiny.FAMILY[kind] == "unet" else set()
        assert tiny.traced(pipeline).constant == expected


@KINDS
def test_operations_of_a_layer_are_tokens_times_inputs_times_outputs(kind):
    pipeline = tiny.load(kind)
    trace = tiny.traced(pipeline)
    for target in pipeline.targets:
        tokens = trace.tokens[target.name]
        assert trace.macs_of[target.name] == tokens * target.module.weight.numel()


def test_operations_of_sd3_are_those_counted_by_hand():
    """Latents of 8 x 8 x 4 in patches of 2 x 2: 16 tokens of width 16; 272 of text; two heads of 8."""
    pipeline = tiny.load("sd3")
    trace = tiny.traced(pipeline)
    image, text, width = 16, 16 + 256, 16
    assert trace.macs_of["transformer_blocks.0.attn.to_q"] == 16 * 16 * 16
    assert trace.macs_of["transformer_blocks.0.ff_context.net.0.proj"] == 272 * 16 * 64

    attention = 2 * (image + text) ** 2 * width
    stream = 4 * width * width + 2 * 4 * width * width  # q, k, v, output; up and down
    first = (image + text) * stream + attention + 2 * 6 * width * width
    last = image * stream + text * 3 * width * width + attention + (6 + 2) * width * width
    embedding = 16 * image * width + text * 64 * width  # patches; context
    time = 256 * width + width * width + 64 * width + width * width
    output = 2 * width * width + image * width * 2 * 2 * 4
    assert trace.macs == embedding + time + first + last + output


@KINDS
def test_operations_are_those_of_the_real_network(kind):
    """Linears and convolutions counted by hooks; the rest of what the trace counts is attention's two products."""
    pipeline = tiny.load(kind)
    trace = tiny.traced(pipeline)
    macs = 0

    def count(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        nonlocal macs
        weight = module.weight
        assert isinstance(weight, Tensor)
        macs += output.numel() * weight[0].numel()

    for module in pipeline.module.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.register_forward_hook(count)
    products: list[int] = []
    real = nn.functional.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, **settings) -> Tensor:
        products.append(2 * query.numel() * key.shape[-2])
        return real(query, key, value, **settings)

    side = tiny.SIDE // pipeline.folder.vae_factor
    arguments = pipeline.family.inputs(
        pipeline.module, batch=1, height=side, width=side, sequence=pipeline.folder.text_tokens()
    )
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(nn.functional, "scaled_dot_product_attention", attention)
        pipeline.module(**arguments)
    assert products
    assert trace.macs == macs + sum(products)


@pytest.mark.parametrize("kind", [*tiny.KINDS, "pixart", "auraflow"])
def test_operations_are_those_that_pytorch_counts(kind):
    """All of them, also where the trace goes by shapes alone."""
    pipeline = tiny.load(kind)
    found, sizes = pipeline.folder, {"height": 8, "width": 8}
    twin, sequence = found.twin(), found.text_tokens()
    arguments = found.family.inputs(twin, batch=1, **sizes, sequence=sequence)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        twin(**arguments, return_dict=False)
    assert 2 * trace(twin, found.family, **sizes, sequence=sequence).macs == counter.get_total_flops()


class Normed(nn.Module):
    """Norms of transposed inputs, whose outputs lie in memory in order."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.group = nn.LayerNorm(8), nn.GroupNorm(2, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(x.flatten(2).transpose(1, 2)), self.group(x.transpose(2, 3))


def test_what_a_trace_answers_by_shapes_lies_in_memory_as_what_pytorch_gives():
    with torch.device("meta"):
        network, x = Normed(), torch.empty(2, 8, 4, 6)
    expected = network(x)
    with _ByShapes():
        found = network(x)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert one.stride() == other.stride()
    with _ByShapes(), pytest.raises(RuntimeError):
        nn.LayerNorm(9, device="meta")(torch.empty(2, 8, device="meta"))
