"""Arguments and options that several commands take."""

from __future__ import annotations

import click

RECIPE = click.argument("recipe_file", metavar="RECIPE")
SET = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change the recipe, as prune.0.obs_diff.sparsity=0.6.",
)
BATCH = click.option(
    "--batch",
    "batches",
    multiple=True,
    type=click.IntRange(1),
    default=(1,),
    show_default=True,
    help="Samples of one forward of the network; with classifier-free guidance an image takes two. May be given "
    "several times.",
)
HALF = click.option("--dtype", type=click.Choice(["bfloat16"]), default="bfloat16", show_default=True)
