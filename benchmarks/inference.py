"""Prediction of many images: jobs/predict.py beside a plain loop with torchvision's model, from files to Parquet.

    python benchmarks/inference.py --images FOLDER                  # Mask R-CNN ResNet-50 FPN, the same random weights
    python benchmarks/inference.py --images FOLDER --long 10000     # memory over so many images, a small model

Variants, all fp32 unless --precision says otherwise, on the same images, one after the other: `torchvision`, its model
in a loop of one process with all threads; `loop`, our model in the same loop; `processes`, our model in one such loop
a CPU, each with a share of the images and one thread; `job`, jobs/predict.py with a process a CPU. Each decodes,
predicts, encodes masks as RLE and writes Parquet. The time of the loops begins when the model is there; that of the job
when as many parts as processes are finished, so that it leaves out the start of Ray, which stands beside it. The
weights are random, with class logits that give about as many detections as a trained model.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without being installed

import torch

from benchmarks.processes import family, private_megabytes
from pipeline import allocator

ROOT = Path(__file__).resolve().parents[1]
NUM_CLASSES = 91
SAMPLE_SECONDS = 2.0
PART_OF_LONG = 64  # images


def main() -> None:
    """Run the variants in turn, or one of them where a variant asks for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="folder with image files")
    parser.add_argument("--number", type=int, default=32, help="images to predict")
    parser.add_argument("--short_side", type=int, default=800, help="pixels that images are brought to")
    parser.add_argument("--images_per_part", type=int, default=4, help="of the job")
    parser.add_argument("--precision", default="fp32", help="of our model: fp32, bf16 or auto")
    parser.add_argument("--long", type=int, default=0, help="memory over so many images instead")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--share", default="0/1", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.variant:
        run_loop(options)
        return
    allocator.restart_keeping_freed_memory()  # for the loops, as the job's processes do
    with tempfile.TemporaryDirectory(prefix="inference-") as folder:
        options.folder = folder
        if options.long:
            measure_memory(options)
        else:
            compare(options)


def link_images(options: argparse.Namespace, number: int) -> list[Path]:
    """So many images in one folder, each file under several names if need be."""
    suffixes = (".jpg", ".jpeg", ".png")
    files = sorted(path for path in Path(options.images).iterdir() if path.suffix.lower() in suffixes)
    folder = Path(options.folder) / "images"
    folder.mkdir()
    for index in range(number):
        source = files[index % len(files)]
        (folder / f"{index:06d}{source.suffix}").symlink_to(source.resolve())
    return sorted(folder.iterdir())


def compare(options: argparse.Namespace) -> None:
    """All variants, and a table of them."""
    cpus = os.cpu_count() or 1
    if options.number < 2 * cpus * options.images_per_part:
        sys.exit(f"--number: at least two parts of {options.images_per_part} images for each of {cpus} CPUs")
    link_images(options, options.number)
    torch.save(torchvision_model(options.short_side).state_dict(), Path(options.folder) / "weights.pth")
    measured = {
        "torchvision": run_variant(options, "torchvision", 1, cpus),
        "loop": run_variant(options, "loop", 1, cpus),
        "processes": run_variant(options, "loop", cpus, 1),
        "job": run_predict(options, cpus),
    }
    print(f"{options.number} images, short side {options.short_side}, {options.precision}, {cpus} CPUs")
    for name, result in measured.items():
        ratio = result["images_per_second"] / measured["torchvision"]["images_per_second"]
        print(f"{name:12} {result['images_per_second']:7.3f} images/s  {ratio:5.2f} of torchvision  {result}")
    overhead = 1 - measured["job"]["images_per_second"] / measured["processes"]["images_per_second"]
    print(f"overhead of the actor pool against as many plain processes: {overhead:.1%}")
    print(json.dumps({**measured, "overhead": overhead}))


def torchvision_model(short_side: int) -> Any:
    """Torchvision's Mask R-CNN with random weights whose class logits let some hundred proposals pass."""
    from torchvision.models.detection import maskrcnn_resnet50_fpn

    torch.manual_seed(1)
    model = maskrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=NUM_CLASSES, min_size=short_side, max_size=2 * short_side
    )
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.3, 0.6)  # a trained network's activations do not grow
    predictor = model.roi_heads.box_predictor
    with torch.no_grad():
        predictor.cls_score.weight.mul_(200.0)
        predictor.cls_score.bias.zero_()
        predictor.cls_score.bias[0] = 4.0
    return model.eval()


