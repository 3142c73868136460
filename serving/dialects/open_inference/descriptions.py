"""What the protocol tells of the server, of a model, and of what it has done: plain data."""

from __future__ import annotations

from typing import Any

from serving.dialects.open_inference.model import Model, TensorSpec
from serving.service import PolicyService, PolicyServices
from serving.statistics import PolicyStatistics

SERVER_NAME = "policyserve"
# Exactly what works. `model_repository` and `schedule_policy` promise more (load and unload,
# priorities) than the index and `timeout`, which are here.
REST_EXTENSIONS = ("binary_tensor_data", "model_configuration", "parameters", "statistics")
GRPC_EXTENSIONS = ("model_configuration", "parameters", "statistics")


def model_metadata(model: Model) -> dict[str, Any]:
    """`name`, `versions`, `platform`, `inputs`, `outputs`, `properties`."""
    return {
        "name": model.name,
        "versions": [model.version],
        "platform": model.platform,
        "inputs": [_tensor(spec) for spec in model.inputs.values()],
        "outputs": [_tensor(spec) for spec in model.outputs.values()],
        "properties": {
            "optional_inputs": ",".join(
                spec.name for spec in model.inputs.values() if spec.is_optional
            )
        },
    }


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}


def model_config(model: Model) -> dict[str, Any]:
    """The model configuration, with Triton's names; `dims` are those of one row."""
    return {
        "name": model.name,
        "platform": model.platform,
        "backend": model.platform.partition("_")[0],
        "max_batch_size": model.max_batch_size,
        "version_policy": {"specific": {"versions": [int(model.version)]}},
        "input": [
            {**_config_tensor(spec), "optional": spec.is_optional} for spec in model.inputs.values()
        ],
        "output": [_config_tensor(spec) for spec in model.outputs.values()],
    }


def _config_tensor(spec: TensorSpec) -> dict[str, Any]:
    return {
        "name": spec.name,
        "data_type": f"TYPE_{spec.datatype}",
        "dims": list(spec.shape[1:]),
    }


def model_statistics(service: PolicyService) -> dict[str, Any]:
    """One model's statistics, in the statistics extension's form; durations in nanoseconds."""
    found: PolicyStatistics = service.statistics()
    nothing = {"count": 0, "ns": 0}
    return {
        "name": service.name,
        "version": str(service.version),
        "last_inference": found.last_inference_ms,
        "inference_count": found.inference_count,
        "execution_count": found.execution_count,
        "inference_stats": {
            "success": {"count": found.success_count, "ns": found.success_ns},
            "fail": {"count": found.fail_count, "ns": found.fail_ns},
            "queue": {"count": found.queue_count, "ns": found.queue_ns},
            # What the engine is given and what it gives are part of `compute_infer`.
            "compute_input": nothing,
            "compute_infer": {
                "count": found.compute_infer_count,
                "ns": found.compute_infer_ns,
            },
            "compute_output": nothing,
        },
    }


def repository_index(services: PolicyServices, *, is_ready: bool) -> list[dict[str, Any]]:
    """Every model, its version and state: policies are loaded before the server answers."""
    state = "READY" if is_ready else "UNAVAILABLE"
    reason = "" if is_ready else "the server is shutting down"
    return [
        {"name": each.name, "version": str(each.version), "state": state, "reason": reason}
        for each in services
    ]
