"""Stage 4: reinforcement learning with verifiable rewards (GRPO), from a checkpoint to a
checkpoint.

One step, in the order of `main`:

    problems     P of them, a pure function of (seed, step)
    rollouts     G responses to each, and the log-prob of every token when it was sampled
    ref_logps    the same tokens under the starting model, for the KL term; meanwhile
    rewards      1 if the text after </think> verifies, else 0
    advantages   each reward against those of its group
    weights      the loss weight of each token of a rollout
    gradient     of policy_loss over packed micro-batches; AdamW
    sync         the weights go into the engine, then engine and trainer score the same tokens

With one update per batch the policy that is trained is the one that sampled: its ratio is exp(0) =
1, and no separate forward pass of an "old" policy is needed. With more, the forward pass of the
first update gives the old log-probs.

Deliberate simplifications
- Rollouts are sampled with top-p 1: with less, the engine's distribution is not the trainer's and
  every ratio is biased.
- Policy, old policy and reference are taken at the sampling temperature, softmax(logits / T): the
  distribution that the rollouts were sampled from (A32).
- Prompts are split over the ranks, each with its own engine; all rollouts of a prompt stay on one
  rank, and denominators are counted over all ranks.
- Short rollouts of a problem share a pack, which encodes their prompt once: the results are those
  of encoding it per rollout.
- Steps are synchronous: no rollout is older than the weights it trains. Constant learning rate, no
  reward shaping.

One process (a CPU or one GPU), then one process per GPU:

    python 04_rlvr.py --model RUN/sft --problems rlvr.jsonl --out RUN/rlvr
    torchrun --nproc_per_node 8 -- 04_rlvr.py --recipe recipes/paper_1.5b.toml --model RUN/sft \\
        --problems rlvr.jsonl --out RUN/rlvr

Writes OUT/final (the model), OUT/step-* (checkpoints), OUT/metrics.jsonl (docs/METRICS.md) and
OUT/rollouts.jsonl (a sample of each step). Run it again to resume from the newest checkpoint, bit
for bit on a CPU. Ctrl-C discards rollouts in progress, finishes an update in progress, saves and
exits. Time: docs/LOG.md (toy), `run_all.sh --plan` (the node).
"""

import common  # first: installs signal handlers, so that Ctrl-C is one line, no traceback

import contextlib
import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import engines
from grading import verifier
from model import (
    TokenLogprobs, add_dtype_flag, add_instruction_flag, check_instruction, check_model_dir,
    check_positions, clip_gradient, compile_layers, decode_response, distribute, gradient_sync,
    latest_checkpoint, load_config, load_model, load_state, load_tokenizer, model_dir,
    pack_sequences, plan_packs, render_prompt, save_checkpoint, settle_dtype, sweep, token_logprobs)

# The check after a weight sync: number of prefixes, and new tokens for each.
CHECK_ROLLOUTS = 4
CHECK_TOKENS = 8

# Clamps of the KL estimate, as verl has them (A33): of d before exp, and of the estimate itself.
KL_D_MAX = 20.0
KL_MAX = 10.0

# Flags that may differ when a run is continued: they do not change its weights.
MAY_DIFFER = ("gpu_memory", "sleep", "epochs", "max_steps", "save_every", "keep", "eval_every",
              "eval_problems", "log_rollouts", "verify_workers", "max_logp_gap", "wandb",
              "tensorboard")

# ------------------------------------------------------------------------------------ configuration


