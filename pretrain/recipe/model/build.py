"""The model: a stock Hugging Face architecture whose vocabulary and special ids come from the tokenizer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers import logging as transformers_logging

import recipe.model.attention  # registers the attention "documents" in transformers
import recipe.model.experts  # registers the products of experts
import recipe.model.varlen  # registers the attention "varlen"
from recipe import host
from recipe.config.initial_model import NewPieces, changed_context, read_config_of
from recipe.config.model import FROM_TOKENIZER
from recipe.hardware import initialise_vector_math
from recipe.project import RecipeError, Refused


def build_model(
    values: dict[str, Any], tokenizer: PreTrainedTokenizerFast, attention: str, seed: int
) -> PreTrainedModel:
    """A freshly initialised model by model.json, float32, the same for the same seed."""
    config = _config(values | {"vocab_size": len(tokenizer)} | special_ids(tokenizer))
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)


def _config(values: dict[str, Any]) -> PreTrainedConfig:
    values = dict(values)
    return AutoConfig.for_model(values.pop("model_type"), **values)


def special_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int | None]:
    """The ids of a tokenizer that a configuration of transformers has, by their keys."""
    return {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def continued_model(
    folder: Path,
    values: dict[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    new_tokens: NewPieces,
    attention: str = "sdpa",
) -> PreTrainedModel:
    """The published checkpoint in `folder`, float32, ready for the tokenizer and its new tokens.

    values: model.json, which may be empty or repeat values of the checkpoint, and may change its context
    (`CONTEXT`). Special ids come from the tokenizer; the published generation settings are not used. Raises
    Refused for a model.json that describes another model, RecipeError for weights that do not belong to the
    checkpoint's config.json.
    """
    changed = changed_context(values, read_config_of(folder))
    model = load_published(folder, attention, {key: new for key, (_, new) in changed.items()})
    if values:
        mine = _config({"model_type": model.config.model_type} | values)
        for key in values:
            if key not in (*FROM_TOKENIZER, *changed) and getattr(mine, key) != getattr(
                model.config, key, None
            ):
                raise Refused(
                    f"model.json: {key}: {values[key]}, but {folder}/config.json makes it "
                    f"{getattr(model.config, key, None)}. Leave it out of model.json (or delete the file)"
                )
    add_rows(model, new_tokens)
    for key, value in special_ids(tokenizer).items():
        setattr(model.config, key, value)
    model.generation_config = GenerationConfig.from_model_config(model.config)
    return model


def load_published(
    folder: Path, attention: str | None = None, changed: dict[str, Any] | None = None
) -> PreTrainedModel:
    """A checkpoint without missing weights. Weights that the model does not have are named and not used.

    changed: values of its config.json.
    """
    try:
        model, report = _load(folder, attention, changed)
    except (RuntimeError, ValueError, OSError, SafetensorError) as error:
        raise RecipeError(
            f"{folder}: its weights cannot be loaded into the model of its config.json: "
            f"{str(error).strip()[:500]}"
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise RecipeError(
            f"{folder}: {len(missing)} weights of the model in config.json are not in its safetensors, such "
            f"as {missing[0]}: they would be random. Give a complete checkpoint of a causal language model"
        )
    unused = sorted(report["unexpected_keys"])
    if unused:
        print(f"{folder.name}: {len(unused)} weights are not used, such as {unused[0]}", flush=True)
    return model


@torch.no_grad()
def add_rows(model: PreTrainedModel, new_tokens: NewPieces) -> None:
    """Give every new token a row in the embeddings and in the output: the mean of the rows of its old ids.

    Rows that the checkpoint has beyond its vocabulary (a size that was rounded up) are used first; rows that
    are still left over stay. Gee et al. (2022, "Fast Vocabulary Transfer") start from this mean, too. Raises
    RecipeError where old tokens have no row.
    """
    if new_tokens.first > model.config.vocab_size:
        raise RecipeError(
            f"the tokenizer has {new_tokens.first} published tokens, the checkpoint "
            f"{model.config.vocab_size} rows: they were not published together. Set tokenizer.published to "
            "the checkpoint's own"
        )
    size = new_tokens.first + len(new_tokens.old_ids)
    if size > model.config.vocab_size:
        model.resize_token_embeddings(size, mean_resizing=False)
    rows, output = [model.get_input_embeddings().weight], model.get_output_embeddings()
    if output.weight is not rows[0]:
        rows.append(output.weight)
    if getattr(output, "bias", None) is not None:
        rows.append(output.bias)
    for weight in rows:
        for new, old_ids in enumerate(new_tokens.old_ids, new_tokens.first):
            weight[new] = weight[old_ids].mean(0)


def load_model(folder: Path, attention: str | None = None) -> PreTrainedModel:
    """A model that a stage saved, in float32: safetensors only, no code from the folder.

    attention: by default PyTorch's, and on a CPU ours for packed blocks (see `recipe.model.attention`).
    Raises RecipeError when the weights in the folder are not exactly those of its config.json.
    """
    model, report = _load(folder, attention)
    for kind in ("missing", "unexpected"):
        if names := sorted(report[f"{kind}_keys"]):
            raise RecipeError(
                f"{folder}: {len(names)} {kind} weights, such as {names[0]}: its safetensors do not belong "
                "to its config.json. Run its stage again with --force"
            )
    return model


def _load(
    folder: Path, attention: str | None, changed: dict[str, Any] | None = None
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, and what from_pretrained says about missing and unexpected weights.

    changed: values of its config.json.
    """
    initialise_vector_math()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(host.threads())
    transformers_logging.disable_progress_bar()  # loading takes less time than drawing its bar
    return AutoModelForCausalLM.from_pretrained(
        folder,
        attn_implementation=attention
        or ("sdpa" if torch.cuda.is_available() else recipe.model.attention.NAME),
        dtype=torch.float32,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
        **(changed or {}),
    )


