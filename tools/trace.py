"""A training step traced on fake tensors: its peak memory by part, and a roofline of its time by kind of kernel.

    python -m tools.trace --model 1.5b --tokens 32768                one pack of one sequence on one of 8 cards (DDP)
    python -m tools.trace --model 7b --tokens 32768 --shards 8       the same with fully_shard over 8 cards
    python -m tools.trace --write                                    renews tools/trace.json, which `--plan` reads

The code of the step is the real one (`load_model`, `distribute`, `TokenLogprobs`, AdamW) at the model's real sizes; the
tensors have shapes, types and storages, but no numbers, so it needs no card, no weights and some seconds.

What a trace cannot see: the list of operations that CUDA's autocast casts (the CPU's list answers for it), kernels'
workspaces, the allocator's fragmentation and rounding, the CUDA context (about 0.5 GB), alignment rules of kernels, clocks,
and anything a kernel computes. A roofline is a bound at an assumed share of the peak, not a measurement.
"""

import common

import argparse
import contextlib
import dataclasses
import json
import shutil
import tempfile
import weakref
from pathlib import Path

import torch
import torch.distributed as torch_dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import model as model_room
from model import (
    TokenLogprobs, distribute, gradient_sync, load_model, pack_sequences, token_logprobs)
from tools import plan

CACHE = Path(__file__).with_name("trace.json")
MODELS = {"0.5b": "Qwen2.5-0.5B", "1.5b": "Qwen2.5-Math-1.5B", "7b": "Qwen2.5-Math-7B"}


# ------------------------------------------------------------------------------------------- a card is pretended


class HostSync(AssertionError):
    """The host would wait for the card here."""


class TwoDevices(AssertionError):
    """A tensor of the card meets one of the host."""


class FullLogits(AssertionError):
    """A tensor of (nearly) all tokens x vocabulary."""


SYNCS = {torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy,
         torch.Tensor.__bool__, torch.Tensor.__float__, torch.Tensor.__int__, torch.Tensor.__index__,
         torch.Tensor.nonzero, torch.nonzero, torch.Tensor.unique, torch.unique,
         torch.Tensor.masked_select, torch.masked_select}


def as_cpu(argument):
    """A CUDA device, in any spelling, becomes the CPU; everything else stays."""
    if isinstance(argument, torch.device) and argument.type == "cuda":
        return torch.device("cpu")
    if isinstance(argument, str) and argument.split(":")[0] == "cuda":
        return "cpu"
    return argument


def names_host(argument) -> bool:
    """By word only: `x.device` of a tensor of the card says CPU too here."""
    return isinstance(argument, str) and argument == "cpu"


def is_mask(index) -> bool:
    return getattr(index, "dtype", None) == torch.bool


class PretendedCard(TorchFunctionMode):
    """`device="cuda"` is answered by fake tensors on the CPU, whose storages the tape remembers as the card's.

    While `trapped`, whatever would make the host wait for the card raises HostSync. Copies from the host to the card are
    let through: each pack's indices are made on the host.
    """

    def __init__(self, tape):
        super().__init__()
        self.tape = tape
        self.trapped = False

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch._C._nn._parse_to:              # of Module.to: it only reads its arguments
            return function(*args, **kwargs)
        arguments = tree_leaves((args, kwargs))
        to_card = any(as_cpu(a) is not a for a in arguments)
        to_host = function is torch.Tensor.cpu
        if function is torch.Tensor.to:
            to_host = any(names_host(a) for a in arguments)
        subject = args[0] if args else None
        if self.trapped and isinstance(subject, FakeTensor) and self.tape.place(subject) == "card":
            masked = function is torch.Tensor.__getitem__ and any(is_mask(i) for i in tree_leaves(args[1]))
            if function in SYNCS or to_host or masked:
                raise HostSync(f"{function.__name__} of a tensor on the card makes the host wait for it")
        named = {key: as_cpu(value) for key, value in kwargs.items()}
        out = function(*map(as_cpu, args), **named)
        if isinstance(out, torch.Tensor):
            without_tensors = not any(isinstance(a, torch.Tensor) for a in arguments)
            if to_host:
                out = out.clone()
            if to_card:
                self.tape.put(out, "card")
            elif to_host or (without_tensors and kwargs.get("device") is None):
                self.tape.put(out, "host")
        return out


