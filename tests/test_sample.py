"""01_sample.py and tools/prepare_base.py: every declared source and format, wrong shapes, the
instruction, resume, overlap with benchmarks."""

import csv
import gzip
import importlib
import io
import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_model

import common
from grading.verifier import verify
from model import INSTRUCTION, encode_response, load_tokenizer, render_prompt, stop_ids
from tools import prepare_base

sample = importlib.import_module("01_sample")


def run(*args, ranks=1):
    """01_sample.py in a process of its own, or under torchrun in several. -> CompletedProcess"""
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone",
                    f"--nproc_per_node={ranks}", "--"]
    command += [ROOT / "01_sample.py", *map(str, args)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)


def inside(capsys, *args, main=sample.main):
    """What a command prints, run within this process (torch is imported once)."""
    capsys.readouterr()
    main([str(arg) for arg in args])
    printed = capsys.readouterr()
    return printed.out + printed.err


def refused(capsys, *args, main=sample.main):
    """What is printed by a command that must end with code 2 and one sentence, no traceback."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in args])
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert printed.err.strip().count("\n") == 0, printed.err
    return printed.out + printed.err


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(path, rows):
    from datasets import Dataset  # takes seconds to import: only where it is needed
    Dataset.from_list(rows).to_parquet(path)
    return path


def rows_of(path):
    return [json.loads(line) for line in open(path)]


def column(path, name):
    """One field of every row of a file."""
    return [row[name] for row in rows_of(path)]


def pairs_of(path):
    """(problem, answer) of every row of a file."""
    return [(row["problem"], row["answer"]) for row in rows_of(path)]


def questions(pairs):
    """Rows of (problem, answer), with the columns of the source minerva."""
    return [{"question": problem, "answer": answer} for problem, answer in pairs]


def sums(n):
    """The (problem, answer) that `rows_like` puts into the columns of a source."""
    return [(f"What is {i} + 1?", str(i + 1)) for i in range(n)]


def rows_like(name, n=3):
    """Rows with exactly the columns of a declared source."""
    return [row_like(name, i, *pair) for i, pair in enumerate(sums(n))]


def row_like(name, i, problem, answer):
    source = sample.SOURCES[name]
    row = {unused: f"{unused} {i}" for unused in source.unused}

    row[source.problem] = problem
    if source.problem == "prompt":
        row["prompt"] = [{"content": problem, "role": "user"}]

    if source.answer == "reward_model.ground_truth":
        row["reward_model"] = {"ground_truth": answer, "style": "rule"}
    elif source.solution_mark:
        row[source.answer] = f"{i} and 1 are {i}+1=<<{i}+1={answer}>>{answer}.\n#### {answer}"
    elif source.answer:
        row[source.answer] = answer

    if source.response and not source.solution_mark:
        response = f"<think>\n{i}+1</think>\\boxed{{{answer}}}"
        without_think = f"adding</think> \\boxed{{{answer}}}"
        is_list = name.startswith("oxa")
        row[source.response] = [response, without_think] if is_list else response
    if source.where:
        name_of_column, value = source.where
        row[name_of_column] = value
    return row


def without(rows, name):
    """The rows without one of their columns."""
    rows = [dict(row) for row in rows]
    for row in rows:
        del row[name]
    return rows


def save_as(kind, rows, path):
    """The rows as a file or a directory of one kind. -> its path"""
    if kind == "jsonl":
        return write(path.with_suffix(".jsonl"), rows)
    if kind == "parquet":
        return write_parquet(path.with_suffix(".parquet"), rows)
    if kind == "parquet_dir":
        path.mkdir()
        write_parquet(path / "train-00000-of-00001.parquet", rows)
        return path
    from datasets import Dataset, DatasetDict
    table = Dataset.from_list(rows)
    if kind == "saved_dict":
        table = DatasetDict({"train": table, "test": table.select([0])})
    table.save_to_disk(path)
    return path


# ------------------------------------------------------------------------------------------ sources

PROBLEM_SETS = [name for name, source in sample.SOURCES.items()
                if source.response is None or source.solution_mark]
TRACES = [name for name, source in sample.SOURCES.items() if source.response is not None]


def test_declared_sources_are_told_apart_by_their_columns():
    """Two sources of one shape: the second would be read as the first."""
    shapes = set()
    for name, source in sample.SOURCES.items():
        shapes.add((frozenset(sample.all_columns(source)), source.solution_mark))
        unnamed = Namespace(format=None, source="file")
        assert sample.declared_name(unnamed, rows_like(name)[0]) == name
    assert len(shapes) == len(sample.SOURCES)


@pytest.mark.parametrize("name", PROBLEM_SETS)
def test_problem_set_is_recognised_and_wrong_shapes_are_refused(name, tmp_path, capsys):
    """A column that is missing or new is named; nothing is guessed, nothing written."""
    source = sample.SOURCES[name]
    rows = rows_like(name)
    good = write(tmp_path / "good.jsonl", rows)
    made = tmp_path / "p.jsonl"
    said = inside(capsys, "problems", "--source", good, "--out", made)
    assert f"read as {name} " in said
    assert pairs_of(made) == sums(3)
    assert column(made, "source") == ["good"] * 3
    assert common.read_meta(made)["rows"] == 3
    if name != "problems":
        pids = column(made, "pid")
        assert pids[0] == sample.problem_id("What is 0 + 1?")
        assert len(set(pids)) == 3

    # the column of answers is missing
    out = tmp_path / "x.jsonl"
    lost = sample.column_of(source.answer)
    bad = write(tmp_path / "lost.jsonl", without(rows, lost))
    said = refused(capsys, "problems", "--source", bad, "--format", name, "--out", out)
    assert f"lacks ['{lost}']" in said
    assert source.problem in said

    # a column is new: with --format, then without
    bad = write(tmp_path / "more.jsonl", [{**row, "surprise": 1} for row in rows])
    said = refused(capsys, "problems", "--source", bad, "--format", name, "--out", out)
    assert "should not have ['surprise']" in said
    assert "--columns" in said
    said = refused(capsys, "problems", "--source", bad, "--out", out)
    assert "no declared source" in said
    assert not out.exists()


@pytest.mark.parametrize("name", TRACES)
def test_teacher_traces_and_their_wrong_shapes(name, tmp_path, tiny_model_dir, tiny_tokenizer,
                                               capsys):
    """Every response is a row that begins with <think>, and leads to its problem's row."""
    rows = rows_like(name)
    source = sample.SOURCES[name]
    good = write(tmp_path / "t.jsonl", rows)
    out = tmp_path / "teacher.jsonl"
    problems = tmp_path / "problems.jsonl"
    model = ["--model", tiny_model_dir]
    answers = ["--answers", "column"]
    if source.answer is None:
        said = refused(capsys, "teacher", "--source", good, *model, "--out", out)
        assert "no column of answers" in said
        known = write_known(tmp_path / "known.jsonl")
        answers = ["--answers", "join", "--problems", known]

    inside(capsys, "teacher", "--source", good, *model, "--out", out,
           "--problems-out", problems, *answers)
    made = rows_of(out)
    per_problem = 2 if name.startswith("oxa") else 1
    assert len(made) == 3 * per_problem
    assert column(problems, "answer") == ["1", "2", "3"]
    assert set(column(out, "pid")) == set(column(problems, "pid"))
    for row in made:
        assert row["sid"] == f"{row['pid']}:t:{row['k']}"
        assert row["response"].startswith("<think>\n")
        assert row["finish"] == "stop"
    assert made[0]["n_tokens"] == len(encode_response(tiny_tokenizer, made[0]["response"]))

    bad = write(tmp_path / "bad.jsonl", without(rows, source.response))
    said = refused(capsys, "teacher", "--source", bad, "--format", name, *model,
                   "--out", tmp_path / "x.jsonl", *answers)
    assert f"lacks ['{source.response}']" in said


