"""Keras weight files, written here by hand in every layout that is met: under the right names, in the right order."""

import shutil
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from model.config import (
    AnchorConfig,
    BackboneConfig,
    BoxHeadConfig,
    FpnConfig,
    MaskHeadConfig,
    ModelConfig,
    NormConfig,
    RoiConfig,
    RpnConfig,
)
from model.mask_rcnn import MaskRCNN
from model.source_weights import WeightsError
from model.weights import Report, fit_weights, import_weights, read_weights

FPN, RPN, BOX, MASK = 8, 12, 16, 10  # thin parts, so that files are small
NAMES = ("cat", "dog", "owl")
WEIGHTS_OF = {"convolution": ("kernel", "bias"), "norm": ("gamma", "beta", "moving_mean", "moving_variance")}
BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


def thin_config(depth: Any = 50, **changes: Any) -> ModelConfig:
    return ModelConfig(
        pixel_mean=(0.4850980392, 0.4580392157, 0.4074509804),
        pixel_std=(1 / 255, 1 / 255, 1 / 255),
        padding="black",
        image_position="centre",
        boxes="inclusive",
        norms=NormConfig(epsilon=1e-3, convolution_bias=True),
        backbone=BackboneConfig(depth=depth, norm="frozen_statistics", variant="keras"),
        fpn=FpnConfig(channels=FPN),
        anchors=AnchorConfig(ratios=(0.5, 1.0)),
        rpn=RpnConfig(channels=RPN),
        roi=RoiConfig(pooling="crop_and_resize"),
        box_head=BoxHeadConfig(channels=BOX, norm="frozen_statistics"),
        mask_head=MaskHeadConfig(channels=MASK, norm="frozen_statistics"),
    ).model_copy(update=changes)


