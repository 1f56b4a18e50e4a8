"""Operations of a step, and the rows of the tables that say how near to the roof it is."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.roof import gigaflops_of, roof
from benchmarks.turns import Timed, Variant, rows_of, time_in_turns


def test_operations_by_hand() -> None:
    x, weight = torch.randn(10, 20, requires_grad=True), torch.randn(30, 20, requires_grad=True)
    assert gigaflops_of(lambda: F.linear(x, weight, torch.zeros(30))) == pytest.approx(2 * 10 * 20 * 30 / 1e9)
    backward = gigaflops_of(lambda: F.linear(x, weight).sum().backward())  # type: ignore[no-untyped-call]
    assert backward == pytest.approx(3 * 2 * 10 * 20 * 30 / 1e9)
    image = torch.randn(2, 4, 8, 8)
    convolution = gigaflops_of(lambda: F.conv2d(image, torch.randn(6, 4, 3, 3), padding=1))
    assert convolution == pytest.approx(2 * 2 * 8 * 8 * 6 * 4 * 9 / 1e9)


def test_of_a_sparse_matrix_its_entries_count() -> None:
    matrix = torch.eye(100).to_sparse_csr()
    product = torch.empty(100, 7)
    count = gigaflops_of(lambda: torch.addmm(product, matrix, torch.randn(100, 7), beta=0, out=product))
    assert count == pytest.approx(2 * 100 * 7 / 1e9)


def test_rows_by_hand() -> None:
    """torchvision does 100 GFLOP at 25 a second, ours 90 at 45; the roofs are 50 and 100."""
    half = torch.bfloat16
    variants = {
        "torchvision fp32": Variant(lambda: None, None),
        "ours bf16": Variant(lambda: None, half),
    }
    timed = {"torchvision fp32": Timed(100, [5.0, 4.0, 3.0]), "ours bf16": Timed(90, [2.0, 2.0, 9.0])}
    roofs = {None: Timed(10, [0.2]), half: Timed(10, [0.1])}
    rows = rows_of(variants, timed, roofs, lambda seconds: f"{seconds:.1f} s", images=2)
    assert [list(row) for row in rows] == [
        ["torchvision fp32", "4.0 s", "1.00", "-", "50", "25", "50 %"],
        ["ours bf16", "2.0 s", "2.00", "-", "45", "45", "45 %"],
        ["bound: ours bf16 wholly at the roof", "0.9 s", "4.44", "-", "45", "100", "100 %"],
    ]


def test_variants_take_turns() -> None:
    order: list[str] = []
    variants = {name: Variant(lambda name=name: order.append(name), None) for name in ("a", "b")}  # type: ignore[misc]
    timed, roofs = time_in_turns(variants, rounds=2)
    assert order == ["a", "b"] * 3  # the first of them warms up
    assert [len(of.seconds) for of in (*timed.values(), *roofs.values())] == [2, 2, 2]
    assert roofs[None].gigaflops == pytest.approx(gigaflops_of(roof(None)))
