import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F

from model.resize import resize_bilinear


def with_zeros_around(values: npt.NDArray[np.float64], height: int, width: int) -> npt.NDArray[np.float64]:
    """Half-pixel centres with zeros outside, by torch; (H, W)."""
    y = (torch.arange(height, dtype=torch.float64) + 0.5) / height * 2 - 1
    x = (torch.arange(width, dtype=torch.float64) + 0.5) / width * 2 - 1
    grid = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1)[None]
    picture = torch.from_numpy(values)[None, None]
    sampled = F.grid_sample(picture, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    clipped: npt.NDArray[np.float64] = np.clip(sampled[0, 0].numpy(), values.min(), values.max())
    return clipped


@pytest.mark.parametrize("size", [(28, 28), (40, 17), (3, 90), (1, 1), (29, 27)])
def test_equals_torch_with_zeros_around(size: tuple[int, int]) -> None:
    values = np.random.default_rng(0).random((28, 28))
    np.testing.assert_allclose(resize_bilinear(values, *size), with_zeros_around(values, *size), rtol=0, atol=1e-12)


def test_the_border_of_an_enlarged_picture_gets_darker_by_hand() -> None:
    # Centres of the four columns at -0.25, 0.25, 0.75, 1.25 of two: a quarter of the outer ones is zero.
    found = resize_bilinear(np.array([[0.0, 8.0, 4.0]])[:, 1:], 1, 4)
    np.testing.assert_allclose(found, [[6.0, 7.0, 5.0, 4.0]])  # 3 at the end, but for the range of the input


def test_channels_do_not_mix_and_the_same_size_is_the_same() -> None:
    values = np.random.default_rng(1).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    values[4, 4:6] = [[0, 0, 0], [255, 255, 255]]  # every channel has the range of the whole
    np.testing.assert_array_equal(resize_bilinear(values, 9, 13), values)
    found = resize_bilinear(values, 20, 7)
    assert found.shape == (20, 7, 3)
    for channel in range(3):
        expected = with_zeros_around(values[:, :, channel].astype(np.float64), 20, 7)
        np.testing.assert_allclose(found[:, :, channel], expected, rtol=0, atol=1e-9)
