"""Time GPTQ as a whole process: llmq, llm-compressor and GPTQModel on one random model, in turns.

    python eval/peers/time_gptq.py --name NAME [--repeats 2] [--threads 1] [--layers 12] [--without PEER …]

The model is an untrained Llama with a fixed seed, float32; the work is the same as for a trained model. 4 bits, groups
of 128, symmetric, otherwise the defaults of each tool; 128 x 256 tokens of the standard library, the same ids for all
(llmq reads the text and cuts the same sequences, which is checked). Each tool chooses its number of threads, unless
--threads is given: on a busy machine, threads that wait for each other can cost more time than they save. Writes
eval/peers/results/NAME.json and NAME.md.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gptqmodel_gptq
import llm_compressor_gptq
from environment import InstallError, first_error, interpreter, versions
from peer import PeerError, time_peer
from process import Measured, ProcessError, measured

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results"
TOKENIZER = ROOT / "eval" / "models" / "tiny-python-llama"
SAMPLES, SEQLEN, SEED = 128, 256, 0
PEERS = (llm_compressor_gptq, gptqmodel_gptq)
SHAPE = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12, "num_attention_heads": 8,
         "num_key_value_heads": 8, "vocab_size": 4096, "max_position_embeddings": 2048}  # fmt: skip
PACKAGES = ["torch", "transformers", "llmcompressor", "compressed-tensors", "GPTQModel"]

sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "scripts")]
from stdlib_text import write_texts  # noqa: E402


def make_model(folder: Path, **changes: int) -> None:
    """Write the model with the bundled tokenizer, which has fewer ids than the model."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    LlamaForCausalLM(LlamaConfig(**SHAPE | changes)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)


def write_tokens(
    model: Path, text: Path, tokens: Path, seed: int = SEED, samples: int = SAMPLES, seqlen: int = SEQLEN
) -> str:
    """Write the sequences that llmq will cut from `text`, as lists of ids in JSON; returns their fingerprint."""
    from llmq import calibration
    from llmq.calibration_settings import Calibration
    from llmq.runtime.load import load_tokenizer

    settings = Calibration(sources=(str(text),), samples=samples, seqlen=seqlen)
    chosen = calibration.load(settings, load_tokenizer(model, remote_code=False), seed=seed, max_tokens=None)
    tokens.write_text(json.dumps(chosen.windows.tolist()))
    return chosen.sha256


def time_llmq(
    model: Path, text: Path, out: Path, fingerprint: str | None, options: Sequence[str] = ("--method", "gptq")
) -> Measured:
    """Run `llmq quantize` as a process; raises PeerError if it fails or has read other tokens.

    Without a fingerprint, the tokens are not checked: the method reads none.  Of options given twice, the last counts.
    """
    command = [sys.executable, "-m", "llmq", "quantize", str(model), str(out), "--calibration", str(text)]
    command += ["--samples", str(SAMPLES), "--seqlen", str(SEQLEN), *options]
    try:
        taken = measured(command, out.with_suffix(".log"), cwd=ROOT)
    except ProcessError as error:
        raise PeerError(first_error(error.output)) from error
    if fingerprint is None:
        return taken
    read = json.loads((out / "llmq.json").read_text())["calibration"]["sha256"]
    if read != fingerprint:
        raise PeerError(f"llmq read other tokens: {read}, expected {fingerprint}")
    return taken


