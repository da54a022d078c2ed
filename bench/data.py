"""What the benchmarks run on: the toy's traces for a toy model, word problems for any other."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import common
from model import load_config

TOY_VOCABULARY = 1000                 # the toy's models have a hundred tokens or so


def is_toy(model) -> bool:
    return load_config(model).vocab_size < TOY_VOCABULARY


def make_data(folder: Path, model) -> Path:
    """Writes FOLDER/train.jsonl, solutions as 03 reads them, one per problem, and
    FOLDER/rlvr.jsonl, problems. -> FOLDER"""
    script = "world.py" if is_toy(model) else "word_problems.py"
    command = [sys.executable, ROOT / "toy" / script, "--out", folder, "--seed", "0"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    if not is_toy(model):
        (folder / "solutions.jsonl").rename(folder / "train.jsonl")
        return folder

    with open(folder / "train.jsonl", "w") as file:
        for i, row in enumerate(common.read_jsonl(folder / "teacher_source.jsonl")):
            responses = row["DeepSeek-R1_Response_List"]
            solution = {
                "sid": str(i),
                "pid": str(i),
                "problem": row["query"],
                "response": responses[i % len(responses)],
                "objective": "ce",
            }
            file.write(json.dumps(solution) + "\n")
    return folder


def responses(folder: Path, model) -> list[str]:
    """All texts that a teacher has written: several per problem in the toy, else one."""
    make_data(folder, model)
    if not is_toy(model):
        return [row["response"] for row in common.read_jsonl(folder / "train.jsonl")]
    texts = []
    for row in common.read_jsonl(folder / "teacher_source.jsonl"):
        texts += row["DeepSeek-R1_Response_List"]
    return texts
