"""Recipes: YAML files that fill one configuration model, with errors that name file, line and key.

YAML is read by the 1.2 core rules: `true` and `false` are the only booleans (`no` is text) and `2e-4` is a number.
Anchors, aliases and repeated keys are refused, so that a line of a recipe means what it says.
"""

import json
import re
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from perlhf.config.addresses import shown
from perlhf.errors import ConfigError, nearest

Model = TypeVar("Model", bound=BaseModel)
Key = tuple[str | int, ...]

CROSS_FIELD = ("value_error", "missing")
"""Kinds of pydantic error that another key or option may still mend."""


@dataclass(frozen=True)
class Recipe:
    """Values of a YAML file as JSON would hold them, with the line of every key."""

    path: Path
    values: dict[str, Any]
    lines: dict[Key, int] = field(default_factory=dict[Key, int])

    def where(self, key: Key) -> str:
        """`file:line` of `key`, or of its closest parent."""
        while key and key not in self.lines:
            key = key[:-1]
        return f"{self.path}:{self.lines[key]}" if key else str(self.path)


def load_recipe(path: Path | str, model: type[Model]) -> Model:
    """Read a recipe into its configuration model.

    Raises:
        ConfigError: unreadable file, wrong key or value; names file, line, key, value and what is allowed.
    """
    recipe = read_recipe(path)
    return validated(model, recipe.values, recipe)


def validated(model: type[Model], values: Mapping[str, Any], recipe: Recipe | None = None, where: str = "") -> Model:
    """Build `model` from JSON-like values, in strict mode (no text for numbers, no 1 for true).

    Args:
        model: the configuration model.
        values: nested keys and values.
        recipe: where the values came from; without it an error names the command-line option.
        where: place to name for an error across several keys.

    Raises:
        ConfigError: the first wrong key or value, in plain English.
    """
    problems = find_problems(model, values)
    if problems:
        raise explain(model, problems[0], recipe, where)
    return model.model_validate_json(json.dumps(values), strict=True)


def find_problems(model: type[BaseModel], values: Mapping[str, Any]) -> list[ErrorDetails]:
    """What pydantic finds wrong with `values`: unknown keys first, since a misspelt key explains a missing one."""
    try:
        model.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        return sorted(error.errors(include_url=False), key=lambda problem: problem["type"] != "extra_forbidden")
    return []


def explain(
    model: type[BaseModel], problem: ErrorDetails, recipe: Recipe | None = None, where: str = ""
) -> ConfigError:
    """A pydantic error as a `ConfigError`: what, where, allowed, nearest valid name."""
    if problem["type"] == "extra_forbidden":
        return _unknown_key(model, problem["loc"], recipe)
    key, info = _locate(model, problem["loc"])
    place = recipe.where(key) if recipe else (f"--{_option(key)}" if key else where)
    if problem["type"] == "missing":
        return ConfigError(f"`{_dotted(key)}` is missing", where=place, allowed=_allowed(info))
    if problem["type"] == "value_error":
        return ConfigError(
            str(problem["ctx"]["error"]) if "ctx" in problem else problem["msg"], where=place or where or None
        )
    value = problem["input"]
    subject = f"`{_dotted(key)}`" if key else "the recipe"
    names = _literals(info.annotation) if info else []
    hint = nearest(value, names) if isinstance(value, str) else None
    return ConfigError(f"{subject} can't be {_shown(value)}", where=place or None, allowed=_allowed(info), hint=hint)


