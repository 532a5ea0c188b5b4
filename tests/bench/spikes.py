"""Spikes of three kinds at three sizes: which ones the rule sees, and false alarms over healthy steps.

A Qwen3 of two layers trains on the tokens of tiny, by AdamW with a warm-up, in bf16 where the CPU is fast
at it and else in float32, and every step is judged by the rule with its defaults. Then, from the same state
each time, six steps follow. The first (for the rate: the first three) is changed: a share of the batch is
random tokens, the gradient is multiplied, or the learning rate is. A step that is seen changes no weight.
Stages 01 to 04 of tiny must be there.

Run (about 4 minutes):  .venv/bin/python tests/bench/spikes.py [HIDDEN [STEPS [SEQUENCES [RATE]]]]
"""

import copy
import sys

import torch
from recipe.config.recipe import load_recipe
from recipe.config.settings import SpikeRule
from recipe.hardware import detect
from recipe.model.build import build_model, parameter_count
from recipe.project import OUTPUTS
from recipe.tokenization.packing import PackedBlocks, collate
from recipe.tokenization.token_files import TokenFile
from recipe.training.spikes import spike
from transformers import AutoTokenizer

RULE = SpikeRule()
BLOCK = 64
KINDS = {"garbage": (0.25, 0.5, 1.0), "gradient": (3, 10, 100), "rate": (10, 30, 100)}


class Run:
    """A training whose single steps can be changed."""

    def __init__(self, hidden: int, steps: int, sequences: int, rate: float) -> None:
        tokenizer = AutoTokenizer.from_pretrained(OUTPUTS / "tiny/03_tokenizer")
        self.steps, self.sequences, self.rate = steps, sequences, rate
        self.bf16 = detect().fast_bf16
        self.samples = PackedBlocks(
            TokenFile(OUTPUTS / "tiny/04_tokenize/train"),
            BLOCK,
            tokenizer.pad_token_id,
            42,
            (steps + 10) * sequences,
        )
        shape = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": 2}
        values = load_recipe("tiny")["model"] | shape | {"head_dim": hidden // 4}
        self.model = build_model(values, tokenizer, "sdpa", 0)
        self.model.config.use_cache = False
        self.vocabulary = len(tokenizer)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), rate, (0.9, 0.95), weight_decay=0.1)
        self.window: list[tuple[float, float]] = []

    def step(self, step: int, garbage: float = 0, gradient: float = 1, rate: float = 1) -> str:
        """One step; why it is a spike, and is skipped, or an empty string."""
        first = step * self.sequences
        batch = collate([self.samples[first + i] for i in range(self.sequences)])
        rows = round(garbage * self.sequences)
        if rows:
            draw = torch.Generator().manual_seed(step)
            tokens = torch.randint(4, self.vocabulary, (rows, BLOCK), generator=draw)
            batch["input_ids"][:rows] = tokens
            batch["labels"][:rows, :-1] = tokens[:, 1:]
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * min(1, (step + 1) / (0.02 * self.steps)) * rate
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            loss = self.model(**batch).loss
        (loss * gradient).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        found = spike(self.window, loss.item(), norm.item(), RULE.deviations)
        if not found:
            self.optimizer.step()
            self.window = [*self.window, (loss.item(), norm.item())][-RULE.window :]
        self.optimizer.zero_grad()
        return found


def main() -> None:
    """Train, then inject."""
    given = [*sys.argv[1:], *("128", "2000", "8", "3e-3")[len(sys.argv) - 1 :]]
    hidden, steps, sequences = (int(number) for number in given[:3])
    run = Run(hidden, steps, sequences, float(given[3]))
    alarms = [step for step in range(steps) if run.step(step)]
    loss, norm = run.window[-1]
    print(
        f"{parameter_count(run.model):,} parameters, {steps:,} healthy steps of {sequences * BLOCK} tokens "
        f"to a loss of {loss:.2f} (gradient norm {norm:.2f}): {len(alarms)} false alarms {alarms}",
        flush=True,
    )
    state = copy.deepcopy((run.model.state_dict(), run.optimizer.state_dict(), run.window))
    for kind, sizes in KINDS.items():
        for size in sizes:
            weights, moments, window = copy.deepcopy(state)
            run.model.load_state_dict(weights)
            run.optimizer.load_state_dict(moments)
            run.window = window
            lasting = 3 if kind == "rate" else 1
            found = [run.step(steps + i, **({kind: size} if i < lasting else {})) for i in range(6)]
            seen = [f"step {i + 1}: {reason.split(',')[0]}" for i, reason in enumerate(found) if reason]
            print(f"{kind} {size}: {'; '.join(seen) or 'not seen'}", flush=True)


if __name__ == "__main__":
    main()
