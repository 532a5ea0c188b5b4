"""Running tasks of lm-evaluation-harness on a model of ours, and what their scores are worth."""

from __future__ import annotations

import json
import logging
import re
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import torch
from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from recipe.conversations.encode import encode_conversation
from recipe.conversations.read_rows import Message
from recipe.tokenization.encode_text import encode_text, prompt_ids

Sample = dict[str, Any]  # what the harness logs of an item

SEED = 1234  # of the harness's choice of shots
_CHAT = "\0"  # before a conversation that is handed through the harness as a context; no text holds it


def as_context(messages: list[Message]) -> str:
    """A conversation that waits for its answer, as a context for `Harness`."""
    return _CHAT + json.dumps(messages, ensure_ascii=False)


class Harness(HFLM):
    """A model as the harness asks it, in the ids that it was trained on.

    The harness's own way would find control tokens in texts, forget the word segmenter, and move white space
    at a context's end into the answer, whatever token that makes; and it leaves the start token to the
    tokenizer, which here has no rule of its own. So contexts are encoded as the beginning of a document or as
    a conversation, and answers by themselves, as stage 12 trains them. ``cut`` counts requests whose
    beginning was left out because they were longer than the model's positions.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, batch_size: int, bf16: bool
    ) -> None:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        datasets.disable_progress_bars()
        super().__init__(
            pretrained=model,
            backend="causal",
            tokenizer=tokenizer,
            batch_size=batch_size,
            mixed_precision_dtype="bfloat16" if bf16 else None,
            softmax_dtype="float32",  # bf16 sums of log likelihoods differ by eighths
        )
        self.cut = 0

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **_: Any,
    ) -> list[int]:
        """Ids of a context: of a document's beginning, or of a conversation from `as_context`."""
        if string.startswith(_CHAT):
            ids = encode_conversation(self.tokenizer, json.loads(string[1:]))[0]
        else:
            ids = prompt_ids(self.tokenizer, string)
        if left_truncate_len and len(ids) > left_truncate_len:
            self.cut += 1
            return ids[-left_truncate_len:]
        return ids

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Contexts to continue, int64 [texts, longest] padded on the left, and their mask."""
        rows = [self.tok_encode(string, left_truncate_len=left_truncate_len) for string in strings]
        encoded = self.tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt")
        return encoded["input_ids"], encoded["attention_mask"]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        ids, answer = self.tok_encode(context), encode_text(self.tokenizer, continuation)
        self.cut += len(ids) + len(answer) > self.max_length + 1
        return ids, answer

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation itself; `tok_encode` puts it into the template."""
        return as_context(chat_history)


def run_tasks(model: Harness, tasks: list[dict[str, Any]], chat: bool = False) -> dict[str, list[Sample]]:
    """What the harness logs of each item of each task; nothing for no tasks.

    tasks: as `recipe.evaluation.tasks.items.write_items` gives them. chat: put prompts into the chat
    template, with shots as turns before them.
    """
    if not tasks:
        return {}
    manager = TaskManager(include_path=str(Path(__file__).parent), include_defaults=False)
    # Only a group's members may add to what a YAML file says.
    loaded = manager.load([{"group": "recipe", "task": [dict(task) for task in tasks]}])
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(SEED)
    results = evaluator.evaluate(
        lm=model, task_dict=loaded, bootstrap_iters=0, apply_chat_template=chat, fewshot_as_multiturn=chat
    )
    assert results is not None  # None on ranks other than the first, and there is one
    return results["samples"]


def scores(samples: list[Sample]) -> dict[str, Any]:
    """The mean of a task's first metric with its confidence interval, beside what guessing scores.

    ``majority``: answering always with the most frequent place of the right choice (of labels: the most
    frequent label); ``random``: any choice. Both are None where nothing is chosen from. Metrics after the
    first stand under their own names.
    """
    metric, *others = samples[0]["metrics"]
    mean = sum(sample[metric] for sample in samples) / len(samples)
    low, high = wilson(mean, len(samples))
    figures = {"metric": metric, "items": len(samples), "score": mean, "low": low, "high": high}
    choices = [len(sample["arguments"]) for sample in samples]
    if max(choices) > 1:
        most = Counter(sample["target"] for sample in samples).most_common(1)[0][1]
        figures |= {"majority": most / len(samples), "random": sum(1 / n for n in choices) / len(samples)}
    else:
        figures |= {"majority": None, "random": None}
    return figures | {other: sum(s[other] for s in samples) / len(samples) for other in others}


def wilson(mean: float, count: int) -> tuple[float, float]:
    """The 95 % confidence interval of Wilson (1927) for a share; for a mean of values between 0 and 1, whose
    variance is at most that of a share, it is wide enough, too.
    """
    z = 1.959964  # the normal distribution has 95 % between -z and z
    centre = mean + z**2 / (2 * count)
    spread = z * (mean * (1 - mean) / count + z**2 / (4 * count**2)) ** 0.5
    scale = 1 + z**2 / count
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def answer_scores(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Exact match and F1 of characters against the best of JSQuAD's answers, as JGLUE's paper scores: both
    after NFKC, lower case, and without white space and punctuation.
    """
    found = _plain(results[0])
    pairs = [(found, _plain(answer)) for answer in doc["answers"]]
    return {"exact_match": float(max(a == b for a, b in pairs)), "f1": max(_f1(a, b) for a, b in pairs)}


def _plain(text: str) -> str:
    return re.sub(r"[\W_]", "", unicodedata.normalize("NFKC", text).lower())


def _f1(found: str, wanted: str) -> float:
    """The harmonic mean of precision and recall of characters, counted with repetition."""
    common = sum((Counter(found) & Counter(wanted)).values())
    return 2 * common / (len(found) + len(wanted)) if common else float(found == wanted)


def markdown(columns: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Scores as a table: a row per task, a column per model.

    columns: by the name of the column, what `scores` gives of each task; all have the same tasks.
    """
    heads = [f"{name}, 95 % interval" for name in columns]
    lines = [
        f"| task | metric | items | {' | '.join(heads)} | majority | random |",
        "|---|---|---:|" + "---:|" * (len(heads) + 2),
    ]
    for name, figures in next(iter(columns.values())).items():
        cells = [name, figures["metric"], f"{figures['items']:,}"]
        for scored in (tasks[name] for tasks in columns.values()):
            cells.append(f"{scored['score']:.1%} ({scored['low']:.1%} to {scored['high']:.1%})")
        cells += ["" if figures[key] is None else f"{figures[key]:.1%}" for key in ("majority", "random")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
