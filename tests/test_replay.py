"""Replaying forwards: which are recorded, which are not, and that nothing of it is left; on a GPU, the same moments."""

from __future__ import annotations

import functools
import re
import warnings
import weakref
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from compressor import offload, pipeline
from compressor.calibration import Facts, Moments, coupled, gradients, kernels, replay
from compressor.calibration.replay import BEFORE, Replay
from compressor.calibration.timing import Events, Meter
from compressor.pipeline import Pipeline
from compressor.plugin import MomentKind
from compressor.recipe import Model
from tests import cpu_graph, tiny
from tests.test_moments import Growing

CPU = torch.device("cpu")


class Network(nn.Module):
    """Counts what Python runs of it, and what has been added up."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.sum = torch.zeros(())

    def forward(self, x: Tensor, timestep: Tensor, kind: str | None = None, return_dict: bool = True) -> Any:
        self.calls += 1
        self.sum += x.sum()
        found = 2 * x + timestep
        return {"sample": found} if return_dict else (found,)


class Graph:
    """Does again what was done when it was recorded, with the same tensors."""

    def __init__(self, plain: Any, args: Any, kwargs: Any) -> None:
        self._again = lambda: plain(*args, **kwargs)
        self.result: Any = None

    def pool(self) -> None:
        """None on a CPU."""

    def replay(self) -> None:
        new = self._again()
        (kept,), (found,) = (each.values() if isinstance(each, dict) else each for each in (self.result, new))
        kept.copy_(found)


@pytest.fixture
def network(monkeypatch) -> Network:
    """One whose forwards are recorded on the CPU: by calling them whenever they are replayed."""

    def record(plain: Any, leaves: list[Any], spec: Any, _meter: Meter, _pool: Any) -> Any:
        kept = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs = replay._pytree.tree_unflatten(kept, spec)
        before = found.sum.clone()
        graph = Graph(plain, args, kwargs)
        graph.result = plain(*args, **kwargs)
        found.sum.copy_(before)  # what is recorded is not done
        return replay._Recorded(graph, [leaf for leaf in kept if isinstance(leaf, Tensor)], graph.result, [])  # type: ignore

    found = Network()
    monkeypatch.setattr(replay, "_record", record)
    monkeypatch.setattr(replay, "watched", lambda work: (work(), 0))
    monkeypatch.setattr(replay, "_on_current_gpu", lambda x: x.device.type == "cpu")
    return found


class Counter(Meter):
    """Counts replays."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.replays = 0

    def replay(self, events: Events) -> None:
        """One more."""
        self.replays += 1


@torch.no_grad()
def test_the_third_forward_of_a_kind_is_recorded_and_all_further_ones_are_replayed(network):
    meter, hooked = Counter(), []
    network.register_forward_pre_hook(lambda *_: hooked.append(1))
    results, total = [], 0.0
    with Replay(network).replaying(meter):
        for i in range(5):
            x = torch.full((3,), float(i))
            total += float(x.sum())
            results.append(network(x, timestep=torch.tensor(10.0 * i), return_dict=False)[0])
        assert meter.replays == 3
        named = network(torch.ones(3), timestep=torch.tensor(1.0))
        assert meter.replays == 3  # the first one that is to give a dictionary
        assert named["sample"].tolist() == [3.0] * 3
        network(torch.ones(2), timestep=torch.tensor(1.0), return_dict=False)
        assert meter.replays == 3  # the first one of that shape
    assert [result.tolist() for result in results] == [[12.0 * i] * 3 for i in range(5)]  # none was written over
    assert float(network.sum) == total + 3 + 2
    assert len(hooked) == 7
    assert "forward" not in network.__dict__


@torch.no_grad()
def test_forwards_that_are_summed_and_others_are_recorded_apart(network):
    meter, replays = Counter(), []
    summed = iter([False, True, False, True, False, False, True, True])
    with Replay(network).replaying(meter, summed=lambda: next(summed)):
        for _ in range(8):
            network(torch.ones(1), torch.tensor(1.0), return_dict=False)
            replays.append(meter.replays)
    assert replays == [0, 0, 0, 0, 1, 2, 3, 4]  # from the third of either kind on


