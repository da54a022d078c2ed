"""Stage 3: fine-tune on the selected responses. Promote the cross-entropy set, suppress the
unlikelihood set.

    loss = mean over CE sequences of (mean over tokens of -log p)
         + ul_weight * mean over UL sequences of (mean over tokens of -log(1 - p))

(PAPER.md, "Training"). The other arms are the case without unlikelihood rows. One optimizer step
sees `ce_per_step` + `ul_per_step` sequences, whatever the number of GPUs: packs, accumulation and
ranks only divide them. Every rank knows the whole step's batch (it is a function of seed and step),
so each token's loss weight is known before the first forward pass, and nothing is averaged per
micro-batch.

Deliberate simplifications
- Full fine-tuning only, no dropout, no evaluation in the loop (05 does that).
- The epoch is the cross-entropy set's, and the unlikelihood set is cycled beside it (A25).

One process (a CPU or one GPU), then one process per GPU:

    python 03_train_oxa.py --model BASE --data train.jsonl --out RUN
    torchrun --nproc_per_node 8 -- 03_train_oxa.py --recipe recipes/paper_1.5b.toml \\
        --model BASE --data train.jsonl --out RUN

Writes RUN/final (the model), RUN/step-* (checkpoints with optimizer state), RUN/metrics.jsonl and
its .meta.json. Run it again to resume from the newest checkpoint, bit for bit on a CPU; Ctrl-C
finishes the step, saves and exits. Time: docs/LOG.md (toy), `run_all.sh --plan` (the node).
"""

import common  # first: installs signal handlers, so that Ctrl-C is one line, no traceback

import math
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common import die
from model import (
    END_OF_TURN, TokenLogprobs, add_dtype_flag, add_instruction_flag, check_instruction,
    check_model_dir, clip_gradient, compile_layers, distribute, encode_response, gradient_sync,
    latest_checkpoint, load_config, load_model, load_state, load_tokenizer, model_dir,
    pack_sequences, plan_packs, render_prompt, save_checkpoint, settle_dtype, sweep)

# ------------------------------------------------------------------------------------ configuration

# Flags that may differ when a run is continued: they do not change its weights.
MAY_DIFFER = ("save_every", "keep", "peak_tflops", "wandb", "tensorboard")


def parse_args(argv=None):
    parser = common.make_parser(__doc__)
    add = parser.add_argument
    add("--model", required=True,
        help="base model: a local directory or a hub id")
    add("--data", required=True,
        help="training set of 02 select (JSONL)")
    add("--out", required=True,
        help="directory of this run")
    common.add_force_flag(add)
    add_instruction_flag(add)
    add("--lr", type=float, default=2.5e-4,
        help="peak learning rate (paper: 2.5e-4 for 1.5B, 5e-5 for 7B)")
    add("--epochs", type=int, default=6,
        help="passes over the cross-entropy set")
    add("--ce-per-step", type=int, default=128,
        help="cross-entropy sequences per step, over all GPUs")
    add("--ul-per-step", type=int, default=128,
        help="unlikelihood sequences per step, over all GPUs")
    add("--ul-weight", type=float, default=1e-4,
        help="weight of the unlikelihood loss")
    add("--ul-clamp", choices=["published", "straight-through"], default="published",
        help="log p is clamped to at most log(1 - 1e-6); 'published' loses the gradient beyond it, "
             "'straight-through' keeps it")
    add("--normalize", choices=["sequence", "token"], default="sequence",
        help="'sequence': mean over sequences of their token means (paper); "
             "'token': mean over all tokens")
    add("--warmup", type=float, default=0.03,
        help="share of the steps that warm up; then cosine to 0")
    add("--weight-decay", type=float, default=0.1,
        help="AdamW's weight decay, not on biases and the layers' norms (as published)")
    add("--decay-all", action="store_true",
        help="weight decay on every parameter")
    add("--grad-clip", type=float, default=1.0,
        help="clips the gradient norm to this (0: no limit)")
    add("--max-tokens", type=int, default=32768,
        help="sequences of this many tokens (prompt + response) or more are dropped")
    add("--token-budget", type=int, default=32768,
        help="tokens in a micro-batch on one GPU")
    add_dtype_flag(add)
    add("--seed", type=int, default=42,
        help="order of the data")
    add("--gradient-checkpointing", action="store_true",
        help="recompute activations in backward (long sequences)")
    add("--compile", action="store_true",
        help="torch.compile each decoder layer; never tried on a GPU")
    add("--shard", action="store_true",
        help="fully_shard instead of DDP: for what one GPU cannot hold (7B)")
    add("--save-every", type=int, default=100,
        help="steps between checkpoints (0: only at the end)")
    add("--keep", type=int, default=1,
        help="checkpoints kept")
    add("--peak-tflops", type=float, default=0,
        help="peak of one GPU, for the MFU in the log (989: H100 bf16); 0: no MFU")
    add("--wandb", action="store_true",
        help="log to Weights & Biases too")
    add("--tensorboard", action="store_true",
        help="log to TensorBoard too")
    args = common.parse_args(parser, "train", argv)
    common.require_loggers(args)
    common.check_range(args, epochs=1, ce_per_step=1, ul_per_step=1, max_tokens=1, token_budget=1,
                       lr=0, ul_weight=0, warmup=0, weight_decay=0, grad_clip=0, save_every=0,
                       keep=1, peak_tflops=0)
    if args.warmup > 1:
        die(f"--warmup is a share of the steps, at most 1, got {args.warmup}")
    return args


