"""The ledger: what each choice of a recipe is worth in equal time, at three sizes.

Every row is the recipe tiny, at the size asked for, with one choice changed. All rows train on the same text
with one thread each, and are measured on the whole validation side, in bits per byte. Equal time: a row makes
as many steps as fit into the time of `STEPS` steps of tiny. For that its steps and those of tiny are timed in
turn in one process, with blocks of both lengths, so that a busy machine slows both. A row that changes only
numbers (`ONLY_NUMBERS`) makes the steps of tiny. Compiling is not counted.

The model, the packed blocks, the optimizers and the formula of the schedule are the project's own; the loop
is a plain one, because some rows change what no recipe can ask for (`CHOICES`). Results are appended to
`ledger.jsonl` next to this file, and a row that is there is not run again: empty the file when tiny changes.
The same row and seed gave the same bits on another day, so rows may be added later.

Run, after `bash run_all.sh --to 04` (at 3m about 4 minutes for each row and seed on one core, with other
vocabularies a minute more; two processes with other choices may share two cores):
    .venv/bin/python tests/bench/ledger.py --size 3m --seeds 1 2 3 [--core 0] [--choices NAME …]
    .venv/bin/python tests/bench/ledger.py --table
"""

import argparse
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "pretrain"))
TINY = {name: json.loads((ROOT / f"configs/tiny/{name}.json").read_text()) for name in ("model", "pretrain")}
RESULTS = Path(__file__).with_suffix(".jsonl")
# The layers and the width of each. The names are their millions of parameters with a vocabulary of 8,000.
SIZES = {"3m": (4, 192), "8m": (5, 320), "20m": (5, 512)}
STEPS = {"3m": 600, "8m": 150, "20m": 75}  # of tiny's choices, 2 to 4 minutes on one core
MODEL_KEYS = ("model_type", "sliding_window", "tie_word_embeddings", "initializer_range")
# Keys that do not change the work of a step, unless their value is None.
ONLY_NUMBERS = {"learning_rate", "muon_learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay"}
ONLY_NUMBERS |= {"momentum", "embedding_learning_rate", "initializer_range", "zero_projections", "by_width"}
ONLY_NUMBERS |= {"sources_weighted", "sources_in_order"}
SHORT_FIRST = TINY["pretrain"]["phases"][0]["until_step"]
RATE, MUON_RATE = TINY["pretrain"]["learning_rate"], TINY["pretrain"]["muon_learning_rate"]
UNTIED = {"tie_word_embeddings": False}
EMBEDDINGS = UNTIED | {"embedding_learning_rate": 0.3}
ADAMW = {"muon_learning_rate": None, "learning_rate": 3e-3}
# A row changes keys of pretrain.json or of model.json, the size of the vocabulary, or these. layers, width:
# factors of the size's. even_rows, jordan, momentum: of Muon (`recipe.model.muon`). zero_projections: the
# last matrix of attention and feed-forward starts at zero. by_width: the embeddings start at 1, the other
# matrices of the layers at 1 / the root of their inputs. average: decay of an average of the weights, which
# is measured in their place. short_first: the share of the steps that read blocks of a quarter of the
# length, at the beginning; as in tiny, where it is not given. sources_weighted: weights as in dataset.json.
# sources_in_order: one source after the other, each for its share of the tokens, in place of a mixture.
CHOICES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "a third wider": {"width": 4 / 3},
    "half of the layers": {"layers": 0.5},
    "layers x 1.5": {"layers": 1.5},
    "rows of Muon's updates not evened": {"even_rows": False},
    "rows of Muon's updates not evened, its rate x 1.5": {
        "even_rows": False,
        "muon_learning_rate": 1.5 * MUON_RATE,
    },
    "Muon's rate x 0.67": {"muon_learning_rate": 0.67 * MUON_RATE},
    "Muon's rate x 1.5": {"muon_learning_rate": 1.5 * MUON_RATE},
    "Muon's momentum 0.95": {"momentum": 0.95},
    "Muon's momentum 0.9": {"momentum": 0.9},
    "Muon's momentum 0.85": {"momentum": 0.85},
    "Muon's momentum 0.8": {"momentum": 0.8},
    "Muon's momentum 0.7": {"momentum": 0.7},
    "Muon by five iterations of Jordan et al.": {"jordan": True},
    "AdamW's rate x 0.5": {"learning_rate": 0.5 * RATE},
    "AdamW's rate x 2": {"learning_rate": 2.0 * RATE},
    "AdamW for all, 3e-3": ADAMW,
    "AdamW for all, 6e-4, eps 1e-4, cosine (published rates)": ADAMW
    | {"learning_rate": 6e-4, "adam_epsilon": 1e-4, "lr_scheduler_type": "cosine", "warmup_steps": 0.05},
    "cosine": {"lr_scheduler_type": "cosine"},
    "constant, then a decay in the last 40 %": {"lr_scheduler_type": "wsd"},
    "batch of 1,024 tokens": {"global_batch_size": 4},
    "batch of 4,096 tokens": {"global_batch_size": 16},
    "batch of 8,192 tokens": {"global_batch_size": 32},
    "all blocks of 256 tokens": {"short_first": 0.0},
    "blocks of 64 tokens in the first 30 %": {"short_first": 0.3},
    "blocks of 512 tokens": {"block_size": 512, "global_batch_size": 4},
    "vocabulary of 3,000": {"vocab_size": 3000},
    "vocabulary of 8,000": {"vocab_size": 8000},
    "vocabulary of 16,000": {"vocab_size": 16000},
    "an output of its own": UNTIED,
    "an output of its own, embeddings at 0.03": UNTIED | {"embedding_learning_rate": 0.03},
    "an output of its own, embeddings at 0.1": UNTIED | {"embedding_learning_rate": 0.1},
    "an output of its own, embeddings at 0.3": EMBEDDINGS,
    "an output of its own, embeddings at 1": UNTIED | {"embedding_learning_rate": 1.0},
    "embeddings at 0.3, Muon's momentum 0.95": EMBEDDINGS | {"momentum": 0.95},
    "embeddings at 0.3, layers start as the identity": EMBEDDINGS | {"zero_projections": True},
    "embeddings at 0.3, initial weights by width": EMBEDDINGS | {"by_width": True},
    "initial weights 0.01": {"initializer_range": 0.01},
    "initial weights 0.04": {"initializer_range": 0.04},
    "layers start as the identity": {"zero_projections": True},
    "a Mistral: queries and keys without a norm": {"model_type": "mistral", "sliding_window": None},
    "z-loss 1e-4": {"z_loss": 1e-4},
    "no weight decay": {"weight_decay": 0.0},
    "averaged weights, 0.99": {"average": 0.99},
    "sentences first, then descriptions, then manual pages": {
        "sources_in_order": ("tatoeba", "descriptions", "manpages")
    },
    "manual pages first, then descriptions, then sentences": {
        "sources_in_order": ("manpages", "descriptions", "tatoeba")
    },
    "manual pages half as often": {"sources_weighted": {"manpages": 0.5}},
    "sentences half as often": {"sources_weighted": {"tatoeba": 0.5}},
}