def parse_args(argv=None):
    parser = common.make_parser(__doc__)
    add = parser.add_argument
    add("--model", required=True,
        help="checkpoint to start from; also the reference of the KL term")
    add("--problems", required=True,
        help="problems (JSONL: pid, problem, answer)")
    add("--out", required=True,
        help="directory of this run")
    common.add_force_flag(add)
    add_instruction_flag(add)
    add("--engine", default="auto", choices=["auto", "hf", "vllm"],
        help="what draws the rollouts (auto: vLLM on a GPU)")
    add("--gpu-memory", type=float, default=0.3,
        help="share of a GPU's memory for vLLM")
    add("--sleep", action="store_true",
        help="vLLM gives its memory to the trainer while no rollouts are drawn (7B)")
    add("--prompts-per-step", type=int, default=64,
        help="problems per step, over all GPUs")
    add("--rollouts", type=int, default=8,
        help="responses per problem: the group")
    add("--epochs", type=int, default=20,
        help="passes over the problems")
    add("--max-steps", type=int, default=0,
        help="end of the run in steps, if earlier than --epochs (0: no such end)")
    add("--temperature", type=float, default=0.85,
        help="sampling temperature, and that of every log-prob here")
    add("--max-prompt-tokens", type=int, default=1536,
        help="longer prompts are dropped and counted")
    add("--max-response-tokens", type=int, default=18432,
        help="a response is cut here (paper: 16384 for 7B)")
    add("--overlong", default="keep", choices=["keep", "mask"],
        help="a cut response is graded like any other, or leaves the loss")
    add("--advantage", default="grpo", choices=["grpo", "dr_grpo"],
        help="formulas: group_advantages")
    add("--normalize", default="token", choices=["token", "sequence"],
        help="formulas: token_weights")
    add("--clip-low", type=float, default=0.2,
        help="the ratio is clipped below at 1 - this")
    add("--clip-high", type=float, default=0.2,
        help="the ratio is clipped above at 1 + this")
    add("--dual-clip", type=float, default=3.0,
        help="bound of the ratio where the advantage is negative (0: none)")
    add("--kl-coef", type=float, default=0.001,
        help="weight of the KL term (0: no reference model is loaded)")
    add("--tis-cap", type=float, default=0.0,
        help="cap of the importance weights p(trainer) / p(engine) (0: not used)")
    add("--updates-per-batch", type=int, default=1,
        help="optimizer steps on each batch of rollouts")
    add("--lr", type=float, default=2e-6,
        help="AdamW's learning rate, constant")
    add("--weight-decay", type=float, default=0.01,
        help="AdamW's weight decay, on every parameter")
    add("--grad-clip", type=float, default=1.0,
        help="clips the gradient norm to this (0: no limit)")
    add("--token-budget", type=int, default=32768,
        help="tokens in a micro-batch on one GPU, prompts included")
    add("--gradient-checkpointing", action="store_true",
        help="recompute activations in backward (long sequences)")
    add("--compile", action="store_true",
        help="torch.compile each decoder layer; never tried on a GPU")
    add("--shard", action="store_true",
        help="fully_shard instead of DDP: for what one GPU cannot hold (7B)")
    add("--max-logp-gap", type=float, default=0.0,
        help="mean gap to the engine that stops the run; 0: see refuse_gap")
    add_dtype_flag(add)
    add("--seed", type=int, default=42,
        help="of the order of prompts and of sampling")
    add("--save-every", type=int, default=20,
        help="steps between checkpoints")
    add("--keep", type=int, default=2,
        help="checkpoints kept")
    add("--log-rollouts", type=int, default=8,
        help="rollouts of each step that go to rollouts.jsonl")
    add("--eval-every", type=int, default=0,
        help="steps between small Pass@1 evaluations (0: none)")
    add("--eval-problems", default="",
        help="their problems (JSONL); --rollouts samples per problem")
    add("--verify-workers", type=int, default=2,
        help="verifying processes of each rank")
    add("--wandb", action="store_true",
        help="log to Weights & Biases too")
    add("--tensorboard", action="store_true",
        help="log to TensorBoard too")
    args = common.parse_args(parser, "rlvr", argv)
    common.require_loggers(args)
    common.check_range(args, ["gpu_memory"], prompts_per_step=1, rollouts=1, epochs=1,
                       max_prompt_tokens=1, max_response_tokens=1, token_budget=1,
                       updates_per_batch=1, save_every=1, keep=1, max_steps=0, clip_low=0,
                       clip_high=0, kl_coef=0, tis_cap=0, lr=0, weight_decay=0, grad_clip=0,
                       max_logp_gap=0, log_rollouts=0, eval_every=0, verify_workers=1)
    if not args.temperature > 0:
        common.die(f"--temperature must be above 0, got {args.temperature}")
    if args.dual_clip and not args.dual_clip > 1:
        common.die(f"--dual-clip must be above 1, or 0 for none, got {args.dual_clip}")
    if args.eval_every and not args.eval_problems:
        common.die("--eval-every needs --eval-problems")
    return args


# ----------------------------------------------------------------------------------------- problems


def usable_problems(path, tokenizer, args, at_least: int, say) -> list[dict]:
    """Problems whose prompt fits and whose gold answer can be graded against; the rest is counted.

    A gold that cannot be parsed (another answer than itself is then unknown, not wrong), or that
    does not verify as its own response, would make the problem a silent zero.
    """
    rows = {}
    for row in common.read_jsonl(path, {"pid": str, "problem": str, "answer": (str, list)}):
        if row["pid"] in rows:
            common.die(f"{path}: pid {row['pid']} occurs twice; every problem needs its own")
        prompt_ids = render_prompt(tokenizer, row["problem"], args.instruction)
        rows[row["pid"]] = {**row, "prompt_ids": prompt_ids}
    fitting = [row for row in rows.values() if len(row["prompt_ids"]) <= args.max_prompt_tokens]
    kept = [row for row, usable in zip(fitting, usable_golds(fitting, args)) if usable]
    say(f"{path}: {len(rows)} problems, {len(rows) - len(fitting)} dropped with a prompt over "
        f"{args.max_prompt_tokens} tokens, {len(fitting) - len(kept)} dropped with a gold answer "
        f"that cannot be parsed; {len(kept)} are used")
    if len(kept) < at_least:
        common.die(f"{path}: {len(kept)} usable problems, at least {at_least} are needed")
    return kept


