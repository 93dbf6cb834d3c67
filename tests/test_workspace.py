"""What pruners take beside the moments is no more than they say, so that a run keeps within `calibration.memory`."""

# Shapes: I inputs.

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from compressor_obs_diff import OBSDiff, batch, groups
from compressor_obs_diff import layers as obs_diff_layers
from compressor_obs_diff.budget import curves
from compressor_obs_diff.groups import prune_groups
from compressor_obs_diff.layers import prune_package
from compressor_obs_diff.removal import Problem, Removal, Stream, bytes_of, remove_together
from compressor_wanda import Wanda
from torch import Tensor, nn

from compressor import registry
from compressor.bench.gathered import packages as bench_packages
from compressor.bench.solve_times import Source
from compressor.calibration import Gradients, Group, Moments, Package
from compressor.calibration.packages import cut, deal
from compressor.plan import plan
from compressor.plugin import LayerResult, Pruner
from compressor.recipe import Recipe
from compressor.structure import Component, Family, Layer, Target, Trace, consumers, find_targets, trace
from tests import tiny
from tests.live_memory import most_taken
from tests.tiny import diffusers

SD3: Family = registry.load("family", "sd3")
DEVICES = [
    torch.device("cpu"),
    pytest.param(
        torch.device("cuda", 0),
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]


def second(size: int, device: torch.device) -> Tensor:
    x_TI = torch.randn(2 * size, size, generator=torch.Generator().manual_seed(size)).to(device)
    return x_TI.T @ x_TI


def moments(inputs: int, outputs: dict[str, int], device: torch.device, gradients: bool = False) -> Moments:
    found = Moments.empty(inputs, True, device)
    found.second_II = second(inputs, device)
    found.tokens += 2 * inputs
    found.weight += 2 * inputs
    for name, size in outputs.items() if gradients else ():
        found.gradients[name] = sums = Gradients.empty(size, device)
        for second_KK in sums.second_BKK:
            second_KK.copy_(second(len(second_KK), device))
        sums.tokens += 2 * inputs
    return found.finish()


def package(
    shapes: list[tuple[int, tuple[int, ...]]], options: Pruner, device: torch.device
) -> tuple[Package, dict[str, Moments]]:
    """Layers, for each input its width and the outputs of those that read it, and their moments."""
    found: list[Group] = []
    held: dict[str, Moments] = {}
    for place, (inputs, outputs) in enumerate(shapes):
        layer = Layer("ff", "feed_forward", "down", "image", 0)
        names = [f"{place}.{i}" for i in range(len(outputs))]
        dtype = torch.float16 if device.type == "cuda" else torch.float32
        linears = [nn.Linear(inputs, size, device=device, dtype=dtype) for size in outputs]
        targets = [
            Target(name, linear.requires_grad_(False), str(place), layer)
            for name, linear in zip(names, linears, strict=True)
        ]
        found.append(Group(names[0], tuple(targets)))
        sizes = dict(zip(names, outputs, strict=True))
        held[names[0]] = moments(inputs, sizes, device, options.moments == "gradients")
    return Package(1, 1, tuple(found), sum(each.bytes for each in held.values())), held


def tensors(packed: Package, held: dict[str, Moments]) -> list[Tensor]:
    found: list[Tensor] = []
    for group in packed.groups:
        for target in group.targets:
            found += target.module.parameters()
    for each in held.values():
        found += [x for x in (each.second_II, each.total_I, each.squares_I, each.weight) if x is not None]
        found += [sums.second_BKK for sums in each.gradients.values()]
    return found


KINDS = [
    {"sparsity": 0.5},
    {"granularity": "n_m"},
    {"sparsity": 0.5, "refit": True},
    {"sparsity": 0.5, "solver": "admm", "refit": True},
    {"sparsity": 0.5, "solver": "admm", "refit": True, "objective": "network"},
]


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("shape", [(192, (192, 192, 192)), (128, (512,)), (512, (128,))], ids=str)
@pytest.mark.parametrize("given", KINDS, ids=lambda given: "-".join(map(str, given.values())))
def test_solving_a_layer_takes_no_more_than_it_says_and_not_far_less(given, shape, device):
    options = OBSDiff.model_validate(given)
    scale = 8 if device.type == "cuda" else 1  # so that little beside the large tensors counts
    shape = shape[0] * scale, tuple(size * scale for size in shape[1])
    packed, held = package([shape], options, device)
    said = options.workspace(packed.groups)
    taken = most_taken(lambda: list(prune_package(options, packed, held)), tensors(packed, held), device)
    assert said / 4 < taken <= said


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("shape", [(512, (128,)), (512, (16,))], ids=str)
def test_a_hessian_that_has_to_be_damped_further_takes_no_more_than_was_said(shape, device):
    options = OBSDiff.model_validate({"sparsity": 0.5})
    packed, held = package([shape], options, device)
    second_II = held["0.0"].second_II
    assert second_II is not None
    values_I, vectors_II = torch.linalg.eigh(second_II)
    values_I[0] = -0.05 * values_I.mean()
    second_II.copy_(vectors_II * values_I @ vectors_II.T)
    results: list[LayerResult] = []
    before = tensors(packed, held)
    taken = most_taken(lambda: results.extend(prune_package(options, packed, held)), before, device)
    assert results[0].damping == pytest.approx(0.1)
    assert 0 < taken <= options.workspace(packed.groups)


class Given:
    """In place of a calibration: one package and its moments."""

    def __init__(self, packed: Package, held: dict[str, Moments]) -> None:
        self._packed, self._held = packed, held

    def packages(self, *_: Any, deal_out: bool) -> tuple[Package, ...]:
        return (self._packed,)

    def collect(self, *_: Any) -> dict[str, Moments]:
        return self._held


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("given", [{"sparsity": 0.5}, {"granularity": "n_m"}], ids=["unstructured", "n_m"])
def test_wandas_scores_take_no_more_than_it_says(given, device):
    options = Wanda.model_validate(given)
    scale = 8 if device.type == "cuda" else 1
    packed, held = package([(256 * scale, (64 * scale,))], options, device)
    targets = [target for group in packed.groups for target in group.targets]
    component: Any = SimpleNamespace(targets=targets)
    calibration: Any = Given(packed, held)
    before = tensors(packed, held)
    taken = most_taken(lambda: list(options.prune(component, calibration)), before, device)
    assert (targets[0].module.weight == 0).float().mean() == 0.5
    assert 0 < taken <= options.workspace(packed.groups)


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize(
    ("inputs", "outputs", "width", "streams", "network"),
    [(256, 256, 32, 2, False), (256, 256, 32, 2, True), (512, 128, 1, 1, False), (512, 128, 1, 1, True)],
)
def test_removing_heads_and_neurons_takes_no_more_than_it_says_and_not_far_less(
    inputs, outputs, width, streams, network, device
):
    scale = 6 if device.type == "cuda" else 1
    inputs, outputs = inputs * scale, outputs * scale
    metric_BKK = second(outputs, device)[None] if network else None
    found = [
        Stream(
            str(i),
            torch.randn(outputs, inputs, device=device),
            second(inputs, device),
            bias_O=torch.zeros(outputs, device=device),
            total_I=torch.zeros(inputs, device=device),
            tokens=2.0 * inputs,
            metric_BKK=metric_BKK,
        )
        for i in range(streams)
    ]
    before = [x for each in found for x in (each.weight_OI, each.second_II, each.bias_O, each.total_I) if x is not None]
    places_GD = torch.arange(inputs).view(-1, width)
    problem = Problem(found, int(0.3 * len(places_GD)))
    fusion = "sum" if network else "energy"
    taken = most_taken(
        lambda: remove_together([problem], places_GD, 0.01, fusion),
        [*before, *([] if metric_BKK is None else [metric_BKK])],
        device,
    )
    said = streams * bytes_of(outputs, inputs)
    assert said / 2.5 < taken <= said


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_a_removal_whose_hessians_have_to_be_damped_twice_takes_no_more_than_was_said(device):
    scale = 6 if device.type == "cuda" else 1
    inputs, outputs, streams = 256 * scale, 16 * scale, 4
    second_II = second(inputs, device).double()
    values_I, vectors_II = torch.linalg.eigh(second_II)
    values_I[0] = -0.5 * values_I.mean()
    second_II = (vectors_II * values_I @ vectors_II.T).float()
    found = [Stream(str(i), torch.randn(outputs, inputs, device=device), second_II) for i in range(streams)]
    places_GD = torch.arange(inputs).view(-1, 32)
    removed: list[Removal] = []
    taken = most_taken(
        lambda: removed.extend(remove_together([Problem(found, 2)], places_GD, 0.01)),
        [second_II, *(each.weight_OI for each in found)],
        device,
    )
    assert all(fitted.damping == pytest.approx(1.0) for fitted in removed[0].refits)
    said = streams * bytes_of(outputs, inputs)
    assert said / 4 < taken <= said


def test_the_largest_problem_counts_and_the_attention_outputs_of_a_block_are_one():
    sweep = OBSDiff.model_validate({"sparsity": 0.5})
    packed, _ = package([(64, (64, 64)), (256, (64,)), (256, (64,))], sweep, torch.device("cpu"))
    assert sweep.workspace(packed.groups) == 4 * (7 * 256**2 // 2 + 256 * 64)
    heads = OBSDiff.model_validate({"granularity": {"structured": {"heads": 0.5, "neurons": 0.5}}})
    assert heads.workspace(packed.groups) == bytes_of(64, 256)
    layer = Layer("attn.to_out", "attention", "output", "image", 0)
    outputs = [
        replace(group, targets=tuple(replace(target, layer=layer, block="0") for target in group.targets))
        for group in packed.groups
    ]
    assert heads.workspace(outputs) == 2 * bytes_of(64, 64) + 2 * bytes_of(64, 256)
    wanda = Wanda.model_validate({"sparsity": 0.5})
    assert wanda.workspace(packed.groups) == 40 * 64 * 256
    assert [pruner.workspace(()) for pruner in (sweep, heads, wanda)] == [0, 0, 0]
    assert cut([], Trace({}, {}, frozenset(), 0, {}), "second", None, 10**9, sweep.workspace) == ()


def test_on_a_gpu_small_problems_come_first_and_no_more_at_once_than_the_recipe_has_room_for(monkeypatch):
    options = OBSDiff.model_validate({"sparsity": 0.5})
    sizes: list[tuple[int, int]] = []
    real = batch.factorise_batch
    monkeypatch.setattr(obs_diff_layers.batch, "pays", lambda _: True)
    monkeypatch.setattr(
        batch, "factorise_batch", lambda found, *rest: sizes.append((len(found), len(found[0]))) or real(found, *rest)
    )

    def solved(room: int | None) -> list[tuple[int, int]]:
        shapes = [(64, (16,)), *[(16, (16,))] * 5, (64, (16,))]
        packed, held = package(shapes, options, torch.device("cpu"))
        memory = None if room is None else packed.moment_bytes + room
        packed = replace(packed, memory=memory)
        sizes.clear()
        results = [result for result in prune_package(options, packed, held) if isinstance(result, LayerResult)]
        assert len(results) == 7
        return list(sizes)

    small = 4 * 8 * 16**2  # as the weights are as many as the inputs' products
    large = 4 * (7 * 64**2 // 2 + 64 * 16)
    assert solved(None) == [(5, 16), (2, 64)]
    assert solved(2 * small) == [(2, 16), (2, 16), (1, 16), (1, 64), (1, 64)]
    freed = 5 * 4 * 16 * 18
    assert solved(2 * large - freed) == [(5, 16), (2, 64)]
    assert solved(2 * large - freed - 1) == [(5, 16), (1, 64), (1, 64)]


# ----------------------------------------------------------------------------------------------------- whole networks


def network() -> tuple[Component, Trace]:
    """An SD3 whose matrices are large beside everything else, in half precision."""
    module = diffusers.SD3Transformer2DModel(
        sample_size=8,
        num_layers=3,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=128,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
    )
    seen = trace(module, SD3, height=8, width=8, sequence=5)
    module = module.requires_grad_(False).half()
    return Component("transformer", module, SD3, tuple(find_targets(module, SD3))), seen


def gathered(packed: Package, options: OBSDiff) -> dict[str, Moments]:
    """Random moments of all its groups."""
    return {
        group.name: moments(
            group.inputs,
            {target.name: target.outputs for target in group.targets},
            torch.device("cpu"),
            options.moments == "gradients",
        )
        for group in packed.groups
    }


@pytest.mark.parametrize("objective", ["layer", "network"])
def test_heads_and_neurons_of_a_network_take_no_more_than_it_says(objective):
    torch.manual_seed(0)
    component, seen = network()
    spread = {"spread": 0.25} if objective == "network" else {}
    structured = {"granularity": {"structured": {"heads": 0.5, "neurons": 0.25}}, "objective": objective, **spread}
    options = OBSDiff.model_validate(structured)
    planned = options.removals(component)
    (packed,) = cut(consumers(planned), seen, options.moments, 1, None, options.workspace)
    held = gathered(packed, options)
    before = [*component.module.parameters(), *tensors(packed, held)]
    if spread:
        choices = {group: options.choices(group, count) for group, count in planned.items()}
        taken = most_taken(lambda: curves(options, planned, choices, packed, held), before, torch.device("cpu"))
        assert packed.workspace / 4 < taken <= packed.workspace
    taken = most_taken(lambda: list(prune_groups(options, planned, packed, held)), before, torch.device("cpu"))
    assert packed.workspace / 4 < taken <= packed.workspace


def test_what_was_solved_leaves_no_moments_behind_and_what_is_next_has_their_room(monkeypatch):
    component, seen = network()
    options = OBSDiff.model_validate({"granularity": {"structured": {"heads": 0.5, "neurons": 0.25}}})
    planned = options.removals(component)
    (packed,) = cut(consumers(planned), seen, "second", 1, None, options.workspace)
    packed = replace(packed, memory=packed.moment_bytes + 12345)
    held = gathered(packed, options)
    sums = [weakref.ref(found.second_II) for found in held.values()]
    real, rooms = groups.remove_together, []

    def remove(problems: Sequence[Problem], *rest: Any) -> Any:
        assert sum(each() is not None for each in sums) == len(held)
        return real(problems, *rest)

    def fitting(needs: int, device: torch.device, room: int | None) -> int:
        rooms.append(room)
        assert room == 12345 + packed.moment_bytes - sum(found.bytes for found in held.values())
        return 1

    monkeypatch.setattr(groups, "remove_together", remove)
    monkeypatch.setattr(groups, "fitting_together", fitting)
    list(prune_groups(options, planned, packed, held))
    assert rooms == sorted(rooms)
    assert len(set(rooms)) == len(rooms) > 2
    held = gathered(packed, options)
    rooms.clear()
    choices = {group: (0, count) for group, count in planned.items()}
    curves(options, planned, choices, packed, held)
    assert set(rooms) == {12345}


@pytest.mark.parametrize("given", [{"sparsity": 0.5}, {"sparsity": 0.5, "solver": "admm"}], ids=["obs", "admm"])
def test_layers_of_several_units_that_read_one_input_are_counted_as_they_are_solved(given):
    """Such as keys and values of all blocks of a U-Net, which read the text."""
    loaded = tiny.load("sdxl")
    seen = tiny.traced(loaded)
    options = OBSDiff.model_validate(given)
    (whole,) = cut(loaded.targets, seen, "second", 1, None, options.workspace)
    assert max(len({target.unit for target in group.targets}) for group in whole.groups) > 1
    assert whole.workspace == options.workspace(whole.groups)
    for share in (1, 0.75, 0.5, 0.25):
        memory = whole.workspace + int(share * whole.moment_bytes)
        packages = cut(loaded.targets, seen, "second", None, memory, options.workspace)
        assert (len(packages) == 1) == (share == 1)
        for packed in packages:
            assert packed.workspace == options.workspace(packed.groups)
            assert packed.moment_bytes + packed.workspace <= memory


def test_plan_run_bench_and_processes_that_share_a_job_cut_alike():
    loaded = tiny.load("sd3")
    options = OBSDiff.model_validate({"sparsity": 0.5})
    seen = tiny.traced(loaded)
    (whole,) = cut(loaded.targets, seen, "second", 1, None, options.workspace)
    memory = 3 * whole.moment_bytes // 4 + whole.workspace
    expected = cut(loaded.targets, seen, "second", None, memory, options.workspace)
    assert 1 < len(expected) != len(cut(loaded.targets, seen, "second", None, memory, tiny.no_workspace))

    def same(found: Sequence[Package]) -> bool:
        keys = [
            [(each.moment_bytes, each.workspace, each.memory) for each in packages] for packages in (found, expected)
        ]
        return keys[0] == keys[1]

    calibration = tiny.calibrate(loaded, memory=memory)
    assert same(calibration.packages(loaded.targets, "second", options.workspace))
    recipe = Recipe.model_validate(
        {
            "model": str(tiny.folder("sd3")),
            "calibration": {"prompts": ["a"], "memory": memory, "height": tiny.SIDE, "width": tiny.SIDE},
            "prune": [{"obs_diff": {"sparsity": 0.5}}],
            "output": "out",
        }
    )
    assert same(plan(recipe).entries[0].packages)
    subject: Any = SimpleNamespace(calibration=recipe.calibration)
    assert same(bench_packages(subject, seen, loaded.targets, "second", options.workspace))
    source = Source(cast("Any", SimpleNamespace(subject=subject, seen=seen)), print)
    assert same(source.packages(loaded.targets, "second", options.workspace))
    for packed in expected:
        dealt = deal(packed, 1, 2)
        assert (dealt.memory, dealt.workspace) == (memory, packed.workspace)


def test_pruners_say_what_they_take_when_they_are_cut(monkeypatch):
    """What `plan` counts is what they hand over in a run."""
    loaded = tiny.load("sd3")
    for pruner in (OBSDiff.model_validate({"sparsity": 0.5}), Wanda.model_validate({"sparsity": 0.5})):
        calibration = tiny.calibrate(loaded, memory="1GiB")
        real, asked = calibration.packages, []

        def packages(
            targets: Any, kind: Any, workspace: Any, *, real: Any = real, asked: Any = asked, **rest: Any
        ) -> Any:
            asked.append(workspace)
            return real(targets, kind, workspace, **rest)

        monkeypatch.setattr(calibration, "packages", packages)
        next(iter(pruner.prune(tiny.component(loaded), calibration)))
        assert asked == [pruner.workspace]
