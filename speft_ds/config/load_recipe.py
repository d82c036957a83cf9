"""Loading a recipe: YAML, `extends`, `key=value` overrides, and every problem with its line.

Precedence: default < the recipe that it extends < YAML < `key.sub=value`. Every problem is collected and
shown at once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pydantic
import yaml

from speft_ds.config import limited_yaml
from speft_ds.config.method_config import WITH_MASK
from speft_ds.config.recipe import FIELDS, SECTIONS, Recipe
from speft_ds.config.section import InPlaceOf, rules_of
from speft_ds.env import expand_path
from speft_ds.errors import RecipeError, UserError, closest, did_you_mean, explain
from speft_ds.untrusted import without_secrets

ROOT = Path(__file__).resolve().parents[2]
RECIPES_DIR = ROOT / "recipes"
EXTENDS = "extends"
EXCLUSIVE = {}  # key -> the one that takes its place, or whose place it takes
for _key, _field in FIELDS.items():
    for _rule in rules_of(_field):
        if isinstance(_rule, InPlaceOf):
            _other = f"{_key.partition('.')[0]}.{_rule.other}"
            EXCLUSIVE |= {_key: _other, _other: _key}
# Our key -> what other trainers call it.
ELSEWHERE = {
    "data.columns.prompt": ("prompt_column",),
    "data.columns.response": ("response_column",),
    "data.max_length": ("max_seq_length", "cutoff_len"),
    "data.path": ("dataset",),
    "mask.density": ("sparsity",),
    "mask.targets": ("target_modules",),
    "method.alpha": ("lora_alpha",),
    "method.rank": ("lora_r", "lora_rank"),
    "model.dtype": ("torch_dtype", "bf16", "fp16"),
    "model.name_or_path": ("base_model", "model_name_or_path"),
    "optimizer.clip_norm": ("max_grad_norm", "gradient_clipping"),
    "optimizer.lr": ("learning_rate",),
    "optimizer.schedule": ("lr_scheduler_type",),
    "train.activation_checkpointing": ("gradient_checkpointing",),
    "train.epochs": ("num_train_epochs", "num_epochs"),
    "train.global_batch": ("global_batch_size", "gradient_accumulation_steps", "batch_size"),
    "train.micro_batch": ("per_device_train_batch_size", "micro_batch_size", "batch_size"),
    "train.steps": ("max_steps",),
}


@dataclass
class Draft:
    """A recipe on its way in: values by key in full, where each was set, and what is wrong so far."""

    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    problems: list[UserError] = field(default_factory=list)

    def under(self, later: Draft) -> Draft:
        """This draft with a later one on top, whose keys set aside those here that they exclude."""
        aside = {EXCLUSIVE.get(key) for key, value in later.values.items() if value is not None}
        if later.values.get("method.name", "sparse") not in WITH_MASK:
            aside |= {key for key in self.values if key.startswith("mask.")}
        values = {key: value for key, value in self.values.items() if key not in aside}
        sources = {key: where for key, where in self.sources.items() if key not in aside}
        return Draft(values | later.values, sources | later.sources, self.problems + later.problems)

    def nested(self) -> dict[str, Any]:
        """The values of known keys as pydantic reads them; a section without values is all defaults."""
        sections: dict[str, dict[str, Any]] = {"": {}}
        for key in [*SECTIONS, *(key for key in self.values if key in FIELDS)]:
            section, _, leaf = key.rpartition(".")
            sections[section][leaf] = sections.setdefault(key, {}) if key in SECTIONS else self.values[key]
        return sections[""]


def list_recipes() -> list[str]:
    """The names of the recipes that come with the repository."""
    return sorted(path.stem for path in RECIPES_DIR.glob("*.yaml"))


def load_recipe(
    name_or_path: str,
    overrides: Sequence[str] = (),
    name: str | None = None,
    given_by: Mapping[str, str] | None = None,
) -> Recipe:
    """Read a recipe by name or path, apply `key.sub=value` overrides, and check it.

    Args:
        name: None: its file's.
        given_by: key -> where its override is written; the others are of the command line.
    Raises:
        RecipeError: all its problems.
    """
    path, given = find_recipe(name_or_path), _read_overrides(overrides)
    given.sources |= given_by or {}
    return _checked(_read_yaml(path).under(given), name or path.stem, shown(path))


def recipe_of(name: str, overrides: Sequence[str]) -> Recipe:
    """A recipe of `key.sub=value` texts alone, with a name. Raises RecipeError."""
    return _checked(_read_overrides(overrides), name, "command line")


def _checked(draft: Draft, name: str, file: str) -> Recipe:
    unknown = [key for key in draft.values if key not in FIELDS]
    problems = draft.problems + [_unknown_key(key, draft.sources.get(key, file)) for key in unknown]
    secret = [key for key, value in draft.values.items() if _has_secret(value)]
    problems += [_secret(key, draft.sources.get(key, file)) for key in secret]
    if draft.values.get("output_dir") is None:
        draft.values["output_dir"] = f"runs/{name}"
        draft.sources.pop("output_dir", None)  # null chooses nothing
    try:
        values = {**draft.nested(), "name": name}
        recipe = Recipe.model_validate(values, context={"given": draft.sources})
    except pydantic.ValidationError as failed:
        problems += [explain(error, draft.sources, file, FIELDS) for error in failed.errors()]
    if problems:
        raise RecipeError(problems, f"recipe {name}")
    recipe._sources = draft.sources
    return recipe


def _has_secret(value: Any) -> bool:
    text = repr(value)
    return without_secrets(text) != text


def _secret(key: str, where: str) -> UserError:
    fix = "hf auth login, or export HF_TOKEN: what a recipe says is in checkpoints and adapters, too"
    return UserError(f"{key} has a password or a token in it", where, fix)


def resolved_yaml(recipe: Recipe) -> str:
    """The recipe with every default filled in, as YAML that loads again."""
    exclude = {"name"} if recipe.method.has_mask else {"name", "mask"}
    return yaml.safe_dump(recipe.model_dump(mode="json", exclude=exclude), sort_keys=False)


def shown(path: Path) -> str:
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def is_path(name_or_path: str) -> bool:
    """Whether a recipe is named by its file's path, and not by its name in recipes/."""
    return name_or_path.endswith((".yaml", ".yml")) or "/" in name_or_path


