"""Compare `llmq train` with the methods of `llmq quantize`: KL on evaluation text and CPU seconds.

    python eval/train.py                                          babyllama, 2 bits, from fast
    python eval/train.py --model tiny-python-llama --bits 3 --steps 400 --start fast
    python eval/train.py --methods balanced best --steps          methods only, no training
    python eval/train.py --render                                 only the page, from train.json

Methods calibrate on 128 x 256 tokens of the calibration text; a training reads all of it. SmolLM2 has fewer (`sizes`).
Texts are those of eval/subjects.py, so evaluation text is never trained on. A command runs in a separate process, and a
folder that is finished is not made again: --folder keeps them, with the CPU seconds of all attempts in cpu.json.
Finished rows are appended to eval/results/train.json.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "eval")]
from rows import Row, append, read  # noqa: E402
from subjects import (  # noqa: E402
    MODELS,
    SAMPLES,
    SEQLEN,
    WINDOWS,
    folder_of,
    is_yardstick,
    other_domains,
    protocol,
    stamp,
    table_row,
    texts,
)  # fmt: skip

from llmq.evaluation.measure import measure  # noqa: E402
from llmq.report.stored_record import read_record  # noqa: E402

JSON, MARKDOWN = (ROOT / "eval" / "results" / name for name in ("train.json", "train.md"))
CASE = ("model", "bits", "start", "steps", "batch")  # batch: sequences per step; both 0 without training
UNTRAINED = {"steps": 0, "batch": 0}
OWN = "own"


def sizes(model: str) -> tuple[int, int | None, int]:
    """Sequences of SEQLEN tokens to calibrate on, to hold out from training (None: as usual), and to measure on."""
    return (32, 8, 12) if is_yardstick(model) else (SAMPLES, None, WINDOWS)


def command(case: Row, folder: Path, scratch: Path) -> list[str]:
    """The command line that makes the model of a row in `folder`."""
    calibration, _ = texts(case["model"], scratch)
    model, group = str(folder_of(case["model"])), str(protocol(case["model"]).group_size)
    samples, held_out, _ = sizes(case["model"])
    tokens = ["--seqlen", str(SEQLEN), "--samples", str(samples)]
    if not case["steps"]:
        grid = ["--method", case["start"], "--bits", str(case["bits"]), "--group-size", group]
        return ["quantize", model, str(folder), *grid, "--calibration", str(calibration), *tokens, "--validate", "0"]
    start = place({**case, **UNTRAINED}, folder.parent)
    tokens = ["--sequence-length", str(SEQLEN), *(["--held-out", str(held_out)] if held_out else [])]
    steps = ["--steps", str(case["steps"]), "--batch-size", str(case["batch"]), "--evaluate-every", "100"]
    return ["train", str(start), str(folder), "--original", model, "--data", str(calibration), *tokens, *steps]


def place(case: Row, folder: Path) -> Path:
    """The folder of the model of a row."""
    return folder / "-".join(str(case[key]) for key in CASE)


def made(case: Row, folder: Path, scratch: Path) -> Path:
    """The folder of the model of a row; it and its start are made if they are absent."""
    out, times = place(case, folder), folder / "cpu.json"
    if (out / "config.json").exists():
        return out
    if case["steps"]:
        made({**case, **UNTRAINED}, folder, scratch)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "llmq", *command(case, out, scratch), "--quiet"], env=environment, check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    seconds = _seconds(folder)
    times.write_text(json.dumps({**seconds, out.name: seconds.get(out.name, 0.0) + spent}))
    if done.returncode:
        raise SystemExit(f"error: {out.name} failed with the exit code {done.returncode}")
    return out


def _seconds(folder: Path) -> dict[str, float]:
    """CPU seconds of all attempts, by the names of models."""
    times = folder / "cpu.json"
    known: dict[str, float] = json.loads(times.read_text()) if times.exists() else {}
    return known


def make(case: Row, folder: Path, scratch: Path) -> Row:
    """Make and measure the model of a row."""
    out = made(case, folder, scratch)
    _, evaluation = texts(case["model"], scratch)
    *_, windows = sizes(case["model"])
    sources = {OWN: evaluation, **other_domains(evaluation, scratch)}
    named = [f"{name}={file}" for name, file in sources.items()]
    own, *others = measure(out, folder_of(case["model"]), named, seqlen=SEQLEN, limit=windows).texts
    measured = own.model
    trained = read_record(out).get("training") if case["steps"] else None
    return {
        **case, "kl": measured.kl_mean, "interval": measured.kl_mean_interval, "perplexity": measured.perplexity,
        "same_top_1": measured.same_top_1, "cpu_seconds": _seconds(folder).get(out.name), "measured": stamp(),
        "others": {part.text: part.model.kl_mean for part in others},
        "moved": trained and trained["moved"], "history": trained and trained["history"],
    }  # fmt: skip


INTRODUCTION = """# Training compared with the methods

