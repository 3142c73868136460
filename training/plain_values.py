"""Values that YAML and JSON both give back as they were."""

from __future__ import annotations

import math
from typing import Any


def why_not_plain(value: Any, where: str = "") -> str | None:
    """Say what YAML and JSON don't both give back as it was, None where there is no such thing.

    Checkpoints sign a config's values as JSON and a run's config gives them back as YAML: what is
    not the same in both would not be what the environment was trained with.

    Args:
        value: Text, a number, true, false, null, a list, or a mapping.
        where: Its place in a larger value, as a JSON pointer.
    """
    at = f" at {where}" if where else ""
    if isinstance(value, dict):
        if wrong := [key for key in value if not isinstance(key, str)]:
            return f"expected keys that are text, found {wrong[0]!r}{at}: put it in quotes"
        children: Any = value.items()
    elif isinstance(value, (list, tuple)):
        children = enumerate(value)
    elif isinstance(value, float) and not math.isfinite(value):
        return f"expected a finite number, found {value!r}{at}"
    elif value is None or isinstance(value, (str, int, float)):
        return None
    else:
        found = f"{type(value).__name__} {str(value)!r}"
        return f"expected text, numbers, lists or mappings, found {found}{at}"
    problems = (why_not_plain(child, f"{where}/{name}") for name, child in children)
    return next(filter(None, problems), None)
