"""Stage 04: encode the documents into token files in Megatron-LM's indexed format; each ends with one EOS.

Every core encodes shards of stage 02. Then the parts are joined in the order of the shards. When it was
stopped, the same command continues with the shards that are not done.

Edit: nothing. Writes: train.bin, train.idx, valid.bin, valid.idx (without the held-out sources).
Run:  python pretrain/04_tokenize.py --recipe tiny
"""

from pathlib import Path

from recipe.config.dataset import held_out_sources
from recipe.corpus.shards import SIDES, Shard, count_documents, list_shards
from recipe.project import RecipeError, read_json
from recipe.run.stage import Stage, run_stage

KEYS = ("documents", "bytes", "tokens")


def main(stage: Stage) -> None:
    """Encode each shard into a part, join the parts of each side, count by source."""
    from recipe.corpus.engine import engine
    from recipe.tokenization.encode_corpus import ShardEncoder, document_frame, vocab_size

    dataset, tokenizer = stage.inputs["02_dataset"], stage.inputs["03_tokenizer"]
    frame, vocabulary = document_frame(tokenizer), vocab_size(tokenizer)
    held_out = held_out_sources(stage.config["dataset"])
    shards = [shard for shard in list_shards(dataset) if shard.source not in held_out]
    for side in SIDES:
        if not sum(count_documents(dataset, side, source) for source in {s.source for s in shards}):
            raise RecipeError(
                f"{side}: no document on this side of the split in {dataset}. Add text or change "
                "dataset.valid_share"
            )
    parts = stage.folder / "parts"
    parts.mkdir(exist_ok=True)
    paths = [str(shard.path) for shard in shards]
    encoder = ShardEncoder(paths, str(tokenizer), *frame, vocabulary, str(parts))
    with engine(stage.config["dataset"].get("engine", {}), stage.folder) as phases:
        phases.run("tokenize", [encoder], len(shards))
    totals, counts = {}, {}
    for side in SIDES:
        of_side = [shard for shard in shards if shard.side == side]
        totals[side], counts[side] = join_side(of_side, parts, stage.folder / side)
    stage.figures = {"sources": counts, "totals": totals}
    stage.headline = (
        f"{totals['train']['tokens']:,} training tokens, {totals['valid']['tokens']:,} for validation"
    )


def join_side(
    shards: list[Shard], parts: Path, prefix: Path
) -> tuple[dict[str, int], dict[str, dict[str, int]]]:
    """Join the parts of one side into one token file; its figures in total and by source.

    The documents of a source are next to each other; ``first_document`` and ``first_token`` say where they
    begin. Raises RecipeError when the file does not contain what was encoded.
    """
    from recipe.tokenization.token_files import TokenFile, join_token_files

    total = dict.fromkeys(KEYS, 0) | {"largest_id": 0}
    sources: dict[str, dict[str, int]] = {}
    for shard in shards:
        begin = {"first_document": total["documents"], "first_token": total["tokens"]}
        count = sources.setdefault(shard.source, begin | dict.fromkeys(KEYS, 0))
        part = read_json(parts / f"{shard.path.stem}.json")
        for key in KEYS:
            count[key] += part[key]
            total[key] += part[key]
        total["largest_id"] = max(total["largest_id"], part["largest_id"])
    written = join_token_files([parts / shard.path.stem for shard in shards], prefix)
    file = TokenFile(prefix)
    if not written == (file.documents, len(file.tokens)) == (total["documents"], total["tokens"]):
        raise RecipeError(
            f"{prefix}: {total['documents']} documents and {total['tokens']} tokens were encoded, but "
            f"{written} were written. Check the disk, remove {parts} and run again"
        )
    return total, sources


if __name__ == "__main__":
    run_stage(__file__, __doc__, main, (), ("02_dataset", "03_tokenizer"), resumable=True)
