"""What is known about one architecture: its prunable linears, their roles, and what its forward takes."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from compressor.errors import CompressorError

Part = Literal["attention", "feed_forward", "adaln"]
Role = Literal["query", "key", "value", "output", "up", "down", "modulation"]
_ADALN = ("adaln", "modulation")
"""The part and the role of the same layers."""


@dataclass(frozen=True)
class Layer:
    """One row of a family's table.

    Attributes:
        suffix: the linear's name inside its block, such as `attn.to_q`.
        part: attention, feed-forward, or adaLN: the linear that makes a norm's scales, shifts and gates. It is given
            one vector a sample, SiLU of the embedding of timestep and prompt, and all of a network are given the same.
        role: what it is there.
        stream: the token stream that it belongs to: `image`, `text`, or `joint` where they are one sequence.
        stage: its place in the block's order of execution; layers of one stage run side by side.
    """

    suffix: str
    part: Part
    role: Role
    stream: str
    stage: int


@dataclass(frozen=True)
class Heads:
    """The heads of one attention: what leaves a block together with each of them.

    Names of linears and attributes count from the block. A number at the end of an attribute indexes a list; an
    attribute whose own name begins with an underscore may be absent.

    Attributes:
        attention: the attention's module; a block without it has no such group.
        rows: linears whose rows belong to the heads.
        columns: linears whose columns do, beginning with column 0.
        optional: those of `rows` and `columns` that an attention may lack.
        counts: attributes that hold the number of heads; the first one says how many there are.
        widths: attributes that hold the width of all heads.
        each: attributes that hold the width of one head, which stays.
        overrides: why the dependency graph is wrong here, if it is: then the table counts.
    """

    attention: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    optional: tuple[str, ...] = ()
    counts: tuple[str, ...] = ()
    widths: tuple[str, ...] = ()
    each: tuple[str, ...] = ()
    overrides: str = ""


@dataclass(frozen=True)
class Neurons:
    """The hidden neurons of one feed-forward: what leaves a block together with each of them.

    Attributes:
        name: of the feed-forward; a block with neither `up` nor `down` has no such group.
        up: the linear whose rows they are.
        down: the linear whose columns they are.
        gated: `up` yields values and, behind them, as many gates: neuron i has the rows i and count + i.
        behind: a linear whose outputs stand before the neurons in the input of `down`.
        counts: attributes that hold the number of neurons, as in `Heads`.
        overrides: why the dependency graph is wrong here, if it is: then the table counts.
    """

    name: str
    up: str
    down: str
    gated: bool = False
    behind: str | None = None
    counts: tuple[str, ...] = ()
    overrides: str = ""


@dataclass(frozen=True)
class BlockTable:
    """The linears of every block whose name matches.

    Attributes:
        pattern: a regular expression on the whole name of the block's module.
        layers: rows that a block may have; one that lacks a row's layer simply does not have it.
        groups: what leaves together, for structured pruning; the linears are among `layers`.
    """

    pattern: str
    layers: tuple[Layer, ...]
    groups: tuple[Heads | Neurons, ...] = ()


class ExampleInputs(Protocol):
    """Makes inputs for a component's forward from its config."""

    def __call__(
        self, module: nn.Module, *, batch: int, height: int, width: int, sequence: int
    ) -> Mapping[str, Tensor | Mapping[str, Tensor]]:
        """Random inputs by argument name, on the module's device and in its dtype.

        Args:
            module: the component; its `config` gives the channels.
            batch: samples.
            height: latent rows (image height over the VAE factor).
            width: latent columns.
            sequence: text tokens.
        """
        ...


