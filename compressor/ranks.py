"""The processes that share one job, as torchrun starts them: each samples some prompts and solves some layers."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from compressor.errors import CompressorError

T = TypeVar("T")

PATIENCE = timedelta(days=1)
"""How long a process waits for the others, which may be drawing or solving; one that has failed is noticed at once."""

_FAILED, _TOLD = "compressor/failed", "compressor/told"


class Ranks:
    """This process among those that share a job; alone, every method does nothing and costs nothing.

    Attributes:
        rank: from 0. Rank 0 alone writes and says what is done.
        count: how many processes there are.
    """

    def __init__(self, rank: int = 0, count: int = 1, store: Any = None) -> None:
        self.rank, self.count = rank, count
        self._store = store
        self._fast: Any = None

    @property
    def first(self) -> bool:
        """Whether this process writes and speaks."""
        return self.rank == 0

    def device(self, asked: str) -> str:
        """The device of this process, for that of the recipe; each process on a GPU has one of its own.

        Raises:
            CompressorError: if the recipe names a certain GPU, there are fewer than processes, or others have none.
        """
        if self.count == 1:
            return asked
        if asked == "cpu" or (asked == "auto" and not torch.cuda.is_available()):
            self.agree({"the kind of device": "cpu"})
            return "cpu"
        if asked not in ("auto", "cuda"):
            raise CompressorError(f"device: should be auto, cuda or cpu for {self.count} processes, found '{asked}'")
        local, gpus = int(os.environ.get("LOCAL_RANK", self.rank)), torch.cuda.device_count()
        if local >= gpus:
            raise CompressorError(
                f"device: there should be a GPU for each process, found {gpus}; start as many processes as GPUs"
            )
        torch.cuda.set_device(local)
        self.agree({"the kind of device": "cuda"})
        if self._fast is None:
            self._fast = dist.new_group(backend="nccl")
        return f"cuda:{local}"

    def mine(self, things: Sequence[T]) -> list[T]:
        """This process's share: every so manieth."""
        return list(things[self.rank :: self.count])

    def meet(self) -> None:
        """Waits for all processes to come here.

        Raises:
            SystemExit: if another one has failed, which tells why.
            CompressorError: if another one has ended without a word.
        """
        if self.count == 1:
            return
        work, turns = dist.barrier(async_op=True), 0
        assert work is not None
        while not work.is_completed():
            if turns % 50 == 0 and self._store.check([_FAILED]):
                raise SystemExit(1)
            time.sleep(0.002)
            turns += 1
        try:
            work.wait()
        except RuntimeError as error:
            time.sleep(1)  # what has failed may be on its way to tell
            if self._store.check([_FAILED]):
                raise SystemExit(1) from None
            raise CompressorError("another process of this job ended without a word; was it killed?") from error

    def gather(self, thing: T) -> list[T]:
        """What every process gives here, plain data or tensors on the CPU, by rank."""
        if self.count == 1:
            return [thing]
        self.meet()
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, thing)
        return found

    def agree(self, facts: Mapping[str, object]) -> None:
        """Makes sure that all processes found the same, as they do unless they run on machines that differ.

        Args:
            facts: plain data by what it is, in words.

        Raises:
            CompressorError: if another process found something else; the same one in every process.
        """
        here = platform.node()
        every = self.gather((here, dict(facts)))
        host, first = every[0]
        for rank, (other, found) in enumerate(every):
            for what in (*first, *(what for what in found if what not in first)):
                if first.get(what) != found.get(what):
                    raise CompressorError(
                        f"{what} should be the same for all processes, found {first.get(what, 'none')} for process 0 "
                        f"on {host} and {found.get(what, 'none')} for process {rank} on {other}"
                    )

    def add(self, tensor: Tensor, owner: int | None = None) -> None:
        """Sums a tensor over all processes, in place; those that are not the owner, if there is one, lose it.

        Args:
            tensor: of the same shape everywhere; everybody should have met before.
            owner: the rank that needs the sum, or None for all.
        """
        if self.count == 1:
            return
        group = self._fast if tensor.is_cuda else None
        if owner is None:
            dist.all_reduce(tensor, group=group)
        else:
            dist.reduce(tensor, owner, group=group)

    def send(self, linear: nn.Linear, owner: int) -> None:
        """Gives a layer's weight and bias, as one process has them, to all; everybody should have met before."""
        if self.count == 1:
            return
        for tensor in (linear.weight, linear.bias):
            if tensor is not None:
                whole = tensor.data.contiguous()
                dist.broadcast(whole, owner, group=self._fast if whole.is_cuda else None)
                tensor.data.copy_(whole)

    def leave(self) -> None:
        """Ends the sharing; rank 0 goes on alone."""
        if self.count > 1:
            self.meet()
            dist.destroy_process_group()
            self.count = 1

    def fails(self, code: int) -> bool:
        """Notes that this process has failed; whether it is the first, and so the one to tell why."""
        return self._store.compare_set(_FAILED, "", f"{self.rank} {code}").decode() == f"{self.rank} {code}"

    def told(self) -> None:
        """Notes that the failure has been told."""
        self._store.set(_TOLD, "yes")

    def code(self) -> int:
        """The exit code of the first that failed, once it has told why: else it might be ended before it does."""
        for _ in range(200):
            if self._store.check([_TOLD]):
                break
            time.sleep(0.05)
        return int(self._store.get(_FAILED).decode().split()[1])


ALONE = Ranks()


def digest(thing: object) -> str:
    """A short hash of plain data."""
    return hashlib.sha256(repr(thing).encode()).hexdigest()[:12]


def fingerprint(tensor: Tensor) -> int:
    """The sum of a tensor's bytes as whole numbers, which no order of summation changes."""
    return int(tensor.contiguous().view(-1).view(torch.uint8).sum(dtype=torch.int64))


def sources(packages: Iterable[str]) -> dict[str, str]:
    """A hash of the Python files of each installed package, by the words for it.

    Args:
        packages: import names; one that is a single file is hashed as such.
    """
    found = {}
    for name in packages:
        spec = importlib.util.find_spec(name)
        folders = [Path(folder) for folder in (spec.submodule_search_locations if spec else None) or ()]
        files = [file for folder in folders for file in folder.rglob("*.py")]
        files += [Path(spec.origin)] if spec and spec.origin and not files else []
        total = hashlib.sha256()
        for content in sorted(hashlib.sha256(file.read_bytes()).digest() for file in files):
            total.update(content)
        found[f"the source files of {name}"] = total.hexdigest()[:12]
    return found


@contextmanager
def joined() -> Iterator[Ranks]:
    """The processes that torchrun has started, of which this is one."""
    count = int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", timeout=PATIENCE)
    store: Any = dist.distributed_c10d._get_default_store()  # outlives the group: torchrun's own process keeps it
    yield Ranks(dist.get_rank(), count, store)
