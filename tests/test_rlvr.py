"""Stage 4 against plain computations: advantages by hand, the loss from full logits, ranks, resume,
sync, bad models."""

import importlib
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass

import pytest
import torch

import common
from model import (
    TokenLogprobs, distribute, encode_response, encode_text, gradient_sync, latest_checkpoint,
    load_model, load_tokenizer, pack_sequences, render_prompt, token_logprobs)
import engines
from bench import rlvr_learns
from grading import verifier
from conftest import ROOT, make_model

rlvr = importlib.import_module("04_rlvr")

GROUP = 4
# Flags of every run here; a test may give some of them again, and the last one counts.
BASIC = ["--prompts-per-step", "4", "--rollouts", str(GROUP), "--max-response-tokens", "12",
         "--lr", "1e-3", "--verify-workers", "1"]
FOUR_STEPS = ["--max-steps", "4", "--save-every", "2"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def restore_signal_handlers():
    """A run in this process installs its own."""
    names = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(name) for name in names]
    yield
    for name, handler in zip(names, before):
        signal.signal(name, handler)


def write_problems(path, answers):
    """A problem p0, p1, ... for each answer; returns `path`."""
    with open(path, "w") as file:
        for i, answer in enumerate(answers):
            row = {"pid": f"p{i}", "problem": f"{i}+1=", "answer": answer, "source": "t"}
            file.write(json.dumps(row) + "\n")
    return path


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    path = tmp_path_factory.mktemp("problems") / "problems.jsonl"
    return write_problems(path, [str(i + 1) for i in range(10)])


def arguments(model, problems, out, more):
    """The command line of 04."""
    return ["--model", str(model), "--problems", str(problems), "--out", str(out),
            *BASIC, *map(str, more)]


def configure(*more):
    """The args of a run, for calls of single functions."""
    return rlvr.parse_args(arguments("m", "p", "o", more))


def run(model, problems, out, *more):
    """04 in this process; returns the rows of its metrics.jsonl."""
    rlvr.main(arguments(model, problems, out, more))
    return list(common.read_jsonl(out / "metrics.jsonl"))


def refusal(capsys, model, problems, out, *more):
    """What 04 says on stderr when it refuses, with exit status 2."""
    with pytest.raises(SystemExit) as stop:
        run(model, problems, out, *more)
    assert stop.value.code == 2
    return capsys.readouterr().err


def torchrun(script, *more):
    """Run the script to its end on two ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc_per_node", "2", str(script), *map(str, more)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]


def fixed_rollouts(n_groups, cut_group=None):
    """(rollouts of random tokens, rewards [R]), the same in every call.

    Responses have 1 to 9 tokens, the first of a group always 1, and the engine's log-probs are near
    -5. Rewards are 0 or 1, in group 1 all 1. The third of each group was cut, and all of
    `cut_group`.
    """
    generator = torch.Generator().manual_seed(0)

    def random_tokens(n):
        return torch.randint(259, (n,), generator=generator).tolist()

    rollouts = []
    rewards = []
    for p in range(n_groups):
        prompt = random_tokens(3 + p)
        for g in range(GROUP):
            length = 1
            if g > 0:
                length = int(torch.randint(1, 10, (1,), generator=generator))
            reward = 1.0
            if p != 1:
                reward = float(torch.rand(1, generator=generator) < 0.5)
            logp_engine = -5 + 0.3 * torch.randn(length, generator=generator)
            is_cut = g == 2 or p == cut_group
            rollouts.append(rlvr.Rollout(pid=f"p{p}",
                                         g=g,
                                         prompt_ids=prompt,
                                         ids=random_tokens(length),
                                         finish="length" if is_cut else "stop",
                                         logp_engine=logp_engine,
                                         response=""))
            rewards.append(reward)
    return rollouts, torch.tensor(rewards)


def accumulate(policy, rollouts, rewards, args, reference=None, old_logps=None):
    """A step of 04 on one rank, from its rewards to its gradient: (stats, logps)."""
    dist = common.Dist()
    advantages = rlvr.group_advantages(rewards, args.rollouts, args.advantage)
    weights = rlvr.token_weights(rollouts, args, dist.device)
    ref_logps = None
    if reference is not None:
        ref_logps = rlvr.score(reference, rollouts, args, dist.device)
    return rlvr.accumulate_gradient(policy, rollouts, advantages, weights, ref_logps, old_logps,
                                    args, dist)


def flat_gradient(module):
    """The gradients of all parameters, end to end; those that are sharded are put together."""
    parts = []
    for p in module.parameters():
        grad = p.grad
        if hasattr(grad, "full_tensor"):
            grad = grad.full_tensor()
        parts.append(grad.flatten())
    return torch.cat(parts)


# ------------------------------------------------------------------------------------ 4 advantages

STD = 0.5 + 1e-6        # of the rewards 1, 0, 0, 0: their mean is 1/4, and sqrt(0.75 / 3) = 1/2


@pytest.mark.parametrize("kind, rewards, expected", [
    ("grpo", [1, 0, 0, 0], [0.75 / STD, -0.25 / STD, -0.25 / STD, -0.25 / STD]),
    ("grpo", [1, 1], [0, 0]),
    ("grpo", [0, 0, 0], [0, 0, 0]),
    ("grpo", [1], [1 / (1 + 1e-6)]),
    ("grpo", [0], [0]),
    ("dr_grpo", [1, 0, 0, 0], [0.75, -0.25, -0.25, -0.25]),
    ("dr_grpo", [1, 1, 1], [0, 0, 0]),
    ("dr_grpo", [1], [1]),
])
def test_advantages_equal_values_by_hand(kind, rewards, expected):
    """Two groups with the same rewards: neither changes the other's advantages."""
    two_groups = torch.tensor(rewards + rewards).float()
    advantages = rlvr.group_advantages(two_groups, len(rewards), kind)
    assert advantages.tolist() == pytest.approx(expected + expected, abs=1e-7)


