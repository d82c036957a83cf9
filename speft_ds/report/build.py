"""The report of one run: a pure function of its folder."""

from __future__ import annotations

from pathlib import Path

from speft_ds.errors import UserError
from speft_ds.evaluation.scores import changes
from speft_ds.io import flush_to_disk, replacing
from speft_ds.report.document import Block, Document, Figures, Notes, Text
from speft_ds.report.facts_sections import (
    in_bytes,
    machine_section,
    mask_section,
    memory_section,
    reproduce_section,
    sizes_section,
)
from speft_ds.report.markdown import PICTURES, to_markdown
from speft_ds.report.page import to_html
from speft_ds.report.run import Run, read_run
from speft_ds.report.score_sections import score_sections
from speft_ds.report.training_sections import curves_section, time_section
from speft_ds.report.verdict import course_of, duration, verdict_of

MARKDOWN, PAGE = "report.md", "report.html"
MOST_FIGURES = 6


def write_report(folder: Path, output: Path | None = None) -> list[Path]:
    """Write the report of a run, as markdown and as a page, from its folder alone; the same every time.

    Args:
        output: where it goes; None: into the run folder.
    Returns:
        The files: report.html and report.md.
    Raises:
        UserError: the folder is no run folder, or the report cannot be written.
    """
    return write_document(report_of(read_run(folder)), output or folder)


def report_of(run: Run) -> Document:
    blocks: list[Block] = [Text(verdict_of(run)), Text(course_of(run))]
    if run.problems:
        blocks.append(Notes(run.problems))
    blocks.append(Figures(figures_of(run)[:MOST_FIGURES]))
    return Document(
        title=f"Run {run.name}",
        blocks=blocks,
        sections=[
            *score_sections(run.evaluations),
            curves_section(run),
            mask_section(run),
            time_section(run),
            *memory_section(run),
            sizes_section(run),
            machine_section(run),
            reproduce_section(run),
        ],
    )


def figures_of(run: Run) -> list[tuple[str, str, str]]:
    """(what, number, how it was made) of what matters most."""
    figures = [
        (c.after.name, c.after.short_text, f"before {c.before.short_text}; {c.errors_text()}")
        for c in changes(run.evaluations.before, run.evaluations.after)[:2]
    ]
    for key, what in (("validation_loss", "validation loss"), ("loss", "training loss")):
        steps, values = run.series(key)
        if values:
            figures.append((what, f"{values[-1]:.4g}", f"at step {steps[-1]:,}; at first {values[0]:.4g}"))
    if run.step_seconds:
        speed = f"{run.tokens_per_s:,.0f} tokens/s" if run.tokens_per_s else "in steps"
        figures.append(("training time", duration(run.step_seconds), speed))
    if run.adapter_bytes:
        trained = run.fact("mask.num_trainable", int)
        figures.append(("adapter", in_bytes(run.adapter_bytes), f"{trained:,} entries" if trained else ""))
    return figures


def write_document(document: Document, folder: Path) -> list[Path]:
    """Write pictures, page and markdown, each file whole or not at all. Raises UserError."""
    files = {folder / PICTURES / picture.file: picture.content for picture in document.pictures()}
    files[folder / PAGE] = to_html(document).encode()
    files[folder / MARKDOWN] = to_markdown(document).encode()
    try:
        for path, content in files.items():
            with replacing(path) as temporary:
                temporary.write_bytes(content)
                flush_to_disk(temporary)
    except OSError as error:
        fix = "free space, or name another folder: --output FOLDER"
        raise UserError(f"the report cannot be written: {error}", str(folder), fix) from error
    return [folder / PAGE, folder / MARKDOWN]
