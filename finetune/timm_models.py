"""timm's models by their names, put into a folder of timm's own layout for as long as the process lives."""

from __future__ import annotations

import atexit
import difflib
import json
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path

import torch

from data.errors import UserError

UNTRAINED = "untrained:"


@lru_cache(maxsize=8)
def folder_of(name: str) -> Path:
    """A folder with the weights of timm's model `name` (`NAME.TAG` chooses among several), or drawn ones behind
    `untrained:`.

    Raises:
        UserError: timm has no such model, or none with weights, or its hub cannot be reached.
    """
    import timm
    from safetensors.torch import save_file

    plain = name.removeprefix(UNTRAINED)
    if not timm.is_model(plain):
        close = difflib.get_close_matches(plain, timm.list_models(), n=2)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise UserError(
            f"encoder {name!r} is not a folder (an export: `headwater export RUN OUT`), nor a model of timm's{hint}"
        )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = timm.create_model(plain, pretrained=plain == name, num_classes=0)
    except Exception as error:  # the hub's client raises errors of many libraries
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(
            f"timm's pretrained weights of {plain!r} could not be had ({reason[:200]}); get its folder on a machine "
            f"that reaches the hub, or start from {UNTRAINED}{plain}"
        ) from None
    folder = Path(tempfile.mkdtemp(prefix="headwater-timm-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    preset = {key: value for key, value in model.pretrained_cfg.items() if _plain(value)}
    config = {
        "architecture": model.pretrained_cfg["architecture"],
        "num_classes": 0,
        "num_features": model.num_features,
        "pretrained_cfg": preset | {"num_classes": 0},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    state = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _plain(value: object) -> bool:
    return isinstance(value, str | int | float | bool | list | tuple)
