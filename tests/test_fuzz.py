"""A fuzzer over all that the project reads: rows of the stages, sources, recipes, answers.

    bash tests/run.sh tests/test_fuzz.py                                      a few seconds, always the same examples
    FUZZ_MINUTES=30 bash tests/run.sh tests/test_fuzz.py -m faults -s -n 0    new examples for so long; SEED=0

Whatever is read ends as meant or in one sentence with exit code 2 that names the file: no traceback, no hang, no raw
escape code. What is accepted keeps its promise, and the next stage reads it. Judging is total, quick, reflexive and,
between values, symmetric.
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
from test_faults import make_world
from tools import recipe as shell_recipe

LONGEST_EXAMPLE = 20                           # seconds, of a machine that others use as well
counts = Counter()


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


def outcome(function, *args):
    """(what it returns, None), or (None, the one sentence with which it ends the program)."""
    said = io.StringIO()
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(printed), time_limit():
            result = function(*args)
        counts["accepted"] += 1
        return result, None
    except SystemExit as stop:
        assert stop.code == 2, (stop.code, said.getvalue())
        lines = re.sub(r"\r[^\r\n]*?(?=error: |\r|\n|$)", "", said.getvalue()).strip("\n").split("\n")     # without progress bars
        errors = [line for line in lines if "error: " in line]
        assert len(errors) == 1 and lines[-1] == errors[0], said.getvalue()
        return None, errors[0]
    finally:
        common.release_locks()
        for number, handler in kept.items():
            signal.signal(number, handler)
        for text in (printed.getvalue(), said.getvalue()):
            assert all(c.isprintable() or c in "\n\t\r" for c in text.replace("\x1b[A", "")), repr(text)


def a_sentence(sentence, *names):
    """It names the file (or the flag), says something, and ends the line that it is on."""
    assert any(name in sentence for name in names), sentence
    assert sentence.isprintable() and 10 < len(sentence) < 5000, repr(sentence)[:2000]


# ------------------------------------------------------------------------------------------ what is thrown at it

ODD = ["", " ", "\n", "\x1b[31mred", "\u202etfel", "\ud800", "\udfff\ud800", "\x00", "\u2028", "a|b", "<b>", "`", "\x9b2J",
       "𝔸", "e\u0301" * 5, "nan", "null", "true", "1e400", "-0", "[]", "{}", "<|im_end|>", "\\boxed{", "p0", "stop", "length"]
texts = st.one_of(st.sampled_from(ODD), st.text(max_size=12), st.text(st.characters(exclude_categories=()), max_size=6),
                  st.sampled_from(ODD).flatmap(lambda x: st.integers(0, 30).map(lambda n: x * n)))
numbers = st.one_of(st.integers(), st.floats(), st.sampled_from([0, -1, 1, 2**31, 2**53, -2**63, 10**400, 1e308, -0.0, 0.999]))
scalars = st.one_of(st.none(), st.booleans(), numbers, texts)
values = st.one_of(scalars, st.recursive(scalars, lambda x: st.one_of(
    st.lists(x, max_size=3), st.dictionaries(texts, x, max_size=3)), max_leaves=6))
junk_lines = st.one_of(
    st.binary(max_size=30), values.map(lambda x: json.dumps(x).encode()),
    st.sampled_from([b"", b"{", b"\xff\xfe", b'{"pid": 1e400}', b'{"x": -Infinity}', b"\xef\xbb\xbf{}", b'{"a":1}{"b":2}', b"NaN",
                     b'{"pid": "a", "pid": "b"}', b"[" * 5000, b'{"x":' * 2000 + b"1" + b"}" * 2000, b"9" * 5000,
                     b'{"pid": "\\ud800"}', '{"pid": "\ud800"}'.encode("utf-8", "surrogatepass"), b'{"n_tokens": 1e999}']))


@st.composite
def files_of_rows(draw, row, names=None):
    """Bytes of a JSONL file: rows as `row`, some of their fields changed, gone or added, some lines junk."""
    lines = []
    for i in range(draw(st.integers(1, 4))):
        changed = {**row, **{name: f"{row[name]}{i}" for name in ("pid", "sid") if name in row}}
        for _ in range(draw(st.sampled_from([0, 0, 1, 1, 2]))):
            name = draw(st.sampled_from(names or list(row)) | st.just("extra"))
            if draw(st.integers(0, 5)) == 0:
                changed.pop(name, None)
            else:
                changed[name] = draw(values)
        lines.append(json.dumps(changed, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass"))
    for _ in range(draw(st.sampled_from([0, 0, 0, 1]))):
        lines.insert(draw(st.integers(0, len(lines))), draw(junk_lines))
    return draw(st.sampled_from([b"\n", b"\n", b"\r\n"])).join(lines) + draw(st.sampled_from([b"\n", b"\n", b"", b"\n\n"]))


# ------------------------------------------------------------------------------- (a) the rows that stages hand over

folder = Path()                                # of the example, made anew by `fresh`


def fresh(world):
    """The world's small files in an empty folder."""
    for path in list(folder.iterdir()):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    for name in world:
        shutil.copy(WORLD / name, folder / name)


