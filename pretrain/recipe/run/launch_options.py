"""The training stages, and the options of a launch: which processes train and how they work together."""

from __future__ import annotations

import argparse
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from recipe.config.choice import check_liger, check_quantization, choose
from recipe.config.launch import check_experts, check_fp8, check_launch, check_tensor_parallel
from recipe.config.model import model_values
from recipe.config.optimizers import check_optimizer_hardware
from recipe.config.training import attention_needs, check_boards
from recipe.hardware import BF16_CAPABILITY, Hardware, gpus
from recipe.project import Refused


class TrainingStage(NamedTuple):
    """A stage that trains.

    sections: the recipe's files that decide its result, the training file last. inputs: the stages it reads.
    """

    name: str
    sections: tuple[str, ...]
    inputs: tuple[str, ...]

    @property
    def file(self) -> str:
        """Its training file: ``pretrain``, ``finetune`` or ``preference``."""
        return self.sections[-1]

    @property
    def number(self) -> int:
        """The number that --from and --to of run_all.sh count by."""
        return int(self.name[:2])


# The training stages by their scripts.
TRAINING_STAGES = {
    "run_clm.py": TrainingStage("05_pretrain", ("model", "pretrain"), ("03_tokenizer", "04_tokenize")),
    "run_sft.py": TrainingStage("12_finetune", ("finetune",), ("05_pretrain", "11_dataset")),
    "run_dpo.py": TrainingStage("13_preference", ("preference",), ("12_finetune",)),
}


@dataclass(frozen=True)
class Launch:
    """Which processes train, and how they share the work.

    processes: ranks on this machine; each of the `nodes` machines has as many. hosts: ranks by machine, from
    DeepSpeed's hostfile. deepspeed: a file of configs/deepspeed/ by its short name. fsdp: shard by FSDP2.
    tensor_parallel: ranks that share each matrix. new_optimizer: a checkpoint of another kind of parallelism
    is continued without its optimizer state.
    """

    processes: int = 1
    nodes: int = 1
    node_rank: int = 0
    master_addr: str = ""
    master_port: int = 29500
    hostfile: Path | None = None
    hosts: Mapping[str, int] = field(default_factory=dict)
    deepspeed: str | None = None
    fsdp: bool = False
    tensor_parallel: int = 1
    new_optimizer: bool = False

    @property
    def ranks(self) -> int:
        """The number of processes on all machines."""
        return sum(self.hosts.values()) or self.nodes * self.processes

    def check(
        self, config: Mapping[str, dict[str, Any]], file: str, hardware: Hardware | None = None
    ) -> Path | None:
        """Check the options against a training file, the model, and the hardware.

        file: ``pretrain``, ``finetune`` or ``preference``. hardware: what this machine has
        (`recipe.hardware.glance`); None leaves that check out.

        Returns the path of the DeepSpeed file, or None. Raises Refused.
        """
        check_boards(config[file].get("report_to"), f"{file}.json")
        # The machines of a hostfile may be others than this one.
        if hardware and not self.hosts:
            check_quantization(hardware, config[file], f"{file}.json")
            check_optimizer_hardware(hardware, config[file], f"{file}.json")
            sharded = self.fsdp or self.tensor_parallel > 1
            kind = model_values(config).get("model_type")
            check_liger(hardware, config[file], kind, sharded, f"{file}.json")
            choose(hardware, config[file], f"{file}.json", attention_needs(config, file))
        return self.check_sharding(config[file], file, model_values(config))

    def check_sharding(self, values: dict[str, Any], file: str, model: dict[str, Any]) -> Path | None:
        """Check that a training can be split over the ranks.

        values: of the training file. model: the values of model.json. Returns the path of the DeepSpeed file,
        or None. Raises Refused.
        """
        path = check_launch(values, file, self.deepspeed, self.ranks, self.fsdp, self.tensor_parallel)
        check_tensor_parallel(model, self.tensor_parallel)
        check_experts(model, values, self.ranks, self.fsdp, self.tensor_parallel)
        check_fp8(model, values, self.deepspeed, self.fsdp, self.tensor_parallel)
        return path


