"""Whether head and embedding share a weight is decided by the tensors, for all commands."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import llmq
from llmq.checkpoint.reader import Checkpoint
from llmq.export.from_gguf import GgufConverter
from llmq.model.build import module_tree, ties
from llmq.runtime.load import load_model
from llmq.runtime.open_skeleton import open_skeleton
from tests import builders
from tests.runs import float_model, logits, quantize, relative, streamed_logits

Checkpoints = Callable[..., Path]
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
IDS = builders.tokens(2, 16)
EXACT = {"method": "rtn", "bits": 8, "group_size": 32, "format": "compressed-tensors"}


def own_head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**tensors, HEAD: tensors[EMBEDDING].flip(0).contiguous()}


def copied_head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**tensors, HEAD: tensors[EMBEDDING].clone()}


def only_head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {HEAD if name == EMBEDDING else name: tensor for name, tensor in tensors.items()}


@pytest.fixture(params=[own_head, copied_head, only_head])
def model(request: pytest.FixtureRequest, checkpoint: Checkpoints, tmp_path: Path) -> Path:
    folder = shutil.copytree(checkpoint("llama", tie_word_embeddings=True), tmp_path / "model")
    file = folder / "model.safetensors"
    save_file(request.param(load_file(file)), file, metadata={"format": "pt"})
    return folder


def settled(folder: Path) -> Checkpoint:
    return ties.settled(Checkpoint.open(folder), module_tree.build(folder, dtype=torch.float32, remote_code=False))


def expected_logits(model: Path) -> Tensor:
    """Those of transformers."""
    return logits(float_model(model, {}), IDS)


def test_each_shared_tensor_has_one_name(model: Path) -> None:
    before, after = Checkpoint.open(model), settled(model)
    stored = {HEAD, EMBEDDING} & set(after.names())
    separate = {HEAD, EMBEDDING} <= set(before.names()) and not torch.equal(
        before.tensor(HEAD), before.tensor(EMBEDDING)
    )
    assert stored == ({HEAD, EMBEDDING} if separate else {EMBEDDING})
    assert after.config["tie_word_embeddings"] is not separate


def test_an_embedding_gets_a_name_like_those_of_the_other_tensors(checkpoint: Checkpoints, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint("llama", tie_word_embeddings=True), tmp_path / "model")
    tensors = only_head(load_file(folder / "model.safetensors"))
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    expected = {"embed_tokens.weight" if name == HEAD else name for name in bare}
    assert set(settled(folder).names()) == expected
    quantize(folder, tmp_path / "out", tmp_path, method="rtn")
    assert torch.equal(llmq.load(tmp_path / "out", device="cpu")[0].get_input_embeddings().weight, tensors[HEAD])


def test_what_is_written_computes_what_transformers_computes(model: Path, tmp_path: Path) -> None:
    expected, out = expected_logits(model), tmp_path / "out"
    quantize(model, out, tmp_path, **EXACT)
    loaded, _ = llmq.load(out, device="cpu")
    assert relative(logits(loaded, IDS), expected) < 0.05
    assert (
        relative(streamed_logits(open_skeleton(Checkpoint.open(model), builders.CPU, torch.float32), IDS), expected)
        < 1e-5
    )
    loaded.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load_model(tmp_path / "saved", device="cpu"), IDS), logits(loaded, IDS))
    tied = json.loads((out / "config.json").read_text())["tie_word_embeddings"]
    assert (HEAD in Checkpoint.open(out).names()) is not tied


def test_a_packed_head_gets_its_own_weight(model: Path, tmp_path: Path) -> None:
    quantize(model, tmp_path / "out", tmp_path, **EXACT, quantize_head=True)
    assert relative(logits(llmq.load(tmp_path / "out", device="cpu")[0], IDS), expected_logits(model)) < 0.05
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("format_", ["gguf", "gguf:q4_0"])
def test_a_gguf_file_has_the_head_unless_it_is_shared(model: Path, tmp_path: Path, format_: str) -> None:
    import gguf

    settings = {"group_size": 32} if format_ == "gguf" else {}
    llmq.quantize(str(model), tmp_path / "out", device="cpu", method="rtn", format=format_, **settings)
    (file,) = (tmp_path / "out").glob("*.gguf")
    names = [tensor.name for tensor in gguf.GGUFReader(str(file)).tensors]
    assert "token_embd.weight" in names
    tied = settled(model).config["tie_word_embeddings"]
    assert ("output.weight" in names) is not tied
    if format_ == "gguf":
        back = tmp_path / "back"
        GgufConverter(file, back, "compressed-tensors").run()
        assert {HEAD, EMBEDDING} & set(Checkpoint.open(back).names()) == {EMBEDDING, *([] if tied else [HEAD])}
        assert json.loads((back / "config.json").read_text())["tie_word_embeddings"] is tied
