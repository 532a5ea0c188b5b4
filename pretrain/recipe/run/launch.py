"""Start a training script with plain python, torchrun or deepspeed.

05_pretrain.sh, 12_finetune.sh and 13_preference.sh call it:

    python -m recipe.run.launch SCRIPT --recipe tiny [--nproc N] [--deepspeed zero2]

This process runs the stage (checks, lock, publication) and never imports torch. The training runs in a child
process, which writes into the stage's work folder. When this process gets a signal, the child saves a
checkpoint and ends.

With several nodes, the same command runs on each node with its own --node-rank. Node 0 runs the stage; the
other nodes only start their ranks (`join`). All nodes share the project's folder over a network file system.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recipe.config.initial_model import find_initial
from recipe.config.model import model_values
from recipe.config.recipe import check_recipe, load_recipe
from recipe.config.staleness import deciding_keys
from recipe.conversations.instructions import no_pairs
from recipe.conversations.preferences import no_preference
from recipe.endings import errors_in_one_line, raise_stopped
from recipe.hardware import glance
from recipe.project import (
    EXIT_REFUSED,
    EXIT_TERMINATED,
    RECORD,
    Interrupted,
    RecipeError,
    Refused,
    is_finished,
    read_json,
    read_record,
    read_state,
    stage_folder,
    work_folder,
    write_json,
)
from recipe.run import probe
from recipe.run.extension import raised_length
from recipe.run.launch_options import TRAINING_STAGES, TrainingStage, add_options, launch_of
from recipe.run.preflight import check_resources, report
from recipe.run.processes import (
    child_environment,
    command,
    kill,
    kill_orphans,
    living_ranks,
    training_plan,
    visible_devices,
)
from recipe.run.publication import RESULT, WANTED
from recipe.run.restarts import pause_before, why_no_restart
from recipe.run.stage import Stage, run_stage, stage_arguments
from recipe.signals import adopt_orphans, end_with_parent, exit_code_of, on_stop
from recipe.training.files import CHECKPOINTS, RANKS, STOP
from recipe.training.messages import send_message
from recipe.training.spikes import read_skipped
from recipe.training.watchdog import REFUSED, Watchdog, dump_stacks

# Why a recipe does without a training stage, by the stage's name.
SKIP = {"12_finetune": no_pairs, "13_preference": no_preference}


def run_training(stage: Stage, script: Path) -> None:
    """Run the training child to its end; its ``result.json`` becomes the stage's figures."""
    result = stage.folder / RESULT
    # With a result, an earlier run has finished the training and was stopped before the publication.
    if not read_state(result, "headline"):
        if living := living_ranks(stage.folder):
            raise Refused(
                f"{stage.folder}: ranks of an earlier run still train in it: processes "
                f"{', '.join(map(str, living))} on {platform.node()}. Wait until they have "
                f"saved and ended, or end them with kill -9 {' '.join(map(str, living))}"
            )
        (stage.folder / STOP).unlink(missing_ok=True)
        shutil.rmtree(stage.folder / RANKS, ignore_errors=True)
        _run_child(stage, script, stage.folder)
        if not read_state(result, "headline"):
            raise RecipeError("the training ended without a result; the lines above say why")
    stage.figures = read_json(result)
    stage.headline = stage.figures.pop("headline")
    if not stage.config[TRAINING_STAGES[script.name].file].get("keep_checkpoints", True):
        shutil.rmtree(stage.folder / CHECKPOINTS, ignore_errors=True)
    send_message(stage.folder, f"finished: {stage.headline}")
    for name in ("plan.json", "deepspeed_env"):
        (stage.folder / name).unlink(missing_ok=True)
    shutil.rmtree(stage.folder / RANKS, ignore_errors=True)


