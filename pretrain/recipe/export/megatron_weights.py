"""Weights of a Hugging Face folder as those of megatron-core's GPT model, and back, for any number of ranks.

    python -m recipe.export.megatron_weights to HF_FOLDER CHECKPOINT [--tensor-parallel T]
        [--pipeline-parallel P]
    python -m recipe.export.megatron_weights from CHECKPOINT HF_FOLDER NEW_FOLDER

`to` writes a checkpoint that Megatron-LM starts from. `from` reads one that Megatron-LM has saved with
``--ckpt-format torch``, whatever its parallelism, and writes the weights next to config and tokenizer
of HF_FOLDER. The names are those of ``--transformer-impl local``; `from` also knows those of Transformer
Engine.
"""

from __future__ import annotations

import argparse
import pickle
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from recipe.endings import errors_in_one_line
from recipe.export.megatron import MODEL_TYPES, check_parallelism, expected_weights, padded_vocabulary
from recipe.project import RECORD, RecipeError, Refused, require_extra
from recipe.training.files import CHECKPOINTS

Weights = dict[str, torch.Tensor]
# A rank's number among the tensor parallel ranks, and among the pipeline's.
Rank = tuple[int, int]

EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
LAYER = "decoder.layers."
# (name in Megatron-LM, name in Hugging Face); of the whole model, then of each layer.
LLAMA = (
    (EMBEDDING, "model.embed_tokens.weight"),
    ("decoder.final_layernorm.weight", "model.norm.weight"),
    (OUTPUT, "lm_head.weight"),
)
LLAMA_LAYER = (
    ("self_attention.linear_proj.weight", "self_attn.o_proj.weight"),
    ("mlp.linear_fc2.weight", "mlp.down_proj.weight"),
    ("input_layernorm.weight", "input_layernorm.weight"),
    ("pre_mlp_layernorm.weight", "post_attention_layernorm.weight"),
    ("self_attention.q_layernorm.weight", "self_attn.q_norm.weight"),
    ("self_attention.k_layernorm.weight", "self_attn.k_norm.weight"),
)
GPT2 = (
    (EMBEDDING, "transformer.wte.weight"),
    ("embedding.position_embeddings.weight", "transformer.wpe.weight"),
    ("decoder.final_layernorm.weight", "transformer.ln_f.weight"),
    ("decoder.final_layernorm.bias", "transformer.ln_f.bias"),
    (OUTPUT, "lm_head.weight"),
)
GPT2_LAYER = tuple(
    (f"{theirs}.{kind}", f"{ours}.{kind}")
    for theirs, ours in (
        ("self_attention.linear_qkv", "attn.c_attn"),
        ("self_attention.linear_proj", "attn.c_proj"),
        ("mlp.linear_fc1", "mlp.c_fc"),
        ("mlp.linear_fc2", "mlp.c_proj"),
        ("input_layernorm", "ln_1"),
        ("pre_mlp_layernorm", "ln_2"),
    )
    for kind in ("weight", "bias")
)
# Transformer Engine keeps a norm within the matrix that follows it.
FUSED = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
# The dimension that tensor parallel ranks share, by the end of a name; all other weights are on every rank.
SPLIT = {
    "word_embeddings.weight": 0,
    "output_layer.weight": 0,
    "linear_qkv.weight": 0,
    "linear_qkv.bias": 0,
    "linear_fc1.weight": 0,
    "linear_fc1.bias": 0,
    "linear_proj.weight": 1,
    "linear_fc2.weight": 1,
}


def to_megatron(weights: Mapping[str, torch.Tensor], config: Any) -> Weights:
    """The weights of one whole GPT model of megatron-core, without rows for padding.

    weights: of the Hugging Face model of `config`. Raises KeyError for a weight that is missing.
    """
    new: Weights = {}
    names, of_layers = (GPT2, GPT2_LAYER) if config.model_type == "gpt2" else (LLAMA, LLAMA_LAYER)
    for theirs, ours in names:
        if theirs != OUTPUT or not config.tie_word_embeddings:
            new[theirs] = weights[ours]
    if config.model_type == "gpt2":
        for layer in range(config.n_layer):
            for theirs, ours in of_layers:
                weight = weights[f"transformer.h.{layer}.{ours}"]
                # Its matrices are stored as (inputs, outputs).
                weight = weight.T if weight.ndim == 2 else weight
                if "linear_qkv" in theirs:
                    # All queries, all keys, all values -> one head after the other.
                    weight = weight.unflatten(0, (3, config.n_head, -1)).transpose(0, 1).flatten(0, 2)
                new[f"{LAYER}{layer}.{theirs}"] = weight
        return new
    for layer in range(config.num_hidden_layers):
        here = f"model.layers.{layer}."
        parts = [weights[f"{here}self_attn.{kind}_proj.weight"] for kind in "qkv"]
        # A group of queries, then its key and its value.
        groups = [part.unflatten(0, (config.num_key_value_heads, -1)) for part in parts]
        new[f"{LAYER}{layer}.self_attention.linear_qkv.weight"] = torch.cat(groups, 1).flatten(0, 1)
        gate_up = [weights[f"{here}mlp.{kind}_proj.weight"] for kind in ("gate", "up")]
        new[f"{LAYER}{layer}.mlp.linear_fc1.weight"] = torch.cat(gate_up)
        for theirs, ours in of_layers:
            if "_norm" not in ours or config.model_type == "qwen3":
                new[f"{LAYER}{layer}.{theirs}"] = weights[here + ours]
    return new


