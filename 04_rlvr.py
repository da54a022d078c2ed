"""Stage 4: reinforcement learning with verifiable rewards (GRPO), from a checkpoint to a checkpoint.

One step, a function each, in this order:
    prompts_of_step      P problems, a pure function of (seed, step)
    draw_rollouts        G responses to each from the engine, and the log-prob of every token when it was drawn
    give_rewards         1 if the text after </think> verifies, else 0: in worker processes, while
    reference_logprobs   scores the same tokens under the starting model, for the KL term
    give_advantages      each reward against those of its group
    give_weights         the loss normalisation: what one token of each rollout counts
    update               policy_loss over packed micro-batches, gradient, AdamW
    sync, check_sync     the weights go into the engine, then both sides score the same tokens

With one update per batch the policy that is trained is the one that sampled: its ratio is exp(0) = 1 and no pass of an "old"
policy is made. With more, the forward pass of the first update gives the old log-probs.

Deliberate simplifications
- Rollouts are drawn with top-p 1: with less, the engine's distribution is not the trainer's and every ratio is biased.
- Policy, old policy and reference are taken at the sampling temperature, softmax(logits / T): the distribution that acted.
- Prompts are split over the ranks, each with its own engine; a group never crosses ranks, denominators always do.
- Short rollouts of a problem share a pack, which reads their prompt once: the numbers are those of reading it each time.
- Steps are synchronous: no rollout is older than the weights it trains. Constant learning rate, no reward shaping, no replay.

    python 04_rlvr.py --model RUN/sft --problems rlvr.jsonl --out RUN/rlvr                       one process (CPU or one card)
    torchrun --nproc_per_node 8 -- 04_rlvr.py --recipe recipes/paper_1.5b.toml --model RUN/sft --problems rlvr.jsonl --out RUN/rlvr

Writes OUT/final (the model), OUT/step-* (checkpoints), OUT/metrics.jsonl (docs/METRICS.md) and OUT/rollouts.jsonl (a sample of
each step). Run it again to go on from the newest checkpoint, bit for bit on a CPU; Ctrl-C saves the last whole step first.
"""

import contextlib
import json
import math
import signal
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import common
from model import (check_positions, clip_gradient, decode_response, distribute, gradient_sync,
                   latest_checkpoint, load_config, load_model, load_state, load_tokenizer, Pack, pack_sequences,
                   plan_packs, render_prompt, save_checkpoint, token_logprobs)
import engines
from grading import verifier

CHECK_ROLLOUTS, CHECK_TOKENS = 4, 8     # the check after a weight sync: so many prefixes, each continued by so many tokens
KL_D_MAX, KL_MAX = 20.0, 10.0           # clamps of the KL estimate: d before exp, and the estimate itself (as verl does)
MAY_DIFFER = ("gpu_memory", "sleep", "epochs", "max_steps", "save_every", "keep", "eval_every", "eval_problems",
              "log_rollouts", "verify_workers", "max_logp_gap", "wandb", "tensorboard")    # when a run is continued


