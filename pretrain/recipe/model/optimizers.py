"""Optimizers of our own: Muon for matrices with AdamW for the rest; and what weight decay applies to."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainingArguments

from recipe.config.settings import Settings
from recipe.model.build import dimensions, is_outer


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
    """`MuonAdamW` by the keys of a training file."""
    assert settings.muon_learning_rate is not None
    return MuonAdamW(
        model,
        settings.muon_learning_rate,
        arguments.learning_rate,
        (arguments.adam_beta1, arguments.adam_beta2),
        arguments.adam_epsilon,
        arguments.weight_decay,
    )


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the matrices inside the layers, AdamW for embeddings, output, norms and biases.

    Muon (Jordan et al., 2024) orthogonalises a matrix's momentum; ``match_rms_adamw`` (Liu et al., 2025)
    scales its step to the size of AdamW's. It is one object, because the Trainer, its scheduler and its
    checkpoints accept only one optimizer.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        muon_learning_rate: float,
        learning_rate: float,
        betas: tuple[float, float],
        epsilon: float,
        weight_decay: float,
    ) -> None:
        with_decay = set(decayed(model))
        matrices: list[torch.nn.Parameter] = []
        others: dict[float, list[torch.nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            if parameter.ndim == 2 and not is_outer(name):
                matrices.append(parameter)
            else:
                others.setdefault(weight_decay if name in with_decay else 0.0, []).append(parameter)
        self.parts = [
            torch.optim.Muon(
                matrices,
                lr=muon_learning_rate,
                momentum=0.95,
                weight_decay=weight_decay,
                adjust_lr_fn="match_rms_adamw",
            ),
            torch.optim.AdamW(
                [{"params": group, "weight_decay": decay} for decay, group in others.items()],
                lr=learning_rate,
                betas=betas,
                eps=epsilon,
                fused=True,
            ),
        ]
        # The same groups as in the parts: the scheduler writes its learning rates into them. A scheduler with
        # min_lr reads the peak from the defaults.
        groups = [group for part in self.parts for group in part.param_groups]
        super().__init__(groups, {"lr": learning_rate})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One step of both optimizers."""
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """The states of both parts, in one dict."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]
