"""llama.cpp runs the .gguf files that llmq writes, and predicts the same tokens.

llama.cpp rounds the inputs of quantized weights to 8 bits, in groups of 32, and those of F16 weights to 16 bits.  So
files with quantized weights are compared with a large tolerance.  A file in F16 is compared twice: as it is, and with
its values in F32, keys and values in F32 and no flash attention.  Then llama.cpp rounds nothing, and the difference
shows whether everything except the blocks (names, the order of rows, metadata, rotation) is right.
"""

import importlib.util
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.activations import ACT2FN

import llmq
from llmq.errors import ConfigError, FormatError
from llmq.gguf import export
from llmq.gguf.reader import Weights
from llmq.runtime.llama_cpp_model import LlamaCppModel
from llmq.runtime.load import load_tokenizer
from tests.llama_cpp import LlamaCpp, in_float32

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(
        importlib.util.find_spec("xllamacpp") is None,
        reason="needs the package xllamacpp, which scripts/test.sh installs in a separate environment",
    ),
]
BUNDLED = Path(__file__).resolve().parents[2] / "eval" / "models"
PROGRAM = "def fibonacci(n):\n    if n < 2:\n        return n\n"
ROUNDED = 0.05  # nats, mean over the vocabulary; the effect of rounding activations to 8 bits
HALVES = 0.01  # nats, the maximum over tokens, for weights in F16
FLOATS = 1e-4  # likewise in float32
TABLE = 3e-3  # likewise for models with GELU, where one number that is rounded up on one side counts
AMPLIFIED = frozenset(
    {
        "gemma2-largest", "gemma4", "gemma4-experts", "gemma4-keys-are-values", "nemotron", "qwen35", "qwen35moe",
        "qwen3next", "yarn-attention-factor",
    }
)  # fmt: skip
"""Random models whose predictions change by more than HALVES when transformers computes in float16, and so in
llama.cpp: many layers, attention without a scale or with a large one, recurrent states.  The limit is 1.5 times that
change.
"""
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "vocab_size": 2048,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
HEADS = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.1] * 8, "long_factor": [1.5] * 8}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
LOCAL = {"rope_type": "default", "rope_theta": 2e3}
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 32}
GEMMA4 = {"head_dim": 16, "global_head_dim": 32, "sliding_window": 16, "num_kv_shared_layers": 0}
SHARED = {"shared_expert_intermediate_size": 64}
DELTA = {
    "num_hidden_layers": 4, "head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}
SCALES = {
    "embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.1
}  # fmt: skip
LATENT = {
    "q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "n_routed_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 32, "first_k_dense_replace": 1,
    "topk_group": 1, "num_key_value_heads": 4, "n_shared_experts": 1,
}  # fmt: skip
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"attention_bias": True}),
    "llama3": ("Llama", {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 64}}),
    "mistral": ("Mistral", {}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "phi3": ("Phi3", {"original_max_position_embeddings": 512}),
    "phi3-long": (
        "Phi3", {"original_max_position_embeddings": 512, "max_position_embeddings": 2048, "rope_parameters": LONG}
    ),
    "gemma": ("Gemma", {"head_dim": 16}),
    "gemma2": ("Gemma2", HEADS),
    "gemma3": ("Gemma3Text", {**HEADS, "num_hidden_layers": 7}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 4}),  # all experts: no ties
    "qwen2moe": ("Qwen2Moe", {**MIXTURE, "shared_expert_intermediate_size": 64, "norm_topk_prob": False}),
    "qwen3moe": ("Qwen3Moe", {**MIXTURE, "head_dim": 16, "norm_topk_prob": True}),
    "qwen3moe-top-2": ("Qwen3Moe", {**MIXTURE, "head_dim": 16, "norm_topk_prob": True, "num_experts_per_tok": 2}),
    "llama-mlp-bias": ("Llama", {"mlp_bias": True}),
    "llama-longrope": (
        "Llama",
        {"max_position_embeddings": 2048, "rope_parameters": {**LONG, "original_max_position_embeddings": 512}},
    ),
    "yarn": ("Llama", {"rope_parameters": YARN}),
    "yarn-attention-factor": ("Qwen3", {"head_dim": 16, "rope_parameters": {**YARN, "attention_factor": 1.5}}),
    "yarn-mscale": ("Llama", {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3}}),
    "phi3-partial": (
        "Phi3",
        {
            "original_max_position_embeddings": 512,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        },
    ),
    "gemma2-largest": ("Gemma2", {**HEADS, "num_hidden_layers": 46, "head_dim": 32}),
    "gemma3-linear": (
        "Gemma3Text",
        {
            **HEADS,
            "num_hidden_layers": 6,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 5e5, "factor": 8.0},
                "sliding_attention": LOCAL,
            },
        },
    ),
    "glm4": ("Glm4", {"head_dim": 32, "attention_bias": True}),
    "granite": ("Granite", SCALES),
    "olmo2": ("Olmo2", {}),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 4}),
    "cohere": ("Cohere", {"logit_scale": 0.5}),
    "starcoder2": ("Starcoder2", {}),
    "gpt2": ("GPT2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}),
    "gptneox": ("GPTNeoX", {}),
    "gptneox-serial": ("GPTNeoX", {"use_parallel_residual": False}),
    "phi2": ("Phi", {}),
    "stablelm": ("StableLm", {"use_qkv_bias": True, "use_parallel_residual": True}),
    "qwen35": ("Qwen3_5Text", {**DELTA, "rope_parameters": {**PARTIAL, "mrope_section": [2, 1, 1]}}),
    "qwen35moe": (
        "Qwen3_5MoeText",
        {**DELTA, **MIXTURE, **SHARED, "rope_parameters": {**PARTIAL, "mrope_section": [2, 1, 1]}},
    ),
    "qwen3next": ("Qwen3Next", {**DELTA, **MIXTURE, **SHARED, "norm_topk_prob": True, "rope_parameters": PARTIAL}),
    "gpt-oss": (
        "GptOss",
        {
            "num_local_experts": 4, "num_experts_per_tok": 4, "head_dim": 16, "sliding_window": 16,
            "rope_parameters": YARN,
        },
    ),
    "glm4moe": (
        "Glm4Moe",
        {
            "n_routed_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 32, "head_dim": 16,
            "use_qk_norm": True, "routed_scaling_factor": 1.5,
        },
    ),
    "gemma4": (
        "Gemma4Text",
        {
            **GEMMA4, "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
            "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 2048, "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
        },
    ),
    "gemma4-no-softcap": ("Gemma4Text", {**GEMMA4, "hidden_size_per_layer_input": 0}),
    "gemma4-keys-are-values": (
        "Gemma4Text",
        {
            **GEMMA4, "layer_types": ["sliding_attention", "full_attention"], "hidden_size_per_layer_input": 0,
            "attention_k_eq_v": True, "num_global_key_value_heads": 1, "final_logit_softcapping": 30.0,
        },
    ),
    "gemma4-experts": (
        "Gemma4Text",
        {
            **GEMMA4, "layer_types": ["sliding_attention", "full_attention"], "hidden_size_per_layer_input": 0,
            "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32,
        },
    ),
    "lfm2": ("Lfm2", {"layer_types": ["conv", "full_attention"]}),
    "olmo3": ("Olmo3", {"num_hidden_layers": 4, "sliding_window": 16}),
    "ernie": ("Ernie4_5", {}),
    "seed-oss": ("SeedOss", {"head_dim": 16, "attention_bias": True}),
    "arcee": ("Arcee", {"rope_parameters": YARN}),
    "exaone4": (
        "Exaone4", {"sliding_window": None, "sliding_window_pattern": 0, "layer_types": ["full_attention"] * 2}
    ),
    "nemotron": ("Nemotron", {"head_dim": 16}),
    "hunyuan": ("HunYuanDenseV1", {"head_dim": 16}),
    "olmoe": ("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4}),
    "lfm2moe": (
        "Lfm2Moe", {**MIXTURE, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1}
    ),
    "granitemoe": ("GraniteMoe", {**SCALES, "num_local_experts": 4, "num_experts_per_tok": 4}),
    "deepseek2": ("DeepseekV2", {**LATENT, "topk_method": "greedy", "n_group": 1}),
    "deepseek2-lite": (
        "DeepseekV2",
        {
            **LATENT, "topk_method": "greedy", "n_group": 1, "q_lora_rank": None, "num_hidden_layers": 27,
            "rope_parameters": {**YARN, "factor": 40.0, "mscale": 0.707, "mscale_all_dim": 0.707},
        },
    ),
    "deepseek3": (
        "DeepseekV3",
        {
            **LATENT, "n_group": 2, "n_routed_experts": 8,
            "rope_parameters": {**YARN, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
    "cohere2": ("Cohere2", {"num_hidden_layers": 4, "sliding_window": 16, "logit_scale": 0.5}),
}  # fmt: skip


class TabulatedGelu(torch.nn.Module):
    """GELU as llama.cpp computes it on a CPU: between -10 and 10 from a table of numbers in float16."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        table = torch.nn.functional.gelu(inputs.half().float(), approximate="tanh").half().to(inputs.dtype)
        return torch.where(inputs.abs() < 10, table, inputs.clamp(min=0))


@contextmanager
def opened(file: Path, *, exact: bool = False) -> Iterator[LlamaCpp]:
    model = LlamaCpp(file, exact=exact)
    try:
        yield model
    finally:
        model.close()


def log_probabilities(model: Any, tokens: Sequence[int]) -> np.ndarray:
    """(T, V) float64, as transformers computes them."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits
    return logits[0].double().log_softmax(-1).numpy()


def greedy(model: Any, tokens: Sequence[int], count: int) -> list[int]:
    sequence = list(tokens)
    for _ in range(count):
        sequence.append(int(log_probabilities(model, sequence)[-1].argmax()))
    return sequence[len(tokens) :]


@pytest.mark.parametrize("name", CONFIGS)
def test_llama_cpp_predictions_match_transformers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for activation in ("gelu", "gelu_new", "gelu_pytorch_tanh"):
        monkeypatch.setitem(ACT2FN, activation, TabulatedGelu)
    model = random_model(name)
    model.save_pretrained(tmp_path / "model")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED / "tiny-python-llama" / file, tmp_path / "model")
    made = export.export(tmp_path / "model", tmp_path / "made.gguf")
    in_float32(made.file, tmp_path / "float32.gguf")
    tokens = np.random.default_rng(0).integers(1, 2048, 40).tolist()  # more than a window
    expected = log_probabilities(model, tokens)
    with opened(tmp_path / "float32.gguf", exact=True) as llama:
        difference = np.abs(llama.log_probabilities(tokens) - expected)
    gelu = any(isinstance(module, TabulatedGelu) for module in model.modules())
    assert difference.max() < (TABLE if gelu else FLOATS)
    with opened(made.file) as llama:
        difference = np.abs(llama.log_probabilities(tokens) - expected)
    limit = HALVES
    if name in AMPLIFIED:
        limit = 1.5 * np.abs(log_probabilities(model.half(), tokens) - expected).max()
    assert difference.max() < limit and difference.mean() < HALVES


def random_model(name: str) -> Any:
    """A model with random weights, norms, biases and buffers, which are numbers in float16."""
    kind, changes = CONFIGS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for tensor in {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}.values():  # tied ones once
        tensor += torch.randn_like(tensor) * 0.1
        tensor.copy_(tensor.half())
    return model


@pytest.mark.parametrize(
    ("name", "symmetric", "group_size", "kind"),
    [
        ("tiny-python-llama", True, 32, "Q4_0"),
        ("tiny-python-llama", False, 256, "Q4_K"),
        ("tiny-python-qwen3", False, 32, "Q5_0"),
        ("tiny-python-qwen3", True, 64, "Q4_0"),
    ],
)
def test_quantized_model_generates_the_same_tokens_as_llmq(
    name: str, symmetric: bool, group_size: int, kind: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    llmq.quantize(
        str(BUNDLED / name),
        out,
        method="rtn",
        group_size=group_size,
        symmetric=symmetric,
        device="cpu",
    )
    made = export.export(out, tmp_path / "made.gguf")
    assert made.counts[kind] == len(made.exact) > 0 and not made.rounded
    model, tokenizer = llmq.load(out, device="cpu")
    tokens = tokenizer(PROGRAM)["input_ids"]
    with opened(made.file) as llama:
        assert llama.tokenize(PROGRAM) == tokens
        difference = np.abs(llama.log_probabilities(tokens) - log_probabilities(model, tokens))
        assert llama.greedy(tokens, 50) == greedy(model, tokens, 50)
    assert difference.mean() < ROUNDED


@pytest.mark.parametrize("recipe", ["q2_k", "q3_k_m", "q8_0", "iq4_xs"])
def test_llama_cpp_runs_native_grids(recipe: str, tmp_path: Path) -> None:
    source, out = BUNDLED / "tiny-python-llama", tmp_path / "out"
    llmq.quantize(str(source), out, method="rtn", format=f"gguf:{recipe}", validate=0, device="cpu")
    weights = Weights(out / "out.gguf", source)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(weights.tensor(name))
    tokens = load_tokenizer(source, remote_code=False)(PROGRAM)["input_ids"]
    with opened(out / "out.gguf") as llama:
        difference = np.abs(llama.log_probabilities(tokens) - log_probabilities(model, tokens))
    assert difference.mean() < ROUNDED


def test_all_positions_at_once_are_those_one_by_one(tmp_path: Path) -> None:
    """What `llmq eval --engine llama.cpp` measures, with a second, longer sequence in the same context."""
    made = export.export(BUNDLED / "tiny-python-llama", tmp_path / "made.gguf")
    model, draw = LlamaCppModel(made.file), np.random.default_rng(0)
    assert (model.vocabulary, model.max_tokens > 40) == (2048, True)
    with opened(made.file) as llama:
        for length in (12, 40):
            tokens = draw.integers(1, 2048, length)
            logits = torch.from_numpy(model.logits(tokens)).double()
            difference = logits.log_softmax(-1).numpy() - llama.log_probabilities(tokens.tolist())
            assert np.abs(difference).max() < HALVES
    with pytest.raises(FormatError, match="llama.cpp refuses"):
        LlamaCppModel(BUNDLED / "tiny-python-llama" / "config.json")


def test_eval_runs_llama_cpp(tmp_path: Path) -> None:
    source, text = BUNDLED / "tiny-python-llama", tmp_path / "text.txt"
    export.export(source, tmp_path / "made.gguf")
    text.write_text(PROGRAM * 40)
    settings: dict[str, Any] = {"against": source, "text": str(text), "seqlen": 64, "windows": 2}
    measured = llmq.evaluate(tmp_path / "made.gguf", engine="llama.cpp", **settings)
    assert measured.model.kl_mean is not None and measured.model.kl_mean < 1e-4
    assert any("llama.cpp" in note for note in measured.notes)
    with pytest.raises(ConfigError, match=r"is for \.gguf files"):
        llmq.evaluate(source, engine="llama.cpp", **settings)


TEXTS = [
    PROGRAM,
    "Once upon a time, there's 12345 x  y\n\n\n  z \u00e9 \u6f22\u5b57 \U0001f680 I've",
    "  a",
    " b\t\tc",
    "<s>a",
]


@pytest.mark.parametrize(
    "name", ["tiny-python-llama", "../../../shared/models/babyllama-tok361", "../../../shared/models/stories260K"]
)
def test_llama_cpp_tokenizes_like_transformers(name: str, tmp_path: Path) -> None:
    folder = BUNDLED / name
    if not folder.is_dir():
        pytest.skip("needs ../shared (real models), which is not next to this checkout")
    made, tokenizer = export.export(folder, tmp_path / "made.gguf"), load_tokenizer(folder, remote_code=False)
    with opened(made.file) as llama:
        for text in TEXTS:
            assert llama.tokenize(text) == tokenizer(text)["input_ids"], text
