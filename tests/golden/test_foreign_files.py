"""Files in the formats of other tools, written from the format descriptions, are dequantized bit for bit."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import llmq
from llmq.errors import FormatError
from tests import builders, foreign

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


def check(folder: Path, expected: dict[str, Tensor]) -> None:
    weights = dict(llmq.dequantize(folder))
    assert weights.keys() == {f"{name}.weight" for name in expected}
    for name, weight in expected.items():
        assert weights[f"{name}.weight"].dtype == torch.float32
        assert torch.equal(weights[f"{name}.weight"], weight), name


# ---- gptq

GPTQ: dict[str, Any] = {"quant_method": "gptq", "desc_act": False, "sym": False}


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_gptq_reads_all_widths(tmp_path: Path, bits: int, version: int) -> None:
    w = foreign.weight(bits, (64, 96), 32)
    settings = GPTQ | {"bits": bits, "group_size": 32, "checkpoint_format": "gptq" if version == 1 else "gptq_v2"}
    check(foreign.folder(tmp_path, settings, {Q: foreign.gptq(w, version, planar=bits in (5, 6, 7))}), {Q: w.exact})


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_gptq_reads_planes(tmp_path: Path, bits: int) -> None:
    w = foreign.weight(bits, (32, 64), 32)
    settings = GPTQ | {"bits": bits, "group_size": 32, "checkpoint_format": "gptq_p", "format": "gptq_p"}
    check(foreign.folder(tmp_path, settings, {Q: foreign.gptq(w, 2, planar=True)}), {Q: w.exact})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("symmetric", [False, True])
def test_gptq_reads_activation_order(tmp_path: Path, symmetric: bool, dtype: torch.dtype) -> None:
    w = foreign.weight(4, (16, 128), 32, symmetric=symmetric, shuffled=True, dtype=dtype)
    settings = GPTQ | {"bits": 4, "group_size": 32, "desc_act": True, "sym": symmetric}
    check(foreign.folder(tmp_path, settings, {Q: foreign.gptq(w, 1)}), {Q: w.exact})


@pytest.mark.parametrize("group", [64, 96])
@pytest.mark.parametrize("K", [32, 72, 96, 160, 192])
def test_gptq_groups_may_be_incomplete_or_wider_than_the_row(tmp_path: Path, K: int, group: int) -> None:
    w = foreign.weight(4, (8, K), group)
    settings = GPTQ | {"bits": 4, "group_size": group}
    for index in (True, False):
        check(foreign.folder(tmp_path, settings, {Q: foreign.gptq(w, 1, index=index)}), {Q: w.exact})


@pytest.mark.parametrize("where", ["quantize_config.json", "config.json", "inner"])
def test_gptq_reads_configurations_in_several_places(tmp_path: Path, where: str) -> None:
    w = foreign.weight(4, (8, 64), 32)
    settings = {"bits": 4, "group_size": 32, "desc_act": False, "damp_percent": 0.1, "true_sequential": True}
    documents = {
        "quantize_config.json": {"quantize_config.json": settings},
        "config.json": {"config.json": {"quantization_config": settings}},
        "inner": {"config.json": {"text_config": {"quantization_config": settings | {"quant_method": "gptq"}}}},
    }
    folder = foreign.folder(tmp_path, None, {Q: foreign.gptq(w, 1)}, documents[where])
    check(folder, {Q: w.exact})


def test_gptq_reads_exceptions_and_ignores_unknown_keys(tmp_path: Path) -> None:
    four, eight = foreign.weight(4, (16, 64), 32, symmetric=True), foreign.weight(8, (16, 64), 64, symmetric=True)
    settings = GPTQ | {
        "bits": 4, "group_size": 32, "sym": True, "format": "gptq", "method": "gptq", "pack_dtype": "int32",
        "dynamic": {r"-:.*gate": {}, r"+:.*\.1\..*": {"bits": 8, "group_size": 64, "mse": 2.0}},
        "meta": {"quantizer": ["gptqmodel:7.7.0"]}, "adapter": None, "something_new": {"a": [1]},
    }  # fmt: skip
    modules = {Q: foreign.gptq(four, 1), DOWN: foreign.gptq(eight, 1)}
    check(foreign.folder(tmp_path, settings, modules), {Q: four.exact, DOWN: eight.exact})


def test_shards_with_an_index_are_read(tmp_path: Path) -> None:
    w, other = foreign.weight(4, (8, 64), 32), foreign.weight(4, (8, 64), 32, seed=1)
    folder = foreign.folder(tmp_path, GPTQ | {"bits": 4, "group_size": 32}, {Q: foreign.gptq(w, 1)})
    (folder / "model.safetensors").unlink()
    shards = {"model-00001-of-00002.safetensors": [], "model-00002-of-00002.safetensors": []}
    for name, packed in ((Q, w), (DOWN, other)):
        for suffix, tensor in foreign.gptq(packed, 1).items():  # the tensors of a module may be in several shards
            shards[f"model-0000{1 + (suffix == 'scales')}-of-00002.safetensors"].append((f"{name}.{suffix}", tensor))
    for file, tensors in shards.items():
        save_file(dict(tensors), folder / file)
    weight_map = {name: file for file, tensors in shards.items() for name, _ in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    check(folder, {Q: w.exact, DOWN: other.exact})


# ---- awq


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_awq_reads_gemm(tmp_path: Path, bits: int) -> None:
    w = foreign.weight(bits, (32, 64), 32, dtype=torch.bfloat16)
    settings = {"quant_method": "awq", "bits": bits, "group_size": 32, "zero_point": True, "version": "gemm"}
    check(foreign.folder(tmp_path, settings, {Q: foreign.awq_gemm(w)}), {Q: w.exact})


@pytest.mark.parametrize("group", [-1, 32])
def test_awq_reads_the_keys_of_autoawq(tmp_path: Path, group: int) -> None:
    w = foreign.weight(4, (16, 64), 64 if group == -1 else group)
    settings = {
        "w_bit": 4,
        "q_group_size": group,
        "zero_point": True,
        "version": "GEMM",
        "modules_to_not_convert": None,
    }
    folder = foreign.folder(tmp_path, None, {Q: foreign.awq_gemm(w)}, {"quant_config.json": settings})
    check(folder, {Q: w.exact})


def test_an_exclusion_list_does_not_hide_packed_modules(tmp_path: Path) -> None:
    """`gate` is the router, and also a part of the name `gate_proj`; the head is packed but not declared."""
    w = foreign.weight(4, (16, 64), 32)
    names = ("model.layers.0.mlp.gate_proj", "lm_head")
    settings = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    settings |= {"modules_to_not_convert": ["gate"]}
    folder = foreign.folder(tmp_path, settings, {name: foreign.awq_gemm(w) for name in names})
    check(folder, {name: w.exact for name in names})


@pytest.mark.parametrize("group", [32, 64, 128])
def test_awq_reads_gemv(tmp_path: Path, group: int) -> None:
    w = foreign.weight(4, (8, 384), group)
    settings = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "GEMV"}
    check(foreign.folder(tmp_path, settings, {Q: foreign.awq_gemv(w, 32)}), {Q: w.exact})


@pytest.mark.parametrize("zeros", ["qzeros", "scaled_zeros"])
@pytest.mark.parametrize("group", [32, 64])
def test_awq_reads_gemv_fast_and_llm_awq(tmp_path: Path, group: int, zeros: str) -> None:
    w = foreign.weight(4, (8, 256), group)
    version = "gemv_fast" if zeros == "qzeros" else "llm-awq"
    settings = {"quant_method": "awq", "w_bit": 4, "q_group_size": group, "zero_point": True, "version": version}
    check(foreign.folder(tmp_path, settings, {Q: foreign.awq_gemv_fast(w, 16, zeros)}), {Q: w.exact})


def test_awq_gemv_fast_refuses_fractional_zeros(tmp_path: Path) -> None:
    tensors = foreign.awq_gemv_fast(foreign.weight(4, (8, 64), 32), 8)
    tensors["qzeros"] += tensors["scales"] / 2
    settings = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemv_fast"}
    with pytest.raises(FormatError, match=f"{Q}: the zero points, qzeros divided by scales, are not integers"):
        dict(llmq.dequantize(foreign.folder(tmp_path, settings, {Q: tensors})))


# ---- auto-round

AUTO_ROUND: dict[str, Any] = {
    "quant_method": "auto-round", "autoround_version": "0.16.1", "data_type": "int", "bits": 4, "group_size": 32,
    "sym": False, "amp": True, "iters": 0, "block_name_to_quantize": "model.layers",
}  # fmt: skip


@pytest.mark.parametrize(
    ("packing", "version"),
    [("auto_round:auto_gptq", 1), ("auto_round:gptq", 1), ("auto_round", 2), ("auto_round:gptqmodel", 2)],
)
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_auto_round_reads_the_layout_of_gptq(tmp_path: Path, packing: str, version: int, bits: int) -> None:
    w = foreign.weight(bits, (32, 96), 32)
    settings = AUTO_ROUND | {"packing_format": packing, "bits": bits}
    tensors = foreign.gptq(w, version, index="gptqmodel" in packing)
    check(foreign.folder(tmp_path, settings, {Q: tensors}), {Q: w.exact})


def test_auto_round_reads_the_layout_of_awq(tmp_path: Path) -> None:
    w = foreign.weight(4, (16, 64), 32)
    settings = AUTO_ROUND | {"packing_format": "auto_round:auto_awq"}
    check(foreign.folder(tmp_path, settings, {Q: foreign.awq_gemm(w)}), {Q: w.exact})


def test_auto_round_exceptions_are_names_or_patterns(tmp_path: Path) -> None:
    modules = {
        Q: foreign.weight(8, (32, 64), 64, symmetric=True),
        DOWN: foreign.weight(2, (32, 64), 32, symmetric=True),
        "model.layers.1.mlp.up_proj": foreign.weight(4, (32, 64), 32, symmetric=True),
    }
    exceptions = {Q: {"bits": 8, "group_size": -1}, r".*1\.mlp\.down.*": {"bits": 2}, "lm_head": {"bits": 16}}
    settings = AUTO_ROUND | {"sym": True, "packing_format": "auto_round:auto_gptq", "extra_config": exceptions}
    tensors = {name: foreign.gptq(w, 1, index=False) for name, w in modules.items()}
    check(foreign.folder(tmp_path, settings, tensors), {name: w.exact for name, w in modules.items()})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"packing_format": "auto_round:fake"}, "fake"),
        ({"packing_format": "mlx"}, "mlx"),
        ({"packing_format": "auto_round:llm_compressor", "data_type": "mx_fp", "bits": 8}, "'mx_fp' with 8 bits"),
        ({"packing_format": "auto_round", "rotation_config": {"a": 1}}, "rotation_config"),
        ({"packing_format": "auto_round:auto_awq", "bits": 8}, "8 bits"),
    ],
)
def test_auto_round_names_unsupported_settings(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    w = foreign.weight(4, (16, 64), 32)
    with pytest.raises(FormatError, match=words):
        dict(llmq.dequantize(foreign.folder(tmp_path, AUTO_ROUND | changes, {Q: foreign.gptq(w, 1)})))


# ---- compressed-tensors


def compressed(packing: str = "pack-quantized", **weights: Any) -> dict[str, Any]:
    full = {
        "num_bits": 4,
        "type": "int",
        "symmetric": False,
        "strategy": "group",
        "group_size": 32,
        "observer": "minmax",
    }
    groups = {
        "group_0": {"targets": ["Linear"], "weights": full | weights, "format": packing, "input_activations": None}
    }
    return {
        "quant_method": "compressed-tensors", "format": packing, "config_groups": groups, "ignore": ["lm_head"],
        "quantization_status": "compressed", "global_compression_ratio": None, "version": "0.19.0",
    }  # fmt: skip


@pytest.mark.parametrize("shape", [(5, 96), (40, 32)])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_compressed_tensors_reads_all_widths(tmp_path: Path, bits: int, shape: tuple[int, int]) -> None:
    w = foreign.weight(bits, shape, 32, dtype=torch.bfloat16)
    check(foreign.folder(tmp_path, compressed(num_bits=bits), {Q: foreign.compressed(w)}), {Q: w.exact})


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4, 6])
def test_compressed_tensors_reads_channels_and_odd_rows(tmp_path: Path, bits: int, symmetric: bool) -> None:
    w = foreign.weight(bits, (7, 333), 333, symmetric=symmetric)
    settings = compressed(num_bits=bits, strategy="channel", group_size=None, symmetric=symmetric)
    check(foreign.folder(tmp_path, settings, {Q: foreign.compressed(w, zeros=not symmetric)}), {Q: w.exact})


def test_compressed_tensors_reads_activation_order(tmp_path: Path) -> None:
    w = foreign.weight(4, (8, 128), 32, shuffled=True)
    settings = compressed(actorder="group")
    check(foreign.folder(tmp_path, settings, {Q: foreign.compressed(w, index=True)}), {Q: w.exact})


@pytest.mark.parametrize("packing", ["int-quantized", "naive-quantized"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors_reads_one_byte_per_code(tmp_path: Path, packing: str, symmetric: bool) -> None:
    w = foreign.weight(8, (6, 40), 40, symmetric=symmetric)
    tensors = {"weight": torch.from_numpy((w.codes - 128).astype(np.int8)), "weight_scale": w.scales}
    if not symmetric:
        tensors["weight_zero_point"] = torch.from_numpy((w.zeros - 128).astype(np.int8))
    settings = compressed(packing, num_bits=8, strategy="channel", group_size=None, symmetric=symmetric)
    settings["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, "dynamic": True}
    check(foreign.folder(tmp_path, settings, {Q: tensors}), {Q: w.exact})


def test_compressed_tensors_reads_several_packings_in_one_file(tmp_path: Path) -> None:
    four, eight = foreign.weight(4, (8, 64), 32), foreign.weight(8, (8, 64), 64, symmetric=True)
    floats, exact = foreign.fp4("nvfp4", (8, 64))
    settings = compressed() | {"format": "mixed-precision"}
    settings["config_groups"] |= {
        "group_1": {
            "targets": [r"re:.*down_proj$"],
            "weights": {"num_bits": 8, "strategy": "channel", "symmetric": True},
            "format": "pack-quantized",
        },
        "group_2": {
            "targets": ["model.layers.1.mlp.up_proj"],
            "weights": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
            "format": "nvfp4-pack-quantized",
        },
    }
    modules = {
        Q: foreign.compressed(four),
        DOWN: foreign.compressed(eight, zeros=False),
        "model.layers.1.mlp.up_proj": floats,
    }
    expected = {Q: four.exact, DOWN: eight.exact, "model.layers.1.mlp.up_proj": exact}
    check(foreign.folder(tmp_path, settings, modules), expected)


# ---- floats of four bits


@pytest.mark.parametrize(
    ("packing", "strategy", "group"),
    [("nvfp4-pack-quantized", "tensor_group", 16), ("mxfp4-pack-quantized", "group", 32)],
)
def test_floats_of_four_bits_are_read(tmp_path: Path, packing: str, strategy: str, group: int) -> None:
    tensors, exact = foreign.fp4(packing[:5], (6, 96))
    settings = compressed(packing, type="float", strategy=strategy, group_size=group, symmetric=True)
    settings["config_groups"]["group_0"]["input_activations"] = {"num_bits": 4, "type": "float", "dynamic": "local"}
    tensors["input_global_scale"] = torch.tensor([1.0])
    check(foreign.folder(tmp_path, settings, {Q: tensors}), {Q: exact})


@pytest.mark.parametrize(("kind", "packing", "group"), [("nv_fp", "nvfp4", 16), ("mx_fp", "mxfp4", 32)])
def test_floats_of_four_bits_from_auto_round_are_read(tmp_path: Path, kind: str, packing: str, group: int) -> None:
    tensors, exact = foreign.fp4(packing, (4, 64))
    changes = {"packing_format": "auto_round:llm_compressor", "data_type": kind, "group_size": group, "act_bits": 4}
    check(foreign.folder(tmp_path, AUTO_ROUND | changes, {Q: tensors}), {Q: exact})


def test_the_experts_of_gpt_oss_are_read(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    E, N, K = 2, 6, 64
    codes, exponents = draw.integers(0, 16, (E, N, K)), draw.integers(110, 130, (E, N, K // 32))
    blocks = (codes[..., ::2] | codes[..., 1::2] << 4).astype(np.uint8).reshape(E, N, K // 32, 16)
    exact = foreign.E2M1[codes] * np.repeat(np.exp2(exponents - 127.0), 32, axis=-1).astype(np.float32)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    folder = foreign.folder(tmp_path, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens"]}, {})
    tensors = {
        f"{name}_blocks": torch.from_numpy(blocks),
        f"{name}_scales": torch.from_numpy(exponents.astype(np.uint8)),
        f"{name}_bias": torch.zeros(E, N),
    }
    save_file(tensors, folder / "model.safetensors")
    sizes = {"num_hidden_layers": 1, "num_local_experts": E, "hidden_size": K, "vocab_size": 8}
    builders.change_json(folder / "config.json", model_type="gpt_oss", layer_types=["full_attention"], **sizes)
    ((read_name, weight),) = llmq.dequantize(folder)
    assert read_name == name
    assert torch.equal(weight, torch.from_numpy(exact).mT)  # inputs before outputs, as in the float parameter


def test_reference_writer_of_gptq_v1_borrows_across_nibbles() -> None:
    # Zero points 0 0 15 14 0 0 0 1 are the word 0x1000ef00; minus 0x11111111 that is 0xfeefddef modulo 2**32.
    w = dataclasses.replace(foreign.weight(4, (8, 32), 32), zeros=np.array([[0, 0, 15, 14, 0, 0, 0, 1]]).T)
    (word,) = foreign.gptq(w, 1)["qzeros"].flatten().tolist()
    assert word & 0xFFFFFFFF == 0xFEEFDDEF
