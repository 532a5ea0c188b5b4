"""Check after the first step: is what the settings ask for really active?"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.modeling_layers import GradientCheckpointingLayer

from recipe.config.choice import Choice
from recipe.config.optimizers import Optimizer
from recipe.config.settings import Settings
from recipe.model.build import active_parameter_count, parameter_count
from recipe.model.chunked_loss import active_loss
from recipe.model.fp8 import active_fp8
from recipe.model.losses import router_loss_weight
from recipe.model.sharding import sharded_over
from recipe.project import Refused
from recipe.training.callbacks import gather
from recipe.training.check_schedule import check_rates


@dataclass(frozen=True)
class Active:
    """What a training uses. None: not in use.

    fp8: the number of matrices that are multiplied in fp8. loss: see `recipe.config.choice.choose_loss`.
    compiled: by torch.compile. activation_checkpointing: how many of the layers are computed again. fused:
    whether the optimizer is one kernel. offloaded: whether it runs on the CPU. scheduler: name and class.
    router_aux_loss: its coefficient. neftune: its noise alpha. parallel: see `active_parallelism`.
    micro_batch, global_batch: sequences. active_parameters: those that a token uses, with experts. boards:
    where figures go.
    """

    device: str
    precision: str
    fp8: int | None
    attention: str
    loss: str
    compiled: bool
    layers: int
    activation_checkpointing: int | None
    optimizer: str
    fused: bool
    offloaded: bool
    betas: list[float]
    epsilon: float | None
    weight_decay: float | str | None
    gradient_clipping: float | None
    scheduler: str
    z_loss: float | None
    router_aux_loss: float | None
    neftune: float | None
    parallel: str
    ranks: int
    micro_batch: int
    accumulation: int
    global_batch: int
    parameters: int
    active_parameters: int | None
    seed: int
    boards: list[str]


@dataclass(frozen=True)
class Asked:
    """What the recipe and the launcher ask of a training, apart from the TrainingArguments.

    loss: in the words of `recipe.config.choice.choose_loss`. parallel: in those of `active_parallelism`.
    router_aux_loss: the coefficient, of a mixture of experts. fp8: the number of matrices that fit.
    """

    settings: Settings
    choice: Choice
    loss: str
    optimizer: Optimizer
    parallel: str
    ranks: int
    router_aux_loss: float | None = None
    fp8: int | None = None

    def expected(self, active: Active, args: TrainingArguments) -> Active:
        """What should be active. Fields that the settings leave open are taken from `active`."""
        every = (args.activation_checkpointing_kwargs or {}).get("every_n_layers", 1)
        checkpointed = math.ceil(active.layers / every) if args.activation_checkpointing else None
        expected = replace(
            active,
            precision=self.choice.precision,
            fp8=self.fp8,
            attention=self.choice.attention,
            loss=self.loss,
            compiled=self.choice.compile,
            activation_checkpointing=checkpointed,
            optimizer=self.optimizer.reported,
            weight_decay=args.weight_decay or None,
            gradient_clipping=args.max_grad_norm or None,
            z_loss=self.settings.z_loss or None,
            router_aux_loss=self.router_aux_loss,
            neftune=args.neftune_noise_alpha,
            parallel=self.parallel,
            ranks=self.ranks,
            global_batch=self.settings.global_batch_size,
            boards=sorted(args.report_to),
        )
        if self.optimizer.fused and not active.offloaded:
            expected = replace(expected, fused=True)
        if "adam_epsilon" in self.optimizer.keys:
            expected = replace(expected, betas=[args.adam_beta1, args.adam_beta2], epsilon=args.adam_epsilon)
        return expected


class ActiveCheck(TrainerCallback):
    """After the first step, compare what is active with what was asked for; raise Refused if they differ.

    block: what was found, for stage.json; empty before the first step.
    """

    def __init__(self, asked: Asked, tokens_per_step: int) -> None:
        self.asked, self.tokens_per_step = asked, tokens_per_step
        self.trainer: Trainer | None = None
        self.block: dict[str, Any] = {}

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Check once, at the first step of this process."""
        if self.block:
            return
        assert self.trainer is not None
        active = read_active(self.trainer)
        rates, wrong_rates = check_rates(self.trainer)
        found = asdict(active)
        self.block = found | {"tokens_per_step": self.tokens_per_step, "learning_rates": rates}
        if state.is_world_process_zero:
            said = {key: value for key, value in self.block.items() if value is not None}
            tqdm.write("active: " + ", ".join(f"{key} {value}" for key, value in said.items()))
        expected = asdict(self.asked.expected(active, args))
        wrong = [
            f"{key}: asked for {value}, active is {found[key]}"
            for key, value in expected.items()
            if found[key] != value
        ]
        if wrong or wrong_rates:
            raise Refused(
                "the training does not use what the settings ask for. " + "; ".join(wrong + wrong_rates)
            )


