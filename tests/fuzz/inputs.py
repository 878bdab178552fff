"""The inputs of each reader: undamaged ones, made once, and a damaged copy with the call that reads it."""

import json
import random
import shutil
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import llmq
from llmq.calibration.sources import read_source
from llmq.checkpoint.reader import Checkpoint
from llmq.config import QuantConfig
from llmq.errors import CheckpointError
from llmq.export.dequantize import dequantize
from llmq.gguf.container import Container
from llmq.job import Job
from llmq.model.build import module_tree
from llmq.numerics.scheme import WeightScheme
from llmq.setting_fields import read_toml
from llmq.verification.companions import problems
from llmq.verification.inspection import inspect
from llmq.verification.integrity import examine
from tests.fuzz import mutations
from tests.fuzz.attempts import Outcomes, limits, start_clock

Call = Callable[[], object]
SIZES = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}  # of the model
MANY_LAYERS = 64  # models with more, up to the limit of 512, rightly take a second
WEIGHTS, CONFIG, INDEX = "model.safetensors", "config.json", "model.safetensors.index.json"
FORMATS: Mapping[str, dict[str, Any]] = MappingProxyType(
    {
        "compressed-tensors": {"bits": 3, "symmetric": False},
        "gptq": {},
        "gptq_v2": {"symmetric": False},
        "awq": {"symmetric": False},
        "gguf": {"group_size": 32},
    }
)
TOML = """
method = "gptq"
format = ["gptq", "gguf"]
scales = "minmax"
damping = 0.01
skip = ["down_proj", "re:layers.0."]
seed = 3
[scheme]
bits = 4
group_size = 16
[calibration]
sources = ["text.txt"]
samples = 4
[[overrides]]
pattern = "*.up_proj"
bits = 8
group_size = "channel"
"""
VALUES = (
    "0", "-1", "nan", "inf", "1e400", "9" * 5000, "0x" + "f" * 5000, '""', '"x"', "[]", "{}", "true",
    "[" * 3000 + "]" * 3000, "1979-05-27", '"re:("', '["re:("]', '"\\u001b[31m"', '"\\ud800"', "{a = 1}", '[""]',
    "1_000", "[[1]]", '["gguf:q4_k", "gptq"]', "2", "1024", '"tensor"', "4.0", '["x", 1]',
)  # fmt: skip


class Originals:
    """Undamaged inputs.

    packed  one folder per format, and AutoRound's form of gptq
    fp8     a checkpoint of 8-bit floats
    """

    def __init__(self, model: Path, folder: Path) -> None:
        self.model = model
        self.packed: dict[str, Path] = {}
        for name, options in FORMATS.items():
            self.packed[name] = folder / name
            llmq.quantize(model, folder / name, method="rtn", format=name, **{"group_size": 16, **options})
        self.gguf = next(self.packed.pop("gguf").glob("*.gguf"))
        self.packed["auto-round"] = shutil.copytree(folder / "gptq", folder / "auto-round")
        config = json.loads((folder / "gptq" / CONFIG).read_text())
        config["quantization_config"] = {
            "quant_method": "auto-round", "bits": 4, "group_size": 16, "sym": True, "autoround_version": "0.5",
            "packing_format": "auto_round:auto_gptq", "extra_config": {"up_proj": {"bits": 4}},
            "modules_to_not_convert": ["lm_head"],
        }  # fmt: skip
        (folder / "auto-round" / CONFIG).write_text(json.dumps(config))
        self.fp8 = self._fp8(folder / "fp8")
        self.sharded = self._sharded(folder / "sharded")
        self.texts = self._texts(folder / "texts")

    def _fp8(self, folder: Path) -> Path:
        """down_proj as in DeepSeek's own checkpoints: E4M3 with one scale per 128 x 128 weights, here 1 x 2 of them."""
        shutil.copytree(self.model, folder)
        tensors, mlp, inner = load_file(folder / WEIGHTS), "model.layers.0.mlp", 256
        width = tensors["model.norm.weight"].numel()
        tensors |= {f"{mlp}.{name}_proj.weight": torch.ones(inner, width) for name in ("gate", "up")}
        tensors[f"{mlp}.down_proj.weight"] = torch.ones(width, inner).to(torch.float8_e4m3fn)
        tensors[f"{mlp}.down_proj.weight_scale_inv"] = torch.ones(1, inner // 128)
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})
        config = json.loads((folder / CONFIG).read_text()) | {"intermediate_size": inner}
        config["quantization_config"] = {
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
            "modules_to_not_convert": ["lm_head"],
        }  # fmt: skip
        (folder / CONFIG).write_text(json.dumps(config))
        _read_weights(folder)
        return folder

    def _sharded(self, folder: Path) -> Path:
        shutil.copytree(self.model, folder)
        tensors = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        weight_map = {}
        for number in (1, 2):
            file = f"model-0000{number}-of-00002.safetensors"
            part = dict(sorted(tensors.items())[number - 1 :: 2])
            save_file(part, folder / file, {"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
        return folder

    def _texts(self, folder: Path) -> list[Path]:
        import pyarrow
        import pyarrow.parquet

        folder.mkdir()
        rows = [{"text": f"row {number} of a text", "n": number} for number in range(20)]
        chats = [{"messages": [{"role": "user", "content": f"question {number}"},
                               {"role": "assistant", "content": "answer"}]} for number in range(10)]  # fmt: skip
        (folder / "a.txt").write_text("some text\n\nand more\n" * 20)
        for name, documents in (("rows", rows), ("chats", chats)):
            (folder / f"{name}.json").write_text(json.dumps(documents))
            (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, documents)))
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(documents), folder / f"{name}.parquet")
        return sorted(folder.iterdir())


