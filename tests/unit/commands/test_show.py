"""What is printed: the table of runs, and what is known of a base."""

import io
import json
from pathlib import Path

import pytest
from pipeline_runs import about, pipeline, write_run
from rich.console import Console

from perlhf.commands.show import print_rows, tabulate
from perlhf.config.stages import AdapterConfig, RewardConfig
from perlhf.errors import ConfigError, StorageError
from perlhf.runs.read import Summary, read_runs, summarise


def _ranks(directory: Path) -> list[Path]:
    """A LoRA run that was evaluated, and a fully tuned one that was not."""
    lora = write_run(
        directory / "rank-4",
        "reward",
        config=RewardConfig(adapter=AdapterConfig(rank=4, targets=("q_proj", "v_proj"))),
        result={"seconds": 65.2, "tokens": 6520, "peak_memory_bytes": 3 * 2**29, "trainable_parameters": 230_400},
        evaluation={"split": "test", "metrics": {"auc": about(0.81, 0.04)}},
    )
    full = write_run(
        directory / "full",
        "reward",
        config=RewardConfig(tuning="full"),
        result={"validation": {"auc": 0.83}, "seconds": 7300, "trainable_parameters": 134_515_584},
    )
    return [lora, full]


def test_a_row_holds_what_a_run_is_how_good_it_is_and_what_it_cost(tmp_path: Path):
    lora, full = _rows(_ranks(tmp_path))
    assert (lora.name, lora.stage, lora.tuning, lora.rank) == ("rank-4", "reward", "lora", 4)
    assert lora.targets == "q_proj, v_proj"
    assert lora.quality and (lora.quality.value, lora.quality.low, lora.quality.high) == (0.81, 0.77, 0.85)
    assert (lora.seconds, lora.tokens_per_second, lora.peak_memory_bytes) == (65.2, 100.0, 3 * 2**29)
    assert (full.rank, full.targets, full.quality_name) == (None, None, "AUC, validation")
    assert full.tokens_per_second is None and full.peak_memory_bytes is None


def _rows(runs: list[Path]) -> list[Summary]:
    return [summarise(run) for run in read_runs(runs)]


def _shown(rows: list[Summary], width: int) -> list[str]:
    out = io.StringIO()
    print_rows(rows, Console(width=width, file=out))
    return out.getvalue().splitlines()


def test_a_wide_terminal_shows_all_figures_of_a_run_in_a_line(tmp_path: Path):
    lines = _shown(_rows(_ranks(tmp_path)), 160)
    (lora,) = (line for line in lines if "rank-4" in line)
    for text in ("q_proj, v_proj", "AUC, test", "0.810", "0.770 to 0.850", "230,400", "1 min 05 s", "1.50 GiB"):
        assert text in lora
    (full,) = (line for line in lines if line.strip().startswith("full"))
    for text in ("AUC, validation", "0.830", "134,515,584", "2 h 01 min", "–"):
        assert text in full


def test_a_narrow_terminal_shows_quality_and_costs_one_after_the_other(tmp_path: Path):
    lines = _shown(_rows(_ranks(tmp_path)), 90)
    quality, costs = (line for line in lines if "rank-4" in line)
    assert "0.770 to 0.850" in quality and "230,400" not in quality
    assert "230,400" in costs and "0.770 to 0.850" not in costs
    assert max(len(line) for line in lines) <= 90


def test_columns_that_no_run_fills_are_left_out(tmp_path: Path):
    lines = [line for line in _shown(_rows([write_run(tmp_path / "a", "sft")]), 100) if line.strip()]
    assert lines[1].split() == ["run", "stage"]


def test_a_name_that_looks_like_markup_is_shown_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tabulate([write_run(tmp_path / "[red]a", "sft")])
    assert "[red]a" in capsys.readouterr().out


def test_the_rows_are_written_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = tmp_path / "new" / "table.json"
    tabulate(pipeline(tmp_path / "runs", prompts=4, updates=2), output)
    assert "0.637 to 0.691" in capsys.readouterr().out
    rows = json.loads(output.read_text())
    assert [(row["name"], row["stage"]) for row in rows] == [(name, name) for name in ("sft", "reward", "policy")]
    assert rows[2]["quality"] == {"value": 0.664, "low": 0.637, "high": 0.691}
    assert rows[0]["trainable_parameters"] == 921_600


def test_a_path_that_is_no_run_is_refused_and_nothing_is_written(tmp_path: Path):
    with pytest.raises(ConfigError, match="does not exist"):
        tabulate([tmp_path / "missing"], tmp_path / "table.json")
    assert not (tmp_path / "table.json").exists()


def test_an_output_that_cannot_be_written_is_an_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        tabulate([write_run(tmp_path / "a", "sft")], tmp_path / "file" / "table.json")
