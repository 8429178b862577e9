from pathlib import Path

import pytest

from perlhf.commands.names import LABEL_COMMANDS
from perlhf.config.command_line import parse
from perlhf.config.labelling import LabelBackupConfig, LabelConfig, LabelExportConfig, LabelInviteConfig, ProjectConfig
from perlhf.errors import ConfigError, DataError, RunError
from perlhf.labelling.addresses import is_known_elsewhere
from perlhf.labelling.database.store import Store
from perlhf.labelling.labels import Said
from perlhf.labelling.project import LABELS, PROJECT, back_up, bring, export, invite, made, prepared, settings_of
from perlhf.labelling.questions import question, questions


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


def labelled(place: Path) -> Path:
    """A project with one label."""
    project, store = made(place), Store(place / LABELS)
    asked = question(project, "Tea?", ("Yes.", "No."), "tea", "by hand")
    assert asked is not None
    bring(project, store, [asked])
    ana = store.labeller("Ana")
    task = store.next_task(ana, 60.0)
    assert task is not None and store.say(ana, task.id, Said("first"), "key of Ana", 1.0)
    store.close()
    return place


def test_an_export_replaces_an_export_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = labelled(tmp_path / "all" / "project")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    monkeypatch.chdir(tmp_path / "all")
    for output in (place, tmp_path / "all", Path(), Path("project"), tmp_path / "thesis"):
        with pytest.raises(ConfigError, match="holds"):
            export(LabelExportConfig(project=place, output=output))
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"
    assert sorted(entry.name for entry in place.iterdir() if "-" not in entry.name) == [LABELS, PROJECT]
    for form in ("jsonl", "datasets", "jsonl"):
        found = export(LabelExportConfig(project=place, output=place / "export", format=form))
        assert found["labels"] == 1


def test_a_backup_is_of_labels_and_never_onto_them(tmp_path: Path) -> None:
    place = labelled(tmp_path / "project")
    (tmp_path / "link").symlink_to(place)
    for output in (place / LABELS, tmp_path / "link" / LABELS, place / f"{LABELS}-wal"):
        with pytest.raises(ConfigError, match="is the project's database"):
            back_up(LabelBackupConfig(project=place, output=output))
    back_up(LabelBackupConfig(project=place, output=tmp_path / "copy.sqlite"))
    before = (tmp_path / "copy.sqlite").read_bytes()
    (place / LABELS).unlink()
    with pytest.raises(RunError, match=r"there are no labels: labels\.sqlite is missing"):
        back_up(LabelBackupConfig(project=place, output=tmp_path / "copy.sqlite"))
    assert (tmp_path / "copy.sqlite").read_bytes() == before


def test_a_project_whose_questions_cant_be_read_isnt_begun(tmp_path: Path) -> None:
    place = tmp_path / "project"
    with pytest.raises(DataError):
        prepared(typed(place, "--port", "0", "--settings.questions.paths", str(tmp_path / "piars.jsonl")))
    assert not place.exists()


@pytest.mark.parametrize(
    ("host", "further", "expected"),
    [
        ("127.0.0.1", (), False),
        ("127.0.0.1", ("localhost:8000", "[::1]:80", "127.0.0.2"), False),
        ("127.0.0.1", ("labels.example.org",), True),
        ("127.0.0.1", ("labels.example.org:8443",), True),
        ("0.0.0.0", (), True),
    ],
)
def test_a_proxy_makes_a_page_known_elsewhere(host: str, further: tuple[str, ...], expected: bool) -> None:
    assert is_known_elsewhere(host, further) == expected


@pytest.mark.parametrize("name", ["[bad", "http://labels.example.org", "labels.example.org/page", "a b", ""])
def test_what_is_no_name_of_a_host_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no name of a host"):
        typed(tmp_path / "project", "--allow-hosts", name)


def test_names_and_addresses_of_links(tmp_path: Path) -> None:
    place = tmp_path / "project"
    project = settings_of(typed(place))
    store = Store(place / LABELS)
    bring(project, store, [])
    for address in ("http://[x", "labels.example.org", "http://"):
        with pytest.raises(ConfigError, match="is no address"):
            invite(LabelInviteConfig(project=place, name="Ana", address=address))
    for name in ("  ", "A\x1bna"):
        with pytest.raises(ConfigError, match="a name has letters"):
            parse(LABEL_COMMANDS["invite"], [str(place), name])
    for name in ("Ana Lima", " Ana  Lima "):
        assert invite(LabelInviteConfig(project=place, name=name)).startswith("http://127.0.0.1:8765/join?token=")
    assert [person.name for person in store.people()] == ["Ana Lima"]