def run(repeats: int, layers: int, without: list[str], scratch: Path) -> dict[str, dict[str, Any]]:
    """Name -> runs, or the error; in turns, so that other load on the machine affects all tools.

    A first turn, on one layer, is not counted: it compiles kernels and fills caches.
    """
    model, small, tokens = scratch / "model", scratch / "small", scratch / "tokens.json"
    make_model(model, num_hidden_layers=layers)
    make_model(small, num_hidden_layers=1)
    text, _ = write_texts(scratch / "text")
    fingerprint = write_tokens(model, text, tokens)
    results: dict[str, dict[str, Any]] = {"llmq": {"runs": [], "versions": versions(Path(sys.executable), PACKAGES)}}
    contenders: dict[str, Callable[[Path, Path], Measured]] = {
        "llmq": lambda model, out: time_llmq(model, text, out, fingerprint)
    }
    for peer in (peer for peer in PEERS if peer.NAME not in without):
        try:
            python = interpreter(peer.NAME, peer.REQUIREMENTS)
        except InstallError as error:
            results[peer.NAME] = {"error": f"cannot be installed: {error}"}
            continue
        results[peer.NAME] = {"runs": [], "versions": versions(python, PACKAGES)}
        contenders[peer.NAME] = lambda model, out, peer=peer: time_peer(
            peer.NAME, peer.REQUIREMENTS, Path(peer.__file__), [str(model), str(tokens), str(out)]
        )
    for repeat in range(repeats + 1):
        for name, contender in list(contenders.items()):
            try:
                taken = contender(model if repeat else small, scratch / f"{name}-{repeat}")
            except PeerError as error:
                results[name] |= {"error": str(error)}
                del contenders[name]
                continue
            if repeat:
                results[name]["runs"].append({**asdict(taken), "load_average": os.getloadavg()[0]})
            print(name if repeat else f"{name}, warming up", taken, flush=True)
    return results


def table(results: dict[str, Any]) -> str:
    """Medians, and ratios to the times of llmq."""
    ours = {key: _median(results["tools"]["llmq"]["runs"], key) for key in ("wall_seconds", "cpu_seconds")}
    lines = [
        "| | wall, s | CPU, s | peak memory, MB | wall / llmq | CPU / llmq | torch | transformers |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, tool in results["tools"].items():
        if not tool.get("runs"):
            lines.append(f"| {name} | {tool['error']} | | | | | | |")
            continue
        wall, cpu, memory = (_median(tool["runs"], key) for key in ("wall_seconds", "cpu_seconds", "peak_megabytes"))
        version = tool["versions"]
        label = " ".join([name, *(v for k, v in version.items() if k.lower().startswith(name.replace("-", "")[:8]))])
        lines.append(
            f"| {label} | {wall:.1f} | {cpu:.1f} | {memory:.0f} | {wall / ours['wall_seconds']:.1f} "
            f"| {cpu / ours['cpu_seconds']:.1f} | {version['torch']} | {version['transformers']} |"
        )
    about = f"{results['cpu']}, {results['cores']} cores, OMP_NUM_THREADS {results['threads']}, {results['date']}, "
    about += f"commit {results['commit']}."
    note = f" {results['note']}" if results["note"] else ""
    return f"# GPTQ as a whole process\n\n{results['settings']}\n{about}{note}\n\n" + "\n".join(lines) + "\n"


def _median(runs: list[dict[str, float]], key: str) -> float:
    return statistics.median(run[key] for run in runs)


def processor() -> str:
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def revision() -> str:
    """The current commit."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    return commit.stdout.strip() or "unknown"


def stamp(layers: int, note: str) -> dict[str, Any]:
    settings = f"{layers} layers, {SHAPE['hidden_size']} wide, float32, random weights; "
    settings += f"{SAMPLES} x {SEQLEN} tokens, 4 bits, g128, symmetric; medians of the runs, imports included."
    return {
        "date": datetime.date.today().isoformat(),
        "commit": revision(),
        "cpu": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "shape": SHAPE | {"num_hidden_layers": layers},
        "settings": settings,
        "note": note,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--without", nargs="*", default=[], choices=[peer.NAME for peer in PEERS])
    parser.add_argument("--threads", type=int, help="threads of every tool, by OMP_NUM_THREADS")
    parser.add_argument("--note", default="", help="a note for the result, for example other load on the machine")
    arguments = parser.parse_args()
    if arguments.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    with tempfile.TemporaryDirectory() as scratch:
        results = {
            **stamp(arguments.layers, arguments.note),
            "threads": os.environ.get("OMP_NUM_THREADS", "chosen by each tool"),
            "tools": run(arguments.repeats, arguments.layers, arguments.without, Path(scratch)),
        }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{arguments.name}.json").write_text(json.dumps(results, indent=1) + "\n")
    (RESULTS / f"{arguments.name}.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