# --------------------------------------------------------------------------------------------- data


def tokenize(args, tokenizer, max_positions: int):
    """Stream the training set once into OUT/tokens.bin (int32, end to end) and OUT/tokens.npz
    (borders, starts, sids).

    So memory does not grow with the text, and all ranks map one file. A sequence that is too long
    is dropped and counted, never cut. Both files are written under other names and renamed, the
    index last; it holds a hash of its inputs.
    """
    out = Path(args.out)
    key = cache_key(args, tokenizer)
    if cached_key(out) == key:
        return
    end_of_turn = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    lengths, starts, is_ul, sids = [], [], [], []
    dropped = []
    fields = {"sid": str, "problem": str, "response": str, "objective": str}
    rows = common.read_jsonl(args.data, fields, key="sid")
    # without its index there is no cache: a kill between the two files leaves none
    (out / "tokens.npz").unlink(missing_ok=True)
    with common.replace_file(out / "tokens.bin", "wb") as file:
        for row in tqdm(rows, desc="tokenize", unit=" rows", mininterval=2):
            if row["response"].strip() == "":
                die(f"{args.data}: the response of {row['sid']} is empty; remove this row")
            prompt = render_prompt(tokenizer, row["problem"], args.instruction)
            ids = prompt + encode_response(tokenizer, row["response"])
            assert ids[-1] == end_of_turn, "the last token that is trained ends the turn"
            if len(ids) >= args.max_tokens:
                dropped.append(len(ids))
                continue
            file.write(np.asarray(ids, dtype=np.int32).tobytes())
            lengths.append(len(ids))
            starts.append(len(prompt))
            is_ul.append(row["objective"] == "ul")
            sids.append(row["sid"])

    if dropped:
        quantiles = np.quantile(dropped, [0, 0.5, 1]).astype(int).tolist()
        print(f"dropped {len(dropped)} sequences of {args.max_tokens} tokens or more "
              f"(min, median, max: {quantiles})")
    if not lengths:
        die(f"{args.data}: no sequence is shorter than --max-tokens {args.max_tokens}")
    if max(lengths) > min(args.token_budget, max_positions):
        die(f"the longest sequence has {max(lengths)} tokens; --token-budget is "
            f"{args.token_budget} and the model has {max_positions} positions: raise them "
            "(python -m tools.prepare_base) or lower --max-tokens")

    borders = np.concatenate([[0], np.cumsum(lengths)])
    with common.replace_file(out / "tokens.npz", "wb") as file:
        np.savez(file, key=key, borders=borders, starts=starts, is_ul=is_ul, sids=sids)


def cache_key(args, tokenizer) -> str:
    """What the tokens depend on: the data, the limit, the instruction, the tokenizer (its
    vocabulary and its chat template)."""
    rendered = render_prompt(tokenizer, "1+1?", args.instruction)
    core = tokenizer.backend_tokenizer.to_str()
    return common.sha256_text(common.sha256_file(args.data), args.max_tokens, rendered, core)


def cached_key(out: Path) -> str | None:
    """The key of OUT's cache; None if there is none, or its two files do not belong together."""
    try:
        index = np.load(out / "tokens.npz")
        n_tokens = (out / "tokens.bin").stat().st_size // 4
        return str(index["key"]) if n_tokens == index["borders"][-1] else None
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None