def config(argv=None):
    parser = common.make_parser(__doc__)
    add = parser.add_argument
    add("--model", required=True, help="checkpoint to start from; also the reference of the KL term")
    add("--problems", required=True, help="problems (JSONL: pid, problem, answer)")
    add("--out", required=True, help="directory of this run")
    add("--engine", default="auto", choices=["auto", "hf", "vllm"], help="what draws the rollouts (auto: vLLM on a GPU)")
    add("--gpu-memory", type=float, default=0.3, help="share of a card's memory for vLLM")
    add("--sleep", action="store_true", help="vLLM gives its memory to the trainer while no rollouts are drawn (7B)")
    add("--prompts-per-step", type=int, default=64, help="problems in a step, over all cards")
    add("--rollouts", type=int, default=8, help="responses to each problem: the group")
    add("--epochs", type=int, default=20, help="passes over the problems")
    add("--max-steps", type=int, default=0, help="end of the run in steps, if earlier than --epochs (0: no such end)")
    add("--temperature", type=float, default=0.85, help="of sampling, and of every log-prob here")
    add("--max-prompt-tokens", type=int, default=1536, help="longer prompts are dropped and counted")
    add("--max-response-tokens", type=int, default=18432, help="a response is cut here (paper: 16384 for 7B)")
    add("--overlong", default="keep", choices=["keep", "mask", "zero"], help="grade a cut response, mask its loss, reward 0")
    add("--advantage", default="grpo", choices=["grpo", "dr_grpo", "rloo"], help="formulas: give_advantages in this file")
    add("--normalize", default="token", choices=["token", "sequence", "constant"], help="formulas: give_weights")
    add("--skip-uniform-groups", action="store_true", help="groups without signal leave the loss, their KL too")
    add("--clip-low", type=float, default=0.2, help="the ratio is clipped below at 1 - this")
    add("--clip-high", type=float, default=0.2, help="the ratio is clipped above at 1 + this")
    add("--dual-clip", type=float, default=3.0, help="bound of the ratio where the advantage is negative (0: none)")
    add("--kl-coef", type=float, default=0.001, help="weight of the KL term (0: no reference model is loaded)")
    add("--tis-cap", type=float, default=0.0, help="cap of the importance weights p(trainer) / p(engine) (0: not used)")
    add("--updates-per-batch", type=int, default=1, help="optimizer steps on each batch of rollouts")
    add("--lr", type=float, default=2e-6, help="AdamW's learning rate, constant")
    add("--weight-decay", type=float, default=0.01, help="AdamW, on every parameter")
    add("--grad-clip", type=float, default=1.0, help="largest gradient norm (0: no limit)")
    add("--token-budget", type=int, default=32768, help="tokens in a micro-batch on one card, prompts included")
    add("--gradient-checkpointing", action="store_true", help="recompute activations in backward (long sequences)")
    add("--shard", action="store_true", help="fully_shard instead of DDP: for what one card cannot hold (7B)")
    add("--max-logp-gap", type=float, default=0.0, help="mean gap to the engine that stops the run; 0: see refuse_gap")
    add("--seed", type=int, default=42, help="of the order of prompts and of sampling")
    add("--save-every", type=int, default=20, help="steps between checkpoints")
    add("--keep", type=int, default=2, help="checkpoints kept")
    add("--log-rollouts", type=int, default=8, help="rollouts of each step that go to rollouts.jsonl")
    add("--eval-every", type=int, default=0, help="steps between small Pass@1 evaluations (0: none)")
    add("--eval-problems", default="", help="their problems (JSONL); --rollouts samples of each")
    add("--verify-workers", type=int, default=2, help="verifying processes of each rank")
    add("--wandb", action="store_true", help="log to Weights & Biases too")
    add("--tensorboard", action="store_true", help="log to TensorBoard too")
    args = common.parse_args(parser, "rlvr", argv)
    common.require_loggers(args)
    common.check_range(args, ["gpu_memory"], prompts_per_step=1, rollouts=1, epochs=1, max_prompt_tokens=1, max_response_tokens=1,
                       token_budget=1, updates_per_batch=1, save_every=1, keep=1, max_steps=0, clip_low=0, clip_high=0, kl_coef=0,
                       tis_cap=0, lr=0, weight_decay=0, grad_clip=0, max_logp_gap=0, log_rollouts=0, eval_every=0, verify_workers=1)
    if not args.temperature > 0:
        common.die(f"--temperature must be above 0, got {args.temperature}")
    if args.dual_clip and not args.dual_clip > 1:
        common.die(f"--dual-clip must be above 1, or 0 for none, got {args.dual_clip}")
    if args.eval_every and not args.eval_problems:
        common.die("--eval-every needs --eval-problems")
    return args


@dataclass
class Rollout:
    """One response: what the engine drew, and what each function of the step adds."""
    pid: str
    g: int                                  # place in its group
    prompt_ids: list[int]
    ids: list[int]                          # [L], a stop token included
    finish: str                             # "stop" | "length"
    logp_engine: torch.Tensor               # [L] when drawn
    response: str
    reward: float = 0.0
    correct: bool | None = None             # None: the verifier could not tell
    status: str = ""
    advantage: float = 0.0
    weight: float = 0.0                     # of each of its tokens in the loss
    logp_ref: torch.Tensor | None = None    # [L] under the starting model
    logp_new: torch.Tensor | None = None    # [L] under the policy, from the newest pass (None: not in the loss)
    logp_old: torch.Tensor | None = None    # [L] under the policy that sampled, kept for second and later updates

    def gap(self):
        """|log p(trainer) - log p(engine)| [L], zeros if the rollout is not in the loss."""
        return (self.logp_engine - (self.logp_engine if self.logp_new is None else self.logp_new.cpu())).abs()


