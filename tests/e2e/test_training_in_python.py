"""`llmq.prepare_qat` and `llmq.convert_qat`: models that train anywhere, and the files made from them."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import llmq
from llmq.errors import ConfigError
from llmq.training.fake_quantized import FakeQuantizedLinear
from tests import builders, mixtures
from tests.runs import tensors_of

PAGE = Path(__file__).resolve().parents[2] / "docs" / "howto" / "train.md"
Quantize = Callable[..., Path]
GRIDS = [
    ("compressed-tensors", 2, True),
    ("compressed-tensors", 3, False),
    ("gptq", 8, True),
    ("awq", 4, False),
]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = builders.causal_model(builders.llama(num_hidden_layers=1), dtype="bfloat16")
    return builders.save_model(tmp_path_factory.mktemp("original"), model)


@pytest.fixture(scope="module")
def quantized(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Quantize:
    made: dict[Any, Path] = {}

    def make(layout: str = "compressed-tensors", bits: int = 3, symmetric: bool = True) -> Path:
        key = (layout, bits, symmetric)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("quantized") / "model"
            llmq.quantize(
                original, made[key], method="rtn", scales="minmax", group_size=32, validate=0, format=layout, bits=bits,
                symmetric=symmetric,
            )  # fmt: skip
        return made[key]

    return make


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        values: Tensor = model(builders.tokens(2, 12)).logits
    return values


def train(model: Any, steps: int = 6, rate: float = 1e-2) -> list[float]:
    """The loss at every step."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    tokens, losses = builders.tokens(2, 16), []
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize(("layout", "bits", "symmetric"), GRIDS, ids=str)
def test_training_lowers_the_loss_and_the_files_hold_the_trained_weights(
    layout: str, bits: int, symmetric: bool, quantized: Quantize, original: Path, tmp_path: Path
) -> None:
    start = quantized(layout, bits, symmetric)
    model = llmq.prepare_qat(start, original=original)
    assert torch.equal(logits(model), logits(llmq.load(start, device="cpu", fuse=False)[0]))
    losses = train(model)
    assert losses[-1] < losses[0]
    out = llmq.convert_qat(model, tmp_path / "out")
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in start.iterdir())
    assert {name: (t.shape, t.dtype) for name, t in tensors_of(out).items()} == {
        name: (t.shape, t.dtype) for name, t in tensors_of(start).items()
    }
    written = dict(llmq.dequantize(out))
    for path, layer in model.named_modules():
        if isinstance(layer, FakeQuantizedLinear):
            assert torch.equal(written[f"{path}.weight"], layer.weight.detach())
    assert any(not torch.equal(weight, written[name]) for name, weight in llmq.dequantize(start))
    assert (out / "config.json").read_bytes() == (start / "config.json").read_bytes()
    llmq.verify(out).require_intact()


@pytest.mark.parametrize("activations", ["int8", "int8:static"])
def test_inputs_are_rounded_as_the_file_declares(activations: str, original: Path, tmp_path: Path) -> None:
    text = builders.write_text(tmp_path / "text.txt", 1000)
    settings: Any = {"samples": 8, "seqlen": 16, "validate": 0, "calibration": [str(text)]}
    start = tmp_path / "start"
    llmq.quantize(
        original, start, bits=8, group_size="channel", activations=activations, method="gptq", device="cpu", **settings
    )
    model = llmq.prepare_qat(start, original=original)
    assert torch.equal(logits(model), logits(llmq.load(start, device="cpu", fuse=False)[0]))
    train(model, steps=2)
    written = llmq.load(llmq.convert_qat(model, tmp_path / "out"), device="cpu", fuse=False)[0]
    with torch.no_grad():
        for norm in (parameter for name, parameter in model.named_parameters() if "norm" in name):
            norm.copy_(norm.to(torch.bfloat16))  # as the file stores them
    assert torch.equal(logits(model), logits(written))


def test_training_that_the_files_cannot_hold_is_refused(quantized: Quantize, tmp_path: Path) -> None:
    model = llmq.prepare_qat(quantized())
    model.get_input_embeddings().requires_grad_(True)
    with pytest.raises(ConfigError, match=r"embed_tokens\.weight is trainable") as caught:
        llmq.convert_qat(model, tmp_path / "out")
    assert "requires_grad_(False)" in caught.value.hint and not (tmp_path / "out").exists()


def test_untrained_model_is_written_as_it_was(quantized: Quantize, tmp_path: Path) -> None:
    start = quantized()
    out = llmq.convert_qat(llmq.prepare_qat(start), tmp_path / "out")
    assert all(torch.equal(tensor, tensors_of(start)[name]) for name, tensor in tensors_of(out).items())


