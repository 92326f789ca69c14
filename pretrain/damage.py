"""How much of the data turned out to be damaged, agreed between the processes."""

from __future__ import annotations

from accelerate.utils import gather_object

from data.errors import DamagedData
from pretrain.job import Job

_MOST_TOLD = 5


def count_damage(job: Job) -> list[str]:
    """Bring `state.damaged` up to date: damaged samples that all processes have replaced since the run began.

    Every process must call it at the same step. Returns what was wrong with some of the new ones, and does
    nothing where no damage is tolerated (the first damaged sample ends such a run).

    Raises:
        DamagedData: more were replaced than `data.damaged` allows; on every process.
    """
    state, tolerated = job.state, job.loader.tolerance
    if not tolerated:
        return []
    counts, told = zip(*gather_object([job.loader.take_damage()]), strict=True)
    state.damaged += sum(counts)
    sentences = [sentence for each in told for sentence in each]
    if state.damaged > tolerated:
        raise DamagedData(
            f"{state.damaged} damaged samples were replaced, more than data.damaged={tolerated} tolerates; the last: "
            f"{sentences[-1] if sentences else 'before this run was resumed'}"
        )
    return sentences[:_MOST_TOLD]
