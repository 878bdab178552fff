"""Tuning where neither the float model nor a state of its quantized values fits into memory; killed and continued.

Three processes: one without a memory limit; one under the limit, killed in the middle; one under the limit that
continues. The first and the last write the same bytes.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from tests.builders import SIZES, VOCABULARY, save_tokenizer
from tests.command_line import ROOT, environment
from tests.runs import files_of

HIDDEN, BLOCKS, STEPS, KILLED = 512, 12, 2, 1
BLOCK_WEIGHTS = 7 * HIDDEN**2
FLOAT_BYTES = 4 * BLOCK_WEIGHTS * BLOCKS  # 88 MB
STATE_BYTES = 6 * BLOCK_WEIGHTS * BLOCKS  # 132 MB: v, and the two moments of Adam
# The memory that tuning may map in addition to Python and its libraries: weights and gradients of one block (15 MB),
# the state of one weight and the buffers to update it (ten times 1 MB), activations of 128 tokens, and room for the
# allocator.
ALLOWED_BYTES = 75_000_000

PROGRAM = """
import json, os, resource, signal, sys
from pathlib import Path
import torch
from llmq.config import QuantConfig
from llmq.job import Job
from llmq.methods import Method, Tuning
from llmq.report.record import TuningStep
from llmq.setting_fields import merged
from llmq.steps.end_to_end import session
torch.set_num_threads(1)  # every thread has a stack and an arena that count against the limit
tiny, model, out, text, steps, allowed, end = *sys.argv[1:5], *map(int, sys.argv[5:8])
session.SAVED_EVERY = session.SAVED_SHARE = 0
judged = session.Session._validation_loss
session.Session._validation_loss = lambda self: judged(self) - self._step  # the last step is the best
method = Method(rounding="rtn", validation=0.25, tuning=Tuning(steps=steps, scales=1e-2, rounding=0.0, tokens=128))
settings = {"samples": 8, "seqlen": 32, "bits": 3, "scales": "minmax", "group_size": 128, "calibration": [text]}
first = Job(tiny, f"{out}-tiny", merged(QuantConfig(), settings), stages=method, device="cpu", overwrite=True)
first.run()  # triggers late imports
job = Job(model, out, merged(QuantConfig(), settings), stages=method, device="cpu")
if allowed:
    mapped = next(int(l.split()[1]) for l in Path("/proc/self/status").read_text().splitlines() if "VmSize" in l)
    limit = 1024 * mapped + allowed
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        torch.empty(allowed * 23 // 20, dtype=torch.uint8)  # no more than the weights in float
        raise SystemExit("the limit does not hold")
    except RuntimeError:
        pass
seen = []
def stop(event):
    if isinstance(event, TuningStep):
        seen.append(event.step)
        if event.step == end:
            os.kill(os.getpid(), signal.SIGKILL)
report = job.run(stop).tuning
print(json.dumps({"steps": seen, "notes": len(report.notes), "history": report.history, "best": report.best}))
"""


def write_checkpoint(folder: Path) -> Path:
    """Write a Llama of random weights with equal blocks, one shard per block."""
    folder.mkdir()
    sizes = {"hidden_size": HIDDEN, "intermediate_size": HIDDEN, "num_hidden_layers": BLOCKS}
    config = LlamaConfig(**{**SIZES, **sizes}, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    config.save_pretrained(folder)
    save_tokenizer(folder)
    generator = torch.Generator().manual_seed(0)
    names = [*(f"self_attn.{name}_proj" for name in "qkvo"), *(f"mlp.{name}_proj" for name in ("gate", "up", "down"))]
    block = {f"{name}.weight": torch.randn(HIDDEN, HIDDEN, generator=generator) / 32 for name in names}
    block |= {f"{name}_layernorm.weight": torch.ones(HIDDEN) for name in ("input", "post_attention")}
    shards = {f"layer-{i}": {f"model.layers.{i}.{name}": block[name] for name in block} for i in range(BLOCKS)}
    embedding = torch.randn(VOCABULARY, HIDDEN, generator=generator)
    shards["rest"] = {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding / 32}
    shards["rest"]["model.norm.weight"] = torch.ones(HIDDEN)
    for shard, tensors in shards.items():
        stored = {name: tensor.bfloat16().clone() for name, tensor in tensors.items()}
        save_file(stored, folder / f"{shard}.safetensors")
    weight_map = {name: f"{shard}.safetensors" for shard, tensors in shards.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def tune(
    tiny: Path, model: Path, out: Path, text: Path, *, allowed: int, end: int = -1
) -> "subprocess.CompletedProcess[str]":
    exact = environment(MALLOC_MMAP_THRESHOLD_="100000")  # freed memory is returned to the system
    arguments = [str(argument) for argument in (tiny, model, out, text, STEPS, allowed, end)]
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, *arguments],
        cwd=ROOT, env=exact, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and a limit on address space that is enforced")
def test_a_model_larger_than_memory_is_tuned_and_resumed(
    checkpoint: Callable[..., Path], tmp_path: Path, text: Path
) -> None:
    tiny = checkpoint("llama", num_hidden_layers=1, hidden_size=128, intermediate_size=128)
    assert min(FLOAT_BYTES, STATE_BYTES) > ALLOWED_BYTES * 23 // 20
    model = write_checkpoint(tmp_path / "model")
    free = tune(tiny, model, tmp_path / "free", text, allowed=0)
    assert free.returncode == 0, free.stderr[-3000:]
    killed = tune(tiny, model, tmp_path / "out", text, allowed=ALLOWED_BYTES, end=KILLED)
    assert killed.returncode == -9, killed.stderr[-3000:]
    assert not (tmp_path / "out" / "config.json").exists()
    again = tune(tiny, model, tmp_path / "out", text, allowed=ALLOWED_BYTES)
    assert again.returncode == 0, again.stderr[-3000:]

    held, streamed = (json.loads(done.stdout.splitlines()[-1]) for done in (free, again))
    assert held["best"] == STEPS and held["history"] == streamed["history"]
    assert held["steps"] == list(range(STEPS + 1)) and streamed["steps"] == list(range(STEPS + 1))[KILLED - 1 :]
    assert files_of(tmp_path / "out") == files_of(tmp_path / "free")
