"""Forward and backward of a step as CUDA graphs: the host launches one graph in place of thousands of kernels."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from model.config import LossConfig
from model.mask_rcnn import MaskRCNN
from model.structures import Batch
from pipeline.training import accumulate_gradients

EAGER_STEPS = 3  # of each shape before it is captured: libraries choose their algorithms, kernels are compiled

Shape = tuple[tuple[int, ...], int, int]


@dataclass
class _Captured:
    """A graph, what it reads and what it writes."""

    graph: torch.cuda.CUDAGraph
    batch: Batch
    values: Tensor
    gradients: list[Tensor | None]


class GraphedGradients:
    """`accumulate_gradients` of one batch for a model alone on a GPU; each shape of batch has its graph.

    Nothing in the forward pass may make the host wait (tests/model/test_cuda.py). The graphs share their memory.
    """

    def __init__(self, model: MaskRCNN, weights: LossConfig, dtype: torch.dtype | None) -> None:
        self.model, self.weights, self.dtype = model, weights, dtype
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.seen: Counter[Shape] = Counter()
        self.captured: dict[Shape, _Captured] = {}
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def __call__(self, batch: Batch) -> Tensor:
        """Leave the gradients of a batch in the parameters.

        Args:
            batch: on the device, or pinned on the host.

        Returns:
            (6,) float32 on the device, see `accumulate_gradients`.
        """
        shape = _shape(batch)
        self.seen[shape] += 1
        if self.seen[shape] <= EAGER_STEPS:
            return self._eager(batch)
        if shape not in self.captured:
            self.captured[shape] = self._capture(batch, shape)
        captured = self.captured[shape]
        _fill(captured.batch, batch)
        captured.graph.replay()
        for parameter, gradient in zip(self.parameters, captured.gradients, strict=True):
            parameter.grad = gradient
        return captured.values.clone()

    def _eager(self, batch: Batch) -> Tensor:
        """A step without a graph, on a stream of its own as the capture will be."""
        self._forget_gradients()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            values = accumulate_gradients(self.model, [batch.to(self.parameters[0].device)], self.weights, self.dtype)
        torch.cuda.current_stream().wait_stream(self.stream)
        return values

    def _capture(self, batch: Batch, shape: Shape) -> _Captured:
        device = self.parameters[0].device
        static = batch.to(device)
        static = replace(static, mask_bits=torch.zeros(shape[2], dtype=torch.uint8, device=device))
        static = Batch(**{field.name: getattr(static, field.name).clone() for field in fields(static)})
        self._forget_gradients()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            values = accumulate_gradients(self.model, [static], self.weights, self.dtype)
        return _Captured(graph, static, values, [parameter.grad for parameter in self.parameters])

    def _forget_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None


def _shape(batch: Batch) -> Shape:
    """What a graph is bound to: images, ground-truth slots, and the room for mask bits, a power of two."""
    room = 1 << max(batch.mask_bits.numel() - 1, 2**20 - 1).bit_length()
    return tuple(batch.images.shape), batch.boxes.shape[1], room


def _fill(static: Batch, batch: Batch) -> None:
    """Copy a batch to where a graph reads it."""
    for field in fields(batch):
        source, target = getattr(batch, field.name), getattr(static, field.name)
        if field.name == "mask_bits":
            target = target[: source.numel()]
        target.copy_(source, non_blocking=True)
