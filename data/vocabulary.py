"""What a tokenizer's ids are: special, ordinary, parts of words."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from data.tokenizer import MASK, SPECIAL_TOKENS, special_ids

_SPACES = ("Ġ", " ")
"""A space of its own belongs to the word behind it, as it does in tokens that begin with one."""


@dataclass(frozen=True)
class Vocabulary:
    """Facts about each id of a vocabulary of `size`."""

    mask: int
    """Id of the mask token."""
    special: NDArray[np.bool_]
    """bool (size,): ids that stand for no text."""
    goes_on: NDArray[np.bool_]
    """bool (size,): ids that begin with a letter or digit (or a byte of one), without a space before it."""
    open_end: NDArray[np.bool_]
    """bool (size,): ids that end with a letter or digit, and single spaces: the next id, if it goes on, belongs to
    the same word."""

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Vocabulary:
        """Read from a tokenizer; exact for byte-level vocabularies and those of single characters."""
        names = tokenizer.get_vocab(with_added_tokens=True)
        size = 1 + max(names.values())
        special, goes_on, open_end = (np.zeros(size, dtype=bool) for _ in range(3))
        for index, added in tokenizer.get_added_tokens_decoder().items():
            special[index] = added.special
        byte_level = "ByteLevel" in json.dumps(json.loads(tokenizer.to_str())["decoder"])
        for name, index in names.items():
            if not special[index]:
                goes_on[index] = _inside(name[0], byte_level)
                open_end[index] = _inside(name[-1], byte_level) or name in _SPACES
        return cls(special_ids(tokenizer)["mask"], special, goes_on, open_end)

    @classmethod
    def of_size(cls, size: int) -> Vocabulary:
        """Of a tokenizer trained here, as far as it is known without the tokenizer itself: no word boundaries."""
        special = np.arange(size) < len(SPECIAL_TOKENS)
        apart = np.zeros(size, dtype=bool)
        return cls(SPECIAL_TOKENS.index(MASK), special, apart, apart)


def _inside(character: str, byte_level: bool) -> bool:
    """Whether a character of a token's name belongs to a word."""
    if byte_level and ord(character) > 0x7F:
        # GPT-2's alphabet: control bytes, space and 0x7F are spelled U+0100 to U+0121, bytes from 0x80 on by
        # other characters above U+0080; those are parts of longer characters, taken for letters.
        return not 0x100 <= ord(character) <= 0x121
    return character.isalnum()
