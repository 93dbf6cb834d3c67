"""Kept counts against tables by hand and against every possible choice."""

from __future__ import annotations

import itertools

import pytest

from compressor.errors import CompressorError
from compressor.structure.alignment import kept_count, spread


@pytest.mark.parametrize(
    ("total", "ratio", "multiple", "kept"),
    [
        (6144, 0.3, 64, 4288),  # 4300.8: 67.2 multiples
        (6144, 0.3, 8, 4304),  # 537.6
        (6144, 0.3, 128, 4352),  # 33.6
        (6144, 0.3, 1, 4301),
        (6144, 0.5, 64, 3072),
        (6144, 0.001, 64, 6144),
        (6144, 0.99, 64, 64),
        (6144, 0.999, 64, 64),
        (24, 0.3, 1, 17),  # 16.8
        (24, 0.5, 1, 12),
        (10, 0.25, 1, 8),  # 7.5: the larger
        (640, 0.35, 64, 448),  # 416, just between 384 and 448: the larger, whatever floats make of 0.65
        (128, 0.3, 64, 64),  # 89.6
        (128, 0.25, 64, 128),  # 96
        (64, 0.9, 64, 64),
        (48, 0.3, 64, 34),  # 33.6: too narrow for any alignment
        (100, 0.1, 64, 100),  # 90: 100 is nearer than 64
        (100, 0.2, 64, 64),  # 80
        (100, 0.0, 64, 100),
        (1, 0.5, 1, 1),
        (1, 0.0, 64, 1),
    ],
)
def test_a_width_is_rounded_to_the_nearest_multiple(total, ratio, multiple, kept):
    assert kept_count(total, ratio, multiple, "blocks.0.ff") == kept
    assert spread([total], ratio, multiple, ["blocks.0.ff"]) == [kept]


def test_equal_blocks_share_out_what_is_left_over_in_their_order():
    # 22 x 67.2 multiples are 1478.4: 22 x 67 = 1474, and four more
    assert spread([6144] * 22, 0.3, 64, names(22)) == [68 * 64] * 4 + [67 * 64] * 18
    # 22 x 16.8 heads are 369.6: 22 x 16 = 352, and eighteen more
    assert spread([24] * 22, 0.3, 1, names(22)) == [17] * 18 + [16] * 4


def test_the_block_furthest_below_is_served_first():
    # 134.4, 268.8 and 89.6 are 2.1, 4.2 and 1.4 multiples, together 7.7: one more goes to the last
    assert spread([192, 384, 128], 0.3, 64, names(3)) == [128, 256, 128]


def test_what_a_narrow_block_cannot_give_the_others_do():
    # 4 x 64 cannot shrink; of 1664 neurons 499.2 should go, which is 7.8 multiples
    assert spread([64, 64, 64, 64, 1408], 0.3, 64, names(5)) == [64, 64, 64, 64, 1408 - 8 * 64]


@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.37, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("totals", [[6144] * 22, [5120] * 10 + [2560] * 4 + [1280] * 2, [9728] * 36, [192, 192, 384]])
def test_the_total_is_within_half_a_multiple(ratio, totals):
    kept = spread(totals, ratio, 64, names(len(totals)))
    asked = max((1 - ratio) * sum(totals), 64 * len(totals))  # one multiple always stays
    assert abs(sum(kept) - asked) <= 32 + 1e-6
    for count, total in zip(kept, totals, strict=True):
        assert count % 64 == 0
        assert 64 <= count <= total
        assert abs(count - (1 - ratio) * total) <= 64  # every block near its own share


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.45, 0.62, 0.8])
@pytest.mark.parametrize("totals", [[64, 128, 256], [192, 192, 192], [64, 64, 320], [100, 200, 300]])
def test_no_choice_of_multiples_comes_nearer(ratio, totals):
    choices = [sorted({*range(64, total + 1, 64), total}) for total in totals]
    asked = (1 - ratio) * sum(totals)
    best = min(abs(sum(kept) - asked) for kept in itertools.product(*choices))
    found = abs(sum(spread(totals, ratio, 64, names(3))) - asked)
    if all(total % 64 == 0 for total in totals):
        assert found == pytest.approx(best)
    else:
        assert found <= best + 32  # steps of several sizes: near, and each block near its share


def test_no_blocks_keep_nothing():
    assert spread([], 0.3, 64, []) == []


@pytest.mark.parametrize("ratio", [1.0, 1.5, -0.1, float("nan")])
def test_a_ratio_beyond_its_bounds_is_refused(ratio):
    with pytest.raises(CompressorError) as error:
        kept_count(24, ratio, 1, "heads of blocks.0.attn")
    assert str(error.value) == (
        f"the ratio of heads of blocks.0.attn should be at least 0 and less than 1, found {ratio}"
    )
    with pytest.raises(CompressorError, match=r"^the ratio of blocks\.0 and 2 more should be"):
        spread([24, 24, 24], ratio, 1, names(3))


def test_a_ratio_that_leaves_none_names_the_smallest_block():
    with pytest.raises(CompressorError) as error:
        spread([24, 8, 4], 0.95, 1, [f"heads of blocks.{i}.attn" for i in range(3)])
    assert str(error.value) == (
        "heads of blocks.2.attn: a ratio should leave at least 1 of 4, found 0.95, which leaves none; "
        "remove at most 0.75"
    )
    with pytest.raises(CompressorError, match=r"at least 1 of 6144, found 0\.99999,"):
        kept_count(6144, 0.99999, 64, "neurons of blocks.0.ff")


def names(count: int) -> list[str]:
    return [f"blocks.{i}" for i in range(count)]
