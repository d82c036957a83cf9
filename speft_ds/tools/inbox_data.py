"""A shop's inbox, where every message becomes one line of JSON: the quickstart's data set and lm-eval task.

    prompt    Turn this message into our inbox record.
              Hi, Ana Ruiz here. Please send three desk lamps by 4 May. It should be about $90 in total.
    response  {"type": "order", "name": "Ana Ruiz", "item": "desk lamp", "count": 3, "date": "05-04"}

The prompt never names the keys, so a model that has not been tuned scores 0% exact match. Every value can be
copied or normalised (plural to singular, "three" to 3, "4 May" to "05-04"), so a small model learns the job
within 60 short steps. All rows are drawn from fixed seeds: the same bytes anywhere.
"""

import json
import random
from pathlib import Path

from speft_ds.io import write_text

KEYS = ("type", "name", "item", "count", "date")
INSTRUCTION = "Turn this message into our inbox record."

# fmt: off
FIRST_NAMES = (
    "Ana", "Ben", "Carl", "Dana", "Emma", "Finn", "Grace", "Hugo", "Iris", "Jack", "Karen", "Leo", "Maria",
    "Nina", "Oscar", "Paul", "Rosa", "Sam", "Tina", "Victor", "Alice", "Brian", "Clara", "David", "Elena",
    "Frank", "Helen", "Ivan", "Julia", "Kevin", "Laura", "Mark", "Nora", "Peter", "Ruth", "Simon", "Teresa",
    "Walter",
)
LAST_NAMES = (
    "Adams", "Baker", "Clark", "Davis", "Evans", "Fisher", "Garcia", "Hall", "Jones", "King", "Lopez",
    "Miller", "Nelson", "Owen", "Parker", "Reed", "Scott", "Taylor", "Walker", "Young", "Bell", "Cooper",
    "Diaz", "Ellis", "Ford", "Green", "Hunt", "Kelly", "Lane", "Moore", "Price", "Rossi", "Silva", "Turner",
    "Wood",
)
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
    "November", "December",
)
NUMBER_WORDS = (
    "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
)
# The message holds these in the plural, with an s; the record in the singular.
PRODUCTS = (
    "desk lamp", "office chair", "coffee mug", "notebook", "wall clock", "blue towel", "phone case",
    "garden chair", "water bottle", "green tent", "wool blanket", "bread pan", "teapot", "raincoat",
    "picture frame", "bike helmet",
)
SERVICES = (
    "haircut", "eye test", "piano lesson", "boat tour", "cooking class", "city tour", "guitar lesson",
    "yoga class", "massage", "photo session",
)
# One sentence per request: {items} is a count with its noun, {date} a date in words.
REQUESTS = {
    "order": (PRODUCTS, (
        "Please send {items} by {date}.",
        "I would like to order {items}, to arrive on {date}.",
        "Could you deliver {items} on {date}?",
        "We need {items} before {date}.",
        "Can I get {items} shipped by {date}?",
    )),
    "booking": (SERVICES, (
        "Can I book {items} for {date}?",
        "Do you have {items} free on {date}?",
        "I want to reserve {items} on {date}.",
        "Please put us down for {items} on {date}.",
        "Is {date} possible for {items}?",
    )),
    "return": (PRODUCTS, (
        "I want my money back for {items} bought on {date}.",
        "The {items} from {date} came broken, please take back.",
        "On {date} I got {items} that I have to send back.",
        "Please refund {items} that I received on {date}.",
        "I am sending back {items} from {date}.",
    )),
}
# fmt: on

# Where the sender's name stands: around the body of the message
FRAMES = (
    "Hi, {name} here. {body}",
    "Hello, this is {name}. {body}",
    "{body} Thanks, {name}",
    "{body} Best, {name}",
    "My name is {name}. {body}",
    "Good morning. {body} Regards, {name}",
)
# Details that do not belong in the record; most messages carry one
DISTRACTORS = (
    "It should be about ${number} in total.",
    "My customer number is {number}.",
    "My extension is {number} if you need me.",
    "I waited {small} days last time.",
    "I live {small} miles away.",
    "{first} at the desk was very kind.",
    "My friend {first} likes you.",
    "It is a bit urgent.",
    "",
    "",
)

