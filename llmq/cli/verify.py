"""`llmq verify PATH`"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from llmq.cli import options
from llmq.cli.paths import begin
from llmq.cli.progress import ProgressDisplay
from llmq.cli.streams import print_text
from llmq.cli.terminal import print_json, print_notes, print_table, quiet_transformers
from llmq.errors import ConfigError, QualityError
from llmq.runtime import ONNX_ENGINES

if TYPE_CHECKING:
    from llmq.engines.agreement import Agreement
    from llmq.engines.processes import Engine
    from llmq.verification.engines import Finding, Verdict
    from llmq.verification.integrity import Integrity

PANEL, ORDER = "Inspect", 2

Run = Annotated[
    str | None,
    options.choice(
        "--run",
        ("vllm", "llama.cpp", "transformers", "mlx", *ONNX_ENGINES),
        "Start this engine, and compare its log-probabilities for a few prompts with those of llmq. Exit code 8 if "
        "they differ by more than --max-difference, or if it cuts the text into other tokens.",
    ),
]
MaxDifference = Annotated[
    float | None,
    Option(
        "--max-difference", min=0, metavar="NATS",
        help="The largest difference of a log-probability. Default: 0.01 in float32, 0.25 in 16 bits, 0.5 for "
        "llama.cpp and ONNX models that round activations to 8 bits, 1 for models with int8 activations.",
    ),
]  # fmt: skip
Against = Annotated[
    str | None,
    Option(
        "--against", metavar="FOLDER",
        help="For --run with an ONNX model: the quantized folder that it was made from. Default: the recorded one.",
    ),
]  # fmt: skip


def command(
    path: options.Path_,
    for_: Annotated[
        list[str] | None,
        options.choice(
            "--for",
            ("vllm", "sglang", "transformers", "llama.cpp", "mlx"),
            "Engine to check, optionally with a GPU count (vllm:4). Exit code 8 if it would not load or is unknown. "
            "Repeatable.",
        ),
    ] = None,
    quick: Annotated[bool, Option("--quick", help="Read only headers and the configuration, no weights.")] = False,
    run: Run = None,
    against: Against = None,
    engine_python: options.EnginePython = None,
    max_difference: MaxDifference = None,
    device: options.Device = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    quiet: options.Quiet = False,
    log_json: options.LogJson = None,
    json: options.Json = False,
) -> None:
    """Check that a model is complete, and which engines load it.

    Every tensor is read. The requirements of engines are known from their
    sources (docs/SERVING.md): the result lists for each engine on how many
    GPUs it would load the model, or why it would not. With --run, an engine
    that is installed also runs a few prompts, and its log-probabilities are
    compared with those of llmq.

    Examples:
      llmq verify out/ --for vllm:4
      llmq verify out/ --run vllm --engine-python vllm-env/bin/python
      llmq verify out-onnx/ --run onnxruntime

    Exit codes:
      0  success
      2  invalid options
      3  broken or unreadable model
      6  the engine given with --run is not installed, or fails
      8  an engine given with --for would not load it, or is unknown;
         an engine given with --run computes something else

    See also:
      llmq serve                the command that starts an engine
      llmq quantize --dry-run   which engines would load a planned model
    """
    begin(path, quiet=quiet)
    from llmq.checkpoint import hub
    from llmq.verification.engines import ENGINES
    from llmq.verification.verified import verify

    requested = [_engine(name, ENGINES) for name in for_ or ()]
    runner = None if run is None else _runner(run)
    if against is not None and runner is None:
        raise ConfigError("--against was given without --run", hint="add the engine, such as --run onnxruntime")
    quiet_transformers()
    with ProgressDisplay(silent=quiet, log=log_json) as display:
        verification = verify(path, quick=quick, trust_remote_code=trust_remote_code, on_event=display)
        agreement = None
        if runner is not None and verification.intact:
            from llmq.engines.agreement import compare

            agreement = compare(
                hub.locate(path, None, remote_code=trust_remote_code), runner, python=engine_python,
                limit=max_difference, device=device, against=None if against is None else Path(against),
                remote_code=trust_remote_code, on_event=display,
            )  # fmt: skip
    if json:
        print_json({**verification.to_dict(), "run": None if agreement is None else agreement.to_dict()})
    elif verification.intact:
        if verification.integrity is not None:
            _print_integrity(verification.integrity)
        print_serving(verification.verdicts)
        print_findings(verification.findings)
        if agreement is not None:
            _print_agreement(agreement)
    print_notes(verification.integrity.notes if verification.integrity is not None else ())
    verification.require_intact()
    _require_served(path, requested, verification.verdicts)
    if agreement is not None:
        agreement.require(path)


def _runner(name: str) -> "Engine":
    """The engine of --run; raises ConfigError for a name that is none."""
    from llmq.engines.agreement import COMPARED

    for engine in COMPARED:
        if engine.name == name.lower():
            return engine
    known = ", ".join(engine.name for engine in COMPARED)
    raise ConfigError(f"--run is {name!r}, expected one of {known}", hint="llmq starts these engines itself")


def _print_agreement(agreement: "Agreement") -> None:
    rows = [
        ("computed in", agreement.dtype),
        ("positions of prompts", str(agreement.positions)),
        ("largest difference", f"{agreement.largest:.2g} nats, the limit is {agreement.limit:g}"),
        ("mean difference", f"{agreement.mean:.2g} nats"),
        ("same most likely token", f"{agreement.same_top:.1%}"),
        ("tokens of the prompts", "the same" if agreement.tokenized else "different"),
    ]
    print_table(f"log-probabilities of {agreement.engine} compared with those of llmq", ("", ""), rows)


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
    if match is None or not (size or "1").isdecimal() or not int(size or 1):
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
