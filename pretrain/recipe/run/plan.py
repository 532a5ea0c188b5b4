"""Which model to train in the hours that you have: a table of what fits, and a recipe of the row you take.

``.venv/bin/python -m recipe.run.plan --hours 3`` prints a row for each size of model: the tokens that the
hours allow, the micro-batch, the expected loss. Memory and FLOPs are those of the preflight. Nothing is
measured here, and torch is not imported.

The rules, each with its source:

- **Shapes**: Qwen3 with 64 of width, one head and half a key-value head per layer, an intermediate size of
  three times the width, and tied embeddings. `tiny`, for minutes on a CPU, is narrower: 4 layers of 192.
  Within wide limits, the ratio of width to depth matters little (Kaplan et al., 2020).
- **Experts**: with ``--experts N`` the feed-forward part of each layer becomes N experts of half its width,
  of which a token uses 2: as many active parameters and FLOPs. The rules below count the active ones. They
  were found with dense models: a mixture may reach a lower loss. The auxiliary loss has Switch's 0.01 (Fedus
  et al., 2022).
- **Tokens**: 20 for each parameter are compute-optimal (Hoffmann et al., 2022). Less is a model that is too
  large for its hours. More is a smaller model that is trained on: it costs little (twice as many tokens at
  equal FLOPs: about 0.03 in the loss by that law) and is cheaper to use.
- **Repeats**: up to 4 epochs are nearly as good as new text (Muennighoff et al., 2023); more are not planned.
- **Batch and rate**: 0.58 D^0.571 tokens in a step, and a rate of 1.79 N^-0.713 D^0.307, for AdamW with N
  parameters outside the embeddings and D tokens (Li et al., 2025, "Step Law"; 0.06 to 1e9 parameters). For
  `tiny` they give 2,329 and 5.6e-3; it has 2,048 and 9e-3, next to Muon (tests/bench/ledger.md).
- **Muon** for the matrices of the layers, with the rate of `tiny` (`MUON_RATE`): its updates have the same
  size at every width, and at four sizes no other optimizer or schedule was worth as much
  (tests/bench/ledger.md). By the rule of nanochat, 0.02 for steps of 2^19 tokens times the root of the batch,
  2^16 tokens have 0.007, too. Its work, about 3 % of such a step, is not counted.
- **Loss**: the law of Kaplan et al. (2020), fitted to English web text in 50,257 tokens, times 0.84 to 1.36.
  These are the factors of the two trainings whose results are known here (`LOSS_FACTORS`). Other text and
  other tokenizers give other losses: compare bits per byte, not losses.
"""

from __future__ import annotations

import argparse
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from recipe import host
from recipe.config.recipe import FILES, OPTIONAL_FILES, load_recipe, recipes
from recipe.config.training import REPEATS
from recipe.corpus.splitting import VALID_SHARE
from recipe.endings import errors_in_one_line
from recipe.project import (
    CONFIGS,
    LONGEST_NAME,
    Refused,
    is_finished,
    nearest,
    read_record,
    stage_folder,
    write_json,
)
from recipe.run import fitting, preflight
from recipe.run.cards import CARDS, Card, card, seen_card
from recipe.run.fitting import CHECKPOINTING, GIB, USABLE, Device
from recipe.run.launch_options import Launch
from recipe.run.memory import Setting, Shape, memory, shape_of

# The recipe that gives the other files where --corpus is a size.
BASE = "small"
LAYERS = (4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32)
WIDTH_PER_LAYER = 64
POSITIONS = 2048
EXPERTS_OF_TOKEN = 2
# Tokens per parameter: compute-optimal (Hoffmann et al., 2022), and the fewest that are planned.
OPTIMAL, FEWEST = 20, 0.5
LONGEST = 100
MUON_RATE = 0.007
EPOCHS = REPEATS["pretrain"][0]
# Kaplan et al. (2020), section 4: nats per token from parameters outside the embeddings and tokens.
KAPLAN = {"N": 6.4e13, "D": 1.8e13, "alpha_N": 0.076, "alpha_D": 0.103}
# Measured losses divided by the law's: `tiny` with a vocabulary of 8,000 (4.1498 after 3.7e6 tokens; manual
# pages and short sentences are easy), and the published loss of japanese-mistral-300m (3.5582 after
# 10.7e9 tokens of Wikipedia and CC-100).
LOSS_FACTORS = (0.84, 1.36)
# Bytes for each token by the size of the vocabulary, measured by stage 03 on the held-out text of `tiny`
# (4,000: README.md; 8,000: --set tokenizer.vocab_size=8000; 32,000: --set tokenizer.kind=bpe --set
# tokenizer.vocab_size=32000 --set tokenizer.training_megabytes=28).
BYTES_PER_TOKEN = {4_000: 3.97, 8_000: 4.81, 32_000: 5.97}
# What a step really took, divided by what is computed for it: 11 % more on an H200 (README.md).
MEMORY_MARGIN = 1.11
UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


