"""What the published code of OBS-Diff gets wrong, point by point, and one check each that this code does not.

`DEFECTS` has every point; those that have no case here yet say why. Most cases have finer tests elsewhere: these are
whole, so that a reader sees at a glance that each point was looked at.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compressor_obs_diff import OBSDiff
from compressor_obs_diff.granularities import NM, Unstructured
from compressor_obs_diff.solver import factorise, sweep
from compressor_obs_diff.weightings import LogDecrease
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor, nn

import compressor
from compressor import prompts, recipe
from compressor.calibration import Moments, StepCounter, sampling
from compressor.errors import CompressorError
from compressor.plugin import LayerResult, Pruner
from compressor.recipe import Recipe
from compressor.registry import find, load
from compressor.run import run
from tests import tiny
from tests.tiny import diffusers

pytestmark = pytest.mark.usefixtures("looked_at_once")


def make_recipe(output: Path, prune: list[dict], **changes) -> Recipe:
    data = {
        "model": str(tiny.folder("sd3")),
        "device": "cpu",
        "calibration": {"prompts": list(tiny.PROMPTS[:2]), "steps": 2, "batch": 2},
        "prune": prune,
        "report": {"images": 0},
        "output": str(output),
    }
    return Recipe.model_validate(data | changes)


def network_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def one_seed_for_every_batch(folder: Path) -> None:
    """1: a hundred prompts get a hundred initial noises."""
    pipeline = tiny.load("sd3")
    encoded = sampling.encode(pipeline, ["a cat"] * 100, 1.0, 0, "calibration")
    shape = (1, 4, 8, 8)
    noises = [torch.randn(shape, generator=torch.Generator().manual_seed(e.seed)) for e in encoded]
    assert len({noise.numpy().tobytes() for noise in noises}) == 100


def no_prompts_zero_the_network(folder: Path) -> None:
    """2: a missing or empty prompt file ends the run, and a Hessian of zero is refused, not taken for dead inputs."""
    empty = folder / "empty.txt"
    empty.write_text("\n \n")
    for file, words in ((folder / "missing.txt", "no such file"), (empty, "holds no prompts")):
        changes = {"calibration": {"prompts": str(file)}}
        with pytest.raises(CompressorError, match=words):
            run(make_recipe(folder / "out", [{"obs_diff": {"sparsity": 0.5}}], **changes), tiny.quiet())
    assert not (folder / "out").exists()
    with pytest.raises(CompressorError, match="nothing reached this layer during calibration"):
        factorise(torch.zeros(8, 8), 0.01, "layer")
    assert prompts.read(recipe.Prompts(texts=("a cat",)), "calibration") == ("a cat",)


def pruners_that_do_nothing(folder: Path) -> None:
    """3: every pruner that can be named prunes; an unknown name is an error."""
    dense = network_of(tiny.folder("sd3"))
    name = "transformer_blocks.0.attn.to_q.weight"
    targets = {"include": [name.removesuffix(".weight")]}
    for pruner in ("magnitude", "wanda", "obs_diff"):
        entry = {pruner: {"sparsity": 0.5}, "targets": targets}
        pruned = network_of(run(make_recipe(folder / pruner, [entry]), tiny.quiet()))
        assert int((pruned[name] == 0).sum()) == dense[name].numel() // 2
    with pytest.raises(ValidationError, match="no pruner named 'magnitud'; did you mean 'magnitude'"):
        make_recipe(folder / "out", [{"magnitud": {"sparsity": 0.5}}])


def options_that_do_not_belong_together(folder: Path) -> None:
    """4: a sparsity beside N:M, none beside unstructured, and unknown granularities are refused."""
    for options in (
        {"sparsity": 0.5, "granularity": {"n_m": {"keep": 2, "of": 4}}},
        {"granularity": "unstructured"},
        {"sparsity": 0.5, "granularity": "structured"},
        {"sparsity": 0.5, "method": "structured"},
    ):
        for pruner in ("magnitude", "wanda", "obs_diff"):
            with pytest.raises(ValidationError):
                make_recipe(folder, [{pruner: options}])


def steps_counted_by_callbacks(folder: Path) -> None:
    """6: schedulers that call more often than they step use each step's own weight."""
    for scheduler in (diffusers.HeunDiscreteScheduler(), diffusers.PNDMScheduler(skip_prk_steps=True)):
        scheduler.set_timesteps(25)
        counter = StepCounter(scheduler.timesteps)
        weights = LogDecrease().weights(tiny.schedule(25))
        assert len(scheduler.timesteps) > 25 == counter.steps
        used = [weights[counter.step(timestep)] for timestep in scheduler.timesteps]
        assert used == sorted(used, reverse=True)
        assert set(used) == set(weights)