def shape(size: str, changes: dict[str, Any]) -> dict[str, Any]:
    """The model.json of a size with the changes of a choice."""
    layers, width = SIZES[size]
    layers, heads = round(layers * changes.get("layers", 1)), round(width * changes.get("width", 1) / 64)
    width = 64 * heads
    values = TINY["model"] | {"num_hidden_layers": layers, "hidden_size": width, "head_dim": 64}
    values |= {"intermediate_size": 3 * width, "num_attention_heads": heads}
    values |= {"num_key_value_heads": heads // 2 if heads % 2 == 0 else 1}
    return values | {key: changes[key] for key in MODEL_KEYS if key in changes}


@cache
def tokens_of(vocabulary: int | None) -> Path:
    """The outputs of tiny, or of a copy of it with another vocabulary, which stages 01 to 04 make."""
    if vocabulary is None:
        return ROOT / "outputs/tiny"
    folder = ROOT / f"configs/bench-vocabulary-{vocabulary}"
    shutil.copytree(ROOT / "configs/tiny", folder, dirs_exist_ok=True)
    try:
        tokenizer = json.loads((folder / "tokenizer.json").read_text()) | {"vocab_size": vocabulary}
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer, indent=2))
        command = ["bash", "run_all.sh", "--recipe", folder.name, "--to", "04"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
    finally:
        shutil.rmtree(folder)
    return ROOT / "outputs" / folder.name


def jordan(matrices: Any) -> Any:
    """Muon's updates as the project had them before: five iterations of Jordan et al., rows evened."""
    import torch
    from recipe.model.muon import even_rows, precision

    x = matrices.to(precision())
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return even_rows(x.mT if tall else x)


class Run:
    """A model in training by the choices of one row; `step` makes one step and can be timed."""

    def __init__(self, size: str, changes: dict[str, Any], seed: int, steps: int) -> None:
        import torch
        from recipe.hardware import detect
        from recipe.model.build import build_model
        from recipe.model.losses import return_loss_only
        from recipe.model.muon import even_rows, orthogonalise
        from recipe.tokenization.save import load_tokenizer

        self.changes, self.values, self.steps = changes, TINY["pretrain"] | changes, steps
        self.short_first = changes.get("short_first", SHORT_FIRST)
        self.muon = {
            "even_rows": even_rows if changes.get("even_rows", True) else lambda matrices: matrices,
            "orthogonalise": jordan if changes.get("jordan") else orthogonalise,
        }
        outputs = tokens_of(changes.get("vocab_size"))
        self.tokens = outputs / "04_tokenize"
        tokenizer = load_tokenizer(outputs / "03_tokenizer")
        self.pad = tokenizer.pad_token_id
        self.model = build_model(shape(size, changes), tokenizer, "documents", seed)
        if changes.get("zero_projections"):
            for name, parameter in self.model.named_parameters():
                if "o_proj" in name or "down_proj" in name:
                    torch.nn.init.zeros_(parameter)
        if changes.get("by_width"):
            for name, parameter in self.model.named_parameters():
                if "embed_tokens" in name:
                    torch.nn.init.normal_(parameter)
                elif ".layers." in name and parameter.ndim == 2 and not re.search("o_proj|down_proj", name):
                    torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        return_loss_only(self.model, self.values.get("z_loss", 0.0))
        self.autocast = torch.autocast("cpu", torch.bfloat16, enabled=detect().fast_bf16)
        self.compiled = torch.compile(self.model.train(), dynamic=False)
        self.optimizer = self.build_optimizer()
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.average = [p.detach().clone() for p in self.model.parameters()] if "average" in changes else None
        figures = json.loads((self.tokens / "stage.json").read_text())["figures"]
        self.valid_totals, train_counts = figures["totals"]["valid"], figures["sources"]["train"]
        self.parts = list(self.build_parts(train_counts, seed))

    def build_parts(self, counts: dict[str, dict[str, int]], seed: int) -> Iterator[tuple[float, Any, Any]]:
        """The parts of the training: up to which share of the steps, its blocks, its short blocks."""
        from recipe.tokenization.packing import PackedBlocks, weighted_sources
        from recipe.tokenization.token_files import TokenFile

        batch, block = self.values["global_batch_size"], self.values["block_size"]
        train, needed = TokenFile(self.tokens / "train"), (self.steps + 50) * batch
        weights = self.changes.get("sources_weighted", {})
        all_sources = {name: {"weight": weights.get(name, 1)} for name in counts}
        order = self.changes.get("sources_in_order")
        end, total = 0.0, sum(count["tokens"] for count in counts.values())
        for names in [[name] for name in order] if order else [list(counts)]:
            end += sum(counts[name]["tokens"] for name in names) / total
            chosen = {name: all_sources[name] | ({} if name in names else {"weight": 0}) for name in counts}
            sources = weighted_sources(counts, chosen)
            yield (
                end,
                PackedBlocks(train, block, self.pad, seed, needed, sources),
                PackedBlocks(train, block // 4, self.pad, seed + 1, 4 * needed, sources),
            )

    def build_optimizer(self) -> Any:
        """MuonAdamW or AdamW of the project."""
        import torch
        from recipe.model.optimizers import MuonAdamW, decayed

        values = self.values
        betas, epsilon = (0.9, values["adam_beta2"]), values.get("adam_epsilon", 1e-8)
        decay = values["weight_decay"]
        if values["muon_learning_rate"] is None:
            names = set(decayed(self.model))
            split = {True: [], False: []}
            for name, parameter in self.model.named_parameters():
                split[name in names].append(parameter)
            groups = [{"params": split[kind], "weight_decay": decay * kind} for kind in (True, False)]
            return torch.optim.AdamW(groups, lr=values["learning_rate"], betas=betas, eps=epsilon, fused=True)
        muon_rate, rate = values["muon_learning_rate"], values["learning_rate"]
        embedding_rate = values.get("embedding_learning_rate")
        return MuonAdamW(self.model, muon_rate, rate, betas, epsilon, decay, embedding_rate)

    def factor(self, step: int) -> float:
        """The share of the peak rate at a step, by the formula that stage 05 checks."""
        from recipe.config.schedules import SCHEDULES

        kind, options = self.values["lr_scheduler_type"], {}
        if kind == "wsd":
            kind, options = "warmup_stable_decay", {"num_decay_steps": round(0.4 * self.steps)}
        warmup = math.ceil(self.values["warmup_steps"] * self.steps)
        return SCHEDULES[kind].formula(options, step + 1, warmup, self.steps)

    def batch(self, step: int) -> dict[str, Any]:
        """The packed blocks of a step."""
        from recipe.tokenization.packing import collate

        size = self.values["global_batch_size"]
        blocks, short = next(part for end, *part in self.parts if step < end * self.steps + 0.5)
        if step < self.short_first * self.steps:
            size, blocks = 4 * size, short
        return collate([blocks[step * size + row] for row in range(size)])

    def loss(self, batch: dict[str, Any]) -> Any:
        """The loss of a batch."""
        with self.autocast:
            return self.compiled(**batch, use_cache=False)["loss"]

    def step(self, number: int) -> None:
        """One optimizer step."""
        import torch

        self.loss(self.batch(number)).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.values["max_grad_norm"])
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * self.factor(number)
        if momentum := self.changes.get("momentum"):  # in place of one that rises
            self.optimizer.param_groups[0]["momentum"] = momentum
        with patch.multiple("recipe.model.muon", **self.muon):
            self.optimizer.step()
        self.model.zero_grad()
        if self.average is not None:
            warm = min(self.changes["average"], number / (number + 10))
            torch._foreach_lerp_(self.average, list(self.model.parameters()), 1 - warm)

    def bits_per_byte(self) -> float:
        """Bits per byte of the whole validation side, by the weights or by their average."""
        import torch
        from recipe.tokenization.packing import IGNORED, PackedBlocks, collate
        from recipe.tokenization.token_files import TokenFile

        if self.average is not None:
            with torch.no_grad():
                torch._foreach_copy_(list(self.model.parameters()), self.average)
        valid = PackedBlocks(TokenFile(self.tokens / "valid"), 256, self.pad, seed=0)
        totals = self.valid_totals
        self.model.eval()
        nats = count = 0.0
        with torch.no_grad(), self.autocast:
            for first in range(0, len(valid), 16):
                batch = collate([valid[i] for i in range(first, min(first + 16, len(valid)))])
                tokens = int((batch["labels"] != IGNORED).sum())
                nats += float(self.model(**batch, use_cache=False)["loss"]) * tokens
                count += tokens
        bytes_per_token = totals["bytes"] / (totals["tokens"] - totals["documents"])
        return nats / count / bytes_per_token / math.log(2)


def relative_time(make: Callable[[dict[str, Any]], Run], changes: dict[str, Any]) -> float:
    """The seconds of a step of a choice divided by those of tiny's: the means of the steps of a whole run.

    Of the first and of the last steps, whose blocks have other lengths, seven of both are timed in turn.
    """
    both = [make({}), make(changes)]
    means = [0.0, 0.0]
    for first, share in (
        (0, lambda run: run.short_first),
        (both[0].steps - 9, lambda run: 1 - run.short_first),
    ):
        seconds: list[list[float]] = [[], []]
        for number in range(first, first + 9):
            for run, found in zip(both, seconds, strict=True):
                start = time.perf_counter()
                run.step(number)
                found.append(time.perf_counter() - start)
        for which, run in enumerate(both):
            means[which] += share(run) * statistics.median(seconds[which][2:])  # the first ones compile
    return means[1] / means[0]


def measure(size: str, name: str, seed: int, steps: int, ratio: float) -> dict[str, Any]:
    """Train a row and measure it."""
    run = Run(size, CHOICES[name], seed, round(steps / ratio))
    start = time.perf_counter()
    for number in range(run.steps):
        run.step(number)
        if number % 50 == 49:
            seconds = (time.perf_counter() - start) / (number + 1) * (run.steps - number - 1)
            print(
                f"\r{size} {name}: {number + 1}/{run.steps}, {seconds:.0f} s left ", end="", file=sys.stderr
            )
    print(file=sys.stderr)
    bits = run.bits_per_byte()
    row = {"size": size, "choice": name, "seed": seed, "of": steps, "steps": run.steps, "time": ratio}
    return row | {"seconds": time.perf_counter() - start, "bits_per_byte": bits}


def read_results(path: Path) -> list[dict[str, Any]]:
    """The rows of a results file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """A Markdown table: for each size the mean of the seeds, with the least and the most, against tiny."""
    sizes = [size for size in SIZES if any(row["size"] == size for row in rows)]
    yield "| choice | " + " | ".join(f"{size}: bits/byte | against `tiny` | step" for size in sizes) + " |"
    yield "|---" + "|---|---:|---:" * len(sizes) + "|"
    for name in CHOICES:
        cells = [name]
        for size in sizes:
            found = {r["seed"]: r for r in rows if (r["size"], r["choice"]) == (size, name)}
            tiny = {r["seed"]: r for r in rows if (r["size"], r["choice"]) == (size, "tiny")}
            bits = [row["bits_per_byte"] for row in found.values()]
            pairs = [found[s]["bits_per_byte"] / tiny[s]["bits_per_byte"] - 1 for s in found if s in tiny]
            if not pairs:
                cells += [""] * 3
                continue
            spread = f" ({min(bits):.4f} to {max(bits):.4f})" if len(bits) > 1 else ""
            times = statistics.mean(row["time"] for row in found.values())
            against = statistics.mean(pairs)
            cells += [f"{statistics.mean(bits):.4f}{spread}", f"{against:+.1%}", f"{times:.2f}"]
        if any(cells[1:]):
            yield "| " + " | ".join(cells) + " |"


def main() -> None:
    """Run the rows that are asked for and not there yet, or print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="3m")
    parser.add_argument("--choices", nargs="+", choices=CHOICES, default=list(CHOICES), metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--steps", type=int, help="of the row tiny; by default those of STEPS")
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print the results and run nothing")
    arguments = parser.parse_args()
    if arguments.table:
        print(*table(read_results(arguments.results)), sep="\n")
        return
    steps = arguments.steps or STEPS[arguments.size]
    os.sched_setaffinity(0, {arguments.core})
    os.environ |= {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": str(ROOT / "data/.torchinductor")}
    import torch
    from recipe.hardware import initialise_vector_math

    torch.set_num_threads(1)
    initialise_vector_math()
    done = {(r["size"], r["choice"], r["seed"], r["of"]) for r in read_results(arguments.results)}
    for name in arguments.choices:
        seeds = [s for s in arguments.seeds if (arguments.size, name, s, steps) not in done]
        if not seeds:
            continue
        ratio = 1.0
        if not all(key in ONLY_NUMBERS and value is not None for key, value in CHOICES[name].items()):
            ratio = relative_time(lambda changes: Run(arguments.size, changes, 0, 100), CHOICES[name])
        for seed in seeds:
            torch._dynamo.reset()
            row = measure(arguments.size, name, seed, steps, ratio)
            print(f"{row['bits_per_byte']:.4f} {row}", file=sys.stderr, flush=True)
            with arguments.results.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
