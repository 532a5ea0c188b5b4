"""Talking to the tuned and the pretrained model: in the terminal, by the page's server, in a browser."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

QUESTION = "山は高いですか?"
# A model as small as this one may end its answer at once.
# A model of so few steps repeats one token: with the penalty, what was said before changes the answer.
GREEDY = ("--set", "generation.do_sample=false", "--set", "generation.repetition_penalty=2.0")
NOT_EMPTY = ("--set", "generation.min_new_tokens=8")


@pytest.fixture(scope="module")
def untuned(project):
    """A recipe without tuning, run to stage 05."""
    project.copy("untuned")
    project.edit("untuned", "instruction", pairs={})
    project.run("run_all.sh", "--recipe", "untuned", "--to", "05")
    return "untuned"


def chat(project, text, *options, recipe="mini"):
    """What chat.py prints for lines of input."""
    command = [sys.executable, str(project.folder / "fine-tuning/chat.py"), "--recipe", recipe, *options]
    return subprocess.run(command, input=text, env=project.environment, capture_output=True, text=True)


def test_a_seed_repeats_an_answer(project):
    asked = ["/set seed 7", QUESTION, "/reset"]
    lines = ["/set do_sample true", "/set temperature 3", *asked, QUESTION, "/reset", *asked]
    result = chat(project, "\n".join([*lines, "/set num_return_sequences 2", "/quit"]) + "\n")
    first, between, again = re.findall("Assistant: (.*)", result.stdout)
    assert first == again != between
    assert "a chat has one answer" in result.stdout


def test_a_recipe_that_no_longer_tunes_has_nothing_to_talk_to(project):
    (project.folder / "configs/no-pairs").mkdir()
    for path in (project.folder / "configs/mini").glob("*.json"):
        shutil.copy(path, project.folder / "configs/no-pairs")
    project.edit("no-pairs", "instruction", pairs={})
    (project.folder / "outputs/no-pairs").symlink_to(project.folder / "outputs/mini")
    result = chat(project, "", recipe="no-pairs")
    assert result.returncode == 2 and "the recipe no-pairs has no tuned model" in result.stderr


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
    assert "temperature: -1, expected more than 0" in result.stdout
    assert "the model has 256 positions" in result.stdout
    assert "unknown command /bye" in result.stdout and "//bye asks a question" in result.stdout
    assert re.search(r"mini, stage 12_finetune, [\d,]+ parameters", result.stdout)


def test_half_a_character_and_a_question_with_a_slash(project):
    """Both used to end or to be impossible; the conversation goes on after the broken line."""
    broken = "今日は".encode() + b"\xe3\x81\n" + "//etcとは何ですか?\n".encode()
    command = [sys.executable, str(project.folder / "fine-tuning/chat.py"), "--recipe", "mini"]
    result = subprocess.run(command, input=broken, env=project.environment, capture_output=True)
    shown = result.stdout.decode()
    assert result.returncode == 0 and b"Traceback" not in result.stderr
    assert "the line is not UTF-8: byte 0xE3 after '今日は'" in shown
    assert shown.count("Assistant: ") == 1 and "unknown command" not in shown


def test_greedy_answers_repeat_and_history_counts(project):
    """The same question gets the same answer after /reset, and another one with a turn before it."""
    greedy = (*GREEDY, "--set", "generation.max_new_tokens=24", *NOT_EMPTY)
    result = chat(project, f"{QUESTION}\n/reset\n{QUESTION}\n{QUESTION}\n", *greedy)
    first, again, later = [
        line.partition("Assistant: ")[2] for line in result.stdout.split("\n") if "Assistant" in line
    ]
    assert first == again != later


def test_the_pretrained_model_continues_text(project, untuned):
    """It needs no tuned model; the same line gets the same text again; /reset does not exist."""
    lines = f"今日は\n/reset\n今日は\n{'長' * 400}\n"
    result = chat(project, lines, "--base", "--set", "generation.do_sample=false", *NOT_EMPTY, recipe=untuned)
    assert result.returncode == 0, result.stderr
    assert "untuned, stage 05_pretrain" in result.stdout
    first, again = re.findall(r"Text: 今日は(.+?)(?=\nText:)", result.stdout, re.DOTALL)
    assert first == again
    assert "unknown command /reset" in result.stdout
    assert "the model has 256 positions" in result.stdout


def test_a_missing_model_is_named_and_base_is_offered(project, untuned):
    project.add_recipe("new", {})
    for file in (project.folder / "configs/mini").glob("*.json"):
        shutil.copy(file, project.folder / "configs/new")
    for recipe, options, expected in (
        (
            untuned,
            (),
            "the recipe untuned has no tuned model: instruction.json names no pairs. `chat.py --rec",
        ),
        (untuned, (), "`chat.py --recipe untuned --base` continues text with the pretrained model"),
        ("new", (), "12_finetune: there is no tuned model yet. Run `bash run_all.sh --recipe new`"),
        ("new", (), "`chat.py --recipe new --base` continues text"),
        (
            "new",
            ("--base",),
            "05_pretrain: there is no pretrained model yet. Run `bash run_all.sh --recipe new",
        ),
    ):
        result = chat(project, "", *options, recipe=recipe)
        assert result.returncode == 2 and expected in result.stderr, result.stderr


@contextlib.contextmanager
def page(project, *options, recipe="mini"):
    """The address that a running ``chat.py --web`` prints."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # A proxy that does not answer, as in a company's network: the page must be reached without it.
    before = dict(project.environment)
    project.environment.update(http_proxy="http://127.0.0.1:9", no_proxy="", NO_PROXY="")
    server = project.start("fine-tuning/chat.py", "--recipe", recipe, "--web", "--port", str(port), *options)
    project.environment = before
    try:
        printed = iter(server.stdout.readline, "")
        address = next((line.split()[0] for line in printed if line.startswith("http://")), None)
        assert address == f"http://127.0.0.1:{port}"
        yield address
    finally:
        server.terminate()
        server.communicate(timeout=60)


