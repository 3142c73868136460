"""The protocol's protobuf messages, in a descriptor pool of their own.

Every generated module of this protocol registers `inference.*` in protobuf's default pool, and a
process can hold only one such. A private pool lives beside any client library's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from serving.errors import MalformedRequestError

SERVICE = "inference.GRPCInferenceService"

_pool = descriptor_pool.DescriptorPool()


def _load() -> None:
    files = descriptor_pb2.FileDescriptorSet()
    files.ParseFromString(Path(__file__).with_name("open_inference.binpb").read_bytes())
    for file in files.file:
        _pool.Add(file)


_load()
# Each method's request and answer class.
METHODS: dict[str, tuple[Any, Any]] = {
    method.name: (
        message_factory.GetMessageClass(method.input_type),
        message_factory.GetMessageClass(method.output_type),
    )
    for method in _pool.FindServiceByName(SERVICE).methods
}


def parse(method: str, data: bytes) -> Any:
    """A request of a method.

    Raises:
        MalformedRequestError: The bytes are no such message.
    """
    try:
        return METHODS[method][0].FromString(data)
    except DecodeError as exc:
        raise MalformedRequestError(f"the request is no {METHODS[method][0].__name__}") from exc


def answer(method: str, **fields: Any) -> Any:
    """An answer of a method."""
    return METHODS[method][1](**fields)
