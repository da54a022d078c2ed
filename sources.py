"""Where problems and traces come from: the columns of every known source, read as a stream and checked; overlap with
benchmarks.

A source is a hub id or a local path (JSONL, parquet, `save_to_disk`). How its columns are to be read is declared in
SOURCES and held against the columns that are there; nothing is guessed.

Deliberate simplifications: a problem is known by its text (`pid` = hash of it), so two wordings of one problem are two
problems; the row order of a source is kept; a stream that ends early is not told from a short source.
"""

import hashlib
import itertools
import json
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import common

# ---------------------------------------------------------------------------------------- sources: which column is what


@dataclass(frozen=True)
class Source:
    """How the rows of one known source are read. Every column it has is named: used, or in `unused`."""

    problem: str
    answer: str | None = None     # ground truth; None: the source has none
    response: str | None = None   # a response, or a list of responses to the same problem
    unused: tuple = ()
    where: tuple = ()             # (column, value): only these rows are kept
    split: str = "train"
    hub: tuple = ()               # hub ids of this shape


SOURCES = {
    # teacher traces
    "acereason": Source("input", None, "output", ("source",), ("category", "math"), hub=("nvidia/AceReason-1.1-SFT",)),
    "oxa": Source("query", None, "DeepSeek-R1_Response_List", hub=("takagi97/OXA-AceReason-1.1-Math",)),
    "oxa_answer": Source("query", "answer", "DeepSeek-R1_Response_List"),
    # problem sets
    "deepscaler": Source("problem", "answer", None, ("solution",), hub=("agentica-org/DeepScaleR-Preview-Dataset",)),
    "aime24": Source("problem", "answer", None, ("id", "solution", "url", "year"), hub=("HuggingFaceH4/aime_2024",)),
    "aime25": Source("problem", "answer", None, ("id",), split="test", hub=("math-ai/aime25",)),
    "matharena": Source("problem", "answer", None, ("problem_idx", "problem_type"),
                        hub=("MathArena/brumo_2025", "MathArena/cmimc_2025", "MathArena/hmmt_feb_2025")),
    "minerva": Source("question", "answer", split="test", hub=("math-ai/minervamath",)),
    "math500": Source("problem", "answer", None, ("solution", "subject", "level", "unique_id"), split="test",
                      hub=("HuggingFaceH4/MATH-500",)),
    "problems": Source("problem", "answer", None, ("pid", "source")),   # this project's own rows; the pid is kept
}


def used_columns(source):
    where = source.where[:1]
    return [c for c in (source.problem, source.answer, source.response, *where) if c is not None]


def choose_source(args, columns):
    """Find the declared reading of `--source` and hold it against the columns that are there. -> Source."""
    there = f"{args.source} has the columns {sorted(columns)}"
    if args.columns:
        named = dict(pair.partition("=")[::2] for pair in args.columns)
        if "problem" not in named or not set(named) <= {"problem", "answer", "response"}:
            common.die("--columns takes problem=COLUMN [answer=COLUMN] [response=COLUMN], not "
                       + " ".join(args.columns))
        source = Source(**named, split=args.split or "train")   # the user named what to use: the rest is ignored
        name, unknown = "--columns", set()
    else:
        matching = [n for n, s in SOURCES.items() if args.source in s.hub]
        if args.format:
            matching = [args.format]
        elif not matching:
            matching = [n for n, s in SOURCES.items() if set(columns) == {*used_columns(s), *s.unused}]
        if not matching:
            known = "; ".join(f"{n}: {', '.join([*used_columns(s), *s.unused])}" for n, s in SOURCES.items())
            common.die(f"{there}, which is no declared source ({known}); name them with --columns problem=COLUMN ...")
        name = matching[0]
        source = SOURCES[name]
        unknown = set(columns) - {*used_columns(source), *source.unused}
    missing = set(used_columns(source)) - set(columns)
    if missing:
        common.die(f"{there}; read as {name} it lacks {sorted(missing)}")
    if unknown:
        common.die(f"{there}; read as {name} it should not have {sorted(unknown)}: look at them, then name the columns "
                   "to use with --columns problem=COLUMN [answer=COLUMN] [response=COLUMN]")
    print(f"{args.source}: read as {name} (problem = {source.problem}, answer = {source.answer}, "
          f"response = {source.response})", flush=True)
    return source


def open_rows(args):
    """Stream the rows of `--source`. -> iterator of dict (column -> value)."""
    path = Path(args.source)
    if path.is_file() and path.suffix in (".jsonl", ".json"):
        return common.read_jsonl(path, {})
    from datasets import load_dataset, load_from_disk   # takes seconds to import: only where it is needed
    split = args.split or next((s.split for s in SOURCES.values() if args.source in s.hub), "train")
    if path.is_file() and path.suffix == ".parquet":
        return iter(load_dataset("parquet", data_files=str(path), split="train", streaming=True))
    if path.is_dir():
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            saved = load_from_disk(str(path))
            if hasattr(saved, "keys"):
                if split not in saved:
                    common.die(f"{path} has the splits {sorted(saved)}, not {split} (--split)")
                saved = saved[split]
            return iter(saved)
        files = sorted(str(f) for f in path.rglob("*.parquet"))
        if not files:
            common.die(f"{path} is neither a `save_to_disk` directory nor a directory of parquet files")
        return iter(load_dataset("parquet", data_files=files, split="train", streaming=True))
    if path.suffix or path.is_absolute() or args.source.count("/") != 1:
        common.die(f"{args.source}: no such file or directory, and not a hub id")
    try:
        return iter(load_dataset(args.source, split=split, streaming=True))
    except (OSError, ValueError) as error:   # not found, no network, no such split: the library's sentence says which
        common.die(f"{args.source} cannot be opened: {str(error).splitlines()[0]}")


