"""Every knob of an experiment, one default each; an unknown key or a value out of range is an error.

The same names stand in YAML files, on the command line (`--optim.learning_rate 0.01`) and in MLflow's parameters.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from model.config import Config, Fraction, ModelConfig, NonNegativeFloat, PositiveFloat, PositiveInt
from pipeline.batch_shares import explain_division
from pipeline.predict_config import PredictSettings

NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFraction = Annotated[float, Field(gt=0.0, le=1.0)]
CanvasSide = Annotated[int, Field(ge=32, multiple_of=32)]


# `scheme://user:password@host`, `s3://key:secret@bucket`, `https://key@host`, `?secret_key=...`
_SECRET = re.compile(
    r"://[^/?@\s]*:[^/?@\s]*@|https?://[^/?@\s]+@|(?:postgres|mysql|mssql|mongodb|redis)[\w+]*://[^?@\s]*:[^?\s]*@"
    r"|(?:s3a?|gs|gcs|az|abfss?|wasbs?)://[^/?@\s]*:[^?\s]*@"  # keys of AWS may have a slash
    r"|://[^/?@\s]*:(?!\d+(?:/|$))[^?\s]*@"  # a password with one, but no port
    r"|[?&#;](?:[^=&;]*(?:secret|passw|token|access_?key|api_?key|signature|credential)[^=&;]*"
    r"|sig|key|auth|sas|pwd|pass)=",
    re.IGNORECASE,
)
SECRET_ADVICE = (
    "give it in the environment of all nodes (MLFLOW_TRACKING_USERNAME and _PASSWORD, "
    "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS) or by the nodes' role"
)


def has_secret(text: str) -> bool:
    """Whether an address in a text has a password or key in it."""
    return _SECRET.search(text) is not None


def _texts(values: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in a configuration, with the full name of its key."""
    if isinstance(values, dict):
        for name, value in values.items():
            yield from _texts(value, f"{key}.{name}" if key else name)
    elif isinstance(values, list):
        for value in values:
            yield from _texts(value, key)
    elif isinstance(values, str):
        yield key, values


class CocoSource(Config):
    """One COCO instances file with the folder of its images."""

    annotations: str
    """COCO instances JSON, absolute or relative to data.root."""
    images: str = "images"
    """Folder that file_name is relative to, absolute or relative to data.root."""


class SyntheticSettings(Config):
    """The shapes data set, written below data.root where it is not there yet."""

    training_images: PositiveInt = 1500
    """Images to train on."""
    validation_images: PositiveInt = 200
    """Images to evaluate on."""
    seed: NonNegativeInt = 0
    """What the data set is a function of."""


ErrorOrDrop = Literal["error", "drop"]
ErrorDropOrFix = Literal["error", "drop", "fix"]
ErrorDropOrKeep = Literal["error", "drop", "keep"]
AnyPolicy = Literal["error", "drop", "fix", "keep"]


