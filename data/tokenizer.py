"""Byte-level byte-pair encoding: any text to token ids and back without loss.

Training, merging and encoding are the `tokenizers` library's. What this room adds is a fixed set of special
tokens, the promise that *text* can never spell one of them, and the number of bytes behind each id.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from data.errors import UserError

PAD, BOS, EOS, MASK = "<|pad|>", "<|bos|>", "<|eos|>", "<|mask|>"
FIM_PREFIX, FIM_MIDDLE, FIM_SUFFIX = "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"
SPECIAL_TOKENS = (PAD, BOS, EOS, MASK, FIM_PREFIX, FIM_MIDDLE, FIM_SUFFIX)
"""In the order of their ids (0, 1, 2, …) in every tokenizer trained here; the last three are reserved."""
_SPELLINGS = {
    "pad": (PAD, "[PAD]", "<pad>"),
    "bos": (BOS, "[CLS]", "<s>"),
    "eos": (EOS, "[SEP]", "</s>"),
    "mask": (MASK, "[MASK]", "<mask>"),
}
"""Ours, then those of tokenizers made elsewhere for models of this kind."""
_BYTE = re.compile("<0x[0-9A-F]{2}>")
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


def train_characters(texts: Iterable[str]) -> Tokenizer:
    """A token for every character that occurs in `texts`, in order of their code points.

    Characters that do not occur are spelled by tokens for their bytes, so nothing is lost on other texts.
    """
    characters: set[str] = set()
    for text in texts:
        characters.update(text)
    names = [*SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(characters)]
    vocabulary = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
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
    missing = [f"<|{name}|>" for name, token in special_tokens(tokenizer).items() if token is None]
    if missing:
        raise UserError(f"the tokenizer {file} lacks {', '.join(missing)}; add them as special tokens or train one")
    tokenizer.post_processor = None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True
    return tokenizer


def special_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """How the four special tokens that training needs are spelled: under `pad`, `bos`, `eos` and `mask`.

    As ours, as BERT's or as RoBERTa's; one that the tokenizer lacks is None, which `load` refuses.
    """
    found = {}
    for name, spellings in _SPELLINGS.items():
        known = [spelling for spelling in spellings if tokenizer.token_to_id(spelling) is not None]
        found[name] = known[0] if known else None
    return found  # type: ignore[return-value]


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """The ids of the four special tokens that training needs: `{"pad": …, "bos": …, "eos": …, "mask": …}`."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    return {name: vocabulary[token] for name, token in special_tokens(tokenizer).items()}


def token_bytes(tokenizer: Tokenizer) -> NDArray[np.int64]:
    """UTF-8 bytes that each id stands for, int64 (vocabulary,); 0 for special tokens.

    Exact for byte-level vocabularies, where each character of a token's name is one byte, and for those of
    characters: the bytes of a text's ids sum to the bytes of the text. Raises `UserError` for any other kind of
    tokenizer.
    """
    described = json.loads(tokenizer.to_str())
    fallback = bool(described["model"].get("byte_fallback")) and not described["model"]["merges"]
    if not fallback and "ByteLevel" not in json.dumps([described["pre_tokenizer"], described["decoder"]]):
        raise UserError("bytes per token are only known for byte-level tokenizers; train or load a byte-level one")
    counts = np.zeros(1 + max(tokenizer.get_vocab(with_added_tokens=True).values()), dtype=np.int64)
    for token, index in tokenizer.get_vocab(with_added_tokens=False).items():
        if fallback:
            counts[index] = 1 if _BYTE.fullmatch(token) else len(token.encode())
        else:
            counts[index] = len(token)
    for index, added in tokenizer.get_added_tokens_decoder().items():
        counts[index] = 0 if added.special else len(added.content.encode())
    return counts


def tokenizer_files(tokenizer: Tokenizer, context: int, causal: bool = True) -> dict[str, bytes]:
    """`tokenizer.json` and `tokenizer_config.json` that `AutoTokenizer.from_pretrained` reads.

    A `causal` model's tokenizer puts `<|bos|>` in front of a text, pads on the left and, like ours, reads special
    tokens spelled out in a text as ordinary text (`split_special_tokens`). Another's puts `<|eos|>` behind it as
    well, pads on the right and takes `<|mask|>` in a text for the mask, together with a space before it, since a
    masked word's token holds that space.
    """
    names, special = special_tokens(tokenizer), special_ids(tokenizer)
    bos, eos = names["bos"], names["eos"]
    copy = Tokenizer.from_str(tokenizer.to_str())
    behind = "" if causal else f" {eos}"
    copy.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A{behind}",
        pair=f"{bos} $A{behind} {bos} $B{behind}",
        special_tokens=[(bos, special["bos"]), (eos, special["eos"])],
    )
    described: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": names["pad"],
        "bos_token": bos,
        "eos_token": eos,
        "cls_token": bos,
        "sep_token": eos,
        "mask_token": names["mask"],
        "model_max_length": context,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "padding_side": "left" if causal else "right",
        "split_special_tokens": causal,
    }
    whole = json.loads(copy.to_str())
    for added in whole["added_tokens"]:
        if added["content"] == names["mask"]:
            added["lstrip"] = not causal
    if not causal:
        described["mask_token"] = {"__type": "AddedToken", "content": names["mask"], "lstrip": True, "special": True}
        described["mask_token"] |= {"rstrip": False, "normalized": False, "single_word": False}
    text = json.dumps(whole, indent=2, ensure_ascii=False) + "\n"
    config = json.dumps(described, indent=2) + "\n"
    return {"tokenizer.json": text.encode(), "tokenizer_config.json": config.encode()}