def model_of(layers: int, experts: int = 0) -> dict[str, Any]:
    """The model.json of a model with so many layers (an even number). experts: in each, 0 if it is dense."""
    width = WIDTH_PER_LAYER * layers
    mixture = {
        "model_type": "qwen3_moe",
        "num_experts": experts,
        "num_experts_per_tok": EXPERTS_OF_TOKEN,
        "moe_intermediate_size": 3 * width // EXPERTS_OF_TOKEN,
        "norm_topk_prob": True,
        "router_aux_loss_coef": 0.01,
    }
    return {
        "model_type": "qwen3",
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": layers,
        "num_key_value_heads": layers // 2,
        "head_dim": WIDTH_PER_LAYER,
        "max_position_embeddings": POSITIONS,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": True,
    } | (mixture if experts else {})


def learning_rate(parameters: float, tokens: float) -> float:
    """AdamW's peak rate by Step Law, two digits. parameters: those outside the embeddings.

    More tokens than `LONGEST` for each parameter raise it no further: the law was not fitted to such
    trainings.
    """
    return float(f"{1.79 * parameters**-0.713 * min(tokens, LONGEST * parameters) ** 0.307:.1e}")


def batch_size(tokens: float, block: int, ranks: int) -> int:
    """Sequences in a step by Step Law: for each rank, the power of two that is nearest."""
    sequences = 0.58 * tokens**0.571 / block / ranks
    return ranks * 2 ** max(0, round(math.log2(sequences)))


def tuning_batch(values: dict[str, Any], ranks: int, micro: int) -> dict[str, int]:
    """The batch of finetune.json; if it does not divide among the ranks, the nearest power of two for each.

    values: of finetune.json. micro: the most sequences that fit into the memory of a rank.
    """
    whole, micro = values["global_batch_size"], min(values["per_device_train_batch_size"], micro)
    if whole % (ranks * micro) == 0:
        return {"per_device_train_batch_size": micro}
    each = 2 ** max(0, round(math.log2(whole / ranks)))
    return {
        "global_batch_size": ranks * each,
        "per_device_train_batch_size": 2 ** int(math.log2(min(each, micro))),
    }


def expected_loss(parameters: float, tokens: float) -> tuple[float, float]:
    """The range of the loss in nats per token. parameters: those outside the embeddings."""
    law = (KAPLAN["N"] / parameters) ** (KAPLAN["alpha_N"] / KAPLAN["alpha_D"]) + KAPLAN["D"] / tokens
    loss = law ** KAPLAN["alpha_D"]
    return loss * LOSS_FACTORS[0], loss * LOSS_FACTORS[1]


# ---------------------------------------------------------------------------------------- machine and corpus


@dataclass(frozen=True)
class Machine:
    """What trains. free: bytes for each rank. rate: FLOP/s of all ranks, and origin: where it is from."""

    device: Device
    launch: Launch
    free: float
    rate: float
    origin: str


def machine_of(gpu: str | None, gpus: int | None) -> Machine:
    """The machine that a user names, or this one. Raises Refused for a GPU whose speed is not known."""
    if gpu is not None:
        named, launch = card(gpu), Launch(processes=gpus or 1)
        kind = "cuda" if named.capability > (0, 0) else "cpu"
        if kind == "cpu" and launch.processes > 1:
            raise Refused(f"--gpus {gpus}: --gpu {gpu} is no GPU. Leave one of the two out")
        device = Device(named.name, named.gigabytes, named.flops, named.bf16 or kind == "cpu", kind)
        rate, origin = named.rate()
        return Machine(device, launch, named.gigabytes * GIB * USABLE, rate * launch.ranks, origin)
    launch = Launch(processes=gpus or max(1, len(fitting.gpus())))
    device, free = fitting.this_machine(launch)
    if device.kind == "cpu" and gpus is not None:
        raise Refused(f"--gpus {gpus}: this machine has no GPU. Name a card, such as --gpu rtx4090")
    if math.isinf(free):
        raise Refused(
            f"{device.name}: how much memory a part of a GPU has is not known. Name a card: --gpu NAME"
        )
    if measured := preflight.measured_rate("", device, launch.ranks):
        return Machine(device, launch, free, *measured)
    if device.kind == "cpu":
        cores = host.threads()
        rate, origin = CARDS["cpu"].rate()
        return Machine(device, launch, free, rate * cores / 2, f"{origin}, for {cores} cores")
    known: Card | None = seen_card(device.name, device.gigabytes)
    if known is None:
        raise Refused(
            f"{device.name}: its speed is not known. Name a similar card (--gpu {', '.join(CARDS)}), or "
            "measure: `bash run_all.sh --to 04`, then `bash pretrain/05_pretrain.sh --probe`"
        )
    rate, origin = known.rate()
    return Machine(device, launch, free, rate * launch.ranks, origin)


