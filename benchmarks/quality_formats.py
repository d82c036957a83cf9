"""What a base in few bits costs in quality: held-out loss after training on top of it.

    python benchmarks/quality_formats.py --data DIR [--seeds 1 2 3] [--jobs 2] [--table]

DIR has `sst2/` (train.jsonl, validation.jsonl: sentence, label). Every base of VARIANTS is trained once per
seed and scored once untouched; of one seed, all see the same rows in the same order. How runs are made and
continued: quality.py.
"""

from __future__ import annotations

import sys

import quality


def base(name: str | None, start: str = "zero") -> dict:
    return {"model": {"base_format": name, "dtype": "bfloat16"}, "mask": {"start": start}}


VARIANTS = {
    "bf16": base(None),
    "nf4": base("nf4"),
    "nf4 exact": base("nf4", "exact"),
    "bfp6": base("bfp6"),
    "bfp4 exact": base("bfp4", "exact"),
}
COMPARISON = quality.Comparison(
    name="quality_formats",
    files=quality.SST2_FILES,
    data_sets={"sst2": quality.sst2_sections},
    label="base",
    variants=VARIANTS,
    untouched={f"{name} untouched": sections for name, sections in VARIANTS.items()},
    reference="bf16",
)


def main() -> None:
    arguments = quality.parse_arguments(COMPARISON, __doc__)
    is_complete = quality.train_all(COMPARISON, arguments)
    quality.print_report(COMPARISON, arguments, quality.results_of(COMPARISON, arguments))
    sys.exit(not is_complete)


if __name__ == "__main__":
    main()