def our_arguments(options: argparse.Namespace) -> list[str]:
    """Of the jobs: the same model, weights and size of images."""
    side = -(-options.short_side // 32) * 32
    long_side = -(-options.short_side * 5 // 3 // 32) * 32
    return [
        "--config", str(ROOT / "configs" / "torchvision_v1.yaml"),
        "--data.canvases", json.dumps([[side, long_side], [long_side, side]]),
        "--data.short_side", str(options.short_side),
        "--predict.precision", options.precision,
    ]  # fmt: skip


def run_variant(options: argparse.Namespace, variant: str, processes: int, threads: int) -> dict[str, Any]:
    """A loop in so many processes, which begin together; images a second of all of them."""
    command = [sys.executable, __file__, "--variant", variant, "--images", options.images, "--folder", options.folder]
    command += ["--short_side", str(options.short_side), "--precision", options.precision]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    running = [
        subprocess.Popen(
            [*command, "--share", f"{index}/{processes}"], env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )
        for index in range(processes)
    ]  # fmt: skip
    for process in running:
        assert process.stdout is not None
        process.stdout.readline()  # its model is there
    started = time.monotonic()
    for process in running:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    found = [json.loads(process.communicate()[0].strip().splitlines()[-1]) for process in running]
    seconds = time.monotonic() - started
    number = sum(entry["images"] for entry in found)
    return {
        "images_per_second": round(number / seconds, 4),
        "detections_an_image": round(sum(entry["detections"] for entry in found) / number, 1),
    }


def run_loop(options: argparse.Namespace) -> None:
    """A variant's own process: wait for the word, then predict every n-th image."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    share, shares = (int(number) for number in options.share.split("/"))
    files = sorted((Path(options.folder) / "images").iterdir())[share::shares]
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    predict = torchvision_predict(options) if options.variant == "torchvision" else our_predict(options)
    print("ready", flush=True)
    sys.stdin.readline()
    rows = []
    for file in files:
        with Image.open(file) as image:
            rows.append({"key": file.name, **predict(image.convert("RGB"))})
    pq.write_table(pa.Table.from_pylist(rows), Path(options.folder) / f"{options.variant}-{share}-{shares}.parquet")
    print(json.dumps({"images": len(rows), "detections": sum(len(row["scores"]) for row in rows)}))


def torchvision_predict(options: argparse.Namespace) -> Any:
    """Its model, called as its documentation does."""
    import numpy as np
    from pycocotools import mask as coco_mask
    from torchvision.transforms.functional import to_tensor

    model = torchvision_model(options.short_side)

    @torch.no_grad()
    def predict(image: Any) -> dict[str, Any]:
        found = model([to_tensor(image)])[0]
        masks = (found["masks"][:, 0] > 0.5).numpy().astype(np.uint8)
        encoded = [coco_mask.encode(np.asfortranarray(mask))["counts"].decode() for mask in masks]
        return {
            "boxes": found["boxes"].tolist(), "scores": found["scores"].tolist(), "classes": found["labels"].tolist(),
            "mask_counts": encoded,
        }  # fmt: skip

    return predict


def our_predict(options: argparse.Namespace) -> Any:
    """The model of the job, called image by image."""
    from model.folded import for_inference
    from model.masks import encode_detections
    from pipeline.command_line import parse
    from pipeline.prediction_model import load_predictor
    from pipeline.training import autocast_dtype

    config = parse("", our_arguments(options)).experiment
    weights = f"torchvision:{options.folder}/weights.pth"
    predictor = load_predictor(config, weights, lambda _: None)
    dtype = autocast_dtype(config.predict.precision, "cpu")
    model = for_inference(predictor.model.to(memory_format=torch.channels_last), dtype)  # as the job does
    predictor = replace(predictor, model=model)

    def predict(image: Any) -> dict[str, Any]:
        found = predictor.predict(image)
        encoded = encode_detections(found, image.height, image.width)
        return {
            "boxes": found.boxes.tolist(), "scores": found.scores.tolist(), "classes": found.classes.tolist(),
            "mask_counts": [mask["counts"] for mask in encoded],
        }  # fmt: skip

    return predict


def run_predict(options: argparse.Namespace, processes: int) -> dict[str, Any]:
    """The job: images a second once as many parts as processes are finished, and over all of its time."""
    output = Path(options.folder) / "output"
    command = [
        sys.executable, str(ROOT / "jobs" / "predict.py"), *our_arguments(options),
        "--checkpoint", f"torchvision:{options.folder}/weights.pth",
        "--images", str(Path(options.folder) / "images"), "--output", str(output),
        "--predict.images_per_part", str(options.images_per_part), "--predict.batch_size", "1",
        "--predict.num_workers", str(processes),
    ]  # fmt: skip
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    seconds = time.monotonic() - started
    summary = json.loads(done.stdout.strip().splitlines()[-1])
    times = sorted(path.stat().st_mtime for path in (output / "parts").iterdir())
    steady = (options.number - processes * options.images_per_part) / (times[-1] - times[processes - 1])
    return {
        "images_per_second": round(steady, 4),
        "detections_an_image": round(summary["num_detections"] / summary["num_predicted"], 1),
        "seconds_with_start": round(seconds, 1),
        "images_per_second_with_start": round(options.number / seconds, 4),
    }


def measure_memory(options: argparse.Namespace) -> None:
    """Memory of all processes of the job while it predicts many images with the demo's model."""
    from pipeline.checkpoint import Description, write_checkpoint
    from pipeline.command_line import parse

    link_images(options, options.long)
    config = parse("", ["--config", str(ROOT / "configs" / "demo.yaml")]).experiment
    from model.mask_rcnn import MaskRCNN

    checkpoint = Path(options.folder) / "checkpoint"
    checkpoint.mkdir()
    names = ["circle", "square", "triangle"]
    description = Description(0, 0.0, 0.0, {}, names, "", config.model_dump(mode="json"))
    write_checkpoint(str(checkpoint), MaskRCNN(config.model, 4), None, description)
    output = Path(options.folder) / "output"
    command = [
        sys.executable, str(ROOT / "jobs" / "predict.py"), "--checkpoint", str(checkpoint),
        "--images", str(Path(options.folder) / "images"), "--output", str(output),
        "--predict.images_per_part", str(PART_OF_LONG), "--predict.precision", options.precision,
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    samples: list[tuple[int, float, float]] = []
    started = time.monotonic()
    while process.poll() is None:
        time.sleep(SAMPLE_SECONDS)
        parts = len(list(output.glob("parts/*.parquet")))
        samples.append((parts * PART_OF_LONG, time.monotonic() - started, private_megabytes(family(process.pid))))
    assert process.stdout is not None
    print(process.stdout.read().strip().splitlines()[-1])
    for share in (0.1, 0.25, 0.5, 0.75, 0.95):
        near = min(samples, key=lambda sample: abs(sample[0] - share * options.long))
        print(f"after {near[0]:6} images ({near[1]:.0f} s): {near[2]:.0f} MB in all processes")


if __name__ == "__main__":
    main()
