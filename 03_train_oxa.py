"""Stage 3: fine-tune on the selected responses. Promote the cross-entropy set, suppress the unlikelihood set.

    loss = mean over CE sequences of (mean over tokens of -log p)
         + ul_weight * mean over UL sequences of (mean over tokens of -log(1 - p))            (PAPER.md, "Training")

The other arms are the case without unlikelihood rows. One optimizer step sees `ce_per_step` + `ul_per_step` sequences, whatever
the number of cards: packs, accumulation and ranks only divide them. Every rank knows the whole step's batch (it is a function
of seed and step), so each token's weight in the mean is known before the first forward and no micro-batch is averaged twice.

Deliberate simplifications: full fine-tuning only; no dropout; no evaluation in the loop (05 does that); the epoch is the
cross-entropy set's, and the unlikelihood set is cycled beside it (docs/ASSUMPTIONS.md).

    python 03_train_oxa.py --model BASE --data train.jsonl --out RUN                         one process (CPU or one card)
    torchrun --nproc_per_node 8 -- 03_train_oxa.py --recipe recipes/paper_1.5b.toml --model BASE --data train.jsonl --out RUN

Writes RUN/final (the model), RUN/step-* (checkpoints with optimizer state), RUN/metrics.jsonl and its .meta.json. Run it again
to go on from the newest checkpoint, bit for bit on a CPU; Ctrl-C saves one first. Time: docs/LOG.md (toy), --plan (the node).
"""

import json
import math
import signal
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import common
from model import (clip_gradient, distribute, encode_response, END_OF_TURN, gradient_sync,
                   latest_checkpoint, load_config, load_model, load_state, load_tokenizer, pack_sequences, plan_packs,
                   render_prompt, save_checkpoint, token_logprobs)
from common import die

# --------------------------------------------------------------------------------------------------- configuration


def config(argv=None):
    parser = common.make_parser(__doc__)
    add = parser.add_argument
    add("--model", required=True, help="base model: a local directory or a hub id")
    add("--data", required=True, help="training set of 02 select (JSONL)")
    add("--out", required=True, help="directory of this run")
    add("--lr", type=float, default=2.5e-4, help="peak learning rate (paper: 2.5e-4 for 1.5B, 5e-5 for 7B)")
    add("--epochs", type=int, default=6, help="passes over the cross-entropy set")
    add("--ce-per-step", type=int, default=128, help="cross-entropy sequences in an optimizer step, over all cards")
    add("--ul-per-step", type=int, default=128, help="unlikelihood sequences in an optimizer step, over all cards")
    add("--ul-weight", type=float, default=1e-4, help="weight of the unlikelihood loss")
    add("--ul-clamp", choices=["published", "straight-through"], default="published",
        help="log p is held below log(1 - 1e-6); 'published' loses the gradient beyond it, 'straight-through' keeps it")
    add("--normalize", choices=["sequence", "token"], default="sequence",
        help="'sequence': mean over sequences of their token means (paper); 'token': mean over all tokens")
    add("--warmup", type=float, default=0.03, help="share of the steps that warm up; then cosine to 0")
    add("--weight-decay", type=float, default=0.1, help="AdamW, on every parameter")
    add("--grad-clip", type=float, default=1.0, help="largest gradient norm (0: no limit)")
    add("--max-tokens", type=int, default=32768, help="sequences (prompt + response) of this many tokens or more are dropped")
    add("--token-budget", type=int, default=32768, help="tokens in a micro-batch on one card")
    add("--seed", type=int, default=42, help="order of the data")
    add("--gradient-checkpointing", action="store_true", help="recompute activations in backward (long sequences)")
    add("--shard", action="store_true", help="fully_shard instead of DDP: for what one card cannot hold (7B)")
    add("--save-every", type=int, default=100, help="steps between checkpoints (0: only at the end)")
    add("--keep", type=int, default=1, help="checkpoints kept")
    add("--stop-at", type=int, default=0, help="stop (with a checkpoint) after this step; 0: run to the end")
    add("--peak-tflops", type=float, default=0, help="peak of one card, for the MFU in the log (989: H100 bf16); 0: no MFU")
    add("--wandb", action="store_true", help="log to Weights & Biases too")
    add("--tensorboard", action="store_true", help="log to TensorBoard too")
    args = common.parse_args(parser, "train", argv)
    common.require_loggers(args)
    common.check_range(args, epochs=1, ce_per_step=1, ul_per_step=1, max_tokens=1, token_budget=1, lr=0, ul_weight=0, warmup=0,
                       weight_decay=0, grad_clip=0, save_every=0, keep=1, stop_at=0, peak_tflops=0)
    if args.warmup > 1:
        die(f"--warmup is a share of the steps, at most 1, got {args.warmup}")
    return args


