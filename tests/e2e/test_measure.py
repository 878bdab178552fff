"""Block-by-block evaluation, compared with transformers running the whole model."""

import json
import math
import re
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

import llmq
from llmq import memory
from llmq.errors import QualityError, UnsupportedModelError
from llmq.evaluation import streaming
from llmq.evaluation.measure import measure, measure_many, require
from llmq.evaluation.scoring import score
from llmq.evaluation.summary import Evaluation, summary
from llmq.evaluation.texts import read_text
from llmq.model.passes.forward import run_through
from llmq.model.passes.hidden_states import Storage
from llmq.model.passes.streams import Stream, Text
from llmq.runtime.open_skeleton import open_skeleton
from tests import builders
from tests.command_line import ROOT, Outcome, environment
from tests.command_line import llmq as run_llmq
from tests.e2e.test_memory import ALLOWED_BYTES, BLOCK_BYTES, MANY, write_checkpoint
from tests.faults.refusals import CONFIG, refused

Checkpoints = Callable[..., Path]
SIZE: dict[str, Any] = {"seqlen": 32, "limit": 6}
FIGURES = ("perplexity", "perplexity_ratio", "kl_mean", "kl_median", "kl_99", "kl_999", "same_top_1", "rms_dp")


@pytest.fixture(scope="module")
def llama(checkpoint: Checkpoints) -> Path:
    return checkpoint("llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def packed(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rtn(llama, tmp_path_factory.mktemp("packed") / "out")


@pytest.fixture(scope="module")
def other_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return builders.write_text(tmp_path_factory.mktemp("text") / "other.txt", characters=300, seed=1)


def rtn(model: Path, out: Path, **settings: Any) -> Path:
    llmq.quantize(model, out, method="rtn", group_size=16, scales="minmax", device="cpu", **settings)
    return out


def as_a_whole(path: Path, original: Path, text: Path) -> Evaluation:
    """Evaluate whole models in memory, loaded by `llmq.load`."""
    (model, tokenizer), (reference, _) = (llmq.load(folder, device="cpu") for folder in (path, original))
    windows = read_text(str(text), tokenizer, SIZE["seqlen"], limit=SIZE["limit"]).windows
    with torch.inference_mode():
        predicted, expected = (network(input_ids=windows).logits for network in (model, reference))
    return summary(score(predicted, windows, expected))


def agree(evaluation: Evaluation, expected: Evaluation) -> None:
    """Compare up to rounding: logits and probabilities differ by some hundred epsilons of float32."""
    for name in FIGURES:
        assert getattr(evaluation, name) == pytest.approx(getattr(expected, name), rel=1e-3, abs=1e-5), name


# ---- block by block compared with the whole model


@pytest.mark.parametrize("name", ["llama", "gemma3n", "falcon"])
def test_streamed_evaluation_equals_the_whole_model(
    name: str, checkpoint: Checkpoints, text: Path, tmp_path: Path
) -> None:
    original = checkpoint(name)
    out = rtn(original, tmp_path / "out")
    evaluation = measure(out, original, text, **SIZE)
    assert evaluation.notes == ()
    assert evaluation.model.kl_mean is not None and evaluation.model.kl_mean > 1e-3
    agree(evaluation.model, as_a_whole(out, original, text))
    assert evaluation.original is not None
    assert evaluation.original.perplexity == pytest.approx(as_a_whole(original, original, text).perplexity, rel=1e-4)


def test_results_do_not_depend_on_batch_sizes(
    llama: Path, packed: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = measure(packed, llama, text, **SIZE).model
    monkeypatch.setattr(memory, "TOKENS_PER_BATCH_TO_EVALUATE", 4 * 32)  # six sequences: four and two
    monkeypatch.setattr(streaming, "LOGITS_BYTES", 3 * 32 * 4 * builders.VOCABULARY)  # the four: three and one
    agree(measure(packed, llama, text, **SIZE).model, expected)


def test_text_is_split_where_hidden_states_do_not_fit(
    llama: Path, packed: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = measure(packed, llama, text, **SIZE)
    runs = recorded_runs(monkeypatch)
    monkeypatch.setattr(streaming.Streamed, "_working_bytes", lambda *_: 0)
    room = 2 * (4 * 32 * 4 * 32)  # for both models: four sequences of 32 tokens, 32 float32 each
    monkeypatch.setattr(memory, "spare", lambda _: room)
    evaluation = measure(packed, llama, text, **SIZE)
    assert runs == [(llama.name, 4), ("out", 4), (llama.name, 2), ("out", 2)]
    [note] = evaluation.notes
    assert "6 sequences do not fit" in note and "2 times" in note
    agree(evaluation.model, expected.model)


def test_a_model_without_original_may_use_all_memory(llama: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = recorded_runs(monkeypatch)
    monkeypatch.setattr(streaming.Streamed, "_working_bytes", lambda *_: 0)
    monkeypatch.setattr(memory, "spare", lambda _: 5 * 32 * 4 * 32)
    measure(llama, None, text, **SIZE)
    assert runs == [(llama.name, 5), (llama.name, 1)]


def recorded_runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(folder, sequences) of each following pass through the blocks of a model."""
    runs: list[tuple[str, int]] = []
    folders: dict[int, str] = {}

    def opened(checkpoint: Any, *arguments: Any, **options: Any) -> Any:
        skeleton = open_skeleton(checkpoint, *arguments, **options)
        folders[id(skeleton)] = checkpoint.folder.name
        return skeleton

    def recorded_run(skeleton: Any, text: Text, storage: Storage, **options: Any) -> Stream:
        runs.append((folders[id(skeleton)], text.sequences))
        return run_through(skeleton, text, storage, **options)

    monkeypatch.setattr("llmq.evaluation.streaming.open_skeleton", opened)
    monkeypatch.setattr("llmq.evaluation.streaming.run_through", recorded_run)
    return runs


# ---- several models, several texts


def test_the_original_runs_once_for_several_models(
    llama: Path, packed: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    coarse = rtn(llama, tmp_path / "coarse", bits=2)
    expected = [measure(model, llama, text, **SIZE) for model in (packed, coarse)]
    runs = recorded_runs(monkeypatch)
    evaluations = measure_many(llama, [packed, coarse], text, **SIZE)
    assert runs == [(llama.name, 6), ("out", 6), ("coarse", 6)]
    assert evaluations == expected
    assert evaluations[0].size.file_bytes != evaluations[1].size.file_bytes


@pytest.mark.parametrize("compared", [True, False])
def test_models_are_in_memory_one_at_a_time(
    compared: bool, llama: Path, packed: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[weakref.ref[Any]] = []

    def checked_open(*arguments: Any, **options: Any) -> Any:
        assert [
            alive() for alive in opened[compared:] if alive() is not None
        ] == []  # an original comes first, and stays
        skeleton = open_skeleton(*arguments, **options)
        opened.append(weakref.ref(skeleton))
        return skeleton

    monkeypatch.setattr("llmq.evaluation.streaming.open_skeleton", checked_open)
    measure_many(llama if compared else None, [packed, packed, packed], text, **SIZE)
    assert len(opened) == 3 + compared


@pytest.mark.parametrize("vocabulary", [128, 300])
def test_models_with_different_vocabularies_are_refused(
    llama: Path, text: Path, tmp_path: Path, vocabulary: int
) -> None:
    """Otherwise all models would be measured on the tokens of the first tokenizer."""
    other = tmp_path / "other"
    builders.save_model(other, builders.causal_model(builders.llama(vocab_size=vocabulary)))
    for original, models in ((llama, [other]), (None, [llama, other])):
        with pytest.raises(UnsupportedModelError, match=f"vocabularies of {vocabulary} and"):
            measure_many(original, models, text, **SIZE)


def test_results_are_reported_per_text_and_in_total(llama: Path, packed: Path, text: Path, other_text: Path) -> None:
    evaluation = measure(packed, llama, [text, other_text], seqlen=32)
    alone = [measure(packed, llama, file, seqlen=32) for file in (text, other_text)]
    assert [figures.text for figures in evaluation.texts] == [str(text), str(other_text)]
    for figures, expected in zip(evaluation.texts, alone, strict=True):
        assert figures.windows == expected.total.windows
        agree(figures.model, expected.model)
    windows = [figures.windows for figures in evaluation.texts]
    assert windows[0] != windows[1] and evaluation.total.windows == sum(windows)
    sums = [figures.windows * (figures.model.kl_mean or 0) for figures in evaluation.texts]
    assert evaluation.model.kl_mean == pytest.approx(sum(sums) / sum(windows))
    assert evaluation.original is not None
    ratio = evaluation.model.perplexity / evaluation.original.perplexity
    assert evaluation.model.perplexity_ratio == pytest.approx(ratio)


# ---- models that cannot be run block by block


def test_blocks_that_share_keys_are_measured_as_a_whole(checkpoint: Checkpoints, text: Path, tmp_path: Path) -> None:
    sharing = checkpoint("gemma3n", num_kv_shared_layers=1)
    out = rtn(sharing, tmp_path / "out")
    evaluation = measure(out, sharing, text, **SIZE)
    notes = evaluation.notes
    assert len(notes) == 2 and all("share the keys" in note and "as a whole" in note for note in notes)
    assert evaluation.model == as_a_whole(out, sharing, text)


def test_stacked_experts_are_measured_block_by_block(text: Path, tmp_path: Path) -> None:
    sizes = {"intermediate_size": 32, "num_local_experts": 2, "num_hidden_layers": 1}
    model = builders.causal_model(MixtralConfig(**{**builders.GROUPED, **sizes}))
    assert isinstance(model, MixtralForCausalLM)
    experts = builders.save_model(tmp_path / "model", model)
    evaluation = measure(experts, experts, text, **SIZE)
    assert not any("as a whole" in note for note in evaluation.notes)
    assert (evaluation.model.kl_mean, evaluation.model.perplexity_ratio) == (0, 1)
    assert evaluation.original is not None
    assert evaluation.original.perplexity == pytest.approx(as_a_whole(experts, experts, text).perplexity, rel=1e-6)


# ---- limits


def test_limits_apply_to_each_text(llama: Path, packed: Path, text: Path, other_text: Path) -> None:
    evaluation = measure(packed, llama, [text, other_text], **SIZE)
    kl = [figures.model.kl_mean or 0 for figures in evaluation.texts]
    rise = [100 * ((figures.model.perplexity_ratio or 0) - 1) for figures in evaluation.texts]
    assert max(kl) != min(kl) and max(rise) != min(rise)
    require({"out": evaluation}, max_kl=max(kl), max_ppl_increase=max(rise))
    for limits in ({"max_kl": (min(kl) + max(kl)) / 2}, {"max_ppl_increase": (min(rise) + max(rise)) / 2}):
        with pytest.raises(QualityError) as caught:
            require({"out": evaluation}, **limits)
        assert (str(text) in str(caught.value)) != (str(other_text) in str(caught.value))


def command(packed: Path, llama: Path, *more: str | Path) -> Outcome:
    return run_llmq("eval", packed, "--against", llama, "--seqlen", "32", "--windows", "6", *more)


def test_an_exceeded_limit_sets_the_exit_code_after_the_report(llama: Path, packed: Path, text: Path) -> None:
    for limit in (("--max-kl", "1e-9"), ("--max-ppl-increase", "0%")):
        done = command(packed, llama, "--text", text, *limit)
        assert done.exit_code == 8
        assert "KL mean" in done.stdout and "RMS Δp" in done.stdout
        assert "error: " in done.stderr and str(text) in done.stderr
    done = command(packed, llama, "--text", text, "--max-kl", "1e-9", "--json")
    assert done.exit_code == 8 and json.loads(done.stdout)["model"]["kl_mean"] > 1e-9


def test_satisfied_limits_print_nothing(llama: Path, packed: Path, text: Path) -> None:
    done = command(packed, llama, "--text", text, "--max-kl", "50", "--max-ppl-increase", "1000%")
    assert done.exit_code == 0
    assert not re.search(r"^(error|note|warning|try):", done.stderr, re.MULTILINE)  # progress only


def test_several_models_are_shown_side_by_side(
    llama: Path, packed: Path, text: Path, other_text: Path, tmp_path: Path
) -> None:
    coarse = rtn(llama, tmp_path / "coarse", bits=2)
    done = command(packed, llama, coarse, "--text", text, "--text", other_text)
    assert done.exit_code == 0
    for shown in (text.name, other_text.name, "2 texts"):
        assert f"{shown}, sequences of 32 tokens" in " ".join(done.stdout.split())
    done = command(packed, llama, coarse, "--text", text, "--max-kl", "1e-9", "--json")
    models = json.loads(done.stdout)["models"]
    assert [model["path"] for model in models] == [str(packed), str(coarse)]
    assert done.exit_code == 8 and f"{coarse} on {text}" in done.stderr
    alone = json.loads(command(coarse, llama, "--text", text, "--json").stdout)
    assert models[1] == {"path": str(coarse), **alone}
    assert models[0]["model"]["kl_mean"] < models[1]["model"]["kl_mean"]


@pytest.mark.parametrize("limit", [("--max-kl", "1"), ("--max-ppl-increase", "2")])
def test_a_limit_needs_an_original(limit: tuple[str, str], llama: Path, text: Path) -> None:
    refused(run_llmq("eval", llama, "--text", text, *limit), CONFIG, "need an original model", "--against")


@pytest.mark.parametrize("percentage", ["much", "-1", "nan", "%"])
def test_an_invalid_percentage_is_refused(percentage: str, llama: Path, packed: Path, text: Path) -> None:
    refused(
        command(packed, llama, "--text", text, f"--max-ppl-increase={percentage}"),
        CONFIG,
        "is not a percentage",
        "2 or 2%",
    )


def test_the_command_shows_each_text_and_the_total(llama: Path, packed: Path, text: Path, other_text: Path) -> None:
    done = command(packed, llama, "--text", text, "--text", other_text)
    assert done.exit_code == 0
    for shown in (str(llama), str(packed), text.name, other_text.name, "2 texts", "KL 99.9 %", "RMS Δp", "ratio"):
        assert shown in done.stdout
    result = json.loads(command(packed, llama, "--text", text, "--text", other_text, "--json").stdout)
    assert [entry["text"] for entry in result["texts"]] == [str(text), str(other_text)]
    assert result["texts"][0]["model"]["kl_mean_interval"][0] < result["texts"][0]["model"]["kl_mean"]
    assert result["text"] == "2 texts" and result["windows"] == sum(entry["windows"] for entry in result["texts"])


def test_a_model_without_original_has_no_comparison(llama: Path, text: Path) -> None:
    done = run_llmq("eval", llama, "--text", text, "--seqlen", "32", "--windows", "2")
    assert done.exit_code == 0
    assert "perplexity" in done.stdout
    assert not any(word in done.stdout for word in ("KL", "original", "top-1"))


def test_a_model_that_cannot_be_streamed_is_noted(checkpoint: Checkpoints, text: Path) -> None:
    done = run_llmq("eval", checkpoint("gemma3n", num_kv_shared_layers=1), "--text", text, "--windows", "1")
    [line] = [line for line in done.stderr.splitlines() if line.startswith("note: ")]
    assert done.exit_code == 0 and "as a whole" in line


# ---- memory

PROGRAM = """
import json, resource, sys
from pathlib import Path
import torch
from llmq.evaluation.measure import measure
torch.set_num_threads(1)
tiny, many, text, allowed = *sys.argv[1:4], int(sys.argv[4])
measure(tiny, tiny, text, seqlen=32, limit=2, device="cpu")  # triggers late imports
lines = Path("/proc/self/status").read_text().splitlines()
limit = allowed + next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmSize:"))
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
evaluation = measure(many, many, text, seqlen=32, limit=2, device="cpu")
try:
    torch.empty(allowed, dtype=torch.uint8)
    limited = False
except RuntimeError:
    limited = True
print(json.dumps([evaluation.to_dict(), limited]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and a limit on address space that is enforced")
def test_a_model_larger_than_memory_is_compared_with_another(
    checkpoint: Checkpoints, tmp_path: Path, text: Path
) -> None:
    many = write_checkpoint(tmp_path / "many", MANY)
    assert sum(file.stat().st_size for file in many.glob("layer-*")) > ALLOWED_BYTES + 2 * BLOCK_BYTES
    arguments = [str(argument) for argument in (checkpoint("llama", num_hidden_layers=1), many, text, ALLOWED_BYTES)]
    exact = environment(MALLOC_MMAP_THRESHOLD_="100000")  # freed memory is returned to the system
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, *arguments],
        cwd=ROOT, env=exact, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    result, limited = json.loads(done.stdout.splitlines()[-1])
    assert limited
    assert (result["windows"], result["notes"]) == (2, [])
    assert (result["model"]["kl_mean"], result["model"]["same_top_1"]) == (0, 1)
    assert 1 < result["original"]["perplexity"] < math.inf
