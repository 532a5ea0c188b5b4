"""What a training will need, before it starts: memory, steps, disk and time, without torch.

``05_pretrain.sh --dry-run`` prints `report`. The figures are computed. Only the speed of an earlier training
on this machine is measured; each line says which it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from recipe.config.model import model_values
from recipe.config.optimizers import DEFAULT, OPTIMIZERS, ZERO
from recipe.config.phases import samples_of
from recipe.config.schedules import same_rates_until
from recipe.config.tokenizer import vocabulary_size
from recipe.config.training import repeats, steps_of_epochs
from recipe.project import (
    DATA,
    OUTPUTS,
    RECORD,
    folder_bytes,
    free_bytes,
    is_finished,
    read_record,
    read_state,
    require_space,
    stage_folder,
    work_folder,
)
from recipe.run.cards import ASSUMED_MFU
from recipe.run.fitting import (
    GIB,
    PROFILES,
    USABLE,
    Device,
    checkpointed_time,
    choose_optimizer,
    fit,
    setting_of,
    this_machine,
)
from recipe.run.launch_options import Launch
from recipe.run.memory import Setting, Shape, activation_bytes, memory, shape_of
from recipe.run.stage import Stage

ASSUMED_VOCABULARY = 32_000
ENOUGH_STEPS = 100  # of a training whose speed tells something about others


def vocabulary_of(recipe: str, config: dict[str, dict[str, Any]]) -> tuple[int, str]:
    """The size of the vocabulary, and in words where it comes from if not from tokenizer.json."""
    size = vocabulary_size(config["tokenizer"])
    if size:
        return size, ""
    folder = stage_folder(recipe, "03_tokenizer")
    if is_finished(folder):
        return read_record(folder, "figures")["figures"]["vocabulary"]["size"], " (stage 03)"
    model = model_values(config)
    if "vocab_size" in model:
        return model["vocab_size"], " (model.json or the published checkpoint)"
    return ASSUMED_VOCABULARY, " (assumed; the size of a published tokenizer is known after stage 03)"


# ----------------------------------------------------------------------------------------- steps, disk, time


def training_tokens(recipe: str, dataset: dict[str, Any]) -> int | None:
    """Tokens of an epoch: the counts of stage 04 times the weights of their sources.

    A source of weight 2 is read twice, as in `recipe.tokenization.packing`. None: stage 04 has not run.
    """
    folder = stage_folder(recipe, "04_tokenize")
    if not is_finished(folder):
        return None
    counts = read_record(folder, "figures")["figures"]["sources"]["train"]
    weights = {name: source.get("weight", 1) for name, source in dataset["sources"].items()}
    # A source that dataset.json no longer names makes stage 04 stale; that is reported elsewhere.
    return round(sum(count["tokens"] * weights.get(name, 1) for name, count in counts.items()))


def step_count(values: dict[str, Any], tokens: int | None) -> int | None:
    """Optimizer steps, from max_steps or from num_train_epochs over `tokens`; None if unknown."""
    if values.get("max_steps", 0) > 0:
        return values["max_steps"]
    if tokens is None:
        return None
    blocks = -(-tokens // values["block_size"])
    return steps_of_epochs(values.get("num_train_epochs", 3), blocks, values["global_batch_size"])


def checkpoint_bytes(shape: Shape, setting: Setting) -> int:
    """Bytes of one checkpoint: the weights and the optimizer's states, of all ranks together."""
    one = replace(
        setting, ranks=1, tensor_parallel=1, fsdp=False, offload_optimizer=False, offload_parameters=False
    )
    parts = memory(shape, one)
    return int(parts["weights"] + parts["optimizer"])


def training_disk(shape: Shape, setting: Setting, values: dict[str, Any], steps: int | None) -> int | None:
    """Bytes of a training stage: the checkpoints that are kept, one more, and the model.

    The oldest checkpoint is deleted only after the newest is written. Where a longer run could go on from
    before the end of the schedule, the last checkpoint before is kept in addition. None: the number of
    checkpoints is unknown, because all are kept (no save_total_limit) and the steps are not known yet.
    """
    saved = None
    if values.get("save_strategy") == "no":
        saved = 0
    elif steps:
        every = values.get("save_steps", 500)
        saved = steps // max(1, math.ceil(every * steps) if every < 1 else int(every))
    limit = values.get("save_total_limit")
    end = steps or 0  # which schedules keep one more does not depend on the length
    fixed = same_rates_until(values, end)
    early = int(fixed is not None and fixed < end)
    counts = [n for n in (saved, limit + 1 + early if limit else None) if n is not None]
    if not counts:
        return None
    return min(counts) * checkpoint_bytes(shape, setting) + 4 * shape.parameters


