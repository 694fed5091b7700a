"""Records are read whatever the names of their headers are."""

from typing import Any

import pytest
from aiokafka.codec import has_lz4
from aiokafka.consumer import fetcher
from aiokafka.record.default_records import _DefaultRecordBatchBuilderPy

from workers.transport import Records

LZ4 = 3


class Odd(str):
    """A name that no decoder knows."""

    def encode(self, *_: Any) -> bytes:
        return b"\xff\xfe"


def batch(first: int, *names: str, compression: int = 0) -> bytes:
    """Return a batch of one record a name, each with one header."""
    builder = _DefaultRecordBatchBuilderPy(2, compression, 0, -1, -1, -1, 65_536)
    for number, name in enumerate(names):
        builder.append(number, 1_000, b"key", b"value", [("ce_id", b"1"), (name, None)])
    made = builder.build()
    made[:8] = first.to_bytes(8)
    return bytes(made)


def test_the_fetcher_reads_with_our_reader() -> None:
    assert fetcher.MemoryRecords is Records


@pytest.mark.parametrize("compression", [0, LZ4] if has_lz4() else [0])
def test_a_header_whose_name_is_not_utf_8_holds_nothing_up(compression: int) -> None:
    records = Records(batch(7, "a", Odd("x"), "ü", compression=compression) + batch(10, "b"))

    found = []
    while records.has_next():
        one = records.next_batch()
        assert one is not None
        assert one.validate_crc()
        found += [(record.offset, record.value, record.headers) for record in one]

    names = {7: "a", 8: r"\xff\xfe", 9: "ü", 10: "b"}
    assert found == [(offset, b"value", [("ce_id", b"1"), (name, None)]) for offset, name in names.items()]
    assert records.next_batch() is None
