"""Every number of the golden files has been looked at, or stands here with the reason why not. (Last by its name.)"""

import pytest

from tests.model.golden import FILES, FOLDER, archive, needs_golden, visited

pytestmark = needs_golden

NOT_OURS = {
    "resize_mask_": "masks stay in original resolution, none is ever resized on the way to its targets",
    "compose_image_meta": "a vector of numbers with fixed places; Batch has named fields",
    "mold_image__unmolded": "the mean is never put back: images stay uint8 up to the network",
    "compute_matches": "average precision is counted by pycocotools",
    "compute_ap": "average precision is counted by pycocotools",
}
"""Beginnings of keys of pure.npz."""


def test_every_number_was_looked_at(request: pytest.FixtureRequest) -> None:
    together = {item.path.name for item in request.session.items if item.path.name.startswith("test_golden_")}
    everything = {path.name for path in request.path.parent.glob("test_golden_*.py")}
    if together != everything:
        pytest.skip("only some of the golden tests were asked for")
    assert {path.stem for path in FOLDER.glob("*.npz")} == set(FILES)
    missing = [
        f"{file}.npz {key}"
        for file in FILES
        for key in archive(file)
        if (file, key) not in visited and not (file == "pure" and key.startswith(tuple(NOT_OURS)))
    ]
    assert not missing
    for start in NOT_OURS:
        assert any(key.startswith(start) for key in archive("pure")), f"nothing begins with {start} any more"