# ------------------------------------------------------------------------------------------------------------ data


def tokenize(args, tokenizer, max_positions: int) -> None:
    """Stream the training set once into OUT/tokens.bin (int32, end to end) and OUT/tokens.npz (borders, starts, ids), so that
    memory does not grow with the text and all ranks map one file. Too long is dropped and counted, never cut."""
    out = Path(args.out)
    data_hash = common.sha256_file(args.data)
    if (out / "tokens.npz").exists() and str(np.load(out / "tokens.npz")["data_hash"]) == data_hash:
        return
    end_of_turn = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    lengths, starts, is_ul, sids, dropped = [], [], [], [], []
    fields = {"sid": str, "problem": str, "response": str, "objective": str}
    with open(out / "tokens.bin", "wb") as file:
        for row in tqdm(common.read_jsonl(args.data, fields), desc="tokenize", unit=" rows", mininterval=2):
            if row["objective"] not in ("ce", "ul"):
                die(f"{args.data}: row {row['sid']} has objective '{row['objective']}', expected 'ce' or 'ul'")
            prompt = render_prompt(tokenizer, row["problem"])
            ids = prompt + encode_response(tokenizer, row["response"])
            assert ids[-1] == end_of_turn, "the last trained token of a response is the end of its turn"
            if len(ids) >= args.max_tokens:
                dropped.append(len(ids))
                continue
            np.asarray(ids, dtype=np.int32).tofile(file)
            lengths.append(len(ids))
            starts.append(len(prompt))
            is_ul.append(row["objective"] == "ul")
            sids.append(row["sid"])
    if dropped:
        quantiles = np.quantile(dropped, [0, 0.5, 1]).astype(int).tolist()
        print(f"dropped {len(dropped)} sequences of {args.max_tokens} tokens or more (min, median, max: {quantiles})")
    if not lengths:
        die(f"{args.data}: no sequence is shorter than --max-tokens {args.max_tokens}")
    if max(lengths) > min(args.token_budget, max_positions):
        die(f"the longest sequence has {max(lengths)} tokens; --token-budget is {args.token_budget} and the model has "
            f"{max_positions} positions: raise them (python -m tools.prepare_base) or lower --max-tokens")
    np.savez(out / "tokens.npz", data_hash=data_hash, borders=np.concatenate([[0], np.cumsum(lengths)]),
             starts=starts, is_ul=is_ul, sids=sids)


class Data:
    """The tokenized training set, mapped from disk. `ce` and `ul` hold the row numbers of the two sets."""

    def __init__(self, out):
        self.tokens = np.memmap(Path(out) / "tokens.bin", dtype=np.int32, mode="r")
        index = np.load(Path(out) / "tokens.npz")
        self.borders, self.starts, self.sids = index["borders"], index["starts"], index["sids"]
        self.lengths = np.diff(self.borders)
        self.is_ul = index["is_ul"]
        self.ce, self.ul = np.flatnonzero(~self.is_ul), np.flatnonzero(self.is_ul)

    def sequence(self, i: int) -> tuple[list[int], int]:
        return self.tokens[self.borders[i]:self.borders[i + 1]].tolist(), int(self.starts[i])


