"""Knowledge of architectures: tables of what can be pruned, and what a forward looks like."""

from compressor.structure.family import BlockTable, Component, Family, Layer, Target, find_targets, select

__all__ = ["BlockTable", "Component", "Family", "Layer", "Target", "find_targets", "select"]