@pytest.mark.parametrize("what", ["with gradients", "a number", "too many kinds"])
def test_some_forwards_are_run_as_ever(network, what):
    meter = Counter()
    with Replay(network).replaying(meter), torch.set_grad_enabled(what == "with gradients"):
        for i in range(8):
            timestep: Any = 1.0 if what == "a number" else torch.tensor(1.0)
            for size in range(12) if what == "too many kinds" else (1,):
                assert network(torch.ones(1 + size), timestep, return_dict=False)[0].tolist() == [3.0] * (1 + size)
            if what == "too many kinds":
                assert meter.replays == max(i - 1, 0) * replay.MOST
            else:
                assert network.calls == i + 1


@torch.no_grad()
@pytest.mark.parametrize(
    ("what", "problem"),
    [
        ("fails", "operation not permitted when stream is capturing"),
        ("waits", "something in it waits for the GPU"),
        ("a number", "it is given what is neither a tensor on the current GPU nor a plain constant"),
    ],
)
def test_what_cannot_be_recorded_is_run_and_said_why(network, monkeypatch, what, problem):
    def fail(*_: Any) -> None:
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nMore.")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    if what == "fails":
        monkeypatch.setattr(replay, "_record", fail)
    if what == "waits":
        monkeypatch.setattr(replay, "watched", lambda work: (work(), 1))
    wrapped = Replay(network)
    timestep: Any = 1.0 if what == "a number" else torch.tensor(1.0)
    for _ in range(2):
        with wrapped.replaying(Counter()):
            for _ in range(4):
                assert network(torch.ones(1), timestep, return_dict=False)[0].tolist() == [3.0]
    assert network.calls == 8
    assert wrapped.problem == problem


@torch.no_grad()
def test_forwards_that_are_differentiated_are_counted_and_recorded_for_themselves(network, monkeypatch):
    meter, pools, replayed, record, differentiated = Counter(), [], [], replay._record, False

    def recording(*given: Any) -> Any:
        pools.append(given[-1])
        return record(*given)

    monkeypatch.setattr(replay, "_record", recording)
    wrapped = Replay(network)
    with wrapped.replaying(meter, differentiated=lambda: differentiated):
        for i, backward in enumerate([True, False, True, False, True, True, False, False]):
            differentiated = backward
            network(torch.full((3,), float(i)), torch.tensor(1.0))
            replayed.append(meter.replays)
    assert replayed == [0, 0, 0, 0, 1, 2, 3, 4]
    assert wrapped.recorded == {True, False}
    assert pools == [None, None]  # each in memory of its own


@torch.no_grad()
@pytest.mark.parametrize("what", ["fails", "waits"])
def test_what_keeps_differentiated_forwards_from_being_recorded_is_no_obstacle_to_others(network, monkeypatch, what):
    record, meter, differentiated = replay._record, Counter(), False

    def failing(*given: Any) -> Any:
        if differentiated:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return record(*given)

    if what == "fails":
        monkeypatch.setattr(replay, "_record", failing)
    else:
        monkeypatch.setattr(replay, "watched", lambda work: (work(), int(differentiated)))
    wrapped, expected = Replay(network), 0.0
    with wrapped.replaying(meter, differentiated=lambda: differentiated):
        for i in range(10):
            differentiated = i % 2 == 0
            expected += i
            network(torch.full((1,), float(i)), torch.tensor(1.0))
    assert float(network.sum) == expected
    assert meter.replays == 3
    assert wrapped.recorded == {False}
    assert wrapped.problem is None
    why = "CUDA out of memory" if what == "fails" else "something in it waits for the GPU"
    assert (wrapped.why_not(True), wrapped.why_not(False)) == (why, None)


