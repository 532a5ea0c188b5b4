"""The model: a stock Hugging Face architecture whose vocabulary and special ids come from the tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers import logging as transformers_logging

import recipe.attention  # noqa: F401  makes the attention "documents" known to transformers


def build_model(
    values: dict[str, Any], tokenizer: PreTrainedTokenizerFast, attention: str, seed: int
) -> PreTrainedModel:
    """A freshly initialised model by model.json, float32, the same for the same seed."""
    values = dict(values)
    config = AutoConfig.for_model(
        values.pop("model_type"),
        **values
        | {
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
    )
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)


def load_model(folder: Path, attention: str = "sdpa") -> PreTrainedModel:
    """A model that a stage saved, in float32: safetensors only, no code from the folder."""
    transformers_logging.disable_progress_bar()  # loading takes less time than drawing its bar
    return AutoModelForCausalLM.from_pretrained(
        folder,
        attn_implementation=attention,
        dtype=torch.float32,
        use_safetensors=True,
        trust_remote_code=False,
    )


def for_inference(model: PreTrainedModel) -> PreTrainedModel:
    """The model in evaluation mode on the GPU where there is one."""
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def parameter_count(model: PreTrainedModel) -> int:
    """Parameters, tied ones once; under ZeRO-3 those of all ranks."""
    return sum(map(_numel, model.parameters()))


def _numel(parameter: torch.nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())  # DeepSpeed's, where ZeRO-3 has partitioned it


def dimensions(parameter: torch.nn.Parameter) -> int:
    """The number of dimensions, also where ZeRO-3 keeps only a flat part here."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


def flops_per_token(model: PreTrainedModel, block_size: int) -> float:
    """Floating point operations of one training token: 6 per weight of a matrix product (4 where it is
    frozen), and causal attention.

    After Kaplan et al. (2020), appendix B, and Chowdhery et al. (2022), appendix B, with attention halved
    because it is causal. The input embedding is a look-up and costs nothing; the output matrix counts also
    when it is tied.
    """
    config = model.config
    matrices = sum(
        _cost(p) * _numel(p)
        for name, p in model.named_parameters()
        if dimensions(p) == 2 and not is_outer(name)
    )
    output = _cost(model.get_output_embeddings().weight) * config.vocab_size * config.hidden_size
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 6 * config.num_hidden_layers * config.num_attention_heads * head_size * block_size
    return matrices + output + attention


def _cost(parameter: torch.nn.Parameter) -> int:
    """Operations for each weight and token: forward 2, the gradient of its input 2, its own 2 if trained."""
    return 6 if parameter.requires_grad else 4


def is_outer(name: str) -> bool:
    """Whether a parameter belongs to the embeddings or the output, by its name in the architectures of
    recipes.
    """
    return any(part in name for part in ("embed", "wte", "wpe", "lm_head"))
