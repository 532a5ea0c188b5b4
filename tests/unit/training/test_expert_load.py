"""The load of experts in a training: what is logged and checked."""

import pytest
from conftest import EXPERTS, SHAPE
from tiny_training import rows_of

pytest_plugins = ["tiny_training"]

MOE = {"model_type": "qwen3_moe", "router_aux_loss_coef": 0.01} | SHAPE | EXPERTS


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_load_of_the_experts_is_logged(train, checkpointing):
    figures, rows, folder = train(model=MOE, activation_checkpointing=checkpointing, z_loss=1e-4)
    active = figures["active"]
    assert active["router_aux_loss"] == 0.01 and active["z_loss"] == 1e-4 and active["accumulation"] == 2
    # Two layers with 4 experts, of which a token uses 2.
    assert active["parameters"] - active["active_parameters"] == 2 * 2 * 3 * 32 * 32
    logged = [row for row in rows if "loss" in row]
    # 2 where the load is balanced, once for a step of two micro-batches.
    assert logged[0]["router_aux_loss"] == pytest.approx(0.02, rel=0.2)
    shares = rows_of(folder / "experts.jsonl")
    assert [row["step"] for row in shares] == [row["step"] for row in logged] == list(range(1, 7))
    for row, table in zip(logged, shares, strict=True):
        assert [sum(layer) for layer in table["shares"]] == pytest.approx([1, 1], abs=1e-4)
        loads = [4 * share for layer in table["shares"] for share in layer]
        assert row["expert_load_max"] == pytest.approx(max(loads), abs=1e-3)
        assert row["expert_load_min"] == pytest.approx(min(loads), abs=1e-3)


def test_without_a_coefficient_nothing_is_asked_of_the_routers(train):
    figures, rows, folder = train(model=MOE | {"router_aux_loss_coef": 0.0})
    assert figures["active"]["router_aux_loss"] is None
    assert not any("expert_load_max" in row for row in rows) and not (folder / "experts.jsonl").exists()


def test_a_coefficient_that_is_not_applied_stops_the_training(train, monkeypatch):
    from recipe.training import training

    monkeypatch.setattr(training, "return_loss_only", lambda model, z_loss: None)
    with pytest.raises(Exception, match=r"router_aux_loss: asked for 0\.01, active is None"):
        train(model=MOE)
