"""A linear layer's product with a 2:4 weight, by cuSPARSELt: what it needs, packing, the fastest kernel, its time."""

# Shapes: T tokens, I inputs, O outputs.

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from compressor.errors import CompressorError
from compressor.sparsity import lowest_of_groups

Algorithm = tuple[int, int, int]
"""cuSPARSELt's number of a kernel, how often it splits the inputs, and the way of splitting."""

TOLERANCE = {torch.bfloat16: 1e-2}
"""By dtype that products are tried in, the largest relative L2 difference of a 2:4 product from the dense one of the
same weights. Float16 is left out: in it, a kernel of cuSPARSELt 0.8 was seen to end with an illegal instruction."""

WEIGHT, TOKENS = 32, 8
"""What cuSPARSELt wants both sides of a half-precision weight, and the number of tokens, to be multiples of."""

LEAST = 256
"""Tokens, inputs and outputs from which on products are tried: below, 2:4 gains nothing, and one of the kernels of
cuSPARSELt 0.8 was seen to end with an illegal instruction, after which a process can use the GPU no more."""

_TORCH: Any = torch  # which does not export these names in a way that type checkers see

COLD = 256 * 2**20
"""Bytes that a timed series of products goes through: more than the cache of a GPU holds, as a whole network does."""


@dataclass(frozen=True)
class Timed:
    """A shape, timed dense and 2:4 in turns.

    Attributes:
        dense: seconds of one product, for every turn.
        sparse: the same of the 2:4 product; empty if there is none.
        algorithm: the fastest one that is right.
        error: relative L2 difference from the dense product.
        note: why there is no 2:4 product.
    """

    dense: tuple[float, ...]
    sparse: tuple[float, ...] = ()
    algorithm: Algorithm | None = None
    error: float | None = None
    note: str = ""


def problem(device: torch.device) -> str | None:
    """What is missing here for 2:4 products, in words; None if nothing is."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return f"needs an NVIDIA GPU of compute capability 8.0 or later, found {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8 or torch.version.hip is not None:
        return f"needs an NVIDIA GPU of compute capability 8.0 or later, found {major}.{minor}"
    if not torch.backends.cusparselt.is_available():
        return f"needs a torch built with cuSPARSELt, found torch {torch.__version__} without it"
    return None


def check(what: str, device: torch.device) -> None:
    """Refuses a machine that has no 2:4 products.

    Raises:
        CompressorError: saying what is missing, after `what` needs it.
    """
    if (found := problem(device)) is not None:
        raise CompressorError(f"{what} {found}")


def version() -> str:
    """Of cuSPARSELt, such as `0.8.0`."""
    number = torch.backends.cusparselt.version()
    return "?" if number is None else f"{number // 1000}.{number // 100 % 10}.{number % 100}"


def gpu(device: torch.device) -> str:
    """A GPU's name."""
    return torch.cuda.get_device_name(device)


def unfit(tokens: int, inputs: int, outputs: int) -> str:
    """Why there is no 2:4 product of a shape; nothing if there is one."""
    if min(tokens, inputs, outputs) < LEAST:
        return f"not tried below {LEAST} tokens, inputs and outputs"
    if outputs % WEIGHT == 0 and inputs % WEIGHT == 0:
        return ""
    return f"cuSPARSELt needs inputs and outputs that are multiples of {WEIGHT}"


def pack(weight_OI: Tensor) -> Tensor:
    """The weights that are kept, and where they are."""
    return _TORCH._cslt_compress(weight_OI.contiguous())


@torch.library.custom_op("compressor::linear_2_4", mutates_args=())
def linear(
    x: Tensor, packed: Tensor, bias: Tensor | None, outputs: int, kernel: int, splits: int, split_mode: int
) -> Tensor:
    """`torch.nn.functional.linear` with a packed 2:4 weight.

    Args:
        x: ... x inputs.
        packed: from `pack`.
        bias: of as many values as outputs, or None.
        outputs: rows of the weight.
        kernel: as in `Algorithm`.
        splits: as there.
        split_mode: as there.
    """
    return multiply(x, packed, bias, outputs, (kernel, splits, split_mode))


@torch.library.register_fake("compressor::linear_2_4")
def _(
    x: Tensor, packed: Tensor, bias: Tensor | None, outputs: int, kernel: int, splits: int, split_mode: int
) -> Tensor:
    return x.new_empty((*x.shape[:-1], outputs))


def multiply(x: Tensor, packed: Tensor, bias: Tensor | None, outputs: int, algorithm: Algorithm) -> Tensor:
    """One call of cuSPARSELt; tokens are padded to what it takes."""
    x_TI = x.reshape(-1, x.shape[-1]).contiguous()  # a view's strides are not looked at
    tokens = x_TI.shape[0]
    if tokens % TOKENS:
        x_TI = functional.pad(x_TI, (0, 0, 0, -tokens % TOKENS))
    kernel, splits, mode = algorithm
    y_TO = _TORCH._cslt_sparse_mm(
        packed, x_TI.t(), bias, transpose_result=True, alg_id=kernel, split_k=splits, split_k_mode=mode
    )
    return y_TO[:tokens].reshape(*x.shape[:-1], outputs)


