"""State dicts of torchvision's Mask R-CNN (v1 and v2) and ResNets, by file or by the name of its weights."""

from __future__ import annotations

import argparse
import hashlib
import os
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision import models

from model.box_head import flat_columns
from model.config import ModelConfig
from model.source_weights import SourceTensor, SourceWeights, WeightsError, one_line

NO_LAYER, CLASSIFIER = "no layer of the model", "classifier of ImageNet"
FIRST_LAYER = "box_head.fully_connected.0.weight"
COCO_CLASSES = 91  # category ids 0 to 90, some of which are unused
NOT_A_CLASS = ("__background__", "N/A")
EPSILON_ZERO = ("bf2d0c1e", "258fb6c6")
"""First digits of the SHA-256 of published files (Mask and Faster R-CNN, v1) whose norms have epsilon 0."""
SHORT_NAMES = ("COCO_V1", "IMAGENET1K_V1", "IMAGENET1K_V2")

_KNOBS: dict[str, object] = {
    "norms.epsilon": 1e-5,
    "backbone.variant": "torchvision",
    "pixel_mean": (0.485, 0.456, 0.406),
    "pixel_std": (0.229, 0.224, 0.225),
}
_DETECTION_KNOBS: dict[str, object] = {
    "anchors.ratios": (2.0, 1.0, 0.5),
    "anchors.rounded": True,
    "rpn.delta_scale": (1.0, 1.0, 1.0, 1.0),
    "roi.pooling": "unaligned",
}
# Names before torchvision 0.13 have one number less, as the published v1 files still do.
_RULES: list[tuple[re.Pattern[str], str]] = [
    (re.compile(pattern), ours)
    for pattern, ours in (
        (r"(?:backbone\.body\.)?conv1\.(\w+)", r"backbone.stem.0.\1"),
        (r"(?:backbone\.body\.)?bn1\.(\w+)", r"backbone.stem.1.\1"),
        *((rf"(?:backbone\.body\.)?layer{n + 1}\.(.+)", rf"backbone.stages.{n}.\1") for n in range(4)),
        (r"backbone\.fpn\.inner_blocks\.(\d)\.([01]\.)(\w+)", r"fpn.laterals.\1.\2\3"),
        (r"backbone\.fpn\.inner_blocks\.(\d)\.(\w+)", r"fpn.laterals.\1.0.\2"),
        (r"backbone\.fpn\.layer_blocks\.(\d)\.([01]\.)(\w+)", r"fpn.smoothing.\1.\2\3"),
        (r"backbone\.fpn\.layer_blocks\.(\d)\.(\w+)", r"fpn.smoothing.\1.0.\2"),
        (r"rpn\.head\.conv\.(\d)\.0\.(\w+)", r"rpn.shared.\1.\2"),
        (r"rpn\.head\.conv\.(\w+)", r"rpn.shared.0.\1"),
        (r"rpn\.head\.cls_logits\.(\w+)", r"rpn.class_logits.\1"),
        (r"rpn\.head\.bbox_pred\.(\w+)", r"rpn.box_deltas.\1"),
        (r"roi_heads\.box_head\.fc6\.(\w+)", r"box_head.fully_connected.0.\1"),
        (r"roi_heads\.box_head\.fc7\.(\w+)", r"box_head.fully_connected.1.\1"),
        (r"roi_heads\.box_head\.(\d)\.0\.(\w+)", r"box_head.convolutions.\1.\2"),
        (r"roi_heads\.box_head\.(\d)\.1\.(\w+)", r"box_head.norms.\1.\2"),
        (
            r"roi_heads\.box_head\.5\.(\w+)",
            r"box_head.fully_connected.0.\1",
        ),  # four convolutions and a flattening before it
        (r"roi_heads\.box_predictor\.cls_score\.(\w+)", r"box_head.class_logits.\1"),
        (r"roi_heads\.box_predictor\.bbox_pred\.(\w+)", r"box_head.box_deltas.\1"),
        (r"roi_heads\.mask_head\.(\d)\.0\.(\w+)", r"mask_head.convolutions.\1.\2"),
        (r"roi_heads\.mask_head\.(\d)\.1\.(\w+)", r"mask_head.norms.\1.\2"),
        *((rf"roi_heads\.mask_head\.mask_fcn{n + 1}\.(\w+)", rf"mask_head.convolutions.{n}.\1") for n in range(9)),
        (r"roi_heads\.mask_predictor\.conv5_mask\.(\w+)", r"mask_head.upsampling.\1"),
        (r"roi_heads\.mask_predictor\.mask_fcn_logits\.(\w+)", r"mask_head.mask_logits.\1"),
    )
]


