"""The keys of dataset.json and their checks."""

from __future__ import annotations

import math
import re
from typing import Any

from recipe.config.keys import check_keys, nearest, require, show, type_name
from recipe.corpus import rules
from recipe.corpus.sources import kind_of
from recipe.project import Refused

# The keys with their JSON types. Those of each kind of source are in `recipe.corpus.sources.KINDS`.
DATASET = {
    "sources": "dict",
    "neologdn": "dict",
    "keep_wave_dash": "bool",
    "nfkc": "bool",
    "minimum_characters": "int",
    "minimum_japanese_share": "float",
    "rules": "dict",
    "minhash": "dict|null",
    "valid_share": "float",
    "disk_gigabytes": "float",
    "engine": "dict",
}
NEOLOGDN = {"repeat": "int", "remove_space": "bool", "max_repeat_substr_length": "int", "tilde": "str"}
# Of every source.
SOURCE = {
    "source": "str",
    "held_out": "bool",
    "rules": "str|null",
    "weight": "float",
    "licence": "str",
    "minimum_megabytes": "float",
    "maximum_megabytes": "float",
    "maximum_documents": "int",
    "maximum_bad_share": "float",
}
MINHASH = {"bands": "int", "rows": "int", "ngram": "int", "seed": "int"}
TILDES = ("remove", "ignore", "normalize", "normalize_zenkaku")  # of neologdn
ENGINES = {
    "local": {"workers": "int"},
    "slurm": {
        "workers": "int",
        "partition": "str",
        "time": "str",
        "mem_per_cpu_gb": "int",
        "env_command": "str",
        "sbatch_args": "dict",
    },
    "ray": {"workers": "int", "address": "str", "mem_per_cpu_gb": "float"},
}


def check_dataset(values: dict[str, Any], where: str) -> None:
    """Check the values of a dataset.json. Raises Refused at the first fault."""
    check_keys(values, DATASET, where)
    require(values, ("sources",), where)
    check_keys(values.get("neologdn", {}), NEOLOGDN, f"{where}: neologdn")
    for name, source in values["sources"].items():
        here = f"{where}: sources.{name}"
        if not isinstance(source, dict):
            raise Refused(
                f"{here}: {show(source)} is {type_name(source)}, expected an object with the key `source`"
            )
        if not name.replace("-", "").replace("_", "").isalnum():
            raise Refused(f"{here}: the name becomes a file name: use letters, digits, - and _")
        require(source, ("source",), here)
        _check_source(source, here)
    if not values["sources"]:
        raise Refused(f"{where}: sources: empty, expected at least one source of text")
    if not any(not source.get("held_out") for source in values["sources"].values()):
        raise Refused(f"{where}: sources: every source is held_out, so there is nothing to train on")
    for key in ("minimum_japanese_share", "valid_share"):
        if not 0 <= values.get(key, 0) < 1:
            raise Refused(f"{where}: {key}: {values[key]}, expected 0 or more and below 1")
    for kind, changes in values.get("rules", {}).items():
        rules.check_rules(kind, changes, f"{where}: rules.{kind}")
    check_keys(values.get("minhash") or {}, MINHASH, f"{where}: minhash")
    for key, value in (values.get("minhash") or {}).items():
        least = 0 if key == "seed" else 1
        if not least <= value < 2**32:
            raise Refused(
                f"{where}: minhash: {key}: {value}, expected a whole number from {least} to 2^32 - 1"
            )
    for key, value in values.get("neologdn", {}).items():
        if key in ("repeat", "max_repeat_substr_length") and value < 0:
            raise Refused(f"{where}: neologdn: {key}: {value}, expected 0 or more")
    tilde = values.get("neologdn", {}).get("tilde", "ignore")
    if tilde not in TILDES:
        raise Refused(f"{where}: neologdn: tilde: {show(tilde)}, expected one of {', '.join(TILDES)}")
    _check_engine(values.get("engine", {}), f"{where}: engine")


def _check_source(source: dict[str, Any], here: str) -> None:
    kind = kind_of(source, here)
    check_keys(source, SOURCE | kind.required | kind.optional, here)
    require(source, tuple(kind.required), here)
    if kind.download == "url" and ("paths" in source) == ("url" in source):
        raise Refused(f"{here}: expected either `paths` (your own files) or `url`")
    for key in ("paths", "packages"):
        entries = source.get(key, [""])
        if not entries or not all(isinstance(entry, str) for entry in entries):
            raise Refused(f"{here}: {key}: {show(entries)}, expected one or more strings")
    if kind.download == "index":
        _check_sdist(source, here)
    if source.get("rules") is not None:
        rules.check_rules(source["rules"], {}, f"{here}: rules")
    for key in ("weight", "maximum_megabytes", "maximum_documents", "lines_per_document"):
        if source.get(key, 1) <= 0:
            raise Refused(f"{here}: {key}: {source[key]}, expected more than 0")
    least, most = source.get("minimum_megabytes", 0), source.get("maximum_megabytes", math.inf)
    if least > most:
        raise Refused(f"{here}: minimum_megabytes: {least}, expected at most maximum_megabytes, {most}")
    if not 0 <= source.get("maximum_bad_share", 0) < 1:
        raise Refused(
            f"{here}: maximum_bad_share: {source['maximum_bad_share']}, expected 0 or more and below 1"
        )


def _check_sdist(source: dict[str, Any], here: str) -> None:
    """Check the keys of a source distribution in the package index. Raises Refused."""
    if not re.fullmatch(r"[\w.-]+==[\w.!+]+", source["requirement"]):
        raise Refused(f"{here}: requirement: {show(source['requirement'])}, expected PROJECT==VERSION")
    if not re.fullmatch(r"[0-9a-fA-F]{64}", source["sha256"]):
        raise Refused(f"{here}: sha256: {show(source['sha256'])}, expected 64 hexadecimal digits")


def _check_engine(values: dict[str, Any], where: str) -> None:
    executor = values.get("executor", "local")
    if not isinstance(executor, str) or executor not in ENGINES:
        raise Refused(
            f"{where}: executor: unknown {show(executor)}.{nearest(str(executor), ENGINES)} "
            f"Known: {', '.join(ENGINES)}"
        )
    check_keys(values, ENGINES[executor] | {"executor": "str"}, where)
    if executor == "slurm":
        require(values, ("partition", "time"), where)
    if values.get("workers", 1) < 1:
        raise Refused(f"{where}: workers: {values['workers']}, expected 1 or more")