class PolicySettings(Config):
    """What to do about each kind of problem in the data: stop, leave the record out, mend it, or leave it as it is."""

    malformed_record: ErrorOrDrop = "error"
    """A record without what it needs (id, size, four numbers for a box, run lengths that fit), or far off its image."""
    non_finite_number: ErrorOrDrop = "error"
    """NaN or infinity in a box, an area or an outline."""
    path_outside_folder: ErrorOrDrop = "error"
    """An absolute path or `..` in file_name; the file is never opened."""
    duplicate_image_id: ErrorOrDrop = "error"
    """Two images with one id; drop keeps the first."""
    duplicate_annotation_id: ErrorOrDrop = "error"
    """Two annotations with one id; drop keeps the first."""
    duplicate_file_name: ErrorDropOrKeep = "keep"
    """Two images with one file; drop keeps the first."""
    duplicate_image: ErrorDropOrKeep = "keep"
    """Two images whose files have the same bytes under different names; drop keeps the first."""
    image_in_both_splits: ErrorDropOrKeep = "keep"
    """A training image whose file, or its bytes, is validated on too: the metrics lie; drop does not train on it."""
    duplicate_category_name: Literal["error", "fix"] = "error"
    """Two categories with one name; fix makes them one class."""
    unknown_image: ErrorOrDrop = "error"
    """An annotation of an image that is not listed."""
    unknown_category: ErrorOrDrop = "error"
    """An annotation of a category that is not listed, such as 0."""
    no_segmentation: ErrorOrDrop = "error"
    """An annotation without an outline."""
    missing_file: ErrorOrDrop = "error"
    """An image whose file is not there."""
    file_in_subfolder: ErrorDropOrFix = "error"
    """An image whose file is only in a subfolder; fix takes it from there where there is just one."""
    unreadable_image: ErrorOrDrop = "error"
    """A file that cannot be decoded whole."""
    decompression_bomb: ErrorOrDrop = "error"
    """A file that claims more pixels than anybody has; it is never decoded."""
    size_mismatch: ErrorOrDrop = "error"
    """A file of another size than its record says, most likely because of a lost EXIF orientation."""
    exif_orientation: ErrorDropOrKeep = "keep"
    """A file with an EXIF turn; it is turned, unless only the unturned pixels have the size of the record."""
    image_without_annotations: ErrorDropOrKeep = "keep"
    """An image without objects teaches what background is."""
    box_without_size: ErrorDropOrFix = "drop"
    """A box with a side of zero or less; fix takes the box of the mask."""
    box_outside_image: ErrorDropOrFix = "drop"
    """A box that lies outside the image; fix takes the box of the mask."""
    box_beyond_edge: AnyPolicy = "keep"
    """A box that leaves the image by more than a pixel (it is clipped for training); fix takes the box of the mask."""
    short_polygon: ErrorDropOrFix = "fix"
    """A part of an outline with fewer than three points or without extent; fix leaves it out, see empty_mask."""
    empty_mask: ErrorOrDrop = "drop"
    """An outline that covers no pixel, or whose parts are all short polygons that fix leaves out."""
    box_disagrees_with_mask: AnyPolicy = "keep"
    """A box more than 2 pixels off the box of its mask; fix takes the box of the mask."""
    area_disagrees_with_mask: AnyPolicy = "keep"
    """An area more than 15 % off the number of pixels of its mask; fix takes that number."""
    crowd: ErrorDropOrKeep = "keep"
    """A crowd: never trained on as an object, ignored in matching and in evaluation."""


class DataSettings(Config):
    """Where images and annotations are, and how they are laid out for training."""

    root: str = "."
    """Folder that the paths of the sources are relative to."""
    sources: Annotated[tuple[CocoSource, ...], Field(min_length=1)] = (
        CocoSource(annotations="annotations/instances_train.json"),
    )
    """COCO files to train on together; classes are united by name."""
    validation_sources: Annotated[tuple[CocoSource, ...], Field(min_length=1)] = (
        CocoSource(annotations="annotations/instances_val.json"),
    )
    """COCO files to evaluate on."""
    validation_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of the images of data.sources to keep back and evaluate on, instead of data.validation_sources."""
    synthetic: SyntheticSettings | None = None
    """Make the shapes data set below data.root first."""
    shards: str | None = None
    """Folder of the prepared Arrow shards; by default one below run.storage_path, named by what went into it."""
    policies: PolicySettings = PolicySettings()
    """What to do about each kind of problem in the data."""
    rows_per_shard: PositiveInt = 64
    """Images in a shard."""
    image_format: Literal["raw", "jpeg"] = "raw"
    """Pixels as they are, fastest to read, or JPEG, for small disks."""
    jpeg_quality: Annotated[int, Field(ge=1, le=100)] = 95
    """Quality of stored JPEG images."""
    verify_shards: bool = True
    """Compare every shard with its SHA-256 before a training uses it; rows are compared when read in any case."""
    canvases: Annotated[tuple[tuple[CanvasSide, CanvasSide], ...], Field(min_length=1)] = (
        (800, 1344),
        (1344, 800),
        (1088, 1088),
    )
    """Height and width that images are resized and padded to; each image goes where it comes out largest."""
    short_side: PositiveInt | None = None
    """Pixels of the shorter side that images are resized to, where their canvas has room; null: as large as it has."""
    resize_method: Literal["antialiased", "original"] = "antialiased"
    """Bilinear with anti-aliasing, or without and darker at the border, as the original's."""
    mini_masks: PositiveInt | None = None
    """Train on masks of so many pixels a side inside their box (the original: 56); null: on exact ones."""
    repeat_threshold: Fraction = 0.0
    """Rows with a class that fewer than this share of images show are repeated (LVIS repeat factors); 0 for never."""
    empty_images_fraction: Fraction = 1.0
    """Share of the images without objects that an epoch trains on."""
    shuffle_window: PositiveInt = 16
    """Shards whose rows are shuffled together."""
    object_store_megabytes: PositiveInt = 512
    """Most memory that batches on their way to the workers may take."""

    def sources_to_read(self) -> dict[str, CocoSource]:
        """All annotation files that are read, by key (`sources.0`); none to validate on where images are kept back."""
        validation = () if self.validation_fraction else self.validation_sources
        named = (("sources", self.sources), ("validation_sources", validation))
        return {f"{key}.{number}": source for key, sources in named for number, source in enumerate(sources)}


