"""Every family of models that builds tiny, in two dtypes on one and two ranks; writes docs/models.md.

Each family writes its own row: `make sweep ARGS="-k mixtral"` tests that one again.
"""

import re
from pathlib import Path

import pytest
from distributed.family_checks import check_family
from distributed.reference import make_recipe
from distributed.test_families import COPIES, ONE_STEP
from families import family_names, make_family

TABLE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
START = "<!-- written by make sweep -->\n"
RUNS = [(world_size, dtype) for world_size in (1, 2) for dtype in ("float32", "bfloat16")]


@pytest.mark.parametrize("name", sorted(family_names()))
def test_a_family_trains_as_autograd_says_or_is_refused(ranks, tiny, tmp_path, name):
    if make_family(tmp_path / "base", name) is None:
        assert not (old := read_rows().get(name)), f"no tiny model can be made any more: {old}"
        return
    found = {key: run(ranks, tiny, tmp_path, *key) for key in RUNS}
    wrong = [(*key, values) for key, values in found.items() if not is_right(values, key[1])]
    rows, new = read_rows(), row(name, found)
    print(new, flush=True)
    if trains(rows.get(name, "")) and not trains(new):
        wrong.append(f"it trained before: {rows[name]}")
    assert not wrong, wrong  # before the row that it is compared with is replaced
    write_rows(rows | {name: new})


def read_rows() -> dict[str, str]:
    """Family -> its line of the table."""
    lines = TABLE.read_text(encoding="utf-8").split(START)[1].splitlines()
    return {match[1]: line for line in lines[2:] if (match := re.match(r"\| (\S+) \|", line))}


def write_rows(rows: dict[str, str]) -> None:
    text = TABLE.read_text(encoding="utf-8").split(START)[0]
    lines = [rows[name] for name in sorted(rows)]
    TABLE.write_text(text + START + HEADER + "\n".join(lines) + "\n", encoding="utf-8")


def trains(line: str) -> bool:
    return line.split(" | ")[1:2] == ["yes"]


def run(ranks, tiny, tmp_path, world_size: int, dtype: str) -> dict:
    model = {"name_or_path": str(tmp_path / "base"), "dtype": dtype}
    recipe = make_recipe(tiny, tmp_path / f"{world_size}-{dtype}", model=model, **ONE_STEP)
    try:
        return ranks(world_size)(check_family, recipe=recipe, exports=True)[0]
    except AssertionError as error:  # of the ranks
        return {"failed": str(error).strip().splitlines()[-1]}


def is_right(found: dict, dtype: str) -> bool:
    if "refused" in found:
        return True
    limit = 1e-4 if dtype == "float32" else 0.1
    if "failed" in found or not found["gradient_error"] < limit:
        return False
    return all(found[copy] for copy in COPIES) and found["exported"] is not False


COLUMNS = (
    "family", "trains", "share of the decoder", "fp32 gradient error",
    "bf16: live = applied = merged = gathered", "packing", "activation checkpointing", "merge",
)  # fmt: skip
HEADER = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n"


def row(name: str, found: dict) -> str:
    """A line of the table: of two ranks, fp32 where nothing else is said."""
    fp32, bf16 = (found[2, dtype] for dtype in ("float32", "bfloat16"))
    if problem := fp32.get("refused") or fp32.get("failed"):
        return f"| {name} | no: {problem.replace('|', ' ')} | | | | | | |"
    error = max(found[world_size, "float32"]["gradient_error"] for world_size in (1, 2))
    same = bf16.get("refused") or bf16.get("failed") or yes(all(bf16[copy] for copy in COPIES))
    return (
        f"| {name} | yes | {fp32['coverage']:.1%} | {error:.0e} | {same} | {yes(fp32['packing'])} "
        f"| {yes(fp32['checkpointing'])} | {fp32['merge']} |"
    )


def yes(value: bool) -> str:
    return "yes" if value else "no"
