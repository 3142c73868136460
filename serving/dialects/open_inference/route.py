"""The protocol's paths as one route of a Starlette application."""

from __future__ import annotations

from starlette.datastructures import URLPath
from starlette.routing import BaseRoute, Match, NoMatchFound
from starlette.types import Receive, Scope, Send

from serving.dialects.open_inference.handler import OpenInferenceHandler, is_open_inference


class OpenInferenceRoute(BaseRoute):
    """Everything under `/v2`, whatever characters the rest of the path has.

    Starlette's own path patterns stop at a line break, and redirect for a slash.
    """

    def __init__(self, handler: OpenInferenceHandler) -> None:
        self._handler = handler

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Take every HTTP request whose path is the protocol's."""
        is_ours = scope["type"] == "http" and is_open_inference(scope["path"])
        return (Match.FULL if is_ours else Match.NONE), {}

    def url_path_for(self, name: str, /, **path_params: object) -> URLPath:
        """No path here has a name."""
        raise NoMatchFound(name, path_params)

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        await self._handler(scope, receive, send)
