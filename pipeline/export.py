"""A checkpoint as programs that run without this code, each compared with the model before it counts."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.export import INPUT_NAMES, OUTPUT_NAMES, export_program, save_onnx
from model.mask_rcnn import MaskRCNN
from model.products import usual_route
from model.structures import Detections
from pipeline.checkpoint import build_model
from pipeline.errors import UserError
from pipeline.preprocess import choose_canvas, resize_image
from pipeline.synthetic import draw_example

Say = Callable[[str], None]

BOX_TOLERANCE, SCORE_TOLERANCE = 1e-2, 1e-4  # input pixels; probabilities of masks as scores


def export_checkpoint(folder: str, output: str, batch_size: int, say: Say) -> dict[str, Any]:
    """Write `model-HxW.pt2` and `model-HxW.onnx` for every canvas, and `description.json`.

    Args:
        folder: checkpoint.
        output: folder that does not exist yet; it appears whole or not at all.
        batch_size: images of every call.
        say: where the progress goes.

    Returns:
        What the job prints: files, and the largest differences from the model.

    Raises:
        UserError: the folder exists, a package is missing, or an exported program finds something else than the model.
    """
    target = Path(output).absolute()
    if target.exists():
        raise UserError(f"{output}: exists already; name another folder with --output")
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: pip install 'mask-rcnn-on-ray[export]'") from error
    model, checkpoint = build_model(folder)
    data = checkpoint.experiment().data
    canvases = data.canvases
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        differences = [_export_canvas(model, canvas, batch_size, temporary, say) for canvas in canvases]
        description = {
            "canvases": canvases,
            "short_side": data.short_side,
            "resize_method": data.resize_method,
            "batch_size": batch_size,
            "class_names": checkpoint.class_names,
            "inputs": {
                INPUT_NAMES[0]: "(batch, 3, rows, columns) uint8 RGB, the image in the top left corner, zero elsewhere",
                INPUT_NAMES[1]: "(batch, 2) int64 height and width of the image on the canvas",
            },
            "outputs": {
                OUTPUT_NAMES[0]: "(batch, slots, 4) float32 xyxy in pixels of the canvas",
                OUTPUT_NAMES[1]: "(batch, slots) float32, best first, 0 in an empty slot",
                OUTPUT_NAMES[2]: "(batch, slots) int64, 1 is the first class name, 0 an empty slot",
                OUTPUT_NAMES[3]: "(batch, slots, rows, columns) float32 over the box; an object where above one half",
            },
        }
        (temporary / "description.json").write_text(json.dumps(description, indent=1))
        temporary.chmod(0o755)
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return {
        "files": sorted(str(Path(output) / name) for name in os.listdir(target)),
        "largest_box_difference": max(boxes for boxes, _ in differences),
        "largest_score_difference": max(scores for _, scores in differences),
    }


def _export_canvas(
    model: MaskRCNN, canvas: tuple[int, int], batch_size: int, folder: Path, say: Say
) -> tuple[float, float]:
    """Write both forms for one canvas and compare each with the model; the largest differences."""
    name = f"model-{canvas[0]}x{canvas[1]}"
    images, sizes = _pictures(canvas, batch_size)
    with usual_route():
        expected = model.detect(images, sizes)
    with warnings.catch_warnings():  # of the exporters about themselves
        warnings.simplefilter("ignore")
        program = export_program(model, canvas, batch_size)
        torch.export.save(program, folder / f"{name}.pt2")
        save_onnx(program, folder / f"{name}.onnx")
    differences = []
    for path, run in ((folder / f"{name}.pt2", _run_program), (folder / f"{name}.onnx", _run_onnx)):
        difference = compare_detections(expected, run(path, images, sizes), path.name)
        say(
            f"{path.name}: {sum(map(len, expected))} objects in {batch_size} images as the model finds them, boxes "
            f"within {difference[0]:.1e} pixels, scores and masks within {difference[1]:.1e}"
        )
        differences.append(difference)
    return max(boxes for boxes, _ in differences), max(scores for _, scores in differences)


def _pictures(canvas: tuple[int, int], batch_size: int) -> tuple[Tensor, Tensor]:
    """Images with objects of several sizes, the last one black where there is more than one."""
    images = torch.zeros(batch_size, 3, *canvas, dtype=torch.uint8)
    sizes = torch.tensor([canvas] * batch_size)
    for index in range(max(1, batch_size - 1)):
        image, _ = draw_example(seed=0, split="train", number=index)
        image = image[: image.shape[0] - 8 * (index % 3)]  # not all fill their canvas
        _, height, width = choose_canvas(image.shape[0], image.shape[1], [canvas])
        resized = np.array(resize_image(image, height, width))
        images[index, :, :height, :width] = torch.from_numpy(resized).permute(2, 0, 1)
        sizes[index] = torch.tensor([height, width])
    return images, sizes


def _run_program(path: Path, images: Tensor, sizes: Tensor) -> list[Tensor]:
    """Outputs of a saved `torch.export` program."""
    return list(torch.export.load(path).module()(images, sizes))


def _run_onnx(path: Path, images: Tensor, sizes: Tensor) -> list[Tensor]:
    """Outputs of a saved ONNX model."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    outputs = session.run(None, dict(zip(INPUT_NAMES, (images.numpy(), sizes.numpy()), strict=True)))
    return [torch.from_numpy(output) for output in outputs]


def compare_detections(expected: Sequence[Detections], outputs: Sequence[Tensor], name: str) -> tuple[float, float]:
    """Largest differences of boxes (input pixels) and of scores and mask probabilities.

    Args:
        expected: of the model.
        outputs: boxes, scores, classes and masks with fixed slots.
        name: of the exported file, for the error.

    Raises:
        UserError: another number of objects or other classes, or differences above the tolerances.
    """
    largest_box, largest_score = 0.0, 0.0
    for image, detections in enumerate(expected):
        is_object = outputs[1][image] > 0
        found = Detections(*(output[image][is_object].detach() for output in outputs))
        if sorted(found.classes.tolist()) != sorted(detections.classes.tolist()):
            raise UserError(f"{name}: finds other objects than the model ({len(found)} against {len(detections)})")
        for row in range(len(detections)):
            # The nearest of its class: the order of objects with equal scores means nothing.
            distance = (found.boxes - detections.boxes[row]).abs().amax(dim=1)
            nearest = int(distance.where(found.classes == detections.classes[row], torch.inf).argmin())
            largest_box = max(largest_box, float(distance[nearest]))
            largest_score = max(
                largest_score,
                float((found.scores[nearest] - detections.scores[row]).abs()),
                float((found.mask_probabilities[nearest] - detections.mask_probabilities[row]).abs().max()),
            )
            found = found.where(torch.arange(len(found)) != nearest)
    if largest_box > BOX_TOLERANCE or largest_score > SCORE_TOLERANCE:
        raise UserError(
            f"{name}: differs from the model by {largest_box:.2e} pixels in boxes and {largest_score:.2e} in scores or "
            "masks; nothing was written"
        )
    return largest_box, largest_score
