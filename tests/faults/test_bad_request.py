"""Invalid settings, settings that contradict the model, and unusable text: refused before any work, with a hint."""

from pathlib import Path

import pytest

from tests.command_line import llmq
from tests.faults.refusals import BACKEND, CALIBRATION, CHECKPOINT, CONFIG, quantize, refused

# ---- settings


def test_invalid_group_size_is_refused(model: Path, out: Path) -> None:
    problem = "group_size is 100, expected one of 16, 32, 64, 128, 256, 512, 1024, channel, tensor"
    refused(quantize(model, out, "--group-size", "100"), CONFIG, problem, "the default is 128")
    assert not out.exists()


def test_non_numeric_group_size_is_refused(model: Path, out: Path) -> None:
    refused(quantize(model, out, "--group-size", "many"), CONFIG, "group_size is 'many', expected one of 16, 32")


def test_strict_refuses_a_group_size_that_does_not_divide(model: Path, out: Path) -> None:
    problem = "a group size of 128 does not divide 32 input features"
    refused(quantize(model, out, "--group-size", "128", "--strict"), CONFIG, problem, "leave --strict out")
    assert not out.exists()


@pytest.mark.parametrize("bits", [0, 1, 9, 16, -4])
def test_unsupported_bits_are_refused(bits: int, model: Path, out: Path) -> None:
    refused(
        quantize(model, out, "--bits", str(bits)),
        CONFIG,
        f"bits is {bits}, expected one of 2, 3, 4, 5, 6, 7, 8",
        "the default is 4",
    )
    assert not out.exists()


@pytest.mark.parametrize(("layout", "bits"), [("gptq", 3), ("gptq", 2), ("awq", 8), ("awq", 3)])
def test_grid_unsupported_by_the_format_is_refused(layout: str, bits: int, model: Path, out: Path) -> None:
    outcome = quantize(model, out, "--format", layout, "--bits", str(bits))
    refused(outcome, CONFIG, f"{layout} cannot hold int{bits} g32 symmetric")
    assert "compressed-tensors holds 2 to 8" in outcome.stderr
    assert not out.exists()


@pytest.mark.parametrize(
    ("option", "expected"),
    [("--method", "rtn, gptq, awq, fast"), ("--format", "awq, compressed-tensors, gguf, gptq"),
     ("--order", "activation, natural"), ("--scales", "searched, minmax")],
)  # fmt: skip
def test_unknown_name_is_refused(option: str, expected: str, model: Path, out: Path) -> None:
    refused(quantize(model, out, option, "magic"), CONFIG, f"{option[2:]} is 'magic', expected one of {expected}")
    assert not out.exists()


@pytest.mark.parametrize(
    ("settings", "problem", "hint"),
    [
        (
            "metod = 'gptq'",
            "unknown setting: 'metod'",
            "known are activations, calibration, damping, format",
        ),
        ("[scheme]\nbit = 4", "unknown key of [scheme]: 'bit'", "known are bits, group_size, symmetric"),
        ("[calibration]\nfile = 'x'", "unknown key of [calibration]: 'file'", "known are own_text, packing, samples"),
        ("[[overrides]]\npattern = 'x'\nbitz = 4", "unknown key of an override: 'bitz'", "known are activations, bits"),
        ("scheme = 3", "scheme is 3, expected a table", ""),
        ("overrides = [3]", "overrides is [3], expected a list of tables", ""),
        ("[[overrides]]\nbits = 4", "missing key of an override: 'pattern'", "give the layers"),
        ("[[overrides]]\npattern = 3", "pattern is 3, expected a string", ""),
        ("skip = 'down_proj'", "skip is 'down_proj', expected a list of strings", ""),
        ("seed = 'x'", "seed is 'x', expected a whole number", "the default is 0"),
        ("strict = 'maybe'", "strict is 'maybe', expected true or false", ""),
        ("method = 'gtpq'", "method is 'gtpq', expected one of rtn, gptq", "perhaps gptq was meant"),
        ("format = 'gguf:q4km'", "format is 'gguf:q4km', expected one of awq", "perhaps gguf:q4_k_m was meant"),
        ("method = ['rtn']", "method is ['rtn'], expected one of rtn, gptq", "the default is balanced"),
        (
            "[scheme]\nbits = 'four'",
            "bits is 'four', expected one of 2, 3, 4, 5, 6, 7, 8, nvfp4, mxfp4",
            "the default is 4",
        ),
        ("[scheme]\ngroup_size = [1]", "group_size is [1], expected one of 16, 32", "the default is 128"),
        ("[calibration]\nsources = 'text.txt'", "sources is 'text.txt', expected a list of strings", ""),
        ("damping = 2", "damping is 2, expected a fraction", "the default is 0.01"),
        ("no TOML", "cannot read the configuration", ""),
    ],
)
def test_invalid_settings_file_is_refused(settings: str, problem: str, hint: str, model: Path, out: Path) -> None:
    file = model.parent / "quant.toml"
    file.write_text(settings)
    refused(llmq("quantize", model, out, "--config", file), CONFIG, problem, hint)
    assert not out.exists()