def usable_golds(problems, args) -> list[bool]:
    """Can each gold be judged by, and is it right as its own response? (A34)"""
    unreadable = verifier.unreadable_golds([row["answer"] for row in problems],
                                           args.verify_workers)
    itself = []
    for row in problems:
        gold = row["answer"] if isinstance(row["answer"], str) else row["answer"][0]
        itself.append((f"</think>\\boxed{{{gold}}}", row["answer"]))
    verdicts = verifier.verify_many(itself, workers=args.verify_workers)
    return [verdict.correct is True and row["answer"] not in unreadable
            for row, verdict in zip(problems, verdicts)]


def answers_by_pid(problems) -> dict:
    """pid -> gold answer, of the training and the evaluation problems."""
    answers = {}
    for problem in problems:
        pid, answer = problem["pid"], problem["answer"]
        if answers.setdefault(pid, answer) != answer:
            common.die(f"pid {pid} is one problem in --problems and another in --eval-problems, "
                       "with another answer")
    return answers


def refuse_other_length(out, args):
    """A finished run is not made longer by other --max-steps or --epochs: say how it can be."""
    meta = common.read_meta(out / "rollouts.jsonl")
    if args.force or meta is None or not common.is_finished(out):
        return
    for name in ("max_steps", "epochs"):
        old, new = meta.get("args", {}).get(name), getattr(args, name)
        if str(old) != str(new):
            common.die(f"{out / 'final'} is the end of a run with {name} = {old}, not {new}: "
                       "remove that directory to train on from the newest checkpoint, or choose "
                       "another --out")


# ----------------------------------------------------------------------------------------- rollouts


@dataclass
class Rollout:
    """One response, as the engine drew it."""
    pid: str
    g: int                                  # place in its group
    prompt_ids: list[int]
    ids: list[int]                          # [L], a stop token included
    finish: str                             # "stop" | "length"
    logp_engine: torch.Tensor               # [L] when drawn
    response: str


def sample_rollouts(engine, tokenizer, problems, step, args, progress=None, stop=None):
    """G rollouts of each problem, in order; None if `stop` ended the drawing early.

    The sampling seed of a rollout is a function of (seed, step, pid, g) alone.
    """
    prompts, seeds, place = [], [], []
    for problem in problems:
        for g in range(args.rollouts):
            place.append((problem["pid"], g))
            prompts.append(problem["prompt_ids"])
            seeds.append(common.request_seed(args.seed, step, problem["pid"], g))

    rollouts = [None] * len(prompts)
    drawn = engine.generate(prompts, seeds, args.temperature, 1.0, args.max_response_tokens,
                            progress=progress, stop=stop)
    for i, completion in drawn:
        pid, g = place[i]
        rollouts[i] = Rollout(pid=pid,
                              g=g,
                              prompt_ids=prompts[i],
                              ids=list(completion.ids),
                              finish=completion.finish,
                              logp_engine=torch.tensor(completion.logp),
                              response=decode_response(tokenizer, completion.ids))
    is_whole = all(rollout is not None for rollout in rollouts)
    return rollouts if is_whole else None


def grade(rollouts, answers: dict, args) -> list:
    """The verifier's Verdict on each rollout: correct is True, False or None (could not be
    judged)."""
    pairs = [(r.response, answers[r.pid]) for r in rollouts]
    return verifier.verify_many(pairs, workers=args.verify_workers)


def rewards_of(verdicts) -> torch.Tensor:
    """[R] 1 if right, else 0. An unknown verdict has reward 0 too, and is counted apart (A35)."""
    return torch.tensor([float(verdict.correct is True) for verdict in verdicts])


def group_advantages(rewards: torch.Tensor, group: int, formula: str = "grpo") -> torch.Tensor:
    """rewards [R], in groups of G = `group` neighbours -> advantages [R].

    grpo     (r - mean) / (std + 1e-6), std with Bessel's correction
             Shao et al. 2024 (DeepSeekMath), arXiv 2402.03300; PAPER.md, "RLVR"
    dr_grpo  r - mean: problems with nearly uniform rewards are not weighted up
             Liu et al. 2025, arXiv 2503.20783

    A group of one has nothing to compare with: mean 0, std 1. A uniform group has advantage 0.
    """
    r = rewards.double().view(-1, group)                                        # [P, G]
    if group == 1:
        mean, std = torch.zeros_like(r), torch.ones_like(r)
    else:
        mean = r.mean(dim=1, keepdim=True)
        std = r.std(dim=1, keepdim=True)
    advantages = r - mean
    if formula == "grpo":
        advantages = advantages / (std + 1e-6)
    return advantages.flatten().float()