PROBLEM = {"pid": "p", "problem": "What is 1 + 1?", "answer": "2", "source": "x"}
SAMPLE = {"sid": "p:x:", "pid": "p", "source": "x", "k": 0, "seed": 1, "response": "</think>\\boxed{2}", "n_tokens": 17, "finish": "stop"}
SCORED = {**SAMPLE, "problem": "What?", "predicted": "2", "correct": True, "status": "ok", "nll_sum": 9.0, "n_scored": 10, "ppl": 2.5,
          "scorer": "m", "ppl_context": "response"}
TRAIN = {"sid": "p:x:", "pid": "p", "problem": "What?", "response": "a", "objective": "ce", "ppl": 2.5, "n_tokens": 2}
RESPONSE = {**SAMPLE, "predicted": "2", "correct": True, "status": "ok", "ids": [1, 2]}
# What a reader asks of a row: the constants of the stages, and how it tells rows apart.
READERS = [
    (PROBLEM, {"pid": str, "problem": str}, "pid"), (PROBLEM, {"pid": str, "problem": str, "answer": (str, list)}, "pid"),
    (SAMPLE, {"sid": str, "pid": str, "response": str, "n_tokens": int, "finish": str}, "sid"),
    (SCORED, {"sid": str, "pid": str, "n_tokens": int, "finish": str, "correct": (bool, type(None)),
              "ppl": (float, int, type(None))}, "sid"),
    (TRAIN, {"sid": str, "problem": str, "response": str, "objective": str}, "sid"),
    (RESPONSE, {"pid": str, "k": int, "response": str, "n_tokens": int, "finish": str, "status": str}, ("pid", "k")),
]


def finite(value) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, (list, dict)):
        return all(map(finite, value.values() if isinstance(value, dict) else value))
    return True


def check_rows(rows, fields, key):
    keys = [common.key_of(row, key) for row in rows]
    assert rows and len(set(keys)) == len(keys)
    for row in rows:
        assert all(type(row[name]) in (kinds if isinstance(kinds, tuple) else (kinds,)) for name, kinds in fields.items())
        assert finite(row), row
        json.dumps(row, ensure_ascii=False, allow_nan=False).encode()
        assert all(row[name].strip() for name in ("pid", "sid", "problem") if name in fields)
        assert "n_tokens" not in fields or row["n_tokens"] >= 1
        assert row.get("ppl") is None or "ppl" not in fields or row["ppl"] > 0.999
        assert "finish" not in fields or row["finish"] in ("stop", "length")
        golds = row["answer"] if isinstance(row.get("answer"), list) else [row.get("answer")]
        assert "answer" not in fields or golds and all(isinstance(gold, str) and gold.strip() for gold in golds)


reader_cases = st.sampled_from(READERS).flatmap(lambda r: st.tuples(st.just(r), files_of_rows(r[0], list(r[1]))))


def rows_are_read_or_refused(case):
    (_, fields, key), content = case
    path = folder / "rows.jsonl"
    path.write_bytes(content)
    rows, sentence = outcome(lambda: list(common.read_jsonl(path, fields, key)))
    if sentence:
        a_sentence(sentence, "rows.jsonl:", "rows.jsonl is empty")
    else:
        check_rows(rows, fields, key)


