"""Recipes: every mistake at once, in words, with its line; and what a good one becomes."""

from pathlib import Path

import pytest
import yaml

from compressor import recipe
from compressor.errors import CompressorError
from compressor.recipe import Prompts, Recipe

HEAD = "model: builtin:shapes\n"
TAIL = "output: out\n"


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def load(text: str, *overrides: str) -> Recipe:
    Path("r.yaml").write_text(text, encoding="utf-8")
    return recipe.load("r.yaml", overrides)


def mistakes(text: str, *overrides: str) -> list[str]:
    with pytest.raises(CompressorError) as caught:
        load(text, *overrides)
    return str(caught.value).splitlines()


def mistake_of(entry: str) -> list[str]:
    """The mistakes of a recipe whose fifth line is this entry of `prune`, without `r.yaml:5: prune[0]`."""
    start = "r.yaml:5: prune[0]"
    text = HEAD + "calibration: {prompts: [a]}\nreport: {images: 0}\nprune:\n  - " + entry + "\n" + TAIL
    found = mistakes(text)
    assert all(line.startswith(start) for line in found), found
    return [line.removeprefix(start) for line in found]


EVERYTHING_WRONG = """\
modle: builtin:shapes
model: {source: 5, dtype: float8}
device: 3
seed: -1
calibration:
  prompts: {texts: [a, 5], file: x.txt}
  samples: 1.5
  steps: "20"
  guidance: high
  batch: 0
  height: true
  memory: 8 gigs
prune:
  - obs_dif: {sparsity: 0.5}
  - obs_diff: {sparsity: 50, damping: .inf, block: [1]}
    targets: {include: attention}
  - 5
report: {images: many, metrics: [pears]}
export: [onxx]
output: 7
"""


