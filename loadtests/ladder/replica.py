"""A replica of policyserve as it is, in bare uvicorn: no Ray, no Serve, no HAProxy.

Run: FILE BUNDLE PORT. Beside `policyserve serve` this says what Ray's process around it costs.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import uvloop

from serving.config import PolicySource, ServingConfig
from serving.deployment import PolicyServer


async def serve(bundle: Path, port: int) -> None:
    """Serve for ever."""
    source = PolicySource(name="cartpole", path=bundle)
    config = ServingConfig(port=port, ingress="direct", grpc=False)
    # Serve awaits the constructor, which plain Python cannot.
    server = PolicyServer.__new__(PolicyServer)
    await server.__init__(  # type: ignore[misc]  # a coroutine, see above
        [source.model_dump(mode="json")], config.model_dump(mode="json"), "cpu"
    )
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(serve(Path(sys.argv[1]), int(sys.argv[2])))
