"""The training loop that every stage shares: a budget, a learning rate that follows it, averaged weights, checkpoints.

A stage ends when its budget of seconds or of steps is used up, and the learning rate falls to zero exactly then. A
checkpoint holds everything that the next step depends on, so that a run cut short goes on where it stood.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


@dataclass(frozen=True)
class Budget:
    """How long a stage trains: until `seconds` or `steps` are used up, whichever is first."""

    seconds: float = math.inf
    steps: float = math.inf

    def used(self, seconds: float, steps: int) -> float:
        """The part that is used up, from 0 to 1."""
        return min(1.0, max(seconds / self.seconds, steps / self.steps))


@dataclass(frozen=True)
class Rates:
    """How fast a stage learns: AdamW's peak rate, its warm-up in steps, the decay of the averaged weights."""

    peak: float
    warmup: int = 200
    weight_decay: float = 0.01
    average: float = 0.999

    def at(self, step: int, used: float) -> float:
        """The learning rate: a linear warm-up, then a cosine to zero over the budget."""
        return self.peak * min(1.0, (step + 1) / self.warmup) * 0.5 * (1 + math.cos(math.pi * used))


class Log:
    """Writes one JSON object a line to a file, and now and then one to the screen."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, **entry: object) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": round(time.time(), 1), **entry}) + "\n")


def fit(
    stage: str,
    module: nn.Module,
    loss: Callable[[], Tensor],
    *,
    budget: Budget,
    rates: Rates,
    checkpoint: Path,
    log: Log,
    graph: bool = False,
    save_every: float = 60.0,
) -> None:
    """Trains a module in place; afterwards it holds the averaged weights.

    Goes on from the checkpoint if there is one, and returns at once if that one is complete.

    Args:
        stage: Name for the log and the progress bar.
        module: Holds every weight that is trained; its device is used.
        loss: Draws a batch from the global random generators and returns the loss, a scalar.
        budget: When to stop.
        rates: How to learn.
        checkpoint: Safetensors file that is written from time to time and at the end.
        log: Takes the losses.
        graph: Replay one captured CUDA graph a step, random numbers and optimiser included. The loss must then read
            and write nothing outside the device.
        save_every: Seconds between checkpoints.
    """
    weights = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
    parameters = list(weights.values())
    on_gpu = parameters[0].is_cuda
    average = [weight.detach().clone() for weight in parameters]
    rate = torch.tensor(rates.peak, device=parameters[0].device) if on_gpu else rates.peak
    optimizer = torch.optim.AdamW(
        parameters, lr=rate, betas=(0.9, 0.99), weight_decay=rates.weight_decay, fused=on_gpu, capturable=on_gpu
    )
    state = _State(weights, average, optimizer)
    if checkpoint.exists():
        state.load(checkpoint)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            for mean, weight in zip(average, parameters, strict=True):
                mean.lerp_(weight, 1 - rates.average)
        return value.detach()

    module.train()
    replay: Callable[[], Tensor] | None = None
    began, saved = time.monotonic() - state.seconds, time.monotonic()
    percent = TextColumn("{task.percentage:3.0f}%")
    columns = (TextColumn("{task.description}"), BarColumn(), percent, TimeRemainingColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task(stage, total=1.0)
        while (used := budget.used(state.seconds, state.steps)) < 1.0:
            _set_rate(optimizer, rates.at(state.steps, used))
            if graph and on_gpu and replay is None and state.steps >= 5:
                replay = _capture(step)
                state.steps += 1
            value = replay() if replay else step()
            state.steps += 1
            state.seconds = time.monotonic() - began
            if state.steps % 100 == 0 or state.steps < 4:
                shown = value.item()  # waits for the device, so the clock stays honest
                state.seconds = time.monotonic() - began
                log(stage=stage, step=state.steps, seconds=round(state.seconds, 1), loss=shown)
                progress.update(bar, completed=used, description=f"{stage} loss {shown:.4f}")
                if not math.isfinite(shown):
                    raise FloatingPointError(f"{stage}: the loss is {shown} at step {state.steps}")
            if time.monotonic() - saved > save_every:
                state.save(checkpoint)
                saved = time.monotonic()
    state.save(checkpoint)
    with torch.no_grad():
        for mean, weight in zip(average, parameters, strict=True):
            weight.copy_(mean)
    module.eval()


class _State:
    """Everything that the next step depends on."""

    def __init__(
        self, weights: dict[str, nn.Parameter], average: list[Tensor], optimizer: torch.optim.Optimizer
    ) -> None:
        self.steps, self.seconds = 0, 0.0
        self._weights, self._average, self._optimizer = weights, average, optimizer

    def save(self, path: Path) -> None:
        moments = self._optimizer.state
        tensors = {"random.cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            tensors["random.cuda"] = torch.cuda.get_rng_state()
        for (name, weight), average in zip(self._weights.items(), self._average, strict=True):
            tensors |= {f"weight.{name}": weight.detach(), f"average.{name}": average}
            tensors |= {f"{key}.{name}": value for key, value in moments[weight].items()}
        tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file(tensors, partial, metadata={"steps": str(self.steps), "seconds": str(self.seconds)})
        partial.replace(path)

    def load(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            metadata, held = file.metadata(), set(file.keys())
            self.steps, self.seconds = int(metadata["steps"]), float(metadata["seconds"])
            moments: dict[int, dict[str, Tensor]] = {}
            with torch.no_grad():
                for index, (name, weight) in enumerate(self._weights.items()):
                    weight.copy_(file.get_tensor(f"weight.{name}"))
                    self._average[index].copy_(file.get_tensor(f"average.{name}"))
                    keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in held]
                    if keys:
                        moments[index] = {key: file.get_tensor(f"{key}.{name}") for key in keys}
            groups = self._optimizer.state_dict()["param_groups"]
            self._optimizer.load_state_dict({"state": moments, "param_groups": groups})
            torch.set_rng_state(file.get_tensor("random.cpu"))
            if torch.cuda.is_available() and "random.cuda" in held:
                torch.cuda.set_rng_state(file.get_tensor("random.cuda"))


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def _capture(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Takes one step on a side stream, as recording wants it, and records the next as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        value = step()

    def replay() -> Tensor:
        recorded.replay()
        return value

    return replay
