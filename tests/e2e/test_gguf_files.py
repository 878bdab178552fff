"""Reading .gguf files (from llama.cpp, from llmq, broken files) and evaluating them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import llmq
from llmq.checkpoint.reader import Checkpoint
from llmq.errors import CheckpointError, FormatError, LlmqError, UnsupportedModelError
from llmq.evaluation.measure import measure
from llmq.evaluation.streaming import open_source
from llmq.gguf import export
from llmq.gguf.container import Container
from llmq.gguf.reader import Weights, described
from llmq.model.build import skeleton

pytest.importorskip("gguf")
ROOT = Path(__file__).resolve().parents[2]
BUNDLED = ROOT / "eval" / "models" / "tiny-python-llama"
Checkpoints = Callable[..., Path]
TRANSLATED = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # from transformers' reader
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoints) -> Path:
    return checkpoint("llama", dtype="float16", **SIZES)


@pytest.fixture(scope="module")
def packed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "out"
    llmq.quantize(str(model), out, method="rtn", group_size=32, symmetric=False, format="gptq_v2", device="cpu")
    return out


@pytest.fixture(scope="module")
def file(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .gguf file alone in a folder, without a configuration or tokenizer."""
    return export.export(packed, tmp_path_factory.mktemp("gguf") / "tiny.gguf").file


def test_a_llama_cpp_file_dequantizes_as_in_llama_cpp(shared: Path) -> None:
    folder = shared / "golden" / "llamacpp-gguf-q4_0"
    weights = dict(llmq.dequantize(folder / "tiny-q4_0.gguf"))
    expected = {n: t for n, t in load_file(folder / "expected.safetensors").items() if not n.startswith("__")}
    assert expected and expected.keys() <= weights.keys()
    for name, weight in expected.items():
        assert torch.equal(weights[name].to(weight.dtype), weight), name


@TRANSLATED
def test_a_llama_cpp_file_has_the_logits_of_llama_cpp(shared: Path) -> None:
    folder = shared / "golden" / "llamacpp-gguf-q4_0"
    expected = load_file(folder / "expected.safetensors")
    source = open_source(folder / "tiny-q4_0.gguf", torch.device("cpu"))
    source.run(expected["__input_ids__"])
    computed = torch.cat([logits[:, -1].log_softmax(-1) for _, logits in source.logits(2)])
    assert (computed - expected["__last_logprobs__"]).abs().max() <= 0.05  # llama.cpp rounds activations to 8 bits


def test_weights_are_returned_under_hugging_face_names(file: Path, packed: Path, model: Path) -> None:
    weights, checkpoint = Weights(file, packed), Checkpoint.open(model)
    expected = dict(llmq.dequantize(packed))
    for name in checkpoint.names():
        assert name in weights
        assert torch.equal(weights.tensor(name), expected.get(name, checkpoint.tensor(name).float())), name
    assert "model.layers.7.mlp.up_proj.weight" not in weights


