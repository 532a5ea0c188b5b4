"""The keys of preference.json and their checks."""

from __future__ import annotations

from typing import Any

from recipe.config.instruction import OWN_PAIRS, PAIRS, VALID_SHARE, check_pairs
from recipe.config.keys import require, show
from recipe.config.ranges import (
    ABOVE_0,
    ABOVE_0_TO_100,
    FROM_0,
    POSITIONS,
    Range,
    check_ranges,
    one_of,
)
from recipe.config.rewards import check_rewards
from recipe.config.training import TUNING, check_training
from recipe.project import Refused

# The keys of preference.json in addition to TRAINING and TUNING: of both methods, and those of one alone. All
# but `OWN` have the names of DPOConfig and GRPOConfig.
BOTH = {"method": "str", "pairs": "dict", "valid_share": "float", "beta": "float", "loss_type": "str"}
DPO = {"label_smoothing": "float"}
GRPO = {
    "rewards": "dict",
    "num_generations": "int",
    "max_completion_length": "int",
    "temperature": "float",
}
PREFERENCE = BOTH | DPO | GRPO
# The keys that trl does not know.
OWN = ("method", "pairs", "valid_share", "rewards")

# The losses of trl's DPOTrainer.
LOSS_TYPES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot"),
    *("aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)
# Those that read label_smoothing; in the others it would change nothing.
SMOOTHED = ("exo_pair", "robust", "aot", "aot_unpaired")
# The losses of trl's GRPOTrainer that differ while every answer is trained on once.
GRPO_LOSS_TYPES = ("dapo", "dr_grpo", "bnpo", "grpo")
NUM_GENERATIONS = 8  # trl's default

DPO_RANGES = {
    "beta": ABOVE_0,
    "loss_type": one_of(*LOSS_TYPES),
    "label_smoothing": Range("a number from 0 to below 0.5", lambda x: 0 <= x < 0.5),
}
GRPO_RANGES = {
    "beta": FROM_0,
    "loss_type": one_of(*GRPO_LOSS_TYPES),
    "num_generations": Range(
        "2 or more: answers to the same question are compared, and one alone has no other to compare with",
        lambda x: x >= 2,
    ),
    "max_completion_length": POSITIONS,
    "temperature": ABOVE_0_TO_100,
}


def check_preference(config: dict[str, dict[str, Any]], where: str) -> None:
    """Check preference.json of a whole recipe. Raises Refused at the first error."""
    values = config["preference"]
    check_training(values, TUNING | PREFERENCE, where)
    # Of trl's trainers the default is 1e-6, and not that of the other stages.
    require(values, ("learning_rate",), where)
    check_ranges(values, {"method": one_of("dpo", "grpo")}, where)
    other = DPO if uses_rewards(config) else GRPO
    for key in other:
        if key in values:
            raise Refused(
                f"{where}: {key}: {show(values[key])}: only the method {'dpo' if other is DPO else 'grpo'} "
                f"reads it, and method is {values.get('method', 'dpo')}. Remove the key, or change method"
            )
    if uses_rewards(config):
        check_pairs(values, PAIRS, "`source` (a source of dataset.json), `path` or `dataset`", where)
    else:
        check_pairs(values, OWN_PAIRS, "`path` or `dataset`", where)
    if not values["pairs"]:
        raise Refused(f"{where}: pairs: empty. Add an entry, or delete the file to leave out stage 13")
    if not config["instruction"]["pairs"]:
        raise Refused(
            f"{where}: stage 13 trains a model that was tuned on instructions, but instruction.json names no "
            "pairs. Add pairs there, or delete preference.json"
        )
    with_valid_share(config)
    if values.get("muon_learning_rate"):
        raise Refused(f"{where}: muon_learning_rate: stage 13 trains without Muon. Remove the key")
    for key in ("z_loss", "sample_steps", "eval_blocks"):
        if values.get(key):
            raise Refused(f"{where}: {key}: {show(values[key])}: stage 13 does not read it. Remove the key")
    if values.get("torch_compile"):
        raise Refused(
            f"{where}: torch_compile: true: stage 13 cannot compile, because the lengths of its batches "
            "differ. Remove the key"
        )
    if uses_rewards(config):
        _check_grpo(values, where)
        return
    _check_dpo(values, where)


def with_valid_share(config: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """preference.json of a whole recipe with its ``valid_share``: that of instruction.json unless given.

    Stages 11 and 13 split questions by the same hash. Raises Refused for a smaller share than that of stage
    11: stage 13 would train on questions that stage 14 reports as held out.
    """
    held_out = config["instruction"].get("valid_share", VALID_SHARE)
    values = {"valid_share": held_out} | config["preference"]
    if values["valid_share"] < held_out:
        raise Refused(
            f"preference.json: valid_share: {values['valid_share']}, expected at least the {held_out} of "
            "instruction.json: stage 13 would train on questions that stage 14 reports as held out"
        )
    return values


def uses_rewards(config: dict[str, dict[str, Any]]) -> bool:
    """Whether stage 13 of a recipe trains by rewards (GRPO), not by preferences (DPO)."""
    return config.get("preference", {}).get("method", "dpo") == "grpo"


def _check_dpo(values: dict[str, Any], where: str) -> None:
    """Check what only the method dpo needs. Raises Refused at the first error."""
    check_ranges(values, DPO_RANGES, where)
    loss, smoothing = values.get("loss_type", "sigmoid"), values.get("label_smoothing", 0.0)
    if loss == "exo_pair" and not smoothing:
        raise Refused(f"{where}: label_smoothing: 0, but loss_type exo_pair needs a number above 0")
    if smoothing and loss not in SMOOTHED:
        raise Refused(
            f"{where}: label_smoothing: {smoothing}: loss_type {loss} does not read it. Remove the key, or "
            f"choose a loss_type that does: {', '.join(SMOOTHED)}"
        )
    if loss == "sft" and "beta" in values:
        raise Refused(
            f"{where}: beta: {show(values['beta'])}: loss_type sft does not read it. Remove the key"
        )
    dropout = (values.get("lora") or {}).get("lora_dropout")
    if dropout:
        raise Refused(
            f"{where}: lora: lora_dropout: {dropout}: dpo trains without any dropout, because it compares "
            "the model with its reference. Remove the key"
        )


def _check_grpo(values: dict[str, Any], where: str) -> None:
    """Check what only the method grpo needs. Raises Refused at the first error."""
    require(values, ("rewards", "max_completion_length"), where)
    check_ranges(values, GRPO_RANGES, where)
    check_rewards(values["rewards"], f"{where}: rewards")
    answers, group = values["global_batch_size"], values.get("num_generations", NUM_GENERATIONS)
    if answers % group:
        raise Refused(
            f"{where}: global_batch_size: {answers} answers do not divide into groups of num_generations "
            f"{group}, and a step needs whole groups. Set global_batch_size to a multiple of {group}"
        )
    longest = values["max_completion_length"]
    if longest >= values["block_size"]:
        raise Refused(
            f"{where}: max_completion_length: {longest} leaves no room for a question in the "
            f"{values['block_size']} tokens of block_size. Lower it or raise block_size"
        )
    if values.get("spikes") is not None:
        raise Refused(
            f"{where}: spikes: {show(values['spikes'])}: the loss of grpo is around 0, and its gradient is 0 "
            "where the answers of a group are equally good, so no step can be called a spike. Remove the key"
        )
    if values.get("neftune_noise_alpha"):
        raise Refused(
            f"{where}: neftune_noise_alpha: {show(values['neftune_noise_alpha'])}: the noise would also "
            "be in the model that writes the answers. Remove the key"
        )
    if values.get("lora"):
        raise Refused(
            f"{where}: lora: stage 13 trains adapters by dpo only. Remove the key: grpo trains all weights"
        )
