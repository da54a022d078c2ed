"""01_sample.py and tools/prepare_base.py: every declared source and format, wrong shapes, the instruction, resume, overlap."""

import csv
import gzip
import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
from conftest import ROOT, make_model

import common
from model import encode_response, INSTRUCTION, load_tokenizer, render_prompt, stop_ids
from tools import prepare_base

sample = importlib.import_module("01_sample")
PYTHON = [sys.executable]
INTEGERS = "where m and n are relatively prime positive integers find the value of m plus n please"


def run(*args, ok=True, torchrun=0):
    launcher = [*PYTHON, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={torchrun}",
                "--"] if torchrun else PYTHON
    done = subprocess.run([*launcher, ROOT / "01_sample.py", *map(str, args)], capture_output=True, text=True,
                          timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    if not ok and not torchrun:
        assert done.returncode == 2 and done.stderr.strip().count("\n") == 0, done.stderr   # one sentence, no traceback
    return done.stdout + done.stderr


def inside(capsys, *args, ok=True, main=sample.main):
    """As `run`, within this process (torch is imported once)."""
    capsys.readouterr()
    if ok:
        main([str(a) for a in args])
    else:
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in args])
        assert stop.value.code == 2
    printed = capsys.readouterr()
    assert ok or printed.err.strip().count("\n") == 0, printed.err                   # one sentence
    return printed.out + printed.err


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def rows_of(path):
    return [json.loads(line) for line in open(path)]


def rows_like(name, n=3):
    """Rows with exactly the columns of a declared source."""
    source = sample.SOURCES[name]
    out = []
    for i in range(n):
        row = {column: f"{column} {i}" for column in source.unused}
        row[source.problem] = f"What is {i} + 1?"
        if source.problem == "prompt":
            row["prompt"] = [{"content": f"What is {i} + 1?", "role": "user"}]
        if source.answer == "reward_model.ground_truth":
            row["reward_model"] = {"ground_truth": str(i + 1), "style": "rule"}
        elif source.solution_mark:
            row[source.answer] = f"{i} and 1 are {i}+1=<<{i}+1={i + 1}>>{i + 1}.\n#### {i + 1}"
        elif source.answer:
            row[source.answer] = str(i + 1)
        if source.response and not source.solution_mark:
            texts = [f"<think>\n{i}+1</think>\\boxed{{{i + 1}}}", f"adding</think> \\boxed{{{i + 1}}}"]
            row[source.response] = texts if name.startswith("oxa") else texts[0]
        if source.where:
            row[source.where[0]] = source.where[1]
        out.append(row)
    return out


def save_as(kind, rows, path):
    if kind == "jsonl":
        return write(path.with_suffix(".jsonl"), rows)
    from datasets import Dataset, DatasetDict
    table = Dataset.from_list(rows)
    if kind == "parquet":
        table.to_parquet(path.with_suffix(".parquet"))
        return path.with_suffix(".parquet")
    if kind == "parquet_dir":
        path.mkdir()
        table.to_parquet(path / "train-00000-of-00001.parquet")
    elif kind == "saved":
        table.save_to_disk(path)
    else:
        DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(path)
    return path


# -------------------------------------------------------------------------------------------------------------- sources

PROBLEM_SETS = [n for n, s in sample.SOURCES.items() if s.response is None or s.solution_mark]
TRACES = [n for n, s in sample.SOURCES.items() if s.response is not None]


def test_declared_sources_are_told_apart_by_their_columns():
    shapes = [(frozenset(sample.all_columns(s)), s.solution_mark) for s in sample.SOURCES.values()]
    assert len(set(shapes)) == len(shapes)
    for name in sample.SOURCES:
        assert sample.declared_name(Namespace(format=None, source="file"), rows_like(name)[0]) == name


@pytest.mark.parametrize("name", PROBLEM_SETS)
def test_problem_set_is_recognised_and_wrong_shapes_are_refused(name, tmp_path, capsys):
    rows = rows_like(name)
    good = write(tmp_path / "good.jsonl", rows)
    assert f"read as {name} " in inside(capsys, "problems", "--source", good, "--out", tmp_path / "p.jsonl")
    made = rows_of(tmp_path / "p.jsonl")
    assert [(r["problem"], r["answer"], r["source"]) for r in made] == [
        (f"What is {i} + 1?", str(i + 1), "good") for i in range(3)]
    if name != "problems":
        assert made[0]["pid"] == sample.problem_id("What is 0 + 1?") and len({r["pid"] for r in made}) == 3
    assert common.read_meta(tmp_path / "p.jsonl")["rows"] == 3

    lost = sample.column_of(sample.SOURCES[name].answer)
    bad = write(tmp_path / "lost.jsonl", [{k: v for k, v in r.items() if k != lost} for r in rows])
    said = inside(capsys, "problems", "--source", bad, "--format", name, "--out", tmp_path / "x.jsonl", ok=False)
    assert f"lacks ['{lost}']" in said and sample.SOURCES[name].problem in said
    bad = write(tmp_path / "more.jsonl", [{**r, "surprise": 1} for r in rows])
    said = inside(capsys, "problems", "--source", bad, "--format", name, "--out", tmp_path / "x.jsonl", ok=False)
    assert "should not have ['surprise']" in said and "--columns" in said
    assert "no declared source" in inside(capsys, "problems", "--source", bad, "--out", tmp_path / "x.jsonl", ok=False)
    assert not (tmp_path / "x.jsonl").exists()