def apply_to_fakes(module, change, recurse=True):
    """torch.nn.Module._apply (`.to`, `.bfloat16` ..) for fake parameters, which it cannot swap."""
    for part in module.modules():
        for owner in (part._parameters, part._buffers):
            for name, old in owner.items():
                if old is None:
                    continue
                with torch.no_grad():
                    new = change(old)
                if new is not old and new.dtype != old.dtype:
                    owner[name] = torch.nn.Parameter(new, old.requires_grad) if owner is part._parameters else new
    return module


# ------------------------------------------------------------------------------------------------- what is counted


@dataclasses.dataclass
class Work:
    """What the kernels of one kind do."""
    flops: float = 0
    bytes: float = 0
    kernels: int = 0


GATHERS = ("embedding", "index", "gather", "index_select", "slice_backward", "select_backward")


def kind_of(function, region: str | None) -> str:
    """products, attention, casts, elementwise; those of the output layer apart."""
    name = function._schema.name
    if name.startswith("torch_attn::"):
        return "attention"
    if function._overloadpacket in flop_registry:
        kind = "products"
    elif name == "aten::_fused_adamw_":
        return "optimizer"
    elif name in ("aten::_to_copy", "aten::copy_"):
        kind = "casts"
    else:
        kind = "elementwise"
    if region == "output layer":
        return "output products" if kind == "products" else "output elementwise"
    return kind


def is_view(function) -> bool:
    """Kernels that do not exist: views, and memory that is only taken."""
    name = function._schema.name.split("::")[-1]
    returns = function._schema.returns
    aliased = [r.alias_info for r in returns if r.alias_info is not None]
    return (bool(aliased) and not any(a.is_write for a in aliased)) or name.startswith(("empty", "new_empty")) or name in (
        "_unsafe_view", "detach", "alias", "lift_fresh", "device")


def moved_bytes(x) -> int:
    """Of one tensor: an expanded one is read once."""
    return min(x.nbytes, x.untyped_storage().nbytes())


