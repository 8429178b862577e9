from pathlib import Path

import pytest

from perlhf.commands.cli import LABEL_COMMANDS
from perlhf.config.command_line import parse
from perlhf.config.labelling import LabelConfig, ProjectConfig
from perlhf.errors import ConfigError, RunError
from perlhf.labelling.project import PROJECT, prepared, settings_of
from perlhf.labelling.questions import questions


def typed(project: Path, *options: str) -> LabelConfig:
    settings, _ = parse(LABEL_COMMANDS["label"], [str(project), *options])
    assert isinstance(settings, LabelConfig)
    return settings


def test_a_new_project_masks_with_a_plain_flag_and_opens_again_with_and_without_it(tmp_path: Path) -> None:
    place = tmp_path / "project"
    given = ("--redact", "--settings.title", "Which?")
    assert settings_of(typed(place, *given)) == ProjectConfig(title="Which?", redact=True)
    assert "redact: true" in (place / PROJECT).read_text()
    for again in ((), ("--redact",), given, ("--settings.title", "Which?", "--settings.redact")):
        assert settings_of(typed(place, *again)).redact
    with pytest.raises(ConfigError, match="has settings already"):
        settings_of(typed(place, "--redact", "--settings.title", "What?"))


def test_a_project_that_masks_nothing_is_not_masked_later(tmp_path: Path) -> None:
    place = tmp_path / "project"
    assert not settings_of(typed(place)).redact
    with pytest.raises(ConfigError, match="stored as they were read"):
        settings_of(typed(place, "--redact"))


def test_what_is_asked_is_masked(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        '{"prompt": "I am ana@example.org", "completions": ["Call +44 20 7946 0958.", "Write to x@y.org."]}\n'
    )
    (asked,) = questions(settings_of(typed(tmp_path / "p", "--redact", "--settings.questions.paths", str(rows))))
    assert asked.prompt == "I am [mail address]"
    assert set(asked.answers) == {"Call [phone number].", "Write to [mail address]."}


def test_a_run_that_explains_nothing_lets_go_of_the_port(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="nowhere is no finished run"):
        prepared(typed(tmp_path / "project", "--port", "0", "--settings.explain", "nowhere"))
