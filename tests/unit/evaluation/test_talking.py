"""Talking: what the page makes of its history and of generation.json, and which turns a prompt keeps."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
from recipe.evaluation import talking
from recipe.project import ROOT


def turn(role, text):
    return {"role": role, "content": text}


def fake(asked, **generation):
    """A talker that notes what it is asked, and answers nothing."""
    return SimpleNamespace(
        config={"generation": {"max_new_tokens": 8, "prompts": [], **generation}},
        model=SimpleNamespace(config=SimpleNamespace(max_position_embeddings=64)),
        answer=lambda messages, **_: asked.append(messages) or iter(()),
    )


def test_questions_without_an_answer_are_not_asked_again():
    """They were too long, or stopped before the first part: the page keeps them in its history."""
    pytest.importorskip("gradio")
    asked = []
    page = talking._chat_page(fake(asked), "tiny", "")
    answered = [turn("user", "山は?"), turn("assistant", "高い")]
    history = [turn("user", "長い"), *answered, turn("user", "長い"), turn("user", "長い")]
    list(page.fn("海は?", history, 0, 1, 8))
    assert asked == [[*answered, turn("user", "海は?")]]


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({"do_sample": True, "temperature": None, "top_p": None}, [(0, 2, 1.0), (0.05, 1, 1.0)]),
        ({"do_sample": True, "temperature": 3.5, "top_p": 0}, [(0, 3.5, 3.5), (0, 1, 0)]),
        ({"temperature": 3.5, "top_p": 0.5}, [(0, 2, 0), (0.05, 1, 0.5)]),
    ],
)
def test_the_sliders_hold_the_values_of_generation_json(generation, expected):
    pytest.importorskip("gradio")
    *found, _ = talking._sliders(fake([], **generation))
    assert [(slider.minimum, slider.maximum, slider.value) for slider in found] == expected


def test_as_many_of_the_last_turns_as_fit_are_kept_in_few_encodings(monkeypatch):
    """Each turn has as many ids as characters."""
    calls = []

    def encoded(tokenizer, messages):
        calls.append(messages)
        return [1] * sum(len(m["content"]) for m in messages), []

    monkeypatch.setattr(talking, "encode_conversation", encoded)
    monkeypatch.setattr(talking, "clean_question", lambda config, text: text)
    talker = talking.Talker.__new__(talking.Talker)
    talker.config, talker.tokenizer, talker.longest = {}, None, 10_000
    talker.model = fake([]).model
    sampling = SimpleNamespace(max_new_tokens=8)
    for count in (1, 3, 19, 21, 999):
        messages = [
            turn("system", "短く"),
            *(turn(("user", "assistant")[i % 2], "三文字") for i in range(count)),
        ]
        calls.clear()
        # Of 64 positions, 8 are for the answer and 2 are taken by the system message: 18 turns, of which
        # a user's is the first.
        assert len(talker._prompt(messages, sampling)) == 2 + 3 * min(count, 17)
        assert len(calls) < 12


def test_a_port_that_does_not_exist_is_refused_before_the_model_is_loaded():
    for port in ("99999", "-1", "0", "x"):
        command = [sys.executable, ROOT / "fine-tuning/chat.py", "--port", port]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 2 and "whole number from 1 to 65535" in result.stderr, result.stderr
