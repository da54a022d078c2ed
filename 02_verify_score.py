"""Verify, score, select: from sampled responses to the training sets of the arms.

    verify   grade each response against its problem's answer       samples  -> verified
    score    perplexity of each response under the base model       verified -> scored
    select   the examples that one arm trains on                    scored   -> training set
    show     a readable look at rows of any of these files

Perplexity is exp(mean NLL of the response's tokens) under the base model, over the response text
alone: no prompt, no chat markup, no BOS. The first token has no prediction, so tokens 2..L count,
right-truncated at 32,768. Low perplexity is high confidence. The arms, all drawn from verified
correct teacher responses, at most `--cap` per query:

    sft             uniform at random
    sft_lp          the lowest perplexities
    oxa_mle         Gaussian-guided (`gaussian_guided_sampling`): a target count for each
                    perplexity bin, and the longest responses of a bin first
    oxa_full        as oxa_mle, and for unlikelihood the wrong self-samples that the base finds
                    most likely (`select_ul`)
    length_matched  control, ours and not the paper's: random, with the lengths of oxa_mle's picks
    longest         control, ours and not the paper's: the longest responses

`correct` null (could not be judged) is not false: it is counted and shown, and never enters a
training set.

Deliberate simplifications: rows are processed in input order, a block at a time; duplicate texts
are scored separately; `select` reads the small columns first and copies the picked rows
in a second pass, so that its memory does not grow with the text.

    python 02_verify_score.py verify --samples teacher.jsonl --problems problems.jsonl \\
        --out teacher.verified.jsonl
    python 02_verify_score.py score --samples teacher.verified.jsonl --model BASE \\
        --out teacher.scored.jsonl
    torchrun --nproc_per_node 8 -- 02_verify_score.py score --samples self.verified.jsonl \\
        --model BASE --only wrong --out self.scored.jsonl
    python 02_verify_score.py select --arm oxa_full --teacher teacher.scored.jsonl \\
        --self self.scored.jsonl --out train.jsonl
    python 02_verify_score.py show --samples teacher.scored.jsonl --show 3

Shapes: R rows of a file, M of them candidates, S sequences, L tokens of one of them.
"""

import common

import argparse
import array
import dataclasses
import hashlib
import json
import math
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from tqdm import tqdm

from common import die
from grading import verifier
from model import (add_dtype_flag, add_instruction_flag, check_instruction, check_model_dir,
                   check_positions, encode_text, load_config, load_model, load_tokenizer, model_dir,
                   pack_sequences, render_prompt, settle_dtype, token_logprobs)

ARMS = ("sft", "sft_lp", "oxa_mle", "oxa_full", "length_matched", "longest")

# Fields that a stage needs of its input, with their types.
PROBLEM = {"pid": str, "problem": str, "answer": (str, list)}
SAMPLE = {"sid": str, "pid": str, "response": str, "n_tokens": int, "finish": str}
VERDICT = {"correct": (bool, type(None)), "status": str}
VERIFIED = SAMPLE | VERDICT | {"problem": str}
SCORED = {"sid": str, "pid": str, "problem": str, "response": str, "n_tokens": int, "finish": str,
          "correct": (bool, type(None)), "ppl": (float, int, type(None))}

# Fields that `show` prints of a row that has them.
SHOWN = {"problem": str, "objective": str, "correct": (bool, type(None)), "status": str,
         "ppl": (float, int, type(None)), "n_tokens": int, "finish": str}

LABEL = {True: "correct", False: "wrong", None: "unknown"}
PAPER_BINS = 80                 # (5.0 - 1.0) / 0.05
PAPER_SIGMA_SHARE = 0.0625      # 0.25 / (5.0 - 1.0)
MOST_BINS = 100_000
SHOWN_GOLDS = 20
QUANTILES = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)

# ----------------------------------------------------------------------------------- configuration