@dataclass(frozen=True)
class Prompting:
    """How a pipeline gives its network a prompt, so that prompts can be encoded once and counted beforehand.

    Attributes:
        pipeline_class: the diffusers class that it describes.
        results: of the pipeline's `encode_prompt`: for each, the argument of the pipeline's call that takes it back.
        arguments: of `encode_prompt` that have to be given besides the prompt.
        guided: whether guidance above 1 runs the network on the empty prompt, too; `encode_prompt` is then told so.
        clip: whether the network is given as many tokens as CLIP's tokenizer makes of any prompt.
        t5: tokens of a T5 encoder's part, behind those of CLIP, where the caller chooses no `max_sequence_length`;
            0 where there is no such part.
    """

    pipeline_class: str
    results: tuple[str, ...]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    guided: bool = True
    clip: bool = True
    t5: int = 0


@dataclass(frozen=True)
class Family:
    """One architecture as data. Registered in the entry-point group `compressor.families`.

    Attributes:
        name: as in the entry point.
        component_class: the diffusers class it describes.
        blocks: tables of linears, in order of execution.
        behind: tables of linears in modules that are no blocks, and run behind all blocks.
        inputs: makes example inputs.
        prompting: pipelines whose prompts can be encoded once; any other encodes them at every call.
        patch: a side of the latents has to be a multiple of so many.
        pixels: a side of the image has to be a multiple of so many, besides.
        most_patches: the key of the network's config that says how many patches a side may have; none if any.
    """

    name: str
    component_class: str
    blocks: tuple[BlockTable, ...]
    inputs: ExampleInputs
    prompting: tuple[Prompting, ...] = ()
    patch: int = 2
    pixels: int = 1
    most_patches: str | None = None
    behind: tuple[BlockTable, ...] = ()

    def prompts_of(self, pipeline_class: str) -> Prompting | None:
        """What is known of how a pipeline gives the network its prompts; none if nothing is."""
        return next((row for row in self.prompting if row.pipeline_class == pipeline_class), None)


@dataclass(frozen=True)
class Target:
    """One linear that may be pruned.

    Attributes:
        name: dotted name in the component.
        module: the linear itself, possibly on the meta device.
        block: dotted name of its block.
        layer: its row in the family's table.
    """

    name: str
    module: nn.Linear
    block: str
    layer: Layer

    @property
    def outputs(self) -> int:
        """Rows of the weight."""
        return self.module.out_features

    @property
    def inputs(self) -> int:
        """Columns of the weight."""
        return self.module.in_features

    @property
    def unit(self) -> tuple[str, int]:
        """Layers of equal unit run side by side: the block and the stage in it."""
        return self.block, self.layer.stage


@dataclass(frozen=True)
class Component:
    """The network that is changed, and the layers of it that a pruner is given.

    Attributes:
        name: `transformer` or `unet`.
        module: the network.
        family: its table.
        targets: in order of execution.
    """

    name: str
    module: nn.Module
    family: Family
    targets: tuple[Target, ...]


def find_targets(module: nn.Module, family: Family, *, adaln: bool = False) -> tuple[Target, ...]:
    """Every linear of the module that the family's table knows, in order of execution.

    Args:
        module: the network.
        family: its table.
        adaln: the adaLN linears as well, which are pruned only where a recipe names them.

    Raises:
        CompressorError: if the table fits no layer, or a layer that it names is not a plain Linear.
    """
    found: list[Target] = []
    modules = dict(module.named_modules())
    for table in (*family.blocks, *family.behind):
        for block in (name for name in modules if re.fullmatch(table.pattern, name)):
            for row in sorted(table.layers, key=lambda row: row.stage):
                name = f"{block}.{row.suffix}"
                layer = modules.get(name)
                if layer is None or (row.part == "adaln" and not adaln):
                    continue
                found.append(Target(name, _plain(name, layer), block, row))
    if not found:
        raise CompressorError(f"family '{family.name}': none of its layers is in this {type(module).__name__}")
    return tuple(found)