def test_every_mistake_is_told_at_once_in_the_order_of_lines():
    assert mistakes(EVERYTHING_WRONG) == [
        "r.yaml:1: modle: unknown key; did you mean 'model'?",
        "r.yaml:2: model.source: should be a string, found 5",
        "r.yaml:2: model.dtype: should be 'auto', 'float32', 'float16' or 'bfloat16', found 'float8'",
        "r.yaml:3: device: should be a string, found 3",
        "r.yaml:4: seed: should be at least 0, found -1",
        "r.yaml:6: calibration.prompts.texts[1]: should be a string, found 5",
        "r.yaml:7: calibration.samples: should be a whole number, found 1.5",
        "r.yaml:8: calibration.steps: should be a whole number, found '20'",
        "r.yaml:9: calibration.guidance: should be a number, found 'high'",
        "r.yaml:10: calibration.batch: should be at least 1, found 0",
        "r.yaml:11: calibration.height: should be a whole number, found true",
        "r.yaml:12: calibration.memory: should be a size such as 8GiB or 500MB, found '8 gigs'",
        "r.yaml:14: prune[0]: no pruner named 'obs_dif'; did you mean 'obs_diff'?",
        "r.yaml:15: prune[1].obs_diff.sparsity: should be less than 1, found 50",
        "r.yaml:15: prune[1].obs_diff.damping: should be a finite number, found inf",
        "r.yaml:15: prune[1].obs_diff.block: should be a whole number, found a list",
        "r.yaml:16: prune[1].targets.include: should be a list, found 'attention'",
        "r.yaml:17: prune[2]: should be a mapping of options, found 5",
        "r.yaml:18: report.images: should be a whole number, found 'many'",
        "r.yaml:18: report.metrics[0]: no metric named 'pears'; did you mean 'pairs'?",
        "r.yaml:19: export[0]: no exporter named 'onxx'; did you mean 'onnx'?",
        "r.yaml:20: output: should be a string, found 7",
    ]


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("obs_diff: {sparsity: 50}", ".obs_diff.sparsity: should be less than 1, found 50"),
        ("obs_diff: {sparsity: 1}", ".obs_diff.sparsity: should be less than 1, found 1"),
        ("obs_diff: {sparsity: 1.0}", ".obs_diff.sparsity: should be less than 1, found 1.0"),
        ("obs_diff: {sparsity: 0}", ".obs_diff.sparsity: should be greater than 0, found 0"),
        ("obs_diff: {sparsity: -0.5}", ".obs_diff.sparsity: should be greater than 0, found -0.5"),
        ("obs_diff: {sparsity: .nan}", ".obs_diff.sparsity: should be a finite number, found nan"),
        ("obs_diff: {sparsity: 50%}", ".obs_diff.sparsity: should be a number, found '50%'"),
        ("obs_diff: {sparsity: true}", ".obs_diff.sparsity: should be a number, found true"),
        ("obs_diff: {sparsity: [0.5]}", ".obs_diff.sparsity: should be a number, found a list"),
        ("obs_diff: 0.5", ".obs_diff: should be a mapping of options, found 0.5"),
        ("obs_diff:", ".obs_diff: sparsity is missing; should be the share of weights to remove, such as 0.5"),
        ("obs_diff", ".obs_diff: sparsity is missing; should be the share of weights to remove, such as 0.5"),
        ("magnitude: {}", ".magnitude: sparsity is missing; should be the share of weights to remove, such as 0.5"),
        (
            "wanda: {sparsity: 0.5, granularity: {n_m: {keep: 2, of: 4}}}",
            ".wanda: sparsity has no effect: this granularity decides how much is removed; leave one of them out",
        ),
        (
            "obs_diff: {granularity: {n_m: {keep: 4, of: 4}}}",
            ".obs_diff.granularity.n_m: keep should be less than of, found keep 4 of 4",
        ),
        (
            "obs_diff: {granularity: {n_m: {keep: 5, of: 4}}}",
            ".obs_diff.granularity.n_m: keep should be less than of, found keep 5 of 4",
        ),
        (
            "obs_diff: {granularity: {n_m: {keep: 0, of: 4}}}",
            ".obs_diff.granularity.n_m.keep: should be at least 1, found 0",
        ),
        (
            "obs_diff: {granularity: {n_m: {keep: 1, of: 4, only_where_faster: 1.05}}}",
            ".obs_diff.granularity.n_m: only_where_faster needs keep 2 of 4, the only pattern that GPUs are faster "
            "with, found keep 1 of 4",
        ),
        (
            "wanda: {granularity: {n_m: {probe: mine.json}}}",
            ".wanda.granularity.n_m: probe has no effect without only_where_faster; leave it out",
        ),
        (
            "wanda: {granularity: {n_m: {batch: 2}}}",
            ".wanda.granularity.n_m: batch has no effect without only_where_faster; leave it out",
        ),
        (
            "wanda: {granularity: {structured: {heads: 0.3}}}",
            ".wanda.granularity: this pruner cannot take granularity 'structured'; should be one of n_m, unstructured",
        ),
        (
            "l1_norm: {granularity: unstructured}",
            ".l1_norm.granularity: this pruner cannot take granularity 'unstructured'; should be one of structured",
        ),
        ("l1_norm", ".l1_norm.granularity: is missing"),
        (
            "obs_diff: {sparsity: 0.3, granularity: {structured: {heads: 0.3}}}",
            ".obs_diff: sparsity has no effect: this granularity decides how much is removed; leave one of them out",
        ),
        (
            "obs_diff: {block: 64, granularity: {structured: {heads: 0.3}}}",
            ".obs_diff: block has no effect: heads and neurons are chosen one by one and fitted anew; leave it out",
        ),
        (
            "obs_diff: {objective: network, fusion: rank_fusion, granularity: {structured: {heads: 0.3}}}",
            ".obs_diff: fusion has no effect: errors of the network's output add up by themselves; leave it out",
        ),
        (
            "obs_diff: {sparsity: 0.5, objective: network}",
            ".obs_diff: objective network needs solver admm: the sweep of obs takes every output for itself; choose "
            "solver admm, or leave objective out",
        ),
        (
            "obs_diff: {sparsity: 0.5, solver: admm, block: 64}",
            ".obs_diff: block has no effect: solver admm has no blocks; leave it out",
        ),
        (
            "obs_diff: {sparsity: 0.6, spread: 0.4, solver: admm, objective: network}",
            ".obs_diff: spread should leave every layer a share from 0 to less than 1, found 0.6 with a spread of 0.4; "
            "at most 0.399 would do",
        ),
        (
            "obs_diff: {sparsity: 0.1, spread: 0.2, solver: admm, objective: network}",
            ".obs_diff: spread should leave every layer a share from 0 to less than 1, found 0.1 with a spread of 0.2; "
            "at most 0.1 would do",
        ),
        (
            "obs_diff: {sparsity: 0.6, spread: 0.1}",
            ".obs_diff: spread needs objective network, whose gradients tell what the zeros of each layer do; add it, "
            "or leave spread out",
        ),
        (
            "obs_diff: {spread: 0.1, granularity: {n_m: {keep: 2, of: 4}}}",
            ".obs_diff: spread has no effect: this granularity decides what every layer loses; leave it out",
        ),
        (
            "obs_diff: {spread: 0.1, granularity: {structured: {heads: 0.3}}}",
            ".obs_diff: spread needs objective network, whose gradients tell what the zeros of each layer do; add it, "
            "or leave spread out",
        ),
        (
            "obs_diff: {sparsity: 0.3, fusion: rank_fusion}",
            ".obs_diff: fusion has no effect: only heads are shared by two streams; leave it out",
        ),
        (
            "obs_diff: {granularity: {structured: {heads: 0.3}}, fusion: rank}",
            ".obs_diff.fusion: should be 'energy' or 'rank_fusion', found 'rank'",
        ),
        (
            "obs_diff: {granularity: structured}",
            ".obs_diff.granularity.structured: should have a share of heads, neurons or both to remove, such as 0.3; "
            "found neither",
        ),
        (
            "obs_diff: {granularity: {structured: {heads: 0.3, multiple: 8}}}",
            ".obs_diff.granularity.structured: multiple has no effect: it is of neurons, and none are removed; leave "
            "it out",
        ),
        (
            "obs_diff: {granularity: {structured: {heads: 30}}}",
            ".obs_diff.granularity.structured.heads: should be less than 1, found 30",
        ),
        (
            "obs_diff: {sparsity: 0.5, granularity: 2:4}",
            ".obs_diff.granularity: no granularity named '2:4'; installed: n_m, structured, unstructured "
            "(a plugin just added to a project shows up after `pip install -e .` is run again)",
        ),
        (
            "obs_diff: {sparsity: 0.5, weighting: log_decreas}",
            ".obs_diff.weighting: no weighting named 'log_decreas'; did you mean 'log_decrease'?",
        ),
        (
            "obs_diff: {sparsity: 0.5, weighting: {uniform: {low: 1}}}",
            ".obs_diff.weighting.uniform.low: unknown key; known: none",
        ),
        (
            "obs_diff: {sparsity: 0.5, weighting: {log_decrease: {low: 2}}}",
            ".obs_diff.weighting.log_decrease: low should be at most high, found 2.0 and 1.2",
        ),
        (
            "obs_diff: {sparsity: 0.5, weighting: {log_decrease: {low: '1'}}}",
            ".obs_diff.weighting.log_decrease.low: should be a number, found '1'",
        ),
        ("obs_diff: {sparsity: 0.5, dampng: 1}", ".obs_diff.dampng: unknown key; did you mean 'damping'?"),
        (
            "obs_diff: {sparsity: 0.5, xyz: 1}",
            ".obs_diff.xyz: unknown key; known: sparsity, spread, granularity, weighting, objective, solver, refit, "
            "damping, block, fusion",
        ),
        ("magnitud: {sparsity: 0.5}", ": no pruner named 'magnitud'; did you mean 'magnitude'?"),
        (
            "nothing_like_it: {sparsity: 0.5}",
            ": no pruner named 'nothing_like_it'; installed: l1_norm, magnitude, obs_diff, wanda "
            "(a plugin just added to a project shows up after `pip install -e .` is run again)",
        ),
        (
            "{obs_diff: {sparsity: 0.5}, wanda: {sparsity: 0.5}}",
            ": should name one pruner (l1_norm, magnitude, obs_diff, wanda), as `name` or `name: options`, "
            "found 2 keys (obs_diff, wanda)",
        ),
        (
            "{}",
            ": should name one pruner (l1_norm, magnitude, obs_diff, wanda), as `name` or `name: options`, "
            "found an empty mapping",
        ),
        (
            "targets: {include: [query]}",
            ": should name one pruner (l1_norm, magnitude, obs_diff, wanda), as `name` or `name: options`, "
            "found an empty mapping",
        ),
        ("[obs_diff]", ": should be a mapping of options, found a list"),
        (
            "{obs_diff: {sparsity: 0.5}, target: {include: [query]}}",
            ".target: unknown key; did you mean 'targets'?",
        ),
        ("{obs_diff: {sparsity: 0.5}, targets: {include: []}}", ".targets.include: should not be empty"),
        (
            "{obs_diff: {sparsity: 0.5}, targets: {exclude: [query, 're:(']}}",
            ".targets.exclude: 're:(' is not a regular expression: missing ), unterminated subpattern at position 0",
        ),
        (
            "{obs_diff: {sparsity: 0.5}, targets: {includes: [query]}}",
            ".targets.includes: unknown key; did you mean 'include'?",
        ),
    ],
)
def test_a_mistake_in_an_entry_of_prune_has_one_message(entry, words):
    assert mistake_of(entry) == [words]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("seed: 2147483648", "seed: should be less than 2147483648, found 2147483648"),
        ("calibration: {}", "calibration.prompts: is missing"),
        ("calibration: {prompts: }", "calibration.prompts: should give one of texts, file and builtin, found none"),
        (
            "calibration: {prompts: {texts: [a], file: b}}",
            "calibration.prompts: should give one of texts, file and builtin, found texts and file",
        ),
        (
            "calibration: {prompts: {texts: [a], column: b}}",
            "calibration.prompts: column has no effect without file",
        ),
        ("calibration: {prompts: 5}", "calibration.prompts: should be a mapping of options, found 5"),
        (
            "calibration: {prompts: [a], packages: 2, memory: 1GiB}",
            "calibration: should give packages or memory, found both",
        ),
        ("calibration: {prompts: [a], memory: 0}", "calibration.memory: should be greater than 0, found 0"),
        ("calibration: {prompts: [a], memory: 1.5}", "calibration.memory: should be a whole number, found 1.5"),
        (
            "calibration: {prompts: [a], memory: 1.2.3GiB}",
            "calibration.memory: should be a size such as 8GiB or 500MB, found '1.2.3GiB'",
        ),
        ("calibration: {prompts: [a], guidance: '7'}", "calibration.guidance: should be a number, found '7'"),
        ("calibration: {prompts: [a], guidance: true}", "calibration.guidance: should be a number, found true"),
        ("calibration: {prompts: [a], guidance: .inf}", "calibration.guidance: should be a finite number, found inf"),
        ("calibration: [a]", "calibration: should be a mapping of options, found a list"),
    ],
)
def test_a_mistake_elsewhere_has_one_message(line, words):
    text = HEAD + line + "\nprune: [{magnitude: {sparsity: 0.5}}]\nreport: {images: 0}\n" + TAIL
    assert mistakes(text) == [f"r.yaml:2: {words}"]


