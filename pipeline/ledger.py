"""Where the time of a step goes (data, copying, forward, backward, all-reduce, optimiser; sampled), and memory."""

from __future__ import annotations

import resource
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from model.structures import Batch

PARTS = ("data_wait", "copy", "forward", "backward", "all_reduce", "optimizer")
"""Names of the parts; as metrics `seconds_NAME`. What all_reduce takes lies within backward, in part beside it."""

SAMPLED_EVERY = 10  # steps
FIRST_SAMPLED = 2  # steps after a start: the first waits for the stream to begin, and warms up

Mark = float | torch.cuda.Event


class StepLedger:
    """Times parts of every tenth step by hooks of the model and the optimiser; on a GPU by events, without a wait.

    The first steps of a start are left out; what the first one waited for its data is `first_batch_seconds`.

    backward counts from the end of the last forward pass to the update, with the exchange and the clipping in it;
    all_reduce is what DistributedDataParallel itself measures of its exchange (0 with one worker). copy is the host's
    time for it. A step that ends without an update is left out.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self._model, self._device = model, device
        self._step, self._sampling = -1, False
        self._num_steps = 0
        self.first_batch_seconds: float | None = None
        self._of_step: dict[str, list[tuple[Mark, Mark]]] = defaultdict(list)
        self._intervals: dict[str, list[tuple[Mark, Mark]]] = defaultdict(list)
        self._forward_begins: Mark = 0.0
        self._forward_ended: Mark | None = None
        self._update_begins: Mark = 0.0
        self._sums: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self._samples = 0
        model.register_forward_pre_hook(self._before_forward)
        model.register_forward_hook(self._after_forward)
        optimizer.register_step_pre_hook(self._before_update)
        optimizer.register_step_post_hook(self._after_update)

    def __deepcopy__(self, memo: dict[int, Any]) -> StepLedger:
        """The same: a copy of the model that is evaluated must not take a ledger of its own along."""
        return self

    def next_batch(self, step: int, batches: Iterator[Batch], to_device: Callable[[Batch], Batch]) -> Batch:
        """The next batch on the device; a step is sampled from its first batch on."""
        if step != self._step:
            self._step, self._sampling = step, self._num_steps % SAMPLED_EVERY == FIRST_SAMPLED
            self._num_steps += 1
            self._of_step.clear()
            self._forward_ended = None
        started = time.perf_counter()
        batch = next(batches)
        arrived = time.perf_counter()
        if self.first_batch_seconds is None:
            self.first_batch_seconds = round(arrived - started, 2)
        batch = to_device(batch)
        if self._sampling:
            self._of_step["data_wait"].append((started, arrived))
            self._of_step["copy"].append((arrived, time.perf_counter()))
        return batch

    def means(self) -> dict[str, float]:
        """`seconds_NAME` of each part, the mean of the steps sampled since the beginning; on a GPU after a wait for it.

        Returns:
            Nothing before the first sample.
        """
        for name, intervals in self._intervals.items():
            self._sums[name] += sum(_seconds(start, end) for start, end in intervals)
        self._intervals.clear()
        if not self._samples:
            return {}
        found = {f"seconds_{name}": self._sums[name] / self._samples for name in PARTS}
        return found | {"seconds_all_reduce": _all_reduce_seconds(self._model)}

    def _mark(self) -> Mark:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _before_forward(self, *_: Any) -> None:
        if self._sampling and torch.is_grad_enabled():
            if self._forward_ended is not None:  # of the batch before, of several a step
                self._of_step["backward"].append((self._forward_ended, self._mark()))
            self._forward_begins = self._mark()

    def _after_forward(self, *_: Any) -> None:
        if self._sampling and torch.is_grad_enabled():
            self._forward_ended = self._mark()
            self._of_step["forward"].append((self._forward_begins, self._forward_ended))

    def _before_update(self, *_: Any) -> None:
        if self._sampling and self._forward_ended is not None:
            self._update_begins = self._mark()
            self._of_step["backward"].append((self._forward_ended, self._update_begins))

    def _after_update(self, *_: Any) -> None:
        if self._sampling and self._forward_ended is not None:
            self._of_step["optimizer"].append((self._update_begins, self._mark()))
            for name, intervals in self._of_step.items():
                self._intervals[name] += intervals
            self._of_step.clear()
            self._samples += 1
        self._forward_ended = None


def peak_memory_megabytes(device: torch.device) -> float:
    """The most that this process has held: tensors on a GPU; on a CPU everything, mapped shards included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def _seconds(start: Mark, end: Mark) -> float:
    if isinstance(start, float):
        assert isinstance(end, float)
        return end - start
    assert not isinstance(end, float)
    return float(start.elapsed_time(end)) / 1000


def _all_reduce_seconds(model: nn.Module) -> float:
    """Mean time of the exchange, as DistributedDataParallel samples it itself (every hundredth step)."""
    if not isinstance(model, DistributedDataParallel):
        return 0.0
    measured = model._get_ddp_logging_data()  # type: ignore[no-untyped-call]
    return float(measured.get("avg_backward_comm_time", 0)) / 1e9
