"""The command line. What needs torch is imported inside the commands that need it."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, NoReturn

import click

from compressor import prompts, recipe, registry
from compressor.errors import CompressorError

RECIPE = click.argument("recipe_file", metavar="RECIPE")
SET = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change the recipe, as prune.0.obs_diff.sparsity=0.6.",
)


class Commands(click.Group):
    """Prints what a user can mend without a traceback, and ends calmly on Ctrl-C."""

    def invoke(self, ctx: click.Context) -> object:
        """Runs a command; a CompressorError becomes one message and exit code 1, Ctrl-C exit code 130."""
        try:
            return super().invoke(ctx)
        except CompressorError as error:
            click.echo(_in_words(error), err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            click.echo("\ninterrupted", err=True)
            ctx.exit(130)
        except BrokenPipeError:
            raise
        except OSError as error:
            click.echo(f"error: {error.filename}: {error.strerror}" if error.filename else f"error: {error}", err=True)
            ctx.exit(1)


def _in_words(error: CompressorError) -> str:
    return f"error: {error}" if "\n" not in str(error) else f"errors:\n{error}"


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="diffusion-compressor")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Makes text-to-image diffusion models smaller and faster in one shot, as a recipe says."""
    if ctx.invoked_subcommand != "run" and _is_shared():
        if os.environ["RANK"] != "0":
            ctx.exit(0)  # rank 0 tells, and torchrun ends with its exit code
        raise CompressorError(
            f"{ctx.invoked_subcommand}: should be started as one process, found {os.environ['WORLD_SIZE']} under "
            "torchrun; several may share a run"
        )


@main.command()
@RECIPE
@SET
@click.option("--overwrite", is_flag=True, help="Replace an output folder that is not an earlier result.")
def run(recipe_file: str, overrides: tuple[str, ...], overwrite: bool) -> None:
    """Prune, prove, save and export what RECIPE says.

    RECIPE is a YAML file, or the name of one that came with the package (see `compressor recipes`).
    """
    if _is_shared():
        with _importing():
            from compressor import ranks

        _run_shared(ranks, recipe_file, overrides, overwrite)
    loaded = recipe.load(recipe_file, overrides)
    output = Path(loaded.output)
    before = _stamp(output)
    with _importing():
        from compressor import quiet
        from compressor.progress import Progress
        from compressor.run import run as run_recipe

        quiet.silence_libraries()
    interrupts: list[int] = []
    try:
        with _noting(interrupts):
            run_recipe(loaded, Progress(), overwrite=overwrite)
    except (KeyboardInterrupt, Exception) as error:
        if not interrupts and not isinstance(error, KeyboardInterrupt):
            raise
        click.echo(f"\ninterrupted: {_explain_kept(output, before)}", err=True)
        sys.exit(130)
    _tell_result(output)


def _tell_result(output: Path) -> None:
    click.echo(f"result: {output}")
    click.echo(f"report: {output / 'report.html'}")


def _explain_kept(output: Path, before: int | None) -> str:
    """What an interruption leaves, where the folder's stamp was as given."""
    if _stamp(output) != before:
        return f"the pruned pipeline in {output} is complete; what was to follow is not"
    if before is not None:
        return f"nothing new was kept; the earlier result in {output} is as it was"
    return "nothing was kept"


def _is_shared() -> bool:
    """Whether torchrun has started this process as one of several."""
    return "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("WORLD_SIZE") != "1"


def _run_shared(ranks: ModuleType, recipe_file: str, overrides: tuple[str, ...], overwrite: bool) -> NoReturn:
    """The same in one of several processes: whichever fails first tells why, and all end with its exit code."""
    with _importing():
        from rich.console import Console

        from compressor import quiet
        from compressor.progress import Progress
        from compressor.run import run as run_recipe

        quiet.silence_libraries()
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(1))  # so that what was begun is cleaned up
    interrupts: list[int] = []
    output, before = None, None
    with ranks.joined() as shared:
        code, words = 0, ""
        try:
            with _noting(interrupts):
                loaded = recipe.load(recipe_file, overrides)
                output = Path(loaded.output)
                before = _stamp(output)
                progress = Progress() if shared.first else Progress(Console(quiet=True))
                run_recipe(loaded, progress, overwrite=overwrite, ranks=shared)
            if shared.first:
                _tell_result(output)
        except BaseException as error:  # each has to be noted for the others, which might wait for ever
            code, words = _explain_end(error, bool(interrupts), output, before)
        if code:
            if shared.fails(code):
                click.echo(words, err=True)
                shared.told()
            else:
                code = shared.code()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # torch's threads may wait for processes that are gone


