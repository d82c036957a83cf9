"""Files from strangers, a thousand of a kind: read or refused, without a crash, a hang or a way out."""

import hashlib
import json
import random
import shutil
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save
from tiny import make_tokenizer

from speft_ds import hub
from speft_ds.adapter.pretrained import PretrainedCheckpoint
from speft_ds.config.load_recipe import load_recipe
from speft_ds.data import tokenize
from speft_ds.evaluation.perplexity import read_text
from speft_ds.evaluation.scores import read_evaluations
from speft_ds.evaluation.task_files import task_file_problems
from speft_ds.report.run import read_run
from speft_ds.sparse.layout import EntryTable
from speft_ds.training.checkpoint.folder import Checkpoint, inspect, latest_valid, list_checkpoints, verify
from speft_ds.training.checkpoint.parts import Parts, Snapshot, header_problem
from speft_ds.training.checkpoint.resume import Resume, find_start
from speft_ds.untrusted import path_within
from unit.config.test_hostile_yaml import PIECES
from unit.hostile import (
    MAX_CPU_S,
    NAMES,
    NUM_HOSTILE,
    changed,
    hostile_tensors,
    in_place_of,
    json_text,
    mangled,
    no_hang,
    only_opens,
    refusal,
)
from unit.saved import make_run
from unit.written import load

pytestmark = pytest.mark.usefixtures("own_folder")


# Names of files


def test_names_that_lead_elsewhere(tmp_path):
    for name in [*NAMES, None, 1, b"x", ["x"], Path("x")]:
        for subfolders in (False, True):
            with pytest.raises(ValueError) as caught:
                path_within(tmp_path, name, subfolders)
            assert str(caught.value).encode()
    assert path_within(tmp_path, "a b.safetensors") == tmp_path / "a b.safetensors"
    assert path_within(tmp_path, "a/b/ü", subfolders=True) == tmp_path / "a" / "b" / "ü"
    with pytest.raises(ValueError):
        path_within(tmp_path, "a/b")


def test_indexes_of_bases(tmp_path):
    """Every name that is given out lies in the folder; every other index is a sentence."""
    chance, base = random.Random(0), tmp_path / "base"
    (base / "shards").mkdir(parents=True)
    files = ("model-1.safetensors", "shards/model-2.safetensors")
    for name in (*files, "../outside.safetensors"):
        (base / name).touch()
    good = {"metadata": {"total_size": 9}, "weight_map": {f"w{n}": files[n % 2] for n in range(6)}}
    index, num_refused = base / "model.safetensors.index.json", 0
    for number in range(NUM_HOSTILE):
        document = good if number == 0 else changed(good, chance)
        text = json.dumps(good) if number == 0 else json_text(document, chance)
        index.write_text(text, encoding="utf-8", errors="surrogatepass")
        with no_hang(), only_opens(base):
            missing = hub.missing_weights(base)
        assert "".join(missing).isprintable()
        num_refused += missing != []
        if not missing:
            shards = hub.shards_of(index)
            assert shards and all((base / s).resolve().is_relative_to(base.resolve()) for s in shards)
        if number == 0:
            assert missing == []
    assert NUM_HOSTILE // 4 < num_refused < NUM_HOSTILE


# Models


def test_a_chat_template_that_does_not_end(tmp_path, monkeypatch):
    """It is given up once, not at every row."""
    monkeypatch.setattr(tokenize, "TEMPLATE_S", 0.1)
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% if messages|length > 1 %}" + loop + "{% endif %}x"
    tokenizer.save_pretrained(tmp_path / "model")
    loaded = tokenize.load_tokenizer(str(tmp_path / "model"))
    turn = {"role": "user", "content": "a"}
    assert loaded.apply_chat_template([turn], tokenize=False) == "x"
    for limit_s in (MAX_CPU_S, 0.05):
        before = time.process_time()
        with pytest.raises(TimeoutError):
            loaded.apply_chat_template([turn, turn], tokenize=False)
        assert time.process_time() - before < limit_s


# Checkpoints


def seal(folder, manifest):
    """Write a manifest whose hash fits."""
    (folder / "manifest.json").write_bytes(manifest)
    (folder / "COMPLETE").write_text(hashlib.sha256(manifest).hexdigest())


