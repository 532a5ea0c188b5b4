"""The check after the first step: what is not active stops the run, what is active is reported."""

import json
from dataclasses import replace

import pytest
import torch
from recipe.config.optimizers import OPTIMIZERS
from recipe.project import Refused
from recipe.training import active_check
from recipe.training.active_check import active_parallelism, expected_parallelism
from tiny_training import GPT2, tiny_qwen3
from torch._dynamo.utils import counters

pytest_plugins = ["tiny_training"]


@pytest.mark.parametrize(
    ("setting", "fault"),
    [
        ({"neftune_noise_alpha": 5.0}, "neftune: asked for 5.0, active is None"),
        ({"activation_checkpointing": True}, "activation_checkpointing: asked for 1, active is None"),
        ({"z_loss": 1e-3}, "z_loss: asked for 0.001, active is None"),
        ({"optim": "sgd"}, "optimizer: asked for SGD, active is AdamW"),
        ({"weight_decay": 0.1}, "weight_decay: asked for 0.1, active is None"),
        ({"adam_beta2": 0.95}, r"betas: asked for \[0.9, 0.95\], active is \[0.9, 0.999\]"),
        ({"adam_epsilon": 1e-6}, "epsilon: asked for 1e-06, active is 1e-08"),
        ({"loss": "chunks"}, "loss: asked for chunks, active is whole logits"),
        ({"global_batch_size": 8}, "global_batch: asked for 8, active is 4"),
        ({"optim": "adamw_torch_fused"}, "fused: asked for True, active is False"),
    ],
)
def test_what_was_asked_for_and_is_not_active_stops_the_run(train, monkeypatch, setting, fault):
    """The Trainer never hears of one setting: it appears only when the check is made."""
    check_as_asked = active_check.ActiveCheck.on_step_end
    ((key, value),) = setting.items()

    def check(callback, args, *rest, **objects):
        if key in ("z_loss", "global_batch_size"):
            settings = replace(callback.asked.settings, **setting)
            callback.asked = replace(callback.asked, settings=settings)
        elif key == "loss":
            callback.asked = replace(callback.asked, loss=value)
        elif key == "optim":
            callback.asked = replace(callback.asked, optimizer=OPTIMIZERS[value])
        else:
            setattr(args, key, value)
        check_as_asked(callback, args, *rest, **objects)

    monkeypatch.setattr(active_check.ActiveCheck, "on_step_end", check)
    with pytest.raises(Refused, match=f"does not use what the settings ask for.*{fault}"):
        train(**({"optim": "adamw_torch"} if key == "optim" else {}))


def test_what_was_asked_for_and_is_active_is_in_the_block(train):
    asked = {"neftune_noise_alpha": 5.0, "activation_checkpointing": True, "adam_beta2": 0.95}
    asked |= {"adam_epsilon": 1e-6, "weight_decay": 0.1, "max_grad_norm": 0.5}
    active = train(**asked)[0]["active"]
    assert active["neftune"] == 5.0 and active["activation_checkpointing"] == 1
    assert active["betas"] == [0.9, 0.95] and active["epsilon"] == 1e-6
    assert active["weight_decay"] == 0.1 and active["gradient_clipping"] == 0.5
    assert active["optimizer"] == "AdamW" and active["fused"] and active["boards"] == ["tensorboard"]
    assert active["global_batch"] == 4
    plain = train("plain", optim="sgd", max_grad_norm=0.0)[0]["active"]
    assert plain["optimizer"] == "SGD" and plain["neftune"] is plain["gradient_clipping"] is None
    assert plain["activation_checkpointing"] is None and plain["betas"] == []


def test_checkpointing_of_every_second_layer_is_counted(train):
    half = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"every_n_layers": 2}}
    active = train(model=GPT2 | {"n_layer": 3}, **half)[0]["active"]
    assert (active["activation_checkpointing"], active["layers"]) == (2, 3)


def test_parallelism_has_one_name_in_options_and_in_use(tmp_path):
    path = tmp_path / "z.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}))
    assert expected_parallelism(4, str(path), False, 1) == "ZeRO-2, optimizer on cpu"
    zero = {"stage": 3, "offload_param": {"device": "none"}, "offload_optimizer": None}
    path.write_text(json.dumps({"zero_optimization": zero}))
    assert expected_parallelism(4, str(path), False, 1) == "ZeRO-3"
    assert expected_parallelism(4, None, True, 1) == "FSDP2 4"
    assert expected_parallelism(4, None, False, 4) == "TP 4"
    assert (
        expected_parallelism(4, None, False, 2) == expected_parallelism(4, None, True, 2) == "FSDP2 2 x TP 2"
    )
    assert expected_parallelism(4, None, False, 1) == "DDP 4"
    assert expected_parallelism(1, None, False, 1) == active_parallelism(tiny_qwen3()) == "one process"


def test_a_kernel_that_compiles_itself_is_no_compiled_model(train):
    """As flex_attention does, also where torch_compile is false."""
    counters["stats"]["unique_graphs"] = 2
    assert train()[0]["active"]["compiled"] is False


def test_several_gpus_in_one_process_are_named(monkeypatch):
    model = torch.nn.DataParallel(torch.nn.Linear(2, 2))
    monkeypatch.setattr(model, "device_ids", [0, 1], raising=False)
    assert active_parallelism(model) == "DataParallel 2"