def _run_child(stage: Stage, script: Path, plans: Path, published: Callable[[], bool] | None = None) -> None:
    """Write the plan into the folder `plans`, start the launcher, and wait for it (see `_wait`).

    It is started again when the training goes back to an earlier checkpoint, and when it has failed, as often
    as ``--max-restarts`` allows.
    """
    launch = launch_of(stage.arguments)
    file = TRAINING_STAGES[script.name].file
    if file == "pretrain" and find_initial(stage.config[file]):
        # Check again: the checkpoint's config.json has been fetched since.
        check_recipe(stage.config, f"configs/{stage.recipe}")
    deepspeed = launch.check(stage.config, file, glance())
    if not launch.node_rank:
        check_resources(stage, launch, file)
    plan = training_plan(stage.recipe, stage.config, stage.inputs, launch, deepspeed, stage.folder)
    write_json(plans / "plan.json", plan)
    line = command(str(script), [str(plans / "plan.json")], launch, deepspeed, visible_devices())
    stage.say("runs: " + " ".join(Path(part).name if part == sys.executable else part for part in line))
    for_hosts = stage.folder / "deepspeed_env" if launch.hostfile else None
    environment = child_environment(os.environ, launch.processes, for_hosts)
    lock = () if launch.node_rank else (stage.lock,)
    adopt_orphans()
    failed: list[int] = []
    while True:
        times_back = len(read_skipped(stage.folder).back)
        watchdog = Watchdog(stage.folder / RANKS)
        child = subprocess.Popen(
            line,
            env=environment,
            pass_fds=lock,
            start_new_session=True,
            # It would otherwise go on when this process is killed.
            preexec_fn=functools.partial(end_with_parent, signal.SIGTERM),
        )
        code = _wait(child, stage, watchdog, published)
        if not code:
            return
        if len(read_skipped(stage.folder).back) > times_back:
            stage.say("the training goes back to an earlier checkpoint; the warning above says why")
            if launch.node_rank == 0:
                step = read_skipped(stage.folder).back[-1][0]
                send_message(stage.folder, f"a spike: the training goes back to step {step}")
            continue
        # torchrun ends with 1, whatever the code of a rank is.
        if code == EXIT_REFUSED or (stage.folder / RANKS / REFUSED).exists():
            raise Refused("the training refused to start; the lines above say why")
        failed.append(watchdog.reached())
        reason = watchdog.found or f"the training stopped with exit code {code} before its end"
        if code == -signal.SIGKILL:
            reason += " (killed, as Linux does when the memory is full)"
        _pause_before_restart(stage, reason, failed)


def _pause_before_restart(stage: Stage, reason: str, failed: list[int]) -> None:
    """Tell that a training has failed, and wait; raises RecipeError when it is not to be started again.

    failed: see `why_no_restart`.
    """
    restart, most = len(failed), stage.arguments.max_restarts
    if final := why_no_restart(failed, most):
        send_message(stage.folder, f"{reason}. {final}")
        raise RecipeError(
            f"{reason}; see the lines above. {final}. Checkpoints are kept: run the same command again, "
            "without --force, to continue"
        )
    pause = pause_before(restart)
    line = f"{reason}. Restart {restart} of {most} from the newest good checkpoint in {pause:.0f} s"
    send_message(stage.folder, line)
    stage.say(line)
    time.sleep(pause)


def join(name: str, doc: str, script: Path) -> None:
    """Start this node's ranks for the stage that node 0 runs, and exit with the right code."""
    training = TRAINING_STAGES[script.name]
    parser = stage_arguments(doc)
    parser.prog = f"{name}.sh"
    add_options(parser)
    arguments = parser.parse_args()
    on_stop(raise_stopped)
    with errors_in_one_line(name):
        config = load_recipe(arguments.recipe, arguments.overrides)
        reason = SKIP[name](config) if name in SKIP else ""
        if reason:
            print(f"{name:15} nothing to do on this node: {reason}")
            return
        final = stage_folder(arguments.recipe, name)
        # Node 0's work folder, which it makes before the ranks find each other.
        folder = work_folder(final)
        done = is_finished(final) and not arguments.force
        if done and not goes_on(final, folder, training, config):
            print(f"{name:15} nothing to do on this node: {final} is already there; see the output of node 0")
            return
        folders = {stage: stage_folder(arguments.recipe, stage) for stage in training.inputs}
        stage = Stage(name, arguments.recipe, config, folders, folder, arguments, lock=-1)
        if arguments.dry_run:
            launch_of(arguments).check(config, training.file, glance())
            print(f"{name:15} would join node 0 at {arguments.master_addr}")
            return
        before = _identity(final / RECORD)
        with tempfile.TemporaryDirectory() as plans:
            _run_child(stage, script, Path(plans), lambda: _identity(final / RECORD) not in (None, before))