def parse_args(argv=None):
    parser = common.make_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True,
                                     metavar="verify|score|select|show")

    p = common.add_command(commands, "verify", "grade each response against its problem's answer")
    p.add_argument("--samples", required=True, help="samples JSONL")
    p.add_argument("--problems", required=True, help="problems JSONL with the answers")
    p.add_argument("--out", required=True, help="verified JSONL; goes on where it stopped")
    common.add_force_flag(p.add_argument)
    p.add_argument("--workers", type=int, default=0, help="grading processes; 0: one per core")
    p.add_argument("--block", type=int, default=4096, help="rows graded and written at a time")

    p = common.add_command(commands, "score", "perplexity of each response under the base model")
    p.add_argument("--samples", required=True, help="verified JSONL")
    p.add_argument("--model", required=True, help="the base model: directory or hub id")
    p.add_argument("--out", required=True, help="scored JSONL; goes on where it stopped")
    common.add_force_flag(p.add_argument)
    p.add_argument("--only", choices=("all", "correct", "wrong"), default="all",
                   help="score and keep only these rows")
    p.add_argument("--ppl-context", choices=("response", "prompt"), default="response",
                   help="response: its text alone (the paper's); prompt: given the rendered prompt")
    add_instruction_flag(p.add_argument)
    add_dtype_flag(p.add_argument)
    p.add_argument("--max-score-tokens", type=int, default=32768,
                   help="right-truncate longer sequences, tokens")
    p.add_argument("--token-budget", type=int, default=32768,
                   help="tokens of one forward pass, on each rank")
    p.add_argument("--block", type=int, default=1024,
                   help="rows scored and written at a time, over all ranks")

    p = common.add_command(commands, "select", "the examples that one arm trains on")
    p.add_argument("--arm", required=True, choices=ARMS)
    p.add_argument("--teacher", required=True, help="scored JSONL of teacher responses")
    p.add_argument("--self", dest="self_samples", default=None,
                   help="scored JSONL of self-samples; needed by oxa_full only")
    p.add_argument("--out", required=True, help="training set JSONL")
    p.add_argument("--n-ce", type=int, default=50000, help="cross-entropy examples")
    p.add_argument("--n-ul", type=int, default=50000, help="unlikelihood examples")
    p.add_argument("--mu", type=float, default=2.5,
                   help="centre of the Gaussian, a perplexity (7B: 3.0)")
    p.add_argument("--mu-quantile", type=float, default=None,
                   help="instead of --mu: this quantile of the correct responses' perplexities "
                        "inside the range")
    p.add_argument("--sigma", type=float, default=0.25,
                   help="width of the Gaussian, in perplexity")
    p.add_argument("--sigma-share", type=float, default=None,
                   help="instead of --sigma: as a share of the range (the paper's is 0.0625)")
    p.add_argument("--range-low", type=float, default=1.0, help="lowest perplexity of oxa_mle")
    p.add_argument("--range-high", type=float, default=5.0,
                   help="highest perplexity of oxa_mle, itself included")
    p.add_argument("--range-quantiles", type=float, nargs="+", default=None, metavar="Q",
                   help="instead of --range-low and --range-high: two quantiles of the correct "
                        "responses' perplexities, e.g. 0.01 0.99. With --n-bins, --sigma-share and "
                        "--mu-quantile one setting serves short and long responses")
    p.add_argument("--bin-width", type=float, default=0.05, help="in perplexity")
    p.add_argument("--n-bins", type=int, default=None,
                   help="instead of --bin-width: so many bins of equal width (the paper's are 80, "
                        "which is the default with --range-quantiles)")
    p.add_argument("--cap", type=int, default=1,
                   help="cross-entropy examples per query, over all bins")
    p.add_argument("--min-tokens", type=int, default=0,
                   help="sft_lp only: shortest response, tokens")
    p.add_argument("--ul-cap", type=int, default=1, help="unlikelihood examples per query")
    p.add_argument("--min-ppl-ul", type=float, default=1.2,
                   help="floor of unlikelihood; below it text is degenerate")
    p.add_argument("--max-tokens-ul", type=int, default=25000, help="drop longer self-samples")
    p.add_argument("--truncated-ul", choices=("keep", "drop"), default="drop",
                   help="wrong self-samples that were cut at the length limit (drop: the paper's, "
                        "which samples further than --max-tokens-ul and drops what is longer)")
    p.add_argument("--seed", type=int, default=42, help="of ties and of random picks")

    p = common.add_command(commands, "show", "a readable look at rows of a samples, verified, "
                                             "scored or training file")
    p.add_argument("--samples", required=True, help="any JSONL of these")
    p.add_argument("--show", type=int, default=3, metavar="N",
                   help="at most N rows, drawn at random")
    p.add_argument("--pid", default=None, help="only rows of this problem")
    p.add_argument("--sid", default=None, help="only this response")
    p.add_argument("--chars", type=int, default=1500,
                   help="of a response; its middle is left out beyond that")
    p.add_argument("--seed", type=int, default=42, help="of the random draw")

    args = common.parse_args(parser, argv=argv)
    common.check_range(args, block=1, n_ce=1, n_ul=1, cap=1, ul_cap=1, max_tokens_ul=1,
                       max_score_tokens=2, token_budget=1, chars=1, workers=0, show=0, min_tokens=0)
    if args.command == "select":
        check_select_flags(args)
    return args


