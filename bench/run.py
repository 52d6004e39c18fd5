"""Times lossops against PyTorch, eager and compiled, and weighs their peak memory.

    python bench/run.py --device cpu            every case: some minutes
    python bench/run.py --device cuda           a GPU's cases: within four minutes on an H100
    python bench/run.py --quick                 a few smaller ones: a minute
    python bench/run.py --loss mse --case 2^26  what matches

The implementations take turns in every round, so that whatever else the machine does meets them
all; a figure is the median over the rounds. Each row is printed as it is measured, and the table and
the data are written anew with it, so that a run that is cut short leaves what it had. Every file
beside this one that defines CASES is a loss: OURS, EAGER, PEERS by device, and the cases in CASES and
QUICK, CUDA_CASES and CUDA_QUICK. (Several processes: vocab_parallel.py.)
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from _measure import (
    Case,
    Cpu,
    Cuda,
    Loss,
    Step,
    check_agreement,
    clear,
    dtype_name,
    make_step,
    with_own_leaves,
)
from _report import (
    COMPILE,
    EAGER,
    FLOOR,
    OURS,
    Row,
    as_markdown,
    as_text,
    notes,
    plot_memory,
    plot_speed,
    summary,
    table,
    write_json,
)

import lossops

try:
    from tqdm import tqdm

    say: Callable[..., None] = tqdm.write
except ImportError:  # the rows as they come show the progress too

    def tqdm(items: Any, **_: Any) -> Any:
        return items

    say = print


def losses_of(folder: Path) -> list[str]:
    """By the files' text: importing one takes time, and may do what a script does."""
    cases = re.compile(r"^CASES\b.*=", re.MULTILINE)
    return sorted(path.stem for path in folder.glob("*.py") if cases.search(path.read_text("utf-8")))


LOSSES = losses_of(Path(__file__).parent)
# Short rows are measured in more rounds: one interruption by the system is as long as all of theirs.
LEAST_SECONDS = 0.3
DTYPES = ["float16", "bfloat16", "float32", "float64"]


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--loss", nargs="+", choices=LOSSES, default=LOSSES)
    add("--dtype", nargs="+", choices=DTYPES, default=DTYPES)
    add("--case", default="", help="only cases whose name contains this")
    add("--quick", action="store_true", help="few and smaller cases")
    add("--rounds", type=int, default=9, help="least timings of each implementation (default: 9)")
    add("--threads", type=int, default=2, help="CPU threads; the targets are for 2 (default: 2)")
    add("--no-compile", action="store_true", help="leave out torch.compile, which needs a C++ compiler")
    add("--compile-seconds", type=float, help="leave it out of rows begun later (default: 150 on cuda)")
    add("--out", type=Path, default=Path("bench-output"), help="folder of the results")
    arguments = parser.parse_args(argv)
    if arguments.no_compile:
        arguments.compile_seconds = 0
    elif arguments.compile_seconds is None:
        # Where GPUs are lent by the minute, a slow compiler must not take the measurements' time.
        arguments.compile_seconds = 150 if arguments.device == "cuda" else float("inf")
    return arguments


def select_cases(arguments: argparse.Namespace) -> list[tuple[str, ModuleType, Case]]:
    selected = []
    for loss in arguments.loss:
        module = importlib.import_module(loss)
        cuda = "CUDA_" if arguments.device == "cuda" else ""
        for case in getattr(module, cuda + ("QUICK" if arguments.quick else "CASES")):
            if dtype_name(case.dtype) in arguments.dtype and arguments.case in f"{loss} {case.name}":
                selected.append((loss, module, case))
    if not selected:
        sys.exit("run.py: no case matches --loss, --dtype and --case; leave one out to see more.")
    return selected


def choose_meter(arguments: argparse.Namespace) -> Cpu | Cuda:
    if arguments.device == "cpu":
        return Cpu()
    if not torch.cuda.is_available():
        sys.exit(
            f"run.py: --device cuda needs a GPU, and torch {torch.__version__} sees none; use --device cpu."
        )
    for loss in arguments.loss:
        kernels = getattr(importlib.import_module(loss), "KERNELS", loss)
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"lossops::{kernels}_forward", "CUDA"):
            sys.exit(f"run.py: this build of lossops has no CUDA kernels for {loss}; use --device cpu.")
    return Cuda()