class Data:
    """The tokenized training set, mapped from disk. `ce` and `ul` hold the row numbers of the two
    sets."""

    def __init__(self, out):
        index = np.load(Path(out) / "tokens.npz")
        self.tokens = np.memmap(Path(out) / "tokens.bin", dtype=np.int32, mode="r")
        self.borders, self.starts, self.sids = index["borders"], index["starts"], index["sids"]
        self.is_ul = index["is_ul"]
        self.lengths = np.diff(self.borders)
        self.n_scored = self.lengths - self.starts
        self.ce = np.flatnonzero(~self.is_ul)
        self.ul = np.flatnonzero(self.is_ul)

    def sequence(self, i: int) -> tuple[list[int], int]:
        """(ids, start): the tokens start..len-1 are the response."""
        return self.tokens[self.borders[i]:self.borders[i + 1]].tolist(), int(self.starts[i])


def batch_of_step(data: Data, step: int, args) -> np.ndarray:
    """Row numbers [ce_per_step + ul_per_step] of `step` (from 1), the same on every rank.

    Both counts are global, whatever the number of GPUs (A26); an epoch is the cross-entropy set's
    (A25).
    """
    ce = data.ce[common.rows_of_step(len(data.ce), args.ce_per_step, step, args.seed, "ce")]
    if not len(data.ul):
        return ce
    ul = data.ul[common.rows_of_step(len(data.ul), args.ul_per_step, step, args.seed, "ul")]
    return np.concatenate([ce, ul])


def token_weights(data: Data, batch, normalize: str) -> dict[int, float]:
    """Loss weight of each response token of a row (before ul_weight), from the numbers of the whole
    step.

    sequence   1 / (sequences of its set in the step x tokens of this one); PAPER.md, "Training"
    token      1 / tokens of its set in the step (A27)
    """
    weights = {}
    for is_ul in (False, True):
        rows = batch[data.is_ul[batch] == is_ul]
        n_tokens = data.n_scored[rows].sum()
        for i in rows.tolist():
            if normalize == "sequence":
                weights[i] = 1 / (len(rows) * int(data.n_scored[i]))
            else:
                weights[i] = 1 / int(n_tokens)
    return weights


def packs_of_step(data: Data, batch, args, dist) -> list[list[int]]:
    """This rank's micro-batches: lists of row numbers. Every rank gets as many, some may be
    empty."""
    plan = plan_packs(data.lengths[batch].tolist(), args.token_budget, dist.world)
    return [batch[places].tolist() for places in plan[dist.rank]]


def fullest_pack(data: Data, budget: int) -> list[int]:
    """Row numbers of the largest micro-batch that any step could produce."""
    rows, room = [], budget
    for i in np.argsort(-data.lengths, kind="stable")[:4096].tolist():
        if data.lengths[i] <= room:
            rows.append(i)
            room -= int(data.lengths[i])
    return rows


# -------------------------------------------------------------------------------- loss and gradient


def unlikelihood(logp: torch.Tensor, clamp: str = "published") -> torch.Tensor:
    """-log(1 - p) [N], stable at both ends: log(-expm1(lp)) for lp >= -ln 2, else log1p(-exp(lp)).

    log p is held at most at log(1 - 1e-6) (A28). As published, the clamp zeroes the gradient
    for larger p, exactly where the model is most confident; 'straight-through' takes the clamped
    value and lets the gradient pass.
    """
    clamped = logp.clamp(max=math.log1p(-1e-6))
    if clamp == "straight-through":
        clamped = logp + (clamped - logp).detach()
    likely = torch.log(-torch.expm1(clamped))
    unlikely = torch.log1p(-torch.exp(clamped))
    return -torch.where(clamped >= -math.log(2), likely, unlikely)


def accumulate_gradient(policy, data: Data, packs, weights: dict, args, dist) -> dict:
    """Leaves the gradient of the step's loss on every rank; returns its parts, summed over all
    ranks, by name.

    `packs`: this rank's micro-batches, as many as every other rank's. An empty one runs a dummy
    instead, the shortest sequence at weight 0: it adds exactly nothing, and every rank joins every
    collective.
    """
    sums = {}
    for k, rows in enumerate(packs):
        is_last = k == len(packs) - 1
        is_idle = not rows
        rows = rows or [int(data.lengths.argmin())]

        pack = pack_sequences([data.sequence(i) for i in rows], dist.device)
        of_row = [0.0 if is_idle else weights[i] for i in rows]
        weight = torch.tensor(of_row, device=dist.device)[pack.seq]             # [N]
        is_ul = torch.tensor(data.is_ul[rows], device=dist.device)[pack.seq]    # [N] bool
        ce_weight = weight * ~is_ul                                             # [N]
        ul_weight = weight * is_ul                                              # [N]

        with gradient_sync(policy, is_last):
            logp, entropy = policy(pack)                                        # [N], [N]
            ce_loss = (ce_weight * -logp).sum()
            ul_loss = (ul_weight * unlikelihood(logp, args.ul_clamp)).sum()
            loss = ce_loss + args.ul_weight * ul_loss
            # the wrappers average over ranks, the loss is a sum over all of them
            (loss * dist.world).backward()

        in_ce, in_ul = ce_weight > 0, ul_weight > 0     # a dummy sequence's tokens are in neither
        parts = {"ce_loss": ce_loss,
                 "ul_loss": ul_loss,
                 "entropy_ce": (entropy * in_ce).sum(),
                 "entropy_ul": (entropy * in_ul).sum(),
                 "n_ce": in_ce.sum(),
                 "n_ul": in_ul.sum()}
        for name, part in parts.items():
            sums[name] = sums.get(name, 0.0) + part.detach().double()
    return common.sum_over_ranks(sums)


