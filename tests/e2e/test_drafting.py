"""Heads for multi-token prediction are kept, and draft as well for the quantized model as for the float one.

transformers runs them: `generate(use_mtp=True)` reads the head from the checkpoint of the main model.  The toy model is
made so that its head is right most of the time: a token depends on the token before it, through random embeddings, and
blocks change little; the head looks at the same embeddings.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.modeling_layers import MtpModel

import llmq
from llmq.steps.left_in_float import DRAFTS
from llmq.verification.inspection import inspect
from tests import builders
from tests.runs import quantize, relative, tensors_of
from tests.toy_configs import Entry, toy_config

STEPS = 24  # tokens that are written
PROMPT = builders.tokens(1, 12)
DAMPED = 0.2  # what blocks add is smaller than the embedding by about this factor


@pytest.fixture(scope="module")
def drafting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of Mellum with the head in the layout of its published files, which is that of Qwen3-Next."""
    folder = tmp_path_factory.mktemp("drafting") / "model"
    config = toy_config(Entry("causal", "mellum", "MellumForCausalLM"))
    config.num_mtp_layers, config.mtp_layer_types, config.mtp_mlp_layer_types = 1, ["full_attention"], ["sparse"]
    model = builders.causal_model(config)
    follow_the_last_token(model)
    head = MtpModel(model, 1).eval().requires_grad_(False)
    builders.randomise(head.layers)
    look_at_the_embedding(head)
    builders.save_model(folder, model)
    tensors = {name: tensor.contiguous() for name, tensor in stored_names(head).items()}
    save_file({**load_file(folder / "model.safetensors"), **tensors}, folder / "model.safetensors", {"format": "pt"})
    return folder


def follow_the_last_token(model: Any) -> None:
    """The token after t is t + 1: the head's rows are the embeddings, shifted; blocks add a little."""
    embedding = model.get_input_embeddings().weight.data
    model.lm_head.weight.data.copy_(embedding.roll(1, dims=0))
    model.model.norm.weight.data.fill_(1)
    for name, parameter in model.model.layers.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj", "down_proj.weight")):
            parameter.data *= DAMPED


def look_at_the_embedding(head: Any) -> None:
    layer = head.layers[0]
    width = layer.eh_proj.weight.shape[0]
    layer.eh_proj.weight.data *= 0.1
    layer.eh_proj.weight.data[:, :width] += torch.eye(width)
    for norm in (layer.enorm, layer.hnorm, layer.post_norm):
        norm.weight.data.fill_(1)
    for name, parameter in layer.mtp_block.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj", "down_proj.weight")):
            parameter.data *= DAMPED


def stored_names(head: Any) -> dict[str, Tensor]:
    """The tensors of the head by their names in published checkpoints: experts are separate."""
    renamed = {"eh_proj": "fc", "enorm": "pre_fc_norm_embedding", "hnorm": "pre_fc_norm_hidden", "post_norm": "norm"}
    stored: dict[str, Tensor] = {}
    for name, tensor in head.layers[0].state_dict().items():
        part, _, rest = name.partition(".")
        if part in renamed:
            stored[f"mtp.{renamed[part]}.{rest}"] = tensor
        elif rest.endswith("experts.gate_up_proj"):
            for number, (gate, up) in enumerate(pair.chunk(2) for pair in tensor):
                stored[f"mtp.layers.0.mlp.experts.{number}.gate_proj.weight"] = gate
                stored[f"mtp.layers.0.mlp.experts.{number}.up_proj.weight"] = up
        elif rest.endswith("experts.down_proj"):
            stored |= {f"mtp.layers.0.mlp.experts.{e}.down_proj.weight": down for e, down in enumerate(tensor)}
        else:
            stored[f"mtp.layers.0.{rest}"] = tensor
    return stored


def accepted(model: Any) -> tuple[Tensor, float]:
    """The tokens that a model writes with its head, and the drafts that were right per forward of the model."""
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    handle = model.get_decoder().register_forward_pre_hook(count)
    options: dict[str, Any] = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False}
    drafted = model.generate(PROMPT, use_mtp=True, **options)
    handle.remove()
    assert torch.equal(drafted, model.generate(PROMPT, **options))
    return drafted, (STEPS - calls) / calls


def head_logits(model: Any, tokens: Tensor) -> Tensor:
    """(1, T, V): what the head predicts after each token of `tokens`, on the hidden states of `model`."""
    head = MtpModel.from_pretrained(model)
    with torch.no_grad():
        hidden = model.get_decoder()(tokens, use_cache=False).last_hidden_state[:, :-1]
        positions = torch.arange(1, tokens.shape[1])[None]
        state = head.forward_layer(0, hidden, positions, None, input_ids=tokens[:, 1:])
        return head._project_to_logits(state)


def test_a_head_is_kept_and_drafts_for_the_quantized_model(drafting: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert inspect(drafting).unused
    report = quantize(drafting, out, text, method="gptq")
    head = {name: tensor for name, tensor in tensors_of(drafting).items() if name.startswith("mtp.")}
    written = tensors_of(out)
    assert head and all(torch.equal(written[name], tensor) for name, tensor in head.items())
    assert {name for name, reason in report.left.items() if reason == DRAFTS} == {
        name.removesuffix(".weight") for name in head
    }
    llmq.enable_transformers()
    try:
        models = [transformers.AutoModelForCausalLM.from_pretrained(path).eval() for path in (drafting, out)]
    finally:
        llmq.disable_transformers()
    (before, right), (after, still) = (accepted(model) for model in models)
    floats, quantized = (head_logits(model, before) for model in models)
    print(f"right drafts per forward: {right:.2f} float, {still:.2f} quantized")  # for docs/MODELS.md
    print(f"logits of the head differ by {relative(quantized, floats):.2f}")
    assert right > 0.5 and still > right - 0.3
    assert relative(quantized, floats) < 0.3