def write_known(path):
    """Problems rows with the answers of `sums`, for --answers join."""
    rows = []
    for problem, answer in sums(3):
        rows.append({"pid": sample.problem_id(problem), "problem": problem, "answer": answer,
                     "source": "x"})
    return write(path, rows)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "parquet_dir", "saved", "saved_dict"])
def test_local_formats_give_the_same_rows(kind, tmp_path, capsys):
    path = save_as(kind, rows_like("deepscaler", 5), tmp_path / "data")
    inside(capsys, "problems", "--source", path, "--name", "d", "--out", tmp_path / "p.jsonl")
    assert pairs_of(tmp_path / "p.jsonl") == sums(5)


def test_sources_that_cannot_be_opened(tmp_path, capsys):
    """Each says what is wrong: no file, no network, nothing in the directory, no such split."""
    empty = tmp_path / "empty"
    empty.mkdir()
    saved = save_as("saved_dict", rows_like("minerva"), tmp_path / "d")
    for source, flags, sentence in [
            (tmp_path / "nothing.jsonl", [], "no such file"),
            ("data/nothing.parquet", [], "no such file"),
            ("nobody/nothing-here", [], "cannot be opened"),
            (empty, [], "neither"),
            (saved, ["--split", "validation"], "not validation")]:
        said = refused(capsys, "problems", "--source", source, *flags,
                       "--out", tmp_path / "x.jsonl")
        assert sentence in said


def test_rows_that_change_shape_half_way(tmp_path, capsys):
    """Only the first row is held against the declared columns, but each later one is read."""
    path = tmp_path / "m.jsonl"
    rows = rows_like("minerva")
    del rows[2]["answer"]
    write(path, rows)
    said = refused(capsys, "problems", "--source", path, "--out", tmp_path / "x.jsonl")
    assert "m.jsonl:3: no column answer" in said

    rows[2] = {"question": ["not text"], "answer": "1"}
    write(path, rows)
    said = refused(capsys, "problems", "--source", path, "--out", tmp_path / "x.jsonl")
    assert "m.jsonl:3: question is a list" in said


def test_named_columns_only_acereason_maths_and_boxed_answers(tmp_path, tiny_model_dir, capsys):
    # --columns: other columns are ignored, a row without an answer is counted
    path = write(tmp_path / "q.jsonl", [{"q": "1+1?", "a": 2, "uuid": "u"},
                                        {"q": "2+2?", "a": None, "uuid": "v"}])
    said = inside(capsys, "problems", "--source", path, "--out", tmp_path / "p.jsonl",
                  "--columns", "problem=q", "answer=a")
    assert column(tmp_path / "p.jsonl", "answer") == ["2"]
    assert "1 without an answer" in said
    said = refused(capsys, "problems", "--source", path, "--out", tmp_path / "x.jsonl",
                   "--columns", "text=q")
    assert "--columns takes" in said

    # --answers boxed, of the rows on maths
    rows = rows_like("acereason", 4)
    rows[1]["category"] = "code"
    rows[2]["output"] = "<think>no answer"
    path = write(tmp_path / "ace.jsonl", rows)
    said = inside(capsys, "teacher", "--source", path, "--answers", "boxed",
                  "--model", tiny_model_dir, "--out", tmp_path / "t.jsonl",
                  "--problems-out", tmp_path / "tp.jsonl")
    assert column(tmp_path / "tp.jsonl", "answer") == ["1", "4"]
    assert "1 without an answer" in said


def test_duplicates_limit_and_recipe(tmp_path, capsys):
    """White space makes no new problem; --limit draws by the seed; a recipe sets it too."""
    path = write(tmp_path / "m.jsonl", questions([
        ("What  is 1?", "1"), ("What is 1?\n", "1"), ("What is 1?", "one"),
        ("b", "2"), ("c", "3"), ("d", "4")]))
    said = inside(capsys, "problems", "--source", path, "--out", tmp_path / "p.jsonl")
    assert "2 duplicates (dropped), 1 duplicates with another answer" in said
    assert len(rows_of(tmp_path / "p.jsonl")) == 4

    chosen = []
    for seed in (1, 1, 2, 3, 4):
        inside(capsys, "problems", "--source", path, "--out", tmp_path / "l.jsonl",
               "--limit", 2, "--seed", seed)
        chosen.append(tuple(column(tmp_path / "l.jsonl", "problem")))
        assert len(chosen[-1]) == 2
    assert chosen[0] == chosen[1]
    assert len(set(chosen)) > 1

    recipe = tmp_path / "r.toml"
    recipe.write_text("[problems]\nlimit = 3\n")
    inside(capsys, "problems", "--recipe", recipe, "--source", path, "--out", tmp_path / "r.jsonl")
    assert len(rows_of(tmp_path / "r.jsonl")) == 3


