"""Which rows are selected into a corpus."""

import pytest
import tiny
from speft_ds.data.dataset_cache import DatasetSpec

from speft_ds.config.data_config import DataConfig, Source
from speft_ds.errors import UserError
from unit.test_corpus.made import make, pairs, plain, shown, write
from unit.test_order import randperm


def test_the_longest_responses_are_taken_in_the_order_of_the_file(tmp_path, model):
    path = write(
        tmp_path / "rows.jsonl", [*pairs("aa", "b", "cccc", "dd", "ee"), *pairs("f", prompt="p" * 50)]
    )
    corpus = make(plain(path, select="longest", select_rows=3), model)
    assert shown(corpus) == ["p|aa</s>|", "p|cccc</s>|", "p|dd</s>|"]  # of equal ones the first
    assert corpus.facts["sources"][0]["not selected"] == 3
    assert len(make(plain(path, select="longest", select_rows=6), model)) == 6
    with pytest.raises(UserError, match=r"(?s)select_rows=7 is more than the 6 rows.*data.select_rows=6, or"):
        make(plain(path, select="longest", select_rows=7), model)


def test_random_rows_depend_on_the_seed_alone(path, model):
    data, rows = DataConfig(path=str(path), select="random", select_rows=7), tiny.read_rows(path)
    for seed in (0, 1):
        expected = sorted(randperm(30, seed, "select", 0)[:7])
        assert list(make(data, model, seed=seed)) == [rows[n] for n in expected]
    assert DatasetSpec(data, model, seed=0).key() != DatasetSpec(data, model, seed=1).key()
    everything = DataConfig(path=str(path))
    assert DatasetSpec(everything, model, seed=0).key() == DatasetSpec(everything, model, seed=1).key()


def test_the_selection_is_over_all_sources_together(tmp_path, model):
    paths = [
        write(tmp_path / f"{n}.jsonl", pairs(*texts)) for n, texts in enumerate((("aaa", "b"), ("cc", "d")))
    ]
    mixture = [Source(path=str(path)) for path in paths]
    data = DataConfig(mixture=mixture, chat_template=False, select="longest", select_rows=2, packing=True)
    corpus = make(data, model)
    assert [shown([row]) for row in corpus.rows()] == [["p|aaa</s>|"], ["p|cc</s>|"]]
    assert corpus.row_sizes == (1, 1) and corpus.sizes == (1, 1)
    data = data.model_copy(update={"select_rows": 1})
    with pytest.raises(UserError, match="of 2 rows none is left: 2 not selected"):
        make(data, model)


def test_ifd_chooses_by_prompt_and_response(tmp_path, model, monkeypatch):
    from speft_ds.data import ifd

    talk = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    turns = [{"role": role, "content": text} for role, text in talk]
    path = write(
        tmp_path / "rows.jsonl", [{"messages": turns}, {"messages": turns[1:3]}, {"messages": turns[3:]}]
    )
    seen = []

    def scores(texts, scorer):
        seen.append((texts, scorer))
        return [0.5, 2.0, 0.9]

    monkeypatch.setattr(ifd, "ifd_scores", scores)
    data = DataConfig(path=str(path), format="messages", select="ifd", select_rows=1, scorer=str(model))
    corpus = make(data, model)
    assert seen == [([("s\na\nb\nc\n", "d"), ("a\n", "b"), ("c\n", "d")], str(model))]
    assert shown(corpus) == ["<s>c</s><s>|d</s>|"] and corpus.facts["sources"][0]["not selected"] == 2
