"""Word problems that a small language model can learn: the data of recipes/laptop.toml.

    python toy/word_problems.py --out DIR --seed 0

Problems and step-by-step solutions come from `gsm_symbolic` of the package reasoning-gym (Apache
2.0): GSM8K-like templates whose numbers are drawn afresh. Of its 100 templates these are used whose
solutions are short (about 50 tokens, so that a model of 135M parameters is quick on a CPU), right
in every step, and have at least 400 different sets of numbers:

    William is 25 years old. In 8 years his sister Mary will be 5 times as old as William is now.
    How old is Mary right now?

    <think>
    8 years from now Mary will be 25*5=125.
    Right now Mary is 125-8=117 years old.
    </think>
    \\boxed{117}

| file | rows | what for |
|---|---|---|
| warmup.jsonl | training set | few solutions: the base learns the format from them |
| solutions.jsonl | training set | many solutions: the teacher learns to solve |
| problems.jsonl | problems | the teacher's traces and the base's own samples are drawn on these |
| rlvr.jsonl | problems | prompts of RLVR |
| seen.jsonl | problems | evaluation: the same templates, fresh numbers |
| hard.jsonl | problems | evaluation: the same templates, numbers about twice as large |

No two problems of all files together share their template and their numbers (a problem with other
names and the same numbers is the same problem). Solutions are of all templates, problems of those
that a small teacher can solve (SOLVABLE); each file has as many of each template as of any other,
give or take one.

Deliberate simplifications: the templates' sentences are fixed, so a solution is learnt as a
pattern, and new templates are out of reach; the answers are whole numbers.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import common  # first: installs signal handlers, so that Ctrl-C is one line, no traceback

import argparse
import hashlib
import json
import random
import re

from common import die

PACKAGE = "reasoning-gym==0.1.25"     # setup.sh installs it with WITH_WORDS=1
TEMPLATES = (10, 14, 18, 20, 30, 34, 41, 48, 50, 54, 57, 58, 59, 69, 78, 95)
# Those of which a teacher of 135M parameters, fine-tuned on all of them, solves a fifth or more
# (docs/LOG.md): problems that it can write traces for.
SOLVABLE = (10, 48, 58, 59, 78, 95)
# File -> (problems by default, factor on the size of the numbers, solutions or problems)
FILES = {
    "warmup": (200, 1.0, "solutions"),
    "solutions": (3000, 1.0, "solutions"),
    "problems": (500, 1.0, "problems"),
    "rlvr": (320, 1.0, "problems"),
    "seen": (96, 1.0, "problems"),
    "hard": (64, 2.0, "problems"),
}
MOST_TRIES = 10_000                   # draws for one fresh problem


def load_templates():
    """{number: function (random.Random, factor) -> {question, answer, metadata}}, of TEMPLATES."""
    try:
        from reasoning_gym.arithmetic.gsm_symbolic import gsm_symbolic
    except ImportError as error:
        die(f"{PACKAGE} cannot be imported ({error}): pip install {PACKAGE}, or WITH_WORDS=1 "
            "before bash run_all.sh")
    config = gsm_symbolic.GSMSymbolicDatasetConfig(seed=0, size=1)
    generators = gsm_symbolic.GSMSymbolicDataset(config).generators
    return {number: generators[number] for number in TEMPLATES}


def draw_fresh(rng, template, number, factor, taken):
    """A problem whose template and numbers are not in `taken`, where they are put."""
    for _ in range(MOST_TRIES):
        drawn = template(rng, factor)
        key = (number, *re.findall(r"\d+", drawn["question"]))
        if key not in taken and re.fullmatch(r"\d+", drawn["answer"]):
            taken.add(key)
            return drawn
    die(f"template {number} has no more fresh numbers: ask for fewer problems")


def draw_set(rng, templates, numbers, n, factor, taken):
    """n problems, of the templates `numbers` in turn, then shuffled."""
    drawn = []
    for i in range(n):
        number = numbers[i % len(numbers)]
        drawn.append(draw_fresh(rng, templates[number], number, factor, taken))
    rng.shuffle(drawn)
    return drawn


def problem_row(drawn, source):
    """A row of a problems file; the pid is 01_sample.py's, a hash of the text."""
    text = drawn["question"]
    words = " ".join(text.split())
    return {
        "pid": hashlib.sha256(words.encode()).hexdigest()[:16],
        "problem": text,
        "answer": drawn["answer"],
        "source": source,
    }


def response_of(drawn):
    """The template's solution as a response: its steps, then the answer in a box."""
    steps = drawn["metadata"]["answer_cot"].partition("####")[0].strip()
    return f"<think>\n{steps}\n</think>\n\\boxed{{{drawn['answer']}}}"


def solution_row(drawn, source):
    """A row of a training set, as 03_train_oxa.py reads it."""
    problem = problem_row(drawn, source)
    return {
        "sid": f"{problem['pid']}:{source}:0",
        "pid": problem["pid"],
        "problem": problem["problem"],
        "response": response_of(drawn),
        "objective": "ce",
    }


def write_rows(path, rows):
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    print(f"{path}: {len(rows)} rows")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="directory for the six files")
    parser.add_argument("--seed", type=int, default=0, help="of all draws (default 0)")
    for name, (n, _, _) in FILES.items():
        parser.add_argument(f"--n-{name}", type=int, default=n,
                            help=f"problems of {name}.jsonl (default {n})")
    args = parser.parse_args(argv)
    for name in FILES:
        n = getattr(args, f"n_{name}")
        if n < 1:
            parser.error(f"--n-{name} must be at least 1, not {n}")
    return args


def main(argv=None):
    args = parse_args(argv)
    templates = load_templates()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    taken = set()
    for name, (_, factor, kind) in FILES.items():
        rng = random.Random(f"word problems {args.seed} {name}")
        numbers = TEMPLATES if kind == "solutions" else SOLVABLE
        drawn = draw_set(rng, templates, numbers, getattr(args, f"n_{name}"), factor, taken)
        make_row = solution_row if kind == "solutions" else problem_row
        source = f"gsm_symbolic-{name}"
        write_rows(out / f"{name}.jsonl", [make_row(problem, source) for problem in drawn])


if __name__ == "__main__":
    common.run(main)