def require_data_space(recipe: str, dataset: dict[str, Any]) -> None:
    """Raise Refused, before the download, unless the disk has room for stages 01 to 04.

    The need is the estimate of the recipe's author, `disk_gigabytes` in dataset.json, minus what is there of
    this recipe's sources and of its unfinished stages 02 to 04: finished ones stay until new ones replace
    them. Without the key only the download itself is checked.
    """
    need = _data_space(recipe, dataset)
    require_space(OUTPUTS, need, "the data of stages 01 to 04 (dataset.json: disk_gigabytes)")


def _data_space(recipe: str, dataset: dict[str, Any]) -> int:
    """The bytes that the data of stages 01 to 04 still need, by `disk_gigabytes`."""
    folders = [DATA / name for name in dataset["sources"]]
    folders += [
        work_folder(stage_folder(recipe, name)) for name in ("02_dataset", "03_tokenizer", "04_tokenize")
    ]
    there = sum(folder_bytes(folder) for folder in folders)
    return int(dataset.get("disk_gigabytes", 0) * 1e9) - there


def on_this_machine(
    recipe: str, config: dict[str, dict[str, Any]], launch: Launch, file: str = "pretrain"
) -> tuple[Shape, Setting, float]:
    """The model, its setting for a training on this machine, and the free bytes for each rank.

    file: ``pretrain``, ``finetune`` or ``preference``.
    """
    here, free = this_machine(launch)
    shape = shape_of(model_values(config), vocabulary_of(recipe, config)[0])
    return shape, setting_of(config[file], here, launch), free


def check_resources(stage: Stage, launch: Launch, file: str) -> None:
    """Say what the training that starts now will need.

    file: ``pretrain``, ``finetune`` or ``preference``; the memory is computed for ``pretrain`` only. Raises
    Refused when the disk has no room for its checkpoints.
    """
    values = stage.config[file]
    if "model_type" not in model_values(stage.config):
        return  # a published model without model.json, whose config.json is in no cache any more
    if values.get("lora"):
        # An adapter's checkpoints are small compared with the merged model.
        values = values | {"save_strategy": "no"}
    shape, setting, free = on_this_machine(stage.recipe, stage.config, launch, file)
    tokens = training_tokens(stage.recipe, stage.config["dataset"]) if file == "pretrain" else None
    disk = training_disk(shape, setting, values, step_count(values, tokens)) or 0
    needed = disk - folder_bytes(stage.folder)
    require_space(stage.folder, needed, f"checkpoints and the model ({file}.json: save_total_limit)")
    if file != "pretrain":
        return
    peak = memory(shape, setting)["peak"]
    stage.say(f"preflight: {peak / GIB:.1f} GiB per device and {disk / 1e9:.1f} GB of disk, computed")
    if peak > free:
        stage.say(f"warning: only {free / GIB:.1f} GiB are free; see --dry-run for what to change")


