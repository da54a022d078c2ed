"""A fuzzer over all that the project reads: rows of the stages, sources, recipes, answers.

    bash tests/run.sh tests/test_fuzz.py                 a few seconds, always the same examples
    FUZZ_MINUTES=30 bash tests/run.sh tests/test_fuzz.py -m faults -s -n 0
                                                         new examples for so long; SEED=0

Whatever is read ends as meant or in one sentence with exit code 2 that names the file: no
traceback, no hang, no raw escape code. What is accepted keeps its promise, and the next stage reads
it. Judging is total, quick, reflexive and, between values, symmetric.
"""

import argparse
import contextlib
import csv
import gzip
import importlib
import io
import json
import math
import os
import re
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings, strategies as st

import common
import model
from grading import verifier
from grading.spelling import normalise
from grading.values import Unknown, vanishes
from test_faults import handlers_and_locks_given_back, make_world
from tools import recipe as shell_recipe

LONGEST_EXAMPLE = 20                           # seconds, of a machine that others use as well
counts = Counter()

# Set by the fixture `places`.
WORLD = Path()                                 # the inputs of every stage
folder = Path()                                # of the example, made anew by `fresh`
tokenizer = None


# -------------------------------------------------------------------------------------- how it ends


class Hung(BaseException):
    """Not an Exception: nothing on the way may catch it."""


@contextlib.contextmanager
def time_limit():
    def stop(number, frame):
        raise Hung(f"longer than {LONGEST_EXAMPLE} s")

    kept = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, LONGEST_EXAMPLE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, kept)


def the_one_error(said):
    """The last line of `said`, which must be the only error in it."""
    without_progress_bars = re.sub(r"\r[^\r\n]*?(?=error: |\r|\n|$)", "", said)
    lines = without_progress_bars.strip("\n").split("\n")
    errors = [line for line in lines if "error: " in line]
    assert len(errors) == 1, said
    assert lines[-1] == errors[0], said
    return errors[0]


def check_printable(text):
    """No escape codes for the terminal, but a progress bar's "one line up"."""
    for character in text.replace("\x1b[A", ""):
        assert character.isprintable() or character in "\n\t\r", repr(text)


def outcome(function, *args):
    """(what it returns, None), or (None, the one sentence with which it ends the program)."""
    said = io.StringIO()
    printed = io.StringIO()
    try:
        with (handlers_and_locks_given_back(), contextlib.redirect_stderr(said),
              contextlib.redirect_stdout(printed), time_limit()):
            result = function(*args)
        counts["accepted"] += 1
        return result, None
    except SystemExit as stop:
        assert stop.code == 2, (stop.code, said.getvalue())
        return None, the_one_error(said.getvalue())
    finally:
        check_printable(printed.getvalue())
        check_printable(said.getvalue())


def a_sentence(sentence, *names):
    """It names the file (or the flag), says something, and ends the line that it is on."""
    assert any(name in sentence for name in names), sentence
    assert sentence.isprintable(), repr(sentence)[:2000]
    assert 10 < len(sentence) < 5000, repr(sentence)[:2000]


# ----------------------------------------------------------------------------- what is thrown at it

ODD = ["", " ", "\n", "\x1b[31mred", "\u202etfel", "\ud800", "\udfff\ud800", "\x00", "\u2028",
       "a|b", "<b>", "`", "\x9b2J", "𝔸", "e\u0301" * 5, "nan", "null", "true", "1e400", "-0", "[]",
       "{}", "<|im_end|>", "\\boxed{", "p0", "stop", "length"]


def repeated_up_to_30_times(text):
    return st.integers(0, 30).map(lambda n: text * n)


texts = st.one_of(
    st.sampled_from(ODD),
    st.text(max_size=12),
    st.text(st.characters(exclude_categories=()), max_size=6),            # surrogates as well
    st.sampled_from(ODD).flatmap(repeated_up_to_30_times))
odd_numbers = [0, -1, 1, 2**31, 2**53, -2**63, 10**400, 1e308, -0.0, 0.999]
numbers = st.one_of(st.integers(), st.floats(), st.sampled_from(odd_numbers))
scalars = st.one_of(st.none(), st.booleans(), numbers, texts)


def lists_and_objects(inner):
    lists = st.lists(inner, max_size=3)
    objects = st.dictionaries(texts, inner, max_size=3)
    return st.one_of(lists, objects)


values = st.one_of(scalars, st.recursive(scalars, lists_and_objects, max_leaves=6))


