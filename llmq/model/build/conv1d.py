"""One form for every model: what multiplies by a weight and adds a bias is an `nn.Linear`.

transformers writes GPT-2 with a `Conv1D`, x W + b with W (K, N), which is a linear layer whose weight lies transposed.
Here it becomes an `nn.Linear` with (N, K), so that nothing behind the skeleton knows of it.  `ModelWeights` turns the
tensors as it reads them, and turns what is written as a float back, so a file that is not quantized keeps its bytes.
Packed weights need no turning: the layouts of the world hold (N, K) for these models as well.
"""

from torch import nn


class TransposedLinear(nn.Linear):
    """A linear layer whose weight the checkpoint stores as (K, N)."""


def apply(model: nn.Module) -> None:
    """Put a `TransposedLinear` on meta in the place of every `Conv1D`."""
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
