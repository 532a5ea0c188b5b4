"""The table of schedules: what transformers has and the table lacks is refused by name."""

import pytest
from recipe.config.keys import known_keys
from recipe.config.schedules import SCHEDULES, check_schedule, same_rates_until
from recipe.project import Refused


def test_the_table_names_only_schedules_of_transformers():
    assert set(known_keys()["choices"]["lr_scheduler_type"]) > set(SCHEDULES)


@pytest.mark.parametrize("kind", sorted(set(known_keys()["choices"]["lr_scheduler_type"]) - set(SCHEDULES)))
def test_a_schedule_without_a_formula_is_refused(kind):
    with pytest.raises(Refused, match=f"x.json: lr_scheduler_type: {kind}: no formula .* one of linear"):
        check_schedule({"lr_scheduler_type": kind}, "x.json")


# The options without which a schedule is refused.
NEEDED = {"cosine_with_min_lr": {"min_lr_rate": 0.1}, "warmup_stable_decay": {"num_decay_steps": 1}}


@pytest.mark.parametrize("kind", sorted(set(SCHEDULES) - {"constant"}))
def test_a_warm_up_longer_than_the_run_is_refused(kind):
    """Its rate would never reach learning_rate; a share of the steps is never longer."""
    values = {"lr_scheduler_type": kind, "lr_scheduler_kwargs": NEEDED.get(kind), "max_steps": 10}
    with pytest.raises(Refused, match=r"x.json: .*warmup_steps:? 11"):
        check_schedule(values | {"warmup_steps": 11}, "x.json")
    for warmup in (9, 0.5, 0):
        check_schedule(values | {"warmup_steps": warmup}, "x.json")
    check_schedule(values | {"warmup_steps": 11, "max_steps": -1}, "x.json")


@pytest.mark.parametrize("kind", [kind for kind, schedule in SCHEDULES.items() if schedule.fixed])
def test_a_warm_up_that_is_a_share_is_another_one_in_a_longer_run(kind):
    values = {"lr_scheduler_type": kind, "lr_scheduler_kwargs": NEEDED.get(kind)}
    limits = [same_rates_until(values | {"warmup_steps": warmup}, 100) for warmup in (0, 1, 10, 0.1)]
    assert limits[0] >= 99 and limits == [limits[0]] * 3 + [None]


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("cosine", {"num_cycles": -1}, "num_cycles: -1, expected more than 0"),
        ("cosine", {"num_cycles": "1"}, 'num_cycles: "1" is str, expected float'),
        ("inverse_sqrt", {"timescale": 0}, "timescale: 0, expected 1 or more"),
        ("polynomial", {"lr_end": 1.0}, "lr_end: 1.0, expected less than learning_rate, 5e-05"),
        ("warmup_stable_decay", {"num_decay_steps": 2, "decay_type": "lin"}, "decay_type: .*'linear'"),
        ("warmup_stable_decay", {"num_decay_steps": 2, "min_lr_ratio": 1}, "min_lr_ratio: 1, expected 0 or"),
    ],
)
def test_an_option_out_of_range_is_refused(kind, options, words):
    with pytest.raises(Refused, match=words):
        check_schedule({"lr_scheduler_type": kind, "lr_scheduler_kwargs": options}, "x.json")
