import pytest

from pipeline.worker_evaluation import pictured_rows


@pytest.mark.parametrize(
    ("row_classes", "rows"),
    [
        ([[1]] * 12, [0, 3, 6, 9]),
        ([[], [1], [], [2], [1, 2], [], [1], [3], []], [1, 3, 4, 6]),
        ([[], [1], [2]], [1, 2]),
        ([[], []], []),
        ([], []),
    ],
)
def test_pictures_show_images_with_objects_from_everywhere(row_classes: list[list[int]], rows: list[int]) -> None:
    assert pictured_rows(row_classes) == rows
