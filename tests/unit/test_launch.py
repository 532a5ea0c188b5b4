"""Which launcher starts a training, and with what environment."""

import sys

import pytest
from recipe.config import batch_layout, check_launch
from recipe.launch import child_environment, command, count_gpus
from recipe.outputs import Refused

LISTING = "GPU 0: A100 (UUID: a)\nGPU 1: A100 (UUID: b)\n"


def test_one_process_is_plain_python():
    assert command("run_clm.py", ["plan"], 1, None) == [sys.executable, "run_clm.py", "plan"]


def test_several_processes_use_torchrun():
    line = command("run_clm.py", ["plan"], 4, None)
    assert line[1:3] == ["-m", "torch.distributed.run"]
    assert line[line.index("--nproc-per-node") + 1] == "4"
    assert line[-2:] == ["run_clm.py", "plan"]


def test_deepspeed_has_its_own_launcher():
    line = command("run_clm.py", ["plan"], 2, "zero2.json")
    assert line[2] == "deepspeed.launcher.runner"
    assert line[line.index("--num_gpus") + 1] == "2"
    # Its launcher ignores CUDA_VISIBLE_DEVICES beside --num_gpus.
    line = command("run_clm.py", ["plan"], 2, "zero2.json", "1,3,5")
    assert line[line.index("--include") + 1] == "localhost:1,3" and "--num_gpus" not in line


@pytest.mark.parametrize(
    ("environment", "listing", "wanted"),
    [
        ({}, LISTING, 2),
        ({"CUDA_VISIBLE_DEVICES": "1"}, LISTING, 1),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, LISTING, 2),
        ({"CUDA_VISIBLE_DEVICES": ""}, LISTING, 0),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, LISTING, 0),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, "", 0),
        ({}, "", 0),
    ],
)
def test_visible_gpus(environment, listing, wanted):
    assert count_gpus(environment, listing) == wanted


def test_users_environment_wins():
    assert child_environment({"OMP_NUM_THREADS": "7"}, 2)["OMP_NUM_THREADS"] == "7"
    assert (
        int(child_environment({}, 1)["OMP_NUM_THREADS"])
        >= int(child_environment({}, 2)["OMP_NUM_THREADS"])
        >= 1
    )


def test_global_batch_is_one_number():
    assert batch_layout(256, 4, 1) == (4, 64)
    assert batch_layout(256, 4, 8) == (4, 8)
    assert batch_layout(16, 16, 2) == (8, 1)  # a rank takes no more than its share
    for wrong in ((256, 4, 3), (24, 16, 1)):
        with pytest.raises(Refused, match=f"{wrong[0]} sequences do not divide into {wrong[2]} ranks"):
            batch_layout(*wrong)


def test_muon_and_compile_are_refused_under_zero():
    values = {"global_batch_size": 8, "per_device_train_batch_size": 4}
    assert check_launch(values, "pretrain", None, 2) is None
    assert check_launch(values, "pretrain", "zero2", 2).name == "zero2.json"
    with pytest.raises(Refused, match=r"--set finetune\.muon_learning_rate=null"):
        check_launch(values | {"muon_learning_rate": 0.1}, "finetune", "zero2", 2)
    with pytest.raises(Refused, match="torch_compile"):
        check_launch(values | {"torch_compile": True}, "finetune", "zero2", 2)
    with pytest.raises(Refused, match="'zero2'"):
        check_launch(values, "pretrain", "zero_2", 2)
