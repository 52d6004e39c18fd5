"""Runs tests/cuda_cases.py on kernels built for each sanitizer, and in every order of blocks and threads.

python -m cuda_emulator.sanitize [--dtypes float32 ...] [--flavours plain asan tsan]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from .build import SANITIZER_OPTIONS
from .control import ORDERS, RANDOM
from .reduced import TYPES, library

CASES = Path(__file__).parents[1] / "cuda_cases.py"
PRELOADED = {"plain": [], "asan": ["libasan", "libstdc++"], "tsan": ["libtsan", "libstdc++"]}
ORDERS_OF = {"plain": ORDERS, "asan": (RANDOM,), "tsan": (RANDOM,)}
# Where rows begin and end matters to addresses, not to what threads share; and TSan is slow.
GROUPS_OF = {"tsan": ("shared",)}


def environment(flavour: str) -> dict[str, str]:
    """Sanitizers have to be there before Python, and libstdc++ with them, whose throw they wrap."""
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}.so"], capture_output=True, text=True, check=True)
        for name in PRELOADED[flavour]
    ]
    preload = {"LD_PRELOAD": " ".join(found.stdout.strip() for found in libraries)} if libraries else {}
    return {**os.environ, **SANITIZER_OPTIONS, **preload}


def command(built: Path, dtype: str, flavour: str) -> list[str]:
    orders = [str(order) for order in ORDERS_OF[flavour]]
    groups = ["--groups", *GROUPS_OF[flavour]] if flavour in GROUPS_OF else []
    return [sys.executable, str(CASES), str(built), dtype, "--order", *orders, *groups]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtypes", nargs="+", choices=TYPES, default=list(TYPES))
    parser.add_argument("--flavours", nargs="+", choices=PRELOADED, default=list(PRELOADED))
    given = parser.parse_args()
    failed = []
    for dtype in given.dtypes:
        for flavour in given.flavours:
            start = time.monotonic()
            built = library(dtype, flavour)
            ready = time.monotonic()
            result = subprocess.run(
                command(built, dtype, flavour), env=environment(flavour), capture_output=True, text=True
            )
            said = result.stdout + result.stderr
            right = result.returncode == 0 and "WARNING: ThreadSanitizer" not in said
            seconds = f"built in {ready - start:.0f} s, ran {time.monotonic() - ready:.0f} s"
            print(f"{dtype}, {flavour}: {'passed' if right else 'FAILED'} ({seconds})", flush=True)
            if not right:
                failed.append((dtype, flavour))
                print(said, flush=True)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
