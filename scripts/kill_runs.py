"""Kill runs with SIGKILL, at chosen and at random moments, and compare what the same command makes afterwards.

    python scripts/kill_runs.py [--moments N | --every] [--seed S] [--seconds T] [--cases C …] [--record FILE]

Each run is a fork of this process. It is killed at one of its boundaries (before a call that flushes, renames, creates
or deletes a file or folder), or at a random time. Every third run is killed again when it continues. Then the same
command runs to its end, and every file must equal that in a run without a kill; llmq.json may differ in times and
memory. After a kill, a folder with a config.json must be the complete model. `--every` kills once at each boundary, and
at a random time only when a run continues. `--record` writes the counts, from which scripts/docs.py makes a table in
docs/RELIABILITY.md.
"""

import argparse
import contextlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for the builders of the tests
sys.path.insert(1, str(ROOT / "kernels"))

import torch  # noqa: E402

from llmq.config import QuantConfig  # noqa: E402
from llmq.export.convert import Converter  # noqa: E402
from llmq.export.from_gguf import GgufConverter  # noqa: E402
from llmq.job import Job  # noqa: E402
from llmq.methods import METHODS, Method, Tuning  # noqa: E402
from llmq.numerics.gguf_types import GGUF_GRIDS  # noqa: E402
from llmq.setting_fields import merged  # noqa: E402
from tests import builders, runs  # noqa: E402
from tests.run_folder import contents, state  # noqa: E402

SHORT = Tuning(2, 0.0, 0.02, 64, fisher=True)
BALANCED = replace(METHODS["balanced"], block_tuning=SHORT)
BEST = replace(METHODS["best"], block_tuning=SHORT, tuning=Tuning(4, 1e-3, 1e-3, 64), written=1)
PRELOADED = ("transformers.models.llama.modeling_llama", "llmq.verification.engines", "llmq.gguf.export", "gguf")
CALLS = ("fsync", "replace", "rename", "unlink", "mkdir", "rmdir")


@dataclass(frozen=True)
class Case:
    """A command: a run with settings and, for tuning, with stages that are shorter than those of any method."""

    name: str
    settings: dict[str, Any]
    stages: Method | None = None
    convert: str = ""  # the format that the model of the first case is converted to


CASES = (
    Case("rtn, compressed-tensors", {"method": "rtn"}),
    Case("gptq, gptq", {"method": "gptq", "format": "gptq"}),
    Case("awq, awq", {"method": "awq", "format": "awq"}),
    Case("fast, gguf", {"method": "fast", "format": "gguf", "group_size": 32}),
    Case("gptq, three formats", {"method": "gptq", "format": "awq,gptq,gguf", "group_size": 32}),
    Case("rtn, gguf:q4_k_m", {"method": "rtn", "format": "gguf:q4_k_m"}),
    Case("balanced, gptq_v2", {"method": "balanced", "format": "gptq_v2"}, BALANCED),
    Case("gptq, mlx", {"method": "gptq", "format": "mlx", "group_size": 32}),
    Case("best, two formats", {"method": "best", "format": "gptq,awq", "group_size": 32}, BEST),
    Case("convert to gptq", {}, convert="gptq"),
    Case("convert to gguf and back", {}, convert="gguf"),
)


@dataclass
class Counts:
    """What happened to the runs of one case.

    boundaries  the number of boundaries of a run that is not killed
    at_boundary, at_random, again  the number of kills; `again` are those of runs that continued
    reached     in which state the kill left the folder -> number of kills
    failures    what was wrong after a kill; must be empty
    """

    boundaries: int
    at_boundary: int = 0
    at_random: int = 0
    again: int = 0
    reached: Counter[str] | None = None
    failures: list[str] | None = None