def record(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """A CUDA graph of a call: replaying it costs Python nothing, and its results lie where the first ones did.

    Args:
        call: what is recorded, after two calls that are not.
        device: the GPU that it computes on.
    """
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = call()

    def replay() -> object:
        with torch.cuda.device(device):
            graph.replay()
        return result

    return replay


@torch.no_grad()
def measure(
    tokens: int, inputs: int, outputs: int, *, bias: bool, dtype: torch.dtype, device: torch.device, turns: int
) -> Timed:
    """Times a product with random values dense and 2:4, each in a CUDA graph of a series with cold weights.

    Every kernel that cuSPARSELt has for the shape is tried; the fastest one whose result is that of the dense product
    with the same 2:4 weights is timed against the dense product of the weights before.

    Args:
        tokens: rows of the input.
        inputs: of the layer.
        outputs: of the layer.
        bias: whether it has one.
        dtype: a key of `TOLERANCE`.
        device: a GPU for which `problem` finds none.
        turns: of dense and 2:4.
    """
    size = dtype.itemsize * (inputs * outputs + tokens * (inputs + outputs))
    copies = min(16, max(2, math.ceil(COLD / size)))
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    with torch.cuda.device(device):
        xs = [random(tokens, inputs) for _ in range(copies)]
        weights = [random(outputs, inputs) for _ in range(copies)]
        bias_O = random(outputs) if bias else None
        dense = record(lambda: [functional.linear(x, w, bias_O) for x, w in zip(xs, weights, strict=True)], device)
        note = unfit(tokens, inputs, outputs)
        if note:
            return Timed(_times([dense], turns, copies)[0], note=note)
        sparse_OI = [w.masked_fill(lowest_of_groups(w.float().abs(), 2, 4), 0) for w in weights]
        packed = [pack(w) for w in sparse_OI]
        right = functional.linear(xs[0], sparse_OI[0], bias_O)
        del sparse_OI

        def series(algorithm: Algorithm) -> Callable[[], object]:
            return lambda: [multiply(x, p, bias_O, outputs, algorithm) for x, p in zip(xs, packed, strict=True)]

        algorithm, error = _fastest(
            candidates(xs[0], packed[0], bias_O),
            lambda candidate: _times([record(series(candidate), device)], 3, copies)[0],
            lambda candidate: difference(multiply(xs[0], packed[0], bias_O, outputs, candidate), right),
            TOLERANCE[dtype],
        )
        if algorithm is None:
            return Timed(_times([dense], turns, copies)[0], note=str(error))
        assert isinstance(error, float)
        in_turns = _times([dense, record(series(algorithm), device)], turns, copies)
    return Timed(in_turns[0], in_turns[1], algorithm, error)


def settle() -> None:
    """Waits for the GPU, and forgets what a kernel that could not be launched left to be told to the next call."""
    with suppress(RuntimeError):
        torch.cuda.synchronize()


def candidates(x_TI: Tensor, packed: Tensor, bias: Tensor | None) -> Iterator[Algorithm]:
    """The kernel that cuSPARSELt's own search takes, and then all of them without splitting."""
    if x_TI.shape[0] % TOKENS:
        x_TI = functional.pad(x_TI, (0, 0, 0, -x_TI.shape[0] % TOKENS))
    library: Any = import_module("torch._C")._cusparselt
    try:
        kernel, splits, mode, kernels = library.mm_search(packed, x_TI.t(), bias, None, None, True)
        yield kernel, splits, mode
    except RuntimeError:  # it searches nothing where one kernel does not take the shape
        settle()
        kernels = 10
    yield from ((number, 1, -1) for number in range(kernels))


def difference(found: Tensor, right: Tensor) -> float:
    """Relative L2, in float32."""
    return float((found.float() - right.float()).norm() / right.float().norm())


def _fastest(
    tried: Iterator[Algorithm],
    seconds: Callable[[Algorithm], Sequence[float]],
    error: Callable[[Algorithm], float],
    tolerance: float,
) -> tuple[Algorithm | None, float | str]:
    """The fastest algorithm whose error is within the tolerance, with that; or None and what was wrong."""
    found: list[tuple[float, Algorithm]] = []
    reason = "cuSPARSELt has no kernel for it"
    for algorithm in tried:
        try:
            found.append((min(seconds(algorithm)), algorithm))
        except RuntimeError as problem:  # a kernel that does not take this shape; the others are tried
            if "out of memory" in str(problem):
                raise
            settle()
            reason = f"cuSPARSELt has no kernel for it: {str(problem).splitlines()[0]}"
    for _, algorithm in sorted(found):
        off = error(algorithm)
        if off <= tolerance:
            return algorithm, off
        reason = f"its result is off by {off:.1e}, should be at most {tolerance:.0e}"
    return None, reason


def _times(replays: Sequence[Callable[[], object]], turns: int, calls: int) -> list[tuple[float, ...]]:
    """Seconds of one call in each graph, for every turn; each turn's replay stands behind one that is not timed."""
    found: list[list[float]] = [[] for _ in replays]
    for _ in range(turns):
        for replay, seconds in zip(replays, found, strict=True):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            replay()
            begin.record()
            replay()
            end.record()
            end.synchronize()
            seconds.append(begin.elapsed_time(end) / 1000 / calls)
    return [tuple(seconds) for seconds in found]
