"""Summing the inputs of a share of the network's calls: which are drawn, and that they stand for all on average."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressor.calibration import Calibration, Moments, gradients
from compressor.calibration.calls import Calls
from compressor.calibration.foretold import explain_rank
from compressor.plugin import MomentKind
from compressor.ranks import ALONE, Ranks
from compressor.recipe import Calibration as Options
from tests import tiny
from tests.test_moments import Growing, Recorder, assert_near, explicit


def drawn(calls: Calls, prompt: int, count: int) -> list[float]:
    """How many calls each of a batch's stands for."""
    calls.next_batch(prompt)
    return [calls.next_call() for _ in range(count)]


@pytest.mark.parametrize(("share", "stretch"), [(1.0, 1), (0.5, 2), (0.25, 4), (0.125, 8)])
def test_one_call_is_drawn_of_every_stretch_and_every_place_in_it(share, stretch):
    times = drawn(Calls(share, 0, 10**6, 4), 4, 50 * stretch)
    places = set()
    for start in range(0, len(times), stretch):
        (place,) = [i for i in range(stretch) if times[start + i]]
        assert times[start + place] == stretch
        places.add(place)
    assert places == set(range(stretch))  # where a pipeline calls twice a step, of both calls


@pytest.mark.parametrize("prompt", [0, 8])
@pytest.mark.parametrize("share", [0.25, 0.3, 0.4, 0.75, 0.05])
def test_on_average_every_call_stands_for_one_and_those_of_a_stretch_that_the_batch_cuts_short_too(share, prompt):
    count, seeds = 10, 6000
    sums = [0.0] * count
    for seed in range(seeds):
        sums = [s + times for s, times in zip(sums, drawn(Calls(share, seed, count, 8), prompt, count), strict=True)]
    within = 5 * (1 / share / seeds) ** 0.5  # five times what a mean of so many scatters
    assert all(abs(s / seeds - 1) < within for s in sums)


@pytest.mark.parametrize(("share", "batches"), [(1.0, 1), (0.5, 2), (0.25, 4), (0.4, 5), (0.1, 10)])
def test_in_a_row_of_batches_every_call_is_drawn_as_often_as_any_other(share, batches):
    """Whole stretches or not."""
    calls, sums = Calls(share, 3, 10**6, 2), [0.0] * 10
    for prompt in range(2, 2 + 2 * batches, 2):
        sums = [s + times for s, times in zip(sums, drawn(calls, prompt, 10), strict=True)]
    assert sums == pytest.approx([batches] * 10)


def test_what_is_drawn_is_decided_by_the_seed_and_the_first_prompt_whatever_was_drawn_before():
    calls = Calls(0.25, 0, 20, 4)
    first = drawn(calls, 8, 40)
    other = drawn(calls, 12, 40)
    assert other != first
    assert drawn(calls, 8, 40) == first
    assert drawn(Calls(0.25, 1, 20, 4), 8, 40) != first
    assert drawn(Calls(0.25, 0, 5, 4), 8, 40) == first


def test_however_small_the_share_is_a_call_of_the_first_batch_is_drawn():
    others = 0
    for seed in range(200):
        calls = Calls(0.02, seed, 4, 4)
        assert sorted(drawn(calls, 0, 4)) == [0, 0, 0, 4]
        others += any(drawn(calls, 4, 4))
    assert 2 <= others <= 40  # 2 % of 800 calls


def collect(kind: MomentKind, packages: int = 1, record: bool = False, **options: Any) -> tuple[dict, Any, Any]:
    loaded = tiny.load("sd3")
    calibration = tiny.calibrate(loaded, packages=packages, **options)
    recorder = Recorder(loaded) if record else None
    found: dict[str, Moments] = {}
    for package in calibration.packages(loaded.targets, kind, tiny.no_workspace):
        found |= calibration.collect(package, kind, Growing())
    return found, calibration, recorder


