"""The life of a stage: skipped, stale, locked, taken over, published whole or not at all."""

import copy
import functools
import hashlib
import http.server
import json
import shutil
import signal
import subprocess
import threading
import time

import pytest
from recipe.project import Refused
from recipe.run.freshness import differences
from recipe.run.publication import hold, set_aside

SCRIPT = '''
"""Stage 90: a stage for these tests."""
import os, time
from recipe.project import OUTPUTS
from recipe.run.stage import run_stage
from tqdm import tqdm

def work(stage):
    list(tqdm(range(3)))
    (stage.folder / "a").write_text(str(stage.config["tokenizer"]["vocab_size"]))
    if os.environ.get("FAULT") == "wait":
        print("holds", flush=True)
        time.sleep(60)
    if os.environ.get("FAULT") == "disk":
        raise OSError(28, "No space left on device", str(stage.folder / "a"))
    stage.headline = "a headline"

run_stage(__file__, __doc__, work, ("tokenizer",), os.environ.get("INPUTS", "").split(), resumable=True)
'''


def test_differences_name_the_keys():
    old = {"config": {"pretrain": {"a": 1, "b": 2}}, "inputs": {"x": "1"}}
    new = {"config": {"pretrain": {"a": 1, "b": 3, "c": 4}}, "inputs": {"x": "1"}}
    assert differences(old, new) == ["config.pretrain.b: 2 -> 3", "config.pretrain.c: absent -> 4"]
    assert differences(new, new) == []
    assert differences({"minhash": None}, {}) == ["minhash: null -> absent"]
    assert differences({}, {"bos_token": None}) == ["bos_token: absent -> null"]
    phases = [[{"block_size": 64, "rate": 1}, {"rate": rate}] for rate in (2, 3)]
    assert differences({"phases": phases[0]}, {"phases": phases[1]}) == ["phases[1].rate: 2 -> 3"]
    (line,) = differences({"paths": ["a" * 99 + "x"]}, {"paths": ["a" * 99 + "y", "b"]})
    assert line.split(" -> ")[0].endswith('aax"]') and line.endswith('aay", "b"]') and len(line) < 150


@pytest.fixture
def project(make_project):
    """A project with one more stage, `run(...)` of which says what happens."""
    project = make_project()
    (project.folder / "pretrain/90_test.py").write_text(SCRIPT)
    return project


def run(project, *options, recipe="mini", check=True, **environment):
    project.environment |= environment
    result = project.run("pretrain/90_test.py", "--recipe", recipe, *options, check=check)
    for name in environment:
        del project.environment[name]
    return result


def copy_of(project, name):
    project.copy(name)
    return name


def folders(project):
    return sorted(path.name for path in (project.folder / "outputs/mini").iterdir())


def test_a_dry_run_knows_what_the_stages_before_would_do(project, tmp_path):
    """As when a finished training was made longer: its later stages, not yet run, read the longer one."""
    project.run("run_all.sh", "--recipe", "mini", "--to", "02")
    would_run = tmp_path / "would_run"
    would_run.write_text("")
    changed = ("--dry-run", "--set", "dataset.valid_share=0.3")
    look = functools.partial(run, project, check=False, INPUTS="02_dataset", RECIPE_WOULD_RUN=str(would_run))
    refused = look(*changed)
    assert refused.returncode == 2 and "its input 02_dataset is stale" in refused.stderr
    assert would_run.read_text() == ""
    would_run.write_text("02_dataset\n")
    assert "90_test         would run after 02_dataset\n" in look(*changed).stdout
    assert "after 02_dataset, which is stale" in look(*changed, "--force").stdout
    assert would_run.read_text().split() == ["02_dataset", "90_test", "90_test"]
    run(project, INPUTS="02_dataset")
    refused = look(*changed)
    assert refused.returncode == 2 and "it would be stale after 02_dataset" in refused.stderr
    assert "--from 90 --force" in refused.stderr