class Trial:
    """One case in a folder: runs that are killed, and the run that is not."""

    def __init__(self, case: Case, model: Path, text: Path, folder: Path) -> None:
        self._case, self._model, self._text, self._folder = case, model, text, folder
        self._out = folder / "out" / "model"  # the name of the folder is part of the name of a .gguf file
        self.seconds, boundaries = self._straight()
        self.expected = contents(self._out)
        self.counts = Counts(boundaries, reached=Counter(), failures=[])
        shutil.rmtree(self._out)

    def kill(self, moment: str, generator: random.Random) -> None:
        """Kill a run at a boundary ("boundary 7") or at a random time ("random"), and run the same command again."""
        out, failures = self._out, self.counts.failures
        assert failures is not None and self.counts.reached is not None
        self._run(moment, generator)
        self.counts.reached[state(out)] += 1
        visible = contents(out)
        for place in {Path(name).parent for name in visible if Path(name).name == "config.json"}:
            own = {name: data for name, data in self.expected.items() if Path(name).parent == place}
            if {name: data for name, data in visible.items() if Path(name).parent == place} != own:
                failures.append(f"{moment}: a part of a model looks finished")
        if generator.random() < 1 / 3:
            self.counts.again += self._run("random", generator)
        status = fork(lambda: self._act())
        after = contents(out)
        if status or after != self.expected or any(entry.name.startswith(".") for entry in out.iterdir()):
            wrong = sorted(name for name in {*after, *self.expected} if after.get(name) != self.expected.get(name))
            failures.append(f"{moment}: the same command ended with {status}, different: {wrong[:3]}")
        shutil.rmtree(out, ignore_errors=True)

    def _run(self, moment: str, generator: random.Random) -> bool:
        """Whether the run was killed before its end."""
        if moment == "random":
            killed = fork(self._act, after=generator.random() * 1.1 * self.seconds) == signal.SIGKILL
            self.counts.at_random += killed
        else:
            killed = fork(lambda: self._counting(int(moment.split()[1]))) == signal.SIGKILL
            self.counts.at_boundary += killed
        return killed

    def _straight(self) -> tuple[float, int]:
        start, file = time.monotonic(), self._folder / "boundaries"
        if fork(lambda: file.write_text(str(self._counting(None)))):
            raise RuntimeError(f"{self._case.name} fails without a kill")
        return time.monotonic() - start, int(file.read_text())

    def _counting(self, deadly: int | None) -> int:
        """Run, and kill this process at the boundary with this number; returns the number of boundaries."""
        passed = 0

        def counted(call: Callable[..., Any]) -> Callable[..., Any]:
            def wrapper(*arguments: Any, **options: Any) -> Any:
                nonlocal passed
                passed += 1
                if passed == deadly:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*arguments, **options)

            return wrapper

        for name in CALLS:
            setattr(os, name, counted(getattr(os, name)))
        self._act()
        return passed

    def _act(self) -> None:
        with (
            Path(os.devnull).open("w") as nothing,
            contextlib.redirect_stderr(nothing),
            contextlib.redirect_stdout(nothing),
        ):
            self._command()

    def _command(self) -> None:
        case = self._case
        if not case.convert:
            native = case.settings.get("format") in GGUF_GRIDS  # whose groups are part of the format
            given = {**({} if native else runs.QUICK), **runs.WINDOWS, "calibration": [self._text], **case.settings}
            model = self._model.with_name("wide") if native else self._model
            Job(str(model), self._out, merged(QuantConfig(), given), stages=case.stages, device="cpu").run()
            return
        source = self._folder.parent / "source" / "model"
        if case.convert != "gguf":
            Converter(source, self._out, case.convert).run()
            return
        Converter(source, self._out / "gguf", "gguf").run()
        GgufConverter(self._out / "gguf" / "gguf.gguf", self._out / "back", "awq").run()


def fork(act: Callable[[], Any], after: float | None = None) -> int:
    """Run `act` in a fork, and kill it after some seconds; returns the signal or the exit code that ended it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.fsync = lambda descriptor: None  # a kill, unlike a power cut, loses no written data
            act()
            code = 0
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(code)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) * -1


def moments(trial: Trial, generator: random.Random) -> Iterator[str]:
    """A boundary that was not tried yet, then a random time, and so on.

    Every other boundary is one of the last eighth, where the model appears and its record and pages are completed.
    """
    left = list(range(1, trial.counts.boundaries + 1))
    late = left[-max(1, len(left) // 8) :]
    generator.shuffle(left)
    generator.shuffle(late)
    while True:
        for some in (late, left):
            boundary = some.pop() if some else None
            yield "random" if boundary is None else f"boundary {boundary}"
            yield "random"


def schedule(trials: Mapping[str, Trial], turns: int, generator: random.Random) -> Iterator[tuple[Trial, str]]:
    """What to kill when: `turns` moments, one case after the other."""
    planned = {name: moments(trial, generator) for name, trial in trials.items()}
    names = list(trials)
    for turn in range(turns):
        name = names[turn % len(names)]
        yield trials[name], next(planned[name])


def every_boundary(trials: Mapping[str, Trial]) -> Iterator[tuple[Trial, str]]:
    for trial in trials.values():
        for boundary in range(1, trial.counts.boundaries + 1):
            yield trial, f"boundary {boundary}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=100, help="number of kills; default: 100")
    parser.add_argument("--every", action="store_true", help="kill once at each boundary instead")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--seconds", type=float, default=900.0, help="begin no kill after this time; default: 900")
    parser.add_argument("--cases", type=int, nargs="*", help="numbers of the cases, from 0; default: all")
    parser.add_argument("--record", type=Path, help="a JSON file for the counts")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads would not survive a fork
    for module in PRELOADED:
        importlib.import_module(module)
    generator, start = random.Random(options.seed), time.monotonic()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        model, text = folder / "model", builders.write_text(folder / "text.txt")
        wide = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
        for place, sizes in ((model, {}), (folder / "wide", wide)):
            config = builders.llama(num_hidden_layers=2, **sizes)
            fork(partial(save, place, config))
        fork(lambda: runs.quantize(model, folder / "source" / "model", text, method="rtn", group_size=32))
        trials = {}
        for number, case in enumerate(CASES):
            if options.cases is None or number in options.cases:
                (folder / str(number)).mkdir()
                trials[case.name] = Trial(case, model, text, folder / str(number))
        planned = every_boundary(trials) if options.every else schedule(trials, options.moments, generator)
        for trial, moment in planned:
            if time.monotonic() - start > options.seconds:
                break
            trial.kill(moment, generator)
            if options.record:
                write_record(options.record, options.seed, trials)
    failures = 0
    for name, trial in trials.items():
        print(f"{name}: {json.dumps(vars(trial.counts))}")
        failures += len(trial.counts.failures or ())
    sys.exit(1 if failures else 0)


def save(folder: Path, config: Any) -> None:
    builders.save_model(folder, builders.causal_model(config, dtype="float16"))


def write_record(file: Path, seed: int, trials: dict[str, Trial]) -> None:
    cases = {name: vars(trial.counts) for name, trial in trials.items()}
    file.write_text(json.dumps({"seed": seed, "cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    main()