@pytest.mark.parametrize("kind", ["second", "norms"])
def test_the_drawn_calls_are_summed_whole_by_their_steps_weights_times_what_they_stand_for(kind: MomentKind):
    """Two batches, of two prompts and of one."""
    found, calibration, recorder = collect(kind, record=True, steps=6, tokens=0.4)
    calls = Calls(0.4, 0, 6, 2)
    times = drawn(calls, 0, 6) + drawn(calls, 2, 6)
    assert 0 in times
    assert calibration.facts.forwards == 12
    weights = [(i % 6 + 1) * each for i, each in enumerate(times)]
    for name, moments in found.items():
        inputs = recorder.inputs[name]
        second_II, total_I, squares_I = explicit(inputs, weights)
        assert_near(moments.total_I, total_I)
        assert_near(moments.squares_I, squares_I)
        if moments.second_II is not None:
            assert_near(moments.second_II, second_II)
        counts = [x.numel() // x.shape[-1] for x in inputs]
        assert int(moments.tokens) == sum(count for count, each in zip(counts, times, strict=True) if each)
        assert moments.weight.item() == pytest.approx(sum(a * n for a, n in zip(weights, counts, strict=True)))
    assert calibration.facts.tokens == sum(int(moments.tokens) for moments in found.values())


def test_all_packages_take_the_same_calls():
    together, *_ = collect("second", steps=6, tokens=0.4)
    apart, calibration, _ = collect("second", steps=6, tokens=0.4, packages=3)
    assert calibration.facts.forwards == 3 * 12
    assert apart.keys() == together.keys()
    for name, moments in together.items():
        assert int(apart[name].tokens) == int(moments.tokens)
        assert apart[name].weight == moments.weight
        torch.testing.assert_close(apart[name].squares_I, moments.squares_I, rtol=1e-4, atol=0)


class Apart(Ranks):
    """One of two processes that never meet, so that each keeps its own sums."""

    def meet(self) -> None:
        """At once."""

    def add(self, tensor: Tensor, owner: int | None = None) -> None:
        """Nothing."""

    def gather(self, thing: Any) -> list[Any]:
        """Of itself."""
        return [thing]


def test_processes_that_share_the_batches_take_the_calls_that_one_takes():
    loaded = tiny.load("sd3")
    options = Options.model_validate(
        {
            "prompts": ["a"],
            "batch": 1,
            "steps": 6,
            "guidance": 3.0,
            "height": tiny.SIDE,
            "width": tiny.SIDE,
            "packages": 1,
            "tokens": 0.4,
        }
    )
    found: list[dict[str, Moments]] = []
    for ranks in (ALONE, Apart(0, 2), Apart(1, 2)):
        calibration = Calibration(loaded, tiny.traced(loaded), options, tiny.PROMPTS[:3], 0, tiny.quiet(), ranks)
        (package,) = calibration.packages(loaded.targets, "second", tiny.no_workspace)
        found.append(calibration.collect(package, "second", Growing()))
    alone, first, second = found
    for name, moments in alone.items():
        assert 0 < int(second[name].tokens) < int(moments.tokens)
        assert int(first[name].tokens) + int(second[name].tokens) == int(moments.tokens)
        assert float(first[name].weight + second[name].weight) == pytest.approx(float(moments.weight))


@pytest.mark.parametrize("kind", ["second", "gradients"])
def test_of_few_steps_and_a_small_share_one_call_is_summed(kind: MomentKind):
    whole, *_ = collect("second", batch=3, steps=4)
    found, *_ = collect(kind, batch=3, steps=4, tokens=0.1)
    for name, moments in found.items():
        assert 4 * int(moments.tokens) == int(whole[name].tokens)
        if kind == "second":
            assert 4 <= moments.weight.item() / int(moments.tokens) <= 16  # a step's weight, 1 to 4, times 4


@pytest.mark.parametrize(
    ("prompts", "most", "share"),
    [(100, 1.0, 1 / 6), (100, 0.25, 1 / 6), (100, 0.1, 0.1), (20, 0.25, 0.25), (1, 1.0, 1)],
)
def test_of_the_calls_that_are_differentiated_the_share_is_a_bound(prompts, most, share):
    assert gradients.share_of(prompts, 20, most) == pytest.approx(share)


def test_with_gradients_a_calibration_differentiates_no_more_than_the_share():
    (all_of_them, *_), (some, *_) = (collect("gradients", batch=1, steps=10, tokens=share) for share in (1.0, 0.25))
    for name, moments in some.items():
        assert 0.1 < int(moments.tokens) / int(all_of_them[name].tokens) < 0.4
        assert all(int(of.tokens) == int(moments.tokens) for of in moments.gradients.values())


@pytest.mark.parametrize(
    ("kind", "batch", "tokens"), [("second", 1, 0.125), ("second", 3, 0.02), ("gradients", 3, 0.02)]
)
def test_the_warning_of_too_few_tokens_counts_those_that_a_run_sums(kind: MomentKind, batch, tokens):
    """With a small share, those of the call of the first batch that always is summed."""
    found, calibration, _ = collect(kind, batch=batch, steps=8, tokens=tokens)
    for target in tiny.load("sd3").targets:
        if target.name in found:
            wide = dataclasses.replace(target, module=nn.Linear(10**4, 1))
            note = explain_rank([wide], calibration._trace, kind, 3, 8, True, tokens, batch)
            assert f" sees {int(found[target.name].tokens)} for 10000 inputs" in str(note)


def test_who_asks_for_a_share_that_gradients_make_no_use_of_is_told(monkeypatch):
    monkeypatch.setattr(gradients, "LEAST", 6)  # of three prompts' three steps

    def warnings(kind: MomentKind, tokens: float) -> list[str]:
        _, calibration, _ = collect(kind, steps=3, tokens=tokens)
        return [warning for warning in calibration.facts.warnings if "calibration.tokens" in warning]

    assert warnings("gradients", 0.8) == [
        "calibration.tokens has no effect: gradients are gathered, for which 66.7 % of the forwards are "
        "differentiated, and no others are summed; less than that would have one"
    ]
    assert warnings("gradients", 0.5) == warnings("gradients", 1.0) == warnings("second", 0.8) == []


def test_the_warning_tells_how_many_prompts_would_do_of_a_share():
    loaded = tiny.load("sd2")
    trace = tiny.traced(loaded)
    middle = [t for t in loaded.targets if t.name == "mid_block.attentions.0.transformer_blocks.0.ff.net.2"]
    text = [t for t in loaded.targets if t.name == "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"]
    assert explain_rank(middle, trace, "second", 2, 2, False, 1.0) is None  # 2 x 2 x 16 for 64
    assert " sees 24 for 64 inputs; about 7 prompts " in str(explain_rank(middle, trace, "second", 2, 2, False, 0.25))
    assert " sees 16 for 64 inputs; about 8 prompts " in str(
        explain_rank(middle, trace, "gradients", 2, 2, False, 0.25)
    )
    # a prompt is the same at every step: the first batch has a call that is summed, and half of the others
    assert " sees 24 for 32 inputs; about 3 prompts " in str(explain_rank(text, trace, "second", 2, 2, False, 0.25))
    assert explain_rank(text, trace, "second", 2, 4, False, 0.25) is None
    # one call is summed in any case
    assert " sees 16 for 64 inputs; " in str(explain_rank(middle, trace, "second", 2, 2, False, 1e-6))


@pytest.mark.parametrize("share", [0, 1.5])
def test_a_share_of_none_or_more_than_all_is_refused(share):
    with pytest.raises(ValueError, match="tokens"):
        Options.model_validate({"prompts": ["a"], "tokens": share})
