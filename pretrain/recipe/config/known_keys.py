"""JSON types of a dataclass's fields, and ``known_keys.json``, the keys that the installed libraries accept.

Run this after changing a version in requirements.txt:  python -m recipe.config.known_keys
"""

from __future__ import annotations

import dataclasses
import enum
import json
import types
import typing
from pathlib import Path
from typing import Any

MODEL_TYPES = ("mistral", "llama", "qwen2", "qwen3", "olmo2", "gemma3_text", "qwen3_moe", "gpt2", "gpt_neox")
# Keys that transformers writes into a config.json in addition to those of the config class.
WRITTEN_MODEL_KEYS = {
    "model_type": "str",
    "architectures": "list|null",
    "dtype": "str|null",
    "transformers_version": "str",
    "rope_theta": "float",
}
# Keys that a model reads without being a field of its config class.
MORE_MODEL_KEYS = {"qwen3_moe": {"head_dim": "int"}}
# The top level of a DeepSpeed file (deepspeed.ai/docs/config-json); the nested sections are read from the
# library.
DEEPSPEED_TOP = {
    "train_batch_size": "int|str",
    "train_micro_batch_size_per_gpu": "int|str",
    "gradient_accumulation_steps": "int|str",
    "gradient_clipping": "float|str",
    "steps_per_print": "int|float|str",
    "wall_clock_breakdown": "bool",
    "zero_optimization": "dict",
    "bf16": "dict",
    "fp16": "dict",
    "activation_checkpointing": "dict",
    "communication_data_type": "str",
    "prescale_gradients": "bool",
    "gradient_predivide_factor": "float",
    "dump_state": "bool",
    "comms_logger": "dict",
    "flops_profiler": "dict",
    "tensorboard": "dict",
    "checkpoint": "dict",
    "aio": "dict",
    "zero_allow_untested_optimizer": "bool",
    "zero_force_ds_cpu_optimizer": "bool",
    "data_types": "dict",
}


def json_types(annotation: Any) -> str:
    """The JSON types that a Python annotation accepts, separated by ``|``; ``any`` where they are unclear.

    ``Annotated[Any, TYPE]`` accepts what TYPE accepts.
    """
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        found = {part for a in typing.get_args(annotation) for part in json_types(a).split("|")}
        return "any" if "any" in found else "|".join(sorted(found, key=lambda kind: (kind == "null", kind)))
    if origin is typing.Literal:
        return "|".join(sorted({json_types(type(a)) for a in typing.get_args(annotation)}))
    if origin is typing.Annotated:
        first, *more = typing.get_args(annotation)
        return json_types(more[0] if first is Any else first)
    if origin in (list, tuple):
        return "list"
    if origin is dict:
        return "dict"
    plain = {
        int: "int",
        float: "float",
        bool: "bool",
        str: "str",
        list: "list",
        dict: "dict",
        type(None): "null",
    }
    if annotation in plain:
        return plain[annotation]
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return "str"
    return "any"


def fields_of(cls: type) -> dict[str, str]:
    """JSON types of a dataclass's fields, without private ones."""
    try:
        hints = typing.get_type_hints(cls, include_extras=True)
    except NameError:  # an annotation that only type checkers can resolve
        hints = {field.name: field.type for field in dataclasses.fields(cls)}
    return {
        field.name: json_types(hints[field.name]) for field in dataclasses.fields(cls) if field.name[0] != "_"
    }


def scheduler_options() -> dict[str, list[str]]:
    """The keys that each learning rate schedule accepts in ``lr_scheduler_kwargs``.

    Schedules that accept any key are not in it.
    """
    import inspect

    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

    # What get_scheduler gives by itself.
    given = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    options = {
        kind.value: sorted(set(inspect.signature(function).parameters) - given)
        for kind, function in TYPE_TO_SCHEDULER_FUNCTION.items()
    }
    return {kind: keys for kind, keys in options.items() if "kwargs" not in keys}


def matrices(kind: str) -> list[str]:
    """The paths of the matrices in a model of one layer: what an adapter (LoRA) can be added to."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "vocab_size": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **heads))
    kinds = ("Linear", "Embedding", "Conv1D")
    return [path for path, module in model.named_modules() if type(module).__name__ in kinds]


def table() -> dict[str, Any]:
    """The whole table, as it is written to known_keys.json."""
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from transformers import CONFIG_MAPPING, GenerationConfig, TrainingArguments
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    def pydantic_fields(cls: Any) -> dict[str, str]:
        keys = list(cls.model_fields) + [f.alias for f in cls.model_fields.values() if f.alias]
        return dict.fromkeys(sorted(keys), "any")

    training = fields_of(TrainingArguments)
    return {
        "training_arguments": training,
        "choices": {
            "optim": sorted(name.value for name in OptimizerNames),
            "lr_scheduler_type": sorted(name.value for name in SchedulerType),
        },
        "scheduler_options": scheduler_options(),
        "boards": sorted(INTEGRATION_TO_CALLBACK),
        "generation": sorted(key for key in GenerationConfig().to_dict() if key[0] != "_"),
        "model": {
            kind: fields_of(CONFIG_MAPPING[kind]) | WRITTEN_MODEL_KEYS | MORE_MODEL_KEYS.get(kind, {})
            for kind in MODEL_TYPES
        },
        "matrices": {kind: matrices(kind) for kind in MODEL_TYPES},
        "deepspeed": {
            "top": DEEPSPEED_TOP,
            "zero_optimization": pydantic_fields(DeepSpeedZeroConfig),
            "bf16": pydantic_fields(DeepSpeedBF16Config),
            "fp16": pydantic_fields(DeepSpeedFP16Config) | {"auto_cast": "bool"},
        },
    }


if __name__ == "__main__":
    path = Path(__file__).with_name("known_keys.json")
    path.write_text(json.dumps(table(), indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(f"wrote {path}")