# In each the whole stage is run, as its command line has it; what it leaves is read by the stage behind it.
STAGES = {
    "problems": (PROBLEM, "01_sample.py problems --source in.jsonl --out out.jsonl"),
    "verify": (SAMPLE, "02_verify_score.py verify --samples in.jsonl --problems problems.jsonl --workers 1 --out out.jsonl"),
    "golds": (PROBLEM, "02_verify_score.py verify --samples samples.jsonl --problems in.jsonl --workers 1 --out out.jsonl"),
    "select": (SCORED, "02_verify_score.py select --arm oxa_mle --teacher in.jsonl --n-ce 3 --out out.jsonl"),
    "select_ul": (SCORED, "02_verify_score.py select --arm oxa_full --teacher scored.jsonl --self in.jsonl --n-ce 3 --n-ul 3 --out out.jsonl"),
    "show": (SCORED, "02_verify_score.py show --samples in.jsonl"),
    "grade": (RESPONSE, "05_eval.py --problems in.jsonl --out run --verify-workers 1 --regrade"),
}
NEXT = {"problems": (READERS[1][1], "pid"), "verify": (READERS[2][1], "sid"), "golds": (READERS[2][1], "sid"),
        "select": (READERS[4][1], "sid"), "select_ul": (READERS[4][1], "sid")}
SIDECAR = {"schema": "eval", "schema_version": 1, "args": {"model": "m", "instruction": "i", "temperature": 1.0}, "rows": None,
           "inputs": {}, "grader": "g"}


@st.composite
def stage_cases(draw):
    stage = draw(st.sampled_from(list(STAGES)))
    row = STAGES[stage][0]
    if stage == "golds":
        row = {**row, "pid": "p"}
    return stage, draw(files_of_rows(row)), draw(st.sampled_from([SIDECAR] * 3 + [{}]) | st.dictionaries(
        st.sampled_from(list(SIDECAR)), values, max_size=3).map(lambda x: {**SIDECAR, **x}))


def run_stage(words):
    script, *argv = words.split()
    module = importlib.import_module(script.removesuffix(".py"))
    with contextlib.chdir(folder):
        return outcome(lambda: common.run(lambda: module.main(argv)))


def a_stage_ends_as_meant(case):
    stage, content, sidecar = case
    fresh(("problems.jsonl", "samples.jsonl", "scored.jsonl"))
    words = STAGES[stage][1]
    path = folder / "in.jsonl"
    path.write_bytes(content)
    if stage == "grade":                       # the row is that of a response that is there
        (folder / "run").mkdir()
        path.rename(folder / "run/in.jsonl")
        (folder / "run/in.meta.json").write_text(json.dumps(sidecar))
        pids = {f"p{i}" for i in range(4)}
        path.write_text("".join(json.dumps({**PROBLEM, "pid": pid}) + "\n" for pid in sorted(pids)))
    _, sentence = run_stage(words)
    if sentence:
        a_sentence(sentence, "in.jsonl", "run/in", "samples.jsonl", "perplexities of different models")
        assert stage == "grade" or not (folder / "out.jsonl").exists() or stage in ("verify", "golds")
    elif stage in NEXT:
        fields, key = NEXT[stage]
        rows, sentence = outcome(lambda: list(common.read_jsonl(folder / "out.jsonl", fields, key)))
        assert not sentence, sentence
        check_rows(rows, fields, key)


# What the stages with a model do of their rows before it is loaded.
NEEDS = {"model": (PROBLEM, "01_sample"), "train": (TRAIN, "03_train_oxa"), "rlvr": (PROBLEM, "04_rlvr"), "score": (SCORED, "02_verify_score")}
prompt_cases = st.sampled_from(list(NEEDS)).flatmap(lambda stage: st.tuples(st.just(stage), files_of_rows(NEEDS[stage][0])))


def prompts_are_made_or_refused(case):
    stage, content = case
    fresh(())
    path = folder / "in.jsonl"
    path.write_bytes(content)
    module = importlib.import_module(NEEDS[stage][1])
    args = argparse.Namespace(
        problems=path, data=path, samples=path, model=str(WORLD / "model"), out=folder / "out", limit=0, max_prompt_tokens=3000, instruction=" Go.",
        max_tokens=3000, token_budget=3000, max_score_tokens=300, only="all", ppl_context="prompt", verify_workers=0)
    if stage == "model":
        made, sentence = outcome(module.read_prompts, args, tokenizer)
    elif stage == "train":
        made, sentence = outcome(module.tokenize, args, tokenizer, 4000)
    elif stage == "rlvr":
        made, sentence = outcome(module.usable_problems, path, tokenizer, args, 1, print)
    else:
        made, sentence = outcome(lambda: module.scored_sequences(tokenizer, list(module.rows_to_score(args)), args))
    if sentence:
        return a_sentence(sentence, "in.jsonl")
    if stage == "model":
        prompts = list(made[0].values())
    elif stage == "rlvr":
        prompts = [row["prompt_ids"] for row in made]
    else:
        prompts = []
    for ids in prompts:                        # of control tokens the template's three, whatever the problem holds
        assert [ids.count(tokenizer.convert_tokens_to_ids(mark)) for mark in ("<|im_start|>", "<|im_end|>", "<|endoftext|>")] == [2, 1, 0]


