"""A training step traced on fake tensors: its peak memory by part, its time by kind of kernel.

    python -m tools.trace --model 1.5b --tokens 32768            a pack on one of 8 cards, DDP
    python -m tools.trace --model 7b --tokens 32768 --shards 8   the same, fully_shard over 8 cards
    python -m tools.trace --write                                renews the file that `--plan` reads

The code of the step is the real one (`load_model`, `distribute`, `TokenLogprobs`, AdamW) at the
model's real sizes; the tensors have shapes, types and storages but no numbers, so it needs no card,
no weights and some seconds.

What a trace cannot see: which operations CUDA's autocast casts (the CPU's list answers for it),
kernels' workspaces, the allocator's rounding and fragmentation, memory that waits for another
stream, the CUDA context (about 0.5 GB), alignment rules, clocks, and anything that a kernel
computes. A roofline (tools/roofline.py) is a bound at an assumed share of the peak, not a
measurement.
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

import numpy as np
import torch
import torch.distributed as torch_dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
import transformers

import model as model_room
from model import (
    TokenLogprobs, distribute, gradient_sync, load_model, pack_sequences, token_logprobs)
from tools import roofline
from tools.roofline import ASSUMED, Work
from tools.sizes import KNOWN

MODELS = {"135m": "SmolLM2-135M-Instruct", "0.5b": "Qwen2.5-0.5B", "1.5b": "Qwen2.5-Math-1.5B",
          "7b": "Qwen2.5-Math-7B"}


# ----------------------------------------------------------------------------- a card is pretended


class HostSync(AssertionError):
    """The host would wait for the card here."""


class TwoDevices(AssertionError):
    """A tensor of the card meets one of the host."""


class FullLogits(AssertionError):
    """A tensor of (nearly) all tokens x vocabulary."""


class WrongType(AssertionError):
    """A kernel gets numbers of a type that it does not take."""


# What a tensor of the card answers when the host asks for its numbers: there are none, so ones.
ANSWERS = {torch.Tensor.item: lambda x: x.dtype.is_floating_point and 1.0 or 1,
           torch.Tensor.tolist: lambda x: np.ones(x.shape).tolist(),
           torch.Tensor.numpy: lambda x: np.ones(x.shape),
           torch.Tensor.__float__: lambda x: 1.0,
           torch.Tensor.__int__: lambda x: 1,
           torch.Tensor.__index__: lambda x: 1,
           torch.Tensor.__bool__: lambda x: True}
# The shape of their results is known to the card alone.
OPEN_SHAPES = {torch.Tensor.nonzero, torch.nonzero, torch.Tensor.unique, torch.unique,
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
    """Tensors of the host are real; `device="cuda"` is answered by fake ones on the CPU, whose
    storages the tape remembers as the card's.

    Where the host asks for numbers it would wait for the card: answered with ones, and noted in
    `syncs` with the number of kernels before it; inside `no_sync`, HostSync. Copies from the host
    to the card are let through: each pack's indices are made on the host.
    """

    def __init__(self, tape, fake_mode):
        super().__init__()
        self.tape, self.fake_mode = tape, fake_mode
        self.trapped = False
        self.loading = False        # a model: its tensors have no numbers, not even on the host
        self.syncs = []

    @contextlib.contextmanager
    def no_sync(self):
        self.trapped = True
        try:
            yield
        finally:
            self.trapped = False

    def asks_for_numbers(self, function, args, to_host: bool) -> bool:
        subject = args[0] if args else None
        if not isinstance(subject, FakeTensor) or self.tape.place(subject) == "host":
            return False
        if function is torch.Tensor.__getitem__:
            return any(is_mask(index) for index in tree_leaves(args[1]))
        return to_host or function in ANSWERS or function in OPEN_SHAPES

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (torch._C._nn._parse_to, torch.device):        # they only read their words
            return function(*args, **kwargs)
        arguments = tree_leaves((args, kwargs))
        to_card = any(as_cpu(a) is not a for a in arguments)
        has_fakes = any(isinstance(a, FakeTensor) for a in arguments)
        names_device = to_card or kwargs.get("device") is not None
        if not (has_fakes or names_device or self.loading):
            with unset_fake_temporarily():
                return function(*args, **kwargs)
        to_host = function is torch.Tensor.cpu
        if function is torch.Tensor.to:
            to_host = any(names_host(a) for a in arguments)
        if self.asks_for_numbers(function, args, to_host):
            if self.trapped:
                raise HostSync(f"{function.__name__} of a tensor of the card: the host waits")
            self.syncs.append((function.__name__, self.tape.n_kernels))
        if function in ANSWERS and isinstance(args[0], FakeTensor):
            return ANSWERS[function](args[0])
        named = {key: as_cpu(value) for key, value in kwargs.items()}
        out = function(*map(as_cpu, args), **named)
        if to_card and isinstance(out, torch.Tensor):
            if not isinstance(out, FakeTensor):
                out = self.fake_mode.from_tensor(out)
            self.tape.put(out, "card")
        if to_host:
            out = out.clone()
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
                if new.dtype == old.dtype:
                    continue
                if owner is part._parameters:
                    new = torch.nn.Parameter(new, old.requires_grad)
                owner[name] = new
    return module


# --------------------------------------------------------------------------------- what is counted


GATHERS = ("embedding", "index", "gather", "index_select", "slice_backward", "select_backward")
NO_KERNELS = ("_unsafe_view", "detach", "alias", "lift_fresh", "device")


def kind_of(function, region: str | None) -> str:
    """A kind of tools/roofline.py; those of the output layer apart."""
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
    if name in NO_KERNELS or name.startswith(("empty", "new_empty")):
        return True
    aliased = [r.alias_info for r in function._schema.returns if r.alias_info is not None]
    return bool(aliased) and not any(a.is_write for a in aliased)


def moved_bytes(x) -> int:
    """Of one tensor: an expanded one is read once."""
    return min(x.nbytes, x.untyped_storage().nbytes())


class Tape(TorchDispatchMode):
    """Live bytes and their peak by storage, work by kind of kernel, and where each storage is:
    "card", "host" or unknown."""

    def __init__(self, vocab: int, hidden: int):
        super().__init__()
        self.vocab, self.hidden = vocab, hidden
        self.sizes = {}                 # storage -> bytes
        self.places = {}                # storage -> "card" or "host"
        self.live = self.peak = 0
        self.work = {}
        self.n_kernels = 0
        self.product_types = set()
        self.region = None
        self.lengths = []               # of the sequences in the pack: the cost of attention

    # --- where a tensor is

    def place(self, x):
        if not isinstance(x, FakeTensor):
            return "host"
        return self.places.get(x.untyped_storage()._cdata)

    def put(self, x, place: str):
        self.places[x.untyped_storage()._cdata] = place

    def same_place(self, function, inputs) -> str | None:
        """Place of the output. A host tensor with dimensions may only be copied, or index."""
        places = {self.place(x) for x in inputs}
        name = function._schema.name
        apart = [x for x in inputs if x.dim() and self.place(x) == "host"]
        if name == "aten::index":
            apart = [x for x in apart if x is inputs[0]]
        if "card" in places and apart and name not in ("aten::copy_", "aten::_to_copy"):
            raise TwoDevices(f"{function}: {list(apart[0].shape)} of the host meets the card")
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
        self.n_kernels += 1
        self.check_types(function, inputs)
        short = function._schema.name.split("::")[-1]
        if short in GATHERS:
            moved = 2 * sum(moved_bytes(x) for x in outputs)
        else:
            moved = sum(moved_bytes(x) for x in [*inputs, *outputs])
        work = self.work.setdefault(kind_of(function, self.region), Work())
        work.flops += self.flops(function, args, kwargs, out)
        work.bytes += moved
        work.kernels += 1

    def check_types(self, function, inputs):
        """The attention kernel takes bf16 (or half) alone; the types of products are kept."""
        types = {x.dtype for x in inputs if x.dtype.is_floating_point}
        name = function._schema.name
        if name == "torch_attn::_varlen_attn" and types != {torch.bfloat16}:
            raise WrongType(f"{function} takes bfloat16, and gets {types}")
        if function._overloadpacket in flop_registry and not name.startswith("torch_attn"):
            self.product_types |= types

    def refuse_full_logits(self, function, outputs):
        for x in outputs:
            wide = self.vocab in x.shape and x.numel() > 2**28
            if wide and x.numel() != self.vocab * self.hidden:
                raise FullLogits(f"{function} makes {list(x.shape)}: tokens x vocabulary")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(t not in (torch.Tensor, torch.nn.Parameter, FakeTensor) for t in types):
            return NotImplemented                    # a DTensor: its parts come here
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        inputs = [x for x in tensors if isinstance(x, FakeTensor)]
        outputs = [x for x in tree_leaves(out) if isinstance(x, FakeTensor)]
        place = self.same_place(function, tensors)
        for x in outputs:
            self.seen(x, place)
        self.refuse_full_logits(function, outputs)
        self.note(function, args, kwargs, inputs, outputs, out)
        return out


# -------------------------------------------------------------------------------- the card is there


@contextlib.contextmanager
def replaced(owner, name: str, value):
    """owner.name is `value` inside."""
    is_own = name in vars(owner)
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if is_own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


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
    """Inside, `device="cuda"` is there and tensors are fake; yields a PretendedCard, whose `tape`
    counts.

    Pretended: is_cuda; autocast("cuda"), by the CPU's; weights of a checkpoint (its configuration
    is read, its tensors are made); Module.to; DDP's exchange. The head of this file says what is
    not seen.
    """
    from transformers import AutoModelForCausalLM
    tape = Tape(vocab, hidden)
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    card = PretendedCard(tape, fake_mode)
    autocast, resize = torch.autocast, torch.UntypedStorage.resize_
    ddp = torch.nn.parallel.DistributedDataParallel

    def cpu_autocast(device, *args, **kwargs):
        return autocast(as_cpu(device), *args, **kwargs)

    def noted_resize(storage, size):
        resize(storage, size)
        if storage._cdata in tape.sizes:
            tape.resized(storage._cdata, size)
        return storage

    def from_config(path, dtype, attn_implementation, **_):
        card.loading = True
        loaded = AutoModelForCausalLM.from_config(model_room.load_config(path), dtype=dtype,
                                                  attn_implementation=attn_implementation)
        card.loading = False
        return loaded, {"missing_keys": set(), "unexpected_keys": set()}

    def ddp_without_exchange(module, device_ids=None):
        wrapped = ddp(module, init_sync=False)
        wrapped.register_comm_hook(None, hand_back)
        return wrapped

    layer = model_room.OutputLayer
    forward = staticmethod(in_region(tape, "output layer", layer.forward))
    backward = staticmethod(in_region(tape, "output layer", layer.backward))
    patches = [(FakeTensor, "is_cuda", property(lambda x: tape.place(x) == "card")),
               (torch, "autocast", cpu_autocast),
               (torch.UntypedStorage, "resize_", noted_resize),
               (torch.nn.Module, "_apply", apply_to_fakes),
               (torch.nn.parallel, "DistributedDataParallel", ddp_without_exchange),
               (AutoModelForCausalLM, "from_pretrained", from_config),
               (layer, "forward", forward),
               (layer, "backward", backward)]
    with contextlib.ExitStack() as stack:
        for owner, name, value in patches:
            stack.enter_context(replaced(owner, name, value))
        stack.enter_context(fake_mode)
        stack.enter_context(tape)
        stack.enter_context(card)
        yield card


# --------------------------------------------------------------------------------- a step is traced

# Moved at the end of a step, a float32 weight: clipping reads g, reads and writes g; AdamW reads p,
# g, m, v and writes p, m, v.
STEP_BYTES = 40


@dataclasses.dataclass(frozen=True)
class Case:
    """One traced setting: a pack of one sequence of `tokens` tokens, on one card of `ranks`."""
    model: str                       # name in KNOWN
    way: str                         # "ddp", "shard", "one" (card), "frozen" (scored, not trained)
    tokens: int
    ranks: int = 1
    checkpointing: bool = True


def paper_directory(name: str, folder, layers: int | None = None) -> Path:
    """A model directory without weights: the configuration after tools/prepare_base.py (or fewer
    `layers`), and the toy's tokenizer."""
    from transformers import Qwen2Config
    sizes = KNOWN[name]
    config = Qwen2Config(
        architectures=["Qwen2ForCausalLM"], vocab_size=sizes.vocab, hidden_size=sizes.hidden,
        intermediate_size=sizes.inter, num_hidden_layers=layers or sizes.layers,
        num_attention_heads=sizes.heads, num_key_value_heads=sizes.kv_heads,
        tie_word_embeddings=sizes.tied, max_position_embeddings=40000)
    config.save_pretrained(folder)
    base = Path(__file__).parent.parent / "toy" / "base"
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(base / file, folder)
    return Path(folder)


