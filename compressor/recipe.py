"""A recipe: what to do to which model, read from YAML and checked whole before anything heavy is imported."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from compressor import located_yaml
from compressor.errors import CompressorError
from compressor.options import Bytes, Options, suggest
from compressor.plugin import Exporter, Metric, Pruner
from compressor.registry import Choice, find


def _named(key: str) -> BeforeValidator:
    """Lets a bare string stand for `{key: string}`."""
    return BeforeValidator(lambda value: {key: value} if isinstance(value, str) else value)


class Model(Options):
    """Which pipeline, and which network in it."""

    source: str = Field(description="a diffusers folder, a hub id `org/name`, or `builtin:NAME`")
    component: str | None = Field(
        default=None, description="`transformer` or `unet`; found by itself where there is one"
    )
    variant: str | None = Field(default=None, description="the weights variant, such as `fp16`")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        default="auto", description="the dtype to compute in; auto: float32 on a CPU, the stored dtype elsewhere"
    )


class Prompts(Options):
    """Where prompts come from: one of a list of texts, a file, or a built-in list."""

    texts: tuple[str, ...] | None = Field(default=None, strict=False, description="the prompts themselves")
    file: str | None = Field(default=None, description="a text file, one prompt a line, or a .csv or .tsv file")
    column: str | None = Field(default=None, description="the column of a .csv or .tsv file")
    builtin: str | None = Field(
        default=None, description="`captions`, or the name of a built-in pipeline, whose captions are used"
    )

    @model_validator(mode="before")
    @classmethod
    def _read_short_forms(cls, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return {"texts": value}
        if isinstance(value, str):
            return {"builtin": value[8:]} if value.startswith("builtin:") else {"file": value}
        return value

    @model_validator(mode="after")
    def _check_one(self) -> Prompts:
        given = [name for name in ("texts", "file", "builtin") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"should give one of texts, file and builtin, found {' and '.join(given) or 'none'}")
        if self.column is not None and self.file is None:
            raise ValueError("column has no effect without file")
        return self


class Calibration(Options):
    """How the pipeline is sampled to see what its layers are fed."""

    prompts: Prompts = Field(description="the prompts to draw from")
    samples: int = Field(default=100, ge=1, description="how many prompts to draw, by the recipe's seed")
    steps: int = Field(default=25, ge=1, description="inference steps a prompt")
    guidance: float = Field(default=7.0, ge=0, description="classifier-free guidance scale")
    batch: int = Field(default=4, ge=1, description="prompts at a time; halved when memory runs out")
    height: int | None = Field(default=None, ge=8, description="pixels; the pipeline's own default if not given")
    width: int | None = Field(default=None, ge=8, description="pixels; the pipeline's own default if not given")
    max_sequence_length: int | None = Field(
        default=None,
        ge=1,
        description="tokens of the T5 encoder's part of a prompt (SD3, Flux); the pipeline's own default if not given",
    )
    stride: int | None = Field(
        default=None,
        ge=1,
        description="the network runs at one of so many steps, at others in the next batch, and between them gives its "
        "last output again; 2 if not given, but 1 below 10 steps, with one batch, or where the scheduler adds noise",
    )
    tokens: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="the share of the tokens that is summed: all those of that share of the network's forwards, "
        "which are drawn at random; with gradients, the most of the forwards that may be differentiated",
    )
    packages: int | None = Field(
        default=None,
        ge=1,
        description="into how many Module Packages the layers are cut; 4 if neither this nor memory is given",
    )
    memory: Bytes | None = Field(
        default=None,
        description="instead of packages: the most that the moments of a package and what prunes it may take, as 8GiB",
    )
    compile: bool = Field(
        default=False,
        description="whether the network's blocks run under torch.compile while it is sampled; the first forwards "
        "then take longer",
    )
    cuda_graphs: bool = Field(
        default=True,
        description="whether forwards in half precision on a GPU are replayed by CUDA graphs, unless something in them "
        "waits for the GPU or components are offloaded",
    )

    @model_validator(mode="after")
    def _check_one(self) -> Calibration:
        if self.packages is not None and self.memory is not None:
            raise ValueError("should give packages or memory, found both")
        if self.stride is not None and self.stride > self.steps:
            raise ValueError(f"stride should be at most steps, {self.steps}, found {self.stride}")
        return self


class Targets(Options):
    """Which linear layers are pruned, by role, by name, or by `re:` and a regular expression on the name."""

    include: tuple[str, ...] = Field(
        default=("attention", "feed_forward"),
        strict=False,
        min_length=1,
        description="a layer is taken if any of these matches it",
    )
    exclude: tuple[str, ...] = Field(
        default=(), strict=False, description="and left out again if any of these matches it"
    )

    @field_validator("include", "exclude")
    @classmethod
    def _check_patterns(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            if pattern.startswith("re:"):
                try:
                    re.compile(pattern[3:])
                except re.error as error:
                    raise ValueError(f"'{pattern}' is not a regular expression: {error}") from None
        return patterns


class Pruning(Options):
    """One pruner and the layers it is given."""

    pruner: Annotated[Pruner, Choice("pruner")] = Field(description="the plugin; its own name is the key")
    targets: Targets = Field(default=Targets(), description="the layers")

    @model_validator(mode="before")
    @classmethod
    def _find_pruner(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"pruner": value}
        if not isinstance(value, dict) or set(value) - {"targets"} == {"pruner"}:
            return value
        pruners = find("pruner")
        beside = {key for key in value if key not in pruners and suggest(str(key), ["targets"])}
        named = {key: options for key, options in value.items() if key not in beside}
        return {"pruner": named, **{key: value[key] for key in beside}}


class Report(Options):
    """The images and figures that show what the pruning did."""

    prompts: Prompts | None = Field(default=None, description="the calibration's prompts if not given")
    images: int = Field(default=8, ge=0, description="pairs of images drawn dense and pruned from equal noise")
    steps: int = Field(default=25, ge=1, description="inference steps an image")
    guidance: float = Field(default=7.0, ge=0, description="classifier-free guidance scale")
    height: int | None = Field(default=None, ge=8, description="pixels; as calibrated if not given")
    width: int | None = Field(default=None, ge=8, description="pixels; as calibrated if not given")
    batch: int = Field(default=4, ge=1, description="images at a time; halved when memory runs out")
    metrics: tuple[Annotated[Metric, Choice("metric")], ...] | None = Field(
        default=None, strict=False, description="every installed metric that applies to the model, if not given"
    )

    @model_validator(mode="after")
    def _check_metrics(self) -> Report:
        if self.metrics is not None and self.images == 0:
            raise ValueError("metrics has no effect where images is 0; remove metrics, or draw images")
        return self


class Recipe(Options):
    """The whole of a recipe."""

    model: Annotated[Model, _named("source")] = Field(description="the pipeline; a bare string is its source")
    device: str = Field(default="auto", description="`auto`, `cpu`, `cuda`, `cuda:1`, ...")
    offload: Literal["none", "model"] = Field(
        default="none",
        description="`model`: components wait in the CPU's memory, each but while it computes on the GPU",
    )
    seed: int = Field(default=0, ge=0, lt=2**31, description="of the noise and of the choice of prompts")
    calibration: Calibration | None = Field(
        default=None, description="how the layers' inputs are gathered; may be left out if no pruner needs them"
    )
    prune: tuple[Pruning, ...] = Field(
        strict=False, description="one pruner after another; `[]` leaves the model as it is, to be exported"
    )
    report: Report = Field(default=Report(), description="what the report shows")
    export: tuple[Annotated[Exporter, Choice("exporter")], ...] = Field(
        default=(), strict=False, description="one exporter after another, each into a folder of its name in the output"
    )
    output: str = Field(description="the folder to write, relative to where the command is run")

    @model_validator(mode="after")
    def _check_exports(self) -> Recipe:
        names = [Choice("exporter").name(exporter) for exporter in self.export]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"export names {name} twice; each exporter writes one folder, called like itself")
        if not self.prune and not self.export:
            raise ValueError("prune and export are both empty: there is nothing to do")
        return self

    @model_validator(mode="after")
    def _check_calibration(self) -> Recipe:
        for i, entry in enumerate(self.prune):
            if entry.pruner.moments != "none" and self.calibration is None:
                name = Choice("pruner").name(entry.pruner)
                raise ValueError(f"calibration is missing: prune[{i}].{name} needs the inputs of its layers")
            if entry.pruner.moments == "gradients" and self.calibration is not None and self.calibration.compile:
                raise ValueError(
                    f"calibration.compile should be false where gradients are gathered, as prune[{i}] asks (objective "
                    "network): they are taken through eager blocks; remove it"
                )
        if self.prune and self.report.images and self.report.prompts is None and self.calibration is None:
            raise ValueError(
                "report.prompts is missing: without a calibration there are no prompts to draw images from"
            )
        return self

    def dump(self) -> dict[str, Any]:
        """The recipe as plain data, every default spelled out, in the form that `load` reads."""
        data = self.model_dump(mode="json")
        data["prune"] = [{**entry.pop("pruner"), **entry} for entry in data["prune"]]
        return data


def load(file: str | Path, overrides: tuple[str, ...] = ()) -> Recipe:
    """Reads and checks a recipe.

    Args:
        file: a YAML file, or the name of a recipe that came with the package, such as `quickstart`.
        overrides: `KEY.KEY=VALUE` assignments, applied before checking.

    Raises:
        CompressorError: with every mistake, one a line, as `file:line: where: what`.
    """
    path = Path(file)
    if not path.exists() and path.name == str(file) and path.suffix not in (".yaml", ".yml"):
        known = shipped()
        if path.name not in known:
            clause = suggest(path.name, list(known)) or f"; known: {', '.join(known) or 'none'}"
            raise CompressorError(f"{file}: no such file, and no recipe of that name came with the package{clause}")
        path = known[path.name]
    source = located_yaml.read(path)
    for assignment in overrides:
        source.set(assignment)
    try:
        recipe = Recipe.model_validate(source.data)
    except ValidationError as error:
        raise CompressorError("\n".join(_explain(error, source))) from None
    return _resolve(recipe, path.parent)


def shipped() -> dict[str, Path]:
    """The recipes that came with the package, by name."""
    installed = Path(__file__).parent / "recipes"
    folder = installed if installed.is_dir() else Path(__file__).parent.parent / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def schema() -> dict[str, Any]:
    """A JSON Schema of recipes with the plugins installed here, for editors to complete from."""
    result = Recipe.model_json_schema()
    entry = result["$defs"]["Pruning"]
    by_name = entry["properties"].pop("pruner")["oneOf"]
    entry["properties"].update({k: v for option in by_name for k, v in option.get("properties", {}).items()})
    entry["required"] = []
    entry["oneOf"] = [{"required": [name]} for name in find("pruner")]
    bare = {"enum": [option["const"] for option in by_name if "const" in option]}
    result["properties"]["prune"]["items"] = {"anyOf": [result["properties"]["prune"]["items"], bare]}
    for name in ("model", "prompts"):
        _allow_short_form(result, name)
    some = {name: {"properties": {name: {"minItems": 1}}, "required": [name]} for name in ("prune", "export")}
    result["anyOf"] = list(some.values())
    result["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    result["title"] = "compressor recipe"
    return result


def _resolve(recipe: Recipe, folder: Path) -> Recipe:
    """Input paths in a recipe are relative to the recipe's own folder, if they exist there; `~` is the home folder."""

    def beside(path: str) -> str:
        given = Path(path).expanduser()
        return str(folder / given) if (folder / given).exists() else str(given) if path.startswith("~") else path

    def prompts(value: Prompts) -> Prompts:
        return value if value.file is None else value.model_copy(update={"file": beside(value.file)})

    update: dict[str, Any] = {
        "model": recipe.model.model_copy(update={"source": beside(recipe.model.source)}),
        "prune": tuple(entry.model_copy(update={"pruner": entry.pruner.move_files(beside)}) for entry in recipe.prune),
        "export": tuple(exporter.move_files(beside) for exporter in recipe.export),
        "output": str(Path(recipe.output).expanduser()),
    }
    for name, given in (("calibration", recipe.calibration), ("report", recipe.report)):
        if given is not None and given.prompts is not None:  # what was not given stays known as such
            update[name] = given.model_copy(update={"prompts": prompts(given.prompts)})
    return recipe.model_copy(update=update)


