"""The protocol over gRPC: third-party clients against a real server, and every refusal."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from google.protobuf import descriptor_pb2
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from serving.bundle import read_bundle
from serving.config import PolicySource, ServingConfig
from serving.dialects.open_inference import grpc_messages
from serving.dialects.open_inference.grpc_service import start_grpc_server
from serving.engines.graph import GraphPolicy, load_graph
from serving.errors import ServingConfigError
from serving.service import PolicyServices, load_services
from tests.bundles import LinearPolicy
from tests.processes import ROOT
from tests.serving.deadline import DEADLINE_S
from tests.serving.numpy_policies import services_of
from tests.serving.open_inference import DATATYPES, Gated, grpc_serving

ROWS = np.array([[0.5, -1.0, 2.0, 3.0], [1.0, 0.25, -2.0, 0.0]], np.float32)
MASK = np.array([[False, True, True], [True, False, False]])
MAX_BYTES = 100_000  # of `grpc_serving`
PACKAGE = ROOT / "serving" / "dialects" / "open_inference"


@pytest.fixture(scope="module")
def address(bundles: dict[str, Path]) -> Iterator[str]:
    sources = [PolicySource(name=name, path=path) for name, path in bundles.items()]
    with grpc_serving(load_services(sources, ServingConfig(), "cpu"), version="1.2") as found:
        yield found


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(address) as found:
        yield found


@pytest.fixture(scope="module")
def stub(address: str) -> Iterator[Any]:
    with grpc.insecure_channel(address) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


def given(rows: Any = ROWS, mask: Any = MASK) -> list[triton.InferInput]:
    found = []
    for name, values in (("observation", rows), ("action_mask", mask)):
        if values is not None:
            tensor = triton.InferInput(name, list(values.shape), DATATYPES[values.dtype.name])
            found.append(tensor.set_data_from_numpy(values))
    return found


@pytest.fixture(scope="module")
def wanted(discrete: LinearPolicy) -> dict[str, Any]:
    return discrete.answers(ROWS, np.zeros((2, 3)), MASK)


def test_a_third_party_client_sees_a_server_and_its_models_ready(client):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("discrete")
    assert client.is_model_ready("discrete", "1")
    for name, version in (("nobody", ""), ("discrete", "2")):
        with pytest.raises(InferenceServerException, match="served here") as info:
            client.is_model_ready(name, version)
        assert info.value.status() == "StatusCode.NOT_FOUND"


def test_metadata_and_configuration_are_those_of_http(client, live_server):
    metadata = client.get_server_metadata(as_json=True)
    extensions = ["model_configuration", "parameters", "statistics"]
    assert metadata == {"name": "policyserve", "version": "1.2", "extensions": extensions}
    found = client.get_model_metadata("discrete")
    over_http = live_server.request("GET", "/v2/models/discrete").json()
    for tensors, expected in ((found.inputs, "inputs"), (found.outputs, "outputs")):
        assert [
            {"name": each.name, "datatype": each.datatype, "shape": list(each.shape)}
            for each in tensors
        ] == over_http[expected]
    assert (found.name, found.versions[:], found.platform) == ("discrete", ["1"], "onnx_onnxv1")
    config = client.get_model_config("discrete").config
    assert (config.name, config.max_batch_size, config.backend) == ("discrete", 1024, "onnx")
    assert [(each.name, each.optional, list(each.dims)) for each in config.input] == [
        ("observation", False, [4]),
        ("action_mask", True, [3]),
    ]
    assert list(config.version_policy.specific.versions) == [1]
    assert config.output[0].data_type == 9  # TYPE_INT64


@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_a_third_party_client_gets_the_policy_s_answers(client, wanted, compression):
    result = client.infer("discrete", given(), request_id="r1", compression_algorithm=compression)
    response = result.get_response()
    assert (response.model_name, response.model_version, response.id) == ("discrete", "1", "r1")
    names = [output.name for output in response.outputs]
    assert names == ["action", "action_logp", "value", "action_dist_inputs"]
    assert len(response.raw_output_contents) == 4
    for name in names:
        np.testing.assert_allclose(result.as_numpy(name), wanted[name], rtol=1e-5)


def test_outputs_come_as_asked_and_in_that_order(client, wanted):
    outputs = [triton.InferRequestedOutput(name) for name in ("value", "action")]
    result = client.infer("discrete", given(), outputs=outputs)
    assert [output.name for output in result.get_response().outputs] == ["value", "action"]
    np.testing.assert_array_equal(result.as_numpy("action"), wanted["action"])


def test_an_asynchronous_client_gets_the_same(address: str, wanted):
    async def main() -> Any:
        async with triton_aio.InferenceServerClient(address) as client:
            assert await client.is_server_ready()
            calls = [client.infer("discrete", given()) for _ in range(5)]
            return await asyncio.gather(*calls)

    for result in asyncio.run(main()):
        np.testing.assert_array_equal(result.as_numpy("action"), wanted["action"])


def test_parameters_mean_what_they_mean_over_http(client, discrete: LinearPolicy):
    rows = discrete.observations(50)
    parameters = [{"deterministic": False, "seed": seed, "ours": "x"} for seed in (7, 7, 8)]
    first, second, other = (
        client.infer("discrete", given(rows, None), parameters=each).as_numpy("action")
        for each in parameters
    )
    np.testing.assert_array_equal(first, second)
    assert (first != other).any()
    for wrong in ({"seed": -1}, {"seed": 1.5}, {"deterministic": "no"}):
        with pytest.raises(InferenceServerException, match=next(iter(wrong))) as info:
            client.infer("discrete", given(), parameters=wrong)
        assert info.value.status() == "StatusCode.INVALID_ARGUMENT"


def request(*, model: str = "discrete", **fields: Any) -> Any:
    return service_pb2.ModelInferRequest(model_name=model, **fields)


def tensor(
    field: str | None = "fp32_contents",
    values: Any = ROWS,
    *,
    name: str = "observation",
    datatype: str = "FP32",
    shape: Any = (2, 4),
    **more: Any,
) -> Any:
    """An input; its elements in a field of `contents`."""
    flat = np.asarray(values).ravel().tolist()
    contents = {} if field is None else {"contents": {field: flat}}
    return {"name": name, "datatype": datatype, "shape": shape, **contents, **more}


@pytest.mark.parametrize(
    ("datatype", "field"),
    [
        ("FP32", "fp32_contents"),
        ("FP64", "fp64_contents"),
        ("INT8", "int_contents"),
        ("INT16", "int_contents"),
        ("INT32", "int_contents"),
        ("INT64", "int64_contents"),
        ("UINT8", "uint_contents"),
        ("UINT16", "uint_contents"),
        ("UINT32", "uint_contents"),
        ("UINT64", "uint64_contents"),
    ],
)
def test_elements_in_their_own_field_are_taken(stub, discrete: LinearPolicy, datatype, field):
    rows = np.array([[1, 2, 3, 4], [0, 1, 0, 5]])
    mask = tensor("bool_contents", MASK, name="action_mask", datatype="BOOL", shape=MASK.shape)
    inputs = [tensor(field, rows, datatype=datatype), mask]
    response = stub.ModelInfer(request(inputs=inputs))
    expected = discrete.answers(rows, np.zeros((2, 3)), MASK)
    found = np.frombuffer(response.raw_output_contents[2], "<f4")
    assert response.outputs[2].name == "value"
    np.testing.assert_allclose(found, expected["value"], rtol=1e-5)
    action = np.frombuffer(response.raw_output_contents[0], "<i8")
    np.testing.assert_array_equal(action, expected["action"])


RAW = ROWS.tobytes()
RAW_INPUT = tensor(None)
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("no input", {}, "'observation' is missing"),
    ("no contents", {"inputs": [RAW_INPUT]}, "found 0 elements"),
    ("another field", {"inputs": [tensor("fp64_contents")]}, "found 0 elements"),
    ("too few", {"inputs": [tensor(values=[1.0])]}, "found 1 elements"),
    ("too small a byte", {"inputs": [tensor("int_contents", [300] * 8, datatype="INT8")]}, "INT8"),
    ("half floats", {"inputs": [tensor(datatype="FP16")]}, "raw_input_contents"),
    ("bytes", {"inputs": [tensor(datatype="BYTES")]}, "BYTES"),
    ("no datatype", {"inputs": [tensor(datatype="")]}, "datatype"),
    ("not a number", {"inputs": [tensor(values=[np.nan] * 8)]}, "nan"),
    ("another shape", {"inputs": [tensor(shape=[4, 2])]}, "[4, 2]"),
    ("a huge shape", {"inputs": [tensor(shape=[2**62, 4])]}, "at most 1024"),
    ("a negative one", {"inputs": [tensor(shape=[-2, 4])]}, "[-2, 4]"),
    ("both", {"inputs": [tensor()], "raw_input_contents": [RAW]}, "one of them"),
    ("raw too short", {"inputs": [RAW_INPUT], "raw_input_contents": [RAW[1:]]}, "31 bytes"),
    ("raw twice", {"inputs": [RAW_INPUT], "raw_input_contents": [RAW, RAW]}, "found 2"),
    ("an unknown input", {"inputs": [tensor(name="x")]}, "'x'"),
    ("an input twice", {"inputs": [tensor(), tensor()]}, "twice"),
    ("an unknown output", {"inputs": [tensor()], "outputs": [{"name": "q"}]}, "'q'"),
    (
        "a sequence",
        {"inputs": [tensor()], "parameters": {"sequence_id": {"int64_param": 5}}},
        "sequence extension",
    ),
    (
        "classes",
        {
            "inputs": [tensor()],
            "outputs": [{"name": "value", "parameters": {"classification": {"int64_param": 1}}}],
        },
        "not offered",
    ),
    (
        "shared memory",
        {"inputs": [tensor(parameters={"shared_memory_region": {"string_param": "r"}})]},
        "not offered",
    ),
]


@pytest.mark.parametrize(
    ("fields", "words"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED]
)
def test_what_is_wrong_is_an_invalid_argument(stub, fields: dict[str, Any], words: str):
    with pytest.raises(grpc.RpcError) as info:
        stub.ModelInfer(request(**fields))
    assert info.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert words in info.value.details()
    assert "Traceback" not in info.value.details()


def test_who_is_not_served_is_not_found(stub):
    for fields in ({"model": "nobody"}, {"model_version": "7"}):
        with pytest.raises(grpc.RpcError) as info:
            stub.ModelInfer(request(inputs=[tensor()], **fields))
        assert info.value.code() == grpc.StatusCode.NOT_FOUND


def test_bytes_that_are_no_message_are_refused(address: str):
    with grpc.insecure_channel(address) as channel:
        call = channel.unary_unary(f"/{grpc_messages.SERVICE}/ModelInfer")
        with pytest.raises(grpc.RpcError) as info:
            call(b"\xff\xff\xff")
        assert info.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_a_message_over_the_limit_is_refused(stub):
    rows = np.zeros((1024, 4), np.float32)
    shape = list(rows.shape)
    raw = {"inputs": [tensor(None, shape=shape)], "raw_input_contents": [rows.tobytes()]}
    assert stub.ModelInfer(request(**raw)).model_name == "discrete"
    for compression in (None, grpc.Compression.Gzip):
        with pytest.raises(grpc.RpcError) as info:
            stub.ModelInfer(request(id="x" * MAX_BYTES, **raw), compression=compression)
        assert info.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_the_repository_is_listed_and_cannot_be_changed(client):
    index = client.get_model_repository_index()
    assert [(each.name, each.version, each.state) for each in index.models] == [
        (name, "1", "READY") for name in ("box", "discrete", "no-critic")
    ]
    for change in (client.load_model, client.unload_model):
        with pytest.raises(InferenceServerException, match="fixed when the server starts") as info:
            change("discrete")
        assert info.value.status() == "StatusCode.UNIMPLEMENTED"


def test_what_is_not_offered_is_unimplemented(client):
    with pytest.raises(InferenceServerException) as info:
        client.get_log_settings()
    assert info.value.status() == "StatusCode.UNIMPLEMENTED"


def test_statistics_count_observations_batches_and_failures(bundles: dict[str, Path]):
    bundle = read_bundle(bundles["discrete"])
    services = services_of({"p": GraphPolicy(bundle.manifest, load_graph(bundle))})
    with grpc_serving(services) as address, triton.InferenceServerClient(address) as client:
        for _ in range(2):
            client.infer("p", given())
        with pytest.raises(InferenceServerException):
            client.infer("p", given(ROWS[:1]))
        (found,) = client.get_inference_statistics("p").model_stats
        assert (found.inference_count, found.execution_count) == (4, 2)
        assert found.inference_stats.success.count == 2
        assert found.inference_stats.fail.count == 1
        assert found.inference_stats.compute_infer.ns > 0
        assert client.get_inference_statistics().model_stats[0] == found


@contextlib.contextmanager
def gated(path: Path, **settings: Any) -> Iterator[tuple[str, Gated, PolicyServices]]:
    bundle = read_bundle(path)
    graph = Gated(load_graph(bundle))
    services = services_of({"discrete": GraphPolicy(bundle.manifest, graph)}, **settings)
    with grpc_serving(services) as address:
        graph.close_gate()
        try:
            yield address, graph, services
        finally:
            graph.gate.set()


def test_a_call_s_deadline_frees_its_place(bundles: dict[str, Path], caplog):
    with (
        gated(bundles["discrete"]) as (address, graph, services),
        triton.InferenceServerClient(address) as client,
    ):
        for more in ({"client_timeout": 0.05}, {"timeout": 20_000}):
            with pytest.raises(InferenceServerException) as info:
                client.infer("discrete", given(), **more)
            assert info.value.status() == "StatusCode.DEADLINE_EXCEEDED"
        graph.gate.set()
        assert client.infer("discrete", given()).as_numpy("action").shape == (2,)
        assert services.require("discrete").batcher.queue_size == 0
        # Its first batch had begun; the second caller's rows were never computed.
        assert graph.n_rows == 2 + 2
    assert not caplog.records


def test_a_full_queue_is_resource_exhausted_and_a_closed_one_unavailable(bundles: dict[str, Path]):
    with gated(bundles["discrete"], max_queue_size=3) as (address, graph, services):

        async def main() -> list[Any]:
            async with triton_aio.InferenceServerClient(address) as client:
                calls = [asyncio.ensure_future(client.infer("discrete", given())) for _ in range(9)]
                still_open = set(calls)
                while len(still_open) > 2:
                    _, still_open = await asyncio.wait(
                        still_open, timeout=DEADLINE_S, return_when=asyncio.FIRST_COMPLETED
                    )
                graph.gate.set()
                return await asyncio.gather(*calls, return_exceptions=True)

        results = asyncio.run(main())
        refused = [each for each in results if isinstance(each, InferenceServerException)]
        assert len(refused) in (7, 8)
        assert {each.status() for each in refused} == {"StatusCode.RESOURCE_EXHAUSTED"}
        with triton.InferenceServerClient(address) as client:
            asyncio.run(services.close())
            assert not client.is_server_ready()
            assert not client.is_model_ready("discrete")
            assert client.is_server_live()
            assert client.get_model_repository_index().models[0].state == "UNAVAILABLE"
            with pytest.raises(InferenceServerException, match="shutting down") as info:
                client.infer("discrete", given())
            assert info.value.status() == "StatusCode.UNAVAILABLE"


def test_a_mistake_of_ours_is_internal_and_says_nothing_of_the_inside(
    bundles: dict[str, Path], monkeypatch, caplog
):
    bundle = read_bundle(bundles["discrete"])
    services = services_of({"discrete": GraphPolicy(bundle.manifest, load_graph(bundle))})

    def fail(*_: Any) -> None:
        raise RuntimeError("a secret")

    monkeypatch.setattr(services.require("discrete"), "compute", fail)
    with grpc_serving(services) as address, triton.InferenceServerClient(address) as client:
        with pytest.raises(InferenceServerException, match="log has the reason") as info:
            client.infer("discrete", given())
        assert info.value.status() == "StatusCode.INTERNAL"
        assert "secret" not in str(info.value)
    assert "a secret" in caplog.text


def test_an_address_of_somebody_else_is_one_clear_error():
    services = services_of({})
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]

        async def start() -> None:
            await start_grpc_server(services, "127.0.0.1", port, max_message_bytes=MAX_BYTES)

        with pytest.raises(ServingConfigError, match=f"127.0.0.1:{port}"):
            asyncio.run(start())


def test_the_compiled_description_is_that_of_the_source(tmp_path: Path):
    compiled = tmp_path / "compiled"
    subprocess.run(
        [
            *(sys.executable, "-m", "grpc_tools.protoc", f"-I{PACKAGE}"),
            *(f"--descriptor_set_out={compiled}", "open_inference.proto"),
        ],
        check=True,
    )
    assert compiled.read_bytes() == (PACKAGE / "open_inference.binpb").read_bytes()


def test_every_field_is_the_one_that_a_third_party_has():
    files = descriptor_pb2.FileDescriptorSet.FromString(
        (PACKAGE / "open_inference.binpb").read_bytes()
    )
    theirs = {}
    for module in (service_pb2.DESCRIPTOR, triton.model_config_pb2.DESCRIPTOR):
        theirs |= dict(module.message_types_by_name)

    def compare(ours: Any, their: Any) -> int:
        fields = {field.number: field for field in their.fields}
        for field in ours.field:
            same = fields[field.number]
            assert (field.name, field.type) == (same.name, same.type), ours.name
        nested = {each.name: each for each in their.nested_types}
        return len(ours.field) + sum(compare(each, nested[each.name]) for each in ours.nested_type)

    assert sum(compare(each, theirs[each.name]) for each in files.file[0].message_type) > 80
