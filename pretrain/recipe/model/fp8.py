"""fp8 training: the matrix products of the layers in 8-bit floating point, by torchao.

The weights stay the float32 parameters that they are, under their own names: optimizers, checkpoints and the
saved model see no difference. Each product rounds its two factors to fp8, with one scale for each tensor.
"""

from __future__ import annotations

import torch

from recipe.model.build import is_outer

# Both sides of a matrix must be multiples of this; others are multiplied in bf16.
MULTIPLE = 16


def use_fp8(model: torch.nn.Module, emulate: bool = False) -> int:
    """Let the layers of a model multiply in fp8; returns the number of matrices that do.

    The embeddings and the output stay as they are. emulate: round to fp8 and multiply in float32, which works
    on a CPU, too.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    chosen = [name for name, module in model.named_modules() if _fits(name, module)]
    convert_to_float8_training(
        model,
        config=Float8LinearConfig(emulate=emulate),
        module_filter_fn=lambda _, name: name in chosen,
    )
    return len(chosen)


def _fits(name: str, module: torch.nn.Module) -> bool:
    if not isinstance(module, torch.nn.Linear) or is_outer(name):
        return False
    return all(size % MULTIPLE == 0 for size in module.weight.shape)


def active_fp8(model: torch.nn.Module) -> int:
    """The number of matrices that are multiplied in fp8, read from the model that trains."""
    # Without torchao there is none; its import takes seconds.
    return sum(type(module).__module__.startswith("torchao.float8") for module in model.modules())
