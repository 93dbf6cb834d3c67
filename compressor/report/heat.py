"""Heat maps: a row for each block, a column for each of its linears or groups, a colour for the value."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from compressor import units
from compressor.report.facts import GroupRow, LayerRow, share


@dataclass(frozen=True)
class Paint:
    """Background and text colours, as `#rrggbb`, on a light page and on a dark one."""

    light: str
    light_text: str
    dark: str
    dark_text: str


@dataclass(frozen=True)
class Cell:
    """One layer or group: the text in the cell, what pointing at it shows, its colours (None: nothing to colour)."""

    text: str
    title: str
    paint: Paint | None


@dataclass(frozen=True)
class Column:
    """One linear or group of a block: its name inside the block, its header, and that of the columns it stands with."""

    suffix: str
    title: str
    group: str


@dataclass(frozen=True)
class Line:
    """One block: its name, a short form of it, and a cell for each column (None: the block has none there)."""

    block: str
    label: str
    cells: tuple[Cell | None, ...]


@dataclass(frozen=True)
class Table:
    """Blocks of one kind.

    Attributes:
        groups: header cells above the columns, each with the number of columns that it spans.
        columns: in order of execution within each group.
        lines: in order of execution.

    """

    groups: tuple[tuple[str, int], ...]
    columns: tuple[Column, ...]
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Scale:
    """From a value to its colour, by way of a share of the scale between 0 and 1."""

    light: tuple[str, ...]
    dark: tuple[str, ...]
    share: Callable[[float], float]

    def paint(self, value: float) -> Paint:
        """The colours of a value; one beyond an end of the scale has that end's colour."""
        at = min(max(self.share(value), 0.0), 1.0)
        light, dark = _blend(self.light, at), _blend(self.dark, at)
        return Paint(light, _text_on(light), dark, _text_on(dark))


@dataclass(frozen=True)
class Map:
    """A heat map with its legend: values along the scale with their colours."""

    tables: tuple[Table, ...]
    legend: tuple[tuple[str, Paint], ...]


_WARM = (
    ("#fcf6ea", "#f8dcae", "#eeaf70", "#d8713f", "#a83a2c", "#6b1628"),
    ("#29242a", "#4a2c36", "#7a3639", "#b3553a", "#e29350", "#fbdc9c"),
)
_COOL = (
    ("#f1f7f6", "#cde7e2", "#93ccc6", "#4ea3a2", "#23706f", "#0c4144"),
    ("#1d282a", "#1d4245", "#226466", "#3a918c", "#7cc4b8", "#d3f0e6"),
)
_SHARES = Scale(*_COOL, lambda value: value)


def error_map(rows: Sequence[LayerRow]) -> Map | None:
    """The relative error of each layer, on a logarithmic scale; None if no layer has one.

    The scale spans a factor of ten or more, so that layers which are nearly equal look nearly equal. A layer without an
    error is a dash, or the share of its weights that left if it lost rows.
    """
    errors = [row.error for row in rows if row.error is not None and math.isfinite(row.error) and row.error > 0]
    if not any(row.error is not None for row in rows):
        return None
    high = max(errors, default=1.0)
    low = min(min(errors, default=1.0), high / 10)
    scale = Scale(*_WARM, lambda value: math.log(value / low) / math.log(high / low) if value > 0 else 0.0)

    def cell(row: LayerRow) -> Cell:
        if row.error is None:
            text, why = units.DASH, "no calibration error"
            if row.lost_rows:
                text = units.MINUS + units.percent(share(row.removed, row.parameters))
                why = "no error of its own"
            return Cell(text, f"{row.name}: {why}, {_gone(row)}", None)
        paint = scale.paint(row.error) if math.isfinite(row.error) else None
        return Cell(
            units.number(row.error, 2), f"{row.name}: relative error {units.number(row.error)}, {_gone(row)}", paint
        )

    steps = [low * (high / low) ** (i / 4) for i in range(5)]
    return Map(_layers(rows, cell), tuple((units.number(value, 2), scale.paint(value)) for value in steps))


def sparsity_map(rows: Sequence[LayerRow]) -> Map:
    """The share of each layer's weights that left or are zero, from 0 to 100 %."""

    def cell(row: LayerRow) -> Cell:
        return Cell(
            units.percent(row.sparsity).removesuffix(" %"), f"{row.name}: {_gone(row)}", _SHARES.paint(row.sparsity)
        )

    return _share_map(_layers(rows, cell))


