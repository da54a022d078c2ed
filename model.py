"""Tokens, packs, the one log-prob primitive, and checkpoints.

Every stage is a function of per-token log-probabilities, so the heart of this file is

    token_logprobs(model, pack) -> logp [N], entropy [N]

Sequences lie end to end without padding, attention keeps them apart, and the output layer is walked
in chunks, so that a tokens x vocabulary matrix never exists.

Shapes: T tokens of a pack, S sequences in it, E the sum of their lengths, N scored tokens, H hidden
size, V vocabulary, D head dimension.
"""

import contextlib
import dataclasses
import errno
import json
import math
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import torch
import torch.distributed as torch_dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

from common import Dist, barrier, die

# ------------------------------------------------------------------------------------------ tokens

# Appended to every problem, in training, RLVR and evaluation alike (PAPER.md, "Prompt"). Shorter
# than the paper's; override it with --instruction (A4).
INSTRUCTION = ("\nPlease reason step by step inside <think>...</think>, "
               "then put your final answer within \\boxed{}.")
END_OF_TURN = "<|im_end|>"
END_OF_TEXT = "<|endoftext|>"


def load_tokenizer(path, any_markup: bool = False):
    """The tokenizer of a model directory or hub id.

    `any_markup`: accept tokenizers without Qwen markup (R1's distilled models have their own):
    enough to sample from, not to train.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    directory = model_dir(path)
    # AutoTokenizer lays Qwen's own splitting rules over any Qwen2 model's tokenizer.json: that file
    # itself is the truth.
    has_file = (Path(directory) / "tokenizer.json").exists()
    kind = PreTrainedTokenizerFast if has_file else AutoTokenizer
    try:
        tokenizer = kind.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError) as error:
        die(f"cannot read a tokenizer from {path}: {str(error).splitlines()[0]}")
    missing = [token for token in (END_OF_TURN, END_OF_TEXT) if token_id(tokenizer, token) is None]
    if missing and not any_markup:
        lacking = " and no ".join(missing)
        die(f"the tokenizer in {path} has no {lacking}: Qwen chat markup is needed")
    return tokenizer


def render_prompt(tokenizer, problem: str, instruction: str = INSTRUCTION) -> list[int]:
    """Token ids of the user turn (the problem, then the instruction) and the opening of the
    assistant's, no system prompt.

    Markup in the problem stays text: a problem cannot end the user's turn (A11).
    """
    def with_template(content):
        messages = [{"role": "user", "content": content}]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def ids_of(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    if not holds_markup(tokenizer, problem):
        return ids_of(with_template(problem + instruction))
    place = "\ue000"                                         # of the problem: in no template
    before, _, after = with_template(place + instruction).partition(place)
    return ids_of(before) + encode_text(tokenizer, problem) + ids_of(after)


def holds_markup(tokenizer, text: str) -> bool:
    """Would a part of the text become a control token?"""
    added = tokenizer.added_tokens_decoder.values()
    return any(token.special and token.content in text for token in added)


def add_instruction_flag(add):
    """`--instruction` of every stage that renders prompts; `add`: the parser's add_argument."""
    add("--instruction", default=INSTRUCTION,
        help="text appended to every problem, in all stages of a run ([run] instruction)")


def add_dtype_flag(add):
    """`--dtype` of every stage that runs a model; `add`: the parser's add_argument."""
    add("--dtype", choices=["float32", "bfloat16"], default="float32",
        help="compute type on a CPU. bfloat16: autocast over float32 weights where log-probs are "
             "trained or scored (02 to 04), bfloat16 weights where text is generated; faster only "
             "on CPUs that have it (lscpu: avx512_bf16, amx_bf16). A GPU always uses bfloat16")


def settle_dtype(args, device: str):
    """A GPU computes in bfloat16 whatever the flag says; outputs record what ran."""
    if device.startswith("cuda"):
        args.dtype = "bfloat16"


INSTRUCTION_FILE = "instruction.json"        # in the directory of a model that was trained with one


