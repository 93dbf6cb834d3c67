"""Wanda against its definition: |W_ij| times the norm of input j, compared within an output row."""

from __future__ import annotations

import pytest
import torch
from compressor_obs_diff.weightings import LogDecrease
from compressor_wanda import Wanda
from pydantic import ValidationError
from torch import Tensor, nn

from compressor.structure import Layer, Target
from tests import tiny


def prune(kind: str, options: dict):
    """Prunes a tiny pipeline in one package; gives (dense weight, pruned weight, inputs, promised zeros) by layer."""
    pipeline = tiny.load(kind)
    calibration = tiny.calibrate(pipeline, steps=2, batch=3, packages=1)
    dense = {target.name: target.module.weight.clone() for target in pipeline.targets}
    fed: dict[str, list[Tensor]] = {target.name: [] for target in pipeline.targets}
    for target in pipeline.targets:
        tiny.record_inputs(target.module, fed[target.name])
    pruner = Wanda.model_validate(options)
    results = list(pruner.prune(tiny.component(pipeline), calibration))
    assert {result.name for result in results} == set(dense)
    return [
        (dense[t.name], t.module.weight, [x.double().reshape(-1, t.inputs) for x in fed[t.name]], pruner.zeros(t))
        for t in pipeline.targets
    ]


def near_tie(score: Tensor, kept: int) -> bool:
    """Whether float32 could see the two scores at the threshold the other way round."""
    ordered = score.sort(descending=True).values
    return bool(ordered[kept - 1] - ordered[kept] <= 1e-5 * ordered[kept])


@pytest.mark.parametrize("kind", list(tiny.KINDS))
def test_the_lowest_scores_of_every_row_go_and_the_others_stay(kind):
    rows = 0
    for old, new, inputs, promised in prune(kind, {"sparsity": 0.5}):
        norm = torch.cat(inputs).square().sum(0).sqrt()
        assert promised == old.numel() // 2
        for before, after in zip(old, new, strict=True):
            score = before.double().abs() * norm
            if near_tie(score, len(score) // 2):
                continue
            rows += 1
            kept = score.topk(len(score) // 2).indices
            expected = torch.zeros_like(before)
            expected[kept] = before[kept]
            assert torch.equal(after, expected)
    assert rows > 300


def test_the_number_in_each_row_is_rounded_down():
    for old, new, _, promised in prune("sd3", {"sparsity": 0.3}):
        asked = int(old.shape[1] * 0.3)
        assert asked in (4, 19)  # 4.8 of 16, 19.2 of 64
        assert ((new == 0).sum(1) == asked).all()
        assert promised == asked * len(old)


@pytest.mark.parametrize(
    ("sparsity", "inputs", "asked"), [(0.29, 100, 29), (0.57, 100, 57), (0.3, 16, 4), (0.7, 10, 7)]
)
def test_binary_fractions_do_not_round_a_whole_number_down(sparsity, inputs, asked):
    target = Target("a", nn.Linear(inputs, 3), "", Layer("a", "attention", "query", "image", 0))
    assert Wanda.model_validate({"sparsity": sparsity}).zeros(target) == 3 * asked


def test_the_highest_two_scores_of_every_four_stay():
    for old, new, inputs, promised in prune("sd3", {"granularity": {"n_m": {"keep": 2, "of": 4}}}):
        score = (old.double().abs() * torch.cat(inputs).square().sum(0).sqrt()).reshape(-1, 4)
        assert promised == old.numel() // 2
        for scores, before, after in zip(score, old.reshape(-1, 4), new.reshape(-1, 4), strict=True):
            if near_tie(scores, 2):
                continue
            expected = torch.zeros_like(before)
            kept = scores.topk(2).indices
            expected[kept] = before[kept]
            assert torch.equal(after, expected)


def test_norms_carry_the_timestep_weights_where_a_weighting_is_given():
    weights = LogDecrease(low=0.1, high=10.0).weights(tiny.schedule(2))
    differs = 0
    for old, new, inputs, _ in prune("sd3", {"sparsity": 0.5, "weighting": {"log_decrease": {"low": 0.1, "high": 10}}}):
        assert len(inputs) == 2
        weighted = sum((a * x.square().sum(0) for a, x in zip(weights, inputs, strict=True)), torch.zeros(()))
        plain = torch.cat(inputs).square().sum(0)
        for before, after in zip(old, new, strict=True):
            score = before.double().abs() * weighted.sqrt()
            if near_tie(score, len(score) // 2):
                continue
            kept = score.topk(len(score) // 2).indices
            assert set(kept.tolist()) == set(after.nonzero().flatten().tolist())
            differs += set(kept.tolist()) != set((before.abs() * plain.sqrt()).topk(len(score) // 2).indices.tolist())
    assert differs > 10


def test_wanda_as_published_weighs_all_steps_the_same():
    assert Wanda.model_validate({"sparsity": 0.5}).weighting.weights(tiny.schedule(3)) == (1, 1, 1)


@pytest.mark.parametrize("sparsity", [0, 1, 50])
def test_a_sparsity_that_is_no_share_is_refused(sparsity):
    with pytest.raises(ValidationError):
        Wanda.model_validate({"sparsity": sparsity})
