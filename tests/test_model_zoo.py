"""README's table of models, as benchmarks/model_zoo.py writes it."""

import json
from pathlib import Path

import pytest

from benchmarks import model_zoo

SUMMARY = {
    "bbox_AP": 0.8136, "bbox_AP50": 0.9612, "segm_AP": 0.7784, "segm_AP50": 0.9489, "images_per_second": 10.2,
    "steps": 1750, "seconds": 644.7, "peak_memory_megabytes": 1234.0, "checkpoint": "/elsewhere/checkpoint-0001750",
}  # fmt: skip
CONFIG = """\
# What:    a thing.
# Takes:   4 minutes, plus the set-up of the environment
#          the first time.
# Command: make train   (with more said here)
model: {}
"""
SETTINGS = {
    "data": {"root": "runs/data/shapes", "canvases": [[128, 96]]},
    "train": {"batch_size_per_worker": 4, "accumulation_steps": 3},
    "scaling": {"num_workers": 2},
}


@pytest.fixture
def finished(tmp_path: Path) -> tuple[Path, Path]:
    """A configuration, and the folder of its finished run."""
    config, run = tmp_path / "tiny.yaml", tmp_path / "run"
    config.write_text(CONFIG)
    (run / "checkpoint-0001750").mkdir(parents=True)
    (run / "result.json").write_text(json.dumps({"summary": SUMMARY}))
    (run / "run.json").write_text(json.dumps({"config": SETTINGS}))
    files = {"model.safetensors": {"sha256": "0123456789abcdef" * 4}}
    (run / "checkpoint-0001750" / "checkpoint.json").write_text(json.dumps({"files": files}))
    return config, run


def test_a_row_says_what_the_run_left(finished: tuple[Path, Path]) -> None:
    assert model_zoo.cells_of_run(model_zoo.row_of_run(*finished)) == [
        "`tiny.yaml`: `make train`", "shapes, canvas 128 x 96", "1,750 x 24", "10:45", "0.814 / 0.961", "0.778 / 0.949",
        "10.2", "1.2 GB", "`0123456789ab`",
    ]  # fmt: skip


def test_a_run_that_is_not_finished_has_no_row(finished: tuple[Path, Path]) -> None:
    (finished[1] / "result.json").unlink()
    with pytest.raises(SystemExit, match=r"run: no result\.json"):
        model_zoo.row_of_run(*finished)


def test_a_checkpoint_that_is_gone_is_named(finished: tuple[Path, Path]) -> None:
    (finished[1] / "checkpoint-0001750" / "checkpoint.json").unlink()
    with pytest.raises(SystemExit, match=r"checkpoint-0001750/checkpoint\.json: not there"):
        model_zoo.row_of_run(*finished)


def test_continued_lines_of_a_header_are_joined(finished: tuple[Path, Path]) -> None:
    takes = model_zoo.header(finished[0], "Takes")
    assert takes == "4 minutes, plus the set-up of the environment the first time."
    assert model_zoo.header(finished[0], "Result") == ""


def test_recipes_stand_with_what_their_reference_publishes() -> None:
    table = model_zoo.table_of([]).splitlines()
    expected = {"coco_1x": ("90,000 x 16", 0.386, 0.352), "coco_3x": ("270,000 x 16", 0.410, 0.372),
                "coco_lsj": ("184,375 x 64", 0.446, 0.403)}  # fmt: skip
    for row, (name, (length, box, mask)) in zip(table[2:5], expected.items(), strict=True):
        assert row.startswith(f"| `{name}.yaml`: `python jobs/train.py --config configs/{name}.yaml ")
        for cell in (length, "not run here", f"{box:.3f} (reference)", f"{mask:.3f} (reference)"):
            assert f"| {cell} |" in row
