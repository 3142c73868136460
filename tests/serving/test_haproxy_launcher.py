"""What is changed in the HAProxy configuration that Ray writes."""

from __future__ import annotations

import re
from pathlib import Path

from serving.haproxy_launcher import rewritten

# Shortened from ray/serve/_private/haproxy_templates.py of Ray 2.60.
CONFIG = """\
global
    stats socket /tmp/h/admin.sock mode 666 level admin
defaults
    mode http
    errorfile 502 /tmp/h/500.http
    errorfile 503 /tmp/h/500.http
    errorfile 504 /tmp/h/500.http
    errorfile 400 /tmp/h/400.http
frontend prometheus
    bind :9101
    mode http
frontend http_frontend
    bind 127.0.0.1:8000
    use_backend app if { path_beg / }
frontend grpc_frontend
    bind 0.0.0.0:9000 proto h2
backend app
    server r1 127.0.0.1:30000 check
    server r2 10.0.0.7:30001 check
    server fallback 127.0.0.1:8500 check backup
listen stats
  bind *:8404
  stats enable
"""
DIRECTORY = Path("/tmp/h")


def changes(config: str, host: str) -> dict[str, str]:
    """Old line to new line, where they differ; error pages aside."""

    def lines(text: str) -> list[str]:
        return [line for line in text.splitlines() if "errorfile" not in line]

    before, after = lines(config), lines(rewritten(config, DIRECTORY, host))
    assert len(before) == len(after)
    return {old.strip(): new.strip() for old, new in zip(before, after, strict=True) if old != new}


def test_side_listeners_move_to_loopback_and_nothing_else_changes():
    assert changes(CONFIG, "127.0.0.1") == {
        "bind :9101": "bind 127.0.0.1:9101",
        "bind *:8404": "bind 127.0.0.1:8404",
    }


def test_every_answer_of_haproxy_itself_is_ours():
    after = rewritten(CONFIG, DIRECTORY, "127.0.0.1")
    pages = re.findall(r"^    errorfile (\d+) (\S+)$", after, flags=re.MULTILINE)
    assert dict(pages) == {
        "400": "/tmp/h/policyserve-400.http",
        "408": "/tmp/h/policyserve-408.http",
        **dict.fromkeys(("502", "503", "504"), "/tmp/h/policyserve-503.http"),
    }
    assert after.index("errorfile") > after.index("defaults")
    assert after.index("errorfile") < after.index("frontend")


def test_requests_are_logged_only_where_somebody_wants_that():
    logging = ["log 127.0.0.1:514 local0 info", "log global", "option httplog"]
    config = CONFIG.replace("global\n", f"global\n    {logging[0]}\n", 1)
    config = config.replace("defaults\n", "defaults\n    log global\n    option httplog\n")
    quiet = rewritten(config, DIRECTORY, "127.0.0.1")
    assert quiet == rewritten(CONFIG, DIRECTORY, "127.0.0.1")
    kept = rewritten(config, DIRECTORY, "127.0.0.1", logs=True).splitlines()
    assert [line.strip() for line in kept if "log" in line] == logging


def test_replicas_of_this_node_are_reached_where_they_listen():
    found = changes(CONFIG, "192.168.1.5")
    assert found["server r1 127.0.0.1:30000 check"] == "server r1 192.168.1.5:30000 check"
    assert not any(line.startswith("server r2") for line in found)


def test_rewriting_twice_changes_nothing_more():
    once = rewritten(CONFIG, DIRECTORY, "127.0.0.1")
    assert rewritten(once, DIRECTORY, "127.0.0.1") == once


def test_a_public_listener_on_every_interface_stays_so():
    config = CONFIG.replace("bind 127.0.0.1:8000", "bind *:8000")
    assert "    bind *:8000\n" in rewritten(config, DIRECTORY, "127.0.0.1")
