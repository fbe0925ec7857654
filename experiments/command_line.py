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
import threading
import time
import traceback
import types
import typing
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PERIOD_S = 10.0  # between two lines of progress
FAILED, REFUSED = 1, 2  # exit statuses
OURS = (str(ROOT / "mpembed_jax"), str(ROOT / "experiments"))


class Refused(ValueError):
    """A setting, or a file it names, with which the program cannot work; nothing was done."""


class Failed(RuntimeError):
    """Something that the program needs is missing, or its own check failed."""


class Stopped(Exception):
    """The user, or the system, told the program to stop, and it did so in order."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.status = 128 + number  # what a shell reports of a program that a signal ended


# --- settings


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a field of the settings takes and what its help says.

    Attributes:
      help: a sentence.
      unit: of a number; what the help shows for the value.
      at_least: the least number allowed.
      at_most: the largest number allowed.
      above: numbers must be larger than this one.
      choices: the texts allowed, where the type does not say it.
      shown: the default in words, where None stands for something.
      only: {other field: values}; the setting means something beside these values only.
      is_hidden: set by the program for the processes that it starts; not in the help.
    """

    help: str
    unit: str = ""
    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    choices: tuple[str, ...] = ()
    shown: str = ""
    only: dict[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    is_hidden: bool = False


def setting(default: Any, help: str = "", unit: str = "", **limits: Any) -> Any:
    """Returns a field of a settings dataclass; see Limits for the keyword arguments."""
    return dataclasses.field(default=default, metadata={"limits": Limits(help, unit, **limits)})


def flag_of(name: str) -> str:
    """Returns the flag of a field: batch_size is --batch-size."""
    return "--" + name.replace("_", "-")


def fields_of(settings: type) -> dict[str, tuple[dataclasses.Field, Any, Limits]]:
    """Returns {name: (field, type, limits)} of a settings dataclass."""
    hints = typing.get_type_hints(settings)
    return {
        field.name: (field, hints[field.name], field.metadata["limits"])
        for field in dataclasses.fields(settings)
    }


def _parts(hint: Any) -> tuple[Any, tuple[Any, ...], int | str | None]:
    """Splits a type into that of one value, its choices, and how many values a flag takes."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (hint,) = (part for part in typing.get_args(hint) if part is not types.NoneType)
    count: int | str | None = None
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)
        count = "+" if inner[-1] is Ellipsis else len(inner)
        hint = inner[0]
    if typing.get_origin(hint) is typing.Literal:
        choices = typing.get_args(hint)
        return type(choices[0]), choices, count
    return hint, (), count


def _listed(choices: Iterable[Any]) -> str:
    """Joins names; those of several words are quoted, as a shell needs them."""
    return ", ".join(shlex.quote(str(choice)) for choice in choices)


def allowed(hint: Any, limits: Limits) -> str:
    """Says which values a field takes, as the end of a sentence."""
    kind, choices, count = _parts(hint)
    choices = choices or limits.choices
    if choices:
        return f"{'some' if count == '+' else 'one'} of {_listed(choices)}"
    if kind not in (int, float):
        return "a path" if kind is Path else "a text"
    text = "a whole number" if kind is int else "a number"
    bounds = []
    if limits.above is not None:
        bounds.append(f"above {limits.above:,g}")
    if limits.at_least is not None:
        bounds.append(f"of at least {limits.at_least:,.15g}")
    if limits.at_most is not None:
        bounds.append(f"{'and' if bounds else 'of'} at most {limits.at_most:,.15g}")
    if count == "+":
        text += " or several, each"
    elif count is not None:
        text = f"{count} {text.removeprefix('a ')}s, each"
    return " ".join([text, *bounds])


def _reader(name: str, hint: Any, limits: Limits) -> Callable[[str], Any]:
    """Returns a function that reads one value of a flag."""
    kind, choices, _ = _parts(hint)
    choices = choices or limits.choices

    def read(text: str) -> Any:
        wrong = argparse.ArgumentTypeError(
            f"is {text or 'empty'}, but must be {allowed(hint, limits)}"
        )
        try:
            value = Path(text).expanduser() if kind is Path else kind(text)
        except (ValueError, RuntimeError):
            raise wrong from None
        is_fine = not choices or value in choices
        if kind in (int, float):
            is_fine &= math.isfinite(value)
            is_fine &= limits.at_least is None or value >= limits.at_least
            is_fine &= limits.at_most is None or value <= limits.at_most
            is_fine &= limits.above is None or value > limits.above
        if not is_fine:
            raise wrong
        return value

    return read


class _Parser(argparse.ArgumentParser):
    """argparse, whose errors are Refused."""

    def error(self, message: str) -> typing.NoReturn:
        """Raises instead of printing the usage and leaving."""
        message = message.removeprefix("argument ").replace(": ", " ", 1)
        name = message.split(" ")[0].split("/")[0]
        if message.startswith("unrecognized"):
            unknown = message.split(" ")[2]
            near = difflib.get_close_matches(unknown, self.wanted, 1)
            hint = f"; did you mean {near[0]}?" if near else "; --help lists them"
            message = f"{unknown}: there is no such setting{hint}"
        elif "expected" in message and name in self.wanted:
            message = f"{name} has too few values, but must be {self.wanted[name]}"
        raise Refused(message)


def _width() -> int:
    return min(100, max(60, shutil.get_terminal_size((100, 24)).columns))


def _formatter(prog: str) -> argparse.HelpFormatter:
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=28, width=_width())


def _default_of(default: Any, limits: Limits) -> str:
    if limits.shown or default is None or default == ():
        return limits.shown or "none"
    if isinstance(default, bool):
        return "yes" if default else "no"
    if default == limits.choices:
        return "all of them"
    if isinstance(default, tuple):
        return " ".join(map(str, default))
    if isinstance(default, int) and default >= 10_000:
        return f"{default:_}"
    return str(default)


def make_parser(settings: type, description: str, name: str) -> argparse.ArgumentParser:
    """Returns the parser of a program.

    Args:
      settings: its dataclass.
      description: the docstring of its module.
      name: its module, as `python -m` takes it.
    """
    parser = _Parser(
        prog=name,
        usage=f"python -m {name} [--setting VALUE ..]",
        description=description.strip(),
        formatter_class=_formatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.wanted = {flag_of(name): "" for name in fields_of(settings)}
    for field, (declared, hint, limits) in fields_of(settings).items():
        flag = flag_of(field)
        kind, choices, count = _parts(hint)
        text = f"{limits.help} Default: {_default_of(declared.default, limits)}."
        for other, values in limits.only.items():
            text += f" Only with {flag_of(other)} {' or '.join(map(str, values))}."
        text = argparse.SUPPRESS if limits.is_hidden else text.replace("%", "%%")
        if kind is bool:
            action: Any = argparse.BooleanOptionalAction if declared.default else "store_true"
            parser.add_argument(flag, action=action, help=text)
            continue
        unit = limits.unit or ("PATH" if kind is Path else "TEXT")
        if choices or limits.choices:
            unit = "NAME"
            listed = ", ".join(map(str, choices or limits.choices)).replace("%", "%%")
            text = (
                text if limits.is_hidden else text.replace(" Default:", f" {listed}. Default:", 1)
            )
        parser.wanted[flag] = allowed(hint, limits)
        parser.add_argument(
            flag, type=_reader(field, hint, limits), nargs=count, metavar=unit, help=text
        )
    parser.add_argument(
        "--debug",
        action="store_true",
        help="Show tracebacks, and what libraries log and warn of.",
    )
    return parser


def _joined(arguments: Iterable[str]) -> list[str]:
    """Joins a flag and a negative number after it, which argparse takes for another flag."""
    result: list[str] = []
    for word in arguments:
        is_number = re.fullmatch(r"-(\d|\.\d|inf|nan).*", word) is not None
        if is_number and result and re.fullmatch(r"--[a-z-]+", result[-1]):
            result[-1] += f"={word}"
        else:
            result.append(word)
    return result


def parse(settings: type, description: str, name: str, arguments: list[str]) -> Any:
    """Returns the settings of a command line.

    Raises:
      Refused: if a value is not allowed, or means nothing beside the others.
      SystemExit: of status 0, after --help.
    """
    parser = make_parser(settings, description, name)
    given = vars(parser.parse_args(_joined(arguments)))
    given.pop("debug", None)
    given = {key: tuple(v) if isinstance(v, list) else v for key, v in given.items()}
    chosen = settings(**given)
    for key in given:
        check_used(chosen, key)
        value = given[key]
        if isinstance(value, tuple) and _parts(typing.get_type_hints(settings)[key])[2] == "+":
            twice = next((v for at, v in enumerate(value) if v in value[:at]), None)
            if twice is not None:
                raise Refused(f"{flag_of(key)} has {twice} twice, but each value must be another")
    return chosen


def check_used(settings: Any, name: str) -> None:
    """Refuses a setting that was given although it means nothing beside the others.

    Raises:
      Refused: naming the setting beside which it would mean something.
    """
    limits = fields_of(type(settings))[name][2]
    for other, values in limits.only.items():
        if (has := getattr(settings, other)) not in values:
            wanted = " or ".join(f"{flag_of(other)} {value}" for value in values)
            raise Refused(
                f"{flag_of(name)} is {getattr(settings, name)}, but is used with {wanted} only, "
                f"and this run has {flag_of(other)} {has}"
            )


def refuse(flag: str, value: Any, wanted: str) -> typing.NoReturn:
    """Raises Refused: `flag` is `value`, but must be `wanted`."""
    raise Refused(f"{flag} is {value}, but must be {wanted}")


def check_devices(devices: int, batch: int, wanted: str = "a power of two") -> None:
    """Refuses a number of devices that is no power of two, and a batch that it does not divide.

    Raises:
      Refused: in one sentence.
    """
    if devices & (devices - 1):
        refuse("--devices", devices, wanted)
    if batch % devices:
        refuse("--batch", batch, f"a multiple of --devices {devices}")


def words_of(settings: Any, *, without: Iterable[str] = ()) -> list[str]:
    """Returns the arguments that give these settings: what differs from the defaults."""
    words: list[str] = []
    for name, (field, hint, _) in fields_of(type(settings)).items():
        value = getattr(settings, name)
        if value == field.default or name in without:
            continue
        if _parts(hint)[0] is bool:
            words.append(flag_of(name) if value else flag_of(f"no_{name}"))
        else:
            several = value if isinstance(value, tuple) else (value,)
            words += [flag_of(name), *map(str, several)]
    return words


def command_of(name: str, words: Iterable[str]) -> str:
    """Returns the line that a user types."""
    return shlex.join(["python", "-m", name, *words])


# --- files


def check_out(path: Path, *, is_file: bool = True, flag: str = "--out") -> None:
    """Tries to write where the results will go, and leaves nothing behind.

    Args:
      path: file of the results, or their folder.
      is_file: which of the two.
      flag: that named it.

    Raises:
      Refused: if it cannot be written.
    """
    wanted = "a file that can be written" if is_file else "a folder that can be written"
    if is_file and path.is_dir():
        refuse(flag, path, f"{wanted}; it is a folder")
    folder = path.parent if is_file else path
    made = [p for p in (folder, *folder.parents) if not p.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        if is_file and path.exists() and not os.access(path, os.W_OK):
            refuse(flag, path, wanted)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise Refused(f"{flag} is {path}, but must be {wanted} ({reason})") from error
    finally:
        with contextlib.suppress(OSError):
            for place in made:
                place.rmdir()


def free_memory() -> int:
    """Returns the bytes that this process can still take: the system's, or less in a container."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        free = min(free, limit - int((group / "memory.current").read_text()))
    return free


@contextlib.contextmanager
def reading(flag: str, value: Any, *errors: type[Exception]) -> Iterator[None]:
    """Turns errors of reading a user's file into Refused.

    Args:
      flag: that named the file, or the data.
      value: its value.
      errors: what to take for the file's fault.
    """
    try:
        yield
    except Refused:
        raise
    except (OSError, *errors) as error:
        text = str(error).strip() or type(error).__name__
        raise Refused(f"{flag} is {value}, which cannot be used: {text}") from error


# --- while it runs


@contextlib.contextmanager
def progress(say: Callable[[], str | None], period_s: float = PERIOD_S) -> Iterator[None]:
    """Prints what `say` returns every `period_s` seconds, from a thread.

    Nothing is printed where that is None.
    """
    is_over = threading.Event()

    def work() -> None:
        while not is_over.wait(period_s):
            if (line := say()) is not None:
                print(line, flush=True)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """Says every ten seconds what the program is at, and for how long, until it is done."""
    start = time.perf_counter()
    with progress(lambda: f".. {what}, {time.perf_counter() - start:.0f} s"):
        yield


def _quiet() -> None:
    """Shows warnings and logs of this project as one line each, and none of other libraries."""

    def show(message: Any, category: Any, filename: str, lineno: int, *rest: Any) -> None:
        if filename.startswith(OURS):
            print(f"warning: {message}", file=sys.stderr, flush=True)

    warnings.showwarning = show
    root, ours = logging.getLogger(), logging.getLogger("mpembed_jax")
    if not root.handlers:  # without any, Python prints what libraries log
        root.addHandler(logging.NullHandler())
    if not ours.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        ours.addHandler(handler)
    with contextlib.suppress(ImportError):
        absl_logging = importlib.import_module("absl.logging")
        absl_logging.set_verbosity(absl_logging.FATAL)
        absl_logging.set_stderrthreshold(absl_logging.FATAL)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Does `_quiet`, and undoes it for callers that go on, such as tests."""
    logger = logging.getLogger("mpembed_jax")
    handlers = list(logger.handlers)
    with warnings.catch_warnings():
        _quiet()
        try:
            yield
        finally:
            logger.handlers[:] = handlers


class Stop:
    """Whether the process was told to stop; see stoppable."""

    number = 0  # of the signal

    def __bool__(self) -> bool:
        return self.number != 0


@contextlib.contextmanager
def stoppable() -> Iterator[Stop]:
    """Yields a Stop, which SIGINT and SIGTERM set; a second one ends the process at once.

    Outside the main thread, which alone receives signals, nothing sets it.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    # Python runs a handler between two of its own instructions, which can be after a compilation
    # of half a minute. The number of a signal is written into the pipe at once.
    out, into = os.pipe()
    os.set_blocking(into, False)

    def listen() -> None:
        while (numbers := os.read(out, 16)) and numbers != b"\0":
            for number in numbers:
                if number not in (signal.SIGINT, signal.SIGTERM):
                    continue
                if stop:
                    os._exit(128 + number)
                stop.number = number
                print(
                    "\nstopping after this step; once more stops at once, and loses what is not "
                    "saved",
                    file=sys.stderr,
                    flush=True,
                )

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    before = [signal.signal(n, lambda *_: None) for n in (signal.SIGINT, signal.SIGTERM)]
    wakeup = signal.set_wakeup_fd(into, warn_on_full_buffer=False)
    try:
        yield stop
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(number, handler)
        os.write(into, b"\0")
        thread.join()
        os.close(into)
        os.close(out)


# --- the whole


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


def main(
    run: Callable[[Any], Any],
    settings: type,
    description: str,
    arguments: list[str] | None = None,
    *,
    check: Callable[[Any], None] | None = None,
) -> int:
    """Reads the command line, checks it and runs the program.

    Args:
      run: takes the settings.
      settings: their dataclass.
      description: the docstring of the program's module.
      arguments: of the command line; None: those of this process.
      check: takes the settings and raises Refused if they do not go together or a file is wrong.

    Returns:
      The exit status: 0; 2 where a setting or a file is refused; 1 where something failed on the
      way; 128 plus the number of the signal that stopped it.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    is_debug = "--debug" in arguments
    name = name_of(run)
    try:
        with contextlib.nullcontext() if is_debug else _quietly():
            chosen = parse(settings, description, name, arguments)
            if check is not None:
                check(chosen)
            run(chosen)
        return 0
    except Refused as error:
        failed, status, text = error, REFUSED, with_flags(str(error), settings)
    except Stopped as error:
        failed, status, text = error, error.status, str(error)
    except KeyboardInterrupt as error:
        failed, status, text = error, 128 + signal.SIGINT, "stopped"
    except (OSError, Failed) as error:
        failed, status, text = error, FAILED, str(error)
    if is_debug:
        traceback.print_exception(failed)
    print(f"{name}: {text}", file=sys.stderr, flush=True)
    return status
