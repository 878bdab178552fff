"""The rotary embedding of a model as keys and tensors of a GGUF file.

Frequency i of a head of D rotated channels is theta^(-2i/D) in both programs.  What changes it:

    linear    divide every frequency by `factor`
    llama3    divide frequency i by a number that is in the tensor rope_freqs
    longrope  the same with two tensors, for short and for long texts, and scale queries and keys
    yarn      divide by `factor` where a frequency turns less than `beta_slow` times within the original context, not at
              all where it turns more than `beta_fast` times, with a linear ramp between; and scale queries and keys

llama.cpp scales yarn by 1 + ln(factor) / 10 and by `rope.scaling.attn_factor`, so the latter is the quotient of the
scale of transformers and the former.  GGUF has keys for the two betas, but llama.cpp does not read them for these
architectures: with beta_fast = 4 and beta_slow = 2 in the file it still predicted what a model with 32 and 1 predicts.
Every entry of `rope_parameters` is written or refused.

DeepSeek has no scale of queries and keys (`mscale` is `mscale_all_dim`), but multiplies their products by the square of
1 + mscale_all_dim ln(factor) / 10.  llama.cpp does the same for the key `rope.scaling.yarn_log_multiplier`.  Other
scales are refused there: without this key llama.cpp squares them.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmq.errors import UnsupportedModelError
from llmq.gguf.architecture import FULL, WINDOW, Architecture
from llmq.gguf.changes import head_size

ALWAYS = frozenset(
    {"rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned", "mrope_section", "mrope_interleaved"}
)
ENTRIES: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "default": frozenset(),
        "proportional": frozenset(),
        "linear": frozenset({"factor"}),
        "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
        "longrope": frozenset(
            {"factor", "short_factor", "long_factor", "attention_factor", "original_max_position_embeddings"}
        ),
        "yarn": frozenset(
            {
                "factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate",
                "original_max_position_embeddings",
            }
        ),
    }
)  # fmt: skip
"""Type of a rotary embedding -> the entries of `rope_parameters` that change it."""
BETAS: Mapping[str, float] = MappingProxyType({"beta_fast": 32.0, "beta_slow": 1.0})
"""What llama.cpp always computes with, and transformers where they are not given, or 0."""


def add_rotation(
    writer: Any, config: Mapping[str, Any], arch: Architecture
) -> tuple[dict[str, NDArray[np.float32]], list[str]]:
    """Write the keys of the rotary embedding.  Returns the tensors of its factors, and notes for the user.

    Raises UnsupportedModelError for a rotary embedding that llama.cpp's code for the architecture does not compute.
    """
    import gguf

    if not arch.rotations:
        return {}, []
    local = config["rope_parameters"].get(WINDOW)
    if local is not None:
        _require_known(local, ("default",), arch)
        full = config["rope_parameters"][FULL]
        if not arch.local_rotation and local["rope_theta"] != full["rope_theta"]:
            raise UnsupportedModelError(
                f"config.json has rope_theta = {local['rope_theta']} and {full['rope_theta']}, and llama.cpp's "
                f"{arch.name} rotates with the same frequencies in all layers",
                hint="use a safetensors format, which can hold any model",
            )
        writer.add_rope_freq_base_swa(local["rope_theta"])
    rotation = config["rope_parameters"].get(FULL, config["rope_parameters"])
    kind = _require_known(rotation, arch.rotations, arch)
    writer.add_rope_freq_base(rotation["rope_theta"])
    if arch.factors is not None:
        return dict(arch.factors(config)), []
    rotated = rotated_channels(config, arch)
    writer.add_rope_dimension_count(rotated)
    if kind == "llama3":
        return {"rope_freqs.weight": _llama3_factors(rotation, rotated)}, []
    if kind == "longrope":
        return _add_longrope(writer, config, rotation)
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rotation["factor"])
    elif kind == "yarn":
        _add_yarn(writer, config, rotation, arch)
    return {}, []


def rotated_channels(config: Mapping[str, Any], arch: Architecture) -> int:
    """The number of channels of a head that are rotated."""
    rotation = config["rope_parameters"].get(FULL, config["rope_parameters"])
    part = rotation.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if part != 1 and not arch.partial:
        raise UnsupportedModelError(
            f"config.json has partial_rotary_factor = {part}, and llama.cpp's {arch.name} rotates whole heads",
            hint="use a safetensors format, which can hold any model",
        )
    return int(head_size(config) * part)


def from_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of `rope_parameters` for the keys of a file, without those that transformers reads itself.

    It is the inverse of `add_rotation` for the types linear and yarn, which have no tensors.
    """
    factor = settings.get("rope.scaling.factor")
    kind = settings.get("rope.scaling.type", "linear")  # as in llama.cpp
    if factor is None or kind not in {"linear", "yarn"} or (kind == "linear" and factor == 1):
        return {}
    entries: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if kind == "linear":
        return entries
    if (original := settings.get("rope.scaling.original_context_length")) is not None:
        entries["original_max_position_embeddings"] = original
    if (relative := settings.get("rope.scaling.attn_factor")) is not None:
        entries["attention_factor"] = relative * _scale_of(factor, 1.0)
    return entries