def problem_id(text):
    """Stable id of a problem: hash of its text, Unicode-normalised, white space collapsed."""
    text = " ".join(unicodedata.normalize("NFKC", text).split())
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def clean_answer(value):
    """Ground truth as a string or a list of strings (any of them is right); None where there is none."""
    if isinstance(value, list):
        answers = [a for a in map(clean_answer, value) if a is not None]
        return answers or None
    if value is None or isinstance(value, (bool, dict)):
        return None
    return str(value).strip() or None


def read_source(args):
    """Read `--source` by its declared columns. -> (Source, iterator of (pid, problem, answer, [responses]))."""
    rows = open_rows(args)
    first = next(rows, None)
    if first is None:
        common.die(f"{args.source} has no rows")
    source = choose_source(args, list(first))

    def items():
        for n, row in enumerate(itertools.chain([first], rows), 1):
            for column in used_columns(source):
                if column not in row:
                    common.die(f"{args.source}, row {n}: no column {column}; it has {sorted(row)}")
            if source.where and row[source.where[0]] != source.where[1]:
                continue
            problem = row[source.problem]
            responses = row[source.response] if source.response else []
            responses = [responses] if isinstance(responses, str) else responses or []
            if not isinstance(problem, str) or not all(isinstance(r, str) for r in responses):
                common.die(f"{args.source}, row {n}: {source.problem} and {source.response} must be text")
            pid = row["pid"] if source is SOURCES["problems"] else problem_id(problem)
            yield pid, problem, clean_answer(row[source.answer]) if source.answer else None, responses

    return source, items()


# -------------------------------------------------------------------------------------------------------- contamination


class Overlap:
    """Which benchmark problem shares an n-gram of words with a text, if any.

    An n-gram that stands in `boilerplate` benchmark problems or more ("where m and n are relatively prime positive
    integers, find m + n") identifies none of them and is no evidence. A benchmark problem shorter than n words is
    only met by a text with exactly its words.
    """

    def __init__(self, paths, n, boilerplate):
        self.n, self.counts, self.dropped = n, Counter(), []
        holders = {}                                   # n-gram -> benchmark problems that hold it
        for path in paths:
            for row in common.read_jsonl(path, {"pid": str, "problem": str}):
                self.counts[Path(path).stem] += 1
                for gram in self.grams(row["problem"]):
                    holders.setdefault(gram, set()).add((Path(path).stem, row["pid"]))
        self.boilerplate = {g: len(who) for g, who in holders.items() if boilerplate and len(who) >= boilerplate}
        self.holder = {g: min(who) for g, who in holders.items() if g not in self.boilerplate}

    def grams(self, text):
        words = re.findall(r"\w+", unicodedata.normalize("NFKC", text).lower())
        return [" ".join(words[i:i + self.n]) for i in range(max(1, len(words) - self.n + 1))]

    def hit(self, pid, text):
        """True, and on record, if `text` overlaps a benchmark."""
        gram = next((g for g in self.grams(text) if g in self.holder), None)
        if gram is not None:
            benchmark, bench_pid = self.holder[gram]
            self.dropped.append({"pid": pid, "benchmark": benchmark, "bench_pid": bench_pid, "ngram": gram})
        return gram is not None

    def report(self, path):
        by_benchmark = Counter(d["benchmark"] for d in self.dropped)
        found = Counter(b for b, _ in {(d["benchmark"], d["bench_pid"]) for d in self.dropped})
        body = {
            "n": self.n, "n_dropped": len(self.dropped),
            "benchmarks": {b: {"n_problems": n, "n_found_in_training": found[b], "n_training_dropped": by_benchmark[b]}
                           for b, n in self.counts.items()},
            "boilerplate": dict(sorted(self.boilerplate.items(), key=lambda item: (-item[1], item[0]))),
            "most_frequent": Counter(d["ngram"] for d in self.dropped).most_common(20),
            "dropped": self.dropped,
        }
        with common.replace_file(path) as file:
            json.dump(body, file, indent=1, ensure_ascii=False)
        parts = [f"{b} {by_benchmark[b]} (of its {n} problems {found[b]} are met)" for b, n in self.counts.items()]
        print(f"contamination ({self.n}-gram): {len(self.dropped)} training problems dropped; {', '.join(parts)}; "
              f"{len(self.boilerplate)} boilerplate n-grams ignored; all in {path}", flush=True)
