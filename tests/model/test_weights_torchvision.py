"""State dicts of torchvision's own models: the same numbers come out of every part; nothing foreign is run."""

import argparse
import hashlib
import os
import pickle
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal
from urllib.error import URLError

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision import models
from torchvision.models.detection import maskrcnn_resnet50_fpn, maskrcnn_resnet50_fpn_v2

from model import torchvision_weights
from model.config import (
    AnchorConfig,
    BackboneConfig,
    BoxHeadConfig,
    FpnConfig,
    MaskHeadConfig,
    ModelConfig,
    RoiConfig,
    RpnConfig,
)
from model.mask_rcnn import MaskRCNN
from model.source_weights import WeightsError
from model.torchvision_weights import coco_categories
from model.weights import Report, fit_weights, import_weights, read_weights
from tests.model.factories import channels_last_columns, tiny_config

NAMES = ("cat", "dog", "owl")
State = dict[str, Tensor]


def preset(version: Literal[1, 2]) -> ModelConfig:
    """What decides on shapes and arithmetic in configs/torchvision_v1.yaml and _v2.yaml."""
    norm: Any = "none" if version == 1 else "batch"
    return ModelConfig(
        backbone=BackboneConfig(depth=50, norm="frozen" if version == 1 else "batch"),
        fpn=FpnConfig(norm=norm),
        anchors=AnchorConfig(ratios=(2.0, 1.0, 0.5), rounded=True),
        rpn=RpnConfig(channels=256, num_convolutions=version, objectness="sigmoid", delta_scale=(1.0, 1.0, 1.0, 1.0)),
        roi=RoiConfig(pooling="unaligned"),
        box_head=BoxHeadConfig(kind="fc2" if version == 1 else "conv4fc1", norm=norm),
        mask_head=MaskHeadConfig(norm=norm),
    )


def empty_model(config: ModelConfig, num_classes: int = 4) -> MaskRCNN:
    """With zeros as initial values, without the time that others take."""
    with torch.device("meta"):
        model = MaskRCNN(config, num_classes)
    model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.zero_()
    return model.eval()


def random_reference(version: Literal[1, 2], num_classes: int = 4) -> nn.Module:
    """torchvision's model with other statistics in every norm."""
    build = maskrcnn_resnet50_fpn if version == 1 else maskrcnn_resnet50_fpn_v2
    with torch.device("meta"):
        reference: nn.Module = build(weights=None, weights_backbone=None, num_classes=num_classes)
    reference.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for name, tensor in reference.state_dict().items():
        if name.endswith("num_batches_tracked"):
            tensor.fill_(3)
        elif name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif tensor.ndim > 1:  # keeps the size of what goes through
            tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5, generator=generator)
        else:
            tensor.uniform_(-0.1, 0.1, generator=generator).add_(name.endswith("weight"))
    return reference.eval()


@pytest.fixture(scope="module")
def first() -> nn.Module:
    return random_reference(1)


@pytest.fixture(scope="module")
def second() -> nn.Module:
    return random_reference(2)


@pytest.fixture(scope="module")
def small() -> State:
    """A thin state dict with the parts of v1: ResNet-18, few channels."""
    model = empty_model(small_config())
    theirs: State = {}
    generator = torch.Generator().manual_seed(1)
    for name, tensor in model.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            theirs[their_name(name)] = torch.rand(tensor.shape, generator=generator) + 0.5
    return theirs


def small_config(**changes: Any) -> ModelConfig:
    return ModelConfig(
        backbone=BackboneConfig(depth=18, norm="frozen"),
        fpn=FpnConfig(channels=8),
        anchors=AnchorConfig(ratios=(2.0, 1.0, 0.5), rounded=True),
        rpn=RpnConfig(channels=8, objectness="sigmoid", delta_scale=(1.0, 1.0, 1.0, 1.0)),
        roi=RoiConfig(pooling="unaligned"),
        box_head=BoxHeadConfig(kind="fc2", channels=16, norm="none"),
        mask_head=MaskHeadConfig(channels=8, norm="none"),
    ).model_copy(update=changes)


