"""The validation loss on two ranks: the mean over all trained tokens, whatever the ranks and the batches."""

import subprocess
import sys

SCRIPT = """
import sys

import torch
from recipe.config.optimizers import OPTIMIZERS
from recipe.config.settings import Settings
from recipe.model.losses import return_loss_only
from recipe.tokenization.packing import IGNORED, collate
from recipe.training.callbacks import Meter
from recipe.training.script import leave
from recipe.training.trainer import RecipeTrainer
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

torch.manual_seed(0)
shape = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "initializer_range": 1.0}
model = GPT2LMHeadModel(GPT2Config(vocab_size=50, bos_token_id=0, eos_token_id=0, **shape)).eval()
blocks = []
for number, trained in enumerate((16, 2, 16, 2, 5, 0, 0)):
    ids = torch.randint(50, (16,))
    labels = torch.where(torch.arange(16) < trained, torch.randint(50, (16,)), IGNORED)
    blocks.append({"input_ids": ids, "labels": labels, "shift_labels": labels})


def true_loss(part):
    logits = model(torch.stack([block["input_ids"] for block in part])).logits.flatten(0, 1)
    return cross_entropy(logits, torch.cat([block["labels"] for block in part])).item()


counts = (4, 5, 3, 7)
expected = [true_loss(blocks[:count]) for count in counts]
return_loss_only(model)
for rows in (1, 2, 4):
    arguments = TrainingArguments(
        sys.argv[1], use_cpu=True, remove_unused_columns=False, per_device_eval_batch_size=rows
    )
    trainer = RecipeTrainer(
        Settings(4, 16), OPTIMIZERS["adamw_torch"], Meter(1, lambda step: 1.0, 1.0, None),
        model=model, args=arguments, data_collator=collate,
    )
    assert arguments.world_size == 2
    for count, loss in zip(counts, expected, strict=True):
        found = trainer.evaluate(blocks[:count])["eval_loss"]
        assert abs(found - loss) < 1e-5 * loss, (rows, count, found, loss)
print("equal")
leave(0)
"""


def test_the_validation_loss_of_two_ranks_is_that_of_all_tokens(tmp_path):
    """Blocks that do not divide by the ranks, and such without any trained token."""
    script = tmp_path / "evaluate.py"
    script.write_text(SCRIPT)
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    result = subprocess.run([*torchrun, script, tmp_path], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and result.stdout.count("equal") == 2, result.stdout + result.stderr
