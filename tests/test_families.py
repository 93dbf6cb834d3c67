"""The families' tables against the networks themselves: names by an independent rule, order by cause and effect."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressor import registry
from compressor.errors import CompressorError
from compressor.pipeline import Pipeline
from compressor.structure import Family, Target, find_targets, select
from tests import tiny

KINDS = pytest.mark.parametrize("kind", list(tiny.KINDS))


def linears_of_blocks(network: nn.Module) -> set[str]:
    """Every linear inside a transformer block, but for those of the norms, which modulate by timestep."""
    return {
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and "transformer_blocks." in name and ".norm" not in name
    }


@KINDS
def test_the_table_finds_every_linear_of_every_block_and_no_other(kind):
    pipeline = tiny.load(kind)
    names = [target.name for target in pipeline.targets]
    assert set(names) == linears_of_blocks(pipeline.module)
    assert len(set(names)) == len(names)
    assert pipeline.family.name == tiny.FAMILY[kind]
    assert pipeline.component_name == tiny.NETWORK[kind]


ADALN = {"sd3": 2 * 2 + 1, "sd35": 2 * 2 + 1, "flux": 2 + 2 + 1}
"""A norm for each stream of each block, one for each of Flux's single blocks, and the one behind all blocks."""


def everything(kind: str) -> tuple[Target, ...]:
    pipeline = tiny.load(kind)
    return find_targets(pipeline.module, pipeline.family, adaln=True)


@KINDS
def test_the_adaln_linears_are_those_of_the_norms_and_come_only_when_asked_for(kind):
    pipeline = tiny.load(kind)
    found = find_targets(pipeline.module, pipeline.family, adaln=True)
    adaln = [target for target in found if target.layer.part == "adaln"]
    expected = {
        name
        for name, module in pipeline.module.named_modules()
        if isinstance(module, nn.Linear) and re.search(r"(^|\.)norm\w*\.linear$", name)
    }
    assert {target.name for target in adaln} == expected
    assert len(adaln) == ADALN.get(kind, 0)
    assert [target.name for target in found if target not in adaln] == [target.name for target in pipeline.targets]
    for target in adaln:
        assert target.layer.role == "modulation"
        assert target.name == f"{target.block}.{target.layer.suffix}"
        assert target.layer.stream == (
            "text" if "context" in target.name else "joint" if "single" in target.name else "image"
        )


COUNTS = {"sd3": 12 + 9, "sd35": 12 + 4 + 9, "sd2": 4 * 10, "sdxl": 8 * 10, "flux": 12 + 2 * 5}


@KINDS
def test_there_are_as_many_layers_as_the_architecture_has(kind):
    assert len(tiny.load(kind).targets) == COUNTS[kind]


ROLES = {
    "query": r"(to_q|add_q_proj)$",
    "key": r"(to_k|add_k_proj)$",
    "value": r"(to_v|add_v_proj)$",
    "output": r"(to_out\.0|to_add_out)$",
    "up": r"(ff|ff_context)\.net\.0\.proj$|proj_mlp$",
    "down": r"(ff|ff_context)\.net\.2$|single_transformer_blocks\.\d+\.proj_out$",
}


@KINDS
def test_roles_parts_and_blocks_are_as_the_names_say(kind):
    for target in tiny.load(kind).targets:
        (role,) = [role for role, pattern in ROLES.items() if re.search(pattern, target.name)]
        assert target.layer.role == role
        assert target.layer.part == ("feed_forward" if role in ("up", "down") else "attention")
        assert target.name == f"{target.block}.{target.layer.suffix}"
        assert re.search(r"transformer_blocks\.\d+$", target.block)
        assert (target.outputs, target.inputs) == tuple(target.module.weight.shape)


@KINDS
def test_streams_tell_the_tokens_apart(kind):
    """A layer of the text stream is fed as many tokens as there are of text, and so on."""
    pipeline = tiny.load(kind)
    tokens = tiny.traced(pipeline).tokens
    text = pipeline.folder.text_tokens()
    image = {64, 16} if kind in ("sd2", "sdxl") else {16}
    for target in pipeline.targets:
        found = tokens[target.name]
        if target.layer.stream == "joint":
            assert found == text + 16
        elif target.layer.stream == "text":
            assert found == text
        else:
            assert found in image


