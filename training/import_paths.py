"""Objects of the user's own code, named by "module:Name". Imports no Ray."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from training.errors import ConfigError


def let_modules_of_this_directory_be_imported() -> None:
    """Let import paths name modules of the current directory, behind all that is installed."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)


def load_object(path: str, *, setting: str) -> Any:
    """Import what a path "module:Name" names.

    Args:
        path: The import path; the module may lie in the current directory.
        setting: The setting that names it, for the message.

    Raises:
        ConfigError: There is no such module or name, or the module fails while it is imported.
    """
    module_name, _, name = path.partition(":")
    let_modules_of_this_directory_be_imported()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as exc:
        raise ConfigError(
            f"`{setting}` names {path}: there is no module {exc.name!r} (looked in the current "
            "directory and the installed packages)"
        ) from exc
    except Exception as exc:  # a user's module can raise anything
        raise ConfigError(
            f"`{setting}` names {path}, whose module fails: {type(exc).__name__}: {exc}"
        ) from exc
    try:
        return getattr(module, name)
    except AttributeError:
        raise ConfigError(
            f"`{setting}` names {path}: the module {module_name!r} ({module.__file__}) has no "
            f"{name!r}"
        ) from None
