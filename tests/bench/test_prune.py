"""The benchmark `prune` on tiny models: that it times what a run uses, what it tells, every message; never times."""

from __future__ import annotations

import functools
import json
import re
from contextlib import contextmanager, nullcontext
from pathlib import Path

import click.testing
import pytest
import torch
from compressor_obs_diff import OBSDiff, layers

from compressor import calibration
from compressor.bench import forward_times, forwards, gathered, models, networks, prune, subjects, timing
from compressor.bench.gathered import Network
from compressor.bench.models import MODELS
from compressor.bench.subjects import Asked
from compressor.bench.timing import Times
from compressor.calibration import Moments, compiled, kernels
from compressor.calibration.packages import cut
from compressor.cli import main
from compressor.entries import enter
from compressor.errors import CompressorError
from compressor.structure import compile_blocks
from compressor.units import DASH, duration
from tests import cpu_graph, tiny
from tests.bench.test_shrunk import TINY

CASES = ("unstructured 50 %", "2:4", "structured 30 %")


@pytest.fixture(autouse=True)
def _tiny_models(monkeypatch, tmp_path):
    monkeypatch.setattr(models, "MODELS", MODELS | TINY)
    monkeypatch.chdir(tmp_path)


def call(arguments: str) -> click.testing.Result:
    found = click.testing.CliRunner().invoke(main, ["bench", "prune", *arguments.split()])
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    return found


def tables(text: str) -> list[list[list[str]]]:
    """The cells of each table, without the rule below its heads."""
    found: list[list[list[str]]] = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            found[-1].append([cell.strip() for cell in line.split("|")[1:-1]])
        elif found[-1]:
            found.append([])
    return [[rows[0], *rows[2:]] for rows in found if rows]


def recipe_of(kind: str, prune: str, calibration: str = "") -> str:
    text = f"model: {tiny.folder(kind)}\ncalibration: {{prompts: [a], height: 16, width: 16, steps: 2{calibration}}}\n"
    Path("r.yaml").write_text(f"{text}prune: {prune}\noutput: out\n")
    return "r.yaml"