def check_instruction(path, instruction: str):
    """Refuse a model that was trained with another instruction; a base was trained with none."""
    file = Path(model_dir(path)) / INSTRUCTION_FILE
    if not file.is_file():
        return
    try:
        trained = json.loads(file.read_text(encoding="utf-8"))["instruction"]
    except (ValueError, KeyError, TypeError) as error:
        die(f"{file} does not name an instruction: {error!r}")
    if trained != instruction:
        die(f"{path} was trained with the instruction {trained!r}, not with {instruction!r}: "
            "give the former as --instruction, or as [run] instruction of the recipe")


def encode_text(tokenizer, text: str) -> list[int]:
    """Token ids of a response's text alone.

    Markup in it stays text: a response cannot end its own turn (A11).
    """
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def encode_response(tokenizer, text: str) -> list[int]:
    """`encode_text` and the end-of-turn token, so that a trained model stops (A31)."""
    return encode_text(tokenizer, text) + [tokenizer.convert_tokens_to_ids(END_OF_TURN)]


def token_id(tokenizer, token: str) -> int | None:
    """Id of a special token, or None (an unknown token has the id of `unk`, which may be a stop
    token)."""
    found = tokenizer.convert_tokens_to_ids(token)
    if found is None or tokenizer.convert_ids_to_tokens(found) != token:
        return None
    return found


def stop_ids(tokenizer) -> list[int]:
    """End of turn, end of text, and the tokenizer's own end of sequence."""
    markup = [token_id(tokenizer, END_OF_TURN), token_id(tokenizer, END_OF_TEXT)]
    candidates = [*markup, tokenizer.eos_token_id]
    return list(dict.fromkeys(i for i in candidates if i is not None))


def decode_response(tokenizer, ids: list[int]) -> str:
    """The text of sampled ids; a final stop token is dropped, nothing else is touched."""
    if ids and ids[-1] in stop_ids(tokenizer):
        ids = ids[:-1]
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


# ------------------------------------------------------------------------------------------- packs


@dataclasses.dataclass
class Pack:
    """Sequences end to end. Scored token n is `targets[n]`, predicted at row `rows[n]`, of sequence
    `seq[n]`.

    Tokens that sequences share stand once in T; attention alone lays them out for each sequence
    again, in E. The sequences [a b c d] and [a b e], scored from their third token on, with their
    common prompt [a b] shared:

        E            a b c d | a b e        cu_seqlens   0 4 7
        index        0 1 2 3   0 1 4        owner        0 1 2 3 6
        input_ids    a b c d e              rows         1 2 1       (the rows of b, c and b)
        position_ids 0 1 2 3 2              targets      c d e
    """
    input_ids: torch.Tensor      # [T]
    position_ids: torch.Tensor   # [T] restart at 0 with each sequence
    cu_seqlens: torch.Tensor     # [S+1] int32, borders of the sequences in E
    max_seqlen: int
    rows: torch.Tensor           # [N]
    targets: torch.Tensor        # [N]
    seq: torch.Tensor            # [N]
    index: torch.Tensor | None   # [E] the row in T of each token; None: E is T
    owner: torch.Tensor | None   # [T] the place in E of each row (of a shared one: the first)
    groups: list                 # for attention on a CPU, see cpu_groups
    order: torch.Tensor          # [T] where each row stands in the groups, end to end

    def spread(self, x):
        """[T, ...] -> [E, ...]"""
        return x if self.index is None else x[self.index]


