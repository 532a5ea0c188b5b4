"""Data sets that a hub does not give: a server on this machine answers as the hub does."""

import http.server
import os
import subprocess
import sys
import threading

import pytest

ASK = """
from recipe.conversations.read_rows import read_rows
from recipe.corpus.readers import read_hub
from recipe.project import RecipeError
for name in ("someone/gated", "someone/renamed"):
    for read in (
        lambda: read_hub("web", {"dataset": name}),
        lambda: read_rows("instruction.json: pairs.mine", {"dataset": name}),
    ):
        try:
            list(read())
        except RecipeError as error:
            print(error)
"""


class Hub(http.server.BaseHTTPRequestHandler):
    """The answers of the hub for a data set with terms to accept, and for one that is not there."""

    def do_GET(self):
        code, error = (403, "GatedRepo") if "gated" in self.path else (401, "RepoNotFound")
        self.send_response(code)
        self.send_header("X-Error-Code", error)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def address():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def ask(tmp_path, **environment):
    """The messages for texts and for pairs, first of the gated data set, then of the other one."""
    variables = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    variables |= {"HF_HOME": str(tmp_path)} | environment
    result = subprocess.run([sys.executable, "-c", ASK], env=variables, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_a_gated_and_a_renamed_data_set_say_what_to_do(tmp_path, address):
    lines = ask(tmp_path, HF_ENDPOINT=address)
    wheres = ("sources.web", "instruction.json: pairs.mine") * 2
    assert len(lines) == 4
    for line, where, name in zip(lines, wheres, ("gated", "gated", "renamed", "renamed"), strict=True):
        assert line.startswith(f"{where}: cannot read the data set someone/{name}: ")
    assert all("Accept its terms on that page, then `hf auth login`" in line for line in lines[:2])
    assert all("'someone/renamed' on huggingface.co: it may have another name" in line for line in lines[2:])


def test_a_hub_that_is_not_reached_names_the_way_without_a_network(tmp_path):
    lines = ask(tmp_path, HF_HUB_OFFLINE="1")
    assert len(lines) == 4
    assert all("`hf download --repo-type dataset someone/" in line for line in lines)
