"""The authors' path in miniature, end to end: `bash run_all.sh` on a recipe that starts from
paper_1.5b.toml and changes model, files and counts alone; local files in the shapes of the authors'
own (RL parquet, benchmark arrays, teacher traces); two ranks of torchrun (gloo); the real vLLM on a
CPU.

Two things are not counts: --engine auto would take the Hugging Face engine on a CPU, so vLLM is
named; and the bins of perplexity are wide, for the toy base with another rotary base has
perplexities of its own.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None,
                                reason="vLLM is not installed")

INSTRUCTION = ("\nLet's reason step by step. Enclose the reasoning process within "
               "<think>...</think>, then summarize it and present the final answer within "
               "\\boxed{}.")
RECIPE = """
from = "paper_1.5b"

[run]
cards = 0
base_model = "toy/base"
self_model = "toy/base"
arms = ["oxa_full"]
rlvr_arms = ["oxa_full"]
rlvr_source = "DATA/rlvr.parquet"
rlvr_drop_overlap = false
[run.benchmarks]
aime24 = "DATA/aime.json"
brumo25 = "DATA/BRUMO25.json"
minerva = "DATA/minerva.json"

[prepare-base]
positions = 600

[teacher]
source = "DATA/teacher.parquet"

[sample]
n = 2
limit = 40
max_tokens = 120
max_prompt_tokens = 300
engine = "vllm"

[select]
n_ce = 24
n_ul = 16
range_high = 101.0
bin_width = 10.0
mu = 6.0
sigma = 1.0

[train]
epochs = 2
ce_per_step = 8
ul_per_step = 8
token_budget = 2048
max_tokens = 600

[rlvr]
prompts_per_step = 4
rollouts = 4
max_steps = 2
max_response_tokens = 120
max_prompt_tokens = 300
token_budget = 2048
engine = "vllm"
save_every = 1

