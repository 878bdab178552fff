"""torchvision with a CPU build of torch: its wheels are built for CUDA, and their operators do not load.

vLLM's vision-language classes import torchvision, but a test with text calls none of its operators. This module is in
an environment of tests only. It declares the operators when torchvision is imported, so that the import succeeds.
"""

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any


class Operators:
    """Declares the operators before the first import of torchvision; nothing else changes."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name != "torchvision":
            return
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        import torch

        spec = importlib.util.find_spec("torchvision")
        if spec is not None and spec.origin is not None and not torch.cuda.is_available():
            source = Path(spec.origin).with_name("_meta_registrations.py").read_text(encoding="utf-8")
            names = {one or other for one, other in re.findall(r'register_meta\("(\w+)"\)|torchvision::(\w+)', source)}
            self.library = torch.library.Library("torchvision", "DEF")
            for operator in sorted(names):
                self.library.define(f"{operator}(Tensor x) -> Tensor")
            sys.modules["torchvision_operators"] = self  # type: ignore[assignment]  # it must outlive this call


sys.meta_path.insert(0, Operators())  # type: ignore[arg-type]
