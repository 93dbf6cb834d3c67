"""Removal of whole groups of a layer's inputs (heads, neurons), the other inputs making up for them.

The structured granularities of OBS-Diff (arXiv 2510.06751). The paper factorises the Hessian anew in every round; here
`greedy.Search` finds the order by downdates of one inversion, which is exact in groups. The new weights come from one
solve at the end: no rounding adds up in them.

A metric G of the outputs changes the costs and with them the order, but not what makes up for a loss: every row of W is
best off with its own least squares, whatever it counts.
"""

# Shapes: O outputs, I inputs, G groups, D inputs of a group, R removals, P problems, S streams of each, N = P S,
# K inputs kept, Q inputs gone; of a metric: B blocks of K outputs.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor_obs_diff.batch import free_bytes
from compressor_obs_diff.greedy import Fusion, Search, part
from compressor_obs_diff.solver import MOST_DAMPING, check_inputs, indefinite
from compressor_obs_diff.triangular import inverse_factor

MOST = 48  # problems solved together on a GPU
SHARE = 0.5  # of the memory that is free there, for them


@dataclass(frozen=True)
class Stream:
    """One layer that consumes the groups. Joint attention has two: the image's and the text's output projection.

    Attributes:
        name: the layer, for errors.
        weight_OI: W, in any floating-point dtype.
        second_II: sum of a_t x x^T over the tokens x.
        bias_O: the layer's bias, if it has one.
        total_I: sum of a_t x. With it and a bias, the bias absorbs the mean of what is removed.
        tokens: sum of a_t, where `total_I` is given.
        metric_BKK: G, how much errors of the outputs count in the order of removal, in blocks along the diagonal; None
            for all the same. What is left does not depend on it.
    """

    name: str
    weight_OI: Tensor
    second_II: Tensor
    bias_O: Tensor | None = None
    total_I: Tensor | None = None
    tokens: float = 0.0
    metric_BKK: Tensor | None = None

    @property
    def absorbs(self) -> bool:
        """Whether the bias absorbs the mean of what is removed; a layer without a bias is not given one."""
        return self.bias_O is not None and self.total_I is not None


@dataclass(frozen=True)
class Problem:
    """Layers that read the same groups, and how many of these leave.

    Attributes:
        streams: at least one.
        count: groups to remove, fewer than there are.
    """

    streams: Sequence[Stream]
    count: int


@dataclass(frozen=True)
class Refit:
    """What is left of one layer.

    Attributes:
        weight_OK: W', in W's dtype: the inputs kept, in their old order.
        bias_O: b', in b's dtype; b itself, where nothing was absorbed.
        error: ||W X + b - W' X - b'||^2 / ||W X||^2, undamped.
        damping: the damping that was needed, relative to the mean diagonal.
    """

    weight_OK: Tensor
    bias_O: Tensor | None
    error: float
    damping: float


@dataclass(frozen=True)
class Removal:
    """What was removed, and what is left.

    Attributes:
        kept: groups, ascending.
        removed: groups, in the order of their removal.
        columns: inputs kept, ascending: those of the groups kept and those in no group.
        costs_RS: what each removal cost each stream: the damped squared error that it added. Float64, on the CPU.
        refits: one a stream.
    """

    kept: list[int]
    removed: list[int]
    columns: list[int]
    costs_RS: Tensor
    refits: list[Refit]


def remove_greedily(
    streams: Sequence[Stream],
    groups_GD: Tensor,
    count: int,
    damping: float,
    fusion: Fusion = "energy",
) -> Removal:
    """Removes `count` groups one after the other, each time the cheapest, and refits each stream to the rest.

    Per stream O(I^3) operations for the inversion and the refit, and for a removal of D inputs O(D I (PANEL + I)),
    where the part in I^2 is a matrix product. All in float64; memory: five I x I and three O x I.

    Args:
        streams: at least one; all are given up the same groups. Not changed.
        groups_GD: indices of the inputs of each group, disjoint. Inputs in no group are kept.
        count: how many groups to remove, less than G.
        damping: added to each Hessian's diagonal, relative to its mean; if the factorisation fails, raised as
            `solver.factorise` does.
        fusion: how costs are compared over several streams. "rank_fusion" is the paper's: the highest sum of
            1 / (60 + rank + 1). "energy" is the lowest sum of costs, each relative to the stream's dense
            ||W X||^2, and "sum" that of the costs themselves. One stream alone is ordered by its cost. Ties go to the
            lower index.

    Raises:
        CompressorError: if a Hessian is zero or not finite, or cannot be factorised.
    """
    return remove_together([Problem(streams, count)], groups_GD, damping, fusion)[0]


