"""The schema of a recipe: every key, its default, what it means, and the rules between keys.

Closed: an unknown key is refused. Imports no torch.
"""

from speft_ds.schema.data import DATA_USED_WITH, Columns, Data, Source
from speft_ds.schema.mask import MASK_FILE, MASK_GOES_WITH, MASK_USED_WITH, NEEDS_DATA, Mask
from speft_ds.schema.recipe import FIELDS, SECTIONS, Recipe
from speft_ds.schema.sections import ADAMW, HEAD, OPTIMIZER_USED_WITH, Eval, Optimizer, Train
from speft_ds.schema.values import divisors, template_fields

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
    "template_fields",
]