# ----------------------------------------------------------------------------- 5, 6 loss, gradient


def plain_model(path):
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").train()


def plain_logps(model, rollout, temperature):
    """The log-prob of each token of the response, from the logits of the whole sequence."""
    sequence = torch.tensor([rollout.prompt_ids + rollout.ids])
    logits = model(sequence).logits[0] / temperature
    logps = []
    for t, token in enumerate(rollout.ids):
        before = len(rollout.prompt_ids) + t - 1
        logps.append(logits[before].log_softmax(0)[token])
    return logps


def plain_advantages(rewards, group, formula):
    advantages = []
    for start in range(0, len(rewards), group):
        neighbours = rewards[start:start + group].tolist()
        for reward in neighbours:
            advantage = reward - statistics.fmean(neighbours)
            if formula == "grpo":
                advantage /= statistics.stdev(neighbours) + 1e-6
            advantages.append(advantage)
    return advantages


def plain_gain(ratio, advantage, args):
    """The clipped objective of one token, by the sign of its advantage."""
    if advantage >= 0:
        return advantage * min(1 + args.clip_high, ratio)
    gain = advantage * max(1 - args.clip_low, ratio)
    if args.dual_clip:
        gain = max(gain, args.dual_clip * advantage)
    return gain


def plain_loss(path, ref_path, rollouts, rewards, old_logps, args):
    """The formulas of PAPER.md and of each flag, one sequence and one token at a time, from full
    logits: (loss, {parameter: gradient})."""
    model = plain_model(path)
    reference = plain_model(ref_path)
    advantages = plain_advantages(rewards, args.rollouts, args.advantage)
    used = []
    for i, r in enumerate(rollouts):
        is_masked = args.overlong == "mask" and r.finish == "length"
        if not is_masked:
            used.append(i)
    n_tokens = sum(len(rollouts[i].ids) for i in used)

    loss = 0
    for i in used:
        r = rollouts[i]
        logps = plain_logps(model, r, args.temperature)
        ref_logps = plain_logps(reference, r, args.temperature)
        of_sequence = 0
        for t, logp in enumerate(logps):
            logp_old = float(logp.detach())
            if old_logps is not None:
                logp_old = float(old_logps[i][t])
            ratio = (logp - logp_old).exp()
            gain = plain_gain(ratio, advantages[i], args)
            if args.tis_cap:
                importance = math.exp(logp_old - float(r.logp_engine[t]))
                gain = gain * min(importance, args.tis_cap)
            d = ref_logps[t].detach() - logp
            kl = d.exp() - d - 1
            of_sequence = of_sequence - gain + args.kl_coef * kl
        denominators = {"token": n_tokens, "sequence": len(used) * len(r.ids)}
        loss = loss + of_sequence / denominators[args.normalize]
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return float(loss.detach()), gradients


