"""Record and replay: running block by block equals the whole model, and only one block at a time has weights."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BertConfig, T5Config

from llmq.errors import CheckpointError, UnsupportedModelError
from llmq.model.build.block import Call
from llmq.model.build.skeleton import Skeleton, build, largest_module_list
from tests.builders import (
    CONFIGS,
    VOCABULARY,
    WINDOW,
    rename_tensors,
    skeleton_in_memory,
    skeleton_of,
    tokens,
)
from tests.passes import states_of, stream_over

LENGTH = 3 * WINDOW  # longer than the window of a sliding layer


Checkpoints = Callable[..., Path]


def copied(source: Path, folder: Path) -> Path:
    """A checkpoint whose files may be changed."""
    return shutil.copytree(source, folder / "copy")


def hidden_by_block(folder: Path, ids: Tensor) -> list[Tensor]:
    """What every block of the whole model puts out, from transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    outputs: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    for block in largest_module_list(model)[1]:
        block.register_forward_hook(keep)
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    return outputs


def replayed(skeleton: Skeleton, ids: Tensor) -> Iterator[Tensor]:
    """The outputs of every block, with the weights of one block at a time."""
    hidden = None
    for index, block in enumerate(skeleton.blocks):
        block.load()
        call = skeleton.record(index, ids)
        hidden = block.run(call if hidden is None else call.with_hidden(hidden))
        block.free()
        yield hidden


@pytest.mark.parametrize("name", CONFIGS)
def test_replay_equals_the_whole_model(checkpoint: Checkpoints, name: str) -> None:
    folder, ids = checkpoint(name), tokens(2, LENGTH)
    expected = hidden_by_block(folder, ids)
    assert len(expected) == 3
    for ours, theirs in zip(replayed(skeleton_of(folder), ids), expected, strict=True):
        # The same operations on the same numbers; a BLAS may still sum in another order for another address.
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() <= 8 * torch.finfo(torch.float32).eps * theirs.abs().max()


@pytest.mark.parametrize("name", CONFIGS)
def test_the_last_hidden_state_gives_the_models_logits(checkpoint: Checkpoints, name: str) -> None:
    folder, ids = checkpoint(name), tokens(2, LENGTH)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
    skeleton = skeleton_of(folder)
    *_, hidden = replayed(skeleton, ids)
    logits = skeleton.logits(ids, hidden.requires_grad_())
    assert (logits - expected).abs().max() <= 32 * torch.finfo(torch.float32).eps * expected.abs().max()
    logits.square().sum().backward()
    assert hidden.grad is not None and bool(hidden.grad.abs().amax(-1).all())


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_all_calls_are_recorded_at_once(checkpoint: Checkpoints, name: str) -> None:
    skeleton, ids = skeleton_of(checkpoint(name)), tokens(2, LENGTH)
    for index, call in enumerate(skeleton.record_all(ids)):
        alone = skeleton.record(index, ids)
        assert torch.equal(call.hidden, alone.hidden)
        assert str(call.kwargs["attention_mask"]) == str(alone.kwargs["attention_mask"])


def test_layers_are_called_with_their_own_masks(checkpoint: Checkpoints) -> None:
    folder, ids = checkpoint("gemma3"), tokens(1, LENGTH)
    skeleton = skeleton_of(folder)
    sliding, full = skeleton.record(0, ids), skeleton.record(1, ids)
    skeleton.blocks[0].load()
    right = skeleton.blocks[0].run(sliding)
    wrong = skeleton.blocks[0].run(Call(sliding.args, {**sliding.kwargs, **_masks(full)}))
    difference = (right - wrong).abs().amax(-1)[0]  # (T,)
    assert difference[:WINDOW].max() < 1e-5 * right.abs().max() < difference[WINDOW:].max()


def _masks(call: Call) -> dict[str, Any]:
    return {"attention_mask": call.kwargs["attention_mask"]}


