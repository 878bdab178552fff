"""Compare the cost model (llmq/cost/) with runs: peak memory, CPU seconds and bytes; writes results/cost.json, cost.md.

    python eval/cost.py                               all cases; about fifteen minutes of CPU time
    python eval/cost.py --models 4M 0.5B --methods gptq
    python eval/cost.py --render                      only the table, from cost.json

Models are random, with the shapes of real ones; large ones have fewer blocks, because time and files are proportional
to blocks and peak memory does not depend on them. Every case has two runs, each in a separate process with one thread:
a trial on a model of one block, then the model. The trial corrects the prediction for the model: the seconds after the
text was read by their ratio, memory by its difference. CPU seconds are those of `Job.run`, without imports. They depend
less on other processes than wall time does. Finished rows are written at once, and existing rows are not measured
again.
"""

import argparse
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "eval"))
from rows import Row, append, read  # noqa: E402
from subjects import stamp, table_row  # noqa: E402

JSON, MARKDOWN = (ROOT / "eval" / "results" / name for name in ("cost.json", "cost.md"))
TOKENIZER = ROOT / "eval" / "models" / "tiny-python-llama"
METHODS = ("rtn", "gptq", "fast")
NICE = 10


@dataclass(frozen=True)
class Shape:
    """A Llama of `blocks` blocks; `all_blocks` is the number that the real model has."""

    hidden: int
    inner: int
    heads: int
    shared: int
    vocabulary: int
    blocks: int
    all_blocks: int
    tied: bool
    samples: int = 8
    seqlen: int = 128


SHAPES = {
    "1M": Shape(128, 384, 4, 2, 2048, 4, 4, True, 32, 256),
    "4M": Shape(192, 512, 6, 2, 2048, 8, 8, True, 32, 256),
    "135M": Shape(576, 1536, 9, 3, 49152, 8, 30, True),  # SmolLM2-135M
    "0.5B": Shape(896, 4864, 14, 2, 151936, 4, 24, True),  # Qwen2.5-0.5B
    "1.1B": Shape(2048, 5632, 32, 4, 32000, 3, 22, False),  # TinyLlama
}


@dataclass(frozen=True)
class Measured:
    """What a process has used: CPU seconds of the run; bytes in memory at most, and before the run; bytes of files.

    `once` are the CPU seconds until the calibration text was read, which do not depend on the model.
    """

    user: float
    system: float
    once: float
    peak: int
    before: int
    read: int
    written: int
    file: int


