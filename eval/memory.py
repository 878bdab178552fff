"""Measure how peak memory depends on the number of blocks, for every method.

    python eval/memory.py                      models of 2, 4, 8 and 16 equal blocks, random weights
    python eval/memory.py --methods balanced --blocks 2 4
    python eval/memory.py --shape 1.1B --methods balanced --limit 6 --blocks 22 --steps 3
    python eval/memory.py --methods fast --blocks 4 --limit 0.9 --group FOLDER
    python eval/memory.py --render             only the page, from memory.json

A run is one process. Peak memory is its peak resident memory minus that of a run on a model of one tiny block, so
Python, torch and transformers are not counted. With --limit GB the address space of the process is limited (RLIMIT_AS);
with --group too, the memory of a control group of Linux that you made for this, and that the run enters. Finished rows
are appended to eval/results/memory.json.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "eval"))
from rows import Row, append, read  # noqa: E402
from subjects import stamp, table_row  # noqa: E402

JSON, MARKDOWN = (ROOT / "eval" / "results" / name for name in ("memory.json", "memory.md"))
METHODS = ("rtn", "gptq", "awq", "fast", "balanced", "best")
BLOCKS = (2, 4, 8, 16)
VOCABULARY = 512
# hidden size, intermediate size, heads, key-value heads
SHAPES = {"tiny": (64, 64, 4, 4), "small": (1024, 1024, 8, 8), "1.1B": (2048, 5632, 32, 4)}
CASE = ("shape", "blocks", "method", "limit", "limited", "steps")
LIMITS = ("memory.max", "memory.limit_in_bytes")  # the file with the limit of a control group, by version
TOKENS = {"samples": 8, "seqlen": 128}

MAKE = """
import sys, torch
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from tokenizers import Tokenizer, models, pre_tokenizers
folder, vocabulary, blocks, hidden, intermediate, heads, kv = sys.argv[1], *map(int, sys.argv[2:])
config = LlamaConfig(hidden_size=hidden, intermediate_size=intermediate, num_attention_heads=heads,
                     num_key_value_heads=kv, num_hidden_layers=blocks, vocab_size=vocabulary)
torch.manual_seed(0)
LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="200MB")
words = {f"t{i}": i for i in range(vocabulary)}
tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
"""

RUN = """
import json, os, resource, sys, time
from dataclasses import replace
from pathlib import Path
import torch
torch.set_num_threads(1)
import llmq
from llmq.methods import METHODS
model, out, method, group = sys.argv[1:5]
samples, seqlen, limit, steps = map(int, sys.argv[5:9])
stages = METHODS[method]
if not limit:
    stages = stages.with_given_text_only()
if steps:
    tunings = {name: getattr(stages, name) for name in ("block_tuning", "tuning")}
    stages = replace(stages, **{name: tuning and replace(tuning, steps=steps) for name, tuning in tunings.items()})
if group:
    Path(group, "cgroup.procs").write_text(str(os.getpid()))
elif limit:
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
start = time.process_time()
text = str(Path(out).parent / "text.txt")
report = llmq.quantize(model, out, stages=stages, samples=samples, seqlen=seqlen, calibration=text, group_size=64)
peak = next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
notes = [*report.notes, *(report.tuning.notes if report.tuning else ())]
print(json.dumps({"peak_bytes": peak, "cpu_seconds": time.process_time() - start, "notes": notes}))
"""


def run(scratch: Path, case: Row, group: Path | None) -> Row:
    """One process that quantizes a random model; `case` has the names of CASE, `group` is its control group, if any."""
    shape, blocks, method, limit = case["shape"], case["blocks"], case["method"], case["limit"]
    if group is not None:
        file = next(group / name for name in LIMITS if (group / name).exists())
        file.write_text(str(limit))
    model, out = scratch / f"{shape}-{blocks}", scratch / "out"
    if not model.exists():
        numbers = [str(number) for number in (VOCABULARY, blocks, *SHAPES[shape])]
        subprocess.run([sys.executable, "-c", MAKE, str(model), *numbers], check=True, capture_output=True)
    words = " ".join(f"t{(7 * i * i + i) % VOCABULARY}" for i in range(2 * TOKENS["samples"] * TOKENS["seqlen"]))
    (scratch / "text.txt").write_text(words)
    numbers = [str(number) for number in (*TOKENS.values(), limit, case["steps"])]
    arguments = [str(model), str(out), method, str(group or ""), *numbers]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUN, *arguments], capture_output=True, text=True, check=False
    )
    subprocess.run(["rm", "-rf", str(out)], check=True)
    if done.returncode:
        raise SystemExit(f"error: {method} on {blocks} blocks failed\n{done.stderr[-2000:]}")
    figures = json.loads(done.stdout.splitlines()[-1])
    return {**case, **figures, "measured": stamp()}


INTRODUCTION = """# Peak memory and the number of blocks

