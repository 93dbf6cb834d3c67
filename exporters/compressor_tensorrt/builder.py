"""From an ONNX file to an engine, with TensorRT 10 or 11 or TensorRT-RTX, whose Python names are the same."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from compressor.errors import CompressorError
from compressor_tensorrt.profiles import Shapes

PRODUCTS = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
"""The runtimes by the name of their module."""

_ERRORS = ("ERROR", "INTERNAL_ERROR")


@dataclass(frozen=True)
class Settings:
    """What a builder is asked for; what is None or false is left as the builder has it.

    Attributes:
        sparse_weights: whether it may choose kernels for 2:4 sparse weights.
        workspace: bytes that a layer may take for itself.
        timing_cache: a file of measured times, read and written.
        version_compatible: whether later versions may run the engine.
        weight_streaming: whether weights may stay in the host's memory when it runs.
        compute_capabilities: those that the engine is built for, such as `8.6`.
    """

    sparse_weights: bool = True
    workspace: int | None = None
    timing_cache: Path | None = None
    version_compatible: bool = False
    weight_streaming: bool = False
    compute_capabilities: tuple[str, ...] = ()


@dataclass
class Log:
    """What a builder says, written to a file as it comes.

    Attributes:
        stream: the file.
        hidden: the start of paths, which is left out: a folder of this machine.
        errors: what was said as an error.
    """

    stream: TextIO
    hidden: str = ""
    errors: list[str] = field(default_factory=list)

    def take(self, severity: str, message: str) -> None:
        """Notes one message of `INTERNAL_ERROR`, `ERROR`, `WARNING`, `INFO` or `VERBOSE`."""
        message = message.replace(self.hidden, "")
        self.stream.write(f"[{severity}] {message}\n")
        if severity in _ERRORS:
            self.errors.append(" ".join(message.split()))


def load(runtime: str) -> Any:
    """The runtime's Python module.

    Raises:
        CompressorError: if it cannot be imported.
    """
    try:
        return importlib.import_module(runtime)
    except (ImportError, OSError) as error:
        raise CompressorError(f"{runtime} is installed and cannot be imported: {_line(error)}") from error


def version(trt: Any) -> str:
    """Such as `TensorRT-RTX 1.7.1.116`."""
    return f"{PRODUCTS.get(trt.__name__, trt.__name__)} {trt.__version__}"


def capability(trt: Any, name: str) -> Any:
    """The runtime's value for a compute capability such as `8.6`.

    Raises:
        CompressorError: if it knows no such one.
    """
    members = trt.ComputeCapability.__members__
    value = members.get(f"SM{name.replace('.', '')}")
    if value is None:
        numbers = [member.removeprefix("SM") for member in members if member.startswith("SM")]
        known = ", ".join(f"{number[:-1]}.{number[-1]}" for number in numbers)
        raise CompressorError(f"{version(trt)} does not build for compute capability {name}; it knows {known}")
    return value


def build(
    trt: Any, file: Path, profiles: Sequence[Shapes], settings: Settings, names: Mapping[str, str], log: Log, label: str
) -> Any:
    """Builds an engine.

    Args:
        trt: the module `tensorrt` or `tensorrt_rtx`.
        file: the ONNX file; its types are kept, for the network is strongly typed.
        profiles: the shapes of each input, one mapping for each optimization profile.
        settings: see there.
        names: what layers are called in the log and in the engine, by the name of the ONNX node.
        log: gets everything that parser and builder say.
        label: what messages call the engine.

    Returns:
        The serialized engine, as a buffer.

    Raises:
        CompressorError: in the parser's or builder's own words, if the file cannot be parsed or the engine not built.
    """
    ears = listener(trt)
    ears.log_to = log
    try:
        builder = trt.Builder(ears)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, ears)
        if not parser.parse_from_file(str(file)):
            words = [_words(parser.get_error(i)) for i in range(parser.num_errors)]
            raise CompressorError(f"{label}: {version(trt)} cannot parse the ONNX file: {_join(words or log.errors)}")
        for i in range(network.num_layers):
            layer = network.get_layer(i)
            if layer.name in names:
                layer.name = names[layer.name]
        config = builder.create_builder_config()
        for shapes in profiles:
            profile = builder.create_optimization_profile()
            for i in range(network.num_inputs):
                tensor = network.get_input(i)
                if -1 in tuple(tensor.shape):
                    smallest, usual, largest = shapes[tensor.name]
                    profile.set_shape(tensor.name, smallest, usual, largest)
            config.add_optimization_profile(profile)
        _configure(trt, config, settings, label)
        engine = builder.build_serialized_network(network, config)
        if engine is None:
            raise CompressorError(f"{label}: {version(trt)} cannot build the engine: {_join(log.errors)}")
        if settings.timing_cache is not None:
            settings.timing_cache.write_bytes(bytes(config.get_timing_cache().serialize()))
        return engine
    finally:
        ears.log_to = None


@functools.cache
def listener(trt: Any) -> Any:
    """The runtime's one logger: a process has no other, those that come later are not heard.

    What is said goes to its attribute `log_to`, a `Log`, while there is one.
    """

    class Listener(trt.ILogger):
        log_to: Log | None = None

        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            if self.log_to is not None:
                self.log_to.take(severity.name, msg)

    return Listener()


def _configure(trt: Any, config: Any, settings: Settings, label: str) -> None:
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # so that the inspector names layers and tactics
    if settings.sparse_weights:
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    if settings.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if settings.weight_streaming:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    if settings.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace)
    if settings.compute_capabilities:
        config.num_compute_capabilities = len(settings.compute_capabilities)
        for i, name in enumerate(settings.compute_capabilities):
            config.set_compute_capability(capability(trt, name), i)
    if settings.timing_cache is not None:
        known = settings.timing_cache.read_bytes() if settings.timing_cache.exists() else b""
        cache = config.create_timing_cache(known)
        if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
            raise CompressorError(
                f"{label}: timing_cache {settings.timing_cache} was not written by {version(trt)} on this GPU; "
                "remove it, or name another file"
            )


def _words(error: Any) -> str:
    """A parser's error: what is wrong, and at which node."""
    text = " ".join(error.desc().split())
    return f"{text} (node {error.node_name()}, {error.node_operator()})" if error.node_name() else text


def _join(words: Sequence[str]) -> str:
    unheard = "it gave no reason; another library of this process may have taken its place as the logger"
    return "; ".join(dict.fromkeys(words)) or unheard


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
