"""From predictions to COCO's numbers: `pipeline.coco_metrics` by hotcoco beside pycocotools, on a synthetic data set.

    python benchmarks/evaluation.py --images 5000

80 classes, boxes and masks; each evaluator in a process of its own, the same predictions, CPU time of one round, and
by how much the memory of the process grew at most. All numbers have to be equal to 1e-9, else there is no table.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without being installed

HEIGHT, WIDTH, CLASSES, OBJECTS = 240, 320, 80, 7
Json = dict[str, Any]


def draw(num_images: int, detections: int) -> tuple[list[Json], list[Json], list[Json]]:
    """Images, annotations and results: ellipses; of the results some are near an object, the others anywhere."""
    from pycocotools import mask as coco_mask

    from model.masks import run_lengths

    generator = np.random.default_rng(0)

    def thing(centre: Any, radii: Any) -> tuple[list[float], Json]:
        top, left = np.maximum(np.floor(centre - radii), 0).astype(int)
        bottom, right = np.minimum(np.ceil(centre + radii), (HEIGHT, WIDTH)).astype(int)
        y, x = np.ogrid[top:bottom, left:right]
        crop = ((y - centre[0]) / radii[0]) ** 2 + ((x - centre[1]) / radii[1]) ** 2 <= 1
        counts = run_lengths(crop, int(top), int(left), HEIGHT, WIDTH)
        rle = coco_mask.frPyObjects({"size": [HEIGHT, WIDTH], "counts": counts}, HEIGHT, WIDTH)
        box = [float(left), float(top), float(right - left), float(bottom - top)]
        return box, {"size": [HEIGHT, WIDTH], "counts": rle["counts"].decode("ascii")}

    images, annotations, results = [], [], []
    for image in range(1, num_images + 1):
        images.append({"id": image, "height": HEIGHT, "width": WIDTH})
        centres = generator.uniform((10, 10), (HEIGHT - 10, WIDTH - 10), (OBJECTS, 2))
        radii = generator.uniform(3, 60, (OBJECTS, 2))
        classes = generator.integers(1, CLASSES + 1, OBJECTS)
        for index in range(OBJECTS):
            box, rle = thing(centres[index], radii[index])
            area = float(coco_mask.area({"size": rle["size"], "counts": rle["counts"].encode()}))
            crowd = int(generator.random() < 0.02)
            annotations.append(
                {"image_id": image, "category_id": int(classes[index]), "bbox": box, "segmentation": rle}
                | {"area": area, "iscrowd": crowd}
            )
        for index in range(detections):
            near, like = index < OBJECTS, index % OBJECTS
            noise = generator.normal(0, 2 if near else 40, 2)
            box, rle = thing(np.clip(centres[like] + noise, 4, (HEIGHT - 4, WIDTH - 4)), radii[like])
            category = int(classes[like]) if generator.random() < 0.8 else int(generator.integers(1, CLASSES + 1))
            score = float(np.round(generator.random() * (1 if near else 0.6), 3))
            results.append(
                {"image_id": image, "category_id": category, "bbox": box, "segmentation": rle, "score": score}
            )
    return images, annotations, results


def run_one(evaluator: str, num_images: int, detections: int) -> None:
    """Evaluate in this process and print the figures as JSON."""
    from pipeline.coco_metrics import coco_statistics

    images, annotations, results = draw(num_images, detections)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started, started_wall = time.process_time(), time.perf_counter()
    found = coco_statistics(images, range(1, CLASSES + 1), annotations, results, evaluator=evaluator)  # type: ignore[arg-type]
    print(
        json.dumps(
            {
                "cpu_seconds": time.process_time() - started,
                "seconds": time.perf_counter() - started_wall,
                "megabytes_grown": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
                "megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                "statistics": found,
            }
        )
    )


def main() -> None:
    """One process each, then compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000, help="of the data set")
    parser.add_argument("--detections", type=int, default=10, help="an image")
    parser.add_argument("--quick", action="store_true", help="300 images")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--evaluator", help=argparse.SUPPRESS)
    options = parser.parse_args()
    num_images = 300 if options.quick else options.images
    if options.evaluator:
        run_one(options.evaluator, num_images, options.detections)
        return
    from benchmarks.results import Table, show

    raw = {}
    for evaluator in ("pycocotools", "hotcoco"):
        sizes = ["--images", str(num_images), "--detections", str(options.detections)]
        command = [sys.executable, __file__, "--evaluator", evaluator, *sizes]
        raw[evaluator] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    difference = max(
        abs(value - raw["hotcoco"]["statistics"][kind][name])
        for kind, numbers in raw["pycocotools"]["statistics"].items()
        for name, value in numbers.items()
    )
    if difference > 1e-9:
        raise RuntimeError(f"the evaluators differ by {difference}; their times mean nothing")
    reference = raw["pycocotools"]["cpu_seconds"]
    rows = [
        [
            name,
            f"{row['cpu_seconds']:.2f}",
            f"{reference / row['cpu_seconds']:.1f}",
            f"{row['megabytes_grown']:.0f}",
            f"{row['megabytes']:.0f}",
        ]
        for name, row in raw.items()
    ]
    title = (
        f"evaluation of {num_images} images, {num_images * options.detections} detections, {CLASSES} classes, boxes "
        f"and masks, CPU time; largest difference of the 24 numbers {difference:.0e}"
    )
    columns = ["evaluator", "s", "times as fast", "MB more", "MB in all"]
    show(Table("evaluation", title, columns, rows, {"runs": raw}), options.json)


if __name__ == "__main__":
    main()
