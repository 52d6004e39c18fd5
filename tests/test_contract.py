"""What every loss owes its users: one sweep over contract.VARIANTS. Each loss's own is in its own file."""

from __future__ import annotations

import copy
import inspect
import io
import itertools
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import test_ahead
import test_linear_cross_entropy
import torch
from contract import (
    LOSSES,
    MSE,
    REDUCTIONS,
    VARIANTS,
    Call,
    Loss,
    Variant,
    check_against_reference,
    value_and_gradients,
)
from devices import cpu_only, every_backend, every_real_backend, here, not_emulated
from functorch.compile import make_boxed_func
from tolerances import DTYPES, assert_near
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

import lossops

pytestmark = pytest.mark.usefixtures("device")

each_variant = pytest.mark.parametrize("variant", VARIANTS, ids=str)
each_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


# --------------------------------------------------------------------------------------------------
# Values and gradients


@each_variant
@each_reduction
@each_dtype
@every_backend
def test_values_and_gradients(variant: Variant, reduction: str, dtype: torch.dtype) -> None:
    for shape in ((13,), (7, 13), (3, 5, 7), (2, 70, 3, 5)):
        check_against_reference(variant, variant.make(shape, dtype), reduction)


@each_variant
@each_reduction
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_agrees_with_torch(variant: Variant, reduction: str, dtype: torch.dtype) -> None:
    for shape in ((13,), (7, 13), (3, 5, 7), (2, 70, 3, 5)):
        call = variant.make(shape, dtype)
        ours = value_and_gradients(call.bind(variant.loss.function, reduction=reduction), call.leaves())
        torchs = value_and_gradients(call.bind(variant.torch_function, reduction=reduction), call.leaves())
        for a, e in zip(ours, torchs, strict=True):
            assert (a.shape, a.dtype, a.stride()) == (e.shape, e.dtype, e.stride())
            assert_near(a, e, scale=10)


# Every remainder of a vector of 8, 16 or 32 lanes, of few classes and of enough (48) to go along the rows;
# the neighbours of the kernels' tiles (32, 128) and blocks (1024, 2048); primes.
SIZES = (
    *range(1, 36),
    47,
    48,
    49,
    *range(63, 98),
    127,
    128,
    129,
    131,
    257,
    1023,
    1024,
    1025,
    2047,
    2048,
    2049,
)


@each_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("where", ["last", "first", "outside"])
@every_backend
def test_every_size(variant: Variant, where: str, dtype: torch.dtype) -> None:
    for size in SIZES:
        shape = {"last": (3, size), "first": (size, 3), "outside": (2, 5, size)}[where]
        check_against_reference(variant, variant.make(shape, dtype), "sum" if size % 2 else "none")


@each_variant
@every_backend
def test_sizes_with_float64_and_half(variant: Variant) -> None:
    for size, dtype in itertools.product((1, 7, 9, 17, 33, 129, 2049), (torch.float64, torch.float16)):
        for shape in ((3, size), (size, 3), (2, 5, size)):
            check_against_reference(variant, variant.make(shape, dtype), "none")


# Ways to see a tensor of shape (6, 10, 8, 4): views that real models make.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.transpose(0, 1),
    "reversed dimensions": lambda t: t.permute(3, 2, 1, 0),
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "every other row": lambda t: t[::2],
    "every other class": lambda t: t[:, ::2],
    "every other column": lambda t: t[..., ::2],
    "crop": lambda t: t[1:5, :, 1:7, 1:3],
    "storage offset 1": lambda t: t.flatten()[1 : 1 + 5 * 10 * 8 * 4].view(5, 10, 8, 4),
    "unaligned rows": lambda t: t.flatten(1)[:, 1:],
    "expanded rows": lambda t: t[:1].expand(6, 10, 8, 4),
    "expanded classes": lambda t: t[:, :1].expand(6, 10, 8, 4),
    "expanded columns": lambda t: t[..., :1].expand(6, 10, 8, 4),
    "all one element": lambda t: t[:1, :1, :1, :1].expand(6, 10, 8, 4),
    "overlapping windows": lambda t: t.flatten().unfold(0, 10, 3),
    "one row": lambda t: t[2, :, 3, 1],
    "negated view": torch._neg_view,
}


@each_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(variant: Variant, layout: str, dtype: torch.dtype) -> None:
    view = LAYOUTS[layout]
    base = torch.empty(6, 10, 8, 4)
    seen = variant.make(tuple(view(base).shape), dtype)  # fixed tensors and options of the view's shape
    for reduction in ("none", "mean"):
        call = Call(variant.make(tuple(base.shape), dtype).tensors, seen.fixed, seen.options)
        check_against_reference(variant, call, reduction, view)
    if variant.loss is MSE and seen.options:
        whole = variant.make(tuple(base.shape), dtype).options
        viewed = {"weight"} if layout == "negated view" else {"weight", "mask"}  # a mask has no negative
        call.options = {
            name: view(whole[name]) if whole[name].shape == base.shape and name in viewed else option
            for name, option in seen.options.items()
        }
        check_against_reference(variant, call, "sum", view)


