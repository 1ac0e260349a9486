"""Results in a file of JSON lines: each is written when it is there, so that a run which was stopped goes on."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from statemix import records
from statemix.files import write_whole

# its form, see statemix/records.py; which of the fields there are is a matter of what was measured
RECORD = {
    "key": str,
    "part?": str,
    "name?": str,
    "kind?": str,
    "dtype?": str,
    "wrong?": str,
    "unavailable?": str,
    "order?": int,
    "parameters?": int,
    "d_model?": int,
    "bytes?": [float],
    "forward?": float,
    "backward?": float,
    "forward_with_host?": float,
    "backward_with_host?": float,
    "forward_backward?": float,
    "bytes_per_second?": float,
    "tokens_per_second?": float,
}


class Records(Mapping[str, dict[str, Any]]):
    """The records of a file by their "key"; the later one of two.

    A key says all that a record holds for, sources included, so those of other conditions stay in the file and are not
    asked for.

    Raises:
        ValueError: a line of the file is no record; the message names file, line and field.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._records: dict[str, dict[str, Any]] = {}
        if not path.exists():
            return
        found = records.read_lines(path, RECORD, "bench", "Mend that line, or use another `out`.")
        self._records = {record["key"]: record for record in found}
        content = path.read_bytes()
        write_whole(path, content[: content.rfind(b"\n") + 1])  # without what was cut off while it was written

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
