"""Which parts of a model are hard to quantize: the loss when each kind of part is rounded alone.

    python eval/hard_parts.py [--models tiny-python-llama tiny-python-qwen3 smollm2]
    python eval/hard_parts.py --render

One kind of part is rounded at a time, everything else is float32: weights of a kind of layer, inputs of a kind of
layer, outputs of norms, the probabilities of the softmax, the operands of the attention products, and the residual
sum. All rounding is to nearest and simulated. Finished rows are kept in eval/results/hard_parts.json. Rows of another
number of windows are measured again, after those that are missing.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "eval")]
from rows import Row, append, read  # noqa: E402
from subjects import YARDSTICK, folder_of, stamp, strata, table_row, texts  # noqa: E402

JSON, MARKDOWN, PICTURE = (ROOT / "eval" / "results" / f"hard_parts.{suffix}" for suffix in ("json", "md", "svg"))
MODELS = ("tiny-python-llama", "tiny-python-qwen3", "smollm2")
WINDOWS = {"smollm2": 2}  # of 256 tokens; 64 for the others
LENGTH = 256

Round = Callable[[Tensor], Tensor]


def symmetric(bits: int, dims: tuple[int, ...] | None) -> Round:
    """Round to nearest with one scale per slice that `dims` span, or one for the whole tensor (None)."""
    highest = 2 ** (bits - 1) - 1

    def rounded(x: Tensor) -> Tensor:
        largest = x.abs().amax(dims, keepdim=True) if dims is not None else x.abs().max()
        scale = (largest / (highest + 0.5)).clamp_min(torch.finfo(torch.float32).tiny)
        return (x / scale).round().clamp(-highest - 1, highest) * scale

    return rounded


ROUNDINGS: Mapping[str, Round] = {  # of a token of inputs, or of a row of a weight
    "8 bits, per token or row": symmetric(8, (-1,)),
    "8 bits, per tensor": symmetric(8, None),
    "4 bits, per token or row": symmetric(4, (-1,)),
}


class Attention:
    """transformers' attention, with rounded operands or probabilities."""

    def __init__(self) -> None:
        self.operands: Round | None = None
        self.probabilities: Round | None = None

    def __call__(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, **given: Any
    ) -> tuple[Tensor, None]:
        """q (B, H, T, D), k and v (B, KV, T, D) -> (B, T, H, D)."""
        if self.operands is not None:
            q, k, v = (self.operands(x) for x in (q, k, v))
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        scores = q @ k.transpose(2, 3) * given["scaling"]
        length = q.shape[2]
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        probabilities = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        if self.probabilities is not None:
            probabilities = self.probabilities(probabilities)
        return (probabilities @ v).transpose(1, 2).contiguous(), None


ATTENTION = Attention()
AttentionInterface.register("rounded", ATTENTION)


@dataclass(frozen=True)
class Part:
    """A kind of part, and how it is rounded inside a `with` block."""

    name: str
    rounding: Callable[[nn.Module, Round], Any]


def blocks_of(model: nn.Module) -> nn.ModuleList:
    return model.model.layers  # type: ignore[no-any-return,union-attr]


def linears(model: nn.Module, *suffixes: str) -> list[nn.Linear]:
    """The linear layers in the blocks, or those whose names end in one of `suffixes`."""
    named = blocks_of(model).named_modules()
    return [module for name, module in named if isinstance(module, nn.Linear) and name.endswith(suffixes or "")]


def weights_of(find: Callable[[nn.Module], list[Any]]) -> Callable[[nn.Module, Round], Any]:
    """Round the weights of modules."""

    @contextmanager
    def rounding(model: nn.Module, rounded: Round) -> Iterator[None]:
        modules = find(model)
        before = [module.weight.data for module in modules]
        for module in modules:
            module.weight.data = rounded(module.weight.data)
        yield
        for module, weight in zip(modules, before, strict=True):
            module.weight.data = weight

    return rounding


def hooked(find: Callable[[nn.Module], list[Any]], *, inputs: bool) -> Callable[[nn.Module, Round], Any]:
    """Round the inputs or the outputs of modules."""

    @contextmanager
    def rounding(model: nn.Module, rounded: Round) -> Iterator[None]:
        with ExitStack() as stack:
            for module in find(model):
                if inputs:
                    handle = module.register_forward_pre_hook(lambda _, given: (rounded(given[0]), *given[1:]))
                else:
                    handle = module.register_forward_hook(lambda _, given, output: rounded(output))
                stack.callback(handle.remove)
            yield

    return rounding


