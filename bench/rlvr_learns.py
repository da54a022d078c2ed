"""Does GRPO teach the toy model, and do shuffled rewards not? Held-out Pass@1 before and after, a seed a row.

    python bench/rlvr_learns.py --seeds 0 1 2 [--out DIR --steps 60 --model toy/base]

For each seed: the toy world's own problems and traces, supervised fine-tuning on one trace per query chosen at random (the arm `sft`), Pass@1
on the 160 in-distribution problems (05_eval.py), GRPO (04_rlvr.py, all numbers from recipes/toy.toml), Pass@1 again. Then the same GRPO
with the rewards of each step permuted over its rollouts: as many rewards, but not for those who earned them. What exists in --out is kept.
"""

import argparse
import importlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


def call(*argv):
    subprocess.run([sys.executable, *map(str, argv)], check=True, stdout=subprocess.DEVNULL, cwd=ROOT,
                   env={**os.environ, "OMP_NUM_THREADS": "1"})


def grpo_with_shuffled_rewards(argv):
    import torch
    rlvr = importlib.import_module("04_rlvr")
    honest, generator = rlvr.give_rewards, torch.Generator().manual_seed(0)

    def give_rewards(rollouts, *rest):
        honest(rollouts, *rest)
        rewards = [r.reward for r in rollouts]
        for r, k in zip(rollouts, torch.randperm(len(rewards), generator=generator).tolist()):
            r.reward = rewards[k]
    rlvr.give_rewards = give_rewards
    torch.set_num_threads(1)
    rlvr.main(argv)


def traces(data, seed):
    """One trace of each query at random, as 02 select --arm sft would pick from the verified ones."""
    import handover
    import verifier
    rng = random.Random(seed)
    with open(data / "train.jsonl", "w") as file:
        for i, row in enumerate(handover.read_jsonl(data / "teacher_source.jsonl")):
            right = [r for r in row["DeepSeek-R1_Response_List"] if verifier.verify(r, row["answer"]).correct]
            if right:
                file.write(json.dumps({"sid": str(i), "pid": str(i), "problem": row["query"], "response": rng.choice(right),
                                       "objective": "ce"}) + "\n")


def pass1(model, data, out, recipe, n):
    call("05_eval.py", "--recipe", recipe, "--model", model, "--problems", data / "id.jsonl", "--out", out, "--n", n, "--entropy-samples", 0)
    rows = [json.loads(line) for line in open(out / "id.problems.jsonl")]
    return sum(r["n_correct"] for r in rows) / sum(r["n"] for r in rows)


def main():
    if sys.argv[1:2] == ["--shuffled"]:
        return grpo_with_shuffled_rewards(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "toy/base"))
    parser.add_argument("--recipe", default=str(ROOT / "recipes/toy.toml"))
    parser.add_argument("--out", default="runs/rlvr_learns")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--n", type=int, default=16, help="samples a problem")
    parser.add_argument("--no-control", action="store_true", help="leave out the shuffled rewards")
    parser.add_argument("more", nargs="*", help="further flags of 04_rlvr.py, after --")
    args = parser.parse_args()
    for seed in args.seeds:
        home = Path(args.out).resolve() / f"seed-{seed}"
        data = home / "data"
        if not (data / "train.jsonl").exists():
            call("toy/world.py", "--out", data, "--seed", seed)
            traces(data, seed)
        if not (home / "sft" / "final").exists():
            call("03_train_oxa.py", "--recipe", args.recipe, "--model", args.model, "--data", data / "train.jsonl", "--out", home / "sft", "--seed", seed)
        line = f"seed {seed}: sft {pass1(home / 'sft', data, home / 'eval_sft', args.recipe, args.n):.3f}"
        for name in ("rlvr", "shuffled")[:1 if args.no_control else 2]:
            start = time.time()
            argv = ["--recipe", args.recipe, "--model", home / "sft", "--problems", data / "rlvr.jsonl", "--out", home / name,
                    "--seed", seed, *args.more]
            call(*(["04_rlvr.py"] if name == "rlvr" else [Path(__file__).resolve(), "--shuffled"]), *argv)
            seconds = time.time() - start
            line += f", {name} {pass1(home / name, data, home / f'eval_{name}', args.recipe, args.n):.3f} ({seconds:.0f} s)"
            print(line, flush=True)


if __name__ == "__main__":
    main()
