"""Byte-level byte-pair encoding: any text to token ids and back without loss.

Training, merging and encoding are the `tokenizers` library's. What this room adds is a fixed set of special
tokens, the promise that *text* can never spell one of them, and the number of bytes behind each id.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from data.errors import UserError

PAD, BOS, EOS, MASK = "<|pad|>", "<|bos|>", "<|eos|>", "<|mask|>"
FIM_PREFIX, FIM_MIDDLE, FIM_SUFFIX = "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"
SPECIAL_TOKENS = (PAD, BOS, EOS, MASK, FIM_PREFIX, FIM_MIDDLE, FIM_SUFFIX)
"""In the order of their ids (0, 1, 2, …) in every tokenizer trained here; the last three are reserved."""
MINIMUM_VOCABULARY = 256 + len(SPECIAL_TOKENS)
"""Every byte and every special token has an id of its own."""


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-pair encoding learned from `texts` (Sennrich et al. 2016, on bytes as in GPT-2).

    The vocabulary holds the special tokens, the 256 bytes, then merges; it stays smaller than `vocab_size`
    where the texts are too short for that many merges. Raises `UserError` for a `vocab_size` without room for
    every byte.
    """
    if vocab_size < MINIMUM_VOCABULARY:
        raise UserError(
            f"a vocabulary of {vocab_size} cannot hold the 256 bytes and {len(SPECIAL_TOKENS)} special tokens"
            f"; ask for {MINIMUM_VOCABULARY} or more"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.encode_special_tokens = True
    return tokenizer


def load(path: str | Path) -> Tokenizer:
    """The tokenizer in a `tokenizer.json`, or in the folder that holds one.

    Adds no special tokens by itself and reads special tokens spelled out in the text as ordinary text. Raises
    `UserError` where there is no such file, it is not a tokenizer, or a needed special token is missing.
    """
    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"no tokenizer at {file}; name a tokenizer.json or the folder of a text dataset or export")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception for every kind of bad file
        raise UserError(f"{file} is not a tokenizer of the tokenizers library ({error}); train a new one") from error
    missing = [token for token in (PAD, BOS, EOS, MASK) if tokenizer.token_to_id(token) is None]
    if missing:
        raise UserError(f"the tokenizer {file} lacks {', '.join(missing)}; add them as special tokens or train one")
    tokenizer.post_processor = None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True
    return tokenizer


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """The ids of the four special tokens that training needs: `{"pad": …, "bos": …, "eos": …, "mask": …}`."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    return {name: vocabulary[f"<|{name}|>"] for name in ("pad", "bos", "eos", "mask")}


def token_bytes(tokenizer: Tokenizer) -> NDArray[np.int64]:
    """UTF-8 bytes that each id stands for, int64 (vocabulary,); 0 for special tokens.

    Exact for byte-level vocabularies, where each character of a token's name is one byte: the bytes of a
    text's ids sum to the bytes of the text. Raises `UserError` for any other kind of tokenizer.
    """
    described = json.loads(tokenizer.to_str())
    if "ByteLevel" not in json.dumps([described["pre_tokenizer"], described["decoder"]]):
        raise UserError("bytes per token are only known for byte-level tokenizers; train or load a byte-level one")
    counts = np.zeros(1 + max(tokenizer.get_vocab(with_added_tokens=True).values()), dtype=np.int64)
    for token, index in tokenizer.get_vocab(with_added_tokens=False).items():
        counts[index] = len(token)
    for index, added in tokenizer.get_added_tokens_decoder().items():
        counts[index] = 0 if added.special else len(added.content.encode())
    return counts


def tokenizer_files(tokenizer: Tokenizer, context: int, add_eos: bool = False) -> dict[str, bytes]:
    """`tokenizer.json` and `tokenizer_config.json` that `AutoTokenizer.from_pretrained` reads.

    The loaded tokenizer puts `<|bos|>` in front of a text (and `<|eos|>` behind it with `add_eos`), and, like
    ours, reads special tokens spelled out in a text as ordinary text (`split_special_tokens`).
    """
    special = special_ids(tokenizer)
    copy = Tokenizer.from_str(tokenizer.to_str())
    behind = f" {EOS}" if add_eos else ""
    copy.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A{behind}",
        pair=f"{BOS} $A{behind} {BOS} $B{behind}",
        special_tokens=[(BOS, special["bos"]), (EOS, special["eos"])],
    )
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "bos_token": BOS,
        "eos_token": EOS,
        "cls_token": BOS,
        "sep_token": EOS,
        "mask_token": MASK,
        "model_max_length": context,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "split_special_tokens": True,
    }
    text = json.dumps(described, indent=2) + "\n"
    return {"tokenizer.json": copy.to_str(pretty=True).encode(), "tokenizer_config.json": text.encode()}
