"""YAML, flags and `--set` to a TrainingConfig: default, then YAML, then flags, then `--set`.

Errors are one readable line that says what was found, what was expected and where it stood.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from training.config import ALGORITHMS, TrainingConfig, settings_of
from training.errors import ConfigError
from training.plain_values import why_not_plain

SHIPPED_CONFIGS = Path(__file__).parent / "configs"
SEARCH_SECTION = "tune"
"""The section that makes a config a search, of `policyserve tune`."""

Key = tuple[str, ...]
Values = dict[Key, Any]
Sources = dict[Key, str]

_ELSEWHERE = {
    # RLlib settings that a user may know by name and that mean something else, or nothing, here.
    "train_batch_size": "it is called `train_batch_size_per_learner` (there is one learner)",
    "num_sgd_iter": "RLlib renamed it `num_epochs`",
    "sgd_minibatch_size": "RLlib renamed it `minibatch_size`",
    "lr_schedule": "RLlib takes the schedule as `lr`",
    "entropy_coeff_schedule": "RLlib takes the schedule as `entropy_coeff`",
    "lambda": "RLlib calls it `lambda_`",
    "framework": "it is always torch",
    "lstm_use_prev_action": "it is `prev_actions` at the top level (with `model.use_lstm` or not)",
    "lstm_use_prev_reward": "it is `prev_rewards` at the top level (with `model.use_lstm` or not)",
    "use_attention": "RLlib's new stack has no attention networks; `model.use_lstm` gives memory",
}


class _Loader(yaml.SafeLoader):
    """YAML with 1.2's floats and no duplicate keys.

    YAML 1.1, which PyYAML follows, reads 1e-3 as a string (it wants 1.0e-3) and lets the second of
    two equal keys win silently.
    """


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag != "tag:yaml.org,2002:float"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?"
        r"|[0-9][0-9_]*[eE][-+]?[0-9]+|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


def load_config(
    config_file: str | Path | None = None,
    *,
    flags: Mapping[str, Any] | None = None,
    sets: Sequence[str] = (),
) -> TrainingConfig:
    """Build the config in force.

    Args:
        config_file: A YAML file, or the bare name of a shipped config, e.g. "ppo-cartpole".
        flags: Flag to (dotted key, value) pairs are the caller's; here dotted key to value, None
            for a flag that wasn't given.
        sets: `key=value` texts; the key dotted, the value YAML.

    Raises:
        ConfigError: Any key or value is wrong.
    """
    values: Values = {}
    sources: Sources = {}
    if config_file is not None:
        document, lines = read_document(find_config(config_file))
        if SEARCH_SECTION in document:
            raise ConfigError(
                f"{config_file} is a search (it has a `{SEARCH_SECTION}` section): run it with "
                f"`policyserve tune {config_file}`"
            )
        values.update(_flatten(document, ()))
        sources.update(lines)
    for name, value in (flags or {}).items():
        if value is not None:
            _replace(values, tuple(name.split(".")), value)
            sources[tuple(name.split("."))] = f"flag {_flag(name)}"
    for text in sets:
        key, value = parse_set(text)
        _replace(values, key, value)
        sources[key] = f"--set {text}"
    if ("env",) not in values:
        raise ConfigError("no environment: give `--env ID`, or a config with `env:`")
    return _validate(values, sources)


def config_from_mapping(
    document: Mapping[str, Any], *, source: str | Mapping[Key, str]
) -> TrainingConfig:
    """Build a config from what a YAML file holds.

    Args:
        document: Nested as in the file.
        source: Where it comes from, for the messages; or where each key does, as `read_document`
            says it.

    Raises:
        ConfigError: Any key or value is wrong.
    """
    values: Values = dict(_flatten(document, ()))
    if isinstance(source, str):
        sources = {key[:end]: source for key in values for end in range(1, len(key) + 1)}
    else:
        sources = dict(source)
    if ("env",) not in values:
        raise ConfigError("no environment: give one with `env:`")
    return _validate(values, sources)


def _validate(values: Values, sources: Sources) -> TrainingConfig:
    config_class = _config_class(values, sources)
    _check_keys(config_class, values, sources)
    for key, value in values.items():
        if problem := why_not_plain(value):
            raise ConfigError(f"`{'.'.join(key)}`: {problem} ({_source(sources, key)})")
    try:
        return config_class.model_validate(_nest(values))
    except ValidationError as exc:
        raise ConfigError(_describe(config_class, exc, values, sources)) from exc


def dump_config(config: TrainingConfig) -> str:
    """Write a config as YAML that `load_config` reads back equal."""
    return yaml.safe_dump(config.model_dump(mode="json", by_alias=True), sort_keys=False)


def shipped_configs() -> dict[str, Path]:
    """The configs that come with policyserve: bare name to file."""
    return {path.stem: path for path in sorted(SHIPPED_CONFIGS.glob("*.yaml"))}


def shipped_for(env: str) -> list[str]:
    """Names of the shipped configs for an environment."""
    return [
        name
        for name, path in shipped_configs().items()
        if (document := read_document(path)[0]).get("env") == env and SEARCH_SECTION not in document
    ]


def find_config(given: str | Path) -> Path:
    """The file that a path or a shipped config's bare name means.

    Raises:
        ConfigError: There is none.
    """
    path = Path(given)
    if path.is_file():
        return path
    shipped = shipped_configs()
    if str(given) in shipped:
        return shipped[str(given)]
    near = difflib.get_close_matches(str(given), shipped, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(
        f"no config file {str(given)!r}{hint} (shipped configs: {', '.join(shipped)}; "
        "for an environment id use --env)"
    )


def read_document(path: Path) -> tuple[dict[str, Any], Sources]:
    """Read a YAML file: what it holds, and the line of each of its keys.

    Raises:
        ConfigError: It can't be read, is not valid, or holds no `key: value` lines.
    """
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, _Loader)
        document = yaml.load(text, _Loader)
    except yaml.YAMLError as exc:
        mark = getattr(exc, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        problem = getattr(exc, "problem", None) or str(exc)
        raise ConfigError(f"{path}{where} is not valid YAML: {problem}") from exc
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path} can't be read: {exc}") from exc
    if not isinstance(document, dict):
        found = "nothing" if document is None else type(document).__name__
        raise ConfigError(f"{path} holds {found}, expected `key: value` lines")
    return document, {key: f"{path} line {line}" for key, line in _key_lines(node, (), path)}


def _key_lines(node: yaml.Node | None, prefix: Key, path: Path) -> Iterator[tuple[Key, int]]:
    if not isinstance(node, yaml.MappingNode):
        return
    seen = set()
    for key_node, value_node in node.value:
        key = (*prefix, str(key_node.value))
        line = key_node.start_mark.line + 1
        if key in seen:
            raise ConfigError(f"`{'.'.join(key)}` stands twice, the second time in {path}:{line}")
        seen.add(key)
        yield key, line
        yield from _key_lines(value_node, key, path)


def _flatten(mapping: Mapping[Any, Any], prefix: Key) -> Iterator[tuple[Key, Any]]:
    # Only sections are flattened; a free mapping such as env_config stays one value.
    for name, value in mapping.items():
        key = (*prefix, str(name))
        if isinstance(value, dict) and _section(key) is not None:
            yield from _flatten(value, key)
        elif value is None and _section(key) is not None:
            continue  # `model:` with nothing below it
        else:
            yield key, value


def _section(key: Key, config_class: type[TrainingConfig] | None = None) -> type[BaseModel] | None:
    # The config model that a key names: () is the config's own, ("stop",) StopConfig, else None.
    if config_class is None:  # one that has any algorithm's sections
        found = (_section(key, config) for config in ALGORITHMS.values())
        return next(filter(None, found), None)
    model: type[BaseModel] = config_class
    for name in key:
        field = model.model_fields.get(name)
        annotation = field.annotation if field else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return None
        model = annotation
    return model


def _names(model: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]


def _all_keys(config_class: type[TrainingConfig]) -> dict[Key, str]:
    # Every key of the config to its last name.
    def below(prefix: Key) -> Iterator[Key]:
        model = _section(prefix, config_class)
        for name in _names(model) if model else ():
            yield (*prefix, name)
            yield from below((*prefix, name))

    return {key: key[-1] for key in below(())}


def parse_set(text: str) -> tuple[Key, Any]:
    """Split a `key=value` text: the key's path, and its value read as YAML.

    Raises:
        ConfigError: It is not of that form.
    """
    name, equals, raw = text.partition("=")
    name = name.strip()
    if not equals or not name:
        raise ConfigError(f"--set {text}: expected key=value, e.g. --set lr=1e-3")
    try:
        value = yaml.load(raw, _Loader)
    except yaml.YAMLError as exc:
        raise ConfigError(f"--set {text}: the value is not valid YAML") from exc
    key = tuple(name.split("."))
    if any(key[0] in settings_of(algo).model_fields for algo in ALGORITHMS):
        key = ("algo_config", *key)
    return key, value


def _replace(values: Values, key: Key, value: Any) -> None:
    # A whole section may be given at once: `--set model={fcnet_hiddens: [32]}`.
    if isinstance(value, dict) and _section(key) is not None:
        values.update(_flatten(value, key))
        return
    # One entry of a free mapping: `--set env_config.gravity=5`.
    for end in range(1, len(key)):
        if _section(key[:end]) is None:
            existing = values.get(key[:end])
            inner: dict[str, Any] = dict(existing) if isinstance(existing, dict) else {}
            branch = inner
            for name in key[end:-1]:
                child = branch.get(name)
                branch[name] = dict(child) if isinstance(child, dict) else {}
                branch = branch[name]
            branch[key[-1]] = value
            if any(key[:end] in _all_keys(config) for config in ALGORITHMS.values()):
                values[key[:end]] = inner
                return
            break
    values[key] = value


def _nest(values: Values) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in values.items():
        branch = nested
        for name in key[:-1]:
            branch = branch.setdefault(name, {})
        branch[key[-1]] = value
    return nested


def _check_keys(config_class: type[TrainingConfig], values: Values, sources: Sources) -> None:
    known = _all_keys(config_class)
    for key in values:
        if key in known:
            if _section(key, config_class) is not None:
                value = values[key]
                raise ConfigError(
                    f"`{'.'.join(key)}` is a section, expected `key: value` lines under it, "
                    f"found {_show(value)} ({_source(sources, key)})"
                )
            continue
        name = ".".join(key)
        where = _source(sources, key)
        if key[-1] in _ELSEWHERE:
            raise ConfigError(f"no setting `{name}` ({where}): {_ELSEWHERE[key[-1]]}")
        if others := [algo for algo, other in ALGORITHMS.items() if key in _all_keys(other)]:
            ours = config_class.model_fields["algo"].default
            raise ConfigError(
                f"no setting `{name}` of {ours} ({where}); it is one of {', '.join(others)}"
            )
        raise ConfigError(f"no setting `{name}` ({where}){_nearest(key, known)}")


def _nearest(key: Key, known: Mapping[Key, str]) -> str:
    same_name = [candidate for candidate, name in known.items() if name == key[-1]]
    if same_name:
        return f"; `{key[-1]}` belongs under `{'.'.join(same_name[0][:-1]) or 'the top level'}`"
    siblings = {name: known_key for known_key, name in known.items() if known_key[:-1] == key[:-1]}
    wider = {name: known_key for known_key, name in known.items()}
    dotted = {".".join(known_key): known_key for known_key in known}
    near = difflib.get_close_matches(key[-1], siblings, n=1, cutoff=0.6)
    if near:
        return f"; did you mean `{'.'.join(siblings[near[0]])}`?"
    near = difflib.get_close_matches(key[-1], wider, n=1, cutoff=0.7)
    if near:
        return f"; did you mean `{'.'.join(wider[near[0]])}`?"
    near = difflib.get_close_matches(".".join(key), dotted, n=1, cutoff=0.6)
    if near:
        return f"; did you mean `{near[0]}`?"
    names = ", ".join(sorted(siblings) or sorted(name for name in wider))
    return f"; known here: {names}"


def _config_class(values: Values, sources: Sources) -> type[TrainingConfig]:
    given = values.setdefault(("algo",), "PPO")
    if not isinstance(given, str) or given.upper() not in ALGORITHMS:
        raise ConfigError(
            f"algorithm {given!r} is not supported ({_source(sources, ('algo',))}); "
            f"supported: {', '.join(ALGORITHMS)}"
        )
    values[("algo",)] = given.upper()
    return ALGORITHMS[given.upper()]


def _describe(
    config_class: type[TrainingConfig], exc: ValidationError, values: Values, sources: Sources
) -> str:
    known = _all_keys(config_class)
    errors = exc.errors(include_url=False)
    error = errors[0]
    # Past a leaf key pydantic adds list indexes and the names of union members.
    key: Key = ()
    for part in error["loc"]:
        if not (isinstance(part, str) and (*key, part) in known):
            break
        key = (*key, part)
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if error["type"] == "missing":
        text = f"`{'.'.join(key)}` is missing"
    elif not key:  # settings that don't fit each other
        text = message
    elif _section(key, config_class) is not None:
        text = f"`{'.'.join(key)}`: {message}"
    else:
        expected = message if message.startswith("expected") else f"expected {message}"
        text = f"`{'.'.join(key)}` is {_show(values.get(key))}, {expected}"
        text += f" ({_source(sources, key)})"
    others = {tuple(str(part) for part in other["loc"])[:2] for other in errors}
    others.discard(tuple(str(part) for part in error["loc"])[:2])
    return f"{text}; {len(others)} more settings are wrong" if others else text


def _source(sources: Sources, key: Key) -> str:
    for end in range(len(key), 0, -1):
        if key[:end] in sources:
            return sources[key[:end]]
    return "the config"


def _flag(dotted_key: str) -> str:
    return "--" + dotted_key.replace(".", "-").replace("_", "-")


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
