import numpy as np
import pytest
from PIL import Image

from pipeline.picture_labels import MOST_LABELS, find_place, font, shortened, write_labels

SIZE = (200, 100)  # width and height
NONE = np.zeros((0, 4))


def place_of(box: tuple[int, ...], others: tuple[tuple[int, ...], ...] = (), written: object = NONE) -> object:
    """Left and top of a label of 40 x 10 pixels; None where it is not written."""
    boxes = np.array([box, *others], dtype=float)
    place = find_place(SIZE, boxes[0], (40, 10), boxes, np.array(written, dtype=float).reshape(-1, 4))
    if place is None:
        return None
    assert (place[2:] - place[:2]).tolist() == [40, 10]
    return tuple(place[:2].tolist())


@pytest.mark.parametrize(
    ("box", "place"),
    [
        ((50, 50, 70, 60), (50, 40)),  # above
        ((50, 5, 70, 60), (50, 60)),  # below
        ((50, 5, 70, 95), (70, 5)),  # right
        ((170, 5, 190, 95), (130, 5)),  # left
        ((5, 5, 195, 95), (6, 6)),  # nothing left but within
        ((180, 50, 195, 60), (160, 40)),  # above, moved into the picture
        ((150, 95, 170, 100), (150, 85)),
    ],
)
def test_the_first_side_that_has_room(box: tuple[int, ...], place: tuple[int, int]) -> None:
    assert place_of(box) == place


def test_neighbours_are_not_hidden() -> None:
    box, above, below = (50, 50, 70, 60), (52, 36, 68, 48), (52, 62, 68, 74)
    assert place_of(box, (above,)) == (50, 60)
    assert place_of(box, (above, below)) == (70, 50)
    # Of something large a label hides little: a box around everything changes nothing.
    assert place_of(box, ((0, 0, 200, 100),)) == (50, 40)


def test_labels_do_not_meet() -> None:
    box = (50, 50, 70, 60)
    assert place_of(box, written=[[40, 45, 80, 55]]) == (50, 60)
    assert place_of(box, written=[[0, 0, 200, 100]]) is None


def test_a_label_that_would_hide_objects_everywhere_is_not_written() -> None:
    dense = tuple((x, y, x + 10, y + 10) for x in range(0, 200, 10) for y in range(0, 100, 10))
    assert place_of(dense[50], dense) is None


def test_of_labels_without_room_for_all_the_first_are_written() -> None:
    boxes = np.array([[100, 50, 110, 60]] * 40, dtype=float)

    def written(labels: list[str]) -> bytes:
        picture = Image.new("RGB", SIZE, (90, 90, 90))
        write_labels(picture, boxes, labels, [(230, 60, 60)] * 40)
        return picture.tobytes()

    many = ["cat 1.00"] * 39
    assert written([*many, "dog 0.50"]) == written([*many, ""])
    assert written(["dog 0.50", *many]) != written(["", *many])


def test_many_objects_have_no_more_labels_than_can_be_looked_at() -> None:
    boxes = np.array([(x, y, x + 5, y + 5) for y in range(20, 1000, 40) for x in range(0, 1000, 100)], dtype=float)

    def written(number: int) -> bytes:
        picture = Image.new("RGB", (1000, 1000))
        labels = ["cat"] * number + [""] * (len(boxes) - number)
        write_labels(picture, boxes, labels, [(230, 60, 60)] * len(boxes))
        return picture.tobytes()

    assert written(MOST_LABELS - 1) != written(MOST_LABELS) == written(len(boxes))


@pytest.mark.parametrize("name", ["tray.jpg", "x" * 300, "", "Würfel/" + "клетка " * 40 + "7.png"])
def test_a_text_is_shortened_in_its_middle(name: str) -> None:
    short = shortened(name, 12, 150)
    assert font(12).getlength(short) <= 150
    if short != name:
        start, end = short.split("…")
        assert name.startswith(start)
        assert name.endswith(end)
        assert 0 <= len(start) - len(end) <= 1
        assert font(12).getlength(short) > 120
    assert shortened("tray.jpg", 12, 150) == "tray.jpg"


def test_names_with_line_breaks_are_one_line() -> None:
    """The letters' library refuses them."""
    assert shortened("a\nb\r\n c.png", 10, 1000) == "a b c.png"
    picture = Image.new("RGB", SIZE)
    write_labels(picture, np.array([[10.0, 40.0, 60.0, 80.0]]), ["two\nlines"], [(255, 0, 0)])
    assert picture.getbbox() is not None
