"""Memory and time of a training step on a card, from the traces that tools/trace.py left in
tools/trace.json.

A trace counts, for one pack, FLOPs, bytes and kernels of each kind. A kind takes the longer of its
two times, at a share of the card's peak that [plan] of the recipe assumes as a range, and its
launches:

    max(FLOPs / (peak x share), bytes / (bandwidth x share)) + kernels x launch

All but attention grows with the tokens, so a pack between two traced ones is on their line;
attention grows with the squares of the sequences' lengths. A prediction, never a measurement.
Standard library only: `--plan` runs before anything is installed.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tools.sizes import name_of

CACHE = Path(__file__).with_name("trace.json")

# What [plan] of a recipe may change. Where only a card can tell: [pessimist, optimist].
ASSUMED = {
    "peak_tflops": 989,              # H100 SXM, bf16, dense
    "bandwidth_tbs": 3.35,           # 1e12 bytes/s
    "products_share": [0.5, 0.75],   # of the peak, that matrix products reach
    "attention_share": [0.35, 0.6],  # of the peak, that the varlen kernel reaches
    "bandwidth_share": [0.65, 0.9],  # of the bandwidth, that all other kernels reach
    "launch_us": [8, 4],             # of each kernel
}
PESSIMIST, OPTIMIST = 0, 1


def at_end(assumed: dict, end: int) -> dict:
    """[plan] with each range replaced by its pessimist's or optimist's number."""
    return {key: value[end] if isinstance(value, list) else value
            for key, value in assumed.items()}


# Kinds of kernels, and the share of which peak bounds each.
COMPUTING = {"products": "products_share", "output products": "products_share",
             "attention": "attention_share"}
FUSED = ("elementwise", "casts")             # what compiling a decoder layer can fuse


@dataclass
class Work:
    """What the kernels of one kind do in a pack."""
    flops: float = 0
    bytes: float = 0
    kernels: float = 0


@cache
def traces() -> list[dict]:
    """The traced cases, by rising number of tokens."""
    cases = json.loads(CACHE.read_text())["cases"]
    return sorted(cases, key=lambda case: case["tokens"])


def between(low: float, high: float, place: float) -> float:
    return low + (high - low) * place


def traced_pack(model, way: str, checkpointing: bool, tokens: int, ranks: int = 1) -> dict | None:
    """{"memory": part -> bytes, "work": kind -> Work} of a pack of one sequence of `tokens`; None
    if the model was not traced this way.

    `way`: "ddp", "shard" (over `ranks`), "one" (card), "frozen" (scored, not trained).
    """
    wanted = (name_of(model), way, checkpointing)
    cases = [c for c in traces() if (c["model"], c["way"], c["checkpointing"]) == wanted]
    if len(cases) < 2:
        return None
    above = next((k for k, case in enumerate(cases) if case["tokens"] >= tokens), len(cases) - 1)
    low, high = cases[max(above, 1) - 1:max(above, 1) + 1]
    place = (tokens - low["tokens"]) / (high["tokens"] - low["tokens"])
    memory = {part: between(low["memory"][part], high["memory"][part], place)
              for part in high["memory"]}
    work = {}
    for kind, numbers in high["work"].items():
        pairs = zip(low["work"][kind], numbers)
        work[kind] = Work(*(between(a, b, place) for a, b in pairs))
    per_square = high["work"]["attention"][0] / high["tokens"] ** 2
    work["attention"].flops = per_square * tokens ** 2
    if way == "shard":                      # traced over 8
        split = high["ranks"] / ranks
        for part in ("weights", "gradients", "optimizer"):
            memory[part] *= split
        work["optimizer"].bytes *= split
    return {"memory": memory, "work": work}


def traced_train(model, s, cards: int) -> dict | None:
    """The traced pack of a training step; `s`: settings of train or rlvr."""
    checkpointing, tokens = s["gradient_checkpointing"], s["token_budget"]
    if cards > 1:
        way = "shard" if s["shard"] else "ddp"
        return traced_pack(model, way, checkpointing, tokens, cards)
    pack = traced_pack(model, "one", checkpointing, tokens)
    if pack is None:
        pack = traced_pack(model, "ddp", checkpointing, tokens)
        if pack:
            pack["memory"]["DDP buckets"] = 0
    return pack


def kernel_seconds(kind: str, work: Work, p: dict) -> float:
    """Of one kind; `p`: what is assumed, at one end."""
    moving = work.bytes / (p["bandwidth_tbs"] * 1e12 * p["bandwidth_share"])
    computing = 0.0
    if kind in COMPUTING:
        computing = work.flops / (p["peak_tflops"] * 1e12 * p[COMPUTING[kind]])
    return max(moving, computing) + work.kernels * p["launch_us"] * 1e-6


def pack_seconds(pack: dict, tokens: int, length: float, p: dict) -> dict:
    """Kind -> seconds of a pack of `tokens` that sit in sequences of mean `length`; "optimizer" is
    the end of a step."""
    seconds = {}
    for kind, work in pack["work"].items():
        if kind == "attention":
            work = Work(work.flops * min(1.0, length / tokens), work.bytes, work.kernels)
        seconds[kind] = kernel_seconds(kind, work, p)
    return seconds
