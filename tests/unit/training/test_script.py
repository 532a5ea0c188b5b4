"""How a training script ends."""

import json
import subprocess
import sys

FULL_GPU = """
import torch
from recipe.training.script import run_script

def work(plan):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\\nof 8 GiB")

run_script(work)
"""


def test_a_full_gpu_is_named_with_the_way_out(tmp_path):
    (tmp_path / "plan.json").write_text(json.dumps({"folder": str(tmp_path)}))
    command = [sys.executable, "-c", FULL_GPU, str(tmp_path / "plan.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        "error: the memory of a GPU is full: CUDA out of memory. Tried to allocate 2.00 GiB."
    )
    assert "smaller per_device_train_batch_size" in line