def measured_rate(recipe: str, device: Device, ranks: int) -> tuple[float, str] | None:
    """FLOP/s of `ranks` together, from an earlier training or probe, and its origin in words.

    It was on a device of the same name. This recipe's own record comes first, then the newest of the others;
    trainings of fewer than `ENOUGH_STEPS`, of which the start is a large part, come last.
    Each GPU is expected to be as fast as one was then. What a checkpointed training did twice counts, because
    `_device_lines` counts it, too. Ranks on a CPU share its cores, so together they are as fast as the ranks
    were then.
    """
    trained = [(path.parts[-3], path) for path in OUTPUTS.glob(f"*/05_pretrain/{RECORD}")]
    probed = [(path.parts[-2], path) for path in OUTPUTS.glob("*/probe.json")]
    records = [
        (name, path.stat().st_mtime, (read_state(path, "figures") or {"figures": {}})["figures"])
        for name, path in trained + probed
    ]
    records.sort(key=lambda r: (r[0] == recipe, r[2].get("steps", ENOUGH_STEPS) >= ENOUGH_STEPS, r[1]))
    for name, _, figures in reversed(records):
        if figures.get("hardware") == device.name and figures.get("mfu"):
            active = figures.get("active") or {}
            then = active.get("ranks", 1)
            rate = figures["mfu"] * figures["gemm_peak_flops"]
            # An earlier release recorded no layers, and true for some of them or all.
            rate *= checkpointed_time((active.get("activation_checkpointing") or 0) / active.get("layers", 1))
            origin = f"measured, recipe {name}" if name == recipe else f"by the speed of recipe {name}"
            return rate * (ranks if device.kind == "cuda" else then), origin
    return None


# ---------------------------------------------------------------------------------------------------- report


def report(recipe: str, config: dict[str, dict[str, Any]], launch: Launch) -> Iterator[str]:
    """The lines of a preflight report: what pretraining this recipe needs, here and on common GPUs."""
    values = config["pretrain"]
    vocabulary, origin = vocabulary_of(recipe, config)
    shape = shape_of(model_values(config), vocabulary)
    here, limit = this_machine(launch)
    setting = setting_of(values, here, launch)
    tokens = training_tokens(recipe, config["dataset"])
    steps = step_count(values, tokens)
    per_step = values["global_batch_size"] * values["block_size"]
    replicas = launch.ranks // launch.tensor_parallel
    experts = f" ({shape.active_parameters:,} active)" if shape.experts_of_token else ""
    yield (
        f"parameters   {shape.parameters:,}{experts}: {shape.kind}, {shape.layers} layers of {shape.hidden}, "
        f"vocabulary {vocabulary:,}{origin}"
    )
    yield (
        f"step         {samples_of(values)[0]} x {setting.block_size} = {per_step:,} tokens: "
        f"micro-batch {setting.micro_batch} x accumulation {setting.accumulation} x {replicas} "
        f"{'ranks' if replicas > 1 else 'rank'}"
    )
    if steps:
        epochs = f" = {steps * per_step / tokens:.2f} epochs of {tokens:,}" if tokens else ""
        yield f"training     {steps:,} steps, {steps * per_step:,} tokens{epochs}"
        yield from repeats(steps * per_step / tokens, "pretrain") if tokens else ()
    else:
        yield "training     the steps are known after stage 04 (num_train_epochs)"
    yield _disk_line(recipe, config["dataset"], training_disk(shape, setting, values, steps))
    yield from _memory_lines(shape, setting, values)
    work = shape.flops_per_token(values["block_size"]) * (steps * per_step if steps else 1e9)
    unit = "" if steps else " per 1e9 tokens"
    yield (
        "devices      with these settings, or with the changes that make it fit. GPUs: computed, not "
        f"measured; time from the maker's TFLOP/s and an assumed MFU of {ASSUMED_MFU:.0%}"
    )
    measured = measured_rate(recipe, here, launch.ranks)
    yield from _device_lines(here, limit, values, shape, launch, work, measured, unit)
    for device in PROFILES:
        rate = device.flops * ASSUMED_MFU * launch.ranks, f"tabulated {device.flops / 1e12:.0f} TFLOP/s"
        limit = device.gigabytes * GIB * USABLE
        yield from _device_lines(device, limit, values, shape, launch, work, rate, unit)


def _disk_line(recipe: str, dataset: dict[str, Any], training: int | None) -> str:
    """What will be written, in words. training: bytes of the checkpoints and the model."""
    asked = [f"{training / 1e9:.1f} GB for checkpoints and the model (computed)"] if training else []
    if "disk_gigabytes" in dataset:
        asked.append(f"{dataset['disk_gigabytes']:,} GB for stages 01 to 04 (estimated in dataset.json)")
    free = free_bytes(OUTPUTS)
    need = 0 if is_finished(stage_folder(recipe, "04_tokenize")) else max(0, _data_space(recipe, dataset))
    # A training that is going on or finished has written its share.
    final = stage_folder(recipe, "05_pretrain")
    need += max(0, (training or 0) - folder_bytes(final) - folder_bytes(work_folder(final)))
    verdict = "" if need <= free else ": does not fit"
    return f"disk         {'; '.join([*asked, f'{free / 1e9:,.0f} GB free{verdict}'])}"


