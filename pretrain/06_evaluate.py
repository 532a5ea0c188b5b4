"""Stage 06: measure the model: loss, perplexity, bits per byte and per character, in and out of domain.

Edit: configs/<recipe>/evaluation.json. Writes: metrics.json, metrics.md.
Run:  python pretrain/06_evaluate.py --recipe tiny
"""

from recipe.outputs import Stage, run_stage, write_json
from recipe.shards import read_texts, side_sources


def main(stage: Stage) -> None:
    """Evaluate every source's validation side; sources held out whole are the out-of-domain set."""
    from recipe.evaluation import combine, evaluate_texts, markdown
    from recipe.modeling import for_inference, load_model
    from transformers import AutoTokenizer

    config, dataset = stage.config["evaluation"], stage.inputs["02_dataset"]
    tokenizer = AutoTokenizer.from_pretrained(stage.inputs["05_pretrain"])
    model = for_inference(load_model(stage.inputs["05_pretrain"]))
    most = int(config.get("megabytes_per_source", 1) * 1e6)
    block_size = stage.config["pretrain"]["block_size"]
    sources = {}
    for name in side_sources(dataset, "valid"):
        texts = list(read_texts(dataset, "valid", name, most))
        if texts:
            sources[name] = evaluate_texts(
                model, tokenizer, texts, block_size, config.get("batch_size", 8), stage.folder, name
            )
    held_out = {name for name, spec in stage.config["dataset"]["sources"].items() if spec.get("held_out")}
    inside = [figures for name, figures in sources.items() if name not in held_out]
    outside = [figures for name, figures in sources.items() if name in held_out]
    metrics = {"in_domain": combine(inside)} | ({"out_of_domain": combine(outside)} if outside else {})
    stage.figures = metrics | {"sources": sources}
    write_json(stage.folder / "metrics.json", stage.figures)
    (stage.folder / "metrics.md").write_text(markdown(metrics | sources), "utf-8")
    shown = [f"{name.replace('_', ' ')} {figures['bits_per_byte']:.4f}" for name, figures in metrics.items()]
    stage.headline = "bits per byte: " + ", ".join(shown)


if __name__ == "__main__":
    run_stage(__file__, __doc__, main, ("evaluation",), ("02_dataset", "05_pretrain"))