def test_missing_settings_file_is_refused(model: Path, out: Path) -> None:
    refused(llmq("quantize", model, out, "--config", model / "no.toml"), CONFIG, "no.toml")


@pytest.mark.parametrize("option", [("--override", "re:(:bits=4"), ("--skip", "re:(")], ids=lambda option: option[0])
def test_invalid_pattern_is_refused(option: tuple[str, str], model: Path, out: Path) -> None:
    refused(quantize(model, out, *option), CONFIG, "'re:(' is not a valid regular expression")
    assert not out.exists()


@pytest.mark.parametrize("override", ["down_proj", "down_proj:8", ":bits=8", "down_proj:bits=eight"])
def test_invalid_override_is_refused(override: str, model: Path, out: Path) -> None:
    outcome = quantize(model, out, "--override", override)
    assert outcome.exit_code == CONFIG
    assert "error: " in outcome.stderr
    assert not out.exists()


def test_skipping_every_layer_is_refused(model: Path, out: Path) -> None:
    refused(quantize(model, out, "--skip", "*"), CONFIG, "no layer can be quantized: skipped on request", "--skip")
    assert not out.exists()


@pytest.mark.parametrize("device", ["cuda:99", "tpu9", "mps", "meta"])
def test_missing_device_is_refused(device: str, model: Path, out: Path) -> None:
    refused(quantize(model, out, "--device", device), BACKEND, device, "cpu")
    assert not out.exists()


def test_revision_of_a_local_folder_is_refused(model: Path, out: Path) -> None:
    refused(quantize(model, out, "--revision", "main"), CONFIG, "--revision 'main' does not apply", "--revision")


@pytest.mark.parametrize("option", [("--max-tokens", "0"), ("--temperature", "-1")], ids=lambda option: option[0])
def test_invalid_generation_option_is_refused(option: tuple[str, str], model: Path) -> None:
    outcome = llmq("generate", model, "--prompt", "x", *option)
    assert outcome.exit_code == 2
    assert option[0] in outcome.stderr


# ---- calibration


@pytest.mark.parametrize(
    ("name", "content", "problem", "hint"),
    [
        ("empty.txt", b"", "empty.txt holds no text", "expected text"),
        ("blank.txt", b" \n\n \n", "blank.txt holds no text", "expected text"),
        ("short.txt", b"ten bytes.", "holds 11 tokens, fewer than one sequence of 32", "--seqlen"),
        ("latin1.txt", b"caf\xe9 au lait " * 100, "not UTF-8 text: byte 0xe9 at offset 3", "iconv"),
        ("cut.jsonl", b'{"text": "a"}\n{"text": "b', "line 2 is not valid JSON", ""),
        ("column.jsonl", b'{"texto": "a"}', "line 1 holds the columns texto", "role and content"),
    ],
)
def test_unusable_calibration_text_is_refused(
    name: str, content: bytes, problem: str, hint: str, model: Path, out: Path
) -> None:
    file = model.parent / name
    file.write_bytes(content)
    refused(quantize(model, out, calibration=file), CALIBRATION, problem, hint)
    assert not out.exists()


def test_missing_calibration_file_is_refused(model: Path, out: Path) -> None:
    refused(quantize(model, out, calibration=model / "no.txt"), CALIBRATION, "no.txt does not exist", ".jsonl")
    assert not out.exists()


def test_default_calibration_text_needs_the_hub(model: Path, out: Path) -> None:
    outcome = llmq("quantize", model, out)
    refused(
        outcome,
        CALIBRATION,
        "no calibration text was given, and the default text on the Hub cannot be read",
        "--calibration text.txt",
    )
    assert not out.exists()


def test_default_evaluation_text_needs_the_hub(model: Path) -> None:
    outcome = llmq("eval", model)
    refused(outcome, CALIBRATION, "the dataset Salesforce/wikitext", "give a file that ends in")
    assert ".txt" in outcome.stderr
    assert "--calibration" not in outcome.stderr


@pytest.mark.parametrize("command", ["quantize", "eval", "generate"])
def test_missing_tokenizer_is_refused(command: str, model: Path, text: Path, out: Path) -> None:
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").unlink()
    more = {
        "quantize": (out, "--calibration", text), "eval": ("--text", text), "generate": ("--prompt", "x")
    }[command]  # fmt: skip
    refused(llmq(command, model, *more), CHECKPOINT, "model has no tokenizer", "copy tokenizer.json")
    assert not out.exists()


def test_unreadable_tokenizer_is_refused(model: Path, text: Path, out: Path) -> None:
    (model / "tokenizer.json").write_text("{")
    refused(quantize(model, out, calibration=text), CHECKPOINT, "the tokenizer in", "copy tokenizer.json")
    assert not out.exists()