def header(numbers: random.Random, originals: Originals, folder: Path) -> Call:
    """The header of a safetensors file with packed weights."""
    model = _copy(originals.packed[numbers.choice(sorted(originals.packed))], folder)
    _damage_header(numbers, model / WEIGHTS)
    return lambda: _read_weights(model)


def _damage_header(numbers: random.Random, file: Path) -> None:
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    document, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    if numbers.random() < 0.2:
        data = mutations.changed_bytes(numbers, data[: 8 + length]) + rest
    elif numbers.random() < 0.2:
        data = struct.pack("<Q", numbers.choice(mutations.INTEGERS) % 2**64) + data[8:]
    else:
        if numbers.random() < 0.5:
            _damage_tensor(numbers, document)
        else:
            document = mutations.changed_document(numbers, document)
        text = mutations.json_bytes(numbers, document)
        data = struct.pack("<Q", len(text)) + text + rest
    file.write_bytes(data)


def _damage_tensor(numbers: random.Random, document: dict[str, Any]) -> None:
    """Another dtype, shape or place for one tensor, so that the header remains consistent more often."""
    one, other = (document[numbers.choice([name for name in document if name != "__metadata__"])] for _ in range(2))
    kind = numbers.randrange(5)
    if kind == 0:
        dtypes = ("F32", "F16", "BF16", "I32", "I64", "U8", "I8", "BOOL", "F8_E4M3", "F4", "C64", "")
        one["dtype"] = numbers.choice(dtypes)
    elif kind == 1:
        one["shape"] = numbers.choice((one["shape"][::-1], [1, *one["shape"]], [0, *one["shape"]], [], other["shape"]))
    elif kind == 2:
        one["data_offsets"], other["data_offsets"] = other["data_offsets"], one["data_offsets"]
    elif kind == 3:
        one["data_offsets"] = other["data_offsets"]
    else:
        one["data_offsets"], one["shape"] = [one["data_offsets"][0]] * 2, [0, *one["shape"][1:]]


def fp8(numbers: random.Random, originals: Originals, folder: Path) -> Call:
    """A checkpoint of 8-bit floats with scales of blocks: its header, or the settings in config.json."""
    model = _copy(originals.fp8, folder)
    if numbers.random() < 0.6:
        _damage_header(numbers, model / WEIGHTS)
    else:
        _damage_quantization_config(numbers, model)
    return lambda: _read_weights(model)


