"""Which rows are selected into a dataset."""

import tiny

from speft_ds.config.data_config import DataConfig, Source
from unit.data.made import make, pairs, refusal, shown, without_chat, write
from unit.data.test_sampler import randperm


def test_the_longest_responses_are_taken_in_the_order_of_the_file(tmp_path, model):
    rows = [*pairs("aa", "b", "cccc", "dd", "ee"), *pairs("f", prompt="p" * 50)]
    path = write(tmp_path / "rows.jsonl", rows)
    dataset = make(without_chat(path, select="longest", select_rows=3), model)
    assert shown(dataset) == ["p|aa</s>", "p|cccc</s>", "p|dd</s>"]  # of equal ones the first
    assert dataset.facts["sources"][0]["not selected"] == 3
    assert len(make(without_chat(path, select="longest", select_rows=6), model)) == 6
    with refusal("data.select_rows", "data.select_rows=6"):
        make(without_chat(path, select="longest", select_rows=7), model)


def test_random_rows_depend_on_the_seed_alone(path, model):
    data, rows = DataConfig(path=str(path), select="random", select_rows=7), tiny.read_rows(path)
    for seed in (0, 1):
        expected = sorted(randperm(30, seed, "select", 0)[:7])
        assert list(make(data, model, seed=seed)) == [rows[n] for n in expected]


def test_the_selection_is_over_all_sources_together(tmp_path, model):
    texts = [("aaa", "b"), ("cc", "d")]
    paths = [write(tmp_path / f"{n}.jsonl", pairs(*some)) for n, some in enumerate(texts)]
    mixture = [Source(path=str(path)) for path in paths]
    data = DataConfig(mixture=mixture, chat_template=False, select="longest", select_rows=2, packing=True)
    dataset = make(data, model)
    assert shown(dataset.rows()) == ["p|aaa</s>", "p|cc</s>"]
    assert dataset.row_sizes == (1, 1) and dataset.sizes == (1, 1)
    with refusal("data.path", "data.select_rows", what="2 not selected"):
        make(data.model_copy(update={"select_rows": 1}), model)


def test_ifd_chooses_by_prompt_and_response(tmp_path, model, monkeypatch):
    talk = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    turns = [{"role": role, "content": text} for role, text in talk]
    path = write(tmp_path / "rows.jsonl", [{"messages": some} for some in (turns, turns[1:3], turns[3:])])
    seen = []

    def scores(texts, scorer):
        seen.append((texts, scorer))
        return [0.5, 2.0, 0.9]

    monkeypatch.setattr("speft_ds.data.ifd.ifd_scores", scores)
    data = DataConfig(path=str(path), format="messages", select="ifd", select_rows=1, scorer=str(model))
    dataset = make(data, model)
    assert seen == [([("s\na\nb\nc\n", "d"), ("a\n", "b"), ("c\n", "d")], str(model))]
    assert shown(dataset) == ["<s>c</s><s>|d</s>"] and dataset.facts["sources"][0]["not selected"] == 2