@torch.no_grad()
def inputs_of_all(pipeline: Pipeline, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    targets = find_targets(pipeline.module, pipeline.family, adaln=True)
    seen: dict[str, list[Tensor]] = {target.name: [] for target in targets}
    handles = [tiny.record_inputs(target.module, seen[target.name]) for target in targets]
    pipeline.module(**arguments)
    for handle in handles:
        handle.remove()
    return {name: inputs[0] for name, inputs in seen.items()}


@KINDS
def test_a_unit_depends_on_no_unit_behind_it_and_not_on_itself(kind):
    """Changing a unit's weights changes what later layers are fed, and neither its own input nor an earlier one's."""
    pipeline = tiny.load(kind)
    torch.manual_seed(0)
    arguments = pipeline.family.inputs(pipeline.module, batch=1, height=8, width=8, sequence=16)
    before = inputs_of_all(pipeline, arguments)
    targets = find_targets(pipeline.module, pipeline.family, adaln=True)
    units: dict[tuple[str, int], list[Target]] = {}
    for target in targets:
        units.setdefault(target.unit, []).append(target)
    reached: list[str] = []
    for unit in units.values():
        reached += [target.name for target in unit]
        kept = [target.module.weight.data for target in unit]
        for target in unit:
            target.module.weight.data = target.module.weight.data + 1
        after = inputs_of_all(pipeline, arguments)
        for target, weight_OI in zip(unit, kept, strict=True):
            target.module.weight.data = weight_OI
        assert all(torch.equal(before[name], after[name]) for name in reached)
        if unit[0].name.endswith(("to_out.0", "norm1.linear")):
            behind = [target.name for target in targets if target.name not in reached]
            assert not all(torch.equal(before[name], after[name]) for name in behind)


def test_sd3s_last_block_has_no_text_output():
    names = {target.name for target in tiny.load("sd3").targets}
    assert "transformer_blocks.0.attn.to_add_out" in names
    assert not names & {f"transformer_blocks.1.{n}" for n in ("attn.to_add_out", "ff_context.net.2")}


class Other(nn.Linear):
    """A linear of another class."""


class Adapted(nn.Module):
    """As PEFT's `lora.Linear`: around a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(16, 16)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight


class Packed(nn.Linear):
    """As bitsandbytes' and GGUF's linears: whole numbers in place of weights."""

    def __init__(self) -> None:
        super().__init__(16, 16)
        self.weight = nn.Parameter(torch.zeros(16, 8, dtype=torch.uint8), requires_grad=False)


class Codes(Tensor):
    """As torchao's weights: a tensor of another class in a plain linear."""


def coded() -> nn.Linear:
    layer = nn.Linear(16, 16)
    layer.weight = nn.Parameter(torch.zeros(16, 16).as_subclass(Codes), requires_grad=False)
    return layer


QUANTISED = "it is quantised: prune the full-precision weights, and quantise the result afterwards"


def dynamic() -> nn.Module:
    """A layer of torch's own quantisation, whose weight is a method."""
    layer = nn.Linear(1, 1)
    layer.__class__ = type("Linear", (nn.Linear,), {"__module__": "torch.ao.nn.quantized.dynamic.modules.linear"})
    return layer


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (
            lambda: Other(16, 16),
            f"{__name__}.Other; leave it out of the family's table, or put a plain one in its place",
        ),
        (
            Adapted,
            f"{__name__}.Adapted; an adapter is still attached: fuse it into the weights, with pipe.fuse_lora(), "
            "and unload it",
        ),
        (Packed, f"{__name__}.Packed with a weight of Tensor in torch.uint8; {QUANTISED}"),
        (dynamic, f"torch.ao.nn.quantized.dynamic.modules.linear.Linear; {QUANTISED}"),
        (coded, f"torch.nn.modules.linear.Linear with a weight of Codes in torch.float32; {QUANTISED}"),
    ],
)
def test_a_layer_that_is_no_plain_linear_is_refused_by_name_with_advice(make, found):
    pipeline = tiny.load("sd3")
    pipeline.module.get_submodule("transformer_blocks.0.attn").to_q = make()
    with pytest.raises(CompressorError) as caught:
        find_targets(pipeline.module, pipeline.family)
    assert str(caught.value) == f"transformer_blocks.0.attn.to_q: should be a plain torch.nn.Linear, found {found}"


