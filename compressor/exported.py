"""What an exporter wrote: noted beside it in `export.json`, and held against it again later."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from compressor import checkpoint, measure
from compressor.errors import CompressorError
from compressor.options import Options
from compressor.output import PAGES, RECORD
from compressor.pipeline import Pipeline, pick_device
from compressor.plugin import Export, Exporter
from compressor.progress import Progress
from compressor.registry import Choice, load
from compressor.registry import find as registered
from compressor.two_four import choice, product, table
from compressor.two_four import runtime as sparse
from compressor.units import several

MANIFEST = "export.json"
FORMAT = 1
DESCRIBES = ("dtype", "opset", "inputs", "outputs")
"""What `checks` says of a file, not of how near to torch it came, which differs from machine to machine."""


def write(exporter: Exporter, export: Export, folder: Path, result: Path) -> None:
    """Writes the manifest of an export.

    Args:
        exporter: with its options.
        export: what it wrote.
        folder: where.
        result: the folder of the pruned pipeline, whose record's hash says what was exported.
    """
    data = {
        "format": FORMAT,
        "exporter": Choice("exporter").name(exporter),
        "options": exporter.model_dump(mode="json"),
        "source": {RECORD: checkpoint.sha256(result / RECORD)},
        "versions": measure.versions(),
        "files": {
            file.as_posix(): {"bytes": (folder / file).stat().st_size, "sha256": checkpoint.sha256(folder / file)}
            for file in export.files
        },
        "checks": export.checks,
    }
    (folder / MANIFEST).write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def verify_all(folder: Path) -> Iterator[str]:
    """Checks a result and its exports, or an export by itself: every hash, and what the files compute.

    Args:
        folder: of either.

    Yields:
        A line for each thing that was found to be as it should.

    Raises:
        CompressorError: naming the first file that is not, or saying that there is nothing to check.
    """
    found = list(find(folder))
    is_export = (folder / MANIFEST).is_file()
    if not is_export and ((folder / RECORD).is_file() or (folder / "model_index.json").is_file() or not found):
        record = checkpoint.verify(folder)
        written = {*record["files"], RECORD, *PAGES}
        _refuse_strangers(folder, RECORD, written, {name for entry in record["recipe"]["export"] for name in entry})
        yield f"{folder}: {several(len(record['files']), 'file')} as saved"
        for lost in (folder / name for name in registered("exporter")):
            if lost.is_dir() and not (lost / MANIFEST).is_file():
                raise CompressorError(f"{lost / MANIFEST}: missing, so that nothing in {lost} can be checked")
    pipeline: Pipeline | None = None
    for export, result in found:
        manifest = verify(export)
        _refuse_strangers(export, MANIFEST, {*manifest["files"], MANIFEST})
        yield f"{export}: {several(len(manifest['files']), 'file')} as exported"
        if result is None:
            yield f"{export}: not compared with torch: no {RECORD} around it"
            continue
        pipeline = pipeline or checkpoint.load(result, "cpu")
        try:
            proofs = prove(export, result, manifest, pipeline)
        except CompressorError as error:
            start = "" if str(error).startswith(str(export)) else f"{export}: "
            raise CompressorError(f"{start}{error}") from error
        if not proofs:
            yield f"{export}: not compared with torch: {manifest['exporter']} has nothing that it could run here"
        for name, checks in proofs.items():
            if not checks.get("numeric"):
                continue
            worst = max(entry["relative_l2"] for entry in checks["numeric"])
            yield f"{export / name}: within {worst:.1e} of torch, should be at most {checks['tolerance']:.0e}"


def open_pipeline(folder: Path, device: str, runtime: str) -> Pipeline:
    """A pipeline to draw with, after checking the hash of every file that it is made of.

    Args:
        folder: a result; for onnxruntime also an export by itself.
        device: `auto`, `cpu`, `cuda`, ...; with onnxruntime `auto` is the CPU.
        runtime: `torch`, `onnxruntime`, or `torch-sparse`, which `run_sparse` is to follow.

    Raises:
        CompressorError: if something is missing, not installed, damaged or changed, or the device will not do.
    """
    if runtime == "torch-sparse":
        product.check("--runtime torch-sparse", pick_device(device))
    if runtime in ("torch", "torch-sparse"):
        return checkpoint.load(folder, device)
    if find_spec("onnxruntime") is None or find_spec("onnx_ir") is None:
        raise CompressorError('--runtime onnxruntime needs onnxruntime; pip install "diffusion-compressor[onnx]"')
    from compressor.onnx_files import check
    from compressor.onnx_files import runtime as sessions

    device = "cpu" if device == "auto" else device
    check.providers(device)
    export, result = next(find(folder, "onnx"), (None, None))
    if export is None:
        raise CompressorError(
            f"{folder}: should hold an ONNX export, found no {MANIFEST} of one; add `export: [onnx]` to the recipe"
        )
    verify(export)
    if result is not None:
        checkpoint.verify(result)
    return sessions.load(export, result, device)


def run_sparse(pipeline: Pipeline, probe: Path | None, progress: Progress) -> None:
    """Makes a pipeline's network run its 2:4 layers by sparse tensor cores, where that is faster.

    Args:
        pipeline: on a GPU; its network is changed.
        probe: a table of `compressor probe`, measured here; None to measure each shape when it is first met.
        progress: told what was measured and converted.

    Raises:
        CompressorError: if the network is not in half precision, has no 2:4 layer, or the table is not of this machine.
    """
    if pipeline.dtype not in product.TOLERANCE:
        found = str(pipeline.dtype).removeprefix("torch.")
        raise CompressorError(f"--runtime torch-sparse: should be a network in bfloat16, found {found}")
    if probe is None:
        decide = choice.Measuring(pipeline.dtype, pipeline.device, choice.FASTER, progress.say)
    else:
        decide = choice.Tabled(table.read(probe), str(probe), choice.FASTER)
        versions = measure.versions() | {"cusparselt": product.version()}
        decide.check(product.gpu(pipeline.device), versions, pipeline.dtype)
    sparse.install(pipeline.module, pipeline.family, decide, progress.say)


def find(folder: Path, exporter: str | None = None) -> Iterator[tuple[Path, Path | None]]:
    """The exports in a folder, each with the result that it was written from, if that is around it.

    Args:
        folder: a result, or an export by itself.
        exporter: only this one's.
    """
    candidates = (
        [folder] if (folder / MANIFEST).is_file() else sorted(file.parent for file in folder.glob(f"*/{MANIFEST}"))
    )
    for candidate in candidates:
        if exporter in (None, _read(candidate)["exporter"]):
            around = candidate.resolve().parent
            yield candidate, around if (around / RECORD).is_file() else None


def verify(folder: Path) -> dict[str, Any]:
    """Checks the files of an export against their hashes and returns its manifest.

    Raises:
        CompressorError: naming the first file that is missing or was changed.
    """
    manifest = _read(folder)
    root = folder.resolve()
    for name, noted in manifest["files"].items():
        path = (root / name.replace("\0", "?")).resolve()
        if root not in path.parents:
            raise CompressorError(f"{folder / MANIFEST}: names a file outside its folder: {name}")
        if not path.is_file():
            raise CompressorError(f"{folder / name}: missing; {MANIFEST} lists it")
        found = checkpoint.sha256(path)
        if found != noted["sha256"]:
            raise CompressorError(
                f"{folder / name}: changed after the export: should have sha256 {noted['sha256']}, found {found}"
            )
        if path.stat().st_size != noted["bytes"]:
            raise CompressorError(
                f"{folder / MANIFEST}: files.{name}.bytes should be {path.stat().st_size} as on the disk, "
                f"found {noted['bytes']}"
            )
    return manifest


def prove(folder: Path, result: Path, manifest: dict[str, Any], pipeline: Pipeline) -> dict[str, Any]:
    """Lets the exporter hold its files against the torch pipeline once more.

    Args:
        folder: of the export.
        result: that it was written from.
        manifest: as from `verify`.
        pipeline: the result, loaded.

    Returns:
        The figures, as the exporter puts them; empty if it proves nothing anew.

    Raises:
        CompressorError: if the export is of another result, the manifest is damaged or
            says of a file what is not so, or the files do not compute what torch computes.
    """
    given, found = manifest["source"][RECORD], checkpoint.sha256(result / RECORD)
    if given != found:
        raise CompressorError(
            f"{folder / MANIFEST}: exported from another result: should be of the {RECORD} with sha256 {found}, "
            f"found {given}; export again"
        )
    cls: type[Options] = load("exporter", manifest["exporter"])
    try:
        exporter: Any = cls.model_validate_json(json.dumps(manifest["options"]))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, ("options", *first["loc"])))
        raise CompressorError(f"{folder / MANIFEST}: damaged: {where}: {first['msg']}") from None
    _check_options(folder, result, manifest)
    proofs = exporter.verify(pipeline, folder)
    for name, proof in proofs.items():
        noted = manifest["checks"].get(name, {})
        for key in (key for key in DESCRIBES if key in proof):
            if noted.get(key) != proof[key]:
                raise CompressorError(
                    f"{folder / MANIFEST}: checks.{name}.{key} should be {json.dumps(proof[key])} as in the file, "
                    f"found {json.dumps(noted.get(key))}"
                )
    return proofs


def _check_options(folder: Path, result: Path, manifest: dict[str, Any]) -> None:
    """Makes sure that a manifest has the options that the result's recipe gave: no tolerance made wide afterwards."""
    name, options = manifest["exporter"], manifest["options"]
    recipe = json.loads((result / RECORD).read_text(encoding="utf-8"))["recipe"]
    asked = next((entry[name] for entry in recipe["export"] if name in entry), None)
    if asked is None:
        raise CompressorError(f"{folder / MANIFEST}: the recipe in {RECORD} has no export with {name}")
    for key in sorted({*asked, *options}):
        if asked.get(key) != options.get(key):
            raise CompressorError(
                f"{folder / MANIFEST}: options.{key} should be {json.dumps(asked.get(key))} as in {RECORD}, "
                f"found {json.dumps(options.get(key))}"
            )


def _refuse_strangers(folder: Path, manifest: str, listed: set[str], apart: Iterable[str] = ()) -> None:
    """Makes sure that a folder holds nothing that its manifest does not list, but for notes and hidden files."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if not path.is_file() or name.as_posix() in listed or name.parts[0] in apart:
            continue
        if name.suffix != ".md" and not any(part.startswith(".") for part in name.parts):
            raise CompressorError(f"{path}: was not there when {manifest} was written; put it elsewhere")


def _read(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        version, files = manifest["format"], manifest["files"]
        _ = [manifest["exporter"], manifest["options"], manifest["source"][RECORD], manifest["checks"]]
        _ = [(noted["bytes"], noted["sha256"]) for noted in files.values()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CompressorError(f"{file}: damaged: {error!r}") from None
    if version != FORMAT:
        raise CompressorError(f"{file}: should be of format {FORMAT}, found {version}; update the package")
    return manifest
