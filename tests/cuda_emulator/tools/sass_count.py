"""Counts memory, shuffle, barrier and special-function instructions of each kernel in machine code.

python sass_count.py LISTING, where LISTING is what `nvdisasm kernels.cubin` prints. It shows what PTX cannot:
whether a vector store stayed whole (STG.E.128), and what spilled (LDL, STL).
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

KERNEL = re.compile(r"\s*\.section\s+\.text\.([\w$]+)")
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)")
COUNTED = re.compile(
    r"LDG|STG|LDS|STS|LDL|STL|LD\.|ST\.|RED|ATOM|LDGSTS|UBLK|BAR|WARPSYNC|DEPBAR|MEMBAR|SHFL|MUFU|F2F|F2I|I2F|CALL"
)


def count(listing: str) -> dict[str, tuple[int, Counter[str]]]:
    """Of each kernel: all instructions, and those that are counted apart."""
    kernels: dict[str, tuple[int, Counter[str]]] = {}
    name = None
    for line in listing.splitlines():
        if match := KERNEL.match(line):
            name = match[1]
            kernels[name] = (0, Counter())
        elif name is not None and (match := INSTRUCTION.search(line)):
            total, counted = kernels[name]
            if COUNTED.match(match[1]):
                counted[match[1]] += 1
            kernels[name] = (total + 1, counted)
    return kernels


def demangle(names: list[str]) -> list[str]:
    return subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True).stdout.splitlines()


def main() -> None:
    kernels = count(Path(sys.argv[1]).read_text())
    for name, (total, counted) in zip(demangle(list(kernels)), kernels.values(), strict=True):
        print(f"{name}: {total} instructions")
        for instruction, times in sorted(counted.items()):
            print(f"  {times:5} {instruction}")


if __name__ == "__main__":
    main()