def parameter_groups(model, args) -> list[dict]:
    """AdamW's groups: parameters with weight decay, and those without."""
    decayed, exempt = [], []
    for name, weight in model.named_parameters():
        # The published scripts exempt biases and the layers' norms, not the final norm (A29).
        is_exempt = name.endswith(".bias") or "layernorm" in name
        (exempt if is_exempt and not args.decay_all else decayed).append(weight)
    return [{"params": decayed, "weight_decay": args.weight_decay},
            {"params": exempt, "weight_decay": 0.0}]


def learning_rate(step: int, n_steps: int, args) -> float:
    """Of `step` (from 1): linear warm-up, then cosine to 0 (A30)."""
    warmup = max(1, round(args.warmup * n_steps))
    if step <= warmup:
        return args.lr * step / warmup
    progress = (step - 1 - warmup) / max(1, n_steps - warmup)
    return args.lr * 0.5 * (1 + math.cos(math.pi * progress))


def step_flops(model, data: Data, batch) -> float:
    """Model FLOPs of a step, forward and backward (no recomputation): 6 per weight and token, the
    input embedding free, and causal attention 6 * layers * hidden * L^2."""
    config = model.config
    embedding = model.get_input_embeddings().weight.numel()
    n_weights = sum(p.numel() for p in model.model.parameters()) - embedding
    lengths = data.lengths[batch].astype(float)
    layers = 6 * n_weights * lengths.sum()
    output_layer = 6 * config.hidden_size * config.vocab_size * float(data.n_scored[batch].sum())
    attention = 6 * config.num_hidden_layers * config.hidden_size * (lengths ** 2).sum()
    return float(layers + output_layer + attention)


# ----------------------------------------------------------------------------------------- training


def check_sets(data: Data, args):
    """Each set has to fill a step."""
    if len(data.ce) < args.ce_per_step:
        die(f"{args.data} has {len(data.ce)} 'ce' sequences, fewer than --ce-per-step "
            f"{args.ce_per_step}")
    if 0 < len(data.ul) < args.ul_per_step:
        die(f"{args.data} has {len(data.ul)} 'ul' sequences, fewer than --ul-per-step "
            f"{args.ul_per_step}")


def step_line(row: dict, n_steps: int, minutes_left: float) -> str:
    """One step on one line, for the terminal."""
    words = [f"step {row['step']}/{n_steps}",
             f"loss {row['loss']:.4f}",
             f"ce {row['ce_loss']:.4f}",
             f"ul {row['ul_loss']:.4f}",
             f"H_ce {row['entropy_ce']:.3f}",
             f"gnorm {row['grad_norm']:.2f}",
             f"lr {row['lr']:.2e}",
             f"{row['tokens_per_second']:.0f} tok/s"]
    if "mfu" in row:
        words.append(f"mfu {row['mfu']:.1%}")
    words.append(f"eta {minutes_left:.1f} min")
    return " ".join(words)


