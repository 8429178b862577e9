"""`perlhf compare RECIPE`: trains every cell of a grid in a process of its own, then says what they show.

A cell is one run: a stage, a side (full tuning, or adapters of a rank), a learning rate and a seed. Learning rates are
tried with the first seed and chosen on validation groups; the other seeds take the chosen one, and test groups are
looked at for those cells alone. Finished cells are never run again.
"""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from perlhf.compare_result import summarise
from perlhf.config import PolicyConfig, RewardConfig
from perlhf.config_compare import CompareConfig, Side, Stage
from perlhf.errors import RunError
from perlhf.plan import plan
from perlhf.report import comparison
from perlhf.run_directory import RESULT, first_difference, read_json, strict_json
from perlhf.run_files import EVALUATION, finite, mapping, memory
from perlhf.storage import storage_errors, write_atomic

RECIPE, FAILURES, LOGS = "compare.yaml", "failed", "logs"
MESSAGE_LINES = 20
MAY_GROW = ("output", "seeds", "ranks", "ranks_of_one_seed", "targets", "bootstrap")
"""Keys that may differ when a comparison is continued: no cell that is there depends on them.
Not the margin, which is fixed beforehand."""


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    stage: Stage
    side: Side
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """Its directory below the grid's."""
        return f"{self.stage}-{self.side.name}-lr{self.learning_rate:g}-seed{self.seed}"

    def recipe(self, config: CompareConfig) -> dict[str, Any]:
        """The stage's recipe with what the cell sets."""
        values = config.stage(self.stage).model_dump(mode="json")
        values |= {"run": str(config.output / self.name), "seed": self.seed}
        values["tuning"] = "lora" if self.side.rank else "full"
        values["optim"]["learning_rate"] = self.learning_rate
        if self.side.rank:
            values["adapter"] |= {"rank": self.side.rank, "targets": self.side.targets}
        return values


def compare(config: CompareConfig) -> dict[str, Any]:
    """Runs what is missing of the grid; writes compare.json and compare.html after every side; returns the former.

    Raises:
        RunError: `output` holds another grid, a cell stopped for a mistake (its message is shown), or all failed.
        StorageError: a file can't be written.
        KeyboardInterrupt: interrupted; the cell that was running has saved and will go on.
    """
    _claim(config)
    total = sum(map(config.runs, config.sides)) * len(config.stages)
    done, found = 0, {}
    for stage in config.stages:
        chosen: dict[Side, list[Cell]] = {}
        for side in config.sides:
            tried = [Cell(stage, side, rate, config.seeds[0]) for rate in config.rates(side)]
            for cell in tried:
                done += 1
                _train(cell, config, f"{done}/{total}")
            best = choose(tried, config)
            if best is None:
                done += len(config.more_seeds(side))
                continue
            rest = [Cell(stage, side, best.learning_rate, seed) for seed in config.more_seeds(side)]
            for cell in rest:
                done += 1
                _train(cell, config, f"{done}/{total}")
            chosen[side] = [cell for cell in (best, *rest) if _value(cell, config) is not None]
            for cell in chosen[side]:
                _evaluate(cell, config)
            runs = {one.name: [config.output / cell.name for cell in cells] for one, cells in chosen.items() if cells}
            found[stage] = {**summarise(stage, runs, config), "tried": _tried(stage, config)}
            _write(found, config)
        if not chosen:
            raise RunError(f"no side of stage {stage} could be trained", where=str(config.output / FAILURES))
    return found


def cells(config: CompareConfig) -> list[list[str]]:
    """What would be run: stage, side, learning rates, seeds, estimated peak memory and number of runs for each side.

    Raises:
        RunError, DataError, ModelError, AdapterError: as `plan.plan` of a cell.
    """
    rows = []
    for stage in config.stages:
        for side in config.sides:
            rates = config.rates(side)
            values = Cell(stage, side, rates[0], config.seeds[0]).recipe(config)
            planned = plan(RewardConfig(**values) if stage == "reward" else PolicyConfig(**values))
            tried = ", ".join(f"{rate:g}" for rate in rates)
            seeds = ", ".join(map(str, (config.seeds[0], *config.more_seeds(side))))
            rows.append([stage, side.name, tried, seeds, memory(planned.total_bytes), str(config.runs(side))])
    return rows


def choose(tried: Sequence[Cell], config: CompareConfig) -> Cell | None:
    """The cell that is best on validation groups, of equal ones the one with the lowest rate; None if all failed."""
    values = {cell: value for cell in tried if (value := _value(cell, config)) is not None}
    return max(values, key=lambda cell: (values[cell], -cell.learning_rate), default=None)


