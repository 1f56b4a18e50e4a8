"""How the global batch is shared out when fewer workers are there than configured; the batch itself never changes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BatchShare:
    """What each worker does in a step."""

    images: int
    """Images a pass."""
    passes: int
    """Passes whose gradients are averaged."""


def batch_share(global_batch_size: int, num_workers: int, most_images: int) -> BatchShare:
    """A worker's share, in as few passes as its memory allows.

    Args:
        global_batch_size: images a step over all workers.
        num_workers: that are there.
        most_images: largest number of images a pass.

    Raises:
        ValueError: the batch does not divide by the workers.
    """
    mine, rest = divmod(global_batch_size, num_workers)
    if rest or mine < 1:
        raise ValueError(f"a global batch of {global_batch_size} does not divide by {num_workers} workers")
    images = max(size for size in range(1, min(most_images, mine) + 1) if mine % size == 0)
    return BatchShare(images, mine // images)


def explain_division(global_batch_size: int, least: int, most: int) -> str | None:
    """Why a number of workers between these cannot share the batch, None where each can."""
    divide = [number for number in range(least, most + 1) if global_batch_size % number == 0]
    bad = sorted(set(range(least, most + 1)) - set(divide))
    if not bad:
        return None
    return (
        f"a global batch of {global_batch_size} images does not divide by {' or '.join(map(str, bad))} workers "
        f"(of {least} to {most}, these divide: {', '.join(map(str, divide))})"
    )
