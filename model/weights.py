"""Initial weights from files of other worlds: what a file holds is fitted to a model, whole or not at all."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import ModelConfig
from model.keras_weights import read_keras_weights
from model.mask_rcnn import MaskRCNN
from model.source_weights import SourceTensor, SourceWeights, WeightsError
from model.torchvision_weights import NOT_A_CLASS, coco_categories, read_torchvision_weights

PARTS = ("backbone", "fpn", "rpn", "box_head", "mask_head")
KERAS, TORCHVISION = "matterport:", "torchvision:"
NUMBERS_PER_CLASS = {"box_head.class_logits": 1, "box_head.box_deltas": 4, "mask_head.mask_logits": 1}
"""Layers with rows for each class."""
COUNTER = ".num_batches_tracked"
BACKGROUND = "background"

_DEPTHS = {(2, 2, 2, 2): 18, (3, 4, 6, 3): 50, (3, 4, 23, 3): 101, (3, 8, 36, 3): 152}
_KEYS = {  # by what an unfit name contains, the key that decides on it; the first that is found
    r"(backbone\.stem\.0|conv\d|downsample\.0)\.bias": "model.norms.convolution_bias",
    r"backbone.*running_(mean|var)": "model.backbone.norm",
    r"backbone": "model.backbone.depth",
    r"fpn": "model.fpn.norm",
    r"rpn\.shared": "model.rpn.num_convolutions",
    r"box_head\.(norms|convolutions\.\d\.bias)": "model.box_head.norm and model.norms.convolution_bias",
    r"box_head": "model.box_head.kind",
    r"mask_head\.(norms|convolutions\.\d\.bias)": "model.mask_head.norm and model.norms.convolution_bias",
    r"mask_head": "model.mask_head.num_convolutions",
}


@dataclass(frozen=True)
class Report:
    """What became of the weights of a file."""

    source: str
    """As the user named it."""
    loaded: dict[str, int]
    """Tensors by part of the model."""
    skipped: dict[str, str]
    """Names in the file, with the reason."""
    initial_parts: tuple[str, ...]
    """Parts of the model that the file does not have, which keep their initial values."""
    classes_loaded: tuple[str, ...]
    """Classes, with background, whose rows come from the file."""
    classes_initial: tuple[str, ...]
    """Classes whose rows keep their initial values."""
    class_rule: str
    """How classes were matched; empty where the file has none."""
    notes: tuple[str, ...]
    """What else to know."""

    def lines(self, most_names: int | None = 8) -> list[str]:
        """The report for people; of longer lists of names so many, or all (None)."""
        parts = ", ".join(f"{part} {number}" for part, number in self.loaded.items() if number)
        lines = [f"weights: {self.source}: {sum(self.loaded.values())} tensors loaded ({parts})"]
        if self.initial_parts:
            lines.append(f"weights: not in the file, at initial values: {', '.join(self.initial_parts)}")
        if self.class_rule:
            lines.append(f"weights: classes: {self.class_rule}")
            lines.append(f"weights: rows from the file: {_names(self.classes_loaded, most_names)}")
        if self.class_rule and self.classes_initial:
            lines.append(f"weights: rows at initial values: {_names(self.classes_initial, most_names)}")
        for reason in dict.fromkeys(self.skipped.values()):
            names = [name for name, why in self.skipped.items() if why == reason]
            lines.append(f"weights: skipped, {reason}: {_names(names, most_names)}")
        return lines + [f"weights: {note}" for note in self.notes]


def is_import(source: str) -> bool:
    """Whether a source is one that `read_weights` knows."""
    return source.startswith((KERAS, TORCHVISION))


def import_weights(source: str, model: MaskRCNN, class_names: Sequence[str]) -> Report:
    """Put the weights of a file into a model, or raise and leave the model as it is.

    Args:
        source: see `read_weights`.
        model: with initial values.
        class_names: of classes 1..C-1 of the model.

    Raises:
        WeightsError: see `read_weights` and `fit_weights`.
    """
    state, report = fit_weights(read_weights(source, model.config), model, class_names)
    model.load_state_dict(state)
    return report


def read_weights(source: str, config: ModelConfig) -> SourceWeights:
    """Read what a source names.

    Args:
        source: `matterport:FILE.h5`, `torchvision:FILE` or `torchvision:NAME`.
        config: of the model that the weights are for; a short NAME is of its box head and depth.

    Raises:
        WeightsError: no such file or name, or one that cannot be read.
    """
    if source.startswith(KERAS):
        coco_names = tuple(name for name in coco_categories() if name not in NOT_A_CLASS)
        return read_keras_weights(source, source.removeprefix(KERAS), coco_names)
    if source.startswith(TORCHVISION):
        return read_torchvision_weights(source, source.removeprefix(TORCHVISION), config)
    raise WeightsError(f"{source}: neither {KERAS}FILE.h5 nor {TORCHVISION}FILE nor {TORCHVISION}NAME")


def fit_weights(
    weights: SourceWeights, model: MaskRCNN, class_names: Sequence[str]
) -> tuple[dict[str, Tensor], Report]:
    """State dict of a model with the weights of a file in place of initial values; the model stays as it is.

    A part of the model (backbone, pyramid, RPN, heads) comes from the file whole, or keeps its initial values where the
    file has nothing of it; the backbone has to be there. Of the layers with rows for each class, those of background
    and of classes of the same name are taken; where the file's names are unknown, all of them in order if their number
    is the same, else background alone.

    Args:
        weights: from `read_weights`, or of another model of ours.
        model: with initial values.
        class_names: of classes 1..C-1 of the model.

    Raises:
        WeightsError: the file is of another architecture, shape or number of classes than it should be; with the
            layer's name in the file and the key that decides on it.
    """
    if len(class_names) != model.num_classes - 1:
        raise ValueError(f"{len(class_names)} class names for a model of {model.num_classes - 1} classes")
    initial = model.state_dict()
    tensors = {_fitting_name(name, model.config): tensor for name, tensor in weights.tensors.items()}
    counters = {name: tensors.pop(name) for name in list(tensors) if name.endswith(COUNTER)}
    _check_names(weights, tensors, initial, model.config)
    _check_values(weights, tensors, initial)
    rows, class_rule = _match_classes(weights, tensors, ("", *class_names), model.config.weights_classes)

    state = {name: tensor.detach().clone() for name, tensor in initial.items()}
    for name, source in (tensors | {k: v for k, v in counters.items() if k in state}).items():
        layer = name.rpartition(".")[0]
        if layer in NUMBERS_PER_CLASS:
            numbers, inner = NUMBERS_PER_CLASS[layer], state[name].shape[1:]
            new = state[name].view(-1, numbers, *inner)
            old = source.tensor.to(new).reshape(-1, numbers, *inner)
            for ours, theirs in rows.items():
                new[ours] = old[theirs]
        else:
            state[name] = source.tensor.to(state[name]).contiguous()
    notes = _check_knobs(weights, model.config)
    if weights.norm_epsilon is not None:
        number = _rescale_norms(state, tensors, weights.norm_epsilon, model.config.norms.epsilon)
        notes.insert(
            0,
            f"trained with norms of epsilon {weights.norm_epsilon:g}: the weights of {number} norms were rescaled "
            f"to {model.config.norms.epsilon:g}, which gives the same numbers",
        )
    of_part = Counter(name.split(".")[0] for name in tensors)
    classes = (BACKGROUND, *class_names)
    report = Report(
        weights.source,
        {part: of_part[part] for part in PARTS},
        dict(weights.skipped),
        tuple(part for part in PARTS if not of_part[part]),
        tuple(classes[i] for i in sorted(rows)) if class_rule else (),
        tuple(name for i, name in enumerate(classes) if i not in rows) if class_rule else (),
        class_rule,
        tuple(notes),
    )
    return state, report


def _fitting_name(name: str, config: ModelConfig) -> str:
    """A pyramid without norms has no sequence of convolution and norm."""
    if config.fpn.norm == "none":
        return re.sub(r"^(fpn\.(?:laterals|smoothing)\.\d)\.0\.", r"\1.", name)
    return name


def _check_names(
    weights: SourceWeights, tensors: Mapping[str, SourceTensor], initial: Mapping[str, Tensor], config: ModelConfig
) -> None:
    """Every name of the file has a place, and every part of the model comes whole or not at all."""
    start = f"{weights.source}: of another architecture"
    present = {name.split(".")[0] for name in tensors}
    if "backbone" not in present:
        names = ", ".join([*(tensor.name for tensor in tensors.values()), *weights.skipped][:5])
        raise WeightsError(f"{weights.source}: has no ResNet as its backbone (it holds {names}, ...)")
    depth = _depth(tensors)
    if depth not in (None, config.backbone.depth):
        raise WeightsError(
            f"{start}: its backbone is a ResNet-{depth}, the configured one a ResNet-{config.backbone.depth}; "
            "see model.backbone.depth"
        )
    where = f" ({weights.preset} fits)" if weights.preset else ""
    for name, tensor in tensors.items():
        if name not in initial:
            raise WeightsError(
                f"{start}: {tensor.name} has no place in the configured model; see {_key_of(name)}{where}"
            )
    missing = [
        name for name in initial if name.split(".")[0] in present and name not in tensors and not name.endswith(COUNTER)
    ]
    if missing and depth is not None and _key_of(missing[0]) == "model.backbone.depth":  # which is right, then
        raise WeightsError(
            f"{weights.source}: not whole: it lacks what would be the model's {_names(missing, 3)}; save the model anew"
        )
    if missing:
        raise WeightsError(
            f"{start}, or not whole: nothing in it is the configured model's {_names(missing, 3)}; "
            f"see {_key_of(missing[0])}{where}"
        )


def _depth(tensors: Mapping[str, SourceTensor]) -> int | None:
    """Layers of the file's ResNet, None if it is none that is known."""
    blocks = {match.groups() for name in tensors if (match := re.match(r"backbone\.stages\.(\d)\.(\d+)\.", name))}
    counts = Counter(stage for stage, _ in blocks)
    depth = _DEPTHS.get((counts["0"], counts["1"], counts["2"], counts["3"]))
    is_basic = "backbone.stages.0.0.conv3.weight" not in tensors
    return 34 if depth == 50 and is_basic else depth