@dataclass(frozen=True)
class Corpus:
    """The text. base: the recipe that the other files come from. tokens: of one epoch, None if unknown."""

    base: str
    config: dict[str, dict[str, Any]]
    vocabulary: int
    tokens: float | None
    origin: str


def corpus_of(text: str, default: str) -> Corpus:
    """The corpus that a user names: a size such as ``2GB``, or a recipe. Raises Refused."""
    size = re.fullmatch(r"(\d*\.?\d+)\s*([KMGT]?)B", text, re.I)
    base = default if size else text
    if base not in recipes():
        raise Refused(
            f"--corpus {text}: expected a size, such as 2GB, or a recipe.{nearest(text, recipes())} Known: "
            f"{', '.join(recipes())}"
        )
    if size and not float(size[1]):
        raise Refused(f"--corpus {text}: expected more than 0")
    config = load_recipe(base)
    vocabulary, _ = preflight.vocabulary_of(base, config)
    counted = preflight.training_tokens(base, config["dataset"])
    if counted and not size:
        return Corpus(base, config, vocabulary, counted, f"counted by stage 04 of {base}")
    per_token, where = bytes_per_token(base, vocabulary)
    sources = [one for one in config["dataset"]["sources"].values() if not one.get("held_out")]
    if size:
        total = float(size[1]) * UNITS[size[2].upper()]
    elif all("maximum_megabytes" in one for one in sources):
        total = sum(one["maximum_megabytes"] for one in sources) * 1e6
    else:
        return Corpus(base, config, vocabulary, None, f"size unknown before stage 04 of {base}: not limited")
    train = total * (1 - config["dataset"].get("valid_share", VALID_SHARE))
    return Corpus(
        base,
        config,
        vocabulary,
        train / per_token,
        f"{total / 1e9:.3g} GB, {per_token} bytes/token ({where})",
    )


def bytes_per_token(recipe: str, vocabulary: int) -> tuple[float, str]:
    """Bytes of text for each token, and where the figure comes from."""
    folder = stage_folder(recipe, "04_tokenize")
    if is_finished(folder):
        totals = read_record(folder, "figures")["figures"]["totals"]["train"]
        return round(totals["bytes"] / totals["tokens"], 2), f"measured, {recipe}"
    near = min(BYTES_PER_TOKEN, key=lambda size: abs(math.log(size / vocabulary)))
    return BYTES_PER_TOKEN[near], f"measured for {near:,} tokens on the text of tiny"


# -------------------------------------------------------------------------------------------------- the plan


@dataclass(frozen=True)
class Plan:
    """A row.

    values: its pretrain.json. peak: computed bytes per device. missing: why it cannot be taken. experts: of
    each layer, 0 for a dense model.
    """

    layers: int
    shape: Shape
    values: dict[str, Any]
    setting: Setting
    peak: float
    tokens: int
    seconds: float
    missing: str = ""
    experts: int = 0

    @property
    def per_parameter(self) -> float:
        """Tokens for each active parameter."""
        return self.tokens / self.shape.active_parameters


