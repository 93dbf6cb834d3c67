"""Solves the layers of one package: one factorisation for all layers that share an input."""

# Shapes: O outputs, I inputs.

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compressor.plugin import Elementwise, LayerResult
from compressor_obs_diff.least_squares import MOST_STEPS, fit
from compressor_obs_diff.metric import metric_of
from compressor_obs_diff.solver import explain_damping, relative_error
from compressor_obs_diff.solvers import SOLVERS, Problem

if TYPE_CHECKING:
    from compressor.calibration import Group, Moments, Package
    from compressor.structure import Target
    from compressor_obs_diff import OBSDiff

COUPLED_STEPS = 50
"""Of the refit in the outputs' metric, whose rows depend on one another: ADMM leaves little to do."""
LEAST_SPREAD = 1e-4
"""Of the inputs about their mean, relative to their squares; below it, no bias absorbs the mean."""


@torch.no_grad()
def prune_package(
    options: OBSDiff, package: Package, moments: dict[str, Moments], zeros: Mapping[str, int] | None = None
) -> Iterator[LayerResult]:
    """Prunes every layer of a package in place, freeing each group's moments when its layers are done.

    Args:
        options: an elementwise granularity, objective, solver, refit, damping and block.
        package: the layers, grouped by the input they share.
        moments: by group; emptied.
        zeros: how many of each layer, by name; as many as `options.zeros` says if none.
    """
    granularity = options.granularity
    assert isinstance(granularity, Elementwise)
    for group in package.groups:
        start = time.perf_counter()
        gathered = moments.pop(group.name)
        second_II = gathered.second_II
        assert second_II is not None
        for target, problem, absorbed_I in problems_of(options, group, gathered):
            weight, bias = target.module.weight, target.module.bias
            count = options.zeros(target) if zeros is None else zeros[target.name]
            notes = explain_damping(problem.factor.damping, options.damping, problem.factor.dtype)
            metric_BKK = None
            if options.objective == "network":
                metric_BKK = metric_of(gathered.gradients.pop(target.name))
                if metric_BKK is None:
                    notes += ("the network's output does not depend on it: its own outputs' error was minimised",)
            old_OI = weight.detach().to(torch.float32, copy=True)
            new_OI, removed_OI = SOLVERS[options.solver](
                old_OI, problem, count / old_OI.numel() if granularity.needs_sparsity else None, metric_BKK
            )
            if options.refit:
                most = MOST_STEPS if metric_BKK is None else COUPLED_STEPS
                new_OI = fit(old_OI, problem.damped_II, removed_OI, new_OI, metric_BKK, most).weight_OI
            weight.copy_(new_OI)
            if bias is not None and absorbed_I is not None:
                bias.copy_(bias.float() + (old_OI - weight.float()) @ absorbed_I)
            now = time.perf_counter()
            yield LayerResult(
                name=target.name,
                error=relative_error(old_OI, weight.float(), problem.second_II, second_II),
                damping=problem.factor.damping,
                seconds=now - start,
                notes=notes,
                zeros=count,
            )
            start = time.perf_counter()


def problems_of(options: OBSDiff, group: Group, moments: Moments) -> Iterator[tuple[Target, Problem, Tensor | None]]:
    """Each layer of a group, its problem, which others may share, and the mean that its bias absorbs, if it does."""
    assert isinstance(options.granularity, Elementwise)
    assert moments.second_II is not None
    mean_I = _mean(moments) if options.refit else None
    problems: dict[bool, Problem] = {}
    for target in group.targets:
        absorbed_I = mean_I if target.module.bias is not None else None
        absorbs = absorbed_I is not None
        if absorbs not in problems:
            problems[absorbs] = Problem(
                moments.second_II if absorbed_I is None else _about(absorbed_I, moments),
                options.damping,
                options.granularity,
                options.block,
                target.name,
            )
        yield target, problems[absorbs], absorbed_I


def _mean(moments: Moments) -> Tensor | None:
    """Of the inputs, or None where they hardly differ from it, so that nothing would be left to choose weights by."""
    assert moments.second_II is not None
    mean_I = (moments.total_I / moments.weight).to(moments.total_I.dtype)
    squares = moments.second_II.diagonal().sum()
    spread = squares - moments.weight * mean_I.square().sum()
    return mean_I if spread > LEAST_SPREAD * squares else None


def _about(mean_I: Tensor, moments: Moments) -> Tensor:
    """The second moment about the mean: what is left of an error once the bias has absorbed its mean."""
    assert moments.second_II is not None
    return torch.addr(moments.second_II, mean_I, mean_I, alpha=-moments.weight.item())
