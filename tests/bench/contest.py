"""The same text, the same time, the same score: our recipe against its peers, in bits per byte.

All train on one text (that of tiny as people write it: characters not cleaned, layout kept), in batches of
8 x 256 tokens, on the same cores, one after the other, in bf16, or in float32 where the CPU has no bf16
units. The steps of each are the seconds that all get, over its own seconds per step, which short runs of all
measure first; compiling, validation and saving do not count.
Then one function scores all: the bits that a model needs for a byte of the validation documents, all of them.
What is held out (LibreOffice's help) is neither trained on nor scored.

- ``ours``: the recipe tiny at the size asked for, with blocks of 64 tokens in the first 60 % of its steps.
  (The short run that measures its speed has blocks of 256, which take longer.) ``quarter``: the same in a
  quarter of the time.
- ``untied``, ``untied-quarter``: the same two with an output of its own, and embeddings at a rate of 0.3.
- ``adamw``: tiny without Muon, with a tuned AdamW (lr 3e-3, linear decay to zero), in blocks of 256.
- ``published-rates``: tiny with the rates of a published 300M Japanese Mistral, in blocks of 256.
- ``litgpt``: litgpt 0.5.13, a Llama of the same shape, its embeddings untied; its defaults (AdamW, lr 1e-3,
  cosine to 4e-5) but for the precision, the batch and 5 % warm-up; our tokenizer of 8,000 tokens. It reads
  blocks of documents laid end to end, in random order.
- ``nanochat``: Karpathy's nanochat at commit 92d63d4, as deep and as wide; its own tokenizer of 8,000 tokens.
  Its loader crops documents, and of so little text it shows a third; here it reads blocks as litgpt does.
  ``nanochat-stock``: with its own loader. ``nanochat-fast``: as `nanochat`, with four times its learning
  rates, which its own rule lowers to a sixteenth for batches of 2,048 tokens.

The peers run by ``--peers-python``, a Python with `litgpt` and `lightning`, and for nanochat `rustbpe`,
`tiktoken` and `wandb`; nanochat is a checkout. What is not there is named and left out. All run on the CPU.
Every result is a line of ``--results``, and the same command goes on with what is missing there. Two runs at
a time: ``taskset -c 0 …`` and ``taskset -c 1 …``, each with ``--cores 1`` and other names.

Run (about 7 minutes for each name and seed at 300 seconds, nothing else running):
    .venv/bin/python tests/bench/contest.py [ours litgpt …] [--size 8m] [--seconds 300] [--seed 1] [--cores 1]
        [--peers-python PEERS/bin/python] [--nanochat CHECKOUT]
    .venv/bin/python tests/bench/contest.py --table
"""

import argparse
import fcntl
import itertools
import json
import math
import os
import random
import re
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[2]
TEXT, TOKENIZER = (ROOT / "outputs/bench-contest" / stage for stage in ("02_dataset", "03_tokenizer"))
WORK = ROOT / "outputs/bench-contest-peers"
BLOCK, BATCH, VOCABULARY = 256, 8, 8000  # a step has 2,048 tokens, as in tiny
PROBE, COMPILED = 16, 3  # steps of the run that measures the speed; first steps of a run that do not count
LOGGED = 5  # steps of which our recipe logs the speed at once
# Width, layers, heads and key-value heads; 3m is tiny with a larger vocabulary. As in ledger.py.
SIZES = {"3m": (192, 4, 3, 1), "8m": (320, 5, 5, 1), "20m": (512, 5, 8, 4)}
SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")  # of SIZES
PUBLISHED = {"learning_rate": 6e-4, "adam_epsilon": 1e-4, "lr_scheduler_type": "cosine", "warmup_steps": 0.05}
TINY = json.loads((ROOT / "configs/tiny/pretrain.json").read_text())
SHORT_FIRST = TINY["phases"][0]["until_step"]  # the share of the steps with blocks of 64 tokens
UNTIED = {"embedding_learning_rate": 0.3}  # and in model.json an output of its own
RECIPES: dict[str, dict[str, Any]] = {  # changes in pretrain.json
    "ours": {},
    "quarter": {},
    "untied": UNTIED,
    "untied-quarter": UNTIED,
    "adamw": {"learning_rate": 3e-3, "muon_learning_rate": None},
    "published-rates": PUBLISHED | {"muon_learning_rate": None},
}
QUARTERS = {"quarter": "ours", "untied-quarter": "untied"}
PEERS = {"litgpt": "litgpt"} | dict.fromkeys(("nanochat", "nanochat-stock", "nanochat-fast"), "nanochat")
FAST = {"embedding-lr": 1.2, "unembedding-lr": 0.032, "matrix-lr": 0.08}  # four times its defaults
KINDS = dict.fromkeys(RECIPES, "recipe") | PEERS
MODULES = {"recipe": (), "litgpt": ("litgpt", "lightning"), "nanochat": ("rustbpe", "tiktoken", "wandb")}
Row = dict[str, Any]


