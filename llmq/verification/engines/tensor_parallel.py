"""Tensor parallelism: which layers an engine splits by rows, which by columns, and which it fuses.

An engine fuses the first weights of attention and of the MLP, and gives each GPU some of their rows (*column parallel*,
after the columns of Wᵀ). Of the second weights, each GPU gets some of the columns (*row parallel*) with their scales,
so these must be split between groups. The names of the layers, which are the same in both engines, determine how a
layer is split.

Source: `packed_modules_mapping` and the uses of `QKVParallelLinear`, `MergedColumnParallelLinear` and
`RowParallelLinear` in vllm/model_executor/models, vLLM 0.33; the same names in sglang/srt/models, SGLang 0.5.23.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence

from llmq.model.analyse.fused_names import FUSED
from llmq.verification.engines.checkpoint_facts import Linear, Subject

SIZES = (1, 2, 4, 8)


ROW_PARALLEL = frozenset(
    {"o_proj", "down_proj", "out_proj", "dense", "dense_4h_to_h", "c_proj", "fc2", "w2", "wo", "output_linear"}
)
"""Last names of layers whose inputs are split over the GPUs."""

REPLICATED = frozenset(
    {"q_a_proj", "kv_a_proj_with_mqa", "gate", "shared_expert_gate", "router", "lm_head", "embed_tokens"}
)
"""Last names of layers that are complete on every GPU, or that engines pad."""


def fused(subject: Subject) -> Iterator[tuple[str, list[Linear]]]:
    """Yield (`model.layers.0.self_attn.qkv_proj`, its layers) for layers that an engine fuses.

    All experts of a layer are also fused: (`model.layers.0.mlp.experts`, their layers).
    """
    by_parent: dict[str, dict[str, Linear]] = defaultdict(dict)
    for linear in subject.linears:
        parent, _, last = linear.name.rpartition(".")
        by_parent[parent][last] = linear
    for parent, children in by_parent.items():
        for name, members in FUSED.items():
            parts = [children[member] for member in members if member in children]
            if len(parts) > 1:
                yield f"{parent}.{name}" if parent else name, parts
    experts: dict[str, list[Linear]] = defaultdict(list)
    for linear in subject.linears:
        before, separator, _ = linear.name.partition(".experts.")
        if separator:
            experts[f"{before}.experts"].append(linear)
    yield from experts.items()


def obstacles(subject: Subject, size: int) -> list[str]:
    """Why the model cannot be split over `size` GPUs, heads first; empty if it can."""
    reasons = list(_heads(subject, size)) if size > 1 else []
    by_text: dict[str, list[str]] = {}
    for linear in subject.packed if size > 1 else ():
        for text in _cut(linear, size, _key_heads(subject)):
            by_text.setdefault(text, []).append(linear.name)
    return reasons + [summary(names, text) for text, names in by_text.items()]


def off_tiles(subject: Subject, size: int) -> list[str]:
    """Layers, possibly fused, whose part on each of `size` GPUs does not fit the tiles of Marlin.

    Experts, floats and layers with quantized inputs are not checked, because they use other kernels.
    """
    joined = {name: members for name, members in fused(subject) if not name.endswith(".experts")}
    inside = {linear.name for members in joined.values() for linear in members}
    joined |= {linear.name: [linear] for linear in subject.packed if linear.name not in inside}
    by_text: dict[str, list[str]] = {}
    for name, members in joined.items():
        if ".experts." in name or not all(linear.weights_alone for linear in members):
            continue
        cut_inputs, whole = members[0].last in ROW_PARALLEL, members[0].last in REPLICATED
        N = sum(linear.out_features for linear in members) // (1 if cut_inputs or whole else size)
        K = members[0].in_features // (size if cut_inputs and not whole else 1)
        if not fills_tiles(N, K):
            by_text.setdefault(f"{N} x {K} on each GPU does not fit the tiles of 64 x 128 and 128 x 64", []).append(
                name
            )
    return [summary(names, text) for text, names in by_text.items()]


def fills_tiles(out_features: int, in_features: int) -> bool:
    """Whether a weight is divisible into one of the two tiles of Marlin."""
    N, K = out_features, in_features
    return (N % 64 == 0 and K % 128 == 0) or (N % 128 == 0 and K % 64 == 0)


def summary(names: Sequence[str], text: str) -> str:
    """One text for several layers."""
    return f"{names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}: {text}"


def _key_heads(subject: Subject) -> int | None:
    config = subject.text_config
    heads = config.get("num_key_value_heads") or config.get("num_attention_heads")
    return heads if isinstance(heads, int) else None


def _heads(subject: Subject, size: int) -> Iterator[str]:
    heads, key_heads = subject.text_config.get("num_attention_heads"), _key_heads(subject)
    if isinstance(heads, int) and heads % size:
        yield f"{heads} attention heads are not divisible by {size}"
    elif key_heads and key_heads % size and size % key_heads:
        yield f"{key_heads} key and value heads cannot be split over {size} GPUs"


def _cut(linear: Linear, size: int, key_heads: int | None) -> Iterator[str]:
    if linear.last in REPLICATED:
        return
    if linear.last in ROW_PARALLEL:
        yield from _columns(linear, size)
    elif linear.last not in ("k_proj", "v_proj") or not key_heads or key_heads >= size:
        yield from _rows(linear, size)  # with fewer key and value heads than GPUs, they are copied instead of split


def _columns(linear: Linear, size: int) -> Iterator[str]:
    """The problems of a layer that is split by inputs."""
    shard, rest = divmod(linear.in_features, size)
    if rest:
        yield f"its {linear.in_features} inputs are not divisible by {size}"
    elif linear.scheme is not None and isinstance(linear.scheme.group_size, int) and shard % linear.group():
        yield f"split within a group: {shard} inputs per GPU, in groups of {linear.group()}"
    elif shard % _per_word(linear):
        yield f"split within a word of {_per_word(linear)} values: {shard} inputs per GPU"


def _rows(linear: Linear, size: int) -> Iterator[str]:
    """The problems of a layer that is split by outputs."""
    shard, rest = divmod(linear.out_features, size)
    if rest:
        yield f"its {linear.out_features} outputs are not divisible by {size}"
    elif (linear.scheme is None or linear.scheme.floats is None) and shard % _per_word(linear):
        yield f"split within a word of {_per_word(linear)} zero points: {shard} outputs per GPU"


def _per_word(linear: Linear) -> int:
    """Quantized values per 32-bit word, if words hold complete values; otherwise 32."""
    bits = 4 if linear.scheme is None else linear.scheme.bits
    return 32 // bits if 32 % bits == 0 else 32