def check_select_flags(args):
    """The Gaussian's flags, before a file is read."""
    for name in ("sigma", "sigma_share", "bin_width", "n_bins"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            die(f"--{name.replace('_', '-')} must be positive, got {value}")
    if args.mu_quantile is not None and not 0 <= args.mu_quantile <= 1:
        die(f"--mu-quantile must lie in [0, 1], got {args.mu_quantile}")
    if args.range_quantiles:
        low, high = args.range_quantiles[0], args.range_quantiles[-1]
        if len(args.range_quantiles) != 2 or not 0 <= low < high <= 1:
            die("--range-quantiles must be two numbers in [0, 1], the lower one first; "
                f"got {args.range_quantiles}")
    width = args.range_high - args.range_low
    if width <= 0:
        die(f"--range-low {args.range_low} is not below --range-high {args.range_high}")
    n_bins = args.n_bins or width / args.bin_width
    if n_bins > MOST_BINS:
        die(f"the range [{args.range_low}, {args.range_high}] has {n_bins:,.0f} bins; "
            f"at most {MOST_BINS:,} are reasonable: a larger --bin-width")
    if args.arm == "oxa_full" and not args.self_samples:
        die("--arm oxa_full needs --self: the scored self-samples that unlikelihood is drawn from")


# ------------------------------------------------------------------------------------------ verify


def verify(args):
    """samples -> verified: + predicted, correct, status, and the problem's text for later stages.
    """
    inputs = [args.samples, args.problems]
    args.grader = verifier.grader_name()      # into the sidecar: a resumed run keeps to one grader
    common.start_output(args.out, "verified", args, inputs, may_differ=("workers", "block"))
    problems = read_problems(args.problems)
    n_unreadable = show_unreadable_golds(problems, args)
    done, out = common.append_jsonl(args.out, "sid")
    counts = Counter()
    if done:
        print(f"{args.out}: going on after {len(done):,} rows", flush=True)
        for row in common.read_jsonl(args.out, VERDICT):
            counts[row["correct"], row["status"]] += 1

    samples = samples_of_problems(problems, args)
    progress = tqdm(desc="verify", unit=" responses", initial=len(done), mininterval=5)
    with out, progress:
        for block, n_old in common.unfinished_blocks(samples, done, len(done), args.block):
            new = block[n_old:]
            for row in graded(new, problems, args):
                out.write(row)
                counts[row["correct"], row["status"]] += 1
            progress.update(len(new))
    report_verdicts(args, inputs, counts, n_unreadable)


def read_problems(path) -> dict:
    """{pid: row of the problems file}"""
    problems = {}
    for row in common.read_jsonl(path, PROBLEM, key="pid"):
        problems[row["pid"]] = row
    return problems


def show_unreadable_golds(problems: dict, args) -> int:
    """Before anything is graded: how many golds nothing can be judged against, and which."""
    answers = [row["answer"] for row in problems.values()]
    unreadable = verifier.unreadable_golds(answers, workers=args.workers or None)
    if unreadable:
        print(f"{args.problems}: the gold of {len(unreadable):,} of {len(problems):,} problems "
              "cannot be read; a response to them that is not plainly right is unknown (null):")
    for answer in unreadable[:SHOWN_GOLDS]:
        print(common.printable(f"  {answer!r}")[:200])
    if len(unreadable) > SHOWN_GOLDS:
        print(f"  and {len(unreadable) - SHOWN_GOLDS:,} more")
    return len(unreadable)


def samples_of_problems(problems: dict, args):
    """The rows of --samples, one by one; each must belong to a problem."""
    samples = common.read_jsonl(args.samples, SAMPLE, key="sid")
    for number, row in enumerate(samples, 1):
        if row["pid"] not in problems:
            die(f"{args.samples}:{number}: no problem '{row['pid']}' in {args.problems}; "
                "the two files must be of one import")
        yield row


def graded(rows: list[dict], problems: dict, args) -> list[dict]:
    """Sampled rows -> verified rows."""
    pairs = []
    for row in rows:
        pairs.append((row["response"], problems[row["pid"]]["answer"]))
    verdicts = verifier.verify_many(pairs, workers=args.workers or None)
    verified = []
    for row, verdict in zip(rows, verdicts, strict=True):
        verified.append({
            **row,
            "predicted": verdict.predicted,
            "correct": verdict.correct,
            "status": status_of(row, verdict),
            "problem": problems[row["pid"]]["problem"],
        })
    return verified


def status_of(row: dict, verdict) -> str:
    """A response that was cut before its answer is told from one that ended without."""
    no_answer = verdict.status in ("no_think_end", "no_box", "unbalanced_box")
    if no_answer and row["finish"] == "length":
        return "truncated"
    return verdict.status


def report_verdicts(args, inputs, counts: Counter, n_unreadable: int):
    """Print how many were judged how, and finish the sidecar. counts: (correct, status) -> rows."""
    judged = dict.fromkeys(LABEL.values(), 0)
    by_status = {}
    for (correct, status), count in counts.items():
        judged[LABEL[correct]] += count
        by_status[f"{LABEL[correct]}/{status}"] = count

    n = counts.total()
    shares = []
    for label, count in judged.items():
        shares.append(f"{count:,} {label} ({count / n:.1%})")
    print(f"{args.out}: {n:,} responses: " + ", ".join(shares))
    for (correct, status), count in counts.most_common():
        print(f"  {LABEL[correct]:8} {status:16} {count:10,}")
    if judged["unknown"]:
        print(f"  {judged['unknown']:,} could not be judged (correct: null): "
              "they go into no training set")
    common.write_meta(args.out, "verified", args, inputs, rows=n, **judged,
                      unreadable_golds=n_unreadable, status=dict(sorted(by_status.items())))


# ------------------------------------------------------------------------------------------- score


def score(args):
    """verified -> scored: + nll_sum, n_scored, ppl and how it was scored. The paper scores with the
    base; here it is the prepared base (A9).

    Under torchrun each rank scores a share of every block, and rank 0 writes. A run that was
    stopped goes on at the block that its output does not hold whole. With blocks of 4:

        input      a b c d | e f g h | i j
        output     a b c d   e f                       n_done = 6
        scored               e f g h   i j
        written                  g h   i j             n_old = 2, then 0

    e and f are scored once more, because g and h are packed with them: a perplexity depends in its
    last bits on its neighbours, and so the file is bit for bit that of an uninterrupted run.
    """
    dist = common.init_distributed()
    settle_dtype(args, dist.device)
    writes = dist.rank == 0
    directory = model_dir(args.model)
    inputs = [args.samples, directory]
    if writes:
        common.claim_output(args.out, inputs)
    check_model_dir(directory, renders=args.ppl_context == "prompt")
    n_rows = check_lengths(args, load_config(directory))
    tokenizer = load_tokenizer(directory)
    if args.ppl_context == "prompt":
        check_instruction(directory, args.instruction)
    done, out = {}, None
    if writes:
        common.start_output(args.out, "scored", args, inputs)
        done, out = common.append_jsonl(args.out, "sid")
    # Only rank 0 holds the output; the others learn how far it is.
    n_done = torch.tensor(len(done), device=dist.device)
    n_done = int(common.all_reduce_sum(n_done))
    if done:
        print(f"{args.out}: going on after {n_done:,} rows", flush=True)

    model = None
    blocks = common.unfinished_blocks(rows_to_score(args), done, n_done, args.block)
    progress = tqdm(desc="score", total=n_rows, initial=n_done, unit=" rows", mininterval=5,
                    disable=not writes)
    with progress:
        for work in one_ahead(tokenised(blocks, tokenizer, args, dist)):
            if model is None:
                model = load_model(directory, device=dist.device)
            mine = response_nll(model, work.sequences, args.token_budget, dist.device,
                                bf16=args.dtype == "bfloat16")
            nll, n_scored = gathered(mine, work, dist)
            if writes:
                for i in range(work.n_old, len(work.block)):
                    out.write(scored_row(work.block[i], nll[i], n_scored[i], args))
                progress.update(len(work.block) - work.n_old)
    if writes:
        out.close()
        report_scores(args, inputs)


def rows_to_score(args):
    """The rows of --samples that --only keeps, one by one."""
    for row in common.read_jsonl(args.samples, VERIFIED, key="sid"):
        if args.only in ("all", LABEL[row["correct"]]):
            yield row


def check_lengths(args, config) -> int:
    """Refuse what the model or the budget cannot take; returns the number of rows to score."""
    n_rows, longest = 0, 0
    for row in rows_to_score(args):
        n_rows += 1
        longest = max(longest, row["n_tokens"] - 1)    # n_tokens counts the end-of-turn token too
    longest = min(longest, args.max_score_tokens)
    check_positions(config, longest, f"scoring {args.samples}")
    if longest > args.token_budget:
        die(f"{args.samples} has responses of {longest} tokens; raise --token-budget "
            f"({args.token_budget}) or lower --max-score-tokens")
    return n_rows


@dataclasses.dataclass
class Work:
    """A block of rows, and what one rank does of it."""
    block: list[dict]
    n_old: int               # of the block's rows, so many are written already
    share: list[int]         # which rows of the block this rank scores
    sequences: list[tuple]   # their tokens: (ids [L], start); tokens start..L-1 are scored


def tokenised(blocks, tokenizer, args, dist):
    """Yield the Work of this rank for each block."""
    config = load_config(model_dir(args.model))
    for block, n_old in blocks:
        share = share_of_rank(block, dist.rank, dist.world)
        rows = [block[i] for i in share]
        sequences = scored_sequences(tokenizer, rows, args)
        longest = max((len(ids) for ids, _ in sequences), default=0)
        check_positions(config, longest, f"scoring {args.samples}")
        yield Work(block, n_old, share, sequences)


def share_of_rank(block: list[dict], rank: int, world: int) -> list[int]:
    """Rows by length of text, the longest first, dealt like cards, so that shares are alike.

        lengths  7 2 9 4 5   on 2 ranks   ->   rank 0: 9 5 2,  rank 1: 7 4
    """
    lengths = np.array([len(row["response"]) for row in block])
    order = np.argsort(-lengths, kind="stable").tolist()
    return order[rank::world]


def one_ahead(items):
    """Yield the items of a generator; a thread makes the next one while one is worked on."""
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(next, items, None)
        while (item := waiting.result()) is not None:
            waiting = thread.submit(next, items, None)
            yield item


def scored_sequences(tokenizer, rows: list[dict], args) -> list[tuple[np.ndarray, int]]:
    """Rows -> (ids [L], start): tokens start..L-1 are scored. In the response's text alone the
    first cannot be; --ppl-context prompt scores it too (A13)."""
    if not rows:
        return []
    sequences = []
    texts = encode_text(tokenizer, [row["response"] for row in rows])
    for row, ids in zip(rows, texts):
        prompt = []
        if args.ppl_context == "prompt":
            prompt = render_prompt(tokenizer, row["problem"], args.instruction)
        ids = (prompt + ids)[:args.max_score_tokens]
        start = max(1, len(prompt))
        # An array takes 4 bytes a token, a list 36.
        sequences.append((np.array(ids, dtype=np.int32), start))
    return sequences


@torch.no_grad()
def response_nll(model, sequences, budget: int, device="cpu",
                 bf16=False) -> tuple[np.ndarray, np.ndarray]:
    """(ids, start) of S sequences -> sum of -log p over the scored tokens [S], their number [S]."""
    lengths = np.array([len(ids) for ids, _ in sequences], dtype=int)
    starts = np.array([start for _, start in sequences], dtype=int)
    n_scored = np.maximum(lengths - starts, 0)
    some = np.flatnonzero(n_scored)

    sums = []
    for places in packs_by_length(lengths[some], budget):
        indices = some[places]                           # which of the S are in this pack
        pack = pack_sequences([sequences[i] for i in indices], device)
        logp, _ = token_logprobs(model, pack, bf16=bf16)     # [N] of the pack's scored tokens
        nll_of_pack = torch.zeros(len(indices), dtype=torch.float64, device=device)
        nll_of_pack.index_add_(0, pack.seq, -logp.double())
        sums.append((indices, nll_of_pack))

    # Fetched at the end: the GPU never waits for the host.
    nll = np.zeros(len(sequences))
    for indices, nll_of_pack in sums:
        nll[indices] = nll_of_pack.cpu().numpy()
    return nll, n_scored


def packs_by_length(lengths, budget: int) -> list[list[int]]:
    """Indices, longest first, in packs of at most `budget` tokens. Neighbours in length share a
    pack, so that on a CPU they share one attention call; on a GPU it makes no difference."""
    packs, room = [], 0
    for i in np.argsort(-lengths, kind="stable").tolist():
        if lengths[i] > room:
            packs.append([])
            room = budget
        packs[-1].append(i)
        room -= lengths[i]
    return packs


def gathered(mine, work: Work, dist) -> tuple[list, list]:
    """This rank's NLL and counts [2, share] -> those of every row of the block, on all ranks."""
    result = torch.zeros(2, len(work.block), dtype=torch.float64)
    # The rows of other ranks stay 0, so that the sum is the whole.
    result[:, work.share] = torch.from_numpy(np.stack(mine))
    result = result.to(dist.device)
    common.all_reduce_sum(result)
    nll, n_scored = result.cpu().tolist()
    return nll, n_scored


def scored_row(row: dict, nll_sum: float, n_scored: float, args) -> dict:
    """nll_sum: of -log p (nats) over the n_scored tokens. Without any there is no perplexity
    (A12)."""
    if not math.isfinite(nll_sum):
        die(f"{row['sid']}: its log-probabilities are not finite; is {args.model} a whole model?")
    return {
        **row,
        "nll_sum": nll_sum,
        "n_scored": int(n_scored),
        "ppl": math.exp(nll_sum / n_scored) if n_scored else None,
        "scorer": args.model,
        "ppl_context": args.ppl_context,
        "scorer_dtype": args.dtype,
    }


def report_scores(args, inputs):
    """Print the spread of the perplexities, and finish the sidecar."""
    columns = read_columns(args.out, seed=0)
    is_scored = ~np.isnan(columns.ppl)
    spread = quantiles(columns.ppl[is_scored])
    n = len(columns.ppl)
    unscored = n - int(is_scored.sum())
    print(f"{args.out}: {n:,} rows ({args.only} of {args.samples}), {unscored:,} with fewer than "
          f"2 tokens (ppl: null); perplexity quantiles {spread}")
    common.write_meta(args.out, "scored", args, inputs, rows=n, unscored=unscored,
                      scorer=args.model, ppl_quantiles=spread)


def quantiles(values) -> dict:
    """{q: value}, rounded, for the sidecar and the terminal; {} of nothing."""
    if not len(values):
        return {}
    found = np.quantile(values, QUANTILES)
    return {q: round(float(value), 4) for q, value in zip(QUANTILES, found)}


# ----------------------------------------------------------------------- select: the small columns


@dataclasses.dataclass
class Columns:
    """What selection needs of a scored file, an entry a row. The texts stay on disk, found again
    by `offset`."""
    path: str
    scorers: set           # "scorer (ppl_context, dtype)" of the rows
    offset: np.ndarray     # [R] where the row starts, bytes
    query: np.ndarray      # [R] number of its problem
    correct: np.ndarray    # [R] 1, 0, or -1: could not be judged
    truncated: np.ndarray  # [R] 1: cut at the length limit
    ppl: np.ndarray        # [R] nan: could not be scored
    n_tokens: np.ndarray   # [R] its length, in the tokens that were drawn or are trained on (A10)
    tie: np.ndarray        # [R] a random number that depends on (seed, sid), not on the rows' order

    def census(self) -> dict:
        return {
            "rows": len(self.query),
            "queries": len(np.unique(self.query)),
            "correct": int((self.correct == 1).sum()),
            "wrong": int((self.correct == 0).sum()),
            "unknown": int((self.correct == -1).sum()),
            "not_scored": int(np.isnan(self.ppl).sum()),
        }


# How a verdict is stored in a column of whole numbers.
CODE = {True: 1, False: 0, None: -1}

# Type codes of `array`, which takes a tenth of a list's memory.
COLUMN_TYPES = {"offset": "q", "query": "q", "correct": "b", "truncated": "b", "ppl": "d",
                "n_tokens": "q", "tie": "Q"}


def read_columns(path, seed: int) -> Columns:
    """One pass over a scored file. Its memory grows with the rows, not with their text."""
    columns = {}
    for name, code in COLUMN_TYPES.items():
        columns[name] = array.array(code)
    scorers = set()
    numbers = {}           # pid -> its number, in the order of the file
    for offset, row in common.located_rows(path, SCORED, key="sid"):
        scorers.add(f"{row.get('scorer')} ({row.get('ppl_context')}, "
                    f"{row.get('scorer_dtype', 'float32')})")
        columns["offset"].append(offset)
        columns["query"].append(numbers.setdefault(row["pid"], len(numbers)))
        columns["correct"].append(CODE[row["correct"]])
        columns["truncated"].append(row["finish"] == "length")
        ppl = row["ppl"]
        columns["ppl"].append(math.nan if ppl is None else ppl)
        columns["n_tokens"].append(row["n_tokens"])
        columns["tie"].append(random_number(seed, row["sid"]))
    arrays = {name: np.array(column) for name, column in columns.items()}
    return Columns(str(path), scorers, **arrays)


def random_number(seed: int, sid: str) -> int:
    """64 bits by which ties are broken and random picks are made (A18)."""
    digest = hashlib.blake2b(f"{seed}\x1f{sid}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


# --------------------------------------------------------------- select: bins, targets and filling


def bin_edges(low: float, high: float, width: float) -> np.ndarray:
    """[n_bins + 1] edges, exact to ten decimals: 1.15 lies in [1.15, 1.20), as it reads (A14)."""
    n_bins = round((high - low) / width)
    remainder = (high - low) - n_bins * width
    if not 1 <= n_bins <= 100_000 or abs(remainder) > 1e-9:
        die(f"the range [{low}, {high}] is not a whole number of bins of width {width}; "
            "--n-bins cuts any range")
    edges = low + width * np.arange(n_bins + 1)
    return np.round(edges, 10)


def perplexity_edges(ppl: np.ndarray, args) -> np.ndarray:
    """[n_bins + 1] edges that the flags ask for; ppl [M]: perplexities of the candidates."""
    low, high = args.range_low, args.range_high
    if args.range_quantiles:
        low, high = np.quantile(ppl, args.range_quantiles).tolist()
        if not low < high:
            die(f"--range-quantiles {args.range_quantiles}: both are a perplexity of {low}")
    elif args.n_bins is None:
        return bin_edges(low, high, args.bin_width)
    return np.linspace(low, high, (args.n_bins or PAPER_BINS) + 1)


def bin_of(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """[R] -> bin of each value, -1 outside. Bins are closed below and open above; the last is
    closed on both sides (A14)."""
    n_bins = len(edges) - 1
    index = np.searchsorted(edges, values, side="right") - 1
    is_last = values == edges[-1]
    index[is_last] = n_bins - 1
    inside = (values >= edges[0]) & (values <= edges[-1])
    return np.where(inside, index, -1)


def gaussian_targets(edges: np.ndarray, mu: float, sigma: float, n: int) -> np.ndarray:
    """[n_bins] counts that sum to n, in proportion to the normal density at the bins' centres; all
    0 if the Gaussian lies so far outside the range that its density vanishes there.

    Rounded down; what is left of n goes to the bins with the largest fractions.
    """
    centre = (edges[:-1] + edges[1:]) / 2
    with np.errstate(over="ignore"):           # of a tiny sigma: the density is 0 then
        deviation = (centre - mu) / sigma
        density = np.exp(-0.5 * deviation ** 2)
    if density.sum() == 0:
        return np.zeros(len(centre), dtype=int)
    share = density / density.sum() * n

    target = np.floor(np.round(share, 9)).astype(int)
    # Bins at equal distance from mu have equal shares: rounded, the last bit does not rank them,
    # and the lower one goes first (A15).
    fraction = np.round(share - target, 9)
    by_fraction = np.argsort(-fraction, kind="stable")
    n_left = n - target.sum()
    target[by_fraction[:n_left]] += 1
    return target


def fill(order, bins, target, query, rounds) -> np.ndarray:
    """Rows picked from `order` [M] (candidates, the preferred first) until each bin has its target.

    bins, query [R]: bin and problem of each row; target [n_bins]. rounds: how many picks a query
    may have, over all bins, after each round: 1, 2, .. cap gives every query its first before any
    gets a second; (cap,) is one pass. With targets of 2 and 1, and rounds (1, 2):

        order           a  b  c  d  e
        bin             0  0  0  1  1
        query           p  p  q  q  p
        round 1 picks   a     c           b, d and e: their query has one; bin 0 is full
        round 2 picks            d        b: no room in its bin; d fills bin 1

    A row is picked once, whatever the cap (A17); a bin that runs short stays short.
    """
    left = target.tolist()
    taken = [0] * (int(query.max()) + 1)
    picked = []
    candidates = list(zip(order.tolist(), bins[order].tolist(), query[order].tolist()))
    for most in rounds:
        passed_over = []
        for candidate in candidates:
            row, its_bin, its_query = candidate
            if left[its_bin] and taken[its_query] < most:
                left[its_bin] -= 1
                taken[its_query] += 1
                picked.append(row)
            elif left[its_bin]:
                passed_over.append(candidate)
        candidates = passed_over
        if not candidates:
            break
    return np.array(picked, dtype=int)


def bin_table(edges, target, candidates, picked) -> list[dict]:
    """For each bin: its target, what there was to choose from, what it got, and what it lacks.

    candidates, picked: the bins of these rows.
    """
    available = np.bincount(candidates, minlength=len(target))
    actual = np.bincount(picked, minlength=len(target))
    table = []
    for i in range(len(target)):
        table.append({
            "low": float(edges[i]),
            "high": float(edges[i + 1]),
            "target": int(target[i]),
            "available": int(available[i]),
            "actual": int(actual[i]),
            "shortage": int(target[i] - actual[i]),
        })
    return table


# -------------------------------------------------------------------- select: the rules of the arms


def select_ce(columns: Columns, args) -> tuple[np.ndarray, dict]:
    """The arm's cross-entropy rows: (picked rows, details for the sidecar). Only the Gaussian has a
    range of perplexities (A19)."""
    pool = ce_candidates(columns)

    if args.arm == "sft":
        return uniform_sample(columns, pool, args), {}
    if args.arm == "sft_lp":
        long_enough = pool[columns.n_tokens[pool] >= args.min_tokens]
        return lowest(columns, long_enough, columns.ppl, args.n_ce, args.cap), {}
    if args.arm == "longest":
        return lowest(columns, pool, -columns.n_tokens, args.n_ce, args.cap), {}

    picked, details = gaussian_guided_sampling(columns, pool, args)
    if args.arm == "length_matched":
        # The control's own bins take the place of the Gaussian's, whose picks it imitates.
        picked, length_bins = length_matched_sample(columns, pool, picked, args)
        del details["bins"]
        details["length_bins"] = length_bins
    return picked, details


def ce_candidates(columns: Columns) -> np.ndarray:
    """The rows that cross entropy may train on: [M], of the rows R."""
    pool = np.flatnonzero((columns.correct == 1) & ~np.isnan(columns.ppl))
    if not len(pool):
        die(f"{columns.path}: no row is verified correct and scored; nothing to select from")
    return pool


def uniform_sample(columns: Columns, pool, args) -> np.ndarray:
    """Arm `sft`: every candidate is as likely as the next, at most `cap` of a query
    (A20)."""
    at_random = np.argsort(columns.tie[pool], kind="stable")
    return fill_one_bin(columns, pool[at_random], args.n_ce, rounds=range(1, args.cap + 1))


def lowest(columns: Columns, pool, value, n: int, cap: int) -> np.ndarray:
    """Per query the `cap` rows of lowest `value` [R], of those the n lowest (A22); ties at
    random."""
    by_value = np.lexsort((columns.tie[pool], value[pool]))
    return fill_one_bin(columns, pool[by_value], n, rounds=(cap,))


def fill_one_bin(columns: Columns, order, n: int, rounds) -> np.ndarray:
    """`fill` where nothing but n and the cap per query limits the choice."""
    bins = np.zeros(len(columns.query), dtype=int)
    return fill(order, bins, np.array([n]), columns.query, rounds)


def gaussian_guided_sampling(columns: Columns, pool, args) -> tuple[np.ndarray, dict]:
    """Arms `oxa_mle` and `oxa_full`: the paper's Gaussian-guided perplexity sampling
    (docs/PAPER.md, "Gaussian-guided sampling").

    A normal density over perplexity, cut into bins, says how many responses each bin is to give;
    a bin gives its longest first. Filled in rounds: no query gets a second response until every
    eligible query has one.
    """
    edges = perplexity_edges(columns.ppl[pool], args)
    bins = bin_of(columns.ppl, edges)
    pool = pool[bins[pool] >= 0]
    mu, sigma = args.mu, args.sigma            # or set by the measured perplexities (A16)
    if args.mu_quantile is not None and len(pool):
        mu = float(np.quantile(columns.ppl[pool], args.mu_quantile))
    if args.sigma_share is not None:
        sigma = float(args.sigma_share * (edges[-1] - edges[0]))
    target = gaussian_targets(edges, mu, sigma, args.n_ce)
    # By bin, in each the longest first, ties at random (np.lexsort: the last key ranks first).
    longest_first = np.lexsort((columns.tie[pool], -columns.n_tokens[pool], bins[pool]))
    order = pool[longest_first]
    rounds = range(1, args.cap + 1)
    picked = fill(order, bins, target, columns.query, rounds)
    table = bin_table(edges, target, bins[pool], bins[picked])
    return picked, {"mu": mu, "sigma": sigma, "bins": table}


def gaussian_advice(columns: Columns, n_picked: int, mu: float, args) -> str:
    """For a Gaussian that came up short: where the perplexities lie, and which flags pick more.

    Tried out are other centres, in the range as it is and in one that holds 98 % of the responses,
    with the paper's proportions of bins and width.
    """
    pool = ce_candidates(columns)
    ppl = columns.ppl[pool]
    low, middle, high = np.quantile(ppl, (0.01, 0.5, 0.99)).tolist()
    text = (f"98 % of the {len(pool):,} correct responses have perplexities from {low:.4g} to "
            f"{high:.4g}, half of them below {middle:.4g}")
    low = math.floor(low * 100) / 100
    high = math.ceil(high * 100) / 100
    wider = {"range_quantiles": None, "range_low": low, "range_high": high, "n_bins": PAPER_BINS,
             "sigma_share": PAPER_SIGMA_SHARE}
    named = (f"--range-low {low} --range-high {high} --n-bins {PAPER_BINS} "
             f"--sigma-share {PAPER_SIGMA_SHARE} ")
    settings = [("", {})]
    if low < high:
        settings.append((named, wider))
    for flags, values in settings:
        trial = with_flags(args, **values)
        quantile, n = best_mu_quantile(columns, pool, mu, trial)
        if n > n_picked:
            text += f"; {flags}--mu-quantile {quantile} would pick {n:,} of {args.n_ce:,}"
    # Whatever the Gaussian, a query gives at most --cap.
    n_queries = len(np.unique(columns.query[pool]))
    return f"{text}; no setting picks more than {n_queries:,} queries x --cap {args.cap}"


def best_mu_quantile(columns: Columns, pool, mu: float, args) -> tuple[float, int]:
    """The --mu-quantile that picks the most, of several the nearest to the perplexity `mu`, and how
    many it picks."""
    tried = []
    for quantile in (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95):
        trial = with_flags(args, mu_quantile=quantile)
        picked, details = gaussian_guided_sampling(columns, pool, trial)
        tried.append((-len(picked), abs(details["mu"] - mu), quantile))
    minus_n, _, quantile = min(tried)
    return quantile, -minus_n


def with_flags(args, **flags):
    """A copy of the arguments with some of them changed."""
    return argparse.Namespace(**(vars(args) | flags))


def length_matched_sample(columns: Columns, pool, like, args) -> tuple[np.ndarray, list[dict]]:
    """Control `length_matched` (A24): random responses with the lengths of `like`, rows that
    oxa_mle picks: (picked rows, length bins).

    Lengths fall into bins of 5 %, and each takes as many at random as `like` has there. The bin
    with the least to choose from goes first, or the cap per query would have spent its candidates
    elsewhere.
    """
    edges = np.unique(np.round(1.05 ** np.arange(0, 400)))
    n_bins = len(edges) - 1
    lengths = np.clip(columns.n_tokens, edges[0], edges[-1])
    bins = bin_of(lengths, edges)
    target = np.bincount(bins[like], minlength=n_bins)
    supply = np.bincount(bins[pool], minlength=n_bins)
    scarcity = target / np.maximum(supply, 1)
    pool = pool[target[bins[pool]] > 0]
    scarcest_first = -scarcity[bins[pool]]
    order = pool[np.lexsort((columns.tie[pool], bins[pool], scarcest_first))]
    picked = fill(order, bins, target, columns.query, rounds=range(1, args.cap + 1))
    return picked, bin_table(edges, target, bins[pool], bins[picked])


def select_ul(columns: Columns, args) -> tuple[np.ndarray, dict]:
    """High-confidence errors (docs/PAPER.md): wrong self-samples above the perplexity floor, per
    query the most likely ones, of those the most likely of all."""
    rules = {
        "too_long": columns.n_tokens > args.max_tokens_ul,
        "below_floor": columns.ppl < args.min_ppl_ul,
    }
    if args.truncated_ul == "drop":            # no error that the model is sure of (A23)
        rules["truncated"] = columns.truncated == 1

    usable = (columns.correct == 0) & ~np.isnan(columns.ppl)
    dropped = {"too_long": 0, "below_floor": 0, "truncated": 0}
    for reason, applies in rules.items():      # each counts those that no earlier one has taken
        dropped[reason] = int((usable & applies).sum())
        usable &= ~applies

    pool = np.flatnonzero(usable)
    picked = lowest(columns, pool, columns.ppl, args.n_ul, args.ul_cap)
    return picked, {"dropped": dropped, "candidates": len(pool)}


# -------------------------------------------------------------------------------- select: the stage


def select(args):
    """scored -> the training set of one arm; its sidecar has what each bin was to get and got."""
    full = args.arm == "oxa_full"
    inputs = [args.teacher, args.self_samples if full else None]
    common.claim_output(args.out, inputs)
    teacher = read_columns(args.teacher, args.seed)
    own = read_columns(args.self_samples, args.seed) if full else None
    check_one_scorer(teacher, own)
    print_census(teacher)
    if full:
        print_census(own)

    # The cross-entropy set
    ce, details = select_ce(teacher, args)
    if not len(ce):
        where = ""
        if "mu" in details:
            where = f": {gaussian_advice(teacher, 0, details['mu'], args)}"
        die(f"{args.teacher}: no response is left for --arm {args.arm} with these limits{where}")
    print_bins(details, args)
    if "mu" in details and len(ce) < args.n_ce:
        print(f"SHORT: {gaussian_advice(teacher, len(ce), details['mu'], args)}")
    sets = {"ce": summary(teacher, ce, args.n_ce)}
    print_set("cross-entropy", sets["ce"])

    # The unlikelihood set
    ul = []
    if full:
        ul, ul_details = select_ul(own, args)
        if not len(ul):
            die(f"{args.self_samples}: no wrong self-sample is left for unlikelihood with these "
                f"limits ({ul_details})")
        sets["ul"] = summary(own, ul, args.n_ul) | ul_details
        print_set("unlikelihood", sets["ul"])
        print(f"  {ul_details['candidates']:,} candidates; dropped: {ul_details['dropped']}")

    common.write_meta(args.out, "training", args, inputs, rows=None)      # unfinished, until below
    with common.replace_file(args.out) as file:
        copy_rows(teacher, ce, "ce", file)
        if full:
            copy_rows(own, ul, "ul", file)
    common.write_meta(args.out, "training", args, inputs, rows=len(ce) + len(ul), **sets, **details,
                      teacher=teacher.census(), self=own.census() if full else None)


def print_census(columns: Columns):
    """What there is to select from."""
    counted = [f"{n:,} {label}" for label, n in columns.census().items()]
    print(f"{columns.path}: " + ", ".join(counted))


def check_one_scorer(teacher: Columns, own: Columns | None):
    """Perplexities compare only under one model, given one context."""
    scorers = teacher.scorers
    if own:
        scorers = scorers | own.scorers
    if len(scorers) > 1:
        die("perplexities of different models or contexts are mixed: "
            f"{', '.join(sorted(scorers))}; score all rows with one command")


def summary(columns: Columns, picked, wanted: int) -> dict:
    """Counts and quantiles of a picked set, for the sidecar and the terminal."""
    return {
        "target": wanted,
        "actual": len(picked),
        "shortage": wanted - len(picked),
        "queries": len(np.unique(columns.query[picked])),
        "tokens": int(columns.n_tokens[picked].sum()),
        "n_tokens_quantiles": quantiles(columns.n_tokens[picked]),
        "ppl_quantiles": quantiles(columns.ppl[picked]),
    }


def print_set(name: str, found: dict):
    """A `summary` in one line."""
    line = f"{name}: {found['actual']:,} of {found['target']:,}"
    if found["shortage"]:
        line += f", SHORT BY {found['shortage']:,}"
    line += f"; {found['queries']:,} queries, {found['tokens']:,} tokens"
    line += f"; quantiles: tokens {found['n_tokens_quantiles']}"
    line += f", perplexity {found['ppl_quantiles']}"
    print(line)


def print_bins(details: dict, args):
    """The Gaussian, and the bins that have a target; nothing for an arm without bins."""
    if "mu" not in details:
        return
    quantile = ""
    if args.mu_quantile is not None:
        quantile = f" (quantile {args.mu_quantile})"
    print(f"Gaussian: mu {details['mu']:.4f}{quantile}, sigma {details['sigma']:g}")
    unit, bins = "perplexity", details.get("bins")
    if bins is None:
        unit, bins = "tokens", details["length_bins"]
    print(f"  {unit:>17}    target available   actual shortage")
    for b in bins:
        if b["target"]:
            between = f"{b['low']:7g} - {b['high']:7g}"
            counts = f"{b['target']:9,} {b['available']:9,} {b['actual']:8,}"
            print(f"  {between} {counts} {b['shortage'] or '-':>8}")


def copy_rows(columns: Columns, picked, objective: str, file):
    """Second pass: the picked rows, in the order of their file, as rows of the training set."""
    with open(columns.path, "rb") as lines:
        for i in np.sort(picked):
            lines.seek(int(columns.offset[i]))
            row = json.loads(lines.readline())
            if row["response"] == "":
                die(f"{columns.path}:{i + 1}: the response is empty; remove this row")
            example = {
                "sid": row["sid"],
                "pid": row["pid"],
                "problem": row["problem"],
                "response": row["response"],
                "objective": objective,
                "ppl": row["ppl"],
                "n_tokens": row["n_tokens"],
            }
            file.write(json.dumps(example, ensure_ascii=False) + "\n")


# -------------------------------------------------------------------------------------------- show


def show(args):
    """Print rows of a file: those of a problem or a response, or some drawn at random."""
    rows, n_match = draw_rows(args)
    if not n_match:
        die(f"{args.samples}: no such row")
    edges = bin_edges(1.0, 5.0, 0.05)
    for row in rows:
        facts = (
            row["sid"],
            row.get("objective"),
            verdict_of(row),
            place_of(row, edges),
            f"{row.get('n_tokens')} tokens",
            row.get("finish"),
        )
        common.print_row(facts, row.get("problem", ""), row["response"], args.chars)
    print("=" * 100)
    print(f"{len(rows)} of {n_match:,} rows of {args.samples}")


def draw_rows(args) -> tuple[list[dict], int]:
    """At most --show of the rows that match, in the order of the file, and how many match.

    One pass: the n-th match replaces a random one of those kept with probability kept / n.
    """
    draw = random.Random(args.seed)
    kept, n_match = [], 0
    rows = common.read_jsonl(args.samples, {"sid": str, "pid": str, "response": str})
    for number, row in enumerate(rows, 1):
        shown = {name: kind for name, kind in SHOWN.items() if name in row}
        common.check_fields(row, shown, f"{args.samples}:{number}")
        if args.pid not in (None, row["pid"]) or args.sid not in (None, row["sid"]):
            continue
        n_match += 1
        if len(kept) < args.show:
            kept.append((n_match, row))
            continue
        place = draw.randrange(n_match)
        if place < args.show:
            kept[place] = (n_match, row)
    kept.sort(key=lambda item: item[0])
    return [row for _, row in kept], n_match


def verdict_of(row: dict) -> str:
    if "correct" not in row:
        return "not verified"
    return f"{LABEL[row['correct']]} ({row.get('status')}), answer {row.get('predicted')!r}"


def place_of(row: dict, edges) -> str:
    """Perplexity, and the paper's bin that it lies in."""
    # A row of samples has no perplexity yet; null is one that could not be scored.
    ppl = row.get("ppl")
    if ppl is None:
        return "no perplexity"
    b = int(bin_of(np.array([ppl]), edges)[0])
    if b < 0:
        return f"perplexity {ppl:.4f}, outside [1, 5]"
    return f"perplexity {ppl:.4f}, bin {edges[b]:g} - {edges[b + 1]:g}"


def main(argv=None):
    args = parse_args(argv)
    run = {"verify": verify, "score": score, "select": select, "show": show}
    run[args.command](args)


if __name__ == "__main__":
    common.run(main)
