"""Will it load, in which engine, on how many GPUs, and if not, why not: said before hours are spent, and after.

`rules.py` is the table; `checkpoint_facts.py` what the rules look at; `tensor_parallel.py` what engines cut and fuse.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmq.verify.engines import checkpoint_facts, tensor_parallel
from llmq.verify.engines.checkpoint_facts import Linear, Subject
from llmq.verify.engines.conditions import runs_marlin
from llmq.verify.engines.rules import ENGINES, IN_THE_WAY, REFUSES, RULES, SERVERS, SGLANG, UNKNOWN

__all__ = ["ENGINES", "Finding", "Linear", "Subject", "Verdict", "check", "judge", "verdicts"]

SHOWN = 3  # texts of one rule
PARALLEL = (
    "tensor parallelism",
    "whole heads, groups and words on each GPU",
    "fewer GPUs, smaller groups, or pipeline parallelism",
    "vLLM 0.33, auto_gptq.py; vllm#13640: `The input size is not aligned with the quantized weight shape`",
)
TILES = (
    "tiles of each part",
    "N a multiple of 64 and K of 128, or of 128 and 64, on each GPU",
    "--quantization gptq or awq takes the plain kernel, which compressed-tensors has not",
    "SGLang 0.5.23, marlin_utils.py, verify_marlin_supports_shape: nothing is padded there",
)


@dataclass(frozen=True)
class Finding:
    """What one rule has against a checkpoint.

    outcome  refuses, wrong (it loads, and computes something else), unknown (whether it loads), slower, or note
    found    one text for each thing that is against it
    gpus     the sizes of tensor parallelism that it is about; empty for all
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
        """Whether it keeps the engine from serving the model at all."""
        return self.outcome in IN_THE_WAY and not self.gpus

    @property
    def text(self) -> str:
        """Everything but the engine's name."""
        more = f" (and {len(self.found) - SHOWN} more)" if len(self.found) > SHOWN else ""
        plural = "" if self.gpus == (1,) else "s"
        on = f"on {' or '.join(map(str, self.gpus))} GPU{plural}, " if self.gpus else ""
        remedy = f"; {self.remedy}" if self.remedy else ""
        return f"{on}{self.outcome}: {'; '.join(self.found[:SHOWN])}{more}{remedy}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Verdict:
    """An engine on a checkpoint: whether it serves it, on how many GPUs each, and what is to be known.

    loads  None where llmq does not know
    gpus   empty unless it loads
    """

    engine: str
    loads: bool | None
    gpus: tuple[int, ...]
    findings: tuple[Finding, ...]


def check(model: str | Path) -> list[Finding]:
    """What the engines have against the model in a folder, or a .gguf file.

    Raises CheckpointError and FormatError for a broken one.
    """
    return judge(checkpoint_facts.read(Path(model)))


def judge(found: Subject) -> list[Finding]:
    """The same of a model that is described, and may not be there yet."""
    findings = []
    for rule in RULES:
        if texts := tuple(rule.question(found)):
            findings += [
                Finding(engine, rule.name, rule.outcome, rule.asks, texts, rule.advice(found), rule.source)
                for engine in rule.engines
            ]
    return findings + _not_spread(found)


def verdicts(findings: Iterable[Finding]) -> list[Verdict]:
    """By engine."""
    listed = list(findings)
    found = []
    for engine in ENGINES:
        own = tuple(finding for finding in listed if finding.engine == engine)
        blocked = {size for finding in own for size in finding.gpus}
        sizes = [size for size in tensor_parallel.SIZES if size not in blocked] if engine in SERVERS else [1]
        loads: bool | None = bool(sizes) and not any(finding.in_the_way for finding in own)
        if loads and any(finding.outcome == UNKNOWN for finding in own):
            loads = None
        found.append(Verdict(engine, loads, tuple(sizes) if loads else (), own))
    return found


def _not_spread(found: Subject) -> list[Finding]:
    """On how many GPUs it cannot be, those with the same reason together."""
    findings = []
    for engine in SERVERS:
        reasons: dict[tuple[str, ...], list[int]] = {}
        tiles: dict[tuple[str, ...], list[int]] = {}
        for size in tensor_parallel.SIZES:
            gguf = ("llmq does not know how blocks of GGUF are cut",) if found.method == "gguf" and size > 1 else ()
            if texts := gguf or tuple(tensor_parallel.obstacles(found, size)):
                reasons.setdefault(texts, []).append(size)
            elif engine == SGLANG and runs_marlin(found) and (off := tuple(tensor_parallel.off_tiles(found, size))):
                tiles.setdefault(off, []).append(size)
        rules = ((reasons, PARALLEL), (tiles, TILES))
        findings += [
            Finding(engine, name, REFUSES, asks, texts, remedy, source, tuple(sizes))
            for told, (name, asks, remedy, source) in rules
            for texts, sizes in told.items()
        ]
    return findings