Generated by `python eval/train.py`; the figures are in [train.json](train.json). Training reads all of the calibration
text, methods a part of it. KL is KL(float ‖ quantized) in nats per token on evaluation text, with its 95 % interval,
measured on the file read back. Texts of other domains are measured with as many tokens; nothing was fitted to them. CPU
seconds of a training include reading and measuring, and not its start.
"""


def render(rows: Sequence[Row]) -> str:
    """results/train.md."""
    parts = [INTRODUCTION]
    figures = ["KL mean", "interval", "of best"]
    for model, bits in dict.fromkeys((row["model"], row["bits"]) for row in rows):
        own = sorted((row for row in rows if (row["model"], row["bits"]) == (model, bits)), key=lambda row: -row["kl"])
        best = next((row["kl"] for row in own if row["start"] == "best" and not row["steps"]), None)
        samples, _, windows = sizes(model)
        parts.append(f"\n## {model}, {bits} bits, groups of {protocol(model).group_size}\n")
        parts.append(f"{samples} x {SEQLEN} tokens of calibration for methods, {windows} x {SEQLEN} of evaluation.\n")
        domains = list(dict.fromkeys(name for row in own for name in row["others"]))
        columns = ["", *figures, *(f"KL on {name}" for name in domains), "perplexity", "same top-1", "values moved"]
        columns.append("CPU s")
        parts += [table_row(columns), table_row(["---"] * len(columns))]
        for row in own:
            low, high = row["interval"]
            parts.append(table_row([
                _name(row), f"{row['kl']:.4f}", f"{low:.4f} to {high:.4f}",
                "" if best is None else f"{row['kl'] / best:.2f}", *(_other(row, name) for name in domains),
                f"{row['perplexity']:.4f}", f"{row['same_top_1']:.2%}",
                "" if row["moved"] is None else f"{row['moved']:.1%}",
                "" if row["cpu_seconds"] is None else f"{row['cpu_seconds']:.0f}",
            ]))  # fmt: skip
        for row in own:
            if row["history"]:
                parts.append(f"\n{_name(row)}: KL on training text and held-out text\n")
                parts += [table_row(["step", "training", "held out"]), table_row(["---"] * 3)]
                parts += [table_row([
                    str(entry["step"]), "" if entry["training"] is None else f"{entry['training']:.4f}",
                    f"{entry['held_out']:.4f}",
                ]) for entry in row["history"]]  # fmt: skip
        parts.append("\nMeasured until {date} at {commit}: {hardware}, torch {torch}.".format(**own[-1]["measured"]))
    return "\n".join(parts) + "\n"


def _other(row: Row, domain: str) -> str:
    """The KL on a text of another domain; empty where the text was absent."""
    return f"{row['others'][domain]:.4f}" if domain in row["others"] else ""


def _name(row: Row) -> str:
    """How a model was made, in words."""
    trained = f", trained {row['steps']} steps of {row['batch']} x {SEQLEN} tokens"
    return str(row["start"]) + (trained if row["steps"] else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="babyllama-tok361-pad384")
    parser.add_argument("--bits", nargs="+", type=int, default=[2])
    parser.add_argument("--methods", nargs="*", default=[], help="methods without training, besides the start")
    parser.add_argument("--start", default="fast", help="the method of the start")
    parser.add_argument("--steps", nargs="*", type=int, default=[400], help="trainings, each from the start")
    parser.add_argument("--batch", type=int, default=4, help="sequences per step")
    parser.add_argument("--folder", type=Path, help="where the models are kept; by default they are deleted")
    parser.add_argument("--render", action="store_true", help="only write the page")
    arguments = parser.parse_args()
    methods = dict.fromkeys([*([arguments.start] if arguments.steps else []), *arguments.methods])
    runs = [(method, 0, 0) for method in methods]
    runs += [(arguments.start, steps, arguments.batch) for steps in arguments.steps]
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch) / "models"
        folder.mkdir(parents=True, exist_ok=True)
        for bits, run in ((bits, run) for bits in arguments.bits for run in runs):
            case = dict(zip(CASE, (arguments.model, bits, *run), strict=True))
            if arguments.render or any(all(row[key] == case[key] for key in CASE) for row in read(JSON)):
                continue
            row = make(case, folder, Path(scratch))
            append(JSON, row)
            print(*case.values(), f"KL {row['kl']:.5f}, {row['cpu_seconds'] or 0:.0f} CPU s", flush=True)
    MARKDOWN.write_text(render(read(JSON)), encoding="utf-8")


if __name__ == "__main__":
    main()