def backbone_layers(depth: int = 50) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Layers and kernel shapes as Keras has them: (height, width, in, out); (channels,) of norms."""
    yield "conv1", (7, 7, 3, 64)
    yield "bn_conv1", (64,)
    inner = 64
    for stage, blocks in zip((2, 3, 4, 5), BLOCKS[depth], strict=True):
        width = 64 * 2 ** (stage - 2)
        for letter in string.ascii_lowercase[:blocks]:
            shapes = {"2a": (1, 1, inner, width), "2b": (3, 3, width, width), "2c": (1, 1, width, 4 * width)}
            if letter == "a":
                shapes["1"] = (1, 1, inner, 4 * width)
            for branch, shape in shapes.items():
                yield f"res{stage}{letter}_branch{branch}", shape
                yield f"bn{stage}{letter}_branch{branch}", shape[3:]
            inner = 4 * width


def head_layers(num_classes: int = 4) -> Iterator[tuple[str, tuple[int, ...]]]:
    for level in (2, 3, 4, 5):
        yield f"fpn_c{level}p{level}", (1, 1, 64 * 2**level, FPN)
        yield f"fpn_p{level}", (3, 3, FPN, FPN)
    yield "rpn_model/rpn_conv_shared", (3, 3, FPN, RPN)
    yield "rpn_model/rpn_class_raw", (1, 1, RPN, 2 * 2)
    yield "rpn_model/rpn_bbox_pred", (1, 1, RPN, 2 * 4)
    yield "mrcnn_class_conv1", (7, 7, FPN, BOX)
    yield "mrcnn_class_bn1", (BOX,)
    yield "mrcnn_class_conv2", (1, 1, BOX, BOX)
    yield "mrcnn_class_bn2", (BOX,)
    yield "mrcnn_class_logits", (BOX, num_classes)
    yield "mrcnn_bbox_fc", (BOX, 4 * num_classes)
    for number in (1, 2, 3, 4):
        yield f"mrcnn_mask_conv{number}", (3, 3, FPN if number == 1 else MASK, MASK)
        yield f"mrcnn_mask_bn{number}", (MASK,)
    yield "mrcnn_mask_deconv", (2, 2, MASK, MASK)
    yield "mrcnn_mask", (1, 1, MASK, num_classes)


def shapes_of(layers: list[tuple[str, tuple[int, ...]]]) -> dict[tuple[str, str], tuple[int, ...]]:
    """(layer, weight) to shape."""
    return {
        (layer, weight): shape if weight == "kernel" else shape[-1:]
        for layer, shape in layers
        for weight in WEIGHTS_OF["norm" if len(shape) == 1 else "convolution"]
    }


Shapes = dict[tuple[str, str], tuple[int, ...]]


def constant_of(index: int) -> float:
    """Every number of the index-th weight that is not filled with random ones."""
    return 1.0 + index / 1024


def write_file(path: Path, shapes: Shapes, random: tuple[str, ...] = (), layout: str = "keras 2") -> str:
    """Write a file; layers not in `random` hold one number each, and take no room.

    Layouts: "keras 2", "wrapped" (model.save), "numbered" (several models in a process), "flat" (Keras 1: no second
    group, other names).
    """
    generator = np.random.default_rng(0)
    flat = {"kernel": "W", "bias": "b", "moving_mean": "running_mean", "moving_variance": "running_std"}
    with h5py.File(path, "w") as file:
        root = file.create_group("model_weights") if layout == "wrapped" else file
        if layout == "wrapped":
            file.create_group("optimizer_weights").create_dataset("iterations:0", data=np.array(7))
        groups: dict[str, list[str]] = {}
        for index, ((layer, weight), shape) in enumerate(shapes.items()):
            group, _, inner = layer.partition("/")
            middle = f"{inner or group}{'_1' if layout == 'numbered' else ''}"
            name = f"{middle}/{weight}:0"
            if layout == "flat":
                name = f"{inner or group}_{flat.get(weight, weight)}{'_1' if index % 2 else ''}:0"
            groups.setdefault(group, []).append(name)
            if layer in random:
                data = generator.random(shape, dtype=np.float32)
                root.create_dataset(f"{group}/{name}", data=data)
            else:
                root.create_dataset(f"{group}/{name}", shape, dtype="f4", fillvalue=constant_of(index))
        for group, names in groups.items():
            root[group].attrs["weight_names"] = np.array([name.encode() for name in names])
        for group in ("input_image", "activation_40"):  # layers without weights
            root.create_group(group).attrs["weight_names"] = np.zeros(0)
        root.attrs["layer_names"] = np.array([name.encode() for name in root])
    return str(path)


def values_of(path: str, name: str) -> npt.NDArray[np.float32]:
    with h5py.File(path) as file:
        return np.asarray(file[name])


FULL = shapes_of([*backbone_layers(), *head_layers()])
RANDOM = (
    "conv1", "bn_conv1", "res3b_branch2b", "bn4f_branch2c", "res5a_branch1", "fpn_c3p3", "rpn_model/rpn_class_raw",
    "rpn_model/rpn_bbox_pred", "mrcnn_class_conv1", "mrcnn_class_logits", "mrcnn_bbox_fc", "mrcnn_mask_deconv",
    "mrcnn_mask",
)  # fmt: skip

_models: dict[Any, MaskRCNN] = {}


def model_of(config: ModelConfig, num_classes: int = 4) -> MaskRCNN:
    """With zeros as initial values; made once, as fitting leaves it alone."""
    key = (config.model_dump_json(), num_classes)
    if key not in _models:
        with torch.device("meta"):
            model = MaskRCNN(config, num_classes)
        _models[key] = model.to_empty(device="cpu")
        for tensor in _models[key].state_dict().values():
            tensor.zero_()
    return _models[key]


def fit(
    path: str, config: ModelConfig | None = None, names: tuple[str, ...] = NAMES
) -> tuple[dict[str, Tensor], Report]:
    config = config or thin_config()
    weights = read_weights(f"matterport:{path}", config)
    return fit_weights(weights, model_of(config, len(names) + 1), names)


def refusal(path: str | Path, config: ModelConfig | None = None) -> str:
    with pytest.raises(WeightsError) as caught:
        fit(str(path), config)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"matterport:{path}: ")
    return str(caught.value).removeprefix(f"matterport:{path}: ")


@pytest.fixture(scope="module")
def full(folder: Path) -> str:
    return write_file(folder / "full.h5", FULL, RANDOM)


@pytest.fixture(scope="module")
def state(full: str) -> dict[str, Tensor]:
    return fit(full)[0]


class TestNames:
    def test_every_weight_has_its_place(self, state: dict[str, Tensor]) -> None:
        """Constants tell which weight of the file a tensor is; the places of some are written out here."""
        constants = {name: constant_of(index) for index, name in enumerate(FULL) if name[0] not in RANDOM}
        found = {
            name: tensor.flatten()[0].item()
            for name, tensor in state.items()
            if tensor.ndim and bool((tensor == tensor.flatten()[0]).all())
        }
        places = {
            "backbone.stages.0.0.conv1.weight": ("res2a_branch2a", "kernel"),
            "backbone.stages.0.0.downsample.0.bias": ("res2a_branch1", "bias"),
            "backbone.stages.0.0.downsample.1.running_var": ("bn2a_branch1", "moving_variance"),
            "backbone.stages.2.5.conv2.weight": ("res4f_branch2b", "kernel"),
            "backbone.stages.3.2.bn3.weight": ("bn5c_branch2c", "gamma"),
            "backbone.stages.3.2.bn3.bias": ("bn5c_branch2c", "beta"),
            "backbone.stages.3.2.bn3.running_mean": ("bn5c_branch2c", "moving_mean"),
            "fpn.laterals.0.weight": ("fpn_c2p2", "kernel"),
            "fpn.laterals.3.bias": ("fpn_c5p5", "bias"),
            "fpn.smoothing.0.weight": ("fpn_p2", "kernel"),
            "fpn.smoothing.3.weight": ("fpn_p5", "kernel"),
            "rpn.shared.0.weight": ("rpn_model/rpn_conv_shared", "kernel"),
            "box_head.convolutions.1.weight": ("mrcnn_class_conv2", "kernel"),
            "box_head.norms.1.running_var": ("mrcnn_class_bn2", "moving_variance"),
            "mask_head.convolutions.0.weight": ("mrcnn_mask_conv1", "kernel"),
            "mask_head.norms.3.weight": ("mrcnn_mask_bn4", "gamma"),
        }
        for ours, theirs in places.items():
            assert found[ours] == constants[theirs], ours
        assert sorted(found.values()) == sorted(constants.values())

    def test_report(self, full: str) -> None:
        _, report = fit(full)
        assert sum(report.loaded.values()) == len(FULL) == 384
        assert report.initial_parts == ()
        assert report.skipped == {"activation_40": "layers without weights", "input_image": "layers without weights"}
        note = (
            "the model computes otherwise than the one these weights were trained in: model.anchors.ratios [0.5, 1] "
            "(there [0.5, 1, 2]); configs/matterport.yaml has the values of the original"
        )
        assert report.notes == (note,)
        assert report.lines() == [
            f"weights: matterport:{full}: 384 tensors loaded (backbone 318, fpn 16, rpn 6, box_head 16, mask_head 28)",
            "weights: classes: the file does not name its 3: taken in order (model.weights_classes names them)",
            "weights: rows from the file: background, cat, dog, owl",
            "weights: skipped, layers without weights: activation_40, input_image",
            f"weights: {note}",
        ]

    def test_another_scale_of_the_pixels_is_noted(self, full: str) -> None:
        config = thin_config().model_copy(update={"pixel_std": (0.229, 0.224, 0.225)})
        _, report = fit(full, config)
        assert "model.pixel_std [0.229, 0.224, 0.225] (there [0.003922, 0.003922, 0.003922])" in report.notes[0]


class TestLayouts:
    """By hand, from single numbers of the file."""

    def test_convolution(self, full: str, state: dict[str, Tensor]) -> None:
        theirs = values_of(full, "conv1/conv1/kernel:0")
        ours = state["backbone.stem.0.weight"]
        assert ours.shape == (64, 3, 7, 7)
        assert ours[10, 2, 3, 5] == theirs[3, 5, 2, 10]
        assert np.array_equal(ours.numpy(), theirs.transpose(3, 2, 0, 1))
        inner = values_of(full, "res3b_branch2b/res3b_branch2b/kernel:0")
        assert state["backbone.stages.1.1.conv2.weight"][7, 100, 2, 0] == inner[2, 0, 100, 7]
        box = values_of(full, "mrcnn_class_conv1/mrcnn_class_conv1/kernel:0")
        assert state["box_head.convolutions.0.weight"][15, 2, 6, 1] == box[6, 1, 2, 15]

    def test_transposed_convolution(self, full: str, state: dict[str, Tensor]) -> None:
        """Keras has (height, width, out, in), PyTorch (in, out, height, width)."""
        theirs = values_of(full, "mrcnn_mask_deconv/mrcnn_mask_deconv/kernel:0")
        assert state["mask_head.upsampling.weight"][3, 8, 1, 0] == theirs[1, 0, 8, 3]

    def test_dense(self, full: str, state: dict[str, Tensor]) -> None:
        theirs = values_of(full, "mrcnn_class_logits/mrcnn_class_logits/kernel:0")
        assert np.array_equal(state["box_head.class_logits.weight"].numpy(), theirs.T)

    def test_norm(self, full: str, state: dict[str, Tensor]) -> None:
        ours = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}
        for layer, name in (("bn_conv1", "backbone.stem.1"), ("bn4f_branch2c", "backbone.stages.2.5.bn3")):
            for theirs, kind in ours.items():
                expected = values_of(full, f"{layer}/{layer}/{theirs}:0")
                assert np.array_equal(state[f"{name}.{kind}"].numpy(), expected)

    def test_class_logits_of_the_rpn_keep_their_order(self, full: str, state: dict[str, Tensor]) -> None:
        """(background, foreground) of each anchor, as ours."""
        theirs = values_of(full, "rpn_model/rpn_class_raw/bias:0")
        assert np.array_equal(state["rpn.class_logits.bias"].numpy(), theirs)

    def test_deltas_change_places(self, full: str, state: dict[str, Tensor]) -> None:
        """(dy, dx, dh, dw) of each anchor or class to (dx, dy, dw, dh)."""
        rpn = values_of(full, "rpn_model/rpn_bbox_pred/kernel:0")[0, 0]  # (channels, anchors * 4)
        for anchor in (0, 1):
            for ours, theirs in ((0, 1), (1, 0), (2, 3), (3, 2)):
                expected = rpn[:, 4 * anchor + theirs]
                assert np.array_equal(state["rpn.box_deltas.weight"][4 * anchor + ours, :, 0, 0].numpy(), expected)
        bias = values_of(full, "mrcnn_bbox_fc/mrcnn_bbox_fc/bias:0")
        expected = bias[[1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14]]
        assert np.array_equal(state["box_head.box_deltas.bias"].numpy(), expected)
        kernel = values_of(full, "mrcnn_bbox_fc/mrcnn_bbox_fc/kernel:0")
        assert np.array_equal(state["box_head.box_deltas.weight"][4 * 2 + 3].numpy(), kernel[:, 4 * 2 + 2])

    @pytest.mark.parametrize("layout", ["wrapped", "numbered", "flat"])
    def test_other_layouts_hold_the_same(self, tmp_path: Path, state: dict[str, Tensor], layout: str) -> None:
        path = write_file(tmp_path / "other.h5", FULL, RANDOM, layout)
        other, report = fit(path)
        assert sum(report.loaded.values()) == 384
        for name, tensor in state.items():
            assert torch.equal(other[name], tensor), name

    def test_attributes_as_text_and_split(self, tmp_path: Path, state: dict[str, Tensor]) -> None:
        path = write_file(tmp_path / "split.h5", FULL, RANDOM)
        with h5py.File(path, "r+") as file:
            names = [name.decode() for name in file.attrs["layer_names"]]
            del file.attrs["layer_names"]
            half = len(names) // 2
            file.attrs["layer_names0"], file.attrs["layer_names1"] = names[:half], names[half:]
            weights = [name.decode() for name in file["conv1"].attrs["weight_names"]]
            del file["conv1"].attrs["weight_names"]
            file["conv1"].attrs["weight_names0"], file["conv1"].attrs["weight_names1"] = weights[:1], weights[1:]
        other, _ = fit(path)
        for name, tensor in state.items():
            assert torch.equal(other[name], tensor), name

    def test_numbers_of_another_precision(self, tmp_path: Path, full: str, state: dict[str, Tensor]) -> None:
        path = write_file(tmp_path / "double.h5", FULL, RANDOM)
        with h5py.File(path, "r+") as file:
            values = np.asarray(file["conv1/conv1/kernel:0"])
            del file["conv1/conv1/kernel:0"]
            file["conv1/conv1/kernel:0"] = values.astype("f8")
        other, _ = fit(path)
        assert other["backbone.stem.0.weight"].dtype == torch.float32
        assert torch.equal(other["backbone.stem.0.weight"], state["backbone.stem.0.weight"])


class TestOtherFiles:
    def test_resnet_101(self, tmp_path: Path) -> None:
        shapes = shapes_of([*backbone_layers(101), *head_layers()])
        path = write_file(tmp_path / "101.h5", shapes, ("res4w_branch2a",))
        state, report = fit(path, thin_config(101))
        assert sum(report.loaded.values()) == len(shapes) == 384 + 17 * 3 * 6
        theirs = values_of(path, "res4w_branch2a/res4w_branch2a/kernel:0")
        assert np.array_equal(state["backbone.stages.2.22.conv1.weight"].numpy(), theirs.transpose(3, 2, 0, 1))
        message = refusal(path)
        assert message == (
            "of another architecture: its backbone is a ResNet-101, the configured one a ResNet-50; see "
            "model.backbone.depth"
        )

    def test_resnet_50_of_keras(self, tmp_path: Path) -> None:
        """Only a backbone, in the names of Keras 1, with a classifier."""
        shapes = shapes_of([*backbone_layers(), ("fc1000", (2048, 1000))])
        path = write_file(tmp_path / "imagenet.h5", shapes, ("bn_conv1",), layout="flat")
        state, report = fit(path)
        assert sum(report.loaded.values()) == 318
        assert report.initial_parts == ("fpn", "rpn", "box_head", "mask_head")
        assert report.skipped["fc1000"] == "classifier of ImageNet"
        with h5py.File(path) as file:
            name = next(name for name in file["bn_conv1"] if "running_std" in name)
        variance = values_of(path, f"bn_conv1/{name}")
        assert np.array_equal(state["backbone.stem.1.running_var"].numpy(), variance)

    def test_coco(self, tmp_path: Path) -> None:
        """81 classes are COCO's in the order of their ids, so person is 1 and toothbrush 80."""
        shapes = shapes_of([*backbone_layers(), *head_layers(81)])
        path = write_file(tmp_path / "coco.h5", shapes, ("mrcnn_class_logits", "mrcnn_bbox_fc"))
        state, report = fit(path, names=("toothbrush", "nucleus", "person", "stop sign"))
        bias = values_of(path, "mrcnn_class_logits/mrcnn_class_logits/bias:0")
        assert state["box_head.class_logits.bias"].tolist() == [bias[0], bias[80], 0, bias[1], bias[12]]
        deltas = values_of(path, "mrcnn_bbox_fc/mrcnn_bbox_fc/bias:0")
        assert state["box_head.box_deltas.bias"][4:8].tolist() == deltas[[321, 320, 323, 322]].tolist()
        assert report.classes_loaded == ("background", "toothbrush", "person", "stop sign")
        assert report.classes_initial == ("nucleus",)
        assert report.class_rule == "by name (taken to be COCO's, as there are 81), 3 of 4"

    def test_groups_that_are_not_ours_are_skipped_and_named(self, tmp_path: Path, state: dict[str, Tensor]) -> None:
        path = write_file(tmp_path / "more.h5", FULL, RANDOM)
        with h5py.File(path, "r+") as file:
            file["anchors/anchors/Variable:0"] = np.zeros((1, 9, 4), np.float32)
            file["dense_3/dense_3/kernel:0"] = np.zeros((2, 2), np.float32)
        other, report = fit(path)
        assert report.skipped["anchors"] == report.skipped["dense_3"] == "no layer of the model"
        assert report.skipped["activation_40"] == "layers without weights"
        assert "weights: skipped, no layer of the model: anchors, dense_3" in report.lines()
        assert all(torch.equal(other[name], tensor) for name, tensor in state.items())


