"""Check and measure llmq and its kernels on the GPU of this machine, in 500 seconds.

    python scripts/gpu_suite.py                      all sections, into kernels/bench/results
    python scripts/gpu_suite.py --dry-run            which sections would run, in which order and for how long
    python scripts/gpu_suite.py --smoke              small and fast: for a first try on a GPU
    python scripts/gpu_suite.py --only w4a16 decode  some sections; the file keeps its other sections
    python scripts/gpu_suite.py --only gpu_tests     the tests that need a GPU, by pytest
    python scripts/gpu_suite.py --interpret --out FOLDER    tiny, in Triton's interpreter: tests the suite, not the GPU

Needs what llmq needs (the section `environment` lists what is missing), and no network.  The sections are in the order
of their value: does it work from end to end, is it right, where does the time go, how fast is it.  `tune` searches tile
sizes for this GPU, and the later sections use them.  Kernels are compiled in the background before anything is timed.

Each section runs in a separate process: if it hangs or loses the GPU, it is restarted after the case that failed.
Results are written to <gpu>-<date>.json as soon as they are measured.  A missing competitor, sanitizer or profiler is
recorded, and is not an error.  The exit code is 1 if anything was wrong.  `scripts/docs.py` makes tables of them.
"""

import argparse
import ast
import datetime
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from bench import results, tables  # noqa: E402
from bench.__main__ import RESTART  # noqa: E402
from bench.session import append_record, read_records, results_of  # noqa: E402
from llmq_kernels.w4a16 import configs  # noqa: E402

# section: its share of the time.  `environment` always runs: the others are compared with its measurements.
SECTIONS = {
    "environment": 40.0, "command_line": 85.0, "correctness": 55.0, "gptq": 75.0, "tune": 75.0, "w4a16": 75.0,
    "decode": 70.0, "disk": 20.0,
}  # fmt: skip
ON_REQUEST = {"gpu_tests": 300.0}
BUDGET = 500.0
UNTIMED = ("command_line", "correctness")  # meanwhile other processes compile the kernels of COMPILED
COMPILED, COMPILERS = ("tune", "w4a16"), 3  # processes for each
TICK = 0.2  # seconds between two checks of a section
GRACE = 12.0  # seconds after the end of its time in which a section may stop by itself
SILENCE = 100.0  # seconds without output, after which a section counts as hung
RESTARTS = 4
ENVIRONMENT = "environment"
OUT_OF_TIME = "out of time, ended by the suite"


@dataclass
class Suite:
    """One call: its settings and its result file; `path` is known once the device is known."""

    plan: str
    out: Path
    end: float
    program: Sequence[str] = (sys.executable, "-m", "bench")  # runs a section
    started: float = field(default_factory=time.time)
    device: str = "unknown"
    tile_sizes: Path | None = None  # that this run has found
    date: str = field(default_factory=lambda: datetime.date.today().isoformat())

    @property
    def path(self) -> Path:
        return self.out / results.file_name(self.device, self.plan, self.date)

    def keep(self, section: str, status: str, seconds: float, records: Path) -> None:
        """Write the records of a section so far into the result file."""
        kept = [record for record in read_records(records) if record["kind"] != "begin"]
        entry = {"status": status, "plan": self.plan, "seconds": round(seconds, 1), "sources": results.sources()}
        results.merge(self.path, self.device, self.date, section, {**entry, "records": kept})

    def run(self, section: str, seconds: float) -> None:
        """One section, in as many processes as necessary."""
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            records = Path(folder) / "records"
            status = "failed"
            for _ in range(1 + RESTARTS):
                left = start + seconds - time.monotonic()
                status = self._process(section, left, start, records)
                if status != "restart" or left < GRACE:
                    break
            status = "failed" if status == "restart" else status
            if section == ENVIRONMENT:
                self.device = str(results_of(read_records(records)).get("machine", {}).get("name", self.device))
            self.keep(section, status, time.monotonic() - start, records)
            for result in results_of(read_records(records)).values():
                if "file" in result:
                    self.tile_sizes = (self.out / result["file"]).resolve()
                    self.tile_sizes.write_text(result["text"], encoding="utf-8")

    def _process(self, section: str, seconds: float, start: float, records: Path) -> str:
        """done, out of time, failed, or restart: a case ended the process, and other cases are left."""
        command = [*self.program, section, "--plan", self.plan, "--seconds", str(seconds)]
        command += ["--records", str(records), "--started", str(self.started)]
        begun = len(read_records(records))
        with tempfile.TemporaryFile("w+") as errors:
            variables = environment(self.plan, self.tile_sizes)
            process = subprocess.Popen(command, cwd=ROOT, env=variables, stderr=errors, process_group=0)
            try:
                reason = self._wait(process, section, time.monotonic() + seconds + GRACE, start, records)
            finally:
                end(process)
            errors.seek(0)
            messages = errors.read().strip().splitlines()
        written = read_records(records)
        if reason is None and process.returncode == 0:
            return "out of time" if any(record["kind"] == "left out" for record in written) else "done"
        reason = reason or f"the process ended with {process.returncode}: {messages[-1] if messages else 'no message'}"
        self._print(section, reason, *messages[-12:])
        last = written[-1] if written else None
        unfinished = last["case"] if last is not None and last["kind"] == "begin" else None
        if reason == OUT_OF_TIME:
            append_record(records, {"kind": "left out", "case": unfinished or "the rest", "reason": reason})
            return "out of time"
        if unfinished is not None or process.returncode != RESTART:
            append_record(records, {"kind": "error", "case": unfinished or "the section", "error": reason})
        return "restart" if len(written) > begun else "failed"

    def _wait(
        self, process: subprocess.Popen[bytes], section: str, latest: float, start: float, records: Path
    ) -> str | None:
        """Wait for the process and keep its records; the reason to end it, None if it ended itself."""
        sign, seen = time.monotonic(), 0.0
        while process.poll() is None:
            time.sleep(TICK)
            changed = records.stat().st_mtime if records.is_file() else 0.0
            if changed != seen:
                sign, seen = time.monotonic(), changed
                if section != ENVIRONMENT:
                    self.keep(section, "running", time.monotonic() - start, records)
            if time.monotonic() > latest:
                return OUT_OF_TIME
            if time.monotonic() - sign > SILENCE:
                return f"hung: no output for {SILENCE:.0f} s"
        return None

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """Inside, other processes compile kernels for later sections; Triton keeps compiled kernels on disk."""
        commands = [] if self.plan == "interpret" else [
            [sys.executable, "-m", "bench.warm", "--plan", self.plan, "--what", what,
             "--worker", str(worker), "--workers", str(COMPILERS)]
            for what in COMPILED for worker in range(COMPILERS)
        ]  # fmt: skip
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        variables = environment(self.plan)
        workers = [subprocess.Popen(c, cwd=ROOT, env=variables, process_group=0, **quiet) for c in commands]
        try:
            yield
        finally:
            for worker in workers:
                end(worker)

    def _print(self, section: str, *lines: str) -> None:
        for line in lines:
            print(f"{time.time() - self.started:7.1f} s  {section:<12} {line}", flush=True)


