"""What is served: one base, and the adapters of any number of runs, each in the version that its files have now.

A name stands for the newest version. Requests keep the one that they began with: an older version's adapters leave the
base when the last of its requests has ended.
"""

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from perlhf.config.stages import DEFAULT_BASE, EncodingConfig, PolicyConfig
from perlhf.errors import ConfigError, PerlhfError, RunError, nearest
from perlhf.method.packing import Packing
from perlhf.model import saved
from perlhf.model.bases.found import Base
from perlhf.model.bases.loading import end_ids, load_tokenizer, vocabulary
from perlhf.model.bases.untrained import untrained_tokens
from perlhf.model.encoding.encode import Encoder
from perlhf.model.encoding.templates import plain_template
from perlhf.model.finished import FinishedRun, Given, read_run
from perlhf.model.model import Model
from perlhf.rollout.ensemble import forget
from perlhf.rollout.rows import Under
from perlhf.runs.earlier import adapter_of, files_hash, is_adapter
from perlhf.runs.manifest import RESULT
from perlhf.system.console import note

BASE = "base"
"""Name of the network without adapters."""
TEMPERATURE = 0.7
"""Of answers by what wasn't trained at one."""


@dataclass(frozen=True, eq=False)
class Speaker:
    """A version of something that answers: the base, an SFT run or a policy."""

    name: str
    version: int
    stage: str
    adapters: tuple[str, ...]
    """Its adapter's name in the model; none of the base."""
    encoder: Encoder
    under: Under
    mixes: bool
    """Whether its rows may be computed beside others' (`rollout.rows.Rows`)."""
    stop: tuple[str, ...] = ()
    """Strings that end its answers, as in training."""
    temperature: float = TEMPERATURE
    created: int = field(default_factory=lambda: int(time.time()))


@dataclass(frozen=True, eq=False)
class Judge:
    """A version of a reward run: one adapter, or several members."""

    name: str
    version: int
    adapters: tuple[str, ...]
    encoder: Encoder
    packing: Packing
    max_tokens: int
    """Computed in one pass."""
    stage: str = "reward"
    created: int = field(default_factory=lambda: int(time.time()))


Served = Speaker | Judge


