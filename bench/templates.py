"""Does perplexity tell kinds of problem apart? For a finished run of recipes/laptop.toml, whose
problems are of six templates.

    bash run_all.sh laptop && source setup.sh && python bench/templates.py [RUN]

Prints how much of the variance of log-perplexity among the right traces lies between templates, and
for each arm of one seed and each template "training examples; Pass@1; entropy in nats" (both
evaluation sets, a plain mean over problems). Seconds.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np

import common

SETS = ("seen", "hard")
ARMS = ("base", "sft", "sft_lp", "oxa_mle", "oxa_full", "length_matched", "longest")
# Words of each template that none of those below it has; they are tried in this order.
WORDS = {"bottle": "calories per", "loaf": "loa", "fog": "fog", "eats": "family eat",
         "apart": "apart", "age": "old"}


def template_of(problem: str) -> str:
    for name, words in WORDS.items():
        if words in problem:
            return name
    common.die(f"of none of the templates {', '.join(WORDS)}: {problem}")


def read_templates(data: Path) -> dict:
    """{pid: template} of all problems."""
    found = {}
    for name in ("problems", *SETS):
        for row in common.read_jsonl(data / f"{name}.jsonl"):
            found[row["pid"]] = template_of(row["problem"])
    return found


def log_perplexities(data: Path, template) -> dict:
    """{template: [R] of its right traces}"""
    found = {name: [] for name in WORDS}
    for row in common.read_jsonl(data / "teacher.scored.jsonl"):
        if row["correct"] and row["ppl"] is not None:
            found[template[row["pid"]]].append(np.log(row["ppl"]))
    return {name: np.array(values) for name, values in found.items()}


def share_between(groups) -> float:
    """Of the variance of all values, the share that lies between the groups' means."""
    values = np.concatenate(groups)
    within = sum(((group - group.mean()) ** 2).sum() for group in groups)
    return 1 - within / ((values - values.mean()) ** 2).sum()


def count_examples(arm: Path, template) -> dict:
    """{template: promoted training examples}; none for the base."""
    counts = dict.fromkeys(WORDS, 0)
    if (arm / "train.jsonl").exists():
        for row in common.read_jsonl(arm / "train.jsonl"):
            if row["objective"] == "ce":
                counts[template[row["pid"]]] += 1
    return counts


def read_results(arm: Path, template) -> dict:
    """{template: [P, 2], Pass@1 and entropy of its evaluation problems}"""
    found = {name: [] for name in WORDS}
    for name in SETS:
        for row in common.read_jsonl(arm / "eval" / f"{name}.problems.jsonl"):
            values = [row["n_correct"] / row["n"], row["entropy"]]
            found[template[row["pid"]]].append(values)
    return {name: np.array(values) for name, values in found.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", default=ROOT / "runs" / "laptop")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    template = read_templates(args.run / "data")
    logs = log_perplexities(args.run / "data", template)
    print(f"{share_between(list(logs.values())):.1%} of the variance of log-perplexity is between "
          f"the templates; {sum(map(len, logs.values()))} right traces")
    for name, values in logs.items():
        median = np.exp(np.median(values))
        print(f"  {name:7} {len(values):5} traces, median perplexity {median:.2f}")

    folder = args.run / f"seed-{args.seed}"
    for arm in ARMS:
        if not (folder / arm / "eval" / "results.json").exists():
            continue
        print(f"\n{arm}")
        counts = count_examples(folder / arm, template)
        for name, values in read_results(folder / arm, template).items():
            pass_at_1, entropy = values.mean(axis=0)
            print(f"  {name:7} {counts[name]:4} examples  Pass@1 {pass_at_1:.2f}  "
                  f"entropy {entropy:.3f}  ({len(values)} problems)")


if __name__ == "__main__":
    main()
