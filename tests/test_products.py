"""Matrix products: the op against float64, on every instruction set, and a head by either kind of product."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from devices import BACKENDS, CPU, cpu_only, on
from torch import Tensor

import lossops
from lossops import _products
from lossops.linear_cross_entropy import linear_cross_entropy_reference

every_isa = on(*(backend for backend in BACKENDS if backend.startswith(CPU + "-")))
multiply_ = torch.ops.lossops.multiply_.default

# Around the tiles (6 or 12 rows, 8 to 32 columns), blocks (16 tiles) and panels (512 deep, 256 in float64) of
# every instruction set, and what has fewer elements than one.
SHAPES = [
    (1, 1, 1),
    (1, 33, 7),
    (5, 3, 2),
    (6, 8, 4),
    (12, 32, 512),
    (13, 31, 513),
    (11, 65, 257),
    (97, 127, 255),
    (193, 513, 259),
    (385, 130, 1030),
    (2, 1029, 3),
    (13, 70, 1),
    (7, 6, 9),
]
LAYOUTS = ("rows", "columns", "strided", "windows", "expanded")


def matrix(rows: int, columns: int, layout: str, dtype: torch.dtype) -> Tensor:
    if layout == "rows":
        return torch.randn(rows, columns, dtype=dtype)
    if layout == "columns":
        return torch.randn(columns, rows, dtype=dtype).t()
    if layout == "windows":
        return torch.randn(rows + columns, dtype=dtype).as_strided((rows, columns), (1, 1))
    if layout == "expanded":
        return torch.randn(rows, 1, dtype=dtype).expand(rows, columns)
    return torch.randn(2 * rows, 3 * columns, dtype=dtype)[::2, ::3]


def assert_product(actual: Tensor, a: Tensor, b: Tensor, start: Tensor | None) -> None:
    """Each of the `depth` roundings of a sum is at most eps/2 of what the sum of the terms' sizes is."""
    exact = a.double() @ b.double()
    sizes = a.double().abs() @ b.double().abs()
    if start is not None:
        exact, sizes = exact + start.double(), sizes + start.double().abs()
    # Where the result is float64 too, the reference has as many roundings.
    bound = 2 * (a.shape[1] + 1) * torch.finfo(actual.dtype).eps / 2 * sizes
    assert ((actual.double() - exact).abs() <= bound).all()


@every_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_and_layouts(
    device: str, dtype: torch.dtype, shape: tuple[int, int, int], threads: int
) -> None:
    rows, columns, depth = shape
    for of_a, of_b, of_out in itertools.product(LAYOUTS, LAYOUTS, LAYOUTS[:2]):
        a, b = matrix(rows, depth, of_a, dtype), matrix(depth, columns, of_b, dtype)
        out = matrix(rows, columns, of_out, dtype)
        start = out.clone()
        multiply_(out, a, b, True)
        assert_product(out, a, b, start)
        out.fill_(float("nan"))
        multiply_(out, a, b, False)
        assert_product(out, a, b, None)


@every_isa
def test_one_row_whose_columns_lie_apart(device: str) -> None:
    memory, a, b = torch.zeros(2, 90), torch.randn(1, 5), torch.randn(5, 30)
    multiply_(memory[:1, ::3], a, b, False)
    assert_product(memory[:1, ::3], a, b, None)
    assert memory.count_nonzero() == 30


@every_isa
def test_writes_nothing_else(device: str) -> None:
    frame = torch.full((40, 90), 7.0)
    out = frame[5:30, 11:81]
    a, b = torch.randn(25, 6), torch.randn(6, 70)
    multiply_(out, a, b, False)
    assert_product(out, a, b, None)
    out.fill_(7)
    assert (frame == 7).all()


@every_isa
def test_same_bits_for_every_number_of_threads(device: str, restore_threads: None) -> None:
    for rows, columns, depth in ((300, 500, 1100), (2000, 64, 70), (24, 3000, 600), (5, 3, 1 << 20)):
        for dtype, layout in ((torch.float32, "rows"), (torch.float64, "columns")):
            a, b = torch.randn(rows, depth, dtype=dtype), torch.randn(depth, columns, dtype=dtype)
            start = matrix(rows, columns, layout, dtype)
            results = []
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                results.append(start.clone())
                multiply_(results[-1], a, b, True)
            assert all(torch.equal(results[0], other) for other in results[1:])


@every_isa
def test_chains_of_additions_are_short(device: str) -> None:
    """What adds 512 terms one by one has an error of 4e-7 here."""
    for depth in (512, 2048):
        a, b = torch.rand(96, depth) * 2 - 1, torch.rand(depth, 96) * 2 - 1
        out, exact = torch.empty(96, 96), a.double() @ b.double()
        multiply_(out, a, b, False)
        assert (out - exact).norm() < 3e-7 * exact.norm()


@every_isa
def test_extreme_values_stay_in_their_rows_and_columns(device: str) -> None:
    for value in (float("nan"), float("inf"), -float("inf"), 3e38):
        a, b = torch.ones(20, 40), torch.ones(40, 50)
        a[13, 7] = value
        b[9, 31] = value
        out = torch.empty(20, 50)
        multiply_(out, a, b, False)
        torch.testing.assert_close(out, a @ b, rtol=0, atol=0, equal_nan=True)
        others = out.clone()
        others[13] = others[:, 31] = 40
        assert (others == 40).all()


