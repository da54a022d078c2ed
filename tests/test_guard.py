"""The guard: a change that should be neutral is shown to be (a five-step curve of 03 and of 04, the training sets, one evaluation).

Every stage runs once, by its command line, on a small toy world. What comes out is held against tests/guard.json: sets and
responses by hash, floats to 1e-5 (another CPU may move their last bits). A change that is meant to move a number renews the
file in its own commit, and its message says why:

    python tests/test_guard.py          writes tests/guard.json anew
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STORED = Path(__file__).with_name("guard.json")
ARMS = ("sft", "sft_lp", "oxa_mle", "oxa_full")
SFT_CURVE = ("loss", "ce_loss", "ul_loss", "entropy_ce", "entropy_ul", "grad_norm", "lr")
RLVR_CURVE = ("reward", "loss", "pg_loss", "kl", "entropy", "grad_norm", "response_tokens_mean")


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def hash_of(rows, names):
    text = "\n".join(json.dumps([row[name] for name in names], ensure_ascii=False) for row in rows)
    return hashlib.sha256(text.encode()).hexdigest()


def measure(folder: Path) -> dict:
    """Runs the five stages in `folder`; returns the curves and the hashes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def run(*words):
        command = [sys.executable, *map(str, words)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]

    base, recipe = "toy/base", ("--recipe", "recipes/toy.toml")
    problems = folder / "problems.jsonl"
    run("toy/world.py", "--out", folder, "--seed", 0, "--careful-share", 0.12, "--n-queries", 160, "--traces", 8,
        "--n-eval", 16, "--n-rlvr", 48)
    run("01_sample.py", "teacher", *recipe, "--source", folder / "teacher_source.jsonl", "--model", base,
        "--out", folder / "teacher.jsonl", "--problems", problems, "--answers", "join")
    run("01_sample.py", "model", *recipe, "--model", base, "--problems", problems, "--out", folder / "self.jsonl",
        "--n", 2, "--seed", 0)
    for name in ("teacher", "self"):
        verified, scored = folder / f"{name}.verified.jsonl", folder / f"{name}.scored.jsonl"
        run("02_verify_score.py", "verify", "--samples", folder / f"{name}.jsonl", "--problems", problems, "--out", verified)
        run("02_verify_score.py", "score", *recipe, "--samples", verified, "--model", base, "--out", scored)
    found = {"training_sets": {}, "ppl_mean": {}}
    for arm in ARMS:
        out = folder / f"{arm}.jsonl"
        run("02_verify_score.py", "select", *recipe, "--arm", arm, "--teacher", folder / "teacher.scored.jsonl",
            "--self", folder / "self.scored.jsonl", "--out", out, "--n-ce", 96, "--n-ul", 96, "--seed", 0)
        rows = read(out)
        found["training_sets"][arm] = hash_of(rows, ("sid", "pid", "problem", "response", "objective", "n_tokens"))
        found["ppl_mean"][arm] = sum(row["ppl"] for row in rows) / len(rows)
    run("03_train_oxa.py", *recipe, "--model", base, "--data", folder / "oxa_full.jsonl", "--out", folder / "sft",
        "--epochs", 5, "--ce-per-step", 64, "--ul-per-step", 64, "--token-budget", 2048)
    found["sft"] = [{name: row[name] for name in SFT_CURVE} for row in read(folder / "sft/metrics.jsonl")]
    run("04_rlvr.py", *recipe, "--model", base, "--problems", folder / "rlvr.jsonl", "--out", folder / "rlvr",
        "--prompts-per-step", 8, "--rollouts", 8, "--max-steps", 5, "--token-budget", 2048)
    found["rlvr"] = [{name: row[name] for name in RLVR_CURVE} for row in read(folder / "rlvr/metrics.jsonl")]
    run("05_eval.py", *recipe, "--model", base, "--problems", folder / "id.jsonl", "--out", folder / "eval", "--n", 4)
    rows = read(folder / "eval/id.jsonl")
    found["evaluation"] = hash_of(rows, ("pid", "k", "seed", "response", "n_tokens", "finish", "predicted", "correct", "status"))
    return found


@pytest.mark.slow
def test_training_sets_curves_and_evaluation_are_as_committed(tmp_path):
    stored, found = json.loads(STORED.read_text()), measure(tmp_path)
    assert found["training_sets"] == stored["training_sets"]
    assert found["evaluation"] == stored["evaluation"]
    assert found["ppl_mean"] == pytest.approx(stored["ppl_mean"], rel=1e-5)
    for stage in ("sft", "rlvr"):
        assert len(found[stage]) == len(stored[stage]) == 5
        for now, then in zip(found[stage], stored[stage]):
            assert now == pytest.approx(then, rel=1e-5, abs=1e-7)


if __name__ == "__main__":
    import tempfile
    with tempfile.TemporaryDirectory() as temporary:
        STORED.write_text(json.dumps(measure(Path(temporary)), indent=1) + "\n")
