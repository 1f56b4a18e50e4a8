"""Our recipe against a Mask R-CNN of torchvision's parts: AP after the same time, and after the same steps.

    python benchmarks/accuracy.py --config configs/nuclei.yaml --set data.root=FOLDER --minutes 12 --seeds 3

The peer is torchvision's model (the parts of maskrcnn_resnet50_fpn) with the same backbone depth, widths, anchors and
numbers of regions as the configuration, from scratch, in as many processes of one core each, with our optimiser,
schedule, clipping, precision and memory format, in two forms: `torchvision` has the recipe of the strongest form that
we knew before (PEER_RECIPE: AdamW at 0.0004, 256 px, mirrored left to right), `torchvision, our recipe` gets everything
around the model from us, size and augmentation of the images included, so that only the model is its own. All are
timed in turns first; each then trains so many steps as fit into the minutes, with the schedule ending there. The last
training is ours with as many steps as `torchvision` had. Trainings follow each other in turn; AP is that of the last
step, on the validation images. Seconds say how long a training really took, evaluation left out.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
import yaml
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models import detection, resnet
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import MultiScaleRoIAlign, poolers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without being installed

from benchmarks.ingredients import batches_of_rank, free_port, prepare_data, with_changes
from benchmarks.results import Table, named, show
from model.canvas import image_windows, normalise
from model.config import ModelConfig
from model.losses import LOSS_NAMES
from model.mask_rcnn import MaskRCNN
from model.structures import Batch, Detections
from pipeline import allocator
from pipeline.config import ExperimentConfig
from pipeline.ema import averaged_copy, update_average
from pipeline.evaluation import (
    EvaluatedRow,
    average_precision,
    evaluate_rows,
    evaluated_row,
    predict_rows,
)
from pipeline.optim import build_optimizer
from pipeline.prepare import PreparedData
from pipeline.shards import ShardSet
from pipeline.training import autocast_dtype, check_finite, data_parallel_options, gradient_scaler, train_step
from pipeline.training_plan import make_plan, total_steps

ROOT = Path(__file__).resolve().parents[1]
OURS, THEIRS, OURS_AT_THEIR_STEPS = "ours", "torchvision", "ours, torchvision's steps"
THEIRS_WITH_OUR_RECIPE = "torchvision, our recipe"
KINDS = (OURS, THEIRS, OURS_AT_THEIR_STEPS, THEIRS_WITH_OUR_RECIPE)
PEER_RECIPE: dict[str, Any] = {
    "augment": {"horizontal_flip": 0.5}, "data.canvases": [[256, 256]],
    "optim.learning_rate": 0.0004, "optim.ema_decay": None,
}  # fmt: skip
"""What is changed for it in the recipe of the nuclei."""
WARM_UP_STEPS, TIMED_STEPS, TIMED_TURNS = 3, 60, 2
OFF_FRACTION = 0.05  # of the time a training should have taken
STRIDES = (4, 8, 16, 32)
EVALUATION_BATCH_SIZE = 4
THEIR_LOSSES = ("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask")  # in our order


class TorchvisionPeer(nn.Module):
    """torchvision's MaskRCNN in the sizes of a configuration; takes our batches, answers with our losses' names."""

    def __init__(self, config: ModelConfig, num_classes: int) -> None:
        super().__init__()
        self.config = config
        body = resnet.__dict__[f"resnet{config.backbone.depth}"](weights=None)
        widths = [body.fc.in_features // factor for factor in (8, 4, 2, 1)]
        layers = {f"layer{stage}": str(stage - 1) for stage in (1, 2, 3, 4)}
        channels = config.fpn.channels
        backbone = BackboneWithFPN(body, layers, widths, channels)
        ratios = tuple(config.anchors.ratios)
        anchors = detection.anchor_utils.AnchorGenerator(
            tuple((scale,) for scale in config.anchors.scales), (ratios,) * len(config.anchors.scales)
        )
        levels, canonical = list("0123"), config.roi.canonical_size
        pools = [MultiScaleRoIAlign(levels, side, 2, canonical_scale=canonical) for side in (7, 14)]
        for pool in pools:  # else guessed from the sizes of the first images, not of their canvas
            pool.scales = [1 / stride for stride in STRIDES]
            pool.map_levels = poolers.initLevelMapper(2, 5, canonical_scale=canonical)
        heads = detection.mask_rcnn
        masks = (config.mask_head.channels,) * config.mask_head.num_convolutions
        self.model = detection.MaskRCNN(
            backbone,
            num_classes=None,  # the predictors know
            rpn_anchor_generator=anchors,
            rpn_head=detection.rpn.RPNHead(channels, anchors.num_anchors_per_location()[0]),
            rpn_pre_nms_top_n_train=config.rpn.pre_nms_top_k,
            rpn_pre_nms_top_n_test=config.rpn.pre_nms_top_k,
            rpn_post_nms_top_n_train=config.rpn.proposals_training,
            rpn_post_nms_top_n_test=config.rpn.proposals_inference,
            rpn_nms_thresh=config.rpn.nms_threshold,
            rpn_batch_size_per_image=config.rpn.anchors_per_image,
            box_roi_pool=pools[0],
            box_head=detection.faster_rcnn.TwoMLPHead(channels * 49, config.box_head.channels),
            box_predictor=detection.faster_rcnn.FastRCNNPredictor(config.box_head.channels, num_classes),
            box_batch_size_per_image=config.roi.rois_per_image,
            mask_roi_pool=pools[1],
            mask_head=heads.MaskRCNNHeads(channels, masks, 1),
            mask_predictor=heads.MaskRCNNPredictor(masks[-1], masks[-1], num_classes),
            box_score_thresh=config.detections.score_threshold,
            box_nms_thresh=config.detections.nms_threshold,
            box_detections_per_img=config.detections.max_per_image,
        )
        # Boxes are decoded in the type of the deltas: in bf16 they would be rounded to two pixels.
        for head in (self.model.rpn.head, self.model.roi_heads.box_predictor, self.model.roi_heads.mask_predictor):
            head.register_forward_hook(lambda _module, _inputs, output: _in_float32(output))

    def _images(self, images: Tensor, sizes: Tensor) -> ImageList:
        canvas = (int(images.shape[2]), int(images.shape[3]))
        pixels = normalise(images, image_windows(sizes, canvas, "top_left"), self.config)
        return ImageList(pixels.contiguous(memory_format=torch.channels_last), [(h, w) for h, w in sizes.tolist()])

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Its five losses by our names."""
        images, targets = self._images(batch.images, batch.image_sizes), targets_of(batch)
        features = self.model.backbone(images.tensors)
        proposals, rpn_losses = self.model.rpn(images, features, targets)
        _, losses = self.model.roi_heads(features, proposals, images.image_sizes, targets)
        losses |= rpn_losses
        return {ours: losses[theirs] for ours, theirs in zip(LOSS_NAMES, THEIR_LOSSES, strict=True)}

    @torch.no_grad()
    def detect(self, images: Tensor, sizes: Tensor) -> list[Detections]:
        """As `MaskRCNN.detect`."""
        views = self._images(images, sizes)
        features = self.model.backbone(views.tensors)
        proposals, _ = self.model.rpn(views, features)
        found = self.model.roi_heads(features, proposals, views.image_sizes)[0]
        return [Detections(f["boxes"], f["scores"], f["labels"], f["masks"][:, 0]) for f in found]


