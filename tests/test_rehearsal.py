"""Networks that no family knows: what they are given is found out without weights, and they are pruned as any other."""

import inspect
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from compressor import checkpoint, pipeline, recipe
from compressor.calibration import sampling
from compressor.errors import CompressorError
from compressor.plan import plan
from compressor.progress import Progress
from compressor.recipe import Model
from compressor.report.facts import read
from compressor.run import run
from compressor.structure import find_groups
from tests import tiny

pytestmark = pytest.mark.usefixtures("looked_at_once")
SERVED = {
    "pixart": ("PixArtTransformer2DModel", 10, "transformer_blocks", 4, 2, ""),
    "auraflow": (
        "AuraFlowTransformer2DModel",
        21,
        "joint_transformer_blocks, single_transformer_blocks",
        2,
        0,
        "",
    ),
    "sana": ("SanaTransformer2DModel", 8, "transformer_blocks", 4, 0, ""),
    "cogview4": (
        "CogView4Transformer2DModel",
        6,
        "transformer_blocks",
        0,
        2,
        "; the graph contradicts the heads of attn1, which are left out",
    ),
    "hunyuan": (
        "HunyuanDiT2DModel",
        10,
        "blocks",
        0,
        0,
        "; without the graph no heads or neurons are known: torch-pruning should find the dependencies of "
        "HunyuanDiT2DModel, found TypeError: unsupported operand type(s) for +: 'int' and 'NoneType'",
    ),
}
KINDS = pytest.mark.parametrize("kind", SERVED)
SIDES = {"sana": 32}
KNOWN = "known: flux (FluxTransformer2DModel), sd3 (SD3Transformer2DModel), unet (UNet2DConditionModel)"


def side(kind: str) -> int:
    """Pixels that the pipeline is content with."""
    return SIDES.get(kind, tiny.SIDE)


def given(kind: str, prune: list[dict[str, Any]], output: Path) -> recipe.Recipe:
    size = {"height": side(kind), "width": side(kind)}
    return recipe.Recipe.model_validate(
        {
            "model": {"source": str(tiny.folder(kind))},
            "device": "cpu",
            "calibration": {"prompts": list(tiny.PROMPTS[:3]), "steps": 2, "batch": 2, "guidance": 3.0, **size},
            "prune": prune,
            "report": {"images": 2, "steps": 2, "metrics": ["pairs"]},
            "output": str(output),
        }
    )


def opened(kind: str) -> pipeline.Folder:
    return pipeline.open_folder(Model(source=str(tiny.folder(kind))), weights=False)


@KINDS
def test_an_unknown_network_is_discovered_and_what_was_found_is_told(kind):
    network, linears, lists, heads, neurons, left_out = SERVED[kind]
    folder = opened(kind)
    assert folder.warnings == (
        f"{network}: no family describes it; found {linears} kinds of linears in {lists}, heads in {heads} attentions "
        f"and neurons in {neurons} feed-forwards{left_out}",
    )
    kinds = [group.kind for group in find_groups(folder.twin(), folder.family)]
    assert (kinds.count("heads"), kinds.count("neurons")) == (heads, neurons)


def shapes(values: dict[str, Any]) -> dict[str, Any]:
    return {name: tree_map_only(Tensor, lambda tensor: (tensor.shape, tensor.dtype), v) for name, v in values.items()}