def as_line(value) -> bytes:
    return json.dumps(value).encode()


ODD_LINES = [
    b"",
    b"{",
    b"\xff\xfe",
    b'{"pid": 1e400}',
    b'{"x": -Infinity}',
    b"\xef\xbb\xbf{}",
    b'{"a":1}{"b":2}',
    b"NaN",
    b'{"pid": "a", "pid": "b"}',
    b"[" * 5000,
    b'{"x":' * 2000 + b"1" + b"}" * 2000,
    b"9" * 5000,
    b'{"pid": "\\ud800"}',
    '{"pid": "\ud800"}'.encode("utf-8", "surrogatepass"),
    b'{"n_tokens": 1e999}',
]
junk_lines = st.one_of(st.binary(max_size=30), values.map(as_line), st.sampled_from(ODD_LINES))


def numbered(row, i):
    """The row, its pid and sid those of row i."""
    changed = dict(row)
    for name in ("pid", "sid"):
        if name in row:
            changed[name] = f"{row[name]}{i}"
    return changed


@st.composite
def files_of_rows(draw, row, names=None):
    """Bytes of a JSONL file: rows as `row`, some of their fields (of `names`) changed, gone or
    added, some lines junk."""
    lines = []
    for i in range(draw(st.integers(1, 4))):
        changed = numbered(row, i)
        for _ in range(draw(st.sampled_from([0, 0, 1, 1, 2]))):
            name = draw(st.sampled_from(names or list(row)) | st.just("extra"))
            if draw(st.integers(0, 5)) == 0:
                changed.pop(name, None)
            else:
                changed[name] = draw(values)
        text = json.dumps(changed, ensure_ascii=draw(st.booleans()))
        lines.append(text.encode("utf-8", "surrogatepass"))
    for _ in range(draw(st.sampled_from([0, 0, 0, 1]))):
        place = draw(st.integers(0, len(lines)))
        lines.insert(place, draw(junk_lines))
    line_end = draw(st.sampled_from([b"\n", b"\n", b"\r\n"]))
    file_end = draw(st.sampled_from([b"\n", b"\n", b"", b"\n\n"]))
    return line_end.join(lines) + file_end


# --------------------------------------------------------------- (a) the rows that stages hand over


def fresh(names):
    """These files of the world, alone in the folder."""
    for path in list(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    for name in names:
        shutil.copy(WORLD / name, folder / name)


PROBLEM = {"pid": "p", "problem": "What is 1 + 1?", "answer": "2", "source": "x"}
SAMPLE = {"sid": "p:x:", "pid": "p", "source": "x", "k": 0, "seed": 1,
          "response": "</think>\\boxed{2}", "n_tokens": 17, "finish": "stop"}
JUDGED = {"predicted": "2", "correct": True, "status": "ok"}
SCORED = {**SAMPLE, "problem": "What?", **JUDGED, "nll_sum": 9.0, "n_scored": 10, "ppl": 2.5,
          "scorer": "m", "ppl_context": "response"}
TRAIN = {"sid": "p:x:", "pid": "p", "problem": "What?", "response": "a", "objective": "ce",
         "ppl": 2.5, "n_tokens": 2}
RESPONSE = {**SAMPLE, **JUDGED, "ids": [1, 2]}

# What a reader asks of a row: the constants of the stages.
PROMPT_FIELDS = {"pid": str, "problem": str}
PROBLEM_FIELDS = {"pid": str, "problem": str, "answer": (str, list)}
SAMPLE_FIELDS = {"sid": str, "pid": str, "response": str, "n_tokens": int, "finish": str}
SCORED_FIELDS = {"sid": str, "pid": str, "n_tokens": int, "finish": str,
                 "correct": (bool, type(None)), "ppl": (float, int, type(None))}
TRAIN_FIELDS = {"sid": str, "problem": str, "response": str, "objective": str}
RESPONSE_FIELDS = {"pid": str, "k": int, "response": str, "n_tokens": int, "finish": str,
                   "status": str}

# A row, what its reader asks of it, and how the reader tells rows apart.
READERS = [
    (PROBLEM, PROMPT_FIELDS, "pid"),
    (PROBLEM, PROBLEM_FIELDS, "pid"),
    (SAMPLE, SAMPLE_FIELDS, "sid"),
    (SCORED, SCORED_FIELDS, "sid"),
    (TRAIN, TRAIN_FIELDS, "sid"),
    (RESPONSE, RESPONSE_FIELDS, ("pid", "k")),
]


def finite(value) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, dict):
        return all(finite(inner) for inner in value.values())
    if isinstance(value, list):
        return all(finite(inner) for inner in value)
    return True


