"""Checkpoints: everything that a training goes on from, in files that cannot run code.

model.safetensors    parameters and buffers
ema.safetensors      their moving average, where there is one; what is predicted with then
optimizer.pt         optimiser state, loadable with weights_only=True
checkpoint.json      written last: step, metrics, configuration, classes, digest of the data, size of the other files
"""

from __future__ import annotations

import json
import os
import pickle
import re
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from model.mask_rcnn import MaskRCNN
from pipeline import storage
from pipeline.config import ExperimentConfig
from pipeline.errors import UserError

FORMAT_VERSION = 1
MODEL_FILE, OPTIMIZER_FILE, DESCRIPTION_FILE = "model.safetensors", "optimizer.pt", "checkpoint.json"
AVERAGE_FILE = "ema.safetensors"


@dataclass(frozen=True)
class Description:
    """What a checkpoint is of."""

    step: int
    """Steps done."""
    epoch: float
    """Epochs done."""
    images_per_second: float
    """Speed of the training so far."""
    metrics: dict[str, float]
    """Of the latest evaluation; empty before the first one."""
    class_names: list[str]
    """Names of classes 1..C-1."""
    manifest_digest: str
    """Of the training shards."""
    config: dict[str, Any]
    """The resolved `ExperimentConfig`."""
    evaluations: list[dict[str, float]] = field(default_factory=list)
    """`JUDGED_METRICS` of every evaluation so far."""
    gradient_scaler: dict[str, float] = field(default_factory=dict)
    """State of the loss scale of fp16; empty for other precisions."""

    def experiment(self) -> ExperimentConfig:
        """The configuration, checked.

        Raises:
            UserError: it has keys or values that this version does not know.
        """
        try:
            return ExperimentConfig.model_validate(self.config)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            raise UserError(f"the checkpoint's configuration is of another version: {key}: {first['msg']}") from error


def write_checkpoint(
    folder: str,
    model: MaskRCNN,
    optimizer: torch.optim.Optimizer | None,
    description: Description,
    averaged: MaskRCNN | None = None,
) -> None:
    """Write a checkpoint into an empty local folder, its description last.

    Args:
        folder: that exists.
        model: not wrapped in DistributedDataParallel.
        optimizer: None for a checkpoint that is only predicted with.
        description: see there.
        averaged: moving average of the model's weights.
    """
    files = []
    for name, weights in ((MODEL_FILE, model), (AVERAGE_FILE, averaged)):
        if weights is not None:
            state = {key: tensor.detach().cpu().contiguous() for key, tensor in weights.state_dict().items()}
            save_file(state, os.path.join(folder, name))
            files.append(name)
    if optimizer is not None:
        torch.save(optimizer.state_dict(), os.path.join(folder, OPTIMIZER_FILE))
        files.append(OPTIMIZER_FILE)
    sizes = {name: os.path.getsize(os.path.join(folder, name)) for name in files}
    content = {"format_version": FORMAT_VERSION, "file_sizes": sizes, **asdict(description)}
    storage.write_bytes(os.path.join(os.path.abspath(folder), DESCRIPTION_FILE), json.dumps(content, indent=1).encode())


def read_description(folder: str) -> Description:
    """What a local folder holds, after a look whether it is whole.

    Raises:
        UserError: no checkpoint, one that was cut off, or of another format version.
    """
    path = os.path.join(folder, DESCRIPTION_FILE)
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder}: no checkpoint (there is no {DESCRIPTION_FILE})") from None
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}); take another checkpoint") from error
    version = content.pop("format_version", None) if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(f"{path}: format version {version}, expected {FORMAT_VERSION}")
    try:
        sizes, description = dict(content.pop("file_sizes")), Description(**content)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__} {error}); take another checkpoint") from error
    for name, size in sizes.items():
        file_path = os.path.join(folder, name)
        found = os.path.getsize(file_path) if os.path.exists(file_path) else None
        if found != size:
            raise UserError(
                f"{file_path}: {found} bytes, expected {size}; the checkpoint is not whole, take another one"
            )
    return description


def read_model_state(folder: str, file_name: str = MODEL_FILE) -> dict[str, torch.Tensor]:
    """Parameters and buffers of a local checkpoint.

    Args:
        folder: checkpoint.
        file_name: `MODEL_FILE` or `AVERAGE_FILE`.

    Raises:
        UserError: the file cannot be read.
    """
    path = os.path.join(folder, file_name)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error


def load_model_state(folder: str, model: MaskRCNN, file_name: str = MODEL_FILE) -> None:
    """Put the weights of a checkpoint into a model; nothing is loaded partly.

    Args:
        folder: checkpoint.
        model: changed.
        file_name: `MODEL_FILE` or `AVERAGE_FILE`.

    Raises:
        UserError: the weights are of another architecture or number of classes, with the first difference.
    """
    path = os.path.join(folder, file_name)
    state = read_model_state(folder, file_name)
    expected = model.state_dict()
    for name in sorted(expected.keys() | state.keys()):
        if name not in state or name not in expected:
            where = "the configured model" if name in state else "the checkpoint"
            raise UserError(f"{path}: of another architecture: {where} has no {name}")
        if state[name].shape != expected[name].shape:
            shapes = f"{tuple(state[name].shape)}, the configured model has {tuple(expected[name].shape)}"
            raise UserError(f"{path}: of another architecture or number of classes: {name} is {shapes}")
    model.load_state_dict(state)


