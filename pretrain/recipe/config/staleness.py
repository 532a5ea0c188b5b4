"""Which keys of a recipe can change a result."""

from __future__ import annotations

from typing import Any

# Keys that cannot change a result: a change never makes a stage stale. Prefixes end with *.
NOT_DECIDING = (
    "logging_*",
    "log_*",
    "report_to",
    "run_name",
    "disable_tqdm",
    "dataloader_num_workers",
    "dataloader_persistent_workers",
    "dataloader_prefetch_factor",
    "save_total_limit",
    "push_to_hub",  # stage 16 names it among its facts
    "hub_*",
    "project",
    "sample_steps",
)


# The same of a source in dataset.json: weights are facts of the stages that draw by them
# (recipe/run/freshness.py).
NOT_DECIDING_OF_SOURCE = ("minimum_megabytes", "weight")


def deciding_keys(section: str, values: dict[str, Any]) -> dict[str, Any]:
    """The part of a file that can change a result: what a stage's freshness is judged by."""
    if section == "dataset":
        sources = {
            name: {key: value for key, value in spec.items() if key not in NOT_DECIDING_OF_SOURCE}
            for name, spec in values["sources"].items()
        }
        # Their order is their priority in deduplication.
        kept = {key: value for key, value in values.items() if key not in ("engine", "disk_gigabytes")}
        return kept | {"sources": sources, "order": list(sources)}

    def decides(key: str) -> bool:
        return not any(
            key == name or (name[-1] == "*" and key.startswith(name[:-1])) for name in NOT_DECIDING
        )

    return {key: value for key, value in values.items() if decides(key)}
