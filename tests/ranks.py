"""Processes that meet over gloo on the loopback address, and call what a test sends them."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from lossops._distributed import _talks_of


class Ranks:
    """`count` processes of one group; none of them outlives `close`, or this process.

    `limit`: the seconds that torch.distributed waits for a rank; a call may take four times as long.
    """

    def __init__(self, count: int, limit: float) -> None:
        self.limit = limit
        # The store is here, so that the port is free, and whoever dies does not take it along.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context = mp.get_context("spawn")
        self._pipes: list[Connection] = []
        self.processes = []
        for rank in range(count):
            ours, theirs = context.Pipe()
            arguments = rank, count, self._store.port, limit, theirs
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self.processes.append(process)

    def outcomes(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What every rank returns; of one that raises the exception, of one that ends or hangs a string."""
        for pipe in self._pipes:
            pipe.send((function, args))
        end = time.monotonic() + 4 * self.limit
        results = []
        for pipe, process in zip(self._pipes, self.processes, strict=True):
            try:
                ready = pipe.poll(max(0, end - time.monotonic()))
                results.append(pipe.recv() if ready else "no answer")
            except (EOFError, ConnectionResetError):
                process.join(self.limit)
                results.append(f"exit code {process.exitcode}")
        return results

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What every rank returns; an error where one does not."""
        results = self.outcomes(function, *args)
        for rank, result in enumerate(results):
            if isinstance(result, Exception):
                raise AssertionError(f"rank {rank} has failed:\n{result.traceback}") from result  # type: ignore[attr-defined]
            assert result not in ("no answer",) and not str(result).startswith("exit code"), (rank, result)
        return results

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


def _serve(rank: int, count: int, port: int, limit: float, pipe: Connection) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    timeout = timedelta(seconds=limit)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timeout)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=timeout)
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:  # the tests have ended
            os._exit(0)
        torch.manual_seed(20240229)  # every rank draws the same numbers, whatever it has done before
        try:
            result = function(*args)
        except Exception as error:
            result = error
            result.traceback = traceback.format_exc()  # type: ignore[attr-defined]
        pipe.send(result)


_groups: dict[tuple[int, ...], dist.ProcessGroup] = {}


def subgroup(ranks: Sequence[int]) -> dist.ProcessGroup:
    """The group of some ranks, in their order; every process has to ask for it at its first use."""
    key = tuple(ranks)
    if key not in _groups:
        _groups[key] = dist.new_group(list(ranks))
    return _groups[key]


def member(size: int) -> dist.ProcessGroup | None:
    """The group of the first `size` ranks, None on the others."""
    group = subgroup(range(size))
    return group if dist.get_rank() < size else None


def forget_agreements(group: dist.ProcessGroup | None = None) -> None:
    """The next call is every rank's first."""
    _talks_of((group or dist.group.WORLD).group_name).agreed.clear()


def run_examples(size: int, seeds: range, check: Callable[[Any], None], kind: type[Any]) -> list[str]:
    """What is wrong, one line for each configuration; every rank goes through all of them.

    `kind` draws an example from a seed, alike on every rank of a group of `size`; it has a `rank`, a `str`.
    """
    group = member(size)
    if group is None:
        return []
    wrong = []
    for seed in seeds:
        example = kind(seed, group)
        forget_agreements(group)  # or a rank that knows its part would not hear of another partition
        try:
            check(example)
        except Exception as error:
            text = " ".join(f"{type(error).__name__}: {error}".split())
            wrong.append(f"rank {example.rank}, seed {seed}: {text} [{example}]")
    return wrong


def assert_none_wrong(results: list[list[str]]) -> None:
    wrong = [line for lines in results for line in lines]
    assert not wrong, f"{len(wrong)} configurations:\n" + "\n".join(wrong[:12])


class Collectives(TorchDispatchMode):
    """Notes what runs within: functional collectives, with the bytes that this process gives, and kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []
        self.kernels: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # first what it does to its parts
        name = func.__name__.partition(".")[0]
        if func.namespace == "_c10d_functional" and name.startswith(("all_", "reduce_", "broadcast")):
            self.seen.append((name, args[0].nbytes))
        if func.namespace == "lossops":
            self.kernels.append(name)
        return func(*args, **(kwargs or {}))
