"""What the unlikelihood term does: OXA's training set at several weights of it, in one figure.

    bash run_all.sh laptop && source setup.sh && python bench/unlikelihood.py [RUN --weights 1e-2]

A finished run of recipes/laptop.toml has two weights: `oxa_mle` (0: the same promoted examples
without unlikelihood) and `oxa_full` (the default, 1e-4). The others are trained here on
`oxa_full`'s set with every other setting the same, and evaluated like the arms, in
RUN/unlikelihood; what is finished there is kept. Then each model scores the suppressed training
responses after their prompts. Their probability is what the term is to lower: the geometric mean of
a response's tokens, then the mean over responses.

Prints a table with the paired differences to weight 0 (intervals as in the report), and draws
RUN/unlikelihood/unlikelihood.png. One seed. On two cores a quarter of an hour a weight.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

import common
from tools import report

SEED = 0
SUPPRESSED = "probability of suppressed tokens"
ARM_OF = {"0": "oxa_mle", "1e-4": "oxa_full"}          # what a run has


def call(args, *command):
    """A stage, on args.ranks processes. Where its output is finished it does nothing."""
    words = ["torchrun", "--standalone", "--nproc_per_node", args.ranks, "--", *command,
             "--recipe", args.recipe]
    subprocess.run([str(word) for word in words], check=True, cwd=ROOT)


def train_and_evaluate(args, weight: str, benchmarks):
    """`oxa_full` with another weight -> RUN/unlikelihood/WEIGHT/{sft,eval}."""
    out = args.run / "unlikelihood" / weight
    data = args.run / "data"
    call(args, "03_train_oxa.py", "--model", data / "base", "--out", out / "sft",
         "--data", args.run / f"seed-{SEED}" / "oxa_full" / "train.jsonl",
         "--seed", SEED, "--ul-weight", weight)
    problems = [data / f"{name}.jsonl" for name in benchmarks]
    call(args, "05_eval.py", "--model", out / "sft", "--problems", *problems,
         "--out", out / "eval", "--seed", SEED)


def write_suppressed(args) -> Path:
    """The verified rows of the responses that `oxa_full` suppresses."""
    sids = set()
    for row in common.read_jsonl(args.run / f"seed-{SEED}" / "oxa_full" / "train.jsonl"):
        if row["objective"] == "ul":
            sids.add(row["sid"])
    path = args.run / "unlikelihood" / "suppressed.jsonl"
    with common.replace_file(path) as file:
        for row in common.read_jsonl(args.run / "data" / "self.verified.jsonl"):
            if row["sid"] in sids:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


def suppressed_probability(args, samples, model, name) -> np.ndarray:
    """[S]: the geometric mean of the token probabilities of each suppressed response, in order."""
    out = args.run / "unlikelihood" / f"suppressed.{name}.jsonl"
    call(args, "02_verify_score.py", "score", "--only", "wrong", "--ppl-context", "prompt",
         "--model", model, "--samples", samples, "--out", out)
    return np.array([1 / row["ppl"] for row in common.read_jsonl(out)])


def with_interval(values) -> dict:
    """Mean of [S] values, 95 % interval over them."""
    value, low, high = np.ravel(common.bootstrap([[values[:, None]]])).tolist()
    return {"value": value, "low": low, "high": high}


def draw(levels, path):
    """levels: {measure: {weight: {value, low, high}}}; the weights stand at equal distances."""
    figure, axes = plt.subplots(1, len(levels), figsize=(9.0, 2.6), layout="constrained")
    for ax, (measure, of_weight) in zip(axes, levels.items()):
        for x, effect in enumerate(of_weight.values()):
            ax.plot([x, x], [effect["low"], effect["high"]], color="#D55E00")
            ax.plot(x, effect["value"], marker="D", color="#D55E00")
        ax.set_xticks(range(len(of_weight)), of_weight)
        ax.set_xlim(-0.5, len(of_weight) - 0.5)
        ax.set_xlabel("weight of unlikelihood")
        ax.set_title(measure, fontsize=9)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25, linewidth=0.6)
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", default=ROOT / "runs" / "laptop")
    parser.add_argument("--recipe", default="recipes/laptop.toml")
    parser.add_argument("--weights", nargs="+", default=["1e-2"], help="trained here")
    parser.add_argument("--ranks", type=int, default=2, help="processes: GPUs, or cores")
    args = parser.parse_args()
    args.run = args.run.resolve()
    for weight in args.weights:
        if float(weight) in map(float, ARM_OF):
            common.die(f"--weights {weight}: the run has it already")

    run = report.load_run(args.run, k=0, beside=[])
    for arm in ARM_OF.values():
        if (SEED, arm, "before") not in run.tables:
            common.die(f"{args.run} has no evaluation of {arm}: run the pipeline first")
    (args.run / "unlikelihood").mkdir(exist_ok=True)
    arm_of = dict(ARM_OF)
    models = {w: args.run / f"seed-{SEED}" / arm / "sft" for w, arm in arm_of.items()}
    for weight in args.weights:
        train_and_evaluate(args, weight, run.counted)
        arm_of[weight] = weight
        models[weight] = args.run / "unlikelihood" / weight / "sft"
        results = args.run / "unlikelihood" / weight / "eval" / "results.json"
        tables = {name: report.read_table(results, name) for name in run.counted}
        run.tables[SEED, weight, "before"] = tables
    run.seeds = [SEED]

    weights = sorted(arm_of, key=float)
    measures = {"Pass@1": 1, run.labels()[1]: "n", "entropy, nats": "entropy"}
    levels, differences = {}, {}
    for title, measure in measures.items():
        levels[title] = {w: report.estimate(run, measure, [arm_of[w]]) for w in weights}
        differences[title] = {w: report.estimate(run, measure, [arm_of[w], arm_of["0"]])
                              for w in weights if w != "0"}
    samples = write_suppressed(args)
    p = {w: suppressed_probability(args, samples, models[w], w) for w in weights}
    levels[SUPPRESSED] = {w: with_interval(p[w]) for w in weights}
    differences[SUPPRESSED] = {w: with_interval(p[w] - p["0"]) for w in weights if w != "0"}

    for title in levels:
        print(f"\n{title}")
        for w in weights:
            line = f"  {w:>6}  {report.number(levels[title][w])}"
            if w != "0":
                line += f"   to 0: {report.number(differences[title][w], '+')}"
            print(line)
    draw(levels, args.run / "unlikelihood" / "unlikelihood.png")
    print(f"\n{args.run / 'unlikelihood' / 'unlikelihood.png'}")


if __name__ == "__main__":
    main()
