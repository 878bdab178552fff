"""README.md of a result: what it takes over from the original's card, and that nothing in it can break out."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from llmq.export.card.origin import Origin, licence, origin_of, read_card
from llmq.export.card.text import render, renew_figures, write
from tests import builders

CARD = """---
license: other
license_name: own
license_link: LICENSE
language: [en, de]
tags: [chat, gguf, 8-bit]
pipeline_tag: image-text-to-text
base_model: owner/base
---
# Its own text
"""


def model(folder: Path, card: str = "", **config: Any) -> tuple[Path, dict[str, Any]]:
    folder.mkdir(parents=True, exist_ok=True)
    if card:
        (folder / "README.md").write_text(card)
    return folder, config


def test_a_model_in_the_cache_of_the_hub_is_the_base_model(tmp_path: Path) -> None:
    folder, config = model(tmp_path / "models--owner--name" / "snapshots" / "1a", CARD, _name_or_path="other/name")
    origin = origin_of(folder, config)
    assert (origin.models, origin.relation, origin.notes) == (("owner/name",), "quantized", ())
    assert origin.card["license_name"] == "own"


def test_the_base_model_of_a_quantized_model_is_that_of_its_card(tmp_path: Path) -> None:
    folder, config = model(tmp_path / "models--x--y" / "snapshots" / "1a", CARD, quantization_config={})
    assert origin_of(folder, config).models == ("owner/base",)


@pytest.mark.parametrize(
    ("card", "config", "models", "relation", "note"),
    [
        (CARD, {}, ("owner/base",), "finetune", "from the card of the local model"),
        ("", {"_name_or_path": "owner/name"}, ("owner/name",), "quantized", "from _name_or_path in config.json"),
        ("", {"_name_or_path": "/models/owner/name"}, (), "", "names no base_model"),
        ("---\nbase_model: '[x](http://evil)'\n---\n", {"_name_or_path": 3}, (), "", "names no base_model"),
    ],
)
def test_a_local_folder_gets_no_invented_id(
    card: str, config: dict[str, Any], models: tuple[str, ...], relation: str, note: str, tmp_path: Path
) -> None:
    origin = origin_of(*model(tmp_path / "local", card, **config))
    assert (origin.models, origin.relation) == (models, relation)
    assert len(origin.notes) == 1 and note in origin.notes[0]


@pytest.mark.parametrize("text", ["---\n- a list\n---\n", "---\n{: [\n---\n", "---\n" + "[" * 2000 + "\n---\n", "\xff"])
def test_a_card_that_cannot_be_read_is_a_note(text: str, tmp_path: Path) -> None:
    folder, _ = model(tmp_path / "model")
    (folder / "README.md").write_bytes(text.encode("latin-1"))
    card, notes = read_card(folder)
    assert card == {} and len(notes) == 1 and "cannot be read" in notes[0]


def test_a_card_that_is_a_link_out_of_the_folder_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(CARD)
    folder, _ = model(tmp_path / "model")
    (folder / "README.md").symlink_to(tmp_path / "secret")
    assert read_card(folder) == ({}, ())


def test_licences(tmp_path: Path) -> None:
    origin = Origin(("owner/name",), "quantized", read_card(model(tmp_path / "a", CARD)[0])[0])
    made = tmp_path / "made"
    made.mkdir()
    link = "https://huggingface.co/owner/name/blob/main/LICENSE"
    assert licence(origin, made) == ({"license": "other", "license_name": "own", "license_link": link}, ())
    assert licence(Origin((), ""), made)[1]
    (made / "LICENSE").touch()
    assert licence(origin, made)[0]["license_link"] == "LICENSE"
    assert licence(Origin((), ""), made)[0] == {"license": "other", "license_link": "LICENSE"}
    bad = Origin((), "", {"license": ["mit", 3, "x\x1b"], "license_link": "javascript:alert(1)"})
    assert licence(bad, made)[0] == {"license": "mit"}


def test_card_has_metadata_and_no_text_of_strangers_outside_of_code(checkpoint: Callable[..., Path]) -> None:
    evil = "a`b\n# Title\n---\n<script>alert(1)</script>|"
    record = {
        "source": f"/models/{evil}",
        "settings": {"method": evil, "scheme": {"bits": 4}},
        "versions": {evil: evil},
        "calibration": {"sources": [evil, "/texts/text.txt"], "samples": evil, "seqlen": 8},
        "conversions": [{"from": evil, "to": 3}, evil],
        "verdict": {"kl": 0.0123, "kl_rtn": evil, "text": evil, "sentence": evil},
        "bits_per_weight": 4.25,
    }
    card: dict[str, Any] = {"license": evil, "language": ["en", evil], "tags": ["chat", "gptq", "8-bit", "a: {b}"]}
    text, _ = render(checkpoint("llama"), Origin((), "", card), record)
    data = ModelCard(text).data.to_dict()
    assert data["tags"] == ["chat", "a: {b}", "llmq", "float", "4-bit"] and data["language"] == ["en"]
    assert "license" not in data and "base_model" not in data and data["pipeline_tag"] == "text-generation"
    lines = text.split("\n---\n", 1)[1].splitlines()
    assert "| KL divergence to the original, in nats per token (mean) | 0.0123 |" in lines
    assert [line for line in lines if line.startswith("# ")] == [lines[1]]
    outside = [re.sub(r"(?<![`\\])(`+)(?!`).*?(?<!`)\1(?!`)", "", line) for line in lines]
    assert not any(re.search(r"(?<!\\)<script", line) for line in outside)
    assert "/texts" not in text and "text.txt" in text


def test_figures_are_renewed_when_the_model_was_measured(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    made = shutil.copytree(checkpoint("llama"), tmp_path / "made")
    write(made, made, {})
    before = (made / "README.md").read_text()
    assert "was not measured" in before
    record = {"verdict": {"kl": 0.5, "sentence": "Good.", "text": "a text"}}
    renew_figures(made, record)
    after = (made / "README.md").read_text()
    assert (
        "| KL divergence to the original, in nats per token (mean) | 0.5 |" in after and "Measured on a text." in after
    )
    assert after.partition("## How to run it")[2] == before.partition("## How to run it")[2] != ""
    assert after.partition("## Figures")[0] == before.partition("## Figures")[0]
    (made / "README.md").write_text("# Mine")
    renew_figures(made, record)
    assert (made / "README.md").read_text() == "# Mine"


def test_a_card_lists_the_engines_that_load_the_model(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    from tests import runs

    original = checkpoint("llama", dtype="float16")
    out = tmp_path / "out"
    (copy := tmp_path / "model").mkdir()
    for file in original.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "README.md").write_text(CARD)
    (copy / "LICENSE").write_text("Own licence")
    builders.change_json(copy / "config.json", _name_or_path="owner/name")
    report = runs.quantize(copy, out, tmp_path / "none.txt", method="rtn", format="gptq,gguf", group_size=32)
    assert any("names owner/base as base_model" in note for note in report.notes)
    for name, engine in (("gptq", "mlx"), ("gguf", "vllm serve")):
        text = (out / name / "README.md").read_text()
        metadata = yaml.safe_load(text.split("---\n")[1])
        assert metadata["base_model"] == "owner/base" and metadata["base_model_relation"] in ("finetune", "quantized")
        assert metadata["license"] == "other" and metadata["license_link"] == "LICENSE"
        assert metadata["tags"] == ["chat", "llmq", name, "4-bit"]
        assert "llmq.enable_transformers()" in text and engine not in text
        assert (out / name / "README.original.md").read_text() == CARD
        assert "README.md" not in json.loads((out / name / "llmq.json").read_text())["checksums"]
    assert "llama-server --model MODEL/out.gguf" in text
