"""Progress bars: whole lines in a log file, a bar that redraws itself on a terminal."""

import os
import pty
import re
import subprocess
import sys
import termios

import pytest

BARS = """
import sys, time
from recipe.progress import byte_progress, progress, write_lines_without_a_terminal

write_lines_without_a_terminal(float(sys.argv[2]))
if sys.argv[1] == "datasets":
    from datasets.utils import tqdm as datasets_tqdm
from tqdm import tqdm
from tqdm.auto import tqdm as auto_tqdm

def slow(count=320):
    for number in range(count):
        time.sleep(0.01)
        yield number

bars = {
    "ours": lambda: list(progress(slow(), "ours", "document", 320)),
    "bytes": lambda: list(byte_progress((b"x" for _ in slow()), "bytes", 320)),
    "lm_eval": lambda: list(tqdm(slow(), desc="lm_eval", total=320)),
    "transformers": lambda: list(auto_tqdm(slow(), desc="transformers", total=320)),
    "datasets": lambda: list(datasets_tqdm(slow(), desc="datasets", total=320)),
}
if sys.argv[1] == "short":
    list(tqdm(slow(20), desc="short", total=20))
elif sys.argv[1] == "nested":
    for _ in tqdm(range(1), desc="outer"):
        bars["lm_eval"]()
    with tqdm(slow(), desc="postfix", total=320) as bar:
        for number in bar:
            bar.set_postfix_str(f"loss {number}")
            if number == 10:
                bar.write("a message", file=sys.stderr)
else:
    bars[sys.argv[1]]()
"""


RUNS = [(name, "1") for name in ("ours", "bytes", "lm_eval", "transformers", "datasets", "nested", "short")]
RUNS.append(("lm_eval", "20"))


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """The log of each run: all at once, because they mostly wait."""
    script = tmp_path_factory.mktemp("bars") / "bars.py"
    script.write_text(BARS)
    pipe = subprocess.PIPE
    started = {run: subprocess.Popen([sys.executable, str(script), *run], stderr=pipe) for run in RUNS}
    return {run: child.communicate(timeout=120)[1].decode() for run, child in started.items()}


def lines(logs, bar, seconds="1"):
    text = logs[bar, seconds]
    assert "\r" not in text and "\x1b" not in text, repr(text)
    assert not text or text.endswith("\n")
    return text.splitlines()


@pytest.mark.parametrize("bar", ["ours", "bytes", "lm_eval", "transformers", "datasets"])
def test_log_gets_whole_lines_at_the_interval_with_the_time_left(logs, bar):
    found = lines(logs, bar)
    stays = bar not in ("ours", "bytes")
    assert 2 <= len(found) <= 3 + stays, found
    assert all(line.startswith(f"{bar}: ") for line in found), found
    # elapsed<left
    assert re.search(r"\d\d:\d\d<00:0[1-9]", found[0]), found
    assert ("100%" in found[-1]) == stays, found


def test_nested_bars_and_messages_share_the_log(logs):
    found = lines(logs, "nested")
    assert "a message" in found
    assert {line.split(":")[0] for line in found} == {"outer", "lm_eval", "postfix", "a message"}
    assert len(found) <= 12, found


def test_short_work_and_long_intervals_are_silent(logs):
    assert lines(logs, "short") == []
    assert len(lines(logs, "lm_eval", "20")) == 1


def test_terminal_keeps_its_bar(tmp_path):
    (tmp_path / "bars.py").write_text(BARS)
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(ours, (24, 80))
    command = [sys.executable, str(tmp_path / "bars.py"), "lm_eval", "1"]
    with subprocess.Popen(command, stderr=theirs):
        os.close(theirs)
        text = b""
        try:
            while chunk := os.read(ours, 1000):
                text += chunk
        except OSError:
            pass  # the terminal is closed with its last writer
    assert text.count(b"\rlm_eval: ") > 10