def _explain(error: ValidationError, source: located_yaml.Located) -> list[str]:
    found = []
    errors = error.errors(include_url=False)
    for e in errors:
        place = tuple(e["loc"])
        if e["type"] == "too_short" and any(other["loc"][: len(place)] == place for other in errors if other is not e):
            continue  # pydantic counts the items that passed, and each of the others has been told
        if len(place) >= 3 and place[0] == "prune" and place[2] == "pruner":
            place = (*place[:2], *place[3:])
        where = source.where(place)
        line = int(tail) if (tail := where.rpartition(":")[2]).isdigit() else 0
        found.append((line, f"{where}: {located_yaml.dotted(place)}{': ' if place else ''}{_words(e)}"))
    return [text for _, text in sorted(found, key=lambda pair: pair[0])]


_PLAIN = {
    "missing": "is missing",
    "string_type": "should be a string",
    "int_type": "should be a whole number",
    "int_from_float": "should be a whole number",
    "float_type": "should be a number",
    "finite_number": "should be a finite number",
    "bool_type": "should be true or false",
    "tuple_type": "should be a list",
    "model_type": "should be a mapping of options",
    "too_short": "should not be empty",
}
"""Plain words for what pydantic says for programmers, by its type of error."""


def _words(e: ErrorDetails) -> str:
    message = _PLAIN.get(e["type"], e["msg"])
    for start in ("Value error, ", "Input "):
        message = message.removeprefix(start)
    message = message.replace("greater than or equal to", "at least").replace("less than or equal to", "at most")
    if message.startswith("should") and "found" not in message and e["type"] != "too_short":
        message += f", found {located_yaml.describe(e['input'])}"
    return message


def _allow_short_form(result: dict[str, Any], name: str) -> None:
    """Says in the schema what `_named` and `Prompts` accept besides a mapping."""
    for definition in [result, *result["$defs"].values()]:
        field = definition.get("properties", {}).get(name)
        if field is None:
            continue
        others = [{"type": "string"}] + ([{"type": "array", "items": {"type": "string"}}] if name == "prompts" else [])
        kept = {k: field.pop(k) for k in ("$ref", "anyOf") if k in field}
        field["anyOf"] = [*kept.pop("anyOf", []), *([kept] if kept else []), *others]
