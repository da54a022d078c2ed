"""Verify, score, select: from sampled responses to the training sets of the arms.

    verify   grade each response against its problem's answer       samples  -> verified
    score    perplexity of each response under the base model       verified -> scored
    select   the examples that one arm trains on                    scored   -> training set
    show     a readable look at rows of any of these files

Perplexity is exp(mean NLL of the response's tokens) under the base model, over the response text alone: no prompt, no
chat markup, no BOS. The first token has no prediction, so tokens 2..L count, right-truncated at 32,768. Low perplexity
is high confidence. The arms, all drawn from verified correct teacher responses, at most `--cap` per query:

    sft             uniform at random
    sft_lp          the lowest perplexities
    oxa_mle         Gaussian-guided: a target count for each perplexity bin, and the longest responses of a bin first
    oxa_full        as oxa_mle, and for unlikelihood the wrong self-samples that the base finds most likely
    length_matched  control, ours and not the paper's: random, with the length distribution of oxa_mle's picks
    longest         control, ours and not the paper's: the longest responses

`correct` null (could not be judged) is not false: it is counted and shown, and goes into no training set.

Deliberate simplifications: rows are worked off in the order of the input, a block at a time; equal texts are scored
each for itself; `select` reads the small columns first and copies the picked rows in a second pass, so that its memory
does not grow with the text.

    python 02_verify_score.py verify --samples teacher.jsonl --problems problems.jsonl --out teacher.verified.jsonl
    python 02_verify_score.py score --samples teacher.verified.jsonl --model BASE --out teacher.scored.jsonl
    torchrun --nproc_per_node 8 -- 02_verify_score.py score --samples self.verified.jsonl --model BASE --only wrong \\
        --out self.scored.jsonl
    python 02_verify_score.py select --arm oxa_full --teacher teacher.scored.jsonl --self self.scored.jsonl \\
        --out train.jsonl
    python 02_verify_score.py show --samples teacher.scored.jsonl --show 3
"""

import array
import dataclasses
import hashlib
import json
import math
import os
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from tqdm import tqdm

import common
from model import (check_positions, encode_text, load_config, load_model, load_tokenizer, model_dir,
                   pack_sequences, render_prompt, token_logprobs)
from common import die

ARMS = ("sft", "sft_lp", "oxa_mle", "oxa_full", "length_matched", "longest")
SAMPLE = {"sid": str, "pid": str, "response": str, "n_tokens": int, "finish": str}
VERDICT = {"correct": (bool, type(None)), "status": str}
SCORED = {"sid": str, "pid": str, "n_tokens": int, "finish": str, "correct": (bool, type(None)), "ppl": (float, int, type(None))}
QUANTILES = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)
LABEL = {True: "correct", False: "wrong", None: "unknown"}

# ------------------------------------------------------------------------------------------- configuration