def check_row(row, fields):
    for name, kinds in fields.items():
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        assert type(row[name]) in kinds, row
    assert finite(row), row
    json.dumps(row, ensure_ascii=False, allow_nan=False).encode()
    for name in ("pid", "sid", "problem"):
        if name in fields:
            assert row[name].strip(), row
    if "n_tokens" in fields:
        assert row["n_tokens"] >= 1, row
    if "ppl" in fields and row["ppl"] is not None:
        assert row["ppl"] > 0.999, row
    if "finish" in fields:
        assert row["finish"] in ("stop", "length"), row
    if "answer" in fields:
        golds = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
        assert golds, row
        for gold in golds:
            assert isinstance(gold, str), row
            assert gold.strip(), row


def check_rows(rows, fields, key):
    """What a reader promises of the rows that it accepts."""
    assert rows
    keys = [common.key_of(row, key) for row in rows]
    assert len(set(keys)) == len(keys)
    for row in rows:
        check_row(row, fields)


def read_rows(path, fields, key):
    return list(common.read_jsonl(path, fields, key))


def check_next_stage_reads(path, fields, key):
    """-> the rows"""
    rows, sentence = outcome(read_rows, path, fields, key)
    assert not sentence, sentence
    check_rows(rows, fields, key)
    return rows


def files_for(reader):
    row, fields, _ = reader
    return st.tuples(st.just(reader), files_of_rows(row, list(fields)))


reader_cases = st.sampled_from(READERS).flatmap(files_for)


def rows_are_read_or_refused(case):
    (_, fields, key), content = case
    path = folder / "rows.jsonl"
    path.write_bytes(content)
    rows, sentence = outcome(read_rows, path, fields, key)
    if sentence:
        a_sentence(sentence, "rows.jsonl:", "rows.jsonl is empty")
    else:
        check_rows(rows, fields, key)


# In each the whole stage is run, as its command line has it; what it leaves is read by the stage
# behind it.
STAGES = {
    "problems": (PROBLEM, "01_sample.py problems --source in.jsonl --out out.jsonl"),
    "verify": (SAMPLE, "02_verify_score.py verify --samples in.jsonl --problems problems.jsonl "
                       "--workers 1 --out out.jsonl"),
    "golds": (PROBLEM, "02_verify_score.py verify --samples samples.jsonl --problems in.jsonl "
                       "--workers 1 --out out.jsonl"),
    "select": (SCORED, "02_verify_score.py select --arm oxa_mle --teacher in.jsonl --n-ce 3 "
                       "--out out.jsonl"),
    "select_ul": (SCORED, "02_verify_score.py select --arm oxa_full --teacher scored.jsonl "
                          "--self in.jsonl --n-ce 3 --n-ul 3 --out out.jsonl"),
    "show": (SCORED, "02_verify_score.py show --samples in.jsonl"),
    "grade": (RESPONSE, "05_eval.py --problems in.jsonl --out run --verify-workers 1 --regrade"),
}
NEXT = {
    "problems": (PROBLEM_FIELDS, "pid"),
    "verify": (SAMPLE_FIELDS, "sid"),
    "golds": (SAMPLE_FIELDS, "sid"),
    "select": (TRAIN_FIELDS, "sid"),
    "select_ul": (TRAIN_FIELDS, "sid"),
}
SIDECAR = {"schema": "eval", "schema_version": 1,
           "args": {"model": "m", "instruction": "i", "temperature": 1.0}, "rows": None,
           "inputs": {}, "grader": "g"}


def values_of_a_sidecar(max_size):
    return st.dictionaries(st.sampled_from(list(SIDECAR)), values, max_size=max_size)


def changed_sidecar(changes):
    return {**SIDECAR, **changes}


whole_or_empty = st.sampled_from([SIDECAR, SIDECAR, SIDECAR, {}])
sidecars = whole_or_empty | values_of_a_sidecar(3).map(changed_sidecar)


@st.composite
def stage_cases(draw):
    stage = draw(st.sampled_from(list(STAGES)))
    row, _ = STAGES[stage]
    content = draw(files_of_rows(row))
    return stage, content, draw(sidecars)


def run_stage(words):
    script, *argv = words.split()
    module = importlib.import_module(script.removesuffix(".py"))
    with contextlib.chdir(folder):
        return outcome(lambda: common.run(lambda: module.main(argv)))


