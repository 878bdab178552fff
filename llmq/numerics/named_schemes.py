"""The presets that stand for a scheme of weights and inputs.

    w8a8    --bits 8 --group-size channel --activations int8
    w4a8    --bits 4 --activations int8
    fp8     --bits fp8 --activations fp8
    nvfp4   --bits nvfp4 --activations nvfp4

A setting that is given next to the preset is used, or refused if it contradicts the name. So the preset is resolved
where it is still known which settings were given, and not only what their values are.
"""

from collections.abc import Mapping
from typing import Any

from llmq.errors import ConfigError

WEIGHTS: Mapping[str, Mapping[str, Any]] = {
    "w8a8": {"bits": 8, "group_size": "channel"},
    "w4a8": {"bits": 4},
    "fp8": {"bits": "fp8"},
    "nvfp4": {"bits": "nvfp4"},
}
INPUTS = {"w8a8": "int8", "w4a8": "int8", "fp8": "fp8", "nvfp4": "nvfp4"}


def with_preset(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings, as they are given, with those for which their preset stands.

    Raises ConfigError for bits and for the dtype of inputs that the name of the preset contradicts. Group sizes, and
    whether the scales of the inputs are static, may be chosen.
    """
    preset = given.get("preset")
    if not isinstance(preset, str) or preset not in WEIGHTS:
        return given
    scheme, activations = given.get("scheme", {}), given.get("activations", INPUTS[preset])
    if isinstance(scheme, Mapping):
        scheme = {**WEIGHTS[preset], **scheme}
        bits = scheme["bits"]
    else:  # a WeightScheme, or a value that the field refuses
        bits = getattr(scheme, "floats", None) or getattr(scheme, "bits", None)
    _require(preset, "bits", str(bits), str(WEIGHTS[preset]["bits"]))
    _require(preset, "activations", activations, INPUTS[preset], f"{INPUTS[preset]}:static")
    return {**given, "scheme": scheme, "activations": activations}


def _require(preset: str, flag: str, value: Any, *expected: str) -> None:
    if value not in expected:
        raise ConfigError(
            f"--preset {preset} stands for --{flag} {expected[0]}, but --{flag} is {value}",
            hint=f"leave out --preset, or --{flag}",
        )