def structure_map(groups: Sequence[GroupRow]) -> Map:
    """What each attention and feed-forward kept, coloured by the share that left, from 0 to 100 %."""

    def cell(group: GroupRow) -> Cell:
        text = f"{group.after} of {group.before}"
        title = f"{group.name}: {units.percent(_left(group))} of its {group.kind} removed"
        if group.width > 1:
            text += f" ({group.before * group.width} \N{RIGHTWARDS ARROW} {group.after * group.width})"
            title += f", indices {', '.join(map(str, group.removed)) or 'none'}"
        return Cell(text, title, _SHARES.paint(_left(group)))

    def column(group: GroupRow) -> Column:
        suffix = group.name.removeprefix(f"{group.block}.")
        return Column(suffix, suffix.removesuffix(f".{group.kind}"), group.kind)

    return _share_map(_tables((group.block, column(group), cell(group)) for group in groups))


def _share_map(tables: tuple[Table, ...]) -> Map:
    return Map(tables, tuple((f"{25 * i} %", _SHARES.paint(i / 4)) for i in range(5)))


def _left(group: GroupRow) -> float:
    return share(group.before - group.after, group.before)


def _gone(row: LayerRow) -> str:
    zeros = f"{units.percent(share(row.zeros, row.parameters))} zeros"
    if not row.removed:
        return zeros
    removed = f"{units.percent(share(row.removed, row.parameters))} of its weights removed"
    return f"{removed}, {zeros}" if row.zeros else removed


def _layers(rows: Sequence[LayerRow], cell: Callable[[LayerRow], Cell]) -> tuple[Table, ...]:
    return _tables((row.block, _column(row), cell(row)) for row in rows)


def _tables(entries: Iterable[tuple[str, Column, Cell]]) -> tuple[Table, ...]:
    """A table for each kind of block; blocks that share a column are of one kind, one after the other.

    A layer pruned twice shows what was done to it last.
    """
    blocks: dict[str, dict[Column, Cell]] = {}
    for block, column, cell in entries:
        blocks.setdefault(block, {})[column] = cell
    kinds: list[dict[str, dict[Column, Cell]]] = []
    for block, cells in blocks.items():
        kind = next((kind for kind in kinds if any(cells.keys() & other.keys() for other in kind.values())), None)
        if kind is None:
            kinds.append(kind := {})
        kind[block] = cells
    return tuple(_table(kind) for kind in kinds)


def _table(blocks: dict[str, dict[Column, Cell]]) -> Table:
    groups: dict[str, dict[Column, None]] = {}
    for cells in blocks.values():
        for column in cells:
            groups.setdefault(column.group, {})[column] = None
    columns = tuple(column for group in groups.values() for column in group)
    lines = (
        Line(block, _label(block), tuple(cells.get(column) for column in columns)) for block, cells in blocks.items()
    )
    return Table(tuple((name, len(group)) for name, group in groups.items()), columns, tuple(lines))


def _column(row: LayerRow) -> Column:
    suffix = row.name.removeprefix(f"{row.block}.")
    module = suffix.partition(".")[0] if "." in suffix else row.part.replace("_", " ")
    return Column(suffix, row.role, f"{module} · {row.stream}")


def _label(block: str) -> str:
    """`down_blocks.0.attentions.1.transformer_blocks.0` is `down_blocks 0.1.0`."""
    first, *rest = block.split(".")
    return " ".join([first, ".".join(part for part in rest if part.isdigit())]).rstrip()


def _blend(stops: tuple[str, ...], at: float) -> str:
    place = at * (len(stops) - 1)
    left = min(int(place), len(stops) - 2)
    ends = zip(_channels(stops[left]), _channels(stops[left + 1]), strict=True)
    mixed = (round(a + (b - a) * (place - left)) for a, b in ends)
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def _channels(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour[1:]))


def _text_on(colour: str) -> str:
    """Black or white, whichever has the higher contrast by the rule of WCAG 2.1."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in _channels(colour))]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if (luminance + 0.05) ** 2 > 0.05 * 1.05 else "#ffffff"
