"""Models, settings and recipes that the tests of memory and preflight share."""

from recipe.config.recipe import load_recipe
from recipe.project import CONFIGS
from recipe.run.memory import Setting

SMALL = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4}
SHIPPED = sorted(path.parent.name for path in CONFIGS.glob("*/model.json"))
PLAIN = Setting("cuda", 1, 1024, 4, 1, "bf16", False, False, "adamw_torch_fused")


def read(recipe, file):
    """A file of a shipped recipe, as the stages see it."""
    return load_recipe(recipe)[file]
