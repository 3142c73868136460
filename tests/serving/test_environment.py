"""The settings of one server's own cluster."""

from __future__ import annotations

import socket
from pathlib import Path

from serving import environment


def ports(variables: dict[str, str]) -> set[int]:
    """Every port that a server behind HAProxy takes beside its public ones."""
    low, high = (
        int(variables.pop(f"RAY_SERVE_DIRECT_INGRESS_{end}_GRPC_PORT")) for end in ("MIN", "MAX")
    )
    named = {int(value) for name, value in variables.items() if name.endswith("_PORT")}
    assert len(named) == 4
    return named | set(range(low, high + 1))


def test_two_servers_behind_haproxy_have_no_port_in_common(tmp_path: Path):
    found = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        found.append(ports(environment.private_cluster(tmp_path / name, "127.0.0.1")))
    assert not found[0] & found[1]
    # Replicas' own HTTP ports begin at 30000, and the kernel hands out those above 32768.
    assert max(found[0] | found[1]) < 30_000


def test_a_port_that_somebody_listens_on_is_not_given_to_a_server(tmp_path: Path):
    (tmp_path / "first").mkdir()
    taken = min(ports(environment.private_cluster(tmp_path / "first", "127.0.0.1")))
    (tmp_path / "second").mkdir()
    with socket.socket() as other:
        # The next block's first port of a name.
        other.bind(("127.0.0.1", taken + 64))
        other.listen()
        second = ports(environment.private_cluster(tmp_path / "second", "127.0.0.1"))
    assert taken + 64 not in second
