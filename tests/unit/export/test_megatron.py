"""Arguments, token files and weights for Megatron-LM, tested with megatron-core itself on a CPU."""

import json
import re
import subprocess
import sys
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import MINI, ROOT, SHAPE
from megatron_model import LAYOUTS, TOKENS, initialize, inputs, their_model
from recipe.config.schedules import SCHEDULES
from recipe.export import megatron, megatron_weights
from recipe.project import RecipeError, Refused
from recipe.tokenization.token_files import write_token_file
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

GROUPED = SHAPE | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 90}
ROPE = {"rope_type": "default", "rope_theta": 500000.0}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 90}
GPT2 |= {"bos_token_id": 0, "eos_token_id": 0}


def config_of(kind, **values):
    if kind == "gpt2":
        return AutoConfig.for_model(kind, **GPT2 | values)
    return AutoConfig.for_model(kind, **GROUPED | {"rope_parameters": ROPE, "rms_norm_eps": 1e-5} | values)


def model_of(config):
    """A model whose weights are large enough for every part to matter."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter.ndim == 1))
    return model


@pytest.fixture
def one_rank(tmp_path, monkeypatch):
    from megatron.core import parallel_state

    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")  # it is called on a CPU, too
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    initialize()
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


@pytest.mark.extra("megatron")
@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (kind, {"tie_word_embeddings": tied})
        for kind in ("llama", "mistral", "qwen3")
        for tied in (True, False)
    ]
    + [("gpt2", {}), ("gpt2", {"activation_function": "gelu"})],
)
def test_megatron_model_of_these_arguments_is_the_same_model(one_rank, kind, values):
    config = config_of(kind, **values)
    ours = model_of(config)
    theirs = their_model(megatron.arguments_for(config, TOKENS)).eval()
    weights = megatron_weights.split(megatron_weights.to_megatron(ours.state_dict(), config), config)
    theirs.load_state_dict(weights[0, 0], strict=True)
    ids, positions, hidden_from = inputs(config.vocab_size)
    with torch.no_grad():
        expected = ours(ids).logits
        found = theirs(ids, positions, hidden_from)[..., : config.vocab_size]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


TIED = {"llama": False, "mistral": True, "qwen3": True, "gpt2": True}


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A Hugging Face folder of each type of model, and its checkpoints for all layouts."""
    folder = tmp_path_factory.mktemp("converted")
    for kind, tied in TIED.items():
        model_of(config_of(kind, tie_word_embeddings=tied)).save_pretrained(folder / kind)
        (folder / kind / "tokenizer.json").write_text("{}")
        (folder / f"{kind}-megatron").mkdir()
        for layout in LAYOUTS:
            target = folder / f"{kind}-megatron" / "{}x{}".format(*layout)
            megatron_weights.write_checkpoint(folder / kind, target, *layout)
    return folder


@pytest.mark.extra("megatron")
def test_logits_are_the_same_in_every_layout(converted):
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
        + [str(ROOT / "tests/megatron_model.py")],
        cwd=converted,
        capture_output=True,
        text=True,
        timeout=600,
    )
    found = re.findall(r"^(\w+) (\dx\d) (\S+)$", result.stdout, re.MULTILINE)
    print("largest difference of logits, as a share of the largest logit:")
    print(*sorted({" ".join(row) for row in found}), sep="\n")
    expected = {(kind, "{}x{}".format(*layout)) for kind in TIED for layout in LAYOUTS}
    assert {(kind, layout) for kind, layout, _ in found} == expected, result.stdout + result.stderr
    assert max(float(difference) for *_, difference in found) < 1e-4, found