def texts(side: str) -> list[str]:
    """The documents of a side, ``train`` or ``valid``, of the sources that are trained on."""
    import pyarrow.parquet as parquet

    trained = {path.name.split("-", 1)[1].rsplit("-", 1)[0] for path in TEXT.glob("train-*.parquet")}
    files = [path for name in sorted(trained) for path in sorted(TEXT.glob(f"{side}-{name}-*.parquet"))]
    return [text for path in files for text in parquet.read_table(path, columns=["text"])["text"].to_pylist()]


def blocks(documents: list[list[int]]) -> torch.Tensor:
    """Documents end to end, in rows [rows, BLOCK + 1] whose last token is the first of the next row."""
    return torch.tensor(list(itertools.chain.from_iterable(documents))).unfold(0, BLOCK + 1, BLOCK)


class Scored(NamedTuple):
    """What the score needs of a contestant."""

    encode: Callable[[str], list[int]]  # with the start token
    decode: Callable[[list[int]], str]
    logits: Callable[[torch.Tensor], torch.Tensor]  # of ids [batch, BLOCK]
    model: torch.nn.Module


@torch.inference_mode()
def score(scored: Scored) -> Row:
    """Bits per byte over all validation documents, each token predicted from at most 255 before it.

    A document is read in windows of BLOCK tokens that share one token, so that every token but the start
    token is predicted once. ``lost``: documents that the tokenizer does not give back.
    """
    documents = texts("valid")
    ids = [scored.encode(text) for text in documents]
    lost = sum(scored.decode(row[1:]) != text for row, text in zip(ids, documents, strict=True))
    windows = [torch.tensor(row[i : i + BLOCK]) for row in ids for i in range(0, len(row) - 1, BLOCK - 1)]
    nats = 0.0
    for batch in torch.nn.utils.rnn.pad_sequence(windows, batch_first=True, padding_value=-1).split(8):
        logits = scored.logits(batch.clamp(min=0))[:, :-1].float().flatten(0, 1)
        targets = batch[:, 1:].flatten()
        nats += torch.nn.functional.cross_entropy(logits, targets, ignore_index=-1, reduction="sum").item()
    size = sum(len(text.encode()) for text in documents)
    figures = {"bits_per_byte": nats / math.log(2) / size, "bytes": size, "lost": lost}
    figures["predicted"] = sum(len(row) - 1 for row in ids)
    return figures | {"parameters": sum(weight.numel() for weight in scored.model.parameters())}


def has_bf16() -> bool:
    """Whether this machine computes in bf16, and not in float32."""
    sys.path.insert(0, str(ROOT / "pretrain"))
    from recipe.hardware import detect

    return detect().fast_bf16


def autocast() -> torch.autocast:
    """The precision that a model was trained in."""
    return torch.autocast("cpu", torch.bfloat16, enabled=has_bf16())


def load_recipe(folder: Path) -> Scored:
    """A model of stage 05."""
    sys.path.insert(0, str(ROOT / "pretrain"))
    from recipe.tokenization.encode_text import prompt_ids
    from recipe.tokenization.save import load_tokenizer
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    logits = autocast()(lambda ids: model(input_ids=ids, use_cache=False).logits)
    return Scored(lambda text: prompt_ids(tokenizer, text), tokenizer.decode, logits, model)