def write_model(folder: Path, shape: Shape, blocks: int) -> Path:
    """Write a random model in bfloat16, with the tokenizer of a bundled model."""
    import torch
    import transformers

    from llmq.model.build import module_tree

    config = transformers.LlamaConfig(
        hidden_size=shape.hidden, intermediate_size=shape.inner, num_attention_heads=shape.heads,
        num_key_value_heads=shape.shared, vocab_size=shape.vocabulary, num_hidden_layers=blocks,
        tie_word_embeddings=shape.tied, max_position_embeddings=2048,
    )  # fmt: skip
    model = module_tree.from_config(config, dtype=torch.bfloat16, remote_code=False)
    values = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0))
    tensors, tied = {}, getattr(model, "all_tied_weights_keys", {})
    for name, parameter in model.named_parameters():
        if name in tied:
            continue
        flat = values.repeat(-(-parameter.numel() // len(values)))[: parameter.numel()].view(parameter.shape)
        tensors[name] = (flat * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1 + 0.1 * flat).bfloat16()
    from safetensors.torch import save_file

    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.architectures, config.dtype = ["LlamaForCausalLM"], "bfloat16"
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder / name)
    return folder


def settings_of(shape: Shape, method: str, text: Path) -> dict[str, Any]:
    return {"method": method, "samples": shape.samples, "seqlen": shape.seqlen, "calibration": [str(text)],
            "group_size": 64}  # fmt: skip


def run_here(model: str, out: str, settings: dict[str, Any]) -> None:
    """Quantize in this process, and print `Measured` as JSON; the job is made before the measurement starts."""
    from llmq.checkpoint.reader import Checkpoint
    from llmq.cli.terminal import quiet_transformers
    from llmq.config import QuantConfig
    from llmq.job import Job
    from llmq.report.events import Event, TextRead
    from llmq.setting_fields import merged

    quiet_transformers()
    job = Job(model, out, merged(QuantConfig(), settings), device="cpu")
    start, bytes_before, before = resource.getrusage(resource.RUSAGE_SELF), transferred(), resident()
    read_after: list[float] = []

    def note(event: Event) -> None:
        if isinstance(event, TextRead):
            now = resource.getrusage(resource.RUSAGE_SELF)
            read_after.append(now.ru_utime + now.ru_stime - start.ru_utime - start.ru_stime)

    job.run(note)
    end, bytes_after = resource.getrusage(resource.RUSAGE_SELF), transferred()
    file = Checkpoint.open(Path(out)).nbytes
    measured = Measured(
        end.ru_utime - start.ru_utime, end.ru_stime - start.ru_stime, sum(read_after), end.ru_maxrss * 1024, before,
        bytes_after[0] - bytes_before[0], bytes_after[1] - bytes_before[1], file,
    )  # fmt: skip
    print(json.dumps(asdict(measured)))


def resident() -> int:
    """Bytes of this process in main memory."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()


def transferred() -> tuple[int, int]:
    """Bytes that this process has read and written, also from and to the cache of the system."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text(encoding="ascii").splitlines())
    return int(lines["rchar"]), int(lines["wchar"])


def run_apart(model: Path, settings: dict[str, Any]) -> Measured:
    """Quantize in a new process with one thread and low priority."""
    with tempfile.TemporaryDirectory() as scratch:
        given = json.dumps([str(model), f"{scratch}/out", settings])
        command = [sys.executable, __file__, "--run", given]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        result = subprocess.run(
            command, capture_output=True, text=True, env=environment, check=False, preexec_fn=lambda: os.nice(NICE)
        )
    if result.returncode:
        raise SystemExit(f"the run of {settings['method']} failed:\n{result.stderr[-2000:]}")
    return Measured(**json.loads(result.stdout.splitlines()[-1]))


def predicted(model: Path, settings: dict[str, Any], machine: Any) -> dict[str, Any]:
    """Seconds, peak memory, bytes of files, and the parts of the peak."""
    from llmq import cost
    from llmq.config import QuantConfig
    from llmq.setting_fields import merged

    estimate = cost.estimate(cost.skeleton_of(model), merged(QuantConfig(), settings), machine)
    largest = max(estimate.peaks, key=lambda peak: peak.device_bytes + peak.host_bytes)
    return {
        "seconds": estimate.seconds, "peak": estimate.host_bytes, "file": estimate.file_bytes,
        "read": estimate.work[cost.Kind.READ], "written": estimate.work[cost.Kind.WRITTEN],
        "stages": {stage.name: stage.seconds for stage in estimate.stages},
        "parts": {name: round(nbytes) for name, nbytes in {**largest.host, **largest.device}.items()},
    }  # fmt: skip


def measure_case(name: str, method: str, text: Path, scratch: Path) -> Row:
    """A trial on one block, and the run."""
    from llmq import cost

    shape, row = SHAPES[name], Row(model=name, method=method)
    machine = cost.measure("cpu")
    settings = settings_of(shape, method, text)
    for part, blocks in (("trial", 1), ("run", shape.blocks)):
        folder = scratch / f"{name}-{blocks}"
        if not folder.exists():
            write_model(folder, shape, blocks)
        measured = run_apart(folder, settings)
        machine = replace(machine, process=measured.before) if part == "trial" else machine
        row[part] = {
            "blocks": blocks,
            "predicted": predicted(folder, settings, machine),
            "measured": asdict(measured),
        }
    rates = {kind.name: rate for kind, rate in machine.rates.items()}
    return {**row, "samples": shape.samples, "seqlen": shape.seqlen, "rates": rates, "measured": stamp()}


def corrected(row: Row) -> tuple[float, float]:
    """Predicted seconds and bytes of the run, after the trial."""
    trial, run = row["trial"], row["run"]
    once = trial["measured"]["once"]
    seconds = once + run["predicted"]["seconds"] * (cpu_seconds(trial) - once) / trial["predicted"]["seconds"]
    peak = run["predicted"]["peak"] + trial["measured"]["peak"] - trial["predicted"]["peak"]
    return seconds, peak


def cpu_seconds(part: dict[str, Any]) -> float:
    return float(part["measured"]["user"] + part["measured"]["system"])


INTRODUCTION = """# The cost model compared with runs

Generated by `python eval/cost.py`; the figures are in [cost.json](cost.json). Random models with the shapes of real
ones, bfloat16 on disk, one thread. CPU seconds are those of `Job.run`, without imports. "Before" is a prediction
from rates that were measured in two seconds; "after" is corrected by a trial on a model of one block. Files are all
tensors of the quantized model, without headers.

"""
COLUMNS = ("model", "blocks", "method", "text", "CPU s before", "CPU s after", "CPU s measured", "ratio",
           "memory MB before", "memory MB after", "memory MB measured", "ratio", "file ratio")  # fmt: skip


def render(rows: Sequence[Row]) -> str:
    """results/cost.md; a ratio is predicted / measured, after the trial."""
    parts = [INTRODUCTION, f"{table_row(COLUMNS)}\n{table_row('---' for _ in COLUMNS)}\n"]
    for row in sorted(rows, key=lambda row: (list(SHAPES).index(row["model"]), METHODS.index(row["method"]))):
        run, (seconds, peak) = row["run"], corrected(row)
        measured = run["measured"]
        cells = [
            row["model"], f"{run['blocks']} of {SHAPES[row['model']].all_blocks}", row["method"],
            f"{row['samples']} x {row['seqlen']}", f"{run['predicted']['seconds']:.1f}", f"{seconds:.1f}",
            f"{cpu_seconds(run):.1f}", f"{seconds / cpu_seconds(run):.2f}",
            f"{run['predicted']['peak'] / 1e6:.0f}", f"{peak / 1e6:.0f}", f"{measured['peak'] / 1e6:.0f}",
            f"{peak / measured['peak']:.2f}", f"{run['predicted']['file'] / measured['file']:.3f}",
        ]  # fmt: skip
        parts.append(f"{table_row(cells)}\n")
    last = max((row["measured"] for row in rows), key=lambda stamp: stamp["date"])
    parts.append("\nMeasured until {date} at {commit}: {hardware}, torch {torch}.\n".format(**last))
    return "".join(parts)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--render", action="store_true", help="only write the table")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    return parser.parse_args()


def cases(arguments: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """The requested cases without those that have a row."""
    known = {(row["model"], row["method"]) for row in read(JSON)}
    yield from (case for case in itertools.product(arguments.models, arguments.methods) if case not in known)


def main() -> None:
    arguments = parsed()
    if arguments.run:
        run_here(*json.loads(arguments.run))
        return
    if not arguments.render:
        sys.path.insert(0, str(ROOT / "scripts"))
        from stdlib_text import write_texts

        with tempfile.TemporaryDirectory() as folder:
            text, _ = write_texts(Path(folder))
            for name, method in cases(arguments):
                row = measure_case(name, method, text, Path(folder))
                append(JSON, row)
                print(render([row]).splitlines()[-3], flush=True)
    MARKDOWN.write_text(render(read(JSON)), encoding="utf-8")


if __name__ == "__main__":
    main()
