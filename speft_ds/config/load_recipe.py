"""Recipes: one YAML file an experiment. Loading it, overrides, and every problem with its line.

Precedence: default < the recipe that it extends < YAML < `key.sub=value`. Every problem is collected and
shown at once. Imports no torch.
"""

from __future__ import annotations

import os
import reprlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pydantic
import yaml

from speft_ds.config.recipe import FIELDS, SECTIONS, Recipe
from speft_ds.env import expand_path
from speft_ds.errors import RecipeError, UserError, closest, did_you_mean, explain

ROOT = Path(__file__).resolve().parent.parent
RECIPES_DIR = ROOT / "recipes"
DS_CONFIGS_DIR = ROOT / "ds_configs"
EXTENDS = "extends"
_PAIRS = [
    ("train.steps", "train.epochs"),
    ("mask.density", "mask.num_trainable"),
    ("data.path", "data.mixture"),
]
EXCLUSIVE = {key: other for pair in _PAIRS for key, other in (pair, pair[::-1])}
# What other trainers call it -> our keys.
ELSEWHERE = {
    "learning_rate": ["optimizer.lr"],
    "batch_size": ["train.micro_batch", "train.global_batch"],
    "per_device_train_batch_size": ["train.micro_batch"],
    "micro_batch_size": ["train.micro_batch"],
    "global_batch_size": ["train.global_batch"],
    "gradient_accumulation_steps": ["train.global_batch"],
    "max_steps": ["train.steps"],
    "num_train_epochs": ["train.epochs"],
    "num_epochs": ["train.epochs"],
    "max_grad_norm": ["optimizer.clip_norm"],
    "gradient_clipping": ["optimizer.clip_norm"],
    "lr_scheduler_type": ["optimizer.schedule"],
    "gradient_checkpointing": ["train.activation_checkpointing"],
    "max_seq_length": ["data.max_length"],
    "cutoff_len": ["data.max_length"],
    "dataset": ["data.path"],
    "prompt_column": ["data.columns.prompt"],
    "response_column": ["data.columns.response"],
    "base_model": ["model.name_or_path"],
    "model_name_or_path": ["model.name_or_path"],
    "torch_dtype": ["model.dtype"],
    "bf16": ["model.dtype"],
    "fp16": ["model.dtype"],
    "sparsity": ["mask.density"],
    "target_modules": ["mask.targets"],
}
TOP_LEVEL = [EXTENDS, *(key for key in [*SECTIONS, *FIELDS] if "." not in key)]


@dataclass
class _Draft:
    """A recipe on its way in: values by key, where each came from, and what is wrong so far."""

    leaves: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    problems: list[UserError] = field(default_factory=list)

    def under(self, later: _Draft) -> _Draft:
        """This draft with a later one on top: one that extends it, or the command line.

        Where the later one gives one of two keys that exclude each other, the other is set aside here.
        """
        set_aside = {
            EXCLUSIVE[key] for key, value in later.leaves.items() if key in EXCLUSIVE and value is not None
        }
        leaves = {key: value for key, value in self.leaves.items() if key not in set_aside}
        sources = {key: where for key, where in self.sources.items() if key not in set_aside}
        return _Draft(leaves | later.leaves, sources | later.sources, self.problems + later.problems)

    def nested(self) -> dict[str, Any]:
        """The values as the schema reads them; a section without values is all defaults."""
        tree: dict[str, Any] = {}
        for key in SECTIONS:
            _section(tree, key)
        for key, value in self.leaves.items():
            section, _, leaf = key.rpartition(".")
            _section(tree, section)[leaf] = value
        return tree


def _section(tree: dict[str, Any], key: str) -> dict[str, Any]:
    for part in key.split(".") if key else ():
        tree = tree.setdefault(part, {})
    return tree


