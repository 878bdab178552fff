"""README.md of an output folder: the card of the model, as the Hub shows it.

origin.py    what the card of the original says, and which model the original is
text.py      figures, how the model was made, and how it is run
"""

from llmq.export.card.text import named, render, renew_figures, write

__all__ = ["named", "render", "renew_figures", "write"]
