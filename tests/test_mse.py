"""What is MSE's own: broadcasting, weights, dtypes that differ, and its errors."""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contract import REDUCTIONS, value_and_gradients
from devices import cpu_only, every_backend, here, not_emulated
from tolerances import DTYPES, assert_near
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import lossops
from lossops import mse_loss
from lossops.mse import mse_reference

pytestmark = pytest.mark.usefixtures("device")

each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


def run(function: Callable[..., Tensor], *arguments: Any, **options: Any) -> tuple[Tensor, list[str]]:
    """A result, and the warnings on the way to it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = function(*arguments, **options)
    return result, [f"{w.category.__name__}: {w.message}" for w in caught]


SHAPES = [
    ((4, 5), (5,)),
    ((5,), (4, 5)),
    ((4, 1), (1, 5)),
    ((), (4, 5)),
    ((4, 5), ()),
    ((1,), ()),
    ((2, 1, 3), (4, 1)),
    ((3, 0), (1, 1)),
]


@each_reduction
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_broadcasting(shapes: tuple[tuple[int, ...], tuple[int, ...]], reduction: str) -> None:
    tensors = tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    (ours, our_warnings), (torchs, torchs_warnings) = (
        run(f, *tensors, reduction=reduction) for f in (mse_loss, F.mse_loss)
    )
    assert ours.shape == torchs.shape
    assert_near(ours, torchs)
    assert our_warnings == torchs_warnings
    assert len(our_warnings) == 1
    upstream = torch.randn(ours.shape, dtype=torch.float64)
    for a, e in zip(*(torch.autograd.grad(loss, tensors, upstream) for loss in (ours, torchs)), strict=True):
        assert a.shape == e.shape
        assert_near(a, e, scale=10)


@cpu_only
def test_broadcasting_warning_points_at_the_caller() -> None:
    with pytest.warns(UserWarning, match="Using a target size") as caught:
        mse_loss(torch.zeros(2, 1), torch.zeros(2))
    assert caught[0].filename == __file__


def test_equal_shapes_do_not_warn() -> None:
    assert run(mse_loss, torch.zeros(2, 1), torch.ones(2, 1)) == (torch.tensor(1.0), [])


@each_reduction
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("weight_needs_grad", [False, True])
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_weight_with_broadcasting(
    shapes: tuple[tuple[int, ...], tuple[int, ...]], reduction: str, weight_needs_grad: bool
) -> None:
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    weight = torch.rand(shapes[0], dtype=torch.float64).requires_grad_(weight_needs_grad)
    leaves = [*tensors, weight] if weight_needs_grad else tensors
    ours, torchs = (f(*tensors, reduction=reduction, weight=weight) for f in (mse_loss, F.mse_loss))
    assert ours.shape == torchs.shape
    assert_near(ours, torchs)
    upstream = torch.randn(ours.shape, dtype=torch.float64)
    for a, e in zip(*(torch.autograd.grad(loss, leaves, upstream) for loss in (ours, torchs)), strict=True):
        assert_near(a, e, scale=10)


@each_reduction
def test_weight_derivatives(reduction: str) -> None:
    x, y, w = (torch.rand(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def loss(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        return mse_loss(x, y, weight=w, reduction=reduction)

    assert torch.autograd.gradcheck(loss, (x, y, w), check_batched_grad=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(loss, (x, y, w), check_fwd_over_rev=True)


@pytest.mark.filterwarnings("ignore:Using a target size")
@each_reduction
@pytest.mark.parametrize("broadcast", [False, True])
def test_forward_derivative_along_the_weight(reduction: str, broadcast: bool) -> None:
    x, y = torch.rand(3, 4).double(), torch.rand((4,) if broadcast else (3, 4)).double()
    w, direction = torch.rand(3, 4).double(), torch.rand(3, 4).double()

    def along(function: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        return torch.func.jvp(lambda w: function(x, y, weight=w, reduction=reduction), (w,), (direction,))

    for a, e in zip(along(mse_loss), along(F.mse_loss), strict=True):
        assert_near(a, e, scale=10)


@not_emulated
def test_compile_with_a_weight_that_needs_a_gradient() -> None:
    torch._dynamo.reset()
    tensors = tuple(torch.rand(3, 4, requires_grad=True) for _ in range(3))

    def loss(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        return mse_loss(x, y, weight=w)

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for a, e in zip(value_and_gradients(compiled, tensors), value_and_gradients(loss, tensors), strict=True):
        assert_near(a, e)


@each_reduction
def test_zero_weights(reduction: str) -> None:
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    weight = torch.zeros(3, 4)
    ours, torchs = (
        value_and_gradients(
            lambda a, b, f=f: f(a, b, weight=weight, reduction=reduction),
            (x.clone().requires_grad_(), y.clone().requires_grad_()),
        )
        for f in (mse_loss, F.mse_loss)
    )
    for a, e in zip(ours, torchs, strict=True):
        assert_near(a, e)


FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("input_dtype", FLOATING, ids=str)
@pytest.mark.parametrize("target_dtype", FLOATING, ids=str)
@pytest.mark.parametrize("weight_dtype", [None, *FLOATING], ids=str)
@each_reduction
def test_mixed_dtypes(
    input_dtype: torch.dtype, target_dtype: torch.dtype, weight_dtype: torch.dtype | None, reduction: str
) -> None:
    x = torch.randn(5, 7).to(input_dtype).requires_grad_()
    y = torch.randn(5, 7).to(target_dtype).requires_grad_()
    weight = None if weight_dtype is None else torch.rand(5, 7).to(weight_dtype)
    loss, *gradients = value_and_gradients(
        lambda x, y: mse_loss(x, y, weight=weight, reduction=reduction), (x, y)
    )
    torchs = F.mse_loss(x, y, weight=weight, reduction=reduction)
    assert loss.dtype == torchs.dtype
    assert [g.dtype for g in gradients] == [input_dtype, target_dtype]
    exact = tuple(t.detach().double().requires_grad_() for t in (x, y))
    exact_weight = None if weight is None else weight.double()
    expected = value_and_gradients(
        lambda x, y: mse_reference(x, y, reduction=reduction, weight=exact_weight), exact
    )
    computed_in = (
        torch.float64 if torch.float64 in (input_dtype, target_dtype, weight_dtype) else torch.float32
    )
    for a, e in zip((loss, *gradients), expected, strict=True):
        assert_near(a, e, a.dtype if a.dtype != torch.float64 else computed_in, scale=4)


INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8, torch.bool)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("integer", ["input", "target"])
@each_reduction
def test_integers_against_floating(dtype: torch.dtype, integer: str, reduction: str) -> None:
    """The loss has torch's dtype, the gradient is the floating operand's alone."""
    for floating in FLOATING:
        x, y = torch.randn(5, 7).to(floating).requires_grad_(), torch.randint(0, 2, (5, 7)).to(dtype)
        arguments = (x, y) if integer == "target" else (y, x)
        exact = x.detach().double().requires_grad_()
        exact_arguments = (exact, y.double()) if integer == "target" else (y.double(), exact)
        for options in ({}, {"mask": drawn_mask(5, 7)}, {"weight": torch.rand(5, 7).to(floating)}):
            loss = mse_loss(*arguments, reduction=reduction, **options)
            weight = {k: v.double() for k, v in options.items() if k == "weight"}
            expected = mse_reference(*exact_arguments, reduction, **{**options, **weight})
            if not options:
                torchs = F.mse_loss(*(t.detach() for t in arguments), reduction=reduction)
                assert loss.dtype == torchs.dtype == floating
            assert_near(loss, expected, floating)
            (gradient,) = torch.autograd.grad(loss.sum(), x)
            assert gradient.dtype == floating
            assert_near(gradient, torch.autograd.grad(expected.sum(), exact)[0], floating, scale=4)


@pytest.mark.parametrize("floating", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transformed", [False, True])
def test_an_integer_is_not_rounded_to_16_bits(floating: torch.dtype, transformed: bool) -> None:
    """torch computes in float16, where 2049 is 2048 and the loss 0."""
    x, y = torch.tensor([2048.0, 0.0], dtype=floating), torch.tensor([2049, 0])
    weight = torch.tensor([1, 2049])
    assert F.mse_loss(x, y) == 0  # torch; if this ever changes, so may this test
    for arguments in ((x, y), (y, x)):

        def loss(arguments: tuple[Tensor, ...] = arguments, **options: Any) -> Tensor:
            if transformed:
                return vmap(lambda *t: mse_loss(*t, **options))(*(t[None] for t in arguments))[0]
            return mse_loss(*arguments, **options)

        for options, expected in (
            ({}, 0.5),
            ({"reduction": "none"}, [1.0, 0.0]),
            ({"reduction": "none", "weight": weight}, [1.0, 0.0]),
        ):
            value = loss(**options)
            assert value.dtype == floating
            assert value.tolist() == expected
        with torch.autocast(x.device.type, dtype=floating):
            assert loss().dtype == F.mse_loss(*arguments).dtype == torch.float32


@each_reduction
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (0, 3)], ids=str)
def test_no_dimensions_and_no_elements(shape: tuple[int, ...], reduction: str) -> None:
    for weighted in (False, True):
        weight = torch.rand(shape) if weighted else None
        x, y = torch.randn(shape), torch.randn(shape)
        ours, torchs = (
            value_and_gradients(
                lambda a, b, f=f, w=weight: f(a, b, weight=w, reduction=reduction),
                (x.clone().requires_grad_(), y.clone().requires_grad_()),
            )
            for f in (mse_loss, F.mse_loss)
        )
        for a, e in zip(ours, torchs, strict=True):
            assert a.shape == e.shape
            assert_near(a, e)


def test_half_difference_whose_square_overflows() -> None:
    """A float16 overflow inside is no contract: only what does not fit the result is infinite."""
    x = torch.tensor([300.0, 0.0, 0.0, 0.0], dtype=torch.float16, requires_grad=True)
    y = torch.zeros(4, dtype=torch.float16)
    assert F.mse_loss(x, y).isinf()  # torch; if this ever changes, so may the README
    assert mse_loss(x, y).item() == 22496.0  # 22500 in float16
    assert mse_loss(x, y, reduction="none").tolist() == [float("inf"), 0, 0, 0]
    assert mse_loss(x, y, reduction="sum").item() == float("inf")
    (gradient,) = torch.autograd.grad(mse_loss(x, y), x)
    assert gradient.tolist() == [150.0, 0, 0, 0]
    tiny = torch.full((4,), 2.0**-13, dtype=torch.float16)
    assert mse_loss(tiny, -tiny, reduction="sum").item() == 2.0**-22


def test_half_mean_of_many_elements() -> None:
    x = torch.full((300_000,), 2.0, dtype=torch.float16)
    assert mse_loss(x, torch.zeros_like(x)).item() == 4.0


def test_not_finite_values() -> None:
    inf, nan = float("inf"), float("nan")
    values = torch.tensor([inf, -inf, nan, 1e30, -1e30, 0.0, 1.0])
    x, y = (t.contiguous() for t in torch.meshgrid(values, values, indexing="ij"))
    for dtype in FLOATING:
        ours, torchs = (
            value_and_gradients(
                lambda a, b, f=f: f(a, b, reduction="none"),
                (x.to(dtype).requires_grad_(), y.to(dtype).requires_grad_()),
            )
            for f in (mse_loss, F.mse_loss)
        )
        for a, e in zip(ours, torchs, strict=True):
            assert torch.equal(a.isnan(), e.isnan())
            assert torch.equal(a.isinf(), e.isinf())


def test_shared_dense_layout_needs_no_copy() -> None:
    """Two channels-last tensors are walked as they lie, and so is everything that comes of them."""
    x, y = (
        torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
        for _ in range(2)
    )
    with torch.profiler.profile() as profile:
        loss = mse_loss(x, y, reduction="none")
        loss.backward(torch.ones_like(loss))
    assert not {"aten::clone", "aten::contiguous", "aten::copy_"} & {event.name for event in profile.events()}
    for t in (loss, x.grad, y.grad):
        assert t.is_contiguous(memory_format=torch.channels_last)
    assert_near(loss, mse_reference(x.double(), y.double(), "none"))


def test_many_dimensions() -> None:
    for dims in (8, 16, 20):
        x, y = torch.randn([1, 2, 1, 2] + [1] * (dims - 4)), torch.randn([1, 2, 1, 2] + [1] * (dims - 4))
        assert_near(mse_loss(x, y), F.mse_loss(x, y))


def test_dimensions_that_do_not_merge() -> None:
    x = torch.randn([3] * 8)[(slice(0, 2),) * 8]
    y = torch.randn([3] * 8)[(slice(1, 3),) * 8].permute(7, 6, 5, 4, 3, 2, 1, 0)
    assert_near(mse_loss(x, y, reduction="none"), mse_reference(x.double(), y.double(), "none"))


# --------------------------------------------------------------------------------------------------
# Masks

INF, NAN = float("inf"), float("nan")
BAD = torch.tensor([NAN, INF, -INF, 1e30])


def spoilt(t: Tensor, counts: Tensor) -> Tensor:
    """A copy with NaN, infinities and what overflows where a mask says that nothing counts."""
    bad = BAD.to(t.device)[torch.arange(t.numel()) % 4].view(t.shape)
    return torch.where(counts, t.detach(), bad.to(t.dtype))


def drawn_mask(*shape: int, share: float = 0.6) -> Tensor:
    return torch.rand(shape) < share


def check_mask(
    tensors: tuple[Tensor, Tensor],
    mask: Tensor,
    reduction: str,
    weight: Tensor | None = None,
    layout: Callable[[Tensor], Tensor] = lambda t: t,
) -> None:
    """Against the reference for clean numbers, with bad ones under the mask; `layout` makes the views."""
    dtype = tensors[0].dtype
    counts = mask.expand(tensors[0].shape)
    leaves = tuple(layout(spoilt(t, counts)).requires_grad_() for t in tensors)
    exact = tuple(t.detach().double().requires_grad_() for t in tensors)
    bad_weight = None if weight is None else layout(spoilt(weight, counts))
    loss = mse_loss(*leaves, reduction=reduction, weight=bad_weight, mask=mask)
    expected = mse_reference(*exact, reduction, None if weight is None else weight.double(), mask)
    assert loss.dtype == dtype
    assert_near(loss, expected)
    upstream = torch.randn(loss.shape).to(dtype)
    bad_upstream = spoilt(upstream, counts) if reduction == "none" else upstream
    gradients = torch.autograd.grad(loss, leaves, bad_upstream)
    for a, e in zip(gradients, torch.autograd.grad(expected, exact, upstream.double()), strict=True):
        assert a.dtype == dtype
        assert_near(a, e, scale=4)
        assert not a[~counts].any()
    if reduction == "none":
        assert not loss[~counts].any()


MASKS = [(3, 7, 40), (3, 7, 1), (3, 1, 40), (1, 7, 1), (7, 40), (40,), (1,), (1, 1, 1), (7, 1)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@each_reduction
@every_backend
def test_mask(dtype: torch.dtype, weighted: bool, reduction: str) -> None:
    for shape in MASKS:
        x, y = torch.randn(3, 7, 40).to(dtype), torch.randn(3, 7, 40).to(dtype)
        weight = (torch.rand(3, 7, 40) + 0.5).to(dtype) if weighted else None
        mask = drawn_mask(*shape)
        mask.view(-1)[0] = True
        check_mask((x, y), mask, reduction, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_backend
def test_mask_of_long_and_short_rows(dtype: torch.dtype) -> None:
    """Rows of a mask that end within a block of the kernels' and at its end; blocks that count or do not."""
    for rows, columns in ((3, 1024), (3, 1023), (2, 5000), (1500, 2), (700, 3), (1, 3000), (129, 16)):
        x, y = torch.randn(rows, columns).to(dtype), torch.randn(rows, columns).to(dtype)
        for shape in ((rows, 1), (1, columns), (rows, columns)):
            for reduction in ("mean", "none"):
                mask = drawn_mask(*shape)
                mask.view(-1)[-1] = True
                check_mask((x, y), mask, reduction)
    lengths = torch.arange(0, 3000, 500).unsqueeze(1)
    mask = torch.arange(3000) < lengths  # as of padded sequences: long runs of either
    check_mask((torch.randn(6, 3000).to(dtype), torch.randn(6, 3000).to(dtype)), mask, "mean")


