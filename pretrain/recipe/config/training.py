"""The keys of pretrain.json, finetune.json and preference.json that every training reads, with checks."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Mapping
from typing import Any

from recipe.config.choice import AttentionNeeds
from recipe.config.keys import ELSEWHERE, check_keys, is_type, known_keys, require, show
from recipe.config.known_keys import fields_of
from recipe.config.model import attention_heads, model_values, sliding_window, with_defaults
from recipe.config.optimizers import MUON, OPTIMIZERS, optimizer_name
from recipe.config.phases import longest_block
from recipe.config.ranges import (
    ABOVE_0,
    ABOVE_0_TO_1,
    ABOVE_0_TO_100,
    BELOW_1,
    FROM_0,
    FROM_0_TO_1,
    FROM_0_TO_100,
    FROM_1,
    POSITIONS,
    SEED,
    STEPS_OR_SHARE,
    Range,
    check_ranges,
    one_of,
    whole,
)
from recipe.config.schedules import check_schedule
from recipe.config.settings import Settings, SpikeRule
from recipe.config.staleness import TRAINING_FILES
from recipe.hardware import FLASH_ATTENTION
from recipe.project import Refused, nearest

# The keys of ours with their JSON types: those of every training file; in pretrain.json also the published
# checkpoint to start from, phases, and fp8; in finetune.json and preference.json also an adapter.
SETTINGS = fields_of(Settings)
PRETRAINING = {key: SETTINGS[key] for key in ("initial_model", "initial_revision", "phases", "fp8")}
TUNING = {"lora": SETTINGS["lora"]}
TRAINING = {key: types for key, types in SETTINGS.items() if key not in PRETRAINING | TUNING}
# The keys of `lora`, by LoraConfig's names.
LORA = {
    "r": "int",
    "lora_alpha": "int|float",
    "lora_dropout": "float",
    "target_modules": "str|list",
    "use_rslora": "bool",
    "quantization": "str|null",
}
# The keys of `activation_checkpointing_kwargs`: two of transformers' activation_checkpointing_enable, and two
# of torch.utils.checkpoint.
CHECKPOINTING = {
    "every_n_layers": "int",
    "offload": "bool",
    "use_reentrant": "bool",
    "preserve_rng_state": "bool",
}
# How often a training may go over its data, and who found that.
REPEATS = {
    "pretrain": (4, "Muennighoff et al., 2023, arXiv:2305.16264"),
    "finetune": (15, "Zhou et al., 2023, arXiv:2305.11206"),
}
# Native keys that would change what a recipe says, or that nothing here reads, and why.
UNFIT = {
    "label_smoothing_factor": "the Trainer's smoothing would shift the labels a second time",
    "auto_find_batch_size": "it would silently change the global batch; set per_device_train_batch_size",
    "load_best_model_at_end": "the model of the last step is what later stages expect",
    "metric_for_best_model": "the model of the last step is what later stages expect",
    "greater_is_better": "the model of the last step is what later stages expect",
    "bf16_full_eval": "the weights that are saved would be rounded to bf16",
    "fp16_full_eval": "the weights that are saved would be rounded to fp16",
    "dataloader_drop_last": "the last blocks of the validation side would not be measured",
    "batch_eval_metrics": "an evaluation measures the loss and nothing else",
    "include_for_metrics": "an evaluation measures the loss and nothing else",
    "eval_use_gather_object": "an evaluation measures the loss and nothing else",
    "length_column_name": "all samples have one length, and seed decides their order",
    "label_names": "the labels are those of packed blocks",
    "restore_callback_states_from_checkpoint": "the stage restores what its own callbacks need",
    "optim_args": "none of the optimizers that can be chosen here reads it",
    "optim_target_modules": "none of the optimizers that can be chosen here reads it",
}
# Keys that do nothing unless another key has one of these values; with the default of that other key.
NEEDS = {
    "eval_steps": ("eval_strategy", ("steps",), "no"),
    "eval_delay": ("eval_strategy", ("steps",), "no"),
    "save_steps": ("save_strategy", ("steps",), "steps"),
    "logging_steps": ("logging_strategy", ("steps",), "steps"),
    "liger_kernel_config": ("use_liger_kernel", (True,), False),
    "torch_compile_mode": ("torch_compile", (True,), None),
    "torch_compile_backend": ("torch_compile", (True,), None),
}
ATTENTION = (
    *("auto", "documents", "varlen", "sdpa", "eager", "flex_attention"),
    *(f"flash_attention_{version}" for version in FLASH_ATTENTION),
)
_LEVELS = one_of("debug", "info", "warning", "error", "critical", "passive", "detail")
_BETA = Range("at least 0 and at most 0.99999", lambda x: 0 <= x <= 0.99999)
RANGES = {
    "learning_rate": FROM_0_TO_100,
    # null, not 0, leaves Muon out, or gives the embeddings the rate of the rest.
    **dict.fromkeys(("muon_learning_rate", "embedding_learning_rate"), ABOVE_0_TO_100),
    "weight_decay": FROM_0_TO_100,
    "adam_epsilon": FROM_0_TO_1,
    **dict.fromkeys(("max_grad_norm", "eval_delay", "neftune_noise_alpha"), FROM_0),
    "dataloader_num_workers": whole(0, 1024),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), _BETA),
    **dict.fromkeys(("logging_steps", "save_steps", "eval_steps"), STEPS_OR_SHARE),
    "warmup_steps": Range(
        "0, a share of the steps below 1, or a whole number of steps",
        lambda x: 0 <= x < 1 or x == x // 1 >= 1,
    ),
    "max_steps": Range(
        "1 or more, at most 1,000,000,000 (or -1: by num_train_epochs)", lambda x: 1 <= x <= 10**9 or x == -1
    ),
    "num_train_epochs": ABOVE_0,
    **dict.fromkeys(
        ("global_batch_size", "per_device_train_batch_size", "per_device_eval_batch_size"), whole(1, 2**24)
    ),
    **dict.fromkeys(("eval_blocks", "eval_accumulation_steps"), FROM_1),
    **dict.fromkeys(("save_total_limit", "torch_empty_cache_steps", "dataloader_prefetch_factor"), FROM_1),
    **dict.fromkeys(("ddp_bucket_cap_mb", "ddp_timeout"), FROM_1),
    "block_size": POSITIONS,
    "seed": SEED,
    "z_loss": Range("0 or more (PaLM used 1e-4)", lambda x: x >= 0),
    "attn_implementation": one_of(*ATTENTION),
    "extend": one_of("rewarm"),
    "log_level": _LEVELS,
    "log_level_replica": _LEVELS,
    "ddp_backend": one_of("nccl", "gloo", "mpi", "ccl", "hccl", "cncl", "mccl"),
    "dataloader_multiprocessing_context": one_of("fork", "spawn", "forkserver"),
    "debug": Range("underflow_overflow or an empty text", lambda x: x in ("", [], "underflow_overflow")),
    # The others capture CUDA graphs, which overwrite the gradients that micro-batches add up
    # (pytorch/pytorch#169545).
    "torch_compile_mode": one_of("default", "max-autotune-no-cudagraphs"),
    "include_num_input_tokens_seen": Range(
        "all, non_padding, no, true or false", lambda x: x in (True, False, "all", "non_padding", "no")
    ),
}
LORA_RANGES = {"r": ABOVE_0, "lora_alpha": ABOVE_0, "lora_dropout": BELOW_1, "quantization": one_of("nf4")}
SPIKES = fields_of(SpikeRule)
SPIKE_RANGES = {
    "deviations": Range("3 or more (8 sees a loss that rises from 2 to 8)", lambda x: x >= 3),
    "window": Range("20 or more (steps)", lambda x: x >= 20),
    "back": FROM_0,
    "skip": FROM_1,
    "rate": ABOVE_0_TO_1,
}
# What a run does without when it ends before these steps.
UNREACHED = {
    "eval_steps": "the validation loss is measured only at the end",
    "eval_delay": "the validation loss is measured only at the end",
    "save_steps": "no checkpoint is saved, and a training that is interrupted starts again",
    "logging_steps": "no loss is logged",
    "sample_steps": "no samples are written at those steps",
}
# How the paths of the embeddings and of the output matrix end.
SHARED = ("embed_tokens", "embed_in", "wte", "lm_head")
# Boards whose module has another name.
BOARDS = {"azure_ml": "azureml", "flyte": "flytekit"}


def check_training(values: dict[str, Any], more: dict[str, str], where: str) -> None:
    """Check a training file. more: its keys in addition to those of every training file. Raises Refused."""
    known = {key: kind for key, kind in known_keys()["training_arguments"].items() if key not in ELSEWHERE}
    check_keys(values, known | TRAINING | more, where)
    require(values, ("global_batch_size", "per_device_train_batch_size", "block_size"), where)
    check_ranges(values, RANGES, where)
    if values.get("bf16") and values.get("fp16"):
        raise Refused(
            f"{where}: bf16 and fp16 are both true: keep one, or neither to let the hardware decide"
        )
    for key, options in known_keys()["choices"].items():
        if key in values and values[key] not in (*options, *(OPTIMIZERS if key == "optim" else ())):
            raise Refused(
                f"{where}: {key}: {show(values[key])} is not known.{nearest(str(values[key]), options)}"
            )
    for key, reason in UNFIT.items():
        if values.get(key):
            raise Refused(f"{where}: {key}: {show(values[key])}: {reason}. Leave the key out")
    for key, (other, needed, default) in NEEDS.items():
        if values.get(key) and values.get(other, default) not in needed:
            raise Refused(
                f"{where}: {key}: {show(values[key])} does nothing with {other} "
                f"{show(values.get(other, default))}. Add {other}: {show(needed[0])}, or leave {key} out"
            )
    for key in ("eval_strategy", "save_strategy", "logging_strategy"):
        if values.get(key, "steps") not in ("steps", "no"):
            raise Refused(
                f"{where}: {key}: {show(values[key])}, expected steps or no: a training is one pass over "
                "blocks that are shuffled before it, without ends of epochs"
            )
    if values.get("use_liger_kernel") and values.get("z_loss"):
        raise Refused(f"{where}: use_liger_kernel: Liger's loss has no z_loss. Remove one of the two")
    for key in ("dataloader_prefetch_factor", "dataloader_persistent_workers"):
        if values.get(key) and not values.get("dataloader_num_workers"):
            raise Refused(
                f"{where}: {key}: {show(values[key])} needs workers. Add dataloader_num_workers, or leave "
                f"{key} out"
            )
    if values.get("activation_checkpointing_kwargs") and not values.get("activation_checkpointing"):
        raise Refused(
            f"{where}: activation_checkpointing_kwargs does nothing without activation_checkpointing: true"
        )
    if values.get("activation_checkpointing_kwargs"):
        _check_checkpointing(values["activation_checkpointing_kwargs"], where)
    _check_optimizer(values, where)
    check_schedule(values, where)
    _check_watching(values, where)
    if values.get("spikes") is not None:
        _check_spikes(values, where)
    if values.get("lora") is not None:
        _check_lora(values, where)


def _check_checkpointing(options: Any, where: str) -> None:
    here = f"{where}: activation_checkpointing_kwargs"
    if not isinstance(options, dict):
        raise Refused(f'{here}: {show(options)}, expected an object, such as {{"every_n_layers": 2}}')
    check_keys(options, CHECKPOINTING, here)
    check_ranges(options, {"every_n_layers": FROM_1}, here)


def _check_optimizer(values: dict[str, Any], where: str) -> None:
    """Refuse an optimizer without an entry in `OPTIMIZERS`, and keys that the chosen one does not read."""
    if values.get("muon_learning_rate") and "optim" in values:
        raise Refused(f"{where}: optim: muon_learning_rate chooses Muon with AdamW. Remove one of the two")
    name = optimizer_name(values)
    if values.get("embedding_learning_rate") and name != MUON:
        raise Refused(f"{where}: embedding_learning_rate: only Muon reads it. Set muon_learning_rate, too")
    chosen_by_optim = [name for name in OPTIMIZERS if name != MUON]
    if "optim" in values and name not in chosen_by_optim:
        raise Refused(
            f"{where}: optim: {name}: nothing here could check whether it is active. Known: "
            f"{', '.join(chosen_by_optim)}; Muon is chosen by muon_learning_rate"
        )
    for key in sorted(values):
        if key.startswith("adam_") and key not in OPTIMIZERS[name].keys:
            raise Refused(f"{where}: {key}: optim {name} does not read it. Leave it out")


def _check_watching(values: dict[str, Any], where: str) -> None:
    """Check the names of boards and the steps of samples."""
    asked = values.get("report_to") or []
    known = [*known_keys()["boards"], "none"]
    for board in [asked] if isinstance(asked, str) else asked:
        if board not in known:
            raise Refused(
                f"{where}: report_to: {show(board)} is not a known board.{nearest(str(board), known)} "
                f"Known: {', '.join(known)}. TensorBoard is always written"
            )
    steps = values.get("sample_steps")
    for step in steps if isinstance(steps, list) else [] if steps is None else [steps]:
        if not is_type(step, "int") or step < 1:
            raise Refused(
                f"{where}: sample_steps: {show(steps)}, expected a number of steps or a list of steps, each "
                "1 or more (samples are always written before the first step and after the last)"
            )


def steps_of_epochs(epochs: float, samples: int, batch: int) -> int:
    """Optimizer steps of so many epochs. samples: of one epoch. batch: samples of one step."""
    # 1.1 * 100 / 10 is a little more than 11 in floating point.
    return math.ceil(round(epochs * samples / batch, 9))


def repeats(epochs: float, file: str) -> list[str]:
    """A line about a training that goes over its data more often than `REPEATS` has for its file."""
    most, source = REPEATS.get(file, (math.inf, ""))
    if epochs <= most:
        return []
    return [
        f"note: {file}.json: the run goes {epochs:.1f} times over its data. Up to {most} times was found to "
        f"help ({source}); after more, a model repeats it by heart. Add data, or lower max_steps"
    ]


def unreached_steps(values: dict[str, Any], steps: int, where: str) -> list[str]:
    """A line for each key of a training file that names a step after the last of the run's `steps`."""
    lines = []
    for key, loss in UNREACHED.items():
        value = values.get(key)
        late = [step for step in (value if isinstance(value, list) else [value or 0]) if step > steps]
        if late:
            lines.append(f"note: {where}: {key}: {show(value)}, but the run has {steps} steps: {loss}")
    return lines


