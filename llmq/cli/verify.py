"""`llmq verify PATH`"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from llmq.cli import options
from llmq.cli.progress import ProgressDisplay
from llmq.cli.streams import print_text
from llmq.cli.terminal import megabytes, print_json, print_loading, print_notes, print_table, quiet_transformers
from llmq.errors import CheckpointError, ConfigError, QualityError
from llmq.report.events import Planned

if TYPE_CHECKING:
    from llmq.verify.engines import Finding, Verdict
    from llmq.verify.integrity import Integrity

SHOWN = 8  # problems per model
MODEL_FILES = ("config.json", "*.safetensors", "*.gguf")

PANEL, ORDER = "Inspect", 2


def command(
    path: options.Path_,
    for_: Annotated[
        list[str] | None,
        options.choice(
            "--for",
            ("vllm", "sglang", "transformers", "llama.cpp"),
            "Engine to check, optionally with a GPU count (vllm:4). Exit code 8 if it would not load or is unknown. "
            "Repeatable.",
        ),
    ] = None,
    quick: Annotated[bool, Option("--quick", help="Read only headers and the configuration, no weights.")] = False,
    trust_remote_code: options.TrustRemoteCode = False,
    quiet: options.Quiet = False,
    log_json: options.LogJson = None,
    json: options.Json = False,
) -> None:
    """Check that a model is complete, and which engines load it.

    Every tensor is read. Engines are not run: their requirements are known
    from their sources (docs/SERVING.md). The result lists for each engine
    on how many GPUs it would load the model, or why it would not.

    Example:
      llmq verify out/ --for vllm:4

    Exit codes:
      0  success
      2  invalid options
      3  broken or unreadable model
      8  an engine given with --for would not load it, or is unknown
    """
    print_loading(quiet=quiet)
    from llmq.checkpoint import hub
    from llmq.verify import engines as serving
    from llmq.verify.integrity import Integrity, examine

    requested = [_engine(name, serving.ENGINES) for name in for_ or ()]
    quiet_transformers()
    model = hub.locate(path, None, remote_code=trust_remote_code)
    _require_model(model)
    integrity = Integrity()
    if not quick:
        with ProgressDisplay(silent=quiet, log=log_json) as display:
            display(Planned({"reading": 1.0}))
            integrity = examine(model, remote_code=trust_remote_code, on_event=display)
    findings = [] if integrity.problems else serving.check(model)
    verdicts = serving.verdicts(findings)
    if json:
        checked = None if quick else integrity.to_dict()
        engines = {v.engine: {"loads": v.loads, "gpus": v.gpus} for v in verdicts} if not integrity.problems else {}
        print_json({"integrity": checked, "engines": engines, "findings": [finding.to_dict() for finding in findings]})
    elif not integrity.problems:
        if not quick:
            _print_integrity(integrity)
        print_serving(verdicts)
        print_findings(findings)
    print_notes(integrity.notes)
    if integrity.problems:
        more = f" (and {len(integrity.problems) - SHOWN} more)" if len(integrity.problems) > SHOWN else ""
        raise CheckpointError(
            f"{path} is broken: {'; '.join(integrity.problems[:SHOWN])}{more}",
            hint="download or copy the files again; if you changed one, remove its line from checksums in llmq.json",
        )
    _require_served(path, requested, verdicts)


def _require_served(path: str, requested: "Iterable[tuple[str, int]]", verdicts: "Iterable[Verdict]") -> None:
    """Raise QualityError if a requested engine does not load the model, or may not."""
    by_engine = {verdict.engine: verdict for verdict in verdicts}
    failing = [(engine, size) for engine, size in requested if size not in by_engine[engine].gpus]
    if failing:
        engines = " and ".join(f"{engine} on {size} GPU{'s' if size > 1 else ''}" for engine, size in failing)
        unknown = all(by_engine[engine].loads is None for engine, _ in failing)
        verb = "is not known to load" if unknown else "would not load"
        raise QualityError(f"{path} {verb} in {engines}", hint="see the findings above")


def _require_model(path: Path) -> None:
    """Raise CheckpointError for a folder with one folder per format of a run."""
    if path.is_file() or any(entry.is_file() for pattern in MODEL_FILES for entry in path.glob(pattern)):
        return
    files = [file for pattern in MODEL_FILES for file in path.glob(f"*/{pattern}")]
    inner = sorted({str(file.parent) for file in files if not file.parent.name.startswith(".")})
    if inner:
        raise CheckpointError(
            f"{path} is not a model but holds folders of models",
            hint=f"give one of them: {', '.join(inner[:SHOWN])}",
        )


def _engine(text: str, engines: Sequence[str]) -> tuple[str, int]:
    """Parse `vllm:4` as the engine and the number of GPUs."""
    name, _, size = text.partition(":")
    match = next((engine for engine in engines if engine.lower() == name.lower()), None)
    if match is None or not (size or "1").isdecimal():
        known = ", ".join(engine.lower() for engine in engines)
        raise ConfigError(f"engine is {text!r}, expected one of {known}", hint="for several GPUs, for example vllm:4")
    return match, int(size or 1)


def _print_integrity(integrity: "Integrity") -> None:
    rows = [
        ("packed weights", f"{integrity.packed}, all unpacked without error"),
        ("other tensors", f"{integrity.tensors}, all finite"),
        ("checksums", f"{integrity.checksums} files match" if integrity.checksums else "none recorded"),
        ("size of weights", megabytes(integrity.nbytes)),
    ]
    print_table("the model is complete", ("", ""), rows)


def print_serving(verdicts: "Iterable[Verdict]", title: str = "compatible engines") -> None:
    """Print one line per engine."""
    columns = ("engine", "loads it", "GPUs (tensor parallelism)")
    print_table(title, columns, [serving_row(verdict) for verdict in verdicts])


def serving_row(verdict: "Verdict") -> tuple[str, str, str]:
    """The engine; yes, no or unknown; the numbers of GPUs."""
    gpus = ", ".join(map(str, verdict.gpus)) or "-"
    return verdict.engine, {True: "yes", False: "no", None: "unknown"}[verdict.loads], gpus


def print_findings(findings: "Iterable[Finding]", *, sources: bool = True) -> None:
    """Print one line per finding, in the order of the rules; equal findings of several engines share a line."""
    engines: dict[tuple[str, str], list[str]] = {}
    for finding in findings:
        requires = f"    requires: {finding.asks} ({finding.source})" if sources else ""
        engines.setdefault((finding.text, requires), []).append(finding.engine)
    for (text, requires), names in engines.items():
        print_text(f"{', '.join(names)}: {text}" + (f"\n{requires}" if requires else ""))