def load_litgpt(folder: Path) -> Scored:
    """The final checkpoint of `litgpt pretrain`."""
    from litgpt import GPT, Config, Tokenizer

    tokenizer, model = Tokenizer(folder), GPT(Config.from_file(folder / "model_config.yaml")).eval()
    # Not only weights: the checkpoint, which this bench has written, holds the loader of the data as well.
    model.load_state_dict(torch.load(folder / "lit_model.pth", weights_only=False)["model"])
    logits = autocast()(model)
    encode, decode = tokenizer.encode, tokenizer.decode
    return Scored(
        lambda text: encode(text, bos=True).tolist(), lambda x: decode(torch.tensor(x)), logits, model
    )


def load_nanochat(folder: Path) -> Scored:
    """The last checkpoint in a folder of nanochat's; it computes in the precision of NANOCHAT_DTYPE."""
    sys.path.insert(0, os.environ["NANOCHAT"])
    from nanochat.checkpoint_manager import build_model, find_last_step

    model, tokenizer, _ = build_model(folder, find_last_step(folder), torch.device("cpu"), "eval")
    start = tokenizer.get_bos_token_id()
    return Scored(lambda text: tokenizer.encode(text, prepend=start), tokenizer.decode, model, model)


LOADERS = {"recipe": load_recipe, "litgpt": load_litgpt, "nanochat": load_nanochat}


def train_litgpt(plan: Row) -> None:
    """`litgpt pretrain` by its own function, on blocks of the text in random order. plan: of `train_peer`."""
    import litgpt.pretrain
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.data import DataModule
    from torch.utils.data import DataLoader

    class Documents(DataModule):
        def connect(self, tokenizer: Any = None, **_: Any) -> None:
            self.tokenizer = tokenizer

        def train_dataloader(self, side: str = "train") -> DataLoader:
            ids = [self.tokenizer.encode(text, bos=True).tolist() for text in texts(side)]
            return DataLoader(blocks(ids), batch_size=BATCH, shuffle=True, drop_last=True)

        def val_dataloader(self) -> DataLoader:
            return self.train_dataloader("valid")

    hidden, layers, heads, groups = SIZES[plan["size"]]
    shape = {"n_embd": hidden, "n_layer": layers, "n_head": heads, "n_query_groups": groups, "head_size": 64}
    shape |= {"intermediate_size": 3 * hidden, "block_size": BLOCK, "vocab_size": VOCABULARY}
    shape |= {"rotary_percentage": 1.0, "norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP"}
    shape |= {"parallel_residual": False, "bias": False, "padded_vocab_size": VOCABULARY}
    steps = plan["steps"]
    values = {"global_batch_size": BATCH, "micro_batch_size": BATCH, "max_tokens": steps * BATCH * BLOCK}
    values |= {"lr_warmup_steps": math.ceil(0.05 * steps), "save_interval": None}
    values |= {"max_norm": 1.0, "min_lr": 4e-5, "tie_embeddings": False}  # the defaults of `litgpt pretrain`
    litgpt.pretrain.save_hyperparameters = lambda *_: None  # it reads sys.argv as options of litgpt
    options = {"model_config": litgpt.pretrain.Config(name="contest", **shape), "train": TrainArgs(**values)}
    options |= {"eval": EvalArgs(interval=steps + 1, final_validation=False)}
    options |= {"precision": "bf16-mixed" if has_bf16() else "32-true"}
    options |= {"out_dir": Path(plan["folder"]).parent, "data": Documents(), "tokenizer_dir": TOKENIZER}
    litgpt.pretrain.setup("contest", logger_name="csv", seed=plan["seed"], **options)


