"""Moments gathered inside of compiled blocks: equal to eager ones, one set of graphs for all packages, nothing left."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from compressor_obs_diff import OBSDiff
from compressor_obs_diff.weightings import LogDecrease
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters

from compressor import recipe
from compressor.calibration import Moments, compiled
from compressor.errors import CompressorError
from compressor.measure import Stopwatch
from compressor.pipeline import Pipeline
from compressor.plugin import MomentKind
from compressor.prepare import prepare
from compressor.structure import find_targets
from tests import tiny

Found = dict[str, Moments]


@pytest.fixture(autouse=True)
def _eager_backend(monkeypatch):
    """Dynamo's graphs, run as they are: what inductor makes of them is a slow test's."""
    monkeypatch.setattr(compiled, "BACKEND", "eager")


def collect(pipeline: Pipeline, kind: MomentKind = "second", **options: Any) -> tuple[Found, list[int]]:
    """The moments of all layers, adaLN among them, and how many graphs torch made for each package."""
    given: dict[str, Any] = {"batch": 3, "packages": 3, "steps": 2} | options
    calibration = tiny.calibrate(pipeline, **given)
    found: Found = {}
    graphs: list[int] = []
    for package in calibration.packages(
        find_targets(pipeline.module, pipeline.family, adaln=True), kind, tiny.no_workspace
    ):
        counters.clear()
        found |= calibration.collect(package, kind, LogDecrease())
        graphs.append(counters["stats"]["unique_graphs"])
    return found, graphs


def assert_equal(found: Found, expected: Found, within: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, moments in expected.items():
        other = found[name]
        assert int(other.tokens) == int(moments.tokens) > 0
        assert float(other.weight) == float(moments.weight)
        torch.testing.assert_close(other.squares_I, moments.squares_I, rtol=within, atol=0)
        if moments.second_II is not None:
            assert other.second_II is not None
            assert (other.second_II - moments.second_II).norm() <= within * moments.second_II.norm()


def assert_plain(network: nn.Module, keys: list[str]) -> None:
    assert list(network.state_dict()) == keys
    for module in network.modules():
        assert module._compiled_call_impl is None
        assert not isinstance(module, compiled.GatheringLinear)
        assert not {"mark", "place"} & set(dict(module.named_buffers(recurse=False)))
    assert not compiled._sinks


@pytest.mark.parametrize("kind", [*tiny.KINDS, "pixart"])
def test_compiled_moments_are_the_eager_ones_and_later_packages_compile_nothing(kind):
    """In a share of the calls, of which the others run the same graphs; pixart is discovered."""
    pipeline = tiny.load(kind)
    keys = list(pipeline.module.state_dict())
    torch.compiler.reset()
    expected, none = collect(pipeline, tokens=0.5)
    found, graphs = collect(pipeline, tokens=0.5, compile=True)
    assert none == [0, 0, 0]
    assert graphs[0] > 0
    assert graphs[1:] == [0, 0]
    assert_equal(found, expected)
    assert_plain(pipeline.module, keys)


def test_alike_blocks_share_one_graph(monkeypatch):
    """SDXL's two blocks in a row are of one shape, each of which gathers for places of its own."""
    pipeline = tiny.load("sdxl")
    torch.compiler.reset()
    blocks: list[nn.Module] = []
    compile_blocks = compiled.compile_blocks

    def counting(*args, **kwargs):
        blocks[:] = compile_blocks(*args, **kwargs)
        return tuple(blocks)

    monkeypatch.setattr(compiled, "compile_blocks", counting)
    _, graphs = collect(pipeline, "norms", compile=True, packages=1)
    assert graphs[0] < len(blocks)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_graphs_that_are_lowered_keep_every_call(backend, monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", backend)
    pipeline = tiny.load("sd3")
    torch.compiler.reset()
    expected, _ = collect(pipeline, tokens=0.5)
    found, graphs = collect(pipeline, tokens=0.5, compile=True)
    assert graphs[1:] == [0, 0]
    assert_equal(found, expected)


@pytest.mark.parametrize(
    "granularity",
    ["unstructured", {"structured": {"heads": 0.5, "neurons": 0.25, "multiple": 1, "keep_first": 0, "keep_last": 0}}],
)
def test_pruning_with_compiled_forwards_sees_weights_as_pruned_so_far(granularity):
    """Weights change in place between packages; values of an earlier one would be found again in the result."""
    weights: list[dict[str, Tensor]] = []
    for compile in (False, True):
        pipeline = tiny.load("sd3")
        options = {"granularity": granularity} | ({"sparsity": 0.5} if granularity == "unstructured" else {})
        pruner = OBSDiff.model_validate(options)
        list(pruner.prune(tiny.component(pipeline), tiny.calibrate(pipeline, compile=compile, batch=3)))
        weights.append({name: tensor.clone() for name, tensor in pipeline.module.state_dict().items()})
    assert weights[0].keys() == weights[1].keys()
    dense = tiny.load("sd3").module.state_dict()
    assert any((dense[name] != tensor).any() for name, tensor in weights[0].items())
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-3, atol=1e-4)


