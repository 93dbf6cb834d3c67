"""Knowledge of architectures: tables of what can be pruned, and what a forward looks like."""

from compressor.structure.family import BlockTable, Component, Family, Layer, Target, find_targets, select
from compressor.structure.trace import Trace, trace

__all__ = ["BlockTable", "Component", "Family", "Layer", "Target", "Trace", "find_targets", "select", "trace"]
