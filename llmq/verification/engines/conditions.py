"""The checks of the rules: one function per check, which returns a text per problem.

`rules.py` lists which engine requires which check, with the source.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping

from llmq.numerics.scheme import Scheme
from llmq.verification.engines import tensor_parallel
from llmq.verification.engines.checkpoint_facts import Linear, Subject

CT = "compressed-tensors"
MARLIN_GROUPS = (32, 64, 128)
EXPERT = re.compile(r"\.experts\.\d+\.")
STACKED_EXPERTS = frozenset(
    {"aria_text", "dbrx", "gemma4_text", "gpt_oss", "granitemoe", "granitemoehybrid", "granitemoeshared",
     "llama4", "llama4_text", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_vl_moe", "qwen3_vl_moe_text"}
)  # fmt: skip
"""`model_type` of models that are published with all experts of a layer in one tensor."""

Problems = Iterable[str]
Question = Callable[[Subject], Problems]


def is_gptq(subject: Subject) -> bool:
    return method(subject) in ("gptq", "gptq-marlin", "auto-gptq")


def is_awq(subject: Subject) -> bool:
    return method(subject) in ("awq", "awq-marlin", "auto-awq")


def is_auto_round(subject: Subject) -> bool:
    return method(subject) in ("auto-round", "autoround", "intel/auto-round")


def method(subject: Subject) -> str:
    """`quant_method` in one spelling."""
    return (subject.method or "").lower().replace("_", "-")


def auto_round_packing(subject: Subject) -> str | None:
    """The layout of the tensors in an AutoRound checkpoint, if there are rules for it: gptq or awq."""
    declared = str(subject.settings.get("packing_format") or "auto_round:auto_gptq").lower()
    return next((name for name in ("awq", "gptq") if is_auto_round(subject) and name in declared), None)


def packed_as_gptq(subject: Subject) -> bool:
    """Whether the tensors have the gptq layout, whatever the configuration says."""
    return is_gptq(subject) or auto_round_packing(subject) == "gptq"


def packed_as_awq(subject: Subject) -> bool:
    return is_awq(subject) or auto_round_packing(subject) == "awq"


def is_ct(subject: Subject) -> bool:
    return subject.method == CT


def layers(subject: Subject, problem: Callable[[Linear], str | None]) -> Iterator[str]:
    """The problems of the packed layers, one text for all layers with the same problem."""
    by_text: dict[str, list[str]] = {}
    for linear in subject.packed:
        if text := problem(linear):
            by_text.setdefault(text, []).append(linear.name)
    for text, names in by_text.items():
        yield tensor_parallel.summary(names, text)


def unless(applies: Callable[[Subject], bool], problem: Callable[[Linear], str | None]) -> Question:
    return lambda subject: layers(subject, problem) if applies(subject) else ()


def missing(applies: Callable[[Subject], bool], keys: Mapping[str, tuple[str, ...]]) -> Question:
    """Check that quantization_config has these keys, each under one of its names."""

    def find(subject: Subject) -> Iterator[str]:
        for key, names in keys.items():
            if applies(subject) and not any(name in subject.settings for name in names):
                yield f"quantization_config has no {key}"

    return find


def gptq_grid(linear: Linear) -> str | None:
    scheme = linear.scheme
    if scheme is None or (scheme.bits in (4, 8) and scheme.symmetric):
        return None
    return f"{scheme}, but only 4 and 8 bits without zero points are supported"


def marlin_group(linear: Linear) -> str | None:
    scheme = linear.scheme
    if scheme is None or not linear.weights_alone or scheme.group_size in ("channel", "tensor", *MARLIN_GROUPS):
        return None
    return f"groups of {scheme.group_size}, but only 32, 64, 128 and one group per row are supported"


def ct_groups_of(subject: Subject, *, experts: bool, exllama: bool | None = None) -> Problems:
    """Groups that Marlin does not support, of experts or of all other layers, with 4 and 8 bits.

    exllama   only layers that Exllama runs (any groups, but only float16 and no zero points), or does not; None: all
    """

    def problem(linear: Linear) -> str | None:
        scheme = linear.scheme
        if scheme is None or scheme.bits not in (4, 8) or (".experts." in linear.name) != experts:
            return None
        if exllama is not None and exllama != (scheme.symmetric and is_float16(subject)):
            return None
        return marlin_group(linear)

    return layers(subject, problem) if is_ct(subject) else ()


def is_float16(subject: Subject) -> bool:
    names = (config.get(key) for config in (subject.text_config, subject.config) for key in ("dtype", "torch_dtype"))
    return next((name for name in names if name), None) == "float16"


def tiles(linear: Linear) -> str | None:
    N, K = linear.out_features, linear.in_features
    if tensor_parallel.fills_tiles(N, K):
        return None
    return f"{N} x {K} does not fit the tiles of 64 x 128 and 128 x 64, so it is padded with zeros"


def ordered(linear: Linear) -> str | None:
    return "its columns are grouped by act-order" if linear.ordered else None


def desc_act(subject: Subject) -> Iterator[str]:
    blocks = {"quantization_config": subject.settings, **dynamic(subject)}
    for name, block in blocks.items():
        group_size = block.get("group_size", subject.settings.get("group_size"))
        if block.get("desc_act") and group_size != -1:
            yield f"{name} has desc_act with groups of {group_size}"


def dynamic(subject: Subject) -> dict[str, Mapping[str, object]]:
    blocks = subject.settings.get("dynamic")
    return {f"dynamic {key}": value for key, value in blocks.items()} if isinstance(blocks, Mapping) else {}


def silently_ordered(subject: Subject) -> Problems:
    return () if subject.settings.get("desc_act") else layers(subject, ordered)


def mixed_fusion(subject: Subject) -> Iterator[str]:
    """Layers that are fused and not packed alike."""
    for name, members in tensor_parallel.fused(subject):
        packed = [linear for linear in members if linear.packed]
        if packed and len(packed) < len(members):
            plain = next(linear for linear in members if not linear.packed)
            yield f"{name}: {packed[0].last} is packed and {plain.last} is not"
        elif len(schemes := {Scheme(linear.scheme, linear.inputs) for linear in packed}) > 1:
            grids = " and ".join(sorted(map(str, schemes)))
            yield f"{name}: its layers have the grids {grids}"


def undeclared(subject: Subject) -> Iterator[str]:
    """Float layers that config.json declares as packed; embeddings do not count as linear layers."""
    names = [linear.name for linear in subject.linears if linear.declared and not linear.packed]
    names = [name for name in names if "emb" not in name and name.rpartition(".")[2] not in ("wte", "wpe")]
    if names:
        yield tensor_parallel.summary(names, "it is float, but config.json does not list it")


def experts_hidden(subject: Subject) -> Iterator[str]:
    hidden = subject.text_config.get("hidden_size")
    if isinstance(hidden, int) and hidden % 128 and any(".experts." in linear.name for linear in subject.packed):
        yield f"hidden_size is {hidden}, not a multiple of 128"


def substring(subject: Subject) -> Iterator[str]:
    for entry in subject.settings.get("modules_to_not_convert") or ():
        hit = next((linear.name for linear in subject.packed if entry in linear.name), None)
        if hit is not None:
            yield f"{entry!r} is part of the name of {hit}, which is packed"


def ct_actorder(subject: Subject) -> Iterator[str]:
    for name, group in groups(subject).items():
        if (group.get("weights") or {}).get("actorder") in ("group", "dynamic", True):
            yield f"{name} has actorder {group['weights']['actorder']!r}"


def groups(subject: Subject) -> dict[str, dict[str, dict[str, object]]]:
    config_groups = subject.settings.get("config_groups")
    return config_groups if is_ct(subject) and isinstance(config_groups, dict) else {}


def floats(*names: str) -> Question:
    """Find layers with float inputs on these grids of floats."""

    def problem(linear: Linear) -> str | None:
        on_them = linear.scheme is not None and linear.scheme.floats in names and linear.inputs is None
        return str(linear.scheme) if on_them else None

    return lambda subject: layers(subject, problem)


def other_bits(linear: Linear) -> str | None:
    scheme = linear.scheme
    return None if scheme is None or not linear.weights_alone or scheme.bits in (4, 8) else f"{scheme.bits} bits"


def not_four_bits(linear: Linear) -> str | None:
    scheme = linear.scheme
    return None if scheme is None or not linear.weights_alone or scheme.bits == 4 else f"{scheme.bits} bits"


def other_zeros(linear: Linear) -> str | None:
    scheme = linear.scheme
    if scheme is None or scheme.symmetric or scheme.bits in (4, 8):
        return None
    return f"{scheme}, but zero points are supported with 4 and 8 bits only"


def asymmetric(linear: Linear) -> str | None:
    return "it has zero points" if linear.scheme and not linear.scheme.symmetric else None


def with_zeros(subject: Subject) -> Problems:
    return layers(subject, asymmetric)


def zeros_and_grids(subject: Subject) -> Iterator[str]:
    zeros = any(linear.scheme is not None and not linear.scheme.symmetric for linear in subject.packed)
    if zeros and len(groups(subject)) > 1:
        yield "it has zero points and several grids"


def packed_head(subject: Subject) -> Problems:
    return layers(subject, lambda linear: "it is packed" if linear.last == "lm_head" else None)


def tied_head(subject: Subject) -> Problems:
    tied = subject.config.get("tie_word_embeddings", subject.text_config.get("tie_word_embeddings"))
    return packed_head(subject) if tied else ()


def format_is(applies: Callable[[Subject], bool]) -> Question:
    return lambda subject: (f"the format is {subject.method or 'float'}",) if applies(subject) else ()


def is_float(subject: Subject) -> bool:
    return subject.method is None


def is_gguf(subject: Subject) -> bool:
    return subject.method == "gguf"


def is_other(subject: Subject) -> bool:
    """Whether the format is not one that llmq writes."""
    return not any(applies(subject) for applies in (is_float, is_gguf, is_gptq, is_awq, is_ct))


def when(applies: Callable[[Subject], bool], find: Question) -> Question:
    return lambda subject: find(subject) if applies(subject) else ()


def awq_bits(linear: Linear) -> str | None:
    return None if linear.scheme is None or linear.scheme.bits == 4 else f"{linear.scheme.bits} bits"


def off_tiles(subject: Subject) -> Iterator[str]:
    """One text for all layers, with the first size as an example."""
    off = [linear for linear in subject.packed if linear.weights_alone and tiles(linear)]
    if off:
        yield tensor_parallel.summary([linear.name for linear in off], str(tiles(off[0])))


def unknown_method(subject: Subject) -> Iterator[str]:
    known = subject.method in (None, "gguf", CT) or packed_as_gptq(subject) or packed_as_awq(subject)
    if not known:
        yield f"the format is {subject.method!r}"


def experts_apart(subject: Subject) -> Iterator[str]:
    """Packed experts in separate tensors, if the model is published with stacked experts."""
    kind = subject.text_config.get("model_type") or subject.config.get("model_type")
    names = [linear.name for linear in subject.packed if EXPERT.search(linear.name)]
    if names and kind in STACKED_EXPERTS:
        yield tensor_parallel.summary(
            names, f"a single expert, but {kind} is published with all experts of a layer in one tensor"
        )


def runs_marlin(subject: Subject) -> bool:
    """Whether Marlin supports the grids of all packed layers; otherwise SGLang uses another kernel."""
    if packed_as_gptq(subject):
        return not any(gptq_grid(linear) or marlin_group(linear) for linear in subject.packed)
    if packed_as_awq(subject):
        return not any(marlin_group(linear) for linear in subject.packed)
    return is_ct(subject)
