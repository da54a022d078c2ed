"""What only a card reaches, run on fake tensors at the paper's sizes: shapes, types, places,
memory.

The stages' own functions run over a pretended card (tools/trace.py says what is pretended and what
cannot be seen that way). A kernel of the wrong type, a tensor of the host that meets the card's, a
tensor of tokens x vocabulary, or a wait for the card inside a step stops the test at the line; the
last tests here take a cast away, write full logits, or ask for a number, and see it stopped.
"""

import contextlib
import importlib
import inspect

import numpy as np
import pytest
import torch

import common
import engines
import model as model_room
from model import TokenLogprobs, clip_gradient, distribute, load_model
from tools import plan, recipe, roofline, trace
from tools.sizes import KNOWN

pytestmark = pytest.mark.slow

score = importlib.import_module("02_verify_score")
train = importlib.import_module("03_train_oxa")
rlvr = importlib.import_module("04_rlvr")
evaluate = importlib.import_module("05_eval")

BF16 = {torch.bfloat16}
SMALL = "Qwen2.5-Math-1.5B"
LARGE = "Qwen2.5-Math-7B"


@contextlib.contextmanager
def pretended(name, folder, ranks=1, layers=None):
    """(the card, a directory of the model without weights)"""
    sizes = KNOWN[name]
    with trace.fake_ranks(ranks):
        directory = trace.paper_directory(name, folder, layers)
        with trace.pretended_card(sizes.vocab, sizes.hidden) as card:
            yield card, directory


def sequences_of(lengths, start=150):
    return [([1] * n, start) for n in lengths]


def trained(directory, dist, shard=False):
    """As 03 and 04 set it up: (model, policy, optimizer)."""
    model = load_model(directory, device=dist.device, trainable=True)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    policy = distribute(TokenLogprobs(model), dist, shard)
    return model, policy, torch.optim.AdamW(model.parameters(), fused=True)


# ------------------------------------------------------------------------------ 02: scoring, frozen


def test_score(tmp_path):
    """A pack of 65,536 tokens and a second one; the host waits after the last kernel, not
    before."""
    with pretended(SMALL, tmp_path) as (card, directory):
        model = load_model(directory, device="cuda")
        linear = model.model.layers[0].mlp.up_proj.weight
        assert linear.dtype == torch.bfloat16
        assert model.model.norm.weight.dtype == torch.float32
        card.tape.lengths = [32768, 32768]
        sequences = sequences_of([32768, 32768, 9000, 1], start=1)
        nll, n_scored = score.response_nll(model, sequences, 65536, "cuda")
        assert nll.shape == (4,)
        assert n_scored.tolist() == [32767, 32767, 8999, 0]
        assert card.tape.product_types == BF16
        assert card.tape.peak < 20e9
        first = min(n_kernels for _, n_kernels in card.syncs)
        assert first > card.tape.n_kernels - 5, "the host waits when all packs are launched"


# ----------------------------------------------------------------------------------- 03: a step


def training_data(folder, lengths, is_ul):
    """The tokenized set as 03 leaves it on disk."""
    borders = np.concatenate([[0], np.cumsum(lengths)])
    np.zeros(borders[-1], dtype=np.int32).tofile(folder / "tokens.bin")
    np.savez(folder / "tokens.npz", key="", borders=borders, starts=[150] * len(lengths),
             is_ul=is_ul, sids=[f"s{i}" for i in range(len(lengths))])
    return train.Data(folder)


def no_waits(card, monkeypatch, stage):
    """From the first micro-batch of a step to its sums, the host may not wait for the card."""
    around, fetch = stage.gradient_sync, common.sum_over_ranks

    def begin(policy, is_last):
        card.trapped = True
        return around(policy, is_last)

    def end(sums):
        card.trapped = False
        return fetch(sums)

    monkeypatch.setattr(stage, "gradient_sync", begin)
    monkeypatch.setattr(common, "sum_over_ranks", end)


