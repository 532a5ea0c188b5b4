"""LoRA (Hu et al., 2021) and QLoRA (Dettmers et al., 2023) through peft: adapters, and their merge.

An adapter is saved next to the merged model, in the folder ADAPTER, with the digest of the weights that it
belongs to.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from recipe.model.build import load_model
from recipe.model.save import complete_configs
from recipe.project import RecipeError, Refused, read_json, write_json

ADAPTER = "adapter"
BASE = "base.json"


def load_with_adapter(folder: Path, attention: str, lora: dict[str, Any], arguments: Any) -> PeftModel:
    """A saved model with frozen weights and a new adapter over them.

    lora: LoraConfig's own keys, and ``quantization``: ``nf4`` holds the frozen weights in 4 bits (CUDA only).
    arguments: the TrainingArguments, for seed, device, precision and gradient checkpointing. Raises Refused
    for an adapter over a matrix that embeddings and output share: its merge would change both.
    """
    lora = {"target_modules": "all-linear"} | lora
    if lora.pop("quantization", None):
        precision = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else torch.float32
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=precision,
        )
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            attn_implementation=attention,
            quantization_config=config,
            device_map={"": arguments.device},
            use_safetensors=True,
            trust_remote_code=False,
        )
        model = prepare_model_for_kbit_training(model, arguments.activation_checkpointing)
    else:
        model = load_model(folder, attention)
        if arguments.activation_checkpointing:
            # Without it no gradient reaches a checkpointed layer, whose inputs are all frozen.
            model.enable_input_require_grads()
    torch.manual_seed(arguments.seed)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora))
    # As `recipe.config.training.check_target_modules`, for a checkpoint that was fetched after that check.
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    if model.config.tie_word_embeddings and any(isinstance(end, BaseTunerLayer) for end in ends):
        raise Refused(
            f"lora.target_modules: {lora['target_modules']} takes the embeddings or the output, which share "
            "one matrix: merged, the adapter would change both. Leave them out"
        )
    return adapted


def weights_digest(folder: Path) -> str:
    """The SHA-256 of a saved model's weights, over all its safetensors files in order."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()


def finish_adapter(base: Path, folder: Path) -> None:
    """Merge the adapter that training left in `folder`, save the model, and the base weights' digest."""
    write_json(folder / ADAPTER / BASE, {"weights_sha256": weights_digest(base)})
    merge_adapter(base, folder / ADAPTER).save_pretrained(folder)
    complete_configs(folder)


def merge_adapter(base: Path, adapter: Path) -> PreTrainedModel:
    """The model of `base`, in float32, with an adapter added to its weights.

    An adapter that was trained over 4-bit weights is also added to the unquantised ones. Raises RecipeError
    for an adapter of other weights.
    """
    if not (adapter / "adapter_config.json").is_file():
        raise RecipeError(f"{adapter}: no adapter_config.json: this is not a folder that peft has saved")
    known = read_json(adapter / BASE)["weights_sha256"] if (adapter / BASE).is_file() else None
    if known not in (None, weights_digest(base)):
        raise RecipeError(
            f"{adapter}: this adapter belongs to another base model: it was trained over weights of SHA-256 "
            f"{known[:12]}..., {base} has {weights_digest(base)[:12]}.... Give the model it was trained on, "
            "or tune again with --force"
        )
    try:
        model = PeftModel.from_pretrained(load_model(base), str(adapter))
    except (RuntimeError, ValueError) as error:  # shapes or names of modules differ
        raise RecipeError(
            f"{adapter}: this adapter belongs to another base model than {base} "
            f"({' '.join(str(error).split())[:200]}...). "
            "Give the model it was trained on, or tune again with --force"
        ) from error
    merged = model.merge_and_unload()
    merged.config.use_cache = True
    return merged
