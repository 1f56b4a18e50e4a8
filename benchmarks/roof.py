"""How near to what a processor can do: operations of a step, and the speed of the fastest kernel that it could use.

The roof is a 3 x 3 convolution of 256 channels, as half of the model's operations are: on the CPUs seen no slower than
a matrix product, in float32 twice as fast as one on an AMD processor.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, addmm_flop

CHANNELS, SIDE, IMAGES = 256, 64, 2
REPEATS = 5


def roof(dtype: torch.dtype | None) -> Callable[[], None]:
    """A run of some convolutions in this type, one after the other; None is float32."""
    form = torch.channels_last
    image = torch.randn(IMAGES, CHANNELS, SIDE, SIDE, dtype=dtype).contiguous(memory_format=form)
    weight = torch.randn(CHANNELS, CHANNELS, 3, 3, dtype=dtype).contiguous(memory_format=form)

    @torch.no_grad()
    def run() -> None:
        for _ in range(REPEATS):
            F.conv2d(image, weight, padding=1)

    return run


def gigaflops_of(run: Callable[[], object]) -> float:
    """Floating-point operations of convolutions and matrix products, 1e9; of a sparse matrix its entries count."""
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm: _addmm}) as counter:
        run()
    return float(counter.get_total_flops()) / 1e9


def _addmm(bias: Tensor, left: Tensor, right: Tensor, *_: Any, **__: Any) -> int:
    if left.layout is torch.sparse_csr:
        return 2 * left.values().numel() * right.shape[1]
    return int(addmm_flop(bias.shape, left.shape, right.shape))


_addmm._get_raw = True  # type: ignore[attr-defined]  # the counter hands tensors over, not their shapes
