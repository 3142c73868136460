"""What Ray Serve calls in each of its processes that is about to listen, behind HAProxy."""

from __future__ import annotations

import os
from typing import Any

IMPORT_PATH = "serving.ray_hooks:before_listening"
GRPC_HOST_VARIABLE = "POLICYSERVE_GRPC_HOST"


def before_listening() -> list[Any]:
    """Have the gRPC servers of this process listen where the HTTP servers do.

    Serve opens them on every interface of the machine, whatever host it is given.

    Returns:
        The further middlewares that Serve asks for: none.
    """
    from ray.serve._private import default_impl

    host = os.environ[GRPC_HOST_VARIABLE]

    def add_grpc_address(grpc_server: Any, server_address: str) -> None:
        port = server_address.rpartition(":")[2]
        grpc_server.add_insecure_port(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")

    default_impl.add_grpc_address = add_grpc_address
    return []
