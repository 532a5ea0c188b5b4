"""Start a training script: plain python, torchrun or deepspeed. Called by 05_pretrain.sh, 12_finetune.sh and
13_preference.sh.

    python -m recipe.launch SCRIPT --recipe tiny [--nproc N] [--deepspeed zero2]

This process holds the stage (checks, lock, publication) and never imports torch; the training runs in a
child, whose work folder it is given. A signal to this process goes to the child, which saves a checkpoint
before it ends.

Over several nodes the same command runs on each with its own --node-rank. Node 0 holds the stage; the others
only lend it their processes (`join`). They share the project's folder over a network file system.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipe.config import check_recipe, load_recipe
from recipe.config_launch import check_launch, check_tensor_parallel
from recipe.config_model import model_values
from recipe.config_training import check_boards, documents_suffice
from recipe.hardware import Hardware, check_quantization, choose, count_gpus, glance
from recipe.initial import find_initial
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
    stage_arguments,
    stage_folder,
    write_json,
)
from recipe.preferences import no_preference
from recipe.watchdog import Watchdog, call_webhook, dump_stacks

STAGES = {
    "run_clm.py": ("05_pretrain", ("model", "pretrain"), ("03_tokenizer", "04_tokenize")),
    "run_sft.py": ("12_finetune", ("finetune",), ("05_pretrain", "11_dataset")),
    "run_dpo.py": ("13_preference", ("preference",), ("12_finetune",)),
}
SKIP = {"12_finetune": no_pairs, "13_preference": no_preference}


@dataclass(frozen=True)
class Launch:
    """Which processes train and what joins them.

    processes: ranks on this machine, of `nodes` machines with as many each. hosts: ranks by machine, from
    DeepSpeed's hostfile. deepspeed: a file of configs/deepspeed/ by its short name. fsdp: shard by FSDP2.
    tensor_parallel: ranks that share each matrix.
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

    @property
    def ranks(self) -> int:
        """Processes on all machines."""
        return sum(self.hosts.values()) or self.nodes * self.processes

    def check(
        self, config: Mapping[str, dict[str, Any]], file: str, hardware: Hardware | None = None
    ) -> Path | None:
        """Check the options against a recipe's file (``pretrain`` or ``finetune``), its model, and what this
        machine has (see `recipe.hardware.glance`).

        Returns the path of the DeepSpeed file. Raises Refused.
        """
        check_boards(config[file].get("report_to"), f"{file}.json")
        if hardware and not self.hosts:  # DeepSpeed's machines may be others than this one
            check_quantization(hardware, config[file], f"{file}.json")
            choose(hardware, config[file], f"{file}.json", documents_suffice(config, file))
        path = check_launch(config[file], file, self.deepspeed, self.ranks, self.fsdp, self.tensor_parallel)
        check_tensor_parallel(model_values(config), self.tensor_parallel)
        return path


def launch_of(arguments: argparse.Namespace) -> Launch:
    """The launch that the options of `add_options` describe. Raises Refused where they contradict."""
    nodes, node_rank = arguments.nnodes, arguments.node_rank
    if nodes < 1 or not 0 <= node_rank < nodes:
        raise Refused(f"--nnodes {nodes} --node-rank {node_rank}: wanted a rank from 0 to nnodes - 1")
    if arguments.nproc < 0:
        raise Refused(f"--nproc {arguments.nproc}: wanted the number of ranks on this machine, 1 or more")
    visible = count_gpus()
    if visible and arguments.nproc > visible and not arguments.hostfile:
        raise Refused(
            f"--nproc {arguments.nproc}: {visible} GPUs are visible here (nvidia-smi, CUDA_VISIBLE_DEVICES); "
            "wanted at most one rank for each"
        )
    if nodes > 1 and not arguments.master_addr:
        raise Refused(f"--nnodes {nodes}: give --master-addr, the address of node 0")
    if arguments.hostfile and (not arguments.deepspeed or nodes > 1):
        raise Refused("--hostfile is for --deepspeed, and starts the other nodes itself: without --nnodes")
    hosts = read_hostfile(Path(arguments.hostfile)) if arguments.hostfile else {}
    return Launch(
        processes=max(hosts.values()) if hosts else arguments.nproc or default_ranks(),
        nodes=nodes,
        node_rank=node_rank,
        master_addr=arguments.master_addr,
        master_port=arguments.master_port,
        hostfile=Path(arguments.hostfile).resolve() if hosts else None,
        hosts=hosts,
        deepspeed=arguments.deepspeed,
        fsdp=arguments.fsdp,
        tensor_parallel=arguments.tensor_parallel,
    )


