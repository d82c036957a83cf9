"""The day that a chat template writes: one for all ranks, and for all starts of a run."""

import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from lm_eval.models.huggingface import HFLM

from speft_ds.comm import collectives
from speft_ds.data.chat_template import fix_date
from speft_ds.errors import UserError
from speft_ds.training.checkpoint.resume import Resume, check_unchanged, find_start
from speft_ds.training.run_data import agree_on_date, load_data
from speft_ds.training.run_dir import start_folder
from unit.written import load

TODAY = datetime.date.today().isoformat()


@pytest.fixture
def recipe(tmp_path, own_folder, monkeypatch):
    """Of a model whose template writes a date, on one rank."""
    monkeypatch.setattr(collectives, "all_gather_objects", lambda own: [own])
    monkeypatch.setattr(collectives, "broadcast_object", lambda own: own)
    tiny.make_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{}")
    template = tmp_path / "model" / "chat_template.jinja"
    template.write_text(template.read_text() + "{{ strftime_now('%Y') }}")
    return load(tmp_path, "", f"model.name_or_path={tmp_path / 'model'}")


def test_a_run_that_goes_on_keeps_its_date(recipe):
    ran = agree_on_date(recipe, "2026-01-31")
    assert ran.data.date == "2026-01-31" and agree_on_date(ran).data.date == "2026-01-31"
    start_folder(ran)
    start = find_start(recipe, Resume("auto"))
    assert (start.state, start.date) == ("resumed", "2026-01-31")
    assert agree_on_date(recipe, start.date) == ran
    with pytest.raises(UserError):  # another day is another run
        check_unchanged(ran.model_dump(mode="json"), agree_on_date(recipe), (), Path("run"))
    assert agree_on_date(recipe).data.date == TODAY


def test_tasks_are_asked_on_the_day_of_the_run(recipe):
    """By lm-eval, which renders the tokenizer's template itself; also where a model has several."""
    asked = [{"role": "user", "content": "a"}]
    tokenizer = load_data(agree_on_date(recipe, "1999-01-31")).tokenizer
    model = SimpleNamespace(tokenizer=tokenizer, chat_template_args={})
    assert HFLM.apply_chat_template(model, asked).endswith("1999")
    template = load_data(recipe).tokenizer.chat_template
    tokenizer.chat_template = {"default": template, "tool_use": f"{template}!"}
    fix_date(tokenizer, datetime.date(1998, 1, 1))
    assert tokenizer.apply_chat_template(asked, tokenize=False).endswith("1998")


def test_one_rank_that_cannot_know_decides_for_all(recipe, monkeypatch, tmp_path):
    (tmp_path / "model" / "chat_template.jinja").write_text(tiny.CHAT_TEMPLATE)
    assert agree_on_date(recipe) == recipe
    monkeypatch.setattr(collectives, "all_gather_objects", lambda own: [own, True])
    assert agree_on_date(recipe).data.date == TODAY
