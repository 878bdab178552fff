"""Models measured block by block, beside what transformers says of them as a whole."""

import json
import math
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
from llmq.evaluation.scoring import Evaluation, read_windows, score, summary
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
    """The same figures from models that are in memory, as `llmq.load` gives them."""
    (model, tokenizer), (reference, _) = (llmq.load(each, device="cpu") for each in (path, original))
    windows = read_windows(str(text), tokenizer, SIZE["seqlen"], limit=SIZE["limit"])
    with torch.inference_mode():
        predicted, expected = (network(input_ids=windows).logits for network in (model, reference))
    return summary(score(predicted, windows, expected))


def agree(found: Evaluation, expected: Evaluation) -> None:
    """To rounding: logits of a few units differ by some hundred epsilons of float32, and so do their probabilities."""
    for name in FIGURES:
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-3, abs=1e-5), name


# ---- block by block is as a whole


@pytest.mark.parametrize("name", ["llama", "gemma3n", "falcon"])
def test_a_model_block_by_block_has_the_figures_that_it_has_as_a_whole(
    name: str, checkpoint: Checkpoints, text: Path, tmp_path: Path
) -> None:
    original = checkpoint(name)
    out = rtn(original, tmp_path / "out")
    found = measure(out, original, text, **SIZE)
    assert found.notes == ()
    assert found.model.kl_mean is not None and found.model.kl_mean > 1e-3
    agree(found.model, as_a_whole(out, original, text))
    assert found.original is not None
    assert found.original.perplexity == pytest.approx(as_a_whole(original, original, text).perplexity, rel=1e-4)