def read_hostfile(path: Path) -> dict[str, int]:
    """Ranks by machine from lines ``NAME slots=N``, as DeepSpeed and MPI read them. Raises Refused."""
    if not path.is_file():
        raise Refused(f"--hostfile {path}: no such file")
    hosts: dict[str, int] = {}
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        found = re.fullmatch(r"(\S+)\s+slots=(\d+)", line)
        if not found or found[1] in hosts or int(found[2]) < 1:
            raise Refused(f"{path}:{number}: {line!r}, wanted `NAME slots=N`, each machine once")
        hosts[found[1]] = int(found[2])
    if len(hosts) < 2:
        raise Refused(f"{path}: {len(hosts)} machines. On one machine give --nproc instead of --hostfile")
    if not shutil.which("pdsh"):
        raise Refused("--hostfile: DeepSpeed reaches the other machines through pdsh: apt-get install pdsh")
    return hosts


def command(
    script: str, arguments: list[str], launch: Launch, deepspeed: Path | None, visible: str | None = None
) -> list[str]:
    """The command that trains on this machine's ranks, or by a hostfile on all machines.

    deepspeed: path of a DeepSpeed file, or None; without it one process runs as plain python.
    visible: CUDA_VISIBLE_DEVICES, which DeepSpeed's launcher would otherwise ignore beside a number of ranks.
    """
    count = str(launch.processes)
    if launch.nodes > 1:
        where = ["--nnodes", str(launch.nodes), "--node-rank", str(launch.node_rank)]
        where += ["--master-addr", launch.master_addr, "--master-port", str(launch.master_port)]
        launcher = [sys.executable, "-m", "torch.distributed.run", *where]
        return [*launcher, "--nproc-per-node", count, script, *arguments]
    if deepspeed:
        if launch.hostfile:
            ranks = ["--hostfile", str(launch.hostfile), "--master_port", str(launch.master_port)]
            ranks += ["--master_addr", launch.master_addr] if launch.master_addr else []
        else:
            ranks = ["--num_gpus", count]
            if visible:
                ranks = ["--include", "localhost:" + ",".join(visible.split(",")[: launch.processes])]
            ranks += ["--master_port", str(_free_port())]
        launcher = [sys.executable, "-m", "deepspeed.launcher.runner", *ranks, "--no_local_rank"]
        return [*launcher, script, *arguments]
    if launch.processes > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        return [*launcher, "--nproc-per-node", count, script, *arguments]
    return [sys.executable, script, *arguments]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def default_ranks() -> int:
    """One rank per visible GPU, one without any."""
    return max(1, count_gpus())


def visible_devices() -> str | None:
    """CUDA_VISIBLE_DEVICES where there are GPUs to see."""
    return os.environ.get("CUDA_VISIBLE_DEVICES") if count_gpus() else None


