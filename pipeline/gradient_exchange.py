"""How workers add up their gradients: as DistributedDataParallel does, in half the bytes, or in a fixed order.

DistributedDataParallel groups gradients anew after its first step, and an all-reduce adds up the numbers of a group in
an order that depends on their place in it. With three or more workers a training that was resumed would so round its
first step otherwise than one that went through. In the fixed order every number is added rank by rank, wherever it
lies. Two numbers have only one sum, so one and two workers need none of this.
"""

# Annotations stay objects here: DistributedDataParallel compares those of a hook.
from collections.abc import Callable

import torch
import torch.distributed
import torch.utils.deterministic
from torch import Tensor, nn
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.nn.parallel import DistributedDataParallel

from pipeline.config import ExperimentConfig
from pipeline.training import compress_gradients


def pin_arithmetic(config: ExperimentConfig, device_type: str) -> None:
    """Set the number of threads, and have each sum taken in one order where several threads share it.

    Args:
        config: `scaling.cpus_per_worker` and `train.deterministic`.
        device_type: "cpu" or "cuda"; there some operations stay without an order, and warn.
    """
    if device_type == "cpu":
        torch.set_num_threads(config.scaling.cpus_per_worker)
    several = device_type == "cpu" and config.scaling.cpus_per_worker > 1 and config.train.deterministic is None
    if config.train.deterministic or several:
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] # nobody reads it
        torch.use_deterministic_algorithms(True, warn_only=True)


def adds_in_fixed_order(config: ExperimentConfig, device_type: str, num_workers: int) -> bool:
    """Whether so many workers have to sum gradients rank by rank to have the same bits after a resume."""
    wanted = config.train.deterministic
    return num_workers > 2 and (device_type == "cpu" if wanted is None else wanted)


def exchange_gradients(model: nn.Module, compression: str, fixed_order: bool) -> None:
    """Set how workers exchange gradients; call it before the first step.

    Args:
        model: without DistributedDataParallel it stays as it is.
        compression: "none", "bf16" or "fp16".
        fixed_order: the same bits whatever the groups; each worker receives the gradients of all others.
    """
    if not fixed_order:
        compress_gradients(model, compression)
    elif isinstance(model, DistributedDataParallel):
        dtype = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}[compression]
        model.register_comm_hook(None, mean_in_fixed_order(dtype))


def mean_in_fixed_order(
    dtype: torch.dtype | None = None,
) -> Callable[[object, GradBucket], torch.futures.Future[Tensor]]:
    """Communication hook: the mean over the workers, summed rank by rank.

    Args:
        dtype: that gradients are sent in, None for their own.
    """

    def hook(_: object, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        own: Tensor = bucket.buffer()
        sent = own if dtype is None else own.to(dtype)
        parts = [torch.empty_like(sent) for _ in range(torch.distributed.get_world_size())]
        future = torch.distributed.all_gather(parts, sent, async_op=True).get_future()

        def mean(_: torch.futures.Future[list[Tensor]]) -> Tensor:
            total = parts[0].to(own.dtype, copy=True)
            for part in parts[1:]:
                total += part
            own.copy_(total.div_(len(parts)))
            return own

        return future.then(mean)

    return hook