def find_recipe(name_or_path: str, beside: Path | None = None, where: str | None = None) -> Path:
    """The file of a recipe; of one that is extended `beside` a folder, by the line `where`.

    Raises:
        RecipeError: there is none of this name, or none that could be extended.
    """
    path = (beside or Path()) / expand_path(name_or_path)
    if not is_path(name_or_path):
        path = RECIPES_DIR / f"{name_or_path}.yaml"
        if not path.is_file():
            fix = did_you_mean(name_or_path, list_recipes())
            missing = UserError(f"there is no recipe {name_or_path!r}", where or shown(RECIPES_DIR), fix)
            raise RecipeError([missing], "recipe")
    elif beside is not None and not path.is_file():
        fix = "a path starts at the folder of the recipe that extends it; a name is looked for in recipes/"
        raise RecipeError([UserError(f"no recipe file {name_or_path}", where, fix)], "recipe")
    return path


def read_draft(path: Path, kind: str, start: str) -> Draft:
    """The keys of a YAML file as they are nested there, where each stands, and those that stand there twice.

    Args:
        kind: what the file is, in messages; start: how to begin one.
    Raises:
        RecipeError: the file cannot be read, or has no keys.
    """
    try:
        root, values = limited_yaml.load_with_nodes(limited_yaml.read_text(path))
    except OSError as error:
        fix = f"name the path of a YAML file, or {start}"
        raise RecipeError([UserError(f"cannot read the {kind}: {error.strerror}", str(path), fix)]) from None
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{shown(path)}:{mark.line + 1}" if mark else shown(path)
        what = f"not readable as YAML: {getattr(error, 'problem', None) or error}"
        fix = "indent with spaces, put a space after each colon, quote text that holds : # * or {"
        raise RecipeError([UserError(what, where, fix)], f"{kind} {path.stem}") from None
    if not isinstance(values, dict):
        what = f"the {kind} is empty" if values is None else "the top level must be keys, like `model:`"
        raise RecipeError([UserError(what, shown(path), start)], f"{kind} {path.stem}")
    draft = Draft(values)
    _note_lines(root, "", shown(path), draft)
    return draft


def _read_yaml(path: Path, extended_by: tuple[Path, ...] = ()) -> Draft:
    """What the file says, on top of the recipe that it extends."""
    own = read_draft(path, "recipe", "start from one that works: speft cp quickstart my_recipe.yaml")
    base = Draft()
    if EXTENDS in own.values:
        base = _extended(own.values.pop(EXTENDS), own, path, extended_by)
    own.values = dict(_flat(own.values))
    return base.under(own)


