"""The tables of docs/cuda.md: what nvcc made of the CUDA kernels, and what they move.

python tests/cuda_report.py writes them anew, with --check it says what has changed. It needs no GPU: machine
code is read from what `make build` left in build/cuda, and the emulator counts what the ops move.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "cuda.md"
OBJECTS = ROOT / "build" / "cuda"
NVCC = "13.0.88"  # machine code is another with every release
FIRST_ERROR = "lossops: docs/cuda.md is not what the kernels are now; if it is meant, run `make cuda-report`."


class ReportError(Exception):
    """Something that the report needs is not there; the message says what."""


def output_of(*command: str | Path, cwd: Path | None = None) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)
    if result.returncode != 0:
        raise ReportError(f"{' '.join(map(str, command))} failed: {result.stderr.strip()}")
    return result.stdout


# --------------------------------------------------------------------------------------------------
# Machine code

ARCHITECTURES = ("sm_80", "sm_90")
RESERVED_SHARED = {"sm_80": 0, "sm_90": 1024}  # bytes before a kernel's own that cuobjdump counts too


@dataclass(frozen=True)
class Code:
    """A kernel as compiled for one architecture."""

    registers: int
    threads: int  # of a block
    shared: int  # bytes, static, its own
    stack: int  # bytes, where spills would go
    instructions: dict[str, int]

    def count(self, pattern: str) -> int:
        return sum(n for name, n in self.instructions.items() if re.match(pattern, name))


def tool(name: str) -> str | None:
    """cuobjdump or nvdisasm: of the toolkit, or of a package beside this Python."""
    packaged = Path(sysconfig.get_path("purelib"), "nvidia", "cu13", "bin")
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", os.defpath), str(packaged)]))


def no_machine_code() -> str | None:
    """Why the tables of machine code cannot be made here, or None."""
    import lossops

    for name in ("cuobjdump", "nvdisasm"):
        if tool(name) is None:
            return f"found no {name}"
    info = lossops.cuda_build_info()
    if info is None:
        return "lossops is built without CUDA"
    if info.toolkit != NVCC:
        return f"lossops is built with nvcc {info.toolkit}, and the tables are of {NVCC}"
    for architecture in ARCHITECTURES:
        if architecture not in info.architectures:
            return f"lossops is built without {architecture}"
    return None


def compiled_kernels() -> dict[str, dict[str, Code]]:
    """By demangled name, then by architecture."""
    from cuda_emulator.tools.sass_count import demangle

    kernels: dict[str, dict[str, Code]] = {}
    for source in sorted(ROOT.glob("csrc/cuda/*.cu")):
        for architecture in ARCHITECTURES:
            for name, code in read_object(OBJECTS / f"{source.stem}.o", architecture).items():
                kernels.setdefault(name, {})[architecture] = code
    return dict(zip(demangle(list(kernels)), kernels.values(), strict=True))


def read_object(path: Path, architecture: str) -> dict[str, Code]:
    """The kernels of an object file by mangled name."""
    from cuda_emulator.tools.sass_count import count

    cuobjdump, nvdisasm = tool("cuobjdump"), tool("nvdisasm")
    assert cuobjdump is not None and nvdisasm is not None
    if not path.is_file():
        raise ReportError(f"{path} is missing; run `make build`")
    usage = re.findall(
        r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)",
        output_of(cuobjdump, "-res-usage", "-arch", architecture, path),
    )
    listing = ""
    with tempfile.TemporaryDirectory() as folder:
        output_of(cuobjdump, "-xelf", architecture, path, cwd=Path(folder))
        for cubin in Path(folder).glob("*.cubin"):
            listing += output_of(nvdisasm, cubin)
    counted = count(listing)
    threads = re.findall(
        r"\.section\s+\.nv\.info\.(\w+),(?:(?!\.section\s).)*?EIATTR_MAX_THREADS.*?\.word\s+(0x[0-9a-f]+)",
        listing,
        re.DOTALL,
    )
    of_block = {name: int(number, 16) for name, number in threads}
    reserved = RESERVED_SHARED[architecture]
    return {
        name: Code(
            int(registers),
            of_block[name],
            max(0, int(shared) - reserved),
            int(stack),
            dict(counted[name][1]),
        )
        for name, registers, stack, shared in usage
    }


class Occupancy:
    """The toolkit's own formulae, by way of tools/occupancy.cpp."""

    def __init__(self) -> None:
        from cuda_emulator.build import cached, cuda_home, digest, digest_file, run

        source = Path(__file__).parent / "cuda_emulator" / "tools" / "occupancy.cpp"
        include = f"-I{cuda_home()}/include"

        def compile_program(folder: Path) -> None:
            run(["g++", "-std=c++17", include, source, "-o", folder / "occupancy"])

        self.program = cached(digest("occupancy", include, digest_file(source)), compile_program)
        self.known: dict[tuple[int, ...], dict[str, int]] = {}

    def percent(self, architecture: str, code: Code, dynamic_shared: int) -> int:
        key = code.registers, code.threads, code.shared, dynamic_shared
        if key not in self.known:
            said = output_of(self.program / "occupancy", *map(str, key))
            self.known[key] = {a: int(p) for a, p in re.findall(r"(sm_\d+)\s.* (\d+)% of its threads", said)}
        return self.known[key][architecture]


