"""The planner against a real run, published figures and the preflight; the recipe it writes; its refusals."""

import dataclasses
import math
import re
import shutil
import subprocess
import sys

import pytest
from recipe import project
from recipe.config import recipe as recipes_module
from recipe.config.model import check_model
from recipe.config.recipe import load_recipe
from recipe.project import Refused
from recipe.run import cards, fitting, plan, preflight
from recipe.run.launch_options import Launch
from recipe.run.memory import memory, shape_of
from recipe.tokenization.train import expected_memory
from refusal import preference
from shapes import SHIPPED, read

# Hours, tokens and loss of a run of 4 layers on the text of tiny, with a vocabulary of 8,000, on 2 cores with
# 167 GFLOP/s.
FOUR_LAYERS = 935.3 / 3600, 3_112_960, 4.2612


@pytest.fixture(autouse=True)
def no_outputs(tmp_path, monkeypatch):
    """What was trained on this machine decides nothing here."""
    for module in (project, preflight):
        monkeypatch.setattr(module, "OUTPUTS", tmp_path / "outputs")


def rows(hours, gpu="rtx4090", corpus="6GB", gpus=1):
    return plan.plans(hours, plan.machine_of(gpu, gpus), plan.corpus_of(corpus, "tiny"))


def test_a_real_run_of_the_smallest_model():
    """On that machine, in its seconds: the shape, the tokens and the loss found there."""
    hours, tokens, loss = FOUR_LAYERS
    corpus = dataclasses.replace(plan.corpus_of("tiny", "tiny"), vocabulary=8_000)
    found = plan.best(plan.plans(hours, plan.machine_of("cpu", 1), corpus))
    assert found.layers == 4 and found.shape.parameters == 5_196_544
    assert found.tokens == pytest.approx(tokens, rel=0.1)
    low, high = plan.expected_loss(found.shape.matrices, found.tokens)
    assert low < loss < high


@pytest.mark.parametrize(
    ("recipe", "layers", "gpu", "gibibytes", "hours"),
    [("small", 12, "rtx4090", 12, (2, 4)), ("colab-t4", 8, "t4", 15, (1.5, 2.5))],
)
def test_our_own_recipes_follow_the_rules(recipe, layers, gpu, gibibytes, hours):
    """Shape, batch and rate; the hours on their card; the memory, with room, also on a smaller card."""
    config = load_recipe(recipe)
    values = config["pretrain"]
    shape = shape_of(config["model"], preflight.vocabulary_of(recipe, config)[0])
    tokens = values["max_steps"] * values["global_batch_size"] * values["block_size"]
    assert config["model"] == plan.model_of(layers)
    assert values["learning_rate"] == plan.learning_rate(shape.matrices, tokens)
    assert values["global_batch_size"] == plan.batch_size(tokens, values["block_size"], 1)
    machine, corpus = plan.machine_of(gpu, 1), plan.corpus_of(recipe, "tiny")
    assert hours[0] < tokens * shape.flops_per_token(values["block_size"]) / machine.rate / 3600 < hours[1]
    peak = memory(shape, fitting.setting_of(values, machine.device, Launch()))["peak"]
    assert peak * plan.MEMORY_MARGIN < gibibytes * fitting.GIB * fitting.USABLE
    assert tokens < plan.EPOCHS * corpus.tokens and 5 < tokens / shape.parameters < 40


def test_colab_t4_stays_within_the_limits_of_its_host():
    """2 cores, 12 GB of memory, 78 GB of disk, fp16 only; a cut costs at most a twelfth of the training."""
    config, machine = load_recipe("colab-t4"), plan.machine_of("t4", 1)
    shape = shape_of(config["model"], preflight.vocabulary_of("colab-t4", config)[0])
    disk = config["dataset"]["disk_gigabytes"] * 1e9
    for file in ("pretrain", "finetune"):
        values = config[file]
        setting = fitting.setting_of(values, machine.device, Launch())
        assert setting.precision == "fp16" and "bf16" not in values
        assert "attn_implementation" not in values  # the hardware decides: test_choice.py
        assert memory(shape, setting)["peak"] * plan.MEMORY_MARGIN < machine.free
        disk += preflight.training_disk(shape, setting, values, values.get("max_steps", 10_000))
        assert values.get("dataloader_num_workers", 0) <= 2
    assert disk < 0.5 * 78e9
    assert config["pretrain"]["save_steps"] <= config["pretrain"]["max_steps"] / 12
    assert expected_memory(config["tokenizer"]) < 2e9
    assert sum(one["maximum_megabytes"] for one in config["dataset"]["sources"].values()) <= 1500
    assert set(config["dataset"]["sources"]) == {"wikipedia"}


