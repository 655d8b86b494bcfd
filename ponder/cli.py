"""The command line of every main, read without jax.

    --config=experiments/addition.py:arm=act,seed=3,smoke   an experiment file and keywords of its get_config
    --config=W/config.json                                  the configuration of a workdir
    --config.optim.lr=1e-3                                  any field of it, typed
    --config.training.steps=500                             so many steps, in place of training.flops
    --config.start.workdir=W                                begin with the parameters of a finished run

A main states its other options as a frozen dataclass and hands its body over:

    if __name__ == "__main__":
        cli.main(body, options=Options, doc=__doc__)
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import os
import re
import sys
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import tyro

from ponder import memory, records, serialization
from ponder.config import Config, validate
from ponder.errors import DivergedError, UserError

Takes = Literal["config", "experiment", "options"]
Overrides = Mapping[str, Sequence[str]]  # dotted field: the words given for it

_CONFIG_HELP = "--config=experiments/x.py[:key=value,flag] or --config=W/config.json"


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What `--config` names: a file that makes configurations, or the one configuration of a workdir."""

    source: str
    module: ModuleType | None
    stored: Config | None
    keywords: Mapping[str, Any]
    """Given after the colon."""
    overrides: Overrides
    """Applied to every configuration that comes out."""

    @staticmethod
    def load(named: str, overrides: Overrides | None = None) -> Experiment:
        """`named` is `experiments/x.py:key=value,flag` or `W/config.json`. Raises UserError."""
        overrides = overrides or {}
        match = re.fullmatch(r"(.+?\.(?:py|json))(?::(.*))?", named, re.DOTALL)
        if not match:
            raise UserError(f"--config={named} names no experiment: give {_CONFIG_HELP}")
        path, arguments = match[1], match[2] or ""
        if path.endswith(".json"):
            if arguments:
                raise UserError(f"{path} is one configuration and takes no {arguments!r}: override --config.* instead")
            return Experiment(path, None, records.read_file(path), {}, overrides)
        module = serialization.load_file(Path(path))
        if not callable(getattr(module, "get_config", None)):
            raise UserError(f"{path} has no get_config: it is not an experiment")
        experiment = Experiment(path, module, None, {}, overrides)
        return dataclasses.replace(experiment, keywords=experiment._keywords(arguments))

    @property
    def arms(self) -> tuple[str, ...]:
        """Rows of its table: `ARMS`, or what `arms` makes of the keywords that it takes. Empty where it has neither."""
        made = getattr(self.module, "arms", None)
        if made is None:
            return getattr(self.module, "ARMS", ())
        takes = inspect.signature(made).parameters
        return made(**{name: value for name, value in self.keywords.items() if name in takes})

    @property
    def seeds(self) -> int:
        """How many seeds a row of its table takes."""
        return getattr(self.module, "SEEDS", 1)

    def config(self, **keywords: Any) -> Config:
        """`get_config` with the keywords after the colon and these, then the overrides; validated. Raises UserError."""
        keywords = {**self.keywords, **keywords}
        if self.stored is not None:
            if keywords:
                raise UserError(f"{self.source} is one configuration: it has no {', '.join(keywords)}")
            config = self.stored
        else:
            self._check_names(keywords)
            arm = keywords.get("arm")
            if arm is not None and self.arms and arm not in self.arms:
                raise UserError(f"{self.source} has no arm {arm!r}{serialization.nearest(arm, self.arms)}")
            config = self.module.get_config(**keywords)  # type: ignore[union-attr]
            if not isinstance(config, Config):
                raise UserError(f"{self.source}: get_config gives a {type(config).__name__}, not a Config")
        for name, words in self.overrides.items():
            config = _replaced(config, name, words)
        for name in self.overrides:
            flops = name.removesuffix("steps") + "flops"
            if f".{name}".endswith(".training.steps") and flops not in self.overrides:
                # The steps that FLOPs make would take the place of those asked for.
                config = _replaced(config, flops, ["None"])
        validate(config)
        return config

    def command(self, **keywords: Any) -> list[str]:
        """The words that name one of its configurations on another main's command line."""
        given = {**self.keywords, **keywords}
        named = f"{self.source}:" + ",".join(f"{name}={value}" for name, value in given.items())
        words = [f"--config={named.removesuffix(':')}"]
        for name, values in self.overrides.items():
            words += [f"--config.{name}={values[0]}"] if len(values) == 1 else [f"--config.{name}", *values]
        return words

    @property
    def signature(self) -> dict[str, inspect.Parameter]:
        """Keywords of get_config."""
        return dict(inspect.signature(self.module.get_config).parameters) if self.module else {}

    def _check_names(self, keywords: Iterable[str]) -> None:
        for name in keywords:
            if name not in self.signature:
                raise UserError(f"{self.source} takes no {name!r}{serialization.nearest(name, self.signature)}")

    def _keywords(self, arguments: str) -> dict[str, Any]:
        keywords: dict[str, Any] = {}
        types_ = typing.get_type_hints(self.module.get_config)  # type: ignore[union-attr]
        for argument in filter(None, arguments.split(",")):
            name, equals, value = argument.partition("=")
            self._check_names([name])
            hint = types_.get(name, str)
            if not equals and hint is not bool:
                raise UserError(f"{self.source}:{name} needs a value: {name}=..., {serialization.describe(hint)}")
            keywords[name] = _parse(hint, [value] if equals else ["True"], f"{self.source}:{name}")
        return keywords


