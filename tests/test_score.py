"""02 verify and score: perplexities against a plain Hugging Face loop, resume to the same bytes, two ranks, refusals."""

import importlib
import json
import os
import random
import subprocess
import sys

import pytest
import torch

import common
from model import INSTRUCTION
from conftest import ROOT, make_model

stage = importlib.import_module("02_verify_score")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model of 600 positions, problems, and verified responses of 0 to 560 tokens (a byte is a token), markup among them."""
    path, draw = tmp_path_factory.mktemp("score"), random.Random(0)
    make_model(path / "model", positions=600)
    with open(path / "problems.jsonl", "w") as file:
        for p in range(9):
            file.write(json.dumps({"pid": f"p{p}", "problem": f"What is {p} + 1?", "answer": [str(p + 1), "none"], "source": "t"}) + "\n")
    with open(path / "samples.jsonl", "w") as file:
        for i in range(70):
            n = draw.choice([0, 1, 2, 3, draw.randint(4, 60), draw.randint(60, 500)])
            text = "".join(draw.choices("abc 01+=\n", k=n)) + draw.choice(["", f"</think> \\boxed{{{i % 9 + 1}}}", "<|im_end|>é"])
            file.write(json.dumps({"sid": f"p{i % 9}:t:{i // 9}", "pid": f"p{i % 9}", "source": "t", "k": i // 9, "seed": i,
                                   "response": text, "n_tokens": len(text.encode()) + 1,
                                   "finish": draw.choice(["stop", "length"])}, ensure_ascii=False) + "\n")
    stage.main(["verify", "--samples", f"{path}/samples.jsonl", "--problems", f"{path}/problems.jsonl",
                "--out", f"{path}/verified.jsonl", "--block", "16"])
    return path


def score(world, out, *more):
    stage.main(["score", "--samples", str(world / "verified.jsonl"), "--model", str(world / "model"), "--out", str(out),
                "--block", "16", "--token-budget", "1000", "--max-score-tokens", "600", *more])
    return list(common.read_jsonl(out))


@torch.no_grad()
def plain_nll(model, tokenizer, row, context, max_tokens):
    """One row, one forward of the stock model, full logits."""
    ids = tokenizer(row["response"], add_special_tokens=False, split_special_tokens=True)["input_ids"]
    start = 1
    if context == "prompt":
        text = "<|im_start|>user\n" + row["problem"] + INSTRUCTION + "<|im_end|>\n<|im_start|>assistant\n"
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids, start = prompt + ids, len(prompt)
    ids = ids[:max_tokens]
    if len(ids) <= start:
        return 0.0, 0
    logp = model(torch.tensor([ids])).logits[0].double().log_softmax(dim=-1)
    return -sum(logp[t - 1, ids[t]].item() for t in range(start, len(ids))), len(ids) - start


@pytest.mark.parametrize("context,max_tokens", [("response", 600), ("response", 100), ("prompt", 600)])
def test_perplexities_equal_a_plain_loop(world, tmp_path, context, max_tokens):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model, tokenizer = (kind.from_pretrained(world / "model") for kind in (AutoModelForCausalLM, AutoTokenizer))
    if context == "prompt":
        short = [r for r in common.read_jsonl(world / "verified.jsonl") if r["n_tokens"] < 400]
        folder = tmp_path / "short"
        folder.mkdir()
        (folder / "verified.jsonl").write_text("".join(json.dumps(r) + "\n" for r in short))
        (folder / "model").symlink_to(world / "model")
        world = folder
    rows = score(world, tmp_path / "s.jsonl", "--ppl-context", context, "--max-score-tokens", str(max_tokens))
    assert [r["sid"] for r in rows] == [r["sid"] for r in common.read_jsonl(world / "verified.jsonl")]
    n_empty = 0
    for row in rows:
        nll, n = plain_nll(model, tokenizer, row, context, max_tokens)
        assert row["n_scored"] == n and row["nll_sum"] == pytest.approx(nll, rel=1e-4)
        assert row["ppl"] == (None if n == 0 else pytest.approx(torch.tensor(nll / n).exp().item(), rel=1e-4))
        assert row["ppl_context"] == context and row["scorer"] == str(world / "model")
        n_empty += n == 0
    assert n_empty > 0 and common.read_meta(tmp_path / "s.jsonl")["unscored"] == n_empty


def test_perplexities_in_bfloat16_are_those_of_float32_but_for_rounding(world, tmp_path):
    exact, rounded = (score(world, tmp_path / dtype, "--dtype", dtype) for dtype in ("float32", "bfloat16"))
    pairs = [(a["ppl"], b["ppl"]) for a, b in zip(exact, rounded, strict=True) if a["ppl"] is not None]
    assert all(b == pytest.approx(a, rel=0.05) for a, b in pairs) and sum(a != b for a, b in pairs) > 0.9 * len(pairs)
    with pytest.raises(SystemExit):
        score(world, tmp_path / "float32", "--dtype", "bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize("n_whole,half", [(0, False), (5, True), (16, False), (37, True), (70, False)])
def test_a_stopped_run_goes_on_to_the_same_bytes(world, tmp_path, n_whole, half):
    score(world, tmp_path / "whole.jsonl")
    whole = (tmp_path / "whole.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    out = tmp_path / "cut.jsonl"
    score(world, out)
    out.write_bytes(b"".join(lines[:n_whole]) + (lines[n_whole][:40] if half else b""))
    score(world, out)
    assert out.read_bytes() == whole and common.read_meta(out)["rows"] == 70
    verified = (world / "verified.jsonl").read_bytes()
    out = tmp_path / "verified.jsonl"
    out.write_bytes(b"".join(verified.splitlines(keepends=True)[:n_whole]) + (b'{"sid": "p0' if half else b""))
    stage.main(["verify", "--samples", f"{world}/samples.jsonl", "--problems", f"{world}/problems.jsonl", "--out", str(out)])
    assert out.read_bytes() == verified
    meta, first = (common.read_meta(path) for path in (out, world / "verified.jsonl"))
    assert meta["status"] == first["status"] and meta["rows"] == first["rows"] == sum(meta["status"].values()) == 70


@pytest.mark.slow
def test_two_ranks_give_what_one_gives(world, tmp_path):
    one = score(world, tmp_path / "one.jsonl")
    out = tmp_path / "two.jsonl"
    out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in one[:20]))
    argv = ["score", "--samples", world / "verified.jsonl", "--model", world / "model", "--out", out, "--block", "16",
            "--token-budget", "1000", "--max-score-tokens", "600"]
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                           ROOT / "02_verify_score.py", *argv], capture_output=True, text=True, timeout=300, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    two = list(common.read_jsonl(out))
    assert len(two) == len(one)
    for a, b in zip(one, two):
        assert {**a, "ppl": 0, "nll_sum": 0} == {**b, "ppl": 0, "nll_sum": 0}
        assert a["nll_sum"] == pytest.approx(b["nll_sum"], rel=1e-5) and (a["ppl"] is None) == (b["ppl"] is None)


def test_verdicts_and_their_counts(world):
    rows = list(common.read_jsonl(world / "verified.jsonl"))
    for row in rows:
        right = row["response"].endswith(f"</think> \\boxed{{{int(row['pid'][1:]) + 1}}}")
        assert row["correct"] is right and row["problem"] == f"What is {row['pid'][1:]} + 1?"
        if not right:
            assert row["status"] == ("truncated" if row["finish"] == "length" else "no_think_end") and row["predicted"] is None
    status = common.read_meta(world / "verified.jsonl")["status"]
    assert set(status) == {"correct/ok", "wrong/truncated", "wrong/no_think_end"} and sum(status.values()) == len(rows)


def test_an_answer_that_cannot_be_read_is_unknown_and_not_wrong(world, tmp_path, capsys):
    problems = [{**r, "answer": r"\unreadable{"} for r in common.read_jsonl(world / "problems.jsonl")]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in problems))
    out = tmp_path / "v.jsonl"
    stage.main(["verify", "--samples", f"{world}/samples.jsonl", "--problems", str(tmp_path / "p.jsonl"), "--out", str(out)])
    rows = list(common.read_jsonl(out))
    assert {r["correct"] for r in rows if r["predicted"] is not None} == {None}
    printed = capsys.readouterr().out
    assert "could not be judged (correct: null)" in printed
    assert "the gold of 9 of 9 problems cannot be read" in printed and printed.index("unreadable{") < printed.index("responses:")
    assert common.read_meta(out)["unreadable_golds"] == 9
    assert common.read_meta(out)["unknown"] == sum(r["correct"] is None for r in rows) > 0


def test_only_one_verdict_is_scored_and_kept(world, tmp_path):
    every = score(world, tmp_path / "all.jsonl")
    wrong = score(world, tmp_path / "wrong.jsonl", "--only", "wrong")
    assert [r["sid"] for r in wrong] == [r["sid"] for r in every if r["correct"] is False]
    some = score(world, tmp_path / "correct.jsonl", "--only", "correct")
    assert [r["sid"] for r in some] == [r["sid"] for r in every if r["correct"] is True]


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        stage.main([str(a) for a in argv])
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_score_refuses_what_it_cannot_do_right(world, tmp_path, capsys):
    base = ["score", "--samples", world / "verified.jsonl", "--model", world / "model", "--out", tmp_path / "o.jsonl"]
    make_model(tmp_path / "short", positions=128)
    assert "max_position_embeddings = 128" in refused(capsys, *base[:4], tmp_path / "short", *base[5:])
    assert "raise --token-budget (100)" in refused(capsys, *base, "--token-budget", "100")
    assert "max_position_embeddings = 600" in refused(capsys, *base, "--ppl-context", "prompt", "--max-score-tokens", "700")
    assert "missing.jsonl does not exist" in refused(capsys, "score", "--samples", tmp_path / "missing.jsonl", *base[3:])
    assert "missing" in refused(capsys, *base[:4], tmp_path / "missing", *base[5:])
    assert "'correct'" in refused(capsys, *base[:1], "--samples", world / "samples.jsonl", *base[3:])
    assert not (tmp_path / "o.jsonl").exists() or not (tmp_path / "o.jsonl").read_text()
    twice = (world / "verified.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "twice.jsonl").write_text("".join(twice + twice[:1]))
    assert "occurs twice" in refused(capsys, "score", "--samples", tmp_path / "twice.jsonl", *base[3:-1], tmp_path / "t.jsonl")


def test_outputs_of_other_settings_or_inputs_are_not_mixed(world, tmp_path, capsys):
    out = tmp_path / "o.jsonl"
    before = score(world, out)
    base = ["score", "--samples", world / "verified.jsonl", "--model", world / "model", "--out", out]
    assert "other settings" in refused(capsys, *base, "--max-score-tokens", "50", "--block", "16", "--token-budget", "1000")
    (tmp_path / "o.meta.json").unlink()
    out.write_text(out.read_text().replace('"sid": "p3:t:1"', '"sid": "p3:other:1"'))
    assert "holds other rows than the input" in refused(capsys, *base)
    assert len(list(common.read_jsonl(out))) == len(before), "nothing is lost"


def test_verdicts_of_two_graders_are_not_mixed(world, tmp_path, capsys, monkeypatch):
    argv = ["verify", "--samples", world / "samples.jsonl", "--problems", world / "problems.jsonl", "--out", tmp_path / "v.jsonl"]
    stage.main([str(word) for word in argv])
    assert common.read_meta(tmp_path / "v.jsonl")["args"]["grader"].startswith("grading/verifier.py ")
    monkeypatch.setattr(stage.verifier, "grader_name", lambda: "grading/verifier.py another")
    assert "other settings (grader)" in refused(capsys, *argv)


def test_verify_refuses_what_it_cannot_judge(world, tmp_path, capsys):
    lines = (world / "problems.jsonl").read_text().splitlines(keepends=True)
    base = ["verify", "--samples", world / "samples.jsonl", "--out", tmp_path / "v.jsonl", "--problems"]
    for name, text, message in (("few", "".join(lines[:3]), "samples.jsonl:4: no problem 'p3'"), ("twice", "".join(lines + lines[:1]), "occurs twice"),
                                ("none", "", "is empty"), ("number", lines[0].replace('["1", "none"]', "1"), "'answer'")):
        (tmp_path / name).write_text(text)
        assert message in refused(capsys, *base, tmp_path / name)
    (tmp_path / "s.jsonl").write_text('{"sid": "a", "pid": "p0", "n_tokens": 3, "finish": "stop"}\n')
    assert "'response' is missing" in refused(capsys, "verify", "--samples", tmp_path / "s.jsonl", "--out", tmp_path / "w.jsonl",
                                              "--problems", world / "problems.jsonl")


@pytest.mark.slow
def test_the_exit_code_on_the_command_line(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "02_verify_score.py", "select", "--arm", "sft", "--teacher", tmp_path / "no.jsonl",
                           "--out", tmp_path / "o.jsonl"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.strip() == f"error: {tmp_path / 'no.jsonl'} does not exist"