def configuration(argv=None):
    parser = common.make_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="verify|score|select|show")
    show = dict(type=int, default=0, metavar="N", help="print N random rows of the output, readably")

    p = common.add_command(commands, "verify", "grade each response against its problem's answer")
    p.add_argument("--samples", required=True, help="samples JSONL")
    p.add_argument("--problems", required=True, help="problems JSONL with the answers")
    p.add_argument("--out", required=True, help="verified JSONL; goes on where it stopped")
    p.add_argument("--workers", type=int, default=0, help="grading processes; 0: one per core")
    p.add_argument("--block", type=int, default=4096, help="rows graded and written at a time")
    p.add_argument("--show", **show)

    p = common.add_command(commands, "score", "perplexity of each response under the base model")
    p.add_argument("--samples", required=True, help="verified JSONL")
    p.add_argument("--model", required=True, help="the base model: directory or hub id")
    p.add_argument("--out", required=True, help="scored JSONL; goes on where it stopped")
    p.add_argument("--only", choices=("all", "correct", "wrong"), default="all", help="score and keep only these rows")
    p.add_argument("--ppl-context", choices=("response", "prompt"), default="response",
                   help="response: its text alone (the paper's); prompt: given the rendered prompt")
    p.add_argument("--max-score-tokens", type=int, default=32768, help="right-truncate longer sequences, tokens")
    p.add_argument("--token-budget", type=int, default=32768, help="tokens of one forward pass, on each rank")
    p.add_argument("--block", type=int, default=1024, help="rows scored and written at a time, over all ranks")
    p.add_argument("--show", **show)

    p = common.add_command(commands, "select", "the examples that one arm trains on")
    p.add_argument("--arm", required=True, choices=ARMS)
    p.add_argument("--teacher", required=True, help="scored JSONL of teacher responses")
    p.add_argument("--self", dest="self", default=None, help="scored JSONL of self-samples; needed by oxa_full only")
    p.add_argument("--out", required=True, help="training set JSONL")
    p.add_argument("--n-ce", type=int, default=50000, help="cross-entropy examples")
    p.add_argument("--n-ul", type=int, default=50000, help="unlikelihood examples")
    p.add_argument("--mu", type=float, default=2.5, help="centre of the Gaussian, a perplexity (7B: 3.0)")
    p.add_argument("--mu-quantile", type=float, default=None,
                   help="instead of --mu: this quantile of the correct responses' perplexities inside the range")
    p.add_argument("--sigma", type=float, default=0.25, help="width of the Gaussian, in perplexity")
    p.add_argument("--range-low", type=float, default=1.0, help="lowest perplexity of oxa_mle")
    p.add_argument("--range-high", type=float, default=5.0, help="highest perplexity of oxa_mle, itself included")
    p.add_argument("--bin-width", type=float, default=0.05, help="in perplexity")
    p.add_argument("--cap", type=int, default=1, help="cross-entropy examples per query, over all bins")
    p.add_argument("--min-tokens", type=int, default=0, help="sft_lp only: shortest response, tokens")
    p.add_argument("--ul-cap", type=int, default=1, help="unlikelihood examples per query")
    p.add_argument("--min-ppl-ul", type=float, default=1.2, help="floor of unlikelihood; below it text is degenerate")
    p.add_argument("--max-tokens-ul", type=int, default=25000, help="drop longer self-samples")
    p.add_argument("--truncated-ul", choices=("keep", "drop"), default="keep",
                   help="wrong self-samples that were cut at the length limit")
    p.add_argument("--seed", type=int, default=42, help="of ties and of random picks")
    p.add_argument("--show", **show)

    p = common.add_command(commands, "show", "a readable look at rows of a samples, verified, scored or training file")
    p.add_argument("--samples", required=True, help="any JSONL of these")
    p.add_argument("--show", type=int, default=3, metavar="N", help="at most N rows, drawn at random")
    p.add_argument("--pid", default=None, help="only rows of this problem")
    p.add_argument("--sid", default=None, help="only this response")
    p.add_argument("--chars", type=int, default=1500, help="of a response; its middle is left out beyond that")
    p.add_argument("--seed", type=int, default=42, help="of the random draw")

    args = common.parse_args(parser, argv=argv)
    common.check_range(args, block=1, n_ce=1, n_ul=1, cap=1, ul_cap=1, max_tokens_ul=1, max_score_tokens=1, token_budget=1, chars=1,
                       workers=0, show=0, min_tokens=0)
    return args


# -------------------------------------------------------------------------------------------------- verify


