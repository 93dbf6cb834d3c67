"""The readers of TensorRT's build log and engine inspector.

The samples were made for these tests. They follow the formats that NVIDIA documents and that users quote in
reports, with layers of ours; none was recorded from a build of ours, for TensorRT 8 to 11 is not run here. What
TensorRT-RTX writes is read from real builds in test_tensorrt.py.
"""

from __future__ import annotations

import json

from compressor_tensorrt.evidence import EngineLayer, Log, Said, by_layer, parts, read_engine, read_layers, read_log

from compressor.two_four.table import Row

BLOCK = "transformer_blocks.0"

TEN = f"""\
[VERBOSE] Registering layer: {BLOCK}.attn.to_q for ONNX node: node_MatMul_181
[INFO] (Sparsity) Found 4 layer(s) eligible to use sparse tactics: {BLOCK}.attn.to_q, {BLOCK}.ff.net.2, x, y
[INFO] (Sparsity) Chose 0 layer(s) using sparse tactics:
[VERBOSE] a second pass
[INFO] (Sparsity) Found 3 layer(s) eligible to use sparse tactics: {BLOCK}.attn.to_q, \
{BLOCK}.ff.net.0.proj + node_gelu, {BLOCK}.ff.net.2
[INFO] (Sparsity) Chose 1 layer(s) using sparse tactics: {BLOCK}.ff.net.0.proj + node_gelu
[INFO] Total Host Persistent Memory: 80 bytes
"""

COUNTS = """\
[INFO] (Sparsity) Found 39 layer(s) eligible to use sparse tactics
[INFO] (Sparsity) Chose 0 layer(s) using sparse tactics
"""

EIGHT = """\
[08/05/2024-12:06:54] [I] [TRT] (Sparsity) Layers eligible for sparse math: MatMul_401, Conv_619 + Relu_620, Conv_626
[08/05/2024-12:06:54] [I] [TRT] (Sparsity) TRT inference plan picked sparse implementation for layers: Conv_626
[08/05/2024-12:06:54] [I] [TRT] Total Host Persistent Memory: 160
"""

INSPECTOR = {
    "Layers": [
        {
            "Name": f"{BLOCK}.ff.net.0.proj + node_gelu",
            "LayerType": "CaskGemmMatrixMultiply",
            "Inputs": [{"Name": "x", "Dimensions": [2, 64, 32], "Format/Datatype": "Half"}],
            "Outputs": [{"Name": "y", "Dimensions": [2, 64, 128], "Format/Datatype": "Half"}],
            "ParameterType": "Convolution",
            "Weights": {"Type": "Half", "Count": 4096},
            "HasSparseWeights": 1,
            "HasBias": 1,
            "TacticName": "sm80_xmma_sparse_gemm_f16f16_f16f16_f16_tn_n_tilesize128x64x64_stage3_tensor16x8x32",
            "TacticValue": "0x280b0ad3c23d8442",
            "StreamId": 0,
            "Metadata": "[ONNX Layer: node_MatMul_200]\x1e[ONNX Layer: node_gelu]",
        },
        {
            "Name": f"{BLOCK}.attn.to_q",
            "LayerType": "CaskGemmMatrixMultiply",
            "HasSparseWeights": 0,
            "TacticName": "sm80_xmma_gemm_f16f16_f16f16_f16_tn_n_tilesize64x64x64",
            "Metadata": "[ONNX Layer: node_MatMul_181]",
        },
        {
            "Name": "__myl_FcAdd_myl0_22",
            "LayerType": "gemm",
            "TacticName": "",
            "Metadata": "[ONNX Layer: node_MatMul_300]",
        },
    ],
    "Bindings": ["hidden_states", "out_hidden_states"],
}

TEXT = """\
[VERBOSE] Layers:
Name: /a/Conv + /b/Relu, LayerType: CaskConvolution, Inputs: [ { Name: x, Dimensions: [1,3,224,224] }], \
Kernel: [11,11], Weights: {"Type": "Half", "Count": 23232}, HasSparseWeights: 1, \
TacticName: sm80_xmma_sparse_conv, TacticValue: 0x28, StreamId: 0, Metadata: [ONNX Layer: /a/Conv][ONNX Layer: /b/Relu]
Name: to_v+to_k+to_q_myl0_9, LayerType: gemm, Inputs: [ { Name: add, Dimensions: [-1,32] }], \
TacticName: __myelin_CASK_STUB, StreamId: 0, Metadata: [ONNX Layer: n_3]\x1f[ONNX Layer: n_2]\x1f[ONNX Layer: n_1]
Name: __mye_shape, LayerType: shape_call, Inputs: [], TacticName: , StreamId: 0, Metadata: \n
I/O Tensors:
 Name: hidden_states, IOMode: Input, DataType: Half, Dimensions: [-1,4,-1,-1]
"""


def test_the_log_of_tensorrt_10_and_11_tells_eligible_and_chosen_layers_of_the_last_pass():
    log = read_log(TEN)
    assert log.eligible == Said(3, (f"{BLOCK}.attn.to_q", f"{BLOCK}.ff.net.0.proj + node_gelu", f"{BLOCK}.ff.net.2"))
    assert log.chosen == Said(1, (f"{BLOCK}.ff.net.0.proj + node_gelu",))


