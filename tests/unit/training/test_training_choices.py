"""What a training file asks for is what a training does: really trained, tiny, in this process."""

import importlib.util
import json
import math
import os
import platform
import signal
from types import SimpleNamespace

import pytest
import torch
from conftest import sentences
from recipe.config.optimizers import OPTIMIZERS
from recipe.config.training import check_boards
from recipe.model import losses
from recipe.model.build import build_model
from recipe.model.optimizers import decayed
from recipe.project import RecipeError, Refused
from recipe.tokenization.encode_text import document_ids, prompt_ids
from recipe.tokenization.packing import IGNORED, PackedBlocks
from recipe.tokenization.token_files import TokenFile, write_token_file
from recipe.tokenization.train import train_tokenizer
from recipe.training import callbacks, check_schedule, proof, trainer, training
from recipe.training.sample_prompts import Samples
from recipe.training.skip_bad_steps import TRIES, Guard
from torch._dynamo.utils import counters
from torch.utils.data import Subset
from transformers import AutoTokenizer, TrainerState

# Dropout, so that one random number more or less between two steps shows.
GPT2 = {
    "model_type": "gpt2",
    "n_embd": 32,
    "n_layer": 1,
    "n_head": 2,
    "n_positions": 64,
    "resid_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.1,
}
VALUES = {
    "block_size": 32,
    "global_batch_size": 4,
    "per_device_train_batch_size": 2,
    "max_steps": 6,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "bf16": False,
    "torch_compile": False,
}
GENERATION = {"prompts": ["今日は", "彼女は"], "max_new_tokens": 5, "do_sample": True, "seed": 1}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Folder with a tokenizer and a token file."""
    folder = tmp_path_factory.mktemp("corpus")
    tokenizer = train_tokenizer(sentences(2000, 1), {"vocab_size": 400}).tokenizer
    tokenizer.save_pretrained(folder)
    write_token_file(folder / "train", (document_ids(tokenizer, text) for text in sentences(200, 2)), 400)
    return folder


@pytest.fixture
def train(corpus, tmp_path, monkeypatch):
    """Train the tiny model with changed values; returns (the figures, the rows of metrics.jsonl, the
    folder).
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for name in ("TENSORBOARD_LOGGING_DIR", "WANDB_PROJECT", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    # What a test before this one compiled in this process is not what this training compiles.
    torch._dynamo.reset()
    counters.clear()

    def run(name="run", **changes):
        folder = tmp_path / name
        folder.mkdir()
        config = {"pretrain": VALUES | changes, "generation": GENERATION, "model": GPT2}
        plan = {"recipe": "x", "config": config, "deepspeed": None, "folder": str(folder)}
        plan |= {
            "ranks": 1,
            "fsdp": False,
            "tensor_parallel": 1,
            "host": platform.node(),
            "parent": os.getpid(),
        }
        run = training.prepare(plan, "pretrain")
        tokenizer = AutoTokenizer.from_pretrained(corpus)
        samples = PackedBlocks(TokenFile(corpus / "train"), 32, tokenizer.pad_token_id, run.arguments.seed)
        model = build_model(GPT2, tokenizer, run.choice.attention, run.arguments.seed)
        prompts = {prompt: prompt_ids(tokenizer, prompt) for prompt in GENERATION["prompts"]}
        sampling = Samples(run.settings.sample_steps, prompts, GENERATION, tokenizer, folder)
        figures = training.train(model, tokenizer, samples, Subset(samples, range(4)), run, 3.0, sampling)
        return figures, rows_of(folder / "metrics.jsonl"), folder

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses_of(rows):
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize("pause", ["on_evaluate", "on_save"])
def test_the_speed_leaves_pauses_out(monkeypatch, pause):
    clock = iter([0.0, 10.0, 60.0, 62.0, 62.0])  # begin, end of step 1, end of the pause, end of step 2
    monkeypatch.setattr(callbacks, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    meter, state = callbacks.Meter(100, 1.0, 1.0, None), TrainerState(max_steps=9)
    meter.on_train_begin(None, state, None)
    state.global_step = 1
    meter.on_step_end(None, state, None)
    getattr(meter, pause)(None, state, None)
    state.global_step, logs = 2, {"loss": 1.0}
    meter.complete(logs, state, torch.device("cpu"))
    assert logs["tokens_per_second"] == 50.0


# ------------------------------------------------------------------------------------------------ schedules

SCHEDULES = [
    ("constant", {}, 0, [1, 1, 1, 1, 1, 1]),
    ("constant_with_warmup", {}, 2, [0, 0.5, 1, 1, 1, 1]),
    ("linear", {}, 2, [0, 0.5, 1, 0.75, 0.5, 0.25]),
    ("cosine", {}, 2, [0, 0.5, 1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
    ("cosine_with_min_lr", {"min_lr_rate": 0.2}, 2, [0, 0.5, 1, 0.2 + 0.4 * (1 + math.sqrt(0.5)), 0.6, None]),
    ("cosine_with_min_lr", {"min_lr": 2e-3}, 2, [0, 0.5, 1, 0.2 + 0.4 * (1 + math.sqrt(0.5)), 0.6, None]),
    ("cosine_with_restarts", {"num_cycles": 2}, 2, [0, 0.5, 1, 0.5, 1, 0.5]),
    ("polynomial", {"lr_end": 2e-3, "power": 2.0}, 2, [0, 0.5, 1, 0.2 + 0.8 * 0.5625, 0.4, 0.25]),
    ("inverse_sqrt", {"timescale": 4}, 2, [0, 0.5, 1, 2 / math.sqrt(5), 2 / math.sqrt(6), 2 / math.sqrt(7)]),
    ("warmup_stable_decay", {"num_decay_steps": 2, "decay_type": "linear"}, 2, [0, 0.5, 1, 1, 1, 0.5]),
    ("warmup_stable_decay", {"num_decay_steps": 4, "decay_type": "1-sqrt"}, 0, [1, 1, 1, 0.5, None, None]),
]


@pytest.mark.parametrize(
    ("kind", "options", "warmup", "wanted", "muon"),
    [(*schedule, None) for schedule in SCHEDULES] + [(*SCHEDULES[5], 0.02), (*SCHEDULES[6], 0.02)],
)
def test_schedule_is_active(train, kind, options, warmup, wanted, muon):
    figures, rows, _ = train(
        lr_scheduler_type=kind, lr_scheduler_kwargs=options, warmup_steps=warmup, muon_learning_rate=muon
    )
    peak = muon or 1e-2  # the Trainer logs the rate of the first group
    for row, share in zip([row for row in rows if "loss" in row], wanted, strict=True):
        assert share is None or row["learning_rate"] == pytest.approx(share * peak, rel=1e-9)
    active = figures["active"]
    assert active["scheduler"] == f"{kind} (LambdaLR)" and active["learning_rates"][warmup] == peak
    assert active["optimizer"] == ("MuonAdamW" if muon else "AdamW") and active["fused"] == (not muon)


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant_with_warmup"])
@pytest.mark.parametrize(("steps", "warmup"), [(2, 8), (2, 2), (1, 0.1)])
def test_a_warm_up_as_long_as_the_run_or_longer_is_no_fault(train, kind, steps, warmup):
    """The rates at steps beyond the run differ between libraries and mean nothing."""
    active = train(lr_scheduler_type=kind, warmup_steps=warmup, max_steps=steps)[0]["active"]
    assert max(active["learning_rates"]) == steps


@pytest.mark.parametrize(
    ("kind", "other"), [("cosine", "linear"), ("warmup_stable_decay", "constant_with_warmup")]
)
def test_another_schedule_than_asked_for_stops_the_run(train, monkeypatch, kind, other):
    stock = trainer.RecipeTrainer.create_scheduler

    def wrong(self, num_training_steps, optimizer=None):
        asked, options = self.args.lr_scheduler_type, self.args.lr_scheduler_kwargs
        self.args.lr_scheduler_type, self.args.lr_scheduler_kwargs = type(asked)(other), {}
        scheduler = stock(self, num_training_steps, optimizer)
        self.args.lr_scheduler_type, self.args.lr_scheduler_kwargs = asked, options
        return scheduler

    monkeypatch.setattr(trainer.RecipeTrainer, "create_scheduler", wrong)
    options = {"num_decay_steps": 2} if kind == "warmup_stable_decay" else {}
    with pytest.raises(Refused, match=f"learning rate at step 5: {kind} is"):
        train(lr_scheduler_type=kind, lr_scheduler_kwargs=options, warmup_steps=2)


def test_an_optimizer_that_leaves_its_schedule_stops_the_run(train, monkeypatch):
    def detached(self, num_training_steps, optimizer=None):
        other = torch.optim.SGD(self.model.parameters(), lr=self.args.learning_rate)
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(other, lambda step: 1 - step / 6)
        return self.lr_scheduler

    monkeypatch.setattr(trainer.RecipeTrainer, "create_scheduler", detached)
    with pytest.raises(Refused, match=r"learning rates are \[0.01, 0.01\], its scheduler's \[0.00833"):
        train()


@pytest.mark.parametrize(
    ("wish", "fault"),
    [
        ({"neftune_noise_alpha": 5.0}, "neftune: asked for 5.0, active is None"),
        ({"activation_checkpointing": True}, "activation_checkpointing: asked for True, active is False"),
        ({"z_loss": 1e-3}, "z_loss: asked for 0.001, active is None"),
        ({"optim": "sgd"}, "optimizer: asked for SGD, active is AdamW"),
        ({"weight_decay": 0.1}, "weight_decay: asked for 0.1, active is None"),
        ({"adam_beta2": 0.95}, r"betas: asked for \[0.9, 0.95\], active is \[0.9, 0.999\]"),
        ({"adam_epsilon": 1e-6}, "epsilon: asked for 1e-06, active is 1e-08"),
        ({"global_batch_size": 8}, "global_batch: asked for 8, active is 4"),
        ({"optim": "adamw_torch_fused"}, "fused: asked for True, active is False"),
    ],
)
def test_what_was_asked_for_and_is_not_active_stops_the_run(train, monkeypatch, wish, fault):
    """The Trainer gets everything but one wish, of which it is told only when the proof is made."""
    train_as_asked = training.train
    without = {"optim": "adamw_torch"} if "optim" in wish else {}

    def ask_now(*arguments):
        run = arguments[4]
        stock = proof.Proof.on_step_end

        def look(proof, args, *rest, **objects):
            for key, value in wish.items():
                if key in ("z_loss", "global_batch_size"):
                    setattr(proof.settings, key, value)
                elif key == "optim":
                    proof.optimizer = OPTIMIZERS[value]
                else:
                    setattr(args, key.replace("gradient_ch", "activation_ch"), value)
            stock(proof, args, *rest, **objects)

        monkeypatch.setattr(proof.Proof, "on_step_end", look)
        assert run.settings.global_batch_size == 4
        return train_as_asked(*arguments)

    monkeypatch.setattr(training, "train", ask_now)
    with pytest.raises(Refused, match=f"not what was asked for is active.*{fault}"):
        train(**without)


def test_what_was_asked_for_and_is_active_is_in_the_block(train):
    asked = {"neftune_noise_alpha": 5.0, "activation_checkpointing": True, "adam_beta2": 0.95}
    asked |= {"adam_epsilon": 1e-6, "weight_decay": 0.1, "max_grad_norm": 0.5}
    active = train(**asked)[0]["active"]
    assert active["neftune"] == 5.0 and active["activation_checkpointing"] is True
    assert active["betas"] == [0.9, 0.95] and active["epsilon"] == 1e-6
    assert active["weight_decay"] == 0.1 and active["gradient_clipping"] == 0.5
    assert active["optimizer"] == "AdamW" and active["fused"] and active["boards"] == ["tensorboard"]
    assert active["global_batch"] == 4
    plain = train("plain", optim="sgd", max_grad_norm=0.0)[0]["active"]
    assert plain["optimizer"] == "SGD" and plain["neftune"] is plain["gradient_clipping"] is None
    assert plain["activation_checkpointing"] is False and plain["betas"] == []


def test_unknown_schedules_have_no_closed_form():
    assert check_schedule.factor("greedy", {}, 3, 1, 10) is None


# ------------------------------------------------------------------------------------------------ optimizer


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("kind", "shape", "matrices"),
    [
        ("gpt2", {"n_embd": 32, "n_layer": 1, "n_head": 2}, ["attn.c_attn", "attn.c_proj", "mlp.c_fc"]),
        ("qwen3", {}, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
        ("mistral", {}, ["q_proj", "o_proj", "down_proj"]),
        ("gpt_neox", {}, ["attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h"]),
    ],
)
def test_decay_leaves_norms_biases_and_embeddings_alone(corpus, kind, shape, matrices, tied):
    llama = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    if kind in ("qwen3", "mistral"):
        llama |= {"num_key_value_heads": 2, "head_dim": 16}
    values = {"model_type": kind, "tie_word_embeddings": tied} | (shape or llama)
    model = build_model(values, AutoTokenizer.from_pretrained(corpus), "eager", 0)
    names = set(decayed(model))
    everything = dict(model.named_parameters())
    for name in everything:
        alone = name.endswith("bias") or any(
            part in name for part in ("norm", "ln_", "wte", "wpe", "embed_tokens", "embed_in")
        )
        assert (name in names) == (not alone), name
    assert all(any(matrix in name for name in names) for matrix in matrices)
    output = {"lm_head.weight", "embed_out.weight"} & set(everything)
    assert (output <= names) and bool(output) == (not tied)


@pytest.mark.parametrize("muon", [None, 0.02])
def test_decay_groups_reach_the_optimizer(train, monkeypatch, muon):
    seen = {}
    stock = trainer.RecipeTrainer.create_optimizer

    def look(self, model=None):
        optimizer = stock(self, model)
        names = {id(p): name for name, p in self.model.named_parameters()}
        for group in optimizer.param_groups:
            seen.setdefault(group["weight_decay"], set()).update(names[id(p)] for p in group["params"])
        return optimizer

    monkeypatch.setattr(trainer.RecipeTrainer, "create_optimizer", look)
    train(weight_decay=0.1, muon_learning_rate=muon, max_steps=1)
    matrices = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert seen[0.1] == {f"transformer.h.0.{name}.weight" for name in matrices}
    assert {"transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.weight"} <= seen[0.0]
    assert set(seen) == {0.0, 0.1}


def test_gradients_are_clipped(train, corpus):
    """One step of plain gradient descent with rate 1 moves the weights by exactly the norm of the clip."""
    tokenizer = AutoTokenizer.from_pretrained(corpus)
    before = dict(build_model(GPT2, tokenizer, "sdpa", 42).named_parameters())
    moved = {}
    for norm in (0.01, 0.0):
        _, rows, folder = train(
            f"clip{norm}", optim="sgd", learning_rate=1.0, lr_scheduler_type="constant", weight_decay=0.0,
            max_steps=1, max_grad_norm=norm,
        )  # fmt: skip
        after = type(build_model(GPT2, tokenizer, "sdpa", 42)).from_pretrained(folder)
        change = [(p - before[name]).norm() for name, p in after.named_parameters()]
        moved[norm] = torch.stack(change).norm().item()
        assert rows[0]["grad_norm"] > 0.1  # logged before it is clipped
    assert moved[0.01] == pytest.approx(0.01, rel=1e-3)
    assert moved[0.0] == pytest.approx(rows[0]["grad_norm"], rel=1e-3)


def test_seed_decides_everything(train):
    first, again, other = (
        losses_of(train(name, seed=seed)[1]) for name, seed in zip("abc", (1, 1, 2), strict=True)
    )
    assert first == again != other


# ------------------------------------------------------------------------------------------------ z-loss


def test_z_loss_by_hand():
    logits = torch.tensor([[[2.0, 0.0], [0.0, 0.0], [5.0, 5.0]]])
    labels = torch.tensor([[0, 1, IGNORED]])
    z = math.log(math.exp(2) + 1), math.log(2)
    wanted = [(z[0] - 2 + z[1]) / 4, (z[0] ** 2 + z[1] ** 2) / 4]
    got = losses.cross_entropy_and_z(logits, labels, 2, torch.tensor(4), shift_labels=labels)
    assert got.tolist() == pytest.approx(wanted, rel=1e-6)
    mean = losses.cross_entropy_and_z(logits, labels, 2, shift_labels=labels)
    assert mean.tolist() == pytest.approx([2 * value for value in wanted], rel=1e-6)
    # Without shift_labels, the labels are those of the tokens themselves.
    shifted = losses.cross_entropy_and_z(logits, torch.tensor([[0, 0, 1]]), 2, torch.tensor(4))
    assert shifted.tolist() == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("compiled", [False, True])
def test_z_loss_pulls_on_the_gradient_and_not_on_evaluation(corpus, compiled):
    tokenizer = AutoTokenizer.from_pretrained(corpus)
    ids = torch.arange(5, 37).unsqueeze(0)
    gradients, figures = [], []
    for coefficient in (0.0, 0.5):
        model = build_model(GPT2 | {name: 0.0 for name in GPT2 if "pdrop" in name}, tokenizer, "sdpa", 0)
        plain = model(input_ids=ids, labels=ids, shift_labels=ids).logits
        losses.return_loss_only(model, coefficient)
        called = torch.compile(model, backend="eager") if compiled else model
        output = called(input_ids=ids, labels=ids, shift_labels=ids)
        output["loss"].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        figures.append({key: value.item() for key, value in output.items()})
        model.eval()
        assert set(called(input_ids=ids, labels=ids, shift_labels=ids)) == {"loss"}
        figures[-1]["eval"] = called(input_ids=ids, labels=ids, shift_labels=ids)["loss"].item()
        assert called(input_ids=ids).logits.shape == plain.shape
    share = 0.5 * plain.logsumexp(-1).square().mean().item()
    assert figures[1]["z_loss"] == pytest.approx(share, rel=1e-5)
    assert figures[1]["loss"] - figures[1]["z_loss"] == pytest.approx(figures[0]["loss"], rel=1e-5)
    assert figures[1]["eval"] == pytest.approx(figures[0]["eval"], rel=1e-5)
    assert not torch.allclose(gradients[0], gradients[1], rtol=0.1)
    torch._dynamo.reset()
    counters.clear()  # by which a later test's proof tells whether it is compiled


def test_z_loss_is_logged_apart(train):
    """A coefficient too small to matter leaves the logged loss what it was; the share is of the known
    size.
    """
    plain = losses_of(train("plain")[1])
    figures, rows, _ = train("z", z_loss=1e-6)
    assert losses_of(rows) == pytest.approx(plain, rel=1e-4)
    rows = [row for row in rows if "loss" in row]
    # At the start the logits are near 0, so Z is the size of the vocabulary.
    assert rows[0]["z_loss"] == pytest.approx(1e-6 * math.log(400) ** 2, rel=0.05)
    assert all("z_loss" in row for row in rows) and figures["active"]["z_loss"] == 1e-6
    large = [row for row in train("large", z_loss=1.0)[1] if "loss" in row]
    assert large[-1]["z_loss"] < 0.85 * large[0]["z_loss"]  # it is trained away


# ------------------------------------------------------------------------------------------------ spikes

STEPS = {"logging_steps": 1, "lr_scheduler_type": "constant"}


@pytest.fixture
def inject(monkeypatch):
    """Multiply the loss of chosen steps by a factor: gradients follow.

    Returns the weights before each step.
    """
    seen = {}

    def start(factor, *steps):
        stock = trainer.RecipeTrainer.compute_loss

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            step = self.state.global_step + 1
            seen.setdefault(step, torch.cat([p.detach().flatten() for p in self.model.parameters()]))
            loss, outputs = stock(self, model, inputs, True, num_items_in_batch)
            loss = loss * factor if step in steps else loss
            return (loss, outputs) if return_outputs else loss

        monkeypatch.setattr(trainer.RecipeTrainer, "compute_loss", compute_loss)
        return seen

    return start


@pytest.mark.parametrize("muon", [None, 0.02])
@pytest.mark.parametrize("factor", [math.nan, math.inf, 100.0])
def test_a_step_that_cannot_be_true_changes_no_weight(train, inject, factor, muon):
    weights = inject(factor, 3)
    figures, _, folder = train(**STEPS, muon_learning_rate=muon, weight_decay=0.1)
    assert figures["skipped_steps"] == [3]
    assert torch.equal(weights[3], weights[4])
    for step in (1, 2, 4, 5):
        assert not torch.equal(weights[step], weights[step + 1])
    assert all(torch.isfinite(value).all() for value in weights.values())
    (row,) = map(json.loads, (folder / "skipped.jsonl").read_text().splitlines())
    assert row["step"] == 3 and row["reason"].startswith("a loss of")


def test_a_gradient_that_is_no_number_is_left_out_with_a_finite_loss(train, monkeypatch):
    stock = trainer.RecipeTrainer._get_grad_norm

    def broken(self, *arguments, **keywords):
        if self.state.global_step == 1:
            next(self.model.parameters()).grad.fill_(math.nan)
            keywords["grad_norm"] = torch.tensor(math.nan)
            arguments = arguments[:1]
        return stock(self, *arguments, **keywords)

    monkeypatch.setattr(trainer.RecipeTrainer, "_get_grad_norm", broken)
    figures, rows, _ = train(**STEPS)
    assert figures["skipped_steps"] == [2] and all(math.isfinite(loss) for loss in losses_of(rows))


def test_the_list_survives_and_the_same_steps_are_left_out(train, inject, monkeypatch):
    """A list that an earlier try has left, and losses that look well: the steps are left out all the same."""
    weights = inject(1.0)
    stock = Guard.on_train_begin

    def with_a_list(guard, *arguments, **objects):
        guard.path.write_text('{"step": 2}\n{"step": 4}\n{"st')
        stock(guard, *arguments, **objects)

    monkeypatch.setattr(Guard, "on_train_begin", with_a_list)
    assert train(**STEPS)[0]["skipped_steps"] == [2, 4]
    assert torch.equal(weights[2], weights[3]) and torch.equal(weights[4], weights[5])
    assert not torch.equal(weights[3], weights[4])


def test_after_some_tries_the_training_stops(train, inject):
    weights = inject(math.nan, *range(2, 20))
    with pytest.raises(RecipeError, match=f"{TRIES} steps in a row were left out, the last is {TRIES + 1}"):
        train(**STEPS | {"max_steps": 12})
    assert max(weights) == TRIES + 1 and torch.equal(weights[2], weights[TRIES + 1])


def test_a_loss_that_falls_or_doubles_is_no_spike(train, inject):
    inject(2.0, 3, 5)
    assert train(**STEPS)[0]["skipped_steps"] == []


# ------------------------------------------------------------------------------------------------ watching


def test_every_figure_is_on_the_board(train):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    figures, rows, folder = train(eval_strategy="steps", eval_steps=3, report_to="none")
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    wanted = {"loss", "bits_per_byte", "grad_norm", "learning_rate", "tokens_per_second", "mfu"}
    wanted |= {"seconds_left", "rank0/tokens_per_second", "rank0/memory_gib"}
    tags = set(board.Tags()["scalars"])
    assert {f"train/{name}" for name in wanted} | {"eval/loss", "eval/bits_per_byte"} <= tags
    last = [row for row in rows if "loss" in row][-1]
    assert board.Scalars("train/bits_per_byte")[-1].value == pytest.approx(last["bits_per_byte"], rel=1e-6)
    # bytes_per_token is 3 here: bits of a token over its bytes.
    assert last["bits_per_byte"] == pytest.approx(last["loss"] / math.log(2) / 3, rel=1e-12)
    assert last["mfu"] > 0 and last["seconds_left"] == 0
    assert 0.1 < last["rank0/memory_gib"] < 24 and last["rank0/tokens_per_second"] > 0
    assert [row["step"] for row in rows if "eval_bits_per_byte" in row] == [3, 6]


def test_board_without_its_library_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else name)
    with pytest.raises(Refused, match=r"pretrain.json: report_to: wandb is not installed.*pip install wandb"):
        check_boards(["wandb"], "pretrain.json")
    assert check_boards("none", "x") == check_boards(None, "x") == ["tensorboard"]


def test_wandb_offline_holds_the_figures(train, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="could not run: wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    _, _, folder = train(report_to="wandb")
    summary = dict(wandb.run.summary)
    wandb.finish()
    assert summary["train/rank0/memory_gib"] > 0.1 and summary["train/bits_per_byte"] > 0
    assert list(folder.glob("wandb/offline-run-*/run-*.wandb"))
    assert list((folder / "tensorboard").iterdir())


def test_trackio_holds_the_figures(train, monkeypatch, tmp_path):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is first imported
    pytest.importorskip("trackio", reason="could not run: trackio is not installed")
    train(report_to=["trackio"])
    content = b"".join(path.read_bytes() for path in (tmp_path / "trackio").rglob("*") if path.is_file())
    assert b"rank0/memory_gib" in content


# ------------------------------------------------------------------------------------------------ samples


@pytest.mark.parametrize("steps", [2, [2, 4]])
def test_samples_at_chosen_steps_change_nothing(train, steps):
    plain, sampled = train("plain")[1], train("sampled", sample_steps=steps)
    assert losses_of(sampled[1]) == losses_of(plain)
    rows = rows_of(sampled[2] / "samples.jsonl")
    assert [(row["step"], row["prompt"]) for row in rows] == [
        (step, prompt) for step in (0, 2, 4, 6) for prompt in GENERATION["prompts"]
    ]
    evaluated = {row["step"]: row["eval_loss"] for row in sampled[1] if "eval_loss" in row}
    assert {row["step"]: row["eval_loss"] for row in rows if row["step"]} == evaluated
    page = (sampled[2] / "samples.md").read_text()
    head, _, *body = page.splitlines()
    assert head.startswith("| prompt | step 0 | step 2, valid loss") and "step 6, valid loss" in head
    assert [line.split(" | ")[0] for line in body] == [f"| {prompt}" for prompt in GENERATION["prompts"]]
    assert not (sampled[2].parent / "plain/samples.jsonl").exists()


def test_evaluation_changes_nothing(train):
    often = train("often", eval_strategy="steps", eval_steps=1)[1]
    assert losses_of(often) == losses_of(train("never")[1])


def test_rows_of_a_cut_off_try_are_dropped(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"step": 1}\n{"step": 3}\n{"step": 5}\n{"st')
    assert callbacks.keep_rows(path, 3) == [{"step": 1}, {"step": 3}] == rows_of(path)
    assert callbacks.keep_rows(tmp_path / "none", 3) == []