def test_code_next_to_a_file_is_never_run(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def from_pretrained(*_: object, trust_remote_code: bool | None = None, **__: object) -> SimpleNamespace:
        asked.append(trust_remote_code)
        return SimpleNamespace(save_pretrained=lambda folder: None)

    for name in ("AutoConfig", "AutoTokenizer"):
        monkeypatch.setattr(f"transformers.{name}.from_pretrained", from_pretrained)
    monkeypatch.setattr("llmq.gguf.reader._complete", lambda config, container: None)
    with described(file):
        assert asked == [False, False]  # None would prompt at the terminal


def test_a_file_has_the_perplexity_of_its_checkpoint(file: Path, packed: Path, model: Path, text: Path) -> None:
    of_file = measure(file, model, text, seqlen=48, limit=4)
    of_folder = measure(packed, model, text, seqlen=48, limit=4)
    assert of_file.model.perplexity == pytest.approx(of_folder.model.perplexity, rel=1e-6)
    assert of_file.model.kl_mean == pytest.approx(of_folder.model.kl_mean, rel=1e-4)
    assert of_file.size.bits_per_weight == 5.5


@TRANSLATED
def test_a_file_without_a_checkpoint_is_evaluated(tmp_path: Path, text: Path) -> None:
    bundled = ROOT / "eval" / "models" / "tiny-python-qwen3"
    alone = export.export(bundled, tmp_path / "bundled.gguf").file
    perplexity, expected = (measure(path, None, text, seqlen=48, limit=2).model.perplexity for path in (alone, bundled))
    assert perplexity == pytest.approx(expected, rel=1e-4)  # bfloat16 to float16: exact except for tiny values


@TRANSLATED
def test_a_token_added_by_transformers_is_not_looked_up(tmp_path: Path) -> None:
    """Its tokenizers have an end-of-text token even if the file has none; the embedding has no row for this token."""
    alone = export.export(ROOT / "eval" / "models" / "tiny-python-qwen3", tmp_path / "bundled.gguf").file
    (tmp_path / "text.txt").write_text("def f(n):\n    return n + 1\n<|endoftext|>" * 40)
    with pytest.raises(CheckpointError, match="has the token id 2048, but the model has .* 2048 tokens"):
        measure(alone, None, tmp_path / "text.txt", seqlen=48, limit=1)


def test_a_file_of_another_architecture_is_refused(file: Path, checkpoint: Checkpoints, text: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="llama.cpp's architecture llama, and .* describes one of qwen3"):
        measure(file, checkpoint("qwen3"), text, seqlen=48, limit=1)


@pytest.mark.parametrize("kept", [0, 3, 100, 3000, -40])
def test_a_truncated_file_is_refused(file: Path, tmp_path: Path, kept: int) -> None:
    (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match="is not a complete GGUF file"):
        list(llmq.dequantize(tmp_path / "cut.gguf"))


def test_unsupported_group_sizes_are_refused_or_requantized(model: Path, tmp_path: Path) -> None:
    llmq.quantize(str(model), tmp_path / "g16", method="rtn", group_size=16, symmetric=True, device="cpu")
    with pytest.raises(FormatError, match="groups have 16") as refused:
        export.export(tmp_path / "g16", tmp_path / "no.gguf")
    assert "--allow-requantize" in refused.value.hint
    assert not list(tmp_path.glob("*.gguf*")) and not list(tmp_path.glob(".*"))
    summary = export.export(tmp_path / "g16", tmp_path / "yes.gguf", requantize=True)
    assert not summary.exact and len(summary.rounded) == 14
    weights, expected = Weights(tmp_path / "yes.gguf", model), dict(llmq.dequantize(tmp_path / "g16"))
    for name, largest in summary.rounded.items():
        assert 0 < (weights.tensor(name) - expected[name]).abs().max() <= largest < 0.2 * expected[name].abs().max()


def test_scales_are_rounded_to_fp16_and_values_kept(checkpoint: Checkpoints, tmp_path: Path) -> None:
    llmq.quantize(str(checkpoint("llama", **SIZES)), tmp_path / "g32", method="rtn", group_size=32, device="cpu")
    with pytest.raises(FormatError, match="scales are not fp16 numbers"):
        export.export(tmp_path / "g32", tmp_path / "no.gguf")
    summary = export.export(tmp_path / "g32", tmp_path / "yes.gguf", requantize=True)
    weights, expected = Weights(tmp_path / "yes.gguf", tmp_path / "g32"), dict(llmq.dequantize(tmp_path / "g32"))
    assert summary.rounded.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.allclose(weights.tensor(name), weight, rtol=2**-11, atol=0), name  # half an ulp of fp16


def test_rows_that_blocks_do_not_divide_are_stored_as_floats(checkpoint: Checkpoints, tmp_path: Path) -> None:
    model = checkpoint("llama", dtype="float16", **{**SIZES, "intermediate_size": 72})
    llmq.quantize(str(model), tmp_path / "out", method="rtn", group_size=32, device="cpu")
    with pytest.raises(FormatError, match="down_proj.*multiple of 32 weights, these have 72"):
        export.export(tmp_path / "out", tmp_path / "no.gguf")
    summary = export.export(tmp_path / "out", tmp_path / "yes.gguf", requantize=True)
    assert summary.counts == {"Q4_0": 12, "F16": 4, "F32": 5}
    assert all("down_proj" in name for name in summary.rounded)


def test_general_keys_come_from_the_card_or_a_note_is_given(packed: Path, tmp_path: Path) -> None:
    shutil.copytree(packed, tmp_path / "carded")
    card = tmp_path / "carded" / "README.md"
    card.write_text("---\nlicense: apache-2.0\n---\nA model.\n")
    made = Container(export.export(tmp_path / "carded", tmp_path / "tiny.gguf").file)
    keys = ("license", "name", "quantization_version", "file_type")
    assert [made.value(f"general.{key}") for key in keys] == ["apache-2.0", "Tiny", 2, 8]
    card.write_text("---\nlicense: [\n---\nA model.\n")
    assert any("README.md cannot be read" in note for note in export.export(card.parent, tmp_path / "b.gguf").notes)


def test_floats_beyond_fp16_are_refused(checkpoint: Checkpoints, tmp_path: Path) -> None:
    shutil.copytree(checkpoint("llama", **SIZES), tmp_path / "large")
    tensors = load_file(tmp_path / "large" / "model.safetensors")
    tensors["model.embed_tokens.weight"][5, 7] = 7e4
    save_file(tensors, tmp_path / "large" / "model.safetensors", {"format": "pt"})
    with pytest.raises(FormatError, match="embed_tokens.weight has values beyond the range of F16"):
        export.export(tmp_path / "large", tmp_path / "large.gguf")


def test_a_failed_export_leaves_no_file(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack = export.pack
    calls = iter(range(100))

    def failing(*args: object) -> object:
        if next(calls) == 5:
            raise FormatError("the sixth weight is broken")
        return pack(*args)

    monkeypatch.setattr(export, "pack", failing)
    with pytest.raises(LlmqError, match="sixth weight is broken"):
        export.export(packed, tmp_path / "tiny.gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_llama_cpp_computes_differently_is_refused(packed: Path, tmp_path: Path) -> None:
    shutil.copytree(packed, tmp_path / "other")
    config = tmp_path / "other" / "config.json"
    config.write_text(config.read_text().replace('"silu"', '"gelu"'))
    with pytest.raises(UnsupportedModelError, match="hidden_act = 'gelu', and llama.cpp's llama computes with silu"):
        export.export(tmp_path / "other", tmp_path / "tiny.gguf")


@TRANSLATED
@pytest.mark.parametrize(
    "changes", [{"rope_type": "linear", "factor": 4.0}, {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5}]
)
def test_a_scaled_rotation_is_read_from_the_keys_of_a_file(changes: dict[str, object], tmp_path: Path) -> None:
    rotation = {"rope_theta": 1e4, **changes}
    if rotation["rope_type"] == "yarn":
        rotation["original_max_position_embeddings"] = 32
    shutil.copytree(BUNDLED, tmp_path / "model")
    config = json.loads((BUNDLED / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "rope_parameters": rotation}))
    file = export.export(tmp_path / "model", tmp_path / "alone" / "tiny.gguf").file
    with described(file) as folder:
        read = skeleton.load_config(folder, remote_code=False).rope_parameters
    assert {name: read[name] for name in rotation} == pytest.approx(rotation)


@TRANSLATED
def test_a_key_that_transformers_does_not_read_is_refused(tmp_path: Path) -> None:
    file = export.export(BUNDLED, tmp_path / "tiny.gguf").file
    name, other = b"llama.rope.freq_base", b"llama.rope.freq_bast"
    file.write_bytes(file.read_bytes().replace(name, other))
    with pytest.raises(UnsupportedModelError, match="freq_bast"), described(file):
        pass
