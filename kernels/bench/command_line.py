"""The command line from end to end on the device: quantize the bundled model, evaluate, load again, generate.

Every method runs on the device and, as the reference, most on the CPU, all at the same time; seconds are those of a
busy machine.  All results are evaluated on the same held-out text.  The KL divergence to the original may differ from
that of the reference by LARGEST_DIFFERENCE: sums in another order move some codes, which changes little.  A reference
that does not finish in time is reported, and is not an error.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice
from pathlib import Path

import torch

from bench.plan import Plan
from bench.results import ROOT
from bench.session import Result, Session

MODEL = ROOT / "eval" / "models" / "tiny-python-llama"
LARGEST_DIFFERENCE = 0.05  # of the KL divergences on the device and on the CPU, relative
LARGEST_ERROR = 2e-2  # of logits on the device against those on the CPU, relative L2; bf16 rounds to 4e-3
PROMPT = "def read_lines(path):"
SHARE_OF_QUANTIZING = 0.8  # of the section's time
REPORTED_EVERY = 15.0  # seconds
DOCUMENTS_PER_SAMPLE = 4  # of calibration text; tokenizing all of it would take longer than quantizing
REFERENCE, SEQLEN = "cpu", 256


def measure(plan: Plan, session: Session) -> None:
    """Cases: text; quantize METHOD-DEVICE; eval; METHOD against the CPU; load, generate."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = session.run("text", partial(write_texts, folder, plan))
        if texts is None:
            return
        until = time.monotonic() + SHARE_OF_QUANTIZING * session.seconds_left
        with quantizing(plan, folder) as running:
            finished = wait_for_all(session, running, folder, until)
        if not finished:
            return
        here = [folder / name for name in finished]
        evaluated = session.run("eval", partial(evaluate, plan, here, folder))
        figures = evaluated["kl"] if evaluated is not None else {}
        for method in plan.quantized_methods:
            if f"{method}-{plan.device}" in figures:
                session.run(f"{method} against the CPU", partial(compared, figures, method, plan.device))
        one = next((path for path in here if path.name.endswith(f"-{plan.device}")), None)
        if one is not None:
            session.run("load", partial(loaded, one, folder / "text", plan.device))
            session.run("generate", partial(generated, one, plan.device))


