"""Compare other tools and llmq on one model: the same calibration tokens, the same evaluation of the written files.

    python eval/peers/run.py --model NAME --name RESULT [--peers …] [--llmq …] [--seeds 0 1 2] [--grid symmetric]

Every contender is a whole process (`process.py`) with one thread; peers have separate environments, and llmq runs as
`python -m llmq quantize`. A seed is another draw of calibration text; contenders without text run once. Results are
written to eval/peers/results/RESULT.json row by row, so that an interrupted run continues, and to RESULT.md. Existing
rows are not measured again, unless --again is given. A failed row holds the error message of the peer.
"""

import argparse
import datetime
import json
import os
import sys
import tempfile
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import auto_round_sign
import gptqmodel_gptq
import hqq_half_quadratic
import llama_cpp_blocks
import llm_compressor_gptq
import torchao_int4
from environment import InstallError, interpreter, versions
from peer import PeerError, time_peer
from process import Measured
from table import key, merged, render
from time_gptq import SAMPLES, SEQLEN, processor, revision, time_llmq, write_tokens

ROOT = Path(__file__).resolve().parents[2]
RESULTS, THREADS = Path(__file__).parent / "results", 1
FIGURES = ("perplexity", "kl_mean", "kl_median", "kl_99", "same_top_1")
ABOUT = """4 bits, groups of 128 unless stated otherwise, embedding and head in float.
{samples} x {seqlen} calibration tokens, the same for all, another draw for each seed.
Measured on {windows} x {seqlen} evaluation tokens.
KL is KL(float ‖ quantized) in nats per token, of the files read back from disk.
Whole processes including imports, {threads} thread each (OMP_NUM_THREADS).
Other jobs ran on the machine, so compare CPU-seconds.
"""

sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "eval")]
from subjects import MODELS, WINDOWS, folder_of, texts  # noqa: E402


@dataclass(frozen=True)
class Peer:
    """A script of this folder with its options.

    settings    its description in the table
    own_grid    its only grid, if the grid cannot be chosen
    draws       whether it uses the calibration tokens
    """

    script: ModuleType
    options: tuple[str, ...] = ()
    settings: str = "defaults"
    own_grid: str | None = None
    draws: bool = True


Q4_0 = "blocks of 32, 4.5 bits per weight"
Q4_K_M = "blocks of 32 in 256, 4.5 bits per weight; 6.6 in half of v and down: 4.8"
PEERS = {
    "llm-compressor GPTQ": Peer(llm_compressor_gptq),
    "GPTQModel GPTQ": Peer(gptqmodel_gptq),
    "GPTQModel GPTAQ": Peer(gptqmodel_gptq, ("--gptaq",), "defaults, alpha 0.25"),
    "AutoRound 200": Peer(auto_round_sign),
    "AutoRound 1000": Peer(auto_round_sign, ("--iterations", "1000"), "1000 iterations"),
    "HQQ": Peer(hqq_half_quadratic, (), "defaults, axis 1, no data", "float zero", draws=False),
    "torchao intx": Peer(torchao_int4, (), "weight-only, no data", draws=False),
    "torchao intx, HQQ scales": Peer(torchao_int4, ("--recipe", "hqq"), "no data", "symmetric", draws=False),
    "torchao int4": Peer(torchao_int4, ("--recipe", "int4"), "weight-only, no data", draws=False),
    "torchao GPTQ": Peer(torchao_int4, ("--recipe", "gptq"), "its prototype"),
    "llama.cpp Q4_0": Peer(llama_cpp_blocks, ("--type", "Q4_0"), Q4_0, "symmetric", draws=False),
    "llama.cpp Q4_0 imatrix": Peer(llama_cpp_blocks, ("--type", "Q4_0", "--imatrix"), Q4_0, "symmetric"),
    "llama.cpp Q4_K_M": Peer(llama_cpp_blocks, ("--type", "Q4_K_M"), Q4_K_M, "scale and minimum", draws=False),
    "llama.cpp Q4_K_M imatrix": Peer(llama_cpp_blocks, ("--type", "Q4_K_M", "--imatrix"), Q4_K_M, "scale and minimum"),
}
IN_Q4_K_M = ("--format", "gguf:q4_k_m", "--skip", "embed_tokens", "--skip", "lm_head")
LLMQ = {
    "rtn-minmax": ("--method", "rtn", "--scales", "minmax"),
    "gptq-paper": ("--method", "gptq", "--order", "natural", "--scales", "minmax"),
    **{name: ("--method", name) for name in ("rtn", "gptq", "awq", "fast", "balanced", "best")},
    **{f"{name} q4_k_m": ("--method", name, *IN_Q4_K_M) for name in ("rtn", "gptq", "fast", "balanced", "best")},
}
NEED_NO_TEXT = ("rtn-minmax", "rtn", "rtn q4_k_m")


@dataclass(frozen=True)
class Model:
    """A float checkpoint with the text that it is calibrated with and the text that it is measured on."""

    folder: Path
    calibration: Path
    evaluation: Path