def _key_of(name: str) -> str:
    """Key of the configuration that decides whether there is such a tensor."""
    return next((key for pattern, key in _KEYS.items() if re.search(pattern, name)), "model")


def _check_values(weights: SourceWeights, tensors: Mapping[str, SourceTensor], initial: Mapping[str, Tensor]) -> None:
    """Shapes are those of the model, but for the number of classes; numbers are finite."""
    num_classes = _num_classes(tensors)
    if num_classes == 0:
        raise WeightsError(f"{weights.source}: its layers for classes have no row, not even for background")
    for name, source in tensors.items():
        if source.tensor.layout != torch.strided or source.tensor.is_meta:
            raise WeightsError(f"{weights.source}: {source.name} is no plain tensor with its numbers; save them dense")
        expected = tuple(initial[name].shape)
        layer = name.rpartition(".")[0]
        if layer in NUMBERS_PER_CLASS and num_classes is not None:
            expected = (NUMBERS_PER_CLASS[layer] * num_classes, *expected[1:])
        if tuple(source.tensor.shape) != expected:
            found = source.in_file(source.tensor.shape)
            where = f"; {weights.preset} is the architecture's configuration" if weights.preset else ""
            raise WeightsError(
                f"{weights.source}: {source.name} has shape {found}, the configured model needs "
                f"{source.in_file(expected)}{where}"
            )
        if not source.tensor.is_floating_point():
            raise WeightsError(
                f"{weights.source}: {source.name} holds {source.tensor.dtype}, no floating-point numbers"
            )
        if not torch.isfinite(source.tensor.to(initial[name].dtype)).all():
            raise WeightsError(f"{weights.source}: {source.name} holds numbers that are not finite")
        if name.endswith(".running_var") and (source.tensor < 0).any():
            raise WeightsError(f"{weights.source}: {source.name} holds variances below zero")


