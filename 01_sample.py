"""Stage 1: import problems and teacher traces; sample a model.

    problems   a problem set or a benchmark               ->  problems rows
    teacher    a teacher's traces                         ->  samples rows, and their problems rows
    model      n samples of a model on every problem      ->  samples rows (self-distillation)

A source is a hub id or a local path: JSON Lines or one JSON array, CSV (these also as .gz), parquet
(a file or a directory), `save_to_disk`. How the columns of a known source are read is declared in
SOURCES and checked against the actual columns; nothing is guessed.

When all problems of a source end in one common text, that is its instruction: the problems are
imported without it, it is printed, and the sidecar keeps it (`instruction`). Problem + instruction
is the source's prompt, character by character; --instruction gives the stages that text.

Deliberate simplifications: a problem is identified by its text (`pid` = hash of it), so two
wordings of one problem are two problems; the order of a source is kept; teacher traces count as
finished (`finish = stop`); a response is imported as it is, but for an opening `<think>` that was
part of its prompt and is put back; a JSON array is held in memory; a stream that ends early cannot
be distinguished from a short source.

Commands (of the paper's recipe; `run_all.sh` has them all):
    python 01_sample.py problems --source HuggingFaceH4/aime_2024 --out aime24.jsonl
    python 01_sample.py teacher --source takagi97/OXA-AceReason-1.1-Math --answers boxed \\
        --model BASE --out teacher.jsonl --problems-out problems.jsonl --benchmarks aime24.jsonl
    torchrun --nproc_per_node 8 -- 01_sample.py model --problems problems.jsonl --n 8 \\
        --model deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B --out self.jsonl
"""

import common  # first: installs signal handlers, so that Ctrl-C is one line, no traceback

import csv
import decimal
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import re
import unicodedata
import zlib
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common import die
from engines import make_engine, settle_engine
from model import (add_dtype_flag, add_instruction_flag, check_instruction, check_model_dir,
                   check_positions, decode_response, encode_response, load_config, load_tokenizer,
                   model_dir, render_prompt, settle_dtype)

# -------------------------------------------------------------------- sources: which column is what


@dataclass(frozen=True)
class Source:
    """How the rows of one known source are read. All its columns are named: used, or in `unused`.

    `struct.field` names a field of a column that holds structs.
    """

    problem: str                     # text, or a chat of one user message
    answer: str | None = None        # ground truth; None: the source has none
    response: str | None = None      # a response, or a list of responses to the same problem
    unused: tuple = ()
    where: tuple = ()                # (column, value): only these rows are kept
    solution_mark: str | None = None  # `answer` holds a solution, this mark, and then the answer
    keeps_duplicates: bool = False   # a problem that stands twice is two rows, PID and PID-2
    split: str = "train"
    config: str | None = None        # of a hub data set that has several
    hub: tuple = ()                  # hub ids of this shape


VERL = ("data_source", "ability", "extra_info")    # besides `prompt` and `reward_model`
AIME_OXA = ("solution", "aime_number", "difficulty", "problem_number", "year")
MATHARENA = ("MathArena/brumo_2025", "MathArena/cmimc_2025", "MathArena/hmmt_feb_2025")
MATH500 = ("solution", "subject", "level", "unique_id")

SOURCES = {
    # teacher traces
    "acereason": Source("input", response="output", unused=("source",), where=("category", "math"),
                        hub=("nvidia/AceReason-1.1-SFT",)),
    "oxa": Source("query", response="DeepSeek-R1_Response_List",
                  hub=("takagi97/OXA-AceReason-1.1-Math",)),
    "oxa_answer": Source("query", "answer", "DeepSeek-R1_Response_List"),
    # problems whose solutions are traces
    "gsm8k": Source("question", "answer", "answer", solution_mark="####", config="main",
                    hub=("openai/gsm8k",)),
    # RLVR prompts. The authors' file is a finished training set of 9,998 rows: all are kept,
    # although 181 repeat a problem (A5).
    "oxa_rl": Source("prompt", "reward_model.ground_truth", unused=(*VERL, "prompt_token_len"),
                     keeps_duplicates=True),
    "verl": Source("prompt", "reward_model.ground_truth", unused=VERL),
    "deepscaler": Source("problem", "answer", unused=("solution",),
                         hub=("agentica-org/DeepScaleR-Preview-Dataset",)),
    # benchmarks, as they are on the hub and (oxa_) as the authors ship them
    "aime24": Source("problem", "answer", unused=("id", "solution", "url", "year"),
                     hub=("HuggingFaceH4/aime_2024",)),
    "oxa_aime24": Source("problem", "answer", unused=AIME_OXA),
    "aime25": Source("problem", "answer", unused=("id",), split="test", hub=("math-ai/aime25",)),
    "oxa_aime25": Source("problem", "answer",
                         unused=("id", "solution", "url", "year", "__index_level_0__")),
    "matharena": Source("problem", "answer", unused=("problem_idx", "problem_type"), hub=MATHARENA),
    "minerva": Source("question", "answer", split="test", hub=("math-ai/minervamath",)),
    "oxa_minerva": Source("problem", "answer", unused=("solution", "idx", "type")),
    "math500": Source("problem", "answer", unused=MATH500, split="test",
                      hub=("HuggingFaceH4/MATH-500",)),
    # this project's own rows; the pid is kept
    "problems": Source("problem", "answer", unused=("pid", "source")),
}


