"""Toy configurations of any class that transformers lists as a causal or as an image-text-to-text model.

A configuration starts as the default of its class. Every size in it is replaced by the one of `SIZES`, also in the
configurations of its parts (text, images, sound). Of lists with one entry per layer (kind of attention, dense or
experts, …), the first layer of each kind remains, so a toy model has every kind of layer that the real one has. What
this does not cover is in `OWN`, by model type.
"""

import inspect
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 288  # the tokenizer of tests/builders.py has 259 tokens; those of images are beyond them
WINDOW = 8  # sliding window, in tokens
HEAD = 16  # the size of an attention head
FEWEST, MOST = 2, 4  # layers
COUNTS = {"num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "decoder_layers", "depth"}
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "vocab_size_per_layer_input": VOCABULARY,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "lru_width", "embedding_size", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("embed_dim", "out_hidden_size"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "dff", "intermediate_size_mlp"), 96),
    **dict.fromkeys(COUNTS, FEWEST),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 128),
    **dict.fromkeys(("sliding_window", "attention_window_size", "window_size", "local_window_size"), WINDOW),
    "num_key_value_heads": 2, "head_dim": HEAD, "rotary_dim": 8,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": HEAD, "qk_nope_head_dim": 16, "v_head_dim": 16,
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 64),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "shared_intermediate_size"), 64),
    "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1,
    **dict.fromkeys(("mamba_d_state", "state_size"), 8), "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_ssm": 128,
    **dict.fromkeys(("mamba_n_groups", "n_groups"), 1), "expand": 2,
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank"), 16),
    "linear_num_key_heads": 2, "linear_num_value_heads": 8, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "hidden_size_per_layer_input": 16, "laurel_rank": 16, "num_kv_shared_layers": 0,
    "image_size": 32, "patch_size": 16, "is_decoder": True,
}  # fmt: skip
LATENT = {"num_key_value_heads": 4, "qk_rope_head_dim": HEAD}  # latent attention: no grouped heads, separate sizes
WIDTH = re.compile(r"\w*(size|dim|width|rank|hidden|channels|ffn)")  # other sizes, if they are above LARGE
LARGE, SMALL = 128, 64
TOKEN = re.compile(r"\w*token_(id|ids|index)")
INDICES = re.compile(r"\w*(indices|indexes|idxs)")
NO_PADDING = {"pad_token_id": None}  # transformers sets the embedding of the padding token to zero when loading
PLAIN_ROTATION = {"rope_type": "default", "rope_theta": 1e4}
SECTIONS = {"rope_parameters": {"mrope_section": [2, 3, 3]}}  # of multi-dimensional rotations, where only code has them
WINDOWED_LATENT = {  # of layers with a window; 192 + 64 is head_dim
    "kv_lora_rank": 32, "q_lora_rank": 32, "num_attention_heads": 8, "num_key_value_heads": 8,
    "qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "v_head_dim": 16,
}  # fmt: skip
INDEXER = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8}
OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("glm4v_text", "glm_ocr_text", "hy_v4_vl_text", "paddleocr_vl_text"), SECTIONS),
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text", "qwen2_5_omni_text"), SECTIONS),
    "apertus1p5": {"image_token_offset": 100, "audio_token_offset": 110},
    "apertus1p5_audio_tokenizer": {"codebook_size": 10},
    "apertus1p5_vision_tokenizer": {"codebook_size": 10},
    "bamba": {"attn_layer_indices": [1]},
    "chameleon": {"vocabulary_map": {"<image>": VOCABULARY - 1}},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {**PLAIN_ROTATION, "mrope_section": [2, 3, 3]} for kind in ("full_attention", "sliding_attention")
        }
    },
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "dots3_note_text": {"index_n_heads": 4, "per_layer_config": {"2": WINDOWED_LATENT}},
    "emu3": {"vocabulary_map": {"<image>": VOCABULARY - 1}},
    "ernie4_5_vl_moe_text": {"rope_parameters": {"mrope_section": [3, 3, 2]}},
    "glm4v_moe_text": {"rope_parameters": {"mrope_section": [1, 1, 2]}},
    "glm5_next_text": {"qk_rope_head_dim": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite4_vision": {"deepstack_layer_map": [[0, 0], [1, 1]], "downsample_rate": "1/2"},
    "hunyuan_vl_text": {"rope_parameters": {"mrope_section": [2, 2, 2, 2]}},
    **dict.fromkeys(("inkling2_text", "inkling2_loop_text"), {"unpadded_vocab_size": VOCABULARY - 8}),
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2},
    "lfm2": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"head_dim": HEAD},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "minicpm3": NO_PADDING,
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "molmo2_vision": {"image_size": [32, 32]},
    "nemotron_h": {
        "layers_block_type": ["mamba", "moe", "attention"],
        "mamba_num_heads": 4, "mamba_head_dim": 32, "ssm_state_size": 8, "chunk_size": 8,
    },
    "qwen4_exp_text": {**INDEXER, "indexer_compress_ratio": 4, "ngram_vocab_size_base": 64, "split_ngram_parts": 1},
    "radio": {"video_temporal_patch_size": 2},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"axial_pos_embds_dim": [32, 32], "axial_pos_shape": [8, 16]},
    "stablelm": {"use_qkv_bias": True, "use_parallel_residual": True},
    "xmod": {"default_language": "en_XX"},
    "youtu": NO_PADDING,
    "zamba": {
        "attention_hidden_size": 128, "attention_head_dim": 32,
        "num_hidden_layers": 4, "layer_types": ["hybrid", "mamba", "hybrid", "mamba"],
    },
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A line of transformers' mappings: in which of the two, `causal` or `image`, its model type and its class."""

    mapping: str
    model_type: str
    model_class: str


