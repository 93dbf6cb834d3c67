"""Masks against a sort in plain Python, over every small shape and every number of zeros."""

import itertools

import pytest
import torch

from compressor import sparsity

SHAPES = list(itertools.product((1, 2, 3, 5), (1, 2, 4, 7)))


def lowest_by_sorting(scores: list[float], zeros: int) -> list[bool]:
    order = sorted(range(len(scores)), key=lambda i: (scores[i], i))
    return [i in order[:zeros] for i in range(len(scores))]


def scores(outputs: int, inputs: int, kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(outputs * 100 + inputs)
    if kind == "all equal":
        return torch.full((outputs, inputs), 0.25)
    if kind == "many ties":
        return torch.randint(0, 3, (outputs, inputs), generator=generator).float()
    return torch.rand(outputs, inputs, generator=generator)


KINDS = pytest.mark.parametrize("kind", ["random", "many ties", "all equal"])


@KINDS
def test_lowest_marks_exactly_k_with_ties_to_the_lower_index(kind):
    for outputs, inputs in SHAPES:
        score_OI = scores(outputs, inputs, kind)
        for zeros in range(outputs * inputs + 1):
            found = sparsity.lowest(score_OI, zeros)
            assert found.flatten().tolist() == lowest_by_sorting(score_OI.flatten().tolist(), zeros)
            assert found.shape == score_OI.shape


@KINDS
def test_lowest_per_row_marks_exactly_k_of_each_row_with_ties_to_the_lower_index(kind):
    for outputs, inputs in SHAPES:
        score_OI = scores(outputs, inputs, kind)
        for zeros in range(inputs + 1):
            found = sparsity.lowest_per_row(score_OI, zeros)
            assert found.tolist() == [lowest_by_sorting(row, zeros) for row in score_OI.tolist()]


@KINDS
@pytest.mark.parametrize(("keep", "of"), [(1, 2), (2, 4), (1, 4), (3, 4), (2, 3), (4, 8), (5, 8)])
def test_lowest_of_groups_keeps_n_of_every_m(kind, keep, of):
    for outputs, groups in itertools.product((1, 3), (1, 2, 5)):
        score_OI = scores(outputs, groups * of, kind)
        found = sparsity.lowest_of_groups(score_OI, keep, of)
        for row in range(outputs):
            for start in range(0, groups * of, of):
                part = score_OI[row, start : start + of].tolist()
                assert found[row, start : start + of].tolist() == lowest_by_sorting(part, of - keep)


def test_scores_are_not_changed():
    score_OI = torch.rand(4, 8)
    before = score_OI.clone()
    sparsity.lowest(score_OI, 5)
    sparsity.lowest_per_row(score_OI, 5)
    sparsity.lowest_of_groups(score_OI, 2, 4)
    assert torch.equal(score_OI, before)


def test_a_transposed_score_is_read_by_its_own_rows():
    score_OI = torch.rand(6, 4).T
    assert torch.equal(sparsity.lowest(score_OI, 9), sparsity.lowest(score_OI.contiguous(), 9))
    assert torch.equal(
        sparsity.lowest_of_groups(score_OI, 1, 3), sparsity.lowest_of_groups(score_OI.contiguous(), 1, 3)
    )


def test_count_is_the_nearest_whole_number():
    for weights in range(1, 200):
        for share in (0.01, 0.1, 0.29, 0.3, 0.5, 0.57, 0.9, 0.99):
            found = sparsity.count(share, weights)
            assert isinstance(found, int)
            assert abs(found - share * weights) <= 0.5 + 1e-9


def test_holds_counts_the_non_zeros_of_every_group():
    good = torch.tensor([[1.0, 0, 0, 2, 0, 0, 0, 0], [0, 3, 4, 0, 0, 0, 0, 5]])
    assert sparsity.holds(good, 2, 4)
    bad = good.clone()
    bad[1, 3] = 1
    assert not sparsity.holds(bad, 2, 4)
    assert not sparsity.holds(good, 1, 4)


@KINDS
@pytest.mark.parametrize(("keep", "of"), [(1, 2), (2, 4), (3, 4), (2, 3), (5, 8)])
def test_many_groups_are_marked_as_a_sort_of_each_would_mark_them(kind, keep, of):
    score_OI = scores(7, of * sparsity.FEWEST_TO_COUNT, kind)
    expected = sparsity.lowest_per_row(score_OI.reshape(-1, of), of - keep).reshape(score_OI.shape)
    assert torch.equal(sparsity.lowest_of_groups(score_OI, keep, of), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_halving_finds_the_kth_smallest_of_numbers_of_either_sign(dtype):
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(901, generator=generator, dtype=torch.float64).to(dtype)
    flat[::7], flat[1::7], flat[2] = 0.0, -0.0, torch.finfo(dtype).max
    flat[3], flat[4] = torch.finfo(dtype).min, torch.finfo(dtype).tiny
    numbers = sparsity.ordered(flat)
    assert torch.equal(flat[numbers.argsort(stable=True)], flat.sort(stable=True).values)
    for k in (1, 2, 450, 451, 452, 600, 900, 901):
        expected = sparsity.ordered(flat.sort().values[k - 1 : k])
        assert sparsity.kth_of_ordered(numbers, k) == expected