def test_a_network_without_any_known_layer_is_refused():
    family: Family = registry.load("family", "sd3")
    with pytest.raises(CompressorError) as caught:
        find_targets(nn.Sequential(nn.Linear(2, 2)), family)
    assert str(caught.value) == "family 'sd3': none of its layers is in this Sequential"


def select_names(include: tuple[str, ...], exclude: tuple[str, ...] = ()) -> list[str]:
    return [target.name for target in select(everything("sd3"), include, exclude)]


def test_layers_are_selected_by_part_role_stream_block_name_or_expression():
    of_tokens = [target.name for target in tiny.load("sd3").targets]
    text = [name for name in of_tokens if ".add_" in name or "to_add" in name or "ff_context" in name]
    block = "transformer_blocks.1"
    assert select_names(("attention", "feed_forward")) == of_tokens
    assert select_names(("up",)) == [n for n in of_tokens if n.endswith("net.0.proj")]
    assert select_names(("text",)) == text
    assert select_names((block,)) == [n for n in of_tokens if n.startswith(block + ".")]
    assert select_names((f"{block}.attn.to_q",)) == [f"{block}.attn.to_q"]
    assert select_names((f"{block}.ff",)) == [f"{block}.ff.net.0.proj", f"{block}.ff.net.2"]
    assert select_names((r"re:\.to_[qk]$",), ("key",)) == [n for n in of_tokens if n.endswith(".to_q")]


def test_adaln_linears_are_included_by_patterns_that_match_nothing_else():
    adaln = [target.name for target in everything("sd3") if target.layer.part == "adaln"]
    of_tokens = [target.name for target in tiny.load("sd3").targets]
    assert select_names(("adaln",)) == select_names(("modulation",)) == select_names((r"re:\.linear$",)) == adaln
    assert select_names(("norm_out",)) == ["norm_out.linear"]
    assert select_names(("transformer_blocks.1.norm1",)) == ["transformer_blocks.1.norm1.linear"]
    assert set(select_names(("attention", "feed_forward", "adaln"))) == {*of_tokens, *adaln}
    assert not set(select_names(("image", "transformer_blocks.0", "re:."))) & set(adaln)
    first = [name for name in adaln if name.startswith("transformer_blocks.0.")]
    assert select_names(("adaln",), ("transformer_blocks.0",)) == [name for name in adaln if name not in first]
    assert select_names(("adaln",), ("text",)) == [name for name in adaln if "context" not in name]


@pytest.mark.parametrize("kind", ["sd2", "sdxl"])
@pytest.mark.parametrize("pattern", ["adaln", "modulation"])
def test_a_network_without_adaln_says_so(kind, pattern):
    with pytest.raises(CompressorError) as caught:
        select(everything(kind), ("attention", pattern), ())
    count = len(tiny.load(kind).targets)
    assert str(caught.value) == (
        f"targets: '{pattern}' matches none of the {count} layers: no adaLN linears of this network are known; "
        "leave it out"
    )


@pytest.mark.parametrize(
    ("wrong", "right"), [("adaLN", "adaln"), ("feedforward", "feed_forward"), ("querry", "query"), ("images", "image")]
)
def test_a_misspelt_group_is_told_the_right_one(wrong, right):
    with pytest.raises(CompressorError) as caught:
        select_names((wrong,))
    assert str(caught.value) == f"targets: '{wrong}' matches none of the 21 layers; did you mean '{right}'?"


def test_a_pattern_that_matches_nothing_is_refused():
    with pytest.raises(CompressorError) as caught:
        select_names(("attention",), ("blocks.7",))
    assert str(caught.value) == (
        "targets: 'blocks.7' matches none of the 21 layers; a pattern is one of adaln, attention, down, feed_forward, "
        "image, key, modulation, output, query, text, up, value, the name of a layer or block such as "
        "'transformer_blocks.0.attn.to_q', or re:REGEX"
    )


def test_excluding_everything_is_refused():
    with pytest.raises(CompressorError) as caught:
        select_names(("query",), ("attention",))
    assert str(caught.value) == "targets: exclude leaves none of the 4 layers that include chose"


def test_a_broken_expression_is_refused():
    with pytest.raises(CompressorError, match=r"targets: 're:\(' is not a regular expression: missing \)"):
        select_names(("re:(",))
