"""Phases on this machine, under a stub of Slurm and on Ray: resumed, failed, killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from recipe.corpus import engine as engine_module
from recipe.corpus.engine import engine
from recipe.project import RecipeError


@dataclass
class Square:
    """Writes the square of its rank, and counts its runs. It fails or is killed if it is told to."""

    folder: Path
    fails: int = -1
    killed: int = -1

    def __call__(self, _: object, rank: int, tasks: int) -> None:
        with (self.folder / f"runs-{rank}").open("a") as handle:
            handle.write("x")
        if rank == self.fails:
            raise RecipeError(f"part {rank} cannot be read")
        if rank == self.killed:
            os.kill(os.getpid(), signal.SIGKILL)
        (self.folder / str(rank)).write_text(f"{rank * rank} of {tasks}")


def squares(folder: Path, tasks: int) -> list[str]:
    return [(folder / str(rank)).read_text() for rank in range(tasks)]


def test_every_task_runs_once_with_its_rank(tmp_path):
    with engine({"workers": 2}, tmp_path) as phases:
        phases.run("square", [Square(tmp_path)], 5)
    assert squares(tmp_path, 5) == [f"{k * k} of 5" for k in range(5)]


def test_a_failed_task_raises_its_error_and_a_rerun_does_only_missing_tasks(tmp_path):
    with (
        pytest.raises(RecipeError, match="part 3 cannot be read"),
        engine({"workers": 1}, tmp_path) as phases,
    ):
        phases.run("square", [Square(tmp_path, fails=3)], 5)
    with engine({"workers": 1}, tmp_path) as phases:
        phases.run("square", [Square(tmp_path)], 5)
    assert squares(tmp_path, 5)[3] == "9 of 5"
    assert (tmp_path / "runs-0").read_text() == "x"
    assert (tmp_path / "runs-3").read_text() == "xx"


def test_a_killed_worker_is_noticed(tmp_path):
    with pytest.raises(RecipeError, match="workers=1"), engine({"workers": 2}, tmp_path) as phases:
        phases.run("square", [Square(tmp_path, killed=1)], 3)


def test_another_error_names_phase_task_and_log(tmp_path):
    words = r"(?s)square: task 0 failed: .*FileNotFoundError.*task_00000\.log"
    with pytest.raises(RecipeError, match=words), engine({"workers": 1}, tmp_path) as phases:
        phases.run("square", [Square(tmp_path / "missing")], 1)


# -------------------------------------------------------------------------------------------------------
# Slurm

SBATCH = """#!/bin/bash
# Runs the elements of a job array one after another, as Slurm would at once. Started as: sbatch OPTIONS
# SCRIPT
script="${@: -1}"
mkdir -p "$STUB"
cp "$script" "$STUB/script-$(ls "$STUB" | wc -l)"
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
if grep -q merge_stats "$script"; then last=-1; fi
for ((i = 0; i <= last; i++)); do
  SLURM_ARRAY_TASK_ID=$i SLURM_JOB_ID=7 SLURM_NODELIST=here bash "$script" >> "$STUB/out" 2>&1
