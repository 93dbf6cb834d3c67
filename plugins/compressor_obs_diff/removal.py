"""Greedy removal of whole groups of a layer's inputs (heads, neurons), the other inputs making up for them.

The structured granularities of OBS-Diff (arXiv 2510.06751). The paper factorises the Hessian anew in every round; here
one inversion is downdated, which is exact in groups. With Hinv the inverse of the damped Hessian of the inputs that are
left, and W the weights that make up for those that are gone, removing the inputs P

    costs tr(W_P (Hinv_PP)^-1 W_P^T),  W -= W_P (Hinv_PP)^-1 Hinv_P,:  and  Hinv -= Hinv_:P (Hinv_PP)^-1 Hinv_P,:

The search for the order needs only M = W^T W and Hinv. With L L^T = Hinv_PP, U = L^-1 Hinv_P,:, G = L^-1 M_P,: and
V = G - (L^-1 M_PP L^-T) U / 2, they become Hinv - U^T U and M - U^T V - V^T U: the same for one input as for a head.
The rows U and V are gathered in a panel, from which the rows of Hinv and M that a removal needs are brought up to date;
a full panel is applied by matrix products. The new weights come from one solve at the end: no rounding adds up in them.

A metric G of the outputs changes the costs, to tr(G W_P (Hinv_PP)^-1 W_P^T), and with them the order, but not what
makes up for a loss: every row of W is best off with its own least squares, whatever it counts. So M = W^T G W is all
there is to it.
"""

# Shapes: O outputs, I inputs, C inputs left at the last inversion, G groups, D inputs of a group, R removals,
# S streams, K inputs kept, B rows of a panel; of a metric: B blocks of K outputs.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from compressor_obs_diff.metric import root_times
from compressor_obs_diff.solver import factorise

Fusion = Literal["energy", "rank_fusion", "sum"]

