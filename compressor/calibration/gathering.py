"""The hooks that add to the moments of a package's inputs in every forward of the network."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from compressor.calibration import gradients
from compressor.calibration.calls import Calls
from compressor.calibration.compiled import Blocks
from compressor.calibration.coupled import Coupled
from compressor.calibration.curvature import Gradients
from compressor.calibration.gradients import Differentiated
from compressor.calibration.moments import Moments
from compressor.calibration.packages import Group, Package
from compressor.calibration.replay import Replay
from compressor.calibration.strides import Strides, holding
from compressor.calibration.timing import Meter
from compressor.plugin import MomentKind


@contextmanager
def watch(
    network: nn.Module,
    package: Package,
    kind: MomentKind,
    weigh: Callable[[Tensor | float], tuple[int, float]],
    strides: Strides,
    calls: Calls | Differentiated,
    meter: Meter,
    blocks: Blocks | None = None,
    replay: Replay | None = None,
) -> Iterator[tuple[dict[str, Moments], Callable[[int], None]]]:
    """While it lasts, forwards of the network add to moments.

    It gives these, by the name of the group, and what is to be called before every batch with the number of its first
    prompt, which decides what is drawn.

    Args:
        network: with a forward that has an argument `timestep`.
        package: the layers.
        kind: `norms`, `second` or `gradients`, as in `Calibration.collect`.
        weigh: the step of a call, and how much that counts, by its timestep; called once at the beginning of each.
        strides: which calls the network runs.
        calls: draws those of them that are summed; with `gradients`, that are differentiated, for all packages.
        meter: gets the time that adding to moments takes.
        blocks: of the network, if they are to run compiled; not with `gradients`.
        replay: of the network, if its forwards are to be replayed where they can be.
    """
    differentiated = calls if isinstance(calls, Differentiated) else None
    assert (differentiated is None) == (kind != "gradients"), "gradients are of calls that are differentiated"
    assert blocks is None or differentiated is None, "hooks on outputs would break the blocks' graphs"
    device = next(network.parameters()).device
    groups = package.every or package.groups
    moments = {g.name: Moments.empty(g.inputs, kind != "norms", device) for g in groups}
    signature = inspect.signature(network.forward)
    weight, summed = 0.0, False
    live = torch.zeros((), dtype=torch.float64, device=device) if replay is not None else None

    def before_network(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal weight, summed
        step, counts = weigh(signature.bind_partial(*args, **kwargs).arguments["timestep"])
        steps = strides.begin(step, args, kwargs)
        times = calls.next_call() if strides.runs and isinstance(calls, Calls) else 1.0
        weight = steps * times * counts
        summed = steps * times > 0
        if summed:
            if live is not None:
                live.fill_(weight)
            meter.next_forward()

    def next_batch(prompt: int) -> None:
        strides.next_batch(prompt)
        calls.next_batch(prompt)

    coupled = Coupled(groups, moments, meter)

    def adding(group: Group) -> Callable[[Tensor], None]:
        if differentiated is not None:
            return coupled.keeping(group)

        def add(x: Tensor) -> None:
            if summed:
                with meter.block(x.shape):
                    moments[group.name].add(x.detach(), weight, live)

        return add

    def before_layer(add: Callable[[Tensor], None]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, args: add(args[0])

    inside = [g for g in groups if blocks is not None and blocks.covers(g.targets[0])]
    outside = [g for g in groups if blocks is None or not blocks.covers(g.targets[0])]
    handles = [network.register_forward_pre_hook(before_network, with_kwargs=True)]
    handles += [g.targets[0].module.register_forward_pre_hook(before_layer(adding(g))) for g in outside]
    of_blocks = blocks.gathering([(g.targets[0], adding(g)) for g in inside]) if blocks is not None else nullcontext()
    try:
        if differentiated is None:
            with (
                of_blocks,
                replay.replaying(meter, summed=lambda: summed) if replay is not None else nullcontext(),
                holding(network, strides),
            ):
                yield moments, next_batch
            return
        for g in groups:
            moments[g.name].gradients = {t.name: Gradients.empty(t.outputs, device) for t in g.targets}
        with (
            gradients.watch(
                network,
                [target for g in groups for target in g.targets],
                lambda found, squares, scale: coupled.add(found, squares, scale, weight if live is None else live),
                differentiated,
                coupled.forget,
                strides,
            ),
            replay.replaying(meter, differentiated=lambda: differentiated.now) if replay is not None else nullcontext(),
            holding(network, strides),
        ):
            yield moments, next_batch
    finally:
        for handle in handles:
            handle.remove()
