"""The fast lane and the ordinary application are one function from bytes to bytes.

Every test asks both: the answers may differ in their date and request id, and in nothing else.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serving.app import build_app
from serving.compute_action import ComputeActionHandler
from serving.config import PolicySource, ServingConfig
from serving.hot_protocol import bound
from serving.hot_routes import HotRoutes
from serving.schemas import example_observation
from serving.service import PolicyServices, load_services
from tests.serving.wire import chunked, converse, cuts, get, post, read_replies

LIMIT = 200_000  # max_body_bytes of both
BOX = '{"observation": [1, 2.5, -3]}'
OTHER = '{"observation": [0.25, -1, 4]}'
DISCRETE = '{"observation": [0.5, -1.0, 2.0, 3.0]}'
DICT = '{"observation": {"mode": 1, "position": [0.5, -0.25]}}'


class Both:
    """The same policies behind the fast lane and without it, in memory."""

    def __init__(self, services: PolicyServices) -> None:
        handler = ComputeActionHandler(services, max_body_bytes=LIMIT)
        self.app = build_app(services, handler)
        self.services = services
        self.fresh()

    def fresh(self) -> None:
        """Forget every head that was met."""
        self.routes = HotRoutes(self.services, max_body_bytes=LIMIT)
        self.fast_class = bound(self.routes)
        self._expected: dict[tuple[bytes, str], tuple[Any, ...]] = {}


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as found:
        yield found


@pytest.fixture(scope="module")
def all_services(bundles: dict[str, Path], tiny_bundles: dict[str, Path]) -> PolicyServices:
    sources = [
        PolicySource(name=name, path=path) for name, path in {**bundles, **tiny_bundles}.items()
    ]
    return load_services(sources, ServingConfig(max_observations_per_request=64), "cpu")


Ask = Callable[..., list[tuple[Any, ...]]]


@pytest.fixture(scope="module")
def both(all_services: PolicyServices) -> Both:
    return Both(all_services)


@pytest.fixture(scope="module")
def fast(runner: asyncio.Runner, both: Both) -> Ask:
    """The fast lane's answers on one connection."""

    def ask(segments: list[bytes], methods: list[str], **options: Any) -> list[tuple[Any, ...]]:
        data = runner.run(converse(both.app, both.fast_class, segments, len(methods), **options))
        return [reply.comparable() for reply in read_replies(data, methods)]

    return ask


@pytest.fixture(scope="module")
def ordinary(runner: asyncio.Runner, both: Both) -> Ask:
    """The ordinary application's answer to a request that has a connection for itself."""
    known: dict[tuple[bytes, str], tuple[Any, ...]] = {}

    def ask(request: bytes, method: str = "POST") -> Any:
        key = (request, method)
        if key not in known:
            # uvicorn drops the body of what asks for another protocol.
            asked = request.replace(b"\r\n" + H2C, b"")
            data = runner.run(converse(both.app, HttpToolsProtocol, [asked], 1))
            (reply,) = read_replies(data, [method])
            if method == "CONNECT":
                # uvicorn goes on, and takes what follows for requests.
                reply.headers["connection"] = "close"
            known[key] = reply.comparable()
        return known[key]

    return ask


# --- bodies ---

