"""`llmq verify PATH`"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated

from typer import Option

from llmq.cli import options
from llmq.cli.progress import ProgressDisplay
from llmq.cli.streams import print_text
from llmq.cli.terminal import print_json, print_loading, print_notes, print_table, quiet_transformers
from llmq.errors import ConfigError, QualityError

if TYPE_CHECKING:
    from llmq.verification.engines import Finding, Verdict
    from llmq.verification.integrity import Integrity

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
    print_loading()
    from llmq.verification.engines import ENGINES
    from llmq.verification.verified import verify

    requested = [_engine(name, ENGINES) for name in for_ or ()]
    quiet_transformers()
    with ProgressDisplay() as display:
        verification = verify(path, quick=quick, trust_remote_code=trust_remote_code, on_event=display)
    if json:
        print_json(verification.to_dict())
    elif verification.intact:
        if verification.integrity is not None:
            _print_integrity(verification.integrity)
        print_serving(verification.verdicts)
        print_findings(verification.findings)
    print_notes(verification.integrity.notes if verification.integrity is not None else ())
    verification.require_intact()
    _require_served(path, requested, verification.verdicts)


def _require_served(path: str, requested: "Iterable[tuple[str, int]]", verdicts: "Iterable[Verdict]") -> None:
    """Raise QualityError if a requested engine does not load the model, or may not."""
    by_engine = {verdict.engine: verdict for verdict in verdicts}
    failing = [(engine, size) for engine, size in requested if size not in by_engine[engine].gpus]
    if failing:
        engines = " and ".join(f"{engine} on {size} GPU{'s' if size > 1 else ''}" for engine, size in failing)
        unknown = all(by_engine[engine].loads is None for engine, _ in failing)
        verb = "is not known to load" if unknown else "would not load"
        raise QualityError(f"{path} {verb} in {engines}", hint="see the findings above")


def _engine(text: str, engines: Sequence[str]) -> tuple[str, int]:
    """Parse `vllm:4` as the engine and the number of GPUs."""
    name, _, size = text.partition(":")
    match = next((engine for engine in engines if engine.lower() == name.lower()), None)
    if match is None or not (size or "1").isdecimal():
        known = ", ".join(engine.lower() for engine in engines)
        raise ConfigError(f"engine is {text!r}, expected one of {known}", hint="for several GPUs, for example vllm:4")
    return match, int(size or 1)


def _print_integrity(integrity: "Integrity") -> None:
    from llmq.verification.verified import integrity_rows

    print_table("the model is complete", ("", ""), integrity_rows(integrity))


def print_serving(verdicts: "Iterable[Verdict]", title: str = "compatible engines") -> None:
    """Print one line per engine."""
    from llmq.verification.verified import ENGINE_COLUMNS, engine_row

    print_table(title, ENGINE_COLUMNS, [engine_row(verdict) for verdict in verdicts])


def print_findings(findings: "Iterable[Finding]", *, sources: bool = True) -> None:
    """Print one line per finding, in the order of the rules; equal findings of several engines share a line."""
    engines: dict[tuple[str, str], list[str]] = {}
    for finding in findings:
        requires = f"    requires: {finding.asks} ({finding.source})" if sources else ""
        engines.setdefault((finding.text, requires), []).append(finding.engine)
    for (text, requires), names in engines.items():
        print_text(f"{', '.join(names)}: {text}" + (f"\n{requires}" if requires else ""))
