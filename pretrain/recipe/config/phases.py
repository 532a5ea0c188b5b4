"""The phases of a pretraining: mixtures, block size, rate and rotary embeddings that change on the way."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple

from recipe.config.keys import check_keys, show, type_name
from recipe.config.model import model_values, positions_of
from recipe.config.ranges import ABOVE_0, FROM_1, POSITIONS, Range, check_ranges
from recipe.project import Refused, nearest

# The keys of a phase, with their JSON types and ranges.
PHASE = {
    "until_step": "float",
    "until_tokens": "int",
    "sources": "dict",
    "block_size": "int",
    "rate": "float",
    "rope_theta": "float",
}
RANGES = {
    "until_step": Range(
        "a number of steps, or a share of max_steps below 1", lambda x: 0 < x < 1 or (x >= 1 and x == int(x))
    ),
    "until_tokens": FROM_1,
    "block_size": POSITIONS,
    **dict.fromkeys(("rate", "rope_theta"), ABOVE_0),
}


class Phase(NamedTuple):
    """The steps after `begin` up to `end`.

    sources: their weights by name; None: all, as dataset.json says. block_size: tokens of a sequence. rate:
    factor of the schedule's learning rate. rope_theta: None: that of model.json.
    """

    begin: int
    end: int
    sources: Mapping[str, float] | None
    block_size: int
    rate: float
    rope_theta: float | None

    @property
    def mixture(self) -> str:
        """A name of what it reads: phases with the same one go on where the one before has stopped."""
        return json.dumps([self.sources, self.block_size], sort_keys=True)


def phases_of(values: Mapping[str, Any], steps: int) -> list[Phase]:
    """The phases of a run; one over all of it where pretrain.json names none.

    values: pretrain.json. steps: of the run.
    """
    tokens, block_size = values["global_batch_size"] * values["block_size"], values["block_size"]
    phases, begin = [], 0
    for row in in_steps(values.get("phases") or [{}], steps):
        end = row.get("until_step", steps)
        if "until_tokens" in row:
            end = math.ceil(row["until_tokens"] / tokens)
        own = row.get("sources"), row.get("block_size", block_size), row.get("rate", 1.0)
        phases.append(Phase(begin, end, *own, row.get("rope_theta")))
        begin = end
    return phases


def in_steps(rows: list[dict[str, Any]], steps: int) -> list[dict[str, Any]]:
    """The rows of `phases` in which every ``until_step`` is a number of steps. steps: of the run."""
    found = []
    for row in rows:
        if end := row.get("until_step"):
            row = row | {"until_step": round(end * steps if end < 1 else end)}
        found.append(row)
    return found


def phase_at(phases: list[Phase], step: int) -> Phase:
    """The phase of the step that follows after `step` steps; after the end, the last one."""
    return next((phase for phase in phases if step < phase.end), phases[-1])


def longest_block(values: Mapping[str, Any]) -> int:
    """The longest block of a training, in tokens. values: of its training file."""
    sizes = [row.get("block_size", 0) for row in values.get("phases") or []]
    return max(values["block_size"], *sizes, 0)


def sequences_of_longest(values: Mapping[str, Any]) -> int:
    """How many of the file's sequences are as long as the longest block. values: of a training file."""
    return longest_block(values) // values["block_size"]


def samples_of(values: Mapping[str, Any]) -> tuple[int, int]:
    """(samples of a step over all ranks, the most of them in a micro-batch).

    A sample has as many tokens as the longest block: without phases it is a sequence. So the tokens of a step
    and of a micro-batch stay the same in all phases. values: of a training file.
    """
    times = sequences_of_longest(values)
    return values["global_batch_size"] // times, values["per_device_train_batch_size"] // times