def make_policy_near(ref_path, path):
    """Save the reference model with a little noise: near it, not equal to it."""
    model = load_model(ref_path, trainable=True)
    torch.manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    model.save_pretrained(path)
    return path


def shifted(logps):
    """Log-probs of an old policy that puts ratios on both sides of every clip."""
    old_logps = []
    for k, logp in enumerate(logps):
        if logp is None:                                                # not in the loss
            old_logps.append(None)
            continue
        shift = torch.linspace(-1, 1, len(logp))
        old_logps.append(logp + shift if k % 2 == 0 else logp - shift)
    return old_logps


LOSS_FLAGS = [
    "",
    "--normalize sequence",
    "--advantage dr_grpo",
    "--kl-coef 0.1",
    "--kl-coef 0",
    "--tis-cap 1.1",
    "--tis-cap 0.5",
    "--overlong mask",
    "--overlong mask --normalize sequence",
    "--updates-per-batch 2",
    "--updates-per-batch 2 --clip-low 0.1 --clip-high 0.4 --dual-clip 1.5",
    "--updates-per-batch 2 --dual-clip 0 --tis-cap 1.1 --kl-coef 0.1 --temperature 1.3",
]


@pytest.mark.parametrize("flags", [line.split() for line in LOSS_FLAGS])
def test_loss_and_gradient_equal_a_plain_computation(tmp_path, flags):
    ref_path = make_model(tmp_path / "ref", seed=1, tie=False)
    path = make_policy_near(ref_path, tmp_path / "policy")
    args = configure(*flags, "--token-budget", "40")
    rollouts, rewards = fixed_rollouts(4)
    packs = rlvr.plan_rollouts(rollouts, range(len(rollouts)), args)
    assert len(packs) > 1, "the batch has to be split"
    model = load_model(path, trainable=True)
    policy = TokenLogprobs(model, args.temperature)
    reference = load_model(ref_path) if args.kl_coef else None
    old_logps = None
    if args.updates_per_batch > 1:
        _, logps = accumulate(policy, rollouts, rewards, args, reference)
        old_logps = shifted(logps)
        model.zero_grad()

    stats, _ = accumulate(policy, rollouts, rewards, args, reference, old_logps)

    loss, expected = plain_loss(path, ref_path, rollouts, rewards, old_logps, args)
    assert stats["loss"] == pytest.approx(loss, rel=1e-5, abs=1e-6)
    found = {name: p.grad for name, p in model.named_parameters()}
    scale = max(float(grad.abs().max()) for grad in expected.values())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * scale)
    if "--dual-clip" in flags and args.dual_clip:
        for name in ("clip_low", "clip_high", "dual_clip"):
            assert stats[name] > 0, f"no token meets {name}"


def test_on_policy_ratio_is_one_and_an_old_policy_pass_changes_nothing(tiny_model_dir):
    """04 leaves out the forward pass of an old policy where it has the same weights; here it is
    made."""
    args = configure("--kl-coef", "0")
    model = load_model(tiny_model_dir, trainable=True)
    policy = TokenLogprobs(model, args.temperature)
    rollouts, rewards = fixed_rollouts(3)

    without_pass, _ = accumulate(policy, rollouts, rewards, args)
    expected = flat_gradient(model)
    model.zero_grad()
    old_logps = rlvr.score(model, rollouts, args, "cpu")
    with_pass, _ = accumulate(policy, rollouts, rewards, args, old_logps=old_logps)
    found = flat_gradient(model)

    for name in ("clip_low", "clip_high", "dual_clip"):
        assert without_pass[name] == 0
    assert without_pass["loss"] == pytest.approx(with_pass["loss"], abs=1e-6)
    scale = float(expected.abs().max())
    torch.testing.assert_close(expected, found, rtol=1e-4, atol=1e-6 * scale + 1e-7)


@pytest.mark.parametrize("budget, together", [(140, True), (20, False)])
def test_rollouts_of_a_problem_share_a_pack_that_reads_their_prompt_once_where_they_are_short(
        budget, together):
    rollouts, _ = fixed_rollouts(8)
    packs = rlvr.plan_rollouts(rollouts, range(32), configure("--token-budget", budget))

    placed = []
    saved = 0                           # tokens that are not encoded, since a prompt is shared
    for places in packs:
        members = [rollouts[i] for i in places]
        size = sum(len(r.prompt_ids) + len(r.ids) for r in members)
        assert size <= budget
        placed += places
        saved += size - len(rlvr.pack_rollouts(members, "cpu").input_ids)
    assert sorted(placed) == list(range(32))
    assert len(packs) > 1
    most = sum((GROUP - 1) * len(r.prompt_ids) for r in rollouts[::GROUP])     # each prompt once
    if together:
        assert saved == most
    else:
        assert 0 < saved < most


