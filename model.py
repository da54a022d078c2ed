"""Tokens, packs, the one log-prob primitive, and checkpoints.

Every stage is a function of per-token log-probabilities, so the heart of this file is `token_logprobs(model, pack)`:
sequences laid end to end without padding, attention that keeps them apart, and an output layer that is walked in chunks,
so that a tokens x vocabulary matrix never exists.

Shapes: T tokens of a pack, S sequences in it, N scored tokens, H hidden size, V vocabulary, B generation slots.
"""

import contextlib
import dataclasses
import math
import os
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.distributed as torch_dist
import torch.nn.functional as F

from common import Dist, barrier, die

# ---------------------------------------------------------------------------------------------------------- tokens

# One text in training, RLVR and evaluation (PAPER: "Prompt").
INSTRUCTION = ("\nPlease reason step by step inside <think>...</think>, "
               "then put your final answer within \\boxed{}.")
END_OF_TURN, END_OF_TEXT = "<|im_end|>", "<|endoftext|>"


def load_tokenizer(path, any_markup: bool = False):
    """`any_markup`: enough to sample from (R1's distilled models have markup of their own), not to train."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    # AutoTokenizer lays Qwen's own splitting rules over any Qwen2 model's tokenizer.json: that file itself is the truth.
    kind = PreTrainedTokenizerFast if (Path(model_dir(path)) / "tokenizer.json").exists() else AutoTokenizer
    try:
        tokenizer = kind.from_pretrained(model_dir(path))
    except (OSError, ValueError) as error:
        die(f"cannot read a tokenizer from {path}: {str(error).splitlines()[0]}")
    missing = [t for t in (END_OF_TURN, END_OF_TEXT) if token_id(tokenizer, t) is None]
    if missing and not any_markup:
        die(f"the tokenizer in {path} has no {' and no '.join(missing)}: Qwen chat markup is needed")
    return tokenizer


def render_prompt(tokenizer, problem: str) -> list[int]:
    """Token ids of the user turn and the opening of the assistant's, no system prompt."""
    text = tokenizer.apply_chat_template([{"role": "user", "content": problem + INSTRUCTION}],
                                         tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encode_text(tokenizer, text: str) -> list[int]:
    """Token ids of a response's text alone. Markup inside the text stays text: a response cannot end its own turn."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def encode_response(tokenizer, text: str) -> list[int]:
    """`encode_text` and the end-of-turn token, so that a trained model stops."""
    return encode_text(tokenizer, text) + [tokenizer.convert_tokens_to_ids(END_OF_TURN)]


def token_id(tokenizer, token: str) -> int | None:
    """Id of a special token, None if there is none (an unknown token has the id of `unk`, which may be a stop token)."""
    found = tokenizer.convert_tokens_to_ids(token)
    return found if found is not None and tokenizer.convert_ids_to_tokens(found) == token else None


def stop_ids(tokenizer) -> list[int]:
    """End of turn, end of text, and the tokenizer's own end of sequence."""
    ids = [token_id(tokenizer, t) for t in (END_OF_TURN, END_OF_TEXT)] + [tokenizer.eos_token_id]
    return list(dict.fromkeys(i for i in ids if i is not None))


def decode_response(tokenizer, ids: list[int]) -> str:
    """The text of sampled ids; a final stop token is dropped, nothing else is touched."""
    if ids and ids[-1] in stop_ids(tokenizer):
        ids = ids[:-1]
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


# --------------------------------------------------------------------------------------------------------- packing


@dataclasses.dataclass
class Pack:
    """Sequences end to end. Scored token n is `targets[n]`, predicted at position `rows[n]`, of sequence `seq[n]`.

    Tokens that sequences share stand once in T; attention alone lays them out for each sequence again, E = sum of lengths.
    """
    input_ids: torch.Tensor      # [T]
    position_ids: torch.Tensor   # [T] restart at 0 with each sequence
    cu_seqlens: torch.Tensor     # [S+1] int32, borders of the sequences in E
    max_seqlen: int
    rows: torch.Tensor           # [N]
    targets: torch.Tensor        # [N]
    seq: torch.Tensor            # [N]
    index: torch.Tensor | None   # [E] the row in T of each token of each sequence; None: nothing is shared, E is T
    owner: torch.Tensor | None   # [T] the place in E of each row (of a shared one: the first)
    groups: list                 # CPU attention: sequences of like length side by side, [(index [S_g L_g] into T, S_g)]
    order: torch.Tensor          # [T] where each token stands in the groups, end to end

    def spread(self, x):
        """[T, ...] -> [E, ...]"""
        return x if self.index is None else x[self.index]


def pack_sequences(sequences: list[tuple[list[int], int]], device="cpu", share: bool = False) -> Pack:
    """Lay (ids, start) sequences end to end; the tokens start..len-1 are scored (start >= 1: a first token has no
    prediction). The scored tokens come out sequence by sequence, in order.

    `share`: tokens 0..start-1 that several sequences begin with, such as the prompt of a group of rollouts, go through the
    model once (Liu et al. 2025, "Prefix Grouper", arXiv 2506.05433). Log-probs and gradients are the same.
    """
    lengths = np.array([len(ids) for ids, _ in sequences])
    starts = np.array([start for _, start in sequences])
    assert (starts >= 1).all(), "the first token of a sequence has no prediction"
    borders = np.concatenate([[0], lengths.cumsum()])
    tokens = np.concatenate([np.asarray(ids, dtype=np.int64) for ids, _ in sequences])
    positions = np.concatenate([np.arange(n) for n in lengths])
    scored = np.concatenate([np.arange(s, n) + b for s, n, b in zip(starts, lengths, borders)]).astype(np.int64)
    seq = np.repeat(np.arange(len(lengths)), np.maximum(lengths - starts, 0))
    index = owner = np.arange(len(tokens))
    if share:                                                 # the first sequence that begins so owns the rows
        firsts = {}
        for (ids, start), border in zip(sequences, borders):
            index[border:border + start] = firsts.setdefault(tuple(ids[:start]), border) + np.arange(start)
        owner, index = np.unique(index, return_inverse=True)  # [T] into E, [E] into T
    groups, rest, order, n_laid = [], np.argsort(-lengths, kind="stable"), np.zeros(len(owner), dtype=np.int64), 0
    while len(rest) and torch.device(device).type == "cpu":   # longest first; a group pads at most a fifth
        inside = rest[lengths[rest] >= 0.8 * lengths[rest[0]]]
        offsets = np.arange(lengths[rest[0]])[None, :]
        valid = offsets < lengths[inside][:, None]
        side_by_side = index[borders[inside][:, None] + np.where(valid, offsets, 0)]     # [S_g, L_g]
        order[side_by_side[valid]] = n_laid + np.flatnonzero(valid)
        groups.append((torch.from_numpy(side_by_side.reshape(-1)), len(inside)))
        rest, n_laid = rest[len(inside):], n_laid + side_by_side.size
    to = lambda array, dtype=torch.int64: torch.from_numpy(array).to(device=device, dtype=dtype)
    shared = (to(index), to(owner)) if len(owner) < len(tokens) else (None, None)
    return Pack(to(tokens[owner]), to(positions[owner]), to(borders, torch.int32), int(lengths.max()), to(index[scored - 1]),
                to(tokens[scored]), to(seq), *shared, groups, to(order))


# Attention costs L^2, everything else L: a sequence costs L * (1 + L / ATTENTION_KNEE). The knee is where attention's
# FLOPs equal the rest: 6 * hidden for a Qwen2-like layer (24 H^2 L against 4 H L^2), 9,216 for hidden 1,536.
ATTENTION_KNEE = 9216


def plan_packs(lengths: list[int], budget: int, n_ranks: int = 1) -> list[list[list[int]]]:
    """Split sequences (by index) over ranks and into packs of at most `budget` tokens: ranks -> packs -> indices.

    A pure function of its arguments; every index exactly once; longest sequences first (greedy, to the rank with the
    least cost, then to the emptiest of its packs with room), so that the largest pack comes first and an out-of-memory
    shows at once. Every rank gets the same number of packs (some may be empty), so collectives match.
    """
    if any(n > budget for n in lengths):
        die(f"a sequence of {max(lengths)} tokens does not fit the pack budget of {budget} tokens; raise --token-budget")
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    ranks, cost = [[] for _ in range(n_ranks)], [0.0] * n_ranks
    for i in order:
        r = min(range(n_ranks), key=cost.__getitem__)
        ranks[r].append(i)
        cost[r] += lengths[i] * (1 + lengths[i] / ATTENTION_KNEE)
    def fill(indices, n_packs):
        packs, room = [[] for _ in range(n_packs)], [budget] * n_packs
        for i in indices:
            p = max(range(n_packs), key=room.__getitem__)
            if room[p] < lengths[i]:
                return None
            packs[p].append(i)
            room[p] -= lengths[i]
        return packs
    n_packs = max(1, max(math.ceil(sum(lengths[i] for i in indices) / budget) for indices in ranks))
    while any(fill(indices, n_packs) is None for indices in ranks):
        n_packs += 1
    return [fill(indices, n_packs) for indices in ranks]


# -------------------------------------------------------------------------------------- the primitive: token log-probs


def packed_attention(module, query, key, value, attention_mask=None, scaling=None, pack=None, slots=None, **_):
    """Causal attention within each sequence of a pack. query [1, Hq, T, D], key and value [1, Hkv, T, D] -> [1, T, Hq, D].

    Registered with transformers as "packed". CUDA: one varlen kernel (bf16). CPU: sequences of like length are laid side
    by side, right-padded (a causal query never sees what is behind it), one call per group. With `slots` (a KVSlots) the
    keys and values are kept for generation, and without `pack` each row of the batch is one slot's next token.
    """
    if slots is not None:
        slots.write(module.layer_idx, key, value, pack)
    if pack is None:
        return slots.attend(module.layer_idx, query, scaling), None
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))   # [T, heads, D]
    if query.is_cuda:
        return varlen_attention(query, key, value, scaling, pack)[None], None
    heads, dim, outs = query.shape[1], query.shape[2], []
    for index, n in pack.groups:                       # F.embedding gathers rows, and has the fastest backward that does
        q, k, v = (F.embedding(index, x.flatten(1)).view(n, len(index) // n, -1, dim).transpose(1, 2)
                   for x in (query, key, value))       # [S_g, heads, L_g, D]
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
        outs.append(o.transpose(1, 2).reshape(len(index), -1))
    return F.embedding(pack.order, torch.cat(outs)).view(1, -1, heads, dim), None


def varlen_attention(query, key, value, scaling, pack):
    """[T, heads, D] -> [T, Hq, D] by one kernel in bf16, CUDA only; `tests/test_core.py` runs all but the kernel."""
    from torch.nn.attention import varlen
    query, key, value = (pack.spread(x.to(torch.bfloat16)) for x in (query, key, value))
    out = varlen.varlen_attn(query, key, value, pack.cu_seqlens, pack.cu_seqlens, pack.max_seqlen, pack.max_seqlen,
                             scale=scaling, window_size=(-1, 0), enable_gqa=True)
    return out if pack.owner is None else out[pack.owner]


def load_config(path):
    from transformers import AutoConfig
    try:
        return AutoConfig.from_pretrained(model_dir(path))
    except (OSError, ValueError) as error:
        die(f"cannot read a model configuration from {path}: {str(error).splitlines()[0]}")


def load_model(path, dtype=torch.float32, device="cpu", trainable: bool = False):
    """A causal LM whose attention is `packed_attention`; frozen and in eval mode unless `trainable`."""
    from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar
    AttentionInterface.register("packed", packed_attention)
    AttentionMaskInterface.register("packed", lambda *args, **kwargs: None)   # the borders are the mask
    disable_progress_bar()
    config = load_config(path)
    if getattr(config, "use_sliding_window", False):
        die(f"{path} uses sliding-window attention, which the packed attention does not implement")
    model = AutoModelForCausalLM.from_pretrained(model_dir(path), dtype=dtype, attn_implementation="packed").to(device)
    if model.get_output_embeddings().bias is not None:
        die(f"{path} has a bias in its output layer, which the log-prob primitive does not implement")
    if not trainable and torch.device(device).type == "cuda":
        halve_linear(model)
    return model.train(trainable).requires_grad_(trainable)


def halve_linear(model):
    """Linear layers in bf16: for a frozen model under autocast, which would cast them at each call, the same numbers in half
    the memory. Embedding, norms and a tied output layer stay as they are."""
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and not (tied and module is model.get_output_embeddings()):
            module.to(torch.bfloat16)


def check_positions(config, needed: int, what: str):
    """`what` needs `needed` positions: refuse a model that has fewer (silent RoPE overruns ruin long chains of thought)."""
    if needed > config.max_position_embeddings:
        die(f"{what} needs {needed} positions, the model has max_position_embeddings = {config.max_position_embeddings}; "
            "prepare the base first (python -m tools.prepare_base) or lower the limit")


class OutputLayer(torch.autograd.Function):
    """hidden [N, H], weight [V, H], targets [N] -> log p(target) [N], entropy [N], a chunk of rows at a time.

    Forward keeps only the log-normaliser of each row; backward makes the chunk's logits again. With z = h W' / T:
    d logp / dz = 1[target] - softmax(z), so any loss on logp is exact. Entropy is a measurement: no gradient.
    """

    @staticmethod
    def chunks(hidden, weight):
        budget = 2**28 if hidden.is_cuda else 2**26    # logits alive at once: 1 GiB on CUDA, 256 MiB on a CPU
        size = max(1, budget // weight.shape[0])
        return [slice(i, i + size) for i in range(0, len(hidden), size)]

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, want_entropy):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        w = weight.to(hidden.dtype)
        logp, log_z = (torch.empty(len(hidden), dtype=wide, device=hidden.device) for _ in range(2))
        entropy = torch.empty_like(logp) if want_entropy else None
        for rows in OutputLayer.chunks(hidden, weight):
            z = (hidden[rows] @ w.T).to(wide).div_(temperature)                     # [n, V]
            target_z = z.gather(1, targets[rows, None])[:, 0]
            top = z.max(dim=1).values
            z.sub_(top[:, None])
            p = z.exp()
            total = p.sum(dim=1)
            log_z[rows] = total.log() + top
            logp[rows] = target_z - log_z[rows]
            if want_entropy:   # H = log Z - E[z]
                entropy[rows] = total.log() - p.mul_(z).sum(dim=1) / total
        ctx.save_for_backward(hidden, weight, targets, log_z)
        ctx.temperature = temperature
        if want_entropy:
            ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx, grad_logp, _):
        hidden, weight, targets, log_z = ctx.saved_tensors
        w = weight.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=log_z.dtype) if ctx.needs_input_grad[1] else None
        for rows in OutputLayer.chunks(hidden, weight):
            z = (hidden[rows] @ w.T).to(log_z.dtype).div_(ctx.temperature)
            scale = (grad_logp[rows] / ctx.temperature)[:, None]
            dz = z.sub_(log_z[rows, None]).exp_().mul_(-scale)                      # -g softmax(z)
            dz.scatter_add_(1, targets[rows, None], scale)                          # +g at the target
            dz = dz.to(hidden.dtype)
            grad_hidden[rows] = dz @ w
            if grad_weight is not None:
                if grad_weight.dtype == hidden.dtype:
                    grad_weight.addmm_(dz.T, hidden[rows])
                else:
                    grad_weight += dz.T @ hidden[rows]
        return grad_hidden, grad_weight if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