@pytest.mark.parametrize("name", ["llama", "gemma3n"])
def test_at_most_one_block_has_weights(checkpoint: Checkpoints, name: str) -> None:
    skeleton = skeleton_of(checkpoint(name))
    counts: list[int] = []

    def count(*_: Any) -> None:
        filled = [any(not p.is_meta for p in block.module.parameters()) for block in skeleton.blocks]
        counts.append(sum(filled))

    for block in skeleton.blocks:
        for module in block.module.modules():
            module.register_forward_pre_hook(count)  # runs while recording, too
    for _ in replayed(skeleton, tokens(2, LENGTH)):
        pass
    assert len(counts) > 3 * len(skeleton.blocks)
    assert max(counts) == 1
    assert all(parameter.is_meta for block in skeleton.blocks for parameter in block.module.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_recording_loads_only_what_runs_before_the_blocks(checkpoint: Checkpoints, name: str) -> None:
    skeleton = skeleton_of(checkpoint(name))
    skeleton.record(2, tokens(2, LENGTH))
    filled = {name for name, parameter in skeleton.model.named_parameters() if not parameter.is_meta}
    # Only gemma3n runs other modules there: they compute a separate input of each block.
    extra = {name for name in filled if "per_layer" in name or "altup_projections" in name}
    embedding = {name for name, module in skeleton.model.named_modules() if isinstance(module, nn.Embedding)}
    assert {f"{name}.weight" for name in embedding} >= filled - extra
    assert len(filled - extra) == 1
    assert bool(extra) == (name == "gemma3n")


@pytest.mark.parametrize(("name", "returns_tuple"), [("llama", False), ("falcon", True)])
def test_blocks_may_return_a_tensor_or_a_tuple(checkpoint: Checkpoints, name: str, returns_tuple: bool) -> None:
    folder = checkpoint(name)
    skeleton = skeleton_of(folder)
    skeleton.record(0, tokens(1, 4))
    skeleton.blocks[0].load()
    output = skeleton.blocks[0].module(*(call := skeleton.record(0, tokens(1, 4))).args, **call.kwargs)
    assert isinstance(output, tuple) == returns_tuple
    assert isinstance(skeleton.blocks[0].run(call), Tensor)


class Decoder(nn.Module):
    """Three residual blocks; `between` is what the model does to the hidden state after each of them."""

    def __init__(self, between: Callable[[Tensor], Tensor], keyword: str = "", in_tuple: bool = False) -> None:
        super().__init__()
        self.config = SimpleNamespace()
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.blocks = nn.ModuleList(Residual(in_tuple) for _ in range(3))
        self.between, self.keyword = between, keyword

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        hidden: Tensor = self.embed(input_ids)
        for block in self.blocks:
            hidden = block(**{self.keyword: hidden}) if self.keyword else block(hidden)
            hidden = self.between(hidden[0] if isinstance(hidden, tuple) else hidden)
        return hidden


class Residual(nn.Module):
    def __init__(self, in_tuple: bool) -> None:
        super().__init__()
        self.linear, self.in_tuple = nn.Linear(8, 8), in_tuple

    def forward(self, hidden_states: Tensor) -> Any:
        hidden_states = hidden_states + self.linear(hidden_states)
        return (hidden_states, None) if self.in_tuple else hidden_states


@pytest.mark.parametrize("keyword", ["", "hidden_states"])
@pytest.mark.parametrize("in_tuple", [False, True])
def test_a_custom_model_is_replayed(keyword: str, in_tuple: bool) -> None:
    model = Decoder(lambda hidden: hidden, keyword, in_tuple)
    expected = model(tokens(2, 5), use_cache=False)
    *_, last = replayed(skeleton_in_memory(model), tokens(2, 5))
    assert torch.equal(last, expected)


@pytest.mark.parametrize("in_tuple", [False, True])
@pytest.mark.parametrize("between", [lambda hidden: 2 * hidden, lambda hidden: hidden[:, -1:]], ids=["scaled", "cut"])
def test_a_hidden_state_that_changes_between_blocks_is_refused(
    between: Callable[[Tensor], Tensor], in_tuple: bool
) -> None:
    skeleton = skeleton_in_memory(Decoder(between, in_tuple=in_tuple))
    with pytest.raises(UnsupportedModelError, match="the hidden state changes between blocks"):
        skeleton.record(0, tokens(1, 5))


class Twice(Decoder):
    """Runs its second block twice per token."""

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        hidden: Tensor = self.embed(input_ids)
        for index in (0, 1, 1, 2):
            hidden = self.blocks[index](hidden)
        return hidden


def test_a_block_that_runs_twice_is_refused() -> None:
    skeleton = skeleton_in_memory(Twice(lambda hidden: hidden))
    with pytest.raises(UnsupportedModelError, match=r"runs blocks\.1 several times per token"):
        skeleton.record(0, tokens(1, 5))


class Handing(nn.Module):
    """Three blocks, each of which gets what the one before it returned besides the hidden state."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace()
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.blocks = nn.ModuleList(Adding() for _ in range(3))

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        hidden, before = self.embed(input_ids), None
        for block in self.blocks:
            hidden, before = block(hidden, before=before)
        return hidden


class Adding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, hidden_states: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        change = self.linear(hidden_states)
        return hidden_states + change + (0 if before is None else before), change


def test_blocks_that_hand_on_more_than_the_hidden_state_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="a block gets before from the one before it"):
        skeleton_in_memory(Handing()).record(0, tokens(1, 5))


def test_blocks_with_unknown_arguments_are_refused() -> None:
    model = Decoder(lambda hidden: hidden, keyword="stream")
    with pytest.raises(UnsupportedModelError, match="cannot be replayed"):
        skeleton_in_memory(model).record(0, tokens(1, 5))


def test_blocks_that_share_keys_and_values_are_refused(checkpoint: Checkpoints) -> None:
    skeleton = skeleton_of(checkpoint("gemma3n", num_hidden_layers=4, num_kv_shared_layers=2))
    with pytest.raises(UnsupportedModelError, match="its last 2 blocks share the keys and values of earlier blocks"):
        skeleton.record(0, tokens(1, 5))


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="no list of blocks"):
        skeleton_in_memory(nn.Sequential(nn.Linear(4, 4)))


def test_the_blocks_are_the_list_with_the_most_parameters() -> None:
    model = nn.Module()
    model.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(9))
    model.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
    assert largest_module_list(model) == ("layers", model.layers)


@pytest.mark.parametrize("config", [BertConfig(num_hidden_layers=1), T5Config(num_layers=1)], ids=["bert", "t5"])
def test_models_other_than_decoders_are_refused(tmp_path: Path, config: Any) -> None:
    config.architectures = ["BertModel" if config.model_type == "bert" else "T5ForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="expected a causal language model"):
        build(tmp_path, dtype=torch.float32, remote_code=False)


def test_a_tied_head_is_read_from_the_embedding(checkpoint: Checkpoints) -> None:
    tied, untied = (skeleton_of(checkpoint("llama", tie_word_embeddings=tie)).weights for tie in (True, False))
    assert tied.is_tied("lm_head.weight") and not untied.is_tied("lm_head.weight")
    assert not tied.is_tied("model.embed_tokens.weight")
    assert tied.tensor_name("lm_head.weight") == "model.embed_tokens.weight"
    assert untied.tensor_name("lm_head.weight") == "lm_head.weight"


def test_a_checkpoint_may_leave_out_the_base_prefix(checkpoint: Checkpoints, tmp_path: Path) -> None:
    folder, ids = copied(checkpoint("llama"), tmp_path), tokens(2, LENGTH)
    expected = list(replayed(skeleton_of(folder), ids))
    with_prefix = skeleton_of(folder).blocks[0].stored_names()
    rename_tensors(folder, lambda name: name.removeprefix("model."))
    bare = skeleton_of(folder)
    assert all(torch.equal(a, b) for a, b in zip(replayed(bare, ids), expected, strict=True))
    assert bare.blocks[0].stored_names() == [name.removeprefix("model.") for name in with_prefix]
    assert all(name.startswith("model.layers.0.") for name in with_prefix)
    assert bare.weights.module_name("model.layers.1.mlp.up_proj") == "layers.1.mlp.up_proj"


def test_a_missing_tensor_and_a_wrong_shape_are_named(checkpoint: Checkpoints, tmp_path: Path) -> None:
    folder, name = copied(checkpoint("llama"), tmp_path), "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(folder / "model.safetensors")
    for changed, message in (({}, f"needs the tensor {name}"), ({name: torch.zeros(3, 32)}, r"shape \(3, 32\)")):
        rest = {key: tensor for key, tensor in tensors.items() if key != name}
        save_file({**rest, **changed}, folder / "model.safetensors")
        with pytest.raises(CheckpointError, match=message):
            skeleton_of(folder).blocks[0].load()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_nan_or_infinite_weight_is_named(checkpoint: Checkpoints, tmp_path: Path, bad: float) -> None:
    folder, name = copied(checkpoint("llama"), tmp_path), "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(folder / "model.safetensors")
    tensors[name][3, 4] = bad
    save_file(tensors, folder / "model.safetensors")
    skeleton = skeleton_of(folder)
    skeleton.blocks[0].load()
    with pytest.raises(CheckpointError, match=rf"{name} has 1 values"):
        skeleton.blocks[1].load()


@pytest.mark.parametrize("name", ["llama", "gemma3n"])
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_a_stream_carries_the_outputs_of_each_block(checkpoint: Checkpoints, name: str, batch: int) -> None:
    skeleton = skeleton_of(checkpoint(name))
    ids = tokens(4, LENGTH)
    expected = list(replayed(skeleton, ids))  # (…, 4, T, D) each
    stream = stream_over(skeleton, ids, batch)
    for index, block in enumerate(skeleton.blocks):
        block.load()
        sample = block.run(stream.sample(LENGTH - 5))
        stream.past(block)
        outputs = torch.cat(states_of(stream), dim=-3)
        block.free()
        tolerance = 1e-5 * float(expected[index].abs().max())  # matrices of other sizes are summed in another order
        torch.testing.assert_close(outputs, expected[index], rtol=0, atol=tolerance)
        torch.testing.assert_close(sample, expected[index][..., :1, : LENGTH - 5, :], rtol=0, atol=tolerance)
