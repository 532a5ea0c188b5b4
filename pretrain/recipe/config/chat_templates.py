"""The chat templates: `template` in instruction.json chooses one, and stage 12 saves it in the tokenizer.

``alpaca`` is the form of Alpaca (Taori et al., 2023) in Japanese: a line that describes the task, with one
wording for instructions with an input and another for those without, and then sections. ``chat`` has only
the roles and needs fewer tokens. In both, a conversation begins like a document, and every answer ends with
the end token.
"""

from __future__ import annotations

import json
from typing import Any

INPUT_HEADING = "\n\n### 入力:\n"
# By template: the heading of an answer, with which every user's turn ends.
ANSWER_HEADINGS = {"alpaca": "### 応答:\n", "chat": "Assistant:\n"}
FORMS = tuple(ANSWER_HEADINGS)

# By template: a user's turn; `content` is the message. It ends with a line break, so that no token contains
# characters of both the question and the answer.
_USER_TURNS = {
    "alpaca": """
{%- if loop.first or loop.previtem.role == 'system' -%}
{%- if INPUT_HEADING in content -%}
{{- '以下は、タスクを説明する指示と、文脈のある入力の組み合わせです。' -}}
{%- else -%}
{{- '以下は、タスクを説明する指示です。' -}}
{%- endif -%}
{{- '要求を適切に満たす応答を書きなさい。\\n\\n' -}}
{%- endif -%}
{{- '### 指示:\\n' + content + '\\n\\n' + ANSWER_HEADING -}}""",
    "chat": "{{- 'User:\\n' + content + '\\n\\n' + ANSWER_HEADING -}}",
}

# The heading of an answer belongs to the user's turn, so that add_generation_prompt changes nothing. SYSTEM
# is the first line of conversations without a system message. The template uses plain Jinja only: servers
# that do not render with transformers would fail on its extension {% generation %}.
_TEMPLATE = """{{- bos_token -}}
{%- if messages[0].role != 'system' and SYSTEM -%}
{{- SYSTEM + '\\n\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{%- set content = message.content.lstrip('\\n').rstrip() -%}
{%- if message.role == 'system' -%}
{{- content + '\\n\\n' -}}
{%- elif message.role == 'user' -%}
{%- if not loop.first and loop.previtem.role == 'assistant' -%}{{- '\\n\\n' -}}{%- endif -%}
USER_TURN
{%- elif message.role == 'assistant' -%}
{{- content + eos_token -}}
{%- else -%}
{{- raise_exception('unknown role ' + message.role + ': expected system, user or assistant') -}}
{%- endif -%}
{%- endfor -%}"""


def chat_template(form: str, system: str = "") -> str:
    """The chat template to save in the tokenizer.

    form: one of FORMS. system: the first line of conversations without a system message; empty for none.
    """
    filled = {
        "USER_TURN": _USER_TURNS[form].strip(),
        "INPUT_HEADING": json.dumps(INPUT_HEADING, ensure_ascii=False),
        "ANSWER_HEADING": json.dumps(ANSWER_HEADINGS[form], ensure_ascii=False),
        "SYSTEM": json.dumps(system.strip(), ensure_ascii=False),
    }
    template = _TEMPLATE
    for name, text in filled.items():
        template = template.replace(name, text)
    return template


def response_template(form: str, end: str) -> dict[str, Any]:
    """How transformers' servers find the answer in the generated text; to save in the tokenizer.

    Without it, servers choose by the architecture: for a model of the architecture qwen3 they expect Qwen's
    own template, and return the whole prompt with the answer. end: the tokenizer's end token.
    """
    return {
        "defaults": {"role": "assistant"},
        "start_anchor": ANSWER_HEADINGS[form],
        "fields": {"content": {"close": end, "content": "text"}},
    }


def user_message(instruction: str, given: str = "") -> str:
    """The content of a user's message: the instruction, then the input (if any) in its own section."""
    return instruction + (INPUT_HEADING + given if given else "")