def _num_classes(tensors: Mapping[str, SourceTensor]) -> int | None:
    """Classes of the file with background, None where it has no layer with rows for each."""
    for layer, numbers in NUMBERS_PER_CLASS.items():
        if f"{layer}.bias" in tensors:
            return tensors[f"{layer}.bias"].tensor.numel() // numbers
    return None


def _match_classes(
    weights: SourceWeights,
    tensors: Mapping[str, SourceTensor],
    classes: Sequence[str],
    configured_names: Sequence[str] | None,
) -> tuple[dict[int, int], str]:
    """Rows of the model and the file's rows that go there, and the rule in words (empty: the file has no rows).

    Raises:
        WeightsError: model.weights_classes has another number of names than the file has classes.
    """
    number = _num_classes(tensors)
    if number is None:
        return {}, ""
    names, known_from = weights.class_names, weights.class_names_from
    if configured_names is not None and (names is None or weights.class_names_guessed):
        names, known_from = tuple(configured_names), "from model.weights_classes"
    if names is not None:
        if len(names) != number - 1:
            raise WeightsError(
                f"{weights.source}: has {number - 1} classes beside background, but there are {len(names)} names "
                f"{known_from}"
            )
        theirs: dict[str, int] = {}
        for index, name in enumerate(names, start=1):
            if name not in NOT_A_CLASS:
                theirs.setdefault(name, index)
        rows = {0: 0} | {index: theirs[name] for index, name in enumerate(classes) if name in theirs}
        return rows, f"by name ({known_from}), {len(rows) - 1} of {len(classes) - 1}"
    if number == len(classes):
        return {index: index for index in range(number)}, (
            f"the file does not name its {number - 1}: taken in order (model.weights_classes names them)"
        )
    return {0: 0}, (
        f"the file does not name its {number - 1}, and the model has {len(classes) - 1}: background alone is taken "
        "(model.weights_classes names them)"
    )


