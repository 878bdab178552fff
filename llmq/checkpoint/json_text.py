"""JSON as it stands in the files beside the weights."""

import json
from typing import Any


def json_text(document: Any) -> str:
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"
