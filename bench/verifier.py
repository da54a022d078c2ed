"""The verifier against its peers, in turn on the same pairs: accuracy, wrong accepted (FP), right
refused (FN), not known (null), speed.

    python bench/verifier.py                     the labelled pairs of tests/: golds as in toys and
                                                 as real benchmarks write them; 300 long responses
    python bench/verifier.py --cases A.jsonl B.jsonl
                                                 other pairs: rows with gold, response, expected,
                                                 class; rows marked "debatable" are left out
    python bench/verifier.py --by-class          also: what each class of pairs gives
    python bench/verifier.py --throughput 300000 also: a JSONL of so many, judged by verify_many

A peer that is not installed is left out, and named (bench/requirements.txt). Peers get the whole
response, as in their own use, or with --tail only what follows </think>, which spares them the
search of the reasoning. One core; times of calls are processor time.
"""

import argparse
import collections
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from grading import verifier


TAIL = False


def seen(response):
    """What a peer is given: the response, or with --tail what follows </think>."""
    return response.rpartition("</think>")[2] if TAIL else response


def ours():
    return lambda response, gold: verifier.verify(response, gold).correct


def math_verify():
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
    from latex2sympy2_extended import NormalizationConfig

    boxed = [
        LatexExtractionConfig(
            boxed_match_priority=0,
            try_extract_without_anchor=False,
            normalization_config=NormalizationConfig(boxed="last"),
        )
    ]
    both = [LatexExtractionConfig(), ExprExtractionConfig()]

    def grade(response, gold):
        return bool(verify(parse(f"${gold}$", both), parse(seen(response), boxed)))

    return grade


def math_verify_default():
    from math_verify import parse, verify

    return lambda response, gold: bool(verify(parse(f"${gold}$"), parse(seen(response))))


def trl():
    from trl.rewards import accuracy_reward

    def grade(response, gold):
        messages = [[{"role": "assistant", "content": seen(response)}]]
        reward = accuracy_reward(messages, [f"${gold}$"])[0]
        return None if reward is None else reward == 1.0

    return grade


def lighteval():
    from lighteval.metrics.dynamic_metrics import MultilingualExtractiveMatchMetric
    from lighteval.metrics.utils.extractive_match_utils import (
        ExprExtractionConfig,
        LatexExtractionConfig,
    )
    from lighteval.models.model_output import ModelResponse
    from lighteval.tasks.requests import Doc

    configs = [ExprExtractionConfig(), LatexExtractionConfig(boxed_match_priority=0)]
    metric = MultilingualExtractiveMatchMetric(
        gold_extraction_target=configs, pred_extraction_target=configs
    )

    def grade(response, gold):
        doc = Doc(query="", choices=[f"${gold}$"], gold_index=0)
        return metric.compute(doc=doc, model_response=ModelResponse(text=[seen(response)])) == 1.0

    return grade


GRADERS = {
    "ours": ours,
    "math-verify": math_verify,
    "math-verify, default": math_verify_default,
    "TRL": trl,
    "lighteval": lighteval,
}


def long_responses(cases, n, seed=0):
    """n (response, gold) of 25 kB of reasoning, four in five with a number as the answer, the
    others from the cases."""
    draw = random.Random(seed)
    words = (
        "so we let x = 3 and get \\frac{1}{2} of $y^2$ ; wait , check : \\boxed{17} then the sum"
        " \\sum_{k} a_k is 42 ."
    ).split()
    filler = " ".join(draw.choice(words) for _ in range(7_000))
    rows = []
    for _ in range(n):
        if draw.random() < 0.8:
            gold = str(draw.randint(0, 999))
            given = gold if draw.random() < 0.6 else draw.randint(0, 99)
            answer = f"\n</think>\n\nThe final answer is $\\boxed{{{given}}}$."
        else:
            case = draw.choice(cases)
            gold, answer = case["gold"], "\n</think>\n" + case["response"].rpartition("</think>")[2]
        start = draw.randrange(len(filler) - 25_000)
        rows.append(("<think>\n" + filler[start : start + 25_000 - len(answer)] + answer, gold))
    return rows


OUTCOMES = ("right", "FP", "FN", "null", "raised")


def accuracy(graders, cases):
    """{(grader, class): Counter of outcomes}. A verdict of None is no answer, not a refusal."""
    outcomes = collections.defaultdict(collections.Counter)
    for case in cases:
        for name, grade in graders.items():
            try:
                accepted = grade(case["response"], case["gold"])
            except Exception:  # a peer's own failure: counted, and shown as no answer
                outcomes[name, case["class"]]["raised"] += 1
                continue
            if accepted is None:
                outcome = "null"
            elif accepted == case["expected"]:
                outcome = "right"
            else:
                outcome = "FP" if accepted else "FN"
            outcomes[name, case["class"]][outcome] += 1
    return outcomes


