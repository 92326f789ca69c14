"""One dataset written by many jobs that share nothing but a folder, and joined at the end.

In `OUT/.parts`: `plan.json` says what is being made (every job works it out for itself and finds the same),
`shard-000012.json` that a shard is whole, `part-3-of-8.json` that a part has done all its shards. `merge` turns
the sum of them into the dataset's manifest and removes the folder.
"""

from __future__ import annotations

import hashlib
import json
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.errors import UserError
from data.files import remove_folder, write_atomically
from data.shards import MANIFEST, write_manifest

FOLDER = ".parts"
_PART = re.compile(r"part-(\d+)-of-(\d+)\.json")


@dataclass(frozen=True)
class Part:
    """Part `number` (from 0) of `count`."""

    number: int
    count: int

    @property
    def name(self) -> str:
        """Of the file that says it is done."""
        return f"part-{self.number}-of-{self.count}.json"


def parse_part(text: str) -> Part:
    """`3/8`, counted from 0; raises `UserError` for anything else."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not int(found[1]) < int(found[2]):
        raise UserError(f"--part {text} is none; parts count from 0: 0/8, 1/8, … 7/8")
    return Part(int(found[1]), int(found[2]))


class PartFolder:
    """The records of a dataset that is written in parts."""

    def __init__(self, out: Path, plan: dict[str, Any], part: Part) -> None:
        """Joins the work on `out`.

        `plan` is all that decides what is written, the same for every part.

        Raises:
            UserError: something else lies at `out`, is being made there, or it cannot be written.
        """
        self.out, self.part, self.folder = out, part, out / FOLDER
        self.plan = hashlib.sha256(json.dumps([plan, part.count], sort_keys=True).encode()).hexdigest()
        self.merged = _plan_of_dataset(out) == self.plan
        """Whether the parts have been joined already."""
        if self.merged:
            return
        if out.exists() and any(out.iterdir()) and not self.folder.is_dir():
            raise UserError(f"{out} already exists and is not written in parts; remove it or choose another folder")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / "plan.json"
            if not path.exists():
                write_atomically(path, json.dumps({"plan": self.plan, "parts": part.count} | plan))
            found = json.loads(path.read_text())
        except OSError as error:
            raise UserError(f"cannot write {out}: {error.strerror}; choose a folder you own") from None
        if found["plan"] != self.plan:
            raise UserError(
                f"{out} is being written in {found['parts']} parts from other files or with other settings; give every "
                "part the same ones, or remove it"
            )

    @property
    def done(self) -> bool:
        """Whether this part has nothing left to do."""
        return self.merged or (self.folder / self.part.name).exists()

    def record(self, shard: str) -> dict[str, Any] | None:
        """What was said about a shard that is whole, its tar of the size it should have; else None."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            record = dict(json.loads(self._path(shard).read_text()))
            entry = record["entry"]
            if entry is None or (self.out / entry["name"]).stat().st_size == entry["bytes"]:
                return record
        return None

    def add(self, shard: str, record: dict[str, Any]) -> None:
        """Say that a shard is whole (`entry` is the manifest's, None for a shard without samples)."""
        write_atomically(self._path(shard), json.dumps(record))

    def finish(self) -> None:
        """Say that this part has done all its shards."""
        write_atomically(self.folder / self.part.name, json.dumps({"plan": self.plan}))

    def clear(self, shard: str) -> None:
        """Remove what a killed writer of a shard left."""
        for path in self.out.glob(f".{shard.removesuffix('.tar')}.*.partial"):
            path.unlink(missing_ok=True)

    def _path(self, shard: str) -> Path:
        return self.folder / f"{shard.removesuffix('.tar')}.json"


def _plan_of_dataset(out: Path) -> str | None:
    with suppress(OSError, ValueError, KeyError, TypeError):
        return str(json.loads((out / MANIFEST).read_text())["plan"])
    return None


def merge(out: Path) -> dict[str, Any]:
    """Join the parts written to `out` into a dataset; a dataset that was joined already is left as it is.

    Returns:
        `samples`, `shards`, `unreadable` (a count) and `parts`.

    Raises:
        UserError: nothing was written there in parts, or some part is missing.
    """
    folder = out / FOLDER
    if not folder.is_dir():
        if _plan_of_dataset(out):
            shards = json.loads((out / MANIFEST).read_text())["shards"]
            return {"samples": sum(s["samples"] for s in shards), "shards": len(shards), "parts": 0, "unreadable": 0}
        raise UserError(f"{out} holds no parts; write them with `headwater shard images|text … --part 0/N`")
    try:
        plan = json.loads((folder / "plan.json").read_text())
        done = {int(found[1]) for path in folder.iterdir() if (found := _PART.fullmatch(path.name))}
        missing = sorted(set(range(plan["parts"])) - done)
        if missing:
            named = ", ".join(f"{number}/{plan['parts']}" for number in missing[:10])
            raise UserError(f"{out} is not whole: parts {named} are not done ({len(missing)} in all); run them first")
        if plan["kind"] == "text":
            from data.text_parts import merge_text

            return merge_text(out, plan) | {"parts": plan["parts"]}
        records = [json.loads(path.read_text()) for path in sorted(folder.glob("shard-*.json"))]
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error.strerror}") from None
    if len(records) != plan["shards"]:
        raise UserError(
            f"{out} has records of {len(records)} shards where {plan['shards']} were planned; run the parts"
        )
    entries = [record["entry"] for record in records if record["entry"] is not None]
    if not entries:
        raise UserError(f"no usable sample was found for {out}; check the source")
    write_manifest(out, plan["kind"], plan["about"], entries, plan=plan["plan"])
    remove_folder(folder)
    unreadable = sum(len(record["unreadable"]) for record in records)
    samples = sum(entry["samples"] for entry in entries)
    return {"samples": samples, "shards": len(entries), "parts": plan["parts"], "unreadable": unreadable}
