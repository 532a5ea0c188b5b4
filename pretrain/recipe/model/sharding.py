"""Models sharded over the ranks: FSDP2 and tensor parallelism under the Trainer, by transformers' plans.

transformers shards a model while it loads it, so that no rank ever holds the whole model. This module adds
what the Trainer of transformers 5.23 lacks: resuming, and tensor parallelism on CPUs.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Trainer
from transformers.distributed import DistributedConfig
from transformers.distributed.checkpoint import load_optimizer_distributed, save_optimizer_distributed
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES
from transformers.distributed.tensor_parallel import TensorParallelLayer

from recipe.model import zero
from recipe.project import RecipeError, Refused

OPTIMIZER, SCHEDULER, CONVERTED = "optimizer", "scheduler.pt", "converted"
# Kinds of parallelism that share one form of the optimizer state.
WHOLE, SHARDED = "one process or DDP", "FSDP2 or tensor parallelism"
ZERO = ("ZeRO-1 or 2", "ZeRO-3")
# transformers 5.23 gathers each of a model's `layers` on its own. In GPT-2 they are called `h`: without this
# plan all weights would silently be gathered at once.
FSDP_PLANS = {"gpt2": {"transformer.h.*": "free_full_weight"}}


class _SummedGradient(TensorParallelLayer):
    """A weight that every rank holds, while each has only a part of its gradient: norms of single heads.

    After every micro-batch transformers 5.23 sums the accumulated gradient over the ranks, so that with
    accumulation the first micro-batch counts several times. Here each micro-batch's own gradient is summed.
    """

    def install_forward(self, module: torch.nn.Module, mesh: Any) -> torch.nn.Module:
        forward, hooked = module.forward, set()

        def summed(gradient: torch.Tensor) -> torch.Tensor:
            gradient = gradient.clone()
            dist.all_reduce(gradient, group=mesh.get_group())
            return gradient

        def tp_forward(*arguments: Any, **keywords: Any) -> Any:
            # Only now, because loading replaces the parameters that the module has when the plan is applied.
            for parameter in module.parameters(recurse=False):
                if parameter.requires_grad and parameter not in hooked:
                    parameter.register_hook(summed)
                    hooked.add(parameter)
            return forward(*arguments, **keywords)

        module.forward = tp_forward
        return module


ALL_PARALLEL_STYLES.register("replicated_with_grad_allreduce", _SummedGradient())


def shard(
    build: Callable[[], PreTrainedModel],
    scratch: Path,
    tensor_parallel: int,
    attention: str,
    bf16: bool,
) -> PreTrainedModel:
    """The model of `build`, float32, sharded over all ranks; only rank 0 builds it whole.

    tensor_parallel: ranks that share each matrix; FSDP2 shards over the groups of so many ranks.
    scratch: a folder that all ranks see; the whole model is written there for a short time.
    bf16: FSDP2 gathers the weights in bf16 and reduces gradients in float32.
    Raises Refused for an architecture without a tensor parallel plan, or whose layers FSDP2 would not gather
    one by one.
    """
    # On a mesh of two dimensions every rank would warn twice that two collectives are slower than one.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    main, ranks = dist.get_rank() == 0, dist.get_world_size()
    if tensor_parallel > 1:
        # With symbolic sizes PyTorch 2.13 ends in a RecursionError. All blocks have one shape anyway.
        torch._dynamo.config.automatic_dynamic_shapes = False
    if main:
        build().save_pretrained(scratch)
    dist.barrier()
    config = DistributedConfig(
        tp_size=tensor_parallel,
        fsdp_size=ranks // tensor_parallel,
        fsdp_plan=FSDP_PLANS.get(AutoConfig.from_pretrained(scratch).model_type),
        fsdp_mixed_precision=bf16,
    )
    try:
        model = _load(scratch, config, attention)
    except ValueError as error:
        if "plan" not in str(error):
            raise
        raise Refused(f"model.json: this architecture cannot be sharded in this way: {error}") from error
    if ranks > tensor_parallel:
        _check_layers(model)
    dist.barrier()
    if main:
        shutil.rmtree(scratch)
    _save_tied_weights_once(model)
    return model


def _load(folder: Path, config: DistributedConfig, attention: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation=attention,
        use_safetensors=True,
        distributed_config=config,
    )


def _check_layers(model: PreTrainedModel) -> None:
    names = set(model._no_split_modules)
    # FSDP2 makes each class it shards a subclass, of another name.
    layers = [m for m in model.modules() if names & {parent.__name__ for parent in type(m).__mro__}]
    if not layers or not all(isinstance(layer, FSDPModule) for layer in layers):
        raise Refused(
            f"model.json, model_type {model.config.model_type!r}: --fsdp would gather all weights at once, "
            "because transformers does not know the names of the layers. Name them in FSDP_PLANS of "
            "recipe/model/sharding.py, or train with --deepspeed zero3"
        )


def _save_tied_weights_once(model: PreTrainedModel) -> None:
    """Leave a tied weight's second name out of what `save_pretrained` gathers, as it does unsharded."""
    gather = model.gather_sharded_state_dict_for_save

    def gather_once(*arguments: Any, **keywords: Any) -> dict[str, torch.Tensor]:
        weights = gather(*arguments, **keywords)
        return {name: value for name, value in weights.items() if name not in model.all_tied_weights_keys}

    model.gather_sharded_state_dict_for_save = gather_once


