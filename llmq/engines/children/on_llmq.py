"""llmq's own loader: transformers' modules with packed layers. The only file of this folder that needs llmq."""

from pathlib import Path
from typing import Any

import on_transformers  # type: ignore[import-not-found]  # next to this file

from llmq._version import __version__
from llmq.runtime.load import load


class Engine(on_transformers.Engine):  # type: ignore[misc]
    def _load(self, path: Path, options: dict[str, Any]) -> tuple[Any, Any]:
        self.version = f"llmq {__version__}"
        return load(path, device=self._device, trust_remote_code=options["remote_code"])
