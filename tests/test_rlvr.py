"""Stage 4 against plain computations: advantages by hand, the loss from full logits, ranks, resume, sync, bad models."""

import importlib
import json
import math
import os
import signal
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import common
from model import (TokenLogprobs, distribute, encode_response, encode_text, gradient_sync, latest_checkpoint, load_model,
                   load_tokenizer, pack_sequences, render_prompt, token_logprobs)
import engines
from grading import verifier
from conftest import ROOT, make_model

rlvr = importlib.import_module("04_rlvr")
rlvr_learns = importlib.import_module("bench.rlvr_learns")
BASIC = ["--prompts-per-step", "4", "--rollouts", "4", "--max-response-tokens", "12", "--lr", "1e-3", "--verify-workers", "1"]


@pytest.fixture(autouse=True)
def restore_signal_handlers():
    old = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    yield
    for name, handler in old.items():
        signal.signal(name, handler)


def write_problems(path, answers):
    path.write_text("".join(json.dumps({"pid": f"p{i}", "problem": f"{i}+1=", "answer": a, "source": "t"}) + "\n"
                            for i, a in enumerate(answers)))
    return path


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    return write_problems(tmp_path_factory.mktemp("problems") / "problems.jsonl", [str(i + 1) for i in range(10)])


def configure(*more, model="m", problems="p", out="o"):
    return rlvr.parse_args(["--model", str(model), "--problems", str(problems), "--out", str(out), *BASIC, *map(str, more)])


def run(model, problems, out, *more):
    rlvr.main(["--model", str(model), "--problems", str(problems), "--out", str(out), *BASIC, *map(str, more)])
    return list(common.read_jsonl(Path(out) / "metrics.jsonl"))