PANEL = 128  # inputs removed between two updates of Hinv and M
REFRESH = 2048  # inputs removed between two inversions; in float64 the costs drift by less than 1e-10 until then
RANK_OFFSET = 61  # the paper's 60 + 1, for ranks that begin at 0


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
    where the part in I^2 is a matrix product. All in float64; memory: six I x I.

    Args:
        streams: at least one; all are given up the same groups. Not changed.
        groups_GD: indices of the inputs of each group, disjoint. Inputs in no group are kept.
        count: how many groups to remove, less than G.
        damping: added to each Hessian's diagonal, relative to its mean; raised as `solver.factorise` does.
        fusion: how costs are compared over several streams. "rank_fusion" is the paper's: the highest sum of
            1 / (60 + rank + 1). "energy" is the lowest sum of costs, each relative to the stream's dense
            ||W X||^2, and "sum" that of the costs themselves. One stream alone is ordered by its cost. Ties go to the
            lower index.

    Raises:
        CompressorError: if a Hessian is zero or not finite, or cannot be factorised.
    """
    total = len(groups_GD)
    assert streams
    assert len({stream.weight_OI.shape[1] for stream in streams}) == 1
    assert 0 <= count < total
    assert groups_GD.unique().numel() == groups_GD.numel()
    systems = [_System(stream, damping) for stream in streams]
    searches = [_Search(system, groups_GD.to(system.weight_OI.device)) for system in systems]
    energy_S = torch.tensor([1.0 if fusion == "sum" else system.energy for system in systems], dtype=torch.float64)
    # What was chosen stays on the device, so that a GPU is not waited for after every removal.
    gone_G = torch.zeros(total, dtype=torch.bool, device=searches[0].groups_GD.device)
    energy_S = energy_S.to(gone_G.device)
    chosen: list[Tensor] = []
    costs: list[Tensor] = []
    for step in range(count):
        costs_SG = torch.stack([search.costs() for search in searches])
        group_1 = _cheapest(costs_SG, gone_G, energy_S, fusion)
        costs.append(costs_SG.index_select(1, group_1)[:, 0])
        chosen.append(group_1)
        gone_G.index_fill_(0, group_1, True)
        if step < count - 1:
            for search in searches:
                search.remove(group_1)
    costs_RS = torch.stack(costs).cpu() if costs else torch.zeros(0, len(streams), dtype=torch.float64)
    assert torch.isfinite(costs_RS).all(), f"{streams[0].name}: rounding has spoiled the inverse of its Hessian"
    removed: list[int] = torch.cat(chosen).tolist() if chosen else []
    left = torch.arange(total)[~gone_G.cpu()]
    mask_I = torch.ones(streams[0].weight_OI.shape[1], dtype=torch.bool)
    mask_I[groups_GD[removed].cpu().flatten()] = False
    columns_K = mask_I.nonzero()[:, 0]
    return Removal(
        kept=left.tolist(),
        removed=removed,
        columns=columns_K.tolist(),
        costs_RS=costs_RS,
        refits=[system.refit(columns_K) for system in systems],
    )


def refit(stream: Stream, columns: Sequence[int], damping: float) -> Refit:
    """The weights on some of the inputs, and the bias, whose outputs come nearest to those of all.

    Minimises ||W X + b - W' X_K - b'||^2 + damping * mean(diag H) * ||W - W'||^2, b' moving only where
    `stream.absorbs`. Removing inputs one after the other leads to the same weights.

    Args:
        stream: not changed.
        columns: the inputs kept, ascending, at least one.
        damping: as in `remove_greedily`.

    Raises:
        CompressorError: as in `remove_greedily`.
    """
    return _System(stream, damping).refit(torch.tensor(columns))


class _System:
    """One stream's least-squares problem, in float64."""

    def __init__(self, stream: Stream, damping: float) -> None:
        self.stream = stream
        self.weight_OI = stream.weight_OI.double()
        self.scored_OI = self.weight_OI
        if stream.metric_BKK is not None:
            self.scored_OI = root_times(stream.metric_BKK, self.weight_OI)
        second_II = stream.second_II.double()
        self.energy = (self.weight_OI @ second_II * self.weight_OI).sum().item()
        self.mean_I: Tensor | None = None
        if stream.bias_O is not None and stream.total_I is not None:
            # A constant input that is always kept and never damped: eliminating it leaves the moment about the mean.
            assert stream.tokens > 0
            self.mean_I = stream.total_I.double() / stream.tokens
            second_II = torch.addr(second_II, self.mean_I, self.mean_I, alpha=-stream.tokens)
        self.damping = factorise(second_II.float(), damping, stream.name).damping
        self.level = second_II.diagonal().mean()
        self.damped_II = second_II.clone()
        self.damped_II.diagonal().add_(self.damping * self.level)
        while torch.linalg.cholesky_ex(self.damped_II).info != 0:  # what float32 let pass by its rounding
            self.damped_II.diagonal().add_(9 * self.damping * self.level)
            self.damping *= 10

    def refit(self, columns_K: Tensor) -> Refit:
        stream = self.stream
        columns_K = columns_K.to(self.weight_OI.device)
        gone_I = torch.ones(len(self.damped_II), dtype=torch.bool, device=columns_K.device)
        gone_I[columns_K] = False
        new_OI = self.weight_OI.masked_fill(gone_I, 0)
        if gone_I.any():
            # W'_K = W_K + W_P H_PK (H_KK)^-1
            lower_KK = torch.linalg.cholesky(self.damped_II[columns_K][:, columns_K])
            wanted_OK = self.weight_OI[:, gone_I] @ self.damped_II[gone_I][:, columns_K]
            new_OI[:, columns_K] += torch.cholesky_solve(wanted_OK.T, lower_KK).T
        difference_OI = new_OI - self.weight_OI
        lost = (difference_OI @ self.damped_II * difference_OI).sum()
        lost -= self.damping * self.level * difference_OI.square().sum()
        bias_O = stream.bias_O
        if bias_O is not None and self.mean_I is not None:
            bias_O = (bias_O.double() - difference_OI @ self.mean_I).to(bias_O.dtype)
        return Refit(
            weight_OK=new_OI[:, columns_K].to(stream.weight_OI.dtype),
            bias_O=bias_O,
            error=max(lost.item(), 0.0) / self.energy if self.energy > 0 else 0.0,
            damping=self.damping,
        )


