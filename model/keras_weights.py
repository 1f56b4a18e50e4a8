"""Keras weight files (.h5) of matterport's Mask R-CNN, and the ImageNet ResNet-50 of Keras: their layers to our names.

Read with h5py alone. A file has one group a layer, and a layer's data sets lie somewhere below it, so the names of the
group and of the data set are enough: neither the attributes, which differ between versions of Keras, nor the names in
between, which are numbered when a process builds several models, are looked at.
"""

from __future__ import annotations

import os
import re
from typing import Any

import torch
from torch import Tensor

from model.source_weights import SourceTensor, SourceWeights, WeightsError, one_line

NO_LAYER, NO_WEIGHTS, CLASSIFIER = "no layer of the model", "layers without weights", "classifier of ImageNet"
COCO_CLASSES = 81  # with background: matterport counts COCO's 80 categories on

_MODULES = {
    "conv1": "backbone.stem.0",
    "bn_conv1": "backbone.stem.1",
    "mrcnn_class_conv1": "box_head.convolutions.0",
    "mrcnn_class_bn1": "box_head.norms.0",
    "mrcnn_class_conv2": "box_head.convolutions.1",
    "mrcnn_class_bn2": "box_head.norms.1",
    "mrcnn_class_logits": "box_head.class_logits",
    "mrcnn_bbox_fc": "box_head.box_deltas",
    "mrcnn_mask_deconv": "mask_head.upsampling",
    "mrcnn_mask": "mask_head.mask_logits",
    "rpn_conv_shared": "rpn.shared.0",
    "rpn_class_raw": "rpn.class_logits",
    "rpn_bbox_pred": "rpn.box_deltas",
}
_TENSORS = {
    "kernel": "weight",
    "W": "weight",
    "bias": "bias",
    "b": "bias",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "running_mean": "running_mean",
    "moving_variance": "running_var",
    "running_std": "running_var",  # Keras 1 calls the variance so
}
_DETECTION_KNOBS: dict[str, object] = {
    "pixel_mean": (123.7 / 255, 116.8 / 255, 103.9 / 255),
    "padding": "black",
    "image_position": "centre",
    "boxes": "inclusive",
    "anchors.ratios": (0.5, 1.0, 2.0),
    "rpn.delta_scale": (0.1, 0.1, 0.2, 0.2),
    "box_head.delta_scale": (0.1, 0.1, 0.2, 0.2),
    "roi.pooling": "crop_and_resize",
}
_TENSOR_NAME = re.compile(rf"(?:^|_)({'|'.join(_TENSORS)})(?:_\d+)?(?::\d+)?$")
_RPN_GROUP = re.compile(r"rpn_model(_\d+)?")
_AXES = {4: (3, 2, 0, 1), 2: (1, 0)}  # (h, w, in, out) and, of the transposed convolution, (h, w, out, in); (in, out)


