"""How a network differs from what its config says: written beside the config, checked, and built again from it.

A config has one number of heads and one feed-forward width for all blocks. Where heads and neurons were removed, the
*manifest* says what is smaller. It lies in the component's `config.json` as `quantization_config`, since that is the
one key for which diffusers refuses to load what it does not know, rather than make up weights of the missing shapes.
Importing this file adds its method to diffusers' table of quantizers, as other libraries do; then plain
`from_pretrained` loads a shrunk network too. `load` does without that table, which is no public interface.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers.models.modeling_utils import no_init_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from compressor import registry
from compressor.errors import CompressorError
from compressor.meta import on_meta
from compressor.structure import Family, Group, Heads, find_groups
from compressor.structure.groups import place_of
from compressor.structure.removal import set_attributes

KEY = "quantization_config"
METHOD = "compressor.shrunk"
"""What diffusers names when it refuses the network: the module to import."""
FORMAT = 1
_KEYS = {"quant_method", "format", "class", "attributes", "shapes"}


def describe(module: nn.Module, family: Family) -> dict[str, Any] | None:
    """The manifest of a network: what differs from what its config says.

    Returns:
        Plain data with the shape of every parameter that is smaller, by name, and by block the integers of the
        family's tables that are; none if no shape differs.
    """
    config: Any = module.config
    dense = _dense(type(module), config)
    before = {name: parameter.shape for name, parameter in dense.named_parameters()}
    shapes = {
        name: list(parameter.shape)
        for name, parameter in module.named_parameters()
        if name in before and parameter.shape != before[name]
    }
    if not shapes:
        return None
    large, small = (
        {(group.block, path): value for group in find_groups(network, family) for path, value in _integers(group)}
        for network in (dense, module)
    )
    attributes: dict[str, dict[str, int]] = {}
    for (block, path), value in small.items():
        if value != large.get((block, path)):
            attributes.setdefault(block, {})[path] = value
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "class": type(module).__name__,
        "attributes": attributes,
        "shapes": shapes,
    }


def manifest_in(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The manifest that a component's config holds; none if it holds none, or that of a quantisation."""
    found = config.get(KEY)
    return found if isinstance(found, dict) and found.get("quant_method") == METHOD else None


def write(manifest: dict[str, Any] | None, file: Path) -> None:
    """Puts a manifest into a `config.json`, or takes an old one out; a file that has none and needs none is left."""
    config = json.loads(file.read_text(encoding="utf-8"))
    if manifest is None and manifest_in(config) is None:
        return
    config.pop(KEY, None)
    if manifest is not None:
        config[KEY] = manifest
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def rebuild(
    cls: Any, config: Mapping[str, Any], manifest: Mapping[str, Any], family: Family, where: str = KEY
) -> nn.Module:
    """The shrunk network on the meta device.

    Args:
        cls: the network's class, which must be the family's.
        config: its config, with or without the manifest.
        manifest: from a file that nobody vouches for.
        family: what may be smaller in such a network.
        where: put before every error.

    Raises:
        CompressorError: if the manifest says anything but that heads or neurons are fewer.
    """
    if cls.__name__ != family.component_class:
        raise CompressorError(f"{where}: family '{family.name}' is of {family.component_class}, found {cls.__name__}")
    module = _dense(cls, config)
    _apply(module, manifest, family, where)
    return module