def fixed_rollouts(n_groups, group, seed=0, vocabulary=259, longest=9, shift=0.3, cut_group=None):
    """(rollouts of random tokens, rewards): lengths 1..longest, rewards 0/1 with one uniform group, engine log-probs near -5.
    The third of each group was cut; of `cut_group` all were."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randint(vocabulary, shape, generator=generator).tolist()
    rollouts, rewards = [], []
    for p in range(n_groups):
        prompt = draw(3 + p)
        for g in range(group):
            n = 1 if g == 0 else int(torch.randint(1, longest + 1, (1,), generator=generator))
            rewards.append(1.0 if p == 1 else float(torch.rand(1, generator=generator) < 0.5))
            logp = -5 + shift * torch.randn(n, generator=generator)
            finish = "length" if g == 2 or p == cut_group else "stop"
            rollouts.append(rlvr.Rollout(f"p{p}", g, prompt, draw(n), finish, logp, ""))
    return rollouts, torch.tensor(rewards)


def gradient(policy, rollouts, rewards, args, reference=None, old_logps=None, dist=common.Dist()):
    """A step of 04 from its rewards to its gradient: (stats, logps)."""
    advantages = rlvr.group_advantages(rewards, args.rollouts, args.advantage)
    weights = rlvr.token_weights(rollouts, args, dist.device)
    ref_logps = rlvr.score(reference, rollouts, args, dist.device) if reference else None
    return rlvr.accumulate_gradient(policy, rollouts, advantages, weights, ref_logps, old_logps, args, dist)


# ---------------------------------------------------------------------------------------------------- 4 advantages

@pytest.mark.parametrize("kind, rewards, expected", [
    ("grpo", [1, 0, 0, 0], [0.75 / (0.5 + 1e-6)] + [-0.25 / (0.5 + 1e-6)] * 3),        # mean 1/4, std sqrt(0.75 / 3) = 1/2
    ("grpo", [1, 1], [0, 0]), ("grpo", [0, 0, 0], [0, 0, 0]), ("grpo", [1], [1 / (1 + 1e-6)]), ("grpo", [0], [0]),
    ("dr_grpo", [1, 0, 0, 0], [0.75, -0.25, -0.25, -0.25]), ("dr_grpo", [1, 1, 1], [0, 0, 0]), ("dr_grpo", [1], [1]),
])
def test_advantages_equal_values_by_hand(kind, rewards, expected):
    advantages = rlvr.group_advantages(torch.tensor(rewards * 2).float(), len(rewards), kind)
    assert advantages.tolist() == pytest.approx(expected * 2, abs=1e-7)


# ---------------------------------------------------------------------------------------------- 5, 6 loss and gradient

def plain_loss(path, ref_path, rollouts, rewards, old, args):
    """The formulas of PAPER.md and of each flag, one sequence and one token at a time, from full logits. -> loss, gradient"""
    from transformers import AutoModelForCausalLM
    model, ref = (AutoModelForCausalLM.from_pretrained(p, attn_implementation="eager").train() for p in (path, ref_path))

    def logps(m, r):
        logits = m(torch.tensor([r.prompt_ids + r.ids])).logits[0] / args.temperature
        return [logits[len(r.prompt_ids) + t - 1].log_softmax(0)[token] for t, token in enumerate(r.ids)]

    advantage = {}
    for start in range(0, len(rollouts), args.rollouts):
        group = rewards[start:start + args.rollouts].tolist()
        for k, reward in enumerate(group):
            centred = reward - statistics.fmean(group)
            advantage[start + k] = centred if args.advantage == "dr_grpo" else centred / (statistics.stdev(group) + 1e-6)
    used = [(i, r) for i, r in enumerate(rollouts) if not (args.overlong == "mask" and r.finish == "length")]
    total = 0
    for i, r in used:
        tokens = 0
        for t, (lp, lp_ref) in enumerate(zip(logps(model, r), logps(ref, r))):
            lp_old = float(old[i][t]) if old else float(lp.detach())
            ratio = (lp - lp_old).exp()
            a = advantage[i]
            if a >= 0:      # min(ratio, 1 + high) * a
                gain = a * (ratio if ratio < 1 + args.clip_high else 1 + args.clip_high)
            else:           # max(ratio, 1 - low) * a, but not below dual_clip * a
                gain = a * (ratio if ratio > 1 - args.clip_low else 1 - args.clip_low)
                if args.dual_clip and gain < args.dual_clip * a:
                    gain = args.dual_clip * a
            if args.tis_cap:
                gain = gain * min(math.exp(lp_old - float(r.logp_engine[t])), args.tis_cap)
            d = lp_ref.detach() - lp
            tokens = tokens - gain + args.kl_coef * (d.exp() - d - 1)
        denominator = {"token": sum(len(x.ids) for _, x in used), "sequence": len(used) * len(r.ids)}[args.normalize]
        total = total + tokens / denominator
    total.backward()
    return float(total.detach()), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("flags", [
    [], ["--normalize", "sequence"], ["--advantage", "dr_grpo"], ["--kl-coef", "0.1"], ["--kl-coef", "0"], ["--tis-cap", "1.1"],
    ["--tis-cap", "0.5"], ["--overlong", "mask"], ["--overlong", "mask", "--normalize", "sequence"],
    ["--updates-per-batch", "2"], ["--updates-per-batch", "2", "--clip-low", "0.1", "--clip-high", "0.4", "--dual-clip", "1.5"],
    ["--updates-per-batch", "2", "--dual-clip", "0", "--tis-cap", "1.1", "--kl-coef", "0.1", "--temperature", "1.3"]])
def test_loss_and_gradient_equal_a_plain_computation(tmp_path_factory, flags):
    home = tmp_path_factory.mktemp("loss")
    path, ref_path = make_model(home / "policy", seed=1, tie=False), make_model(home / "ref", seed=1, tie=False)
    model = load_model(path, trainable=True)
    with torch.no_grad():   # the reference is near the policy, not equal to it
        torch.manual_seed(5)
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    model.save_pretrained(path)
    args = configure(*flags, "--token-budget", "40")
    rollouts, rewards = fixed_rollouts(4, 4)
    reference = load_model(ref_path) if args.kl_coef else None
    policy, old_logps = TokenLogprobs(model, args.temperature), None
    if args.updates_per_batch > 1:       # ratios on both sides of every clip
        _, logps = gradient(policy, rollouts, rewards, args, reference)
        old_logps = [None if logp is None else logp + torch.linspace(-1, 1, len(logp)) * (-1) ** k for k, logp in enumerate(logps)]
        model.zero_grad()
    stats, _ = gradient(policy, rollouts, rewards, args, reference, old_logps)
    loss, expected = plain_loss(path, ref_path, rollouts, rewards, old_logps, args)
    assert len(rlvr.plan_rollouts(rollouts, range(len(rollouts)), args)) > 1, "the batch has to be split"
    assert stats["loss"] == pytest.approx(loss, rel=1e-5, abs=1e-6)
    scale = max(float(g.abs().max()) for g in expected.values())
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-5, atol=1e-5 * scale, msg=lambda m: f"{name}: {m}")
    if "--dual-clip" in flags and args.dual_clip:
        assert stats["clip_low"] > 0 and stats["clip_high"] > 0 and stats["dual_clip"] > 0, "each clip has to be met"


def test_on_policy_ratio_is_one_and_an_old_policy_pass_changes_nothing(tiny_model_dir):
    args = configure("--kl-coef", "0")
    model, results = load_model(tiny_model_dir, trainable=True), []
    rollouts, rewards = fixed_rollouts(3, 4)
    for explicit in (False, True):
        # the pass that is not made: old log-probs under the same weights
        old_logps = rlvr.score(model, rollouts, args, "cpu") if explicit else None
        model.zero_grad()
        stats, _ = gradient(TokenLogprobs(model, args.temperature), rollouts, rewards, args, old_logps=old_logps)
        results.append((stats, torch.cat([p.grad.flatten() for p in model.parameters()])))
    (without, g0), (with_pass, g1) = results
    assert without["clip_low"] == without["clip_high"] == without["dual_clip"] == 0
    assert without["loss"] == pytest.approx(with_pass["loss"], abs=1e-6)
    torch.testing.assert_close(g0, g1, rtol=1e-4, atol=1e-6 * float(g0.abs().max()) + 1e-7)


@pytest.mark.parametrize("budget, together", [(140, True), (20, False)])
def test_rollouts_of_a_problem_share_a_pack_that_reads_their_prompt_once_where_they_are_short(budget, together):
    rollouts, _ = fixed_rollouts(8, 4)
    packs = rlvr.plan_rollouts(rollouts, range(32), configure("--token-budget", budget))
    size = lambda places: sum(len(rollouts[i].prompt_ids) + len(rollouts[i].ids) for i in places)
    assert sorted(i for places in packs for i in places) == list(range(32)) and len(packs) > 1
    assert all(size(places) <= budget for places in packs)
    laid = [rlvr.pack_rollouts([rollouts[i] for i in places], "cpu") for places in packs]
    shared = sum(size(places) - len(pack.input_ids) for places, pack in zip(packs, laid))
    once = sum(3 * len(rollouts[i].prompt_ids) for i in range(0, len(rollouts), 4))
    assert shared == once if together else 0 < shared < once


# ------------------------------------------------------------------------------------------------------------ 1 prompts

def test_prompts_of_a_step_are_a_function_of_seed_and_step():
    first = [common.rows_of_step(10, 3, step, 42).tolist() for step in range(1, 7)]
    assert first == [common.rows_of_step(10, 3, step, 42).tolist() for step in range(1, 7)]
    for epoch in (first[:3], first[3:]):
        used = [i for batch in epoch for i in batch]
        assert len(used) == len(set(used)) == 9, "whole batches, every problem at most once in an epoch"
    assert first[:3] != first[3:] and first != [common.rows_of_step(10, 3, step, 43).tolist() for step in range(1, 7)]


# --------------------------------------------------------------------------------------------------------------- ranks

CASES = [(["--kl-coef", "0.1"], False, None), (["--overlong", "mask"], True, None), (["--shard"], True, None),
         ([], False, "no_sync"), ([], False, "denominators")]


def gradient_of(case, model, reference, dist):
    """The fixed rollouts through advantages, weights, reference and backward on this rank: (statistics, whole gradient)."""
    flags, lopsided, fault = case
    args = configure(*flags, "--token-budget", "40" if dist.world > 1 else "99999")
    policy = distribute(TokenLogprobs(load_model(model, trainable=True), args.temperature), dist, args.shard)
    rollouts, rewards = fixed_rollouts(4, 4, cut_group=1 if lopsided else None)
    groups = list(range(4))[dist.rank::dist.world]
    if lopsided and dist.world > 1:                   # rank 0 has three groups, rank 1 only one, all of it out of the loss
        groups = ([0, 2, 3], [1])[dist.rank]
    mine = [4 * group + g for group in groups for g in range(4)]
    rollouts, rewards = [rollouts[i] for i in mine], rewards[mine]
    advantages = rlvr.group_advantages(rewards, args.rollouts, args.advantage)
    with pytest.MonkeyPatch.context() as patch:
        if fault == "denominators":                   # each rank divides by its own counts
            patch.setattr(common, "all_reduce_sum", lambda x: x)
        weights = rlvr.token_weights(rollouts, args, dist.device)
    ref_logps = rlvr.score(load_model(reference), rollouts, args, dist.device)
    with pytest.MonkeyPatch.context() as patch:
        if fault == "no_sync":                        # gradients are never exchanged
            patch.setattr(rlvr, "gradient_sync", lambda module, last: gradient_sync(module, False))
        stats, _ = rlvr.accumulate_gradient(policy, rollouts, advantages, weights, ref_logps, None, args, dist)
    whole = lambda g: g.full_tensor() if hasattr(g, "full_tensor") else g
    return stats, torch.cat([whole(p.grad).flatten() for p in policy.parameters()])


@pytest.mark.slow
def test_two_ranks_leave_the_gradient_of_one_and_broken_exchanges_do_not(tmp_path, tiny_model_dir):
    reference, out = make_model(tmp_path / "ref", seed=3), tmp_path / "out.pt"
    code = tmp_path / "two_ranks.py"
    code.write_text(f"""