@pytest.mark.parametrize("page", ["README.md", "README.ja.md", "configs/small/README.md"])
def test_the_hours_of_small_in_the_documentation_are_those_computed(page):
    values = load_recipe("small")["pretrain"]
    work = values["max_steps"] * values["global_batch_size"] * values["block_size"]
    work *= shape_of(read("small", "model"), 32_000).flops_per_token(values["block_size"])
    text = (project.ROOT / page).read_text("utf-8")
    if page.startswith("README"):
        text = "\n".join(line for line in text.splitlines() if "| `small` |" in line)
    found = re.findall(r"([\d.]+)(?: 時間)? (?:\(|on an )(RTX \d+|A100)", text)
    assert len(found) == 3
    for hours, name in found:
        rate = cards.card("a100-40gb" if name == "A100" else name).rate()[0]
        assert float(hours) == pytest.approx(work / rate / 3600, rel=0.07), name


def test_system_a_takes_the_hours_and_reaches_the_loss_its_author_published():
    """One epoch of 551,057 x 19 blocks on an RTX 4090: 98 hours, and a loss of 3.5582."""
    tokens = 551_057 * 1024 * 19
    shape = shape_of(read("mistral-300m", "model"), 50_000)
    rate, origin = cards.card("rtx4090").rate()
    assert tokens * shape.flops_per_token(1024) / rate / 3600 == pytest.approx(98, rel=0.1)
    assert origin == "tabulated 165 TFLOP/s x 40%"
    assert plan.expected_loss(shape.matrices, tokens)[1] == pytest.approx(3.5582, rel=0.01)
    # Its batch was 256 x 1,024 tokens.
    assert plan.batch_size(tokens, 1024, 1) == 256


def test_the_best_row_is_nearest_to_compute_optimal():
    found = plan.best(rows(4))
    assert found.layers == 12 and 10 < found.per_parameter < 40
    assert plan.best(rows(40)).layers > 12 > plan.best(rows(0.5)).layers


def test_the_micro_batch_is_the_largest_that_fits():
    machine, sizes = plan.machine_of("rtx4060", 1), set()
    for row in (row for row in rows(6, "rtx4060") if not row.missing):
        micro = row.setting.micro_batch
        assert row.peak * plan.MEMORY_MARGIN <= machine.free
        larger = memory(row.shape, dataclasses.replace(row.setting, micro_batch=2 * micro))["peak"]
        assert larger * plan.MEMORY_MARGIN > machine.free or micro == 64 or row.setting.accumulation == 1
        sizes.add(micro)
    assert len(sizes) > 2


def test_more_gpus_take_more_tokens_and_share_the_batch():
    one, four = (next(row for row in rows(4, gpus=count) if row.layers == 14) for count in (1, 4))
    assert four.tokens == pytest.approx(4 * one.tokens, rel=0.01)
    batch = four.setting.micro_batch * four.setting.accumulation * 4
    assert batch == four.values["global_batch_size"]


def test_a_small_corpus_limits_the_tokens():
    machine, corpus = plan.machine_of("rtx4090", 1), plan.corpus_of("100MB", "tiny")
    assert corpus.tokens == pytest.approx(0.95 * 100e6 / 3.97)
    found = plan.plan(4, 4, machine, corpus)
    assert found.tokens == pytest.approx(4 * corpus.tokens, rel=0.01)
    assert found.seconds < 0.1 * 4 * 3600