@each_variant
def test_operands_in_different_layouts(variant: Variant) -> None:
    """No two operands walk memory in the same order, and the gradients have their own strides."""
    call = variant.make((6, 10, 8, 4), torch.float32)
    for reduction in REDUCTIONS:
        mixed = Call(
            (
                call.tensors[0].contiguous(memory_format=torch.channels_last),
                *(t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0) for t in call.tensors[1:]),
            ),
            tuple(t.mT.contiguous().mT for t in call.fixed),
            call.options,
        )
        plain = value_and_gradients(call.bind(variant.loss.function, reduction=reduction), call.leaves())
        got = value_and_gradients(mixed.bind(variant.loss.function, reduction=reduction), mixed.leaves())
        for a, e in zip(got, plain, strict=True):
            assert_near(a, e)
        for gradient, tensor in zip(got[1:], mixed.tensors, strict=True):
            assert gradient.stride() == tensor.stride()


@each_variant
@pytest.mark.parametrize("shape", [(300, 1000), (3, 150_000), (40_000, 7), (2, 5, 300, 301)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_real_backend
def test_bitwise_equal_across_threads_and_runs(
    variant: Variant, shape: tuple[int, ...], dtype: torch.dtype, restore_threads: None
) -> None:
    call = variant.make(shape, dtype)
    for reduction in ("none", "mean"):
        results = []
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            function = call.bind(variant.loss.function, reduction=reduction)
            results.append(value_and_gradients(function, call.leaves()))
        for other in results[1:]:
            assert all(map(torch.equal, results[0], other))


@each_variant
def test_many_threads_and_large_inputs_against_reference(variant: Variant, threads: int) -> None:
    for shape in ((300, 1000), (20_000, 7), (2, 5, 100, 101)):
        check_against_reference(variant, variant.make(shape, torch.float32), "none")


@each_variant
def test_inputs_are_left_as_they_were(variant: Variant) -> None:
    call = variant.make((7, 13), torch.float32)
    versions = [t._version for t in call.tensors]
    kept = [t.clone() for t in (*call.tensors, *call.fixed)]
    leaves = tuple(t.requires_grad_() for t in call.tensors)
    call.bind(variant.loss.function)(*leaves).backward()
    assert all(map(torch.equal, kept, (*call.tensors, *call.fixed)))
    assert versions == [t._version for t in call.tensors]


@each_variant
def test_each_tensor_may_need_a_gradient_alone(variant: Variant) -> None:
    call = variant.make((7, 13), torch.float32)
    both = value_and_gradients(call.bind(variant.loss.function), call.leaves())[1:]
    for k in range(len(call.tensors)):
        tensors = [t.clone().requires_grad_(j == k) for j, t in enumerate(call.tensors)]
        call.bind(variant.loss.function)(*tensors).backward()
        assert torch.equal(tensors[k].grad, both[k])
        assert all(t.grad is None for j, t in enumerate(tensors) if j != k)


# --------------------------------------------------------------------------------------------------
# Derivatives of every kind


@each_variant
@each_reduction
@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 2)], ids=str)
def test_gradcheck(variant: Variant, reduction: str, shape: tuple[int, ...]) -> None:
    call = variant.make(shape, torch.float64)
    function = call.bind(variant.loss.function, reduction=reduction)
    assert torch.autograd.gradcheck(
        function,
        call.leaves(),
        check_forward_ad=True,
        check_backward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
        check_undefined_grad=True,
    )


@each_variant
@each_reduction
@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 2)], ids=str)
def test_gradgradcheck(variant: Variant, reduction: str, shape: tuple[int, ...]) -> None:
    call = variant.make(shape, torch.float64)
    function = call.bind(variant.loss.function, reduction=reduction)
    assert torch.autograd.gradgradcheck(
        function, call.leaves(), check_fwd_over_rev=True, check_rev_over_rev=True, check_batched_grad=True
    )