def verify(args):
    """samples + answers -> verified: + predicted, correct, status, and the problem's text for the stages to come."""
    from grading.verifier import verify_many
    problems = {}
    for row in common.read_jsonl(args.problems, {"pid": str, "problem": str, "answer": (str, list)}):
        if row["pid"] in problems:
            die(f"{args.problems}: pid {row['pid']} occurs twice")
        problems[row["pid"]] = (row["problem"], row["answer"])
    inputs = [args.samples, args.problems]
    common.start_output(args.out, "verified", args, inputs, may_differ=("workers", "block", "show"))
    done, out = common.append_jsonl(args.out, "sid")
    counts = Counter()
    if done:
        print(f"{args.out}: going on after {len(done):,} rows", flush=True)
        counts.update((LABEL[row["correct"]], row["status"]) for row in common.read_jsonl(args.out, VERDICT, text=False))
    with out, tqdm(desc="verify", unit=" responses", initial=len(done), mininterval=5) as progress:
        for block, n_old in common.unfinished_blocks(common.read_jsonl(args.samples, SAMPLE), done, len(done), args.block):
            block = block[n_old:]
            for row in block:
                if row["pid"] not in problems:
                    die(f"{args.samples}: {row['sid']}: no problem '{row['pid']}' in {args.problems}")
            verdicts = verify_many([(row["response"], problems[row["pid"]][1]) for row in block],
                                   workers=args.workers or None)
            for row, verdict in zip(block, verdicts, strict=True):
                # A response without an answer because it was cut at the limit is told from one that ended without.
                status = verdict.status
                if row["finish"] == "length" and status in ("no_think_end", "no_box", "unbalanced_box"):
                    status = "truncated"
                out.write({**row, "predicted": verdict.predicted, "correct": verdict.correct, "status": status,
                           "problem": problems[row["pid"]][0]})
                counts[LABEL[verdict.correct], status] += 1
            progress.update(len(block))
    judged = dict.fromkeys(LABEL.values(), 0)
    for (label, _), c in counts.items():
        judged[label] += c
    n = counts.total()
    print(f"{args.out}: {n:,} responses: " + ", ".join(f"{c:,} {label} ({c / n:.1%})" for label, c in judged.items()))
    for (label, status), c in sorted(counts.items(), key=lambda item: -item[1]):
        print(f"  {label:8} {status:16} {c:10,}")
    if judged["unknown"]:
        print(f"  {judged['unknown']:,} could not be judged (correct: null): they go into no training set")
    common.write_meta(args.out, "verified", args, inputs, rows=n, **judged,
                        status={f"{label}/{status}": c for (label, status), c in sorted(counts.items())})


# --------------------------------------------------------------------------------------------------- score


def scored_sequences(tokenizer, rows: list[dict], args) -> list[tuple[np.ndarray, int]]:
    """Rows -> (ids [L], start): tokens start..L-1 are scored. In the response's text alone the first cannot be."""
    sequences = []
    for row, ids in zip(rows, encode_text(tokenizer, [row["response"] for row in rows]) if rows else []):
        prompt = render_prompt(tokenizer, row["problem"]) if args.ppl_context == "prompt" else []
        ids = np.array((prompt + ids)[:args.max_score_tokens], dtype=np.int32)   # 4 bytes a token; a list takes 36
        sequences.append((ids, max(1, len(prompt))))
    return sequences


def packs_by_length(lengths, budget: int) -> list[list[int]]:
    """Indices, longest first, in packs of at most `budget` tokens. Neighbours in length share a pack, so that on a CPU
    they share one attention call; on a GPU it makes no difference."""
    packs, room = [], 0
    for i in np.argsort(-lengths, kind="stable").tolist():
        if lengths[i] > room:
            packs.append([])
            room = budget
        packs[-1].append(i)
        room -= lengths[i]
    return packs


@torch.no_grad()
def response_nll(model, sequences, budget: int, device="cpu") -> tuple[np.ndarray, np.ndarray]:
    """sequences [(ids, start)] -> (sum of -log p over the scored tokens [S], how many were scored [S])."""
    nll, lengths = np.zeros(len(sequences)), np.array([len(ids) for ids, _ in sequences], dtype=int)
    n_scored = np.array([max(len(ids) - start, 0) for ids, start in sequences], dtype=int)
    some, sums = np.flatnonzero(n_scored), []
    for indices in packs_by_length(lengths[some], budget):
        pack = pack_sequences([sequences[i] for i in some[indices]], device)
        logp, _ = token_logprobs(model, pack)
        total = torch.zeros(len(indices), dtype=torch.float64, device=device)
        sums.append((some[indices], total.index_add_(0, pack.seq, -logp.double())))
    for rows, total in sums:      # fetched at the end: the GPU never waits for the host
        nll[rows] = total.cpu().numpy()
    return nll, n_scored