DTYPES = {"__half": "float16", "__nv_bfloat16": "bfloat16", "float": "float32", "double": "float64"}
LANES = {"8": "by 8 lanes", "32": "by a warp", "128": "by a block"}
# Shared memory that the launch asks for, at its largest: plan_short_rows of csrc/cuda/cross_entropy_plan.h.
SHORT_ROWS_BYTES = {"float16": 128 * 132, "bfloat16": 128 * 132, "float32": 128 * 132, "float64": 128 * 136}

BELOW_HALF = {
    "a": "numbers of twice the size: a quarter of the threads, `kResident`",
    "b": "with target weights there are twice the loads in flight: `kResident`, `kResidentRows`",
    "c": "four packs of 16-bit logits in flight and the sums of one: `kResidentTiles`",
    "d": "each thread has a pack of rows, with the scalars of each: `kResident<A, true>`",
    "e": "row functions have more sums and scalars a row, and transform each logit: `kResidentPlanes`, "
    "`kResidentGradient`",
}


@dataclass(frozen=True)
class Kernel:
    """A kernel's place in the table."""

    order: tuple[int, ...]
    name: str
    dtype: str
    below_half: str  # the key of the reason, or nothing
    dynamic_shared: int = 0


def describe(name: str) -> Kernel:
    """Of a demangled kernel."""
    match = re.search(r"(\w+)(?:<(.*)>)?\(", name.replace("(anonymous namespace)::", ""))
    if match is None:
        raise ReportError(f"cannot read the kernel's name {name}")
    function, listed = match[1], match[2] or ""
    arguments = [re.sub(r"\(\w+\)|lossops::cuda::", "", a).strip() for a in listed.split(",")]
    words = {"true": True, "1": True, "false": False, "0": False}
    types = [a for a in arguments if a in DTYPES or a == "AnyType"]
    numbers = [a for a in arguments if a not in types and a]
    accumulation = types[-1] if types else "float"
    dtype = DTYPES[types[0]] if types and types[0] in DTYPES else ""
    if types[:1] == ["AnyType"] or len(types) == 1:
        dtype = f"any, in {DTYPES[accumulation]}"
    double = accumulation == "double"
    half_size = dtype in ("float16", "bfloat16")
    rank = list(DTYPES.values()).index(dtype) if dtype in DTYPES.values() else 9 + double
    if function in ("forward_rows", "backward_rows"):
        dense = words[numbers[1]]
        forward = function == "forward_rows"
        reason = "a" if double else "b" if dense else ""
        text = f"cross-entropy {function.split('_')[0]}, rows {LANES[numbers[0]]}"
        return Kernel(
            (0, not forward, 0, -int(numbers[0]), dense, rank),
            text + (", target weights" if dense else ""),
            dtype,
            reason,
        )
    if function in ("forward_tiles", "backward_tiles"):
        dense = words[numbers[1]]
        forward = function == "forward_tiles"
        packs = numbers[0] != "1"
        reason = "a" if double else "d" if not forward else "b" if dense else "c" if half_size else ""
        text = f"cross-entropy {function.split('_')[0]}, tiles of " + ("packs of rows" if packs else "rows")
        return Kernel(
            (0, not forward, 1, not packs, dense, rank),
            text + (", target weights" if dense else ""),
            dtype,
            reason,
        )
    if function in ("forward_short_rows", "backward_short_rows"):
        forward = function == "forward_short_rows"
        text = f"cross-entropy {function.split('_')[0]}, short rows"
        return Kernel(
            (0, not forward, 2, 0, 0, rank), text, dtype, "a" if double else "", SHORT_ROWS_BYTES[dtype]
        )
    if function == "join_slices":
        return Kernel((0, 3, 0, 0, 0, double), "cross-entropy, slices of rows joined", dtype, "a" * double)
    if (kernel := describe_row_functions(function, words, numbers)) is not None:
        order, text = kernel
        dynamic_shared = SHORT_ROWS_BYTES[dtype] if text.endswith("short rows") else 0
        return Kernel((0, 4, *order, rank), text, dtype, "a" if double else "e", dynamic_shared)
    if function in ("forward_packs", "backward_packs"):
        plain, masked = (words[number] for number in numbers)
        text = f"MSE {function.split('_')[0]}, packs" + (", mask" if masked else "" if plain else ", weights")
        return Kernel((1, function == "backward_packs", 0, not plain, masked, rank), text, dtype, "")
    if function in ("forward_elements", "backward_elements"):
        masked = words[numbers[0]]
        text = f"MSE {function.split('_')[0]}, elements" + (", mask" if masked else "")
        return Kernel((1, function == "backward_elements", 1, masked, 0, rank), text, dtype, "")
    if function == "reduce_blocks":
        return Kernel((2, 0, 0, 0, 0, 0), "both, sums of blocks added up", "any", "")
    raise ReportError(f"tests/cuda_report.py does not know the kernel {name}; add it to describe()")


