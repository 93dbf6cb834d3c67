"""Adds the inputs and the gradients of one call to their moments: only both together tell how much a token counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from compressor.calibration import influence, kernels
from compressor.calibration.moments import Moments
from compressor.calibration.packages import Group
from compressor.calibration.timing import Meter
from compressor.errors import CompressorError


class Coupled:
    """Keeps the inputs of a call that is differentiated until its gradients are known.

    Args:
        groups: layers by the input they share.
        moments: by the groups' names, with gradients.
        meter: gets the time that adding takes.
    """

    def __init__(self, groups: Iterable[Group], moments: Mapping[str, Moments], meter: Meter) -> None:
        self._groups = tuple(groups)
        self._moments = moments
        self._meter = meter
        self._inputs: dict[str, tuple[Tensor, int]] = {}

    def keeping(self, group: Group) -> Callable[[Tensor], None]:
        """Takes what the group's layers are fed; nothing is kept of calls that are not differentiated."""

        def keep(x: Tensor) -> None:
            if torch.is_grad_enabled():
                self._inputs[group.name] = x.detach(), x._version

        return keep

    def forget(self) -> None:
        """Keeps nothing of the call any longer, however it has ended."""
        self._inputs.clear()

    def add(
        self,
        gradients: Mapping[str, Tensor],
        squares: Mapping[str, Tensor],
        scale: Tensor,
        weight: float | Tensor,
    ) -> None:
        """Adds what was kept, with the gradients at the layers' outputs; no GPU is waited for where there are kernels.

        Args:
            gradients: by the layers' names.
            squares: the sums of the squares of their tokens, as `influence.squares` gives them.
            scale: what squared gradients of this call are multiplied by, float64 without dimensions.
            weight: how much the call counts by its step, for the inputs; as `scale`, where it is to be read again.

        Raises:
            CompressorError: if an input is not what it was.
        """
        with self._meter.block(rare=True):
            for group in self._groups:
                if group.name not in self._inputs:
                    continue
                x, version = self._inputs.pop(group.name)
                if x._version != version:
                    raise CompressorError(
                        f"{group.name}: the network writes over the layer's input before its call has ended, so that "
                        "gradients cannot weigh it; a pruner that asks for no gradients would do"
                    )
                targets = [target for target in group.targets if target.name in squares]
                squares_LT = torch.stack([squares[target.name] for target in targets])
                found = influence.of(x, squares_LT, sum(target.outputs for target in targets))
                moments = self._moments[group.name]
                factor, live = _factor(x, scale * found.inputs * weight)
                moments.add(x, factor, live, found.inputs_T)
                for target, counts in zip(targets, found.gradients_L, strict=True):
                    gradient = gradients[target.name]
                    factor, live = _factor(gradient, scale * counts)
                    moments.gradients[target.name].add(gradient, factor, live, found.gradients_T)


def _factor(x: Tensor, factor: Tensor) -> tuple[float, Tensor | None]:
    """As a number, or left on the GPU for kernels."""
    return (factor.item(), None) if kernels.of(x) is None else (1.0, factor)