def from_megatron(weights: Mapping[str, torch.Tensor], config: Any) -> Weights:
    """The reverse of `to_megatron`: the weights of the Hugging Face model of `config`.

    Rows of the vocabulary that are only padding are left out. Raises KeyError for a missing weight.
    """
    rows = {
        name: weight[: config.vocab_size] for name, weight in weights.items() if name in (EMBEDDING, OUTPUT)
    }
    weights = dict(weights) | rows
    new: Weights = {}
    names, of_layers = (GPT2, GPT2_LAYER) if config.model_type == "gpt2" else (LLAMA, LLAMA_LAYER)
    for theirs, ours in names:
        if theirs != OUTPUT or not config.tie_word_embeddings:
            new[ours] = weights[theirs]
    if config.model_type == "gpt2":
        for layer in range(config.n_layer):
            for theirs, ours in of_layers:
                weight = weights[f"{LAYER}{layer}.{theirs}"]
                if "linear_qkv" in theirs:
                    weight = weight.unflatten(0, (config.n_head, 3, -1)).transpose(0, 1).flatten(0, 2)
                new[f"transformer.h.{layer}.{ours}"] = weight.T if weight.ndim == 2 else weight
        return new
    heads = config.num_attention_heads // config.num_key_value_heads
    for layer in range(config.num_hidden_layers):
        there, here = f"{LAYER}{layer}.", f"model.layers.{layer}."
        grouped = weights[f"{there}self_attention.linear_qkv.weight"]
        grouped = grouped.unflatten(0, (config.num_key_value_heads, heads + 2, -1))
        for kind, part in zip("qkv", grouped.split((heads, 1, 1), 1), strict=True):
            new[f"{here}self_attn.{kind}_proj.weight"] = part.flatten(0, 2)
        gate_up = weights[f"{there}mlp.linear_fc1.weight"].chunk(2)
        for kind, part in zip(("gate", "up"), gate_up, strict=True):
            new[f"{here}mlp.{kind}_proj.weight"] = part
        for theirs, ours in of_layers:
            if "_norm" not in ours or config.model_type == "qwen3":
                new[here + ours] = weights[there + theirs]
    return new


def split(weights: Weights, config: Any, tensor: int = 1, pipeline: int = 1) -> dict[Rank, Weights]:
    """What each rank holds of the weights of `to_megatron`.

    The rows of the vocabulary are padded with zeros, as many as Megatron-LM expects.
    """
    layers = config.num_hidden_layers // pipeline
    ranks: dict[Rank, Weights] = {(t, p): {} for t in range(tensor) for p in range(pipeline)}
    weights = dict(weights)
    if pipeline > 1 and OUTPUT not in weights:
        # The last stage of the pipeline has a copy of the tied embeddings.
        weights[OUTPUT] = weights[EMBEDDING]
    for name, weight in weights.items():
        if name in (EMBEDDING, OUTPUT):
            padding = padded_vocabulary(config.vocab_size, tensor) - len(weight)
            weight = torch.nn.functional.pad(weight, (0, 0, 0, padding))
        stage = 0 if name.startswith("embedding.") else pipeline - 1
        if name.startswith(LAYER):
            number, rest = name.removeprefix(LAYER).split(".", 1)
            stage, name = int(number) // layers, f"{LAYER}{int(number) % layers}.{rest}"
        for rank, part in enumerate(_parts(name, weight, tensor, _is_gated(config))):
            # A copy of its own: torch.save would write all that a view is a part of.
            ranks[rank, stage][name] = part.clone(memory_format=torch.contiguous_format)
    return ranks