def _explain_end(error: BaseException, interrupted: bool, output: Path | None, before: int | None) -> tuple[int, str]:
    """The exit code that an error comes to, and what is told of it."""
    if interrupted or isinstance(error, KeyboardInterrupt):
        return 130, f"\ninterrupted: {_explain_kept(output, before) if output else 'nothing was begun'}"
    if isinstance(error, SystemExit):
        return 1, "error: this process was told to end, as torchrun does when another one of the job was killed"
    if isinstance(error, CompressorError):
        return 1, _in_words(error)
    if isinstance(error, OSError):
        return 1, f"error: {error.filename}: {error.strerror}" if error.filename else f"error: {error}"
    return 1, "".join(traceback.format_exception(error)).rstrip()


@main.command()
@RECIPE
@SET
def check(recipe_file: str, overrides: tuple[str, ...]) -> None:
    """Read RECIPE and report every mistake in it; loads no model."""
    loaded = recipe.load(recipe_file, overrides)
    mistakes: list[str] = []
    for given, use in (
        (loaded.calibration and loaded.calibration.prompts, "calibration"),
        (loaded.report.prompts, "evaluation"),
    ):
        if given is not None:
            try:
                prompts.read(given, use)  # pyright: ignore[reportArgumentType]
            except CompressorError as error:
                mistakes.append(str(error))
    if mistakes:
        raise CompressorError("\n".join(dict.fromkeys(mistakes)))
    click.echo(f"{recipe_file}: ok")


@main.command()
@RECIPE
@SET
@click.option("--layers", is_flag=True, help="List every layer.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plan(recipe_file: str, overrides: tuple[str, ...], layers: bool, as_json: bool) -> None:
    """Show what RECIPE would do, without weights and within seconds."""
    loaded = recipe.load(recipe_file, overrides)
    with _importing():
        from compressor import plan_table, quiet
        from compressor.plan import plan as make

        quiet.silence_libraries()
    made = make(loaded)
    click.echo(plan_table.as_json(made) if as_json else plan_table.as_text(made, layers=layers), nl=False)


@main.command()
@RECIPE
@SET
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("out/compare"), show_default=True, help="Folder to write."
)
def compare(recipe_file: str, overrides: tuple[str, ...], out: Path) -> None:
    """Try each entry of RECIPE's `prune` by itself on the dense model and table the results."""
    loaded = recipe.load(recipe_file, overrides)
    with _importing():
        from compressor import quiet
        from compressor.compare import compare as try_all
        from compressor.progress import Progress

        quiet.silence_libraries()
    try_all(loaded, Progress(), out)
    click.echo((out / "compare.md").read_text(encoding="utf-8"), nl=False)
    click.echo(f"figures: {out / 'compare.json'}")


@main.command()
def plugins() -> None:
    """List the installed plugins of every kind."""
    for kind in registry.KINDS:
        click.echo(f"{kind}")
        for name, entry in registry.find(kind).items():
            origin = f"{entry.dist.name} {entry.dist.version}" if entry.dist else "?"
            click.echo(f"  {name:<16} {entry.value}  ({origin})")