def token_logprobs(model, pack: Pack, temperature: float = 1.0, entropy: bool = False):
    """Log-probs of a pack's scored tokens: (logp [N] float32, entropy [N] or None). Differentiable in logp.

    Compute is bf16 on CUDA (autocast over float32 weights), the weights' own type elsewhere.
    """
    cuda = pack.input_ids.is_cuda
    with torch.autocast("cuda", torch.bfloat16, enabled=cuda):
        hidden = model.model(input_ids=pack.input_ids[None], position_ids=pack.position_ids[None], pack=pack,
                             use_cache=False).last_hidden_state[0, pack.rows]       # [N, H]
    if cuda:
        hidden = hidden.to(torch.bfloat16)
    return OutputLayer.apply(hidden, model.get_output_embeddings().weight, pack.targets, temperature, entropy)


# ---------------------------------------------------------------------------- ranks and checkpoints


def distribute(module: torch.nn.Module, dist: Dist, shard: bool = False) -> torch.nn.Module:
    """DDP (weights on every rank) or FSDP2 (`shard`: weights, gradients and optimizer state split over ranks). One rank has
    nothing to split: neither.

    `module` must compute the loss in its own `forward`: a call past the wrapper would train on unsynchronised gradients.
    Both average gradients over ranks, so the loss is multiplied by the number of ranks.
    """
    if shard and dist.world > 1:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        cuda = dist.device.startswith("cuda")
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if cuda else MixedPrecisionPolicy()
        mesh = torch_dist.init_device_mesh(dist.device.split(":")[0], (dist.world,))
        for layer in module.model.model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        return fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    if dist.world > 1:
        return torch.nn.parallel.DistributedDataParallel(
            module, device_ids=[torch.device(dist.device)] if dist.device.startswith("cuda") else None)
    return module


