"""Talk to the tuned model in the terminal. /reset forgets the conversation, /quit or Ctrl-D ends.

Run:  .venv/bin/python fine-tuning/chat.py --recipe tiny
"""

import argparse
import sys

from recipe.config import load_recipe, tuned_stage
from recipe.instructions import no_pairs
from recipe.outputs import RecipeError, Refused, stage_folder


def main() -> None:
    """Read a line, answer it as it is generated, until the input ends."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
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
    arguments = parser.parse_args()
    try:
        config = load_recipe(arguments.recipe, arguments.overrides)
        values = config["generation"]
        folder = stage_folder(arguments.recipe, tuned_stage(config))
        if not (folder / "stage.json").exists():
            why = no_pairs(config)
            if why:
                raise Refused(f"this recipe does without tuning ({why}), and only a tuned model can chat")
            raise Refused(f"there is no tuned model yet. Run `bash run_all.sh --recipe {arguments.recipe}`")
        talk(folder, values)
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, EOFError):
        print()


def talk(folder, values: dict) -> None:
    """The conversation itself; the oldest turns are forgotten when the context is full."""
    import torch
    from recipe.chat import encode_conversation, generation_config, stream
    from recipe.modeling import for_inference, load_model
    from transformers import AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), for_inference(load_model(folder))
    config = generation_config(values, tokenizer)
    room = model.config.max_position_embeddings - config.max_new_tokens
    torch.manual_seed(values.get("seed", 42))
    messages: list[dict[str, str]] = []
    while True:
        line = input("User: ").strip()
        if line == "/quit":
            return
        if line == "/reset":
            messages.clear()
        elif line:
            messages.append({"role": "user", "content": line})
            while len(prompt := encode_conversation(tokenizer, messages)[0]) > room and len(messages) > 1:
                del messages[:2]
            if len(prompt) > room:
                messages.pop()
                print(f"(too long: {len(prompt)} tokens, {room} fit)")
                continue
            answer = ""
            print("Assistant: ", end="", flush=True)
            for piece in stream(model, tokenizer, prompt, config):
                answer += piece
                print(piece, end="", flush=True)
            print()
            messages.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    main()
