"""The share of a step that collectives cover, of events as the profiler gives them."""

from types import SimpleNamespace

import pytest
from recipe.training.communication import STEP, communication_share, covered


def event(name, start, end):
    return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=end))


def test_intervals_that_overlap_count_once():
    assert covered([]) == 0
    assert covered([(5, 6), (0, 2), (1, 3), (1, 2)]) == 4


@pytest.mark.parametrize("name", ["ncclDevKernel_AllReduce_Sum_bf16", "gloo:all_reduce"])
def test_collectives_count_within_the_step(name):
    """One began before the step; matrix products and the call that only starts a collective do not count."""
    events = [event(STEP, 100, 200), event(name, 90, 110), event(name, 120, 130), event(name, 125, 140)]
    events += [event("aten::mm", 140, 190), event("c10d::allreduce_", 150, 180)]
    assert communication_share(events) == pytest.approx(0.3)
    assert communication_share(events[:1]) == 0
