"""Measure what each stage contributes, alone and with others, and whether tuning on one domain harms another.

    python eval/ablation.py                          all available models, draw 0, 4 bits symmetric
    python eval/ablation.py --models tiny-python-llama --seeds 0 1 2 --zeros asymmetric
    python eval/ablation.py --only "gptq" "+ target"
    python eval/ablation.py --domains                KL on texts of three domains, calibrated on the first only
    python eval/ablation.py --render                 only the tables, from ablation.json and domains.json

Finished rows are appended to ablation.json and domains.json in eval/results/, and existing rows are not measured again.
KL is KL(float ‖ quantized) in nats per token on evaluation text, of the file read back. Seconds are CPU-seconds of the
process, without imports and evaluation.
"""

import argparse
import dataclasses
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import llmq
from llmq.cli.terminal import quiet_transformers
from llmq.evaluation.measure import measure, measure_many
from llmq.methods import METHODS, Method, Tuning

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "eval"))
from rows import Row, append, read  # noqa: E402
from subjects import MODELS, SAMPLES, SEQLEN, WINDOWS, folder_of, other_domains, stamp, table_row, texts  # noqa: E402

JSON, DOMAINS_JSON, MARKDOWN = (
    ROOT / "eval" / "results" / name for name in ("ablation.json", "domains.json", "ablation.md")
)
ZEROS = ("symmetric", "asymmetric")
GPTQ, BALANCED, BEST = METHODS["gptq"], METHODS["balanced"], METHODS["best"]


def held_out(**stages: object) -> Method:
    """GPTQ with additional stages, and validation sequences to select by."""
    return dataclasses.replace(GPTQ, validation=BALANCED.validation, **stages)  # type: ignore[arg-type]


TARGET = {"alphas": (1.0,)}
REFINED = {**TARGET, "refinements": ("descent", "refit")}
SCALES = Tuning(steps=120, scales=1e-3, rounding=0.0, tokens=1024)
ROUNDING = Tuning(steps=120, scales=0.0, rounding=1e-3, tokens=1024)
BOTH = Tuning(steps=120, scales=1e-3, rounding=1e-3, tokens=1024)
BLOCKS = Tuning(steps=100, scales=0.0, rounding=1e-3, tokens=1024)
BLOCKS_BY_FISHER = dataclasses.replace(BLOCKS, fisher=True)
WEIGHTED = {"alphas": (1.0, 0.5), "refinements": ("descent",), "token_weights": True}

# Each row: stages and settings of the run; GPTQ as in the paper is a choice of column order and scales.
STAGES: Mapping[str, tuple[Method, dict[str, Any]]] = {
    "rtn, min-max": (METHODS["rtn"], {"scales": "minmax"}),
    "rtn": (METHODS["rtn"], {}),
    "gptq, paper": (GPTQ, {"order": "natural", "scales": "minmax"}),
    "gptq, min-max": (GPTQ, {"scales": "minmax"}),
    "gptq": (GPTQ, {}),
    "gptq, a tenth held out": (held_out(), {}),
    "+ target": (held_out(**TARGET), {}),
    "+ target, chosen of 1, ½, ¼": (held_out(alphas=(1.0, 0.5, 0.25)), {}),
    "+ descent": (held_out(refinements=("descent",)), {}),
    "+ refit": (held_out(refinements=("refit",)), {}),
    "+ target, damping 0.003": (held_out(**TARGET), {"damping": 0.003}),
    "+ target, damping 0.03": (held_out(**TARGET), {"damping": 0.03}),
    "+ awq": (held_out(transforms=("awq",)), {}),
    "+ token weights": (held_out(token_weights=True), {}),
    "+ tuning of scales": (held_out(tuning=SCALES), {}),
    "+ tuning of rounding": (held_out(tuning=ROUNDING), {}),
    "+ tuning of both": (held_out(tuning=BOTH), {}),
    "+ target, descent": (held_out(**TARGET, refinements=("descent",)), {}),
    "+ target, descent, refit": (held_out(**REFINED), {}),
    "+ target, descent, refit, awq": (held_out(**REFINED, transforms=("awq",)), {}),
    "+ target, block tuning": (held_out(**TARGET, block_tuning=BLOCKS), {}),
    "+ target, descent, refit, token weights": (held_out(**REFINED, token_weights=True), {}),
    "+ target, descent, refit, tuning of scales": (held_out(**REFINED, tuning=SCALES), {}),
    "+ target, tuning of both": (held_out(**TARGET, tuning=BOTH), {}),
    "+ target, descent, refit, tuning of both": (held_out(**REFINED, tuning=BOTH), {}),
    "+ target, descent, token weights": (held_out(**WEIGHTED), {}),
    "+ target, descent, token weights, blocks": (held_out(**WEIGHTED, block_tuning=BLOCKS), {}),
    "+ target, descent, token weights, blocks by Fisher": (held_out(**WEIGHTED, block_tuning=BLOCKS_BY_FISHER), {}),
    "fast": (METHODS["fast"], {}),
    "balanced": (BALANCED, {}),
    "best": (BEST, {}),
}
DOMAIN_METHODS = ("rtn", "gptq", "fast", "balanced", "best")


