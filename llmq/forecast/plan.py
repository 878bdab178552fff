"""`llmq.plan`: what `llmq plan` shows, as values."""

from pathlib import Path
from typing import Unpack

from llmq._keywords import Keywords
from llmq.calibration.given import from_python
from llmq.config import QuantConfig
from llmq.forecast.sizes_and_costs import Configured, Forecast, forecast
from llmq.setting_fields import merged


def plan(
    model: str | Path,
    *,
    config: QuantConfig | None = None,
    device: str = "auto",
    revision: str | None = None,
    **settings: Unpack[Keywords],
) -> Forecast:
    """Estimate what quantizing a model costs in time and memory, and the size of the result in each format.

        print(llmq.plan("Qwen/Qwen3-8B", bits=4, group_size=32))

    The settings are those of `llmq.quantize`. Only configuration files are read; of a model on the Hub, no weights are
    downloaded. Raises the errors of `llmq.errors`.
    """
    if "calibration" in settings:
        settings["calibration"] = from_python(settings["calibration"])[0]
    chosen = merged(config or QuantConfig(), settings)
    return forecast(Configured.read(str(model), chosen.calibration.seqlen, device, revision), chosen)