def test_nothing_is_left_behind_when_a_batch_is_halved_or_a_forward_fails(monkeypatch):
    pipeline = tiny.load("sd3")
    keys = list(pipeline.module.state_dict())
    expected, _ = collect(pipeline, "norms", batch=1, packages=1)
    add = Moments.add
    errors: list[Exception] = [torch.OutOfMemoryError("CUDA out of memory")]

    def failing(self: Moments, x: Tensor, *rest: Any) -> None:
        if errors:
            raise errors.pop()
        add(self, x, *rest)

    monkeypatch.setattr(Moments, "add", failing)
    found, _ = collect(pipeline, "norms", batch=2, packages=1, compile=True)
    assert_equal(found, expected)
    assert_plain(pipeline.module, keys)
    errors.append(KeyError("a mistake of ours"))
    with pytest.raises(KeyError, match="a mistake of ours"):
        collect(pipeline, compile=True)
    assert_plain(pipeline.module, keys)


def test_a_block_that_cannot_be_compiled_says_what_would_do_in_torchs_words():
    pipeline = tiny.load("sd3")
    keys = list(pipeline.module.state_dict())
    torch.compiler.reset()
    block = pipeline.module.get_submodule("transformer_blocks.1")
    block.register_forward_pre_hook(lambda _module, _args: torch._dynamo.graph_break("of a test"))
    with pytest.raises(CompressorError) as caught:
        collect(pipeline, compile=True)
    assert str(caught.value).startswith(
        "calibration.compile: torch could not compile the network's blocks; calibration.compile: false would do "
        "without. Its words: "
    )
    assert "of a test" in str(caught.value)
    assert "TORCHDYNAMO_VERBOSE" not in str(caught.value)
    assert_plain(pipeline.module, keys)


def test_memory_that_runs_out_while_compiling_is_memory_that_ran_out():
    memory = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError), compiled._explained():
        raise BackendCompilerFailed(len, memory, None)


def test_where_nothing_compiles_the_check_says_so(monkeypatch):
    compiled.check(torch.device("cpu"))

    def none() -> str:
        raise RuntimeError("no compiler")

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", none)
    message = "calibration.compile: needs a C++ compiler on a CPU, found none; leave calibration.compile out, or"
    with pytest.raises(CompressorError, match=re.escape(f"{message} install g++")):
        compiled.check(torch.device("cpu"))
    monkeypatch.setattr(compiled, "find_spec", lambda _: None)
    with pytest.raises(CompressorError, match=r"needs triton on a GPU, found none; leave calibration"):
        compiled.check(torch.device("cuda"))
    monkeypatch.setattr(compiled, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (6, 1))
    with pytest.raises(CompressorError, match=r"needs a GPU of compute capability 7\.0, found 6\.1; leave it out"):
        compiled.check(torch.device("cuda"))
    with pytest.raises(CompressorError, match="has been tried on cpu and cuda alone, found 'mps'"):
        compiled.check(torch.device("mps"))


def test_a_run_asks_for_a_compiler_before_anything_is_loaded(monkeypatch, tmp_path):
    def none(_device: torch.device) -> None:
        raise CompressorError("calibration.compile: nothing compiles here")

    monkeypatch.setattr(compiled, "check", none)
    monkeypatch.setattr("compressor.pipeline.load", lambda *_args, **_options: pytest.fail("it was loaded"))
    data = {
        "model": str(tiny.folder("sd3")),
        "device": "cpu",
        "calibration": {"prompts": ["a"], "height": 16, "width": 16, "compile": True},
        "prune": [{"obs_diff": {"sparsity": 0.5}}],
        "output": str(tmp_path / "out"),
    }
    with pytest.raises(CompressorError, match="nothing compiles here"):
        prepare(recipe.Recipe.model_validate(data), Path(data["output"]), Stopwatch(), tiny.quiet())


def test_gradients_are_not_gathered_through_compiled_blocks():
    data = {
        "model": "m",
        "calibration": {"prompts": ["a"], "compile": True},
        "prune": [{"obs_diff": {"sparsity": 0.5, "objective": "network", "solver": "admm"}}],
        "output": "o",
    }
    with pytest.raises(ValueError, match=r"compile should be false where gradients are gathered, as prune\[0\] asks"):
        recipe.Recipe.model_validate(data)
    data["calibration"] = {"prompts": ["a"]}
    recipe.Recipe.model_validate(data)
