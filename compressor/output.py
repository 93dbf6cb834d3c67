"""The folder of a result: whether it may be written, and how a new result takes the place of an old one."""

from __future__ import annotations

import json
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compressor.errors import CompressorError

RECORD = "compression.json"
"""The file by which a folder is known as a result."""

PAGES = ("report.json", "report.html")
"""What a run writes beside it, of which no hash is kept."""


def claim(output: Path, source: Path | None, overwrite: bool) -> None:
    """Makes sure, before any work is done, that the result may be written to this folder.

    A folder that holds an earlier result and nothing else is replaced; any other that is not empty is left alone unless
    told otherwise.

    Args:
        output: the folder to write.
        source: the folder of the model that is read, if known.
        overwrite: replace a folder that is not an earlier result.

    Raises:
        CompressorError: if it may not be, or cannot be, written.
    """
    target = output.resolve()
    for kept, name in (
        (source, "the model that is read"),
        (Path.cwd(), "the current folder"),
        (Path.home(), "the home folder"),
    ):
        if kept is not None and (target == kept.resolve() or target in kept.resolve().parents):
            raise CompressorError(f"output: {output} holds {name} and would be replaced; choose another folder")
    if output.exists() and not output.is_dir():
        raise CompressorError(f"output: {output} is a file; should be a folder to write")
    if output.is_dir() and not overwrite and (stranger := _find_stranger(output)) is not None:
        raise CompressorError(
            f"output: {output} exists and is no earlier result, or not only that: it holds {stranger}; choose another "
            "folder, or give --overwrite to replace it and all that it holds"
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent):
            pass
    except OSError as error:
        raise CompressorError(f"output: {target.parent} cannot be written: {error.strerror}") from None


@contextmanager
def replacing(output: Path) -> Iterator[Path]:
    """Gives an empty folder beside `output`, which takes its place when the block ends without an error.

    Args:
        output: resolved; its parent exists. It stays as it was, and the new folder goes, if anything fails.
    """
    beside = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        yield beside
        beside.chmod(0o755)
        with _interrupts_held():
            _swap(beside, output)
    finally:
        with _interrupts_held():
            shutil.rmtree(beside, ignore_errors=True)


def write_whole(file: Path, text: str) -> None:
    """Writes a file in one step: whoever reads it, or ends this process, finds the former text or the new one."""
    beside = file.with_name(f".{file.name}.part")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(file)
    finally:
        beside.unlink(missing_ok=True)


def _find_stranger(output: Path) -> str | None:
    """Something in a folder that no run put there, or None if all of it is an earlier result."""
    try:
        record = json.loads((output / RECORD).read_text(encoding="utf-8"))
        files = {output / name for name in (*record["files"], RECORD, *PAGES)}
        exported = {output / name for exporter in record["recipe"]["export"] for name in exporter}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return min((path.name for path in output.iterdir()), default=None)
    ours = files | exported | {folder for file in files for folder in file.parents}
    strange = (path for path in output.rglob("*") if path not in ours and not exported.intersection(path.parents))
    return min((str(path.relative_to(output)) for path in strange), default=None)


def _swap(new: Path, output: Path) -> None:
    """Puts a folder in the place of another; if that fails, the old one is back, or still aside, but never removed."""
    if not output.exists():
        new.rename(output)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    old = aside / output.name
    try:
        output.rename(old)
        new.rename(output)
    except OSError:
        if old.exists():
            old.rename(output)
        aside.rmdir()
        raise
    shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C waits until the block is done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _frame: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if held:
            signal.raise_signal(signal.SIGINT)
