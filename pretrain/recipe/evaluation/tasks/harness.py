"""Run tasks of lm-evaluation-harness on our models, and turn its results into scores with intervals."""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import re
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import torch
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.result_schema import EvalResults
from lm_eval.tasks import TaskManager
from lm_eval.tasks.manager import TaskDict
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from recipe.config import tasks as task_files
from recipe.conversations.encode import encode_conversation
from recipe.conversations.read_rows import Message
from recipe.project import RecipeError, markdown_table
from recipe.tokenization.encode_text import encode_text, prompt_ids

Sample = dict[str, Any]  # what the harness logs of an item
Figures = dict[str, Any]  # what `scores` gives of a task

SEED = 1234  # of the harness's choice of shots
MUTUAL_INFORMATION = "acc_mutual_info"  # the harness gives it last; where a task has it, it comes first here
Z = 1.959964  # the normal distribution has 95 % between -Z and Z
BOOTSTRAP = 100  # resamples for the standard error of metrics that are not means
os.environ.setdefault("DISABLE_MULTIPROC", "1")  # the harness would start a process per core for them
_CHAT = "\0"  # marks a context that is a conversation in JSON; no text contains this character


def as_context(messages: list[Message]) -> str:
    """A conversation that ends with a question, as a context for `Harness`."""
    return _CHAT + json.dumps(messages, ensure_ascii=False)


