"""The output layer: log-probs of N tokens over V words, forward and backward. Ours in chunks
against full logits.

8,192 tokens x 151,936 words x hidden 896 in float32 need 16 GB:

    python bench/logprob.py
    python bench/logprob.py --tokens 1024 --repeats 3

Each variant runs in a process of its own, in turn; memory is the process's peak above what inputs
and gradients take.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))


def full_logits(hidden, weight, targets):
    """What most code does: logits, log_softmax, gather."""
    return (hidden @ weight.T).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]


def ours(hidden, weight, targets):
    from model import OutputLayer

    return OutputLayer.apply(hidden, weight, targets, 1.0, False)[0]


def measure(name, args):
    import torch
    import model  # noqa: F401  (imported by both, so that both start from the same memory)

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    hidden = torch.randn(args.tokens, args.hidden, requires_grad=True)
    weight = (torch.randn(args.vocabulary, args.hidden) / args.hidden**0.5).requires_grad_()
    hidden.grad, weight.grad = torch.ones_like(hidden), torch.ones_like(weight)
    targets = torch.randint(0, args.vocabulary, (args.tokens,))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    logp = {"full logits": full_logits, "ours": ours}[name](hidden, weight, targets)
    (-logp.mean()).backward()
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps({"seconds": seconds, "peak_mb": peak / 1024, "logp_mean": logp.mean().item()}))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        return measure(args.only, args)
    rows = {"full logits": [], "ours": []}
    for _ in range(args.repeats):
        for name in rows:
            out = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--only", name],
                capture_output=True,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": str(args.threads)},
            )
            if out.returncode:
                sys.exit(f"{name} failed ({out.returncode}): {out.stderr[-500:]}")
            rows[name].append(json.loads(out.stdout))
    median = {n: {k: statistics.median(r[k] for r in rs) for k in rs[0]} for n, rs in rows.items()}
    print(
        f"{args.tokens} tokens x {args.vocabulary} words x hidden {args.hidden}, {args.threads} "
        f"thread(s), "
        f"median of {args.repeats}"
    )
    for name, m in median.items():
        print(
            f"{name:12} {m['seconds']:8.2f} s   extra peak {m['peak_mb']:8.0f} MB   mean "
            f"log-prob {m['logp_mean']:.6f}"
        )
    print(
        f"ours / full: time {median['ours']['seconds'] / median['full logits']['seconds']:.2f}, "
        f"memory {median['ours']['peak_mb'] / median['full logits']['peak_mb']:.2f}"
    )


if __name__ == "__main__":
    main()