def test_what_a_run_does_is_what_a_dry_run_says(project):
    assert "90_test         would run" in run(project, "--dry-run").stdout
    assert not (project.folder / "outputs").exists()
    result = run(project)
    assert "done in" in result.stdout
    assert not result.stderr, "a bar that is no line (recipe.progress)"
    assert "90_test         done before" in run(project, "--dry-run").stdout
    assert "90_test         done before" in run(project).stdout

    other = ("--set", "tokenizer.vocab_size=500")
    stale = "stale: made from other settings or inputs. Changed: config.tokenizer.vocab_size: 400 -> 500"
    refused = run(project, *other, check=False)
    assert refused.returncode == 2 and stale in refused.stderr
    assert "--set tokenizer.vocab_size=500 --from 90 --force" in refused.stderr
    dry = run(project, *other, "--dry-run", check=False)
    assert (dry.returncode, dry.stderr) == (2, refused.stderr)

    assert (
        "would be taken from outputs/mini/90_test"
        in run(project, "--dry-run", recipe=copy_of(project, "copy")).stdout
    )


def test_missing_input_is_named(project):
    assert "waits for 02_dataset" in run(project, "--dry-run", INPUTS="02_dataset").stdout
    result = run(project, check=False, INPUTS="02_dataset")
    assert result.returncode == 2 and "02_dataset has not been run for recipe 'mini'" in result.stderr
    assert "--recipe mini --to 90`" in result.stderr
    result = run(project, "--set", "tokenizer.vocab_size=500", check=False, INPUTS="02_dataset")
    assert "--recipe mini --set tokenizer.vocab_size=500 --to 90`" in result.stderr


def test_new_output_replaces_the_old_one_whole(project):
    run(project)
    (project.output("mini", "90_test", "old")).write_text("of the first run")
    run(project, "--force", "--set", "tokenizer.vocab_size=500")
    assert project.output("mini", "90_test", "a").read_text() == "500"
    assert not project.output("mini", "90_test", "old").exists()
    assert folders(project) == [".lock", "90_test"]


def test_second_run_is_told_who_holds_the_folder_and_the_lock_ends_with_its_holder(project):
    project.environment["FAULT"] = "wait"
    holder = project.start("pretrain/90_test.py", "--recipe", "mini")
    while holder.stdout.readline() != "holds\n":
        assert holder.poll() is None
    del project.environment["FAULT"]
    result = run(project, check=False)
    assert result.returncode == 2 and f"is in use by process {holder.pid}" in result.stderr
    assert "(90_test)" in result.stderr
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert "done in" in run(project).stdout


def test_folder_may_be_a_link_to_another_disk_that_exists(tmp_path):
    (tmp_path / "data").symlink_to(tmp_path / "disk")
    for folder in (tmp_path / "data", tmp_path / "data/below"):
        with (
            pytest.raises(Refused, match="data: neither a folder nor a link to an existing one"),
            hold(folder, ""),
        ):
            pass
    (tmp_path / "disk").mkdir()
    with hold(tmp_path / "data/below", "a test"):
        assert (tmp_path / "disk/below/.lock").exists()


def test_full_disk_names_path_and_free_bytes(project):
    result = run(project, check=False, FAULT="disk")
    assert result.returncode == 1
    assert "outputs/mini/.90_test.work/a: No space left on device" in result.stderr
    assert "bytes are free on the disk mounted at /" in result.stderr