def test_parts(tmp_path):
    """Parts whose hash fits: refused by their header or as they are read, or indices that fit the weights."""
    chance, shape = random.Random(5), {"a": (6, 5), "b": (4, 4)}
    index = {"a": torch.tensor([0, 7, 29]), "b": torch.tensor([3], dtype=torch.int32)}
    tables = {"trained": EntryTable(index, {"delta": torch.ones(4), "exp_avg": torch.zeros(4)})}
    tables["dropped"] = EntryTable({"a": torch.tensor([5, 8])}, {"delta": torch.ones(2)})
    own = {"random_cpu": torch.zeros(8, dtype=torch.uint8)}
    tensors, metadata = Snapshot(tables, {"statistics": torch.ones(9)}, own, {}).tensors(0, 1)
    path, good = tmp_path / "part_00000.safetensors", save(tensors, metadata)
    counted = json.loads(metadata["tables"])
    parts, counts = Parts(Checkpoint(tmp_path, 1, {"state": {}, "parts": [{"file": path.name}]})), Counter()

    def read():
        with parts.refusing():
            assert {n: i.tolist() for n, i in parts.mask("trained", shape).index.items()} == read.index
            spans = {"a": (0, 30), "b": (0, 16)}
            for name in ("trained", "dropped"):
                for weight, found in parts.table(name, spans).index.items():
                    assert (found[1:] > found[:-1]).all() and (found < spans[weight][1]).all()
            parts.shared("statistics")
            parts.own(0)

    read.index = {name: found.tolist() for name, found in index.items()}
    for number in range(NUM_HOSTILE):
        content = good if number == 0 else hostile_tensors(good, chance)
        if number % 3 == 1:
            content = save(tensors, {"tables": json_text(changed(counted, chance), chance)})
        path.write_bytes(content)
        with no_hang(), only_opens(tmp_path):
            problem = header_problem(path)
            assert number or problem is None
            outcome = "header" if problem else "read" if refusal(read) is None else "refused"
        counts[outcome] += 1
    assert min(counts.values()) > NUM_HOSTILE // 200 and len(counts) == 3, counts


def test_what_is_no_file(tmp_path):
    """A pipe, a device, a folder, a link to nowhere in the place of any file that others give."""
    recipe = load(tmp_path)
    run = make_run(recipe, 10)
    (folder,) = (run / "checkpoints").iterdir()
    readers = {
        folder / "manifest.json": lambda: inspect(folder).problem,
        folder / "COMPLETE": lambda: inspect(folder).problem,
        folder / "part_00000.safetensors": lambda: inspect(folder).problem,
        run / "run.json": lambda: refusal(lambda: read_run(run)) or read_run(run).problems,
        run / "metrics.jsonl": lambda: refusal(lambda: read_run(run)) or read_run(run).problems,
        run / "recipe.yaml": lambda: refusal(lambda: read_run(run)) or read_run(run).problems,
        tmp_path / "mine.yaml": lambda: refusal(lambda: load_recipe("mine.yaml")),
        tmp_path / "eval" / "after.json": lambda: read_evaluations(tmp_path).problems,
        tmp_path / "tasks" / "a.yaml": lambda: task_file_problems(tmp_path / "tasks"),
        tmp_path / "text.jsonl": lambda: refusal(lambda: read_text(tmp_path / "text.jsonl", 100)),
        tmp_path / "base" / "model.safetensors.index.json": lambda: hub.missing_weights(tmp_path / "base"),
        tmp_path / "base" / "config.json": lambda: refusal(
            lambda: PretrainedCheckpoint(str(tmp_path / "base"))
        ),
    }
    for path, problem in readers.items():
        path.parent.mkdir(exist_ok=True)
        name = path.name.removesuffix(".index.json")  # which is one of two that may be there
        for number, _ in enumerate(in_place_of(path)):
            is_none = number == 0 and path.parent.name in ("eval", "tasks")  # there need not be one
            with no_hang():
                assert name in str(problem()) or is_none


def test_manifests(tmp_path):
    """Manifests whose hash fits: whole only with one part per rank, in the folder and as large as said."""
    chance, recipe = random.Random(1), load(tmp_path)
    run = make_run(recipe, 10)
    (run / "run.json").write_text('{"run_id": "mine", "finished": false}')
    (run / "metrics.jsonl").write_text("")
    (folder,) = (run / "checkpoints").iterdir()
    good, num_valid = json.loads((folder / "manifest.json").read_text()), 0
    for number in range(NUM_HOSTILE):
        manifest = good if number == 0 else changed(good, chance)
        if number % 3 == 1:  # the parts are what leads to other files
            manifest = {**good, "parts": changed(good["parts"], chance)}
        text = json.dumps(good) if number == 0 else json_text(manifest, chance)
        seal(folder, text.encode(errors="surrogatepass"))
        with no_hang(), only_opens(tmp_path):
            checkpoint = inspect(folder)
            damage = None if checkpoint.problem else verify(checkpoint)
        if number % 5 == 0:  # whoever asks, hears the same
            with no_hang(), only_opens(tmp_path):
                (listed,) = list_checkpoints(run)
                refused = refusal(lambda: latest_valid(run, None))
                refusal(lambda: find_start(recipe, Resume("newest")))
                read = read_run(run)
            assert listed == checkpoint and (refused is None) == (checkpoint.problem is None)
            assert (checkpoint.problem is None) == (len(read.problems) == 0)
        if checkpoint.problem is None:
            num_valid += 1
            names = [part["file"] for part in checkpoint.manifest["parts"]]
            assert names == [f"part_{n:05d}.safetensors" for n in range(checkpoint.manifest["world_size"])]
            same = [{**part, "sha256": None} for part in checkpoint.manifest["parts"]]
            assert same == [{**part, "sha256": None} for part in good["parts"]]
            assert (damage is None) == (checkpoint.manifest["parts"] == good["parts"])
    assert 1 < num_valid < NUM_HOSTILE / 2