def remove_together(
    problems: Sequence[Problem], groups_GD: Tensor, damping: float, fusion: Fusion = "energy"
) -> list[Removal]:
    """What `remove_greedily` gives for each of several problems, which are solved in step.

    A GPU launches as many kernels as for one of them, and is waited for as often, whatever leaves: once for each full
    panel, and a few times more. All lose as many groups as the most that any is to lose, of which the others take the
    first: counts should be near each other.

    Args:
        problems: with the same numbers of streams and of inputs. Memory: `bytes_of` each stream of each.
        groups_GD: as in `remove_greedily`, the same for all.
        damping: as there.
        fusion: as there.

    Raises:
        CompressorError: as there.
    """
    groups_GD = groups_GD.cpu()
    systems, order_PR, costs_PSR = _order(problems, groups_GD, damping, fusion)
    total, inputs = len(groups_GD), systems.damped_NII.shape[-1]
    places_GD = groups_GD.to(order_PR.device)
    parts: list[tuple[Tensor, Tensor]] = []
    for problem, order_R in zip(problems, order_PR, strict=True):
        gone_I = torch.zeros(inputs, dtype=torch.uint8, device=order_R.device)
        gone_I.index_fill_(0, places_GD[order_R[: problem.count]].flatten(), 1)
        sorted_I = gone_I.argsort(stable=True)  # what is kept, then what is gone; without waiting for how many
        width = inputs - problem.count * groups_GD.shape[1]
        parts.append((sorted_I[:width], sorted_I[width:]))
    refits = systems.refits([both for both in parts for _ in problems[0].streams])
    costs = _check(problems, costs_PSR)
    streams = len(problems[0].streams)
    found: list[Removal] = []
    for p, (problem, order_R) in enumerate(zip(problems, order_PR.tolist(), strict=True)):
        removed: list[int] = order_R[: problem.count]
        left_G, left_I = torch.ones(total, dtype=torch.bool), torch.ones(inputs, dtype=torch.bool)
        left_G[removed] = False
        left_I[groups_GD[removed].flatten()] = False
        found.append(
            Removal(
                kept=left_G.nonzero()[:, 0].tolist(),
                removed=removed,
                columns=left_I.nonzero()[:, 0].tolist(),
                costs_RS=costs[p],
                refits=refits[p * streams : (p + 1) * streams],
            )
        )
    return found


def costs_together(
    problems: Sequence[Problem], groups_GD: Tensor, damping: float, fusion: Fusion = "energy"
) -> list[Tensor]:
    """The costs alone that `remove_together` finds (R x S each), without any refit.

    Args:
        problems: as there.
        groups_GD: as there.
        damping: as there.
        fusion: as there.

    Raises:
        CompressorError: as there.
    """
    _, _, costs_PSR = _order(problems, groups_GD, damping, fusion)
    return _check(problems, costs_PSR)


def refit_together(
    streams: Sequence[Stream], columns: Sequence[Sequence[int]], dampings: Sequence[float]
) -> list[Refit]:
    """The weights on some of the inputs, and the bias, whose outputs come nearest to those of all; for several streams.

    Each minimises ||W X + b - W' X_K - b'||^2 + damping * mean(diag H) * ||W - W'||^2, b' moving only where
    `stream.absorbs`. Removing inputs one after the other leads to the same weights.

    Args:
        streams: with as many inputs. Not changed.
        columns: for each the inputs kept, ascending, at least one.
        dampings: for each one with which its Hessian can be factorised, as `Refit` tells from an earlier removal.
    """
    systems = _Systems(streams, dampings)
    inputs, device = systems.damped_NII.shape[-1], systems.damped_NII.device
    parts: list[tuple[Tensor, Tensor]] = []
    for kept in columns:
        gone = sorted(set(range(inputs)).difference(kept))
        sorted_I = torch.tensor([*kept, *gone], device=device)
        parts.append((sorted_I[: len(kept)], sorted_I[len(kept) :]))
    return systems.refits(parts)