import sys, torch
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
torch.set_num_threads(1)
import common, test_rlvr
dist = common.init_distributed()
results = [test_rlvr.gradient_of(case, {str(tiny_model_dir)!r}, {str(reference)!r}, dist) for case in test_rlvr.CASES]
if dist.rank == 0:
    torch.save(results, {str(out)!r})
common.barrier()
""")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(code)],
                          capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    for case, (two, g2) in zip(CASES, torch.load(out), strict=True):
        one, g1 = gradient_of(case, tiny_model_dir, reference, common.Dist())
        distance = float((g1 - g2).norm() / g1.norm())
        if case[2]:
            assert distance > 1e-2, f"{case[2]} was broken and nobody noticed"
        else:
            assert distance < 1e-5, case
            assert two == pytest.approx(one, rel=1e-5, abs=1e-7)


# ------------------------------------------------------------------------------------------------- resume and interrupts

def start(model, problems, out, *more):
    return subprocess.Popen([sys.executable, str(ROOT / "04_rlvr.py"), "--model", str(model), "--problems", str(problems),
                             "--out", str(out), *BASIC, "--max-steps", "4", "--save-every", "2", *more],
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def read_until(process, text):
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return
    raise AssertionError(f"'{text}' never came:\n" + "".join(lines))


def products(out):
    return [(Path(out) / name).read_bytes() for name in ("final/model.safetensors", "rollouts.jsonl")]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny_model_dir, problems):
    out = tmp_path_factory.mktemp("whole") / "out"
    run(tiny_model_dir, problems, out, "--max-steps", "4", "--save-every", "2")
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name, at", [(signal.SIGKILL, "step 3/4"), (signal.SIGINT, "step 1/4")])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, tiny_model_dir, problems, uninterrupted, name, at):
    out = tmp_path / "out"
    process = start(tiny_model_dir, problems, out)
    read_until(process, at)
    process.send_signal(name)
    rest = process.communicate(timeout=120)[0]
    saved = latest_checkpoint(out)
    if name == signal.SIGKILL:
        assert process.returncode == -name and saved.name == "step-000002"
    else:
        assert process.returncode == 130 and "is saved" in rest, rest
        assert int(saved.name[-6:]) >= int(at[5]), "Ctrl-C loses no whole step"
    run(tiny_model_dir, problems, out, "--max-steps", "4", "--save-every", "2")
    assert products(out) == products(uninterrupted)
    metrics = [[row[k] for k in ("step", "reward", "loss", "kl", "grad_norm", "entropy")]
               for directory in (out, uninterrupted) for row in common.read_jsonl(directory / "metrics.jsonl")]
    assert metrics[:4] == metrics[4:]


def test_other_settings_do_not_continue_a_run(uninterrupted, tiny_model_dir, problems, capsys):
    with pytest.raises(SystemExit) as stop:
        run(tiny_model_dir, problems, uninterrupted, "--max-steps", "4", "--save-every", "2", "--temperature", "1.0")
    assert stop.value.code == 2 and "temperature" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------- 7 weight sync

def test_leaving_out_the_weight_sync_stops_the_run(tmp_path, tiny_model_dir, problems, monkeypatch, capsys):
    monkeypatch.setattr(engines.HFEngine, "sync", lambda self, model: None)
    with pytest.raises(SystemExit) as stop:
        run(tiny_model_dir, problems, tmp_path / "out", "--kl-coef", "0.1", "--max-steps", "3", "--weight-decay", "0.5")
    assert stop.value.code == 2 and "after the weight sync" in capsys.readouterr().err


def test_rollouts_from_other_weights_never_reach_an_update(tiny_model_dir, problems, tmp_path, monkeypatch, capsys):
    """Log-probs that are not those of the trainer's weights: the run ends before its first update, and leaves no checkpoint."""
    sample = rlvr.sample_rollouts

    def from_other_weights(*args, **options):
        rollouts = sample(*args, **options)
        for r in rollouts:
            r.logp_engine = r.logp_engine + 0.01
        return rollouts

    monkeypatch.setattr(rlvr, "sample_rollouts", from_other_weights)
    steps = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: steps.append(1))
    with pytest.raises(SystemExit) as stop:
        run(tiny_model_dir, problems, tmp_path / "out", "--max-steps", "2")
    assert stop.value.code == 2 and "on its rollouts: mean |log p(trainer)" in capsys.readouterr().err and not steps
    assert latest_checkpoint(tmp_path / "out") is None and not (tmp_path / "out/final").exists()


