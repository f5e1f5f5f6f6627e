"""Chat templates: the texts of transformers for templates in the manner of published ones, and an end for every other.

Oracle: transformers.utils.chat_template_utils.render_jinja_template. Needs transformers."""

# ruff: noqa: E501  templates are as they are published, often on one line

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from llmc.compiler.diagnostics import UserError
from llmc.runtime.engine import chat
from llmc.runtime.engine.chat import CHILD, render_chat
from llmc.runtime.engine.tokenizer import Tokenizer

TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
USER = [{"role": "user", "content": '  Wie geht\'s? <b> & "naïve" 你好 '}]
CHATS = {
    "one": USER,
    "system": [{"role": "system", "content": "Be brief.\n"}, *USER],
    "turns": [*USER, {"role": "assistant", "content": "Good.\n\n"}, {"role": "user", "content": "Why?"}],
    "calls": [
        *USER,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1.5, "y": [None, "é"]}}}],
        },
        {"role": "tool", "content": '{"z": 2}', "name": "f"},
    ],
    "thinks": [
        *USER,
        {"role": "assistant", "content": "<think>hm</think>Yes", "reasoning": "hm", "tool_calls": None},
        *USER,
    ],
    "nobody": [{"role": "assistant", "content": "First"}],
}
TOOLS = [{"type": "function", "function": {"name": "f", "description": "Does <f>", "parameters": {"type": "object"}}}]
TEMPLATES = {
    "llama2": """{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}""",
    "llama3": """{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '{"name": "' + tool_call.name + '", "parameters": ' }}{{- tool_call.arguments | tojson }}{{- "}" }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
""",
    "chatml": "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "qwen": """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'You are a helpful assistant.' }}
    {%- endif %}
    {{- "\\n\\n# Tools\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and not(message.content.startswith('<tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is defined and message.reasoning_content is not none %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in message.content %}
            {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content }}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if (loop.first and content) or (not loop.first) %}{{- '\\n' }}{%- endif %}
                {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
                {{- '<tool_call>\\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}
                {%- if tool_call.arguments is string %}{{- tool_call.arguments }}
                {%- else %}{{- tool_call.arguments | tojson(ensure_ascii=True, sort_keys=True) }}
                {%- endif %}
                {{- '}\\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' }}{{- message.content }}{{- '\\n</tool_response>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}""",
    "mistral": """{%- if messages[0]["role"] == "system" %}{%- set system_message = messages[0]["content"] %}{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{#- This block checks for alternating user/assistant messages, skipping tool calling messages #}
{%- set ns = namespace() %}
{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or message.role == "tool_results" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("After the optional system message, conversation roles must alternate user/assistant/user/assistant/...") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}{{- '"' + key + '": "' + val + '"' }}
                    {%- else %}{{- '"' + key + '": ' + val|tojson }}
                    {%- endif %}
                    {%- if not loop.last %}{{- ", " }}{%- endif %}
                {%- endfor %}
                {{- "}}" }}
                {%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" }}{%- endif %}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}{{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}{{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}{{- " " + message["content"]|trim + eos_token}}
    {%- endif %}
{%- endfor %}
""",
    "gemma": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}",
    "zephyr": "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
    "command": "{% if documents %}{% for d in documents %}{{ d.title }}: {{ d.text }}{% endfor %}{% elif documents is none %}no documents{% endif %}{% if tools is none %}no tools{% endif %}{% if tools is defined %}!{% endif %}",
    "training": """{%- for m in messages %}
    {%- set turn = loop.index %}
    {%- if m.role == 'assistant' %}
        {%- generation %}{{ turn }} {{ m.content }}{{ eos_token }}
{% endgeneration %}
    {%- else %}{{ m.content }}
    {%- endif %}
{%- endfor %}{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}""",
    "loops": "{% for m in messages %}{% if m.role == 'assistant' %}{% continue %}{% endif %}{{ loop.index }}{{ m.content|trim }}{% if loop.index > 1 %}{% break %}{% endif %}{% endfor %}",
    "blocks": "{% for m in messages %}\n    {% if true %}\n        {{ m.role }}\n    {% endif %}\n\t{#- c #}\n{% endfor %}\n\n",
    "macros": "{% macro show(m, end='.') -%}\n{{ m.role|upper }}: {{ m.content|replace('\\n', ' ')|e }}{{ end }}\n{%- endmacro %}{% for m in messages %}{{ show(m) }}{{ show(m, end=caller|default('?')) }}{% endfor %}{% set t %}{{ messages|length }}{% endset %}{{ t }}{% filter upper %}abc{% endfilter %}",
    "filters": "{{ messages|map(attribute='role')|join(',') }}{{ messages|groupby('role')|list|length }}{{ messages|rejectattr('role', 'eq', 'user')|list|tojson }}{{ [3,1,2]|sort|reverse|list }}{{ 'a b'|title }}{{ 3.14159|round(2) }}{{ '%s-%03d'|format('a', 7) }}{{ {'b': 1, 'a': none}|dictsort }}{{ 'x'|indent(2, true) }}{{ nothing|default('d') }}{{ ''|default('d', true) }}{{ 'a,b'.split(',')|last }}{{ messages|unique(attribute='role')|list|length }}{{ {'a': 1}.items()|list }}{{ dict(a=1) }}{{ dict([['k', 2]])|tojson(indent=2) }}{{ dict.fromkeys(['z'], 0) }}{{ {'b': '<é>', 'a': [1.0, true]}|tojson(separators=(',', ':'), sort_keys=true) }}{{ 'é'|tojson(ensure_ascii=true) }}{{ [1, 2, 3]|batch(2)|list }}{{ messages|first is mapping }}{{ 7 // 2 }}{{ 7 % 4 }}{{ 2 ** 3 }}{{ 'a' ~ 1 }}{{ 'a' in 'abc' }}{{ 1 if false }}{{ [1,2,3][::-1] }}",
    "undefined": "[{{ unheard_of }}][{{ pad_token }}][{{ unk_token }}][{{ messages[0].nothing }}]{{ messages[9] }}",
}


def reference(template: str, messages: list, **more) -> str:
    from transformers.utils.chat_template_utils import _normalize_chat_messages

    options = {"add_generation_prompt": True, **TOKENS, **more}
    return render_jinja_template([_normalize_chat_messages(messages)], chat_template=template, **options)[0][0]


def tokenizer(template: str) -> Tokenizer:
    return Tokenizer(
        encode=lambda text, special: [], decode=lambda ids: "", special_ids=frozenset(), bos_id=None,
        eos_ids=frozenset(), template=template, tokens=TOKENS,
    )  # fmt: skip


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["", "tools"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_in_the_manner_of_published_ones_give_the_text_of_transformers(name, tools):
    template, ours = TEMPLATES[name], tokenizer(TEMPLATES[name])
    for chat_name, messages in CHATS.items():
        for more in ({}, {"add_generation_prompt": False}, {"documents": [{"title": "T", "text": "t"}]}):
            try:
                expected = reference(template, messages, tools=tools, **more)
            except Exception:  # raise_exception, or a key that this conversation has not
                with pytest.raises(UserError, match=r"the chat template (refuses|fails)"):
                    ours.chat(messages, tools=tools, **more)
                continue
            assert ours.chat(messages, tools=tools, **more) == expected, chat_name


def test_tools_and_documents_are_none_and_not_undefined():
    assert render_chat("{{ tools }} {{ documents is none }} {{ tools is defined }}", {}) == "None True True"
    assert render_chat("{{ tools }}", {"tools": [1]}) == "[1]"


# ---- templates that end badly, or never


@pytest.mark.parametrize(
    "template",
    [
        "{{ [1][5] / 1 }}",
        "{{ ''.encode('nothing') }}",
        "{% break %}",
        "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
        "{{ 'a' * 10**10 }}",
        "{{ [0] * 10**10 }}",
        "{{ 'a'|center(10**9) }}",
        "{{ '%09999999999d' % 1 }}",
        "{{ '{:>9999999999}'.format(1) }}",
        "{{ messages|tojson(indent=10**10) }}",
        "{{ ('a' * 10**6)|list|join('b' * 10**6) }}",
        "{% set ns = namespace(x='ab') %}{% for i in range(90) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{{ '(' * 10 }}" + "{{ " + "(" * 20_000,
        "{{ " + "-" * 20_000 + "1 }}",
        "{% if 1 %}" * 3000,
        "{% for i in range(100000) %}{{ 'abcdefghijklmnopqrstuvwxyz' }}{% endfor %}",  # 2.6 MB from nothing
        "{{ 10**5000 }}",
        "{{ range(10**9)|list }}",
        "{% include '/etc/passwd' %}",
        "{% extends messages %}",
        "{{ raise_exception(messages, 1) }}",
        "{{ cycler() }}",
        "{{ ''|nothing }}",
        "{{ 1 is nothing }}",
        "{{ namespace(__class__=1) }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ ''['__class__']['__mro__'][1] }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ joiner.__init__.__globals__.os.popen('id').read() }}",
        "{{ messages.clear() }}",
    ],
)  # fmt: skip
def test_whatever_a_template_raises_is_one_short_message(template):
    with pytest.raises(UserError, match=r"^the chat template (refuses|fails)") as error:
        render_chat(template, {"messages": [{"role": "user", "content": "x"}]})
    assert len(str(error.value)) < 800


@pytest.mark.parametrize(
    "template",
    [
        "{{ 9**(9**9) }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ lipsum(n=10**7)|length }}",
    ],
)
def test_a_template_that_does_not_end_is_ended(template):
    start = time.monotonic()
    with pytest.raises(UserError, match="fails: it takes more than 1 s of processor time"):
        render_chat(template, {})
    assert time.monotonic() - start < chat.WAIT_SECONDS / 2
    assert render_chat("{{ 1 }}", {}) == "1"  # and the next one is rendered


def test_an_ordinary_template_takes_no_time():
    render_chat(TEMPLATES["llama3"], {"messages": USER, **TOKENS})
    start = time.perf_counter()
    for _ in range(20):
        render_chat(TEMPLATES["llama3"], {"messages": CHATS["turns"], **TOKENS})
    assert (time.perf_counter() - start) / 20 < 0.02  # 0.3 ms on a quiet machine


def test_a_long_conversation_is_not_too_much():
    messages = [{"role": "user", "content": "x" * 2000}] * 2000
    assert len(render_chat(TEMPLATES["chatml"], {"messages": messages})) > 4_000_000
    assert len(render_chat(TEMPLATES["chatml"], {"messages": USER * 50_000})) > 1_000_000


def test_control_sequences_of_a_message_do_not_reach_the_terminal():
    with pytest.raises(UserError, match=r"\?\[31m") as error:
        render_chat("{{ raise_exception('\x1b[31m' + 'x' * 100000) }}", {})
    assert len(str(error.value)) < 800


def test_where_a_syntax_error_is():
    with pytest.raises(UserError, match="refuses these messages: line 3: "):
        render_chat("a\nb\n{% if %}", {})


def test_values_that_are_not_json_are_names_of_their_types():
    assert render_chat("{{ x }}{{ y.a }}", {"x": object(), "y": {"a": (1, 2)}}) == "<object>[1, 2]"
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(UserError, match="cannot be given to a chat template"):
        render_chat("{{ x }}", {"x": deep})


def test_the_renderer_can_open_nothing_even_outside_the_sandbox():
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[2])\n"
        "from chat_child import limit; limit()\n"
        "for act in (lambda: open('/etc/passwd'), lambda: open(sys.argv[1], 'w'), lambda: __import__('socket').socket()):"
        "\n    try: act()\n    except (OSError, ImportError): continue\n    sys.exit('opened')"
    )
    folder = os.path.dirname(chat.__file__)
    done = subprocess.run([sys.executable, "-I", "-c", code, "/tmp/x", folder], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_renderer_that_was_killed_is_started_again():
    render_chat("{{ 1 }}", {})
    assert CHILD._process
    os.kill(CHILD._process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, CHILD._process.pid, os.WEXITED | os.WNOWAIT)
    assert render_chat("{{ 2 }}", {}) == "2"


@pytest.mark.processes
def test_the_renderer_ends_with_its_process_at_once():
    code = (
        "import time; from llmc.runtime.engine.chat import CHILD, render_chat\n"
        "render_chat('{{ 1 }}', {}); print(CHILD._process.pid, time.monotonic(), flush=True)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    pid, start = done.stdout.split()
    assert time.monotonic() - float(start) < 0.9
    assert not os.path.exists(f"/proc/{pid}")
    assert done.stderr == ""


def test_threads_and_forks_get_their_own_answers():
    answers: dict[int, str] = {}
    work = [
        threading.Thread(target=lambda i=i: answers.update({i: render_chat("{{ x }}", {"x": i})})) for i in range(16)
    ]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert answers == {i: str(i) for i in range(16)}
    if (pid := os.fork()) == 0:
        code = 1
        try:
            code = 0 if render_chat("{{ 'child' }}", {}) == "child" else 2
            CHILD.end()
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    assert render_chat("{{ 'parent' }}", {}) == "parent"


PIECES = [
    "{% for m in messages %}", "{% endfor %}", "{% if m.role %}", "{% elif x %}", "{% else %}", "{% endif %}", "{{ ", " }}",
    "messages", "[0]", ".content", "|trim", "|tojson", "|length", "|join", "|sort", "|int", " ~ ", " + ", " * ", "**", "9",
    "range(99)", "'a'", "none", "(", ")", "{% set x = ", " %}", "namespace(a=1)", "{% macro f(a) %}", "{% endmacro %}",
    "f(1)", "lipsum(2)", "{% generation %}", "{% endgeneration %}", "{%- ", " -%}", "{# ", " #}", "{% break %}",
    "loop.index", "cycler(1)", "dict(a=2)", "raise_exception('no')", "\n", "text", "{% raw %}", "{% endraw %}", "is string",
]  # fmt: skip


def test_random_templates_give_the_text_of_transformers_or_a_message():
    pick = random.Random(1)
    texts = 0
    for _ in range(400):
        template = "".join(pick.choices(PIECES, k=pick.randint(1, 12)))
        if "lipsum" in template:
            continue  # random
        try:
            ours = render_chat(template, {"messages": USER, "add_generation_prompt": True})
        except UserError:
            continue
        texts += 1
        assert ours == render_jinja_template([USER], chat_template=template, add_generation_prompt=True)[0][0]
    assert texts > 50