def join(ranks: Mapping[Rank, Weights], config: Any) -> Weights:
    """The reverse of `split`, for any number of ranks. Raises Refused when ranks are missing."""
    tensor, pipeline = (1 + max(rank[i] for rank in ranks) for i in (0, 1))
    missing = [(t, p) for t in range(tensor) for p in range(pipeline) if (t, p) not in ranks]
    if missing or config.num_hidden_layers % pipeline:
        raise Refused(
            f"{len(ranks)} files of ranks: expected {tensor} x {pipeline} (tensor x pipeline parallel), with "
            f"{config.num_hidden_layers} layers in equal parts; missing: {missing or 'none'}"
        )
    layers, new = config.num_hidden_layers // pipeline, {}
    for stage in range(pipeline):
        parts = [{_unfused(name): weight for name, weight in ranks[t, stage].items()} for t in range(tensor)]
        for name in parts[0]:
            pieces = [part[name] for part in parts]
            dimension = next((d for end, d in SPLIT.items() if name.endswith(end)), None)
            if dimension is None:
                whole = pieces[0]
            elif "linear_fc1" in name and _is_gated(config):
                whole = torch.cat([half for i in (0, 1) for half in (piece.chunk(2)[i] for piece in pieces)])
            else:
                whole = torch.cat(pieces, dimension)
            if name.startswith(LAYER):
                number, rest = name.removeprefix(LAYER).split(".", 1)
                name = f"{LAYER}{int(number) + stage * layers}.{rest}"
            new[name] = whole
    return new


def _is_gated(config: Any) -> bool:
    return config.model_type != "gpt2"


def _parts(name: str, weight: torch.Tensor, tensor: int, gated: bool) -> list[torch.Tensor]:
    """What each tensor parallel rank holds of a weight."""
    dimension = next((d for end, d in SPLIT.items() if name.endswith(end)), None)
    if dimension is None:
        return [weight] * tensor
    if gated and "linear_fc1" in name:
        # Each rank has a part of the gate and the same part of what it gates.
        return [part.flatten(0, 1) for part in weight.unflatten(0, (2, -1)).chunk(tensor, 1)]
    return list(weight.chunk(tensor, dimension))


def _unfused(name: str) -> str:
    for fused, plain in FUSED.items():
        name = name.replace(fused, plain)
    return name


def require_model(folder: Path) -> None:
    """Raise Refused for a folder that holds no model; a name would be looked up on the hub."""
    if not (folder / "config.json").is_file():
        raise Refused(
            f"{folder}: it has no config.json. Give the folder of a model, such as outputs/NAME/05_pretrain"
        )


