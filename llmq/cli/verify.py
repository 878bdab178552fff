"""`llmq verify PATH`"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated

from typer import Option

from llmq.cli import options
from llmq.cli.progress import ProgressDisplay
from llmq.cli.streams import print_text
from llmq.cli.terminal import megabytes, print_json, print_loading, print_notes, print_table, quiet_transformers
from llmq.errors import CheckpointError, ConfigError, QualityError

if TYPE_CHECKING:
    from llmq.engines.agreement import Agreement
    from llmq.engines.processes import Engine
    from llmq.verify.engines import Finding, Verdict
    from llmq.verify.integrity import Integrity

SHOWN = 8  # problems per model

PANEL, ORDER = "Inspect", 2

Run = Annotated[
    str | None,
    options.choice(
        "--run",
        ("vllm", "llama.cpp", "transformers", "mlx"),
        "Start this engine, and compare its log-probabilities for a few prompts with those of llmq. Exit code 8 if "
        "they differ by more than --max-difference, or if it cuts the text into other tokens.",
    ),
]
MaxDifference = Annotated[
    float | None,
    Option(
        "--max-difference", min=0, metavar="NATS",
        help="The largest difference of a log-probability. Default: 0.01 in float32, 0.25 in 16 bits, 0.5 for "
        "llama.cpp, which rounds activations to 8 bits.",
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
    engine_python: options.EnginePython = None,
    max_difference: MaxDifference = None,
    device: options.Device = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
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

    Exit codes:
      0  success
      2  invalid options
      3  broken or unreadable model
      6  the engine given with --run is not installed, or fails
      8  an engine given with --for would not load it, or is unknown;
         an engine given with --run computes something else
    """
    from llmq.checkpoint import hub

    print_loading()
    from llmq.verify import engines as serving
    from llmq.verify.integrity import Integrity, examine

    requested = [_engine(name, serving.ENGINES) for name in for_ or ()]
    runner = None if run is None else _runner(run)
    quiet_transformers()
    model = hub.locate(path, None, remote_code=trust_remote_code)
    integrity = Integrity()
    if not quick:
        with ProgressDisplay() as display:
            integrity = examine(model, remote_code=trust_remote_code, on_event=display)
    findings = [] if integrity.problems else serving.check(model)
    verdicts = serving.verdicts(findings)
    agreement = None
    if runner is not None and not integrity.problems:
        from llmq.engines.agreement import compare

        with ProgressDisplay() as display:
            agreement = compare(
                model, runner, python=engine_python, limit=max_difference, device=device,
                remote_code=trust_remote_code, on_event=display,
            )  # fmt: skip
    if json:
        checked = None if quick else integrity.to_dict()
        engines = {v.engine: {"loads": v.loads, "gpus": v.gpus} for v in verdicts} if not integrity.problems else {}
        listed = [finding.to_dict() for finding in findings]
        ran = None if agreement is None else agreement.to_dict()
        print_json({"integrity": checked, "engines": engines, "findings": listed, "run": ran})
    elif not integrity.problems:
        if not quick:
            _print_integrity(integrity)
        print_serving(verdicts)
        print_findings(findings)
        if agreement is not None:
            _print_agreement(agreement)
    print_notes(integrity.notes)
    if integrity.problems:
        more = f" (and {len(integrity.problems) - SHOWN} more)" if len(integrity.problems) > SHOWN else ""
        raise CheckpointError(
            f"{path} is broken: {'; '.join(integrity.problems[:SHOWN])}{more}",
            hint="download or copy the files again; if you changed one, remove its line from checksums in llmq.json",
        )
    _require_served(path, requested, verdicts)
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