def rows_of_step(rows: np.ndarray, per_step: int, step: int, seed: int, name: str) -> np.ndarray:
    """The `per_step` rows that one set gives to `step`: a new permutation each pass, whole batches only (drop last)."""
    steps_per_pass = len(rows) // per_step
    epoch, i = divmod(step, steps_per_pass)
    order = np.random.default_rng([seed, epoch, len(name), *name.encode()]).permutation(rows)
    return order[i * per_step:(i + 1) * per_step]


def batch_of_step(data: Data, args, step: int) -> list[int]:
    """Row numbers of a step, a pure function of (seed, step): resume cannot skip or repeat."""
    batch = rows_of_step(data.ce, args.ce_per_step, step, args.seed, "ce")
    if len(data.ul):
        batch = np.concatenate([batch, rows_of_step(data.ul, args.ul_per_step, step, args.seed, "ul")])
    return batch.tolist()


def token_weights(data: Data, batch: list[int], args) -> dict[int, float]:
    """What one scored token of each row counts in the step's loss (before ul_weight), from the whole step's numbers."""
    n_tokens = {i: int(data.lengths[i] - data.starts[i]) for i in batch}
    total = {ul: sum(n for i, n in n_tokens.items() if data.is_ul[i] == ul) for ul in (False, True)}
    n_rows = {ul: sum(data.is_ul[i] == ul for i in batch) for ul in (False, True)}
    if args.normalize == "token":
        return {i: 1 / total[bool(data.is_ul[i])] for i in batch}
    return {i: 1 / (n_rows[bool(data.is_ul[i])] * n_tokens[i]) for i in batch}


# ---------------------------------------------------------------------------------------------------------- losses


def unlikelihood(logp: torch.Tensor, clamp: str = "published") -> torch.Tensor:
    """-log(1 - p) [N], stable at both ends: log(-expm1(lp)) for lp >= -ln 2, else log1p(-exp(lp)).

    log p is held at most at log(1 - 1e-6). As published, the gradient beyond is zero, just where the model is surest;
    'straight-through' takes the clamped value and lets the gradient pass.
    """
    clamped = logp.clamp(max=math.log1p(-1e-6))
    if clamp == "straight-through":
        clamped = logp + (clamped - logp).detach()
    return -torch.where(clamped >= -math.log(2), torch.log(-torch.expm1(clamped)), torch.log1p(-torch.exp(clamped)))


class OxaLoss(torch.nn.Module):
    """The loss inside `forward`, so that DDP and fully_shard see it."""

    def __init__(self, model, ul_weight: float, ul_clamp: str):
        super().__init__()
        self.model, self.ul_weight, self.ul_clamp = model, ul_weight, ul_clamp

    def forward(self, pack, weight, is_ul):
        """weight [N]: a token's share of its mean, is_ul [N] bool -> (loss, sums [6]).

        sums: CE loss, UL loss, entropy over CE tokens, over UL tokens, number of CE tokens, of UL tokens."""
        logp, entropy = token_logprobs(self.model, pack, entropy=True)
        used = weight > 0                                             # an idle rank's stand-in pack counts for nothing
        ce = (weight * -logp)[~is_ul].sum()
        ul = (weight[is_ul] * unlikelihood(logp[is_ul], self.ul_clamp)).sum()
        sums = torch.stack([ce.detach(), ul.detach(), entropy[used & ~is_ul].sum(), entropy[used & is_ul].sum(),
                            (used & ~is_ul).sum(), (used & is_ul).sum()]).double()
        return ce + self.ul_weight * ul, sums


# -------------------------------------------------------------------------------------------------------- the loop