def describe(annotation: Any, metadata: tuple[Any, ...] = ()) -> str:
    """The values that a type allows, in plain English."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = [m for extra in arguments[1:] for m in (extra.metadata if isinstance(extra, FieldInfo) else [extra])]
        return describe(arguments[0], (*metadata, *inner))
    if origin in (Union, types.UnionType):
        return " or ".join(describe(argument, metadata) for argument in arguments)
    if origin is Literal:
        names = [str(argument) for argument in arguments]
        return f"{', '.join(names[:-1])} or {names[-1]}" if len(names) > 1 else names[0]
    if origin in (tuple, list):
        least = next((item.min_length for item in metadata if hasattr(item, "min_length")), 0)
        return f"a list of {describe(arguments[0]).removeprefix('a ')}s" + (f", at least {least}" if least else "")
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"keys {', '.join(annotation.model_fields)}"
    if origin is dict:
        return "names and values ({name: value})"
    words = {bool: "true or false", str: "text", Path: "a path", type(None): "null"}
    if annotation in (int, float):
        return ("a whole number" if annotation is int else "a number") + _bounds(metadata)
    return words.get(annotation, str(annotation))


def _bounds(metadata: tuple[Any, ...]) -> str:
    words = {"gt": "above", "ge": "of at least", "lt": "below", "le": "of at most"}
    bounds = [
        f"{word} {getattr(item, name):g}" for item in metadata for name, word in words.items() if hasattr(item, name)
    ]
    return " " + " and ".join(bounds) if bounds else ""


def _allowed(info: FieldInfo | None) -> str | None:
    return describe(info.annotation, tuple(info.metadata)) if info else None


def _literals(annotation: Any) -> list[str]:
    """Names that a field's Literal types list."""
    if get_origin(annotation) is Literal:
        return [str(name) for name in get_args(annotation)]
    return [name for argument in get_args(annotation) for name in _literals(argument)]


def _unknown_key(model: type[BaseModel], location: Key, recipe: Recipe | None) -> ConfigError:
    parent, owner = location[:-1], model
    for name in parent:
        owner = submodel(owner.model_fields[str(name)].annotation) or owner
    prefix = f"{_dotted(parent)}." if parent else ""
    near = nearest(str(location[-1]), owner.model_fields)
    return ConfigError(
        f"unknown key `{_dotted(location)}`",
        where=recipe.where(location) if recipe else f"--{_option(location)}",
        allowed=", ".join(owner.model_fields),
        hint=f"`{prefix}{near}`" if near else None,
    )


