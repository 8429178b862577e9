"""Damages files of one kind after another and sees that every command ends as a person's mistake does.

    python scripts/fuzz.py [--kind recipes ...] [--seed 0] [--cases 1000]

`make fuzz` runs it; a short form of it is in the test suite. Each failure is printed with the options that give that
case again; the exit code is 1 when there was any.
"""

import argparse
import resource
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1] / "tests" / "unit"
sys.path[:0] = [str(TESTS)]
MEMORY_BYTES = 32 * 2**30
"""A damaged shape must not take the machine's memory."""


def main() -> int:
    """Exit code: 0 when each case ended as it should."""
    import fuzz_targets
    import torch
    from tiny_base import make_tiny_base

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", nargs="+", choices=list(fuzz_targets.MAKERS), default=list(fuzz_targets.MAKERS))
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the others follow")
    parser.add_argument("--cases", type=int, default=1000, help="of each kind")
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, resource.RLIM_INFINITY))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    failed = 0
    with tempfile.TemporaryDirectory(prefix="perlhf-fuzz-") as directory:
        tiny_base = make_tiny_base(Path(directory, "tiny"))
        for kind in options.kind:
            base = fuzz_targets.make(kind, Path(directory, "whole", kind), tiny_base)
            began, codes = time.monotonic(), Counter[str]()
            for seed in range(options.seed, options.seed + options.cases):
                try:
                    code = str(fuzz_targets.check(kind, base, seed, Path(directory, "work", "case")))
                except fuzz_targets.Failed as error:
                    code = "failed"
                    print(error, "\n")
                codes[code] += 1
            failed += codes["failed"]
            counts = ", ".join(f"{count} {code}" for code, count in sorted(codes.items()))
            print(f"{kind}: {options.cases} cases in {time.monotonic() - began:.0f} s: {counts}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