def clip_gradient(model, largest: float) -> float:
    """Scale the gradient to a norm of at most `largest` (0: no limit); returns the norm it had, over all shards."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), largest or math.inf)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


@contextlib.contextmanager
def gradient_sync(module, last: bool):
    """Around forward AND backward of a micro-batch: gradients are exchanged only in the last one of a step."""
    if hasattr(module, "set_requires_gradient_sync"):
        module.set_requires_gradient_sync(last)
        yield
    elif not last and hasattr(module, "no_sync"):
        with module.no_sync():
            yield
    else:
        yield


def model_dir(path) -> str:
    """DIR, or DIR/final of a training run, or a hub id as it is."""
    path = Path(path)
    if (path / "config.json").exists() or not path.exists():
        return str(path)
    if (path / "final" / "config.json").exists():
        return str(path / "final")
    die(f"{path} is no model: neither config.json nor final/config.json is there")


def rng_state() -> dict:
    state = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def save_checkpoint(out, name: str, model, tokenizer, optimizer=None, keep: int = 2, dist: Dist = Dist(), **state):
    """OUT/`name`: a Hugging Face directory, with `state.pt` (weights-only loadable) if an optimizer is given.

    Written beside and renamed, by rank 0; all ranks must call. Of the step-* directories the newest `keep` stay.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    moments = get_optimizer_state_dict(model, optimizer, options=options) if optimizer else None
    if dist.rank == 0:
        out = Path(out)
        temporary = out / f".{name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        model.save_pretrained(temporary, state_dict=weights)
        tokenizer.save_pretrained(temporary)
        if optimizer:
            torch.save({"optimizer": moments, "rng": rng_state(), **state}, temporary / "state.pt")
        shutil.rmtree(out / name, ignore_errors=True)
        os.replace(temporary, out / name)
        for old in sorted(out.glob("step-*"))[:-keep]:
            shutil.rmtree(old)
    barrier()


def latest_checkpoint(out) -> Path | None:
    """The newest whole checkpoint of a run (a half-written one has another name)."""
    found = sorted(p for p in Path(out).glob("step-*") if (p / "state.pt").exists())
    return found[-1] if found else None


def load_state(checkpoint, model, optimizer) -> dict:
    """Restore optimizer and random state from a checkpoint (the weights come with `load_model`); returns the state."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict
    state = torch.load(Path(checkpoint) / "state.pt", map_location="cpu", weights_only=True)
    set_optimizer_state_dict(model, optimizer, state.pop("optimizer"), options=StateDictOptions(full_state_dict=True))
    torch.set_rng_state(state["rng"]["torch"])
    return state
