"""How many heads and neurons leave, and which: the granularity `structured`, and L1-norm's choice."""

import pytest
import torch
from compressor_l1_norm import L1Norm
from compressor_obs_diff.structured import HeadsAndNeurons
from pydantic import ValidationError

from compressor import registry
from compressor.errors import CompressorError
from compressor.plugin import LayerResult, Removed
from compressor.structure import Component, find_groups, find_targets, select
from compressor.structure.sd3 import FAMILY
from tests import tiny
from tests.tiny import diffusers


def network(blocks: int = 5, heads: int = 6, **settings: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=blocks,
        attention_head_dim=8,
        num_attention_heads=heads,
        joint_attention_dim=32,
        caption_projection_dim=8 * heads,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
        **settings,
    ).eval()


def component(module: torch.nn.Module, *include: str) -> Component:
    targets = select(find_targets(module, FAMILY), include or ("attention", "feed_forward"), ())
    return Component("transformer", module, FAMILY, targets)


def removals(options: HeadsAndNeurons, given: Component) -> dict[str, int]:
    return {group.name: count for group, count in options.removals(given).items()}


def test_the_registry_knows_it_by_name():
    assert registry.load("granularity", "structured") is HeadsAndNeurons


def test_the_first_and_the_last_block_stay_whole_and_the_others_come_nearest_to_the_shares():
    found = removals(HeadsAndNeurons(heads=0.3, neurons=0.3, multiple=32), component(network()))
    assert {name.split(".")[1] for name in found} == {"1", "2", "3"}
    assert sum(count for name, count in found.items() if name.endswith(".heads")) == 5  # 30 % of 18 is 5.4
    neurons = [count for name, count in found.items() if name.endswith(".neurons")]
    assert len(neurons) == 6
    assert all((192 - count) % 32 == 0 for count in neurons)
    assert abs(sum(neurons) - 0.3 * 6 * 192) <= 16


def test_heads_may_be_kept_in_even_numbers():
    found = removals(HeadsAndNeurons(heads=0.3, heads_multiple=2), component(network()))
    assert list(found.values()) == [2, 2, 2]  # of 6 each; 5.4 of 18 were asked for


@pytest.mark.parametrize(("first", "last", "blocks"), [(0, 0, "01234"), (2, 0, "234"), (0, 4, "0"), (1, 3, "1")])
def test_as_many_blocks_stay_whole_as_asked(first, last, blocks):
    options = HeadsAndNeurons(heads=0.5, keep_first=first, keep_last=last)
    assert "".join(name.split(".")[1] for name in removals(options, component(network()))) == blocks


def test_heads_and_neurons_are_removed_apart():
    given = component(network())
    heads = removals(HeadsAndNeurons(heads=0.5), given)
    neurons = removals(HeadsAndNeurons(neurons=0.5), given)
    assert {name.rpartition(".")[2] for name in heads} == {"heads"}
    assert {name.rpartition(".")[2] for name in neurons} == {"neurons"}


def test_only_groups_whose_layers_are_all_chosen_may_lose_some():
    module = network()
    options = HeadsAndNeurons(heads=0.5, neurons=0.5)
    with pytest.raises(CompressorError) as caught:
        options.removals(component(module, "attention", "up"))
    assert str(caught.value) == (
        "structured: neurons 0.5 finds no neurons that may leave: should be given all the layers of an attention or "
        "feed-forward, in a block that is not kept whole; widen targets, or leave neurons out"
    )
    found = removals(options, component(module, "attention", "re:\\.ff\\."))
    assert {name.split(".", 2)[2] for name in found} == {"attn.heads", "ff.neurons"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"heads": 0.3, "keep_first": 3, "keep_last": 2},
            "structured: should leave a block to remove from, found keep_first 3 and keep_last 2 of 5 blocks",
        ),
        (
            {"heads": 0.02},
            "structured: heads 0.02 comes to nothing: there are 18 in 3 groups, and they leave in steps of 1; ask for "
            "more, or leave heads out",
        ),
        (
            {"neurons": 0.1, "multiple": 192},
            "structured: neurons 0.1 comes to nothing: there are 1152 in 6 groups, and they leave in steps of 192; ask "
            "for more, or leave neurons out",
        ),
        (
            {"neurons": 0.5, "multiple": 256},
            "structured: multiple should be at most 192, the most neurons in one group, found 256",
        ),
        (
            {"heads": 0.5, "heads_multiple": 8},
            "structured: heads_multiple should be at most 6, the most heads in one group, found 8",
        ),
        (
            {"heads": 0.95},
            "transformer_blocks.1.attn.heads: a ratio should leave at least 1 of 6, found 0.95, which leaves none; "
            "remove at most 0.8333",
        ),
        (
            {"neurons": 0.999},
            "transformer_blocks.1.ff.neurons: a ratio should leave at least 1 of 192, found 0.999, which leaves none; "
            "remove at most 0.9948",
        ),
    ],
)
def test_what_cannot_be_removed_is_said(options, words):
    with pytest.raises(CompressorError) as caught:
        HeadsAndNeurons(**options).removals(component(network()))
    assert str(caught.value) == words


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "should have a share of heads, neurons or both to remove, such as 0.3; found neither"),
        (
            {"heads": 0.3, "multiple": 8},
            "multiple has no effect: it is of neurons, and none are removed; leave it out",
        ),
        (
            {"neurons": 0.3, "heads_multiple": 2},
            "heads_multiple has no effect: no heads are removed; leave it out",
        ),
    ],
)
def test_options_without_effect_are_refused(options, words):
    with pytest.raises(ValidationError) as caught:
        HeadsAndNeurons(**options)
    assert words in str(caught.value)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_l1_norm_gives_up_what_sums_to_the_least(kind):
    loaded = tiny.load(kind)
    pruner = L1Norm(granularity=HeadsAndNeurons(heads=0.5, neurons=0.5, multiple=8, keep_first=0, keep_last=0))
    given = tiny.component(loaded)
    expected = {}
    for group in find_groups(loaded.module, loaded.family):
        sums = []
        for unit in range(group.count):
            rows = sum(p.module.weight[group.rows(p, [unit])].abs().sum().item() for p in group.producers)
            columns = sum(c.module.weight[:, group.columns(c, [unit])].abs().sum().item() for c in group.consumers)
            sums.append(rows + columns)
        expected[group.name] = sorted(range(group.count), key=lambda unit: sums[unit])
    counts = {group.name: count for group, count in pruner.removals(given).items() if count}
    # Flux's single blocks: heads go first, and what goes is no part of the neurons' weights
    results = list(pruner.prune(given, None))
    removed = {result.group.name: result.units for result in results if isinstance(result, Removed)}
    assert set(removed) == set(counts) <= set(expected)
    for name, units in removed.items():
        assert set(units) == set(expected[name][: counts[name]]), name
    read = {result.name for result in results if isinstance(result, LayerResult)}
    assert read == {
        consumer.name for result in results if isinstance(result, Removed) for consumer in result.group.consumers
    }
    for result in results:
        if isinstance(result, Removed):
            for consumer in result.group.consumers:
                assert not consumer.module.weight[:, result.group.columns(consumer, result.units)].any()