def pack_sequences(sequences: list[tuple[list[int], int]], device="cpu", share=False) -> Pack:
    """Lay (ids, start) sequences end to end; the tokens start..len-1 of each are scored, and come
    out in order.

    `start` is at least 1: a first token has no prediction. `share`: tokens 0..start-1 that several
    sequences begin with, such as the prompt of a group of rollouts, go through the model once (Liu
    et al. 2025, "Prefix Grouper", arXiv 2506.05433). Log-probs and gradients are the same.
    """
    lengths = np.array([len(ids) for ids, _ in sequences])
    starts = np.array([start for _, start in sequences])
    assert (starts >= 1).all(), "the first token of a sequence has no prediction"
    borders = np.concatenate([[0], lengths.cumsum()])
    tokens = np.concatenate([np.asarray(ids, dtype=np.int64) for ids, _ in sequences])  # [E]
    positions = np.concatenate([np.arange(length) for length in lengths])   # [E]
    n_scored = np.maximum(lengths - starts, 0)
    seq = np.repeat(np.arange(len(lengths)), n_scored)                      # [N]
    is_scored = positions >= np.repeat(starts, lengths)                     # [E]
    scored = np.flatnonzero(is_scored)                                      # [N] places in E

    index = owner = np.arange(len(tokens))
    if share:
        index, owner = share_prompts(sequences, borders)
    groups, order = [], np.zeros(len(owner), dtype=np.int64)
    if torch.device(device).type == "cpu":
        groups, order = cpu_groups(lengths, borders, index, n_rows=len(owner))

    def tensor(array, dtype=torch.int64):
        return torch.from_numpy(array).to(device=device, dtype=dtype)

    is_shared = len(owner) < len(tokens)
    return Pack(input_ids=tensor(tokens[owner]),
                position_ids=tensor(positions[owner]),
                cu_seqlens=tensor(borders, torch.int32),
                max_seqlen=int(lengths.max()),
                rows=tensor(index[scored - 1]),
                targets=tensor(tokens[scored]),
                seq=tensor(seq),
                index=tensor(index) if is_shared else None,
                owner=tensor(owner) if is_shared else None,
                groups=groups,
                order=tensor(order))


def share_prompts(sequences, borders) -> tuple[np.ndarray, np.ndarray]:
    """index [E] and owner [T] of a Pack: the first sequence with some tokens 0..start-1 owns their
    rows."""
    place = np.arange(borders[-1])  # [E] of each token: the place in E of the token it is read as
    first_with = {}
    for (ids, start), border in zip(sequences, borders):
        first = first_with.setdefault(tuple(ids[:start]), border)
        place[border:border + start] = first + np.arange(start)
    owner, index = np.unique(place, return_inverse=True)
    return index, owner


def cpu_groups(lengths, borders, index, n_rows: int) -> tuple[list, np.ndarray]:
    """Sequences of like length laid side by side, for attention on a CPU: groups [(rows [S_g *
    L_g], S_g)], order [T].

    Longest first; a group pads at most a fifth. Lengths 5, 2, 4 make two groups, 5 with 4 (padded
    by one) and 2 alone.
    """
    groups, n_laid = [], 0
    order = np.zeros(n_rows, dtype=np.int64)
    rest = np.argsort(-lengths, kind="stable")
    while len(rest):
        longest = lengths[rest[0]]
        inside = rest[lengths[rest] >= 0.8 * longest]
        offsets = np.arange(longest)[None, :]
        is_token = offsets < lengths[inside][:, None]                       # [S_g, L_g]
        places = borders[inside][:, None] + np.where(is_token, offsets, 0)
        rows = index[places]                                                # [S_g, L_g]
        order[rows[is_token]] = n_laid + np.flatnonzero(is_token)
        groups.append((torch.from_numpy(rows.reshape(-1)), len(inside)))
        n_laid += rows.size
        rest = rest[len(inside):]
    return groups, order


# Attention costs L^2, everything else L: a sequence costs L * (1 + L / ATTENTION_KNEE). At the knee
# the two are equal. By FLOPs that is at 30,000 tokens for Qwen2.5-1.5B (causal: 2 H L^2 against
# 40 H^2 L); by the roofline of a whole step, elementwise kernels included, at 52,000 for 1.5B and
# 64,000 for 7B (bench/packs.py).
ATTENTION_KNEE = 49152


