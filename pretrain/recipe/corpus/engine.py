"""The data engine: phases of parallel tasks on one machine, on Slurm or on Ray, all by datatrove.

A phase is a datatrove pipeline whose tasks are independent: task k does part k of the work, renames its
output when it is complete, and is then marked as complete. After a kill, only the missing tasks are run. The
markers are in the stage's work folder. The stage deletes that folder when a setting or an input has changed,
so that the markers are never stale.

``engine`` in dataset.json decides where tasks run:

===========  ============================================================================================
executor     further keys
===========  ============================================================================================
local        workers (default: one per core)
slurm        partition, time, workers (at most at once), mem_per_cpu_gb, env_command, sbatch_args, all as in
             datatrove's SlurmPipelineExecutor; the project's folder must be on a disk that all nodes share
ray          workers, address of the cluster (default: one is started on this machine); the same disk
===========  ============================================================================================
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from recipe import host
from recipe.progress import progress
from recipe.project import RecipeError, Refused, naming_full_disk, require_extra
from recipe.signals import end_with_parent

# A task: called with (None or the documents of the step before, rank, number of tasks).
Task = Callable[[Any, int, int], Any]
POLL_SECONDS = 5.0
# Failures of squeue in a row: five minutes.
PATIENCE = 60


@contextmanager
def engine(config: dict[str, Any], folder: Path) -> Iterator[Engine]:
    """The engine that ``engine`` in dataset.json describes; its worker processes end with the block.

    folder: the stage's work folder, for the markers and logs of the phases.
    """
    chosen = Engine(config, folder)
    try:
        yield chosen
    finally:
        chosen.close()


def require_executor(config: dict[str, Any]) -> None:
    """Raise Refused unless this machine has what the executor needs. config: ``engine`` of dataset.json."""
    executor = config.get("executor")
    if executor == "ray":
        require_extra("ray", 'dataset.json: engine: executor: "ray"')
    if executor == "slurm" and not shutil.which("sbatch"):
        raise Refused(
            'dataset.json: engine.executor: "slurm", but there is no sbatch on this machine. Run on a '
            "login node, or use --set 'dataset.engine={}'"
        )


class Engine:
    """Runs phases; see `engine`."""

    def __init__(self, config: dict[str, Any], folder: Path) -> None:
        self.config = {"executor": "local"} | config
        self.workers = self.config.get("workers") or host.cores()
        self.logs = folder / "logs"
        self.pool: ProcessPoolExecutor | None = None

    def run(self, phase: str, pipeline: Sequence[Task], tasks: int) -> None:
        """Run the tasks of a phase that are not complete yet; return when all are.

        Raises the RecipeError of the first task that fails, or one with the phase, the task and its log.
        """
        if not tasks:
            return
        run = {"local": self._run_local, "slurm": self._run_slurm, "ray": self._run_ray}
        run[self.config["executor"]](phase, list(pipeline), tasks)

    def close(self) -> None:
        """Kill the workers; the next run repeats the tasks that are not complete."""
        if self.pool:
            for worker in multiprocessing.active_children():
                worker.kill()
            self.pool.shutdown(wait=True, cancel_futures=True)
            self.pool = None

    def _run_local(self, phase: str, pipeline: list[Task], tasks: int) -> None:
        from datatrove.executor.local import LocalPipelineExecutor

        # datatrove's own pool waits forever when the system has killed a worker (out of memory). This pool
        # raises BrokenProcessPool.
        executor = LocalPipelineExecutor(pipeline, tasks, logging_dir=str(self.logs / phase))
        ranks = executor.get_incomplete_ranks()
        if not ranks:
            return
        if len(ranks) < tasks:
            print(f"{phase}: continues, {tasks - len(ranks)} of {tasks} tasks are done", flush=True)
        if self.pool is None:
            self.logs.mkdir(parents=True, exist_ok=True)
            # Not forkserver: it and its workers would survive a killed parent.
            context = multiprocessing.get_context("spawn")
            self.pool = ProcessPoolExecutor(self.workers, context, _start_worker, (str(self.logs),))
        futures = {self.pool.submit(_run_rank, executor, rank): rank for rank in ranks}
        try:
            for future in progress(as_completed(futures), phase, "tasks", len(futures)):
                rank = futures[future]
                with naming_full_disk(self.logs / phase):  # datatrove's own files
                    future.result()
        except RecipeError:
            raise
        except BrokenProcessPool as error:
            raise RecipeError(
                f"{phase}: a worker process was killed, most likely because memory ran out. Run again to "
                f"continue, with fewer workers: --set dataset.engine.workers={max(1, self.workers // 2)}"
            ) from error
        except Exception as error:
            raise RecipeError(
                f"{phase}: task {rank} failed: {error!r}\n{self._log_tail(phase, rank)}"
            ) from error

    def _run_slurm(self, phase: str, pipeline: list[Task], tasks: int) -> None:
        from datatrove.executor.slurm import SlurmPipelineExecutor

        require_executor(self.config)
        options = {key: value for key, value in self.config.items() if key != "executor"}
        options.setdefault(
            "env_command", f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH"
        )
        # By this name all jobs of the phase are found, also those of a run that was killed.
        name = f"recipe-{phase}-{hashlib.sha256(str(self.logs).encode()).hexdigest()[:8]}"
        executor = SlurmPipelineExecutor(
            pipeline, tasks, job_name=name, logging_dir=str(self.logs / phase), qos="", **options
        )
        # Nothing reads the merged statistics, and their job would wait forever for a task that failed.
        executor.launch_merge_stats = lambda: None
        _slurm_cancel(name)
        while _slurm_queue(name):  # tasks that end would write next to the new ones
            time.sleep(POLL_SECONDS)
        try:
            executor.run()
            while missing := executor.get_incomplete_ranks(skip_completed=True):
                # The queue is read before the markers: a task that ends between the two is then not lost.
                queued = _slurm_queue(name)
                missing = executor.get_incomplete_ranks(skip_completed=True)
                if missing and not queued:
                    raise RecipeError(
                        f"{phase}: {len(missing)} of {tasks} tasks ended without a result, the first is "
                        f"{missing[0]}. Run again to continue.\n{self._log_tail(phase, missing[0])}"
                    )
                time.sleep(POLL_SECONDS if missing else 0)
        finally:
            _slurm_cancel(name)

    def _run_ray(self, phase: str, pipeline: list[Task], tasks: int) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        require_executor(self.config)
        import ray
        from datatrove.executor.ray import RayPipelineExecutor

        if not ray.is_initialized():
            address = self.config.get("address")
            ray.init(address=address, num_cpus=None if address else self.workers, log_to_driver=False)
        executor = RayPipelineExecutor(
            pipeline,
            tasks,
            workers=self.workers,
            logging_dir=str(self.logs / phase),
            mem_per_cpu_gb=self.config.get("mem_per_cpu_gb", 1),
        )
        executor.run()
        # datatrove only logs a task that raises.
        missing = executor.get_incomplete_ranks(skip_completed=True)
        if missing:
            raise RecipeError(
                f"{phase}: {len(missing)} of {tasks} tasks failed, the first is {missing[0]}.\n"
                f"{self._log_tail(phase, missing[0])}"
            )

    def _log_tail(self, phase: str, rank: int) -> str:
        """The last lines of a task's log, and the path of the log."""
        path = self.logs / phase / "logs" / f"task_{rank:05d}.log"
        lines = path.read_text("utf-8", errors="replace").splitlines()[-8:] if path.exists() else []
        return "\n".join([f"  {path}:", *(f"  {line}" for line in lines)])


def _start_worker(logs: str) -> None:
    """Set up a worker: it ends with its parent and ignores Ctrl-C; what datatrove prints goes to a file."""
    end_with_parent(signal.SIGKILL)  # no orphan may write during the next run
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stderr = open(Path(logs) / "workers.log", "a", buffering=1)  # noqa: SIM115


def _run_rank(executor: Any, rank: int) -> None:
    executor._run_for_rank(rank, local_rank=1)


def _slurm_queue(name: str) -> str:
    """What squeue shows of the jobs of a name: nothing once they have ended.

    A squeue that fails says nothing of the jobs: it is asked again, as the controller may be restarting.
    Raises RecipeError when it fails `PATIENCE` times in a row.
    """
    for _ in range(PATIENCE):
        done = subprocess.run(["squeue", "--noheader", f"--name={name}"], capture_output=True, text=True)
        if not done.returncode:
            return done.stdout.strip()
        time.sleep(POLL_SECONDS)
    raise RecipeError(f"squeue fails {PATIENCE} times: {done.stderr.strip()}. Run again to continue")


def _slurm_cancel(name: str) -> None:
    """End the jobs of a name, if there are any."""
    subprocess.run(["scancel", f"--name={name}"], capture_output=True)
