"""Small constant tensors, made once for each device: to copy a few numbers to a GPU makes the host wait each time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor


def constant(values: Sequence[float], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """(len(values),) tensor, shared by all who ask for it: never change it in place.

    Args:
        values: few.
        device: of the tensor.
        dtype: of the tensor, None for torch's default.
    """
    dtype = dtype or torch.get_default_dtype()
    if torch.compiler.is_compiling():  # also while exporting: what is made there must not be kept
        return torch.tensor(values, dtype=dtype, device=device)
    return _kept(tuple(values), device, dtype)


@lru_cache(maxsize=256)
def _kept(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # else the one who asks first decides whether others may use it in training
        return torch.tensor(values, dtype=dtype, device=device)
