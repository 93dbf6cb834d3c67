"""The training command: `python -m compressor.shapes.train --out FOLDER --minutes 20`, on one GPU."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import click
import torch

from compressor.shapes import captions, evaluate
from compressor.shapes.train import assemble, denoiser, stages
from compressor.shapes.train.loop import Budget, Log, Rates

STAGES = ("tokenizer", "vae", "judge", "denoiser", "evaluate")
_SHARES = {"vae": 0.10, "judge": 0.04, "denoiser": 0.78}  # of the minutes; the rest draws, encodes and evaluates


@click.command()
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder for everything.")
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
@click.option("--resume", is_flag=True, help="Go on with the run in the folder.")
def main(
    out: Path,
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
    resume: bool,
) -> None:
    """Trains tokenizer, autoencoder, judge, and the text encoders with the denoiser; saves and evaluates them.

    The folder then holds what this package ships: pipeline/, judge.safetensors, judge.json, hashes.json, quality.json,
    and in work/ the checkpoints and log.jsonl. A stage that is complete is not trained again.
    """
    work = out / "work"
    if work.exists() and not resume:
        raise click.ClickException(
            f"{out} already holds a training run; add --resume to go on with it, or choose another --out"
        )
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    log, where = Log(work / "log.jsonl"), torch.device(device)
    plan = stages.Plan(pool=pool, fresh=min(pool, stages.Plan.fresh), scenes=scenes, batch=batch)
    budgets = {
        name: Budget(minutes * 60 * share, float("inf") if steps is None else steps) for name, share in _SHARES.items()
    }
    torch.manual_seed(0)
    tokenizer = stages.train_tokenizer(work / "tokenizer")
    if until == "tokenizer":
        return
    vae = stages.train_vae(where, plan, budgets["vae"], work / "vae.safetensors", log)
    if until == "vae":
        return
    judge, accuracy = stages.train_judge(where, vae, plan, budgets["judge"], work / "judge.safetensors", log)
    click.echo(json.dumps(accuracy))
    if until == "judge":
        return
    data = stages.cache_latents(where, vae, work / "tokenizer", plan)
    click.echo(f"{len(data.latents)} scenes cached")
    model = denoiser.build(tokenizer)
    rates = Rates(rate, warmup=1000, average=0.999)
    denoiser.train(where, model, data, plan, budgets["denoiser"], work / "denoiser.safetensors", log, rates)
    pipeline = assemble.pipeline(model, vae, tokenizer)
    assemble.save(pipeline, judge, accuracy, out)
    if until == "denoiser":
        return
    del data
    pipeline.to(dtype=torch.float32 if where.type == "cpu" else torch.float16)
    scales = {}
    for guidance in guidances:
        rows, _ = evaluate.quality(pipeline, judge, captions.calibration()[:evaluated], guidance=guidance)
        scales[guidance] = rows
        click.echo(f"calibration captions, guidance {guidance}\n{evaluate.as_text(rows)}")
    rows, _ = evaluate.quality(pipeline, judge, captions.evaluation()[:evaluated])
    click.echo(f"evaluation captions, guidance {evaluate.GUIDANCE}\n{evaluate.as_text(rows)}")
    report = {"guidance": evaluate.GUIDANCE, "steps": evaluate.STEPS, "table": rows, "calibration_by_guidance": scales}
    (out / "quality.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