@pytest.mark.parametrize(
    "key", ["step", "run_id", "world_size", "parts", "recipe", "base", "progress", "state"]
)
def test_a_manifest_lacks_nothing(tmp_path, key):
    run = make_run(load(tmp_path), 10)
    (folder,) = (run / "checkpoints").iterdir()
    good = json.loads((folder / "manifest.json").read_text())
    for wrong in (
        {k: v for k, v in good.items() if k != key},
        {**good, key: []},
        {**good, "parts": good["parts"][:1] * 2},
    ):
        seal(folder, json.dumps(wrong).encode())
        assert "damaged" in inspect(folder).problem


# Tasks

TASK = """\
task: mine
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
include: base_yaml
test_split: test
output_type: multiple_choice
doc_to_text: '{{prompt}}'
doc_to_choice: !function utils.choices
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
TASK_PIECES = [
    *PIECES,
    *(f"include: {json.dumps(name)}\n" for name in NAMES),
    *(f"task: {json.dumps(name)}\n" for name in NAMES),
    *("include: [base_yaml, ../x]\n", "include: deeper/../../x\n", "include: mine.yaml\n", "include: 3\n"),
    *("!function /etc/x.y", "!function ..outside.x", "!function x", "!function os.system", "!function [a]"),
    *("task: [a, {task: ../x}]\n", "group: a/b\n", "task: {a: 1}\n", "class: !function a.b\n"),
]


def test_task_files(tmp_path):
    """What passes is read by lm-eval without a step outside; what it would do elsewhere is refused."""
    from lm_eval.tasks import TaskManager

    chance, tasks = random.Random(4), tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "base_yaml").write_text("num_fewshot: 0\n")
    (tasks / "utils.py").write_text("def choices(doc): return ['a']\n")
    (tmp_path / "x").write_text("task: outside\n")
    good, num_fine = tasks / "mine.yaml", 0
    for number in range(NUM_HOSTILE):
        text = TASK if number == 0 else mangled(TASK, chance, TASK_PIECES)
        good.write_text(text, encoding="utf-8", errors="surrogatepass")
        with no_hang(), only_opens(tasks):
            problems = task_file_problems(tasks)
        assert all(str(problem).encode() and problem.fix for problem in problems)
        if not problems:
            num_fine += 1
            with no_hang(), only_opens(tasks):
                names = TaskManager(include_path=str(tasks), include_defaults=False).all_tasks
            assert all("/" not in str(name) and str(name).isprintable() for name in names)
    assert 1 < num_fine < NUM_HOSTILE / 2


def test_lm_evals_own_tasks_pass():
    """All of its files: what real tasks do is not refused."""
    import lm_eval

    assert task_file_problems(Path(lm_eval.__file__).parent / "tasks") == []


@pytest.mark.parametrize("metric", ["../evil", "/x/evil", "somebody/metric", "a\\b"])
def test_metrics_that_are_code_from_elsewhere(tmp_path, metric):
    for values in (
        {"metric_list": [{"metric": metric}]},
        {"group": "g", "task": [{"x": [{"metric": metric}]}]},
    ):
        (tmp_path / "a.yaml").write_text(yaml.safe_dump(values))
        (problem,) = task_file_problems(tmp_path)
        assert problem.where == str(tmp_path / "a.yaml") and problem.fix


def test_task_files_include_only_what_is_in_the_folder(tmp_path):
    tasks = tmp_path / "tasks"
    (tasks / "deep").mkdir(parents=True)
    (tmp_path / "outside_yaml").write_text("task: x\n")
    (tasks / "base_yaml").write_text("num_fewshot: 0\n")
    file = tasks / "deep" / "a.yaml"
    for name, is_fine in {
        "../base_yaml": True,
        "../../outside_yaml": False,
        str(tasks / "base_yaml"): False,
    }.items():
        file.write_text(f"task: a\ninclude: {name}\n")
        assert (task_file_problems(tasks) == []) == is_fine
    (tasks / "base_yaml").write_text("include: ../outside_yaml\n")  # by way of another
    file.write_text("task: a\ninclude: ../base_yaml\n")
    (problem,) = task_file_problems(tasks)
    assert problem.where == str(tasks / "base_yaml")
    (tasks / "base_yaml").write_text("include: deep/a.yaml\n")  # in a circle
    assert task_file_problems(tasks) == []
    shutil.rmtree(tasks)
    assert task_file_problems(tasks) == []