@pytest.mark.parametrize(
    ("prune", "words"),
    [
        ("prune: []", "r.yaml:1: prune and export are both empty: there is nothing to do"),
        ("prune:", "r.yaml:2: prune: should be a list, found nothing"),
        ("prune: {obs_diff: {sparsity: 0.5}}", "r.yaml:2: prune: should be a list, found a mapping"),
        ("prune: obs_diff", "r.yaml:2: prune: should be a list, found 'obs_diff'"),
        ("prun: []", "r.yaml:1: prune: is missing\nr.yaml:2: prun: unknown key; did you mean 'prune'?"),
        ("prune: [nothing_like_it]", None),
    ],
)
def test_prune_is_a_list_of_something(prune, words):
    found = mistakes(HEAD + prune + "\n" + TAIL)
    if words is None:
        assert len(found) == 1  # not also that the list of the good ones is empty
    else:
        assert "\n".join(found) == words


def test_what_is_missing_is_told():
    assert mistakes("seed: 1\n") == [
        "r.yaml:1: model: is missing",
        "r.yaml:1: prune: is missing",
        "r.yaml:1: output: is missing",
    ]


def test_a_pruner_that_needs_the_inputs_needs_a_calibration():
    text = HEAD + "prune:\n  - magnitude: {sparsity: 0.5}\n  - wanda: {sparsity: 0.5}\nreport: {images: 0}\n" + TAIL
    assert mistakes(text) == ["r.yaml:1: calibration is missing: prune[1].wanda needs the inputs of its layers"]


