"""Whether this uvicorn is as the fast lane takes it to be: it builds on what is private there."""

from __future__ import annotations

import inspect

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle


def fits() -> str | None:
    """Why this uvicorn's class cannot be extended as it is here; None where it can."""
    for name, parameters in _METHODS.items():
        method = getattr(HttpToolsProtocol, name, None)
        if method is None:
            return f"uvicorn's HttpToolsProtocol has no {name}"
        if list(inspect.signature(method).parameters) != ["self", *parameters]:
            return f"uvicorn's HttpToolsProtocol.{name} takes other arguments"
    for owner, attributes in ((HttpToolsProtocol, _ATTRIBUTES), (RequestResponseCycle, _OF_CYCLE)):
        missing = attributes - _names_in(owner)
        if missing:
            return f"uvicorn's {owner.__name__} has no {min(missing)}"
    return None


def _names_in(owner: type) -> set[str]:
    """Every name that a class's own methods use."""
    codes = [value.__code__ for value in vars(owner).values() if inspect.isfunction(value)]
    return {name for code in codes for name in code.co_names}


# Of `HttpToolsProtocol`, what is overridden or called here, with the parameters after `self`.
_METHODS = {
    "_should_upgrade": (),
    "_start_asgi_task": ("cycle", "app"),
    "_unset_keepalive_if_required": (),
    "connection_lost": ("exc",),
    "connection_made": ("transport",),
    "data_received": ("data",),
    "handle_websocket_upgrade": (),
    "on_body": ("body",),
    "on_headers_complete": (),
    "on_message_begin": (),
    "on_message_complete": (),
    "on_response_complete": (),
    "pause_writing": (),
    "resume_writing": (),
    "send_400_response": ("msg",),
    "shutdown": (),
}
_ATTRIBUTES = {
    *("connections", "cycle", "flow", "headers", "parser", "pipeline", "server_state"),
    *("timeout_keep_alive_task", "transport", "url"),
}
_OF_CYCLE = {"keep_alive", "message_event", "more_body", "response_complete"}
