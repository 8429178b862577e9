"""A run's chat template as Jinja that stands alone, as other tools render it."""

import json
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from perlhf.config.stages import PLAIN_TEMPLATES, EncodingConfig
from perlhf.model.encoding.templates import on_day, templates_of

_APART = "{{ '' }}"
"""Between our tags and a template: keeps Jinja from trimming the template's own white space there."""


def chat_template(tokenizer: PreTrainedTokenizerBase, encoding: EncodingConfig) -> str:
    """`encoding.template` as Jinja that stands alone: with its variables, its day and its system message.

    Where a tokenizer has another template for conversations with tools, both are in it.
    """
    templates = templates_of(tokenizer, encoding.template)
    body = templates["plain" if encoding.template in PLAIN_TEMPLATES else "default"]
    if "tool_use" in templates:
        body = f"{{% if tools %}}{_APART}{templates['tool_use']}{_APART}{{% else %}}{_APART}{body}{_APART}{{% endif %}}"
    if encoding.day and "strftime_now" in body:
        body = on_day(encoding.day) + body
    for name, value in encoding.template_kwargs.items():
        literal = "none" if value is None else json.dumps(value, ensure_ascii=False)
        body = f"{{% if {name} is not defined %}}{{% set {name} = {literal} %}}{{% endif %}}{_APART}{body}"
    if encoding.system is None:
        return body
    system = json.dumps(encoding.system, ensure_ascii=False)
    lead = f"[{{'role': 'system', 'content': {system}}}]"
    unled = "not messages or messages[0]['role'] not in ('system', 'developer')"
    return f"{{% if {unled} %}}{{% set messages = {lead} + messages %}}{{% endif %}}{_APART}{body}"


def ending_with(template: str, ends: Sequence[str], doubled: bool = False) -> str:
    """A chat template whose conversations end with an end token where an assistant's turn is the last one.

    Everything else is rendered as before: what stands between turns, and what makes room for an answer.

    Args:
        template: Jinja.
        ends: the end token, and others that may close a turn in its place, such as the one after a call. The blank
            that follows the last one goes; a conversation that none of them closes is given the first.
        doubled: the template puts two of the first after an answer, of which one stays.
    """
    body = template.removesuffix("\n")  # Jinja drops it from a template's end, but not from within
    name, listed = "perlhf_conversation", json.dumps(list(ends), ensure_ascii=False)
    rest = "perlhf_parts[2]" + "".join(f".replace({json.dumps(end, ensure_ascii=False)}, '')" for end in ends)
    kept = "perlhf_parts[0]"
    if doubled:
        kept += f".rpartition(perlhf_end)[0] if loop.first and {kept}.rstrip().endswith(perlhf_end) else {kept}"
    whole = "not add_generation_prompt and messages and messages[-1]['role'] == 'assistant'"
    return (
        f"{{% set {name} %}}{_APART}{body}{_APART}{{% endset %}}"
        f"{{% if {whole} %}}{{% set perlhf = namespace(text={name} ~ {listed}[0], open=true) %}}"
        f"{{% for perlhf_end in {listed} %}}{{% set perlhf_parts = {name}.rpartition(perlhf_end) %}}"
        f"{{% if perlhf.open and perlhf_parts[1] and not {rest} | trim %}}"
        f"{{% set perlhf.text = ({kept}) ~ perlhf_end %}}"
        "{% set perlhf.open = false %}{% endif %}{% endfor %}{{ perlhf.text }}"
        f"{{% else %}}{{{{ {name} }}}}{{% endif %}}"
    )