def learning_rate(step: int, n_steps: int, args) -> float:
    """Linear warm-up, then cosine to 0; `step` counts from 0."""
    warmup = max(1, round(args.warmup * n_steps))
    if step < warmup:
        return args.lr * (step + 1) / warmup
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, n_steps - warmup)))


def run_pack(module, data, rows, weights, dist, last: bool) -> torch.Tensor:
    """Forward and backward of one pack; returns its sums [6]. A rank without rows runs a stand-in of weight 0 so that the
    ranks' collectives match."""
    idle = not rows
    rows = rows or [int(data.lengths.argmin())]
    packed = pack_sequences([data.sequence(i) for i in rows], dist.device)
    per_row = torch.tensor([0.0 if idle else weights[i] for i in rows], device=dist.device)
    is_ul = torch.tensor(data.is_ul[rows], device=dist.device)
    with gradient_sync(module, last):
        loss, sums = module(packed, per_row[packed.seq], is_ul[packed.seq])
        (loss * dist.world).backward()     # the wrappers average over ranks, the loss is a sum
    return sums


def training_step(module, data, batch, args, dist) -> torch.Tensor:
    """Accumulate the gradient of one optimizer step; returns the global sums [6]."""
    weights = token_weights(data, batch, args)
    packs = plan_packs([int(data.lengths[i]) for i in batch], args.token_budget, dist.world)[dist.rank]
    sums = sum(run_pack(module, data, [batch[j] for j in p], weights, dist, last=n == len(packs) - 1)
               for n, p in enumerate(packs))
    return common.all_reduce_sum(sums)


def longest_pack_first(module, data, args, dist):
    """One forward and backward over the fullest pack of the whole set, thrown away: an out-of-memory shows at once."""
    rows, room = [], args.token_budget
    for i in np.argsort(-data.lengths, kind="stable")[:4096].tolist():
        if data.lengths[i] <= room:
            rows.append(i)
            room -= int(data.lengths[i])
    run_pack(module, data, rows, dict.fromkeys(rows, 0.0), dist, last=True)
    module.zero_grad(set_to_none=True)


def step_flops(model, data, batch) -> float:
    """Model FLOPs of a step, forward and backward (no recomputation): 6 per weight and token, the input embedding free, and
    causal attention 6 * layers * hidden * L^2."""
    config, tokens = model.config, float(data.lengths[batch].sum())
    body = sum(p.numel() for p in model.model.parameters()) - model.get_input_embeddings().weight.numel()
    scored = float((data.lengths[batch] - data.starts[batch]).sum())
    return (6 * body * tokens + 6 * config.hidden_size * config.vocab_size * scored
            + 6 * config.num_hidden_layers * config.hidden_size * float((data.lengths[batch].astype(float) ** 2).sum()))


