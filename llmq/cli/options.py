"""The options of `llmq quantize`, and those that several commands have: name, type, help."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from llmq.config import FORMATS, ORDERS, SCALES
from llmq.methods import METHODS
from llmq.numerics.scheme import BITS, GROUP_SIZES

WHAT, TEXT, RUN = "What to make", "Calibration", "The run"


def _choice(values: object) -> str:
    return " | ".join(str(value) for value in values)  # type: ignore[attr-defined]


Model = Annotated[str, Argument(help="A folder with safetensors, or a Hub id such as Qwen/Qwen3-8B.", metavar="MODEL")]
Path_ = Annotated[str, Argument(help="A folder, or a Hub id.", metavar="PATH")]
Out = Annotated[Path | None, Argument(help="The output folder.  Default: MODEL-METHOD-BITSbit.", metavar="OUT")]

Method = Annotated[
    str | None, Option("--method", help=f"{_choice(METHODS)}.  Default: balanced.", rich_help_panel=WHAT)
]
Bits = Annotated[int | None, Option("--bits", help=f"{_choice(BITS)}.  Default: 4.", rich_help_panel=WHAT)]
GroupSize = Annotated[
    str | None,
    Option(
        "--group-size",
        help=f"Columns that share a scale: {_choice(GROUP_SIZES)} | channel | tensor.  Default: 128.",
        rich_help_panel=WHAT,
    ),
]
TargetBits = Annotated[
    float | None,
    Option(
        "--target-bits",
        help="Spend so many bits a weight, scales counted, where they help most: 4 bits in groups of 128 or 32, 8 "
        "bits, or a layer as it is.",
        rich_help_panel=WHAT,
    ),
]
Symmetric = Annotated[
    bool | None,
    Option(
        "--symmetric/--asymmetric",
        help="A fixed zero, or one for each group.  Default: symmetric.",
        rich_help_panel=WHAT,
    ),
]
Format = Annotated[
    list[str] | None,
    Option(
        "--format",
        help=f"{_choice(FORMATS)}.  Repeatable, or with commas: all get the same codes, each in a folder of its own.  "
        "Default: compressed-tensors.",
        rich_help_panel=WHAT,
    ),
]
Skip = Annotated[
    list[str] | None,
    Option("--skip", help=r"Leave layers alone: 'down_proj', 're:layers\.0\.'.  Repeatable.", rich_help_panel=WHAT),
]
Overrides = Annotated[
    list[str] | None,
    Option(
        "--override", help="Another grid for some: 'PATTERN:bits=8,group_size=32'.  Repeatable.", rich_help_panel=WHAT
    ),
]
Strict = Annotated[
    bool | None,
    Option("--strict", help="Fail where a group size does not divide, instead of falling back.", rich_help_panel=WHAT),
]
Rotate = Annotated[
    bool | None,
    Option(
        "--rotate",
        help="Try to mix the channels of each attention head, so that none is loud.  It may help or not: each block "
        "keeps it only where that lowers its error on text held out.",
        rich_help_panel=WHAT,
    ),
]
QuantizeHead = Annotated[
    bool | None,
    Option(
        "--quantize-head",
        help="Quantize the layer that makes logits as well (gptq, compressed-tensors); where it is tied to the "
        "embedding it gets a weight of its own.",
        rich_help_panel=WHAT,
    ),
]
Order = Annotated[
    str | None,
    Option("--order", help=f"Of gptq's columns: {_choice(ORDERS)}.  Default: activation.", rich_help_panel=WHAT),
]
Scales = Annotated[str | None, Option("--scales", help=f"{_choice(SCALES)}.  Default: searched.", rich_help_panel=WHAT)]

Calibration = Annotated[
    list[str] | None,
    Option(
        "--calibration",
        help="The text that the model is watched on: a text file (.txt), a file of rows such as .jsonl or .parquet, "
        "also FILE:COLUMN; a Hub data set as NAME[:CONFIG][:SPLIT][:COLUMN]; or self: the model writes it.  Rows hold "
        "texts or chats.  Repeatable; a number at the end is a weight: a.jsonl:0.8.  Default: a mix from the Hub.",
        rich_help_panel=TEXT,
    ),
]
Samples = Annotated[int | None, Option("--samples", help="Windows of text.  Default: 128.", rich_help_panel=TEXT)]
Seqlen = Annotated[
    int | None,
    Option("--seqlen", help="Tokens in a window.  Default: 2048, or the model's context.", rich_help_panel=TEXT),
]
Seed = Annotated[int | None, Option("--seed", help="Decides which text is drawn.  Default: 0.", rich_help_panel=TEXT)]

Config = Annotated[Path | None, Option("--config", help="Settings from a TOML file; flags win.", rich_help_panel=RUN)]
PrintConfig = Annotated[
    bool, Option("--print-config", help="Print the settings as TOML and leave.", rich_help_panel=RUN)
]
Device = Annotated[str, Option("--device", help="auto | cpu | cuda[:N].", rich_help_panel=RUN)]
Revision = Annotated[
    str | None, Option("--revision", help="A branch, tag or commit of a Hub model.", rich_help_panel=RUN)
]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace the model in OUT.", rich_help_panel=RUN)]
TrustRemoteCode = Annotated[
    bool, Option("--trust-remote-code", help="Run Python code that comes with the model.", rich_help_panel=RUN)
]
DryRun = Annotated[
    bool, Option("--dry-run", help="Show what would become of each layer, from headers alone.", rich_help_panel=RUN)
]
Json = Annotated[bool, Option("--json", help="The result as JSON.", rich_help_panel=RUN)]
