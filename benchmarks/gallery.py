"""Draw what the README shows of a training: its curves, and predictions beside the annotations.

    python benchmarks/gallery.py runs/demo --name shapes

Reads the MLflow run of a finished training (jobs/train.py) and writes docs/gallery/NAME_curves.png and
NAME_predictions.jpg, small files.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without being installed

from model.losses import LOSS_NAMES
from pipeline.mlflow_runs import default_uri

PRECISIONS = ("bbox_AP", "bbox_AP50", "segm_AP", "segm_AP50")
MEAN_STEPS = 10  # losses of so many steps are averaged
WIDTH = 800  # pixels of the curves
COLUMNS, COLUMN_WIDTH, GAP = 2, 600, 12  # of the predictions
JPEG_QUALITY = 85
TEXT_HEIGHT = 40  # more than the letters of titles and names have, less than a picture
WHITE = 255


def series(client: Any, run_id: str, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric."""
    history = sorted(client.get_metric_history(run_id, name), key=lambda metric: metric.step)
    return [metric.step for metric in history], [metric.value for metric in history]


def draw_curves(client: Any, run_id: str, path: Path) -> None:
    """Losses, and AP at each evaluation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH / 80, 3.4), dpi=80)
    left, right = figure.subplots(1, 2)
    for name in ("loss", *LOSS_NAMES):
        steps, values = series(client, run_id, name)
        kept = len(values) // MEAN_STEPS * MEAN_STEPS
        means = np.reshape(values[:kept], (-1, MEAN_STEPS)).mean(axis=1)
        left.plot(steps[MEAN_STEPS - 1 : kept : MEAN_STEPS], means, label=name, linewidth=1)
    left.set(yscale="log", xlabel="step", title=f"losses, means of {MEAN_STEPS} steps")
    left.legend(fontsize=7, ncols=2, loc="upper right")
    left.margins(y=0.3)
    for name in PRECISIONS:
        right.plot(*series(client, run_id, name), label=name, marker="o", markersize=3, linewidth=1)
    right.set(ylim=(0, 1), xlabel="step", title="AP on the validation images")
    right.legend(fontsize=8, loc="lower right")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)


def lines_of(sheet: Image.Image) -> list[Image.Image]:
    """The lines of a sheet, annotations beside predictions each, which white ones part; texts are left out."""
    is_blank = (np.asarray(sheet) == WHITE).all(axis=(1, 2))
    borders = np.flatnonzero(np.diff(np.concatenate([[True], is_blank, [True]]).astype(np.int8)))
    blocks = [(int(top), int(bottom)) for top, bottom in borders.reshape(-1, 2)]
    return [sheet.crop((0, top, sheet.width, bottom)) for top, bottom in blocks if bottom - top > TEXT_HEIGHT]


def arrange_predictions(client: Any, run_id: str, path: Path) -> None:
    """The picture of the last evaluation in two columns."""
    names = sorted(file.path for file in client.list_artifacts(run_id, "pictures"))
    if not names:
        raise SystemExit(f"run {run_id} has no pictures")
    with Image.open(client.download_artifacts(run_id, names[-1])) as picture:
        lines = lines_of(picture.convert("RGB"))
    scale = COLUMN_WIDTH / lines[0].width
    lines = [line.resize((COLUMN_WIDTH, round(line.height * scale)), Image.Resampling.LANCZOS) for line in lines]
    columns = [lines[column::COLUMNS] for column in range(COLUMNS)]
    height = max(sum(line.height + GAP for line in column) for column in columns) - GAP
    whole = Image.new("RGB", (COLUMNS * (COLUMN_WIDTH + GAP) - GAP, height), (WHITE,) * 3)
    for number, column in enumerate(columns):
        top = 0
        for line in column:
            whole.paste(line, (number * (COLUMN_WIDTH + GAP), top))
            top += line.height + GAP
    whole.save(path, quality=JPEG_QUALITY, optimize=True)


def main() -> None:
    """Parse, draw both pictures."""
    from mlflow import MlflowClient

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished training")
    parser.add_argument("--name", required=True, help="beginning of the names of the pictures")
    parser.add_argument("--mlflow_uri", help="where MLflow is; by default in the folder of the runs")
    parser.add_argument("--out", type=Path, default=Path("docs/gallery"), help="folder of the pictures")
    options = parser.parse_args()
    run_id = json.loads((options.run / "result.json").read_text())["summary"]["mlflow_run_id"]
    client = MlflowClient(options.mlflow_uri or default_uri(str(options.run.resolve().parent)))
    options.out.mkdir(parents=True, exist_ok=True)
    draw_curves(client, run_id, options.out / f"{options.name}_curves.png")
    arrange_predictions(client, run_id, options.out / f"{options.name}_predictions.jpg")


if __name__ == "__main__":
    main()