def ablate(model: str, stages: str, zeros: str, seed: int) -> Row:
    """Make one row: quantize with these stages, and measure."""
    method, settings = STAGES[stages]
    with tempfile.TemporaryDirectory() as scratch:
        calibration, evaluation = texts(model, Path(scratch) / "text")
        out, path = Path(scratch) / "out", folder_of(model)
        began = time.process_time()
        report = llmq.quantize(
            str(path), out, stages=method, calibration=[str(calibration)], samples=SAMPLES, seqlen=SEQLEN, seed=seed,
            symmetric=zeros == "symmetric", **settings,
        )  # fmt: skip
        taken = time.process_time() - began
        measured = measure(out, path, str(evaluation), seqlen=SEQLEN, limit=WINDOWS)
    assert measured.original is not None, "measured against the original"
    return {
        "model": model, "stages": stages, "zeros": zeros, "seed": seed, "kl_mean": measured.model.kl_mean,
        "perplexity": measured.model.perplexity, "float_perplexity": measured.original.perplexity,
        "cpu_seconds": taken, "gains": [f"{stage.stage}: {stage.outcome}" for stage in report.stages],
        "peak_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000, "measured": stamp(),
    }  # fmt: skip


def domain_rows(model: str, scratch: Path) -> Iterator[Row]:
    """For each method the KL on the domain of the model and on two others; calibrated on the former only."""
    calibration, evaluation = texts(model, scratch / "text")
    path, sources = folder_of(model), {"its own": evaluation, **other_domains(evaluation, scratch)}
    outs = {method: scratch / method for method in DOMAIN_METHODS}
    for method, out in outs.items():
        llmq.quantize(str(path), out, method=method, calibration=[str(calibration)], samples=SAMPLES, seqlen=SEQLEN)
    results = measure_many(path, list(outs.values()), [str(file) for file in sources.values()], seqlen=SEQLEN,
                           limit=WINDOWS)  # fmt: skip
    for method, measured in zip(outs, results, strict=True):
        kl = {name: part.model.kl_mean for name, part in zip(sources, measured.texts, strict=True)}
        yield {"model": model, "method": method, "kl": kl, "measured": stamp()}


INTRODUCTION = """# What each stage contributes

Generated by `python eval/ablation.py`; the figures are in [ablation.json](ablation.json) and
[domains.json](domains.json).  4 bits, groups of 128, {samples} x {seqlen} calibration tokens,
{windows} x {seqlen} held-out tokens, means over draws.  KL in nats per token, of the file read back.
Rows with `+` add stages to GPTQ with searched scales and a tenth of the text held out for the guards.  Seconds are
CPU-seconds in the process without imports, one thread; peak memory is that of the process.
"""
DOMAINS_INTRODUCTION = """
# One domain for calibration, three for evaluation

KL on {windows} x {seqlen} tokens of each text, 4 bits symmetric, draw 0. The first column is the domain of the
calibration text.
"""