def _value(cell: Cell, config: CompareConfig) -> float | None:
    """What a finished cell reached on validation groups, more being better; None of one that failed."""
    if (config.output / FAILURES / f"{cell.name}.json").exists():
        return None
    result = read_json(config.output / cell.name / RESULT)
    if cell.stage == "policy":
        return finite(mapping(result.get("after")).get("reward"))
    reached, stage = mapping(result.get("validation")), config.reward
    assert isinstance(stage, RewardConfig)
    wanted = ["auc", "pairwise_accuracy"] if stage.select == "auto" else [stage.select]
    values = [value for key in wanted if (value := finite(reached.get(key))) is not None]
    return None if not values else -values[0] if stage.select == "loss" else values[0]


def _tried(stage: Stage, config: CompareConfig) -> list[dict[str, Any]]:
    """Every learning rate that was tried, and where it led."""
    rows = []
    for side in config.sides:
        for rate in config.rates(side):
            cell = Cell(stage, side, rate, config.seeds[0])
            failed = config.output / FAILURES / f"{cell.name}.json"
            if failed.exists() or (config.output / cell.name / RESULT).exists():
                row = {"side": side.name, "learning_rate": rate, "seed": cell.seed, "validation": _value(cell, config)}
                rows.append(row | {"failed": read_json(failed)["message"] if failed.exists() else None})
    return rows


def _claim(config: CompareConfig) -> None:
    """Writes compare.yaml, or refuses a directory that holds the cells of another grid."""
    values, path = json.loads(config.model_dump_json()), config.output / RECIPE
    with storage_errors(config.output):
        config.output.mkdir(parents=True, exist_ok=True)
        if path.exists():
            then = yaml.safe_load(path.read_text(encoding="utf-8"))
            old, new = ({key: value for key, value in one.items() if key not in MAY_GROW} for one in (then, values))
            if difference := first_difference(old, new):
                key, before, now = difference
                raise RunError(
                    f"{key} is {now!r}, but {before!r} in the comparison that is here",
                    where=str(path),
                    allowed=f"only {', '.join(MAY_GROW)} may change when a comparison continues",
                    hint="name another --output",
                )
        elif any(config.output.iterdir()):
            raise RunError("the directory isn't empty and holds no comparison", where=str(config.output))
        for folder in (FAILURES, LOGS):
            (config.output / folder).mkdir(exist_ok=True)
    write_atomic(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def _train(cell: Cell, config: CompareConfig, number: str) -> None:
    run, failed = config.output / cell.name, config.output / FAILURES / f"{cell.name}.json"
    if failed.exists() or (run / RESULT).exists():
        return
    print(f"cell {number}: {cell.name}", file=sys.stderr)
    recipe = config.output / LOGS / f"{cell.name}.yaml"
    write_atomic(recipe, yaml.safe_dump(cell.recipe(config), sort_keys=False, allow_unicode=True))
    code, message = _perlhf([cell.stage, str(recipe)], config.output / LOGS / f"{cell.name}.log")
    if code == 3:
        write_atomic(failed, strict_json({"exit_code": code, "message": message}, indent=2) + "\n")
        print(f"  it stopped, and counts as failed: {message}", file=sys.stderr)
    elif code:
        raise RunError(f"the cell stopped with exit code {code}: {message}", where=cell.name)


def _evaluate(cell: Cell, config: CompareConfig) -> None:
    run = config.output / cell.name
    if (run / EVALUATION).exists():
        return
    options = ["--bootstrap", str(config.bootstrap)]
    if cell.stage == "policy":
        options += ["--prompts", str(config.prompts), *(["--reward", *config.scorers] if config.scorers else [])]
    code, message = _perlhf(["evaluate", str(run), *options], config.output / LOGS / f"{cell.name}.log")
    if code:
        raise RunError(f"its evaluation stopped with exit code {code}: {message}", where=cell.name)


def _perlhf(arguments: Sequence[str], log: Path) -> tuple[int, str]:
    """Runs a command in a process of its own, whose peak memory is thus its own; its exit code and error message.

    Its progress is shown; what it prints goes to `log`.
    """
    message: list[str] = []
    with (
        storage_errors(log),
        log.open("ab") as output,
        subprocess.Popen(
            [sys.executable, "-m", "perlhf", *arguments],
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # a terminal's Ctrl-C reaches it through `_ended` alone, once
        ) as process,
        _ended(process),
    ):
        assert process.stderr is not None
        for line in process.stderr:
            sys.stderr.write(line)
            if line.startswith("error: "):
                message = []
            message.append(line.removeprefix("error: ").rstrip())
        code = process.wait()
    if code in (130, -signal.SIGINT):
        raise KeyboardInterrupt
    return code, "\n".join(message[-MESSAGE_LINES:])


@contextmanager
def _ended(process: "subprocess.Popen[str]") -> Iterator[None]:
    """When we are interrupted or ended, the process saves and ends first."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _write(found: dict[str, Any], config: CompareConfig) -> None:
    write_atomic(config.output / "compare.json", strict_json(found, indent=2) + "\n")
    write_atomic(config.output / "compare.html", comparison.render(found, config.output.name))
