"""PEFT trains adapters on packed layers: the loss falls, the codes do not change, and merging is refused."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft", reason="needs the package peft")

from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor
from transformers import AutoModelForCausalLM

import llmq
from llmq.errors import UnsupportedModelError
from llmq.runtime.load import load_model
from llmq.training.adapter import Adapter
from tests import builders, mixtures
from tests.runs import tensors_of

pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings(
        "ignore:.*gradient_checkpointing:FutureWarning"
    ),  # PEFT uses the old names of transformers
]


@pytest.fixture(autouse=True)
def enabled() -> Iterator[None]:
    llmq.enable_transformers()
    yield
    llmq.disable_transformers()


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("quantized")
    settings: dict[str, Any] = {"method": "rtn", "scales": "minmax", "group_size": 16}
    for name, config, layout in (
        ("gptq", builders.llama(num_hidden_layers=1), "gptq"),
        ("compressed-tensors", builders.llama(num_hidden_layers=1), "compressed-tensors"),
        ("mixtral", mixtures.mixtral(), "gptq"),
    ):
        model = builders.save_model(folder / "float" / name, builders.causal_model(config, dtype="bfloat16"))
        llmq.quantize(str(model), folder / name, format=layout, **settings)
    return {path.name: path for path in folder.iterdir() if path.name != "float"}


def read(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def train(model: Any, steps: int = 6) -> list[float]:
    """The loss at every step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tokens, losses = builders.tokens(2, 16), []
    model.train()
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        values: Tensor = model.eval()(builders.tokens(2, 12)).logits
    return values


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"], ids=str)
@pytest.mark.parametrize("load", [read, load_model], ids=["from_pretrained", "llmq.load"])
@pytest.mark.parametrize("layout", ["gptq", "compressed-tensors"])
def test_training_lowers_the_loss_and_keeps_the_codes(
    layout: str, load: Callable[[Path], Any], targets: Any, quantized: dict[str, Path], tmp_path: Path
) -> None:
    model = load(quantized[layout])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * (2 if isinstance(targets, list) else 7)
    assert all("lora_" in name for name in trained)
    losses = train(adapted)
    assert losses[-1] < 0.95 * losses[0]
    after = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): t for name, t in adapted.state_dict().items()
    }
    assert all(after[name].equal(tensor) for name, tensor in before.items())
    adapted.save_pretrained(tmp_path)
    assert all("lora_" in name for name in tensors_of(tmp_path))
    again = PeftModel.from_pretrained(load(quantized[layout]), tmp_path)
    assert logits(again).equal(logits(adapted))
    assert not logits(again).equal(logits(load(quantized[layout])))


def test_adapters_train_next_to_packed_experts(quantized: dict[str, Path]) -> None:
    losses = train(get_peft_model(read(quantized["mixtral"]), LoraConfig(r=4, target_modules=["q_proj", "o_proj"])))
    assert losses[-1] < losses[0]


@pytest.mark.filterwarnings("ignore:torch.utils.checkpoint:UserWarning")
def test_model_prepared_for_kbit_training_can_be_trained(quantized: dict[str, Path]) -> None:
    model = prepare_model_for_kbit_training(read(quantized["gptq"]))
    losses = train(get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"])))
    assert losses[-1] < losses[0]


def test_dora_reads_the_packed_weight(quantized: dict[str, Path]) -> None:
    """DoRA scales by the norms of rows, and does not change the model before training."""
    plain = logits(read(quantized["gptq"]))
    adapted = get_peft_model(read(quantized["gptq"]), LoraConfig(r=4, target_modules=["q_proj"], use_dora=True))
    assert torch.allclose(logits(adapted), plain, rtol=1e-5, atol=1e-5)
    losses = train(adapted)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("safe", [True, False])
def test_merging_is_refused(safe: bool, quantized: dict[str, Path]) -> None:
    adapted = get_peft_model(read(quantized["compressed-tensors"]), LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(UnsupportedModelError, match="cannot be changed") as caught:
        adapted.merge_and_unload(safe_merge=safe)
    assert "separate" in caught.value.hint


@pytest.mark.parametrize(
    "changes",
    [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.0.self_attn.q_proj": 3}}],
    ids=str,
)
def test_llmq_merges_what_peft_merges(changes: dict[str, Any], tmp_path: Path) -> None:
    model = builders.causal_model(builders.llama(num_hidden_layers=2))
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights=False, **changes)
    adapted = get_peft_model(model, config)
    adapted.save_pretrained(tmp_path)
    adapter = Adapter.open(tmp_path)
    assert len(adapter.scalings) == 4
    for path in adapter.scalings:
        theirs = adapted.base_model.model.get_submodule(path).get_delta_weight("default")
        assert torch.allclose(adapter.change(path), theirs, rtol=1e-6, atol=1e-7)


def test_llmq_refuses_dora_of_peft(tmp_path: Path) -> None:
    model = builders.causal_model(builders.llama(num_hidden_layers=1))
    get_peft_model(model, LoraConfig(target_modules=["q_proj"], use_dora=True)).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="DoRA"):
        Adapter.open(tmp_path)


def test_transformers_own_adapters_are_saved_without_the_model(quantized: dict[str, Path], tmp_path: Path) -> None:
    model = read(quantized["gptq"])
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    assert len(tensors_of(tmp_path)) == 2
