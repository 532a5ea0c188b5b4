"""The phases of a pretraining: what they say, and what is refused."""

import pytest
from recipe.config.phases import longest_block, phase_at, phases_of, samples_of
from recipe.config.recipe import check_recipe, load_recipe
from refusal import refusal

PHASES = [
    {"until_step": 600},
    {"until_tokens": 700 * 2048, "sources": {"tatoeba": 2, "manpages": 1}, "rate": 0.5},
    {"block_size": 1024, "rope_theta": 500000.0},
]


def phases(*rows, **values):
    return lambda config: config["pretrain"].update(phases=list(rows), **values)


def test_phases_follow_each_other_to_the_end_of_the_run():
    config = load_recipe("tiny")
    config["pretrain"]["phases"] = PHASES
    check_recipe(config, "configs/x")
    found = phases_of(config["pretrain"], 1800)
    assert [(phase.begin, phase.end) for phase in found] == [(0, 600), (600, 700), (700, 1800)]
    assert [phase.block_size for phase in found] == [256, 256, 1024]
    assert [phase.rate for phase in found] == [1, 0.5, 1]
    assert [phase_at(found, step).begin for step in (0, 599, 600, 759, 1800)] == [0, 0, 600, 700, 700]
    assert longest_block(config["pretrain"]) == 1024 and samples_of(config["pretrain"]) == (2, 2)


def test_a_phase_may_end_at_a_share_of_the_run():
    values = load_recipe("tiny")["pretrain"] | {"phases": [{"until_step": 0.6, "block_size": 64}, {}]}
    for steps in (1000, 10, 2):
        assert [(phase.begin, phase.end) for phase in phases_of(values, steps)] == [
            (0, round(0.6 * steps)),
            (round(0.6 * steps), steps),
        ]


def test_a_run_without_phases_is_one_phase_of_sequences():
    values = load_recipe("tiny")["pretrain"] | {"phases": None}
    (phase,) = phases_of(values, 1800)
    assert (phase.begin, phase.end, phase.sources, phase.block_size, phase.rate) == (0, 1800, None, 256, 1)
    assert longest_block(values) == 256 and samples_of(values) == (8, 8)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            phases({"until_step": 100}, {"until_step": 100}, {}),
            ["phases: phase 2 ends at step 100, but begins after step 100", "in their order"],
        ),
        (
            phases({"until_step": 100}, {"until_tokens": 2048}, {}),
            ["phase 2 ends at step 1, but begins after"],
        ),
        (
            phases({"until_step": 100}, {"until_step": 700}),
            ["ends at step 700, but max_steps is 1,000", "steps 701 to 1,000 have no phase", "Leave the end"],
        ),
        (phases({"until_step": 1300}), ["ends at step 1,300, but max_steps is 1,000", "the run ends before"]),
        (phases({}, {"until_step": 1800}), ["phase 1: no end", "until_step or until_tokens"]),
        (phases({"until_step": 9, "until_tokens": 9}, {}), ["phase 1: until_step and until_tokens"]),
        (phases(), ["phases: []", "at least one phase"]),
        (phases(5), ["phases: phase 1: 5 is"]),
        (phases({"until": 5}), ["phase 1: until: unknown key"]),
        (phases({"until_step": 2.5}, {}), ["phase 1: until_step: 2.5", "a share of max_steps below 1"]),
        (phases({"rate": 0}), ["phase 1: rate: 0", "more than 0"]),
        (phases({}, max_steps=-1), ["need max_steps"]),
        (phases({"sources": {"tatoeb": 1}}), ["sources: tatoeb: no source", "'tatoeba'"]),
        (phases({"sources": {"libreoffice-help": 1}}), ["libreoffice-help: it is held out"]),
        (phases({"sources": {"tatoeba": 0}}), ["tatoeba: 0, expected a weight above 0"]),
        (phases({"sources": {}}), ["sources: none"]),
        (phases({"block_size": 2048}), ["phase 1: block_size: 2048, more than the 1024 positions"]),
        (phases({"block_size": 384}), ["the longest block has 384 tokens"]),
        (
            phases({"block_size": 1024}, per_device_train_batch_size=2),
            ["per_device_train_batch_size 2 x block_size 256", "a multiple of 4"],
        ),
        (
            phases({"until_step": 9, "block_size": 96}, {}),
            ["phase 1: block_size: 96, but the longest block, 256", "no multiple"],
        ),
        (
            phases({"until_step": 9, "rope_theta": 5e5}, {}),
            ["phase 2 has no rope_theta, phase 1 has 500000", "every phase after the change"],
        ),
        (
            lambda c: (
                c["model"].update(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}),
                phases({"rope_theta": 5e5})(c),
            ),
            ["rope_theta: 500000", "type default"],
        ),
        (lambda c: c["finetune"].update(phases=[{}]), ["finetune.json: phases: unknown key"]),
    ],
)
def test_what_cannot_be_is_refused_with_the_way_out(change, words):
    message = refusal(change)
    assert all(word in message for word in words), message
