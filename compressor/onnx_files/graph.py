"""From a diffusers network to an ONNX file: a copy, example inputs, names for the dynamic axes, the trace."""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import CompressorError
from compressor.onnx_files import mend
from compressor.structure import Family

ROOT = "network"
"""What the network is called in the traced module; the scope names in the file begin with it."""

OUTPUTS = {"unet": "out_sample"}
"""Name of the output by family, as optimum-onnx reads it; that of any transformer is `out_hidden_states`."""

FLOAT32_INPUTS = frozenset({"timestep", "guidance", "time_ids", "img_ids", "txt_ids"})
"""Times, sizes and positions. A scheduler gives times as float32 and float16 would round them: 987.6 becomes 987.5."""

_TRACED_SIDE = 32

_CHATTER = {
    "torch.onnx._internal.exporter._registration": logging.ERROR,  # "torchvision is not installed"
    "onnxscript.version_converter": logging.CRITICAL,  # what comes of a failure is an opset that `check.opset` refuses
}
"""Loggers that are held back while torch exports, and up to where."""


@dataclass(frozen=True)
class Shape:
    """The sizes that an input is made for.

    Attributes:
        batch: samples.
        height: latent rows.
        width: latent columns.
        sequence: text tokens.
    """

    batch: int
    height: int
    width: int
    sequence: int

    def __str__(self) -> str:
        return ", ".join(f"{name} {size}" for name, size in asdict(self).items())