class Models:
    """The base with all adapters.

    Its passes, `load` and `unload` are one thread's at a time; what is current may be asked for by any.

    Args:
        runs: directories by name; their base is that of the first one.
        base: the network, where it isn't that run's; or what is served without any run.
        device, dtype: of the network; `dtype` "run" is the first run's.
        accept_changes: to serve runs whose base or adapter isn't as it was recorded.

    Raises:
        RunError, AdapterError, ModelError: a run can't be used, or is of another base.
    """

    def __init__(
        self,
        runs: Mapping[str, Path],
        base: str | None = None,
        device: str = "auto",
        dtype: str = "run",
        *,
        accept_changes: bool = False,
    ):
        self._given = Given(base, dtype=dtype, accept_changes=accept_changes)
        found = {name: read_run(latest(path), given=self._given) for name, path in runs.items()}
        first = next(iter(found.values()), None)
        network = self.base = first.base if first is not None else Base.find(base or DEFAULT_BASE)
        wanted = first.config.dtype if first is not None and dtype == "run" else dtype.replace("run", "auto")
        quantize = "none" if first is None else first.config.quantize
        tokenizer = load_tokenizer(network)
        self.model = Model.load(network, wanted, device, vocabulary(tokenizer), quantize)
        if accept_changes:  # adapters are still refused on other weights
            self.model.fingerprint = {key: value for key, value in self.model.fingerprint.items() if key != "files"}
        self._ends, self._untrained = end_ids(network), untrained_tokens(self.model.base, tokenizer)
        self._lock = threading.Lock()
        self._users: Counter[Served] = Counter()
        self._versions: Counter[str] = Counter()
        self._current: dict[str, Served] = {}
        self._hashes: dict[str, tuple[Path, str]] = {}
        self._old: list[Served] = []
        self._told: dict[str, str] = {}
        self.paths: dict[str, Path] = {}
        """The directories that names stand for."""
        template = "tokenizer" if tokenizer.chat_template else plain_template(tokenizer)
        encoding = EncodingConfig(template=template, max_tokens=self._context(512))
        encoder = Encoder(tokenizer, encoding, self._ends, remembers=False)
        self._current[BASE] = Speaker(BASE, 1, BASE, (), encoder, Under(BASE, self.model.hold(None)), self._is_tree())
        for name, run in found.items():
            self._take(name, runs[name], run)

    @property
    def current(self) -> dict[str, Served]:
        """What each name stands for now."""
        with self._lock:
            return dict(self._current)

    @property
    def speakers(self) -> dict[str, Speaker]:
        """Those that answer, the base among them."""
        return {name: one for name, one in self.current.items() if isinstance(one, Speaker)}

    @property
    def judges(self) -> dict[str, Judge]:
        """Reward runs."""
        return {name: one for name, one in self.current.items() if isinstance(one, Judge)}

    def begin(self, name: str, kind: type[Served]) -> Served:
        """What a name stands for, which stays loaded until `end`.

        Raises:
            ConfigError: there is none, or of another kind.
        """
        with self._lock:
            found = self._current.get(name)
            if found is None or not isinstance(found, kind):
                names = [known for known, one in self._current.items() if isinstance(one, kind)]
                what = f"no model {name!r}" if found is None else f"{name!r} is a {found.stage} model"
                what += "" if found is None else ", which scores answers" if kind is Speaker else ", which answers"
                allowed = ", ".join(names) or "none: no reward run is served"
                raise ConfigError(what, where="model", allowed=allowed, hint=nearest(name, names))
            self._users[found] += 1
            return found

    def end(self, served: Served) -> None:
        """A request that had it is over."""
        with self._lock:
            self._users[served] -= 1

    # by the thread that computes

    def load(self, name: str, path: Path) -> Served:
        """The run at `path` under a name, as a new version where there is one already.

        Raises:
            RunError, AdapterError: as the parts say; what was served stays.
        """
        return self._take(name, path, read_run(latest(path), given=self._given))

    def unload(self, name: str) -> None:
        """Nothing has this name any more.

        Raises:
            ConfigError: nothing has it, or it is the base's.
        """
        with self._lock:
            if name == BASE or name not in self._current:
                names = [known for known in self._current if known != BASE]
                raise ConfigError(f"no run {name!r} is loaded", where="model", allowed=", ".join(names) or "none is")
            self._old.append(self._current.pop(name))
            del self._hashes[name], self.paths[name]

    def changed(self) -> dict[str, Path]:
        """Runs whose directory holds another adapter than the one that is served, whole; for any thread to ask."""
        with self._lock:
            known = {name: (self.paths[name], *self._hashes[name]) for name in self.paths}
        found: dict[str, Path] = {}
        for name, (path, directory, written) in known.items():
            with contextlib.suppress(PerlhfError, OSError):  # it is being written, or has gone: asked again later
                now = latest(path)
                whole = is_adapter(now) or (now / RESULT).is_file()
                if whole and (directory, written) != (now, _hash(now)):
                    found[name] = path
        return found

    def refresh(self) -> list[Served]:
        """Loads new versions of what has changed; a run that can't be used stays as it was, which is told once."""
        loaded: list[Served] = []
        for name, path in self.changed().items():
            try:
                loaded.append(self.load(name, path))
            except (PerlhfError, OSError) as error:
                what = error.what if isinstance(error, PerlhfError) else str(error)
                if self._told.get(name) != what:
                    self._told[name] = what
                    note(f"{name}: the new version can't be served, the old one stays: {what}")
        return loaded

    def drop_unused(self) -> list[Served]:
        """Takes the adapters of older versions that no request has any more off the base; gives those versions."""
        with self._lock:
            gone = [served for served in self._old if not self._users[served]]
            self._old = [served for served in self._old if self._users[served]]
            for served in gone:
                del self._users[served]
        for served in gone:
            for adapter in served.adapters:
                forget(self.model, adapter)
        return gone

    # inside

    def _take(self, name: str, path: Path, run: FinishedRun) -> Served:
        if name == BASE:
            raise ConfigError(f"a run can't be called {BASE}", where="run", hint=f"OTHER={path} gives it another name")
        run.check()
        written = _hash(run.path)
        version = self._versions[name] + 1
        config = run.config
        tokenizer = run.tokenizer()
        longest = self._context(config.encoding.max_tokens) if run.stage != "reward" else config.encoding.max_tokens
        encoding = config.encoding.model_copy(update={"max_tokens": longest})
        encoder = Encoder(tokenizer, encoding, self._ends, self._untrained, remembers=False)
        trained = Encoder(tokenizer, config.encoding, self._ends)
        names: list[str] = []
        try:
            for member, directory in run.members.items():
                names.append(f"{name}@{version}/{member}")
                saved.load_adapter(self.model, directory, names[-1], trained)
                self.model.freeze(names[-1])
        except PerlhfError:
            for adapter in names:
                forget(self.model, adapter)
            raise
        if run.stage == "reward":
            packing = self.model.packing(config.packing)
            served: Served = Judge(name, version, tuple(names), encoder, packing, config.microbatch_tokens)
        else:
            stop, heat = ((), TEMPERATURE)
            if isinstance(config, PolicyConfig):
                stop, heat = config.stop, config.temperature
            held = self.model.hold(names[0])
            mixes = self._is_tree() and not held.weights
            under = Under(names[0], held)
            served = Speaker(name, version, run.stage, tuple(names), encoder, under, mixes, stop, heat)
        with self._lock:
            if name in self._current:
                self._old.append(self._current[name])
            self._current[name] = served
            self._versions[name] = version
            self._hashes[name], self.paths[name] = (run.path, written), path
        return served

    def _is_tree(self) -> bool:
        return self.model.way.packing == "tree"

    def _context(self, trained: int) -> int:
        """Tokens of a conversation: as many as the network takes, where that is known."""
        known = getattr(self.model.base.config.get_text_config(), "max_position_embeddings", None)
        return max(trained, self.model.longest or known or 0)


