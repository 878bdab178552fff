"""Compare other tools and llmq on one model: the same calibration tokens, the same evaluation of the written files.

    python eval/peers/run.py --model NAME --name RESULT [--peers …] [--llmq …] [--seeds 0 1 2] [--grid symmetric]
    python eval/peers/run.py --model smollm2 --name smollm2 --peers --llmq fast --seeds 0

Every contender is a whole process (`process.py`) with one thread; peers have separate environments, and llmq runs as
`python -m llmq quantize`. A seed is another draw of calibration text; contenders without text run once. Results are
written to eval/peers/results/RESULT.json row by row, so that an interrupted run continues, and to RESULT.md. Existing
rows are not measured again, unless --again is given. A failed row holds the error message of the peer. The models of
`yardstick.py` are measured on several texts, and their page is eval/results/RESULT.md (`strata_table.py`).
"""

import argparse
import datetime
import json
import os
import platform
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contenders import IN_Q4_K_M, LLMQ, NEED_NO_TEXT, PEERS, Peer
from environment import InstallError, interpreter, versions
from peer import SIZE, TENSORS, PeerError, time_peer
from process import Measured, import_seconds
from strata_table import render_strata
from table import key, merged, render
from time_gptq import processor, revision, time_llmq, write_tokens

if TYPE_CHECKING:
    from llmq.evaluation.results import Floor, Measurement

ROOT = Path(__file__).resolve().parents[2]
RESULTS, PAGES, THREADS = Path(__file__).parent / "results", ROOT / "eval" / "results", 1
STRATUM_FIGURES = ("kl_mean", "kl_mean_interval", "same_top_1", "perplexity")
PROMPTS = 100
FIGURES = ("perplexity", "kl_mean", "kl_median", "kl_99", "same_top_1")
IMPORTS = "import {module}, transformers.models.llama.modeling_llama"
ABOUT = """4 bits, groups of {group_size} unless stated otherwise, embedding and head in float.
{samples} x {seqlen} calibration tokens, the same for all, another draw for each seed. `fast` and `balanced` of llmq
read half of these sequences and let the model write the other half; `best` reads all, and the model writes three for
each.
Measured on {windows} x {seqlen} evaluation tokens{strata}.
KL is KL(float ‖ quantized) in nats per token, of the files read back from disk.
Whole processes including imports, {threads} thread each (OMP_NUM_THREADS).
Other jobs ran on the machine, so compare CPU-seconds.
"""

sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "eval")]
from subjects import MODELS, YARDSTICK, Protocol, folder_of, is_yardstick, protocol, strata, texts  # noqa: E402


@dataclass(frozen=True)
class Model:
    """A float checkpoint with the text that it is calibrated with and the texts that it is measured on."""

    folder: Path
    calibration: Path
    evaluation: Sequence[Path]
    protocol: Protocol

    @property
    def prompts(self) -> int:
        """How many prompts the models continue: only where there are several texts."""
        return PROMPTS if len(self.evaluation) > 1 else 0


def find_model(name: str, scratch: Path, yardstick: Path) -> Model:
    """A model of eval/subjects.py with its texts."""
    folder = folder_of(name, yardstick)
    if is_yardstick(name):
        return Model(folder, *strata(yardstick), protocol(name))
    calibration, evaluation = texts(name, scratch / "text")
    return Model(folder, calibration, [evaluation], protocol(name))


def run_peer(peer: Peer, model: Model, grid: str, tokens: Path, out: Path) -> tuple[Measured, str]:
    """Run the process of a peer, and return its version; raises InstallError and PeerError."""
    script = peer.script
    python = interpreter(script.NAME, script.REQUIREMENTS)
    chosen = ["--asymmetric"] if grid == "asymmetric" and peer.own_grid is None else []
    group = ["--group-size", str(model.protocol.group_size)]
    arguments = [str(model.folder), str(tokens), str(out), *chosen, *group, *peer.options]
    taken = time_peer(script.NAME, script.REQUIREMENTS, Path(str(script.__file__)), arguments)
    return taken, " ".join(versions(python, [script.PACKAGE]).values())