@torch.no_grad()
def test_what_is_given_up_keeps_no_memory(network, monkeypatch):
    record, differentiated = replay._record, False
    kept: list[weakref.ref[Any]] = []

    def failing(*given: Any) -> Any:
        if given[1][0].numel() == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        found = record(*given)
        kept.append(weakref.ref(found.graph))
        return found

    monkeypatch.setattr(replay, "_record", failing)
    wrapped, alive = Replay(network), []
    with wrapped.replaying(Counter(), differentiated=lambda: differentiated):
        for size, backward in ((1, False), (1, True), (2, True), (2, False)):
            differentiated = backward
            for _ in range(3):
                network(torch.ones(size), torch.tensor(1.0))
            alive.append([found() is not None for found in kept])
    assert alive == [[True], [True, True], [True, False], [False, False]]
    assert wrapped.problem == wrapped.problem_of_differentiated == "CUDA out of memory"
    assert not wrapped.recorded


@torch.no_grad()
def test_where_memory_runs_out_for_others_differentiated_ones_give_way(network, monkeypatch):
    record, differentiated, meter = replay._record, True, Counter()
    wrapped = Replay(network)

    def failing(*given: Any) -> Any:
        if True in wrapped.recorded:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return record(*given)

    monkeypatch.setattr(replay, "_record", failing)
    with wrapped.replaying(meter, differentiated=lambda: differentiated):
        for backward in (True, False):
            differentiated = backward
            for _ in range(6):
                network(torch.ones(1), torch.tensor(1.0))
    assert (wrapped.problem, wrapped.problem_of_differentiated) == (None, "CUDA out of memory")
    assert wrapped.recorded == {False}
    assert meter.replays == 4 + 3  # from the third on; of the others, that was when those gave way


@torch.no_grad()
def test_a_failure_keeps_nothing_of_what_was_recorded(network, monkeypatch):
    class Activation:
        pass

    kept: list[weakref.ref[Activation]] = []

    def fail(*_: Any) -> None:
        activation = Activation()
        kept.append(weakref.ref(activation))
        raise torch.OutOfMemoryError("CUDA out of memory")

    def check(*_: Any) -> None:
        alive.append([found() is not None for found in kept])

    alive: list[list[bool]] = []
    monkeypatch.setattr(replay, "_record", fail)
    wrapped = Replay(network)
    plain = network.forward
    network.forward = lambda *args, **kwargs: check() or plain(*args, **kwargs)  # type: ignore[method-assign]
    with wrapped.replaying(Counter()):
        for _ in range(3):
            network(torch.ones(1), torch.tensor(1.0), return_dict=False)
    assert alive == [[], [], [False]]


def test_a_result_that_cannot_be_copied_is_not_recorded(monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: nullcontext())
    leaves, spec = replay._pytree.tree_flatten(((torch.ones(1),), {}))
    with pytest.raises(RuntimeError, match="it gives a object, which cannot be copied"):
        replay._record(lambda _: object(), leaves, spec, Meter(CPU), None)


def test_what_waits_is_noticed_and_other_warnings_pass(monkeypatch):
    modes = []

    def change(mode: str) -> None:
        modes.append(mode)
        if mode == "warn":
            warnings.warn("Synchronization debug mode is a prototype feature and does not yet", stacklevel=1)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", change)

    def work() -> int:
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("of something else", stacklevel=1)
        return 3

    with pytest.warns(UserWarning, match="of something else") as seen:
        assert replay.watched(work) == (3, 1)
    assert len(seen) == 1
    assert modes == ["warn", "default"]
    assert replay.watched(lambda: 4) == (4, 0)


@torch.no_grad()
def test_a_forward_that_was_replaced_before_is_put_back(network):
    network.forward = own = functools.partial(network.forward)
    with pytest.raises(ValueError, match="inside"), Replay(network).replaying(Counter()):
        raise ValueError("inside")
    assert network.forward is own


def test_a_calibration_warns_once_if_its_forwards_were_not_replayed(monkeypatch):
    monkeypatch.setattr(replay, "obstacle", lambda *_: None)
    calibration = tiny.calibrate(tiny.load("sd3"), packages=2)
    assert calibration._replay is not None
    calibration._replay.problem = "it waits"
    for package in calibration.packages(calibration._pipeline.targets, "norms", tiny.no_workspace):
        calibration.collect(package, "norms", Growing())
    said = [warning for warning in calibration.facts.warnings if "CUDA" in warning]
    assert said == ["forwards were not replayed by CUDA graphs, which would be faster: it waits"]


