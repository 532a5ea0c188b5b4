"""Which keys of a recipe can change a result, and so make a finished stage stale."""

from __future__ import annotations

from typing import Any

# Keys that cannot change a result, so that no stage becomes stale. A name that ends with * is a prefix.
NOT_DECIDING = (
    "logging_*",
    "log_*",
    "report_to",
    "run_name",
    "dataloader_num_workers",
    "dataloader_persistent_workers",
    "dataloader_prefetch_factor",
    "save_steps",
    "save_strategy",
    "save_total_limit",
    "keep_checkpoints",
    "push_to_hub",  # a fact of stage 16 (recipe/run/freshness.py)
    "hub_*",
    "project",
    "sample_steps",
    "compare",  # of tokenizer.json: rows of a report
    "ddp_timeout",
    # How a step is computed: the global batch stays the same.
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "eval_accumulation_steps",
    "torch_empty_cache_steps",
    "ddp_bucket_cap_mb",
    "activation_checkpointing*",
)
# The same for a source in dataset.json. Its weight is a fact of the stages that draw documents by it
# (recipe/run/freshness.py). Its licence is text of the model card.
NOT_DECIDING_OF_SOURCE = ("minimum_megabytes", "weight", "licence")
# The files in which null means the same as no key, except for `NULL_DECIDES`.
TRAINING_FILES = ("pretrain", "finetune", "preference")
NULL_DECIDES = ("spikes",)  # null: no step is a spike
# The keys of generation.json that a stage does not read.
NOT_READ = {
    "07_generate": ("questions",),
    "14_evaluate": ("prompts", "questions"),
    "15_generate": ("prompts",),
}


def deciding_config(stage: str, config: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """`deciding_keys` of each of a recipe's files, for one stage. config: the values by file."""
    return {
        section: {
            key: value
            for key, value in deciding_keys(section, values).items()
            if _is_read(stage, section, key)
        }
        for section, values in config.items()
    }


def _is_read(stage: str, section: str, key: str) -> bool:
    """Whether a stage reads a key of a file that decides its result."""
    if section == "generation":
        return key not in NOT_READ.get(stage, ())
    # All other keys of dataset.json are for what is done with the downloaded files.
    return (stage, section) != ("01_download", "dataset") or key == "sources"


def deciding_keys(section: str, values: dict[str, Any]) -> dict[str, Any]:
    """The part of a recipe's file that can change a result. A stage is stale when this part has changed.

    section: the file's name, such as ``pretrain``. values: also this part as an earlier release recorded it,
    which may hold keys that no longer decide.
    """
    if section == "dataset":
        sources = {
            name: {key: value for key, value in spec.items() if key not in NOT_DECIDING_OF_SOURCE}
            for name, spec in values["sources"].items()
        }
        kept = {key: value for key, value in values.items() if key not in ("engine", "disk_gigabytes")}
        # An earlier source has priority when duplicates are dropped.
        return {"order": list(sources)} | kept | {"sources": sources}

    def decides(key: str) -> bool:
        if section in TRAINING_FILES and values[key] is None and key not in NULL_DECIDES:
            return False
        return not any(
            key == name or (name[-1] == "*" and key.startswith(name[:-1])) for name in NOT_DECIDING
        )

    return {key: value for key, value in values.items() if decides(key)}
