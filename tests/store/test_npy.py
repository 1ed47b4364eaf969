"""Files of arrays, also those that are damaged or made to do harm."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest

from latentmill.store.npy import npy_bytes, parse_npy


def with_header(text: str, data: bytes = bytes(16)) -> bytes:
    header = text.encode() + b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


def described(kind: str, shape: str) -> bytes:
    return with_header(f"{{'descr': {kind}, 'fortran_order': False, 'shape': {shape}}}")


def zipped() -> bytes:
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as file:
        file.writestr("a.npy", npy_bytes(np.zeros((2, 2), np.float32)))
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["f2", "f4", ">f8", "i4", "u1"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", [(), (5,), (4, 16), (2, 3, 4)])
def test_an_array_comes_back(kind: str, order: str, shape: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape)).reshape(shape).astype(kind, order=order)
    found = parse_npy(npy_bytes(array))
    assert found.dtype == array.dtype
    assert found.flags.writeable
    assert np.array_equal(found, array)
    for damaged in (npy_bytes(array)[:-1], npy_bytes(array) + b"x", npy_bytes(array)[:20]):
        with pytest.raises(ValueError, match="not"):
            parse_npy(damaged)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PK\x03\x04" + bytes(50),
        zipped(),
        with_header("("),
        with_header("-" * 9000 + "1"),
        with_header("{[]: 1}"),
        with_header("if x:\n  y\n z"),
        described("'<f4'", "(4, 99999999999999)"),
        described("'<f4'", f"(4, {10**40})"),
        described("'<f4'", "(-2, -2)"),
        described("'<f4'", f"({10**40}, 0)"),
        described("'<f4'", "(True, 4)"),
        described("'|O'", "(2,)"),
        described("'<U4'", "(1,)"),
        described("[]", "(4, 1)"),
        described("'V4'", "(4, 1)"),
    ],
    ids=range(16),
)
def test_what_is_no_array_of_numbers(data: bytes) -> None:
    with pytest.raises(ValueError, match="not"):
        parse_npy(data)
