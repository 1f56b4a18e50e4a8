"""Fully connected layers and 1 x 1 convolutions in float32, for processors on which torch's usual route is slow.

torch leaves fully connected layers to MKL, and of 1 x 1 convolutions those of fewer than 16 images with one thread. On
an AMD EPYC with AVX-512 MKL was measured to do 110 of the 265 GFLOP/s that oneDNN does. Convolutions of 16 images go to
oneDNN, and rows are the pixels of such images without being moved.
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

IMAGES = 16
"""That torch hands to oneDNN however many threads there are."""
FEWEST_ROWS = 32 * IMAGES
"""From here on it was measured to be the faster way."""

_always_usual = ContextVar("_always_usual", default=False)


@contextmanager
def usual_route() -> Iterator[None]:
    """Inside, products take torch's own route, as in a program that was exported."""
    token = _always_usual.set(True)
    try:
        yield
    finally:
        _always_usual.reset(token)


class Linear(nn.Linear):
    """`nn.Linear` that calls `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return linear(x, self.weight, self.bias)


class Conv2d(nn.Conv2d):
    """`nn.Conv2d` that calls `convolve`."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, H, W) to (N, out, h, w)."""
        return convolve(self, x)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`: (..., in) to (..., out), on the other route rounded differently; there may be no rows."""
    if x.numel() < FEWEST_ROWS * x.shape[-1] or not _usual_is_slow(x, weight):
        return F.linear(x, weight, bias)
    y = _product(x.reshape(-1, x.shape[-1]), weight[:, :, None, None], bias)
    return _reshaped(y, (*x.shape[:-1], weight.shape[0]))


def convolve(convolution: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution of (N, in, H, W); one of single pixels is a product of rows where they lie so in memory."""
    of_pixels = convolution.kernel_size == convolution.stride == (1, 1) and convolution.groups == 1
    of_pixels = of_pixels and convolution.padding == (0, 0)
    are_rows = x.is_contiguous(memory_format=torch.channels_last) and x.numel() >= FEWEST_ROWS * x.shape[1]
    by_mkl = x.shape[0] < IMAGES and torch.get_num_threads() == 1
    if not (of_pixels and are_rows and by_mkl and _usual_is_slow(x, convolution.weight)):
        return nn.Conv2d.forward(convolution, x)
    cells = x.permute(0, 2, 3, 1)
    y = _product(cells.reshape(-1, x.shape[1]), convolution.weight, convolution.bias)
    return _reshaped(y, (*cells.shape[:-1], convolution.out_channels)).permute(0, 3, 1, 2)


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(N, in) by (out, in, 1, 1) to (N, out); the last rows, fewer than there are images, are multiplied as usual."""
    width, left = divmod(rows.shape[0], IMAGES)
    whole = rows[: rows.shape[0] - left] if left else rows
    y = F.conv2d(whole.reshape(IMAGES, 1, width, -1).permute(0, 3, 1, 2), weight, bias)
    product = _reshaped(y.permute(0, 2, 3, 1).contiguous(), (IMAGES * width, weight.shape[0]))
    return torch.cat([product, F.linear(rows[-left:], weight[:, :, 0, 0], bias)]) if left else product


def _reshaped(y: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A result that nobody else holds in another shape: to autograd not a view, so that ReLU in place is not copied."""
    reshaped: Tensor = torch.ops.aten._unsafe_view(y, shape)
    return reshaped


def _usual_is_slow(x: Tensor, weight: Tensor) -> bool:
    """Whether MKL computes these products, on a processor that it is slow on, and oneDNN could."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and bool(torch.backends.mkldnn.enabled)
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
