"""The CUDA kernels' own edges: vectors, alignments, launch sizes, slices, and the record of bad targets.

What every device owes is in the other files, which run on this one too.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import emulated
import pytest
import torch
from contract import (
    CROSS_ENTROPY,
    FAMILY,
    MSE,
    REDUCTIONS,
    VARIANTS,
    Call,
    Loss,
    Variant,
    check_against_reference,
    value_and_gradients,
)
from devices import CUDA, EMULATED, cuda_kernels
from tolerances import DTYPES, assert_near
from torch import Tensor

import lossops
from lossops.cross_entropy import cross_entropy_reference

pytestmark = [pytest.mark.usefixtures("device"), cuda_kernels]


def variants_of(*losses: Loss) -> pytest.MarkDecorator:
    listed = [v for v in VARIANTS if any(v.loss is loss for loss in losses)]
    return pytest.mark.parametrize("variant", listed, ids=str)


each_variant = variants_of(CROSS_ENTROPY, FAMILY)
each_mse_variant = variants_of(MSE)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
INF, NAN = float("inf"), float("nan")


def pack(dtype: torch.dtype) -> int:
    """Elements of a 16-byte load."""
    return 16 // dtype.itemsize


def shifted(offset: int, gap: int = 0) -> Any:
    """Copies a tensor to `offset` elements past an aligned address, its rows `gap` elements apart."""

    def layout(t: Tensor) -> Tensor:
        columns = t.shape[-1] + gap
        memory = torch.zeros(offset + t.numel() // t.shape[-1] * columns, dtype=t.dtype)
        view = memory[offset:].view(*t.shape[:-1], columns)[..., : t.shape[-1]]
        return view.copy_(t)

    return layout


# --------------------------------------------------------------------------------------------------
# Vectors: heads, bodies and tails

# Shapes for each way through the logits: a thread, some lanes, a warp, a block or several for a row, and
# rows side by side, one a thread or a pack of them.
WAYS = {
    "short rows": (300, 7),
    "lanes": (150, 64),
    "warp": (21, 300),
    "block": (3, 3000),
    "slices": (2, 12_300),
    "few rows side by side": (2, 70, 5, 5),
    "packs of rows": (2, 3, 400, 384),
}
each_way = pytest.mark.parametrize("way", WAYS)


@each_way
@each_variant
@each_dtype
def test_every_way(variant: Variant, way: str, dtype: torch.dtype) -> None:
    shape = WAYS[way]
    # The family's normalizer is for few rows: float16 would overflow.
    one = "none" if variant.loss is FAMILY else "mean"
    for reduction in (one,) if way == "packs of rows" else REDUCTIONS:
        check_against_reference(variant, variant.make(shape, dtype), reduction)


@each_variant
@each_dtype
def test_every_remainder_and_alignment(variant: Variant, dtype: torch.dtype) -> None:
    """Rows from any element of a pack to any: of a few packs, of some for each lane or each thread."""
    width = pack(dtype)
    for offset, remainder in itertools.product(range(width), repeat=2):
        for classes in (2 * width, 40 * width, 1024 + 8 * width) if offset in (0, 1) else (2 * width,):
            call = variant.make((3, classes + remainder), dtype)
            check_against_reference(variant, call, "none", shifted(offset))


@each_variant
@each_dtype
def test_rows_of_differing_phase(variant: Variant, dtype: torch.dtype) -> None:
    """A gap after each row: of a pack, all rows are aligned alike; of one element, no two neighbours are."""
    for classes in (5, 64, 300, 1500):
        for offset, gap in ((0, 1), (1, 3), (0, pack(dtype)), (2, pack(dtype))):
            check_against_reference(variant, variant.make((5, classes), dtype), "none", shifted(offset, gap))


@each_variant
def test_operands_of_differing_alignment(variant: Variant) -> None:
    """Gradients are aligned, logits and targets each in their own way: no pack serves two of them."""
    for classes, offsets in itertools.product((7, 64, 300, 1500), ((0, 1), (1, 0), (1, 2), (3, 3))):
        call = variant.make((4, classes), torch.float32)
        moved = tuple(shifted(k)(t) for k, t in zip(offsets, call.tensors, strict=False))
        check_against_reference(variant, Call(moved, call.fixed, call.options), "none")


@each_variant
@each_dtype
def test_every_small_number_of_classes(variant: Variant, dtype: torch.dtype) -> None:
    for classes in range(1, 71):
        check_against_reference(variant, variant.make((7, classes), dtype), "none")


# Neighbours of what a warp, a pack of lanes, a block of threads and a slice of a row hold, and of the
# lengths at which one way takes over from another.
LIMITS = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


@each_variant
@each_dtype
def test_around_every_limit(variant: Variant, dtype: torch.dtype) -> None:
    for classes in (n + k for n in LIMITS for k in (-1, 0, 1)):
        check_against_reference(variant, variant.make((2, classes), dtype), "none")


@each_variant
@pytest.mark.parametrize("rows", [1, 31, 33, 127, 128, 129, 257, 1025])
def test_every_number_of_rows_of_a_block(variant: Variant, rows: int) -> None:
    for classes in (3, 33, 64):
        check_against_reference(variant, variant.make((rows, classes), torch.float32), "mean")


@each_variant
@pytest.mark.parametrize("classes", [1, 3, 8])
def test_more_rows_than_a_grid_has_blocks_in_y(variant: Variant, classes: int, device: str) -> None:
    """Over 65 535 rows, and more blocks of them than one block adds up in a step."""
    rows = 2_000_003 if device == CUDA else 70_001
    check_against_reference(variant, variant.make((rows, classes), torch.float32), "mean")
    if device == CUDA:
        check_against_reference(variant, variant.make((rows, classes), torch.bfloat16), "none")


@pytest.mark.parametrize("shape", [(20_000, 40), (20_000, 65), (66_000, 32)], ids=str)
def test_more_rows_than_the_blocks_take_in_one_go(shape: tuple[int, int], device: str) -> None:
    """A block takes several rows, or groups of them, one after the other."""
    rows, classes = (8 * shape[0], shape[1]) if device == CUDA else shape
    logits, target = torch.randn(rows, classes), torch.randint(0, classes, (rows,))
    assert_like_reference(logits, target)
    if device == CUDA:
        assert_like_reference(torch.randn(20_000, 1500), torch.randint(0, 1500, (20_000,)))


def assert_like_reference(logits: Tensor, target: Tensor, **options: Any) -> None:
    """The unreduced loss and the gradient of the mean."""
    leaf, exact = logits.detach().requires_grad_(), logits.detach().double().requires_grad_()
    target_exact = target.double() if target.is_floating_point() else target
    exact_options = {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()}
    assert_near(
        lossops.cross_entropy(logits, target, reduction="none", **options),
        cross_entropy_reference(exact.detach(), target_exact, reduction="none", **exact_options),
        scale=5,
    )
    ours = value_and_gradients(lambda z: lossops.cross_entropy(z, target, **options), (leaf,))
    expected = value_and_gradients(
        lambda z: cross_entropy_reference(z, target_exact, **exact_options), (exact,)
    )
    for a, e in zip(ours, expected, strict=True):
        assert_near(a, e)


# --------------------------------------------------------------------------------------------------
# Rows cut into slices


@pytest.mark.parametrize("rows", [1, 2, 8])
@each_dtype
def test_few_rows_with_many_classes(rows: int, dtype: torch.dtype, device: str) -> None:
    for classes in (8192, 40_001, 1_000_003 if device == CUDA else 100_003):
        logits = torch.randn(rows, classes).to(dtype)
        target = torch.randint(0, classes, (rows,))
        weight = (torch.rand(classes) + 0.5).to(dtype)
        assert_like_reference(logits, target)
        assert_like_reference(logits, target, label_smoothing=0.1, weight=weight)
        assert_like_reference(logits, torch.randn(rows, classes).softmax(1).to(dtype), weight=weight)
        memory = torch.randn(rows * (classes + 1) + 1).to(dtype)
        assert_like_reference(memory[1:].view(rows, classes + 1)[:, :classes], target)


def test_a_target_at_either_end_of_every_slice() -> None:
    classes = 12 * 4096
    logits = torch.randn(1, classes)
    loss = (logits.double().logsumexp(1) - logits.double()).squeeze(0)
    for start in range(0, classes, 512):  # every way to cut it into equal slices
        for c in {max(0, start - 1), start}:
            assert_near(lossops.cross_entropy(logits, torch.tensor([c])), loss[c])
    softmax = logits.double().softmax(1)
    for c in (0, 4095, 4096, 8191, 8192, classes - 1):
        leaf = logits.clone().requires_grad_()
        lossops.cross_entropy(leaf, torch.tensor([c])).backward()
        assert_near(leaf.grad, softmax - torch.nn.functional.one_hot(torch.tensor([c]), classes))


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}], ids=str)
def test_slices_of_minus_infinity(options: dict[str, float]) -> None:
    """A slice, all but one, or all of a row at -inf."""
    classes = 40_000
    logits = torch.randn(5, classes)
    logits[0, :10_000] = -INF
    logits[1, 5000:] = -INF
    logits[2, :39_999] = -INF
    logits[3] = -INF
    target = torch.tensor([20_000, 3, 39_999, 0, 5])
    loss = lossops.cross_entropy(logits, target, reduction="none", **options)
    if options:
        assert loss[:3].isposinf().all()
    else:
        assert_near(loss[:3], cross_entropy_reference(logits[:3].double(), target[:3], reduction="none"))
    assert loss[3].isnan()
    assert_near(
        loss[4:], cross_entropy_reference(logits[4:].double(), target[4:], reduction="none", **options)
    )
    logits[3] = NAN
    assert lossops.cross_entropy(logits, target, reduction="none")[3].isnan()


def test_slices_of_ignored_rows() -> None:
    logits = torch.randn(3, 40_000, requires_grad=True)
    target = torch.tensor([-100, 7, -100])
    loss = lossops.cross_entropy(logits, target)
    assert_near(loss, cross_entropy_reference(logits.detach().double(), target))
    loss.backward()
    assert logits.grad.ne(0).any(1).tolist() == [False, True, False]
    assert lossops.cross_entropy(logits, torch.full((3,), -100)).isnan()
    assert not lossops.cross_entropy(logits, torch.full((3,), -100), reduction="none").any()


# --------------------------------------------------------------------------------------------------
# Rows side by side


@each_variant
@each_dtype
@pytest.mark.parametrize(
    "size", [(16, 16), (15, 17), (1, 9), (7, 1), (1, 8)], ids=lambda s: "x".join(map(str, s))
)
def test_images(variant: Variant, dtype: torch.dtype, size: tuple[int, int]) -> None:
    """Channels first, of aligned and of odd sizes; their crops; and channels last."""
    for classes in (2, 19, 130):
        call = variant.make((2, classes, *size), dtype)
        check_against_reference(variant, call, "none")
    wide = variant.make((2, 19, size[0] + 3, size[1] + 5), dtype)
    crops = tuple(t[:, :, 1:-2, 2:-3] for t in wide.tensors)
    seen = variant.make(tuple(crops[0].shape), dtype)
    check_against_reference(variant, Call(crops, seen.fixed, seen.options), "none")
    check_against_reference(variant, seen, "mean", lambda t: t.contiguous(memory_format=torch.channels_last))


@each_variant
@pytest.mark.parametrize("shape", [(2, 5000, 3, 3), (1, 20_000, 9), (3, 1025, 8), (1, 4096, 16)], ids=str)
def test_few_positions_with_many_classes(variant: Variant, shape: tuple[int, ...]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check_against_reference(variant, variant.make(shape, dtype), "none")


@each_variant
@pytest.mark.parametrize("shape", [(2, 2, 400, 384), (1, 2, 400, 761)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_images(variant: Variant, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Enough positions for packs of them, where they come in packs."""
    check_against_reference(variant, variant.make(shape, dtype), "mean")


