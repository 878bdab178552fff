"""Measure rtn, gptq and awq on small trained models, and write eval/RESULTS.md and eval/results.json.

    python eval/results.py                 every model that is at hand; about half an hour on two cores
    python eval/results.py --only NAME     one of them; the figures of the others are kept
    python eval/results.py --process       only the seconds and the memory, on a machine that does nothing else
    python eval/results.py --render        write RESULTS.md, and the table in README.md, from results.json again

Each figure comes from a file that was written and read back.  `babyllama…` and `stories260K` lie beside a developer's
checkout and nowhere else; they are calibrated with 128 x 256 tokens of stories and measured on 64 x 256 tokens of
others.  The bundled model reads the standard library, its evaluation files kept apart by rule.
"""

import argparse
import datetime
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import llmq
from llmq.cli.terminal import quiet_transformers
from llmq.measure import measure

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
JSON, MARKDOWN = ROOT / "eval" / "results.json", ROOT / "eval" / "RESULTS.md"
README, BEGIN, END = ROOT / "README.md", "<!-- eval/results.py begins -->", "<!-- eval/results.py ends -->"
SAMPLES, SEQLEN, WINDOWS = 128, 256, 64
FIGURES = ("perplexity", "kl_mean", "kl_median", "kl_99", "same_top_1")

sys.path.insert(0, str(ROOT / "scripts"))
from stdlib_text import write_texts  # noqa: E402

MODELS = {
    "tiny-python-llama": (ROOT / "eval" / "models" / "tiny-python-llama", "the bundled model"),
    "babyllama-tok361-pad384": (SHARED / "models" / "babyllama-tok361-pad384", "characters, 1 M parameters"),
    "stories260K": (SHARED / "models" / "stories260K", "ffn 172: its down_proj falls back to one scale a row"),
}
METHODS = {
    "rtn, min-max": {"method": "rtn", "scales": "minmax"},
    "rtn": {"method": "rtn"},
    "awq": {"method": "awq"},
    "gptq, paper": {"method": "gptq", "order": "natural", "scales": "minmax"},
    "gptq": {"method": "gptq"},
}


def texts(model: str, folder: Path) -> tuple[Path, Path]:
    """Calibration and evaluation text for a model."""
    if model == "tiny-python-llama":
        return write_texts(folder)
    return SHARED / "data" / "tinystories.calib.jsonl", SHARED / "data" / "tinystories.eval.jsonl"


def measure_model(name: str) -> dict[str, Any]:
    """Every method, width and symmetry on one model."""
    path, remark = MODELS[name]
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        calibration, evaluation = texts(name, Path(scratch) / "text")
        for bits in (4, 3, 2):
            for symmetric in (True, False):
                for label, settings in METHODS.items():
                    out = Path(scratch) / "out"
                    request = {**settings, "bits": bits, "symmetric": symmetric, "samples": SAMPLES, "seqlen": SEQLEN}
                    report = llmq.quantize(str(path), out, overwrite=True, calibration=[str(calibration)], **request)
                    measured = measure(out, path, str(evaluation), seqlen=SEQLEN, limit=WINDOWS)
                    assert measured.original is not None
                    figures = {name: getattr(measured.model, name) for name in FIGURES}
                    rows.append({"method": label, "bits": bits, "symmetric": symmetric, "seconds": report.seconds,
                                 "bits_per_weight": report.bits_per_weight, **figures})  # fmt: skip
                    print(
                        name,
                        label,
                        bits,
                        "symmetric" if symmetric else "asymmetric",
                        f"{figures['kl_mean']:.5f}",
                        flush=True,
                    )
        process = whole_process(path, calibration, Path(scratch) / "timed")
    return {"remark": remark, "tokens": measured.model.tokens, "float": measured.original.perplexity, "rows": rows,
            "process": process, "measured": stamp()}  # fmt: skip


def whole_process(path: Path, calibration: Path, out: Path) -> dict[str, float]:
    """Seconds and memory of `llmq quantize` from the shell's point of view, imports and all."""
    command = [sys.executable, "-m", "llmq", "quantize", str(path), str(out), "--calibration", str(calibration)]
    command += ["--samples", str(SAMPLES), "--seqlen", str(SEQLEN)]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    wall, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    record = json.loads((out / "llmq.json").read_text())
    return {
        "wall_seconds": wall,
        "cpu_seconds": cpu,
        "inside_seconds": record["seconds"],
        "peak_megabytes": record["peak_memory_bytes"] / 1e6,
    }


def measure_processes(results: dict[str, Any]) -> None:
    """The whole-process figures again, for every model that was measured; on a machine that does nothing else."""
    for name in results:
        with tempfile.TemporaryDirectory() as scratch:
            calibration, _ = texts(name, Path(scratch) / "text")
            results[name]["process"] = whole_process(MODELS[name][0], calibration, Path(scratch) / "timed")
    JSON.write_text(json.dumps(results, indent=1) + "\n")