@contextlib.contextmanager
def fake_ranks(n: int):
    """A process group of `n` ranks of which only the first is there: collectives return at once and
    change nothing."""
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
    """The last pack of a step: the gradient of the others is there, and Adam's moments of the step
    before."""
    tape = card.tape
    model = load_model(directory, device="cuda", trainable=True)
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    dist = common.Dist(0, case.ranks, "cuda")
    module = distribute(TokenLogprobs(model), dist, shard=case.way == "shard")
    parameters = list(module.parameters())
    memory = {"weights": local_bytes(parameters)}
    memory["DDP buckets"] = tape.live - memory["weights"] if case.way == "ddp" else 0

    optimizer = torch.optim.AdamW(parameters, fused=True)
    for p in parameters:
        p.grad = torch.zeros_like(p)
    before = tape.live
    optimizer.step()
    memory["optimizer"] = tape.live - before

    tape.peak = tape.live
    tape.work.clear()
    with gradient_sync(module, True), card.no_sync():
        logp, entropy = module(one_pack(tape, case.tokens))
        (-logp.mean() * case.ranks).backward()
    memory["gradients"] = local_bytes(p.grad for p in parameters)
    memory["activations and work"] = tape.peak - sum(memory.values())
    step_end = Work(bytes=STEP_BYTES * memory["weights"] / 4, kernels=len(parameters))
    return {"memory": memory, "work": {**tape.work, "optimizer": step_end}}


