"""The model card, written from what the stages measured, and the upload to the hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from recipe.config.model import model_values
from recipe.corpus.sources import licence
from recipe.export.html_report import flat_figures
from recipe.project import (
    RECORD,
    RecipeError,
    listed,
    markdown_table,
    read_record,
    require_space,
    share_blocks,
)

# The files of a model folder that AutoModelForCausalLM and AutoTokenizer load.
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
_STAGES = {
    "05_pretrain": ("Pretraining", "pretrain"),
    "12_finetune": ("Tuning on instructions", "finetune"),
    "13_preference": ("Tuning on preferences", "preference"),
}
_USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({name!r})
model = AutoModelForCausalLM.from_pretrained({name!r})
{ask}
print(tokenizer.decode(model.generate(**inputs, max_new_tokens={length})[0]))
```"""
_LIMITS = (
    "Its texts were not checked for truth, bias or harm. Expect fluent false statements, more of them the "
    "smaller the model is. The figures below were measured; nothing else is claimed."
)
_NORMALISING = ("layout", "neologdn", "keep_wave_dash", "keep_dashes", "clean_characters", "nfkc")
_CHAT = """messages = [{{"role": "user", "content": {question}}}]
inputs = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)"""
_CONTINUE = """inputs = tokenizer({prompt}, return_tensors="pt")"""


def copy_curves(folders: dict[str, Path], target: Path) -> None:
    """Copy the learning curve of each stage that trained to ``<target>/<stage>.png``, for the card."""
    for stage in _STAGES.keys() & folders.keys():
        shutil.copy(folders[stage] / "learning_curve.png", target / f"{stage}.png")


def copy_model(source: Path, target: Path) -> None:
    """Copy the files of a model folder, so that an edited copy changes nothing in `source`.

    Raises Refused when the disk has no room for the copies.
    """
    paths = [path for pattern in MODEL_FILES for path in source.glob(pattern)]
    require_space(target, sum(path.stat().st_size for path in paths), f"copying {source}")
    for path in paths:
        if not share_blocks(path, target / path.name):
            shutil.copyfile(path, target / path.name)


