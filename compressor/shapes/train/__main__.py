"""The training command: `python -m compressor.shapes.train --family sd3 --out FOLDER --minutes 20`, on one GPU."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import click
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from transformers import CLIPTokenizer

from compressor.shapes import captions, evaluate, judge
from compressor.shapes.train import assemble, denoiser, stages
from compressor.shapes.train.families import FAMILIES, Family
from compressor.shapes.train.loop import Budget, Log, Rates

STAGES = ("tokenizer", "vae", "judge", "scenes", "denoiser", "evaluate")
_SHARES = {"vae": 0.10, "judge": 0.04, "denoiser": 0.78}  # of the minutes; the rest draws, encodes and evaluates
_SHIPPED = Path(judge.__file__).parent


@click.command()
@click.option("--family", "name", type=click.Choice(tuple(FAMILIES)), default="sd3", show_default=True, help="Which.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder for everything.")
@click.option(
    "--from",
    "source",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of an earlier run to take tokenizer, autoencoder and judge from, instead of training them. "
    "Default: what ships with the package, for every family but sd3.",
)
@click.option(
    "--cache",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File to keep the encoded scenes in, for other runs with the same autoencoder.",
)
@click.option("--until", type=click.Choice(STAGES), default=STAGES[-1], show_default=True, help="Last stage to run.")
@click.option("--minutes", type=click.FloatRange(min=0.01), default=16.5, show_default=True, help="Time for all.")
@click.option("--steps", type=click.IntRange(min=1), help="Most steps of each stage, to try things out.")
@click.option(
    "--scenes",
    type=click.IntRange(min=1),
    default=stages.Plan.scenes,
    show_default=True,
    help="Scenes that the denoiser is trained on.",
)
@click.option(
    "--pool",
    type=click.IntRange(min=1),
    default=stages.Plan.pool,
    show_default=True,
    help="Scenes that the other stages are trained on.",
)
@click.option(
    "--batch",
    type=click.IntRange(min=4),
    default=stages.Plan.batch,
    show_default=True,
    help="Of the denoiser; the others take a quarter.",
)
@click.option(
    "--rate",
    type=click.FloatRange(min=0, min_open=True),
    default=1e-3,
    show_default=True,
    help="Highest learning rate of the denoiser.",
)
@click.option("--evaluated", type=click.IntRange(1, 512), default=512, show_default=True, help="Captions judged.")
@click.option(
    "--guidance",
    "guidances",
    type=float,
    multiple=True,
    default=(1.5, 2.0, 3.0, 4.0, 5.0),
    show_default=True,
    help="Guidance scales to try on calibration captions.",
)
@click.option(
    "--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True, help="Where to train."
)
@click.option("--eager", is_flag=True, help="Neither compile nor record steps: slow, but works on any GPU.")
@click.option("--resume", is_flag=True, help="Go on with the run in the folder.")
def main(
    name: str,
    out: Path,
    source: Path | None,
    cache: Path | None,
    until: str,
    minutes: float,
    steps: int | None,
    scenes: int,
    pool: int,
    batch: int,
    rate: float,
    evaluated: int,
    guidances: tuple[float, ...],
    device: str,
    eager: bool,
    resume: bool,
) -> None:
    """Trains tokenizer, autoencoder, judge, and the text encoders with the denoiser; saves and evaluates them.

    The folder then holds what this package ships: pipeline/, judge.safetensors, judge.json, hashes.json, quality.json,
    and in work/ the checkpoints and log.jsonl; for other families pipeline-FAMILY/, hashes.json, quality-FAMILY.json.
    A stage that is complete is not trained again.
    """
    work = out / "work"
    if work.exists() and not resume:
        raise click.ClickException(
            f"{out} already holds a training run; add --resume to go on with it, or choose another --out"
        )
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    family, log, where = FAMILIES[name], Log(work / "log.jsonl"), torch.device(device)
    plan = stages.Plan(pool=pool, fresh=min(pool, stages.Plan.fresh), scenes=scenes, batch=batch, compiled=not eager)
    most = float("inf") if steps is None else steps
    budgets = {stage: Budget(minutes * 60 * share, most) for stage, share in _SHARES.items()}
    torch.manual_seed(0)
    if source is None and name != "sd3":
        source = _SHIPPED
    if source:
        words, vae, judging = _take(source, where)
        budgets["denoiser"] = Budget(minutes * 60 * sum(_SHARES.values()), most)
    else:
        words = work / "tokenizer"
        stages.train_tokenizer(words)
        if until == "tokenizer":
            return
        vae = stages.train_vae(where, plan, budgets["vae"], work / "vae.safetensors", log)
        if until == "vae":
            return
        judging, accuracy = stages.train_judge(where, vae, plan, budgets["judge"], work / "judge.safetensors", log)
        assemble.save_judge(judging, accuracy, out)
        click.echo(json.dumps(accuracy))
    if until in STAGES[: STAGES.index("scenes")]:
        return
    data = stages.kept_latents(cache, where, vae, words, plan)
    click.echo(f"{len(data.latents)} scenes cached")
    if until == "scenes":
        return
    tokenizer = CLIPTokenizer.from_pretrained(words)
    model = family.build(tokenizer, vae)
    rates = Rates(rate, warmup=1000, average=0.999)
    denoiser.train(where, model, data, plan, budgets["denoiser"], work / "denoiser.safetensors", log, rates)
    pipeline = family.assemble(model, vae, tokenizer)
    pipeline.set_progress_bar_config(disable=True)
    assemble.save(pipeline, out / f"pipeline{family.suffix}")
    assemble.write_hashes(out)
    if until == "denoiser":
        return
    del data
    pipeline.to(dtype=torch.float32 if where.type == "cpu" else torch.float16)
    report = _evaluated(pipeline, judging, family, guidances, evaluated)
    (out / f"quality{family.suffix}.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _take(folder: Path, device: torch.device) -> tuple[Path, AutoencoderKL, judge.Judge]:
    """The folder of the tokenizer, the autoencoder and the judge of an earlier run."""
    vae = AutoencoderKL.from_pretrained(folder / "pipeline" / "vae")
    vae.to(device).requires_grad_(False)  # type: ignore[arg-type]
    return folder / "pipeline" / "tokenizer", vae, judge.load(device, folder / "judge.safetensors")


def _evaluated(
    pipeline: DiffusionPipeline, judging: judge.Judge, family: Family, guidances: tuple[float, ...], count: int
) -> dict[str, object]:
    """The quality tables: of evaluation captions, and of calibration captions at each guidance scale."""
    scales = {}
    for guidance in guidances:
        rows, _ = evaluate.quality(pipeline, judging, captions.calibration()[:count], guidance=guidance)
        scales[guidance] = rows
        click.echo(f"calibration captions, guidance {guidance}\n{evaluate.as_text(rows)}")
    rows, _ = evaluate.quality(pipeline, judging, captions.evaluation()[:count], guidance=family.guidance)
    click.echo(f"evaluation captions, guidance {family.guidance}\n{evaluate.as_text(rows)}")
    return {"guidance": family.guidance, "steps": evaluate.STEPS, "table": rows, "calibration_by_guidance": scales}


if __name__ == "__main__":
    main()