def column_of(name, columns=()):
    """The column that holds `name`: itself, or the struct of `struct.field`."""
    return name if name in columns else name.partition(".")[0]


def used_columns(source, columns=()):
    names = [source.problem, source.answer, source.response, *source.where[:1]]
    return {column_of(name, columns) for name in names if name is not None}


def all_columns(source):
    return used_columns(source) | set(source.unused)


def named_source(args):
    """What --columns says: the user named what to use, the other columns are ignored."""
    named = {}
    for pair in args.columns:
        key, _, column = pair.partition("=")
        named[key] = column
    if "problem" not in named or not all(named.values()) \
            or not set(named) <= {"problem", "answer", "response"}:
        die("--columns takes problem=COLUMN [answer=COLUMN] [response=COLUMN], not "
            + " ".join(args.columns))
    return Source(**named)


def declared_name(args, row):
    """The name in SOURCES by --format, by hub id, else by the columns of the first row."""
    if args.format:
        return args.format
    for name, source in SOURCES.items():
        if args.source in source.hub:
            return name
    for name, source in SOURCES.items():
        mark = source.solution_mark       # gsm8k and minerva differ in what their answers hold
        if set(row) == all_columns(source) and (mark is None or mark in str(row[source.answer])):
            return name
    known = [f"{name}: {', '.join(sorted(all_columns(s)))}" for name, s in SOURCES.items()]
    die(f"{args.source} has the columns {sorted(row)}, which is no declared source "
        f"({'; '.join(known)}); name them with --columns problem=COLUMN ...")


def choose_source(args, row):
    """How `--source` is to be read, held against the columns of its first row. -> Source"""
    name = "--columns" if args.columns else declared_name(args, row)
    source = named_source(args) if args.columns else SOURCES[name]
    missing = used_columns(source, row) - set(row)
    unknown = set(row) - all_columns(source)
    there = f"{args.source} has the columns {sorted(row)}; read as {name} it"
    if missing:
        die(f"{there} lacks {sorted(missing)}")
    if unknown and not args.columns:
        die(f"{there} should not have {sorted(unknown)}: look at them, then name the columns to "
            "use with --columns problem=COLUMN [answer=COLUMN] [response=COLUMN]")
    print(f"{args.source}: read as {name} (problem = {source.problem}, answer = {source.answer}, "
          f"response = {source.response})", flush=True)
    return source


# -------------------------------------------------------- files: (where it stands, row), one by one


def parse_json(data, where):
    try:
        return json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        die(f"{where}: not valid JSON ({error}); mend or remove it")


def json_rows(path, file):
    """JSON Lines, or one JSON array: the first character tells."""
    first = file.readline()
    if first.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        rows = parse_json(first + file.read(), path)
        for number, row in enumerate(rows, 1):
            yield f"{path}, row {number}", row
        return
    for number, line in enumerate(itertools.chain([first], file), 1):
        if line.strip():
            yield f"{path}:{number}", parse_json(line, f"{path}:{number}")


def csv_rows(path, file):
    csv.field_size_limit(2**31 - 1)
    lines = io.TextIOWrapper(file, "utf-8-sig", newline="")
    reader = csv.DictReader(lines, strict=True)
    names = reader.fieldnames or []
    if len(set(names)) < len(names):
        die(f"{path}:1: a column is named twice: {names}")
    for row in reader:
        if None in row or None in row.values():  # cells without a name, names without a cell
            die(f"{path}:{reader.line_num}: not the {len(names)} cells that the header names")
        yield f"{path}:{reader.line_num}", row


def parquet_rows(path, file):
    import pyarrow.parquet
    number = 0
    for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=256):
        for row in batch.to_pylist():
            number += 1
            yield f"{path}, row {number}", row


READERS = {".jsonl": json_rows, ".json": json_rows, ".csv": csv_rows, ".parquet": parquet_rows}
KNOWN_FORMATS = ".jsonl, .json, .csv, each also as .gz, and .parquet"


def file_rows(path):
    """The rows of one file, read by its suffix."""
    zipped = path.suffix == ".gz"
    suffix = Path(path.stem).suffix if zipped else path.suffix
    reader = READERS.get(suffix)
    if reader is None or (zipped and reader is parquet_rows):
        name = suffix + (".gz" if zipped else "") or "a name without a suffix"
        die(f"{path}: {name} is not a format that is read (known: {KNOWN_FORMATS})")
    try:
        with gzip.open(path) if zipped else open(path, "rb") as file:
            yield from reader(path, file)
    except (OSError, ValueError, EOFError, zlib.error, csv.Error) as error:
        die(f"{path} cannot be read as {suffix}: {error}")


