"""Run a text through a model whose blocks are read one at a time, for its last hidden states.

Block by block over all batches, and not batch by batch over all blocks: each weight is read once.  What stays are the
hidden states of the whole text; with `Skeleton.logits` they give the logits of any part of it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from llmq.model.skeleton import Skeleton

MEMORY = torch.device("cpu")


@torch.no_grad()
def hidden_states(skeleton: Skeleton, batches: Sequence[Tensor], *, keep: torch.device = MEMORY) -> list[Tensor]:
    """What the last block puts out, (…, B, T, D) in the dtype that it computes in, for each of `batches` (B, T) int64.

    `keep` is the device where they wait between two blocks, and where they end.
    """
    states: list[Tensor] = []
    for index, block in enumerate(skeleton.blocks):
        block.load()
        for number, tokens in enumerate(batches):
            call = skeleton.record(index, tokens)
            if index == 0:
                states.append(block.run(call).to(keep))
            else:
                states[number] = block.run(call.with_hidden(states[number].to(skeleton.device))).to(keep)
        block.free()
    return states
