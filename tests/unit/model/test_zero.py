"""Checkpoints of ZeRO: their kind, and that code in them is not run. Trainings: stages/test_crossing.py."""

import os
import pickle

import pytest
import torch
from recipe.model import sharding, zero
from recipe.project import RecipeError

SHARD = "zero_pp_rank_{}_mp_rank_00_optim_states.pt"


class Code:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        (("optimizer.pt", "model.safetensors"), sharding.WHOLE),
        (("optimizer/.metadata", "model.safetensors"), sharding.SHARDED),
        (("global_step3/mp_rank_00_model_states.pt", "global_step3/bf16_" + SHARD.format(0)), "ZeRO-1 or 2"),
        (
            ("global_step3/zero_pp_rank_0_mp_rank_00_model_states.pt", "global_step3/" + SHARD.format(0)),
            "ZeRO-3",
        ),
    ],
)
def test_what_a_checkpoint_was_written_under(tmp_path, files, kind):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert sharding.written_under(tmp_path) == kind


@pytest.mark.parametrize("read", ["universal", "weights"])
def test_code_in_shards_is_not_run(tmp_path, monkeypatch, read):
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0")
    step = tmp_path / "checkpoint-3/global_step3"
    step.mkdir(parents=True)
    (step.parent / "latest").write_text("global_step3")
    for name in (SHARD.format(0), "mp_rank_00_model_states.pt"):
        torch.save({"optimizer_state_dict": Code(tmp_path / "run")}, step / name)
    with pytest.raises(pickle.UnpicklingError, match="mkdir"):
        if read == "universal":
            zero.convert_to_universal(step.parent, tmp_path / "new")
        else:
            zero.write_weights(step.parent, tmp_path / "new", set())
    assert not (tmp_path / "run").exists()


def test_state_of_another_optimizer_than_adamw_is_refused(tmp_path, monkeypatch):
    from deepspeed.checkpoint import ds_to_universal

    step = tmp_path / "checkpoint-3/global_step3"
    step.mkdir(parents=True)
    for rank in (0, 1):
        (step / SHARD.format(rank)).touch()

    def without_moments(arguments):
        raise KeyError("exp_avg_sq")

    monkeypatch.setattr(ds_to_universal, "main", without_moments)
    with pytest.raises(RecipeError, match="keeps no 'exp_avg_sq'. Continue with 2 ranks"):
        zero.convert_to_universal(step.parent, tmp_path / "a")
    monkeypatch.setattr(ds_to_universal, "main", lambda arguments: None)
    with pytest.raises(RecipeError, match="keeps no moments"):
        zero.convert_to_universal(step.parent, tmp_path / "b")
