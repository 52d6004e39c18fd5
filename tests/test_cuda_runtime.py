"""What a GPU has around the kernels: streams, graphs, devices, memory, autocast, and tensors of its size."""

from __future__ import annotations

import fcntl
import gc
import itertools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from contract import LOSSES, MSE, REDUCTIONS, VARIANTS, Call, Loss, Variant, value_and_gradients
from devices import gpu_only
from tolerances import TOLERANCES, assert_near
from torch import Tensor

import lossops
from lossops.cross_entropy import cross_entropy_reference

pytestmark = [pytest.mark.usefixtures("device"), gpu_only]

each_variant = pytest.mark.parametrize("variant", VARIANTS, ids=str)
each_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)

GIB = 1 << 30


@pytest.fixture(autouse=True)
def no_old_graphs(request: pytest.FixtureRequest) -> None:
    """A graph that is collected while another one is captured makes that capture invalid."""
    if "graph" in request.node.name:
        gc.collect()


@pytest.fixture
def gpu_memory() -> Iterator[Callable[[float], None]]:
    """Skips the test where fewer GiB are free. Large tests wait for one another, in all processes."""

    def require(gib: float) -> None:
        free, _ = torch.cuda.mem_get_info()
        if free < gib * GIB:
            pytest.skip(f"needs {gib:.0f} GiB of GPU memory")

    with open(Path(tempfile.gettempdir()) / "lossops-gpu-memory", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        torch.cuda.empty_cache()
        yield require
        torch.cuda.empty_cache()


# --------------------------------------------------------------------------------------------------
# Streams, graphs, devices


@each_variant
def test_streams(variant: Variant) -> None:
    """Work goes to the current stream: it sees what that stream wrote just before, and nothing waits."""
    call = variant.make((512, 3000), torch.float32)
    function = call.bind(variant.loss.function)
    expected = value_and_gradients(function, call.leaves())
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    results = []
    for stream in streams:
        stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream):
            tensors = tuple(torch.full_like(t, torch.nan) for t in call.tensors)
            torch.cuda._sleep(20_000_000)  # the loss must not overtake the copies
            for t, source in zip(tensors, call.tensors, strict=True):
                t.copy_(source)
            results.append(value_and_gradients(function, tuple(t.requires_grad_() for t in tensors)))
    torch.cuda.synchronize()
    for result in results:
        assert all(map(torch.equal, result, expected))


@each_variant
@each_reduction
@pytest.mark.parametrize("shape", [(300, 7), (64, 300), (3, 40_000), (2, 19, 15, 17)], ids=str)
def test_graphs(variant: Variant, reduction: str, shape: tuple[int, ...]) -> None:
    """Captured forward and backward, replayed with other numbers in the same memory."""
    first, second = variant.make(shape, torch.float32), variant.make(shape, torch.float32)
    second = Call(second.tensors, second.fixed, first.options)
    static = Call(first.leaves(), tuple(t.clone() for t in first.fixed), first.options)
    function = static.bind(variant.loss.function, reduction=reduction)
    upstream = torch.ones_like(function(*static.tensors).detach())
    stream = torch.cuda.Stream()  # a warm-up on a stream of its own, as torch asks for
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        value_and_gradients(function, static.tensors, upstream)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = value_and_gradients(function, static.tensors, upstream)
    for call in (second, first, second):
        with torch.no_grad():
            for mine, theirs in zip(
                (*static.tensors, *static.fixed), (*call.tensors, *call.fixed), strict=True
            ):
                mine.copy_(theirs)
        graph.replay()
        expected = value_and_gradients(
            call.bind(variant.loss.function, reduction=reduction), call.leaves(), upstream
        )
        assert all(map(torch.equal, captured, expected))


@each_reduction
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_graph_of_the_linear_head(dtype: torch.dtype, reduction: str) -> None:
    x, weight = (torch.randn(n, 64, dtype=dtype, requires_grad=True) for n in (300, 1000))
    target = torch.randint(1000, (300,))

    def function(*leaves: Tensor) -> Tensor:
        return lossops.linear_cross_entropy(*leaves, target, reduction=reduction, chunk_size=128)

    upstream = torch.ones_like(function(x, weight).detach())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        value_and_gradients(function, (x, weight), upstream)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = value_and_gradients(function, (x, weight), upstream)
    for ignored in (0, 100):
        target.random_(1000)[:ignored] = -100
        with torch.no_grad():
            x.normal_()
        graph.replay()
        for a, e in zip(captured, value_and_gradients(function, (x, weight), upstream), strict=True):
            torch.testing.assert_close(a, e)