def test_the_corpus_of_a_recipe_is_its_limits_or_what_stage_04_counted(tmp_path):
    assert plan.corpus_of("tiny", "tiny").tokens is None
    folder = tmp_path / "outputs/tiny/04_tokenize"
    folder.mkdir(parents=True)
    figures = {
        "sources": {"train": {"manpages": {"tokens": 700}, "tatoeba": {"tokens": 300}}},
        "totals": {"train": {"bytes": 5000, "tokens": 1000}},
    }
    project.write_json(folder / "stage.json", {"figures": figures})
    assert plan.corpus_of("tiny", "tiny").tokens == 1000
    # A size in place of the recipe: the bytes per token that were measured for it.
    assert plan.corpus_of("10kb", "tiny").tokens == pytest.approx(0.95 * 10e3 / 5)


@pytest.fixture
def copied_configs(tmp_path, monkeypatch):
    """Recipes are read from a folder of links to the real ones, and written there."""
    for module in (plan, recipes_module):
        monkeypatch.setattr(module, "CONFIGS", tmp_path / "configs")
    (tmp_path / "configs").mkdir()
    for folder in project.CONFIGS.iterdir():
        (tmp_path / "configs" / folder.name).symlink_to(folder)
    return tmp_path / "configs"


def test_a_recipe_that_exists_is_not_overwritten(copied_configs):
    with pytest.raises(Refused, match="configs/tiny exists"):
        plan.write("tiny", None, plan.corpus_of("tiny", "tiny"))


@pytest.mark.parametrize("count", [1, 3, 7, 8])
def test_both_batches_of_a_written_recipe_divide_among_the_gpus(count, copied_configs):
    machine, corpus = plan.machine_of("rtx4090", count), plan.corpus_of("small", "tiny")
    plan.write("mine", plan.best(plan.plans(3, machine, corpus)), corpus)
    config = load_recipe("mine")
    for file in ("pretrain", "finetune"):
        machine.launch.check(config, file)
    assert 0.7 * 32 <= config["finetune"]["global_batch_size"] <= 1.5 * 32  # 32 in small


@pytest.mark.parametrize("base", SHIPPED)
def test_a_written_recipe_is_accepted_and_takes_the_memory_of_its_row(base, copied_configs):
    machine, corpus = plan.machine_of("t4", 1), plan.corpus_of(base, "tiny")
    row = plan.best(plan.plans(3, machine, corpus))
    plan.write("mine", row, corpus)
    config = load_recipe("mine")
    setting = fitting.setting_of(config["pretrain"], machine.device, Launch())
    assert setting == row.setting and setting.precision == "fp16"
    vocabulary, _ = preflight.vocabulary_of(base, config)
    peak = memory(shape_of(config["model"], vocabulary), setting)["peak"]
    assert peak == row.peak and peak * plan.MEMORY_MARGIN <= machine.free
    assert config["dataset"] == read(base, "dataset")
    tokens = config["pretrain"]["max_steps"] * row.values["global_batch_size"] * row.values["block_size"]
    assert tokens == row.tokens


def test_a_mixture_of_experts_has_the_active_parameters_of_the_dense_row(tmp_path, monkeypatch):
    """But for its routers. Rates and tokens follow the active ones, memory all of them."""
    machine, corpus = plan.machine_of("rtx4090", 1), plan.corpus_of("6GB", "tiny")
    dense, mixture = (plan.plan(12, 3, machine, corpus, experts) for experts in (0, 8))
    routers = 12 * 8 * 768
    assert mixture.shape.active_parameters == dense.shape.parameters + routers
    assert mixture.shape.parameters == mixture.shape.active_parameters + 12 * 6 * 3 * 768 * 1152
    assert mixture.per_parameter == pytest.approx(dense.per_parameter, rel=0.05)
    assert mixture.peak > dense.peak
    lines = "\n".join(plan.report([mixture], machine, corpus))
    assert "parameters  active" in lines and "20 tokens per active parameter" in lines
    model = plan.model_of(12, 8)
    check_model(model, "model.json")
    assert (model["num_experts"], model["num_experts_per_tok"]) == (8, 2)