def a_stage_ends_as_meant(case):
    stage, content, sidecar = case
    fresh(("problems.jsonl", "samples.jsonl", "scored.jsonl"))
    _, words = STAGES[stage]
    path = folder / "in.jsonl"
    path.write_bytes(content)
    if stage == "grade":                       # the row is that of a response that is there
        (folder / "run").mkdir()
        path.rename(folder / "run/in.jsonl")
        (folder / "run/in.meta.json").write_text(json.dumps(sidecar))
        problems = [{**PROBLEM, "pid": f"p{i}"} for i in range(4)]
        path.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    _, sentence = run_stage(words)
    if sentence:
        a_sentence(sentence, "in.jsonl", "run/in", "samples.jsonl",
                   "perplexities of different models")
        if stage not in ("grade", "verify", "golds"):
            assert not (folder / "out.jsonl").exists()
    elif stage in NEXT:
        fields, key = NEXT[stage]
        check_next_stage_reads(folder / "out.jsonl", fields, key)


# What the stages with a model do of their rows before it is loaded.
NEEDS = {
    "model": (PROBLEM, "01_sample"),
    "train": (TRAIN, "03_train_oxa"),
    "rlvr": (PROBLEM, "04_rlvr"),
    "score": (SCORED, "02_verify_score"),
}


def files_of_stage(stage):
    row, _ = NEEDS[stage]
    return st.tuples(st.just(stage), files_of_rows(row))


prompt_cases = st.sampled_from(list(NEEDS)).flatmap(files_of_stage)

# How often each control token stands in a prompt: by the template alone, whatever the problem
# holds.
MARKS = {"<|im_start|>": 2, "<|im_end|>": 1, "<|endoftext|>": 0}


def score_sequences(module, args):
    rows = list(module.rows_to_score(args))
    return module.scored_sequences(tokenizer, rows, args)


def prompts_are_made_or_refused(case):
    stage, content = case
    fresh(())
    path = folder / "in.jsonl"
    path.write_bytes(content)
    _, script = NEEDS[stage]
    module = importlib.import_module(script)
    args = argparse.Namespace(
        problems=path, data=path, samples=path, model=str(WORLD / "model"), out=folder / "out",
        limit=0, instruction=" Go.", max_prompt_tokens=3000, max_tokens=3000, token_budget=3000,
        max_score_tokens=300, only="all", ppl_context="prompt", verify_workers=0)
    if stage == "model":
        made, sentence = outcome(module.read_prompts, args, tokenizer)
    elif stage == "train":
        made, sentence = outcome(module.tokenize, args, tokenizer, 4000)
    elif stage == "rlvr":
        made, sentence = outcome(module.usable_problems, path, tokenizer, args, 1, print)
    else:
        made, sentence = outcome(score_sequences, module, args)
    if sentence:
        return a_sentence(sentence, "in.jsonl")
    prompts = []
    if stage == "model":
        prompts = list(made[0].values())
    elif stage == "rlvr":
        prompts = [row["prompt_ids"] for row in made]
    for ids in prompts:
        for mark, n in MARKS.items():
            assert ids.count(tokenizer.convert_tokens_to_ids(mark)) == n, (mark, ids)


# --------------------------------------------------------------------------- sources of all formats

# A row, and --columns for it.
SOURCE_ROWS = [
    ({"problem": "What is 1 + 1?", "answer": "2"},
     "problem=problem answer=answer"),
    ({"prompt": [{"role": "user", "content": "What is 1?"}],
      "reward_model": {"ground_truth": "1", "style": "rule"}},
     "problem=prompt answer=reward_model.ground_truth"),
    ({"query": "What is 1?", "answer": "1", "r": ["<think>a</think>\\boxed{1}"]},
     "problem=query answer=answer response=r"),
]


def as_csv(content: bytes) -> bytes:
    rows = []
    for line in content.decode("utf-8", "replace").splitlines():
        if line.startswith("{"):
            rows.append(json.loads(line))
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(list(rows[0]) if rows else [])
    for row in rows:
        writer.writerow([str(value) for value in row.values()])
    return file.getvalue().encode("utf-8", "surrogatepass")


def as_array(content: bytes) -> bytes:
    return b"[" + b",".join(content.split(b"\n")) + b"]"


def as_parquet(content: bytes) -> bytes:
    import pyarrow
    import pyarrow.parquet
    try:
        rows = [json.loads(line) for line in content.split(b"\n")]
        file = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
        return file.getvalue()
    except Exception:                          # no parquet file can hold it
        return content