def test_one_call_times_forwards_and_solves_and_extrapolates_jobs(monkeypatch):
    made_up = iter([1, 2, 3, 4, 5, 6, 10, *range(8, 100)])  # plain, packages, all layers, four forwards of which one is

    def in_turns(calls, repeats, in_a_row, warmups, device, around, advance):
        assert (repeats, in_a_row, warmups) == (3, 1, 1)
        return {name: Times((float(next(made_up)),) * 3, (0.0,) * 3) for name in calls}

    monkeypatch.setattr(forward_times, "in_turns", in_turns)
    found = call("tiny-sd3 --size 64 --batch 3 --prompts 10 --steps 7 --stride 2 --repeats 3 --output deep/p.json")
    assert found.exit_code == 0, found.stderr
    assert "64 x 64 pixels, 6 samples a forward; medians of 3 turns of forwards and 1 turn of solves" in found.stdout
    words = "10 prompts, 3 at a time, 7 steps, of which the network runs the first and one of every 2. Loading,"
    assert f"Extrapolated from the medians above, not run: {words}" in found.stdout
    forwards, solves, jobs = tables(found.stdout)
    whole = ["all layers", "all layers, 25 % of the tokens"]
    assert [row[0] for row in forwards[1:]] == [
        "plain",
        *(f"unstructured 50 %, 2:4: {kind}" for kind in [*(f"package {i} of 4" for i in range(1, 5)), *whole]),
        *(f"structured 30 %: {kind}" for kind in [*(f"package {i} of 3" for i in range(1, 4)), *whole]),
    ]
    assert [row[5] for row in forwards[1:8]] == [f"{ratio:.2f}x" for ratio in (1, 2, 3, 4, 5, 6, 2.5)]
    assert (
        "\nOf a share of the tokens: that share of the forwards is summed, and the time is a forward's" in found.stdout
    )
    assert sum(int(row[1]) for row in forwards[2:6]) == int(forwards[6][1]) == int(forwards[7][1])
    assert [tuple(row[:3]) for row in solves[1:] if row[0] == "unstructured 50 %"] == [
        ("unstructured 50 %", "32 x 32", "31"),
        ("unstructured 50 %", "128 x 32", "7"),
        ("unstructured 50 %", "32 x 128", "7"),
        ("unstructured 50 %", "all", "45"),
    ]
    count = -(-10 // 3) * (1 + 3)  # forwards of a pass, each of 1 s
    expected = {
        "1 package": (count, 1 * count, 5 * count),
        "1 package, 25 % of the tokens": (count, 1 * count, 1.5 * count),
        "4 packages": (4 * count, 4 * count, (1 + 2 + 3 + 4) * count),
    }
    data = json.loads(Path("deep/p.json").read_text())["models"][0]
    for case in CASES[:2]:
        these = {job["how"]: job for job in data["extrapolated"] if job["name"] == case}
        for how, (forwards_of, plain, moments) in expected.items():
            assert (these[how]["forwards"], these[how]["plain"], these[how]["moments"]) == (forwards_of, plain, moments)
            solved = next(row for row in data["solves"] if row["name"] == case)["median"]
            assert these[how]["seconds"] == pytest.approx(plain + moments + solved)
            assert these[how]["solves"] == solved > 0
    assert [row[:3] for row in jobs[1:]][2] == ["unstructured 50 %", "4 packages", "64"]
    assert {row["name"] for row in data["solves"]} == set(CASES)
    assert all(len(layer) == 1 for row in data["solves"] for shape in row["shapes"] for layer in shape["seconds"])
    assert "peak memory of the whole process: " in found.stdout


def test_hooks_and_solvers_are_those_of_a_run(monkeypatch):
    """It comes through the functions that a calibration and a pruner call, and leaves the network dense."""
    seen: dict[str, int] = {"add": 0, "prune_package": 0}
    pruned: list[torch.nn.Linear] = []
    add, prune_package = Moments.add, layers.prune_package

    def watched_add(self, x, *rest):
        seen["add"] += 1
        add(self, x, *rest)

    def watched_prune(options, package, moments, zeros):
        seen["prune_package"] += 1
        assert all(int(found.tokens) > 0 for found in moments.values())
        pruned.extend(target.module for group in package.groups for target in group.targets)
        yield from prune_package(options, package, moments, zeros)

    monkeypatch.setattr(Moments, "add", watched_add)
    monkeypatch.setattr(layers, "prune_package", watched_prune)
    assert gathered.gathering.watch is calibration.gathering.watch
    subject = subjects.find("tiny-sd3", Asked(size=64, batch=1, layers=2))
    found = prune.measure(
        subject,
        prune._plan(subject),
        prune.Settings(("tiny-sd3",), repeats=1),
        torch.device("cpu"),
        "float32",
        tiny.quiet(),
    )
    inputs = found.forwards[5].inputs
    assert found.forwards[5].name == "unstructured 50 %, 2:4: all layers"
    assert seen["prune_package"] == 2 * 4
    of_structured = found.forwards[-1].inputs
    # for each, packages and all and one forward in four, thrice: for memory, as a warm-up, timed; then the solves
    assert seen["add"] == 9 * (inputs + of_structured) + 2 * inputs + of_structured
    assert pruned
    assert all(module.weight.count_nonzero() == module.weight.numel() for module in pruned)  # drawn anew


def test_compiled_forwards_are_refused_where_gradients_are_gathered():
    found = call(recipe_of("sd3", "[{obs_diff: {sparsity: 0.5, solver: admm, objective: network}}]") + " --compile")
    assert found.exit_code != 0
    assert "r.yaml: --compile should be left out where gradients are gathered (objective network)" in found.stderr


def test_compiled_forwards_are_timed_beside_eager_ones_and_compiling_counts_once(monkeypatch):
    """Times of turns are made up; first calls are real ones."""
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    monkeypatch.setattr(forwards, "compile_blocks", functools.partial(compile_blocks, backend="eager"))
    made_up = iter(range(1, 100))

    def in_turns(calls, repeats, in_a_row, warmups, device, around, advance):
        for name, call in calls.items():
            with around(name):
                call()
        return {name: Times((next(made_up) / 1000,), (0.0,)) for name in calls}

    monkeypatch.setattr(forward_times, "in_turns", in_turns)
    arguments = "tiny-sd3 --size 64 --batch 1 --prompts 10 --steps 7 --stride 2 --layers 1 --packages 1 --output p.json"
    plain = tables(call(arguments).stdout)
    made_up = iter(range(1, 100))
    found = call(arguments + " --compile")
    assert found.exit_code == 0, found.stderr
    data = json.loads(Path("p.json").read_text())["models"][0]
    assert data["calibration"]["compile"] is True
    rows = {row["name"]: row for row in data["forwards"]}
    eager = [name for name in rows if not name.endswith(", compiled")]
    assert eager == [row[0] for row in plain[0][1:]]
    assert sorted(rows) == sorted([*eager, *(f"{name}, compiled" for name in eager)])
    with_moments = [row for name, row in rows.items() if name.endswith(", compiled") and row["inputs"]]
    with_moments = [row for row in with_moments if row["first"] is not None]
    assert len(with_moments) == 2  # both kinds of all layers
    compiling = max(row["first"] - row["times"]["seconds"][0] for row in with_moments)
    of_plain = rows["plain, compiled"]["times"]["seconds"][0]
    jobs = {(job["name"], job["how"]): job for job in data["extrapolated"]}
    for (name, how), job in jobs.items():
        assert job["compiling"] == (compiling if how.endswith(", compiled") else 0)
        assert job["seconds"] == pytest.approx(job["plain"] + job["moments"] + job["solves"] + job["compiling"])
        assert job["forwards"] == 40
        if how.endswith(", compiled"):
            assert job["plain"] == pytest.approx(40 * of_plain)
            row = rows[next(k for k in rows if name in k and k.endswith(how.replace("1 package", "all layers")))]
            assert job["plain"] + job["moments"] == pytest.approx(40 * row["times"]["seconds"][0])
    assert any(
        row[1].startswith("1 package, compiled (") and "of it compiling)" in row[1] for row in tables(found.stdout)[2]
    )
    assert f"The first compiled forward took {duration(rows['plain, compiled']['first'])}, " in found.stdout
    longest = duration(max(row["first"] for row in with_moments))
    assert f"{longest} with moments, once for all kinds of them; that is compiling." in found.stdout


def test_a_recipe_decides_itself_whether_compiled_forwards_are_timed(monkeypatch):
    asked: list[torch.device] = []

    def check(device: torch.device) -> None:
        asked.append(device)
        raise CompressorError("calibration.compile: nothing compiles here")

    monkeypatch.setattr(prune, "check_compiler", check)
    found = call(recipe_of("sd3", "[{obs_diff: {sparsity: 0.5}}]", ", compile: true"))
    assert found.exit_code != 0
    assert "calibration.compile: nothing compiles here" in found.stderr
    assert asked == [torch.device("cpu")]


def test_a_kind_of_forward_is_around_its_calls_alone():
    inside: list[str] = []

    class Around:
        def __init__(self, name: str) -> None:
            self.name = name

        def __enter__(self) -> None:
            inside.append(self.name)

        def __exit__(self, *_: object) -> None:
            inside.remove(self.name)

    seen: list[tuple[str, list[str]]] = []
    calls = {name: lambda name=name: seen.append((name, list(inside))) for name in "ab"}
    turns: list[int] = []
    timing.in_turns(calls, 2, 1, 1, torch.device("cpu"), Around, turns.append)
    assert seen == [(name, [name]) for name in "ababba"]
    assert turns == [1] * 4
    assert not inside


def test_memory_that_runs_out_costs_one_row(monkeypatch):
    gathering_of = Network.gathering

    def gathering(self, load):
        if load.name.endswith("2:4: all layers"):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return gathering_of(self, load)

    monkeypatch.setattr(Network, "gathering", gathering)
    found = call("tiny-sd3 --size 64 --batch 1 --repeats 1 --layers 1")
    assert found.exit_code == 0, found.stderr
    forwards, _, jobs = tables(found.stdout)
    (row,) = [row for row in forwards if row[0] == "unstructured 50 %, 2:4: all layers"]
    assert row[3:] == ["memory ran out", DASH, DASH, DASH]
    (job,) = [row for row in jobs if row[:2] == ["2:4", "1 package"]]
    assert job[3:5] == [DASH, DASH]
    assert job[6] == DASH


def test_a_recipe_is_timed_with_its_own_pruners_and_calibration():
    pruners = "[{obs_diff: {sparsity: 0.6, solver: admm}, targets: {include: [feed_forward]}}, "
    pruners += "{magnitude: {sparsity: 0.5}, targets: {include: [attention]}}]"
    found = call(
        recipe_of("sd3", pruners, ", samples: 6, batch: 2, packages: 2, tokens: 0.5") + " --repeats 1 --output t.json"
    )
    assert found.exit_code == 0, found.stderr
    assert "16 x 16 pixels, 4 samples a forward" in found.stdout
    forwards, solves, jobs = tables(found.stdout)
    assert [row[0] for row in forwards[1:]] == [
        "plain",
        "prune[0]: package 1 of 2",
        "prune[0]: package 2 of 2",
        "prune[0]: all layers",
        "prune[0]: all layers, 25 % of the tokens",
    ]
    assert {row[0] for row in solves[1:]} == {"prune[0]", "prune[1]"}
    assert [row[:3] for row in jobs[1:]] == [
        ["prune[0]", "1 package", "6"],
        ["prune[0]", "1 package, 25 % of the tokens", "6"],
        ["prune[0]", "2 packages, 50 % of the tokens", "12"],
        ["prune[1]", "no calibration", "0"],
    ]
    (model,) = json.loads(Path("t.json").read_text())["models"]
    times = {row["name"]: row["times"]["seconds"][0] for row in model["forwards"]}
    added = sum(times[f"prune[0]: package {i} of 2"] - times["plain"] for i in (1, 2)) / 2
    job = next(job for job in model["extrapolated"] if job["how"] == "2 packages, 50 % of the tokens")
    assert job["moments"] == pytest.approx(12 * 0.5 * added)


@pytest.mark.parametrize("kind", ["sd2", "sdxl", "flux"])
def test_a_recipe_of_every_family_is_timed_and_can_be_told_otherwise(kind):
    path = recipe_of(kind, "[{obs_diff: {sparsity: 0.5}}]")
    found = call(f"{path} --repeats 1 --prompts 3 --batch 2 --steps 5 --stride 3 --packages 1 --guidance 1")
    assert found.exit_code == 0, found.stderr
    assert "2 samples a forward" in found.stdout
    assert (
        "3 prompts, 2 at a time, 5 steps, of which the network runs the first and one of every 3. Load" in found.stdout
    )
    assert [row[:3] for row in tables(found.stdout)[2][1:]] == [
        ["prune[0]", "1 package", "5"],  # 0, 3 and 0, 1, 4
        ["prune[0]", "1 package, 25 % of the tokens", "5"],
    ]


def test_the_papers_setting_is_the_default():
    for name, samples in (("sd3-medium", 8), ("flux-dev", 4)):
        found = subjects.find(name, Asked())
        assert found.pixels == (512, 512)
        assert found.samples == samples  # Flux is told the guidance scale instead
        assert found.forwards == 25 * 13
        assert subjects.find(name, Asked(stride=1)).forwards == 25 * 25
        assert found.calibration.packages is None  # 4
    solvers = [
        getattr(entry.pruner, "solver", None) for entry in subjects.find("sdxl", Asked(solver="admm")).recipe.prune
    ]
    assert solvers == ["admm", "admm", "obs"]


def test_a_known_models_layers_are_all_that_the_published_tables_count():
    subject = subjects.find("sd3-medium", Asked())
    seen = prune._plan(subject)
    twin = networks.build(subject.model, subject.family, None, torch.device("meta"), torch.float32)
    zeroing, two_four, removing = enter(subject.recipe, "network", twin, subject.family, seen)
    assert len(zeroing.calibrated) == len(two_four.calibrated) == 24 * 12 - 3
    assert seen.tokens[zeroing.calibrated[0].name] == 1024
    assert len(removing.calibrated) == 22 * 4  # both outputs and both down projections but of the first and last block


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", f"should name a recipe or at least one model; known: {', '.join(MODELS | TINY)}"),
        ("sd3-medium --steps 3 --stride 4", "stride should be at most steps, 3, found 4"),
        ("quickstart --stride 21", "stride should be at most steps, 20, found 21"),
        ("sd3-medum", "no model named 'sd3-medum'; did you mean 'sd3-medium'?"),
        (
            "tiny-sd3 --at sd3-medium",
            "at has no effect: tiny-sd3 is a known model's size by itself; leave it out",
        ),
        ("quickstart --at sd3-medum", "no model named 'sd3-medum'; did you mean 'sd3-medium'?"),
        ("quickstart --at tiny-sd3 --size 72", "size: should be a multiple of 16 pixels for tiny-sd3, found 72"),
        ("tiny-sd3 --size 72", "size: should be a multiple of 16 pixels for tiny-sd3, found 72"),
        ("tiny-sd3 --size 64 --output .", "output: should be a file to write, found the folder ."),
        (
            "tiny-sd3 --size 64 --layers 1 --packages 9",
            "calibration.packages: should be at most 4, the number of units of layers that run side by side, found 9",
        ),
    ],
)
def test_a_mistake_is_told_in_one_sentence(arguments, message):
    found = call(arguments)
    assert (found.exit_code, found.stderr.splitlines()[-1]) == (1, f"error: {message}")


