"""The text of a model card: figures, how the model was made, and how it is run.

Every name and text that comes from a checkpoint is code in Markdown, or quoted by the YAML library.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llmq import formats
from llmq.calibration.sources import without_folder
from llmq.checkpoint.atomic import write_text
from llmq.checkpoint.index import read_json_object
from llmq.checkpoint.side_files import CARD
from llmq.checkpoint.writer import CONFIG
from llmq.config import QuantConfig
from llmq.errors import ConfigError, LlmqError
from llmq.export.card.origin import FINETUNE, Origin, licence, origin_of, texts
from llmq.export.conversion import WEIGHTS
from llmq.gguf import imatrix
from llmq.numerics.gguf_types import GGUF, GGUF_GRIDS
from llmq.report.escaped import markdown_code as code
from llmq.report.escaped import markdown_text as prose
from llmq.report.shown import megabytes
from llmq.setting_fields import config_to
from llmq.verification import engines
from llmq.verification.engines.rules import LLAMA_CPP, MLX, SGLANG, TRANSFORMERS, VLLM

MODEL = "MODEL"  # in commands, until the model has an id
PLACE = f"`{MODEL}` is the folder of this model, or its id on the Hub."
OTHER_KIND = re.compile(rf"llmq|\d+-bit|{'|'.join(map(re.escape, (*formats.names(), GGUF)))}")  # tags of other results
OVERRIDES = 12  # a longer list, such as that of --target-bits, is in llmq.json only
FIGURES, RUNNING = "## Figures", "## How to run it"
LIBRARIES = {"mlx": "mlx"}  # of formats that transformers does not load
VERDICT = {  # keys of the verdict in llmq.json, and what they are
    "kl": "KL divergence to the original, in nats per token (mean)",
    "kl_rtn": "the same with round to nearest",
    "perplexity": "perplexity",
    "perplexity_float": "perplexity of the original",
    "same_top1": "fraction of positions with the same most likely token as the original",
}
TRANSFORMERS_CODE = """\
import llmq
from transformers import AutoModelForCausalLM, AutoTokenizer

llmq.enable_transformers()
model = AutoModelForCausalLM.from_pretrained("{model}"{more})
tokenizer = AutoTokenizer.from_pretrained("{model}"{more})"""


def write(made: Path, source: Path, record: Mapping[str, Any]) -> tuple[str, ...]:
    """Write README.md of the finished model in `made`, which was made from the model in `source`.

    `record` is the content of llmq.json.  Returns notes for the user.
    """
    text, notes = render(made, origin_of(source, read_json_object(source / CONFIG)), record)
    write_text(made / CARD, text)
    return notes


def renew_figures(made: Path, record: Mapping[str, Any]) -> None:
    """Write the figures of `record` into the card of a finished model, after it was measured."""
    if not (made / CARD).is_file():  # the user has removed it
        return
    text = (made / CARD).read_text(encoding="utf-8")
    before, _, after = text.partition(f"{FIGURES}\n")
    _, running, rest = after.partition(f"\n{RUNNING}\n")
    if running:  # else the user has written another card
        figures = "\n\n".join(_figures(made, record))
        write_text(made / CARD, f"{before}{figures}\n{running}{rest}")


def named(text: str, model: str) -> str:
    """A card with the id of the model in its commands; a card that llmq did not write is returned unchanged."""
    before, separator, after = text.partition(PLACE)
    return before + re.sub(rf"\b{MODEL}\b", model, after.lstrip("\n")) if separator else text


def render(made: Path, origin: Origin, record: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """The card of the model in `made`, and notes for the user."""
    from huggingface_hub import ModelCard, ModelCardData

    settings = read_json_object(made / CONFIG).get("quantization_config")
    ggufs = sorted(file.name for file in made.glob("*.gguf"))
    kind = GGUF if ggufs else str(settings.get("quant_method")) if isinstance(settings, Mapping) else "float"
    entries, notes = licence(origin, made)
    tags = [tag for tag in texts(origin.card.get("tags")) if not OTHER_KIND.fullmatch(tag)]
    data = ModelCardData(
        base_model=list(origin.models) if len(origin.models) > 1 else next(iter(origin.models), None),
        language=texts(origin.card.get("language")) or None,
        library_name=LIBRARIES.get(kind) or next(iter(texts(origin.card.get("library_name"))), "transformers"),
        pipeline_tag=next(iter(texts(origin.card.get("pipeline_tag"))), "text-generation"),
        tags=list(dict.fromkeys([*tags, "llmq", kind, *_bits(record)])),
        **({"base_model_relation": origin.relation} if origin.models else {}),
        **entries,
    )
    serving, more = _serving(made, ggufs)
    parts = [_title(origin, record, kind), *_figures(made, record), *serving, *_making(record), *_licence(entries)]
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")
    return str(card), (*origin.notes, *notes, *more)


def _bits(record: Mapping[str, Any]) -> list[str]:
    """The tag `4-bit`; none for GGUF's own block types, whose names say it."""
    settings = _part(record, "settings")
    bits = _part(settings, "scheme").get("bits")
    return [f"{bits}-bit"] if isinstance(bits, int) and settings.get("format") not in GGUF_GRIDS else []


