import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from pipeline.prediction_inputs import Entry
from pipeline.prediction_pictures import PictureSettings, cut_out, picture_name, write_pictures
from tests.pipeline.factories import noise, png


def row(mask: Any, score: float = 0.8) -> dict[str, Any]:
    counts = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
    return {
        "key": "x", "height": mask.shape[0], "width": mask.shape[1], "boxes": [[1.0, 2.0, 5.0, 6.0]], "class_ids": [2],
        "class_names": ["hot dog"], "scores": [score], "mask_counts": [counts],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("a/b c.jpg", "a/b%20c.jpg"),
        ("../up.jpg", "..%2Fup.jpg"),
        ("/data/a.jpg", "%2Fdata%2Fa.jpg"),
        ("s3://bucket/a", "s3%3A%2F%2Fbucket%2Fa"),
        ("t.parquet#7", "t.parquet%237"),
        ("..", "%2E%2E"),
        (".", "%2E"),
        (".hidden.jpg", ".hidden.jpg"),
    ],
)
def test_pictures_stay_below_their_folder(key: str, name: str) -> None:
    assert picture_name(key) == name


def test_an_object_is_cut_out_along_its_mask() -> None:
    image = noise(8, 10)
    mask = np.zeros((8, 10), dtype=bool)
    mask[2:5, 3:7] = True
    mask[3, 4] = False
    ((label, content),) = cut_out(image, row(mask), 0.5)
    assert label == "000-hot%20dog-0.80"
    with Image.open(io.BytesIO(content)) as picture:
        pixels = np.asarray(picture)
    np.testing.assert_array_equal(pixels[..., :3], image[2:5, 3:7])
    np.testing.assert_array_equal(pixels[..., 3], mask[2:5, 3:7] * 255)
    assert cut_out(image, row(mask, 0.4), 0.5) == []
    assert cut_out(image, row(np.zeros((8, 10), dtype=bool)), 0.5) == []


def test_only_what_is_wanted_is_written(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(png(noise(8, 10)))
    entry, found = Entry("x", str(tmp_path / "x.png")), row(np.ones((8, 10), dtype=bool))
    for overlays, cutouts in ((True, False), (False, True)):
        output = tmp_path / f"{overlays}"
        write_pictures(str(output), entry, found, "files", "bytes", PictureSettings(overlays, cutouts, 0.5))
        assert (output / "overlays" / "x.jpg").exists() == overlays
        assert (output / "cutouts" / "x" / "000-hot%20dog-0.80.png").exists() == cutouts


def test_a_long_name_is_cut_and_stays_its_own() -> None:
    names = {picture_name(f"folder/{'像' * 80}{number}.jpg") for number in range(3)}
    assert len(names) == 3
    assert all(name.startswith("folder/%E5%83%8F") and len(name.partition("/")[2]) < 200 for name in names)


def test_a_picture_that_cannot_be_written_is_not_the_fault_of_its_image(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(png(noise(8, 10)))
    (tmp_path / "overlays").write_text("a file where the folder should be")
    entry, found = Entry("x", str(tmp_path / "x.png")), row(np.ones((8, 10), dtype=bool))
    with pytest.raises(OSError, match="overlays"):
        write_pictures(str(tmp_path), entry, found, "files", "bytes", PictureSettings(True, False, 0.5))
