"""Discovery, tried on known families: it finds what their tables say, or leaves it out and tells."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from compressor.errors import CompressorError
from compressor.structure import discover, find_groups, find_targets, shrink
from compressor.structure.graph import by_table
from tests import tiny
from tests.test_removal import family, groups_of, inputs_for, network


def cuts(module: nn.Module, table: Any) -> list[Any]:
    return sorted(sorted(by_table(group, group.count - 1).items()) for group in find_groups(module, table))


@pytest.mark.parametrize("kind", ["sd3", "sd35", "sd2", "sdxl"])
def test_what_is_discovered_is_what_the_table_says(kind):
    twin, table = tiny.load(kind).folder.twin(), family(kind)
    found, warning = discover(twin, table.inputs)
    assert cuts(twin, found) == cuts(twin, table)
    known = {target.name: (target.layer.part, target.layer.role) for target in find_targets(twin, table)}
    assert {target.name: (target.layer.part, target.layer.role) for target in find_targets(twin, found)} == known
    groups = groups_of(twin, kind).values()
    heads = sum(group.kind == "heads" for group in groups)
    assert warning.startswith(f"{type(twin).__name__}: no family describes it; found ")
    assert warning.endswith(f"heads in {heads} attentions and neurons in {len(groups) - heads} feed-forwards")


def test_what_the_graph_contradicts_is_left_out_and_told():
    twin, table = tiny.load("flux").folder.twin(), family("flux")
    found, warning = discover(twin, table.inputs)
    assert [group.kind for group in find_groups(twin, found)] == ["neurons", "neurons"]
    assert warning == (
        "FluxTransformer2DModel: no family describes it; found 17 kinds of linears in transformer_blocks, "
        "single_transformer_blocks, heads in 0 attentions and neurons in 2 feed-forwards; the graph contradicts the "
        "heads of attn, which are left out"
    )


def test_discovered_groups_can_be_removed_and_proved():
    found, _ = discover(tiny.load("sdxl").folder.twin(), family("sdxl").inputs)
    module = network("sdxl")
    proof = shrink(module, {group: [0] for group in find_groups(module, found)}, inputs_for(module, "sdxl"))
    assert proof.network_error < 1e-12


def test_a_network_without_such_blocks_is_refused():
    with pytest.raises(CompressorError) as caught:
        discover(nn.Sequential(nn.Linear(2, 2, device=torch.device("meta"))), family("sd3").inputs)
    assert str(caught.value) == (
        "Sequential: should have lists of blocks with attentions (heads, to_q, to_k, to_v), found none"
    )
