"""What pruners take beside the moments is no more than they say, so that a run keeps within `calibration.memory`."""

# Shapes: I inputs.

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from compressor_obs_diff import OBSDiff, batch
from compressor_obs_diff import layers as obs_diff_layers
from compressor_obs_diff.layers import prune_package
from compressor_obs_diff.removal import Problem, Stream, bytes_of, remove_together
from compressor_wanda import Wanda
from torch import Tensor, nn

from compressor.calibration import Gradients, Group, Moments, Package
from compressor.plugin import LayerResult, Pruner
from compressor.structure import Layer, Target
from tests.live_memory import most_taken

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
    groups: list[Group] = []
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
        groups.append(Group(names[0], tuple(targets)))
        sizes = dict(zip(names, outputs, strict=True))
        held[names[0]] = moments(inputs, sizes, device, options.moments == "gradients")
    return Package(1, 1, tuple(groups), sum(found.bytes for found in held.values())), held


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
    said = options.workspace(packed)
    taken = most_taken(lambda: list(prune_package(options, packed, held)), tensors(packed, held), device)
    assert said / 4 < taken <= said


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("given", [{"sparsity": 0.5}, {"granularity": "n_m"}], ids=["unstructured", "n_m"])
def test_wandas_scores_take_no_more_than_it_says(given, device):
    options = Wanda.model_validate(given)
    scale = 8 if device.type == "cuda" else 1
    packed, held = package([(256 * scale, (64 * scale,))], options, device)
    ((target,),) = (group.targets for group in packed.groups)
    weight_OI, norm_I = target.module.weight.data, held["0.0"].squares_I.sqrt()

    def prune() -> None:
        score_OI = weight_OI.float().abs() * norm_I
        weight_OI.masked_fill_(options.granularity.mask(score_OI, options.zeros(target), per_row=True), 0)

    assert 0 < most_taken(prune, [weight_OI, norm_I], device) <= options.workspace(packed)


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


def test_the_largest_problem_of_a_unit_counts_and_all_that_may_be_one_where_heads_leave():
    sweep = OBSDiff.model_validate({"sparsity": 0.5})
    packed, _ = package([(64, (64, 64)), (256, (64,)), (256, (64,))], sweep, torch.device("cpu"))
    assert sweep.workspace(packed) == 4 * (3 * 256**2 + 256 * 64)
    heads = OBSDiff.model_validate({"granularity": {"structured": {"heads": 0.5, "neurons": 0.5}}})
    assert heads.workspace(packed) == 2 * bytes_of(64, 64) + 2 * bytes_of(64, 256)
    wanda = Wanda.model_validate({"sparsity": 0.5})
    assert wanda.workspace(packed) == 40 * 64 * 256


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
    large = 4 * (3 * 64**2 + 64 * 16)
    assert solved(None) == [(5, 16), (2, 64)]
    assert solved(2 * small) == [(2, 16), (2, 16), (1, 16), (1, 64), (1, 64)]
    freed = 5 * 4 * 16 * 18
    assert solved(2 * large - freed) == [(5, 16), (2, 64)]
    assert solved(2 * large - freed - 1) == [(5, 16), (1, 64), (1, 64)]
