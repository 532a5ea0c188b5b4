"""The forms of a conversation: chat templates that are saved in the tokenizer, chosen in instruction.json.

``alpaca`` is the form of Alpaca (Taori et al., 2023) in Japanese: a line that describes the task, one where
there is an input and another where there is none, then sections. ``chat`` has the roles alone, in fewer
tokens. In both, a conversation begins as a document does and every answer ends with the end token.
"""

from __future__ import annotations

import json
from typing import Any

INPUT_HEADING = "\n\n### 入力:\n"
# What calls for an answer, by form: a question ends with it.
ANSWER_HEADINGS = {"alpaca": "### 応答:\n", "chat": "Assistant:\n"}
FORMS = tuple(ANSWER_HEADINGS)

# What a turn of a user's adds; `content` is what it says. It ends a line: no token crosses into the answer.
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

# The heading of an answer stands with the question, so that add_generation_prompt changes nothing. SYSTEM is
# the line used when a conversation brings none. Only what every Jinja knows: transformers' own marks of what
# is trained ({% generation %}) would stop the servers that render with another one.
_TEMPLATE = """{{- bos_token -}}
{%- if messages[0].role != 'system' and SYSTEM -%}
{{- SYSTEM + '\\n\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{%- set content = message.content | trim -%}
{%- if message.role == 'system' -%}
{{- content + '\\n\\n' -}}
{%- elif message.role == 'user' -%}
{%- if not loop.first and loop.previtem.role == 'assistant' -%}{{- '\\n\\n' -}}{%- endif -%}
USER_TURN
{%- elif message.role == 'assistant' -%}
{{- content + eos_token -}}
{%- else -%}
{{- raise_exception('unknown role ' + message.role + ': wanted system, user or assistant') -}}
{%- endif -%}
{%- endfor -%}"""


def chat_template(form: str, system: str = "") -> str:
    """The chat template to keep in the tokenizer.

    form: one of FORMS. system: the first line of conversations that bring none; empty for no such line.
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
    """How transformers' servers find the answer in what was generated, to keep in the tokenizer.

    Without it they go by the architecture, and take a model of Qwen's for one that talks in Qwen's form: the
    whole prompt stands in its answers then. end: the tokenizer's end token.
    """
    return {
        "defaults": {"role": "assistant"},
        "start_anchor": ANSWER_HEADINGS[form],
        "fields": {"content": {"close": end, "content": "text"}},
    }


def user_message(instruction: str, given: str = "") -> str:
    """The content of a user's message: the instruction, and the text to work on in a section of its own."""
    return instruction + (INPUT_HEADING + given if given else "")
