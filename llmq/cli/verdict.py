"""What `llmq quantize` prints about the quality of the finished model, the limit for it, and what to do next."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from llmq.cli.evaluation_tables import number
from llmq.cli.streams import print_text
from llmq.cli.terminal import print_notes, print_table
from llmq.config import QuantConfig
from llmq.errors import ConfigError, QualityError

if TYPE_CHECKING:
    from llmq.report.verdict import Verdict


def require_measurable(settings: QuantConfig, max_kl: float | None) -> None:
    """Raise ConfigError for a limit on the KL divergence of a run that will not measure it."""
    if max_kl is None:
        return
    if not settings.calibration.held_back:
        raise ConfigError("--max-kl needs text to measure the KL divergence on", hint="add --validate 8")
    if not settings.stages.needs_calibration and not settings.calibration.sources:
        raise ConfigError("--max-kl needs text to measure the KL divergence on", hint="add --calibration FILE")


def require(verdict: "Verdict | None", max_kl: float | None, out: Path) -> None:
    """Raise QualityError if the KL divergence is above the limit, or if it was not measured."""
    if max_kl is None:
        return
    hint = f"the finished model is kept in {out}; use more bits, smaller groups or a better method, or raise the limit"
    if verdict is None or verdict.kl is None:
        reason = "it was turned off" if verdict is None else verdict.sentence
        raise QualityError(f"--max-kl cannot be checked: {reason}", hint=f"the finished model is kept in {out}")
    if not verdict.kl <= max_kl:
        raise QualityError(f"the mean KL divergence is {verdict.kl:.5f}, the limit is {max_kl:g}", hint=hint)


def print_verdict(verdict: "Verdict | None") -> None:
    """Print the figures on stdout, and the sentence."""
    if verdict is None:
        print_text("the quality was not measured: --validate is 0, or there are fewer than 16 calibration sequences")
        return
    if verdict.kl is not None:
        rows = [
            ("KL mean", number(verdict.kl, ".5f", verdict.kl_interval), number(verdict.kl_rtn, ".5f"), "0"),
            ("same top-1", number(verdict.same_top1, ".2%"), number(verdict.same_top1_rtn, ".2%"), "100%"),
            ("perplexity", number(verdict.perplexity, ".4f"), "-", number(verdict.perplexity_float, ".4f")),
        ]
        print_table(f"quality on {verdict.text}", ("", "quantized", "round to nearest", "original"), rows)
    print_notes(verdict.notes)
    print_text(verdict.sentence)


def next_command(folder: Path, layout: str, *, vllm: bool) -> str:
    """A command that runs the finished model in `folder`."""
    prompt = "Once upon a time"
    if layout.startswith("gguf"):
        run = ["llama-cli", "-m", *map(str, sorted(folder.glob("*.gguf"))), "-p", prompt]
    elif layout == "mlx":
        run = ["mlx_lm.generate", "--model", str(folder), "--prompt", prompt]
    else:
        run = ["vllm", "serve", str(folder)] if vllm else ["llmq", "generate", str(folder), "-p", prompt]
    return shlex.join(run)
