"""A comparison's cells, its choice of learning rates, its numbers from run files written by hand, and its page."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from perlhf.comparison import grid, processes
from perlhf.comparison.grid import Cell, cells, choose
from perlhf.comparison.results import conclude, sentence
from perlhf.config.comparison import CompareConfig, Side
from perlhf.config.stages import PolicyConfig, RewardConfig
from perlhf.errors import PerlhfError, RunError
from perlhf.reports import comparison
from perlhf.system.files import write_atomic

FULL, R4 = Side(0, None), Side(4, "attention")


def config(output: Path, **changed: Any) -> CompareConfig:
    values: dict[str, Any] = {
        "output": output,
        "reward": RewardConfig(),
        "ranks": (4,),
        "targets": ("attention",),
        "seeds": (5, 6),
        "lora_learning_rates": (1e-4, 1e-3),
        "full_learning_rates": (1e-6, 1e-5),
        "bootstrap": 50,
    }
    return CompareConfig(**(values | changed))


def write(path: Path, value: object) -> None:
    """As training writes: a thread that reads meanwhile never sees a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(value))


def write_cell(output: Path, cell: Cell, validation: float, scores: list[float], tokens: float, memory: int) -> Path:
    """A finished and evaluated reward cell on four ratings of two groups."""
    run = output / cell.name
    result = {"stage": "reward", "validation": {"auc": validation, "loss": 1 - validation}, "seconds": 60.0}
    write(run / "result.json", result | {"trainable_parameters": 1000 if cell.side.rank == 0 else 10})
    write(run / "manifest.json", {"stage": "reward", "peak_memory_bytes": memory, "versions": {"torch": "x"}})
    write(run / "metrics.jsonl", {"step": 1, "tokens_per_second": tokens, "time_seconds": 30, "validation_auc": 0.5})
    with (run / "metrics.jsonl").open("a") as file:
        file.write("\n")
    values = {"seed": cell.seed, "tuning": "x", "optim": {"learning_rate": cell.learning_rate}}
    (run / "config.yaml").write_text(yaml.safe_dump(values))
    ratings = {"group": ["a", "a", "b", "b"], "label": [True, False, True, False], "score": scores}
    write(run / "evaluation.json", {"records": {"ratings": ratings, "comparisons": {"group": [], "scores": []}}})
    return run


