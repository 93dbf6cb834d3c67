"""The inverse of a Cholesky factor, against the one that the library's inverse gives."""

# Shapes: T tokens, I inputs.

from __future__ import annotations

import pytest
import torch
from compressor_obs_diff import triangular
from compressor_obs_diff.triangular import inverse_factor


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    monkeypatch.setattr(triangular, "BASE", 8)
    monkeypatch.setattr(triangular, "GPU_BASE", 8)


@pytest.mark.parametrize("size", [1, 7, 8, 9, 24, 41])
def test_halving_gives_the_inverse_of_the_cholesky_factor(size):
    x_TI = torch.randn(3 * size, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    matrix_II = x_TI.T @ x_TI
    expected_II = torch.linalg.inv(torch.linalg.cholesky(matrix_II))
    inverse_II, info = inverse_factor(matrix_II.clone())
    assert int(info) == 0
    assert torch.equal(inverse_II, inverse_II.tril())
    torch.testing.assert_close(inverse_II, expected_II, rtol=1e-9, atol=1e-12)


def test_only_the_lower_triangle_is_read():
    matrix_II = 21 * torch.eye(21) + 1
    spoiled_II = matrix_II + torch.full((21, 21), 7.0).triu(1)
    assert torch.equal(inverse_factor(spoiled_II)[0], inverse_factor(matrix_II)[0])


@pytest.mark.parametrize("place", [0, 11, 20])
def test_halving_tells_of_a_matrix_that_is_not_positive_definite(place):
    matrix_II = torch.eye(21)
    matrix_II[place, place] = -1
    assert int(inverse_factor(matrix_II)[1]) != 0
