"""Changes one token of the CUDA kernels at a time; says which changes tests/cuda_cases.py does not notice.

python -m cuda_emulator.mutate [--sample 50 --seed 1] [--file mse.cu] [--list]

Every mutant is built for one dtype at a time, with the limits of reduced.py; what is not changed by it is
compiled once. Where one computes the same, it is noticed if the traffic in docs/cuda.md, which CI compares,
would be another. Results are kept in build/cuda_emulator/mutants.json, and a later run goes on from there.
Survivors that cannot matter are explained in survivors.json, beside this file.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.cpp_extension import TORCH_LIB_PATH

from . import build, reduced
from .sanitize import CASES, GROUPS_OF, environment

RESULTS = build.CACHE / "mutants.json"
SURVIVORS = build.HERE / "survivors.json"
REPORT = CASES.with_name("cuda_report.py")
LIMIT = 0.03  # of all mutants may survive
CHUNK_BYTES = 150_000  # small, for a mutant changes few kernels

# What replaces what, in code without comments. Spaces tell operators from the brackets of templates.
OPERATORS = {
    " < ": " <= ",
    " <= ": " < ",
    " > ": " >= ",
    " >= ": " > ",
    " == ": " != ",
    " != ": " == ",
    " + ": " - ",
    " - ": " + ",
    " * ": " + ",
    " / ": " * ",
    " % ": " / ",
    " += ": " -= ",
    " -= ": " += ",
    " *= ": " += ",
    " /= 2": " /= 4",
    " ^= 1": " ^= 0",
    " && ": " || ",
    " || ": " && ",
    "__syncthreads();": ";",
    "kAllLanes, x, distance": "kAllLanes, x, distance ^ 1",
    "(kAllLanes,": "(kAllLanes >> 1,",
    "atomicExch(&bad_target_record.found, true)": "bad_target_record.found++",
    "min(": "max(",
    "fmaxf(": "fminf(",
    "fmax(": "fmin(",
}
# The end of a loop over an array in registers: a round more is undefined, and shows nowhere; one less does.
FIXED_END = r"(?:k[A-Z]\w*(?:<\w+>)?|N);"
PATTERNS: list[tuple[str, Callable[[re.Match[str]], str]]] = [
    *(
        (re.escape(old) + (f"(?!{FIXED_END})" if old == " < " else ""), lambda found, new=new: new)
        for old, new in OPERATORS.items()
    ),
    (rf" < (?={FIXED_END})", lambda found: " + 1 < "),
    (r"(?<=[( ])!(?=[a-z])", lambda found: ""),
    (r"(?<=[(= ])-(?=[a-z])", lambda found: ""),
    (r"(?<![\w.<\"])\d+(?![\w.\]>])", lambda found: str(int(found[0]) + 1)),
]
# No part of what the kernels compute: comments, checks and hints for the compiler, how many loads are in
# flight, code on the host.
COMMENT = re.compile(r"//.*")
NOT_CODE = re.compile(
    r"^\s*#|static_assert|__launch_bounds__|kResident|kHalf|alignas|^using |asm |^template|\"|\brecord\.found"
    r"|constexpr int (kUnroll|kClasses|kTileClasses)\b"
)
# The cases that reach the kernels of a source: of sources that begin so.
CASES_OF = {
    "mse": ("mse", "shared"),
    "cross_entropy_rows": ("row_functions", "row_edges", "row_remainders", "row_phases", "shared"),
    "cross_entropy": ("ways", "edges", "mixed", "every_remainder", "phases", "shared"),
}
HOST_FROM = "// Launching"


@dataclass(frozen=True)
class Mutant:
    file: str
    line: int
    column: int
    before: str
    after: str
    code: str  # the line

    @property
    def change(self) -> str:
        return f"`{self.before.strip()}` to `{self.after.strip() or 'nothing'}`"

    @property
    def key(self) -> str:
        return f"{self.file}:{self.line}:{self.column} {self.change} in {self.code.strip()}"

    @property
    def orders_threads(self) -> bool:
        return self.before.startswith(("__sync", "atomic", "(kAll", "kAll")) or "^=" in self.before

    def applied_to(self, text: str) -> str:
        lines = text.split("\n")
        line = lines[self.line - 1]
        if line != self.code:
            raise reduced.ReductionError(f"mutate.py: line {self.line} of {self.file} is not `{self.code}`")
        lines[self.line - 1] = line[: self.column] + self.after + line[self.column + len(self.before) :]
        return "\n".join(lines)

    def diff(self) -> str:
        after = self.code[: self.column] + self.after + self.code[self.column + len(self.before) :]
        return f"{self.file}:{self.line}\n-{self.code}\n+{after}"


def mutants_of(file: Path, original: Path) -> Iterator[Mutant]:
    """Of the lines that reduced.py has not changed."""
    lines = file.read_text().split("\n")
    for number, (line, unchanged) in enumerate(zip(lines, original.read_text().split("\n"), strict=True), 1):
        if HOST_FROM in line:
            return
        code = COMMENT.sub("", line)
        if line != unchanged or NOT_CODE.search(code):
            continue
        for pattern, replacement in PATTERNS:
            for found in re.finditer(pattern, code):
                yield Mutant(file.name, number, found.start(), found[0], replacement(found), line)


def all_mutants() -> list[Mutant]:
    folder = build.CACHE / "mutants" / "list"
    reduced.reduce_sources(folder, "float32")
    files = [*sorted(folder.glob("cuda/*.cuh")), *sorted(folder.glob("cuda/*.cu"))]
    mutants = [m for file in files for m in mutants_of(file, reduced.CSRC / "cuda" / file.name)]
    return list(dict.fromkeys(mutants))


# --------------------------------------------------------------------------------------------------
# Building


def run(command: Sequence[str | Path]) -> None:
    build.run(["timeout", "300", *command])


def masked(text: str) -> str:
    """Without what nvcc makes of a source's content to keep its internal names apart."""
    return re.sub(r"(_GLOBAL__N__|_INTERNAL_)[0-9a-f]{8}|_cu_[0-9a-f]{8}", "", text)