class Tape(TorchDispatchMode):
    """Live bytes and their peak by storage, work by kind of kernel, and where each storage is: "card", "host", or None."""

    def __init__(self, vocab: int, hidden: int):
        super().__init__()
        self.vocab, self.hidden = vocab, hidden
        self.sizes = {}                 # storage -> bytes
        self.places = {}                # storage -> "card" or "host"
        self.live = self.peak = 0
        self.work = {}
        self.region = None
        self.lengths = []               # of the sequences in the pack: the cost of attention

    # --- where a tensor is

    def place(self, x):
        return self.places.get(x.untyped_storage()._cdata)

    def put(self, x, place: str):
        self.places[x.untyped_storage()._cdata] = place

    def same_place(self, function, inputs) -> str | None:
        """Place of the output; a host tensor of one dimension or more meets none of the card but to be copied."""
        places = {self.place(x) for x in inputs}
        if "card" in places and function._schema.name not in ("aten::copy_", "aten::_to_copy", "aten::index"):
            for x in inputs:
                if x.dim() and self.place(x) == "host":
                    raise TwoDevices(f"{function}: a tensor {list(x.shape)} of the host meets tensors of the card")
        return "card" if "card" in places else "host" if "host" in places else None

    # --- how much lives

    def resized(self, key: int, size: int):
        self.live += size - self.sizes.get(key, 0)
        self.sizes[key] = size
        self.peak = max(self.peak, self.live)

    def freed(self, key: int):
        self.live -= self.sizes.pop(key, 0)
        self.places.pop(key, None)

    def seen(self, x, place):
        storage = x.untyped_storage()
        key = storage._cdata
        if key not in self.sizes:
            weakref.finalize(storage, self.freed, key)
            self.resized(key, storage.nbytes())
            if place:
                self.places[key] = place

    # --- what is done

    def flops(self, function, args, kwargs, out) -> float:
        name = function._schema.name
        if name.startswith("torch_attn::"):
            query = args[1] if "backward" in name else args[0]
            forward = 2 * sum(n * n for n in self.lengths) * query.shape[1] * query.shape[2]
            return 2.5 * forward if "backward" in name else forward
        count = flop_registry.get(function._overloadpacket)
        return count(*args, **kwargs, out_val=out) if count else 0

    def note(self, function, args, kwargs, inputs, outputs, out):
        if is_view(function):
            return
        short = function._schema.name.split("::")[-1]
        if short in GATHERS:
            moved = 2 * sum(moved_bytes(x) for x in outputs)
        else:
            written = [x for x in inputs if short.startswith("_fused")]        # in place, returned by no output
            moved = sum(moved_bytes(x) for x in [*inputs, *outputs, *written])
        work = self.work.setdefault(kind_of(function, self.region), Work())
        work.flops += self.flops(function, args, kwargs, out)
        work.bytes += moved
        work.kernels += 1

    def refuse_full_logits(self, function, outputs):
        for x in outputs:
            wide = self.vocab in x.shape and x.numel() > 2**28
            if wide and x.numel() != self.vocab * self.hidden:
                raise FullLogits(f"{function} makes a tensor {list(x.shape)}: tokens x vocabulary")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(t not in (torch.Tensor, torch.nn.Parameter, FakeTensor) for t in types):
            return NotImplemented                                               # DTensor: its parts come here
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, FakeTensor)]
        outputs = [x for x in tree_leaves(out) if isinstance(x, FakeTensor)]
        place = self.same_place(function, inputs)
        for x in outputs:
            self.seen(x, place)
        self.refuse_full_logits(function, outputs)
        self.note(function, args, kwargs, inputs, outputs, out)
        return out


# ------------------------------------------------------------------------------------------------ the card is there


@contextlib.contextmanager
def replaced(owner, name: str, value):
    """owner.name is `value` inside."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def in_region(tape, name: str, function):
    """`function`, with the tape's region set to `name` while it runs."""
    def inside(*args):
        tape.region = name
        try:
            return function(*args)
        finally:
            tape.region = None
    return inside


def hand_back(_, bucket):
    """DDP's exchange of a bucket: as if all ranks had the same."""
    done = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


@contextlib.contextmanager
def pretended_card(vocab: int, hidden: int):
    """Inside, `device="cuda"` is there and tensors are fake; yields a PretendedCard, whose `tape` counts.

    Pretended: is_cuda; autocast("cuda"), answered by the CPU's; weights of a checkpoint (random instead, of the same shapes
    and types); Module.to. See the head of this file for what is not seen.
    """
    from transformers import AutoModelForCausalLM
    tape = Tape(vocab, hidden)
    card = PretendedCard(tape)
    autocast, resize = torch.autocast, torch.UntypedStorage.resize_
    ddp = torch.nn.parallel.DistributedDataParallel

    def cpu_autocast(device, *args, **kwargs):
        return autocast(as_cpu(device), *args, **kwargs)

    def noted_resize(storage, size):
        resize(storage, size)
        if storage._cdata in tape.sizes:
            tape.resized(storage._cdata, size)
        return storage

    def from_config(path, **kwargs):
        return AutoModelForCausalLM.from_config(model_room.load_config(path), **kwargs)

    def ddp_without_exchange(module, device_ids=None):
        wrapped = ddp(module, init_sync=False)
        wrapped.register_comm_hook(None, hand_back)
        return wrapped

    layer = model_room.OutputLayer
    patches = [(FakeTensor, "is_cuda", property(lambda x: tape.place(x) == "card")), (torch, "autocast", cpu_autocast),
               (torch.UntypedStorage, "resize_", noted_resize), (torch.nn.Module, "_apply", apply_to_fakes),
               (torch.nn.parallel, "DistributedDataParallel", ddp_without_exchange),
               (AutoModelForCausalLM, "from_pretrained", from_config),
               (layer, "forward", staticmethod(in_region(tape, "output layer", layer.forward))),
               (layer, "backward", staticmethod(in_region(tape, "output layer", layer.backward)))]
    with contextlib.ExitStack() as stack:
        for owner, name, value in patches:
            stack.enter_context(replaced(owner, name, value))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(tape)
        stack.enter_context(card)
        yield card