def usable_problems(path, tokenizer, args, at_least: int, say) -> list[dict]:
    """Problems whose prompt fits and whose gold answer can be judged by; the others are counted and printed.

    A gold that cannot be parsed (another answer than itself is then unknown, not wrong), or that does not verify as its own
    response, would make the problem a silent zero.
    """
    rows = {row["pid"]: dict(row, prompt_ids=render_prompt(tokenizer, row["problem"]))
            for row in common.read_jsonl(path, {"pid": str, "problem": str, "answer": (str, list)})}
    fitting = [row for row in rows.values() if len(row["prompt_ids"]) <= args.max_prompt_tokens]
    golds = [row["answer"] if isinstance(row["answer"], str) else row["answer"][0] for row in fitting]
    itself, other = (verifier.verify_many([(f"</think>\\boxed{{{text}}}", row["answer"]) for text, row in zip(texts, fitting)],
                                          workers=args.verify_workers) for texts in (golds, ["0"] * len(fitting)))
    kept = [row for row, a, b in zip(fitting, itself, other) if a.correct and b.correct is not None]
    say(f"{path}: {len(rows)} problems, {len(rows) - len(fitting)} dropped with a prompt over {args.max_prompt_tokens} tokens, "
        f"{len(fitting) - len(kept)} dropped with a gold answer that cannot be parsed; {len(kept)} are used")
    if len(kept) < at_least:
        common.die(f"{path}: {len(kept)} usable problems, at least {at_least} are needed")
    return kept


