"""Configurations with which building a model would not end, or fails somewhere in transformers."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmq.errors import UnsupportedModelError
from llmq.model.build import module_tree


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers as 1000000000, expected at most 512"),
        ({"num_hidden_layers": 2**63}, "num_hidden_layers"),
        ({"num_local_experts": 10**7}, "num_local_experts"),
        ({"head_dim": 2**40}, "head_dim"),
        ({"text_config": {"n_layer": 10**6}}, "n_layer"),
        ({"architectures": [["LlamaForCausalLM"]]}, "expected a list of names"),
        ({"architectures": 3}, "expected a list of names"),
    ],
)
def test_implausible_configuration_is_refused(
    changes: dict[str, Any], words: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    config = json.loads((checkpoint("llama", num_hidden_layers=1) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    start = time.process_time()
    with pytest.raises(UnsupportedModelError, match=words):
        module_tree.build(tmp_path, dtype=torch.float32, remote_code=False)
    assert time.process_time() - start < 2


def test_sizes_of_real_models_are_plausible(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copy(checkpoint("llama", num_hidden_layers=1) / "config.json", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    sizes = {"vocab_size": 262_144, "vocab_size_per_layer_input": 262_144, "moe_intermediate_size": 18_432}
    counts = {"num_experts": 512, "max_position_embeddings": 10_485_760, "rope_theta": 10**9, "block_size": 10**5}
    (tmp_path / "config.json").write_text(json.dumps(config | sizes | counts))
    module_tree.load_config(tmp_path, remote_code=False)
