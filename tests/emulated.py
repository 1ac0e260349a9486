"""The kernels compiled for another processor and run by an emulator, on a part of the table of sanitize.py.

`make aarch64` runs this. A library in another process stands in for that of this one: the memory that a call points to
goes there and comes back, so all that calls the kernels, tests included, is as it always is.
"""

import ctypes
import struct
import subprocess
import sys

import sanitize
from torch import Tensor

from statemix.kernels import gating, layers, library, memory, steps
from statemix.scan import cpu

LINE = 64  # bytes


class Emulated(library.Library):
    """The kernels in the process that `command` starts: tests/emulated.cpp."""

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        (vector_bytes,) = struct.unpack("q", self.process.stdout.read(8))
        self.supported, self.instruction_set = {"baseline": 0}, "baseline"
        self.vector_bytes = {"baseline": vector_bytes}
        self.storages: dict[int, int] = {}  # address -> bytes, the newest last
        self.calls = 0
        self.as_it_was = library.library().as_it_was  # it looks at objects of Python, and those are here
        for module in (cpu, gating, layers, steps):
            module.address = self.address

    def address(self, x: Tensor | None) -> int | None:
        """As `memory.address`, and the memory of the tensor is known from now on."""
        if x is not None:
            storage = x.untyped_storage()
            self.storages.pop(storage.data_ptr(), None)
            self.storages[storage.data_ptr()] = storage.nbytes()
        return memory.address(x)

    def run(self, function: str, problem: ctypes.Structure, instruction_set: str | None = None) -> int:
        """Run the call there, and bring back its results."""
        assert not getattr(problem, "layers", 0), "of a whole model only the logits come through"
        places: dict[int, int] = {}  # of storages in what is sent
        pointers, size = [], 0
        for field, pointer in pointers_of(problem):
            start = next(s for s in reversed(self.storages) if s <= pointer < s + self.storages[s])
            if start not in places:
                places[start] = size + start % LINE
                size = -(-(places[start] + self.storages[start]) // LINE) * LINE
            pointers += [field, places[start] + pointer - start]
        sent = bytearray(size)
        for start, place in places.items():
            sent[place : place + self.storages[start]] = ctypes.string_at(start, self.storages[start])
        head = (library.FUNCTIONS.index(function), ctypes.sizeof(problem), len(pointers) // 2, size)
        self.process.stdin.write(struct.pack("4q", *head) + bytes(problem))
        self.process.stdin.write(struct.pack(f"{len(pointers)}q", *pointers) + sent)
        self.process.stdin.flush()
        (status,) = struct.unpack("q", self.process.stdout.read(8))
        received = self.process.stdout.read(size)
        for start, place in places.items():
            ctypes.memmove(start, received[place : place + self.storages[start]], self.storages[start])
        self.calls += 1
        return status


def pointers_of(problem: ctypes.Structure, offset: int = 0) -> list[tuple[int, int]]:
    """Where in the struct, and in those within it, there are addresses, and which."""
    found = []
    for name, kind in problem._fields_:
        at, value = offset + getattr(type(problem), name).offset, getattr(problem, name)
        if kind is ctypes.c_void_p:
            found += [(at, value)] if value and name != "pairs" else []  # structs with pointers of their own
        elif issubclass(kind, ctypes.Structure):
            found += pointers_of(value, at)
    return found


def main() -> None:
    library._loaded = emulated = Emulated(sys.argv[1:])
    sanitize.run(orders=(1, 2, 3, 5, 8, 16, 17), blocks=(3, 17))
    print(f"{' '.join(sys.argv[1:])}: {emulated.calls:,} calls agree with the loop")


if __name__ == "__main__":
    main()
