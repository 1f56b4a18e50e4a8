"""What tests of the model share."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor


@pytest.fixture
def everything_in_float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Norms and ReLU make the gradients of a deep network hang on rounding: in float32 torchvision's own differ by
    several percent between two kinds of convolution, and so between two kinds of processor."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
