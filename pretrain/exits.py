"""Exit statuses of a run besides 0, 1 (failed) and 2 (bad input), after sysexits.h; imports nothing."""

from __future__ import annotations

PEER_LOST = 69
"""A process could not go on without another one (EX_UNAVAILABLE)."""
HUNG = 70
"""The watchdog ended a run that stood still (EX_SOFTWARE)."""
REQUEUE = 75
"""Told to stop, saved, and to be started again (EX_TEMPFAIL: "try again later")."""