def _note_lines(node: yaml.Node, prefix: str, file: str, draft: Draft) -> None:
    """Note where every key stands, also in the mappings of a list: `data.mixture[0].path`."""
    if isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            _note_lines(item, f"{prefix}[{number}]", file, draft)
    for key_node, value in node.value if isinstance(node, yaml.MappingNode) else ():
        key = f"{prefix}.{key_node.value}".lstrip(".")
        where = f"{file}:{key_node.start_mark.line + 1} ({key})"
        if key in draft.sources:
            fix = f"keep this one or {draft.sources[key]}"
            draft.problems.append(UserError(f"{key} is set twice", where, fix))
        else:
            draft.sources[key] = where
            _note_lines(value, key, file, draft)


def _flat(values: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values by their keys in full. An empty section says nothing."""
    for name, value in values.items():
        key = f"{prefix}{name}"
        if key in SECTIONS and isinstance(value, dict):
            yield from _flat(value, f"{key}.")
        elif key not in SECTIONS or value is not None:
            yield key, value


def _extended(base: Any, own: Draft, path: Path, extended_by: tuple[Path, ...]) -> Draft:
    """The recipe that this one extends, by name or by a path that starts at this file."""
    where = own.sources.get(EXTENDS, shown(path))
    if not isinstance(base, str) or not base:
        fix = f"like {EXTENDS}: quickstart, or {EXTENDS}: ./other.yaml"
        raise RecipeError([UserError(f"{EXTENDS} names one recipe", where, fix)], f"recipe {path.stem}")
    file, chain = find_recipe(base, path.parent, where), (*extended_by, path)
    if file.resolve() in [other.resolve() for other in chain]:
        what = f"{base} extends itself, by way of {' > '.join(other.name for other in chain)}"
        raise RecipeError([UserError(what, where, f"remove one {EXTENDS}")], f"recipe {path.stem}")
    return _read_yaml(file, chain)


def _read_overrides(overrides: Sequence[str]) -> Draft:
    draft = Draft()
    for text in overrides:
        key, equals, written = text.partition("=")
        where = draft.sources[key] = f"command line: {text}"
        if not equals:
            draft.problems.append(UserError(f"{text!r} is not key=value", where, "like optimizer.lr=1e-3"))
            continue
        try:
            draft.values[key] = limited_yaml.load(written)
        except (yaml.YAMLError, ValueError):
            fix = f"""quote it twice, for the shell and for YAML: {key}='"{written}"'"""
            draft.problems.append(UserError(f"{key}: {written!r} is not readable as YAML", where, fix))
    return draft


def as_override(key: str, value: Any) -> str:
    """`key=value` that reads as this value, whatever YAML would make of the bare text."""
    try:
        is_plain = isinstance(value, str) and limited_yaml.load(value) == value
    except (yaml.YAMLError, ValueError):
        is_plain = False
    return f"{key}={value if is_plain else _quoted(value)}"


def _quoted(value: Any) -> str:
    """As JSON, but for characters that it writes as two halves, which YAML does not put together."""
    if not isinstance(value, str):
        return json.dumps(value)
    parts = [f"\\U{ord(sign):08x}" if ord(sign) > 0xFFFF else json.dumps(sign)[1:-1] for sign in value]
    return f'"{"".join(parts)}"'


def _unknown_key(key: str, where: str) -> UserError:
    if key == EXTENDS:
        fix = "write it into a file: speft cp RECIPE mine.yaml"
        return UserError(f"{EXTENDS} belongs in the recipe's file", where, fix)
    if key == "name":
        return UserError("name is not a key", where, "a recipe's name is its file's name: rename the file")
    if key in SECTIONS:
        fix = f"set its keys one by one, like {next(k for k in FIELDS if k.startswith(f'{key}.'))}"
        return UserError(f"{key} is a section, not a value", where, fix)
    return UserError(f"unknown key {key}", where, guess_key(key))


def guess_key(key: str) -> str:
    """What an unknown key may have been meant as: a question, or the keys that there are beside it."""
    section, _, name = key.rpartition(".")
    names = {known: known.rpartition(".")[2] for known in [*SECTIONS, *FIELDS]}
    siblings = {known: own for known, own in names.items() if known.rpartition(".")[0] == section}
    guesses = (
        [known for known in names if names[known] == name]
        or [known for known, others in ELSEWHERE.items() if name in others]
        or [known for known in siblings if names[known] in closest(name, siblings.values())]
        or [known for known in names if names[known] in closest(name, names.values(), cutoff=0.8)]
    )
    if guesses:
        return f"did you mean {' or '.join(guesses)}?"
    return f"choose from: {', '.join(siblings or [EXTENDS, *(known for known in names if '.' not in known)])}"