def one_step_of_03(card, directory, folder, monkeypatch, dist, shard=False, lengths=None):
    """Three packs, the longest when a gradient is there, the last one idle; clipping and AdamW."""
    lengths = lengths or [32767, 15000, 9000, 700]
    args = train.parse_args(["--model", "m", "--data", "d", "--out", "o"])
    data = training_data(folder, lengths, is_ul=[False, False, True, True])
    batch = np.arange(len(lengths))
    weights = train.token_weights(data, batch, "sequence")
    model, policy, optimizer = trained(directory, dist, shard)
    no_waits(card, monkeypatch, train)
    packs = [[1, 2, 3], [0], []]
    card.tape.peak = card.tape.live
    sums = train.accumulate_gradient(policy, data, packs, weights, args, dist)
    peak = card.tape.peak
    assert not card.trapped
    assert set(sums) == {"ce_loss", "ul_loss", "entropy_ce", "entropy_ul", "n_ce", "n_ul"}
    before = len(card.syncs)
    assert clip_gradient(model, 1.0) == 1.0
    assert len(card.syncs) == before + 1
    optimizer.step()
    return model, optimizer, peak


def traced_row(name, way, tokens):
    """Memory by part in tools/trace.json."""
    return next(row["memory"] for row in roofline.traces()
                if (row["model"], row["way"], row["tokens"]) == (name, way, tokens))


def check_masters(model, optimizer):
    """Weights, gradients and moments in float32, on the card."""
    for name, weight in model.named_parameters():
        assert weight.dtype == weight.grad.dtype == torch.float32, name
        assert weight.grad.shape == weight.shape, name
        for moment in ("exp_avg", "exp_avg_sq"):
            assert optimizer.state[weight][moment].dtype == torch.float32, name


def test_step_of_03_under_ddp(tmp_path, monkeypatch):
    with pretended(SMALL, tmp_path, ranks=8) as (card, directory):
        dist = common.Dist(0, 8, "cuda:0")
        card.tape.lengths = [32767]
        model, optimizer, peak = one_step_of_03(card, directory, tmp_path, monkeypatch, dist)
        check_masters(model, optimizer)
        assert card.tape.product_types == BF16
        # no moments before the first step
        row = traced_row(SMALL, "ddp", 32768)
        assert peak == pytest.approx(sum(row.values()) - row["optimizer"], rel=0.05)


def test_step_of_03_sharded(tmp_path, monkeypatch):
    """7B over 8 cards: each holds an eighth, and gathers bf16 a layer at a time."""
    with pretended(LARGE, tmp_path, ranks=8) as (card, directory):
        dist = common.Dist(0, 8, "cuda:0")
        card.tape.lengths = [32767]
        model, optimizer, peak = one_step_of_03(card, directory, tmp_path, monkeypatch, dist,
                                                shard=True)
        check_masters(model, optimizer)
        held = sum(p.to_local().nbytes for p in model.parameters())
        assert held == pytest.approx(4 * KNOWN[LARGE].n_params / 8, rel=1e-3)
        assert card.tape.product_types == BF16
        row = traced_row(LARGE, "shard", 32768)
        assert peak == pytest.approx(sum(row.values()) - row["optimizer"], rel=0.05)


# ----------------------------------------------------------------------------------- 04: a step


class FakeVLLM:
    """Writes down what vLLM is asked for, and what it would load."""

    def __init__(self):
        self.calls = []
        self.loaded = {}

    def wake_up(self, tags):
        self.calls.append(("wake_up", *tags))

    def apply_model(self, function):
        self.calls.append("load")
        function(self)

    def load_weights(self, weights):
        self.loaded = {name: (list(w.shape), w.dtype, type(w)) for name, w in weights}

    def reset_prefix_cache(self):
        self.calls.append("reset")
        return True


