"""What several tests of single modules need."""

from typing import Any

import pytest


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One token a byte (3 to 258), `<s>` (1) in front of each text; as a job loads it from a checkpoint."""
    from llmq.runtime.load import load_tokenizer
    from tests import builders

    folder = tmp_path_factory.mktemp("tokenizer")
    builders.save_tokenizer(folder)
    return load_tokenizer(folder, remote_code=False)