def index(numbers: random.Random, originals: Originals, folder: Path) -> Call:
    """The index of a sharded model."""
    model = _copy(originals.sharded, folder)
    document = json.loads((model / INDEX).read_text())
    if numbers.random() < 0.3:
        name = numbers.choice(sorted(document["weight_map"]))
        document["weight_map"][name] = numbers.choice(
            ("../x.safetensors", "/x.safetensors", "C:/x.safetensors", "a/../../x.safetensors", "", ".", CONFIG, INDEX,
             "x" * 5000 + ".safetensors", "\ud800.safetensors", "model-00001-of-00002.safetensors\0")
        )  # fmt: skip
    else:
        document = mutations.changed_document(numbers, document)
    (model / INDEX).write_bytes(mutations.json_bytes(numbers, document))
    return lambda: inspect(model)


def quantization_config(numbers: random.Random, originals: Originals, folder: Path) -> Call:
    """The block of config.json that says how weights are packed."""
    model = _copy(originals.packed[numbers.choice(sorted(originals.packed))], folder)
    _damage_quantization_config(numbers, model)
    return lambda: _read_weights(model)


def _damage_quantization_config(numbers: random.Random, model: Path) -> None:
    config = json.loads((model / CONFIG).read_text())
    config["quantization_config"] = mutations.changed_document(numbers, config["quantization_config"])
    (model / CONFIG).write_bytes(mutations.json_bytes(numbers, config))


def config(numbers: random.Random, originals: Originals, folder: Path) -> Call:
    """config.json, from which transformers builds the model."""
    model = folder / "model"
    model.mkdir()
    document = mutations.changed_document(numbers, json.loads((originals.model / CONFIG).read_text()))
    if isinstance(document, dict) and document.get("num_hidden_layers") in range(MANY_LAYERS, 513):
        document["num_hidden_layers"] = MANY_LAYERS
    (model / CONFIG).write_bytes(mutations.json_bytes(numbers, document))
    shutil.copy(originals.model / WEIGHTS, model / WEIGHTS)

    def read() -> None:
        Checkpoint.open(model)
        module_tree.build(model, dtype=torch.float32, remote_code=False)

    return read


def gguf(numbers: random.Random, originals: Originals, folder: Path) -> Call:
    """A GGUF file; most changes are in its header, at numbers."""
    file = folder / "model.gguf"
    data = originals.gguf.read_bytes()
    end = data.index(b"blk.0.ffn_down.weight") + 200
    for _ in range(numbers.choice((1, 1, 2))):
        data = mutations.changed_bytes(numbers, data[:end]) + data[end:]
    file.write_bytes(data)

    def read() -> None:
        container = Container(file)
        for name in container.tensors:
            container.floats(name)
        for key in ("general.architecture", "tokenizer.ggml.tokens", "llama.block_count"):
            container.value(key)
        inspect(file)

    return read


def calibration(numbers: random.Random, originals: Originals, folder: Path) -> Call:
    """A text file, rows of JSON, or a parquet file."""
    original = numbers.choice(originals.texts)
    file = folder / original.name
    data = original.read_bytes()
    if original.suffix == ".json" and numbers.random() < 0.7:
        data = mutations.json_bytes(numbers, mutations.changed_document(numbers, json.loads(data)))
    elif original.suffix == ".jsonl" and numbers.random() < 0.7:
        lines = data.split(b"\n")
        at = numbers.randrange(len(lines))
        lines[at] = mutations.json_bytes(numbers, mutations.changed_document(numbers, json.loads(lines[at])))
        data = b"\n".join(lines)
    else:
        first = max(0, len(data) - 600) if original.suffix == ".parquet" and numbers.random() < 0.7 else 0
        data = mutations.changed_bytes(numbers, data, first)
    file.write_bytes(data)
    return lambda: read_source(str(file))


def toml(numbers: random.Random, originals: Originals, folder: Path) -> Call:
    """A file for --config."""
    file = folder / "settings.toml"
    lines = TOML.splitlines()
    for _ in range(numbers.choice((1, 1, 2))):
        at = numbers.randrange(len(lines))
        key, equals, _ = lines[at].partition("=")
        lines[at] = f"{key}= {numbers.choice(VALUES)}" if equals else numbers.choice((lines[at] * 2, "", "[x]"))
    data = "\n".join(lines).encode()
    file.write_bytes(mutations.changed_bytes(numbers, data) if numbers.random() < 0.3 else data)
    return lambda: QuantConfig.model_validate(read_toml(file))


