"""configs/README.md: it lists every key that the checks accept, with its type, and no other."""

import json
import re
from dataclasses import replace

import pytest
from recipe.config import (
    dataset,
    evaluation,
    generation,
    instruction,
    phases,
    preference,
    tokenizer,
    training,
)
from recipe.config.keys import ELSEWHERE, known_keys
from recipe.config.model import check_model, model_values
from recipe.config.optimizers import OPTIMIZERS
from recipe.config.recipe import check_recipe, load_recipe, recipes
from recipe.config.rewards import REWARDS
from recipe.corpus.rules import RULES
from recipe.project import CONFIGS
from recipe.run import fitting, preflight
from recipe.run.launch_options import Launch
from recipe.run.memory import memory, shape_of

TEXT = (CONFIGS / "README.md").read_text("utf-8")
A100 = fitting.Device("80 GB A100", 80, 312e12, True)


def rows(heading, column):
    """The cells of the table under a heading whose first column has this title."""
    section = re.split(r"^#+ ", TEXT.partition(f"# {heading}\n")[2], maxsplit=1, flags=re.M)[0]
    found, inside = [], False
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")] if line.startswith("|") else []
        inside = bool(cells) and (inside or cells[0] == column)
        if inside and re.match(r"\[?`", cells[0]):
            found.append(cells)
    return found


TABLES = {
    "dataset.json": dataset.DATASET,
    "dataset.json: neologdn": dataset.NEOLOGDN,
    "dataset.json: sources": dataset.SOURCE,
    "dataset.json: minhash": dataset.MINHASH,
    "tokenizer.json": tokenizer.KEYS
    | tokenizer.TRAINED_KEYS
    | {key: type_ for kind in tokenizer.TOKENIZER_KINDS.values() for key, type_ in kind.keys.items()},
    "Our keys of all three": training.TRAINING,
    "All three: spikes": training.SPIKES,
    "pretrain.json": training.PRETRAINING,
    "pretrain.json: phases": phases.PHASE,
    "finetune.json": training.TUNING,
    "finetune.json: lora": training.LORA,
    "preference.json": preference.PREFERENCE,
    "evaluation.json": evaluation.EVALUATION,
    "generation.json": generation.GENERATION,
    "instruction.json": instruction.INSTRUCTION,
    "instruction.json: pairs": instruction.PAIRS,
}


@pytest.mark.parametrize("heading", TABLES)
def test_every_key_of_ours_is_listed_with_its_type_and_no_other(heading):
    listed = {cells[0].strip("`"): cells[1].replace(" or ", "|") for cells in rows(heading, "key")}
    assert listed == TABLES[heading]


def test_the_keys_of_every_executor_are_listed():
    listed = {cells[0].strip("`") for cells in rows("dataset.json: engine", "key")}
    assert listed == {"executor", *(key for keys in dataset.ENGINES.values() for key in keys)}


def test_every_kind_of_tokenizer_is_listed_with_its_keys():
    kinds = {cells[0].split("`")[1]: cells[2] for cells in rows("tokenizer.json", "kind of tokenizer")}
    found = {name: re.findall(r"`(\w+)`", keys) for name, keys in kinds.items()}
    assert found == {name: list(kind.keys) for name, kind in tokenizer.TOKENIZER_KINDS.items()}


def test_every_reward_is_listed_with_its_options():
    listed = {}
    for cells in rows("preference.json: rewards", "reward"):
        found = re.findall(r"(\[?)`(\w+)`\]? \((\w+)\)", cells[1])
        listed[cells[0].strip("`")] = {name: (kind, not bracket) for bracket, name, kind in found}
    assert listed == {
        name: {option: (kind, option in reward.required) for option, kind in reward.options.items()}
        for name, reward in REWARDS.items()
    }


def test_every_rule_is_listed_with_its_threshold():
    listed = {cells[0].strip("`"): float(cells[1]) for cells in rows("dataset.json: rules", "key")}
    assert listed == RULES["web"]


def test_refused_native_keys_are_listed_with_the_reason():
    heading = "Native keys that are refused"
    refused = {cells[0].strip("`"): cells[1] for cells in rows(heading, "refused key")}
    assert refused == ELSEWHERE | training.UNFIT
    alone = {cells[0].strip("`") for cells in rows(heading, "key")}
    assert alone == training.NEEDS.keys()


def test_native_keys_that_are_named_exist_and_every_optimizer_is_named():
    names = [cells[0] for cells in rows("pretrain.json, finetune.json, preference.json", "native key")]
    named = {key for cell in names for key in re.findall(r"`(\w+)`", cell)}
    assert len(named) > 10 and named <= known_keys()["training_arguments"].keys() - ELSEWHERE.keys()
    assert {name for name in OPTIMIZERS if f"`{name}`" not in TEXT} <= {"muon"}
    assert {kind for kind in known_keys()["model"] if f"`{kind}`" not in TEXT} == set()


def test_the_table_of_recipes_has_their_real_figures():
    found = {re.search(r"`([\w-]+)`", cells[0])[1]: cells for cells in rows("The recipes", "recipe")}
    assert found.keys() == set(recipes())
    for name, (_, shown, parameters, block, _, disk, peak, _) in found.items():
        config = load_recipe(name)
        shape = shape_of(model_values(config), preflight.vocabulary_of("unknown", config)[0])
        setting = fitting.setting_of(config["pretrain"], A100, Launch())
        assert int(parameters.replace(",", "")) == shape.parameters, name
        assert int(block.replace(",", "")) == config["pretrain"]["block_size"], name
        assert float(disk.split()[0]) == config["dataset"].get("disk_gigabytes", 0.3), name
        compiled = memory(shape, replace(setting, compiled=True))["peak"] / fitting.GIB
        assert float(peak.split()[0]) == pytest.approx(compiled, abs=0.051), name
        size = re.search(r"(\d+) layers of ([\d,]+)", shown)
        if size:
            assert (int(size[1]), int(size[2].replace(",", ""))) == (shape.layers, shape.hidden), name


def test_links_lead_to_headings_and_files():
    anchors = {
        re.sub(r"[^\w -]", "", line).replace(" ", "-").lower()
        for line in re.findall(r"^#+ (.+)$", TEXT, re.M)
    }
    for target in re.findall(r"\]\(#([^)]+)\)", TEXT):
        assert target in anchors, target
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)\)", TEXT):
        assert target.startswith("../") or (CONFIGS / target).exists(), target


def test_the_examples_are_accepted():
    examples = map(json.loads, re.findall(r"```json\n(.*?)```", TEXT, re.S))
    pretrain, sources, context, with_phases, preference, evaluation = examples
    check_model(context, "model.json")
    tiny = load_recipe("tiny")
    tiny["pretrain"] |= with_phases
    check_recipe(tiny, "configs/tiny")
    config = load_recipe(pretrain.pop("extends"), re.findall(r"--set (\w+\.\S+=\S+)$", TEXT, re.M))
    config["pretrain"] |= pretrain
    config |= {"dataset": sources, "evaluation": evaluation, "preference": preference}
    check_recipe(config, "configs/x")
