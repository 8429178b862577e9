"""Configuration models as command lines: `[recipe.yaml] [POSITIONAL ...] [--dotted.option value ...]`.

tyro reads the options from a plain dataclass that mirrors the model and has the recipe's values as defaults; pydantic
then checks the result once, so that a wrong value reads the same from a recipe and from the command line.
"""

import dataclasses
import inspect
import json
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar, cast, get_origin

import tyro
from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo
from tyro.constructors import PrimitiveConstructorSpec

from perlhf.config.recipe import (
    CROSS_FIELD,
    Recipe,
    explain,
    find_problems,
    read_mapping,
    read_recipe,
    submodel,
    validated,
)
from perlhf.errors import ConfigError

Model = TypeVar("Model", bound=BaseModel)

DRY_RUN, JSON = "dry_run", "json"
FLAGS = {
    DRY_RUN: "Print the resolved plan (records, updates, trainable parameters, way, memory) and stop.",
    JSON: "Print one JSON object instead of a table.",
}
"""Switches that are no part of a configuration, with their help."""


@dataclass(frozen=True)
class Command(Generic[Model]):
    """How a configuration model is typed: `positionals` are dotted field names given without their option."""

    prog: str
    model: type[Model]
    positionals: tuple[str, ...] = ()
    dry_run: bool = False
    json: bool = False

    @property
    def flag(self) -> str | None:
        """The one of `FLAGS` that the command has."""
        return DRY_RUN if self.dry_run else JSON if self.json else None

    @property
    def about(self) -> str:
        """The model's docstring without its margin, which Python 3.13 alone strips by itself."""
        return inspect.cleandoc(self.model.__doc__ or "")


def parse(
    command: Command[Model], arguments: Sequence[str], defaults: Mapping[str, Any] | None = None
) -> tuple[Model, bool]:
    """The configuration that a command line asks for, and whether its flag (`Command.flag`) was given.

    Args:
        command: what is typed.
        arguments: words after the command's name.
        defaults: values, as JSON would hold them, that stand in for the model's defaults; the recipe's come first.

    Raises:
        ConfigError: in the recipe or across options.
        SystemExit: 0 after `--help`; 2, after tyro's message, for options that are misspelt or can't be read.
    """
    arguments = list(arguments)
    recipe = read_recipe(arguments.pop(0)) if arguments and _is_recipe(arguments[0]) else None
    _refuse_stray_words(command, arguments, recipe)
    if recipe:
        _check_recipe(command.model, recipe)
    values = _read_options(command, arguments, {**(defaults or {}), **(recipe.values if recipe else {})})
    flag = bool(values.pop(command.flag, False)) if command.flag else False
    where = str(recipe.path) if recipe else command.prog
    return validated(command.model, values, where=where), flag


