"""Unstructured and N:M: how many weights go, and which."""

import itertools

import pytest
import torch
from compressor_obs_diff.granularities import NM, Unstructured
from pydantic import ValidationError
from torch import nn

from compressor import registry
from compressor.errors import CompressorError
from compressor.structure import Layer, Target

PATTERNS = [(1, 2), (2, 4), (1, 4), (3, 4), (2, 3), (4, 8), (7, 8)]


def target(outputs: int, inputs: int) -> Target:
    return Target(
        "blocks.0.attn.to_q",
        nn.Linear(inputs, outputs, device="meta"),
        "blocks.0",
        Layer("attn.to_q", "attention", "query", "image", 0),
    )


def test_blocks_of_columns_add_up_to_the_nearest_whole_number():
    granularity = Unstructured()
    for outputs, inputs, share in itertools.product(range(1, 8), range(1, 14), (0.01, 0.25, 0.3, 0.5, 0.7, 0.99)):
        total = granularity.zeros(outputs, inputs, share)
        assert abs(total - share * outputs * inputs) <= 0.5 + 1e-9
        for block in (1, 2, 3, 5, 128):
            cuts = [*range(0, inputs, block), inputs]
            parts = [
                (granularity.zeros(outputs, b, share) - granularity.zeros(outputs, a, share), outputs * (b - a))
                for a, b in itertools.pairwise(cuts)
            ]
            assert sum(zeros for zeros, _ in parts) == total
            assert all(0 <= zeros <= room for zeros, room in parts)


def test_unstructured_takes_whole_blocks_and_fits_every_layer():
    assert Unstructured().columns(128) == 128
    Unstructured().check(target(3, 77))


def test_unstructured_masks_the_lowest_of_all_or_of_every_row():
    score_OI = torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]])
    assert Unstructured().mask(score_OI, 4).tolist() == [[True] * 4, [False] * 4]
    assert Unstructured().mask(score_OI, 4, per_row=True).tolist() == [[True, True, False, False]] * 2


@pytest.mark.parametrize(("keep", "of"), PATTERNS)
def test_n_means_kept(keep, of):
    granularity = NM(keep=keep, of=of)
    score_OI = torch.rand(5, 3 * of, generator=torch.Generator().manual_seed(of))
    zeros = granularity.zeros(5, 3 * of, None)
    mask_OI = granularity.mask(score_OI, zeros)
    kept_G = (~mask_OI).reshape(-1, of).sum(1)
    assert kept_G.tolist() == [keep] * 15
    assert int(mask_OI.sum()) == zeros == 15 * (of - keep)
    for scores, removed in zip(score_OI.reshape(-1, of), mask_OI.reshape(-1, of), strict=True):
        assert scores[removed].max() < scores[~removed].min()
    assert torch.equal(mask_OI, granularity.mask(score_OI, zeros, per_row=True))


def test_n_m_takes_one_group_of_columns_whatever_the_block():
    assert NM(keep=2, of=4).columns(128) == 4
    assert NM(keep=2, of=6).columns(5) == 6


def test_inputs_that_are_no_multiple_of_m_are_refused_by_name():
    NM(keep=2, of=4).check(target(3, 76))
    with pytest.raises(CompressorError) as caught:
        NM(keep=2, of=4).check(target(3, 77))
    assert str(caught.value) == (
        "blocks.0.attn.to_q: keep 2 of 4 needs a multiple of 4 inputs, found 77; choose another M, or leave the layer "
        "out with targets.exclude"
    )


@pytest.mark.parametrize(("keep", "of"), [(4, 4), (5, 4)])
def test_keeping_all_or_more_is_refused(keep, of):
    with pytest.raises(ValidationError, match=f"keep should be less than of, found keep {keep} of {of}"):
        NM(keep=keep, of=of)


@pytest.mark.parametrize("options", [{"keep": 2}, {"of": 8}])
def test_one_number_of_two_is_refused_and_neither_is_2_of_4(options):
    with pytest.raises(
        ValidationError, match="keep and of should be given together, or neither for 2 of 4; found one of them"
    ):
        NM(**options)
    assert (NM().keep, NM().of) == (2, 4)


@pytest.mark.parametrize("options", [{"keep": 0, "of": 4}, {"keep": 1, "of": 1}, {"keep": 2.0, "of": 4}])
def test_other_nonsense_is_refused(options):
    with pytest.raises(ValidationError):
        NM.model_validate(options)


def test_the_registry_knows_both_by_name():
    assert registry.load("granularity", "unstructured") is Unstructured
    assert registry.load("granularity", "n_m") is NM
