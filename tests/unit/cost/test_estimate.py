"""Estimates from configurations alone: stages follow the method, memory does not grow with blocks, ranks share work."""

import functools
from dataclasses import replace

import pytest
import torch

from llmq import cost, formats
from llmq.config import QuantConfig
from llmq.cost import passes, peaks, verdict
from llmq.cost.files import packed_bytes
from llmq.evaluation import runs, trajectories
from llmq.export import verdict as measured
from llmq.methods import METHODS, Tuning
from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq.numerics.scheme import WeightScheme
from llmq.report import events
from llmq.steps import kl_loss
from llmq.steps.end_to_end import memory_plan, session
from tests import builders, mixtures

LENGTH = 24
ONE = dict.fromkeys(cost.Kind, 1.0)
MACHINE = cost.Machine("cpu", ONE, 1 << 40, 1 << 40, 0)
SETTINGS = QuantConfig(
    method="fast",
    scheme={"group_size": 16},
    calibration={"samples": 8, "seqlen": LENGTH},  # type: ignore[arg-type]
)


@functools.cache
def llama(blocks: int = 2) -> cost.Outline:
    return cost.observe(cost.skeleton_of(builders.llama(num_hidden_layers=blocks)), LENGTH)


def test_stages_follow_the_fields_of_the_method() -> None:
    outline, tuning = llama(), Tuning(steps=10, scales=1e-3, rounding=1e-3, tokens=LENGTH)

    def names(**changes: object) -> set[str]:
        stages = replace(METHODS["gptq"], validation=0.1, **changes)  # type: ignore[arg-type]
        return {s.name for s in cost.estimate(outline, SETTINGS, MACHINE, stages=stages).stages if s.work.flops}

    plain = names()
    assert plain == {
        "float model",
        "streams",
        "statistics",
        "factorization",
        "guards",
        "report",
    }  # K is below a block of columns
    assert names(token_weights=True) - plain == {"Fisher information"}
    assert names(block_tuning=replace(tuning, fisher=True)) - plain == {"Fisher information", "block tuning"}
    assert names(tuning=tuning, written=2) - plain == {"end-to-end tuning", "self-written text"}


@pytest.mark.parametrize("bits", [3, 5, 8])
def test_a_file_for_llama_cpp_may_have_any_bits(bits: int) -> None:
    settings = SETTINGS.replace(format="gguf", scheme=WeightScheme(bits, 16))
    assert cost.estimate(llama(), settings, MACHINE).file_bytes > 0


def test_tuning_of_the_whole_model_needs_text_and_memory() -> None:
    outline = llama()
    weights = sum(layer.weights for block in outline.blocks for layer in block.layers)
    tokens = (8 - 1) * LENGTH  # of 8 sequences one is for validation

    def peak(needed: float = 0.0, machine: cost.Machine = MACHINE) -> cost.Peak | None:
        tuning = Tuning(steps=10, scales=1e-3, rounding=1e-3, tokens=LENGTH, tokens_per_weight=needed)
        estimate = cost.estimate(outline, SETTINGS, machine, stages=replace(METHODS["fast"], tuning=tuning))
        return next((peak for peak in estimate.peaks if peak.stage == "end-to-end tuning"), None)

    assert peak(1.01 * tokens / weights) is None
    assert peak(machine=replace(MACHINE, free_device=12 * weights - 1)) is None
    enough, little = peak(tokens / weights), peak(machine=replace(MACHINE, free_host=1))
    assert enough is not None and little is not None
    assert enough.device["state"] == 12 * weights / 16 + 6 * weights
    assert little.host["packed blocks"] < enough.host["packed blocks"]  # one block at a time is read


def test_the_constants_are_those_of_the_code() -> None:
    assert peaks.LOGITS_AT_ONCE == kl_loss.LOGITS_AT_ONCE
    assert passes.VALIDATIONS == session.VALIDATIONS
    assert (peaks.ROUNDING_BYTES, peaks.SCALE_BYTES) == (memory_plan.ROUNDING_BYTES, memory_plan.SCALE_BYTES)
    assert (peaks.MEMORY_SHARE, peaks.REVISIONS) == (memory_plan.MEMORY_SHARE, memory_plan.REVISIONS)


@pytest.mark.parametrize("method", ["rtn", "gptq", "fast"])
def test_the_peak_does_not_depend_on_the_number_of_blocks(method: str) -> None:
    settings = SETTINGS.model_copy(update={"method": method})
    estimates = [cost.estimate(llama(blocks), settings, MACHINE) for blocks in (2, 5)]
    assert estimates[0].host_bytes == estimates[1].host_bytes
    assert estimates[1].seconds > 2 * estimates[0].seconds


def test_half_precision_on_a_gpu_is_counted_separately() -> None:
    skeleton = cost.skeleton_of(builders.llama(), dtype=torch.bfloat16)
    estimate = cost.estimate(skeleton, SETTINGS, replace(MACHINE, device="cuda"))
    assert estimate["streams"].work[cost.Kind.HALF] > 0
    assert estimate["statistics"].work[cost.Kind.FLOAT32] == 0
    assert estimate["guards"].work[cost.Kind.HALF] == 0
    assert 0 < estimate.host_bytes < estimate.device_bytes