def describe_row_functions(
    function: str, words: dict[str, bool], numbers: list[str]
) -> tuple[tuple[int, ...], str] | None:
    """Order and name, or None for the kernel of another loss."""
    if function in ("planes_of_rows", "gradient_of_rows"):
        backward, dense = function == "gradient_of_rows", words[numbers[1]]
        text = f"row functions {'backward' if backward else 'forward'}, rows {LANES[numbers[0]]}"
        return (backward, 0, -int(numbers[0]), dense), text + (", target weights" if dense else "")
    if function in ("planes_of_tiles", "gradient_of_tiles"):
        backward, short = function == "gradient_of_tiles", words[numbers[0]]
        text = f"row functions {'backward' if backward else 'forward'}, "
        return (backward, 1, short, 0), text + ("short rows" if short else "tiles of rows")
    if function in ("tangent_sums", "second_products"):
        products = function == "second_products"
        text = f"row functions second derivative, {function.replace('_', ' ')} {LANES[numbers[0]]}"
        return (2, products, -int(numbers[0]), 0), text
    names = {"join_planes": "slices of rows joined", "add_slices": "slices of the scale's gradient added up"}
    return (
        ((3, function == "add_slices", 0, 0), f"row functions, {names[function]}")
        if function in names
        else None
    )


SHOWN = {"bfloat16", "float32", "any"}  # the others' kernels are in a table of their own


