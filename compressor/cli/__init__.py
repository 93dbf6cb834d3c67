"""The command line. What needs torch is imported inside the commands that need it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import click

from compressor import prompts, recipe, registry
from compressor.cli import running, timing
from compressor.cli.arguments import RECIPE, SET
from compressor.cli.ending import importing, in_words, stamp
from compressor.errors import CompressorError


class Commands(click.Group):
    """Prints what a user can mend without a traceback, and ends calmly on Ctrl-C."""

    def invoke(self, ctx: click.Context) -> object:
        """Runs a command; a CompressorError becomes one message and exit code 1, Ctrl-C exit code 130."""
        try:
            return super().invoke(ctx)
        except CompressorError as error:
            click.echo(in_words(error), err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            click.echo("\ninterrupted", err=True)
            ctx.exit(130)
        except BrokenPipeError:
            raise
        except OSError as error:
            click.echo(f"error: {error.filename}: {error.strerror}" if error.filename else f"error: {error}", err=True)
            ctx.exit(1)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="diffusion-compressor")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Makes text-to-image diffusion models smaller and faster in one shot, as a recipe says."""
    if ctx.invoked_subcommand != "run" and running.is_shared():
        if os.environ["RANK"] != "0":
            ctx.exit(0)  # rank 0 tells, and torchrun ends with its exit code
        raise CompressorError(
            f"{ctx.invoked_subcommand}: should be started as one process, found {os.environ['WORLD_SIZE']} under "
            "torchrun; several may share a run"
        )


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
    with importing():
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
    before = stamp(out / "compare.json")
    with importing():
        from compressor import quiet
        from compressor.compare import compare as try_all
        from compressor.progress import Progress

        quiet.silence_libraries()
    try:
        try_all(loaded, Progress(), out)
    except KeyboardInterrupt:
        kept = "nothing was compared"
        if stamp(out / "compare.json") != before:
            done = len(json.loads((out / "compare.json").read_text(encoding="utf-8"))["rows"])
            kept = f"{done} of {len(loaded.prune)} entries were compared: {out / 'compare.md'}"
        click.echo(f"\ninterrupted: {kept}", err=True)
        sys.exit(130)
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
    with importing():
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
    with importing():
        from compressor import exported, quiet

        quiet.silence_libraries()
    for line in exported.verify_all(folder):
        click.echo(line)


@main.command()
def doctor() -> None:
    """Show versions, devices, optional backends and plugins."""
    with importing():
        from compressor.doctor import examine

    for heading, rows in examine().items():
        click.echo(heading)
        for left, right in rows:
            click.echo(f"  {left:<22} {right}")


@main.command()
def schema() -> None:
    """Print a JSON Schema of recipes with the plugins installed here; editors complete from it."""
    click.echo(json.dumps(recipe.schema(), indent=2))


for command in (running.run, timing.probe, timing.bench):
    main.add_command(command)
