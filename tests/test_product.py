"""Products of numbers taken apart into halves, as on a GPU, against float64."""

from __future__ import annotations

import pytest
import torch
from compressor_obs_diff import product
from torch import Tensor


@pytest.fixture(autouse=True)
def _taken_apart(monkeypatch):
    monkeypatch.setattr(product, "worthwhile", lambda *_: True)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_as_exact(found: Tensor, x: Tensor, y: Tensor) -> None:
    """To within two millionths of the sum of the terms' magnitudes, as float32 does."""
    terms = x.double().abs() @ y.double().abs()
    assert ((found.double() - x.double() @ y.double()).abs() <= 2e-6 * terms + 1e-44).all()


@pytest.mark.parametrize("fixed", ["left", "right", "neither"])
@pytest.mark.parametrize("size", [1.0, 1e-25, 3e-12, 4e18])
def test_products_are_as_exact_as_in_float32(fixed, size):
    x_NOI, y_NIJ = normal(2, 24, 600) * size, normal(2, 600, 40, seed=1)
    found = product.multiply(product.left(x_NOI, fixed=fixed == "left"), product.right(y_NIJ, fixed=fixed == "right"))
    assert_as_exact(found, x_NOI, y_NIJ)


def test_rows_and_columns_of_any_size_are_as_exact_as_others():
    x_NOI = normal(1, 41, 100) * torch.logspace(-20, 20, 41)[:, None]
    y_NIJ = normal(1, 100, 31, seed=1) * torch.logspace(-15, 15, 31)
    assert_as_exact(product.multiply(product.left(x_NOI), product.right(y_NIJ)), x_NOI, y_NIJ)


def test_numbers_much_smaller_than_others_of_their_row_are_not_lost():
    x_NOI = torch.ones(1, 3, 64)
    x_NOI[:, :, 0] = 2.0**16
    x_NOI[:, :, 1:] = 1 + normal(1, 3, 63) / 100
    y_NIJ = normal(1, 64, 5, seed=1)
    y_NIJ[:, 0] = 0
    assert_as_exact(product.multiply(product.left(x_NOI), product.right(y_NIJ)), x_NOI, y_NIJ)


def test_zeros_give_zeros_and_the_largest_numbers_do_not_overflow():
    for fixed in (False, True):
        zero = product.multiply(product.left(torch.zeros(1, 4, 8), fixed=fixed), product.right(normal(1, 8, 3)))
        assert torch.equal(zero, torch.zeros(1, 4, 3))
        largest_NIJ = torch.full((1, 8, 3), torch.finfo(torch.float32).max)
        whole = product.multiply(product.left(torch.full((1, 4, 8), 0.01), fixed=fixed), product.right(largest_NIJ))
        torch.testing.assert_close(whole, torch.full((1, 4, 3), 0.08 * torch.finfo(torch.float32).max))


def test_some_rows_of_one_problem_are_multiplied_by_its_own_matrix():
    x_NOI, y_NIJ = normal(3, 10, 16), normal(3, 16, 7, seed=1)
    x, y = product.left(x_NOI), product.right(y_NIJ, fixed=True)
    found = product.multiply(x.rows(2, 3, 8), y.of(2))
    assert_as_exact(found, x_NOI[2:, 3:8], y_NIJ[2:])


def test_nothing_is_changed_and_elsewhere_nothing_is_taken_apart(monkeypatch):
    x_NOI, y_NIJ = normal(1, 4, 16), normal(1, 16, 3)
    before = x_NOI.clone(), y_NIJ.clone()
    product.multiply(product.left(x_NOI), product.right(y_NIJ))
    assert torch.equal(x_NOI, before[0])
    assert torch.equal(y_NIJ, before[1])
    monkeypatch.undo()
    assert product.left(x_NOI).parts is x_NOI
    assert torch.equal(product.multiply(product.left(x_NOI), product.right(y_NIJ)), x_NOI @ y_NIJ)
