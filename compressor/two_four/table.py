"""The table of `compressor probe`: what 2:4 gained on one GPU, for each shape of linear layers."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from compressor.errors import CompressorError
from compressor.output import write_whole

FORMAT = 1

COLUMNS = ("model", "batch", "tokens x inputs x outputs", "layers", "dense", "2:4", "ratio", "spread", "error")


@dataclass(frozen=True)
class Row:
    """One shape, timed dense and 2:4 in turns.

    Attributes:
        model: whose layers have it.
        batch: samples of one forward of the network.
        tokens: rows of the layer's input, of all samples together.
        inputs: columns of the weight.
        outputs: rows of the weight.
        layers: how many layers of the model have it.
        example: the name of the first of them.
        dense: seconds of one dense product, a figure for each turn.
        sparse: seconds of the 2:4 product in the same turns; empty where there is none.
        algorithm: cuSPARSELt's number of the fastest kernel, how often it splits the inputs, and the way of splitting.
        error: relative L2 difference of the 2:4 product from the dense one of the same weights.
        note: why there is no 2:4 product.
    """

    model: str
    batch: int
    tokens: int
    inputs: int
    outputs: int
    layers: int
    example: str
    dense: tuple[float, ...]
    sparse: tuple[float, ...] = ()
    algorithm: tuple[int, int, int] | None = None
    error: float | None = None
    note: str = ""

    @property
    def shape(self) -> str:
        """In words: tokens x inputs x outputs."""
        return f"{self.tokens} x {self.inputs} x {self.outputs}"

    @property
    def ratio(self) -> float | None:
        """How many times as fast 2:4 is, by medians; None where there is no 2:4 product."""
        return statistics.median(self.dense) / statistics.median(self.sparse) if self.sparse else None

    @property
    def spread(self) -> tuple[float, float] | None:
        """The lowest and the highest ratio of a single turn."""
        if not self.sparse:
            return None
        ratios = [dense / sparse for dense, sparse in zip(self.dense, self.sparse, strict=True)]
        return min(ratios), max(ratios)


@dataclass(frozen=True)
class Table:
    """What was measured on one GPU.

    Attributes:
        command: that measured it.
        device: the GPU in words.
        dtype: of weights and inputs.
        size: pixels of an image, either way.
        versions: of Python, packages and cuSPARSELt.
        rows: in order of measuring.
        format: of the file.
    """

    command: str
    device: str
    dtype: str
    size: int
    versions: dict[str, str]
    rows: tuple[Row, ...]
    format: int = FORMAT

    @property
    def batches(self) -> tuple[int, ...]:
        """The numbers of samples that were measured, ascending."""
        return tuple(sorted({row.batch for row in self.rows}))

    def find(self, tokens: int, inputs: int, outputs: int) -> Row | None:
        """The row of a shape, whichever model it was measured for."""
        wanted = tokens, inputs, outputs
        return next((row for row in self.rows if (row.tokens, row.inputs, row.outputs) == wanted), None)


def read(file: str | Path) -> Table:
    """Reads a table.

    Raises:
        CompressorError: if there is none, or it is no such table.
    """
    path = Path(file)
    try:
        found = TypeAdapter(Table).validate_json(path.read_bytes())
    except FileNotFoundError:
        raise CompressorError(
            f"{path}: no such table of what 2:4 gains; `compressor probe RECIPE --output {path}` measures it on a GPU"
        ) from None
    except OSError as error:
        raise CompressorError(f"{path}: should be a table of `compressor probe`, but: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise CompressorError(f"{path}: should be a table of `compressor probe`, but {where}: {first['msg']}") from None
    if found.format != FORMAT:
        raise CompressorError(f"{path}: should be of format {FORMAT}, found {found.format}; measure it again")
    return found


def write(table: Table, file: Path) -> None:
    """Writes a table in one step, with the ratios beside the times."""
    data = asdict(table)
    for entry, row in zip(data["rows"], table.rows, strict=True):
        entry["ratio"], entry["spread"] = row.ratio, row.spread
    write_whole(file, json.dumps(data, indent=1) + "\n")


def as_text(table: Table) -> str:
    """A Markdown table, with what it was measured on above it."""
    versions = ", ".join(f"{name} {table.versions[name]}" for name in ("torch", "cusparselt") if name in table.versions)
    lines = [
        f"{table.device}; {versions}",
        f"{table.size} x {table.size} pixels, {table.dtype}; batch is samples of one forward of the network: with "
        "classifier-free guidance an image takes two",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|{' --- |' * len(COLUMNS)}",
        *(f"| {' | '.join(_cells(row))} |" for row in table.rows),
        *(f"{row.shape}: no 2:4 product: {row.note}" for row in table.rows if row.note),
    ]
    return "\n".join(lines) + "\n"


def _cells(row: Row) -> tuple[str, ...]:
    first = (row.model, str(row.batch), row.shape, str(row.layers), _microseconds(row.dense))
    if row.ratio is None or row.spread is None:
        return (*first, "-", "-", "-", "-")
    low, high = row.spread
    return (*first, _microseconds(row.sparse), f"{row.ratio:.2f}x", f"{low:.2f} to {high:.2f}", f"{row.error:.1e}")


def _microseconds(seconds: tuple[float, ...]) -> str:
    return f"{1e6 * statistics.median(seconds):.1f} µs"
