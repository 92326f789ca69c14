"""Laws of the tokenizer: lossless, deaf to special tokens in text, exact about bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from data.errors import UserError
from data.tokenizer import SPECIAL_TOKENS, load, special_ids, token_bytes, train, train_characters

CORPUS = [Path(__file__).read_text(), "naïve façade, Übergröße, 東京 🚂 — " * 20]
TOKENIZER = train(CORPUS, 600)
SPECIALS = set(range(len(SPECIAL_TOKENS)))

texts = st.text() | st.lists(st.sampled_from([*SPECIAL_TOKENS, " ", "\n", "a", "é", "<|"])).map("".join)


@given(texts)
@example("\r\n\t \x00\x7f  trailing  ")
@settings(max_examples=150, deadline=None)
def test_any_text_comes_back_unchanged(text: str) -> None:
    ids = TOKENIZER.encode(text).ids
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text


@given(texts)
@settings(max_examples=150, deadline=None)
def test_text_never_spells_a_special_token(text: str) -> None:
    assert not SPECIALS & set(TOKENIZER.encode(text).ids)
    assert not SPECIALS & set(TOKENIZER.encode_batch_fast([text])[0].ids)


@given(texts)
@settings(max_examples=150, deadline=None)
def test_bytes_of_tokens_sum_to_bytes_of_text(text: str) -> None:
    assert token_bytes(TOKENIZER)[TOKENIZER.encode(text).ids].sum() == len(text.encode())


def test_special_tokens_have_the_first_ids_and_no_bytes() -> None:
    assert [TOKENIZER.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(7))
    assert special_ids(TOKENIZER) == {"pad": 0, "bos": 1, "eos": 2, "mask": 3}
    sizes = token_bytes(TOKENIZER)
    assert sizes.dtype == np.int64
    assert sizes.shape == (TOKENIZER.get_vocab_size(),)
    assert sizes[:7].sum() == 0
    assert (sizes[7:] >= 1).all()


def test_training_twice_gives_the_same_tokenizer() -> None:
    assert train(CORPUS, 600).to_str() == TOKENIZER.to_str()


@pytest.mark.parametrize("as_folder", [True, False])
def test_a_loaded_tokenizer_encodes_alike_and_stays_deaf_to_special_tokens(tmp_path: Path, as_folder: bool) -> None:
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    loaded = load(tmp_path if as_folder else tmp_path / "tokenizer.json")
    text = "def f(x): return '<|bos|>' <|fim_prefix|> 東京"
    assert loaded.encode(text).ids == TOKENIZER.encode(text).ids


def test_unusable_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer at"):
        load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="is not a tokenizer"):
        load(tmp_path)
    with pytest.raises(UserError, match="cannot hold the 256 bytes"):
        train(CORPUS, 200)


def test_a_tokenizer_without_the_special_tokens_is_refused(tmp_path: Path) -> None:
    described = Tokenizer.from_str(TOKENIZER.to_str().replace("<|mask|>", "<|cover|>"))
    described.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"lacks <\|mask\|>"):
        load(tmp_path)


def test_characters_are_tokens_and_nothing_is_lost() -> None:
    tokenizer = train_characters(["to be, or not", "naïve 東京\n"])
    assert tokenizer.get_vocab_size() == 7 + 256 + len(set("to be, or notnaïve 東京\n"))
    known = tokenizer.encode("東to", add_special_tokens=False)
    assert known.tokens == ["東", "t", "o"]
    lengths = token_bytes(tokenizer)
    for text in ("not to be", "naïve 東京\n", "quite 🚂 <|eos|> <0x41> Ünknown\t"):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        assert lengths[ids].sum() == len(text.encode())
        assert not set(ids) & set(range(7))