def list_recipes() -> list[str]:
    """The names of the recipes that come with the repository."""
    return sorted(path.stem for path in RECIPES_DIR.glob("*.yaml"))


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe by name or path, apply `key.sub=value` overrides, and check it. Raises RecipeError."""
    path = find_recipe(name_or_path)
    return _checked(_read_yaml(path).under(_read_overrides(overrides)), path.stem, shown(path))


def recipe_of(name: str, overrides: Sequence[str]) -> Recipe:
    """A recipe of `key.sub=value` texts alone, with a name. Raises RecipeError."""
    return _checked(_read_overrides(overrides), name, "command line")


def _checked(draft: _Draft, name: str, where: str) -> Recipe:
    if draft.leaves.get("output_dir") is None:
        draft.leaves["output_dir"] = f"runs/{name}"
        draft.sources.pop("output_dir", None)  # null chooses nothing
    try:
        values = {**draft.nested(), "name": name}
        recipe = Recipe.model_validate(values, context={"given": draft.sources})
    except pydantic.ValidationError as failed:
        draft.problems += [explain(e, draft.sources, where, FIELDS) for e in failed.errors()]
    if draft.problems:
        raise RecipeError(draft.problems, f"recipe {name}")
    recipe._sources = draft.sources
    return recipe


def for_scoring(recipe: Recipe) -> Recipe:
    """The recipe as `speft score` runs it: the default run folder is runs/<recipe>-score-<salience>.

    Raises:
        UserError: the recipe loads a mask, which leaves nothing to score.
    """
    if recipe.mask.load is not None:
        where = recipe.where("mask.load")
        raise UserError("mask.load leaves nothing to score: it is a finished mask", where, "mask.load=null")
    if "output_dir" in recipe._sources:
        return recipe
    return recipe.model_copy(update={"output_dir": f"runs/{recipe.name}-score-{recipe.mask.salience}"})


def without_training(recipe: Recipe, world_size: int) -> Recipe:
    """The recipe with a global batch that suits any number of ranks, for jobs that train nothing."""
    train = recipe.train.model_copy(update={"global_batch": world_size, "micro_batch": 1})
    return recipe.model_copy(update={"train": train})


def resolved_yaml(recipe: Recipe) -> str:
    """The recipe with every default filled in, as YAML that loads again."""
    return yaml.safe_dump(recipe.model_dump(mode="json", exclude={"name"}), sort_keys=False)


def shown(path: Path) -> str:
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def find_recipe(name_or_path: str, beside: Path | None = None, where: str | None = None) -> Path:
    """The file of a recipe.

    Args:
        beside: the folder of the recipe that extends it, at which a path starts.
        where: the line that says so.
    """
    path = Path(expand_path(name_or_path))
    if path.suffix not in (".yaml", ".yml") and "/" not in name_or_path:
        path = RECIPES_DIR / f"{name_or_path}.yaml"
        if not path.is_file():
            fix = did_you_mean(name_or_path, list_recipes())
            missing = UserError(f"there is no recipe {name_or_path!r}", where or shown(RECIPES_DIR), fix)
            raise RecipeError([missing], "recipe")
    elif beside is not None and not (beside / path).is_file():
        fix = "a path starts at the folder of the recipe that extends it; a name is looked for in recipes/"
        raise RecipeError([UserError(f"no recipe file {name_or_path}", where, fix)], "recipe")
    return beside / path if beside else path


def _read_yaml(path: Path, extended_by: tuple[Path, ...] = ()) -> _Draft:
    """What the file says, on top of the recipe that it extends. YAML nodes know their lines."""
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        fix = "name a recipe of recipes/ (speft ls), or the path of a YAML file"
        raise RecipeError([UserError(f"cannot read the recipe: {error.strerror}", str(path), fix)]) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{shown(path)}:{mark.line + 1}" if mark else shown(path)
        what = f"not readable as YAML: {getattr(error, 'problem', None) or error}"
        fix = "indent with spaces, put a space after each colon, quote text that holds : # * or {"
        raise RecipeError([UserError(what, where, fix)], f"recipe {path.stem}") from None
    if not isinstance(root, yaml.MappingNode):
        what = "the recipe is empty" if root is None else "the top level must be keys, like `model:`"
        fix = "start from one that works: speft cp quickstart my_recipe.yaml"
        raise RecipeError([UserError(what, shown(path), fix)], f"recipe {path.stem}")
    own = _Draft()
    _read_section(root, "", path, own)
    return _extended(root, path, extended_by).under(own)


def _extended(root: yaml.MappingNode, path: Path, extended_by: tuple[Path, ...]) -> _Draft:
    """The recipe that this one extends, by name or by a path that starts at this file; or nothing."""
    found = [(key, value) for key, value in root.value if key.value == EXTENDS]
    if not found:
        return _Draft()
    key, value = found[-1]
    where = f"{shown(path)}:{key.start_mark.line + 1} ({EXTENDS})"
    if len(found) > 1 or not isinstance(value, yaml.ScalarNode) or value.value in ("", "null", "~"):
        fix = f"once, like {EXTENDS}: quickstart, or {EXTENDS}: ./other.yaml"
        raise RecipeError([UserError(f"{EXTENDS} names one recipe", where, fix)], f"recipe {path.stem}")
    base = find_recipe(value.value, path.parent, where)
    chain = (*extended_by, path)
    if base.resolve() in [file.resolve() for file in chain]:
        what = f"{value.value} extends itself, by way of {' > '.join(file.name for file in chain)}"
        raise RecipeError([UserError(what, where, f"remove one {EXTENDS}")], f"recipe {path.stem}")
    return _read_yaml(base, chain)


def _read_section(section: yaml.MappingNode, prefix: str, path: Path, draft: _Draft) -> None:
    for key, node in _known_keys(section, prefix, path, draft):
        if key not in SECTIONS:
            _note_lines(node, key, path, draft)
            draft.leaves[key] = _value(node, key, draft)
        elif isinstance(node, yaml.MappingNode):
            _read_section(node, f"{key}.", path, draft)
        elif (value := _value(node, key, draft)) is not None:  # empty is all defaults
            what = f"{key} must be a section, not {reprlib.repr(value)}"
            draft.problems.append(UserError(what, draft.sources[key], "indent its keys below it"))


def _known_keys(
    node: yaml.MappingNode, prefix: str, path: Path, draft: _Draft
) -> Iterator[tuple[str, yaml.Node]]:
    """The known keys of one level, noting their lines; unknown and repeated ones become problems."""
    for key_node, value in node.value:
        written = key_node.value if isinstance(key_node, yaml.ScalarNode) else "(a list or mapping)"
        key = f"{prefix}{written}"
        where = f"{shown(path)}:{key_node.start_mark.line + 1} ({key})"
        if key == EXTENDS:
            continue
        if "." in written or (key not in FIELDS and key not in SECTIONS):
            draft.problems.append(_unknown_key(key, where))
        elif key in draft.sources:
            fix = f"keep this one or {draft.sources[key]}"
            draft.problems.append(UserError(f"{key} is set twice", where, fix))
        else:
            draft.sources[key] = where
            yield key, value


def _note_lines(node: yaml.Node, key: str, path: Path, draft: _Draft) -> None:
    """Note where the parts of a list of mappings stand: `data.mixture[0].path`."""
    if isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            _note_lines(item, f"{key}[{number}]", path, draft)
    elif isinstance(node, yaml.MappingNode):
        for key_node, value in node.value:
            inner = f"{key}.{key_node.value}"
            draft.sources[inner] = f"{shown(path)}:{key_node.start_mark.line + 1} ({inner})"
            _note_lines(value, inner, path, draft)


def _value(node: yaml.Node, key: str, draft: _Draft) -> Any:
    try:
        return yaml.SafeLoader("").construct_object(node, deep=True)
    except (yaml.YAMLError, ValueError) as error:
        what = f"{key} cannot be read: {getattr(error, 'problem', None) or error}"
        draft.problems.append(UserError(what, draft.sources[key], "quote the value if it is text"))
        return None


def _unknown_key(key: str, where: str) -> UserError:
    section, _, leaf = key.rpartition(".")
    if key in FIELDS:  # right name, wrong form: `mask.density: 0.1` in the YAML
        fix = f"nest it: `{section}:`, and below it `  {leaf}: ...`"
        return UserError(f"{key} is not a YAML key", where, fix)
    if key == "name":
        return UserError("name is not a key", where, "a recipe's name is its file's name: rename the file")
    everything = [*SECTIONS, *FIELDS]
    siblings = [k for k in everything if k.rpartition(".")[0] == section]
    same_name = [k for k in everything if _leaf(k) == leaf] or ELSEWHERE.get(leaf, [])
    if guesses := same_name or _alike(leaf, siblings) or _alike(leaf, everything, cutoff=0.8):
        return UserError(f"unknown key {key}", where, f"did you mean {' or '.join(guesses)}?")
    return UserError(f"unknown key {key}", where, f"choose from: {', '.join(siblings or TOP_LEVEL)}")


def _leaf(key: str) -> str:
    return key.rpartition(".")[2]


def _alike(leaf: str, keys: list[str], cutoff: float = 0.6) -> list[str]:
    close = closest(leaf, map(_leaf, keys), cutoff)
    return [k for k in keys if _leaf(k) in close]


def _read_overrides(overrides: Sequence[str]) -> _Draft:
    draft = _Draft()
    for text in overrides:
        key, equals, written = text.partition("=")
        where = f"command line: {text}"
        if not equals:
            draft.problems.append(UserError(f"{text!r} is not key=value", where, "like optimizer.lr=1e-3"))
        elif key == EXTENDS:
            fix = f"write it into a file: speft cp RECIPE mine.yaml, then {text.replace('=', ': ', 1)}"
            draft.problems.append(UserError(f"{EXTENDS} belongs in the recipe's file", where, fix))
        elif key in SECTIONS:
            fix = f"set its keys one by one, like {next(k for k in FIELDS if k.startswith(key + '.'))}=..."
            draft.problems.append(UserError(f"{key} is a section", where, fix))
        elif key not in FIELDS:
            draft.problems.append(_unknown_key(key, where))
        else:
            draft.sources[key] = where
            _set(key, written, draft)
    return draft


def _set(key: str, written: str, draft: _Draft) -> None:
    try:
        value = yaml.safe_load(written)
    except (yaml.YAMLError, ValueError):
        fix = f"""quote it twice, for the shell and for YAML: {key}='"{written}"'"""
        what = f"{key}: {written!r} is not readable as YAML"
        draft.problems.append(UserError(what, draft.sources[key], fix))
        return
    draft.leaves[key] = value
