"""Between our text model and the folders of transformers' ModernBERT, encoder (`ModernBertForMaskedLM`) and
decoder (`ModernBertDecoderForCausalLM`).

One set of weights, two spellings: ours is the encoder's (one `Wqkv` matrix), the decoder splits q, k and v.
`config.json` carries the rotary bases and the window under the keys of transformers 4.57 and of 5.x.

What the foreign versions honour: local windows are right in both. transformers 4.57 takes a decoder's global
rotary base in local layers too, so a causal model with two bases cannot be exported (the two versions would
disagree in silence); and a decoder's folder that 4.57 *saves again* forgets `local_attention` other than 128.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import Tensor

from data.errors import UserError
from data.tokenizer import load, special_ids, tokenizer_files
from pretrain.encoders.text import TextConfig

State = dict[str, Tensor]
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
"""What a configuration must say for its layers to be ours."""
_TYPES = {True: "modernbert-decoder", False: "modernbert"}
_ARCHITECTURES = {True: "ModernBertDecoderForCausalLM", False: "ModernBertForMaskedLM"}
_BARE = {True: "ModernBertDecoderModel", False: "ModernBertModel"}
_HEADS = {True: "lm_head.", False: "head."}
"""What theirs call the prediction head before the tied decoder, by causality."""


class Loaded(NamedTuple):
    """A model read from a folder."""

    config: TextConfig
    causal: bool
    """Whether it is a decoder: tokens see only what is before them."""
    encoder: State
    """State of a `TextEncoder`."""
    head: State
    """State of a `PredictionHead`; empty where the folder holds a bare encoder."""


def to_modernbert(
    state: Mapping[str, Tensor], config: TextConfig, special: dict[str, int], causal: bool
) -> tuple[dict[str, Any], State]:
    """`config.json` and tensors of a folder of theirs with the logits of an objective of ours.

    Args:
        state: tensors under `encoder.` and `head.`, as in the objective's `state_dict()`; others are left out. Without
            any under `head.` the folder holds a bare `ModernBertModel` (or `ModernBertDecoderModel`).
        special: the ids of `pad`, `bos`, `eos` and `mask`.
        causal: for `ModernBertDecoderForCausalLM`, else for `ModernBertForMaskedLM`.

    Raises:
        UserError: a causal model's local layers have a rotary base of their own (see above).
    """
    if causal and any(map(config.is_local, range(config.depth))) and not _one_base(config):
        raise UserError(
            f"local_rope_theta {config.local_rope_theta} differs from rope_theta {config.rope_theta}: "
            "transformers 4.57 would read such a decoder wrongly; leave local_rope_theta out of the recipe"
        )
    bare = "head.bias" not in state
    tensors: State = {}
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        new = name.replace("encoder.", "" if bare else "model.", 1)
        if causal and name.endswith("attn.Wqkv.weight"):
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                tensors[new.replace("Wqkv", f"{letter}_proj")] = part.clone()
        elif name == "head.bias":
            tensors["decoder.bias"] = tensor
        elif name.startswith("head."):
            tensors[name.replace("head.", _HEADS[causal], 1)] = tensor
        elif name.startswith("encoder."):
            tensors[new] = tensor
    described = _foreign_config(config, special, causal)
    return (described | {"architectures": [_BARE[causal]]} if bare else described), tensors


def split_adapter(tensors: Mapping[str, Tensor]) -> State:
    """Low-rank adapters (PEFT's names) of our `Wqkv` as those of the decoder's `q_proj`, `k_proj` and `v_proj`.

    All three share `A`; the rows of `B`, and DoRA's lengths, belong to one of them each: exactly the same sum.
    """
    split: State = {}
    for name, tensor in tensors.items():
        parts = [tensor] * 3 if ".lora_A." in name else tensor.chunk(3)
        if ".Wqkv." in name:
            new = zip("qkv", parts, strict=True)
            split |= {name.replace("Wqkv", f"{letter}_proj"): part.clone() for letter, part in new}
        else:
            split[name] = tensor
    return split


def _one_base(config: TextConfig) -> bool:
    return config.local_rope_theta in (None, config.rope_theta)


def _foreign_config(config: TextConfig, special: dict[str, int], causal: bool) -> dict[str, Any]:
    kinds = ["sliding_attention" if config.is_local(layer) else "full_attention" for layer in range(config.depth)]
    near = config.local_rope_theta or config.rope_theta
    rope = {
        "full_attention": {"rope_type": "default", "rope_theta": config.rope_theta},
        "sliding_attention": {"rope_type": "default", "rope_theta": near},
    }
    # 4.57 compiles an encoder's layers unless told not to.
    only = {} if causal else {"reference_compile": False, "classifier_pooling": "mean"}
    return {
        "architectures": [_ARCHITECTURES[causal]],
        "model_type": _TYPES[causal],
        "dtype": "float32",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.context,
        "norm_eps": config.norm_eps,
        **_ALWAYS,
        **only,
        "layer_types": kinds,
        "global_attn_every_n_layers": config.global_every,
        "local_attention": config.local_attention,
        # transformers 4.57 reads the first two, 5.x the third.
        "global_rope_theta": config.rope_theta,
        "local_rope_theta": near,
        "rope_parameters": rope,
        "pad_token_id": special["pad"],
        "bos_token_id": special["bos"],
        "eos_token_id": special["eos"],
        "cls_token_id": special["bos"],
        "sep_token_id": special["eos"],
    }


def from_modernbert(folder: str | Path) -> Loaded:
    """A model from a folder of theirs, with or without a prediction head; the inverse of `to_modernbert`.

    Raises `UserError` for a folder without `config.json` and `model.safetensors`, another kind of model, or
    layers that ours cannot express.
    """
    folder = Path(folder)
    described, tensors = _read(folder)
    config, causal = _text_config(described, folder), described["model_type"] == _TYPES[True]
    if not any(name.startswith("model.") for name in tensors):  # saved without a head
        tensors = {f"model.{name}": tensor for name, tensor in tensors.items()}
    tensors.pop("decoder.weight", None)
    encoder: State = {}
    head = {"bias": tensors.pop("decoder.bias")} if "decoder.bias" in tensors else {}
    try:
        for layer in range(config.depth if causal else 0):
            parts = [tensors.pop(f"model.layers.{layer}.attn.{letter}_proj.weight") for letter in "qkv"]
            encoder[f"layers.{layer}.attn.Wqkv.weight"] = torch.cat(parts)
    except KeyError as error:
        raise UserError(f"{folder}/model.safetensors lacks {error}; export the model again") from error
    for name, tensor in tensors.items():
        if name.startswith(_HEADS[causal]):
            head[name.removeprefix(_HEADS[causal])] = tensor
        else:
            encoder[name.removeprefix("model.")] = tensor
    return Loaded(config, causal, encoder, head)


def _read(folder: Path) -> tuple[dict[str, Any], State]:
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}; give the folder of an export or a transformers checkpoint")
    try:
        described = json.loads((folder / "config.json").read_text())
        return described, safetensors.torch.load_file(folder / "model.safetensors")
    except (json.JSONDecodeError, SafetensorError) as error:
        raise UserError(f"{folder} is damaged ({error}); export or download it again") from error


def _text_config(described: dict[str, Any], folder: Path) -> TextConfig:
    """Our configuration from theirs; what their file leaves out has the default of their class."""
    if described.get("model_type") not in _TYPES.values():
        kinds_read = " and ".join(_TYPES.values())
        raise UserError(f"{folder} holds a {described.get('model_type')!r} model; only {kinds_read} can be read")
    for key, value in _ALWAYS.items():
        if described.get(key, value) != value:
            raise UserError(f"{folder}/config.json has {key}={described[key]!r}; only {value!r} can be read")
    rope = described.get("rope_parameters") or {}
    if any((part or {}).get("rope_type", "default") != "default" for part in rope.values()):
        raise UserError(f"{folder}/config.json scales its rotary positions; only rope_type 'default' can be read")
    far = (rope.get("full_attention") or {}).get("rope_theta", described.get("global_rope_theta", 160_000.0))
    near = (rope.get("sliding_attention") or {}).get("rope_theta", described.get("local_rope_theta", 10_000.0))
    every = described.get("global_attn_every_n_layers", 3)
    kinds = described.get("layer_types")
    if kinds is not None:
        full = [layer for layer, kind in enumerate(kinds) if kind == "full_attention"]
        every = full[1] if len(full) > 1 else len(kinds)
    fields = {
        "vocab_size": described.get("vocab_size", 50368),
        "width": described.get("hidden_size", 768),
        "depth": described.get("num_hidden_layers", 22),
        "heads": described.get("num_attention_heads", 12),
        "intermediate_size": described.get("intermediate_size", 1152),
        "context": described.get("max_position_embeddings", 8192),
        "rope_theta": far,
        "global_every": every,
        "local_attention": described.get("local_attention") or 128,
        "norm_eps": described.get("norm_eps", 1e-5),
        "pad_token": described.get("pad_token_id", 50283),
    }
    try:
        config = TextConfig.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{folder}/config.json: {first['msg']}; our layers cannot express this model") from error
    local = [config.is_local(layer) for layer in range(config.depth)]
    if kinds is not None and local != [kind == "sliding_attention" for kind in kinds]:
        raise UserError(
            f"{folder}/config.json mixes local and global layers irregularly; only every n-th can be global"
        )
    return config.model_copy(update={"local_rope_theta": near}) if any(local) and near != far else config


def export_files(
    state: Mapping[str, Tensor], config: TextConfig, tokenizer: str | Path, causal: bool
) -> dict[str, bytes]:
    """Every file of a transformers folder for `AutoModel…` and `AutoTokenizer`: name -> bytes.

    A causal model's folder suits `AutoModelForCausalLM`; another's `AutoModelForMaskedLM` and, with the mean
    over tokens that it describes, sentence-transformers.

    Args:
        state: see `to_modernbert`.
        tokenizer: path of the dataset's tokenizer; `UserError` where it does not fit the model.
    """
    ours = load(tokenizer)
    if ours.get_vocab_size() > config.vocab_size:
        raise UserError(
            f"the tokenizer {tokenizer} has {ours.get_vocab_size()} tokens, the model {config.vocab_size}; "
            "export with the tokenizer that the model was trained with"
        )
    special = special_ids(ours)
    described, tensors = to_modernbert(state, config, special, causal)
    files = {
        "config.json": _json(described),
        "model.safetensors": safetensors.torch.save(tensors, metadata={"format": "pt"}),
        **tokenizer_files(ours, config.context, causal),
    }
    if causal:
        generation = {f"{name}_token_id": special[name] for name in ("bos", "eos", "pad")}
        return files | {"generation_config.json": _json(generation)}
    return files | _sentence_files(config)


def _sentence_files(config: TextConfig) -> dict[str, bytes]:
    """What sentence-transformers reads beside the model: mean pooling over all real tokens."""
    library = "sentence_transformers.models"
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": f"{library}.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{library}.Pooling"},
    ]
    pooling = {"word_embedding_dimension": config.width, "pooling_mode_mean_tokens": True}
    return {
        "modules.json": _json(modules),
        "sentence_bert_config.json": _json({"max_seq_length": config.context, "do_lower_case": False}),
        "1_Pooling/config.json": _json(pooling | {"pooling_mode_cls_token": False, "pooling_mode_max_tokens": False}),
    }


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