# Levels of nesting.
DEEP = 100_000
BODIES: dict[str, list[str | bytes]] = {
    "box": [
        BOX,
        '{"observation":[1,2,3]}',
        '{"observation":[1e39,0,0]}',
        '{"observation":[3.5e38,0,0]}',
        '{"observation":[1e308,0,0]}',
        '{"observation":[1e309,0,0]}',
        '{"observation":[-1e999,0,0]}',
        '{"observation":[1e-400,-0.0,0]}',
        '{"observation":[1E2,1e+2,1e-2]}',
        '{"observation":[01,2,3]}',
        '{"observation":[.5,2,3]}',
        '{"observation":[1.,2,3]}',
        '{"observation":[+1,2,3]}',
        '{"observation":[0x1,2,3]}',
        '{"observation":[1_0,2,3]}',
        '{"observation":[NaN,2,3]}',
        '{"observation":[Infinity,2,3]}',
        '{"observation":[-Infinity,2,3]}',
        '{"observation":[nan,2,3]}',
        '{"observation":[null,2,3]}',
        '{"observation":[true,2,3]}',
        '{"observation":["1",2,3]}',
        '{"observation":[[1],2,3]}',
        '{"observation":[[1,2,3]]}',
        '{"observation":[{},2,3]}',
        '{"observation":[1,2]}',
        '{"observation":[1,2,3,4]}',
        '{"observation":[]}',
        '{"observation":{}}',
        '{"observation":null}',
        '{"observation":1}',
        '{"observation":"abc"}',
        '{"observation":true}',
        '{"observation":[1,2,3],}',
        '{"observation":[1,2,3,]}',
        '{"observation":[1,2,3]}}',
        '{"observation":[1,2,3]} x',
        '{"observation":[1,2,3]}{"observation":[1,2,3]}',
        '{"observation":[1,2,3]}\n',
        '\t\r\n {"observation" : [ 1 , 2 , 3 ] } \r\n',
        '{"observation":[1,2,3]}\x00',
        '\x00{"observation":[1,2,3]}',
        '{"observation":[1,2,3]//c\n}',
        "{'observation':[1,2,3]}",
        "{observation:[1,2,3]}",
        '{"observation":[1,2,3],"observation":[4,5,6]}',
        '{"observation":[1,2],"observation":[4,5,6]}',
        '{"observation":[4,5,6],"observation":[1,2]}',
        '{"observation":"x","observation":[4,5,6]}',
        '{"observation":[1,2,3],"observations":[[4,5,6]]}',
        '{"observation":[1,2,3],"observations":null}',
        '{"observations":[[1,2,3],[4,5,6]]}',
        '{"observations":[[1,2,3],[4,5]]}',
        '{"observations":[]}',
        '{"observations":[1,2,3]}',
        json.dumps({"observations": [[1, 2, 3]] * 64}),
        json.dumps({"observations": [[1, 2, 3]] * 65}),
        '{"obs":[1,2,3]}',
        '{"Observation":[1,2,3]}',
        '{"observation":[1,2,3],"extra":1}',
        '{"observation":[1,2,3],"":1}',
        r'{"\u006fbservation":[1,2,3]}',
        r'{"\u006Fbservati\u006fn":[1,2,3]}',
        r'{"observation":[1,2,3],"\ud800":1}',
        r'{"observation":[1,2,3],"\x":1}',
        '{"observation":[1,2,3],"deterministic":true}',
        '{"observation":[1,2,3],"deterministic":1}',
        '{"observation":[1,2,3],"deterministic":null}',
        '{"observation":[1,2,3],"deterministic":false,"seed":3}',
        '{"observation":[1,2,3],"deterministic":false,"seed":3,"outputs":["value","action_logp"]}',
        '{"observation":[1,2,3],"seed":-1}',
        '{"observation":[1,2,3],"seed":9223372036854775808}',
        '{"observation":[1,2,3],"seed":1.0}',
        '{"observation":[1,2,3],"seed":1.5}',
        '{"observation":[1,2,3],"seed":"1"}',
        '{"observation":[1,2,3],"timeout_ms":0}',
        '{"observation":[1,2,3],"timeout_ms":-5}',
        '{"observation":[1,2,3],"timeout_ms":1e999}',
        '{"observation":[1,2,3],"timeout_ms":10000}',
        '{"observation":[1,2,3],"timeout_ms":"1"}',
        '{"observation":[1,2,3],"outputs":[]}',
        '{"observation":[1,2,3],"outputs":["value","value"]}',
        '{"observation":[1,2,3],"outputs":["q_values"]}',
        '{"observation":[1,2,3],"outputs":["nonsense"]}',
        '{"observation":[1,2,3],"outputs":"value"}',
        '{"observation":[1,2,3],"version":1}',
        '{"observation":[1,2,3],"version":2}',
        '{"observation":[1,2,3],"action_mask":[true]}',
        '{"observation":[1,2,3],"state":{}}',
        '{"observation":[1,2,3],"reward":1}',
        "",
        " ",
        "\n\n\n",
        "{}",
        "[]",
        "null",
        "1",
        '"observation"',
        "{",
        "}",
        '{"observation"',
        '{"observation":',
        '{"observation":[1,2',
        '{"observation":[1,2,3]',
        b'\xef\xbb\xbf{"observation":[1,2,3]}',
        '{"observation":[1,2,3]}'.encode("utf-16"),
        b'{"observation":[1,2,3],"\xff":1}',
        b'{"observation":[1,2,3],"\xc3(":1}',
        b"\xff\xfe\x00",
        b"\x00" * 50,
        b"\x83\xabobservation\x93\x01\x02\x03",
        "[" * DEEP,
        '{"observation":' + "[" * DEEP,
        '{"observation":' + "[" * (DEEP - 99) + "]" * (DEEP - 99) + "}",
        '{"observation":' * 1_000 + "1" + "}" * 1_000,
        '{"observation":[%s,2,3]}' % ("1" * 10_000),
        '{"observation":[0.%s,2,3]}' % ("3" * 10_000),
        '{"observation":[-%s.5,2,3]}' % ("0" * 10_000),
        '{"observation":[1e%s,2,3]}' % ("9" * 10_000),
        '{"observation":[1,2,3],"seed":%s}' % ("1" * 10_000),
        '{"observation":"%s"}' % ("a" * 15_000),
        '{"%s":1}' % ("a" * 15_000),
    ],
    "discrete": [
        DISCRETE,
        '{"observation":[[0.5,-1.0,2.0,3.0]]}',
        '{"observation":[0.5,-1.0,2.0,3.0],"action_mask":[true,false,true]}',
        '{"observation":[0.5,-1.0,2.0,3.0],"action_mask":[1,0,1]}',
        '{"observation":[0.5,-1.0,2.0,3.0],"action_mask":[false,false,false]}',
        '{"observation":[0.5,-1.0,2.0,3.0],"action_mask":[true]}',
        '{"observation":[0.5,-1.0,2.0,3.0],"action_mask":null}',
        '{"observation":[0.5,-1.0,2.0,3.0],"outputs":["action_dist_inputs"]}',
        '{"observation":[3e38,3e38,3e38,3e38]}',
        '{"observation":[-3e38,3e38,-3e38,3e38]}',
    ],
    "dict": [
        DICT,
        '{"observation":{"position":[0.5,-0.25],"mode":1}}',
        '{"observation":{"mode":3,"position":[0.5,-0.25]}}',
        '{"observation":{"mode":-1,"position":[0.5,-0.25]}}',
        '{"observation":{"mode":1.0,"position":[0.5,-0.25]}}',
        '{"observation":{"mode":1.5,"position":[0.5,-0.25]}}',
        '{"observation":{"mode":1e3,"position":[0.5,-0.25]}}',
        '{"observation":{"mode":true,"position":[0.5,-0.25]}}',
        '{"observation":{"mode":9223372036854775808,"position":[0.5,-0.25]}}',
        '{"observation":{"mode":%s,"position":[0.5,-0.25]}}' % ("9" * 5_000),
        '{"observation":{"mode":1}}',
        '{"observation":{"mode":1,"mode":2,"position":[0.5,-0.25]}}',
        '{"observation":{"mode":1,"position":[0.5,-0.25],"more":1}}',
        '{"observation":[1,[0.5,-0.25]]}',
    ],
    "image": ['{"observation":[]}', '{"observation":[[[256]]]}', '{"observation":[[[1.5]]]}'],
    "nested": ['{"observation":[]}', '{"observation":{}}', '{"observation":[1,2,3]}'],
    "memory": [
        '{"observation":[1]}',
        '{"observation":[1,2,3],"reward":1}',
        '{"observation":[1,2,3],"reward":"1"}',
        '{"observation":[1,2,3],"state":{}}',
        '{"observation":[1,2,3],"state":{"h":[1]}}',
        '{"observation":[1,2,3],"state":null}',
    ],
}


