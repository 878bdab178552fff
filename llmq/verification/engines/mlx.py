"""The conditions of MLX, whose programs read its own format, 4-bit awq, and floats."""

from collections.abc import Iterator

from llmq.formats.mlx import GROUPS, NAME
from llmq.verification.engines.checkpoint_facts import Subject
from llmq.verification.engines.conditions import is_awq, is_ct, is_float, is_gguf, is_gptq
from llmq.verification.engines.hints import CONVERT, QUANTIZE_AGAIN


def is_mlx(subject: Subject) -> bool:
    """Whether the checkpoint has MLX's own format."""
    return subject.method == NAME


def is_unreadable(subject: Subject) -> bool:
    """Whether MLX refuses the format."""
    return is_gptq(subject) or is_ct(subject) or is_gguf(subject)


def is_untried(subject: Subject) -> bool:
    """Whether nobody has tried to open such a file with MLX."""
    return not any(reads(subject) for reads in (is_mlx, is_unreadable, is_awq, is_float))


def other_groups(subject: Subject) -> Iterator[str]:
    """Groups of awq that MLX has no product for."""
    if is_awq(subject):
        for linear in subject.packed:
            if linear.scheme is not None and linear.scheme.group_size not in GROUPS:
                yield f"{linear.name} has groups of {linear.scheme.group_size}"


def packed_experts(subject: Subject) -> Iterator[str]:
    """Packed experts, which the classes of mlx-lm stack."""
    if is_mlx(subject):
        yield from (linear.name for linear in subject.packed if ".experts." in linear.name)


def to_mlx(subject: Subject) -> str:
    """How to get a file that MLX reads."""
    if subject.packed and all(
        linear.scheme and not linear.scheme.floats and linear.scheme.group_size in GROUPS for linear in subject.packed
    ):
        return f"{CONVERT} mlx is lossless"
    return f"{QUANTIZE_AGAIN} with --format mlx and --group-size 32, 64 or 128"