def _check_spikes(values: dict[str, Any], where: str) -> None:
    """Check the keys of spikes, and that the checkpoints to go back to are kept. Raises Refused."""
    spikes, here = values["spikes"], f"{where}: spikes"
    check_keys(spikes, SPIKES, here)
    check_ranges(spikes, SPIKE_RANGES, here)
    back, kept = spikes.get("back", 0), values.get("save_total_limit")
    for key in ("skip", "rate"):
        if key in spikes and not back:
            raise Refused(
                f'{here}: {key}: {show(spikes[key])} does nothing without "back". Add "back": 1 (checkpoints '
                f"to go back), or leave {key} out"
            )
    if back and values.get("save_strategy") == "no":
        raise Refused(
            f'{here}: back: {back}, but save_strategy "no" saves no checkpoint to go back to. Remove one of '
            "the two"
        )
    if kept and back > kept:
        raise Refused(
            f"{here}: back: {back}, but save_total_limit keeps only {kept} checkpoints. Raise "
            "save_total_limit, or lower back"
        )


def _check_lora(values: dict[str, Any], where: str) -> None:
    lora = values["lora"]
    check_keys(lora, LORA, f"{where}: lora")
    check_ranges(
        {f"lora.{key}": value for key, value in lora.items()},
        {f"lora.{key}": r for key, r in LORA_RANGES.items()},
        where,
    )
    if "r" not in lora:
        raise Refused(f'{where}: lora: {show(lora)} has no rank. Write {{"r": 16}}, or null for full tuning')
    if values.get("muon_learning_rate"):
        raise Refused(
            f"{where}: muon_learning_rate: Muon orthogonalises whole matrices, and each matrix of LoRA is "
            "only one factor of a product. Remove it, or lora"
        )
    if values.get("z_loss"):
        raise Refused(f"{where}: z_loss: an adapter does not train the output matrix. Remove it, or lora")


