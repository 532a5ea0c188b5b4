"""The Trainer of all trainings: optimizers, weight decay, clipping, the seed, the z-loss, evaluation."""

import math

import pytest
import torch
import transformers
from recipe.config import optimizers as table
from recipe.config.choice import CHUNKS
from recipe.config.optimizers import OPTIMIZERS, Optimizer
from recipe.model import chunked_loss, optimizers
from recipe.model.build import build_model
from recipe.tokenization.packing import IGNORED
from recipe.training import trainer, training
from tiny_training import GPT2, losses_of
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoTokenizer, masking_utils, modeling_utils

pytest_plugins = ["tiny_training"]


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


def test_fp32_is_computed_in_fp32(train, monkeypatch):
    """transformers and accelerate switch TF32 on where they compile, on a GPU; here this test does."""
    create = transformers.Trainer.create_accelerator_and_postprocess

    def create_and_switch_on(trainer):
        create(trainer)
        torch.backends.fp32_precision = "tf32"

    monkeypatch.setattr(transformers.Trainer, "create_accelerator_and_postprocess", create_and_switch_on)
    train("fp32")
    assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    assert torch.get_float32_matmul_precision() == "highest"
    # Inductor reads it by the older API when it tries kernels; after the newer one alone, that is an error.
    assert torch.backends.cuda.matmul.allow_tf32 is False


@pytest.mark.parametrize("options", [{}, {"z_loss": 1e-2, "torch_compile": True}])
def test_the_loss_in_chunks_trains_the_same(train, monkeypatch, options):
    """With dropout, and with evaluations and samples in between."""
    whole, expected, _ = train("whole", sample_steps=3, **options)
    monkeypatch.setattr(training, "choose_loss", lambda *_: CHUNKS)
    monkeypatch.setattr(chunked_loss, "CHUNK", 11 * 400)
    figures, rows, _ = train("chunks", sample_steps=3, **options)
    assert (whole["active"]["loss"], figures["active"]["loss"]) == ("whole logits", "chunks")
    assert losses_of(rows) == pytest.approx(losses_of(expected), rel=1e-4)
    assert figures["eval_loss"] == pytest.approx(whole["eval_loss"], rel=1e-4)


def test_the_validation_loss_is_that_of_all_tokens_whatever_the_batches(train):
    """Two of the four blocks train one token in seven, as a short answer in a block would."""

    def sparse(block):
        labels = block["shift_labels"].clone()
        labels[:28] = IGNORED
        return block | {"labels": labels, "shift_labels": labels}

    losses = [
        train(str(rows), valid=sparse, per_device_eval_batch_size=rows)[0]["eval_loss"] for rows in (1, 3, 4)
    ]
    # The stock Trainer's losses differ by 1 %.
    assert losses == pytest.approx([losses[2]] * 3, rel=1e-6)


def test_evaluation_changes_nothing(train):
    often = train("often", eval_strategy="steps", eval_steps=1)[1]
    assert losses_of(often) == losses_of(train("never")[1])


def test_an_optimizer_of_our_own_is_chosen_by_its_name(train, monkeypatch):
    """One entry and one function that builds it; the Trainer itself never sees the name."""
    entry = Optimizer("NAdam", table.everywhere(8), builder="build_nadam")
    monkeypatch.setitem(OPTIMIZERS, "nadam", entry)

    def build(model, settings, arguments):
        return torch.optim.NAdam(model.parameters(), lr=arguments.learning_rate)

    monkeypatch.setattr(optimizers, "build_nadam", build, raising=False)
    figures, rows, _ = train(optim="nadam")
    assert figures["active"]["optimizer"] == "NAdam" and losses_of(rows)[-1] < losses_of(rows)[0]


class Reads(TorchDispatchMode):
    """Counts the values that are read out of tensors: each would wait for a GPU."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("changes", [{}, {"z_loss": 1e-3}])
def test_a_micro_batch_waits_for_nothing(train, monkeypatch, changes):
    """No value is read in a micro-batch, so that a GPU has the next one before it has finished this one.

    Without torch.compile transformers itself reads two in each forward: whether the batch is packed, and
    whether it is padded. It does not while it is traced.
    """
    step, reads = trainer.RecipeTrainer.training_step, []

    def counted(self, *rest):
        with Reads() as mode:
            loss = step(self, *rest)
        reads.append(mode.count)
        return loss

    monkeypatch.setattr(trainer.RecipeTrainer, "training_step", counted)
    for module in (modeling_utils, masking_utils):
        monkeypatch.setattr(module, "is_tracing", lambda *_: True)
    train(per_device_train_batch_size=1, max_steps=3, **changes)
    assert reads == [0] * 12
