"""The rules of engines: a violation of each rule, and a model that all engines load."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from llmq.numerics.scheme import InputScheme, WeightScheme
from llmq.verification.engines import Linear, Subject, checkpoint_facts, judge, verdicts
from llmq.verification.engines.conditions import is_float16
from llmq.verification.engines.rules import ENGINES, RULES

G128, G32, ASYMMETRIC = WeightScheme(4, 128), WeightScheme(4, 32), WeightScheme(4, 128, symmetric=False)
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 1024, "num_attention_heads": 8,
    "num_key_value_heads": 4, "hidden_act": "silu",
}  # fmt: skip
GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
AWQ: dict[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
CT: dict[str, Any] = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 4}}}}
SHAPES = {
    "self_attn.q_proj": (1024, 1024), "self_attn.k_proj": (512, 1024), "self_attn.v_proj": (512, 1024),
    "self_attn.o_proj": (1024, 1024), "mlp.gate_proj": (4096, 1024), "mlp.up_proj": (4096, 1024),
    "mlp.down_proj": (1024, 4096),
}  # fmt: skip


def model(settings: dict[str, Any], scheme: WeightScheme | None = G128, **changes: Any) -> Subject:
    """A block of a Llama; `changes` are schemes by the last name of a layer, or fields of the subject."""
    linears = [
        Linear(f"model.layers.0.{name}", N, K, changes.pop(name.rpartition(".")[2], scheme))
        for name, (N, K) in SHAPES.items()
    ]
    linears.append(Linear("lm_head", 32_000, 1024, changes.pop("lm_head", None)))
    fields = {"config": CONFIG, "linears": tuple(linears), **changes}
    return Subject(settings["quant_method"], settings=settings, **fields)


def violations(subject: Subject, engine: str, rule: str) -> tuple[str, ...]:
    """The violations of a rule, for an engine."""
    assert rule in {known.name for known in RULES} | {"tensor parallelism", "tiles of each part"}
    texts = [finding.found for finding in judge(subject) if finding.engine == engine and finding.rule == rule]
    return texts[0] if texts else ()


def serves(subject: Subject) -> dict[str, tuple[int, ...]]:
    """Engine -> numbers of GPUs."""
    return {verdict.engine: verdict.gpus for verdict in verdicts(judge(subject))}


def loads(subject: Subject) -> dict[str, bool | None]:
    """Engine -> whether it loads the model; None if unknown."""
    return {verdict.engine: verdict.loads for verdict in verdicts(judge(subject))}


@pytest.mark.parametrize("settings", [GPTQ, AWQ, CT], ids=lambda settings: settings["quant_method"])
def test_plain_model_loads_in_all_engines_with_its_format(settings: dict[str, Any]) -> None:
    expected = {"vLLM": (1, 2, 4, 8), "SGLang": (1, 2, 4, 8), "transformers": (1,), "llama.cpp": ()}
    in_mlx = (1,) if settings is AWQ else ()
    assert serves(model(settings)) == {**expected, "MLX": in_mlx}
    outcomes = {finding.outcome for finding in judge(model(settings)) if finding.engine in ("vLLM", "SGLang")}
    assert outcomes == set()


def test_a_gguf_file_next_to_an_onnx_graph_is_a_gguf_file(tmp_path: Path) -> None:
    for name in ("model.onnx", "model.gguf"):
        (tmp_path / name).touch()
    (tmp_path / "config.json").write_text("{}")
    assert checkpoint_facts.read(tmp_path / "model.gguf").method == "gguf"
    assert checkpoint_facts.read(tmp_path).method == checkpoint_facts.ONNX


def test_gguf_file_loads_in_llama_cpp() -> None:
    gguf = Subject("gguf", CONFIG, {}, ())
    assert serves(gguf)["llama.cpp"] == (1,)
    assert serves(gguf)["vLLM"] == () and serves(gguf)["SGLang"] == (1,)


def test_float_model_loads_except_in_llama_cpp() -> None:
    plain = Subject(None, CONFIG, {}, ())
    everywhere = {"vLLM": (1, 2, 4, 8), "SGLang": (1, 2, 4, 8), "transformers": (1,), "MLX": (1,)}
    assert serves(plain) == {**everywhere, "llama.cpp": ()}


def test_every_rule_has_a_source_and_known_engines() -> None:
    assert all(rule.source and rule.asks and set(rule.engines) <= set(ENGINES) for rule in RULES)


# ---- gptq


@pytest.mark.parametrize("key", ["bits", "group_size", "desc_act", "sym"])
def test_gptq_needs_all_keys(key: str) -> None:
    cut = {name: value for name, value in GPTQ.items() if name != key}
    assert violations(model(cut), "vLLM", "gptq keys") == (f"quantization_config has no {key}",)
    assert serves(model(cut))["SGLang"] == ()


@pytest.mark.parametrize(
    "scheme", [ASYMMETRIC, WeightScheme(8, 128, symmetric=False), WeightScheme(2, 128), WeightScheme(3, 128)], ids=str
)
def test_vllm_refuses_some_gptq_grids(scheme: WeightScheme) -> None:
    assert "only 4 and 8 bits without zero points" in violations(model(GPTQ, scheme), "vLLM", "gptq grids")[0]
    assert serves(model(GPTQ, scheme))["vLLM"] == ()
    assert serves(model(GPTQ, scheme))["SGLang"] != ()  # SGLang has a slower kernel


@pytest.mark.parametrize(("size", "refused"), [(16, True), (32, False), (256, True), ("channel", False)])
def test_vllm_refuses_some_gptq_groups(size: Any, refused: bool) -> None:
    assert bool(violations(model(GPTQ, WeightScheme(4, size)), "vLLM", "gptq groups")) == refused


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        ({"desc_act": True}, True),
        ({"desc_act": True, "group_size": -1}, False),
        ({"dynamic": {"+:.*down.*": {"desc_act": True}}}, True),
        ({"dynamic": {"-:.*down.*": {}}}, False),
    ],
)
def test_vllm_refuses_declared_act_order(change: dict[str, Any], refused: bool) -> None:
    assert bool(violations(model({**GPTQ, **change}), "vLLM", "no desc_act")) == refused


def test_undeclared_group_index_is_wrong() -> None:
    plain = model(GPTQ)
    ordered = dataclasses.replace(
        plain, linears=tuple(dataclasses.replace(linear, ordered=True) for linear in plain.linears)
    )
    assert (
        "7" not in violations(ordered, "vLLM", "no g_idx")[0]
        and "and 6 more" in violations(ordered, "vLLM", "no g_idx")[0]
    )
    assert serves(ordered)["vLLM"] == ()
    assert [finding.outcome for finding in judge(ordered) if finding.rule == "no g_idx"] == ["wrong"]


# ---- awq


def test_awq_needs_all_keys() -> None:
    cut = {"quant_method": "awq", "w_bit": 4, "q_group_size": 128}
    assert violations(model(cut), "vLLM", "awq keys") == ("quantization_config has no zero_point",)
    assert len(violations(model(cut), "transformers", "awq keys of AutoAWQ")) == 2


def test_awq_exception_must_not_match_a_packed_layer() -> None:
    hit = model({**AWQ, "modules_to_not_convert": ["lm_head", "mlp.g"]})
    assert violations(hit, "vLLM", "awq names") == (
        "'mlp.g' is part of the name of model.layers.0.mlp.gate_proj, which is packed",
    )


def test_transformers_ignores_a_packed_awq_head() -> None:
    assert violations(model(AWQ, lm_head=G128), "transformers", "awq head")
    assert not violations(model(AWQ), "transformers", "awq head")


# ---- compressed-tensors


def test_vllm_refuses_actorder_of_compressed_tensors() -> None:
    groups = {"group_0": {"weights": {"num_bits": 4, "actorder": "group"}}}
    assert violations(model({**CT, "config_groups": groups}), "vLLM", "no actorder")
    groups = {"group_0": {"weights": {"num_bits": 4, "actorder": "static"}}}
    assert not violations(model({**CT, "config_groups": groups}), "vLLM", "no actorder")


def test_sglang_refuses_some_bits_of_compressed_tensors() -> None:
    assert serves(model(CT, WeightScheme(3, 128)))["SGLang"] == ()
    assert serves(model(CT, WeightScheme(3, 128)))["vLLM"] != ()
    assert serves(model(CT, WeightScheme(3, 128, symmetric=False)))["vLLM"] != (), "vLLM 0.32 has them"


def test_transformers_restricts_zero_points() -> None:
    assert violations(model(CT, ASYMMETRIC), "transformers", "zero points in packed mode")
    two = {**CT, "config_groups": {**CT["config_groups"], "group_1": {"weights": {"num_bits": 8}}}}
    assert serves(model(two, ASYMMETRIC))["transformers"] == ()
    assert serves(model(two))["transformers"] == (1,)


@pytest.mark.parametrize(("size", "served"), [(16, False), (32, True), (256, False), (1024, False), ("channel", True)])
def test_engines_refuse_some_groups_of_compressed_tensors(size: Any, served: bool) -> None:
    assert loads(model(CT, WeightScheme(4, size)))["vLLM"] is (True if served else None), "Humming was not run"
    assert bool(serves(model(CT, WeightScheme(4, size)))["SGLang"]) == served
    for engine in ("vLLM", "SGLang"):
        assert bool(violations(model(CT, WeightScheme(4, size)), engine, "compressed-tensors groups")) != served


def test_vllm_runs_odd_groups_in_float16_slower() -> None:
    half = {**CONFIG, "dtype": "float16"}
    inside = {"dtype": "float16", "text_config": CONFIG}
    assert not is_float16(model(CT)) and all(is_float16(model(CT, config=config)) for config in (half, inside))
    assert violations(model(CT, WeightScheme(4, 16), config=half), "vLLM", "compressed-tensors fast kernel")
    assert loads(model(CT, WeightScheme(4, 16), config=half))["vLLM"] is True
    assert loads(model(CT, WeightScheme(4, 16, symmetric=False), config=half))["vLLM"] is None


def test_odd_groups_of_experts_are_unknown() -> None:
    experts = tuple(
        Linear(f"x.mlp.experts.0.{name}", 1024, 1024, WeightScheme(4, 16)) for name in ("up_proj", "down_proj")
    )
    assert loads(model(CT, linears=experts)) == {
        "vLLM": None, "SGLang": False, "transformers": True, "llama.cpp": False, "MLX": False
    }  # fmt: skip


# ---- formats that llmq does not write


def test_format_without_rules_is_unknown() -> None:
    foreign = model({"quant_method": "hqq"})
    assert loads(foreign) == {"vLLM": None, "SGLang": None, "transformers": True, "llama.cpp": False, "MLX": None}
    assert serves(foreign)["vLLM"] == ()


@pytest.mark.parametrize(
    ("packing", "scheme", "expected"),
    [
        ("auto_round:auto_gptq", G128, True),
        ("auto_round:auto_gptq", ASYMMETRIC, False),
        ("auto_round:auto_awq", ASYMMETRIC, True),
        ("auto_round:auto_awq", WeightScheme(8, 128), False),
        ("auto_round:llm_compressor", G128, None),
        ("auto_round", G128, None),
    ],
)
def test_auto_round_is_checked_by_its_tensors(packing: str, scheme: WeightScheme, expected: bool | None) -> None:
    settings = {"quant_method": "auto-round", "bits": 4, "group_size": 128, "packing_format": packing}
    assert loads(model(settings, scheme))["vLLM"] is expected


@pytest.mark.parametrize("method", ["gptq_marlin", "auto-round", "mxfp4"])
def test_llama_cpp_reads_only_gguf(method: str) -> None:
    assert loads(model({**GPTQ, "quant_method": method}))["llama.cpp"] is False


# ---- remedies


def remedy(subject: Subject, rule: str) -> str:
    return next(finding.remedy for finding in judge(subject) if finding.rule == rule)


def in_an_order(subject: Subject) -> Subject:
    return dataclasses.replace(
        subject, linears=tuple(dataclasses.replace(linear, ordered=linear.packed) for linear in subject.linears)
    )


def test_gguf_is_suggested_as_lossless_only_if_it_is() -> None:
    keeps = "llmq convert PATH OUT --to gguf is lossless"
    assert remedy(model(GPTQ), "gptq in llama.cpp") == keeps
    for other in (in_an_order(model(GPTQ)), model(GPTQ, WeightScheme(8, 128, symmetric=False))):
        assert "--to gguf --allow-requantize" in remedy(other, "gptq in llama.cpp")
    strange = model(GPTQ, config={**CONFIG, "model_type": "falcon"})
    assert "llmq writes no .gguf file of this architecture" in remedy(strange, "gptq in llama.cpp")


def test_another_format_is_suggested_only_if_it_has_the_grid() -> None:
    assert remedy(model(GPTQ, ASYMMETRIC), "gptq grids") == "llmq convert PATH OUT --to compressed-tensors, or --to awq"
    several = model(GPTQ, ASYMMETRIC, v_proj=WeightScheme(4, 32, symmetric=False))
    assert remedy(several, "gptq grids") == "llmq convert PATH OUT --to compressed-tensors"
    narrow = remedy(model(GPTQ, WeightScheme(4, 16, symmetric=False)), "gptq grids")
    assert "convert" not in narrow and "in groups of 32" in narrow
    assert "--allow-requantize" in remedy(in_an_order(model(GPTQ, ASYMMETRIC)), "gptq grids")
    assert remedy(model(GPTQ, WeightScheme(3, 128, symmetric=False)), "gptq grids").endswith("with --symmetric")


def test_one_gpu_is_singular() -> None:
    odd = dataclasses.replace(model(GPTQ), linears=(Linear("x.down_proj", 72, 128, G32),))
    texts = [finding.text for finding in judge(odd) if finding.rule == "tiles of each part"]
    assert texts[0].startswith("on 1 GPU, refuses")


# ---- any format


def test_fused_layers_need_one_grid() -> None:
    texts = violations(model(CT, v_proj=G32), "vLLM", "one scheme for fused layers")
    assert texts == (
        "model.layers.0.self_attn.qkv_proj: its layers have the grids int4 g128 symmetric and int4 g32 symmetric",
    )
    assert not violations(model(CT, down_proj=G32, o_proj=G32), "vLLM", "one scheme for fused layers")


def test_fused_layers_must_all_be_packed() -> None:
    texts = violations(model(GPTQ, up_proj=None), "SGLang", "one scheme for fused layers")
    assert texts == ("model.layers.0.mlp.gate_up_proj: gate_proj is packed and up_proj is not",)


def test_undeclared_float_layer_is_refused() -> None:
    plain = model(CT)
    router = Linear("model.layers.0.mlp.gate", 8, 1024, None, declared=True)
    embedding = Linear("model.embed_tokens", 8, 1024, None, declared=True)
    texts = violations(
        dataclasses.replace(plain, linears=(*plain.linears, router, embedding)), "vLLM", "float layers are listed"
    )
    assert texts == ("model.layers.0.mlp.gate: it is float, but config.json does not list it",)


def test_experts_of_a_layer_need_one_grid() -> None:
    experts = [
        Linear(f"model.layers.0.mlp.experts.{e}.{name}", 1024, 1024, G32 if (e, name) == (1, "down_proj") else G128)
        for e in range(2)
        for name in ("gate_proj", "up_proj", "down_proj")
    ]
    mixed = Subject("gptq", CONFIG, GPTQ, tuple(experts))
    assert [text.partition(":")[0] for text in violations(mixed, "vLLM", "one scheme for fused layers")] == [
        "model.layers.0.mlp.experts"
    ]
    odd = dataclasses.replace(mixed, config={**CONFIG, "hidden_size": 1000})
    assert violations(odd, "vLLM", "tiles of experts") and not violations(mixed, "vLLM", "tiles of experts")


def test_separate_experts_of_a_stacked_model_are_unknown() -> None:
    experts = tuple(Linear(f"model.layers.0.mlp.experts.{e}.down_proj", 1024, 1024, G128) for e in range(2))
    stacked = model(CT, linears=experts, config={**CONFIG, "model_type": "gpt_oss"})
    assert loads(stacked)["vLLM"] is None and serves(stacked)["vLLM"] == ()
    assert loads(model(CT, linears=experts, config={**CONFIG, "model_type": "mixtral"}))["vLLM"] is True


def test_tied_packed_head_is_wrong() -> None:
    tied = model(CT, lm_head=G128, config={**CONFIG, "tie_word_embeddings": True})
    assert [finding.outcome for finding in judge(tied) if finding.rule == "tied head"] == ["wrong"] * 3
    assert not violations(model(CT, lm_head=G128), "vLLM", "tied head")


@pytest.mark.parametrize("key", ["architectures", "model_type"])
def test_config_needs_architecture_and_model_type(key: str) -> None:
    assert violations(model(CT, config={**CONFIG, key: None}), "vLLM", "architectures") == (
        f"config.json has no {key}",
    )


def test_files_of_transformers_5_give_only_notes() -> None:
    new = model(CT, config={**CONFIG, "dtype": "bfloat16"}, tokenizer={"tokenizer_class": "TokenizersBackend"})
    assert violations(new, "vLLM", "tokenizer class") and violations(new, "vLLM", "configuration of transformers 4")
    assert serves(new)["vLLM"] == (1, 2, 4, 8)


def test_stray_shards_are_wrong() -> None:
    strays = ("model-00002-of-00002.safetensors",)
    assert "model-00002" in violations(model(CT, strays=strays), "SGLang", "no stray shards")[0]


def test_shapes_must_fit_the_tiles() -> None:
    """vLLM pads them; the fast kernel of SGLang refuses, and its plain kernel is for other grids."""
    odd = dataclasses.replace(model(GPTQ), linears=(Linear("model.layers.0.mlp.down_proj", 72, 96, G32),))
    assert [(finding.engine, finding.outcome) for finding in judge(odd) if finding.rule == "tiles"] == [
        ("vLLM", "slower")
    ]
    assert "72 x 96 on each GPU" in violations(odd, "SGLang", "tiles of each part")[0]
    assert serves(odd)["SGLang"] == ()
    assert serves(dataclasses.replace(odd, linears=(Linear("x.down_proj", 72, 96, ASYMMETRIC),)))["SGLang"] != ()


def test_tiles_are_checked_for_fused_layers() -> None:
    """q, k and v of 64, 32 and 32 rows are 128 rows together; 64 each on two GPUs, 32 on four."""
    rows = {"q_proj": 64, "k_proj": 32, "v_proj": 32}
    small = tuple(Linear(f"model.layers.0.self_attn.{name}", N, 256, G128) for name, N in rows.items())
    assert serves(dataclasses.replace(model(CT), linears=small))["SGLang"] == (1, 2)


@pytest.mark.parametrize("changes", [{"scheme": WeightScheme.of_floats("nvfp4")}, {"inputs": InputScheme("int8")}])
def test_rules_of_packed_integers_are_not_for_other_layers(changes: dict[str, Any]) -> None:
    """72 rows and 96 columns do not fit the tiles of Marlin; 36 rows do not fill words of zero points."""
    odd = Linear("model.layers.0.mlp.up_proj", 72, 96, WeightScheme(8, "channel"))
    other = dataclasses.replace(model(CT), linears=(dataclasses.replace(odd, **changes),))
    rules = {finding.rule for finding in judge(other)}
    assert not rules & {"tiles", "tiles of each part", "bits on a CPU"}
    floats = changes.keys() == {"scheme"}
    assert not floats or "zero points" not in " ".join(text for finding in judge(other) for text in finding.found)


# ---- several GPUs


def test_groups_must_not_be_split() -> None:
    wide = dataclasses.replace(model(GPTQ), linears=(Linear("model.layers.0.mlp.down_proj", 1024, 1408, G128),))
    assert serves(wide)["vLLM"] == (1,)  # 11 groups
    assert "704 inputs per GPU, in groups of 128" in violations(wide, "vLLM", "tensor parallelism")[0]
    narrow = dataclasses.replace(wide, linears=(Linear("model.layers.0.mlp.down_proj", 1024, 1408, G32),))
    assert serves(narrow)["vLLM"] == (1, 2, 4)  # 44 groups


def test_one_scale_per_row_can_be_split_anywhere() -> None:
    row = dataclasses.replace(model(GPTQ), linears=(Linear("x.down_proj", 1024, 1408, WeightScheme(4, "channel")),))
    assert serves(row)["vLLM"] == (1, 2, 4, 8)


@pytest.mark.parametrize(
    ("heads", "key_heads", "expected"),
    [(8, 8, (1, 2, 4, 8)), (8, 2, (1, 2, 4, 8)), (6, 3, (1,)), (12, 12, (1, 2, 4)), (14, 2, (1, 2))],
)
def test_heads_must_be_divisible(heads: int, key_heads: int, expected: tuple[int, ...]) -> None:
    config = {**CONFIG, "num_attention_heads": heads, "num_key_value_heads": key_heads}
    subject = dataclasses.replace(model(GPTQ), config=config, linears=())
    assert serves(subject)["SGLang"] == expected


def test_fewer_key_heads_than_gpus_are_not_split() -> None:
    config = {**CONFIG, "num_key_value_heads": 1}
    small = (Linear("model.layers.0.self_attn.k_proj", 12, 1024, G128),)
    assert serves(dataclasses.replace(model(GPTQ), config=config, linears=small))["vLLM"] == (1, 2, 4, 8)


def test_replicated_layers_are_not_split() -> None:
    whole = (Linear("model.layers.0.self_attn.q_a_proj", 12, 1028, G128),)
    assert serves(dataclasses.replace(model(GPTQ), linears=whole))["vLLM"] == (1, 2, 4, 8)


def test_nested_language_model_config_is_read() -> None:
    inner = {"architectures": ["X"], "model_type": "x", "text_config": {"num_attention_heads": 6}}
    assert serves(model(GPTQ, config=inner, linears=()))["vLLM"] == (1, 2)


def test_mlx_reads_its_own_format() -> None:
    own = model({"quant_method": "mlx", "bits": 4, "group_size": 128})
    assert serves(own)["MLX"] == serves(own)["transformers"] == (1,) and loads(own)["vLLM"] is False
    wide = violations(model(AWQ, WeightScheme(4, 256)), "MLX", "awq in MLX")
    assert len(wide) == len(SHAPES) and "groups of 256" in wide[0]


def test_floats_of_four_bits_are_for_vllm_and_transformers() -> None:
    for name, noted in (("nvfp4", False), ("mxfp4", True)):
        subject = model(CT, WeightScheme.of_floats(name))
        assert loads(subject) == {"vLLM": True, "SGLang": None, "transformers": True, "llama.cpp": False, "MLX": False}
        assert bool(violations(subject, "vLLM", "inputs of mxfp4")) == noted
        assert not violations(subject, "vLLM", "compressed-tensors groups")


def with_inputs(scheme: WeightScheme, inputs: InputScheme, *floats: str) -> Subject:
    """A compressed-tensors model with quantized inputs, except those of the layers called `floats`."""
    plain = model(CT, scheme)
    linears = (
        dataclasses.replace(linear, inputs=inputs if linear.packed and linear.last not in floats else None)
        for linear in plain.linears
    )
    return dataclasses.replace(plain, linears=tuple(linears))


DYNAMIC, STATIC = InputScheme("int8", "dynamic"), InputScheme("int8", "static")


def test_engines_load_eight_bit_weights_with_int8_inputs() -> None:
    subject = with_inputs(WeightScheme(8, "channel"), DYNAMIC, "down_proj")
    assert loads(subject) == {
        "vLLM": True, "SGLang": True, "transformers": True, "llama.cpp": False, "MLX": False,
    }  # fmt: skip
    assert "inputs and weights are in int8" in violations(subject, "vLLM", "8-bit products")[0]
    assert violations(subject, "transformers", "inputs are rounded in float")
    assert not violations(model(CT), "transformers", "inputs are rounded in float")


def test_groups_of_eight_bit_weights_with_int8_inputs_are_refused() -> None:
    subject = with_inputs(WeightScheme(8, 128), DYNAMIC)
    assert violations(subject, "vLLM", "groups with int8 inputs") and not loads(subject)["vLLM"]


def test_fewer_bits_with_int8_inputs_are_unknown_or_refused() -> None:
    assert loads(with_inputs(G128, DYNAMIC))["vLLM"] is None
    assert loads(with_inputs(G128, STATIC))["vLLM"] is False


def test_fp8_inputs_need_weights_in_fp8_or_in_groups_of_128() -> None:
    floats = with_inputs(WeightScheme.of_floats("fp8"), InputScheme("fp8", "dynamic"))
    assert loads(floats)["vLLM"] and loads(floats)["SGLang"]
    assert "inputs and weights are in fp8" in violations(floats, "vLLM", "products of fp8")[0]
    assert not violations(floats, "vLLM", "floats of eight bits")  # they are for float inputs
    assert loads(with_inputs(G128, InputScheme("fp8", "dynamic")))["vLLM"]
    assert loads(with_inputs(WeightScheme(4, 64), InputScheme("fp8", "dynamic")))["vLLM"] is False


def test_inputs_in_nvfp4_are_for_gpus_of_vllm() -> None:
    subject = with_inputs(WeightScheme.of_floats("nvfp4"), InputScheme("nvfp4", "local"))
    assert loads(subject)["vLLM"] and loads(subject)["SGLang"] is None
    assert "inputs are in nvfp4" in violations(subject, "vLLM", "products of nvfp4")[0]


def test_bytes_of_fewer_bits_are_for_cpus() -> None:
    block = {"format": "int-quantized", "weights": {}, "input_activations": {"num_bits": 8}}
    subject = with_inputs(G128, DYNAMIC)
    in_bytes = dataclasses.replace(subject, settings={**subject.settings, "config_groups": {"group_0": block}})
    assert violations(in_bytes, "vLLM", "bytes with int8 inputs") and loads(in_bytes)["vLLM"]
    assert not violations(subject, "vLLM", "bytes with int8 inputs")


def test_layers_that_engines_fuse_need_the_same_inputs() -> None:
    subject = with_inputs(WeightScheme(8, "channel"), DYNAMIC, "q_proj")
    assert "inputs int8" in violations(subject, "vLLM", "one scheme for fused layers")[0]


def test_the_remedy_for_llama_cpp_is_not_a_conversion() -> None:
    [finding] = [f for f in judge(with_inputs(G128, DYNAMIC)) if f.rule == "compressed-tensors in llama.cpp"]
    assert "quantize the original model again with --format gguf" in finding.remedy
