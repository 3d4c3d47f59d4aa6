"""Render a chat template: a small Jinja program that comes with the weights, so it is untrusted code.

It runs in Jinja's immutable sandbox with the few names that templates in the wild rely on (those that Hugging Face
transformers offers): `raise_exception`, `strftime_now`, a `tojson` that doesn't escape HTML, loop controls and the
`{% generation %}` block, which marks the assistant's text for training and prints it unchanged.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from research.errors import UserError


def render(
    template: str, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, special_tokens: Mapping[str, str]
) -> str:
    """Return the text that a chat template makes of messages.

    Args:
        template: Jinja source.
        messages: each with "role" and "content".
        add_generation_prompt: whether the text ends where the assistant's answer begins.
        special_tokens: variables such as "bos_token" that templates print.

    Raises:
        UserError: the template has an error, or it refuses the messages (an unknown role, say).
    """
    try:
        return _compile(template).render(
            messages=messages,
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **special_tokens,
        )
    except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
        roles = [message.get("role") for message in messages]
        raise UserError(f"the chat template can't render messages with roles {roles}: {error}") from error


@lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _make_dict,
        "namespace": _SafeNamespace,
    }
    return environment.from_string(template)


class _Generation(Extension):
    """`{% generation %} … {% endgeneration %}`: prints its body."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_print"), [], [], body).set_lineno(line)

    def _print(self, caller: Callable[[], str]) -> str:
        return caller()


class _SafeNamespace(Namespace):
    """Jinja's `namespace`, without names that begin with an underscore: they could reach Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # Without a named `self`, so that a template may call `namespace(self=…)`, as Jinja's own allows.
        for name in dict(*args[1:], **kwargs):
            _check_name(name)
        Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)


def _check_name(name: Any) -> None:
    if str(name).startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace can't hold {name!r}")


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