# --------------------------------------------------------------------------------------------------
# Mean squared error


@each_mse_variant
@each_dtype
def test_mse_of_every_size_and_alignment(variant: Variant, dtype: torch.dtype) -> None:
    width = pack(dtype)
    for offset in range(width):
        for size in (*range(1, 3 * width + 2), 256 * width - 1, 256 * width + 1, 8191, 8192, 8193, 16_385):
            call = variant.make((1, size), dtype)
            check_against_reference(variant, call, "none" if size % 2 else "mean", shifted(offset))


@each_mse_variant
@each_dtype
def test_mse_of_operands_that_share_no_pack(variant: Variant, dtype: torch.dtype) -> None:
    for offsets in ((0, 1), (1, 0), (1, 1), (1, 2)):
        call = variant.make((3, 1000), dtype)
        moved = tuple(shifted(k)(t) for k, t in zip(offsets, call.tensors, strict=True))
        for reduction in REDUCTIONS:
            check_against_reference(variant, Call(moved, call.fixed, call.options), reduction)


@each_mse_variant
@pytest.mark.parametrize("dtypes", itertools.permutations(DTYPES, 2), ids=str)
def test_mse_of_mixed_dtypes(variant: Variant, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    x, y = (torch.randn(3, 700).to(dtype).requires_grad_() for dtype in dtypes)
    options = variant.make((3, 700), torch.float32).options
    exact = tuple(t.detach().double().requires_grad_() for t in (x, y))
    exact_options = Call((), (), options).in_float64().options
    for reduction in REDUCTIONS:
        ours = value_and_gradients(
            lambda x, y, r=reduction: lossops.mse_loss(x, y, reduction=r, **options), (x, y)
        )
        expected = value_and_gradients(
            lambda x, y, r=reduction: variant.loss.reference(x, y, reduction=r, **exact_options), exact
        )
        for a, e in zip(ours, expected, strict=True):
            in_float32 = a.dtype == torch.float64 and "weight" in options
            assert_near(a, e, torch.float32 if in_float32 else a.dtype, scale=10)


@pytest.mark.filterwarnings("ignore:Using a target size")
@each_dtype
@pytest.mark.parametrize(
    "shapes",
    [((300, 40), (40,)), ((300, 40), (300, 1)), ((300, 40), ()), ((), (3000,)), ((40, 1, 3), (7, 1))],
    ids=str,
)
def test_mse_of_broadcast_operands(dtype: torch.dtype, shapes: tuple[tuple[int, ...], ...]) -> None:
    leaves = tuple(torch.randn(shape).to(dtype).requires_grad_() for shape in shapes)
    exact = tuple(t.detach().double().requires_grad_() for t in leaves)
    for reduction in REDUCTIONS:
        ours = lossops.mse_loss(*leaves, reduction=reduction)
        expected = torch.nn.functional.mse_loss(*exact, reduction=reduction)
        assert_near(ours, expected)
    # Gradients that autograd does not have to sum up, whose rounding is its own.
    x, y = torch.broadcast_tensors(*(t.detach() for t in leaves))
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(lossops.mse_loss(x, y, reduction="sum"), x)
    assert_near(gradient, 2 * (x.detach().double() - y.double()), scale=10)


def test_mse_of_more_blocks_than_one_adds_up_in_a_step(device: str) -> None:
    size = 80_000_001 if device == CUDA else 8192 * 70 + 5
    x, y = torch.randn(size), torch.randn(size)
    assert_near(lossops.mse_loss(x, y), (x.double() - y.double()).square().mean())


# --------------------------------------------------------------------------------------------------
# Every run alike, and second derivatives


@each_way
@each_variant
def test_same_bits_in_every_run(variant: Variant, way: str, device: str) -> None:
    """The emulator runs blocks and threads in another order each time, as a GPU may."""
    call = variant.make(WAYS[way], torch.float32)
    for reduction in ("none", "mean"):
        function = call.bind(variant.loss.function, reduction=reduction)
        first = value_and_gradients(function, call.leaves())
        for run in range(1, 4):
            with emulated.order(run) if device == EMULATED else nullcontext():
                again = value_and_gradients(function, call.leaves())
            assert all(map(torch.equal, first, again))


@each_way
@each_variant
def test_second_derivatives(variant: Variant, way: str) -> None:
    """A product with the Hessian, for a tangent and upstream gradients of the rows' own."""
    shape = (1, 3, 50, 40) if way == "packs of rows" else WAYS[way]
    for dtype in (torch.float64, torch.float32):
        call = variant.make(shape, dtype)
        exact = call.in_float64()
        upstream, tangents = None, [torch.randn(shape, dtype=dtype) for _ in call.tensors]
        results = []
        for which, function in ((call, variant.loss.function), (exact, variant.loss.reference)):
            leaves = which.leaves()
            loss = which.bind(function, reduction="none")(*leaves)
            if upstream is None:
                upstream = torch.randn(loss.shape, dtype=dtype)
            weights = upstream.to(loss.dtype).requires_grad_()
            gradients = torch.autograd.grad(loss, leaves, weights, create_graph=True)
            product = sum((g * v.to(g.dtype)).sum() for g, v in zip(gradients, tangents, strict=True))
            results.append(torch.autograd.grad(product, (*leaves, weights)))
        for a, e in zip(*results, strict=True):
            assert_near(a, e, scale=100)


@each_way
@each_dtype
def test_gradient_over_the_logits(way: str, dtype: torch.dtype) -> None:
    """Every element is read before it is written, by the same thread: in heads, tails and slices too."""
    shape = WAYS[way]
    target = torch.randint(0, shape[1], (shape[0], *shape[2:]))
    leaf = torch.randn(shape).to(dtype)
    for layout in (Tensor.clone, shifted(1)):
        gradients = []
        for in_place in (False, True):
            x = leaf.clone().requires_grad_()
            logits = Relaid.apply(x, layout)
            loss = lossops.functional.cross_entropy(logits, target, softcap=3.0, inplace_backward=in_place)
            gradients += torch.autograd.grad(loss, x)
        assert_near(gradients[1], gradients[0].double(), message=way)


class Relaid(torch.autograd.Function):
    """A copy in another place, whose gradient is what the loss says."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Any) -> Tensor:
        return layout(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.clone(), None


# --------------------------------------------------------------------------------------------------
# Class indices out of range


def one_bad_row(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, int, int]:
    """Logits, target, the bad row in the order of the rows, and its class index."""
    rows = (shape[0], *shape[2:])
    target = torch.randint(0, shape[1], rows)
    bad = target.numel() // 2
    target.view(-1)[bad] = shape[1] + 3
    return torch.randn(shape), target, bad, shape[1] + 3


@each_way
@pytest.mark.parametrize(
    "options",
    [{}, {"label_smoothing": 0.1}, {"weighted": True}, {"softcap": 3.0}],
    ids=lambda o: next(iter(o), "plain"),
)
def test_a_bad_target_makes_its_row_nan_and_no_other(way: str, options: dict[str, Any]) -> None:
    shape = WAYS[way]
    logits, target, bad, value = one_bad_row(shape)
    options = {"weight": torch.rand(shape[1]) + 0.5} if options.get("weighted") else options
    good = torch.arange(target.numel()).view(target.shape) != bad
    leaf = logits.clone().requires_grad_()
    loss = lossops.cross_entropy(leaf, target, reduction="none", **options)
    (gradient,) = torch.autograd.grad(loss, leaf, torch.ones_like(loss))
    with pytest.raises(IndexError, match=f"Target {value} is out of bounds: row {bad} .* C = {shape[1]} "):
        lossops.check_async_errors()
    lossops.check_async_errors()  # raised once

    exact = logits.double().requires_grad_()
    exact_options = {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()}
    expected = cross_entropy_reference(exact, target.where(good, 0), reduction="none", **exact_options)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), exact)
    assert torch.equal(loss.isnan(), ~good)
    assert_near(loss[good], expected[good], scale=5)
    by_row, expected_by_row = gradient.movedim(1, -1), expected_gradient.movedim(1, -1)
    assert by_row[~good].isnan().all()
    assert_near(by_row[good], expected_by_row[good], scale=5)


@each_way
def test_a_bad_target_makes_every_sum_nan(way: str) -> None:
    logits, target, _, value = one_bad_row(WAYS[way])
    for reduction in ("mean", "sum"):
        assert lossops.cross_entropy(logits, target, reduction=reduction).isnan()
        with pytest.raises(IndexError, match=f"Target {value} "):
            lossops.check_async_errors()


def test_only_the_first_bad_target_is_kept() -> None:
    logits = torch.randn(4, 5)
    for value in (7, -1, 2**40):
        lossops.cross_entropy(logits, torch.tensor([0, value, 1, 2]))
    with pytest.raises(IndexError, match="Target 7 is out of bounds: row 1 "):
        lossops.check_async_errors()
    lossops.check_async_errors()
    lossops.cross_entropy(logits, torch.tensor([0, 1, 2, -1]))  # and there is room for another
    with pytest.raises(IndexError, match="Target -1 is out of bounds: row 3 "):
        lossops.check_async_errors()


def test_several_bad_targets_of_one_call_name_one_of_them() -> None:
    target = torch.arange(300)
    lossops.cross_entropy(torch.randn(300, 100), target)
    with pytest.raises(IndexError) as error:
        lossops.check_async_errors()
    words = str(error.value).split()
    value, row = int(words[words.index("Target") + 1]), int(words[words.index("row") + 1])
    assert value == row >= 100


def test_every_op_records_a_bad_target() -> None:
    logits = torch.randn(4, 5, requires_grad=True)
    target = torch.tensor([0, 1, 2, 3])
    loss = lossops.cross_entropy(logits, target)
    target.data[2] = 77  # behind autograd's back
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert gradient.isnan().any(1).tolist() == [False, False, True, False]
    with pytest.raises(IndexError, match="Target 77 is out of bounds: row 2 "):
        lossops.check_async_errors()
    target.data[2] = 2
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    target.data[1] = -5
    (second,) = torch.autograd.grad(gradient.square().sum(), logits)
    assert second[[0, 2, 3]].isfinite().all()
    with pytest.raises(IndexError, match="Target -5 is out of bounds: row 1 "):
        lossops.check_async_errors()


def test_what_is_ignored_or_in_range_is_not_recorded() -> None:
    logits = torch.randn(4, 5)
    for index_dtype, ignored in ((torch.int64, -100), (torch.int32, 5), (torch.uint8, 255)):
        target = torch.tensor([0, 4, ignored, 2], dtype=torch.int64).to(index_dtype)
        assert lossops.cross_entropy(logits, target, ignore_index=ignored).isfinite()
        lossops.check_async_errors()


def test_synchronous_checks_raise_in_the_call(device: str) -> None:
    """LOSSOPS_SYNC_CHECKS is read once a process."""
    program = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch, lossops
from devices import using
with using({device!r}):
    logits = torch.randn(2, 5, 3, requires_grad=True)
    target = torch.tensor([[0, 1, 2], [3, 9, 4]])
    for options in ({{}}, {{"reduction": "none"}}):
        try:
            lossops.cross_entropy(logits, target, **options)
        except IndexError as error:
            print(error)
    print(lossops.cross_entropy(logits, target.clamp(max=4)).isfinite().item())
"""
    environment = {**os.environ, "LOSSOPS_SYNC_CHECKS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    *errors, fine = result.stdout.splitlines()
    assert len(errors) == 2
    for error in errors:
        assert error.startswith("cross_entropy: Target 9 is out of bounds: row (1, 1) of the target")
    assert fine == "True"
