"""Tokens a second of 32 rows that a thread samples, as the thread of `perlhf serve` does: where no other thread of the
process has computed anything (`alone`), and where the main thread has loaded the weights (`after another`). Packaged
base, two adapters of rank 16 in turn, prompts of 40 tokens, 48 new ones.
Run: python benchmarks/serving_thread.py [--threads 2] [--repeats 3]
"""

import threading
import time
from collections.abc import Callable

import harness

ROWS, PROMPT, TOKENS, RANK = 32, 40, 48, 16


def _loaded() -> Callable[[], harness.Work]:
    import numpy as np

    from perlhf.config.stages import DEFAULT_BASE
    from perlhf.model.bases.found import Base
    from perlhf.model.model import Model
    from perlhf.rollout.rows import Rows, Under, Wish

    model = Model.load(Base.find(DEFAULT_BASE), dtype="bfloat16", device="cpu")
    names = ("one", "two")
    for number, name in enumerate(names):
        model.add_adapter(name, "policy", rank=RANK, targets="all", seed=number)
    unders = [Under(name, model.hold(name)) for name in names]
    prompts = np.random.default_rng(0).integers(100, 40_000, (ROWS, PROMPT)).tolist()

    def sampled(tokens: int) -> int:
        rows, count = Rows(model, ROWS * (PROMPT + tokens)), 0
        for number, prompt in enumerate(prompts):
            draws = np.random.Generator(np.random.Philox(key=number))
            assert rows.join(prompt, [draws], tokens, unders[number % 2], Wish())
        while len(rows):
            for token in rows.step():
                count += 1
                if len(token.row.ids) == tokens:
                    rows.leave(token.row)
        return count

    def work() -> harness.Work:
        sampled(4)
        began = time.perf_counter()
        return harness.Work(sampled(TOKENS), time.perf_counter() - began)

    return work


def _in_a_thread(what: Callable[[], harness.Work]) -> harness.Work:
    found: list[harness.Work] = []
    thread = threading.Thread(target=lambda: found.append(what()))
    thread.start()
    thread.join()
    return found[0]


def alone() -> harness.Work:
    """All in one thread."""
    return _in_a_thread(lambda: _loaded()())


def after_another() -> harness.Work:
    """The weights are loaded by the main thread, which then sleeps."""
    return _in_a_thread(_loaded())


if __name__ == "__main__":
    sides = {"alone": alone, "after another": after_another}
    harness.main([harness.Benchmark("sampling", "tokens/s", sides)], __doc__)
