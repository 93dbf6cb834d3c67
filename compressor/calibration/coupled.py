"""Adds the inputs and the gradients of one call to their moments: only both together tell how much a token counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from compressor.calibration import influence
from compressor.calibration.moments import Moments
from compressor.calibration.packages import Group
from compressor.calibration.timing import Meter
from compressor.calibration.tokens import Tokens


class Coupled:
    """Keeps the inputs of a call that is differentiated until its gradients are known.

    Args:
        groups: layers by the input they share.
        moments: by the groups' names, with gradients.
        tokens: draws those of the inputs that are summed; of the gradients, all are.
        meter: gets the time that adding takes.
    """

    def __init__(self, groups: Iterable[Group], moments: Mapping[str, Moments], tokens: Tokens, meter: Meter) -> None:
        self._groups = tuple(groups)
        self._moments = moments
        self._tokens = tokens
        self._meter = meter
        self._inputs: dict[str, tuple[Tensor, int]] = {}

    def keeping(self, group: Group) -> Callable[[Tensor], None]:
        """Takes what the group's layers are fed; nothing is kept of calls that are not differentiated."""

        def keep(x: Tensor) -> None:
            if torch.is_grad_enabled():
                self._inputs[group.name] = x.detach(), x._version

        return keep

    def add(self, gradients: Mapping[str, Tensor], scale: float, weight: float) -> None:
        """Adds what was kept, with the gradients at the layers' outputs.

        Args:
            gradients: by the layers' names.
            scale: what squared gradients of this call are multiplied by.
            weight: how much the call counts by its step, for the inputs.
        """
        with self._meter.block(rare=True):
            called = [group for group in self._groups if group.name in self._inputs]
            found = [
                influence.of(self._inputs[group.name][0], [gradients[target.name] for target in group.targets])
                for group in called
            ]
            if not found:
                return
            facts = torch.cat([torch.cat([each.most_2, each.means_L]) for each in found]).tolist()  # waits once
            for group, each in zip(called, found, strict=True):
                most_inputs, most_gradients, *means = facts[: 2 + len(group.targets)]
                del facts[: 2 + len(group.targets)]
                x, version = self._inputs.pop(group.name)
                assert x._version == version, f"{group.name}: its input was overwritten before the call's end"
                moments = self._moments[group.name]
                place_K, times = self._tokens.draw(x)
                root_T = _roots(each.inputs_T, most_inputs)
                moments.add(x, weight * scale * most_inputs, place_K, times, root_T=root_T)
                root_T = _roots(each.gradients_T, most_gradients)
                for target, mean in zip(group.targets, means, strict=True):
                    factor = scale * most_gradients / mean
                    moments.gradients[target.name].add(gradients[target.name], factor, root_T)


def _roots(counts_T: Tensor, most: float) -> Tensor:
    """Of what tokens count, relative to the most; all 1 where none counts."""
    return (counts_T / most).sqrt() if most > 0 else torch.ones_like(counts_T)
