"""Write README's table of models from the runs that trained them, and from the headers of configurations not run here.

    python benchmarks/model_zoo.py configs/demo.yaml=runs/demo configs/nuclei.yaml=runs/nuclei

Each run is the folder of a finished training of that configuration (jobs/train.py): its result.json and the best
checkpoint say all but the command, which the configuration's header has. The recipes of COCO stand below with what
their reference publishes. Replaces what stands between the two marks in README.md; `--json FILE` keeps the rows as
well, and rows that stand there already stay, unless their configuration is given again.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without being installed

from benchmarks.report import replace_between
from benchmarks.results import machine

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- models: written by benchmarks/model_zoo.py -->", "<!-- models: end -->"
PUBLISHED = ("coco_1x", "coco_3x", "coco_lsj")
DIGITS_OF_DIGEST = 12
COLUMNS = (
    "configuration", "data", "steps x images", "time", "box AP / AP50", "mask AP / AP50", "images/s",
    "memory of a worker", "checkpoint, SHA-256",
)  # fmt: skip


def header(path: Path, key: str) -> str:
    """What a configuration's opening comment says under this key, continued lines joined; empty without it."""
    lines = [line[2:].rstrip() for line in path.read_text().splitlines() if line.startswith("# ")]
    starts = [number for number, line in enumerate(lines) if line.startswith(f"{key}:")]
    if not starts:
        return ""
    words = [lines[starts[0]].partition(":")[2].strip()]
    for line in lines[starts[0] + 1 :]:
        if not line.startswith(" "):
            break
        words.append(line.strip())
    return " ".join(words)


def row_of_run(config: Path, folder: Path) -> dict[str, Any]:
    """What a finished training left.

    Raises:
        SystemExit: it is not finished, or its best checkpoint is gone.
    """
    result, run = folder / "result.json", folder / "run.json"
    if not result.exists():
        raise SystemExit(f"{folder}: no result.json; the training is not finished")
    summary = json.loads(result.read_text())["summary"]
    described = folder / Path(summary["checkpoint"]).name / "checkpoint.json"
    if not described.exists():
        raise SystemExit(f"{described}: not there, and with it the digest of the weights")
    settings = json.loads(run.read_text())["config"]
    canvas = " x ".join(str(side) for side in settings["data"]["canvases"][0])
    images = settings["train"]["batch_size_per_worker"] * settings["scaling"]["num_workers"]
    return {
        "configuration": config.name,
        "data": f"{Path(settings['data']['root']).name}, canvas {canvas}",
        "command": header(config, "Command").partition("   (")[0],
        "steps": summary["steps"],
        "images_a_step": images * settings["train"]["accumulation_steps"],
        "sha256": json.loads(described.read_text())["files"]["model.safetensors"]["sha256"],
        "machine": machine(),
        **{
            key: summary[key]
            for key in ("seconds", "images_per_second", "bbox_AP", "bbox_AP50", "segm_AP", "segm_AP50")
        },
        "peak_memory_megabytes": summary["peak_memory_megabytes"],
    }


def cells_of_run(row: dict[str, Any]) -> list[str]:
    """A row of the table."""
    minutes, seconds = divmod(round(row["seconds"]), 60)
    return [
        f"`{row['configuration']}`: `{row['command']}`",
        row["data"],
        f"{row['steps']:,} x {row['images_a_step']}",
        f"{minutes}:{seconds:02d}",
        f"{row['bbox_AP']:.3f} / {row['bbox_AP50']:.3f}",
        f"{row['segm_AP']:.3f} / {row['segm_AP50']:.3f}",
        f"{row['images_per_second']:.1f}",
        f"{row['peak_memory_megabytes'] / 1000:.1f} GB",
        f"`{row['sha256'][:DIGITS_OF_DIGEST]}`",
    ]


def cells_of_recipe(config: Path) -> list[str]:
    """A row of a published recipe: what its reference reached, from the configuration's header.

    Raises:
        ValueError: the header does not say it.
    """
    published = re.search(r"publishes box AP ([0-9.]+), mask AP ([0-9.]+)", header(config, "What"))
    length = re.search(r"([0-9,]+) steps of ([0-9]+) images", header(config, "Takes"))
    if published is None or length is None:
        raise ValueError(f"{config}: the header says no published AP, or no number of steps")
    box, mask = (float(value) / 100 for value in published.groups())
    settings = yaml.safe_load(config.read_text())
    canvas = " or ".join(" x ".join(str(side) for side in canvas) for canvas in settings["data"]["canvases"])
    return [
        f"`{config.name}`: `{header(config, 'Command')}`",
        f"COCO 2017, canvas {canvas}",
        f"{length.group(1)} x {length.group(2)}",
        "not run here",
        f"{box:.3f} (reference)",
        f"{mask:.3f} (reference)",
        "-",
        "-",
        "-",
    ]


def table_of(rows: list[dict[str, Any]]) -> str:
    """All of it as Markdown, with the machines below."""
    cells = [cells_of_run(row) for row in rows]
    cells += [cells_of_recipe(ROOT / "configs" / f"{name}.yaml") for name in PUBLISHED]
    lines = [f"| {' | '.join(COLUMNS)} |", f"| {' | '.join('---' for _ in COLUMNS)} |"]
    lines += [f"| {' | '.join(row)} |" for row in cells]
    machines = [
        f"`{row['configuration']}`: {row['machine']['cores']} cores of {row['machine']['processor']} "
        f"({', '.join(row['machine']['bf16']) or 'fp32: no bf16 instructions'}), torch {row['machine']['torch']}, "
        f"{row['machine']['date']}"
        for row in rows
    ]
    return "\n".join([*lines, *(["", f"Run on: {'; '.join(machines)}."] if machines else [])])


def main() -> None:
    """Read, replace, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="CONFIG=RUN", help="a configuration and the folder of its run")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "models.json", help="where rows are kept")
    options = parser.parse_args()
    rows = {row["configuration"]: row for row in json.loads(options.json.read_text())} if options.json.exists() else {}
    for entry in options.runs:
        config, _, folder = entry.partition("=")
        if not folder or not Path(config).is_file():
            raise SystemExit(f"{entry}: expected CONFIG=RUN, a configuration file and a run's folder")
        row = row_of_run(Path(config), Path(folder))
        rows[row["configuration"]] = row
    options.json.write_text(json.dumps(list(rows.values()), indent=1) + "\n")
    readme = ROOT / "README.md"
    readme.write_text(replace_between(readme.read_text(), BEGIN, END, table_of(list(rows.values()))))
    print(f"README.md: {len(rows)} models, {len(PUBLISHED)} recipes")


if __name__ == "__main__":
    main()
