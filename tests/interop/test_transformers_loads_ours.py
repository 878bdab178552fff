"""transformers with only the compressed-tensors package loads what llmq writes, and computes the same logits.

The loading process cannot import llmq, so it runs only the code of the other packages.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

import llmq
from llmq.evaluation.streaming import open_source
from llmq.runtime.load import load_model
from tests import builders
from tests.command_line import ROOT

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(
        importlib.util.find_spec("compressed_tensors") is None,
        reason="needs the package compressed-tensors, which scripts/test.sh installs in a separate environment",
    ),
]

LOAD = """
import json, sys
sys.modules["llmq"] = sys.modules["llmq_kernels"] = None  # importing them now fails
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig
logits = {}
for name, (path, dequantize) in json.loads(sys.argv[2]).items():
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    options |= {"dtype": torch.float32, "output_loading_info": True}
    model, loading = AutoModelForCausalLM.from_pretrained(path, **options)
    assert not loading["missing_keys"] and not loading["unexpected_keys"], (name, loading)
    with torch.no_grad():
        logits[name] = model.eval()(torch.arange(3, 67)[None]).logits.contiguous()
save_file(logits, sys.argv[1])
"""

BUNDLED = "the bundled model, W8A8"
STATIC = "W8A8 with static inputs"
FLOATS = ("fp8", "fp8 with static inputs", "W4A8 with fp8 inputs")
WITH_INPUTS = (BUNDLED, STATIC, "W8A8", "W8A8 with float inputs of some layers", "W4A8", "W4A8 in bytes", *FLOATS)
NEOX = "a model whose head has another name on the disk"

CALIBRATED: dict[str, Any] = {
    "method": "gptq", "samples": 4, "seqlen": 32, "validate": 0,
    "calibration": [list(range(first, first + 64)) for first in range(3, 7)],
}  # fmt: skip

# setting, and whether the package must dequantize at load: its packed path fails on any asymmetric file, even its
# own ("size mismatch for weight_zero_point", compressed-tensors 0.20 with transformers 5.23)
SETTINGS = {
    "4 bits, g128": ({}, False),
    "4 bits, g32": ({"group_size": 32}, False),
    "4 bits, one scale per row": ({"group_size": "channel"}, False),
    "8 bits": ({"bits": 8}, False),
    "7 bits": ({"bits": 7}, False),
    "5 bits": ({"bits": 5}, False),
    "3 bits": ({"bits": 3}, False),
    "2 bits": ({"bits": 2}, False),
    "mixed grids": ({"overrides": ["down_proj:bits=8", "self_attn.*:group_size=64"]}, False),
    "asymmetric": ({"symmetric": False}, True),
    "W8A8": ({"preset": "w8a8"}, False),
    "W8A8 with float inputs of some layers": ({"preset": "w8a8", "overrides": ["down_proj:activations=none"]}, False),
    "W4A8": ({"preset": "w4a8"}, False),
    "W4A8 in bytes": ({"preset": "w4a8", "format": "int-quantized"}, False),
    STATIC: ({"preset": "w8a8", "activations": "int8:static", **CALIBRATED}, False),
    "fp8": ({"preset": "fp8"}, False),
    "fp8 with static inputs": ({"preset": "fp8", "activations": "fp8:static", **CALIBRATED}, False),
    "W4A8 with fp8 inputs": ({"bits": 4, "activations": "fp8"}, False),
    BUNDLED: ({"preset": "w8a8"}, False),
    NEOX: ({"skip": ["layers.0.mlp.*"]}, False),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One random model, quantized with every setting."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=96, max_position_embeddings=64,
    )  # fmt: skip
    base = tmp_path_factory.mktemp("interop")
    LlamaForCausalLM(config).save_pretrained(base / "original")
    builders.save_tokenizer(base / "original")
    renamed = GPTNeoXConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, vocab_size=96,
        max_position_embeddings=64,
    )  # fmt: skip
    GPTNeoXForCausalLM(renamed).save_pretrained(base / "renamed")
    models = {NEOX: base / "renamed", BUNDLED: ROOT / "eval" / "models" / "tiny-python-llama"}
    for name, (settings, _) in SETTINGS.items():
        llmq.quantize(models.get(name, base / "original"), base / name, **{"method": "rtn", **settings})
    return {name: base / name for name in SETTINGS}


@pytest.fixture(scope="module")
def their_logits(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The logits of transformers for each of the folders, computed in a separate process."""
    out = tmp_path_factory.mktemp("theirs") / "logits.safetensors"
    request = json.dumps({name: (str(folder), SETTINGS[name][1]) for name, folder in folders.items()})
    command = [sys.executable, "-c", LOAD, str(out), request]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return load_file(out)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SETTINGS if name not in WITH_INPUTS])