def traced_shape(network: Any, batch: int, height: int | None, width: int | None, sequence: int) -> Shape:
    """The shape to trace at.

    Args:
        network: a diffusers model; its config says which sizes it takes.
        batch: samples.
        height: latent rows, or None for a small default.
        width: latent columns, or None for a small default.
        sequence: text tokens.

    Raises:
        CompressorError: if the network does not take this height or width, or it is too small to stand for others.
    """
    unit, most = _unit(network.config), _most(network.config)
    own = network.config.get("sample_size") or _TRACED_SIDE
    rows, columns = (own, own) if isinstance(own, int) else own
    sides = {
        "height": height or max(2 * unit, min(rows, _TRACED_SIDE) // unit * unit),
        "width": width or max(2 * unit, min(columns, _TRACED_SIDE) // unit * unit),
    }
    for name, side in sides.items():
        if side % unit or not 2 * unit <= side <= most:
            limit = f" and at most {most}" if side > most else ""
            raise CompressorError(
                f"{name} {side} does not suit this {type(network).__name__}; "
                f"should be a multiple of {unit}, at least {2 * unit}{limit}"
            )
    return Shape(batch, sides["height"], sides["width"], sequence)


def other_shape(network: Any, shape: Shape) -> Shape:
    """A shape of more samples and tokens, fewer columns and more rows; fewer if the network takes no more."""
    unit = _unit(network.config)
    height = shape.height + (unit if shape.height + unit <= _most(network.config) else -unit)
    return Shape(shape.batch + 1, height, max(unit, shape.width - 2 * unit), shape.sequence + 5)


def copy_of(network: Any, dtype: torch.dtype) -> Any:
    """The network on the CPU in `dtype`, ready for inference; `network` is not changed.

    Weights that are there already in that dtype are shared, the others are cast one by one, so that there is never a
    second copy in the old dtype.
    """
    memo: dict[int, Any] = {}
    for parameter in network.parameters():
        memo[id(parameter)] = nn.Parameter(_cast(parameter.detach(), dtype, "cpu"), requires_grad=False)
    for buffer in network.buffers():
        memo[id(buffer)] = _cast(buffer, dtype, "cpu")
    return copy.deepcopy(network, memo).eval()


def write_config(network: Any, file: Path) -> None:
    """Writes diffusers' `config.json` of a network, without the path that it was loaded from."""
    config = json.loads(network.to_json_string())
    config.pop("_name_or_path", None)
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def example(family: Family, network: Any, shape: Shape, dtype: torch.dtype, seed: int) -> dict[tuple[str, ...], Tensor]:
    """Random inputs of the network as the file takes them.

    Args:
        family: makes them.
        network: on the CPU.
        shape: their sizes.
        dtype: theirs, except that times, sizes and positions are float32.
        seed: of the random numbers; torch's global generator is left as it was.

    Returns:
        Tensors by path: the argument's name, and the key within it where the argument is a dictionary.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = family.inputs(network, **asdict(shape))
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
    """A network that takes its inputs in order and returns one tensor: ONNX names inputs by their place.

    Args:
        network: a diffusers model.
        paths: where each input goes, as from `example`.
    """

    def __init__(self, network: nn.Module, paths: tuple[tuple[str, ...], ...]) -> None:
        super().__init__()
        setattr(self, ROOT, network)
        self.paths = paths

    def forward(self, *tensors: Tensor) -> Tensor:
        """Calls the network and takes the sample out of its result."""
        arguments: dict[str, Any] = {}
        for path, tensor in zip(self.paths, tensors, strict=True):
            if len(path) == 2:
                arguments.setdefault(path[0], {})[path[1]] = tensor
            else:
                arguments[path[0]] = tensor
        return getattr(self, ROOT)(**arguments, return_dict=False)[0]


def write(network: Any, family: Family, shape: Shape, dtype: torch.dtype, opset: int | None, file: Path) -> None:
    """Traces the network and writes it; above 2 GB the weights go into a file beside it.

    Args:
        network: on the CPU, in `dtype`, in inference mode.
        family: makes the inputs.
        shape: to trace at; every size of it is dynamic in the file.
        dtype: of the file.
        opset: or None for torch's default.
        file: where to.

    Raises:
        CompressorError: if torch cannot export this network.
    """
    inputs = example(family, network, shape, dtype, seed=0)
    names = [path[-1] for path in inputs]
    try:
        with torch.no_grad(), _quiet():
            program = torch.onnx.export(
                Positional(network, tuple(inputs)).eval(),
                tuple(inputs.values()),
                dynamo=True,
                verbose=False,
                opset_version=opset,
                input_names=names,
                output_names=[OUTPUTS.get(family.name, "out_hidden_states")],
                custom_translation_table=mend.TRANSLATIONS,
                dynamic_shapes=(_dynamic_axes(family, network, shape),),
            )
    except (torch.onnx.errors.OnnxExporterError, ValueError) as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise CompressorError(
            f"torch cannot export this {type(network).__name__} at {shape}"
            f"{'' if opset is None else f', opset {opset}'}: {reason}"
        ) from error
    assert program is not None  # only without dynamo
    mend.apply(program.model)
    program.save(file)


def _unit(config: Any) -> int:
    """Latent rows and columns come in multiples of this: a U-Net halves them, a transformer packs them in patches."""
    if "block_out_channels" in config:
        return 2 ** (len(config["block_out_channels"]) - 1)
    return max(2, config.get("patch_size", 1))


def _most(config: Any) -> float:
    """The most latent rows or columns that the network has positions for."""
    return config["pos_embed_max_size"] * config["patch_size"] if config.get("pos_embed_max_size") else float("inf")


def _cast(tensor: Tensor, dtype: torch.dtype, device: str | None = None) -> Tensor:
    return tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)


def _dynamic_axes(family: Family, network: Any, shape: Shape) -> tuple[dict[int, str], ...]:
    """Names every axis that changes with the batch, height, width or sequence, input by input.

    Found by asking the family for inputs of slightly larger sizes. An axis that changes with several of them, such as
    Flux's packed latents, is called after all, `height_width`.
    """
    unit = _unit(network.config)
    base = example(family, network, shape, torch.float32, seed=0)
    axes: dict[tuple[str, ...], dict[int, str]] = {path: {} for path in base}
    for name, size in asdict(shape).items():
        smaller = replace(shape, **{name: size - (unit if name in ("height", "width") else 1)})
        for path, tensor in example(family, network, smaller, torch.float32, seed=0).items():
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