def run_llmq(method: str, model: Model, grid: str, seed: int, fingerprint: str, out: Path) -> tuple[Measured, str]:
    """Run llmq, which reads the text itself, and return its version; raises PeerError."""
    import llmq

    asked = model.protocol
    options = ["--samples", str(asked.samples), "--seqlen", str(asked.seqlen)]
    if "--format" not in LLMQ[method]:  # a GGUF type has its own group size
        options += ["--group-size", str(asked.group_size)]
    options += [*LLMQ[method], f"--{grid}", "--seed", str(seed)]
    expected = None if method in NEED_NO_TEXT else fingerprint
    return time_llmq(model.folder, model.calibration, out, expected, options), llmq.__version__


def contend(name: str, model: Model, grid: str, seed: int, scratch: Path) -> dict[str, Any]:
    """Quantize to `scratch`/out, and make the row without the quality: the cost of the process, or its error."""
    peer, method = PEERS.get(name), name.removeprefix("llmq ")
    own = peer.own_grid if peer else "scale and minimum" if set(IN_Q4_K_M) <= set(LLMQ[method]) else None
    row: dict[str, Any] = {"name": name, "asked": grid, "grid": own or grid, "seed": seed}
    row["settings"] = peer.settings if peer else " ".join(LLMQ[method])
    out, tokens = scratch / "out", scratch / "tokens.json"
    scratch.mkdir(parents=True)
    asked = model.protocol
    fingerprint = write_tokens(model.folder, model.calibration, tokens, seed, asked.samples, asked.seqlen)
    row["tokens_sha256"] = fingerprint
    try:
        if peer:
            taken, row["version"] = run_peer(peer, model, grid, tokens, out)
        else:
            taken, row["version"] = run_llmq(method, model, grid, seed, fingerprint, out)
        row["import_seconds"] = imports(peer, scratch)
    except InstallError as error:
        return row | {"error": f"cannot be installed: {error}"}
    except PeerError as error:
        return row | {"error": f"does not run: {error}"}
    machine = {"load_average": os.getloadavg()[0], "processor": processor()}
    measured = {"date": datetime.date.today().isoformat(), "commit": revision()}
    return row | asdict(taken) | {"file_megabytes": megabytes(out)} | machine | measured


def judged(outs: Sequence[Path], model: Model) -> list[dict[str, Any]]:
    """The quality of the files in each folder: of all texts together, and of every text if there are several."""
    from llmq.evaluation.measure import measure_many

    asked, sources = model.protocol, [str(file) for file in model.evaluation]
    files = [next(out.glob("*.gguf"), out) for out in outs]
    measurements = measure_many(
        model.folder, files, sources, seqlen=asked.seqlen, limit=asked.windows, trajectories=model.prompts
    )
    return [figures(measurement) for measurement in measurements]


def figures(measured: "Measurement | Floor") -> dict[str, Any]:
    """The entries of a row about its quality: on all texts together and, if there are several, on each."""
    total = measured.total
    assert total.original is not None, "measured against the original"
    entries = {name: getattr(total.model, name) for name in FIGURES}
    entries |= {"float_perplexity": total.original.perplexity}
    if len(measured.texts) == 1:
        return entries
    strata = {
        Path(part.text).stem: {name: getattr(part.model, name) for name in STRATUM_FIGURES}
        | {"float_perplexity": part.original.perplexity if part.original else None}
        for part in measured.texts
    }
    entries |= {"kl_mean_interval": total.model.kl_mean_interval, "strata": strata}
    return entries | {"trajectories": measured.trajectories and asdict(measured.trajectories)}


def floors(model: Model) -> list[dict[str, Any]]:
    """The distance of the float model from itself, computed in other ways."""
    from llmq.evaluation.measure import measure

    asked, sources = model.protocol, [str(file) for file in model.evaluation]
    measured = measure(
        model.folder,
        model.folder,
        sources,
        seqlen=asked.seqlen,
        limit=asked.windows,
        floors=True,
        trajectories=model.prompts,
    )
    return [{"name": floor.name, **figures(floor)} for floor in measured.floors]


def imports(peer: Peer | None, scratch: Path) -> float:
    """Seconds in user mode that a contender needs for its imports."""
    if peer is None:
        return import_seconds(
            Path(sys.executable), IMPORTS.format(module="llmq.__main__, llmq.job, llmq.cli.quantize"), scratch, ROOT
        )
    python, module = interpreter(peer.script.NAME, peer.script.REQUIREMENTS), peer.script.PACKAGE.lower()
    return import_seconds(python, IMPORTS.format(module=module.replace("-", "_")), scratch)


