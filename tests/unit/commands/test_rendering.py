"""What `perlhf data inspect --base` shows of a record's tokens."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from perlhf.commands import rendering
from perlhf.commands.cli import main
from perlhf.config.commands import DataInspectConfig
from perlhf.errors import DataError

ROWS = {
    "pairs.jsonl": [{"prompt": "hi", "chosen": "yes", "rejected": "no"}] * 2,
    "ratings.jsonl": [{"prompt": "hi", "completion": "yes", "label": False}],
    "turns.jsonl": [
        {
            "prompt": [{"role": "user", "content": "hi"}],
            "completion": [
                {"role": "assistant", "content": "a"},
                {"role": "user", "content": "b"},
                {"role": "assistant", "content": "c"},
            ],
        }
    ],
    "prompts.jsonl": [{"prompt": "hi"}],
}


def shown(tmp_path: Path, base: Path, *names: str, ansi: bool = False) -> str:
    for name in names:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in ROWS[name]))
    out = io.StringIO()
    console = Console(file=out, width=200, force_terminal=ansi, color_system="standard" if ansi else None)
    rendering.show(DataInspectConfig(paths=tuple(str(tmp_path / name) for name in names), base=str(base)), console)
    return out.getvalue()


def test_one_record_of_each_kind(tiny_base: Path, tmp_path: Path) -> None:
    text = shown(tmp_path, tiny_base, *ROWS)
    assert "an answer ends with <|im_end|>" in text
    prompt = "<|im_start|>|u|s|er|⏎|h|i|<|im_end|>|⏎|<|im_start|>|a|s|s|i|s|t|a|n|t|⏎"
    assert text.count(f"prompt: 20 tokens\n  {prompt}\n") == 4
    assert text.count("comparison (") == 1, "the first of each kind"
    assert "chosen: 4 tokens, scored at the last\n  y|e|s|<|im_end|>\n" in text
    assert "rejected: 3 tokens, scored at the last\n  n|o|<|im_end|>\n" in text
    assert "thumbs down: 4 tokens, scored at the last\n" in text


def test_of_several_turns_the_assistants_are_trained(tiny_base: Path, tmp_path: Path) -> None:
    text = shown(tmp_path, tiny_base, "turns.jsonl", ansi=True)
    assert "demonstration: 4 of 24 tokens trained" in text
    assert text.count("\x1b[1;32m") >= 5, "the title's word and four tokens are green"


def test_the_command_and_its_error(tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"prompt": "hi", "completion": "yes"}))
    assert main(["data", "inspect", str(file), "--base", str(tiny_base)]) == 0
    assert "demonstration: 4 of 4 tokens trained" in capsys.readouterr().out
    file.write_text(json.dumps({"prompt": [{"role": "user", "content": "hi", "reasoning_content": "why"}]}))
    assert main(["data", "inspect", str(file), "--base", str(tiny_base)]) == 2
    assert "leaves out 'reasoning_content'" in capsys.readouterr().err
    with pytest.raises(DataError, match="leaves out"):
        rendering.show(DataInspectConfig(paths=(str(file),), base=str(tiny_base)))
