"""The way to Megatron-LM, for models that need pipeline parallelism: its arguments for a recipe, checked.

    python -m recipe.export.megatron --recipe NAME [--tensor-parallel T] [--pipeline-parallel P]

Standard output holds the arguments of Megatron-LM's pretrain_gpt.py for the recipe's model, tokenizer and
token files, so that they can stand in its command line; what was checked, and how the weights of stage 05
are converted, goes to standard error. The token files of stage 04 are in its own format.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from recipe.config.model import model_values
from recipe.config.recipe import load_recipe
from recipe.project import RecipeError, Refused, stage_folder
from recipe.tokenization.token_files import TokenFile

# Architectures that Megatron-LM's GPT model can be.
MODEL_TYPES = ("llama", "mistral", "qwen3")
VOCABULARY_MULTIPLE = 128  # Megatron-LM's default; rows of the embedding are padded to it, on each rank


def arguments_for(config: Any, seq_length: int, tensor: int = 1, pipeline: int = 1) -> dict[str, str | None]:
    """Megatron-LM's arguments for a Hugging Face model config; a flag has the value None.

    Raises Refused for what Megatron-LM's GPT model or so many ranks cannot be.
    """
    if config.model_type not in MODEL_TYPES:
        raise Refused(f"model_type: {config.model_type}, wanted one of {', '.join(MODEL_TYPES)}")
    heads = config.num_attention_heads
    groups = config.num_key_value_heads
    rope = config.rope_parameters
    window = getattr(config, "sliding_window", None)
    faults = (
        (config.hidden_act != "silu", f"hidden_act: {config.hidden_act}, wanted silu"),
        (rope["rope_type"] != "default", f"rope_parameters: rope_type {rope['rope_type']}, wanted default"),
        (
            getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False),
            "attention_bias, mlp_bias: wanted false",
        ),
        (
            window and window < seq_length and getattr(config, "use_sliding_window", True),
            f"sliding_window: {window} is less than the {seq_length} tokens of a block",
        ),
        (
            config.num_hidden_layers % pipeline,
            f"--pipeline-parallel {pipeline} does not divide {config.num_hidden_layers} layers",
        ),
        (groups % tensor, f"--tensor-parallel {tensor} does not divide {groups} key-value heads"),
    )
    for wrong, fault in faults:
        if wrong:
            raise Refused(f"not to be handed to Megatron-LM: {fault}")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    found = {
        "--num-layers": config.num_hidden_layers,
        "--hidden-size": config.hidden_size,
        "--ffn-hidden-size": config.intermediate_size,
        "--num-attention-heads": heads,
        "--kv-channels": head_dim,
        "--group-query-attention": None,
        "--num-query-groups": groups,
        "--max-position-embeddings": config.max_position_embeddings,
        "--seq-length": seq_length,
        "--position-embedding-type": "rope",
        "--rotary-base": int(rope["rope_theta"]),
        "--normalization": "RMSNorm",
        "--norm-epsilon": config.rms_norm_eps,
        "--swiglu": None,
        "--disable-bias-linear": None,
        "--attention-dropout": config.attention_dropout,
        "--hidden-dropout": 0.0,
        "--init-method-std": config.initializer_range,
        "--make-vocab-size-divisible-by": VOCABULARY_MULTIPLE,
        "--tensor-model-parallel-size": tensor,
        "--pipeline-model-parallel-size": pipeline,
    }
    if config.model_type == "qwen3":
        found["--qk-layernorm"] = None
    if not config.tie_word_embeddings:
        found["--untie-embeddings-and-output-weights"] = None
    return {name: None if value is None else str(value) for name, value in found.items()}


def data_arguments(tokenizer: Path, tokens: Path) -> dict[str, str | None]:
    """Megatron-LM's arguments for the tokenizer and the token files, documents kept apart as in stage 05."""
    return {
        "--tokenizer-type": "HuggingFaceTokenizer",
        "--tokenizer-model": str(tokenizer),
        "--train-data-path": str(tokens / "train"),
        "--valid-data-path": str(tokens / "valid"),
        "--reset-position-ids": None,
        "--reset-attention-mask": None,
        "--eod-mask-loss": None,
    }


def check_tokens(prefix: Path, vocab_size: int) -> tuple[int, int]:
    """(documents, tokens) of a token file, read by megatron-core's reader and compared with ours.

    The lengths of all documents are compared, and the ids of the first and the last thousand. Raises
    RecipeError where they differ; ImportError without megatron-core.
    """
    import numpy as np
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    theirs, ours = IndexedDataset(str(prefix)), TokenFile(prefix)
    if not np.array_equal(theirs.sequence_lengths, ours.lengths):
        raise RecipeError(f"{prefix}: megatron-core reads other documents. Run stage 04 with --force")
    count = ours.documents
    for number in sorted({*range(min(count, 1000)), *range(max(0, count - 1000), count)}):
        ids = theirs[number]
        wanted = ours.tokens[ours.first_token(number) : ours.first_token(number + 1)]
        if not np.array_equal(ids, wanted) or (len(ids) and ids.max() >= vocab_size):
            raise RecipeError(
                f"{prefix}: document {number} has other ids for megatron-core, or ids beyond the "
                f"{vocab_size} of the vocabulary. Run stage 04 with --force"
            )
    return count, len(ours.tokens)


