"""Settings: precedence, errors for invalid values, and reading of written files."""

import importlib.util
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Unpack

import pytest
import tomli_w
import typer
from pydantic import Field

import llmq
from llmq._keywords import Keywords
from llmq.calibration_settings import Calibration
from llmq.cli.setting_options import with_settings
from llmq.config import Override, QuantConfig, parse_override
from llmq.errors import ConfigError
from llmq.numerics.scheme import InputScheme, WeightScheme
from llmq.patterns import matches
from llmq.setting_fields import config_to, merged, overlaid, parse_number, read_toml, settings_of
from llmq.steps import output_layout

ROOT = Path(__file__).resolve().parents[2]

FULL = QuantConfig(
    method="awq",
    scheme=WeightScheme(3, "channel", symmetric=False),
    format="gptq",
    calibration=Calibration(sources=("a.txt", "owner/name:en:train:text"), samples=7, seqlen=64),
    order="natural",
    scales="minmax",
    damping=0.05,
    skip=("lm_head", r"re:layers\.[01]\."),
    overrides=(Override(pattern="*.down_proj", bits=8), Override(pattern="k_proj", group_size=32, symmetric=True)),
    strict=True,
    seed=3,
    target_bits=4.5,
    preset="moe",
    activations="int8:static",
    keep_grid=False,
    rotate=True,
    quantize_head=True,
)


# ---- grids


def test_a_scheme_has_levels_and_a_middle() -> None:
    assert [WeightScheme(bits).levels for bits in (2, 3, 4, 8)] == [3, 7, 15, 255]
    assert [WeightScheme(bits).middle for bits in (2, 3, 4, 8)] == [2, 4, 8, 128]


def test_a_scheme_has_columns_per_group() -> None:
    assert [WeightScheme(4, size).columns_per_group(96) for size in (32, "channel", "tensor")] == [32, 96, 96]


def test_a_scheme_is_described_in_words() -> None:
    assert str(WeightScheme()) == "int4 g128 symmetric"
    assert str(WeightScheme(3, "channel", symmetric=False)) == "int3 channel asymmetric"


@pytest.mark.parametrize("bits", [0, 1, 9, 16, -4, 4.0, "4", True, None])
def test_invalid_bits_are_refused_with_the_valid_ones(bits: Any) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"bits is {bits!r}, expected one of 2, 3, 4, 5, 6, 7, 8")):
        WeightScheme(bits)


@pytest.mark.parametrize("size", [0, 1, 8, 48, 100, 2048, -1, 128.0, "128", "row", None, True])
def test_invalid_group_sizes_are_refused_with_the_valid_ones(size: Any) -> None:
    with pytest.raises(ConfigError, match="group size is") as caught:
        WeightScheme(4, size)
    assert "expected one of 16, 32, 64, 128, 256, 512, 1024, channel or tensor" in str(caught.value)


@pytest.mark.parametrize("symmetric", ["false", 1, None])
def test_symmetry_is_true_or_false(symmetric: Any) -> None:
    with pytest.raises(ConfigError, match="expected true or false"):
        WeightScheme(4, 128, symmetric)


# ---- writing and reading


@pytest.mark.parametrize("config", [QuantConfig(), FULL], ids=["defaults", "everything"])
def test_written_settings_are_read_back(config: QuantConfig, tmp_path: Path) -> None:
    file = tmp_path / "llmq.toml"
    file.write_text(tomli_w.dumps(config_to(config)), encoding="utf-8")
    assert QuantConfig.model_validate(config_to(config)) == config
    assert QuantConfig.model_validate(read_toml(file)) == config


def test_the_full_example_sets_every_field() -> None:
    for name in QuantConfig.model_fields:
        assert getattr(FULL, name) != getattr(QuantConfig(), name)


def test_a_missing_setting_keeps_its_default() -> None:
    config = QuantConfig.model_validate({"scheme": {"bits": 8}, "calibration": {"sources": ["x.txt"]}})
    assert config == QuantConfig(scheme=WeightScheme(8), calibration=Calibration(sources=("x.txt",)))


