"""The order in which groups of inputs leave, each time the cheapest: several problems of one shape in step.

With Hinv the inverse of the damped Hessian of the inputs that are left, and W the weights that make up for those that
are gone, removing the inputs Q

    costs tr(W_Q (Hinv_QQ)^-1 W_Q^T),  W -= W_Q (Hinv_QQ)^-1 Hinv_Q,:  and  Hinv -= Hinv_:Q (Hinv_QQ)^-1 Hinv_Q,:

which is exact in groups. Where errors of the outputs count by a metric G, removal costs tr(G W_Q (Hinv_QQ)^-1 W_Q^T).
The order needs only M = W^T G W and Hinv. With L L^T = Hinv_QQ, U = L^-1 Hinv_Q,:, X = L^-1 M_Q,: and
V = X - (L^-1 M_QQ L^-T) U / 2, they become Hinv - U^T U and M - U^T V - V^T U: the same for one input as for a head.
The rows U and V are gathered in a panel, from which the rows of Hinv and M that a removal needs are brought up to date;
a full panel is applied by matrix products.

What is gone stays in all tensors, and nothing of it reaches what is left: entry c of a row of U or V concerns column c
only. So no step depends on what was chosen but by indices on the device. A GPU is not waited for after a removal, and
each of its steps is made for as many problems as are given. Where single inputs leave, the steps that fill a panel are
recorded once in a CUDA graph and replayed; unless ranks are added, each is two kernels of `removal_kernel`.
"""

# Shapes: P problems, S streams of each, N = P S; O outputs, I inputs; as of the last inversion: G groups left, D inputs
# of a group, C inputs left, those of the groups first; K inputs gone; B rows of a panel; R removals; r: rows in use.
# An axis of 2: of Hinv and M, or of U and V.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from compressor.calibration import kernels
from compressor_obs_diff.metric import times
from compressor_obs_diff.triangular import inverse_factor, square

Fusion = Literal["energy", "rank_fusion", "sum"]

PANEL = 128  # inputs removed between two updates of Hinv and M
REFRESH = 2048  # inputs removed between two inversions; in float64 the costs drift by less than 1e-10 until then
RANK_OFFSET = 61  # the paper's 60 + 1, for ranks that begin at 0


