"""02 verify and score: perplexities against a plain Hugging Face loop, resume to the same bytes,
two ranks, refusals."""

import importlib
import json
import math
import random
import subprocess
import sys

import pytest
import torch

import common
from conftest import ROOT, make_model
from model import INSTRUCTION

stage = importlib.import_module("02_verify_score")

N_PROBLEMS = 9
N_SAMPLES = 70

# The 70 rows are several blocks and packs; the longest may fill the model's positions.
SMALL = ["--block", "16", "--token-budget", "1000", "--max-score-tokens", "600"]

# ---------------------------------------------------------------------- rows, and running the stage


def write(path, rows):
    """A JSONL file of the rows."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def problem_rows():
    """What is 0 + 1? and so on."""
    rows = []
    for p in range(N_PROBLEMS):
        rows.append({"pid": f"p{p}",
                     "problem": f"What is {p} + 1?",
                     "answer": [str(p + 1), "none"],
                     "source": "t"})
    return rows


def sampled_rows():
    """Responses of 0 to 560 tokens (a byte is a token): noise, and then nothing, the right answer,
    or markup as text. Of each kind some are marked as cut."""
    draw = random.Random(0)
    rows = []
    for i in range(N_SAMPLES):
        p = i % N_PROBLEMS
        k = i // N_PROBLEMS
        n = draw.choice([0, 1, 2, 3, draw.randint(4, 60), draw.randint(60, 500)])
        noise = "".join(draw.choices("abc 01+=\n", k=n))
        text = noise + draw.choice(["", f"</think> \\boxed{{{p + 1}}}", "<|im_end|>é"])
        rows.append({"sid": f"p{p}:t:{k}",
                     "pid": f"p{p}",
                     "source": "t",
                     "k": k,
                     "seed": i,
                     "response": text,
                     "n_tokens": len(text.encode()) + 1,
                     "finish": draw.choice(["stop", "length"])})
    return rows


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A directory with a model of 600 positions, problems, samples, and these verified."""
    path = tmp_path_factory.mktemp("score")
    make_model(path / "model", positions=600)
    write(path / "problems.jsonl", problem_rows())
    write(path / "samples.jsonl", sampled_rows())
    stage.main([*verify_command(path, path / "verified.jsonl"), "--block", "16"])
    return path


def verify_command(world, out, samples=None, problems=None):
    """The command line of `verify`: of the world's files, where no others are named."""
    return ["verify",
            "--samples", str(samples or world / "samples.jsonl"),
            "--problems", str(problems or world / "problems.jsonl"),
            "--out", str(out)]


def score_command(world, out, samples=None, model=None):
    """The command line of `score`: of the world's files, where no others are named."""
    return ["score",
            "--samples", str(samples or world / "verified.jsonl"),
            "--model", str(model or world / "model"),
            "--out", str(out)]


def score(world, out, *more):
    """Score the verified responses -> scored rows."""
    stage.main([*score_command(world, out), *SMALL, *more])
    return list(common.read_jsonl(out))


def refused(capsys, *argv):
    """Run the stage, which must stop with code 2 -> what it says about that."""
    with pytest.raises(SystemExit) as stop:
        stage.main([str(word) for word in argv])
    assert stop.value.code == 2
    return capsys.readouterr().err


# ------------------------------------------------------------------------------------- perplexities


@torch.no_grad()
def plain_nll(model, tokenizer, row, context, max_tokens):
    """One row, one forward pass of the stock model, full logits -> (sum of -log p, how many)."""
    def ids_of(text, **flags):
        return tokenizer(text, add_special_tokens=False, **flags)["input_ids"]

    ids = ids_of(row["response"], split_special_tokens=True)
    start = 1
    if context == "prompt":
        prompt = ids_of("<|im_start|>user\n" + row["problem"] + INSTRUCTION + "<|im_end|>\n"
                        "<|im_start|>assistant\n")
        ids = prompt + ids
        start = len(prompt)
    ids = ids[:max_tokens]
    if len(ids) <= start:
        return 0.0, 0
    logits = model(torch.tensor([ids])).logits[0]
    logp = logits.double().log_softmax(dim=-1)
    nll = 0.0
    for t in range(start, len(ids)):
        nll -= logp[t - 1, ids[t]].item()
    return nll, len(ids) - start


def with_room_for_prompts(world, path):
    """A world of the responses that fit into the model's positions behind their prompts."""
    path.mkdir()
    rows = common.read_jsonl(world / "verified.jsonl")
    write(path / "verified.jsonl", [row for row in rows if row["n_tokens"] < 400])
    (path / "model").symlink_to(world / "model")
    return path


@pytest.mark.parametrize("context,max_tokens", [
    ("response", 600),
    ("response", 100),
    ("prompt", 600)])