def record(numbers: random.Random, originals: Originals, folder: Path) -> Call:
    """llmq.json, the record of a run, read by `llmq inspect` or by `llmq verify`."""
    model = _copy(originals.packed["gptq"], folder)
    document = mutations.changed_document(numbers, json.loads((model / "llmq.json").read_text()))
    (model / "llmq.json").write_bytes(mutations.json_bytes(numbers, document))
    reader = numbers.choice((inspect, examine))
    return lambda: reader(model)


def companions(numbers: random.Random, originals: Originals, folder: Path) -> Call:
    """The tokenizer and the settings of generation, which `llmq verify` reads."""
    model = folder / "model"
    model.mkdir()
    names = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
    for name in names:
        shutil.copy(originals.model / name, model / name)
    damaged = model / numbers.choice(names)
    document = mutations.changed_document(numbers, json.loads(damaged.read_text()))
    damaged.write_bytes(mutations.json_bytes(numbers, document))

    def read() -> None:
        if broken := list(problems(model, remote_code=False)):
            raise CheckpointError(broken[0])

    return read


def plan(numbers: random.Random, originals: Originals, folder: Path) -> Call:
    """A float model with a damaged config.json or header, as `llmq quantize --dry-run` reads it."""
    model = _copy(originals.model, folder)
    if numbers.random() < 0.3:
        _damage_header(numbers, model / WEIGHTS)
    else:
        _damage_config(numbers, model)
    settings = QuantConfig(method="rtn", scheme=WeightScheme(4, 16))
    return lambda: Job(model, folder / "out", settings, device="cpu").plan.layers


def load(numbers: random.Random, originals: Originals, folder: Path) -> Call:
    """A packed model with a damaged config.json or header, loaded and run."""
    model = shutil.copytree(originals.packed[numbers.choice(sorted(originals.packed))], folder / "model")
    if numbers.random() < 0.5:
        _damage_header(numbers, model / WEIGHTS)
    else:
        _damage_config(numbers, model)

    def read() -> None:
        loaded, _ = llmq.load(model, device="cpu")
        with torch.inference_mode():
            loaded(torch.arange(3, 11)[None])

    return read


def _damage_config(numbers: random.Random, model: Path) -> None:
    document = mutations.changed_document(numbers, json.loads((model / CONFIG).read_text()))
    (model / CONFIG).write_bytes(mutations.json_bytes(numbers, document))


READERS: Mapping[str, tuple[Callable[[random.Random, Originals, Path], Call], int]] = MappingProxyType(
    {  # the reader -> a function that makes an input, and the number of inputs in a short run
        "header": (header, 60),
        "fp8": (fp8, 40),
        "index": (index, 40),
        "quantization_config": (quantization_config, 60),
        "config": (config, 15),
        "gguf": (gguf, 80),
        "calibration": (calibration, 100),
        "toml": (toml, 60),
        "record": (record, 15),
        "companions": (companions, 20),
        "plan": (plan, 10),
        "load": (load, 10),
    }
)


def prepared(reader: str, seed: int, number: int, originals: Originals, folder: Path) -> Call:
    """Write input `number` of a reader into an empty folder, and return the call that reads it."""
    prepare, _ = READERS[reader]
    return prepare(random.Random(f"{seed}/{reader}/{number}"), originals, folder)


def attempt_all(
    numbers: Iterable[int], outcomes: Outcomes, reader: str, seed: int, originals: Originals, folder: Path,
    *, traced_every: int = 1,
) -> None:  # fmt: skip
    """Read the inputs with these numbers, one after the other; memory is measured for one of `traced_every`."""
    with limits():
        for number in numbers:
            call = prepared(reader, seed, number, originals, folder)
            nbytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            start_clock()
            outcomes.attempt(number, call, nbytes, traced=number % traced_every == 0)
            for entry in folder.iterdir():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _copy(model: Path, folder: Path) -> Path:
    return shutil.copytree(model, folder / "model", ignore=shutil.ignore_patterns("tokenizer*"))


def _read_weights(model: Path) -> None:
    inspect(model)
    for _ in dequantize(model):
        pass