def model_card(
    name: str, repository: str, config: dict[str, dict[str, Any]], folders: dict[str, Path]
) -> str:
    """The README.md of a model folder: data, training, evaluation and samples, all as measured.

    name: the title. repository: the name on the hub to load the model from; empty for the folder of the card.
    config: the recipe. folders: the finished stages by name: 02, 03, 05, 06 and 07, and for a tuned model
    also 11, 12 or 13 or both, 14 and 15. Raises Refused when a stage.json cannot be read.
    """
    records = {stage: read_record(folder, "figures", "headline") for stage, folder in folders.items()}
    tuned = "15_generate" in folders
    sections = [
        _front_matter(),
        f"# {name}",
        _summary(config, records),
        "## Use\n\n" + _use(repository, config, tuned),
        "## Limits\n\n" + _LIMITS,
        "## Data\n\n" + _data(config, folders, records),
        "## Tokenizer\n\n" + records["03_tokenizer"]["headline"],
        "## Training\n\n" + _training(config, records),
        "## Evaluation\n\n" + _measured(folders, ("06_evaluate", "14_evaluate")),
        "## Samples\n\nBefore and after, not selected: every prompt of the recipe, with one seed.\n\n"
        + _measured(folders, ("07_generate", "15_generate")),
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter() -> str:
    """The metadata for the hub. It names no licence: who publishes the model decides that."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(language="ja", library_name="transformers", pipeline_tag="text-generation")
    return f"---\n{data.to_yaml().strip()}\n---"


def _experts(trained: dict[str, Any]) -> str:
    active = trained["figures"]["active"].get("active_parameters")
    return f" ({active:,} active for a token)" if active else ""


def _summary(config: dict[str, dict[str, Any]], records: dict[str, dict[str, Any]]) -> str:
    trained = records["05_pretrain"]
    started = trained["figures"].get("initial_model")
    origin = ""
    if started:
        version = started["commit"] or started["revision"]
        origin = (
            f" It started from {started['name']}{f' ({version})' if version else ''}, "
            f"with {started['new_pieces']:,} new tokens in its vocabulary."
        )
        changed = [
            f"{key} from {json.dumps(old)} to {json.dumps(new)}"
            for key, (old, new) in started.get("context", {}).items()
        ]
        origin += f" Its context was changed: {', '.join(changed)}." if changed else ""
    parts = [
        f"A Japanese language model: {model_values(config).get('model_type', 'published')}, "
        f"{trained['figures']['active']['parameters']:,} parameters{_experts(trained)}, pretrained in this "
        f"recipe on {trained['figures']['tokens']:,} tokens.{origin}"
    ]
    titles = {stage: title for stage, (title, _) in _STAGES.items()} | {"14_evaluate": "Held-out questions"}
    lines = [
        f"- {title}: {records[stage]['headline']}" for stage, title in titles.items() if stage in records
    ]
    parts.append("\n".join(lines))
    versions = ", ".join(f"{name} {version}" for name, version in trained["versions"].items())
    parts.append(
        f"Made {trained['finished'][:10]} from commit {trained['commit'] or 'unknown'} ({versions})."
    )
    return "\n\n".join(parts)


def _use(repository: str, config: dict[str, dict[str, Any]], tuned: bool) -> str:
    values = config["generation"]
    text = f"With transformers 4.57 or 5{'' if repository else ', in the folder of this card'}:\n\n"
    if tuned:
        question = (values.get("questions") or values["prompts"])[0]
        ask = _CHAT.format(question=json.dumps(question, ensure_ascii=False))
    else:
        ask = _CONTINUE.format(prompt=json.dumps(values["prompts"][0], ensure_ascii=False))
    text += _USE.format(name=repository or ".", ask=ask, length=values["max_new_tokens"])
    rules = {key: v for key, v in config["dataset"].items() if key in _NORMALISING}
    by = "character by character" if rules.get("layout") == "keep" else "by neologdn"
    text += f"\n\nThe training text was normalised {by}"
    text += f" ({json.dumps(rules)[1:-1]})" if rules else ""
    text += (
        ". In questions, write kana full-width, letters and digits in ASCII; `chat.py` of the recipe does."
        if tuned
        else ". Normalise your prompts in the same way."
    )
    segmenter = config["tokenizer"].get("segmenter")
    if segmenter:
        text += f" Its words were separated by {segmenter}. Separate the words of your prompts, too."
    return text


def _data(
    config: dict[str, dict[str, Any]], folders: dict[str, Path], records: dict[str, dict[str, Any]]
) -> str:
    """The sources: licence, what was kept, why the rest was dropped. Also the instruction pairs."""
    rows = []
    for name, counts in records["02_dataset"]["figures"].items():
        documents = counts["documents"]
        dropped = listed(documents["dropped"])
        numbers = [f"{documents['in']:,}", f"{documents['out']:,}", f"{counts['bytes']['out'] / 1e6:,.2f}"]
        rows.append([name, licence(config["dataset"]["sources"][name]), *numbers, dropped])
    lines = markdown_table(("source", "licence", "documents", "kept", "MB kept", "dropped"), rows, "llrrrl")
    if "11_dataset" in folders:
        lines += [
            "",
            "### Instructions",
            "",
            (folders["11_dataset"] / "funnel.md").read_text("utf-8").strip(),
        ]
    for name, counts in records.get("13_preference", {}).get("figures", {}).get("pairs", {}).items():
        lines += ["", f"Preferences, {name}: {counts['out']:,} of {counts['in']:,} kept."]
    return "\n".join(lines)


def _training(config: dict[str, dict[str, Any]], records: dict[str, dict[str, Any]]) -> str:
    """For each stage that trained: the learning curve, what was really active, the settings."""
    parts = []
    for stage, (title, file) in _STAGES.items():
        if stage in records:
            figures = records[stage]["figures"]
            active = markdown_table(("active", ""), flat_figures(figures.get("active") or {}), "l")
            parts.append(f"### {title}\n\n![learning curve]({stage}.png)")
            parts.append("\n".join(active))
            settings = {
                key: value for key, value in config[file].items() if key not in ("pairs", "hub_model_id")
            }
            parts.append(_json_block(settings))
    return "\n\n".join([*parts, "### model.json", _json_block(model_values(config))])


def _json_block(value: Any) -> str:
    return f"```json\n{json.dumps(value, ensure_ascii=False, indent=2)}\n```"


def _measured(folders: dict[str, Path], stages: tuple[str, ...]) -> str:
    """The texts that these stages wrote."""
    parts = []
    for stage in stages:
        if stage in folders:
            texts = [path.read_text("utf-8").strip() for path in sorted(folders[stage].glob("*.md"))]
            parts += [f"### {stage}", *texts]
    return "\n\n".join(parts)


def push(folder: Path, repository: str, private: bool) -> str:
    """Upload a folder to a model repository of the hub; returns the address of the commit.

    The repository is created if it does not exist. The token is HF_TOKEN, or that of `hf auth login`. Raises
    RecipeError when the hub refuses or cannot be reached, and for a public repository where `private` is
    asked for.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    network_error = HfHubHTTPError.__bases__[0]  # of httpx2, or of httpx with huggingface_hub 1
    api = HfApi()
    try:
        repository = api.create_repo(repository, private=private, exist_ok=True).repo_id  # with its owner
        # A repository that exists stays as it is.
        if private and not api.repo_info(repository).private:
            raise RecipeError(
                f"push to {repository!r}: this repository is public, and the model would be, too. Make it "
                'private, give another name (hub_model_id), or write "hub_private_repo": false'
            )
        done = api.upload_folder(
            folder_path=folder,
            repo_id=repository,
            commit_message="Upload of a recipe's model",
            ignore_patterns=[".*", RECORD],
        )
    except (HfHubHTTPError, HFValidationError, network_error, OSError) as error:
        raise RecipeError(
            f"push to {repository!r} failed: {error}. Check the name, the network and the token "
            "(`hf auth login`, or HF_TOKEN)"
        ) from error
    return str(done.commit_url)