def test_transformers_computes_the_same_logits(
    folders: dict[str, Path], their_logits: dict[str, torch.Tensor], name: str
) -> None:
    with torch.no_grad():
        ours = load_model(folders[name])(torch.arange(3, 67)[None]).logits
    theirs = their_logits[name]
    scale = theirs.abs().max()
    assert scale > 0.1  # random logits, not a constant
    assert (ours - theirs).abs().max() < 1e-4 * scale  # float32 sums in another order


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": "nvfp4"},
        {"bits": "mxfp4", "overrides": ["down_proj:bits=8"]},
        {"bits": "nvfp4", "overrides": ["down_proj:bits=fp8", "o_proj:bits=4"]},
        {"bits": "fp8"},
    ],
    ids=str,
)
def test_transformers_decompresses_floats_to_the_bit(settings: dict[str, Any], tmp_path: Path) -> None:
    # The package decompresses to bfloat16, which holds the products of nvfp4 and mxfp4 exactly.
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, vocab_size=96, **sizes)).to(torch.bfloat16).save_pretrained(
        tmp_path / "base"
    )
    llmq.quantize(str(tmp_path / "base"), tmp_path / "out", method="rtn", device="cpu", **settings)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        model(torch.arange(3, 40)[None])  # decompresses
    weights = dict(llmq.dequantize(tmp_path / "out"))
    assert len(weights) == 7
    for name, weight in weights.items():
        assert torch.equal(model.get_parameter(name), weight.to(torch.bfloat16)), name


def test_transformers_rounds_inputs_to_nvfp4_alike(tmp_path: Path) -> None:
    """The package decompresses to bfloat16, which is exact, and runs in float32 only after that."""
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=96,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    builders.save_tokenizer(tmp_path / "base")
    llmq.quantize(str(tmp_path / "base"), tmp_path / "out", device="cpu", preset="nvfp4", **CALIBRATED)
    model, tokens = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), torch.arange(3, 67)[None]
    with torch.no_grad():
        model(tokens)  # decompresses
        torch.nn.Module.float(model)  # its own float() refuses quantized models
        theirs = model(tokens).logits.log_softmax(-1)
    ours = {name: evaluated(tmp_path / "out", tokens, name).log_softmax(-1) for name in ("file", "none")}
    assert (ours["file"] - theirs).abs().max() < 1e-5
    assert (ours["none"] - theirs).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_INPUTS)
def test_transformers_rounds_inputs_alike(
    folders: dict[str, Path], their_logits: dict[str, torch.Tensor], name: str
) -> None:
    """`llmq eval` computes the same sums. The packed layers sum in another order, which rounds some inputs differently.

    In a real model such differences grow from layer to layer, so the packed layers are compared in random ones.
    """
    tokens = torch.arange(3, 67)[None]
    theirs = their_logits[name].log_softmax(-1)

    def distance(ours: torch.Tensor) -> float:
        return float((ours.log_softmax(-1) - theirs).abs().mean())

    assert distance(evaluated(folders[name], tokens, "file")) < 1e-5
    assert distance(evaluated(folders[name], tokens, "none")) > 1e-4
    if name != BUNDLED:
        with torch.no_grad():
            assert distance(load_model(folders[name])(tokens).logits) < 1e-4


def evaluated(folder: Path, tokens: torch.Tensor, activations: str) -> torch.Tensor:
    source = open_source(folder, torch.device("cpu"), activations=activations)
    source.run(tokens)
    [(_, logits)] = source.logits(1)
    return logits
