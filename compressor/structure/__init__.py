"""Knowledge of architectures: tables of what can be pruned and what leaves together; removal, and its proof."""

from compressor.structure.alignment import spread
from compressor.structure.discover import discover
from compressor.structure.family import (
    BlockTable,
    Component,
    Family,
    Heads,
    Layer,
    Neurons,
    Prompting,
    Target,
    find_targets,
    select,
)
from compressor.structure.graph import cross_check
from compressor.structure.groups import Group, consumers, find_groups, magnitudes, unfuse, within
from compressor.structure.proof import Proof, shrink
from compressor.structure.regional import compile_blocks, many_shapes
from compressor.structure.removal import Snapshot, keep, remove, zero
from compressor.structure.trace import Trace, trace

__all__ = [
    "BlockTable",
    "Component",
    "Family",
    "Group",
    "Heads",
    "Layer",
    "Neurons",
    "Prompting",
    "Proof",
    "Snapshot",
    "Target",
    "Trace",
    "compile_blocks",
    "consumers",
    "cross_check",
    "discover",
    "find_groups",
    "find_targets",
    "keep",
    "magnitudes",
    "many_shapes",
    "remove",
    "select",
    "shrink",
    "spread",
    "trace",
    "unfuse",
    "within",
    "zero",
]
