"""Several processes work on one run: what they exchange (`ranks.py`), and how (`process_group.py`).

`join` must be called once, before the run. torch.distributed is imported only if there are several processes.
"""

import os
from collections.abc import Mapping

from llmq.distributed.ranks import ALONE, Ranks


def join(device: str, environment: Mapping[str, str] = os.environ) -> Ranks:
    """The ranks of this run: one, unless the environment is that of a process of torchrun.

    device  the value of --device

    Raises ConfigError for a device that several processes cannot share, and BackendError if there are more processes
    than GPUs.
    """
    if "RANK" not in environment or int(environment.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    from llmq.distributed import process_group

    return process_group.start(device, environment)