@pytest.mark.parametrize("policy", BODIES)
def test_a_body_is_answered_as_by_the_ordinary_application(
    both: Both, fast: Ask, ordinary: Ask, policy: str
):
    both.fresh()
    for body in BODIES[policy]:
        request = post(body, policy)
        expected = ordinary(request)
        for _ in range(2):  # the second time its head is known
            assert fast([request], ["POST"]) == [expected], body[:100]


def test_good_observations_of_every_space_are_answered_alike(both: Both, fast: Ask, ordinary: Ask):
    both.fresh()
    for service in both.services:
        space = service.describe()["observation_space"]
        body = json.dumps({"observation": example_observation(space)})
        request = post(body, service.name)
        expected = ordinary(request)
        assert expected[0] == 200
        for _ in range(2):
            assert fast([request], ["POST"]) == [expected], service.name


# --- pieces ---

# What Java's HttpClient begins a connection with.
WISH = ["connection: Upgrade, HTTP2-Settings", "upgrade: h2c", "http2-settings: AAMAAABkAAQCAAAAAA"]
H2C = "\r\n".join(WISH).encode()

# Requests after which a connection goes on.
GOING_ON: dict[str, tuple[bytes, str]] = {
    "box": (post(BOX), "POST"),
    "box, another head": (post(BOX, headers=["accept: */*"]), "POST"),
    "box, other numbers": (post(OTHER), "POST"),
    "discrete": (post(DISCRETE, "discrete"), "POST"),
    "dict": (post(DICT, "dict"), "POST"),
    "with an id": (post(BOX, headers=["x-request-id: seven"]), "POST"),
    "many": (post('{"observations": [[1, 2, 3], [4, 5, 6]]}'), "POST"),
    "outputs": (post(BOX[:-1] + ', "outputs": ["value"]}'), "POST"),
    "sampled": (post(BOX[:-1] + ', "deterministic": false, "seed": 4}'), "POST"),
    "timeout": (post(BOX[:-1] + ', "timeout_ms": 60000}'), "POST"),
    "wrong shape": (post('{"observation": [1]}'), "POST"),
    "malformed": (post('{"observation": [1'), "POST"),
    "empty": (post(""), "POST"),
    "a body like a request": (post(get("/healthz")), "POST"),
    "unknown policy": (post(BOX, "nobody"), "POST"),
    "charset": (post(BOX, headers=["content-type: application/json; charset=utf-8"]), "POST"),
    "gzip": (post(BOX, headers=["content-encoding: gzip"]), "POST"),
    "chunked": (chunked(BOX[:9].encode(), BOX[9:].encode()), "POST"),
    "expecting": (post(BOX, headers=["expect: 100-continue"]), "POST"),
    "query": (post(BOX, path="/v1/policies/box/compute_action?a=b"), "POST"),
    "absolute": (post(BOX, path="http://x/v1/policies/box/compute_action"), "POST"),
    "escaped": (post(BOX, path="/v1/policies/%62ox/compute_action"), "POST"),
    "head": (get("/v1/policies/box/compute_action", "HEAD"), "HEAD"),
    "get": (get("/v1/policies/box/compute_action"), "GET"),
    "health": (get("/healthz"), "GET"),
    "another protocol, get": (get("/healthz", headers=WISH), "GET"),
    "another protocol": (post(BOX, headers=WISH), "POST"),
    "another protocol, wrong": (post("{", headers=WISH), "POST"),
    "another protocol, chunked": (
        chunked(BOX.encode()).replace(b"host: x", b"host: x\r\n" + H2C, 1),
        "POST",
    ),
    "list": (get("/v1/policies"), "GET"),
    "nothing there": (get("/nothing"), "GET"),
    "blank lines before": (b"\r\n\r\n" + post(BOX), "POST"),
    "a blank line before": (b"\r\n" + post(OTHER), "POST"),
}
# Requests whose answer is a connection's last.
LAST: dict[str, tuple[bytes, str]] = {
    "close": (post(BOX, headers=["connection: close"]), "POST"),
    "close, ordinary": (get("/healthz", headers=["connection: close"]), "GET"),
    "1.0": (post(OTHER).replace(b"HTTP/1.1", b"HTTP/1.0"), "POST"),
    "1.0 keep-alive": (
        post(OTHER, headers=["connection: keep-alive"]).replace(b"HTTP/1.1", b"HTTP/1.0"),
        "POST",
    ),
    "too large": (post(b" " * (LIMIT + 1)), "POST"),
    "connect": (get("x:80", "CONNECT"), "CONNECT"),
    "garbage": (b"garbage\r\n\r\n", "POST"),
    "length and chunks": (post(BOX, headers=["transfer-encoding: chunked"]), "POST"),
    "chunks and length": (
        post(BOX).replace(b"\r\n\r\n", b"\r\ntransfer-encoding: chunked\r\n\r\n"),
        "POST",
    ),
    "chunked at last": (post(BOX, headers=["transfer-encoding: gzip, chunked"]), "POST"),
    "two lengths": (post(BOX, headers=[f"content-length: {len(BOX)}"]), "POST"),
    "other lengths": (post(BOX, headers=["content-length: 5"]), "POST"),
    "signed length": (post(BOX).replace(b"length: ", b"length: +"), "POST"),
    "list of lengths": (post(BOX).replace(b"length: 29", b"length: 29, 29"), "POST"),
    "hexadecimal length": (post(BOX).replace(b"length: 29", b"length: 0x1d"), "POST"),
    "underscored length": (post(BOX).replace(b"length: 29", b"length: 2_9"), "POST"),
    "no number": (post(BOX).replace(b"length: 29", b"length: "), "POST"),
    "huge length": (post(BOX).replace(b"length: 29", b"length: " + b"9" * 50), "POST"),
    "negative length": (post(BOX).replace(b"length: 29", b"length: -1"), "POST"),
    "folded": (post(BOX, headers=["x-a: b\r\n c"]), "POST"),
    "bare newlines": (post(BOX).replace(b"\r\n", b"\n"), "POST"),
    "half bare": (post(BOX).replace(b"\r\n\r\n", b"\r\n\n"), "POST"),
    "half bare before": (post(BOX).replace(b"\r\n\r\n", b"\n\r\n"), "POST"),
    "bare carriage": (post(BOX).replace(b"\r\n\r\n", b"\r\r\n"), "POST"),
    "space before colon": (post(BOX).replace(b"length:", b"length :"), "POST"),
    "zero byte": (post(BOX, headers=["x-a: \0"]), "POST"),
    "lower case": (post(BOX).replace(b"POST", b"post"), "POST"),
    "space before": (b" " + post(BOX), "POST"),
    "version": (post(BOX).replace(b"HTTP/1.1", b"HTTP/1.2"), "POST"),
}


