"""Drawing a share of the tokens: one of every stretch, the same for all inputs of a forward, right on average."""

# Shapes: K tokens drawn.

from __future__ import annotations

from typing import Any

import pytest
import torch

from compressor.calibration import explain_rank
from compressor.calibration.tokens import Tokens
from compressor.plugin import MomentKind
from compressor.recipe import Calibration as Options
from tests import tiny
from tests.test_moments import Growing


def empty(samples: int, tokens: int) -> torch.Tensor:
    """An input of which only the shape matters."""
    return torch.empty(samples, tokens, 1)


def drawn(draws: Tokens, samples: int, tokens: int) -> torch.Tensor:
    """The places of the tokens drawn."""
    place_K, _ = draws.draw(empty(samples, tokens))
    assert place_K is not None
    return place_K


@pytest.mark.parametrize(("tokens", "share", "expected"), [(16, 0.25, 4), (10, 0.3, 3), (7, 0.5, 4), (9, 0.01, 1)])
def test_one_token_is_drawn_of_every_stretch_of_every_sample(tokens, share, expected):
    draws = Tokens(share, 0)
    for _ in range(50):
        draws.next_forward()
        place_K, each = draws.draw(empty(3, tokens))
        assert place_K is not None
        assert each == tokens / expected
        for sample in range(3):
            places = place_K[sample * expected : (sample + 1) * expected] - sample * tokens
            for i, place in enumerate(places.tolist()):
                assert int(i * each) <= place < (i + 1) * each


@pytest.mark.parametrize(("tokens", "share"), [(8, 0.25), (7, 0.4)])
def test_every_token_is_drawn_as_often_as_any_other(tokens, share):
    """7 tokens and 3 draws: stretches whose ends cut a token in two."""
    draws, counts, turns = Tokens(share, 1), torch.zeros(tokens), 4000
    for _ in range(turns):
        draws.next_forward()
        place_K, each = draws.draw(empty(1, tokens))
        assert place_K is not None
        counts += torch.bincount(place_K, minlength=tokens) * each
    assert (counts / turns - 1).abs().max() < 0.1


def test_inputs_of_one_length_get_the_same_tokens_until_the_next_forward():
    draws = Tokens(0.25, 0)
    first = drawn(draws, 2, 64)
    assert torch.equal(drawn(draws, 2, 64), first)
    assert len(drawn(draws, 2, 32)) == 16
    draws.next_forward()
    assert not torch.equal(drawn(draws, 2, 64), first)
    assert torch.equal(drawn(Tokens(0.25, 0), 2, 64), first)
    assert not torch.equal(drawn(Tokens(0.25, 1), 2, 64), first)


@pytest.mark.parametrize("x", [empty(2, 8), torch.ones(5, 3), torch.ones(2, 1, 3)], ids=lambda x: str(x.shape))
def test_all_tokens_and_inputs_without_tokens_are_taken_as_they_are(x):
    share = 1.0 if x.shape[1] == 8 else 0.25
    assert Tokens(share, 0).draw(x) == (None, 1)


def collected(kind: MomentKind, **options: Any) -> tuple[dict, int]:
    calibration = tiny.calibrate(tiny.load("sd3"), tiny.PROMPTS[:3], steps=3, packages=1, **options)
    (package,) = calibration.packages(calibration._pipeline.targets, kind)
    return calibration.collect(package, kind, Growing()), calibration.facts.tokens


@pytest.mark.parametrize("kind", ["second", "norms"])
def test_a_calibration_sums_the_share_and_weighs_it_as_all(kind: MomentKind):
    whole, all_tokens = collected(kind)
    half, tokens = collected(kind, tokens=0.5)
    again, _ = collected(kind, tokens=0.5)
    assert tokens < 0.6 * all_tokens
    for name, moments in half.items():
        assert int(moments.tokens) < int(whole[name].tokens)
        assert moments.weight.item() == pytest.approx(whole[name].weight.item(), rel=1e-12)
        assert torch.equal(moments.squares_I, again[name].squares_I)
        squares = moments.squares_I.sum() / whole[name].squares_I.sum()
        assert 0.7 < squares < 1.4
        assert not torch.equal(moments.squares_I, whole[name].squares_I)


def test_the_warning_of_too_few_tokens_counts_those_drawn():
    pipeline = tiny.load("sd3")
    trace = tiny.calibrate(pipeline, packages=1)._trace
    assert explain_rank(pipeline.targets, trace, "second", 100, 25, True) is None
    note = explain_rank(pipeline.targets, trace, "second", 2, 1, False, share=0.01)
    assert note is not None
    assert " sees 2 for " in note


@pytest.mark.parametrize("share", [0, 1.5])
def test_a_share_of_none_or_more_than_all_is_refused(share):
    with pytest.raises(ValueError, match="tokens"):
        Options.model_validate({"prompts": ["a"], "tokens": share})
