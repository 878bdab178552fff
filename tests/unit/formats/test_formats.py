"""What each layout can hold, what it writes to config.json, and what it reads from config.json of other writers."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from llmq import formats
from llmq.config import FORMATS
from llmq.errors import ConfigError, FormatError
from llmq.formats import awq, compressed_tensors, gptq, mlx
from llmq.formats.base import Layout, Reading
from llmq.formats.codecs import ct_floats
from llmq.numerics import affine_grid
from llmq.numerics.scheme import BITS, WeightScheme
from tests.unit.formats.examples import ASYMMETRIC, G32, LAYOUTS, example

Q, K, HEAD = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj", "lm_head"


def compressed(weights: dict[str, object], **group: object) -> dict[str, object]:
    full = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, **weights}
    return {"format": "pack-quantized", "config_groups": {"group_0": {"targets": ["Linear"], "weights": full, **group}}}


# ---- finding a layout


def test_every_format_of_the_settings_has_a_file() -> None:
    assert set(formats.names()) == {name for name in FORMATS if not name.startswith("gguf:")}
    assert [formats.load(name).name for name in formats.names()] == list(formats.names())


@pytest.mark.parametrize("name", [name for name in formats.names() if name != "gguf"])
def test_a_layout_is_loaded_by_name_and_by_quant_method(name: str) -> None:
    layout = formats.load(name)
    block = layout.quantization_config({Q: G32}, [])
    assert layout.name == name
    assert set(layout.codes) <= set(layout.suffixes)
    read_as = {"gptq_v2": "gptq", "int-quantized": "compressed-tensors"}
    assert formats.detect(block) is formats.load(read_as.get(name, name))


def test_the_error_for_an_unknown_name_lists_the_known_names() -> None:
    with pytest.raises(ConfigError, match=r"'bits'.*awq, compressed-tensors, gguf, gptq"):
        formats.load("bits")


@pytest.mark.parametrize("block", [{"quant_method": "fbgemm_fp8"}, {}])
def test_the_error_for_an_unknown_quant_method_lists_formats(block: dict[str, str]) -> None:
    with pytest.raises(FormatError, match=r"awq, compressed-tensors, fp8, gptq"):
        formats.detect(block)


# ---- what a layout can hold


@pytest.mark.parametrize(
    ("layout", "scheme", "shape", "words"),
    [
        (
            awq.LAYOUT,
            WeightScheme(8),
            (64, 128),
            "awq holds 4 bits only, not 8; compressed-tensors holds 2 to 8",
        ),
        (mlx.LAYOUT, WeightScheme(7), (64, 128), "2, 3, 4, 5, 6 and 8 bits, not 7; compressed-tensors holds 2 to 8"),
        (awq.LAYOUT, G32, (12, 64), "12 .*compressed-tensors holds any number"),
        (gptq.LAYOUT, WeightScheme(3), (64, 128), "4 and 8 bits only, not 3; compressed-tensors holds"),
        (gptq.LAYOUT, WeightScheme(2), (64, 128), "4 and 8 bits only, not 2; compressed-tensors holds"),
        (gptq.LAYOUT, G32, (12, 64), "8 output features.*12.*compressed-tensors"),
        (gptq.LAYOUT, WeightScheme(4, "channel"), (16, 60), "8 input features.*60.*compressed-tensors"),
        (gptq.LAYOUT, WeightScheme(8, "channel"), (6, 64), "4 output features.*6 .*compressed-tensors"),
        *((layout, WeightScheme(4, 128), (64, 192), "group size of 128 does not divide 192") for layout in LAYOUTS),
    ],
)
def test_a_grid_that_does_not_fit_is_refused_with_its_reason(
    layout: Layout, scheme: WeightScheme, shape: tuple[int, int], words: str
) -> None:
    refusal = layout.refusal(scheme, *shape)
    assert refusal is not None
    assert re.search(words, refusal)
    with pytest.raises(FormatError, match=re.escape(refusal)):
        layout.pack(example(scheme, shape))


@pytest.mark.parametrize(
    ("layout", "scheme", "shape"),
    [
        (awq.LAYOUT, WeightScheme(4, "channel"), (8, 60)),
        (gptq.LAYOUT, WeightScheme(8, "tensor", symmetric=False), (4, 60)),
        (compressed_tensors.LAYOUT, WeightScheme(3, "channel"), (5, 7)),
        *((compressed_tensors.LAYOUT, WeightScheme(bits, 16, symmetric=False), (5, 48)) for bits in BITS),
    ],
)
def test_a_grid_that_fits_is_not_refused(layout: Layout, scheme: WeightScheme, shape: tuple[int, int]) -> None:
    assert layout.refusal(scheme, *shape) is None
    layout.pack(example(scheme, shape))


def test_scales_are_rounded_to_what_readers_expect() -> None:
    assert compressed_tensors.scale_dtype(torch.bfloat16) == torch.bfloat16
    assert awq.scale_dtype(torch.bfloat16) == gptq.scale_dtype(torch.bfloat16) == torch.float16


# ---- what a layout declares


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("scheme", [G32, ASYMMETRIC, WeightScheme(4, "channel"), WeightScheme(4, "tensor")], ids=str)
def test_a_written_configuration_is_read_back(layout: Layout, scheme: WeightScheme) -> None:
    read = layout.read_config(layout.quantization_config({Q: scheme, K: scheme}, ["model.layers.1.mlp.gate", HEAD]))
    stored = scheme if scheme.group_size != "tensor" else dataclasses.replace(scheme, group_size="channel")
    if layout is awq.LAYOUT:  # it always stores zero points
        stored = dataclasses.replace(stored, symmetric=False)
    assert [getattr(read(name), "scheme", None) for name in (Q, K, HEAD)] == [stored, stored, None]
    assert read("model.layers.1.mlp.gate") is None


def test_compressed_tensors_with_one_grid_targets_linear() -> None:
    block = compressed_tensors.quantization_config({Q: G32, K: G32}, [HEAD])
    (group,) = block["config_groups"].values()
    assert (group["targets"], block["ignore"]) == (["Linear"], [HEAD])


@pytest.mark.parametrize("layout", [compressed_tensors.LAYOUT, gptq.LAYOUT], ids=lambda layout: layout.name)
def test_several_grids_are_declared_by_module(layout: Layout) -> None:
    schemes = {Q: WeightScheme(8, 64), K: G32, f"{K}2": G32, "a.b": WeightScheme(4, "channel")}
    read = layout.read_config(layout.quantization_config(schemes, ["a.c", HEAD]))
    assert {name: read(name).scheme for name in schemes} == schemes  # type: ignore[union-attr]
    assert read("a.c") is read(HEAD) is None


def test_gptq_declares_the_keys_that_engines_require() -> None:
    assert gptq.quantization_config({Q: G32}, [HEAD]) == {
        "quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False,
        "checkpoint_format": "gptq", "pack_dtype": "int32", "lm_head": False,
    }  # fmt: skip


def test_gptq_exceptions_match_whole_names() -> None:
    block = gptq.quantization_config({"a.b": G32, "a.c": G32, "a.d": WeightScheme(8, "channel")}, ["x.y"])
    assert block["dynamic"] == {r"-:^x\.y$": {}, r"+:^a\.d$": {"bits": 8, "group_size": -1, "sym": True}}
    read = gptq.read_config(block)
    assert read("axd.q") == read("x.y.z") == Reading(G32, zeros_offset=1)


def test_a_gptq_file_has_zeros_of_one_version() -> None:
    assert gptq.quantization_config({Q: ASYMMETRIC}, [])["checkpoint_format"] == "gptq_v2"
    with pytest.raises(ConfigError, match="symmetric and asymmetric") as caught:
        gptq.quantization_config({Q: ASYMMETRIC, K: G32}, [])
    assert "compressed-tensors" in caught.value.hint


def test_an_awq_file_holds_one_grid() -> None:
    with pytest.raises(ConfigError, match="int4 channel symmetric, int4 g32 symmetric"):
        awq.quantization_config({Q: G32, K: WeightScheme(4, "channel")}, [])


def test_awq_refuses_names_that_readers_would_confuse() -> None:
    with pytest.raises(ConfigError, match=r"a\.gate_proj.*a\.gate,"):
        awq.quantization_config({"a.gate_proj": G32}, ["a.gate"])


@pytest.mark.parametrize("layout", [awq.LAYOUT, gptq.LAYOUT], ids=lambda layout: layout.name)
def test_a_quantized_head_is_declared(layout: Layout) -> None:
    block = layout.quantization_config({Q: G32, HEAD: G32}, [])
    assert block["lm_head"] is True
    assert layout.read_config(block)(HEAD) is not None


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_a_checkpoint_without_quantized_modules_is_refused(layout: Layout) -> None:
    with pytest.raises(ConfigError, match="no module is quantized"):
        layout.quantization_config({}, [Q])


# ---- configurations of other writers


def test_compressed_tensors_prefers_name_to_pattern_to_class() -> None:
    def group(bits: int, *targets: str) -> dict[str, object]:
        weights = {"num_bits": bits, "strategy": "channel"}
        return {"targets": list(targets), "weights": weights, "format": "pack-quantized"}

    groups = {"a": group(4, "Linear"), "b": group(8, r"re:.*\.mlp\..*"), "c": group(2, "x.mlp.up")}
    block = {"format": "mixed-precision", "config_groups": groups, "ignore": [HEAD, "re:.*router"]}
    read = compressed_tensors.read_config(block)
    bits = {name: reading.scheme.bits for name in ("x.q", "x.mlp.down", "x.mlp.up") if (reading := read(name))}
    assert bits == {"x.q": 4, "x.mlp.down": 8, "x.mlp.up": 2}
    assert read(HEAD) is read("x.mlp.router") is None


@pytest.mark.parametrize(
    ("weights", "group_size"),
    [
        ({"strategy": "channel", "group_size": None}, "channel"),
        ({"strategy": "tensor", "group_size": None}, "tensor"),
        ({"strategy": None, "group_size": -1}, "channel"),
        ({"strategy": None, "group_size": 64}, 64),
    ],
)
def test_compressed_tensors_reads_strategies(weights: dict[str, object], group_size: object) -> None:
    assert compressed_tensors.read_config(compressed(weights))(Q) == Reading(WeightScheme(4, group_size))  # type: ignore[arg-type]


@pytest.mark.parametrize(("actorder", "needed"), [("group", True), ("static", False), (None, False)])
def test_compressed_tensors_reads_actorder_of_older_files(actorder: str | None, needed: bool) -> None:
    block = compressed({"actorder": actorder})
    assert compressed_tensors.read_config(block)(Q) == Reading(G32, needs_group_index=needed)


def test_gptq_without_a_version_means_version_one() -> None:
    read = gptq.read_config({"bits": 4, "group_size": -1, "desc_act": True})
    assert read(Q) == Reading(WeightScheme(4, "channel"), zeros_offset=1, needs_group_index=True)
    assert read(HEAD) is None


def test_gptq_uses_the_first_matching_pattern() -> None:
    dynamic = {r"-:.*\.mlp\.": {}, r".*layers\.1\.": {"bits": 8}, r"+:.*": {"group_size": 64, "sym": False}}
    read = gptq.read_config({"bits": 4, "group_size": 32, "format": "gptq_v2", "dynamic": dynamic})
    assert read("model.layers.1.mlp.up_proj") is None
    assert read("model.layers.1.self_attn.q_proj") == Reading(WeightScheme(8, 32))
    assert read("model.layers.2.self_attn.q_proj") == Reading(WeightScheme(4, 64, symmetric=False))


def test_gptq_modules_in_block_exclude_the_others() -> None:
    listed = [["self_attn.q_proj", "self_attn.v_proj"], ["proj"]]
    read = gptq.read_config({"bits": 4, "group_size": 32, "modules_in_block_to_quantize": listed})
    assert read(Q) == Reading(G32, zeros_offset=1)
    assert read(K) is None


@pytest.mark.parametrize(
    "block",
    [
        {"bits": 4, "group_size": 32, "zero_point": True, "version": "gemm", "modules_to_not_convert": ["gate"]},
        {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM", "modules_to_not_convert": ["gate"]},
    ],
)
def test_awq_reads_both_families_of_keys(block: dict[str, object]) -> None:
    read = awq.read_config(block)
    assert read(Q) == Reading(ASYMMETRIC)
    assert read("model.layers.0.mlp.gate.up") is None


def test_awq_without_zero_point_is_symmetric() -> None:
    assert awq.read_config({"bits": 4, "group_size": 32, "zero_point": False})(Q) == Reading(G32)


@pytest.mark.parametrize(
    ("layout", "block", "words"),
    [
        (compressed_tensors.LAYOUT, compressed({"num_bits": 1}), "1 bits, expected one of 2, 3, 4, 5, 6, 7, 8"),
        (compressed_tensors.LAYOUT, compressed({"type": "float"}), "type 'float', expected 'int'"),
        (compressed_tensors.LAYOUT, compressed({"dynamic": True}), "dynamic True"),
        (compressed_tensors.LAYOUT, compressed({"strategy": "block"}), "per 'block'"),
        (compressed_tensors.LAYOUT, compressed({"group_size": 40}), "group size is 40, expected one of 16"),
        (compressed_tensors.LAYOUT, compressed({}, format="marlin-24"), "'marlin-24', expected one of pack-quantized"),
        (
            compressed_tensors.LAYOUT,
            compressed({}, format="float-quantized"),
            "float-quantized with .*int.*expected .*float",
        ),
        (compressed_tensors.LAYOUT, compressed({}) | {"format": "mxfp8-quantized"}, "'mxfp8-quantized'"),
        (
            compressed_tensors.LAYOUT,
            compressed({}, format="nvfp4-pack-quantized"),
            "nvfp4-pack-quantized with .*32.*expected .*16",
        ),
        (compressed_tensors.LAYOUT, compressed({}) | {"transform_config": {"config_groups": {}}}, "transform_config"),
        (compressed_tensors.LAYOUT, compressed({}) | {"sparsity_config": {"format": "sparse-24"}}, "sparse-24"),
        (compressed_tensors.LAYOUT, {"config_groups": {"W4A16": ["Linear"]}}, "W4A16"),
        (compressed_tensors.LAYOUT, compressed({}) | {"ignore": ["re:("]}, "'\\('"),
        (compressed_tensors.LAYOUT, {}, "no config_groups"),
        (gptq.LAYOUT, {"bits": 1, "group_size": 32}, "1 bits, expected one of 2, 3, 4, 5, 6, 7, 8"),
        (gptq.LAYOUT, {"bits": 4}, "no group_size"),
        (gptq.LAYOUT, {"bits": 4, "group_size": 100}, "100"),
        (gptq.LAYOUT, {"bits": 4, "group_size": 32, "sym": "yes"}, "'yes'"),
        (gptq.LAYOUT, {"bits": 4, "group_size": 32, "checkpoint_format": "marlin"}, "expected gptq or gptq_v2"),
        (gptq.LAYOUT, {"bits": 4, "group_size": 32, "pack_dtype": "int16"}, "'int16'"),
        (gptq.LAYOUT, {"bits": 4, "group_size": 32, "dynamic": {"+:a": {"bits": 9}}}, "9 bits"),
        (gptq.LAYOUT, {"bits": 4, "group_size": 32, "dynamic": {"+:(": {}}}, "'\\('"),
        (awq.LAYOUT, {"bits": 4, "group_size": 32, "version": "marlin"}, "'marlin', expected one of gemm, gemv"),
        (awq.LAYOUT, {"bits": 8, "group_size": 32, "version": "gemv"}, "8 bits in the form gemv, expected 4"),
        (awq.LAYOUT, {"bits": 4}, "no group_size or q_group_size"),
        (awq.LAYOUT, {"bits": 4, "group_size": 32, "modules_to_not_convert": "gate"}, "'gate'"),
    ],
)
def test_unsupported_declarations_are_named(layout: Layout, block: dict[str, object], words: str) -> None:
    with pytest.raises(FormatError, match=words):
        layout.read_config(block)


@pytest.mark.parametrize("empty", [None, {}, {"format": "dense", "targets": []}])
def test_compressed_tensors_accepts_empty_sparsity_config(empty: object) -> None:
    assert compressed_tensors.read_config(compressed({}) | {"sparsity_config": empty})(Q) == Reading(G32)


# ---- the page


def test_the_page_lists_all_formats() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "FORMATS.md").read_text(encoding="utf-8")
    read = {
        *formats.names(), *(layout.name for layout in formats.readable()), *gptq.VERSIONS, *FORMATS,
        "gemm", "gemv", "gemv_fast", "llm-awq",
        compressed_tensors.PACKING, *compressed_tensors.PLAIN, *ct_floats.PACKINGS,
    }  # fmt: skip
    shown = {name for name in read if f"`{name}`" in page or f"`{name.removeprefix('gguf:')}`" in page}
    assert sorted(read - shown) == []


# ---- floats of four bits


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "fp8"])
def test_floats_are_read_back(name: str) -> None:
    scheme = WeightScheme.of_floats(name)
    draw = torch.Generator().manual_seed(0)
    grid = affine_grid.fit_searched(torch.randn(6, 64, generator=draw), scheme, torch.bfloat16)
    q = grid.quantized(torch.randint(0, scheme.levels + 1, (6, 64), dtype=torch.uint8, generator=draw))
    block = compressed_tensors.quantization_config({Q: scheme}, [])
    reading = compressed_tensors.read_config(block)(Q)
    assert reading is not None and reading.decode is not None and reading.scheme == scheme
    tensors = compressed_tensors.pack(q)
    back = compressed_tensors.unpack(tensors, reading)
    assert torch.equal(back.codes, q.codes) and torch.equal(back.scales, q.scales)
    assert torch.equal(reading.decode(tensors), q.dequantize())
    assert set(compressed_tensors.needs(reading)) <= set(tensors)


def test_floats_and_integers_in_one_file_declare_their_formats() -> None:
    block = compressed_tensors.quantization_config({Q: WeightScheme.of_floats("nvfp4"), K: WeightScheme(8, 32)}, [])
    assert block["format"] == "mixed-precision"
    read = compressed_tensors.read_config(block)
    assert [str(reading.scheme) for name in (Q, K) if (reading := read(name))] == ["nvfp4", "int8 g32 symmetric"]


@pytest.mark.parametrize("layout", [awq.LAYOUT, gptq.LAYOUT, mlx.LAYOUT], ids=lambda layout: layout.name)
def test_formats_of_integers_refuse_floats(layout: Layout) -> None:
    refusal = layout.refusal(WeightScheme.of_floats("nvfp4"), 64, 64)
    assert refusal == f"{layout.name} holds integers, not nvfp4; compressed-tensors holds both"


def test_scales_that_are_not_legal_are_not_written() -> None:
    grid = affine_grid.fit_minmax(torch.randn(2, 32), WeightScheme.of_floats("nvfp4"), torch.bfloat16)
    q = grid.quantized(grid.encode(torch.randn(2, 32)))
    with pytest.raises(FormatError, match="not one that nvfp4 has"):
        compressed_tensors.pack(dataclasses.replace(q, scales=q.scales * 1.01))
    assert q.global_scale is not None
    shared = q.global_scale * torch.tensor([[1.0], [2.0]])
    with pytest.raises(FormatError, match="different global scales"):
        compressed_tensors.pack(dataclasses.replace(q, global_scale=shared))
