"""Write `llmq/_keywords.py`: the settings of `llmq.quantize` as typed keywords, from the fields in `llmq/config.py`.

python scripts/setting_keywords.py
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from llmq.config import QuantConfig  # noqa: E402
from llmq.setting_fields import NamedSetting, Settings, settings_of  # noqa: E402

PAGE = ROOT / "llmq" / "_keywords.py"
HEAD = '''"""The settings of `llmq.quantize` as typed keywords, for type checkers and editors; None means not given.

Generated from the fields in `llmq/config.py`: change them there, then run `python scripts/setting_keywords.py`.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

from llmq.config import Override


class Keywords(TypedDict, total=False):
'''


def render(model: type[Settings] = QuantConfig) -> str:
    """The text of `llmq/_keywords.py`."""
    return HEAD + "".join(f"    {name}: {_type(setting)} | None\n" for name, setting in settings_of(model).items())


def _type(setting: NamedSetting) -> str:
    if setting.about.keyword:
        return setting.about.keyword
    if tuple[str, ...] in setting.types:
        return "str | Sequence[str]" if str in setting.types else "Sequence[str]"
    if setting.choices:
        return f"Literal[{', '.join(json.dumps(choice) for choice in setting.choices)}]"
    return " | ".join(kind.__name__ for kind in setting.types)


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