MASK_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.transpose(0, 2).contiguous().transpose(0, 2),
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "crop": lambda t: torch.nn.functional.pad(t, (1, 2, 2, 1))[..., 2:-1, 1:-2],
    "every other column": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "storage offset": lambda t: torch.cat([t.flatten()[:3], t.flatten()])[3:].view(t.shape),
}


@each_reduction
@pytest.mark.parametrize("layout", MASK_LAYOUTS)
@pytest.mark.parametrize("of_mask", [*MASK_LAYOUTS, "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_mask_and_layouts(layout: str, of_mask: str, reduction: str, dtype: torch.dtype) -> None:
    """A mask lies in memory as it likes, and so does what it masks."""
    shape = (4, 3, 6, 10)
    x, y, w = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), torch.rand(shape).to(dtype)
    for mask in (drawn_mask(*shape), drawn_mask(4, 3, 6, 1), drawn_mask(4, 1, 6, 10)):
        if of_mask != "plain":
            mask = MASK_LAYOUTS[of_mask](mask.to(torch.uint8)).bool()
        for weight in (None, w):
            check_mask((x, y), mask, reduction, weight, MASK_LAYOUTS[layout])


@each_reduction
def test_a_nan_that_counts_is_seen(reduction: str) -> None:
    x, y, w = torch.randn(4, 5), torch.randn(4, 5), torch.rand(4, 5)
    mask = drawn_mask(4, 5)
    mask[1, 2], mask[3, 4] = True, False
    for bad, value in itertools.product(range(3), (NAN, INF)):
        tensors = [t.clone() for t in (x, y, w)]
        tensors[bad][1, 2], tensors[bad][3, 4] = value, NAN
        leaves = tuple(t.requires_grad_() for t in tensors[:2])
        loss = mse_loss(*leaves, reduction=reduction, weight=tensors[2], mask=mask)
        (gradient,) = torch.autograd.grad(loss.sum(), leaves[0])
        if reduction == "none":
            assert not loss[1, 2].isfinite()
            assert loss.isfinite().sum() == 19
            assert gradient.isfinite().sum() == 19
        else:
            assert not loss.isfinite()
        assert not gradient[1, 2].isfinite()
        assert gradient[3, 4] == 0


@pytest.mark.parametrize("shape", [(4, 5), (3000,), (7, 2)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_backend
def test_nothing_counts(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """As torch has it for no elements: the sum is 0, the mean NaN; gradients are 0 either way."""
    rows = (*shape[:1], *(1 for _ in shape[1:]))
    for weighted, mask in itertools.product((False, True), (torch.zeros(shape), torch.zeros(rows))):
        x, y = (torch.full(shape, NAN, dtype=dtype).requires_grad_() for _ in range(2))
        weight = torch.full(shape, INF, dtype=dtype) if weighted else None
        for reduction in REDUCTIONS:
            loss = mse_loss(x, y, reduction=reduction, weight=weight, mask=mask.bool())
            if reduction == "mean":
                assert loss.isnan()
            else:
                assert not loss.any()
            for gradient in torch.autograd.grad(loss.sum(), (x, y)):
                assert not gradient.any()


@each_reduction
@pytest.mark.parametrize("weighted", [False, True])
def test_everything_counts(reduction: str, weighted: bool) -> None:
    for shape in ((), (5,), (3, 4), (70, 300)):
        x, y = torch.randn(shape, requires_grad=True), torch.randn(shape, requires_grad=True)
        weight = torch.rand(shape) if weighted else None
        masks = (torch.ones(of_mask).bool() for of_mask in (shape, (1,) * len(shape), ()))
        plain, *masked = (
            value_and_gradients(
                lambda x, y, m=mask, w=weight: mse_loss(x, y, reduction=reduction, weight=w, mask=m), (x, y)
            )
            for mask in (None, *masks)
        )
        for results in masked:
            for a, e in zip(results, plain, strict=True):
                assert_near(a, e)


@each_reduction
@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3)], ids=str)
def test_mask_of_no_elements(shape: tuple[int, ...], reduction: str) -> None:
    x, y = torch.randn(shape, requires_grad=True), torch.randn(shape)
    for mask in (torch.ones(shape), torch.ones((1,) * len(shape)), torch.ones(())):
        loss = mse_loss(x, y, reduction=reduction, mask=mask.bool())
        torchs = F.mse_loss(x, y, reduction=reduction)
        assert loss.shape == torchs.shape
        assert_near(loss, torchs)
        (gradient,) = torch.autograd.grad(loss.sum(), x)
        assert gradient.shape == shape


@pytest.mark.filterwarnings("ignore:Using a target size")
@each_reduction
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("weighted", [None, "fixed", "with a gradient"])
def test_mask_with_broadcasting(
    shapes: tuple[tuple[int, ...], tuple[int, ...]], reduction: str, weighted: str | None
) -> None:
    """A mask is the input's, as a weight is: where the target broadcasts the input, the mask goes along."""
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    weight = torch.rand(shapes[0], dtype=torch.float64) if weighted else None
    if weighted == "with a gradient":
        tensors.append(weight.requires_grad_())
    for mask in (drawn_mask(*shapes[0]), drawn_mask(*shapes[0][:-1], 1) if shapes[0] else drawn_mask()):
        expected = F.mse_loss(*tensors[:2], reduction="none", weight=weight).masked_fill(~mask, 0)
        if reduction != "none":
            expected = expected.sum()
        if reduction == "mean" and weight is None:
            expected = expected / mask.expand(torch.broadcast_shapes(*shapes)).sum()
        elif reduction == "mean":
            expected = expected / (weight * mask).sum()
        loss = mse_loss(*tensors[:2], reduction=reduction, weight=weight, mask=mask)
        assert_near(loss, expected)
        if not mask.any():
            continue  # torch's derivatives of a mean over nothing are NaN
        upstream = torch.randn(loss.shape, dtype=torch.float64)
        gradients = (torch.autograd.grad(value, tensors, upstream) for value in (loss, expected))
        for a, e in zip(*gradients, strict=True):
            assert a.shape == e.shape
            assert_near(a, e, scale=10)


def test_mask_of_many_half_elements() -> None:
    """The number of elements that count is beyond what float16 holds."""
    x = torch.full((300_000,), 2.0, dtype=torch.float16)
    mask = torch.arange(300_000) % 3 > 0
    assert mse_loss(x, torch.zeros_like(x), mask=mask).item() == 4.0
    weight = torch.ones(300_000, dtype=torch.float16)
    assert mse_loss(x, torch.zeros_like(x), mask=mask, weight=weight).item() == 4.0


def test_a_byte_of_a_mask_counts_unless_it_is_0() -> None:
    mask = torch.tensor([0, 1, 2, 128, 255, 0] * 50, dtype=torch.uint8).view(torch.bool)
    x = torch.randn(300)
    for m in (mask, mask[2:3], mask[::2].repeat(2), mask.view(50, 6).t().contiguous().t().flatten()):
        assert_near(mse_loss(x, torch.zeros(300), mask=m), x[m.expand(300)].double().square().mean())


# Derivatives: the reference's for clean numbers are those for bad ones under the mask.


@each_reduction
@pytest.mark.parametrize("of_mask", [(3, 4), (3, 1), (4,)], ids=str)
def test_masked_derivatives(reduction: str, of_mask: tuple[int, ...]) -> None:
    mask = drawn_mask(*of_mask)
    mask.view(-1)[:2] = torch.tensor([False, True])
    clean = tuple(torch.rand(3, 4, dtype=torch.float64) for _ in range(3))
    leaves = tuple(spoilt(t, mask.expand(3, 4)).requires_grad_() for t in clean)

    def loss(x: Tensor, y: Tensor, w: Tensor | None = None) -> Tensor:
        return mse_loss(x, y, weight=w, reduction=reduction, mask=mask)

    for inputs in (leaves[:2], leaves):
        assert torch.autograd.gradcheck(
            loss, inputs, check_batched_grad=True, check_forward_ad=True, check_batched_forward_grad=True
        )
        assert torch.autograd.gradgradcheck(loss, inputs, check_fwd_over_rev=True, check_batched_grad=True)


MASKED_TRANSFORMS: dict[str, Callable[[Callable[..., Tensor], tuple[Tensor, ...]], Any]] = {
    "grad": lambda f, t: grad(lambda *t: f(*t).sin().sum(), (0, 1, 2))(*t),
    "jvp": lambda f, t: jvp(f, t, tuple(x.flip(0).nan_to_num(2.0, 2.0, 2.0) for x in t)),
    "jacrev": lambda f, t: jacrev(f, (0, 1, 2))(*t),
    "jacfwd": lambda f, t: jacfwd(f, (0, 1, 2))(*t),
    "hessian": lambda f, t: hessian(lambda *t: f(*t).sin().sum(), (0, 1, 2))(*t),
    "reverse over reverse": lambda f, t: jacrev(jacrev(lambda *t: f(*t).sin().sum(), (0, 1)), (0, 1))(*t),
    "forward over forward": lambda f, t: jacfwd(jacfwd(lambda *t: f(*t).sin().sum(), (0, 1)), (0, 1))(*t),
}


@each_reduction
@pytest.mark.parametrize("transform", MASKED_TRANSFORMS)
@pytest.mark.parametrize("of_mask", [(3, 4), (3, 1)], ids=str)
def test_masked_transforms(reduction: str, transform: str, of_mask: tuple[int, ...]) -> None:
    """The weight's derivatives too."""
    mask = drawn_mask(*of_mask)
    mask.view(-1)[:2] = torch.tensor([False, True])
    tensors = tuple(spoilt(torch.rand(3, 4).double(), mask.expand(3, 4)) for _ in range(3))
    ours, references = (
        torch.utils._pytree.tree_leaves(
            MASKED_TRANSFORMS[transform](
                lambda x, y, w, f=f: f(x, y, weight=w, reduction=reduction, mask=mask), tensors
            )
        )
        for f in (mse_loss, mse_reference)
    )
    assert len(ours) == len(references)
    for a, e in zip(ours, references, strict=True):
        assert a.shape == e.shape
        assert e.isfinite().all()
        assert_near(a, e, scale=10)


@each_reduction
@pytest.mark.parametrize(
    "dims", [(0, 0, 0), (None, 0, 1), (0, None, 0), (None, None, 0), (-1, 0, None)], ids=str
)
@pytest.mark.parametrize("of_mask", [(3, 4), (3, 1)], ids=str)
@pytest.mark.parametrize("function", ["value", "grad", "hessian"])
def test_vmap_over_masks(
    reduction: str, dims: tuple[int | None, ...], of_mask: tuple[int, ...], function: str
) -> None:
    single = torch.rand(3, 4).double(), torch.rand(3, 4).double(), drawn_mask(*of_mask)
    batch = tuple(
        t if dim is None else torch.stack([t if t.dtype == torch.bool else t + k for k in range(2)], dim)
        for t, dim in zip(single, dims, strict=True)
    )
    if dims[2] is not None:
        batch[2].copy_(drawn_mask(*batch[2].shape))
        batch[2].select(dims[2], 0)[...] = False  # nothing counts
        batch[2].select(dims[2], 1)[0, 0] = True

    def per_sample(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        loss = mse_loss(x, y, mask=mask, reduction=reduction)
        return loss if reduction != "mean" else loss.nan_to_num(3.0)

    def reference(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        loss = mse_reference(x, y, mask=mask, reduction="none")
        if reduction == "none":
            return loss
        divisor = mask.expand(x.shape).sum().clamp(min=1) if reduction == "mean" else 1
        empty = 3.0 * ~mask.any() if reduction == "mean" else 0
        return loss.sum() / divisor + empty

    wrap = {
        "value": lambda f: f,
        "grad": lambda f: grad(lambda *t: f(*t).sin().sum()),
        "hessian": lambda f: hessian(lambda *t: f(*t).sin().sum()),
    }[function]
    result = vmap(wrap(per_sample), in_dims=dims)(*batch)
    for k in range(2):
        sample = tuple(t if dim is None else t.select(dim, k) for t, dim in zip(batch, dims, strict=True))
        assert_near(result[k], wrap(reference)(*sample), scale=10)


@not_emulated
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("weighted", [None, "fixed", "with a gradient"])
def test_compile_with_a_mask(dynamic: bool, weighted: str | None) -> None:
    """A mask that is an argument of the graph, as each batch has its own."""
    torch._dynamo.reset()

    def loss(x: Tensor, y: Tensor, mask: Tensor, weight: Tensor | None) -> Tensor:
        return mse_loss(2 * x, y, mask=mask, weight=weight)

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for rows in (5, 9):
        mask = drawn_mask(rows, 1)
        mask[0] = True
        x, y, w = (spoilt(torch.rand(rows, 4), mask.expand(rows, 4)) for _ in range(3))
        leaves = (x.requires_grad_(), y.requires_grad_())
        weight = None if weighted is None else w.requires_grad_(weighted == "with a gradient")
        if weighted == "with a gradient":
            leaves += (w,)
        results = [torch.autograd.grad(f(x, y, mask, weight), leaves) for f in (compiled, loss)]
        for a, e in zip(*results, strict=True):
            assert_near(a, e)
            assert not a[~mask.expand(rows, 4)].any()


@not_emulated
@pytest.mark.parametrize("strict", [False, True])
def test_export_with_a_mask(strict: bool) -> None:
    module = lossops.MSELoss()
    rows = torch.export.Dim("rows", min=2, max=1024)
    tensors = torch.randn(7, 13), torch.randn(7, 13)
    exported = torch.export.export(
        module,
        tensors,
        {"mask": drawn_mask(7, 1)},
        dynamic_shapes={"input": {0: rows}, "target": {0: rows}, "mask": {0: rows}},
        strict=strict,
    )
    wider, mask = (torch.randn(100, 13), torch.randn(100, 13)), drawn_mask(100, 1)
    assert torch.equal(exported.module()(*wider, mask=mask), module(*wider, mask=mask))


def test_mask_is_not_copied() -> None:
    """A broadcast mask is read as it is: no operation but ours, and nothing of the input's size saved."""
    x, y = torch.randn(64, 50, requires_grad=True), torch.randn(64, 50)
    mask = drawn_mask(64, 1)
    saved: list[Tensor] = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
        torch.profiler.profile() as profile,
    ):
        mse_loss(x, y, mask=mask).backward()
    known = {t.data_ptr() for t in (x, y, mask)}
    assert mask.data_ptr() in {t.data_ptr() for t in saved}
    assert all(t.numel() == 1 for t in saved if t.data_ptr() not in known)
    names = {event.name for event in profile.events() if event.name}
    assert names
    assert not {"aten::clone", "aten::contiguous", "aten::copy_", "aten::to"} & names


def test_module_with_weight_and_mask() -> None:
    x, y, w, mask = torch.randn(4, 5), torch.randn(4, 5), torch.rand(4, 5), drawn_mask(4, 5)
    for reduction in REDUCTIONS:
        module = lossops.MSELoss(reduction=reduction)
        for options in ({}, {"mask": mask}, {"weight": w}, {"weight": w, "mask": mask}):
            expected = mse_loss(x, y, reduction=reduction, **options)
            assert torch.equal(module(x, y, **options), expected)
    assert not torch.equal(lossops.MSELoss()(x, y, mask=mask), lossops.MSELoss()(x, y))


def test_mask_of_another_dtype() -> None:
    for dtype in (torch.uint8, torch.int64, torch.float32):
        with pytest.raises(TypeError, match=f"expected mask of dtype torch.bool.* got {dtype}"):
            mse_loss(f(3, 4), f(3, 4), mask=torch.ones(3, 4, dtype=dtype))


@pytest.mark.parametrize("shape", [(3,), (4, 4), (2, 4), (1, 3, 4), (0, 4), (3, 4, 1), (4, 3)], ids=str)
@pytest.mark.parametrize("weighted", [None, "fixed", "with a gradient"])
def test_mask_that_does_not_broadcast(shape: tuple[int, ...], weighted: str | None) -> None:
    weight = None if weighted is None else f(3, 4).requires_grad_(weighted == "with a gradient")
    with pytest.raises(ValueError, match=re.escape("(3, 4), got " + str(shape))):
        mse_loss(f(3, 4), f(3, 4), weight=weight, mask=torch.ones(shape).bool())


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_mask_of_the_targets_shape() -> None:
    with pytest.raises(ValueError, match=re.escape("(5,), got (4, 5)")):
        mse_loss(f(5), f(4, 5), mask=torch.ones(4, 5).bool())


def test_mask_on_another_device() -> None:
    with pytest.raises(RuntimeError, match=r"expected mask on .* got meta"):
        mse_loss(f(3, 4), f(3, 4), mask=torch.ones(3, 4, dtype=torch.bool, device="meta"))


# --------------------------------------------------------------------------------------------------
# Errors


def f(*shape: int) -> Tensor:
    return torch.rand(shape)


SAME_ERROR: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "shapes that do not broadcast": ((f(3), f(4)), {}),
    "reduction": ((f(3), f(3)), {"reduction": "average"}),
    "weight of another shape": ((f(4, 5), f(4, 5)), {"weight": f(5)}),
    "weight that needs a gradient, of another shape": ((f(4, 5), f(4, 5)), {"weight": f(5).requires_grad_()}),
    "weight of the target's shape": ((f(5), f(4, 5)), {"weight": f(4, 5)}),
    "integers": ((torch.ones(3, dtype=torch.long), torch.ones(3, dtype=torch.long)), {}),
    "booleans": ((torch.ones(3, dtype=torch.bool), torch.ones(3, dtype=torch.bool)), {}),
    "complex": ((torch.ones(3, dtype=torch.cfloat), torch.ones(3, dtype=torch.cfloat)), {}),
    "complex input": ((torch.ones(3, dtype=torch.cfloat), f(3)), {}),
    "complex target": ((f(3), torch.ones(3, dtype=torch.cfloat)), {}),
    "float8": ((f(3).to(torch.float8_e4m3fn), f(3).to(torch.float8_e4m3fn)), {}),
    "sparse input": ((f(3, 4).to_sparse(), f(3, 4)), {}),
    "sparse target": ((f(3, 4), f(3, 4).to_sparse()), {}),
    "target on another device": ((f(3), f(3).to("meta")), {}),
    "input on another device": ((f(3).to("meta"), f(3)), {}),
    "weight on another device": ((f(3), f(3)), {"weight": f(3).to("meta")}),
}


@pytest.mark.filterwarnings("ignore:Using a target size", "ignore:Sparse")
@pytest.mark.parametrize("case", SAME_ERROR)
def test_same_exception_as_torch(case: str) -> None:
    arguments, options = SAME_ERROR[case]
    with pytest.raises(Exception) as torchs:
        F.mse_loss(*arguments, **options)
    arguments, options = here((arguments, options))
    with pytest.raises(torchs.type) as ours:
        mse_loss(*arguments, **options)
    assert ours.type is torchs.type
    assert len(str(ours.value)) > 15
    assert "INTERNAL ASSERT" not in str(ours.value)


def test_integer_weight() -> None:
    """torch multiplies by any weight."""
    x, y = f(3, 4), f(3, 4)
    for dtype in (torch.long, torch.bool, torch.uint8):
        weight = torch.tensor([[0, 1, 1, 0]] * 3).to(dtype)
        for reduction in REDUCTIONS:
            ours, torchs = (g(x, y, weight=weight, reduction=reduction) for g in (mse_loss, F.mse_loss))
            assert_near(ours, torchs)


x34, scalar, float64 = f(3, 4), torch.ones(()), torch.ones((), dtype=torch.float64)
HOSTILE: dict[str, tuple[str, tuple[Any, ...]]] = {
    "forward: target": ("mse_forward", (x34, f(4), None, None, 1, None)),
    "forward: target larger": ("mse_forward", (x34, f(3, 40), None, None, 1, None)),
    "forward: weight": ("mse_forward", (x34, x34, f(3), None, 1, None)),
    "forward: reduction": ("mse_forward", (x34, x34, None, None, 3, None)),
    "forward: negative reduction": ("mse_forward", (x34, x34, None, None, -1, None)),
    "forward: out_dtype": ("mse_forward", (x34, x34, None, None, 1, torch.int64)),
    "forward: out_dtype complex": ("mse_forward", (x34, x34, None, None, 0, torch.complex64)),
    "forward: integer input": ("mse_forward", (x34.long(), x34, None, None, 1, None)),
    "forward: integer target": ("mse_forward", (x34, x34.long(), None, None, 1, None)),
    "forward: device": ("mse_forward", (x34, x34.to("meta"), None, None, 1, None)),
    "forward: mask": ("mse_forward", (x34, x34, None, f(3) < 1, 1, None)),
    "forward: mask's dtype": ("mse_forward", (x34, x34, None, x34, 1, None)),
    "forward: mask of bytes": ("mse_forward", (x34, x34, None, x34.byte(), 1, None)),
    "forward: mask's device": ("mse_forward", (x34, x34, None, (x34 < 1).to("meta"), 1, None)),
    "jvp: mask": ("mse_jvp", (x34, x34, None, f(4, 3) < 1, x34, x34, 1, None)),
    "jvp: mask's dtype": ("mse_jvp", (x34, x34, None, x34, x34, x34, 1, None)),
    "jvp: tangent": ("mse_jvp", (x34, x34, None, None, f(4), x34, 1, None)),
    "jvp: second tangent": ("mse_jvp", (x34, x34, None, None, x34, f(3, 3), 1, None)),
    "jvp: integer tangent": ("mse_jvp", (x34, x34, None, None, x34.long(), x34, 1, None)),
    "jvp: reduction": ("mse_jvp", (x34, x34, None, None, x34, x34, 7, None)),
    "jvp: device": ("mse_jvp", (x34, x34, None, None, x34.to("meta"), x34, 1, None)),
    "backward: gradient": ("mse_backward", (f(3), x34, x34, None, None, None, True, True)),
    "backward: gradient of one element": ("mse_backward", (f(1), x34, x34, None, None, None, True, True)),
    "backward: integer gradient": ("mse_backward", (scalar.long(), x34, x34, None, None, None, True, True)),
    "backward: gradient's device": (
        "mse_backward",
        (scalar.to("meta"), x34, x34, None, None, None, True, True),
    ),
    "backward: target": ("mse_backward", (scalar, x34, f(3), None, None, None, True, True)),
    "backward: weight": ("mse_backward", (scalar, x34, x34, f(3), None, None, True, True)),
    "backward: mask": ("mse_backward", (scalar, x34, x34, None, f(3, 1) < 1, None, True, True)),
    "backward: mask's dtype": ("mse_backward", (scalar, x34, x34, None, x34, None, True, True)),
    "backward: normalizer's dtype": ("mse_backward", (scalar, x34, x34, None, None, scalar, True, True)),
    "backward: normalizer's shape": (
        "mse_backward",
        (scalar, x34, x34, None, None, float64[None], True, True),
    ),
    "backward: empty normalizer": (
        "mse_backward",
        (scalar, x34, x34, None, None, float64[None][:0], True, True),
    ),
    "backward: sparse": ("mse_backward", (scalar, x34.to_sparse(), x34, None, None, None, True, True)),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_ops_called_directly_with_wrong_arguments(case: str) -> None:
    op, arguments = HOSTILE[case]
    with pytest.raises((RuntimeError, ValueError, NotImplementedError)) as error:
        getattr(torch.ops.lossops, op)(*here(arguments))
    assert len(str(error.value)) > 15
