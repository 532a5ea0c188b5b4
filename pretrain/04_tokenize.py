"""Stage 04: turn the documents into token files in Megatron-LM's indexed format: <s> document </s>.

Edit: nothing. Writes: train.bin, train.idx, valid.bin, valid.idx (held-out sources stay out of valid).
Run:  python pretrain/04_tokenize.py --recipe tiny
"""

import itertools
import os

from recipe.outputs import RecipeError, Stage, run_stage
from recipe.progress import progress
from recipe.shards import count_documents, read_texts, side_sources

BATCH = 512  # documents encoded at once, by all cores


def main(stage: Stage) -> None:
    """Encode with SentencePiece itself: stage 03 has proved its ids identical, and it is several times
    faster.
    """
    import sentencepiece as spm
    from recipe.packing import TokenFile, write_token_file

    processor = spm.SentencePieceProcessor(model_file=str(stage.inputs["03_tokenizer"] / "spm.model"))
    bos, eos = processor.bos_id(), processor.eos_id()
    dataset, threads = stage.inputs["02_dataset"], os.cpu_count() or 1
    held_out = {name for name, spec in stage.config["dataset"]["sources"].items() if spec.get("held_out")}
    counts: dict[str, dict[str, dict[str, int]]] = {}

    def encode(side: str):
        for source in side_sources(dataset, side):
            if source in held_out:
                continue
            count = counts.setdefault(side, {}).setdefault(source, {"documents": 0, "bytes": 0, "tokens": 0})
            texts = read_texts(dataset, side, source)
            while batch := list(itertools.islice(texts, BATCH)):
                for text, ids in zip(batch, processor.encode(batch, num_threads=threads), strict=True):
                    count["documents"] += 1
                    count["bytes"] += len(text.encode("utf-8"))
                    count["tokens"] += len(ids) + 2
                    yield [bos, *ids, eos]

    for side in ("train", "valid"):
        documents = progress(encode(side), side, "documents", count_documents(dataset, side))
        written = write_token_file(stage.folder / side, documents, processor.vocab_size())
        counted = [sum(c[key] for c in counts.get(side, {}).values()) for key in ("documents", "tokens")]
        file = TokenFile(stage.folder / side)
        if list(written) != counted or [file.documents, len(file.tokens)] != counted:
            raise RecipeError(
                f"{side}: {counted} documents and tokens were encoded, {written} were written. Disk fault?"
            )
        if not written[1]:
            raise RecipeError(
                f"{side}: no document on this side of the split. Add text or change dataset.valid_share"
            )
    totals = {
        side: {key: sum(c[key] for c in sources.values()) for key in ("documents", "bytes", "tokens")}
        for side, sources in counts.items()
    }
    stage.figures = {"sources": counts, "totals": totals}
    stage.headline = (
        f"{totals['train']['tokens']:,} training tokens, {totals['valid']['tokens']:,} for validation"
    )


if __name__ == "__main__":
    run_stage(__file__, __doc__, main, (), ("02_dataset", "03_tokenizer"))
