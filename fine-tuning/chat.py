"""Talk to the tuned model, or let the pretrained one continue text (--base), in the terminal or in a browser.

In the terminal:
  /reset            forget the conversation
  /set KEY VALUE    change a sampling option of generation.json, e.g. /set temperature 0.7; alone: show them
  //TEXT            a question that begins with /
  /quit, Ctrl-D     end; Ctrl-C stops an answer

Run:  .venv/bin/python fine-tuning/chat.py --recipe tiny [--base] [--web [--port 7860]]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from recipe.config.recipe import load_recipe, recipe_options
from recipe.config.training import tuned_stage
from recipe.conversations.instructions import no_pairs
from recipe.endings import errors_in_one_line
from recipe.hardware import is_installed
from recipe.project import ROOT, RecipeError, Refused, is_finished, stage_folder
from recipe.run.integrity import require_whole

if TYPE_CHECKING:  # it imports torch, and a refusal should not wait for that
    from recipe.evaluation.talking import Talker

OF_PAGE = ("gradio", "starlette")  # setup.sh lets an environment do without them


def main() -> None:
    """Read the options, check that the model exists, load it, and talk."""
    parser = recipe_options(__doc__)
    parser.add_argument(
        "--base",
        action="store_true",
        help="continue text with the pretrained model of stage 05, without tuning",
    )
    parser.add_argument("--web", action="store_true", help="serve a page for a browser on this machine")
    parser.add_argument("--port", type=port_number, default=7860, help="port of the page (default: 7860)")
    arguments = parser.parse_args()
    recipe, base = arguments.recipe, arguments.base
    with errors_in_one_line("chat"):
        config = load_recipe(recipe, arguments.overrides)
        if arguments.web and (missing := [name for name in OF_PAGE if not is_installed(name)]):
            raise Refused(
                f"--web: not installed: {', '.join(missing)}. Install: {sys.executable} -m pip install -r "
                f"{ROOT}/requirements.txt"
            )
        stage = "05_pretrain" if base else tuned_stage(config)
        folder = stage_folder(recipe, stage)
        if not is_finished(folder) or (not base and no_pairs(config)):
            raise Refused(no_model(recipe, str(folder), base, no_pairs(config)))
        require_whole(folder)
        try:
            from recipe.evaluation.talking import Talker

            talker = Talker(folder, config, base)
            if arguments.web:
                serve(talker, recipe, stage, arguments.port)
            else:
                print(f"({recipe}, stage {stage}, {talker.parameters:,} parameters; /quit to end)")
                talk(talker, recipe, arguments.overrides)
        except (KeyboardInterrupt, EOFError):
            print()


def port_number(text: str) -> int:
    """A port from the command line. Raises ArgumentTypeError for one that does not exist."""
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number from 1 to 65535")
    return int(text)


def no_model(recipe: str, folder: str, base: bool, untuned: str) -> str:
    """The error message for a model that does not exist; untuned: why the recipe does not tune, or empty."""
    if base:
        return f"{folder}: there is no pretrained model yet. Run `bash run_all.sh --recipe {recipe} --to 05`"
    continue_text = f"`chat.py --recipe {recipe} --base` continues text with the pretrained model"
    if untuned:
        return f"the recipe {recipe} has no tuned model: {untuned}. {continue_text}"
    return (
        f"{folder}: there is no tuned model yet. Run `bash run_all.sh --recipe {recipe}`. Without tuning, "
        f"{continue_text}"
    )


def talk(talker: Talker, recipe: str, overrides: list[str]) -> None:
    """Read a line, show the model's text as it is generated, and repeat until the input ends."""
    # Lines can be edited and called back in a terminal, where Python has the library for it.
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - `input` uses it
    sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    messages: list[dict[str, str]] = []
    commands = "/set KEY VALUE, /quit" if talker.base else "/reset, /set KEY VALUE, /quit"
    while True:
        line = input("Text: " if talker.base else "User: ").rstrip()
        command, _, rest = line.strip().partition(" ")
        if command.startswith("//"):
            line, command = line.strip()[1:], ""
        try:
            check_line(line)
            if command == "/quit":
                return
            if command == "/reset" and not talker.base:
                messages.clear()
                print("(conversation forgotten)")
            elif command == "/set":
                overrides = set_option(talker, recipe, overrides, rest.strip())
            elif command.startswith("/"):
                print(f"(unknown command {command}. Commands: {commands}; /{command} asks a question)")
            elif line and talker.base:
                say(line, talker.continue_text(line))
            elif line:
                question = [*messages, {"role": "user", "content": line}]
                answer = say("Assistant: ", talker.answer(question))
                if answer:  # empty when it was stopped before its first part
                    messages = [*question, {"role": "assistant", "content": answer}]
        except RecipeError as error:
            print(f"({error})")


def check_line(line: str) -> None:
    """Raise Refused for a line with bytes that are not UTF-8, such as half of a character."""
    try:
        line.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Refused(
            f"the line is not UTF-8: byte 0x{ord(line[error.start]) - 0xDC00:02X} after "
            f"{line[: error.start][-20:]!r}. It was not sent; write it again"
        ) from error


def say(before: str, parts: Iterator[str]) -> str:
    """Print `before` and then the parts as they are generated, up to Ctrl-C; returns the parts joined."""
    text = ""
    print(before, end="", flush=True)
    try:
        for part in parts:
            text += part
            print(part, end="", flush=True)
    except KeyboardInterrupt:
        parts.close()
        print(" (stopped)", end="")
    print()
    return text


def set_option(talker: Talker, recipe: str, overrides: list[str], text: str) -> list[str]:
    """Carry out `/set KEY VALUE`, checked as ``--set generation.KEY=VALUE``; returns the new overrides."""
    from recipe.evaluation.generation import generation_config

    key, _, value = text.partition(" ")
    if key:
        if not value:
            raise Refused("/set needs a key and a value, e.g. /set temperature 0.7")
        overrides = [*overrides, f"generation.{key}={value.strip()}"]
        config = load_recipe(recipe, overrides)
        generation_config(config["generation"], talker.tokenizer)
        if key == "num_return_sequences":
            raise Refused("/set num_return_sequences: a chat has one answer to each message")
        talker.config = config
        if key == "seed":
            talker.seed()
    shown = {k: v for k, v in talker.config["generation"].items() if k not in ("prompts", "questions")}
    print(f"({json.dumps(shown)[1:-1]})")
    return overrides


def serve(talker: Talker, recipe: str, stage: str, port: int) -> None:
    """Serve the page on the loopback address, print the address, and wait for Ctrl-C."""
    from recipe.evaluation.page_guard import PageGuard
    from recipe.evaluation.talking import web_page
    from starlette.middleware import Middleware

    # gradio asks its own page whether it is there, by http_proxy if that is set.
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"
    page = web_page(talker, recipe, stage).queue()
    options = {"quiet": True, "footer_links": [], "prevent_thread_lock": True}
    options["app_kwargs"] = {"middleware": [Middleware(PageGuard)]}
    try:
        _, address, _ = page.launch(server_name="127.0.0.1", server_port=port, share=False, **options)
    except OSError as error:
        raise Refused(f"port {port} is not free ({error}). Choose another one with --port") from error
    print(f"{address.rstrip('/')} (open it in a browser; Ctrl-C ends)", flush=True)
    page.block_thread()


if __name__ == "__main__":
    main()