class AugmentSettings(Config):
    """Random changes of training images, a function of (seed, epoch, row)."""

    horizontal_flip: Fraction = 0.5
    """Share of images mirrored left to right."""
    vertical_flip: Fraction = 0.0
    """Share of images mirrored top to bottom."""
    short_side: tuple[PositiveInt, PositiveInt] | None = None
    """Smallest and largest short side that images are resized to, input pixels, as far as their canvas allows."""
    short_side_step: PositiveInt = 1
    """Difference between the short sides that occur."""
    large_scale_jitter: tuple[PositiveFloat, PositiveFloat] | None = None
    """Smallest and largest factor of an image's size on its canvas, which is cut out at a random place."""
    brightness: Fraction = 0.0
    """Largest change of the brightness, as a share of it."""
    contrast: Fraction = 0.0
    """Largest change of the contrast, as a share of it."""
    saturation: Fraction = 0.0
    """Largest change of the saturation, as a share of it."""
    hue: Annotated[float, Field(ge=0.0, le=0.5)] = 0.0
    """Largest shift of the hue, in turns of the colour circle."""
    copy_paste: Fraction = 0.0
    """Share of images that get about half of the objects of another image of their source."""

    @model_validator(mode="after")
    def _ranges_in_order(self) -> Self:
        for name in ("short_side", "large_scale_jitter"):
            values = getattr(self, name)
            if values is not None and values[0] > values[1]:
                raise ValueError(f"{name} {list(values)} has to rise")
        if self.short_side is not None and self.large_scale_jitter is not None:
            raise ValueError("short_side and large_scale_jitter both set the scale: choose one, make the other null")
        return self


