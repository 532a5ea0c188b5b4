"""The arguments of Megatron-LM for a recipe, for models that need pipeline parallelism.

    python -m recipe.export.megatron --recipe NAME [--tensor-parallel T] [--pipeline-parallel P]

Standard output has the arguments of Megatron-LM's pretrain_gpt.py for the model, the training, the tokenizer
and the token files of the recipe, ready for its command line. Standard error says what was checked, what
differs, and how to convert the weights of stage 05 (`recipe.export.megatron_weights`). The token files of
stage 04 already have Megatron-LM's format. The names are those of its release core_v0.16.1.
"""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recipe.config.launch import batch_layout
from recipe.config.model import model_values
from recipe.config.optimizers import DEFAULT, OPTIMIZERS, optimizer_name
from recipe.config.recipe import load_recipe, recipe_options
from recipe.config.training import steps_of_epochs
from recipe.endings import errors_in_one_line
from recipe.project import RecipeError, Refused, is_finished, stage_folder
from recipe.tokenization.packing import PackedBlocks
from recipe.tokenization.token_files import TokenFile

# The architectures that the GPT model of Megatron-LM supports.
MODEL_TYPES = ("llama", "mistral", "qwen3", "gpt2")
# GPT-2's activations, and the flags that select them. Megatron-LM's kernel that adds the bias approximates
# GELU by tanh.
GELUS = {"gelu_new": {}, "gelu_pytorch_tanh": {}, "gelu": {"--no-bias-gelu-fusion": None}}
# lr_scheduler_type -> --lr-decay-style
STYLES = {
    "linear": "linear",
    "polynomial": "linear",
    "cosine": "cosine",
    "cosine_with_min_lr": "cosine",
    "cosine_with_restarts": "cosine",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "inverse_sqrt": "inverse-square-root",
    "warmup_stable_decay": "WSD",
}
# decay_type of warmup_stable_decay -> --lr-wsd-decay-style
DECAYS = {"cosine": "cosine", "linear": "linear", "1-sqrt": "minus_sqrt"}
# Megatron-LM's default: the rows of the embedding are padded to a multiple of this, on each rank.
VOCABULARY_MULTIPLE = 128


def arguments_for(config: Any, seq_length: int, tensor: int = 1, pipeline: int = 1) -> dict[str, str | None]:
    """Megatron-LM's arguments for a Hugging Face model config; a flag has the value None.

    seq_length: tokens per block. tensor, pipeline: ranks of tensor and pipeline parallelism. Raises Refused
    for a model or a number of ranks that Megatron-LM does not support.
    """
    _check_supported(config, seq_length, tensor, pipeline)
    arguments: dict[str, Any] = {
        "--num-layers": config.num_hidden_layers,
        "--hidden-size": config.hidden_size,
        "--num-attention-heads": config.num_attention_heads,
        "--kv-channels": _head_dim(config),
        "--max-position-embeddings": config.max_position_embeddings,
        "--seq-length": seq_length,
        "--init-method-std": config.initializer_range,
        "--padded-vocab-size": padded_vocabulary(config.vocab_size, tensor),
        "--tensor-model-parallel-size": tensor,
        "--pipeline-model-parallel-size": pipeline,
    }
    arguments |= _gpt2_arguments(config) if config.model_type == "gpt2" else _llama_arguments(config)
    if not config.tie_word_embeddings:
        arguments["--untie-embeddings-and-output-weights"] = None
    return {name: None if value is None else str(value) for name, value in arguments.items()}


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _intermediate_size(config: Any) -> int:
    return (config.n_inner or 4 * config.n_embd) if config.model_type == "gpt2" else config.intermediate_size


def _llama_arguments(config: Any) -> dict[str, Any]:
    arguments = {
        "--ffn-hidden-size": _intermediate_size(config),
        "--group-query-attention": None,
        "--num-query-groups": config.num_key_value_heads,
        "--position-embedding-type": "rope",
        "--rotary-base": int(config.rope_parameters["rope_theta"]),
        "--normalization": "RMSNorm",
        "--norm-epsilon": config.rms_norm_eps,
        "--swiglu": None,
        "--disable-bias-linear": None,
        "--attention-dropout": config.attention_dropout,
        "--hidden-dropout": 0.0,
    }
    return arguments | ({"--qk-layernorm": None} if config.model_type == "qwen3" else {})


