"""The proof of a removal: it holds where it should, and finds every way to remove wrongly."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from compressor.errors import CompressorError
from compressor.structure import Group, find_groups, proof, removal, shrink
from tests import tiny
from tests.test_removal import family, groups_of, inputs_for, network, off, output

KINDS = pytest.mark.parametrize("kind", list(tiny.KINDS))


@KINDS
def test_shrinking_every_block_is_proved_for_layers_blocks_and_network(kind):
    torch.manual_seed(0)
    module = network(kind)
    inputs = inputs_for(module, kind)
    dense = output(module, inputs)
    groups = find_groups(module, family(kind))
    removals = {group: torch.randperm(group.count)[: group.count // 2] for group in groups}
    found = shrink(module, removals, inputs)
    assert found.tolerance == 1e-10
    assert max(found.network_error, *found.errors.values()) < 1e-12
    consumers = {consumer.name for group in groups for consumer in group.consumers}
    assert set(found.errors) == consumers | {group.block for group in groups}
    assert off(output(module, inputs), dense) > 1e-6
    assert all(g.count == n.count for g, n in zip(groups, find_groups(module, family(kind)), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["sd35", "sdxl", "flux"])
def test_blocks_are_proved_in_float32_and_the_network_in_its_own_dtype(kind, dtype):
    module = network(kind, dtype)
    expected = copy.deepcopy(module)
    removals = {group: [0] for group in find_groups(module, family(kind))}
    found = shrink(module, removals, inputs_for(module, kind))
    assert (found.tolerance, found.network_tolerance) == (1e-4, proof.TOLERANCE[dtype])
    assert max(found.errors.values()) < 1e-5
    assert found.network_error < found.network_tolerance / 2
    for group in find_groups(expected, family(kind)):
        removal.remove(group, [0])
    for (name, left), right in zip(module.named_parameters(), expected.parameters(), strict=True):
        assert left.dtype == dtype, name
        assert torch.equal(left, right), name  # widening for a while changed no bit


def test_only_some_blocks_and_groups_may_shrink_and_nothing_at_all():
    module = network("sd3")
    groups = groups_of(module, "sd3")
    one = groups["transformer_blocks.1.ff.neurons"]
    found = shrink(module, {one: [5], groups["transformer_blocks.0.attn.heads"]: []}, inputs_for(module, "sd3"))
    assert set(found.errors) == {"transformer_blocks.1.ff.net.2", "transformer_blocks.1"}
    assert one.count == 63
    assert shrink(module, {}, inputs_for(module, "sd3")).errors == {}


def test_a_wrong_index_is_refused_before_anything_changes():
    module = network("sd3")
    before = copy.deepcopy(module.state_dict())
    first, *_, last = find_groups(module, family("sd3"))
    with pytest.raises(CompressorError, match=r"^transformer_blocks\.1\.ff\.neurons: units should be from 0 to 63"):
        shrink(module, {first: [0], last: [64]}, inputs_for(module, "sd3"))
    with pytest.raises(CompressorError, match="should keep at least one of 64 neurons"):
        shrink(module, {first: [0], last: range(64)}, inputs_for(module, "sd3"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def fails(kind: str, name: str, dtype: torch.dtype = torch.float64) -> str:
    module = network(kind, dtype)
    group = groups_of(module, kind)[name]
    with pytest.raises(CompressorError) as caught:
        shrink(module, {group: [group.count - 1, 0][: group.count - 1]}, inputs_for(module, kind))
    return str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_stale_heads_of_a_unet_which_run_silently_wrong_are_caught(monkeypatch, dtype):
    monkeypatch.setattr(removal, "set_attributes", lambda group: None)
    block = "mid_block.attentions.0.transformer_blocks.0"
    message = fails("sd2", f"{block}.attn1.heads", dtype)
    assert message.startswith(
        f"{block}.attn1.to_out.0: after removing, the output should be as with the columns zeroed"
    )
    assert f"to {'1e-10' if dtype == torch.float64 else '1e-04'} of its norm, found it " in message


def test_stale_heads_that_do_not_run_name_the_block(monkeypatch):
    monkeypatch.setattr(removal, "set_attributes", lambda group: None)
    message = fails("sd3", "transformer_blocks.0.attn.heads")
    assert message.startswith("transformer_blocks.0: should still run after removing, found ")


def test_a_lost_offset_in_a_single_block_is_caught(monkeypatch):
    """As torch-pruning's graph would have it: the neurons' columns taken from the beginning."""
    rightly = Group.columns

    def columns(self: Group, consumer: Any, units: Any) -> Any:
        found = rightly(self, consumer, units)
        return found - self.start if monkeypatched else found

    monkeypatched = False
    real = removal.remove

    def remove(group: Group, units: Any) -> None:
        nonlocal monkeypatched
        monkeypatched = True
        real(group, units)

    monkeypatch.setattr(Group, "columns", columns)
    monkeypatch.setattr(proof, "remove", remove)
    message = fails("flux", "single_transformer_blocks.0.proj_mlp.neurons")
    assert message.startswith("single_transformer_blocks.0.proj_out: after removing, the output should be ")


def test_wrong_gates_are_caught(monkeypatch):
    """As the paper's code cuts a GEGLU: values i together with other gates."""

    def rows(self: Group, producer: Any, units: Any) -> Any:
        chosen = torch.as_tensor(units)
        return torch.cat([chosen, torch.arange(len(chosen)) + self.count]) if self.gated else chosen

    monkeypatch.setattr(Group, "rows", rows)
    block = "mid_block.attentions.0.transformer_blocks.0"
    assert fails("sd2", f"{block}.ff.neurons").startswith(f"{block}.ff.net.2: after removing, the output should be ")


def test_what_the_proof_cannot_compute_is_no_proof():
    module = network("sd3")
    group = groups_of(module, "sd3")["transformer_blocks.0.ff.neurons"]
    group.consumers[0].module.weight.data[0, 0] = float("nan")
    with pytest.raises(CompressorError, match=r"^transformer_blocks\.0\.ff\.net\.2: .* found it nan off$"):
        shrink(module, {group: [3]}, inputs_for(module, "sd3"))