def test_an_output_is_no_input_and_no_other_output(tmp_path, tiny_model_dir, capsys):
    """A path given twice by mistake must not cost the user's data."""
    path = write(tmp_path / "t.jsonl", rows_like("oxa_answer"))
    out = tmp_path / "o.jsonl"
    before = path.read_bytes()
    teacher = ["teacher", "--source", path, "--model", tiny_model_dir]
    said = refused(capsys, *teacher, "--out", path)
    assert "is an input of this command" in said
    said = refused(capsys, *teacher, "--out", out, "--problems-out", path)
    assert "is an input" in said
    said = refused(capsys, *teacher, "--out", out, "--problems-out", out)
    assert "are the same file" in said
    assert path.read_bytes() == before

    path = write(tmp_path / "m.jsonl", rows_like("minerva"))
    said = refused(capsys, "problems", "--source", path, "--out", path)
    assert "is an input" in said


def test_other_weights_at_the_same_path_are_noticed(tmp_path, problem_file, capsys):
    model = tmp_path / "model"
    make_model(model)
    args = ["model", "--model", model, "--problems", problem_file, "--n", 1, "--max-tokens", 4,
            "--engine", "hf", "--out", tmp_path / "o.jsonl"]
    inside(capsys, *args)
    make_model(model, seed=1)
    assert "the contents of" in refused(capsys, *args)