class _Search:
    """Hinv and M of the inputs that are left, as of the last full panel, and the panel since."""

    def __init__(self, system: _System, groups_GD: Tensor) -> None:
        self.system = system
        self.groups_GD = groups_GD
        self.left_G = torch.ones(len(groups_GD), dtype=torch.bool, device=groups_GD.device)
        self.left_I = torch.ones(len(system.damped_II), dtype=torch.bool, device=groups_GD.device)
        self._invert()

    def costs(self) -> Tensor:
        """What removing each group would cost; meaningless for those that are gone."""
        if self.groups_GD.shape[1] == 1:
            costs_G = self.gram_GDD[:, 0, 0] / self.inverse_GDD[:, 0, 0]
        else:
            lower_GDD = torch.linalg.cholesky(self.inverse_GDD)
            costs_G = torch.cholesky_solve(self.gram_GDD, lower_GDD).diagonal(dim1=1, dim2=2).sum(1)
        return costs_G.clamp(min=0)

    def remove(self, group_1: Tensor) -> None:
        """Downdates Hinv and M for the loss of a group, given by a tensor of its index."""
        gone_D = self.place_GD.index_select(0, group_1)[0]
        width = len(gone_D)
        u_BC, v_BC = self.u_BC[: self.rows], self.v_BC[: self.rows]
        u_DB, v_DB = u_BC.index_select(1, gone_D).T, v_BC.index_select(1, gone_D).T
        both = torch.cat([u_DB, v_DB]) @ u_BC
        inverse_DC = self.inverse_CC.index_select(0, gone_D) - both[:width]
        gram_DC = self.gram_CC.index_select(0, gone_D) - both[width:] - u_DB @ v_BC
        u_DC, v_DC = _rows_of_one(gone_D, inverse_DC, gram_DC) if width == 1 else _rows(gone_D, inverse_DC, gram_DC)
        self.left_G.index_fill_(0, group_1, False)
        self.left_I.index_fill_(0, self.groups_GD.index_select(0, group_1)[0], False)
        self.left_C.index_fill_(0, gone_D, 0)
        u_DC *= self.left_C
        v_DC *= self.left_C
        if width == 1:
            u_G, v_G = u_DC[0].index_select(0, self.place_GD[:, 0]), v_DC[0].index_select(0, self.place_GD[:, 0])
            self.inverse_GDD[:, 0, 0].addcmul_(u_G, u_G, value=-1)
            self.gram_GDD[:, 0, 0].addcmul_(u_G, v_G, value=-2)
            self.inverse_GDD.index_fill_(0, group_1, 1)
        else:
            u_GDB = u_DC[:, self.place_GD].permute(1, 2, 0)
            v_GDB = v_DC[:, self.place_GD].permute(1, 2, 0)
            self.inverse_GDD.baddbmm_(u_GDB, u_GDB.mT, alpha=-1)
            self.gram_GDD.baddbmm_(u_GDB, v_GDB.mT, alpha=-1).baddbmm_(v_GDB, u_GDB.mT, alpha=-1)
            self.inverse_GDD[group_1] = torch.eye(width, dtype=u_DC.dtype, device=u_DC.device)
        self.gram_GDD.index_fill_(0, group_1, 0)
        self.u_BC[self.rows : self.rows + width] = u_DC
        self.v_BC[self.rows : self.rows + width] = v_DC
        self.rows += width
        self.since += width
        if self.since >= REFRESH:
            self._invert()
        elif self.rows + width > len(self.u_BC):
            self._apply()

    def _apply(self) -> None:
        """Applies the panel to Hinv and M."""
        u_BC, v_BC = self.u_BC[: self.rows], self.v_BC[: self.rows]
        self.inverse_CC.addmm_(u_BC.T, u_BC, alpha=-1)
        self.gram_CC.addmm_(u_BC.T, v_BC, alpha=-1).addmm_(v_BC.T, u_BC, alpha=-1)
        self.rows = 0
        # Of a positive definite matrix, Hinv_jj H_jj >= 1: less tells of rounding.
        product_C = self.inverse_CC.diagonal() * self.system.damped_II.diagonal()[self.columns_C]
        if (product_C[self.left_C > 0] < 1 - 1e-6).any():
            self._invert()

    def _invert(self) -> None:
        """Hinv and M of what is left, from the Hessian and the dense weights."""
        system, groups_GD = self.system, self.groups_GD
        left_C = self.left_I.nonzero()[:, 0]
        gone_I = ~self.left_I
        self.inverse_CC = torch.cholesky_inverse(torch.linalg.cholesky(system.damped_II[left_C][:, left_C]))
        weight_OC = system.scored_OI[:, left_C]
        if gone_I.any():
            weight_OC = weight_OC + system.scored_OI[:, gone_I] @ system.damped_II[gone_I][:, left_C] @ self.inverse_CC
        self.gram_CC = weight_OC.T @ weight_OC
        place_I = torch.zeros(len(gone_I), dtype=torch.int64, device=gone_I.device)
        place_I[left_C] = torch.arange(len(left_C), device=gone_I.device)
        self.columns_C = left_C
        self.place_GD = place_I[groups_GD]
        self.left_C = torch.ones(len(left_C), dtype=torch.float64, device=gone_I.device)
        gone_G = ~self.left_G
        rows_GD1, columns_G1D = self.place_GD[:, :, None], self.place_GD[:, None, :]
        self.inverse_GDD = self.inverse_CC[rows_GD1, columns_G1D]
        self.gram_GDD = self.gram_CC[rows_GD1, columns_G1D]
        width = groups_GD.shape[1]
        self.inverse_GDD[gone_G] = torch.eye(width, dtype=torch.float64, device=gone_I.device)
        self.gram_GDD[gone_G] = 0
        self.u_BC = torch.empty(max(PANEL, width), len(left_C), dtype=torch.float64, device=gone_I.device)
        self.v_BC = torch.empty_like(self.u_BC)
        self.rows = 0
        self.since = 0


