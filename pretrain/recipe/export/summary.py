"""The table of finished stages that `run_all.sh` prints at its end."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from recipe.config.recipe import load_recipe, recipe_options
from recipe.conversations.preferences import skipped_stages
from recipe.endings import errors_in_one_line
from recipe.project import OUTPUTS, RECORD, ROOT, known_record

KEYS = ("stage", "seconds", "peak_memory_bytes", "headline")


def summary(recipe: str, config: dict[str, Any]) -> str:
    """The finished stages of a recipe with seconds, peak memory and result; then the files to look at.

    config: the whole recipe. What is left of stages that it no longer has is not shown.
    """
    rows, skipped = [], skipped_stages(config)
    paths = sorted(OUTPUTS.joinpath(recipe).glob(f"[0-9]*/{RECORD}"))
    known = (known_record(path.parent, *KEYS) for path in paths if path.parent.name not in skipped)
    records = [record for record in known if record]
    for done, headline in zip(records, headlines(records), strict=True):
        memory = f"{done['peak_memory_bytes'] / 2**20:,.0f} MiB"
        rows.append((done["stage"], f"{done['seconds']:.1f}", memory, headline))
    lines = [f"{'stage':15} {'seconds':>8} {'peak memory':>12}  result"]
    lines += [
        f"{stage:15} {seconds:>8} {memory:>12}  {headline}" for stage, seconds, memory, headline in rows
    ]
    lines.append(f"{'total':15} {sum(float(row[1]) for row in rows):>8.1f}")
    download = OUTPUTS / recipe / "01_download"
    if done := known_record(download, "figures"):
        seconds = done["figures"]["download_seconds"]
        lines.append(f"{'of this':15} {seconds:>8.1f} {'':>12}  spent downloading")
    folder = OUTPUTS / recipe
    files = (path for kind in ("png", "md") for path in folder.glob(f"[0-9]*/*.{kind}"))
    shown = sorted(path for path in files if path.parent.name not in skipped)
    if shown:
        lines += ["", "pictures and samples:"] + [f"  {path.relative_to(ROOT)}" for path in shown]
    return "\n".join(lines)


def headlines(records: list[dict[str, Any]]) -> list[str]:
    """The result of each stage in one line, with a note where it is older than what it was made from.

    records: the ``stage.json`` of the finished stages, in their order.
    """
    newer = outdated(records)
    return [
        record["headline"] + (f" (older than {newer[stage]})" if (stage := record["stage"]) in newer else "")
        for record in records
    ]


def outdated(records: list[dict[str, Any]]) -> dict[str, str]:
    """The stages that are older than an earlier stage that they read, also indirectly, and the name of that.

    Downloads do not count: equal data that were downloaded again change nothing.
    """
    found: dict[str, str] = {}
    finished = {r["stage"]: datetime.fromisoformat(r["finished"]) for r in records if "finished" in r}
    for record in records:
        stage = record["stage"]
        for name in sorted(record.get("wanted", {}).get("inputs", {})):
            if name == "01_download" or stage not in finished or name not in finished:
                continue
            if finished[name] > finished[stage] or name in found:
                found[stage] = found.get(name, name)
    return found


if __name__ == "__main__":
    arguments = recipe_options(__doc__).parse_args()
    with errors_in_one_line("summary"):
        print(summary(arguments.recipe, load_recipe(arguments.recipe, arguments.overrides)))
