"""Which layers TensorRT ran as 2:4 sparse: read from the builder's log and from the engine inspector, by torch name."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compressor.two_four.table import Row

_COUNTED = re.compile(r"\(Sparsity\) (Found|Chose) (\d+) layer\(s\) (?:eligible to use|using) sparse tactics:?([^\n]*)")
"""As TensorRT 10 and 11 say it; the names follow in verbose logs."""

_LISTED = re.compile(
    r"\(Sparsity\) (Layers eligible for sparse math"
    r"|TRT inference plan picked sparse implementation for layers):([^\n]*)"
)
"""As TensorRT 8 says it."""

_LAYER = re.compile(r"^Name: (?P<name>.+?), LayerType: (?P<kind>[^,]+)(?P<rest>,.*)$", re.MULTILINE)

_ELIGIBLE = ("Found", "Layers eligible for sparse math")
_RANGE = re.compile(r"\{?ForeignNode\[[^\]]*\]\}?")
_ONNX = re.compile(r"\[ONNX Layer: ([^\]\x1e]+)\]")
_MYELIN = re.compile(r"_myl\d*_\d+$")


@dataclass(frozen=True)
class Said:
    """Layers that a builder's log speaks of.

    Attributes:
        count: how many it says they are.
        names: layers as TensorRT calls them, fused ones as `a + b`; none if the log has only the number.
    """

    count: int
    names: tuple[str, ...]


@dataclass(frozen=True)
class Log:
    """What a builder's log says of sparsity; None where it says nothing.

    Attributes:
        eligible: layers with weights that are sparse along the reduction axis.
        chosen: those of them for which a sparse kernel was the fastest.
    """

    eligible: Said | None = None
    chosen: Said | None = None


@dataclass(frozen=True)
class EngineLayer:
    """One layer of a built engine, as the inspector describes it.

    Attributes:
        name: TensorRT's, such as `a+b_myl0_9` for two that were fused.
        nodes: ONNX nodes and layers that it was made of, as far as it says so.
        tactic: the kernel's name, or None.
        sparse: whether it has sparse weights; None where that is not said, as for layers that are no convolution.
    """

    name: str
    nodes: frozenset[str]
    tactic: str | None
    sparse: bool | None


def read_log(text: str) -> Log:
    """What a log says of sparsity. Where it is said several times, the last one is of the final engine."""
    said: dict[bool, Said] = {}
    for match in re.finditer(f"{_COUNTED.pattern}|{_LISTED.pattern}", text):
        kind, count, names, older_kind, older_names = match.groups()
        layers = tuple(name.strip() for name in (names if kind else older_names).split(", ") if name.strip(" .,"))
        said[(kind or older_kind) in _ELIGIBLE] = Said(int(count) if kind else len(layers), layers)
    return Log(said.get(True), said.get(False))


def read_engine(information: Mapping[str, Any]) -> tuple[EngineLayer, ...]:
    """The layers of an engine.

    Args:
        information: the inspector's JSON. Layers are mappings if the engine was built with detailed verbosity, else
            names alone.
    """
    layers = []
    for entry in information["Layers"]:
        if isinstance(entry, str):
            layers.append(EngineLayer(entry, frozenset(parts(entry)), None, None))
            continue
        name, sparse = entry["Name"], entry.get("HasSparseWeights")
        nodes = {node.strip() for node in _ONNX.findall(entry.get("Metadata") or "")}
        layers.append(
            EngineLayer(
                name,
                frozenset(nodes | parts(name)),
                entry.get("TacticName") or None,
                None if sparse is None else bool(sparse),
            )
        )
    return tuple(layers)


def read_layers(text: str) -> tuple[EngineLayer, ...]:
    """The layers of an engine from a verbose build log, which ends with what the inspector says, as text.

    There are none if the engine was not built with detailed verbosity.
    """
    entries = []
    for match in _LAYER.finditer(text):
        rest, _, metadata = match["rest"].partition(", Metadata: ")
        tactic, sparse = re.search(r", TacticName: ([^,]+)", rest), re.search(r", HasSparseWeights: (\d)", rest)
        entry = {"Name": match["name"], "Metadata": metadata, "TacticName": tactic and tactic[1]}
        entries.append(entry | ({"HasSparseWeights": int(sparse[1])} if sparse else {}))
    return read_engine({"Layers": entries})


def parts(name: str) -> set[str]:
    """The layers that a name of TensorRT's speaks of: `a + b` was fused of two; a `ForeignNode[a...b]` tells none."""
    found = re.split(r"\s*\+\s*|\s+", _RANGE.sub(" ", name))
    return {_MYELIN.sub("", part).strip("()[],") for part in found} - {""}


def by_layer(
    linears: Mapping[str, Iterable[str]],
    sparse: Mapping[str, Mapping[str, Any]],
    shapes: Mapping[str, tuple[int, int]],
    log: Log,
    engine: tuple[EngineLayer, ...],
    times: Mapping[str, Row | None],
) -> dict[str, dict[str, Any]]:
    """What is known of each sparse layer.

    Args:
        linears: names of the ONNX nodes of each linear, by its torch name.
        sparse: the N:M sparse layers of the ONNX file by torch name, each with its `pattern` and that it `holds`.
        shapes: outputs and inputs of each layer.
        log: what the builder said.
        engine: its layers.
        times: by layer, the row of a table of `compressor probe` for it.

    Returns:
        By torch name: `shape`, `pattern`, `holds`; `eligible` and `chosen` by the log; `layer` of the engine, its
        `sparse_weights` and its `tactic` by the inspector; `dense_us` and `sparse_us`, microseconds of PyTorch's
        products by the table, and their `ratio`. None stands for what is not said.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, facts in sparse.items():
        names = {name, *linears.get(name, ())}
        layers = [layer for layer in engine if names & layer.nodes]
        told = [layer.sparse for layer in layers if layer.sparse is not None]
        tactics = [layer.tactic for layer in layers if layer.tactic is not None]
        outputs, inputs = shapes[name]
        found[name] = {
            "shape": f"{outputs} x {inputs}",
            **facts,
            "eligible": _within(names, log.eligible),
            "chosen": _within(names, log.chosen),
            "layer": "; ".join(layer.name for layer in layers) or None,
            "sparse_weights": any(told) if told else None,
            "tactic": "; ".join(dict.fromkeys(tactics)) or None,
            **_times(times.get(name)),
        }
    return found


def _times(row: Row | None) -> dict[str, float | None]:
    dense = None if row is None else round(1e6 * statistics.median(row.dense), 1)
    sparse = None if row is None or not row.sparse else round(1e6 * statistics.median(row.sparse), 1)
    ratio = None if row is None or row.ratio is None else round(row.ratio, 2)
    return {"dense_us": dense, "sparse_us": sparse, "ratio": ratio}


def _within(names: set[str], said: Said | None) -> bool | None:
    if said is None or (said.count and not said.names):
        return None
    if any(names & parts(layer) for layer in said.names):
        return True
    return None if any(_RANGE.search(layer) for layer in said.names) else False
