"""Variants of a computation in one process, timed in turns with the roof of their type, and the rows of their table."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.roof import gigaflops_of, roof

RATIOS = ("times torchvision fp32", "times torchvision bf16")
SPEEDS = ("GFLOP/s", "of the roof")
PEER_FP32, PEER_BF16 = "torchvision fp32", "torchvision bf16, channels last"


@dataclass(frozen=True)
class Variant:
    """What is timed, and the type that it computes in; None is float32."""

    run: Callable[[], Any]
    dtype: torch.dtype | None


@dataclass(frozen=True)
class Timed:
    """Of a variant, or of a roof."""

    gigaflops: float
    seconds: list[float]
    """Of CPU time, one a round."""

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    @property
    def speed(self) -> float:
        """GFLOP/s."""
        return self.gigaflops / self.median


def time_in_turns(
    variants: dict[str, Variant], rounds: int
) -> tuple[dict[str, Timed], dict[torch.dtype | None, Timed]]:
    """Variants, and the roofs of their types; a round before the others warms up, and counts operations."""
    roofs = {dtype: roof(dtype) for dtype in dict.fromkeys(variant.dtype for variant in variants.values())}
    runs = [*(variant.run for variant in variants.values()), *roofs.values()]
    timed = [Timed(gigaflops_of(run), []) for run in runs]
    for _ in range(rounds):
        for run, result in zip(runs, timed, strict=True):
            started = time.process_time()
            run()
            result.seconds.append(time.process_time() - started)
    number = len(variants)
    return dict(zip(variants, timed[:number], strict=True)), dict(zip(roofs, timed[number:], strict=True))


def raw_of(timed: dict[str, Timed], roofs: dict[torch.dtype | None, Timed]) -> dict[str, Any]:
    """All that the rows come from."""
    named_roofs = {f"roof, {dtype or torch.float32}": of for dtype, of in roofs.items()}
    return {name: {"gigaflops": of.gigaflops, "seconds": of.seconds} for name, of in (timed | named_roofs).items()}


def rows_of(
    variants: dict[str, Variant],
    timed: dict[str, Timed],
    roofs: dict[torch.dtype | None, Timed],
    show: Callable[[float], str],
    images: int,
) -> list[Sequence[str]]:
    """Rows under a name, a time, `RATIOS`, operations and `SPEEDS`.

    The last row is a bound: the operations of the fastest of ours, at the speed of the roof and nothing else.

    Args:
        variants: what was timed.
        timed: how long it took.
        roofs: of the types.
        show: seconds as they stand in the table.
        images: that a run computes, which the operations are divided by; 1 for those of a run.
    """

    def row(name: str, seconds: float, gigaflops: float, roof: float) -> Sequence[str]:
        ratios = [f"{timed[peer].median / seconds:.2f}" if peer in timed else "-" for peer in (PEER_FP32, PEER_BF16)]
        speed = gigaflops / seconds
        return [
            name,
            show(seconds),
            *ratios,
            f"{gigaflops / images:.0f}",
            f"{speed:.0f}",
            f"{100 * speed / roof:.0f} %",
        ]

    rows = [row(name, of.median, of.gigaflops, roofs[variants[name].dtype].speed) for name, of in timed.items()]
    fastest = min((name for name in timed if name.startswith("ours")), key=lambda name: timed[name].median)
    speed, work = roofs[variants[fastest].dtype].speed, timed[fastest].gigaflops
    return [*rows, row(f"bound: {fastest} wholly at the roof", work / speed, work, speed)]