def plan_packs(lengths: list[int], budget: int, n_ranks: int = 1) -> list[list[list[int]]]:
    """Split sequences (by index) over ranks and into packs of at most `budget` tokens: ranks ->
    packs -> indices.

    A pure function of its arguments, every index exactly once. The longest go first, each to the
    rank with the least cost, then to the emptiest of its packs, so that the largest pack comes
    first and an out-of-memory shows at once. Every rank gets the same number of packs (some may be
    empty), so that collectives match. With a budget of 10:

        lengths 9 4 3 2, two ranks      rank 0: [9]        rank 1: [4 3 2]
        lengths 6 6 3, one rank         [6 3] [6]
    """
    longest = max(lengths, default=0)
    if longest > budget:
        die(f"a sequence of {longest} tokens does not fit the pack budget of {budget} tokens; "
            "raise --token-budget")
    of_rank = [[] for _ in range(n_ranks)]
    cost = [0.0] * n_ranks
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        cheapest = min(range(n_ranks), key=cost.__getitem__)
        of_rank[cheapest].append(i)
        cost[cheapest] += lengths[i] * (1 + lengths[i] / ATTENTION_KNEE)

    heaviest = 0
    for indices in of_rank:
        heaviest = max(heaviest, sum(lengths[i] for i in indices))
    n_packs = max(1, math.ceil(heaviest / budget))
    while True:
        plan = [fill_packs(indices, lengths, budget, n_packs) for indices in of_rank]
        if None not in plan:
            return plan
        n_packs += 1


def fill_packs(indices, lengths, budget: int, n_packs: int) -> list[list[int]] | None:
    """Each sequence in turn into the pack with the most room; None if one does not fit any."""
    packs = [[] for _ in range(n_packs)]
    room = [budget] * n_packs
    for i in indices:
        emptiest = max(range(n_packs), key=room.__getitem__)
        if room[emptiest] < lengths[i]:
            return None
        packs[emptiest].append(i)
        room[emptiest] -= lengths[i]
    return packs


# --------------------------------------------------------------------------------------- attention


def packed_attention(module, query, key, value, attention_mask=None, scaling=None,
                     pack=None, slots=None, **_):
    """Causal attention within each sequence of a pack. query [1, Hq, T, D], key and value [1, Hkv,
    T, D] -> [1, T, Hq, D].

    Registered with transformers as "packed". CUDA: one varlen kernel. CPU: sequences of like length
    side by side. With `slots` (engines.KVSlots) keys and values are kept for generation, and
    without `pack` each row of the batch is one slot's next token.
    """
    if slots is not None:
        slots.write(module.layer_idx, key, value, pack)
    if pack is None:
        return slots.attend(module.layer_idx, query, scaling), None
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, heads, D]
    attend = varlen_attention if query.is_cuda else cpu_attention
    return attend(query, key, value, scaling, pack)[None], None


def varlen_attention(query, key, value, scaling, pack):
    """[T, heads, D] -> [T, Hq, D] by one kernel in bf16, CUDA only (docs/GPU.md)."""
    from torch.nn.attention import varlen
    # [E, heads, D], bf16: the kernel takes nothing else
    query, key, value = (pack.spread(x.to(torch.bfloat16)) for x in (query, key, value))
    borders, longest = pack.cu_seqlens, pack.max_seqlen
    causal = (-1, 0)                                      # any distance back, none ahead
    out = varlen.varlen_attn(query, key, value, borders, borders, longest, longest,
                             scale=scaling, window_size=causal, enable_gqa=True)
    return out if pack.owner is None else out[pack.owner]


def cpu_attention(query, key, value, scaling, pack):
    """[T, heads, D] -> [T, Hq, D], one call per group; right-padded, so that a causal query never
    sees the padding."""
    n_heads, head_dim = query.shape[1:]
    outs = []
    for rows, n_sequences in pack.groups:

        length = len(rows) // n_sequences

        def side_by_side(x):
            gathered = F.embedding(rows, x.flatten(1))  # gathers with the fastest backward
            return gathered.view(n_sequences, length, -1, head_dim).transpose(1, 2)

        # [S_g, heads, L_g, D]
        q, k, v = side_by_side(query), side_by_side(key), side_by_side(value)
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
        outs.append(out.transpose(1, 2).reshape(len(rows), -1))
    return F.embedding(pack.order, torch.cat(outs)).view(-1, n_heads, head_dim)


