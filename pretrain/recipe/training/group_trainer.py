"""Group relative policy optimisation (GRPO; Shao et al., 2024, arXiv:2402.03300) by trl's trainer.

For each question the model writes a group of answers. Rewards judge them, and the answers that are better
than the mean of their group become more probable. Every rank writes answers with the model that trains, by
transformers' generate(); each answer is trained on once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from zlib import crc32

import torch
from transformers import TrainerState
from trl import GRPOTrainer

from recipe.config.rewards import Attempt, score, weights
from recipe.project import RecipeError
from recipe.training.callbacks import fork_rng, gather
from recipe.training.preference_trainer import score_answers_only
from recipe.training.trainer import RecipeTrainer

EQUAL_GROUPS = 200  # groups one after the other without any difference, after which a training stops or warns
CLIPPED = "clip_ratio/"  # of trl's figures: always 0 where an answer is trained on once


class GroupTrainer(RecipeTrainer, GRPOTrainer):
    """trl's GRPOTrainer on ids that `encode_questions` made, with our optimizers and checkpoints.

    ``eval_reward`` is the mean reward of the validation side: one sampled answer to each question, with the
    same random numbers every time. ``eval_loss`` is minus that.
    """

    def __init__(self, *positional: Any, rewards: dict[str, Any], **keywords: Any) -> None:
        """rewards: the value of `rewards` in preference.json."""
        score_answers_only()
        self.rewards, self.equal_groups, self.ever_different = rewards, 0, False
        self.logged_at = (0, 0)  # tokens and step of the last log, or of the checkpoint
        keywords["args"].reward_weights = weights(rewards)
        # A model in training has use_cache False; writing without a cache takes several times as long.
        keywords["args"].generation_kwargs = {"use_cache": True}
        functions = [self._reward_function(name) for name in rewards]
        super().__init__(*positional, reward_funcs=functions, **keywords)

    def _init_training_state(self, *positional: Any) -> tuple[int, int]:
        trained = super()._init_training_state(*positional)
        self.logged_at = (self.state.num_input_tokens_seen, self.state.global_step)
        return trained

    def _reward_function(self, name: str) -> Callable[..., list[float]]:
        """One reward in the form that trl calls."""

        def function(
            completions: list[str], completion_ids: list[list[int]], answer: list[str], **_: Any
        ) -> list[float]:
            attempts = self._attempts(completions, completion_ids, answer)
            return [score({name: self.rewards[name]}, attempt)[0] for attempt in attempts]

        function.__name__ = name  # trl logs under it
        return function

    def _attempts(self, texts: list[str], ids: list[list[int]], expected: list[str]) -> list[Attempt]:
        ends = [bool(row) and row[-1] in self.eos_token_ids for row in ids]
        return [Attempt(*parts) for parts in zip(texts, ends, expected, strict=True)]

    def _tokenize_prompts(self, prompts: list[list[int]]) -> tuple[list[list[int]], None, dict[str, Any]]:
        # They are ids: trl's encoding would take special-token strings in a text for control tokens.
        return prompts, None, {}

    def sequences_in(self, inputs: Any) -> int:
        """The answers in a micro-batch; `inputs` are the rows of all micro-batches of a step."""
        return len(inputs) // self.args.steps_per_generation

    def _calculate_rewards(self, inputs: Any, prompts: list[list[int]], *answers: Any) -> torch.Tensor:
        """The rewards of all ranks, shape (answers, rewards), float32. All ranks must call it.

        Raises RecipeError on every rank for a reward that is NaN or infinite, and when no group since the
        start of the training had answers of different rewards.
        """
        found = super()._calculate_rewards(inputs, prompts, *answers)
        asked = torch.tensor([crc32(str(ids).encode()) for ids in prompts], device=found.device)
        groups = self.accelerator.gather(asked).view(-1, self.num_generations)
        assert (groups == groups[:, :1]).all(), "the answers of a group are to different questions"
        if not found.isfinite().all():
            row, column = (~found.isfinite()).nonzero()[0].tolist()
            raise RecipeError(
                f"step {self.state.global_step + 1}: the reward {self.reward_func_names[column]} is "
                f"{found[row, column].item()}, expected a finite number. Nothing of this step is trained, "
                "and checkpoints are kept. Correct the reward in recipe/config/rewards.py, or remove it from "
                "preference.json: rewards"
            )
        sums = (found * self.reward_weights.to(found.device)).sum(dim=1).view(-1, self.num_generations)
        self._watch_groups((sums.amax(1) - sums.amin(1) > 1e-6).tolist(), sums.mean().item())
        return found

    def _watch_groups(self, different: list[bool], mean: float) -> None:
        """Stop a training that never saw a difference, and warn when differences have ended.

        different: for each group of a step, whether its rewards differ.
        """
        before = self.equal_groups
        for differs in different:
            self.equal_groups = 0 if differs else self.equal_groups + 1
        self.ever_different |= any(different)
        if not before < EQUAL_GROUPS <= self.equal_groups:
            return
        names = ", ".join(self.rewards)
        found = (
            f"step {self.state.global_step + 1}: in the last {self.equal_groups} groups, all "
            f"{self.num_generations} answers to a question had the same reward ({names}; mean {mean:.3f}), "
            "so that nothing is learned"
        )
        if not self.ever_different and not _differed(self.state):
            raise RecipeError(
                f"{found}. Choose rewards that some answers get and others do not (preference.json: "
                "rewards), raise num_generations or temperature, or tune longer in stage 12"
            )
        if self.is_world_process_zero():
            print(
                f"warning: {found}. They were different before: at the highest mean that is possible, the "
                "training has reached its end. Lower max_steps, or choose harder questions or rewards",
                flush=True,
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log trl's figures of the groups; the tokens are those that were really read and written."""
        tokens, step = self.state.num_input_tokens_seen, self.state.global_step
        if "loss" in logs:
            before, at = self.logged_at
            if step > at:
                self.meter.tokens_per_step = (tokens - before) / (step - at)
            self.logged_at = (tokens, step)
        figures = self._metrics["train"]
        for key in [key for key in figures if key.startswith(CLIPPED) or key == "num_tokens"]:
            del figures[key]
        logs["tokens"] = tokens
        super().log(logs, start_time)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Measure the rewards of the validation side, without using the random numbers of the training.

        Every question counts once; trl's own evaluation would answer some questions twice where they do not
        divide over the ranks.
        """
        rank, ranks = self.args.process_index, self.args.world_size
        rows = list(self.eval_dataset)[rank::ranks]
        sums = torch.zeros(len(self.rewards) + 3, dtype=torch.float64)
        self.model.eval()
        with fork_rng(self.args.device):
            torch.manual_seed(self.args.seed + rank)
            for start in range(0, len(rows), self.args.per_device_eval_batch_size):
                batch = rows[start : start + self.args.per_device_eval_batch_size]
                ids, _ = self._generate_single_turn([row["prompt"] for row in batch], None, {}, 1)
                texts = self.processing_class.batch_decode(ids, skip_special_tokens=True)
                attempts = self._attempts(texts, ids, [row["answer"] for row in batch])
                for attempt, row in zip(attempts, ids, strict=True):
                    sums += torch.tensor([*score(self.rewards, attempt), 1, len(row), attempt.ended])
                self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        total = torch.tensor(gather(sums.tolist(), self.args.device), dtype=torch.float64).sum(dim=0)
        *means, _, length, ended = (total / total[len(self.rewards)]).tolist()
        reward = sum(weight * mean for weight, mean in zip(weights(self.rewards), means, strict=True))
        metrics = {"eval_loss": -reward, "eval_reward": reward, "eval_length": length, "eval_ended": ended}
        metrics |= {f"eval_rewards/{name}": mean for name, mean in zip(self.rewards, means, strict=True)}
        self.log(dict(metrics))  # in the mode of evaluation, so that trl leaves the figures of training
        self.model.train()
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def _differed(state: TrainerState) -> bool:
    """Whether an earlier run of this training has logged groups with different rewards."""
    return any(row.get("frac_reward_zero_std", 1.0) < 1.0 for row in state.log_history)