def megabytes(out: Path) -> float:
    """The size of the quantized model: of the files of a peer, which `peer.py` notes, or of the files in `out`."""
    if (out / SIZE).exists():
        return float(json.loads((out / SIZE).read_text())["file_megabytes"])
    return sum(file.stat().st_size for file in out.iterdir() if file.suffix in TENSORS) / 1e6


def about(model: str) -> dict[str, Any]:
    several = " of each of several texts" if is_yardstick(model) else ""
    settings = ABOUT.format(**asdict(protocol(model)), threads=THREADS, strata=several)
    today = datetime.date.today().isoformat()
    hardware = f"{os.cpu_count()} {platform.machine()} cores, {THREADS} thread, {processor()}"  # of the last run
    return {"model": model, "settings": settings, "cpu": hardware, "date": today, "commit": revision()}


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


def read(file: Path) -> dict[str, Any]:
    """The result so far."""
    return json.loads(file.read_text()) if file.exists() else {"about": {}, "rows": []}  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, choices=MODELS)
    parser.add_argument("--name", required=True, help="name of the result; several calls may add rows to it")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--llmq", nargs="*", default=["rtn-minmax", "rtn", "gptq"], choices=list(LLMQ))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--grid", nargs="*", default=["symmetric"], choices=["symmetric", "asymmetric"])
    parser.add_argument("--again", action="store_true", help="measure existing rows again")
    parser.add_argument("--yardstick", type=Path, default=YARDSTICK, help="the folder that `yardstick.py` has made")
    parser.add_argument("--floors", action="store_true", help="measure the distance of the float model from itself")
    parser.add_argument("--together", type=int, default=1, help="contenders that are measured after all have finished")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(THREADS)
    file = RESULTS / f"{arguments.name}.json"
    missing = wanted(arguments, read(file)["rows"])
    for start in range(0, len(missing), arguments.together):
        with tempfile.TemporaryDirectory() as scratch:
            model = find_model(arguments.model, Path(scratch), arguments.yardstick)
            rows = measured_rows(missing[start : start + arguments.together], model, Path(scratch))
        save(file, arguments.model, rows)
    if arguments.floors:
        with tempfile.TemporaryDirectory() as scratch:
            of_model = floors(find_model(arguments.model, Path(scratch), arguments.yardstick))
        save(file, arguments.model, [], {"floors": of_model})


def measured_rows(contenders: Sequence[tuple[str, str, int]], model: Model, scratch: Path) -> list[dict[str, Any]]:
    """The rows of contenders (name, grid, seed) that are measured together: the float model runs once for all."""
    rows, folders = [], [scratch / str(number) for number in range(len(contenders))]
    for (name, grid, seed), folder in zip(contenders, folders, strict=True):
        rows.append(contend(name, model, grid, seed, folder))
        print(name, grid, seed, rows[-1].get("error") or f"{rows[-1]['cpu_seconds']:.0f} s", flush=True)
    finished = [(row, folder / "out") for row, folder in zip(rows, folders, strict=True) if "error" not in row]
    if finished:
        for (row, _), quality in zip(finished, judged([out for _, out in finished], model), strict=True):
            row.update(quality)
            print(row["name"], row["asked"], row["seed"], f"{row['kl_mean']:.5f}", flush=True)
    return rows


def save(file: Path, model: str, rows: Sequence[dict[str, Any]], more: Mapping[str, Any] | None = None) -> None:
    """Merge rows, and `more` about all of them, into the result, and write it and its page.

    Another run may have added rows to the file.
    """
    results = read(file)
    results["about"] |= (about(model) if rows else {}) | (more or {})
    for row in rows:
        if "error" not in row:
            results["about"]["float_perplexity"] = row.pop("float_perplexity")
        results["rows"] = merged(results["rows"], row)
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(results, indent=1) + "\n")
    if is_yardstick(model):
        (PAGES / f"{file.stem}.md").write_text(render_strata(results))
    else:
        file.with_suffix(".md").write_text(render(results))


if __name__ == "__main__":
    main()