def expected_weights(config: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Hugging Face folder's weights from which Megatron-LM's model is made."""
    hidden, inner, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    head_dim = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    queries, keys = (head_dim * n for n in (config.num_attention_heads, config.num_key_value_heads))
    per_layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    if config.model_type == "qwen3":
        per_layer |= {"self_attn.q_norm": (head_dim,), "self_attn.k_norm": (head_dim,)}
    shapes = {
        f"model.layers.{layer}.{name}.weight": shape
        for layer in range(config.num_hidden_layers)
        for name, shape in per_layer.items()
    }
    shapes |= {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def check_weights(folder: Path, config: Any) -> int:
    """The number of weights in a Hugging Face folder; Refused unless it holds exactly `expected_weights`."""
    from safetensors import safe_open

    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (no mapping)
                found[name] = tuple(weights.get_slice(name).get_shape())
    wanted = expected_weights(config)
    wrong = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    if wrong:
        name = wrong[0]
        raise Refused(
            f"{folder}: {len(wrong)} weights are not those of model.json's model, such as {name}: "
            f"{found.get(name, 'missing')}, wanted {wanted.get(name, 'none')}"
        )
    return len(found)


def _hand_over(recipe: str, overrides: list[str], tensor: int, pipeline: int) -> None:
    from transformers import AutoConfig, AutoTokenizer

    config = load_recipe(recipe, overrides)
    tokenizer, tokens = stage_folder(recipe, "03_tokenizer"), stage_folder(recipe, "04_tokenize")
    if not (tokens / "stage.json").exists():
        raise Refused(f"{tokens}: missing. Run `bash run_all.sh --recipe {recipe} --to 04`")
    vocab_size = len(AutoTokenizer.from_pretrained(tokenizer))
    values = model_values(config)
    if "model_type" not in values:
        raise Refused(
            f"{config['pretrain']['initial_model']}: its config.json was not fetched yet. Run "
            f"`bash pretrain/05_pretrain.sh --recipe {recipe}` first, or give the path of a folder"
        )
    rows = max(vocab_size, values.get("vocab_size", 0))  # a published checkpoint may have more than pieces
    model = AutoConfig.for_model(values.pop("model_type"), **values | {"vocab_size": rows})
    pretrain = config["pretrain"]
    arguments = arguments_for(model, pretrain["block_size"], tensor, pipeline)
    arguments |= {"--global-batch-size": str(pretrain["global_batch_size"])}
    arguments |= data_arguments(tokenizer, tokens)
    multiple = VOCABULARY_MULTIPLE * tensor
    notes = [f"vocabulary: {vocab_size:,} ids, {-(-vocab_size // multiple) * multiple:,} rows"]
    for side in ("train", "valid"):
        try:
            documents, count = check_tokens(tokens / side, vocab_size)
            notes.append(f"{side}: megatron-core reads {documents:,} documents, {count:,} tokens, as we do")
        except ImportError:
            notes.append(f"{side}: not checked, because megatron-core is not installed")
    if any(source.get("weight", 1) != 1 for source in config["dataset"]["sources"].values()):
        notes.append("the weights of sources (dataset.json) are not handed over: one file holds every source")
    trained = stage_folder(recipe, "05_pretrain")
    if (trained / "stage.json").exists():
        where = f"hf_model_id={str(trained)!r}, megatron_path='CHECKPOINT'"
        notes += [
            f"stage 05: {check_weights(trained, model)} weights, by name and shape those of such a model. To",
            "start from them convert them with Megatron Bridge, and add `--load CHECKPOINT`:",
            f'  python -c "from megatron.bridge import AutoBridge; AutoBridge.import_ckpt({where})"',
        ]
    print("\n".join(notes), file=sys.stderr)
    print(
        "\n".join(
            name if value is None else f"{name} {shlex.quote(value)}" for name, value in arguments.items()
        )
    )


def main() -> None:
    """Print the arguments of a recipe; exit 2 with the reason when it cannot be handed over."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="FILE.KEY=VALUE")
    parser.add_argument("--tensor-parallel", type=int, default=1, metavar="T")
    parser.add_argument("--pipeline-parallel", type=int, default=1, metavar="P")
    arguments = parser.parse_args()
    try:
        _hand_over(
            arguments.recipe, arguments.overrides, arguments.tensor_parallel, arguments.pipeline_parallel
        )
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