def inputs_scaled_in_half_precision(folder: Path) -> None:
    """7: large half-precision inputs neither overflow nor feel the weight; what is not finite is left out."""
    x_TI = torch.tensor([[60000.0, 1.0], [float("inf"), 2.0]], dtype=torch.float16)
    moments = Moments.empty(2, True, torch.device("cpu"))
    moments.add(x_TI, 1.2)
    assert moments.second_II is not None
    exact = torch.tensor([[1.2 * float(x_TI[0, 0]) ** 2, 1.2 * float(x_TI[0, 0])], [1.2 * float(x_TI[0, 0]), 1.2]])
    torch.testing.assert_close(moments.second_II, exact, rtol=1e-6, atol=0)
    assert (int(moments.tokens), int(moments.skipped)) == (1, 1)


def a_failed_cholesky_ends_the_run(folder: Path) -> None:
    """8: damping rises until the factorisation succeeds, and the damping used is told."""
    hessian_II = torch.eye(4)
    hessian_II[0, 1] = hessian_II[1, 0] = 1.05  # one eigenvalue of -0.05
    assert torch.linalg.eigvalsh(hessian_II + 0.01 * torch.eye(4)).min() < 0
    assert factorise(hessian_II, 0.01, "layer").damping == pytest.approx(0.1)


def a_threshold_that_takes_ties(folder: Path) -> None:
    """9: exactly k weights go, ties or no ties; a sparsity of 1 is refused with words."""
    for share in (0.1, 0.5, 0.99):
        _, removed_OI = sweep(torch.ones(5, 20), torch.eye(20), Unstructured(), share, 128)
        assert int(removed_OI.sum()) == round(share * 100)
    for share in (0, 1, 1.5):
        with pytest.raises(ValidationError, match=r"should be (less|greater) than"):
            make_recipe(folder, [{"obs_diff": {"sparsity": share}}])


def n_that_means_pruned(folder: Path) -> None:
    """10: N is what stays."""
    new_OI, _ = sweep(torch.randn(4, 8), torch.eye(8), NM(keep=1, of=4), None, 128)
    assert ((new_OI.reshape(-1, 4) != 0).sum(1) == 1).all()


def pickles(folder: Path) -> None:
    """13: what is written holds no pickle, what is read neither, and no file of ours unpickles."""
    entry = {"magnitude": {"sparsity": 0.5}}
    output = run(make_recipe(folder / "out", [entry]), tiny.quiet())
    kinds = {file.suffix for file in output.rglob("*") if file.is_file()}
    assert kinds <= {".json", ".safetensors", ".html", ".txt"}
    network = output / "transformer"
    (network / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({}, network / "diffusion_pytorch_model.bin")
    with pytest.raises(CompressorError, match="refused: its weights are pickled"):
        run(make_recipe(folder / "again", [entry], model=str(output)), tiny.quiet())
    root = Path(compressor.__file__).parent.parent
    for file in (f for part in ("compressor", "plugins", "exporters") for f in (root / part).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not {"pickle", "joblib", "dill"} & {alias.name for alias in node.names}, file
            loads = isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
            if loads and isinstance(node, ast.Call):
                assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords), file


def work_done_again_and_again(folder: Path) -> None:
    """14: one Hessian and one factorisation for q, k and v; prompts encoded once; nothing decoded."""
    pipeline = tiny.load("sd3")
    factorised: list[str] = []
    encodings: list[int] = []

    def encoded(_module: nn.Module, _args: tuple) -> None:
        encodings.append(1)

    pipeline.pipe.text_encoder.register_forward_pre_hook(encoded)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.pipe.vae, "decode", None)
        from compressor_obs_diff import batch

        factorise = batch.factorise_batch
        patch.setattr(batch, "factorise_batch", lambda *args: factorised.extend(args[2]) or factorise(*args))
        calibration = tiny.calibrate(pipeline, packages=4, guidance=1.0)
        results = list(OBSDiff.model_validate({"sparsity": 0.5}).prune(tiny.component(pipeline), calibration))
    assert len(results) == len(pipeline.targets) == 21
    shared_by_three = 4  # q, k, v of image and text, in two blocks
    assert len(factorised) == len(set(factorised)) == 21 - 2 * shared_by_three
    assert len(encodings) == 1