def _memory_lines(shape: Shape, setting: Setting, values: dict[str, Any]) -> Iterator[str]:
    parts = memory(shape, setting)
    peak, _ = parts.pop("peak"), parts.pop("host")
    held = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items() if size)
    yield f"memory       {peak / GIB:.2f} GiB per device at the peak (computed): {held}"
    other = replace(setting, checkpointing=0 if setting.checkpointing else 1)
    yield (
        f"             activations {activation_bytes(shape, other) / GIB:.2f} GiB "
        f"{'with' if other.checkpointing else 'without'} activation_checkpointing"
    )
    counts = (1, 2, 4, 8)
    names = "".join(f"{count:>8}" for count in counts)
    yield f"             weights, gradients, AdamW: GiB per device of{names}  bytes per parameter"
    plain = replace(setting, optimizer=DEFAULT, precision="bf16", zero=0, fsdp=False, tensor_parallel=1)
    plain = replace(plain, offload_optimizer=False, offload_parameters=False)
    for name, formula, fields in (
        ("a full copy on each", "16", {}),
        ("--deepspeed zero1", "4 + 12/N", {"zero": 1}),
        ("--deepspeed zero2", "2 + 14/N", {"zero": 2}),
        ("--deepspeed zero3", "16/N", {"zero": 3}),
        ("--fsdp", "16/N, and 4 while accumulating", {"fsdp": True}),
    ):
        cells = ""
        for count in counts:
            states = memory(shape, replace(plain, ranks=count, **fields))
            cells += f"{sum(states[part] for part in ('weights', 'gradients', 'optimizer')) / GIB:>8.2f}"
        yield f"               {name:42}{cells}  {formula}"
    if ZERO not in OPTIMIZERS[setting.optimizer].sharding:
        options = " ".join(choose_optimizer(values, DEFAULT))
        yield f"               --deepspeed does not work with {setting.optimizer}: add {options}"


def _device_lines(
    device: Device,
    limit: float,
    values: dict[str, Any],
    shape: Shape,
    launch: Launch,
    work: float,
    rate: tuple[float, str] | None,
    unit: str,
) -> Iterator[str]:
    """Whether the training fits into `limit` bytes of a device, what to change if not, and its time.

    work: FLOPs of the whole training, or of the `unit` named. rate: FLOP/s and their origin in words.
    """
    setting = setting_of(values, device, launch)
    name = f"this machine, {device.name}" if device.kind == "cpu" else device.name
    if setting.precision == "bf16" and not device.bf16:
        yield f"  {name:38} has no bf16 units: leave bf16 out of pretrain.json"
        return
    peak = memory(shape, setting)["peak"]
    if limit == math.inf:
        yield f"  {name:38} {peak / GIB:.1f} GiB; how much memory a part of a GPU (MIG) has is not known"
        return
    head = f"  {name:38} {peak / GIB:.1f} of {limit / GIB:.1f} GiB"
    found = fit(shape, values, setting, limit)
    if found is None:
        yield f"{head}: does not fit, and no change of settings helps"
        return
    changed, options = found
    time = ""
    if rate:
        again = checkpointed_time(1 / changed.checkpointing if changed.checkpointing else 0)
        time = f"; {_duration(work * again / rate[0])}{unit} ({rate[1]})"
    if not options:
        yield f"{head}: fits{time}"
        return
    after = memory(shape, changed)
    host = f" and {after['host'] / GIB:.1f} on the host" if after["host"] else ""
    yield f"{head}: does not fit"
    yield f"  {'':38} {after['peak'] / GIB:.1f} GiB{host} with {' '.join(options)}{time}"


def _duration(seconds: float) -> str:
    hours = ((36_000, 3600, "h", 1), (360_000, 3600, "h", 0))
    for limit, unit, name, digits in ((120, 1, "s", 0), (7200, 60, "min", 0), *hours):
        if seconds < limit:
            return f"{seconds / unit:.{digits}f} {name}"
    return f"{seconds / 86400:.0f} days"