def print_classes(outcomes):
    names = list(dict.fromkeys(name for name, _ in outcomes))
    heads = "".join(f" {name[:20]:>20}" for name in names)
    print(f"\n{'class: right/FP/FN/null/raised':58}{heads}")
    for kind in sorted({kind for _, kind in outcomes}):
        line = f"{kind[:58]:58}"
        for name in names:
            counts = outcomes[name, kind]
            line += f" {'/'.join(str(counts[outcome]) for outcome in OUTCOMES):>20}"
        print(line)


def speed(graders, pairs):
    """Processor seconds of each call; the graders take turns, so that a busy machine is as busy for
    all."""
    seconds = {name: [] for name in graders}
    for response, gold in pairs:
        for name, grade in graders.items():
            start = time.process_time()
            try:
                grade(response, gold)
            except Exception:
                pass  # counted in accuracy()
            seconds[name].append(time.process_time() - start)
    return seconds


def throughput(cases, n, workers):
    """A JSONL file of n responses of 25 kB, read line by line into verify_many."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "samples.jsonl"
        with open(path, "w") as file:
            for seed in range(-(-n // 2_000)):
                for response, gold in long_responses(cases, min(2_000, n - 2_000 * seed), seed):
                    file.write(json.dumps({"response": response, "answer": gold}) + "\n")
        size = path.stat().st_size / 2**30
        start, begin = time.perf_counter(), os.times()
        with open(path) as file:
            verdicts = verifier.verify_many(
                ((row["response"], row["answer"]) for row in map(json.loads, file)), workers
            )
        took = time.perf_counter() - start
        verifier.POOL.close()  # so that the processor time of the workers is counted
        used = os.times()
    processor = sum(used[:4]) - sum(begin[:4])
    right = sum(verdict.correct is True for verdict in verdicts)
    unknown = sum(verdict.correct is None for verdict in verdicts)
    print(
        f"{len(verdicts)} responses, {size:.2f} GB of JSONL, {workers} workers: {took:.1f} s"
        f" ({len(verdicts) / took:,.0f}/s), processor {processor:.1f} s; {right} right,"
        f" {unknown} unknown"
    )


def read_cases(paths):
    cases = []
    for path in paths:
        with open(path) as file:
            for row in map(json.loads, file):
                if isinstance(row["gold"], str) and not row.get("debatable"):
                    cases.append(row)
    return cases


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    own = ROOT / "tests" / "verifier_cases.jsonl"
    parser.add_argument("--cases", nargs="+", default=[own], help="files of labelled pairs")
    parser.add_argument("--by-class", action="store_true", help="show each class of pairs")
    parser.add_argument("--responses", type=int, default=300, help="long responses, for the speed")
    parser.add_argument("--graders", nargs="+", choices=GRADERS, default=list(GRADERS))
    parser.add_argument(
        "--throughput", type=int, default=0, metavar="N", help="judge N long responses from a file"
    )
    parser.add_argument("--tail", action="store_true", help="peers get only what follows </think>")
    parser.add_argument("--workers", type=int, default=2)
    return parser.parse_args()


def main():
    args = parse_args()
    global TAIL
    TAIL = args.tail
    cases = read_cases(args.cases)
    graders = {}
    for name in args.graders:
        try:
            graders[name] = GRADERS[name]()
        except ImportError as error:
            print(f"{name}: left out ({error})")
    outcomes = accuracy(graders, cases)
    seconds = speed(graders, long_responses(cases, args.responses))
    print(f"{len(cases)} labelled pairs; {args.responses} responses of 25 kB")
    heads = "".join(f" {outcome:>6}" for outcome in OUTCOMES[1:])
    print(f"{'':22} {'right':>7}{heads} {'mean ms':>9} {'p99 ms':>8} {'per s':>8}")
    for name in graders:
        counts = sum((outcomes[key] for key in outcomes if key[0] == name), collections.Counter())
        cells = "".join(f" {counts[outcome]:6}" for outcome in OUTCOMES[1:])
        times = sorted(seconds[name])
        mean, late = statistics.mean(times), times[int(0.99 * len(times))]
        print(
            f"{name:22} {100 * counts['right'] / len(cases):6.1f}%{cells}"
            f" {1000 * mean:9.3f} {1000 * late:8.2f} {1 / mean:8,.0f}"
        )
    if "ours" in seconds and "math-verify" in seconds:
        ratio = sum(seconds["math-verify"]) / sum(seconds["ours"])
        print(f"ours / math-verify: {ratio:.0f} times as fast")
    if args.by_class:
        print_classes(outcomes)
    if args.throughput:
        throughput(cases, args.throughput, args.workers)


if __name__ == "__main__":
    main()
