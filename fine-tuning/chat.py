"""Talk to the tuned model, in the terminal or in a browser.

In the terminal:
  /reset            forget the conversation
  /set KEY VALUE    change a sampling option of generation.json, e.g. /set temperature 0.7; alone: show them
  /quit, Ctrl-D     end; Ctrl-C stops an answer

Run:  .venv/bin/python fine-tuning/chat.py --recipe tiny [--web [--port 7860]]
"""

import argparse
import json
import sys

from recipe.config.recipe import load_recipe
from recipe.config.training import tuned_stage
from recipe.conversations.instructions import no_pairs
from recipe.project import RecipeError, Refused, stage_folder


def main() -> None:
    """Check that there is a model to talk to, load it, talk."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--recipe", default="tiny", help="folder below configs/ (default: tiny)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FILE.KEY=VALUE",
        dest="overrides",
        help="override one key, e.g. generation.temperature=0.5",
    )
    parser.add_argument("--web", action="store_true", help="a page for the browser, on this machine only")
    parser.add_argument("--port", type=int, default=7860, help="of the page (default: 7860)")
    arguments = parser.parse_args()
    try:
        config = load_recipe(arguments.recipe, arguments.overrides)
        folder = stage_folder(arguments.recipe, tuned_stage(config))
        if not (folder / "stage.json").exists():
            why = no_pairs(config)
            if why:
                raise Refused(f"this recipe does without tuning ({why}), and only a tuned model can chat")
            raise Refused(f"there is no tuned model yet. Run `bash run_all.sh --recipe {arguments.recipe}`")
        from recipe.evaluation.talking import Talker

        talker = Talker(folder, config)
        if arguments.web:
            serve(talker, arguments.recipe, arguments.port)
        else:
            talk(talker, arguments.recipe, arguments.overrides)
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, EOFError):
        print()


def talk(talker, recipe: str, overrides: list[str]) -> None:
    """Read a line, answer it as it is generated, until the input ends."""
    messages: list[dict[str, str]] = []
    while True:
        line = input("User: ").strip()
        command, _, rest = line.partition(" ")
        try:
            if command == "/quit":
                return
            if command == "/reset":
                messages.clear()
                print("(forgotten)")
            elif command == "/set":
                overrides = set_option(talker, recipe, overrides, rest.strip())
            elif command.startswith("/"):
                print(f"(no command {command}: /reset, /set KEY VALUE, /quit)")
            elif line:
                asked = [*messages, {"role": "user", "content": line}]
                messages = [*asked, {"role": "assistant", "content": say(talker.answer(asked))}]
        except RecipeError as error:
            print(f"({error})")


def say(pieces) -> str:
    """Print an answer as it comes; what there is of it when Ctrl-C stops it."""
    answer = ""
    print("Assistant: ", end="", flush=True)
    try:
        for piece in pieces:
            answer += piece
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        pieces.close()
        print(" (stopped)", end="")
    print()
    return answer


def set_option(talker, recipe: str, overrides: list[str], text: str) -> list[str]:
    """`/set KEY VALUE`: checked as ``--set generation.KEY=VALUE`` is; returns the overrides now in force."""
    from recipe.evaluation.generation import generation_config

    key, _, value = text.partition(" ")
    if key:
        if not value:
            raise Refused("wanted /set KEY VALUE, e.g. /set temperature 0.7")
        overrides = [*overrides, f"generation.{key}={value.strip()}"]
        config = load_recipe(recipe, overrides)
        generation_config(config["generation"], talker.tokenizer)
        talker.config = config
    shown = {k: v for k, v in talker.config["generation"].items() if k not in ("prompts", "questions")}
    print(f"({json.dumps(shown)[1:-1]})")
    return overrides


def serve(talker, recipe: str, port: int) -> None:
    """The page on the loopback address, until Ctrl-C."""
    from recipe.evaluation.talking import web_page

    page = web_page(talker, f"{recipe}: ask in Japanese")
    try:
        page.queue().launch(server_name="127.0.0.1", server_port=port, share=False, quiet=True)
    except OSError as error:
        raise Refused(f"port {port} is not free ({error}). Choose another one with --port") from error


if __name__ == "__main__":
    main()