def own_options(model: type[BaseModel], words: Sequence[str], flags: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """Words that are options of a model, with their values, and all others, each in their order.

    Args:
        flags: switches among the former.
    """
    names = {f"--{name.replace('_', '-')}" for name in model.model_fields}
    own, others, taken = list[str](), list[str](), False
    for word in words:
        name, _, value = word.partition("=")
        known = name.replace("_", "-") in names
        (own if taken or known or word in flags else others).append(word)
        taken = not taken and known and not value
    return own, others


def stage_of(path: str, models: Mapping[str, type[BaseModel]]) -> str:
    """The one of the models whose keys a recipe has; where several have them, the one that its file is called after.

    Raises:
        ConfigError: the recipe can't be read, or could be for several.
    """
    keys = read_recipe(path).values.keys()
    able = [name for name, model in models.items() if keys <= model.model_fields.keys()]
    named = [name for name in able if name in Path(path).stem.split("-")]
    if len(found := (able if len(able) == 1 else named)) == 1:
        return found[0]
    if not able:  # a key that is wrong in all: the model that knows most of them says which
        return max(models, key=lambda name: len(keys & models[name].model_fields.keys()))
    what = f"a recipe for {' or '.join(able)}: nothing in it tells which"
    raise ConfigError(what, where=path, hint=f"--stage {able[0]}")


def _is_recipe(argument: str) -> bool:
    return not argument.startswith("-") and argument.endswith((".yaml", ".yml"))


def _refuse_stray_words(command: Command[Any], arguments: Sequence[str], recipe: Recipe | None) -> None:
    """tyro would call a stray first word an unrecognised option; say what the place is for."""
    if not arguments or arguments[0].startswith("-") or command.positionals:
        return
    if recipe or not command.dry_run:
        raise ConfigError(f"unexpected {arguments[0]!r}", where=command.prog, allowed="options, which start with --")
    raise ConfigError(f"{arguments[0]!r} is not a recipe", where=command.prog, allowed="a file ending in .yaml or .yml")


def _check_recipe(model: type[BaseModel], recipe: Recipe) -> None:
    """Report what is wrong with the recipe itself; options may still mend what spans several keys."""
    for problem in find_problems(model, recipe.values):
        if problem["type"] not in CROSS_FIELD:
            raise explain(model, problem, recipe)


def _read_options(command: Command[Any], arguments: Sequence[str], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Values of all fields, as JSON would hold them: defaults overridden by options."""
    mirror = _mirror(command.model, defaults, command.positionals, (command.flag,) if command.flag else ())
    # `null` is how a recipe writes it, and what the field docstrings say; tyro reads `None`.
    typed = ["None" if argument == "null" else argument for argument in arguments]
    parsed = tyro.cli(mirror, args=typed, prog=command.prog, description=_description(command))
    values = json.loads(json.dumps(dataclasses.asdict(parsed), default=str))
    _drop_unset_models(command.model, values, defaults, arguments)
    return values


def _description(command: Command[Any]) -> str:
    recipe = "\n\nA recipe (a .yaml file) may come first; options override it." if command.dry_run else ""
    return command.about + recipe


def _drop_unset_models(
    model: type[BaseModel],
    values: dict[str, Any],
    defaults: Mapping[str, Any],
    arguments: Sequence[str],
    above: str = "--",
) -> None:
    """A nested model whose default is null stays null unless one of its options or recipe keys is given."""
    for name, info in model.model_fields.items():
        nested = submodel(info.annotation)
        if nested is None:
            continue
        prefix, given = f"{above}{name.replace('_', '-')}.", defaults.get(name)
        typed = any(argument.replace("_", "-").startswith(prefix) for argument in arguments)
        if info.default is None and given is None and not typed:
            values[name] = None
        else:
            _drop_unset_models(nested, values[name], given or {}, arguments, prefix)


def _mirror(
    model: type[BaseModel],
    defaults: Mapping[str, Any],
    positionals: tuple[str, ...],
    flags: tuple[str, ...] = (),
    given: bool = False,
    unset: bool = False,
) -> type[Any]:
    """A frozen dataclass with the model's fields, docstrings and defaults (`defaults` first), for tyro.

    With `given`, positionals without a value in `defaults` must be given although the model has a default for them.
    With `unset`, the whole model may be left out, so that nothing in it must be given: null stands for what it needs.
    """
    fields: list[Any] = [
        _field(
            name, _left_out(info) if unset and info.is_required() else info, defaults, _below(name, positionals), given
        )
        for name, info in model.model_fields.items()
    ]
    if unset:
        fields = [
            item if len(item) > 2 else (item[0], item[1] | None, dataclasses.field(default=None)) for item in fields
        ]
    for flag in flags:
        annotation = Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help=FLAGS[flag])]
        fields.append((flag, annotation, dataclasses.field(default=False)))
    required_first = sorted(fields, key=lambda item: len(item) > 2)
    return dataclasses.make_dataclass(model.__name__, required_first, frozen=True, namespace={"__doc__": model.__doc__})


def _left_out(info: FieldInfo) -> FieldInfo:
    """A field that its model needs, of a model that may be left out: null stands for it."""
    optional, needed = copy(info), cast(Any, info.annotation)
    optional.annotation, optional.default = cast(Any, needed | None), None
    return optional


def _below(name: str, positionals: tuple[str, ...]) -> tuple[str, ...]:
    """Positionals that are the field `name` or inside it, the latter without the prefix."""
    return tuple(p.removeprefix(f"{name}.") for p in positionals if p == name or p.startswith(f"{name}."))


def _field(
    name: str, info: FieldInfo, defaults: Mapping[str, Any], positionals: tuple[str, ...], given: bool
) -> tuple[Any, ...]:
    """A `make_dataclass` field; nested models become nested mirrors."""
    help_text = info.description or ""
    if nested := submodel(info.annotation):
        default = info.default.model_dump(mode="json") if isinstance(info.default, BaseModel) else {}
        must = info.is_required() and bool(positionals) and name not in defaults
        unset = info.default is None and defaults.get(name) is None
        mirror = _mirror(nested, {**default, **(defaults.get(name) or {})}, positionals, given=must, unset=unset)
        annotation: Any = Annotated[mirror, tyro.conf.arg(help=help_text)]
        return (name, annotation) if must else (name, annotation, dataclasses.field(default_factory=mirror))
    positional = name in positionals
    annotation = Annotated[
        _typed(info), tyro.conf.arg(help=help_text, metavar=_metavar(name, info) if positional else None)
    ]
    if positional:
        annotation = tyro.conf.Positional[annotation]
    if name in defaults:
        assert info.annotation is not None
        value = TypeAdapter(info.annotation).validate_json(json.dumps(defaults[name]))
        return (name, annotation, _default(value))
    if info.is_required() or (given and positional):
        return (name, annotation)
    return (name, annotation, _default(info.get_default(call_default_factory=True)))


def _default(value: Any) -> Any:
    """A field's default, also one that dataclasses call mutable."""
    mutable = isinstance(value, dict)
    return dataclasses.field(default_factory=lambda: dict(value)) if mutable else dataclasses.field(default=value)


def _typed(info: FieldInfo) -> Any:
    """A field's type as tyro takes it: names and values are typed as a recipe writes them, `{prompt: question}`."""
    if get_origin(info.annotation) is not dict:
        return info.annotation
    written = PrimitiveConstructorSpec[Any](
        nargs=1,
        metavar="{NAME: VALUE, ...}",
        instance_from_str=lambda words: read_mapping(words[0]),
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [json.dumps(value)],
    )
    return Annotated[info.annotation, written]


def _metavar(name: str, info: FieldInfo) -> str:
    """How a positional is shown: `RUN`, `[BASE]`, `RUNS [RUNS ...]`."""
    shown = name.upper()
    if get_origin(info.annotation) is tuple:
        return f"{shown} [{shown} ...]"
    return shown if info.is_required() else f"[{shown}]"
