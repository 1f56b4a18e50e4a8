"""Shards that survive: killed and continued, changed, damaged; and the page that a person looks at."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.jobs.running import Outcome, run_job, run_until_then_kill, write_small_experiment
from tests.pipeline.factories import noise, png, tree

pytestmark = pytest.mark.cluster
CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def config(folder: Path) -> str:
    synthetic = {"training_images": 320, "validation_images": 7, "seed": 0}
    return str(write_small_experiment(folder, data={"synthetic": synthetic, "rows_per_shard": 4}))


@pytest.fixture(scope="module")
def undisturbed(config: str, folder: Path) -> Outcome:
    outcome = run_job("prepare", "--config", config, "--data.shards", str(folder / "undisturbed"))
    assert outcome.exit_code == 0, outcome.errors
    return outcome


def test_it_ends_with_a_summary(undisturbed: Outcome, folder: Path) -> None:
    summary = undisturbed.last_line
    assert (summary["training_images"], summary["validation_images"]) == (320, 7)
    assert summary["report"] == str(folder / "undisturbed" / "report.html")


def test_killed_and_run_again_gives_the_same_bytes(undisturbed: Outcome, config: str, folder: Path) -> None:
    assert undisturbed.exit_code == 0
    killed = folder / "killed"
    arguments = ("--config", config, "--data.shards", str(killed))
    run_until_then_kill("prepare", *arguments, until=lambda: len(list(killed.glob("training/*.arrow"))) >= 5)
    written = {path: path.stat().st_mtime_ns for path in killed.glob("training/*.arrow")}
    assert 5 <= len(written) < 80
    assert not (killed / "training" / "manifest.json").exists()
    (killed / "training" / "rows-000000000-000000004.arrow.77.partial").write_bytes(b"half")
    again = run_job("prepare", *arguments)
    assert again.exit_code == 0, again.errors
    assert {path: path.stat().st_mtime_ns for path in written} == written, "done shards are kept"
    ours, theirs = tree(killed), tree(folder / "undisturbed")
    assert ours.keys() == theirs.keys()
    assert len(ours) == 80 + 2 + 2 * 3 + 4
    for name, content in ours.items():
        assert content == theirs[name], name


def test_flipped_byte_is_named_and_a_deleted_shard_comes_back(undisturbed: Outcome, config: str, folder: Path) -> None:
    assert undisturbed.exit_code == 0
    shutil.copytree(folder / "undisturbed", folder / "damaged")
    shard = folder / "damaged" / "training" / "rows-000000100-000000104.arrow"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:5000] + bytes([whole[5000] ^ 4]) + whole[5001:])
    arguments = ("--config", config, "--data.shards", str(folder / "damaged"))
    for job in ("prepare", "train"):
        outcome = run_job(job, *arguments)
        assert outcome.exit_code == 1
        assert outcome.error_lines == [
            f"error: {shard}: damaged (its SHA-256 is not the manifest's); delete {shard} and run jobs/prepare.py again"
        ]
    assert not (folder / "runs" / "small").exists(), "found before anything is trained"
    shard.unlink()
    outcome = run_job("prepare", *arguments)
    assert outcome.exit_code == 0, outcome.errors
    assert shard.read_bytes() == whole


def test_changed_image_is_noticed(undisturbed: Outcome, config: str, folder: Path) -> None:
    """By its digest: touched files are looked at, but their shards are left as they are."""
    assert undisturbed.exit_code == 0
    shutil.copytree(folder / "undisturbed", folder / "changed")
    arguments = ("--config", config, "--data.shards", str(folder / "changed"))
    before = {path: path.stat().st_mtime_ns for path in (folder / "changed" / "training").glob("*.arrow")}
    image = folder / "shapes" / "images" / "train_000150.png"
    original = image.read_bytes()
    os.utime(folder / "shapes" / "images" / "train_000007.png", ns=(1, 1))
    image.write_bytes(png(noise(128, 128)))
    assert run_job("prepare", *arguments).exit_code == 0
    changed = [path.name for path, time in before.items() if path.stat().st_mtime_ns != time]
    assert changed == ["rows-000000148-000000152.arrow"]
    image.write_bytes(original)
    assert run_job("prepare", *arguments).exit_code == 0
    name = f"training/{changed[0]}"
    assert (folder / "changed" / name).read_bytes() == (folder / "undisturbed" / name).read_bytes()


@pytest.mark.skipif(CHROMIUM is None, reason="only a browser can tell that the page draws; no Chromium here")
def test_the_page_shows_its_pictures_without_a_network(undisturbed: Outcome, tmp_path: Path) -> None:
    page = Path(undisturbed.last_line["report"])
    report = json.loads((page.parent / "report.json").read_text())
    assert report["splits"]["training"]["images"] == {"read": 320, "kept": 320, "quarantined": 0}
    text = page.read_text()
    assert "http://" not in text
    assert "https://" not in text
    assert text.count("data:image/jpeg;base64,") == 24 + 7
    # A page's own script says what the browser could draw; the network is a proxy that nobody answers at.
    probe = tmp_path / "probe.html"
    script = (
        "<script>onload = () => { const all = [...document.images];"
        "document.title = all.length + ' ' + all.filter(i => i.complete && i.naturalWidth > 100).length }</script>"
    )
    probe.write_text(text.replace("</body>", script + "</body>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--proxy-server=127.0.0.1:9", "--hide-scrollbars"]
    assert CHROMIUM is not None
    drawn = subprocess.run(
        [CHROMIUM, *options, "--dump-dom", f"file://{probe}"], capture_output=True, text=True, timeout=120, check=True
    ).stdout
    assert "<title>31 31</title>" in drawn
    shot = tmp_path / "page.png"
    subprocess.run(
        [CHROMIUM, *options, "--window-size=1240,1600", f"--screenshot={shot}", f"file://{page}"],
        capture_output=True, timeout=120, check=True,
    )  # fmt: skip
    with Image.open(shot) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    coloured = (pixels.max(axis=2) - pixels.min(axis=2) > 60).mean()
    assert coloured > 0.05, "shapes in bright colours"
