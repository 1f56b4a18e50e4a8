"""The model of a prediction: whatever `--checkpoint` names, with the thresholds and canvases that are asked for."""

from __future__ import annotations

import hashlib
import json

from model.config import ModelConfig
from model.mask_rcnn import MaskRCNN
from model.weights import is_import, read_weights
from pipeline.checkpoint import load_judged_state, verify_checkpoint
from pipeline.config import ExperimentConfig
from pipeline.errors import UserError
from pipeline.inference import Predictor
from pipeline.initial_weights import Say, build_model_from, find_checkpoint
from pipeline.predict_config import PredictSettings
from pipeline.views import Viewing


def load_predictor(config: ExperimentConfig, checkpoint: str, say: Say) -> Predictor:
    """A model in evaluation mode on the CPU, and how it looks at images.

    Of a checkpoint of ours architecture, canvases and classes are its own; weights of another implementation take the
    architecture and canvases of the configuration, and the classes that their file or `model.weights_classes` names.

    Args:
        config: predict; run, where checkpoints are looked for; model and data.canvases for weights of others.
        checkpoint: a checkpoint or run folder, the id of an MLflow run, a registered model (`models:/NAME/VERSION`), or
            a source as in `model.weights`.
        say: takes lines for a person to read.

    Raises:
        UserError: there is no such thing, or it cannot be used.
    """
    settings = config.predict
    if is_import(checkpoint):
        configured = config.model_copy(update={"model": with_thresholds(config.model, settings)})
        class_names = _class_names(config.model, checkpoint)
        model, report = build_model_from(configured, checkpoint, class_names)
        for line in report.lines():
            say(line)
        experiment = config
    else:
        folder = find_checkpoint(checkpoint, config)
        description = verify_checkpoint(folder)
        experiment, class_names = description.experiment(), description.class_names
        model = MaskRCNN(with_thresholds(experiment.model, settings), len(class_names) + 1)
        load_judged_state(folder, model)
        judged = description.metrics.get("segm_AP")
        known = "" if judged is None else f", segm_AP {judged:.3f}"
        say(f"predict: model {folder}: step {description.step}{known}, {len(class_names)} classes")
    data = experiment.data
    viewing = Viewing(data.canvases, data.short_side, data.resize_method).augmented(settings)
    return Predictor(model.eval(), class_names, viewing, settings.precision)


def with_thresholds(model: ModelConfig, settings: PredictSettings) -> ModelConfig:
    """The model's configuration with the thresholds that are set."""
    asked = settings.detections.model_dump()
    changed = {name: value for name, value in asked.items() if value is not None}
    return model.model_copy(update={"detections": model.detections.model_copy(update=changed)})


def _class_names(model: ModelConfig, source: str) -> list[str]:
    from model.source_weights import WeightsError

    try:
        names = model.weights_classes or read_weights(source, model).class_names
    except WeightsError as error:
        raise UserError(str(error)) from error
    if names is None:
        raise UserError(f"{source}: does not say what its classes are called; name them with --model.weights_classes")
    return list(names)


def model_id(predictor: Predictor) -> str:
    """SHA-256 of the weights, the model's configuration and its classes."""
    model = predictor.model
    digest = hashlib.sha256(json.dumps([model.config.model_dump(mode="json"), predictor.class_names]).encode())
    for name, tensor in sorted(model.state_dict().items()):
        array = tensor.detach().cpu().contiguous().numpy()
        digest.update(f"{name} {array.dtype} {array.shape} ".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
