"""What `llmq eval` reports in addition to the distance: floors, overlap, trajectories, differences between models."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import llmq
from llmq.evaluation.measure import measure
from llmq.evaluation.texts import read_text
from llmq.evaluation.trajectories import LENGTH, compared, prompts_of
from tests import builders
from tests.command_line import llmq as run_llmq
from tests.faults.refusals import CONFIG, refused

Checkpoints = Callable[..., Path]


@pytest.fixture(scope="module")
def llama(checkpoint: Checkpoints) -> Path:
    return checkpoint("llama", num_hidden_layers=1, max_position_embeddings=64)


@pytest.fixture(scope="module")
def coarse(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("coarse") / "out"
    llmq.quantize(llama, out, method="rtn", bits=3, group_size=16, scales="minmax", device="cpu")
    return out


@pytest.fixture(scope="module")
def calibrated(llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("calibrated") / "out"
    settings: dict[str, Any] = {
        "method": "gptq",
        "group_size": 16,
        "samples": 300,
        "validate": 0,
        "seqlen": 13,
        "packing": True,
    }
    llmq.quantize(llama, out, calibration=str(text), device="cpu", **settings)
    return out


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve documents of 50 to 72 tokens."""
    folder = tmp_path_factory.mktemp("stories")
    words = builders.write_text(folder / "words.txt", 2000, seed=5).read_text()
    rows = [{"text": words[100 * number : 100 * number + 49 + 2 * number]} for number in range(12)]
    (folder / "stories.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "stories.jsonl"


def test_everything_is_in_the_json(llama: Path, coarse: Path, calibrated: Path, text: Path, stories: Path) -> None:
    done = run_llmq(
        "eval", coarse, calibrated, "--against", llama, "--text", f"same={text}", "--text", f"stories={stories}",
        "--seqlen", "32", "--floors", "--trajectories", "9", "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    first, second = result["models"]
    assert [entry["text"] for entry in first["texts"]] == ["same", "stories"]
    assert first["texts"][1]["documents"]["unit"] == "documents" and len(first["texts"][1]["documents"]["kl"]) == 12
    assert first["worst"] in ("same", "stories")
    # The second model was calibrated on the first text, except for its last tokens.
    assert [entry["overlap"] for entry in first["texts"]] == [0.0, 0.0]  # rtn uses no text
    assert [entry["overlap"] > 0.9 for entry in second["texts"]] == [True, False]
    assert second["calibration"]["sources"] == [str(text)]
    batch, dtype, engine = first["floors"]
    assert first["floors"] == second["floors"] and batch["texts"][0]["documents"] is None
    assert max(floor["model"]["kl_max"] for floor in map(total_of, (batch, engine))) < 1e-5  # some epsilons of float32
    assert 1e-9 < total_of(dtype)["model"]["kl_mean"] < first["model"]["kl_mean"]
    assert [floor["name"].split()[0] for floor in (batch, dtype, engine)] == ["batches", "bfloat16", "transformers"]
    assert batch["trajectories"]["same"] == 1.0 and first["trajectories"]["prompts"] == 9
    assert [difference["text"] for difference in result["differences"]] == ["same", "stories", "2 texts"]
    total = result["differences"][-1]
    assert total["difference"] == pytest.approx(second["model"]["kl_mean"] - first["model"]["kl_mean"])
    assert total["difference"] < 0 and total["is_resolved"] and total["lower"] > total["higher"]


def total_of(floor: dict[str, Any]) -> dict[str, Any]:
    total: dict[str, Any] = floor["total"]
    return total


def test_tables_show_what_was_requested(llama: Path, coarse: Path, stories: Path) -> None:
    options = ("--floors", "--trajectories", "3", "--calibration", stories)
    done = run_llmq("eval", coarse, "--against", llama, "--text", f"s={stories}", "--seqlen", "32", *options)
    assert done.exit_code == 0, done.stderr
    for shown in (
        "12 documents",
        "KL maximum",
        "100.00%",
        "same trajectories",
        "floors",
        "bfloat16 instead of float32",
    ):
        assert shown in done.stdout, shown
    assert f"tokens of {stories}" in done.stdout


def test_trajectories_are_those_of_transformers(llama: Path, coarse: Path, stories: Path) -> None:
    """The end token is excluded: the prompts are random, so no text ends."""
    actual = measure(coarse, llama, stories, seqlen=32, trajectories=5, device="cpu").trajectories
    written = []
    for folder in (coarse, llama):
        model, tokenizer = llmq.load(folder, device="cpu")
        prompts = prompts_of([read_text(str(stories), tokenizer, 32)], 5)
        with torch.inference_mode():
            output = model.generate(
                prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=LENGTH, do_sample=False,
                pad_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
        written.append(torch.nn.functional.pad(output[:, 32:], (0, 64 - output.shape[1]), value=tokenizer.eos_token_id))
    assert actual == compared(*written)


@pytest.mark.parametrize("option", [("--floors",), ("--trajectories", "2")])
def test_floors_and_trajectories_need_an_original(option: tuple[str, ...], llama: Path, text: Path) -> None:
    refused(run_llmq("eval", llama, "--text", text, *option), CONFIG, "need an original model", "--against")


def test_trajectories_need_a_long_context(checkpoint: Checkpoints, text: Path) -> None:
    short = checkpoint("llama", num_hidden_layers=1, max_position_embeddings=32)
    done = run_llmq("eval", short, "--against", short, "--text", text, "--trajectories", "2")
    refused(done, CONFIG, "context has 32 tokens, expected 64", "--trajectories")