def test_a_loss_that_is_not_finite_names_the_batch_and_changes_nothing(tiny_model_dir, problems, tmp_path, monkeypatch, capsys):
    advantages = rlvr.group_advantages
    monkeypatch.setattr(rlvr, "group_advantages", lambda *args: advantages(*args).index_fill(0, torch.tensor([5]), math.nan))
    steps = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: steps.append(1))
    with pytest.raises(SystemExit) as stop:
        run(tiny_model_dir, problems, tmp_path / "out", "--max-steps", "2")
    assert stop.value.code == 1 and "not finite" in capsys.readouterr().err and not steps
    listed = json.loads((tmp_path / "out/bad_batch.rank0.json").read_text())
    assert listed["step"] == 1 and len(listed["batch"]) == 16 and len({tuple(x[:2]) for x in listed["batch"]}) == 16


# ---------------------------------------------------------------------------------------- models and problems gone wrong

def stuck_model(path, token):
    """A model that emits one token for ever: every hidden state is the same vector, and that token's row points along it."""
    make_model(path, tie=False)
    model, tokenizer = load_model(path), load_tokenizer(path)
    ids = encode_text(tokenizer, token) if not token.startswith("<|") else [tokenizer.convert_tokens_to_ids(token)]
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
@pytest.mark.parametrize("token, tokens, cut, status", [
    ("a", 12, 1.0, "no_think_end"), ("<|im_end|>", 1, 0.0, "no_think_end"), ("<|endoftext|>", 1, 0.0, "no_think_end"),
    (" ", 12, 1.0, "no_think_end")])