def token_weights(rollouts, args, device) -> torch.Tensor:
    """[R] loss weight of each token of a rollout: the loss is the sum over tokens of weight x
    token loss.

    token     1 / tokens of the batch
              Yu et al. 2025 (DAPO), arXiv 2503.14476; PAPER.md, "RLVR" (A39)
    sequence  1 / (rollouts of the batch x tokens of this one)
              Shao et al. 2024, arXiv 2402.03300

    Counts are over the global batch, so ranks and micro-batches do not change the loss. What is out
    of the loss (cut rollouts with --overlong mask, A37) has weight 0 and is in no count.
    """
    is_live = torch.tensor([args.overlong == "keep" or r.finish == "stop" for r in rollouts])
    n_tokens = torch.tensor([len(r.ids) for r in rollouts])
    counts = {"rollouts": is_live.sum().to(device), "tokens": (is_live * n_tokens).sum().to(device)}
    whole = common.sum_over_ranks(counts)
    if args.normalize == "token":
        weights = torch.full([len(rollouts)], 1 / max(whole["tokens"], 1))
    else:
        weights = 1 / (max(whole["rollouts"], 1) * n_tokens)
    return weights * is_live


# ------------------------------------------------------------------------------------------- packs


def plan_rollouts(rollouts, chosen, args) -> list[list[int]]:
    """Micro-batches of the `chosen` indices into `rollouts`: at most --token-budget tokens each,
    prompts included.

    Short rollouts of one problem stay together, up to half of the budget: a pack encodes their
    prompt once.
    """
    if not chosen:
        return []
    bundles, sizes = [], []
    for i in chosen:
        r = rollouts[i]
        size = len(r.prompt_ids) + len(r.ids)
        is_sibling = bool(bundles) and rollouts[bundles[-1][0]].pid == r.pid
        if is_sibling and sizes[-1] + size <= args.token_budget // 2:
            bundles[-1].append(i)
            sizes[-1] += size
        else:
            bundles.append([i])
            sizes.append(size)
    packs = []
    for indices in plan_packs(sizes, args.token_budget)[0]:
        places = []
        for b in indices:
            places += bundles[b]
        packs.append(places)
    return packs


def pack_rollouts(members, device):
    """A Pack that scores the response tokens of `members`, in order."""
    sequences = [(r.prompt_ids + r.ids, len(r.prompt_ids)) for r in members]
    return pack_sequences(sequences, device, share=True)


@torch.no_grad()
def score(reference, rollouts, args, device) -> list[torch.Tensor]:
    """[L] of each rollout: its tokens under the starting model, at the sampling temperature."""
    logps = [None] * len(rollouts)
    for places in plan_rollouts(rollouts, range(len(rollouts)), args):
        members = [rollouts[i] for i in places]
        logp, _ = token_logprobs(reference, pack_rollouts(members, device), args.temperature,
                                 bf16=args.dtype == "bfloat16")
        for i, part in zip(places, logp.split([len(r.ids) for r in members])):
            logps[i] = part
    return logps


@dataclass
class PackTokens:
    """What the loss takes beside logp for each scored token of a pack, all [N] in its order."""
    advantage: torch.Tensor
    weight: torch.Tensor                    # 0: not in the loss
    logp_engine: torch.Tensor               # when drawn
    logp_ref: torch.Tensor | None           # under the starting model
    logp_old: torch.Tensor | None           # under the policy that sampled; None: it is this policy


def tokens_of(places, rollouts, advantages, weights, ref_logps, old_logps, device) -> PackTokens:
    """Lay the numbers of the rollouts at `places` out over their tokens."""
    lengths = torch.tensor([len(rollouts[i].ids) for i in places])

    def joined(logps):
        if logps is None or logps[places[0]] is None:       # an idle rank's dummy has none
            return None
        return torch.cat([logps[i] for i in places]).to(device)

    return PackTokens(advantage=advantages[places].repeat_interleave(lengths).to(device),
                      weight=weights[places].repeat_interleave(lengths).to(device),
                      logp_engine=joined([r.logp_engine for r in rollouts]),
                      logp_ref=joined(ref_logps),
                      logp_old=joined(old_logps))


# ------------------------------------------------------------------------------- loss and gradient