# ------------------------------------------------------------------ the primitive: token log-probs


class OutputLayer(torch.autograd.Function):
    """hidden [N, H], weight [V, H], targets [N] -> log p(target) [N], entropy [N], chunk by chunk.

    Forward keeps three numbers of each row; backward makes the chunk's logits again. With
    z = h W' / T, d logp / dz = 1[target] - softmax(z), so any loss on logp is exact. Entropy is a
    measurement: no gradient.

    Near p = 1, where unlikelihood looks, 1 - p is what counts: the likeliest token is left out of
    the sum of exponentials (log Z = max + log1p(rest)), and 1 - p is -expm1(logp).
    """

    @staticmethod
    def chunks(hidden, weight):
        # logits alive at once: 1 GiB on CUDA, 256 MiB on a CPU
        budget = 2**28 if hidden.is_cuda else 2**26
        size = max(1, budget // weight.shape[0])
        return [slice(i, i + size) for i in range(0, len(hidden), size)]

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, want_entropy):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        w = weight.to(hidden.dtype)
        logp = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        top = torch.empty_like(logp)                # the largest logit
        log_total = torch.empty_like(logp)          # log Z - top
        entropy = torch.empty_like(logp) if want_entropy else None
        for rows in OutputLayer.chunks(hidden, weight):
            z = (hidden[rows] @ w.T).to(wide).div_(temperature)             # [n, V]
            largest, likeliest = z.max(dim=1, keepdim=True)                 # [n, 1]
            z.sub_(largest)
            target_z = z.gather(1, targets[rows, None])[:, 0]
            p = z.exp().scatter_(1, likeliest, 0.0)  # times Z, but for the top
            rest = p.sum(dim=1)
            top[rows] = largest[:, 0]
            log_total[rows] = rest.log1p()
            logp[rows] = target_z - log_total[rows]
            if want_entropy:                        # H = log Z - E[z], and z is 0 at the top
                entropy[rows] = log_total[rows] - p.mul_(z).sum(dim=1) / (1 + rest)
        ctx.save_for_backward(hidden, weight, targets, top, log_total, logp)
        ctx.temperature = temperature
        if want_entropy:
            ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx, grad_logp, _):
        hidden, weight, targets, top, log_total, logp = ctx.saved_tensors
        w = weight.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight, dtype=top.dtype)
        for rows in OutputLayer.chunks(hidden, weight):
            z = (hidden[rows] @ w.T).to(top.dtype).div_(ctx.temperature)    # [n, V]
            p = z.sub_(top[rows, None]).sub_(log_total[rows, None]).exp_()
            scale = (grad_logp[rows] / ctx.temperature)[:, None]
            dz = p.mul_(-scale)                                             # -g softmax(z)
            one_less_p = -torch.expm1(logp[rows, None])
            dz.scatter_(1, targets[rows, None], scale * one_less_p)  # +g (1 - p) at the target
            dz = dz.to(hidden.dtype)
            grad_hidden[rows] = dz @ w
            if grad_weight is None:
                continue
            if grad_weight.dtype == hidden.dtype:
                grad_weight.addmm_(dz.T, hidden[rows])
            else:
                grad_weight += dz.T @ hidden[rows]
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None


def token_logprobs(model, pack: Pack, temperature: float = 1.0, entropy: bool = False,
                   bf16: bool = False):
    """Log-probs of a pack's scored tokens: (logp [N] float32, entropy [N] in nats, or None).
    Differentiable in logp.

    Both are of softmax(logits / temperature). Compute is bf16 on CUDA, and on a CPU with `bf16`
    (autocast over float32 weights); else it is the weights' own type.
    """
    cuda = pack.input_ids.is_cuda
    bf16 = bf16 or cuda
    with torch.autocast("cuda" if cuda else "cpu", torch.bfloat16, enabled=bf16):
        out = model.model(input_ids=pack.input_ids[None], position_ids=pack.position_ids[None],
                          pack=pack, use_cache=False)
    hidden = out.last_hidden_state[0, pack.rows]                            # [N, H]
    if bf16:
        hidden = hidden.to(torch.bfloat16)
    weight = model.get_output_embeddings().weight
    return OutputLayer.apply(hidden, weight, pack.targets, temperature, entropy)