# ------------------------------------------------------------------------------------------- sources of all formats

SOURCE_ROWS = [
    ({"problem": "What is 1 + 1?", "answer": "2"}, "problem=problem answer=answer"),
    ({"prompt": [{"role": "user", "content": "What is 1?"}], "reward_model": {"ground_truth": "1", "style": "rule"}},
     "problem=prompt answer=reward_model.ground_truth"),
    ({"query": "What is 1?", "answer": "1", "r": ["<think>a</think>\\boxed{1}"]}, "problem=query answer=answer response=r"),
]


def as_csv(content: bytes) -> bytes:
    rows = [json.loads(line) for line in content.decode("utf-8", "replace").splitlines() if line.startswith("{")]
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(list(rows[0]) if rows else [])
    writer.writerows([list(map(str, row.values())) for row in rows])
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


FORMATS = {"s.jsonl": as_it_is, "s.json": as_array, "s.csv": as_csv, "s.parquet": as_parquet, "s.xyz": as_it_is, "s.json.gz": as_array}


@st.composite
def source_cases(draw):
    row, columns = draw(st.sampled_from(SOURCE_ROWS))
    content = draw(files_of_rows(row))
    name = draw(st.sampled_from(list(FORMATS)))
    try:
        content = FORMATS[name](content)
    except ValueError:                         # a line of junk
        pass
    cut = draw(st.sampled_from([None, None, None, len(content) // 2]))
    return name, content[:cut], columns


def a_source_is_read_or_refused(case):
    name, content, columns = case
    fresh(())
    content = gzip.compress(content) if name.endswith(".gz") else content
    (folder / name).write_bytes(content)
    if "response=" in columns:
        words = "teacher --model model --problems-out problems.jsonl"
    else:
        words = "problems"
    _, sentence = run_stage(f"01_sample.py {words} --source {name} --out out.jsonl --columns {columns}")
    if sentence:
        return a_sentence(sentence, name)
    path = folder / ("problems.jsonl" if "response=" in columns else "out.jsonl")
    rows, sentence = outcome(lambda: list(common.read_jsonl(path, READERS[1][1], "pid")))
    assert not sentence, sentence
    check_rows(rows, READERS[1][1], "pid")
    if "response=" in columns:
        rows, sentence = outcome(lambda: list(common.read_jsonl(folder / "out.jsonl", READERS[2][1], "sid")))
        assert not sentence and all(row["response"].strip() for row in rows), sentence


# ------------------------------------------------------------------------------------------ what a run finds of itself

own_files = st.tuples(st.sampled_from(["out.jsonl", "out.meta.json", "metrics.jsonl", "results.json"]), files_of_rows({**SAMPLE, "step": 1})
                      | junk_lines | st.dictionaries(st.sampled_from(list(SIDECAR)), values, max_size=4).map(lambda x: json.dumps(x).encode()))


def a_run_reads_its_own_files(case):
    name, content = case
    fresh(("problems.jsonl", "samples.jsonl"))
    (folder / name).write_bytes(content)
    if name == "metrics.jsonl":
        _, sentence = outcome(lambda: common.Metrics(folder, 1).writer.close())
    elif name == "results.json":
        _, sentence = outcome(importlib.import_module("05_eval").stored_results, folder)
    else:
        if name == "out.meta.json":
            (folder / "out.jsonl").write_text(json.dumps({**SCORED, "sid": "p0:x:0", "pid": "p0"}) + "\n")
        _, sentence = run_stage(STAGES["verify"][1].replace("in.jsonl", "samples.jsonl"))
    if sentence:
        a_sentence(sentence, name, "out.jsonl")


# ------------------------------------------------------------------------------------------------------ (b) recipes

PARSERS = {
    "problems": ("01_sample", "problems --source s --out o"), "teacher": ("01_sample", "teacher --source s --model m --out o"),
    "sample": ("01_sample", "model --model m --problems p --out o"), "verify": ("02_verify_score", "verify --samples s --problems p --out o"),
    "score": ("02_verify_score", "score --samples s --model m --out o"), "select": ("02_verify_score", "select --arm sft --teacher t --out o"),
    "train": ("03_train_oxa", "--model m --data d --out o"), "rlvr": ("04_rlvr", "--model m --problems p --out o"),
    "eval": ("05_eval", "--problems p --out o"), "prepare-base": ("tools.prepare_base", "--model m --out o"), "report": ("tools.report", "r"),
}
GOOD_RUN = {"world": "easy", "world_base": "base", "arms": ["sft", "oxa_full"], "rlvr_arms": ["sft"], "benchmarks": ["id"], "n_seeds": 2}


def toml(value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(name))} = {toml(x)}" for name, x in value.items()) + "}"
    return json.dumps(value if isinstance(value, str) else "none")


toml_values = st.one_of(values.map(toml), st.integers(-3, 5).map(str), st.floats(-2, 2).map(str), st.sampled_from(
    ["nan", "inf", "-inf", "1979-05-27", "07:32:00", "true", "false", '"false"', "'''a\nb'''", "0x10", "1e400", "9" * 30, "'$(touch x)'", "'a;b'",
     '"\\u001b[31m"', "[1, 'a']", "[]", "{}", "{a.b = 1}", "''"]))


def flags_of(section):
    name, words = PARSERS[section]
    parsers = []

    def keep(parser, *args, **options):
        parsers.append(parser)
        raise SystemExit(0)
    module = importlib.import_module(name)
    kept, common.parse_args = common.parse_args, keep
    try:
        module.parse_args(words.split())
    except SystemExit:
        pass
    finally:
        common.parse_args = kept
    parser = parsers[0].commands.get(words.split()[0], parsers[0])
    return sorted(parser.flags)


@st.composite
def recipes(draw):
    section = draw(st.sampled_from([*PARSERS, "run", "run"]))
    if section == "run":
        names = list(shell_recipe.RUN)
    else:
        names = flags_of(section)
    run = {name: toml(value) for name, value in GOOD_RUN.items()}
    mine = run if section == "run" else {}
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from(names) | st.sampled_from(["", "a b", "first_seed", "x\x1b[31m", "run", "from"]))
        mine[name] = draw(toml_values)
    parts = {"run": run, section: mine}
    lines = [draw(st.sampled_from([""] * 9 + ["from = 'r'", "from = 3", "from = '../r'", "x = 1"]))]
    for name, keys in parts.items():
        lines.append(draw(st.sampled_from([f"[{name}]"] * 12 + [f"[[{name}]]", f"[{name}.x]", f"['{name} ']", "[trian]"])))
        lines += [f"{json.dumps(key)} = {value}" for key, value in keys.items()]
    text = "\n".join(lines)
    return section, draw(st.sampled_from([text] * 15 + [text[:-3], text + "\n[", text.replace("=", ":", 1)])).encode("utf-8", "surrogatepass")


