"""Results in a file of JSON lines: each is written when it is there, so that a run which was stopped goes on."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


class Records(Mapping[str, dict[str, Any]]):
    """The records of a file by their "key"; the later one of two.

    A key says all that a record holds for, sources included, so those of other conditions stay in the file and are not
    asked for.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        # a line that was cut off while it was written is no record
        whole = path.read_text().splitlines(keepends=True) if path.exists() else []
        self._records = {record["key"]: record for record in map(json.loads, (x for x in whole if x.endswith("\n")))}
        if whole and not whole[-1].endswith("\n"):
            path.write_text("".join(whole[:-1]))

    def add(self, record: dict[str, Any]) -> None:
        """Keep a record, in the file too."""
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        self._records[record["key"]] = record

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self._records[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)