@torch.no_grad()
def score_case(case: Case, directory, card) -> dict:
    """A frozen model reads one pack: scoring, reference, entropy."""
    tape = card.tape
    model = load_model(directory, device="cuda")
    weights = local_bytes(model.parameters())
    tape.peak = tape.live
    tape.work.clear()
    with card.no_sync():
        token_logprobs(model, one_pack(tape, case.tokens), 1.0, entropy=True)
    memory = {"weights": weights, "activations and work": tape.peak - weights}
    return {"memory": memory, "work": dict(tape.work)}


def trace(case: Case) -> dict:
    """-> {"memory": part -> bytes of one card at the peak, "work": kind -> Work of one pack}, and
    of one step's end as "optimizer"."""
    sizes = KNOWN[case.model]
    run = score_case if case.way == "frozen" else train_case
    with tempfile.TemporaryDirectory() as folder, fake_ranks(case.ranks):
        directory = paper_directory(case.model, folder)
        with pretended_card(sizes.vocab, sizes.hidden) as card:
            return run(case, directory, card)


# ------------------------------------------------------------------------------- cache and printing


def shipped_cases() -> list[Case]:
    """What the recipes need: each token budget, and a shorter pack of the same kind for the line
    through both; short packs without checkpointing show what it costs."""
    tiny, small, middle, large = MODELS.values()
    cases = [Case(small, "one", n) for n in (8192, 16384)]
    cases += [Case(middle, "ddp", n, ranks=8) for n in (8192, 20480, 32768)]
    cases += [Case(large, "shard", n, ranks=8) for n in (8192, 18432, 32768)]
    cases += [Case(middle, "ddp", n, ranks=8, checkpointing=False) for n in (2048, 4096)]
    for model, budgets in ((small, (16384, 32768)), (middle, (20480, 65536)),
                           (large, (18432, 65536))):
        cases += [Case(model, "frozen", n, checkpointing=False) for n in budgets]
    for way in ("one", "frozen"):
        cases += [Case(tiny, way, n, checkpointing=False) for n in (2048, 4096)]
    return cases