def submodel(annotation: Any) -> type[BaseModel] | None:
    """The configuration model that a field nests (`Model` or `Model | None`), if it does."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _locate(model: type[BaseModel], location: Key) -> tuple[Key, FieldInfo | None]:
    """The part of a pydantic location that names keys (union branches dropped), and its field."""
    key: Key = ()
    info: FieldInfo | None = None
    owner: type[BaseModel] | None = model
    for part in location:
        if owner and part in owner.model_fields:
            info = owner.model_fields[str(part)]
            owner = submodel(info.annotation)
            key = (*key, part)
        elif isinstance(part, int):
            key = (*key, part)
    return key, info


def _dotted(key: Key) -> str:
    return re.sub(r"\.\[", "[", ".".join(f"[{part}]" if isinstance(part, int) else part for part in key))


def _option(key: Key) -> str:
    return ".".join(str(part) for part in key if isinstance(part, str)).replace("_", "-")


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    text = re.sub(r"https?://[^\s\"']+", lambda address: shown(address[0]), text)  # its query may hold a secret
    return text if len(text) <= 60 else text[:57] + "..."


# ---- YAML ---------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Scalars by the YAML 1.2 core rules; everything else that looks odd stays text."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}


_SCALARS = (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^[-+]?[0-9]{1,18}$", list("-+0123456789")),
    ("float", r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$", list("-+.0123456789")),
)
_COLLECTIONS = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq", "!")
for _name, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(_pattern), _first)


def read_recipe(path: Path | str) -> Recipe:
    """Read a YAML file into plain values and line numbers, without looking at what they mean.

    Raises:
        ConfigError: missing, not UTF-8, empty, bad YAML, not a mapping, a repeated key, an alias.
    """
    path = Path(path)
    node = _composed(path, _text(path))
    if node is None:
        raise ConfigError("the recipe is empty", where=str(path), allowed="`key: value` lines")
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(
            "a recipe is a mapping of keys to values", where=f"{path}:{_line(node)}", allowed="`key: value` lines"
        )
    lines: dict[Key, int] = {}
    return Recipe(path, _value(node, (), path, lines, set()), lines)


def read_mapping(text: str) -> dict[str, Any]:
    """Names and values that an option gives as a recipe would: `{prompt: question}`, or JSON.

    Raises:
        ValueError: anything else.
    """
    wrong = ValueError(f"{text!r} is not names and values; write them as in a recipe: '{{name: value, ...}}'")
    try:
        node = _composed(Path("option"), text)
        values = _value(node, (), Path("option"), {}, set()) if isinstance(node, yaml.MappingNode) else None
    except ConfigError as error:
        raise wrong from error
    if values is None:
        raise wrong
    return values


def _text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError("no such recipe", where=str(path), hint=_similar_file(path)) from None
    except OSError as error:
        raise ConfigError(f"can't read the recipe: {error.strerror}", where=str(path)) from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"byte 0x{raw[error.start]:02x} is not UTF-8", where=f"{path}:{line}", hint="save the file as UTF-8"
        ) from error


def _similar_file(path: Path) -> str | None:
    if not path.parent.is_dir():
        return None
    near = nearest(path.name, [p.name for p in path.parent.iterdir() if p.suffix in (".yaml", ".yml")])
    return str(path.with_name(near)) if near else None


def _composed(path: Path, text: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise ConfigError(f"bad YAML: {error.problem or error.context}", where=f"{path}:{line}") from error
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise ConfigError(f"bad YAML: {error.reason}", where=f"{path}:{line}") from error
    except RecursionError:
        raise ConfigError("the recipe is nested too deeply", where=str(path)) from None


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def _value(node: yaml.Node, key: Key, path: Path, lines: dict[Key, int], seen: set[int]) -> Any:
    """The plain value of a node; fills `lines`. `seen` holds the nodes met, to refuse aliases (and so loops)."""
    where = f"{path}:{_line(node)}"
    if id(node) in seen:
        raise ConfigError("anchors and aliases are not used in recipes", where=where, hint="write the value out")
    seen.add(id(node))
    if not isinstance(node, yaml.ScalarNode) and node.tag not in _COLLECTIONS:
        tag = node.tag.removeprefix("tag:yaml.org,2002:")
        raise ConfigError(f"unknown YAML tag {tag!r}", where=where, allowed="lists and mappings without tags")
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, key, path, lines, seen)
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[(*key, index)] = _line(item)
        return [_value(item, (*key, index), path, lines, seen) for index, item in enumerate(node.value)]
    return _scalar(node, where)


def _scalar(node: yaml.Node, where: str) -> Any:
    """A scalar's value; a tag that is written out (`!!int x`) has to fit what is there."""
    tag = node.tag.removeprefix("tag:yaml.org,2002:")
    if tag == "str":
        if unfit := re.search("[\0\ud800-\udfff]", node.value):
            raise ConfigError(
                f"the text {node.value!r} holds {unfit[0]!r}, which no file can", where=where, allowed="text"
            )
        return node.value
    pattern = next((pattern for name, pattern, _ in _SCALARS if name == tag), None)
    if pattern is None:
        raise ConfigError(f"unknown YAML tag {tag!r}", where=where, allowed="text, numbers, true, false, null")
    if not re.match(pattern, node.value):
        raise ConfigError(f"{node.value!r} is no YAML {tag}", where=where, hint="leave the tag out")
    match tag:
        case "null":
            return None
        case "bool":
            return node.value.lower() == "true"
        case "int":
            return int(node.value)
        case _:
            return float(node.value)


def _mapping(node: yaml.MappingNode, key: Key, path: Path, lines: dict[Key, int], seen: set[int]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name_node, value_node in node.value:
        where = f"{path}:{_line(name_node)}"
        if not isinstance(name_node, yaml.ScalarNode):
            raise ConfigError("a key can't be a list or mapping", where=where, allowed="names of options")
        name = str(name_node.value)
        if name in values:
            first = lines[(*key, name)]
            raise ConfigError(f"`{_dotted((*key, name))}` is given twice, first on line {first}", where=where)
        lines[(*key, name)] = _line(name_node)
        values[name] = _value(value_node, (*key, name), path, lines, seen)
    return values
