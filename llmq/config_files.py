"""Settings as TOML, JSON, Python and the command line give them: plain values, each key known and of its kind."""

import dataclasses
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llmq.config import Calibration, Override, QuantConfig
from llmq.errors import ConfigError, listed
from llmq.numerics.scheme import GroupSize, WeightScheme

KINDS: Mapping[str, Callable[[Any], bool]] = {
    "a text": lambda value: isinstance(value, str),
    "a number": lambda value: type(value) in (int, float),
    "a whole number": lambda value: type(value) is int,
    "true or false": lambda value: type(value) is bool,
    "a number, channel or tensor": lambda value: isinstance(value, str) or type(value) is int,
    "a block of keys": lambda value: isinstance(value, Mapping),
    "a list of texts": lambda value: isinstance(value, list | tuple) and all(isinstance(v, str) for v in value),
    "a text or a list of texts": lambda value: isinstance(value, str) or KINDS["a list of texts"](value),
    "a list of blocks": lambda value: isinstance(value, list | tuple) and all(isinstance(v, Mapping) for v in value),
}

_SCHEME = {"bits": "a whole number", "group_size": "a number, channel or tensor", "symmetric": "true or false"}
_CALIBRATION = {"sources": "a list of texts", "samples": "a whole number", "seqlen": "a whole number"}
_OVERRIDE = {"pattern": "a text", **_SCHEME}
_SETTINGS = {
    "method": "a text", "scheme": "a block of keys", "format": "a text or a list of texts",
    "calibration": "a block of keys", "order": "a text", "scales": "a text", "damping": "a number",
    "skip": "a list of texts", "overrides": "a list of blocks", "strict": "true or false", "seed": "a whole number",
    "target_bits": "a number", "rotate": "true or false", "quantize_head": "true or false",
}  # fmt: skip


def require_known(what: str, found: Mapping[str, Any], known: Mapping[str, str]) -> None:
    """Every key must be known, and its value of that kind: TOML gives whatever somebody wrote."""
    for key, value in found.items():
        if key not in known:
            raise ConfigError(f"unknown {what}: {key!r}", hint=f"known are {listed(sorted(known))}")
        if not KINDS[known[key]](value):
            raise ConfigError(f"{key} is {value!r}, expected {known[key]}")


def parse_group_size(text: str | int) -> GroupSize:
    """`128`, `channel` or `tensor`, as flags and TOML spell them."""
    if text in ("channel", "tensor"):
        return text  # type: ignore[return-value]
    try:
        return int(text) if isinstance(text, str) else text
    except ValueError:
        raise ConfigError(f"group size is {text!r}, expected a number, channel or tensor") from None


def parse_override(text: str) -> Override:
    """`PATTERN:bits=8,group_size=32,symmetric=false` as the command line spells an override."""
    pattern, separator, assignments = text.rpartition(":")
    if not separator or not pattern or "=" not in assignments:
        raise ConfigError(f"override {text!r} is not understood", hint="for example '*.down_proj:bits=8,group_size=32'")
    fields: dict[str, Any] = {"pattern": pattern}
    for assignment in assignments.split(","):
        key, _, value = (part.strip() for part in assignment.partition("="))
        fields[key] = {"true": True, "false": False}.get(value.lower(), value)
    return _override_from(fields)


def read_toml(path: Path) -> dict[str, Any]:
    """The settings of a `--config` file, in the shape that `config_from` takes."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"cannot read the configuration {path}: {error}") from None


def config_from(settings: Mapping[str, Any]) -> QuantConfig:
    """A `QuantConfig` from nested plain values; every unknown key is an error."""
    require_known("setting", settings, _SETTINGS)
    values = dict(settings)
    if "scheme" in values:
        scheme = dict(values["scheme"])
        require_known("key of [scheme]", scheme, _SCHEME)
        if "group_size" in scheme:
            scheme["group_size"] = parse_group_size(scheme["group_size"])
        values["scheme"] = WeightScheme(**scheme)
    if "calibration" in values:
        calibration = dict(values["calibration"])
        require_known("key of [calibration]", calibration, _CALIBRATION)
        calibration["sources"] = tuple(calibration.get("sources", ()))
        values["calibration"] = Calibration(**calibration)
    if "overrides" in values:
        values["overrides"] = tuple(_override_from(override) for override in values["overrides"])
    if "skip" in values:
        values["skip"] = tuple(values["skip"])
    return QuantConfig(**values)


def config_to(config: QuantConfig) -> dict[str, Any]:
    """The inverse of `config_from`: plain values that TOML and JSON can hold."""
    settings = dataclasses.asdict(config)
    del settings["scheme"]["block_type"]  # the format's to say
    settings["overrides"] = [{k: v for k, v in o.items() if v is not None} for o in settings["overrides"]]
    settings["skip"] = list(config.skip)
    if not isinstance(config.format, str):
        settings["format"] = list(config.format)
    if config.target_bits is None:  # TOML has no word for it
        del settings["target_bits"]
    settings["calibration"]["sources"] = list(config.calibration.sources)
    return settings


def merged(config: QuantConfig, settings: Mapping[str, Any]) -> QuantConfig:
    """`config` with settings by their short names on top: those of the command line, `None` for not given.

    `bits`, `group_size` and `symmetric` are the scheme's; `samples`, `seqlen` and `calibration` (the sources) those of
    the calibration; `overrides` may be texts as in `parse_override`; the rest are fields of `QuantConfig`.
    """
    given = {key: value for key, value in settings.items() if value is not None}
    values = config_to(config)
    for part, keys in (("scheme", ("bits", "group_size", "symmetric")), ("calibration", ("samples", "seqlen"))):
        values[part].update({key: given.pop(key) for key in keys if key in given})
    if "calibration" in given:
        sources = given.pop("calibration")
        values["calibration"]["sources"] = (
            [sources] if isinstance(sources, str) else [str(source) for source in sources]
        )
    if "overrides" in given:
        texts = given.pop("overrides")
        listed = [texts] if isinstance(texts, str | Override) else texts
        parsed = [parse_override(text) if isinstance(text, str) else text for text in listed]
        given["overrides"] = [dataclasses.asdict(o) if isinstance(o, Override) else o for o in parsed]
        for override in given["overrides"]:
            for key in [key for key, value in override.items() if value is None]:
                del override[key]
    return config_from(values | given)


def _override_from(fields: Mapping[str, Any]) -> Override:
    values = dict(fields)
    if "group_size" in values:
        values["group_size"] = parse_group_size(values["group_size"])
    if isinstance(values.get("bits"), str) and values["bits"].isdecimal():
        values["bits"] = int(values["bits"])
    require_known("key of an override", values, _OVERRIDE)
    if "pattern" not in values:
        raise ConfigError("an override has no pattern, which says which layers it is for")
    return Override(**values)
