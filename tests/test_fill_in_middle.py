"""Laws of fill in the middle: nothing is lost but what the row cuts off, marks stand where they should, keys decide."""

from __future__ import annotations

import numpy as np
import torch

from data.batch import TextBatch
from data.fill_in_middle import fill_in_middle
from data.keyed import sample_keys

BOS, EOS = torch.tensor(1), torch.tensor(2)
MARKS = torch.tensor([4, 5, 6])


def rows(b: int, lengths: list[int], seed: int = 0) -> TextBatch:
    """Rows of documents of these lengths (bos and eos included), every token its own number."""
    parts = []
    for length in lengths:
        parts += [1, *[-1] * (length - 2), 2]
    row = torch.tensor(parts)
    row = torch.where(row < 0, torch.arange(len(parts)) + 10, row)
    keys = torch.from_numpy(sample_keys(seed, 0, np.arange(b)))
    return TextBatch(row.repeat(b, 1), (row == 1).cumsum(0).repeat(b, 1), keys, torch.arange(b))


def put_back(tokens: list[int]) -> list[int]:
    """A document in its old order; one that was not moved as it is."""
    if tokens[1] != 4:
        return tokens
    suffix, middle = tokens.index(5), tokens.index(6)
    return [1, *tokens[2:suffix], *tokens[middle + 1 : -1], *tokens[suffix + 1 : middle], 2]


def test_documents_can_be_put_back() -> None:
    batch = rows(200, [9, 30, 3, 2, 12])
    batch.tokens[:, -12:], batch.documents[:, -12:] = 0, 9  # room for the marks
    found = fill_in_middle(batch, 0.7, BOS, EOS, MARKS)
    assert found.tokens.shape == batch.tokens.shape
    moved = 0
    for row, numbers, old in zip(found.tokens, found.documents, batch.tokens, strict=True):
        for number in (1, 2, 3, 4):
            document = row[numbers == number].tolist()
            moved += document[1] == 4
            assert put_back(document) == old[batch.documents[0] == number].tolist()
    assert abs(moved / 600 - 0.7) < 0.08, "a document without a body stays"


def test_cuts_fall_everywhere() -> None:
    batch = rows(3000, [12, 3])
    found = fill_in_middle(batch, 1.0, BOS, EOS, MARKS).tokens
    prefix = (found == 5).long().argmax(1) - 2
    suffix = (found == 6).long().argmax(1) - prefix - 3
    for length in (prefix, suffix):
        counts = length.clamp(0, 10).bincount(minlength=11).float() / 3000
        # Of two uniform cuts in 0..10 the smaller is 0 in 21 of 121 cases, 10 in 1 of 121.
        expected = torch.tensor([(21 - 2 * k) / 121 for k in range(11)])
        assert (counts - expected).abs().max() < 0.03


def test_rows_decide_alone_and_rate_zero_changes_nothing() -> None:
    batch = rows(8, [9, 30, 12])
    whole = fill_in_middle(batch, 0.5, BOS, EOS, MARKS).tokens
    assert torch.equal(
        whole, torch.cat([fill_in_middle(batch[s : s + 2], 0.5, BOS, EOS, MARKS).tokens for s in range(0, 8, 2)])
    )
    assert torch.equal(fill_in_middle(batch, 0.0, BOS, EOS, MARKS).tokens, batch.tokens)
    assert not torch.equal(whole[0], whole[1])


def test_a_document_that_began_before_the_row_stays() -> None:
    batch = rows(4, [20, 5])
    tail = TextBatch(batch.tokens[:, 6:], batch.documents[:, 6:], batch.keys, batch.ids)
    found = fill_in_middle(tail, 1.0, BOS, EOS, MARKS)
    assert torch.equal(found.tokens[:, :14], tail.tokens[:, :14])
    assert (found.tokens[:, 15] == 4).all()