class OptimSettings(Config):
    """Optimiser and learning rate."""

    name: Literal["sgd", "adamw"] = "sgd"
    """Optimiser."""
    learning_rate: PositiveFloat = 0.02
    """Learning rate after warm-up, for the reference batch or else for the global batch that is configured."""
    reference_batch_size: PositiveInt | None = None
    """Batch that learning_rate, warmup_steps and milestones are for and scaled from; null takes them as they are."""
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """Momentum of SGD."""
    nesterov: bool = False
    """Nesterov's form of the momentum of SGD."""
    weight_decay: NonNegativeFloat = 1e-4
    """Weight decay of weights; norms have none."""
    decay_biases: bool = False
    """Decay the biases of convolutions and linear layers too."""
    warmup_steps: NonNegativeInt = 1000
    """Steps over which the learning rate rises linearly."""
    warmup_factor: Fraction = 1e-3
    """Share of the learning rate that the first step has."""
    schedule: Literal["cosine", "multistep", "constant"] = "cosine"
    """What the learning rate does after warm-up; cosine ends at a hundredth on the last step."""
    milestones: tuple[PositiveInt, ...] = ()
    """Steps at which multistep multiplies the learning rate by decay_factor."""
    decay_factor: PositiveFraction = 0.1
    """What multistep multiplies the learning rate by."""
    gradient_clip_norm: PositiveFloat | None = 5.0
    """Largest global norm of the gradient; null does not clip."""
    ema_decay: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Evaluate and predict with an exponential moving average of the weights of this decay a step; null for without."""

    @model_validator(mode="after")
    def _schedule_is_whole(self) -> Self:
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones {list(self.milestones)} have to rise")
        if (self.schedule == "multistep") != bool(self.milestones):
            raise ValueError(f"schedule {self.schedule} with milestones {list(self.milestones)}: multistep needs some")
        if self.nesterov and (self.name != "sgd" or self.momentum == 0):
            raise ValueError("nesterov needs name sgd and a momentum")
        return self


class TrainSettings(Config):
    """Length and shape of a training."""

    epochs: PositiveFloat = 12.0
    """Passes over the training rows; a fraction is allowed."""
    max_steps: PositiveInt | None = None
    """Stop after so many steps, whatever the epochs."""
    batch_size_per_worker: PositiveInt = 2
    """Images a worker and pass; the global batch is this times accumulation_steps times scaling.num_workers."""
    accumulation_steps: PositiveInt = 1
    """Passes whose gradients are averaged into one step: a large global batch in little memory."""
    trainable_layers: Literal["heads", "5+", "4+", "3+", "all"] = "all"
    """Layers that learn: FPN, RPN and heads alone, or with the ResNet from that stage on."""
    synchronise_norms: bool = False
    """Batch norm takes its statistics from the images of all workers."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the forward pass; auto takes bf16 where the processor computes in it, fp16 on older GPUs."""
    gradient_compression: Literal["none", "bf16", "fp16"] = "none"
    """What workers send their gradients as."""
    deterministic: bool | None = None
    """Take every sum in a fixed order, so that a resumed training ends with the same bits; null: on CPUs."""
    seed: NonNegativeInt = 0
    """What initial weights, order, augmentation and sampling are functions of."""
    target_bbox_AP: Fraction | None = None  # noqa: N815 - as the metric is called
    """Stop once an evaluation has this box AP (and the other targets)."""
    target_segm_AP: Fraction | None = None  # noqa: N815
    """Stop once an evaluation has this mask AP (and the other targets)."""
    patience: PositiveInt | None = None
    """Stop after so many evaluations in turn without a better mask AP than before."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """What to do about a step whose loss or gradient is not finite; it is recorded in the run's folder in any case."""
    nonfinite_skips: PositiveInt = 5
    """Steps that skip leaves out in a whole training; one more stops it."""
    evaluate_every_epochs: PositiveInt = 1
    """Epochs between evaluations; the last step is always evaluated."""
    rpn_recall: bool = True
    """Log with every evaluation how many objects the RPN's proposals find: rpn_AR_100 and rpn_AR_1000."""
    log_every_steps: PositiveInt = 10
    """Steps whose metrics are logged together."""


class CheckpointSettings(Config):
    """When the state is saved, beside every evaluation and the end."""

    every_epochs: PositiveInt = 1
    """Epochs between checkpoints."""
    every_minutes: PositiveFloat = 15.0
    """Longest time between two checkpoints."""
    every_steps: PositiveInt | None = None
    """Steps between checkpoints, beside the others; null for none of these."""
    keep_best: PositiveInt = 1
    """Evaluated checkpoints kept, those with the largest segm_AP."""
    keep_last: Annotated[int, Field(ge=2)] = 2
    """Latest checkpoints kept; where the last one is damaged, a training goes on from the one before it."""