def launch_of(arguments: argparse.Namespace) -> Launch:
    """The launch that the options of `add_options` describe. Raises Refused for options that contradict."""
    nodes, node_rank = arguments.nnodes, arguments.node_rank
    if nodes < 1 or not 0 <= node_rank < nodes:
        raise Refused(f"--nnodes {nodes} --node-rank {node_rank}: expected a rank from 0 to {nodes - 1}")
    if arguments.nproc < 0:
        raise Refused(f"--nproc {arguments.nproc}: expected the number of ranks on this machine, 1 or more")
    if arguments.max_restarts < 0:
        raise Refused(f"--max-restarts {arguments.max_restarts}: expected 0 or more")
    visible = len(seen := gpus())
    if visible and arguments.nproc > visible and not arguments.hostfile:
        raise Refused(
            f"--nproc {arguments.nproc}: {visible} GPUs are visible here (nvidia-smi, CUDA_VISIBLE_DEVICES). "
            "Give at most one rank per GPU"
        )
    processes = arguments.nproc or max(1, visible)
    older = [gpu for gpu in seen[:processes] if gpu.capability < BF16_CAPABILITY]
    if older and seen[0].capability >= BF16_CAPABILITY:
        raise Refused(
            f"{older[0].name} has no bf16 units, but the first GPU, {seen[0].name}, has, and all compute as "
            "the first one can. Name the older one first (such as CUDA_VISIBLE_DEVICES=1,0), or leave it out"
        )
    if nodes > 1 and not arguments.master_addr:
        raise Refused(f"--nnodes {nodes}: --master-addr is missing. Give the address of node 0")
    if arguments.hostfile and (not arguments.deepspeed or nodes > 1):
        raise Refused(
            "--hostfile needs --deepspeed, which starts the other nodes itself. Add --deepspeed NAME and "
            "leave out --nnodes"
        )
    hosts = read_hostfile(Path(arguments.hostfile)) if arguments.hostfile else {}
    return Launch(
        processes=max(hosts.values()) if hosts else processes,
        nodes=nodes,
        node_rank=node_rank,
        master_addr=arguments.master_addr,
        master_port=arguments.master_port,
        hostfile=Path(arguments.hostfile).resolve() if hosts else None,
        hosts=hosts,
        deepspeed=arguments.deepspeed,
        fsdp=arguments.fsdp,
        tensor_parallel=arguments.tensor_parallel,
        new_optimizer=arguments.new_optimizer,
    )


def read_hostfile(path: Path) -> dict[str, int]:
    """Ranks by machine, from lines ``NAME slots=N`` as DeepSpeed and MPI read them. Raises Refused."""
    if not path.is_file():
        raise Refused(f"--hostfile {path}: no such file")
    hosts: dict[str, int] = {}
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        found = re.fullmatch(r"(\S+)\s+slots=(\d+)", line)
        if not found or found[1] in hosts or int(found[2]) < 1:
            raise Refused(f"{path}:{number}: {line!r}, expected `NAME slots=N`, each machine once")
        hosts[found[1]] = int(found[2])
    if len(hosts) < 2:
        raise Refused(f"{path}: {len(hosts)} machines, expected 2 or more. On one machine use --nproc")
    if not shutil.which("pdsh"):
        raise Refused(
            "--hostfile: DeepSpeed starts the other machines through pdsh, which is not installed. Run "
            "`apt-get install pdsh`"
        )
    return hosts


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose the processes and their parallelism."""
    add = parser.add_argument
    add("--nproc", type=int, default=0, help="ranks on this machine (default: one per GPU, or 1)")
    add("--deepspeed", metavar="NAME", help="use ZeRO with configs/deepspeed/NAME.json, e.g. zero2")
    add("--fsdp", action="store_true", help="shard weights and optimizer states over the ranks by FSDP2")
    add("--tensor-parallel", type=int, default=1, metavar="N", help="split each matrix over N ranks")
    add(
        "--nnodes",
        type=int,
        default=1,
        help="number of machines; run the command on each, with its --node-rank",
    )
    add("--node-rank", type=int, default=0, help="0 on the machine that runs the stage")
    add("--master-addr", default="", help="address of node 0")
    add("--master-port", type=int, default=29500, help="a free port of node 0 (default: 29500)")
    add("--hostfile", metavar="FILE", help="machines for --deepspeed: lines `NAME slots=N`, reached by pdsh")
    add(
        "--max-restarts",
        type=int,
        default=0,
        metavar="N",
        help="start a training that has failed (a crash, no progress, a lost node) again from its newest "
        "good checkpoint, at most N times",
    )
    add(
        "--new-optimizer",
        action="store_true",
        help="continue a checkpoint of another kind of parallelism: weights, step and schedule are kept, the "
        "optimizer state is lost",
    )
    add("--probe", action="store_true", help="measure which settings are the fastest (stage 05 only)")
