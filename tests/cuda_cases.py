"""Small calls of the CUDA ops that reach every kernel, each result compared with float64 formulas in torch.

For the emulator with sanitizers, which is slow, and for mutants, of which there are many: the calls are for
`cuda_emulator/reduced.py`, which builds kernels for one dtype and with lower limits on launches, so that few
rows are enough for every loop.

python tests/cuda_cases.py LIBRARY float32 [--order 0 1 2] [--only WORDS]
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from cuda_emulator.control import ORDERS, Emulator
from tolerances import assert_near
from torch import Tensor

INF, NAN = float("inf"), float("nan")
NONE, MEAN, SUM = range(3)
IGNORED = -100

# Combined with each dtype where the operands of a call are to differ.
OTHER = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.bfloat16,
    torch.float64: torch.float32,
}

Case = tuple[str, Callable[[], None]]


def ops() -> Any:
    return torch.ops.lossops_emulated


def shifted(t: Tensor, offset: int, gap: int = 0) -> Tensor:
    """A copy from `offset` elements past an aligned address on, rows `gap` elements apart, NaN around it."""
    columns = t.shape[-1] + gap
    rows = t.numel() // t.shape[-1]
    memory = torch.full((offset + rows * columns - gap,), NAN, dtype=t.dtype)
    strides = [columns]
    for size in reversed(t.shape[1:-1]):
        strides.insert(0, strides[0] * size)
    return memory.as_strided(t.shape, (*strides[: t.dim() - 1], 1), offset).copy_(t)


# --------------------------------------------------------------------------------------------------
# Cross-entropy


class Exact(NamedTuple):
    """The formulas of csrc/cross_entropy.h in float64, classes last."""

    loss: Tensor
    weight: Tensor  # what mean divides by, of each row
    t: Tensor
    keep: Tensor  # dt/dp
    lse: Tensor
    z: Tensor

    @property
    def softmax(self) -> Tensor:
        return (self.z - self.lse).exp()


def exact_rows(
    logits: Tensor, target: Tensor, weight: Tensor | None, smoothing: float, ignored: int
) -> Exact:
    z = logits.double().movedim(1, -1)
    classes = z.shape[-1]
    w = torch.ones(classes, dtype=torch.float64) if weight is None else weight.double()
    if target.is_floating_point():
        p, counted, row_weight = target.double().movedim(1, -1), torch.tensor(True), torch.ones(z.shape[:-1])
    else:
        index = target.long()
        inside = (index >= 0) & (index < classes)
        safe = index.clamp(0, classes - 1)
        p = torch.nn.functional.one_hot(safe, classes).double()
        counted = index != ignored
        row_weight = torch.where(counted, w[safe], 0.0).where(inside | ~counted, NAN)
        p = p.where((inside | ~counted).unsqueeze(-1), NAN)
    counted = counted.unsqueeze(-1)
    t = torch.where(counted, w * ((1 - smoothing) * p + smoothing / classes), 0.0)
    lse = z.logsumexp(-1, keepdim=True)
    loss = torch.where(t == 0, 0.0, t * (lse - z)).sum(-1)
    return Exact(loss, row_weight.double(), t, (1 - smoothing) * w, lse, z)


def bad_rows(target: Tensor, classes: int, ignored: int) -> dict[int, int]:
    if target.is_floating_point():
        return {}
    values = enumerate(target.flatten().tolist())
    return {row: y for row, y in values if y != ignored and not 0 <= y < classes}


def expect_record(bad: dict[int, int]) -> None:
    """The record of a bad class index, where there should be one, names one of them, once."""
    if bad:
        try:
            ops().check_async_errors()
        except IndexError as error:
            words = str(error).split()
            value = int(words[words.index("Target") + 1])
            row = int(words[words.index("row") + 1])
            assert bad.get(row) == value, f"{error} for the bad rows {bad}"
        else:
            raise AssertionError(f"no error for the bad rows {bad}")
    ops().check_async_errors()


def check_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    smoothing: float = 0.0,
    reductions: tuple[int, ...] = (NONE, MEAN),
    ignored: int = IGNORED,
) -> None:
    dense = target.is_floating_point()
    exact = exact_rows(logits, target, weight, smoothing, ignored)
    bad = bad_rows(target, logits.shape[1], ignored)
    for reduction in reductions:
        options = (ignored, smoothing)
        loss, stats, normalizer = ops().cross_entropy_forward(
            logits, target, weight, reduction, *options, None
        )
        expect_record(bad)
        divisor = exact.weight.sum()
        total = exact.loss.sum()
        expected = {NONE: exact.loss, MEAN: total / divisor, SUM: total}[reduction]
        assert_near(loss, expected, scale=5, message="loss")
        assert_near(normalizer, divisor, torch.float32, message="normalizer")
        if not dense:
            assert (stats[:, target == ignored] == 0).all(), "stats of ignored rows"

        # 1, as of a loss that is the last step; 0 leaves zeros, whatever the logits are
        upstream = torch.randn(exact.loss.shape if reduction == NONE else ())
        if reduction == SUM:
            upstream.fill_(1)
        elif reduction == NONE and upstream.numel() > 1:
            upstream.view(-1)[0], upstream.view(-1)[-1] = 1, 0
        given = ops().cross_entropy_backward(
            upstream, logits, target, weight, stats, normalizer if reduction == MEAN else None, *options,
            True, dense,
        )  # fmt: skip
        expect_record(bad)
        g = (upstream.double() / divisor if reduction == MEAN else upstream.double()).unsqueeze(-1)
        sums = exact.t.sum(-1, keepdim=True)
        by_logits = g * (sums * exact.softmax - exact.t)
        by_logits = torch.where((exact.t == 0).all(-1, keepdim=True) | (g == 0), 0.0, by_logits)
        assert_near(given[0].movedim(1, -1), by_logits, scale=10, message="grad_logits")
        if dense:
            by_target = torch.where(g == 0, 0.0, g * exact.keep * (exact.lse - exact.z))
            assert_near(given[1].movedim(1, -1), by_target, scale=10, message="grad_target")
            alone = ops().cross_entropy_backward(
                upstream, logits, target, weight, stats, normalizer if reduction == MEAN else None, *options,
                False, True,
            )  # fmt: skip
            assert_near(alone[1].movedim(1, -1), by_target, scale=10, message="grad_target alone")


def drawn(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return (3 * torch.randn(shape)).to(dtype)


def indices(shape: tuple[int, ...]) -> Tensor:
    """With an ignored row, and the first and the last class."""
    target = torch.randint(0, shape[1], (shape[0], *shape[2:]))
    flat = target.view(-1)
    flat[-1], flat[0] = shape[1] - 1, 0
    if flat.numel() > 2:
        flat[1] = IGNORED
    return target


def probabilities(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).softmax(1).to(dtype)


# Kinds of targets: class indices, then those that have a weight for each class.
KINDS = ("index", "weighted", "smoothed", "probabilities")


def check_kind(
    kind: str, logits: Tensor, other: torch.dtype | None = None, offset: int = 0, **more: Any
) -> None:
    """`other`: the dtype of probabilities; `offset`: where these and the weights begin."""
    shape, dtype = tuple(logits.shape), logits.dtype
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    weight = shifted(torch.rand(1, shape[1], dtype=accumulation) + 0.5, offset)[0]
    if kind == "index":
        check_cross_entropy(logits, indices(shape), **more)
    elif kind == "weighted":
        check_cross_entropy(logits, indices(shape), weight, **more)
    elif kind == "smoothed":
        check_cross_entropy(logits, indices(shape), weight, 0.1, **more)
        check_cross_entropy(logits, indices(shape).int(), None, 0.2, reductions=(MEAN,))
    else:
        p = shifted(probabilities(shape, other or dtype), offset)
        check_cross_entropy(logits, p, weight, 0.1, **more)
        check_cross_entropy(logits, p, reductions=(SUM,))


# Each way through the logits, with the limits of cuda_emulator/reduced.py: blocks, warps and lanes take
# several rows, tiles or chunks of rows in turn, the last of them in part.
WAYS = {
    "short rows": (397, 7),
    "short rows, in pairs": (397, 10),
    "short rows, in fours": (397, 12),
    "short rows, pushed apart": (397, 8),
    "short rows, one class": (397, 1),
    "lanes": (450, 37),
    "warp": (107, 300),
    "block": (101, 520),
    "block, two steps": (21, 2600),
    "two slices": (6, 1100),
    "slices": (6, 1800),
    "more slices than lanes": (1, 20_483),
    "tiles": (1, 3, 23, 31),
    "tiles, lanes": (2, 70, 5, 5),
    "tiles, packs": (2, 7, 48, 40),
}
FEW_ROWS = {"lanes": (7, 37), "warp": (5, 300), "block": (3, 520), "slices": (3, 1800)}


def ways(dtype: torch.dtype) -> Iterator[Case]:
    for way, shape in WAYS.items():
        for kind in KINDS:
            if way == "short rows, one class" and kind == "probabilities":
                continue
            yield f"{way}, {kind}", lambda s=shape, k=kind: check_kind(k, drawn(s, dtype))


def mixed(dtype: torch.dtype) -> Iterator[Case]:
    """Operands of two dtypes, classes far apart: read one by one."""
    shapes = {"warp": (15, 70), "block": (5, 520), "tiles": (2, 11, 3, 5), "one row": (1, 5)}
    for way, shape in shapes.items():
        yield (
            f"two dtypes, {way}",
            lambda s=shape: check_kind("probabilities", drawn(s, dtype), OTHER[dtype]),
        )
    for classes in (9, 530):
        for kind in ("weighted", "smoothed", "probabilities"):
            yield (
                f"classes apart, {classes}, {kind}",
                lambda c=classes, k=kind: check_kind(k, drawn((c, 5), dtype).t()),
            )


def every_remainder(dtype: torch.dtype) -> Iterator[Case]:
    """Rows that begin and end at any element of a pack, of fewer classes than one, of some, and of more
    than the threads take at once."""
    width = 16 // dtype.itemsize

    def check(classes: int, offset: int, gap: int, kind: str) -> None:
        logits = shifted(drawn((3, classes), dtype), offset, gap)
        check_kind(kind, logits, offset=offset, reductions=(NONE,))

    for offset in range(width):
        for remainder in range(width):
            kind = KINDS[(offset + remainder) % len(KINDS)]
            for classes in (remainder + 1, 128 + remainder, 300 + remainder, 520 + 8 * width + remainder):
                # A gap that keeps the rows alike but is no short row, and one that shifts each.
                gap = width + (-classes) % width if remainder % 2 else 1
                yield (
                    f"offset {offset} of {width}, {classes} classes, gap {gap}, {kind}",
                    lambda c=classes, o=offset, g=gap, k=kind: check(c, o, g, k),
                )
    for kind in KINDS:
        for classes in (33, 300, 2600):
            yield (
                f"aligned rows, a pack apart, {classes} classes, {kind}",
                lambda c=classes, k=kind: check(c + (-c) % width, 0, width, k),
            )
    for classes in range(1, 2 * 128 // dtype.itemsize // width + 1):
        yield (
            f"{classes} classes, contiguous",
            lambda c=classes: check_cross_entropy(
                shifted(drawn((131, c), dtype), 1 if c % 3 == 0 else 0), indices((131, c))
            ),
        )
    for size in range(8, 17):
        yield f"{size} rows side by side", lambda s=size: check_kind("smoothed", drawn((1, 9, s), dtype))


def in_phases(
    dtype: torch.dtype, ways: Sequence[str], check: Callable[[str, Tensor, int], None]
) -> Iterator[Case]:
    """Logits, probabilities and gradient begin at every element of a pack, each two of them in every way;
    behind the packs that lanes move together are too few elements for more of them, just enough, and more."""
    width = 16 // dtype.itemsize
    packs = {"lanes": 2 * 8, "warp": 32, "block": (9 if width == 2 else 5) * 32}
    for way, offset, kind in itertools.product(ways, range(width), ("index", "probabilities")):
        # A row of the gradient or the probabilities begins an element later in its sector than the one
        # before, a row of the logits half a sector. With fewer rows long ones would be cut into slices.
        classes, rows = (packs[way] + 3) * width + 1, 21 if way == "block" else 2 * width
        yield (
            f"{way} in phases, {offset} of {width}, {kind}",
            lambda r=rows, c=classes, o=offset, k=kind: check(
                k, shifted(drawn((r, c), dtype), o, 2 * width - 1), o
            ),
        )


def phases(dtype: torch.dtype) -> Iterator[Case]:
    def check(kind: str, logits: Tensor, offset: int) -> None:
        check_kind(kind, logits, offset=offset, reductions=(NONE,))

    yield from in_phases(dtype, ("lanes", "warp", "block"), check)


def edges(dtype: torch.dtype) -> Iterator[Case]:
    def infinite(shape: tuple[int, ...], smoothing: float) -> None:
        """Rows of -inf alone, at the start, at the end, all but the target; and a NaN."""
        logits, target = drawn((6, *shape[1:]), dtype), indices((6, *shape[1:]))
        target[1] = target[0]
        logits[0] = -INF
        logits[1, 0] = -INF
        logits[1, 1:-1] = -INF if shape[1] > 2 else 0
        logits[2, : shape[1] // 2] = -INF
        logits[3, shape[1] // 2 :] = -INF
        logits[4, shape[1] // 3] = NAN
        check_cross_entropy(logits, target, smoothing=smoothing, reductions=(NONE, SUM))

    def bad(shape: tuple[int, ...], options: dict[str, Any]) -> None:
        target = indices(shape)
        flat = target.view(-1)
        flat[flat.numel() // 2] = shape[1]
        check_cross_entropy(drawn(shape, dtype), target, **options)
        flat[flat.numel() // 2] = -1
        flat[0] = -2  # several: one of them is kept
        check_cross_entropy(drawn(shape, dtype), target, **options)

    def ignored(shape: tuple[int, ...], options: dict[str, Any]) -> None:
        """What is in an ignored row reaches nothing; nor is an index out of range one where it is ignored."""
        logits, target = drawn(shape, dtype), indices(shape)
        target[-1] = 255
        logits[-1] = NAN
        for integer in (torch.int64, torch.int32, torch.uint8):
            fitting = target.clamp(0, 255).to(integer)
            fitting[fitting >= shape[1]] = 255
            check_cross_entropy(logits, fitting, ignored=255, **options)
        check_cross_entropy(logits, torch.full_like(target, 255), ignored=255, **options)

    shapes = {
        "short rows": (9, 5),
        **FEW_ROWS,
        "tiles": (6, 5, 3, 3),
        "tiles, lanes": (6, 40, 2, 5),
    }
    for way, shape in shapes.items():
        for smoothing in (0.0, 0.1):
            options = {"smoothing": smoothing}
            suffix = f"{way}, smoothing {smoothing}"
            yield f"-inf, {suffix}", lambda s=shape, e=smoothing: infinite(s, e)
            yield f"bad target, {suffix}", lambda s=shape, o=options: bad(s, o)
            yield f"ignored, {suffix}", lambda s=shape, o=options: ignored(s, o)
    packs = (2, 5, 48, 40)
    yield "bad target, packs of rows", lambda: bad(packs, {"smoothing": 0.0})
    yield "ignored, packs of rows", lambda: ignored(packs, {"smoothing": 0.0})
    apart = (2, 7, 2, 960)
    yield (
        "packs of rows whose results lie apart",
        lambda: check_kind("index", drawn(apart, dtype).transpose(2, 3)),
    )
    yield "no rows", lambda: check_cross_entropy(drawn((0, 5), dtype), torch.zeros(0, dtype=torch.int64))

    def no_classes() -> None:
        logits = drawn((3, 0), dtype)
        loss, stats, normalizer = ops().cross_entropy_forward(logits, logits, None, NONE, IGNORED, 0.0, None)
        assert_near(loss, torch.zeros(3), message="loss")
        assert normalizer == 0, "of no classes there is no mean"
        assert_near(stats[1], torch.zeros(3), message="log_sum")

    yield "no classes", no_classes

    def descending() -> None:
        """The maximum is raised, or never again, and far: what was summed up before counts for nothing."""
        for classes in (5, 37, 300, 2600):
            rising = torch.linspace(-60, 60, classes)
            logits = torch.stack([rising, rising.flip(0)]).to(dtype)
            for kind in KINDS:
                check_kind(kind, logits)
                check_kind(kind, logits.view(2, classes, 1, 1).expand(2, classes, 3, 3).contiguous())

    yield "rising and falling logits", descending

    def certain() -> None:
        """All of the target's weight, 1, is met before the maximum, or with it."""
        for classes in (5, 37, 300, 2600):
            logits = torch.linspace(-9, 9, classes).expand(2, classes).to(dtype)
            target = torch.nn.functional.one_hot(torch.tensor([0, classes - 1]), classes).to(dtype)
            check_cross_entropy(logits.contiguous(), target)

    yield "certain targets", certain

    def every_target(classes: int) -> None:
        logits = drawn((1, classes), dtype).expand(3, classes).contiguous()
        for c in {0, classes - 1, *range(0, classes, max(1, classes // 37)), *range(511, classes, 512)}:
            check_cross_entropy(
                logits, torch.tensor([c, max(0, c - 1), min(c + 1, classes - 1)]), reductions=(NONE,)
            )

    for classes in (7, 40, 300, 1800):
        yield f"every target of {classes}", lambda c=classes: every_target(c)


# --------------------------------------------------------------------------------------------------
# Row functions

MAX, LOG_SUM, TARGET_SUM, DOT, PICKED, TARGET_WEIGHT, ENTROPY = range(7)


class RowOptions(NamedTuple):
    scale: float = 1.0
    softcap: float = 0.0
    entropy: bool = False
    on_device: bool = False  # the scale is a tensor
    smoothing: float = 0.0
    ignored: int = IGNORED
    only: int | None = None  # the one plane that gets a gradient: 1


TRANSFORMS = (
    RowOptions(),
    RowOptions(scale=0.7, entropy=True),
    RowOptions(softcap=4.0),
    RowOptions(scale=1.3, softcap=6.0, entropy=True, on_device=True),
)


class RowTargets(NamedTuple):
    """Of a call, in float64 and with classes last."""

    p: Tensor  # probabilities, or 1 at the class index
    w: Tensor
    row_weight: Tensor
    counted: Tensor
    bad: Tensor  # a class index out of range


def row_targets(target: Tensor, weight: Tensor | None, classes: int, ignored: int) -> RowTargets:
    w = torch.ones(classes, dtype=torch.float64) if weight is None else weight.double()
    if target.is_floating_point():
        p = target.double().movedim(1, -1)
        all_rows = torch.ones(p.shape[:-1], dtype=torch.float64)
        return RowTargets(p, w, all_rows, all_rows == 1, all_rows == 0)
    y = target.long()
    counted = y != ignored
    inside = (y >= 0) & (y < classes)
    safe = y.clamp(0, classes - 1)
    p = torch.nn.functional.one_hot(safe, classes).double()
    return RowTargets(p, w, w[safe], counted, counted & ~inside)


def exact_planes(z: Tensor, p: Tensor, scale: Tensor, targets: RowTargets, given: RowOptions) -> Tensor:
    """The row functions of csrc/cross_entropy.h, for autograd to differentiate; 0 where a row is ignored."""
    finite = z.masked_fill(z.isinf(), 0)
    if given.softcap:  # its slope is 0 at infinity
        u = given.softcap * torch.tanh(scale * finite / given.softcap)
        u = u.where(~z.isinf(), given.softcap * z.detach().sign())
    else:  # a class that is ruled out has no part in the gradient of the scale: not 0 times infinity
        u = scale.detach() * z + (scale - scale.detach()) * finite
    most = u.detach().nan_to_num(NAN, INF, -INF).where(~u.isnan(), -INF).amax(-1, keepdim=True)
    distance = u - most.where(most != -INF, 0.0)
    log_sum = distance.logsumexp(-1, keepdim=True)
    t = targets.w * ((1 - given.smoothing) * p + given.smoothing / z.shape[-1])
    term = t * distance
    log_softmax = distance - log_sum
    softmax = log_softmax.exp()
    picked = distance.where(targets.p == 1, 0.0) if p is targets.p else 0 * log_sum
    planes = [
        most.squeeze(-1),
        log_sum.squeeze(-1),
        t.sum(-1),
        term.where(~term.isnan(), 0.0).sum(-1),
        picked.sum(-1),
        targets.row_weight,
    ]
    if given.entropy:
        planes.append(-(softmax * log_softmax.where(softmax != 0, 0.0)).sum(-1))
    return torch.stack(planes).where(targets.counted, 0.0)


def twin(t: Tensor) -> Tensor:
    """A copy that lies in memory as `t` does."""
    memory = t.untyped_storage().clone()
    return torch.empty(0, dtype=t.dtype).set_(memory, t.storage_offset(), t.shape, t.stride())


def check_rows(
    logits: Tensor, target: Tensor, weight: Tensor | None = None, given: RowOptions = TRANSFORMS[0]
) -> None:
    accumulation = torch.float64 if torch.float64 in (logits.dtype, target.dtype) else torch.float32
    dense = target.is_floating_point()
    bad = bad_rows(target, logits.shape[1], given.ignored)
    on_device = torch.tensor(given.scale, dtype=accumulation) if given.on_device else None
    scale, cap = 1.0 if given.on_device else given.scale, given.softcap
    options = (on_device, scale, cap, given.ignored, given.smoothing)

    targets = row_targets(target, weight, logits.shape[1], given.ignored)
    z = logits.double().movedim(1, -1).requires_grad_()
    p = targets.p.clone().requires_grad_() if dense else targets.p
    s = torch.full((*z.shape[:-1], 1), given.scale, dtype=torch.float64, requires_grad=True)
    exact = exact_planes(z, p, s, targets, given)

    planes, predicted = ops().cross_entropy_rows_forward(
        logits, target, weight, *options, given.entropy, True
    )
    expect_record(bad)
    assert_near(planes, wanted_planes(exact, planes, z, targets), scale=50, message="planes")
    check_predicted(predicted, z.detach(), targets, given)

    g = torch.randn(exact.shape).to(accumulation)
    if g[0].numel() > 1:
        g.view(len(g), -1)[:, -1] = 0  # leaves zeros, whatever the logits are
    if given.only is not None:
        g.zero_()[given.only] = 1
    looked_at = [LOG_SUM, TARGET_SUM, DOT, PICKED, ENTROPY][: len(g) - 2]
    active = (g[looked_at] != 0).any(0) & targets.counted
    upstream = g.double().requires_grad_()
    inputs = (z, s, p)[: 2 + dense]
    first = torch.autograd.grad(exact, inputs, upstream, create_graph=True)
    # An infinite logit that a target does not rule out: there is no saying what the scale gets.
    lost = (z.isinf() & (first[0] != 0)).any(-1)
    size = max(1.0, float(z.detach().nan_to_num(0, 0, 0).abs().max() / 6) if z.numel() else 0.0)

    def assert_gradients(
        given: Sequence[Tensor], expected: Sequence[Tensor], message: str, scale: float
    ) -> None:
        """To logits, target and scale; an empty one was not asked for."""
        for i, (actual, k) in enumerate(zip(given, (0, 2, 1), strict=True)):
            if actual.numel() == 0:
                continue
            actual = actual.unsqueeze(-1) if k == 1 else actual.movedim(1, -1)
            exact = expected[k].detach().where(~targets.bad.unsqueeze(-1), NAN)
            exact = exact.where(active.unsqueeze(-1), 0.0)
            if k == 1 or scale > 100:
                exact = exact.where(~lost.unsqueeze(-1), actual.double())
            name = ("logits", "target", "the scale")[i]
            assert_near(
                actual, exact, scale=scale * (10 * size if k == 1 else 1), message=f"{message} to {name}"
            )

    call = (g, planes, logits, target, weight, *options)
    for needs in ((True, dense, True), (True, False, False), (False, dense, not dense), (False, False, True)):
        results = ops().cross_entropy_rows_backward(*call, *needs)
        assert [x.numel() > 0 for x in results] == [need and logits.numel() > 0 for need in needs]
        assert_gradients(results, first, "gradient", 20)
    expect_record(bad)
    for need_scale in (True, False):
        replaced = twin(logits)
        in_place = (g, planes, replaced, target, weight, *options, dense, need_scale)
        results = ops().cross_entropy_rows_backward_(*in_place)
        assert_gradients((replaced, *results), first, "gradient in place", 20)

    v, tau = torch.randn(logits.shape).to(logits.dtype), torch.randn((), dtype=accumulation)
    along = v.double().movedim(1, -1)
    for tangent, of_scale in ((v, tau), (v, None), (None, tau)):
        total = 0.0 if tangent is None else (along * first[0]).sum()
        total = total if of_scale is None else total + (tau.double() * first[1]).sum()
        second = torch.autograd.grad(total, (upstream, *inputs), retain_graph=True, materialize_grads=True)
        dots, *results = ops().cross_entropy_rows_backward_backward(
            tangent, of_scale, *call, True, dense, True
        )
        expect_record(bad)
        wanted = wanted_planes(second[0], dots, z, targets, (TARGET_SUM, TARGET_WEIGHT))
        assert_near(dots, wanted.where(~lost, dots.double()), scale=200, message="row_dots")
        assert_gradients(results, second[1:], "second gradient", 200)


def wanted_planes(
    exact: Tensor, given: Tensor, z: Tensor, targets: RowTargets, constant: tuple[int, ...] = ()
) -> Tensor:
    """A bad class index makes its row NaN; of a row with a NaN its dot may be any number."""
    expected = exact.detach().clone()
    of_bad = [k for k in range(1, len(exact)) if k not in constant]
    expected[of_bad] = expected[of_bad].where(~targets.bad, NAN)
    any_number = z.isnan().any(-1) & targets.counted & ~targets.bad
    expected[DOT] = expected[DOT].where(~any_number, given[DOT].double())
    return expected


def check_predicted(predicted: Tensor, z: Tensor, targets: RowTargets, given: RowOptions) -> None:
    u = given.scale * z
    if given.softcap:
        u = given.softcap * torch.tanh(u / given.softcap)
    assert (predicted[~targets.counted] == -1).all()
    counted = targets.counted.expand(predicted.shape)
    exact = u.argmax(-1)
    if given.scale == 1 and not given.softcap:
        assert torch.equal(predicted[counted], exact[counted]), "predicted"
    at = [u.gather(-1, c.clamp_min(0).unsqueeze(-1)).squeeze(-1)[counted] for c in (predicted, exact)]
    assert_near(at[0], at[1], torch.float32, message="predicted")


def check_rows_of_kind(
    kind: str, logits: Tensor, given: RowOptions, other: torch.dtype | None = None, offset: int = 0
) -> None:
    shape, dtype = tuple(logits.shape), logits.dtype
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    weight = shifted(torch.rand(1, shape[1], dtype=accumulation) + 0.5, offset)[0]
    if kind == "probabilities":
        p = shifted(probabilities(shape, other or dtype), offset)
        check_rows(logits, p, weight, given._replace(smoothing=0.1))
        check_rows(logits, p, None, given)
    elif kind == "smoothed":
        check_rows(logits, indices(shape), weight, given._replace(smoothing=0.1))
        check_rows(logits, indices(shape).int(), None, given._replace(smoothing=0.2))
    else:
        check_rows(logits, indices(shape), weight if kind == "weighted" else None, given)


def row_functions(dtype: torch.dtype) -> Iterator[Case]:
    transforms = itertools.cycle(TRANSFORMS)
    for way, shape in WAYS.items():
        for kind in KINDS:
            for given in TRANSFORMS if way in ("warp", "two slices", "tiles") else [next(transforms)]:
                yield (
                    f"row functions, {way}, {kind}, {given}",
                    lambda s=shape, k=kind, g=given: check_rows_of_kind(k, drawn(s, dtype), g),
                )
        next(transforms)
    shapes = {"warp": (15, 70), "block": (5, 520), "tiles": (2, 11, 3, 5), "one row": (1, 5)}
    for way, shape in shapes.items():
        yield (
            f"row functions, two dtypes, {way}",
            lambda s=shape: check_rows_of_kind("probabilities", drawn(s, dtype), TRANSFORMS[3], OTHER[dtype]),
        )
    for classes in (9, 530):
        for kind in KINDS:
            yield (
                f"row functions, classes apart, {classes}, {kind}",
                lambda c=classes, k=kind: check_rows_of_kind(k, drawn((c, 5), dtype).t(), TRANSFORMS[3]),
            )


def row_remainders(dtype: torch.dtype) -> Iterator[Case]:
    """Rows that begin and end at any element of a pack."""
    width = 16 // dtype.itemsize

    def check(classes: int, offset: int, gap: int, kind: str) -> None:
        logits = shifted(drawn((3, classes), dtype), offset, gap)
        check_rows_of_kind(kind, logits, TRANSFORMS[1 + 2 * (classes % 2)], offset=offset)

    for offset in range(width):
        for remainder in range(width):
            kind = KINDS[(offset + remainder) % len(KINDS)]
            classes = (remainder + 1, 300 + remainder, 520 + 8 * width + remainder)[(offset + remainder) % 3]
            gap = width + (-classes) % width if remainder % 2 else 1
            yield (
                f"row functions, offset {offset} of {width}, {classes} classes, gap {gap}, {kind}",
                lambda c=classes, o=offset, g=gap, k=kind: check(c, o, g, k),
            )
    for kind in KINDS:
        for classes in (33, 300, 2600):
            yield (
                f"row functions, aligned rows, a pack apart, {classes} classes, {kind}",
                lambda c=classes, k=kind: check(c + (-c) % width, 0, width, k),
            )


def row_phases(dtype: torch.dtype) -> Iterator[Case]:
    def check(kind: str, logits: Tensor, offset: int) -> None:
        check_rows_of_kind(kind, logits, TRANSFORMS[1], offset=offset)

    for name, case in in_phases(dtype, ("warp", "block"), check):
        yield f"row functions, {name}", case


def row_edges(dtype: torch.dtype) -> Iterator[Case]:
    def infinite(shape: tuple[int, ...], given: RowOptions) -> None:
        """Rows of -inf alone, at the start, at the end, all but the target; two NaN; infinity."""
        logits, target = drawn((7, *shape[1:]), dtype), indices((7, *shape[1:]))
        target[1] = target[0]
        logits[0] = -INF
        logits[1, 0] = -INF
        logits[1, 1:-1] = -INF if shape[1] > 2 else 0
        logits[2, : shape[1] // 2] = -INF
        logits[3, shape[1] // 2 :] = -INF
        logits[4, shape[1] // 3] = NAN
        logits[4, -1] = NAN
        logits[5, shape[1] // 2] = INF
        check_rows(logits, target, None, given)

    def bad(shape: tuple[int, ...], given: RowOptions) -> None:
        target = indices(shape)
        flat = target.view(-1)
        flat[flat.numel() // 2] = shape[1]
        flat[0] = -2
        check_rows(drawn(shape, dtype), target, None, given)

    def ignored(shape: tuple[int, ...], given: RowOptions) -> None:
        """What is in an ignored row, or in one that no gradient reaches, reaches nothing."""
        logits, target = drawn(shape, dtype), indices(shape)
        target[0] = 255
        logits[0] = NAN
        check_rows(logits, target, None, given._replace(ignored=255))
        check_rows(logits, torch.full_like(target, 255), None, given._replace(ignored=255))

    shapes = {"short rows": (9, 5), **FEW_ROWS, "tiles": (6, 5, 3, 3), "tiles, lanes": (6, 40, 2, 5)}
    for i, (way, shape) in enumerate(shapes.items()):
        for j, smoothing in enumerate((0.0, 0.1)):
            for cap in (0.0, 5.0):
                given = RowOptions(softcap=cap, entropy=(i + j) % 2 == 0, smoothing=smoothing)
                suffix = f"{way}, {given}"
                yield f"row functions, -inf, {suffix}", lambda s=shape, g=given: infinite(s, g)
            yield f"row functions, bad target, {suffix}", lambda s=shape, g=given: bad(s, g)
            yield f"row functions, ignored, {suffix}", lambda s=shape, g=given: ignored(s, g)
    for shape in ((0, 5), (0, 5, 3)):
        yield (
            f"row functions, no rows, {shape}",
            lambda s=shape: check_rows(
                drawn(s, dtype), torch.zeros(s[0], *s[2:], dtype=torch.int64), None, TRANSFORMS[3]
            ),
        )

    def no_classes() -> None:
        logits = drawn((3, 0), dtype)
        planes, predicted = ops().cross_entropy_rows_forward(
            logits, logits, None, None, 1.0, 2.0, IGNORED, 0.0, True, True
        )
        assert_near(planes, torch.zeros(7, 3), message="planes")
        assert (predicted == -1).all()
        call = (torch.ones_like(planes), planes, logits, logits, None, None, 1.0, 2.0, IGNORED, 0.0)
        results = ops().cross_entropy_rows_backward(*call, True, True, True)
        assert_near(results[2], torch.zeros(3), message="grad_scale")

    yield "row functions, no classes", no_classes

    def descending() -> None:
        """The maximum is raised, or never again, and far: what was summed up before counts for nothing."""
        for classes in (5, 37, 300, 2600):
            rising = torch.linspace(-60, 60, classes)
            logits = torch.stack([rising, rising.flip(0)]).to(dtype)
            given = RowOptions(entropy=True)
            check_rows_of_kind("probabilities", logits, given)
            tiled = logits.view(2, classes, 1, 1).expand(2, classes, 3, 3).contiguous()
            check_rows_of_kind("smoothed", tiled, given)

    yield "row functions, rising and falling logits", descending
    for way, shape in {"short rows": (9, 5), **FEW_ROWS, "tiles": (6, 5, 3, 3)}.items():
        for plane in (LOG_SUM, TARGET_SUM, DOT, PICKED, ENTROPY):
            given = RowOptions(entropy=True, only=plane)
            yield (
                f"row functions, {way}, {given}",
                lambda s=shape, g=given: check_rows_of_kind("smoothed", drawn(s, dtype), g),
            )
    # Beside where rows are cut into slices: a class index of another slice is no class of this one.
    cuts = torch.tensor([638, 639, 640, 1278, 1279, 1280])
    yield (
        "row functions, targets beside the cuts",
        lambda: check_rows(drawn((6, 1800), dtype), cuts, None, TRANSFORMS[1]),
    )
    for classes in (7, 40, 300, 1800, 20_483):
        yield f"row functions, the largest of {classes}", lambda c=classes: every_largest(c, dtype)


def every_largest(classes: int, dtype: torch.dtype) -> None:
    """The first of two that are alike, and of two NaN, is what argmax finds, wherever the two are."""
    places = sorted({0, classes - 1, *range(0, classes, max(1, classes // 37)), *range(511, classes, 512)})
    firsts = torch.tensor(places)
    for value in (9.0, NAN, INF):
        logits = torch.randn(len(places), classes).to(dtype)
        logits[:, 0] = 8  # its warp's largest, and first of all
        seconds = (firsts + torch.randint(1, classes, firsts.shape)).clamp_max(classes - 1)
        for at in (firsts, seconds):
            logits.scatter_(1, at.unsqueeze(1), value)
        for layout in (logits, logits.view(1, -1, classes).transpose(1, 2).contiguous()):
            rows, predicted = ops().cross_entropy_rows_forward(
                layout, torch.zeros_like(firsts).view(layout.shape[0], *layout.shape[2:]), None, None,
                1.0, 0.0, IGNORED, 0.0, False, True,
            )  # fmt: skip
            del rows
            assert torch.equal(predicted.view(-1), firsts), f"the largest is {value}"


# --------------------------------------------------------------------------------------------------
# Mean squared error


def check_mse(
    x: Tensor,
    y: Tensor,
    weight: Tensor | None = None,
    reductions: tuple[int, ...] = (NONE, MEAN),
    mask: Tensor | None = None,
    offset: int = 0,
) -> None:
    """With a mask, what it leaves out becomes NaN in the input, in its tangent and in the gradient. `offset`:
    where upstream gradients begin."""
    counts = torch.ones(x.shape, dtype=torch.bool) if mask is None else mask.expand(x.shape)
    mask = None if mask is None else counts
    w = torch.ones(x.shape, dtype=torch.float64) if weight is None else weight.double().expand(x.shape)
    w = torch.where(counts, w, 0.0)
    dx, dy = torch.randn(x.shape).to(x.dtype), torch.randn(y.shape).to(y.dtype)
    difference = torch.where(counts, x.double() - y.double(), 0.0)
    losses = w * difference.square()
    derivatives = 2 * w * difference * (dx.double() - dy.double())
    x.masked_fill_(~counts, NAN)
    dx.masked_fill_(~counts, NAN)
    for reduction in reductions:
        divisor = w.sum()
        pick = {NONE: lambda t: t, MEAN: lambda t, d=divisor: t.sum() / d, SUM: torch.Tensor.sum}[reduction]
        loss, normalizer = ops().mse_forward(x, y, weight, mask, reduction, None)
        assert_near(loss, pick(losses), scale=10, message="loss")
        if reduction != NONE:
            assert_near(normalizer, divisor, torch.float32, message="normalizer")
        derivative, _ = ops().mse_jvp(x, y, weight, mask, dx, dy, reduction, None)
        assert_near(derivative, pick(derivatives), scale=100, message="jvp")
        upstream = torch.randn(offset + x.numel() if reduction == NONE else ()).to(x.dtype)
        if reduction == NONE:
            upstream = upstream[offset:].view(x.shape)
        expected = 2 * upstream.double() * w * difference
        if reduction == MEAN:
            expected = torch.where(counts, expected / divisor, 0.0)
        if reduction == NONE:
            upstream.masked_fill_(~counts, NAN)
        divide = normalizer if reduction == MEAN else None
        for need in ((True, True), (True, False), (False, True)):
            given = ops().mse_backward(upstream, x, y, weight, mask, divide, *need)
            for gradient, wanted, sign in zip(given, need, (1, -1), strict=True):
                if wanted:
                    assert_near(gradient, sign * expected, scale=20, message="gradient")


def mse(dtype: torch.dtype) -> Iterator[Case]:
    width = 16 // dtype.itemsize
    other = OTHER[dtype]

    def flat(size: int, *offsets: int, second: torch.dtype = dtype, **more: Any) -> None:
        x, y, w = (shifted((torch.randn(1, size) / 2).to(dtype), k)[0] for k in offsets)
        check_mse(x, y.to(second), **more)
        check_mse(x, y.to(second), w.abs() + 0.5, **more)

    for offset in range(width):
        for size in (*range(1, 2 * width + 1), 256 * width + 3):
            yield f"mse of {size} from {offset} of {width}", lambda s=size, o=offset: flat(s, o, o, o)
    for size in (8191, 8192, 8193, 30_001):
        yield f"mse of {size}", lambda s=size: flat(s, 0, 0, 0)
        yield f"mse of {size} from 1", lambda s=size: flat(s, 1, 1, 1, reductions=(SUM,))
    for offset in range(1, width):
        for size in (1, width + 1, 300 * width - offset):
            yield (
                f"mse of {size}, shifted by {offset} of {width}",
                lambda s=size, o=offset: flat(s, o, 0, -o % width),
            )
    # All against what is written, which begins at a boundary, and against the input, where nothing is.
    for x in range(2 * width):
        size, y = 35 * width - 2 + x, (2 * x + x // width) % width
        w, grad = (x // width - x) % width, 3 * x % width
        yield (
            f"mse of {size} in phases {x}, {y}, {w} and {grad} of {width}",
            lambda s=size, of=(x, y, w), g=grad: flat(s, *of, offset=g),
        )
    for size in range(8192 - 1, 8192 + 2 * width + 2):  # a second block of a few elements, or of none
        yield f"shifted mse of {size}", lambda s=size: flat(s, 1, 1, 0, reductions=(SUM,))
    yield "shifted mse of several blocks", lambda: flat(25_000, 1, 0, 1, reductions=(MEAN,))
    yield "mse of two dtypes", lambda: flat(700, 0, 0, 0, second=other)
    yield (
        "mse with one weight for all",
        lambda: check_mse(
            torch.randn(515).to(dtype), torch.randn(515).to(dtype), torch.tensor(0.5, dtype=dtype).expand(515)
        ),
    )

    def strided() -> None:
        x, y = torch.randn(37, 30).to(dtype), torch.randn(30, 37).to(dtype)
        check_mse(x, y.t())
        check_mse(x[:, ::2], y.t()[:, 1::2])
        check_mse(x, y.t(), torch.rand(37, 1).to(dtype).expand(37, 30))

    yield "mse of strided tensors", strided

    def masked(shape: tuple[int, ...], of_mask: tuple[int, ...], *offsets: int, **more: Any) -> None:
        """A mask that begins at any byte, full or broadcast, without and with weights."""
        for weighted in (False, True):
            x, y = (shifted(torch.randn(shape).to(dtype), offset) for offset in offsets[:2])
            chosen = torch.rand(of_mask) < 0.6
            memory = torch.ones(offsets[2] + chosen.numel(), dtype=torch.bool)
            mask = memory[offsets[2] :].view(of_mask).copy_(chosen)
            weight = shifted(torch.rand(shape).to(dtype) + 0.5, offsets[0]) if weighted else None
            check_mse(x, y, weight, mask=mask, **more)

    for offset in range(width):
        for size in (1, width, 2 * width + 1, 256 * width + 3):
            yield (
                f"masked mse of {size} from {offset} of {width}",
                lambda s=size, o=offset: masked((1, s), (1, s), o, o, (o * 3 + s) % 8),
            )
        line = (1, 33 * width)
        for start in (offset, width - offset):  # packs of elements and of bytes that begin together, or not
            yield (
                f"mse from {offset} of {width}, its mask from {start}",
                lambda s=line, o=offset, m=start: masked(s, s, o, o, m),
            )
    for rows, columns in ((67, 2), (67, 3), (67, 5), (13, width), (13, 2 * width + 1), (5, 2000)):
        yield (
            f"mse with a mask of {rows} rows of {columns}",
            lambda r=rows, c=columns: masked((r, c), (r, 1), 0, 0, 0),
        )
        yield (
            f"mse with a mask of {columns} columns, {rows} rows",
            lambda r=rows, c=columns: masked((r, c), (1, c), 1, 1, 1),
        )
    yield "mse with a mask of three dimensions", lambda: masked((3, 5, 7, 4), (3, 1, 7, 1), 0, 0, 0)
    several = (1, 30_001)
    yield "masked mse of several blocks", lambda: masked(several, several, 0, 0, 0, reductions=(MEAN,))
    yield "masked mse, shifted", lambda: masked((7, 100), (7, 1), 0, 1, 0)
    for x in range(2 * width):
        line, y = (1, 35 * width - 2 + x), (2 * x + x // width) % width
        yield (
            f"mse from {x} and {y} of {width}, its mask from {3 * x % width}",
            lambda s=line, of=(x, y, 3 * x % width): masked(s, s, *of),
        )
    yield (
        "masked mse of two dtypes",
        lambda: check_mse(
            torch.randn(700).to(dtype), torch.randn(700).to(other), mask=torch.arange(700) % 3 > 0
        ),
    )
    yield (
        "mse with a strided mask",
        lambda: check_mse(
            torch.randn(37, 30).to(dtype), torch.randn(37, 30).to(dtype), mask=(torch.rand(30, 37) < 0.5).t()
        ),
    )

    yield (
        "mse with every other byte of a mask",
        lambda: check_mse(
            torch.randn(700).to(dtype), torch.randn(700).to(dtype), mask=(torch.rand(1400) < 0.5)[::2]
        ),
    )

    def any_bytes() -> None:
        """A byte of a mask is true unless it is 0, whatever else it is."""
        mask = torch.tensor([0, 1, 2, 0, 128, 255, 0] * 100, dtype=torch.uint8).view(torch.bool)
        x, y = torch.randn(700).to(dtype), torch.randn(700).to(dtype)
        check_mse(x, y, mask=mask)
        check_mse(torch.randn(700).to(dtype), y, mask=mask[:1].expand(700))

    yield "mse with a mask of any bytes", any_bytes
    yield (
        "mse of which nothing counts",
        lambda: check_mse(
            torch.randn(515).to(dtype), torch.randn(515).to(dtype), mask=torch.zeros(515, dtype=torch.bool)
        ),
    )
    yield "mse of nothing", lambda: check_mse(torch.empty(0, dtype=dtype), torch.empty(0, dtype=dtype))


# --------------------------------------------------------------------------------------------------


def shared(dtype: torch.dtype) -> Iterator[Case]:
    """What threads share: rows, sums, the record of a bad class index. For TSan, which is slow."""
    for way, shape in {**WAYS, **FEW_ROWS}.items():
        if way in ("block", "block, two steps", "more slices than lanes"):
            continue
        yield f"{way}, shared", lambda s=shape: check_kind("index", drawn(s, dtype), reductions=(MEAN,))
        yield (
            f"{way}, shared, weights of classes",
            lambda s=shape: check_cross_entropy(drawn(s, dtype), probabilities(s, dtype), reductions=(MEAN,)),
        )
        yield (
            f"row functions, {way}, shared",
            lambda s=shape: check_rows_of_kind("weighted", drawn(s, dtype), TRANSFORMS[3]),
        )
    yield (
        "more rows than a chunk, shared",
        lambda: check_cross_entropy(drawn((100, 513), dtype), indices((100, 513)), reductions=(MEAN,)),
    )
    target = torch.arange(-9, 60)
    for classes in (7, 37, 300):
        yield (
            f"bad targets of {classes}, all at once",
            lambda c=classes: check_cross_entropy(drawn((69, c), dtype), target, reductions=(NONE,)),
        )
        yield (
            f"row functions, bad targets of {classes}, all at once",
            lambda c=classes: check_rows(drawn((69, c), dtype), target, None, TRANSFORMS[1]),
        )
    yield (
        "bad targets, side by side",
        lambda: check_cross_entropy(drawn((3, 40, 23), dtype), target.view(3, 23), reductions=(NONE,)),
    )
    yield (
        "mse of several blocks",
        lambda: check_mse(torch.randn(9001).to(dtype), torch.randn(9001).to(dtype), reductions=(SUM,)),
    )
    yield (
        "masked mse of several blocks, shared",
        lambda: check_mse(
            *torch.randn(2, 90, 100).to(dtype), reductions=(SUM,), mask=torch.rand(90, 1) < 0.5
        ),
    )


GROUPS = {
    f.__name__: f
    for f in (
        ways,
        mixed,
        every_remainder,
        phases,
        edges,
        row_functions,
        row_remainders,
        row_phases,
        row_edges,
        shared,
        mse,
    )
}


def failures(dtype: torch.dtype, groups: Sequence[str], only: str = "") -> Iterator[str]:
    """Of the cases, in words."""
    for name, case in (case for group in groups for case in GROUPS[group](dtype)):
        if only not in name:
            continue
        torch.manual_seed(1)
        try:
            case()
        except Exception:
            with contextlib.suppress(Exception):
                ops().check_async_errors()  # or the next case would find this one's
            yield f"{name}: {traceback.format_exc(limit=-3)}"


def fill_fresh_memory() -> None:
    """With NaN: what a kernel leaves out must not be right by chance, or left by the call before."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("library", type=Path)
    parser.add_argument("dtype", choices=[str(d).removeprefix("torch.") for d in OTHER])
    parser.add_argument("--order", type=int, nargs="+", choices=ORDERS, default=[ORDERS[0]])
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--only", default="", help="cases with this in their names")
    parser.add_argument("--first", action="store_true", help="stop at the first failure")
    given = parser.parse_args()
    torch.set_num_threads(1)
    fill_fresh_memory()
    torch.ops.load_library(given.library)
    failed = False
    for order in given.order:
        Emulator(given.library).set_order(order)
        for failure in failures(getattr(torch, given.dtype), given.groups, given.only):
            print(f"FAILED in order {order}: {failure}", flush=True)
            failed = True
            if given.first:
                sys.exit(1)
    sys.exit(failed)


if __name__ == "__main__":
    main()
