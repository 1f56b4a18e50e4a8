"""Fully connected layers and 1 x 1 convolutions in float32, for processors on which torch's usual route is slow.

torch leaves fully connected layers to MKL, and with one thread 1 x 1 convolutions too. MKL uses less than half of a
processor that is not Intel's: 110 of 265 GFLOP/s of an AMD EPYC with AVX-512. A convolution of 16 images or more goes
to oneDNN, whatever the number of threads, and rows are the pixels of such images without being moved.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEWEST_IMAGES, FEWEST_PIXELS = 16, 32
"""Images that torch hands to oneDNN, and pixels of each from which on that was measured to be the faster way."""

_always_usual = ContextVar("_always_usual", default=False)


@contextmanager
def usual_route() -> Iterator[None]:
    """Inside, everything is rounded as in a program that was exported, to compare with one."""
    before = _always_usual.set(True)
    try:
        yield
    finally:
        _always_usual.reset(before)


class Linear(nn.Linear):
    """`nn.Linear` by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`: (..., in) to (..., out), rounded otherwise where it takes the other route; there may be no rows."""
    rows = x.numel() // max(1, x.shape[-1])
    images = _images_of(rows) if _goes_otherwise(x, weight) else None
    if images is None:
        return F.linear(x, weight, bias)
    cells = x.reshape(images, 1, rows // images, x.shape[-1]).permute(0, 3, 1, 2)
    y = F.conv2d(cells, weight[:, :, None, None], bias)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], weight.shape[0])


def convolve(convolution: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution of (N, in, H, W); one of single pixels is a product of rows where they lie so in memory."""
    alone = convolution.kernel_size == convolution.stride == (1, 1) and convolution.groups == 1
    by_rows = alone and convolution.padding == (0, 0) and x.is_contiguous(memory_format=torch.channels_last)
    if not by_rows or not _goes_otherwise(x, convolution.weight):
        y: Tensor = convolution(x)
        return y
    return linear(x.permute(0, 2, 3, 1), convolution.weight.flatten(1), convolution.bias).permute(0, 3, 1, 2)


def _goes_otherwise(x: Tensor, weight: Tensor) -> bool:
    """Whether the usual route would be MKL's, on a processor that it is slow on."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not _always_usual.get()
        and mkl_is_slow()
    )


@functools.cache
def mkl_is_slow(description: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this build of torch has MKL and the processor is not Intel's; no where the maker is not known."""
    if not torch._C.has_mkl or not description.exists():
        return False
    lines = description.read_text().splitlines()
    makers = [line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")]
    return bool(makers) and makers[0] != "GenuineIntel"


def _images_of(rows: int) -> int | None:
    """The fewest images, all of one size, that so many rows are the pixels of; None where there are too few rows."""
    most = rows // FEWEST_PIXELS
    return next((images for images in range(FEWEST_IMAGES, most + 1) if rows % images == 0), None)