def a_recipe_is_read_or_refused(case):
    section, content = case
    fresh(())
    path = folder / "r.toml"
    path.write_bytes(content)
    sections, sentence = outcome(common.load_recipe, path)
    for_shell, shell_sentence = outcome(shell_recipe.load_recipe, path)
    assert repr(sections) == repr(for_shell) and sentence == shell_sentence
    if sentence:
        return a_sentence(sentence, "r.toml")
    lines, sentence = outcome(lambda: list(shell_recipe.settings(sections)))
    if sentence:
        a_sentence(sentence, "[run]")
    else:
        for key, value in lines:
            assert f"{key}{value}".isprintable() and len(str(value)) < 10**6, (key, value)
    if section in PARSERS:
        name, words = PARSERS[section]
        module = importlib.import_module(name)
        args, sentence = outcome(module.parse_args, [*words.split(), "--recipe", str(path)])
        if sentence:
            return a_sentence(sentence, "r.toml", "--", "usage")
        assert all(finite(value) for value in vars(args).values()), args


# --------------------------------------------------------------------------------------------- (c) answers

PIECES = r"""\frac \dfrac12 {1} {2} 1 2 3 12 0 -1 7.5 .5 1e3 x y n e i \pi \sqrt \sqrt[3] ^ _ ^2 _1 ( ) [ ] { } \{ \} | \left( \right) + - \cdot * / \div = < >
\le \ge \ne \in \approx , ; : \ldots \cup \pm \mp ! % ° ^\circ \text{cm} \text{ and } \text{or} \text{Alice} \begin{pmatrix} \end{pmatrix} & \\ \int \int_0^1 dx
\sum_{n=1}^{9} \prod \binom{n}{2} \sin \cos \ln \log_2 f(x) f(0) \infty \emptyset \mathbb{R} \overline{3} 0.\overline{3} 1\frac{4}{5} 12,345 (A) (B) 3:00 p.m. \$ $ \%
\boxed{ \fbox{1} </think> <think> \mod 7 \pmod{7} \lfloor \rfloor \forall \quad '' ' ² ½ × − “ \displaystyle \phantom{x} \cases \vec{v} \angle a.m. for all x where c is a constant""".split(" ")
PIECES = [piece for line in PIECES for piece in line.split("\n")] + ["\u202e", "\x1b", "\ud800", "\x00", "１２", "\u0301", "𝟙", "٣"]
answers = st.lists(st.sampled_from(PIECES) | st.text(max_size=2), min_size=1, max_size=14).map(lambda x: "".join(x)) | st.lists(
    st.sampled_from(PIECES), min_size=1, max_size=8).map(" ".join)