def policy_loss(logp: torch.Tensor, tokens: PackTokens, args) -> tuple[torch.Tensor, dict]:
    """Sum over tokens of weight x (clipped policy gradient + kl_coef x KL); only `logp` has a
    gradient.

    ratio  exp(logp - logp_old); value 1 where the policy is the one that sampled
    clip   max(-A ratio, -A clip(ratio, 1 - low, 1 + high))
           Schulman et al. 2017 (PPO), arXiv 1707.06347
    dual   for A < 0 at most -A dual_clip
           Ye et al. 2019, arXiv 1912.09729
    TIS    x min(exp(logp_old - logp_engine), tis_cap)
           Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training"
    KL     k3: exp(d) - d - 1, d = logp_ref - logp, clamped
           Schulman 2020, "Approximating KL divergence"

    Returns the loss, and by name sums over the tokens that are in it (docs/METRICS.md).
    """
    A, weight = tokens.advantage, tokens.weight
    logp_old = logp.detach() if tokens.logp_old is None else tokens.logp_old
    logp_ref = logp.detach() if tokens.logp_ref is None else tokens.logp_ref

    ratio = torch.exp(logp - logp_old)                                          # [N]
    plain = -A * ratio
    clipped = -A * ratio.clamp(1 - args.clip_low, 1 + args.clip_high)
    bound = torch.where(A < 0, -A * (args.dual_clip or math.inf), math.inf)
    pg = torch.maximum(plain, clipped).minimum(bound)                           # [N]

    tis = torch.ones_like(pg)
    if args.tis_cap:
        tis = torch.exp(logp_old - tokens.logp_engine).clamp(max=args.tis_cap)

    d = (logp_ref - logp).clamp(-KL_D_MAX, KL_D_MAX)
    kl = (torch.exp(d) - d - 1).clamp(max=KL_MAX)                               # [N]

    loss = (weight * (tis * pg + args.kl_coef * kl)).sum()

    is_live = weight > 0
    is_clipped = (plain < clipped) & is_live
    sums = {"loss": loss,
            "pg_loss": (weight * tis * pg).sum(),
            "tokens": is_live.sum(),
            "kl": (kl * is_live).sum(),
            "clip_low": (is_clipped & (A < 0)).sum(),
            "clip_high": (is_clipped & (A >= 0)).sum(),
            "dual_clip": ((plain > bound) & is_live).sum(),
            "tis_weight": (tis * is_live).sum(),
            "logp_gap": ((logp_old - tokens.logp_engine).abs() * is_live).sum()}
    return loss, {name: x.detach() for name, x in sums.items()}


def accumulate_gradient(policy, rollouts, advantages, weights, ref_logps, old_logps, args, dist):
    """Leaves the gradient of the batch's loss on every rank.

    Returns (stats over all ranks by name: losses, and means over tokens; logps: [L] of each rollout
    under the policy, None where it is not in the loss).

    Every rank makes the same number of passes, and gradients are exchanged in the last one only. A
    rank with fewer packs runs its first rollout at weight 0 instead: it adds exactly nothing, and
    every rank joins every collective.
    """
    live = [i for i in range(len(rollouts)) if weights[i] > 0]
    packs = plan_rollouts(rollouts, live, args)
    n_packs = torch.tensor(max(len(packs), 1), device=dist.device)
    n_passes = int(common.all_reduce_max(n_packs))

    sums = {}
    logps = [None] * len(rollouts)
    for k in range(n_passes):
        is_last = k == n_passes - 1
        is_idle = k >= len(packs)
        places = [0] if is_idle else packs[k]

        members = [rollouts[i] for i in places]
        pack = pack_rollouts(members, dist.device)
        tokens = tokens_of(places, rollouts, advantages, weights, ref_logps, old_logps, dist.device)
        if is_idle:
            tokens.weight = torch.zeros_like(tokens.weight)

        with gradient_sync(policy, is_last):
            logp, entropy = policy(pack)                                        # [N], [N]
            loss, parts = policy_loss(logp, tokens, args)
            # the wrappers average over ranks, the loss is a sum over all of them
            (loss * dist.world).backward()

        parts["entropy"] = (entropy * (tokens.weight > 0)).sum()
        for name, part in parts.items():
            sums[name] = sums.get(name, 0.0) + part.double()
        if not is_idle:
            for i, part in zip(places, logp.detach().split([len(r.ids) for r in members])):
                logps[i] = part

    stats = common.sum_over_ranks(sums)
    n_tokens = max(stats.pop("tokens"), 1)
    for name in stats:
        if name not in ("loss", "pg_loss"):
            stats[name] /= n_tokens
    return stats, logps


def refuse_gap(gap: float, args, dist, where: str):
    """Stop if the mean |log p(trainer) - log p(engine)| is over --max-logp-gap.

    0: the limit is 1e-4, or 0.05 where both sides compute in bf16, as always on a GPU (A43).
    """
    limit = args.max_logp_gap or (0.05 if args.dtype == "bfloat16" else 1e-4)
    if not gap <= limit:
        common.die(f"{where}: mean |log p(trainer) - log p(engine)| is {gap:.2g}, over the limit "
                   f"(--max-logp-gap) of {limit:g}: the engine draws from other weights, or from "
                   "another distribution, than the trainer trains")


