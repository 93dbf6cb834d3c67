"""The runtime on the CPU with dense products in place of sparse ones: which layers, which tokens, which arguments."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import nn

from compressor.errors import CompressorError
from compressor.sparsity import lowest_of_groups
from compressor.two_four import layers
from compressor.two_four.runtime import Forward, explain, install

ALGORITHM = (7, 1, -1)


def pruned(kind: str = "sd3"):
    """A tiny pipeline whose feed-forwards are 2:4."""
    loaded = tiny.load(kind)
    names = [target.name for target in loaded.targets if target.layer.part == "feed_forward"]
    for name in names:
        weight_OI = loaded.module.get_submodule(name).weight.data
        weight_OI.masked_fill_(lowest_of_groups(weight_OI.abs(), 2, 4), 0)
    return loaded, names


def test_only_2_4_layers_are_found_and_an_empty_one_is_none():
    loaded, names = pruned()
    loaded.module.get_submodule(names[-1]).weight.data.zero_()
    assert list(layers.find(loaded.module, loaded.family)) == names[:-1]


def test_a_layer_is_sparse_for_the_tokens_it_was_given_a_kernel_for_and_dense_for_others(dense_products):
    linear = nn.Linear(8, 4)
    holder = nn.ModuleDict({"a": nn.Sequential(linear)})
    layer = layers.replace(holder, ["a.0"])["a.0"]
    assert holder["a"][0] is layer
    x = torch.randn(2, 3, 8)
    assert torch.equal(layer(x), linear(x))
    assert (dense_products, layer.packed) == ([], None)
    layer.take(6, ALGORITHM)
    assert torch.equal(layer(x), linear(x))
    assert torch.equal(layer(x[:1]), linear(x[:1]))
    assert dense_products == [(6, ALGORITHM)]


@pytest.mark.parametrize("kind", ["sd3", "flux", "sdxl"])
def test_only_layers_that_gain_are_converted_and_the_network_computes_the_same(kind, dense_products, monkeypatch):
    monkeypatch.setattr(nn.Module, "compile", lambda *_args, **_kwargs: None)
    loaded, names = pruned(kind)
    given = loaded.example_inputs()
    with torch.no_grad():
        right = loaded.module(**given, return_dict=False)[0]
    asked: list[tuple[int, int, int]] = []

    def decide(tokens, inputs, outputs, bias):
        asked.append((tokens, inputs, outputs))
        return ALGORITHM if outputs < inputs else None  # the second one of every feed-forward

    told: list[str] = []
    forward = install(loaded.module, loaded.family, decide, told.append)
    found = loaded.module(**given, return_dict=False)[0]
    torch.testing.assert_close(found, right)
    assert len(asked) == len(names)
    falling = [
        name
        for name in names
        if loaded.module.get_submodule(name).out_features < loaded.module.get_submodule(name).in_features
    ]
    assert sorted(forward.sparse[0]) == sorted(falling)
    assert told[0] == (f"{len(falling)} of {len(names)} 2:4 layers run sparse; the others are as fast or faster dense")
    assert {algorithm for _, algorithm in dense_products} == {ALGORITHM}


def test_new_arguments_of_known_shapes_replay_and_new_shapes_are_decided_anew(dense_products):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.calls = 0

        def forward(self, x, scale=None):
            self.calls += 1
            return (self.linear(x) * (2 if scale is None else scale["by"]),)

    network = Network()
    placed = layers.replace(network, ["linear"])
    asked = []

    def decide(tokens, inputs, outputs, bias):
        asked.append(tokens)
        return ALGORITHM if tokens > 2 else None

    forward = Forward(network.forward, placed, decide, lambda _: None)
    for rows in (3, 3, 2):
        x, by = torch.randn(rows, 4), torch.randn(rows, 4)
        torch.testing.assert_close(forward(x)[0], network.linear(x) * 2)
        torch.testing.assert_close(forward(x, scale={"by": by})[0], network.linear(x) * by)
    assert asked == [3, 3, 2, 2]  # for each kind of arguments
    assert [bool(found) for found in forward.sparse] == [True, True, False, False]


def test_a_network_without_2_4_layers_is_refused():
    loaded = tiny.load("sd3")
    with pytest.raises(CompressorError) as caught:
        install(loaded.module, loaded.family, lambda *_: ALGORITHM, print)
    assert str(caught.value) == (
        "should have layers with 2:4 weights, found none; prune with `granularity: n_m` (keep 2 of 4), or draw with "
        "--runtime torch"
    )


def test_the_layers_that_run_sparse_are_told_by_shape():
    assert explain({"a": "8 x 4 x 4", "b": "8 x 4 x 4", "c": "8 x 4 x 16"}, 5) == [
        "3 of 5 2:4 layers run sparse; the others are as fast or faster dense",
        "  2 layers of 8 x 4 x 4: a, ...",
        "  1 layer of 8 x 4 x 16: c",
    ]