def environment(plan: str, tile_sizes: Path | None = None) -> dict[str, str]:
    """The environment variables of a section's process."""
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    variables |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if tile_sizes is not None:
        variables[configs.VARIABLE] = str(tile_sizes)
    if plan == "interpret":
        return {**variables, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return {name: value for name, value in variables.items() if name != "TRITON_INTERPRET"}


def end(process: subprocess.Popen[bytes]) -> None:
    """End a section's process and the processes that it started, which are a process group."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def schedule(wanted: Collection[str], seconds: float) -> dict[str, float]:
    """Seconds of each wanted section, in their order."""
    shares = {name: share for name, share in (SECTIONS | ON_REQUEST).items() if name in wanted}
    return {name: seconds * share / sum(shares.values()) for name, share in shares.items()}


def run_sections(suite: Suite, wanted: Collection[str]) -> None:
    """Run the sections; the unused time of a section goes to the next ones."""
    waiting = [name for name in SECTIONS | ON_REQUEST if name in wanted]

    def run(name: str) -> None:
        suite.run(name, schedule(waiting, suite.end - time.monotonic() - GRACE)[name])
        waiting.remove(name)

    run(ENVIRONMENT)
    if any(name in UNTIMED for name in waiting):
        with suite.compiling():
            for name in UNTIMED:
                if name in waiting:
                    run(name)
    while waiting:
        run(waiting[0])


def main() -> int:
    arguments = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside"))  # so that the section is ended too
    plan = "interpret" if arguments.interpret else "smoke" if arguments.smoke else "full"
    wanted = {ENVIRONMENT, *(arguments.only or SECTIONS)}
    if arguments.dry_run:
        for name, seconds in schedule(wanted, arguments.budget - GRACE).items():
            print(f"{seconds:6.0f} s  {name:<13} {purpose(name)}")
        return 0
    suite = Suite(plan, arguments.out or results.FOLDER, time.monotonic() + arguments.budget)
    suite.out.mkdir(parents=True, exist_ok=True)
    run_sections(suite, wanted)
    content = results.read(suite.path)
    print(f"\n{tables.report(content)}\n")
    problems = [f"{name}: {problem}" for name in SECTIONS | ON_REQUEST if name in wanted
             for problem in results.problems(content, name)]  # fmt: skip
    print("\n".join(problems) if problems else "nothing wrong")
    print(f"{suite.path}, {time.time() - suite.started:.0f} s")
    return 1 if problems else 0


def purpose(section: str) -> str:
    """The first line of the section's module, which is not imported: that would need torch."""
    text = (ROOT / "kernels" / "bench" / f"{section}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*SECTIONS, *ON_REQUEST], metavar="NAME")
    parser.add_argument("--out", type=Path, help="the folder of the result file")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for everything")
    parser.add_argument("--smoke", action="store_true", help="small shapes, few repeats")
    parser.add_argument("--dry-run", action="store_true", help="print the sections and their seconds, and end")
    parser.add_argument("--interpret", action="store_true", help="on a CPU, in Triton's interpreter; needs --out")
    arguments = parser.parse_args()
    if arguments.interpret and arguments.out is None and not arguments.dry_run:
        parser.error("--interpret gives no figures for publication: name a folder with --out")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
