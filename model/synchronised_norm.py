"""Batch norm over the images of all workers, on a CPU too; each worker's part counts by its number of real values.

Workers may have different numbers of rows, none included, which the stock layer does not allow; and that one runs on
GPUs only.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from model.norm import FrozenStatisticsNorm, RowBatchNorm


class SynchronisedBatchNorm(RowBatchNorm):
    """`RowBatchNorm` whose statistics are those of the rows of all workers together; alone it is the same layer."""

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Normalise; in training every worker has to call it equally often.

        Args:
            x: (N, C, H, W); N may be 0, and another one on every worker.
            valid: (N,) bool, rows that count in the statistics, or None for all of them.
        """
        if not self.training or not _several_workers():
            return super().forward(x, valid)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        rows = x.new_ones(x.shape[0], dtype=torch.bool) if valid is None else valid
        y, mean, variance, count = _NormaliseOverWorkers.apply(
            x, self.weight, self.bias, rows, self.running_mean, self.running_var, self.eps
        )
        with torch.no_grad():
            # The running variance is the unbiased one, as in the stock layer; without two values nothing moves.
            unbiased = variance * count / (count - 1).clamp(min=1)
            step = torch.where(count >= 2, self.momentum, 0.0).to(self.running_mean.dtype)
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), step)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), step)
        normalised: Tensor = y
        return normalised


class _NormaliseOverWorkers(torch.autograd.Function):
    """One exchange of (1 + 2 C) numbers forward, one of 2 C backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        rows: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        counted = rows.to(values.dtype)[:, None, None, None]
        count = counted.sum() * (x.shape[2] * x.shape[3])
        mean = (values * counted).sum(dim=(0, 2, 3)) / count.clamp(min=1)
        squares = ((values - mean[:, None, None]).square() * counted).sum(dim=(0, 2, 3))
        # Means and squared distances of the parts give those of the whole without the cancellation of a sum of squares.
        parts = _gather(torch.cat([count[None], mean, squares]))
        counts, means, part_squares = parts[:, :1], parts[:, 1 : 1 + len(mean)], parts[:, 1 + len(mean) :]
        total = counts.sum()
        mean = (counts * means).sum(dim=0) / total.clamp(min=1)
        squares = (part_squares + counts * (means - mean).square()).sum(dim=0)
        enough = total >= 2
        mean = torch.where(enough, mean, running_mean.to(values.dtype))
        variance = torch.where(enough, squares / total.clamp(min=1), running_var.to(values.dtype))
        inverse_std = torch.rsqrt(variance + eps)
        scale = weight * inverse_std
        y = (values - mean[:, None, None]) * scale[:, None, None] + bias[:, None, None]
        # Where the running statistics are used, the values do not act on them.
        share = torch.where(enough, counted / total.clamp(min=1), 0.0)
        ctx.save_for_backward(x, mean, inverse_std, scale, share)
        ctx.mark_non_differentiable(mean, variance, total)
        return y.to(x.dtype), mean, variance, total

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, inverse_std, scale, share = ctx.saved_tensors
        grad = grad_y.to(mean.dtype)
        normalised = (x.to(mean.dtype) - mean[:, None, None]) * inverse_std[:, None, None]
        grad_bias = grad.sum(dim=(0, 2, 3))
        grad_weight = (grad * normalised).sum(dim=(0, 2, 3))
        sums = torch.cat([grad_bias, grad_weight])
        torch.distributed.all_reduce(sums)
        through_mean, through_variance = sums.chunk(2)
        through = through_mean[:, None, None] + normalised * through_variance[:, None, None]
        grad_x = scale[:, None, None] * (grad - share * through)
        return grad_x.to(x.dtype), grad_weight, grad_bias, None, None, None, None


def _gather(values: Tensor) -> Tensor:
    """(workers, K) from (K,) of each."""
    parts = [torch.empty_like(values) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, values)
    return torch.stack(parts)


def _several_workers() -> bool:
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def synchronise_norms(module: nn.Module) -> None:
    """Replace every batch norm below a module; parameters, statistics and their names stay as they are.

    Norms of stored statistics have nothing to synchronise, and stay.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d) and not isinstance(child, SynchronisedBatchNorm | FrozenStatisticsNorm):
            norm = SynchronisedBatchNorm(child.num_features, eps=child.eps, momentum=child.momentum)
            norm.weight, norm.bias = child.weight, child.bias
            norm.running_mean, norm.running_var = child.running_mean, child.running_var
            norm.num_batches_tracked = child.num_batches_tracked
            norm.train(child.training)
            setattr(module, name, norm)
        else:
            synchronise_norms(child)