def write_checkpoint(source: Path, target: Path, tensor: int = 1, pipeline: int = 1) -> int:
    """Write the weights of a Hugging Face folder as a checkpoint for ``--load`` of Megatron-LM.

    target: a new folder. Returns the number of weights. Raises Refused for a model or a number of ranks that
    Megatron-LM does not support.
    """
    from transformers import AutoConfig

    require_model(source)
    config = AutoConfig.from_pretrained(source)
    if config.model_type not in MODEL_TYPES:
        raise Refused(f"{source}: model_type: {config.model_type}, expected one of {', '.join(MODEL_TYPES)}")
    check_parallelism(config, tensor, pipeline)
    if target.exists():
        raise Refused(f"{target}: it is already there. Give the name of a new folder")
    weights = _read_folder(source)
    try:
        new = to_megatron(weights, config)
    except KeyError as error:
        raise Refused(f"{source}: the weight {error} is missing") from error
    partial = target.with_name(f".{target.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    for (t, p), part in split(new, config, tensor, pipeline).items():
        folder = partial / "release" / (f"mp_rank_{t:02d}" + (f"_{p:03d}" if pipeline > 1 else ""))
        folder.mkdir(parents=True)
        torch.save({"model": part, "checkpoint_version": 3.0}, folder / "model_optim_rng.pt")
    (partial / "latest_checkpointed_iteration.txt").write_text("release")
    partial.rename(target)
    return len(weights)


def read_checkpoint(checkpoint: Path, config: Any) -> Weights:
    """The weights of a checkpoint that Megatron-LM has saved with ``--ckpt-format torch``, for `config`.

    Only tensors, plain values and the classes that megatron-core lists as safe are read: no code is run.
    Raises Refused for a checkpoint of another form, and RecipeError for one that holds code.
    """
    require_extra("megatron", f"{checkpoint}: its classes are those of megatron-core")
    tracker = checkpoint / "latest_checkpointed_iteration.txt"
    if not tracker.is_file():
        raise Refused(f"{tracker}: missing. Give the folder of Megatron-LM's --save")
    step = tracker.read_text(errors="replace").strip()
    if not re.fullmatch(r"release|[0-9]+", step):
        raise Refused(f"{tracker}: {step[:40]!r}, expected a number of steps or release. Save again")
    folder = checkpoint / (step if step == "release" else f"iter_{int(step):07d}")
    ranks = {}
    for path in sorted(folder.glob("mp_rank_*/model_optim_rng.pt")):
        found = re.fullmatch(r"mp_rank_(\d+)(?:_(\d+))?", path.parent.name)
        if found:
            ranks[int(found[1]), int(found[2] or 0)] = _read_rank(path)
    if not ranks:
        raise Refused(f"{folder}: no mp_rank_*/model_optim_rng.pt. Save with --ckpt-format torch")
    return from_megatron(join(ranks, config), config)


def _read_rank(path: Path) -> Weights:
    from megatron.core.safe_globals import SAFE_GLOBALS

    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise RecipeError(
            f"{path}: it holds more than tensors and settings, so it is not read ({reason})"
        ) from error
    # Transformer Engine stores its own state next to the weights.
    return {name: value for name, value in state["model"].items() if not name.endswith("_extra_state")}


def write_folder(checkpoint: Path, source: Path, target: Path) -> int:
    """Write the weights of a Megatron-LM checkpoint as a Hugging Face folder.

    source: a Hugging Face folder of the same model, whose config and tokenizer are copied. target: a new
    folder. Returns the number of weights. Raises Refused for weights that do not fit the config.
    """
    from transformers import AutoConfig

    if target.exists():
        raise Refused(f"{target}: it is already there. Give the name of a new folder")
    require_model(source)
    config = AutoConfig.from_pretrained(source)
    try:
        weights = read_checkpoint(checkpoint, config)
    except (KeyError, RuntimeError) as error:
        raise Refused(f"{checkpoint}: its weights do not fit {source / 'config.json'}: {error}") from error
    expected = expected_weights(config)
    found = {name: tuple(weight.shape) for name, weight in weights.items()}
    if wrong := sorted(name for name in expected | found if expected.get(name) != found.get(name)):
        name = wrong[0]
        raise Refused(
            f"{checkpoint}: {len(wrong)} weights do not fit {source / 'config.json'}, such as {name}: "
            f"{found.get(name, 'missing')}, expected {expected.get(name, 'none')}"
        )
    partial = target.with_name(f".{target.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    no_weights = shutil.ignore_patterns("*.safetensors*", RECORD, CHECKPOINTS, "tensorboard")
    shutil.copytree(source, partial, ignore=no_weights)
    whole = {name: part.contiguous() for name, part in weights.items()}
    save_file(whole, partial / "model.safetensors", {"format": "pt"})
    partial.rename(target)
    return len(weights)


def _read_folder(folder: Path) -> Weights:
    weights: Weights = {}
    for path in sorted(folder.glob("*.safetensors")):
        weights |= load_file(path)
    return weights


def main() -> None:
    """Convert in one direction; exit 2 with the reason when that is not possible."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="direction", required=True)
    to = commands.add_parser("to", allow_abbrev=False, help="Hugging Face -> Megatron-LM")
    to.add_argument("source", type=Path, metavar="HF_FOLDER")
    to.add_argument("target", type=Path, metavar="CHECKPOINT")
    to.add_argument("--tensor-parallel", type=int, default=1, metavar="T")
    to.add_argument("--pipeline-parallel", type=int, default=1, metavar="P")
    back = commands.add_parser("from", allow_abbrev=False, help="Megatron-LM -> Hugging Face")
    back.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    back.add_argument("source", type=Path, metavar="HF_FOLDER")
    back.add_argument("target", type=Path, metavar="NEW_FOLDER")
    given = parser.parse_args()
    with errors_in_one_line("megatron_weights"):
        if given.direction == "to":
            ranks = given.tensor_parallel, given.pipeline_parallel
            count = write_checkpoint(given.source, given.target, *ranks)
            print(f"{given.target}: {count} weights. Add to Megatron-LM's arguments:")
            print(f"--load {given.target} --ckpt-format torch --transformer-impl local")
            print("--finetune --no-load-optim --no-load-rng")
        else:
            count = write_folder(given.checkpoint, given.source, given.target)
            print(f"{given.target}: {count} weights")


if __name__ == "__main__":
    main()
