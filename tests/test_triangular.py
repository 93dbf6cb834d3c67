"""The inverse of a Cholesky factor, against the one that the library's inverse gives."""

# Shapes: N matrices, T tokens, I inputs.

from __future__ import annotations

import pytest
import torch
from compressor_obs_diff import triangular
from compressor_obs_diff.triangular import inverse_factor, square


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


@pytest.mark.parametrize("size", [1, 8, 9, 24, 41])
def test_several_matrices_at_once_give_what_each_gives_alone(size):
    generator = torch.Generator().manual_seed(size)
    x_NTI = torch.randn(3, 3 * size, size, generator=generator, dtype=torch.float64)
    matrix_NII = x_NTI.mT @ x_NTI
    inverse_NII, info_N = inverse_factor(matrix_NII.clone())
    assert info_N.tolist() == [0, 0, 0]
    for matrix_II, inverse_II in zip(matrix_NII, inverse_NII, strict=True):
        torch.testing.assert_close(inverse_II, inverse_factor(matrix_II.clone())[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("place", [0, 11, 20])
def test_of_several_matrices_those_that_are_not_positive_definite_are_told_apart(place):
    matrix_NII = 2 * torch.eye(21).repeat(4, 1, 1)
    matrix_NII[1, place, place] = -1
    matrix_NII[3, place, place] = float("nan")
    inverse_NII, info_N = inverse_factor(matrix_NII)
    assert (info_N != 0).tolist() == [False, True, False, True]
    torch.testing.assert_close(inverse_NII[[0, 2]], (torch.eye(21) / 2**0.5).repeat(2, 1, 1))


@pytest.mark.parametrize("size", [1, 16, 17, 41])
def test_squares_of_triangles_are_products_and_lie_where_they_are_wanted(size):
    x_NII = torch.randn(3, size, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64).tril()
    kept_NII, found_N2II = x_NII.clone(), torch.full((3, 2, size, size), 7.0, dtype=torch.float64)
    square(x_NII, found_N2II[:, 0])
    torch.testing.assert_close(found_N2II[:, 0], x_NII.mT @ x_NII, rtol=1e-12, atol=1e-12)
    assert torch.equal(x_NII, kept_NII)
    assert (found_N2II[:, 1] == 7).all()