@pytest.mark.parametrize("name", TRACES)
def test_teacher_traces_and_their_wrong_shapes(name, tmp_path, tiny_model_dir, tiny_tokenizer, capsys):
    rows = rows_like(name)
    source = sample.SOURCES[name]
    good = write(tmp_path / "t.jsonl", rows)
    out, problems = tmp_path / "teacher.jsonl", tmp_path / "problems.jsonl"
    answers = ["--answers", "column"]
    if source.answer is None:
        known = write(tmp_path / "known.jsonl", [{"pid": sample.problem_id(r[source.problem]),
                                                  "problem": r[source.problem],
                                                  "answer": str(i + 1), "source": "x"} for i, r in enumerate(rows)])
        answers = ["--answers", "join", "--problems", known]
        said = inside(capsys, "teacher", "--source", good, "--model", tiny_model_dir, "--out", out, ok=False)
        assert "no column of answers" in said
    inside(capsys, "teacher", "--source", good, "--model", tiny_model_dir, "--out", out, "--problems-out", problems,
           *answers)
    per_problem = 2 if name.startswith("oxa") else 1
    made = rows_of(out)
    assert len(made) == 3 * per_problem and [r["answer"] for r in rows_of(problems)] == ["1", "2", "3"]
    assert [r["sid"] for r in made] == [f"{r['pid']}:t:{r['k']}" for r in made]
    assert {r["pid"] for r in made} == {r["pid"] for r in rows_of(problems)}
    assert all(r["response"].startswith("<think>\n") and r["finish"] == "stop" for r in made)
    assert made[0]["n_tokens"] == len(encode_response(tiny_tokenizer, made[0]["response"]))
    bad = write(tmp_path / "bad.jsonl", [{k: v for k, v in r.items() if k != source.response} for r in rows])
    said = inside(capsys, "teacher", "--source", bad, "--format", name, "--model", tiny_model_dir, "--out",
                  tmp_path / "x.jsonl",
                  *answers, ok=False)
    assert f"lacks ['{source.response}']" in said


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "parquet_dir", "saved", "saved_dict"])
def test_local_formats_give_the_same_rows(kind, tmp_path, capsys):
    path = save_as(kind, rows_like("deepscaler", 5), tmp_path / "data")
    inside(capsys, "problems", "--source", path, "--name", "d", "--out", tmp_path / "p.jsonl")
    assert [(r["problem"], r["answer"]) for r in rows_of(tmp_path / "p.jsonl")] == [
        (f"What is {i} + 1?", str(i + 1)) for i in range(5)]


def test_sources_that_cannot_be_opened(tmp_path, capsys):
    out = ["--out", tmp_path / "x.jsonl"]
    said = inside(capsys, "problems", "--source", tmp_path / "nothing.jsonl", *out, ok=False)
    assert "no such file" in said
    assert "no such file" in inside(capsys, "problems", "--source", "data/nothing.parquet", *out, ok=False)
    assert "cannot be opened" in inside(capsys, "problems", "--source", "nobody/nothing-here", *out, ok=False)
    (tmp_path / "empty").mkdir()
    assert "neither" in inside(capsys, "problems", "--source", tmp_path / "empty", *out, ok=False)
    path = save_as("saved_dict", rows_like("minerva"), tmp_path / "d")
    assert "not validation" in inside(capsys, "problems", "--source", path, "--split", "validation", *out, ok=False)


def test_rows_that_change_shape_half_way(tmp_path, capsys):
    rows = rows_like("minerva")
    del rows[2]["answer"]
    path = write(tmp_path / "m.jsonl", rows)
    assert "m.jsonl:3: no column answer" in inside(capsys, "problems", "--source", path, "--out", tmp_path / "x.jsonl",
                                               ok=False)
    rows[2] = {"question": ["not text"], "answer": "1"}
    path = write(tmp_path / "m.jsonl", rows)
    assert "m.jsonl:3: question is a list" in inside(capsys, "problems", "--source", path, "--out", tmp_path / "x.jsonl", ok=False)


def test_named_columns_only_acereason_maths_and_boxed_answers(tmp_path, tiny_model_dir, capsys):
    path = write(tmp_path / "q.jsonl", [{"q": "1+1?", "a": 2, "uuid": "u"}, {"q": "2+2?", "a": None, "uuid": "v"}])
    said = inside(capsys, "problems", "--source", path, "--columns", "problem=q", "answer=a", "--out",
                  tmp_path / "p.jsonl")
    assert [r["answer"] for r in rows_of(tmp_path / "p.jsonl")] == ["2"] and "1 without an answer" in said
    said = inside(capsys, "problems", "--source", path, "--columns", "text=q", "--out", tmp_path / "x.jsonl", ok=False)
    assert "--columns takes" in said

    rows = rows_like("acereason", 4)
    rows[1]["category"] = "code"
    rows[2]["output"] = "<think>no answer"
    path = write(tmp_path / "ace.jsonl", rows)
    said = inside(capsys, "teacher", "--source", path, "--answers", "boxed", "--model", tiny_model_dir,
                  "--out", tmp_path / "t.jsonl", "--problems-out", tmp_path / "tp.jsonl")
    assert [r["answer"] for r in rows_of(tmp_path / "tp.jsonl")] == ["1", "4"] and "1 without an answer" in said


def test_duplicates_limit_and_recipe(tmp_path, capsys):
    rows = [{"question": q, "answer": a} for q, a in
            [("What  is 1?", "1"), ("What is 1?\n", "1"), ("What is 1?", "one"), ("b", "2"), ("c", "3"), ("d", "4")]]
    path = write(tmp_path / "m.jsonl", rows)
    said = inside(capsys, "problems", "--source", path, "--out", tmp_path / "p.jsonl")
    assert "2 duplicates (dropped), 1 duplicates with another answer" in said and len(rows_of(tmp_path / "p.jsonl")) == 4
    chosen = []
    for seed in (1, 1, 2, 3, 4):
        inside(capsys, "problems", "--source", path, "--limit", 2, "--seed", seed, "--out", tmp_path / "l.jsonl")
        chosen.append(tuple(r["problem"] for r in rows_of(tmp_path / "l.jsonl")))
    assert chosen[0] == chosen[1] and len(set(chosen)) > 1 and all(len(c) == 2 for c in chosen)
    (tmp_path / "r.toml").write_text("[problems]\nlimit = 3\n")
    inside(capsys, "problems", "--recipe", tmp_path / "r.toml", "--source", path, "--out", tmp_path / "r.jsonl")
    assert len(rows_of(tmp_path / "r.jsonl")) == 3


def test_an_output_is_no_input_and_no_other_output(tmp_path, tiny_model_dir, capsys):
    path = write(tmp_path / "t.jsonl", rows_like("oxa_answer"))
    whole = path.read_bytes()
    args = ["teacher", "--source", path, "--model", tiny_model_dir, "--out"]
    assert "is an input of this command" in inside(capsys, *args, path, ok=False)
    assert "is an input" in inside(capsys, *args, tmp_path / "o.jsonl", "--problems-out", path, ok=False)
    said = inside(capsys, *args, tmp_path / "o.jsonl", "--problems-out", tmp_path / "o.jsonl", ok=False)
    assert "are the same file" in said and path.read_bytes() == whole
    path = write(tmp_path / "m.jsonl", rows_like("minerva"))
    assert "is an input" in inside(capsys, "problems", "--source", path, "--out", path, ok=False)