def directory_rows(args, path, split):
    """A `save_to_disk` directory, or one of parquet files (of the split, if they are named so)."""
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        return saved_rows(path, split)
    files = sorted(path.rglob("*.parquet"))
    if not files:
        die(f"{path} is neither a `save_to_disk` directory nor a directory of parquet files")
    folders = sorted({str(file.parent) for file in files})
    if len(folders) > 1:
        die(f"{path} has parquet files in several directories; name one: {', '.join(folders)}")
    of_split = [file for file in files if re.match(rf"{re.escape(split)}\b", file.name)]
    if args.split and not of_split:
        die(f"{path} has no parquet file of the split {split}")
    return itertools.chain.from_iterable(file_rows(file) for file in of_split or files)


def numbered(source, rows):
    for number, row in enumerate(rows, 1):
        yield f"{source}, row {number}", row


def saved_rows(path, split):
    from datasets import load_from_disk  # takes seconds to import: only where it is needed
    try:
        saved = load_from_disk(str(path))
    except (OSError, ValueError) as error:
        die(f"{path} cannot be read: {str(error).splitlines()[0]}")
    if hasattr(saved, "keys"):
        if split not in saved:
            die(f"{path} has the splits {sorted(saved)}, not {split} (--split)")
        saved = saved[split]
    return numbered(path, saved)


def hub_rows(args, declared, split):
    from datasets import load_dataset
    config = declared.config if declared else None
    try:
        rows = load_dataset(args.source, config, split=split, streaming=True)
    except (OSError, ValueError) as error:  # not found, no network, no such split: it says which
        die(f"{args.source} cannot be opened: {str(error).splitlines()[0]}")
    return numbered(args.source, rows)


def open_rows(args):
    """Stream the rows of `--source`. -> iterator of (where the row stands, {column: value})."""
    path = Path(args.source)
    declared = None
    for source in SOURCES.values():
        if args.source in source.hub:
            declared = source
    split = args.split or (declared.split if declared else "train")
    if path.is_file():
        return file_rows(path)
    if path.is_dir():
        return directory_rows(args, path, split)
    is_hub_id = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", args.source)
    if not is_hub_id or path.suffix in (*READERS, ".gz"):
        die(f"{args.source}: no such file or directory, and not a hub id")
    return hub_rows(args, declared, split)


# ---------------------------------------------------------------- a row: problem, answer, responses


@dataclass
class Item:
    """One row of a source. No answer: None; several: any of them is right."""

    pid: str
    problem: str
    answer: str | list | None
    responses: list = field(default_factory=list)


def problem_id(text):
    """Stable id of a problem: hash of its text, Unicode-normalised, white space collapsed."""
    text = " ".join(unicodedata.normalize("NFKC", text).split())
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def cell(row, name, where):
    """The value of a column, or of a struct's field (`struct.field`)."""
    if name in row:
        return row[name]
    column, _, key = name.partition(".")
    struct = row.get(column)
    if not isinstance(struct, dict) or key not in struct:
        die(f"{where}: no column {name}; the row has {sorted(row)}")
    return struct[key]


def check_text(text, where, column):
    """`text`, which must be text that can be written."""
    if not isinstance(text, str):
        die(f"{where}: {column} is {describe(text)}, text is expected")
    try:
        text.encode()
    except UnicodeEncodeError:
        die(f"{where}: {column} holds half a character (a lone surrogate); mend or remove this row")
    return text


def describe(value):
    """What a value is, for a message."""
    if isinstance(value, dict):
        return f"a struct with the fields {sorted(value)} (name one: COLUMN.FIELD)"
    kinds = {list: "a list", bool: "true or false", int: "a number", float: "a number"}
    return kinds.get(type(value), "null" if value is None else f"a {type(value).__name__}")


def problem_text(value, where, column):
    """Text, or the content of a chat's one user message; null is an empty problem."""
    if isinstance(value, list) and all(isinstance(message, dict) for message in value):
        roles = [message.get("role") for message in value]
        if roles != ["user"]:
            die(f"{where}: {column} is a chat of {roles}; one user message is expected")
        value = value[0].get("content")
    return "" if value is None else check_text(value, where, column)


# What tables write where there is nothing.
NO_ANSWER = ("", "nan", "null", "<na>", "n/a", "#n/a", "inf", "+inf", "-inf")


def answer_text(value, where, column):
    """One ground truth as text, stripped; None where there is none. Numbers are written out."""
    if value is None:
        return None
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        value = int(value) if value.is_integer() else format(decimal.Decimal(repr(value)), "f")
    if isinstance(value, (int, decimal.Decimal)) and not isinstance(value, bool):
        value = str(value)
    text = check_text(value, where, column).strip()
    return None if text.lower() in NO_ANSWER else text


def clean_answer(value, where, column):
    """Ground truth as text, or a list of texts (any of them is right); None where there is none."""
    if not isinstance(value, list):
        return answer_text(value, where, column)
    answers = []
    for alternative in value:
        if isinstance(alternative, list):
            die(f"{where}: {column} is a list of lists; one list of alternatives is expected")
        answers.append(answer_text(alternative, where, column))
    return [answer for answer in answers if answer is not None] or None


