"""Reward training beside other jobs: HH tokens a second while 0, 1 and 2 busy loops run, ours and TRL's.

    python benchmarks/busy.py                      # settings of ours and TRL, 0 to 2 loops: about 8 minutes
    python benchmarks/busy.py --sides short default --loads 0 2 --rounds 3

A side is a process that sets itself up and then makes its update whenever it is told to. All sides live at once (some
10 GB) and take turns, one update each under every load, so that what else the machine does meets all of them alike; the
others sleep. Shown are medians: tokens a second, the share of the side's own rate beside nothing, and of our `short`
setting's rate. Tokens are those of the examples, padding left out and what is shared counted for each, so that sides do
equal work.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import harness
from perlhf.system import before_torch
from perlhf.system.before_torch import SHORT_SPIN, SPIN_VARIABLES

SIDES: dict[str, dict[str, str]] = {
    "short": SHORT_SPIN,
    "default": {"KMP_BLOCKTIME": "200"},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "none": {"GOMP_SPINCOUNT": "0"},
    "long": {"GOMP_SPINCOUNT": "50000"},
    "one thread": SHORT_SPIN | {"OMP_NUM_THREADS": "1"},
    "trl": {"KMP_BLOCKTIME": "200"},
}
"""What each has in its environment; `default` and `trl` have what OpenMP does by itself, `short` is ours."""
PAIRS = 4
"""In an update: a few seconds on two cores."""


def ours(turns: Iterator[None]) -> None:
    """An update of the reward stage a turn."""
    import reward
    from perlhf.model.open import new_adapter
    from perlhf.training import optim
    from perlhf.training import reward as stage

    config = reward._config("hh")
    model, _, items, _ = reward._examples(config)
    adapter = new_adapter(model, stage.NAME, "reward", config)
    trained = {stage.NAME: (adapter.trainable_by_name(), reward.LEARNING_RATE)}
    optimizer = optim.build(trained, config.optim)[stage.NAME]

    for _ in turns:
        began = time.perf_counter()
        given = {True: 1.0, False: 1.0}, stage.Shares(1.0, 0.0), 1, 10, config
        stage._update(model, [adapter], {adapter.name: optimizer}, items[:PAIRS], *given)
        _tell(_tokens(items[:PAIRS]), began)


def trl(turns: Iterator[None]) -> None:
    """TRL's RewardTrainer on the same pairs, one step a turn, without logs and checkpoints."""
    import tempfile

    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import RewardConfig, RewardTrainer  # pyright: ignore[reportMissingImports]  of the extra `bench`

    import reward

    config = reward._config("hh")
    model, encoder, items, _ = reward._examples(config)
    dtype = model.dtype
    del model
    pairs = [item.sequences for item in items[:PAIRS]]
    rows = [{"chosen_ids": list(chosen.ids), "rejected_ids": list(rejected.ids)} for chosen, rejected in pairs]

    class Turns(TrainerCallback):
        began = 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **ignored: Any) -> None:
            if next(turns, StopIteration) is StopIteration:
                sys.exit()
            self.began = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **ignored: Any) -> None:
            _tell(_tokens(items[:PAIRS]), self.began)

    with tempfile.TemporaryDirectory() as directory:
        arguments = RewardConfig(
            directory,
            max_length=config.encoding.max_tokens,
            per_device_train_batch_size=PAIRS,
            **reward.trainer_arguments(1000, dtype),
        )
        RewardTrainer(
            reward.classifier(config, dtype, encoder.pad_id),
            arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=encoder.tokenizer,
            peft_config=reward.lora("SEQ_CLS"),
            callbacks=[Turns()],
        ).train()


def _tokens(items: list[Any]) -> int:
    return sum(len(tokens.ids) for item in items for tokens in item.sequences)


def _tell(tokens: int, began: float) -> None:
    print(f"rate {tokens / (time.perf_counter() - began)}", flush=True)


class Side:
    """A process that makes an update for each line that it is given."""

    def __init__(self, name: str):
        self.name = name
        preloaded = before_torch.find(os.environ)
        bare = {key: value for key, value in os.environ.items() if key not in SPIN_VARIABLES}
        own = SIDES[name] | (before_torch.variables(preloaded) if preloaded else {})
        command = [sys.executable, __file__, "--side", name]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=bare | own
        )
        self.update()  # warms up

    def update(self) -> float:
        """Tokens a second of one update."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        while line := self._process.stdout.readline():
            if line.startswith("rate "):
                return float(line.split()[1])
        sys.exit(f"error: side {self.name} ended; its message stands above")

    def end(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def serve(name: str) -> None:
    """What a side's process does: a turn for each line on standard input, and its rate on standard output."""
    os.environ["PERLHF_DATA"] = str(harness.data_root())
    turns = (None for _ in iter(sys.stdin.readline, ""))
    (trl if name == "trl" else ours)(turns)


@contextmanager
def busy(loops: int) -> Iterator[None]:
    """So many processes that do nothing, as fast as they can."""
    running = [multiprocessing.Process(target=_spin, daemon=True) for _ in range(loops)]
    for process in running:
        process.start()
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.join()


def _spin() -> None:
    while True:
        pass


def table(rates: dict[str, dict[int, list[float]]]) -> str:
    """Markdown: a row a side, and three cells a load."""
    medians = {side: {load: statistics.median(found) for load, found in of.items()} for side, of in rates.items()}
    loads = list(next(iter(medians.values())))
    heads = [f"{load} loops | of its own quiet rate | of `short`" for load in loads]
    lines = [f"| setting | {' | '.join(heads)} |", "|---" * (1 + 3 * len(loads)) + "|"]
    for side, of in medians.items():
        base = of[loads[0]]
        cells = [
            f"{of[load]:.0f} tokens/s | {of[load] / base:.0%} | "
            + (f"{of[load] / medians['short'][load]:.2f}" if "short" in medians else "–")
            for load in loads
        ]
        lines.append(f"| {side} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES, help=f"of {', '.join(SIDES)}")
    parser.add_argument("--loads", nargs="+", type=int, default=[0, 1, 2], help="busy loops (default: 0 1 2)")
    parser.add_argument("--rounds", type=int, default=2, help="updates of each side under each load (default: 2)")
    parser.add_argument("--write", type=Path, help="file that gets the table, and what it was measured on")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        serve(arguments.side)
        return
    sides = [Side(name) for name in arguments.sides]
    rates: dict[str, dict[int, list[float]]] = {side.name: {load: [] for load in arguments.loads} for side in sides}
    for number in range(arguments.rounds):
        for load in arguments.loads:
            with busy(load):
                for side in sides:
                    rates[side.name][load].append(side.update())
                    rate = rates[side.name][load][-1]
                    print(f"{number + 1}/{arguments.rounds}, {load} loops: {side.name} {rate:.0f}", file=sys.stderr)
    for side in sides:
        side.end()
    found = table(rates)
    print(found)
    if arguments.write:
        machine = json.dumps(harness.machine(None) | {"versions": harness.versions(), "rates": rates})
        arguments.write.write_text(f"{found}\n\n<!-- {machine} -->\n")


if __name__ == "__main__":
    main()