def kernel_tables(kernels: dict[str, dict[str, Code]]) -> dict[str, str]:
    occupancy = Occupancy()
    rows: dict[tuple[str, ...], list[Kernel]] = {}

    def both(values: list[object]) -> str:
        return str(values[0]) if len(set(values)) == 1 else " / ".join(map(str, values))

    described = [(describe(name), codes) for name, codes in kernels.items()]
    for kernel, codes in sorted(described, key=lambda item: (item[0].order, item[0].dtype)):
        compiled = [codes[a] for a in ARCHITECTURES]
        for architecture, code in zip(ARCHITECTURES, compiled, strict=True):
            if code.stack or code.count(r"LDL|STL"):
                raise ReportError(
                    f"{kernel.name}, {kernel.dtype}: spills to local memory on {architecture}; its stack has "
                    f"{code.stack} bytes"
                )
        percent = [occupancy.percent(a, codes[a], kernel.dynamic_shared) for a in ARCHITECTURES]
        if min(percent) < 50 and not kernel.below_half:
            raise ReportError(
                f"{kernel.name}, {kernel.dtype}: occupancy is {min(percent)}%, and BELOW_HALF of "
                "tests/cuda_report.py gives no reason for less than 50%"
            )
        note = f" ({kernel.below_half})" if min(percent) < 50 else ""
        shared = both([code.shared for code in compiled])
        cells = (
            kernel.name,
            both([code.threads for code in compiled]),
            shared + (f" + {kernel.dynamic_shared}" if kernel.dynamic_shared else ""),
            both([code.registers for code in compiled]),
            both([f"{p}%" for p in percent]) + note,
            both([code.count(r"LDG\.E\S*\.128") for code in compiled]),
            both([code.count(r"STG\.E\S*\.128") for code in compiled]),
        )
        same = rows.setdefault(cells, [])
        if kernel.dtype not in [other.dtype for other in same]:  # reduce_blocks is in every file
            same.append(kernel)
    heading = ("kernel", "dtype", "threads", "shared bytes", "registers", "occupancy", "LDG.128", "STG.128")
    shown: list[Sequence[str]] = []
    others: list[Sequence[str]] = []
    for cell, same in rows.items():
        dtypes = [kernel.dtype for kernel in same]
        (shown if SHOWN & set(dtypes) else others).append((cell[0], "; ".join(dtypes), *cell[1:]))
    return {"kernels": table(heading, shown), "other kernels": table(heading, others), "reasons": reasons()}


def reasons() -> str:
    return "".join(f"- ({key}) {reason}\n" for key, reason in BELOW_HALF.items())


# --------------------------------------------------------------------------------------------------
# Traffic

SECTOR = 32  # bytes
BANDWIDTH = {"H100": 3.35e12, "A100": 2.04e12}  # bytes a second, of the SXM models with 80 GB


@dataclass(frozen=True)
class Traffic:
    """What one op of one case moved."""

    case: str
    dtype: str
    op: str  # forward or backward
    ideal: int  # sectors: each byte of its tensors once
    read: int
    written: int
    instructions: int  # executed by warps to move that
    least_instructions: int  # of 32 lanes with 16 bytes each
    wavefronts: int
    least_wavefronts: int
    executed: int  # PTX instructions of all threads

    @property
    def over_ideal(self) -> float:
        return (self.read + self.written) / self.ideal

    @property
    def over_least_instructions(self) -> float:
        return self.instructions / self.least_instructions

    @property
    def over_least(self) -> float:
        return self.wavefronts / self.least_wavefronts if self.least_wavefronts else 1.0


@dataclass(frozen=True)
class Case:
    """A call whose traffic is counted, and how often a larger one of the same kind is as large."""

    loss: Callable[..., Any]
    shape: tuple[int, ...]
    offset: tuple[int, int] = (0, 0)  # elements from an aligned address, of the input and of the target
    probabilities: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    mask: tuple[int, ...] = ()  # its shape, if there is one
    larger: str = ""
    times: int = 0

    def call(self, dtype: Any) -> Any:
        import torch

        torch.manual_seed(0)

        def draw(offset: int) -> Any:
            return torch.rand(offset + math.prod(self.shape)).to(dtype)[offset:].view(self.shape)

        input = draw(self.offset[0]).requires_grad_()
        if self.mask:
            return self.loss(input, draw(self.offset[1]), mask=torch.rand(self.mask) < 0.7)
        if self.loss.__name__ == "mse_loss" or self.probabilities:
            return self.loss(input, draw(self.offset[1]), **self.options)
        classes = self.shape[1]
        return self.loss(input, torch.randint(0, classes, (self.shape[0], *self.shape[2:])), **self.options)