def check_embedding_rate(config: Mapping[str, dict[str, Any]], file: str, where: str) -> None:
    """Refuse embedding_learning_rate for a model whose output matrix is that of its embeddings."""
    model = model_values(config)
    tied = with_defaults(model).get("tie_word_embeddings")
    if config[file].get("embedding_learning_rate") and tied:
        raise Refused(
            f"{where}/{file}.json: embedding_learning_rate: the output shares the embeddings' matrix. Write "
            '"tie_word_embeddings": false in model.json, or leave the key out'
        )


def check_target_modules(config: Mapping[str, dict[str, Any]], file: str, where: str) -> None:
    """Refuse names in lora.target_modules that are no matrix of the model, by peft's way of matching.

    A list holds the ends of paths (``q_proj``, ``layers.0.mlp.up_proj``), a text is a regular expression over
    whole paths, or ``all-linear``. Where the output shares the embeddings' matrix, both are refused, too: the
    adapter would be trained over one of them, and its merge would change both.
    """
    targets = (config[file].get("lora") or {}).get("target_modules", "all-linear")
    model = model_values(config)
    first = known_keys()["matrices"].get(model.get("model_type"), [])
    if targets == "all-linear" or not first:
        return
    model = with_defaults(model)
    layers = model.get("num_hidden_layers") or model.get("n_layer") or 1
    paths = {path.replace(".0.", f".{layer}.") for path in first for layer in range(layers)}
    here = f"{where}/{file}.json: lora.target_modules"
    names = sorted({path.rpartition(".")[2] for path in first})
    known = f'Known: {", ".join(names)}; "all-linear" takes all but lm_head'
    tied = model.get("tie_word_embeddings")
    shared = {path for path in paths if path.endswith(SHARED)} if tied else set()
    unfit = {path for path in paths if path.endswith("lm_head")} if file == "preference" else set()
    if isinstance(targets, str):
        try:
            found = {path for path in paths if re.fullmatch(targets, path)}
        except re.error as error:
            raise Refused(f"{here}: {show(targets)}: not a regular expression ({error})") from error
        if not found:
            raise Refused(
                f"{here}: {show(targets)}, a regular expression that matches no path of a matrix, such as "
                f"{first[2]}. Write a list of names. {known}"
            )
        _refuse_unfit(found & unfit, found & shared, f"{here}: {show(targets)}")
        return
    for target in targets or [None]:
        found = {path for path in paths if f".{path}".endswith(f".{target}")}
        if not isinstance(target, str) or not found:
            raise Refused(
                f"{here}: {show(target)} is no matrix of {model['model_type']}."
                f"{nearest(str(target), names)} {known}"
            )
        _refuse_unfit(found & unfit, found & shared, f"{here}: {show(target)}")


