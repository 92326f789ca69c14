"""Between our text model and transformers' `ModernBertDecoder` folders.

One set of weights, two spellings: ours is the encoder's (`Wqkv` in one matrix), the decoder splits q, k and v.
`config.json` carries the rotary bases and the window under the keys of transformers 4.57 and of 5.x.

What the foreign versions honour: local windows are right in both. transformers 4.57 takes the global rotary
base in local layers too, so a model with two bases cannot be exported (the two versions would disagree in
silence); and a folder that 4.57 *saves again* forgets `local_attention` other than 128.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
from safetensors import SafetensorError
from tokenizers import Tokenizer, processors
from torch import Tensor

from data.errors import UserError
from data.tokenizer import BOS, EOS, MASK, PAD, load, special_ids
from pretrain.encoders.text import TextConfig

if TYPE_CHECKING:
    from pretrain.objectives.next_token import NextToken

State = dict[str, Tensor]
_EMBEDDING = "model.embeddings.tok_embeddings.weight"
_ALWAYS = {
    "hidden_activation": "gelu",
    "classifier_activation": "gelu",
    "norm_bias": False,
    "attention_bias": False,
    "mlp_bias": False,
    "classifier_bias": False,
    "decoder_bias": True,
    "tie_word_embeddings": True,
}
"""What the decoder's configuration must say for its layers to be ours."""


def to_decoder(state: Mapping[str, Tensor], config: TextConfig, special: dict[str, int]) -> tuple[dict[str, Any], State]:
    """`config.json` and tensors of a `ModernBertDecoderForCausalLM` with the logits of a `NextToken`.

    `state` is the objective's `state_dict()`, `special` the ids of `pad`, `bos`, `eos` and `mask`. Raises
    `UserError` for local layers with a rotary base of their own (see above).
    """
    if any(map(config.is_local, range(config.depth))) and config.local_rope_theta not in (None, config.rope_theta):
        raise UserError(
            f"local_rope_theta {config.local_rope_theta} differs from rope_theta {config.rope_theta}: transformers "
            "4.57 would read such a decoder wrongly; leave local_rope_theta out of the recipe"
        )
    tensors: State = {}
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        if name.endswith("attn.Wqkv.weight"):
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                new = name.replace("encoder.", "model.", 1).replace("Wqkv", f"{letter}_proj")
                tensors[new] = part.clone()
        elif name == "head.bias":
            tensors["decoder.bias"] = tensor
        elif name.startswith("head."):
            tensors[name.replace("head.", "lm_head.", 1)] = tensor
        else:
            tensors[name.replace("encoder.", "model.", 1)] = tensor
    return _decoder_config(config, special), tensors


def _decoder_config(config: TextConfig, special: dict[str, int]) -> dict[str, Any]:
    kinds = ["sliding_attention" if config.is_local(layer) else "full_attention" for layer in range(config.depth)]
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    return {
        "architectures": ["ModernBertDecoderForCausalLM"],
        "model_type": "modernbert-decoder",
        "dtype": "float32",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.context,
        "norm_eps": config.norm_eps,
        **_ALWAYS,
        "layer_types": kinds,
        "global_attn_every_n_layers": config.global_every,
        "local_attention": config.local_attention,
        # transformers 4.57 reads the first two, 5.x the third.
        "global_rope_theta": config.rope_theta,
        "local_rope_theta": config.rope_theta,
        "rope_parameters": {"full_attention": dict(rope), "sliding_attention": dict(rope)},
        "pad_token_id": special["pad"],
        "bos_token_id": special["bos"],
        "eos_token_id": special["eos"],
        "cls_token_id": special["bos"],
        "sep_token_id": special["eos"],
    }


def from_decoder(folder: str | Path) -> tuple[TextConfig, State, State]:
    """Shape, encoder state and prediction-head state from a `ModernBertDecoderForCausalLM` folder.

    The inverse of `to_decoder`. Raises `UserError` for a folder without `config.json` and
    `model.safetensors`, another kind of model, or layers that ours cannot express.
    """
    folder = Path(folder)
    described, tensors = _read(folder)
    config = _text_config(described, folder)
    encoder: State = {}
    head: State = {}
    try:
        for layer in range(config.depth):
            prefix = f"layers.{layer}.attn."
            parts = [tensors.pop(f"model.{prefix}{letter}_proj.weight") for letter in "qkv"]
            encoder[f"{prefix}Wqkv.weight"] = parts[0].new_tensor(0).expand(0) if not parts else _joined(parts)
        head["bias"] = tensors.pop("decoder.bias")
    except KeyError as error:
        raise UserError(f"{folder}/model.safetensors lacks {error}; export the model again") from error
    tensors.pop("decoder.weight", None)
    for name, tensor in tensors.items():
        if name.startswith("lm_head."):
            head[name.removeprefix("lm_head.")] = tensor
        else:
            encoder[name.removeprefix("model.")] = tensor
    return config, encoder, head


def _read(folder: Path) -> tuple[dict[str, Any], State]:
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}; give the folder of an export or a transformers checkpoint")
    try:
        return json.loads((folder / "config.json").read_text()), safetensors.torch.load_file(folder / "model.safetensors")
    except (json.JSONDecodeError, SafetensorError) as error:
        raise UserError(f"{folder} is damaged ({error}); export or download it again") from error
