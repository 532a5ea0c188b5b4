"""What changes in the model when the next phase of a pretraining begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState

from recipe.config.phases import Phase, phase_at
from recipe.model.build import set_rope_theta


@dataclass
class PhaseChange(TrainerCallback):
    """Before the first step of a phase, set its rotary embeddings and say that it begins."""

    phases: Sequence[Phase]
    current: Phase | None = None

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **objects: Any) -> None:
        """Set the phase before an evaluation that comes before the first step (``eval_on_start``)."""
        self.on_step_begin(args, state, control, **objects)

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **objects: Any) -> None:
        """Look up the phase of the step, so that a continued run is in the right one."""
        phase = phase_at(self.phases, state.global_step)
        if phase == self.current:
            return
        self.current = phase
        if phase.rope_theta:
            set_rope_theta(objects["model"], phase.rope_theta)
        if state.is_world_process_zero:
            tqdm.write(describe(self.phases, phase))


def describe(phases: Sequence[Phase], phase: Phase) -> str:
    """A phase in one line."""
    text = f"phase {phases.index(phase) + 1} of {len(phases)}: steps {phase.begin + 1:,} to {phase.end:,}, "
    text += f"blocks of {phase.block_size:,}, learning rate x {phase.rate:g}"
    text += f", rope_theta {phase.rope_theta:g}" if phase.rope_theta else ""
    mixture = ", ".join(f"{name} x {weight:g}" for name, weight in (phase.sources or {}).items())
    return f"{text}, sources {mixture or 'as in dataset.json'}"
