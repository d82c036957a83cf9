"""Every family of models that builds tiny, in two dtypes on one and two ranks; writes docs/models.md."""

from pathlib import Path

from distributed.family_checks import check_family
from distributed.reference import make_recipe
from distributed.test_families import COPIES, ONE_STEP
from families import family_names, make_family

TABLE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
START = "<!-- written by make sweep -->\n"


def test_every_family_trains_as_autograd_says_or_is_refused(ranks, tiny, tmp_path):
    lines, wrong = [], []
    for name in family_names():
        if make_family(tmp_path / name, name) is None:
            continue
        found = {
            (world_size, dtype): run(ranks, tiny, tmp_path, name, world_size, dtype)
            for world_size in (1, 2)
            for dtype in ("float32", "bfloat16")
        }
        lines.append(row(name, found))
        wrong += [(name, *key, values) for key, values in found.items() if not is_right(values, key[1])]
        print(lines[-1], flush=True)
    text = TABLE.read_text(encoding="utf-8")
    TABLE.write_text(text[: text.index(START)] + START + HEADER + "\n".join(lines) + "\n", encoding="utf-8")
    assert not wrong, wrong


def run(ranks, tiny, tmp_path, name: str, world_size: int, dtype: str) -> dict:
    model = {"name_or_path": str(tmp_path / name), "dtype": dtype}
    recipe = make_recipe(tiny, tmp_path / f"{name}-{world_size}-{dtype}", model=model, **ONE_STEP)
    try:
        return ranks(world_size)(check_family, recipe=recipe)[0]
    except AssertionError as error:  # of the ranks: the next family goes on
        return {"failed": str(error).strip().splitlines()[-1]}


def is_right(found: dict, dtype: str) -> bool:
    if "refused" in found:
        return True
    limit = 1e-4 if dtype == "float32" else 0.1
    return "failed" not in found and found["gradient_error"] < limit and all(found[copy] for copy in COPIES)


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