@cpu_only
def test_no_elements(device: str) -> None:
    for rows, columns in ((0, 3), (3, 0), (0, 0)):
        multiply_(torch.empty(rows, columns), torch.randn(rows, 4), torch.randn(4, columns), False)
    out = torch.ones(2, 3)
    multiply_(out, torch.empty(2, 0), torch.empty(0, 3), True)
    assert (out == 1).all()
    multiply_(out, torch.empty(2, 0), torch.empty(0, 3), False)
    assert (out == 0).all()


@cpu_only
@pytest.mark.parametrize("add", [False, True])
def test_opcheck(device: str, add: bool) -> None:
    arguments = torch.ones(2, 3), torch.randn(2, 5), torch.randn(3, 5).t(), add
    assert set(torch.library.opcheck(multiply_, arguments).values()) == {"SUCCESS"}


@cpu_only
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((torch.ones(2), torch.ones(2, 3), torch.ones(3, 2)), "expected matrices"),
        ((torch.ones(2, 2), torch.ones(2), torch.ones(3, 2)), "expected matrices"),
        ((torch.ones(2, 4), torch.ones(3, 5), torch.ones(5, 4)), r"a of shape \(2, 5\), got \(3, 5\)"),
        ((torch.ones(2, 4), torch.ones(2, 5), torch.ones(4, 5)), r"b of shape \(5, 4\), got \(4, 5\)"),
        ((torch.ones(2, 4), torch.ones(2, 5).double(), torch.ones(5, 4)), "a of out's dtype"),
        ((torch.ones(2, 2).half(), torch.ones(2, 2).half(), torch.ones(2, 2).half()), "float32 or float64"),
        ((torch.ones(4, 9)[::2, ::3], torch.ones(2, 5), torch.ones(5, 3)), "columns to be contiguous"),
        ((torch.ones(1).expand(2, 3), torch.ones(2, 5), torch.ones(5, 3)), "columns to be contiguous"),
        ((torch.ones(3).expand(2, 3), torch.ones(2, 5), torch.ones(5, 3)), "share their memory"),
    ],
)
def test_errors(device: str, arguments: tuple[Tensor, ...], words: str) -> None:
    with pytest.raises(RuntimeError, match="multiply: .*" + words):
        multiply_(*arguments, False)


# --------------------------------------------------------------------------------------------------
# A head, by this library's products or by torch's: which it is depends on the processor

HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "low rank": {"rank": 3},
    "rank 1": {"rank": 1},
    "filter": {"gradient_filter": 1e-30},
    "positions": {"positions": 3},
}


class Head:
    def __init__(self, dtype: torch.dtype, rank: int = 0, positions: int = 1, **options: Any) -> None:
        classes, hidden = 150, 19
        self.options = options
        shape = (classes, hidden) if positions == 1 else (classes, positions, hidden)
        self.leaves = {"input": torch.randn(37, hidden), "linear_weight": torch.randn(shape)}
        if rank:
            self.leaves |= {"a": torch.randn(rank, hidden), "b": torch.randn(classes, rank)}
        else:
            self.leaves["linear_bias"] = torch.randn(shape[:-1])
        self.leaves = {name: leaf.to(dtype).requires_grad_() for name, leaf in self.leaves.items()}
        self.target = torch.randint(0, classes, (37,) if positions == 1 else (37, positions))

    def gradients(self, function: Callable[..., Tensor], dtype: torch.dtype, **options: Any) -> list[Tensor]:
        given = {name: leaf.detach().to(dtype).requires_grad_() for name, leaf in self.leaves.items()}
        arguments = dict(given)
        if "a" in given:
            options["lora"] = arguments.pop("a"), arguments.pop("b"), 0.5
            arguments["linear_weight"] = arguments["linear_weight"].detach()
        loss = function(target=self.target, **arguments, **options)
        return list(torch.autograd.grad(loss, list(given.values()), allow_unused="a" in given))


@cpu_only
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_head_by_either_kind_of_product(
    device: str,
    own: bool,
    head: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    restore_threads: None,
) -> None:
    monkeypatch.setattr(_products, "_HAS_MKL", True)
    monkeypatch.setattr(_products._C, "multiplies_faster", lambda: own)
    problem = Head(dtype, **HEADS[head])

    def ours() -> list[Tensor]:
        return problem.gradients(lossops.linear_cross_entropy, dtype, chunk_size=16, **problem.options)

    explanation = lossops.explain(ours)
    assert any(kernel.op == "multiply" for kernel in explanation.kernels) == own
    exact = problem.gradients(linear_cross_entropy_reference, torch.float64)
    results = []
    for threads in (1, 2, 3) if own else (2,):
        torch.set_num_threads(threads)
        results.append(ours())
    for result in results:
        for a, e, first in zip(result, exact, results[0], strict=True):
            if a is None:
                assert e is None
                continue
            error = (a.double() - e).norm() / e.norm()
            assert error < {torch.float16: 2**-10, torch.float32: 2e-6, torch.float64: 1e-14}[dtype]
            assert torch.equal(a, first)