def scalar(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A scalar that is not linear in the loss, so that no derivative of it is trivial."""
    return lambda *tensors: function(*tensors).sin().sum()


def positions(call: Call) -> tuple[int, ...]:
    return tuple(range(len(call.tensors)))


def assert_trees_near(actual: Any, expected: Any) -> None:
    actual, spec = torch.utils._pytree.tree_flatten(actual)
    expected, expected_spec = torch.utils._pytree.tree_flatten(expected)
    assert spec == expected_spec
    for a, e in zip(actual, expected, strict=True):
        assert (a.shape, a.dtype) == (e.shape, e.dtype)
        assert_near(a, e, scale=10)


TRANSFORMS: dict[str, Callable[[Callable[..., Tensor], Call], Any]] = {
    "grad": lambda f, c: grad(scalar(f), positions(c))(*c.tensors),
    "jvp": lambda f, c: jvp(f, c.tensors, tuple(t.flip(0) for t in c.tensors)),
    "jacrev": lambda f, c: jacrev(f, positions(c))(*c.tensors),
    "jacfwd": lambda f, c: jacfwd(f, positions(c))(*c.tensors),
    "jacfwd of the last tensor": lambda f, c: jacfwd(f, len(c.tensors) - 1)(*c.tensors),
    "hessian": lambda f, c: hessian(scalar(f), positions(c))(*c.tensors),
    "reverse over reverse": lambda f, c: jacrev(jacrev(scalar(f), positions(c)), positions(c))(*c.tensors),
    "reverse over forward": lambda f, c: jacrev(jacfwd(scalar(f), positions(c)), positions(c))(*c.tensors),
    "forward over forward": lambda f, c: jacfwd(jacfwd(scalar(f), positions(c)), positions(c))(*c.tensors),
    "grad of grad": lambda f, c: grad(
        lambda *t: sum(g.square().sum() for g in grad(scalar(f), positions(c))(*t)), positions(c)
    )(*c.tensors),
}


@each_variant
@each_reduction
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms(variant: Variant, reduction: str, transform: str) -> None:
    call = variant.make((3, 4), torch.float64)
    apply = TRANSFORMS[transform]
    assert_trees_near(
        apply(call.bind(variant.loss.function, reduction=reduction), call),
        apply(call.bind(variant.torch_function, reduction=reduction), call),
    )


BATCHED: dict[str, Callable[[Callable[..., Tensor]], Callable[..., Any]]] = {
    "vmap": lambda f: f,
    "vmap of grad": lambda f: grad(scalar(f)),
    "vmap of jvp": lambda f: lambda *t: jvp(f, t, tuple(x.flip(-1) for x in t)),
    "vmap of hessian": lambda f: hessian(scalar(f)),
    "vmap of vmap": lambda f: lambda *t: vmap(f)(*(torch.stack([x, 2 * x]) for x in t)),
    "vmap of jacrev": lambda f: jacrev(f),
}


@each_variant
@each_reduction
@pytest.mark.parametrize("transform", BATCHED)
@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 2)], ids=str)
def test_vmap(variant: Variant, reduction: str, transform: str, shape: tuple[int, ...]) -> None:
    calls = [variant.make(shape, torch.float64) for _ in range(3)]
    for k in range(len(calls[0].tensors)):
        # The k-th tensor batched at its end, those after it not at all, those before it in front.
        dims = tuple(0 if j < k else -1 if j == k else None for j in range(len(calls[0].tensors)))
        batch = tuple(
            calls[0].tensors[j] if dim is None else torch.stack([c.tensors[j] for c in calls], dim)
            for j, dim in enumerate(dims)
        )

        def batched(
            function: Callable[..., Tensor],
            dims: tuple[int | None, ...] = dims,
            batch: tuple[Tensor, ...] = batch,
        ) -> Any:
            per_sample = BATCHED[transform](calls[0].bind(function, reduction=reduction))
            return vmap(per_sample, in_dims=dims)(*batch)

        assert_trees_near(batched(variant.loss.function), batched(variant.torch_function))


@each_variant
@each_reduction
def test_third_order(variant: Variant, reduction: str) -> None:
    call = variant.make((3, 4), torch.float64)

    def third(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        leaves = call.leaves()
        value = call.bind(function, reduction=reduction)(*leaves).exp().sum()
        for _ in range(2):
            gradients = torch.autograd.grad(value, leaves, create_graph=True)
            value = sum((g * g.detach().cos() + g.square()).sum() for g in gradients)
        return torch.autograd.grad(value, leaves)

    for a, e in zip(third(variant.loss.function), third(variant.torch_function), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-10)


# --------------------------------------------------------------------------------------------------
# The rest of autograd


@each_variant
def test_upstream_gradients(variant: Variant) -> None:
    call = variant.make((3, 5, 7), torch.float32)
    upstreams = {
        "none": lambda shape: (
            torch.randn(shape),
            torch.randn(shape).mT.contiguous().mT,
            torch.randn(()).expand(shape),
            torch.zeros(shape),
            torch.randn((shape[0], *(1,) * (len(shape) - 1))).expand(shape),
        ),
        "mean": lambda shape: (torch.tensor(-3.0), torch.tensor(0.0)),
        "sum": lambda shape: (torch.tensor(1e-20), torch.tensor([2.0, 3.0])[1]),
    }
    exact = call.in_float64()
    for reduction, make in upstreams.items():
        ours = call.bind(variant.loss.function, reduction=reduction)
        reference = exact.bind(variant.loss.reference, reduction=reduction)
        for upstream in make(ours(*call.tensors).shape):
            actual = value_and_gradients(ours, call.leaves(), upstream)
            expected = value_and_gradients(reference, exact.leaves(), upstream.double())
            for a, e in zip(actual[1:], expected[1:], strict=True):
                assert_near(a, e, scale=3)


@each_variant
@each_reduction
def test_several_backward_passes(variant: Variant, reduction: str) -> None:
    call = variant.make((7, 13), torch.float32)
    leaves = call.leaves()
    loss = call.bind(variant.loss.function, reduction=reduction)(*leaves)
    upstream = torch.ones_like(loss)
    first = torch.autograd.grad(loss, leaves, upstream, retain_graph=True)
    second = torch.autograd.grad(loss, leaves, 2 * upstream, retain_graph=True)
    third = torch.autograd.grad(loss, leaves, upstream)
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, c)
        assert torch.equal(2 * a, b)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves, upstream)


@each_variant
def test_changed_input_is_noticed(variant: Variant) -> None:
    call = variant.make((7, 13), torch.float32)
    leaves = call.leaves()
    shifted = tuple(t + 1 for t in leaves)
    loss = call.bind(variant.loss.function)(*shifted)
    shifted[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@each_variant
def test_accumulates_into_grad(variant: Variant) -> None:
    call = variant.make((7, 13), torch.float32)
    leaves = call.leaves()
    for _ in range(2):
        call.bind(variant.loss.function)(*leaves).backward()
    once = value_and_gradients(call.bind(variant.loss.function), call.leaves())[1:]
    for leaf, gradient in zip(leaves, once, strict=True):
        assert torch.equal(leaf.grad, 2 * gradient)


@each_variant
def test_hooks(variant: Variant) -> None:
    call = variant.make((7, 13), torch.float32)
    leaves = call.leaves()
    seen = []
    leaves[0].register_hook(lambda g: seen.append(g.clone()) or 10 * g)
    loss = call.bind(variant.loss.function)(*leaves)
    loss.register_hook(lambda g: 2 * g)
    loss.backward()
    once = value_and_gradients(call.bind(variant.loss.function), call.leaves())[1:]
    assert torch.equal(seen[0], 2 * once[0])
    assert torch.equal(leaves[0].grad, 20 * once[0])


@each_variant
@each_reduction
def test_not_the_last_op(variant: Variant, reduction: str) -> None:
    call = variant.make((7, 13), torch.float64)

    def model(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *t: (
            call.bind(function, reduction=reduction)(*(x * x for x in t)).sin().exp().mean().log()
        )

    ours = value_and_gradients(model(variant.loss.function), call.leaves())
    torchs = value_and_gradients(model(variant.torch_function), call.leaves())
    for a, e in zip(ours, torchs, strict=True):
        assert_near(a, e, scale=100)


@each_variant
def test_no_grad_and_inference_mode(variant: Variant) -> None:
    call = variant.make((7, 13), torch.float32)
    leaves = call.leaves()
    function = call.bind(variant.loss.function)
    with_grad = function(*leaves)
    assert with_grad.requires_grad
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            loss = function(*leaves)
        assert loss.grad_fn is None
        assert not loss.requires_grad
        assert loss.is_inference() == (mode is torch.inference_mode)
        assert torch.equal(loss, with_grad)
    assert function(*call.tensors).grad_fn is None
    with torch.inference_mode():
        inside = tuple(t.clone() for t in call.tensors)
    assert torch.equal(function(*inside), with_grad)


@each_variant
def test_saves_inputs_and_nothing_of_their_size(variant: Variant) -> None:
    call = variant.make((64, 50), torch.float32)
    leaves = call.leaves()
    inputs = {t.data_ptr() for t in (*leaves, *call.fixed, *call.options.values()) if isinstance(t, Tensor)}
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        call.bind(variant.loss.function)(*leaves).backward()
    assert saved
    fresh = [t for t in saved if t.data_ptr() not in inputs]
    assert sum(t.numel() for t in fresh) <= variant.loss.saved_per_row * 64 + 1


@each_variant
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(variant: Variant, use_reentrant: bool) -> None:
    call = variant.make((7, 13), torch.float32)
    plain = value_and_gradients(call.bind(variant.loss.function), call.leaves())[1:]
    leaves = call.leaves()
    checkpoint(call.bind(variant.loss.function), *leaves, use_reentrant=use_reentrant).backward()
    for leaf, gradient in zip(leaves, plain, strict=True):
        assert torch.equal(leaf.grad, gradient)


@each_variant
@each_reduction
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(variant: Variant, reduction: str, dtype: torch.dtype) -> None:
    call = variant.make((7, 13), dtype)
    leaves = call.leaves()
    with torch.autocast(leaves[0].device.type, dtype=dtype):
        loss = call.bind(variant.loss.function, reduction=reduction)(*leaves)
        torchs = call.bind(variant.torch_function, reduction=reduction)(*call.tensors)
    exact = call.in_float64()
    assert loss.dtype == torch.float32
    if not (variant.loss is MSE and variant.weighted):  # torch composes that one from other ops
        assert torchs.dtype == torch.float32
    assert_near(loss, exact.bind(variant.loss.reference, reduction=reduction)(*exact.tensors), scale=10)
    gradients = torch.autograd.grad(loss.sum(), leaves)
    expected = value_and_gradients(exact.bind(variant.loss.reference, reduction=reduction), exact.leaves())[
        1:
    ]
    for g, e in zip(gradients, expected, strict=True):
        assert g.dtype == dtype
        assert_near(g, e, scale=10)


@each_variant
def test_autocast_makes_no_float32_copy(variant: Variant) -> None:
    call = variant.make((7, 13), torch.bfloat16)
    leaves = call.leaves()
    with torch.autocast(leaves[0].device.type, dtype=torch.bfloat16), torch.profiler.profile() as profile:
        call.bind(variant.loss.function)(*leaves)
    assert profile.events()
    assert not {"aten::to", "aten::_to_copy"} & {event.name for event in profile.events() if event.name} or (
        variant.loss is not MSE and variant.weighted  # C class weights, N row weights in float32
    )


@each_variant
def test_autocast_leaves_float64_alone(variant: Variant) -> None:
    call = variant.make((7, 13), torch.float64)
    with torch.autocast(call.tensors[0].device.type, dtype=torch.bfloat16):
        loss = call.bind(variant.loss.function)(*call.tensors)
        torchs = call.bind(variant.torch_function)(*call.tensors)
    assert loss.dtype == torchs.dtype == torch.float64


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.id in ("mse", "probabilities")], ids=str)
def test_autocast_keeps_a_float64_operand(variant: Variant) -> None:
    """Autocast widens 16 bits to float32, and leaves float64 and what it promotes to alone."""
    call = variant.make((7, 13), torch.float64)
    for tensors in itertools.permutations((call.tensors[0].bfloat16(), call.tensors[1])):
        with torch.autocast(tensors[0].device.type, dtype=torch.bfloat16):
            ours, torchs = (call.bind(f)(*tensors) for f in (variant.loss.function, variant.torch_function))
        assert ours.dtype == torchs.dtype


# --------------------------------------------------------------------------------------------------
# Compilers


@each_variant
@pytest.mark.parametrize("dynamic", [False, True])
@not_emulated
def test_compile(variant: Variant, dynamic: bool) -> None:
    torch._dynamo.reset()

    def loss_of(*tensors: Tensor) -> Tensor:
        return variant.loss.function(*(2 * t for t in tensors), *call.fixed, **call.options)

    compiled = torch.compile(loss_of, fullgraph=True, dynamic=dynamic)
    for shape in ((7, 13), (9, 13)) if dynamic else ((7, 13),):
        call = variant.make(shape, torch.float32)
        actual = value_and_gradients(compiled, call.leaves())
        expected = value_and_gradients(loss_of, call.leaves())
        for a, e in zip(actual, expected, strict=True):
            assert_near(a, e)


@each_variant
@each_reduction
@not_emulated
def test_compile_traces_every_reduction(variant: Variant, reduction: str) -> None:
    """With the tracing backend, which is quick: no graph break, forward and backward ops in the graphs."""
    torch._dynamo.reset()
    call = variant.make((7, 13), torch.float32)
    graphs: list[str] = []

    def record(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph.code)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=record)
    function = call.bind(variant.loss.function, reduction=reduction)
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    actual = value_and_gradients(compiled, call.leaves())
    expected = value_and_gradients(function, call.leaves())
    assert all(map(torch.equal, actual, expected))
    assert len(graphs) == 2
    assert f"lossops.{variant.loss.ops}_forward" in graphs[0]
    assert f"lossops.{variant.loss.ops}_backward" in graphs[1]


@each_variant
@not_emulated
def test_compile_without_gradients(variant: Variant) -> None:
    torch._dynamo.reset()
    call = variant.make((7, 13), torch.float32)
    function = call.bind(variant.loss.function)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(*call.tensors), function(*call.tensors))


class Step(torch.nn.Module):
    """A model with the loss inside, as it is exported."""

    def __init__(self, function: Callable[..., Tensor], call: Call) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(13, 13)
        self.function = call.bind(function)

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.function(self.linear(tensors[0]), *tensors[1:])


@each_variant
@pytest.mark.parametrize("strict", [False, True])
@not_emulated
def test_export(variant: Variant, strict: bool) -> None:
    call = variant.make((7, 13), torch.float32)
    model = Step(variant.loss.function, call)
    exported = torch.export.export(model, call.tensors, strict=strict)
    graphs = [m for m in exported.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    ops = {str(node.target) for graph in graphs for node in graph.graph.nodes}
    assert any(op.startswith("lossops.") for op in ops), ops
    assert torch.equal(exported.module()(*call.tensors), model(*call.tensors))


@each_loss
@not_emulated
def test_export_with_dynamic_batch(loss: Loss) -> None:
    rows = torch.export.Dim("rows", min=2, max=1024)
    module = loss.module()
    x = torch.randn(7, 13)
    target = torch.randn(7, 13).softmax(1)
    exported = torch.export.export(module, (x, target), dynamic_shapes=({0: rows}, {0: rows}))
    wider = torch.randn(100, 13), torch.randn(100, 13).softmax(1)
    assert torch.equal(exported.module()(*wider), module(*wider))


FAKE_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(0, 1),
    "crop": lambda t: t[:, :, 1:3],
    "expanded": lambda t: t[:1].expand(t.shape),
}


@each_variant
@each_reduction
@pytest.mark.parametrize("layout", FAKE_LAYOUTS)
@pytest.mark.parametrize("where", ["fake", "meta"])
def test_fake_and_meta_tensors(variant: Variant, reduction: str, layout: str, where: str) -> None:
    """Shapes, dtypes and strides of losses and gradients are those of real tensors."""
    view = FAKE_LAYOUTS[layout]
    shape = tuple(view(torch.empty(4, 5, 6, 3)).shape)
    for dtype in (torch.float32, torch.bfloat16):
        call = variant.make(shape, dtype)
        tensors = tuple(view(t) for t in variant.make((4, 5, 6, 3), dtype).tensors)

        def run(
            convert: Callable[[Tensor], Tensor], call: Call = call, tensors: tuple[Tensor, ...] = tensors
        ) -> list[Any]:
            options = {k: convert(v) if isinstance(v, Tensor) else v for k, v in call.options.items()}
            there = Call(tensors, tuple(map(convert, call.fixed)), options)
            leaves = tuple(convert(t).detach().requires_grad_() for t in tensors)
            loss = there.bind(variant.loss.function, reduction=reduction)(*leaves)
            gradients = torch.autograd.grad(loss.sum(), leaves)
            return [(t.shape, t.dtype, t.stride()) for t in (loss, *gradients)]

        real = run(lambda t: t)
        if where == "meta":
            assert run(lambda t: t.to("meta")) == real
        else:
            with FakeTensorMode() as mode:
                assert run(mode.from_tensor) == real


# --------------------------------------------------------------------------------------------------
# Ops


def op_arguments() -> list[tuple[str, str, tuple[Any, ...]]]:
    torch.manual_seed(1)
    cases: list[tuple[str, str, tuple[Any, ...]]] = []
    logits, rows = torch.randn(6, 9), torch.randn(6)
    index, probabilities = torch.randint(0, 9, (6,)), torch.randn(6, 9).softmax(1)
    for name, target, weight, smoothing, planes in (
        ("index", index, None, 0.0, 2),
        ("smoothing", index, torch.rand(9), 0.1, 3),
        ("probabilities", probabilities, torch.rand(9), 0.0, 3),
    ):
        stats = torch.stack([logits.amax(1), (logits.exp().sum(1).log() - logits.amax(1)), torch.ones(6)])[
            :planes
        ]
        need_target = target is probabilities
        for reduction in (0, 1, 2):
            arguments = (logits, target, weight, reduction, -100, smoothing, None)
            cases.append((f"{name}-{reduction}", "cross_entropy_forward", arguments))
        cases.append(
            (
                f"{name}-float64",
                "cross_entropy_forward",
                (logits, target, weight, 1, -100, smoothing, torch.float64),
            )
        )
        options = (-100, smoothing, True, need_target)
        normalizer = torch.tensor(6.0, dtype=torch.float64)
        cases.append(
            (
                f"{name}-one",
                "cross_entropy_backward",
                (torch.ones(()), logits, target, weight, stats, normalizer, *options),
            )
        )
        cases.append(
            (f"{name}-rows", "cross_entropy_backward", (rows, logits, target, weight, stats, None, *options))
        )
        cases.append(
            (
                f"{name}-nothing",
                "cross_entropy_backward",
                (rows, logits, target, weight, stats, None, -100, smoothing, False, False),
            )
        )
        cases += [
            (f"{name}-{n}", op, arguments)
            for n, op, arguments in rows_arguments(logits, target, weight, smoothing)
        ]
    x, y, w = torch.randn(6, 9), torch.randn(9, 6).T, torch.rand(6, 9)
    rows = (torch.rand(6, 1) < 0.5).expand(6, 9)
    for name, weight, mask in (
        ("plain", None, None),
        ("weight", w, None),
        ("mask", None, w < 0.5),
        ("weight-mask", w, rows),
    ):
        for reduction in (0, 1, 2):
            cases.append((f"{name}-{reduction}", "mse_forward", (x, y, weight, mask, reduction, None)))
            cases.append(
                (f"{name}-{reduction}", "mse_jvp", (x, y, weight, mask, w, x, reduction, torch.float64))
            )
        for needs in ((True, True), (False, True), (True, False)):
            cases.append(
                (
                    f"{name}-one-{needs}",
                    "mse_backward",
                    (torch.ones(()), x, y, weight, mask, torch.tensor(54.0).double(), *needs),
                )
            )
        cases.append((f"{name}-each", "mse_backward", (x, x, y, weight, mask, None, True, True)))
    cases.append(("no tensors", "check_async_errors", ()))
    return cases


def rows_arguments(
    logits: Tensor, target: Tensor, weight: Tensor | None, smoothing: float
) -> list[tuple[str, str, tuple[Any, ...]]]:
    """The ops of the row functions, with and without what they may leave out."""
    needs = True, target.is_floating_point(), True
    tensors, cases = (logits, target, weight), []
    for name, scale, cap, planes in (("capped", torch.tensor(0.7), 2.0, 7), ("plain", None, 0.0, 6)):
        options = scale, 1.0, cap, -100, smoothing
        rows, upstream = torch.rand(planes, 6), torch.randn(planes, 6)
        saved = upstream, rows, *tensors, *options
        cases += [
            (name, "cross_entropy_rows_forward", (*tensors, *options, planes == 7, planes == 7)),
            (name, "cross_entropy_rows_backward", (*saved, *needs)),
            (f"{name}-nothing", "cross_entropy_rows_backward", (*saved, False, False, False)),
            (name, "cross_entropy_rows_backward_", (*saved, *needs[1:])),
            (
                name,
                "cross_entropy_rows_backward_backward",
                (torch.randn(6, 9), torch.tensor(0.3), *saved, *needs),
            ),
            (
                f"{name}-nothing",
                "cross_entropy_rows_backward_backward",
                (None, None, *saved, False, False, False),
            ),
        ]
    indices = torch.tensor([[0, -100, 8]], dtype=torch.int32)
    return [*cases, ("sharded", "class_indices", (indices, "op", -100, 9))]


OP_CASES = op_arguments()


@pytest.mark.parametrize(
    ("op", "arguments"), [case[1:] for case in OP_CASES], ids=[f"{c[1]}-{c[0]}" for c in OP_CASES]
)
@not_emulated
def test_opcheck(op: str, arguments: tuple[Any, ...]) -> None:
    results = torch.library.opcheck(getattr(torch.ops.lossops, op).default, here(arguments))
    assert set(results.values()) == {"SUCCESS"}


@cpu_only
def test_opcheck_covers_every_op() -> None:
    schemas = {s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("lossops::")}
    elsewhere = {op.name() for op, _, _ in test_linear_cross_entropy.ops()}
    elsewhere |= {f"lossops::{op}" for op in test_ahead.OPS} | {"lossops::multiply_"}  # test_products.py
    assert schemas == {f"lossops::{op}" for _, op, _ in OP_CASES} | elsewhere


# --------------------------------------------------------------------------------------------------
# Functions and modules


@each_loss
@cpu_only
def test_signatures_are_torchs(loss: Loss) -> None:
    def parameters(function: Callable[..., Any]) -> list[tuple[Any, ...]]:
        return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]

    def assert_extends(ours: Callable[..., Any], torchs: Callable[..., Any]) -> None:
        expected, given = parameters(torchs), parameters(ours)
        assert given[: len(expected)] == expected
        extra = given[len(expected) :]  # may be left out, and are out of the way of torch's to come
        assert all(kind == inspect.Parameter.KEYWORD_ONLY for _, kind, _ in extra)
        assert all(default is not inspect.Parameter.empty for _, _, default in extra)

    assert_extends(loss.function, loss.torch_function)
    assert_extends(loss.module, loss.torch_module)
    assert_extends(loss.module.forward, loss.torch_module.forward)
    assert loss.function.__name__ == loss.torch_function.__name__
    assert loss.module.__name__ == loss.torch_module.__name__


@each_loss
@cpu_only
def test_exported_where_users_look(loss: Loss) -> None:
    assert getattr(lossops, loss.function.__name__) is loss.function
    assert getattr(lossops.functional, loss.function.__name__) is loss.function
    assert getattr(lossops, loss.module.__name__) is loss.module
    assert {loss.function.__name__, loss.module.__name__} <= set(lossops.__all__)


def module_arguments(loss: Loss) -> tuple[Tensor, Tensor]:
    return torch.randn(7, 13), torch.randn(7, 13) if loss is MSE else torch.randint(4, 13, (7,))


@each_loss
def test_modules(loss: Loss) -> None:
    for options in here(loss.constructors):
        ours, torchs = loss.module(**options), loss.torch_module(**options)
        assert isinstance(ours, loss.torch_module)
        assert repr(ours) == repr(torchs)
        assert ours.extra_repr() == torchs.extra_repr()
        assert [name for name, _ in ours.named_buffers()] == [name for name, _ in torchs.named_buffers()]
        assert list(ours.state_dict()) == list(torchs.state_dict())
        assert not list(ours.parameters())
        torchs.load_state_dict(ours.state_dict())
        ours.load_state_dict(torchs.state_dict())
        arguments = module_arguments(loss)
        expected = torchs(*arguments)
        torch.testing.assert_close(ours(*arguments), expected)
        stream = io.BytesIO()
        torch.save(ours, stream)
        stream.seek(0)
        for copied in (
            copy.deepcopy(ours),
            copy.copy(ours),
            pickle.loads(pickle.dumps(ours)),
            torch.load(stream, weights_only=False),
        ):
            assert type(copied) is loss.module
            assert repr(copied) == repr(ours)
            assert torch.equal(copied(*arguments), ours(*arguments))
        for buffer in ours.double().buffers():
            assert buffer.dtype == torch.float64


@each_loss
@cpu_only
def test_pickled_by_reference(loss: Loss) -> None:
    """Functions and classes pickle by name, as multiprocessing wants, and under their public module."""
    for thing in (loss.function, loss.module):
        assert pickle.loads(pickle.dumps(thing)) is thing


@each_loss
@pytest.mark.parametrize("size_average", [None, True, False])
@pytest.mark.parametrize("reduce", [None, True, False])
def test_deprecated_arguments(loss: Loss, size_average: bool | None, reduce: bool | None) -> None:
    arguments = module_arguments(loss)
    options = {"size_average": size_average, "reduce": reduce, "reduction": "sum"}
    results, warned = [], []
    for function in (loss.function, loss.torch_function):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            results.append(function(*arguments, **options))
        warned.append([(w.category, str(w.message)) for w in caught])
    torch.testing.assert_close(*results)
    assert warned[0] == warned[1]
    assert bool(warned[0]) == (size_average is not None or reduce is not None)
    if size_average is not None or reduce is not None:
        with pytest.warns(UserWarning, match="size_average"):
            ours = loss.module(size_average=size_average, reduce=reduce)
        with pytest.warns(UserWarning, match="size_average"):
            torchs = loss.torch_module(size_average=size_average, reduce=reduce)
        assert ours.reduction == torchs.reduction


class Logged(torch.Tensor):
    """A subclass that records which functions reach it."""

    seen: list[Any] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        cls.seen.append(function)
        return super().__torch_function__(function, types, args, kwargs or {})


@each_variant
def test_tensor_subclasses_see_the_call(variant: Variant) -> None:
    call = variant.make((7, 13), torch.float32)
    Logged.seen.clear()
    loss = call.bind(variant.loss.function)(*(t.as_subclass(Logged) for t in call.tensors))
    assert variant.loss.function in Logged.seen
    assert torch.equal(loss.as_subclass(torch.Tensor), call.bind(variant.loss.function)(*call.tensors))


@each_variant
def test_nothing_is_accepted_that_is_no_tensor(variant: Variant) -> None:
    call = variant.make((7, 13), torch.float32)
    arguments = (*call.tensors, *call.fixed)
    for position in range(len(arguments)):
        for wrong in (None, 1.0, [1.0], "x", arguments[position].cpu().numpy()):
            broken = list(arguments)
            broken[position] = wrong
            with pytest.raises(TypeError, match="to be a Tensor"):
                variant.loss.function(*broken, **call.options)
    names = {"weight", *(name for name, option in call.options.items() if isinstance(option, Tensor))}
    names.discard("logit_scale")  # may be a number
    for wrong, name in itertools.product((1.0, [1.0], "x"), sorted(names)):
        with pytest.raises(TypeError, match="to be a Tensor"):
            variant.loss.function(*arguments, **{**call.options, name: wrong})


@each_variant
@cpu_only
def test_bad_reduction(variant: Variant) -> None:
    call = variant.make((7, 13), torch.float32)
    for wrong in ("avg", "", "Mean", None, 1):
        for function in (variant.loss.function, variant.torch_function):
            with pytest.raises(ValueError, match="reduction"):
                call.bind(function, reduction=wrong)(*call.tensors)
        with pytest.raises(ValueError, match="is not a valid value for reduction"):
            call.bind(variant.loss.function, reduction=wrong)(*call.tensors)
