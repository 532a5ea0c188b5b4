"""How fast a tokenizer trains, how well it compresses, and how much memory it needs.

It prints three tables. Each training runs in its own process, so that its memory can be measured:

1. ``training``: 10 MB and a vocabulary of 8,000. SentencePiece with its defaults, then ours, then ours with
   one setting changed back to show its effect, then the other kinds. Bytes per token are of held-out text.
2. ``memory``: the measured memory and the bound that stage 03 prints, also for a corpus of 1 GB that is made
   from the lines of the first.
3. ``encoding``: SentencePiece and the fast tokenizer.

Run (about 8 minutes, nothing else running):
.venv/bin/python tests/bench/tokenizer.py [outputs/tiny/02_dataset [training] [memory] [encoding]]
"""

import functools
import io
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "pretrain"))

TEN = 10_000_000
DEFAULTS = {"trainer": "SentencePiece defaults"}
TRAININGS = {
    "SentencePiece, defaults": DEFAULTS,
    "SentencePiece, defaults + split_digits": DEFAULTS | {"split_digits": True},
    "unigram (ours)": {},
    "unigram, lines not cut at 。": {"whole": True},
    "unigram, seed_sentencepiece_size 1,000,000": {"spm": {"seed_sentencepiece_size": 1_000_000}},
    "unigram, seed_sentencepiece_size 64,000": {"spm": {"seed_sentencepiece_size": 64_000}},
    "unigram, num_sub_iterations 2": {"spm": {"num_sub_iterations": 2}},
    "unigram, shrinking_factor 0.75": {"spm": {"shrinking_factor": 0.75}},
    "unigram, 2 threads": {"spm": {"num_threads": 2}},
    "unigram, max_sentence_length 4192": {"spm": {"max_sentence_length": 4192}},
    "unigram, self_test_sample_size 1,000": {"spm": {"self_test_sample_size": 1000}},
    "unigram, half the sample": {"bytes": TEN // 2},
    "unigram, a quarter of the sample": {"bytes": TEN // 4},
    "SentencePiece, defaults, bpe": DEFAULTS | {"model_type": "bpe"},
    "bpe (ours)": {"kind": "bpe"},
    "byte-level-bpe (ours)": {"kind": "byte-level-bpe"},
}


def train_one(job: dict) -> dict:
    """Train once in this process: seconds, peak memory, bytes per token of held-out text."""
    import sentencepiece as spm
    from recipe.corpus.shards import read_texts, side_sources
    from recipe.tokenization import train as training
    from recipe.tokenization.encode_text import encode_texts
    from recipe.tokenization.sample import draw_sample

    dataset = Path(job["dataset"])
    sample = functools.partial(draw_sample, dataset, {}, job.get("bytes", TEN), 0)
    if "trainer" in job:
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
            # Whole lines of the corpus, as a user would give them to SentencePiece.
            file.writelines(line + "\n" for line in whole_lines(dataset, job.get("bytes", TEN)))
            file.flush()
            model = io.BytesIO()
            options = {key: job[key] for key in ("split_digits", "model_type") if key in job}
            cpu, started = time.process_time(), time.perf_counter()
            spm.SentencePieceTrainer.train(
                input=file.name,
                model_writer=model,
                vocab_size=8000,
                byte_fallback=True,
                normalization_rule_name="identity",
                minloglevel=2,
                **options,
            )
            seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        encode = spm.SentencePieceProcessor(model_proto=model.getvalue()).encode
    else:
        if "spm" in job:
            spm.SentencePieceTrainer.train = functools.partial(
                _train_with, spm.SentencePieceTrainer.train, job["spm"]
            )
        config = {"kind": job.get("kind", "unigram"), "vocab_size": 8000, "seed": 0}
        if config["kind"] == "byte-level-bpe":
            config["unk_token"] = None
        cpu, started = time.process_time(), time.perf_counter()
        lines = whole_lines(dataset, TEN) if "whole" in job else sample().lines
        tokenizer = training.train_tokenizer(lines, config).tokenizer
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        encode = functools.partial(encode_texts, tokenizer)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    texts = [t for source in side_sources(dataset, "valid") for t in read_texts(dataset, "valid", source)]
    size = sum(len(text.encode()) for text in texts)
    tokens = sum(map(len, encode(texts))) if texts else 0
    return {
        "seconds": seconds,
        "cpu": cpu,
        "peak": peak,
        "bytes_per_token": size / max(1, tokens),
        "expected": training.expected_memory(
            {"kind": job.get("kind", "unigram"), "training_megabytes": job.get("bytes", TEN) / 1e6}
        ),
    }


def _train_with(train, options, **arguments):
    return train(**arguments | options)


def whole_lines(dataset: Path, most_bytes: int) -> list[str]:
    """Lines of the training side, drawn like the sample, but not cut."""
    from recipe.corpus.shards import document_bytes, read_texts

    draw, share = random.Random(0).random, most_bytes / document_bytes(dataset, "train")
    return [
        line for text in read_texts(dataset, "train") for line in text.split("\n") if line and draw() < share
    ]


def in_process(job: dict) -> dict:
    """Run `train_one` in a new process."""
    done = subprocess.run(
        [sys.executable, __file__, "--one", json.dumps(job)], check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def write_corpus(source: Path, folder: Path, size: int) -> None:
    """Write a training side of `size` bytes: documents of 50 lines that are drawn from a corpus."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from recipe.corpus.shards import read_texts

    lines = [line for text in read_texts(source, "train") for line in text.split("\n") if line]
    draw, written = random.Random(0), 0
    schema = pa.schema([("id", pa.string()), ("source", pa.string()), ("text", pa.string())])
    with pq.ParquetWriter(folder / "train-made-00000.parquet", schema, compression="zstd") as writer:
        while written < size:
            texts = ["\n".join(draw.choices(lines, k=50)) for _ in range(2000)]
            written += sum(len(text.encode()) for text in texts)
            empty = [""] * len(texts)
            writer.write_table(pa.table([empty, empty, texts], schema=schema))


def bench_training(dataset: Path) -> None:
    """Print the table of training."""
    print("| 10 MB, vocabulary 8,000 | seconds | x | CPU seconds | x | bytes/token | x | peak MiB |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|", flush=True)
    base = None
    for name, job in TRAININGS.items():
        row = in_process(job | {"dataset": str(dataset)})
        base = base or row
        print(
            f"| {name} | {row['seconds']:.1f} | {row['seconds'] / base['seconds']:.3f} | "
            f"{row['cpu']:.1f} | {row['cpu'] / base['cpu']:.3f} | "
            f"{row['bytes_per_token']:.4f} | {row['bytes_per_token'] / base['bytes_per_token']:.4f} | "
            f"{row['peak'] / 2**20:,.0f} |",
            flush=True,
        )


def bench_memory(dataset: Path) -> None:
    """Print the table of memory."""
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(dataset, Path(folder), 1_000_000_000)
        print("| kind | corpus MB | sample MB | seconds | peak MiB | bound by stage 03, MiB |")
        print("|---|---:|---:|---:|---:|---:|", flush=True)
        for kind in ("unigram", "bpe", "byte-level-bpe"):
            for where, corpus, megabytes in ((dataset, 25, 10), (folder, 1000, 10), (folder, 1000, 50)):
                row = in_process({"kind": kind, "dataset": str(where), "bytes": megabytes * 1_000_000})
                print(
                    f"| {kind} | {corpus:,} | {megabytes} | {row['seconds']:.1f} | "
                    f"{row['peak'] / 2**20:,.0f} | {row['expected'] / 2**20:,.0f} |",
                    flush=True,
                )


def bench_encoding(dataset: Path) -> None:
    """Print the table of encoding."""
    import sentencepiece as spm
    from recipe.corpus.shards import read_texts
    from recipe.tokenization import train as training
    from recipe.tokenization.encode_text import encode_texts
    from recipe.tokenization.sample import draw_sample

    trained = training.train_tokenizer(draw_sample(dataset, {}, TEN, 0).lines, {"vocab_size": 8000})
    processor = spm.SentencePieceProcessor(model_proto=trained.sentencepiece)
    texts = list(read_texts(dataset, "train"))
    size = sum(len(text.encode()) for text in texts)
    long_line = "".join(texts)[:400_000].replace("\n", "")
    print("| encoding, all cores | MB/s | a line of a megabyte, seconds |\n|---|---:|---:|")
    for name, encode in (
        ("SentencePiece", processor.encode),
        ("fast tokenizer", functools.partial(encode_texts, trained.tokenizer)),
    ):
        encode(texts[:100])
        started = time.perf_counter()
        encode(texts)
        middle = time.perf_counter()
        encode([long_line])
        end = time.perf_counter()
        print(f"| {name} | {size / 1e6 / (middle - started):.1f} | {end - middle:.2f} |", flush=True)


def main() -> None:
    dataset = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "outputs/tiny/02_dataset").resolve()
    tables = {"training": bench_training, "memory": bench_memory, "encoding": bench_encoding}
    for name in sys.argv[2:] or tables:
        tables[name](dataset)
        print()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(train_one(json.loads(sys.argv[2]))))
    else:
        main()
