"""Replace `Conv1D` by `nn.Linear`, so that all linear layers have the same class.

transformers implements GPT-2 with `Conv1D`, x W + b with W (K, N): a linear layer whose weight is transposed. It is
replaced by an `nn.Linear` with (N, K), so no other code has to distinguish them. `ModelWeights` transposes the tensors
when it reads them, and transposes float tensors back when they are written, so float tensors keep their bytes. Packed
weights are not transposed: the known file formats hold (N, K) for these models, too.
"""

from torch import nn


class TransposedLinear(nn.Linear):
    """A linear layer whose weight the checkpoint stores as (K, N)."""


def apply(model: nn.Module) -> None:
    """Replace every `Conv1D` of a model by a `TransposedLinear` on meta."""
    from transformers.pytorch_utils import Conv1D

    for path, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            K, N = module.weight.shape
            dtype = module.weight.dtype
            linear = TransposedLinear(K, N, bias=module.bias is not None, device="meta", dtype=dtype)
            model.set_submodule(path, linear.train(module.training).requires_grad_(False))


def transposed_names(model: nn.Module) -> set[str]:
    """The parameters, by their names in the model, that the checkpoint stores as (K, N)."""
    return {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, TransposedLinear)}