def vllm_engine():
    """A VLLMEngine that sleeps, with vLLM's calls written down."""
    engine = object.__new__(engines.VLLMEngine)
    engine.llm = FakeVLLM()
    engine.asleep = True
    engine.may_sleep = True
    return engine


def checkpoint_shapes(sizes):
    """Names and shapes of a Qwen2 checkpoint on the hub, which vLLM's loader reads."""
    hidden, width, kv_width, inter = sizes.hidden, sizes.width, sizes.kv_width, sizes.inter
    shapes = {"model.embed_tokens.weight": [sizes.vocab, hidden], "model.norm.weight": [hidden]}
    if not sizes.tied:
        shapes["lm_head.weight"] = [sizes.vocab, hidden]
    for n in range(sizes.layers):
        layer = f"model.layers.{n}"
        for name, size in (("q", width), ("k", kv_width), ("v", kv_width)):
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = [size, hidden]
            shapes[f"{layer}.self_attn.{name}_proj.bias"] = [size]
        shapes[f"{layer}.self_attn.o_proj.weight"] = [hidden, width]
        shapes[f"{layer}.mlp.gate_proj.weight"] = [inter, hidden]
        shapes[f"{layer}.mlp.up_proj.weight"] = [inter, hidden]
        shapes[f"{layer}.mlp.down_proj.weight"] = [hidden, inter]
        shapes[f"{layer}.input_layernorm.weight"] = [hidden]
        shapes[f"{layer}.post_attention_layernorm.weight"] = [hidden]
    return shapes


def drawn_rollouts(n_problems, group, prompt, lengths):
    rollouts = []
    for p in range(n_problems):
        for g in range(group):
            n = lengths[g % len(lengths)]
            rollouts.append(rlvr.Rollout(
                pid=f"p{p}", g=g, prompt_ids=[p + 1] * prompt, ids=[5] * n, finish="stop",
                logp_engine=torch.full([n], -1.0), response=""))
    return rollouts


def one_step_of_04(name, folder, monkeypatch, argv, shard):
    """Reference, update and sync of a batch: long rollouts, and short ones that share a prompt."""
    args = rlvr.parse_args(["--model", "m", "--problems", "p", "--out", "o", *argv])
    with pretended(name, folder, ranks=8) as (card, directory):
        dist = common.Dist(0, 8, "cuda:0")
        card.tape.lengths = [18432]
        model, policy, optimizer = trained(directory, dist, shard)
        reference = load_model(directory, device=dist.device)
        rollouts = drawn_rollouts(2, 4, prompt=300, lengths=[16000, 1, 900, 2000])

        with card.no_sync():
            ref_logps = rlvr.score(reference, rollouts, args, dist.device)
        assert [len(logp) for logp in ref_logps] == [16000, 1, 900, 2000] * 2

        rewards = torch.tensor([1.0, 0.0, 0.0, 1.0] * 2)
        advantages = rlvr.group_advantages(rewards, 4)
        weights = torch.full([8], 1 / 37802)
        no_waits(card, monkeypatch, rlvr)
        n_packs = len(rlvr.plan_rollouts(rollouts, range(8), args))
        # another rank has one pack more: this one runs a stand-in
        monkeypatch.setattr(common, "all_reduce_max", lambda x: n_packs + 1)
        card.tape.peak = card.tape.live
        stats, logps = rlvr.accumulate_gradient(policy, rollouts, advantages, weights, ref_logps,
                                                None, args, dist)
        assert stats["entropy"] > 0
        assert all(logp.dtype == torch.float32 for logp in logps)
        peak = card.tape.peak
        clip_gradient(model, 1.0)
        optimizer.step()
        check_masters(model, optimizer)
        assert card.tape.product_types == BF16

        engine = vllm_engine()
        engine.sync(model)
        assert engine.llm.calls == [("wake_up", "weights"), "load", "reset",
                                    ("wake_up", "kv_cache")]
        loaded = engine.llm.loaded
        shapes = checkpoint_shapes(KNOWN[name])
        assert {key: shape for key, (shape, _, _) in loaded.items()} == shapes
        assert not any(hasattr(kind, "full_tensor") for _, _, kind in loaded.values())
        return peak


