"""Processes with the variables that torchrun gives them, forked from a server that imports everything once."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    ["tests.tiny", "tests.processes", "compressor.cli", "compressor.run", "compressor.ranks"]
)
PATIENCE = 100.0
"""Seconds after which the processes are taken to wait for each other for ever."""


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code, below 0 a signal's number, what it wrote, and what its function returned."""

    code: int | None
    stdout: str
    stderr: str
    result: Any


def together(
    count: int,
    function: Callable[..., object],
    *arguments: object,
    folder: Path,
    environment: Mapping[str, str] | None = None,
    interrupt: Callable[[Path], bool] | None = None,
) -> list[Ended]:
    """Calls a function in several processes at once, and waits for all of them.

    Args:
        count: of processes.
        function: of a module, not nested; what it returns is plain data or tensors.
        arguments: its arguments.
        folder: for what they write; made if it is not there.
        environment: more variables.
        interrupt: told the file of rank 0's error output; once it says so, all are interrupted, as by Ctrl-C.
    """
    folder.mkdir(exist_ok=True)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    given = {
        "TORCHELASTIC_RUN_ID": "none",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": str(count),
    }
    processes = []
    for rank in range(count):
        variables = given | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | dict(environment or {})
        process = _SERVER.Process(target=_begin, args=(variables, folder / str(rank), function, arguments))
        process.start()
        processes.append(process)
    try:
        waited = 0.0
        while any(process.is_alive() for process in processes) and waited < PATIENCE:
            processes[0].join(0.1) if processes[0].is_alive() else [p.join(0.1) for p in processes]
            waited += 0.1
            if interrupt is not None and interrupt(folder / "0.stderr"):
                interrupt = None
                for process in processes:
                    os.kill(process.pid or 0, signal.SIGINT)
        assert not any(process.is_alive() for process in processes), "they wait for ever"
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [_end(process.exitcode, folder / str(rank)) for rank, process in enumerate(processes)]


def _begin(variables: dict[str, str], place: Path, function: Callable[..., object], arguments: tuple) -> None:
    os.environ.update(variables)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server ignores it
    for number, name in ((1, "stdout"), (2, "stderr")):
        with place.with_suffix(f".{name}").open("wb") as file:
            os.dup2(file.fileno(), number)
    torch.set_num_threads(1)
    torch.save(function(*arguments), place.with_suffix(".pt"))


def _end(code: int | None, place: Path) -> Ended:
    texts = [place.with_suffix(f".{name}").read_text() for name in ("stdout", "stderr")]
    result = place.with_suffix(".pt")
    return Ended(code, texts[0], texts[1], torch.load(result, weights_only=False) if result.exists() else None)
