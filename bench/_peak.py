"""The peak of one implementation in one case, for run.py, which starts this as a process of its own.

python bench/_peak.py LOSS CASE IMPLEMENTATION {backward,forward} THREADS
"""

import importlib
import json
import sys

import torch
from _measure import Cpu, make_step, with_own_leaves
from run import implementations, peak_of


def main(loss: str, name: str, implementation: str, mode: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    meter = Cpu()
    meter.map_each_block(True)  # from the start, or the tensors that are made here would leave holes, too
    module = importlib.import_module(loss)
    case = next(case for case in (*module.CASES, *module.QUICK) if case.name == name)
    backward = mode == "backward"
    arguments, leaves = with_own_leaves(case.arguments(meter.device), backward, copy=False)
    step = make_step(implementations(module, case, "cpu")[implementation], arguments, leaves, backward)
    # No step before: the first reading, which sees what a first step loads, is not the lowest.
    print(json.dumps(peak_of(meter, step, leaves, backward)))


if __name__ == "__main__":
    main(*sys.argv[1:])