def score(args):
    """verified -> scored: + nll_sum, n_scored, ppl, scorer, ppl_context. Under torchrun each rank scores a share."""
    dist = common.init_distributed()
    directory = model_dir(args.model)
    config = load_config(directory)
    keep = lambda row: args.only in ("all", LABEL[row["correct"]])
    light = common.read_jsonl(args.samples, {"n_tokens": int, **VERDICT}, text=False)
    lengths = [row["n_tokens"] for row in light if keep(row)]
    longest = min(args.max_score_tokens, max(lengths, default=1) - 1)        # n_tokens counts the end-of-turn token too
    check_positions(config, longest, f"scoring {args.samples}")
    if longest > args.token_budget:
        die(f"{args.samples} has responses of {longest} tokens; raise --token-budget ({args.token_budget}) "
            "or lower --max-score-tokens")
    tokenizer = load_tokenizer(directory)
    writes = dist.rank == 0
    done, out = set(), None
    if writes:
        common.start_output(args.out, "scored", args, [args.samples], may_differ=("show",))
        done, out = common.append_jsonl(args.out, "sid")
    n_done = int(common.all_reduce_sum(torch.tensor(len(done), device=dist.device)))
    if done:
        print(f"{args.out}: going on after {n_done:,} rows", flush=True)

    fields = SAMPLE | VERDICT | ({"problem": str} if args.ppl_context == "prompt" else {})
    rows = filter(keep, common.read_jsonl(args.samples, fields))
    blocks = common.unfinished_blocks(rows, done, n_done, args.block)

    def prepare():
        """The next block and the tokens of this rank's share of it: by length, dealt in turn, so shares are alike."""
        block, n_old = next(blocks, (None, 0))
        if block is None:
            return None
        share = sorted(range(len(block)), key=lambda i: (-len(block[i]["response"]), i))[dist.rank::dist.world]
        sequences = scored_sequences(tokenizer, [block[i] for i in share], args)
        check_positions(config, max((len(ids) for ids, _ in sequences), default=0), f"scoring {args.samples}")
        return block, n_old, share, sequences

    model = None
    # One thread ahead reads and tokenises the next block while this one is scored.
    progress = tqdm(desc="score", total=len(lengths), initial=n_done, unit=" rows", mininterval=5, disable=not writes)
    with ThreadPoolExecutor(1) as ahead, progress:
        waiting = ahead.submit(prepare)
        while (prepared := waiting.result()) is not None:
            waiting = ahead.submit(prepare)
            block, n_old, share, sequences = prepared
            model = model or load_model(directory, device=dist.device)
            result = torch.zeros(2, len(block), dtype=torch.float64)
            mine = response_nll(model, sequences, args.token_budget, dist.device)
            result[:, share] = torch.from_numpy(np.stack(mine))
            nll, n_scored = common.all_reduce_sum(result.to(dist.device)).cpu().tolist()
            if writes:
                for row, nll_sum, n in list(zip(block, nll, n_scored))[n_old:]:
                    if not math.isfinite(nll_sum):
                        die(f"{row['sid']}: its log-probabilities are not finite; is {args.model} a whole model?")
                    ppl = math.exp(nll_sum / n) if n else None
                    out.write({**row, "nll_sum": nll_sum, "n_scored": int(n), "ppl": ppl,
                               "scorer": args.model, "ppl_context": args.ppl_context})
                progress.update(len(block) - n_old)
    if not writes:
        return
    out.close()
    columns = read_columns(args.out, seed=0)
    ppl = columns.ppl[~np.isnan(columns.ppl)]
    n, unscored, spread = len(columns.ppl), len(columns.ppl) - len(ppl), quantiles(ppl)
    print(f"{args.out}: {n:,} rows ({args.only} of {args.samples}), {unscored:,} with fewer than 2 tokens (ppl: null); "
          f"perplexity quantiles {spread}")
    common.write_meta(args.out, "scored", args, [args.samples], rows=n, unscored=unscored, scorer=args.model,
                        ppl_quantiles=spread)


# -------------------------------------------------------------------------------- select: the small columns