@torch.no_grad()
def check_sync(engine, policy, rollouts, step: int, args, dist) -> dict:
    """Engine and trainer score the same tokens: a few rollouts, cut in half, continued by the
    engine.

    These prefixes were cached under the old weights, so a prefix cache that outlived the sync
    shows as a gap too.
    """
    prefixes, seeds, n_new = [], [], CHECK_TOKENS
    for r in rollouts[:CHECK_ROLLOUTS]:
        half = len(r.ids) // 2
        prefixes.append(r.prompt_ids + r.ids[:half])
        seeds.append(common.request_seed(args.seed, "check", step, r.pid, r.g))
        n_new = min(n_new, args.max_response_tokens - half)
    drawn = dict(engine.generate(prefixes, seeds, args.temperature, 1.0, n_new))

    sequences, logp_engine = [], []
    for i, prefix in enumerate(prefixes):
        sequences.append((prefix + list(drawn[i].ids), len(prefix)))
        logp_engine += list(drawn[i].logp)
    logp, _ = policy(pack_sequences(sequences, dist.device))
    gap = (logp - torch.tensor(logp_engine, device=dist.device)).abs()

    sums = common.sum_over_ranks({"gap": gap.sum(), "tokens": torch.ones_like(gap).sum()})
    mean = sums["gap"] / sums["tokens"]
    refuse_gap(mean, args, dist, f"step {step}, after the weight sync")
    return {"sync_gap_mean": mean, "sync_gap_max": float(common.all_reduce_max(gap.max()))}


# --------------------------------------------------------------------------------------------- logs


def evaluate(engine, tokenizer, problems, answers, args, dist, stop=None) -> float | None:
    """A small Pass@1: mean reward of --rollouts samples per problem, always with the same seeds.

    None if `stop` ended the drawing early on some rank.
    """
    mine = problems[dist.rank::dist.world]
    rollouts = sample_rollouts(engine, tokenizer, mine, "eval", args, stop=stop)
    is_whole = rollouts is not None
    rewards = rewards_of(grade(rollouts, answers, args)) if is_whole else torch.zeros(1)
    counts = torch.tensor([rewards.sum(), len(rewards), not is_whole], dtype=torch.float64)
    reward, n, n_cut = common.all_reduce_sum(counts.to(dist.device)).tolist()
    return None if n_cut else reward / n


@contextlib.contextmanager
def timed(seconds: dict, phase: str):
    start = time.perf_counter()
    yield
    seconds[phase] = time.perf_counter() - start


def logp_gaps(rollouts, logps) -> list[torch.Tensor]:
    """|log p(trainer) - log p(engine)| [L] of each rollout, zeros where it is not in the loss."""
    gaps = []
    for r, logp in zip(rollouts, logps):
        trainer = r.logp_engine if logp is None else logp.cpu()
        gaps.append((r.logp_engine - trainer).abs())
    return gaps


def over_ranks(values, args, dist) -> np.ndarray:
    """A number of each rollout of this rank -> [P, G], those of all ranks."""
    table = torch.zeros(args.prompts_per_step, args.rollouts, dtype=torch.float64)
    mine = torch.as_tensor(values, dtype=torch.float64)
    table[dist.rank::dist.world] = mine.view(-1, args.rollouts)
    return common.all_reduce_sum(table.to(dist.device)).cpu().numpy()


def summary(rollouts, rewards, verdicts, advantages, gaps, seconds, args, dist) -> dict:
    """Numbers about the rollouts of all ranks and the speed of each phase, for metrics.jsonl."""
    reward = over_ranks(rewards, args, dist)                                    # each [P, G]
    unknown = over_ranks([verdict.correct is None for verdict in verdicts], args, dist)
    has_signal = over_ranks(advantages != 0, args, dist)
    cut = over_ranks([r.finish == "length" for r in rollouts], args, dist)
    length = over_ranks([len(r.ids) for r in rollouts], args, dist)
    prompt = over_ranks([len(r.prompt_ids) for r in rollouts], args, dist)
    gap = over_ranks([float(gap.max()) for gap in gaps], args, dist)
    updated = (length + prompt).sum() * args.updates_per_batch
    row = {"reward": reward.mean(),
           "reward_unknown": unknown.mean(),
           "groups_uniform": 1 - has_signal.any(axis=1).mean(),
           "groups_all_right": reward.all(axis=1).mean(),
           "truncated": cut.mean(),
           "response_tokens_mean": length.mean(),
           "response_tokens_p10": np.quantile(length, 0.1),
           "response_tokens_p50": np.quantile(length, 0.5),
           "response_tokens_p90": np.quantile(length, 0.9),
           "response_tokens_max": length.max(),
           "logp_gap_max": gap.max(),
           "rollouts_per_second": length.size / seconds["rollout"],
           "tokens_per_second_rollout": length.sum() / seconds["rollout"],
           "tokens_per_second_verify": length.sum() / seconds["verify"],
           "tokens_per_second_update": updated / seconds["update"]}
    if args.kl_coef:
        row["tokens_per_second_reference"] = (length + prompt).sum() / seconds["reference"]
    for phase, duration in seconds.items():
        row[f"seconds_{phase}"] = duration
    return {name: float(x) for name, x in row.items()}