@pytest.mark.parametrize("flags", [[], ["--overlong", "mask"]])
def test_degenerate_models_are_survived_and_counted(tmp_path, problems, token, tokens, cut, status, flags):
    rows = run(stuck_model(tmp_path / "model", token), problems, tmp_path / "out", "--max-steps", "2", *flags)
    assert len(rows) == 2
    for row in rows:
        assert row["reward"] == row["reward_unknown"] == 0 and row["groups_uniform"] == 1 and row["truncated"] == cut
        assert row["response_tokens_mean"] == tokens
        assert all(math.isfinite(x) for x in row.values())
    rollouts = list(common.read_jsonl(tmp_path / "out" / "rollouts.jsonl"))
    assert {r["status"] for r in rollouts} == {status} and {r["finish"] for r in rollouts} == {"length" if cut else "stop"}
    assert (tmp_path / "out" / "final" / "model.safetensors").exists()


def test_a_verifier_worker_killed_in_mid_step_costs_at_most_its_own_item():
    """Rewards of 600 rollouts that need real work; the worker process is killed while it judges them."""
    texts = [f"<think>x</think>\\boxed{{\\sqrt{{{k + 2}}} + \\frac{{{k}}}{{7}} + \\sin(1)}}" for k in range(600)]
    answers = {f"p{k}": f"\\sin(1) + \\frac{{{2 * k}}}{{14}} + \\sqrt{{{k + 2 + k % 2}}}" for k in range(600)}
    rollouts = [rlvr.Rollout(f"p{k}", 0, [1], [2], "stop", torch.zeros(1), text) for k, text in enumerate(texts)]
    rlvr.grade(rollouts[:1], answers, configure())                         # a worker is up and waits
    process = verifier.POOL.idle[-1]                                       # the one that is handed out first
    process.send_signal(signal.SIGSTOP)                                    # so that it is surely caught at work
    verdicts = []
    thread = threading.Thread(target=lambda: verdicts.extend(rlvr.grade(rollouts, answers, configure())))
    thread.start()
    while process in verifier.POOL.idle and thread.is_alive():
        time.sleep(0.001)
    process.kill()
    thread.join(timeout=120)
    assert not thread.is_alive() and process not in verifier.POOL.idle, "the killed worker was at work"
    rewards = rlvr.rewards_of(verdicts).tolist()
    unknown = [k for k, verdict in enumerate(verdicts) if verdict.correct is None]
    assert len(unknown) <= 1 and all(verdict.status for verdict in verdicts) and all(rewards[k] == 0 for k in unknown)
    assert all(rewards[k] == (k % 2 == 0) for k in range(600) if k not in unknown)