def test_a_calibration_warns_once_if_only_those_that_are_differentiated_were_not_replayed(monkeypatch):
    monkeypatch.setattr(replay, "obstacle", lambda *_: None)
    calibration = tiny.calibrate(tiny.load("sd3"), packages=2)
    assert calibration._replay is not None
    monkeypatch.setattr(Replay, "replaying", lambda *_, **__: nullcontext())
    calibration._replay.problem_of_differentiated = "it waits"
    for package in calibration.packages(calibration._pipeline.targets, "norms", tiny.no_workspace):
        calibration.collect(package, "norms", Growing())
    assert [warning for warning in calibration.facts.warnings if "CUDA" in warning] == [
        "forwards that are differentiated were not replayed by CUDA graphs, which would be faster: it waits"
    ]


@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [
        ("cpu", torch.float16, "the network is on cpu"),
        ("cuda", torch.float32, "the network is in float32"),
        ("cuda", torch.bfloat16, None),
    ],
)
def test_forwards_in_half_precision_on_a_gpu_are_replayed_if_they_stay_there(device, dtype, expected, monkeypatch):
    monkeypatch.setattr(replay.kernels, "problem", lambda _: None)
    network = Network()
    assert replay.obstacle(network, torch.device(device), dtype) == expected
    network._hf_hook = object()  # of offloading  # type: ignore[assignment]
    if expected is None:
        assert replay.obstacle(network, torch.device(device), dtype) == "components are offloaded"


def test_who_asks_for_graphs_by_name_is_told_that_there_are_none():
    told = "calibration.cuda_graphs has no effect: the network is on cpu"
    assert told in tiny.calibrate(tiny.load("sd3"), cuda_graphs=True).facts.warnings
    assert told not in tiny.calibrate(tiny.load("sd3")).facts.warnings
    assert told not in tiny.calibrate(tiny.load("sd3"), cuda_graphs=False).facts.warnings


def test_where_memory_runs_out_what_is_recorded_goes_before_the_batch_is_halved(monkeypatch):
    monkeypatch.setattr(replay, "obstacle", lambda *_: None)
    calibration = tiny.calibrate(tiny.load("sd3"), packages=1)
    sample, times, given_up = calibration._sample, [], []

    def failing(*args: Any) -> dict[str, Moments]:
        times.append(calibration.facts.batch)
        if len(times) <= 3:
            assert calibration._replay is not None
            given_up.append((calibration._replay.problem_of_differentiated, calibration._replay.problem))
            calibration._replay.recorded = [{True, False}, {False}, set()][len(times) - 1]
            raise torch.OutOfMemoryError("CUDA out of memory")
        return sample(*args)

    monkeypatch.setattr(calibration, "_sample", failing)
    (package,) = calibration.packages(calibration._pipeline.targets, "norms", tiny.no_workspace)
    calibration.collect(package, "norms", Growing())
    assert times == [2, 2, 2, 1]
    why = "memory ran out beside what was recorded"
    assert given_up == [(None, None), (why, None), (why, why)]  # what takes most goes first
    assert [warning for warning in calibration.facts.warnings if "CUDA graphs" in warning] == [
        f"forwards were not replayed by CUDA graphs, which would be faster: {why}"
    ]


def passes(loaded: Pipeline, **options: Any) -> tuple[list[dict[str, Moments]], Facts]:
    """Two passes with gradients, the second with scales that are known, in batches of two prompts and of one."""
    calibration = tiny.calibrate(loaded, tiny.PROMPTS[:5], packages=2, **options)
    offload.bring(loaded.module)
    packages = calibration.packages(loaded.targets, "gradients", tiny.no_workspace)
    return [calibration.collect(package, "gradients", Growing()) for package in packages], calibration.facts