def their_name(name: str) -> str:
    """torchvision's name of a tensor of ours, in the form of its published v1 file."""
    for ours, theirs in (
        ("backbone.stem.0", "backbone.body.conv1"),
        ("backbone.stem.1", "backbone.body.bn1"),
        *((f"backbone.stages.{n}", f"backbone.body.layer{n + 1}") for n in range(4)),
        ("fpn.laterals", "backbone.fpn.inner_blocks"),
        ("fpn.smoothing", "backbone.fpn.layer_blocks"),
        ("rpn.shared.0", "rpn.head.conv"),
        ("rpn.class_logits", "rpn.head.cls_logits"),
        ("rpn.box_deltas", "rpn.head.bbox_pred"),
        ("box_head.fully_connected.0", "roi_heads.box_head.fc6"),
        ("box_head.fully_connected.1", "roi_heads.box_head.fc7"),
        ("box_head.class_logits", "roi_heads.box_predictor.cls_score"),
        ("box_head.box_deltas", "roi_heads.box_predictor.bbox_pred"),
        *((f"mask_head.convolutions.{n}", f"roi_heads.mask_head.mask_fcn{n + 1}") for n in range(4)),
        ("mask_head.upsampling", "roi_heads.mask_predictor.conv5_mask"),
        ("mask_head.mask_logits", "roi_heads.mask_predictor.mask_fcn_logits"),
    ):
        if name.startswith(f"{ours}."):
            return theirs + name.removeprefix(ours)
    raise AssertionError(name)


def saved(path: Path, content: Any) -> str:
    torch.save(content, path)
    return f"torchvision:{path}"


def fit(source: str, config: ModelConfig | None = None, names: tuple[str, ...] = NAMES) -> tuple[State, Report]:
    config = config or small_config()
    model = empty_model(config, len(names) + 1)
    return fit_weights(read_weights(source, config), model, names)


def assert_loaded(state: State, theirs: State) -> None:
    """Every tensor of ours is theirs of that name."""
    for name, tensor in state.items():
        if not name.endswith("num_batches_tracked"):
            expected = theirs[their_name(name)]
            if name == "box_head.fully_connected.0.weight":  # columns: theirs channel, row, column; ours channel last
                expected = channels_last_columns(expected, 49)
            assert torch.equal(tensor, expected), name


def refusal(source: str, config: ModelConfig | None = None) -> str:
    with pytest.raises(WeightsError) as caught:
        fit(source, config)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(source)
    return message.removeprefix(f"{source}: ")


@pytest.fixture(scope="module", params=[1, 2])
def both(request: pytest.FixtureRequest, folder: Path) -> tuple[Any, MaskRCNN, Report]:
    """torchvision's model, ours with its weights, and what was reported."""
    reference = request.getfixturevalue("first" if request.param == 1 else "second")
    ours = empty_model(preset(request.param))
    source = saved(folder / f"whole{request.param}.pth", reference.state_dict())
    return reference, ours, import_weights(source, ours, NAMES)


