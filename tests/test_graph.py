"""The tables of groups against torch-pruning's dependency graph."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from compressor.errors import CompressorError
from compressor.structure import Family, Group, Neurons, cross_check, find_groups
from compressor.structure.family import BlockTable
from tests import tiny
from tests.test_removal import family


def checked(kind: str, table: Family) -> tuple[str, ...]:
    twin = tiny.load(kind).folder.twin()
    shapes = {name: parameter.shape for name, parameter in twin.named_parameters()}
    notes = cross_check(twin, table, table.inputs(twin, batch=1, height=8, width=8, sequence=6))
    assert {name: parameter.shape for name, parameter in twin.named_parameters()} == shapes
    return notes


def without_overrides(table: BlockTable) -> BlockTable:
    return dataclasses.replace(table, groups=tuple(dataclasses.replace(row, overrides="") for row in table.groups))


@pytest.mark.parametrize("kind", ["sd3", "sd35", "sd2", "sdxl"])
def test_the_graph_finds_the_groups_of_the_table(kind):
    assert checked(kind, family(kind)) == ()


def test_where_the_graph_is_known_to_be_wrong_the_table_counts_and_both_are_shown():
    double, single, neurons = checked("flux", family("flux"))
    assert double.startswith("transformer_blocks.0.attn.heads: with head 1 the table takes rows 8-15 of ")
    assert double.endswith(
        "; the table counts: the graph takes the split of the tokens into text and image for a split of the channels"
    )
    assert "; the graph rows 8-15 of " in single
    assert neurons.startswith(
        "single_transformer_blocks.0.proj_mlp.neurons: with neuron 63 the table takes rows 63 of "
    )
    assert ", columns 79 of single_transformer_blocks.0.proj_out; the graph " in neurons
    assert neurons.endswith(
        "; the table counts: the graph loses the place of the neurons behind the heads in what proj_out reads"
    )


def test_a_difference_that_the_table_does_not_declare_ends_it_and_shows_both():
    flux = family("flux")
    with pytest.raises(CompressorError) as caught:
        checked("flux", dataclasses.replace(flux, blocks=tuple(without_overrides(table) for table in flux.blocks)))
    message = str(caught.value)
    assert message.startswith("transformer_blocks.0.attn.heads: with head 1 the table takes rows 8-15 of ")
    assert "; the graph rows " in message
    assert message.endswith("; should be the same, or the family's table should say why not (`overrides`)")


def test_a_network_that_cannot_be_followed_is_told(monkeypatch):
    import torch_pruning

    def give_up(*_args: object, **_options: object) -> None:
        raise TypeError("unsupported operand")

    monkeypatch.setattr(torch_pruning.DependencyGraph, "build_dependency", give_up)
    with pytest.raises(CompressorError) as caught:
        checked("sd3", family("sd3"))
    assert str(caught.value) == (
        "torch-pruning should find the dependencies of SD3Transformer2DModel, found TypeError: unsupported operand"
    )


def test_a_deep_network_is_followed_through_one_block_of_each_kind():
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

    with torch.device("meta"):
        twin = FluxTransformer2DModel(
            in_channels=16,
            num_layers=19,
            num_single_layers=38,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(2, 2, 4),
        )
    table = family("flux")
    notes = cross_check(twin, table, table.inputs(twin, batch=1, height=8, width=8, sequence=6))
    assert len(notes) == 3
    assert len(find_groups(twin, table)) == 19 * 3 + 38 * 2  # the twin itself is as it was


def test_a_table_that_forgets_the_gates_is_found_out():
    unet = family("sd2")
    table = next(table for table in unet.blocks if table.pattern.startswith("mid_block"))
    wrong = dataclasses.replace(table, groups=(Neurons("ff", up="ff.net.0.proj", down="attn2.to_out.0"),))
    with pytest.raises(CompressorError, match=r"attn2\.to_out\.0: should have 128 inputs"):
        checked("sd2", dataclasses.replace(unet, blocks=(wrong,)))


def test_rows_in_another_order_are_found_out(monkeypatch):
    """Gates interleaved with values, instead of behind them."""

    def rows(self: Group, producer: object, units: object) -> torch.Tensor:
        chosen = torch.as_tensor(units)
        return torch.cat([2 * chosen, 2 * chosen + 1])

    twin = tiny.load("sd2").folder.twin()
    neurons = [group.name for group in find_groups(twin, family("sd2")) if group.gated]
    real = Group.rows
    monkeypatch.setattr(Group, "rows", lambda self, p, u: rows(self, p, u) if self.gated else real(self, p, u))
    with pytest.raises(CompressorError) as caught:
        checked("sd2", family("sd2"))
    up = f"{neurons[0].removesuffix('.neurons')}.net.0.proj"
    table, _, graph = str(caught.value).partition("; the graph ")
    assert f"rows 62-63 of {up}" in table
    assert f"rows 31 63 of {up}" in graph
