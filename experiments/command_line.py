"""The command line of every experiment: settings are read, checked, refused in one sentence.

A program has a frozen dataclass of settings, whose fields are made by `setting`: help, unit and
limits stand beside the default. `main` reads the arguments, checks them before anything is trained
or written, and runs the program. What cannot be done ends it with one line that names the flag,
its value and what is allowed, and with exit status 2; `--debug` shows the traceback. It needs the
standard library alone, because the programs for a GPU must run in a plain checkout.
"""

import argparse
import contextlib
import dataclasses
import difflib
import functools
import importlib
import inspect
import logging
import math
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import traceback
import types
import typing
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from experiments import running
from experiments.running import Stopped

ROOT = Path(__file__).resolve().parents[1]
FAILED, REFUSED = 1, 2  # exit statuses


class Refused(ValueError):
    """A setting, or a file it names, with which the program cannot work; nothing was done."""


class Failed(RuntimeError):
    """Something that the program needs is missing, or its own check failed."""


# --- settings


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a field of the settings takes and what its help says."""

    help: str  # a sentence
    unit: str = ""  # of a number; the help shows it for the value
    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    choices: tuple[str, ...] = ()  # where the type does not say them
    shown: str = ""  # the default in words, where None stands for something
    # {other field: values}: the setting means something beside these values only.
    only: dict[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    is_hidden: bool = False  # set by the program for the processes that it starts


def setting(default: Any, help: str = "", unit: str = "", **limits: Any) -> Any:
    """Returns a field of a settings dataclass; see Limits for the keyword arguments."""
    return dataclasses.field(default=default, metadata={"limits": Limits(help, unit, **limits)})


def flag_of(name: str) -> str:
    """Returns the flag of a field: batch_size is --batch-size."""
    return "--" + name.replace("_", "-")


class Field(NamedTuple):
    """A field of the settings, as the command line has it."""

    flag: str
    default: Any
    kind: Any  # type of one value
    choices: tuple[Any, ...]
    count: int | str | None  # of values, as argparse says it; None: one
    limits: Limits

    def allowed(self) -> str:
        """Says which values it takes, as the end of a sentence."""
        limits = self.limits
        if self.choices:  # those of several words are quoted, as a shell needs them
            listed = ", ".join(shlex.quote(str(choice)) for choice in self.choices)
            return f"{'some' if self.count == '+' else 'one'} of {listed}"
        if self.kind not in (int, float):
            return "a path" if self.kind is Path else "a text"
        text = "a whole number" if self.kind is int else "a number"
        if self.count == "+":
            text += " or several, each"
        elif self.count is not None:
            text = f"{self.count} {text.removeprefix('a ')}s, each"
        bounds = [f"above {limits.above:,g}"] if limits.above is not None else []
        if limits.at_least is not None:
            bounds.append(f"of at least {limits.at_least:,.15g}")
        if limits.at_most is not None:
            bounds.append(f"{'and' if bounds else 'of'} at most {limits.at_most:,.15g}")
        return " ".join([text, *bounds])

    def num(self) -> str:
        """Says how many values it takes, if not any number."""
        if self.kind is bool:
            return "no value"
        return "one value" if self.count is None else f"{self.count} values"

    def read(self, text: str) -> Any:
        """Reads one value."""
        limits = self.limits
        wrong = argparse.ArgumentTypeError(f"is {text or 'empty'}, but must be {self.allowed()}")
        try:
            value = Path(text).expanduser() if self.kind is Path else self.kind(text)
        except (ValueError, RuntimeError):
            raise wrong from None
        if not text:  # as of a variable of the shell that is not set
            raise wrong
        is_fine = not self.choices or value in self.choices
        if self.kind in (int, float):
            is_fine &= math.isfinite(value)
            is_fine &= limits.at_least is None or value >= limits.at_least
            is_fine &= limits.at_most is None or value <= limits.at_most
            is_fine &= limits.above is None or value > limits.above
        if not is_fine:
            raise wrong
        return value

    def help(self) -> str:
        """Says what it is, its choices, its default and beside what it means something."""
        default, text = self.default, self.limits.shown
        if not text and default in (None, ()):
            text = "none"
        elif not text and isinstance(default, bool):
            text = "yes" if default else "no"
        elif not text and isinstance(default, tuple):
            text = "all of them" if default == self.choices else " ".join(map(str, default))
        elif not text:
            text = f"{default:_}" if isinstance(default, int) and default >= 10_000 else default
        parts = [self.limits.help, f"Default: {text}."]
        if self.choices:
            parts.insert(1, ", ".join(map(str, self.choices)) + ".")
        for other, values in self.limits.only.items():
            parts.append(f"Only with {flag_of(other)} {' or '.join(map(str, values))}.")
        return argparse.SUPPRESS if self.limits.is_hidden else " ".join(parts).replace("%", "%%")


def fields_of(settings: type) -> dict[str, Field]:
    """Returns the fields of a settings dataclass by name."""
    hints, found = typing.get_type_hints(settings), {}
    for declared in dataclasses.fields(settings):
        hint, limits = hints[declared.name], declared.metadata["limits"]
        if typing.get_origin(hint) in (typing.Union, types.UnionType):
            (hint,) = (part for part in typing.get_args(hint) if part is not types.NoneType)
        count, choices = None, limits.choices
        if typing.get_origin(hint) is tuple:
            inner = typing.get_args(hint)
            count = "+" if inner[-1] is Ellipsis else len(inner)
            hint = inner[0]
        if typing.get_origin(hint) is typing.Literal:
            choices = typing.get_args(hint)
            hint = type(choices[0])
        flag = flag_of(declared.name)
        found[declared.name] = Field(flag, declared.default, hint, choices, count, limits)
    return found


class _Parser(argparse.ArgumentParser):
    """argparse, whose errors are Refused."""

    fields: dict[str, Field]  # by flag
    words: list[str]  # that are parsed

    def error(self, message: str) -> typing.NoReturn:
        """Raises instead of printing the usage and leaving."""
        message = message.removeprefix("argument ").replace(": ", " ", 1)
        name = message.split(" ")[0].split("/")[0]
        if message.startswith("unrecognized"):
            unknown = message.split(" ")[2]
            before = self.words[: self.words.index(unknown)] if unknown in self.words else []
            flag = next((word for word in reversed(before) if word in self.fields), None)
            if unknown[:1] != "-" and flag is not None:
                raise Refused(f"{flag} has {unknown} too much: it takes {self.fields[flag].num()}")
            near = difflib.get_close_matches(unknown, self.fields, 1)
            hint = f"; did you mean {near[0]}?" if near else "; --help lists them"
            message = f"{unknown}: there is no such setting{hint}"
        elif "expected" in message and name in self.fields:
            message = f"{name} has too few values, but must be {self.fields[name].allowed()}"
        raise Refused(message)


def make_parser(settings: type, description: str, name: str) -> _Parser:
    """Returns the parser of a program: its dataclass, its module's docstring, its module."""
    width = min(100, max(60, shutil.get_terminal_size((100, 24)).columns))
    parser = _Parser(
        prog=name,
        usage=f"python -m {name} [--setting VALUE ..]",
        description=description.strip(),
        formatter_class=functools.partial(
            argparse.RawDescriptionHelpFormatter, max_help_position=28, width=width
        ),
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.fields = {field.flag: field for field in fields_of(settings).values()}
    for flag, field in parser.fields.items():
        if field.kind is bool:
            action: Any = argparse.BooleanOptionalAction if field.default else "store_true"
            parser.add_argument(flag, action=action, help=field.help())
            continue
        unit = field.limits.unit or ("PATH" if field.kind is Path else "TEXT")
        unit = "NAME" if field.choices else unit
        parser.add_argument(
            flag, type=field.read, nargs=field.count, metavar=unit, help=field.help()
        )
    debug = "Show tracebacks, and what libraries log and warn of."
    parser.add_argument("--debug", action="store_true", help=debug)
    return parser


def parse(settings: type, description: str, name: str, arguments: list[str]) -> Any:
    """Returns the settings of a command line; raises Refused, or SystemExit after --help."""
    words: list[str] = []
    for word in arguments:  # argparse takes some negative numbers for flags: join them with theirs
        is_number = re.fullmatch(r"-(\d|\.\d|inf|nan).*", word) is not None
        if is_number and words and re.fullmatch(r"--[a-z-]+", words[-1]):
            words[-1] += f"={word}"
        else:
            words.append(word)
    parser = make_parser(settings, description, name)
    parser.words = words
    given = vars(parser.parse_args(words))
    given.pop("debug", None)
    given = {key: tuple(v) if isinstance(v, list) else v for key, v in given.items()}
    chosen, fields = settings(**given), fields_of(settings)
    for key, value in given.items():
        check_used(chosen, key)
        if fields[key].count == "+":
            twice = next((v for at, v in enumerate(value) if v in value[:at]), None)
            if twice is not None:
                raise Refused(f"{flag_of(key)} has {twice} twice, but each value must be another")
    return chosen


def check_used(settings: Any, name: str) -> None:
    """Raises Refused if a setting was given that means nothing beside the others."""
    for other, values in fields_of(type(settings))[name].limits.only.items():
        if (has := getattr(settings, other)) not in values:
            wanted = " or ".join(f"{flag_of(other)} {value}" for value in values)
            raise Refused(
                f"{flag_of(name)} is {getattr(settings, name)}, but is used with {wanted} only, "
                f"and this run has {flag_of(other)} {has}"
            )


def refuse(flag: str, value: Any, wanted: str) -> typing.NoReturn:
    """Raises Refused: `flag` is `value`, but must be `wanted`."""
    raise Refused(f"{flag} is {value}, but must be {wanted}")


def check_memory(flag: str, value: int, needed: int, what: str) -> None:
    """Raises Refused if `what`, of `needed` bytes because `flag` is `value`, does not fit."""
    there = running.free_memory()
    if needed > there:
        raise Refused(
            f"{flag} is {value:,}, and {what} then take {needed / 1e9:,.1f} GB, but "
            f"{there / 1e9:,.1f} GB are free"
        )


def check_devices(devices: int, batch: int, wanted: str = "a power of two") -> None:
    """Raises Refused if `devices` is no power of two, or does not divide the batch."""
    if devices & (devices - 1):
        refuse("--devices", devices, wanted)
    if batch % devices:
        refuse("--batch", batch, f"a multiple of --devices {devices}")


def words_of(settings: Any, *, without: Iterable[str] = ()) -> list[str]:
    """Returns the arguments that give these settings: what differs from the defaults."""
    words: list[str] = []
    for name, field in fields_of(type(settings)).items():
        value = getattr(settings, name)
        if value == field.default or name in without:
            continue
        if field.kind is bool:
            words.append(flag_of(name) if value else flag_of(f"no_{name}"))
        else:
            words += [field.flag, *map(str, value if isinstance(value, tuple) else (value,))]
    return words


def command_of(name: str, words: Iterable[str]) -> str:
    """Returns the line that a user types."""
    return shlex.join(["python", "-m", name, *words])


def name_of(function: Callable) -> str:
    """Returns the module of a function as `python -m` takes it, also where it is the main one."""
    path = Path(inspect.getfile(function)).resolve()
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def with_flags(text: str, settings: type) -> str:
    """Returns a message of the library with the names of settings as flags."""
    for name in fields_of(settings):
        if "_" in name:
            text = re.sub(rf"(?<![\w.-]){name}\b(?!\()", flag_of(name), text)
    return text


# --- files


def check_out(path: Path, *, is_file: bool = True, flag: str = "--out") -> None:
    """Raises Refused unless the file of the results, or their folder, can be written."""
    wanted = "a file that can be written" if is_file else "a folder that can be written"
    folder = path.parent if is_file else path
    made: list[Path] = []
    try:
        if is_file and path.is_dir():
            refuse(flag, path, f"{wanted}; it is a folder")
        made += [p for p in (folder, *folder.parents) if not p.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        if is_file and path.exists() and not os.access(path, os.W_OK):
            refuse(flag, path, wanted)
    except OSError as error:
        refuse(flag, path, f"{wanted} ({error.strerror or type(error).__name__})")
    finally:
        with contextlib.suppress(OSError):
            for place in made:
                place.rmdir()


@contextlib.contextmanager
def reading(flag: str, value: Any, *errors: type[Exception]) -> Iterator[None]:
    """Turns OSError and `errors`, met while reading what `flag` names, into Refused."""
    try:
        yield
    except Refused:
        raise
    except (OSError, *errors) as error:
        text = str(error).strip() or type(error).__name__
        what = "not given, and its default" if value is None else f"{value}, which"
        raise Refused(f"{flag} is {what} cannot be used: {text}") from error


# --- the whole


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Shows warnings and logs of this project as one line each, and none of other libraries."""
    project = (str(ROOT / "mpembed_jax"), str(ROOT / "experiments"))

    def show(message: Any, category: Any, filename: str, lineno: int, *rest: Any) -> None:
        if filename.startswith(project):
            print(f"warning: {message}", file=sys.stderr, flush=True)

    def show_unraisable(found: Any) -> None:  # as "Event loop is closed"
        places = traceback.extract_tb(found.exc_traceback)
        is_ours = any(place.filename.startswith(project) for place in places)
        if is_ours or issubclass(found.exc_type, KeyboardInterrupt):
            before(found)

    root, ours = logging.getLogger(), logging.getLogger("mpembed_jax")
    handlers = list(ours.handlers)
    if not root.handlers:  # without any, Python prints what libraries log
        root.addHandler(logging.NullHandler())
    if not handlers:
        ours.addHandler(logging.StreamHandler())
        ours.handlers[0].setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    with contextlib.suppress(ImportError):
        absl_logging = importlib.import_module("absl.logging")
        absl_logging.set_verbosity(absl_logging.FATAL)
        absl_logging.set_stderrthreshold(absl_logging.FATAL)
    before = sys.unraisablehook
    with warnings.catch_warnings():
        warnings.showwarning, sys.unraisablehook = show, show_unraisable
        try:
            yield
        finally:  # callers may go on, such as tests
            ours.handlers[:], sys.unraisablehook = handlers, before


def main(
    run: Callable[[Any], Any],
    settings: type,
    description: str,
    arguments: list[str] | None = None,
    *,
    check: Callable[[Any], None] | None = None,
) -> int:
    """Reads the command line of this process, or `arguments`, checks it and runs the program.

    `run` takes the settings, as does `check`, which raises Refused if they do not go together or a
    file is wrong. The description is the docstring of the program's module.

    Returns:
      The exit status: 0; 2 where a setting or a file is refused; 1 where something failed on the
      way; 128 plus the number of the signal that stopped it.
    """
    is_process = arguments is None
    arguments, name = sys.argv[1:] if arguments is None else arguments, name_of(run)
    is_debug = "--debug" in arguments
    stop = running.Stop()
    try:
        with running.terminable() as stop, contextlib.nullcontext() if is_debug else _quietly():
            chosen = parse(settings, description, name, arguments)
            if check is not None:
                check(chosen)
            run(chosen)
        if is_process:
            running.leave(0)
        return 0
    except Refused as error:
        failed, status, text = error, REFUSED, with_flags(str(error), settings)
    except Stopped as error:
        failed, status, text = error, error.status, str(error)
    except KeyboardInterrupt as error:
        failed, status = error, 128 + (stop.number or signal.SIGINT)
        text = str(error) or "stopped"
    except (OSError, Failed) as error:
        failed, status, text = error, FAILED, str(error)
    if is_debug:
        traceback.print_exception(failed)
    print(f"{name}: {text}", file=sys.stderr, flush=True)
    if is_process:
        running.leave(status, failed)
    return status