# --------------------------------------------------------------------------------------- 1 prompts


def rows_of_six_steps(seed):
    """Of ten problems, three a step: two epochs of three whole batches."""
    return [common.rows_of_step(10, 3, step, seed).tolist() for step in range(1, 7)]


def test_prompts_of_a_step_are_a_function_of_seed_and_step():
    steps = rows_of_six_steps(seed=42)
    first_epoch = steps[:3]
    second_epoch = steps[3:]
    for epoch in (first_epoch, second_epoch):
        used = sum(epoch, [])
        assert len(used) == 9, "only whole batches"
        assert len(set(used)) == 9, "every problem at most once in an epoch"
    assert first_epoch != second_epoch
    assert steps == rows_of_six_steps(seed=42)
    assert steps != rows_of_six_steps(seed=43)


# ------------------------------------------------------------------------------------------- ranks


@dataclass
class Case:
    flags: list[str]
    lopsided: bool = False          # rank 0 has three groups; rank 1 one, all of it out of the loss
    fault: str | None = None        # the exchange between ranks that is broken


CASES = [
    Case(["--kl-coef", "0.1"]),
    Case(["--overlong", "mask"], lopsided=True),
    Case(["--shard"]),
    Case([], fault="no_sync"),
    Case([], fault="denominators"),
]


def never_in_sync(module, is_last):
    """`gradient_sync` without an exchange in the last pass."""
    return gradient_sync(module, False)


def own_counts(counts):
    """`all_reduce_sum` without an exchange: each rank divides by its own counts."""
    return counts


def share_of_rank(case, dist):
    """(rollouts, rewards) of the groups of this rank."""
    rollouts, rewards = fixed_rollouts(4, cut_group=1 if case.lopsided else None)
    groups = list(range(4))[dist.rank::dist.world]
    if case.lopsided and dist.world > 1:
        groups = [0, 2, 3] if dist.rank == 0 else [1]
    mine = []
    for group in groups:
        mine += range(GROUP * group, GROUP * (group + 1))
    return [rollouts[i] for i in mine], rewards[mine]


def gradient_of(case, model, reference, dist):
    """The fixed rollouts through advantages, weights, reference and backward on this rank: (stats,
    the whole gradient)."""
    budget = "40" if dist.world > 1 else "99999"
    args = configure(*case.flags, "--token-budget", budget)
    policy = TokenLogprobs(load_model(model, trainable=True), args.temperature)
    policy = distribute(policy, dist, args.shard)
    rollouts, rewards = share_of_rank(case, dist)
    advantages = rlvr.group_advantages(rewards, args.rollouts, args.advantage)
    with pytest.MonkeyPatch.context() as patch:
        if case.fault == "denominators":
            patch.setattr(common, "all_reduce_sum", own_counts)
        weights = rlvr.token_weights(rollouts, args, dist.device)
    ref_logps = rlvr.score(load_model(reference), rollouts, args, dist.device)
    with pytest.MonkeyPatch.context() as patch:
        if case.fault == "no_sync":
            patch.setattr(rlvr, "gradient_sync", never_in_sync)
        stats, _ = rlvr.accumulate_gradient(policy, rollouts, advantages, weights, ref_logps, None,
                                            args, dist)
    return stats, flat_gradient(policy)


EACH_RANK = f"""
import sys

sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import common
import test_rlvr
import torch

torch.set_num_threads(1)
model, reference, out = sys.argv[1:]
dist = common.init_distributed()
results = [test_rlvr.gradient_of(case, model, reference, dist) for case in test_rlvr.CASES]
if dist.rank == 0:
    torch.save(results, out)
common.barrier()
"""