def plan(layers: int, hours: float, machine: Machine, corpus: Corpus, experts: int = 0) -> Plan:
    """The row for a model with so many layers. experts: of each layer, 0 for a dense model."""
    shape = shape_of(model_of(layers, experts), corpus.vocabulary)
    block = corpus.config["pretrain"]["block_size"]
    per_token = shape.flops_per_token(block)
    most = EPOCHS * corpus.tokens if corpus.tokens else math.inf
    values, setting, peak = settle(shape, min(hours * 3600 * machine.rate / per_token, most), block, machine)
    if setting.checkpointing:
        per_token *= CHECKPOINTING
    step = values["global_batch_size"] * block
    tokens = min(hours * 3600 * machine.rate / per_token, most)
    steps = max(1, int(tokens / step))
    values |= {
        "max_steps": steps,
        "eval_steps": max(1, steps // 5),
        "save_steps": max(1, steps // 20),
        "learning_rate": learning_rate(shape.active, tokens),
    }
    missing = ""
    if peak * MEMORY_MARGIN > machine.free:
        missing = f"needs {peak * MEMORY_MARGIN / GIB:.2f} GiB, {machine.free / GIB:.2f} can be used"
    elif most < FEWEST * shape.active_parameters:
        need = FEWEST * shape.active_parameters / EPOCHS / corpus.tokens
        missing = f"the corpus is too small: {need:.3g} times as much is needed"
    elif tokens < FEWEST * shape.active_parameters:
        need = FEWEST * shape.active_parameters * per_token / machine.rate / 3600
        missing = f"needs {math.ceil(need * 100) / 100:.2f} hours"
    seconds = steps * step * per_token / machine.rate
    return Plan(layers, shape, values, setting, peak, steps * step, seconds, missing, experts)


def settle(
    shape: Shape, tokens: float, block: int, machine: Machine
) -> tuple[dict[str, Any], Setting, float]:
    """The values of pretrain.json, the setting and its bytes: the largest micro-batch that fits.

    Activations are checkpointed only where one sequence at a time does not fit.
    """
    ranks = machine.launch.ranks
    batch = batch_size(tokens, block, ranks)
    for checkpointing in (False, True):
        micro = min(batch // ranks, 64)
        while micro:
            values = {
                "block_size": block,
                "global_batch_size": batch,
                "per_device_train_batch_size": micro,
                "activation_checkpointing": checkpointing,
                "muon_learning_rate": MUON_RATE,
            }
            setting = fitting.setting_of(values, machine.device, machine.launch)
            peak = memory(shape, setting)["peak"]
            if peak * MEMORY_MARGIN <= machine.free:
                return values, setting, peak
            micro //= 2
    return values, setting, peak


def plans(hours: float, machine: Machine, corpus: Corpus, experts: int = 0) -> list[Plan]:
    """All rows. Raises Refused when none can be taken; the message names the nearest one that could be."""
    rows = [plan(layers, hours, machine, corpus, experts) for layers in LAYERS]
    if all(row.missing for row in rows):
        smallest = rows[0]
        raise Refused(
            f"nothing fits: the smallest model, {smallest.layers} layers with "
            f"{smallest.shape.parameters:,} parameters, {smallest.missing}. Give more --hours or a --gpu. "
            "The recipe tiny trains in minutes on a CPU"
        )
    return rows


def best(rows: list[Plan]) -> Plan:
    """The row whose tokens per parameter are nearest to compute-optimal, as a ratio."""
    return min(
        (row for row in rows if not row.missing), key=lambda row: abs(math.log(row.per_parameter / OPTIMAL))
    )


def chosen(rows: list[Plan], layers: int | None) -> Plan:
    """The row with so many layers, or the best one. Raises Refused, naming the nearest row that fits."""
    if layers is None:
        return best(rows)
    fitting = [row for row in rows if not row.missing]
    for row in rows:
        if row.layers == layers and not row.missing:
            return row
    near = min(fitting, key=lambda row: abs(row.layers - layers))
    why = next((row.missing for row in rows if row.layers == layers), f"the table has {LAYERS}")
    raise Refused(f"--layers {layers}: {why}. The nearest that fits: --layers {near.layers}")


def report(rows: list[Plan], machine: Machine, corpus: Corpus) -> Iterator[str]:
    """The lines of the table."""
    ranks = machine.launch.ranks
    yield (
        f"machine   {ranks} x {machine.device.name}, {machine.free / GIB:.1f} GiB usable; "
        f"{machine.rate / 1e12:.3g} TFLOP/s in training ({machine.origin})"
    )
    tokens = f"{corpus.tokens:.3g} tokens; " if corpus.tokens else ""
    yield f"corpus    {tokens}{corpus.origin}; at most {EPOCHS} epochs. Vocabulary {corpus.vocabulary:,}"
    mixture = bool(rows[0].shape.experts_of_token)
    head = f"          layers  parameters{'  active' if mixture else ''}"
    yield f"{head}  tokens  per param.  epochs  batch x accum.   GiB  hours  loss"
    star = best(rows)
    for row in rows:
        head = f"{'-> ' if row is star else '':>10}{row.layers:>6}  {row.shape.parameters:>10.3g}"
        head += f"  {row.shape.active_parameters:>6.2g}" if mixture else ""
        if row.missing:
            yield f"{head}  {row.missing}"
            continue
        epochs = f"{row.tokens / corpus.tokens:.2f}" if corpus.tokens else "?"
        again = " checkpointing" if row.setting.checkpointing else ""
        low, high = expected_loss(row.shape.active, row.tokens)
        micro = f"{row.setting.micro_batch} x {row.setting.accumulation}"
        yield (
            f"{head}  {row.tokens:>6.2g}  {row.per_parameter:>10.1f}  {epochs:>6}  {micro:>14}  "
            f"{row.peak / GIB:>4.1f}  {row.seconds / 3600:>5.2f}  {low:.2f} to {high:.2f}{again}"
        )
    yield (
        f"->        nearest to {OPTIMAL} tokens per {'active ' if mixture else ''}parameter (Hoffmann et "
        "al., 2022). Hours: of stage 05, without evaluation and compiling"
    )
    yield (
        "          GiB: computed, as by --dry-run; 11 % are left free. loss: the expected range in nats per "
        "token. Rules and sources: pretrain/recipe/run/plan.py"
    )


def write(name: str, row: Plan, corpus: Corpus) -> None:
    """Write a row as a recipe that extends that of the corpus. Raises Refused for a name that is taken."""
    folder = CONFIGS / name
    letters = re.fullmatch(r"[A-Za-z0-9][\w.-]*", name, re.ASCII)
    if not letters or len(name) > LONGEST_NAME or name == "deepspeed":
        raise Refused(
            f"--write {name[:LONGEST_NAME]}: expected a name of at most {LONGEST_NAME} letters, digits, -, _ "
            "and ., other than deepspeed"
        )
    if folder.exists():
        raise Refused(f"--write {name}: configs/{name} exists. Give another name")
    setting = row.setting
    ranks = row.values["global_batch_size"] // (setting.micro_batch * setting.accumulation)
    own = {
        "model": model_of(row.layers, row.experts),
        "pretrain": row.values
        | {
            "lr_scheduler_type": "linear",
            "warmup_steps": 0.02,
            "weight_decay": 0.1,
            "adam_beta2": 0.95,
            "max_grad_norm": 1.0,
            "seed": 42,
            "logging_steps": 10,
            "eval_strategy": "steps",
            "eval_blocks": 256,
            "save_total_limit": 2,
        },
        "finetune": {"extends": corpus.base}
        | tuning_batch(corpus.config["finetune"], ranks, setting.micro_batch),
    }
    folder.mkdir()
    try:
        for file in (*FILES, *(file for file in OPTIONAL_FILES if file in corpus.config)):
            write_json(folder / f"{file}.json", own.get(file, {"extends": corpus.base}))
        load_recipe(name)
    except BaseException:
        shutil.rmtree(folder)
        raise


def main() -> None:
    """Print the table, and write a recipe if asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--hours", type=float, required=True, help="hours of pretraining")
    parser.add_argument("--gpu", help=f"a card: {', '.join(CARDS)} (default: this machine)")
    parser.add_argument("--gpus", type=int, help="how many (default: those of this machine, or 1)")
    parser.add_argument("--corpus", default=BASE, help=f"a size such as 2GB, or a recipe (default: {BASE})")
    parser.add_argument(
        "--experts", type=int, default=0, help="experts of each layer (default: a dense model)"
    )
    parser.add_argument("--layers", type=int, help="the row to write (default: the one with the arrow)")
    parser.add_argument("--write", metavar="NAME", help="write the row as the recipe configs/NAME")
    arguments = parser.parse_args()
    with errors_in_one_line("plan"):
        if not 0 < arguments.hours < math.inf:
            raise Refused(f"--hours {arguments.hours}: expected more than 0")
        if arguments.gpus is not None and arguments.gpus < 1:
            raise Refused(f"--gpus {arguments.gpus}: expected 1 or more")
        if arguments.experts and arguments.experts <= EXPERTS_OF_TOKEN:
            raise Refused(
                f"--experts {arguments.experts}: expected more than the {EXPERTS_OF_TOKEN} that a token "
                "uses, or 0 for a dense model"
            )
        machine, corpus = machine_of(arguments.gpu, arguments.gpus), corpus_of(arguments.corpus, BASE)
        rows = plans(arguments.hours, machine, corpus, arguments.experts)
        row = chosen(rows, arguments.layers)
        for line in report(rows, machine, corpus):
            print(line)
        if arguments.write is not None:
            write(arguments.write, row, corpus)
            print(
                f"wrote     configs/{arguments.write}: bash run_all.sh --recipe {arguments.write} --dry-run"
            )


if __name__ == "__main__":
    main()
