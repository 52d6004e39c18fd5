"""A sharded vocabulary: messages, and time on this machine.

    python bench/vocab_parallel.py --ranks 1 2 4

The loss of logits beside torch's loss_parallel, and the linear head beside the one without a group.

The ranks are processes over gloo on the loopback address, with one thread each: the time is that of this
machine's cores, which the ranks share, and says nothing of a network. What it can show: how much of a step
is the loss's own work, and that it is divided by the ranks where there are cores for them. The messages are
those that any machine sends: bytes are what each rank sends for one row, forward and backward, by the ring
algorithms (an all-gather of b bytes: (R-1)*b; an all-reduce: 2*(R-1)/R*b).
"""

from __future__ import annotations

import argparse
import math
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
from torch.profiler import ProfilerActivity, profile

import lossops

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from ranks import Ranks

Step = Callable[[], None]


def step_of_lossops(logits: Tensor, target: Tensor) -> Step:
    leaf = logits.requires_grad_()

    def step() -> None:
        leaf.grad = None
        lossops.vocab_parallel_cross_entropy(leaf, target).backward()

    return step


def step_of_torch(logits: Tensor, target: Tensor) -> Step:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    leaf = DTensor.from_local(logits, mesh, [Shard(1)], run_check=False).detach().requires_grad_()

    def step() -> None:
        leaf.grad = None
        with loss_parallel():
            torch.nn.functional.cross_entropy(leaf, target).backward()

    return step


def step_of_head(group: dist.ProcessGroup | None, x: Tensor, weight: Tensor, target: Tensor) -> Step:
    leaves = [x.requires_grad_(), weight.requires_grad_()]

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        lossops.linear_cross_entropy(*leaves, target, group=group).backward()

    return step


def collectives_of(step: Step) -> list[tuple[str, int]]:
    """Name, and bytes of float32 that this rank gives. By the profiler, which sees into an op."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        step()
    of_torch = [event for event in seen.events() if event.name.startswith("_c10d_functional::all_")]
    return [(e.name.partition("::")[2], 4 * math.prod(e.input_shapes[0])) for e in of_torch]


def sent(name: str, size: int, ranks: int) -> float:
    """Bytes that a rank sends for a collective that it gives `size` bytes to, round the ring."""
    return size * (ranks - 1) * (1 if name.startswith("all_gather") else 2 / ranks)


def steps(rows: int, features: int, classes: int) -> dict[str, Step]:
    """What is measured on this rank, by name."""
    ranks = dist.get_world_size()
    torch.manual_seed(dist.get_rank())
    mine = classes // ranks
    logits, weight = torch.randn(rows, mine), torch.randn(mine, features) / features**0.5
    torch.manual_seed(ranks)
    x, target = torch.randn(rows, features), torch.arange(rows) * 7919 % classes
    found = {
        "lossops": step_of_lossops(logits.clone(), target),
        "loss_parallel": step_of_torch(logits, target),
        "linear head": step_of_head(dist.group.WORLD, x, weight, target),
    }
    if ranks == 1:
        found["linear head, no group"] = step_of_head(None, x.clone(), weight.clone(), target)
    return found


def measure(rows: int, features: int, classes: int, rounds: int) -> dict[str, dict[str, Any]]:
    ranks, of_rank = dist.get_world_size(), steps(rows, features, classes)
    results: dict[str, dict[str, Any]] = {}
    for name, step in of_rank.items():
        step()
        collectives = collectives_of(step)
        names = [collective for collective, _ in collectives]
        bytes_sent = sum(sent(*collective, ranks) for collective in collectives)
        results[name] = {"seconds": [], "collectives": names, "bytes a row": bytes_sent / rows}
    for _ in range(rounds):
        for name, step in of_rank.items():
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
    parser.add_argument("--features", type=int, default=256, help="of the linear head")
    parser.add_argument("--classes", type=int, default=32000)
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    shape = f"{given.rows}x{given.classes}, the head's features {given.features}"
    print(f"float32 {shape}, forward and backward, torch {torch.__version__}")
    print("| ranks | | collectives | bytes sent a row | ms (median of the slowest rank) |")
    print("|--:|---|---|--:|--:|")
    for count in given.ranks:
        group = Ranks(count, limit=60)
        try:
            by_rank = group(measure, given.rows, given.features, given.classes, given.rounds)
        finally:
            group.close()
        for name, first in by_rank[0].items():
            seconds = max(statistics.median(result[name]["seconds"]) for result in by_rank)
            kinds = [f"{first['collectives'].count(c)} {c}" for c in dict.fromkeys(first["collectives"])]
            print(
                f"| {count} | {name} | {', '.join(kinds) or 'none'} | {first['bytes a row']:.1f} | "
                f"{1e3 * seconds:.1f} |"
            )


if __name__ == "__main__":
    main()
