"""Checkpoints: everything that a training goes on from, in files that cannot run code.

model.safetensors    parameters and buffers
ema.safetensors      their moving average, where there is one; what is predicted with then
optimizer.pt         optimiser state, loadable with weights_only=True
checkpoint.json      written last: step, metrics, configuration, classes, digest of the data, and of the other files
                     their size and SHA-256
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
import pickle
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

FORMAT_VERSION = 2
SIZES_ONLY_VERSION = 1
"""Format whose description holds no digests; still read."""
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
    skipped_steps: int = 0
    """Steps left out so far because of numbers that are not finite."""

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


@dataclass(frozen=True)
class TrainingState:
    """The tensors of a checkpoint, apart from those that a training goes on changing."""

    weights: dict[str, dict[str, torch.Tensor]]
    """State dicts by file name, on the CPU."""
    optimizer: dict[str, Any] | None
    """State dict, on the CPU."""


def capture(
    model: MaskRCNN, optimizer: torch.optim.Optimizer | None, averaged: MaskRCNN | None = None
) -> TrainingState:
    """A copy of a training's state, which can be written while the training goes on.

    Args:
        model: not wrapped in DistributedDataParallel.
        optimizer: None for a checkpoint that is only predicted with.
        averaged: moving average of the model's weights.
    """
    weights = {
        name: {key: _copy_on_cpu(tensor).contiguous() for key, tensor in source.state_dict().items()}
        for name, source in ((MODEL_FILE, model), (AVERAGE_FILE, averaged))
        if source is not None
    }
    return TrainingState(weights, _copy_on_cpu(optimizer.state_dict()) if optimizer is not None else None)


def _copy_on_cpu(value: Any) -> Any:
    """Copies of tensors, also of those in dictionaries and lists, in the order of memory that they have."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copy_on_cpu(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_copy_on_cpu(part) for part in value]
    return copy.copy(value)


def write_checkpoint(
    folder: str,
    model: MaskRCNN,
    optimizer: torch.optim.Optimizer | None,
    description: Description,
    averaged: MaskRCNN | None = None,
) -> None:
    """Write a checkpoint into an empty local folder, its description last; see `capture` and `write_state`."""
    write_state(folder, capture(model, optimizer, averaged), description)


def write_state(folder: str, state: TrainingState, description: Description) -> None:
    """Write a captured state into an empty local folder, every file flushed to the disk, the description last.

    Args:
        folder: that exists.
        state: see `capture`.
        description: see there.

    Raises:
        OSError: the disk is full or out of reach.
    """
    files: dict[str, dict[str, Any]] = {}
    for name, tensors in state.weights.items():
        _write_tensors(tensors, os.path.join(folder, name))
        files[name] = _flush(os.path.join(folder, name))
    if state.optimizer is not None:
        _write_optimizer(state.optimizer, os.path.join(folder, OPTIMIZER_FILE))
        files[OPTIMIZER_FILE] = _flush(os.path.join(folder, OPTIMIZER_FILE))
    content = {"format_version": FORMAT_VERSION, "files": files, **asdict(description)}
    storage.write_bytes(os.path.join(os.path.abspath(folder), DESCRIPTION_FILE), json.dumps(content, indent=1).encode())


def _write_tensors(tensors: dict[str, torch.Tensor], path: str) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # what it makes of a full disk
        raise OSError(f"{path}: {error}") from error


def _write_optimizer(state: dict[str, Any], path: str) -> None:
    """By way of memory: on a full disk torch's own archive writer keeps its file open, and with it the space."""
    content = io.BytesIO()
    torch.save(state, content)
    with open(path, "wb", buffering=0) as file:
        rest = content.getbuffer()
        while rest:
            rest = rest[file.write(rest) :]


def _flush(path: str) -> dict[str, Any]:
    """Have the disk take the file; its size and digest."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def read_description(folder: str) -> Description:
    """What a local folder holds, after a look whether all its files are there in full length.

    Raises:
        UserError: no checkpoint, one that was cut off, or of another format version.
    """
    description, files = _read_manifest(folder)
    for name, expected in files.items():
        path = os.path.join(folder, name)
        found = os.path.getsize(path) if os.path.exists(path) else None
        if found != expected["bytes"]:
            raise UserError(
                f"{path}: {found} bytes, expected {expected['bytes']}; the checkpoint is not whole, take another one"
            )
    return description


def verify_checkpoint(folder: str) -> Description:
    """What a local folder holds, after every byte of its files was compared with the digests of its description.

    Raises:
        UserError: as `read_description`, or with the name of the file that has changed.
    """
    description = read_description(folder)
    for name, expected in _read_manifest(folder)[1].items():
        path = os.path.join(folder, name)
        try:
            with open(path, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error})") from error
        if found != expected.get("sha256", found):
            raise UserError(f"{path}: damaged (its SHA-256 is not that of {DESCRIPTION_FILE}); take another checkpoint")
    return description


def _read_manifest(folder: str) -> tuple[Description, dict[str, dict[str, Any]]]:
    path = os.path.join(folder, DESCRIPTION_FILE)
    try:
        with open(path, "rb") as file:
            return parse_description(file.read(), path)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder}: no checkpoint (there is no {DESCRIPTION_FILE})") from None


def parse_description(content: bytes, path: str) -> tuple[Description, dict[str, dict[str, Any]]]:
    """A description file's content: what it describes, and of each of the other files `bytes` and `sha256`.

    Args:
        content: of the file.
        path: for messages.

    Raises:
        UserError: damaged, or of another format version.
    """
    try:
        values = json.loads(content)
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}); take another checkpoint") from error
    version = values.pop("format_version", None) if isinstance(values, dict) else None
    if version not in (FORMAT_VERSION, SIZES_ONLY_VERSION):
        raise UserError(f"{path}: format version {version}, expected {FORMAT_VERSION}")
    try:
        if version == SIZES_ONLY_VERSION:
            values["files"] = {name: {"bytes": size} for name, size in dict(values.pop("file_sizes")).items()}
        files = {str(name): dict(entry) for name, entry in dict(values.pop("files")).items()}
        if not all(isinstance(entry.get("bytes"), int) for entry in files.values()):
            raise ValueError("files without a size")
        return Description(**values), files
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__} {error}); take another checkpoint") from error


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
    description = verify_checkpoint(folder)
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
