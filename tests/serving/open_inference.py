"""Requests of the Open Inference Protocol, written out as bytes, and a policy that waits."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from serving.batching import INLINE_LIMIT_S
from serving.dialects.open_inference.grpc_service import GrpcServer, start_grpc_server
from serving.engines.graph import Graph
from serving.service import PolicyServices
from tests.serving.conftest import LiveServer, Response
from tests.serving.deadline import DEADLINE_S

DATATYPES = {
    "float32": "FP32",
    "float64": "FP64",
    "float16": "FP16",
    "int64": "INT64",
    "int32": "INT32",
    "int8": "INT8",
    "uint8": "UINT8",
    "bool": "BOOL",
}
LENGTH = "Inference-Header-Content-Length"


def tensor(name: str, values: Any, *, binary: bool = False) -> dict[str, Any]:
    """An input; its data in JSON, or said to follow as bytes."""
    array = np.asarray(values)
    head = {"name": name, "shape": list(array.shape), "datatype": DATATYPES[array.dtype.name]}
    if binary:
        return {**head, "parameters": {"binary_data_size": array.nbytes}}
    return {**head, "data": array.ravel().tolist()}


def body_of(*inputs: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"inputs": list(inputs), **more}


def infer(
    server: LiveServer,
    body: Any,
    *,
    model: str = "discrete",
    version: str | None = None,
    headers: Mapping[str, str] | None = None,
    raw: bytes | None = None,
) -> Response:
    """POST an inference request; `raw` follows the JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = dict(headers or {})
    if raw is not None:
        headers[LENGTH] = str(len(data))
        data += raw
    part = "" if version is None else f"/versions/{version}"
    return server.request("POST", f"/v2/models/{model}{part}/infer", data, headers)


def outputs_of(response: Response) -> dict[str, Any]:
    """The answered tensors, JSON or binary, by name in their order."""
    assert response.status == 200, response.body
    length = response.headers.get(LENGTH.lower())
    head = json.loads(response.body[: int(length)] if length else response.body)
    rest = response.body[int(length) :] if length else b""
    numpy_names = {datatype: name for name, datatype in DATATYPES.items()}
    found = {}
    for output in head["outputs"]:
        dtype = np.dtype(numpy_names[output["datatype"]])
        size = output.get("parameters", {}).get("binary_data_size")
        if size is None:
            values = np.array(output["data"], dtype)
        else:
            values, rest = np.frombuffer(rest[:size], dtype.newbyteorder("<")), rest[size:]
        found[output["name"]] = values.reshape(output["shape"])
    assert not rest
    return found


def assert_error(response: Response, status: int, *words: str) -> str:
    """An error in the protocol's form, whose text has the words."""
    assert response.status == status, response.body
    assert response.headers["content-type"] == "application/json"
    content = response.json()
    assert list(content) == ["error"]
    assert "Traceback" not in content["error"]
    for word in words:
        assert word in content["error"]
    return str(content["error"])


class Gated:
    """A graph that waits at a gate, in the batcher's thread; open at first."""

    def __init__(self, graph: Graph) -> None:
        self.name = graph.name
        self.device = graph.device
        self._graph = graph
        self._is_timed = True
        self.n_begun = self.n_rows = 0
        self.gate = threading.Event()
        self.gate.set()

    def run(self, names: Sequence[str], inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """See `serving.engines.graph.Graph`."""
        if self._is_timed:  # slow enough for a thread of its own
            threading.Event().wait(2 * INLINE_LIMIT_S)
        self.n_begun += 1
        assert self.gate.wait(DEADLINE_S)
        self.n_rows += len(inputs["observation"])
        return self._graph.run(names, inputs)

    def close_gate(self) -> None:
        """Let every batch wait from now on."""
        self._is_timed = False
        self.n_begun = self.n_rows = 0
        self.gate.clear()


@contextlib.contextmanager
def grpc_serving(services: PolicyServices, **settings: Any) -> Iterator[str]:
    """A gRPC server on an event loop of a thread of its own; its address."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def run(work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result(DEADLINE_S)

    settings = {"max_message_bytes": 100_000, **settings}
    server: GrpcServer | None = None
    try:
        server = run(start_grpc_server(services, "127.0.0.1", 0, **settings))
        yield f"127.0.0.1:{server.port}"
    finally:
        if server is not None:
            run(server.stop(0.5))
        run(services.close())
        loop.call_soon_threadsafe(loop.stop)
        thread.join(DEADLINE_S)
        loop.close()