def test_images_need_prompts_from_somewhere():
    text = HEAD + "prune: [{magnitude: {sparsity: 0.5}}]\n" + TAIL
    assert mistakes(text) == [
        "r.yaml:1: report.prompts is missing: without a calibration there are no prompts to draw images from"
    ]
    assert load(text, "report.images=0").report.images == 0


def test_an_override_replaces_what_the_file_says_and_its_mistakes_name_it():
    text = HEAD + "calibration: {prompts: [a]}\nprune:\n  - obs_diff: {sparsity: 0.5}\n" + TAIL
    found = load(text, "prune.0.obs_diff.sparsity=0.6", "calibration.memory=8GiB", "seed=010")
    assert found.prune[0].pruner.model_dump()["sparsity"] == 0.6
    assert found.calibration is not None
    assert found.calibration.memory == 8 * 2**30
    assert found.seed == 10
    assert mistakes(text + "bad: 1\n", "prune.0.obs_diff.sparsity=60", "calibration.step=4", "sed=1") == [
        "--set calibration.step: calibration.step: unknown key; did you mean 'steps'?",
        "--set prune.0.obs_diff.sparsity: prune[0].obs_diff.sparsity: should be less than 1, found 60",
        "--set sed: sed: unknown key; did you mean 'seed'?",
        "r.yaml:6: bad: unknown key; known: model, device, offload, seed, calibration, prune, report, export, output",
    ]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("8GiB", 8 * 2**30),
        ("1.5 GiB", 3 * 2**29),
        ("500MB", 500 * 10**6),
        ("500 mb", 500 * 10**6),
        ("64kib", 64 * 2**10),
        ("1000", 1000),
        ("'1000'", 1000),
        ("12B", 12),
        ("2GB", 2 * 10**9),
    ],
)
def test_sizes_are_read_with_decimal_and_binary_units(text, number):
    found = load(
        HEAD + f"calibration: {{prompts: [a], memory: {text}}}\nprune: [{{magnitude: {{sparsity: 0.5}}}}]\n" + TAIL
    )
    assert found.calibration is not None
    assert found.calibration.memory == number


