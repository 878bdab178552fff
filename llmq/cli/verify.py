"""`llmq verify PATH`"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from llmq.cli import options
from llmq.cli.progress import ProgressDisplay
from llmq.cli.terminal import megabytes, print_json, print_notes, print_table, quiet_transformers
from llmq.errors import CheckpointError, ConfigError, QualityError

if TYPE_CHECKING:
    from llmq.verify.engines import Finding, Verdict
    from llmq.verify.integrity import Integrity

SHOWN = 8  # problems of one model
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
    from llmq.checkpoint import hub
    from llmq.verify import engines as serving
    from llmq.verify.integrity import Integrity, examine

    asked = [_engine(name, serving.ENGINES) for name in for_ or ()]
    quiet_transformers()
    model = hub.locate(path, None, remote_code=trust_remote_code)
    _require_model(model)
    found = Integrity()
    if not quick:
        with ProgressDisplay() as display:
            found = examine(model, remote_code=trust_remote_code, on_event=display)
    findings = [] if found.problems else serving.check(model)
    verdicts = serving.verdicts(findings)
    if json:
        integrity = None if quick else found.to_dict()
        engines = {v.engine: {"loads": v.loads, "gpus": v.gpus} for v in verdicts} if not found.problems else {}
        print_json({"integrity": integrity, "engines": engines, "findings": [each.to_dict() for each in findings]})
    elif not found.problems:
        if not quick:
            _print_integrity(found)
        print_serving(verdicts)
        print_findings(findings)
    print_notes(found.notes)
    if found.problems:
        more = f" (and {len(found.problems) - SHOWN} more)" if len(found.problems) > SHOWN else ""
        raise CheckpointError(f"{path} is broken: {'; '.join(found.problems[:SHOWN])}{more}")
    _require_served(path, asked, verdicts)


def _require_served(path: str, asked: "Iterable[tuple[str, int]]", verdicts: "Iterable[Verdict]") -> None:
    """Raise QualityError where an engine that was asked for refuses, or may."""
    by_engine = {verdict.engine: verdict for verdict in verdicts}
    failing = [(engine, size) for engine, size in asked if size not in by_engine[engine].gpus]
    if failing:
        told = " and ".join(f"{engine} on {size} GPU{'s' if size > 1 else ''}" for engine, size in failing)
        unknown = all(by_engine[engine].loads is None for engine, _ in failing)
        verb = "is not known to be" if unknown else "would not be"
        raise QualityError(f"{path} {verb} served by {told}", hint="what is above says why")


def _require_model(path: Path) -> None:
    """Raise CheckpointError for a folder of folders, one for each format of a run."""
    if path.is_file() or any(entry.is_file() for pattern in MODEL_FILES for entry in path.glob(pattern)):
        return
    files = [file for pattern in MODEL_FILES for file in path.glob(f"*/{pattern}")]
    inner = sorted({str(file.parent) for file in files if not file.parent.name.startswith(".")})
    if inner:
        raise CheckpointError(
            f"{path} holds no model itself, but folders of models",
            hint=f"give one of them: {', '.join(inner[:SHOWN])}",
        )


def _engine(text: str, engines: Sequence[str]) -> tuple[str, int]:
    """`vllm:4` as the engine and how many GPUs."""
    name, _, size = text.partition(":")
    found = next((engine for engine in engines if engine.lower() == name.lower()), None)
    if found is None or not (size or "1").isdecimal():
        known = ", ".join(engine.lower() for engine in engines)
        raise ConfigError(f"engine is {text!r}, expected one of {known}", hint="on several GPUs for example vllm:4")
    return found, int(size or 1)


def _print_integrity(found: "Integrity") -> None:
    rows = [
        ("packed weights", f"{found.packed}, unpacked without error"),
        ("other tensors", f"{found.tensors}, all finite"),
        ("checksums", f"{found.checksums} files are what was written" if found.checksums else "none recorded"),
        ("size of weights", megabytes(found.nbytes)),
    ]
    print_table("the model is whole", ("", ""), rows)


def print_serving(verdicts: "Iterable[Verdict]", title: str = "serving") -> None:
    """A line an engine."""
    print_table(title, ("engine", "serves it", "GPUs, by tensor parallelism"), [serving_row(each) for each in verdicts])


def serving_row(verdict: "Verdict") -> tuple[str, str, str]:
    """Engine, yes, no or unknown, on how many GPUs."""
    gpus = ", ".join(map(str, verdict.gpus)) or "-"
    return verdict.engine, {True: "yes", False: "no", None: "unknown"}[verdict.loads], gpus


def print_findings(findings: "Iterable[Finding]", *, sources: bool = True) -> None:
    """A line each, in the order of the rules; one that several engines share is said once."""
    engines: dict[tuple[str, str], list[str]] = {}
    for finding in findings:
        asks = f"    asks: {finding.asks} ({finding.source})" if sources else ""
        engines.setdefault((finding.text, asks), []).append(finding.engine)
    for (text, asks), names in engines.items():
        print(f"{', '.join(names)}: {text}" + (f"\n{asks}" if asks else ""))