@pytest.mark.extra("megatron")
@pytest.mark.parametrize("kind", TIED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_come_back_bit_by_bit(converted, tmp_path, kind, layout):
    checkpoint = converted / f"{kind}-megatron" / "{}x{}".format(*layout)
    megatron_weights.write_folder(checkpoint, converted / kind, tmp_path / "back")
    before, after = (load_file(path / "model.safetensors") for path in (converted / kind, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (tmp_path / "back/tokenizer.json").exists()


@pytest.mark.extra("megatron")
def test_names_of_transformer_engine_come_back_too(tmp_path):
    config = config_of("qwen3")
    model_of(config).save_pretrained(tmp_path / "hf")
    megatron_weights.write_checkpoint(tmp_path / "hf", tmp_path / "there")
    (path,) = tmp_path.glob("there/release/*/model_optim_rng.pt")
    state = torch.load(path, weights_only=True)
    renamed = {}
    for name, weight in state["model"].items():
        for fused, plain in megatron_weights.FUSED.items():
            name = re.sub(rf"(layers\.\d+)\.{re.escape(plain)}", rf"\1.{fused}", name)
        renamed[name] = weight
    assert renamed.keys() != state["model"].keys()
    extra = {"decoder.layers.0.self_attention._extra_state": None}
    torch.save(state | {"model": renamed | extra, "args": Namespace(num_layers=2)}, path)
    megatron_weights.write_folder(tmp_path / "there", tmp_path / "hf", tmp_path / "back")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "back"))
    assert all(torch.equal(before[name], after[name]) for name in before | after)


class Code:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.extra("megatron")
def test_code_in_a_megatron_checkpoint_is_not_run(tmp_path, capsys):
    config = config_of("gpt2")
    model_of(config).save_pretrained(tmp_path / "hf")
    megatron_weights.write_checkpoint(tmp_path / "hf", tmp_path / "there")
    (path,) = tmp_path.glob("there/release/*/model_optim_rng.pt")
    torch.save({"model": {}, "args": Code()}, path)
    with pytest.raises(RecipeError, match="more than tensors and settings"):
        megatron_weights.write_folder(tmp_path / "there", tmp_path / "hf", tmp_path / "back")
    assert capsys.readouterr().out == "" and not (tmp_path / "back").exists()


def test_a_ranks_weights_are_copies_of_their_own():
    """torch.save would write the whole matrix that a view is a part of, into the file of every rank."""
    config = config_of("llama")
    weights = megatron_weights.to_megatron(model_of(config).state_dict(), config)
    for rank in megatron_weights.split(weights, config, tensor=2).values():
        assert all(w.untyped_storage().nbytes() == w.nbytes for w in rank.values())


@pytest.mark.parametrize("convert", ["write_checkpoint", "write_folder"])
def test_a_folder_without_a_model_is_refused(tmp_path, convert):
    missing, new = tmp_path / "no", tmp_path / "new"
    folders = {"write_checkpoint": (missing, new), "write_folder": (tmp_path, missing, new)}
    with pytest.raises(Refused, match="no: it has no config.json"):
        getattr(megatron_weights, convert)(*folders[convert])


@pytest.mark.extra("megatron")
def test_bad_conversions_are_refused(tmp_path):
    config = config_of("qwen3")
    model_of(config).save_pretrained(tmp_path / "hf")
    with pytest.raises(Refused, match="--pipeline-parallel 3 does not divide 2 layers"):
        megatron_weights.write_checkpoint(tmp_path / "hf", tmp_path / "there", 1, 3)
    assert megatron_weights.write_checkpoint(tmp_path / "hf", tmp_path / "there", 2, 2) == 25
    with pytest.raises(Refused, match="already there"):
        megatron_weights.write_checkpoint(tmp_path / "hf", tmp_path / "there")
    with pytest.raises(Refused, match="latest_checkpointed_iteration.txt: missing"):
        megatron_weights.write_folder(tmp_path, tmp_path / "hf", tmp_path / "back")


@pytest.mark.parametrize("content", ["", "iter\n", "-1", "\0\0\0"])
def test_a_damaged_name_of_the_last_checkpoint_is_refused(tmp_path, monkeypatch, content):
    monkeypatch.setattr(megatron_weights, "require_extra", lambda *_: None)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(content)
    with pytest.raises(Refused, match="iteration.txt: '.*', expected a number of steps or release"):
        megatron_weights.read_checkpoint(tmp_path, config_of("qwen3"))


@pytest.mark.extra("megatron")
def test_missing_ranks_and_other_shapes_are_refused(tmp_path):
    config = config_of("qwen3")
    model_of(config).save_pretrained(tmp_path / "hf")
    megatron_weights.write_checkpoint(tmp_path / "hf", tmp_path / "there", 2, 2)
    other = json.loads((tmp_path / "hf/config.json").read_text()) | {"intermediate_size": 63}
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text(json.dumps(other))
    with pytest.raises(
        Refused, match=r"6 weights do not fit .*down_proj.weight: \(32, 64\), expected \(32, 63\)"
    ):
        megatron_weights.write_folder(tmp_path / "there", tmp_path / "other", tmp_path / "back")
    (tmp_path / "there/release/mp_rank_01_000/model_optim_rng.pt").unlink()
    with pytest.raises(Refused, match=r"3 files of ranks: expected 2 x 2 .*missing: \[\(1, 0\)\]"):
        megatron_weights.write_folder(tmp_path / "there", tmp_path / "hf", tmp_path / "back")


VALUES = MINI["pretrain"] | {"muon_learning_rate": None, "warmup_steps": 3}


def test_training_arguments_are_complete():
    values = VALUES | {"adam_beta2": 0.95, "weight_decay": 0.1, "bf16": True, "eval_blocks": 20}
    found = megatron.training_arguments(values, 20)
    expected = {
        "--micro-batch-size": "4",
        "--global-batch-size": "8",
        "--train-iters": "20",
        "--optimizer": "adam",
        "--adam-beta1": "0.9",
        "--adam-beta2": "0.95",
        "--adam-eps": "1e-08",
        "--weight-decay": "0.1",
        "--clip-grad": "1.0",
        "--lr": "0.01",
        "--min-lr": "0.0",
        "--lr-decay-style": "linear",
        "--lr-decay-iters": "20",
        "--lr-warmup-iters": "3",
        "--seed": "42",
        "--log-interval": "1",
        "--eval-interval": "10",
        "--eval-iters": "3",
        "--save-interval": "5",
        "--ckpt-format": "torch",
        "--bf16": None,
    }
    assert found == expected
    plain = megatron.training_arguments(VALUES | {"fp16": True, "bf16": False}, 20)
    assert "--fp16" in plain and "--bf16" not in plain
    assert not {"--fp16", "--bf16"} & megatron.training_arguments(VALUES | {"bf16": False}, 20).keys()
    assert megatron.training_arguments(VALUES | {"warmup_steps": 0.12}, 20)["--lr-warmup-iters"] == "3"


SHAPES = [
    ("linear", {}),
    ("cosine", {}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
    ("cosine_with_min_lr", {"min_lr": 1e-3}),
    ("cosine_with_restarts", {}),
    ("polynomial", {"lr_end": 1e-4}),
    ("inverse_sqrt", {}),
    ("constant", {}),
    ("constant_with_warmup", {}),
    ("warmup_stable_decay", {"num_decay_steps": 7, "min_lr_ratio": 0.1}),
    ("warmup_stable_decay", {"num_decay_steps": 7, "decay_type": "linear"}),
    ("warmup_stable_decay", {"num_decay_steps": 7, "decay_type": "1-sqrt"}),
]


@pytest.mark.extra("megatron")
@pytest.mark.parametrize(("kind", "options"), SHAPES)
def test_rates_of_megatron_are_those_of_the_schedule(kind, options):
    """Megatron's scheduler counts samples; the arguments count iterations."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    steps, batch, warmup = 20, 8, 0 if kind == "constant" else 3
    values = VALUES | {"lr_scheduler_type": kind, "lr_scheduler_kwargs": options, "warmup_steps": warmup}
    given = megatron.training_arguments(values, steps)
    number = {name: float(value) for name, value in given.items() if re.fullmatch(r"[\d.e-]+", value or "")}
    scheduler = OptimizerParamScheduler(
        SimpleNamespace(param_groups=[]),
        init_lr=number.get("--lr-warmup-init", 0.0),
        max_lr=number["--lr"],
        min_lr=number["--min-lr"],
        lr_warmup_steps=int(number["--lr-warmup-iters"]) * batch,
        lr_decay_steps=int(number["--lr-decay-iters"]) * batch,
        lr_decay_style=given["--lr-decay-style"],
        start_wd=0.0,
        end_wd=0.0,
        wd_incr_steps=steps * batch,
        wd_incr_style="constant",
        wsd_decay_steps=int(number.get("--lr-wsd-decay-iters", 0)) * batch,
        lr_wsd_decay_style=given.get("--lr-wsd-decay-style"),
    )
    peak, shape = 1e-2, dict(options)
    if "min_lr" in shape:
        shape["min_lr_rate"] = shape.pop("min_lr") / peak
    if "lr_end" in shape:
        shape["lr_end"] /= peak
    for step in range(steps):
        scheduler.num_steps = step * batch
        expected = peak * SCHEDULES[kind].formula(shape, step, warmup, steps)
        assert scheduler.get_lr({}) == pytest.approx(expected, rel=1e-6, abs=1e-12), step


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"muon_learning_rate": 0.02}, "muon_learning_rate: .*--set pretrain.muon_learning_rate=null"),
        ({"optim": "sgd"}, "optim: sgd"),
        ({"z_loss": 1e-4}, "z_loss"),
        ({"fp8": True}, "fp8"),
        ({"neftune_noise_alpha": 5}, "neftune_noise_alpha"),
        ({"phases": [{}]}, "phases"),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": 1.5}}, "half a cosine"),
        (
            {
                "lr_scheduler_type": "warmup_stable_decay",
                "lr_scheduler_kwargs": {"num_decay_steps": 7, "num_cycles": 1.5},
            },
            "half a cosine",
        ),
        ({"lr_scheduler_type": "added_here"}, "lr_scheduler_type: added_here, expected one of linear"),
        ({"warmup_steps": 20}, "warmup_steps: 20, expected fewer than the 20 steps"),
        ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2.0}}, "the power 1"),
        ({"lr_scheduler_type": "inverse_sqrt", "warmup_steps": 0}, "time scale"),
    ],
)
def test_a_training_that_megatron_has_not_is_refused(values, fault):
    with pytest.raises(Refused, match=f"in the same way: pretrain.json: .*{fault}"):
        megatron.training_arguments(VALUES | values, 20)


@pytest.mark.parametrize(
    ("values", "sizes", "fault"),
    [
        ({"hidden_act": "gelu"}, {}, "hidden_act: gelu"),
        ({"rope_parameters": ROPE | {"rope_type": "linear", "factor": 2.0}}, {}, "rope_type linear"),
        ({"attention_bias": True}, {}, "attention_bias"),
        ({"rope_parameters": ROPE | {"rope_theta": 10000.5}}, {}, "rope_theta 10000.5"),
        ({}, {"tensor": 4}, "--tensor-parallel 4 does not divide 2 key-value heads"),
        ({}, {"tensor": 0}, "expected 1 or more"),
        ({}, {"pipeline": 3}, "--pipeline-parallel 3 does not divide 2 layers"),
        ({"intermediate_size": 63}, {"tensor": 2}, "--tensor-parallel 2 does not divide .* size 63"),
    ],
)
def test_a_model_that_megatron_does_not_support_is_refused(values, sizes, fault):
    megatron.arguments_for(config_of("llama"), 32, 2, 2)
    with pytest.raises(Refused, match=fault):
        megatron.arguments_for(config_of("llama", **values), 32, **sizes)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3_moe", "olmo2", "gemma3_text"])
def test_other_model_types_are_refused(kind):
    with pytest.raises(Refused, match=f"model_type: {kind}, expected one of llama, mistral, qwen3, gpt2"):
        megatron.arguments_for(AutoConfig.for_model(kind), 32)


def test_a_sliding_window_is_accepted_only_when_it_has_no_effect():
    megatron.arguments_for(config_of("mistral", sliding_window=64), 64)
    with pytest.raises(Refused, match="sliding_window: 64 is less than the 65 tokens"):
        megatron.arguments_for(config_of("mistral", sliding_window=64), 65)


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"activation_function": "relu"}, "activation_function: relu"),
        ({"embd_pdrop": 0.0}, "embd_pdrop 0.0 and resid_pdrop 0.1"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"n_positions": 16}, "block_size: 32 tokens are more than n_positions, 16"),
        ({"n_inner": 63}, "--tensor-parallel 2 does not divide the intermediate size 63"),
    ],
)
def test_a_gpt2_that_megatron_does_not_support_is_refused(values, fault):
    megatron.arguments_for(config_of("gpt2"), 32, 2, 2)
    with pytest.raises(Refused, match=fault):
        megatron.arguments_for(config_of("gpt2", **values), 32, 2)


@pytest.mark.extra("megatron")
def test_token_files_are_read_by_megatron_core(tmp_path):
    documents = [[2, *range(10, 10 + n), 3] for n in (1, 7, 30, 4, 90)]
    write_token_file(tmp_path / "train", iter(documents), 8000)
    assert megatron.check_tokens(tmp_path / "train", 8000) == (5, sum(map(len, documents)))
    with pytest.raises(RecipeError, match="document 4 has other ids .* beyond the 90"):
        megatron.check_tokens(tmp_path / "train", 90)  # id 99 is outside such a vocabulary


@pytest.mark.parametrize("kind", megatron.MODEL_TYPES)
@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_checked_by_name_and_shape(tmp_path, kind, tied):
    config = config_of(kind, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    assert megatron.check_weights(tmp_path, config) == len(list(model.parameters()))
    if kind == "gpt2":
        return
    config.intermediate_size += 1
    with pytest.raises(Refused, match=r"6 weights .*mlp.down_proj.weight: \(32, 64\), expected \(32, 65\)"):
        megatron.check_weights(tmp_path, config)
    config.intermediate_size -= 1
    save_file({"extra": torch.ones(1)}, tmp_path / "more.safetensors")
    with pytest.raises(Refused, match=r"1 weights .*extra: \(1,\), expected none"):
        megatron.check_weights(tmp_path, config)