def write_texts(folder: Path, plan: Plan) -> Result:
    """Calibration and held-out text from the standard library of the running Python, as much as is needed."""
    spec = importlib.util.spec_from_file_location("stdlib_text", ROOT / "scripts" / "stdlib_text.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    calibration, held_out = module.write_texts(folder / "text", evaluation_characters=plan.quantized_characters)
    with calibration.open(encoding="utf-8") as lines:
        documents = list(islice(lines, DOCUMENTS_PER_SAMPLE * plan.quantized_samples))
    calibration.write_text("".join(documents), encoding="utf-8")
    return {"files": [calibration.name, held_out.name], "summary": f"{calibration.name}, {held_out.name}"}


@contextmanager
def quantizing(plan: Plan, folder: Path) -> Iterator[Mapping[str, "subprocess.Popen[str]"]]:
    """`llmq quantize` for every method on both devices, by METHOD-DEVICE; killed when the block is left."""
    threads = max(1, ((os.cpu_count() or 1) - len(plan.quantized_methods)) // len(plan.reference_methods))
    wanted = [(method, plan.device, 1) for method in plan.quantized_methods if plan.device != REFERENCE]
    wanted += [(method, REFERENCE, threads) for method in plan.reference_methods]
    running = {}
    for method, device, used in wanted:
        name = f"{method}-{device}"
        command = llmq("quantize", str(MODEL), str(folder / name), "--method", method, "--device", device)
        command += ["--calibration", str(folder / "text" / "calibration.jsonl")]
        command += ["--samples", str(plan.quantized_samples), "--seqlen", str(SEQLEN)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(used)}
        running[name] = start(command, environment, folder / f"{name}.log")
    try:
        yield running
    finally:
        for process in running.values():
            process.kill()
            process.wait()


def wait_for_all(
    session: Session, running: Mapping[str, "subprocess.Popen[str]"], folder: Path, until: float
) -> list[str]:
    """One case per process; the names of those that succeeded.  Runs on the device are waited for first."""
    begun = time.monotonic()
    order = sorted(running, key=lambda name: name.endswith(f"-{REFERENCE}"))
    for name in order:
        session.run(f"quantize {name}", partial(finish, running[name], folder / f"{name}.log", begun, until, session))
    return [name for name in order if (folder / name / "config.json").is_file()]


def finish(process: "subprocess.Popen[str]", log: Path, begun: float, until: float, session: Session) -> Result:
    """Wait for a command; raises RuntimeError with its last lines if it failed, or did not end on the device."""
    while process.poll() is None and time.monotonic() < until:
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=min(REPORTED_EVERY, max(0.1, until - time.monotonic())))
        session.report(f"{log.stem}, after {time.monotonic() - begun:.0f} s")
    code = process.poll()
    if code is None:
        if not log.stem.endswith(f"-{REFERENCE}"):
            raise RuntimeError("not finished in time")
        return {"finished": False, "wrong": False, "summary": "not finished in time, so there is nothing to compare"}
    if code:
        raise RuntimeError(f"exit code {code}: {tail(log.read_text(encoding='utf-8'))}")
    seconds = time.monotonic() - begun
    return {"finished": True, "busy_seconds": round(seconds, 1), "summary": f"done within {seconds:.0f} s"}


def evaluate(plan: Plan, paths: Sequence[Path], folder: Path) -> Result:
    """`llmq eval --json` of all results at once: name -> mean KL divergence in nats per token."""
    command = llmq("eval", *map(str, paths), "--against", str(MODEL), "--text", str(folder / "text" / "held_out.txt"))
    command += ["--seqlen", str(SEQLEN), "--windows", str(plan.evaluated_windows), "--device", plan.device, "--json"]
    printed = json.loads(output_of(command))
    models = printed["models"] if "models" in printed else [{"path": str(paths[0]), **printed}]
    divergences = {Path(model["path"]).name: float(model["model"]["kl_mean"]) for model in models}
    shown = ", ".join(f"{name} {value:.5f}" for name, value in divergences.items())
    wrong = not all(0 < value < 1 for value in divergences.values())
    return {"kl": divergences, "wrong": wrong, "summary": f"KL per token: {shown}"}


def compared(figures: Mapping[str, float], method: str, device: str) -> Result:
    """The KL divergence of a method on the device relative to that on the CPU."""
    own, reference = figures[f"{method}-{device}"], figures.get(f"{method}-{REFERENCE}")
    if reference is None:
        return {"kl": own, "wrong": False, "summary": f"KL {own:.5f}, no reference"}
    difference = own / reference - 1
    wrong = not abs(difference) <= LARGEST_DIFFERENCE
    summary = f"KL {own:.5f}, on the CPU {reference:.5f}: {difference:+.1%}"
    return {"kl": own, "reference": reference, "difference": difference, "wrong": wrong, "summary": summary}


def loaded(path: Path, texts: Path, device: str) -> Result:
    """The packed model on the device and on the CPU: the same logits but for rounding."""
    from llmq.runtime.load import load

    logits = []
    for place in (device, REFERENCE):
        model, tokenizer = load(path, device=place)
        text = (texts / "held_out.txt").read_text(encoding="utf-8")[:2000]
        tokens = tokenizer(text, return_tensors="pt")["input_ids"][:, :SEQLEN].to(place)
        with torch.inference_mode():
            logits.append(model(input_ids=tokens).logits.double().cpu())
            model(input_ids=tokens[:, :1])  # one row, as in decoding
            again = model(input_ids=tokens).logits.double().cpu()
        if not torch.equal(again, logits[-1]):
            return {"wrong": True, "summary": f"two calls on {place} differ"}
    error = float((logits[0] - logits[1]).norm() / logits[1].norm())
    return {"error": error, "wrong": not error <= LARGEST_ERROR, "summary": f"logits differ by {error:.1e}"}


def generated(path: Path, device: str) -> Result:
    """`llmq generate` with the packed model: some text."""
    command = llmq("generate", str(path), "--prompt", PROMPT, "--raw", "--max-tokens", "16", "--device", device)
    text = output_of(command)
    return {"text": text[-300:], "wrong": not text.strip(), "summary": repr(text[-60:])}


def llmq(*arguments: str) -> list[str]:
    """The command line of llmq by the running Python."""
    return [sys.executable, "-m", "llmq", *arguments]


def start(command: Sequence[str], environment: Mapping[str, str], log: Path) -> "subprocess.Popen[str]":
    with log.open("w", encoding="utf-8") as file:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, text=True)


def output_of(command: Sequence[str]) -> str:
    """The standard output of a command; raises RuntimeError with its last lines if it failed."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {tail(done.stdout + done.stderr)}")
    return done.stdout


def tail(text: str) -> str:
    """The end of a text on one line."""
    return " ".join(text.split())[-250:]