class ScalingSettings(Config):
    """Workers and what each of them gets."""

    num_workers: PositiveInt = 2
    """Data-parallel training processes."""
    min_workers: PositiveInt | None = None
    """Go on with as few workers while nodes are lost, the global batch staying as it is; null: wait for all."""
    grow_minutes: PositiveFloat = 5.0
    """How often fewer workers look whether there is room for more again; they start anew for that, so not too often."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """What workers train on; auto takes GPUs where the cluster has one for every worker."""
    cpus_per_worker: PositiveInt = 1
    """CPUs reserved for a worker, and its number of threads on a CPU."""
    wait_for_nodes_minutes: PositiveFloat = 30.0
    """How long to wait for an autoscaler to bring the resources asked for."""


class RunSettings(Config):
    """Where a run is kept and recorded."""

    name: str = "maskrcnn"
    """Name of the run; the same name again goes on with it."""
    storage_path: str = "runs"
    """Folder or bucket that all nodes reach; the run lives in storage_path/name."""
    mlflow_uri: str | None = None
    """MLflow server; by default a sqlite file in storage_path."""
    mlflow_experiment: str = "mask-rcnn"
    """MLflow experiment."""
    max_failures: NonNegativeInt = 3
    """Lost workers or crashes after which the run gives up."""
    max_preemptions: NonNegativeInt = 100
    """Nodes taken back with notice after which the run gives up."""
    hang_minutes: PositiveFloat = 10.0
    """Time without any movement after which a worker is taken for hanging, and is ended and started again."""

    @model_validator(mode="after")
    def _name_is_a_folder_name(self) -> Self:
        if not self.name or self.name in (".", "..") or any(c in self.name for c in "/\\\0"):
            raise ValueError(f"name {self.name!r} has to be a plain folder name")
        return self


class ExperimentConfig(Config):
    """An experiment, whole."""

    model: ModelConfig = ModelConfig()
    """The network."""
    data: DataSettings = DataSettings()
    """Images and annotations."""
    augment: AugmentSettings = AugmentSettings()
    """Augmentation."""
    optim: OptimSettings = OptimSettings()
    """Optimiser."""
    train: TrainSettings = TrainSettings()
    """Training."""
    checkpoints: CheckpointSettings = CheckpointSettings()
    """Checkpoints."""
    scaling: ScalingSettings = ScalingSettings()
    """Workers."""
    run: RunSettings = RunSettings()
    """Bookkeeping."""
    predict: PredictSettings = PredictSettings()
    """Prediction."""

    @property
    def global_batch_size(self) -> int:
        """Images a step over all workers."""
        return self.train.batch_size_per_worker * self.train.accumulation_steps * self.scaling.num_workers

    @model_validator(mode="after")
    def _no_secrets(self) -> Self:
        for key, value in _texts(self.model_dump(mode="json")):
            if has_secret(value):  # the value is not shown
                raise ValueError(
                    f"{key} has a password or key in its address, which would end up in MLflow, checkpoints and logs; "
                    f"{SECRET_ADVICE}"
                )
        return self

    @model_validator(mode="after")
    def _batch_can_be_shared_out(self) -> Self:
        least, most = self.scaling.min_workers, self.scaling.num_workers
        if least is None:
            return self
        if least > most:
            raise ValueError(f"scaling.min_workers {least} is more than scaling.num_workers {most}")
        problem = explain_division(self.global_batch_size, least, most)
        if problem is not None:
            raise ValueError(f"scaling.min_workers {least} to scaling.num_workers {most}: {problem}")
        return self

    @model_validator(mode="after")
    def _frozen_layers_keep_their_statistics(self) -> Self:
        if self.train.trainable_layers != "all" and self.model.backbone.norm == "batch":
            raise ValueError(
                f"train.trainable_layers {self.train.trainable_layers} needs model.backbone.norm frozen: "
                "layers that do not learn must not change by their statistics either"
            )
        return self
