"""A finished training whose length was raised: what counts as that, from where it goes on, and refusals."""

import copy
import json

import pytest
from recipe.config.schedules import SCHEDULES, same_rates_until
from recipe.project import Refused
from recipe.run.extension import find_extension, prepare_extension, raised_length
from recipe.training.checkpoints import delete_old, write_manifest
from recipe.training.expert_load import EXPERTS

FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
SHARE, STEPS = ({"phases": [{"until_step": end, "block_size": 64}, {}]} for end in (0.6, 60))
WSD = {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 30}}


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ({"max_steps": 100}, {"max_steps": 200}, "max_steps: 100 -> 200"),
        ({"max_steps": 100}, {"max_steps": 200, "extend": "rewarm"}, "max_steps: 100 -> 200"),
        ({"num_train_epochs": 1.0}, {"num_train_epochs": 2}, "num_train_epochs: 1.0 -> 2"),
        ({}, {"num_train_epochs": 4}, "num_train_epochs: 3 -> 4"),
        (WSD | {"max_steps": 100}, copy.deepcopy(WSD) | {"max_steps": 200}, "max_steps: 100 -> 200"),
        (
            WSD | {"max_steps": 100},
            WSD | {"lr_scheduler_kwargs": {"num_decay_steps": 60}, "max_steps": 200},
            "max_steps: 100 -> 200",
        ),
        (
            SHARE | {"max_steps": 100},
            SHARE | {"max_steps": 200},
            "",
        ),  # its first phase would have been longer
        (SHARE | {"max_steps": 100}, STEPS | {"max_steps": 200}, "max_steps: 100 -> 200"),
        ({"max_steps": 200}, {"max_steps": 100}, ""),
        ({"max_steps": 100}, {"max_steps": 200, "learning_rate": 1}, ""),
        ({"max_steps": 100}, {"num_train_epochs": 9}, ""),
        ({"max_steps": 100, "num_train_epochs": 1}, {"max_steps": 100, "num_train_epochs": 2}, ""),
    ],
)
def test_only_a_higher_length_is_an_extension(old, new, words):
    before = copy.deepcopy((old, new))
    assert raised_length(old, new) == words
    assert before == (old, new), "the arguments are changed"


@pytest.mark.parametrize("kind", SCHEDULES)
def test_the_rates_up_to_a_step_are_those_of_a_longer_run(kind):
    options = {"num_decay_steps": 30, "lr_end": 1e-7, "min_lr_rate": 0.1}
    values = {"lr_scheduler_type": kind, "lr_scheduler_kwargs": options}
    formula, limit = SCHEDULES[kind].formula, same_rates_until(values, 100)
    equal = [formula(options, step, 10, 100) == formula(options, step, 10, 150) for step in range(11, 100)]
    assert equal == [limit is not None and step <= limit for step in range(11, 100)]


def finished(folder, saved, **pretrain):
    """The record of a finished training of 100 steps, with checkpoints."""
    for step in saved:
        checkpoint = folder / f"checkpoints/checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        for name in FILES:
            (checkpoint / name).write_text(f"{name} {step}")
        write_manifest(checkpoint)
    wanted = {"config": {"model": {"x": 1}, "pretrain": {"max_steps": 100} | pretrain}, "inputs": {"04": "a"}}
    return {"wanted": wanted, "figures": {"steps": 100}}


def find(folder, record, steps=200, others=(), **values):
    values = record["wanted"]["config"]["pretrain"] | {"max_steps": steps} | values
    changes = [f"config.pretrain.max_steps: 100 -> {steps}", *others]
    return find_extension(folder, record, changes, values, "configs/x/pretrain.json")


@pytest.mark.parametrize(
    ("pretrain", "changes", "step"),
    [
        ({"lr_scheduler_type": "constant"}, {}, 90),
        (WSD, {}, 60),
        # The longer decay would begin at step 50.
        (WSD, {"lr_scheduler_kwargs": {"num_decay_steps": 100}, "steps": 150}, 30),
        (WSD, {"extend": "rewarm"}, 90),
        ({}, {"extend": "rewarm"}, 90),
    ],
)
def test_it_goes_on_from_the_last_checkpoint_with_the_rates_of_the_longer_run(
    tmp_path, pretrain, changes, step
):
    record = finished(tmp_path, (30, 60, 90), **pretrain)
    extension = find(tmp_path, record, **changes)
    assert extension.step == step and extension.rewarm == ("extend" in changes)


@pytest.mark.parametrize(
    ("saved", "pretrain", "changes", "words"),
    [
        (
            (30, 90),
            {},
            {},
            ["pretrain.json: max_steps: 100 -> 200", "linear", "--force"],
        ),
        ((30,), {"lr_scheduler_type": "cosine"}, {}, ["cosine", '"extend": "rewarm"']),
        ((90,), WSD, {}, ["a good checkpoint of step 70 or before", "has checkpoint-90", "save_total_limit"]),
        ((), {"lr_scheduler_type": "constant"}, {}, ["step 100 or before", "has none", "keep_checkpoints"]),
        (
            (90,),
            {"warmup_steps": 50},
            {"extend": "rewarm", "steps": 120},
            ["50, more than the 30 steps"],
        ),
    ],
)
def test_what_cannot_go_on_is_refused_with_the_way_out(tmp_path, saved, pretrain, changes, words):
    record = finished(tmp_path, saved, **pretrain)
    with pytest.raises(Refused) as refused:
        find(tmp_path, record, **changes)
    assert all(word in str(refused.value) for word in words), str(refused.value)


def test_a_damaged_checkpoint_is_passed_over_and_other_inputs_are_no_extension(tmp_path):
    record = finished(tmp_path, (30, 60), lr_scheduler_type="constant")
    (tmp_path / "checkpoints/checkpoint-60/optimizer.pt").write_text("damaged")
    assert find(tmp_path, record).step == 30
    assert find(tmp_path, record, others=["inputs.04: a -> b"]) is None


def test_the_finished_stage_stays_as_it_is(tmp_path):
    record = finished(tmp_path / "done", (30, 60, 90), **WSD)
    (tmp_path / "done/skipped.jsonl").write_text('{"step": 7}\n')
    (tmp_path / "done" / EXPERTS).write_text('{"step": 10}\n')
    work = tmp_path / "work"
    work.mkdir()
    prepare_extension(find(tmp_path / "done", record), tmp_path / "done", work)
    assert sorted(path.name for path in (work / "checkpoints").iterdir()) == [
        "checkpoint-30",
        "checkpoint-60",
    ]
    with (work / "skipped.jsonl").open("a") as handle:
        handle.write('{"step": 80}\n')
    assert (tmp_path / "done/skipped.jsonl").read_text() == '{"step": 7}\n'
    assert (work / EXPERTS).read_text() == '{"step": 10}\n'
    assert json.loads((work / "extended.jsonl").read_text()) == {"from": 60, "steps": 100, "rewarm": False}


def test_the_last_checkpoint_before_the_decay_is_kept(tmp_path):
    finished(tmp_path, (30, 60, 80, 90, 100))
    delete_old(tmp_path / "checkpoints", 2, 70)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["checkpoint-100", "checkpoint-60", "checkpoint-90"]
