"""Sizes and costs from the configuration alone, compared with what a run writes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmq import cost, forecast
from llmq import quantize as quantize_model
from llmq.checkpoint import hub
from llmq.checkpoint.reader import Checkpoint
from llmq.config import QuantConfig
from llmq.cost.work import Kind
from llmq.errors import ConfigError
from llmq.numerics.scheme import WeightScheme
from llmq.runtime.load import load_model
from llmq.runtime.packed_linear import PackedRows
from llmq.setting_fields import merged
from llmq_kernels.w4a16 import int8_inputs, small_batches
from tests import builders, mixtures
from tests.command_line import llmq
from tests.runs import quantize

Checkpoints = Callable[..., Path]
SETTINGS = merged(QuantConfig(), {"method": "rtn", "group_size": 16, "samples": 4, "seqlen": 32})
MACHINE = cost.Machine("cpu", dict.fromkeys(Kind, 1e9), 1 << 34, 1 << 34, 1 << 28)


def configuration_of(checkpoint: Path, folder: Path) -> Path:
    """A folder with the configuration of a checkpoint, and without its weights."""
    folder.mkdir()
    shutil.copy(checkpoint / "config.json", folder)
    return folder


def read(model: Path) -> forecast.Configured:
    return forecast.Configured.read(str(model), 32, "cpu")


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_size_of_weights_is_that_of_the_files(tmp_path: Path, name: str) -> None:
    config = mixtures.mixtral() if name == "mixtral" else builders.llama()
    model = builders.save_model(tmp_path / "model", builders.causal_model(config))
    plan = forecast.forecast(
        read(configuration_of(model, tmp_path / "config")), SETTINGS, machine=MACHINE, methods=("rtn",)
    )
    quantize(model, tmp_path / "out", tmp_path, method="rtn", calibration=None)
    written = Checkpoint.open(tmp_path / "out").nbytes
    (size,) = (size for size in plan.sizes if size.format == "compressed-tensors")
    assert size.nbytes == pytest.approx(written, rel=0.05)
    assert plan.stored_bytes == Checkpoint.open(model).nbytes
    assert (plan.parameters.experts > 0) == (name == "mixtral")


@pytest.mark.parametrize(
    "change", [{"group_size": 32}, {"bits": 8, "group_size": "channel"}, {"preset": "w4a8", "group_size": 32}], ids=str
)
def test_the_second_copy_on_a_cpu_is_counted(
    change: dict[str, Any], checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(small_batches.VARIABLE, "on")
    if not small_batches.choose(4).rows or not int8_inputs.choose().rows:
        pytest.skip(int8_inputs.describe())
    model = checkpoint("llama", hidden_size=64, intermediate_size=128)
    settings = merged(QuantConfig(), {"method": "rtn", **change})
    plan = forecast.forecast(read(model), settings, machine=MACHINE, methods=("rtn",))
    quantize_model(model, tmp_path / "out", method="rtn", device="cpu", **change)
    layers = [module for module in load_model(tmp_path / "out").modules() if isinstance(module, PackedRows)]
    copies = [copy for layer in layers for copy in (layer.cpu_words, layer.cpu_grid) if copy is not None]
    assert plan.cpu_copy_bytes == sum(copy.nbytes for copy in copies) > 0
    in_llama_cpp = merged(SETTINGS, {"group_size": 32, "format": "gguf"})
    assert forecast.forecast(read(model), in_llama_cpp, machine=MACHINE, methods=("rtn",)).cpu_copy_bytes == 0


def test_blocks_of_a_gguf_file_are_counted(checkpoint: Checkpoints) -> None:
    """32 weights and a scale take 18 bytes."""
    model = read(checkpoint("llama", hidden_size=64, intermediate_size=96))
    plan = forecast.forecast(model, merged(SETTINGS, {"group_size": 32}), machine=MACHINE, methods=("rtn",))
    assert {size.format: size.bits for size in plan.sizes}["gguf"] == 4.5


def test_layers_that_differ_only_in_numbers_are_one_row(checkpoint: Checkpoints) -> None:
    plan = forecast.forecast(read(checkpoint("llama")), SETTINGS, machine=MACHINE, methods=("rtn", "gptq"))
    names = [kind.name for kind in plan.layers]
    assert len(names) == len(set(names)) == 7 and {kind.number for kind in plan.layers} == {3}
    rtn, gptq = plan.costs
    assert 0 < rtn.seconds < gptq.seconds and 0 < rtn.host_bytes < gptq.host_bytes


def test_a_format_that_refuses_the_grid_says_why(checkpoint: Checkpoints) -> None:
    three_bits = merged(SETTINGS, {"bits": 3})
    plan = forecast.forecast(read(checkpoint("llama")), three_bits, machine=MACHINE, methods=("rtn",))
    assert "4 bits only" in {size.format: size.refusal for size in plan.sizes}["awq"]


def test_formats_with_several_grids_cost_several_runs(checkpoint: Checkpoints) -> None:
    model = read(checkpoint("llama"))

    def plan(formats: str) -> forecast.Forecast:
        return forecast.forecast(
            model, merged(SETTINGS, {"format": formats, "group_size": 32}), machine=MACHINE, methods=("rtn",)
        )

    both, first = plan("compressed-tensors,mlx,gguf:q4_k_m"), plan("compressed-tensors,mlx")
    assert both.costs[0].seconds > first.costs[0].seconds and both.costs[0].disk_bytes > first.costs[0].disk_bytes
    assert {layer.grid for layer in both.layers} > {layer.grid for layer in first.layers}
    assert {layer.formats for layer in both.layers} == {("compressed-tensors", "mlx"), ("gguf:q4_k_m",)}
    assert not {size.format: size.refusal for size in both.sizes}["gguf:q4_k_m"]


def test_fit_takes_the_largest_grid(checkpoint: Checkpoints) -> None:
    model = read(checkpoint("llama"))
    sizes = {}
    for memory in (10**9, 10**9 // 2):
        sizes[memory] = forecast.fit(model, SETTINGS, memory, 10)
    assert {fitting.settings.scheme.bits for fitting in sizes.values()} == {8}
    whole = next(iter(sizes.values()))
    tight = int((whole.weight_bytes + whole.cache_bytes - 1) / 0.9)
    smaller = forecast.fit(model, SETTINGS, tight, 10)
    assert smaller.settings.scheme.bits == 4
    assert smaller.weight_bytes + smaller.cache_bytes <= 0.9 * tight
    assert forecast.fit(model, merged(SETTINGS, {"format": "gguf:q4_k_m"}), 10**9, 10).flags.startswith(
        "--format gguf:"
    )


def test_fit_refuses_a_preset_that_names_a_grid(checkpoint: Checkpoints) -> None:
    model, inputs = read(checkpoint("llama")), {"scheme": WeightScheme(8, "channel"), "activations": "int8"}
    with pytest.raises(ConfigError, match="--preset w8a8 stands for them"):
        forecast.fit(model, SETTINGS.replace(**inputs, preset="w8a8"), 10**9, 10)
    assert forecast.fit(model, SETTINGS.replace(**inputs), 10**9, 10).flags.startswith("--bits 8 --group-size channel")


def test_what_never_fits_is_an_error_with_a_way_out(checkpoint: Checkpoints) -> None:
    model = read(checkpoint("llama"))
    with pytest.raises(ConfigError, match="does not fit into") as caught:
        forecast.fit(model, SETTINGS, 100_000, 128)
    assert caught.value.hint.startswith("lower --context to ")
    with pytest.raises(ConfigError, match="does not fit into") as caught:
        forecast.fit(model, SETTINGS, 1000, 10)
    assert "more memory" in caught.value.hint


def test_the_context_is_at_most_that_of_the_model(checkpoint: Checkpoints) -> None:
    model = read(checkpoint("llama"))
    assert forecast.fit(model, SETTINGS, 10**9).context == 128
    with pytest.raises(ConfigError, match=r"129 tokens, but .* at most 128") as caught:
        forecast.fit(model, SETTINGS, 10**9, 129)
    assert caught.value.hint == "use --context 128"


def test_only_configuration_files_come_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    patterns: list[str] = []
    monkeypatch.setattr(hub, "_download", lambda model, revision, wanted: patterns.extend(wanted) or Path(model))
    hub.locate("owner/name", weights=False)
    assert patterns == ["*.json", "*.jinja"]


def test_command_prints_tables_and_json(checkpoint: Checkpoints, tmp_path: Path) -> None:
    config = configuration_of(checkpoint("llama"), tmp_path / "config")
    done = llmq(
        "plan", str(config), "--group-size", "32", "--seqlen", "32", "--fit", "1GB", "--context", "128", "--json"
    )
    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["architecture"] == "LlamaForCausalLM"
    assert document["fit"] == "--bits 8 --group-size 128 --format compressed-tensors"
    assert [entry["method"] for entry in document["costs"]] == ["rtn", "gptq", "awq", "fast", "balanced", "best"]


@pytest.mark.parametrize("amount", ["much", "24", "0GB"])
def test_memory_is_a_number_with_a_unit(amount: str, checkpoint: Checkpoints) -> None:
    done = llmq("plan", str(checkpoint("llama")), "--fit", amount)
    assert done.exit_code == 2 and "24GB" in done.stderr


def test_a_trial_corrects_times_and_memory(checkpoint: Checkpoints) -> None:
    model = checkpoint("llama")
    settings = merged(SETTINGS, {"method": "awq"})
    trial = forecast.try_block(str(model), settings, device="cpu")
    assert trial.seconds > 0 and {"transforms", "streams", "rounding"} <= trial.ratios.keys()
    plain, corrected = (
        forecast.forecast(read(model), settings, machine=trial.machine, methods=("awq",), trial=given).costs[0]
        for given in (None, trial)
    )
    assert corrected.seconds != plain.seconds
    assert corrected.host_bytes == pytest.approx(plain.host_bytes + trial.nbytes)
    assert "one block took" in str(trial)