def shown(address):
    """What Gradio's server tells a browser to draw: the components' types and properties, and the title."""
    with urllib.request.urlopen(f"{address}/config") as answer:
        config = json.load(answer)
    return [(part["type"], part["props"]) for part in config["components"]], config["title"]


def check_japanese(parts):
    """Every label, placeholder and button that is shown is in Japanese (or is the name of an option)."""
    for kind, props in parts:
        if props.get("visible", True) is True and kind not in ("state", "browserstate", "markdown"):
            keys = ["label", "placeholder", "submit_btn", "stop_btn"] + ["value"] * (kind == "button")
            texts = [props[key] for key in keys if isinstance(props.get(key), str)]
            assert all(re.search("[ぁ-ん一-龠]", text) for text in texts), (kind, texts)


def test_the_page_speaks_japanese_and_says_which_model_it_is(project):
    with page(project) as address:
        parts, title = shown(address)
    assert title == "mini と話す"
    check_japanese(parts)
    facts = [props["value"] for kind, props in parts if kind == "markdown"][-1]
    assert re.fullmatch(r"レシピ: mini、パラメータ数: [\d,]+、段階: 12_finetune \(指示チューニング\)", facts)
    (chatbot,) = [props for kind, props in parts if kind == "chatbot"]
    assert [example["text"] for example in chatbot["examples"]] == [QUESTION]
    assert "share" not in chatbot["buttons"]


def test_the_page_of_the_pretrained_model_continues_text(project, untuned):
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    options = ("--base", "--set", "generation.do_sample=false", *NOT_EMPTY)
    with page(project, *options, recipe=untuned) as address:
        parts, title = shown(address)
        assert title == "untuned に続きを書かせる"
        check_japanese(parts)
        assert [props["samples"] for kind, props in parts if kind == "dataset"] == [[["今日は"]]]
        assert "05_pretrain (事前学習)" in parts[0][1]["value"]
        client = Client(address, verbose=False)
        job = client.submit("今日は", 0, 1, 48, api_name="/continue")
        result = job.result()
        assert result.startswith("今日は") and len(result) > len("今日は")
        assert len(job.outputs()) > 3
        with pytest.raises(AppError, match="the model has 256 positions"):
            client.predict("長" * 400, 0, 1, 48, api_name="/continue")


def test_the_page_answers_through_its_server(project):
    """The real server with Gradio's own client: answers stream, history counts, errors are shown."""
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    with page(project, *GREEDY, *NOT_EMPTY) as address:
        client = Client(address, verbose=False)
        job = client.submit(QUESTION, 0, 1, 48, api_name="/chat")
        answer = job.result()
        outputs = job.outputs()
        assert len(outputs) > 3 and outputs[-1] == answer
        assert all(later.startswith(earlier) for earlier, later in zip(outputs, outputs[1:], strict=False))
        assert client.predict(QUESTION, 0, 1, 48, api_name="/chat") != answer  # a turn is before it now
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


# Every text that the answer's bubble shows, and whether it has not changed for two seconds.
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
    """A click on the example asks it, the answer grows, a typed question follows; a picture is kept."""
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
        tab.get_by_text(QUESTION, exact=True).click()
        tab.wait_for_function(STILL, timeout=120_000)
        seen = tab.evaluate("window.seen")
        assert len(set(seen) - {""}) >= 4, f"the answer came at once: seen {seen}"
        assert tab.get_by_test_id("user").inner_text().strip() == QUESTION
        box = tab.get_by_role("textbox").first
        box.fill("海は?")
        tab.get_by_role("button", name="送信").click()
        tab.wait_for_function("document.querySelectorAll('[data-testid=bot]')[1]?.innerText.trim()")
        assert tab.get_by_test_id("user").last.inner_text().strip() == "海は?"
        tab.screenshot(path=picture)
        browser.close()
    assert Path(picture).read_bytes().startswith(b"\x89PNG")
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
