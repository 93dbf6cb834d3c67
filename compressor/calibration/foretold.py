"""What a user should know of a calibration before it begins."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Any

from compressor.calibration import gradients
from compressor.calibration.noise import explain_stride
from compressor.calibration.strides import mean_runs
from compressor.plugin import MomentKind
from compressor.recipe import Calibration as Options
from compressor.structure import Target, Trace


def foretell_sampling(prompts: int, options: Options, scheduler: Any, noisy: bool | None) -> Iterator[str]:
    """Warnings of how prompts are sampled, as `plan` and `run` tell them.

    Args:
        prompts: how many.
        options: steps, stride and batch.
        scheduler: diffusers' own.
        noisy: whether it adds noise; None if that is unknown.
    """
    for note in (explain_stride(options, prompts, scheduler, noisy), explain_batches(options, prompts)):
        if note is not None:
            yield note


def foretell(
    targets: Sequence[Target], trace: Trace, kind: MomentKind, prompts: int, guided: bool, options: Options, stride: int
) -> Iterator[str]:
    """Warnings of what layers see, as `plan` and `run` tell them.

    Args:
        targets: the layers.
        trace: tells the tokens of each.
        kind: which moments are collected.
        prompts: how many are sampled.
        guided: whether every prompt is joined by the empty one.
        options: steps, tokens and batch.
        stride: in how many steps the network runs once.
    """
    runs = mean_runs(options.steps, stride)
    if kind in ("second", "gradients"):
        note = explain_rank(targets, trace, kind, prompts, runs, guided, options.tokens, options.batch)
        if note is not None:
            yield note
    if kind == "gradients" and (note := explain_share(options, prompts, runs)) is not None:
        yield note


def explain_batches(options: Options, prompts: int) -> str | None:
    """A warning if there are steps at which no batch runs, or None."""
    batches = math.ceil(prompts / options.batch)
    if options.stride is None or batches >= options.stride:
        return None
    seen = sum(step % options.stride < batches for step in range(options.steps))
    return (
        f"calibration.stride: with {'a single batch' if batches == 1 else f'{batches} batches'} of prompts the network "
        f"runs at {seen} of {options.steps} steps and never at the others; a smaller calibration.batch would make more"
    )


def explain_rank(
    targets: Sequence[Target],
    trace: Trace,
    kind: MomentKind,
    prompts: int,
    steps: float,
    guided: bool,
    share: float = 1.0,
    batch: int = 1,
) -> str | None:
    """A warning if some layers see fewer distinct tokens than they have inputs, or None.

    An input that is an argument of the network's forward, such as the prompt's embedding, is the same at every step. An
    adaLN linear's is made of the timestep and of the prompt, so that of the empty prompt is the same for all samples.

    Args:
        targets: the layers.
        trace: tells the tokens of each.
        kind: which moments are collected; with `gradients`, inputs are summed in few of the calls.
        prompts: how many are sampled.
        steps: of a prompt, at which the network runs; their mean.
        guided: whether every prompt is joined by the empty one, which is the same for all of them.
        share: of the calls that are summed, at the most.
        batch: prompts of the first batch, of which at least one call is.
    """
    copies = 2 if guided else 1

    def tokens_of(target: Target, prompts: int) -> float:
        first = min(batch, prompts)
        if kind == "gradients":
            called = max(prompts * steps * gradients.share_of(prompts, steps, share), first) / prompts
        else:
            called = (first * max(steps * share, 1) + (prompts - first) * steps * share) / prompts
        constant = target.name in trace.constant
        alone = constant or target.layer.part == "adaln"  # of the noise, so that all empty prompts give the same
        texts = prompts + copies - 1 if alone else prompts * copies
        return texts * trace.tokens[target.name] * (min(called, 1.0) if constant else called)

    short = [target for target in targets if tokens_of(target, prompts) < target.inputs]
    if not short:
        return None
    worst = min(short, key=lambda target: tokens_of(target, prompts) / target.inputs)
    enough = bisect_left(range(10**12), worst.inputs, lo=prompts + 1, key=lambda count: tokens_of(worst, count))
    return (
        f"{len(short)} of {len(targets)} layers see fewer distinct tokens than they have inputs, so that damping "
        f"decides: {worst.name} sees {round(tokens_of(worst, prompts))} for {worst.inputs} inputs; about "
        f"{enough} prompts would do"
    )


def explain_share(options: Options, prompts: int, runs: float) -> str | None:
    """A warning if gradients are gathered and a share of the tokens is asked for that changes nothing, or None.

    Args:
        options: the share.
        prompts: how many are sampled.
        runs: of the network for each; their mean.
    """
    share = gradients.share_of(prompts, runs, 1.0)
    if options.tokens == 1 or options.tokens < share:
        return None
    return (
        f"calibration.tokens has no effect: gradients are gathered, for which {100 * share:.3g} % of the forwards are "
        "differentiated, and no others are summed; less than that would have one"
    )