@pytest.mark.parametrize(
    ("short", "full"),
    [
        ("[a red dog, no]", {"texts": ("a red dog", "no")}),
        ("prompts.txt", {"file": "prompts.txt"}),
        ("builtin:shapes", {"builtin": "shapes"}),
        ("{file: p.csv, column: text}", {"file": "p.csv", "column": "text"}),
    ],
)
def test_prompts_have_short_forms(short, full):
    found = load(HEAD + f"calibration: {{prompts: {short}}}\nprune: [{{obs_diff: {{sparsity: 0.5}}}}]\n" + TAIL)
    assert found.calibration is not None
    assert found.calibration.prompts == Prompts(**full)


def test_a_model_may_be_its_source_alone():
    found = load(HEAD + "prune: [{magnitude: {sparsity: 0.5}}]\nreport: {images: 0}\n" + TAIL)
    assert found.model.source == "builtin:shapes"
    assert (found.model.component, found.model.dtype) == (None, "auto")


FULL = """\
model: {source: builtin:shapes, component: transformer, dtype: bfloat16}
device: cpu
seed: 7
calibration: {prompts: {file: p.tsv, column: c}, samples: 3, steps: 5, guidance: 1, batch: 2, height: 64, memory: 8GiB}
prune:
  - obs_diff: {sparsity: 0.5, weighting: {linear_increase: {low: 0.5}}, damping: 1e-3}
    targets: {include: [attention], exclude: ["re:add_.*"]}
  - wanda: {granularity: {n_m: {keep: 2, of: 4}}}
  - obs_diff: {granularity: {structured: {heads: 0.3, keep_last: 0}}, fusion: rank_fusion}
  - l1_norm: {granularity: {structured: {neurons: 0.3, multiple: 8}}}
report: {prompts: [a, b], images: 2, metrics: [pairs]}
export: [onnx]
output: out
"""