# -------------------------------------------------------------------------------------------------- a step is traced

STEP_BYTES = 40    # moved at the end of a step, a weight: clipping reads, reads and writes g; AdamW reads p g m v, writes p m v


@dataclasses.dataclass(frozen=True)
class Case:
    """One traced setting: a pack of one sequence of `tokens` tokens, on one card of `ranks`."""
    model: str                       # name in plan.KNOWN
    way: str                         # "ddp", "shard", "one" (card), "frozen" (scored, not trained)
    tokens: int
    ranks: int = 1
    checkpointing: bool = True


def paper_directory(name: str, folder) -> Path:
    """A model directory without weights: the configuration after `prepare-base`, and the toy's tokenizer."""
    from transformers import Qwen2Config
    sizes = plan.KNOWN[name]
    config = Qwen2Config(
        architectures=["Qwen2ForCausalLM"], hidden_size=sizes.hidden, num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads, num_key_value_heads=sizes.kv_heads, intermediate_size=sizes.inter,
        vocab_size=sizes.vocab, tie_word_embeddings=sizes.tied, max_position_embeddings=40000)
    config.save_pretrained(folder)
    base = Path(__file__).parent.parent / "toy" / "base"
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(base / file, folder)
    return Path(folder)


@contextlib.contextmanager
def fake_ranks(n: int):
    """A process group of `n` ranks of which only the first is there: its collectives return at once, unchanged."""
    if n == 1:
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore
    torch_dist.init_process_group("fake", rank=0, world_size=n, store=FakeStore())
    mesh = torch_dist.init_device_mesh("cpu", (n,))
    with replaced(torch_dist, "init_device_mesh", lambda *_: mesh):
        try:
            yield
        finally:
            torch_dist.destroy_process_group()


def local_bytes(tensors) -> int:
    """Of the parts that this rank holds."""
    return sum(getattr(x, "_local_tensor", x).nbytes for x in tensors)


def one_pack(tape, tokens: int):
    """A pack of one sequence of `tokens` tokens, of which all but a prompt of 150 are scored."""
    tape.lengths = [tokens]
    return pack_sequences([([1] * tokens, min(150, tokens - 1))], "cuda")


def train_case(case: Case, directory, card) -> dict:
    """The second pack of a step: gradients of the first are there, and Adam's moments of the step before."""
    tape = card.tape
    model = load_model(directory, device="cuda", trainable=True)
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    module = distribute(TokenLogprobs(model, 1.0), common.Dist(0, case.ranks, "cuda"), case.way == "shard")
    parameters = list(module.parameters())
    memory = {"weights": local_bytes(parameters)}
    memory["DDP buckets"] = tape.live - memory["weights"] if case.way == "ddp" else 0

    optimizer = torch.optim.AdamW(parameters, fused=True)
    for p in parameters:
        p.grad = torch.zeros_like(p)
    before = tape.live
    optimizer.step()
    memory["optimizer"] = tape.live - before
    optimizer.zero_grad(set_to_none=True)

    for last in (False, True):
        tape.peak = tape.live
        tape.work.clear()
        card.trapped = True
        with gradient_sync(module, last):
            logp, entropy = module(one_pack(tape, case.tokens))
            (-logp.mean() * case.ranks).backward()
        card.trapped = False
        del logp, entropy
    memory["gradients"] = local_bytes(p.grad for p in parameters)
    memory["activations and work"] = tape.peak - sum(memory.values())
    work = {**tape.work, "optimizer": Work(bytes=STEP_BYTES * memory["weights"] / 4, kernels=len(parameters))}
    return {"memory": memory, "work": work}


