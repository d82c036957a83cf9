"""Tokenizers as they are loaded, against sentencepiece and transformers."""

from speft_ds.data.tokenize import Encoder, load_tokenizer
from unit.test_tokens.made import PROMPT, RESPONSE, encode, plain
from unit.tokenizers_small import sentencepiece_model, write_llama2_alone


def test_a_sentencepiece_model_that_stands_alone_encodes_as_sentencepiece(tmp_path):
    import sentencepiece

    tokenizer = load_tokenizer(str(write_llama2_alone(tmp_path / "alone")))
    reference = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model(adds_space=True))
    texts = [PROMPT, RESPONSE, "two  spaces\n\tand lines\n", "\u4e16\u754c \U0001f98a \xe9 12345", "x", ""]
    for text in texts:
        assert tokenizer(text)["input_ids"] == [1, *reference.encode(text)]
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    row, _ = encode(tokenizer, plain(f"{PROMPT}\n", RESPONSE))
    prompt = [1, *reference.encode(f"{PROMPT}\n")]
    assert row.ids == [1, *reference.encode(f"{PROMPT}\n{RESPONSE}"), 2]
    assert row.ids[: len(prompt)] == prompt and row.spans == [(len(prompt), len(row.ids))]


def test_llama2_of_the_hub_encodes_as_sentencepiece(tokenizers):
    import sentencepiece

    reference = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model(adds_space=True))
    for text in (PROMPT, RESPONSE, "two  spaces\n\tand lines\n", "\u4e16\u754c \U0001f98a 12345"):
        assert tokenizers["llama2"](text)["input_ids"] == [1, *reference.encode(text)]


def test_any_other_tokenizer_is_loaded_as_transformers_does(tmp_path, style, tokenizer):
    tokenizer.save_pretrained(tmp_path / "model")
    loaded = load_tokenizer(str(tmp_path / "model"))
    assert loaded(RESPONSE) == tokenizer(RESPONSE) and loaded.chat_template == tokenizer.chat_template


def test_a_tokenizer_without_a_bos_gets_none(tokenizers):
    assert not Encoder(tokenizers["qwen2"], 10, "drop").adds_bos
    assert not Encoder(tokenizers["smollm2"], 10, "drop").adds_bos  # it has one, which it never writes
    assert Encoder(tokenizers["llama3"], 10, "drop").adds_bos
