"""What of a pipeline becomes an ONNX file: the network, each text encoder, and the two halves of the autoencoder.

File, input and output names are those that optimum-onnx writes and reads, so that its pipelines can run the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from compressor.errors import CompressorError
from compressor.structure.family import find_targets, like

if TYPE_CHECKING:
    from compressor.pipeline import Pipeline
    from compressor.structure import Target

Size = Literal["batch", "height", "width", "sequence"]
Inputs = Mapping[str, Tensor | Mapping[str, Tensor]]

OUTPUTS = {"unet": "out_sample"}
"""Name of the network's output by family, as optimum-onnx reads it; of any transformer it is `out_hidden_states`."""

NETWORKS = ("transformer", "unet")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
VAE = {"vae_encoder": "vae", "vae_decoder": "vae"}


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


@dataclass(frozen=True)
class Piece:
    """What becomes one ONNX file.

    Attributes:
        name: of its folder: `transformer`, `unet`, `text_encoder_2`, `vae_decoder`, ...
        component: of the pipeline, to which it belongs: `vae` for `vae_decoder`.
        module: the component; not changed.
        inputs: makes random inputs of the module, of the given sizes and in the module's dtype.
        call: calls a copy of the module with such inputs; returns what the file gives.
        outputs: their names, each with its dynamic axes; None for those of the first input.
        sizes: which sizes its inputs depend on.
        unit: latent rows and columns come in multiples of this.
        most: the most latent rows or columns that it has positions for.
        longest: the most text tokens.
        halves: whether its config lets it compute in float16.
        targets: the linears in it that may have been pruned.
    """

    name: str
    component: str
    module: Any
    inputs: Callable[[Any, Shape], Inputs]
    call: Callable[[Any, dict[str, Any]], tuple[Tensor, ...]]
    outputs: Mapping[str, dict[int, str] | None]
    sizes: tuple[Size, ...]
    unit: int = 1
    most: float = float("inf")
    longest: float = float("inf")
    halves: bool = True
    targets: tuple[Target, ...] = ()


def known(name: str) -> str | None:
    """The component that a piece of this name belongs to, or None if no piece has such a name."""
    return name if name in (*NETWORKS, *TEXT_ENCODERS) else VAE.get(name)


def find(pipeline: Pipeline, names: Iterable[str] | None = None) -> tuple[list[Piece], dict[str, str]]:
    """The pieces of a pipeline.

    Args:
        pipeline: loaded; or one that is nothing but its network.
        names: which ones; all that can be had if not given.

    Returns:
        The pieces, the network first, and why each model that `names` does not ask for cannot be one, by component.

    Raises:
        CompressorError: if one that is asked for is not there or cannot be had.
    """
    made, why = [network(pipeline)], {}
    for component in pipeline.folder.components:
        if component == pipeline.component_name or pipeline.pipe is None or component not in pipeline.stored:
            continue
        module = getattr(pipeline.pipe, component)
        kind = type(module).__name__
        if kind in _MAKERS:
            made += _MAKERS[kind](component, module)
        else:
            why[component] = f"a {kind} cannot be written as ONNX yet; known: {', '.join(_MAKERS)}"
    if names is None:
        return made, why
    having = {piece.name: piece for piece in made}
    for name in names:
        if name not in having:
            reason = why.get(name) or f"{pipeline.folder.pipeline_class or 'the pipeline'} has {', '.join(having)}"
            raise CompressorError(f"components: no '{name}' to export: {reason}")
    return [piece for piece in made if piece.name in set(names)], {}


def network(pipeline: Pipeline) -> Piece:
    """The network of a pipeline, with the linears that may have been pruned."""
    family, module = pipeline.family, pipeline.module
    config: Any = module.config
    return Piece(
        pipeline.component_name,
        pipeline.component_name,
        module,
        lambda module, shape: family.inputs(module, **asdict(shape)),
        lambda module, arguments: (module(**arguments, return_dict=False)[0],),
        {OUTPUTS.get(family.name, "out_hidden_states"): None},
        ("batch", "height", "width", "sequence"),
        unit_of(config),
        config["pos_embed_max_size"] * config["patch_size"] if config.get("pos_embed_max_size") else float("inf"),
        targets=find_targets(pipeline.module, pipeline.family, adaln=True),
    )