def check_phases(config: dict[str, dict[str, Any]], where: str) -> None:
    """Check `phases` of pretrain.json by itself and against model.json and dataset.json. Raises Refused.

    where: the recipe's folder.
    """
    values, here = config["pretrain"], f"{where}/pretrain.json: phases"
    rows = values.get("phases")
    if rows is None:
        return
    if not rows:
        raise Refused(f"{here}: [], expected at least one phase. Leave the key out for a run without phases")
    for number, row in enumerate(rows, 1):
        _check_row(row, f"{here}: phase {number}", number == len(rows))
    steps = values.get("max_steps", -1)
    if steps < 1:
        raise Refused(
            f"{here}: they need max_steps, the steps of the whole run: with several mixtures, "
            "num_train_epochs is not defined"
        )
    phases = phases_of(values, steps)
    for number, phase in enumerate(phases, 1):
        if phase.end <= phase.begin:
            raise Refused(
                f"{here}: phase {number} ends at step {phase.end:,}, but begins after step {phase.begin:,}, "
                "where the one before it ends. Raise its end, or write the phases in their order"
            )
    end = phases[-1].end
    if end != steps:
        gap = f"steps {end + 1:,} to {steps:,} have no phase" if end < steps else "the run ends before"
        raise Refused(
            f"{here}: the last phase ends at step {end:,}, but max_steps is {steps:,}: {gap}. Leave the end "
            "of the last phase out, or change one of the two"
        )
    _check_blocks(values, phases, here)
    _check_rope(model_values(config), positions_of(config), phases, here)
    for number, phase in enumerate(phases, 1):
        _check_sources(phase.sources, config["dataset"]["sources"], f"{here}: phase {number}")


def _check_row(row: Any, here: str, is_last: bool) -> None:
    if not isinstance(row, dict):
        raise Refused(f"{here}: {show(row)} is {type_name(row)}, expected an object")
    check_keys(row, PHASE, here)
    check_ranges(row, RANGES, here)
    ends = [key for key in ("until_step", "until_tokens") if key in row]
    if len(ends) == 2:
        raise Refused(f"{here}: until_step and until_tokens both say where it ends. Keep one")
    if not ends and not is_last:
        raise Refused(f"{here}: no end. Add until_step or until_tokens; only the last phase needs none")


def _check_blocks(values: dict[str, Any], phases: list[Phase], here: str) -> None:
    """Every block size must divide the longest one, which must fit into the global and the micro-batch."""
    longest, base = longest_block(values), values["block_size"]
    for number, phase in enumerate(phases, 1):
        if longest % phase.block_size:
            raise Refused(
                f"{here}: phase {number}: block_size: {phase.block_size}, but the longest block, {longest}, "
                "is no multiple of it: the tokens of a step could not stay the same"
            )
    times = longest // base
    for key in ("global_batch_size", "per_device_train_batch_size"):
        if longest % base or values[key] % times:
            raise Refused(
                f"{here}: the longest block has {longest} tokens, and {key} {values[key]} x block_size "
                f"{base} is no multiple of it: the tokens of a step stay the same in all phases. Set {key} "
                f"to a multiple of {math.ceil(longest / base)}"
            )


def _check_rope(model: dict[str, Any], positions: int | None, phases: list[Phase], here: str) -> None:
    rope = model.get("rope_parameters") or {}
    other = model.get("model_type") in ("gpt2", "gemma3_text")
    for number, phase in enumerate(phases, 1):
        if positions and phase.block_size > positions:
            raise Refused(
                f"{here}: phase {number}: block_size: {phase.block_size}, more than the {positions} "
                "positions of the model. Raise max_position_embeddings in model.json"
            )
        if phase.rope_theta and (other or rope.get("rope_type", "default") != "default"):
            raise Refused(
                f"{here}: phase {number}: rope_theta: {phase.rope_theta:g}: only rotary embeddings of the "
                "type default, the same in all layers, can change in a run. Leave it out"
            )
    for (number, before), (_, phase) in pairwise(enumerate(phases, 1)):
        if before.rope_theta and not phase.rope_theta:
            raise Refused(
                f"{here}: phase {number + 1} has no rope_theta, phase {number} has {before.rope_theta:g}. "
                "Write it in every phase after the change"
            )


def _check_sources(weights: Mapping[str, Any] | None, sources: dict[str, Any], here: str) -> None:
    if weights is None:
        return
    for name, weight in weights.items():
        if name not in sources:
            raise Refused(f"{here}: sources: {name}: no source of dataset.json.{nearest(name, sources)}")
        if sources[name].get("held_out"):
            raise Refused(f"{here}: sources: {name}: it is held out in dataset.json. Leave it out")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or weight <= 0:
            raise Refused(
                f"{here}: sources: {name}: {show(weight)}, expected a weight above 0; leave out what the "
                "phase does not read"
            )
    if not weights:
        raise Refused(f"{here}: sources: none. Name at least one, or leave the key out for all")
