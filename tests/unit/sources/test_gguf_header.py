"""A GGUF file that declares more than it has is refused at once, with little memory."""

import struct

import pytest
from fetch_script import refused

from slmake.sources import gguf_header

ENDLESS = 10**9


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


ARCHITECTURE = key("general.architecture", 8, text("llama"))


def gguf(*keys: bytes, count: int | None = None, tensors: int = 0, tail: bytes = b"") -> bytes:
    counts = struct.pack("<IQQ", 3, tensors, 1 + len(keys) if count is None else count)
    return b"GGUF" + counts + ARCHITECTURE + b"".join(keys) + tail


DAMAGED = {
    "numbers": (gguf(key("x.y", 9, struct.pack("<IQ", 0, ENDLESS))), "`x.y`: 1,000,000,000 values are declared"),
    "texts": (gguf(key("x.y", 9, struct.pack("<IQ", 8, ENDLESS) + text("a"))), "`x.y`: 1,000,000,000 values"),
    "arrays": (
        gguf(key("x.y", 9, struct.pack("<IQIQ", 9, 1, 0, ENDLESS))),
        "`x.y`: 1,000,000,000 values are declared, but the file ends 0 bytes later",
    ),
    "unknown": (gguf(key("x.y", 9, struct.pack("<IQ", 77, ENDLESS))), "`x.y`: 1,000,000,000 values are declared"),
    "unknown, few": (gguf(key("x.y", 9, struct.pack("<IQ", 77, 1) + b"a")), "`x.y` is of an unknown type"),
    "nested": (gguf(key("x.y", 9, struct.pack("<IQ", 9, 1) * 5000 + struct.pack("<IQ", 0, 0))), "arrays within arrays"),
    "a text": (gguf(key("x.y", 8, struct.pack("<Q", 2**62))), "4,611,686,018,427,387,904 bytes of `x.y` are declared"),
    "keys": (gguf(count=2**60), "1,152,921,504,606,846,976 keys and 0 tensors are declared"),
    "tensors": (gguf(tensors=2**60), "1 keys and 1,152,921,504,606,846,976 tensors are declared"),
    "dimensions": (
        gguf(tensors=1, tail=text("t.w") + struct.pack("<I", 2**31) + bytes(64)),
        "tensor t.w: 2,147,483,648 dimensions are declared",
    ),
}


@pytest.mark.parametrize(("content", "reason"), DAMAGED.values(), ids=DAMAGED.keys())
def test_what_the_file_has_no_room_for_is_refused(tmp_path, capsys, content, reason):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    message = refused(tmp_path, capsys, path)
    assert f"{path}: transformers cannot read this GGUF file: " in message
    assert reason in message


def test_a_sound_file_in_either_byte_order_passes(tmp_path, gguf_file):
    from gguf import GGUFEndian, GGUFWriter

    gguf_header.check(gguf_file)
    writer = GGUFWriter(tmp_path / "big.gguf", "llama", endianess=GGUFEndian.BIG)
    writer.add_token_list(["a", "b"])
    writer.add_array("x.lists", [[1, 2], [3, 4]])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    gguf_header.check(tmp_path / "big.gguf")
