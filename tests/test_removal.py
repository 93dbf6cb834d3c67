"""Removing heads and neurons: the same as zeroing them, every attribute set, every index checked."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressor import registry
from compressor.errors import CompressorError
from compressor.structure import Family, Group, find_groups, find_targets, keep, remove, trace, unfuse, within, zero
from tests import tiny

KINDS = pytest.mark.parametrize("kind", list(tiny.KINDS))


def network(kind: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    return tiny.load(kind).module.to(dtype)


def family(kind: str) -> Family:
    return registry.load("family", tiny.FAMILY[kind])


def groups_of(module: nn.Module, kind: str) -> dict[str, Group]:
    return {group.name: group for group in find_groups(module, family(kind))}


def inputs_for(module: nn.Module, kind: str) -> dict[str, Any]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return dict(family(kind).inputs(module, batch=2, height=8, width=8, sequence=6))


@torch.no_grad()
def output(module: nn.Module, inputs: dict[str, Any]) -> Tensor:
    return module(**inputs, return_dict=False)[0]


def off(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@KINDS
def test_removing_is_zeroing_in_every_group_one_after_the_other_and_again(kind):
    torch.manual_seed(0)
    shrunk = network(kind)
    zeroed = copy.deepcopy(shrunk)
    inputs = inputs_for(shrunk, kind)
    small, large = groups_of(shrunk, kind), groups_of(zeroed, kind)
    left = {name: list(range(group.count)) for name, group in small.items()}
    last = output(zeroed, inputs)
    for _ in range(2):
        for name, group in small.items():
            if group.count == 1:
                continue
            chosen = torch.randperm(group.count)[: max(1, group.count // 3)]
            zero(large[name], [left[name][int(unit)] for unit in chosen])
            remove(group, chosen)
            left[name] = [unit for place, unit in enumerate(left[name]) if place not in chosen.tolist()]
            assert group.count == len(left[name])
            expected = output(zeroed, inputs)
            assert off(output(shrunk, inputs), expected) < 1e-10
            assert off(expected, last) > 1e-8  # it did matter
            last = expected
    assert {g.name: g.count for g in find_groups(shrunk, family(kind))} == {n: len(u) for n, u in left.items()}


FOUND = {
    "sd3": {"transformer_blocks.0.": "attn ff ff_context", "transformer_blocks.1.": "attn ff"},
    "sd35": {"transformer_blocks.0.": "attn attn2 ff ff_context", "transformer_blocks.1.": "attn ff"},
    "flux": {
        "transformer_blocks.0.": "attn ff ff_context",
        "single_transformer_blocks.0.": "attn proj_mlp",
        "single_transformer_blocks.1.": "attn proj_mlp",
    },
}


@pytest.mark.parametrize("kind", list(FOUND))
def test_groups_are_those_of_the_architecture(kind):
    expected = [
        f"{block}{name}.{'heads' if name.startswith('attn') else 'neurons'}"
        for block, names in FOUND[kind].items()
        for name in names.split()
    ]
    assert list(groups_of(network(kind), kind)) == expected


@KINDS
def test_every_producers_row_and_consumers_column_is_in_one_group(kind):
    """All rows of q, k, v and up, and all columns of outputs and down, are some unit's, and no other's."""
    module = network(kind)
    rows: dict[str, list[int]] = {}
    columns: dict[str, list[int]] = {}
    for group in groups_of(module, kind).values():
        for producer in group.producers:
            rows.setdefault(producer.name, []).extend(group.rows(producer, range(group.count)).tolist())
        for consumer in group.consumers:
            columns.setdefault(consumer.name, []).extend(group.columns(consumer, range(group.count)).tolist())
    for target in find_targets(module, family(kind)):
        if target.layer.role in ("output", "down"):
            assert sorted(columns[target.name]) == list(range(target.inputs))
        else:
            assert sorted(rows[target.name]) == list(range(target.outputs))


def sizes(module: nn.Module, *names: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in names:
        owner, _, attribute = name.rpartition(".")
        found[name] = getattr(module.get_submodule(owner), attribute)
    return found


def linear(module: nn.Module, name: str) -> tuple[int, int, tuple[int, ...], int | None]:
    found = module.get_submodule(name)
    assert isinstance(found, nn.Linear)
    bias = None if found.bias is None else len(found.bias)
    return found.out_features, found.in_features, tuple(found.weight.shape), bias


@pytest.mark.parametrize("kind", ["sd3", "sd35"])
def test_a_head_of_joint_attention_leaves_both_streams_with_its_attributes(kind):
    module = network(kind)
    remove(groups_of(module, kind)["transformer_blocks.0.attn.heads"], [1])
    attention = module.get_submodule("transformer_blocks.0.attn")
    for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"):
        assert linear(attention, name) == (8, 16, (8, 16), 8)
    for name in ("to_out.0", "to_add_out"):
        assert linear(attention, name) == (16, 8, (16, 8), 16)
    assert sizes(attention, "heads", "sliceable_head_dim", "inner_dim", "inner_kv_dim", "out_dim", "query_dim") == {
        "heads": 1,
        "sliceable_head_dim": 1,
        "inner_dim": 8,
        "inner_kv_dim": 8,
        "out_dim": 16,
        "query_dim": 16,
    }
    assert groups_of(module, kind)["transformer_blocks.1.attn.heads"].count == 2  # widths may differ by block


def test_a_head_of_the_second_attention_leaves_it_alone():
    module = network("sd35")
    remove(groups_of(module, "sd35")["transformer_blocks.0.attn2.heads"], [0])
    names = ("attn2.heads", "attn2.inner_dim", "attn2.inner_kv_dim", "attn.heads", "attn.inner_dim")
    assert list(sizes(module.get_submodule("transformer_blocks.0"), *names).values()) == [1, 8, 8, 2, 16]


@pytest.mark.parametrize("kind", ["sd2", "sdxl"])
def test_heads_and_gated_neurons_of_a_unet(kind):
    module = network(kind)
    block = next(group.block for group in groups_of(module, kind).values() if group.block.startswith("mid_block"))
    root = module.get_submodule(block)
    groups = groups_of(module, kind)
    before = root.get_submodule("ff.net.0.proj.weight".rpartition(".")[0]).get_parameter("weight").clone()
    for name in ("attn1", "attn2"):
        remove(groups[f"{block}.{name}.heads"], [0, 3])
        attention = root.get_submodule(name)
        assert linear(attention, "to_q")[:2] == (8, 16)
        assert linear(attention, "to_v")[0] == 8
        assert linear(attention, "to_out.0")[:2] == (16, 8)
        found = sizes(attention, "heads", "sliceable_head_dim", "inner_dim", "inner_kv_dim")
        assert list(found.values()) == [2, 2, 8, 8]
    keep(groups[f"{block}.ff.neurons"], [5, 7])
    assert linear(root, "ff.net.0.proj") == (4, 16, (4, 16), 4)
    assert linear(root, "ff.net.2")[:2] == (16, 2)
    kept = before[[5, 7, 64 + 5, 64 + 7]]  # the values, and behind them the gates
    assert torch.equal(root.get_submodule("ff.net.0.proj").get_parameter("weight"), kept)


def test_flux_sets_what_its_blocks_remember():
    module = network("flux")
    groups = groups_of(module, "flux")
    remove(groups["transformer_blocks.0.attn.heads"], [0])
    double = module.get_submodule("transformer_blocks.0.attn")
    assert list(sizes(double, "heads", "inner_dim", "out_dim", "head_dim").values()) == [1, 8, 16, 8]
    remove(groups["single_transformer_blocks.0.attn.heads"], [0])
    remove(groups["single_transformer_blocks.0.proj_mlp.neurons"], range(10))
    single = module.get_submodule("single_transformer_blocks.0")
    found = sizes(single, "attn.heads", "attn.inner_dim", "attn.out_dim", "mlp_hidden_dim")
    assert list(found.values()) == [1, 8, 8, 54]
    assert sizes(single, "proj_out._tp_packed_row_blocks") == {"proj_out._tp_packed_row_blocks": [8, 54]}
    assert linear(single, "proj_out") == (16, 62, (16, 62), 16)


def test_neurons_of_a_single_block_stand_behind_the_heads_that_there_are_now():
    module = network("flux")
    groups = groups_of(module, "flux")
    heads, neurons = (groups[f"single_transformer_blocks.1.{n}"] for n in ("attn.heads", "proj_mlp.neurons"))
    (proj_out,) = neurons.consumers
    assert heads.columns(proj_out, [1, 0]).tolist() == [*range(8, 16), *range(8)]
    assert neurons.columns(proj_out, [3, 0]).tolist() == [19, 16]
    remove(heads, [1])
    assert neurons.columns(proj_out, [3, 0]).tolist() == [11, 8]
    assert neurons.rows(neurons.producers[0], [3]).tolist() == [3]


def test_rows_of_gated_neurons_are_values_then_gates():
    group = next(g for g in groups_of(network("sd2"), "sd2").values() if g.kind == "neurons")
    assert group.count == 32
    assert group.rows(group.producers[0], [4, 1]).tolist() == [4, 1, 36, 33]


@KINDS
def test_parameters_and_operations_shrink_by_what_left(kind):
    folder = tiny.load(kind).folder
    twin = folder.twin()
    size = {"height": 8, "width": 8, "sequence": 6}
    before, parameters = trace(twin, family(kind), **size), sum(p.numel() for p in twin.parameters())
    gone = macs = 0
    for group in groups_of(twin, kind).values():
        lines = group.width * (2 if group.gated else 1)
        for producer in group.producers:
            gone += lines * (producer.inputs + (producer.module.bias is not None))
            macs += lines * producer.inputs * before.tokens[producer.name]
        for consumer in group.consumers:
            gone += group.width * consumer.outputs
            macs += group.width * consumer.outputs * before.tokens[consumer.name]
    for group in groups_of(twin, kind).values():
        remove(group, [0])
    # heads attend, too: queries times keys and probabilities times values, which FlopCounterMode counts as well
    after = trace(twin, family(kind), **size)
    assert parameters - sum(p.numel() for p in twin.parameters()) == gone
    assert sum(before.macs_of.values()) - sum(after.macs_of.values()) == macs
    assert before.macs - after.macs >= macs


@KINDS
def test_on_the_meta_device_the_shapes_are_the_same(kind):
    loaded = tiny.load(kind)
    twin = loaded.folder.twin()
    for module in (twin, loaded.module):
        for place, group in enumerate(groups_of(module, kind).values()):
            keep(group, range(1 + place % group.count))
    shapes = {name: tuple(parameter.shape) for name, parameter in loaded.module.named_parameters()}
    assert {name: tuple(parameter.shape) for name, parameter in twin.named_parameters()} == shapes
    assert all(parameter.is_meta for parameter in twin.parameters())


def test_parameters_keep_dtype_and_whether_they_learn():
    module = network("sd3", torch.bfloat16)
    group = groups_of(module, "sd3")["transformer_blocks.0.ff.neurons"]
    up, down = group.producers[0].module, group.consumers[0].module
    up.bias.requires_grad_(True)
    bias = up.bias.detach().clone()
    remove(group, [0, 2])
    assert not up.weight.requires_grad
    assert up.bias.requires_grad
    assert not down.weight.requires_grad
    assert {up.weight.dtype, up.bias.dtype, down.weight.dtype} == {torch.bfloat16}
    assert torch.equal(up.bias, torch.cat([bias[1:2], bias[3:]]))
    assert up.weight.is_contiguous()
    assert down.weight.is_contiguous()


def test_an_index_named_twice_counts_once_and_order_does_not_matter():
    first, second = network("sd3"), network("sd3")
    name = "transformer_blocks.0.ff.neurons"
    remove(groups_of(first, "sd3")[name], [9, 3, 9, 3])
    remove(groups_of(second, "sd3")[name], torch.tensor([3, 9]))
    assert groups_of(first, "sd3")[name].count == 62
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    remove(groups_of(first, "sd3")[name], [])
    assert groups_of(first, "sd3")[name].count == 62


@pytest.mark.parametrize(
    ("act", "units", "message"),
    [
        (remove, [2], "units should be from 0 to 1, found 2"),
        (keep, [-1, 0], "units should be from 0 to 1, found -1"),
        (zero, [7], "units should be from 0 to 1, found 7"),
        (remove, [0, 1], "should keep at least one of 2 heads, found that all would be removed"),
        (keep, [], "should keep at least one of 2 heads, found that all would be removed"),
    ],
)
def test_wrong_indices_are_refused_and_nothing_changes(act, units, message):
    module = network("sd3")
    group = groups_of(module, "sd3")["transformer_blocks.0.attn.heads"]
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(CompressorError) as caught:
        act(group, units)
    assert str(caught.value) == f"transformer_blocks.0.attn.heads: {message}"
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def refused(module: nn.Module, kind: str) -> str:
    with pytest.raises(CompressorError) as caught:
        groups_of(module, kind)
    return str(caught.value)


def test_a_number_of_heads_that_does_not_fit_is_named():
    module = network("sd3")
    attention: Any = module.get_submodule("transformer_blocks.0.attn")
    attention.heads = 3
    assert refused(module, "sd3") == (
        "transformer_blocks.0: 'attn.heads' should divide the 16 rows of attn.to_q, found 3"
    )


def test_a_width_that_does_not_fit_is_named():
    module = network("sd2")
    block = next(iter(groups_of(module, "sd2").values())).block
    attention: Any = module.get_submodule(f"{block}.attn1")
    attention.inner_dim = 24
    assert refused(module, "sd2") == f"{block}: 'attn1.inner_dim' should be 8, the rows of attn1.to_q, found 24"


def test_stale_heads_of_flux_are_seen_by_the_head_dimension():
    module = network("flux")
    attention: Any = module.get_submodule("single_transformer_blocks.0.attn")
    attention.heads = 4
    assert refused(module, "flux") == (
        "single_transformer_blocks.0: 'attn.head_dim' should be 4, the rows of attn.to_q over attn.heads, found 8"
    )


def test_an_attribute_of_another_name_is_told_with_those_found():
    module = network("flux")
    attention: Any = module.get_submodule("transformer_blocks.0.attn")
    attention.num_heads = attention.heads
    del attention.heads
    assert refused(module, "flux") == (
        "transformer_blocks.0: 'attn.heads' should be a whole number, found None and the numbers added_kv_proj_dim=16, "
        "head_dim=8, inner_dim=16, num_heads=2, out_dim=16, query_dim=16"
    )


def test_outputs_of_one_attention_that_a_table_calibrates_apart_are_named():
    table = family("sd3")
    (block,) = table.blocks
    layers = tuple(
        dataclasses.replace(row, stage=9) if row.suffix == "attn.to_add_out" else row for row in block.layers
    )
    with pytest.raises(CompressorError) as caught:
        find_groups(network("sd3"), dataclasses.replace(table, blocks=(dataclasses.replace(block, layers=layers),)))
    assert str(caught.value) == (
        "transformer_blocks.0: the linears that read the heads of 'attn' should have one stage in the family's table, "
        "so that they are calibrated together, found 2 of transformer_blocks.0.attn.to_out.0, 9 of "
        "transformer_blocks.0.attn.to_add_out"
    )


def test_a_missing_linear_is_told_with_those_found():
    module = network("sd2")
    block = next(iter(groups_of(module, "sd2").values())).block
    del module.get_submodule(f"{block}.attn2").to_k
    assert refused(module, "sd2") == f"{block}: 'attn2' should have the linear 'attn2.to_k', found to_out, to_q, to_v"


def test_a_linear_that_the_table_does_not_know_is_named():
    module = network("sd2")
    block = next(iter(groups_of(module, "sd2").values())).block
    module.get_submodule(f"{block}.attn2").add_module("to_k_ip", nn.Linear(2, 2))
    assert refused(module, "sd2") == (
        f"{block}: heads of 'attn2' should be the linears attn2.to_k, attn2.to_out.0, attn2.to_q, attn2.to_v, found "
        "'attn2.to_k_ip' beside them"
    )


def test_keys_of_another_width_and_an_input_of_another_width_are_named():
    module = network("sd2")
    block = next(iter(groups_of(module, "sd2").values())).block
    module.get_submodule(f"{block}.attn2").to_k = nn.Linear(32, 4, bias=False)
    assert refused(module, "sd2") == f"{block}.attn2.to_k: should have 8 rows, as attn2.to_q has, found 4"
    module = network("sd2")
    module.get_submodule(f"{block}.ff.net").__setattr__("2", nn.Linear(33, 8))
    assert refused(module, "sd2") == (
        f"{block}.ff.net.2: should have 32 inputs, as many as the heads and neurons that it reads are wide, found 33"
    )
    module = network("sd2")
    module.get_submodule(f"{block}.ff.net.0").proj = nn.Linear(8, 63)
    assert refused(module, "sd2") == (
        f"{block}.ff.net.0.proj: should have an even number of rows, values and gates, found 63"
    )


@pytest.mark.parametrize("kind", ["sd3", "sd2", "flux"])
def test_fused_projections_are_refused_and_can_be_undone(kind):
    module: Any = network(kind)
    inputs = inputs_for(module, kind)
    before = output(module, inputs)
    names = [name.removesuffix(".heads") for name in groups_of(module, kind) if name.endswith(".heads")]
    assert unfuse(module) == ()
    with torch.no_grad():
        module.fuse_qkv_projections()
    assert refused(module, kind) == (
        f"{names[0]}: should have its projections apart, found 'fused_projections' set; call unfuse_qkv_projections()"
    )
    assert set(names) <= set(unfuse(module))
    assert off(output(module, inputs), before) < 1e-12
    for group in groups_of(module, kind).values():
        remove(group, [0])
    assert torch.isfinite(output(module, inputs)).all()


def test_unfusing_gives_the_projections_what_was_done_to_the_fused_ones():
    module: Any = network("sd2")
    inputs = inputs_for(module, "sd2")
    with torch.no_grad():
        module.fuse_qkv_projections()
        module.mid_block.attentions[0].transformer_blocks[0].attn1.to_qkv.weight.mul_(1.5)
        module.mid_block.attentions[0].transformer_blocks[0].attn2.to_kv.weight.mul_(1.5)
    fused = output(module, inputs)
    unfuse(module)
    assert off(output(module, inputs), fused) < 1e-12


def test_groups_within_chosen_targets():
    module = network("flux")
    groups, targets = groups_of(module, "flux").values(), find_targets(module, family("flux"))
    attention = [target for target in targets if target.layer.part == "attention"]
    assert {group.kind for group in within(groups, attention)} == {"heads"}
    assert len(within(groups, attention)) == 3
    assert within(groups, targets) == tuple(groups)
    assert within(groups, [target for target in targets if target.layer.role != "output"])[0].kind == "neurons"


def test_a_family_without_groups_has_none():
    bare = family("sd3")
    tables = tuple(dataclasses.replace(table, groups=()) for table in bare.blocks)
    assert find_groups(network("sd3"), dataclasses.replace(bare, blocks=tables)) == ()