def _defaults(processes: int) -> dict[str, str]:
    threads = max(1, (os.cpu_count() or 1) // processes)
    return {
        "OMP_NUM_THREADS": str(threads),
        "TORCHINDUCTOR_CACHE_DIR": str(DATA / ".torchinductor"),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DS_ACCELERATOR": "cuda" if count_gpus() else "cpu",
        "PYTHONUNBUFFERED": "1",
    }


def child_environment(
    environment: Mapping[str, str], processes: int, for_hosts: Path | None = None
) -> dict[str, str]:
    """The child's environment: threads shared among the ranks, compiled kernels kept between runs, no
    telemetry; what the user has set wins.

    for_hosts: a file to write for DeepSpeed, which hands what stands in it to the machines of a hostfile.
    """
    defaults = _defaults(processes)
    chosen = defaults | dict(environment)
    if for_hosts:
        for_hosts.write_text("".join(f"{name}={chosen[name]}\n" for name in defaults), "utf-8")
        chosen["DS_ENV_FILE"] = str(for_hosts)
    return chosen


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that choose processes and what joins them."""
    add = parser.add_argument
    add("--nproc", type=int, default=0, help="ranks on this machine; default: one per GPU, else 1")
    add("--deepspeed", metavar="NAME", help="ZeRO by configs/deepspeed/NAME.json, e.g. zero2")
    add("--fsdp", action="store_true", help="shard weights and optimizer over the ranks by FSDP2")
    add("--tensor-parallel", type=int, default=1, metavar="N", help="split each matrix over N ranks")
    add("--nnodes", type=int, default=1, help="machines; run the command on each, with its --node-rank")
    add("--node-rank", type=int, default=0, help="0 on the machine that holds the stage")
    add("--master-addr", default="", help="address of node 0")
    add("--master-port", type=int, default=29500, help="a free port of node 0 (default: 29500)")
    add("--hostfile", metavar="FILE", help="machines for --deepspeed, lines `NAME slots=N`, reached by pdsh")
    add("--probe", action="store_true", help="measure settings and name the fastest (stage 05 only)")


def train(stage: Stage, script: Path) -> None:
    """Run the training child to its end; its ``result.json`` becomes the stage's figures."""
    result = stage.folder / "result.json"
    if not result.exists():  # else only the publication was missing
        (stage.folder / "stop").unlink(missing_ok=True)
        shutil.rmtree(stage.folder / "ranks", ignore_errors=True)  # of an earlier try
        _run_child(stage, script, stage.folder)
        if not result.exists():
            raise RecipeError("training ended without a result; the reason stands above")
    stage.figures = read_json(result)
    stage.headline = stage.figures.pop("headline")
    for name in ("plan.json", "deepspeed_env"):
        (stage.folder / name).unlink(missing_ok=True)
    shutil.rmtree(stage.folder / "ranks", ignore_errors=True)


def _run_child(stage: Stage, script: Path, plans: Path, published: Callable[[], bool] | None = None) -> None:
    """Write the plan into the folder `plans`, start the launcher and wait for it (see `_wait`)."""
    from recipe.preflight import check_room  # here: it imports this module's names

    launch = launch_of(stage.arguments)
    file = STAGES[script.name][1][-1]
    if file == "pretrain" and find_initial(stage.config[file]):
        check_recipe(stage.config, f"configs/{stage.recipe}")  # again, now that its config.json was fetched
    deepspeed = launch.check(stage.config, file, glance())
    if not launch.node_rank:
        check_room(stage, launch, file)
    plan = training_plan(stage.recipe, stage.config, stage.inputs, launch, deepspeed, stage.folder)
    write_json(plans / "plan.json", plan)
    line = command(str(script), [str(plans / "plan.json")], launch, deepspeed, visible_devices())
    stage.say("runs: " + " ".join(Path(part).name if part == sys.executable else part for part in line))
    for_hosts = stage.folder / "deepspeed_env" if launch.hostfile else None
    environment = child_environment(os.environ, launch.processes, for_hosts)
    lock = () if launch.node_rank else (stage.lock,)
    watchdog = Watchdog(stage.folder / "ranks")
    child = subprocess.Popen(line, env=environment, pass_fds=lock, start_new_session=True)
    code = _wait(child, stage, watchdog, published)
    if code == EXIT_REFUSED:
        raise Refused("the training refused to start; the reason stands above")
    if code:
        reason = watchdog.found or f"training ended with exit {code} before it was finished"
        called = launch.node_rank == 0 and call_webhook(f"{stage.name} of recipe {stage.recipe}: {reason}")
        if called:
            stage.say(called)
        raise RecipeError(
            f"{reason}; more stands above. Checkpoints are kept: run the same command again to continue"
        )


def training_plan(
    recipe: str,
    config: dict[str, dict[str, Any]],
    inputs: Mapping[str, Path],
    launch: Launch,
    deepspeed: Path | None,
    folder: Path,
) -> dict[str, Any]:
    """What the training child reads: settings, launch, and paths of its inputs and its work folder."""
    return {
        "recipe": recipe,
        "config": config,
        "deepspeed": str(deepspeed) if deepspeed else None,
        "fsdp": launch.fsdp,
        "tensor_parallel": launch.tensor_parallel,
        "ranks": launch.ranks,
        "parent": os.getpid(),
        "host": platform.node(),
        "folder": str(folder),
        "inputs": {name: str(path) for name, path in inputs.items()},
    }


def join(name: str, doc: str, script: Path) -> None:
    """Lend this machine's ranks to the stage that node 0 holds; exits with the right code."""
    _, sections, inputs = STAGES[script.name]
    parser = stage_arguments(doc)
    add_options(parser)
    arguments = parser.parse_args()
    with _ends_in_one_line(name):
        config = load_recipe(arguments.recipe, arguments.overrides)
        reason = SKIP[name](config) if name in SKIP else ""
        if reason:
            print(f"{name:15} nothing to join: {reason}")
            return
        final = stage_folder(arguments.recipe, name)
        if (final / "stage.json").exists() and not arguments.force:
            print(f"{name:15} nothing to join: {final} is there; node 0 says more")
            return
        folder = final.with_name(f".{name}.work")  # node 0's, made before the ranks find each other
        folders = {stage: stage_folder(arguments.recipe, stage) for stage in inputs}
        stage = Stage(name, arguments.recipe, config, folders, folder, arguments, lock=-1)
        if arguments.dry_run:
            launch_of(arguments).check(config, sections[-1], glance())
            print(f"{name:15} would join node 0 at {arguments.master_addr}")
            return
        before = _identity(final / "stage.json")
        with tempfile.TemporaryDirectory() as plans:
            _run_child(
                stage, script, Path(plans), lambda: _identity(final / "stage.json") not in (None, before)
            )


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        facts = path.stat()
    except FileNotFoundError:
        return None
    return facts.st_ino, facts.st_mtime_ns


def _wait(
    child: subprocess.Popen[bytes],
    stage: Stage,
    watchdog: Watchdog,
    published: Callable[[], bool] | None = None,
) -> int:
    """Wait for the child. On SIGINT or SIGTERM write the stop file and raise Interrupted once all has ended;
    likewise when somebody else wrote it (``touch outputs/RECIPE/.05_pretrain.work/stop``).

    A file, because it reaches every rank under every launcher and on every machine: DeepSpeed's dies of a
    signal and leaves its ranks behind.

    watchdog: where it finds ranks that stand still, they write their stacks and all ranks are killed.

    published: whether node 0 has the stage's result, for the other nodes: it may have one without training,
    and ranks of theirs would wait for its ranks for ever.
    """
    received: list[int] = []
    stop = stage.folder / "stop"

    def ask_to_stop(signum: int, frame: object) -> None:
        received.append(signum)
        if len(received) < 3:
            with contextlib.suppress(FileNotFoundError):  # another node's folder that is not there any more
                stop.touch()
            stage.say("stopping: the training saves a checkpoint after this step (two signals more kill it)")
        else:
            kill(child)

    old = {signum: signal.signal(signum, ask_to_stop) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        while child.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(1)
            if child.poll() is None and watchdog.stalled():
                stage.say(f"the training stands still. {watchdog.found}")
                dump_stacks(watchdog)
                kill(child)
            if published and published():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(10)  # for ranks that have trained and are on their way out
                if child.poll() is None:
                    child.terminate()
                    child.wait()
                    stage.say("node 0 has the result without training")
                    return 0
        code = child.wait()
    finally:
        for signum, handler in old.items():
            signal.signal(signum, handler)
    if received or (code and stop.exists()):
        by_interrupt = bool(received) and received[0] == signal.SIGINT
        raise Interrupted(
            f"stopped by a {'signal' if received else 'stop file'}. Run the same command again to continue "
            "from the checkpoint",
            EXIT_INTERRUPTED if by_interrupt else EXIT_TERMINATED,
        )
    return code


def kill(child: subprocess.Popen[bytes]) -> None:
    """Kill a child and all below it: torchrun's ranks have sessions of their own, and outlive it."""
    for process in reversed(descendants(child.pid)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def descendants(process: int) -> list[int]:
    """A process and all below it, parents first (Linux)."""
    found = [process]
    with contextlib.suppress(OSError):
        for child in Path(f"/proc/{process}/task/{process}/children").read_text().split():
            found += descendants(int(child))
    return found


@contextlib.contextmanager
def _ends_in_one_line(name: str) -> Iterator[None]:
    """Errors and Ctrl-C end the process as those of a stage do."""
    try:
        yield
    except RecipeError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


def _probe(name: str, script: Path, dry_run: bool) -> None:
    """Measure settings instead of training."""
    from recipe import probe  # here: it imports this module's names

    def end(signum: int, frame: object) -> None:
        raise Interrupted("terminated (SIGTERM)", EXIT_TERMINATED)

    signal.signal(signal.SIGTERM, end)
    with _ends_in_one_line(name):
        if name != "05_pretrain":
            raise Refused("--probe measures the settings of stage 05 only. Leave it out")
        if dry_run:
            raise Refused("--probe measures and --dry-run computes. Leave one of them out")
        probe.main(script)


def _forecast(config: dict[str, dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Print the preflight of a pretraining."""
    from recipe.preflight import report

    launch = launch_of(arguments)
    launch.check(config, "pretrain", glance())
    if "model_type" not in model_values(config):
        print(f"  parameters   known once the checkpoint is fetched: {config['pretrain']['initial_model']}")
        return
    for line in report(arguments.recipe, config, launch):
        print(f"  {line}")


def _check_tuning(file: str) -> Callable[[dict[str, Any], argparse.Namespace], None]:
    """The preview of a stage that has no preflight: its launch is checked. file: its own JSON file."""

    def check(config: dict[str, dict[str, Any]], arguments: argparse.Namespace) -> None:
        if file in config:
            launch_of(arguments).check(config, file, glance())

    return check


def main() -> None:
    """Run the stage that belongs to the training script named first on the command line."""
    script = Path(sys.argv.pop(1))
    with _ends_in_one_line("recipe.launch"):
        if script.name not in STAGES:
            raise Refused(f"{script}: wanted one of {', '.join(STAGES)}")
    name, sections, inputs = STAGES[script.name]
    doc = f"Stage {name}: {script.name} under plain python, torchrun (--nproc, --nnodes) or deepspeed."
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--node-rank", type=int, default=0)
    early.add_argument("--probe", action="store_true")
    early.add_argument("--dry-run", action="store_true")
    asked = early.parse_known_args()[0]
    if asked.probe:
        _probe(name, script, asked.dry_run)
        return
    if asked.node_rank > 0:
        join(name, doc, script)
        return
    run_stage(
        f"{name}.sh",
        doc,
        lambda stage: train(stage, script),
        sections,
        inputs,
        options=add_options,
        resumable=True,
        skip=SKIP.get(name),
        preview=_forecast if name == "05_pretrain" else _check_tuning(sections[-1]),
    )


if __name__ == "__main__":
    main()
