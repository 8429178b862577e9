"""`perlhf compare RECIPE`: trains every cell of a grid in a process of its own, then says what they show.

A cell is one run: a stage, a side (full tuning, or adapters of a rank), a learning rate and a seed. Learning rates are
tried with the first seed (or `rate_seeds` of them) and chosen on validation groups; the other seeds take the chosen
one, and test groups are looked at for its cells alone. Finished cells are never run again. With `jobs` above 1 sides
run side by side.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import yaml

from perlhf.comparison.processes import Processes, processes
from perlhf.comparison.results import conclude, evaluation_of
from perlhf.config.comparison import CompareConfig, Side, StageName
from perlhf.config.stages import DataConfig, PolicyConfig, RewardConfig
from perlhf.data.records import Prompt
from perlhf.data.splits import check_labels, load
from perlhf.errors import RunError, visible
from perlhf.reports import comparison
from perlhf.runs.earlier import check_runs, reward_runs
from perlhf.runs.evaluations import EVALUATION, finite, mapping, read_evaluation
from perlhf.runs.manifest import CHECKPOINTS, RESULT, check_continues
from perlhf.runs.words import memory
from perlhf.system.files import (
    damaged,
    from_yaml,
    read_json,
    remove_directory,
    storage_errors,
    write_atomic,
    write_json,
)
from perlhf.system.machine import free_memory_bytes

RECIPE, FAILURES, LOGS = "compare.yaml", "failed", "logs"
MAY_GROW = ("output", "seeds", "ranks", "ranks_of_one_seed", "targets", "bootstrap", "jobs", "also_test")
"""Keys that may differ when a comparison is continued: no cell that is there depends on them.
Not the margin, which is fixed beforehand."""


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    stage: StageName
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
        DataError: a set of `also_test` can't be read, or all its ratings have one label.
        RunError: a scorer isn't finished, `output` holds another grid, `jobs` cells don't fit the memory, a cell
            stopped for a mistake (its message is shown), or all failed.
        StorageError: a file can't be written.
        KeyboardInterrupt: interrupted; the cell that was running has saved and will go on.
    """
    _check_tests(config)
    _check_memory(config)
    shown = config.model_copy(update={"jobs": _claim(config)})
    parts: dict[str, Any] = {}
    for stage in config.stages:
        chosen: dict[Side, list[Cell]] = {}
        at_once = len(config.sides) if config.jobs > 1 else 1
        # The processes are left first: what waits for them then ends, whatever it was that ended us.
        with ThreadPoolExecutor(at_once) as sides, processes(config.jobs) as run:
            running = {sides.submit(_train_side, stage, side, config, run): side for side in config.sides}
            for ended in as_completed(running):
                if cells := ended.result():
                    chosen[running[ended]] = cells
                    parts[stage] = _part(stage, chosen, shown)
                    _write(parts, config)
        if not chosen:
            raise RunError(f"no side of stage {stage} could be trained", where=str(config.output / FAILURES))
    return parts


def _train_side(stage: StageName, side: Side, config: CompareConfig, run: Processes) -> list[Cell]:
    """Trains a side's cells; those of the chosen learning rate that didn't fail, evaluated."""
    rates_and_seeds = product(config.rates(side), config.rate_seeds_of(side))
    tried = [Cell(stage, side, rate, seed) for rate, seed in rates_and_seeds]
    _each(_train, tried, config, run)
    rate = choose(tried, config)
    if rate is None:
        return []
    seeds = [Cell(stage, side, rate, seed) for seed in config.seeds_of(side)]
    _each(_train, seeds, config, run)
    finished = [cell for cell in seeds if _value(cell, config) is not None]
    _each(_evaluate, finished, config, run)
    return finished


def _each(
    work: Callable[[Cell, CompareConfig, Processes], None], cells: Sequence[Cell], config: CompareConfig, run: Processes
) -> None:
    for job in [run.submit(work, cell, config, run) for cell in cells]:
        job.result()


