"""Tensors as raw bytes and as JSON, against NumPy and Triton's own codec."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tritonclient.utils import np_to_triton_dtype, triton_to_np_dtype

from serving.dialects.open_inference.tensors import (
    NUMPY_DTYPES,
    datatype_of,
    dtype_of,
    from_bytes,
    from_json,
    to_bytes,
)
from serving.errors import InvalidRequestError

SHAPES = hnp.array_shapes(min_dims=1, max_dims=4, max_side=4)


def arrays(datatypes: Any) -> Any:
    return datatypes.flatmap(
        lambda name: hnp.arrays(
            NUMPY_DTYPES[name],
            SHAPES,
            elements={"allow_nan": False, "allow_infinity": False}
            if NUMPY_DTYPES[name].kind == "f"
            else None,
        )
    )


@pytest.mark.parametrize("name", NUMPY_DTYPES)
def test_a_datatype_is_the_dtype_that_a_third_party_has(name: str):
    assert np.dtype(triton_to_np_dtype(name)) == dtype_of(name, "x")
    assert datatype_of(triton_to_np_dtype(name)) == name
    assert np_to_triton_dtype(dtype_of(name, "x")) == name


@settings(deadline=None, derandomize=True, database=None)
@given(arrays(st.sampled_from(list(NUMPY_DTYPES))), st.integers(0, 7))
def test_bytes_read_back_aligned_from_any_offset(array: Any, offset: int):
    raw = to_bytes(array)
    assert raw == array.astype(array.dtype.newbyteorder("<")).tobytes()
    found = from_bytes(memoryview(b"x" * offset + raw)[offset:], array.dtype, array.shape, "x")
    np.testing.assert_array_equal(found, array)
    assert found.flags.aligned
    assert found.flags.c_contiguous
    assert found.dtype.isnative


@settings(deadline=None, derandomize=True, database=None)
@given(arrays(st.sampled_from([name for name in NUMPY_DTYPES if name != "FP16"])))
def test_json_reads_back_flat_and_nested(array: Any):
    for values in (array.tolist(), array.ravel().tolist()):
        raw = msgspec.Raw(json.dumps(values).encode())
        np.testing.assert_array_equal(from_json(raw, array.dtype, array.shape, "x"), array)


def test_big_endian_and_strided_arrays_leave_in_order():
    values = np.arange(6, dtype=">i4").reshape(2, 3)
    assert to_bytes(values) == np.arange(6, dtype="<i4").tobytes()
    assert to_bytes(values.T) == values.T.astype("<i4").tobytes()


@pytest.mark.parametrize("data", ["5", "{}", '"a"', "true", "[[]]", "[]", "[null]", "[[1],2]"])
def test_what_is_no_list_of_numbers_is_refused(data: str):
    with pytest.raises(InvalidRequestError, match="'x'"):
        from_json(msgspec.Raw(data.encode()), np.dtype("<f4"), [1, 1], "x")