@dataclasses.dataclass
class Columns:
    """What selection needs of a scored file, an entry a row. The texts stay on disk, found again by `offset`."""
    path: str
    offset: np.ndarray     # [R] where the row starts, bytes
    query: np.ndarray      # [R] number of its problem
    correct: np.ndarray    # [R] 1, 0, or -1: could not be judged
    truncated: np.ndarray  # [R] cut at the length limit
    ppl: np.ndarray        # [R] nan: could not be scored
    n_tokens: np.ndarray   # [R]
    tie: np.ndarray        # [R] a random number that depends on (seed, sid) only: not on the order of the rows
    scorers: set           # (scorer, ppl_context) of the rows

    def census(self) -> dict:
        return {"rows": len(self.query), "queries": len(np.unique(self.query)),
                "correct": int((self.correct == 1).sum()), "wrong": int((self.correct == 0).sum()),
                "unknown": int((self.correct == -1).sum()),
                "not_scored": int(np.isnan(self.ppl).sum())}


def read_columns(path, seed: int) -> Columns:
    """One pass over a scored file. Its memory grows with the number of rows, not with their text."""
    offset, query, correct, truncated, ppl, n_tokens, tie = (array.array(code) for code in "qibbdiQ")
    sids, pids, scorers = set(), {}, set()
    for start, row in common.located_rows(path, SCORED, text=False):
        sid = row["sid"]
        if sid in sids:
            die(f"{path}: sid {sid} occurs twice; every response needs its own")
        sids.add(sid)
        offset.append(start)
        query.append(pids.setdefault(row["pid"], len(pids)))
        correct.append(-1 if row["correct"] is None else row["correct"])
        truncated.append(row["finish"] == "length")
        ppl.append(math.nan if row["ppl"] is None else row["ppl"])
        n_tokens.append(row["n_tokens"])
        tie.append(int.from_bytes(hashlib.blake2b(f"{seed}\x1f{sid}".encode(), digest_size=8).digest(), "big"))
        scorers.add((row.get("scorer"), row.get("ppl_context")))
    return Columns(str(path), *map(np.array, (offset, query, correct, truncated, ppl, n_tokens, tie)), scorers)


# ------------------------------------------------------------------------------------ select: the rules of the arms


def bin_edges(low: float, high: float, width: float) -> np.ndarray:
    """[n_bins + 1] edges, exact to ten decimals: a perplexity of 1.15 lies in [1.15, 1.20), as it reads."""
    n_bins = round((high - low) / width) if width > 0 else 0
    if n_bins < 1 or abs(n_bins * width - (high - low)) > 1e-9:
        die(f"the range [{low}, {high}] is not a whole number of bins of width {width}")
    return np.round(low + width * np.arange(n_bins + 1), 10)


