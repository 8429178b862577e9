"""A labelling project on disk, and what is done with it: opened as a page, invited to, exported, taken in, copied."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import uvicorn
import yaml

from perlhf.config.labelling import (
    LabelBackupConfig,
    LabelConfig,
    LabelExportConfig,
    LabelImportConfig,
    LabelInviteConfig,
    ProjectConfig,
    QuestionsConfig,
)
from perlhf.config.recipe import load_recipe
from perlhf.errors import ConfigError, RunError, nearest
from perlhf.labelling import records
from perlhf.labelling.addresses import bound, is_known_elsewhere, names, web_settings
from perlhf.labelling.database.store import Store
from perlhf.labelling.pages.explained import Explainer
from perlhf.labelling.pages.server import Page, application
from perlhf.labelling.progress import progress
from perlhf.labelling.questions import Question, questions
from perlhf.labelling.settled import as_stored, check, settled
from perlhf.system.files import storage_errors, write_atomic

PROJECT, LABELS = "project.yaml", "labels.sqlite"
_REPLACEABLE = "a new directory, or an earlier export, which is replaced"


def serve(config: LabelConfig) -> None:
    """Opens the page and answers until it is stopped.

    Raises:
        as `prepared`.
    """
    prepared(config)()


def prepared(config: LabelConfig) -> Callable[[], None]:
    """Takes the page's address, and what answers there until it is stopped.

    Raises:
        ConfigError: settings for a project that has its own, or the address isn't one of this machine's.
        DataError: no questions. RunError: a reward run of `explain` can't be used.
    """
    project = settings_of(config, write=False)
    asked = questions(project) if project.questions.paths else []
    if not (config.project / PROJECT).is_file():
        settings_of(config)  # a project whose questions can't be read isn't begun
    store = Store(config.project / LABELS)
    new = bring(project, store, asked)
    listening = bound(config.host, config.port)
    try:
        explainer = Explainer(project.explain) if project.explain else None
    except RunError:
        listening.close()
        raise
    port = listening.getsockname()[1]
    tokens = is_known_elsewhere(config.host, config.allow_hosts)
    hosts = names(config.host, port, config.allow_hosts)
    shown = f"[{config.host}]" if ":" in config.host else config.host
    done, wanted = store.progress()
    print(f"{config.project}: {done:,} of {wanted:,} labels" + (f", {new:,} new questions" if new else ""))
    print(f"http://{shown}:{port}/" + (" (labellers need links: perlhf label invite)" if tokens else ""), flush=True)
    page = Page(project, store, hosts, tokens, explainer, config.allow_hosts)
    settings = web_settings(application(page))

    def answer() -> None:
        try:
            with contextlib.suppress(KeyboardInterrupt):
                uvicorn.Server(settings).run([listening])
        finally:
            store.close()
            if explainer is not None:
                explainer.close()

    return answer


def invite(config: LabelInviteConfig) -> str:
    """The link of one labeller.

    Raises:
        ConfigError: `address` is no address of a page.
    """
    try:
        fits = urlsplit(config.address).scheme in ("http", "https") and bool(urlsplit(config.address).hostname)
    except ValueError:
        fits = False
    if not fits:
        raise ConfigError(f"{config.address} is no address", where="address", allowed="http://NAME:PORT")
    with _opened(config.project) as store:
        return f"{config.address.rstrip('/')}/join?token={store.invite(config.name, config.owner or None)}"


def export(config: LabelExportConfig) -> dict[str, int]:
    """Writes a project's labels (`records.write`); returns how many lines each file has.

    Raises:
        ConfigError: a name of no labeller; a directory that holds the project, or something else than an export.
    """
    _check_export(config)
    project = _read(config.project)
    with _opened(config.project, begun=True) as store:
        people = store.people()
        names = [person.name for person in people]
        for name in config.without:
            if name not in names:
                what, allowed = f"no labeller {name!r}", ", ".join(names) or "nobody has come yet"
                raise ConfigError(what, where="without", allowed=allowed, hint=nearest(name, names))
        said = store.labels(skips=True)
        used = [one for one in said if not one.labeller.left_out and one.labeller.name not in config.without]
        numbers = progress(used, people, store.progress(), project.up)
    datasets = config.format == "datasets"
    return records.write(config.output, used, project, numbers, overlap=config.overlap, datasets=datasets)


def take(config: LabelImportConfig) -> int:
    """Takes an export's labels into the project, all or none; returns how many were new.

    Raises:
        DataError: it is no export, or one of another kind of project. ConfigError: as `check` says of the project.
    """
    labels = records.read(config.source)
    with _opened(config.project) as store:
        project = _read(config.project)
        store.settle(settled(project))
        return store.take(as_stored(labels, project, config.source / records.LABELS))


def back_up(config: LabelBackupConfig) -> None:
    """Copies the labels into a file.

    Raises:
        ConfigError: that file is the database itself.
    """
    own = config.project / LABELS
    if config.output.resolve() in [Path(f"{own.resolve()}{end}") for end in ("", "-wal", "-shm")]:
        hint = "name another file"
        raise ConfigError(f"{config.output} is the project's database", where="output", allowed="a new file", hint=hint)
    with _opened(config.project, begun=True) as store:
        store.back_up(config.output)


def _check_export(config: LabelExportConfig) -> None:
    """Refuses to replace what is no export."""
    output, project = config.output.resolve(), config.project.resolve()
    if output == project or output in project.parents:
        hint = f"name another directory, such as {config.project / 'export'}"
        raise ConfigError(f"{config.output} holds the project", where="output", allowed=_REPLACEABLE, hint=hint)
    if not output.is_dir():
        return
    others = sorted(entry.name for entry in output.iterdir() if not records.is_exported(entry.name))
    if others:
        what, hint = f"{config.output} holds {others[0]}, which is of no export", "name another directory"
        raise ConfigError(what, where="output", allowed=_REPLACEABLE, hint=hint)


@contextlib.contextmanager
def _opened(directory: Path, begun: bool = False) -> Iterator[Store]:
    if begun and (directory / PROJECT).is_file() and not (directory / LABELS).is_file():
        hint = f"perlhf label {directory} asks for the first; or put a backup in its place"
        raise RunError(f"there are no labels: {LABELS} is missing", where=str(directory), hint=hint)
    if not (directory / PROJECT).is_file():
        hint = f"perlhf label {directory} makes one"
        raise RunError(f"no labelling project: {PROJECT} is missing", where=str(directory), hint=hint)
    store = Store(directory / LABELS)
    try:
        yield store
    finally:
        store.close()


def settings_of(config: LabelConfig, write: bool = True) -> ProjectConfig:
    """Those of the project; a new one is made of what was given, unless nothing is to be written."""
    file = config.project / PROJECT
    given = config.settings.model_copy(update={"redact": True}) if config.redact else config.settings
    if file.is_file():
        project = _read(config.project)
        if config.redact and not project.redact:
            what = "the project doesn't mask anything, and its questions are stored as they were read"
            raise ConfigError(
                what, where=str(file), allowed="--redact for a new project", hint="name another directory"
            )
        if given not in (ProjectConfig(redact=config.redact), project):
            raise ConfigError("the project has settings already", where=str(file), hint="change them in that file")
        return project
    if not write:
        return given
    with storage_errors(config.project):
        config.project.mkdir(parents=True, exist_ok=True)
    said = given.model_dump(mode="json", exclude_defaults=True)
    said = {"title": given.title, "instructions": given.instructions, **said}
    write_atomic(file, yaml.safe_dump(said, allow_unicode=True, sort_keys=False))
    return given


def _read(directory: Path) -> ProjectConfig:
    """The settings of a project that is there: whoever uses one, uses these.

    Raises:
        ConfigError: project.yaml is wrong, or asks for something else than the questions that are stored.
    """
    project = load_recipe(directory / PROJECT, ProjectConfig)
    check(project, directory / PROJECT, directory / LABELS)
    return project


def made(directory: Path, seed: int = 0) -> ProjectConfig:
    """The settings of a project; one that isn't there is made, without questions of its own.

    Raises:
        ConfigError: as its project.yaml says.
    """
    exists = (directory / PROJECT).is_file()
    new = ProjectConfig(questions=QuestionsConfig(paths=(), seed=seed))
    return settings_of(LabelConfig(project=directory, settings=ProjectConfig() if exists else new))


def bring(project: ProjectConfig, store: Store, questions: Iterable[Question]) -> int:
    """Stores questions that aren't there yet, in the project's order; returns how many they are.

    Raises:
        as `ranked`, where reward models make that order.
    """
    store.settle(settled(project))
    there = store.keys()
    return store.add(_in_order(project, [question for question in questions if question.key not in there]))


def _in_order(project: ProjectConfig, new: list[Question]) -> list[Question]:
    """New questions at the places that the project's order gives them."""
    if project.questions.order == "random" or not new:
        return new
    from perlhf.labelling.rounds.ranked import ranked  # imports torch, which no other page needs

    return ranked(project, new)