def test_the_lists_hold_what_they_say(ordinary: Ask):
    statuses = {name: ordinary(*request)[0] for name, request in GOING_ON.items()}
    assert {name for name, status in statuses.items() if status == 200} == {
        *("box", "box, another head", "box, other numbers", "discrete", "dict", "with an id"),
        *("many", "outputs", "sampled", "timeout", "chunked", "expecting", "query", "absolute"),
        *("another protocol", "another protocol, get", "another protocol, chunked"),
        *("escaped", "health", "list", "charset", "blank lines before", "a blank line before"),
    }
    assert not [name for name, request in GOING_ON.items() if ordinary(*request)[1][-1]]
    refused = set(LAST) - {"close", "close, ordinary", "1.0", "1.0 keep-alive"}
    refused -= {"connect"}
    statuses = {name: ordinary(*LAST[name])[0] for name in refused}
    assert statuses.pop("too large") == 413
    assert set(statuses.values()) == {400}


def ask_all(fast: Ask, parts: list[tuple[bytes, str]], places: list[int], **options: Any) -> Any:
    data = b"".join(request for request, _ in parts)
    return fast(list(cuts(data, places)), [method for _, method in parts], **options)


@pytest.mark.parametrize("is_known", [False, True], ids=["new", "known"])
@pytest.mark.parametrize(
    "name",
    [
        *("box", "with an id", "outputs", "wrong shape", "chunked", "empty"),
        *("blank lines before", "another protocol"),
    ],
)
def test_a_request_cut_at_any_byte_is_answered_the_same(
    both: Both, fast: Ask, ordinary: Ask, name: str, is_known: bool
):
    request = GOING_ON[name]
    known = GOING_ON["box"]
    expected = [ordinary(*request), ordinary(*known)]
    both.fresh()
    fast([known[0] + request[0]], ["POST"] * 2)
    fast([request[0]], ["POST"])
    for place in range(1, len(request[0])):
        if not is_known:
            both.fresh()
        assert ask_all(fast, [request, known], [place]) == expected, place


