"""The keys of dataset.json and their checks."""

from __future__ import annotations

import math
import re
from typing import Any

from recipe.config.keys import check_keys, require, show, type_name
from recipe.config.ranges import (
    ABOVE_0,
    BELOW_1,
    BETWEEN_0_AND_1,
    FROM_0,
    FROM_1,
    HASH,
    SEED,
    check_ranges,
    one_of,
)
from recipe.corpus import rules, wikitext
from recipe.corpus.fetch import HASHES
from recipe.corpus.source_files import local_data_set
from recipe.corpus.sources import kind_of
from recipe.project import LONGEST_NAME, Refused, nearest

# The keys with their JSON types. Those of each kind of source are in `recipe.corpus.sources.KINDS`.
DATASET = {
    "sources": "dict",
    "layout": "str",
    "neologdn": "dict",
    "keep_wave_dash": "bool",
    "keep_dashes": "bool",
    "clean_characters": "bool",
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
TILDES = ("remove", "ignore", "normalize", "normalize_zenkaku")  # of neologdn
RANGES = {
    "layout": one_of("neologdn", "keep"),
    "minimum_characters": FROM_0,
    "minimum_japanese_share": BELOW_1,
    "valid_share": BETWEEN_0_AND_1,
    "disk_gigabytes": FROM_0,
}
NEOLOGDN_RANGES = {
    "repeat": FROM_0,
    "max_repeat_substr_length": FROM_0,
    "tilde": one_of(*TILDES),
}
SOURCE_RANGES = {
    "weight": ABOVE_0,
    "minimum_megabytes": FROM_0,
    "maximum_megabytes": ABOVE_0,
    "maximum_documents": ABOVE_0,
    "lines_per_document": ABOVE_0,
    "maximum_bad_share": BELOW_1,
}
MINHASH_RANGES = {"bands": HASH, "rows": HASH, "ngram": HASH, "seed": SEED}
ENGINE_RANGES = {"workers": FROM_1, "mem_per_cpu_gb": ABOVE_0}
MINHASH = {"bands": "int", "rows": "int", "ngram": "int", "seed": "int"}
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
        if len(name.encode()) > LONGEST_NAME:
            raise Refused(
                f"{here[:60]}...: the name becomes a file name: it has {len(name.encode())} bytes, expected "
                f"at most {LONGEST_NAME}"
            )
        require(source, ("source",), here)
        _check_source(source, here)
    if not values["sources"]:
        raise Refused(f"{where}: sources: empty, expected at least one source of text")
    if held_out_sources(values) == values["sources"].keys():
        raise Refused(f"{where}: sources: every source is held_out, so there is nothing to train on")
    check_ranges(values, RANGES, where)
    check_ranges(values.get("neologdn", {}), NEOLOGDN_RANGES, f"{where}: neologdn")
    if values.get("layout") == "keep":
        _check_kept_layout(values, where)
    for kind, changes in values.get("rules", {}).items():
        rules.check_rules(kind, changes, f"{where}: rules.{kind}")
        if not any(source.get("rules") == kind for source in values["sources"].values()):
            raise Refused(
                f'{where}: rules.{kind}: no source has this set of rules. Add "rules": {show(kind)} to a '
                "source, or remove it"
            )
    check_keys(values.get("minhash") or {}, MINHASH, f"{where}: minhash")
    check_ranges(values.get("minhash") or {}, MINHASH_RANGES, f"{where}: minhash")
    _check_engine(values.get("engine", {}), f"{where}: engine")


def held_out_sources(values: dict[str, Any]) -> set[str]:
    """The names of the sources that no stage trains on. values: of dataset.json."""
    return {name for name, source in values["sources"].items() if source.get("held_out")}


def _check_kept_layout(values: dict[str, Any], where: str) -> None:
    """Refuse what changes the layout or belongs to neologdn's rules. Raises Refused."""
    without = [f"neologdn.{key}" for key in values.get("neologdn", {}) if key != "tilde"]
    without += ["keep_dashes"] if values.get("keep_dashes") is False else []
    if without:
        raise Refused(
            f"{where}: {without[0]} does nothing with layout: keep, which leaves spaces, repeats and dashes "
            "as they are. Leave it out, or write layout: neologdn"
        )


def _check_source(source: dict[str, Any], here: str) -> None:
    kind = kind_of(source, here)
    check_keys(source, SOURCE | kind.required | kind.optional, here)
    require(source, tuple(kind.required), here)
    if kind.download == "url" and ("paths" in source) == ("url" in source):
        raise Refused(f"{here}: expected either `paths` (your own files) or `url`")
    if "paths" in source:
        for key in source.keys() & HASHES.keys():
            raise Refused(
                f"{here}: {key}: checks what is downloaded from `url`, and does nothing with `paths`. Remove "
                "it: stage 01 records the hashes of your own files"
            )
    if "revision" in source and local_data_set(source):
        raise Refused(
            f"{here}: revision: {show(source['revision'])}, but {source['dataset']} is a folder of this "
            "machine. Remove it"
        )
    for key in ("paths", "packages", "url"):
        entries = source.get(key, [""])
        if not entries or not all(isinstance(entry, str) for entry in entries):
            raise Refused(f"{here}: {key}: {show(entries)}, expected one or more strings")
    if kind.download == "index":
        _check_sdist(source, here)
    if kind.learn is not None:
        _check_templates(source.get("templates", {}), f"{here}: templates")
    if source.get("rules") is not None:
        rules.check_rules(source["rules"], {}, f"{here}: rules")
    check_ranges(source, SOURCE_RANGES, here)
    least, most = source.get("minimum_megabytes", 0), source.get("maximum_megabytes", math.inf)
    if least > most:
        raise Refused(f"{here}: minimum_megabytes: {least}, expected at most maximum_megabytes, {most}")


def _check_templates(values: dict[str, Any], where: str) -> None:
    """Check how templates of Wikipedia are read. Raises Refused."""
    known = [*wikitext.TEMPLATES, *wikitext.COMPUTED, *map(wikitext.template_name, values)]
    names: dict[str, str] = {}
    for name, form in values.items():
        here = f"{where}.{name}"
        if not wikitext.template_name(name):
            raise Refused(f"{here}: expected the name of a template")
        other = names.setdefault(wikitext.template_name(name), name)
        if other != name:
            raise Refused(f"{here}: the same template as {other!r}. Keep one")
        if type(form) not in (int, str) or (type(form) is int and form < 1):
            raise Refused(
                f"{here}: {show(form)}, expected the number of the parameter that is shown (from 1), a form "
                'such as "{1}（{2}）", or the name of a template that is read in the same way'
            )
        if isinstance(form, str) and ("{" in form or "}" in form):
            if re.search(r"[{}]", re.sub(r"\{[^{}|]+(?:\|[^{}|]+)*\}", "", form)):
                raise Refused(
                    f"{here}: {show(form)}, expected each parameter in braces, as in {{1}} or {{label|1}}"
                )
        elif form and isinstance(form, str) and wikitext.template_name(form) not in known:
            raise Refused(
                f"{here}: no template {show(form)} is known, and the form has no parameter in braces."
                f"{nearest(wikitext.template_name(form), known)}"
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
    check_ranges(values, ENGINE_RANGES, where)