done
echo "Submitted batch job 7"
"""
SRUN = '#!/bin/bash\nwhile [[ $1 == -* ]]; do if [[ $1 == -n ]]; then shift; fi; shift; done\nexec "$@"\n'


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Path:
    """A PATH with stand-ins for sbatch, srun, scontrol, and for squeue and scancel, which note that."""
    programs = tmp_path / "bin"
    programs.mkdir()
    texts = {
        "sbatch": SBATCH,
        "srun": SRUN,
        "squeue": '#!/bin/bash\necho "squeue $*" >> "$STUB.asked"\n',
        "scancel": '#!/bin/bash\necho "scancel $*" >> "$STUB.asked"\n',
        "scontrol": "#!/bin/bash\necho here\n",
    }
    for name, text in texts.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    # `recipe` and this module must be found by the jobs, as they are where the disk is shared.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setenv("STUB", str(tmp_path / "stub"))
    return tmp_path / "stub"


def test_slurm_runs_the_same_pipeline_by_a_valid_script(tmp_path, slurm):
    config = {"executor": "slurm", "partition": "cpu", "time": "01:00:00", "workers": 2}
    with engine(config, tmp_path) as phases:
        phases.run("square", [Square(tmp_path)], 3)
    assert squares(tmp_path, 3) == [f"{k * k} of 3" for k in range(3)]
    script = tmp_path / "logs/square/launch_script.slurm"
    text = script.read_text()
    assert len(list(slurm.glob("script-*"))) == 1, (
        "a job that waits for the others would look like one of them"
    )
    assert "#SBATCH --partition=cpu" in text and "#SBATCH --array=0-2%2" in text and "srun" in text
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    checker = shutil.which("shellcheck") or Path(sys.executable).with_name("shellcheck")
    checked = subprocess.run([checker, "--severity=warning", script], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_slurm_names_a_task_that_ended_without_a_result(tmp_path, slurm):
    config = {"executor": "slurm", "partition": "cpu", "time": "01:00:00"}
    with (
        pytest.raises(RecipeError, match=r"(?s)1 of 3 tasks ended without a result.*part 1 cannot be read"),
        engine(config, tmp_path) as phases,
    ):
        phases.run("square", [Square(tmp_path, fails=1)], 3)


def test_slurm_jobs_of_a_run_that_was_killed_are_cancelled_first(tmp_path, slurm):
    """Then those of this one, by the same name, when it ends."""
    config = {"executor": "slurm", "partition": "cpu", "time": "01:00:00"}
    with pytest.raises(RecipeError), engine(config, tmp_path) as phases:
        phases.run("square", [Square(tmp_path, fails=0)], 1)
    asked = slurm.with_name("stub.asked").read_text().splitlines()
    (name,) = {line.split("--name=")[1] for line in asked}
    script = (tmp_path / "logs/square/launch_script.slurm").read_text()
    assert name.startswith("recipe-square-") and f"#SBATCH --job-name={name}" in script
    programs = [line.split()[0] for line in asked]
    assert programs[:2] == ["scancel", "squeue"] and programs[-1] == "scancel"


def test_slurm_jobs_are_not_lost_while_squeue_fails(tmp_path, slurm, monkeypatch):
    """It is asked again, and in the end there is one line."""
    monkeypatch.setattr(engine_module, "POLL_SECONDS", 0.01)
    program, config = tmp_path / "bin/squeue", {"executor": "slurm", "partition": "cpu", "time": "01:00:00"}
    program.write_text(f"#!/bin/bash\nmkdir {tmp_path}/failed || exit 0\nexit 1\n")
    with engine(config, tmp_path) as phases:
        phases.run("square", [Square(tmp_path)], 1)
    assert (tmp_path / "failed").exists() and squares(tmp_path, 1) == ["0 of 1"]
    program.write_text('#!/bin/bash\necho "no contact" >&2\nexit 1\n')
    with pytest.raises(RecipeError, match="squeue fails .* no contact"), engine(config, tmp_path) as phases:
        phases.run("again", [Square(tmp_path)], 1)


def test_slurm_is_refused_without_sbatch(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RecipeError, match="no sbatch"), engine({"executor": "slurm"}, tmp_path) as phases:
        phases.run("square", [Square(tmp_path)], 1)


# ---------------------------------------------------------------------------------------------------------
# Ray


@pytest.fixture
def ray_stops():
    yield
    import ray

    ray.shutdown()


@pytest.mark.extra("ray")
def test_ray_runs_the_same_pipeline_and_reports_a_failure(tmp_path, monkeypatch, ray_stops):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    config = {"executor": "ray", "workers": 2, "mem_per_cpu_gb": 0.2}
    with engine(config, tmp_path) as phases:
        phases.run("square", [Square(tmp_path)], 3)
        assert squares(tmp_path, 3) == [f"{k * k} of 3" for k in range(3)]
        with pytest.raises(RecipeError, match=r"(?s)1 of 3 tasks failed.*part 2 cannot be read"):
            phases.run("again", [Square(tmp_path, fails=2)], 3)