def stamp() -> dict[str, str]:
    """When and with what the figures were made."""
    import transformers

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip() or "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hardware": f"{platform.machine()} CPU, {torch.get_num_threads()} threads, "
        + torch.backends.cpu.get_cpu_capability(),
    }


INTRODUCTION = """# Results

Generated by `python eval/results.py`; the figures are in `eval/results.json`.  Group size 128, or the nearest that
divides.  {samples} x {seqlen} calibration tokens, {windows} x {seqlen} held-out tokens, seed 0, one draw.  KL is
KL(float ‖ quantized) in nats per token, measured on the file read back.  `rtn`, `awq` and `gptq` search their scales;
`rtn, min-max` is the plain yardstick; `gptq, paper` is natural order with growing min-max grids, as published.
"""
COLUMNS = (
    "bits",
    "grid",
    "method",
    "bits/weight",
    "perplexity",
    "KL mean",
    "KL median",
    "KL 99 %",
    "same top-1",
    "KL of RTN's",
)
PROCESS = """
`llmq quantize --method gptq` as a whole process, imports included: **{cpu_seconds:.1f} CPU-seconds**,
{wall_seconds:.1f} s of wall time ({inside_seconds:.1f} s of it quantizing), peak memory {peak_megabytes:.0f} MB.
"""
STAMP = "\nMeasured {date} at {commit}: {hardware}, Python {python}, torch {torch}, transformers {transformers}."


def render(results: dict[str, Any]) -> str:
    """RESULTS.md."""
    parts = [INTRODUCTION.format(samples=SAMPLES, seqlen=SEQLEN, windows=WINDOWS)]
    for name, model in results.items():
        parts.append(f"\n## {name}\n")
        parts.append(f"{model['remark']}; float perplexity **{model['float']:.4f}** over {model['tokens']} tokens\n")
        parts += [table_row(COLUMNS), table_row("---" for _ in COLUMNS)]
        parts += [table_row(cells(row, model["rows"])) for row in model["rows"]]
        parts += [PROCESS.format(**model["process"]), STAMP.format(**model["measured"])]
    return "\n".join(parts) + "\n"


def summary(results: dict[str, Any]) -> str:
    """The table that the README shows: KL at 4 bits."""
    names = [name for name in MODELS if name in results]
    lines = [table_row(["KL to float, 4 bits", *names]), table_row(["---"] * (len(names) + 1))]
    for symmetric in (True, False):
        for method in METHODS:
            found = [
                next(
                    r
                    for r in results[name]["rows"]
                    if (r["method"], r["bits"], r["symmetric"]) == (method, 4, symmetric)
                )
                for name in names
            ]
            label = f"{method}, {'symmetric' if symmetric else 'asymmetric'}"
            lines.append(table_row([label, *(f"{row['kl_mean']:.4f}" for row in found)]))
    lines.append(table_row(["float perplexity", *(f"{results[name]['float']:.3f}" for name in names)]))
    return "\n".join(lines)


def write_documents(results: dict[str, Any]) -> None:
    MARKDOWN.write_text(render({name: results[name] for name in MODELS if name in results}), encoding="utf-8")
    readme = README.read_text(encoding="utf-8")
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(f"{before}{BEGIN}\n{summary(results)}\n{END}{after}", encoding="utf-8")


def table_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def cells(row: dict[str, Any], rows: list[dict[str, Any]]) -> tuple[str, ...]:
    same = [r for r in rows if (r["bits"], r["symmetric"]) == (row["bits"], row["symmetric"])]
    yardstick = next(r for r in same if r["method"] == "rtn, min-max")
    return (
        str(row["bits"]),
        "symmetric" if row["symmetric"] else "asymmetric",
        row["method"],
        f"{row['bits_per_weight']:.3f}",
        f"{row['perplexity']:.4f}",
        f"{row['kl_mean']:.5f}",
        f"{row['kl_median']:.5f}",
        f"{row['kl_99']:.4f}",
        f"{row['same_top_1']:.2%}",
        f"{row['kl_mean'] / yardstick['kl_mean']:.0%}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=MODELS)
    parser.add_argument("--render", action="store_true")
    parser.add_argument("--process", action="store_true", help="measure only the seconds and the memory of a whole run")
    arguments = parser.parse_args()
    quiet_transformers()
    results = json.loads(JSON.read_text()) if JSON.exists() else {}
    if arguments.process:
        measure_processes(results)
    wanted = [] if arguments.process or arguments.render else [arguments.only] if arguments.only else list(MODELS)
    for name in wanted:
        if not MODELS[name][0].is_dir():
            print(f"{name} is not at hand, left out", file=sys.stderr)
            continue
        measured = measure_model(name)
        results = (json.loads(JSON.read_text()) if JSON.exists() else {}) | {name: measured}  # another may have written
        JSON.write_text(json.dumps(results, indent=1) + "\n")
    write_documents(results)


if __name__ == "__main__":
    main()
