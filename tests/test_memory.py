"""The pages that the CPU keeps for the next gradient: whose they are, and when they go."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch
from devices import cpu_only
from torch import Tensor

import lossops

pytestmark = [cpu_only, pytest.mark.usefixtures("device")]

LARGE = (1100, 1000)  # 4.4 MB: on pages of its own


def keeps_pages() -> bool:
    """Not in a build for sanitizers, nor where Linux has no MADV_FREE."""
    torch.manual_seed(0)
    lossops.empty_cache()
    first = gradient(*batch()).data_ptr()
    return gradient(*batch()).data_ptr() == first


def batch(shape: tuple[int, int] = LARGE) -> tuple[Tensor, Tensor]:
    return torch.randn(shape, requires_grad=True), torch.randint(0, shape[1], shape[:1])


def gradient(logits: Tensor, target: Tensor) -> Tensor:
    return torch.autograd.grad(lossops.cross_entropy(logits, target), logits)[0]


needs_pages = pytest.mark.skipif(not keeps_pages(), reason="this build keeps no pages")


@needs_pages
def test_a_gradient_given_back_serves_the_next() -> None:
    arguments = batch()
    first = gradient(*arguments)
    kept, place = first.clone(), first.data_ptr()
    del first
    second = gradient(*arguments)
    assert second.data_ptr() == place
    assert torch.equal(second, kept)


def test_a_gradient_that_lives_is_nobody_elses() -> None:
    arguments = [batch() for _ in range(5)]
    gradients = [gradient(*a) for a in arguments]
    assert len({g.data_ptr() for g in gradients}) == 5
    views = [g[1:, ::2] for g in gradients]  # a view holds the pages too
    expected = [v.clone() for v in views]
    del gradients
    more = [gradient(*batch()) for _ in range(5)]
    assert all(map(torch.equal, views, expected))
    assert not {g.data_ptr() for g in more} & {v.data_ptr() - 4 * LARGE[1] for v in views}


@needs_pages
def test_smaller_and_larger_blocks() -> None:
    lossops.empty_cache()
    place = gradient(*batch((4000, 1000))).data_ptr()
    assert gradient(*batch((1100, 1000))).data_ptr() == place  # the larger block serves
    assert gradient(*batch((4000, 1000))).data_ptr() == place  # and is whole again afterwards
    larger = batch((9000, 1000))
    with torch.no_grad():
        expected = (larger[0].softmax(1) - torch.nn.functional.one_hot(larger[1], 1000)) / 9000
    torch.testing.assert_close(gradient(*larger), expected, rtol=1e-5, atol=1e-9)


@needs_pages
def test_empty_cache_returns_the_pages() -> None:
    def resident() -> int:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGESIZE")

    arguments = batch((50_000, 1000))
    gradient(*arguments)
    before = resident()
    lossops.empty_cache()
    assert resident() < before - 150_000_000
    lossops.empty_cache()  # of nothing
    assert gradient(*arguments).shape == (50_000, 1000)


def test_mean_squared_error_with_both_gradients() -> None:
    x, y = torch.randn(2, *LARGE, requires_grad=True).unbind()
    for _ in range(3):
        by_x, by_y = torch.autograd.grad(lossops.mse_loss(x, y), (x, y))
        assert by_x.data_ptr() != by_y.data_ptr()
        assert torch.equal(by_x, -by_y)


def test_threads_do_not_share_a_gradient() -> None:
    arguments = [batch() for _ in range(4)]
    expected = [gradient(*a).clone() for a in arguments]
    wrong: list[int] = []

    def work(k: int) -> None:
        for _ in range(10):
            if not torch.equal(gradient(*arguments[k]), expected[k]):
                wrong.append(k)

    workers = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


def test_nothing_is_kept_on_request() -> None:
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]; import torch, lossops\n"
        "x = torch.randn(1100, 1000, requires_grad=True); y = torch.zeros(1100, dtype=torch.int64)\n"
        "g = torch.autograd.grad(lossops.cross_entropy(x, y), x)[0]; g.resize_(1200, 1000)\n"
        "print(g.shape[0])"
    )
    package = os.path.dirname(os.path.dirname(lossops.__file__))
    done = subprocess.run(
        [sys.executable, "-c", code, package],
        env={**os.environ, "LOSSOPS_KEEP_PAGES": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "1200\n", done.stderr  # torch's own storage, which it can resize


def test_what_torch_does_with_a_gradient() -> None:
    """Everything but resizing its storage, which torch refuses by itself."""
    g = gradient(*batch())
    assert torch.equal(torch.from_numpy(g.numpy()), g)
    assert torch.equal(g.share_memory_(), g)
    g = gradient(*batch())
    assert torch.equal(g.resize_(1000, 1100).flatten(), g.flatten())
    g.mul_(2).set_(torch.ones(3))
    assert g.tolist() == [1, 1, 1]