class TokenLogprobs(torch.nn.Module):
    """The primitive as a module, for 03 and 04 to train: a pack in, logp [N] and entropy [N] out.

    It is what DDP and fully_shard wrap: they exchange gradients, and gather shards, around its
    forward, so every pass of a training step goes through the wrapped module. The loss is a
    function of what it returns.
    """

    def __init__(self, model, temperature: float = 1.0, bf16: bool = False):
        super().__init__()
        self.model = model
        self.temperature = temperature
        self.bf16 = bf16

    def forward(self, pack):
        return token_logprobs(self.model, pack, self.temperature, entropy=True, bf16=self.bf16)


# ---------------------------------------------------------------------------------- loading models


def model_dir(path) -> str:
    """DIR, or DIR/final of a training run, or a hub id as it is."""
    path = Path(path)
    if not path.exists():
        if path.is_absolute() or len(path.parts) > 2:        # a hub id is NAME or OWNER/NAME
            die(f"{path} does not exist")
        return str(path)
    if (path / "config.json").exists():
        return str(path)
    if (path / "final" / "config.json").exists():
        return str(path / "final")
    die(f"{path} is no model: neither config.json nor final/config.json is there")


def load_config(path):
    from transformers import AutoConfig
    try:
        return AutoConfig.from_pretrained(model_dir(path), trust_remote_code=False)
    except Exception as error:                               # whatever a config.json may provoke
        die(f"cannot read a model configuration from {path}: {first_line(error)}")


def load_model(path, dtype=torch.float32, device="cpu", trainable: bool = False):
    """A causal LM whose attention is `packed_attention`; frozen and in eval mode unless
    `trainable`."""
    from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar
    AttentionInterface.register("packed", packed_attention)
    AttentionMaskInterface.register("packed", no_mask)
    disable_progress_bar()
    config = load_config(path)
    if getattr(config, "use_sliding_window", False):
        die(f"{path} uses sliding-window attention, which the packed attention does not implement")
    model, names = AutoModelForCausalLM.from_pretrained(
        model_dir(path), dtype=dtype, attn_implementation="packed", trust_remote_code=False,
        output_loading_info=True)
    for which in ("missing_keys", "unexpected_keys"):
        if names[which]:
            die(f"{path}: {which.replace('_', ' ')} in the weights: {sorted(names[which])[:3]}")
    model.to(device)
    if model.get_output_embeddings().bias is not None:
        die(f"{path} has a bias in its output layer, which the log-prob primitive does not have")
    if not trainable and torch.device(device).type == "cuda":
        halve_linear(model)
    return model.train(trainable).requires_grad_(trainable)


def no_mask(*args, **kwargs):
    """The borders of a pack are its mask."""
    return None


def halve_linear(model):
    """Linear layers in bf16, for a frozen model under autocast: the same numbers, half the memory.

    Autocast would cast them at each call (A46). Embedding, norms and a tied output layer stay as
    they are.
    """
    output = model.get_output_embeddings()
    is_tied = output.weight is model.get_input_embeddings().weight
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and not (is_tied and module is output):
            module.to(torch.bfloat16)


def check_positions(config, needed: int, what: str):
    """Refuse a model with fewer than `needed` positions: silent RoPE overruns ruin long chains of
    thought."""
    if needed > config.max_position_embeddings:
        die(f"{what} needs {needed} positions, the model has max_position_embeddings = "
            f"{config.max_position_embeddings}; prepare the base first "
            "(python -m tools.prepare_base) or lower the limit")


# --------------------------------------------------------------------------- is it a whole model?