def test_a_graph_records_bad_targets() -> None:
    logits, target = torch.randn(40, 9), torch.zeros(40, dtype=torch.long)
    lossops.cross_entropy(logits, target)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = lossops.cross_entropy(logits, target)
    graph.replay()
    lossops.check_async_errors()
    assert loss.isfinite()
    target[17] = 9
    graph.replay()
    with pytest.raises(IndexError, match="Target 9 is out of bounds: row 17 "):
        lossops.check_async_errors()
    assert loss.isnan()


@each_variant
def test_make_graphed_callables(variant: Variant) -> None:
    call = variant.make((64, 30), torch.float32)
    function = call.bind(variant.loss.function)
    graphed = torch.cuda.make_graphed_callables(function, call.leaves())
    other = variant.make((64, 30), torch.float32).leaves()
    for a, e in zip(value_and_gradients(graphed, other), value_and_gradients(function, other), strict=True):
        assert torch.equal(a, e)


@each_variant
def test_another_device_than_the_current_one(variant: Variant) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    call = variant.make((64, 300), torch.float32)
    expected = value_and_gradients(call.bind(variant.loss.function), call.leaves())
    there = Call(
        tuple(t.to("cuda:1") for t in call.tensors),
        tuple(t.to("cuda:1") for t in call.fixed),
        {k: v.to("cuda:1") if isinstance(v, Tensor) else v for k, v in call.options.items()},
    )
    assert torch.cuda.current_device() == 0
    results = value_and_gradients(there.bind(variant.loss.function), there.leaves())
    assert torch.cuda.current_device() == 0
    for a, e in zip(results, expected, strict=True):
        assert a.device == torch.device("cuda:1")
        assert torch.equal(a.to("cuda:0"), e)
    with pytest.raises(RuntimeError, match="expected target on"):
        variant.loss.function(there.tensors[0], *(call.tensors[1:] or call.fixed))


def test_bad_targets_of_another_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    lossops.cross_entropy(torch.randn(3, 5, device="cuda:1"), torch.tensor([0, 5, 1], device="cuda:1"))
    with pytest.raises(IndexError, match="cross_entropy on cuda:1: Target 5 "):
        lossops.check_async_errors()


@each_variant
@each_reduction
def test_nothing_waits_for_the_gpu(variant: Variant, reduction: str) -> None:
    calls = [variant.make(shape, torch.float32) for shape in ((64, 7), (64, 3000), (2, 40_000), (2, 5, 9, 9))]
    for call in calls:
        function = call.bind(variant.loss.function, reduction=reduction)
        leaves = call.leaves()
        upstream = torch.ones_like(function(*leaves).detach())
        try:
            torch.cuda.set_sync_debug_mode("error")
            value_and_gradients(function, leaves, upstream)
            gradients = torch.autograd.grad(function(*leaves), leaves, upstream, create_graph=True)
            torch.autograd.grad(gradients, leaves, [torch.ones_like(g) for g in gradients])
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_cpu_and_gpu_tensors_together() -> None:
    x, y = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    for arguments, options in (
        ((x.cpu(), y), {}),
        ((x, y.cpu()), {}),
        ((x, y), {"weight": torch.rand(5).cpu()}),
        ((x, x.softmax(1).cpu()), {}),
    ):
        with pytest.raises(RuntimeError, match=r"expected \w+ on (cpu|cuda:0), got (cpu|cuda:0)"):
            lossops.cross_entropy(*arguments, **options)
    with pytest.raises(RuntimeError, match="expected target on"):
        lossops.mse_loss(x, x.cpu())


# --------------------------------------------------------------------------------------------------
# Memory


