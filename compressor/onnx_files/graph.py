"""From a diffusers network to an ONNX file: a copy, example inputs, names for the dynamic axes, the trace."""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import CompressorError
from compressor.onnx_files import mend
from compressor.onnx_files.pieces import Piece, Shape

ROOT = "network"
"""What the network is called in the traced module; the scope names in the file begin with it."""

FLOAT32_INPUTS = frozenset({"timestep", "guidance", "time_ids", "img_ids", "txt_ids"})
"""Times, sizes and positions. A scheduler gives times as float32 and float16 would round them: 987.6 becomes 987.5."""

_TRACED_SIDE = 32

_CHATTER = {
    "torch.onnx._internal.exporter._registration": logging.ERROR,  # "torchvision is not installed"
    "onnxscript.version_converter": logging.CRITICAL,  # what comes of a failure is an opset that `check.opset` refuses
}
"""Loggers that are held back while torch exports, and up to where."""


def traced_shape(piece: Piece, batch: int, height: int | None, width: int | None, sequence: int) -> Shape:
    """The shape to trace at.

    Args:
        piece: its module's config says which sizes it takes.
        batch: samples.
        height: latent rows, or None for a small default.
        width: latent columns, or None for a small default.
        sequence: text tokens; fewer if the piece takes no more.

    Raises:
        CompressorError: if the piece does not take this height or width, or it is too small to stand for others.
    """
    unit, most = piece.unit, piece.most
    own = piece.module.config.get("sample_size") or _TRACED_SIDE if "height" in piece.sizes else _TRACED_SIDE
    rows, columns = (own, own) if isinstance(own, int) else own
    sides = {
        "height": height or max(2 * unit, min(rows, _TRACED_SIDE) // unit * unit),
        "width": width or max(2 * unit, min(columns, _TRACED_SIDE) // unit * unit),
    }
    for name, side in sides.items():
        if side % unit or not 2 * unit <= side <= most:
            limit = f" and at most {most}" if side > most else ""
            raise CompressorError(
                f"{name} {side} does not suit this {type(piece.module).__name__}; "
                f"should be a multiple of {unit}, at least {2 * unit}{limit}"
            )
    return Shape(batch, sides["height"], sides["width"], int(min(sequence, piece.longest)))


def other_shape(piece: Piece, shape: Shape) -> Shape:
    """A shape of more samples and tokens, fewer columns and more rows; fewer if the piece takes no more."""
    unit = piece.unit
    height = shape.height + (unit if shape.height + unit <= piece.most else -unit)
    sequence = shape.sequence + (5 if shape.sequence + 5 <= piece.longest else -1)
    return Shape(shape.batch + 1, height, max(unit, shape.width - 2 * unit), sequence)


def copy_of(network: Any, dtype: torch.dtype) -> Any:
    """The network on the CPU in `dtype`, ready for inference; `network` is not changed.

    Weights that are there already in that dtype are shared, the others are cast one by one, so that there is never a
    second copy in the old dtype. What its class keeps in float32, such as T5's last projections, stays so in float16.
    """
    memo: dict[int, Any] = {}
    kept = set(getattr(network, "_keep_in_fp32_modules", None) or ()) if dtype is torch.float16 else set()
    for name, parameter in network.named_parameters():
        own = torch.float32 if kept.intersection(name.split(".")) else dtype
        memo[id(parameter)] = nn.Parameter(_cast(parameter.detach(), own, "cpu"), requires_grad=False)
    for buffer in network.buffers():
        memo[id(buffer)] = _cast(buffer, dtype, "cpu")
    return copy.deepcopy(network, memo).eval()


def write_config(network: Any, file: Path) -> None:
    """Writes the `config.json` of a component, without the path that it was loaded from."""
    owner = network.config if hasattr(network.config, "to_json_string") else network  # transformers, diffusers
    config = json.loads(owner.to_json_string())
    config.pop("_name_or_path", None)
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def example(piece: Piece, network: Any, shape: Shape, dtype: torch.dtype, seed: int) -> dict[tuple[str, ...], Tensor]:
    """Random inputs as the file takes them.

    Args:
        piece: makes them.
        network: a copy of its module, on the CPU.
        shape: their sizes.
        dtype: theirs, except that times, sizes and positions are float32, and tokens are whole numbers.
        seed: of the random numbers; torch's global generator is left as it was.

    Returns:
        Tensors by path: the argument's name, and the key within it where the argument is a dictionary.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = piece.inputs(network, shape)
    inputs: dict[tuple[str, ...], Tensor] = {}
    for name, value in made.items():
        if isinstance(value, Mapping):
            inputs |= {(name, key): tensor for key, tensor in value.items()}
        else:
            inputs[(name,)] = value
    if ("timestep",) in inputs:  # neighbours at different times (by eighths, exact in float16): none may stand for all
        time = inputs[("timestep",)].float()
        inputs[("timestep",)] = time * (1 - torch.arange(time.numel()).reshape(time.shape) % 4 / 8)
    return {path: _cast(x, torch.float32 if path[-1] in FLOAT32_INPUTS else dtype) for path, x in inputs.items()}


class Positional(nn.Module):
    """A module that takes its inputs in order and returns a tuple of tensors: ONNX names inputs by their place.

    Args:
        piece: says how to call it.
        network: a copy of the piece's module.
        paths: where each input goes, as from `example`.
    """

    def __init__(self, piece: Piece, network: nn.Module, paths: tuple[tuple[str, ...], ...]) -> None:
        super().__init__()
        setattr(self, ROOT, network)
        self.call, self.paths = piece.call, paths

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Calls the network and takes the tensors out of its result."""
        arguments: dict[str, Any] = {}
        for path, tensor in zip(self.paths, tensors, strict=True):
            if len(path) == 2:
                arguments.setdefault(path[0], {})[path[1]] = tensor
            else:
                arguments[path[0]] = tensor
        return self.call(getattr(self, ROOT), arguments)


def write(piece: Piece, network: Any, shape: Shape, dtype: torch.dtype, opset: int | None, file: Path) -> None:
    """Traces a piece and writes it; above 2 GB the weights go into a file beside it.

    Args:
        piece: names inputs and outputs.
        network: a copy of its module, on the CPU, in `dtype`, in inference mode.
        shape: to trace at; every size of it is dynamic in the file.
        dtype: of the file.
        opset: or None for torch's default.
        file: where to.

    Raises:
        CompressorError: if torch cannot export this network.
    """
    inputs = example(piece, network, shape, dtype, seed=0)
    axes = _dynamic_axes(piece, network, shape)
    try:
        with torch.no_grad(), _quiet():
            program = torch.onnx.export(
                Positional(piece, network, tuple(inputs)).eval(),
                tuple(inputs.values()),
                dynamo=True,
                verbose=False,
                opset_version=opset,
                input_names=[path[-1] for path in inputs],
                output_names=list(piece.outputs),
                custom_translation_table=mend.TRANSLATIONS,
                dynamic_shapes=(axes,),
            )
    except (torch.onnx.errors.OnnxExporterError, ValueError) as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise CompressorError(
            f"torch cannot export this {type(network).__name__} at {shape}"
            f"{'' if opset is None else f', opset {opset}'}: {reason}"
        ) from error
    assert program is not None  # only without dynamo
    mend.apply(program.model, [axes[0] if own is None else own for own in piece.outputs.values()])
    program.save(file)


def _cast(tensor: Tensor, dtype: torch.dtype, device: str | None = None) -> Tensor:
    return tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)


def _dynamic_axes(piece: Piece, network: Any, shape: Shape) -> tuple[dict[int, str], ...]:
    """Names every axis that changes with the batch, height, width or sequence, input by input.

    Found by asking for inputs of slightly other sizes. An axis that changes with several of them, such as Flux's packed
    latents, is called after all, `height_width`.
    """
    base = example(piece, network, shape, torch.float32, seed=0)
    axes: dict[tuple[str, ...], dict[int, str]] = {path: {} for path in base}
    for name in piece.sizes:
        step = piece.unit if name in ("height", "width") else 1
        smaller = replace(shape, **{name: getattr(shape, name) - step})
        for path, tensor in example(piece, network, smaller, torch.float32, seed=0).items():
            for axis, (now, then) in enumerate(zip(base[path].shape, tensor.shape, strict=True)):
                if now != then:
                    axes[path][axis] = f"{axes[path][axis]}_{name}" if axis in axes[path] else name
    return tuple(axes.values())


@contextmanager
def _quiet() -> Iterator[None]:
    """Holds back what torch's exporter says of its own inside, and nothing else."""
    levels = {name: logging.getLogger(name).level for name in _CHATTER}
    for name, level in _CHATTER.items():
        logging.getLogger(name).setLevel(level)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)", FutureWarning)
            warnings.filterwarnings("ignore", r"# The axis name: \w+ will not be used", UserWarning)  # one name twice
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
