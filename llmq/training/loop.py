"""The steps of a training, on accelerate: several processes, mixed precision, gradient accumulation, checkpoints.

Each step draws its sequences by its number and the seed (`kl_tuning.drawn`), so a training that continues from a
checkpoint computes the same values as one that was never interrupted. The rates rise over ten steps and then fall
linearly to zero (transformers' schedule).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from llmq.algorithms.kl_divergence import kl_and_gradient
from llmq.algorithms.kl_tuning import WARM_UP, drawn
from llmq.errors import ConfigError, listed
from llmq.report.events import OnEvent
from llmq.report.record import TuningStep
from llmq.report.training import Losses
from llmq.training.prepare import origin_of
from llmq.training.settings import TrainingSettings
from llmq.training.state import States
from llmq.training.text import TrainingText
from llmq_kernels.tuning_step.rates import EPSILON, MEAN_DECAY, SQUARE_DECAY

NORM_PART = 0.3  # of the learning rate, for norms: the prototype was worse with more


def accelerator_for(settings: TrainingSettings, device: torch.device, tracker: str | None, folder: Path) -> Any:
    """accelerate's view of the processes and the device; `folder` is for the files of the tracker."""
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    chosen = settings.mixed_precision
    if chosen == "auto":
        chosen = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "no"
    return Accelerator(
        cpu=device.type == "cpu", mixed_precision=chosen, gradient_accumulation_steps=settings.accumulate,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],  # they never change
        step_scheduler_with_optimizer=False, log_with=tracker, project_dir=folder if tracker else None,
    )  # fmt: skip


def require_tracker(name: str) -> None:
    """Raise ConfigError for a tracker that accelerate does not know, or whose package is not installed."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    if name not in LOGGER_TYPE_TO_CLASS:
        raise ConfigError(f"unknown tracker: {name!r}", hint=f"known are {listed(sorted(LOGGER_TYPE_TO_CLASS))}")
    if name not in map(str, get_available_trackers()):
        raise ConfigError(f"the package of the tracker {name} is not installed", hint=f"pip install {name}")


class Loop:
    """One training: `run` does the steps that are left, and returns the losses of all validations."""

    def __init__(
        self,
        accelerator: Any,
        student: nn.Module,
        teacher: nn.Module | None,
        text: TrainingText,
        settings: TrainingSettings,
        states: States,
        on_event: OnEvent,
    ) -> None:
        """`student` is a prepared model; `teacher` is the float model, None for the loss cross-entropy."""
        from transformers import get_scheduler

        optimizer = torch.optim.AdamW(
            _groups(student, settings.learning_rate), betas=(MEAN_DECAY, SQUARE_DECAY), eps=EPSILON,
            weight_decay=0.0,
        )  # fmt: skip
        warm_up = min(WARM_UP, settings.steps // 2)
        schedule = get_scheduler("linear", optimizer, num_warmup_steps=warm_up, num_training_steps=settings.steps)
        student.train(settings.activation_checkpointing)  # transformers recomputes activations in this mode only
        if settings.activation_checkpointing:
            getattr(student, "activation_checkpointing_enable", student.gradient_checkpointing_enable)()  # type: ignore[operator]
        self._accelerator, self._settings, self._text = accelerator, settings, text
        self._student, self._optimizer, self._schedule = accelerator.prepare(student, optimizer, schedule)
        self._teacher = None if teacher is None else teacher.to(accelerator.device).eval().requires_grad_(False)
        self._states, self._on_event = states, on_event

    def run(self) -> list[Losses]:
        """Train until the last step."""
        settings, recent = self._settings, list[float]()
        first, history = self._states.restore(self._accelerator)
        if not history:
            history.append(Losses(0, None, self.held_out_loss()))
        self._on_event(TuningStep(first, settings.steps, None, history[-1].held_out))
        for step in range(first, settings.steps):
            recent.append(self._step(step))
            done = step + 1
            if done % settings.every and done < settings.steps:
                self._on_event(TuningStep(done, settings.steps, recent[-1]))
                continue
            history.append(Losses(done, sum(recent) / len(recent), self.held_out_loss()))
            recent = []
            self._accelerator.log({"loss": history[-1].training, "held_out": history[-1].held_out}, step=done)
            self._states.save(self._accelerator, done, history)
            self._on_event(TuningStep(done, settings.steps, history[-1].training, history[-1].held_out))
        self._accelerator.end_training()
        return history

    def _step(self, step: int) -> float:
        """One step of the optimizer; the mean loss of its sequences."""
        accelerator, settings = self._accelerator, self._settings
        indices = drawn(step, settings.batch_size, len(self._text.windows), settings.seed)
        own = indices[accelerator.process_index :: accelerator.num_processes]
        total = torch.zeros((), device=accelerator.device)
        for part in _split(own, settings.accumulate):
            with accelerator.accumulate(self._student):
                loss = self._loss(self._text.windows[part].to(accelerator.device))
                accelerator.backward(loss)
                self._optimizer.step()
                if accelerator.sync_gradients:
                    self._schedule.step()
                self._optimizer.zero_grad()
            total += loss.detach() / settings.accumulate
        return float(accelerator.reduce(total, "mean"))

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """The mean loss on the held-out text; its sequences are divided among the processes."""
        accelerator, windows = self._accelerator, self._text.held_out
        self._student.eval()  # without dropout
        own = windows[accelerator.process_index :: accelerator.num_processes]
        sums = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
        for batch in own.split(max(1, self._settings.batch_size // accelerator.num_processes)):
            loss = self._loss(batch.to(accelerator.device))
            sums += torch.stack([loss.double() * len(batch), torch.tensor(len(batch), device=loss.device)])
        self._student.train(self._settings.activation_checkpointing)
        total, count = accelerator.reduce(sums, "sum").tolist()
        return float(total / count)

    def _loss(self, tokens: Tensor) -> Tensor:
        """The mean loss per token of `tokens` (B, T) int64."""
        with self._accelerator.autocast():
            logits = self._student(input_ids=tokens, use_cache=False).logits  # (B, T, V)
            if self._teacher is None:
                return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
            with torch.no_grad():
                target = self._teacher(input_ids=tokens, use_cache=False).logits
        loss: Tensor = _Divergence.apply(logits, target)  # type: ignore[no-untyped-call]
        return loss


class _Divergence(torch.autograd.Function):
    """The mean KL(teacher ‖ student) per token, from the student's logits (B, T, V) and the teacher's, of any dtype."""

    @staticmethod
    def forward(context: Any, logits: Tensor, target: Tensor) -> Tensor:
        kl, gradient = kl_and_gradient(target, logits)
        context.save_for_backward(gradient.div_(kl.numel()).to(logits.dtype))
        return kl.mean()

    @staticmethod
    def backward(context: Any, outer: Tensor) -> tuple[Tensor, None]:
        (gradient,) = context.saved_tensors
        return gradient * outer.to(gradient.dtype), None


def _groups(student: nn.Module, rate: float) -> list[dict[str, Any]]:
    """The trained parameters, and the learning rates of both groups."""
    norms = origin_of(student).norms
    named = {name: parameter for name, parameter in student.named_parameters() if parameter.requires_grad}
    groups = [
        {"params": [parameter for name, parameter in named.items() if name not in norms], "lr": rate},
        {"params": [named[name] for name in norms], "lr": rate * NORM_PART},
    ]
    return [group for group in groups if group["params"]]


def _split(indices: list[int], parts: int) -> Iterator[list[int]]:
    size = len(indices) // parts
    return (indices[start : start + size] for start in range(0, len(indices), size))
