"""What is kept of a step whose loss or gradient is not finite, and how it is computed again.

`nonfinite/step-N.json` in the run's folder names the images of every worker with their boxes, each loss, the learning
rate, the loss scale and the norms of the gradient by part of the model. Beside it lie the batches and the weights, so
that `jobs/replay.py` needs nothing else.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from model.losses import LOSS_NAMES
from model.mask_rcnn import MaskRCNN
from model.structures import Batch
from pipeline import storage
from pipeline.batches import collate
from pipeline.config import ExperimentConfig
from pipeline.errors import UserError
from pipeline.shards import ShardSet
from pipeline.stream import LoadBlock, StreamPlan
from pipeline.training import STEP_METRICS, accumulate_gradients

FOLDER = "nonfinite"
SMALLEST_SCALE = 2.0**-8
"""Loss scale of fp16 below which every gradient overflows, whatever the scale: it begins at 2 ** 16."""


@dataclass(frozen=True)
class PlannedStep:
    """What one worker sees in one step, made again from the plan: the same bytes as in the training."""

    images: list[dict[str, Any]]
    """Of each image its row, id, file, and the boxes (xyxy, input pixels) and classes of its objects."""
    batches: list[Batch]
    """One a pass, on the CPU."""


def planned_step(
    plan: StreamPlan, load_block: LoadBlock, shards: ShardSet, step: int, worker: int, num_workers: int, passes: int
) -> PlannedStep:
    """Read what one worker sees in one step.

    Args:
        plan: order.
        load_block: as the stream uses it.
        shards: training data.
        step: number, 0 is the first.
        worker: its rank.
        num_workers: W.
        passes: batches that a worker's part of a step is cut into.
    """
    ((_, epochs, rows),) = plan.steps(step, step + 1)
    size = plan.global_batch_size // num_workers
    first = step * plan.global_batch_size + worker * size
    mine = slice(worker * size, (worker + 1) * size)
    planned = zip(range(first, first + size), epochs[mine].tolist(), rows[mine].tolist(), strict=True)
    loaded = [load_block.load(shards, *place) for place in planned]
    images = []
    for values in loaded:
        row = shards.read_row(values["row"])
        boxes = values["boxes"].reshape(-1, 4).tolist()
        images.append(
            {
                "row": values["row"],
                "image_id": int(row["image_id"]),
                "file_name": row["file_name"],
                "boxes": boxes,
                "classes": [int(number) for number in values["classes"]],
            }
        )
    per_pass = size // passes
    active = shards.manifest.active_classes()
    batches = [collate(loaded[start : start + per_pass], active) for start in range(0, size, per_pass)]
    return PlannedStep(images, batches)


def is_bad(values: Sequence[float]) -> bool:
    """Whether a step's numbers, in the order of `STEP_METRICS`, are not all finite."""
    return not all(math.isfinite(value) for value in values)


def computed_again(
    model: MaskRCNN, batches: Sequence[Batch], config: ExperimentConfig, dtype: torch.dtype | None
) -> dict[str, Any]:
    """Losses and gradient of one worker's batches alone, with the model's present weights; the model stays as it is.

    Returns:
        losses: the sum and each of the five.
        gradient_norms: of each part of the model (backbone, fpn, ...).
        first_bad_gradient: name of the first parameter, from the losses backwards, whose gradient is not finite.
    """
    copied = copy.deepcopy(model).train()
    copied.zero_grad(set_to_none=True)
    values = accumulate_gradients(copied, batches, config.model.losses, dtype)
    bad = [
        name
        for name, parameter in copied.named_parameters()
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all()
    ]
    return {
        "losses": dict(zip(("loss", *LOSS_NAMES), values.tolist(), strict=True)),
        "gradient_norms": {
            part: _norm([p.grad for p in child.parameters()]) for part, child in copied.named_children()
        },
        "first_bad_gradient": bad[-1] if bad else None,
    }


def _norm(gradients: Sequence[Tensor | None]) -> float:
    there = [gradient for gradient in gradients if gradient is not None]
    return float(nn.utils.get_total_norm(there)) if there else 0.0


def record_path(run_folder: str, step: int) -> str:
    """Where the record of a step lies."""
    return storage.join(run_folder, f"{FOLDER}/step-{step}.json")


def batch_file(step: int, worker: int, number: int) -> str:
    """Name of a batch in the run's folder."""
    return f"{FOLDER}/step-{step}-worker-{worker}-pass-{number}.safetensors"


def write_batches(run_folder: str, step: int, worker: int, batches: Sequence[Batch]) -> list[str]:
    """Write a worker's batches; their names in the run's folder."""
    names = [batch_file(step, worker, number) for number in range(len(batches))]
    for name, batch in zip(names, batches, strict=True):
        tensors = {field.name: getattr(batch, field.name) for field in fields(batch)}
        tensors["images"] = tensors["images"].permute(0, 2, 3, 1)  # as they lie in memory
        content = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
        storage.write_bytes(storage.join(run_folder, name), save(content))
    return names


def write_record(
    run_folder: str,
    step: int,
    values: Sequence[float],
    workers: Sequence[Mapping[str, Any]],
    model: MaskRCNN,
    further: Mapping[str, Any],
) -> str:
    """Write the weights, and last the record that names all the other files.

    Args:
        run_folder: path or URL.
        step: number of the step.
        values: of the step over all workers, in the order of `STEP_METRICS`.
        workers: what each of them has to tell.
        model: with the weights that the step saw.
        further: learning rate, scale, configuration and the like.

    Returns:
        Path or URL of the record.
    """
    weights = f"{FOLDER}/step-{step}-weights.safetensors"
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in model.state_dict().items()}
    storage.write_bytes(storage.join(run_folder, weights), save(state))
    record = {
        "step": step,
        **dict(zip(STEP_METRICS, values, strict=True)),
        **further,
        "workers": list(workers),
        "weights": weights,
    }
    path = record_path(run_folder, step)
    storage.write_bytes(path, json.dumps(_for_json(record), indent=1, allow_nan=False).encode())
    return path


def _for_json(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _for_json(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_for_json(part) for part in value]
    return value


def read_record(path: str) -> tuple[dict[str, Any], str]:
    """A record, and the folder of the run that it belongs to.

    Raises:
        UserError: there is none, or it is damaged.
    """
    try:
        record: dict[str, Any] = json.loads(storage.read_bytes(storage.absolute(path)))
        return {**record, "workers": list(record["workers"])}, path.rpartition("/")[0].rpartition("/")[0] or "."
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not the record of a step ({type(error).__name__} {error})") from error


def read_tensors(run_folder: str, name: str) -> dict[str, Tensor]:
    """Tensors of one of a record's files.

    Raises:
        UserError: it is missing or damaged.
    """
    path = storage.join(storage.absolute(run_folder), name)
    try:
        return load(storage.read_bytes(path))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error


def read_batch(run_folder: str, name: str) -> Batch:
    """One of a record's batches, on the CPU."""
    tensors = read_tensors(run_folder, name)
    tensors["images"] = tensors["images"].permute(0, 3, 1, 2)
    return Batch(**tensors)
