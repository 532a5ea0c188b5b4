"""Start a training script: plain python, torchrun or deepspeed. Called by 05_pretrain.sh and 12_finetune.sh.

    python -m recipe.launch SCRIPT --recipe tiny [--nproc N] [--deepspeed zero2]

This process holds the stage (checks, lock, publication) and never imports torch; the training runs in a
child, whose work folder it is given. A signal to this process goes to the child, which saves a checkpoint
before it ends.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from recipe.config import check_launch
from recipe.outputs import (
    DATA,
    EXIT_INTERRUPTED,
    EXIT_TERMINATED,
    Interrupted,
    RecipeError,
    Refused,
    Stage,
    read_json,
    run_stage,
    write_json,
)

STAGES = {
    "run_clm.py": ("05_pretrain", ("model", "pretrain"), ("03_tokenizer", "04_tokenize")),
    "run_sft.py": ("12_finetune", ("finetune",), ("05_pretrain", "11_dataset")),
}


def command(script: str, arguments: list[str], processes: int, deepspeed: str | None) -> list[str]:
    """The command that trains on `processes` ranks of this machine.

    deepspeed: path of a DeepSpeed file, or None. One process without DeepSpeed runs as plain python.
    """
    if deepspeed:
        launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(processes)]
        return [*launcher, "--no_local_rank", script, *arguments]
    if processes > 1:
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(processes),
        ]
        return [*launcher, script, *arguments]
    return [sys.executable, script, *arguments]


def count_gpus(environment: Mapping[str, str], listing: str) -> int:
    """Visible GPUs: those that CUDA_VISIBLE_DEVICES names, else the lines of `nvidia-smi -L`."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    present = sum(line.startswith("GPU ") for line in listing.splitlines())
    if visible is None:
        return present
    return min(present, sum(bool(part.strip()) and part.strip() != "-1" for part in visible.split(",")))


def _nvidia_smi() -> str:
    if not shutil.which("nvidia-smi"):
        return ""
    return subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout


def child_environment(environment: Mapping[str, str], processes: int) -> dict[str, str]:
    """The child's environment: threads shared among the ranks, compiled kernels kept between runs, no
    telemetry.
    """
    threads = max(1, (os.cpu_count() or 1) // processes)
    defaults = {
        "OMP_NUM_THREADS": str(threads),
        "TORCHINDUCTOR_CACHE_DIR": str(DATA / ".torchinductor"),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DS_ACCELERATOR": "cuda" if count_gpus(environment, _nvidia_smi()) else "cpu",
        "PYTHONUNBUFFERED": "1",
    }
    return defaults | dict(environment)


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--nproc", type=int, default=0, help="processes (ranks) on this machine; default: one per GPU, else 1"
    )
    parser.add_argument("--deepspeed", metavar="NAME", help="use configs/deepspeed/NAME.json, e.g. zero2")


def _die_with_parent() -> None:
    # If this process is killed outright, the training must not go on unseen with the lock in its hands.
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def train(stage: Stage, script: Path) -> None:
    """Run the training child to its end; its ``result.json`` becomes the stage's figures."""
    arguments = stage.arguments
    processes = arguments.nproc or max(1, count_gpus(os.environ, _nvidia_smi()))
    file = STAGES[script.name][1][-1]
    path = check_launch(stage.config[file], file, arguments.deepspeed, processes)
    deepspeed = str(path) if path else None
    plan = {
        "recipe": stage.recipe,
        "config": stage.config,
        "deepspeed": deepspeed,
        "processes": processes,
        "folder": str(stage.folder),
        "inputs": {name: str(path) for name, path in stage.inputs.items()},
    }
    write_json(stage.folder / "plan.json", plan)
    line = command(str(script), [str(stage.folder / "plan.json")], processes, deepspeed)
    stage.say("runs: " + " ".join(Path(part).name if part == sys.executable else part for part in line))
    child = subprocess.Popen(
        line,
        env=child_environment(os.environ, processes),
        pass_fds=(stage.lock,),
        start_new_session=True,
        preexec_fn=_die_with_parent,
    )
    code = _wait(child, stage)
    result = stage.folder / "result.json"
    if code or not result.exists():
        raise RecipeError(
            f"training ended with exit {code} before it was finished; the reason stands above. "
            "Checkpoints are kept: run the same command again to continue"
        )
    stage.figures = read_json(result)
    stage.headline = stage.figures.pop("headline")
    result.unlink()
    (stage.folder / "plan.json").unlink()


def _wait(child: subprocess.Popen[bytes], stage: Stage) -> int:
    """Wait for the child; hand SIGINT and SIGTERM on to it and raise Interrupted once it has saved."""
    received: list[int] = []

    def forward(signum: int, frame: object) -> None:
        received.append(signum)
        if len(received) < 3:
            stage.say("stopping: the training saves a checkpoint and ends (a third signal kills it)")
            child.send_signal(signal.SIGTERM)
        else:
            child.kill()

    old = {signum: signal.signal(signum, forward) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = child.wait()
    finally:
        for signum, handler in old.items():
            signal.signal(signum, handler)
    if received:
        exit_code = EXIT_INTERRUPTED if received[0] == signal.SIGINT else EXIT_TERMINATED
        raise Interrupted(
            "stopped by a signal. Run the same command again to continue from the checkpoint", exit_code
        )
    return code


def main() -> None:
    """Run the stage that belongs to the training script named first on the command line."""
    script = Path(sys.argv.pop(1))
    if script.name not in STAGES:
        raise Refused(f"{script}: wanted one of {', '.join(STAGES)}")
    name, sections, inputs = STAGES[script.name]
    doc = f"Stage {name}: {script.name} under plain python, torchrun (--nproc) or deepspeed (--deepspeed)."
    run_stage(
        f"{name}.sh",
        doc,
        lambda stage: train(stage, script),
        sections,
        inputs,
        options=_options,
        resumable=True,
    )


if __name__ == "__main__":
    main()