@main.command()
@click.argument("name", required=False)
def recipes(name: str | None) -> None:
    """List the recipes that came with the package, or print the one called NAME."""
    shipped = recipe.shipped()
    if name is None:
        width = max(map(len, shipped))
        for found, path in shipped.items():
            first = path.read_text(encoding="utf-8").splitlines()[0]
            click.echo(f"{found:<{width}}  {first.removeprefix('#').strip()}")
        return
    if name not in shipped:
        from compressor.options import suggest

        clause = suggest(name, list(shipped)) or f"; known: {', '.join(shipped)}"
        raise CompressorError(f"no recipe named '{name}'{clause}")
    click.echo(shipped[name].read_text(encoding="utf-8"), nl=False)


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--prompt", "texts", multiple=True, help="What to draw; may be given several times.")
@click.option("--prompts", "file", help="A text file, one prompt a line.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("images"), show_default=True, help="Folder to write."
)
@click.option("--steps", default=25, show_default=True, type=click.IntRange(1), help="Inference steps.")
@click.option("--guidance", default=7.0, show_default=True, help="Classifier-free guidance scale.")
@click.option("--height", type=click.IntRange(8), help="Pixels; the pipeline's default if not given.")
@click.option("--width", type=click.IntRange(8), help="Pixels; the pipeline's default if not given.")
@click.option(
    "--max-sequence-length",
    type=click.IntRange(1),
    help="Tokens of the T5 encoder's part (SD3, Flux); the pipeline's default if not given.",
)
@click.option("--batch", default=4, show_default=True, type=click.IntRange(1), help="Images at a time.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**31 - 1), help="Of the noise.")
@click.option("--device", default="auto", show_default=True)
@click.option(
    "--runtime",
    type=click.Choice(["torch", "onnxruntime", "torch-sparse"]),
    default="torch",
    show_default=True,
    help="onnxruntime draws with the ONNX export of the result: on the CPU, or with --device cuda. torch-sparse runs "
    "2:4 layers by sparse tensor cores where that is faster, on an NVIDIA GPU.",
)
@click.option(
    "--probe",
    type=click.Path(path_type=Path),
    metavar="FILE.json",
    help="With torch-sparse: a table of `compressor probe` says which layers gain, instead of measuring them now.",
)
def generate(
    folder: Path,
    texts: tuple[str, ...],
    file: str | None,
    out: Path,
    steps: int,
    guidance: float,
    height: int | None,
    width: int | None,
    max_sequence_length: int | None,
    batch: int,
    seed: int,
    device: str,
    runtime: str,
    probe: Path | None,
) -> None:
    """Draw images with the result of a run in FOLDER.

    With --runtime onnxruntime, FOLDER may also be an ONNX export by itself.
    """
    if probe is not None and runtime != "torch-sparse":
        raise click.UsageError("--probe has no effect without --runtime torch-sparse; leave it out")
    if not texts and file is None:
        raise click.UsageError("give --prompt or --prompts")
    chosen = list(texts) + (list(prompts.read(recipe.Prompts(file=file), "evaluation")) if file else [])
    with _importing():
        from compressor import exported, pictures, quiet
        from compressor.calibration.sampling import Settings, encode
        from compressor.progress import Progress
        from compressor.report.images import to_image

        quiet.silence_libraries()
    progress = Progress()
    pipeline = exported.open_pipeline(folder, device, runtime)
    pipeline.folder.check_size(height, width, "--")
    pipeline.folder.check_sequence(max_sequence_length, "--max-sequence-length")
    if runtime == "torch-sparse":
        exported.run_sparse(pipeline, probe, progress)
    encoded = encode(pipeline, chosen, guidance, seed, "pictures", max_sequence_length)
    out.mkdir(parents=True, exist_ok=True)
    images, _ = pictures.draw(pipeline, encoded, Settings(steps, guidance, height, width), batch, progress, "drawing")
    for i, image in enumerate(images):
        path = out / f"{i:04d}.png"
        try:
            to_image(image).save(path)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise CompressorError(f"{path}: {error.strerror or error}; the pictures before it are whole") from error
        click.echo(f"{path}  {chosen[i]}")


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
def verify(folder: Path) -> None:
    """Check the result of a run in FOLDER and its exports again: every hash, and what the exports compute.

    FOLDER may also be an export by itself; what it computes is compared if the result is around it.
    """
    with _importing():
        from compressor import exported, quiet

        quiet.silence_libraries()
    for line in exported.verify_all(folder):
        click.echo(line)


@main.command()
def doctor() -> None:
    """Show versions, devices, optional backends and plugins."""
    with _importing():
        from compressor.doctor import examine

    for heading, rows in examine().items():
        click.echo(heading)
        for left, right in rows:
            click.echo(f"  {left:<22} {right}")


@main.command()
def schema() -> None:
    """Print a JSON Schema of recipes with the plugins installed here; editors complete from it."""
    click.echo(json.dumps(recipe.schema(), indent=2))


BATCH = click.option(
    "--batch",
    "batches",
    multiple=True,
    type=click.IntRange(1),
    default=(1,),
    show_default=True,
    help="Samples of one forward of the network; with classifier-free guidance an image takes two. May be given "
    "several times.",
)
HALF = click.option("--dtype", type=click.Choice(["bfloat16"]), default="bfloat16", show_default=True)


@main.command()
@click.argument("models", metavar="RECIPE_OR_MODEL...", nargs=-1)
@click.option("--size", type=click.IntRange(16), help="Pixels, either way; 1024 if not given, and a recipe's own.")
@BATCH
@HALF
@click.option("--device", default="auto", show_default=True)
@click.option("--turns", type=click.IntRange(1), default=20, show_default=True, help="Of dense and 2:4, each shape.")
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE.json", help="The table, for n_m and exports.")
def probe(models: tuple[str, ...], output: Path | None, **options: Any) -> None:
    """Time every shape of a model's linear layers dense and 2:4 on the GPU that is here.

    A model is a recipe, whose layers and size are taken, or one of sd2.1, sdxl, sd3-medium, sd3.5-large and flux-dev.
    """
    with _importing():
        from compressor import quiet
        from compressor.bench.probe import Settings
        from compressor.bench.probe import run as measure_all
        from compressor.progress import Progress

        quiet.silence_libraries()
    click.echo(measure_all(Settings(models, **options), Progress(), output), nl=False)
    if output is not None:
        click.echo(f"table: {output}")


@main.group()
def bench() -> None:
    """Time networks of known models' sizes here, with random weights."""


@bench.command()
@click.argument("models", metavar="MODEL...", nargs=-1)
@click.option("--heads", default=0.3, show_default=True, help="Share of heads to remove.")
@click.option("--neurons", default=0.3, show_default=True, help="Share of neurons to remove.")
@click.option(
    "--multiple",
    "multiples",
    multiple=True,
    type=click.IntRange(1),
    default=(64, 1),
    show_default=True,
    help="Of the widths that are left; may be given several times, each is timed.",
)
@click.option("--keep-ends/--no-keep-ends", default=True, show_default=True, help="Keep first and last block whole.")
@click.option("--size", default=1024, show_default=True, type=click.IntRange(16), help="Pixels, either way.")
@click.option("--batch", default=2, show_default=True, type=click.IntRange(1), help="Samples of a forward.")
@click.option("--layers", type=click.IntRange(1), help="Shorten each part of the network to so many.")
@click.option("--runtime", type=click.Choice(["torch", "onnxruntime"]), default="torch", show_default=True)
@click.option(
    "--compile",
    "extent",
    type=click.Choice(["blocks", "network", "no"]),
    help="What torch.compile takes as one piece, beside the eager forward; on a GPU blocks if not given, else no.",
)
@click.option("--device", default="auto", show_default=True)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="On a GPU float16 if not given, else float32.",
)
@click.option("--repeats", type=click.IntRange(1), help="Turns of dense and shrunk; on a GPU 20 if not given, else 5.")
@click.option(
    "--in-a-row",
    type=click.IntRange(1),
    help="Forwards of a turn; on a GPU 4 if not given, behind one that is not timed; 1 begins on an idle GPU.",
)
@click.option("--threads", type=click.IntRange(1), help="Of the CPU.")
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE.json", help="Every figure, row by row.")
def shrunk(models: tuple[str, ...], output: Path | None, **options: Any) -> None:
    """Time MODEL with heads and neurons removed against the dense network, both in turns.

    MODEL is one of sd2.1, sdxl, sd3-medium, sd3.5-large and flux-dev.
    """
    from compressor.bench.models import find

    for model in models:
        find(model)
    with _importing():
        from compressor import quiet
        from compressor.bench.settings import Settings
        from compressor.bench.shrunk import run as time_all
        from compressor.progress import Progress

        quiet.silence_libraries()
    click.echo(time_all(Settings(models, **options), Progress(), output), nl=False)