repeated = st.tuples(st.lists(st.sampled_from(PIECES), min_size=1, max_size=3).map("".join), st.sampled_from([20, 100, 700])).map(lambda x: (x[0] * x[1])[:1990])
GOLDS = [case["gold"] for case in map(json.loads, (Path(__file__).parent / "verifier_cases.jsonl").read_text().splitlines())]
GOLDS = sorted({gold for gold in GOLDS if isinstance(gold, str) and len(gold) < 80})


@st.composite
def changed_golds(draw):
    """A gold of the labelled cases with pieces put in, taken out or joined to another's end."""
    text = draw(st.sampled_from(GOLDS))
    for _ in range(draw(st.integers(1, 3))):
        i, j = sorted([draw(st.integers(0, len(text))), draw(st.integers(0, len(text)))])
        piece = draw(st.sampled_from(PIECES))
        text = draw(st.sampled_from([text[:i] + piece + text[i:], text[:i] + text[j:], text[:j] + text[i:], text[:i] + draw(st.sampled_from(GOLDS))[i:]]))
    return text


STATUSES = {"ok", "no_think_end", "no_box", "unbalanced_box", "empty_box", "too_long", "unparsed", "undefined", "too_big", "gold_unparsed", "unknown"}


def boxed(text):
    return f"<think>a</think>\\boxed{{{text}}}"


def judged(response, gold):
    start = time.process_time()
    with time_limit():
        verdict = verifier.verify(response, gold)
    seconds = time.process_time() - start
    assert seconds < 2, (seconds, response, gold)
    assert verdict.status in STATUSES and verdict.correct in (True, False, None), verdict
    assert (verdict.correct is None) == (verdict.status in ("gold_unparsed", "unknown")), verdict
    assert verdict.status == "ok" or verdict.correct is not True
    return verdict


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
            spaced = judged(boxed(rf"\displaystyle {predicted}\,"), predicted)
            assert spaced.correct is not False or spaced.status == "too_long", spaced
    verifier.unreadable_golds([gold, [text, gold]], workers=0)


def known(gold) -> bool:
    return not verifier.unreadable_golds([gold], workers=0)


# Values only: what is named, lettered, related or rounded asks for more as a gold than as an answer.
leaves = st.sampled_from(["1", "2", "3", "10", "0.5", "7", "x", "y", r"\pi", r"\sqrt{2}", "n", "-4"])


def grown(inner):
    two = st.tuples(inner, inner)
    return st.one_of(
        two.map(lambda p: f"({p[0]})+({p[1]})"), two.map(lambda p: f"({p[0]})-({p[1]})"), two.map(lambda p: rf"({p[0]})\cdot ({p[1]})"),
        two.map(lambda p: rf"\frac{{{p[0]}}}{{{p[1]}}}"), inner.map(lambda p: rf"\sqrt{{{p}}}"), inner.map(lambda p: f"({p})^2"),
        two.map(lambda p: f"({p[0]})^{{{p[1]}}}"), inner.map(lambda p: rf"\sin({p})"), inner.map(lambda p: f"|{p}|"), inner.map(lambda p: rf"\ln({p})"))


