"""The settings of the calibration text; nothing here imports torch."""

from typing import Annotated, ClassVar

from pydantic import Field

from llmq import source_names
from llmq.setting_fields import Setting, Settings, Strings, parse_sources


class Calibration(Settings):
    """The table [calibration]: the text on which statistics of the layers are collected."""

    KEY: ClassVar[str] = "key of [calibration]"
    PANEL: ClassVar[str] = "Calibration"

    sources: Annotated[
        Strings,
        Setting(name="calibration", metavar="SOURCE", parse=parse_sources, keyword="str | Path | Iterable[Any]"),
    ] = Field(
        default=(),
        description="Calibration data: a .txt, .jsonl, .json or .parquet file (FILE:COLUMN selects a column), a Hub "
        "dataset NAME[:CONFIG][:SPLIT][:COLUMN], or `self` to let the model generate it. Append :WEIGHT to mix "
        "sources. Default: a mixed set from the Hub; use your own text if the model serves a narrow domain. With "
        "rtn also an importance matrix of llama.cpp (.gguf, .imatrix, .dat).",
    )
    samples: Annotated[int, Setting(expected="a whole number, at least 1")] = Field(
        default=128, ge=1, description="Number of calibration sequences, of 128 tokens in all or more."
    )
    seqlen: Annotated[int, Setting(expected="a whole number, at least 1")] = Field(
        default=2048,
        ge=1,
        description="Tokens per calibration sequence, at most the model's context. Lower it to save memory.",
    )
    own_text: Annotated[bool, Setting(flag="--own-text/--no-own-text")] = Field(
        default=True,
        description="Let the model write a part of the calibration text itself: half of the sequences with fast and "
        "balanced, and three for each given one with best. This text is of all kinds that the model knows. Turn it off "
        "if the model will only see text like yours. Without effect where --calibration names self, and with rtn, "
        "gptq, awq.",
    )
    packing: Annotated[bool, Setting(flag="--packing/--no-packing")] = Field(
        default=False,
        description="Fill the sequences with whole documents, one after the other. By default each sequence is drawn "
        "from another document, which lowers the error if documents are long. Use it to compare with other tools.",
    )
    validation: Annotated[int | None, Setting(name="validate", expected="a whole number, at least 0")] = Field(
        default=None,
        ge=0,
        description="Number of sequences that are held back from calibration. The finished model is compared with the "
        "original and with round to nearest on them. 0 turns this off. Default: one per 16 calibration sequences.",
    )

    @property
    def names_self(self) -> bool:
        """Whether the sources say how much of the text the model writes."""
        return any(source.is_self for source in source_names.parse_sources(self.sources))

    @property
    def held_back(self) -> int:
        """The number of sequences on which the finished model is measured."""
        return self.samples // 16 if self.validation is None else self.validation
