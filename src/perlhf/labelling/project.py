"""A labelling project on disk, and what is done with it: opened as a page, invited to, exported, taken in, copied."""

import contextlib
import ipaddress
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
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
from perlhf.errors import ConfigError, RunError, StorageError, nearest
from perlhf.labelling import records
from perlhf.labelling.pages.explained import Explainer
from perlhf.labelling.pages.server import Page, application
from perlhf.labelling.progress import progress
from perlhf.labelling.questions import Question, questions
from perlhf.labelling.store import Store
from perlhf.system.files import storage_errors, write_atomic

PROJECT, LABELS = "project.yaml", "labels.sqlite"


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
    project = settings_of(config)
    asked = questions(project) if project.questions.paths else []
    store = Store(config.project / LABELS)
    new = bring(project, store, asked)
    listening = bound(config.host, config.port)
    try:
        explainer = Explainer(project.explain) if project.explain else None
    except RunError:
        listening.close()
        raise
    port = listening.getsockname()[1]
    tokens = not is_here(config.host)
    hosts = names(config.host, port, config.allow_hosts)
    shown = f"[{config.host}]" if ":" in config.host else config.host
    done, wanted = store.progress()
    print(f"{config.project}: {done:,} of {wanted:,} labels" + (f", {new:,} new questions" if new else ""))
    print(f"http://{shown}:{port}/" + (" (labellers need links: perlhf label invite)" if tokens else ""), flush=True)
    settings = web_settings(application(Page(project, store, hosts, tokens, explainer)))

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
    if urlsplit(config.address).scheme not in ("http", "https"):
        raise ConfigError(f"{config.address} is no address", where="address", allowed="http://NAME:PORT")
    with _opened(config.project) as store:
        return f"{config.address.rstrip('/')}/join?token={store.invite(config.name, config.owner)}"


def export(config: LabelExportConfig) -> dict[str, int]:
    """Writes a project's labels (`records.write`); returns how many lines each file has.

    Raises:
        ConfigError: a name of no labeller.
    """
    project = load_recipe(config.project / PROJECT, ProjectConfig)
    with _opened(config.project) as store:
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
    """Takes an export's labels into the project; returns how many were new.

    Raises:
        DataError: it is no export.
    """
    labels = records.read(config.source)
    with _opened(config.project) as store:
        return store.take(labels)


def back_up(config: LabelBackupConfig) -> None:
    """Copies the labels into a file."""
    with _opened(config.project) as store:
        store.back_up(config.output)


@contextlib.contextmanager
def _opened(directory: Path) -> Iterator[Store]:
    if not (directory / PROJECT).is_file():
        hint = f"perlhf label {directory} makes one"
        raise RunError(f"no labelling project: {PROJECT} is missing", where=str(directory), hint=hint)
    store = Store(directory / LABELS)
    try:
        yield store
    finally:
        store.close()


def settings_of(config: LabelConfig) -> ProjectConfig:
    """Those of the project; a new one is made of what was given."""
    file = config.project / PROJECT
    given = config.settings.model_copy(update={"redact": True}) if config.redact else config.settings
    if file.is_file():
        project = load_recipe(file, ProjectConfig)
        if config.redact and not project.redact:
            what = "the project doesn't mask anything, and its questions are stored as they were read"
            raise ConfigError(
                what, where=str(file), allowed="--redact for a new project", hint="name another directory"
            )
        if given not in (ProjectConfig(redact=config.redact), project):
            raise ConfigError("the project has settings already", where=str(file), hint="change them in that file")
        return project
    with storage_errors(config.project):
        config.project.mkdir(parents=True, exist_ok=True)
    said = given.model_dump(mode="json", exclude_defaults=True)
    said = {"title": given.title, "instructions": given.instructions, **said}
    write_atomic(file, yaml.safe_dump(said, allow_unicode=True, sort_keys=False))
    return given


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
    there = store.keys()
    return store.add(_in_order(project, [question for question in questions if question.key not in there]))


def _in_order(project: ProjectConfig, new: list[Question]) -> list[Question]:
    """New questions at the places that the project's order gives them."""
    if project.questions.order == "random" or not new:
        return new
    from perlhf.labelling.rounds.ranked import ranked  # imports torch, which no other page needs

    return ranked(project, new)


def bound(host: str, port: int) -> socket.socket:
    """Listens at an address.

    Raises:
        StorageError: it isn't free, or not of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(128)
    except OSError as error:
        listening.close()
        hint = "--port 0 takes a free one" if port else "an address of this machine"
        raise StorageError(
            f"can't listen at {host}:{port}: {error.strerror or error}", where="port", hint=hint
        ) from error
    return listening


def names(host: str, port: int, further: Sequence[str] = ()) -> frozenset[str]:
    """`name` and `name:port` under which a server at this address may be asked, in lower case."""
    own = ["localhost", "127.0.0.1", "[::1]"] if is_here(host) else []
    known = [*own, f"[{host}]" if ":" in host else host, *further]
    return frozenset(spelt for name in known for spelt in (name.lower(), f"{name.lower()}:{port}"))


def web_settings(application: Any) -> uvicorn.Config:
    """How an application is served: it says nothing of who asks, nor believes what proxies say."""
    return uvicorn.Config(
        application,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        lifespan="off",
        timeout_keep_alive=75,
        timeout_graceful_shutdown=5,
    )


def is_here(host: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
