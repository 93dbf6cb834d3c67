"""Which N:M a weight keeps to, and where its weight is in a graph."""

import numpy as np
import onnx_ir as ir
import pytest
import torch

from compressor.onnx_files.sparse import pattern, weight_OI
from compressor.sparsity import lowest, lowest_of_groups


def weight(outputs: int = 64, inputs: int = 96) -> torch.Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("keep", "of"), [(2, 4), (1, 4), (3, 4), (4, 8), (2, 8), (7, 8), (8, 16), (16, 32), (1, 2), (2, 3), (5, 6), (3, 12)]
)
def test_a_pruned_weight_is_known_by_what_it_keeps(keep, of):
    pruned = weight()
    pruned[lowest_of_groups(pruned.abs(), keep, of)] = 0
    assert pattern(pruned) == (keep, of)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.7, 0.9])
def test_zeros_that_fell_anywhere_are_no_pattern(sparsity):
    pruned = weight()
    pruned[lowest(pruned.abs(), round(sparsity * pruned.numel()))] = 0
    assert pattern(pruned) is None


def test_a_weight_of_zeros_is_no_pattern():
    assert pattern(torch.zeros(8, 16)) is None


def test_zeros_among_the_kept_weights_do_not_hide_2_of_4():
    pruned = weight()
    pruned[lowest_of_groups(pruned.abs(), 2, 4)] = 0
    pruned[:, 16:64] = 0
    assert pattern(pruned) == (2, 4)


def test_dense_rows_after_sparse_ones_are_no_pattern():
    pruned = weight()
    pruned[:60][lowest_of_groups(pruned[:60].abs(), 2, 4)] = 0
    assert pattern(pruned) is None


def test_a_width_that_no_group_divides_is_no_pattern():
    assert pattern(weight(8, 37)) is None


def linear(op_type: str, array: np.ndarray, *between: str, **attributes: int) -> ir.Node:
    value = ir.Value(name="weight", const_value=ir.tensor(array))
    for middle in between:
        value = ir.node(middle, [value], {"perm": [1, 0]} if middle == "Transpose" else {}).outputs[0]
    return ir.node(op_type, [ir.Value(name="x"), value], attributes)


def test_the_weight_is_found_behind_transposes_and_casts():
    array_OI = np.arange(6, dtype=np.float32).reshape(2, 3)
    for node in (
        linear("MatMul", array_OI.T),
        linear("MatMul", array_OI, "Transpose"),
        linear("MatMul", array_OI.T, "Cast", "Identity"),
        linear("Gemm", array_OI, transB=1),
        linear("Gemm", array_OI.T, transB=0),
        linear("Gemm", array_OI.T, "Transpose", transB=1),
    ):
        found = weight_OI(node)
        assert found is not None
        assert np.array_equal(found, array_OI)


def test_a_weight_in_a_constant_node_is_found():
    array_IO = np.ones((3, 2), np.float32)
    constant = ir.node("Constant", [], {"value": ir.tensor(array_IO)}).outputs[0]
    found = weight_OI(ir.node("MatMul", [ir.Value(name="x"), constant]))
    assert found is not None
    assert found.shape == (2, 3)


def test_a_weight_that_is_computed_is_not_constant():
    computed = ir.node("Add", [ir.Value(name="a"), ir.Value(name="b")]).outputs[0]
    assert weight_OI(ir.node("MatMul", [ir.Value(name="x"), computed])) is None
    assert weight_OI(ir.node("MatMul", [ir.Value(name="x"), ir.Value(name="given")])) is None
