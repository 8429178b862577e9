"""Sampling by a vLLM server (`sampler: vllm`): it holds the same base, and is sent each version of an adapter as files.

Every version has a name and a directory of its own (PEFT's layout, renamed into place) and is loaded under that name,
never over another one, so that no cache of an older version answers for it. It is unloaded one version later, when no
request that is under way asks for it any more. The server's log-probabilities are those that it sampled with; how the
policy's own differ from them is corrected and bounded where it learns (`method.losses.completion_ratio`).

That the server computes with what it was sent is seen at each version (`Server.version`, `probe.py`), and that it has
this base at all before anything is sampled (`Server.check`). One that is gone is waited for, and sent it again.
"""

import contextlib
import hashlib
import re
import secrets
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import torch

from perlhf.errors import ConfigError, PerlhfError, ServiceError, StaleSamplerError
from perlhf.method.packing import Ids
from perlhf.model import saved
from perlhf.model.encoding.encode import Encoder
from perlhf.model.model import Model
from perlhf.parallel.workers import Workers
from perlhf.rollout.local import Ends, Rollout
from perlhf.rollout.vllm.connection import Connection, introduction, mapping, request
from perlhf.rollout.vllm.probe import (
    PROBE_TOKENS,
    Answer,
    Greedy,
    differs,
    follows,
    gap,
    greedy_of,
    logprobs_of,
)
from perlhf.system.console import note
from perlhf.system.files import remove_directory, remove_leftovers

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What --max-lora-rank takes."""
FAREWELL_SECONDS = 5.0
"""For telling a server what it may forget, at the end of a run."""


@dataclass(frozen=True)
class Version:
    """An adapter as it was once, or the base, on the server."""

    name: str
    directory: Path | None
    """None for the base."""
    weights: tuple[tuple[str, int], ...]
    """`Model.version`."""
    greedy: Greedy


class Server:
    """A vLLM server as one run uses it. Leaving the context unloads what the run loaded.

    All workers call `check` and `version` together; the first one alone writes and loads. Each samples for itself.

    Args:
        url: of the server.
        directory: where versions are written; the server sees it by the same path.
        run: a path that names its versions, such as the run's directory: nobody else asks under it meanwhile.
        prompts: two that the probe answers.
        max_gap: nats a token by which log-probabilities of the probe may differ in the mean, and within which two
            tokens are a tie.
        timeout_seconds: limit of one request, and of waiting for a server that is gone.
    """

    def __init__(
        self,
        model: Model,
        encoder: Encoder,
        workers: Workers,
        *,
        url: str,
        directory: Path,
        run: Path,
        prompts: Sequence[Ids],
        max_gap: float,
        timeout_seconds: float,
    ):
        self._connection = Connection(url, timeout_seconds)
        self._model, self._encoder, self._workers = model, encoder, workers
        self._directory, self._prompts = directory.absolute(), [list(ids) for ids in prompts]
        self._max_gap = max_gap
        self._prefix = f"perlhf-{hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:8]}-"
        self._session, self._number = "", 0
        self._base, self._known = "", dict[str | None, list[Version]]()
        self._seconds = {"seconds_load": 0.0, "seconds_probe": 0.0}

    def check(self, *adapters: str, slots: int, temperature: float = 1.0) -> None:
        """Sees that the server is one to sample with, before anything is sampled; loads adapters for the first time.

        Args:
            slots: adapters that it must hold at a time.
            temperature: of sampling, where something goes by the log-probabilities of what is sampled.

        Raises:
            ServiceError: nobody answers there, or what answers isn't vLLM.
            ConfigError: another version of vLLM, another base or tokenizer, raw log-probabilities, no room for the
                adapters' rank, for so many adapters or for such long sequences; a directory that it doesn't see.
            StaleSamplerError: it doesn't compute with one of the adapters.
        """
        self._base = self._workers.once(lambda: introduction(self._connection, self._encoder))
        self._session = self._workers.once(lambda: f"{self._prefix}{secrets.token_hex(3)}-")
        self._workers.once(self._sweep)
        base = Version(self._base, None, (), self._greedy(None))
        self._known[None] = [base]
        found = self._workers.once(lambda: self._probed(base))
        if problem := differs(base.greedy, found, self._max_gap) or self._too_far(base.greedy, found):
            raise ConfigError(
                f"the server's answers aren't those of base {self._model.fingerprint['name']}: {problem}",
                where="vllm.url",
                allowed="the same base, without adapter",
                hint="start it with the directory that perlhf pull names, and with the dtype of this run",
            )
        self._check_processed(base, temperature)
        for adapter in adapters:
            self._publish(adapter)
        if slots:
            self._workers.once(lambda: self._check_slots(slots))
        self._connection.patient = True

    def version(self, adapter: str | None) -> Version:
        """The adapter as it is now (None: the base), loaded and probed: its greedy answers are the local engine's.

        Raises:
            StaleSamplerError: the server computes with other weights; ServiceError: it is gone for too long;
            ConfigError: it refuses the adapter; StorageError: the files can't be written.
        """
        known = self._known.get(adapter, [])
        if known and (adapter is None or known[-1].weights == self._model.version(adapter)):
            return known[-1]
        assert adapter is not None
        return self._publish(adapter)

    def spent(self) -> dict[str, float]:
        """Seconds since the last call for writing and loading versions, and for probing them."""
        spent, self._seconds = self._seconds, dict.fromkeys(self._seconds, 0.0)
        return spent

    def sample(
        self,
        version: Version,
        prompts: Sequence[Ids],
        seeds: Sequence[int],
        *,
        samples: int,
        ends: Ends,
        temperature: float,
        max_completion_tokens: int,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Rollout:
        """`samples` completions of each prompt, which end where those of `local.sample` would.

        Args:
            seeds: one for each prompt (`seeds_of`).
            cancelled: is asked while the server is waited for.

        Raises:
            CancelledError: it said yes. Interrupted: a stop was asked.
            StaleSamplerError: a server that was started again has other weights; ServiceError: it is gone for too
                long, or its answers have no tokens and log-probabilities.
        """
        found: dict[int, list[tuple[Answer, bool]]] = {}
        count = 1 if temperature == 0 else samples  # several greedy answers are alike, and vLLM refuses to give them
        # Should it see a stop string where we see none, the prompt is sampled once more without them.
        for stop in dict.fromkeys((ends.stop, ())):
            left = [at for at in range(len(prompts)) if at not in found]
            bodies = [
                request(version.name, prompts[at], count, seeds[at], temperature, max_completion_tokens)
                | {"stop_token_ids": list(ends.ids), "stop": list(stop), "include_stop_str_in_output": True}
                for at in left
            ]
            for at, answers in zip(left, self._completions(version, bodies, cancelled) if left else (), strict=True):
                cut = [_cut(answer, ends) for answer in answers]
                if all(ended or len(ids) == max_completion_tokens for (ids, _), ended in cut):
                    found[at] = cut
        if len(found) < len(prompts):
            what = "ended a completion before its last token, and with no end token"
            raise ServiceError(what, where=self._connection.shown, allowed=f"{max_completion_tokens} tokens, or an end")
        rows = [row for at in range(len(prompts)) for row in found[at] * (samples // count)]
        return Rollout(
            [list(ids) for ids in prompts for _ in range(samples)],
            [ids for (ids, _), _ in rows],
            [logprobs for (_, logprobs), _ in rows],
            [ended for _, ended in rows],
            torch.zeros(0, self._model.hidden_size),
            version.weights,
            ends,
        )

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if not self._workers.first:
            return
        self._connection.timeout_seconds = FAREWELL_SECONDS
        for version in [version for versions in self._known.values() for version in versions]:
            with contextlib.suppress(PerlhfError):
                self._remove(version)
        with contextlib.suppress(OSError):
            self._directory.rmdir()

    # before anything is sampled

    def _sweep(self) -> None:
        """Unloads and deletes what an earlier session of this run, which was killed, left."""
        for one in mapping(self._connection.once("/v1/models"))["data"]:
            if (name := str(one.get("id"))).startswith(self._prefix):
                self._unload(name)
        for path in self._directory.glob(f"{self._prefix}*"):
            remove_directory(path)
        remove_leftovers(self._directory)

    @torch.no_grad()
    def _check_processed(self, base: Version, temperature: float) -> None:
        """Raises ConfigError where log-probabilities are those before the temperature (raw)."""
        if temperature == 1:
            return
        bodies = [request(base.name, ids, 1, 1, temperature, PROBE_TOKENS) for ids in self._prompts]
        found = self._workers.once(lambda: [answers[0] for answers in self._completions(base, bodies)])
        tokens = [list(ids) for ids, _ in found]
        gaps = []
        for at in (temperature, 1.0):
            ours = Greedy(tokens, logprobs_of(self._model, None, self._prompts, tokens, at))
            gaps.append(gap(ours, found))
        if gaps[1] < gaps[0]:
            what = f"its log-probabilities at temperature {temperature:g} are those of temperature 1"
            hint = "start it with --logprobs-mode processed_logprobs"
            raise ConfigError(what, where="vllm.url", allowed="those that it samples with", hint=hint)

    def _check_slots(self, needed: int) -> None:
        """Raises ConfigError where fewer adapters have room at a time, as the server's metrics tell."""
        text = str(self._connection.once("/metrics", as_text=True))
        found = re.search(r'lora_requests_info\{[^}]*max_lora="(\d+)"', text)
        if found is None:
            where = f"{self._connection.shown}/metrics"
            note(f"{where} doesn't tell how many adapters the server holds; --max-loras {needed} is needed")
        elif int(found[1]) < needed:
            what, hint = f"the server holds {found[1]} adapters at a time", f"start it with --max-loras {needed}"
            allowed = f"at least {needed}, which are in use at a time"
            raise ConfigError(what, where="vllm.url", allowed=allowed, hint=hint)

    # versions

    def _greedy(self, adapter: str | None) -> Greedy:
        return greedy_of(self._model, adapter, self._prompts, PROBE_TOKENS)

    def _publish(self, adapter: str) -> Version:
        """A new version of the adapter: written, loaded, probed; all but the one before it are unloaded."""
        began = time.perf_counter()
        greedy = self._greedy(adapter)
        self._number += 1
        name = f"{self._session}{self._number}"
        new = Version(name, self._directory / name, self._model.version(adapter), greedy)
        versions = self._known.setdefault(adapter, [])
        versions.append(new)
        told = time.perf_counter()

        def send() -> tuple[float, list[Answer]]:
            for old in versions[:-2]:
                self._remove(old)
            assert new.directory is not None
            saved.save_adapter(self._model, adapter, new.directory, self._encoder)
            self._connection.patiently(lambda: self._load(new))
            return time.perf_counter() - told, self._probed(new)

        loading, found = self._workers.once(send)
        del versions[:-2]
        self._check_probe(new, found)
        self._seconds["seconds_load"] += loading
        self._seconds["seconds_probe"] += time.perf_counter() - began - loading
        return new

    def _probed(self, version: Version) -> list[Answer]:
        """The server's greedy answers to the probe's prompts."""
        bodies = [request(version.name, ids, 1, 0, 0.0, PROBE_TOKENS) for ids in self._prompts]
        return [answers[0] for answers in self._completions(version, bodies, checked=True)]

    def _check_probe(self, version: Version, found: Sequence[Answer]) -> None:
        """Raises StaleSamplerError where the answers aren't those of the version."""
        others = [
            ("the base" if adapter is None else "the version before" if version in versions else f"'{adapter}'", one)
            for adapter, versions in self._known.items()
            for one in versions
            if one is not version
        ]
        nearer = [what for what, other in others if follows(found, version.greedy, other.greedy)]
        problem = differs(version.greedy, found, self._max_gap) or self._too_far(version.greedy, found)
        if nearer:
            problem = f"its log-probabilities are those of {nearer[0]}"
        if problem:
            raise StaleSamplerError(
                f"the server doesn't sample with adapter {version.name} as it was written: {problem}",
                where=self._connection.shown,
                allowed="the local engine's greedy answers, ties apart, and log-probabilities within "
                f"{self._max_gap:g} nats a token (max_sampler_gap)",
                hint="start the server again, without what reloads adapters in place; what was learned is kept",
            )

    def _too_far(self, greedy: Greedy, found: Sequence[Answer]) -> str | None:
        far = gap(greedy, found)
        return None if far <= self._max_gap else f"its log-probabilities are {far:.3g} nats a token from ours"

    def _load(self, version: Version) -> None:
        """Has the server load a version that lies in its directory; one that it has already is left.

        Raises:
            ConfigError: it can't, and what to try; ServiceError: it is gone.
        """
        body = {"lora_name": version.name, "lora_path": str(version.directory)}
        try:
            self._connection.once("/v1/load_lora_adapter", [body], as_text=True)
        except ServiceError as error:
            if "already been loaded" in error.what:
                return
            raise self._refused(error, version) from None

    def _refused(self, error: ServiceError, version: Version) -> PerlhfError:
        """What a refusal to load says, and what to try."""
        said = error.what
        if "max_lora_rank" in said:
            rank = max(len(pair.a) for pair in saved.read_adapter(cast(Path, version.directory)).adapter.pairs.values())
            room = next((f"--max-lora-rank {one}" for one in RANKS if one >= rank), "a lower rank")
            hint = f"start it with {room}, or train with a lower adapter.rank"
            return ConfigError(f"the server has no room for rank {rank}: {said}", where="adapter.rank", hint=hint)
        if "No adapter found" in said or "No such file" in said:
            what = f"the server doesn't see {version.directory}: {said}"
            hint = "name a directory that it sees by the same path: --vllm.directory"
            return ConfigError(what, where="vllm.directory", hint=hint)
        if error.status == 404:
            hint = "start it with --enable-lora, and with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment"
            return ConfigError("the server loads no adapter while it runs", where="vllm.url", hint=hint)
        if error.status is not None and not error.passing:
            hint = "its own log has the reason; is it started with --enable-lora?"
            return ConfigError(f"the server refused the adapter: {said}", where="vllm.url", hint=hint)
        return error

    def _remove(self, version: Version) -> None:
        """Unloads a version and deletes its files; what can't be deleted now is swept by the next session."""
        if version.directory is not None:
            self._unload(version.name)
            with contextlib.suppress(OSError):
                remove_directory(version.directory)

    def _unload(self, name: str) -> None:
        """Has the server forget an adapter; one that doesn't know it, or is gone, has."""
        with contextlib.suppress(ServiceError):
            self._connection.once("/v1/unload_lora_adapter", [{"lora_name": name}], as_text=True)

    # asking

    def _completions(
        self,
        version: Version,
        bodies: Sequence[Mapping[str, Any]],
        cancelled: Callable[[], bool] = lambda: False,
        checked: bool = False,
    ) -> list[list[Answer]]:
        """The answers to each request; a server that has lost the version gets it again, and is probed again.

        Args:
            checked: whoever asks compares the answers himself: they are the probe.
        """

        def ask() -> list[list[Answer]]:
            answers = self._connection.once("/v1/completions", bodies, cancelled)
            return [
                self._connection.choices(answer, int(body["n"])) for answer, body in zip(answers, bodies, strict=True)
            ]

        def again() -> None:
            if version.directory is not None:
                self._load(version)
            if not checked:
                probe = [request(version.name, ids, 1, 0, 0.0, PROBE_TOKENS) for ids in self._prompts]
                answers = self._connection.once("/v1/completions", probe, cancelled)
                self._check_probe(version, [self._connection.choices(answer, 1)[0] for answer in answers])

        return self._connection.patiently(ask, again, cancelled)


def seeds_of(seed: int, step: int, prompts: Sequence[int], samples: int, chosen: Sequence[int]) -> list[int]:
    """Of the prompts at the places `chosen`: keyed by (seed, step, prompt), and by how often it came before.

    The server gives the samples of one request seeds that count on from it.
    """
    seen: Counter[int] = Counter()
    found = list[int]()
    for prompt in prompts:
        key = hashlib.sha256(f"{seed}:{step}:{prompt}:{seen[prompt]}".encode()).digest()
        seen[prompt] += samples
        found.append(int.from_bytes(key[:6]))
    return [found[at] for at in chosen]


def _cut(answer: Answer, ends: Ends) -> tuple[Answer, bool]:
    """A completion up to the token that ends it, which is kept, and whether there is one."""
    ids, logprobs = answer
    for count in range(1, len(ids) + 1):
        if ends.end(ids[:count]):
            return (ids[:count], logprobs[:count]), True
    return answer, False
