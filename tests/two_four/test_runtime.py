"""The runtime on the CPU with dense products in place of sparse ones: which layers, which tokens, which arguments."""

from __future__ import annotations

import click.testing
import pytest
import torch
from torch import nn

from compressor import exported
from compressor.cli import main
from compressor.errors import CompressorError
from compressor.sparsity import lowest_of_groups
from compressor.two_four import layers, product
from compressor.two_four.runtime import Forward, explain, install
from tests import tiny

ALGORITHM = (7, 1, -1)


def linear_of(network: nn.Module, name: str) -> nn.Linear:
    found = network.get_submodule(name)
    assert isinstance(found, nn.Linear)
    return found


def pruned(kind: str = "sd3"):
    """A tiny pipeline whose feed-forwards are 2:4."""
    loaded = tiny.load(kind)
    names = [target.name for target in loaded.targets if target.layer.part == "feed_forward"]
    for name in names:
        weight_OI = linear_of(loaded.module, name).weight.data
        weight_OI.masked_fill_(lowest_of_groups(weight_OI.abs(), 2, 4), 0)
    return loaded, names


def test_only_2_4_layers_are_found_and_an_empty_one_is_none():
    loaded, names = pruned()
    linear_of(loaded.module, names[-1]).weight.data.zero_()
    assert list(layers.find(loaded.module, loaded.family)) == names[:-1]


def test_a_layer_is_sparse_for_the_tokens_it_was_given_a_kernel_for_and_dense_for_others(dense_products):
    linear = nn.Linear(8, 4)
    holder = nn.ModuleDict({"a": nn.Sequential(linear)})
    layer = layers.replace(holder, ["a.0"])["a.0"]
    assert holder.get_submodule("a.0") is layer
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
        if linear_of(loaded.module, name).out_features < linear_of(loaded.module, name).in_features
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


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ["--runtime", "torch-sparse", "--device", "cpu"],
            1,
            "error: --runtime torch-sparse needs an NVIDIA GPU of compute capability 8.0 or later, found cpu",
        ),
        (["--probe", "p.json"], 2, "Error: --probe has no effect without --runtime torch-sparse; leave it out"),
    ],
)
def test_a_wrong_call_is_told_in_one_line(arguments, code, message):
    found = click.testing.CliRunner().invoke(main, ["generate", "out", "--prompt", "a", *arguments])
    assert (found.exit_code, found.stderr.splitlines()[-1]) == (code, message)


def test_a_torch_without_cusparselt_and_an_old_gpu_are_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    gpu = torch.device("cuda")
    assert product.problem(gpu) == "needs an NVIDIA GPU of compute capability 8.0 or later, found 7.5"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    with pytest.raises(CompressorError) as caught:
        product.check("probe", gpu)
    assert str(caught.value) == (
        f"probe needs a torch built with cuSPARSELt, found torch {torch.__version__} without it"
    )


def test_a_float32_network_is_refused():
    with pytest.raises(CompressorError) as caught:
        exported.run_sparse(tiny.load("sd3"), None, tiny.quiet())
    assert str(caught.value) == "--runtime torch-sparse: should be a network in bfloat16, found float32"


def test_the_fastest_kernel_that_is_right_is_taken_and_one_that_fails_is_passed_over(monkeypatch):
    monkeypatch.setattr(product, "settle", lambda: None)
    seconds = {1: 3.0, 2: 1.0, 3: 2.0}
    errors = {1: 0.0, 2: 0.5, 3: 1e-4}

    def timed(algorithm):
        if algorithm[0] == 4:
            raise RuntimeError("invalid argument\nand more")
        return [seconds[algorithm[0]]]

    def fastest(*kernels):
        return product._fastest(iter((k, 1, -1) for k in kernels), timed, lambda a: errors[a[0]], 1e-3)

    assert fastest(4, 1, 2, 3) == ((3, 1, -1), 1e-4)
    assert fastest(2) == (None, "its result is off by 5.0e-01, should be at most 1e-03")
    assert fastest(4) == (None, "cuSPARSELt has no kernel for it: invalid argument")