def as_it_is(content: bytes) -> bytes:
    return content


FORMATS = {
    "s.jsonl": as_it_is,
    "s.json": as_array,
    "s.csv": as_csv,
    "s.parquet": as_parquet,
    "s.xyz": as_it_is,
    "s.json.gz": as_array,
}


@st.composite
def source_cases(draw):
    row, columns = draw(st.sampled_from(SOURCE_ROWS))
    content = draw(files_of_rows(row))
    name = draw(st.sampled_from(list(FORMATS)))
    try:
        content = FORMATS[name](content)
    except ValueError:                         # a line of junk
        pass
    end = draw(st.sampled_from([None, None, None, len(content) // 2]))
    return name, content[:end], columns


def a_source_is_read_or_refused(case):
    name, content, columns = case
    fresh(())
    content = gzip.compress(content) if name.endswith(".gz") else content
    (folder / name).write_bytes(content)
    has_responses = "response=" in columns
    if has_responses:
        words = "teacher --model model --problems-out problems.jsonl"
        problems = "problems.jsonl"
    else:
        words = "problems"
        problems = "out.jsonl"
    _, sentence = run_stage(
        f"01_sample.py {words} --source {name} --out out.jsonl --columns {columns}")
    if sentence:
        return a_sentence(sentence, name)
    check_next_stage_reads(folder / problems, PROBLEM_FIELDS, "pid")
    if has_responses:
        rows, sentence = outcome(read_rows, folder / "out.jsonl", SAMPLE_FIELDS, "sid")
        assert not sentence, sentence
        for row in rows:
            assert row["response"].strip(), row


# ----------------------------------------------------------------------- what a run finds of itself

own_names = st.sampled_from(["out.jsonl", "out.meta.json", "metrics.jsonl", "results.json"])
own_contents = (files_of_rows({**SAMPLE, "step": 1})
                | junk_lines
                | values_of_a_sidecar(4).map(as_line))
own_files = st.tuples(own_names, own_contents)


def go_on_with_metrics():
    common.Metrics(folder, 1).writer.close()


def a_run_reads_its_own_files(case):
    name, content = case
    fresh(("problems.jsonl", "samples.jsonl"))
    (folder / name).write_bytes(content)
    if name == "metrics.jsonl":
        _, sentence = outcome(go_on_with_metrics)
    elif name == "results.json":
        _, sentence = outcome(importlib.import_module("05_eval").stored_results, folder)
    else:
        if name == "out.meta.json":            # of a file that is there
            row = {**SCORED, "sid": "p0:x:0", "pid": "p0"}
            (folder / "out.jsonl").write_text(json.dumps(row) + "\n")
        _, words = STAGES["verify"]
        _, sentence = run_stage(words.replace("in.jsonl", "samples.jsonl"))
    if sentence:
        a_sentence(sentence, name, "out.jsonl")


# -------------------------------------------------------------------------------------- (b) recipes

PARSERS = {
    "problems": ("01_sample", "problems --source s --out o"),
    "teacher": ("01_sample", "teacher --source s --model m --out o"),
    "sample": ("01_sample", "model --model m --problems p --out o"),
    "verify": ("02_verify_score", "verify --samples s --problems p --out o"),
    "score": ("02_verify_score", "score --samples s --model m --out o"),
    "select": ("02_verify_score", "select --arm sft --teacher t --out o"),
    "train": ("03_train_oxa", "--model m --data d --out o"),
    "rlvr": ("04_rlvr", "--model m --problems p --out o"),
    "eval": ("05_eval", "--problems p --out o"),
    "prepare-base": ("tools.prepare_base", "--model m --out o"),
    "report": ("tools.report", "r"),
}
GOOD_RUN = {"world": "easy", "world_base": "base", "arms": ["sft", "oxa_full"],
            "rlvr_arms": ["sft"], "benchmarks": ["id"], "n_seeds": 2}


def toml(value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, list):
        return "[" + ", ".join(toml(inner) for inner in value) + "]"
    if isinstance(value, dict):
        pairs = [f"{json.dumps(str(name))} = {toml(inner)}" for name, inner in value.items()]
        return "{" + ", ".join(pairs) + "}"
    return json.dumps(value if isinstance(value, str) else "none")


ODD_TOML = [
    "nan", "inf", "-inf", "1979-05-27", "07:32:00", "true", "false", '"false"', "'''a\nb'''",
    "0x10", "1e400", "9" * 30, "'$(touch x)'", "'a;b'", '"\\u001b[31m"', "[1, 'a']", "[]", "{}",
    "{a.b = 1}", "''"]
toml_values = st.one_of(
    values.map(toml),
    st.integers(-3, 5).map(str),
    st.floats(-2, 2).map(str),
    st.sampled_from(ODD_TOML))


def flags_of(section):
    """The flags of the stage that reads this section, from the parser that it builds."""
    name, words = PARSERS[section]
    module = importlib.import_module(name)
    parsers = []

    def keep(parser, *args, **options):
        parsers.append(parser)
        raise SystemExit(0)

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(SystemExit):
        patch.setattr(common, "parse_args", keep)
        module.parse_args(words.split())
    parser = parsers[0].commands.get(words.split()[0], parsers[0])
    return sorted(parser.flags)


ODD_KEYS = ["", "a b", "first_seed", "x\x1b[31m", "run", "from"]
ODD_STARTS = ["from = 'r'", "from = 3", "from = '../r'", "x = 1"]


@st.composite
def recipes(draw):
    """(section, bytes of a recipe with a good [run]): up to three keys of the section odd, now and
    then an odd line or header, or the file broken."""
    section = draw(st.sampled_from([*PARSERS, "run", "run"]))
    if section == "run":
        names = list(shell_recipe.RUN)
    else:
        names = flags_of(section)
    parts = {"run": {name: toml(value) for name, value in GOOD_RUN.items()}}
    changed = parts.setdefault(section, {})
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from(names) | st.sampled_from(ODD_KEYS))
        changed[name] = draw(toml_values)

    lines = [draw(st.sampled_from([""] * 9 + ODD_STARTS))]
    for name, keys in parts.items():
        odd_headers = [f"[[{name}]]", f"[{name}.x]", f"['{name} ']", "[trian]"]
        lines.append(draw(st.sampled_from([f"[{name}]"] * 12 + odd_headers)))
        lines += [f"{json.dumps(key)} = {value}" for key, value in keys.items()]
    text = "\n".join(lines)
    broken = [text[:-3], text + "\n[", text.replace("=", ":", 1)]
    text = draw(st.sampled_from([text] * 15 + broken))
    return section, text.encode("utf-8", "surrogatepass")


def a_recipe_is_read_or_refused(case):
    section, content = case
    fresh(())
    path = folder / "r.toml"
    path.write_bytes(content)
    sections, sentence = outcome(common.load_recipe, path)
    for_shell, shell_sentence = outcome(shell_recipe.load_recipe, path)
    assert repr(sections) == repr(for_shell)
    assert sentence == shell_sentence
    if sentence:
        return a_sentence(sentence, "r.toml")

    lines, sentence = outcome(lambda: list(shell_recipe.settings(sections)))
    if sentence:
        a_sentence(sentence, "[run]")
    else:
        for key, value in lines:
            assert f"{key}{value}".isprintable(), (key, value)
            assert len(str(value)) < 10**6, (key, value)

    if section in PARSERS:
        name, words = PARSERS[section]
        module = importlib.import_module(name)
        args, sentence = outcome(module.parse_args, [*words.split(), "--recipe", str(path)])
        if sentence:
            return a_sentence(sentence, "r.toml", "--", "usage")
        assert all(finite(value) for value in vars(args).values()), args


# -------------------------------------------------------------------------------------- (c) answers

PIECES = r"""
\frac \dfrac12 {1} {2} 1 2 3 12 0 -1 7.5 .5 1e3 x y n e i \pi \sqrt \sqrt[3] ^ _ ^2 _1 ( ) [ ] { }
\{ \} | \left( \right) + - \cdot * / \div = < > \le \ge \ne \in \approx , ; : \ldots \cup \pm \mp !
% ° ^\circ \text{cm} \text{ and } \text{or} \text{Alice} \begin{pmatrix} \end{pmatrix} & \\ \int
\int_0^1 dx \sum_{n=1}^{9} \prod \binom{n}{2} \sin \cos \ln \log_2 f(x) f(0) \infty \emptyset
\mathbb{R} \overline{3} 0.\overline{3} 1\frac{4}{5} 12,345 (A) (B) 3:00 p.m. \$ $ \% \boxed{
\fbox{1} </think> <think> \mod 7 \pmod{7} \lfloor \rfloor \forall \quad '' ' ² ½ × − “
\displaystyle \phantom{x} \cases \vec{v} \angle a.m. for all x where c is a constant
""".split()
PIECES += ["\u202e", "\x1b", "\ud800", "\x00", "１２", "\u0301", "𝟙", "٣"]
pieces = st.sampled_from(PIECES)
joined = st.lists(pieces | st.text(max_size=2), min_size=1, max_size=14).map("".join)
spaced = st.lists(pieces, min_size=1, max_size=8).map(" ".join)
answers = joined | spaced


def repeat(case):
    """Just short of the length that the verifier refuses."""
    text, n = case
    return (text * n)[:1990]


few_pieces = st.lists(pieces, min_size=1, max_size=3).map("".join)
repeated = st.tuples(few_pieces, st.sampled_from([20, 100, 700])).map(repeat)


def golds_of_the_labelled_cases():
    path = Path(__file__).parent / "verifier_cases.jsonl"
    found = set()
    for line in path.read_text().splitlines():
        gold = json.loads(line)["gold"]
        if isinstance(gold, str) and len(gold) < 80:
            found.add(gold)
    return sorted(found)


GOLDS = golds_of_the_labelled_cases()


@st.composite
def changed_golds(draw):
    """A gold of the labelled cases with pieces put in, taken out or joined to another's end."""
    text = draw(st.sampled_from(GOLDS))
    for _ in range(draw(st.integers(1, 3))):
        places = st.integers(0, len(text))
        i, j = sorted([draw(places), draw(places)])
        piece = draw(pieces)
        other = draw(st.sampled_from(GOLDS))
        text = draw(st.sampled_from([
            text[:i] + piece + text[i:],
            text[:i] + text[j:],
            text[:j] + text[i:],
            text[:i] + other[i:]]))
    return text


texts_to_judge = answers | repeated | changed_golds()

STATUSES = {"ok", "no_think_end", "no_box", "unbalanced_box", "empty_box", "too_long", "unparsed",
            "undefined", "too_big", "gold_unparsed", "unknown"}


def boxed(text):
    return f"<think>a</think>\\boxed{{{text}}}"


def judged(response, gold):
    start = time.process_time()
    with time_limit():
        verdict = verifier.verify(response, gold)
    seconds = time.process_time() - start
    assert seconds < 2, (seconds, response, gold)
    assert verdict.status in STATUSES, verdict
    assert verdict.correct in (True, False, None), verdict
    is_unjudged = verdict.status in ("gold_unparsed", "unknown")
    assert (verdict.correct is None) == is_unjudged, verdict
    if verdict.status != "ok":
        assert verdict.correct is not True, verdict
    return verdict


def known(gold) -> bool:
    return not verifier.unreadable_golds([gold], workers=0)


def judging_is_total(case):
    """Any response against any gold, and the gold against itself."""
    response, text, gold = case
    for each in (response, "</think>" + response, boxed(text), boxed(gold)):
        judged(each, gold)
        judged(each, [gold, text])
    predicted, status = verifier.extract(boxed(gold))
    if not status and predicted == gold.strip():
        assert judged(boxed(gold), predicted).correct is True
        if known(predicted):
            assert verifier.judge(predicted, predicted)[0] is True
            verdict = judged(boxed(rf"\displaystyle {predicted}\,"), predicted)
            assert verdict.correct is not False or verdict.status == "too_long", verdict
    verifier.unreadable_golds([gold, [text, gold]], workers=0)


# Values only: what is named, lettered, related or rounded asks for more as a gold than as an
# answer.
LEAVES = ["1", "2", "3", "10", "0.5", "7", "x", "y", r"\pi", r"\sqrt{2}", "n", "-4"]

# Number of expressions in it, and the form of an expression that holds them.
FORMS = [
    (2, "({})+({})"),
    (2, "({})-({})"),
    (2, r"({})\cdot ({})"),
    (2, r"\frac{{{}}}{{{}}}"),
    (1, r"\sqrt{{{}}}"),
    (1, "({})^2"),
    (2, "({})^{{{}}}"),
    (1, r"\sin({})"),
    (1, "|{}|"),
    (1, r"\ln({})"),
]
LISTS = ["({})", r"\{{{}\}}", "{}", "[{}]", r"\begin{{pmatrix}}{}\end{{pmatrix}}",
         r"[{}) \cup (50, 60)"]


def filled(form, n, inner):
    """The form with n expressions from `inner`."""
    def fill(parts):
        return form.format(*parts)

    if n == 1:
        return inner.map(form.format)
    return st.tuples(inner, inner).map(fill)


def grown(inner):
    return st.one_of([filled(form, n, inner) for n, form in FORMS])


expressions = st.recursive(st.sampled_from(LEAVES), grown, max_leaves=6)


@st.composite
def lists_of_expressions(draw):
    parts = draw(st.lists(expressions, min_size=2, max_size=3))
    form = draw(st.sampled_from(LISTS))
    separator = r" \\ " if "matrix" in form else ", "
    return form.format(separator.join(parts))


structures = st.one_of(expressions, lists_of_expressions())


def spellings(text):
    """Other ways to write it."""
    return [text.replace(r"\frac", r"\dfrac"), rf"\displaystyle {text} ", f"${text}$",
            f"{{{text}}}", re.sub("([()])", r"\1 ", text)]


def hides_a_variable(text) -> bool:
    """0x and 1^x: for the gold 0 or 1 no answer, since words are read as products (`vanishes` in
    values.py)."""
    try:
        trees = verifier.understand(normalise(text)).trees
        return any(vanishes(tree) for tree in trees)
    except (*verifier.FAILURES, Unknown):
        return False


def judging_is_symmetric(case):
    """Two values are equal either way round, or cannot be told apart; another spelling of one is
    not another value."""
    a, b = case
    for spelling in spellings(a):
        verdict = judged(boxed(spelling), a)
        assert verdict.correct is not False or not known(a), (spelling, a, verdict)
    forth = judged(boxed(a), b).correct
    back = judged(boxed(b), a).correct
    if not hides_a_variable(a) and not hides_a_variable(b):
        assert {forth, back} != {True, False}, (a, b, forth, back)


# ----------------------------------------------------------------------------------- short and long

# property: (its cases, number of them in the short part)
PROPERTIES = {
    rows_are_read_or_refused: (reader_cases, 150),
    prompts_are_made_or_refused: (prompt_cases, 60),
    a_stage_ends_as_meant: (stage_cases(), 60),
    a_source_is_read_or_refused: (source_cases(), 60),
    a_run_reads_its_own_files: (own_files, 40),
    a_recipe_is_read_or_refused: (recipes(), 80),
    judging_is_total: (st.tuples(answers, texts_to_judge, texts_to_judge | changed_golds()), 100),
    judging_is_symmetric: (st.tuples(structures, structures), 60),
}


def name_of(function):
    return function.__name__


@pytest.fixture(scope="module", autouse=True)
def places(tmp_path_factory):
    """The folder of the examples; the tokenizer, which all of them share, is loaded once."""
    global folder, WORLD, tokenizer
    WORLD = tmp_path_factory.mktemp("fuzz_world")
    make_world(WORLD)
    folder = tmp_path_factory.mktemp("fuzz")
    tokenizer = model.load_tokenizer(str(WORLD / "model"))
    stage = importlib.import_module("01_sample")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "load_tokenizer", lambda *args, **options: tokenizer)
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


def examples(function, strategy, n, **options):
    """`n` examples of the property."""
    def counted(case):
        counts[function.__name__] += 1
        function(case)
    chosen = settings(max_examples=n, deadline=None, database=None,
                      suppress_health_check=list(HealthCheck), **options)
    return chosen(given(strategy)(counted))


@pytest.mark.slow
@pytest.mark.parametrize("function", PROPERTIES, ids=name_of)
def test_a_few_examples(function):
    strategy, n = PROPERTIES[function]
    examples(function, strategy, n, derandomize=True)()


@pytest.mark.faults
def test_examples_for_minutes():
    """FUZZ_MINUTES of new examples, in rounds: SEED is the first round's, the next has the next."""
    first = int(os.environ.get("SEED", 0))
    minutes = float(os.environ.get("FUZZ_MINUTES", 5))
    end = time.monotonic() + 60 * minutes
    number = first
    findings = []
    while time.monotonic() < end:
        for function, (strategy, n) in PROPERTIES.items():
            run_examples = seed(number)(examples(
                function, strategy, 2 * n, phases=[Phase.generate, Phase.shrink],
                report_multiple_bugs=False))
            try:
                run_examples()
            except (Exception, Hung) as error:
                notes = "\n".join(getattr(error, "__notes__", []))
                findings.append(f"seed {number}, {function.__name__}: {error!r}\n{notes}")
                print(findings[-1], flush=True)
        number += 1
        total = sum(counts[function.__name__] for function in PROPERTIES)
        print(f"seeds {first} to {number - 1}: {total:,} examples {dict(counts)}, "
              f"{len(findings)} findings", flush=True)
    assert not findings, "\n\n".join(findings)