def load(folder: Path, files: Iterable[Path], family: Family, dtype: torch.dtype) -> nn.Module | None:
    """A shrunk network from a component's folder, on the CPU, ready for use.

    Args:
        folder: holds `config.json`.
        files: its weights, all safetensors.
        family: what is known about it.
        dtype: of all floating-point weights, but for those that diffusers keeps in float32.

    Returns:
        The network, or none if nothing says that it is shrunk: then diffusers loads it.

    Raises:
        CompressorError: as `rebuild`; and if the weights are not those of the manifest.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    manifest = manifest_in(config)
    if manifest is None:
        return None
    where = f"{folder / 'config.json'}: {KEY}"
    cls = getattr(diffusers, family.component_class)
    if config.get("_class_name") != family.component_class:
        raise CompressorError(
            f"{folder / 'config.json'}: _class_name: should be {family.component_class}, "
            f"found {config.get('_class_name')!r}"
        )
    module = rebuild(cls, config, manifest, family, where)
    in_float32 = set(getattr(cls, "_keep_in_fp32_modules", None) or ())
    expected, tensors = module.state_dict(), {}
    for name, file, tensor in _read(files):
        if name not in expected or name in tensors:
            found = "found it twice" if name in tensors else f"the network has no '{name}'"
            raise CompressorError(f"{file}: {name}: should be a tensor of the network, once; {found}")
        if tensor.shape != expected[name].shape:
            raise CompressorError(
                f"{file}: {name}: should have the shape {list(expected[name].shape)}, as {KEY} says, "
                f"found {list(tensor.shape)}"
            )
        kept = torch.float32 if in_float32.intersection(name.split(".")) else dtype
        tensors[name] = tensor.to(kept) if tensor.is_floating_point() else tensor
    if missing := [name for name in expected if name not in tensors]:
        raise CompressorError(f"{folder}: its weights lack {len(missing)} of its tensors, first {missing[0]}")
    module.load_state_dict(tensors, strict=True, assign=True)
    _compute_buffers(module, cls, config, dtype)
    _check_none_on_meta(module, str(folder))
    network: Any = module
    network.register_to_config(**{KEY: manifest})  # for `save_pretrained`
    return module.eval()


def _dense(cls: Any, config: Mapping[str, Any]) -> nn.Module:
    with on_meta():
        return _from_config(cls, config).eval()


def _from_config(cls: Any, config: Mapping[str, Any]) -> nn.Module:
    return cls.from_config({key: value for key, value in config.items() if key != KEY})


def _apply(module: nn.Module, manifest: Mapping[str, Any], family: Family, where: str) -> None:
    """Makes a dense network on the meta device as small as a manifest says, after checking every word of it."""
    if manifest.get("format") != FORMAT:
        raise CompressorError(
            f"{where}: should be of format {FORMAT}, found {manifest.get('format')!r}; update the package"
        )
    if (given := manifest.get("class")) != family.component_class or type(module).__name__ != given:
        raise CompressorError(f"{where}: class: should be {family.component_class}, found {given!r}")
    if strange := sorted(set(manifest) ^ _KEYS):
        raise CompressorError(f"{where}: should have the keys {', '.join(sorted(_KEYS))}; differs in {strange[0]!r}")
    groups = find_groups(module, family)
    attributes = _check_attributes(manifest["attributes"], groups, where)
    shapes = _check_shapes(manifest["shapes"], groups, dict(module.named_parameters()), where)
    modules = dict(module.named_modules())
    for name, shape in shapes.items():
        owner, _, key = name.rpartition(".")
        old = getattr(modules[owner], key)
        new = torch.empty(shape, dtype=old.dtype, device="meta")
        setattr(modules[owner], key, nn.Parameter(new, requires_grad=old.requires_grad))
    _check_linears(groups, where)
    for group in groups:
        set_attributes(group)  # by the family's table: nothing is set because the manifest says so
    try:
        find_groups(module, family)
    except CompressorError as error:
        raise CompressorError(f"{where}: shapes do not fit each other: {error}") from None
    found = {(group.block, path): value for group in groups for path, value in _integers(group)}
    for (block, path), value in attributes.items():
        if found[block, path] != value:
            raise CompressorError(
                f"{where}: attributes: {block}.{path}: should be {found[block, path]}, as the shapes say, found {value}"
            )


def _check_attributes(given: Any, groups: Iterable[Group], where: str) -> dict[tuple[str, str], int]:
    dense = {(group.block, path): value for group in groups for path, value in _integers(group)}
    checked: dict[tuple[str, str], int] = {}
    for block, numbers in _object(given, f"{where}: attributes").items():
        for path, value in _object(numbers, f"{where}: attributes: {block}").items():
            name = f"{where}: attributes: {block}.{path}"
            if (block, path) not in dense:
                raise CompressorError(f"{name}: is no number of heads or neurons that the family's tables list")
            if type(value) is not int or not 1 <= value <= dense[block, path]:
                raise CompressorError(
                    f"{name}: should be a whole number from 1 to {dense[block, path]}, found {value!r}"
                )
            checked[block, path] = value
    return checked


def _check_shapes(
    given: Any, groups: Iterable[Group], parameters: Mapping[str, Tensor], where: str
) -> dict[str, list[int]]:
    free: dict[str, set[int]] = {}  # dimensions that may be smaller
    for group in groups:
        for producer in group.producers:
            free.setdefault(f"{producer.name}.weight", set()).add(0)
            free.setdefault(f"{producer.name}.bias", set()).add(0)
        for consumer in group.consumers:
            free.setdefault(f"{consumer.name}.weight", set()).add(1)
    checked = _object(given, f"{where}: shapes")
    for parameter, shape in checked.items():
        name = f"{where}: shapes: {parameter}"
        if parameter not in parameters:
            raise CompressorError(f"{name}: the network has no such parameter")
        dense = list(parameters[parameter].shape)
        if not isinstance(shape, list) or len(shape) != len(dense) or any(type(size) is not int for size in shape):
            raise CompressorError(f"{name}: should be {len(dense)} whole numbers, found {shape!r}")
        for dim, (size, most) in enumerate(zip(shape, dense, strict=True)):
            least = 1 if dim in free.get(parameter, ()) else most
            if not least <= size <= most:
                between = f"from 1 to {most}" if least == 1 else f"{most}, which heads and neurons do not change"
                raise CompressorError(f"{name}: size {dim} should be {between}, found {size}")
    return checked


def _check_linears(groups: Iterable[Group], where: str) -> None:
    """Sets the linears' sizes to those of their weights, which must be whole heads and go with their biases."""
    for group in groups:
        step = 2 * group.width if group.gated else group.width
        for target in (*group.producers, *group.consumers):
            linear = target.module
            linear.out_features, linear.in_features = linear.weight.shape
            if linear.bias is not None and len(linear.bias) != linear.out_features:
                raise CompressorError(
                    f"{where}: shapes do not fit each other: {target.name}: should have a bias of "
                    f"{linear.out_features}, as many as its rows, found {len(linear.bias)}"
                )
        for producer in group.producers:
            if producer.outputs % step:
                raise CompressorError(
                    f"{where}: shapes do not fit each other: {producer.name}: should have a multiple of {step} rows, "
                    f"whole {group.kind}, found {producer.outputs}"
                )


