"""What is MSE's own: broadcasting, weights, dtypes that differ, and its errors."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contract import REDUCTIONS, value_and_gradients
from devices import cpu_only, here, not_emulated
from tolerances import assert_near
from torch import Tensor

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


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.int8, torch.bool], ids=str)
@each_reduction
def test_integer_target(dtype: torch.dtype, reduction: str) -> None:
    for floating in FLOATING:
        x, y = torch.randn(5, 7).to(floating), torch.randint(0, 2, (5, 7)).to(dtype)
        ours, torchs = (f(x, y, reduction=reduction) for f in (mse_loss, F.mse_loss))
        assert ours.dtype == torchs.dtype
        assert_near(ours, mse_reference(x.double(), y.double(), reduction))


def test_integer_input_with_floating_target() -> None:
    """torch promotes in both directions."""
    x, y = torch.randint(0, 5, (5, 7)), torch.randn(5, 7)
    ours, torchs = mse_loss(x, y), F.mse_loss(x, y)
    assert ours.dtype == torchs.dtype
    assert_near(ours, torchs)


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
    "forward: target": ("mse_forward", (x34, f(4), None, 1, None)),
    "forward: target larger": ("mse_forward", (x34, f(3, 40), None, 1, None)),
    "forward: weight": ("mse_forward", (x34, x34, f(3), 1, None)),
    "forward: reduction": ("mse_forward", (x34, x34, None, 3, None)),
    "forward: negative reduction": ("mse_forward", (x34, x34, None, -1, None)),
    "forward: out_dtype": ("mse_forward", (x34, x34, None, 1, torch.int64)),
    "forward: out_dtype complex": ("mse_forward", (x34, x34, None, 0, torch.complex64)),
    "forward: integer input": ("mse_forward", (x34.long(), x34, None, 1, None)),
    "forward: integer target": ("mse_forward", (x34, x34.long(), None, 1, None)),
    "forward: device": ("mse_forward", (x34, x34.to("meta"), None, 1, None)),
    "jvp: tangent": ("mse_jvp", (x34, x34, None, f(4), x34, 1, None)),
    "jvp: second tangent": ("mse_jvp", (x34, x34, None, x34, f(3, 3), 1, None)),
    "jvp: integer tangent": ("mse_jvp", (x34, x34, None, x34.long(), x34, 1, None)),
    "jvp: reduction": ("mse_jvp", (x34, x34, None, x34, x34, 7, None)),
    "jvp: device": ("mse_jvp", (x34, x34, None, x34.to("meta"), x34, 1, None)),
    "backward: gradient": ("mse_backward", (f(3), x34, x34, None, None, True, True)),
    "backward: gradient of one element": ("mse_backward", (f(1), x34, x34, None, None, True, True)),
    "backward: integer gradient": ("mse_backward", (scalar.long(), x34, x34, None, None, True, True)),
    "backward: gradient's device": ("mse_backward", (scalar.to("meta"), x34, x34, None, None, True, True)),
    "backward: target": ("mse_backward", (scalar, x34, f(3), None, None, True, True)),
    "backward: weight": ("mse_backward", (scalar, x34, x34, f(3), None, True, True)),
    "backward: normalizer's dtype": ("mse_backward", (scalar, x34, x34, None, scalar, True, True)),
    "backward: normalizer's shape": ("mse_backward", (scalar, x34, x34, None, float64[None], True, True)),
    "backward: empty normalizer": ("mse_backward", (scalar, x34, x34, None, float64[None][:0], True, True)),
    "backward: sparse": ("mse_backward", (scalar, x34.to_sparse(), x34, None, None, True, True)),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_ops_called_directly_with_wrong_arguments(case: str) -> None:
    op, arguments = HOSTILE[case]
    with pytest.raises((RuntimeError, ValueError, NotImplementedError)) as error:
        getattr(torch.ops.lossops, op)(*here(arguments))
    assert len(str(error.value)) > 15