def test_the_rules_for_tiny_are_those_of_the_docstring():
    values = read("tiny", "pretrain")
    tokens = values["max_steps"] * values["global_batch_size"] * values["block_size"]
    batch = round(0.58 * tokens**0.571)
    rate = plan.learning_rate(shape_of(read("tiny", "model"), 4_000).active, tokens)
    assert f"`tiny` they give {batch:,} and {rate:.1e};".replace("e-0", "e-") in plan.__doc__


def test_a_written_recipe_keeps_the_preferences_of_its_base(copied_configs):
    base = {}
    preference(base)
    folder = copied_configs / "preferring"
    shutil.copytree(project.CONFIGS / "tiny", folder)
    project.write_json(folder / "preference.json", base["preference"])
    corpus = plan.corpus_of("preferring", "tiny")
    plan.write("mine", plan.best(plan.plans(3, plan.machine_of("t4", 1), corpus)), corpus)
    assert load_recipe("mine")["preference"] == base["preference"]
    with pytest.raises(Refused, match="at most 100 letters"):
        plan.write("a" * 101, None, corpus)


def test_a_faulty_recipe_is_not_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "CONFIGS", tmp_path)
    row = plan.best(rows(3))
    with pytest.raises(Refused, match="no such recipe"):
        plan.write("mine", row, plan.corpus_of("6GB", "tiny"))  # not where load_recipe looks
    assert not list(tmp_path.iterdir())
    with pytest.raises(Refused, match="expected a name"):
        plan.write("../mine", row, plan.corpus_of("6GB", "tiny"))


@pytest.mark.parametrize(
    ("hours", "gpu", "corpus", "message"),
    [
        (0.001, "cpu", "6GB", r"the smallest model, 4 layers with 4,172,544 parameters, needs 0\.13 hours"),
        (3, "rtx4090", "1MB", r"4 layers.*the corpus is too small: 2\.1\d times as much"),
        (3, "rtx4080ti", "6GB", r"--gpu rtx4080ti: not in the table of cards\. Did you mean 'rtx4080'\?"),
        (3, "", "6GB", r"--gpu : not in the table of cards\. Known: cpu, t4"),
        (3, "rtx4090", "tyny", r"--corpus tyny: .* such as 2GB, or a recipe\. Did you mean 'tiny'\?"),
        (3, "rtx4090", "1.2.3GB", r"--corpus 1\.2\.3GB: expected a size, such as 2GB, or a recipe"),
        (3, "rtx4090", "0.0GB", r"--corpus 0\.0GB: expected more than 0"),
    ],
)
def test_what_fits_nothing_is_refused_and_the_nearest_is_named(hours, gpu, corpus, message):
    with pytest.raises(Refused, match=message):
        rows(hours, gpu, corpus)


def test_gpus_that_are_none(monkeypatch):
    with pytest.raises(Refused, match="--gpus 4: --gpu cpu is no GPU"):
        plan.machine_of("cpu", 4)
    here = fitting.Device("CPU", 16, 0.0, True, "cpu")
    monkeypatch.setattr(fitting, "this_machine", lambda launch: (here, 16.0 * fitting.GIB))
    with pytest.raises(Refused, match="--gpus 2: this machine has no GPU. Name a card"):
        plan.machine_of(None, 2)
    assert plan.machine_of(None, None).device == here


def test_a_gpu_that_is_too_small_or_unknown(monkeypatch):
    small = fitting.Device("Tesla T4", 1, 0.0, False)
    monkeypatch.setattr(fitting, "this_machine", lambda launch: (small, 1.0 * fitting.GIB))
    with pytest.raises(Refused, match=r"4 layers .* needs [\d.]+ GiB, 1\.00 can be used"):
        plan.plans(3, plan.machine_of(None, 1), plan.corpus_of("6GB", "tiny"))
    unknown = fitting.Device("Radeon VII", 16, 0.0, False)
    monkeypatch.setattr(fitting, "this_machine", lambda launch: (unknown, 16.0 * fitting.GIB))
    with pytest.raises(Refused, match="Radeon VII: its speed is not known. Name a similar card"):
        plan.machine_of(None, 1)


