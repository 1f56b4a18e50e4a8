"""Times of the parts of a step: sampled, complete, and about right."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from model.structures import Batch
from pipeline.ledger import FIRST_SAMPLED, PARTS, SAMPLED_EVERY, StepLedger, peak_memory_megabytes
from tests.pipeline.small import small_batch


class Slow(nn.Module):
    """A forward pass of 20 ms and a backward pass of 40."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, _: Batch) -> Tensor:
        time.sleep(0.02)
        loss = self.weight.sum()
        if loss.requires_grad:
            loss.register_hook(lambda _: time.sleep(0.04))  # type: ignore[no-untyped-call]
        return loss


def slow_batches() -> Iterator[Batch]:
    batch = small_batch(1)
    while True:
        time.sleep(0.01)
        yield batch


def to_device(batch: Batch) -> Batch:
    time.sleep(0.005)
    return batch


def run_steps(steps: int, passes: int = 1) -> StepLedger:
    model = Slow()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ledger = StepLedger(model, optimizer, torch.device("cpu"))
    batches = slow_batches()
    assert ledger.means() == {}
    for step in range(steps):
        of_step = [ledger.next_batch(step, batches, to_device) for _ in range(passes)]
        for batch in of_step:
            model(batch).backward()
        optimizer.step()
    return ledger


def test_parts_take_what_they_take() -> None:
    means = run_steps(FIRST_SAMPLED + 2).means()
    assert set(means) == {f"seconds_{name}" for name in PARTS}
    expected = {"data_wait": 0.01, "copy": 0.005, "forward": 0.02, "backward": 0.04}
    for name, seconds in expected.items():
        assert means[f"seconds_{name}"] >= seconds
    assert means["seconds_backward"] > means["seconds_forward"] > means["seconds_copy"]
    assert means["seconds_optimizer"] > 0
    assert means["seconds_all_reduce"] == 0


def test_several_batches_a_step_add_up() -> None:
    means = run_steps(FIRST_SAMPLED + 1, passes=2).means()
    assert means["seconds_forward"] >= 0.04
    assert means["seconds_backward"] >= 0.08
    assert means["seconds_data_wait"] >= 0.02


def test_only_every_tenth_step_is_sampled_and_evaluation_never() -> None:
    ledger = run_steps(FIRST_SAMPLED + SAMPLED_EVERY + 2)
    assert ledger._samples == 2
    with torch.no_grad():
        ledger._model(small_batch(1))
    assert len(ledger._intervals["forward"]) == 2


def test_a_step_without_an_update_is_left_out() -> None:
    ledger = run_steps(FIRST_SAMPLED + SAMPLED_EVERY)
    before = ledger.means()
    batch = ledger.next_batch(FIRST_SAMPLED + SAMPLED_EVERY, slow_batches(), to_device)
    ledger._model(batch).backward()  # and no update
    ledger.next_batch(FIRST_SAMPLED + SAMPLED_EVERY + 1, slow_batches(), to_device)
    assert ledger._samples == 1
    assert ledger.means() == before


def test_the_first_wait_is_told_apart() -> None:
    """Until the stream runs, seconds go by: they would be the mean's greatest part."""

    def late_batches() -> Iterator[Batch]:
        time.sleep(0.2)
        yield from slow_batches()

    model = Slow()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ledger = StepLedger(model, optimizer, torch.device("cpu"))
    batches = late_batches()
    for step in range(100, 100 + FIRST_SAMPLED + 1):  # after a resume
        model(ledger.next_batch(step, batches, to_device)).backward()
        optimizer.step()
    assert ledger.first_batch_seconds is not None
    assert ledger.first_batch_seconds >= 0.2
    assert 0.01 <= ledger.means()["seconds_data_wait"] < ledger.first_batch_seconds


def test_peak_of_memory_is_at_least_what_is_held_and_in_megabytes() -> None:
    held = bytearray(150_000_000)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    resident = pages * os.sysconf("SC_PAGE_SIZE") / 1e6
    assert resident > len(held) / 1e6
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e6
    assert resident <= peak_memory_megabytes(torch.device("cpu")) + 1 < machine