@contextmanager
def in_attention(field: str, rounded: Round) -> Iterator[None]:
    setattr(ATTENTION, field, rounded)
    yield
    setattr(ATTENTION, field, None)


def norms(model: nn.Module) -> list[nn.Module]:
    return [module for name, module in model.named_modules() if name.endswith("norm")]


def in_block(index: int) -> Callable[[nn.Module], list[Any]]:
    return lambda model: [m for m in blocks_of(model)[index].modules() if isinstance(m, nn.Linear)]


KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
INPUTS = {"q, k, v": KINDS[:3], "o_proj": KINDS[3:4], "gate, up": KINDS[4:6], "down_proj": KINDS[6:]}
PARTS = (
    Part("weights of all layers in the blocks", weights_of(linears)),
    *(Part(f"weights of {kind}", weights_of(lambda model, kind=kind: linears(model, kind))) for kind in KINDS),
    Part("weights of the first block", weights_of(in_block(0))),
    Part("weights of the last block", weights_of(in_block(-1))),
    Part("embedding, tied to the head or not", weights_of(lambda model: [model.get_input_embeddings()])),
    Part("head, tied to the embedding or not", weights_of(lambda model: [model.get_output_embeddings()])),
    Part("inputs of all layers in the blocks", hooked(linears, inputs=True)),
    *(
        Part(f"inputs of {name}", hooked(lambda model, kinds=kinds: linears(model, *kinds), inputs=True))
        for name, kinds in INPUTS.items()
    ),
    Part("inputs of the head", hooked(lambda model: [model.get_output_embeddings()], inputs=True)),
    Part("outputs of norms", hooked(norms, inputs=False)),
    Part("probabilities of the softmax", lambda model, rounded: in_attention("probabilities", rounded)),
    Part("operands of the attention products", lambda model, rounded: in_attention("operands", rounded)),
    Part("residual sum between the blocks", hooked(lambda model: list(blocks_of(model)), inputs=True)),
)


def log_probabilities(model: nn.Module, windows: Tensor) -> Iterator[Tensor]:
    """(T, V) of each window."""
    with torch.no_grad():
        for window in windows:
            yield model(window[None]).logits[0].log_softmax(-1)


def measure(model_name: str, folder: Path, text: Path, length: int, count: int) -> None:
    """Append the rows of one model that are missing."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    content = text.read_text(encoding="utf-8")
    if text.suffix == ".jsonl":
        content = "\n\n".join(json.loads(line)["text"] for line in content.splitlines())
    ids = tokenizer(content, return_tensors="pt", verbose=False)["input_ids"][0]
    windows = ids[: length * count].view(-1, length)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="rounded").eval()
    if model.config.tie_word_embeddings:  # so that embedding and head can be rounded one at a time
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.data.clone(), requires_grad=False)
    floats = list(log_probabilities(model, windows))
    cells = [(part, name) for part in PARTS for name in ROUNDINGS]
    known = {(row["part"], row["rounding"]): row["windows"] for row in read(JSON) if row["model"] == model_name}
    for part, name in sorted(cells, key=lambda cell: (cell[0].name, cell[1]) in known):
        if known.get((part.name, name)) == count:
            continue
        with part.rounding(model, ROUNDINGS[name]):
            pairs = zip(floats, log_probabilities(model, windows), strict=True)
            divergences = torch.stack([((p.exp() * (p - q)).sum(-1)).mean() for p, q in pairs])
        error = float(divergences.std() / len(divergences) ** 0.5)
        row: Row = {"model": model_name, "part": part.name, "rounding": name, "kl": float(divergences.mean())}
        append(JSON, {**row, "standard_error": error, "windows": len(windows), "stamp": stamp()})
        print(f"{model_name}, {part.name}, {name}: {row['kl']:.5f}", flush=True)


INTRODUCTION = """# Which parts are hard to quantize

Generated by `python eval/hard_parts.py`; the rows, with standard errors, are in [hard_parts.json](hard_parts.json).
KL divergence to the float32 model in nats per token, when one kind of part is rounded to nearest and everything else is
float32. Windows of 256 tokens that no model was fitted to: 64 for the bundled models, {few} for SmolLM2. Nothing is
calibrated or compensated here, and every rounding is simulated; probabilities use a signed grid, like all else.

