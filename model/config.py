"""Every knob of the model, one default each.

The defaults are the architecture of arXiv 1703.06870 with ROIAlign as its authors later released it. Two more presets,
configs/matterport.yaml and configs/torchvision_v1.yaml and _v2.yaml, give the numbers of those implementations.
"""

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


NormKind = Literal["batch", "frozen", "frozen_statistics", "group", "none"]
"""frozen: stored statistics, nothing learns; frozen_statistics: stored statistics, scale and shift learn."""


class NormConfig(Config):
    """What all norms and the convolutions before them share."""

    epsilon: PositiveFloat = 1e-5
    """Added to the variance."""
    convolution_bias: bool = False
    """Convolutions before a norm have a bias as well, as every convolution of Keras has."""


class BackboneConfig(Config):
    """ResNet that turns the image into C2..C5."""

    depth: Literal[18, 34, 50, 101] = 50
    """Number of layers of the ResNet."""
    norm: Literal["batch", "frozen", "frozen_statistics", "group"] = "batch"
    """Norm of the ResNet: batch or group statistics (from scratch) or frozen ones (on pretrained weights)."""
    variant: Literal["torchvision", "keras"] = "torchvision"
    """keras: stride in a bottleneck's first 1x1 convolution, and the stem's pooling padded at the end only."""


class FpnConfig(Config):
    """Feature pyramid that turns C2..C5 into P2..P6."""

    channels: PositiveInt = 256
    """Channels of every pyramid level."""
    norm: NormKind = "none"
    """Norm after each of its convolutions."""


class AnchorConfig(Config):
    """Boxes that the RPN starts from."""

    scales: tuple[PositiveFloat, PositiveFloat, PositiveFloat, PositiveFloat, PositiveFloat] = (32, 64, 128, 256, 512)
    """Square root of the anchor area on P2, P3, P4, P5, P6, in input pixels."""
    ratios: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (0.5, 1.0, 2.0)
    """Width / height of the anchors at every position."""
    anchor_stride: PositiveInt = 1
    """Every how many feature cells anchors stand."""
    rounded: bool = False
    """Round anchors to whole pixels and count the stride of a level as canvas // cells, as torchvision does."""


class RpnConfig(Config):
    """Region proposal network: anchors to scored proposals."""

    channels: PositiveInt = 512
    """Channels of the shared 3x3 convolution."""
    num_convolutions: PositiveInt = 1
    """3x3 convolutions before the predictions."""
    objectness: Literal["softmax", "sigmoid"] = "softmax"
    """Two logits an anchor, background and object, or one."""
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
    pre_nms_top_k_inference: PositiveInt | None = None
    """The same in inference; null: pre_nms_top_k."""
    per_level: bool = False
    """Take the best scored anchors of each pyramid level, and let NMS compare within a level only."""
    nms_threshold: Fraction = 0.7
    """Proposals that overlap a better one by more than this IoU are dropped."""
    proposals_training: PositiveInt = 2000
    """Proposals an image after NMS in training."""
    proposals_inference: PositiveInt = 1000
    """Proposals an image after NMS in inference."""
    delta_scale: tuple[PositiveFloat, PositiveFloat, PositiveFloat, PositiveFloat] = (0.1, 0.1, 0.2, 0.2)
    """Box deltas are in units of these (dx, dy, dw, dh)."""
    min_size: NonNegativeFloat = 1e-2
    """Proposals with a side shorter than this, in input pixels, are dropped."""
    clip_to: Literal["image", "canvas"] = "image"
    """Proposals are clipped to the image, or to the canvas with its padding."""

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
    fixed_ratio: bool = False
    """Draw only as many negatives as keep positives at positive_fraction (none without positives); else fill up."""
    pooling: Literal["aligned", "unaligned", "crop_and_resize"] = "aligned"
    """ROIAlign with half-pixel centres, or without, or TensorFlow's crop_and_resize: one sample a bin."""
    canonical_size: PositiveFloat = 224.0
    """Side in input pixels of the region that is cut from P4 (FPN paper, equation 1)."""


class BoxHeadConfig(Config):
    """Classification and box regression of a region."""

    pool_size: PositiveInt = 7
    """Side of the ROIAlign grid."""
    kind: Literal["conv7x7", "fc2", "conv4fc1"] = "conv7x7"
    """Hidden layers: 7x7 and 1x1 convolution; two fully connected; four 3x3 convolutions and a fully connected one."""
    channels: PositiveInt = 1024
    """Width of the hidden layers that see the whole region."""
    convolution_channels: PositiveInt = 256
    """Width of the four convolutions of conv4fc1."""
    norm: NormKind = "batch"
    """Norm after each convolution."""
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
    norm: NormKind = "batch"
    """Norm after each of them."""
    targets: Literal["thresholded", "soft", "crop_and_resize"] = "thresholded"
    """ROIAlign cut at one half; covered share of the cell (torchvision); one sample a cell (the original)."""


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
    normalizer: Literal["image", "batch", "positives"] = "image"
    """Mean over rows of each image; of the worker's images (torchvision); box losses over positives (the original)."""
    inactive_classes: Literal["masked", "by_prediction"] = "masked"
    """Unlabelled classes: out of the softmax, or a region of such a best class does not count (the original)."""


class DetectionConfig(Config):
    """From head outputs to detections."""

    score_threshold: Fraction = 0.05
    """Detections of a lower probability of their class are dropped."""
    nms_threshold: Fraction = 0.5
    """Detections that overlap a better one of their class by more than this IoU are dropped."""
    max_per_image: PositiveInt = 100
    """Most detections an image."""
    min_size: NonNegativeFloat = 1e-2
    """Detections with a side shorter than this, in input pixels, are dropped; 0 keeps all."""
    best_class_only: bool = False
    """A region can be detected as its best class alone, instead of as every class above the threshold."""
    score: Literal["class", "class_times_mask"] = "class"
    """Probability of the class, or times how sure the mask is (`model.postprocess.final_scores`)."""
    whole_pixels: bool = False
    """Round boxes to whole original pixels and resize masks to exactly them, as the original does."""


class ModelConfig(Config):
    """Mask R-CNN."""

    pixel_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """RGB mean of images in 0..1 (ImageNet)."""
    pixel_std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (0.229, 0.224, 0.225)
    """RGB standard deviation of images in 0..1 (ImageNet)."""
    image_position: Literal["top_left", "centre"] = "top_left"
    """Where the network sees an image on its canvas."""
    padding: Literal["mean", "black"] = "mean"
    """What the network sees outside the image."""
    boxes: Literal["exclusive", "inclusive"] = "exclusive"
    """inclusive: box arithmetic counts the last pixel inside, as the original's normalised boxes do."""
    norms: NormConfig = NormConfig()
    """Norms."""
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
    weights: str = "none"
    """Initial: none, matterport:FILE.h5, torchvision:FILE or :COCO_V1, or a run or checkpoint of ours."""
    weights_classes: tuple[str, ...] | None = None
    """Names of classes 1..C-1 of a weight file that does not say them; classes of the same name keep their rows."""
