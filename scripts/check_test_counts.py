"""Fails when fewer tests ran than are collected, or when one was skipped that this machine could have run.

    python scripts/check_test_counts.py COLLECTED JUNIT

COLLECTED is the output of `pytest --collect-only --quiet`, JUNIT the result of `pytest --junitxml`. With $CI set and
the real feedback files beside the repository, only tests of what this machine doesn't have may be skipped: those
below tests/gpu, and those of AMX where no processor has it.
"""

import os
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

DATA = Path(os.environ.get("PERLHF_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")


def main(collected: Path, junit: Path) -> int:
    """Exit code: 0 when all is well, 1 with one line for each complaint."""
    expected = {line for line in collected.read_text(encoding="utf-8").splitlines() if "::" in line}
    cases = list(ElementTree.parse(junit).iter("testcase"))
    skipped = [case for case in cases if case.find("skipped") is not None]
    # A test that fails, and again when it is torn down, has two entries: names are counted, not entries.
    names = {name_of(case) for case in cases}
    failed = {name_of(case) for case in cases if case.find("failure") is not None or case.find("error") is not None}
    complaints = []
    if not expected or len(names) < len(expected):
        complaints.append(f"{len(names)} tests ran of {len(expected)} collected")
    if os.environ.get("CI") and (DATA / "MANIFEST.json").is_file():
        complaints += [f"skipped: {name_of(case)}: {reason_of(case)}" for case in skipped if not excused(case)]
    passed = len(names) - len(skipped) - len(failed)
    print(f"{len(expected)} collected, {passed} passed, {len(failed)} failed, {len(skipped)} skipped")
    for complaint in complaints:
        print(f"error: {complaint}", file=sys.stderr)
    return 1 if complaints else 0


def name_of(case: ElementTree.Element) -> str:
    """`tests.unit.test_x::test_y`."""
    return f"{case.get('classname')}::{case.get('name')}"


def reason_of(case: ElementTree.Element) -> str:
    """Why a test was skipped."""
    skipped = case.find("skipped")
    return (skipped.get("message") or "") if skipped is not None else ""


def excused(case: ElementTree.Element) -> bool:
    """Whether a test may be skipped, because this machine lacks what it needs."""
    on_gpu = (case.get("classname") or "").startswith("tests.gpu.")
    return on_gpu or ("no AMX" in reason_of(case) and not has_amx())


def has_amx(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the processor multiplies bfloat16 tiles; true where that can't be read, so that nothing is excused."""
    return not cpuinfo.is_file() or "amx_bf16" in cpuinfo.read_text(encoding="utf-8").split()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
