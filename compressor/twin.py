"""What the network's twin on the meta device tells before a weight is loaded: tokens, shapes, what leaves together."""

from __future__ import annotations

from torch import nn

from compressor import pipeline as pipelines
from compressor.entries import Entry
from compressor.recipe import Recipe
from compressor.structure import Trace, cross_check, keep, trace


def trace_at(twin: nn.Module, recipe: Recipe, folder: pipelines.Folder) -> Trace:
    """One forward of the meta-device twin, as `folder.twin()` makes it, at the size that the recipe calibrates at."""
    return trace(twin, folder.family, **_dimensions(recipe, folder))


def size_of(recipe: Recipe, folder: pipelines.Folder) -> tuple[int, int]:
    """Height and width of images in pixels.

    Raises:
        CompressorError: if the network cannot draw at the size that the recipe gives.
    """
    given, shown = recipe.calibration, recipe.report
    folder.check_size(shown.height, shown.width, "report.")
    if given is not None:
        folder.check_size(given.height, given.width, "calibration.")
        folder.check_sequence(given.max_sequence_length, "calibration.max_sequence_length")
    at = given or shown
    return at.height or folder.default_size, at.width or folder.default_size


def _dimensions(recipe: Recipe, folder: pipelines.Folder) -> dict[str, int]:
    """Latent rows and columns, and text tokens."""
    height, width = size_of(recipe, folder)
    factor = folder.vae_factor
    sequence = folder.text_tokens(recipe.calibration.max_sequence_length if recipe.calibration else None)
    return {"height": height // factor, "width": width // factor, "sequence": sequence}


def shrink_twin(entries: tuple[Entry, ...]) -> bool:
    """Takes as many heads and neurons out of the entries' network, on the meta device, as will leave the real one.

    Returns:
        Whether any did.
    """
    removals = [pair for entry in entries for pair in entry.removals.items()]
    for group, count in removals:
        keep(group, range(group.count - count))
    return any(count for _, count in removals)


def check_table(entries: tuple[Entry, ...], recipe: Recipe, folder: pipelines.Folder) -> tuple[str, ...]:
    """Holds the family's table of groups against torch-pruning's dependency graph, where something is to be removed.

    Args:
        entries: on the network's meta-device twin, as it is before anything is removed.
        recipe: whose size is used.
        folder: of the model.

    Returns:
        A line for each row of the table where they differ and the table is known to be right.

    Raises:
        CompressorError: if they differ and nothing is known.
    """
    removing = [entry for entry in entries if entry.removals]
    if not removing:
        return ()
    twin = removing[0].component.module
    return cross_check(twin, folder.family, folder.family.inputs(twin, batch=1, **_dimensions(recipe, folder)))