def test_responses_of_one_token(tmp_path, tiny_model_dir, problems):
    row = run(tiny_model_dir, problems, tmp_path / "out", "--max-steps", "1", "--max-response-tokens", "1")[0]
    assert row["response_tokens_max"] == 1 and row["reward"] == 0 and math.isfinite(row["loss"])


def test_a_gold_that_cannot_be_parsed_is_dropped_before_the_run(tmp_path, tiny_model_dir, capsys):
    bad = ["\\frac{1}{", "x^{", "\\sqrt{2} +"]
    problems = write_problems(tmp_path / "problems.jsonl", ["1", "2", *bad, "\\frac{1}{2}", "4"])
    rows = run(tiny_model_dir, problems, tmp_path / "out", "--max-steps", "1")
    assert "3 dropped with a gold answer that cannot be parsed; 4 are used" in capsys.readouterr().out
    assert rows[0]["reward_unknown"] == 0
    with pytest.raises(SystemExit) as stop:
        run(tiny_model_dir, write_problems(tmp_path / "bad.jsonl", bad * 2), tmp_path / "out2")
    assert stop.value.code == 2 and "0 usable problems, at least 4 are needed" in capsys.readouterr().err


@pytest.mark.parametrize("flags, message", [
    (["--max-response-tokens", "4096"], "max_position_embeddings"), (["--token-budget", "20"], "--token-budget"),
    (["--max-prompt-tokens", "3"], "0 usable problems"), (["--temperature", "0"], "--temperature must be above 0"),
    (["--eval-every", "1"], "--eval-problems"), (["--rollouts", "0"], "--rollouts must be at least 1"),
    (["--max-steps", "-1"], "--max-steps must be at least 0, got -1"), (["--dual-clip", "0.5"], "--dual-clip must be above 1"),
    (["--kl-coef", "nan"], "--kl-coef must be"),
    (["--problems", "nowhere.jsonl"], "nowhere.jsonl does not exist")])
