"""JSON as written into the files next to the weights."""

import json
from typing import Any


def json_text(document: Any) -> str:
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"