def _gpt2_arguments(config: Any) -> dict[str, Any]:
    return {
        "--ffn-hidden-size": _intermediate_size(config),
        "--position-embedding-type": "learned_absolute",
        "--normalization": "LayerNorm",
        "--norm-epsilon": config.layer_norm_epsilon,
        "--attention-dropout": config.attn_pdrop,
        "--hidden-dropout": config.resid_pdrop,
    } | GELUS[config.activation_function]


def _check_supported(config: Any, seq_length: int, tensor: int, pipeline: int) -> None:
    if config.model_type not in MODEL_TYPES:
        raise Refused(f"model_type: {config.model_type}, expected one of {', '.join(MODEL_TYPES)}")
    window = getattr(config, "sliding_window", None)
    if config.model_type == "gpt2":
        activation = config.activation_function
        faults = [
            (activation not in GELUS, f"activation_function: {activation}, expected {', '.join(GELUS)}"),
            (
                config.embd_pdrop != config.resid_pdrop,
                f"embd_pdrop {config.embd_pdrop} and resid_pdrop {config.resid_pdrop}: expected the same",
            ),
            (
                not config.scale_attn_weights
                or config.scale_attn_by_inverse_layer_idx
                or config.add_cross_attention,
                "scale_attn_weights, scale_attn_by_inverse_layer_idx, add_cross_attention: expected the "
                "defaults",
            ),
            (
                seq_length > config.n_positions,
                f"block_size: {seq_length} tokens are more than n_positions, {config.n_positions}",
            ),
        ]
    else:
        rope = config.rope_parameters
        theta = rope["rope_theta"]
        faults = [
            (config.hidden_act != "silu", f"hidden_act: {config.hidden_act}, expected silu"),
            (
                rope["rope_type"] != "default",
                f"rope_parameters: rope_type {rope['rope_type']}, expected default",
            ),
            (theta != int(theta), f"rope_parameters: rope_theta {theta}, expected a whole number"),
            (
                getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False),
                "attention_bias, mlp_bias: true, expected false",
            ),
            (
                window and window < seq_length and getattr(config, "use_sliding_window", True),
                f"sliding_window: {window} is less than the {seq_length} tokens of a block",
            ),
        ]
    for wrong, fault in faults:
        if wrong:
            raise Refused(f"Megatron-LM cannot train this recipe: {fault}")
    check_parallelism(config, tensor, pipeline)


def check_parallelism(config: Any, tensor: int, pipeline: int) -> None:
    """Raise Refused unless the ranks divide the model's layers, key-value heads and intermediate size."""
    groups = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    layers, width = config.num_hidden_layers, _intermediate_size(config)
    if tensor < 1 or pipeline < 1:
        fault = f"--tensor-parallel {tensor}, --pipeline-parallel {pipeline}: expected 1 or more"
    elif layers % pipeline:
        fault = f"--pipeline-parallel {pipeline} does not divide {layers} layers"
    elif groups % tensor:
        fault = f"--tensor-parallel {tensor} does not divide {groups} key-value heads"
    elif width % tensor:
        fault = f"--tensor-parallel {tensor} does not divide the intermediate size {width}"
    else:
        return
    raise Refused(f"Megatron-LM cannot train this recipe: {fault}")