def _part(stage: StageName, chosen: Mapping[Side, Sequence[Cell]], config: CompareConfig) -> dict[str, Any]:
    """The part of compare.json about a stage, from the sides that have finished."""
    sides = [side for side in config.sides if side in chosen]
    runs = {side.name: [config.output / cell.name for cell in chosen[side]] for side in sides}
    diverged = {side.name: len(config.seeds_of(side)) - len(chosen[side]) for side in sides}
    return {**conclude(stage, runs, config, diverged), "tried": _tried(stage, config)}


def cells(config: CompareConfig) -> list[list[str]]:
    """What would be run: stage, side, learning rates, seeds, estimated peak memory and number of runs for each side.

    Raises:
        RunError, DataError, ModelError, AdapterError: as `plan.plan` of a cell.
    """
    _check_tests(config)
    rows = []
    for stage in config.stages:
        for side in config.sides:
            tried = ", ".join(f"{rate:g}" for rate in config.rates(side))
            seeds = ", ".join(map(str, config.seeds_of(side)))
            size = memory(_memory_bytes(stage, side, config))
            rows.append([stage, side.name, tried, seeds, size, str(config.runs(side))])
    return rows


def _check_tests(config: CompareConfig) -> None:
    """Looks for what cells are tested with before any is trained."""
    check_runs("scorers", reward_runs(config.scorers))
    if config.scorers and config.policy is not None:
        from perlhf.rollout.scorers import load_functions  # imports torch, as `_memory_bytes` says

        prompts = cast("Sequence[Prompt]", load(config.policy.data, ("prompt",), "test"))
        load_functions(config.scorers, "scorers", prompts)
    for path in config.also_test:
        data = DataConfig(paths=(path,))
        check_labels(load(data, ("comparison", "rating"), "all"), data)


def _memory_bytes(stage: StageName, side: Side, config: CompareConfig) -> int:
    """Estimated peak of a cell."""
    from perlhf.training.plan import plan  # imports torch, which reading and reporting a grid do without

    values = Cell(stage, side, config.rates(side)[0], config.seeds[0]).recipe(config)
    return plan(RewardConfig(**values) if stage == "reward" else PolicyConfig(**values)).total_bytes


def _check_memory(config: CompareConfig) -> None:
    """Refuses more cells at a time than memory has room for, the largest together."""
    for stage in config.stages if config.jobs > 1 else ():
        sizes = []
        for side in config.sides:
            tried = len(config.rate_seeds_of(side))
            most = max(len(config.rates(side)) * tried, len(config.seeds_of(side)) - tried)
            sizes += most * [_memory_bytes(stage, side, config)]
        needed = sum(sorted(sizes)[-config.jobs :])
        free = free_memory_bytes(config.stage(stage).device)
        if free is not None and needed > free:
            raise RunError(
                f"{config.jobs} cells of stage {stage} need about {memory(needed)} together, {memory(free)} are free",
                where="jobs",
                allowed=f"the {config.jobs} largest cells, as --dry-run estimates them, within what is free",
                hint="lower jobs, or tokens_per_microbatch of the stage",
            )


def choose(tried: Sequence[Cell], config: CompareConfig) -> float | None:
    """The learning rate that is best on validation groups, on the mean of its seeds, of equal ones the lowest.

    A rate that failed with a seed is none to choose; None if there is no other.
    """
    means = {}
    for rate in {cell.learning_rate for cell in tried}:
        values = [_value(cell, config) for cell in tried if cell.learning_rate == rate]
        known = [value for value in values if value is not None]
        if len(known) == len(values):
            means[rate] = fmean(known)
    return max(means, key=lambda rate: (means[rate], -rate), default=None)


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


def _tried(stage: StageName, config: CompareConfig) -> list[dict[str, Any]]:
    """Every learning rate with the seeds that it was tried with, and later seeds that diverged."""
    rows = []
    for side in config.sides:
        for rate, seed in product(config.rates(side), config.seeds_of(side)):
            cell = Cell(stage, side, rate, seed)
            failed = config.output / FAILURES / f"{cell.name}.json"
            tried = seed in config.rate_seeds_of(side) and (config.output / cell.name / RESULT).exists()
            if tried or failed.exists():
                row = {"side": side.name, "learning_rate": rate, "seed": seed, "validation": _value(cell, config)}
                rows.append(row | {"failed": read_json(failed)["message"] if failed.exists() else None})
    return rows