def assert_equal(found: list[dict[str, Moments]], expected: list[dict[str, Moments]]) -> None:
    """To the bit."""
    assert len(found) == len(expected) == 2
    for moments, right in zip(found, expected, strict=True):
        assert moments.keys() == right.keys()
        for name, sums in moments.items():
            for part in ("tokens", "skipped", "weight", "total_I", "second_II"):
                assert torch.equal(getattr(sums, part), getattr(right[name], part)), (name, part)
            assert sums.gradients.keys() == right[name].gradients.keys() != set()
            for layer, other in sums.gradients.items():
                for part in ("tokens", "skipped", "second_BKK"):
                    assert torch.equal(getattr(other, part), getattr(right[name].gradients[layer], part)), (layer, part)


@pytest.mark.parametrize(("kind", "stride"), [("sd3", 1), ("flux", 1), ("sd3", 2)])
def test_differentiated_forwards_that_are_replayed_read_all_that_differs_between_them(kind, stride, monkeypatch):
    monkeypatch.setattr(gradients, "share_of", lambda *_: 0.5)
    monkeypatch.setattr(kernels, "of", lambda _: cpu_graph.Kernels)
    options = {"steps": 8 * stride, "stride": stride, "guidance": 1.0 if kind == "flux" else 3.0}
    expected, _ = passes(tiny.load(kind), **options)
    replayed = cpu_graph.use(monkeypatch)
    found, facts = passes(tiny.load(kind), **options)
    assert not facts.warnings
    # of each pass and each size of a batch, all but the first ones
    assert sum(replayed) == facts.differentiated - 2 * 2 * BEFORE > 0
    assert len(replayed) == facts.forwards - 2 * 4 * BEFORE
    assert_equal(found, expected)


def test_where_additions_need_a_number_differentiated_forwards_are_run_and_others_replayed(monkeypatch):
    monkeypatch.setattr(gradients, "share_of", lambda *_: 0.5)
    replayed = cpu_graph.use(monkeypatch)
    monkeypatch.setattr(kernels, "of", lambda _: None)
    monkeypatch.setattr(coupled, "_factor", lambda _, factor: (factor.item(), None))
    expected, _ = passes(tiny.load("sd3"), cuda_graphs=False, steps=8)
    found, facts = passes(tiny.load("sd3"), steps=8)
    assert facts.warnings == [
        "forwards that are differentiated were not replayed by CUDA graphs, which would be faster: "
        "aten::_local_scalar_dense: not permitted when stream is capturing"
    ]
    assert len(replayed) == facts.forwards - facts.differentiated - 2 * 2 * BEFORE > 0
    assert not any(replayed)
    assert_equal(found, expected)


def gathered(kind: str, moments: MomentKind, **options: Any) -> tuple[dict[str, Moments], Any]:
    loaded = pipeline.load(Model(source=str(tiny.folder(kind, torch.float16))), "cuda")
    with pipeline.current(loaded.device):
        calibration = tiny.calibrate(loaded, steps=8, packages=1, **options)
        (package,) = calibration.packages(loaded.targets, moments, tiny.no_workspace)
        return calibration.collect(package, moments, Growing()), calibration.facts


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # torch 2.11's compiler uses what torch deprecates
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("moments", "tokens"), [("second", 1.0), ("second", 0.5), ("norms", 1.0), ("gradients", 1.0)])
@pytest.mark.parametrize("kind", ["sd3", "sd2", "flux"])
def test_moments_of_replayed_forwards_are_those_of_forwards_that_are_run(kind, moments, tokens, compiled, monkeypatch):
    if compiled and (moments == "gradients" or kind == "flux"):
        pytest.skip("gradients are not gathered in compiled blocks; two families are enough")
    options = {"tokens": tokens, "compile": compiled, "guidance": 1.0 if kind == "flux" else 3.0}
    plain, _ = gathered(kind, moments, cuda_graphs=False, **options)
    timed: list[int] = []
    record = replay._record

    def recording(*args: Any) -> replay._Recorded:
        recorded = record(*args)
        timed.append(recorded.events.blocks.total())
        return recorded

    monkeypatch.setattr(replay, "_record", recording)
    found, facts = gathered(kind, moments, **options)
    assert not facts.warnings
    if moments != "gradients":  # graphs of two prompts and of one, and both of forwards without moments
        assert sorted(timed) == [0] * (2 if tokens < 1 else 0) + [len(plain)] * 2
    assert 0 < facts.moment_seconds < facts.seconds
    for name, expected in plain.items():
        assert torch.equal(found[name].tokens, expected.tokens)
        torch.testing.assert_close(found[name].weight, expected.weight)
        pairs = [
            (getattr(found[name], part), getattr(expected, part)) for part in ("squares_I", "total_I", "second_II")
        ]
        pairs += [(found[name].gradients[layer].second_BKK, g.second_BKK) for layer, g in expected.gradients.items()]
        for sums, right in pairs:
            if right is not None:
                torch.testing.assert_close(sums, right, rtol=0, atol=5e-3 * float(right.abs().max()))


