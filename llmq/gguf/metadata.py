"""The keys of a file without those of the tokenizer and the rotary embedding: name and sizes of the model.

Sizes come from the configuration as transformers reads it, which includes defaults that config.json leaves out.
"""

import re
import shutil
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmq._version import __version__
from llmq.checkpoint.side_files import CARD, ORIGINAL_CARD, leaves
from llmq.gguf.architecture import Architecture
from llmq.gguf.changes import head_size
from llmq.gguf.rotation import add_rotation

PHI3_NAME = re.compile("phi-?3", re.IGNORECASE)
PHI3_TOKENS = {"<unk>", "<s>", "<|endoftext|>"}
"""llama.cpp refuses a model with Phi-3 in its name that lacks one of these tokens."""


@dataclass(frozen=True)
class Extra:
    """What a configuration needs in addition to keys: tensors of the rotary embedding, and notes for the user."""

    tensors: dict[str, NDArray[np.float32]]
    notes: tuple[str, ...]


def add_general(
    writer: Any, folder: Path, name: str, parameters: int, file_type: int, tokens: Collection[str]
) -> tuple[str, ...]:
    """Write `general.*`, from `name`, from the model card and settings in `folder`, and from what is stored.

    Returns notes for the user.
    """
    import gguf

    card, notes = _card(folder)
    settings = gguf.Metadata.load_hf_parameters(folder)
    metadata = gguf.Metadata.apply_metadata_heuristic(gguf.Metadata(), card, settings, Path(name), parameters)
    metadata.quantized_by = f"llmq {__version__}"
    if metadata.name and not PHI3_TOKENS <= set(tokens):  # such a name makes llama.cpp look for the tokens of Phi-3
        metadata.name = PHI3_NAME.sub("Phi 3", metadata.name)
    metadata.set_gguf_meta_model(writer)
    writer.add_type("model")
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    return notes


def _card(folder: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The metadata at the top of the original model's README.md, and notes for the user."""
    import gguf
    import yaml

    file = next((folder / name for name in (ORIGINAL_CARD, CARD) if (folder / name).is_file()), folder / CARD)
    try:
        with tempfile.TemporaryDirectory() as made:  # the package gguf reads a card by the name of its folder
            if file.is_file() and not leaves(folder, file):
                shutil.copyfile(file, Path(made) / CARD)
            return gguf.Metadata.load_model_card(Path(made)), ()
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        return {}, (f"the file has no licence and origin: {file} cannot be read: {error}",)


def add_sizes(writer: Any, config: Mapping[str, Any], arch: Architecture) -> Extra:
    """Write `{arch}.*`.  Raises UnsupportedModelError for a rotary embedding that llama.cpp does not support."""
    heads, width, head = config["num_attention_heads"], config["hidden_size"], head_size(config)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(width)
    writer.add_head_count(heads)
    writer.add_vocab_size(config["vocab_size"])
    usual = {
        "attention.key_length": head,
        "attention.value_length": head,
        "feed_forward_length": config.get("intermediate_size") or config.get("n_inner") or 4 * width,
        "attention.head_count_kv": config.get("num_key_value_heads") or heads,
    }
    if "rms_norm_eps" in config:
        usual["attention.layer_norm_rms_epsilon"] = float(config["rms_norm_eps"])
    own = {key: config[entry] for entry, key in arch.keys.items()}
    for key, value in {**usual, **own, **arch.derived(config)}.items():
        _add(writer, f"{arch.name}.{key}", value)
    _add_experts(writer, config)
    _add_soft_caps(writer, config)
    tensors, notes = add_rotation(writer, config, arch)
    return Extra(tensors, (*notes, *_add_window(writer, config, arch)))


def _add(writer: Any, key: str, value: Any) -> None:
    """Write a key with the type of its value; integers as llama.cpp reads sizes."""
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    else:
        writer.add_float32(key, value)


def _add_window(writer: Any, config: Mapping[str, Any], arch: Architecture) -> list[str]:
    window = config.get("sliding_window")
    if arch.sliding:
        writer.add_sliding_window(window or 0)
    if not arch.windowed and window and window < config["max_position_embeddings"]:
        return [f"llama.cpp attends to the whole text here, the model to the last {window} tokens: longer texts differ"]
    return []


def _add_experts(writer: Any, config: Mapping[str, Any]) -> None:
    experts = config.get("num_local_experts") or config.get("num_experts") or config.get("n_routed_experts")
    if not experts or config.get("enable_moe_block") is False:  # Gemma 4 may have a number without experts
        return
    writer.add_expert_count(experts)
    writer.add_expert_used_count(config.get("top_k_experts") or config["num_experts_per_tok"])
    if size := config.get("moe_intermediate_size"):
        writer.add_expert_feed_forward_length(size)
    if size := config.get("shared_expert_intermediate_size"):
        writer.add_expert_shared_feed_forward_length(size)


def _add_soft_caps(writer: Any, config: Mapping[str, Any]) -> None:
    if cap := config.get("attn_logit_softcapping"):
        writer.add_attn_logit_softcapping(cap)
    if "final_logit_softcapping" in config:  # 0 for none: llama.cpp's Gemma 4 takes 30 where there is no key
        writer.add_final_logit_softcapping(config["final_logit_softcapping"] or 0.0)