def _claim(config: CompareConfig) -> int:
    """Writes compare.yaml, or refuses a directory that holds the cells of another grid; the most `jobs` so far."""
    values, path = json.loads(config.model_dump_json()), config.output / RECIPE
    with storage_errors(config.output):
        config.output.mkdir(parents=True, exist_ok=True)
        if path.exists():
            then = _grid_of(path)
            values["jobs"] = max(values["jobs"], then["jobs"])
            check_continues(path, then, values, MAY_GROW, "comparison", "--output")
        elif any(config.output.iterdir()):
            raise RunError("the directory isn't empty and holds no comparison", where=str(config.output))
        for folder in (FAILURES, LOGS):
            (config.output / folder).mkdir(exist_ok=True)
    write_atomic(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    return values["jobs"]


def _grid_of(path: Path) -> dict[str, Any]:
    """compare.yaml of the comparison that is continued."""
    try:
        grid = from_yaml(path.read_bytes())
    except ValueError as error:
        raise damaged(path, str(error)) from error
    if not isinstance(grid, dict) or not isinstance(grid.setdefault("jobs", 1), int):
        raise damaged(path, "it is no comparison")
    return grid


def _train(cell: Cell, config: CompareConfig, processes: Processes) -> None:
    run, failed = config.output / cell.name, config.output / FAILURES / f"{cell.name}.json"
    if failed.exists() or (run / RESULT).exists():
        return
    print(visible(f"cell {_place(cell, config)}: {cell.name}"), file=sys.stderr)
    recipe = config.output / LOGS / f"{cell.name}.yaml"
    write_atomic(recipe, yaml.safe_dump(cell.recipe(config), sort_keys=False, allow_unicode=True))
    code, message = processes.perlhf([cell.stage, str(recipe)], config.output / LOGS / f"{cell.name}.log")
    if code == 3:
        write_json(failed, {"exit_code": code, "message": message})
        print(visible(f"  {cell.name} stopped, and counts as failed: {message}", lines=True), file=sys.stderr)
    elif code:
        raise RunError(f"the cell stopped with exit code {code}: {message}", where=cell.name)
    else:
        remove_directory(run / CHECKPOINTS)  # a finished cell of full tuning would keep gigabytes


def _place(cell: Cell, config: CompareConfig) -> str:
    """Which of all cells this is, counted by those that have started."""
    started = {log.stem for log in (config.output / LOGS).glob("*.log")} | {cell.name}
    return f"{len(started)}/{sum(map(config.runs, config.sides)) * len(config.stages)}"


def _evaluate(cell: Cell, config: CompareConfig, processes: Processes) -> None:
    run = config.output / cell.name
    options = []
    if cell.stage == "policy":
        options += ["--prompts", str(config.prompts), *(["--reward", *config.scorers] if config.scorers else [])]
    wanted: list[tuple[str, list[str] | None, list[str]]] = [(EVALUATION, None, options)]
    for path in config.also_test if cell.stage == "reward" else ():
        others = ["--data.paths", path, "--data.format", "auto", "--split", "all"]
        wanted.append((evaluation_of(path), [path], others))
    for file, data, asked in wanted:
        if (run / file).exists() and read_evaluation(run / file).data == data:
            continue
        words = ["evaluate", str(run), "--bootstrap", str(config.bootstrap), "--output", str(run / file), *asked]
        code, message = processes.perlhf(words, config.output / LOGS / f"{cell.name}.log")
        if code:
            raise RunError(f"its evaluation stopped with exit code {code}: {message}", where=cell.name)


def _write(parts: dict[str, Any], config: CompareConfig) -> None:
    write_json(config.output / "compare.json", parts)
    write_atomic(config.output / "compare.html", comparison.render(parts, config.output.name))
