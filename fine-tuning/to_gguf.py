"""Write the exported model as one GGUF file for llama.cpp, if llama.cpp reads and continues alike.

Wants stage 16, a tokenizer of kind bpe (or unigram, within limits: see recipe/export/gguf.py), and
`bash setup.sh --extra gguf`. Writes: outputs/<recipe>/<recipe>.gguf.
Run:  .venv/bin/python fine-tuning/to_gguf.py --recipe tiny
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from recipe.config.recipe import load_recipe
from recipe.project import RecipeError, Refused, require_extra, stage_folder

PROMPTS, LONGEST = 200, 60  # lines of the validation side, and characters of a line


def main() -> None:
    """Convert, compare, and keep the file if it is within the limits."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--recipe", default="tiny", help="folder below configs/ (default: tiny)")
    recipe = parser.parse_args().recipe
    try:
        print(export(recipe, load_recipe(recipe)))
    except RecipeError as error:
        print(f"to_gguf: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def export(recipe: str, config: dict) -> str:
    """Do it, and return what to tell. Raises RecipeError when the file is not within the limits."""
    from recipe.export.gguf import LIMITS, compare, write_gguf
    from recipe.model.build import load_model
    from transformers import AutoTokenizer

    require_extra("gguf", "to_gguf")
    model = stage_folder(recipe, "16_export")
    if not (model / "stage.json").exists():
        raise Refused(f"there is no exported model yet. Run `bash run_all.sh --recipe {recipe}`")
    tokenizer = AutoTokenizer.from_pretrained(model)
    questions = config["generation"].get("questions", []) if tokenizer.chat_template else []
    with tempfile.TemporaryDirectory(dir=model.parent) as work:
        sentencepiece = stage_folder(recipe, "03_tokenizer") / "spm.model"
        file = write_gguf(model, sentencepiece, config["tokenizer"].get("kind", "unigram"), Path(work))
        chats = [[{"role": "user", "content": question}] for question in questions]
        figures = compare(file, tokenizer, load_model(model), lines(recipe), chats)
        below = [
            f"{key} {figures[key]:.1%} (wanted {limit:.0%})"
            for key, limit in LIMITS.items()
            if figures[key] < limit
        ]
        if below:
            raise RecipeError(
                f"GGUF: not kept: {', '.join(below)} of {figures['texts']} texts. First text that llama.cpp "
                f"reads otherwise: {figures['first_difference']!r}. A tokenizer of kind bpe converts exactly"
            )
        target = model.parent / f"{recipe}.gguf"
        file.rename(target)
    return f"{target}: {target.stat().st_size / 1e6:,.1f} MB, {json.dumps(figures, ensure_ascii=False)}"


def lines(recipe: str) -> list[str]:
    """Lines of the validation side, evenly from all of its shards."""
    import pyarrow.parquet as pq

    shards = sorted(stage_folder(recipe, "02_dataset").glob("valid-*.parquet"))
    found = [
        line[:LONGEST]
        for shard in shards
        for text in pq.read_table(shard)["text"].to_pylist()
        for line in text.split("\n")
        if len(line) >= 10
    ]
    return found[:: max(1, len(found) // PROMPTS)][:PROMPTS]


if __name__ == "__main__":
    main()
