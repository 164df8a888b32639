from __future__ import annotations

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from router.chat_template import ChatTemplate
from servicekit.errors import InvalidRequest

# The constructs that real templates use: whitespace control, namespaces, break, tojson, slices.
TEMPLATE = """{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- bos_token }}
{%- set ns = namespace(count=0) %}
{%- for message in messages %}
    {%- if message['role'] == 'stop' %}{% break %}{% endif %}
    {%- set ns.count = ns.count + 1 %}
    {{- '<|' + message['role'] + '|>' + message['content'] | trim }}
    {%- if not loop.last %}
{{ '\\n' }}
    {%- endif %}
{%- endfor %}
{{ {'count': ns.count, 'text': '\u00e9 <&>', 'flag': flag} | tojson }}
{%- if system is defined %}[{{ system }}]{% endif %}
{% if add_generation_prompt %}<|assistant|>{% endif %}
"""

CONVERSATIONS = [
    [{"role": "user", "content": " hi "}],
    [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ],
    [{"role": "user", "content": "<b>\u4e2d\u6587 {{ 7 * 7 }} {% raise %}"}],
]


@pytest.mark.parametrize("messages", CONVERSATIONS, ids=["plain", "system", "markup"])
@pytest.mark.parametrize("adds_prompt", [True, False])
def test_it_renders_as_transformers_does(messages: list[dict[str, str]], adds_prompt: bool) -> None:
    variables = {"flag": True}
    [expected], _ = render_jinja_template(
        conversations=[messages],
        chat_template=TEMPLATE,
        add_generation_prompt=adds_prompt,
        bos_token="<s>",
        **variables,
    )
    template = ChatTemplate(TEMPLATE, {"bos_token": "<s>"})
    assert template.render(messages, add_generation_prompt=adds_prompt, variables=variables) == expected


def test_what_a_template_raises_is_the_request_s_fault() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        template.render([{"role": "user", "content": "a"}])


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
    ],
)
def test_a_template_cannot_reach_out_of_its_sandbox(source: str) -> None:
    with pytest.raises(InvalidRequest):
        ChatTemplate(source, {}).render([{"role": "user", "content": "a"}])


def test_variables_cannot_replace_the_messages() -> None:
    template = ChatTemplate("{{ messages[0].content }}{{ add_generation_prompt }}", {})
    variables = {"messages": [{"content": "other"}], "add_generation_prompt": "yes"}
    assert template.render([{"role": "user", "content": "a"}], variables=variables) == "aTrue"


def test_strftime_now_is_there() -> None:
    text = ChatTemplate("{{ strftime_now('%Y') }}", {}).render([{"role": "user", "content": "a"}])
    assert len(text) == 4 and text.isdigit()