def peak_beyond(function: Callable[[], object]) -> int:
    """Bytes that are allocated at once while it runs, beyond what was there."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return torch.cuda.max_memory_allocated() - before


@each_variant
@pytest.mark.parametrize("shape", [(4096, 4000), (64, 100_000), (4, 21, 300, 300), (800_000, 10)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_memory_of_the_inputs_size(variant: Variant, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The forward pass takes a few numbers a row; the backward its gradients and no more."""
    call = variant.make(shape, dtype)
    leaves = call.leaves()
    size = leaves[0].nbytes
    classes = 1 if variant.loss is MSE else shape[1]
    small = 4 << 20  # the allocator's own rounding too
    if variant.loss is not MSE:
        # Of the family, the planes and what the row's loss is made of.
        numbers = 18 if variant.id.endswith("family") else 3
        small += leaves[0].numel() // classes * numbers * 4 + 4 * 4 * classes
    function = call.bind(variant.loss.function)
    function(*leaves)
    losses: list[Tensor] = []
    assert peak_beyond(lambda: losses.append(function(*leaves))) <= small
    assert peak_beyond(losses[0].backward) <= len(leaves) * size + small


# --------------------------------------------------------------------------------------------------
# Mixed precision, compilers


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_training_step_under_autocast(dtype: torch.dtype) -> None:
    """Scaled gradients, as torch's own loss has them, and the same step of the optimizer."""
    x, target = torch.randn(256, 64), torch.randint(0, 1000, (256,))
    steps = []
    for function in (lossops.cross_entropy, F.cross_entropy):
        torch.manual_seed(5)
        model = torch.nn.Linear(64, 1000)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**12)
        for _ in range(3):
            with torch.autocast("cuda", dtype=dtype):
                loss = function(model(x), target)
            assert loss.dtype == torch.float32
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert scaler.get_scale() == 2.0**12
        steps.append((loss.detach(), model.weight.detach()))
    for ours, torchs in zip(*steps, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-3, atol=1e-5)


def test_a_scaler_skips_the_step_of_a_bad_target() -> None:
    """NaN in the gradients is what a GradScaler looks for."""
    x = torch.randn(8, 16)
    model = torch.nn.Linear(16, 10)
    before = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cuda")
    scaler.scale(lossops.cross_entropy(model(x), torch.full((8,), 10))).backward()
    scaler.step(optimizer)
    assert torch.equal(model.weight, before)
    with pytest.raises(IndexError, match="Target 10 "):
        lossops.check_async_errors()


@each_loss
def test_compiled_training_step(loss: Loss) -> None:
    torch._dynamo.reset()
    model = torch.nn.Linear(64, 32)
    x = torch.randn(128, 64)
    target = torch.randn(128, 32) if loss is MSE else torch.randint(0, 32, (128,))

    def step(x: Tensor, target: Tensor) -> Tensor:
        return loss.function(model(x), target)

    gradients = []
    for function in (torch.compile(step, fullgraph=True), step):
        model.zero_grad()
        function(x, target).backward()
        gradients.append(model.weight.grad.clone())
    assert_near(*gradients)


