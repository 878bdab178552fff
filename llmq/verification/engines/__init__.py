"""Predict which engines load a model, on how many GPUs, and why not; before quantizing and after.

rules.py             the table of rules
conditions.py        the checks that the rules use
hints.py             remedies that depend on the model
checkpoint_facts.py  the facts that the rules check
planned_run.py       the same facts about a planned run
tensor_parallel.py   how engines split and fuse layers
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmq.verification.engines import checkpoint_facts, tensor_parallel
from llmq.verification.engines.checkpoint_facts import Linear, Subject
from llmq.verification.engines.conditions import runs_marlin
from llmq.verification.engines.rules import ENGINES, IN_THE_WAY, NO_GRAPH, REFUSES, RULES, SERVERS, SGLANG, UNKNOWN

__all__ = ["ENGINES", "Finding", "Linear", "Subject", "Verdict", "check", "judge", "verdicts"]

SHOWN = 3  # texts per rule
PARALLEL = (
    "tensor parallelism",
    "complete heads, groups and words on each GPU",
    "fewer GPUs, smaller groups, or pipeline parallelism",
    "vLLM 0.33, auto_gptq.py; vllm#13640: `The input size is not aligned with the quantized weight shape`",
)
TILES = (
    "tiles of each part",
    "N a multiple of 64 and K of 128, or N of 128 and K of 64, on each GPU",
    "--quantization gptq or awq uses the plain kernel, which compressed-tensors does not have",
    "SGLang 0.5.23, marlin_utils.py, verify_marlin_supports_shape: nothing is padded there",
)


@dataclass(frozen=True)
class Finding:
    """A rule that a checkpoint violates.

    outcome  refuses, wrong (loads, but computes wrong results), unknown (may not load), slower, or note
    found    one text per violation
    gpus     the sizes of tensor parallelism that are affected; empty for all
    """

    engine: str
    rule: str
    outcome: str
    asks: str
    found: tuple[str, ...]
    remedy: str
    source: str
    gpus: tuple[int, ...] = ()

    @property
    def in_the_way(self) -> bool:
        """Whether the engine cannot serve the model at all."""
        return self.outcome in IN_THE_WAY and not self.gpus

    @property
    def text(self) -> str:
        """The finding without the name of the engine."""
        more = f" (and {len(self.found) - SHOWN} more)" if len(self.found) > SHOWN else ""
        plural = "" if self.gpus == (1,) else "s"
        on = f"on {' or '.join(map(str, self.gpus))} GPU{plural}, " if self.gpus else ""
        remedy = f"; {self.remedy}" if self.remedy else ""
        return f"{on}{self.outcome}: {'; '.join(self.found[:SHOWN])}{more}{remedy}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Verdict:
    """Whether an engine loads a checkpoint, on how many GPUs, and all findings.

    loads  None if unknown
    gpus   empty unless it loads
    """

    engine: str
    loads: bool | None
    gpus: tuple[int, ...]
    findings: tuple[Finding, ...]


def check(model: str | Path) -> list[Finding]:
    """The findings about the model in a folder, or a .gguf file.

    Raises CheckpointError and FormatError for a broken model.
    """
    return judge(checkpoint_facts.read(Path(model)))


def judge(subject: Subject) -> list[Finding]:
    """The findings about a model that is described by `subject` and may not exist yet."""
    findings = []
    graph = subject.method == checkpoint_facts.ONNX  # nothing else matters then
    for rule in [NO_GRAPH] if graph else RULES:
        if texts := tuple(rule.question(subject)):
            findings += [
                Finding(engine, rule.name, rule.outcome, rule.asks, texts, rule.advice(subject), rule.source)
                for engine in rule.engines
            ]
    return findings if graph else findings + _parallel_findings(subject)


def verdicts(findings: Iterable[Finding]) -> list[Verdict]:
    """The verdict of each engine."""
    listed = list(findings)
    results = []
    for engine in ENGINES:
        own = tuple(finding for finding in listed if finding.engine == engine)
        blocked = {size for finding in own for size in finding.gpus}
        sizes = [size for size in tensor_parallel.SIZES if size not in blocked] if engine in SERVERS else [1]
        loads: bool | None = bool(sizes) and not any(finding.in_the_way for finding in own)
        if loads and any(finding.outcome == UNKNOWN for finding in own):
            loads = None
        results.append(Verdict(engine, loads, tuple(sizes) if loads else (), own))
    return results


def _parallel_findings(subject: Subject) -> list[Finding]:
    """The numbers of GPUs that do not work, grouped by reason."""
    findings = []
    for engine in SERVERS:
        reasons: dict[tuple[str, ...], list[int]] = {}
        tiles: dict[tuple[str, ...], list[int]] = {}
        for size in tensor_parallel.SIZES:
            gguf = ("llmq does not know how GGUF blocks are split",) if subject.method == "gguf" and size > 1 else ()
            if texts := gguf or tuple(tensor_parallel.obstacles(subject, size)):
                reasons.setdefault(texts, []).append(size)
            elif engine == SGLANG and runs_marlin(subject) and (off := tuple(tensor_parallel.off_tiles(subject, size))):
                tiles.setdefault(off, []).append(size)
        rules = ((reasons, PARALLEL), (tiles, TILES))
        findings += [
            Finding(engine, name, REFUSES, asks, texts, remedy, source, tuple(sizes))
            for by_reason, (name, asks, remedy, source) in rules
            for texts, sizes in by_reason.items()
        ]
    return findings
