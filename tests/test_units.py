import pytest

from compressor import units


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (512, "512"), (999, "999"), (1000, "1.00 k"), (999_499, "999 k"), (999_600, "1.00 M"), 
     (3_210_000, "3.21 M"),
     (12_400_000_000, "12.4 G")],
)  # fmt: skip
def test_counts_have_three_digits_and_a_prefix(value: float, text: str):
    assert units.count(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 B"), (512, "512 B"), (1_432_000_000, "1.43 GB"), (18_400_000, "18.4 MB")]
)
def test_sizes_are_in_powers_of_1000(value: float, text: str):
    assert units.size(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (0.0001, "< 1 ms"), (0.34, "340 ms"), (0.9996, "1.0 s"), (12.34, "12.3 s"), (59.96, "1 min 00 s"),
     (200, "3 min 20 s"), (3599.7, "1 h 00 min"), (7500, "2 h 05 min")],
)  # fmt: skip
def test_durations_carry_over(seconds: float, text: str):
    assert units.duration(seconds) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [(0, "0.0 %"), (0.0001, "< 0.1 %"), (0.5, "50.0 %"), (0.99999, "> 99.9 %"), (1, "100.0 %")],
)
def test_percentages_are_0_or_100_only_when_exactly_so(share: float, text: str):
    assert units.percent(share) == text


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [
        (10, 10, "same"),
        (10, 5, f"{units.MINUS}50.0 %"),
        (10, 11, "+10.0 %"),
        (0, 1, units.DASH),
        (100_000, 99_999, "about the same"),
    ],
)
def test_changes_are_signed(before: float, after: float, text: str):
    assert units.change(before, after) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.0123456, "0.0123"), (0.00123, "0.00123"), (0.000123, "1.23e-4"), (123.4, "123"), (1234567, "1.23e6"),
     (0.9999, "1.00"), (-0.5, "-0.500"), (float("inf"), "inf")],
)  # fmt: skip
def test_numbers_have_three_significant_digits(value: float, text: str):
    assert units.number(value) == text


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [(31.234, 1.36, "31.2 ± 1.4"), (0.98765, 0.0012, "0.9877 ± 0.0012"), (123.4, 12.0, "123 ± 12"), (5.0, None, "5.00"),
     (0.99987, 5.2e-5, "0.999870 ± 0.000052"),
     (5.0, 0.0, "5.00 ± 0"), (0.0025, 4.2e-11, "0.00250 ± 4.2e-11"), (5.0, float("nan"), "5.00 ± nan")],
)  # fmt: skip
def test_figures_end_where_their_standard_error_does(value: float, error: float | None, text: str):
    assert units.measured(value, error) == text


def test_a_figure_and_its_error_are_scaled_together():
    assert units.measured(0.5, 0.02, "%", 100) == "50.0 ± 2.0 %"


def test_one_thing_is_singular():
    assert units.several(1, "prompt") == "1 prompt"
    assert units.several(0, "prompt") == "0 prompts"
    assert units.several(2, "prompt") == "2 prompts"