@each_loss
def test_compiled_with_graphs(loss: Loss) -> None:
    """mode="reduce-overhead": Inductor captures forward and backward."""
    torch._dynamo.reset()
    target = torch.randn(64, 32) if loss is MSE else torch.randint(0, 32, (64,))
    compiled = torch.compile(lambda x: loss.function(2 * x, target), fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        x = torch.randn(64, 32, requires_grad=True)
        torch.compiler.cudagraph_mark_step_begin()
        value = compiled(x)
        value.backward()
        expected = value_and_gradients(lambda x: loss.function(2 * x, target), (x,))
        for a, e in zip((value.detach(), x.grad), expected, strict=True):
            assert_near(a, e)


# --------------------------------------------------------------------------------------------------
# Sizes


@each_variant
@pytest.mark.parametrize(
    "shape", [(8192, 32_000), (131_072, 1000), (16, 150, 512, 512), (8_000_000, 10), (8, 1_000_000)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_agrees_with_torch_at_full_size(
    variant: Variant, shape: tuple[int, ...], dtype: torch.dtype, gpu_memory: Callable[[float], None]
) -> None:
    """Against torch's own kernels in float32, which take the memory of several copies."""
    size = torch.Size(shape).numel()
    gpu_memory(size * 4 * 16 / GIB)
    call = variant.make(shape, dtype)
    wide = Call(
        tuple(t.float() for t in call.tensors),
        call.fixed,
        {
            k: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v
            for k, v in call.options.items()
        },
    )
    ours = value_and_gradients(call.bind(variant.loss.function), call.leaves())
    torchs = value_and_gradients(wide.bind(variant.torch_function), wide.leaves())
    rtol, _ = TOLERANCES[dtype]
    for a, e in zip(ours, torchs, strict=True):
        # torch adds up in float32, and a gradient is a difference of terms of the largest one's size, each
        # with the rounding of a logarithm of up to 16.
        torch.testing.assert_close(a.float(), e, rtol=rtol + 1e-4, atol=4e-6 * e.abs().max().item())


def rows_to_look_at(rows: int, elements: int) -> list[int]:
    """The first and last, and those about where a 32-bit index of elements ends."""
    edge = (2**31) // elements
    return sorted({0, 1, *(r for k in (-1, 0, 1) for r in (edge + k, 2 * edge + k) if r < rows), rows - 1})


@pytest.mark.parametrize("shape", [(70_000, 32_000), (1_100_000_000, 2), (3, 800_000_000)], ids=str)
def test_rows_beyond_32_bits(shape: tuple[int, int], gpu_memory: Callable[[float], None]) -> None:
    rows, classes = shape
    gpu_memory((4 * rows * classes + 24 * rows + 20 * classes) / GIB + 1)
    logits = torch.empty(shape, dtype=torch.bfloat16).normal_().requires_grad_()
    target = torch.randint(0, classes, (rows,))
    loss = lossops.cross_entropy(logits, target, reduction="none")
    loss.sum().backward()
    for row in rows_to_look_at(rows, classes):
        z = logits.detach()[row].float()
        lse = z.logsumexp(0)
        assert_near(loss[row].detach(), (lse - z[target[row]]).double(), torch.bfloat16)
        expected = (z - lse).exp()
        expected[target[row]] -= 1
        torch.testing.assert_close(logits.grad[row].float(), expected, rtol=2**-7, atol=4e-7 / classes)


def test_positions_beyond_32_bits(gpu_memory: Callable[[float], None]) -> None:
    """Classes so far apart that their strides, too, need 64 bits."""
    shape = (1, 3, 800_000_000)
    gpu_memory(20)
    logits = torch.empty(shape, dtype=torch.bfloat16).normal_().requires_grad_()
    target = torch.randint(0, 3, (1, shape[2]), dtype=torch.uint8)
    lossops.cross_entropy(logits, target, reduction="sum").backward()
    for start in (0, 2**31 - 2 * shape[2] - 500, shape[2] - 1000):
        part = slice(start, start + 1000)
        z = logits.detach()[..., part].float()
        expected = z.softmax(1) - F.one_hot(target[:, part].long(), 3).movedim(-1, 1)
        torch.testing.assert_close(logits.grad[..., part].float(), expected, rtol=2**-7, atol=2e-7)


def test_mse_beyond_32_bits(gpu_memory: Callable[[float], None]) -> None:
    size = 2**31 + 12_345
    gpu_memory(4 * 2 * size / GIB + 1)
    x = torch.ones(size, dtype=torch.bfloat16)
    y = torch.zeros(size, dtype=torch.bfloat16)
    y[-1], y[2**31] = 3.0, -1.0
    x.requires_grad_()
    loss = lossops.mse_loss(x, y, reduction="sum")
    assert loss.item() == torch.tensor(float(size - 2 + 4 + 4)).bfloat16().item()
    loss.backward()
    assert x.grad[[0, 2**31 - 1, 2**31, 2**31 + 1, -2, -1]].tolist() == [2, 2, 4, 2, 2, -4]


def test_a_row_of_every_length_up_to_a_page() -> None:
    """Every number of classes to 2100 and many beyond, as no emulator could."""
    for classes in itertools.chain(range(1, 2100), range(2100, 20_000, 97)):
        logits = torch.randn(3, classes)
        target = torch.randint(0, classes, (3,))
        leaf, exact = logits.requires_grad_(), logits.detach().double().requires_grad_()
        ours = value_and_gradients(lambda z, y=target: lossops.cross_entropy(z, y), (leaf,))
        expected = value_and_gradients(lambda z, y=target: cross_entropy_reference(z, y), (exact,))
        for a, e in zip(ours, expected, strict=True):
            assert_near(a, e, message=str(classes))