def cases() -> dict[str, Case]:
    from lossops.functional import cross_entropy, mse_loss

    many = 1 << 20
    capped: dict[str, Any] = {"softcap": 30.0, "z_loss": 1e-4}
    return {
        "64 x 32768": Case(cross_entropy, (64, 32768), larger="8192 x 32768", times=128),
        "64 x 32767, rows unaligned": Case(cross_entropy, (64, 32767)),
        "64 x 32768, one element off": Case(cross_entropy, (64, 32768), offset=(1, 0)),
        "512 x 1000": Case(cross_entropy, (512, 1000), larger="65536 x 1000", times=128),
        "4096 x 10": Case(cross_entropy, (4096, 10), larger="1048576 x 10", times=256),
        "4096 x 12": Case(cross_entropy, (4096, 12)),  # moved in fours
        "2 x 21 x 64 x 64, an image": Case(cross_entropy, (2, 21, 64, 64)),
        "1 x 3 x 480 x 640, a larger image": Case(cross_entropy, (1, 3, 480, 640)),
        "64 x 4096, probabilities": Case(cross_entropy, (64, 4096), probabilities=True),
        "64 x 32768, capped": Case(
            cross_entropy, (64, 32768), options=capped, larger="8192 x 32768, capped", times=128
        ),
        "64 x 32767, capped, rows unaligned": Case(cross_entropy, (64, 32767), options=capped),
        "512 x 1000, capped": Case(cross_entropy, (512, 1000), options=capped),
        "4096 x 10, capped": Case(cross_entropy, (4096, 10), options=capped),
        "2 x 21 x 64 x 64, an image, capped": Case(cross_entropy, (2, 21, 64, 64), options=capped),
        "MSE, 2^20": Case(mse_loss, (many,), larger="MSE, 2^28", times=256),
        "MSE, 2^20, a mask": Case(mse_loss, (many,), mask=(many,), larger="MSE, 2^28, a mask", times=256),
        "MSE, 2^20, both one element off": Case(mse_loss, (many,), offset=(1, 1)),
        "MSE, 2^20, the input one element off": Case(mse_loss, (many,), offset=(1, 0)),
    }


MOVED_DTYPES = ("bfloat16", "float32")