@pytest.mark.parametrize(
    "text",
    [b"bits = = 4", b"[scheme\nbits = 4", b"\xff\xfe", b"seed = 1\nseed = 2"],
    ids=["value", "table", "encoding", "twice"],
)
def test_an_invalid_toml_file_is_named(text: bytes, tmp_path: Path) -> None:
    file = tmp_path / "llmq.toml"
    file.write_bytes(text)
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*llmq\.toml"):
        read_toml(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*nowhere\.toml"):
        read_toml(tmp_path / "nowhere.toml")


# ---- bad values


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "magic"}, "method is 'magic', expected one of rtn, gptq, awq"),
        ({"format": "pickle"}, "format is 'pickle', expected one of awq, compressed-tensors, "),
        ({"order": "random"}, "order is 'random', expected one of activation, natural"),
        ({"scales": "best"}, "scales is 'best', expected one of searched, minmax"),
        ({"damping": 0}, "damping is 0, expected a fraction"),
        ({"damping": 1.0}, "damping is 1.0, expected a fraction"),
        ({"damping": -0.1}, "damping is -0.1, expected a fraction"),
        ({"damping": float("nan")}, "damping is nan, expected a fraction"),
        ({"calibration": {"samples": 0}}, "samples is 0, expected a whole number, at least 1"),
        ({"calibration": {"seqlen": -5}}, "seqlen is -5, expected a whole number, at least 1"),
        ({"scheme": {"bits": 9}}, "bits is 9, expected one of"),
        ({"scheme": {"group_size": "row"}}, "group_size is 'row', expected one of 16, 32"),
        ({"overrides": [{"pattern": "x", "bits": 9}]}, "bits is 9, expected one of"),
        ({"overrides": [{"pattern": "x", "bits": "many"}]}, "bits is 'many', expected one of 2, 3, 4, 5, 6, 7, 8"),
        ({"skip": ["re:("]}, "'re:(' is not a valid regular expression"),
        ({"overrides": [{"pattern": "re:[", "bits": 8}]}, "'re:[' is not a valid regular expression"),
        ({"overrides": [{"bits": 8}]}, "missing key of an override: 'pattern'"),
    ],
)
def test_the_error_for_an_invalid_value_has_the_expected_one(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        QuantConfig.model_validate(settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"method": 4}, {"format": [4]}, {"order": True}, {"scales": 1}, {"damping": "0.01"}, {"damping": True},
        {"seed": "one"}, {"seed": 1.5}, {"strict": "false"}, {"strict": 0},
        {"skip": "lm_head"}, {"skip": [1]}, {"scheme": "int4"}, {"scheme": 4}, {"scheme": {"bits": "four"}},
        {"scheme": {"bits": 4.0}}, {"scheme": {"group_size": 128.5}}, {"scheme": {"group_size": True}},
        {"scheme": {"symmetric": "false"}}, {"calibration": "text.txt"}, {"calibration": {"sources": "text.txt"}},
        {"calibration": {"sources": [1]}}, {"calibration": {"samples": "many"}}, {"calibration": {"samples": 1.5}},
        {"calibration": {"seqlen": True}}, {"overrides": "x:bits=8"}, {"overrides": {"pattern": "x"}},
        {"overrides": ["x:bits=8"]}, {"overrides": [{"pattern": 4}]},
        {"overrides": [{"pattern": "x", "symmetric": "no"}]},
    ],
    ids=str,
)  # fmt: skip
def test_a_value_of_the_wrong_type_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        QuantConfig.model_validate(settings)


@pytest.mark.parametrize(
    ("settings", "known"),
    [
        ({"bit": 4}, "calibration, damping, format"),
        ({"bits": 4}, "scheme"),
        ({"scheme": {"groupsize": 4}}, "bits, group_size, symmetric"),
        ({"calibration": {"source": "x"}}, "samples, seqlen, sources"),
        ({"overrides": [{"pattern": "x", "method": "rtn"}]}, "bits, group_size, pattern, symmetric"),
    ],
)
def test_an_unknown_key_is_refused_with_the_known_ones(settings: dict[str, Any], known: str) -> None:
    with pytest.raises(ConfigError, match="unknown") as caught:
        QuantConfig.model_validate(settings)
    assert known in caught.value.hint


# ---- which wins