def load_optimizer_state(folder: str, optimizer: torch.optim.Optimizer) -> None:
    """Put the optimiser state of a checkpoint into an optimiser of the same model.

    Raises:
        UserError: the checkpoint has none, or it does not fit.
    """
    path = os.path.join(folder, OPTIMIZER_FILE)
    if not os.path.exists(path):
        raise UserError(f"{folder}: has no {OPTIMIZER_FILE}; it can be predicted with, but not trained on")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        problem = (str(error) or "cut off").splitlines()[0]
        raise UserError(f"{path}: damaged ({problem}); take another checkpoint") from error
    try:
        optimizer.load_state_dict(state)
    except (ValueError, KeyError) as error:
        raise UserError(f"{path}: of another optimiser ({error})") from error


def build_model(folder: str) -> tuple[MaskRCNN, Description]:
    """The model of a checkpoint with its weights, averaged ones where it has them, in evaluation mode on the CPU."""
    description = read_description(folder)
    model = MaskRCNN(description.experiment().model, len(description.class_names) + 1)
    load_judged_state(folder, model)
    return model.to(memory_format=torch.channels_last).eval(), description


def judged_file(folder: str) -> str:
    """Name of the file whose weights a checkpoint is evaluated and predicted with: their average, if it has one."""
    return AVERAGE_FILE if os.path.exists(os.path.join(folder, AVERAGE_FILE)) else MODEL_FILE


def load_judged_state(folder: str, model: MaskRCNN) -> None:
    """Put the weights of `judged_file` into a model.

    Raises:
        UserError: as `load_model_state`.
    """
    load_model_state(folder, model, judged_file(folder))


def check_same_classes(description: Description, class_names: list[str], reference: str) -> None:
    """Refuse data of other classes than a checkpoint was trained on.

    Raises:
        UserError: with the first difference.
    """
    if description.class_names == class_names:
        return
    for index in range(max(len(description.class_names), len(class_names))):
        ours = repr(description.class_names[index]) if index < len(description.class_names) else "missing"
        theirs = repr(class_names[index]) if index < len(class_names) else "missing"
        if ours != theirs:
            raise UserError(
                f"{reference}: trained on other classes: class {index + 1} is {ours} there, {theirs} in the data "
                f"({len(description.class_names)} against {len(class_names)} classes)"
            )


def resolve_checkpoint(reference: str, storage_path: str, mlflow_uri: str | None = None) -> str:
    """Local folder of the checkpoint that a user means.

    Args:
        reference: a checkpoint folder, a run folder or the name of a run in storage_path (its best checkpoint), the
            id of an MLflow run (likewise), or a model that MLflow has (`models:/NAME/VERSION`).
        storage_path: where runs are.
        mlflow_uri: tracking server or store of an MLflow run; by default the sqlite file in storage_path.

    Raises:
        UserError: there is no such thing.
    """
    if os.path.exists(os.path.join(reference, DESCRIPTION_FILE)):
        return os.path.abspath(reference)
    for run_folder in (reference, os.path.join(storage_path, reference)):
        checkpoint = best_checkpoint_of_run(run_folder)
        if checkpoint is not None:
            return checkpoint
    if reference.startswith("models:/"):
        from pipeline.tracking import default_uri, download_model

        return download_model(reference, mlflow_uri or default_uri(storage.absolute(storage_path)))
    if re.fullmatch(r"[0-9a-f]{32}", reference):
        from pipeline.tracking import default_uri, download_checkpoint

        return download_checkpoint(reference, mlflow_uri or default_uri(storage.absolute(storage_path)))
    raise UserError(
        f"{reference}: neither a checkpoint folder, nor a run (folder, or name in {storage_path}) with a checkpoint, "
        "nor the id of an MLflow run, nor a registered model (models:/NAME/VERSION)"
    )


def best_checkpoint_of_run(run_folder: str) -> str | None:
    """The whole checkpoint of a run with the largest segm_AP, the latest of equals; None where there is none."""
    if not os.path.isdir(run_folder):
        return None
    candidates = []
    for name in os.listdir(run_folder):
        folder = os.path.join(run_folder, name)
        if os.path.exists(os.path.join(folder, DESCRIPTION_FILE)):
            try:
                description = read_description(folder)
            except UserError:
                continue  # cut off while it was written
            candidates.append((description.metrics.get("segm_AP", -1.0), description.step, os.path.abspath(folder)))
    return max(candidates)[2] if candidates else None
