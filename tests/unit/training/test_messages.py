"""Messages to the user's webhook: what is sent, and that nothing waits for one that does not answer."""

import http.server
import json
import os
import platform
import queue
import socket
import subprocess
import sys
import threading

import pytest
from recipe.training.messages import send_message


@pytest.fixture
def webhook(monkeypatch):
    """The messages that a webhook receives."""
    received = queue.Queue()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            received.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("RECIPE_WEBHOOK", f"http://127.0.0.1:{server.server_port}/hook")
    yield received
    server.shutdown()
    server.server_close()


def test_message_names_stage_and_recipe(webhook, tmp_path):
    send_message(tmp_path / "tiny/.05_pretrain.work", "止まりました")
    text = f"05_pretrain of recipe tiny on {platform.node()}: 止まりました"
    assert webhook.get(timeout=60) == {"text": text, "content": text}


# The process has ended by itself only if the server got the whole message before.
SENDER = """
import sys
from pathlib import Path
from recipe.training import messages
messages.SECONDS = float(sys.argv[1])
messages.send_message(Path("tiny/.05_pretrain.work"), "x")
print("goes on", flush=True)
"""


def send(seconds, address):
    return subprocess.run(
        [sys.executable, "-c", SENDER, str(seconds)],
        env={"PYTHONPATH": ":".join(sys.path), "RECIPE_WEBHOOK": address},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_an_ending_process_waits_for_its_message(webhook):
    assert send(30, os.environ["RECIPE_WEBHOOK"]).returncode == 0
    assert webhook.qsize() == 1


def test_a_webhook_that_does_not_answer_delays_nothing():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        result = send(0.5, f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert (result.returncode, result.stdout) == (0, "goes on\n")


@pytest.mark.parametrize("address", ["http://127.0.0.1:9/hook", "http://127.0.0.1:abc/", "no address"])
def test_a_webhook_that_cannot_be_called_is_a_warning(address):
    result = send(30, address)
    assert result.returncode == 0 and "warning: RECIPE_WEBHOOK could not be called" in result.stderr


def test_without_an_address_nothing_is_sent(tmp_path, monkeypatch):
    monkeypatch.delenv("RECIPE_WEBHOOK", raising=False)
    before = threading.active_count()
    send_message(tmp_path, "x")
    assert threading.active_count() == before
