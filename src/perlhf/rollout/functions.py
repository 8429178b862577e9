"""Reward functions that users write: called by the names that they ask for, their mistakes shown as theirs.

What a function may ask for, by the names of its parameters, each a list with one entry for each completion: `prompts`,
`completions`, `completion_ids`, and any other column of the data; besides `trainer_state`. So TRL's reward functions
work as they are (huggingface.co/docs/trl: "Using a custom reward function").
"""

import asyncio
import copy
import hashlib
import importlib
import inspect
import itertools
import math
import os
import re
import site
import sys
import sysconfig
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, SupportsFloat

import numpy as np

from perlhf.config.addresses import is_address, shown
from perlhf.data.records import Text
from perlhf.errors import ConfigError, PerlhfError, RewardFunctionError, nearest
from perlhf.method.packing import Ids
from perlhf.system.hashes import hash_of
from perlhf.system.waiting import finish

PROVIDED = ("prompts", "completions", "completion_ids", "trainer_state")
"""What every function can ask for; these names are ours where the data has columns of the same names."""
NOT_GIVEN = ("log_extra", "log_metric", "environments")
"""What TRL gives besides; left out where a function can do without."""
SHOWN_FRAMES = 5
_ANSWERS = ("completion", "response", "output", "reply", "replies", "answer", "generation", "generated")
_QUESTIONS = ("prompt", "query", "queries", "question", "input", "instruction")
"""How names begin that people give to completions and prompts."""


@dataclass(frozen=True)
class TrainerState:
    """How far training is, under the names of transformers' TrainerState."""

    global_step: int = 0
    """Updates done when the completions were sampled."""
    max_steps: int = 0
    """Updates of the whole run."""


@dataclass(frozen=True)
class Asked:
    """Completions to be scored, and what is known of each: lists of one length."""

    prompts: list[Text]
    completions: list[str]
    completion_ids: list[Ids] = field(default_factory=list[Ids])
    columns: list[Mapping[str, Any]] = field(default_factory=list[Mapping[str, Any]])
    """The other columns of each prompt's row."""
    state: TrainerState = TrainerState()


Scorer = Callable[[Asked], list[float] | Coroutine[Any, Any, list[float]]]
"""One finite score for each completion, nan for one that it leaves out."""


def load_function(name: str, key: str = "reward", columns: AbstractSet[str] = frozenset()) -> Scorer:
    """The function that `module:function` names, called by the names of its parameters, its scores checked.

    A function of two parameters neither of which has a known name gets prompts and completions in this order, unless
    the names say that it wants them the other way round. The current directory is importable, as it is for `python -m`.
    An async function gives an async scorer.

    Args:
        key: of the configuration, which errors name.
        columns: names of the data's other columns.

    Raises:
        ConfigError: malformed name, no such module, no such function (with the nearest), a parameter that can't be
            given.
        RewardFunctionError: the module can't be imported; at a call, the function fails, returns another number of
            scores than completions, or one that is neither a finite number nor None.
    """
    module_name, colon, attribute = name.partition(":")
    if (
        not colon
        or not all(part.isidentifier() for part in (*module_name.split("."), attribute))
        or module_name.endswith(".py")
    ):
        hint = "an address begins with http:// or https://" if "/" in name else None
        if module_name.endswith(".py"):
            hint = f"start perlhf in the directory of {module_name}, and name {Path(module_name).stem}:{attribute}"
        raise ConfigError(f"{shown(name)!r} names no function", where=key, allowed="module:function", hint=hint)
    module = _imported(module_name, key)
    function = getattr(module, attribute, None)
    if not callable(function):
        callables = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        close = nearest(attribute, callables)
        problem = "has no function" if function is None else "holds no function under"
        hint = f"did you mean {module_name}:{close}?" if close else None
        raise ConfigError(f"module {module_name} {problem} {attribute!r}", where=key, hint=hint)
    if isinstance(function, type):
        hint = f"make an object of it in {module_name}, reward = {attribute}(), and name that"
        raise ConfigError(
            f"{name} is a class", where=key, allowed="a function, or an object that can be called", hint=hint
        )
    call = _Call(name, function, module, key, columns)

    if call.is_async:

        async def score_async(asked: Asked) -> list[float]:
            return await call.awaited(asked)

        return score_async

    def score(asked: Asked) -> list[float]:
        return call.made(asked)

    return score