def train_nanochat(plan: Row) -> None:
    """`python -m scripts.base_train` with a seed, and with a loader of ours if asked for."""
    sys.path.insert(0, os.environ["NANOCHAT"])
    from nanochat import dataloader

    def end_to_end(tokenizer: Any, size: int, *_: Any, **more: Any) -> Iterator[tuple]:
        start = tokenizer.get_bos_token_id()
        rows = blocks(tokenizer.encode(texts("train"), prepend=start, num_threads=1))
        for epoch in itertools.count(1):
            for batch in rows[torch.randperm(len(rows))][: len(rows) // size * size].split(size):
                inputs, targets = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
                yield inputs, targets, {"epoch": epoch, "pq_idx": 0, "rg_idx": 0}

    def reseed(_: int) -> Any:  # there is no option for its seed, 42
        torch.manual_seed = seed
        return seed(plan["seed"])

    if plan["name"] != "nanochat-stock":
        dataloader.tokenizing_distributed_data_loader_with_state_bos_bestfit = end_to_end
    seed, torch.manual_seed = torch.manual_seed, reseed
    width, depth, *_ = SIZES[plan["size"]]
    # Its width is depth x ratio, rounded up to heads of 64.
    options = {"depth": depth, "aspect-ratio": width // depth, "head-dim": 64}
    options |= {"window-pattern": "L", "max-seq-len": BLOCK}
    options |= {"device-batch-size": BATCH, "total-batch-size": BATCH * BLOCK, "device-type": "cpu"}
    options |= {"eval-every": -1, "core-metric-every": -1, "sample-every": -1}
    options |= {"num-iterations": plan["steps"], "model-tag": plan["folder"]}  # an absolute path
    options |= FAST if plan["name"] == "nanochat-fast" else {}
    sys.argv = ["base_train", *(f"--{key}={value}" for key, value in options.items())]
    runpy.run_module("scripts.base_train", run_name="__main__")


def call(command: list[str], log: Path, cwd: Path = ROOT) -> float:
    """Run a command whose output goes to a file; the seconds that it took."""
    begin = time.perf_counter()
    with log.open("w") as file:
        code = subprocess.run(command, cwd=cwd, stdout=file, stderr=file).returncode
    if code:
        sys.exit(f"{' '.join(command)[:200]}: exit code {code}. See {log}")
    return time.perf_counter() - begin


@contextmanager
def recipe(name: str, **changes: Row) -> Iterator[str]:
    """A copy of tiny with changes, whose text is as people write it, through stage 04; removed at the end."""
    folder = ROOT / "configs" / name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "configs/tiny", folder)
    try:
        text = {"layout": "keep", "clean_characters": False}
        for file, values in {"dataset": text, "tokenizer": {"vocab_size": VOCABULARY}, **changes}.items():
            path = folder / f"{file}.json"
            content = json.loads(path.read_text()) | values
            content.pop("neologdn", None)
            path.write_text(json.dumps(content, indent=2))
        call(["bash", "run_all.sh", "--recipe", name, "--to", "04"], WORK / f"{name}.log")
        yield name
    finally:
        shutil.rmtree(folder)


def prepare(options: argparse.Namespace) -> None:
    """The text for all, and for nanochat the same documents in random order, and its tokenizer."""
    import pyarrow
    import pyarrow.parquet as parquet

    WORK.mkdir(parents=True, exist_ok=True)
    with (WORK / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with recipe(TEXT.parent.name):
            pass
        base = Path(os.environ["NANOCHAT_BASE_DIR"])
        competes = any(KINDS[name] == "nanochat" for name in options.names)
        if not competes or (base / "tokenizer/token_bytes.pt").exists():
            return
        folder = base / "base_data_climbmix"
        folder.mkdir(parents=True, exist_ok=True)
        for number, side in enumerate(("train", "valid")):
            documents = texts(side)
            random.Random(options.seed).shuffle(documents)
            path = folder / f"shard_{number:05d}.parquet"
            parquet.write_table(pyarrow.table({"text": documents}), path, row_group_size=1000)
        command = [options.peers_python, "-m", "scripts.tok_train", f"--vocab-size={VOCABULARY}"]
        call(command, base / "tokenizer.log", Path(options.nanochat))


def train_recipe(name: str, tag: str, options: argparse.Namespace, steps: int) -> Row:
    """Train a copy of tiny by stage 05: see `train`."""
    model = dict(zip(SHAPE, SIZES[options.size], strict=True))
    model["intermediate_size"] = 3 * model["hidden_size"]
    model["tie_word_embeddings"] = "embedding_learning_rate" not in RECIPES[name]
    pretrain = {"max_steps": steps, "eval_steps": steps, "save_steps": steps, "eval_blocks": 8}
    pretrain |= {"logging_steps": LOGGED, "seed": options.seed} | RECIPES[name]
    change = round(SHORT_FIRST * steps)
    if steps <= PROBE or "muon_learning_rate" in RECIPES[name]:  # without Muon, as the rates were published
        change, pretrain["phases"] = 0, None
    with recipe(f"bench-contest-{tag}", model=model, pretrain=pretrain) as copy:
        whole = call(["bash", "pretrain/05_pretrain.sh", "--recipe", copy, "--force"], WORK / f"{tag}.log")
    folder = ROOT / "outputs" / copy / "05_pretrain"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    # Other blocks are compiled in the first step that has them.
    rows = [r for r in rows if "tokens_per_second" in r and not 0 <= r["step"] - 1 - change < LOGGED]
    times = [BATCH * BLOCK / row["tokens_per_second"] for row in rows]
    return {"folder": folder, "times": times, "whole": whole}


def train_peer(name: str, tag: str, options: argparse.Namespace, steps: int) -> Row:
    """Train a peer: see `train`."""
    folder, log = WORK / tag / "final", WORK / f"{tag}.log"
    shutil.rmtree(folder, ignore_errors=True)
    plan = {"name": name, "size": options.size, "seed": options.seed, "steps": steps, "folder": str(folder)}
    whole = call([options.peers_python, "-P", __file__, "--train", json.dumps(plan)], log)
    found = re.findall(r"(?:dt|iter time): ([\d.]+) ?ms", log.read_text())
    return {"folder": folder, "times": [float(text) / 1000 for text in found[COMPILED:]], "whole": whole}


def train(name: str, options: argparse.Namespace, steps: int) -> Row:
    """Train a contestant: where its model is, seconds of a step (median, mean) and of the whole command."""
    way = train_recipe if name in RECIPES else train_peer
    row = way(name, f"{name}-{options.size}-{options.seed}", options, steps)
    times = row.pop("times")
    row |= {"folder": str(row["folder"]), "steps": steps}
    return row | {"median_step": median(times), "mean_step": mean(times)}


def steps_of(name: str, options: argparse.Namespace) -> int:
    """The steps that fit into the contestant's time, by the median step of a short run."""
    program, share = QUARTERS.get(name, name), 0.25 if name in QUARTERS else 1
    key = {"probe": program, "size": options.size, "cores": options.cores}
    if not rows_with(options.results, key):
        append(options.results, key | train(program, options, PROBE))
    return round(options.seconds * share / rows_with(options.results, key)[-1]["median_step"])


def rows_with(results: Path, key: Row) -> list[Row]:
    """The lines of the results that hold these values."""
    lines = results.read_text().splitlines() if results.exists() else []
    return [row for row in map(json.loads, lines) if row.items() >= key.items()]


def append(results: Path, row: Row) -> None:
    """Add a line to the results."""
    with results.open("a") as file:
        print(json.dumps(row), file=file)


def key_of(name: str, options: argparse.Namespace) -> Row:
    """What tells the result of a contestant from others."""
    key = {"name": name, "size": options.size, "seed": options.seed}
    return key | {"budget": options.seconds, "cores": options.cores}


def compete(name: str, options: argparse.Namespace, steps: int) -> None:
    """Train a contestant and score it."""
    print(f"{name}: {steps} steps", file=sys.stderr, flush=True)
    row = key_of(name, options) | train(name, options, steps)
    python = sys.executable if name in RECIPES else options.peers_python
    log = WORK / f"{name}-{options.size}-{options.seed}-score.log"
    call([python, "-P", __file__, "--score", KINDS[name], row["folder"]], log)
    row |= json.loads(re.findall(r"^\{.*\}$", log.read_text(), re.MULTILINE)[-1])
    append(options.results, row | {"tokens": steps * BATCH * BLOCK, "seconds": steps * row["mean_step"]})
    print(f"{name}: {row['bits_per_byte']:.4f} bits/byte", file=sys.stderr, flush=True)


def missing(name: str, options: argparse.Namespace) -> str:
    """What a contestant lacks here, or nothing."""
    if KINDS[name] == "nanochat" and not Path(options.nanochat, "scripts/base_train.py").exists():
        return "a checkout of nanochat (--nanochat)"
    code = "import importlib.util as u, sys; print(*[m for m in sys.argv[1:] if not u.find_spec(m)])"
    command = [options.peers_python, "-c", code, *MODULES[KINDS[name]]]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def table(results: Path) -> None:
    """Print a table for each size, time and number of cores: the means of all seeds."""
    groups: dict[tuple, dict[str, list[Row]]] = {}
    for row in rows_with(results, {}):
        if "name" in row:
            group = groups.setdefault((row["size"], row["budget"], row["cores"]), {})
            group.setdefault(row["name"], []).append(row)
    for (size, budget, cores), group in groups.items():
        print(f"\n{size}, {budget:g} seconds, {cores} core{'s' * (cores > 1)}:\n")
        print("| contestant | seeds | parameters | tokens read | seconds of steps | seconds in all ", end="")
        print("| bits/byte | difference to ours |\n|---" + "|---:" * 7 + "|")
        own = group.get("ours") or group.get("untied") or []
        ours = mean([row["bits_per_byte"] for row in own] or [math.nan])
        for name in sorted(group, key=list(KINDS).index):
            rows, bits = group[name], [row["bits_per_byte"] for row in group[name]]
            cells = [name, str(len(rows))]
            for key in ("parameters", "tokens", "seconds", "whole"):
                cells.append(f"{mean(row[key] for row in rows):,.0f}")
            spread = f" ({min(bits):.4f} to {max(bits):.4f})" if len(bits) > 1 else ""
            cells += [f"{mean(bits):.4f}{spread}", f"{mean(bits) / ours - 1:+.1%}"]
            print("| " + " | ".join(cells) + " |")
            if lost := max(row["lost"] for row in rows):
                print(f"{name}: {lost} documents do not come back from its tokenizer", file=sys.stderr)


def main() -> None:
    """Let the contestants train and be scored, then print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = os.path.abspath
    parser.add_argument("names", nargs="*", help=f"default: {' '.join(KINDS)}")
    parser.add_argument("--size", choices=SIZES, default="3m")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--peers-python", type=here, default=sys.executable)
    parser.add_argument("--nanochat", type=here, default="", help="a checkout of nanochat")
    parser.add_argument("--results", type=Path, default=ROOT / "outputs/contest.jsonl")
    parser.add_argument("--table", action="store_true", help="only print the table")
    parser.add_argument("--score", nargs=2, metavar=("KIND", "FOLDER"), help="only that")
    parser.add_argument("--train", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.score:
        print(json.dumps(score(LOADERS[options.score[0]](Path(options.score[1])))))
        return
    if options.train:
        plan = json.loads(options.train)
        (train_litgpt if plan["name"] == "litgpt" else train_nanochat)(plan)
        return
    if unknown := {*options.names} - {*KINDS}:
        parser.error(f"no contestant {', '.join(unknown)}: {', '.join(KINDS)}")
    if not options.table:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
        os.environ |= {"OMP_NUM_THREADS": str(options.cores), "RECIPE_PYTHON": sys.executable}
        os.environ["NANOCHAT"] = options.nanochat
        os.environ["NANOCHAT_DTYPE"] = "bfloat16" if has_bf16() else "float32"
        os.environ["NANOCHAT_BASE_DIR"] = str(WORK / f"nanochat-{options.seed}")  # its text and tokenizer
        lacking = {name: missing(name, options) for name in options.names or KINDS}
        for name, what in lacking.items():
            if what:
                print(f"{name} is left out: {what} is missing", file=sys.stderr)
        options.names = [name for name, what in lacking.items() if not what]
        prepare(options)
        names = [name for name in options.names if not rows_with(options.results, key_of(name, options))]
        # All are timed before the first one trains: a machine may be slower an hour later.
        for name, steps in [(name, steps_of(name, options)) for name in names]:
            compete(name, options, steps)
    table(options.results)


if __name__ == "__main__":
    main()
