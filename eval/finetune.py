"""Fine-tune SmolLM2 in float, so that its weights leave the 4-bit grid on which they lie.

    python eval/finetune.py [--folder FOLDER] [--steps 240] [--seed 0]

FOLDER/smollm2 was rounded to 4.5 bits once (`yardstick.py`). A few hundred steps of AdamW on FOLDER/text/tuning.jsonl,
documents of C4 that are neither calibration nor evaluation text, move its weights by a part of a step of that grid
without changing the function much. The copy is FOLDER/smollm2-tuned, in bfloat16. The same command makes the same copy
again, so the script is kept and not the weights.

*Off the grid* is the relative error of rounding the linear layers of the blocks to the old grid (4 bits in blocks of
32, with scale and minimum): 0.001 before, because the weights are stored in bfloat16; 0.08 for random weights.
"""

import argparse
import math
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "eval")]
from strata import TUNING, texts_of  # noqa: E402
from subjects import YARDSTICK, folder_of  # noqa: E402
from yardstick import MODEL, QUESTION, TEXT, answer  # noqa: E402

if TYPE_CHECKING:
    from torch import Tensor

TUNED = "smollm2-tuned"
WINDOWS, SEQLEN = 2, 256  # of a step
RATE, WARM_UP = 6e-4, 20  # peak learning rate, steps until it is reached; then a cosine down to zero
SETTINGS = {"betas": (0.9, 0.95), "weight_decay": 0.0}


def batches(texts: list[str], tokenizer: Any, steps: int, seed: int) -> Iterator["Tensor"]:
    """Yield (WINDOWS, SEQLEN) int64 for each step: documents in random order, joined and cut, repeated if necessary."""
    import torch

    drawn = random.Random(seed)
    ids: list[int] = []
    for _ in range(steps):
        while len(ids) < WINDOWS * SEQLEN:
            for text in drawn.sample(texts, len(texts)):
                ids += tokenizer(text, verbose=False)["input_ids"]
        batch, ids = ids[: WINDOWS * SEQLEN], ids[WINDOWS * SEQLEN :]
        yield torch.tensor(batch).view(WINDOWS, SEQLEN)


def rate(step: int, steps: int) -> float:
    """The learning rate of a step, as a fraction of the peak."""
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    return 0.5 + 0.5 * math.cos(math.pi * (step - WARM_UP) / max(1, steps - WARM_UP))


def off_grid(weights: dict[str, "Tensor"]) -> float:
    """The relative error of rounding the linear layers of the blocks to 4 bits in groups of 32, with a minimum."""
    error = size = 0.0
    for name, weight in weights.items():
        if weight.ndim == 2 and re.search(r"\.\d+\.", name):
            block = weight.detach().float().reshape(-1, 32)
            low, high = block.amin(1, keepdim=True), block.amax(1, keepdim=True)
            scale = ((high - low) / 15).clamp_min(1e-12)
            error += float((((block - low) / scale).round() * scale + low - block).square().sum())
            size += float(block.square().sum())
    return math.sqrt(error / size)


def fine_tune(source: Path, texts: list[str], out: Path, steps: int, seed: int) -> None:
    """Train the model of `source` on `texts`, and write it to `out`; embedding and head are trained, too."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).train()
    print(f"off the grid: {off_grid(model.state_dict()):.4f}", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, **SETTINGS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps))
    total = 0.0
    for step, tokens in enumerate(batches(texts, tokenizer, steps, seed), start=1):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        total += float(loss.detach())
        if step % 20 == 0:
            print(f"step {step}: mean loss of the last 20 {total / 20:.3f}", flush=True)
            total = 0.0
    print(f"off the grid: {off_grid(model.state_dict()):.4f}", flush=True)
    model.eval().to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=YARDSTICK, help="the folder that `yardstick.py` has made")
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    source, out = folder_of(MODEL, arguments.folder), arguments.folder / TUNED
    fine_tune(source, texts_of(arguments.folder / TEXT / TUNING), out, arguments.steps, arguments.seed)
    print(f"{out}: {QUESTION} {answer(out, QUESTION)}")


if __name__ == "__main__":
    main()