def test_flags_override_the_file_and_the_file_defaults(tmp_path: Path) -> None:
    file = tmp_path / "llmq.toml"
    file.write_text('method = "rtn"\nseed = 5\n[scheme]\nbits = 8\ngroup_size = 64\n[calibration]\nsamples = 9\n')
    config = merged(
        QuantConfig.model_validate(read_toml(file)), {"bits": 3, "method": None, "seqlen": 16, "group_size": None}
    )
    assert config.method == "rtn" and config.seed == 5
    assert config.scheme == WeightScheme(3, 64)  # bits from the flag, group size from the file
    assert config.calibration == Calibration(samples=9, seqlen=16)
    assert config.order == "activation"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"bits": 8}, FULL.replace(scheme=WeightScheme(8, "channel", symmetric=False))),
        ({"group_size": "64"}, FULL.replace(scheme=WeightScheme(3, 64, symmetric=False))),
        ({"group_size": "tensor"}, FULL.replace(scheme=WeightScheme(3, "tensor", symmetric=False))),
        ({"symmetric": True}, FULL.replace(scheme=WeightScheme(3, "channel"))),
        ({"strict": False}, FULL.replace(strict=False)),
        ({"skip": []}, FULL.replace(skip=())),
        ({"skip": ["a", "b"]}, FULL.replace(skip=("a", "b"))),
        ({"calibration": "x.txt"}, FULL.replace(calibration=Calibration(sources=("x.txt",), samples=7, seqlen=64))),
        (
            {"calibration": [Path("x.txt")]},
            FULL.replace(calibration=Calibration(sources=("x.txt",), samples=7, seqlen=64)),
        ),
        ({"overrides": ["q_proj:bits=4"]}, FULL.replace(overrides=(Override(pattern="q_proj", bits=4),))),
        ({"overrides": [Override(pattern="x", bits=4)]}, FULL.replace(overrides=(Override(pattern="x", bits=4),))),
        ({"overrides": [{"pattern": "x", "bits": 4}]}, FULL.replace(overrides=(Override(pattern="x", bits=4),))),
        ({}, FULL),
    ],
    ids=str,
)
def test_a_short_name_sets_one_setting(given: dict[str, Any], expected: QuantConfig) -> None:
    assert merged(FULL, given) == expected


@pytest.mark.parametrize("given", [{"wbits": 4}, {"sources": ["x"]}])
def test_an_unknown_short_name_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="unknown setting"):
        merged(QuantConfig(), given)


# ---- patterns and overrides

NAME = "model.layers.10.mlp.down_proj"


@pytest.mark.parametrize(
    "pattern",
    [NAME, "down_proj", "mlp.down_proj", "layers.10.*", "*.down_proj", "*mlp*", "layers.1?.mlp.*", r"re:\.1\d\.",
     r"re:^model\.layers\.(9|10)\.", "re:down_proj$"],
)  # fmt: skip
def test_a_pattern_matches_a_name_or_its_last_parts(pattern: str) -> None:
    assert matches(pattern, NAME)


@pytest.mark.parametrize(
    "pattern",
    ["own_proj", "mlp", "layers.1.*", "model", "*.up_proj", "DOWN_PROJ", "proj", "", r"re:^layers", "re:up_proj"],
)
def test_a_pattern_matches_no_part_of_a_word_and_no_prefix(pattern: str) -> None:
    assert not matches(pattern, NAME)


def test_the_last_matching_override_sets_each_field() -> None:
    config = QuantConfig(
        scheme=WeightScheme(4, 128, symmetric=False),
        overrides=(
            Override(pattern="mlp.*", bits=8),
            Override(pattern="down_proj", group_size=32),
            Override(pattern="q_proj", bits=2),
        ),
        skip=("lm_head",),
    )
    assert config.scheme_for(NAME) == WeightScheme(8, 32, symmetric=False)
    assert config.scheme_for("model.layers.0.mlp.up_proj") == WeightScheme(8, 128, symmetric=False)
    assert config.scheme_for("model.layers.0.self_attn.k_proj") == config.scheme
    assert config.scheme_for("lm_head") is None