def check_model_dir(path, renders: bool = True):
    """Refuse a model directory whose files do not belong together, before anything is loaded:
    transformers would fill a missing layer with random numbers, and warn.

    Every parameter of the configuration is stored, none is left over, shapes fit, numbers are
    finite, the vocabulary holds the tokenizer's, and (`renders`) the chat template renders a
    problem. No code of the model is run. A hub id is not looked at: `load_model` checks its names.
    """
    directory = Path(model_dir(path))
    if not directory.is_dir():
        return
    tokenizer = load_tokenizer(directory, any_markup=True)
    check_weights(directory, load_config(directory), tokenizer)
    if renders:
        check_chat_template(directory, tokenizer)


def check_weights(directory: Path, config, tokenizer):
    from transformers import AutoModelForCausalLM
    try:
        with torch.device("meta"):                           # shapes alone, no memory
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:                               # whatever a config.json may provoke
        die(f"{directory}: config.json describes no causal LM: {first_line(error)}")
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    needed = {name for name, _ in model.named_parameters()}  # of tied ones the first
    found = set()
    for file in weight_files(directory):
        try:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():
                    check_tensor(file, name, tensors.get_tensor(name), shapes)
                    found.add(name)
        except (SafetensorError, OSError) as error:
            die(f"{file} is not whole: {first_line(error)}")
    missing = sorted(needed - found)
    if missing:
        die(f"{directory}: the weights lack {missing[0]} ({len(missing)} of {len(needed)} "
            "parameters of config.json are not there)")
    n_tokens = 1 + max(tokenizer.get_vocab().values())
    n_rows = model.get_input_embeddings().weight.shape[0]
    if n_tokens > n_rows:
        die(f"{directory}: the tokenizer has {n_tokens} tokens, the embedding {n_rows} rows")


def check_tensor(file, name: str, tensor: torch.Tensor, shapes: dict):
    if name not in shapes:
        die(f"{file}: config.json has no parameter {name}")
    if list(tensor.shape) != shapes[name]:
        die(f"{file}: {name} is {list(tensor.shape)}, config.json makes it {shapes[name]}")
    if not tensor.isfinite().all():
        die(f"{file}: {name} has numbers that are not finite")


def weight_files(directory: Path) -> list[Path]:
    """model.safetensors, or the files that its index names."""
    index = directory / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            die(f"{index} is no index of weight files")
    for name in names:
        if not (directory / str(name)).is_file():
            die(f"{directory} has no weights: {name} is missing")
    return [directory / name for name in names]


def check_chat_template(directory: Path, tokenizer, seconds: float = 10):
    """The template is a program of the model's: it runs in a sandbox (transformers), and within
    limits."""
    if not tokenizer.chat_template:
        die(f"{directory} has no chat template: prepare the base first "
            "(python -m tools.prepare_base)")
    problem = "What is 1 + 1?"
    before = signal.signal(signal.SIGALRM, raise_timeout)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        n_tokens = len(render_prompt(tokenizer, problem))
        text = tokenizer.apply_chat_template([{"role": "user", "content": problem}], tokenize=False)
    except Exception as error:                               # whatever a template may provoke
        die(f"{directory}: the chat template fails: {first_line(error)}")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    if problem not in text or n_tokens > 10_000:
        die(f"{directory}: the chat template makes {n_tokens} tokens of '{problem}'")


def raise_timeout(number, frame):
    raise TimeoutError("it does not end")


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ---------------------------------------------------------------------- training on several ranks