def padded_vocabulary(vocab_size: int, tensor: int) -> int:
    """The rows of Megatron-LM's embedding over all tensor parallel ranks."""
    multiple = VOCABULARY_MULTIPLE * tensor
    return -(-vocab_size // multiple) * multiple


def training_arguments(values: Mapping[str, Any], steps: int) -> dict[str, str | None]:
    """Megatron-LM's arguments for the values of pretrain.json: optimizer, schedule, batches, precision.

    steps: of the whole run. Where neither bf16 nor fp16 is written, it is bf16. Raises Refused for what
    Megatron-LM would not train in the same way.
    """
    from transformers import TrainingArguments

    given, fields = values, TrainingArguments.__dataclass_fields__
    _check_training(given, steps)
    values = {key: field.default for key, field in fields.items()} | dict(given)
    rate = values["learning_rate"]
    global_batch = values["global_batch_size"]
    micro_batch, _ = batch_layout(global_batch, values["per_device_train_batch_size"], 1)
    arguments: dict[str, Any] = {
        "--micro-batch-size": micro_batch,
        "--global-batch-size": global_batch,
        "--train-iters": steps,
        "--optimizer": "adam",
        "--adam-beta1": values["adam_beta1"],
        "--adam-beta2": values["adam_beta2"],
        "--adam-eps": values["adam_epsilon"],
        "--weight-decay": values["weight_decay"],
        "--clip-grad": values["max_grad_norm"],
        "--lr": rate,
        "--lr-decay-iters": steps,
        "--lr-warmup-iters": warm_up(values, steps),
        "--seed": values["seed"],
        "--log-interval": _interval(values["logging_steps"], steps),
        "--eval-interval": _interval(values["eval_steps"] or values["logging_steps"], steps),
        "--eval-iters": max(1, math.ceil((values.get("eval_blocks") or 100 * global_batch) / global_batch)),
        "--save-interval": _interval(values["save_steps"], steps),
        "--ckpt-format": "torch",
    }
    arguments |= _schedule_arguments(given, rate)
    if given.get("fp16"):
        arguments["--fp16"] = None
    elif given.get("bf16") is not False:
        arguments["--bf16"] = None
    return {name: None if value is None else str(value) for name, value in arguments.items()}


def warm_up(values: Mapping[str, Any], steps: int) -> int:
    """The steps of the warm-up; a number below 1 in `values` is a share of all steps, rounded up."""
    given = values.get("warmup_steps") or 0
    return math.ceil(given * steps) if given < 1 else int(given)


def _interval(given: float, steps: int) -> int:
    return max(1, math.ceil(given * steps)) if given < 1 else int(given)


def _schedule_arguments(values: Mapping[str, Any], rate: float) -> dict[str, Any]:
    kind, options = values.get("lr_scheduler_type", "linear"), values.get("lr_scheduler_kwargs") or {}
    arguments: dict[str, Any] = {"--lr-decay-style": STYLES[kind], "--min-lr": 0.0}
    if kind == "polynomial":
        arguments["--min-lr"] = options.get("lr_end", 1e-7)
    if kind == "cosine_with_min_lr":
        share = options.get("min_lr_rate")
        arguments["--min-lr"] = options["min_lr"] if share is None else share * rate
    if kind == "warmup_stable_decay":
        floor = options.get("min_lr_ratio", 0.0) * rate
        arguments |= {
            "--min-lr": floor,
            "--lr-warmup-init": floor,
            "--lr-wsd-decay-style": DECAYS[options.get("decay_type", "cosine")],
            "--lr-wsd-decay-iters": options["num_decay_steps"],
        }
    return arguments


def _check_training(values: Mapping[str, Any], steps: int) -> None:
    """Raise Refused for a key that Megatron-LM has no argument for, with the way out."""
    kind, options = values.get("lr_scheduler_type", "linear"), values.get("lr_scheduler_kwargs") or {}
    optimizer = OPTIMIZERS[optimizer_name(values)]
    shape = "lr_scheduler_kwargs: Megatron-LM has only"
    faults = (
        (
            values.get("muon_learning_rate"),
            "muon_learning_rate: Muon is another one there. Give --set pretrain.muon_learning_rate=null",
        ),
        (optimizer.reported != "AdamW", f"optim: {values.get('optim')}. Give --set pretrain.optim={DEFAULT}"),
        (values.get("z_loss"), "z_loss: there is none. Give --set pretrain.z_loss=0"),
        (
            values.get("fp8"),
            "fp8: Megatron-LM's is another one (--fp8-format). Give --set pretrain.fp8=false",
        ),
        (
            values.get("neftune_noise_alpha"),
            "neftune_noise_alpha: there is none. Give --set pretrain.neftune_noise_alpha=null",
        ),
        (
            values.get("phases"),
            "phases: there are none. Give --set pretrain.phases=null, and start Megatron-LM once for each",
        ),
        (
            kind not in STYLES,
            f"lr_scheduler_type: {kind}, expected one of {', '.join(STYLES)}",
        ),
        (
            kind in ("cosine", "cosine_with_min_lr", "warmup_stable_decay")
            and options.get("num_cycles", 0.5) != 0.5,
            f"{shape} half a cosine",
        ),
        (kind == "cosine_with_restarts" and options.get("num_cycles", 1) != 1, f"{shape} one cosine"),
        (kind == "polynomial" and options.get("power", 1.0) != 1, f"{shape} the power 1"),
        (options.get("warmup_type", "linear") != "linear", f"{shape} a linear warm-up"),
        (
            kind == "inverse_sqrt" and (options.get("timescale") or not values.get("warmup_steps")),
            f"{shape} inverse_sqrt with the warm-up as time scale: set warmup_steps, leave timescale out",
        ),
        (
            warm_up(values, steps) >= steps,
            f"warmup_steps: {warm_up(values, steps)}, expected fewer than the {steps} steps of the run",
        ),
    )
    for wrong, fault in faults:
        if wrong:
            raise Refused(f"Megatron-LM cannot train this recipe in the same way: pretrain.json: {fault}")


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
    """The weights that a Hugging Face folder of a model holds: shapes by name."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tied = set(model.all_tied_weights_keys)
    return {name: tuple(weight.shape) for name, weight in model.named_parameters() if name not in tied}


def check_weights(folder: Path, config: Any) -> int:
    """The number of weights in a Hugging Face folder.

    Raises Refused unless they have the names and the shapes of the model of `config`.
    """
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
    if not is_finished(tokens):
        raise Refused(f"{tokens}: missing. Run `bash run_all.sh --recipe {recipe} --to 04`")
    vocab_size = len(load_tokenizer(tokenizer))
    model = _model_config(recipe, config, vocab_size)
    pretrain = config["pretrain"]
    arguments = arguments_for(model, pretrain["block_size"], tensor, pipeline)
    arguments |= training_arguments(pretrain, _steps(pretrain, tokens / "train"))
    arguments |= data_arguments(tokenizer, tokens)
    notes = [f"vocabulary: {vocab_size:,} ids, {padded_vocabulary(vocab_size, tensor):,} rows"]
    notes += _differences(pretrain, model)
    notes += [_token_note(tokens / side, vocab_size) for side in ("train", "valid")]
    if any(source.get("weight", 1) != 1 for source in config["dataset"]["sources"].values()):
        notes.append(
            "Megatron-LM does not use the weights of sources (dataset.json): one file has all sources"
        )
    notes += _weight_notes(stage_folder(recipe, "05_pretrain"), model, tensor, pipeline)
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


def _steps(values: Mapping[str, Any], train: Path) -> int:
    """The optimizer steps of stage 05, where no source has a weight."""
    if values.get("max_steps", -1) > 0:
        return values["max_steps"]
    blocks = len(PackedBlocks(TokenFile(train), values["block_size"], 0, 0))
    return steps_of_epochs(values.get("num_train_epochs", 3), blocks, values["global_batch_size"])


def _differences(values: Mapping[str, Any], model: Any) -> list[str]:
    """What Megatron-LM does in another way, whatever its arguments."""
    notes = [
        "Megatron-LM applies weight decay also to the embeddings, reads the samples in another order, and "
        "starts its embedding's unused rows like the others"
    ]
    if model.model_type != "gpt2":
        notes.append(
            "Megatron-LM divides --init-method-std by the square root of twice the layers for the matrices "
            "that write to the residual stream: to begin with the weights of stage 05's seed, convert a model"
        )
    if not values.get("fp16") and values.get("bf16") is None:
        notes.append("pretrain.json leaves the precision open: the arguments say --bf16")
    if values.get("spikes") is not None:
        notes.append("Megatron-LM has no rule for spikes")
    return notes


def _weight_notes(trained: Path, model: Any, tensor: int, pipeline: int) -> list[str]:
    if not is_finished(trained):
        return []
    ranks = f"--tensor-parallel {tensor} --pipeline-parallel {pipeline}"
    convert = "python -m recipe.export.megatron_weights"
    return [
        f"stage 05: {check_weights(trained, model)} weights have the expected names and shapes. To start",
        "from them, and to bring the trained weights back:",
        f"  {convert} to {trained} CHECKPOINT {ranks}",
        f"  {convert} from CHECKPOINT {trained} NEW_FOLDER",
    ]


def main() -> None:
    """Print the arguments for a recipe; exit 2 with the reason when Megatron-LM does not support it."""
    parser = recipe_options(__doc__)
    parser.add_argument("--tensor-parallel", type=int, default=1, metavar="T")
    parser.add_argument("--pipeline-parallel", type=int, default=1, metavar="P")
    arguments = parser.parse_args()
    with errors_in_one_line("megatron"):
        _hand_over(
            arguments.recipe, arguments.overrides, arguments.tensor_parallel, arguments.pipeline_parallel
        )


if __name__ == "__main__":
    main()
