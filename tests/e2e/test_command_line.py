"""The commands on a tiny model: results on stdout, everything else on stderr."""

import io
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from rich.console import Console
from safetensors.torch import load_file

from llmq import __version__
from llmq.cli.progress import ProgressDisplay
from llmq.cli.terminal import print_notes
from llmq.config import QuantConfig
from llmq.numerics.scheme import WeightScheme
from llmq.report.events import Planned, Progress
from tests import builders
from tests.command_line import ROOT, environment, llmq, llmq_process

LINEARS = 7  # per block of a Llama
BLOCKS = 2


@pytest.fixture(scope="module")
def model(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint("llama", num_hidden_layers=BLOCKS)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return builders.write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def calibration(text: Path) -> tuple[str | Path, ...]:
    return ("--calibration", text, "--samples", "8", "--seqlen", "32")


@pytest.fixture(scope="module")
def quantized(model: Path, calibration: tuple[str | Path, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quantized") / "out"
    assert llmq("quantize", model, out, *calibration, "--group-size", "32").exit_code == 0
    return out


# ---- quantize


def test_quantize_prints_results_on_stdout_progress_on_stderr(
    model: Path, calibration: tuple[str | Path, ...], tmp_path: Path
) -> None:
    done = llmq("quantize", model, tmp_path / "out", *calibration, "--group-size", "32")
    assert done.exit_code == 0
    progress = [line for line in done.stderr.splitlines() if line.startswith("block ")]
    assert [line.split()[1:3] for line in progress] == [["1/2", "model.layers.0"], ["2/2", "model.layers.1"]]
    assert all("largest error" in line for line in progress)
    assert done.stderr.splitlines()[-1].startswith("done in ")
    assert "\x1b" not in done.stderr + done.stdout  # no colors and no cursor movement
    assert "block " not in done.stdout
    for figure in ("layers quantized", "bits per weight, with scales", "size of weights", "peak memory", "output"):
        assert figure in done.stdout
    assert str(tmp_path / "out") in done.stdout


def test_a_terminal_gets_one_bar_with_the_layer_error(
    model: Path, calibration: tuple[str | Path, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=160)
    monkeypatch.setattr("llmq.cli.progress.messages", lambda: console)
    done = llmq("quantize", model, tmp_path / "out", *calibration, "--method", "gptq", "--group-size", "32", "--json")
    assert json.loads(done.stdout)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert "ETA" in shown
    assert re.search(r"model\.layers\.1\.mlp\.down_proj  error \d+\.\d\d% \(rtn \d+\.\d\d%\)", shown)
    assert "block 1/2" not in done.stderr


def test_quiet_shows_no_progress(model: Path, calibration: tuple[str | Path, ...], tmp_path: Path) -> None:
    done = llmq("quantize", model, tmp_path / "out", *calibration, "--method", "gptq", "--group-size", "32", "--quiet")
    assert [line for line in done.stderr.splitlines() if not line.startswith(("note:", "done in"))] == []
    assert "layers quantized" in done.stdout


def test_the_log_has_all_events_and_how_far_the_job_is(
    model: Path, calibration: tuple[str | Path, ...], tmp_path: Path
) -> None:
    log = tmp_path / "log.jsonl"
    options = ("--group-size", "32", "--quiet", "--log-json", log)
    assert llmq("quantize", model, tmp_path / "out", *calibration, *options).exit_code == 0
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    stages = dict.fromkeys(line["stage"] for line in lines)
    written = "text written by the model"
    assert list(stages) == ["", "float model checked", written, "token weights", "quantizing", "block tuning", "saving"]
    assert {line["event"] for line in lines} == {"Planned", "Progress", "TextRead", "LayerReport", "BlockReport"}
    fractions = [line["fraction"] for line in lines]
    assert fractions == sorted(fractions) and fractions[-1] > 0.9
    layers = [line for line in lines if line["event"] == "LayerReport"]
    assert len(layers) == BLOCKS * LINEARS and all(
        0 < line["output_error"] <= 1.5 * line["rtn_error"] for line in layers
    )


def test_a_log_that_cannot_be_written_is_an_error(model: Path, tmp_path: Path) -> None:
    done = llmq("verify", model, "--log-json", tmp_path / "missing" / "log.jsonl")
    assert done.exit_code == 7 and "log.jsonl cannot be written" in done.stderr


def test_lines_are_printed_every_few_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("llmq.cli.progress.time.monotonic", lambda: now)
    display = ProgressDisplay()
    display(Planned({"reading": 1.0}))
    for done in range(1000):
        now = done / 10
        display(Progress("reading", done, 1000, "tensors", f"tensor {done}"))
    lines = capsys.readouterr().err.splitlines()
    assert 15 <= len(lines) <= 20 and "reading 950/1000 tensors  tensor 950" in lines[-1]


def test_messages_and_the_bar_are_never_on_one_line() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80)
    with mock.patch("llmq.cli.progress.messages", lambda: console), ProgressDisplay() as display:
        display(Planned({"reading": 1.0}))
        display(Progress("reading", 1, 2, "tensors"))
        print_notes(["a note"])
        display(Progress("reading", 2, 2, "tensors"))
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", screen.getvalue())
    assert "note: a note" in shown.splitlines()


def test_quantize_as_json(model: Path, calibration: tuple[str | Path, ...], tmp_path: Path) -> None:
    done = llmq("quantize", model, tmp_path / "out", *calibration, "--group-size", "32", "--json")
    report = json.loads(done.stdout)
    assert "block 1/2" in done.stderr
    assert sum(len(block["layers"]) for block in report["blocks"]) == BLOCKS * LINEARS
    assert report["settings"]["method"] == "balanced"
    assert report["settings"]["scheme"] == {"bits": 4, "group_size": 32, "symmetric": True}
    assert report["bits_per_weight"] == pytest.approx(4 + 32 / 32, abs=0.5)  # scales in float32, and shapes
    assert report["calibration"]["tokens"] == 8 * 32
    assert report == json.loads((tmp_path / "out" / "llmq.json").read_text())


def test_the_output_has_a_default_name(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert llmq("quantize", model, "--method", "rtn", "--bits", "3").exit_code == 0
    assert [entry.name for entry in tmp_path.iterdir()] == [f"{model.name}-rtn-3bit"]


def test_quantize_reports_deviations_from_the_settings(
    model: Path, calibration: tuple[str | Path, ...], tmp_path: Path
) -> None:
    done = llmq(
        "quantize", model, tmp_path / "out", *calibration, "--samples", "1000"
    )  # group size 128, hidden size 32
    notes = [line for line in done.stderr.splitlines() if line.startswith("note:")]
    assert any("32 instead of 128" in note and "and 11 more" in note for note in notes)  # all but down_proj
    assert any("64 instead of 128" in note and "down_proj" in note for note in notes)
    assert any("sequences instead of 1000: the text is too short" in note for note in notes)


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
@pytest.mark.parametrize("layout", ["compressed-tensors", "gptq", "awq"])
def test_every_method_writes_every_format(
    method: str, layout: str, model: Path, calibration: tuple[str | Path, ...], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = ("--method", method, "--format", layout, "--group-size", "16", "--samples", "4")
    assert llmq("quantize", model, out, *calibration, *options).exit_code == 0
    inspected = json.loads(llmq("inspect", out, "--json").stdout)
    assert inspected["format"] == layout
    assert sum(layer["scheme"] == "int4 g16 symmetric" or layout == "awq" for layer in inspected["layers"]) >= 14
    assert inspected["provenance"]["method"] == method


def test_the_same_command_writes_the_same_bytes(
    model: Path, quantized: Path, calibration: tuple[str | Path, ...], tmp_path: Path
) -> None:
    assert llmq("quantize", model, tmp_path / "out", *calibration, "--group-size", "32").exit_code == 0
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (quantized / name).read_bytes(), name


def test_skips_and_overrides_reach_the_layers(model: Path, tmp_path: Path) -> None:
    options = (
        "--skip",
        r"re:layers\.0\.",
        "--override",
        "*_proj:bits=8",
        "--override",
        "down_proj:bits=2,group_size=16",
    )
    assert llmq("quantize", model, tmp_path / "out", "--method", "rtn", "--group-size", "32", *options).exit_code == 0
    layers = json.loads(llmq("inspect", tmp_path / "out", "--json").stdout)["layers"]
    grids = {layer["name"]: layer["scheme"] for layer in layers}
    assert grids["model.layers.0.mlp.up_proj"] is None
    assert grids["model.layers.1.mlp.up_proj"] == "int8 g32 symmetric"
    assert grids["model.layers.1.mlp.down_proj"] == "int2 g16 symmetric"
    assert grids["lm_head"] is None


def test_unquantized_tensors_are_copied_exactly(model: Path, quantized: Path) -> None:
    before, after = load_file(model / "model.safetensors"), load_file(quantized / "model.safetensors")
    kept = [name for name in before if "proj" not in name]
    assert len(kept) == 3 + 2 * BLOCKS  # embedding, last norm, head; two norms per block
    assert all(after[name].equal(before[name]) and after[name].dtype == before[name].dtype for name in kept)
    assert not any(name.endswith("proj.weight") for name in after)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (quantized / name).read_bytes() == (model / name).read_bytes(), name


# ---- dry runs and settings


def test_a_dry_run_writes_nothing_and_needs_no_text(model: Path, tmp_path: Path) -> None:
    done = llmq("quantize", model, tmp_path / "out", "--group-size", "64", "--dry-run")
    assert (done.exit_code, done.stderr) == (0, "")
    assert not (tmp_path / "out").exists()
    assert re.search(r"model\.layers\.\*\.mlp\.down_proj *│ *2 │ *32 x 64", done.stdout)  # a row for both blocks
    assert "int4 g64 symmetric" in done.stdout
    assert "32 instead of 64" in done.stdout
    assert "kept in float: model.embed_tokens, lm_head" in done.stdout
    assert "size of weights" in done.stdout


def test_a_dry_run_as_json_matches_the_run(model: Path, tmp_path: Path) -> None:
    arguments = ("quantize", model, tmp_path / "out", "--method", "rtn", "--group-size", "32", "--json")
    plan = json.loads(llmq(*arguments, "--dry-run").stdout)
    report = json.loads(llmq(*arguments).stdout)
    planned = {layer["name"]: layer["scheme"] for layer in plan["layers"]}
    assert planned == {layer["name"]: layer["scheme"] for block in report["blocks"] for layer in block["layers"]}
    assert plan["left"] == report["left"]
    small = 24 * len(planned)  # the shape of each weight (two int64), and rounding of divisions by 8
    assert plan["bytes"] == pytest.approx(report["file_bytes"], abs=small)


def test_print_config_is_a_file_that_config_reads(tmp_path: Path) -> None:
    options = (
        "--bits", "3", "--asymmetric", "--group-size", "channel", "--skip", "lm_head", "--strict", "--seed", "7",
        "--override", "down_proj:bits=8", "--calibration", "a.txt", "--calibration", "b.txt", "--samples", "9",
    )  # fmt: skip
    first = llmq("quantize", "model", *options, "--print-config")
    assert (first.exit_code, first.stderr) == (0, "")
    settings = QuantConfig.model_validate(tomllib.loads(first.stdout))
    assert settings.scheme == WeightScheme(3, "channel", symmetric=False)
    assert settings.calibration.sources == ("a.txt", "b.txt")
    assert (settings.skip, settings.strict, settings.seed) == (("lm_head",), True, 7)
    (tmp_path / "quant.toml").write_text(first.stdout)
    again = llmq("quantize", "model", "--config", tmp_path / "quant.toml", "--print-config")
    assert again.stdout == first.stdout


def test_print_config_without_options_is_the_defaults() -> None:
    printed = llmq("quantize", "model", "--print-config").stdout
    assert QuantConfig.model_validate(tomllib.loads(printed)) == QuantConfig()


PRECEDENCE: list[tuple[str, tuple[str, ...], dict[str, Any]]] = [
    ("", (), {"bits": 4, "group_size": 128, "method": "balanced"}),
    ("method = 'rtn'\n[scheme]\nbits = 8", (), {"bits": 8, "group_size": 128, "method": "rtn"}),
    ("method = 'rtn'\n[scheme]\nbits = 8", ("--bits", "3"), {"bits": 3, "group_size": 128, "method": "rtn"}),
    ("[scheme]\ngroup_size = 64\nsymmetric = false", ("--symmetric",), {"group_size": 64, "symmetric": True}),
    ("strict = true", (), {"strict": True}),
    ("[calibration]\nsamples = 3\nsources = ['x.txt']", ("--samples", "5"), {"samples": 5, "sources": ["x.txt"]}),
    ("skip = ['a']\nseed = 1", ("--skip", "b"), {"skip": ["b"], "seed": 1}),
]


@pytest.mark.parametrize(("file", "flags", "expected"), PRECEDENCE, ids=range(len(PRECEDENCE)))
def test_flags_override_the_file_and_the_file_the_defaults(
    file: str, flags: tuple[str, ...], expected: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "quant.toml").write_text(file)
    done = llmq("quantize", "model", "--config", tmp_path / "quant.toml", *flags, "--print-config")
    settings = tomllib.loads(done.stdout)
    flat = {**settings, **settings["scheme"], **settings["calibration"]}
    assert {key: flat[key] for key in expected} == expected


# ---- eval, generate, inspect


def test_eval_compares_with_the_original(model: Path, quantized: Path, text: Path) -> None:
    done = llmq("eval", quantized, "--against", model, "--text", text, "--seqlen", "32", "--windows", "4")
    assert done.exit_code == 0
    assert "evaluating" in done.stderr  # the first line; later ones are seconds apart
    for column in ("perplexity", "KL mean", "same top-1", str(model), str(quantized)):
        assert column in done.stdout


def test_eval_as_json(model: Path, quantized: Path, text: Path) -> None:
    done = llmq("eval", quantized, "--against", model, "--text", text, "--seqlen", "32", "--windows", "4", "--json")
    result = json.loads(done.stdout)
    assert result["windows"] == 4
    assert result["model"]["tokens"] == 4 * 31
    assert result["model"]["kl_mean"] > 0
    assert result["original"]["kl_mean"] is None
    assert result["size"]["file_bytes"] < result["original_size"]["file_bytes"]
    alone = json.loads(llmq("eval", model, "--text", text, "--seqlen", "32", "--windows", "4", "--json").stdout)
    assert alone["model"] == result["original"]


def test_a_model_is_equal_to_itself(model: Path, text: Path) -> None:
    done = llmq("eval", model, "--against", model, "--text", text, "--seqlen", "32", "--windows", "2", "--json")
    figures = json.loads(done.stdout)["model"]
    assert (figures["kl_mean"], figures["same_top_1"]) == (0, 1)


@pytest.mark.parametrize("which", ["model", "quantized"])
def test_generate_prints_the_text_and_the_speed(which: str, request: pytest.FixtureRequest) -> None:
    done = llmq("generate", request.getfixturevalue(which), "--prompt", "abc def", "--max-tokens", "6")
    assert done.exit_code == 0
    assert done.stdout.startswith("abc def")
    assert "tokens per second" in done.stderr
    assert "tokens per second" not in done.stdout


def test_generate_samples_by_the_seed(quantized: Path) -> None:
    arguments = ("generate", quantized, "--prompt", "abc", "--max-tokens", "12", "--temperature", "1.5")
    first, second, third = (llmq(*arguments, "--seed", seed).stdout for seed in ("1", "1", "2"))
    assert first == second
    assert first != third
    assert llmq(*arguments[:-2]).stdout == llmq(*arguments[:-2], "--seed", "9").stdout  # greedy ignores seeds


def test_inspect_shows_grids_sizes_and_provenance(model: Path, quantized: Path, text: Path) -> None:
    done = llmq("inspect", quantized)
    assert done.exit_code == 0
    assert re.fullmatch(r"note: 256 calibration tokens are few .*\n", done.stderr)
    for part in ("model.layers.0.self_attn.q_proj", "int4 g32 symmetric", "compressed-tensors", str(model), text.name):
        assert part in done.stdout


def test_inspect_as_json_adds_up(quantized: Path) -> None:
    inspected = json.loads(llmq("inspect", quantized, "--json").stdout)
    packed = [layer for layer in inspected["layers"] if layer["scheme"]]
    assert len(packed) == BLOCKS * LINEARS
    assert all(0 < layer["error"] < 0.2 for layer in packed)
    weights = sum(layer["out_features"] * layer["in_features"] for layer in packed)
    assert inspected["bits_per_weight"] == pytest.approx(8 * sum(layer["nbytes"] for layer in packed) / weights)
    tensors = load_file(quantized / "model.safetensors")
    assert inspected["file_bytes"] == sum(tensor.nbytes for tensor in tensors.values())


def test_inspect_of_a_float_model(model: Path) -> None:
    inspected = json.loads(llmq("inspect", model, "--json").stdout)
    assert inspected["format"] is None
    assert {layer["dtype"] for layer in inspected["layers"]} == {"float32"}


# ---- help and installation

QUANTIZE_OPTIONS = (
    "--method", "--bits", "--group-size", "--symmetric", "--asymmetric", "--format", "--calibration", "--samples",
    "--seqlen", "--order", "--scales", "--damping", "--strict", "--rotate", "--seed", "--skip", "--override",
    "--config", "--print-config", "--device", "--dry-run", "--revision", "--trust-remote-code", "--overwrite", "--json",
)  # fmt: skip


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # otherwise the help is wrapped at the terminal's width


@pytest.mark.usefixtures("wide")
def test_help_lists_the_commands() -> None:
    done = llmq("--help")
    assert done.exit_code == 0
    assert all(command in done.stdout for command in ("quantize", "eval", "generate", "inspect", "--version"))


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("option", QUANTIZE_OPTIONS)
def test_help_of_quantize_has_every_option(option: str) -> None:
    words = llmq("quantize", "--help").stdout.replace(",", " ").replace("/", " ").split()
    assert option in words


@pytest.mark.usefixtures("wide")
def test_help_of_quantize_explains_the_options() -> None:
    shown = llmq("quantize", "--help").stdout
    for part in (
        "[rtn|gptq|awq|fast|balanced|best]", "[2|3|4|5|6|7|8|nvfp4|mxfp4|fp8|fp8-block]", "[auto|cpu|cuda[:N]]",
        "default: balanced", "Examples:",
        "Exit codes:", "See also:", "Quantization", "Calibration", "General",
    ):  # fmt: skip
        assert part in shown, part
    assert "Exit codes:" in llmq("sensitivity", "--help").stdout


def test_the_shell_completes_options_and_their_choices() -> None:
    def completed(words: str) -> set[str]:
        asked = {"_LLMQ_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        program = "from llmq.cli import app; app(prog_name='llmq')"
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment(**asked), capture_output=True, text=True, timeout=120
        )
        return set(done.stdout.split())

    assert completed("llmq quantize model --method ba") == {"balanced"}
    assert completed("llmq quantize model --group-size 1") == {"16", "128", "1024"}
    assert "--target-bits" in completed("llmq quantize model --ta")
    assert "--install-completion" in llmq("--help").stdout


@pytest.mark.usefixtures("wide")
def test_help_explains_interruption_and_resume() -> None:
    shown = " ".join(llmq("quantize", "--help").stdout.split())
    assert "the same command reports that it has finished already" in shown


def test_version_is_printed() -> None:
    assert llmq("--version").stdout == f"llmq {__version__}\n"


@pytest.mark.slow
def test_a_checkout_runs_with_its_own_kernels(model: Path, tmp_path: Path) -> None:
    """`python -m llmq` from the root, with another llmq_kernels on the path, as if it was installed."""
    installed = tmp_path / "installed" / "llmq_kernels"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("raise SystemExit('the wrong kernels')\n")
    arguments = ("quantize", model, tmp_path / "out", "--method", "rtn", "--group-size", "32", "--json")
    done = llmq_process(*arguments, cwd=ROOT, PYTHONPATH=str(installed.parent))
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["output"] == str(tmp_path / "out")
    lines = [line for line in done.stderr.splitlines() if line.startswith(("loading", "block", "done", "error"))]
    assert [line.split()[0] for line in lines] == ["loading", "block", "block", "done"]