def test_a_log_with_counts_alone_tells_no_layers():
    assert read_log(COUNTS) == Log(Said(39, ()), Said(0, ()))


def test_the_older_log_is_read_too():
    log = read_log(EIGHT)
    assert log.eligible == Said(3, ("MatMul_401", "Conv_619 + Relu_620", "Conv_626"))
    assert log.chosen == Said(1, ("Conv_626",))


def test_a_log_that_says_nothing_of_sparsity_tells_nothing():
    assert read_log("[INFO] Engine generation completed in 2.3 seconds.\n") == Log(None, None)


def test_the_inspector_tells_tactic_and_sparse_weights():
    layers = read_engine(json.loads(json.dumps(INSPECTOR)))
    assert [layer.sparse for layer in layers] == [True, False, None]
    assert [bool(layer.tactic and "sparse" in layer.tactic) for layer in layers] == [True, False, False]
    assert layers[0].nodes >= {f"{BLOCK}.ff.net.0.proj", "node_gelu", "node_MatMul_200"}
    assert layers[2] == EngineLayer("__myl_FcAdd_myl0_22", frozenset({"__myl_FcAdd", "node_MatMul_300"}), None, None)


def test_an_engine_without_detailed_verbosity_tells_names_alone():
    layers = read_engine({"Layers": ["a + b", "c_myl0_3"]})
    assert layers == (
        EngineLayer("a + b", frozenset({"a", "b"}), None, None),
        EngineLayer("c_myl0_3", frozenset({"c"}), None, None),
    )


def test_the_layers_at_the_end_of_a_verbose_log_are_read():
    first, second, third = read_layers(TEXT)
    assert first == EngineLayer("/a/Conv + /b/Relu", frozenset({"/a/Conv", "/b/Relu"}), "sm80_xmma_sparse_conv", True)
    assert second.nodes == {"to_v", "to_k", "to_q", "n_1", "n_2", "n_3"}
    assert (second.tactic, second.sparse) == ("__myelin_CASK_STUB", None)
    assert (third.name, third.tactic) == ("__mye_shape", None)
    assert read_layers("[INFO] nothing\n") == ()


def test_names_are_taken_apart_whole():
    assert parts("a.to_q + node_add") == {"a.to_q", "node_add"}
    assert parts("a.to_v+a.to_k+a.to_q_myl0_9") == {"a.to_v", "a.to_k", "a.to_q"}
    assert parts("{ForeignNode[node_1...node_9]}") == set()  # a range: which layers lie in it is not said
    assert parts("node_1 + {ForeignNode[node_2...node_9]} [profile 1]") >= {"node_1"}
    assert "node_1" not in parts("node_10")


def test_each_sparse_layer_is_told_by_its_torch_name():
    names = [f"{BLOCK}.{name}" for name in ("attn.to_q", "ff.net.0.proj", "ff.net.2", "attn.to_out.0")]
    linears = dict(zip(names, (["node_MatMul_181"], ["node_MatMul_200"], ["node_MatMul_300"], ["node_7"]), strict=True))
    sparse = {name: {"pattern": "2:4", "holds": True} for name in names}
    shapes = dict.fromkeys(names, (128, 32))
    row = Row("m", 2, 128, 32, 128, 3, names[1], (3e-6, 2e-6, 4e-6), (2e-6, 2e-6, 2e-6), (1, 1, -1), 1e-3)
    told = by_layer(linears, sparse, shapes, read_log(TEN), read_engine(INSPECTOR), {names[1]: row})
    assert told[names[1]] == {
        "shape": "128 x 32",
        "pattern": "2:4",
        "holds": True,
        "eligible": True,
        "chosen": True,
        "layer": f"{BLOCK}.ff.net.0.proj + node_gelu",
        "sparse_weights": True,
        "tactic": "sm80_xmma_sparse_gemm_f16f16_f16f16_f16_tn_n_tilesize128x64x64_stage3_tensor16x8x32",
        "dense_us": 3.0,
        "sparse_us": 2.0,
        "ratio": 1.5,
    }
    assert [told[names[0]][key] for key in ("dense_us", "sparse_us", "ratio")] == [None] * 3  # no row
    assert [told[name]["eligible"] for name in names] == [True, True, True, False]
    assert [told[name]["chosen"] for name in names] == [False, True, False, False]
    assert [told[name]["sparse_weights"] for name in names] == [False, True, None, None]
    assert told[names[2]]["layer"] == "__myl_FcAdd_myl0_22"  # by its metadata
    assert told[names[3]]["layer"] is None
    assert by_layer(linears, {}, shapes, read_log(TEN), (), {}) == {}


def test_what_a_log_does_not_say_is_not_guessed():
    sparse, shapes = {"a": {"pattern": "2:4", "holds": True}}, {"a": (8, 8)}
    assert by_layer({}, sparse, shapes, read_log(COUNTS), (), {})["a"]["eligible"] is None  # 39, not which
    assert by_layer({}, sparse, shapes, read_log(COUNTS), (), {})["a"]["chosen"] is False  # 0: not this one either
    assert by_layer({}, sparse, shapes, Log(), (), {})["a"]["chosen"] is None
    ranges = Log(Said(2, ("b", "{ForeignNode[c...d]}")))
    assert by_layer({}, sparse, shapes, ranges, (), {})["a"]["eligible"] is None  # it may lie between c and d