def select(targets: tuple[Target, ...], include: tuple[str, ...], exclude: tuple[str, ...]) -> tuple[Target, ...]:
    """The targets that an include pattern matches and no exclude pattern does.

    A pattern is a part (`attention`, `feed_forward`, `adaln`), a role (`query`, ...), a stream (`text`), a layer's or a
    block's dotted name, or `re:` and a regular expression searched for in the name. `attention` and `feed_forward`
    together are every layer but the adaLN linears, also where there are only those of one. A pattern to include that
    matches other layers, too, does not take the adaLN linears, so that blocks and streams stay what computes on tokens.

    Raises:
        CompressorError: if a pattern matches no layer, or nothing is left.
    """
    parts = set(get_args(Part)) - {"adaln"}
    chosen: set[str] = set()
    dropped: set[str] = set()
    for patterns, names_found in ((include, chosen), (exclude, dropped)):
        for pattern in patterns:
            hits = [target for target in targets if _matches(pattern, target)]
            if not hits and not (pattern in parts and parts <= set(patterns)):
                raise CompressorError(f"targets: '{pattern}' matches none of the {_unmatched(pattern, targets)}")
            others = [target for target in hits if target.layer.part != "adaln"]
            names_found.update(target.name for target in (others if patterns is include and others else hits))
    left = tuple(target for target in targets if target.name in chosen - dropped)
    if not left:
        raise CompressorError(f"targets: exclude leaves none of the {len(chosen)} layers that include chose")
    return left


def _unmatched(pattern: str, targets: tuple[Target, ...]) -> str:
    """How many layers there are, and what would be right."""
    others = [target for target in targets if target.layer.part != "adaln"]
    count = f"{len(others)} layers"
    if pattern in _ADALN and len(others) == len(targets):
        return f"{count}: no adaLN linears of this network are known; leave it out"
    known = sorted({word for t in targets for word in (t.layer.part, t.layer.role, t.layer.stream)})
    if near := difflib.get_close_matches(pattern, known, n=1):
        return f"{count}; did you mean '{near[0]}'?"
    return (
        f"{count}; a pattern is one of {', '.join(known)}, the name of a layer or block such as "
        f"'{others[0].name}', or re:REGEX"
    )


def _plain(name: str, layer: nn.Module) -> nn.Linear:
    """The layer, if it is a linear whose weight is there for the taking."""
    weight = getattr(layer, "weight", None)
    kind = f"{type(layer).__module__}.{type(layer).__name__}"
    if hasattr(layer, "base_layer") or "lora" in type(layer).__name__.lower():
        advice = "an adapter is still attached: fuse it into the weights, with pipe.fuse_lora(), and unload it"
    elif isinstance(weight, Tensor) and (type(weight.data) is not Tensor or not weight.is_floating_point()):
        kind = f"{kind} with a weight of {type(weight.data).__name__} in {weight.dtype}"
        advice = "it is quantised: prune the full-precision weights, and quantise the result afterwards"
    elif "quantized" in type(layer).__module__:
        advice = "it is quantised: prune the full-precision weights, and quantise the result afterwards"
    elif type(layer) is not nn.Linear:
        advice = "leave it out of the family's table, or put a plain one in its place"
    else:
        return layer
    raise CompressorError(f"{name}: should be a plain torch.nn.Linear, found {kind}; {advice}")


def _matches(pattern: str, target: Target) -> bool:
    if pattern.startswith("re:"):
        try:
            return re.search(pattern[3:], target.name) is not None
        except re.error as error:
            raise CompressorError(f"targets: '{pattern}' is not a regular expression: {error}") from None
    layer = target.layer
    return pattern in (layer.part, layer.role, layer.stream, target.block) or (
        target.name == pattern or target.name.startswith(pattern + ".")
    )


def config(module: nn.Module) -> Any:
    """A diffusers module's config, whose attributes its class decides."""
    return module.config


def like(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """The device and dtype of a module's first floating-point parameter."""
    parameter = next(p for p in module.parameters() if p.is_floating_point())
    return parameter.device, parameter.dtype
