"""01_sample.py and tools/prepare_base.py: every declared source and format, wrong shapes, the instruction, resume, overlap."""

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
    assert [r["answer"] for r in rows_of(tmp_path / "tp.jsonl")] == ["1", "4"] and "1 rows without an answer" in said


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


@pytest.mark.parametrize("change, said", [
    ({"tie_word_embeddings": True}, "lm_head.weight differs"), ({"vocab_size": 300}, "the embedding has 264 rows"),
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
    assert "no lm_head.weight" in prepare(capsys, "--model", tied, "--out", tmp_path / "o", ok=False)
    small = make_model(tmp_path / "small", vocab_size=100, eos_token_id=1)
    assert "the tokenizer has 259 tokens" in prepare(capsys, "--model", small, "--out", tmp_path / "o",
                                                    ok=False)