def _refuse_unfit(unfit: set[str], shared: set[str], where: str) -> None:
    """Raise Refused for matrices that cannot have an adapter. where: with the targets.

    unfit: those of the output, in stage 13. shared: those that embeddings and output share.
    """
    if shared:
        raise Refused(
            f"{where} takes {' and '.join(sorted(shared))}, but the output shares the embeddings' matrix: "
            "merged, the adapter would change both. Leave them out"
        )
    if unfit:
        raise Refused(
            f"{where} takes {' and '.join(sorted(unfit))}: trl's trainer computes the loss from this matrix "
            "without an adapter. Leave it out"
        )


def attention_needs(config: Mapping[str, dict[str, Any]], file: str) -> AttentionNeeds:
    """What the attention of a training has to compute.

    file: ``pretrain``, ``finetune`` or ``preference``.
    """
    model = model_values(config)
    model = with_defaults(model)
    width, heads = model.get("hidden_size") or model.get("n_embd"), attention_heads(model)
    return AttentionNeeds(
        dropout=bool(model.get("attention_dropout") or model.get("attn_pdrop")),
        window=longest_block(config[file]) > (sliding_window(model) or math.inf),
        padded=file == "preference",
        head_size=model.get("head_dim") or (width // heads if width and heads else None),
    )


def check_boards(asked: str | list[str] | None, file: str) -> list[str]:
    """The boards that receive the figures: TensorBoard always, and those of `report_to`.

    Raises Refused for a board whose library is not installed.
    """
    names = [asked] if isinstance(asked, str) else asked or []
    names = ["tensorboard", *(name for name in names if name not in ("tensorboard", "none"))]
    for name in names:
        module = BOARDS.get(name, name)
        if importlib.util.find_spec(module) is None:
            raise Refused(
                f"{file}: report_to: {name} is not installed. Install it (.venv/bin/pip install {module}) or "
                "remove it from report_to: TensorBoard is always written"
            )
    return names


def training_files(config: dict[str, dict[str, Any]]) -> list[str]:
    """The files of a recipe that a training reads."""
    return [name for name in TRAINING_FILES if name in config]


def tuned_stage(config: dict[str, dict[str, Any]]) -> str:
    """The stage whose model is the recipe's last: what is evaluated, asked and talked to."""
    return "13_preference" if "preference" in config else "12_finetune"