Generated by `python eval/memory.py`; the figures are in [memory.json](memory.json).  Random Llama models in bfloat16,
{samples} x {seqlen} calibration tokens, one thread, float32 on a CPU.  Megabytes of peak resident memory over that of a
run on one tiny block.  Hidden states of the backward pass (`balanced`, `best`) are kept for each block: they use free
memory, and are read from disk or computed in parts where there is little. `fast`, `balanced` and `best` also have the
whole model in memory while it writes text, if so much is free. That is turned off here, except under a limit.
"""


def render(rows: Sequence[Row]) -> str:
    """results/memory.md."""
    parts = [INTRODUCTION.format(**TOKENS)]
    start = {row["method"]: row["peak_bytes"] for row in rows if row["shape"] == "tiny"}
    table = ("shape", "limit", "limited", "steps")
    of_rows = [tuple(row[name] for name in table) for row in rows]
    for key in dict.fromkeys(key for key in of_rows if key[0] != "tiny"):
        shape, limit, kind, steps = key
        own = [row for row, other in zip(rows, of_rows, strict=True) if other == key]
        blocks = sorted({row["blocks"] for row in own})
        limited = f", at most {limit / 1e9:g} GB of {kind}" if limit else ""
        shortened = f", {steps} steps of tuning" if steps else ""
        parts.append(f"\n## {shape}, hidden size {SHAPES[shape][0]}{limited}{shortened}\n")
        parts += [table_row(["method", *(f"{n} blocks" for n in blocks)]), table_row(["---"] * (len(blocks) + 1))]
        for method in METHODS:
            peaks = {row["blocks"]: row["peak_bytes"] - start[method] for row in own if row["method"] == method}
            if peaks:
                parts.append(table_row([method, *(f"{peaks[n] / 1e6:.0f}" if n in peaks else "" for n in blocks)]))
        retried = sum(note.startswith("out of memory") for row in own for note in row["notes"])
        parts += [f"\nThese runs were out of memory and continued with less {retried} times."] if retried else []
        parts.append("\nMeasured until {date} at {commit}: {hardware}, torch {torch}.".format(**own[-1]["measured"]))
    return "\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--shape", choices=[name for name in SHAPES if name != "tiny"], default="small")
    parser.add_argument("--blocks", nargs="+", type=int, default=list(BLOCKS))
    parser.add_argument("--limit", type=float, default=0, metavar="GB", help="limit of the address space")
    parser.add_argument("--group", type=Path, metavar="FOLDER", help="limit a control group instead")
    parser.add_argument("--steps", type=int, default=0, help="steps of tuning; 0: those of the method")
    parser.add_argument("--render", action="store_true", help="only write the page")
    arguments = parser.parse_args()
    limit = round(1e9 * arguments.limit)
    limited = ("a control group" if arguments.group else "address space") if limit else ""
    wanted = [("tiny", 1, method, 0, "", 0) for method in arguments.methods]
    own = [(arguments.shape, blocks) for blocks in arguments.blocks]
    wanted += [(*model, method, limit, limited, arguments.steps) for method in arguments.methods for model in own]
    with tempfile.TemporaryDirectory() as scratch:
        for case in wanted if not arguments.render else ():
            if case not in [tuple(row[name] for name in CASE) for row in read(JSON)]:
                group = arguments.group if case[3] else None
                row = run(Path(scratch), dict(zip(CASE, case, strict=True)), group)
                append(JSON, row)
                print(*case, f"{row['peak_bytes'] / 1e6:.0f} MB, {row['cpu_seconds']:.0f} s", *row["notes"], flush=True)
    MARKDOWN.write_text(render(read(JSON)), encoding="utf-8")


if __name__ == "__main__":
    main()
