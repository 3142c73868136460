"""What a server can be told: defaults, then `--config serve.yaml`, then flags."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from serving.errors import ServingConfigError


class PolicySource(BaseModel):
    """One policy to serve."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")
    """Its name in URLs."""
    version: int = Field(default=1, ge=0)
    """Its version; a repository's newest unless pinned."""
    path: Path
    """The bundle's directory."""


class ServingConfig(BaseModel):
    """Everything that `policyserve serve` can be told."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = "127.0.0.1"
    """The address to listen on; 0.0.0.0 opens the server to the network."""
    port: int = Field(default=8000, ge=0, le=65535)
    """The public port; 0 takes a free one."""
    ingress: Literal["direct", "haproxy"] | None = None
    """Who listens on the public port: the replicas themselves, or an HAProxy in front of them.
    None: direct on this machine alone, HAProxy on a cluster."""
    grpc: bool = True
    """Whether the Open Inference Protocol is served over gRPC too."""
    grpc_port: int | None = Field(default=None, ge=0, le=65535)
    """gRPC's port, 0 takes a free one; None: the one after `port`, or a free one."""
    keep_alive_s: float = Field(default=75.0, gt=0)
    """How long a connection may be idle before it is closed."""
    receive_timeout_s: float = Field(default=30.0, gt=0)
    """How long a request may take to arrive; beyond it: 408."""
    replicas: int = Field(default=1, ge=1, le=1024)
    """Processes that serve, each with every policy."""
    max_replicas: int | None = Field(default=None, ge=1, le=1024)
    """Most processes; None: always `replicas`. With more, Serve starts and stops some by load."""
    target_utilization: float = Field(default=0.7, gt=0, le=1)
    """The share of a core that each replica should be busy, where their number follows the load."""
    device: Literal["cpu", "cuda", "auto"] = "auto"
    """Where inference runs; auto times what is there at the start and takes the fastest."""
    engine: Literal["onnx", "torchscript", "pt2", "auto"] = "onnx"
    """The runtime; auto times what there is. TorchScript and pt2 files are programs: only for
    bundles you trust."""
    trust_programs: bool = False
    """Whether `engine: auto` may choose TorchScript or pt2."""
    max_batch_size: int = Field(default=256, ge=1, le=65536)
    """Most observations in one batch."""
    max_queue_size: int = Field(default=4096, ge=1)
    """Most observations waiting in one replica; beyond it: 503 with Retry-After."""
    max_observations_per_request: int = Field(default=1024, ge=1, le=65536)
    """Most observations in one request; beyond it: 413."""
    max_body_bytes: int = Field(default=16 * 1024 * 1024, ge=1024)
    """Largest body; beyond it: 413."""
    retry_after_s: int = Field(default=1, ge=0, le=3600)
    """What Retry-After says when the server is overloaded."""
    ray_address: str | None = None
    """A running Ray cluster to join; None starts a private one that ends with the server."""
    cpus_per_replica: float = Field(default=1.0, ge=0)
    """CPUs that Ray reserves for each replica."""
    gpus_per_replica: float | None = Field(default=None, ge=0)
    """GPUs that Ray reserves for each replica; None takes 1 on CUDA and 0 on the CPU."""


def build_config(file: Path | None, flags: Mapping[str, Any]) -> ServingConfig:
    """Defaults, then the YAML file, then the flags that were given.

    Raises:
        ServingConfigError: A key is unknown (with the nearest right one) or a value is wrong.
    """
    values: dict[str, Any] = {} if file is None else _read_yaml(file)
    where = "the command line" if file is None else str(file)
    unknown = sorted(set(values) - set(ServingConfig.model_fields))
    if unknown:
        near = difflib.get_close_matches(unknown[0], ServingConfig.model_fields, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ServingConfigError(f"{where}: unknown setting {unknown[0]!r}{hint}")
    values |= {key: value for key, value in flags.items() if value is not None}
    try:
        return ServingConfig(**values)
    except ValidationError as exc:
        first = exc.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise ServingConfigError(
            f"{where}: {name} = {first['input']!r}: {first['msg'].lower()}"
        ) from exc


def _read_yaml(file: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as exc:
        raise ServingConfigError(f"{file} is not readable as YAML: {exc}") from exc
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ServingConfigError(f"{file} holds {type(content).__name__}, expected settings")
    return {str(key): value for key, value in content.items()}
