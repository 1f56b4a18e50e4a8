"""Random draws without state: the same (key, salt, slot) gives the same number on any device, alone or in a batch.

A generator would have to be saved, and would give other numbers on a GPU or with another number of workers.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Constants of splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators), as signed 64-bit.
_GOLDEN = -7046029254386353131
_MIX_1 = -4658895280553007687
_MIX_2 = -7723592293110705685


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical (not sign-keeping) shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """The splitmix64 finaliser; int64 products wrap around, as they must."""
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def uniform_draws(random_keys: Tensor, num_slots: int, salt: int) -> Tensor:
    """Independent uniform numbers in [0, 1).

    Args:
        random_keys: (B,) int64, one an image.
        num_slots: numbers an image.
        salt: tells the draws of one purpose from those of another.

    Returns:
        (B, num_slots) float32.
    """
    slots = torch.arange(num_slots, device=random_keys.device, dtype=torch.int64)
    keys = _mix(_mix(random_keys * _GOLDEN) + salt)[:, None]  # (B, 1)
    bits = _mix(keys + (slots + 1) * _GOLDEN)  # (B, num_slots)
    return _shift_right(bits, 40).float() * 2.0**-24