def main(
    body: Callable[..., int | None],
    *,
    options: type,
    doc: str | None,
    takes: Takes = "config",
    module: str | None = None,
) -> typing.NoReturn:
    """Read the command line, run the body, exit.

    Args:
        body: called as `body(config, options)`, `body(experiment, options)` or `body(options)`; see `takes`. What it
            returns is the exit code (None: 0).
        options: a frozen dataclass of the main's own options. Fields may be `tyro.conf.Positional`.
        doc: the main's docstring, for `--help`.
        takes: what the body wants besides its options.
        module: name for the usage line, by default that of the running main.

    One line on stderr and exit code 2 for a UserError, 1 for a run that diverged, 130 for an interrupt by keyboard.
    """
    words = sys.argv[1:]
    asks_help = "--help" in words or "-h" in words
    if not asks_help:
        memory.reexec()
    try:
        if asks_help:
            _show_help(words, options, doc, takes, module)
            code: int | None = 0
        else:
            code = body(*parse(words, options, takes))
    except UserError as error:
        print(f"ponder: {error}", file=sys.stderr)
        code = 2
    except DivergedError as error:
        print(f"ponder: {error}", file=sys.stderr)
        code = 1
    except BrokenPipeError:  # `--help | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except KeyboardInterrupt:
        print("ponder: interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)


def parse(words: Sequence[str], options: type, takes: Takes = "config") -> tuple[Any, ...]:
    """The arguments of a main's body. Raises UserError."""
    given, loose = _read(words, serialization.hints(options))
    if takes == "options":
        return (_options(options, given, loose, also=()),)
    own = {name: words for name, words in given.items() if name.partition(".")[0] != "config"}
    parsed = _options(options, own, loose, also=("config",))
    experiment = _experiment(given)
    if experiment is None:
        raise UserError(f"no experiment: give {_CONFIG_HELP}")
    return (experiment.config() if takes == "config" else experiment), parsed


# --- words to values --------------------------------------------------------------------------------------------------


def _read(words: Sequence[str], hints: Mapping[str, Any]) -> tuple[dict[str, list[str]], list[str]]:
    """Words by the option that they belong to, with `_` for `-`, and the words that belong to none."""
    given: dict[str, list[str]] = {}
    loose: list[str] = []
    current, room = "", 0  # the option that still takes words, and how many
    for word in words:
        if word.startswith("--"):
            current, equals, value = word[2:].partition("=")
            current = current.replace("-", "_")
            given[current] = [value] if equals else []
            hint = hints.get(current, str)
            many = current.startswith("config.") or _is_list(hint)
            room = 0 if equals or hint is bool else len(words) if many else 1
        elif room:
            given[current].append(word)
            room -= 1
        else:
            loose.append(word)
    return given, loose


def _experiment(given: Mapping[str, list[str]]) -> Experiment | None:
    overrides = {name.removeprefix("config."): words for name, words in given.items() if name.startswith("config.")}
    named = given.get("config")
    return Experiment.load(" ".join(named), overrides) if named is not None else None


def _options(options: type, given: Mapping[str, list[str]], loose: list[str], also: tuple[str, ...]) -> Any:
    """A main's own options. `also` names what else it knows. Raises UserError."""
    hints = serialization.hints(options)
    positional = [name for name, hint in hints.items() if _is_positional(hint)]
    spelled = {name: name if name in positional else "--" + name.replace("_", "-") for name in hints}
    known = {name: hint for name, hint in hints.items() if name not in positional} | dict.fromkeys(also)
    found = dict(_field(name, words, known, "--") for name, words in given.items())
    for name in positional:
        if loose:
            found[name], loose = (loose, []) if _is_list(hints[name]) else (loose[:1], loose[1:])
    if loose:
        raise UserError(f"unexpected {' '.join(loose)!r}; known: --{', --'.join(known)}")
    missing = [
        spelled[field.name] for field in dataclasses.fields(options) if _required(field) and field.name not in found
    ]
    if missing:
        raise UserError(f"missing {', '.join(missing)}")
    return options(**{name: _parse(hints[name], words, spelled[name]) for name, words in found.items()})


def _required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _is_positional(hint: Any) -> bool:
    marker = typing.get_args(tyro.conf.Positional[int])[1]
    return typing.get_origin(hint) is typing.Annotated and marker in typing.get_args(hint)


def _is_list(hint: Any) -> bool:
    return typing.get_origin(hint) is tuple or any(map(_is_list, typing.get_args(hint)))


def fields(config: Any, prefix: str = "", absent: bool = False) -> dict[str, Any]:
    """Dotted names of all fields below a dataclass instance, with their types; subclasses as the instance has them.

    `absent`: those of optional groups that are not there, too; to set one makes its group.
    """
    found: dict[str, Any] = {}
    for name, hint in serialization.hints(type(config)).items():
        value = getattr(config, name)
        inside = dataclasses.is_dataclass(value)
        found |= fields(value, f"{prefix}{name}.", absent) if inside else {prefix + name: hint}
        if absent and value is None and (group := _group(hint)):
            found |= fields(group(), f"{prefix}{name}.", absent)
    return found


def _group(hint: Any) -> Any:
    """The dataclass of an optional part whose fields all have defaults; else None."""
    choices = (choice for choice in typing.get_args(hint) if dataclasses.is_dataclass(choice))
    return next((choice for choice in choices if not any(map(_required, dataclasses.fields(choice)))), None)


def _field(name: str, words: list[str], known: Mapping[str, Any], prefix: str) -> tuple[str, list[str]]:
    """The field that is meant, and its words; `no_x` is False for a switch x. Raises UserError."""
    if name in known:
        return name, words
    head, dot, last = name.rpartition(".")
    positive = head + dot + last.removeprefix("no_")
    if positive != name and known.get(positive) is bool and not words:
        return positive, ["False"]
    if inside := [other for other in known if other.startswith(name + ".")]:
        raise UserError(
            f"{prefix}{name} is a group; set a field of it: {', '.join(prefix + other for other in inside)}"
        )
    raise UserError(f"unknown {prefix}{name}{serialization.nearest(name, known, prefix)}")


def _replaced(config: Config, name: str, words: Sequence[str]) -> Config:
    """The configuration with one field set. Raises UserError."""
    known = fields(config, absent=True)
    name, words = _field(name, list(words), known, "--config.")
    value = _parse(known[name], words, f"--config.{name}")

    def put(part: Any, path: list[str]) -> Any:
        first, *rest = path
        if not rest:
            return dataclasses.replace(part, **{first: value})
        inner = getattr(part, first)
        if inner is None:
            inner = _group(serialization.hints(type(part))[first])()
        return dataclasses.replace(part, **{first: put(inner, rest)})

    return put(config, name.split("."))


def _parse(hint: Any, words: Sequence[str], where: str) -> Any:
    """Words to a value of a type. A list is written `a,b` or as several words; a bare name means True."""
    words = list(words)
    if hint is bool and not words:
        return True
    if len(words) == 1 and words[0] != "None" and _is_list(hint):
        words = [word for word in words[0].split(",") if word]
    positional: Any = tyro.conf.PositionalRequiredArgs
    flags: Any = tyro.conf.FlagConversionOff
    leaf: Any = dataclasses.make_dataclass("Leaf", [("value", positional[hint])], frozen=True)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # its own message takes several lines
            return tyro.cli(flags[leaf], args=words, console_outputs=False).value
    except (SystemExit, SystemError):  # CPython 3.11 can fail to read the sources for the message that we leave out
        raise UserError(f"{where} is {' '.join(words)!r}, expected {serialization.describe(hint)}") from None


# --- help -------------------------------------------------------------------------------------------------------------


def _show_help(words: Sequence[str], options: type, doc: str | None, takes: Takes, module: str | None) -> None:
    """All options with types, defaults and help; the configuration's too where --config is given."""
    asked = [word for word in words if word not in ("--help", "-h")]
    experiment = _experiment(_read(asked, serialization.hints(options))[0]) if takes != "options" else None
    text = [inspect.cleandoc(doc or "")]
    extra: list[Any] = []
    if takes != "options":
        text.append(f"Experiment: {_CONFIG_HELP}.")
    if experiment is not None:
        shown_config = _as_shown(experiment.config())
        extra = [("config", type(shown_config), dataclasses.field(default=shown_config))]
        if experiment.module:
            signature = inspect.signature(experiment.module.get_config, eval_str=True)
            text.append(f"{experiment.source} takes {', '.join(map(str, signature.parameters.values()))}")
        if experiment.arms:
            text.append(f"Arms: {', '.join(experiment.arms)}")
    elif takes != "options":
        text.append("With --config=... before --help: its fields, too.")
    shown = dataclasses.make_dataclass(options.__name__, extra, bases=(options,), frozen=True)
    program = module or getattr(getattr(sys.modules["__main__"], "__spec__", None), "name", None) or "ponder"
    with contextlib.suppress(SystemExit):
        tyro.cli(shown, prog=f"python -m {program}", description="\n\n".join(text), args=["--help"])


def _as_shown(part: Any) -> Any:
    """A group whose parts are declared as what it holds, not as their bases, and as nothing where they are absent."""
    values = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
    values = {name: _as_shown(value) if dataclasses.is_dataclass(value) else value for name, value in values.items()}
    absent = {name for name, hint in serialization.hints(type(part)).items() if values[name] is None and _group(hint)}
    own = [(name, type(value)) for name, value in values.items() if dataclasses.is_dataclass(value) or name in absent]
    if not own:
        return part
    return dataclasses.make_dataclass(type(part).__name__, own, bases=(type(part),), frozen=True)(**values)