def test_teacher_import_goes_on_where_it_was_killed(tmp_path, tiny_model_dir, capsys):
    """Half an output, its last row cut, is completed to the same bytes; not under other flags."""
    path = write(tmp_path / "t.jsonl", rows_like("oxa_answer", 6))
    out = tmp_path / "o.jsonl"
    problems = tmp_path / "p.jsonl"
    args = ["teacher", "--source", path, "--model", tiny_model_dir, "--out", out,
            "--problems-out", problems]
    inside(capsys, *args)
    whole = out.read_bytes()
    whole_problems = problems.read_bytes()
    out.write_bytes(whole[:len(whole) // 2])
    inside(capsys, *args)
    assert out.read_bytes() == whole
    assert problems.read_bytes() == whole_problems
    assert "begun with other settings" in refused(capsys, *args, "--limit", 2)


# ------------------------------------------------------------------------------------------ formats


def save_text(rows, path):
    """JSON Lines, a JSON array or CSV, each plain or as .gz, by the name of `path`."""
    if ".csv" in path.suffixes:
        table = io.StringIO()
        writer = csv.DictWriter(table, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        text = table.getvalue()
    elif path.name.startswith("array"):
        text = json.dumps(rows, indent=2)
    else:                                        # a BOM, CRLF, no line break at the end
        text = "\ufeff" + "\r\n".join(json.dumps(row) for row in rows)
    open_text = gzip.open if path.suffix == ".gz" else open
    with open_text(path, "wt") as file:
        file.write(text)
    return path


@pytest.mark.parametrize("name", [
    "lines.jsonl", "lines.json", "array.json", "array.jsonl.gz", "lines.json.gz", "table.csv",
    "table.csv.gz"])
def test_text_formats_give_the_same_rows(name, tmp_path, capsys):
    pairs = [(f"What, with \"{i}\"\nand a line break?", str(i)) for i in range(4)]
    path = save_text(questions(pairs), tmp_path / name)
    inside(capsys, "problems", "--source", path, "--out", tmp_path / "p.jsonl")
    assert pairs_of(tmp_path / "p.jsonl") == pairs
    assert column(tmp_path / "p.jsonl", "source")[0] == name.split(".")[0]


def test_a_format_that_is_not_read_is_said(tmp_path, capsys):
    for name, sentence in [
            ("data.xyz", ".xyz is not"),
            ("data.xyz.gz", ".xyz.gz is not"),
            ("data", "without a suffix is not"),
            ("data.parquet.gz", ".parquet.gz is not"),
            ("data.xlsx", ".xlsx is not a format that is read (known: ")]:
        path = tmp_path / name
        path.write_text("x")
        said = refused(capsys, "problems", "--source", path, "--out", tmp_path / "x.jsonl")
        assert sentence in said


ROW = b'{"question": "a", "answer": "1"}'
NESTED = b"[" * 10**5 + b"]" * 10**5

# Name of a file -> its content, what is said after its name.
BROKEN = {
    "cut.jsonl.gz": (gzip.compress((ROW + b"\n") * 100)[:40], " cannot be read"),
    "plain.jsonl.gz": (ROW + b"\n", " cannot be read"),
    "zip.jsonl": (gzip.compress(b"{}"), ":1: not valid JSON"),
    "utf16.jsonl": (ROW.decode().encode("utf-16"), ":1: not valid JSON"),
    "latin.jsonl": (ROW + b'\n{"question": "\xe9", "answer": "1"}', ":2: not valid"),
    "deep.jsonl": (b'{"question": ' + NESTED + b"}", ":1: not valid JSON"),
    "huge.jsonl": (b'{"question": "a", "answer": ' + b"9" * 5000 + b"}", ":1: not valid JSON"),
    "cut.json": (b"[" + ROW + b",", ": not valid JSON"),
    "list.jsonl": (ROW + b"\n[1]\n", ":2: a row must be a JSON object"),
    "lists.json": (b"[[1], [2]]", ", row 1: a row must be a JSON object"),
    "empty.jsonl": (b"", " has no rows"),
    "empty.csv": (b"", " has no rows"),
    "empty.json": (b"[]", " has no rows"),
    "short.csv": (b"question,answer\na,1\nb\n", ":3: not the 2 cells"),
    "long.csv": (b"question,answer\na,1,2\n", ":2: not the 2 cells"),
    "twice.csv": (b"question,question\na,1\n", ":1: a column is named twice"),
    "quote.csv": (b'question,answer\n"a,1\n', " cannot be read"),
    "latin.csv": (b"question,answer\na\xe9,1\n", " cannot be read"),
    "garbage.parquet": (b"PAR1" + bytes(100) + b"PAR1", " cannot be read"),
    "no.parquet": (b"", " cannot be read"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_one_sentence(name, tmp_path, capsys):
    content, sentence = BROKEN[name]
    path = tmp_path / name
    path.write_bytes(content)
    said = refused(capsys, "problems", "--source", path, "--out", tmp_path / "x.jsonl")
    assert name + sentence in said
    assert not (tmp_path / "x.jsonl").exists()


def test_parquet_of_one_split_and_of_one_directory(tmp_path, capsys):
    """Files of other splits beside it are not read; two configurations are not mixed."""
    hub = tmp_path / "hub"
    write_parquet(hub / "train-0.parquet", questions([("train-0", "1")]))
    write_parquet(hub / "test-0.parquet", questions([("test-0", "2")]))
    args = ["problems", "--source", hub, "--out"]
    inside(capsys, *args, tmp_path / "p.jsonl")
    assert column(tmp_path / "p.jsonl", "answer") == ["1"]
    inside(capsys, *args, tmp_path / "p.jsonl", "--split", "test")
    assert column(tmp_path / "p.jsonl", "answer") == ["2"]

    said = refused(capsys, *args, tmp_path / "x.jsonl", "--split", "dev")
    assert "no parquet file of the split dev" in said
    write_parquet(hub / "socratic" / "train-0.parquet", questions([("c", "3")]))
    said = refused(capsys, *args, tmp_path / "x.jsonl")
    assert "several directories" in said


def test_hub_ids_with_a_dot_are_hub_ids(tmp_path, capsys):
    """`OXA-AceReason-1.1-Math` has no suffix that names a format."""
    for source in ("takagi97/OXA-AceReason-1.1-Math", "nvidia/AceReason-1.1-SFT", "openai/gsm8k"):
        said = refused(capsys, "problems", "--source", source, "--out", tmp_path / "x.jsonl")
        assert "cannot be opened" in said


# ------------------------------------------------------- the authors' files, GSM8K, the instruction

SUFFIX = "\nLet's reason. Put it within \\boxed{}: <think>reasoning</think> \\boxed{answer}."


def chat_rows(pairs, space=" "):
    """Rows of (problem, answer) in the layout of the RL file: a chat that ends in SUFFIX."""
    rows = []
    for i, (problem, answer) in enumerate(pairs):
        rows.append({"data_source": "",
                     "prompt": [{"content": problem + space + SUFFIX, "role": "user"}],
                     "ability": "math",
                     "reward_model": {"ground_truth": answer, "style": "rule"},
                     "extra_info": {"index": i, "split": "train"}})
    return rows


def trace_row(problem, responses):
    """A row with the columns of the source oxa_answer."""
    return {"query": problem, "answer": "1", "DeepSeek-R1_Response_List": responses}


def test_the_rl_file_gives_all_its_rows_and_its_instruction(tmp_path, capsys):
    """Chat-list prompts and struct answers; duplicates are kept under pids of their own, and
    counted. In the layout of verl they are dropped."""
    pairs = [("What is 1?", "1"), ("Is $x$ it", "x"), ("What is  1?", "1"), ("What is 1?", "one\n")]
    rows = [{**row, "prompt_token_len": 9} for row in chat_rows(pairs)]
    rl_file = write_parquet(tmp_path / "rl.parquet", rows)
    out = tmp_path / "p.jsonl"
    said = inside(capsys, "problems", "--source", rl_file, "--out", out)
    assert "read as oxa_rl" in said
    assert "all problems end in one text" in said
    assert repr(SUFFIX) in said
    assert "4 rows, 2 duplicates (kept), 1 duplicates with another answer, 4 kept" in said
    meta = common.read_meta(out)
    assert meta["instruction"] == SUFFIX
    assert meta["rows"] == 4
    prompts = [problem + meta["instruction"] for problem in column(out, "problem")]
    assert prompts == [row["prompt"][0]["content"] for row in rows]
    one = sample.problem_id("What is 1?")
    assert column(out, "pid") == [one, sample.problem_id("Is $x$ it"), f"{one}-2", f"{one}-3"]
    assert column(out, "answer") == ["1", "x", "1", "one"]

    verl = write_parquet(tmp_path / "verl.parquet", chat_rows(pairs, space=""))
    out = tmp_path / "v.jsonl"
    said = inside(capsys, "problems", "--source", verl, "--out", out)
    assert "read as verl" in said
    assert "2 duplicates (dropped)" in said
    assert common.read_meta(out)["instruction"] == SUFFIX                      # the same in both

    out = tmp_path / "k.jsonl"
    inside(capsys, "problems", "--source", verl, "--keep-instruction", "--out", out)
    problems = column(out, "problem")
    assert problems
    assert all(problem.endswith(SUFFIX) for problem in problems)
    assert common.read_meta(out)["instruction"] is None


def test_lists_of_alternatives_lose_their_line_breaks(tmp_path, capsys):
    rows = []
    for i, answer in enumerate([["0.01\n", "0.02\n"], ["7\n", "7"], ["x"]]):
        rows.append({"idx": i, "problem": f"p {i}", "solution": "", "type": "t", "answer": answer})
    path = save_text(rows, tmp_path / "array.json")
    said = inside(capsys, "problems", "--source", path, "--out", tmp_path / "p.jsonl")
    assert "read as oxa_minerva" in said
    assert column(tmp_path / "p.jsonl", "answer") == [["0.01", "0.02"], ["7", "7"], ["x"]]


def test_gsm8k_as_problems_and_as_traces(tmp_path, tiny_model_dir, capsys):
    """The trace has no calculator marks, and its boxed answer verifies against the problem's."""
    solution = "He has 2*3 = <<2*3=6>>6 and\nthen 6+1 = $<<6+1=7>>7 more.\n#### 1,007"
    path = write(tmp_path / "train.jsonl", questions([("How many?", solution)]))
    said = inside(capsys, "problems", "--source", path, "--out", tmp_path / "p.jsonl")
    assert "read as gsm8k" in said
    assert column(tmp_path / "p.jsonl", "answer")[0] == "1,007"

    inside(capsys, "teacher", "--source", path, "--model", tiny_model_dir,
           "--out", tmp_path / "t.jsonl", "--problems-out", tmp_path / "tp.jsonl")
    [response] = column(tmp_path / "t.jsonl", "response")
    [answer] = column(tmp_path / "tp.jsonl", "answer")
    assert response == ("<think>\nHe has 2*3 = 6 and\nthen 6+1 = $7 more.\n</think>\n\n"
                        "\\boxed{1,007}")
    assert verify(response, answer).correct

    path = write(tmp_path / "bad.jsonl", questions([("How many?", solution), ("b", "7")]))
    said = refused(capsys, "problems", "--source", path, "--out", tmp_path / "x.jsonl")
    assert "bad.jsonl:2: #### must stand once in the answer" in said


SENTENCE = " Please reason step by step, and put your final answer within \\boxed{}."
REMAINDER = "\nFind the remainder when it is divided by 9."


@pytest.mark.parametrize("problems, found", [
    (["Is it $x$?" + SUFFIX, "Find $y$." + SUFFIX], SUFFIX),
    (["Is it $x$? " + SUFFIX, "Find $y$." + SUFFIX], SUFFIX),      # a space is the problem's own
    (["Is it $x$?" + SENTENCE, "Is it $y$?" + SENTENCE], SENTENCE),
    (["One day." + SENTENCE, "Is it $y$?" + SENTENCE], SENTENCE),
    (["a\nAnswer with one number.", "b\nAnswer with one number."], "\nAnswer with one number."),
    (["Is it $x$?" + SUFFIX], ""),                                 # one problem: nothing in common
    (["Is it $x$?" + SUFFIX] * 2, ""),
    (["Is it $x$?" + SUFFIX, "Find $y$."], ""),
    (["1+2 mod 100", "3+2 mod 100"], ""),                          # of the problem itself
    (["Tom has 2. How many apples has he?", "Ann has 3. How many apples has he?"], ""),
    (["a\nAnswer:", "b\nAnswer:"], ""),
    (["a" + REMAINDER, "b" + REMAINDER], ""),
    ([], ""),
])
def test_the_instruction_is_what_all_problems_end_in(problems, found):
    assert sample.find_instruction(problems) == found


def test_the_instruction_of_traces_and_of_a_long_source(tmp_path, tiny_model_dir, capsys):
    """It is found in the first LOOK_AHEAD rows; a later one without it is refused."""
    n = sample.LOOK_AHEAD + 1
    rows = [trace_row(f"Is it {i}?" + SUFFIX, ["<think>x</think>1"]) for i in range(n)]
    path = write(tmp_path / "t.jsonl", rows)
    out = tmp_path / "o.jsonl"
    problems = tmp_path / "p.jsonl"
    args = ["teacher", "--model", tiny_model_dir, "--problems-out", problems]
    inside(capsys, *args, "--source", path, "--out", out)
    assert column(problems, "problem") == [f"Is it {i}?" for i in range(n)]
    assert common.read_meta(out)["instruction"] == SUFFIX
    assert common.read_meta(problems)["instruction"] == SUFFIX

    rows[-1]["query"] = "Is it?"
    path = write(tmp_path / "u.jsonl", rows)
    said = refused(capsys, *args, "--source", path, "--out", tmp_path / "u_out.jsonl")
    assert f"problem {n} does not end as the first {sample.LOOK_AHEAD} do" in said
    assert "--keep-instruction" in said


# --------------------------------------------------------------------- data that people really have

NAN = float("nan")

# An answer as it stands in a file, and as it is imported; None: counted as missing.
ANSWERS = [
    ("3", "3"),
    (3, "3"),
    (3.0, "3"),
    (0.25, "0.25"),
    (1e-7, "0.0000001"),
    (1e22, "1" + 22 * "0"),
    (" 4\n", "4"),
    ([5], ["5"]),
    (["5", 6.5, None], ["5", "6.5"]),
    (NAN, None),
    (float("inf"), None),
    (None, None),
    ("", None),
    ("NaN", None),
    ("null", None),
    ([], None),
    ([None], None),
    ([NAN, ""], None),
    ("\\frac12", "\\frac12"),
]


def test_answers_of_every_kind(tmp_path, capsys):
    """Numbers are written out, what is nothing is counted, lists are alternatives."""
    given = []
    wanted = []
    for i, (answer, imported) in enumerate(ANSWERS):
        given.append((f"q{i}", answer))
        if imported is not None:
            wanted.append((f"q{i}", imported))
    path = write(tmp_path / "a.jsonl", questions(given))
    said = inside(capsys, "problems", "--source", path, "--out", tmp_path / "p.jsonl")
    assert pairs_of(tmp_path / "p.jsonl") == wanted
    assert f"{len(given) - len(wanted)} without an answer" in said


def test_a_float_column_of_parquet(tmp_path, capsys):
    """As pandas writes whole numbers when some are missing."""
    import pyarrow
    import pyarrow.parquet
    table = pyarrow.table({"question": ["a", "b", "c"], "answer": [1.0, None, NAN]})
    path = tmp_path / "f.parquet"
    pyarrow.parquet.write_table(table, path)
    said = inside(capsys, "problems", "--source", path, "--out", tmp_path / "p.jsonl")
    assert column(tmp_path / "p.jsonl", "answer") == ["1"]
    assert "2 without an answer" in said


CHAT_OF_TWO = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
CHAT_OF_PARTS = [{"role": "user", "content": [{"type": "text"}]}]

# The question and the answer of the second row, and what is said of it.
ODD_ROWS = {
    "answer_nested": ("b", [["7"], "8"], "answer is a list of lists"),
    "answer_bool": ("b", True, "answer is true or false, text is expected"),
    "answer_struct": ("b", {"x": 1}, "answer is a struct with the fields ['x']"),
    "answer_surrogate": ("b", "\ud800", "answer holds half a character"),
    "problem_list": (["a"], "2", "question is a list"),
    "problem_number": (5, "2", "question is a number"),
    "problem_surrogate": ("a\udfff", "2", "question holds half a character"),
    "chat_of_two": (CHAT_OF_TWO, "2",
                    "question is a chat of ['system', 'user']; one user message"),
    "chat_of_none": ([], "2", "question is a chat of []"),
    "chat_of_parts": (CHAT_OF_PARTS, "2", "question is a list"),
    "missing": ("a", ..., "no column answer"),
}


@pytest.mark.parametrize("name", ODD_ROWS)
def test_odd_rows_are_one_sentence_with_file_and_line(name, tmp_path, capsys):
    question, answer, sentence = ODD_ROWS[name]
    rows = questions([("a", "1"), (question, answer)])
    if answer is ...:
        del rows[1]["answer"]
    path = write(tmp_path / "s.jsonl", rows)
    said = refused(capsys, "problems", "--source", path, "--out", tmp_path / "x.jsonl")
    assert "s.jsonl:2: " + sentence in said
    assert not (tmp_path / "x.jsonl").exists()


def test_chats_and_structs_by_named_columns(tmp_path, capsys):
    """A struct is no answer: one of its fields has to be named."""
    path = write(tmp_path / "c.jsonl", chat_rows([("a", "1"), ("b", "2")]))
    args = ["problems", "--source", path, "--out", tmp_path / "p.jsonl",
            "--columns", "problem=prompt"]
    said = refused(capsys, *args, "answer=reward_model")
    assert ("c.jsonl:1: reward_model is a struct with the fields ['ground_truth', 'style'] "
            "(name one") in said
    said = refused(capsys, *args, "answer=reward_model.gold")
    assert "no column reward_model.gold" in said
    inside(capsys, *args, "answer=reward_model.ground_truth")
    assert pairs_of(tmp_path / "p.jsonl") == [("a ", "1"), ("b ", "2")]


def test_empty_problems_are_counted_and_own_pids_checked(tmp_path, capsys):
    rows = questions([("", "1"), ("  \n", "1"), ("a", "1"), (None, "1"), ("b", "1")])
    path = write(tmp_path / "e.jsonl", rows)
    said = inside(capsys, "problems", "--source", path, "--out", tmp_path / "p.jsonl")
    assert "5 rows, 3 empty problems, 2 kept" in said

    good = {"pid": "p", "problem": "a", "answer": "1", "source": "s"}
    for changes, sentence in [
            ({"pid": ""}, "o.jsonl:2: pid is empty"),
            ({"pid": 3}, "o.jsonl:2: pid is a number"),
            ({"pid": "\ud800"}, "o.jsonl:2: pid holds half"),
            ({"problem": "b"}, "the pid p stands for two")]:
        path = write(tmp_path / "o.jsonl", [good, {**good, **changes}])
        said = refused(capsys, "problems", "--source", path, "--out", tmp_path / "x.jsonl")
        assert sentence in said


def test_responses_of_every_kind(tmp_path, tiny_model_dir, capsys):
    """Blank and missing responses are counted; what is not text is refused."""
    rows = [trace_row("q0", ["<think>x</think>1", None, "", "  "]),
            trace_row("q1", []),
            trace_row("q2", None),
            trace_row("q3", "<think>y</think>1")]
    path = write(tmp_path / "t.jsonl", rows)
    args = ["teacher", "--model", tiny_model_dir]
    said = inside(capsys, *args, "--source", path, "--out", tmp_path / "o.jsonl")
    assert column(tmp_path / "o.jsonl", "response") == ["<think>x</think>1", "<think>y</think>1"]
    assert "3 empty responses" in said
    assert "2 rows without a response" in said
    assert "2 responses," in said

    for odd, sentence in [
            (["\ud800"], "holds half a character"),
            ([1], "is a number"),
            ({"a": 1}, "is a struct")]:
        rows[1] = trace_row("q1", odd)
        path = write(tmp_path / "s.jsonl", rows)
        said = refused(capsys, *args, "--source", path, "--out", tmp_path / "x.jsonl")
        assert "s.jsonl:2: DeepSeek-R1_Response_List " + sentence in said


# ------------------------------------------------------------------------------------ contamination

WORDS = ("alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi "
         "omicron").split()
BOILERPLATE = ("where m and n are relatively prime positive integers "
               "find the value of m plus n please")

BENCHMARK = {
    "b0": "Let " + " ".join(WORDS) + " be given.",
    "b1": "Short one: 2 + 2",
    "b2": f"Question 2 {BOILERPLATE}",
    "b3": f"Question 3 {BOILERPLATE}",
    "b4": f"Question 4 {BOILERPLATE}",
}
TRAINING = {
    "thirteen": "Suppose, " + ", ".join(WORDS[:13]).upper() + "!",   # case and commas hide nothing
    "twelve": "Suppose " + " ".join(WORDS[:12]) + " only",
    "short": "short ONE 2 2",
    "inside": "a short one 2 2 inside a longer text is not the same problem",
    "boiler": f"Another question {BOILERPLATE}",
    "clean": "What is the capital of France",
}


def test_contamination_drops_overlap_but_not_boilerplate(tmp_path, tiny_model_dir, capsys):
    """Thirteen words in a row that a benchmark has too are overlap, twelve are not; nor are those
    that three of its problems share, unless --boilerplate 0 says so. Of traces as of problems."""
    bench_rows = [{"pid": pid, "problem": problem} for pid, problem in BENCHMARK.items()]
    bench = write(tmp_path / "bench.jsonl", bench_rows)
    rows = []
    for pid, problem in TRAINING.items():
        rows.append({"pid": pid, "problem": problem, "answer": "1", "source": "s"})
    path = write(tmp_path / "p.jsonl", rows)
    args = ["problems", "--source", path, "--benchmarks", bench]

    said = inside(capsys, *args, "--out", tmp_path / "clean.jsonl")
    assert column(tmp_path / "clean.jsonl", "pid") == ["twelve", "inside", "boiler", "clean"]
    assert "2 training problems dropped" in said
    report = json.loads((tmp_path / "clean.contamination.json").read_text())
    dropped = [(row["pid"], row["bench_pid"]) for row in report["dropped"]]
    assert dropped == [("thirteen", "b0"), ("short", "b1")]
    assert report["benchmarks"] == {
        "bench": {"n_problems": 5, "n_found_in_training": 2, "n_training_dropped": 2}}
    assert set(report["boilerplate"].values()) == {3}

    inside(capsys, *args, "--boilerplate", 0, "--out", tmp_path / "strict.jsonl")
    assert column(tmp_path / "strict.jsonl", "pid") == ["twelve", "inside", "clean"]

    traces = [trace_row(problem, ["<think>x</think>1"]) for problem in TRAINING.values()]
    path = write(tmp_path / "t.jsonl", traces)
    inside(capsys, "teacher", "--source", path, "--benchmarks", bench, "--model", tiny_model_dir,
           "--out", tmp_path / "o.jsonl", "--problems-out", tmp_path / "op.jsonl")
    kept = {sample.problem_id(TRAINING[name]) for name in ("twelve", "inside", "boiler", "clean")}
    assert set(column(tmp_path / "o.jsonl", "pid")) == kept
    assert set(column(tmp_path / "op.jsonl", "pid")) == kept


# -------------------------------------------------------------------------------- self-distillation


@pytest.fixture
def problem_file(tmp_path):
    """Five problems, the last of which is too long for a prompt."""
    problems = ["0+0=?", "1+1=?", "2+2=?", "3+3=?", "4+4=?" * 301]
    rows = []
    for i, problem in enumerate(problems):
        rows.append({"pid": f"p{i}", "problem": problem, "answer": "1", "source": "s"})
    return write(tmp_path / "p.jsonl", rows)


@pytest.mark.slow
def test_samples_resume_to_the_same_bytes_on_any_number_of_ranks(tmp_path, tiny_model_dir,
                                                                 problem_file, capsys):
    """What is drawn depends on neither kills, nor the order of rows, nor ranks."""
    args = ["model", "--model", tiny_model_dir, "--problems", problem_file, "--n", 3,
            "--max-tokens", 12, "--max-prompt-tokens", 400, "--engine", "hf"]
    out = tmp_path / "a.jsonl"
    said = inside(capsys, *args, "--out", out)
    assert "4 problems x 3 samples" in said
    assert "1 problems dropped" in said
    rows = rows_of(out)
    assert [row["sid"] for row in rows] == [f"p{i}:self:{k}" for i in range(4) for k in range(3)]
    assert len({row["response"] for row in rows}) > 6
    assert all(row["n_tokens"] <= 12 for row in rows)
    assert rows[0]["seed"] == common.request_seed(42, "p0", 0)
    meta = common.read_meta(out)
    assert meta["rows"] == 12
    assert sum(meta["finish"].values()) == 12
    assert meta["n_failed"] == 0
    whole = out.read_bytes()

    # killed: rows in another order, one half written, and some that rank 1 had not handed over
    out = tmp_path / "b.jsonl"
    inside(capsys, *args, "--out", out)
    lines = whole.decode().splitlines(keepends=True)
    out.write_text(lines[7] + lines[0] + lines[3][:20])
    (tmp_path / "b.rank1.jsonl").write_text(lines[5])
    inside(capsys, *args, "--out", out)
    assert out.read_bytes() == whole
    assert not list(tmp_path.glob("b.rank*"))

    # two ranks
    done = run(*args, "--out", tmp_path / "c.jsonl", ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "c.jsonl").read_bytes() == whole

    # other settings are refused, also where a kill came before anything was merged
    said = refused(capsys, *args, "--temperature", 1, "--out", out)
    assert "begun with other settings" in said
    out.rename(tmp_path / "b.rank0.jsonl")
    said = refused(capsys, *args, "--temperature", 1, "--out", out)
    assert "begun with other settings" in said
    inside(capsys, *args, "--out", out)
    assert out.read_bytes() == whole


@pytest.mark.slow
def test_a_failed_rank_ends_the_job_with_its_own_message(tmp_path, tiny_model_dir, problem_file):
    """Rank 0 dies over what a killed rank 1 left; rank 1, which waits for it, is ended by
    torchrun long before its own patience (`run` gives up after 300 s)."""
    (tmp_path / "o.rank1.jsonl").write_text('{"what": "is this"}\n')
    done = run("model", "--model", tiny_model_dir, "--problems", problem_file, "--n", 1,
               "--max-tokens", 4, "--max-prompt-tokens", 400, "--engine", "hf",
               "--out", tmp_path / "o.jsonl", ranks=2)
    assert done.returncode != 0
    assert "o.rank1.jsonl:1: not a row of this output" in done.stdout + done.stderr


def test_think_that_ends_the_prompt_goes_to_the_response(tmp_path, tiny_model_dir, problem_file,
                                                         capsys):
    """As with DeepSeek-R1's distilled models: markup of their own, `<think>` opened by the
    template. Nothing may be trained in this markup."""
    from transformers import AutoTokenizer
    r1 = tmp_path / "r1"
    shutil.copytree(tiny_model_dir, r1)
    tokenizer = AutoTokenizer.from_pretrained(r1)
    tokenizer.chat_template = ("{% for m in messages %}<|User|>{{ m['content'] }}{% endfor %}"
                               "<|Assistant|><think>\n")
    tokenizer.save_pretrained(r1)
    text = (r1 / "tokenizer.json").read_text()
    text = text.replace("<|im_start|>", "<|User|>").replace("<|im_end|>", "<|Assistant|>")
    (r1 / "tokenizer.json").write_text(text)

    said = inside(capsys, "model", "--model", r1, "--problems", problem_file, "--n", 1,
                  "--max-tokens", 5, "--max-prompt-tokens", 300, "--engine", "hf",
                  "--out", tmp_path / "o.jsonl")
    responses = column(tmp_path / "o.jsonl", "response")
    assert responses
    for response in responses:
        assert response.startswith("<think>\n"), said
    with pytest.raises(SystemExit):
        load_tokenizer(r1)


@pytest.mark.slow
def test_model_bad_input(tmp_path, tiny_model_dir, problem_file, capsys):
    """Lengths, rows and flags that cannot work are refused before anything is written."""
    out = tmp_path / "o.jsonl"
    model = ["model", "--model", tiny_model_dir, "--engine", "hf", "--out", out]
    args = [*model, "--problems", problem_file]

    # lengths
    said = refused(capsys, *args, "--max-tokens", 4000)
    assert "max_position_embeddings = 2048" in said
    assert "prepare_base" in said
    said = refused(capsys, *args, "--max-prompt-tokens", 3, "--max-tokens", 4)
    assert "every prompt is longer" in said

    # rows
    bad = write(tmp_path / "bad.jsonl", [{"pid": "p"}])
    said = refused(capsys, *model, "--problems", bad, "--max-tokens", 4)
    assert "bad.jsonl:1: field 'problem' is missing" in said
    good = {"pid": "p", "problem": "a"}
    for second in [
            good,
            {"pid": "", "problem": "a"},
            {"pid": "q", "problem": " "},
            {"pid": "\ud800", "problem": "a"},
            {"pid": "q", "problem": "\udfff"}]:
        odd = write(tmp_path / "odd.jsonl", [good, second])
        said = refused(capsys, *model, "--problems", odd, "--max-tokens", 4)
        assert "odd.jsonl" in said

    # flags
    for flag, value in [("--name", ""), ("--name", "a/b"), ("--name", "a b"), ("--seed", -1)]:
        assert flag in refused(capsys, *args, flag, value)
    assert not out.exists()

    # a model that is not there: one sentence of a process of its own, too
    done = run("model", "--model", tmp_path / "none", "--problems", problem_file, "--out", out)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.strip().count("\n") == 0, done.stderr


# --------------------------------------------------------------------------- base model preparation


def prepare(capsys, *args):
    return inside(capsys, *args, main=prepare_base.main)


def prepare_refused(capsys, *args):
    return refused(capsys, *args, main=prepare_base.main)


def read_config(folder):
    return json.loads((folder / "config.json").read_text())


def change_config(folder, **changes):
    config = read_config(folder)
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.fixture
def old_base(tmp_path):
    """A Qwen2 as it is published: 4,096 positions, rope_theta 10,000, a template with a default
    system prompt."""
    base = Path(make_model(tmp_path / "base", positions=4096, tie=False))
    config = read_config(base)
    config.pop("rope_parameters", None)
    config.update(rope_theta=10000, max_position_embeddings=4096)
    (base / "config.json").write_text(json.dumps(config))

    template = ("<|im_start|>system\nYou are helpful.<|im_end|>\n"
                "{{ messages[0]['content'] }}")
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings["chat_template"] = template
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    (base / "chat_template.jinja").write_text(template)

    generation = {"eos_token_id": 256, "top_p": 0.8}
    (base / "generation_config.json").write_text(json.dumps(generation))
    return base


@torch.no_grad()
def logits_of(folder):
    """[200, V] under the model in a directory, of tokens 0, 1, 2, ..."""
    from transformers import AutoModelForCausalLM
    ids = torch.arange(200)[None] % 250
    return AutoModelForCausalLM.from_pretrained(folder)(ids).logits[0]


def test_prepare_base(old_base, tmp_path, capsys):
    """The same weights with more positions, no system prompt, and both stop tokens; a second time
    nothing is written."""
    from transformers import AutoConfig, GenerationConfig
    out = tmp_path / "prepared"
    args = ["--model", old_base, "--out", out]
    prepare(capsys, *args)

    config = AutoConfig.from_pretrained(out)
    assert config.rope_parameters["rope_theta"] == 1e6
    assert config.max_position_embeddings == 40000
    assert AutoConfig.from_pretrained(old_base).rope_parameters["rope_theta"] == 1e4
    weights = (out / "model.safetensors").read_bytes()
    assert weights == (old_base / "model.safetensors").read_bytes()
    tokenizer = load_tokenizer(out)
    text = tokenizer.decode(render_prompt(tokenizer, "1+1?"))
    assert text == f"<|im_start|>user\n1+1?{INSTRUCTION}<|im_end|>\n<|im_start|>assistant\n"
    generation = GenerationConfig.from_pretrained(out)
    assert generation.eos_token_id == stop_ids(tokenizer)
    assert generation.top_p in (None, 1.0)

    # the rotation really is slower: the first position is as before, the last sees it differently
    difference = (logits_of(old_base) - logits_of(out)).abs()
    assert difference[0].max() < 1e-5
    assert difference[-1].max() > 1e-3

    # again
    before = times_in(out)
    assert "already prepared" in prepare(capsys, *args)
    assert times_in(out) == before
    assert "is not" in prepare_refused(capsys, *args, "--positions", 50000)

    # preparing what is prepared changes nothing, however often
    twice = tmp_path / "twice"
    prepare(capsys, "--model", out, "--out", twice)
    assert "already prepared" in prepare(capsys, "--model", out, "--out", twice)
    assert (twice / "config.json").read_bytes() == (out / "config.json").read_bytes()


def times_in(folder):
    return {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}


def test_prepare_base_keeps_the_rope_of_a_base_that_has_the_positions(old_base, tmp_path, capsys):
    for wanted in (4096, 1000):
        out = tmp_path / f"p{wanted}"
        said = prepare(capsys, "--model", old_base, "--positions", wanted, "--rope-theta", 5e5,
                       "--out", out)
        assert "the base has 4096 positions: these and its rope are kept" in said
        assert read_config(out) == read_config(old_base)
        tokenizer = load_tokenizer(out)
        assert tokenizer.model_max_length == 4096
        assert "You are helpful" not in tokenizer.decode(render_prompt(tokenizer, "1+1?"))


def names_in(folder):
    """But for locks, which go with this process."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def test_prepare_base_leaves_nothing_half_made(old_base, tmp_path, capsys, monkeypatch):
    """The sidecar comes with the directory; what a kill left beside it is gone after the next
    start."""
    def interrupt(*_):
        raise SystemExit(130)

    out = tmp_path / "prepared"
    args = ["--model", old_base, "--out", out]
    with monkeypatch.context() as patch:
        patch.setattr(prepare_base.Path, "rename", interrupt)
        with pytest.raises(SystemExit):
            prepare_base.main([str(arg) for arg in args])
    assert not out.exists()
    assert names_in(tmp_path) == ["base"]

    for _ in range(2):                                                # made, and already there
        (tmp_path / ".prepared.tmp").mkdir()
        (tmp_path / ".prepared.tmp" / "model.safetensors").write_text("half")
        prepare(capsys, *args)
        assert common.read_meta(out / "base")["schema"] == "base"
        assert names_in(tmp_path) == ["base", "prepared"]

    monkeypatch.setenv("RANK", "1")                                   # of several ranks one writes
    prepare(capsys, "--model", old_base, "--out", tmp_path / "by_rank_1")
    assert not (tmp_path / "by_rank_1").exists()


@pytest.mark.parametrize("name, content, said", [
    ("model.safetensors", b"", "is not whole"),
    ("model.safetensors", b"\xff" * 100, "is not whole"),
    ("model.safetensors", None, "is not whole"),                      # its first half
    ("config.json", b"{", "config.json cannot be read"),
    ("tokenizer_config.json", b"[", "tokenizer"),
])
def test_prepare_base_refuses_broken_files(old_base, tmp_path, capsys, name, content, said):
    file = old_base / name
    whole = file.read_bytes()
    file.write_bytes(whole[:len(whole) // 2] if content is None else content)
    assert said in prepare_refused(capsys, "--model", old_base, "--out", tmp_path / "o")


@pytest.mark.parametrize("change, said", [
    ({"num_hidden_layers": 3, "layer_types": None}, "the weights lack model.layers.2."),
    ({"num_hidden_layers": 1, "layer_types": None}, "config.json has no parameter"),
    ({"hidden_size": 32}, "config.json makes it"),
    ({"intermediate_size": 64}, "config.json makes it"),
    ({"use_sliding_window": True}, "sliding-window"),
    ({"model_type": "bert"}, "config.json"),
    ({"tie_word_embeddings": True}, "lm_head.weight differs"),
    ({"vocab_size": 300}, "config.json makes it [300"),
    ({"rope_scaling": {"type": "yarn", "factor": 4}}, "plain RoPE"),
])
def test_prepare_base_refuses_what_does_not_belong_together(old_base, tmp_path, capsys, change,
                                                            said):
    change_config(old_base, **change)
    assert said in prepare_refused(capsys, "--model", old_base, "--out", tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_prepare_base_refuses_a_missing_output_layer_and_a_small_embedding(tmp_path, capsys):
    tied = Path(make_model(tmp_path / "tied", tie=True))
    change_config(tied, tie_word_embeddings=False)
    said = prepare_refused(capsys, "--model", tied, "--out", tmp_path / "o")
    assert "the weights lack lm_head.weight" in said

    small = make_model(tmp_path / "small", vocab_size=100, eos_token_id=1)
    said = prepare_refused(capsys, "--model", small, "--out", tmp_path / "o")
    assert "the tokenizer has 259 tokens" in said
