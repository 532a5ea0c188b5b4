"""Optimizers of our own: Muon for matrices with AdamW for the rest; and what weight decay applies to."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments

from recipe.config.settings import Settings
from recipe.model.build import dimensions, is_outer
from recipe.model.muon import orthogonalised, own_part
from recipe.project import Refused

# Muon's momentum rises from the first value to the second, evenly over so many steps, as in modded-nanogpt
# (Jordan et al., 2024): an average over more steps than there were yet would lag behind.
# tests/bench/ledger.md has what that is worth.
FIRST_MOMENTUM, MOMENTUM, MOMENTUM_STEPS = 0.85, 0.95, 300


def decayed(model: torch.nn.Module) -> list[str]:
    """The names of the parameters that weight decay applies to: matrices without the embeddings.

    Norms and biases are vectors. An embedding has no decay, even if it is tied to the output: its rows are
    rarely used, and decay would shrink them in between.
    """
    embeddings = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding)
        for parameter in module.parameters()
    }
    return [
        name
        for name, parameter in model.named_parameters()
        if dimensions(parameter) >= 2 and id(parameter) not in embeddings
    ]


def build_muon(model: torch.nn.Module, settings: Settings, arguments: TrainingArguments) -> MuonAdamW:
    """`MuonAdamW` by the keys of a training file.

    Raises Refused for a rate of the embeddings if the output shares them: of a published model that is known
    only here.
    """
    assert settings.muon_learning_rate is not None
    output = model.get_output_embeddings()
    if settings.embedding_learning_rate and output.weight is model.get_input_embeddings().weight:
        raise Refused(
            "embedding_learning_rate: this model's output shares the embeddings' matrix. Leave the key out"
        )
    return MuonAdamW(
        model,
        settings.muon_learning_rate,
        arguments.learning_rate,
        (arguments.adam_beta1, arguments.adam_beta2),
        arguments.adam_epsilon,
        arguments.weight_decay,
        settings.embedding_learning_rate,
    )


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the matrices inside the layers, AdamW for embeddings, output, norms and biases.

    The weights of a layer's experts are one parameter of three dimensions: each expert's matrix is
    orthogonalised on its own, gate and up projection as one, as transformers keeps them. A router's matrix
    has Muon, too, as in Moonlight (Liu et al., 2025).

    Muon (Jordan et al., 2024) orthogonalises a matrix's momentum, here with rows of equal length; its step is
    scaled to the size of AdamW's (Liu et al., 2025): 0.2 x the root of the longer side. Its momentum rises in
    the first `MOMENTUM_STEPS` steps. It is one object, because the Trainer, its scheduler and its checkpoints
    accept only one optimizer: the first group is Muon's, the others AdamW's. Matrices may be sharded, by
    FSDP2 or tensor parallelism (see `recipe.model.muon`).

    Embeddings that the output does not share may have a rate of their own, embedding_learning_rate
    (tests/bench/ledger.md has what that is worth).
    """

    def __init__(
        self,
        model: torch.nn.Module,
        muon_learning_rate: float,
        learning_rate: float,
        betas: tuple[float, float],
        epsilon: float,
        weight_decay: float,
        embedding_learning_rate: float | None = None,
    ) -> None:
        embeddings = model.get_input_embeddings().weight if embedding_learning_rate else None
        with_decay = set(decayed(model))
        matrices: list[torch.nn.Parameter] = []
        # By rate, weight decay, and whether ranks share the parameter: one kernel cannot update both kinds.
        others: dict[tuple[float, float, bool], list[torch.nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            if parameter.ndim >= 2 and not is_outer(name):
                matrices.append(parameter)
            else:
                rate = embedding_learning_rate if parameter is embeddings else None
                decay = weight_decay if name in with_decay else 0.0
                key = (rate or learning_rate, decay, isinstance(parameter, DTensor))
                others.setdefault(key, []).append(parameter)
        self.adamw = torch.optim.AdamW(
            [{"params": group, "lr": rate, "weight_decay": d} for (rate, d, _), group in others.items()],
            lr=learning_rate,
            betas=betas,
            eps=epsilon,
            fused=True,
        )
        muon = {
            "params": matrices,
            "lr": muon_learning_rate,
            "weight_decay": weight_decay,
            "momentum": FIRST_MOMENTUM,
        }
        # A scheduler with min_lr reads the peak from the defaults.
        super().__init__([muon, *self.adamw.param_groups], {"lr": learning_rate})
        self._share_states()

    def _share_states(self) -> None:
        """Let AdamW work on the groups and the states of this object."""
        self.adamw.param_groups, self.adamw.state = self.param_groups[1:], self.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One step of both; `closure` is not used."""
        group = self.param_groups[0]
        matrices = [parameter for parameter in group["params"] if parameter.grad is not None]
        updates = []
        for parameter in matrices:
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            momentum = state["momentum_buffer"]
            momentum.lerp_(parameter.grad, 1 - group["momentum"])
            updates.append(parameter.grad.lerp(momentum, group["momentum"]))
        # The group is saved with a checkpoint, and one of an earlier release has the last value.
        group["momentum"] = min(MOMENTUM, group["momentum"] + (MOMENTUM - FIRST_MOMENTUM) / MOMENTUM_STEPS)
        for parameter, update in zip(matrices, orthogonalised(updates), strict=True):
            rate = group["lr"] * 0.2 * math.sqrt(max(parameter.shape[-2:]))
            own = own_part(parameter)
            own.mul_(1 - group["lr"] * group["weight_decay"])
            own.add_(update, alpha=-rate)
        self.adamw.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, also of the release that had the states of both parts apart."""
        super().load_state_dict(_joined_parts(state_dict) if "parts" in state_dict else state_dict)
        self._share_states()


def _joined_parts(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The states of Muon and AdamW, saved as ``parts``, with one numbering of the parameters."""
    joined: dict[str, Any] = {"state": {}, "param_groups": []}
    before = 0
    for part in state_dict["parts"]:
        joined["state"] |= {before + number: state for number, state in part["state"].items()}
        for group in part["param_groups"]:
            joined["param_groups"].append(group | {"params": [before + n for n in group["params"]]})
        before += sum(len(group["params"]) for group in part["param_groups"])
    return joined