def _in_float32(output: Any) -> Any:
    return output.float() if isinstance(output, Tensor) else type(output)(_in_float32(part) for part in output)


def refuse_what_the_peer_lacks(config: ExperimentConfig) -> None:
    """Settings of a recipe that only one side would have.

    Raises:
        SystemExit: with their names.
    """
    plain = {
        "model.rpn.channels": config.model.rpn.channels == config.model.fpn.channels,
        "model.mask_head.norm": config.model.mask_head.norm == "none",
        "model.box_head.norm": config.model.box_head.norm == "none",
        "train.synchronise_norms": not config.train.synchronise_norms,
        "train.trainable_layers": config.train.trainable_layers == "all",
        "train.gradient_compression": config.train.gradient_compression in (None, "none"),
    }
    if wrong := [name for name, is_plain in plain.items() if not is_plain]:
        raise SystemExit(f"the comparison does not have {', '.join(wrong)}")


def targets_of(batch: Batch) -> list[dict[str, Tensor]]:
    """Objects as torchvision takes them: bitmaps as large as the canvas, drawn from the exact masks."""
    bits = ((batch.mask_bits[:, None] >> torch.arange(7, -1, -1)) & 1).flatten()
    targets = []
    for image in range(batch.num_images):
        objects = torch.nonzero((batch.classes[image] > 0) & ~batch.is_crowd[image]).flatten()
        bitmaps = torch.zeros(len(objects), *batch.images.shape[2:], dtype=torch.uint8)
        for bitmap, slot in zip(bitmaps, objects.tolist(), strict=True):
            rows, columns = batch.mask_sizes[image, slot].tolist()
            start = int(batch.mask_offsets[image, slot]) * 8
            crop = bits[start : start + rows * columns].reshape(1, 1, rows, columns).float()
            left, top, right, bottom = batch.mask_boxes[image, slot].round().int().tolist()
            size = (max(bottom - top, 1), max(right - left, 1))
            drawn = F.interpolate(crop, size=size, mode="bilinear", align_corners=False)[0, 0] >= 0.5
            first_row, first_column = max(-top, 0), max(-left, 0)  # a crop may have cut the object
            place = bitmap[top + first_row : top + size[0], left + first_column : left + size[1]]
            drawn = drawn[first_row:, first_column:]
            place.copy_(drawn[: place.shape[0], : place.shape[1]])
        targets.append(
            {"boxes": batch.boxes[image, objects], "labels": batch.classes[image, objects], "masks": bitmaps}
        )
    return targets


