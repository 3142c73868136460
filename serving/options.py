"""Options that every command has which plays episodes: `evaluate`, `play` and `record`."""

from __future__ import annotations

from typing import Annotated

import typer

EnvOption = Annotated[
    str | None,
    typer.Option(
        help="A Gymnasium environment id, module:EnvId or module:factory [the one the policy "
        "names].",
        metavar="ID",
    ),
]
EnvConfigOption = Annotated[
    str | None, typer.Option(help="The environment's keyword arguments.", metavar="JSON")
]
WrapperOption = Annotated[
    list[str] | None,
    typer.Option(
        help="A wrapper around the environment: module:Class, or module:Class=JSON with its "
        "arguments; repeatable.",
        metavar="PATH",
    ),
]
SeedOption = Annotated[int, typer.Option(help="Episode i is reset with seed + i.", min=0)]
StochasticOption = Annotated[
    bool, typer.Option("--stochastic", help="Sample instead of the most likely action.")
]
ActionMaskOption = Annotated[
    bool, typer.Option("--action-mask", help="Allow only what the environment's info allows.")
]