def step_line(row: dict, n_steps: int, seconds: dict) -> str:
    """One step on one line, for the terminal."""
    words = [f"step {row['step']}/{n_steps}",
             f"reward {row['reward']:.3f}",
             f"no-signal {row['groups_uniform']:.2f}",
             f"cut {row['truncated']:.2f}",
             f"tokens {row['response_tokens_mean']:.0f}",
             f"entropy {row['entropy']:.3f}",
             f"kl {row['kl']:.4f}",
             f"gnorm {row['grad_norm']:.2f}",
             f"gap {row['sync_gap_mean']:.0e}"]
    if "eval_pass1" in row:
        words.append(f"pass@1 {row['eval_pass1']:.3f}")
    phases = " ".join(f"{phase} {duration:.1f}" for phase, duration in seconds.items())
    words.append(f"{row['seconds']:.1f} s ({phases})")
    return " ".join(words)


def rollout_rows(step, rollouts, rewards, verdicts, advantages, gaps):
    """Rows of rollouts.jsonl."""
    for r, reward, verdict, advantage, gap in zip(rollouts, rewards, verdicts, advantages, gaps):
        yield {"step": step,
               "pid": r.pid,
               "g": r.g,
               "response": r.response,
               "n_tokens": len(r.ids),
               "finish": r.finish,
               "reward": float(reward),
               "correct": verdict.correct,
               "status": verdict.status,
               "advantage": float(advantage),
               "logp_gap": float(gap.mean())}


# ----------------------------------------------------------------------------------------- training