@bench.command()
@click.argument("models", metavar="MODEL...", nargs=-1)
@click.option("--size", default=1024, show_default=True, type=click.IntRange(16), help="Pixels, either way.")
@BATCH
@click.option("--layers", type=click.IntRange(1), help="Shorten each part of the network to so many.")
@HALF
@click.option(
    "--faster", type=click.FloatRange(1), default=1.02, show_default=True, help="What a layer has to gain to be 2:4."
)
@click.option(
    "--compile",
    "extent",
    type=click.Choice(["blocks", "network", "no"]),
    default="blocks",
    show_default=True,
    help="What torch.compile takes as one piece, dense and 2:4 alike.",
)
@click.option("--device", default="auto", show_default=True)
@click.option("--repeats", type=click.IntRange(1), default=20, show_default=True, help="Turns of dense and 2:4.")
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE.json", help="Every figure, row by row.")
def sparse(models: tuple[str, ...], output: Path | None, **options: Any) -> None:
    """Time MODEL with 2:4 weights in the layers that gain by it against the dense network, both in turns.

    MODEL is one of sd2.1, sdxl, sd3-medium, sd3.5-large and flux-dev.
    """
    with _importing():
        from compressor import quiet
        from compressor.bench.sparse import Settings
        from compressor.bench.sparse import run as time_all
        from compressor.progress import Progress

        quiet.silence_libraries()
    click.echo(time_all(Settings(models, **options), Progress(), output), nl=False)