def prompts_of_step(n_problems: int, prompts_per_step: int, seed: int, step: int) -> list[int]:
    """Indices [P] of the problems of `step` (from 1): a new permutation each epoch, whole batches only (drop last)."""
    epoch, i = divmod(step - 1, n_problems // prompts_per_step)
    order = np.random.default_rng([seed, epoch]).permutation(n_problems)
    return order[i * prompts_per_step:(i + 1) * prompts_per_step].tolist()


def draw_rollouts(engine, tokenizer, problems, step, args, progress=None) -> list[Rollout]:
    """G rollouts of each problem, in order; the sampling seed of each is a function of (seed, step, pid, g) alone."""
    asked = [(problem, g) for problem in problems for g in range(args.rollouts)]
    prompts = [problem["prompt_ids"] for problem, _ in asked]
    seeds = [common.request_seed(args.seed, step, problem["pid"], g) for problem, g in asked]
    rollouts = [None] * len(asked)
    for i, drawn in engine.generate(prompts, seeds, args.temperature, 1.0, args.max_response_tokens, progress):
        text = decode_response(tokenizer, drawn.ids)
        rollouts[i] = Rollout(asked[i][0]["pid"], asked[i][1], prompts[i], list(drawn.ids), drawn.finish,
                              torch.tensor(drawn.logp), text)
    return rollouts


def give_rewards(rollouts, answers: dict, args):
    """Reward 1 for a response that verifies against the answer of its own pid, else 0.

    An unknown verdict (null: the verifier failed or ran out of time) has reward 0 and is counted apart from a wrong one.
    """
    verdicts = verifier.verify_many([(r.response, answers[r.pid]) for r in rollouts], workers=args.verify_workers)
    for r, verdict in zip(rollouts, verdicts, strict=True):
        r.correct, r.status = verdict.correct, verdict.status
        r.reward = float(r.correct is True and not (args.overlong == "zero" and r.finish == "length"))


def plan(rollouts, args) -> list[list[Rollout]]:
    """Micro-batches: lists of rollouts that hold at most --token-budget tokens, prompts included.

    Short rollouts of one problem stay together, up to half of the budget: a pack reads their prompt once.
    """
    size = lambda members: sum(len(r.prompt_ids) + len(r.ids) for r in members)
    bundles = []
    for r in rollouts:
        if bundles and bundles[-1][0].pid == r.pid and size(bundles[-1] + [r]) <= args.token_budget // 2:
            bundles[-1].append(r)
        else:
            bundles.append([r])
    packs = plan_packs([size(bundle) for bundle in bundles], args.token_budget)[0]
    return [[r for i in indices for r in bundles[i]] for indices in packs]


def lay_out(members, device) -> Pack:
    return pack_sequences([(r.prompt_ids + r.ids, len(r.prompt_ids)) for r in members], device, share=True)


def keep_logprobs(members, name: str, logp):
    """Cut the log-probs [N] of a pack into those of its rollouts, and keep them there as `name`."""
    for r, part in zip(members, logp.split([len(r.ids) for r in members])):
        setattr(r, name, part)


@torch.no_grad()
def reference_logprobs(reference, rollouts, args, device):
    """Sets logp_ref [L] of each rollout: its tokens under the starting model, at the sampling temperature."""
    for members in plan(rollouts, args):
        keep_logprobs(members, "logp_ref", token_logprobs(reference, lay_out(members, device), args.temperature)[0])


def groups_of(rollouts, args) -> list[list[Rollout]]:
    return [rollouts[i:i + args.rollouts] for i in range(0, len(rollouts), args.rollouts)]


def give_advantages(rollouts, args):
    """Sets each advantage from the rewards r of its group of G.

    grpo     (r - mean) / (std + 1e-6), std with Bessel's correction         Shao et al. 2024 (DeepSeekMath), arXiv 2402.03300
    dr_grpo  r - mean: easy and hard problems are not blown up               Liu et al. 2025, arXiv 2503.20783
    rloo     r - mean of the other G - 1 = (r - mean) G / (G - 1)            Ahmadian et al. 2024, arXiv 2402.14740

    A group of one has nothing to compare with: mean 0, std 1 in all three. A uniform group has advantage 0 throughout.
    """
    for group in groups_of(rollouts, args):
        rewards, n = [r.reward for r in group], len(group)
        mean, std = (statistics.fmean(rewards), statistics.stdev(rewards)) if n > 1 else (0.0, 1.0)
        scale = {"grpo": 1 / (std + 1e-6), "dr_grpo": 1.0, "rloo": n / max(n - 1, 1)}[args.advantage]
        for r in group:
            r.advantage = (r.reward - mean) * scale


def give_weights(rollouts, args, device):
    """Sets the weight of each rollout's tokens; the loss is the plain sum over tokens of weight x token loss.

    token     1 / tokens of the batch                           Yu et al. 2025 (DAPO), arXiv 2503.14476; the paper's choice
    sequence  1 / (rollouts of the batch x tokens of this one)  Shao et al. 2024, arXiv 2402.03300
    constant  1 / (rollouts of the batch x longest allowed)     Liu et al. 2025 (Dr. GRPO), arXiv 2503.20783

    The batch is that of all ranks and micro-batches, so neither changes the loss. What is out of the loss (cut rollouts with
    --overlong mask, groups without signal with --skip-uniform-groups) has weight 0 and is in no count.
    """
    live = [r for group in groups_of(rollouts, args) for r in group if not (args.overlong == "mask" and r.finish == "length")
            and not (args.skip_uniform_groups and not any(other.advantage for other in group))]
    counts = torch.tensor([len(live), sum(len(r.ids) for r in live)], dtype=torch.float64, device=device)
    n_rollouts, n_tokens = common.all_reduce_sum(counts).tolist()
    for r in live:
        r.weight = {"token": 1 / n_tokens, "sequence": 1 / (n_rollouts * len(r.ids)),
                    "constant": 1 / (n_rollouts * args.max_response_tokens)}[args.normalize]


STATS = ("loss", "pg_loss", "tokens", "kl", "clip_low", "clip_high", "dual_clip", "tis_weight", "logp_gap", "entropy")


def policy_loss(logp, logp_old, logp_engine, logp_ref, advantage, weight, args):
    """Sum over tokens of weight x (clipped policy gradient + kl_coef x KL). All [N]; only `logp` has a gradient.

    ratio  exp(logp - logp_old); without logp_old the policy is the one that sampled: value 1, gradient that of logp
    clip   max(-A ratio, -A clip(ratio, 1 - low, 1 + high))    Schulman et al. 2017 (PPO), arXiv 1707.06347; low < high: DAPO
    dual   for A < 0 at most -A dual_clip                      Ye et al. 2019, arXiv 1912.09729
    TIS    x min(exp(logp_old - logp_engine), tis_cap)         Yao et al. 2025, "Your efficient RL framework secretly brings
                                                               you off-policy RL training"
    KL     k3: exp(d) - d - 1, d = logp_ref - logp, clamped    Schulman 2020, "Approximating KL divergence"

    Returns (loss, sums): the loss, the weighted policy-gradient loss and plain sums over tokens of nonzero weight, see STATS.
    """
    logp_old = logp.detach() if logp_old is None else logp_old
    ratio = torch.exp(logp - logp_old)
    plain, clipped = -advantage * ratio, -advantage * ratio.clamp(1 - args.clip_low, 1 + args.clip_high)
    bound = torch.where(advantage < 0, -advantage * (args.dual_clip or math.inf), math.inf)
    pg = torch.maximum(plain, clipped).minimum(bound)
    tis = torch.exp(logp_old - logp_engine).clamp(max=args.tis_cap) if args.tis_cap else torch.ones_like(pg)
    d = ((logp if logp_ref is None else logp_ref) - logp).clamp(-KL_D_MAX, KL_D_MAX)
    kl = (torch.exp(d) - d - 1).clamp(max=KL_MAX)
    loss = (weight * (tis * pg + args.kl_coef * kl)).sum()
    live, cut, negative = weight > 0, plain < clipped, advantage < 0
    per_token = (live, kl, cut & negative, cut & ~negative, plain > bound, tis, (logp_old - logp_engine).abs())
    sums = [loss, (weight * tis * pg).sum()] + [x[live].sum() for x in per_token]
    return loss, torch.stack([x.detach().double() for x in sums])


class Policy(torch.nn.Module):
    """The model with the loss inside its `forward`, so that DDP and fully_shard see every gradient."""

    def __init__(self, model, args):
        super().__init__()
        self.model, self.args = model, args

    def forward(self, pack, fields=None):
        """Log-probs [N] of a pack; with `fields` (token_fields) also the loss and the sums of STATS."""
        logp, entropy = token_logprobs(self.model, pack, self.args.temperature, entropy=fields is not None)
        if fields is None:
            return logp
        loss, sums = policy_loss(logp, **fields, args=self.args)
        return logp.detach(), loss, torch.cat([sums, entropy[fields["weight"] > 0].sum()[None].double()])


def token_fields(members, device) -> dict:
    """What policy_loss takes beside logp, each [N] in the order of the pack of `members`."""
    sizes = torch.tensor([len(r.ids) for r in members])
    spread = lambda name: torch.tensor([getattr(r, name) for r in members]).repeat_interleave(sizes)
    joined = lambda name: None if getattr(members[0], name) is None else torch.cat([getattr(r, name) for r in members])
    fields = {"advantage": spread("advantage"), "weight": spread("weight")}
    fields |= {name: joined(name) for name in ("logp_engine", "logp_ref", "logp_old")}
    return {name: x if x is None else x.to(device) for name, x in fields.items()}


def largest(x, dist) -> float:
    """The largest x of all ranks."""
    of_rank = torch.zeros(dist.world, dtype=torch.float64, device=dist.device)
    of_rank[dist.rank] = x
    return float(common.all_reduce_sum(of_rank).max())


def backward(policy, rollouts, args, dist) -> dict:
    """Leaves the gradient of the batch's loss on every rank; returns STATS over all ranks: the losses, and means over tokens.

    Every rank makes the same number of passes and gradients are exchanged in the last one only. A rank with fewer packs runs
    its first rollout at weight 0 instead: it adds exactly nothing, and no rank waits for an exchange that never comes.
    """
    live = [r for r in rollouts if r.weight]
    packs = plan(live, args) if live else []
    n_passes = int(largest(len(packs), dist))
    totals = torch.zeros(len(STATS), dtype=torch.float64, device=dist.device)
    for k in range(n_passes):
        members = packs[k] if k < len(packs) else rollouts[:1]
        fields = token_fields(members, dist.device)
        fields["weight"] *= k < len(packs)
        with gradient_sync(policy, last=k == n_passes - 1):
            logp, loss, sums = policy(lay_out(members, dist.device), fields)
            (loss * dist.world).backward()                   # the wrappers average over ranks, the loss is a sum
        keep_logprobs(members, "logp_new", logp)
        totals += sums
    stats = dict(zip(STATS, common.all_reduce_sum(totals).tolist()))
    n_tokens = max(stats.pop("tokens"), 1)
    return {name: x if "loss" in name else x / n_tokens for name, x in stats.items()}


def update(policy, optimizer, rollouts, step: int, args, dist, interrupts) -> dict:
    """--updates-per-batch optimizer steps on the batch. Returns the mean over them of `backward`'s numbers and grad_norm.

    Before the first, trainer and engine are compared on every token in the loss: rollouts from other weights than these never
    enter an update. A loss or gradient that is not finite stops the run before it touches a weight, and names the batch.
    """
    history = []
    for k in range(args.updates_per_batch):
        stats = backward(policy, rollouts, args, dist)
        stats["grad_norm"] = clip_gradient(policy, args.grad_clip)
        if not all(map(math.isfinite, stats.values())):
            path = Path(args.out) / f"bad_batch.rank-{dist.rank}.json"
            path.write_text(json.dumps({"step": step, "rollouts": [[r.pid, r.g, r.advantage, len(r.ids)] for r in rollouts]}))
            common.die(f"step {step}: a loss or gradient is not finite ({stats}); the batch's ids are in {path}")
        if k == 0:
            refuse_gap(stats["logp_gap"], args, dist, f"step {step}, on its rollouts")
            for r in rollouts:
                r.logp_old = r.logp_new if args.updates_per_batch > 1 else None
        interrupts.held = True                               # from here to the end of the step: all or nothing
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        history.append(stats)
    return {name: statistics.fmean(stats[name] for stats in history) for name in history[0]}


def refuse_gap(gap: float, args, dist, where: str):
    """Stop if the mean |log p(trainer) - log p(engine)| is over --max-logp-gap; 0: 1e-4, or 0.05 on CUDA (bf16)."""
    limit = args.max_logp_gap or (0.05 if dist.device.startswith("cuda") else 1e-4)
    if not gap <= limit:
        common.die(f"{where}: mean |log p(trainer) - log p(engine)| is {gap:.2g}, over the limit (--max-logp-gap) of {limit:g}: "
                   "the engine draws from other weights, or from another distribution, than the trainer trains")


@torch.no_grad()
def check_sync(engine, policy, rollouts, step: int, args, dist) -> dict:
    """Engine and trainer score the same tokens: a few rollouts of the step, cut in half, are continued by the engine.

    It has read these very prefixes under the old weights, so a prefix cache that outlived the sync shows as a gap too.
    """
    members = rollouts[:CHECK_ROLLOUTS]
    prefixes = [r.prompt_ids + r.ids[:len(r.ids) // 2] for r in members]
    n_new = min([CHECK_TOKENS] + [args.max_response_tokens - len(r.ids) // 2 for r in members])
    seeds = [common.request_seed(args.seed, "check", step, r.pid, r.g) for r in members]
    drawn = dict(engine.generate(prefixes, seeds, args.temperature, 1.0, n_new))
    drawn = [drawn[i] for i in range(len(members))]
    pack = pack_sequences([(prefix + list(d.ids), len(prefix)) for prefix, d in zip(prefixes, drawn)], dist.device)
    gap = (policy(pack) - torch.tensor([x for d in drawn for x in d.logp], device=dist.device)).abs()
    total, n = common.all_reduce_sum(torch.stack([gap.sum(), torch.ones_like(gap).sum()])).tolist()
    refuse_gap(total / n, args, dist, f"step {step}, after the weight sync")
    return {"sync_gap_mean": total / n, "sync_gap_max": largest(gap.max(), dist)}


def evaluate(engine, tokenizer, problems, answers, args, dist) -> float:
    """A small Pass@1: mean reward of --rollouts samples of each problem, drawn as in training, the same seeds every time."""
    rollouts = draw_rollouts(engine, tokenizer, problems[dist.rank::dist.world], "eval", args)
    give_rewards(rollouts, answers, args)
    counts = torch.tensor([sum(r.reward for r in rollouts), len(rollouts)], dtype=torch.float64, device=dist.device)
    total, n = common.all_reduce_sum(counts).tolist()
    return total / n


class Interrupts:
    """Ctrl-C and SIGTERM raise KeyboardInterrupt, but wait while `held`: a step is whole or never began."""
    held = pending = False

    def __call__(self, *signal_and_frame):
        self.pending = True
        self.release(self.held)

    def release(self, held=False):
        self.held = held
        if self.pending and not held:
            raise KeyboardInterrupt


@contextlib.contextmanager
def timed(seconds: dict, phase: str):
    start = time.perf_counter()
    yield
    seconds[phase] = time.perf_counter() - start


def summary(rollouts, stats: dict, seconds: dict, args, dist) -> dict:
    """The step's row of metrics.jsonl: numbers about the rollouts of all ranks, and the speed of each phase."""
    mine = [[r.reward, r.correct is None, r.finish == "length", r.advantage != 0, len(r.ids), len(r.prompt_ids), r.gap().max()]
            for r in rollouts]
    table = torch.zeros(args.prompts_per_step, args.rollouts, 7, dtype=torch.float64, device=dist.device)
    table[dist.rank::dist.world] = torch.tensor(mine, dtype=torch.float64, device=dist.device).view(-1, args.rollouts, 7)
    table = common.all_reduce_sum(table).cpu().numpy()
    reward, unknown, cut, signals, length, prompt, gaps = table.transpose(2, 0, 1)                 # each [P, G]
    row = {"reward": reward.mean(), "reward_unknown": unknown.mean(), "groups_uniform": 1 - signals.any(axis=1).mean(),
           "groups_all_right": reward.all(axis=1).mean(), "truncated": cut.mean(), "response_tokens_mean": length.mean()}
    row |= {f"response_tokens_{q}": np.quantile(length, x) for q, x in (("p10", .1), ("p50", .5), ("p90", .9), ("max", 1))}
    row |= {"logp_gap_max": gaps.max(), **stats, "rollouts_per_second": length.size / seconds["rollout"]}
    row |= {f"seconds_{phase}": s for phase, s in seconds.items()}
    for phase, n in {"rollout": length, "verify": length, "reference": length + prompt, "update": length + prompt}.items():
        row[f"tokens_per_second_{phase}"] = n.sum() / seconds[phase]
    return {name: float(x) for name, x in row.items()}


def main(argv=None):
    args = config(argv)
    dist, out = common.init_distributed(), Path(args.out)
    say = print if dist.rank == 0 else lambda *a, **k: None
    if args.prompts_per_step < dist.world:
        common.die(f"--prompts-per-step {args.prompts_per_step} cannot be shared by {dist.world} ranks")
    if dist.rank == 0:
        common.start_output(out / "rollouts.jsonl", "rollouts", args, [args.problems], MAY_DIFFER)
    if (out / "final" / "config.json").exists():
        return say(f"{out / 'final'} is there: nothing to do")

    tokenizer = load_tokenizer(args.model)
    problems = usable_problems(args.problems, tokenizer, args, args.prompts_per_step, say)
    eval_problems = usable_problems(args.eval_problems, tokenizer, args, dist.world, say) if args.eval_every else []
    answers = {problem["pid"]: problem["answer"] for problem in eval_problems + problems}
    n_steps = len(problems) // args.prompts_per_step * args.epochs
    n_steps = min(n_steps, args.max_steps or n_steps)
    longest = max(len(problem["prompt_ids"]) for problem in problems + eval_problems) + args.max_response_tokens
    check_positions(load_config(args.model), longest, "the longest prompt with --max-response-tokens")
    plan_packs([longest], args.token_budget)          # dies if it does not fit

    checkpoint = latest_checkpoint(out)
    model = load_model(checkpoint or args.model, device=dist.device, trainable=True)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    policy = distribute(Policy(model, args), dist, args.shard)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True)
    done = load_state(checkpoint, model, optimizer)["step"] if checkpoint else 0
    reference = load_model(args.model, device=dist.device) if args.kl_coef else None
    engine = engines.make_engine(args.engine, checkpoint or args.model, longest, device=dist.device,
                                 gpu_memory=args.gpu_memory, sleep=args.sleep)
    engine.sync(model)
    save = lambda: save_checkpoint(out, f"step-{done:06d}", model, tokenizer, optimizer, args.keep, dist, step=done)
    if dist.rank == 0:
        metrics = common.Metrics(out, done, args, args.wandb, args.tensorboard)
        rollout_log = common.step_log(out / "rollouts.jsonl", done)
    say(f"{args.prompts_per_step} problems x {args.rollouts} rollouts a step, {n_steps} steps on {dist.world} x {dist.device}"
        + (f"; going on after step {done} ({checkpoint})" if checkpoint else ""), flush=True)

    interrupts = Interrupts()
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, interrupts)
    try:
        for step in range(done + 1, n_steps + 1):
            began, seconds = time.perf_counter(), {}
            chosen = [problems[i] for i in prompts_of_step(len(problems), args.prompts_per_step, args.seed, step)]
            chosen = chosen[dist.rank::dist.world]
            with timed(seconds, "rollout"), tqdm(total=len(chosen) * args.rollouts, desc=f"step {step}", unit=" rollouts",
                                                 leave=False, disable=True if dist.rank else None) as bar:
                rollouts = draw_rollouts(engine, tokenizer, chosen, step, args, bar)
            engine.sleep()
            with ThreadPoolExecutor(1) as pool:              # the verifier's processes work while the reference scores
                rewards = pool.submit(timed(seconds, "verify")(give_rewards), rollouts, answers, args)
                with timed(seconds, "reference"):
                    if reference:
                        reference_logprobs(reference, rollouts, args, dist.device)
                rewards.result()
            give_advantages(rollouts, args)
            with timed(seconds, "update"):
                give_weights(rollouts, args, dist.device)
                stats = update(policy, optimizer, rollouts, step, args, dist, interrupts)
            with timed(seconds, "sync"):
                engine.sync(model)
                stats |= check_sync(engine, policy, rollouts, step, args, dist)
            done = step
            if args.eval_every and step % args.eval_every == 0:
                with timed(seconds, "eval"):
                    stats["eval_pass1"] = evaluate(engine, tokenizer, eval_problems, answers, args, dist)

            row = {"step": step, "epoch": step * args.prompts_per_step / len(problems), "lr": args.lr,
                   **summary(rollouts, stats, seconds, args, dist), "seconds": time.perf_counter() - began}
            if dist.rank == 0:
                metrics.log(row)
                for r in rollouts[:args.log_rollouts]:
                    rollout_log.write({"step": step, "pid": r.pid, "g": r.g, "response": r.response, "n_tokens": len(r.ids),
                                       "finish": r.finish, "reward": r.reward, "correct": r.correct, "status": r.status,
                                       "advantage": r.advantage, "logp_gap": float(r.gap().mean())})
            say(f"step {step}/{n_steps} reward {row['reward']:.3f} no-signal {row['groups_uniform']:.2f} cut {row['truncated']:.2f} "
                f"tokens {row['response_tokens_mean']:.0f} entropy {row['entropy']:.3f} kl {row['kl']:.4f} "
                f"gnorm {row['grad_norm']:.2f} gap {row['sync_gap_mean']:.0e} "
                + (f"pass@1 {row['eval_pass1']:.3f} " if "eval_pass1" in row else "")
                + f"{row['seconds']:.1f} s ({' '.join(f'{phase} {s:.1f}' for phase, s in seconds.items())})", flush=True)
            if step % args.save_every == 0 and step < n_steps:
                save()
            interrupts.release()
    except KeyboardInterrupt:
        interrupts.held = True
        save()
        say(f"stopped; step {done} is saved in {out}, the same command goes on from there")
        raise SystemExit(130)
    save_checkpoint(out, "final", model, tokenizer, dist=dist)
    say(f"done: {out / 'final'} after {n_steps} steps")


if __name__ == "__main__":
    main()
