"""A miniature of the paper's recipe, end to end: `bash run_all.sh` on paper_1.5b.toml with other values for model, data
paths and counts only, two ranks of torchrun (gloo), the real vLLM on a CPU, local files with the hub's columns.

Two things are not counts: --engine auto would take the Hugging Face engine on a CPU, so vLLM is named; and the bins of
perplexity are wide, for the toy base with another rotary base has perplexities of its own.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")

RUN = {"cards": 0, "base_model": "toy/base", "self_model": "toy/base", "rlvr_source": "{data}/rlvr.parquet",
       "arms": ["oxa_full"], "rlvr_arms": ["oxa_full"]}
CHANGES = {                                       # section -> model, data paths and counts
    "prepare-base": {"positions": 600},
    "teacher": {"source": "{data}/teacher"},
    "problems": {"limit": 30},
    "sample": {"n": 2, "limit": 40, "max_tokens": 120, "max_prompt_tokens": 300, "engine": "vllm"},
    "select": {"n_ce": 24, "n_ul": 16, "range_high": 101.0, "bin_width": 10.0, "mu": 6.0, "sigma": 1.0},
    "train": {"epochs": 2, "ce_per_step": 8, "ul_per_step": 8, "token_budget": 2048, "max_tokens": 600},
    "rlvr": {"prompts_per_step": 4, "rollouts": 4, "max_steps": 2, "max_response_tokens": 120, "max_prompt_tokens": 300,
             "token_budget": 2048, "engine": "vllm", "save_every": 1},
    "eval": {"n": 4, "n_of": ["minerva=2"], "max_tokens": 120, "engine": "vllm"},
}


def toml(value, data):
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(toml(v, data) for v in value) + "]"
    return json.dumps(value.format(data=data)) if isinstance(value, str) else repr(value)


def miniature(text, data):
    """The recipe's text with the values of RUN and CHANGES in place of its own; a key it has not is added."""
    sections = re.split(r"^(?=\[)", text, flags=re.M)
    for i, section in enumerate(sections):
        name = section.split("]")[0].strip("[")
        if name == "run.benchmarks":
            sections[i] = f'[run.benchmarks]\naime24 = "{data}/aime24.jsonl"\nminerva = "{data}/minerva.jsonl"\n'
        for key, value in {"run": RUN, **CHANGES}.get(name, {}).items():
            line = f"{key} = {toml(value, data)}"
            sections[i], n = re.subn(rf"^{key} *=.*$", lambda m: line, sections[i], flags=re.M)
            sections[i] = sections[i] if n else sections[i].rstrip() + f"\n{line}\n\n"
    return "".join(sections)


def hub_like(data):
    """The toy world's problems and traces in the columns of the hub's data sets: save_to_disk, parquet and JSONL."""
    from datasets import Dataset
    world = data / "world"
    subprocess.run([sys.executable, ROOT / "toy/world.py", "--out", world, "--n-queries", "60", "--traces", "4",
                    "--n-eval", "4",
                    "--n-rlvr", "40"], check=True)
    rows = {name: [json.loads(line) for line in open(world / f"{name}.jsonl")] for name in ("teacher_source", "rlvr",
                                                                                            "id", "hard")}
    right = lambda row: [t for t in row["DeepSeek-R1_Response_List"] if f"boxed{{{row['answer']}}}" in t]
    Dataset.from_list([{"query": row["query"], "DeepSeek-R1_Response_List": right(row)}
                       for row in rows["teacher_source"]]).save_to_disk(data / "teacher")
    Dataset.from_list([{"problem": row["problem"], "answer": row["answer"], "solution": ""}
                       for row in [*rows["rlvr"],
                                   rows["id"][0]]]).to_parquet(data / "rlvr.parquet")   # one is contaminated
    aime = [{"id": i, "problem": row["problem"], "solution": "", "answer": row["answer"], "url": "", "year": "2024"}
            for i, row in enumerate(rows["id"])]
    minerva = [{"question": row["problem"], "answer": row["answer"]} for row in rows["hard"]]
    for name, made in (("aime24", aime), ("minerva", minerva)):
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))


def test_miniature_of_the_papers_recipe(tmp_path):
    hub_like(tmp_path)
    recipe = tmp_path / "mini.toml"
    recipe.write_text(miniature((ROOT / "recipes/paper_1.5b.toml").read_text(), tmp_path))
    env = {**os.environ, "RUNS": str(tmp_path / "runs"), "NPROC": "2", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", ROOT / "run_all.sh", recipe], capture_output=True, text=True, env=env, timeout=2400)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    run = tmp_path / "runs/mini"
    data, arm = run / "data", run / "seed-42/oxa_full"

    # 1: joined answers, the contaminated prompt dropped, two ranks' samples merged in order
    report = json.loads((data / "rlvr.contamination.json").read_text())
    assert report["n_dropped"] == 1 and sum(1 for _ in open(data / "rlvr.jsonl")) == 30
    sampled = [json.loads(line)["sid"] for line in open(data / "self.jsonl")]
    assert len(sampled) == 80 and [s.rsplit(":", 1)[1] for s in sampled] == ["0", "1"] * 40
    # 2: every teacher trace verifies against its own boxed answer
    assert {json.loads(line)["correct"] for line in open(data / "teacher.verified.jsonl")} == {True}
    # 3, 4, 5
    chosen = [json.loads(line)["objective"] for line in open(arm / "train.jsonl")]
    assert chosen.count("ul") == 16 and 16 <= chosen.count("ce") <= 24
    train = [json.loads(line) for line in open(arm / "sft/metrics.jsonl")]
    assert len(train) == chosen.count("ce") // 8 * 2 and all(row["ul_loss"] > 0 for row in train)
    assert train[-1]["ce_loss"] < train[0]["ce_loss"]
    steps = [json.loads(line) for line in open(arm / "rlvr/metrics.jsonl")]
    assert len(steps) == 2 and all(row["sync_gap_mean"] < 1e-4 for row in steps)   # vLLM follows the trainer
    for name in ("eval", "eval_rlvr"):
        results = json.loads((arm / name / "results.json").read_text())["benchmarks"]
        assert results["aime24"]["n_samples"] == 4 and results["minerva"]["n_samples"] == 2
    ranks = [f for f in (run / "logs/ranks").rglob("std*.log")]
    assert {f.parent.name for f in ranks} == {"0", "1"}                              # a log for each rank
    again = subprocess.run(["bash", ROOT / "run_all.sh", recipe], capture_output=True, text=True, env=env, timeout=60)
    commands = [line for line in again.stdout.splitlines() if line.startswith("+ ")]
    assert again.returncode == 0 and [c.split()[3] for c in commands] == ["tools.report"]   # what is done is not done again
