"""The tuned model behind transformers' own server: same prompt as in training, same answer as ours."""

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

pytestmark = pytest.mark.slow

FIRST = [{"role": "user", "content": "山は高いですか?"}]
LATER = [*FIRST, {"role": "assistant", "content": "はい。\n高いです。"}, {"role": "user", "content": "海は?"}]


@pytest.fixture(scope="module")
def ask(project):
    """A function that sends a chat to ``transformers serve`` with the tuned model; returns the raw reply."""
    pytest.importorskip("openai", reason="transformers serve wants it: pip install 'transformers[serving]'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    model = project.output("mini", "12_finetune", ".").resolve()
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(model), "--device", "cpu"]
    server = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port)],
        env=project.environment | {"HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def post(messages, config, **more):
        body = {"messages": messages, "generation_config": config.to_json_string(), **more}
        address = f"http://127.0.0.1:{port}/v1/chat/completions"
        request = urllib.request.Request(
            address, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.read().decode()

    deadline = time.monotonic() + 180
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
            break
        except urllib.error.HTTPError:
            break
        except OSError:
            assert server.poll() is None and time.monotonic() < deadline, "the server did not start"
            time.sleep(0.5)
    yield post
    server.kill()
    server.wait()


@pytest.fixture(scope="module")
def ours(project):
    """The sampling options, and a function that returns the number of ids of our prompt, and our answer."""
    from recipe.conversations.encode import encode_conversation
    from recipe.evaluation.generation import generate_all, generation_config
    from recipe.model.build import for_inference, load_model
    from transformers import AutoTokenizer

    folder = project.output("mini", "12_finetune", ".")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), for_inference(load_model(folder))
    # A model as small as this one may end its answer at once.
    values = {"max_new_tokens": 24, "min_new_tokens": 16, "do_sample": False}
    config = generation_config(values, tokenizer)

    def answer(messages):
        ids, _ = encode_conversation(tokenizer, messages)
        return len(ids), generate_all(model, tokenizer, [ids], config, 0)[0].text

    return config, answer


@pytest.mark.parametrize("messages", [FIRST, LATER], ids=["first question", "later question"])
def test_its_answer_is_ours(ask, ours, messages):
    config, answer = ours
    reply = json.loads(ask(messages, config))
    size, text = answer(messages)
    assert reply["usage"]["prompt_tokens"] == size
    assert text  # the small model may write only line breaks, which a server may remove
    assert reply["choices"][0]["message"]["content"].strip() == text.strip()


def test_its_stream_gives_the_answer_in_parts(ask, ours):
    config, answer = ours
    lines = ask(FIRST, config, stream=True).splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    parts = [event["choices"][0]["delta"].get("content") or "" for event in events]
    assert len([part for part in parts if part]) > 3
    assert "".join(parts).strip() == answer(FIRST)[1].strip()
