"""`compressor probe` and `compressor bench`: times on the user's own machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from compressor.cli.arguments import BATCH, HALF
from compressor.cli.ending import importing


@click.command()
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
    with importing():
        from compressor import quiet
        from compressor.bench.probe import Settings
        from compressor.bench.probe import run as measure_all
        from compressor.progress import Progress

        quiet.silence_libraries()
    click.echo(measure_all(Settings(models, **options), Progress(), output), nl=False)
    if output is not None:
        click.echo(f"table: {output}")


@click.group()
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
    with importing():
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
    with importing():
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
@click.option("--stride", type=click.IntRange(1), help="In steps, of the network's runs; as in a run if not given.")
@click.option("--guidance", type=click.FloatRange(0), help="Above 1 a prompt takes two samples, where a model has it.")
@click.option("--batch", type=click.IntRange(1), help="Prompts at a time; 4 if not given, and a recipe's own.")
@click.option("--packages", type=click.IntRange(1), help="Module Packages; 4 if not given, and a recipe's own.")
@click.option("--solver", type=click.Choice(["obs", "admm"]), help="Of single weights and 2:4; a recipe has its own.")
@click.option("--at", metavar="MODEL", help="Time a recipe at this known model's size, instead of its own network's.")
@click.option("--layers", type=click.IntRange(1), help="Shorten each part of the network to so many.")
@click.option("--compile", is_flag=True, help="Time compiled forwards, too; a recipe may ask for it itself.")
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
    and flux-dev, with the pruners of the published tables at the paper's setting, but for the stride; or a recipe, with
    its own.
    """
    with importing():
        from compressor import quiet
        from compressor.bench.prune import Settings
        from compressor.bench.prune import run as time_all
        from compressor.bench.subjects import Asked
        from compressor.progress import Progress

        quiet.silence_libraries()
    settings = Settings(models, Asked(**asked), device, dtype, repeats, turns)
    click.echo(time_all(settings, Progress(), output), nl=False)
