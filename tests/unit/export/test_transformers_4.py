"""The saved folder in transformers 4: the same ids, the same logits, the same chat, on the same folder."""

import json
import os
import subprocess
import sys
import tomllib

import pytest
import torch
from conftest import EXPERTS, GEMMA3, ROOT, SHAPE, sentences
from published_checkpoint import write_qwen2_tokenizer
from recipe.config.chat_templates import chat_template, response_template
from recipe.model.build import build_model
from recipe.model.save import complete_configs
from recipe.project import RecipeError, read_json
from recipe.tokenization.published import load_published, take_over
from recipe.tokenization.save import check_auto_tokenizer, save_tokenizer
from recipe.tokenization.train import train_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

FLAT = {key: value for key, value in SHAPE.items() if key != "head_dim"}
GROUPS = FLAT | {"max_position_embeddings": 64}


def rope(**values):
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0} | values}


GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
# By name: the kind of tokenizer, model.json, and what transformers 4 must find in config.json.
MODELS = {
    "qwen3": ("unigram", {"model_type": "qwen3", **SHAPE, **rope(rope_theta=1e6)}, {"rope_theta": 1e6}),
    "mistral": ("bpe", {"model_type": "mistral", "sliding_window": 8, **FLAT, **rope()}, {"rope_theta": 5e3}),
    "qwen2": ("qwen2", {"model_type": "qwen2", **FLAT, **rope(rope_theta=1e6)}, {"rope_theta": 1e6}),
    "olmo2": ("bpe", {"model_type": "olmo2", **FLAT, **rope(rope_theta=5e5)}, {"rope_theta": 5e5}),
    "gemma3_text": (
        "bpe",
        {"model_type": "gemma3_text", **SHAPE, **GEMMA3, "rope_parameters": GEMMA3_ROPE},
        {
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
    "qwen3_moe": ("bpe", {"model_type": "qwen3_moe", **SHAPE, **EXPERTS, **rope()}, {"rope_theta": 5e3}),
    "gpt2": (
        "byte-level-bpe",
        {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256},
        {},
    ),
    "gpt_neox": (
        "bpe",
        {"model_type": "gpt_neox", **FLAT, **rope(partial_rotary_factor=0.5)},
        {"rotary_emb_base": 5e3, "rotary_pct": 0.5},
    ),
}
for scaling in (
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    {
        "rope_type": "llama3",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
):
    MODELS[f"llama-{scaling['rope_type']}"] = (
        "unigram",
        {"model_type": "llama", **GROUPS, **rope(**scaling)},
        {"rope_theta": 5e3, "rope_scaling": scaling},
    )

TEXTS = [*sentences(50, 9), "🐈と𠮷野家 ▁ へ  行く。\n\n<0x41></s>", "  ABC\tｶﾞ"]
CHAT = [
    {"role": "system", "content": "親切に。"},
    {"role": "user", "content": "山は?"},
    {"role": "assistant", "content": "高いです。\nはい。"},
    {"role": "user", "content": "湖は?"},
]
# 100 positions: more than the 64 after which `dynamic` scales, and than the window of mistral.
IDS = [3 + i * 7 % 290 for i in range(100)]

READER = """
import json, sys
import torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

texts, chat, ids, folders = json.load(sys.stdin)
found = {"version": transformers.__version__}
for folder in folders:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    options = model.generation_config
    with torch.inference_mode():
        torch.save(model(torch.tensor([ids])).logits[0], folder + "/logits.pt")
    found[folder] = {
        "ids": tokenizer(texts)["input_ids"],
        "decoded": tokenizer.batch_decode(tokenizer(texts)["input_ids"], skip_special_tokens=True),
        "chat": tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True),
        "ends": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id],
        "generation": [options.bos_token_id, options.eos_token_id, options.pad_token_id],
    }
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder per model, as the stages save it, and the objects that were saved."""
    folder, trained, made = tmp_path_factory.mktemp("saved"), {}, {}
    for kind in ("unigram", "bpe", "byte-level-bpe"):
        tokenizer = train_tokenizer(sentences(2000, 1), {"vocab_size": 400, "kind": kind}).tokenizer
        trained[kind] = tokenizer
    write_qwen2_tokenizer(folder)
    published = {"kind": "published", "published": str(folder)}
    trained["qwen2"] = take_over(load_published(folder), published, ())[0]
    for tokenizer in trained.values():
        tokenizer.chat_template = chat_template("alpaca", "あなたは親切です。")
        tokenizer.response_template = response_template("alpaca", tokenizer.eos_token)
    for name, (kind, values, _) in MODELS.items():
        model = build_model(values, trained[kind], "sdpa", 0).eval()
        model.save_pretrained(folder / name)
        save_tokenizer(trained[kind], folder / name)
        complete_configs(folder / name)
        made[name] = trained[kind], model
    return folder, made


@pytest.mark.parametrize("name", MODELS)
def test_files_name_what_both_versions_read(saved, name):
    folder, made = saved
    config = read_json(folder / name / "config.json")
    old = {
        "rope_theta",
        "rope_local_base_freq",
        "rope_scaling",
        "rotary_emb_base",
        "rotary_pct",
        "partial_rotary_factor",
    }
    assert {key: value for key, value in config.items() if key in old} == MODELS[name][2]
    tokenizer = read_json(folder / name / "tokenizer_config.json")
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not tokenizer.keys() & {"backend", "is_local", "local_files_only", "model_max_length"}
    ids = {f"{key}_token_id": getattr(made[name][0], f"{key}_token_id") for key in ("bos", "eos", "pad")}
    ids = {key: number for key, number in ids.items() if number is not None}
    generation = read_json(folder / name / "generation_config.json")
    assert generation == ids | {"transformers_version": generation["transformers_version"]}


@pytest.mark.parametrize("name", MODELS)
def test_transformers_5_loads_what_was_saved(saved, name):
    folder, made = saved
    tokenizer, model = made[name]
    loaded = AutoTokenizer.from_pretrained(folder / name)
    if name == "qwen2":  # transformers 5 loads every such folder as Qwen2's own class
        check_auto_tokenizer(tokenizer, "qwen2", TEXTS)
    else:
        assert type(loaded) is type(tokenizer)
        assert loaded.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded.init_kwargs["response_template"] == tokenizer.response_template
    config = AutoConfig.from_pretrained(folder / name).to_dict()
    assert config.get("rope_parameters") == model.config.to_dict().get("rope_parameters")
    again = AutoModelForCausalLM.from_pretrained(folder / name)
    with torch.inference_mode():
        assert torch.equal(again(torch.tensor([IDS])).logits, model(torch.tensor([IDS])).logits)


def test_a_tokenizer_that_transformers_would_load_otherwise_stops_the_training(saved):
    _, made = saved
    tokenizer, _ = made["mistral"]
    with pytest.raises(RecipeError, match="model_type: qwen2: .* loads this tokenizer as Qwen2Tokenizer"):
        check_auto_tokenizer(tokenizer, "qwen2", TEXTS)
    check_auto_tokenizer(tokenizer, "qwen3", TEXTS)


@pytest.fixture(scope="session")
def transformers_4(request):
    """A folder with transformers 4, installed from the dependency group of pyproject.toml once."""
    folder = request.config.cache.mkdir("transformers-4")
    if not (folder / "complete").exists():
        groups = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["dependency-groups"]
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
        done = subprocess.run(
            [*command, "--target", str(folder), *groups["transformers4"]], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"could not run: pip cannot install transformers 4: {done.stderr.strip()[-200:]}")
        (folder / "complete").touch()
    return folder


@pytest.mark.extra()
def test_transformers_4_gives_the_same_ids_logits_and_chats(saved, transformers_4):
    folder, made = saved
    done = subprocess.run(
        [sys.executable, "-c", READER],
        input=json.dumps([TEXTS, CHAT, IDS, [str(folder / name) for name in MODELS]]),
        env=os.environ | {"PYTHONPATH": str(transformers_4), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["version"].startswith("4.57.")
    for name, (tokenizer, model) in made.items():
        theirs = found[str(folder / name)]
        ids = tokenizer(TEXTS)["input_ids"]
        ends = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
        assert theirs == {
            "ids": ids,
            "decoded": tokenizer.batch_decode(ids, skip_special_tokens=True),
            "chat": tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True),
            "ends": ends,
            "generation": ends,
        }, name
        with torch.inference_mode():
            ours = model(torch.tensor([IDS])).logits[0]
        assert torch.equal(ours, torch.load(folder / name / "logits.pt")), name  # measured: no difference
