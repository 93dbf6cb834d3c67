"""Samples the pipeline on prompts and gathers the moments that pruners ask for."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from compressor.calibration import gathering, gradients, kernels, replay, sampling
from compressor.calibration.calls import Calls
from compressor.calibration.compiled import Blocks
from compressor.calibration.curvature import Gradients
from compressor.calibration.foretold import foretell, foretell_sampling
from compressor.calibration.gradients import Differentiated
from compressor.calibration.moments import Moments
from compressor.calibration.noise import adds_noise
from compressor.calibration.packages import Group, Package, Workspace, cut, deal
from compressor.calibration.replay import Replay
from compressor.calibration.steps import StepCounter
from compressor.calibration.strides import Strides, first_runs, mean_runs, stride_of
from compressor.calibration.timing import Meter
from compressor.errors import CompressorError
from compressor.pipeline import Pipeline
from compressor.plugin import MomentKind, Schedule, Weighting
from compressor.progress import Progress
from compressor.ranks import ALONE, Ranks
from compressor.recipe import Calibration as Options
from compressor.structure import Target, Trace

T = TypeVar("T")

__all__ = ["Calibration", "Facts", "Gradients", "Group", "Moments", "Package", "StepCounter"]


@dataclass
class Facts:
    """What a calibration did, for the report.

    Attributes:
        prompts: how many are sampled.
        forwards: calls that the network ran.
        held: calls that were held, and got its last output again.
        differentiated: forwards with a backward pass, which alone are summed where gradients are gathered.
        tokens: tokens summed, over all groups.
        skipped: layers whose input had tokens that were not finite, and how many.
        batch: prompts at a time, after any halving.
        packages: passes made.
        seconds: time spent sampling, moments included.
        moment_seconds: time spent adding to moments; on a GPU that of some forwards, which stand for all.
        moment_bytes: the most that the moments of one pass took.
        warnings: what a user should know.
    """

    prompts: int = 0
    forwards: int = 0
    held: int = 0
    differentiated: int = 0
    tokens: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    batch: int = 0
    packages: int = 0
    seconds: float = 0.0
    moment_seconds: float = 0.0
    moment_bytes: int = 0
    warnings: list[str] = field(default_factory=list)


class Calibration:
    """The pipeline, its prompts and their noise, ready to be sampled once for each package.

    Attributes:
        facts: what was done so far, by all processes together.
        owners: where several processes share the layers, the rank that prunes each, by name.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        trace: Trace,
        options: Options,
        prompts: Sequence[str],
        seed: int,
        progress: Progress,
        ranks: Ranks = ALONE,
    ) -> None:
        self._pipeline = pipeline
        self._trace = trace
        self._options = options
        self._progress = progress
        self._seed = seed
        self._settings = sampling.Settings(options.steps, options.guidance, options.height, options.width)
        self._prompts = len(prompts)
        self._noisy = adds_noise(pipeline.pipe.scheduler, options.steps)
        self._stride = stride_of(options, self._prompts, self._noisy)
        self._ranks = ranks
        if self._prompts < ranks.count:
            raise CompressorError(
                f"calibration: there should be a prompt for each of {ranks.count} processes, found {self._prompts}; "
                "start fewer processes"
            )
        starts = range(0, self._prompts, options.batch)  # whole batches are dealt, so that each is as it would be alone
        self._places = [
            i for start in ranks.mine(starts) for i in range(start, min(start + options.batch, self._prompts))
        ]
        self._encoded = sampling.encode(
            pipeline, prompts, options.guidance, seed, "calibration", options.max_sequence_length, self._places
        )
        self._blocks = Blocks(pipeline.module, pipeline.family, trace) if options.compile else None
        self._replay: Replay | None = None
        self._changing: list[tuple[Target, int]] = []
        self.owners: dict[str, int] = {}
        self.start_over()

    def start_over(self) -> None:
        """Forgets what was done so far: the facts begin anew, and a halved batch is tried at its full size again."""
        options, prompts = self._options, self._prompts
        runs = mean_runs(options.steps, self._stride)
        self._differentiated = Differentiated(gradients.share_of(prompts, runs, options.tokens))
        self._replay = None
        self.facts = Facts(prompts=prompts, batch=options.batch)
        if prompts < options.samples and "samples" in options.model_fields_set:
            self.warn(f"calibration.samples asks for {options.samples} prompts and there are {prompts}; all were used")
        for note in foretell_sampling(prompts, options, self._pipeline.pipe.scheduler, self._noisy):
            self.warn(note)
        slow = kernels.note(self._pipeline.device, self._pipeline.dtype)
        if slow is not None:
            self.warn(slow)
        if options.cuda_graphs:
            module, device, dtype = self._pipeline.module, self._pipeline.device, self._pipeline.dtype
            reason = replay.obstacle(module, device, dtype)
            if reason is None:
                self._replay = Replay(module)
            elif "cuda_graphs" in options.model_fields_set:
                self.warn(f"calibration.cuda_graphs has no effect: {reason}")
        batches = math.ceil(prompts / options.batch)
        if batches < self._ranks.count:
            self.warn(
                f"{self._ranks.count} processes share {batches} batches of up to {options.batch} prompts: some have "
                "nothing to sample; a smaller calibration.batch would give all of them some"
            )

    def packages(
        self,
        targets: Iterable[Target],
        kind: MomentKind,
        workspace: Workspace,
        *,
        deal_out: bool = False,
    ) -> tuple[Package, ...]:
        """Cuts layers into packages as the recipe says, and warns of those that will see too few tokens.

        Args:
            targets: in order of execution.
            kind: which moments will be collected.
            workspace: the pruner's: it counts towards the recipe's `memory`.
            deal_out: where several processes share the job, each is given layers of its own in every package; a pruner
                may ask for it that looks at one unit of layers at a time. Else each prunes all, as rank 0 does.

        Raises:
            CompressorError: if they cannot be cut so.
        """
        targets = tuple(targets)
        packages = cut(targets, self._trace, kind, self._options.packages, self._options.memory, workspace)
        self.owners = {}
        guided = sampling.guided(self._pipeline.folder, self._options.guidance)
        for note in foretell(targets, self._trace, kind, self._prompts, guided, self._options, self._stride):
            self.warn(note)
        if deal_out and self._ranks.count > 1:
            packages = tuple(deal(package, self._ranks.rank, self._ranks.count) for package in packages)
            self.owners = {
                target.name: owner
                for package in packages
                for group, owner in zip(package.every, package.owners, strict=True)
                for target in group.targets
            }
        return packages

    @torch.no_grad()
    def collect(self, package: Package, kind: MomentKind, weighting: Weighting) -> dict[str, Moments]:
        """Samples every prompt once, on the network as it is now, and sums the inputs of the package's layers.

        Args:
            package: the layers.
            kind: `norms`; `second` for the full second moment as well; `gradients` for that and for the second
                moments of the gradients at the layers' outputs, both of a share of the network's calls, and with tokens
                that count as `influence` says.
            weighting: how much each step counts.

        Returns:
            Moments by the name of the group.

        Raises:
            CompressorError: if a layer was fed nothing finite, or memory runs out even for one prompt.
        """
        if self._pipeline.device.type == "cuda":
            torch.cuda.synchronize(self._pipeline.device)  # what the pruner has left to do is not sampling
        self._exchange()
        start = time.perf_counter()
        facts = self.facts
        counted = facts.forwards, facts.held, facts.differentiated
        before = self._differentiated.count
        meter = Meter(self._pipeline.device)
        while True:
            try:
                moments = self._sample(package, kind, weighting, meter)
                break
            except RuntimeError as error:
                if not sampling.out_of_memory(error):
                    raise
                if self._replay is not None and self._replay.give_up("memory ran out beside what was recorded"):
                    continue  # what was recorded goes before the batch does
                self._halve_batch(package, error)
        self._tell_of_replays()
        self._share(package, moments)
        facts.differentiated += self._differentiated.count - before
        self._settle(counted)
        facts.packages += 1
        facts.seconds += time.perf_counter() - start
        facts.moment_seconds += meter.seconds
        facts.moment_bytes = max(facts.moment_bytes, package.moment_bytes)
        for group in package.every or package.groups:
            self._account(group, moments[group.name])
        return {group.name: moments[group.name] for group in package.groups}

    def gather(self, thing: T) -> list[T]:
        """What each of the processes that share the job has found, for pruners that weigh layers against each other.

        Args:
            thing: plain data or tensors on the CPU.

        Returns:
            What every process gave, in the same order for all; `[thing]` where there is one process.
        """
        return self._ranks.gather(thing)

    def _exchange(self) -> None:
        """Brings what other processes have made of the package before; where it was not dealt out, what rank 0 has."""
        if self._changing:
            self._ranks.meet()
            for target, owner in self._changing:
                self._ranks.send(target.module, owner)
            self._changing.clear()

    def _share(self, package: Package, moments: dict[str, Moments]) -> None:
        """Sums the moments over all processes; the large ones for whoever needs them, and in place."""
        if self._ranks.count == 1:
            return
        self._ranks.meet()
        groups = package.every or package.groups
        for group, owner in zip(groups, package.owners or (None,) * len(groups), strict=True):
            found = moments[group.name]
            counts = [count for each in (found, *found.gradients.values()) for count in (each.tokens, each.skipped)]
            for tensor in (found.squares_I, found.total_I, found.weight, *counts):
                self._ranks.add(tensor)
            for large in (found.second_II, *(each.second_BKK for each in found.gradients.values())):
                if large is not None:
                    self._ranks.add(large, owner)
            if owner not in (None, self._ranks.rank):
                found.second_II = None
                found.gradients.clear()
            self._changing += [(target, owner or 0) for target in group.targets]

    def _settle(self, before: tuple[int, int, int]) -> None:
        """Counts what all processes did together since there were so many calls run, held, differentiated."""
        if self._ranks.count == 1:
            return
        facts = self.facts
        now = facts.forwards, facts.held, facts.differentiated
        found = self._ranks.gather((*(n - b for n, b in zip(now, before, strict=True)), facts.batch))
        *done, batches = zip(*found, strict=True)
        facts.forwards, facts.held, facts.differentiated = (b + sum(each) for b, each in zip(before, done, strict=True))
        batch = min(batches)
        if batch < facts.batch:
            self.warn(f"memory ran out for another process: calibration goes on with a batch of {batch}")
        facts.batch = batch

    def _sample(self, package: Package, kind: MomentKind, weighting: Weighting, meter: Meter) -> dict[str, Moments]:
        options, batch = self._options, self.facts.batch
        title = f"calibrating, package {package.number} of {package.count}"
        strides = Strides(self._stride, batch)
        if kind == "gradients":
            calls = self._differentiated
        else:
            calls = Calls(options.tokens, self._seed, first_runs(options.steps, self._stride), batch, self._stride)
        try:
            with (
                gathering.watch(
                    self._pipeline.module,
                    package,
                    kind,
                    self._weigher(weighting),
                    strides,
                    calls,
                    meter,
                    self._blocks,
                    self._replay,
                ) as (moments, next_batch),
                self._progress.task(title, total=len(self._encoded)) as advance,
            ):
                for start in range(0, len(self._encoded), batch):
                    prompts = self._encoded[start : start + batch]
                    next_batch(self._places[start])
                    sampling.sample(self._pipeline, prompts, self._settings, "latent")
                    meter.settle()
                    advance(len(prompts))
        finally:
            self.facts.forwards += strides.ran
            self.facts.held += strides.held
        return {name: m.finish() for name, m in moments.items()}

    def _weigher(self, weighting: Weighting) -> Callable[[Tensor | float], tuple[int, float]]:
        """Tells the step of a call, and what it counts."""
        counter: StepCounter | None = None
        weights: tuple[float, ...] = ()

        def weigh(timestep: Tensor | float) -> tuple[int, float]:
            nonlocal counter, weights
            if counter is None:
                scheduler = self._pipeline.pipe.scheduler
                training = scheduler.config.get("num_train_timesteps", 1000)
                counter = StepCounter(scheduler.timesteps, training)
                weights = weighting.weights(Schedule(counter.timesteps, copy.deepcopy(scheduler)))
                assert len(weights) == counter.steps, f"{len(weights)} weights for {counter.steps} steps"
            step = counter.step(timestep)
            return step, weights[step]

        return weigh

    def warn(self, text: str) -> None:
        """Tells the user at once, and again in the report."""
        self.facts.warnings.append(text)
        self._progress.say(f"warning: {text}")

    def _tell_of_replays(self) -> None:
        if self._replay is None:
            return
        why = "were not replayed by CUDA graphs, which would be faster"
        if self._replay.problem is not None:
            self.warn(f"forwards {why}: {self._replay.problem}")
            self._replay = None
        elif self._replay.problem_of_differentiated is not None:
            text = f"forwards that are differentiated {why}: {self._replay.problem_of_differentiated}"
            if text not in self.facts.warnings:
                self.warn(text)

    def _halve_batch(self, package: Package, error: RuntimeError) -> None:
        if self.facts.batch == 1:
            raise CompressorError(
                f"out of memory with a single prompt and {package.moment_bytes:,} bytes of moments: give "
                "calibration.memory less than is free (or more packages), a smaller height and width, or float16 as "
                "model.dtype"
            ) from error
        self.facts.batch //= 2
        self.warn(f"memory ran out: calibration goes on with a batch of {self.facts.batch}")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _account(self, group: Group, moments: Moments) -> None:
        tokens, skipped = int(moments.tokens), int(moments.skipped)
        if tokens == 0:
            raise CompressorError(
                f"{group.name}: none of the {skipped} tokens that reached it was finite; compute in float32 or "
                "bfloat16 (model.dtype)"
            )
        self.facts.tokens += tokens
        if skipped:
            self.facts.skipped[group.name] = skipped
            self.warn(
                f"{group.name}: {skipped} of {tokens + skipped} tokens were not finite and were left out of its moments"
            )
