"""How a training process ends: what came of it as an exit status, and a sentence where there is something to say."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from data.errors import UserError
from pretrain.exits import PEER_LOST

_PEER_LOST = ("closed by peer", "reset by peer", "remote process exited")
"""How gloo and NCCL say so."""


def main_process() -> bool:
    """Whether this is the process that speaks, by the launcher's environment."""
    return int(os.environ.get("RANK", "0")) == 0


def exit_status(train: Callable[[], int]) -> int:
    """What `train` returns, or 2 for bad input, 75 when told to stop, 1 for failures, 130 after Ctrl-C."""
    from pretrain.preemption import Preempted
    from pretrain.rollback import RunFailed

    try:
        return train()
    except (UserError, RunFailed) as error:
        _say(str(error))
        return 2 if isinstance(error, UserError) else 1
    except RuntimeError as error:
        # What is left of a process whose peer has ended; the peer, or the launcher, says why.
        if "RANK" in os.environ and any(words in str(error) for words in _PEER_LOST):
            return PEER_LOST
        raise
    except Preempted as stop:
        what = "saved; " if stop.agreed else ""
        _say(f"stopped ({stop.reason}); {what}the same command goes on from there")
        return stop.status
    except KeyboardInterrupt:
        _say("interrupted; the same command goes on from the last checkpoint")
        return 130


def _say(sentence: str) -> None:
    if main_process():
        print(f"headwater: {sentence}", file=sys.stderr)
