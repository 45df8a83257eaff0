"""What a GGUF file's header declares, against the file's size: the readers believe it, and loop over lengths that are not there."""

import mmap
import struct
from pathlib import Path

BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # of a scalar, by its type's number
STRING, ARRAY = 8, 9
# A string begins with its length, an array with its values' type and their number.
SMALLEST = {STRING: 8, ARRAY: 12} | BYTES
# The smallest entries: length of a name, type, value; and that, dimensions, type, offset.
KEY, TENSOR = (8 + 4 + 1, 8 + 4 + 4 + 8)
NESTED = 8  # arrays within arrays
# What to do about a file that is whole, but of which transformers would make another model.
ELSEWHERE = "Name a folder or repository with the safetensors of the same model in fetch_model.source."


def check(file: Path) -> None:
    """Go through the header.

    Raises:
        ValueError: it declares more keys, tensors, values or letters than the file has room for.
    """
    with open(file, "rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as content:
        header = _Header(content)
        tensors, keys = header.number("Q"), header.number("Q")
        header.need(keys * KEY + tensors * TENSOR, f"{keys:,} keys and {tensors:,} tensors")
        for _ in range(keys):
            name = header.text("a key's name")
            header.value(header.number("I"), name)
        for _ in range(tensors):
            name = header.text("a tensor's name")
            dimensions = header.number("I")
            header.skip(8 * dimensions + 12, f"tensor {name}: {dimensions:,} dimensions")


class _Header:
    """A place in a file that moves on with what is read."""

    def __init__(self, content: mmap.mmap):
        self.content, self.place, self.order = content, 4, "<"
        version = self.number("I")
        if version & 0xFFFF == 0:  # written on a machine with the other byte order
            self.order = ">"

    def need(self, size: int, what: str) -> None:
        if size > len(self.content) - self.place:
            raise ValueError(f"{what} are declared, but the file ends {len(self.content) - self.place:,} bytes later.")

    def skip(self, size: int, what: str) -> None:
        self.need(size, what)
        self.place += size

    def number(self, kind: str) -> int:
        begin = self.place
        self.skip(struct.calcsize(kind), "more values")
        return struct.unpack_from(self.order + kind, self.content, begin)[0]

    def text(self, what: str) -> str:
        length = self.number("Q")
        self.skip(length, f"{length:,} bytes of {what}")
        return self.content[self.place - length : self.place][:80].decode(errors="replace")

    def value(self, kind: int, name: str, depth: int = 0) -> None:
        if kind == STRING:
            self.text(f"`{name}`")
        elif kind == ARRAY and depth < NESTED:
            inner, length = self.number("I"), self.number("Q")
            self.need(length * SMALLEST.get(inner, 1), f"`{name}`: {length:,} values")
            if inner in BYTES:
                self.place += length * BYTES[inner]
                return
            for _ in range(length):
                self.value(inner, name, depth + 1)
        elif kind in BYTES:
            self.skip(BYTES[kind], f"the value of `{name}`")
        else:
            raise ValueError(f"`{name}` is of an unknown type, or of arrays within arrays within arrays.")
