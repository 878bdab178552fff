"""Peak memory is that of one block for any number of blocks: 4 and 16 blocks, under a limit below 16 blocks."""

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

HIDDEN, INTERMEDIATE = 1152, 512
BLOCK_BYTES = 4 * (4 * HIDDEN**2 + 3 * HIDDEN * INTERMEDIATE + 2 * HIDDEN)  # in float32, the dtype of the run: 28 MB
FEW, MANY = 4, 16
# The memory that a run may map in addition to Python and its libraries: the block, the Hessians of its inputs (a fifth
# of a block each), and some copies of a weight; less than three blocks in total. Five leave room for the allocator.
# The 16 blocks of the checkpoint would not fit, even in bfloat16, where they take the memory of eight.
ALLOWED_BYTES = 5 * BLOCK_BYTES
# A run keeps a few kilobytes of records per block. If it kept 1/24 of the weights, 12 more blocks would take half a
# block more.
MARGIN_BYTES = BLOCK_BYTES // 2

# Peak resident memory is read from /proc: the value of getrusage starts at that of the parent process.
PROGRAM = """
import json, resource, sys
from pathlib import Path
import torch
import llmq
torch.set_num_threads(1)  # every thread has a stack and an arena that count against the limit
tiny, few, many, text, out, allowed = *sys.argv[1:6], int(sys.argv[6])
skip = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]  # one layer per block is enough, and quick

def memory(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key + ":"))

def peak(model, method):
    settings = {"samples": 4, "seqlen": 32, "scales": "minmax", "calibration": text, "device": "cpu", "skip": skip}
    report = llmq.quantize(model, f"{out}-{Path(model).name}-{method}", method=method, **settings)
    return len(report.blocks), memory("VmHWM")

for method in ("rtn", "gptq"):
    start = peak(tiny, method)  # triggers late imports
limit = memory("VmSize") + allowed
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
peaks = [start, *(peak(model, method) for method in ("rtn", "gptq") for model in (few, many))]
try:
    torch.empty(allowed, dtype=torch.uint8)
    limited = False
except RuntimeError:
    limited = True
print(json.dumps([peaks, limited]))
"""


def write_checkpoint(folder: Path, blocks: int) -> Path:
    """Write a Llama of random weights, one shard per block, with at most one block in memory."""
    folder.mkdir()
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": blocks}
    config = LlamaConfig(**{**SIZES, **sizes}, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    config.save_pretrained(folder)
    save_tokenizer(folder)
    generator = torch.Generator().manual_seed(0)
    shapes = {f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"}
    shapes |= {f"mlp.{name}_proj": (INTERMEDIATE, HIDDEN) for name in ("gate", "up")}
    shapes["mlp.down_proj"] = (HIDDEN, INTERMEDIATE)
    block = {f"{name}.weight": torch.randn(shape, generator=generator) / 32 for name, shape in shapes.items()}
    block |= {f"{name}_layernorm.weight": torch.ones(HIDDEN) for name in ("input", "post_attention")}
    block = {name: tensor.bfloat16() for name, tensor in block.items()}
    assert 2 * sum(tensor.nbytes for tensor in block.values()) == BLOCK_BYTES
    shards = {f"layer-{i}": {f"model.layers.{i}.{name}": block[name] for name in block} for i in range(blocks)}
    embedding = torch.randn(VOCABULARY, HIDDEN, generator=generator).bfloat16()
    shards["rest"] = {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding / 32}
    shards["rest"]["model.norm.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
    for shard, tensors in shards.items():
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / f"{shard}.safetensors")
    weight_map = {name: f"{shard}.safetensors" for shard, tensors in shards.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and a limit on address space that is enforced")
def test_peak_memory_does_not_grow_with_the_number_of_blocks(
    checkpoint: Callable[..., Path], tmp_path: Path, text: Path
) -> None:
    tiny = checkpoint("llama", num_hidden_layers=1, hidden_size=128, intermediate_size=128)
    few, many = (write_checkpoint(tmp_path / f"{blocks}-blocks", blocks) for blocks in (FEW, MANY))
    assert sum(file.stat().st_size for file in many.glob("layer-*")) > ALLOWED_BYTES + 2 * BLOCK_BYTES
    arguments = [str(argument) for argument in (tiny, few, many, text, tmp_path / "out", ALLOWED_BYTES)]
    exact = environment(MALLOC_MMAP_THRESHOLD_="100000")  # freed memory is returned to the system, so peaks are exact
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, *arguments],
        cwd=ROOT, env=exact, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    peaks, limited = json.loads(done.stdout.splitlines()[-1])
    assert limited
    assert [blocks for blocks, _ in peaks] == [1, FEW, MANY, FEW, MANY]
    start, rtn_few, rtn_many, gptq_few, gptq_many = (peak for _, peak in peaks)
    assert rtn_few - start > BLOCK_BYTES and gptq_few - rtn_many > BLOCK_BYTES // 4  # the measurement does detect a run
    assert rtn_many - rtn_few < MARGIN_BYTES
    assert gptq_many - gptq_few < MARGIN_BYTES
