import torch

from model.cell_matrix import cell_matrix


def test_rows_are_level_image_row_column() -> None:
    sizes = ((2, 3), (1, 2))
    pyramid = [torch.arange(2.0 * 5 * h * w).reshape(2, 5, h, w).bfloat16() + 100 * n for n, (h, w) in enumerate(sizes)]
    matrix = cell_matrix(pyramid)
    assert (matrix.num_images, matrix.sizes) == (2, sizes)
    assert matrix.cells.dtype == torch.float32
    assert matrix.cells.shape == (2 * 6 + 2 * 2, 5)
    assert matrix.first_cells().tolist() == [0, 12]
    assert (matrix.heights().tolist(), matrix.widths().tolist()) == ([2, 1], [3, 2])
    expected = [
        pyramid[level][image, :, row, column]
        for level, (height, width) in enumerate(sizes)
        for image in range(2)
        for row in range(height)
        for column in range(width)
    ]
    torch.testing.assert_close(matrix.cells, torch.stack(expected).float())


def test_gradient_reaches_every_level() -> None:
    pyramid = [torch.ones(1, 2, 2, 2, requires_grad=True), torch.ones(1, 2, 1, 1, requires_grad=True)]
    torch.autograd.backward((cell_matrix(pyramid).cells * torch.arange(10.0).reshape(5, 2)).sum())
    assert pyramid[0].grad is not None
    assert pyramid[1].grad is not None
    torch.testing.assert_close(pyramid[0].grad, torch.tensor([[[[0.0, 2], [4, 6]], [[1, 3], [5, 7]]]]))
    torch.testing.assert_close(pyramid[1].grad, torch.tensor([[[[8.0]], [[9.0]]]]))