def main() -> None:
    """Time both, train in turn, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "nuclei.yaml", help="recipe of both")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="changes of it, data.root above all")
    parser.add_argument("--minutes", type=float, default=12.0, help="of each training")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each kind")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, metavar="KIND", help="which; all")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "accuracy", help="for shards")
    parser.add_argument("--json", type=Path, help="where to write the figures; trainings that stand there are kept")
    options = parser.parse_args()
    allocator.restart_keeping_freed_memory()
    changes = {key: yaml.safe_load(value) for key, value in (entry.split("=", 1) for entry in options.set)}
    values = options.config.read_text()
    config = with_changes(yaml.safe_load(values), changes)
    peer = with_changes(yaml.safe_load(values), changes | PEER_RECIPE)
    for recipe in (peer, config) if THEIRS_WITH_OUR_RECIPE in options.kinds else (peer,):
        refuse_what_the_peer_lacks(recipe)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
    ours = config, prepare_data(config, options.folder / "ours")
    recipes = dict.fromkeys(KINDS, ours) | {THEIRS: (peer, prepare_data(peer, options.folder / "torchvision"))}
    settings = [named(options.config), options.set, options.minutes, PEER_RECIPE]
    done: dict[str, Any] = {"settings": settings, "seconds_a_step": {}, "trainings": []}
    if options.json and options.json.exists():
        raw = json.loads(options.json.read_text())["raw"]
        if raw["settings"] != json.loads(json.dumps(settings)):
            raise SystemExit(f"{options.json} holds trainings of other settings: {raw['settings']}")
        done = raw
    needed = {OURS, THEIRS, *options.kinds} - {OURS_AT_THEIR_STEPS}
    turns: dict[str, list[float]] = {kind: [] for kind in KINDS if kind in needed - done["seconds_a_step"].keys()}
    if turns:
        for _ in range(TIMED_TURNS):
            for kind, seconds in turns.items():
                timed = run(*recipes[kind], kind, 0, WARM_UP_STEPS + TIMED_STEPS, options.folder, evaluated=False)
                seconds.append(timed["seconds_a_step"])
        done["seconds_a_step"] |= {kind: statistics.mean(seconds) for kind, seconds in turns.items()}
        print(json.dumps({"seconds_a_step": turns}), flush=True)
    steps = {kind: round(60 * options.minutes / seconds) for kind, seconds in done["seconds_a_step"].items()}
    steps[OURS_AT_THEIR_STEPS] = steps[THEIRS]
    for seed in range(options.seeds):
        for kind in options.kinds:
            if not any((entry["kind"], entry["seed"]) == (kind, seed) for entry in done["trainings"]):
                found = run(*recipes[kind], kind, seed, steps[kind], options.folder, evaluated=True)
                done["trainings"].append({"kind": kind, "seed": seed, **found})
                pace = done["seconds_a_step"][OURS if kind == OURS_AT_THEIR_STEPS else kind]
                off = found["seconds"] / (steps[kind] * pace) - 1
                if abs(off) > OFF_FRACTION:
                    print(f"{kind}, seed {seed}: took {off:+.0%} of its time; was the machine busy?", flush=True)
                print(json.dumps(done["trainings"][-1]), flush=True)
            show(table_of(done, options, config), options.json)


def run(
    config: ExperimentConfig, data: PreparedData, kind: str, seed: int, steps: int, folder: Path, evaluated: bool
) -> dict[str, Any]:
    """One training in as many processes as the recipe has workers; what its first process found."""
    train_settings = config.train.model_copy(update={"seed": seed, "max_steps": steps, "epochs": 1e6})
    config = config.model_copy(update={"train": train_settings})
    answer = folder / "answer.json"
    workers = config.scaling.num_workers
    arguments = (config.model_dump(), data, kind, str(answer), f"tcp://127.0.0.1:{free_port()}", evaluated)
    spawn(train, arguments, nprocs=workers)  # type: ignore[no-untyped-call]
    result: dict[str, Any] = json.loads(answer.read_text())
    return result


def train(
    rank: int, settings: dict[str, Any], data: PreparedData, kind: str, answer: str, address: str, evaluated: bool
) -> None:
    """What `pipeline.worker` does, without Ray, checkpoints and MLflow; the first process evaluates."""
    torch.set_num_threads(1)
    config = ExperimentConfig.model_validate(settings)
    workers = config.scaling.num_workers
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=workers)
    shards, validation = ShardSet(data.training), ShardSet(data.validation)
    dtype = autocast_dtype(config.train.precision, "cpu")
    torch.manual_seed(config.train.seed)
    build = MaskRCNN if kind in (OURS, OURS_AT_THEIR_STEPS) else TorchvisionPeer
    model = build(config.model, shards.manifest.num_classes)
    model.to(memory_format=torch.channels_last).train()
    optimizer = build_optimizer(model, config.optim)
    options = data_parallel_options(config.train.accumulation_steps)
    parallel = DistributedDataParallel(model, **options) if workers > 1 else model
    last_step = total_steps(config, make_plan(config, shards))
    averaged = averaged_copy(model) if config.optim.ema_decay is not None else None
    scaler, values = gradient_scaler(dtype, "cpu"), torch.zeros(1)
    began, ends = time.monotonic(), []
    for step, batches in enumerate(batches_of_rank(config, shards, rank, last_step, data)):
        values = train_step(parallel, batches, optimizer, config, step, last_step, dtype, scaler)
        if averaged is not None and config.optim.ema_decay is not None:
            update_average(averaged, model, step, config.optim.ema_decay)
        ends.append(time.monotonic())
    check_finite(values.tolist(), last_step - 1)
    if rank == 0:
        gaps = [after - before for before, after in zip(ends[WARM_UP_STEPS:], ends[WARM_UP_STEPS + 1 :], strict=False)]
        found: dict[str, Any] = {"steps": last_step, "seconds": round(ends[-1] - began, 1)}
        found["seconds_a_step"] = statistics.mean(gaps) if gaps else ends[-1] - began
        if evaluated:
            found |= average_precision(
                judge(averaged or model, validation, dtype), len(validation), shards.manifest.num_classes
            )
        Path(answer).write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def judge(model: nn.Module, validation: ShardSet, dtype: torch.dtype | None) -> list[EvaluatedRow]:
    """Ground truth and results of all validation images."""
    model.eval()
    rows = range(len(validation))
    if isinstance(model, MaskRCNN):
        return evaluate_rows(model, validation, rows, EVALUATION_BATCH_SIZE, dtype)
    return [
        evaluated_row(values, found, validation.manifest)
        for values, found in predict_rows(model, validation, rows, EVALUATION_BATCH_SIZE, dtype)  # type: ignore[arg-type]
    ]


def table_of(done: dict[str, Any], options: argparse.Namespace, config: ExperimentConfig) -> Table:
    """Means and deviations over the seeds."""
    rows = []
    for kind in KINDS:
        entries = [entry for entry in done["trainings"] if entry["kind"] == kind]
        if not entries:
            continue
        cells = [kind, str(len(entries)), str(entries[0]["steps"]), f"{mean(entries, 'seconds')[0]:.0f}"]
        for name in ("segm_AP", "segm_AP50", "bbox_AP", "bbox_AP50"):
            average, deviation = mean(entries, name)
            cells.append(f"{average:.3f} ± {deviation:.3f}")
        rows.append(cells)
    workers, images = config.scaling.num_workers, config.global_batch_size
    title = (
        f"{options.config.stem}, from scratch, {images} images a step, processes of one core each: {workers}, "
        f"{options.minutes:g} minutes a training, mean ± deviation"
    )
    columns = ["training", "seeds", "steps", "seconds", "mask AP", "mask AP50", "box AP", "box AP50"]
    return Table("accuracy", title, columns, rows, done)


def mean(entries: list[dict[str, Any]], name: str) -> tuple[float, float]:
    """Mean and standard deviation."""
    values = [entry[name] for entry in entries]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


if __name__ == "__main__":
    main()
