"""What a row of the tables of architectures says (`architectures.py`, `mixtures.py`), and values of several rows."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from llmq.gguf.changes import ONE_MORE, Order, Rows, Value, interleaved

FULL, WINDOW, LINEAR = "full_attention", "sliding_attention", "linear_attention"
Config = Mapping[str, Any]

SILU = ("silu", "swish")
TANH_GELU = ("gelu_pytorch_tanh", "gelu_new")
OFF = (False, None)
CAPS = ("attn_logit_softcapping", "final_logit_softcapping")
QKV = ("attn_q", "attn_k", "attn_v")
ALL_LINEAR = (*QKV, "attn_output", "ffn_gate", "ffn_up", "ffn_down")
NORMS = ("attn_norm", "ffn_norm")
NORM_ROTATION = {
    "attn_q": interleaved("attn_q", "num_attention_heads"),
    "attn_k": interleaved("attn_k", "num_key_value_heads"),
}
ONE_MORE_NORM = {"*_norm.weight": ONE_MORE}
SOFTMAX, SIGMOID = 1, 2  # `expert_gating_func`
LAYER_NORM = "attention.layer_norm_epsilon"
GRANITE = {
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "attention_multiplier": "attention.scale",
    "logits_scaling": "logit_scale",
}


@dataclass(frozen=True)
class Stacked:
    """How a checkpoint stacks experts: whether rows of gate and up take turns, and whether weights are (E, K, N)."""

    in_turn: bool = False
    transposed: bool = False


@dataclass(frozen=True)
class Architecture:
    """An architecture of llama.cpp.

    name            its name in GGUF
    rows            tensor of a block, by its name in GGUF -> the order of its rows in the file, or its parts
    columns         tensor of a block -> the order of its columns
    values          pattern of names in GGUF, without the block -> what changes in the values of float tensors
    renamed         part of a name in the checkpoint -> the same in the form that the package gguf knows
    named           tensor of a block, by its name in the checkpoint -> its name in GGUF, where the package gguf has
                    none
    without         tensors that llama.cpp does not read and the model does not need, as patterns of names
    keys            entry of config.json -> the key to write it to
    derived         other keys with their values, from the configuration
    reads           entries of config.json that `derived` writes
    factors         tensors of the rotary embedding that follow from the configuration
    layers          entry with one value per layer -> the values that the code has, repeated to the number of layers
    sliding         whether `attention.sliding_window` is written; 0 where there is none
    expects         entries of config.json, each with the values that the code supports
    requires        entries that must have a value other than 0, because the code has its own default for them
    biases          the weights that may have a bias, by their names in GGUF
    rotations       the types of rotary embedding that the code has tensors or keys for
    yarn_squared    whether yarn scales the products of queries and keys by the square of its factor (`mscale_all_dim`)
    partial         whether the code can rotate a part of a head
    free_head_size  whether the head size may differ from hidden size / number of heads
    wide_scale      the number of layers of the model whose attention is scaled by hidden size / number of heads
    local_rotation  whether layers with a window may rotate with other frequencies
    stacked         the form of stacked experts in a checkpoint
    """

    name: str
    rows: Mapping[str, Rows] = field(default_factory=dict)
    columns: Mapping[str, Callable[[Config], Order]] = field(default_factory=dict)
    values: Mapping[str, Value] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    named: Mapping[str, str] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    keys: Mapping[str, str] = field(default_factory=dict)
    derived: Callable[[Config], Mapping[str, Any]] = lambda config: {}
    reads: tuple[str, ...] = ()
    factors: Callable[[Config], Mapping[str, Any]] | None = None
    layers: Mapping[str, tuple[Any, ...]] = field(default_factory=lambda: {"layer_types": (FULL,)})
    sliding: bool = False
    expects: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    requires: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()
    rotations: tuple[str, ...] = ("default", "linear", "yarn")
    yarn_squared: bool = False
    partial: bool = False
    free_head_size: bool = True
    wide_scale: int | None = None
    local_rotation: bool = False
    stacked: Stacked = Stacked()

    @property
    def windowed(self) -> bool:
        """Whether llama.cpp attends through the window in some layers."""
        return WINDOW in self.layers.get("layer_types", ())