@torch.no_grad()
def set_rope_theta(model: torch.nn.Module, theta: float) -> None:
    """Give a model with rotary embeddings of the type default another base, also in its config.

    Raises RecipeError for a model without them.
    """
    found = [module for module in model.modules() if hasattr(module, "original_inv_freq")]
    if not found:
        raise RecipeError(f"pretrain.json: phases: rope_theta: {theta:g}: the model has no rotary embeddings")
    for rotary in found:
        rotary.config.rope_parameters = rotary.config.rope_parameters | {"rope_theta": theta}
        frequencies, _ = rotary.compute_default_rope_parameters(rotary.config)
        # In place, because a compiled model reads these tensors.
        rotary.inv_freq.copy_(frequencies)
        rotary.original_inv_freq.copy_(frequencies)


def without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """The model, of which nothing is dropped in training mode either; its config stays as it is.

    trl's disable_dropout leaves the dropout of attention that is no module, as in Llama.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    return model


def for_inference(model: PreTrainedModel) -> PreTrainedModel:
    """The model in evaluation mode, on the GPU if there is one."""
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def parameter_count(model: PreTrainedModel) -> int:
    """The number of parameters, tied ones counted once; under ZeRO-3 those of all ranks."""
    return sum(map(_numel, model.parameters()))


def trained_parameter_count(model: PreTrainedModel) -> int:
    """The number of parameters that are trained, as `parameter_count`."""
    return sum(_numel(parameter) for parameter in model.parameters() if parameter.requires_grad)


def active_parameter_count(model: PreTrainedModel) -> int:
    """The number of parameters that a token uses: of the experts only those that its router chooses."""
    return sum(_active(model, p) for p in model.parameters())


def _active(model: PreTrainedModel, parameter: torch.nn.Parameter) -> int:
    """The numbers of a parameter that a token uses. Those of a layer's experts have three dimensions."""
    count = _numel(parameter)
    if dimensions(parameter) < 3:
        return count
    return count * model.config.num_experts_per_tok // model.config.num_experts


def _numel(parameter: torch.nn.Parameter) -> int:
    """The numbers of a parameter, also where ZeRO-3 keeps a part of it here, or where it is in 4 bits."""
    packed = getattr(parameter, "quant_state", None)
    return packed.shape.numel() if packed is not None else getattr(parameter, "ds_numel", parameter.numel())


def dimensions(parameter: torch.nn.Parameter) -> int:
    """The number of dimensions, also of a parameter of which ZeRO-3 keeps a flat part here."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


def flops_per_token(model: PreTrainedModel, block_size: int) -> float:
    """Floating point operations of one training token: 6 per weight of a matrix, and attention.

    A frozen weight counts 4. Of the experts those count that a token uses. After Kaplan et al. (2020),
    appendix B, and Chowdhery et al. (2022), appendix B, with attention halved because it is causal; a sliding
    window counts as if there were none. The input embedding is a look-up and costs nothing; the output matrix
    counts even if it is tied.
    """
    config = model.config
    matrices = sum(
        _cost(p) * _active(model, p)
        for name, p in model.named_parameters()
        if dimensions(p) >= 2 and not is_outer(name)
    )
    output = _cost(model.get_output_embeddings().weight) * config.vocab_size * config.hidden_size
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 6 * config.num_hidden_layers * config.num_attention_heads * head_size * block_size
    return matrices + output + attention


def _cost(parameter: torch.nn.Parameter) -> int:
    """Operations for each weight and token: forward 2, the gradient of its input 2, its own 2 if trained."""
    return 6 if parameter.requires_grad else 4


def is_outer(name: str) -> bool:
    """Whether a parameter belongs to the embeddings or the output, by its name in the known architectures."""
    return any(part in name for part in ("embed", "wte", "wpe", "lm_head"))
