"""Recipes: one YAML file an experiment. Loading it, overrides, and every problem with its line.

Precedence: default < YAML < `key.sub=value`. Every problem is collected and shown at once. Imports no torch.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pydantic
import yaml

from speft_ds.errors import RecipeError, UserError, closest, did_you_mean, explain
from speft_ds.schema import FIELDS, SECTIONS, Recipe, expand_path

ROOT = Path(__file__).resolve().parent.parent
RECIPES_DIR = ROOT / "recipes"
DS_CONFIGS_DIR = ROOT / "ds_configs"


@dataclass
class _Draft:
    """A recipe on its way in: plain values, where each came from, and what is wrong so far."""

    data: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    problems: list[UserError] = field(default_factory=list)


def list_recipes() -> list[str]:
    """The names of the recipes that come with the repository."""
    return sorted(path.stem for path in RECIPES_DIR.glob("*.yaml"))


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe by name or path, apply `key.sub=value` overrides, and check it. Raises RecipeError."""
    path = _find_recipe(name_or_path)
    draft = _Draft()
    _read_yaml(path, draft)
    _apply_overrides(overrides, draft)
    for section in SECTIONS:  # a section that is absent or empty is all defaults
        draft.data[section] = {} if draft.data.get(section) is None else draft.data[section]
    draft.data["name"] = path.stem
    if draft.data.get("output_dir") is None:
        draft.data["output_dir"] = f"runs/{path.stem}"
        draft.sources.pop("output_dir", None)  # null chooses nothing
    try:
        recipe = Recipe.model_validate(draft.data, context={"given": draft.sources})
    except pydantic.ValidationError as failed:
        draft.problems += [explain(e, draft.sources, shown(path), FIELDS) for e in failed.errors()]
    if draft.problems:
        raise RecipeError(draft.problems, f"recipe {path.stem}")
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


def resolved_yaml(recipe: Recipe) -> str:
    """The recipe with every default filled in, as YAML that loads again."""
    return yaml.safe_dump(recipe.model_dump(mode="json", exclude={"name"}), sort_keys=False)


def start_folder(recipe: Recipe) -> None:
    """Make the run folder, with the resolved recipe in it."""
    folder = Path(recipe.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(resolved_yaml(recipe), encoding="utf-8")


def shown(path: Path) -> str:
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def _find_recipe(name_or_path: str) -> Path:
    path = Path(expand_path(name_or_path))
    if path.suffix not in (".yaml", ".yml") and "/" not in name_or_path:
        path = RECIPES_DIR / f"{name_or_path}.yaml"
        if not path.is_file():
            fix = did_you_mean(name_or_path, list_recipes())
            missing = UserError(f"there is no recipe {name_or_path!r}", shown(RECIPES_DIR), fix)
            raise RecipeError([missing], "recipe")
    return path


def _read_yaml(path: Path, draft: _Draft) -> None:
    """Fill the draft from the file. Goes by the YAML nodes, which know their lines."""
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise RecipeError([UserError(f"cannot read the recipe: {error.strerror}", str(path))]) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{shown(path)}:{mark.line + 1}" if mark else shown(path)
        what = f"not readable as YAML: {getattr(error, 'problem', None) or error}"
        fix = "indent with spaces, put a space after each colon, quote text that holds : # * or {"
        raise RecipeError([UserError(what, where, fix)], f"recipe {path.stem}") from None
    if not isinstance(root, yaml.MappingNode):
        what = "the recipe is empty" if root is None else "the top level must be keys, like `model:`"
        fix = "start from one that works: speft show quickstart > my_recipe.yaml"
        raise RecipeError([UserError(what, shown(path), fix)], f"recipe {path.stem}")
    for key, node in _known_keys(root, "", path, draft):
        if key in SECTIONS and isinstance(node, yaml.MappingNode):
            leaves = _known_keys(node, f"{key}.", path, draft)
            draft.data[key] = {leaf.partition(".")[2]: _value(n, leaf, draft) for leaf, n in leaves}
        else:
            draft.data[key] = _value(node, key, draft)


def _known_keys(
    node: yaml.MappingNode, prefix: str, path: Path, draft: _Draft
) -> Iterator[tuple[str, yaml.Node]]:
    """The known keys of one level, noting their lines; unknown and repeated ones become problems."""
    for key_node, value in node.value:
        written = key_node.value if isinstance(key_node, yaml.ScalarNode) else "(a list or mapping)"
        key = f"{prefix}{written}"
        where = f"{shown(path)}:{key_node.start_mark.line + 1} ({key})"
        if "." in written or (key not in FIELDS and key not in SECTIONS):
            draft.problems.append(_unknown_key(key, where))
        elif key in draft.sources:
            fix = f"keep this one or {draft.sources[key]}"
            draft.problems.append(UserError(f"{key} is set twice", where, fix))
        else:
            draft.sources[key] = where
            yield key, value


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
    same_name = [k for k in everything if _leaf(k) == leaf]
    if guesses := same_name or _alike(leaf, siblings) or _alike(leaf, everything):
        return UserError(f"unknown key {key}", where, f"did you mean {' or '.join(guesses)}?")
    return UserError(f"unknown key {key}", where, f"choose from: {', '.join(siblings or SECTIONS)}")


def _leaf(key: str) -> str:
    return key.rpartition(".")[2]


def _alike(leaf: str, keys: list[str]) -> list[str]:
    close = closest(leaf, map(_leaf, keys))
    return [k for k in keys if _leaf(k) in close]


def _apply_overrides(overrides: Sequence[str], draft: _Draft) -> None:
    for text in overrides:
        key, equals, written = text.partition("=")
        where = f"command line: {text}"
        if not equals:
            draft.problems.append(UserError(f"{text!r} is not key=value", where, "like optimizer.lr=1e-3"))
        elif key in SECTIONS:
            fix = f"set its keys one by one, like {next(k for k in FIELDS if k.startswith(key + '.'))}=..."
            draft.problems.append(UserError(f"{key} is a section", where, fix))
        elif key not in FIELDS:
            draft.problems.append(_unknown_key(key, where))
        else:
            draft.sources[key] = where
            _set(key, written, draft)


def _set(key: str, written: str, draft: _Draft) -> None:
    try:
        value = yaml.safe_load(written)
    except (yaml.YAMLError, ValueError):
        fix = f"""quote it twice, for the shell and for YAML: {key}='"{written}"'"""
        what = f"{key}: {written!r} is not readable as YAML"
        draft.problems.append(UserError(what, draft.sources[key], fix))
        return
    section, _, leaf = key.rpartition(".")
    if not section:
        draft.data[leaf] = value
    elif isinstance(draft.data.get(section), dict | None):
        draft.data[section] = (draft.data.get(section) or {}) | {leaf: value}