def _title(origin: Origin, record: Mapping[str, Any], kind: str) -> str:
    source = record.get("source")
    name = origin.models[0] if origin.models else Path(source).name if isinstance(source, str) else "a model"
    original = f"[{code(name)}](https://huggingface.co/{name})" if origin.models else code(name)
    text = f"# {code(name.rpartition('/')[2])} quantized as {code(kind)}\n\n"
    if origin.relation == FINETUNE:
        return f"{text}A quantized fine-tune of {original}, made with llmq."
    return f"{text}{original}, quantized with llmq."


def _figures(made: Path, record: Mapping[str, Any]) -> Iterator[str]:
    """Size and bits, and the quality as far as it was measured."""
    rows: list[tuple[str, str]] = []
    if (bits := _number(record.get("bits_per_weight"))) is not None:
        rows.append(("bits per quantized weight, with scales", f"{bits:.3f}"))
    size = sum(file.stat().st_size for suffix in WEIGHTS for file in made.glob(f"*{suffix}"))
    before = _number(record.get("original_bytes"))
    rows.append(("size of weights", f"{f'{megabytes(before)} → ' if before else ''}{megabytes(size)}"))
    verdict = _part(record, "verdict")
    rows += [
        (title, f"{value:.5g}") for key, title in VERDICT.items() if (value := _number(verdict.get(key))) is not None
    ]
    yield "\n".join([FIGURES, "", "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])
    if _number(verdict.get("kl")) is not None:
        yield f"{prose(verdict.get('sentence', ''))} Measured on {prose(verdict.get('text', ''))}."
    else:
        yield "The loss of quality was not measured here: `llmq eval MODEL --against ORIGINAL` measures it on any text."


def _making(record: Mapping[str, Any]) -> Iterator[str]:
    """The command, its settings and the calibration text; the records of conversions."""
    settings, versions = _part(record, "settings"), _part(record, "versions")
    conversions = record.get("conversions")
    parts = []
    if settings:
        notes = texts(record.get("notes"))
        matrix = imatrix.file_in(notes)
        parts += ["```console\n$ llmq quantize ORIGINAL OUT --config llmq.toml\n```", *_toml(settings, matrix)]
        parts += [_calibration(_part(record, "calibration"))]
        parts += [f"{prose(note[0].upper() + note[1:])}." for note in notes if note.startswith(imatrix.WEIGHTED)]
        parts += [f"Versions: {', '.join(code(f'{name} {value}') for name, value in versions.items())}."]
    for conversion in conversions if isinstance(conversions, list) else ():
        if isinstance(conversion, Mapping):
            parts.append(f"Converted from {code(conversion.get('from'))} to {code(conversion.get('to'))}.")
    if parts:
        yield "\n\n".join(["## How it was made", *parts])
        yield "`llmq.json` has the settings, the error of each layer and the checksums of all files."


def _toml(settings: Mapping[str, Any], matrix: str | None) -> Iterator[str]:
    """The file llmq.toml: method, format and grid, and all settings that differ from the defaults.

    matrix  the name of an importance matrix, which the recorded sources of text do not have
    """
    import tomli_w

    try:
        chosen, default = config_to(QuantConfig.model_validate(settings)), config_to(QuantConfig())
    except ConfigError:
        return  # the record is that of another version
    text = chosen["calibration"]
    text["sources"] = [*([matrix] if matrix else []), *map(without_folder, text["sources"])]
    chosen["calibration"] = {key: value for key, value in text.items() if value != default["calibration"].get(key)}
    always = ("method", "format", "scheme")
    shown = {key: value for key, value in chosen.items() if key in always or (value and value != default.get(key))}
    if many := len(chosen["overrides"]) > OVERRIDES:
        del shown["overrides"]
    yield "\n".join(_fenced("toml", tomli_w.dumps(shown)))
    if many:
        yield f"The settings of {len(chosen['overrides'])} layers or patterns are in `llmq.json`."


def _calibration(text: Mapping[str, Any]) -> str:
    if not text:
        return "No calibration text was used."
    names = [without_folder(name) for name in texts(text.get("sources"))]
    size = f"{code(text.get('samples'))} sequences of {code(text.get('seqlen'))} tokens"
    return f"Calibrated on {size} from {', '.join(map(code, names)) or 'a text without a name'}."


def _serving(made: Path, ggufs: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """How to run the model in each engine that loads it by llmq's rules, and notes for the user."""
    try:
        verdicts = engines.verdicts(engines.check(made))
    except LlmqError as error:
        return [], (f"README.md does not say which engines load the model: {error}",)
    commands = _commands(ggufs)
    lines = [RUNNING, "", PLACE]
    for verdict in verdicts:
        if verdict.loads:
            language, command = commands[verdict.engine]
            gpus = f" (on {' or '.join(map(str, verdict.gpus))} GPUs)" if len(verdict.gpus) > 1 else ""
            lines += ["", f"{verdict.engine}{gpus}:", "", *_fenced(language, command)]
    if not any(verdict.loads for verdict in verdicts):
        lines += ["", "No engine is known to load it; `llmq verify MODEL` has the reasons."]
    untried = "Which engines load the model is known from their sources and documentation; they were not run for this."
    return ["\n".join([*lines, "", untried])], ()


def _commands(ggufs: list[str]) -> dict[str, tuple[str, str]]:
    """The language and the commands for each engine; `ggufs` are the .gguf files of the model."""
    file = ggufs[0] if ggufs else ""
    path, more = (f"{MODEL}/{file}", f', gguf_file="{file}"') if file else (MODEL, "")
    return {
        VLLM: ("console", f"$ vllm serve {path}"),
        SGLANG: ("console", f"$ python -m sglang.launch_server --model-path {path}"),
        TRANSFORMERS: ("python", TRANSFORMERS_CODE.format(model=MODEL, more=more)),
        LLAMA_CPP: ("console", f"$ llama-server --model {path}"),
        MLX: ("console", f"$ mlx_lm.chat --model {path}"),
    }


def _licence(entries: Mapping[str, Any]) -> Iterator[str]:
    if entries:
        named = ", ".join(code(value) for value in texts(entries.get("license")))
        yield f"## Licence\n\nThat of the original: {named}."


def _fenced(language: str, text: str) -> list[str]:
    """A block of code that its text cannot end."""
    fence = "```"
    while fence in text:
        fence += "`"
    return [f"{fence}{language}", *text.rstrip("\n").split("\n"), fence]


def _part(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    part = values.get(key)
    return part if isinstance(part, Mapping) else {}


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
