"""Talking to the tuned model: in the terminal, through the page's server, in a browser."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

QUESTION = "山は高いですか?"
# A model as small as this one may end its answer at once.
NOT_EMPTY = ("--set", "generation.min_new_tokens=8")


def chat(project, text, *options):
    """What chat.py prints for lines of input."""
    command = [sys.executable, str(project.folder / "fine-tuning/chat.py"), "--recipe", "mini", *options]
    return subprocess.run(command, input=text, env=project.environment, capture_output=True, text=True)


def test_the_terminal_answers_and_obeys(project):
    lines = [
        QUESTION,
        "/set temperature 1",
        "/set temprature 1",
        "/set temperature -1",
        "/reset",
        "</s>とは?",
        "　",
        "長" * 400,
        "/bye",
        QUESTION,
    ]
    result = chat(project, "\n".join([*lines, "/quit"]) + "\n")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Assistant: ") == 3
    assert '"temperature": 1' in result.stdout
    assert "temprature: unknown key (value 1). Did you mean 'temperature'?" in result.stdout
    assert "`temperature` (=-1.0) has to be a strictly positive float" in result.stdout
    assert "the model has 256 positions" in result.stdout
    assert "no command /bye" in result.stdout


def test_greedy_answers_repeat_and_history_counts(project):
    """The same question gets the same answer after /reset, and another one with a turn before it."""
    greedy = ("--set", "generation.do_sample=false", "--set", "generation.max_new_tokens=24", *NOT_EMPTY)
    result = chat(project, f"{QUESTION}\n/reset\n{QUESTION}\n{QUESTION}\n", *greedy)
    first, again, later = [
        line.partition("Assistant: ")[2] for line in result.stdout.split("\n") if "Assistant" in line
    ]
    assert first == again != later


@contextlib.contextmanager
def page(project, *options):
    """The address of a running ``chat.py --web``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = project.start("fine-tuning/chat.py", "--recipe", "mini", "--web", "--port", str(port), *options)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            with contextlib.suppress(OSError), urllib.request.urlopen(address):
                break
            assert server.poll() is None, server.communicate()[0]
            time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.communicate(timeout=60)


def test_the_page_answers_through_its_server(project):
    """The real server and Gradio's own client: answers stream, history counts, what cannot be is said."""
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    with page(project, "--set", "generation.do_sample=false", *NOT_EMPTY) as address:
        client = Client(address, verbose=False)
        job = client.submit(QUESTION, 0, 1, 48, api_name="/chat")
        answer = job.result()
        outputs = job.outputs()
        assert len(outputs) > 3 and outputs[-1] == answer
        assert all(later.startswith(earlier) for earlier, later in zip(outputs, outputs[1:], strict=False))
        assert client.predict(QUESTION, 0, 1, 48, api_name="/chat") != answer  # a turn stands before it now
        assert Client(address, verbose=False).predict(QUESTION, 0, 1, 48, api_name="/chat") == answer
        with pytest.raises(AppError, match="the model has 256 positions"):
            client.predict("長" * 400, 0, 1, 48, api_name="/chat")
        port = int(address.rpartition(":")[2])
        other = chat(project, "", "--web", "--port", str(port))
        assert other.returncode == 2 and f"port {port} is not free" in other.stderr


def test_the_page_listens_on_loopback_only(project):
    with page(project) as address:
        port = int(address.rpartition(":")[2])
        listening = subprocess.run(["ss", "-Hltn", f"sport = :{port}"], capture_output=True, text=True)
        assert [line.split()[3] for line in listening.stdout.splitlines()] == [f"127.0.0.1:{port}"]


# Every text that the answer's bubble shows; and whether it has stood still for two seconds.
WATCH = """() => {
  window.seen = [];
  new MutationObserver(() => {
    const text = document.querySelector('[data-testid="bot"]')?.innerText.trim() ?? "";
    if (text !== window.seen.at(-1)) { window.seen.push(text); window.changed = Date.now(); }
  }).observe(document.body, {subtree: true, childList: true, characterData: true});
}"""
STILL = "window.seen.some(text => text) && Date.now() - window.changed > 2000"


@pytest.mark.browser
@pytest.mark.extra("browser")
def test_the_page_in_a_browser(project, tmp_path):
    """Chromium types a Japanese question, sees the answer grow, and a picture of it is kept."""
    from playwright import sync_api as playwright

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("could not run: no chromium on PATH: apt-get install chromium fonts-ipafont-gothic")
    picture = os.environ.get("SCREENSHOT", str(tmp_path / "chat.png"))
    options = ("--set", "generation.max_new_tokens=96", "--set", "generation.min_new_tokens=96")
    with page(project, *options) as address, playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page()
        asked = []
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(address)
        tab.evaluate(WATCH)
        box = tab.get_by_role("textbox").first
        box.fill(QUESTION)
        box.press("Enter")
        tab.wait_for_function(STILL, timeout=120_000)
        seen = tab.evaluate("window.seen")
        assert len(set(seen) - {""}) >= 4, f"the answer came at once: seen {seen}"
        assert tab.get_by_test_id("user").inner_text().strip() == QUESTION
        tab.screenshot(path=picture)
        browser.close()
    assert Path(picture).read_bytes().startswith(b"\x89PNG")
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