def test_skip_takes_precedence_over_overrides() -> None:
    config = QuantConfig(overrides=(Override(pattern="down_proj", bits=8),), skip=("layers.10.*",))
    assert config.scheme_for(NAME) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("*.down_proj:bits=8,group_size=32", Override(pattern="*.down_proj", bits=8, group_size=32)),
        ("k_proj:symmetric=false", Override(pattern="k_proj", symmetric=False)),
        ("k_proj: bits = 2 , symmetric = True", Override(pattern="k_proj", bits=2, symmetric=True)),
        ("x:group_size=channel", Override(pattern="x", group_size="channel")),
        (r"re:layers\.(0|1):bits=8", Override(pattern=r"re:layers\.(0|1)", bits=8)),
    ],
)
def test_an_override_is_read_from_a_flag(text: str, expected: Override) -> None:
    assert parse_override(text) == expected


@pytest.mark.parametrize(
    "text", ["down_proj", "bits=8", ":bits=8", "x:", "x:bits", "x:bits=", "x:bits=four", "x:bits=4.5", "x:colour=red",
             "x:group_size=big", "x:symmetric=maybe", "x:bits=8,,", "x:pattern"],
)  # fmt: skip
def test_an_invalid_override_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_override(text)
    assert "expected" in str(caught.value) or caught.value.hint


def test_a_group_size_is_a_number_or_a_word() -> None:
    assert [parse_number(text) for text in ("64", 64, "channel", "tensor")] == [64, 64, "channel", "tensor"]