def targets(case: Case, backward: bool) -> dict[str, float]:
    """What a row is to reach, by contender."""
    chosen = {EAGER: case.target(backward)}
    if backward:
        chosen |= {**case.speedups, FLOOR: case.over_floor}
    return {name: target for name, target in chosen.items() if target is not None}


def compiled(eager: Loss) -> Loss:
    def composition(**arguments: Any) -> torch.Tensor:
        return eager(**arguments)

    torch._dynamo.reset()
    return torch.compile(composition, dynamic=False)


def implementations(
    module: ModuleType, case: Case, device: str, with_compile: bool = True
) -> dict[str, Loss]:
    """All by name, eager first: the others are checked against it."""
    eager = case.eager or module.EAGER
    losses = {EAGER: eager, OURS: case.ours or module.OURS}
    if with_compile:
        losses[COMPILE] = compiled(eager)
    return losses | (module.PEERS.get(device, {}) if case.plain else {})


def measure(
    meter: Cpu | Cuda, row: Row, case: Case, losses: dict[str, Loss], shared: dict[str, Any], rounds: int
) -> None:
    """Fills in the row's seconds and peaks, but for implementations that fail or compute something else."""
    # Who leaves the logits as they are; the others (of the peers, Liger) get copies.
    sharing = (EAGER, COMPILE) if case.in_place else (OURS, EAGER, COMPILE)
    steps: dict[str, tuple[Step, list[torch.Tensor]]] = {}
    expected: list[torch.Tensor | None] = []
    for name, loss in losses.items():
        # Leaves of its own, on the same memory: as in training, the gradients that a step gives back are
        # those that this implementation made in its last.
        arguments, leaves = with_own_leaves(shared, row.backward, name not in sharing)
        step = make_step(loss, arguments, leaves, row.backward)
        try:
            results = [step(), *(leaf.grad for leaf in leaves)]
            expected = expected or results
            check_agreement(name, results, expected, case.tolerances.get(name))
        except Exception as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            say(f"{name} is left out of {row.loss} {row.case} {row.mode}: {reason[0]}", file=sys.stderr)
            if name == EAGER:
                return  # there is nothing to check the others against
            continue
        steps[name] = step, leaves
    del results, expected
    if case.floor is not None:
        # No loss to be checked, no gradient, and memory that it has before it starts: it has no peak.
        steps[FLOOR] = case.floor(**shared), []

    # Where patience may be needed no step is short.
    shortest = 1.0 if case.patience < math.inf else min(meter.time(*steps[name], 1) for name in steps)
    iterations = meter.iterations(row.elements, shortest)
    seconds: dict[str, list[float]] = {name: [] for name in sorted(steps, key=[OURS, *losses, FLOOR].index)}
    start = time.perf_counter()
    done = 0
    while done < rounds or time.perf_counter() - start < LEAST_SECONDS:
        for name, timings in seconds.items():
            if iterations * sum(timings) < case.patience:
                timings.append(meter.time(*steps[name], iterations))
        done += 1
    row.seconds = seconds
    row.rounds = done
    for _, leaves in steps.values():
        clear(leaves)
    steps.pop(FLOOR, None)
    for name in (name for name in seconds if name in steps):
        if case.memory is None:
            row.peak_bytes[name] = peak_of(meter, *steps[name], row.backward)
            clear(steps[name][1])
        else:
            row.peak_bytes[name] = peak_apart(row, name)


def peak_of(meter: Cpu | Cuda, step: Step, leaves: list[torch.Tensor], backward: bool) -> int | None:
    return meter.peak(step, leaves, sum(leaf.nbytes for leaf in leaves) if backward else 0)


def peak_apart(row: Row, name: str) -> int | None:
    """The same in a fresh process, where a limit is set: in the holes that others have left in this heap a
    block that is given back stays the process's."""
    threads = str(torch.get_num_threads())
    worker = str(Path(__file__).with_name("_peak.py"))
    mode = "backward" if row.backward else "forward"
    command = [sys.executable, worker, row.loss, row.case, name, mode, threads]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        say(f"{name} has no peak in {row.loss} {row.case}: its process failed", file=sys.stderr)
        return None
    return json.loads(done.stdout)


def driver_version() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.partition("\n")[0].strip()