class Unit:
    """A source as compiled: its PTX, the translated files, and their objects."""

    def __init__(self, source: Path, folder: Path, flavour: str, base: Unit | None = None) -> None:
        folder.mkdir()
        launch = folder / "launch.o"
        command = [f"{build.cuda_home()}/bin/nvcc", "-std=c++17", "-O3", "-lineinfo", "-Xcompiler=-fPIC"]
        virtual = ["-gencode=arch=compute_80,code=compute_80", *(f"-D{name}" for name in reduced.DEFINED)]
        run([*command, *virtual, "-c", source, "-keep", "-keep-dir", folder, "-o", launch])
        name = build.digest(source.name)[:8]
        run(["objcopy", "--redefine-sym", f"__cudaRegisterFatBinary=cuda_module_{name}", launch])
        ptx = folder / f"{source.stem}.ptx"
        text = ptx.read_text().replace(str(source.parents[1]), "csrc")
        ptx.write_text(text)
        self.ptx = masked(text)
        self.objects = [launch]
        self.texts: dict[str, Path] = {}
        if base is not None and self.ptx == base.ptx:
            return  # there is nothing to run
        translated = folder / "translated"
        translated.mkdir()
        run([sys.executable, build.TRANSLATOR[0], ptx, translated, name, str(CHUNK_BYTES)])
        for file in sorted(translated.glob("*.cpp")):
            # A variable's C++ symbol must not tell mutants apart: objects of the base refer to it.
            text = re.sub(r"\bvariable_\w+", lambda found: masked(found[0]), file.read_text())
            file.write_text(text)
            content = text if file.name == "module.cpp" else masked(text)
            known = base.texts.get(content) if base else None
            if known is None:
                known = file.with_suffix(".o")
                run(["g++", "-std=c++17", "-fPIC", *build.kernel_flags(flavour), "-c", file, "-o", known])
            self.texts[content] = known
            self.objects.append(known)


