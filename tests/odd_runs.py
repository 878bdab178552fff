"""Random configurations of a run, from end to end: each gives a model that is verified, or is refused with a reason.

`scripts/odd_runs.py` runs any number of them, `tests/e2e/test_odd_runs.py` a few.
"""

import contextlib
import io
import random
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import llmq
from llmq.errors import LlmqError
from llmq.gguf.reader import open_skeleton
from llmq.runtime.load import load_tokenizer
from llmq.verification.integrity import examine
from tests import builders
from tests.architectures import ARCHITECTURES, tiny
from tests.runs import logits, streamed_logits

METHODS = ("rtn", "rtn", "gptq", "gptq", "gptq", "awq", "awq", "fast", "fast", "balanced")
FORMATS = (
    "compressed-tensors", "compressed-tensors", "gptq", "gptq_v2", "awq", "mlx", "gguf", "gguf:q4_k", "gguf:q4_k_m",
    "gguf:q3_k_m", ("gptq", "gguf"), ("awq", "compressed-tensors"),
)  # fmt: skip
BITS = (2, 3, 4, 4, 4, 4, 4, 5, 8, "nvfp4", "mxfp4", "fp8")
GROUPS = (16, 16, 32, 32, 64, 128, 1024, "channel", "tensor")
DTYPES = ("float32", "float16", "bfloat16")
IN_GGUF = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "phi3", "gemma2", "gemma3_text")
RARE: dict[str, tuple[Any, ...]] = {  # settings that differ from the default in one of five runs
    "symmetric": (False,),
    "order": ("natural",),
    "scales": ("minmax",),
    "quantize_head": (True,),
    "rotate": (True,),
    "strict": (True,),
    "skip": (("*.down_proj",), ("re:layers.0.",), ("*",)),
    "overrides": (({"pattern": "*.up_proj", "bits": 8},), ({"pattern": "re:.*[qk]_proj", "group_size": "channel"},)),
    "activations": ("int8", "int8", "int8:static"),
    "damping": (1e-8, 0.9),
    "keep_grid": (False,),
}
NEARLY = 1.05  # times the distance of rtn: both are measured on few tokens

FINISHED, REFUSED, WORSE, FAILED = "finished", "refused", "worse than rtn", "failed"


@dataclass(frozen=True)
class Result:
    """One configuration and what became of it; `why` is the reason, or the KL of the method and of rtn."""

    number: int
    configuration: dict[str, Any]
    outcome: str
    why: str


def drawn(seed: int, number: int) -> dict[str, Any]:
    """Configuration `number`: architecture, dtype and the settings of the run."""
    numbers = random.Random(f"{seed}/{number}")
    chosen: dict[str, Any] = {
        "model_type": numbers.choice(sorted(ARCHITECTURES)),
        "dtype": numbers.choice(DTYPES),
        "method": numbers.choice(METHODS),
        "bits": numbers.choice(BITS),
        "group_size": numbers.choice(GROUPS),
        "format": numbers.choice(FORMATS),
        "validate": 0,
        "samples": numbers.choice((1, 4, 8, 16)),
        "seqlen": numbers.choice((2, 33, 33, 64, 64, 128)),
        "seed": numbers.choice((0, 1, 2**31, 2**63 - 1)),
    }
    chosen |= {name: numbers.choice(values) for name, values in RARE.items() if numbers.random() < 0.2}
    return _worth_running(chosen, numbers) if numbers.random() < 0.8 else chosen


def _worth_running(chosen: dict[str, Any], numbers: random.Random) -> dict[str, Any]:
    """Without what the format always refuses, which is worth a few runs only."""
    formats = chosen["format"] if isinstance(chosen["format"], tuple) else (chosen["format"],)
    if any(name.startswith("gguf") for name in formats):
        chosen |= {"model_type": numbers.choice(IN_GGUF), "bits": 4, "group_size": 32}
    if any(name.startswith("gguf:") for name in formats):
        fixed = {"bits", "group_size", "symmetric", "quantize_head", "overrides", "activations"}
        return {name: value for name, value in chosen.items() if name not in fixed}
    if {"awq", "gptq"} & set(formats):
        chosen |= {"bits": 4, "group_size": 32}
    if isinstance(chosen["bits"], str):  # a float grid: its groups are fixed, and it is symmetric
        chosen |= {"format": "compressed-tensors"}
        return {name: value for name, value in chosen.items() if name not in ("group_size", "symmetric", "overrides")}
    if "activations" in chosen:
        chosen |= {"format": "compressed-tensors"}
    return chosen


