"""The `policyserve` command: a table from verb to function, imported when asked for."""

from __future__ import annotations

import difflib
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Verb(NamedTuple):
    """One command: where its function lives and its line in `policyserve --help`."""

    target: str
    summary: str
    extra: str


VERBS = {
    "train": Verb("training.cli:train", "Train a policy: environment to checkpoints.", "train"),
    "tune": Verb("training.tuning.cli:tune", "Search for good settings: many runs.", "train"),
    "evaluate": Verb("export.cli:evaluate", "Play episodes and report returns.", "client"),
    "plot": Verb("training.plot_cli:plot", "Draw learning curves or a search.", "train"),
    "record": Verb("export.record_cli:record", "Policies to a video, side by side.", "export"),
    "export": Verb("export.cli:export", "Checkpoint to bundle, parity-proved.", "export"),
    "inspect": Verb(
        "serving.cli:inspect", "What a bundle expects, returns, and comes from.", "serve"
    ),
    "verify": Verb(
        "serving.cli:verify", "Replay a bundle's golden vectors on this machine.", "serve"
    ),
    "serve": Verb("serving.cli:serve", "Serve bundles on Ray Serve until Ctrl-C.", "serve"),
    "act": Verb("serving.cli:act", "One action from a served policy.", "client"),
    "play": Verb("serving.cli:play", "Step an environment against a served policy.", "client"),
    "loadtest": Verb("loadtests.cli:loadtest", "Load test a served policy; a report.", "loadtest"),
    "demo": Verb("loadtests.demo:demo", "All of it on CartPole-v1, with a table.", "all"),
}


_OURS = ("training", "export", "serving", "loadtests")


def _load(verb: str) -> Callable[..., Any]:
    module_name, function_name = VERBS[verb].target.split(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module_name), function_name)
    return function


def _fail(message: str, exit_code: int = 1) -> int:
    print(f"policyserve: error: {' '.join(message.split())}", file=sys.stderr)
    return exit_code


def _help() -> str:
    width = max(map(len, VERBS))
    rows = "\n".join(f"  {name:<{width}}  {verb.summary}" for name, verb in VERBS.items())
    return (
        "Usage: policyserve COMMAND [ARGS]...\n\n"
        "From an RLlib checkpoint to a production action endpoint.\n\n"
        f"Commands:\n{rows}\n\n"
        "Options:\n"
        "  --version  Print the version.\n"
        "  --debug    With any command: show the traceback of an error.\n"
        "  --help     This text; `policyserve COMMAND --help` for one command.\n"
    )


def _unknown(verb: str) -> int:
    near = difflib.get_close_matches(verb, VERBS, n=1)
    hint = f"; did you mean `{near[0]}`?" if near else ""
    return _fail(f"no command {verb!r}{hint} (commands: {', '.join(VERBS)})", 2)


def _run(verb: str, arguments: Sequence[str]) -> int:
    import typer

    function = _load(verb)
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(name=verb, context_settings={"help_option_names": ["-h", "--help"]})(function)
    # Not standalone: its usage errors are boxes of several lines.
    status = app(args=list(arguments), prog_name=f"policyserve {verb}", standalone_mode=False)
    return status if isinstance(status, int) else 0


def _report(exc: Exception, verb: str) -> int:
    """One line for the user, whatever happened; the exit status."""
    if isinstance(exc, ModuleNotFoundError) and exc.name and exc.name.split(".")[0] not in _OURS:
        hint = f"pip install 'policyserve[{VERBS[verb].extra}]'"
        return _fail(f"`{verb}` needs the package {exc.name!r}, which is not installed: {hint}")
    format_message = getattr(exc, "format_message", None)  # typer's own errors are usage errors
    if format_message is not None:
        return _fail(f"{format_message()} (see `policyserve {verb} --help`)", 2)
    known = getattr(exc, "exit_code", None)
    if known is None:
        return _fail(f"unexpected {type(exc).__name__}: {exc} (--debug shows where)")
    return _fail(str(getattr(exc, "message", exc)), int(known))


def _on_sigterm(number: int, _: object) -> None:
    sys.exit(128 + number)  # an exception, so that whatever runs cleans up after itself


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and exit: 0 done, 1 the job failed, 2 wrong usage."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments or os.environ.get("POLICYSERVE_DEBUG") == "1"
    arguments = [argument for argument in arguments if argument != "--debug"]
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        print(_help())
        sys.exit(0 if arguments else 2)
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(f"policyserve {version('policyserve')}")
        sys.exit(0)
    verb = arguments[0]
    if verb not in VERBS:
        sys.exit(_unknown(verb))
    signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        sys.exit(_run(verb, arguments[1:]))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except Exception as exc:  # the process's outermost edge: one line for the user
        if debug:
            traceback.print_exc()
        sys.exit(_report(exc, verb))


if __name__ == "__main__":
    main()