def render(rows: Sequence[Row], domains: Sequence[Row]) -> str:
    """results/ablation.md."""
    sizes = {"samples": SAMPLES, "seqlen": SEQLEN, "windows": WINDOWS}
    parts = [INTRODUCTION.format(**sizes)]
    for model, zeros in dict.fromkeys((row["model"], row["zeros"]) for row in rows):
        own = [row for row in rows if (row["model"], row["zeros"]) == (model, zeros)]
        parts.append(f"\n## {model}, {zeros}\n\nfloat perplexity {own[0]['float_perplexity']:.4f}\n")
        columns = ("stages", "draws", "KL mean", "of gptq", "perplexity", "CPU s", "peak MB")
        parts += [table_row(columns), table_row("---" for _ in columns)]
        parts += [table_row(cells) for cells in _cells(own)]
        parts.append("\nMeasured until {date} at {commit}: {hardware}, torch {torch}.".format(**own[-1]["measured"]))
    if domains:
        parts.append(DOMAINS_INTRODUCTION.format(**sizes))
    for model in dict.fromkeys(row["model"] for row in domains):
        own = [row for row in domains if row["model"] == model]
        names = list(own[0]["kl"])
        parts += [f"\n## {model}\n", table_row(["method", *names]), table_row(["---"] * (len(names) + 1))]
        parts += [table_row([row["method"], *(f"{row['kl'][name]:.5f}" for name in names)]) for row in own]
    return "\n".join(parts) + "\n"


def _cells(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    def mean(stages: str, figure: str) -> float:
        own = [row[figure] for row in rows if row["stages"] == stages]
        return sum(own) / len(own)

    present = [stages for stages in STAGES if any(row["stages"] == stages for row in rows)]
    for stages in present:
        kl = mean(stages, "kl_mean")
        share = f"{kl / mean('gptq', 'kl_mean'):.0%}" if "gptq" in present else "-"
        draws = sum(row["stages"] == stages for row in rows)
        rest = f"{mean(stages, 'perplexity'):.4f}", f"{mean(stages, 'cpu_seconds'):.0f}"
        peak = f"{max(row['peak_megabytes'] for row in rows if row['stages'] == stages):.0f}"
        yield stages, str(draws), f"{kl:.5f}", share, *rest, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES), metavar="STAGES")
    parser.add_argument("--zeros", nargs="+", choices=ZEROS, default=["symmetric"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--domains", action="store_true")
    parser.add_argument("--render", action="store_true", help="only write the pages")
    arguments = parser.parse_args()
    quiet_transformers()
    models = [] if arguments.render else [name for name in arguments.models if MODELS[name].is_dir()]
    for model in models if arguments.domains else ():
        if not any(row["model"] == model for row in read(DOMAINS_JSON)):
            with tempfile.TemporaryDirectory() as scratch:
                for row in domain_rows(model, Path(scratch)):
                    append(DOMAINS_JSON, row)
    wanted = (
        (m, s, z, seed) for seed in arguments.seeds for m in models for z in arguments.zeros for s in arguments.only
    )
    for case in () if arguments.domains else wanted:
        if case not in [(row["model"], row["stages"], row["zeros"], row["seed"]) for row in read(JSON)]:
            row = ablate(*case)
            append(JSON, row)
            print(*case, f"KL {row['kl_mean']:.5f}", f"{row['cpu_seconds']:.0f} s", flush=True)
    MARKDOWN.write_text(render(read(JSON), read(DOMAINS_JSON)), encoding="utf-8")


if __name__ == "__main__":
    main()