@pytest.mark.parametrize(
    ("kind", "entries", "arguments", "message"),
    [
        (
            "sd3",
            "[{obs_diff: {sparsity: 0.5}}]",
            "--solver admm",
            "solver has no effect: r.yaml says how its layers are solved; leave it out",
        ),
        (
            "pixart",
            "[{obs_diff: {sparsity: 0.5}}]",
            "--layers 1",
            "layers has no effect: how to shorten the network of r.yaml is not known; leave it out",
        ),
    ],
)
def test_a_recipes_mistake_is_told_in_one_sentence(kind, entries, arguments, message):
    found = call(f"{recipe_of(kind, entries)} {arguments}")
    assert (found.exit_code, found.stderr.splitlines()[-1]) == (1, f"error: {message}")


def test_forwards_and_solves_are_of_the_packages_that_memory_makes_of_moments_and_solves():
    loaded = tiny.load("sd3")
    options, seen = OBSDiff.model_validate({"sparsity": 0.5}), tiny.traced(loaded)
    (whole,) = cut(loaded.targets, seen, "second", 1, None, options.workspace)
    memory = 3 * whole.moment_bytes // 4 + whole.workspace
    packages = cut(loaded.targets, seen, "second", None, memory, options.workspace)
    assert 1 < len(packages) != len(cut(loaded.targets, seen, "second", None, memory, tiny.no_workspace))
    name = recipe_of("sd3", "[obs_diff: {sparsity: 0.5}]", f", memory: {memory}")
    forwards, _, jobs = tables(call(f"{name} --repeats 1 --turns 1").stdout)
    of_packages = [row[0] for row in forwards if " package " in row[0]]
    assert of_packages == [f"prune[0]: package {i} of {len(packages)}" for i in range(1, len(packages) + 1)]
    assert f"{len(packages)} packages" in [row[1] for row in jobs]
    name = recipe_of("sd3", "[obs_diff: {sparsity: 0.5}]", f", memory: {max(p.moment_bytes for p in packages)}")
    found = call(f"{name} --repeats 1 --turns 1")
    assert found.exit_code != 0
    assert "calibration.memory: should be at least" in found.stderr
    assert "building random weights" not in found.stderr