def test_float_model_is_quantized_first(original: Path, tmp_path: Path) -> None:
    settings: Any = {"method": "rtn", "bits": 2, "group_size": 16, "validate": 0}
    model = llmq.prepare_qat(original, tmp_path / "start", **settings)
    offsets = model.get_submodule("model.layers.0.mlp.up_proj").offset
    assert 0.2 < float(offsets.detach().abs().mean()) < 0.3  # where the float weights lie, uniformly within half a step
    assert llmq.inspect(tmp_path / "start")


def test_state_dict_is_complete(quantized: Quantize, original: Path, tmp_path: Path) -> None:
    model = llmq.prepare_qat(quantized(), original=original)
    train(model, steps=2)
    model.save_pretrained(tmp_path)
    again = llmq.prepare_qat(quantized())
    missing, unexpected = again.load_state_dict(tensors_of(tmp_path), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    assert torch.equal(logits(again), logits(model))


def test_casting_the_model_keeps_the_scales(quantized: Quantize) -> None:
    model = llmq.prepare_qat(quantized())
    before = model.get_submodule("model.layers.0.mlp.up_proj").quantized()
    after = model.half().get_submodule("model.layers.0.mlp.up_proj").quantized()
    assert torch.equal(after.scales, before.scales) and after.scales.dtype == before.scales.dtype


def test_gradient_checkpointing_gives_the_same_gradients(quantized: Quantize, original: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = llmq.prepare_qat(quantized(), original=original).train()
        if checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()  # name since 5.24
        tokens = builders.tokens(1, 8)
        model(input_ids=tokens, labels=tokens).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(one is not None and torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_wrong_uses_are_refused(quantized: Quantize, original: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not quantized") as caught:
        llmq.prepare_qat(original)
    assert "start" in caught.value.hint
    with pytest.raises(ConfigError, match="quantized already"):
        llmq.prepare_qat(quantized(), bits=4)
    with pytest.raises(ConfigError, match="not made by llmq.prepare_qat"):
        llmq.convert_qat(llmq.load(original, device="cpu")[0], tmp_path / "out")


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_experts_are_trained(kind: str, tmp_path: Path) -> None:
    """gpt_oss: stacked and transposed on disk, gate and up interleaved, with biases."""
    folder = builders.save_model(tmp_path / "model", builders.causal_model(mixtures.CONFIGS[kind]()))
    settings: Any = {"method": "rtn", "scales": "minmax", "bits": 3, "group_size": 16, "validate": 0}
    model = llmq.prepare_qat(folder, tmp_path / "start", **settings)
    [(path, layer), *_] = [(path, m) for path, m in model.named_modules() if path.endswith("up.parts.1.1")]
    assert 0.2 < float(layer.offset.detach().abs().mean()) < 0.3  # where the float weights lie within their cells
    before = logits(llmq.load(tmp_path / "start", device="cpu", fuse=False)[0])
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    losses = train(model, steps=3)
    assert losses[-1] < losses[0]
    out = llmq.convert_qat(model, tmp_path / "out")
    written, name = dict(llmq.dequantize(out)), model.llmq_origin.names[path]
    assert torch.equal(written[f"{name}.weight"], layer.weight.detach())
    assert not torch.equal(written[f"{name}.weight"], dict(llmq.dequantize(tmp_path / "start"))[f"{name}.weight"])
    after = logits(llmq.load(out, device="cpu", fuse=False)[0])
    torch.testing.assert_close(after, logits(model), rtol=1e-4, atol=1e-5)
    llmq.verify(out).require_intact()


def test_weights_on_other_grids_are_named(original: Path, tmp_path: Path) -> None:
    start = tmp_path / "start"
    overrides = "*.down_proj:bits=fp8"
    llmq.quantize(original, start, method="rtn", bits=3, group_size=16, validate=0, overrides=overrides)
    [note] = llmq.prepare_qat(start).llmq_origin.notes
    assert note.startswith("quantized weights that are not trained: 1, such as") and "down_proj (" in note


def test_the_script_of_the_page_runs(
    quantized: Quantize, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [script] = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len([line for line in script.splitlines() if line.strip()]) <= 23
    for name, replacement in (
        ("Qwen3-0.6B-fast-3bit", str(quantized())),
        ("Qwen/Qwen3-0.6B", str(original)),
        ("max_steps=400", "max_steps=2"),
        ("max_length=512", "max_length=16"),
        ('report_to="none"', 'report_to="none", disable_tqdm=True, use_cpu=True'),
    ):
        assert name in script
        script = script.replace(name, replacement)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    builders.write_text(Path("text.txt"), 400)
    Path("text.txt").write_text(Path("text.txt").read_text() + "\nanother line\n")
    exec(compile(script, str(PAGE), "exec"), {})
    llmq.verify("trained").require_intact()
    assert (tmp_path / "checkpoints" / "checkpoint-2" / "model.safetensors").is_file()