def main(argv=None):
    args = parse_args(argv)
    dist = common.init_distributed()
    settle_dtype(args, dist.device)
    engines.settle_engine(args)
    out = Path(args.out)
    say = common.printer(dist)
    if args.prompts_per_step < dist.world:
        common.die(f"--prompts-per-step {args.prompts_per_step} cannot be shared by {dist.world} "
                   "ranks")
    if dist.rank == 0:
        refuse_other_length(out, args)
        inputs = [args.problems, model_dir(args.model)]
        common.start_output(out / "rollouts.jsonl", "rollouts", args, inputs, MAY_DIFFER, run=out)
        sweep(out)
    common.barrier()                                   # --force may have removed a finished run
    if common.is_finished(out):
        return say(f"{out / 'final'} is there: nothing to do")

    # the problems, and what they need
    check_model_dir(args.model)
    tokenizer = load_tokenizer(args.model)
    check_instruction(args.model, args.instruction)
    problems = usable_problems(args.problems, tokenizer, args, args.prompts_per_step, say)
    eval_problems = []
    if args.eval_every:
        eval_problems = usable_problems(args.eval_problems, tokenizer, args, dist.world, say)
    answers = answers_by_pid(problems + eval_problems)
    n_steps = len(problems) // args.prompts_per_step * args.epochs
    if args.max_steps:
        n_steps = min(n_steps, args.max_steps)
    longest_prompt = max(len(problem["prompt_ids"]) for problem in problems + eval_problems)
    longest = longest_prompt + args.max_response_tokens
    check_positions(load_config(args.model), longest,
                    "the longest prompt with --max-response-tokens")
    plan_packs([longest], args.token_budget)              # dies if it does not fit

    # the policy, its optimizer, the reference, and the engine that samples
    checkpoint = latest_checkpoint(out)
    model = load_model(checkpoint or args.model, device=dist.device, trainable=True)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if args.compile:
        compile_layers(model)
    # log-probs at the sampling temperature: the distribution that acted (A32)
    policy = distribute(TokenLogprobs(model, args.temperature, args.dtype == "bfloat16"),
                        dist, args.shard)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay,
                                  fused=True)             # betas (0.9, 0.999) (A40)
    done = load_state(checkpoint, model, optimizer)["step"] if checkpoint else 0
    if done > n_steps:
        common.die(f"{checkpoint} is of a longer run than the {n_steps} steps asked for; choose "
                   "another --out")
    reference = load_model(args.model, device=dist.device) if args.kl_coef else None
    engine = engines.make_engine(args.engine, checkpoint or args.model, longest, device=dist.device,
                                 dtype=args.dtype, gpu_memory=args.gpu_memory, sleep=args.sleep)
    engine.sync(model)

    say(f"{args.prompts_per_step} problems x {args.rollouts} rollouts per step, {n_steps} steps "
        f"on {dist.world} x {dist.device}")
    if checkpoint:
        say(f"going on after step {done} ({checkpoint})")
    metrics = rollout_log = None
    if dist.rank == 0:
        metrics = common.Metrics(out, done, args, args.wandb, args.tensorboard)
        rollout_log = common.step_log(out / "rollouts.jsonl", done)

    def save():
        save_checkpoint(out, f"step-{done:06d}", model, tokenizer, optimizer, args.keep, dist,
                        args.instruction, step=done)

    stop = common.StopFlag()
    signal_number = 0
    for step in range(done + 1, n_steps + 1):
        # problems: the same P on every rank (whole batches of an epoch, A42), and its share
        began, seconds = time.perf_counter(), {}
        chosen = common.rows_of_step(len(problems), args.prompts_per_step, step, args.seed)
        mine = [problems[i] for i in chosen[dist.rank::dist.world]]

        # rollouts: ids, text, and the log-prob of each token when it was drawn
        bar = tqdm(total=len(mine) * args.rollouts, desc=f"step {step}", unit=" rollouts",
                   leave=False, disable=dist.rank > 0)
        with timed(seconds, "rollout"), bar:
            rollouts = sample_rollouts(engine, tokenizer, mine, step, args, bar, stop.is_set)
        signal_number = stop.on_any_rank(dist.device)
        if signal_number:
            break  # rollouts may be missing: the step never began
        engine.sleep()

        # rewards, in worker processes, while the reference scores the same tokens
        def graded():
            with timed(seconds, "verify"):
                return grade(rollouts, answers, args)

        with ThreadPoolExecutor(1) as pool:
            grading = pool.submit(graded)
            with timed(seconds, "reference"):
                ref_logps = score(reference, rollouts, args, dist.device) if args.kl_coef else None
            verdicts = grading.result()
        rewards = rewards_of(verdicts)
        advantages = group_advantages(rewards, args.rollouts, args.advantage)

        # update: one optimizer step on the whole batch, or --updates-per-batch of them (A41)
        with timed(seconds, "update"):
            weights = token_weights(rollouts, args, dist.device)
            old_logps, first_logps, history = None, None, []
            for update in range(args.updates_per_batch):
                stats, logps = accumulate_gradient(policy, rollouts, advantages, weights, ref_logps,
                                                   old_logps, args, dist)
                stats["grad_norm"] = clip_gradient(model, args.grad_clip)
                batch = [[r.pid, r.g, len(r.ids)] for r in rollouts]
                common.refuse_bad_step(out, step, stats, batch, dist)
                if update == 0:
                    # rollouts from other weights than these never enter an update
                    refuse_gap(stats["logp_gap"], args, dist, f"step {step}, on its rollouts")
                    first_logps = logps
                    old_logps = logps if args.updates_per_batch > 1 else None
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                history.append(stats)
            stats = common.mean_by_name(history)

        # sync: the new weights go into the engine, and both sides score the same tokens
        with timed(seconds, "sync"):
            engine.sync(model)
            stats |= check_sync(engine, policy, rollouts, step, args, dist)
        done = step

        if args.eval_every and step % args.eval_every == 0:
            with timed(seconds, "eval"):
                pass1 = evaluate(engine, tokenizer, eval_problems, answers, args, dist,
                                 stop.is_set)
            if pass1 is not None:
                stats["eval_pass1"] = pass1

        # the log
        gaps = logp_gaps(rollouts, first_logps)
        row = {"step": step,
               "epoch": step * args.prompts_per_step / len(problems),
               "lr": args.lr,
               **summary(rollouts, rewards, verdicts, advantages, gaps, seconds, args, dist),
               **stats,
               "seconds": time.perf_counter() - began}
        if dist.rank == 0:
            metrics.log(row)
            rows = list(rollout_rows(step, rollouts, rewards, verdicts, advantages, gaps))
            for rollout_row in rows[:args.log_rollouts]:
                rollout_log.write(rollout_row)
        say(step_line(row, n_steps, seconds))

        # checkpoints, and leaving together
        if step % args.save_every == 0 and step < n_steps:
            save()
        signal_number = stop.on_any_rank(dist.device)
        if signal_number:
            break

    if signal_number and done < n_steps:
        if done:
            save()
            say(f"stopped; step {done} is saved in {out}, the same command goes on from there")
        else:
            say("stopped before the first step was done; the same command starts again")
        raise SystemExit(128 + signal_number)
    save_checkpoint(out, "final", model, tokenizer, dist=dist, instruction=args.instruction)
    say(f"done: {out / 'final'} after {n_steps} steps")


if __name__ == "__main__":
    common.run(main)
