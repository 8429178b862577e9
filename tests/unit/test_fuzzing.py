"""A short form of `make fuzz`: fixed seeds, so many cases as take some seconds a kind."""

from pathlib import Path

import fuzz_targets
import pytest

CASES = {"recipes": 80, "data": 100, "archives": 200, "checkpoints": 15, "models": 40, "adapters": 40, "runs": 60}


@pytest.mark.parametrize("kind", CASES)
def test_whatever_a_file_holds_a_command_ends_as_a_mistake_does(kind: str, tiny_base: Path, tmp_path: Path) -> None:
    base = fuzz_targets.make(kind, tmp_path / "whole", tiny_base)
    codes = {fuzz_targets.check(kind, base, seed, tmp_path / "work" / "case") for seed in range(CASES[kind])}
    assert 2 in codes, "no file was damaged"
    if kind != "archives":
        assert 0 in codes, "no command does its work"
