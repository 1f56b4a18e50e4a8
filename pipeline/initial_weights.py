"""Where a training begins: `model.weights`, read once by the driver and laid into the run's folder for the workers."""

from __future__ import annotations

import functools
import operator
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from model.mask_rcnn import MaskRCNN
from model.source_weights import SourceTensor, SourceWeights, WeightsError, one_line
from model.weights import Report, fit_weights, is_import, read_weights
from pipeline import run_state, storage
from pipeline.checkpoint import judged_file, read_model_state, verify_checkpoint
from pipeline.checkpoint_reference import resolve_checkpoint
from pipeline.config import ExperimentConfig
from pipeline.errors import UserError

Say = Callable[[str], None]
NONE = "none"
KNOBS = (
    "pixel_mean", "pixel_std", "padding", "image_position", "boxes", "norms.epsilon", "backbone.variant",
    "anchors.ratios", "anchors.rounded", "rpn.delta_scale", "box_head.delta_scale", "roi.pooling",
)  # fmt: skip
"""Keys of the model that change no shape, but what its weights mean."""
INITIAL_WEIGHTS_FILE = "initial_weights.safetensors"


@dataclass(frozen=True)
class InitialWeights:
    """Weights that a run begins with."""

    path: str
    """Where the workers find them, in the run's folder."""
    state: dict[str, Tensor] | None
    """Of the whole model; None where the file is there from when the run was begun."""
    report: Report | None
    """What became of the source; None likewise."""

    def write(self) -> None:
        """Write the file, whole or not at all, where it is not there yet."""
        if self.state is not None:
            storage.write_bytes(self.path, safetensors.torch.save(self.state))


def initial_weights(config: ExperimentConfig, class_names: Sequence[str], say: Say) -> InitialWeights | None:
    """What `model.weights` means for a run; needs no Ray and writes nothing.

    Args:
        config: whole.
        class_names: of classes 1..C-1 of the data.
        say: takes lines for a person to read.

    Returns:
        None for random weights. Of a run that was begun before, its file: the source is not read again.

    Raises:
        UserError: the source cannot be used.
    """
    if config.model.weights == NONE:
        return None
    folder = run_state.run_folder(config)
    path = storage.join(folder, INITIAL_WEIGHTS_FILE)
    if run_state.read_run(folder) is not None and storage.exists(path):
        return InitialWeights(path, None, None)
    model, report = build_model_from(config, config.model.weights, class_names)
    for line in report.lines():
        say(line)
    return InitialWeights(path, dict(model.state_dict()), report)


def build_model_from(config: ExperimentConfig, source: str, class_names: Sequence[str]) -> tuple[MaskRCNN, Report]:
    """The configured model on the CPU with the weights of a source; initial values are those that workers would draw.

    Args:
        config: model, train.seed, and run, where runs are looked for.
        source: as `model.weights`, not "none".
        class_names: of classes 1..C-1.

    Raises:
        UserError: the source cannot be used.
    """
    try:
        weights = read_weights(source, config.model) if is_import(source) else _read_checkpoint(source, config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.train.seed)
            model = MaskRCNN(config.model, len(class_names) + 1)
        state, report = fit_weights(weights, model, class_names)
    except WeightsError as error:
        raise UserError(str(error)) from error
    model.load_state_dict(state)
    return model, report


def check_source(config: ExperimentConfig, source: str) -> None:
    """Refuse a source that is not there or cannot be read; whether it fits a model shows with the model.

    Args:
        config: model, and run, where runs are looked for.
        source: as `model.weights`.

    Raises:
        UserError: the source cannot be used.
    """
    try:
        if is_import(source):
            read_weights(source, config.model)
        elif source != NONE:
            find_checkpoint(source, config)
    except WeightsError as error:
        raise UserError(str(error)) from error


def load_initial_weights(path: str, model: MaskRCNN) -> None:
    """Put the weights that a run begins with into the model.

    Raises:
        UserError: the file is gone, or is not what was written.
    """
    try:
        model.load_state_dict(safetensors.torch.load(storage.read_bytes(path)))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(f"{path}: cannot be loaded ({one_line(error)}); begin a new run with --run.name") from error


def find_checkpoint(reference: str, config: ExperimentConfig) -> str:
    """Local folder of a checkpoint of ours.

    Raises:
        UserError: there is none, or it is a file of another implementation without its prefix.
    """
    prefixes = {".h5": "matterport:", ".hdf5": "matterport:", ".pth": "torchvision:", ".pt": "torchvision:"}
    prefix = prefixes.get(os.path.splitext(reference)[1].lower())
    if prefix is not None:
        raise UserError(f"{reference}: no checkpoint of ours; say whose file it is: {prefix}{reference}")
    return resolve_checkpoint(reference, config.run.storage_path, config.run.mlflow_uri)


def _read_checkpoint(reference: str, config: ExperimentConfig) -> SourceWeights:
    folder = find_checkpoint(reference, config)
    description = verify_checkpoint(folder)
    there = description.experiment().model.model_dump()
    return SourceWeights(
        reference,
        {name: SourceTensor(name, tensor) for name, tensor in read_model_state(folder, judged_file(folder)).items()},
        class_names=tuple(description.class_names),
        class_names_from="those of the checkpoint",
        knobs={key: functools.reduce(operator.getitem, key.split("."), there) for key in KNOBS},
    )