class Base:
    """The sources unchanged, for a dtype and a flavour: mutants take from it what they leave alone."""

    def __init__(self, dtype: str, flavour: str) -> None:
        self.flavour = flavour
        self.folder = build.CACHE / "mutants" / f"{dtype}_{flavour}"
        shutil.rmtree(self.folder, ignore_errors=True)
        self.sources = self.folder / "csrc"
        reduced.reduce_sources(self.sources, dtype)
        files = sorted(self.sources.glob("cuda/*.cu"))
        with ThreadPoolExecutor(2) as pool:
            units = pool.map(lambda file: Unit(file, self.folder / file.stem, flavour), files)
            self.units = {file.name: unit for file, unit in zip(files, units, strict=True)}
        self.others = reduced.host_objects(self.sources, flavour)
        self.traffic = ""
        if flavour == "stats":
            self.traffic = traffic_of(self.link(self.units, self.folder), dtype)
            if not self.traffic.startswith("|"):  # then no mutant's could differ from it
                raise build.BuildError(f"no traffic of the kernels unchanged: {self.traffic}")

    def affected(self, mutant: Mutant) -> list[str]:
        for_all = ("numeric.cuh", "reduce.cuh", "shifted.cuh")
        begin = "" if mutant.file in for_all else mutant.file.removesuffix(".cuh")
        return [name for name in self.units if name.startswith(begin) and name != "runtime.cu"]

    def build(self, mutant: Mutant, name: str, folder: Path) -> Path | None:
        """A library where one source has the mutant, or None where the compiler makes the same of it."""
        sources = folder / "csrc"
        shutil.copytree(self.sources, sources)
        file = sources / "cuda" / mutant.file
        file.write_text(mutant.applied_to(file.read_text()))
        unit = Unit(sources / "cuda" / name, folder / Path(name).stem, self.flavour, self.units[name])
        if unit.ptx == self.units[name].ptx:
            return None
        return self.link({**self.units, name: unit}, folder)

    def link(self, units: dict[str, Unit], folder: Path) -> Path:
        objects = [path for unit in units.values() for path in unit.objects]
        flags = [*build.FLAVOURS[self.flavour][2], f"-L{TORCH_LIB_PATH}", "-ltorch_cpu"]
        return build.link_objects(folder / "linked.so", [*objects, *self.others], flags)


# --------------------------------------------------------------------------------------------------
# Running


def result_within(
    seconds: float, command: Sequence[str], env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str] | None:
    """Of a command, with what it says; None where it does not end."""
    try:
        return subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=seconds, errors="replace"
        )
    except subprocess.TimeoutExpired:
        return None


def notices(library: Path, name: str, dtype: str, flavour: str, orders: str, seconds: float) -> str | None:
    """What the cases say of a library with a mutant in the source `name`, or None."""
    groups = GROUPS_OF.get(flavour) or next(g for begin, g in CASES_OF.items() if name.startswith(begin))
    options = ["--first", "--order", *orders, "--groups", *groups]
    command = [sys.executable, str(CASES), str(library), dtype, *options]
    result = result_within(seconds, command, environment(flavour))
    if result is None:
        return "it does not end"
    said = result.stdout + result.stderr
    if "Could not load this library" in said:  # no mutant's doing, and no proof that a case notices it
        raise build.BuildError(said)
    if result.returncode == 0 and "WARNING: ThreadSanitizer" not in said:
        return None
    first = re.search(r"FAILED in order.*?(?=: Traceback)|ERROR: AddressSanitizer.*|WARNING: Thread.*", said)
    return (first[0] if first else f"exit code {result.returncode}: {said[-300:]}")[:400]


def traffic_of(library: Path, dtype: str) -> str:
    """The tables of what the kernels of a library move and execute, or why there are none."""
    command = [sys.executable, str(REPORT), "--library", str(library), "--dtypes", dtype]
    result = result_within(400, command)
    if result is None:
        return "it does not end"
    return result.stdout if result.returncode == 0 else f"exit code {result.returncode}"


def moves_otherwise(before: str, after: str) -> str | None:
    """The first line of the tables that a mutant changes, or None."""
    if before == after:
        return None
    lines = before.splitlines()
    changed = [line for line in after.splitlines() if line not in lines]
    return f"the traffic or the work is another: {changed[0] if changed else after}"


