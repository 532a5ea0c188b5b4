"""What a model writes during training: the same prompts at chosen steps, to be read side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)

from recipe.evaluation.generation import generate_all, generation_config, side_by_side
from recipe.project import append_json_line, read_json_lines, write_text
from recipe.training.callbacks import fork_rng, keep_rows


class SamplePrompts(TrainerCallback):
    """Continue prompts before training, at chosen steps and at the end: ``samples.jsonl``, ``samples.md``.

    A row of samples.jsonl holds step, prompt, text, stopped (see `Answer`) and, after step 0, eval_loss:
    an evaluation goes with each of these steps. The random numbers of the training are not used. Every rank
    generates, because under ZeRO-3 no rank has the whole model; rank 0 writes.
    """

    def __init__(
        self,
        steps: int | list[int] | None,
        prompts: dict[str, list[int]],
        values: dict[str, Any],
        tokenizer: PreTrainedTokenizerFast,
        folder: Path,
    ) -> None:
        """steps: after every so many steps, or after these; None: no samples. prompts: ids by text.

        values: generation.json.
        """
        self.steps, self.prompts, self.tokenizer, self.folder = steps, prompts, tokenizer, folder
        self.config, self.seed = generation_config(values, tokenizer), values.get("seed", 42)
        self.config.max_time = None  # ranks that share the model must write the same tokens

    def _is_due(self, state: TrainerState) -> bool:
        step = state.global_step
        if self.steps is None:
            return False
        if step in (0, state.max_steps):
            return True
        return step % self.steps == 0 if isinstance(self.steps, int) else step in self.steps

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **objects: Any) -> None:
        """Remove what an interrupted run has written after the checkpoint; sample before the first step."""
        if state.is_world_process_zero:
            keep_rows(self.folder / "samples.jsonl", state.global_step)
        if state.global_step == 0 and self._is_due(state):
            self._write(objects["model"], state, {})

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ask the Trainer to evaluate at the chosen steps."""
        if self._is_due(state):
            control.should_evaluate = True

    def on_evaluate(
        self, args: Any, state: TrainerState, control: TrainerControl, metrics: Any = None, **objects: Any
    ) -> None:
        """Sample after the evaluation of a chosen step."""
        if state.global_step and self._is_due(state):
            self._write(objects["model"], state, {"eval_loss": metrics["eval_loss"]})

    def _write(self, model: PreTrainedModel, state: TrainerState, facts: dict[str, float]) -> None:
        was_training = model.training
        with fork_rng(model.device):
            answers = generate_all(model, self.tokenizer, list(self.prompts.values()), self.config, self.seed)
        model.train(was_training)
        if not state.is_world_process_zero:
            return
        path = self.folder / "samples.jsonl"
        for prompt, answer in zip(self.prompts, answers, strict=True):
            row = {"step": state.global_step, **facts, "prompt": prompt}
            append_json_line(path, row | {"text": answer.text, "stopped": answer.stopped})
        write_text(self.folder / "samples.md", by_prompt(read_json_lines(path)))


def by_prompt(rows: list[dict[str, Any]]) -> str:
    """The rows of samples.jsonl as a Markdown table: a row for each prompt, a column for each step."""
    prompts: dict[str, dict[str, str]] = {}
    for row in rows:
        loss = f", valid loss {row['eval_loss']:.3f}" if "eval_loss" in row else ""
        prompts.setdefault(row["prompt"], {})[f"step {row['step']}{loss}"] = row["text"]
    return side_by_side([{"prompt": prompt} | texts for prompt, texts in prompts.items()])
