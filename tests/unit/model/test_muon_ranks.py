"""Muon over matrices that ranks share: bit by bit what one process computes."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

SCRIPT = """
import torch, torch.distributed as dist
from recipe.model.muon import orthogonalised
from recipe.training.script import leave
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (dist.get_world_size(),))
torch.manual_seed(0)
for placement in (Shard(0), Shard(1), Replicate()):
    # Sides that do not divide by the ranks, and one that is shorter than their number; experts' matrices.
    shapes = [(5, 9), (5, 9), (16, 8), (5, 9), (8, 16), (1, 7), (6, 5, 9), (6, 5, 9)]
    whole = [torch.randn(shape) for shape in shapes]
    shared = orthogonalised([distribute_tensor(matrix.clone(), mesh, [placement]) for matrix in whole])
    for matrix, part in zip(whole, shared, strict=True):
        expected = distribute_tensor(orthogonalised([matrix])[0], mesh, [placement]).to_local()
        assert torch.equal(part, expected), (placement, matrix.shape)
print("equal")
leave(0)
"""


@pytest.mark.parametrize("ranks", [2, 3])
def test_shared_matrices_are_orthogonalised_as_whole_ones(tmp_path, ranks):
    script = tmp_path / "shared.py"
    script.write_text(SCRIPT)
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks))
    result = subprocess.run([*torchrun, script], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and result.stdout.count("equal") == ranks, result.stdout + result.stderr