def measure_traffic(dtypes: Sequence[str] = MOVED_DTYPES, library: Path | None = None) -> Iterator[Traffic]:
    """Runs every case, forward and backward, through the ops as users call them.

    `library`: another than that of all kernels, of the flavour stats.
    """
    import emulated
    import torch
    from cuda_emulator.control import Emulator, Site
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    if library is None:
        library = emulated.load("stats")
    else:
        torch.ops.load_library(library)
    emulator = Emulator(library)

    def sectors_of(values: object) -> float:
        return sum(x.nbytes for x in tree_leaves(values) if isinstance(x, torch.Tensor)) / SECTOR

    def least(site: Site) -> int:
        return max(site.requests, -(-site.bytes // 128))

    class Counting(TorchDispatchMode):
        """Counts for every op of lossops apart."""

        def __init__(self, case: str, dtype: str) -> None:
            super().__init__()
            self.case, self.dtype = case, dtype
            self.counted: list[Traffic] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace != "lossops":
                return func(*args, **(kwargs or {}))
            emulator.reset_statistics()
            result = func(*args, **(kwargs or {}))
            sites = emulator.statistics()
            moved = [site for site in sites if not site.is_shared]
            shared = [site for site in sites if site.is_shared]
            self.counted.append(
                Traffic(
                    self.case,
                    self.dtype,
                    "backward" if "_backward" in func.__name__ else "forward",
                    math.ceil(sectors_of([args, kwargs, result])),
                    sum(site.sectors for site in moved if not site.is_store),
                    sum(site.sectors for site in moved if site.is_store),
                    sum(site.requests for site in moved),
                    -(-sum(site.bytes for site in moved) // 512),
                    sum(site.wavefronts for site in shared),
                    sum(least(site) for site in shared),
                    emulator.executed(),
                )
            )
            return result

    with emulated.in_place_of_the_cpus():
        for name, case in cases().items():
            for dtype in dtypes:
                with Counting(name, dtype) as mode:
                    case.call(getattr(torch, dtype)).backward()
                yield from mode.counted


def traffic_table(traffic: list[Traffic]) -> str:
    counted = ("ideal", "read", "written", "over ideal", "instructions over least", "wavefronts over least")
    body = []
    for t in traffic:
        ratios = [f"{x:.3f}" for x in (t.over_ideal, t.over_least_instructions, t.over_least)]
        body.append((t.case, t.dtype, t.op, t.ideal, t.read, t.written, *ratios))
    return table(("tensor", "dtype", "op", *counted), body)


def work_table(traffic: list[Traffic]) -> str:
    listed = cases()
    body = []
    for t in traffic:
        an_element = f"{t.executed / math.prod(listed[t.case].shape):.2f}"
        body.append((t.case, t.dtype, t.op, t.executed, an_element))
    return table(("tensor", "dtype", "op", "PTX instructions", "an element"), body)


def floor_table(traffic: list[Traffic]) -> str:
    listed = cases()
    body = []
    for t in traffic:
        case = listed[t.case]
        if case.times:
            moved = (t.read + t.written) * SECTOR * case.times
            times = [f"{moved / speed * 1e6:.0f}" for speed in BANDWIDTH.values()]
            body.append((case.larger, t.dtype, t.op, f"{moved / 1e6:.0f}", *times))
    return table(("tensor", "dtype", "op", "MB", *(f"{gpu}, us" for gpu in BANDWIDTH)), body)


# --------------------------------------------------------------------------------------------------
# The page


def table(heading: Sequence[object], body: Sequence[Sequence[object]]) -> str:
    lines = [heading, ["---"] * len(heading), *body]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def section(name: str) -> re.Pattern[str]:
    """A part of the page that is written by this file."""
    return re.compile(rf"(?<=<!-- {name} -->\n)(.*?)(?=<!-- end of {name} -->)", re.DOTALL)


def replaced(page: str, parts: dict[str, str]) -> str:
    for name, text in parts.items():
        if section(name).search(page) is None:
            raise ReportError(f"docs/cuda.md has no lines <!-- {name} --> and <!-- end of {name} -->")
        page = section(name).sub(f"\n{text}\n".replace("\\", r"\\"), page)
    return page


def differences(page: str, parts: dict[str, str]) -> list[str]:
    """A sentence for each line of the tables that has changed, is new or has gone."""
    sentences = []
    for name, text in parts.items():
        match = section(name).search(page)
        before, now = (match[1] if match else "").strip().splitlines(), text.splitlines()
        sentences += [f"{name}: no longer true is\n  {line}" for line in before if line not in now]
        sentences += [f"{name}: now is\n  {line}" for line in now if line not in before]
    return sentences


def parts_of_page(traffic: list[Traffic]) -> tuple[dict[str, str], str | None]:
    """What can be made here, and why the rest cannot."""
    parts = {"traffic": traffic_table(traffic), "floors": floor_table(traffic)}
    reason = no_machine_code()
    if reason is None:
        parts |= {"work": work_table(traffic)} | kernel_tables(compiled_kernels())
    return parts, reason


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="write nothing, fail where the page is not true")
    what.add_argument("--json", action="store_true", help="print the traffic alone")
    what.add_argument("--library", type=Path, help="print what this one (of the flavour stats) moves")
    parser.add_argument("--dtypes", nargs="+", default=MOVED_DTYPES, help="of the traffic that is printed")
    given = parser.parse_args()

    import emulated

    try:
        if reason := emulated.why_not():
            raise ReportError(reason)
        traffic = list(measure_traffic(given.dtypes, given.library))
        if given.library:
            print(traffic_table(traffic) + work_table(traffic))
            return 0
        if given.json:
            print(json.dumps([asdict(t) for t in traffic]))
            return 0
        parts, reason = parts_of_page(traffic)
        page = PAGE.read_text()
        left_out = f"lossops: {reason}: the table of machine code is left as it is"
        if not given.check:
            PAGE.write_text(replaced(page, parts))
            print(left_out if reason else "lossops: docs/cuda.md is written")
            return 0
        changed = differences(page, parts)
    except ReportError as error:
        print(f"lossops: the report on CUDA kernels cannot be made: {error}", file=sys.stderr)
        return 1
    if changed:
        print(FIRST_ERROR, *changed, sep="\n", file=sys.stderr)
    elif reason:
        print(f"{left_out}; the traffic is as docs/cuda.md says")
    else:
        print("lossops: the kernels are as docs/cuda.md says")
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
