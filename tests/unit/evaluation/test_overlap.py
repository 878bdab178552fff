"""13-gram overlap, and the calibration text of a finished run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llmq import calibration
from llmq.calibration.read_again import all_tokens, used_tokens
from llmq.calibration_settings import Calibration
from llmq.errors import CalibrationError
from llmq.evaluation.overlap import LENGTH, CalibrationText, Grams, given_text, hashes_of, texts_of
from tests import builders


def ids(length: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 1000, (length,), generator=torch.Generator().manual_seed(seed))


# ---- shares


def test_same_text_overlaps_completely_and_other_text_not_at_all() -> None:
    text = ids(200, seed=0)
    grams = Grams([text])
    assert grams.share(text.reshape(2, 100)) == 1.0
    assert grams.share(ids(200, seed=1).reshape(2, 100)) == 0.0
    assert Grams([]).share(text[None]) == 0.0


def test_share_counts_the_13_grams_of_a_copied_passage() -> None:
    """A passage of 33 tokens in a sequence of 112: 21 of its 100 13-grams lie in the passage."""
    calibrated, evaluated = ids(500, seed=0), ids(112, seed=1)
    evaluated[40:73] = calibrated[100:133]
    assert Grams([calibrated]).share(evaluated[None]) == pytest.approx(21 / 100)
    evaluated[52] = 1000  # no token of the other text: 12 tokens before it, 20 after it
    assert Grams([calibrated]).share(evaluated[None]) == pytest.approx(8 / 100)


def test_hashes_are_those_of_a_set_of_tuples() -> None:
    """Few different tokens, so that many 13-grams are equal."""
    text, other = (torch.randint(0, 2, (20_000,), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    grams, others = tuples(text), tuples(other)
    assert len(set(hashes_of(text).tolist())) == len(set(grams))
    common = set(grams)
    assert Grams([text]).share(other[None]) == sum(gram in common for gram in others) / len(others)


def tuples(text: torch.Tensor) -> list[tuple[int, ...]]:
    tokens = text.tolist()
    return [tuple(tokens[start : start + LENGTH]) for start in range(len(tokens) - LENGTH + 1)]


def test_sequences_are_not_joined_and_short_ones_have_no_share() -> None:
    text = ids(26, seed=0)
    assert hashes_of(text.reshape(2, 13)).shape == (2,)
    assert Grams([text]).share(text.reshape(13, 2)) is None


# ---- the calibration text of a run


def write_run(folder: Path, tokenizer: Any, *sources: Path | str, seed: int = 3) -> Path:
    """The llmq.json of a run that was calibrated on 4 sequences of 16 tokens."""
    settings = Calibration(sources=tuple(map(str, sources)), samples=4, seqlen=16)
    text = calibration.load(settings, tokenizer, seed=seed, max_tokens=None, author=Author())
    folder.mkdir()
    (folder / "llmq.json").write_text(json.dumps({"calibration": text.to_dict(), "settings": {"seed": seed}}))
    return folder


class Author:
    notes: list[str] = []

    def write(self, windows: int, seqlen: int, seed: int) -> torch.Tensor:
        return torch.full((windows, seqlen), 5)


def test_text_of_a_run_is_read_again(tokenizer: Any, tmp_path: Path) -> None:
    """The sequences are those of the run: not the first ones of the file, and of both sources."""
    first, second = (builders.write_text(tmp_path / f"{seed}.txt", 9000, seed=seed) for seed in (0, 1))
    run = write_run(tmp_path / "run", tokenizer, first, f"{second}:3")
    [(known, grams), same] = texts_of([run, run], tokenizer)
    assert same[1] is grams  # read once
    assert known == CalibrationText(64, (str(first), str(second)))
    again = used_tokens(json.loads((run / "llmq.json").read_text())["calibration"], 3, tokenizer)
    assert [len(tokens) for tokens in again.tokens.values()] == [16, 48]
    assert grams.share(again.tokens[str(first)][None]) == 1.0
    [complete] = all_tokens([str(first)], tokenizer).values()
    assert (grams.share(complete[None]) or 0) < 0.1
    (run / "model.gguf").touch()
    assert texts_of([run / "model.gguf"], tokenizer)[0][0] == known


def test_text_of_a_run_before_sequences_were_drawn_was_packed(tokenizer: Any, tmp_path: Path) -> None:
    text = builders.write_text(tmp_path / "text.txt", 9000)
    settings = Calibration(sources=(str(text),), samples=4, seqlen=16, packing=True)
    packed = calibration.load(settings, tokenizer, seed=3, max_tokens=None)
    manifest = packed.to_dict()
    del manifest["packing"]
    [tokens] = used_tokens(manifest, 3, tokenizer).tokens.values()
    assert torch.equal(tokens, packed.windows.flatten())


def test_changed_absent_generated_and_remote_text_is_not_known(tokenizer: Any, tmp_path: Path) -> None:
    first, second = (builders.write_text(tmp_path / f"{seed}.txt", seed=seed) for seed in (0, 1))
    run = write_run(tmp_path / "run", tokenizer, first, second, "self")
    first.write_text("changed " * 100)
    second.unlink()
    [(known, _)] = texts_of([run], tokenizer)
    reasons = dict(known.unknown)
    assert (known.tokens, known.sources) == (None, ())
    assert "has changed" in reasons[str(first)]
    assert "does not exist" in reasons[str(second)]
    assert "generated" in reasons["self"]
    record = {"source": "allenai/c4:en:train:text", "windows": 1, "sha256": ""}
    remote = used_tokens({"manifest": [record], "seqlen": 16}, 0, tokenizer)
    assert remote.unknown == {"allenai/c4:en:train:text": "it is not a local file"}


def test_model_without_a_record_or_calibration(tokenizer: Any, tmp_path: Path) -> None:
    [(unknown, _)] = texts_of([tmp_path], tokenizer)
    assert unknown == CalibrationText()
    assert str(CalibrationText()) == "not known"
    (tmp_path / "llmq.json").write_text(json.dumps({"calibration": None, "settings": {}}))
    [(known, grams)] = texts_of([tmp_path], tokenizer)
    assert (known.tokens, str(known), grams.share(ids(20, 0)[None])) == (0, "none was used", 0.0)
    (tmp_path / "llmq.json").write_text(json.dumps({"conversions": [], "checksums": {}}))  # of another tool's model
    assert texts_of([tmp_path], tokenizer)[0][0] == CalibrationText()


def test_given_text_is_compared_completely(tokenizer: Any, tmp_path: Path) -> None:
    """Weights are ignored; chats are tokenized as for calibration."""
    plain = builders.write_text(tmp_path / "plain.txt", 500)
    chats = tmp_path / "chats.jsonl"
    chats.write_text(json.dumps({"messages": [{"role": "user", "content": "How are you today?"}]}))
    known, grams = given_text([f"{plain}:0.5", str(chats)], tokenizer)
    assert known.tokens == 1 + 500 + 1 + len("How are you today?")
    assert grams.share(torch.tensor(tokenizer(plain.read_text())["input_ids"])[None]) == 1.0
    assert grams.share(torch.tensor(tokenizer("How are you today?")["input_ids"])[None]) == 1.0
    with pytest.raises(CalibrationError, match="generated by the model"):
        given_text(["self"], tokenizer)


def test_one_option_may_hold_several_sources_as_for_quantize(tokenizer: Any, tmp_path: Path) -> None:
    first, second = (builders.write_text(tmp_path / f"{seed}.txt", 500, seed=seed) for seed in (0, 1))
    known, _ = given_text([f"{first}:0.5 {second}:0.5"], tokenizer)
    assert known == CalibrationText(2 * 501, (str(first), str(second)))