class Judge:
    """Stages, from what finds most for the least time."""

    def __init__(self, dtypes: Sequence[str], quick: bool) -> None:
        self.dtypes = dtypes[:1] if quick else dtypes
        self.quick = quick
        self.bases: dict[tuple[str, str], Base] = {}
        self.lock = threading.Lock()

    def base(self, dtype: str, flavour: str) -> Base:
        with self.lock:
            if (dtype, flavour) not in self.bases:
                self.bases[dtype, flavour] = Base(dtype, flavour)
            return self.bases[dtype, flavour]

    def stages(self, mutant: Mutant) -> Iterator[tuple[str, str, str]]:
        orders = "012" if mutant.orders_threads else "2"
        yield self.dtypes[0], "plain", orders
        if self.quick:
            return
        yield self.dtypes[0], "tsan" if mutant.orders_threads else "asan", "2"
        for dtype in self.dtypes[1:]:
            yield dtype, "plain", orders
        yield self.dtypes[0], "stats", "0"

    def judge(self, mutant: Mutant) -> dict[str, Any]:
        """Source by source, where a header has the mutant: the first one's cases notice most."""
        equal = True
        for dtype, flavour, orders in self.stages(mutant):
            if flavour != "plain" and equal:
                continue  # the same code for this dtype
            base = self.base(dtype, flavour)
            for name in base.affected(mutant):
                with tempfile.TemporaryDirectory(dir=base.folder) as folder:
                    try:
                        library = base.build(mutant, name, Path(folder))
                    except build.BuildError as error:
                        return {"status": "does not compile", "why": str(error)[-300:]}
                    if library is None:
                        continue
                    equal = False
                    if flavour == "stats":
                        why = moves_otherwise(base.traffic, traffic_of(library, dtype))
                    else:
                        why = notices(library, name, dtype, flavour, orders, 400)
                if why is not None:
                    return {"status": "killed", "stage": f"{dtype}, {flavour}", "why": why}
        return {"status": "same code" if equal else "survived"}


# --------------------------------------------------------------------------------------------------
# Reporting


def explained() -> dict[tuple[str, str, str], str]:
    if not SURVIVORS.exists():
        return {}
    entries = json.loads(SURVIVORS.read_text())["survivors"]
    return {(e["file"], e["code"], e["change"]): e["reason"] for e in entries}


def report(mutants: Sequence[Mutant], results: dict[str, dict[str, Any]]) -> bool:
    """Prints what became of the mutants that were judged; whether that is good enough."""
    reasons = explained()
    judged = [(m, results[m.key]) for m in mutants if m.key in results]
    counts: dict[str, int] = {}
    for _, result in judged:
        counts[result["status"]] = counts.get(result["status"], 0) + 1
    survivors = [m for m, result in judged if result["status"] == "survived"]
    unexplained = [m for m in survivors if (m.file, m.code.strip(), m.change) not in reasons]
    for mutant in survivors:
        reason = reasons.get((mutant.file, mutant.code.strip(), mutant.change), "NOT EXPLAINED")
        print(f"\nsurvived: {mutant.diff()}\n  {reason}")
    ran = counts.get("killed", 0) + len(survivors)
    share = len(survivors) / max(1, ran)
    print(f"\n{len(judged)} of {len(mutants)} mutants: {', '.join(f'{n} {s}' for s, n in counts.items())}")
    print(f"{share:.1%} of the {ran} that run survived; {len(unexplained)} of them without an explanation")
    return not unexplained and share <= LIMIT


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sample", type=int, help="as many mutants, drawn at random")
    parser.add_argument("--seed", type=int, default=1, help="of the sample")
    parser.add_argument("--file", help="mutants of this file alone")
    parser.add_argument("--list", action="store_true", help="print the mutants and run none")
    parser.add_argument("--fresh", action="store_true", help="forget the results of survivors")
    dtypes = ["float32", "bfloat16", "float16"]
    parser.add_argument("--dtypes", nargs="+", choices=reduced.TYPES, default=dtypes)
    parser.add_argument("--quick", action="store_true", help="the first stage alone: one dtype, no sanitizer")
    parser.add_argument("--minutes", type=float, help="begin no more mutants after as many")
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    mutants = [m for m in all_mutants() if given.file in (None, m.file)]
    if given.sample is not None:
        mutants = random.Random(given.seed).sample(mutants, min(given.sample, len(mutants)))
    if given.list:
        for mutant in mutants:
            print(mutant.key)
        return
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if given.fresh:
        results = {key: result for key, result in results.items() if result["status"] != "survived"}
    judge, lock = Judge(given.dtypes, given.quick), threading.Lock()
    last = time.monotonic() + 60 * given.minutes if given.minutes else float("inf")

    def decide(mutant: Mutant) -> None:
        if mutant.key in results or time.monotonic() > last:
            return
        start = time.monotonic()
        result = judge.judge(mutant)
        with lock:
            results[mutant.key] = result
            RESULTS.write_text(json.dumps(results, indent=1))
        seconds = time.monotonic() - start
        print(f"{result['status']} ({seconds:.0f} s): {mutant.key} -- {result.get('why', '')}", flush=True)

    with ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(decide, mutants))
    sys.exit(not report(mutants, results))


if __name__ == "__main__":
    main()
