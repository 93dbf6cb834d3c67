"""`compressor run`: alone, or as one of several processes that torchrun started."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from pathlib import Path
from typing import NoReturn

import click

from compressor import recipe
from compressor.cli.arguments import RECIPE, SET
from compressor.cli.ending import importing, in_words, noting, stamp
from compressor.errors import CompressorError
from compressor.output import RECORD


@click.command()
@RECIPE
@SET
@click.option("--overwrite", is_flag=True, help="Replace an output folder that is not an earlier result.")
def run(recipe_file: str, overrides: tuple[str, ...], overwrite: bool) -> None:
    """Prune, prove, save and export what RECIPE says.

    RECIPE is a YAML file, or the name of one that came with the package (see `compressor recipes`).
    """
    if is_shared():
        _run_shared(recipe_file, overrides, overwrite)
    loaded = recipe.load(recipe_file, overrides)
    output = Path(loaded.output)
    before = stamp(output / RECORD)
    with importing():
        from compressor import quiet
        from compressor.progress import Progress
        from compressor.run import run as run_recipe

        quiet.silence_libraries()
    interrupts: list[int] = []
    try:
        with noting(interrupts):
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
    if stamp(output / RECORD) != before:
        return f"the pruned pipeline in {output} is complete; what was to follow is not"
    if before is not None:
        return f"nothing new was kept; the earlier result in {output} is as it was"
    return "nothing was kept"


def is_shared() -> bool:
    """Whether torchrun has started this process as one of several."""
    return "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("WORLD_SIZE") != "1"


def _run_shared(recipe_file: str, overrides: tuple[str, ...], overwrite: bool) -> NoReturn:
    """The same in one of several processes: whichever fails first tells why, and all end with its exit code."""
    with importing():
        from rich.console import Console

        from compressor import quiet, ranks
        from compressor.progress import Progress
        from compressor.run import run as run_recipe

        quiet.silence_libraries()
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(1))  # so that what was begun is cleaned up
    interrupts: list[int] = []
    output, before = None, None
    with ranks.joined() as shared:
        code, words = 0, ""
        try:
            with noting(interrupts):
                loaded = recipe.load(recipe_file, overrides)
                output = Path(loaded.output)
                before = stamp(output / RECORD)
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
        return 1, in_words(error)
    if isinstance(error, OSError):
        return 1, f"error: {error.filename}: {error.strerror}" if error.filename else f"error: {error}"
    return 1, "".join(traceback.format_exception(error)).rstrip()
