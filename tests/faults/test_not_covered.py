"""Unsupported or inconsistent inputs: reported in one line, before any file is written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import LongcatFlashConfig, LongcatFlashForCausalLM

import llmq
from llmq.errors import CheckpointError, UnsupportedModelError
from llmq.evaluation.measure import measure
from tests import builders

Checkpoints = Callable[..., Path]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return builders.write_text(tmp_path / "text.txt")


def test_unsupported_expert_stack_is_refused(tmp_path: Path) -> None:
    """Some of LongCat's experts have no weights, so its stack has another layout."""
    latent = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    config = LongcatFlashConfig(
        hidden_size=32, ffn_hidden_size=32, expert_ffn_hidden_size=32, num_layers=1, num_attention_heads=2,
        n_routed_experts=2, zero_expert_num=1, moe_topk=1, vocab_size=64, max_position_embeddings=32, head_dim=8,
        **latent,
    )  # fmt: skip
    LongcatFlashForCausalLM(config).save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"does not use the tensor .*mlp\.experts"):
        llmq.quantize(tmp_path / "model", tmp_path / "out", method="rtn", group_size=32)
    assert not (tmp_path / "out").exists()


def test_tokenizer_of_another_model_is_refused(checkpoint: Checkpoints, tmp_path: Path, text: Path) -> None:
    small = checkpoint("llama", vocab_size=16)
    with pytest.raises(CheckpointError, match="embeddings for 16 tokens"):
        llmq.quantize(small, tmp_path / "out", group_size=32, calibration=str(text), samples=8, seqlen=16)


def test_models_with_different_vocabularies_are_not_compared(checkpoint: Checkpoints, text: Path) -> None:
    one, other = checkpoint("llama"), checkpoint("llama", vocab_size=builders.VOCABULARY + 8)
    with pytest.raises(UnsupportedModelError, match="vocabularies of"):
        measure(one, other, str(text), seqlen=16, limit=1, device="cpu")


@pytest.mark.parametrize("change", [{"hidden_size": "wide"}, {"num_attention_heads": 0}, {"hidden_act": "swoosh"}])
def test_config_that_cannot_be_instantiated_is_refused(
    checkpoint: Checkpoints, tmp_path: Path, change: dict[str, object]
) -> None:
    broken = shutil.copytree(checkpoint("llama"), tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UnsupportedModelError):
        llmq.quantize(broken, tmp_path / "out", method="rtn", group_size=32)


def test_patterns_without_a_match_are_reported(checkpoint: Checkpoints, tmp_path: Path) -> None:
    report = llmq.quantize(
        checkpoint("llama"),
        tmp_path / "out",
        method="rtn",
        group_size=32,
        skip=["dwon_proj"],
        overrides=["kproj:bits=8"],
    )
    assert any("'dwon_proj'" in note for note in report.notes) and any("'kproj'" in note for note in report.notes)


def test_too_few_calibration_tokens_are_reported(checkpoint: Checkpoints, tmp_path: Path, text: Path) -> None:
    report = llmq.quantize(
        checkpoint("llama"), tmp_path / "out", group_size=32, calibration=str(text), samples=8, seqlen=16
    )
    assert any("128 calibration tokens are few" in note for note in report.notes)


def test_awq_keeps_layers_off_its_grid_in_float(checkpoint: Checkpoints, tmp_path: Path) -> None:
    model = checkpoint("llama", intermediate_size=48)  # 48 is not a multiple of 32
    report = llmq.quantize(model, tmp_path / "out", method="rtn", format="awq", group_size=32, symmetric=False)
    kept = {name for name, reason in report.left.items() if "one grid for all layers" in reason}
    assert kept and all(name.endswith("down_proj") for name in kept)
    llmq.load(tmp_path / "out", device="cpu")