def read_keras_weights(source: str, path: str, coco_names: tuple[str, ...]) -> SourceWeights:
    """Read a weight file.

    Args:
        source: what to call it in messages.
        path: of the file.
        coco_names: COCO's 80 categories in the order of their ids.

    Raises:
        WeightsError: no such file, no HDF5, damaged, or none of its layers is one of the model's.
    """
    import h5py

    tensors: dict[str, SourceTensor] = {}
    skipped: dict[str, str] = {}
    try:
        with h5py.File(os.path.expanduser(path), "r") as file:
            # A link to another file is not followed.
            wrapped = isinstance(file.get("model_weights", getlink=True), h5py.HardLink)
            root = file["model_weights"] if wrapped else file
            data_sets = _data_sets(root)
            groups = list(root)
            for path_in_file, data_set in data_sets.items():
                module = _our_module(path_in_file)
                tensor_name = _TENSOR_NAME.search(path_in_file.rsplit("/", 1)[-1])
                if module is None and _RPN_GROUP.fullmatch(path_in_file.split("/")[0]):
                    raise WeightsError(
                        f"{source}: {path_in_file} is in the RPN's group, but of none of its layers (rpn_conv_shared, "
                        "rpn_class_raw, rpn_bbox_pred); save the model anew"
                    )
                if module is None or tensor_name is None:
                    layer = path_in_file.split("/")[0]
                    skipped[layer] = CLASSIFIER if re.fullmatch(r"fc\d+", layer) else NO_LAYER
                    continue
                name = f"{module}.{_TENSORS[tensor_name[1]]}"
                if name in tensors:
                    raise WeightsError(
                        f"{source}: {tensors[name].name} and {path_in_file} are the same weights of one layer; "
                        "save the model anew"
                    )
                tensors[name] = _read(source, path_in_file, data_set, module)
    except WeightsError:
        raise
    except FileNotFoundError:
        raise WeightsError(f"{source}: no such file") from None
    except Exception as error:  # bytes that make no sense end in errors of many kinds
        raise WeightsError(f"{source}: no HDF5 file, or a damaged one ({one_line(error)})") from error
    if not tensors:
        raise WeightsError(
            f"{source}: an HDF5 file, but none of its groups is a layer of matterport's Mask R-CNN or of the ResNet of "
            f"Keras (they are: {', '.join(groups[:5]) or 'none'}{', ...' if len(groups) > 5 else ''})"
        )
    with_weights = {path_in_file.split("/")[0] for path_in_file in data_sets}
    skipped |= {group: NO_WEIGHTS for group in groups if group not in with_weights}
    logits = tensors.get("box_head.class_logits.bias")
    is_coco = logits is not None and logits.tensor.numel() == COCO_CLASSES
    knobs: dict[str, object] = {"norms.epsilon": 1e-3, "backbone.variant": "keras", "pixel_std": (1 / 255,) * 3}
    if logits is not None:
        knobs |= _DETECTION_KNOBS
    return SourceWeights(
        source,
        tensors,
        skipped,
        class_names=coco_names if is_coco else None,
        class_names_from="taken to be COCO's, as there are 81",
        class_names_guessed=True,
        knobs=knobs,
        preset="configs/matterport.yaml",
    )


def _data_sets(root: Any) -> dict[str, Any]:
    """Data sets by their path below root; links to other files are not followed."""
    import h5py

    found: dict[str, Any] = {}

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            found[name] = item

    root.visititems(visit)
    return found


def _our_module(path: str) -> str | None:
    """Our module of a data set, None where it has no counterpart."""
    layer, *inner = path.split("/")
    if _RPN_GROUP.fullmatch(layer):  # a model of its own within one group
        layers = (known for part in inner for known in _MODULES if known.startswith("rpn_") and part.startswith(known))
        layer = next(layers, "")
    if layer in _MODULES:
        return _MODULES[layer]
    if match := re.fullmatch(r"(res|bn)([2-5])([a-z])_branch(1|2[abc])", layer):
        kind, stage, block, branch = match.groups()
        number = "abc".find(branch[-1]) + 1
        if number == 0:  # the branch beside
            part = "downsample.0" if kind == "res" else "downsample.1"
        else:
            part = f"conv{number}" if kind == "res" else f"bn{number}"
        return f"backbone.stages.{int(stage) - 2}.{ord(block) - ord('a')}.{part}"
    if match := re.fullmatch(r"fpn_c([2-5])p\1", layer):
        return f"fpn.laterals.{int(match[1]) - 2}.0"
    if match := re.fullmatch(r"fpn_p([2-5])", layer):
        return f"fpn.smoothing.{int(match[1]) - 2}.0"
    if match := re.fullmatch(r"mrcnn_mask_(conv|bn)([1-9])", layer):
        return f"mask_head.{'convolutions' if match[1] == 'conv' else 'norms'}.{int(match[2]) - 1}"
    return None


def _read(source: str, name: str, data_set: Any, module: str) -> SourceTensor:
    """One data set in our layout."""
    if data_set.dtype.kind != "f":
        raise WeightsError(f"{source}: {name} holds no floating-point numbers but {data_set.dtype}")
    tensor = torch.from_numpy(data_set[()].astype("float32"))
    axes = _AXES.get(tensor.ndim)
    if axes is not None:
        tensor = tensor.permute(axes)
    if module.endswith("box_deltas") and tensor.ndim and tensor.shape[0] % 4 == 0:
        tensor = _swap_deltas(tensor)
    return SourceTensor(name, tensor, axes)


def _swap_deltas(rows: Tensor) -> Tensor:
    """Rows of (dy, dx, dh, dw) to rows of (dx, dy, dw, dh)."""
    return rows.reshape(-1, 4, *rows.shape[1:])[:, [1, 0, 3, 2]].reshape(rows.shape)