def test_two_requests_cut_at_any_two_bytes_are_answered_the_same(
    both: Both, fast: Ask, ordinary: Ask
):
    parts = [GOING_ON["box"], GOING_ON["box, other numbers"]]
    expected = [ordinary(*part) for part in parts]
    total = sum(len(request) for request, _ in parts)
    both.fresh()
    for first in range(1, total, 11):
        for second in range(first + 1, total, 29):
            assert ask_all(fast, parts, [first, second]) == expected, (first, second)


@pytest.mark.parametrize("second", GOING_ON)
@pytest.mark.parametrize("first", ["box", "chunked", "health"])
def test_requests_in_one_segment_are_answered_in_order(
    both: Both, fast: Ask, ordinary: Ask, first: str, second: str
):
    parts = [GOING_ON[each] for each in (first, second, first, second, "box, other numbers")]
    expected = [ordinary(*part) for part in parts]
    both.fresh()
    for _ in range(2):
        assert ask_all(fast, parts, []) == expected


@pytest.mark.parametrize("last", LAST)
def test_what_ends_a_connection_comes_after_the_answers_before_it_and_ends_it(
    both: Both, fast: Ask, ordinary: Ask, last: str
):
    """Nothing behind it is taken for a request, neither what is known nor what is not."""
    both.fresh()
    box, other = GOING_ON["box"], GOING_ON["box, other numbers"]
    for before in ([], [box], [box, other], [other, GOING_ON["health"]]):
        parts = [*before, LAST[last]]
        expected = [ordinary(*part) for part in parts]
        data = b"".join(request for request, _ in parts)
        methods = [method for _, method in parts]
        for behind in (b"", box[0], box[0] + GOING_ON["health"][0]):
            assert fast([data + behind], methods) == expected
            assert fast([data, behind or box[0]], methods) == expected
            assert fast([data, box[0]], methods, breaks=[True, True]) == expected
            middle = len(data) - 8
            assert fast([data[:middle], data[middle:] + behind], methods) == expected


