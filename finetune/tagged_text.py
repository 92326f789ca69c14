"""Words with a tag each: CoNLL-like columns, or JSONL with `tokens` and `tags`; and the tokens they become."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.errors import UserError
from finetune.dense_samples import TagSamples
from finetune.samples import Ints
from finetune.table import column, json_lines, read_text
from finetune.targets import IGNORED, Target
from finetune.targets_dense import Tags
from finetune.text_encoder import DocumentEncoder
from finetune.values import sorted_names

SUFFIXES = (".tsv", ".conll", ".txt", ".bio", ".jsonl")
WORD_FIELDS = ("tokens", "words")
TAG_FIELDS = ("tags", "ner_tags", "labels", "pos_tags")


@dataclass(frozen=True)
class TaggedText:
    """`n` texts of words, each word with its tag."""

    words: list[list[str]]
    tags: list[list[str]]
    source: Path

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all words and tags in order."""
        return hashlib.sha256(json.dumps([self.words, self.tags]).encode()).hexdigest()


def read_tagged_text(source: str | Path) -> TaggedText:
    """Words and tags.

    In JSONL each line is an object with the lists `tokens` and `tags`. Elsewhere each line is a word, a tab
    or space, perhaps other columns, and its tag; an empty line ends a text, lines of `-DOCSTART-` are passed over.

    Raises:
        UserError: no such file, an unknown format, a word without tag, lists of different length, no words.
    """
    path = Path(source).expanduser()
    if not path.is_file():
        raise UserError(f"{path} is no file; give words and tags as one of {', '.join(SUFFIXES)}")
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path} is of an unknown format; words and tags come as {', '.join(SUFFIXES)}")
    texts = list(_jsonl(path) if path.suffix == ".jsonl" else _columns(path))
    if not texts:
        raise UserError(f"{path} holds no words with tags")
    return TaggedText([words for words, _ in texts], [tags for _, tags in texts], path)


def tag_samples(read: TaggedText, encoder: DocumentEncoder, known: Target | None) -> TagSamples:
    """Rows of tokens for `encoder`, with tags as numbers over the `known` target's, or over those that occur.

    A text too long for the encoder's context becomes several rows, cut between words.

    Raises:
        UserError: a tag that the known ones lack; a single tag.
    """
    present = {tag for tags in read.tags for tag in tags}
    if known is None:
        if len(present) < 2:
            raise UserError(f"{read.source} has the one tag {min(present)!r}; a task needs two or more")
        known = Tags(sorted_names(present))
    unseen = sorted(present - set(known.classes))
    if unseen:
        raise UserError(
            f"{read.source} has the tag {unseen[0]!r}, which the training data lacks "
            f"(its tags: {', '.join(known.classes[:5])}, …); add training samples or remove it"
        )
    numbers = {tag: number for number, tag in enumerate(known.classes)}
    rows, tags, places, owners = [], [], [], []
    for owner, (words, named) in enumerate(zip(read.words, read.tags, strict=True)):
        done = 0
        for row, firsts in encoder.tokenize_words(words):
            truth, numbered = np.full(len(row), IGNORED, dtype=np.int64), np.full(len(row), -1, dtype=np.int64)
            # A word without any token of its own (spaces of Unicode, for example) has no place to be judged at.
            for word, first in enumerate(firsts, start=done):
                if first >= 0:
                    truth[first], numbered[first] = numbers[named[word]], word
            done += len(firsts)
            rows.append(row)
            tags.append(truth)
            places.append(numbered)
            owners.append(owner)
    return TagSamples(rows, tags, places, np.array(owners, dtype=np.int64), encoder, known)


def row_names(read: TaggedText, owners: Ints) -> list[str]:
    """A name for each row, the same for all rows of a text, so that they fall on one side of a split."""
    return [" ".join(read.words[owner]) for owner in owners]


def _jsonl(path: Path) -> Iterator[tuple[list[str], list[str]]]:
    for number, fields in json_lines(path):
        names = list(fields)
        word, tag = column(names, WORD_FIELDS), column(names, TAG_FIELDS)
        if word is None or tag is None:
            raise UserError(f"{path}, line {number} needs the fields 'tokens' and 'tags', it has {', '.join(names)}")
        words, tags = fields[names[word]], fields[names[tag]]
        if not isinstance(words, list) or not isinstance(tags, list) or len(words) != len(tags):
            raise UserError(f"{path}, line {number} has tokens and tags that are no lists of equal length")
        if any(each is None or isinstance(each, list | dict) or not str(each).strip() for each in [*words, *tags]):
            raise UserError(f"{path}, line {number} has an empty token or tag")
        if words:
            yield [str(each) for each in words], [str(each).strip() for each in tags]


def _columns(path: Path) -> Iterator[tuple[list[str], list[str]]]:
    words: list[str] = []
    tags: list[str] = []
    for number, line in enumerate([*read_text(path).split("\n"), ""], start=1):
        if not line.strip():
            if words:
                yield words, tags
            words, tags = [], []
            continue
        cells = line.rstrip("\r").split("\t") if "\t" in line else line.split()
        if cells[0].strip() == "-DOCSTART-":
            continue
        if len(cells) < 2 or not cells[0].strip() or not cells[-1].strip():
            raise UserError(f"{path}, line {number} needs a word and a tag, with a tab between them")
        words.append(cells[0].strip())
        tags.append(cells[-1].strip())