def run(seed: int, number: int, folder: Path) -> Result:
    """Run configuration `number` in an empty folder, which is removed afterwards."""
    configuration = drawn(seed, number)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            outcome, why = _outcome(dict(configuration), folder)
    except Exception as error:
        outcome, why = FAILED, f"{type(error).__name__}: {error}"
    shutil.rmtree(folder, ignore_errors=True)
    return Result(number, configuration, outcome, why)


def _outcome(settings: dict[str, Any], folder: Path) -> tuple[str, str]:
    folder.mkdir(parents=True)
    model, text = folder / "model", builders.write_text(folder / "text.txt")
    original = builders.causal_model(tiny(settings.pop("model_type")), dtype=settings.pop("dtype"))
    builders.save_model(model, original)
    tokenizer = load_tokenizer(model, remote_code=False)
    windows = torch.tensor(tokenizer(text.read_text())["input_ids"][: 8 * 32]).reshape(8, 32)
    expected = logits(original.float(), windows)
    calibrated = {"calibration": [text], "device": "cpu", **settings}
    try:
        llmq.quantize(model, folder / "out", **calibrated)
    except LlmqError as error:
        left = [file.name for file in (folder / "out").rglob("config.json") if ".llmq-partial" not in file.parts]
        assert str(error) and not (left and isinstance(settings["format"], str)), f"refused, but wrote {left}: {error}"
        return REFUSED, f"{type(error).__name__}: {error}"
    distance = _distance(folder / "out", settings["format"], model, windows, expected)
    if settings["method"] == "rtn" or settings.get("activations") == "int8:static":  # rtn measures no ranges of inputs
        return FINISHED, str(distance)
    llmq.quantize(model, folder / "rtn", **{**calibrated, "method": "rtn"})
    nearest = _distance(folder / "rtn", settings["format"], model, windows, expected)
    worse = distance.kl > NEARLY * nearest.kl + 1e-7 and distance.logits > NEARLY * nearest.logits
    return WORSE if worse else FINISHED, f"{distance}; rtn: {nearest}"


@dataclass(frozen=True)
class Distance:
    """From the float model: the KL divergence, in nats per token, and the relative squared error of the logits.

    The KL divergence of a random model comes from a few positions where two tokens are nearly as probable, so it is
    noisy: a model counts as worse if both are larger.
    """

    kl: float
    logits: float

    def __str__(self) -> str:
        return f"KL {self.kl:.3g}, error of the logits {self.logits:.3g}"


def _distance(out: Path, formats: Any, model: Path, windows: Tensor, expected: Tensor) -> Distance:
    """How far the quantized model is from the float one: that of the format with the largest KL divergence.

    Raises AssertionError for a model that `llmq verify` finds broken, or that computes NaN.
    """
    folders = [out] if isinstance(formats, str) else [out / name for name in formats]
    distances = []
    for folder in folders:
        problems = examine(folder).problems
        assert not problems, problems
        file = next(folder.glob("*.gguf"), None)
        if file is not None:
            actual = streamed_logits(open_skeleton(file, builders.CPU, torch.float32, model), windows)
        else:
            actual = logits(llmq.load(folder, device="cpu")[0], windows)
        assert bool(actual.isfinite().all()), "the quantized model computes NaN"
        p, q = expected.double().log_softmax(-1), actual.double().log_softmax(-1)
        kl, error = (p.exp() * (p - q)).sum(-1).mean(), (actual - expected).square().sum() / expected.square().sum()
        distances.append(Distance(float(kl), float(error)))
    return max(distances, key=lambda distance: distance.kl)