@KINDS
def test_a_rehearsal_gives_what_the_loaded_pipeline_gives(kind):
    folder, loaded = opened(kind), tiny.load(kind)
    seen: dict[str, Any] = {}

    def remember(_module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values = inspect.signature(loaded.module.forward).bind(*args, **kwargs).arguments
        seen.update({k: v for k, v in values.items() if v is not None and k != "return_dict"})

    loaded.module.register_forward_pre_hook(remember, with_kwargs=True)
    settings = sampling.Settings(2, 1.0, side(kind), side(kind))
    texts = ("a photo of a red dog in the snow",) * 2
    sampling.sample(loaded, sampling.encode(loaded, texts, 1.0, 0, "calibration"), settings, "latent")
    latents = side(kind) // folder.vae_factor
    made = folder.family.inputs(loaded.module, batch=2, height=latents, width=latents, sequence=folder.text_tokens())
    assert shapes(dict(made)) == shapes(seen)
    with torch.no_grad():
        assert torch.isfinite(loaded.module(**made, return_dict=False)[0]).all()


PRUNERS: dict[str, dict[str, Any]] = {
    "magnitude": {"sparsity": 0.5},
    "wanda": {"sparsity": 0.5},
    "obs_diff": {"sparsity": 0.5},
    "n_m": {"granularity": {"n_m": {"keep": 2, "of": 4}}},
}


@KINDS
@pytest.mark.parametrize("pruner", PRUNERS)
def test_every_pruner_can_be_planned_for_it(kind, pruner, tmp_path):
    name = "obs_diff" if pruner == "n_m" else pruner
    made = plan(given(kind, [{name: PRUNERS[pruner]}], tmp_path / "out"))
    weights = sum(layer.weights for entry in made.entries for layer in entry.layers)
    assert made.zeros == weights // 2
    assert opened(kind).warnings[0] in made.warnings


def test_obs_diff_halves_a_network_that_no_family_knows(tmp_path):
    output = run(given("pixart", [{"obs_diff": {"sparsity": 0.5}}], tmp_path / "out"), Progress())
    facts = read(output / "report.json")
    assert opened("pixart").warnings[0] in facts.warnings
    assert [layer.zeros * 2 for layer in facts.layers] == [layer.parameters for layer in facts.layers]
    assert all(layer.error is not None and 0 < layer.error < 1 for layer in facts.layers)
    again = checkpoint.load(output, "cpu")
    assert all(int((t.module.weight == 0).sum()) * 2 == t.module.weight.numel() for t in again.targets)


@pytest.mark.parametrize("kind", [kind for kind in SERVED if kind != "pixart"])
def test_pruners_side_by_side_change_a_network_that_no_family_knows(kind, tmp_path):
    entries = (("wanda", "query"), ("magnitude", "key"), ("obs_diff", "value"), ("n_m", "output"))
    prune = [
        {"obs_diff" if name == "n_m" else name: PRUNERS[name], "targets": {"include": [role]}} for name, role in entries
    ]
    facts = read(run(given(kind, prune, tmp_path / "out"), Progress()) / "report.json")
    assert [layer.zeros * 2 for layer in facts.layers] == [layer.parameters for layer in facts.layers]


def refusal(source: Path) -> str:
    with pytest.raises(CompressorError) as caught:
        pipeline.open_folder(Model(source=str(source)))
    return str(caught.value)


def advice(network: str, reason: str) -> str:
    return (
        f"no family knows the network class '{network}', and discovery cannot serve it: {reason}; write a family for "
        f"it (docs/plugins.md, 'A family'); {KNOWN}"
    )


def test_a_network_that_reads_values_which_are_not_there_is_refused_with_advice():
    assert refusal(tiny.folder("lumina2")) == advice(
        "Lumina2Transformer2DModel",
        "Lumina2Transformer2DModel: should run on the meta device, found NotImplementedError: Cannot copy out of meta "
        "tensor; no data!",
    )


def test_a_pipeline_that_cannot_be_rehearsed_is_refused_with_advice(tmp_path):
    shutil.copytree(tiny.folder("pixart"), tmp_path / "m")
    shutil.rmtree(tmp_path / "m" / "scheduler")
    found = refusal(tmp_path / "m")
    assert found.startswith(advice("PixArtTransformer2DModel", "@").partition("@")[0])
    assert "a rehearsal of PixArtSigmaPipeline could not be made: " in found
    assert found.endswith(KNOWN)


def test_a_size_that_the_pipeline_refuses_is_named():
    folder = opened("sana")
    with pytest.raises(CompressorError) as caught:
        folder.family.inputs(folder.twin(), batch=1, height=8, width=8, sequence=8)
    assert str(caught.value) == (
        "a rehearsal of SanaPipeline at 16 x 16 pixels failed: ValueError: `height` and `width` have to be divisible "
        "by 32 but are 16 and 16"
    )