def test_step_of_04_under_ddp(tmp_path, monkeypatch):
    peak = one_step_of_04(SMALL, tmp_path, monkeypatch, ["--token-budget", "20480"], shard=False)
    assert peak < 50e9


def test_step_of_04_sharded(tmp_path, monkeypatch):
    peak = one_step_of_04(LARGE, tmp_path, monkeypatch, ["--token-budget", "18432"], shard=True)
    assert peak < 60e9


# ----------------------------------------------------------------------------------- 05: entropy


def test_entropy_of_05(tmp_path, monkeypatch):
    """Two packs; the host waits after each, not inside."""
    measure = evaluate.token_logprobs
    with pretended(SMALL, tmp_path) as (card, directory):
        def without_waits(*args, **kwargs):
            with card.no_sync():
                return measure(*args, **kwargs)

        monkeypatch.setattr(evaluate, "token_logprobs", without_waits)
        model = load_model(directory, device="cuda")
        sums = evaluate.entropy_sums(model, sequences_of([32000, 700, 9000]), 32768, "cuda")
        assert sums.shape == (3,)
        assert card.tape.product_types == BF16
        assert card.syncs


# ------------------------------------------------------------ what is wrong is stopped: two layers


def rewritten(function, old: str, new: str):
    """The function with one piece of its source replaced, in its own module."""
    source = inspect.getsource(function)
    assert source.count(old) == 1, f"{function.__name__} no longer has: {old}"
    names = vars(inspect.getmodule(function))
    made = {}
    exec(source.replace(old, new), names, made)
    return made[function.__name__]


def short_step(tmp_path, monkeypatch):
    with pretended(SMALL, tmp_path, ranks=8, layers=2) as (card, directory):
        one_step_of_03(card, directory, tmp_path, monkeypatch, common.Dist(0, 8, "cuda:0"),
                       lengths=[9000, 3000, 900, 700])
        return card.tape


def test_the_short_step_passes(tmp_path, monkeypatch):
    """What follows changes one line of it each."""
    assert short_step(tmp_path, monkeypatch).product_types == BF16


def test_a_cast_taken_from_the_attention_is_stopped(tmp_path, monkeypatch):
    changed = rewritten(model_room.varlen_attention, "x.to(torch.bfloat16)", "x")
    monkeypatch.setattr(model_room, "varlen_attention", changed)
    with pytest.raises(trace.WrongType, match="takes bfloat16"):
        short_step(tmp_path, monkeypatch)


@pytest.mark.parametrize("old, new", [("hidden = hidden.to(torch.bfloat16)", "pass"),
                                      ("enabled=bf16", "enabled=False")])
def test_a_cast_taken_from_the_primitive_is_seen(old, new, tmp_path, monkeypatch):
    changed = rewritten(model_room.token_logprobs, old, new)
    monkeypatch.setattr(model_room, "token_logprobs", changed)
    assert torch.float32 in short_step(tmp_path, monkeypatch).product_types


def test_full_logits_are_stopped(tmp_path, monkeypatch):
    old = "    return OutputLayer.apply("
    new = "    logits = hidden @ weight.to(hidden.dtype).T\n" + old
    changed = rewritten(model_room.token_logprobs, old, new)
    monkeypatch.setattr(model_room, "token_logprobs", changed)
    with pytest.raises(trace.FullLogits, match="151936"):
        short_step(tmp_path, monkeypatch)


@pytest.mark.parametrize("question", ["loss.item()", "float(ce_loss)", "logp.cpu()", "logp[is_ul]",
                                      "torch.nonzero(is_ul)", "bool(loss > 0)", "weight.tolist()"])