def test_unreadable_record_is_refused_by_name_until_the_stage_is_forced(project):
    run(project)
    record = project.output("mini", "90_test")
    whole = record.read_text()
    for damaged, *options in ((whole[: len(whole) // 2],), ("[]", "--dry-run")):
        record.write_text(damaged)
        result = run(project, *options, check=False)
        assert result.returncode == 2 and f"{record}: cannot be read" in result.stderr
        assert "--recipe mini --from 90 --force" in result.stderr
    assert "done in" in run(project, "--force").stdout
    assert "done before" in run(project).stdout


def test_unreadable_record_of_an_input_is_refused_and_of_another_recipe_passed_over(project):
    run(project)
    record = project.output("mini", "90_test")
    record.write_text("")
    result = run(project, recipe=copy_of(project, "copy"))
    assert "done in" in result.stdout
    assert result.stderr.count(f"{record}: cannot be read, so this stage is passed over") == 1
    result = run(project, "--force", check=False, INPUTS="90_test")
    assert result.returncode == 2 and f"{record}: cannot be read" in result.stderr


def test_changed_output_is_neither_read_nor_taken_over(project):
    run(project)
    path = project.output("mini", "90_test", "a")
    path.write_text("401")  # the size is the same
    result = run(project, "--force", check=False, INPUTS="90_test")
    assert result.returncode == 2 and f"{path}: damaged or changed" in result.stderr
    assert "--recipe mini --from 90 --force" in result.stderr
    result = run(project, recipe=copy_of(project, "copy"))
    assert f"{path}: damaged or changed" in result.stderr and "is not taken over" in result.stderr
    assert project.output("copy", "90_test", "a").read_text() == "400"
    path.write_text("4")
    result = run(project, check=False)
    assert result.returncode == 2 and f"{path}: 1 bytes, expected 3" in result.stderr
    assert "done in" in run(project, "--force").stdout


def test_bookkeeping_that_cannot_be_read_counts_as_absent(project):
    work = project.output("mini", ".90_test.work", "")
    for name, how in ((".seconds", "continues"), (".wanted.json", "starts")):
        run(project, check=False, FAULT="disk")
        (work / name).write_text('{"config": {')
        result = run(project)
        assert f"90_test  {how}" in result.stdout and "done in" in result.stdout
        said = f"warning: {work / name}: cannot be read, so it counts as absent"
        assert result.stderr.count(said) == 1, result.stderr
        shutil.rmtree(project.output("mini", "90_test", ""))


@pytest.fixture
def unfinished(project):
    """The work folder of an unfinished run with a checkpoint."""
    run(project, check=False, FAULT="disk")
    work = project.output("mini", ".90_test.work", "")
    (work / "checkpoints/checkpoint-5").mkdir(parents=True)
    return work


def test_forced_stage_starts_over_and_sets_checkpoints_aside(project, unfinished):
    assert "would continue" in run(project, "--dry-run").stdout
    assert "would start over (--force)" in run(project, "--dry-run", "--force").stdout
    aside = set_aside(unfinished)
    result = run(project, "--force", check=False, FAULT="disk")
    assert f"the checkpoints of the unfinished run are set aside in {aside}. " in result.stdout
    assert "90_test  starts" in result.stdout
    assert (aside / "checkpoints/checkpoint-5").is_dir() and not (unfinished / "checkpoints").exists()
    result = run(project)
    assert "90_test  continues" in result.stdout and not aside.exists()


def test_an_interrupted_redo_of_a_finished_stage_goes_on_without_force(project):
    """What slurm.sh and the README rely on: --force would start over each time."""
    run(project)
    changed = ("--set", "tokenizer.vocab_size=500")
    assert "stale" in run(project, *changed, check=False).stderr
    run(project, *changed, "--force", check=False, FAULT="disk")
    assert "would continue" in run(project, *changed, "--dry-run").stdout
    assert "90_test  continues" in run(project, *changed).stdout
    assert project.output("mini", "90_test", "a").read_text() == "500"


def test_an_interrupted_redo_with_equal_settings_goes_on_without_force(project):
    run(project)
    run(project, "--force", check=False, FAULT="disk")
    assert "90_test  continues" in run(project).stdout
    assert "done before" in run(project).stdout


def test_checkpoints_of_unknown_settings_are_neither_used_nor_deleted(project, unfinished):
    (unfinished / ".wanted.json").write_text("")
    result = run(project, check=False)
    assert result.returncode == 2 and ".wanted.json cannot be read" in result.stderr
    assert "start over with --force (its checkpoints are set aside)" in result.stderr
    assert (unfinished / "checkpoints/checkpoint-5").is_dir()
    assert "are set aside in" in run(project, "--force").stdout


@pytest.mark.parametrize("moment", ["before the first rename", "between the renames"])
def test_killed_publication_is_completed(project, moment):
    """The disk as a kill during the publication of the second result leaves it."""
    run(project)
    final = project.output("mini", "90_test", "")
    work, old = final.with_name(".90_test.work"), final.with_name(".90_test.old")
    shutil.copytree(final, work)
    (work / "a").write_text("new")
    if moment == "between the renames":
        final.rename(old)
    assert "done before" in run(project).stdout
    assert (final / "a").read_text() == "new"
    assert folders(project) == [".lock", "90_test"]


def test_old_result_comes_back_when_the_new_one_was_not_published(project):
    run(project)
    final = project.output("mini", "90_test", "")
    final.rename(final.with_name(".90_test.old"))
    assert "done before" in run(project).stdout
    assert (final / "a").read_text() == "400"


def test_copied_recipe_takes_a_copy_that_can_be_edited(project):
    run(project)
    assert "taken from outputs/mini/90_test" in run(project, recipe=copy_of(project, "copy")).stdout
    copy, original = (project.output(recipe, "90_test", "a") for recipe in ("copy", "mini"))
    with copy.open("a") as handle:
        handle.write(" edited")
    assert copy.read_text() == "400 edited" and original.read_text() == "400"
    assert copy.stat().st_ino != original.stat().st_ino


def test_copy_without_room_is_refused(project):
    run(project)
    with project.output("mini", "90_test", "large").open("wb") as handle:
        handle.truncate(2**43)  # a hole of 8 TiB, which occupies nothing here
    result = run(project, recipe=copy_of(project, "copy"), check=False)
    assert result.returncode == 2, "this file system has reflinks, or more than 8 TiB free"
    assert "copying" in result.stderr and f"{2**43:,}"[:5] in result.stderr
    assert not project.output("copy", "90_test").exists()


def test_interrupted_copy_is_no_finished_stage(project):
    """``stage.json`` is the last file of a copy, so that a kill leaves a folder without it."""
    run(project)
    copy_of(project, "copy")
    with project.output("mini", "90_test", "zzz").open("wb") as handle:
        handle.write(bytes(300_000_000))
    child = project.start("pretrain/90_test.py", "--recipe", "copy")
    work = project.output("copy", ".90_test.work", "zzz")
    while not work.exists():
        assert child.poll() is None, child.communicate()[0]
        time.sleep(0.001)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not work.with_name("stage.json").exists()
    assert "taken from" in run(project, recipe="copy").stdout


def moved(project, folder):
    """The same project in another folder."""
    other = copy.copy(project)
    other.folder = folder
    other.environment = project.environment | {"PYTHONPATH": str(folder / "pretrain")}
    return other


def stages_done(project):
    """Whether stages 01, 02 and 11 have nothing to do; they read files of the user."""
    said = project.run("run_all.sh", "--recipe", "mini", "--to", "02").stdout
    return (said + project.run("fine-tuning/11_dataset.py", "--recipe", "mini").stdout).count(
        "done before"
    ) == 3


def test_project_may_be_copied_and_moved(make_project, tmp_path):
    project = make_project()
    project.run("run_all.sh", "--recipe", "mini", "--to", "02")
    project.run("fine-tuning/11_dataset.py", "--recipe", "mini")
    subprocess.run(["cp", "-r", str(project.folder), str(tmp_path / "copy")], check=True)  # with other times
    copied = moved(project, tmp_path / "copy")
    assert stages_done(copied)
    (tmp_path / "copy").rename(tmp_path / "moved")
    assert stages_done(moved(project, tmp_path / "moved"))

    records = [project.output("mini", stage) for stage in ("01_download", "02_dataset", "11_dataset")]
    assert not [path for path in records if str(project.folder) in path.read_text()]
    text = moved(project, tmp_path / "moved").folder / "text/a.txt"
    text.write_text(text.read_text("utf-8").replace("私", "僕"), "utf-8")  # the size is the same
    result = moved(project, tmp_path / "moved").run(
        "run_all.sh", "--recipe", "mini", "--to", "02", check=False
    )
    assert result.returncode == 2 and "facts.text.text/a.txt.mtime_ns" in result.stderr

    # Records of an earlier release: whole paths, no hashes of the user's files.
    digests = {}
    for path in records:
        record = json.loads(path.read_text())
        for facts in (
            record["wanted"].get("facts", {}),
            {n: s["files"] for n, s in sources_of(record).items()},
        ):
            for files in facts.values():
                for name in list(files):
                    facts_of_file = files.pop(name)
                    del facts_of_file["sha256"]
                    files[str(project.folder / name)] = facts_of_file
        if path == records[0]:
            kinds = sources_of(record).items()
            identity = {name: {"kind": source["kind"], "files": source["files"]} for name, source in kinds}
            content = json.dumps(identity, sort_keys=True).encode()
            digests["01_download"] = hashlib.blake2b(content, digest_size=8).hexdigest()
        record["wanted"]["inputs"] |= {k: v for k, v in digests.items() if k in record["wanted"]["inputs"]}
        path.write_text(json.dumps(record))
        if path == records[1]:
            digests["02_dataset"] = hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()
    assert stages_done(project)


def sources_of(record):
    return record["figures"].get("sources", {}) if record["stage"] == "01_download" else {}


# ---------------------------------------------------------------------------------- the data of stage 01


@pytest.fixture
def downloaded(make_project):
    """A project whose source `web` comes from a URL, with stages 01 and 02 done."""
    project = make_project()
    documents = (project.folder / "text/a.txt").read_text("utf-8").split("\n\n")
    (project.folder / "text/a.txt").write_text("\n\n".join(documents[:100]), "utf-8")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(project.folder / "text"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sources = json.loads((project.folder / "configs/mini/dataset.json").read_text())["sources"]
    web = {"source": "files", "url": f"http://127.0.0.1:{server.server_port}/a.txt"}
    project.edit("mini", "dataset", sources={"other": sources["other"], "web": web})
    project.run("run_all.sh", "--recipe", "mini", "--to", "02")
    yield project
    server.shutdown()
    server.server_close()


def test_equal_data_downloaded_again_make_nothing_stale(downloaded):
    before = downloaded.output("mini", "01_download").read_bytes()
    shutil.rmtree(downloaded.folder / "data")
    downloaded.run("pretrain/01_download.py", "--recipe", "mini", "--force")
    assert downloaded.output("mini", "01_download").read_bytes() != before
    assert "done before" in downloaded.run("pretrain/02_dataset.py", "--recipe", "mini").stdout

    path = downloaded.folder / "text/a.txt"  # now what the URL leads to has changed
    path.write_text(path.read_text() + "新しい文。\n")
    shutil.rmtree(downloaded.folder / "data")
    downloaded.run("pretrain/01_download.py", "--recipe", "mini", "--force")
    result = downloaded.run("pretrain/02_dataset.py", "--recipe", "mini", check=False)
    assert result.returncode == 2 and "Changed: inputs.01_download: made again" in result.stderr


def test_record_of_an_earlier_release_is_still_fresh(downloaded):
    """It holds the digest of stage 01's record instead of one of its data."""
    record = json.loads(downloaded.output("mini", "02_dataset").read_text())
    content = downloaded.output("mini", "01_download").read_bytes()
    record["wanted"]["inputs"]["01_download"] = hashlib.blake2b(content, digest_size=8).hexdigest()
    downloaded.output("mini", "02_dataset").write_text(json.dumps(record))
    assert "done before" in downloaded.run("pretrain/02_dataset.py", "--recipe", "mini").stdout
    copy_of(downloaded, "copy")
    result = downloaded.run("run_all.sh", "--recipe", "copy", "--to", "02")
    assert "taken from outputs/mini/02_dataset" in result.stdout

    record["wanted"]["inputs"]["01_download"] = "0" * 16
    downloaded.output("mini", "02_dataset").write_text(json.dumps(record))
    assert downloaded.run("pretrain/02_dataset.py", "--recipe", "mini", check=False).returncode == 2


def test_stage_01_is_only_taken_over_while_its_data_are_there(downloaded):
    copy_of(downloaded, "copy")
    copy_of(downloaded, "later")
    line = ("pretrain/01_download.py", "--recipe")
    assert "taken from outputs/mini/01_download" in downloaded.run(*line, "copy").stdout
    shutil.rmtree(downloaded.folder / "data")
    assert "done in" in downloaded.run(*line, "later").stdout
    assert (downloaded.folder / "data/web/a.txt").exists()