def compile_layers(model):
    """torch.compile for each decoder layer, in place and before `distribute`: norms, rotary, SwiGLU
    and casts are fused. Packed attention is left as it is: its groups differ from pack to pack.

    It gets a name of its own, which this model alone looks up: other models are loaded later.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    name = "packed_not_compiled"
    AttentionInterface.register(name, torch.compiler.disable(packed_attention))
    AttentionMaskInterface.register(name, no_mask)
    model.config._attn_implementation = name
    for layer in model.model.layers:
        layer.compile(dynamic=True)                       # packs differ in length


def distribute(module: TokenLogprobs, dist: Dist, shard: bool = False) -> torch.nn.Module:
    """DDP (weights on every rank) or FSDP2 (`shard`: weights, gradients and optimizer state split
    over ranks).

    One rank has nothing to split: neither. Both average gradients over ranks, while the loss of a
    step is a sum over the tokens of all ranks: it is multiplied by the number of ranks before
    backward.
    """
    if dist.world == 1:
        return module
    on_cuda = dist.device.startswith("cuda")
    if not shard:
        device_ids = [torch.device(dist.device)] if on_cuda else None
        return torch.nn.parallel.DistributedDataParallel(module, device_ids=device_ids)
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    precision = MixedPrecisionPolicy()
    if on_cuda:
        precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mesh = torch_dist.init_device_mesh("cuda" if on_cuda else "cpu", (dist.world,))
    for layer in module.model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    return fully_shard(module, mesh=mesh, mp_policy=precision, reshard_after_forward=False)


@contextlib.contextmanager
def gradient_sync(module, last: bool):
    """Around forward AND backward of a micro-batch: DDP exchanges gradients only in the last one of
    a step, fully_shard in each.

    Held back, fully_shard would keep a whole float32 gradient on every rank: 30 GB for 7B.
    """
    if hasattr(module, "no_sync") and not last:         # DDP
        with module.no_sync():
            yield
    else:
        yield


def clip_gradient(module, largest: float) -> float:
    """Clips the gradient norm to `largest` (0: no limit); returns the norm before, over all
    shards."""
    norm = torch.nn.utils.clip_grad_norm_(module.parameters(), largest or math.inf)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


# ------------------------------------------------------------------------------------- checkpoints


def save_checkpoint(out, name: str, model, tokenizer, optimizer=None, keep: int = 2,
                    dist: Dist = Dist(), instruction: str = INSTRUCTION, **state):
    """OUT/`name`: a Hugging Face directory, with the instruction of its prompts, and `state.pt`
    (weights-only loadable) if an optimizer is given.

    Written beside and renamed, by rank 0; all ranks must call. A checkpoint that is there already
    stays as it is. Of the step-* directories the newest `keep` stay.
    """
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions, get_model_state_dict, get_optimizer_state_dict)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    moments = get_optimizer_state_dict(model, optimizer, options=options) if optimizer else None
    if dist.rank == 0 and not (Path(out) / name).exists():
        sweep(out)
        temporary = Path(out) / f".{name}.tmp"
        try:
            model.save_pretrained(temporary, state_dict=weights)
            tokenizer.save_pretrained(temporary)
            text = json.dumps({"instruction": instruction}, ensure_ascii=False)
            (temporary / INSTRUCTION_FILE).write_text(text + "\n", encoding="utf-8")
            if optimizer:
                torch.save({"optimizer": moments, **state}, temporary / "state.pt")
        except (SafetensorError, RuntimeError) as error:     # what these two make of a full disk
            why = f"the checkpoint cannot be written ({first_line(error)})"
            raise OSError(errno.EIO, why, str(temporary)) from None
        os.replace(temporary, Path(out) / name)
        for old in sorted(Path(out).glob("step-*"))[:-keep]:
            # renamed first, so that no half-deleted checkpoint has a good name
            aside = old.with_name(f".{old.name}.tmp")
            os.replace(old, aside)
            shutil.rmtree(aside)
    barrier()


def sweep(out):
    """Remove what a killed run left half-written or half-deleted."""
    for left in Path(out).glob(".*.tmp"):
        shutil.rmtree(left)


def latest_checkpoint(out) -> Path | None:
    """The newest whole checkpoint of a run (a half-written one has another name)."""
    found = sorted(path for path in Path(out).glob("step-*") if (path / "state.pt").exists())
    return found[-1] if found else None


def load_state(checkpoint, model, optimizer) -> dict:
    """Restore the optimizer's state from a checkpoint (the weights come with `load_model`); returns
    the rest."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions, set_optimizer_state_dict)
    state = torch.load(Path(checkpoint) / "state.pt", map_location="cpu", weights_only=True)
    options = StateDictOptions(full_state_dict=True)
    set_optimizer_state_dict(model, optimizer, state.pop("optimizer"), options=options)
    return state