def counted(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """From now on each replay leaves in the list whether it was of a differentiated forward."""
    replayed: list[bool] = []
    again = replay._replay

    def count(recorded: Any, *rest: Any) -> Any:
        replayed.append(bool(recorded.events))
        return again(recorded, *rest)

    monkeypatch.setattr(replay, "_replay", count)
    return replayed


def on_gpu(
    kind: str, dtype: torch.dtype = torch.float16, turns: bool = False, **options: Any
) -> tuple[list[dict[str, Moments]], Facts]:
    """`passes` there."""
    loaded = pipeline.load(Model(source=str(tiny.folder(kind, dtype))), "cuda", turns=turns)
    with pipeline.current(loaded.device):
        return passes(loaded, **{"steps": 12, "guidance": 1.0 if kind == "flux" else 3.0} | options)


@pytest.fixture
def reproducible(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the calls are differentiated, with the kernel for attention that adds up in the same order each time."""
    monkeypatch.setattr(gradients, "share_of", lambda *_: 0.5)
    monkeypatch.setattr(gradients, "ATTENTION", [SDPBackend.MATH])


@pytest.mark.gpu
@pytest.mark.usefixtures("reproducible")
@pytest.mark.parametrize("tokens", [1.0, 0.25])
@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_differentiated_forwards_that_are_replayed_give_the_same_bytes(kind, tokens, monkeypatch):
    replayed = counted(monkeypatch)
    expected, plain = on_gpu(kind, tokens=tokens, cuda_graphs=False)
    assert not replayed
    found, facts = on_gpu(kind, tokens=tokens)
    assert not facts.warnings
    assert sum(replayed) == facts.differentiated - 2 * 2 * BEFORE > 0
    assert facts.differentiated == plain.differentiated < facts.forwards
    assert 0 < facts.moment_seconds < facts.seconds
    assert_equal(found, expected)


@pytest.mark.gpu
@pytest.mark.usefixtures("reproducible")
def test_a_backward_pass_that_cannot_be_recorded_is_run(monkeypatch):
    replayed, scale = counted(monkeypatch), gradients._scale
    expected, _ = on_gpu("sd3", cuda_graphs=False)

    def waiting(*given: Any) -> Tensor:
        if torch.cuda.is_current_stream_capturing():
            torch.cuda.current_stream().synchronize()
        return scale(*given)

    monkeypatch.setattr(gradients, "_scale", waiting)
    found, facts = on_gpu("sd3")
    (warning,) = facts.warnings
    assert re.match("forwards that are differentiated were not replayed by CUDA graphs, .*: .*captur", warning)
    assert len(replayed) == facts.forwards - facts.differentiated - 2 * 2 * BEFORE > 0
    assert not any(replayed)
    assert_equal(found, expected)


@pytest.mark.gpu
@pytest.mark.usefixtures("reproducible")
@pytest.mark.parametrize("what", ["float32", "offloaded"])
def test_no_differentiated_forward_of_a_network_in_float32_or_offloaded_is_replayed(what, monkeypatch):
    replayed = counted(monkeypatch)
    given: Any = {"dtype": torch.float32} if what == "float32" else {"turns": True}
    found, facts = on_gpu("sd3", **given)
    expected, _ = on_gpu("sd3", cuda_graphs=False, **given)
    assert not replayed
    assert not facts.warnings
    assert facts.differentiated > 0
    assert_equal(found, expected)