def test_bad_input_is_one_sentence_and_exit_2(tmp_path, tiny_model_dir, problems, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        run(tiny_model_dir, problems, tmp_path / "out", *flags)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


def test_a_finished_run_is_not_called_longer_than_it_is(tiny_model_dir, problems, tmp_path, capsys):
    steps = run(tiny_model_dir, problems, tmp_path, "--max-steps", "1", "--save-every", "1")
    assert len(steps) == 1 == len(run(tiny_model_dir, problems, tmp_path, "--max-steps", "1"))
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        run(tiny_model_dir, problems, tmp_path, "--max-steps", "2")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "the end of a run with max_steps = 1, not 2" in error and error.count("\n") == 1
    assert common.read_meta(tmp_path / "rollouts.jsonl")["args"]["max_steps"] == 1
    shutil.rmtree(tmp_path / "final")
    assert [row["step"] for row in run(tiny_model_dir, problems, tmp_path, "--max-steps", "2")] == [1, 2]


def test_a_pid_with_two_answers_is_refused(tiny_model_dir, problems, tmp_path, capsys):
    other = write_problems(tmp_path / "other.jsonl", ["7"])
    with pytest.raises(SystemExit) as stop:
        run(tiny_model_dir, problems, tmp_path / "out", "--eval-every", "1", "--eval-problems", other)
    assert stop.value.code == 2 and "pid p0 is one problem in --problems and another" in capsys.readouterr().err


@pytest.mark.slow
def test_bfloat16_on_a_cpu_is_held_to_a_cards_gap(tiny_model_dir, problems, tmp_path, capsys):
    """Engine, policy and reference compute in bf16: they differ by its rounding, which 1e-4 would refuse."""
    flags = ["--max-steps", "2", "--kl-coef", "0.1"]
    exact = run(tiny_model_dir, problems, tmp_path / "float32", *flags)
    rounded = run(tiny_model_dir, problems, tmp_path / "bfloat16", *flags, "--dtype", "bfloat16")
    assert all(row["logp_gap"] < 1e-5 for row in exact) and all(1e-4 < row["logp_gap"] < 0.05 for row in rounded)
    assert load_model(tmp_path / "bfloat16/final").dtype == torch.float32
    with pytest.raises(SystemExit):
        run(tiny_model_dir, problems, tmp_path / "limit", *flags, "--dtype", "bfloat16", "--max-logp-gap", "1e-4")
    assert "over the limit (--max-logp-gap) of 0.0001" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------- learning

@pytest.fixture(scope="module")
def two_minded(tmp_path_factory):
    """A model that knows the answer (42, always) but says so in a fifth of its responses only and else guesses; its problems."""
    home = tmp_path_factory.mktemp("two_minded")
    path, tokenizer = make_model(home / "model"), load_tokenizer(home / "model")
    problems = write_problems(home / "problems.jsonl", ["42"] * 10)
    rows = list(common.read_jsonl(problems))
    model, generator = load_model(path, trainable=True), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    random = lambda n: int(torch.randint(n, (), generator=generator))
    for step in range(80):
        batch = []
        for row in [rows[random(10)] for _ in range(16)]:
            knows = random(5) == 0
            text = f"<think>{'k' if knows else 'g'}</think>\\boxed{{{row['answer'] if knows else random(90) + 10}}}"
            prompt = render_prompt(tokenizer, row["problem"])
            batch.append((prompt + encode_response(tokenizer, text), len(prompt)))
        logp, _ = token_logprobs(model, pack_sequences(batch))
        optimizer.zero_grad()
        (-logp.mean()).backward()
        optimizer.step()
    model.save_pretrained(path)
    return path, problems


@pytest.mark.slow
@pytest.mark.parametrize("shuffled", [False, True])
def test_rewards_teach_and_shuffled_rewards_do_not(two_minded, tmp_path, monkeypatch, shuffled):
    if shuffled:     # as many rewards as before, but not for the rollouts that earned them
        monkeypatch.setattr(rlvr, "rewards_of", rlvr_learns.shuffled(rlvr.rewards_of))
    model, problems = two_minded
    rows = run(model, problems, tmp_path / "out", "--prompts-per-step", "8", "--rollouts", "8", "--max-response-tokens", "30",
               "--lr", "1e-3", "--max-steps", "10", "--temperature", "1", "--eval-every", "10", "--eval-problems", str(problems))
    before, after = rows[0]["reward"], sum(row["reward"] for row in rows[-3:]) / 3
    assert 0.1 < before < 0.5, "the model is to be of two minds"
    assert after < before + 0.2 if shuffled else after > before + 0.4, [round(row["reward"], 2) for row in rows]
    assert "eval_pass1" not in rows[0] and abs(rows[-1]["eval_pass1"] - after) < 0.25, "the small Pass@1 is of the same model"


@pytest.mark.slow
def test_a_run_on_two_ranks_is_the_run_on_one(tmp_path, tiny_model_dir, problems):
    """The whole loop under torchrun: the same rollouts and rewards, and the same weights but for the order of sums."""
    flags = ["--prompts-per-step", "3", "--max-steps", "2", "--log-rollouts", "99", "--kl-coef", "0.1", "--lr", "1e-4"]
    one = run(tiny_model_dir, problems, tmp_path / "one", *flags)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(ROOT / "04_rlvr.py"),
                           "--model", str(tiny_model_dir), "--problems", str(problems), "--out", str(tmp_path / "two"), *BASIC, *flags],
                          capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    two = list(common.read_jsonl(tmp_path / "two" / "metrics.jsonl"))
    for name in ("response_tokens_mean", "reward", "truncated", "entropy", "loss", "grad_norm"):
        assert [row[name] for row in two] == pytest.approx([row[name] for row in one], rel=1e-3, abs=1e-6), name
    theirs = {(row["step"], row["pid"], row["g"]): row["response"] for row in common.read_jsonl(tmp_path / "one" / "rollouts.jsonl")}
    for row in common.read_jsonl(tmp_path / "two" / "rollouts.jsonl"):     # rank 0's share
        assert row["response"] == theirs[row["step"], row["pid"], row["g"]]
