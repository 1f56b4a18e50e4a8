"""The configurations of published recipes: field by field their reference's, and run on a small piece of COCO."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pipeline.config import ExperimentConfig
from pipeline.optim import learning_rate
from pipeline.stream import StreamPlan
from tests.jobs.running import ROOT, run_job

COCO_MINI = Path(os.environ.get("COCO_MINI_DIR", ROOT.parent / "shared" / "data" / "coco_mini"))
NUM_TRAINING, NUM_VALIDATION = int(os.environ.get("COCO_MINI_IMAGES", "2")), 1
TRAIN2017_IMAGES_WITH_OBJECTS = 117_266

COMMON = {  # detectron2: config/defaults.py, configs/Base-RCNN-FPN.yaml, configs/common/models/mask_rcnn_fpn.py
    "model.backbone.depth": 50,
    "model.fpn.channels": 256,
    "model.anchors.scales": (32, 64, 128, 256, 512),
    "model.anchors.ratios": (0.5, 1.0, 2.0),
    "model.rpn.channels": 256,
    "model.rpn.objectness": "sigmoid",
    "model.rpn.positive_iou": 0.7,
    "model.rpn.negative_iou": 0.3,
    "model.rpn.anchors_per_image": 256,
    "model.rpn.positive_fraction": 0.5,
    "model.rpn.per_level": True,
    "model.rpn.pre_nms_top_k": 2000,
    "model.rpn.pre_nms_top_k_inference": 1000,
    "model.rpn.proposals_training": 1000,
    "model.rpn.proposals_inference": 1000,
    "model.rpn.nms_threshold": 0.7,
    "model.rpn.delta_scale": (1.0, 1.0, 1.0, 1.0),
    "model.roi.rois_per_image": 512,
    "model.roi.positive_fraction": 0.25,
    "model.roi.positive_iou": 0.5,
    "model.roi.add_ground_truth": True,
    "model.roi.pooling": "aligned",
    "model.box_head.pool_size": 7,
    "model.box_head.channels": 1024,
    "model.box_head.delta_scale": (0.1, 0.1, 0.2, 0.2),  # weights 10, 10, 5, 5
    "model.mask_head.pool_size": 14,
    "model.mask_head.channels": 256,
    "model.mask_head.num_convolutions": 4,
    "model.losses.box_loss": "smooth_l1",
    "model.losses.smooth_l1_beta": 0.0,
    "model.losses.rpn_bbox_loss": 1.0,
    "model.losses.mrcnn_mask_loss": 1.0,
    "model.detections.score_threshold": 0.05,
    "model.detections.nms_threshold": 0.5,
    "model.detections.max_per_image": 100,
    "data.empty_images_fraction": 0.0,
    "data.repeat_threshold": 0.0,
    "augment.horizontal_flip": 0.5,
    "augment.vertical_flip": 0.0,
    "augment.copy_paste": 0.0,
    "optim.name": "sgd",
    "optim.momentum": 0.9,
    "optim.nesterov": False,
    "optim.decay_biases": True,  # WEIGHT_DECAY_BIAS: None
    "optim.schedule": "multistep",
    "optim.decay_factor": 0.1,
    "optim.gradient_clip_norm": None,
    "optim.ema_decay": None,
}
FROZEN = {  # COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml and _3x.yaml
    "model.backbone.norm": "frozen",
    "model.fpn.norm": "none",
    "model.rpn.num_convolutions": 1,
    "model.box_head.kind": "fc2",
    "model.mask_head.norm": "none",
    "augment.short_side": (640, 800),
    "augment.short_side_step": 32,
    "augment.large_scale_jitter": None,
    "optim.learning_rate": 0.02,
    "optim.reference_batch_size": 16,
    "optim.weight_decay": 1e-4,
    "optim.warmup_steps": 1000,
    "optim.warmup_factor": 0.001,
    "train.trainable_layers": "3+",  # FREEZE_AT: 2
    "train.precision": "fp32",
}
LSJ = {  # new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py
    "model.backbone.norm": "batch",
    "model.fpn.norm": "batch",
    "model.rpn.num_convolutions": 2,
    "model.box_head.kind": "conv4fc1",
    "model.box_head.convolution_channels": 256,
    "model.box_head.norm": "batch",
    "model.mask_head.norm": "batch",
    "model.weights": "none",
    "data.canvases": ((1024, 1024),),
    "augment.short_side": None,
    "augment.large_scale_jitter": (0.1, 2.0),
    "optim.learning_rate": 0.1,
    "optim.reference_batch_size": 64,
    "optim.weight_decay": 4e-5,
    "optim.warmup_steps": 500,
    "optim.warmup_factor": 0.067,
    "train.trainable_layers": "all",
    "train.synchronise_norms": True,
    "train.gradient_compression": "fp16",
}
RECIPES: dict[str, tuple[dict[str, Any], tuple[int, ...], int, int]] = {  # fields, milestones, batch, steps
    "coco_1x": (FROZEN, (60_000, 80_000), 16, 90_000),
    "coco_3x": (FROZEN, (210_000, 250_000), 16, 270_000),
    "coco_lsj": (LSJ, (163_889, 177_546), 64, 184_375),
}


def read(name: str) -> ExperimentConfig:
    return ExperimentConfig.model_validate(yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text()))


def value_of(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = getattr(config, part)
    return config


@pytest.mark.parametrize("name", RECIPES)
def test_each_field_is_that_of_the_reference(name: str) -> None:
    fields, milestones, batch, steps = RECIPES[name]
    config = read(name)
    for key, value in {**COMMON, **fields}.items():
        assert value_of(config, key) == value, key
    assert config.optim.milestones == milestones
    assert config.global_batch_size == batch
    plan = StreamPlan(np.zeros(TRAIN2017_IMAGES_WITH_OBJECTS, dtype=np.int64), 64, 16, batch, seed=0)
    assert plan.steps_of_epochs(config.train.epochs) == steps
    peak = config.optim.learning_rate
    for step, share in ((milestones[0] - 1, 1), (milestones[0], 0.1), (milestones[1] - 1, 0.1), (steps - 1, 0.01)):
        assert learning_rate(step, steps, config.optim) == pytest.approx(peak * share)
    assert learning_rate(0, steps, config.optim) == pytest.approx(peak * config.optim.warmup_factor)


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first images of coco_mini with objects, laid out as COCO is."""
    if not COCO_MINI.is_dir():
        pytest.skip(f"no {COCO_MINI}")
    root = tmp_path_factory.mktemp("coco")
    (root / "annotations").mkdir()
    for split, number in (("train", NUM_TRAINING), ("val", NUM_VALIDATION)):
        content = json.loads((COCO_MINI / "annotations" / f"instances_{split}.json").read_text())
        with_objects = {annotation["image_id"] for annotation in content["annotations"]}
        content["images"] = [image for image in content["images"] if image["id"] in with_objects][:number]
        kept = {image["id"] for image in content["images"]}
        content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] in kept]
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
        (root / f"{split}2017").symlink_to(COCO_MINI / "images")
    return root


@pytest.mark.cluster
@pytest.mark.parametrize("name", RECIPES)
def test_an_epoch_with_another_data_root_and_batch_size(name: str, coco: Path, tmp_path: Path) -> None:
    """Two images by default, since an image takes 10 s and more in fp32 on one core; COCO_MINI_IMAGES=93 for all."""
    outcome = run_job(
        "train", "--config", f"configs/{name}.yaml", "--data.root", str(coco),
        "--train.batch_size_per_worker", "1", "--scaling.num_workers", "1",
        "--train.epochs", "1", "--run.storage_path", str(tmp_path),
    )  # fmt: skip
    assert outcome.exit_code == 0, outcome.errors
    assert outcome.last_line["steps"] == NUM_TRAINING
    reference = read(name).optim.reference_batch_size
    assert f" x 1 / {reference} = " in outcome.output
    assert f"warm-up {read(name).optim.warmup_steps} x {reference} / 1 = " in outcome.output
