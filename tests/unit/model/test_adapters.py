"""Adapters: only they are trained, the merge is exact, and they fit one base model only."""

from types import SimpleNamespace

import pytest
import torch
from conftest import SHAPE, sentences
from recipe.model import adapters
from recipe.model.build import build_model, load_model
from recipe.project import RecipeError, Refused, read_json
from recipe.tokenization.train import train_tokenizer

ARGUMENTS = SimpleNamespace(seed=1, activation_checkpointing=False, bf16=False, fp16=False)
IDS = torch.arange(5, 37).reshape(1, -1)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Two models of one shape, and one of another."""
    fast = train_tokenizer(sentences(2000, 1), {"vocab_size": 400}).tokenizer
    folders = {}
    for name, seed, shape in (
        ("one", 1, {}),
        ("two", 2, {}),
        ("wide", 1, {"hidden_size": 64}),
        ("tied", 1, {"tie_word_embeddings": True}),
    ):
        folders[name] = tmp_path_factory.mktemp(name)
        build_model({"model_type": "qwen3", **SHAPE, **shape}, fast, "sdpa", seed).save_pretrained(
            folders[name]
        )
    return folders


@pytest.fixture
def trained(bases, tmp_path):
    """A folder with an adapter that took two steps over the model `one`, and that model."""
    model = adapters.load_with_adapter(bases["one"], "sdpa", {"r": 2, "lora_alpha": 4}, ARGUMENTS)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / adapters.ADAPTER)
    return tmp_path, model.eval()


def test_only_adapters_of_linear_layers_are_trained(trained):
    _, model = trained
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names and all(".lora_A." in name or ".lora_B." in name for name in names)
    assert not any("lm_head" in name or "embed" in name for name in names)
    assert any("down_proj" in name for name in names) and any("q_proj" in name for name in names)


def test_merge_is_the_base_with_its_adapter(trained, bases):
    folder, model = trained
    adapters.finish_adapter(bases["one"], folder)
    with torch.inference_mode():
        expected, alone = model(input_ids=IDS).logits, load_model(bases["one"])(IDS).logits
        torch.testing.assert_close(load_model(folder)(IDS).logits, expected, rtol=0, atol=1e-5)
    assert (expected - alone).abs().max() > 1e-3
    assert load_model(folder).config.use_cache


def test_an_adapter_of_another_model_is_named(trained, bases):
    folder, _ = trained
    adapters.finish_adapter(bases["one"], folder)
    assert read_json(folder / "config.json")["rope_theta"] == 10_000  # for transformers 4, too
    with pytest.raises(
        RecipeError, match=r"this adapter belongs to another base model: .* of SHA-256 .*tune again"
    ):
        adapters.merge_adapter(bases["two"], folder / adapters.ADAPTER)
    (folder / adapters.ADAPTER / adapters.BASE).unlink()  # an adapter from elsewhere: only its shapes differ
    with pytest.raises(
        RecipeError, match=r"this adapter belongs to another base model than .*wide.*size mismatch"
    ):
        adapters.merge_adapter(bases["wide"], folder / adapters.ADAPTER)
    with pytest.raises(RecipeError, match="no adapter_config.json"):
        adapters.merge_adapter(bases["one"], folder)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_over_a_shared_matrix_is_refused(bases, target):
    """Its merge would change the embeddings and the output."""
    lora = {"r": 2, "target_modules": ["q_proj", target]}
    adapters.load_with_adapter(bases["one"], "sdpa", lora, ARGUMENTS)
    with pytest.raises(Refused, match="lora.target_modules: .* merged, the adapter would change both"):
        adapters.load_with_adapter(bases["tied"], "sdpa", lora, ARGUMENTS)


@pytest.mark.parametrize("precision", ["bfloat16", "float16", "float32"])
def test_4_bit_weights_are_multiplied_in_the_precision_of_the_training(bases, monkeypatch, precision):
    """bitsandbytes is not needed to see what it is asked for."""

    def config(**values):
        raise RecipeError(str(values["bnb_4bit_compute_dtype"]))

    monkeypatch.setattr(adapters, "BitsAndBytesConfig", config)
    arguments = SimpleNamespace(bf16=precision == "bfloat16", fp16=precision == "float16")
    with pytest.raises(RecipeError, match=f"torch.{precision}"):
        adapters.load_with_adapter(bases["one"], "sdpa", {"r": 2, "quantization": "nf4"}, arguments)
