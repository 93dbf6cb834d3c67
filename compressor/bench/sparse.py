"""Benchmark `sparse`: a whole network's forward, dense against 2:4 in those layers that gain by it."""

from __future__ import annotations

import copy
import json
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor import registry
from compressor.bench import forwards, models, networks, probe, results
from compressor.bench.forwards import Extent
from compressor.bench.models import KnownModel
from compressor.bench.settings import check_size
from compressor.bench.timing import Times, in_turns
from compressor.errors import CompressorError
from compressor.output import write_whole
from compressor.pipeline import pick_device
from compressor.progress import Progress
from compressor.sparsity import lowest_of_groups
from compressor.structure import Family, find_targets, many_shapes
from compressor.two_four import layers, product
from compressor.two_four.choice import Measuring
from compressor.units import several

COLUMNS = ("model", "batch", "2:4 layers", "their operations", "dense", "2:4", "ratio", "error")

TOLERANCE = 5e-2
"""The largest relative L2 difference of a network's output, 2:4 products against dense ones of the same weights."""


@dataclass(frozen=True)
class Settings:
    """What is to be timed.

    Attributes:
        models: names of known models.
        size: height and width of the pictures in pixels.
        batches: samples of one forward.
        layers: shorten each part of the network to so many; None for all.
        dtype: `bfloat16`.
        faster: layers whose 2:4 product is at least so many times as fast as the dense one are converted.
        extent: what torch compiles in one piece, dense and 2:4 alike, or `no`.
        device: `auto`, `cuda`, ...
        repeats: turns of dense and 2:4.
    """

    models: tuple[str, ...]
    size: int = 1024
    batches: tuple[int, ...] = (1,)
    layers: int | None = None
    dtype: str = "bfloat16"
    faster: float = 1.02
    extent: Extent | str = "blocks"
    device: str = "auto"
    repeats: int = 20


@dataclass(frozen=True)
class Row:
    """One network at one batch.

    Attributes:
        model: its name.
        batch: samples of a forward.
        converted: shapes of the layers that ran 2:4, each with the number of them.
        linears: layers that could have been pruned.
        share: of the multiply-adds of a forward that the converted layers do.
        error: relative L2 difference of the outputs, with 2:4 products and with dense ones of the same weights.
        dense: times of the dense network.
        sparse: times of the same network with 2:4 layers, in the same turns; none if no layer gained.
    """

    model: str
    batch: int
    converted: dict[str, int]
    linears: int
    share: float
    error: float | None
    dense: Times
    sparse: Times | None

    @property
    def ratio(self) -> float | None:
        """How many times as fast as dense."""
        return self.dense.median / self.sparse.median if self.sparse else None


def run(settings: Settings, progress: Progress, output: Path | None) -> str:
    """Builds each network, converts the layers that gain, and times both in turns.

    Args:
        settings: what to time.
        progress: told of every shape and every row.
        output: a JSON file, written anew after every row.

    Returns:
        The table.

    Raises:
        CompressorError: if there is no GPU or no cuSPARSELt, or the 2:4 network computes something else.
    """
    if not settings.models:
        raise CompressorError(f"should name at least one model; known: {models.known()}")
    found = [models.find(name) for name in dict.fromkeys(settings.models)]
    for model in found:
        check_size(model, settings.size)
    device = pick_device(settings.device)
    product.check("bench sparse", device)
    if output is not None:
        results.claim(output)
    rows: list[Row] = []
    with many_shapes():
        for model in found:
            for row in _timed(model, settings, device, progress):
                rows.append(row)
                progress.say(" | ".join(_cells(row)))
                if output is not None:
                    write_whole(output, as_json(settings, device, rows))
    return as_text(settings, device, rows)


def prune(network: nn.Module, names: Collection[str]) -> dict[str, layers.TwoFourLinear]:
    """Zeroes the 2 smallest of every 4 weights of these layers, in copies of the weights, and puts 2:4 layers there.

    Args:
        network: shares its weights with the dense one, whose are not changed.
        names: of linears.
    """
    for name in names:
        linear: Any = network.get_submodule(name)
        weight_OI = linear.weight.data
        kept = weight_OI.masked_fill(lowest_of_groups(weight_OI.float().abs(), 2, 4), 0)
        linear.weight = nn.Parameter(kept, requires_grad=False)
    return layers.replace(network, names)


