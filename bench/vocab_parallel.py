"""Cross-entropy over a sharded vocabulary against torch's loss_parallel: messages, and time on this machine.

    python bench/vocab_parallel.py --ranks 1 2 4

The ranks are processes over gloo on the loopback address, with one thread each: the time is that of this
machine's cores, which the ranks share, and says nothing of a network. What it can show: how much of a step
is the loss's own work, and that it is divided by the ranks where there are cores for them. The messages are
those that any machine sends: bytes are what each rank sends for one row, forward and backward, by the ring
algorithms (an all-gather of b bytes: (R-1)*b; an all-reduce: 2*(R-1)/R*b).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import loss_parallel

import lossops

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from ranks import Collectives, Ranks


def step_of_lossops(logits: Tensor, target: Tensor) -> Callable[[], None]:
    leaf = logits.requires_grad_()

    def step() -> None:
        leaf.grad = None
        lossops.vocab_parallel_cross_entropy(leaf, target).backward()

    return step


def step_of_torch(logits: Tensor, target: Tensor) -> Callable[[], None]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    leaf = DTensor.from_local(logits, mesh, [Shard(1)], run_check=False).detach().requires_grad_()

    def step() -> None:
        leaf.grad = None
        with loss_parallel():
            torch.nn.functional.cross_entropy(leaf, target).backward()

    return step


STEPS = {"lossops": step_of_lossops, "loss_parallel": step_of_torch}


def sent(name: str, size: int, ranks: int) -> float:
    """Bytes that a rank sends for a collective that it gives `size` bytes to, round the ring."""
    return size * (ranks - 1) * (1 if name.startswith("all_gather") else 2 / ranks)


def measure(rows: int, classes: int, rounds: int) -> dict[str, dict[str, Any]]:
    ranks = dist.get_world_size()
    torch.manual_seed(dist.get_rank())
    logits = torch.randn(rows, classes // ranks)
    target = torch.arange(rows) * 7919 % classes
    steps = {name: step(logits.clone(), target) for name, step in STEPS.items()}
    results: dict[str, dict[str, Any]] = {}
    for name, step in steps.items():
        step()
        with Collectives() as collectives:
            step()
        bytes_sent = sum(sent(*collective, ranks) for collective in collectives.seen)
        names = [collective for collective, _ in collectives.seen]
        results[name] = {"seconds": [], "collectives": names, "bytes a row": bytes_sent / rows}
    for _ in range(rounds):
        for name, step in steps.items():
            dist.barrier()
            start = time.perf_counter()
            step()
            results[name]["seconds"].append(time.perf_counter() - start)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--classes", type=int, default=32000)
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    print(f"float32 {given.rows}x{given.classes}, forward and backward, torch {torch.__version__}")
    print("| ranks | | collectives | bytes sent a row | ms (median of the slowest rank) |")
    print("|--:|---|---|--:|--:|")
    for count in given.ranks:
        group = Ranks(count, limit=60)
        try:
            by_rank = group(measure, given.rows, given.classes, given.rounds)
        finally:
            group.close()
        for name in STEPS:
            seconds = max(statistics.median(result[name]["seconds"]) for result in by_rank)
            first = by_rank[0][name]
            kinds = [f"{first['collectives'].count(c)} {c}" for c in dict.fromkeys(first["collectives"])]
            print(
                f"| {count} | {name} | {', '.join(kinds) or 'none'} | {first['bytes a row']:.1f} | "
                f"{1e3 * seconds:.1f} |"
            )


if __name__ == "__main__":
    main()
