"""What `bench prune` works on: a known model or a recipe's, and the recipe that is to be timed on it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from compressor import pipeline as pipelines
from compressor import recipe, registry, shrunk
from compressor.bench import models
from compressor.bench.models import KnownModel
from compressor.bench.networks import VAE_FACTOR
from compressor.bench.settings import check_size
from compressor.calibration import sampling
from compressor.calibration.noise import adds_noise
from compressor.calibration.strides import all_runs, stride_of
from compressor.errors import CompressorError
from compressor.pipeline import Folder
from compressor.recipe import Recipe
from compressor.structure import Family
from compressor.twin import size_of

T = TypeVar("T", bound=BaseModel)


@dataclass(frozen=True)
class Asked:
    """What the command line says; None leaves it to the recipe, and for a known model to the paper.

    Attributes:
        size: height and width of the images in pixels.
        prompts: to calibrate with.
        steps: inference steps.
        stride: at one of how many the network runs.
        guidance: classifier-free guidance scale.
        batch: prompts at a time.
        packages: Module Packages.
        solver: of single weights and N:M, for a known model.
        layers: shorten each part of the network to so many; None for all.
        at: a known model, whose size is taken instead of that of a recipe's own network.
        compile: time compiled forwards, too, as `calibration.compile` has them.
    """

    size: int | None = None
    prompts: int | None = None
    steps: int | None = None
    stride: int | None = None
    guidance: float | None = None
    batch: int | None = None
    packages: int | None = None
    solver: str | None = None
    layers: int | None = None
    at: str | None = None
    compile: bool = False


@dataclass(frozen=True)
class Subject:
    """A network, and what is to be done to it.

    Attributes:
        name: as it was asked for.
        model: the network's size.
        family: its table.
        recipe: pruners and calibration.
        cases: what each of its pruners is called.
        height: latent rows.
        width: latent columns.
        pixels: height and width of the images.
        guided: whether a prompt takes two samples of a forward.
        noisy: whether the scheduler adds noise; None if that is unknown.
        layers: each part of the network is shortened to so many; None for all.
    """

    name: str
    model: KnownModel
    family: Family
    recipe: Recipe
    cases: tuple[str, ...]
    height: int
    width: int
    pixels: tuple[int, int]
    guided: bool
    noisy: bool | None
    layers: int | None

    @property
    def calibration(self) -> recipe.Calibration:
        """How it is calibrated."""
        assert self.recipe.calibration is not None
        return self.recipe.calibration

    @property
    def samples(self) -> int:
        """Samples of one forward."""
        return self.calibration.batch * (2 if self.guided else 1)

    @property
    def forwards(self) -> int:
        """How often one pass over all prompts runs the network, with a scheduler that calls it once a step."""
        given = self.calibration
        return all_runs(given.steps, self.stride, -(-given.samples // given.batch))

    @property
    def stride(self) -> int:
        """In how many steps it runs once."""
        return stride_of(self.calibration, self.calibration.samples, self.noisy)


def find(name: str, asked: Asked) -> Subject:
    """A known model with the pruners of the published tables, or the network and the pruners of a recipe.

    Raises:
        CompressorError: if it is neither, or what is asked does not fit it.
    """
    if name in models.MODELS:
        return _known(models.find(name), asked)
    if not Path(name).exists() and name not in recipe.shipped():
        models.find(name)  # says which are known
    return _of_recipe(name, asked)


def _known(model: KnownModel, asked: Asked) -> Subject:
    if asked.at is not None:
        raise CompressorError(f"at has no effect: {model.name} is a known model's size by itself; leave it out")
    family: Family = registry.load("family", model.family)
    size = asked.size or 512
    check_size(model, size)
    whole = {} if asked.layers is None or asked.layers > 2 else {"keep_first": 0, "keep_last": 0}
    solver = {} if asked.solver is None else {"solver": asked.solver}
    pruners = {
        "unstructured 50 %": {"sparsity": 0.5, **solver},
        "2:4": {"granularity": "n_m", **solver},
        "structured 30 %": {"granularity": {"structured": {"heads": 0.3, "neurons": 0.3, **whole}}},
    }
    loaded = _checked(
        Recipe,
        {
            "model": model.name,
            "calibration": {"prompts": ["-"], "height": size, "width": size, **_calibration(asked)},
            "prune": [{"obs_diff": options} for options in pruners.values()],
            "output": "-",
        },
    )
    assert loaded.calibration is not None
    guided = family.prompting[0].guided and loaded.calibration.guidance > 1
    side = size // VAE_FACTOR
    return Subject(
        model.name, model, family, loaded, tuple(pruners), side, side, (size, size), guided, False, asked.layers
    )


def _of_recipe(name: str, asked: Asked) -> Subject:
    if asked.solver is not None:
        raise CompressorError(f"solver has no effect: {name} says how its layers are solved; leave it out")
    loaded = recipe.load(name)
    if loaded.calibration is None:
        raise CompressorError(f"{name}: should have a calibration to be timed, found none")
    sizes = {} if asked.size is None else {"height": asked.size, "width": asked.size}
    given = loaded.calibration.model_dump(exclude_unset=True) | sizes | _calibration(asked)
    if asked.packages is not None:
        given.pop("memory", None)
    loaded = loaded.model_copy(update={"calibration": _checked(recipe.Calibration, given)})
    if asked.compile and any(entry.pruner.moments == "gradients" for entry in loaded.prune):
        raise CompressorError(f"{name}: --compile should be left out where gradients are gathered (objective network)")
    if asked.at is not None:
        return _at(models.find(asked.at), name, loaded, asked.layers)
    folder = pipelines.open_folder(loaded.model, weights=False)
    height, width = size_of(loaded, folder)
    assert loaded.calibration is not None
    return Subject(
        name,
        _size_of(name, folder, folder.text_tokens(loaded.calibration.max_sequence_length), asked.layers),
        folder.family,
        loaded,
        tuple(f"prune[{i}]" for i in range(len(loaded.prune))),
        height // folder.vae_factor,
        width // folder.vae_factor,
        (height, width),
        sampling.guided(folder, loaded.calibration.guidance),
        adds_noise(folder.scheduler(), loaded.calibration.steps),
        asked.layers,
    )


def _at(model: KnownModel, name: str, loaded: Recipe, layers: int | None) -> Subject:
    """What a recipe does, at the size of a known model of any family that has its layers."""
    family: Family = registry.load("family", model.family)
    assert loaded.calibration is not None
    height, width = loaded.calibration.height or 512, loaded.calibration.width or 512
    for side in (height, width):
        check_size(model, side)
    return Subject(
        f"{name} at {model.name}",
        model,
        family,
        loaded,
        tuple(f"prune[{i}]" for i in range(len(loaded.prune))),
        height // VAE_FACTOR,
        width // VAE_FACTOR,
        (height, width),
        family.prompting[0].guided and loaded.calibration.guidance > 1,
        False,
        layers,
    )


def _calibration(asked: Asked) -> dict[str, Any]:
    """What the command line says of the calibration, by the recipe's names."""
    given = {
        "samples": asked.prompts,
        "steps": asked.steps,
        "stride": asked.stride,
        "guidance": asked.guidance,
        "batch": asked.batch,
        "packages": asked.packages,
        "compile": asked.compile or None,
    }
    return {key: value for key, value in given.items() if value is not None}


def _checked(cls: type[T], data: Mapping[str, Any]) -> T:
    """Of what the command line says, which may not go together."""
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        raise CompressorError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None


def _size_of(name: str, folder: Folder, tokens: int, layers: int | None) -> KnownModel:
    config = folder.config(folder.network)
    if shrunk.manifest_in(config) is not None:
        raise CompressorError(f"{name}: its network has lost heads or neurons already; time the dense one's recipe")
    diffusers: Any = import_module("diffusers")
    known = inspect.signature(getattr(diffusers, folder.family.component_class).__init__).parameters
    config = {key: value for key, value in config.items() if key in known}
    depths = [model.depth for model in models.MODELS.values() if model.family == folder.family.name]
    depth = tuple(key for key in (depths[0] if depths else ()) if key in config)
    if layers is not None and not depth:
        raise CompressorError(f"layers has no effect: how to shorten the network of {name} is not known; leave it out")
    return KnownModel(name, folder.family.name, config, depth, tokens)