def test_every_side_gets_as_many_tries(tmp_path: Path, tiny_base: Path):
    stage = RewardConfig(base=str(tiny_base))
    both = config(tmp_path, ranks=(4, 1), targets=("attention", "all"), reward=stage)
    names = [side.name for side in both.sides]
    assert names == ["full", "r4-attention", "r1-attention", "r4-all", "r1-all"]
    # Two rates with the first seed, the better one with the second.
    assert [row[-1] for row in cells(both)] == ["3"] * 5
    assert [row[-1] for row in cells(config(tmp_path, ranks=(4, 1), ranks_of_one_seed=(1,), reward=stage))] == list(
        "332"
    )
    policy = PolicyConfig(base=str(tiny_base), reward=("http://localhost:9",))
    assert len(cells(config(tmp_path, reward=stage, policy=policy))) == 4
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"reward": None}, "neither reward nor policy"),
        ({"lora_learning_rates": (1e-3,)}, "the same number of tries"),
        ({"full": False}, "one side alone"),
        ({"seeds": (1, 1)}, "seeds holds a value twice"),
        ({"ranks": (0,)}, "greater than 0"),
        ({"ranks_of_one_seed": (9,)}, "isn't among ranks"),
        ({"also_test": ("a/x", "b/x")}, "two sets of the name x"),
        ({"also_test": ("x",), "reward": None, "policy": PolicyConfig(reward=("a:b",))}, "also_test is for reward"),
        ({"policy": PolicyConfig(reward=("a:b",), sampler="vllm")}, "vllm is sent adapters"),
    ],
)
def test_what_can_not_be_compared(tmp_path: Path, changed: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        config(tmp_path, **changed)


def test_a_cell_sets_what_its_side_says_and_nothing_else(tmp_path: Path):
    values = Cell("reward", R4, 1e-3, 6).recipe(config(tmp_path))
    made = RewardConfig(**values)
    assert (made.run, made.seed, made.tuning) == (tmp_path / "reward-r4-attention-lr0.001-seed6", 6, "lora")
    assert (made.adapter.rank, made.adapter.targets, made.optim.learning_rate) == (4, "attention", 1e-3)
    full = RewardConfig(**Cell("reward", FULL, 1e-5, 5).recipe(config(tmp_path)))
    assert (full.tuning, full.learning_rate) == ("full", 1e-5)
    rest = {"run", "seed", "tuning", "adapter", "optim"}
    assert made.model_dump(exclude=rest) == RewardConfig().model_dump(exclude=rest)


def test_rates_are_chosen_on_validation_groups(tmp_path: Path):
    settings = config(tmp_path, lora_learning_rates=(1e-4, 1e-3, 1e-2), full_learning_rates=(1e-6, 1e-5, 1e-4))
    tried = [Cell("reward", R4, rate, 5) for rate in settings.lora_learning_rates]
    for cell, reached in zip(tried, (0.6, 0.7, 0.7), strict=True):
        write_cell(tmp_path, cell, reached, [1, 0, 1, 0], 1, 1)
    assert choose(tried, settings) == 1e-3  # the lower of two equal ones
    write(tmp_path / "failed" / f"{tried[1].name}.json", {"message": "diverged"})
    assert choose(tried, settings) == 1e-2
    by_loss = settings.model_copy(update={"reward": RewardConfig(select="loss")})
    assert choose(tried, by_loss) == 1e-2
    for cell in tried:
        write(tmp_path / "failed" / f"{cell.name}.json", {"message": "diverged"})
    assert choose(tried, settings) is None


def test_rates_may_be_tried_with_several_seeds(tmp_path: Path, tiny_base: Path):
    """1e-3 is best with seed 5 alone and on no mean; 1e-2 fails with seed 6."""
    rates = {"lora_learning_rates": (1e-4, 1e-3, 1e-2), "full_learning_rates": (1e-6, 1e-5, 1e-4)}
    reward = RewardConfig(base=str(tiny_base))
    settings = config(tmp_path, reward=reward, seeds=(5, 6, 7), rate_seeds=2, **rates)
    reached = {(1e-4, 5): 0.6, (1e-4, 6): 0.7, (1e-3, 5): 0.8, (1e-3, 6): 0.45, (1e-2, 5): 0.9}
    for (rate, seed), value in reached.items():
        write_cell(tmp_path, Cell("reward", R4, rate, seed), value, [1, 0, 1, 0], 1, 1)
    tried = [Cell("reward", R4, rate, seed) for rate in settings.rates(R4) for seed in settings.rate_seeds_of(R4)]
    write(tmp_path / "failed" / f"{tried[-1].name}.json", {"message": "diverged"})
    assert len(tried) == 6 and choose(tried, settings) == 1e-4
    assert choose(tried[::2], settings) == 1e-2
    assert settings.runs(R4) == 7
    one_seed = config(tmp_path, reward=reward, seeds=(5, 6, 7), rate_seeds=2, ranks_of_one_seed=(4,), **rates)
    assert one_seed.runs(R4) == 3 and one_seed.runs(FULL) == 7
    assert "rate_seeds" not in config(tmp_path).model_dump()  # a comparison begun before there was the key


def test_numbers_of_a_stage_by_hand(tmp_path: Path):
    """Full: AUC 1 and 1. r4: 0.75 (of four pairs of a thumb up and one down three are in order) and 0.5."""
    settings = config(tmp_path)
    runs = {
        "full": [
            write_cell(tmp_path, Cell("reward", FULL, 1e-5, seed), 0.5, [2, 0, 1, -1], 100, 4000) for seed in (5, 6)
        ],
        "r4-attention": [
            write_cell(tmp_path, Cell("reward", R4, 1e-3, 5), 0.5, [2, 0, 1, 1.5], 150, 1000),
            write_cell(tmp_path, Cell("reward", R4, 1e-3, 6), 0.5, [0, 0, 0, 0], 250, 2000),
        ],
    }
    found = conclude("reward", runs, settings)
    full, lora = found["sides"]["full"], found["sides"]["r4-attention"]
    assert found["metric"] == "AUC" and found["reference"] == "full" and found["records"] == 4 and found["groups"] == 2
    assert full["verdict"] == "reference"
    assert [one["value"] for one in lora["seeds"]] == [0.75, 0.5]
    assert lora["quality"]["value"] == 0.625 and lora["difference"]["value"] == -0.375
    # Seeds: squares 0 + 2 * 0.125^2 over two degrees. Full tuning's two seeds and groups agree: its interval is theirs.
    assert found["seed_noise"] == {"deviation": 0.125, "degrees": 2}
    half = 4.303 * 0.125 / math.sqrt(2)  # the 97.5 % quantile of Student's distribution with two degrees
    settings = config(tmp_path, bootstrap=4000)
    full, lora = conclude("reward", runs, settings)["sides"].values()
    assert (full["quality"]["low"], full["quality"]["high"]) == pytest.approx((1 - half, 1 + half), abs=0.06)
    assert full["quality"]["value"] == 1 and lora["quality"]["high"] - lora["quality"]["low"] > 2 * half
    assert (lora["memory_share"], lora["speed_factor"], lora["trainable_share"]) == (0.375, 2.0, 0.01)
    assert lora["curves"] == [[(30, 0.5)], [(30, 0.5)]]
    assert found["verdict"].startswith("By AUC on test groups, r4-attention")
    page = comparison.render({"reward": {**found, "tried": []}}, "<b>a</b>").decode()
    assert "&lt;b&gt;a" in page and "r4-attention" in page and page.count("<svg") == 3 and "script" not in page
    assert page == comparison.render({"reward": {**found, "tried": []}}, "<b>a</b>").decode()


def write_policy(output: Path, cell: Cell, gold: list[float], kl: float) -> Path:
    """A policy on two prompts of a group each; the start's gold scores are 0.25 and 0.5, its scores 1 and 2."""
    run = write_cell(output, cell, 0.5, [], 100, 1000)
    write(run / "result.json", {"stage": "policy", "trainable_parameters": 10})
    before = {"score": {"value": 1.5, "low": 1, "high": 2}}
    after = {"score": {"value": 2.5, "low": 2, "high": 3}, "kl_temperature_1": {"value": kl, "low": 0, "high": 2 * kl}}
    rows = [
        {"group": group, "score_before": 1, "score_after": 2, "gold_before": first, "gold_after": second}
        for group, first, second in zip("ab", (0.25, 0.5), gold, strict=True)
    ]
    wins = {"value": 0.75, "low": 0.5, "high": 1, "by": "x"}
    write(run / "evaluation.json", {"before": before, "after": after, "win_rate": wins, "samples": rows})
    return run


def test_policies_are_held_against_what_they_start_from(tmp_path: Path):
    """Full: gold 0.5 and 0.75, 0.25 above the start in both groups. r4: seeds at 0.75 and at 0.25 on the mean."""
    policy = PolicyConfig(reward=("module:function",), sft=Path("x"))
    settings = config(tmp_path, reward=None, policy=policy, scorers=("y",))
    full, first, second = (Cell("policy", side, 1e-5, seed) for side, seed in ((FULL, 5), (R4, 5), (R4, 6)))
    runs = {"full": [write_policy(tmp_path, full, [0.5, 0.75], 1.0)], "r4-attention": []}
    for cell, gold, kl in ((first, [0.75, 0.75], 2.0), (second, [0.25, 0.25], 4.0)):
        runs["r4-attention"].append(write_policy(tmp_path, cell, gold, kl))
    found = conclude("policy", runs, settings)
    assert found["metric"] == "gold score"
    assert found["start"]["name"] == "SFT" and found["start"]["quality"] == {"value": 0.375, "low": 0.25, "high": 0.5}
    one, two = found["sides"].values()
    assert one["change"]["value"] == 0.25 and two["change"]["value"] == 0.125
    assert two["change"]["high"] - two["change"]["low"] > 1, "two seeds, 0.5 apart"
    assert one["win_rate"] == {"value": 0.75, "low": None, "high": None}, "r4 has two seeds: groups alone say too much"
    alone = conclude("policy", {"full": runs["full"]}, settings)["sides"]["full"]
    assert alone["win_rate"] == {"value": 0.75, "low": 0.5, "high": 1} and alone["kl"]["high"] == 2
    assert "Scores and wins are by y." in comparison.over(found)
    by_itself = conclude("policy", runs, settings.model_copy(update={"scorers": ()}))
    assert "by what the policies learned from, which flatters them" in comparison.over(by_itself)
    assert two["kl"] == {"value": 3, "low": None, "high": None} and two["score"]["value"] == 2.5
    heads, table = comparison.columns(found), comparison.rows(found)
    wanted = ["gold score", "minus full", "verdict", "minus SFT", "score", "wins against SFT by score", "KL, nats"]
    assert heads[:7] == wanted and {len(cells) for _, cells in table} == {len(heads)} == {11}
    assert table[0] == ("SFT", ["0.375 (0.250 to 0.500)", "–", "start", "–", "1.50 (1.00 to 2.00)", *["–"] * 6])
    assert table[2][1][4:7] == ["2.50", "0.750", "3.00"]
    write(
        runs["full"][0] / "evaluation.json",
        json.loads((runs["full"][0] / "evaluation.json").read_text()) | {"win_rate": None},
    )
    assert conclude("policy", runs, settings)["sides"]["full"]["win_rate"] is None


def test_more_cells_at_a_time_than_memory_holds_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Two tries of each side: the three largest are both of full tuning and one of the adapter's, 1000 + 1000 + 10."""
    monkeypatch.setattr(grid, "_memory_bytes", lambda stage, side, config: 10 if side.rank else 1000)
    settings = config(tmp_path / "out", jobs=3)
    for free, refused in ((2009, True), (2010, False), (None, False)):
        monkeypatch.setattr(grid, "free_memory_bytes", lambda device, free=free: free)
        if not refused:
            grid._check_memory(settings)
            continue
        with pytest.raises(RunError, match="3 cells of stage reward need"):
            grid.compare(settings)
    assert not (tmp_path / "out").exists()
    grid._check_memory(settings.model_copy(update={"jobs": 1}))
    # One rate and three more seeds: three of full tuning may run together.
    seeds = {"seeds": (5, 6, 7, 8), "lora_learning_rates": (1e-3,), "full_learning_rates": (1e-5,)}
    monkeypatch.setattr(grid, "free_memory_bytes", lambda device: 2999)
    with pytest.raises(RunError, match="3 cells of stage reward need"):
        grid._check_memory(config(tmp_path / "out", jobs=3, **seeds))


@pytest.mark.parametrize(
    ("cores", "jobs", "given", "threads"),
    [(16, 1, None, None), (16, 3, None, "5"), (2, 3, None, "1"), (16, 3, "2", "2")],
)
def test_cells_share_the_cores(
    monkeypatch: pytest.MonkeyPatch, cores: int, jobs: int, given: str | None, threads: str | None
):
    monkeypatch.setattr(processes, "available_cores", lambda: cores)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert processes.environment_of(jobs).get("OMP_NUM_THREADS") == threads


@pytest.mark.parametrize(
    ("file", "changed", "message"),
    [
        ("evaluation.json", {"records": {"ratings": {"group": ["c"], "label": [True], "score": [1]}}}, "other records"),
        ("evaluation.json", {"adapter": "elsewhere"}, "evaluated with adapter 'elsewhere'"),
        ("evaluation.json", {"temperature": 0.0}, r"evaluated with temperature 0\.0"),
        ("evaluation.json", {"split": "validation"}, "evaluated with split 'validation'"),
        ("manifest.json", {"facts": {"data": {"x": "1"}}}, "data is {'x': '1'}, but 'not set'"),
    ],
)
def test_cells_of_other_data_or_tests_are_refused(tmp_path: Path, file: str, changed: dict[str, Any], message: str):
    runs = one_cell_a_side(tmp_path)
    path = runs["r4-attention"][0] / file
    write(path, json.loads(path.read_text()) | changed)
    with pytest.raises(RunError, match=message):
        conclude("reward", runs, config(tmp_path))


def test_other_sets_are_tested_on_as_well(tmp_path: Path):
    """On the other set full tuning orders one of two pairs, r4 both; the whole is looked for before any training."""
    runs = one_cell_a_side(tmp_path)
    for side, scores in (("full", [[1, 0], [0, 1]]), ("r4-attention", [[1, 0], [1, 0]])):
        records = {"comparisons": {"group": ["c", "d"], "scores": scores}}
        seen = {"groups_seen_in_training": int(side == "full")}
        write(runs[side][0] / "evaluation-other.json", {"records": records, "split": "all"} | seen)
    found = conclude("reward", runs, config(tmp_path, also_test=("some/other",)))
    other = found["elsewhere"]["other"]
    assert (other["metric"], other["records"], other["groups"]) == ("pairwise accuracy", 2, 2)
    full, lora = other["sides"].values()
    assert (full["quality"]["value"], lora["quality"]["value"], lora["difference"]["value"]) == (0.5, 1, 0.5)
    assert found["sides"]["full"]["quality"]["value"] == 1, "its own test groups"
    heads, rows = comparison.columns(found), dict(comparison.rows(found))
    assert heads[3:5] == ["other: pairwise accuracy of 2, 1 of 2 groups seen in training", "there minus full"]
    assert rows["full"][3:5] == ["0.50 (0.00 to 1.00)", "–"] and rows["r4-attention"][4].startswith("0.50 (")
    write(runs["full"][0] / "evaluation-other.json", {"records": records, "split": "test"})
    with pytest.raises(RunError, match="evaluated with split 'test'"):
        conclude("reward", runs, config(tmp_path, also_test=("some/other",)))
    with pytest.raises(PerlhfError, match="nowhere"):
        grid.compare(config(tmp_path / "out", also_test=(str(tmp_path / "nowhere"),)))
    assert not (tmp_path / "out").exists()


def test_what_needs_no_network_is_in_the_table(tmp_path: Path):
    """Full tuning's AUC is 1, r4's 0.75: a bag of words at 0.75 is as good as r4."""
    runs = one_cell_a_side(tmp_path)
    write_cell(tmp_path, Cell("reward", R4, 1e-5, 5), 0.5, [2, 0, 1, 1.5], 1, 1)
    assert conclude("reward", runs, config(tmp_path))["baselines"] == {}
    simple = {"bag_of_words": {"auc": about(0.75)}, "length": {"auc": about(0.5)}, "majority": {"auc": about(0.5)}}
    for side in runs:
        path = runs[side][0] / "evaluation.json"
        own = json.loads(path.read_text()) | {"baselines": simple | {"position": {"unavailable": "no turns"}}}
        write(path, own)
        write(path.with_name("evaluation-other.json"), own | {"split": "all"})
    found = conclude("reward", runs, config(tmp_path, also_test=("some/other",)))
    assert found["baselines"] == {"bag_of_words": about(0.75), "length": about(0.5)}
    assert found["verdict"].endswith("Only full is above the value of the strongest baseline (bag of words, 0.750).")
    heads, table = comparison.columns(found), comparison.rows(found)
    assert [side for side, _ in table] == ["full", "r4-attention", "bag of words", "length"]
    row = table[2][1]
    assert row[:5] == ["0.750 (0.625 to 0.875)", "–", "baseline", "0.750 (0.625 to 0.875)", "–"]
    assert len(row) == len(heads) and set(row[5:]) == {"–"}


def about(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.125, "high": value + 0.125}


def one_cell_a_side(output: Path) -> dict[str, list[Path]]:
    return {
        side.name: [write_cell(output, Cell("reward", side, 1e-5, 5), 0.5, [2, 0, 1, -1], 1, 1)] for side in (FULL, R4)
    }


def test_what_the_page_admits(tmp_path: Path):
    """One seed a side, seeds that diverged, cells of two machines, several at a time: each is said."""
    runs = one_cell_a_side(tmp_path)
    found = conclude("reward", runs, config(tmp_path, margin=0.5))
    assert found["seed_noise"] is None and found["unlike"] == []
    assert found["sides"]["r4-attention"]["verdict"] == "undecided: one seed"
    page = comparison.render({"reward": {**found, "tried": []}}, "a").decode()
    assert "over groups alone: no side has a second seed" in page and "diverged" not in page and "unlike" not in page
    path = runs["r4-attention"][0] / "manifest.json"
    write(path, json.loads(path.read_text()) | {"hardware": {"gpu": "Quick 9"}})
    found = conclude("reward", runs, config(tmp_path, margin=0.5, jobs=3), {"r4-attention": 2})
    assert found["sides"]["r4-attention"]["verdict"] == "undecided"
    page = comparison.render({"reward": {**found, "tried": []}}, "a").decode()
    assert "undecided, 2 of 3 seeds diverged" in page and "kept the head start" not in page
    path = runs["r4-attention"][0] / "result.json"
    write(path, json.loads(path.read_text()) | {"best_step": 0})
    found = conclude("reward", runs, config(tmp_path, margin=0.5, jobs=3))
    page = comparison.render({"reward": {**found, "tried": []}}, "a").decode()
    assert "undecided: one seed, 1 of 1 seeds kept the start untrained" in page
    assert "on test groups, r4-attention can&#39;t be told from full with one seed a side" in page
    assert "3 cells ran at a time" in page
    assert "of unlike cells: None, None threads, torch x" in page and "Quick 9, torch x" in page


def test_a_later_seed_that_diverges_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Seed 6 of r4 fails: its row is there, the mean is the other seed's, and nothing is said of r4."""

    def train(cell: Cell, settings: CompareConfig, processes: Any) -> None:
        if cell.side == R4 and cell.seed == 6:
            write(settings.output / "failed" / f"{cell.name}.json", {"message": "the loss is nan"})
        else:
            write_cell(settings.output, cell, 0.5, [2, 0, 1, -1], 1, 1)

    monkeypatch.setattr(grid, "_train", train)
    monkeypatch.setattr(grid, "_evaluate", lambda *_: None)
    found = grid.compare(config(tmp_path / "out", margin=0.5))["reward"]
    assert [row for row in found["tried"] if row["failed"]] == [
        {"side": "r4-attention", "learning_rate": 1e-4, "seed": 6, "validation": None, "failed": "the loss is nan"}
    ]
    side = found["sides"]["r4-attention"]
    assert [one["seed"] for one in side["seeds"]] == [5] and side["diverged"] == 1 and side["verdict"] == "undecided"
    assert len(found["tried"]) == 5


def test_scorers_are_looked_for_before_anything_is_trained(tmp_path: Path, tiny_base: Path):
    policy = PolicyConfig(base=str(tiny_base), reward=("module:function",))
    settings = config(tmp_path / "out", reward=None, policy=policy, scorers=(str(tmp_path / "nowhere"),))
    for started in (grid.compare, cells):
        with pytest.raises(RunError, match="nowhere is no finished run"):
            started(settings)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValidationError, match="it would judge what it chose"):
        config(tmp_path, policy=policy.model_copy(update={"validation_reward": ("a",)}), scorers=("a",))