@pytest.mark.parametrize(
    "make", [lambda: QuantConfig(overrides=(Override(pattern="x", bits=9),)), lambda: QuantConfig(damping=2)]
)
def test_settings_made_in_python_are_checked_too(make: Callable[[], QuantConfig]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        make()


# ---- several formats


@pytest.mark.parametrize("given", ["gptq,gguf", ["gptq", "gguf"], ("gptq, gguf",), ["gptq", "gguf", "gptq"]])
def test_formats_are_a_list_or_a_text_with_commas(given: Any) -> None:
    assert merged(QuantConfig(), {"format": given}).formats == ("gptq", "gguf")


def test_one_format_in_a_list_is_that_format() -> None:
    listed = merged(QuantConfig(), {"format": ["gptq"]})
    assert listed == QuantConfig(format="gptq")
    assert config_to(listed)["format"] == "gptq"  # the identity of a run does not depend on the spelling


def test_several_formats_are_written_and_read_back(tmp_path: Path) -> None:
    config = QuantConfig(format=("awq", "compressed-tensors"))
    file = tmp_path / "llmq.toml"
    file.write_text(tomli_w.dumps(config_to(config)), encoding="utf-8")
    assert QuantConfig.model_validate(read_toml(file)) == config


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("gptq,onnx", "format is 'onnx', expected one of awq, compressed-tensors"),
        ("", "no format is given"),
        ([], "no format is given"),
    ],
)
def test_unknown_or_incompatible_formats_are_refused(given: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        QuantConfig(format=given)


# ---- one field is one setting everywhere


class OneMore(QuantConfig):
    """The settings with one more field: nothing else has to change for the field."""

    patience: int = Field(default=3, ge=1, description="Steps without progress before a stage ends.")


def command_line(model: type[QuantConfig], *arguments: str) -> list[QuantConfig]:
    """What a command with an option for each setting of a model receives."""
    received: list[QuantConfig] = []

    @with_settings(model=model)
    def command(*, settings: QuantConfig) -> None:
        received.append(settings)

    app = typer.Typer()
    app.command()(command)
    app(list(arguments), standalone_mode=False)
    return received


def test_a_new_field_is_a_flag_with_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line(OneMore, "--patience", "5") == [OneMore(patience=5)]
    command_line(OneMore, "--help")
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--patience" in shown and "Steps without progress" in shown and "default: 3" in shown


def test_a_new_field_is_a_toml_key(tmp_path: Path) -> None:
    file = tmp_path / "llmq.toml"
    file.write_text("patience = 7\n[scheme]\nbits = 3\n")
    assert command_line(OneMore, "--config", str(file)) == [OneMore(patience=7, scheme=WeightScheme(3))]
    assert tomli_w.dumps(config_to(OneMore(patience=7))).count("patience = 7") == 1
    with pytest.raises(ConfigError, match="patience is '7', expected a whole number"):
        OneMore.model_validate({"patience": "7"})


def test_a_new_field_is_a_keyword_of_python() -> None:
    assert merged(OneMore(), {"patience": 9}) == OneMore(patience=9)
    assert "    patience: int | None\n" in keyword_page().render(OneMore)


def keyword_page() -> ModuleType:
    """The program that writes `llmq/_keywords.py`."""
    spec = importlib.util.spec_from_file_location("setting_keywords", ROOT / "scripts" / "setting_keywords.py")
    assert spec is not None and spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    return program


def test_the_keywords_of_quantize_are_the_settings() -> None:
    program = keyword_page()
    assert program.PAGE.read_text(encoding="utf-8") == program.render(), "run python scripts/setting_keywords.py"
    keywords = inspect.signature(llmq.quantize).parameters["settings"].annotation
    assert keywords == Unpack[Keywords]
    assert set(Keywords.__annotations__) == set(settings_of(QuantConfig))


def test_a_misspelt_keyword_of_quantize_is_an_error() -> None:
    with pytest.raises(ConfigError, match="unknown setting: 'metod'") as caught:
        llmq.quantize("model", "out", metod="gptq")  # type: ignore[call-arg]
    assert "bits" in caught.value.hint and "method" in caught.value.hint


def test_every_setting_is_described() -> None:
    for name, setting in settings_of(QuantConfig).items():
        assert len((setting.field.description or "").split()) >= 8, name


def test_errors_contain_no_text_of_pydantic() -> None:
    for settings in ({"method": 4}, {"scheme": 4}, {"metod": 4}, {"overrides": [{}]}, {"skip": [1]}):
        with pytest.raises(ConfigError) as caught:
            QuantConfig.model_validate(settings)
        message = f"{caught.value} {caught.value.hint}"
        assert "pydantic" not in message and "Input should" not in message and "https:" not in message


def test_settings_are_hashable_and_frozen() -> None:
    again = QuantConfig.model_validate(config_to(FULL))
    assert {FULL: "made once"}[again] == "made once"
    with pytest.raises(ValueError, match="frozen"):
        FULL.seed = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    "content",
    [
        "seed = " + "9" * 5000,
        "seed = 0x" + "f" * 5000,
        "seed = 10000000000000000000",
        "skip = " + "[" * 3000 + "]" * 3000,
    ],
    ids=["digits", "hexadecimal", "65 bits", "nested"],
)
def test_toml_that_python_cannot_hold_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "settings.toml").write_text(content)
    with pytest.raises(ConfigError, match=r"cannot read the configuration file .*settings\.toml"):
        read_toml(tmp_path / "settings.toml")


@pytest.mark.parametrize("seed", [-1, 2**63], ids=["negative", "64 bits"])
def test_seed_that_no_generator_takes_is_refused(seed: int) -> None:
    with pytest.raises(ConfigError, match="seed is"):
        QuantConfig(seed=seed)


def test_bits_may_be_a_grid_of_floats() -> None:
    config = merged(QuantConfig(), {"bits": "nvfp4", "overrides": ["down_proj:bits=8", "o_proj:bits=fp8"]})
    schemes = [str(config.scheme_for(name)) for name in ("q_proj", "down_proj", "o_proj")]
    assert schemes == ["nvfp4", "int8 g128 symmetric", "fp8"]
    assert QuantConfig.model_validate(config_to(config)) == config
    assert merged(config, {"bits": 4}).scheme == WeightScheme()
    assert output_layout.default_output("a/llama", config) == Path("llama-balanced-nvfp4")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bits": "nvfp4", "group_size": 32}, "group_size is 32, but nvfp4 has group_size 16"),
        ({"bits": "nvfp4", "group_size": 128}, "group_size is 128, but nvfp4 has group_size 16"),  # the usual size
        ({"bits": "mxfp4", "symmetric": False}, "symmetric is False, but mxfp4 has symmetric True"),
        ({"bits": "nvfp5"}, "bits is 'nvfp5', expected one of 2, 3, 4, 5, 6, 7, 8, nvfp4, mxfp4, fp8"),
        ({"bits": "nvfp4", "overrides": ["x:group_size=64"]}, "groups of 64 are not the grid nvfp4"),
    ],
)
def test_a_grid_of_floats_fixes_the_other_fields(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        merged(QuantConfig(), settings)


def test_a_flag_for_a_grid_of_floats_replaces_integers_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "settings.toml").write_text("[scheme]\nbits = 8\n")
    config = QuantConfig.model_validate(read_toml(tmp_path / "settings.toml"))
    assert merged(config, {"bits": "nvfp4"}).scheme == WeightScheme.of_floats("nvfp4")