def main(argv=None):
    args = parse_args(argv)
    dist = common.init_distributed()
    settle_dtype(args, dist.device)
    out = Path(args.out)
    say = common.printer(dist)
    if dist.rank == 0:
        inputs = [args.data, model_dir(args.model)]
        common.start_output(out / "metrics.jsonl", "metrics", args, inputs, MAY_DIFFER, run=out)
        sweep(out)
    common.barrier()                                   # --force may have removed a finished run
    if common.is_finished(out):
        return say(f"{out / 'final'} is there: nothing to do")

    # the data: tokens once on disk, mapped by all ranks
    check_model_dir(args.model)
    tokenizer = load_tokenizer(args.model)
    check_instruction(args.model, args.instruction)
    if dist.rank == 0:
        tokenize(args, tokenizer, load_config(args.model).max_position_embeddings)
    common.barrier()
    data = Data(out)
    check_sets(data, args)
    n_steps = args.epochs * (len(data.ce) // args.ce_per_step)

    # the model in float32 master weights, and its optimizer
    checkpoint = latest_checkpoint(out)
    model = load_model(checkpoint or args.model, device=dist.device, trainable=True)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if args.compile:
        compile_layers(model)
    policy = distribute(TokenLogprobs(model, bf16=args.dtype == "bfloat16"), dist, args.shard)
    optimizer = torch.optim.AdamW(parameter_groups(model, args), lr=args.lr, betas=(0.9, 0.95),
                                  fused=True)
    done = load_state(checkpoint, model, optimizer)["step"] if checkpoint else 0

    # the fullest pack of the whole set at weight 0, thrown away: activations that do not fit show
    # at once (AdamW's moments come with the first step)
    rows = fullest_pack(data, args.token_budget)
    accumulate_gradient(policy, data, [rows], dict.fromkeys(rows, 0.0), args, dist)
    optimizer.zero_grad(set_to_none=True)

    quantiles = np.quantile(data.lengths, [0, 0.5, 0.9, 1]).astype(int).tolist()
    say(f"{len(data.ce)} ce + {len(data.ul)} ul sequences, tokens min/median/p90/max {quantiles}; "
        f"{n_steps} steps on {dist.world} x {dist.device}")
    if checkpoint:
        say(f"going on after step {done} ({checkpoint})")
    metrics = None
    if dist.rank == 0:
        metrics = common.Metrics(out, done, args, args.wandb, args.tensorboard)

    stop = common.StopFlag()
    started, first = time.perf_counter(), done
    for step in range(done + 1, n_steps + 1):
        # the batch, the same on every rank, and this rank's share of it
        began = time.perf_counter()
        batch = batch_of_step(data, step, args)
        weights = token_weights(data, batch, args.normalize)
        packs = packs_of_step(data, batch, args, dist)

        # the gradient of the loss, and one step of AdamW
        lr = learning_rate(step, n_steps, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        sums = accumulate_gradient(policy, data, packs, weights, args, dist)
        grad_norm = clip_gradient(model, args.grad_clip)
        loss = sums["ce_loss"] + args.ul_weight * sums["ul_loss"]
        numbers = {"loss": loss, "grad_norm": grad_norm}
        common.refuse_bad_step(out, step, numbers, data.sids[batch].tolist(), dist)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done = step

        # the log
        seconds = time.perf_counter() - began
        tokens = int(data.lengths[batch].sum())
        flops = step_flops(model, data, batch)
        row = {"step": step,
               "epoch": step * args.ce_per_step / len(data.ce),
               "loss": loss,
               "ce_loss": sums["ce_loss"],
               "ul_loss": sums["ul_loss"],
               "ul_loss_weighted": args.ul_weight * sums["ul_loss"],
               "entropy_ce": sums["entropy_ce"] / max(sums["n_ce"], 1),
               "entropy_ul": sums["entropy_ul"] / sums["n_ul"] if sums["n_ul"] else None,
               "grad_norm": grad_norm,
               "lr": lr,
               "tokens": tokens,
               "tokens_per_second": tokens / seconds,
               "flops_per_second": flops / seconds,
               "seconds": seconds}
        if args.peak_tflops:
            row["mfu"] = row["flops_per_second"] / (args.peak_tflops * 1e12 * dist.world)
        if metrics:
            metrics.log(row)
        per_step = (time.perf_counter() - started) / (step - first)
        say(step_line(row, n_steps, minutes_left=per_step * (n_steps - step) / 60))

        # checkpoints, and leaving together
        signal_number = stop.on_any_rank(dist.device)
        is_due = args.save_every and step % args.save_every == 0
        if step < n_steps and (signal_number or is_due):
            save_checkpoint(out, f"step-{step:06d}", model, tokenizer, optimizer, args.keep, dist,
                            args.instruction, step=step)
        if step < n_steps and signal_number:
            say(f"stopped; step {step} is saved in {out}, the same command goes on from there")
            raise SystemExit(128 + signal_number)

    save_checkpoint(out, "final", model, tokenizer, dist=dist, instruction=args.instruction)
    say(f"done: {out / 'final'} after {n_steps} steps, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    common.run(main)
