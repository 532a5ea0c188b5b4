"""The arguments of Megatron-LM for a recipe, for models that need pipeline parallelism.

    python -m recipe.export.megatron --recipe NAME [--tensor-parallel T] [--pipeline-parallel P]

Standard output has the arguments of Megatron-LM's pretrain_gpt.py for the model, the tokenizer and the token
files of the recipe, ready for its command line. Standard error says what was checked, and how to convert the
weights of stage 05. The token files of stage 04 already have Megatron-LM's format.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

from recipe.config.model import model_values
from recipe.config.recipe import load_recipe, recipe_options
from recipe.project import RecipeError, Refused, stage_folder
from recipe.tokenization.token_files import TokenFile

# The architectures that the GPT model of Megatron-LM supports.
MODEL_TYPES = ("llama", "mistral", "qwen3")
# Megatron-LM's default: the rows of the embedding are padded to a multiple of this, on each rank.
VOCABULARY_MULTIPLE = 128


def arguments_for(config: Any, seq_length: int, tensor: int = 1, pipeline: int = 1) -> dict[str, str | None]:
    """Megatron-LM's arguments for a Hugging Face model config; a flag has the value None.

    seq_length: tokens per block. tensor, pipeline: ranks of tensor and pipeline parallelism. Raises Refused
    for a model or a number of ranks that Megatron-LM does not support.
    """
    _check_supported(config, seq_length, tensor, pipeline)
    heads, rope = config.num_attention_heads, config.rope_parameters
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    arguments = {
        "--num-layers": config.num_hidden_layers,
        "--hidden-size": config.hidden_size,
        "--ffn-hidden-size": config.intermediate_size,
        "--num-attention-heads": heads,
        "--kv-channels": head_dim,
        "--group-query-attention": None,
        "--num-query-groups": config.num_key_value_heads,
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
        arguments["--qk-layernorm"] = None
    if not config.tie_word_embeddings:
        arguments["--untie-embeddings-and-output-weights"] = None
    return {name: None if value is None else str(value) for name, value in arguments.items()}


def _check_supported(config: Any, seq_length: int, tensor: int, pipeline: int) -> None:
    if config.model_type not in MODEL_TYPES:
        raise Refused(f"model_type: {config.model_type}, expected one of {', '.join(MODEL_TYPES)}")
    rope, groups = config.rope_parameters, config.num_key_value_heads
    window = getattr(config, "sliding_window", None)
    faults = (
        (config.hidden_act != "silu", f"hidden_act: {config.hidden_act}, expected silu"),
        (rope["rope_type"] != "default", f"rope_parameters: rope_type {rope['rope_type']}, expected default"),
        (
            getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False),
            "attention_bias, mlp_bias: true, expected false",
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
            raise Refused(f"Megatron-LM cannot train this recipe: {fault}")


def data_arguments(tokenizer: Path, tokens: Path) -> dict[str, str | None]:
    """Megatron-LM's arguments for tokenizer and token files; documents are separated as in stage 05."""
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
    """Read a token file with megatron-core's reader and with ours; returns (documents, tokens).

    Compares the lengths of all documents, and the ids of the first and the last thousand. Raises RecipeError
    when they differ, ImportError without megatron-core.
    """
    import numpy as np
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    theirs, ours = IndexedDataset(str(prefix)), TokenFile(prefix)
    if not np.array_equal(theirs.sequence_lengths, ours.lengths):
        raise RecipeError(
            f"{prefix}: megatron-core reads documents of other lengths. Run stage 04 with --force"
        )
    count = ours.documents
    for number in sorted({*range(min(count, 1000)), *range(max(0, count - 1000), count)}):
        ids = theirs[number]
        expected = ours.tokens[ours.first_token(number) : ours.first_token(number + 1)]
        if not np.array_equal(ids, expected) or (len(ids) and ids.max() >= vocab_size):
            raise RecipeError(
                f"{prefix}: document {number} has other ids in megatron-core, or ids beyond the "
                f"{vocab_size} of the vocabulary. Run stage 04 with --force"
            )
    return count, len(ours.tokens)