def response_texts(value, where, column):
    """The responses of a row; null and blank ones are kept as "" and counted by who reads them."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    texts = ["" if text is None else check_text(text, where, column) for text in values]
    return [text if text.strip() else "" for text in texts]


def split_solution(text, mark, where):
    """GSM8K's column: steps with calculator marks `<<2*3=6>>`, `#### ANSWER`. -> (trace, answer)

    The trace has the form that our instruction asks for: the steps in <think>, the answer in a box.
    """
    if text.count(mark) != 1:
        die(f"{where}: {mark} must stand once in the answer, between solution and result")
    steps, answer = text.split(mark)
    steps = re.sub(r"<<.*?>>", "", steps).strip()
    return f"<think>\n{steps}\n</think>\n\n\\boxed{{{answer.strip()}}}", answer


def read_item(source, row, where):
    """One row by its declared columns. -> Item, with the pid of its own or none yet."""
    problem = problem_text(cell(row, source.problem, where), where, source.problem)
    answer = cell(row, source.answer, where) if source.answer else None
    responses = cell(row, source.response, where) if source.response else []
    if source.solution_mark:
        solution = check_text(answer, where, source.answer)
        responses, answer = split_solution(solution, source.solution_mark, where)
    pid = ""
    if source is SOURCES["problems"]:
        pid = check_text(cell(row, "pid", where), where, "pid")
        if not pid.strip():
            die(f"{where}: pid is empty")
    answer = clean_answer(answer, where, source.answer)
    return Item(pid, problem, answer, response_texts(responses, where, source.response))


def read_items(source, rows):
    for where, row in rows:
        if not isinstance(row, dict):
            die(f"{where}: a row must be a JSON object")
        if source.where and cell(row, source.where[0], where) != source.where[1]:
            continue
        yield read_item(source, row, where)


# ---------------------------------------------------------------------------------- the instruction

LOOK_AHEAD = 256  # items in which the common text is looked for; the others are held to it
ABOUT_THE_ANSWER = ("\\boxed", "<think>", "####", "answer", "step by step")


def find_instruction(problems):
    """The text that all problems end in, "" if there is none.

        "… is isosceles? \\nLet's reason … \\boxed{answer here}."      \\  all end in
        "… triples exist? \\nLet's reason … \\boxed{answer here}."     /  "? \\nLet's reason …";
                                                     the instruction is "\\nLet's reason …"

    It begins at a line break, or else with a sentence, and speaks of the answer: "Find x." may end
    every problem of a set and belong to each.
    """
    texts = {text for text in problems if text.strip()}
    if len(texts) < 2:
        return ""
    backwards = [text[::-1] for text in texts]
    ending = os.path.commonprefix(backwards)[::-1]
    start = re.search(r"\n", ending) or re.search(r"(?:^|(?<=[.?!]))\s+(?=[A-Z])", ending)
    instruction = ending[start.start():] if start else ""
    speaks_of_it = any(word in instruction.lower() for word in ABOUT_THE_ANSWER)
    return instruction if speaks_of_it and len(instruction) > 20 else ""


def without_instruction(args, items, instruction):
    """Items whose problems are given without the instruction, and with their pid."""
    for number, item in enumerate(items, 1):
        problem = item.problem
        if problem and not problem.endswith(instruction):
            die(f"{args.source}: problem {number} does not end as the first {LOOK_AHEAD} do "
                f"({instruction!r}); --keep-instruction leaves that text in all")
        problem = problem.removesuffix(instruction)
        yield replace(item, problem=problem, pid=item.pid or problem_id(problem))


def read_source(args):
    """Read `--source` by its declared columns. -> (Source, instruction or "", iterator of Item)."""
    rows = open_rows(args)
    where, first = next(rows, (None, None))
    if where is None:
        die(f"{args.source} has no rows")
    if not isinstance(first, dict):
        die(f"{where}: a row must be a JSON object")
    source = choose_source(args, first)
    items = read_items(source, itertools.chain([(where, first)], rows))
    head = list(itertools.islice(items, LOOK_AHEAD))
    instruction = ""
    if not args.keep_instruction and source is not SOURCES["problems"]:
        instruction = find_instruction(item.problem for item in head)
    if instruction:
        print(f"{args.source}: all problems end in one text, which is taken as the instruction and "
              f"left out of the problems (--keep-instruction leaves it in): {instruction!r}",
              flush=True)
    return source, instruction, without_instruction(args, itertools.chain(head, items), instruction)


# ------------------------------------------------------------------------------------ contamination


class Overlap:
    """Which benchmark problem shares an n-gram of words with a text, if any (A2).

    An n-gram that stands in `boilerplate` benchmark problems or more ("where m and n are relatively
    prime positive integers, find m + n") identifies none of them and is no evidence (A3). A
    benchmark problem shorter than n words is only met by a text with exactly its words.
    """

    def __init__(self, paths, n, boilerplate):
        self.n = n
        self.n_problems = Counter()  # of each benchmark
        self.dropped = []
        holders = {}  # n-gram -> {(benchmark, pid)} that hold it
        for path in paths:
            benchmark = Path(path).stem
            for row in common.read_jsonl(path, {"pid": str, "problem": str}, key="pid"):
                self.n_problems[benchmark] += 1
                for gram in self.grams(row["problem"]):
                    holders.setdefault(gram, set()).add((benchmark, row["pid"]))
        self.boilerplate = {}  # n-gram -> how many problems hold it
        self.holder = {}  # n-gram -> the first (benchmark, pid) of those that hold it
        for gram, problems in holders.items():
            if boilerplate and len(problems) >= boilerplate:
                self.boilerplate[gram] = len(problems)
            else:
                self.holder[gram] = min(problems)

    def grams(self, text):
        words = re.findall(r"\w+", unicodedata.normalize("NFKC", text).lower())
        last = max(1, len(words) - self.n + 1)
        return [" ".join(words[i:i + self.n]) for i in range(last)]

    def hit(self, pid, text):
        """True, and on record, if `text` overlaps a benchmark."""
        for gram in self.grams(text):
            if gram in self.holder:
                benchmark, bench_pid = self.holder[gram]
                found = {"pid": pid, "benchmark": benchmark, "bench_pid": bench_pid, "ngram": gram}
                self.dropped.append(found)
                return True
        return False

    def report(self, path):
        """Write every dropped problem with its n-gram to `path`, and print the counts."""
        n_dropped = Counter(row["benchmark"] for row in self.dropped)
        met = {(row["benchmark"], row["bench_pid"]) for row in self.dropped}
        n_met = Counter(benchmark for benchmark, _ in met)
        benchmarks, parts = {}, []
        for name, n in self.n_problems.items():
            benchmarks[name] = {
                "n_problems": n,
                "n_found_in_training": n_met[name],
                "n_training_dropped": n_dropped[name],
            }
            parts.append(f"{name} {n_dropped[name]} (of its {n} problems {n_met[name]} are met)")
        boilerplate = sorted(self.boilerplate.items(), key=lambda item: (-item[1], item[0]))
        body = {
            "n": self.n,
            "n_dropped": len(self.dropped),
            "benchmarks": benchmarks,
            "boilerplate": dict(boilerplate),
            "most_frequent": Counter(row["ngram"] for row in self.dropped).most_common(20),
            "dropped": self.dropped,
        }
        with common.replace_file(path) as file:
            json.dump(body, file, indent=1, ensure_ascii=False)
        print(f"contamination ({self.n}-gram): {len(self.dropped)} training problems dropped; "
              f"{', '.join(parts)}; {len(self.boilerplate)} boilerplate n-grams ignored; "
              f"all in {path}", flush=True)


def make_overlap(args):
    return Overlap(args.benchmarks, args.ngram, args.boilerplate) if args.benchmarks else None


def report_overlap(overlap, out):
    if overlap:
        overlap.report(Path(out).with_suffix(".contamination.json"))


# ---------------------------------------------------------------------- problems and teacher traces


def source_name(args):
    """The `source` field of rows: --name, or the last part of hub id or path, in lower case."""
    name = Path(args.source).name
    for suffix in (".gz", *READERS):
        name = name.removesuffix(suffix)
    return args.name or name.lower()


def problem_row(item, source):
    return {"pid": item.pid, "problem": item.problem, "answer": item.answer, "source": source}


def sample_row(pid, source, k, seed, response, n_tokens, finish):
    return {"sid": f"{pid}:{source}:{k}", "pid": pid, "source": source, "k": k, "seed": seed,
            "response": response, "n_tokens": n_tokens, "finish": finish}


def write_rows(path, rows):
    with common.replace_file(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def say(what, counts):
    print(f"{what}: " + ", ".join(f"{value:,} {key}" for key, value in counts.items()), flush=True)


def usable_items(items, counts):
    """The items that have a problem and an answer; all are counted."""
    for item in items:
        counts["rows"] += 1
        if not item.problem.strip():
            counts["empty problems"] += 1
        elif item.answer is None:
            counts["without an answer"] += 1
        else:
            yield item


def problems(args):
    """One row per distinct problem that has an answer, in the order of the source.

    A source that keeps its duplicates (SOURCES) gives a row for each: PID, PID-2, PID-3, ...
    """
    inputs = [args.source, *(args.benchmarks or [])]
    common.claim_output(args.out, inputs)
    source, instruction, items = read_source(args)
    if source.answer is None:
        die(f"{args.source} has no ground truth; `teacher --problems-out` makes its problems")
    overlap = make_overlap(args)
    counts = Counter()
    times = Counter()                  # pid -> how often it has been seen
    firsts = {}                        # pid -> the first row of this problem
    rows = {}                          # pid -> the row that is kept
    for item in usable_items(items, counts):
        times[item.pid] += 1
        if times[item.pid] == 1:
            firsts[item.pid] = problem_row(item, source_name(args))
        else:
            count_duplicate(args, source, item, firsts[item.pid], counts)
            if not source.keeps_duplicates:
                continue
            item = replace(item, pid=f"{item.pid}-{times[item.pid]}")
        if overlap and overlap.hit(item.pid, item.problem):
            counts["contaminated"] += 1
            continue
        rows[item.pid] = problem_row(item, source_name(args))
    if args.limit and len(rows) > args.limit:
        counts["over --limit"] = len(rows) - args.limit
        rows = choose_subset(rows, args.limit, args.seed)
    counts["kept"] = len(rows)
    if not rows:
        die(f"{args.source}: no usable problem ({dict(counts)})")
    common.write_meta(args.out, "problems", args, inputs, rows=None)      # unfinished, until below
    write_rows(args.out, rows.values())
    report_overlap(overlap, args.out)
    found = {"counts": counts, "instruction": instruction or None}
    common.write_meta(args.out, "problems", args, inputs, len(rows), **found)
    say(args.out, counts)


def count_duplicate(args, source, item, first, counts):
    """Count a row whose problem has been seen. Two problems under one pid are refused."""
    if problem_id(item.problem) != problem_id(first["problem"]):
        die(f"{args.source}: the pid {item.pid} stands for two problems; each needs its own")
    fate = "kept" if source.keeps_duplicates else "dropped"
    counts[f"duplicates ({fate})"] += 1
    counts["duplicates with another answer"] += item.answer != first["answer"]


def choose_subset(rows, n, seed):
    """`n` of the rows, in their order: which ones depends on the seed and the problems alone."""
    shuffled = sorted(rows, key=lambda pid: common.request_seed(seed, pid))
    chosen = set(shuffled[:n])
    return {pid: row for pid, row in rows.items() if pid in chosen}


def restore_think(text):
    """A response whose opening `<think>` was part of the prompt gets it back (A7)."""
    return text if text.lstrip().startswith("<think>") else "<think>\n" + text


def known_answers(args, source):
    """{pid: answer} of --problems for `--answers join`, empty for the other ways."""
    if args.answers == "join":
        if not args.problems:
            die("--answers join needs --problems (rows with pid and answer)")
        fields = {"pid": str, "answer": (str, list)}
        rows = common.read_jsonl(args.problems, fields, key="pid")
        return {row["pid"]: row["answer"] for row in rows}
    if args.answers == "column" and source.answer is None:
        die(f"{args.source} has no column of answers: give --answers join --problems P.jsonl, or, "
            "if all its responses are known to be right, --answers boxed")
    return {}


def boxed_answer(responses):
    """The boxed answer of the first response that has one (A1), None if none has."""
    from grading.verifier import verify  # mpmath takes a second to import: only where it is needed
    for response in responses:
        predicted = verify(response, "0").predicted
        if predicted:
            return predicted
    return None


def with_answers(args, items, known):
    """Items with the ground truth of --answers: the column's, one of --problems, or a boxed one."""
    for item in items:
        if args.answers == "join":
            item = replace(item, answer=known.get(item.pid))
        elif args.answers == "boxed":
            item = replace(item, answer=boxed_answer(item.responses))
        yield item


def whole_responses(item, counts):
    """The responses of an item, with their opening <think>; blank ones are counted and left out."""
    if not any(item.responses):
        counts["rows without a response"] += 1
    for text in item.responses:
        if not text:
            counts["empty responses"] += 1
            continue
        response = restore_think(text)
        counts["responses"] += 1
        counts["responses given their <think> back"] += response != text
        yield response


def teacher(args):
    """One samples row per response of a problem that has an answer and overlaps no benchmark."""
    inputs = [args.source, *(args.benchmarks or []), *([args.problems] if args.problems else [])]
    common.claim_output(args.out, inputs)
    if args.problems_out:
        common.claim_output(args.problems_out, inputs)
    source, instruction, items = read_source(args)
    if source.response is None:
        die(f"{args.source} has no responses")
    items = with_answers(args, items, known_answers(args, source))
    tokenizer = load_tokenizer(args.model)
    overlap = make_overlap(args)
    name = source_name(args)
    common.start_output(args.out, "samples", args, inputs)
    written, writer = common.append_jsonl(args.out, "sid")
    counts = Counter()
    n_responses = Counter()            # pid -> responses so far
    kept = {}                          # pid -> its problems row, None if it overlaps a benchmark
    with writer:
        for item in usable_items(items, counts):
            pid = item.pid
            if args.limit and len(kept) == args.limit and pid not in kept:
                break
            if pid not in kept:
                contaminated = overlap is not None and overlap.hit(pid, item.problem)
                counts["contaminated problems"] += contaminated
                kept[pid] = None if contaminated else problem_row(item, name)
            if kept[pid] is None:
                continue
            for response in whole_responses(item, counts):
                n_tokens = len(encode_response(tokenizer, response))
                row = sample_row(pid, name, n_responses[pid], None, response, n_tokens, "stop")
                n_responses[pid] += 1
                if row["sid"] not in written:
                    writer.write(row)
    if not counts["responses"]:
        die(f"{args.source}: no usable response ({dict(counts)})")
    problem_rows = [row for row in kept.values() if row is not None]
    counts["problems"] = len(problem_rows)
    found = {"counts": counts, "instruction": instruction or None}
    if args.problems_out:
        common.write_meta(args.problems_out, "problems", args, inputs, rows=None)
        write_rows(args.problems_out, problem_rows)
        common.write_meta(args.problems_out, "problems", args, inputs, len(problem_rows), **found)
    report_overlap(overlap, args.out)
    common.write_meta(args.out, "samples", args, inputs, counts["responses"], **found)
    say(args.out, counts)


# ---------------------------------------------------------------------------- a model's own samples


def read_prompts(args, tokenizer):
    """({pid: token ids of its prompt}, how many are too long) of the first --limit problems."""
    prompts, n_too_long = {}, 0
    for row in common.read_jsonl(args.problems, {"pid": str, "problem": str}, key="pid"):
        if args.limit and len(prompts) == args.limit:
            break
        prompt = render_prompt(tokenizer, row["problem"], args.instruction)
        if len(prompt) > args.max_prompt_tokens:
            n_too_long += 1
        else:
            prompts[row["pid"]] = prompt
    if not prompts:
        die(f"{args.problems}: every prompt is longer than --max-prompt-tokens "
            f"{args.max_prompt_tokens}")
    return prompts, n_too_long


def model_samples(args):
    """`--n` samples of every problem, split over the ranks; a restart draws what is missing."""
    dist = common.init_distributed(patience_hours=24)    # a rank may draw for hours after another
    settle_dtype(args, dist.device)
    settle_engine(args)
    check_model_dir(args.model)
    tokenizer = load_tokenizer(args.model, any_markup=True)
    check_instruction(args.model, args.instruction)
    prompts, n_too_long = read_prompts(args, tokenizer)
    longest = max(len(prompt) for prompt in prompts.values()) + args.max_tokens
    check_positions(load_config(args.model), longest, "the longest prompt with --max-tokens")

    requests = {}                                        # sid -> (pid, k), in the output's order
    for pid in prompts:
        for k in range(args.n):
            requests[f"{pid}:{args.name}:{k}"] = (pid, k)
    place = {sid: i for i, sid in enumerate(requests)}
    if dist.rank == 0:
        inputs = [args.problems, model_dir(args.model)]
        common.start_output(args.out, "samples", args, inputs, ("kv_cache_gb", "gpu_memory"))
        common.merge_parts(args.out, "sid", place.__getitem__)       # what a killed run left
    common.barrier()
    done = common.stored_keys(args.out, "sid")
    if dist.rank == 0:
        print(f"{len(prompts)} problems x {args.n} samples, {len(done)} of them there; "
              f"{n_too_long} problems dropped whose prompt is over {args.max_prompt_tokens} tokens",
              flush=True)

    missing = [request for sid, request in requests.items() if sid not in done]
    mine = missing[dist.rank::dist.world]
    n_failed = draw(args, dist, tokenizer, mine, prompts, longest) if mine else 0
    n_failed = int(common.all_reduce_sum(torch.tensor(n_failed, device=dist.device)))
    if dist.rank == 0:
        common.merge_parts(args.out, "sid", place.__getitem__)
        if not common.stored_keys(args.out, "sid"):
            die(f"{args.out}: every request failed ({n_failed})")
        finish_samples(args, n_failed=n_failed, n_prompts_too_long=n_too_long)
    common.barrier()


def draw(args, dist, tokenizer, mine, prompts, longest):
    """Generate the requests `mine`, [(pid, k)], into this rank's part. -> how many failed."""
    engine = make_engine(args.engine, args.model, longest, device=dist.device, dtype=args.dtype,
                         gpu_memory=args.gpu_memory, kv_cache_gb=args.kv_cache_gb)
    prompt_ids = [prompts[pid] for pid, _ in mine]
    seeds = [common.request_seed(args.seed, pid, k) for pid, k in mine]
    # The `<think>` with which some templates open the answer belongs to the response.
    opened = tokenizer.decode(prompt_ids[0]).rstrip().endswith("<think>")
    sampling = (args.temperature, args.top_p, args.max_tokens)
    n_failed = 0
    _, writer = common.append_jsonl(common.part_path(args.out, dist.rank), "sid")
    with writer, tqdm(total=len(mine), disable=dist.rank > 0) as progress:
        for i, completion in engine.generate(prompt_ids, seeds, *sampling, progress):
            if completion.finish not in ("stop", "length"):
                n_failed += 1
                continue
            pid, k = mine[i]
            text = decode_response(tokenizer, completion.ids)
            response = restore_think(text) if opened else text
            writer.write(sample_row(pid, args.name, k, seeds[i], response, len(completion.ids),
                                    completion.finish))
    return n_failed


def finish_samples(args, **counts):
    """The finished output: its sidecar, and what is in it."""
    finish, n_tokens = Counter(), []
    for row in common.read_jsonl(args.out, {"finish": str, "n_tokens": int}):
        finish[row["finish"]] += 1
        n_tokens.append(row["n_tokens"])
    found = {"model": args.model, "finish": finish, **counts}
    inputs = [args.problems, model_dir(args.model)]
    common.write_meta(args.out, "samples", args, inputs, len(n_tokens), **found)
    say(args.out, {"samples": len(n_tokens), **finish, **counts})
    low, median, high, top = np.quantile(n_tokens, [0, 0.5, 0.9, 1]).astype(int)
    print(f"tokens a sample: min {low}, median {median}, 90 % {high}, max {top}", flush=True)


# ------------------------------------------------------------------------------------- command line


def add_source_flags(add):
    add("--source", required=True, help=f"hub id, or local path ({KNOWN_FORMATS}; save_to_disk)")
    add("--format", choices=sorted(SOURCES), help="declared columns; default: by hub id or columns")
    add("--columns", nargs="+", metavar="FIELD=COLUMN",
        help="for a source that is not declared: problem=COLUMN [answer=COLUMN] [response=COLUMN], "
             "COLUMN.FIELD for a struct; other columns are ignored")
    add("--split", help="split of the source; default: the declared one, else train")
    add("--name", help="`source` of the rows; default: last part of --source")
    add("--limit", type=int, default=0, help="at most this many problems; 0: all")
    add("--keep-instruction", action="store_true",
        help="leave a text that all problems end in where it is")


def add_overlap_flags(add):
    add("--benchmarks", nargs="+", metavar="JSONL",
        help="problems rows; training problems that overlap them are dropped and reported")
    add("--ngram", type=int, default=13, help="words of an n-gram")
    add("--boilerplate", type=int, default=3,
        help="an n-gram in so many benchmark problems or more is no evidence; 0: every n-gram is")


def add_problems_flags(add):
    add_source_flags(add)
    add_overlap_flags(add)
    add("--seed", type=int, default=42, help="chooses the subset of --limit")
    add("--out", required=True, metavar="JSONL", help="problems rows")


def add_teacher_flags(add):
    add_source_flags(add)
    add_overlap_flags(add)
    add("--model", required=True, help="directory or hub id whose tokenizer counts n_tokens")
    add("--answers", choices=("column", "join", "boxed"), default="column",
        help="ground truth: a column of the source; joined by problem text from --problems; or the "
             "boxed answer of the first response (only if all responses are known to be right)")
    add("--problems", metavar="JSONL", help="problems rows for --answers join")
    add("--problems-out", metavar="JSONL", help="problems rows of the imported responses")
    add("--out", required=True, metavar="JSONL", help="samples rows")
    common.add_force_flag(add)


def add_model_flags(add):
    add("--model", required=True, help="directory or hub id")
    add("--problems", required=True, metavar="JSONL", help="problems rows")
    add_instruction_flag(add)
    add("--n", type=int, default=8, help="samples per problem")
    add("--temperature", type=float, default=0.6, help="sampling temperature; 0: greedy")
    add("--top-p", type=float, default=0.95, help="nucleus")
    add("--max-tokens", type=int, default=25000,
        help="tokens of a response; one that is longer is cut and marked finish = length")
    add("--max-prompt-tokens", type=int, default=1536,
        help="problems with a longer prompt are dropped and counted")
    add("--seed", type=int, default=42, help="request seed = hash(seed, pid, k)")
    add("--name", default="self", help="`source` of the rows")
    add("--limit", type=int, default=0, help="first problems only; 0: all")
    add("--engine", choices=("auto", "vllm", "hf"), default="auto",
        help="auto: vLLM where it is installed with a GPU")
    add_dtype_flag(add)
    add("--gpu-memory", type=float, default=0.9, help="share of a GPU's memory for vLLM")
    add("--kv-cache-gb", type=float, default=0,
        help="KV cache of vLLM in GiB; 0: what --gpu-memory leaves")
    add("--out", required=True, metavar="JSONL", help="samples rows")
    common.add_force_flag(add)


def parse_args(argv=None):
    parser = common.make_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = common.add_command(commands, "problems", "problem set or benchmark -> problems rows")
    add_problems_flags(command.add_argument)
    command = common.add_command(commands, "teacher", "teacher traces -> samples rows")
    add_teacher_flags(command.add_argument)
    command = common.add_command(commands, "model", "samples of a model -> samples rows", "sample")
    add_model_flags(command.add_argument)
    args = common.parse_args(parser, argv=argv)
    lowest = {"n": 1, "max_tokens": 1, "max_prompt_tokens": 1, "ngram": 1}
    common.check_range(args, ["top_p", "gpu_memory"], **lowest, temperature=0, limit=0,
                       boilerplate=0, kv_cache_gb=0)
    if args.name is not None and not re.fullmatch(r"[\w.-]+", args.name):
        die(f"--name is a word of letters, digits, `_`, `.` and `-`, not {args.name!r}")
    if args.command == "teacher" and args.problems_out == args.out:
        die("--problems-out and --out are the same file")
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.command == "problems":
        problems(args)
    elif args.command == "teacher":
        teacher(args)
    else:
        model_samples(args)


if __name__ == "__main__":
    common.run(main)