def test_a_recipe_without_calibration_is_refused():
    Path("m.yaml").write_text(
        f"model: {tiny.folder('sd3')}\nprune: [{{magnitude: {{sparsity: 0.5}}}}]\nreport: {{images: 0}}\noutput: out\n"
    )
    found = call("m.yaml")
    assert found.stderr == "error: m.yaml: should have a calibration to be timed, found none\n"


def test_a_recipe_is_timed_at_a_known_models_size_and_gradients_in_their_share_of_the_forwards(monkeypatch):
    runs: set[float] = set()

    def share_of(_prompts, steps, most):
        runs.add(steps)
        return min(most, 0.5)

    monkeypatch.setattr(prune.gradients, "share_of", share_of)
    seconds = iter(range(1, 100))
    monkeypatch.setattr(
        forward_times, "in_turns", lambda calls, *_: {name: Times((float(next(seconds)),), (0.0,)) for name in calls}
    )
    watched: list[tuple[str, int]] = []
    watch = gathered.gathering.watch

    @contextmanager
    def watching(network, package, kind, *rest, **further):
        with watch(network, package, kind, *rest, **further) as (moments, next_batch):
            yield moments, next_batch
        counts = [int(g.tokens) for m in moments.values() for g in m.gradients.values()]
        watched.append((kind, min(counts, default=0)))

    monkeypatch.setattr(gathered.gathering, "watch", watching)
    settings = "sparsity: 0.5, solver: admm, refit: true, objective: network"
    recipe_of(
        "sd2", f"[{{obs_diff: {{{settings}}}}}, {{obs_diff: {{{settings}, spread: 0.1}}}}]", ", packages: 2, stride: 2"
    )
    found = call("r.yaml --at tiny-sd3 --size 32 --output t.json")
    assert found.exit_code == 0, found.output
    assert {kind for kind, _ in watched} == {"gradients"}
    assert all(tokens > 0 for _, tokens in watched)  # each one was differentiated
    forwards = tables(found.stdout)[0]
    names = [row[0] for row in forwards[1:]]
    both = "prune[0], prune[1]: "
    assert names == ["plain"] + [
        f"{both}{what}, differentiated" for what in ("package 1 of 2", "package 2 of 2", "all layers")
    ]
    (measured,) = json.loads(Path("t.json").read_text())["models"]
    assert measured["model"] == "r.yaml at tiny-sd3"
    assert runs == {1.5}  # of two steps the first, and in every other batch the second
    jobs = {(job["name"], job["how"]): job for job in measured["extrapolated"]}
    whole = jobs["prune[0]", "1 package"]
    # plain forwards took 1 s, those with gradients 2, 3 and 4, of which one in two is, and a quarter at the most
    assert whole["moments"] == pytest.approx(whole["plain"] * (4 - 1) / 2)
    some = jobs["prune[0]", "1 package, 25 % of the tokens"]
    assert some["moments"] == pytest.approx(whole["plain"] * (4 - 1) / 4)
    each = ((2 - 1) + (3 - 1)) / 2 / 2
    for name, passes in (("prune[0]", 2), ("prune[1]", 3)):  # a spread takes the second one twice
        cut = jobs[name, "2 packages"]
        assert cut["forwards"] == passes * whole["forwards"]
        assert cut["moments"] == pytest.approx(cut["forwards"] * each)


