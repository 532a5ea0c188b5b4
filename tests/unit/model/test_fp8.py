"""fp8 by torchao, emulated on the CPU: which matrices, the same weights, and what it costs in loss."""

import functools
import statistics

import pytest
import torch
from conftest import sentences
from recipe.config import choice
from recipe.model.fp8 import active_fp8, use_fp8
from recipe.model.optimizers import MuonAdamW
from recipe.project import Refused
from recipe.tokenization.train import train_tokenizer
from recipe.training import training
from transformers import AutoModelForCausalLM, Qwen3Config

pytest_plugins = ["tiny_training"]
pytestmark = pytest.mark.extra("torchao")
QWEN3 = {"model_type": "qwen3", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
QWEN3 |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True}
# The largest difference of five seeds was 0.0020, and in four of them fp8 was the better one.
BOUND = 0.01


def build(seed=0, **changes):
    torch.manual_seed(seed)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 400, "tie_word_embeddings": True}
    return AutoModelForCausalLM.from_config(Qwen3Config(**shape | changes), dtype=torch.float32)


def test_the_layers_multiply_in_fp8_and_the_weights_stay_as_they_are(tmp_path):
    plain, model = build(), build()
    assert active_fp8(model) == 0
    groups = [len(group["params"]) for group in MuonAdamW(plain, 1, 1, (0.9, 0.9), 1e-8, 0.1).param_groups]
    assert use_fp8(model, emulate=True) == active_fp8(model) == 14
    assert type(model.lm_head) is torch.nn.Linear
    muon = MuonAdamW(model, 1, 1, (0.9, 0.9), 1e-8, 0.1)
    assert [len(group["params"]) for group in muon.param_groups] == groups
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in model.config.to_dict()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert active_fp8(saved) == 0
    assert saved.state_dict().keys() == plain.state_dict().keys()
    for name, weight in plain.state_dict().items():
        assert weight.dtype == saved.state_dict()[name].dtype and torch.equal(
            weight, saved.state_dict()[name]
        )


def test_a_matrix_whose_sides_are_no_multiples_of_16_stays():
    assert use_fp8(build(intermediate_size=120), emulate=True) == 8  # of the attention


def loss_of(fp8, blocks):
    """The mean loss of the last 30 of 150 steps under bf16 autocast."""
    model, losses = build(), []
    if fp8:
        use_fp8(model, emulate=True)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for batch in blocks.split(8)[:150]:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return statistics.mean(losses[-30:])


def test_the_loss_is_that_of_bf16_within_a_measured_bound():
    tokenizer = train_tokenizer(sentences(2000, 1), {"vocab_size": 400}).tokenizer
    ids = [id for text in sentences(8000, 2) for id in [*tokenizer(text).input_ids, tokenizer.eos_token_id]]
    blocks = torch.tensor(ids[: len(ids) // 64 * 64]).view(-1, 64)
    bf16, fp8 = loss_of(False, blocks), loss_of(True, blocks)
    assert bf16 < 1  # ln(400) = 6.0 before training
    assert fp8 != bf16 and fp8 - bf16 < BOUND


def test_a_training_reports_fp8_and_stops_without_it(train, monkeypatch):
    """Emulated: the check of the hardware, which a CPU does not pass, is left out."""
    monkeypatch.setattr(choice, "_check_fp8", lambda *_: None)
    monkeypatch.setattr(training, "use_fp8", functools.partial(use_fp8, emulate=True))
    figures, _, folder = train(model=QWEN3, fp8=True)
    assert figures["active"]["fp8"] == 7
    assert AutoModelForCausalLM.from_pretrained(folder).num_parameters() == figures["active"]["parameters"]
    monkeypatch.setattr(training, "use_fp8", lambda model: 7)
    with pytest.raises(Refused, match="fp8: asked for 7, active is None"):
        train("not-active", model=QWEN3, fp8=True)