def bin_of(value: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """[R] -> bin of each value, -1 outside. Bins are closed below and open above; the last is closed on both sides."""
    index = np.searchsorted(edges, value, side="right") - 1
    index[value == edges[-1]] = len(edges) - 2
    return np.where((value >= edges[0]) & (value <= edges[-1]), index, -1)


def gaussian_targets(edges: np.ndarray, mu: float, sigma: float, n: int) -> np.ndarray:
    """[n_bins] counts that sum to n, in proportion to the normal density at the bins' centres, by largest remainder."""
    centre = (edges[:-1] + edges[1:]) / 2
    density = np.exp(-0.5 * ((centre - mu) / sigma) ** 2)
    if not density.sum() > 0:
        die(f"no part of the Gaussian (mu {mu}, sigma {sigma}) lies in the range [{edges[0]}, {edges[-1]}]")
    share = density / density.sum() * n
    # Bins at equal distance from mu have equal shares: rounded, the last bit does not rank them; the lower goes first.
    target = np.floor(np.round(share, 9)).astype(int)
    by_fraction = np.argsort(-np.round(share - target, 9), kind="stable")
    target[by_fraction[:n - target.sum()]] += 1
    return target


def fill(order: np.ndarray, bins: np.ndarray, target: np.ndarray, query: np.ndarray, rounds) -> np.ndarray:
    """Row indices picked from `order` (candidates, the preferred first) until each bin has its target.

    rounds: how many picks a query may have, over all bins, after each round: 1, 2, .. cap gives every query its first
    before any gets a second; (cap,) is one pass. A row is picked once; what a bin lacks in the end stays lacking.
    """
    left, taken, picked = target.tolist(), [0] * (int(query.max()) + 1), []
    candidates = list(zip(order.tolist(), bins[order].tolist(), query[order].tolist()))
    for most in rounds:
        passed_over = []
        for candidate in candidates:
            row, b, q = candidate
            if left[b] and taken[q] < most:
                left[b] -= 1
                taken[q] += 1
                picked.append(row)
            elif left[b]:
                passed_over.append(candidate)
        candidates = passed_over
        if not candidates:
            break
    return np.array(picked, dtype=int)


def quantiles(x) -> dict:
    return {q: round(float(v), 4) for q, v in zip(QUANTILES, np.quantile(x, QUANTILES))} if len(x) else {}


def fill_best(pool, value, tie, query, n: int, cap: int) -> np.ndarray:
    """Per query the `cap` lowest values of `pool` [M], of those the n lowest; ties by the random number."""
    order = pool[np.lexsort((tie[pool], value[pool]))]
    return fill(order, np.zeros(len(query), dtype=int), np.array([n]), query, rounds=(cap,))


def fill_gaussian(c: Columns, pool, args):
    """Gaussian-guided perplexity sampling: (picked rows, bins, mu)."""
    edges = bin_edges(args.range_low, args.range_high, args.bin_width)
    bins = bin_of(c.ppl, edges)
    pool = pool[bins[pool] >= 0]
    if not len(pool):
        die(f"{c.path}: no correct response has a perplexity in [{args.range_low}, {args.range_high}]")
    mu = args.mu if args.mu_quantile is None else float(np.quantile(c.ppl[pool], args.mu_quantile))
    target = gaussian_targets(edges, mu, args.sigma, args.n_ce)
    order = pool[np.lexsort((c.tie[pool], -c.n_tokens[pool], bins[pool]))]   # bins in turn, in each the longest first
    picked = fill(order, bins, target, c.query, rounds=range(1, args.cap + 1))
    return picked, bin_table(edges, target, bins[pool], bins[picked]), mu


def fill_length_matched(c: Columns, pool, like, args):
    """Random responses with the lengths of `like` (rows that oxa_mle picks): (picked rows, length bins).

    Lengths fall into bins of 5 %, and each takes as many at random as `like` has there. The bin with the least to
    choose from goes first, or the cap per query would have spent its candidates elsewhere.
    """
    edges = np.unique(np.round(1.05 ** np.arange(0, 400)))
    bins = bin_of(np.clip(c.n_tokens, edges[0], edges[-1]), edges)
    target, supply = (np.bincount(bins[rows], minlength=len(edges) - 1) for rows in (like, pool))
    pool = pool[target[bins[pool]] > 0]
    scarcity = -(target / np.maximum(supply, 1))
    order = pool[np.lexsort((c.tie[pool], bins[pool], scarcity[bins[pool]]))]
    picked = fill(order, bins, target, c.query, rounds=range(1, args.cap + 1))
    return picked, bin_table(edges, target, bins[pool], bins[picked])


def bin_table(edges, target, candidates, picked) -> list[dict]:
    """What a bin was to get, what it had to choose from, what it got, and what it lacks."""
    available, actual = (np.bincount(b, minlength=len(target)) for b in (candidates, picked))
    table = np.stack([edges[:-1], edges[1:], target, available, actual, target - actual], axis=1)
    names = ("low", "high", "target", "available", "actual", "shortage")
    return [dict(zip(names, (*row[:2], *map(int, row[2:])))) for row in table.tolist()]


def select_ce(c: Columns, args):
    """The arm's cross-entropy rows: (picked rows, details for the sidecar)."""
    pool = np.flatnonzero((c.correct == 1) & ~np.isnan(c.ppl))
    if not len(pool):
        die(f"{c.path}: no row is verified correct and scored; nothing to select from")
    zeros = np.zeros(len(c.query), dtype=int)
    if args.arm == "sft":
        order = pool[np.argsort(c.tie[pool], kind="stable")]
        return fill(order, zeros, np.array([args.n_ce]), c.query, rounds=range(1, args.cap + 1)), {}
    if args.arm == "sft_lp":
        pool = pool[c.n_tokens[pool] >= args.min_tokens]
        return fill_best(pool, c.ppl, c.tie, c.query, args.n_ce, args.cap), {}
    if args.arm == "longest":
        return fill_best(pool, -c.n_tokens, c.tie, c.query, args.n_ce, args.cap), {}
    picked, bins, mu = fill_gaussian(c, pool, args)
    if args.arm == "length_matched":
        picked, lengths = fill_length_matched(c, pool, picked, args)
        return picked, {"mu": mu, "length_bins": lengths}
    return picked, {"mu": mu, "bins": bins}


def select_ul(c: Columns, args):
    """High-confidence errors: wrong self-samples above the floor, per query the lowest, of those the lowest of all."""
    wrong = (c.correct == 0) & ~np.isnan(c.ppl)
    long, low = c.n_tokens > args.max_tokens_ul, c.ppl < args.min_ppl_ul
    cut = (c.truncated == 1) & (args.truncated_ul == "drop")
    pool = np.flatnonzero(wrong & ~long & ~low & ~cut)
    dropped = {"too_long": int((wrong & long).sum()), "below_floor": int((wrong & ~long & low).sum()),
               "truncated": int((wrong & ~long & ~low & cut).sum())}
    return fill_best(pool, c.ppl, c.tie, c.query, args.n_ul, args.ul_cap), {"dropped": dropped, "candidates": len(pool)}


# ---------------------------------------------------------------------------------------------- select: the stage


def copy_rows(c: Columns, picked, objective: str, file):
    """Second pass: the picked rows, in the order of their file, as rows of the training set."""
    with open(c.path, "rb") as lines:
        for i in np.sort(picked):
            lines.seek(int(c.offset[i]))
            row = json.loads(lines.readline())
            for name in ("problem", "response"):
                if not isinstance(row.get(name), str):
                    die(f"{c.path}: {row['sid']}: field '{name}' is missing or no text; `verify` writes it")
            row["objective"] = objective
            names = ("sid", "pid", "problem", "response", "objective", "ppl", "n_tokens")
            file.write(json.dumps({name: row[name] for name in names}, ensure_ascii=False) + "\n")


def summary(c: Columns, picked, wanted: int) -> dict:
    """Counts and quantiles of a picked set, for the sidecar and the terminal."""
    tokens, ppl = c.n_tokens[picked], c.ppl[picked]
    return {"target": wanted, "actual": len(picked), "shortage": wanted - len(picked),
            "queries": len(np.unique(c.query[picked])), "tokens": int(tokens.sum()),
            "n_tokens_quantiles": quantiles(tokens), "ppl_quantiles": quantiles(ppl)}


def report(name: str, s: dict):
    print(f"{name}: {s['actual']:,} of {s['target']:,}" + (f", SHORT BY {s['shortage']:,}" if s["shortage"] else "")
          + f"; {s['queries']:,} queries, {s['tokens']:,} tokens; quantiles: "
          + f"tokens {s['n_tokens_quantiles']}, perplexity {s['ppl_quantiles']}")


def select(args):
    """scored -> the training set of one arm, and in its sidecar what each bin was to get, got and lacks."""
    if args.sigma <= 0:
        die(f"--sigma must be positive, got {args.sigma}")
    if args.mu_quantile is not None and not 0 <= args.mu_quantile <= 1:
        die(f"--mu-quantile must lie in [0, 1], got {args.mu_quantile}")
    full = args.arm == "oxa_full"
    if full and not args.self:
        die("--arm oxa_full needs --self: the scored self-samples that unlikelihood is drawn from")
    teacher = read_columns(args.teacher, args.seed)
    own = read_columns(args.self, args.seed) if full else None
    if len(scorers := teacher.scorers | (own.scorers if full else set())) > 1:
        die(f"perplexities of different models or contexts are mixed: {sorted(map(str, scorers))}")
    for c in filter(None, (teacher, own)):
        print(f"{c.path}: " + ", ".join(f"{n:,} {label}" for label, n in c.census().items()))

    ce, details = select_ce(teacher, args)
    if not len(ce):
        die(f"{args.teacher}: no response is left for --arm {args.arm} with these limits")
    ul, ul_details = select_ul(own, args) if full else ([], {})
    if full and not len(ul):
        die(f"{args.self}: no wrong self-sample is left for unlikelihood with these limits ({ul_details})")

    if "mu" in details:
        given = "" if args.mu_quantile is None else f" (quantile {args.mu_quantile})"
        print(f"Gaussian: mu {details['mu']:.4f}{given}, sigma {args.sigma}")
    table = [b for b in details.get("bins") or details.get("length_bins") or [] if b["target"]]
    if table:
        print(f"  {'perplexity' if 'bins' in details else 'tokens':>17}    target available   actual shortage")
        for b in table:
            print(f"  {b['low']:7g} - {b['high']:7g} {b['target']:9,} {b['available']:9,} {b['actual']:8,} "
                  f"{b['shortage'] or '-':>8}")
    sets = {"ce": summary(teacher, ce, args.n_ce)} | ({"ul": summary(own, ul, args.n_ul) | ul_details} if full else {})
    report("cross-entropy", sets["ce"])
    if full:
        report("unlikelihood", sets["ul"])
        print(f"  {ul_details['candidates']:,} candidates; dropped: {ul_details['dropped']}")
    with common.replace_file(args.out) as file:
        copy_rows(teacher, ce, "ce", file)
        if full:
            copy_rows(own, ul, "ul", file)
    common.write_meta(args.out, "training", args, [args.teacher, args.self if full else None], rows=len(ce) + len(ul),
                        **sets, **details, teacher=teacher.census(), self=own.census() if full else None)


# ----------------------------------------------------------------------------------------------------- show


def show(path, n: int, seed: int, pid=None, sid=None, chars: int = 1500):
    """Print n rows of a file, drawn at random in one pass (reservoir), or those of a problem or a response."""
    draw, rows, n_match = random.Random(seed), [], 0
    for row in common.read_jsonl(path, {"sid": str, "pid": str, "response": str}):
        if pid not in (None, row["pid"]) or sid not in (None, row["sid"]):
            continue
        n_match += 1
        if len(rows) < n:
            rows.append((n_match, row))
        elif (place := draw.randrange(n_match)) < n:
            rows[place] = (n_match, row)
    if not n_match:
        die(f"{path}: no such row")
    edges = bin_edges(1.0, 5.0, 0.05)
    for _, row in sorted(rows, key=lambda item: item[0]):
        verdict = "not verified"
        if "correct" in row:
            verdict = f"{LABEL[row['correct']]} ({row.get('status')}), answer {row.get('predicted')!r}"
        ppl, place = row.get("ppl"), "no perplexity"
        if ppl is not None:
            b = int(bin_of(np.array([ppl]), edges)[0])
            place = f"perplexity {ppl:.4f}, " + (f"bin {edges[b]:g} - {edges[b + 1]:g}" if b >= 0 else "outside [1, 5]")
        facts = (row["sid"], row.get("objective"), verdict, place, f"{row.get('n_tokens')} tokens", row.get("finish"))
        common.print_row(facts, row.get("problem", ""), row["response"], chars)
    print("=" * 100, f"{len(rows)} of {n_match:,} rows of {path}", sep="\n")


def main(argv=None):
    args = configuration(argv)
    if args.command == "show":
        return show(args.samples, args.show, args.seed, args.pid, args.sid, args.chars)
    {"verify": verify, "score": score, "select": select}[args.command](args)
    if args.show and int(os.environ.get("RANK", 0)) == 0:
        show(args.out, args.show, getattr(args, "seed", 42))


if __name__ == "__main__":
    main()