@pytest.mark.slow
def test_two_ranks_leave_the_gradient_of_one_and_broken_exchanges_do_not(tmp_path, tiny_model_dir):
    reference = make_model(tmp_path / "ref", seed=3)
    script = tmp_path / "each_rank.py"
    script.write_text(EACH_RANK)

    torchrun(script, tiny_model_dir, reference, tmp_path / "out.pt")

    results = torch.load(tmp_path / "out.pt")
    for case, (two_stats, two) in zip(CASES, results, strict=True):
        one_stats, one = gradient_of(case, tiny_model_dir, reference, common.Dist())
        distance = float((one - two).norm() / one.norm())
        if case.fault:
            assert distance > 1e-2, f"{case.fault} was broken and nobody noticed"
        else:
            assert distance < 1e-5, case
            assert two_stats == pytest.approx(one_stats, rel=1e-5, abs=1e-7)


# --------------------------------------------------------------------------- resume and interrupts


def start(model, problems, out):
    """Four steps of 04 in a process of their own."""
    command = [sys.executable, str(ROOT / "04_rlvr.py"),
               *arguments(model, problems, out, FOUR_STEPS)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env=ENVIRONMENT)


def read_until(process, text):
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return
    raise AssertionError(f"'{text}' never came:\n" + "".join(lines))


def products(out):
    """The bytes of what a run leaves: its model and its rollouts."""
    model = (out / "final/model.safetensors").read_bytes()
    rollouts = (out / "rollouts.jsonl").read_bytes()
    return model, rollouts


def curve(out):
    """What of metrics.jsonl depends on no clock."""
    points = []
    for row in common.read_jsonl(out / "metrics.jsonl"):
        names = ("step", "reward", "loss", "kl", "grad_norm", "entropy")
        points.append([row[name] for name in names])
    return points


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny_model_dir, problems):
    out = tmp_path_factory.mktemp("whole") / "out"
    run(tiny_model_dir, problems, out, *FOUR_STEPS)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name, at", [(signal.SIGKILL, "step 3/4"), (signal.SIGINT, "step 1/4")])
def test_a_stopped_run_goes_on_bit_for_bit(
        tmp_path, tiny_model_dir, problems, uninterrupted, name, at):
    out = tmp_path / "out"
    process = start(tiny_model_dir, problems, out)
    read_until(process, at)
    process.send_signal(name)
    rest = process.communicate(timeout=120)[0]

    saved = latest_checkpoint(out)
    if name == signal.SIGKILL:
        assert process.returncode == -name
        assert saved.name == "step-000002"
    else:
        assert process.returncode == 130, rest
        assert "is saved" in rest, rest
        seen = at.removeprefix("step ").removesuffix("/4")
        assert int(saved.name.removeprefix("step-")) >= int(seen), "Ctrl-C loses no whole step"

    run(tiny_model_dir, problems, out, *FOUR_STEPS)
    assert products(out) == products(uninterrupted)
    assert curve(out) == curve(uninterrupted)


def test_other_settings_do_not_continue_a_run(uninterrupted, tiny_model_dir, problems, capsys):
    error = refusal(capsys, tiny_model_dir, problems, uninterrupted,
                    *FOUR_STEPS, "--temperature", "1.0")
    assert "temperature" in error


# ----------------------------------------------------------------------------------- 7 weight sync


@pytest.fixture
def optimizer_steps(monkeypatch):
    """A list that grows by one with every optimizer step; the steps change no weight."""
    steps = []

    def count(optimizer):
        steps.append(1)

    monkeypatch.setattr(torch.optim.AdamW, "step", count)
    return steps


def test_leaving_out_the_weight_sync_stops_the_run(
        tmp_path, tiny_model_dir, problems, monkeypatch, capsys):
    def leave_out(engine, model):
        pass

    monkeypatch.setattr(engines.HFEngine, "sync", leave_out)
    error = refusal(capsys, tiny_model_dir, problems, tmp_path / "out",
                    "--kl-coef", "0.1", "--max-steps", "3", "--weight-decay", "0.5")
    assert "after the weight sync" in error


def test_rollouts_from_other_weights_never_reach_an_update(
        tiny_model_dir, problems, tmp_path, monkeypatch, capsys, optimizer_steps):
    """Log-probs that are not those of the trainer's weights: the run ends before its first update,
    and leaves no checkpoint."""
    sample = rlvr.sample_rollouts

    def from_other_weights(*args, **options):
        rollouts = sample(*args, **options)
        for r in rollouts:
            r.logp_engine = r.logp_engine + 0.01
        return rollouts

    monkeypatch.setattr(rlvr, "sample_rollouts", from_other_weights)
    out = tmp_path / "out"
    error = refusal(capsys, tiny_model_dir, problems, out, "--max-steps", "2")
    assert "on its rollouts: mean |log p(trainer)" in error
    assert not optimizer_steps
    assert latest_checkpoint(out) is None
    assert not (out / "final").exists()


