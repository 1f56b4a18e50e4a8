"""A recorded step computed again, from its record alone."""

from __future__ import annotations

import math
from typing import Any

import torch
from pydantic import ValidationError

from model.mask_rcnn import MaskRCNN
from pipeline.config import ExperimentConfig
from pipeline.errors import UserError
from pipeline.nonfinite import computed_again, read_batch, read_record, read_tensors
from pipeline.training import autocast_dtype


def replay(step_file: str, precision: str | None = None) -> dict[str, Any]:
    """Compute every worker's part of a recorded step.

    Args:
        step_file: record, see `pipeline.nonfinite`.
        precision: "fp32", "bf16" or "fp16"; None for that of the training.

    Returns:
        step; is_finite (whether all losses and gradients are); same_losses (whether the losses are those recorded, to
        the bit, which the same kind of processor gives); workers: for each rank, image_ids and what `computed_again`
        returns.

    Raises:
        UserError: a file is missing or damaged.
    """
    record, run_folder = read_record(step_file)
    try:
        config = ExperimentConfig.model_validate(record["config"])
        model = MaskRCNN(config.model, len(record["class_names"]) + 1)
        model.load_state_dict(read_tensors(run_folder, record["weights"]))
    except (KeyError, RuntimeError, ValidationError) as error:
        raise UserError(f"{step_file}: does not fit this version ({str(error).splitlines()[0]})") from error
    device = "cuda" if record["device"] == "cuda" and torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(config.scaling.cpus_per_worker)
    model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    dtype = autocast_dtype(precision or record["precision"], device)
    workers = []
    for worker in record["workers"]:
        batches = [read_batch(run_folder, name).to(device) for name in worker["batches"]]
        image_ids = [image["image_id"] for image in worker["images"]]
        workers.append(
            {"rank": worker["rank"], "image_ids": image_ids, **computed_again(model, batches, config, dtype)}
        )
    found = [value for worker in workers for name in ("losses", "gradient_norms") for value in worker[name].values()]
    return {
        "step": record["step"],
        "is_finite": all(math.isfinite(value) for value in found),
        "same_losses": all(
            _same(worker["losses"], recorded["losses"])
            for worker, recorded in zip(workers, record["workers"], strict=True)
        ),
        "workers": workers,
    }


def _same(found: dict[str, float], recorded: dict[str, Any]) -> bool:
    """Numbers that are not finite are text in a record."""
    return all(str(value) == str(float(recorded[name])) for name, value in found.items())
