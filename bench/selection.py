"""Scale of `02 select`: seconds and peak memory over many scored rows.

    python bench/selection.py [--rows 1000000 --chars 4000 --arm oxa_mle]

Writes a scored file of random rows (10 responses a query, texts of `--chars` characters on average)
into a temporary directory and runs the command on it: reading, selecting, copying the picked rows,
hashing the input for the sidecar.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
PIECE = '<think> Wait, so \\frac{a}{b} is "small", \n and x = \\sqrt{2}; therefore the sum is 17. '


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--chars", type=int, default=4000)
    parser.add_argument("--arm", default="oxa_mle")
    args = parser.parse_args()
    draw = random.Random(0)
    running = PIECE * (2 * args.chars // len(PIECE) + 2)
    texts = [
        json.dumps(running[k : k + args.chars // 2 + draw.randrange(args.chars + 1)])
        for k in range(len(PIECE))
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scored.jsonl"
        with open(path, "w") as file:
            for i in range(args.rows):
                pid = f"p{i // 10}"
                correct = draw.choice(["true", "false"])
                file.write(
                    f'{{"sid": "{pid}:teacher:{i % 10}", "pid": "{pid}", '
                    f'"response": {draw.choice(texts)}, '
                    f'"n_tokens": {draw.randint(200, 20000)}, "finish": "stop", '
                    f'"correct": {correct}, "status": "ok", "problem": "What is {i}?", '
                    f'"ppl": {max(1.0, draw.gauss(2.6, 0.5))!r}, "scorer": "base", '
                    f'"ppl_context": "response"}}\n'
                )
        begin = time.time()
        subprocess.run(
            [
                sys.executable,
                ROOT / "02_verify_score.py",
                "select",
                "--arm",
                args.arm,
                "--teacher",
                path,
                "--self",
                path,
                "--out",
                Path(folder) / "train.jsonl",
            ],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        wall, used = time.time() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
        print(
            f"{args.rows:,} rows, {path.stat().st_size / 1e9:.2f} GB, {args.arm}: {wall:.1f} s, "
            f"{used.ru_utime + used.ru_stime:.1f} CPU seconds, peak memory "
            f"{used.ru_maxrss / 2**20:.2f} GB"
        )


if __name__ == "__main__":
    main()