def test_verdicts_in_words():
    sides = {
        name: {"verdict": what} for name, what in [("full", "reference"), ("r8", "equivalent"), ("r4", "equivalent")]
    }
    words = sentence("AUC", "full", {**sides, "r1": {"verdict": "worse"}}, 0.02)
    assert words == "By AUC on test groups, r8, r4 are equivalent to full (within 0.020); r1 is worse than full."
    assert sentence("AUC", "full", {"full": {}}, 0.02).startswith("Only full has finished")


def test_a_directory_belongs_to_one_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(grid, "_train", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    output = tmp_path / "out"
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            grid.compare(config(output))
    with pytest.raises(KeyboardInterrupt):  # more seeds may be added
        grid.compare(config(output, seeds=(5, 6, 7)))
    with pytest.raises(PerlhfError, match=r"margin is 0\.1, but 0\.02"):  # it is fixed beforehand
        grid.compare(config(output, margin=0.1))
    with pytest.raises(PerlhfError, match=r"reward\.epochs is 2, but 1"):
        grid.compare(config(output, reward=RewardConfig(epochs=2)))
    assert yaml.safe_load((output / "compare.yaml").read_text())["seeds"] == [5, 6, 7]
    monkeypatch.setattr(grid, "free_memory_bytes", lambda device: None)
    for jobs in (2, 1):  # what ran at a time once is not forgotten
        with pytest.raises(KeyboardInterrupt):
            grid.compare(config(output, jobs=jobs, seeds=(5, 6, 7)))
        assert yaml.safe_load((output / "compare.yaml").read_text())["jobs"] == 2
    for content in ("a: !!int x", "[1]", "jobs: many", "{", "[" * 10_000):
        (output / "compare.yaml").write_text(content)
        with pytest.raises(RunError, match=r"compare\.yaml: missing or damaged"):
            grid.compare(config(output))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(RunError, match="isn't empty"):
        grid.compare(config(tmp_path / "mine"))