def test_where_forwards_are_replayed_ratios_are_to_a_plain_one_that_is_replayed_too(monkeypatch):
    monkeypatch.setattr(gathered.replay, "obstacle", lambda *_: None)
    monkeypatch.setattr(gathered.Replay, "replaying", lambda *_, **__: nullcontext())
    found = call("tiny-sd3 --layers 2 --size 64 --batch 1 --repeats 1 --output t.json")
    assert found.exit_code == 0, found.output
    assert f"\n| plain, replayed | {DASH} | {DASH} | " in found.output
    ratios = (
        "Ratios of plain forwards are to the first, those with moments to the plain one that is replayed as they are."
    )
    assert f"\n{ratios}\n" in found.output
    (model,) = json.loads(Path("t.json").read_text())["models"]
    rows = {row["name"]: row for row in model["forwards"]}
    plain, replayed = rows["plain"]["times"], rows["plain, replayed"]["times"]
    assert rows["plain, replayed"]["plain"] == plain
    gathering = [row for row in model["forwards"] if row["inputs"]]
    assert gathering
    assert all(row["plain"] == replayed for row in gathering)
    (job, *_) = model["extrapolated"]
    assert job["plain"] == pytest.approx(job["forwards"] * replayed["seconds"][0])


def test_a_row_that_cannot_be_replayed_says_why(monkeypatch):
    class Failing(gathered.Replay):
        def __init__(self, network) -> None:
            super().__init__(network)
            self.problem = "it waits"

    monkeypatch.setattr(gathered.replay, "obstacle", lambda *_: None)
    for module in (gathered, forward_times):
        monkeypatch.setattr(module, "Replay", Failing)
    found = call("tiny-sd3 --layers 2 --size 64 --batch 1 --repeats 1")
    assert found.exit_code == 0, found.output
    assert (
        f"\n| plain, replayed | {DASH} | {DASH} | not replayed: it waits | {DASH} | {DASH} | {DASH} |" in found.output
    )
    assert re.search(r"all layers \| \d+ \| [^|]+ \| not replayed: it waits \|", found.output)