@torch.no_grad()
def score_case(case: Case, directory, card) -> dict:
    """A frozen model reads one pack: scoring, reference, entropy."""
    tape = card.tape
    model = load_model(directory, device="cuda")
    weights = local_bytes(model.parameters())
    tape.peak = tape.live
    tape.work.clear()
    card.trapped = True
    token_logprobs(model, one_pack(tape, case.tokens), 1.0, entropy=True)
    card.trapped = False
    return {"memory": {"weights": weights, "activations and work": tape.peak - weights}, "work": dict(tape.work)}


def trace(case: Case) -> dict:
    """-> {"memory": part -> bytes of one card at the peak, "work": kind -> Work of one pack (optimizer: of one step)}"""
    sizes = plan.KNOWN[case.model]
    run = score_case if case.way == "frozen" else train_case
    with tempfile.TemporaryDirectory() as folder, fake_ranks(case.ranks):
        directory = paper_directory(case.model, folder)
        with pretended_card(sizes.vocab, sizes.hidden) as card:
            return run(case, directory, card)


# --------------------------------------------------------------------------------------------------------- roofline

PEAK_FLOPS, BANDWIDTH = 989e12, 3.35e12                                             # H100 SXM, bf16 dense; bytes/s
SHARES = {"products": 0.7, "output products": 0.7, "attention": 0.5}                # of the peak; all else: of the bandwidth
MEMORY_SHARE, KERNEL_SECONDS = 0.8, 4e-6


def seconds(kind: str, work: Work) -> float:
    """The larger of a kind's two times, and its launches."""
    computing = work.flops / (PEAK_FLOPS * SHARES.get(kind, 1))
    moving = work.bytes / (BANDWIDTH * MEMORY_SHARE)
    return max(computing, moving) + work.kernels * KERNEL_SECONDS


def show(case: Case, found: dict):
    print(f"{case.model}, {case.way} on {case.ranks} cards, a pack of one sequence of {case.tokens:,} tokens, "
          f"checkpointing {'on' if case.checkpointing else 'off'}")
    memory = found["memory"]
    print("a card's memory at the peak, GB: "
          + " + ".join(f"{part} {size / 1e9:.1f}" for part, size in memory.items() if size)
          + f" = {sum(memory.values()) / 1e9:.1f}")
    times = {kind: seconds(kind, work) for kind, work in found["work"].items()}
    whole = sum(time for kind, time in times.items() if kind != "optimizer")
    print(f"{'kind of kernel':20} {'kernels':>8} {'TFLOP':>9} {'GB moved':>9} {'seconds':>8}  share of the pack")
    for kind, work in sorted(found["work"].items(), key=lambda pair: -times[pair[0]]):
        share = "(once a step)" if kind == "optimizer" else f"{times[kind] / whole:.0%}"
        print(f"{kind:20} {work.kernels:8,} {work.flops / 1e12:9.1f} {work.bytes / 1e9:9.1f} {times[kind]:8.3f}  {share}")
    print(f"a pack {whole:.2f} s, {case.tokens / whole:,.0f} tokens/s on a card, by the roofline: predicted, not measured")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="1.5b")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--ranks", type=int, default=8, help="cards under DDP")
    parser.add_argument("--shards", type=int, default=0, help="cards under fully_shard (0: DDP)")
    parser.add_argument("--no-checkpointing", action="store_true")
    parser.add_argument("--frozen", action="store_true", help="a model that scores, and is not trained")
    args = parser.parse_args(argv)
    way = "frozen" if args.frozen else "shard" if args.shards else "ddp" if args.ranks > 1 else "one"
    ranks = 1 if args.frozen else args.shards or args.ranks
    case = Case(MODELS[args.model], way, args.tokens, ranks, not args.no_checkpointing)
    show(case, trace(case))


if __name__ == "__main__":
    main()
