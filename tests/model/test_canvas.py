import numpy as np
import pytest
import torch

from model.canvas import Position, image_windows, move_to_windows, normalise
from model.config import ModelConfig


@pytest.mark.parametrize(
    ("position", "expected"),
    [
        ("top_left", [[0, 0, 8, 5], [0, 0, 12, 10], [0, 0, 1, 1]]),
        # 10 - 5 rows are 2 above and 3 below; 12 - 1 columns are 5 to the left and 6 to the right.
        ("centre", [[2, 2, 10, 7], [0, 0, 12, 10], [5, 4, 6, 5]]),
    ],
)
def test_windows_by_hand(position: Position, expected: list[list[float]]) -> None:
    windows = image_windows(torch.tensor([[5, 8], [10, 12], [1, 1]]), (10, 12), position)
    torch.testing.assert_close(windows, torch.tensor(expected, dtype=torch.float32))


def test_moving_to_the_centre_is_padding_on_all_sides() -> None:
    generator = np.random.default_rng(0)
    sizes = [(5, 8), (10, 12), (10, 3), (1, 12), (7, 7)]
    images = np.zeros((len(sizes), 3, 10, 12), dtype=np.uint8)
    expected = []
    for image, (height, width) in zip(images, sizes, strict=True):
        pixels = generator.integers(1, 256, (3, height, width), dtype=np.uint8)
        image[:, :height, :width] = pixels
        top, left = (10 - height) // 2, (12 - width) // 2
        expected.append(np.pad(pixels, ((0, 0), (top, 10 - height - top), (left, 12 - width - left))))
    windows = image_windows(torch.tensor(sizes), (10, 12), "centre")
    moved = move_to_windows(torch.from_numpy(images), windows)
    np.testing.assert_array_equal(moved.numpy(), np.stack(expected))
    assert moved.dtype == torch.uint8
    top_left = image_windows(torch.tensor(sizes), (10, 12), "top_left")
    np.testing.assert_array_equal(move_to_windows(torch.from_numpy(images), top_left).numpy(), images)


@pytest.mark.parametrize(("padding", "outside"), [("mean", [0.0, 0.0, 0.0]), ("black", [-1.0, -0.5, -0.25])])
def test_padding_is_the_mean_or_black(padding: str, outside: list[float]) -> None:
    config = ModelConfig.model_validate(
        {"pixel_mean": (0.5, 0.5, 0.25), "pixel_std": (0.5, 1.0, 1.0), "padding": padding}
    )
    images = torch.zeros(2, 3, 6, 8, dtype=torch.uint8)
    windows = torch.tensor([[2.0, 1, 6, 5], [0, 0, 8, 6]])
    images[0, :, 1:5, 2:6] = 255
    images[1] = 255
    expected = torch.tensor(outside)[:, None, None].expand(2, 3, 6, 8).clone()
    inside = torch.tensor([1.0, 0.5, 0.75])[:, None, None]
    expected[0, :, 1:5, 2:6] = inside
    expected[1] = inside
    seen = normalise(images, windows, config)
    torch.testing.assert_close(seen, expected)
    assert seen.is_contiguous(memory_format=torch.channels_last)