def _rows(gone_D: Tensor, inverse_DC: Tensor, gram_DC: Tensor) -> tuple[Tensor, Tensor]:
    """U and V."""
    lower_DD = torch.linalg.cholesky(inverse_DC[:, gone_D])
    u_DC = torch.linalg.solve_triangular(lower_DD, inverse_DC, upper=False)
    g_DC = torch.linalg.solve_triangular(lower_DD, gram_DC, upper=False)
    inner_DD = torch.linalg.solve_triangular(lower_DD, g_DC[:, gone_D].T, upper=False)
    return u_DC, g_DC - inner_DD @ u_DC / 2


def _rows_of_one(gone_1: Tensor, inverse_1C: Tensor, gram_1C: Tensor) -> tuple[Tensor, Tensor]:
    """The same for a single input, whose L is a number: without a factorisation, whose success a GPU is waited for."""
    root = inverse_1C.index_select(1, gone_1).sqrt()
    u_1C, g_1C = inverse_1C / root, gram_1C / root
    return u_1C, g_1C - u_1C * (g_1C.index_select(1, gone_1) / root / 2)


def _cheapest(costs_SG: Tensor, gone_G: Tensor, energy_S: Tensor, fusion: Fusion) -> Tensor:
    """The index of the group to remove next, as a tensor of one element."""
    costs_SG = costs_SG.masked_fill(gone_G, torch.inf)  # and so behind all others in every ranking
    if len(costs_SG) == 1:
        score_G = costs_SG[0]
    elif fusion != "rank_fusion":
        score_G = (costs_SG / torch.where(energy_S > 0, energy_S, 1)[:, None]).sum(0)
    else:
        rank_SG = costs_SG.argsort(dim=1, stable=True).argsort(dim=1)
        score_G = -(1 / (RANK_OFFSET + rank_SG.double())).sum(0)
    return score_G.masked_fill(gone_G, torch.inf).argmin(0, keepdim=True)  # the first of equals