def test_a_row_that_does_not_fit_names_the_nearest():
    found = rows(4)
    assert plan.chosen(found, 10).layers == 10
    with pytest.raises(
        Refused, match=r"--layers 32: needs 2\d\.\d\d GiB.*The nearest that fits: --layers 20"
    ):
        plan.chosen(found, 32)
    with pytest.raises(Refused, match=r"--layers 11: the table has .*The nearest that fits: --layers 10"):
        plan.chosen(found, 11)


@pytest.mark.parametrize(
    ("name", "gibibytes", "key"),
    [
        ("NVIDIA GeForce RTX 4090", 24, "rtx4090"),
        ("Tesla T4", 15, "t4"),
        ("NVIDIA A100-SXM4-40GB", 40, "a100-40gb"),
        ("NVIDIA A100 80GB PCIe", 80, "a100-80gb"),
        ("NVIDIA H200", 140, "h200"),
        ("NVIDIA H100 80GB HBM3", 80, "h100"),
        ("NVIDIA H100 PCIe", 80, None),
        ("NVIDIA H100 NVL", 94, None),
        ("NVIDIA A100-SXM4-40GB MIG", 0, None),
        ("NVIDIA GeForce RTX 4070 Ti", 12, None),
        ("NVIDIA RTX 6000 Ada Generation", 48, None),
    ],
)
def test_the_card_of_a_name_by_nvidia_smi(name, gibibytes, key):
    assert cards.seen_card(name, gibibytes) == (cards.CARDS[key] if key else None)


def test_the_table_says_where_the_speed_comes_from(tmp_path):
    machine, corpus = plan.machine_of("h200", 1), plan.corpus_of("6GB", "tiny")
    found = plan.plans(1, machine, corpus)
    lines = list(plan.report(found, machine, corpus))
    assert "341 TFLOP/s in training (measured, `mistral-300m` on an H200)" in lines[0]
    assert "1.44e+09 tokens; 6 GB, 3.97 bytes/token" in lines[1]
    assert len([line for line in lines if line.lstrip().startswith("->  ")]) == 2
    assert len(lines) == 3 + len(plan.LAYERS) + 2


def test_a_probe_on_this_machine_gives_the_speed(tmp_path, monkeypatch):
    here = fitting.Device("NVIDIA L4", 22, 0.0, True)
    monkeypatch.setattr(fitting, "this_machine", lambda launch: (here, 20.0 * fitting.GIB))
    figures = {"hardware": "NVIDIA L4", "mfu": 0.5, "gemm_peak_flops": 1e14}
    (tmp_path / "outputs/a").mkdir(parents=True)
    project.write_json(tmp_path / "outputs/a/probe.json", {"figures": figures})
    machine = plan.machine_of(None, 2)
    assert (machine.rate, machine.origin) == (1e14, "by the speed of recipe a")
    assert (machine.free, machine.launch.ranks) == (20.0 * fitting.GIB, 2)
    (tmp_path / "outputs/a/probe.json").unlink()
    assert plan.machine_of(None, 2).origin == "tabulated 121 TFLOP/s x 40%"


def test_every_rule_gives_finite_values_over_the_whole_table():
    for hours, gpu in ((0.3, "cpu"), (3, "t4"), (1000, "h200")):
        for row in rows(hours, gpu):
            assert all(math.isfinite(value) for value in plan.expected_loss(row.shape.matrices, row.tokens))
            assert row.missing or 1e-4 < row.values["learning_rate"] < 2e-2


def test_it_does_not_import_torch():
    """Which takes seconds: the planner answers at once."""
    code = (
        "import sys\nfrom recipe.run import plan\n"
        "sys.argv = ['plan', '--hours', '3', '--gpu', 'rtx4090', '--gpus', '1']\nplan.main()\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0 and "Hoffmann" in result.stdout, result.stderr