def _rescale_norms(
    state: dict[str, Tensor], tensors: Mapping[str, SourceTensor], epsilon_before: float, epsilon: float
) -> int:
    """Change the scale of norms so that another epsilon gives the same numbers.

    Returns:
        Number of norms.
    """
    names = [name.removesuffix(".running_var") for name in tensors if name.endswith(".running_var")]
    for name in names:
        variance = state[f"{name}.running_var"].double()
        weight = state[f"{name}.weight"]
        factor = ((variance + epsilon) / (variance + epsilon_before)).sqrt()
        state[f"{name}.weight"] = (weight.double() * factor).to(weight)
    return len(names)


def _check_knobs(weights: SourceWeights, config: ModelConfig) -> list[str]:
    """A note on knobs that change no shape, but with which the weights were not trained."""
    differences = []
    for key, there in weights.knobs.items():
        here: object = config
        for part in key.split("."):
            here = getattr(here, part)
        if not _are_equal(here, there) and not (key == "norms.epsilon" and weights.norm_epsilon is not None):
            differences.append(f"model.{key} {_show(here)} (there {_show(there)})")
    if not differences:
        return []
    hint = f"; {weights.preset} has the values of the original" if weights.preset else ""
    return [f"the model computes otherwise than the one these weights were trained in: {', '.join(differences)}{hint}"]


def _are_equal(one: object, other: object) -> bool:
    """Also where a number was written with fewer digits."""
    if isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(other):
        return all(map(_are_equal, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-3)
    return one == other


def _show(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_show, value))}]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _names(names: Sequence[str], most: int | None) -> str:
    if most is None or len(names) <= most:
        return ", ".join(names)
    return f"{', '.join(names[:most])} and {len(names) - most} more"