def entries() -> Iterator[Entry]:
    """All lines of both mappings."""
    for mapping, classes in (
        ("causal", modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        ("image", modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
    ):
        for model_type, model_class in classes.items():
            yield Entry(mapping, model_type, model_class)


def entry(model_type: str) -> Entry:
    """The line of a model type; that of the class that takes images, if there are two."""
    return {line.model_type: line for line in entries()}[model_type]


def toy_config(line: Entry) -> Any:
    """The configuration of a toy model of a class."""
    config = shrunk(CONFIG_MAPPING[line.model_type]())
    config.architectures = [line.model_class]
    return config


def shrunk(default: Any) -> Any:
    """A configuration with the sizes of a toy, made from the default of its class."""
    kind = type(default)
    values = {name: value for name, value in vars(default).items() if name in _fields(kind)}
    own = OWN.get(kind.model_type, {})
    parts = {name: value for name, value in values.items() if isinstance(value, PreTrainedConfig)}
    names = {name: {name} for name in values}
    for alias, name in kind.attribute_map.items():
        names.get(name, set()).add(alias)
    layers = _layers(values, names)
    tokens = iter(range(VOCABULARY - 1, 0, -1))
    changed = {name: shrunk(part) for name, part in parts.items()}
    for name, value in values.items():
        if name not in changed and name not in layers:
            size = next((SIZES[alias] for alias in names[name] if alias in SIZES), None)
            changed[name] = _toy_value(name, value, size, tokens, _admits(kind, name, int))
    if "kv_lora_rank" in values:
        changed |= {name: value for name, value in LATENT.items() if name in values}
        changed = {name: value for name, value in changed.items() if name not in ("head_dim", "qk_head_dim")}
    _fit_rotation(values, changed)
    changed |= {**layers, **{name: _joined(values.get(name), value) for name, value in own.items()}}
    return kind(**{name: value for name, value in changed.items() if value is not _KEPT})


_KEPT = object()  # the field keeps its default


def _joined(default: Any, own: Any) -> Any:
    """A value of `OWN`; of a table such as `rope_parameters`, the keys that it does not name keep their defaults."""
    return {**default, **own} if isinstance(default, dict) and isinstance(own, dict) else own


def _fields(kind: Any) -> set[str]:
    """The names that a configuration of this class takes."""
    declared = {name for base in kind.__mro__ for name in vars(base).get("__annotations__", {})}
    taken = set(inspect.signature(kind.__init__).parameters)
    return {name for name in declared | taken | set(kind.attribute_map.values()) if not name.startswith("_")}


def _admits(kind: Any, name: str, wanted: type) -> bool:
    """Whether a field may hold a value of this type; true if its annotation does not say."""
    annotation = next(
        (vars(base)["__annotations__"][name] for base in kind.__mro__ if name in vars(base).get("__annotations__", {})),
        None,
    )
    return annotation in (None, Any, wanted) or wanted in get_args(annotation)


def _layers(values: dict[str, Any], names: dict[str, set[str]]) -> dict[str, Any]:
    """The number of layers, and lists with an entry per layer, so that there is a layer of each kind."""
    count = next((name for name, value in values.items() if names[name] & COUNTS and isinstance(value, int)), None)
    lists = {name: value for name, value in values.items() if isinstance(value, list | tuple)}
    lists = {name: value for name, value in lists.items() if count and value and len(value) == values[count]}
    if count is None or not lists:
        return {}
    kinds = [json.dumps([value[layer] for value in lists.values()], default=str) for layer in range(values[count])]
    first = sorted({kinds.index(kind) for kind in kinds})[:MOST]
    chosen = first if len(first) >= FEWEST else list(range(min(FEWEST, values[count])))
    sizes = {name: next((SIZES[alias] for alias in names[name] if alias in SIZES), None) for name in lists}
    return {count: len(chosen)} | {
        name: [value[layer] if sizes[name] is None else sizes[name] for layer in chosen]
        for name, value in lists.items()
    }


def _toy_value(name: str, value: Any, size: Any, tokens: Iterator[int], admits_int: bool) -> Any:
    if size is not None:
        if isinstance(value, list | tuple):
            return [size] * len(value)
        return size if admits_int or not isinstance(size, int) or isinstance(value, int) else _KEPT
    if isinstance(value, int) and not isinstance(value, bool):
        if TOKEN.fullmatch(name):
            return next(tokens) if value > min(SIZES["eos_token_id"], value - 1) and value > LARGE else _KEPT
        return SMALL if WIDTH.fullmatch(name) and value > LARGE else _KEPT
    if INDICES.fullmatch(name) and isinstance(value, list | tuple) and value:
        return [index for index in value if isinstance(index, int) and index < FEWEST] or [0]
    return _KEPT


def _fit_rotation(values: dict[str, Any], changed: dict[str, Any]) -> None:
    """Scale the sections of multi-dimensional rotations, whose sum is half of the rotated part of a head."""
    rotation = values.get("rope_parameters")
    if not isinstance(rotation, dict) or not rotation.get("mrope_section"):
        return
    heads = values.get("num_attention_heads") or 1
    before = values.get("head_dim") or values.get("qk_rope_head_dim") or values["hidden_size"] // heads
    after = HEAD
    sections = [section * after // before for section in rotation["mrope_section"]]
    sections[-1] += sum(rotation["mrope_section"]) * after // before - sum(sections)
    changed["rope_parameters"] = {**rotation, "mrope_section": sections}