class TestRefusals:
    def test_no_such_file(self, tmp_path: Path) -> None:
        assert refusal(tmp_path / "nowhere.h5") == "no such file"

    @pytest.mark.parametrize("content", [b"", b"no weights at all" * 100])
    def test_no_hdf5(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "text.h5").write_bytes(content)
        assert refusal(tmp_path / "text.h5").startswith("no HDF5 file, or a damaged one (")

    def test_a_folder(self, tmp_path: Path) -> None:
        assert refusal(tmp_path).startswith("no HDF5 file, or a damaged one (")

    @pytest.mark.parametrize("part", [0.01, 0.5, 0.999])
    def test_truncated(self, tmp_path: Path, full: str, part: float) -> None:
        whole = Path(full).read_bytes()
        (tmp_path / "cut.h5").write_bytes(whole[: int(len(whole) * part)])
        assert refusal(tmp_path / "cut.h5").startswith("no HDF5 file, or a damaged one (")

    def test_damaged_inside(self, tmp_path: Path, full: str) -> None:
        """Wherever bytes are overwritten, the end is a clear error or numbers that are all there."""
        whole = Path(full).read_bytes()
        noise = np.random.default_rng(0).bytes(4096)
        num_refused = 0
        for start in range(0, len(whole) - len(noise), len(whole) // 6):
            path = tmp_path / "damaged.h5"
            path.write_bytes(whole[:start] + noise + whole[start + len(noise) :])
            try:
                state, _ = fit(str(path))
            except WeightsError:
                num_refused += 1
            else:
                assert all(torch.isfinite(tensor).all() for tensor in state.values())
        assert num_refused > 0

    def test_hdf5_of_something_else(self, tmp_path: Path) -> None:
        with h5py.File(tmp_path / "other.h5", "w") as file:
            for name in ("a", "b", "c", "d", "e", "f"):
                file[f"{name}/kernel:0"] = np.zeros(3, np.float32)
        assert refusal(tmp_path / "other.h5") == (
            "an HDF5 file, but none of its groups is a layer of matterport's Mask R-CNN or of the ResNet of Keras "
            "(they are: a, b, c, d, e, ...)"
        )

    def test_links_to_other_files_are_not_followed(self, tmp_path: Path, full: str) -> None:
        with h5py.File(tmp_path / "link.h5", "w") as file:
            file["model_weights"] = h5py.ExternalLink(full, "/")
            file["conv1"] = h5py.ExternalLink(full, "/conv1")
        assert "none of its groups is a layer" in refusal(tmp_path / "link.h5")

    def test_a_wrong_shape_is_named_as_in_the_file(self, tmp_path: Path) -> None:
        path = write_file(tmp_path / "wrong.h5", FULL | {("res2b_branch2b", "kernel"): (5, 5, 64, 64)})
        assert refusal(path) == (
            "res2b_branch2b/res2b_branch2b/kernel:0 has shape (5, 5, 64, 64), the configured model needs "
            "(3, 3, 64, 64); configs/matterport.yaml is the architecture's configuration"
        )

    @pytest.mark.parametrize(
        ("weight", "shape"), [(("mrcnn_bbox_fc", "bias"), (15,)), (("mrcnn_mask", "kernel"), (1, 1, MASK, 5))]
    )
    def test_class_layers_that_disagree(self, tmp_path: Path, weight: tuple[str, str], shape: tuple[int, ...]) -> None:
        path = write_file(tmp_path / "wrong.h5", FULL | {weight: shape})
        assert f"{weight[0]}/{weight[0]}/{weight[1]}:0 has shape {shape}, the configured model needs" in refusal(path)

    def test_a_model_without_biases(self, full: str) -> None:
        message = refusal(full, thin_config(norms=NormConfig(epsilon=1e-3)))
        assert "conv1/conv1/bias:0 has no place in the configured model; see model.norms.convolution_bias" in message
        assert message.endswith("(configs/matterport.yaml fits)")

    def test_a_model_with_another_box_head(self, full: str) -> None:
        message = refusal(full, thin_config(box_head=BoxHeadConfig(kind="fc2", channels=BOX, norm="none")))
        assert "mrcnn_class_" in message
        assert "has no place in the configured model; see model.box_head." in message

    def test_a_layer_is_missing(self, tmp_path: Path) -> None:
        shapes = {name: shape for name, shape in FULL.items() if name[0] != "mrcnn_mask_conv3"}
        assert refusal(write_file(tmp_path / "less.h5", shapes)).startswith(
            "of another architecture, or not whole: nothing in it is the configured model's mask_head.convolutions.2."
        )

    @pytest.mark.parametrize("group", ["rpn_model_1", "rpn_model/rpn_model"])
    def test_the_rpn_in_another_group(self, tmp_path: Path, full: str, group: str) -> None:
        path = str(shutil.copy(full, tmp_path / "moved.h5"))
        with h5py.File(path, "r+") as file:
            file.move("rpn_model", "moved")
            file.create_group(group.rpartition("/")[0] or "unused")
            file.move("moved", group)
        state, report = fit(path)
        assert report.initial_parts == ()
        assert torch.equal(state["rpn.shared.0.weight"], fit(full)[0]["rpn.shared.0.weight"])

    def test_an_rpn_that_is_not_understood(self, tmp_path: Path, full: str) -> None:
        path = str(shutil.copy(full, tmp_path / "odd.h5"))
        with h5py.File(path, "r+") as file:
            file.move("rpn_model/rpn_conv_shared", "rpn_model/first")
        assert refusal(path).startswith("rpn_model/first/")

    def test_the_same_weight_twice(self, tmp_path: Path) -> None:
        path = write_file(tmp_path / "twice.h5", FULL)
        with h5py.File(path, "r+") as file:
            file["conv1/conv1_2/kernel:0"] = np.zeros((7, 7, 3, 64), np.float32)
        assert "conv1/conv1/kernel:0 and conv1/conv1_2/kernel:0 are the same weights of one layer" in refusal(path)

    def test_text_in_the_place_of_numbers(self, tmp_path: Path) -> None:
        path = write_file(tmp_path / "text.h5", FULL)
        with h5py.File(path, "r+") as file:
            del file["conv1/conv1/bias:0"]
            file["conv1/conv1/bias:0"] = np.array([b"a"] * 64)
        assert refusal(path).startswith("conv1/conv1/bias:0 holds no floating-point numbers but ")

    def test_no_part_of_a_bad_file_is_loaded(self, tmp_path: Path) -> None:
        path = write_file(tmp_path / "wrong.h5", FULL | {("mrcnn_mask", "bias"): (9,)})
        model = model_of(thin_config())
        with pytest.raises(WeightsError):
            import_weights(f"matterport:{path}", model, NAMES)
        assert not any(tensor.any() for tensor in model.state_dict().values())
