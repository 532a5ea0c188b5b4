"""Write the exported model as one GGUF file, if llama.cpp gives the same ids and the same next tokens.

Needs stage 16, a tokenizer of kind bpe (or unigram, within limits: see recipe/export/gguf.py), and
`bash setup.sh --extra gguf`. Writes: outputs/<recipe>/<recipe>.gguf.
Run:  .venv/bin/python fine-tuning/to_gguf.py --recipe tiny
"""

import json
import shutil

from recipe.config.recipe import load_recipe, recipe_options
from recipe.endings import errors_in_one_line, raise_stopped
from recipe.project import RecipeError, Refused, is_finished, require_extra, stage_folder, work_folder
from recipe.run.integrity import require_whole
from recipe.run.publication import hold
from recipe.signals import on_stop

PROMPTS, LONGEST = 200, 60  # lines of the validation side; characters of a line


def main() -> None:
    """Convert, compare, and keep the file if it is within the limits."""
    arguments = recipe_options(__doc__).parse_args()
    with errors_in_one_line("to_gguf"):
        on_stop(raise_stopped)
        print(export(arguments.recipe, load_recipe(arguments.recipe, arguments.overrides)))


def export(recipe: str, config: dict) -> str:
    """Convert, compare, and return the result in words. Raises RecipeError when it is below a limit."""
    from recipe.export.gguf import LIMITS, compare_with_llama_cpp, write_gguf
    from recipe.model.build import load_model
    from recipe.tokenization.save import load_tokenizer

    require_extra("gguf", "to_gguf")
    model = stage_folder(recipe, "16_export")
    if not is_finished(model):
        raise Refused(f"{model}: missing. Run `bash run_all.sh --recipe {recipe}`")
    require_whole(model)
    tokenizer = load_tokenizer(model)
    questions = config["generation"].get("questions", []) if tokenizer.chat_template else []
    texts, target = lines(recipe), model.parent / f"{recipe}.gguf"
    work = work_folder(target)
    with hold(model.parent, "to_gguf"):
        shutil.rmtree(work, ignore_errors=True)  # of a run that was killed
        work.mkdir()
        try:
            sentencepiece = stage_folder(recipe, "03_tokenizer") / "spm.model"
            file = write_gguf(model, sentencepiece, config["tokenizer"].get("kind", "unigram"), work)
            chats = [[{"role": "user", "content": question}] for question in questions]
            figures = compare_with_llama_cpp(file, tokenizer, load_model(model), texts, chats)
            below = [
                f"{key} {figures[key]:.1%} (expected at least {limit:.0%})"
                for key, limit in LIMITS.items()
                if figures[key] < limit
            ]
            if below:
                raise RecipeError(
                    f"GGUF: not kept: {', '.join(below)} of {figures['texts']} texts. First text with other "
                    f"ids in llama.cpp: {figures['first_difference']!r}. Use a tokenizer of the kind bpe"
                )
            file.rename(target)
        finally:
            shutil.rmtree(work)
    return f"{target}: {target.stat().st_size / 1e6:,.1f} MB, {json.dumps(figures, ensure_ascii=False)}"


def lines(recipe: str) -> list[str]:
    """PROMPTS lines of the validation side, evenly from all of its shards. Raises Refused without a line."""
    import pyarrow.parquet as pq
    from recipe.evaluation.generation import evenly

    folder = stage_folder(recipe, "02_dataset")
    if not is_finished(folder):
        raise Refused(f"{folder}: missing. Run `bash run_all.sh --recipe {recipe}`")
    found = [
        line[:LONGEST]
        for shard in sorted(folder.glob("valid-*.parquet"))
        for text in pq.read_table(shard)["text"].to_pylist()
        for line in text.split("\n")
        if len(line) >= 10
    ]
    if not found:
        raise Refused(f"{folder}: no line of the validation side has 10 or more characters. Add longer texts")
    return evenly(found, PROMPTS)


if __name__ == "__main__":
    main()