def sharded_over(model: torch.nn.Module) -> dict[str, int]:
    """Over how many ranks the weights are really split, by kind (``fsdp``, ``tp``); empty if they are not."""
    found: dict[str, int] = {}
    for weight in model.parameters():
        if isinstance(weight, DTensor):
            mesh = weight.device_mesh
            for name, size, placement in zip(
                mesh.mesh_dim_names or (), mesh.shape, weight.placements, strict=True
            ):
                if size > 1 and placement.is_shard():
                    found[name] = size
    return found


def written_under(checkpoint: Path) -> str:
    """The kind of parallelism whose optimizer state a checkpoint holds."""
    if (checkpoint / OPTIMIZER).is_dir():
        return SHARDED
    if any(checkpoint.glob(zero.SHARDS)):
        # Under ZeRO-3 each rank has a file of its own also for the weights.
        return ZERO[any(checkpoint.glob("global_step*/*zero_pp_rank_*_model_states.pt"))]
    return WHOLE


class ShardedTrainer(Trainer):
    """The stock Trainer; for a model of `shard` also with checkpoints that can be resumed, and on CPUs.

    A checkpoint is also read on another number of ranks, and under another kind of parallelism.
    """

    new_optimizer = False  # continue a checkpoint whose optimizer state these ranks cannot read, without it
    starts_anew = False  # that is what happens

    def __init__(self, model: PreTrainedModel, args: Any, **keywords: Any) -> None:
        self.sharded = model.is_distributed_loading_by_transformers
        save_only_model = args.save_only_model
        # The Trainer refuses to save optimizers of sharded models; the methods below save them.
        args.save_only_model = save_only_model or self.sharded
        super().__init__(model=model, args=args, **keywords)
        args.save_only_model = save_only_model

    def train(self, resume_from_checkpoint: str | None = None, **keywords: Any) -> Any:
        """Train; continue from a checkpoint with its optimizer state, or by `new_optimizer` without it.

        The Trainer would silently begin with a new optimizer. Raises RecipeError for an optimizer state that
        these ranks cannot read, and for a checkpoint that contains code, which is not run.
        """
        self.starts_anew = False
        if resume_from_checkpoint:
            self._choose_optimizer_state(Path(resume_from_checkpoint))
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **keywords)
        except pickle.UnpicklingError as error:
            reason = str(error).splitlines()[0]
            raise RecipeError(
                f"{resume_from_checkpoint}: a file in it holds more than tensors and numbers, so it is not "
                f"read. Delete this checkpoint, or start again with --force ({reason})"
            ) from error

    def _choose_optimizer_state(self, checkpoint: Path) -> None:
        """Set `starts_anew`: whether the training goes on without the optimizer state of a checkpoint."""
        if self.is_world_process_zero():
            shutil.rmtree(checkpoint.with_name(CONVERTED), ignore_errors=True)  # what a killed run has left
        found = written_under(checkpoint)
        if self.is_deepspeed_enabled:
            readable = [ZERO[self.accelerator.state.deepspeed_plugin.zero_stage == 3]]
        else:
            # FSDP2's form names each weight, so that one process and DDP read it, too.
            readable = [SHARDED] if self.sharded else [WHOLE, SHARDED]
        self.starts_anew = found not in readable
        if self.starts_anew and not self.new_optimizer:
            raise RecipeError(
                f"{checkpoint.name} was written under {found}; its optimizer state cannot be read under "
                f"{readable[0]}. Continue with the options of its first run (--deepspeed, --fsdp, "
                "--tensor-parallel). Or add --new-optimizer: weights, step, schedule and order of the data "
                "are kept, and the optimizer state is lost. Or start again with --force"
            )
        if not self.new_optimizer or not self.is_world_process_zero():
            return
        print(
            f"warning: --new-optimizer: {checkpoint.name} was written under {found}. Weights, step, schedule "
            f"and order of the data are kept; the optimizer state is lost and starts anew under {readable[0]}"
            if self.starts_anew
            else f"--new-optimizer has no effect: the optimizer state of {checkpoint.name} can be read",
            flush=True,
        )

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, checkpoint: str | None) -> Any:
        """Prepare model, optimizer and schedule, and load the checkpoint in the form that it has."""
        prepare = functools.partial(super()._prepare_for_training, max_steps, train_dataloader)
        if checkpoint and self.starts_anew:
            if self.is_deepspeed_enabled:
                # The other kinds of parallelism have done this before.
                self._load_from_checkpoint(checkpoint)
            prepared = prepare(None)
            self._load_optimizer_and_scheduler(checkpoint)
            return prepared
        ranks = zero.ranks_of(Path(checkpoint)) if checkpoint and self.is_deepspeed_enabled else None
        if ranks in (None, self.args.world_size):
            return prepare(checkpoint)
        return self._load_universal(Path(checkpoint), prepare)

    def _load_universal(self, checkpoint: Path, prepare: Callable[[str], Any]) -> Any:
        """Load a ZeRO checkpoint that another number of ranks has written."""
        if self.is_world_process_zero():
            ranks = zero.ranks_of(checkpoint)
            print(f"{checkpoint.name}: converts the ZeRO shards of {ranks} ranks", flush=True)
        settings = self.accelerator.state.deepspeed_plugin.hf_ds_config.config
        settings.setdefault("checkpoint", {})["load_universal"] = True
        with self._converted(checkpoint, zero.convert_to_universal) as folder:
            prepared = prepare(str(folder))
        engine = self.model_wrapped
        engine._config.load_universal_checkpoint = False
        # Under ZeRO-3 DeepSpeed 0.19 gives all groups the weight decay of the first, and one counter of
        # steps, which each group would increment.
        optimizer = engine.optimizer.optimizer
        for group, weight_decay in zip(optimizer.param_groups, self.weight_decays, strict=True):
            group["weight_decay"] = weight_decay
        for state in optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()
        return prepared

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Build the optimizer; the weight decay of its groups is kept for `_load_universal`."""
        optimizer = super().create_optimizer(model)
        self.weight_decays = [group["weight_decay"] for group in optimizer.param_groups]
        return optimizer

    @contextlib.contextmanager
    def _converted(self, checkpoint: Path, convert: Callable[[Path, Path], None]) -> Iterator[Path]:
        """A folder, written by rank 0 next to the checkpoint and deleted when all ranks have read it."""
        folder = checkpoint.with_name(CONVERTED)
        if self.is_world_process_zero():
            convert(checkpoint, folder)
        self.accelerator.wait_for_everyone()
        yield folder
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            shutil.rmtree(folder)

    def _build_accelerator_args(self, **keywords: Any) -> dict[str, Any]:
        arguments = super()._build_accelerator_args(**keywords)
        # On CPUs accelerate refuses a parallelism_config when it starts, and works with it when set later.
        self.cpu_parallelism = arguments.pop("parallelism_config", None) if self.args.use_cpu else None
        return arguments

    def create_accelerator_and_postprocess(self) -> None:
        """Tell accelerate, also on CPUs, about tensor parallel ranks, which read the same batches."""
        super().create_accelerator_and_postprocess()
        if self.cpu_parallelism:
            state = self.accelerator.state
            state.parallelism_config = self.cpu_parallelism
            state.device_mesh = self.cpu_parallelism.get_device_mesh("cpu")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        save_optimizer_distributed(self.model, self.optimizer.optimizer, f"{output_dir}/{OPTIMIZER}")
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        by_name = checkpoint and Path(checkpoint, OPTIMIZER).is_dir()
        if checkpoint is None or not (self.starts_anew or by_name):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        if not self.starts_anew:
            load_optimizer_distributed(self.model, self.optimizer.optimizer, f"{checkpoint}/{OPTIMIZER}")
        saved = torch.load(Path(checkpoint, SCHEDULER), weights_only=True)
        # Under tensor parallelism the optimizer has other groups; each keeps its own peak.
        self.lr_scheduler.load_state_dict(saved | {"base_lrs": self.lr_scheduler.base_lrs})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        checkpoint = Path(resume_from_checkpoint)
        if zero.ranks_of(checkpoint) and (checkpoint / "config.json").exists():
            tied = set(self.model.all_tied_weights_keys)
            with self._converted(checkpoint, functools.partial(zero.write_weights, tied=tied)) as folder:
                self._load_weights(folder, model)
        else:
            self._load_weights(checkpoint, model)

    def _load_weights(self, folder: Path, model: Any) -> None:
        if not self.sharded:
            with zero.gathered(self.model) if self.is_deepspeed_enabled else contextlib.nullcontext():
                super()._load_from_checkpoint(str(folder), model)
            return
        config = self.model.config
        saved = _load(folder, config.distributed_config, config._attn_implementation)
        with torch.no_grad():
            for mine, theirs in zip(self.model.parameters(), saved.parameters(), strict=True):
                mine.copy_(theirs)
