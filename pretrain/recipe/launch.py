"""Start a training script: plain python, torchrun or deepspeed. Called by 05_pretrain.sh and 12_finetune.sh.

    python -m recipe.launch SCRIPT --recipe tiny [--nproc N] [--deepspeed zero2]

This process holds the stage (checks, lock, publication) and never imports torch; the training runs in a
child, whose work folder it is given. A signal to this process goes to the child, which saves a checkpoint
before it ends.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from recipe.config import check_launch
from recipe.instructions import no_pairs
from recipe.outputs import (
    DATA,
    EXIT_INTERRUPTED,
    EXIT_REFUSED,
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


def command(
    script: str, arguments: list[str], processes: int, deepspeed: str | None, visible: str | None = None
) -> list[str]:
    """The command that trains on `processes` ranks of this machine.

    deepspeed: path of a DeepSpeed file, or None. One process without DeepSpeed runs as plain python.
    visible: CUDA_VISIBLE_DEVICES, which DeepSpeed's launcher would otherwise ignore beside a number of ranks.
    """
    if deepspeed:
        ranks = ["--num_gpus", str(processes)]
        if visible:
            ranks = ["--include", "localhost:" + ",".join(visible.split(",")[:processes])]
        ranks += ["--master_port", str(_free_port()), "--no_local_rank"]
        return [sys.executable, "-m", "deepspeed.launcher.runner", *ranks, script, *arguments]
    if processes > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        return [*launcher, "--nproc-per-node", str(processes), script, *arguments]
    return [sys.executable, script, *arguments]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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


def default_ranks() -> int:
    """One rank per visible GPU, one without any."""
    return max(1, count_gpus(os.environ, _nvidia_smi()))


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


def train(stage: Stage, script: Path) -> None:
    """Run the training child to its end; its ``result.json`` becomes the stage's figures."""
    arguments = stage.arguments
    processes = arguments.nproc or default_ranks()
    file = STAGES[script.name][1][-1]
    path = check_launch(stage.config[file], file, arguments.deepspeed, processes)
    deepspeed = str(path) if path else None
    stop = stage.folder / "stop"
    stop.unlink(missing_ok=True)
    plan = {
        "recipe": stage.recipe,
        "config": stage.config,
        "deepspeed": deepspeed,
        "processes": processes,
        "parent": os.getpid(),
        "folder": str(stage.folder),
        "inputs": {name: str(path) for name, path in stage.inputs.items()},
    }
    write_json(stage.folder / "plan.json", plan)
    result = stage.folder / "result.json"
    if not result.exists():  # else only the publication was missing
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") if count_gpus(os.environ, _nvidia_smi()) else None
        line = command(str(script), [str(stage.folder / "plan.json")], processes, deepspeed, visible)
        stage.say("runs: " + " ".join(Path(part).name if part == sys.executable else part for part in line))
        environment = child_environment(os.environ, processes)
        child = subprocess.Popen(line, env=environment, pass_fds=(stage.lock,), start_new_session=True)
        code = _wait(child, stage, stop)
        if code == EXIT_REFUSED:
            raise Refused("the training refused to start; the reason stands above")
        if code or not result.exists():
            raise RecipeError(
                f"training ended with exit {code} before it was finished; the reason stands above. "
                "Checkpoints are kept: run the same command again to continue"
            )
    stage.figures = read_json(result)
    stage.headline = stage.figures.pop("headline")
    (stage.folder / "plan.json").unlink()


def _wait(child: subprocess.Popen[bytes], stage: Stage, stop: Path) -> int:
    """Wait for the child. On SIGINT or SIGTERM write the stop file and raise Interrupted once all has ended.

    A file, because it reaches every rank under every launcher: DeepSpeed's dies of a signal and leaves its
    ranks behind.
    """
    received: list[int] = []

    def ask_to_stop(signum: int, frame: object) -> None:
        received.append(signum)
        if len(received) < 3:
            stop.touch()
            stage.say("stopping: the training saves a checkpoint after this step (two signals more kill it)")
        else:
            for process in reversed(descendants(child.pid)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)

    old = {signum: signal.signal(signum, ask_to_stop) for signum in (signal.SIGINT, signal.SIGTERM)}
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


def descendants(process: int) -> list[int]:
    """A process and all below it, parents first (Linux)."""
    found = [process]
    with contextlib.suppress(OSError):
        for child in Path(f"/proc/{process}/task/{process}/children").read_text().split():
            found += descendants(int(child))
    return found


def main() -> None:
    """Run the stage that belongs to the training script named first on the command line."""
    script = Path(sys.argv.pop(1))
    if script.name not in STAGES:
        raise Refused(f"{script}: wanted one of {', '.join(STAGES)}")
    name, sections, inputs = STAGES[script.name]
    skip = no_pairs if name == "12_finetune" else None
    doc = f"Stage {name}: {script.name} under plain python, torchrun (--nproc) or deepspeed (--deepspeed)."
    run_stage(
        f"{name}.sh",
        doc,
        lambda stage: train(stage, script),
        sections,
        inputs,
        options=_options,
        resumable=True,
        skip=skip,
    )


if __name__ == "__main__":
    main()