def expected_weights(config: Any) -> dict[str, tuple[int, ...]]:
    """The weights of a Hugging Face folder that Megatron-LM's model is made from: shapes by name."""
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
    """The number of weights in a Hugging Face folder; raises Refused unless they are `expected_weights`."""
    from safetensors import safe_open

    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (not a mapping)
                found[name] = tuple(weights.get_slice(name).get_shape())
    expected = expected_weights(config)
    wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    if wrong:
        name = wrong[0]
        raise Refused(
            f"{folder}: {len(wrong)} weights differ from the model of model.json, such as {name}: "
            f"{found.get(name, 'missing')}, expected {expected.get(name, 'none')}. Run stage 05 with --force"
        )
    return len(found)


def _hand_over(recipe: str, overrides: list[str], tensor: int, pipeline: int) -> None:
    """Print the arguments, and on standard error what was checked."""
    from recipe.tokenization.save import load_tokenizer

    config = load_recipe(recipe, overrides)
    tokenizer, tokens = stage_folder(recipe, "03_tokenizer"), stage_folder(recipe, "04_tokenize")
    if not (tokens / "stage.json").exists():
        raise Refused(f"{tokens}: missing. Run `bash run_all.sh --recipe {recipe} --to 04`")
    if config["pretrain"].get("phases"):
        raise Refused(
            f"configs/{recipe}/pretrain.json: phases: Megatron-LM has no such phases. Give --set "
            "pretrain.phases=null, and start Megatron-LM once for each phase"
        )
    vocab_size = len(load_tokenizer(tokenizer))
    model = _model_config(recipe, config, vocab_size)
    pretrain = config["pretrain"]
    arguments = arguments_for(model, pretrain["block_size"], tensor, pipeline)
    arguments |= {"--global-batch-size": str(pretrain["global_batch_size"])}
    arguments |= data_arguments(tokenizer, tokens)
    multiple = VOCABULARY_MULTIPLE * tensor
    notes = [f"vocabulary: {vocab_size:,} ids, {-(-vocab_size // multiple) * multiple:,} rows"]
    notes += [_token_note(tokens / side, vocab_size) for side in ("train", "valid")]
    if any(source.get("weight", 1) != 1 for source in config["dataset"]["sources"].values()):
        notes.append(
            "Megatron-LM does not use the weights of sources (dataset.json): one file has all sources"
        )
    notes += _weight_notes(stage_folder(recipe, "05_pretrain"), model)
    print("\n".join(notes), file=sys.stderr)
    lines = [name if value is None else f"{name} {shlex.quote(value)}" for name, value in arguments.items()]
    print("\n".join(lines))


def _model_config(recipe: str, config: dict[str, dict[str, Any]], vocab_size: int) -> Any:
    """The model of a recipe as a Hugging Face config."""
    from transformers import AutoConfig

    values = model_values(config)
    if "model_type" not in values:
        raise Refused(
            f"{config['pretrain']['initial_model']}: its config.json was not fetched yet. Run "
            f"`bash pretrain/05_pretrain.sh --recipe {recipe}` first, or give the path of a folder"
        )
    # A published checkpoint may have more rows than its tokenizer has tokens.
    rows = max(vocab_size, values.get("vocab_size", 0))
    return AutoConfig.for_model(values.pop("model_type"), **values | {"vocab_size": rows})


def _token_note(prefix: Path, vocab_size: int) -> str:
    try:
        documents, count = check_tokens(prefix, vocab_size)
    except ImportError:
        return f"{prefix.name}: not checked, because megatron-core is not installed"
    return f"{prefix.name}: megatron-core reads the same {documents:,} documents, {count:,} tokens"


def _weight_notes(trained: Path, model: Any) -> list[str]:
    if not (trained / "stage.json").exists():
        return []
    arguments = f"hf_model_id={str(trained)!r}, megatron_path='CHECKPOINT'"
    return [
        f"stage 05: {check_weights(trained, model)} weights have the expected names and shapes. To start",
        "from them, convert them with Megatron Bridge and add `--load CHECKPOINT`:",
        f'  python -c "from megatron.bridge import AutoBridge; AutoBridge.import_ckpt({arguments})"',
    ]


def main() -> None:
    """Print the arguments for a recipe; exit 2 with the reason when Megatron-LM does not support it."""
    parser = recipe_options(__doc__)
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