[eval]
n = 4
n_of = ["minerva=2"]
max_tokens = 120
engine = "vllm"
"""


def rl_row(problem, answer, index):
    """A row of DeepScaleR-10K.prompt_v1.parquet."""
    return {"data_source": "",
            "prompt": [{"content": problem + INSTRUCTION, "role": "user"}],
            "ability": "math",
            "reward_model": {"ground_truth": answer, "style": "rule"},
            "extra_info": {"index": index, "split": "train"},
            "prompt_token_len": 100}


def write_sources(folder):
    """The toy world's problems and traces in the authors' files."""
    from datasets import Dataset
    subprocess.run([sys.executable, ROOT / "toy/world.py", "--out", folder / "world",
                    "--n-queries", "60", "--traces", "4", "--n-eval", "4", "--n-rlvr", "40"],
                   check=True)
    rows = {}
    for name in ("teacher_source", "rlvr", "id", "hard"):
        rows[name] = [json.loads(line) for line in open(folder / f"world/{name}.jsonl")]

    # a benchmark problem among the training problems
    leak = rows["id"][0]
    teacher = [{"query": leak["problem"],
                "DeepSeek-R1_Response_List": [
                    f"<think>\n</think>\n\\boxed{{{leak['answer']}}}"]}]
    for row in rows["teacher_source"]:
        right = [text for text in row["DeepSeek-R1_Response_List"]
                 if f"boxed{{{row['answer']}}}" in text]
        teacher.append({"query": row["query"], "DeepSeek-R1_Response_List": right})
    Dataset.from_list(teacher).to_parquet(folder / "teacher.parquet")

    # one problem stands twice, as 181 of theirs do
    prompts = [*rows["rlvr"], rows["rlvr"][0]]
    prompts = [rl_row(row["problem"], row["answer"], i) for i, row in enumerate(prompts)]
    Dataset.from_list(prompts).to_parquet(folder / "rlvr.parquet")

    files = {"aime.json": [], "BRUMO25.json": [], "minerva.json": []}
    for i, row in enumerate(rows["id"]):
        same = {"problem": row["problem"], "answer": row["answer"]}
        files["aime.json"].append({**same,
                                   "solution": "",
                                   "aime_number": "I",
                                   "difficulty": 1,
                                   "problem_number": i,
                                   "year": 2024})
        files["BRUMO25.json"].append({"problem_idx": i, **same, "problem_type": ["Algebra"]})
    for i, row in enumerate(rows["hard"]):
        files["minerva.json"].append({"problem": row["problem"],
                                      "solution": "",
                                      "answer": [row["answer"]],
                                      "idx": i,
                                      "type": "x"})
    for name, array in files.items():
        (folder / name).write_text(json.dumps(array, indent=1))


def read_jsonl(path):
    return [json.loads(line) for line in open(path)]


@pytest.mark.slow
def test_the_authors_path_in_miniature(tmp_path):
    write_sources(tmp_path)
    shutil.copy(ROOT / "recipes/paper_1.5b.toml", tmp_path)
    recipe = tmp_path / "mini.toml"
    recipe.write_text(RECIPE.replace("DATA", str(tmp_path)))
    env = {**os.environ,
           "RUNS": str(tmp_path / "runs"),
           "NPROC": "2",
           "HF_HUB_OFFLINE": "1",
           "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", ROOT / "run_all.sh", recipe],
                          capture_output=True, text=True, env=env, timeout=3600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    run = tmp_path / "runs/mini"
    data = run / "data"
    arm = run / "seed-42/oxa_full"

    # 1: their RL set whole, without its instruction; the leaked problem dropped; two ranks' samples
    # merged in order
    prompts = read_jsonl(data / "rlvr.jsonl")
    assert len(prompts) == 41
    assert not any("reason step by step" in row["problem"] for row in prompts)
    assert json.loads((data / "rlvr.meta.json").read_text())["instruction"] == INSTRUCTION
    assert json.loads((data / "teacher.contamination.json").read_text())["n_dropped"] == 1
    assert [len(read_jsonl(data / f"{name}.jsonl"))
            for name in ("aime24", "brumo25", "minerva")] == [4, 4, 4]
    sampled = [row["sid"] for row in read_jsonl(data / "self.jsonl")]
    assert len(sampled) == 80
    assert [sid.rsplit(":", 1)[1] for sid in sampled] == ["0", "1"] * 40
    # 2: every teacher trace verifies against its own boxed answer
    assert {row["correct"] for row in read_jsonl(data / "teacher.verified.jsonl")} == {True}
    # 3, 4, 5
    chosen = [row["objective"] for row in read_jsonl(arm / "train.jsonl")]
    assert 16 <= chosen.count("ce") <= 24
    assert chosen.count("ul") > 0
    train = read_jsonl(arm / "sft/metrics.jsonl")
    assert len(train) == chosen.count("ce") // 8 * 2
    assert all(row["ul_loss"] > 0 for row in train)
    assert train[-1]["ce_loss"] < train[0]["ce_loss"]
    steps = read_jsonl(arm / "rlvr/metrics.jsonl")
    assert len(steps) == 2
    # vLLM follows the trainer
    assert all(row["sync_gap_mean"] < 1e-4 for row in steps)
    for name in ("eval", "eval_rlvr"):
        results = json.loads((arm / name / "results.json").read_text())["benchmarks"]
        assert {bench: results[bench]["n_samples"] for bench in results} == {
            "aime24": 4, "brumo25": 4, "minerva": 2}
    # a log for each rank
    ranks = [path.parent.name for path in (run / "logs/ranks").rglob("std*.log")]
    assert set(ranks) == {"0", "1"}
    # what is done is not done again
    again = subprocess.run(["bash", ROOT / "run_all.sh", recipe],
                           capture_output=True, text=True, env=env, timeout=600)
    commands = [line for line in again.stdout.splitlines() if line.startswith("+ ")]
    assert again.returncode == 0
    assert len(commands) == 1
    assert "tools.report" in commands[0]