def coco_categories() -> tuple[str, ...]:
    """Names of category ids 1 to 90; ids that COCO does not use are called "N/A"."""
    return tuple(models.detection.MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"][1:])


def read_torchvision_weights(source: str, reference: str, config: ModelConfig) -> SourceWeights:
    """Read a state dict.

    Args:
        source: what to call it in messages.
        reference: a file (.pth or .safetensors), or the name of weights that torchvision downloads, in full or short:
            COCO_V1 and IMAGENET1K_V1 or _V2 are those of the configured box head and depth.
        config: of the model that the weights are for.

    Raises:
        WeightsError: no such file or name, no network, a damaged file, one that wants to run code, one without a
            single layer of the model.
    """
    path = Path(os.path.expanduser(reference))
    if not reference:
        raise WeightsError(f"{source}FILE or {source}NAME: which one is missing")
    if os.path.exists(path):
        state, pool_size = read_state_dict(source, path), config.box_head.pool_size
        return _under_our_names(source, state, pool_size, _is_epsilon_zero(path))
    if reference not in SHORT_NAMES and not re.fullmatch(r"\w+_Weights\.\w+", reference):
        raise WeightsError(
            f"{source}: no such file, nor the name of weights (short: {', '.join(SHORT_NAMES)}; in full: "
            "MaskRCNN_ResNet50_FPN_Weights.COCO_V1)"
        )
    weights = _find_weights(source, reference, config)
    state = _download(source, weights)
    categories = tuple(weights.meta.get("categories", ()))
    return _under_our_names(
        f"{source} ({weights})" if str(weights) != reference else source,
        state,
        config.box_head.pool_size,
        any(f"-{digits}." in weights.url for digits in EPSILON_ZERO),
        class_names=categories[1:] if categories[:1] == NOT_A_CLASS[:1] else None,
    )


def read_state_dict(source: str, path: Path) -> dict[str, Tensor]:
    """Tensors of a file that holds a state dict, or a training checkpoint with one in it; no code is run.

    Raises:
        WeightsError: see `read_torchvision_weights`.
    """
    if path.is_dir():
        raise WeightsError(f"{source}: a folder, not a file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            # Options in a training checkpoint are a Namespace; what torch warns of is said below.
            with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings(action="ignore"):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(f"{source}: {_explain_refusal(error)}") from error
    except Exception as error:  # bytes that make no sense end in errors of many kinds
        raise WeightsError(f"{source}: no state dict of PyTorch, or a damaged file ({one_line(error)})") from error
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise WeightsError(f"{source}: no state dict, but {type(content).__name__}; save model.state_dict()")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            what = f"is no tensor, but {type(value).__name__}" if isinstance(name, str) else "is no name"
            raise WeightsError(f"{source}: no state dict: {name!r} {what}; save model.state_dict()")
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}


def _explain_refusal(error: pickle.UnpicklingError) -> str:
    """What `torch.load` did not want to unpickle."""
    text = str(error)
    if wanted := re.search(r"GLOBAL (\S+)", text):
        return (
            f"its pickle asks for {wanted[1].rstrip('.')}, which weights do not need: nothing was run or loaded; "
            "save model.state_dict() alone"
        )
    reason = re.search(r"WeightsUnpickler error:\s*(.+)", text)  # without the advice to unpickle it nevertheless
    return f"no state dict of PyTorch, or a damaged file ({reason[1] if reason else 'no pickle that it could be'})"


def _is_epsilon_zero(path: Path) -> bool:
    """Whether a file is one of those that were published with norms of epsilon 0, by its content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest().startswith(EPSILON_ZERO)


def _find_weights(source: str, name: str, config: ModelConfig) -> Any:
    """Entry of torchvision's weights."""
    if name == "COCO_V1":
        version = "_V2" if config.box_head.kind == "conv4fc1" else ""
        name = f"MaskRCNN_ResNet50_FPN{version}_Weights.COCO_V1"
    elif name in SHORT_NAMES:
        name = f"ResNet{config.backbone.depth}_Weights.{name}"
    enum_name = name.split(".")[0]
    if not re.fullmatch(r"(?:Mask|Faster|Keypoint)RCNN_ResNet\w+_Weights|ResNet\d+_Weights", enum_name):
        raise WeightsError(f"{source}: {enum_name} are not of a Mask R-CNN or of a ResNet")
    try:
        return models.get_weight(name)
    except (KeyError, ValueError, AttributeError):
        entries = getattr(models, enum_name, getattr(models.detection, enum_name, ()))
        known = ", ".join(str(entry) for entry in entries) or "others, see torchvision.models"
        raise WeightsError(f"{source}: torchvision has no {name}; there are {known}") from None


def _download(source: str, weights: Any) -> dict[str, Tensor]:
    """State dict of torchvision's weights, from its cache or the network."""
    try:
        state: dict[str, Tensor] = weights.get_state_dict(check_hash=True, weights_only=True, map_location="cpu")
    except Exception as error:  # of the network, the disk and the unpickler
        file_name = weights.url.rsplit("/", 1)[-1]
        cached = os.path.join(torch.hub.get_dir(), "checkpoints", file_name)
        if os.path.exists(cached):  # which torch takes as it is
            raise WeightsError(f"{source}: {cached} is damaged; remove it, and it is downloaded again") from error
        raise WeightsError(
            f"{source}: {weights.url} could not be downloaded ({one_line(error)}); bring {file_name} here in another "
            f"way and pass torchvision:PATH/{file_name}"
        ) from error
    return state


def _under_our_names(
    source: str,
    state: Mapping[str, Tensor],
    pool_size: int,
    epsilon_zero: bool,
    class_names: tuple[str, ...] | None = None,
) -> SourceWeights:
    tensors: dict[str, SourceTensor] = {}
    skipped: dict[str, str] = {}
    for name, tensor in state.items():
        ours = _our_name(name)
        if ours is None:
            skipped[name] = CLASSIFIER if re.fullmatch(r"fc\.(weight|bias)", name) else NO_LAYER
        elif ours in tensors:
            raise WeightsError(f"{source}: {tensors[ours].name} and {name} are the same weights of one layer")
        else:
            if ours == FIRST_LAYER and tensor.dim() == 2 and tensor.shape[1] % pool_size**2 == 0:
                tensor = flat_columns(tensor, pool_size)
            tensors[ours] = SourceTensor(name, tensor)
    if not tensors:
        raise WeightsError(
            f"{source}: a state dict, but none of its tensors is of torchvision's Mask R-CNN or of a ResNet "
            f"(they are: {', '.join(list(state)[:5])}{', ...' if len(state) > 5 else ''})"
        )
    logits = tensors.get("box_head.class_logits.bias")
    guessed = class_names is None and logits is not None and logits.tensor.numel() == COCO_CLASSES
    is_detection = any(not name.startswith("backbone.") for name in tensors)
    return SourceWeights(
        source,
        tensors,
        skipped,
        class_names=coco_categories() if guessed else class_names,
        class_names_from="taken to be COCO's, as there are 91" if guessed else "as torchvision states them",
        class_names_guessed=guessed,
        norm_epsilon=0.0 if epsilon_zero else None,
        knobs=_KNOBS | _DETECTION_KNOBS if is_detection else _KNOBS,
        preset=_preset(tensors) if is_detection else None,
    )


def _our_name(name: str) -> str | None:
    for pattern, ours in _RULES:
        if match := pattern.fullmatch(name):
            return match.expand(ours)
    return None


def _preset(tensors: Mapping[str, SourceTensor]) -> str:
    is_second = any(name.startswith("box_head.convolutions.") for name in tensors)
    return "configs/torchvision_v2.yaml" if is_second else "configs/torchvision_v1.yaml"