def find_model(name: str, scratch: Path) -> Model:
    """A model of eval/subjects.py with its texts."""
    return Model(folder_of(name), *texts(name, scratch / "text"))


def run_peer(peer: Peer, model: Model, grid: str, tokens: Path, out: Path) -> tuple[Measured, str]:
    """Run the process of a peer, and return its version; raises InstallError and PeerError."""
    script = peer.script
    python = interpreter(script.NAME, script.REQUIREMENTS)
    chosen = ["--asymmetric"] if grid == "asymmetric" and peer.own_grid is None else []
    arguments = [str(model.folder), str(tokens), str(out), *chosen, *peer.options]
    taken = time_peer(script.NAME, script.REQUIREMENTS, Path(str(script.__file__)), arguments)
    return taken, " ".join(versions(python, [script.PACKAGE]).values())


def run_llmq(method: str, model: Model, grid: str, seed: int, fingerprint: str, out: Path) -> tuple[Measured, str]:
    """Run llmq, which reads the text itself, and return its version; raises PeerError."""
    import llmq

    options = [*LLMQ[method], f"--{grid}", "--seed", str(seed)]
    expected = None if method in NEED_NO_TEXT else fingerprint
    return time_llmq(model.folder, model.calibration, out, expected, options), llmq.__version__


def contend(name: str, model: Model, grid: str, seed: int, scratch: Path) -> dict[str, Any]:
    """Make one row: the cost of the process and the quality of its result, or its error."""
    from llmq.evaluation.measure import measure

    peer, method = PEERS.get(name), name.removeprefix("llmq ")
    own = peer.own_grid if peer else "scale and minimum" if set(IN_Q4_K_M) <= set(LLMQ[method]) else None
    row: dict[str, Any] = {"name": name, "asked": grid, "grid": own or grid, "seed": seed}
    row["settings"] = peer.settings if peer else " ".join(LLMQ[method])
    out, tokens = scratch / "out", scratch / "tokens.json"
    row["tokens_sha256"] = fingerprint = write_tokens(model.folder, model.calibration, tokens, seed)
    try:
        if peer:
            taken, row["version"] = run_peer(peer, model, grid, tokens, out)
        else:
            taken, row["version"] = run_llmq(method, model, grid, seed, fingerprint, out)
    except InstallError as error:
        return row | {"error": f"cannot be installed: {error}"}
    except PeerError as error:
        return row | {"error": f"does not run: {error}"}
    measurement = measure(
        next(out.glob("*.gguf"), out), model.folder, str(model.evaluation), seqlen=SEQLEN, limit=WINDOWS
    )
    assert measurement.original is not None
    figures = {name: getattr(measurement.model, name) for name in FIGURES}
    load = {"load_average": os.getloadavg()[0], "commit": revision()}
    return row | asdict(taken) | figures | {"float_perplexity": measurement.original.perplexity} | load


def about(model: str) -> dict[str, Any]:
    settings = ABOUT.format(samples=SAMPLES, seqlen=SEQLEN, windows=WINDOWS, threads=THREADS)
    today = datetime.date.today().isoformat()
    return {"model": model, "settings": settings, "cpu": processor(), "date": today, "commit": revision()}


def wanted(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> list[tuple[str, str, int]]:
    """Contender, grid and seed of each missing row, draw by draw."""
    existing = set() if arguments.again else {key(row) for row in rows}
    missing = []
    for grid, seed in product(arguments.grid, arguments.seeds):
        for name in [*(f"llmq {method}" for method in arguments.llmq), *arguments.peers]:
            draws = PEERS[name].draws if name in PEERS else name.removeprefix("llmq ") not in NEED_NO_TEXT
            if (name, grid, seed) not in existing and (draws or seed == arguments.seeds[0]):
                missing.append((name, grid, seed))
    return missing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, choices=MODELS)
    parser.add_argument("--name", required=True, help="name of the result; several calls may add rows to it")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--llmq", nargs="*", default=["rtn-minmax", "rtn", "gptq"], choices=list(LLMQ))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--grid", nargs="*", default=["symmetric"], choices=["symmetric", "asymmetric"])
    parser.add_argument("--again", action="store_true", help="measure existing rows again")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(THREADS)
    file = RESULTS / f"{arguments.name}.json"
    results = json.loads(file.read_text()) if file.exists() else {"about": {}, "rows": []}
    for name, grid, seed in wanted(arguments, results["rows"]):
        with tempfile.TemporaryDirectory() as scratch:
            row = contend(name, find_model(arguments.model, Path(scratch)), grid, seed, Path(scratch))
        results["about"] |= about(arguments.model)
        if "error" not in row:
            results["about"]["float_perplexity"] = row.pop("float_perplexity")
        results["rows"] = merged(results["rows"], row)
        RESULTS.mkdir(exist_ok=True)
        file.write_text(json.dumps(results, indent=1) + "\n")
        file.with_suffix(".md").write_text(render(results))
        print(name, grid, seed, row.get("error") or f"{row['kl_mean']:.5f} {row['cpu_seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