def test_other_weights_at_the_same_path_are_noticed(tmp_path, problem_file, capsys):
    model = tmp_path / "model"
    make_model(model)
    args = ["model", "--model", model, "--problems", problem_file, "--n", 1, "--max-tokens", 4, "--engine", "hf",
            "--out", tmp_path / "o.jsonl"]
    inside(capsys, *args)
    make_model(model, seed=1)
    assert "the contents of" in inside(capsys, *args, ok=False)


def test_teacher_import_goes_on_where_it_was_killed(tmp_path, tiny_model_dir, capsys):
    path = write(tmp_path / "t.jsonl", rows_like("oxa_answer", 6))
    args = ["teacher", "--source", path, "--model", tiny_model_dir, "--out", tmp_path / "o.jsonl", "--problems-out",
            tmp_path / "p.jsonl"]
    inside(capsys, *args)
    whole = (tmp_path / "o.jsonl").read_bytes(), (tmp_path / "p.jsonl").read_bytes()
    (tmp_path / "o.jsonl").write_bytes(whole[0][:len(whole[0]) // 2])
    inside(capsys, *args)
    assert ((tmp_path / "o.jsonl").read_bytes(), (tmp_path / "p.jsonl").read_bytes()) == whole
    assert "begun with other settings" in inside(capsys, *args, "--limit", 2, ok=False)


# ------------------------------------------------------------------------------------------------------------- formats


def save_text(rows, path):
    """JSON Lines, a JSON array or CSV, each plain or as .gz, by the suffixes of `path`."""
    kind = path.name.removesuffix(".gz").rsplit(".")[-1]
    if kind == "csv":
        with open(path.with_suffix(".tmp"), "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        text = path.with_suffix(".tmp").read_text()
    elif path.name.startswith("array"):
        text = json.dumps(rows, indent=2)
    else:
        text = "\ufeff" + "\r\n".join(json.dumps(row) for row in rows)          # a BOM, CRLF, no newline at the end
    with gzip.open(path, "wt") if path.suffix == ".gz" else open(path, "w") as file:
        file.write(text)
    return path


@pytest.mark.parametrize("name", ["lines.jsonl", "lines.json", "array.json", "array.jsonl.gz", "lines.json.gz",
                                  "table.csv", "table.csv.gz"])
def test_text_formats_give_the_same_rows(name, tmp_path, capsys):
    rows = [{"question": f"What, with \"{i}\"\nand a line break?", "answer": str(i)} for i in range(4)]
    path = save_text(rows, tmp_path / name)
    inside(capsys, "problems", "--source", path, "--out", tmp_path / "p.jsonl")
    assert [(r["problem"], r["answer"]) for r in rows_of(tmp_path / "p.jsonl")] == [
        (row["question"], row["answer"]) for row in rows]
    assert rows_of(tmp_path / "p.jsonl")[0]["source"] == name.split(".")[0]


def test_a_format_that_is_not_read_is_said(tmp_path, capsys):
    for name, said in (("data.xyz", ".xyz is not"), ("data.xyz.gz", ".xyz.gz is not"), ("data", "without a suffix is not"),
                       ("data.parquet.gz", ".parquet.gz is not"), ("data.xlsx", ".xlsx is not a format that is read (known: ")):
        (tmp_path / name).write_text("x")
        assert said in inside(capsys, "problems", "--source", tmp_path / name, "--out", tmp_path / "x.jsonl", ok=False)


BROKEN = {
    "cut.jsonl.gz": (gzip.compress(b'{"question": "a", "answer": "1"}\n' * 100)[:40], "cut.jsonl.gz cannot be read"),
    "plain.jsonl.gz": (b'{"question": "a", "answer": "1"}\n', "plain.jsonl.gz cannot be read"),
    "zip.jsonl": (gzip.compress(b"{}"), "zip.jsonl:1: not valid JSON"),
    "utf16.jsonl": ('{"question": "a", "answer": "1"}'.encode("utf-16"), "utf16.jsonl:1: not valid JSON"),
    "latin.jsonl": (b'{"question": "a", "answer": "1"}\n{"question": "\xe9", "answer": "1"}', "latin.jsonl:2: not valid"),
    "deep.jsonl": (b'{"question": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", "deep.jsonl:1: not valid JSON"),
    "huge.jsonl": (b'{"question": "a", "answer": ' + b"9" * 5000 + b"}", "huge.jsonl:1: not valid JSON"),
    "cut.json": (b'[{"question": "a", "answer": "1"},', "cut.json: not valid JSON"),
    "list.jsonl": (b'{"question": "a", "answer": "1"}\n[1]\n', "list.jsonl:2: a row must be a JSON object"),
    "lists.json": (b"[[1], [2]]", "lists.json, row 1: a row must be a JSON object"),
    "empty.jsonl": (b"", "empty.jsonl has no rows"),
    "empty.csv": (b"", "empty.csv has no rows"),
    "empty.json": (b"[]", "empty.json has no rows"),
    "short.csv": (b"question,answer\na,1\nb\n", "short.csv:3: not the 2 cells"),
    "long.csv": (b"question,answer\na,1,2\n", "long.csv:2: not the 2 cells"),
    "twice.csv": (b"question,question\na,1\n", "twice.csv:1: a column is named twice"),
    "quote.csv": (b'question,answer\n"a,1\n', "quote.csv cannot be read"),
    "latin.csv": (b"question,answer\na\xe9,1\n", "latin.csv cannot be read"),
    "garbage.parquet": (b"PAR1" + bytes(100) + b"PAR1", "garbage.parquet cannot be read"),
    "no.parquet": (b"", "no.parquet cannot be read"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_one_sentence(name, tmp_path, capsys):
    content, said = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    assert said in inside(capsys, "problems", "--source", tmp_path / name, "--out", tmp_path / "x.jsonl", ok=False)
    assert not (tmp_path / "x.jsonl").exists()


def test_parquet_of_one_split_and_of_one_directory(tmp_path, capsys):
    from datasets import Dataset
    for name, answer in (("train-0", "1"), ("test-0", "2")):
        Dataset.from_list([{"question": name, "answer": answer}]).to_parquet(tmp_path / "hub" / f"{name}.parquet")
    for split, answer in ((), "1"), (("--split", "test"), "2"):
        inside(capsys, "problems", "--source", tmp_path / "hub", *split, "--out", tmp_path / "p.jsonl")
        assert [r["answer"] for r in rows_of(tmp_path / "p.jsonl")] == [answer]
    args = ["problems", "--source", tmp_path / "hub", "--out", tmp_path / "x.jsonl"]
    assert "no parquet file of the split dev" in inside(capsys, *args, "--split", "dev", ok=False)
    Dataset.from_list([{"question": "c", "answer": "3"}]).to_parquet(tmp_path / "hub" / "socratic" / "train-0.parquet")
    assert "several directories" in inside(capsys, *args, ok=False)


def test_hub_ids_with_a_dot_are_hub_ids(tmp_path, capsys):
    """`OXA-AceReason-1.1-Math` has no suffix that names a format."""
    for source in ("takagi97/OXA-AceReason-1.1-Math", "nvidia/AceReason-1.1-SFT", "openai/gsm8k"):
        said = inside(capsys, "problems", "--source", source, "--out", tmp_path / "x.jsonl", ok=False)
        assert "cannot be opened" in said


# ------------------------------------------------------------------------- the authors' files, GSM8K, the instruction

SUFFIX = "\nLet's reason. Put it within \\boxed{}: <think>reasoning</think> \\boxed{answer}."


def chat_rows(problems, space=" "):
    return [{"data_source": "", "prompt": [{"content": problem + space + SUFFIX, "role": "user"}], "ability": "math",
             "reward_model": {"ground_truth": answer, "style": "rule"}, "extra_info": {"index": i, "split": "train"}}
            for i, (problem, answer) in enumerate(problems)]


def test_the_rl_file_gives_all_its_rows_and_its_instruction(tmp_path, capsys):
    """Chat-list prompts and struct answers; duplicates are kept under pids of their own, and counted."""
    from datasets import Dataset
    known = [("What is 1?", "1"), ("Is $x$ it", "x"), ("What is  1?", "1"), ("What is 1?", "one\n")]
    rows = [{**row, "prompt_token_len": 9} for row in chat_rows(known)]
    Dataset.from_list(rows).to_parquet(tmp_path / "rl.parquet")
    said = inside(capsys, "problems", "--source", tmp_path / "rl.parquet", "--out", tmp_path / "p.jsonl")
    assert "read as oxa_rl" in said and "all problems end in one text" in said and repr(SUFFIX) in said
    assert "4 rows, 2 duplicates (kept), 1 duplicates with another answer, 4 kept" in said
    made, meta = rows_of(tmp_path / "p.jsonl"), common.read_meta(tmp_path / "p.jsonl")
    assert meta["instruction"] == SUFFIX and meta["rows"] == 4
    assert [r["problem"] + meta["instruction"] for r in made] == [r["prompt"][0]["content"] for r in rows]
    one, x = sample.problem_id("What is 1?"), sample.problem_id("Is $x$ it")
    assert [r["pid"] for r in made] == [one, x, f"{one}-2", f"{one}-3"]
    assert [r["answer"] for r in made] == ["1", "x", "1", "one"]

    Dataset.from_list(chat_rows(known, space="")).to_parquet(tmp_path / "verl.parquet")
    said = inside(capsys, "problems", "--source", tmp_path / "verl.parquet", "--out", tmp_path / "v.jsonl")
    assert "read as verl" in said and "2 duplicates (dropped)" in said
    assert common.read_meta(tmp_path / "v.jsonl")["instruction"] == SUFFIX               # the same in both
    inside(capsys, "problems", "--source", tmp_path / "verl.parquet", "--keep-instruction", "--out", tmp_path / "k.jsonl")
    assert all(r["problem"].endswith(SUFFIX) for r in rows_of(tmp_path / "k.jsonl"))
    assert common.read_meta(tmp_path / "k.jsonl")["instruction"] is None


def test_lists_of_alternatives_lose_their_line_breaks(tmp_path, capsys):
    rows = [{"idx": i, "problem": f"p {i}", "solution": "", "type": "t", "answer": answer}
            for i, answer in enumerate([["0.01\n", "0.02\n"], ["7\n", "7"], ["x"]])]
    path = save_text(rows, tmp_path / "array.json")
    assert "read as oxa_minerva" in inside(capsys, "problems", "--source", path, "--out", tmp_path / "p.jsonl")
    assert [r["answer"] for r in rows_of(tmp_path / "p.jsonl")] == [["0.01", "0.02"], ["7", "7"], ["x"]]


def test_gsm8k_as_problems_and_as_traces(tmp_path, tiny_model_dir, capsys):
    solution = "He has 2*3 = <<2*3=6>>6 and\nthen 6+1 = $<<6+1=7>>7 more.\n#### 1,007"
    path = write(tmp_path / "train.jsonl", [{"question": "How many?", "answer": solution}])
    assert "read as gsm8k" in inside(capsys, "problems", "--source", path, "--out", tmp_path / "p.jsonl")
    assert rows_of(tmp_path / "p.jsonl")[0]["answer"] == "1,007"
    inside(capsys, "teacher", "--source", path, "--model", tiny_model_dir, "--out", tmp_path / "t.jsonl",
           "--problems-out", tmp_path / "tp.jsonl")
    (trace,), (problem,) = rows_of(tmp_path / "t.jsonl"), rows_of(tmp_path / "tp.jsonl")
    assert trace["response"] == ("<think>\nHe has 2*3 = 6 and\nthen 6+1 = $7 more.\n</think>\n\n\\boxed{1,007}")
    from grading.verifier import verify
    assert verify(trace["response"], problem["answer"]).correct
    path = write(tmp_path / "bad.jsonl", [{"question": "How many?", "answer": solution}, {"question": "b", "answer": "7"}])
    said = inside(capsys, "problems", "--source", path, "--out", tmp_path / "x.jsonl", ok=False)
    assert "bad.jsonl:2: #### must stand once in the answer" in said


SENTENCE = " Please reason step by step, and put your final answer within \\boxed{}."


@pytest.mark.parametrize("problems, found", [
    (["Is it $x$?" + SUFFIX, "Find $y$." + SUFFIX], SUFFIX),
    (["Is it $x$? " + SUFFIX, "Find $y$." + SUFFIX], SUFFIX),                             # a space is the problem's own
    (["Is it $x$?" + SENTENCE, "Is it $y$?" + SENTENCE], SENTENCE),
    (["One day." + SENTENCE, "Is it $y$?" + SENTENCE], SENTENCE),
    (["a\nAnswer with one number.", "b\nAnswer with one number."], "\nAnswer with one number."),
    (["Is it $x$?" + SUFFIX], ""),                                                        # one problem has no common text
    (["Is it $x$?" + SUFFIX] * 2, ""),
    (["Is it $x$?" + SUFFIX, "Find $y$."], ""),
    (["1+2 mod 100", "3+2 mod 100"], ""),                                                 # of the problem itself
    (["Tom has 2. How many apples has he?", "Ann has 3. How many apples has he?"], ""),
    (["a\nAnswer:", "b\nAnswer:"], ""),
    (["a\nFind the remainder when it is divided by 9.", "b\nFind the remainder when it is divided by 9."], ""),
    ([], ""),
])
def test_the_instruction_is_what_all_problems_end_in(problems, found):
    assert sample.find_instruction(problems) == found


def test_the_instruction_of_traces_and_of_a_long_source(tmp_path, tiny_model_dir, capsys):
    rows = [{"query": f"Is it {i}?" + SUFFIX, "answer": "1", "DeepSeek-R1_Response_List": ["<think>x</think>1"]}
            for i in range(sample.LOOK_AHEAD + 1)]
    path = write(tmp_path / "t.jsonl", rows)
    args = ["teacher", "--model", tiny_model_dir, "--problems-out", tmp_path / "p.jsonl"]
    inside(capsys, *args, "--source", path, "--out", tmp_path / "o.jsonl")
    assert [r["problem"] for r in rows_of(tmp_path / "p.jsonl")] == [f"Is it {i}?" for i in range(len(rows))]
    for name in ("o.jsonl", "p.jsonl"):
        assert common.read_meta(tmp_path / name)["instruction"] == SUFFIX
    rows[-1]["query"] = "Is it?"
    path = write(tmp_path / "u.jsonl", rows)
    said = inside(capsys, *args, "--source", path, "--out", tmp_path / "u_out.jsonl", ok=False)
    assert f"problem {len(rows)} does not end as the first {sample.LOOK_AHEAD} do" in said and "--keep-instruction" in said


# ----------------------------------------------------------------------------------------- data that people really have


def test_answers_of_every_kind(tmp_path, capsys):
    """Numbers are written out, what is nothing is counted, lists are alternatives."""
    nan, inf = float("nan"), float("inf")
    cases = [("3", "3"), (3, "3"), (3.0, "3"), (0.25, "0.25"), (1e-7, "0.0000001"), (1e22, "1" + 22 * "0"), (" 4\n", "4"),
             ([5], ["5"]), (["5", 6.5, None], ["5", "6.5"]), (nan, None), (inf, None), (None, None), ("", None),
             ("NaN", None), ("null", None), ([], None), ([None], None), ([nan, ""], None), ("\\frac12", "\\frac12")]
    path = write(tmp_path / "a.jsonl", [{"question": f"q{i}", "answer": answer} for i, (answer, _) in enumerate(cases)])
    said = inside(capsys, "problems", "--source", path, "--out", tmp_path / "p.jsonl")
    made = {r["problem"]: r["answer"] for r in rows_of(tmp_path / "p.jsonl")}
    wanted = {f"q{i}": answer for i, (_, answer) in enumerate(cases) if answer is not None}
    assert made == wanted and f"{len(cases) - len(wanted)} without an answer" in said


def test_a_float_column_of_parquet(tmp_path, capsys):
    """As pandas writes whole numbers when some are missing."""
    import pyarrow
    import pyarrow.parquet
    table = pyarrow.table({"question": ["a", "b", "c"], "answer": [1.0, None, float("nan")]})
    pyarrow.parquet.write_table(table, tmp_path / "f.parquet")
    said = inside(capsys, "problems", "--source", tmp_path / "f.parquet", "--out", tmp_path / "p.jsonl")
    assert [r["answer"] for r in rows_of(tmp_path / "p.jsonl")] == ["1"] and "2 without an answer" in said


ODD_ROWS = {                           # column -> value of the second row -> what is said
    "answer_nested": ({"answer": [["7"], "8"]}, "s.jsonl:2: answer is a list of lists"),
    "answer_bool": ({"answer": True}, "s.jsonl:2: answer is true or false, text is expected"),
    "answer_struct": ({"answer": {"x": 1}}, "s.jsonl:2: answer is a struct with the fields ['x']"),
    "answer_surrogate": ({"answer": "\ud800"}, "s.jsonl:2: answer holds half a character"),
    "problem_list": ({"question": ["a"]}, "s.jsonl:2: question is a list"),
    "problem_number": ({"question": 5}, "s.jsonl:2: question is a number"),
    "problem_surrogate": ({"question": "a\udfff"}, "s.jsonl:2: question holds half a character"),
    "chat_of_two": ({"question": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]},
                    "s.jsonl:2: question is a chat of ['system', 'user']; one user message"),
    "chat_of_none": ({"question": []}, "s.jsonl:2: question is a chat of []"),
    "chat_of_parts": ({"question": [{"role": "user", "content": [{"type": "text"}]}]}, "s.jsonl:2: question is a list"),
    "missing": ({"question": "a", "answer": ...}, "s.jsonl:2: no column answer"),
}


@pytest.mark.parametrize("name", ODD_ROWS)
def test_odd_rows_are_one_sentence_with_file_and_line(name, tmp_path, capsys):
    changes, said = ODD_ROWS[name]
    row = {k: v for k, v in {"question": "b", "answer": "2", **changes}.items() if v is not ...}
    path = write(tmp_path / "s.jsonl", [{"question": "a", "answer": "1"}, row])
    assert said in inside(capsys, "problems", "--source", path, "--out", tmp_path / "x.jsonl", ok=False)
    assert not (tmp_path / "x.jsonl").exists()


def test_chats_and_structs_by_named_columns(tmp_path, capsys):
    path = write(tmp_path / "c.jsonl", chat_rows([("a", "1"), ("b", "2")]))
    args = ["problems", "--source", path, "--out", tmp_path / "p.jsonl", "--columns", "problem=prompt"]
    said = inside(capsys, *args, "answer=reward_model", ok=False)
    assert "c.jsonl:1: reward_model is a struct with the fields ['ground_truth', 'style'] (name one" in said
    assert "no column reward_model.gold" in inside(capsys, *args, "answer=reward_model.gold", ok=False)
    inside(capsys, *args, "answer=reward_model.ground_truth")
    assert [(r["problem"], r["answer"]) for r in rows_of(tmp_path / "p.jsonl")] == [("a ", "1"), ("b ", "2")]


def test_empty_problems_are_counted_and_own_pids_checked(tmp_path, capsys):
    path = write(tmp_path / "e.jsonl", [{"question": q, "answer": "1"} for q in ("", "  \n", "a", None, "b")])
    said = inside(capsys, "problems", "--source", path, "--out", tmp_path / "p.jsonl")
    assert "5 rows, 3 empty problems, 2 kept" in said
    good = {"pid": "p", "problem": "a", "answer": "1", "source": "s"}
    for row, sentence in (({"pid": ""}, "o.jsonl:2: pid is empty"), ({"pid": 3}, "o.jsonl:2: pid is a number"),
                          ({"pid": "\ud800"}, "o.jsonl:2: pid holds half"), ({"problem": "b"}, "the pid p stands for two")):
        path = write(tmp_path / "o.jsonl", [good, {**good, **row}])
        assert sentence in inside(capsys, "problems", "--source", path, "--out", tmp_path / "x.jsonl", ok=False)


def test_responses_of_every_kind(tmp_path, tiny_model_dir, capsys):
    texts = [["<think>x</think>1", None, "", "  "], [], None, "<think>y</think>1"]
    rows = [{"query": f"q{i}", "answer": "1", "DeepSeek-R1_Response_List": t} for i, t in enumerate(texts)]
    args = ["teacher", "--model", tiny_model_dir]
    said = inside(capsys, *args, "--source", write(tmp_path / "t.jsonl", rows), "--out", tmp_path / "o.jsonl")
    assert [r["response"] for r in rows_of(tmp_path / "o.jsonl")] == ["<think>x</think>1", "<think>y</think>1"]
    assert "3 empty responses" in said and "2 rows without a response" in said and "2 responses," in said
    for odd, sentence in ((["\ud800"], "holds half a character"), ([1], "is a number"), ({"a": 1}, "is a struct")):
        rows[1]["DeepSeek-R1_Response_List"] = odd
        path = write(tmp_path / "s.jsonl", rows)
        said = inside(capsys, *args, "--source", path, "--out", tmp_path / "x.jsonl", ok=False)
        assert "s.jsonl:2: DeepSeek-R1_Response_List " + sentence in said


# -------------------------------------------------------------------------------------------------------- contamination


def test_contamination_drops_overlap_but_not_boilerplate(tmp_path, tiny_model_dir, capsys):
    words = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron".split()
    bench = write(tmp_path / "bench.jsonl", [
        {"pid": "b0", "problem": "Let " + " ".join(words) + " be given."},
        {"pid": "b1", "problem": "Short one: 2 + 2"},
        *({"pid": f"b{i}", "problem": f"Question {i} {INTEGERS}"} for i in (2, 3, 4))])
    train = [
        ("thirteen", "Suppose, " + ", ".join(words[:13]).upper() + "!"),   # punctuation and case do not hide it
        ("twelve", "Suppose " + " ".join(words[:12]) + " only"),
        ("short", "short ONE 2 2"),
        ("inside", "a short one 2 2 inside a longer text is not the same problem"),
        ("boiler", f"Another question {INTEGERS}"),
        ("clean", "What is the capital of France")]
    problems = write(tmp_path / "p.jsonl", [{"pid": i, "problem": t, "answer": "1", "source": "s"} for i, t in train])
    args = ["problems", "--source", problems, "--benchmarks", bench]
    said = inside(capsys, *args, "--out", tmp_path / "clean.jsonl")
    assert [r["pid"] for r in rows_of(tmp_path / "clean.jsonl")] == ["twelve", "inside", "boiler", "clean"]
    report = json.loads((tmp_path / "clean.contamination.json").read_text())
    assert [(d["pid"], d["bench_pid"]) for d in report["dropped"]] == [("thirteen", "b0"), ("short", "b1")]
    assert report["benchmarks"] == {"bench": {"n_problems": 5, "n_found_in_training": 2, "n_training_dropped": 2}}
    assert set(report["boilerplate"].values()) == {3} and "2 training problems dropped" in said
    inside(capsys, *args, "--boilerplate", 0, "--out", tmp_path / "strict.jsonl")
    assert [r["pid"] for r in rows_of(tmp_path / "strict.jsonl")] == ["twelve", "inside", "clean"]

    traces = write(tmp_path / "t.jsonl", [{"query": t, "answer": "1",
                                           "DeepSeek-R1_Response_List": ["<think>x</think>1"]} for _, t in train])
    inside(capsys, "teacher", "--source", traces, "--benchmarks", bench, "--model", tiny_model_dir,
           "--out", tmp_path / "o.jsonl", "--problems-out", tmp_path / "op.jsonl")
    kept = {sample.problem_id(t) for i, t in train if i not in ("thirteen", "short")}
    assert {r["pid"] for r in rows_of(tmp_path / "o.jsonl")} == kept
    assert {r["pid"] for r in rows_of(tmp_path / "op.jsonl")} == kept


# ---------------------------------------------------------------------------------------------------- self-distillation


@pytest.fixture
def problem_file(tmp_path):
    return write(tmp_path / "p.jsonl", [{"pid": f"p{i}", "problem": f"{i}+{i}=?" * (1 + 300 * (i == 4)), "answer": "1",
                                         "source": "s"}
                                        for i in range(5)])


@pytest.mark.slow
def test_samples_resume_to_the_same_bytes_on_any_number_of_ranks(tmp_path, tiny_model_dir, problem_file,
                                                                 tiny_tokenizer, capsys):
    args = ["model", "--model", tiny_model_dir, "--problems", problem_file, "--n", 3, "--max-tokens", 12, "--engine",
            "hf",
            "--max-prompt-tokens", 400]
    said = inside(capsys, *args, "--out", tmp_path / "a.jsonl")
    rows = rows_of(tmp_path / "a.jsonl")
    assert "4 problems x 3 samples" in said and "1 problems dropped" in said
    assert [r["sid"] for r in rows] == [f"p{i}:self:{k}" for i in range(4) for k in range(3)]
    assert len({r["response"] for r in rows}) > 6 and all(r["n_tokens"] <= 12 for r in rows)
    assert rows[0]["seed"] == common.request_seed(42, "p0", 0)
    meta = common.read_meta(tmp_path / "a.jsonl")
    assert meta["rows"] == 12 and sum(meta["finish"].values()) == 12 and meta["n_failed"] == 0
    whole = (tmp_path / "a.jsonl").read_bytes()

    out = tmp_path / "b.jsonl"
    inside(capsys, *args, "--out", out)
    lines = whole.decode().splitlines(keepends=True)
    out.write_text(lines[7] + lines[0] + lines[3][:20])                  # another order, and a row half written
    (tmp_path / "b.rank1.jsonl").write_text(lines[5])                    # what a killed rank 1 left
    inside(capsys, *args, "--out", out)
    assert out.read_bytes() == whole and not list(tmp_path.glob("b.rank*"))

    run(*args, "--out", tmp_path / "c.jsonl", torchrun=2)
    assert (tmp_path / "c.jsonl").read_bytes() == whole
    assert "begun with other settings" in inside(capsys, *args, "--temperature", 1, "--out", out, ok=False)
    out.rename(tmp_path / "b.rank0.jsonl")                               # killed before anything was merged
    assert "begun with other settings" in inside(capsys, *args, "--temperature", 1, "--out", out, ok=False)
    inside(capsys, *args, "--out", out)
    assert out.read_bytes() == whole


@pytest.mark.slow
def test_a_failed_rank_ends_the_job_with_its_own_message(tmp_path, tiny_model_dir, problem_file):
    """Rank 0 dies over what a killed rank 1 left; rank 1, which waits for it, is ended by torchrun."""
    (tmp_path / "o.rank1.jsonl").write_text('{"what": "is this"}\n')
    began = time.time()
    said = run("model", "--model", tiny_model_dir, "--problems", problem_file, "--n", 1, "--max-tokens", 4, "--engine",
               "hf", "--max-prompt-tokens", 400, "--out", tmp_path / "o.jsonl", torchrun=2, ok=False)
    assert "o.rank1.jsonl:1: not a row of this output" in said
    assert time.time() - began < 100                                     # start-up on a busy machine included


def test_think_that_ends_the_prompt_goes_to_the_response(tmp_path, tiny_model_dir, problem_file, capsys):
    """As with DeepSeek-R1's distilled models: markup of their own, `<think>` opened by the template."""
    from transformers import AutoTokenizer
    r1 = tmp_path / "r1"
    shutil.copytree(tiny_model_dir, r1)
    tokenizer = AutoTokenizer.from_pretrained(r1)
    tokenizer.chat_template = "{% for m in messages %}<|User|>{{ m['content'] }}{% endfor %}<|Assistant|><think>\n"
    tokenizer.save_pretrained(r1)
    text = (r1 / "tokenizer.json").read_text()
    (r1 / "tokenizer.json").write_text(text.replace("<|im_start|>", "<|User|>").replace("<|im_end|>", "<|Assistant|>"))
    said = inside(capsys, "model", "--model", r1, "--problems", problem_file, "--n", 1, "--max-tokens", 5, "--engine",
                  "hf",
                  "--max-prompt-tokens", 300, "--out", tmp_path / "o.jsonl")
    assert all(r["response"].startswith("<think>\n") for r in rows_of(tmp_path / "o.jsonl")), said
    with pytest.raises(SystemExit):
        load_tokenizer(r1)                                        # but nothing may be trained in this markup


@pytest.mark.slow
def test_model_bad_input(tmp_path, tiny_model_dir, problem_file, capsys):
    args = ["model", "--model", tiny_model_dir, "--problems", problem_file, "--engine", "hf", "--out",
            tmp_path / "o.jsonl"]
    said = inside(capsys, *args, "--max-tokens", 4000, ok=False)
    assert "max_position_embeddings = 2048" in said and "prepare_base" in said
    assert "every prompt is longer" in inside(capsys, *args, "--max-prompt-tokens", 3, "--max-tokens", 4, ok=False)
    bad = write(tmp_path / "bad.jsonl", [{"pid": "p"}])
    said = inside(capsys, "model", "--model", tiny_model_dir, "--problems", bad, "--max-tokens", 4, "--engine", "hf",
                  "--out", tmp_path / "o.jsonl", ok=False)
    assert "bad.jsonl:1: field 'problem' is missing" in said
    good = {"pid": "p", "problem": "a"}
    for rows in ([good, good], [good, {**good, "pid": ""}], [good, {"pid": "q", "problem": " "}],
                 [good, {"pid": "\ud800", "problem": "a"}], [good, {"pid": "q", "problem": "\udfff"}]):
        path = write(tmp_path / "odd.jsonl", rows)
        assert "odd.jsonl" in inside(capsys, "model", "--model", tiny_model_dir, "--problems", path, "--max-tokens", 4,
                                     "--engine", "hf", "--out", tmp_path / "o.jsonl", ok=False)
    for flag, value in (("--name", ""), ("--name", "a/b"), ("--name", "a b"), ("--seed", -1)):
        assert flag in inside(capsys, *args, flag, value, ok=False)
    assert not (tmp_path / "o.jsonl").exists()
    run("model", "--model", tmp_path / "none", "--problems", problem_file, "--out", tmp_path / "o.jsonl", ok=False)


# ----------------------------------------------------------------------------------------------- base model preparation


def prepare(capsys, *args, ok=True):
    return inside(capsys, *args, ok=ok, main=prepare_base.main)


@pytest.fixture
def old_base(tmp_path):
    """A Qwen2 as it is published: 4,096 positions, rope_theta 10,000, a template with a default system prompt."""
    base = Path(make_model(tmp_path / "base", positions=4096, tie=False))
    config = json.loads((base / "config.json").read_text())
    config.pop("rope_parameters", None)
    config.update(rope_theta=10000, max_position_embeddings=4096)
    (base / "config.json").write_text(json.dumps(config))
    settings = json.loads((base / "tokenizer_config.json").read_text())
    template = "<|im_start|>system\nYou are helpful.<|im_end|>\n{{ messages[0]['content'] }}"
    (base / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    (base / "chat_template.jinja").write_text(template)
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 256, "top_p": 0.8}))
    return base


def test_prepare_base(old_base, tmp_path, capsys):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
    out = tmp_path / "prepared"
    args = ["--model", old_base, "--out", out]
    prepare(capsys, *args)
    config = AutoConfig.from_pretrained(out)
    assert config.rope_parameters["rope_theta"] == 1e6 and config.max_position_embeddings == 40000
    assert AutoConfig.from_pretrained(old_base).rope_parameters["rope_theta"] == 1e4
    assert (out / "model.safetensors").read_bytes() == (old_base / "model.safetensors").read_bytes()
    tokenizer = load_tokenizer(out)
    text = tokenizer.decode(render_prompt(tokenizer, "1+1?"))
    assert text == f"<|im_start|>user\n1+1?{INSTRUCTION}<|im_end|>\n<|im_start|>assistant\n"
    generation = GenerationConfig.from_pretrained(out)
    assert generation.eos_token_id == stop_ids(tokenizer) and generation.top_p in (None, 1.0)
    # the rotation really is slower: position 3,000 sees position 0 differently
    ids = torch.arange(200)[None] % 250
    with torch.no_grad():
        old, new = (AutoModelForCausalLM.from_pretrained(d)(ids).logits for d in (old_base, out))
    assert (old[0, 0] - new[0, 0]).abs().max() < 1e-5 < 1e-3 < (old[0, -1] - new[0, -1]).abs().max()
    before = {f.name: f.stat().st_mtime_ns for f in out.iterdir()}
    assert "already prepared" in prepare(capsys, *args)
    assert before == {f.name: f.stat().st_mtime_ns for f in out.iterdir()}
    assert "is not" in prepare(capsys, *args, "--positions", 50000, ok=False)
    # preparing what is prepared changes nothing, however often
    prepare(capsys, "--model", out, "--out", tmp_path / "twice")
    assert "already prepared" in prepare(capsys, "--model", out, "--out", tmp_path / "twice")
    assert (tmp_path / "twice" / "config.json").read_bytes() == (out / "config.json").read_bytes()


def test_prepare_base_keeps_the_rope_of_a_base_that_has_the_positions(old_base, tmp_path, capsys):
    for wanted in (4096, 1000):
        out = tmp_path / f"p{wanted}"
        said = prepare(capsys, "--model", old_base, "--positions", wanted, "--rope-theta", 5e5, "--out", out)
        assert "the base has 4096 positions: these and its rope are kept" in said
        old, new = (json.loads((d / "config.json").read_text()) for d in (old_base, out))
        assert new == old and load_tokenizer(out).model_max_length == 4096
        tokenizer = load_tokenizer(out)
        assert "You are helpful" not in tokenizer.decode(render_prompt(tokenizer, "1+1?"))


def names_in(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")      # which goes with this process


def test_prepare_base_leaves_nothing_half_made(old_base, tmp_path, capsys, monkeypatch):
    """The sidecar comes with the directory; what a kill left beside it is gone after the next start."""
    out = tmp_path / "prepared"
    args = ["--model", old_base, "--out", out]
    stop = lambda *_: (_ for _ in ()).throw(SystemExit(130))
    with monkeypatch.context() as patch:
        patch.setattr(prepare_base.Path, "rename", stop)
        with pytest.raises(SystemExit):
            prepare_base.main([str(a) for a in args])
    assert not out.exists() and names_in(tmp_path) == ["base"]
    for _ in range(2):                                                       # made, and already there
        (tmp_path / ".prepared.tmp").mkdir()
        (tmp_path / ".prepared.tmp" / "model.safetensors").write_text("half")
        prepare(capsys, *args)
        assert common.read_meta(out / "base")["schema"] == "base"
        assert names_in(tmp_path) == ["base", "prepared"]
    monkeypatch.setenv("RANK", "1")                                          # of several ranks one writes
    prepare(capsys, "--model", old_base, "--out", tmp_path / "by_rank_1")
    assert not (tmp_path / "by_rank_1").exists()


@pytest.mark.parametrize("name, content, said", [
    ("model.safetensors", b"", "is not whole"), ("model.safetensors", b"\xff" * 100, "is not whole"),
    ("model.safetensors", None, "is not whole"), ("config.json", b"{", "config.json cannot be read"),
    ("tokenizer_config.json", b"[", "tokenizer")])
def test_prepare_base_refuses_broken_files(old_base, tmp_path, capsys, name, content, said):
    whole = (old_base / name).read_bytes()
    (old_base / name).write_bytes(whole[:len(whole) // 2] if content is None else content)
    assert said in prepare(capsys, "--model", old_base, "--out", tmp_path / "o", ok=False)


@pytest.mark.parametrize("change, said", [
    ({"num_hidden_layers": 3, "layer_types": None}, "the weights lack model.layers.2."),
    ({"num_hidden_layers": 1, "layer_types": None}, "config.json has no parameter"),
    ({"hidden_size": 32}, "config.json makes it"), ({"intermediate_size": 64}, "config.json makes it"),
    ({"use_sliding_window": True}, "sliding-window"), ({"model_type": "bert"}, "config.json"),
    ({"tie_word_embeddings": True}, "lm_head.weight differs"), ({"vocab_size": 300}, "config.json makes it [300"),
    ({"rope_scaling": {"type": "yarn", "factor": 4}}, "plain RoPE")])
def test_prepare_base_refuses_what_does_not_belong_together(old_base, tmp_path, capsys, change, said):
    config = json.loads((old_base / "config.json").read_text())
    (old_base / "config.json").write_text(json.dumps({**config, **change}))
    assert said in prepare(capsys, "--model", old_base, "--out", tmp_path / "o", ok=False)
    assert not (tmp_path / "o").exists()


def test_prepare_base_refuses_a_missing_output_layer_and_a_small_embedding(tmp_path, capsys):
    tied = Path(make_model(tmp_path / "tied", tie=True))
    config = json.loads((tied / "config.json").read_text())
    (tied / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    assert "the weights lack lm_head.weight" in prepare(capsys, "--model", tied, "--out", tmp_path / "o", ok=False)
    small = make_model(tmp_path / "small", vocab_size=100, eos_token_id=1)
    assert "the tokenizer has 259 tokens" in prepare(capsys, "--model", small, "--out", tmp_path / "o",
                                                    ok=False)
