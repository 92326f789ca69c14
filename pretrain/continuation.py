"""A run that starts from weights trained before: an export of ours, heads included, or a transformers folder."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from data.errors import UserError
from data.mixture import Samples
from data.tokenizer import load
from pretrain.encoders.modernbert import from_modernbert
from pretrain.encoders.text import TextEncoder
from pretrain.objectives.protocol import Objective

State = dict[str, Tensor]


def take_over(objective: Objective, source: str | Path, data: Samples) -> list[str]:
    """Put the weights of the folder `source` into a new objective.

    From an export of ours comes the whole objective, as far as this one has the same parts: all of it where both
    were trained alike, the encoder and the heads of equal names and shapes otherwise. From a transformers folder of
    ModernBERT's layout come the encoder and, where it has one, the prediction head.

    Returns:
        Names of what stays newly drawn.

    Raises:
        UserError: no such folder, another architecture, or (for text) another vocabulary than the shards'.
    """
    folder = Path(source).expanduser()
    ours = folder / "headwater" / "objective.safetensors"
    if not folder.is_dir():
        raise UserError(f"start={source} is no folder; give an export or a transformers checkpoint")
    if isinstance(objective.encoder, TextEncoder):
        _same_vocabulary(folder, data)
    found = load_file(ours) if ours.is_file() else _foreign(folder, objective)
    state = objective.state_dict()
    wrong = [name for name in state if name.startswith("encoder.") and _misfit(state[name], found.get(name))]
    surplus = [name for name in found if name.startswith("encoder.") and name not in state]
    if wrong or surplus:
        raise UserError(f"start={source} holds another architecture than the recipe's: {_difference(state, found)}")
    fitting = {name: found[name] for name in state if not _misfit(state[name], found.get(name))}
    objective.load_state_dict(fitting, strict=False)
    return sorted(state.keys() - fitting.keys())


def _foreign(folder: Path, objective: Objective) -> State:
    if not isinstance(objective.encoder, TextEncoder):
        raise UserError(f"{folder} is no export of ours; a run over pictures can only start from one")
    loaded = from_modernbert(folder)
    ours, theirs = objective.encoder.config, loaded.config
    for name in ("heads", "rope_theta", "global_every", "local_attention", "norm_eps"):
        if getattr(ours, name) != getattr(theirs, name):
            raise UserError(
                f"{folder} has {name} {getattr(theirs, name)}, the recipe {getattr(ours, name)}; "
                f"set encoder.{name}={getattr(theirs, name)}"
            )
    near = theirs.local_rope_theta or theirs.rope_theta
    if theirs.global_every > 1 and (ours.local_rope_theta or ours.rope_theta) != near:
        raise UserError(f"{folder} has another rotary base in local layers; set encoder.local_rope_theta={near}")
    tensors = {f"encoder.{name}": tensor for name, tensor in loaded.encoder.items()}
    return tensors | {f"head.{name}": tensor for name, tensor in loaded.head.items()}


def _same_vocabulary(folder: Path, data: Samples) -> None:
    theirs, ours = load(folder).get_vocab(), load(data.folder).get_vocab()
    if theirs != ours:
        raise UserError(
            f"{data.folder} was made with another tokenizer than {folder}; shard the text again with "
            f"--tokenizer {folder}"
        )


def _misfit(wanted: Tensor, given: Tensor | None) -> bool:
    return given is None or given.shape != wanted.shape or given.is_floating_point() != wanted.is_floating_point()


def _difference(state: State, found: State) -> str:
    """The first parameter of the encoder that does not fit, in words."""
    for name in sorted(state.keys() | found.keys()):
        if name.startswith("encoder.") and (name not in state or _misfit(state[name], found.get(name))):
            have = tuple(found[name].shape) if name in found else "missing"
            want = tuple(state[name].shape) if name in state else "no such parameter"
            return f"{name} is {have} there and {want} here; set the recipe's encoder as the source's"
    return ""