def test_a_wait_inside_the_step_is_stopped(question, tmp_path, monkeypatch):
    old = "            (loss * dist.world).backward()"
    changed = rewritten(train.accumulate_gradient, old, f"            {question}\n{old}")
    monkeypatch.setattr(train, "accumulate_gradient", changed)
    with pytest.raises(trace.HostSync):
        short_step(tmp_path, monkeypatch)


def test_a_tensor_that_stayed_on_the_host_is_stopped(tmp_path, monkeypatch):
    changed = rewritten(train.accumulate_gradient, "torch.tensor(of_row, device=dist.device)",
                        "torch.tensor(of_row)")
    monkeypatch.setattr(train, "accumulate_gradient", changed)
    with pytest.raises(trace.TwoDevices):
        short_step(tmp_path, monkeypatch)


# ------------------------------------------------------------------ traces, their cache, and --plan


def test_cache_is_what_is_traced():
    """The smallest case anew: exact in what the code decides; kernels may differ between
    versions."""
    stored = next(row for row in roofline.traces()
                  if (row["model"], row["way"], row["tokens"]) == ("Qwen2.5-0.5B", "one", 8192))
    found = trace.as_row(trace.Case("Qwen2.5-0.5B", "one", 8192), trace.trace(
        trace.Case("Qwen2.5-0.5B", "one", 8192)))
    assert sum(found["memory"].values()) == pytest.approx(sum(stored["memory"].values()), rel=0.02)
    for kind, (flops, moved, kernels) in stored["work"].items():
        assert found["work"][kind] == pytest.approx([flops, moved, kernels], rel=0.05), kind


def test_every_shipped_case_is_in_the_cache():
    stored = {(row["model"], row["way"], row["tokens"], row["ranks"], row["checkpointing"])
              for row in roofline.traces()}
    wanted = {(c.model, c.way, c.tokens, c.ranks, c.checkpointing) for c in trace.shipped_cases()}
    assert stored == wanted


RECIPES = {"paper_1.5b": 8, "paper_7b": 8, "smoke_1gpu": 1}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("section", ["train", "rlvr"])
def test_memory_of_the_plan_is_the_traced(name, section):
    """Within 5 %, with the pack that the recipe names."""
    plans = plan.Plan(recipe.load_recipe(f"recipes/{name}.toml"), RECIPES[name])
    s = plans.settings(section)
    way = "one" if RECIPES[name] == 1 else "shard" if s["shard"] else "ddp"
    row = next(row for row in roofline.traces() if row["tokens"] == s["token_budget"]
               and (row["way"], row["checkpointing"]) == (way, s["gradient_checkpointing"])
               and row["model"] == plans.base_name.split("/")[-1])
    planned = plans.cost(section, s).memory
    traced = sum(row["memory"].values())
    assert sum(planned[part] for part in row["memory"]) == pytest.approx(traced, rel=0.05)


def test_hours_are_a_range_and_rise_with_what_is_assumed():
    loaded = recipe.load_recipe("recipes/paper_1.5b.toml")
    slow, fast = (plan.Plan(loaded, 8, end) for end in (roofline.PESSIMIST, roofline.OPTIMIST))
    hours = [plans.cost("train", plans.settings("train")).seconds for plans in (slow, fast)]
    assert hours[0] > 1.2 * hours[1] > 0
    faster = {**loaded, "plan": {**loaded["plan"], "attention_share": 0.9}}
    better = plan.Plan(faster, 8, roofline.PESSIMIST)
    assert better.cost("train", better.settings("train")).seconds < hours[0]


def test_attention_of_short_sequences_is_cheaper():
    pack = roofline.traced_pack(KNOWN[SMALL], "ddp", True, 32768, 8)
    p = roofline.at_end(roofline.ASSUMED, roofline.OPTIMIST)
    long, short = (roofline.pack_seconds(pack, 32768, n, p) for n in (32768, 4096))
    assert short["attention"] < long["attention"] / 4
    assert short["products"] == long["products"]