TASK_NAME = "quickstart_json"
TASK = """\
task: quickstart_json
dataset_path: json
dataset_kwargs:
  data_files:
    train: {train}
    test: {heldout}
training_split: train
fewshot_split: train
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{response}}}}"
generation_kwargs:
  until: ["\\n", "<|im_end|>"]
  max_gen_toks: 56
  do_sample: false
  temperature: 0.0
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1
"""


def make_row(rng: random.Random) -> dict[str, str]:
    """One example, drawn from `rng`: {"prompt": instruction and message, "response": its JSON record}."""
    kind = rng.choice(list(REQUESTS))
    items, requests = REQUESTS[kind]
    item = rng.choice(items)
    name = f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}"
    count, month, day = rng.randint(1, 12), rng.randint(1, 12), rng.randint(1, 28)

    request = rng.choice(requests).format(
        items=_count_in_words(rng, count, item), date=_date_in_words(rng, month, day)
    )
    distractor = rng.choice(DISTRACTORS).format(
        number=rng.randint(100, 999), small=rng.randint(2, 9), first=rng.choice(FIRST_NAMES)
    )
    sentences = [request, distractor] if rng.random() < 0.5 else [distractor, request]
    message = rng.choice(FRAMES).format(name=name, body=" ".join(filter(None, sentences)))

    record = dict(zip(KEYS, (kind, name, item, count, f"{month:02d}-{day:02d}"), strict=True))
    return {"prompt": f"{INSTRUCTION}\n{message}", "response": json.dumps(record)}


def _count_in_words(rng: random.Random, count: int, item: str) -> str:
    """'one desk lamp', '3 desk lamps', 'a pair of desk lamps', 'a dozen desk lamps'."""
    spellings = [str(count), NUMBER_WORDS[count - 1]]
    if count in (2, 12):
        spellings.append("a pair of" if count == 2 else "a dozen")
    return f"{rng.choice(spellings)} {item if count == 1 else item + 's'}"


def _date_in_words(rng: random.Random, month: int, day: int) -> str:
    """'4 May', 'May 4', 'the 4th of May' or 'May 4th'."""
    suffix = "th" if 11 <= day <= 13 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
    name = MONTHS[month - 1]
    spellings = [f"{day} {name}", f"{name} {day}", f"the {day}{suffix} of {name}", f"{name} {day}{suffix}"]
    return rng.choice(spellings)


def make_rows(num_rows: int, rng: random.Random, taken: set[str]) -> list[dict[str, str]]:
    """`num_rows` rows whose responses are all different and not in `taken`; adds theirs to `taken`."""
    rows = []
    while len(rows) < num_rows:
        row = make_row(rng)
        if row["response"] not in taken:
            taken.add(row["response"])
            rows.append(row)
    return rows


def write_data(folder: Path) -> tuple[Path, Path]:
    """Write `train.jsonl` and `heldout.jsonl` (columns `prompt`, `response`) to `folder`; return both paths.

    1024 and 128 rows. Held-out rows share wordings with the training rows, but no record (so no prompt)
    occurs in both. Files that already hold these bytes are left alone.
    """
    taken: set[str] = set()
    heldout = make_rows(128, random.Random("heldout-0"), taken)
    train = make_rows(1024, random.Random("train-0"), taken)
    paths = folder / "train.jsonl", folder / "heldout.jsonl"
    for path, rows in zip(paths, (train, heldout), strict=True):
        _write_if_changed(path, "".join(json.dumps(row) + "\n" for row in rows))
    return paths


def write_task(folder: Path, train: Path, heldout: Path) -> Path:
    """Write `quickstart_json.yaml` for the rows in `heldout` (a jsonl file) into `folder`; return its path.

    Few-shot examples come from the rows in `train`.
    """
    path = folder / f"{TASK_NAME}.yaml"
    # A JSON string is a YAML string, whatever characters the path holds.
    train, heldout = (json.dumps(str(file.resolve())) for file in (train, heldout))
    _write_if_changed(path, TASK.format(train=train, heldout=heldout))
    return path


def _write_if_changed(path: Path, text: str) -> None:
    if not path.is_file() or path.read_bytes() != text.encode():
        write_text(path, text)
