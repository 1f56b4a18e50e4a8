"""Writes checkpoints beside the training: rank 0 copies the state and goes on, a thread brings it to the storage."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from model.mask_rcnn import MaskRCNN
from pipeline.checkpoint import Description, TrainingState, write_state
from pipeline.checkpoint_store import CheckpointStore
from pipeline.config import CheckpointSettings
from pipeline.errors import UserError


class CheckpointWriter:
    """Of rank 0; at most one checkpoint is under way."""

    def __init__(self, store: CheckpointStore, settings: CheckpointSettings) -> None:
        self._store, self._settings = store, settings
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._written: Future[None] | None = None

    def start(self, state: TrainingState, description: Description, before_it_counts: Callable[[], None]) -> None:
        """Begin to write; the one before has to be finished.

        Args:
            state: a copy, see `capture`.
            description: of it.
            before_it_counts: see `CheckpointStore.commit`; called in the thread.
        """
        assert self._written is None
        self._written = self._threads.submit(self._write, state, description, before_it_counts)

    def _write(self, state: TrainingState, description: Description, before_it_counts: Callable[[], None]) -> None:
        self._store.commit(description.step, lambda folder: write_state(folder, state, description), before_it_counts)
        self._store.prune(self._settings.keep_best, self._settings.keep_last)

    def finish(self) -> str | None:
        """Wait until the checkpoint under way, if there is one, is whole.

        Returns:
            Why it could not be written, None where it was.
        """
        written, self._written = self._written, None
        if written is None:
            return None
        try:
            written.result()
        except (UserError, OSError) as error:
            return str(error)
        return None


def checkpoint_bytes(model: MaskRCNN, optimizer: torch.optim.Optimizer, averaged: MaskRCNN | None) -> int:
    """About how large a checkpoint is: weights, their average, and what the optimiser keeps for each of them."""
    weights: int = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    learning: int = sum(p.numel() * p.element_size() for group in optimizer.param_groups for p in group["params"])
    kept_of_each = 2 if isinstance(optimizer, torch.optim.AdamW) else int(bool(optimizer.defaults["momentum"]))
    return weights * (2 if averaged is not None else 1) + learning * kept_of_each
