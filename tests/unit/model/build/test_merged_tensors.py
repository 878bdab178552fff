"""Weights that the checkpoint stores in another form than the model are read as transformers reads them."""

from pathlib import Path

import pytest
import torch
from transformers.core_model_loading import Transpose, WeightConverter

from llmq.checkpoint.reader import Checkpoint
from llmq.errors import FormatError
from llmq.model.build.conversions import converted_rows
from llmq.model.build.skeleton import CONVERTED
from llmq.runtime.open_skeleton import open_skeleton
from tests import builders
from tests.architectures import tiny

MERGED = "model.language_model.layers.0.mlp.shared_experts.gate_up_proj"  # gate and up are two tensors in the file
NAMED = "model.layers.1.self_attn.k_proj.sconv.weight_proj"  # its tensor is called weight_proj
HEAD = "lm_head"  # has more rows in the file


@pytest.mark.parametrize(("model_type", "layers"), [("minimax_m3_vl", (MERGED,)), ("inkling2_text", (NAMED, HEAD))])
def test_weights_of_another_form_are_read_and_kept_in_float(
    model_type: str, layers: tuple[str, ...], tmp_path: Path
) -> None:
    model = builders.causal_model(tiny(model_type))
    builders.save_model(tmp_path / "model", model)
    skeleton = open_skeleton(Checkpoint.open(tmp_path / "model"), builders.CPU, torch.float32)
    packable = {name for block in skeleton.blocks for name in block.linears}
    for layer in layers:
        name = f"{layer}.weight"
        assert torch.equal(skeleton.weights.original(name), model.get_parameter(name))
        assert layer not in packable
        assert layer == HEAD or skeleton.special_layers[layer] == CONVERTED


def test_experts_whose_rows_are_in_another_order_are_separated(tmp_path: Path) -> None:
    """Inkling 2 stores gate and up of an expert with rows in turn, and transformers has all rows of gate first."""
    model = builders.causal_model(tiny("inkling2_text"))
    builders.save_model(tmp_path / "model", model)
    weights = open_skeleton(Checkpoint.open(tmp_path / "model"), builders.CPU, torch.float32).weights
    path = "model.layers.0.mlp.experts"
    gate, up = (weights.original(f"{path}.1.{part}.weight") for part in ("gate_proj", "up_proj"))
    assert torch.equal(torch.cat([gate, up]), model.get_parameter(f"{path}.gate_up_proj")[1])


def test_a_stack_that_transformers_transposes_is_refused() -> None:
    """Its columns are not rows in another order, not even if it is square."""
    converter = WeightConverter("experts.up_projs", "experts.up_proj", operations=[Transpose(1, 2)])
    with pytest.raises(FormatError, match="changes more than the order of rows"):
        converted_rows(
            builders.causal_model(tiny("llama")), converter, "experts.up_proj", [torch.arange(4).view(1, -1, 1)]
        )
