"""Every knob of the model, one default each; the default preset of the architecture in arXiv 1703.06870."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]


class Config(BaseModel):
    """A frozen part of the configuration; an unknown key is an error, and so is a number that is not finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class BackboneConfig(Config):
    """ResNet that turns the image into C2..C5."""

    depth: Literal[18, 34, 50, 101] = 50
    """Number of layers of the ResNet."""
    norm: Literal["batch", "frozen"] = "batch"
    """Norm of the ResNet: batch statistics (from scratch) or frozen ones (on pretrained weights)."""


class FpnConfig(Config):
    """Feature pyramid that turns C2..C5 into P2..P6."""

    channels: PositiveInt = 256
    """Channels of every pyramid level."""


class AnchorConfig(Config):
    """Boxes that the RPN starts from."""

    scales: tuple[PositiveFloat, PositiveFloat, PositiveFloat, PositiveFloat, PositiveFloat] = (32, 64, 128, 256, 512)
    """Square root of the anchor area on P2, P3, P4, P5, P6, in input pixels."""
    ratios: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (0.5, 1.0, 2.0)
    """Width / height of the anchors at every position."""
    anchor_stride: PositiveInt = 1
    """Every how many feature cells anchors stand."""


class RpnConfig(Config):
    """Region proposal network: anchors to scored proposals."""

    channels: PositiveInt = 512
    """Channels of the shared 3x3 convolution."""
    positive_iou: Fraction = 0.7
    """An anchor with at least this IoU with an object is positive."""
    negative_iou: Fraction = 0.3
    """An anchor with less than this IoU with every object is negative."""
    anchors_per_image: PositiveInt = 256
    """Anchors an image that enter the RPN losses."""
    positive_fraction: Fraction = 0.5
    """Largest share of positives among them."""
    pre_nms_top_k: PositiveInt = 6000
    """Best scored anchors an image that go into NMS."""
    nms_threshold: Fraction = 0.7
    """Proposals that overlap a better one by more than this IoU are dropped."""
    proposals_training: PositiveInt = 2000
    """Proposals an image after NMS in training."""
    proposals_inference: PositiveInt = 1000
    """Proposals an image after NMS in inference."""
    delta_scale: tuple[PositiveFloat, PositiveFloat, PositiveFloat, PositiveFloat] = (0.1, 0.1, 0.2, 0.2)
    """Box deltas are in units of these (dx, dy, dw, dh)."""

    @model_validator(mode="after")
    def _thresholds_in_order(self) -> Self:
        if self.negative_iou > self.positive_iou:
            raise ValueError(f"negative_iou {self.negative_iou} is above positive_iou {self.positive_iou}")
        return self


class RoiConfig(Config):
    """Sampling of regions for the heads, and how features are cut out for them."""

    rois_per_image: Annotated[int, Field(ge=4)] = 200
    """Regions an image that the heads are trained on."""
    positive_fraction: Fraction = 0.25
    """Largest share of positives among them."""
    positive_iou: Fraction = 0.5
    """A region with at least this IoU with an object is positive, every other one negative."""
    add_ground_truth: bool = True
    """Ground-truth boxes join the proposals in training."""
    canonical_size: PositiveFloat = 224.0
    """Side in input pixels of the region that is cut from P4 (FPN paper, equation 1)."""


class BoxHeadConfig(Config):
    """Classification and box regression of a region."""

    pool_size: PositiveInt = 7
    """Side of the ROIAlign grid."""
    channels: PositiveInt = 1024
    """Width of the two hidden layers."""
    norm: Literal["batch", "frozen", "group", "none"] = "batch"
    """Norm after each of them."""
    delta_scale: tuple[PositiveFloat, PositiveFloat, PositiveFloat, PositiveFloat] = (0.1, 0.1, 0.2, 0.2)
    """Box deltas are in units of these (dx, dy, dw, dh)."""


class MaskHeadConfig(Config):
    """Mask of a region, one for each class."""

    pool_size: PositiveInt = 14
    """Side of the ROIAlign grid; masks have twice this side."""
    channels: PositiveInt = 256
    """Width of the convolutions."""
    num_convolutions: PositiveInt = 4
    """Number of 3x3 convolutions before the transposed one."""
    norm: Literal["batch", "frozen", "group", "none"] = "batch"
    """Norm after each of them."""


class LossConfig(Config):
    """Weights of the five losses in their sum."""

    rpn_class_loss: NonNegativeFloat = 1.0
    """Weight of object against background for anchors."""
    rpn_bbox_loss: NonNegativeFloat = 1.0
    """Weight of the box deltas of positive anchors."""
    mrcnn_class_loss: NonNegativeFloat = 1.0
    """Weight of the class of regions."""
    mrcnn_bbox_loss: NonNegativeFloat = 1.0
    """Weight of the box deltas of positive regions."""
    mrcnn_mask_loss: NonNegativeFloat = 1.0
    """Weight of the masks of positive regions."""
    box_loss: Literal["smooth_l1", "giou"] = "smooth_l1"
    """What the two box losses measure: distance of the deltas, or generalized IoU of the boxes."""
    smooth_l1_beta: NonNegativeFloat = 1.0
    """Where smooth L1 turns from quadratic to linear, in delta units; 0 is plain L1."""


class DetectionConfig(Config):
    """From head outputs to detections."""

    score_threshold: Fraction = 0.05
    """Detections with a lower score are dropped."""
    nms_threshold: Fraction = 0.5
    """Detections that overlap a better one of their class by more than this IoU are dropped."""
    max_per_image: PositiveInt = 100
    """Most detections an image."""
    min_size: PositiveFloat = 1e-2
    """Proposals and detections with a side shorter than this, in input pixels, are dropped."""


class ModelConfig(Config):
    """Mask R-CNN."""

    pixel_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """RGB mean of images in 0..1 (ImageNet)."""
    pixel_std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (0.229, 0.224, 0.225)
    """RGB standard deviation of images in 0..1 (ImageNet)."""
    backbone: BackboneConfig = BackboneConfig()
    """ResNet."""
    fpn: FpnConfig = FpnConfig()
    """Feature pyramid."""
    anchors: AnchorConfig = AnchorConfig()
    """Anchors."""
    rpn: RpnConfig = RpnConfig()
    """Region proposal network."""
    roi: RoiConfig = RoiConfig()
    """Regions for the heads."""
    box_head: BoxHeadConfig = BoxHeadConfig()
    """Box head."""
    mask_head: MaskHeadConfig = MaskHeadConfig()
    """Mask head."""
    crowd_iou: Fraction = 0.001
    """An anchor or region with at least this IoU with a crowd is never a negative."""
    losses: LossConfig = LossConfig()
    """Loss weights."""
    detections: DetectionConfig = DetectionConfig()
    """Postprocessing."""
