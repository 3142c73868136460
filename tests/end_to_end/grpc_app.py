"""A Ray Serve application with the gRPC methods of the Open Inference Protocol and nothing else.

    python -m tests.end_to_end.grpc_app BUNDLE GRPC_PORT direct|haproxy

Prints `ready`, and ends when its standard input does.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from serving import environment
from serving.config import PolicySource, ServingConfig
from serving.dialects.open_inference.grpc_dialect import GrpcDialect
from serving.dialects.open_inference.grpc_service import SERVICER_FUNCTION, GrpcInference
from serving.reaper import reaped
from serving.service import load_services

HOST = "127.0.0.1"


class Answering(GrpcInference):
    """A deployment that is the mixin alone."""

    def __init__(self, bundle: str) -> None:
        sources = [PolicySource(name="p", path=Path(bundle))]
        self.grpc_dialect = GrpcDialect(load_services(sources, ServingConfig(), "cpu"))


def main(bundle: str, grpc_port: str, ingress: str) -> None:
    runtime_dir = environment.new_runtime_dir()
    environment.apply(environment.switches(2, ingress))
    os.environ.update(environment.private_cluster(runtime_dir, HOST, ingress))
    with reaped(runtime_dir):
        import ray
        from ray import serve
        from ray.serve.config import HTTPOptions, gRPCOptions

        ray.init(
            address="local",
            num_cpus=3,
            include_dashboard=False,
            object_store_memory=128 * 2**20,
            log_to_driver=False,
            _temp_dir=str(environment.ray_dir(runtime_dir)),
        )
        serve.start(
            proxy_location="HeadOnly",
            http_options=HTTPOptions(host=HOST, port=environment.free_port(HOST)),
            grpc_options=gRPCOptions(
                port=int(grpc_port), grpc_servicer_functions=[SERVICER_FUNCTION]
            ),
        )
        serve.run(serve.deployment(Answering).bind(bundle), name="grpc", route_prefix="/")
        print("ready", flush=True)
        sys.stdin.read()
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