def describe_machine(arguments: argparse.Namespace, copy_rate: float) -> dict[str, Any]:
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        processor = models[0].partition(":")[2].strip() if models else processor
    cuda = lossops.cuda_build_info() if arguments.device == "cuda" else None
    return {
        "device": arguments.device,
        "gpu": torch.cuda.get_device_name() if arguments.device == "cuda" else None,
        "driver": driver_version() if arguments.device == "cuda" else None,
        "cuda": " ".join(["CUDA", cuda.toolkit, *cuda.architectures]) if cuda else None,
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "lossops": lossops.__version__,
        "isa": lossops._C.cpu_isa(),
        "date": datetime.date.today().isoformat(),
        "rounds": arguments.rounds,
        "copy_gb_s": copy_rate / 1e9,
    }


def result_paths(out: Path, gpu: str | None) -> dict[str, Path]:
    """Where results go; a GPU's have it in their names, and may lie beside the CPU's."""
    device = "" if gpu is None else "-cuda"
    machine = "" if gpu is None else "-cuda-" + re.sub(r"[^A-Za-z0-9]+", "-", gpu)
    return {
        "table": out / f"results{machine}.md",
        "data": out / f"results{machine}.json",
        "speed": out / f"speed{device}.png",
        "memory": out / f"memory{device}.png",
    }


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    torch.set_num_threads(arguments.threads)
    selected = select_cases(arguments)
    meter = choose_meter(arguments)
    if arguments.device == "cpu" and not arguments.no_compile:
        from torch._inductor import config

        # A pool of compiling processes would start, and take the cores, while others are timed.
        config.compile_threads = 1
    copy_rate = meter.copy_rate()
    machine = describe_machine(arguments, copy_rate)
    aimed = arguments.device == "cpu" and arguments.threads == 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    paths = result_paths(arguments.out, machine["gpu"])
    where = machine["gpu"] or f"{machine['processor']}, {machine['threads']} threads"
    where += f"; torch {machine['torch']}"
    driver = f"; driver {machine['driver']}" if machine["driver"] else ""
    print(f"{where}{driver}; a copy moves {copy_rate * 1e-9:.1f} GB/s, read and write counted", flush=True)

    rows: list[Row] = []
    start = time.perf_counter()
    try:
        for k, (loss, module, case) in enumerate(tqdm(selected, unit="case", disable=None)):
            shared = case.arguments(meter.device)
            # A quick run times forward only for its first case: compiling takes most of its minute.
            for backward in (True, False) if case.forward and (k == 0 or not arguments.quick) else (True,):
                row = Row(
                    loss=loss,
                    case=case.name,
                    backward=backward,
                    elements=case.elements,
                    input_bytes=case.elements * case.dtype.itemsize,
                    bytes_moved=case.bytes_moved(backward),
                    flops=case.flops,
                    targets=targets(case, backward) if aimed else {},
                    memory=case.memory if aimed else None,
                    host_bound=meter.host_bound(case.elements),
                )
                with_compile = time.perf_counter() - start < arguments.compile_seconds
                losses = implementations(module, case, arguments.device, with_compile)
                measure(meter, row, case, losses, shared, arguments.rounds)
                rows.append(row)
                say(summary(row, copy_rate))
                sys.stdout.flush()
                write_json(paths["data"], machine, rows)
                markdown = as_markdown(table(rows, copy_rate))
                paths["table"].write_text(f"{markdown}\n\n{notes(machine, rows)}\n")
    finally:
        if rows:
            finish(rows, machine, copy_rate, paths, where)
    if any(OURS not in row.seconds for row in rows):
        sys.exit("run.py: lossops has no result in some row; see above why.")


def finish(
    rows: list[Row], machine: dict[str, Any], copy_rate: float, paths: dict[str, Path], where: str
) -> None:
    """The table at last, and the figures."""
    print("\n" + as_text(table(rows, copy_rate)))
    print("\n" + notes(machine, rows))
    failed = sum(bool(row.misses()) for row in rows)
    print(f"\n{len(rows) - failed} of {len(rows)} rows pass.")
    if rows := [row for row in rows if row.seconds]:
        plot_speed(paths["speed"], rows, where)
        plot_memory(paths["memory"], rows, where)
    print("Table, data and figures: " + ", ".join(map(str, paths.values())))


if __name__ == "__main__":
    main()