def fitting_together(needs: int, device: torch.device, room: int | None) -> int:
    """How many problems that take so many bytes should be solved together: on a CPU one, which is no slower.

    On a GPU as many as half of the memory that is free holds, and the bytes that the recipe leaves for all of them, if
    it has a bound; up to 48, and at least one.
    """
    if device.type != "cuda":
        return 1
    bound = int(SHARE * free_bytes(device))
    if room is not None:
        bound = min(bound, room)
    return min(max(bound // needs, 1), MOST)


def bytes_of(outputs: int, inputs: int) -> int:
    """The most that one stream of a problem takes while it is solved: squares in float64, weights and their metric."""
    return 8 * (5 * inputs**2 + 3 * outputs * inputs)


def _order(
    problems: Sequence[Problem], groups_GD: Tensor, damping: float, fusion: Fusion
) -> tuple[_Systems, Tensor, Tensor]:
    """The systems, which groups leave (P x R) and the costs (P x S x R), for the most that any problem loses."""
    assert problems
    assert all(problem.streams and len(problem.streams) == len(problems[0].streams) for problem in problems)
    assert len({stream.weight_OI.shape[1] for problem in problems for stream in problem.streams}) == 1
    assert all(0 <= problem.count < len(groups_GD) for problem in problems)
    groups_GD = groups_GD.cpu()
    assert groups_GD.unique().numel() == groups_GD.numel()
    every = [stream for problem in problems for stream in problem.streams]
    systems = _Systems(every, [damping] * len(every))
    factors = [systems.factorise()]
    count = max(problem.count for problem in problems)
    streams = len(problems[0].streams)
    if fusion == "sum":
        energy_PS = torch.ones_like(systems.energy_N).view(-1, streams)
    else:
        energy_PS = systems.energy_N.masked_fill(systems.energy_N <= 0, 1).view(-1, streams)
    metrics = [stream.metric_BKK for stream in every]
    search = Search(systems.damped_NII, factors, systems.weights, metrics, groups_GD, streams)
    return systems, *search.run(count, energy_PS, fusion)


def _check(problems: Sequence[Problem], costs_PSR: Tensor) -> list[Tensor]:
    """The costs of what each problem loses, R x S, on the CPU."""
    found: list[Tensor] = []
    for problem, costs_SR in zip(problems, costs_PSR.cpu(), strict=True):
        costs_RS = costs_SR[:, : problem.count].T.contiguous()
        name = problem.streams[0].name
        assert torch.isfinite(costs_RS).all(), f"{name}: rounding has spoiled the inverse of its Hessian"
        found.append(costs_RS)
    return found


class _Systems:
    """The least-squares problems of several streams with as many inputs, in float64."""

    def __init__(self, streams: Sequence[Stream], dampings: Sequence[float]) -> None:
        self.streams = streams
        self.dampings = list(dampings)
        self.weights = [stream.weight_OI.double() for stream in streams]
        inputs, device = self.weights[0].shape[1], self.weights[0].device
        self.damped_NII = torch.empty(len(streams), inputs, inputs, dtype=torch.float64, device=device)
        self.means: list[Tensor | None] = []
        energies: list[Tensor] = []
        for stream, weight_OI, second_II in zip(streams, self.weights, self.damped_NII, strict=True):
            second_II.copy_(stream.second_II)
            energies.append((weight_OI @ second_II).mul_(weight_OI).sum())
            mean_I: Tensor | None = None
            if stream.bias_O is not None and stream.total_I is not None:
                # A constant input that is always kept and never damped: eliminating it leaves the moment about the mean
                assert stream.tokens > 0
                mean_I = stream.total_I.double() / stream.tokens
                second_II.addr_(mean_I, mean_I, alpha=-stream.tokens)
            self.means.append(mean_I)
        self.energy_N = torch.stack(energies)
        diagonal_NI = self.damped_NII.diagonal(dim1=1, dim2=2)
        self.level_N = diagonal_NI.mean(1)
        for n, damping in enumerate(dampings):
            diagonal_NI[n] += damping * self.level_N[n]

    def factorise(self) -> Tensor:
        """L^-1 of the damped Hessians, N x I x I; where there is none, the damping is raised tenfold until there is.

        Raises:
            CompressorError: as `solver.factorise`.
        """
        factor_NII, unsound = _try(self.damped_NII.clone())
        for n in unsound:
            check_inputs(self.level_N[n], self.streams[n].name)
        while unsound:
            for n in unsound:
                self.damped_NII[n].diagonal().add_(9 * self.dampings[n] * self.level_N[n])
                self.dampings[n] *= 10
                if self.dampings[n] > MOST_DAMPING:
                    raise indefinite(self.streams[n].name, self.dampings[n] / 10)
            again_NII, still = _try(self.damped_NII[unsound])
            factor_NII[unsound] = again_NII
            del again_NII
            unsound = [unsound[n] for n in still]
        return factor_NII

    def refits(self, parts: Sequence[tuple[Tensor, Tensor]]) -> list[Refit]:
        """The streams with some of their inputs, given as those kept and those gone, both ascending.

        Those that keep as many are solved together.
        """
        alike: dict[int, list[int]] = {}
        for n, (columns_K, _) in enumerate(parts):
            alike.setdefault(len(columns_K), []).append(n)
        differences: dict[int, Tensor] = {}
        for places in alike.values():
            differences |= zip(places, self._differences(places, [parts[n] for n in places]), strict=True)
        losses: list[Tensor] = []
        for n, damping in enumerate(self.dampings):
            lost = (differences[n] @ self.damped_NII[n]).mul_(differences[n]).sum()
            losses.append(lost - damping * self.level_N[n] * differences[n].square().sum())
        lost_N = torch.stack(losses).clamp(min=0)
        errors: list[float] = torch.where(self.energy_N > 0, lost_N / self.energy_N, 0 * lost_N).tolist()
        found: list[Refit] = []
        for n, (stream, (columns_K, _), mean_I) in enumerate(zip(self.streams, parts, self.means, strict=True)):
            bias_O = stream.bias_O
            if bias_O is not None and mean_I is not None:
                bias_O = (bias_O.double() - differences[n] @ mean_I).to(bias_O.dtype)
            new_OK = (self.weights[n] + differences[n]).index_select(1, columns_K)
            found.append(Refit(new_OK.to(stream.weight_OI.dtype), bias_O, errors[n], self.dampings[n]))
        return found

    def _differences(self, places: Sequence[int], parts: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """W' - W of some streams, O x I each, of which as many inputs are kept."""
        if not len(parts[0][1]):
            return [torch.zeros_like(self.weights[n]) for n in places]
        left_NKK = torch.stack(
            [part(self.damped_NII[n], columns_K, columns_K) for n, (columns_K, _) in zip(places, parts, strict=True)]
        )
        factor_NKK, _ = inverse_factor(left_NKK)
        del left_NKK
        found: list[Tensor] = []
        for n, (columns_K, gone_Q), factor_KK in zip(places, parts, factor_NKK, strict=True):
            # W'_K = W_K + W_Q H_QK (H_KK)^-1
            away_OQ = self.weights[n].index_select(1, gone_Q)
            added_OK = away_OQ @ part(self.damped_NII[n], gone_Q, columns_K) @ factor_KK.T @ factor_KK
            difference_OI = torch.zeros_like(self.weights[n])
            found.append(difference_OI.index_copy_(1, columns_K, added_OK).index_copy_(1, gone_Q, -away_OQ))
        return found


def _try(damped_NII: Tensor) -> tuple[Tensor, list[int]]:
    """L^-1 of several matrices, which are changed, and which have none."""
    factor_NII, info_N = inverse_factor(damped_NII)
    sound_N = (info_N == 0) & torch.isfinite(factor_NII.sum((1, 2)))
    return factor_NII, [n for n, sound in enumerate(sound_N.tolist()) if not sound]
