"""What there is to say about a run, as plain data: the contents of `report.json`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from compressor.errors import CompressorError


@dataclass(frozen=True)
class ModelFacts:
    """Which network was pruned.

    Attributes:
        source: as in the recipe: `builtin:NAME`, a folder or a hub id.
        pipeline: the diffusers class of the pipeline.
        component: `transformer` or `unet`.
        component_class: the diffusers class of the component.
        family: the table that named its layers.
        dtype: that it was computed in, such as `float32`.

    """

    source: str
    pipeline: str
    component: str
    component_class: str
    family: str
    dtype: str


@dataclass(frozen=True)
class LayerRow:
    """What was done to one linear layer.

    Attributes:
        name: dotted name in the component.
        block: dotted name of its block, a prefix of `name`.
        part: `attention`, `feed_forward` or `adaln`.
        role: `query`, `key`, `value`, `output`, `up`, `down` or `modulation`.
        stream: the token stream that it belongs to.
        pruner: the plugin's name.
        outputs: rows of the weight, as it is now.
        inputs: columns of the weight, as it is now.
        parameters: number of weights before, biases apart.
        removed: how many of them left with heads and neurons.
        asked: how many were to leave or to become zero.
        zeros: how many of those that are left are zero, counted in the stored weight.
        error: ||W X - W' X||^2 / ||W X||^2 over the calibration tokens, or None where none were gathered.
        damping: what was added to the diagonal of the Hessian, relative to its mean; None without one.
        seconds: time spent on this layer.
        notes: what a user should know about this layer.

    """

    name: str
    block: str
    part: str
    role: str
    stream: str
    pruner: str
    outputs: int
    inputs: int
    parameters: int
    removed: int
    asked: int
    zeros: int
    error: float | None = None
    damping: float | None = None
    seconds: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def gone(self) -> int:
        """How many weights left or are zero."""
        return self.removed + self.zeros

    @property
    def sparsity(self) -> float:
        """The share of the weights before that left or are zero."""
        return share(self.gone, self.parameters)

    @property
    def before(self) -> tuple[int, int]:
        """Rows and columns before anything left: an output or down projection loses columns, any other layer rows."""
        if not self.removed:
            return self.outputs, self.inputs
        if self.role in ("output", "down"):
            return self.outputs, self.parameters // self.outputs
        return self.parameters // self.inputs, self.inputs

    @property
    def lost_rows(self) -> bool:
        """Whether outputs left. What those that stayed compute is told by no error of this layer."""
        return self.outputs < self.before[0]


@dataclass(frozen=True)
class GroupSize:
    """The heads or neurons of one attention or feed-forward, before and after some leave.

    Attributes:
        name: such as `transformer_blocks.0.attn.heads`.
        block: dotted name of its block.
        kind: `heads` or `neurons`.
        width: rows of a layer that one of them has: the head dimension, or 1.
        before: how many there are before.
        after: how many there are after.

    """

    name: str
    block: str
    kind: str
    width: int
    before: int
    after: int


@dataclass(frozen=True)
class GroupRow(GroupSize):
    """What was taken out of one attention or feed-forward.

    Attributes:
        removed: indices of those that left, ascending, as they were counted before.
        asked: the share of its kind that the recipe's entry asked for; None if the pruner has no such option, or spread
            the shares over the blocks itself.

    """

    removed: tuple[int, ...]
    asked: float | None = None


@dataclass(frozen=True)
class ProofFacts:
    """That the network without what left computes what it did with the columns that read it zeroed.

    Attributes:
        layer_error: the worst of all layers and blocks, norm of the difference over norm, in float32 or better.
        layer_tolerance: what it may not exceed.
        network_error: of the network's output, in its own dtype.
        network_tolerance: what it may not exceed.

    """

    layer_error: float
    layer_tolerance: float
    network_error: float
    network_tolerance: float


@dataclass(frozen=True)
class Structure:
    """What left the network, and what says that nothing else did.

    Attributes:
        groups: in order of execution.
        overrides: where torch-pruning's dependency graph and the family's table differ, and why the table counts.
        proofs: one for each entry of the recipe that removes.

    """

    groups: tuple[GroupRow, ...]
    overrides: tuple[str, ...]
    proofs: tuple[ProofFacts, ...]


@dataclass(frozen=True)
class Size:
    """How large the component is, at one moment.

    Attributes:
        parameters: all of them, biases and norms included.
        nonzero: those that are not zero.
        operations: multiply-adds of one forward, as a dense kernel does them.
        nonzero_operations: the same, counting only the non-zero weights of linears.
        bytes: of the component's files on disk.

    """

    parameters: int
    nonzero: int
    operations: int
    nonzero_operations: int
    bytes: int


@dataclass(frozen=True)
class Sizes:
    """The component before and after pruning."""

    before: Size
    after: Size


@dataclass(frozen=True)
class PartRow:
    """All linears of one part, pruned or not, or all other parameters: what a share of the network is made of.

    Attributes:
        part: `attention`, `feed_forward`, `adaln`, or `other`: convolutions, embeddings, norms and all biases.
        layers: how many linears; 0 of `other`.
        parameters: before.
        nonzero: how many of them are not zero, before.
        left: how many are there and not zero, after.

    """

    part: str
    layers: int
    parameters: int
    nonzero: int
    left: int

    @property
    def sparsity(self) -> float:
        """The share of the parameters before that left or are zero."""
        return share(self.parameters - self.left, self.parameters)


@dataclass(frozen=True)
class CalibrationFacts:
    """How the layers' inputs were gathered.

    Attributes:
        prompts: how many were sampled.
        steps: inference steps a prompt.
        guidance: classifier-free guidance scale.
        batch: prompts at a time, after backing off for memory.
        packages: into how many groups the layers were cut, each calibrated on the ones before it pruned.
        forwards: forwards of the component, over all packages.
        held: further calls, which got the last output again, as `calibration.stride` says.
        differentiated: forwards with a backward pass, which alone are summed where gradients are gathered.
        tokens: tokens that entered the moments, over all inputs.
        nonfinite: by layer name, how many tokens were skipped because they were not finite; only where any were.

    """

    prompts: int
    steps: int
    guidance: float
    batch: int
    packages: int
    forwards: int
    held: int
    differentiated: int
    tokens: int
    nonfinite: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ExportFacts:
    """What one exporter wrote.

    Attributes:
        exporter: the plugin's name.
        files: bytes by path, relative to the result's folder.
        checks: what was verified, as the exporter put it.
        seconds: time spent.

    """

    exporter: str
    files: dict[str, int]
    checks: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class Report:
    """All facts of one run, serialisable as JSON.

    Attributes:
        recipe: as `Recipe.dump` gives it.
        versions: of Python, of this package and of those that it builds on.
        device: in words.
        model: what was pruned.
        layers: those that changed, in order of execution.
        structure: heads and neurons that left; None if none did.
        parts: of the network, in order of execution, and at last `other`; empty if nothing was pruned.
        sizes: of the component.
        times: seconds by phase: `load`, `encode` (prompts), `measure` (sizes and metrics), `draw`, `forwards` (of the
            calibration, with all else of sampling), `moments` (of the inputs, gathered in them), `solves` (the pruner's
            own work), `check` (what leaves is taken out, and everything is counted), `save` and `export`.
        peak_memory: bytes by kind, such as `cpu_resident` and `gpu_allocated`.
        calibration: None if no pruner asked for one.
        metrics: figures by metric and name; `dense_X` and `pruned_X` are one figure of either pipeline, `X_se` is the
            standard error of `X`.
        exports: in order.
        left_out: layers that stay as they are though the recipe chose them, and why.
        warnings: what the user should know, one sentence each.

    """

    recipe: dict[str, Any]
    versions: dict[str, str]
    device: str
    model: ModelFacts
    layers: tuple[LayerRow, ...]
    sizes: Sizes
    times: dict[str, float]
    peak_memory: dict[str, int]
    structure: Structure | None = None
    parts: tuple[PartRow, ...] = ()
    calibration: CalibrationFacts | None = None
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    exports: tuple[ExportFacts, ...] = ()
    left_out: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def dump(self) -> str:
        """The report as JSON, in the order of the fields above, with the `sparsity` of layers and parts.

        A float that is not finite is written as a string (`"nan"`, `"inf"`), since JSON has no such numbers.
        """
        data = asdict(self)
        for row, found in zip((*data["layers"], *data["parts"]), (*self.layers, *self.parts), strict=True):
            row["sparsity"] = found.sparsity
        return json.dumps(_finite(data), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def share(part: float, whole: float) -> float:
    """`part / whole`, and 0 of nothing."""
    return part / whole if whole else 0.0


def sparsity(rows: Iterable[LayerRow]) -> tuple[float, float]:
    """The share of these layers' weights that were to leave or to become zero, and that did."""
    rows = tuple(rows)
    weights = sum(row.parameters for row in rows)
    return share(sum(row.asked for row in rows), weights), share(sum(row.gone for row in rows), weights)


def read(path: Path) -> Report:
    """Reads a `report.json`.

    Raises:
        CompressorError: if the file is not a report.

    """
    try:
        return TypeAdapter(Report).validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise CompressorError(f"{path}: should be a report of `compressor run`, but {where}: {first['msg']}") from None


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