@pytest.mark.parametrize("recordable", [True, False])
def test_differentiated_forwards_are_timed_as_a_run_replays_them(recordable, monkeypatch):
    replayed = cpu_graph.use(monkeypatch)
    if not recordable:
        monkeypatch.setattr(kernels, "of", lambda _: None)  # so that numbers are asked for
    during: dict[str, list[bool]] = {}

    def in_turns(calls, repeats, in_a_row, warmups, device, around, advance):
        for name, call in calls.items():
            with around(name):
                replayed.clear()
                call()
                during[name] = list(replayed)
        return {name: Times((1.0,), (0.0,)) for name in calls}

    monkeypatch.setattr(forward_times, "in_turns", in_turns)
    recipe_of("sd2", "[{obs_diff: {sparsity: 0.5, objective: network, solver: admm}}]", ", packages: 2")
    found = call("r.yaml --at tiny-sd3 --size 32 --layers 1")
    assert found.exit_code == 0, found.output
    gathering = {name: what for name, what in during.items() if name.endswith("differentiated")}
    assert during["plain, replayed"] == [False]
    told = re.findall(r", differentiated \| \d+ \| [^|]+ \| not replayed: aten::_local_scalar_dense: ", found.output)
    assert list(gathering.values()) == ([[True]] * 3 if recordable else [])
    assert len(told) == (0 if recordable else 3)


def test_what_a_pruner_warns_of_is_said(monkeypatch):
    monkeypatch.setattr("compressor_obs_diff.batch.note", lambda *_: "it will be slow")
    found = call("tiny-sd3 --layers 2 --size 64 --batch 1 --repeats 1")
    assert found.exit_code == 0, found.output
    assert "warning: it will be slow" in found.output