expressions = st.recursive(leaves, grown, max_leaves=6)
structures = st.one_of(expressions, st.lists(expressions, min_size=2, max_size=3).flatmap(lambda x: st.sampled_from(
    ["({})", r"\{{{}\}}", "{}", "[{}]", r"\begin{{pmatrix}}{}\end{{pmatrix}}", r"[{}) \cup (50, 60)"]).map(
        lambda form: form.format((r" \\ " if "matrix" in form else ", ").join(x)))))


def judging_is_symmetric(case):
    """Two values are equal either way round, or cannot be told apart; another spelling of one is not another value."""
    a, b = case
    for spelling in (a.replace(r"\frac", r"\dfrac"), rf"\displaystyle {a} ", f"${a}$", f"{{{a}}}", re.sub("([()])", r"\1 ", a)):
        verdict = judged(boxed(spelling), a)
        assert verdict.correct is not False or not known(a), (spelling, a, verdict)
    forth, back = judged(boxed(a), b).correct, judged(boxed(b), a).correct
    if not hides_a_variable(a) and not hides_a_variable(b):
        assert {forth, back} != {True, False}, (a, b, forth, back)


def hides_a_variable(text) -> bool:
    """0x and 1^x: for the gold 0 or 1 no answer, since words are read as products (`vanishes` in values.py)."""
    try:
        return any(map(vanishes, verifier.understand(normalise(text)).trees))
    except (*verifier.FAILURES, Unknown):
        return False


# --------------------------------------------------------------------------------------------- short and long

PROPERTIES = {
    rows_are_read_or_refused: reader_cases,
    prompts_are_made_or_refused: prompt_cases,
    a_stage_ends_as_meant: stage_cases(),
    a_source_is_read_or_refused: source_cases(),
    a_run_reads_its_own_files: own_files,
    a_recipe_is_read_or_refused: recipes(),
    judging_is_total: st.tuples(answers, answers | repeated | changed_golds(), answers | repeated | changed_golds() | changed_golds()),
    judging_is_symmetric: st.tuples(structures, structures),
}
SHORT = {rows_are_read_or_refused: 150, prompts_are_made_or_refused: 60, a_stage_ends_as_meant: 60, a_source_is_read_or_refused: 60, a_run_reads_its_own_files: 40,
         a_recipe_is_read_or_refused: 80, judging_is_total: 100, judging_is_symmetric: 60}
WORLD = Path()
tokenizer = None


@pytest.fixture(scope="module", autouse=True)
def places(tmp_path_factory):
    """The folder of the examples; the tokenizer, which all of them share, is loaded once."""
    global folder, WORLD, tokenizer
    WORLD = tmp_path_factory.mktemp("fuzz_world")
    make_world(WORLD)
    folder = tmp_path_factory.mktemp("fuzz")
    tokenizer = model.load_tokenizer(str(WORLD / "model"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("01_sample"), "load_tokenizer", lambda *args, **options: tokenizer)
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


def examples(function, strategy, n, **options):
    """`n` examples of the property."""
    def counted(case):
        counts[function.__name__] += 1
        function(case)
    chosen = settings(max_examples=n, deadline=None, database=None, suppress_health_check=list(HealthCheck), **options)
    return chosen(given(strategy)(counted))


@pytest.mark.slow
@pytest.mark.parametrize("function", PROPERTIES, ids=lambda function: function.__name__)
def test_a_few_examples(function):
    examples(function, PROPERTIES[function], SHORT[function], derandomize=True)()


@pytest.mark.faults
def test_examples_for_minutes():
    """FUZZ_MINUTES of new examples, in rounds: SEED is the first round's, the next has the next."""
    first, minutes = int(os.environ.get("SEED", 0)), float(os.environ.get("FUZZ_MINUTES", 5))
    end, number = time.monotonic() + 60 * minutes, first
    findings = []
    while time.monotonic() < end:
        for function, strategy in PROPERTIES.items():
            round_ = seed(number)(examples(function, strategy, 2 * SHORT[function], phases=[Phase.generate, Phase.shrink],
                                           report_multiple_bugs=False))
            try:
                round_()
            except (Exception, Hung) as error:
                findings.append(f"seed {number}, {function.__name__}: {error!r}\n" + "\n".join(getattr(error, "__notes__", [])))
                print(findings[-1], flush=True)
        number += 1
        total = sum(counts[function.__name__] for function in PROPERTIES)
        print(f"seeds {first} to {number - 1}: {total:,} examples {dict(counts)}, {len(findings)} findings", flush=True)
    assert not findings, "\n\n".join(findings)