def one_model_on_one_device(folder: Path) -> None:
    """15: U-Nets, SD3 with the second attention of SD3.5, and Flux, on the CPU; with rivals to compare against."""
    for kind in tiny.KINDS:
        pipeline = tiny.load(kind)
        assert pipeline.device.type == "cpu"
        wanda: Pruner = load("pruner", "wanda").model_validate({"sparsity": 0.5})
        calibration = tiny.calibrate(pipeline, ("a cat",), steps=1, packages=1)
        results = list(wanda.prune(tiny.component(pipeline), calibration))
        assert len(results) == len(pipeline.targets)
    assert any(".attn2." in target.name for target in tiny.load("sd35").targets)
    assert {"magnitude", "wanda", "obs_diff"} <= set(find("pruner"))


def nothing_is_verified(folder: Path) -> None:
    """16: zeros are counted in the weights as kept, and what is saved is loaded again before it takes its place."""
    from compressor import checkpoint

    asked = make_recipe(folder / "out", [{"magnitude": {"sparsity": 0.5}}])
    write = checkpoint._write

    def damaged(pipeline, target: Path) -> None:
        write(pipeline, target)
        file = target / "transformer" / "diffusion_pytorch_model.safetensors"
        data = bytearray(file.read_bytes())
        for i in range(len(data) - 4000, len(data)):
            data[i] = 0
        file.write_bytes(data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "_write", damaged)
        with pytest.raises(CompressorError, match="does not reload as it was"):
            run(asked, tiny.quiet())
    assert list(folder.iterdir()) == []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load("pruner", "magnitude"), "prune", lambda self, c, _: (LayerResult(t.name) for t in c.targets))
        with pytest.raises(CompressorError, match=r"should have made 128 weights of .* zero, found 0"):
            run(asked, tiny.quiet())
    assert list(folder.iterdir()) == []


DEFECTS: dict[int, Callable[[Path], None] | str] = {
    1: one_seed_for_every_batch,
    2: no_prompts_zero_the_network,
    3: pruners_that_do_nothing,
    4: options_that_do_not_belong_together,
    5: "rows of a GEGLU and the size of heads matter once neurons and heads are removed; nothing here removes them",
    6: steps_counted_by_callbacks,
    7: inputs_scaled_in_half_precision,
    8: a_failed_cholesky_ends_the_run,
    9: a_threshold_that_takes_ties,
    10: n_that_means_pruned,
    11: "chunks of neurons and single heads belong to structured pruning",
    12: "widths stay as they are until neurons and heads are removed",
    13: pickles,
    14: work_done_again_and_again,
    15: one_model_on_one_device,
    16: nothing_is_verified,
}


def test_every_point_is_in_the_table():
    assert list(DEFECTS) == list(range(1, 17))
    assert all(isinstance(case, str) or case.__doc__ for case in DEFECTS.values())


@pytest.mark.parametrize("number", [n for n, case in DEFECTS.items() if not isinstance(case, str)])
def test_a_defect_of_the_published_code_is_not_here(number, tmp_path):
    case = DEFECTS[number]
    assert not isinstance(case, str)
    assert (case.__doc__ or "").startswith(f"{number}: ")
    case(tmp_path)