def as_row(case: Case, found: dict) -> dict:
    """One case as it stands in the cache: work as [FLOPs, bytes, kernels]."""
    work = {kind: [w.flops, w.bytes, w.kernels] for kind, w in found["work"].items()}
    return {**dataclasses.asdict(case), "memory": found["memory"], "work": work}


def write_cache():
    rows = []
    for case in shipped_cases():
        rows.append(as_row(case, trace(case)))
        print(json.dumps(rows[-1]), flush=True)
    made_with = {"torch": torch.__version__, "transformers": transformers.__version__}
    lines = ",\n".join(json.dumps(row) for row in rows)
    head = json.dumps(made_with)
    roofline.CACHE.write_text(f'{{"made_with": {head}, "cases": [\n{lines}\n]}}\n')


def show(case: Case, found: dict):
    print(f"{case.model}, {case.way}, {case.ranks} cards, one sequence of {case.tokens:,} tokens, "
          f"checkpointing {'on' if case.checkpointing else 'off'}")
    memory = found["memory"]
    print("a card's memory at the peak, GB: "
          + " + ".join(f"{part} {size / 1e9:.1f}" for part, size in memory.items() if size)
          + f" = {sum(memory.values()) / 1e9:.1f}")
    work = found["work"]
    slow, fast = (
        roofline.pack_seconds(found, case.tokens, case.tokens, roofline.at_end(ASSUMED, end))
        for end in (roofline.PESSIMIST, roofline.OPTIMIST))
    total = sum(slow.values()), sum(fast.values())
    titles = ("kind of kernel", "kernels", "TFLOP", "GB moved", "seconds")
    print("{:18} {:>8} {:>8} {:>9} {:>16}  share".format(*titles))
    for kind in sorted(work, key=slow.get, reverse=True):
        w, share = work[kind], slow[kind] / total[0]
        print(f"{kind:18} {w.kernels:8,} {w.flops / 1e12:8.1f} {w.bytes / 1e9:9.1f} "
              f"{fast[kind]:6.3f} to {slow[kind]:6.3f}  {share:.0%}")
    print(f"a pack and the end of a step: {total[1]:.2f} to {total[0]:.2f} s, "
          f"{case.tokens / total[0]:,.0f} to {case.tokens / total[1]:,.0f} tokens/s on a card, "
          "by the roofline: predicted, not measured")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="1.5b")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--ranks", type=int, default=8, help="cards under DDP")
    parser.add_argument("--shards", type=int, default=0, help="cards under fully_shard (0: DDP)")
    parser.add_argument("--no-checkpointing", action="store_true")
    parser.add_argument("--frozen", action="store_true", help="a model that only scores")
    parser.add_argument("--write", action="store_true", help="trace all that the recipes need")
    args = parser.parse_args(argv)
    if args.write:
        return write_cache()
    way, ranks = ("ddp", args.ranks) if args.ranks > 1 else ("one", 1)
    if args.shards:
        way, ranks = "shard", args.shards
    checkpointing = not args.no_checkpointing
    if args.frozen:
        way, ranks, checkpointing = "frozen", 1, False
    case = Case(MODELS[args.model], way, args.tokens, ranks, checkpointing)
    show(case, trace(case))


if __name__ == "__main__":
    main()
