"""What is installed here and what it can do."""

from __future__ import annotations

import torch

from compressor import measure
from compressor.errors import CompressorError
from compressor.registry import KINDS, find, load


def examine() -> dict[str, list[tuple[str, str]]]:
    """Versions, devices, optional backends and plugins: rows of two words under each heading."""
    registered: dict[str, list[str]] = {}
    plugins = []
    for kind in KINDS:
        try:
            registered[kind] = list(find(kind))
            plugins.append((kind, ", ".join(registered[kind]) or "none"))
        except CompressorError as error:  # two of one name
            plugins.append((kind, str(error)))
    devices = [("cpu", measure.device_name(torch.device("cpu")))]
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        capability = f"compute capability {properties.major}.{properties.minor}"
        devices.append((f"cuda:{i}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {capability}"))
    backends = []
    for name in registered.get("exporter", ()):
        try:
            exporter = load("exporter", name)
            needed = ", ".join(exporter.required_options())
            backends.append((name, f"needs options: {needed}" if needed else exporter().available() or "ready"))
        except CompressorError as error:
            backends.append((name, str(error)))
    return {"versions": list(measure.versions().items()), "devices": devices, "exporters": backends, "plugins": plugins}
