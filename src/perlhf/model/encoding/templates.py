"""Which chat template a conversation is rendered by: the tokenizer's, one of several, a file's, or a plain one."""

import datetime
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from perlhf.config.stages import PLAIN_TEMPLATES
from perlhf.errors import ConfigError, nearest

PLAIN = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}"
    "{% if add_generation_prompt or not loop.last %}{{ '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
"""`encoding.template: plain` as Jinja: `role: text` lines."""
PLAIN_TEXT = "{{ messages[0]['content'] }}{% for m in messages[1:] %}{{ ' ' + m['content'] }}{% endfor %}"
"""The same for a prompt that is text and no conversation: its completion follows after a space."""
TEXT_ROLE = "text"
"""Role of such a prompt's only message."""
NAMED = "name:"
"""What `encoding.template` begins with where it picks one of several templates of a tokenizer."""
_RESERVED = frozenset(
    "messages conversation tools documents chat_template add_generation_prompt continue_final_message tokenize "
    "sanitize_control_tokens padding truncation max_length return_tensors return_dict return_assistant_tokens_mask "
    "tokenizer_kwargs strftime_now".split()
)
_DIRECTIVES = "aAwdbBmyYHIMSpfjUWcxXeFDGuVTR"
"""Of strftime."""


def templates_of(tokenizer: PreTrainedTokenizerBase, name: str) -> dict[str, str]:
    """The Jinja texts that `encoding.template` names: `default`, and `tool_use` where records with tools have another.

    Raises:
        ConfigError: there are none, or the file can't be read.
    """
    own: Any = tokenizer.chat_template
    named: dict[str, str] = own if isinstance(own, dict) else {"default": own} if own else {}
    if name in PLAIN_TEMPLATES:
        if name != "plain" and tokenizer.bos_token is None:
            what, hint = "the base's tokenizer has no begin token", "encoding.template: plain"
            raise ConfigError(what, where="encoding.template", allowed="plain, or the path of a Jinja file", hint=hint)
        begin = "" if name == "plain" else "{{ bos_token }}"
        return {"plain": begin + PLAIN, TEXT_ROLE: begin + PLAIN_TEXT}
    if name == "tokenizer":
        if not named:
            raise ConfigError(
                "the base's tokenizer has no chat template",
                where="encoding.template",
                allowed="plain, plain-bos, or the path of a Jinja file",
                hint=f"encoding.template: {plain_template(tokenizer)}",
            )
        if "default" not in named:
            raise _no_template("the base's tokenizer has several chat templates and none is called default", named)
        return {key: text for key, text in named.items() if key in ("default", "tool_use")}
    if name.startswith(NAMED):
        wanted = name.removeprefix(NAMED)
        if wanted not in named:
            raise _no_template(f"the base's tokenizer has no chat template called {wanted!r}", named)
        return {"default": named[wanted]}
    try:
        return {"default": Path(name).read_text(encoding="utf-8")}
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(
            f"can't read the template '{name}': {why}",
            where="encoding.template",
            allowed=f"tokenizer, plain, plain-bos, {NAMED}NAME of one of the tokenizer's, or the path of a Jinja file",
        ) from error


def without_begin(tokenizer: PreTrainedTokenizerBase, name: str) -> str:
    """The token that a tokenizer begins texts with, where the template `name` is `plain` and leaves it out; else ""."""
    return str(tokenizer.bos_token) if name == "plain" and _begins(tokenizer) else ""


def plain_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The plain template that suits a tokenizer: `plain-bos` where texts begin with a token of their own."""
    return "plain-bos" if _begins(tokenizer) else "plain"


def check_variables(template: str, variables: Mapping[str, Any], *, plain: bool) -> None:
    """Raises ConfigError for a variable of `encoding.template_kwargs` that the template doesn't ask for."""
    words = set(re.findall(r"[A-Za-z_]\w*", template))
    for key in variables:
        if key in _RESERVED or plain or key not in words:
            near = nearest(key, words - _RESERVED)
            raise ConfigError(
                f"the chat template has no variable {key!r}",
                where="encoding.template_kwargs",
                allowed="variables that the template itself asks for",
                hint=f"did you mean {near!r}?" if near else None,
            )


def on_day(day: str) -> str:
    """A macro that stands before a template and gives it that day instead of today's."""
    when = datetime.datetime.fromisoformat(day)
    directives = [*(f"%{letter}" for letter in _DIRECTIVES), "%-d", "%-m"]
    replaced = "".join(f"|replace({name!r}, {when.strftime(name)!r})" for name in directives)
    return f"{{%- macro strftime_now(format) -%}}{{{{ format{replaced} }}}}{{%- endmacro %}}\n"


def _begins(tokenizer: PreTrainedTokenizerBase) -> bool:
    ids: Any = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def _no_template(what: str, named: Mapping[str, str]) -> ConfigError:
    names = ", ".join(f"{NAMED}{name}" for name in named) or "none: it has no chat template"
    return ConfigError(what, where="encoding.template", allowed=names)