class Harness(HFLM):
    """A model for the harness, which gets the same ids as in training.

    The harness's own encoding does not fit our models: it takes the text of a control token for the token,
    skips the word segmenter, moves white space from the end of a context into the answer, and adds no start
    token. Here a context is encoded as the beginning of a document or as a conversation, and an answer by
    itself, as stage 12 trains it.

    ``cut`` counts the requests whose beginning was left out because they were longer than the model's
    positions. ``shortened`` counts the requests whose answer was limited to half of the positions: the model
    may write no longer one, and judges none that is longer than all positions.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, batch_size: int, bf16: bool
    ) -> None:
        super().__init__(
            pretrained=model,
            backend="causal",
            tokenizer=tokenizer,
            batch_size=batch_size,
            mixed_precision_dtype="bfloat16" if bf16 else None,
            # In bf16, sums of log likelihoods would be rounded to eighths.
            softmax_dtype="float32",
        )
        self.cut = self.shortened = 0

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **_: Any,
    ) -> list[int]:
        """Ids of a context: of a document's beginning, or of a conversation from `as_context`.

        An answer that ends a conversation is the beginning of the answer to come (``gen_prefix`` of a task).
        """
        if string.startswith(_CHAT):
            messages = json.loads(string[1:])
            ids = encode_conversation(self.tokenizer, messages)[0]
            if messages[-1]["role"] == "assistant":
                ids.pop()  # the end token, which the template puts behind every answer
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
        return self.tok_encode(context), encode_text(self.tokenizer, continuation)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], *options: Any, **named: Any
    ) -> list[tuple[float, bool]]:
        """Log likelihoods of answers.

        The harness accepts no answer that is longer than the positions. Such a one is limited to half of
        them, and its value is multiplied by its tokens / the tokens that are left, so that scores by length
        stay comparable.
        """
        fitting, scales = [], []
        for texts, ids, answer in requests:
            kept = answer if len(answer) <= self.max_length else answer[: self.max_length // 2]
            self.shortened += len(kept) < len(answer)
            self.cut += len(ids) + len(kept) > self.max_length + 1
            fitting.append((texts, ids, kept))
            scales.append(len(answer) / len(kept))
        found = super()._loglikelihood_tokens(fitting, *options, **named)
        return [(value * scale, greedy) for (value, greedy), scale in zip(found, scales, strict=True)]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers of at most half of the model's positions, however long the task lets them be."""
        for request in requests:
            options = request.args[1]
            limits = normalize_gen_kwargs(options, self.max_gen_toks)["max_gen_toks"], self.max_length // 2
            options["max_gen_toks"] = min(limits)
            self.shortened += limits[0] > limits[1]
        return super().generate_until(requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log likelihood in nats of each whole text after the start token, in separate windows."""
        totals = []
        for request in requests:
            ids = encode_text(self.tokenizer, request.args[0])
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            parts = [(("", ""), *make_disjoint_window(window)) for window in windows]
            totals.append(sum(value for value, _ in self._loglikelihood_tokens(parts, disable_tqdm=True)))
        return totals

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as a context; `tok_encode` applies the template to it."""
        return as_context(chat_history)


@functools.cache
def _manager(folder: Path, with_defaults: bool = False) -> TaskManager:
    """The index of the tasks in a folder, and of all tasks of the harness, which takes ten seconds."""
    return TaskManager(include_path=str(folder), include_defaults=with_defaults)


def load_tasks(
    tasks: list[dict[str, Any]],
    evaluation: dict[str, Any] | None = None,
    skipped: dict[str, str] | None = None,
) -> TaskDict:
    """The tasks and groups as the harness runs them, with their data.

    tasks: as `recipe.evaluation.tasks.items.write_tasks` gives them. evaluation: the values of
    evaluation.json, which may let a task be left out when the harness cannot load it; the reason then goes to
    `skipped` under its name. Raises RecipeError for another task that the harness cannot load.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    ours = [dict(task) for task in tasks if "dataset_kwargs" in task]
    loaded: TaskDict = {"tasks": {}, "groups": {}, "group_map": {}}
    if ours:
        # Only the members of a group can change what a YAML file says.
        loaded["tasks"] |= _manager(task_files.OWN).load([{"group": "recipe", "task": ours}])["tasks"]
    for task in tasks:
        name = task["task"]
        if "dataset_kwargs" in task:
            continue
        try:
            own = task_files.single_tasks(name).keys() <= task_files.own_tasks().keys()
            found = _manager(task_files.OWN, with_defaults=not own).load(name)
        except Exception as error:  # anything: the data, Python functions and metrics of a task are not ours
            if skipped is not None and task_files.may_be_skipped(name, evaluation or {}):
                print(f"{name}: skipped: {type(error).__name__}: {error}", flush=True)
                # Without the message, which may hold paths of this machine.
                skipped[name] = f"lm-evaluation-harness cannot load it ({type(error).__name__})"
                continue
            raise RecipeError(
                f"evaluation.json: tasks.{name}: lm-evaluation-harness cannot load it: "
                f"{type(error).__name__}: {error}. Remove the task, or fix what the message names"
            ) from error
        for one in found["tasks"].values():
            if one.get_config("num_fewshot") is None or "num_fewshot" in task:
                one.set_config("num_fewshot", task.get("num_fewshot", 0))
        loaded["tasks"] |= found["tasks"]
        loaded["groups"] |= found.get("groups", {})
        loaded["group_map"] |= found.get("group_map", {})
    return loaded


def run_tasks(model: Harness, tasks: TaskDict, chat: bool = False, most: int | None = None) -> EvalResults:
    """What the harness found: ``results`` and ``groups`` with the metrics, ``samples`` with every answer.

    tasks: from `load_tasks`. chat: put prompts into the chat template, with shots as turns before them. most:
    the number of items of a task that are asked, the first ones; None for all.
    """
    if not tasks["tasks"]:
        return {"results": {}, "samples": {}}
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(SEED)
    results = evaluator.evaluate(
        lm=model,
        task_dict=tasks,
        limit=most,
        bootstrap_iters=BOOTSTRAP,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
    )
    assert results is not None  # None on ranks other than the first, and there is one
    return results


def scores_of(results: EvalResults) -> dict[str, Figures]:
    """The scores of every group that has one of its own, then of every task.

    results: from `run_tasks`. A group has the metric, interval and number of items that the harness gives it.
    """
    found = {name: scores(samples, results["results"][name]) for name, samples in results["samples"].items()}
    groups: dict[str, Figures] = {}
    for name, values in results.get("groups", {}).items():
        (metric, score, error), *others = _metrics(values)
        members = [(groups | found)[n] for n in results["group_subtasks"][name] if n in groups | found]
        groups[name] = {
            "metric": metric,
            "items": values["sample_len"],
            "score": score,
            **_interval(score, error),
            "share": all(member["share"] for member in members),
            "majority": None,
            "random": None,
        } | {other: value for other, value, _ in others}
    return groups | found


def scores(samples: list[Sample], values: dict[str, Any] | None = None) -> Figures:
    """The score of a task by its first metric, with its 95 % interval, and what guessing scores.

    samples: what the harness logged of the task's items. values: the metrics that the harness calculated from
    them; without it they are the means.

    ``share``: whether the score is a mean of values between 0 and 1, as accuracy is; ``low`` and ``high`` are
    then the interval of Wilson, otherwise 1.96 standard errors of the harness to both sides, or None where
    it gives no error. ``majority``: the score of always choosing the most frequent position of the right
    choice (of labels: the most frequent label); ``random``: of any choice. Both are None where there is
    nothing to choose from. The other metrics follow under their own names.
    """
    rows = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
    if values is None:
        means = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]["metrics"]}
        values = {f"{name},none": mean for name, mean in means.items()}
    (metric, score, error), *others = _metrics(values)
    first = metric.split(",")[0]
    parts = [row[first] for row in rows if first in row]
    share = all(isinstance(part, int | float) and 0 <= part <= 1 for part in parts)
    share = share and math.isclose(sum(parts) / len(parts), score, abs_tol=1e-9)
    bounds = dict(zip(("low", "high"), wilson(score, len(parts)), strict=True)) if share else None
    figures = {"metric": metric, "items": len(rows), "score": score}
    figures |= (bounds or _interval(score, error)) | {"share": share, "majority": None, "random": None}
    # For mutual information, the harness also asks for each choice without the question.
    asked_twice = MUTUAL_INFORMATION in rows[0]["metrics"]
    choices = [len(row["arguments"]) // (2 if asked_twice else 1) for row in rows]
    if max(choices) > 1:
        most = Counter(str(row["target"]) for row in rows).most_common(1)[0][1]
        figures |= {"majority": most / len(rows), "random": sum(1 / n for n in choices) / len(rows)}
    return figures | {other: value for other, value, _ in others}


def _metrics(values: dict[str, Any]) -> list[tuple[str, float, float | None]]:
    """The metrics of the harness's results, each with its standard error, or None where it has none.

    Mutual information is the first one. Their keys are ``metric,filter``; the filter is left out where there
    is only one.
    """
    keys = [key.split(",", 1) for key in values if "," in key and "_stderr," not in key]
    one = len({name for _, name in keys}) == 1
    found = []
    for metric, name in keys:
        error = values.get(f"{metric}_stderr,{name}")
        number = float(error) if isinstance(error, int | float) else None
        found.append((metric if one else f"{metric},{name}", float(values[f"{metric},{name}"]), number))
    return sorted(found, key=lambda row: not row[0].startswith(MUTUAL_INFORMATION))


def _interval(score: float, error: float | None) -> dict[str, float | None]:
    """The 95 % interval by the standard error."""
    if error is None:
        return {"low": None, "high": None}
    return {"low": score - Z * error, "high": score + Z * error}


def wilson(mean: float, count: int) -> tuple[float, float]:
    """The 95 % confidence interval of Wilson (1927) for a share of `count` items.

    For a mean of values between 0 and 1, whose variance is at most that of a share, it is wide enough, too.
    """
    centre = mean + Z**2 / (2 * count)
    spread = Z * (mean * (1 - mean) / count + Z**2 / (4 * count**2)) ** 0.5
    scale = 1 + Z**2 / count
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def answer_scores(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Exact match and F1 of characters, as the paper of JGLUE scores JSQuAD.

    The best of the right answers counts. Texts are compared after NFKC, in lower case, without white space
    and punctuation.
    """
    found = _plain(results[0])
    pairs = [(found, _plain(answer)) for answer in doc["answers"]]
    return {"exact_match": float(max(a == b for a, b in pairs)), "f1": max(_f1(a, b) for a, b in pairs)}


def _plain(text: str) -> str:
    return re.sub(r"[\W_]", "", unicodedata.normalize("NFKC", text).lower())


def _f1(found: str, expected: str) -> float:
    """The harmonic mean of precision and recall of characters, counted with repetition."""
    common = sum((Counter(found) & Counter(expected)).values())
    return 2 * common / (len(found) + len(expected)) if common else float(found == expected)


def scores_table(columns: dict[str, dict[str, Figures]]) -> str:
    """Scores as a Markdown table: a row per task, a column per model, and published models where known.

    columns: by the name of the column, what `scores` gives of each task; all have the same tasks.
    """
    tasks = next(iter(columns.values()))
    published = {m: known for m, known in task_files.PUBLISHED.items() if known.keys() & tasks.keys()}
    heads = ["task", "metric", "items", *(f"{name}, 95 % interval" for name in columns), *published]
    rows = []
    for name, figures in tasks.items():
        cells = [name, figures["metric"], f"{figures['items']:,}"]
        cells += [_score_cell(of_model[name]) for of_model in columns.values()]
        cells += [f"{known[name]:.1%}" if name in known else "" for known in published.values()]
        cells += ["" if figures[key] is None else f"{figures[key]:.1%}" for key in ("majority", "random")]
        rows.append(cells)
    lines = markdown_table([*heads, "majority", "random"], rows, "llr")
    if published:
        lines += [
            "",
            f"Published: {', '.join(published)} ({task_files.PUBLISHED_BY}), with other wordings of the "
            "prompts and all items. Compare the order of size, not the last digit.",
        ]
    return "\n".join(lines) + "\n"


def _score_cell(figures: Figures) -> str:
    """A score with its interval: a share in percent, any other metric as it is."""
    score, low, high = (
        None if value is None else f"{value:.1%}" if figures["share"] else f"{value:.4g}"
        for value in (figures["score"], figures["low"], figures["high"])
    )
    return f"{score} ({low} to {high})" if low else str(score)
