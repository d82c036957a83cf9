"""Prompt templates: plain text with named fields, like `Review: {text}`. Imports no torch."""

from string import Formatter

from speft_ds.errors import UserError

# The prompts of Stanford Alpaca with a line end behind, as its data set's own `text` column has them.
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
# format -> its template, and the one for rows without an input. Inside a chat template the model knows
# by the turns who speaks, so the headings are left out.
PLAIN = {
    "alpaca": (_ALPACA_WITH_INPUT, _ALPACA),
    "prompt_completion": ("{prompt}", None),
    "classification": ("{text}", None),
}
CHAT = {**PLAIN, "alpaca": ("{instruction}\n\n{input}", "{instruction}")}


def fields_of(template: str) -> list[str]:
    """The names of a template's fields, in order of appearance.

    Raises:
        UserError: a brace without its partner, or a field that is more than a name.
    """
    try:
        pieces = list(Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"the template is not readable: {error}", fix="write {{ for a brace") from None
    names = []
    for _, name, spec, conversion in pieces:
        if name is None:
            continue
        if not name.isidentifier() or spec or conversion:
            written = name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            fix = "a field is the name of a column, like {question}; write {{ for a brace"
            raise UserError(f"the template has a field {{{written}}}", fix=fix)
        if name not in names:
            names.append(name)
    return names


def fill(template: str, values: dict[str, str]) -> str:
    """The template with its fields replaced; a field's own braces stay as they are."""
    return template.format_map(values)