def source_hash(name: str, key: str = "reward") -> str:
    """SHA-256 of the code that `module:function` runs: the files of its module, of the module that defines the
    function, and of all modules of the user's own that these name. What is imported inside a function isn't seen.

    Raises:
        ConfigError, RewardFunctionError: the module can't be imported.
    """
    module_name, _, attribute = name.partition(":")
    module = _imported(module_name, key)
    found: dict[str, Path] = {}
    waiting = [module, sys.modules.get(getattr(getattr(module, attribute, None), "__module__", None) or "")]
    while waiting:
        one = waiting.pop()
        file = getattr(one, "__file__", None)
        # Of a library the file that was named, without all that it needs: its version is in the manifest.
        if one is None or one.__name__ in found or not file or not (_is_users(file) or one is module):
            continue
        found[one.__name__] = Path(file)
        for value in list(vars(one).values()):
            origin = value if isinstance(value, ModuleType) else getattr(value, "__module__", None)
            waiting.append(origin if isinstance(origin, ModuleType) else sys.modules.get(str(origin)))
    lines = [f"{name}:{hash_of(found[name])}\n" for name in sorted(found) if found[name].is_file()]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def code_of(sources: Iterable[str], key: str = "reward") -> dict[str, str]:
    """`source_hash` of the functions among sources of rewards, by their names; a service's code isn't here.

    Raises:
        ConfigError, RewardFunctionError: a module that can't be imported.
    """
    named = [source for source in sources if ":" in source and not is_address(source) and not Path(source).exists()]
    return {source: source_hash(source, key) for source in dict.fromkeys(named)}


def importable(directory: Path) -> None:
    """Has users' modules looked for in a directory, after everywhere else."""
    if (name := os.path.normpath(directory)) not in sys.path:
        sys.path.append(name)


def checked(scores: object, count: int, where: str, said: Callable[[str], str] = str) -> list[float]:
    """`scores` as floats, None as nan.

    Args:
        said: how errors show what came instead of a score.

    Raises:
        RewardFunctionError: it names index and value, unless there are `count` finite numbers or None.
    """
    refused = isinstance(scores, str | bytes | bytearray | Mapping | AbstractSet)
    if not isinstance(scores, Iterable) or refused or hasattr(scores, "iterrows"):  # a table gives its columns' names
        what, allowed = f"returned {type(scores).__name__}", "a list of scores, in the order of the completions"
        raise RewardFunctionError(what, where=where, allowed=allowed)
    unbounded = not hasattr(scores, "__len__")  # such as a generator, which may never end
    values = list(itertools.islice(scores, count + 1) if unbounded else scores)
    if len(values) != count:
        number = f"more than {count}" if unbounded and len(values) > count else len(values)
        raise RewardFunctionError(f"returned {number} scores for {count} completions", where=where, allowed="one each")
    return [math.nan if value is None else _finite(value, index, where, said) for index, value in enumerate(values)]