def goes_on(final: Path, work: Path, training: TrainingStage, config: dict[str, dict[str, Any]]) -> bool:
    """Whether node 0 goes on with a finished training: a redo that was interrupted, or a longer one."""
    unfinished = read_state(work / WANTED, "config")
    redo = unfinished and all(
        deciding_keys(file, config[file]) == deciding_keys(file, values)
        for file, values in unfinished["config"].items()
    )
    before = deciding_keys(
        training.file, read_record(final, "wanted")["wanted"]["config"].get(training.file, {})
    )
    return bool(redo or raised_length(before, deciding_keys(training.file, config[training.file])))


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
    """Wait for the child and return its exit code.

    On a signal of `STOPPING` the stop file is written, and Interrupted is raised when the child has ended. A
    stop file that somebody else has written (``touch outputs/RECIPE/.05_pretrain.work/stop``) does the same.
    It is a file because that reaches every rank under every launcher and on every machine: DeepSpeed's
    launcher dies of a signal and leaves its ranks running.

    watchdog: finds ranks that make no progress. They then write their stacks, and all ranks are killed.

    published: for nodes other than 0, whether node 0 has the stage's result. It may have taken it over
    without training; the ranks of the other nodes would then wait forever.
    """
    received: list[int] = []
    stop = stage.folder / STOP

    def ask_to_stop(signum: int, frame: object) -> None:
        received.append(signum)
        if len(received) < 3:
            # The work folder is node 0's, and may be gone.
            with contextlib.suppress(FileNotFoundError):
                stop.touch()
            stage.say("stopping: the training saves a checkpoint after this step (two more signals kill it)")
        else:
            kill(child)

    old = on_stop(ask_to_stop)
    try:
        while child.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(1)
            if child.poll() is None and watchdog.stalled():
                stage.say(f"the training makes no progress. {watchdog.found}")
                dump_stacks(watchdog)
                kill(child)
            if published and published():
                # Ranks that have trained need a moment to end.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(10)
                if child.poll() is None:
                    child.terminate()
                    child.wait()
                    stage.say("node 0 has the result without training")
                    return 0
        code = child.wait()
    finally:
        for signum, handler in old.items():
            signal.signal(signum, handler)
        # A launcher that was killed leaves its ranks behind.
        left = kill_orphans()
    if left and code:
        stage.say(f"killed the processes that the launcher has left: {', '.join(map(str, left))}")
    if received or (code and stop.exists()):
        why = f"stopped by a {'signal' if received else 'stop file'}"
        send_message(stage.folder, why)
        raise Interrupted(
            f"{why}. Run the same command again, without --force, to continue from the checkpoint",
            exit_code_of(received[0]) if received else EXIT_TERMINATED,
        )
    return code


def _probe(name: str, script: Path, dry_run: bool) -> None:
    """Measure settings instead of training."""
    on_stop(raise_stopped)
    with errors_in_one_line(name):
        if name != "05_pretrain":
            raise Refused("--probe measures the settings of stage 05 only. Leave --probe out")
        if dry_run:
            raise Refused("--probe measures and --dry-run only computes. Leave one of them out")
        probe.main(script)


def _preview(file: str, config: dict[str, dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Check the launch of a training, by its training file; of a pretraining, print the preflight report."""
    launch = launch_of(arguments)
    launch.check(config, file, glance())
    if file != "pretrain":
        return
    if "model_type" not in model_values(config):
        print(f"  parameters   known once the checkpoint is fetched: {config['pretrain']['initial_model']}")
        return
    for line in report(arguments.recipe, config, launch):
        print(f"  {line}")


def main() -> None:
    """Run the stage of the training script that the command line names first."""
    script = Path(sys.argv.pop(1) if sys.argv[1:] else "")
    with errors_in_one_line("recipe.run.launch"):
        if script.name not in TRAINING_STAGES:
            raise Refused(f"{script}: expected one of {', '.join(TRAINING_STAGES)}")
    name, sections, inputs = TRAINING_STAGES[script.name]
    doc = f"Stage {name}: {script.name} under plain python, torchrun (--nproc, --nnodes) or deepspeed."
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--node-rank", type=int, default=0)
    early.add_argument("--probe", action="store_true")
    early.add_argument("--dry-run", action="store_true")
    options = early.parse_known_args()[0]
    if options.probe:
        _probe(name, script, options.dry_run)
        return
    if options.node_rank > 0:
        join(name, doc, script)
        return
    run_stage(
        f"{name}.sh",
        doc,
        lambda stage: run_training(stage, script),
        sections,
        inputs,
        options=add_options,
        resumable=True,
        skip=SKIP.get(name),
        extends=sections[-1],
        preview=functools.partial(_preview, sections[-1]),
    )


if __name__ == "__main__":
    main()
