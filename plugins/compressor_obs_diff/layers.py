"""Solves the layers of one package: one factorisation for all layers that share an input."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from compressor.plugin import Elementwise, LayerResult
from compressor_obs_diff.least_squares import fit
from compressor_obs_diff.solver import explain_damping, relative_error
from compressor_obs_diff.solvers import SOLVERS, Problem

if TYPE_CHECKING:
    from compressor.calibration import Moments, Package
    from compressor_obs_diff import OBSDiff


@torch.no_grad()
def prune_package(options: OBSDiff, package: Package, moments: dict[str, Moments]) -> Iterator[LayerResult]:
    """Prunes every layer of a package in place, freeing each group's moments when its layers are done.

    Args:
        options: sparsity, an elementwise granularity, solver, refit, damping and block.
        package: the layers, grouped by the input they share.
        moments: by group; emptied.
    """
    granularity = options.granularity
    assert isinstance(granularity, Elementwise)
    for group in package.groups:
        start = time.perf_counter()
        second_II = moments.pop(group.name).second_II
        assert second_II is not None
        name = group.targets[0].name
        problem = Problem(second_II, options.damping, granularity, options.sparsity, options.block, name)
        factor = problem.factor
        notes = explain_damping(factor.damping, options.damping, factor.dtype)
        for target in group.targets:
            weight = target.module.weight
            old_OI = weight.detach().to(torch.float32, copy=True)
            new_OI, removed_OI = SOLVERS[options.solver](old_OI, problem)
            if options.refit:
                new_OI = fit(old_OI, problem.damped_II, removed_OI, new_OI).weight_OI
            weight.copy_(new_OI)
            now = time.perf_counter()
            yield LayerResult(
                name=target.name,
                error=relative_error(old_OI, weight.float(), second_II),
                damping=factor.damping,
                seconds=now - start,
                notes=notes,
            )
            start = time.perf_counter()