class Search:
    """Hinv and M of the inputs that are left, as of the last full panel, and the panel since.

    Args:
        hessian_NII: damped, positive definite, float64; problem by problem, the streams of each side by side. Kept.
        factors: L^-1 of their Cholesky factorisations, N x I x I, in a list that is emptied: it is as large as Hinv.
        weights: of the N, O x I with any O; float64. Kept.
        metrics: of the N, G (in blocks, B x K x K), how much errors of the outputs count in costs; None: all the same.
        groups_GD: the inputs of each group, disjoint, the same for all problems; on the CPU.
        streams: S.
    """

    def __init__(
        self,
        hessian_NII: Tensor,
        factors: list[Tensor],
        weights: Sequence[Tensor],
        metrics: Sequence[Tensor | None],
        groups_GD: Tensor,
        streams: int,
    ) -> None:
        self.hessian_NII = hessian_NII
        self.weights = weights
        self.metrics = metrics
        self.streams = streams
        count, inputs, _ = hessian_NII.shape
        free_I = torch.ones(inputs, dtype=torch.bool)
        free_I[groups_GD.flatten()] = False
        self.rest_I = free_I.nonzero()[:, 0].to(hessian_NII.device)
        self.in_order = torch.equal(groups_GD.flatten(), torch.arange(groups_GD.numel()))
        self.groups_GD = groups_GD.to(hessian_NII.device)
        self.width = groups_GD.shape[1]
        self.gone_PG = torch.zeros(count // streams, len(groups_GD), dtype=torch.bool, device=hessian_NII.device)
        self.zero = torch.zeros((), dtype=torch.float64, device=hessian_NII.device)
        self.order: list[Tensor] = []
        self._kernels: Any = None  # the module, while a removal is two kernels of it
        self._start(factors)

    def run(self, count: int, energy_PS: Tensor, fusion: Fusion) -> tuple[Tensor, Tensor]:
        """Removes as many groups of every problem, each time the cheapest.

        Args:
            count: less than the groups there are.
            energy_PS: what costs are relative to, unless they are fused by ranks.
            fusion: how costs are compared over several streams.

        Returns:
            Which groups, P x R, and what each cost each stream, P x S x R.
        """
        self._kernels = None
        if self.width == 1 and (self.streams == 1 or fusion != "rank_fusion") and kernels.usable(self.out_PG.device):
            from compressor_obs_diff import removal_kernel

            self._kernels = removal_kernel
        costs = [torch.zeros(*energy_PS.shape, 0, dtype=torch.float64, device=self.gone_PG.device)]
        done = 0
        while done < count:
            if PANEL <= done < count - PANEL and self._repeats():  # behind a first panel, which has loaded the kernels
                costs.append(self._remove_panel(energy_PS, fusion))
                done += PANEL
                continue
            place_P1, costs_PS1 = self._choose(energy_PS, fusion)
            costs.append(costs_PS1)
            done += 1
            if done < count:
                self.remove(place_P1)
            else:
                self.places.append(place_P1)
        return torch.cat([*self.order, self._chosen()], dim=1), torch.cat(costs, dim=2)

    def _choose(self, energy_PS: Tensor, fusion: Fusion) -> tuple[Tensor, Tensor]:
        """The place of the cheapest group of each problem, P x 1, and what it costs each stream, P x S x 1.

        Kernels mark it as gone, too.
        """
        if self._kernels is not None:
            return self._kernels.choose(self.pivots_N2G, self.out_PG, energy_PS)
        costs_PSG = self.costs()
        place_P1 = cheapest(costs_PSG, self.out_PG, energy_PS, fusion)
        return place_P1, costs_PSG.gather(2, place_P1[:, None].expand(-1, self.streams, 1))

    def _repeats(self) -> bool:
        """Whether the next removals, as many as fill a panel, are the same for a GPU as those of another panel."""
        return self.out_PG.is_cuda and self.width == 1 and self.rows == 0 and self.since + PANEL < REFRESH

    def _remove_panel(self, energy_PS: Tensor, fusion: Fusion) -> Tensor:
        """Removes as many as fill a panel, and applies it, by a CUDA graph: launched one by one, kernels take longer.

        Returns:
            What they cost, P x S x PANEL.
        """
        if self._panel is None:
            assert self.out_PG.get_device() == torch.cuda.current_device(), "kernels of another GPU are not recorded"
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                steps = []
                for self.rows in range(PANEL):
                    place_P1, costs_PS1 = self._choose(energy_PS, fusion)
                    self._downdate(place_P1)
                    steps.append((place_P1, costs_PS1))
                self.rows = PANEL
                self._update()
                places_PR, costs_PSR = (torch.cat(each, dim=-1) for each in zip(*steps, strict=True))
            self._panel = graph, places_PR, costs_PSR
        graph, places_PR, costs_PSR = self._panel
        graph.replay()
        self.places.append(places_PR.clone())
        costs_PSR = costs_PSR.clone()
        self.rows = 0
        self.since += PANEL
        self._check()
        return costs_PSR

    def costs(self) -> Tensor:
        """What removing each group would cost each stream (P x S x G); meaningless for those that are gone."""
        if self.width == 1:
            costs_NG = torch.addcdiv(self.zero, self.pivots_N2G[:, 1], self.pivots_N2G[:, 0], value=2)
        else:
            lower_XDD, info_X = torch.linalg.cholesky_ex(self.blocks_2XDD[0])
            half_XDD = torch.linalg.solve_triangular(lower_XDD, self.blocks_2XDD[1], upper=False)
            whole_XDD = torch.linalg.solve_triangular(lower_XDD, half_XDD.mT, upper=False)
            costs_X = whole_XDD.diagonal(dim1=1, dim2=2).sum(1).masked_fill_(info_X != 0, torch.nan)
            costs_NG = costs_X.view(len(self.hessian_NII), -1)
        return costs_NG.clamp_(min=0).view(len(self.gone_PG), self.streams, -1)

    def remove(self, place_P1: Tensor) -> None:
        """Downdates Hinv and M of all problems for the loss of a group each, given by its place among those left."""
        self._downdate(place_P1)
        self.places.append(place_P1)
        self.rows += self.width
        self.since += self.width
        if self.since >= REFRESH:
            self.invert()
        elif self.rows + self.width > self.panel_N2BC.shape[2]:
            self.apply()

    def _downdate(self, place_P1: Tensor) -> None:
        if self._kernels is not None:  # it is marked already
            self._kernels.downdate(self.state_N2CC, self.panel_N2BC, self.pivots_N2G, place_P1, self.rows)
            return
        self.out_PG.scatter_(1, place_P1, True)
        if self.width == 1:
            self._remove_one(self._of_streams(place_P1))
        else:
            self._remove_several(self._of_streams(place_P1))

    def _of_streams(self, x_PX: Tensor) -> Tensor:
        """What is one problem's, for each of its streams."""
        return x_PX if self.streams == 1 else x_PX[:, None].expand(-1, self.streams, -1).flatten(0, 1)

    def _chosen(self) -> Tensor:
        """Which groups have left since the last inversion, P x R."""
        return self.group_PG.gather(1, torch.cat([self.group_PG[:, :0], *self.places], dim=1))

    def _current(self, gone_ND: Tensor) -> Tensor:
        """Rows of Hinv and M as they are now, N x 2 x D x C."""
        count, width = gone_ND.shape
        rows, size = self.rows, self.state_N2CC.shape[-1]
        current_N2DC = self.state_N2CC.gather(2, gone_ND[:, None, :, None].expand(count, 2, width, size))
        if rows:
            panel_N2rC = self.panel_N2BC[:, :, :rows]
            taken_N2rD = panel_N2rC.gather(3, gone_ND[:, None, None, :].expand(count, 2, rows, width))
            u_NrD, v_NrD = taken_N2rD.unbind(1)
            if width == 1:
                # Hinv's row less u^T U, and M's less v^T U, in one product
                current_N2DC[:, :, 0].baddbmm_(taken_N2rD[..., 0], panel_N2rC[:, 0], alpha=-1)
            else:
                current_N2DC[:, 0].baddbmm_(u_NrD.mT, panel_N2rC[:, 0], alpha=-1)
                current_N2DC[:, 1].baddbmm_(v_NrD.mT, panel_N2rC[:, 0], alpha=-1)
            current_N2DC[:, 1].baddbmm_(u_NrD.mT, panel_N2rC[:, 1], alpha=-1)
        return current_N2DC

    def _remove_one(self, gone_N1: Tensor) -> None:
        """L is a number here: no factorisation, and few launches."""
        groups = self.out_PG.shape[1]
        current_N2C = self._current(gone_N1)[:, :, 0]
        inverse_N1C, gram_N1C = current_N2C[:, :1], current_N2C[:, 1:]
        pivot_N21 = current_N2C.gather(2, gone_N1[:, None].expand(-1, 2, 1))
        inner_N11 = pivot_N21[:, 1:] / pivot_N21[:, :1]
        gram_N1C.addcmul_(inverse_N1C, inner_N11, value=-0.5)
        new_N2C = self.panel_N2BC[:, :, self.rows]
        torch.mul(current_N2C, pivot_N21[:, :1].rsqrt(), out=new_N2C)
        new_N2G = new_N2C[:, :, :groups]
        self.pivots_N2G.addcmul_(new_N2G, new_N2G[:, :1], value=-1)

    def _remove_several(self, place_N1: Tensor) -> None:
        groups, width = self.out_PG.shape[1], self.width
        gone_ND = place_N1 * width + torch.arange(width, device=place_N1.device)
        current_N2DC = self._current(gone_ND)
        inverse_NDC, gram_NDC = current_N2DC.unbind(1)
        index_NDD = gone_ND[:, None].expand(-1, width, -1)
        lower_NDD = torch.linalg.cholesky_ex(inverse_NDC.gather(2, index_NDD)).L
        u_NDC = torch.linalg.solve_triangular(lower_NDD, inverse_NDC, upper=False)
        x_NDC = torch.linalg.solve_triangular(lower_NDD, gram_NDC, upper=False)
        inner_NDD = torch.linalg.solve_triangular(lower_NDD, x_NDC.gather(2, index_NDD).mT, upper=False)
        v_NDC = torch.baddbmm(x_NDC, inner_NDD, u_NDC, alpha=-0.5)
        self.panel_N2BC[:, 0, self.rows : self.rows + width] = u_NDC
        self.panel_N2BC[:, 1, self.rows : self.rows + width] = v_NDC
        u_XDD, v_XDD = (
            each_NDC[..., : groups * width].unflatten(2, (groups, width)).permute(0, 2, 3, 1).flatten(0, 1)
            for each_NDC in (u_NDC, v_NDC)
        )
        self.blocks_2XDD[0].baddbmm_(u_XDD, u_XDD.mT, alpha=-1)
        self.blocks_2XDD[1].baddbmm_(u_XDD, v_XDD.mT, alpha=-1).baddbmm_(v_XDD, u_XDD.mT, alpha=-1)

    def apply(self) -> None:
        """Applies the panel to Hinv and M, which are computed anew if rounding has spoiled them."""
        self._update()
        self.rows = 0
        self._check()

    def _update(self) -> None:
        u_NrC, v_NrC = self.panel_N2BC[:, :, : self.rows].unbind(1)
        inverse_NCC, gram_NCC = self.state_N2CC.unbind(1)
        inverse_NCC.baddbmm_(u_NrC.mT, u_NrC, alpha=-1)
        gram_NCC.baddbmm_(u_NrC.mT, v_NrC, alpha=-1).baddbmm_(v_NrC.mT, u_NrC, alpha=-1)

    def _check(self) -> None:
        # Of a positive definite matrix, Hinv_jj H_jj >= 1: less tells of rounding.
        product_NC = self.state_N2CC[:, 0].diagonal(dim1=1, dim2=2) * self.diagonal_NC
        groups, width = self.out_PG.shape[1], self.width
        least_NG = product_NC[:, : groups * width].unflatten(1, (groups, width)).amin(2)
        if ((least_NG < 1 - 1e-6) & ~self._of_streams(self.out_PG)).any():
            self.invert()

    def invert(self) -> None:
        """Hinv and M of what is left, from the Hessian and the dense weights."""
        del self.state_N2CC, self.panel_N2BC, self._panel
        self.order.append(self._chosen())
        self.gone_PG.scatter_(1, self.order[-1], True)
        self._start([])

    def _start(self, factors: list[Tensor]) -> None:
        count, device, width = len(self.hessian_NII), self.gone_PG.device, self.width
        problems, total = self.gone_PG.shape
        groups = total - sum(order_PR.shape[1] for order_PR in self.order)
        sorted_PG = self.gone_PG.byte().argsort(dim=1, stable=True)  # those left, then those gone, without waiting
        self.group_PG = sorted_PG[:, :groups]
        columns_PC = torch.cat([self.groups_GD[self.group_PG].flatten(1), self.rest_I.expand(problems, -1)], dim=1)
        gone_PK = self.groups_GD[sorted_PG[:, groups:]].flatten(1)
        columns_NC, gone_NK = self._of_streams(columns_PC), self._of_streams(gone_PK)
        size = columns_NC.shape[1]
        self.state_N2CC = torch.empty(count, 2, size, size, dtype=torch.float64, device=device)
        inverse_NCC, gram_NCC = self.state_N2CC.unbind(1)
        if factors:
            square(factors.pop(), inverse_NCC)
            if not self.in_order:
                for inverse_CC, columns_C in zip(inverse_NCC, columns_NC, strict=True):
                    inverse_CC.copy_(part(inverse_CC, columns_C, columns_C))
        else:
            left_NCC = torch.stack(
                [part(h_II, columns_C, columns_C) for h_II, columns_C in zip(self.hessian_NII, columns_NC, strict=True)]
            )
            square(inverse_factor(left_NCC)[0], inverse_NCC)
            del left_NCC
        for n, (columns_C, gone_K) in enumerate(zip(columns_NC, gone_NK, strict=True)):
            weight_OC = self.weights[n].index_select(1, columns_C)
            if len(gone_K):
                between_KC = part(self.hessian_NII[n], gone_K, columns_C)
                weight_OC += self.weights[n].index_select(1, gone_K) @ between_KC @ inverse_NCC[n]
            metric_BKK = self.metrics[n]
            scored_OC = weight_OC if metric_BKK is None else times(metric_BKK.double(), weight_OC)
            torch.mm(weight_OC.T, scored_OC, out=gram_NCC[n])
        self.diagonal_NC = self.hessian_NII.diagonal(dim1=1, dim2=2).gather(1, columns_NC)
        self.out_PG = torch.zeros(problems, groups, dtype=torch.bool, device=device)
        if width == 1:
            # Hinv_jj and M_jj / 2: from both, then, one product is taken away, of U with U and with V
            self.pivots_N2G = self.state_N2CC.diagonal(dim1=2, dim2=3)[:, :, :groups].clone()
            self.pivots_N2G[:, 1] /= 2
        else:
            corner_N2GDGD = self.state_N2CC[:, :, : groups * width, : groups * width]
            corner_N2GDGD = corner_N2GDGD.unflatten(3, (groups, width)).unflatten(2, (groups, width))
            blocks_2NGDD = corner_N2GDGD.diagonal(dim1=2, dim2=4).permute(1, 0, 4, 2, 3)
            self.blocks_2XDD = blocks_2NGDD.flatten(1, 2).contiguous()
        self.panel_N2BC = torch.empty(count, 2, max(PANEL, width), size, dtype=torch.float64, device=device)
        self._panel: tuple[torch.cuda.CUDAGraph, Tensor, Tensor] | None = None
        self.places: list[Tensor] = []
        self.rows = 0
        self.since = 0


def cheapest(costs_PSG: Tensor, out_PG: Tensor, energy_PS: Tensor, fusion: Fusion) -> Tensor:
    """The place of the group that each problem is to lose next, P x 1. Ties go to the lower one.

    Args:
        costs_PSG: changed: those of groups that are gone become infinite.
        out_PG: which are gone.
        energy_PS: what costs are relative to, unless they are fused by ranks.
        fusion: as in `Search.run`.
    """
    costs_PSG.masked_fill_(out_PG[:, None], torch.inf)  # and so behind all others in every ranking
    if costs_PSG.shape[1] == 1:
        score_PG = costs_PSG[:, 0]
    elif fusion != "rank_fusion":
        score_PG = (costs_PSG / energy_PS[:, :, None]).sum(1)
    else:
        rank_PSG = costs_PSG.argsort(dim=2, stable=True).argsort(dim=2)
        score_PG = -(1 / (RANK_OFFSET + rank_PSG.double())).sum(1)
        score_PG = score_PG.masked_fill(out_PG, torch.inf)
    return score_PG.argmin(1, keepdim=True)


def part(x_II: Tensor, rows_X: Tensor, columns_Y: Tensor) -> Tensor:
    """Some rows and columns."""
    return x_II.index_select(0, rows_X).index_select(1, columns_Y)