def _require_known(rotation: Mapping[str, Any], kinds: tuple[str, ...], arch: Architecture) -> str:
    """The type of a rotary embedding, if every entry is known and supported."""
    kind = str(rotation.get("rope_type", "default"))
    if kind not in kinds:
        raise UnsupportedModelError(
            f"the rotary embedding has the type {kind!r}, expected one of {', '.join(kinds)} for llama.cpp's "
            f"{arch.name}",
            hint="use a safetensors format, which can hold any model",
        )
    unknown = sorted(rotation.keys() - ALWAYS - ENTRIES[kind])
    if kind == "yarn":
        unknown += [name for name, usual in BETAS.items() if (rotation.get(name) or usual) != usual]
        unknown += [] if rotation.get("truncate", True) else ["truncate"]
    if unknown:
        values = ", ".join(f"{name} = {rotation[name]!r}" for name in unknown)
        raise UnsupportedModelError(
            f"the rotary embedding of config.json has {values}, and llama.cpp's type {kind!r} does not read this",
            hint="use a safetensors format, which can hold any model",
        )
    return kind


def _factor(config: Mapping[str, Any], rotation: Mapping[str, Any]) -> float:
    """How many times longer than the original context a text may be."""
    factor = rotation.get("factor")
    return float(config["max_position_embeddings"] / _original(config, rotation) if factor is None else factor)


def _original(config: Mapping[str, Any], rotation: Mapping[str, Any]) -> int:
    """The original context length in tokens."""
    return int(
        rotation.get("original_max_position_embeddings")
        or config.get("original_max_position_embeddings")
        or config["max_position_embeddings"]
    )


def _add_longrope(
    writer: Any, config: Mapping[str, Any], rotation: Mapping[str, Any]
) -> tuple[dict[str, NDArray[np.float32]], list[str]]:
    import gguf

    original, scale, factor = _original(config, rotation), rotation.get("attention_factor"), _factor(config, rotation)
    if scale is None:
        scale = math.sqrt(1 + math.log(max(factor, 1.0)) / math.log(original))
    writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
    writer.add_rope_scaling_orig_ctx_len(original)
    writer.add_rope_scaling_attn_factors(scale)
    tensors = {
        f"rope_factors_{which}.weight": np.asarray(rotation[f"{which}_factor"], dtype=np.float32)
        for which in ("long", "short")
    }
    long, short = tensors.values()
    if np.array_equal(long, short):
        return tensors, []
    return tensors, [
        f"llama.cpp uses the rotation for long texts if its context (-c) has more than {original} tokens, also for "
        "shorter texts; transformers decides by the length of the text"
    ]


def _add_yarn(writer: Any, config: Mapping[str, Any], rotation: Mapping[str, Any], arch: Architecture) -> None:
    import gguf

    factor = _factor(config, rotation)
    scale, usual = yarn_scale(rotation, factor), _scale_of(factor, 1.0)
    if arch.yarn_squared and scale != 1:
        raise UnsupportedModelError(
            f"the rotary embedding of config.json scales queries and keys by {scale:g}, and llama.cpp's {arch.name} "
            "computes with 1",
            hint="use a safetensors format, which can hold any model",
        )
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(factor)
    writer.add_rope_scaling_orig_ctx_len(_original(config, rotation))
    if arch.yarn_squared and (multiple := rotation.get("mscale_all_dim")):
        writer.add_rope_scaling_yarn_log_mul(0.1 * multiple)
    elif scale != usual:
        writer.add_rope_scaling_attn_factors(scale / usual)


def yarn_scale(rotation: Mapping[str, Any], factor: float) -> float:
    """What queries and keys are multiplied by after the rotation."""
    if (given := rotation.get("attention_factor")) is not None:
        return float(given)
    numerator, denominator = rotation.get("mscale"), rotation.get("mscale_all_dim")
    if numerator and denominator:
        return _scale_of(factor, numerator) / _scale_of(factor, denominator)
    return _scale_of(factor, 1.0)


def _scale_of(factor: float, multiple: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * multiple * math.log(factor) + 1.0


def _llama3_factors(rotation: Mapping[str, Any], rotated: int) -> NDArray[np.float32]:
    """(D/2,) float32, the divisor of each frequency: 1 for short waves, `factor` for long ones."""
    waves = 2 * math.pi * rotation["rope_theta"] ** (np.arange(0, rotated, 2, dtype=np.float64) / rotated)
    low, high, factor = rotation["low_freq_factor"], rotation["high_freq_factor"], rotation["factor"]
    smooth = (rotation["original_max_position_embeddings"] / waves - low) / (high - low)  # 1 at the short end
    factors: NDArray[np.float64] = 1 / (np.clip(smooth, 0, 1) * (1 - 1 / factor) + 1 / factor)
    return factors.astype(np.float32)