@bench.command()
@click.argument("models", metavar="RECIPE_OR_MODEL...", nargs=-1)
@click.option("--size", type=click.IntRange(16), help="Pixels, either way; 512 if not given, and a recipe's own.")
@click.option("--prompts", type=click.IntRange(1), help="To extrapolate to; 100 if not given, and a recipe's own.")
@click.option("--steps", type=click.IntRange(1), help="Of a prompt; 25 if not given, and a recipe's own.")
@click.option("--guidance", type=click.FloatRange(0), help="Above 1 a prompt takes two samples, where a model has it.")
@click.option("--batch", type=click.IntRange(1), help="Prompts at a time; 4 if not given, and a recipe's own.")
@click.option("--packages", type=click.IntRange(1), help="Module Packages; 4 if not given, and a recipe's own.")
@click.option("--solver", type=click.Choice(["obs", "admm"]), help="Of single weights and 2:4; a recipe has its own.")
@click.option("--layers", type=click.IntRange(1), help="Shorten each part of the network to so many.")
@click.option("--device", default="auto", show_default=True)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="On a GPU float16 if not given, else float32.",
)
@click.option("--repeats", type=click.IntRange(1), help="Turns of each forward; on a GPU 20 if not given, else 5.")
@click.option("--turns", type=click.IntRange(1), help="Of all solves; on a GPU 3 if not given, else 1.")
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE.json", help="Every figure, row by row.")
def prune(
    models: tuple[str, ...],
    output: Path | None,
    device: str,
    dtype: str | None,
    repeats: int | None,
    turns: int | None,
    **asked: Any,
) -> None:
    """Time calibration and solves, without weights, and extrapolate what pruning takes here.

    Forwards with moments are timed against plain ones in turns. A model is one of sd2.1, sdxl, sd3-medium, sd3.5-large
    and flux-dev, with the pruners of the published tables at the paper's setting; or a recipe, with its own.
    """
    with _importing():
        from compressor import quiet
        from compressor.bench.prune import Settings
        from compressor.bench.prune import run as time_all
        from compressor.bench.subjects import Asked
        from compressor.progress import Progress

        quiet.silence_libraries()
    settings = Settings(models, Asked(**asked), device, dtype, repeats, turns)
    click.echo(time_all(settings, Progress(), output), nl=False)


@contextmanager
def _importing() -> Iterator[None]:
    """While it lasts, Ctrl-C ends the process at once: torch, half imported, would swallow a KeyboardInterrupt."""

    def end(_number: int, _frame: object) -> None:
        click.echo("\ninterrupted: nothing was begun", err=True)
        os._exit(130)

    before = signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _noting(interrupts: list[int]) -> Iterator[None]:
    """Notes every Ctrl-C: libraries such as torch's exporter turn a KeyboardInterrupt into errors of their own."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:  # ignored, or somebody else's
        yield
        return

    def note(number: int, frame: FrameType | None) -> None:
        interrupts.append(number)
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _stamp(output: Path) -> int | None:
    """Changes when the folder is replaced."""
    record = output / "compression.json"
    try:
        return record.stat().st_ino
    except OSError:
        return None