class _Call:
    """How one function is called, found out once from its signature."""

    def __init__(
        self, name: str, function: Callable[..., Any], module: ModuleType, key: str, columns: AbstractSet[str]
    ):
        self._name, self._function, self._module = name, function, module
        self._parameters = _parameters(function)
        self._known = (*PROVIDED, *sorted(columns - {*PROVIDED, "prompt", "completion"}))
        self._by_position = self._knows_no_name()
        self._messages = _wants_messages(self._parameters)
        if not self._by_position:
            self._check_names(key)
        # Of a decorated function the decorator's own counts: it may be one that waits.
        own_call = inspect.getattr_static(function, "__call__", None)
        self.is_async = any(map(inspect.iscoroutinefunction, (function, own_call)))

    def made(self, asked: Asked) -> list[float]:
        """The function's scores."""
        positional, named = self._arguments(asked)

        def call() -> list[float]:
            found = self._function(*positional, **named)
            return checked(finish(_awaited(found)) if inspect.isawaitable(found) else found, count, self._name)

        count = len(asked.completions)
        return self._shown_as_theirs(call)

    async def awaited(self, asked: Asked) -> list[float]:
        """An async function's scores."""
        positional, named = self._arguments(asked)
        found, failure = None, None
        try:
            found = await self._function(*positional, **named)
        except (Exception, SystemExit, asyncio.CancelledError) as error:  # it is the user's code, and shown as that
            if (task := asyncio.current_task()) and task.cancelling():
                raise
            failure = error

        def settle() -> list[float]:
            if failure is not None:
                raise failure
            return checked(found, len(asked.completions), self._name)

        return self._shown_as_theirs(settle)

    def _knows_no_name(self) -> bool:
        """Whether the function takes two things by position under names that say nothing, as `def f(a, b)`."""
        if self._parameters is None:
            return True
        by_position = [p for p in self._parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        needed = [p for p in by_position if p.default is p.empty]
        only_named = [p for p in self._parameters if p.kind == p.KEYWORD_ONLY]
        if {p.name for p in (*by_position, *only_named)} & set(self._known):
            return False
        first, second, *_ = (*(p.name.lower() for p in by_position), "", "")
        if first.startswith(_ANSWERS) or second.startswith(_QUESTIONS):
            return False
        if any(p.kind == p.VAR_POSITIONAL for p in self._parameters):
            return len(needed) <= 2 and not self._takes_any_name()
        return len(needed) <= 2 <= len(by_position)

    def _takes_any_name(self) -> bool:
        return any(p.kind == p.VAR_KEYWORD for p in self._parameters or ())

    def _check_names(self, key: str) -> None:
        """Raises ConfigError for a parameter that must be given and can't be."""
        single = [p for p in self._parameters or () if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        missing = [p.name for p in single if p.default is p.empty and p.name not in self._known]
        if not missing:
            if not single and not self._takes_any_name():
                raise ConfigError(f"{self._name} takes no completions", where=key, allowed=", ".join(self._known))
            return
        name, others = missing[0], self._known[len(PROVIDED) :]
        if name in NOT_GIVEN:
            problem, hint = f"asks for {name!r}, which perlhf doesn't give", f"give it a default: {name}=None"
        else:
            problem = f"asks for {name!r}, which no prompt of the data has"
            close = "completions" if name.lower().startswith(_ANSWERS) else nearest(name, self._known)
            hint = f"rename it to {close!r}, or add that column to the data" if close else None
            hint = hint or f"add the column {name!r} to the data, or give the parameter a default"
        data = f"and the data's columns {', '.join(others)}" if others else "(the data has no other column)"
        raise ConfigError(f"{self._name} {problem}", where=key, allowed=f"{', '.join(PROVIDED)} {data}", hint=hint)

    def _arguments(self, asked: Asked) -> tuple[list[Any], dict[str, Any]]:
        """What the function is called with, by position and by name."""
        prompts = [_plain(prompt) for prompt in asked.prompts]
        completions: list[Any] = list(asked.completions)
        if self._messages != "never":
            completions = [
                text if self._messages == "chats" and isinstance(prompt, str) else [_answer(text)]
                for prompt, text in zip(prompts, asked.completions, strict=True)
            ]
        # Copies throughout: what a function does to what it gets must not reach the next one, or the next update.
        given: dict[str, Any] = {
            name: [copy.deepcopy(row.get(name)) for row in asked.columns] for name in self._known if self._takes(name)
        }
        given |= {"prompts": prompts, "completions": completions, "trainer_state": asked.state}
        given["completion_ids"] = [list(ids) for ids in asked.completion_ids]
        if self._by_position:
            rest = self._known[2:] if self._takes_any_name() else ()
            return [prompts, completions], {name: given[name] for name in rest}
        positional, taken = list[Any](), set[str]()
        for parameter in self._parameters or ():
            if parameter.kind == parameter.POSITIONAL_ONLY:
                if parameter.name not in given:  # it has a default, and whatever comes after it by position, too
                    break
                positional.append(given[parameter.name])
                taken.add(parameter.name)
        return positional, {name: given[name] for name in given if name not in taken and self._takes(name)}

    def _takes(self, name: str) -> bool:
        return self._takes_any_name() or any(p.name == name for p in self._parameters or ())

    def _shown_as_theirs(self, call: Callable[[], list[float]]) -> list[float]:
        """What `call` returns; what the user's code raises becomes an error with the lines of their files."""
        try:
            return call()
        except PerlhfError:
            raise
        except (Exception, SystemExit, asyncio.CancelledError) as error:
            raise _theirs(error, self._name, self._module, self._hint(error)) from error

    def _hint(self, error: BaseException) -> str | None:
        """Whether the function took completions for something else than they are."""
        if not isinstance(error, TypeError | AttributeError | KeyError):
            return None
        if self._messages == "never" and "string indices must be" in str(error):
            return "a completion is text here; annotate completions: list[list[dict]] to get TRL's lists of messages"
        if self._messages != "never" and "'list' object has no attribute" in str(error):
            return (
                "with **kwargs, completions of chat prompts are lists of one message, as TRL gives them; annotate "
                "completions: list[str] to get text"
            )
        return None


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter] | None:
    """None for a function that doesn't tell, such as some builtins."""
    try:
        return list(inspect.signature(function).parameters.values())
    except (ValueError, TypeError):
        return None


def _wants_messages(parameters: Sequence[inspect.Parameter] | None) -> str:
    """Whether completions are given as TRL gives those of chats, `[{"role": "assistant", "content": ...}]`.

    "always" where the function says so (`completions: list[list[dict]]`), "never" where it says `list[str]` or hasn't
    TRL's signature, which always ends in `**kwargs`; else for completions of "chats".
    """
    for parameter in parameters or ():
        if parameter.name == "completions" and parameter.annotation is not parameter.empty:
            annotation = re.sub(r"\w+\.", "", inspect.formatannotation(parameter.annotation)).lower()
            if re.search(r"dict|message|\[(list|sequence)", annotation):
                return "always"
            if "str" in annotation:
                return "never"
    return "chats" if any(p.kind == p.VAR_KEYWORD for p in parameters or ()) else "never"


def _plain(prompt: Text) -> str | list[dict[str, Any]]:
    return prompt if isinstance(prompt, str) else [copy.deepcopy(dict(message)) for message in prompt]


def _answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


async def _awaited(found: Awaitable[Any]) -> Any:
    return await found


def _imported(module_name: str, key: str) -> ModuleType:
    """The module, looked up in the current directory too."""
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    importlib.invalidate_caches()
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise ConfigError(
                f"no module named {error.name!r}",
                where=key,
                hint=f"start perlhf in the directory that holds {error.name.split('.')[0]}.py, or install it",
            ) from None
        raise ConfigError(f"module {module_name} doesn't import: {error}", where=key) from error
    except ImportError as error:
        raise ConfigError(f"module {module_name} doesn't import: {error}", where=key) from error
    except SyntaxError as error:
        raise ConfigError(f"syntax error: {error.msg}", where=f"{error.filename}:{error.lineno}") from error
    except PerlhfError:
        raise
    except (Exception, SystemExit) as error:
        raise _theirs(error, f"{key}: module {module_name}", None) from error


def _theirs(error: BaseException, name: str, module: ModuleType | None, hint: str | None = None) -> RewardFunctionError:
    """What a user's code raised, as one line, and where in their files."""
    own = getattr(module, "__file__", None)
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == own or _is_users(frame.filename)
    ]
    said = f"{type(error).__name__}: {str(error)[:500]}".rstrip(": ")
    if isinstance(error, SystemExit):
        said = f"ended the program: SystemExit({error.code!r})"
    lines = [said]
    for frame in frames[-SHOWN_FRAMES:]:
        lines.append(f"  {_near(frame.filename)}:{frame.lineno}, in {frame.name}")
        lines += [f"    {frame.line}"] if frame.line else []
    return RewardFunctionError("\n".join(lines), where=name, hint=hint)


def _is_users(filename: str) -> bool:
    """Whether a file is neither ours nor of an installed package, nor of Python itself."""
    libraries = [str(Path(__file__).parents[1]), *site.getsitepackages()]
    libraries += [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    return not filename.startswith(("<", *(library + os.sep for library in libraries)))


def _near(filename: str) -> str:
    """A path as short as it can be from here."""
    path, here = Path(filename), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else filename


def _finite(value: object, index: int, where: str, said: Callable[[str], str]) -> float:
    number = math.nan
    if isinstance(value, SupportsFloat):
        try:
            # An array or tensor of one value, gradients or not.
            number = float(value.item() if hasattr(value, "item") else value)  # pyright: ignore[reportAttributeAccessIssue]
        except (TypeError, ValueError, OverflowError, RuntimeError):  # an array or tensor of several values
            number = math.nan
    if not math.isfinite(number):
        left_out = isinstance(value, float | np.floating)  # people write nan for it
        hint = "return None for a completion that is to be left out" if left_out else None
        raise RewardFunctionError(
            f"score {index} is {said(f'{value!r:.500}'):.100}",
            where=where,
            allowed="a finite number, or None",
            hint=hint,
        )
    return number
