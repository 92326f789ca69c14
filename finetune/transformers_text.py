"""Encoders of text from folders of transformers models, encoders and decoders, with their own tokenizers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Self

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from data.errors import UserError
from finetune.encoder import Pooling
from finetune.text_encoder import DocumentEncoder

_LAYER = re.compile(r"(?:layers?|h|blocks?)\.(\d+)\.")
_LONGEST = 2**20
"""Tokenizers without a limit of their own name an enormous one."""


class TransformersText(DocumentEncoder):
    """A text model of transformers: its last hidden states, pooled over the real tokens.

    Read from safetensors alone, and without code from the folder.
    """

    model: Any

    def __init__(self, model: nn.Module, folder: Path, info: dict[str, Any], pooling: Pooling, tokenizer: Any) -> None:
        nn.Module.__init__(self)
        self.model, self.folder, self.info, self.pooling, self.foreign = model, folder, info, pooling, tokenizer
        self.features = int(self.model.config.hidden_size)
        self.context = min(_context(self.model), tokenizer.model_max_length)
        # A copy: encoding must not change how the foreign tokenizer pads and cuts.
        self.tokenizer = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.before, self.behind = _marks(tokenizer)
        ids = (tokenizer.cls_token_id, tokenizer.bos_token_id), (tokenizer.sep_token_id, tokenizer.eos_token_id)
        self.bos, self.eos = (next((each for each in pair if each is not None), -1) for pair in ids)
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else max(self.eos, 0)

    @classmethod
    def load(cls, folder: Path, info: dict[str, Any], pooling: Pooling | None) -> Self:
        """A folder of transformers; `pooling` without a choice is `last` for decoders, else `mean`.

        Raises:
            UserError: another kind of model, weights that do not fit, code that would have to run, no tokenizer.
        """
        from transformers import AutoConfig, AutoModel, AutoTokenizer
        from transformers.utils.logging import disable_progress_bar, set_verbosity_error

        disable_progress_bar()
        set_verbosity_error()  # what is missing is said below
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            _require_text(config, folder)
            model, loading = AutoModel.from_pretrained(
                folder,
                config=config,
                trust_remote_code=False,
                local_files_only=True,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        except Exception as error:  # configurations are checked by several libraries, each with its own errors
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise UserError(f"{folder} does not load as a text model of transformers: {reason[:300]}") from None
        mismatched = [name if isinstance(name, str) else name[0] for name in loading["mismatched_keys"]]
        missing = sorted(name for name in {*loading["missing_keys"], *mismatched} if not name.startswith("pooler."))
        if missing:
            raise UserError(
                f"the weights in {folder} lack {len(missing)} of the model's (such as {missing[0]}); "
                "config.json describes another"
            )
        return cls(_headless(model), folder, info, pooling or ("last" if _is_decoder(config) else "mean"), tokenizer)

    def tokens(self, *inputs: Tensor) -> Tensor:
        tokens, documents = inputs
        hidden: Tensor = self.model(input_ids=tokens, attention_mask=(documents == 0).long()).last_hidden_state
        return hidden

    def layers(self) -> tuple[dict[str, int], int]:
        """Embeddings at 0, layer i at i + 1, everything behind with the last layer."""
        found = {name: _LAYER.search(name) for name, _ in self.named_parameters()}
        last = max((int(match[1]) for match in found.values() if match), default=0) + 1
        depths = {name: int(match[1]) + 1 if match else last for name, match in found.items()}
        return depths | {name: 0 for name in found if _is_embedding(name)}, last + 1

    def no_weight_decay(self) -> set[str]:
        """Token and position embeddings."""
        return {name for name, _ in self.named_parameters() if _is_embedding(name)}

    def untrained(self) -> TransformersText:
        from transformers import AutoModel

        model = _headless(AutoModel.from_config(self.model.config, dtype=torch.float32))
        return TransformersText(model, self.folder, self.info, self.pooling, self.foreign)

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        self.foreign.save_pretrained(folder)


def _headless(model: Any) -> nn.Module:
    """Without BERT's pooler, which nothing here reads: it would get no gradient."""
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    trained: nn.Module = model.eval()
    return trained


def _require_text(config: Any, folder: Path) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{folder} holds a {config.model_type} model of encoder and decoder; give one of the two kinds")
    if getattr(config, "hidden_size", None) is None or getattr(config, "vocab_size", None) is None:
        raise UserError(f"{folder} holds a {config.model_type} model, which is no model of text")


def _is_decoder(config: Any) -> bool:
    names = config.architectures or []
    return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names) or config.model_type in (
        "gpt2",
        "llama",
        "mistral",
        "qwen2",
        "gpt_neox",
        "opt",
        "modernbert-decoder",
    )


def _context(model: Any) -> int:
    """The most tokens of a row. RoBERTa's positions begin behind the padding's number."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.num_embeddings - module.padding_idx - 1
    limit = getattr(model.config, "max_position_embeddings", None)
    return min(int(limit), _LONGEST) if limit else 512


def _marks(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Ids that the tokenizer puts before and behind a text."""
    bare, marked = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    for start in range(len(marked) - len(bare) + 1):
        if marked[start : start + len(bare)] == bare:
            return list(marked[:start]), list(marked[start + len(bare) :])
    raise UserError("the tokenizer changes a text where it adds special tokens; it cannot be used here")


def _is_embedding(name: str) -> bool:
    return "embed" in name or re.search(r"\.w[tp]e\.", name) is not None