![KL divergence per part](hard_parts.svg)
"""
READING = """
## What this says

* On the bundled models, 8 bits cost little wherever each token, or each row of a weight, has a scale: W8A8 with dynamic
  scales needs no exceptions. On SmolLM2 all weights together cost 0.003, but all inputs 0.03, and the inputs of q, k
  and v, of gate and up, and of `down_proj` have similar shares.
* One scale for a whole tensor costs more, and most of it comes from the inputs of `down_proj`, whose values differ most
  between channels and tokens: 0.5 of 0.66 on SmolLM2. This is the layer to keep in 16 bits with static scales:
  `--override "*down_proj:activations=none"`. [The same per layer](hard_layers.md), with `llmq sensitivity`.
* 4 bits for inputs cost several times more than 4 bits for weights. llmq writes no such model.
* llmq never rounds norms, the softmax, the products of attention or the residual sum; they stay in 16 bits in all
  formats.
* Softmax, norms, attention products, and first and last layers are often called hard, and the residual addition easy.
  Here norms are hard in 4 bits and the last block of SmolLM2 costs more than the first, but softmax and attention
  products cost less than the inputs of linear layers. The residual sum is not easy: on SmolLM2 it is the hardest part
  of all, 0.1 in 8 bits even with a scale per token.
"""


def render(rows: list[Row]) -> str:
    """results/hard_parts.md."""
    parts = [INTRODUCTION.format(few=WINDOWS["smollm2"])]
    cells = {(row["model"], row["part"], row["rounding"]): row["kl"] for row in rows}  # later rows replace earlier ones
    counts = {(row["model"], row["part"], row["rounding"]): row["windows"] for row in rows}
    for model in [name for name in MODELS if any(row["model"] == name for row in rows)]:
        parts += [
            f"\n## {model}\n",
            table_row(["rounded alone", *ROUNDINGS]),
            table_row(["---"] * (1 + len(ROUNDINGS))),
        ]
        for part in PARTS:
            values = [cells.get((model, part.name, rounding)) for rounding in ROUNDINGS]
            parts.append(table_row([part.name, *("not run" if value is None else f"{value:.5f}" for value in values)]))
        others = [count for (name, *_), count in counts.items() if name == model and count != WINDOWS.get(model, 64)]
        if others:
            parts.append(f"\n{len(others)} of these cells are of {others[0]} windows.")
    measured = "\nMeasured until {date} at {commit}: {hardware}, torch {torch}, transformers {transformers}."
    return "\n".join([*parts, READING, measured.format(**rows[-1]["stamp"])]) + "\n"


def draw(rows: list[Row]) -> None:
    """results/hard_parts.svg: one panel per model."""
    from matplotlib.figure import Figure

    models = [name for name in MODELS if any(row["model"] == name for row in rows)]
    figure = Figure(figsize=(5 + 3 * len(models), 8), layout="constrained")
    axes = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for axis, model in zip(axes, models, strict=True):
        for rounding, marker in zip(ROUNDINGS, "os^", strict=True):
            own = {row["part"]: row["kl"] for row in rows if (row["model"], row["rounding"]) == (model, rounding)}
            names = [part.name for part in PARTS if part.name in own]
            axis.plot([max(own[name], 1e-7) for name in names], names, marker, label=rounding)
        axis.set(xscale="log", title=model, xlabel="KL divergence, nats per token")
        axis.grid(alpha=0.3)
    axes[0].invert_yaxis()
    axes[-1].legend(loc="lower right")
    figure.savefig(PICTURE, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS[:2]))
    parser.add_argument("--folder", type=Path, default=YARDSTICK, help="the folder with smollm2 and its texts")
    parser.add_argument("--render", action="store_true", help="only write the page")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for model in arguments.models if not arguments.render else ():
        with tempfile.TemporaryDirectory() as scratch:
            text = strata(arguments.folder)[1][0] if model == "smollm2" else texts(model, Path(scratch))[1]
            measure(model, folder_of(model, arguments.folder), text, LENGTH, WINDOWS.get(model, 64))
    rows = read(JSON)
    draw(rows)
    MARKDOWN.write_text(render(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
