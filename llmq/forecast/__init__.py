"""What a run will cost and what its result will need, from the configuration files of a model: `llmq plan`.

No weight is read, so a model on the Hub is not downloaded.

sizes_and_costs.py  sizes, time and memory
trial.py            the time and memory of one block, measured
fit.py              the largest grid with which a model fits into the memory of an accelerator
"""

from llmq.forecast.fit import Fit, fit
from llmq.forecast.sizes_and_costs import Configured, Forecast, forecast
from llmq.forecast.trial import Trial, try_block

__all__ = ["Configured", "Fit", "Forecast", "Trial", "fit", "forecast", "try_block"]