def _timed(model: KnownModel, settings: Settings, device: torch.device, progress: Progress) -> Iterator[Row]:
    family: Family = registry.load("family", model.family)
    dtype = getattr(torch, settings.dtype)
    dense = networks.build(model, family, settings.layers, device, dtype)
    targets = find_targets(dense, family)
    decide = Measuring(dtype, device, settings.faster, progress.say)
    seen = networks.trace_of(
        model,
        family,
        networks.build(model, family, settings.layers, torch.device("meta"), torch.float32),
        settings.size,
    )
    for batch in dict.fromkeys(settings.batches):
        tokens = {target.name: batch * seen.tokens[target.name] for target in targets}
        gaining = {
            target.name
            for target in targets
            if decide(tokens[target.name], target.inputs, target.outputs, target.module.bias is not None)
        }
        torch.cuda.empty_cache()
        given = networks.inputs(model, family, dense, batch, settings.size)
        calls = {"dense": _forward(dense, family, settings, given, device)}
        shapes: Counter[str] = Counter()
        error = None
        if gaining:
            sparse = share_weights(dense)
            placed = prune(sparse, gaining)
            right = _output(sparse, given)
            chosen = layers.decide_all(placed, {name: tokens[name] for name in gaining}, decide)
            error = product.difference(_output(sparse, given), right)
            if not error <= TOLERANCE:
                raise CompressorError(
                    f"{model.name}: the 2:4 network's output is off by {error:.1e}, should be at most {TOLERANCE:.0e}"
                )
            del right
            shapes = Counter(chosen.values())
            calls["sparse"] = _forward(sparse, family, settings, given, device)
        times = in_turns(calls, settings.repeats, 4, 3, device)
        yield Row(
            model.name,
            batch,
            dict(shapes),
            len(targets),
            sum(seen.macs_of[name] for name in gaining) / seen.macs,
            error,
            times["dense"],
            times.get("sparse"),
        )
        calls.clear()
        sparse = placed = None
        networks.free_memory()


def share_weights(network: nn.Module) -> nn.Module:
    """A copy of the network around the same weights."""
    return copy.deepcopy(network, {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())})


def _forward(
    network: nn.Module, family: Family, settings: Settings, given: Any, device: torch.device
) -> Callable[[], object]:
    """Compiled as the settings say, and recorded as a CUDA graph."""
    if settings.extent == "no":
        call = forwards.eager(network, given)
    else:
        call = forwards.compiled(network, family, settings.extent, given)  # pyright: ignore[reportArgumentType]
    return product.record(call, device)


def _output(network: nn.Module, given: Any) -> Tensor:
    return forwards.eager(network, given)()[0]


def as_text(settings: Settings, device: torch.device, rows: list[Row]) -> str:
    """A Markdown table, with what it was measured on above it."""
    versions = probe.versions()
    shortened = "" if settings.layers is None else f", shortened to {several(settings.layers, 'layer')} a part"
    compiled = "not compiled" if settings.extent == "no" else f"torch.compile by {settings.extent}"
    lines = [
        f"{product.gpu(device)}; torch {versions['torch']}, cusparselt {versions['cusparselt']}",
        f"{settings.size} x {settings.size} pixels, {settings.dtype}{shortened}; random weights; both {compiled} and "
        f"in a CUDA graph; layers that gain {settings.faster}x or more by themselves are 2:4; medians of "
        f"{several(settings.repeats, 'turn')}, 4 forwards in a row",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|{' --- |' * len(COLUMNS)}",
        *(f"| {' | '.join(_cells(row))} |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def as_json(settings: Settings, device: torch.device, rows: list[Row]) -> str:
    """Everything: settings, versions, every timed forward."""
    data = {
        "benchmark": "sparse",
        "command": " ".join(["compressor", *sys.argv[1:]]),
        "settings": asdict(settings),
        "device": product.gpu(device),
        "versions": probe.versions(),
        "rows": [{**asdict(row), "ratio": row.ratio} for row in rows],
    }
    return json.dumps(data, indent=1) + "\n"


def _cells(row: Row) -> tuple[str, ...]:
    first = (
        row.model,
        str(row.batch),
        f"{sum(row.converted.values())} of {row.linears}",
        f"{100 * row.share:.0f} %",
        f"{1000 * row.dense.median:.2f} ms",
    )
    if row.sparse is None:
        return (*first, "-", "no layer gains", "-")
    return (*first, f"{1000 * row.sparse.median:.2f} ms", f"{row.ratio:.2f}x", f"{row.error:.1e}")