def test_batches_and_heads_of_any_size_give_the_same_figures(
    llama: Path, packed: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = measure(packed, llama, text, **SIZE).model
    monkeypatch.setattr(memory, "TOKENS_PER_BATCH_TO_EVALUATE", 4 * 32)  # six windows: four and two
    monkeypatch.setattr(streaming, "LOGITS_BYTES", 3 * 32 * 4 * builders.VOCABULARY)  # of the four: three and one
    agree(measure(packed, llama, text, **SIZE).model, expected)


def test_where_hidden_states_do_not_fit_the_text_is_taken_in_parts(
    llama: Path, packed: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = measure(packed, llama, text, **SIZE)
    runs = recorded_runs(monkeypatch)
    monkeypatch.setattr(streaming.Streamed, "_working_bytes", lambda *_: 0)
    room = 2 * (4 * 32 * 4 * 32)  # for both models: four windows of 32 tokens, 32 float32 each
    monkeypatch.setattr(memory, "spare", lambda _: room)
    found = measure(packed, llama, text, **SIZE)
    assert runs == [(llama.name, 4), ("out", 4), (llama.name, 2), ("out", 2)]
    [note] = found.notes
    assert "6 sequences do not fit" in note and "2 times" in note
    agree(found.model, expected.model)


def test_a_model_alone_may_use_all_the_room(llama: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = recorded_runs(monkeypatch)
    monkeypatch.setattr(streaming.Streamed, "_working_bytes", lambda *_: 0)
    monkeypatch.setattr(memory, "spare", lambda _: 5 * 32 * 4 * 32)
    measure(llama, None, text, **SIZE)
    assert runs == [(llama.name, 5), (llama.name, 1)]


def recorded_runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(folder, windows) of each walk through a model's blocks, from now on."""
    runs: list[tuple[str, int]] = []
    folders: dict[int, str] = {}

    def opened(checkpoint: Any, *arguments: Any, **options: Any) -> Any:
        skeleton = open_skeleton(checkpoint, *arguments, **options)
        folders[id(skeleton)] = checkpoint.folder.name
        return skeleton

    def walked(skeleton: Any, text: Text, storage: Storage, **options: Any) -> Stream:
        runs.append((folders[id(skeleton)], text.sequences))
        return run_through(skeleton, text, storage, **options)

    monkeypatch.setattr("llmq.evaluation.streaming.open_skeleton", opened)
    monkeypatch.setattr("llmq.evaluation.streaming.run_through", walked)
    return runs


# ---- several models, several texts


def test_the_original_runs_once_for_several_models(
    llama: Path, packed: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    coarse = rtn(llama, tmp_path / "coarse", bits=2)
    expected = [measure(each, llama, text, **SIZE) for each in (packed, coarse)]
    runs = recorded_runs(monkeypatch)
    found = measure_many(llama, [packed, coarse], text, **SIZE)
    assert runs == [(llama.name, 6), ("out", 6), ("coarse", 6)]
    assert found == expected
    assert found[0].size.file_bytes != found[1].size.file_bytes


def test_one_model_at_a_time_is_in_memory(
    llama: Path, packed: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[weakref.ref[Any]] = []

    def watched(*arguments: Any, **options: Any) -> Any:
        assert [alive() is None for alive in opened[1:]] == [True] * len(opened[1:])  # the first is the original
        skeleton = open_skeleton(*arguments, **options)
        opened.append(weakref.ref(skeleton))
        return skeleton

    monkeypatch.setattr("llmq.evaluation.streaming.open_skeleton", watched)
    measure_many(llama, [packed, packed, packed], text, **SIZE)
    assert len(opened) == 4


@pytest.mark.parametrize("vocabulary", [128, 300])
def test_models_with_other_vocabularies_are_refused(llama: Path, text: Path, tmp_path: Path, vocabulary: int) -> None:
    """They would be measured on the tokens of the first model's tokenizer."""
    other = tmp_path / "other"
    builders.save_model(other, builders.causal_model(builders.llama(vocab_size=vocabulary)))
    for original, models in ((llama, [other]), (None, [llama, other])):
        with pytest.raises(UnsupportedModelError, match=f"vocabularies of {vocabulary} and"):
            measure_many(original, models, text, **SIZE)


def test_each_text_has_its_figures_and_all_have_a_total(
    llama: Path, packed: Path, text: Path, other_text: Path
) -> None:
    found = measure(packed, llama, [text, other_text], seqlen=32)
    alone = [measure(packed, llama, each, seqlen=32) for each in (text, other_text)]
    assert [figures.text for figures in found.texts] == [str(text), str(other_text)]
    for figures, expected in zip(found.texts, alone, strict=True):
        assert figures.windows == expected.total.windows
        agree(figures.model, expected.model)
    windows = [figures.windows for figures in found.texts]
    assert windows[0] != windows[1] and found.total.windows == sum(windows)
    sums = [figures.windows * (figures.model.kl_mean or 0) for figures in found.texts]
    assert found.model.kl_mean == pytest.approx(sum(sums) / sum(windows))
    assert found.original is not None
    assert found.model.perplexity_ratio == pytest.approx(found.model.perplexity / found.original.perplexity)


# ---- models that cannot be taken apart


def test_blocks_that_share_keys_are_measured_as_a_whole(checkpoint: Checkpoints, text: Path, tmp_path: Path) -> None:
    sharing = checkpoint("gemma3n", num_kv_shared_layers=1)
    out = rtn(sharing, tmp_path / "out")
    found = measure(out, sharing, text, **SIZE)
    assert len(found.notes) == 2 and all("share the keys" in note and "as a whole" in note for note in found.notes)
    assert found.model == as_a_whole(out, sharing, text)


def test_stacked_experts_are_measured_block_by_block(text: Path, tmp_path: Path) -> None:
    sizes = {"intermediate_size": 32, "num_local_experts": 2, "num_hidden_layers": 1}
    model = builders.causal_model(MixtralConfig(**{**builders.GROUPED, **sizes}))
    assert isinstance(model, MixtralForCausalLM)
    experts = builders.save_model(tmp_path / "model", model)
    found = measure(experts, experts, text, **SIZE)
    assert not any("as a whole" in note for note in found.notes)
    assert (found.model.kl_mean, found.model.perplexity_ratio) == (0, 1)
    assert found.original is not None
    assert found.original.perplexity == pytest.approx(as_a_whole(experts, experts, text).perplexity, rel=1e-6)


# ---- limits


def test_limits_hold_for_each_text(llama: Path, packed: Path, text: Path, other_text: Path) -> None:
    found = measure(packed, llama, [text, other_text], **SIZE)
    kl = [figures.model.kl_mean or 0 for figures in found.texts]
    rise = [100 * ((figures.model.perplexity_ratio or 0) - 1) for figures in found.texts]
    assert max(kl) != min(kl) and max(rise) != min(rise)
    require({"out": found}, max_kl=max(kl), max_ppl_increase=max(rise))
    for limits in ({"max_kl": (min(kl) + max(kl)) / 2}, {"max_ppl_increase": (min(rise) + max(rise)) / 2}):
        with pytest.raises(QualityError) as caught:
            require({"out": found}, **limits)
        assert (str(text) in str(caught.value)) != (str(other_text) in str(caught.value))


def command(packed: Path, llama: Path, *more: str | Path) -> Outcome:
    return run_llmq("eval", packed, "--against", llama, "--seqlen", "32", "--windows", "6", *more)


def test_a_limit_that_is_exceeded_has_an_exit_code_after_the_report(llama: Path, packed: Path, text: Path) -> None:
    for limit in (("--max-kl", "1e-9"), ("--max-ppl-increase", "0%")):
        done = command(packed, llama, "--text", text, *limit)
        assert done.exit_code == 8
        assert "KL mean" in done.stdout and "RMS Δp" in done.stdout
        assert "error: " in done.stderr and str(text) in done.stderr
    done = command(packed, llama, "--text", text, "--max-kl", "1e-9", "--json")
    assert done.exit_code == 8 and json.loads(done.stdout)["model"]["kl_mean"] > 1e-9


def test_limits_that_are_kept_pass_in_silence(llama: Path, packed: Path, text: Path) -> None:
    done = command(packed, llama, "--text", text, "--max-kl", "50", "--max-ppl-increase", "1000%")
    assert done.exit_code == 0
    assert all(line.startswith("evaluating ") for line in done.stderr.splitlines())  # progress, and nothing else


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
def test_a_limit_that_is_no_percentage(percentage: str, llama: Path, packed: Path, text: Path) -> None:
    refused(
        command(packed, llama, "--text", text, f"--max-ppl-increase={percentage}"),
        CONFIG,
        "is not a percentage",
        "2 or 2%",
    )


def test_the_command_shows_each_text_and_all_together(llama: Path, packed: Path, text: Path, other_text: Path) -> None:
    done = command(packed, llama, "--text", text, "--text", other_text)
    assert done.exit_code == 0
    for shown in (str(llama), str(packed), text.name, other_text.name, "2 texts", "KL 99.9 %", "RMS Δp", "ratio"):
        assert shown in done.stdout
    found = json.loads(command(packed, llama, "--text", text, "--text", other_text, "--json").stdout)
    assert [each["text"] for each in found["texts"]] == [str(text), str(other_text)]
    assert found["texts"][0]["model"]["kl_mean_interval"][0] < found["texts"][0]["model"]["kl_mean"]
    assert found["text"] == "2 texts" and found["windows"] == sum(each["windows"] for each in found["texts"])


def test_a_model_alone_has_no_lines_of_a_comparison(llama: Path, text: Path) -> None:
    done = run_llmq("eval", llama, "--text", text, "--seqlen", "32", "--windows", "2")
    assert done.exit_code == 0
    assert "perplexity" in done.stdout
    assert not any(word in done.stdout for word in ("KL", "original", "top-1"))


def test_a_model_read_as_a_whole_is_noted_in_a_line(checkpoint: Checkpoints, text: Path) -> None:
    done = run_llmq("eval", checkpoint("gemma3n", num_kv_shared_layers=1), "--text", text, "--windows", "1")
    [line] = done.stderr.splitlines()
    assert done.exit_code == 0 and line.startswith("note: ") and "as a whole" in line


# ---- memory

PROGRAM = """
import json, resource, sys
from pathlib import Path
import torch
from llmq.evaluation.measure import measure
torch.set_num_threads(1)
tiny, many, text, allowed = *sys.argv[1:4], int(sys.argv[4])
measure(tiny, tiny, text, seqlen=32, limit=2, device="cpu")  # imports whatever is imported late
lines = Path("/proc/self/status").read_text().splitlines()
limit = allowed + next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmSize:"))
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
found = measure(many, many, text, seqlen=32, limit=2, device="cpu")
try:
    torch.empty(allowed, dtype=torch.uint8)
    limited = False
except RuntimeError:
    limited = True
print(json.dumps([found.to_dict(), limited]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and a limit on address space that is enforced")
def test_a_model_larger_than_memory_is_measured_beside_another(
    checkpoint: Checkpoints, tmp_path: Path, text: Path
) -> None:
    many = write_checkpoint(tmp_path / "many", MANY)
    assert sum(file.stat().st_size for file in many.glob("layer-*")) > ALLOWED_BYTES + 2 * BLOCK_BYTES
    arguments = [str(each) for each in (checkpoint("llama", num_hidden_layers=1), many, text, ALLOWED_BYTES)]
    exact = environment(MALLOC_MMAP_THRESHOLD_="100000")  # whatever is freed leaves the process
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, *arguments],
        cwd=ROOT, env=exact, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found, limited = json.loads(done.stdout.splitlines()[-1])
    assert limited
    assert (found["windows"], found["notes"]) == (2, [])
    assert (found["model"]["kl_mean"], found["model"]["same_top_1"]) == (0, 1)
    assert 1 < found["original"]["perplexity"] < math.inf
