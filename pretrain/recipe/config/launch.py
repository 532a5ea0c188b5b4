"""Checks between a training file, a DeepSpeed file and the options of a launch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recipe.config.keys import check_keys, known_keys, read_config, short, show
from recipe.config.model import attention_heads, experts_of, with_defaults
from recipe.config.optimizers import FSDP, OFFLOAD, TENSOR, ZERO, check_optimizer_sharding
from recipe.config.phases import samples_of
from recipe.config.ranges import Range, check_numbers, check_ranges
from recipe.project import CONFIGS, Refused, nearest

# Keys of zero_optimization that current versions of DeepSpeed no longer read, with their successors.
REPLACED = {"cpu_offload": "offload_optimizer", "cpu_offload_param": "offload_param"}
# Types and ranges of the keys of zero_optimization that are read here and in the preflight.
ZERO_TYPES = {"stage": "int", **dict.fromkeys(("offload_optimizer", "offload_param"), "dict|null")}
ZERO_TYPES |= {"reduce_bucket_size": "float|str"}
_SIZE = Range('a number above 0, or "auto"', lambda x: x == "auto" if isinstance(x, str) else x > 0)
ZERO_RANGES = {"stage": Range("0, 1, 2 or 3", lambda x: 0 <= x <= 3), "reduce_bucket_size": _SIZE}
# Architectures whose products torchao cannot replace, and where their weights are instead.
NO_FP8 = {"gpt2": "its matrices in Conv1D", "qwen3_moe": "its experts in tensors of three dimensions"}


def check_deepspeed(name: str) -> Path:
    """Check a DeepSpeed file by its short name (``zero2``), and return its path.

    Raises Refused for unknown keys and impossible values, for an optimizer or a scheduler (DeepSpeed would
    silently use it instead of the Trainer's), and for a ZeRO-3 file whose training could not save the model.
    """
    path = CONFIGS / "deepspeed" / f"{name}.json"
    if not path.is_file():
        known = sorted(p.stem for p in path.parent.glob("*.json"))
        raise Refused(
            f"--deepspeed {name}: no such file {short(path)}.{nearest(name, known)} Known: {', '.join(known)}"
        )
    values = read_config(path)
    for key in ("scheduler", "optimizer"):
        if key in values:
            raise Refused(
                f"{short(path)}: {key}: it would silently replace the Trainer's. Remove it, and set "
                "learning_rate, lr_scheduler_type and optim in pretrain.json"
            )
    if "activation_checkpointing" in values:
        raise Refused(
            f"{short(path)}: activation_checkpointing: only models written for it read this section. Remove "
            'it, and set "activation_checkpointing": true in pretrain.json'
        )
    tables = known_keys()["deepspeed"]
    check_keys(values, tables["top"], short(path))
    for section in ("zero_optimization", "bf16", "fp16"):
        check_keys(values.get(section, {}), tables[section], f"{short(path)}: {section}")
    check_numbers(values, short(path))
    zero = values.get("zero_optimization", {})
    here = f"{short(path)}: zero_optimization"
    check_keys({key: value for key, value in zero.items() if key in ZERO_TYPES}, ZERO_TYPES, here)
    check_ranges(zero, ZERO_RANGES, here)
    for old, new in REPLACED.items():
        if old in zero:
            instead = {"device": "cpu", "pin_memory": True}
            raise Refused(
                f"{short(path)}: zero_optimization: {old}: {show(zero[old])}: DeepSpeed no longer reads it. "
                + (f'Write "{new}": {show(instead)}' if zero[old] else "Remove it")
            )
    gathers = [key for key in zero if key.endswith("gather_16bit_weights_on_model_save") and zero[key]]
    if zero.get("stage") == 3 and not gathers:
        raise Refused(
            f"{short(path)}: zero_optimization.stage3_gather_16bit_weights_on_model_save: without it the "
            "trained model would not be saved. Write true"
        )
    return path


def check_deepspeed_facts(path: Path, facts: dict[str, Any]) -> None:
    """Check that a DeepSpeed file agrees with the training file.

    facts: the expected values by dotted key; ``auto`` always agrees. Raises Refused for another value and for
    a missing key.
    """
    values = read_config(path)
    for key, expected in facts.items():
        section, _, name = key.rpartition(".")
        seen = (values.get(section, {}) if section else values).get(name)
        if seen != "auto" and seen != expected:
            raise Refused(
                f"{short(path)}: {key}: {show(seen)}, but the training file and the ranks make it "
                f'{show(expected)}. Write "auto"'
            )


def offloads_optimizer(deepspeed: dict[str, Any]) -> bool:
    """Whether the values of a DeepSpeed file keep the optimizer's states outside the GPU."""
    return _offloads(deepspeed, "offload_optimizer")


def offloads_parameters(deepspeed: dict[str, Any]) -> bool:
    """Whether the values of a DeepSpeed file keep the weights outside the GPU."""
    return _offloads(deepspeed, "offload_param")


def _offloads(deepspeed: dict[str, Any], section: str) -> bool:
    # An explicit null says the same as a missing section.
    return (deepspeed.get("zero_optimization", {}).get(section) or {}).get("device", "none") != "none"


def batch_layout(global_batch: int, most: int, ranks: int, where: str = "") -> tuple[int, int]:
    """The (micro-batch, accumulation steps) of each rank.

    global_batch, most: global_batch_size and per_device_train_batch_size, in sequences. where: the name of
    their file, for the message. Raises Refused when the global batch does not divide.
    """
    share, rest = divmod(global_batch, ranks)
    micro = min(most, share)
    if rest or share % micro:
        fits = max((size for size in range(1, micro) if not rest and share % size == 0), default=0)
        way_out = f"Set per_device_train_batch_size to {fits}, or change" if fits else "Change"
        raise Refused(
            f"{where}global_batch_size: {global_batch} sequences do not divide into {ranks} ranks with "
            f"per_device_train_batch_size {most}. {way_out} one of the three (--nproc sets the ranks)"
        )
    return micro, share // micro


def check_launch(
    values: dict[str, Any],
    file: str,
    deepspeed: str | None,
    ranks: int,
    fsdp: bool = False,
    tensor_parallel: int = 1,
) -> Path | None:
    """Check a training file against the options of a launch; return the path of the DeepSpeed file.

    file: ``pretrain``, ``finetune`` or ``preference``. deepspeed: a short name, or None. ranks: on all
    machines. tensor_parallel: ranks that share each matrix. Raises Refused for a contradiction.
    """
    option = "--tensor-parallel" if tensor_parallel > 1 else "--fsdp" if fsdp else ""
    option = "--deepspeed" if deepspeed else option
    if deepspeed and (fsdp or tensor_parallel > 1):
        raise Refused("--deepspeed shards by itself. Leave it out, or leave out --fsdp and --tensor-parallel")
    if tensor_parallel < 1 or ranks % tensor_parallel:
        raise Refused(
            f"--tensor-parallel {tensor_parallel}: expected a number that divides the {ranks} ranks (--nproc)"
        )
    if fsdp and ranks // tensor_parallel < 2:
        raise Refused(
            f"--fsdp: nothing to shard over: {ranks} ranks, --tensor-parallel {tensor_parallel}. "
            "Give more ranks (--nproc), or leave --fsdp out"
        )
    micro_batch, accumulation = batch_layout(
        *samples_of(values),
        ranks // tensor_parallel,
        f"{file}.json: ",
    )
    path = check_deepspeed(deepspeed) if deepspeed else None
    if path:
        facts = {
            "train_batch_size": samples_of(values)[0],
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": values.get("max_grad_norm", 1.0),
            "bf16.enabled": values.get("bf16", "auto"),
            "fp16.enabled": values.get("fp16", "auto"),
        }
        check_deepspeed_facts(path, facts)
    lora = values.get("lora") or {}
    if option in ("--fsdp", "--tensor-parallel") and (lora or file == "preference"):
        raise Refused(
            f"{file}.json: {option} shards only a model whose weights are all trained: no adapter (lora) "
            "and no reference model as for preferences. Run this stage with --nproc, with --deepspeed zero2 "
            f"or zero3 if memory is short; use {option} for stage 05 alone (bash pretrain/05_pretrain.sh)"
        )
    if option and file == "preference" and values.get("method") == "grpo":
        raise Refused(
            f"{file}.json: method: grpo: every rank writes answers with the whole model, so {option} is not "
            "supported. Run this stage with --nproc alone (bash fine-tuning/13_preference.sh --nproc 2)"
        )
    if path and lora.get("quantization") and read_config(path).get("zero_optimization", {}).get("stage") == 3:
        raise Refused(
            f"{file}.json: lora.quantization: ZeRO-3 cannot partition nf4 weights. Use --deepspeed zero2, or "
            f"tune LoRA over unquantised weights: --set {file}.lora.quantization=null"
        )
    if fsdp:
        check_optimizer_sharding(values, file, FSDP)
    if tensor_parallel > 1:
        check_optimizer_sharding(values, file, TENSOR)
    if path:
        check_optimizer_sharding(values, file, ZERO)
        if offloads_optimizer(read_config(path)):
            check_optimizer_sharding(values, file, OFFLOAD, f"--deepspeed {deepspeed}")
    return path


def check_experts(
    model: dict[str, Any], values: dict[str, Any], ranks: int, fsdp: bool, tensor_parallel: int
) -> None:
    """Raise Refused when the experts of a model cannot be split over the ranks.

    model: the values of model.json. values: of the training file. ranks: on all machines.
    """
    experts = experts_of(with_defaults(model))
    if experts is None:
        return
    shards = ranks // tensor_parallel
    if fsdp and experts.count % shards:
        fits = max(n for n in range(1, shards) if experts.count % n == 0)
        raise Refused(
            f"--fsdp: num_experts: {experts.count} experts do not divide over {shards} ranks, and some would "
            f"hold more than others. Give a number of ranks that divides them, such as {fits} (--nproc), or "
            "change num_experts in model.json"
        )
    if tensor_parallel > 1 and values.get("muon_learning_rate"):
        raise Refused(
            f"--tensor-parallel {tensor_parallel}: the gate and up projections of an expert are one matrix, "
            "which its ranks share in two parts, and Muon needs it whole. Use --fsdp, or AdamW "
            "(muon_learning_rate: null)"
        )


def check_fp8(
    model: dict[str, Any], values: dict[str, Any], deepspeed: str | None, fsdp: bool, tensor_parallel: int
) -> None:
    """Raise Refused for ``fp8`` where the model or the launch rules it out.

    model: the values of model.json. values: of pretrain.json. The other arguments: see `check_launch`.
    """
    if not values.get("fp8"):
        return
    kind = model.get("model_type", "")
    model = with_defaults(model)
    width, block = model.get("hidden_size", 0), values["block_size"]
    reason = ""
    if deepspeed or fsdp or tensor_parallel > 1:
        option = "--deepspeed" if deepspeed else "--fsdp" if fsdp else "--tensor-parallel"
        reason = f"it works in one process and under DDP, not with {option}. Leave the option or the key out"
    elif kind in NO_FP8:
        reason = f"torchao replaces torch.nn.Linear, and {kind} keeps {NO_FP8[kind]}. Leave the key out"
    elif width % 16:
        reason = f"model.json has hidden_size {width}, and fp8 needs a multiple of 16. Change one of the two"
    elif block % 16:
        # The micro-batches of all phases have as many positions as those of this size.
        reason = f"block_size is {block}, and fp8 needs a multiple of 16. Change one of the two"
    if reason:
        raise Refused(f"pretrain.json: fp8: true, but {reason}")


def check_tensor_parallel(model: dict[str, Any], tensor_parallel: int) -> None:
    """Raise Refused when the model cannot be split over the ranks that share each matrix.

    model: the values of model.json. tensor_parallel: the number of these ranks.
    """
    if tensor_parallel > 1 and model.get("model_type") == "gpt2":
        raise Refused("--tensor-parallel: transformers has no plan for gpt2. Use --fsdp or --deepspeed zero3")
    model = with_defaults(model)
    experts = experts_of(model)
    if experts and experts.width % tensor_parallel:
        raise Refused(
            f"--tensor-parallel {tensor_parallel}: the experts' moe_intermediate_size {experts.width} does "
            "not divide by this number. Give a divisor of it"
        )
    heads = model.get("num_key_value_heads") or attention_heads(model)
    if heads and heads % tensor_parallel:
        raise Refused(
            f"--tensor-parallel {tensor_parallel}: the {heads} key-value heads of model.json do not divide "
            "by this number. Give a divisor of it"
        )