def test_the_last_override_of_activations_wins() -> None:
    config = QuantConfig(
        activations="int8", overrides=[parse_override("*down_proj:activations=none"), parse_override("*:bits=8")]
    )
    assert config.inputs_for("a.q_proj") == InputScheme("int8", "dynamic")
    assert config.inputs_for("a.down_proj") is None and config.scheme_for("a.down_proj") == WeightScheme(8)
    assert config.input_schemes == {InputScheme("int8", "dynamic"), None}
    with pytest.raises(ConfigError, match="activations is 'int4', expected one of none, int8"):
        parse_override("*:activations=int4")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"preset": "w8a8"}, (WeightScheme(8, "channel"), "int8")),
        ({"preset": "w8a8", "activations": "int8:static"}, (WeightScheme(8, "channel"), "int8:static")),
        ({"preset": "w8a8", "scheme": {"group_size": 32}}, (WeightScheme(8, 32), "int8")),
        ({"preset": "w4a8", "scheme": WeightScheme(4, 32)}, (WeightScheme(4, 32), "int8")),
        ({"preset": "fp8"}, (WeightScheme.of_floats("fp8"), "fp8")),
        ({"preset": "moe"}, (WeightScheme(), "none")),
    ],
)
def test_presets_stand_for_bits_and_activations(given: dict[str, Any], expected: tuple[WeightScheme, str]) -> None:
    config = QuantConfig(**given)
    assert (config.scheme, config.activations) == expected
    assert QuantConfig.model_validate(config_to(config)) == config == merged(config, {})
    assert config.replace(seed=3).replace(seed=0) == config


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"preset": "w8a8", "bits": 4}, "--preset w8a8 stands for --bits 8, but --bits is 4"),
        ({"preset": "w4a8", "bits": 8}, "--preset w4a8 stands for --bits 4, but --bits is 8"),
        ({"preset": "w8a8", "activations": "none"}, "stands for --activations int8, but --activations is none"),
        ({"preset": "fp8", "activations": "int8"}, "stands for --activations fp8, but --activations is int8"),
        ({"preset": "fp8", "bits": 4}, "stands for --bits fp8, but --bits is 4"),
        ({"preset": "fp8", "group_size": 128}, "group_size is 128, but fp8 has group_size channel"),
    ],
    ids=str,
)
def test_what_contradicts_a_preset_is_refused(given: dict[str, Any], words: str, tmp_path: Path) -> None:
    """Also where it is the default, and wherever it is given: each in a file, the rest as a flag."""
    for name in (*given, None):
        values: dict[str, Any] = {}
        if name is not None:
            table = values.setdefault("scheme", {}) if name in ("bits", "group_size") else values
            table[name] = given[name]
        flags = {other: value for other, value in given.items() if other != name}
        with pytest.raises(ConfigError, match=re.escape(words)):
            overlaid(QuantConfig, values, flags)


def test_activations_in_int8_or_with_static_scales_add_smoothing() -> None:
    assert QuantConfig(activations="int8").stages.transforms == ("smooth",)
    assert QuantConfig(activations="int8:static", method="awq").stages.transforms == ("awq", "smooth")
    assert QuantConfig(activations="fp8:static").stages.transforms == ("smooth",)
    assert QuantConfig(activations="fp8").stages.transforms == ()
    assert QuantConfig(activations="int8", method="rtn").stages.transforms == ()  # it reads no text
    hard = Override(pattern="*.down_proj", activations="int8")
    assert QuantConfig(overrides=[hard]).stages.transforms == ("smooth",)