def test_a_loss_that_is_not_finite_names_the_batch_and_changes_nothing(
        tiny_model_dir, problems, tmp_path, monkeypatch, capsys, optimizer_steps):
    group_advantages = rlvr.group_advantages

    def with_a_nan(*args):
        advantages = group_advantages(*args)
        advantages[5] = math.nan
        return advantages

    monkeypatch.setattr(rlvr, "group_advantages", with_a_nan)
    with pytest.raises(SystemExit) as stop:
        run(tiny_model_dir, problems, tmp_path / "out", "--max-steps", "2")
    assert stop.value.code == 1
    assert "not finite" in capsys.readouterr().err
    assert not optimizer_steps
    listed = json.loads((tmp_path / "out/bad_batch.rank0.json").read_text())
    assert listed["step"] == 1
    assert len(listed["batch"]) == 16
    assert len({(pid, g) for pid, g, _ in listed["batch"]}) == 16


# ------------------------------------------------------------------ models and problems gone wrong


def stuck_model(path, token):
    """A model that emits one token for ever: every hidden state is the same vector, and that
    token's row points along it."""
    make_model(path, tie=False)
    model = load_model(path)
    tokenizer = load_tokenizer(path)
    if token.startswith("<|"):
        ids = [tokenizer.convert_tokens_to_ids(token)]
    else:
        ids = encode_text(tokenizer, token)
    assert len(ids) == 1
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(1.0)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        model.lm_head.weight[ids[0]] = 1.0
    model.save_pretrained(path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("token, n_tokens, cut, status", [
    ("a", 12, 1.0, "no_think_end"),
    ("<|im_end|>", 1, 0.0, "no_think_end"),
    ("<|endoftext|>", 1, 0.0, "no_think_end"),
    (" ", 12, 1.0, "no_think_end"),
])
@pytest.mark.parametrize("flags", [[], ["--overlong", "mask"]])
def test_degenerate_models_are_survived_and_counted(
        tmp_path, problems, token, n_tokens, cut, status, flags):
    model = stuck_model(tmp_path / "model", token)
    rows = run(model, problems, tmp_path / "out", "--max-steps", "2", *flags)
    assert len(rows) == 2
    for row in rows:
        assert row["reward"] == 0
        assert row["reward_unknown"] == 0
        assert row["groups_uniform"] == 1
        assert row["truncated"] == cut
        assert row["response_tokens_mean"] == n_tokens
        assert all(math.isfinite(x) for x in row.values())
    rollouts = list(common.read_jsonl(tmp_path / "out/rollouts.jsonl"))
    assert {r["status"] for r in rollouts} == {status}
    assert {r["finish"] for r in rollouts} == {"length" if cut else "stop"}
    assert (tmp_path / "out/final/model.safetensors").exists()


def test_a_verifier_worker_killed_in_mid_step_costs_at_most_its_own_item():
    """Rewards of 600 rollouts that need real work, right where k is even; the worker process is
    killed while it judges them."""
    rollouts = []
    answers = {}
    for k in range(600):
        boxed = r"\sqrt{%d} + \frac{%d}{7} + \sin(1)" % (k + 2, k)
        response = f"<think>x</think>\\boxed{{{boxed}}}"
        rollouts.append(rlvr.Rollout(f"p{k}", 0, [1], [2], "stop", torch.zeros(1), response))
        answers[f"p{k}"] = r"\sin(1) + \frac{%d}{14} + \sqrt{%d}" % (2 * k, k + 2 + k % 2)
    verdicts = []

    def grade_all():
        verdicts.extend(rlvr.grade(rollouts, answers, configure()))

    rlvr.grade(rollouts[:1], answers, configure())      # a worker is up and waits
    process = verifier.POOL.idle[-1]                    # the one that is handed out first
    process.send_signal(signal.SIGSTOP)                 # so that it is surely caught at work
    thread = threading.Thread(target=grade_all)
    thread.start()
    while process in verifier.POOL.idle and thread.is_alive():
        time.sleep(0.001)
    process.kill()
    thread.join(timeout=120)

    assert not thread.is_alive()
    assert process not in verifier.POOL.idle, "the killed worker was at work"
    assert all(verdict.status for verdict in verdicts)
    unknown = [k for k, verdict in enumerate(verdicts) if verdict.correct is None]
    assert len(unknown) <= 1
    expected = [float(k % 2 == 0 and k not in unknown) for k in range(600)]
    assert rlvr.rewards_of(verdicts).tolist() == expected


def test_responses_of_one_token(tmp_path, tiny_model_dir, problems):
    rows = run(tiny_model_dir, problems, tmp_path / "out",
               "--max-steps", "1", "--max-response-tokens", "1")
    assert rows[0]["response_tokens_max"] == 1
    assert rows[0]["reward"] == 0
    assert math.isfinite(rows[0]["loss"])


def test_a_gold_that_cannot_be_parsed_is_dropped_before_the_run(tmp_path, tiny_model_dir, capsys):
    bad = ["\\frac{1}{", "x^{", "\\sqrt{2} +"]
    some_bad = write_problems(tmp_path / "some.jsonl", ["1", "2", *bad, "\\frac{1}{2}", "4"])
    all_bad = write_problems(tmp_path / "all.jsonl", bad + bad)

    rows = run(tiny_model_dir, some_bad, tmp_path / "out", "--max-steps", "1")
    said = capsys.readouterr().out
    assert "3 dropped with a gold answer that cannot be parsed; 4 are used" in said
    assert rows[0]["reward_unknown"] == 0
    error = refusal(capsys, tiny_model_dir, all_bad, tmp_path / "out2")
    assert "0 usable problems, at least 4 are needed" in error


@pytest.mark.parametrize("flags, message", [
    (["--max-response-tokens", "4096"], "max_position_embeddings"),
    (["--token-budget", "20"], "--token-budget"),
    (["--max-prompt-tokens", "3"], "0 usable problems"),
    (["--temperature", "0"], "--temperature must be above 0"),
    (["--eval-every", "1"], "--eval-problems"),
    (["--rollouts", "0"], "--rollouts must be at least 1"),
    (["--max-steps", "-1"], "--max-steps must be at least 0, got -1"),
    (["--dual-clip", "0.5"], "--dual-clip must be above 1"),
    (["--kl-coef", "nan"], "--kl-coef must be"),
    (["--problems", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
])
def test_bad_input_is_one_sentence_and_exit_2(
        tmp_path, tiny_model_dir, problems, capsys, flags, message):
    error = refusal(capsys, tiny_model_dir, problems, tmp_path / "out", *flags)
    assert message in error
    assert error.count("\n") == 1


def test_a_finished_run_is_not_called_longer_than_it_is(tiny_model_dir, problems, tmp_path, capsys):
    rows = run(tiny_model_dir, problems, tmp_path, "--max-steps", "1", "--save-every", "1")
    assert len(rows) == 1

    rows = run(tiny_model_dir, problems, tmp_path, "--max-steps", "1")
    assert len(rows) == 1
    assert "nothing to do" in capsys.readouterr().out

    error = refusal(capsys, tiny_model_dir, problems, tmp_path, "--max-steps", "2")
    assert "the end of a run with max_steps = 1, not 2" in error
    assert error.count("\n") == 1
    assert common.read_meta(tmp_path / "rollouts.jsonl")["args"]["max_steps"] == 1

    shutil.rmtree(tmp_path / "final")
    rows = run(tiny_model_dir, problems, tmp_path, "--max-steps", "2")
    assert [row["step"] for row in rows] == [1, 2]


def test_a_pid_with_two_answers_is_refused(tiny_model_dir, problems, tmp_path, capsys):
    other = write_problems(tmp_path / "other.jsonl", ["7"])
    error = refusal(capsys, tiny_model_dir, problems, tmp_path / "out",
                    "--eval-every", "1", "--eval-problems", other)
    assert "pid p0 is one problem in --problems and another" in error


@pytest.mark.slow
def test_bfloat16_on_a_cpu_is_held_to_a_cards_gap(tiny_model_dir, problems, tmp_path, capsys):
    """Engine, policy and reference compute in bf16: they differ by its rounding, which 1e-4 would
    refuse."""
    flags = ["--max-steps", "2", "--kl-coef", "0.1"]
    bfloat16 = [*flags, "--dtype", "bfloat16"]

    exact = run(tiny_model_dir, problems, tmp_path / "float32", *flags)
    assert all(row["logp_gap"] < 1e-5 for row in exact)

    rounded = run(tiny_model_dir, problems, tmp_path / "bfloat16", *bfloat16)
    assert all(1e-4 < row["logp_gap"] < 0.05 for row in rounded)
    assert load_model(tmp_path / "bfloat16/final").dtype == torch.float32

    error = refusal(capsys, tiny_model_dir, problems, tmp_path / "limit",
                    *bfloat16, "--max-logp-gap", "1e-4")
    assert "over the limit (--max-logp-gap) of 0.0001" in error


# ---------------------------------------------------------------------------------------- learning


@pytest.fixture(scope="module")
def two_minded(tmp_path_factory):
    """A model that knows the answer (42, always) but says so in a fifth of its responses only and
    else guesses; its problems."""
    home = tmp_path_factory.mktemp("two_minded")
    path = make_model(home / "model")
    problems = write_problems(home / "problems.jsonl", ["42"] * 10)
    tokenizer = load_tokenizer(path)
    prompts = []
    for row in common.read_jsonl(problems):
        prompts.append(render_prompt(tokenizer, row["problem"]))
    generator = torch.Generator().manual_seed(0)

    def random_below(n):
        return int(torch.randint(n, (), generator=generator))

    def random_response():
        if random_below(5) == 0:
            return "<think>k</think>\\boxed{42}"
        return f"<think>g</think>\\boxed{{{random_below(90) + 10}}}"

    model = load_model(path, trainable=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(80):
        chosen = [prompts[random_below(10)] for _ in range(16)]
        batch = []
        for prompt in chosen:
            response = encode_response(tokenizer, random_response())
            batch.append((prompt + response, len(prompt)))
        logp, _ = token_logprobs(model, pack_sequences(batch))
        optimizer.zero_grad()
        (-logp.mean()).backward()
        optimizer.step()
    model.save_pretrained(path)
    return path, problems


@pytest.mark.slow
@pytest.mark.parametrize("shuffled", [False, True])
def test_rewards_teach_and_shuffled_rewards_do_not(two_minded, tmp_path, monkeypatch, shuffled):
    """Shuffled: as many rewards as before, but not for the rollouts that earned them."""
    if shuffled:
        monkeypatch.setattr(rlvr, "rewards_of", rlvr_learns.shuffled(rlvr.rewards_of))
    model, problems = two_minded
    rows = run(model, problems, tmp_path / "out", "--prompts-per-step", "8", "--rollouts", "8",
               "--max-response-tokens", "30", "--lr", "1e-3", "--max-steps", "10",
               "--temperature", "1", "--eval-every", "10", "--eval-problems", problems)

    rewards = [row["reward"] for row in rows]
    before = rewards[0]
    after = sum(rewards[-3:]) / 3
    assert 0.1 < before < 0.5, "the model is to be of two minds"
    if shuffled:
        assert after < before + 0.2, rewards
    else:
        assert after > before + 0.4, rewards
    assert "eval_pass1" not in rows[0]
    assert abs(rows[-1]["eval_pass1"] - after) < 0.25, "the small Pass@1 is of the same model"


@pytest.mark.slow
def test_a_run_on_two_ranks_is_the_run_on_one(tmp_path, tiny_model_dir, problems):
    """The whole loop under torchrun: the same rollouts and rewards, and the same weights but for
    the order of sums."""
    flags = ["--prompts-per-step", "3", "--max-steps", "2", "--log-rollouts", "99",
             "--kl-coef", "0.1", "--lr", "1e-4"]
    one = run(tiny_model_dir, problems, tmp_path / "one", *flags)
    torchrun(ROOT / "04_rlvr.py", *arguments(tiny_model_dir, problems, tmp_path / "two", flags))

    two = list(common.read_jsonl(tmp_path / "two/metrics.jsonl"))
    for name in ("response_tokens_mean", "reward", "truncated", "entropy", "loss", "grad_norm"):
        expected = [row[name] for row in one]
        found = [row[name] for row in two]
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-6), name

    expected = {}
    for row in common.read_jsonl(tmp_path / "one/rollouts.jsonl"):
        expected[row["step"], row["pid"], row["g"]] = row["response"]
    for row in common.read_jsonl(tmp_path / "two/rollouts.jsonl"):              # rank 0's share
        assert row["response"] == expected[row["step"], row["pid"], row["g"]]
