"""Checkpoints of DeepSpeed's ZeRO, read without code: by any number of ranks, or only their weights."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from recipe.project import RecipeError

SHARDS = "global_step*/*_optim_states.pt"


def load_without_code() -> None:
    """Let DeepSpeed read only tensors and plain values from its checkpoints: other pickles could run code.

    This also holds for its conversions below, as long as they run in this process.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    torch.serialization.add_safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address])


def ranks_of(checkpoint: Path) -> int:
    """By how many ranks a ZeRO checkpoint was written: each has one file of shards."""
    return len(list(checkpoint.glob(SHARDS)))


def convert_to_universal(checkpoint: Path, target: Path) -> None:
    """Write a ZeRO checkpoint in DeepSpeed's universal form: a file for each weight and each of its moments.

    target: a new folder. It also gets the small files next to the shards, as links. It needs 12 bytes of disk
    for each parameter, and as much again while it is written. Raises RecipeError for an optimizer that is not
    AdamW, whose state this form does not have.
    """
    from deepspeed.checkpoint import ds_to_universal

    load_without_code()
    (shards,) = {path.parent for path in checkpoint.glob(SHARDS)}
    (target / shards.name).mkdir(parents=True)
    for path in checkpoint.glob("*.pt"):
        (target / path.name).symlink_to(path.resolve())
    # One worker each: the work stays in this process.
    arguments = argparse.Namespace(
        input_folder=str(shards),
        output_folder=str(target / shards.name),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    missing = None
    try:
        with _silence():
            ds_to_universal.main(arguments)
    except KeyError as error:
        missing = error
    # An optimizer without any state is not an error there, but its float32 weights are left out.
    if missing or not any(target.glob("*/zero/*/exp_avg.pt")):
        raise RecipeError(
            f"{checkpoint.name}: DeepSpeed can change the number of ranks only for AdamW, and this optimizer "
            f"keeps no {missing or 'moments'}. Continue with {ranks_of(checkpoint)} ranks (--nproc)"
        ) from missing


def write_weights(checkpoint: Path, target: Path, tied: set[str]) -> None:
    """Write the float32 weights of a ZeRO checkpoint as a Hugging Face folder.

    They come from the shards: the ``model.safetensors`` next to them has the precision of the training. tied:
    names of weights that are stored under another name. target: a new folder.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    load_without_code()
    with _silence():
        weights = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint))
    target.mkdir()
    kept = {name: weight.contiguous() for name, weight in weights.items() if name not in tied}
    save_file(kept, target / "model.safetensors", {"format": "pt"})
    shutil.copy(checkpoint / "config.json", target)


def gathered(model: torch.nn.Module) -> contextlib.AbstractContextManager[None]:
    """Within it, rank 0 may change weights that ZeRO-3 has partitioned while the model was loaded."""
    import deepspeed

    parameters = [weight for weight in model.parameters() if hasattr(weight, "ds_id")]
    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0, enabled=bool(parameters))


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """DeepSpeed's converters print a line and draw a bar for each of their steps."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