def _hash(run: Path) -> str:
    """Of the run's adapter, or of all its members'."""
    return files_hash(adapter_of(run) or run)


def latest(path: Path) -> Path:
    """The run directory that `path` stands for: of `perlhf loop`'s directory the policy of its last finished round."""
    rounds = sorted(path.glob("round-[0-9][0-9][0-9][0-9]/policy"), reverse=True)
    return next((policy for policy in rounds if (policy / RESULT).is_file()), path)


def named(words: Sequence[str]) -> dict[str, Path]:
    """Directories by name: `NAME=DIRECTORY`, or a directory under its own name.

    Raises:
        ConfigError: a name twice, or one that an address can't hold.
        RunError: no such directory.
    """
    found: dict[str, Path] = {}
    for word in words:
        name, sign, rest = word.partition("=")
        path = Path(rest) if sign and not Path(word).exists() else Path(word)
        name = name if sign and path == Path(rest) else path.resolve().name
        if not path.is_dir():
            raise RunError(
                "there is no such directory", where=str(path), hint="NAME=DIRECTORY or DIRECTORY names a run"
            )
        if not name or not all(sign.isalnum() or sign in "._-" for sign in name) or name == BASE:
            hint = f"another name: NAME={path}"
            raise ConfigError(
                f"a run can't be called {name!r}", where="runs", allowed="letters, digits, . _ -", hint=hint
            )
        if name in found:
            what, hint = f"two runs are called {name!r}", f"name one of them: NAME={path}"
            raise ConfigError(what, where="runs", allowed="each name once", hint=hint)
        found[name] = path
    return found
