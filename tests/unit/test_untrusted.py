"""Texts from files and rows: what of them a terminal, a table of markdown and a shell get."""

import shlex
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from speft_ds.config.load_recipe import as_override, load_recipe
from speft_ds.errors import RecipeError, UserError, shell
from speft_ds.untrusted import cpu_limit, in_markdown, printable, without_folders, without_secrets

CONTROLS = {chr(code) for code in (*range(32), *range(127, 160))} - set("\n\t")
TOKEN = "hf_AbCdEfGhIjKlMnOpQrStUvWxYz012345"


@given(st.text())
def test_no_control_character_is_printed(text):
    shown = printable(text)
    assert not CONTROLS & set(shown) and "\u202e" not in shown
    assert all(b in (a, "\ufffd") for a, b in zip(text, shown, strict=True)) or "://" in text


def test_what_people_write_stays():
    for text in ("ä ± 漢字 🙂", "👩\u200d🔬", "क्\u200dष", "a\tb\nc", "1\u00a0000"):
        assert printable(text) == text
    assert printable("a\x1b[2J\x07\r\u202eb\ud800") == "a\ufffd[2J\ufffd\ufffd\ufffdb\ufffd"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:pass@host:8/a", "https://host:8/a"),
        (f"https://{TOKEN}@host/a", "https://host/a"),
        ("a http://u:p%40@h and ftp://x@y/z", "a http://h and ftp://y/z"),
        ("http://host/a@b", "http://host/a@b"),
        ("mail me@host", "mail me@host"),
        (f"token {TOKEN}!", "token ***!"),
        ("hf_download", "hf_download"),
        ("key 0123456789abcdef.", "key ***."),
        ("x/y", "x/y"),
    ],
)
def test_secrets_are_left_out(monkeypatch, text, shown):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("HF_TOKEN", "x")  # no token, and no reason to hide a letter
    assert without_secrets(text) == printable(text) == shown
    error = UserError(text, text, text)
    assert str(error) == f"{shown}\n    where: {shown}\n    fix: {shown}"


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("data.path=/home/me/my rows/a.jsonl", "data.path=.../a.jsonl"),
        ("~/models/llama", ".../llama"),
        ("~me/models/llama", ".../llama"),
        ("[{path: /a/b}, {path: ~/c/d/e}]", "[{path: .../b}, {path: .../e}]"),
        ("https://host/a/b", "https://host/a/b"),
        ("owner/name", "owner/name"),
        ("../rows/a.jsonl", "../rows/a.jsonl"),
        ("/", "/"),
    ],
)
def test_machine_paths_are_left_out_of_a_command_line(word, shown):
    assert without_folders(word) == shown


@pytest.mark.parametrize("value", [f"https://me:{TOKEN}@host/rows.jsonl", f"rows-{TOKEN}.jsonl"])
def test_a_recipe_with_a_secret_is_refused(value, monkeypatch):
    """It would be in recipe.yaml, in every checkpoint and in the adapter."""
    with pytest.raises(RecipeError) as caught:
        load_recipe("quickstart", [f"data.path={value}"])
    (problem,) = caught.value.problems
    assert "data.path" in problem.what and TOKEN not in str(caught.value)


@pytest.mark.parametrize("value", ["a\nb", "runs/\x1b[2J", "\u202e", "a/" + "n" * 300, "ä" * 128])
def test_a_path_that_cannot_be_is_refused(value):
    with pytest.raises(RecipeError) as caught:
        load_recipe("quickstart", [as_override("output_dir", value)])
    (problem,) = caught.value.problems
    assert "output_dir" in problem.where


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
def test_a_printed_command_has_the_words_that_it_should(text):
    assert shlex.split(shell("rm", "-r", text)) == ["rm", "-r", text]


def test_cpu_time_is_limited():
    before = signal.getsignal(signal.SIGPROF)
    with pytest.raises(TimeoutError), cpu_limit(0.05):
        while True:
            pass
    with cpu_limit(0.05):
        pass
    assert signal.getsignal(signal.SIGPROF) == before and signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)


def test_other_threads_are_not_limited():
    """They get no signals, and must not take the main thread's."""

    def work():
        with cpu_limit(0.001):
            return sum(range(1_000_000))

    with ThreadPoolExecutor() as pool:
        assert pool.submit(work).result() == 499999500000


NAMES = ("my run", "a'b\"c", "$(touch hacked)", "`touch hacked`", "a;touch hacked", "*", "a & b", "~", "#x")


def test_a_printed_command_pasted(tmp_path):
    for name in NAMES:
        for each in (name, "my", "run"):
            (tmp_path / each).mkdir(exist_ok=True)
        subprocess.run(["sh", "-c", shell("rm", "-r", name)], cwd=tmp_path, check=True)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["my", "run"]


@given(st.text(min_size=1).filter(str.isprintable).filter(lambda text: text[0] != "~"))
@settings(max_examples=50, deadline=None)
def test_an_override_reads_as_the_value(text):
    (word,) = shlex.split(shell(as_override("data.path", text)))
    assert load_recipe("quickstart", [word]).data.path == text


ODD = ["<img src=x>", "[a](javascript:b)", "a|b", "*a* _b_ `c`", "# x", "a\n\n# b", "\\| c", "![](x)", "$x$"]
ODD += ["&lt;", "~~a~~"]


@pytest.mark.parametrize("text", ODD)
def test_markdown_shows_a_text_as_it_is(text):
    parser = MarkdownIt("commonmark").enable("table")
    tokens = parser.parse(f"| a |\n| --- |\n| {in_markdown(text)} |\n")
    cells = [token for token in tokens if token.type == "inline"]
    assert len(cells) == 2 and {child.type for child in cells[1].children} <= {"text", "text_special"}
    assert "".join(child.content for child in cells[1].children) == " ".join(text.split())