def _integers(group: Group) -> Iterator[tuple[str, int]]:
    """What a group's modules remember of their sizes, by path, without what is private to a version of diffusers."""
    table = group.table
    for path in (*table.counts, *(table.widths if isinstance(table, Heads) else ())):
        owner, key, listed = place_of(group.root, path)
        if not any(part.startswith("_") for part in path.split(".")):
            yield path, owner[key] if listed else getattr(owner, str(key))


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CompressorError(f"{where}: should be a JSON object, found {type(value).__name__}")
    return value


def _read(files: Iterable[Path]) -> Iterator[tuple[str, Path, Tensor]]:
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  (not a dict)
                    yield name, file, tensors.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CompressorError(f"{file}: truncated or damaged safetensors file: {error}") from None


def _compute_buffers(module: nn.Module, cls: Any, config: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Gives a network those buffers that no file holds, such as the tables of positions of some."""
    saved = module.state_dict().keys()
    lacking = [name for name, buffer in module.named_buffers() if buffer.is_meta and name not in saved]
    if not lacking:
        return
    with init_empty_weights(include_buffers=False), no_init_weights():
        computed = dict(_from_config(cls, config).named_buffers())
    for name in lacking:
        owner, _, key = name.rpartition(".")
        buffer = computed[name]
        module.get_submodule(owner).register_buffer(
            key, buffer.to(dtype) if buffer.is_floating_point() else buffer, persistent=False
        )


def _check_none_on_meta(module: nn.Module, where: str) -> None:
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    if missing := [name for name, tensor in tensors.items() if tensor.is_meta]:
        raise CompressorError(f"{where}: its weights lack {len(missing)} of its tensors, first {missing[0]}")


def _family_of(component_class: str) -> Family:
    families = [registry.load("family", name) for name in registry.find("family")]
    known = {family.component_class: family for family in families}
    if component_class not in known:
        raise CompressorError(
            f"{KEY}: no family knows the network class '{component_class}'; known: {', '.join(known)}"
        )
    return known[component_class]


class _Method(StrEnum):
    SHRUNK = METHOD


def _register() -> None:
    """Teaches plain `from_pretrained` to load shrunk networks, if diffusers keeps its tables as we know them."""
    try:
        from diffusers.quantizers import auto
        from diffusers.quantizers.base import DiffusersQuantizer
        from diffusers.quantizers.quantization_config import QuantizationConfigMixin

        methods, configs = auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    except (ImportError, AttributeError):
        return  # diffusers then refuses shrunk networks, and `load` goes on loading them

    class Config(QuantizationConfigMixin):
        def __init__(self, **manifest: Any) -> None:
            self.quant_method: Any = _Method.SHRUNK
            self.manifest = manifest

        def to_dict(self) -> dict[str, Any]:
            return dict(self.manifest)

        def to_diff_dict(self) -> dict[str, Any]:
            return self.to_dict()

    class Quantizer(DiffusersQuantizer):
        use_keep_in_fp32_modules = True
        is_serializable: Any = True
        is_trainable: Any = True
        is_compileable: Any = True

        def _process_model_before_weight_loading(self, model: Any, **_kwargs: Any) -> None:
            config: Any = self.quantization_config
            _apply(model, config.manifest, _family_of(type(model).__name__), KEY)

        def _process_model_after_weight_loading(self, model: Any, **_kwargs: Any) -> None:
            _check_none_on_meta(model, type(model).__name__)
            model.is_quantized = False  # it may be cast and moved as any other
            del model.quantization_method

    tables: tuple[tuple[Any, type], ...] = ((methods, Quantizer), (configs, Config))
    for table, cls in tables:
        table[METHOD] = cls


_register()