def train(args):
    dist = common.init_distributed()
    out = Path(args.out)
    if dist.rank == 0:
        common.start_output(out / "metrics.jsonl", "metrics", args, [args.data],
                              may_differ=("stop_at", "save_every", "keep", "peak_tflops", "wandb", "tensorboard"))
    if (out / "final" / "config.json").exists():
        if dist.rank == 0:
            print(f"{out / 'final'} is there: nothing to do")
        return
    checkpoint = latest_checkpoint(out)
    tokenizer = load_tokenizer(args.model)
    if dist.rank == 0:
        tokenize(args, tokenizer, load_config(args.model).max_position_embeddings)
    common.barrier()
    data = Data(out)
    for name, rows, per_step in (("ce", data.ce, args.ce_per_step), ("ul", data.ul, args.ul_per_step)):
        if len(rows) < per_step and (name == "ce" or len(rows)):
            die(f"{args.data} has {len(rows)} '{name}' sequences, fewer than --{name}-per-step {per_step}")
    n_steps = args.epochs * (len(data.ce) // args.ce_per_step)

    model = load_model(checkpoint or args.model, device=dist.device, trainable=True)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    module = distribute(OxaLoss(model, args.ul_weight, args.ul_clamp), dist, args.shard)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=args.weight_decay,
                                  fused=True)                        # over float32 master weights
    step = load_state(checkpoint, model, optimizer)["step"] if checkpoint else 0
    longest_pack_first(module, data, args, dist)
    if dist.rank == 0:
        quantiles = np.quantile(data.lengths, [0, 0.5, 0.9, 1]).astype(int).tolist()
        print(f"{len(data.ce)} ce + {len(data.ul)} ul sequences, tokens min/median/p90/max {quantiles}; {n_steps} steps on "
              f"{dist.world} x {dist.device}" + (f"; going on after step {step} ({checkpoint})" if checkpoint else ""))
        metrics = common.Metrics(out, step, args, args.wandb, args.tensorboard)

    stop = []                                             # Ctrl-C or SIGTERM: finish the step, save, leave
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda number, frame: stop.append(number))
    started, first = time.time(), step
    while step < n_steps:
        begin = time.time()
        batch = batch_of_step(data, args, step)
        lr = learning_rate(step, n_steps, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        sums = training_step(module, data, batch, args, dist)
        grad_norm = clip_gradient(model, args.grad_clip)
        ce, ul, entropy_ce, entropy_ul, n_ce, n_ul = sums.tolist()
        if not math.isfinite(ce + ul + grad_norm):
            if dist.rank == 0:
                (out / "bad_batch.json").write_text(json.dumps({"step": step + 1, "sids": data.sids[batch].tolist()}))
            raise SystemExit(f"error: step {step + 1}: loss {ce + args.ul_weight * ul}, gradient norm {grad_norm}; the batch's ids "
                             f"are in {out / 'bad_batch.json'}, the newest checkpoint is {latest_checkpoint(out)}")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        seconds, tokens = time.time() - begin, int(data.lengths[batch].sum())
        stopping = common.all_reduce_sum(torch.tensor(float(bool(stop) or step == args.stop_at), device=dist.device)) > 0
        if dist.rank == 0:
            flops = step_flops(model, data, batch) / seconds
            row = {"step": step, "epoch": step * args.ce_per_step / len(data.ce), "loss": ce + args.ul_weight * ul,
                   "ce_loss": ce, "ul_loss": ul, "ul_loss_weighted": args.ul_weight * ul,
                   "entropy_ce": entropy_ce / max(n_ce, 1), "entropy_ul": entropy_ul / n_ul if n_ul else None,
                   "grad_norm": grad_norm, "lr": lr, "tokens": tokens, "tokens_per_second": tokens / seconds,
                   "flops_per_second": flops, "seconds": seconds}
            if args.peak_tflops:
                row["mfu"] = flops / (args.peak_tflops * 1e12 * dist.world)
            metrics.log(row)
            eta = (time.time() - started) / (step - first) * (n_steps - step)
            print(f"step {step}/{n_steps} loss {row['loss']:.4f} ce {ce:.4f} ul {ul:.4f} H_ce {row['entropy_ce']:.3f} "
                  f"gnorm {grad_norm:.2f} lr {lr:.2e} {row['tokens_per_second']:.0f} tok/s "
                  + (f"mfu {row['mfu']:.1%} " if args.peak_tflops else "") + f"eta {eta / 60:.1f} min", flush=True)
        if stopping or (args.save_every and step % args.save_every == 0 and step < n_steps):
            save_checkpoint(out, f"step-{step:06d}", model, tokenizer, optimizer, args.keep, dist, step=step)
        if stopping and step < n_steps:
            if dist.rank == 0:
                print(f"stopped after step {step}; the same command goes on from here")
            raise SystemExit(130 if stop else 0)
    save_checkpoint(out, "final", model, tokenizer, dist=dist)
    if dist.rank == 0:
        print(f"done: {out / 'final'} after {n_steps} steps, {time.time() - started:.0f} s")


if __name__ == "__main__":
    train(config())
