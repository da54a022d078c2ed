"""Scoring throughput: 02's packs against a plain one-response-at-a-time Hugging Face loop and
length-sorted padded batches.

    python bench/score.py [--model toy/base --rounds 5 --responses 2048]

Responses of the toy teacher, or solutions of word problems for another model ("traces"), and the
same text cut to lengths from 8 to 500 tokens, log-uniform ("mixed"). float32, one thread, from text
to perplexity (tokenising included, loading the model not). The three run in turn in each round on
the same responses. Seconds are CPU seconds of the process, so that other processes disturb little;
the table gives medians over rounds and ratios within the round, and the largest relative difference
of a perplexity from the plain loop's.
"""

import argparse
import importlib
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
import torch.nn.functional as F

from bench.data import responses
from model import encode_text, load_model, load_tokenizer

stage = importlib.import_module("02_verify_score")


def texts_to_score(model, tokenizer, n: int, mixed: bool) -> list[str]:
    """n texts: teacher traces as they are, or a running text of them cut to log-uniform lengths."""
    with tempfile.TemporaryDirectory() as folder:
        texts = responses(Path(folder), model)
    if not mixed:
        return texts[:n]
    draw = np.random.default_rng(0)
    lengths = np.exp(draw.uniform(np.log(8), np.log(500), n)).astype(int)
    running = sum(encode_text(tokenizer, texts), [])
    running = np.resize(running, lengths.sum())
    borders = np.concatenate([[0], lengths.cumsum()])
    return [tokenizer.decode(running[a:b].tolist()) for a, b in zip(borders, borders[1:])]


def ours(model, tokenizer, texts):
    """As `02 score` does it: blocks of 1,024 rows, packs of at most 2,048 tokens (small enough for
    a CPU cache)."""
    args = argparse.Namespace(ppl_context="response", max_score_tokens=32768)
    mean = []
    for start in range(0, len(texts), 1024):
        sequences = stage.scored_sequences(
            tokenizer, [{"response": t} for t in texts[start : start + 1024]], args
        )
        nll, n_scored = stage.response_nll(model, sequences, 2048)
        mean.append(nll / n_scored)
    return np.exp(np.concatenate(mean))


@torch.no_grad()
def plain_loop(model, tokenizer, texts):
    """The way of many scripts: `model(ids, labels=ids).loss`, one response at a time."""
    ppl = []
    for text in texts:
        ids = torch.tensor([encode_text(tokenizer, text)])
        ppl.append(model(input_ids=ids, labels=ids, use_cache=False).loss.exp().item())
    return np.array(ppl)


@torch.no_grad()
def padded_batches(model, tokenizer, texts, batch: int = 32):
    """Sorted by length, right-padded, 32 responses at a time, full logits."""
    ids = encode_text(tokenizer, texts)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    ppl = np.zeros(len(ids))
    for rows in (order[i : i + batch] for i in range(0, len(order), batch)):
        width = max(len(ids[i]) for i in rows)
        tokens = torch.tensor([ids[i] + [0] * (width - len(ids[i])) for i in rows])
        length = torch.tensor([len(ids[i]) for i in rows])
        real = torch.arange(width)[None] < length[:, None]
        logits = model(input_ids=tokens, attention_mask=real.long(), use_cache=False).logits[:, :-1]
        nll = (
            F.cross_entropy(logits.transpose(1, 2).float(), tokens[:, 1:], reduction="none")
            * real[:, 1:]
        )
        ppl[rows] = (nll.sum(1) / (length - 1)).exp().numpy()
    return ppl


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(ROOT / "toy/base"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--responses", type=int, default=2048)
    args = parser.parse_args()
    torch.set_num_threads(1)
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(args.model)
    stock, packed = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.float32
    ), load_model(args.model)
    ways = {
        "plain loop": (plain_loop, stock),
        "padded batches of 32": (padded_batches, stock),
        "02 score": (ours, packed),
    }
    for name, mixed in (("traces", False), ("mixed", True)):
        texts = texts_to_score(args.model, tokenizer, args.responses, mixed)
        lengths = [len(ids) for ids in encode_text(tokenizer, texts)]
        seconds, result = {way: [] for way in ways}, {}
        for way, (run, model) in ways.items():  # warm-up
            run(model, tokenizer, texts[:64])
        for _ in range(args.rounds):
            for way, (run, model) in ways.items():
                begin = time.process_time()
                result[way] = run(model, tokenizer, texts)
                seconds[way].append(time.process_time() - begin)
        print(
            f"\n{name}: {len(texts)} responses, {sum(lengths):,} tokens, lengths {min(lengths)} "
            f"to {max(lengths)}, "
            f"median {statistics.median(lengths):.0f}; torch {torch.__version__}, one thread, "
            f"{args.rounds} rounds"
        )
        print(f"{'':22}{'tokens/s':>10}{'x plain loop':>14}{'largest difference':>20}")
        for way in ways:
            rate = sum(lengths) / statistics.median(seconds[way])
            ratio = statistics.median(a / b for a, b in zip(seconds["plain loop"], seconds[way]))
            gap = np.abs(result[way] / result["plain loop"] - 1).max()
            print(f"{way:22}{rate:10,.0f}{ratio:14.2f}{gap:20.1e}")
        assert np.abs(result["02 score"] / result["plain loop"] - 1).max() < 1e-4


if __name__ == "__main__":
    main()
