"""The files of ../shared/data/nasty through the job: unreadable ones are named and left out, the others become rows."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs.prepare import main
from pipeline.command_line import run_job
from pipeline.shards import ShardSet
from tests.pipeline.factories import SHARED_DATA, needs_shared_data

NASTY = SHARED_DATA / "nasty"
pytestmark = [pytest.mark.cluster, needs_shared_data("nasty")]


def expectations() -> dict[str, tuple[int, int, tuple[int, ...]] | None]:
    """Width, height and mean colour of every file by the README's table; None where it has to be unreadable."""
    found: dict[str, tuple[int, int, tuple[int, ...]] | None] = {}
    for line in (NASTY / "README.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) < 7 or not cells[1].startswith("`"):
            continue
        must = re.search(r"RGB (\d+)x(\d+), mean \((\d+), (\d+), (\d+)\)", cells[5])
        numbers = [int(number) for number in must.groups()] if must else []
        found[cells[1].strip("`")] = (numbers[0], numbers[1], tuple(numbers[2:])) if must else None
    return found


def test_every_file_gives_what_its_table_says(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = expectations()
    assert len(expected) == 24
    unreadable = {name for name, value in expected.items() if value is None}
    assert len(unreadable) == 6
    images = []
    for number, (name, value) in enumerate(expected.items(), start=1):
        width, height = (value[0], value[1]) if value else (64, 64)
        images.append({"id": number, "file_name": name, "width": width, "height": height})
    content = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "thing"}]}
    (tmp_path / "odd.json").write_text(json.dumps(content))
    sources = json.dumps([{"annotations": str(tmp_path / "odd.json"), "images": str(NASTY)}])
    arguments = [
        "prepare.py", "--data.sources", sources, "--data.validation_sources", sources,
        "--data.canvases", "[[512, 512]]",
        "--data.shards", str(tmp_path / "shards"), "--run.storage_path", str(tmp_path),
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stopped:
        run_job(main)
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    assert "5 unreadable_image (" in error
    assert "1 decompression_bomb (" in error
    assert any(name in error for name in unreadable)

    drop = ["--data.policies.unreadable_image", "drop", "--data.policies.decompression_bomb", "drop"]
    monkeypatch.setattr(sys, "argv", [*arguments, *drop])
    run_job(main)
    quarantine = pq.read_table(tmp_path / "shards" / "quarantine.parquet").to_pylist()
    left_out = {row["file_name"]: row["kind"] for row in quarantine if row["split"] == "training"}
    assert set(left_out) == unreadable
    assert left_out["decompression_bomb.gif"] == "decompression_bomb"
    rows = list(ShardSet(str(tmp_path / "shards" / "training")).read_rows(range(18)))
    for values in rows:
        value = expected[values["file_name"]]
        assert value is not None
        assert (values["width"], values["height"]) == value[:2]
        pixels = values["image"].reshape(values["image_height"], values["image_width"], 3)
        np.testing.assert_allclose(pixels.reshape(-1, 3).mean(axis=0), value[2], atol=5, err_msg=values["file_name"])
    report = json.loads((tmp_path / "shards" / "report.json").read_text())["splits"]["training"]
    told = {p["kind"]: {entry["file_name"] for entry in p["first"]} for p in report["problems"]}
    turned = {"Portrait_6.jpg", "orientation_rectangle.jpg", "hopper_orientation_6.webp"}
    assert turned <= told["exif_orientation"]
    with Image.open(NASTY / "Portrait_6.jpg") as stored:
        assert stored.size == (1800, 1200)