def expected_parallelism(ranks: int, deepspeed: str | None, fsdp: bool, tensor_parallel: int) -> str:
    """The parallelism that the launcher's options ask for, in the words of `active_parallelism`.

    deepspeed: the path of a DeepSpeed file, or None.
    """
    if deepspeed:
        zero = json.loads(Path(deepspeed).read_text("utf-8")).get("zero_optimization", {})
        devices = [(zero.get(part) or {}).get("device") for part in ("offload_optimizer", "offload_param")]
        return _zero(zero.get("stage", 0), *devices)
    if fsdp or tensor_parallel > 1:
        return _sharded({"fsdp": ranks // tensor_parallel, "tp": tensor_parallel})
    return f"DDP {ranks}" if ranks > 1 else "one process"


def active_parallelism(model: Any) -> str:
    """The parallelism that is in use, read from the model that trains: ``one process``, ``DDP 4``,
    ``FSDP2 4``, ``TP 2``, ``FSDP2 2 x TP 2``, or ``ZeRO-2, optimizer on cpu``.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile wraps around DistributedDataParallel
    if hasattr(model, "zero_optimization_stage"):
        offload = model.zero_offload_optimizer(), model.zero_offload_param()
        return _zero(model.zero_optimization_stage(), *(getattr(part, "device", None) for part in offload))
    if isinstance(model, torch.nn.DataParallel):
        return f"DataParallel {len(model.device_ids)}"
    if isinstance(model, DistributedDataParallel):
        return f"DDP {dist.get_world_size(model.process_group)}"
    sharded = sharded_over(model)
    if sharded:
        return _sharded(sharded)
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    return "one process" if ranks == 1 else f"none: each of the {ranks} ranks trains a model of its own"


def is_compiled(model: torch.nn.Module) -> bool:
    """Whether a model, or a part of it, was handed to torch.compile.

    That something was compiled does not say so: flex_attention compiles its own kernel.
    """
    parts = model.modules()
    return any(isinstance(part, OptimizedModule) or part._compiled_call_impl is not None for part in parts)


def _zero(stage: int, optimizer: Any, parameters: Any) -> str:
    parts = [f"ZeRO-{stage}"]
    for name, device in (("optimizer", optimizer), ("parameters", parameters)):
        device = str(device).split(".")[-1]  # DeepSpeed's own are members of an enum
        if device not in ("None", "none"):
            parts.append(f"{name} on {device}")
    return ", ".join(parts)


def _sharded(sizes: dict[str, int]) -> str:
    names = {"fsdp": "FSDP2", "tp": "TP"}
    return " x ".join(f"{names[kind]} {sizes[kind]}" for kind in names if sizes.get(kind, 1) > 1)


def read_active(trainer: Trainer) -> Active:
    """What a running Trainer uses, read from the objects that do the work, not from the settings."""
    from torch._dynamo.utils import counters

    engine, model = trainer.model_wrapped, trainer.model
    optimizer: Any = trainer.optimizer
    while hasattr(optimizer, "optimizer"):  # accelerate's, then DeepSpeed's wrapper
        optimizer = optimizer.optimizer
    groups = optimizer.param_groups
    scheduler = getattr(trainer.lr_scheduler, "scheduler", trainer.lr_scheduler)
    precision = trainer.accelerator.mixed_precision
    clipping = getattr(trainer, "clipped_at", None)
    if hasattr(engine, "zero_optimization_stage"):
        precision = "bf16" if engine.bfloat16_enabled() else "fp16" if engine.fp16_enabled() else "no"
        clipping = engine.gradient_clipping()
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    adam = [group for group in groups if "betas" in group and "eps" in group]
    whole = parameter_count(model)
    sequences = round(sum(count for (count,) in gather([trainer.sequences], trainer.args.device)))
    return Active(
        device=str(trainer.args.device),
        precision={"no": "fp32"}.get(precision, precision),
        fp8=active_fp8(model) or None,
        attention=model.config._attn_implementation,
        loss=active_loss(model),
        compiled=is_compiled(engine) and counters["stats"]["unique_graphs"] > 0,
        layers=len(layers),
        activation_checkpointing=sum(layer.gradient_checkpointing for layer in layers) or None,
        optimizer=_optimizer_name(optimizer),
        fused=bool(groups[0].get("fused")),
        offloaded=type(optimizer).__name__.startswith("DeepSpeedCPU"),
        betas=list(_common(tuple(group["betas"]) for group in adam) or ()),
        epsilon=_common(group["eps"] for group in adam),
        weight_decay=_common(group["weight_decay"] for group in groups if group.get("weight_decay")),
        gradient_clipping=clipping or None,
        scheduler=f"{trainer.args.lr_scheduler_type.value} ({type(scheduler).__name__})",
        z_loss=trainer.settings.z_loss if trainer.added.get("z_loss") else None,
        router_aux_loss=router_loss_weight(model.config) if trainer.added.get("router_aux_loss") else None,
        neftune=getattr(model.get_input_embeddings(), "neftune_noise_alpha", None),
        parallel=active_parallelism(engine),
        ranks=dist.get_world_size() if dist.is_initialized() else 1,
        micro_batch=trainer.args.per_device_train_batch_size,
        accumulation=trainer.args.gradient_accumulation_steps,
        # Ranks that share matrices read the same batches.
        global_batch=sequences // sharded_over(model).get("tp", 1),
        parameters=whole,
        active_parameters=active if (active := active_parameter_count(model)) != whole else None,
        seed=trainer.args.seed,
        boards=sorted(
            name
            for name, board in INTEGRATION_TO_CALLBACK.items()
            if any(type(callback) is board for callback in trainer.callback_handler.callbacks)
        ),
    )


def _optimizer_name(optimizer: torch.optim.Optimizer) -> str:
    """The class, with the bits of bitsandbytes' states; DeepSpeed's AdamW on the CPU is AdamW."""
    name = type(optimizer).__name__
    if name == "DeepSpeedCPUAdam":
        return "AdamW" if optimizer.adam_w_mode else "Adam"
    if type(optimizer).__module__.startswith("bitsandbytes"):
        return f"{name} {optimizer.args.optim_bits}-bit"
    return name


def _common(values: Iterable[Any]) -> Any:
    """The value that all share; all of them, as text, where they differ; None where there is no value."""
    found = set(values)
    return found.pop() if len(found) == 1 else str(sorted(found)) if found else None