def _clip(component: str, module: Any) -> list[Piece]:
    """CLIP's text model; all its hidden states are given, for pipelines read the last but one."""
    config = module.config
    first = "text_embeds" if hasattr(module, "text_projection") else None
    hidden = [f"hidden_states.{i}" for i in range(config.num_hidden_layers + 1)]
    tokens: dict[int, str] = {0: "batch", 1: "sequence"}
    outputs: dict[str, dict[int, str]] = {
        **({"text_embeds": {0: "batch"}} if first else {}),
        "last_hidden_state": tokens,
        **({} if first else {"pooler_output": {0: "batch"}}),
        **dict.fromkeys(hidden, tokens),
    }

    def call(module: Any, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
        found = module(**arguments, output_hidden_states=True)
        pooled = (found.text_embeds, found.last_hidden_state) if first else (found.last_hidden_state, found[1])
        return *pooled, *found.hidden_states

    longest = config.max_position_embeddings
    return [Piece(component, component, module, _ids, call, outputs, ("batch", "sequence"), longest=longest)]


def _t5(component: str, module: Any) -> list[Piece]:
    def call(module: Any, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
        return (module(**arguments)[0],)

    outputs = {"last_hidden_state": {0: "batch", 1: "sequence"}}
    return [Piece(component, component, module, _ids, call, outputs, ("batch", "sequence"))]


def _vae(component: str, module: Any) -> list[Piece]:
    """The two halves of an autoencoder; the encoder gives mean and log variance of its latents, side by side."""
    config = module.config
    factor = 2 ** (len(config.block_out_channels) - 1)
    halves = not config.get("force_upcast", True)

    def images(module: Any, shape: Shape) -> Inputs:
        device, dtype = like(module)
        size = (shape.batch, config.in_channels, factor * shape.height, factor * shape.width)
        return {"sample": torch.randn(size, device=device, dtype=dtype)}

    def latents(module: Any, shape: Shape) -> Inputs:
        device, dtype = like(module)
        size = (shape.batch, config.latent_channels, shape.height, shape.width)
        return {"latent_sample": torch.randn(size, device=device, dtype=dtype)}

    def encode(module: Any, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
        return (module.encode(arguments["sample"]).latent_dist.parameters,)

    def decode(module: Any, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
        return (module.decode(arguments["latent_sample"], return_dict=False)[0],)

    smaller = {0: "batch", 2: f"height / {factor}", 3: f"width / {factor}"}
    larger = {0: "batch", 2: f"height * {factor}", 3: f"width * {factor}"}
    sizes: tuple[Size, ...] = ("batch", "height", "width")
    return [
        Piece("vae_encoder", component, module, images, encode, {"latent_parameters": smaller}, sizes, halves=halves),
        Piece("vae_decoder", component, module, latents, decode, {"sample": larger}, sizes, halves=halves),
    ]


_MAKERS: dict[str, Callable[[str, Any], list[Piece]]] = {
    "CLIPTextModel": _clip,
    "CLIPTextModelWithProjection": _clip,
    "T5EncoderModel": _t5,
    "AutoencoderKL": _vae,
}


def _ids(module: Any, shape: Shape) -> Inputs:
    """Random tokens; each row ends at a place of its own, for CLIP pools where it finds the end."""
    config = module.config
    ids = torch.randint(0, config.vocab_size, (shape.batch, shape.sequence))
    if (end := getattr(config, "eos_token_id", None)) is not None and end < config.vocab_size:
        ids = torch.where(ids == end, (end + 1) % config.vocab_size, ids)
        rows = torch.arange(shape.batch)
        ids[rows, shape.sequence - 1 - rows % shape.sequence] = end
    return {"input_ids": ids.to(like(module)[0])}


def unit_of(config: Any) -> int:
    """Latent rows and columns come in multiples of this: a U-Net halves them, a transformer packs them in patches."""
    if "block_out_channels" in config:
        return 2 ** (len(config["block_out_channels"]) - 1)
    return max(2, config.get("patch_size", 1))