def test_perplexities_equal_a_plain_loop(world, tmp_path, context, max_tokens):
    """Packed, chunked scoring gives what one plain forward pass per response gives."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained(world / "model")
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    if context == "prompt":
        world = with_room_for_prompts(world, tmp_path / "short")
    verified = list(common.read_jsonl(world / "verified.jsonl"))

    rows = score(world, tmp_path / "s.jsonl", "--ppl-context", context,
                 "--max-score-tokens", str(max_tokens))

    assert [row["sid"] for row in rows] == [row["sid"] for row in verified]
    n_empty = 0
    for row in rows:
        nll, n = plain_nll(model, tokenizer, row, context, max_tokens)
        assert row["n_scored"] == n
        assert row["nll_sum"] == pytest.approx(nll, rel=1e-4)
        if n == 0:
            assert row["ppl"] is None
            n_empty += 1
        else:
            assert row["ppl"] == pytest.approx(math.exp(nll / n), rel=1e-4)
        assert row["ppl_context"] == context
        assert row["scorer"] == str(world / "model")
    assert n_empty > 0
    assert common.read_meta(tmp_path / "s.jsonl")["unscored"] == n_empty


def test_perplexities_in_bfloat16_are_those_of_float32_but_for_rounding(world, tmp_path, capsys):
    exact = score(world, tmp_path / "float32", "--dtype", "float32")
    rounded = score(world, tmp_path / "bfloat16", "--dtype", "bfloat16")
    n_scored = 0
    n_differ = 0
    for a, b in zip(exact, rounded, strict=True):
        if a["ppl"] is None:
            continue
        assert b["ppl"] == pytest.approx(a["ppl"], rel=0.05)
        n_scored += 1
        n_differ += a["ppl"] != b["ppl"]
    assert n_differ > 0.9 * n_scored, "bfloat16 was really used"
    other_type = [*score_command(world, tmp_path / "float32"), *SMALL, "--dtype", "bfloat16"]
    said = refused(capsys, *other_type)
    assert "dtype" in said and "--force starts over" in said, "the two are not mixed in one file"


# -------------------------------------------------------------------------------- resume, and ranks


@pytest.mark.slow
@pytest.mark.parametrize("n_whole,half", [
    (0, False),
    (5, True),
    (16, False),
    (37, True),
    (70, False)])
def test_a_stopped_run_goes_on_to_the_same_bytes(world, tmp_path, n_whole, half):
    """Whatever a stop has left of the output, whole rows and a half one, the next run ends with the
    bytes of an uninterrupted one, and verify with its counts."""
    score(world, tmp_path / "whole.jsonl")
    scored = (tmp_path / "whole.jsonl").read_bytes()
    lines = scored.splitlines(keepends=True)
    out = tmp_path / "cut.jsonl"
    score(world, out)                           # for its sidecar
    half_line = lines[n_whole][:40] if half else b""
    out.write_bytes(b"".join(lines[:n_whole]) + half_line)
    score(world, out)
    assert out.read_bytes() == scored
    assert common.read_meta(out)["rows"] == N_SAMPLES

    verified = (world / "verified.jsonl").read_bytes()
    lines = verified.splitlines(keepends=True)
    out = tmp_path / "verified.jsonl"
    half_line = b'{"sid": "p0' if half else b""
    out.write_bytes(b"".join(lines[:n_whole]) + half_line)
    stage.main(verify_command(world, out))
    assert out.read_bytes() == verified
    meta = common.read_meta(out)
    uninterrupted = common.read_meta(world / "verified.jsonl")
    assert meta["status"] == uninterrupted["status"]
    assert sum(meta["status"].values()) == N_SAMPLES
    assert meta["rows"] == N_SAMPLES
    assert uninterrupted["rows"] == N_SAMPLES


@pytest.mark.slow
def test_two_ranks_give_what_one_gives(world, tmp_path):
    """Going on after 20 rows, two ranks write the rows that one wrote, in their order; only the
    last bits of a sum may differ."""
    one = score(world, tmp_path / "one.jsonl")
    out = write(tmp_path / "two.jsonl", one[:20])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, ROOT / "02_verify_score.py", *score_command(world, out), *SMALL]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    two = list(common.read_jsonl(out))
    assert len(two) == len(one)
    for a, b in zip(one, two):
        assert {**a, "ppl": 0, "nll_sum": 0} == {**b, "ppl": 0, "nll_sum": 0}
        assert a["nll_sum"] == pytest.approx(b["nll_sum"], rel=1e-5)
        assert (a["ppl"] is None) == (b["ppl"] is None)


# ----------------------------------------------------------------------------------------- verdicts


def test_verdicts_and_their_counts(world):
    """A right answer counts though its response was cut; a response cut before its answer is told
    from one that ended without."""
    rows = list(common.read_jsonl(world / "verified.jsonl"))
    for row in rows:
        p = int(row["pid"].removeprefix("p"))
        right = row["response"].endswith(f"</think> \\boxed{{{p + 1}}}")
        assert row["correct"] is right
        assert row["problem"] == f"What is {p} + 1?"
        if not right:
            status = "truncated" if row["finish"] == "length" else "no_think_end"
            assert row["status"] == status
            assert row["predicted"] is None
    counts = common.read_meta(world / "verified.jsonl")["status"]
    assert set(counts) == {"correct/ok", "wrong/truncated", "wrong/no_think_end"}
    assert sum(counts.values()) == len(rows)


def test_an_answer_that_cannot_be_read_is_unknown_and_not_wrong(world, tmp_path, capsys):
    problems = [{**row, "answer": r"\unreadable{"} for row in problem_rows()]
    path = write(tmp_path / "p.jsonl", problems)
    out = tmp_path / "v.jsonl"

    stage.main(verify_command(world, out, problems=path))

    rows = list(common.read_jsonl(out))
    assert {row["correct"] for row in rows if row["predicted"] is not None} == {None}
    meta = common.read_meta(out)
    assert meta["unreadable_golds"] == N_PROBLEMS
    assert meta["unknown"] > 0
    assert meta["unknown"] == sum(row["correct"] is None for row in rows)
    printed = capsys.readouterr().out
    assert "could not be judged (correct: null)" in printed
    assert "the gold of 9 of 9 problems cannot be read" in printed
    assert printed.index("unreadable{") < printed.index("responses:"), "before the verdicts"


def test_only_one_verdict_is_scored_and_kept(world, tmp_path):
    every = score(world, tmp_path / "all.jsonl")
    for only, verdict in (("wrong", False), ("correct", True)):
        kept = score(world, tmp_path / f"{only}.jsonl", "--only", only)
        expected = [row["sid"] for row in every if row["correct"] is verdict]
        assert [row["sid"] for row in kept] == expected


# ----------------------------------------------------------------------------------------- refusals


def test_score_refuses_what_it_cannot_do_right(world, tmp_path, capsys):
    out = tmp_path / "o.jsonl"
    command = score_command(world, out)

    # a sequence that the model or a pack cannot hold
    make_model(tmp_path / "short", positions=128)
    short = score_command(world, out, model=tmp_path / "short")
    assert "max_position_embeddings = 128" in refused(capsys, *short)
    said = refused(capsys, *command, "--token-budget", "100")
    assert "raise --token-budget (100)" in said
    said = refused(capsys, *command, "--ppl-context", "prompt", "--max-score-tokens", "700")
    assert "max_position_embeddings = 600" in said

    # inputs that are not there, or not verified
    no_samples = score_command(world, out, samples=tmp_path / "missing.jsonl")
    assert "missing.jsonl does not exist" in refused(capsys, *no_samples)
    no_model = score_command(world, out, model=tmp_path / "nowhere")
    assert "nowhere does not exist" in refused(capsys, *no_model)
    not_verified = score_command(world, out, samples=world / "samples.jsonl")
    assert "'correct'" in refused(capsys, *not_verified)
    assert not out.exists() or not out.read_text(), "nothing is written"

    # a response that is there twice
    verified = list(common.read_jsonl(world / "verified.jsonl"))
    path = write(tmp_path / "twice.jsonl", verified + verified[:1])
    twice = score_command(world, tmp_path / "t.jsonl", samples=path)
    assert "occurs twice" in refused(capsys, *twice)


def test_outputs_of_other_settings_or_inputs_are_not_mixed(world, tmp_path, capsys):
    out = tmp_path / "o.jsonl"
    before = score(world, out)
    command = score_command(world, out)
    said = refused(capsys, *command, *SMALL, "--max-score-tokens", "50")
    assert "other settings" in said

    (tmp_path / "o.meta.json").unlink()
    out.write_text(out.read_text().replace('"sid": "p3:t:1"', '"sid": "p3:other:1"'))
    assert "holds other rows than the input" in refused(capsys, *command)
    assert len(list(common.read_jsonl(out))) == len(before), "nothing is lost"


def test_verdicts_of_two_graders_are_not_mixed(world, tmp_path, capsys, monkeypatch):
    def another_grader():
        return "grading/verifier.py another"

    out = tmp_path / "v.jsonl"
    command = verify_command(world, out)
    stage.main(command)
    grader = common.read_meta(out)["args"]["grader"]
    assert grader.startswith("grading/verifier.py ")
    monkeypatch.setattr(stage.verifier, "grader_name", another_grader)
    assert "other settings (grader)" in refused(capsys, *command)


def test_verify_refuses_what_it_cannot_judge(world, tmp_path, capsys):
    problems = problem_rows()
    bad_files = (
        ("few", problems[:3], "samples.jsonl:4: no problem 'p3'"),
        ("twice", problems + problems[:1], "occurs twice"),
        ("none", [], "is empty"),
        ("number", [{**problems[0], "answer": 1}], "'answer'"))
    for name, rows, message in bad_files:
        path = write(tmp_path / name, rows)
        command = verify_command(world, tmp_path / "v.jsonl", problems=path)
        assert message in refused(capsys, *command)

    no_response = {"sid": "a", "pid": "p0", "n_tokens": 3, "finish": "stop"}
    path = write(tmp_path / "s.jsonl", [no_response])
    command = verify_command(world, tmp_path / "w.jsonl", samples=path)
    assert "'response' is missing" in refused(capsys, *command)


@pytest.mark.slow
def test_the_exit_code_on_the_command_line(tmp_path):
    teacher = tmp_path / "no.jsonl"
    command = [sys.executable, ROOT / "02_verify_score.py", "select", "--arm", "sft",
               "--teacher", teacher, "--out", tmp_path / "o.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == f"error: {teacher} does not exist"
