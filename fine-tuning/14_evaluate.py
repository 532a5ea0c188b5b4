"""Stage 14: measure the tuned model: loss on held-out answers, before and after tuning.

Edit: configs/<recipe>/evaluation.json. Writes: metrics.json.
Run:  python fine-tuning/14_evaluate.py --recipe tiny
"""

import math

from recipe.config import tuned_stage
from recipe.instructions import no_pairs
from recipe.outputs import Stage, run_stage, write_json

ANSWERED = 32  # held-out instructions that are answered, to see whether answers stop by themselves


def main(stage: Stage) -> None:
    """Response loss on the validation pairs of both models; how the tuned one answers the first of them."""
    from recipe.conversations import load_conversations
    from recipe.evaluation import repetition, total_loss
    from recipe.generation import generate_all, generation_config
    from recipe.modeling import for_inference, load_model
    from recipe.packing import PackedConversations
    from transformers import AutoTokenizer

    tuned = stage.inputs[tuned_stage(stage.config)]
    tokenizer = AutoTokenizer.from_pretrained(tuned)
    block_size = stage.config["finetune"]["block_size"]
    conversations, left_out = load_conversations(
        stage.inputs["11_dataset"] / "valid.parquet", tokenizer, block_size
    )
    samples = PackedConversations(conversations, block_size, tokenizer.pad_token_id)
    figures: dict = {"conversations": len(conversations), "left_out": left_out}
    for name, folder in (("before", stage.inputs["05_pretrain"]), ("after", tuned)):
        model = for_inference(load_model(folder))
        loss, count = total_loss(model, samples, stage.config["evaluation"].get("batch_size", 8), name)
        figures[name] = {"response_loss": loss / count, "perplexity": math.exp(loss / count), "tokens": count}
    values = stage.config["generation"]
    prompts = [ids[: trained.index(True)] for ids, trained in conversations[:ANSWERED]]
    answers = generate_all(
        model, tokenizer, prompts, generation_config(values, tokenizer), values.get("seed", 42)
    )
    figures["after"] |= {
        "stop_rate": sum(answer.stopped for answer in answers) / len(answers),
        "repetition": sum(repetition(answer.text) for answer in answers) / len(answers),
        "answered": len(answers),
    }
    write_json(stage.folder / "metrics.json", figures)
    stage.figures = figures
    stage.headline = (
        f"response loss {figures['before']['response_loss']:.3f} -> {figures['after']['response_loss']:.3f}, "
        f"{figures['after']['stop_rate']:.0%} of {len(answers)} answers stop by themselves"
    )


if __name__ == "__main__":
    run_stage(
        __file__,
        __doc__,
        main,
        ("evaluation", "generation"),
        lambda config: ("05_pretrain", "11_dataset", tuned_stage(config)),
        skip=no_pairs,
    )
