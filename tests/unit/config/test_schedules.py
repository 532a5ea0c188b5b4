"""The table of schedules: what transformers has and the table lacks is refused by name."""

import pytest
from recipe.config.keys import known_keys
from recipe.config.schedules import SCHEDULES, check_schedule
from recipe.project import Refused


def test_the_table_names_only_schedules_of_transformers():
    assert set(known_keys()["choices"]["lr_scheduler_type"]) > set(SCHEDULES)


@pytest.mark.parametrize("kind", sorted(set(known_keys()["choices"]["lr_scheduler_type"]) - set(SCHEDULES)))
def test_a_schedule_without_a_formula_is_refused(kind):
    with pytest.raises(Refused, match=f"x.json: lr_scheduler_type: {kind}: no formula .* one of linear"):
        check_schedule({"lr_scheduler_type": kind}, "x.json")