def test_smoothing_is_counted_where_inputs_are_in_int8() -> None:
    def trials(activations: str, bits: int) -> cost.Work:
        settings = SETTINGS.replace(scheme=WeightScheme(bits, "channel"), activations=activations)
        stages = cost.estimate(llama(), settings, MACHINE).stages
        return next((stage.work for stage in stages if stage.name == "transforms"), cost.Work())

    assert trials("none", 8).flops == trials("fp8", 8).flops == 0 < trials("int8", 8).flops
    assert trials("int8", 8)[cost.Kind.SEARCHED] == 0 < trials("int8", 4)[cost.Kind.SEARCHED]


def test_experts_are_counted_by_the_share_of_tokens_that_reach_them() -> None:
    outline = cost.observe(cost.skeleton_of(mixtures.mixtral()), LENGTH)
    experts = [layer for layer in outline.blocks[0].layers if ".experts." in layer.name]
    assert {layer.share for layer in experts} == {2 / mixtures.EXPERTS}
    products = sum(2 * LENGTH * layer.share * layer.weights for layer in outline.blocks[0].layers)
    attention = outline.blocks[0].forward.flops - products
    assert attention > 0
    estimate = cost.estimate(outline, SETTINGS, MACHINE)
    assert len(outline.blocks[0].groups) == 2 + 2 * mixtures.EXPERTS
    assert estimate.file_bytes > 0


def test_ranks_share_the_work_and_send_sums() -> None:
    alone, shared = (cost.estimate(llama(), SETTINGS, MACHINE, ranks=ranks) for ranks in (1, 2))
    assert shared["streams"].work.flops == alone["streams"].work.flops / 2
    assert shared["statistics"].work[cost.Kind.SENT] > 0 == alone["statistics"].work[cost.Kind.SENT]


def test_a_trial_corrects_the_seconds() -> None:
    outline = llama()
    corrected = MACHINE.corrected(predicted=2.0, measured=3.0)
    assert cost.estimate(outline, SETTINGS, corrected).seconds == pytest.approx(
        1.5 * cost.estimate(outline, SETTINGS, MACHINE).seconds
    )


def test_the_table_names_every_stage() -> None:
    estimate = cost.estimate(llama(), SETTINGS, MACHINE)
    assert all(stage.name in estimate.table() for stage in estimate.stages)


def test_rates_are_measured_for_every_kind() -> None:
    machine = cost.measure("cpu")
    assert set(machine.rates) == set(cost.Kind)
    assert all(rate > 0 for rate in machine.rates.values())


@pytest.mark.parametrize("name", ["awq", "compressed-tensors", "gptq", "gptq_v2"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_size_of_a_packed_weight_is_exact(name: str, symmetric: bool) -> None:
    N, K, layout = 320, 64, formats.load(name)
    grid = WeightScheme(4, 32, symmetric)
    if layout.refusal(grid, N, K) is not None:
        return
    zeros = None if symmetric else torch.full((N, 2), 8, dtype=torch.int16)
    scales = torch.ones(N, 2, dtype=torch.float16)
    packed = layout.pack(QuantizedTensor(torch.zeros(N, K, dtype=torch.uint8), scales, zeros, grid))
    assert packed_bytes(layout, N, K, grid, torch.float16) == sum(tensor.nbytes for tensor in packed.values())


@pytest.mark.parametrize("N", [128, 256, 640])
def test_the_size_of_a_weight_in_blocks_of_fp8_is_exact(N: int) -> None:
    layout, grid = formats.load("compressed-tensors"), WeightScheme.of_floats("fp8-block")
    assert packed_bytes(layout, N, 256, grid, torch.bfloat16) == N * 256 + N // 128 * 2 * 2


def test_the_verdict_costs_as_much_as_its_text_and_its_models() -> None:
    outline, constants = llama(), (verdict.PROMPT, verdict.LENGTH, verdict.PROMPTS, verdict.SPARE_PART)
    assert constants == (trajectories.PROMPT, trajectories.LENGTH, measured.PROMPTS, runs.SPARE_PART)

    def seconds(method: str, validation: int, sources: tuple[str, ...] = ("text.txt",)) -> dict[str, float]:
        calibration = {"samples": 8, "seqlen": LENGTH, "validation": validation, "sources": sources}
        chosen = SETTINGS.model_copy(update={"method": method}).replace(calibration=calibration)
        stages = {stage.name: stage.seconds for stage in cost.estimate(outline, chosen, MACHINE).stages}
        return {name: stages[name] for name in stages if name.startswith(("evaluating", "scoring", "text continued"))}

    names = {*map(events.evaluating, (events.ORIGINAL, events.FINISHED)), events.SCORING, events.CONTINUING}
    assert seconds("gptq", 2).keys() == {*names, events.evaluating(events.NEAREST)}
    assert seconds("rtn", 2).keys() == names and not seconds("rtn", 2, ()) and not seconds("gptq", 0)
    assert seconds("gptq", 4)[events.SCORING] == pytest.approx(2 * seconds("gptq", 2)[events.SCORING], rel=0.1)


@pytest.mark.parametrize("method", METHODS)
def test_the_layers_of_a_block_take_no_longer_than_the_block(method: str) -> None:
    shares = cost.estimate(llama(), SETTINGS.model_copy(update={"method": method}), MACHINE).shares
    for path, seconds in shares.blocks.items():
        assert 0 < sum(of for name, of in shares.layers.items() if name.startswith(f"{path}.")) <= seconds * (1 + 1e-9)
