"""The schema of a recipe: every key, its default, what it means, and the rules between keys.

Closed: an unknown key is refused. Imports no torch.
"""

from speft_ds.config.data_config import DATA_USED_WITH, Columns, DataConfig, Source
from speft_ds.config.eval_config import EvalConfig
from speft_ds.config.mask_config import MASK_FILE, MASK_GOES_WITH, MASK_USED_WITH, NEEDS_DATA, MaskConfig
from speft_ds.config.model_config import HEAD
from speft_ds.config.optimizer_config import ADAMW, OPTIMIZER_USED_WITH, OptimizerConfig
from speft_ds.config.recipe import FIELDS, SECTIONS, Recipe
from speft_ds.config.section import divisors
from speft_ds.config.train_config import TrainConfig

__all__ = [
    "ADAMW",
    "DATA_USED_WITH",
    "FIELDS",
    "HEAD",
    "MASK_FILE",
    "MASK_GOES_WITH",
    "MASK_USED_WITH",
    "NEEDS_DATA",
    "OPTIMIZER_USED_WITH",
    "SECTIONS",
    "Columns",
    "Data",
    "Eval",
    "Mask",
    "Optimizer",
    "Recipe",
    "Source",
    "Train",
    "divisors",
]