class TestWholeModels:
    @torch.no_grad()
    def test_pyramid_and_proposals(self, both: tuple[Any, MaskRCNN, Report]) -> None:
        theirs, ours, _ = both
        images = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))
        expected = list(theirs.backbone(images).values())
        pyramid = ours.fpn(ours.backbone(images))
        for a, b in zip(pyramid, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * b.abs().max().item())
        logits, deltas = ours.rpn(expected)
        their_logits, their_deltas = theirs.rpn.head(expected)
        flat = [level[0].permute(1, 2, 0) for level in their_logits]  # (rows, columns, anchors)
        torch.testing.assert_close(logits[0, :, 1], torch.cat([x.flatten() for x in flat]), rtol=1e-4, atol=1e-4)
        flat = [level[0].permute(1, 2, 0).reshape(-1, 4) for level in their_deltas]
        torch.testing.assert_close(deltas[0], torch.cat(flat), rtol=1e-4, atol=1e-4)

    @torch.no_grad()
    def test_heads(self, both: tuple[Any, MaskRCNN, Report]) -> None:
        theirs, ours, _ = both
        generator = torch.Generator().manual_seed(2)
        regions = torch.rand(5, 256, 7, 7, generator=generator)
        logits, deltas = ours.box_head(regions)
        their_logits, their_deltas = theirs.roi_heads.box_predictor(theirs.roi_heads.box_head(regions))
        torch.testing.assert_close(logits, their_logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(deltas.flatten(1), their_deltas, rtol=1e-4, atol=1e-4)
        regions = torch.rand(4, 256, 14, 14, generator=generator)
        masks = ours.mask_head(regions, torch.arange(4))
        expected = theirs.roi_heads.mask_predictor(theirs.roi_heads.mask_head(regions))
        torch.testing.assert_close(masks, expected[torch.arange(4), torch.arange(4)], rtol=1e-4, atol=1e-4)

    def test_report(self, both: tuple[Any, MaskRCNN, Report]) -> None:
        theirs, _, report = both
        counted = [name for name in theirs.state_dict() if name.endswith("num_batches_tracked")]
        assert sum(report.loaded.values()) == len(theirs.state_dict()) - len(counted)
        assert (report.initial_parts, report.skipped, report.notes) == ((), {}, ())
        assert report.classes_loaded == ("background", *NAMES)


class TestFiles:
    def test_names_of_the_published_file(self, tmp_path: Path, small: State) -> None:
        state, report = fit(saved(tmp_path / "v1.pth", OrderedDict(small)))
        assert_loaded(state, small)
        assert sum(report.loaded.values()) == len(small)

    def test_columns_of_the_first_layer_with_another_pool_size(self, tmp_path: Path) -> None:
        config = small_config(box_head=BoxHeadConfig(kind="fc2", channels=16, norm="none", pool_size=3))
        state = empty_model(config).state_dict()
        theirs = {their_name(name): torch.rand(tensor.shape) for name, tensor in state.items()}
        loaded = fit(saved(tmp_path / "v1.pth", theirs), config)[0]["box_head.fully_connected.0.weight"]
        weight = theirs["roi_heads.box_head.fc6.weight"]  # 8 channels of 3 x 3
        assert torch.equal(loaded[:, 8 * 5 + 2], weight[:, 9 * 2 + 5])  # channel 2 of the cell in row 1, column 2
        assert torch.equal(loaded, channels_last_columns(weight, 9))

    def test_safetensors(self, tmp_path: Path, small: State) -> None:
        save_file(small, tmp_path / "v1.safetensors")
        assert_loaded(fit(f"torchvision:{tmp_path / 'v1.safetensors'}")[0], small)

    def test_the_format_before_zip(self, tmp_path: Path, small: State) -> None:
        torch.save(small, tmp_path / "v1.pth", _use_new_zipfile_serialization=False)
        assert_loaded(fit(f"torchvision:{tmp_path / 'v1.pth'}")[0], small)

    def test_training_checkpoint_of_torchvision_s_scripts(self, tmp_path: Path, small: State) -> None:
        layer = nn.Linear(2, 2)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [16, 22])
        assert isinstance(schedule.state_dict()["milestones"], Counter)
        checkpoint = {
            "model": {f"module.{name}": tensor for name, tensor in small.items()},
            "optimizer": optimizer.state_dict(),
            "lr_scheduler": schedule.state_dict(),
            "args": argparse.Namespace(lr=0.02, dataset="coco", nested=argparse.Namespace(workers=4)),
            "epoch": 25,
        }
        assert_loaded(fit(saved(tmp_path / "model_25.pth", checkpoint))[0], small)

    def test_home_folder(self, tmp_path: Path, small: State, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        saved(tmp_path / "v1.pth", small)
        assert_loaded(fit("torchvision:~/v1.pth")[0], small)

    def test_half_precision(self, tmp_path: Path, small: State) -> None:
        state, _ = fit(saved(tmp_path / "v1.pth", {name: tensor.half() for name, tensor in small.items()}))
        assert_loaded(state, {name: tensor.half().float() for name, tensor in small.items()})

    def test_parts_that_are_not_ours_are_skipped_and_named(self, tmp_path: Path, small: State) -> None:
        more = {"roi_heads.keypoint_head.0.weight": torch.zeros(3), "temperature": torch.zeros(())}
        state, report = fit(saved(tmp_path / "v1.pth", small | more))
        assert_loaded(state, small)
        assert report.skipped == dict.fromkeys(more, "no layer of the model")

    def test_faster_rcnn_has_no_mask_head(self, tmp_path: Path, small: State) -> None:
        boxes_only = {name: tensor for name, tensor in small.items() if "mask" not in name}
        _, report = fit(saved(tmp_path / "boxes.pth", boxes_only))
        assert report.initial_parts == ("mask_head",)

    @pytest.mark.parametrize(
        ("depth", "norm"),
        [(18, "batch"), (18, "frozen"), (18, "frozen_statistics"), (34, "frozen"), (50, "frozen"), (101, "frozen")],
    )
    def test_plain_resnets(self, tmp_path: Path, depth: Any, norm: Any) -> None:
        with torch.device("meta"):
            resnet = models.get_model(f"resnet{depth}", weights=None)
        resnet.to_empty(device="cpu")
        generator = torch.Generator().manual_seed(0)
        for tensor in resnet.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(generator=generator)
        config = small_config(backbone=BackboneConfig(depth=depth, norm=norm))
        state, report = fit(saved(tmp_path / "resnet.pth", resnet.state_dict()), config)
        theirs = resnet.state_dict()
        for name, tensor in state.items():
            if name.startswith("backbone.") and not name.endswith("num_batches_tracked"):
                assert torch.equal(tensor, theirs[their_name(name).removeprefix("backbone.body.")]), name
        assert report.initial_parts == ("fpn", "rpn", "box_head", "mask_head")
        assert report.skipped == dict.fromkeys(("fc.weight", "fc.bias"), "classifier of ImageNet")
        assert report.class_rule == ""
        assert report.notes == ()

    def test_counters_are_taken_where_norms_count(self, tmp_path: Path) -> None:
        theirs = models.resnet18(weights=None).state_dict()
        theirs["bn1.num_batches_tracked"] += 7
        config = small_config(backbone=BackboneConfig(depth=18, norm="batch"))
        state, _ = fit(saved(tmp_path / "resnet.pth", theirs), config)
        assert state["backbone.stem.1.num_batches_tracked"] == 7

    def test_91_classes_are_taken_to_be_coco_s(self, tmp_path: Path, small: State) -> None:
        """Category ids, so person is 1, stop sign 13 and toothbrush 90."""
        coco = with_classes(small, 91)
        state, report = fit(saved(tmp_path / "coco.pth", coco), names=("stop sign", "nucleus", "toothbrush", "N/A"))
        bias = coco["roi_heads.box_predictor.cls_score.bias"]
        expected = [bias[0].item(), bias[13].item(), 0, bias[90].item(), 0]
        assert state["box_head.class_logits.bias"].tolist() == expected
        masks = coco["roi_heads.mask_predictor.mask_fcn_logits.weight"]
        assert torch.equal(state["mask_head.mask_logits.weight"][1], masks[13])
        deltas = coco["roi_heads.box_predictor.bbox_pred.weight"]
        assert torch.equal(state["box_head.box_deltas.weight"][12:16], deltas[360:364])
        assert report.class_rule == "by name (taken to be COCO's, as there are 91), 2 of 4"
        assert report.classes_initial == ("nucleus", "N/A")

    def test_the_published_file_is_known_by_its_content(
        self, tmp_path: Path, small: State, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its norms have epsilon 0."""
        source = saved(tmp_path / "renamed.pth", small)
        digits = hashlib.sha256((tmp_path / "renamed.pth").read_bytes()).hexdigest()[:8]
        monkeypatch.setattr(torchvision_weights, "EPSILON_ZERO", (digits,))
        state, report = fit(source)
        variance = small["backbone.body.bn1.running_var"].double()
        expected = small["backbone.body.bn1.weight"].double() * ((variance + 1e-5) / variance).sqrt()
        assert torch.equal(state["backbone.stem.1.weight"], expected.float())
        assert not torch.equal(state["backbone.stem.1.weight"], small["backbone.body.bn1.weight"])
        assert report.notes[0].startswith("trained with norms of epsilon 0: the weights of 20 norms were rescaled")

    def test_the_published_file_s_digits_are_torchvision_s(self) -> None:
        urls = [
            models.detection.MaskRCNN_ResNet50_FPN_Weights.COCO_V1.url,
            models.detection.FasterRCNN_ResNet50_FPN_Weights.COCO_V1.url,
        ]
        assert [url.rsplit("-", 1)[1].removesuffix(".pth") for url in urls] == list(torchvision_weights.EPSILON_ZERO)

    def test_knobs_of_another_implementation_are_noted(self, tmp_path: Path, small: State) -> None:
        config = small_config(anchors=AnchorConfig())
        _, report = fit(saved(tmp_path / "v1.pth", small), config)
        assert report.notes == (
            "the model computes otherwise than the one these weights were trained in: model.anchors.ratios "
            "[0.5, 1, 2] (there [2, 1, 0.5]), model.anchors.rounded False (there True); "
            "configs/torchvision_v1.yaml has the values of the original",
        )


def with_classes(theirs: State, number: int) -> State:
    """The same with another number of classes, all rows different."""
    state = dict(theirs)
    for name, tensor in theirs.items():
        if "predictor" in name and "conv5_mask" not in name:
            rows = 4 * number if "bbox_pred" in name else number
            state[name] = torch.arange(rows * tensor[0].numel()).reshape(rows, *tensor.shape[1:]).float()
    return state


class Malicious:
    """Runs a command where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.path}",)


class TestRefusals:
    def test_no_such_file(self) -> None:
        for reference in ("nowhere/model.pth", "model.pth", "COCO_V9"):
            message = refusal(f"torchvision:{reference}")
            assert message.startswith("no such file, nor the name of weights (short: COCO_V1, IMAGENET1K_V1")

    def test_a_folder(self, tmp_path: Path) -> None:
        assert refusal(f"torchvision:{tmp_path}") == "a folder, not a file"

    @pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
    @pytest.mark.parametrize("content", [b"", b"no weights at all" * 100, b"PK\x03\x04" + bytes(100)])
    def test_no_state_dict(self, tmp_path: Path, name: str, content: bytes) -> None:
        (tmp_path / name).write_bytes(content)
        message = refusal(f"torchvision:{tmp_path / name}")
        assert message.startswith("no state dict of PyTorch, or a damaged file (")

    @pytest.mark.parametrize("form", ["zip", "before zip", "safetensors"])
    @pytest.mark.parametrize("part", [0.0001, 0.3, 0.7, 0.999])
    def test_truncated(self, tmp_path: Path, small: State, form: str, part: float) -> None:
        path = tmp_path / ("model.safetensors" if form == "safetensors" else "model.pth")
        if form == "safetensors":
            save_file(small, path)
        else:
            torch.save(small, path, _use_new_zipfile_serialization=form == "zip")
        whole = path.read_bytes()
        path.write_bytes(whole[: int(len(whole) * part)])
        assert refusal(f"torchvision:{path}").startswith("no state dict of PyTorch, or a damaged file (")

    @pytest.mark.parametrize("form", ["zip", "before zip", "bare pickle", "bare pickle of protocol 4"])
    def test_a_pickle_that_runs_code_is_not_run(self, tmp_path: Path, small: State, form: str) -> None:
        path, proof = tmp_path / "model.pth", tmp_path / "proof"
        content = {**small, "extra": Malicious(proof)}
        if form.startswith("bare pickle"):
            path.write_bytes(pickle.dumps({"extra": Malicious(proof)}, protocol=4 if form.endswith("4") else 2))
        else:
            torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
        message = refusal(f"torchvision:{path}")
        assert not proof.exists()
        if form == "bare pickle of protocol 4":  # refused at its first instruction
            assert message == "no state dict of PyTorch, or a damaged file (Unsupported operand 149)"
            return
        assert message == (
            "its pickle asks for posix.system, which weights do not need: nothing was run or loaded; save "
            "model.state_dict() alone"
        )

    def test_a_whole_module(self, tmp_path: Path) -> None:
        source = saved(tmp_path / "model.pth", nn.Linear(2, 2))
        assert "its pickle asks for torch.nn.modules.linear.Linear" in refusal(source)
        assert refusal(source).endswith("save model.state_dict() alone")

    @pytest.mark.parametrize(
        ("content", "found"),
        [
            (torch.zeros(3), "no state dict, but Tensor; save model.state_dict()"),
            ([1, 2], "no state dict, but list"),
            ({}, "no state dict, but dict"),
            ({"epoch": 3}, "no state dict: 'epoch' is no tensor, but int"),
            ({3: torch.zeros(3)}, "no state dict: 3 is no name"),
            ({"model": {"conv1.weight": "text"}}, "no state dict: 'conv1.weight' is no tensor, but str"),
            ({"head.bias": torch.zeros(3)}, "a state dict, but none of its tensors is of torchvision's Mask R-CNN or "
             "of a ResNet (they are: head.bias)"),
        ],
    )  # fmt: skip
    def test_something_else(self, tmp_path: Path, content: Any, found: str) -> None:
        assert refusal(saved(tmp_path / "model.pth", content)).startswith(found)

    def test_a_wrong_shape(self, tmp_path: Path, small: State) -> None:
        wrong = {**small, "rpn.head.conv.weight": torch.zeros(8, 8, 5, 5)}
        assert refusal(saved(tmp_path / "model.pth", wrong)) == (
            "rpn.head.conv.weight has shape (8, 8, 5, 5), the configured model needs (8, 8, 3, 3); "
            "configs/torchvision_v1.yaml is the architecture's configuration"
        )

    def test_whole_numbers(self, tmp_path: Path, small: State) -> None:
        wrong = {**small, "rpn.head.conv.bias": torch.zeros(8, dtype=torch.int64)}
        assert refusal(saved(tmp_path / "model.pth", wrong)) == (
            "rpn.head.conv.bias holds torch.int64, no floating-point numbers"
        )

    def test_fc_layers_in_a_convolutional_head(self, tmp_path: Path, small: State) -> None:
        config = small_config(box_head=BoxHeadConfig(channels=16, norm="none"))
        assert refusal(saved(tmp_path / "model.pth", small), config) == (
            "of another architecture: roi_heads.box_head.fc6.weight has no place in the configured model; see "
            "model.box_head.kind (configs/torchvision_v1.yaml fits)"
        )

    def test_v2_in_v1(self, tmp_path: Path, second: nn.Module) -> None:
        message = refusal(saved(tmp_path / "model.pth", second.state_dict()), preset(1))
        assert message.startswith("of another architecture: backbone.fpn.inner_blocks.0.1.weight has no place in")
        assert message.endswith("see model.fpn.norm (configs/torchvision_v2.yaml fits)")

    def test_another_depth(self, tmp_path: Path) -> None:
        source = saved(tmp_path / "model.pth", models.resnet34(weights=None).state_dict())
        assert refusal(source) == (
            "of another architecture: its backbone is a ResNet-34, the configured one a ResNet-18; see "
            "model.backbone.depth"
        )

    def test_the_same_weight_twice(self, tmp_path: Path, small: State) -> None:
        twice = {**small, "rpn.head.conv.0.0.bias": torch.zeros(8)}
        assert refusal(saved(tmp_path / "model.pth", twice)) == (
            "rpn.head.conv.bias and rpn.head.conv.0.0.bias are the same weights of one layer"
        )


class TestNames:
    @pytest.fixture
    def asked(self, monkeypatch: pytest.MonkeyPatch, small: State) -> list[tuple[str, dict[str, Any]]]:
        """What torchvision would have downloaded, and how."""
        calls: list[tuple[str, dict[str, Any]]] = []

        def answer(weights: Any, **options: Any) -> State:
            calls.append((str(weights), options))
            return small if "RCNN" in str(weights) else models.resnet18(weights=None).state_dict()

        monkeypatch.setattr(models.WeightsEnum, "get_state_dict", answer)
        return calls

    @pytest.mark.parametrize(
        ("name", "kind", "depth", "expected"),
        [
            ("COCO_V1", "fc2", 50, "MaskRCNN_ResNet50_FPN_Weights.COCO_V1"),
            ("COCO_V1", "conv7x7", 50, "MaskRCNN_ResNet50_FPN_Weights.COCO_V1"),
            ("COCO_V1", "conv4fc1", 50, "MaskRCNN_ResNet50_FPN_V2_Weights.COCO_V1"),
            ("IMAGENET1K_V1", "fc2", 18, "ResNet18_Weights.IMAGENET1K_V1"),
            ("IMAGENET1K_V2", "fc2", 101, "ResNet101_Weights.IMAGENET1K_V2"),
            ("MaskRCNN_ResNet50_FPN_V2_Weights.COCO_V1", "fc2", 18, "MaskRCNN_ResNet50_FPN_V2_Weights.COCO_V1"),
            ("ResNet50_Weights.IMAGENET1K_V2", "fc2", 18, "ResNet50_Weights.IMAGENET1K_V2"),
        ],
    )
    def test_names(
        self, asked: list[tuple[str, dict[str, Any]]], name: str, kind: Any, depth: Any, expected: str
    ) -> None:
        config = small_config(box_head=BoxHeadConfig(kind=kind), backbone=BackboneConfig(depth=depth))
        weights = read_weights(f"torchvision:{name}", config)
        assert asked == [(expected, {"check_hash": True, "weights_only": True, "map_location": "cpu"})]
        assert weights.norm_epsilon == (0.0 if expected == "MaskRCNN_ResNet50_FPN_Weights.COCO_V1" else None)
        if "COCO" in name:
            assert weights.class_names == coco_categories()
            assert not weights.class_names_guessed
        assert expected in weights.source

    def test_classes_of_torchvision_s_weights_are_known(
        self, asked: list[tuple[str, dict[str, Any]]], small: State
    ) -> None:
        small_before = dict(small)
        small.update(with_classes(small, 91))
        try:
            state, report = fit("torchvision:COCO_V1", names=("person",))
        finally:
            small.update(small_before)
        assert len(asked) == 1
        assert report.class_rule == "by name (as torchvision states them), 1 of 1"
        assert state["box_head.class_logits.bias"].tolist() == [0, 1]

    @pytest.mark.parametrize(
        ("reference", "found"),
        [
            ("IMAGENET1K_V2", "torchvision has no ResNet18_Weights.IMAGENET1K_V2; there are "
             "ResNet18_Weights.IMAGENET1K_V1"),
            ("MaskRCNN_ResNet50_FPN_Weights.COCO_V7", "torchvision has no MaskRCNN_ResNet50_FPN_Weights.COCO_V7; "
             "there are MaskRCNN_ResNet50_FPN_Weights.COCO_V1"),
            ("ResNet77_Weights.IMAGENET1K_V1", "torchvision has no ResNet77_Weights.IMAGENET1K_V1; there are others"),
            ("ViT_B_16_Weights.IMAGENET1K_V1", "ViT_B_16_Weights are not of a Mask R-CNN or of a ResNet"),
        ],
    )  # fmt: skip
    def test_names_that_there_are_not(self, asked: list[Any], reference: str, found: str) -> None:
        assert refusal(f"torchvision:{reference}").startswith(found)
        assert asked == []

    def test_without_network(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*arguments: Any, **options: Any) -> None:
            raise URLError("Name or service not known")

        monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        assert refusal("torchvision:COCO_V1") == (
            "https://download.pytorch.org/models/maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth could not be downloaded "
            "(<urlopen error Name or service not known>); bring maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth here in "
            "another way and pass torchvision:PATH/maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth"
        )
        assert not list((tmp_path / "hub" / "checkpoints").iterdir())

    def test_what_was_downloaded_before_needs_no_network(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: State
    ) -> None:
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        folder = tmp_path / "hub" / "checkpoints"
        folder.mkdir(parents=True)
        saved(folder / "maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth", with_classes(small, 91))
        _, report = fit("torchvision:COCO_V1", names=("person",))
        assert report.classes_loaded == ("background", "person")
        assert report.source == "torchvision:COCO_V1 (MaskRCNN_ResNet50_FPN_Weights.COCO_V1)"


def test_a_head_without_norm_has_no_place_for_one(tmp_path: Path, second: nn.Module) -> None:
    """tiny_config's heads have group norm, whose statistics are not stored."""
    config = tiny_config(backbone=BackboneConfig(depth=50), fpn=FpnConfig(norm="batch"))
    message = refusal(saved(tmp_path / "model.pth", second.state_dict()), config)
    assert "of another architecture" in message
    assert "configs/torchvision_v2.yaml fits" in message