def test_a_dumped_recipe_loads_as_the_same_recipe():
    first = load(FULL)
    text = yaml.safe_dump(first.dump())
    second = load(text)
    assert second == first
    assert second.dump() == first.dump()
    n_m = {"keep": 2, "of": 4, "only_where_faster": None, "probe": "probe.json", "batch": None}
    assert first.dump()["prune"][1] == {
        "wanda": {"sparsity": None, "granularity": {"n_m": n_m}, "weighting": {"uniform": {}}},
        "targets": {"include": ["attention", "feed_forward"], "exclude": []},
    }


def test_a_recipe_cannot_be_changed():
    found = load(FULL)
    with pytest.raises(ValueError, match="frozen"):
        found.seed = 1


def test_input_files_are_looked_for_beside_the_recipe_and_then_here(tmp_path):
    folder = tmp_path / "recipes"
    folder.mkdir()
    text = "model: models/mine\ncalibration: {prompts: beside.txt}\nprune: [{obs_diff: {sparsity: 0.5}}]\n"
    text += "report: {prompts: here.txt}\noutput: out\n"
    (folder / "r.yaml").write_text(text)
    (folder / "beside.txt").write_text("a")
    (folder / "models" / "mine").mkdir(parents=True)
    (tmp_path / "here.txt").write_text("a")
    found = recipe.load(Path("recipes/r.yaml"))
    assert found.calibration is not None
    assert found.report.prompts is not None
    assert found.model.source == "recipes/models/mine"
    assert found.calibration.prompts.file == "recipes/beside.txt"
    assert found.report.prompts.file == "here.txt"
    assert found.output == "out"


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    text = "model: ~/m\ncalibration: {prompts: ~/p.txt}\nprune: [{obs_diff: {sparsity: 0.5}}]\noutput: ~/out\n"
    found = load(text)
    assert found.calibration is not None
    assert found.model.source == str(tmp_path / "home/m")
    assert found.calibration.prompts.file == str(tmp_path / "home/p.txt")
    assert found.output == str(tmp_path / "home/out")


def test_every_recipe_that_comes_with_the_package_is_free_of_mistakes():
    names = list(recipe.shipped())
    assert "quickstart" in names
    for name in names:
        assert recipe.load(name).prune


def test_a_recipe_that_neither_exists_nor_comes_with_the_package_is_named():
    with pytest.raises(CompressorError) as caught:
        recipe.load("quickstrat")
    assert str(caught.value) == (
        "quickstrat: no such file, and no recipe of that name came with the package; did you mean 'quickstart'?"
    )
    with pytest.raises(CompressorError, match=r"^mine\.yaml: no such file$"):
        recipe.load("mine.yaml")
