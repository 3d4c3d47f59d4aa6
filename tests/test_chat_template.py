"""Rendering of chat templates: what templates in the wild rely on, and what untrusted ones can't do."""

from datetime import datetime

import pytest

from research.chat_template import render
from research.errors import UserError

MESSAGES = [{"role": "user", "content": "a < b"}, {"role": "assistant", "content": "yes"}]


def rendered(template: str, prompt: bool = False, **specials: str) -> str:
    return render(template, MESSAGES, prompt, specials)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{% for m in messages %}{{ m.role }}:{{ m['content'] }};{% endfor %}", "user:a < b;assistant:yes;"),
        ("{% if add_generation_prompt %}prompt{% else %}none{% endif %}", "none"),
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "a < b"}'),  # HTML would be escaped by Jinja's own
        ("{{ {'b': 1, 'a': 'é'} | tojson(sort_keys=true) }}", '{"a": "é", "b": 1}'),
        ("{% for m in messages %}{{ m.role }}{% break %}{% endfor %}", "user"),
        ("{% generation %}{{ messages[1].content }}{% endgeneration %}", "yes"),
        ("  {% if true %}\n  x\n  {% endif %}\n", "  x\n"),  # blocks take their own line with them
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "2"),
        ("{{ dict(a=1)['a'] }}{{ tools is none }}{{ documents is none }}", "1TrueTrue"),
        ("{{ bos_token }}|{{ eos_token is defined }}", "<s>|False"),
    ],
)
def test_what_templates_rely_on(template, text):
    assert rendered(template, bos_token="<s>") == text


def test_generation_prompt_is_asked_for():
    assert rendered("{% if add_generation_prompt %}prompt{% endif %}", prompt=True) == "prompt"


def test_date_of_today():
    assert rendered("{{ strftime_now('%Y') }}") in (str(datetime.now().year), str(datetime.now().year - 1))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}", "Expected an expression"),
        ("{{ messages[0].content.missing.more }}", "has no attribute 'missing'"),
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
    ],
)
def test_refusal_names_reason_and_roles(template, message):
    with pytest.raises(UserError, match=message) as caught:
        rendered(template)
    assert "['user', 'assistant']" in str(caught.value)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ raise_exception.__globals__.keys() }}",
        "{{ messages.append(1) }}",
        "{{ namespace(__class__=1) }}",
        "{% set ns = namespace() %}{% set ns.__init__ = 1 %}",
        "{{ dict.__base__.__subclasses__() }}",
    ],
)
def test_sandbox_refuses(template):
    with pytest.raises(UserError):
        rendered(template)
    assert len(MESSAGES) == 2


def test_sandbox_formats_no_attributes():
    assert rendered("{{ '{0.__class__}'.format(1) }}") == ""