def test_a_head_is_known_whole_or_not_at_all(both: Both, fast: Ask, ordinary: Ask):
    """What differs in any byte is parsed: neither length nor policy is taken from another."""
    box = GOING_ON["box"]
    both.fresh()
    assert fast([box[0]], ["POST"]) == [ordinary(*box)]
    for request in (
        post(BOX + " "),
        post(BOX, "nobody"),
        post(BOX).replace(b"host: x", b"host: y"),
        post(BOX).replace(b"host: x", b"Host:x"),
        post(BOX).replace(b"length: 29", b"length: 029"),
        post(BOX).replace(b"length: 29", b"length: 29 \t"),
        post(BOX).replace(b"application/json", b"text/plain"),
        post(BOX).replace(b"content-type: application/json\r\n", b""),
        post(BOX, headers=["connection: close"]),
    ):
        for _ in range(2):
            assert fast([request], ["POST"]) == [ordinary(request)]
        assert fast([box[0]], ["POST"]) == [ordinary(*box)]


@pytest.mark.parametrize("excess", [-2, -1, 0, 1, 2, 5000])
def test_a_head_of_any_length_is_answered_the_same(
    both: Both, fast: Ask, ordinary: Ask, excess: int
):
    both.fresh()
    fill = "a" * (1024 - post(BOX, headers=["x-fill: "]).index(b"\r\n\r\n") + excess)
    request = post(BOX, headers=[f"x-fill: {fill}"])
    for _ in range(2):
        assert fast([request, request + request], ["POST"] * 3) == [ordinary(request)] * 3


@st.composite
def conversations(draw: st.DrawFn) -> tuple[list[str], list[int], list[bool]]:
    names = draw(st.lists(st.sampled_from(sorted(GOING_ON)), max_size=6))
    names += draw(st.lists(st.sampled_from(sorted(LAST)), max_size=1))
    total = sum(len((GOING_ON | LAST)[name][0]) for name in names)
    places = draw(st.lists(st.integers(0, min(total, 3000)), max_size=12))
    breaks = draw(st.lists(st.booleans(), min_size=14, max_size=14))
    return names, places, breaks


@given(conversations())
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_conversation_in_any_pieces_is_answered_request_by_request(
    fast: Ask, ordinary: Ask, conversation: tuple[list[str], list[int], list[bool]]
):
    names, places, breaks = conversation
    parts = [(GOING_ON | LAST)[name] for name in names]
    expected = [ordinary(*part) for part in parts]
    assert ask_all(fast, parts, places, breaks=breaks) == expected
