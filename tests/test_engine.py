"""The vLLM engine against the Hugging Face one, on a CPU with the real vLLM. Skipped, by name, without it.

One vLLM engine serves the whole file (its import and start take some twenty seconds); two more run under torchrun.
"""

import importlib.util
import io
import os
import random
import subprocess
import sys
import textwrap
import types

import numpy as np
import pytest
import torch
from conftest import ROOT, make_model
from tqdm import tqdm

import common
from model import pack_sequences, render_prompt, settle_dtype, stop_ids, token_logprobs
import engines

vllm_only = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
MAX_LEN = 400


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("engine"),
                      tie=True)      # tied weights: the case in which syncs went stale


@pytest.fixture(scope="module")
def vllm_engine(model_path):
    return engines.make_engine("vllm", model_path, MAX_LEN)


@pytest.fixture
def hf_engine(model_path):
    return engines.make_engine("hf", model_path, MAX_LEN)


@pytest.fixture
def vllm(vllm_engine, hf_engine):
    vllm_engine.sync(hf_engine.model)                                   # whatever the last test left in it
    return vllm_engine


@pytest.fixture
def prompts(tiny_tokenizer):
    """Eight, of 70 to 300 tokens: from 128 on, vLLM's prefix cache keeps blocks."""
    return [render_prompt(tiny_tokenizer, f"{i} + {i} = ?" * (1 + 4 * i))[-300:] for i in range(8)]


def draw(engine, prompts, temperature=1.0, top_p=1.0, n_new=40, seeds=None):
    done = dict(engine.generate(prompts, seeds or list(range(len(prompts))), temperature, top_p, n_new))
    return [done[i] for i in range(len(prompts))]


def ids(completions):
    return [c.ids for c in completions]


def logp_gap(model, prompts, completions, temperature):
    """Largest |trainer - engine| over all sampled tokens."""
    scored = pack_sequences([(p + c.ids, len(p)) for p, c in zip(prompts, completions)])
    logp, _ = token_logprobs(model, scored, temperature=temperature)
    return float((logp - torch.tensor(sum((c.logp for c in completions), []))).abs().max())


def change(model, scale=0.05, seed=1):
    """Another policy: noise on every weight."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=noise) * scale)


def by_a_full_sort(logits, u, temperature, top_p):
    """Nucleus sampling as a textbook has it: the whole vocabulary sorted."""
    p, ids = (logits.float() / temperature).softmax(dim=1).sort(dim=1, descending=True)
    p = p * ((p.cumsum(dim=1) - p) < top_p)
    p = p / p.sum(dim=1, keepdim=True)
    cdf = p.double().cumsum(dim=1)
    pick = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True)
    return ids.gather(1, pick)[:, 0], p.gather(1, pick)[:, 0].log()


SHAPES = {
    "flat": lambda z: z * 0.01,                     # the set goes on far behind the tokens looked at
    "spread": lambda z: z * 3,
    "peaked": lambda z: z * 12,
    "ties": lambda z: z.round(),                    # a dozen values over 5,000 tokens
    "peaked ties": lambda z: (z * 12).round(),
    "bfloat16": lambda z: (z * 3).bfloat16(),
    "all alike": lambda z: z * 0,
    "two tokens": lambda z: torch.where(torch.arange(5000) % 2500 == 7, 0.0, -torch.inf).expand(len(z), -1),
}


@pytest.mark.parametrize("top_p", [1e-6, 0.5, 0.95, 0.999])
@pytest.mark.parametrize("shape", SHAPES)
def test_nucleus_samples_are_those_of_a_full_sort(shape, top_p):
    noise = torch.Generator().manual_seed(0)
    logits = SHAPES[shape](torch.randn(200, 5000, generator=noise))
    u = torch.rand(200, generator=noise, dtype=torch.float64)
    for temperature in (0.6, 1.0):
        token, logp = engines.sample(logits, u, temperature, top_p)
        full_token, full_logp = by_a_full_sort(logits, u, temperature, top_p)
        assert torch.equal(token, full_token)
        assert torch.allclose(logp, full_logp, atol=1e-6)


def test_a_peaked_vocabulary_is_not_sorted(monkeypatch):
    """The point of it: where the set lies within the likeliest few, no row is done again with everything."""
    widths = []
    real = engines.sample_nucleus

    def counted(p, u, top_p, width):
        widths.append((len(p), width))
        return real(p, u, top_p, width)

    monkeypatch.setattr(engines, "sample_nucleus", counted)
    logits = torch.randn(64, 49152, generator=torch.Generator().manual_seed(0)) * 5
    logits[:3] *= 0.01                              # three flat rows among them
    engines.sample(logits, torch.rand(64, dtype=torch.float64), 0.6, 0.95)
    assert widths == [(64, engines.NUCLEUS_WIDTH), (3, 49152)]


def test_bfloat16_on_a_cpu(model_path, hf_engine, prompts):
    """Weights and cache in bfloat16: half the memory, log-probs within its rounding of the float32 model's."""
    engine = engines.make_engine("hf", model_path, MAX_LEN, dtype="bfloat16")
    drawn = draw(engine, prompts)
    assert engine.model.dtype == engine.slots.keys[0].dtype == engine.slots.values[0].dtype == torch.bfloat16
    assert 0 < logp_gap(hf_engine.model, prompts, drawn, 1.0) < 0.05
    change(hf_engine.model)
    engine.sync(hf_engine.model)                    # float32 masters into bfloat16 weights
    assert 0 < logp_gap(hf_engine.model, prompts, draw(engine, prompts), 1.0) < 0.05


def test_progress_is_shown_from_the_first_step(hf_engine, prompts):
    shows_progress(hf_engine, prompts)


@vllm_only
def test_vllm_shows_the_same_progress(vllm, prompts):
    shows_progress(vllm, prompts)


def shows_progress(engine, prompts):
    """A postfix stands before anything has ended, and counts what is drawn, running or done."""
    screen = io.StringIO()
    with tqdm(total=len(prompts), file=screen, mininterval=0) as bar:
        requests = engine.generate(prompts, list(range(len(prompts))), 1.0, 1.0, 40, bar)
        next(requests)
        first = screen.getvalue()
        assert "0/8" in first and "running, longest" in first and "tokens/s" in first
        list(requests)
        assert bar.n == 8
        meter = engines.Meter(bar)
        meter.finished(92)
        meter.begin -= 10
        meter.show([3, 5])
        assert bar.postfix == "10 tokens/s, 2 running, longest 5"
    assert not engines.Meter(None).due() and not engines.Meter(tqdm(disable=True)).due()


def test_vllm_without_vllm_is_refused_in_one_sentence(model_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        engines.make_engine("vllm", model_path, MAX_LEN)
    assert stop.value.code == 2 and "--engine vllm needs vLLM" in capsys.readouterr().err


def test_auto_is_settled_before_anything_is_recorded(monkeypatch):
    """On a GPU vLLM, if it is there, and bfloat16 whatever --dtype says."""
    for has_gpu, package, expected in ((False, True, "hf"), (True, False, "hf"), (True, True, "vllm")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: package or None)
        args = types.SimpleNamespace(engine="auto", dtype="float32")
        engines.settle_engine(args)
        settle_dtype(args, "cuda:0" if has_gpu else "cpu")
        assert (args.engine, args.dtype) == (expected, "bfloat16" if has_gpu else "float32")


@vllm_only
def test_vllm_greedy_tokens_are_those_of_hugging_face(vllm, hf_engine, prompts):
    assert max(map(len, prompts)) >= 256 and min(map(len, prompts)) < 128
    assert ids(draw(vllm, prompts, 0)) == ids(draw(hf_engine, prompts, 0))


@vllm_only
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_vllm_logp_is_that_of_the_distribution_it_sampled_from(vllm, hf_engine, prompts, temperature):
    drawn = draw(vllm, prompts, temperature)
    assert logp_gap(hf_engine.model, prompts, drawn, temperature) < 2e-5
    assert logp_gap(hf_engine.model, prompts, drawn, temperature * 0.8) > 0.05     # the temperature is in it


@vllm_only
def test_vllm_top_p_logp_is_renormalised_like_hugging_face(vllm, hf_engine, prompts):
    """With top-p both engines report the log-prob under the truncated distribution: at least that of the full one."""
    drawn = draw(vllm, prompts, 1.0, top_p=0.5)
    scored = pack_sequences([(p + c.ids, len(p)) for p, c in zip(prompts, drawn)])
    full, _ = token_logprobs(hf_engine.model, scored)
    lifted = torch.tensor(sum((c.logp for c in drawn), [])) - full
    assert float(lifted.min()) > 0 and float(lifted.max()) < -np.log(0.5) + 1e-4   # divided by a mass of at least 0.5


@vllm_only
def test_vllm_weights_follow_the_trainer(vllm, hf_engine, prompts):
    """After each sync greedy tokens and log-probs are the new weights', for prompts in the prefix cache too."""
    model = hf_engine.model
    before = ids(draw(vllm, prompts, 0))
    for update in (1, 2, 3):
        change(model, seed=update)
        assert logp_gap(model, prompts, draw(vllm, prompts, 0.85), 0.85) > 0.01    # not synced yet: the gap shows it
        vllm.sync(model)
        assert logp_gap(model, prompts, draw(vllm, prompts, 0.85), 0.85) < 2e-5
        after = ids(draw(vllm, prompts, 0))
        assert after == ids(draw(hf_engine, prompts, 0)) and after != before
        before = after


@vllm_only
def test_vllm_without_the_cache_reset_would_be_stale(vllm, hf_engine, prompts):
    """The check of the check: the same sync without the reset is off on long prompts, and only on those."""
    long = [p for p in prompts if len(p) > 256]
    draw(vllm, prompts, 0)
    change(hf_engine.model)
    vllm.llm.apply_model(lambda m: m.load_weights(engines.whole_weights(hf_engine.model)))
    assert logp_gap(hf_engine.model, long, draw(vllm, long, 1.0), 1.0) > 0.01
    short = prompts[:1]
    assert logp_gap(hf_engine.model, short, draw(vllm, short, 1.0), 1.0) < 2e-5
    vllm.sync(hf_engine.model)
    assert logp_gap(hf_engine.model, long, draw(vllm, long, 1.0), 1.0) < 2e-5


@vllm_only
def test_vllm_seeds_belong_to_requests(vllm, prompts):
    """A request's sample does not depend on its neighbours; equal seeds repeat, different seeds differ."""
    together = ids(draw(vllm, prompts, 1.0))
    assert together == ids(draw(vllm, prompts, 1.0))
    alone = [draw(vllm, [p], 1.0, seeds=[i])[0].ids for i, p in enumerate(prompts)]
    assert alone == together
    eight = ids(draw(vllm, prompts[:1] * 8, 1.0, seeds=list(range(8))))
    assert len({tuple(x) for x in eight}) == 8


@vllm_only
def test_vllm_stops_and_limits(vllm, hf_engine, prompts, tiny_tokenizer):
    stops = set(stop_ids(tiny_tokenizer))
    drawn = draw(vllm, prompts * 8, 2.0, n_new=100)                     # hot: stop tokens among the random ones
    finish = {c.finish for c in drawn}
    assert finish == {"stop", "length"}
    for prompt, c in zip(prompts * 8, drawn):
        assert (c.ids[-1] in stops) == (c.finish == "stop") and not stops & set(c.ids[:-1])
        assert len(c.ids) == len(c.logp) <= min(100, MAX_LEN - len(prompt))
        assert c.finish == "stop" or len(c.ids) == min(100, MAX_LEN - len(prompt))
    for engine in (vllm, hf_engine):
        with pytest.raises(SystemExit) as stop:
            draw(engine, [prompts[0] * 20])
        assert stop.value.code == 2


@vllm_only
def test_vllm_forgets_what_the_caller_did_not_wait_for(vllm, prompts):
    half = vllm.generate(prompts, list(range(8)), 1.0, 1.0, 40)
    next(half)
    half.close()
    assert not vllm.llm.llm_engine.has_unfinished_requests()
    assert len(draw(vllm, prompts[:2])) == 2


def stops_early(engine, prompts):
    """Told to stop at its 15th step: fewer responses come, all of them whole, and the next call is as if nothing was."""
    everything = draw(engine, prompts, n_new=40)
    asked = []

    def stop():
        asked.append(1)
        return len(asked) >= 15

    before = dict(engine.generate(prompts, list(range(len(prompts))), 1.0, 1.0, 40, stop=stop))
    assert len(asked) == 15 and len(before) < len(prompts)
    assert all(everything[i].ids == completion.ids for i, completion in before.items())
    assert ids(draw(engine, prompts, n_new=40)) == ids(everything)
    assert dict(engine.generate(prompts, list(range(len(prompts))), 1.0, 1.0, 40, stop=lambda: True)) == {}
    assert ids(draw(engine, prompts[::-1], n_new=40, seeds=list(range(len(prompts)))[::-1])) == ids(everything)[::-1]


def test_hugging_face_ends_early_when_told_to(hf_engine, prompts):
    stops_early(hf_engine, prompts)


@vllm_only
def test_vllm_ends_early_when_told_to(vllm, prompts):
    stops_early(vllm, prompts)
    assert not vllm.llm.llm_engine.has_unfinished_requests()


@vllm_only
def test_vllm_leaves_the_process_as_it_was(vllm, prompts):
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    draw(vllm, prompts, 1.0)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), np.random.get_state()[1].tolist())
    assert torch.set_num_threads.__module__ != "vllm.utils" and "vllm" not in repr(torch.set_num_threads)
    assert "LOCAL_WORLD_SIZE" not in os.environ and "VLLM_ENABLE_V1_MULTIPROCESSING" not in os.environ


@vllm_only
def test_vllm_sleep_and_wake_order(vllm, hf_engine, prompts, monkeypatch):
    """sleep -> train -> wake weights -> load -> reset -> wake the cache; nothing is generated in between. On a CPU
    there is no memory to give back, so the real calls are recorded, and `sleep` itself is not made."""
    order = []
    for name in ("wake_up", "apply_model", "reset_prefix_cache"):
        def recorded(*args, _name=name, _real=getattr(vllm.llm, name), **options):
            order.append((_name, options))
            return _real(*args, **options)
        monkeypatch.setattr(vllm.llm, name, recorded)
    monkeypatch.setattr(vllm, "may_sleep", True)
    monkeypatch.setattr(vllm.llm, "sleep", lambda level: order.append(("sleep", {"level": level})))
    vllm.sleep()
    with pytest.raises(RuntimeError, match="sleeps"):
        draw(vllm, prompts)
    change(hf_engine.model)
    vllm.sync(hf_engine.model)
    assert order == [("sleep", {"level": 2}), ("wake_up", {"tags": ["weights"]}), ("apply_model", {}),
                     ("reset_prefix_cache", {}),
                     ("wake_up", {"tags": ["kv_cache"]})]
    assert ids(draw(vllm, prompts, 0)) == ids(draw(hf_engine, prompts, 0))


@pytest.mark.slow
@vllm_only
def test_vllm_gives_the_same_samples_and_grades_through_01_and_05(tmp_path, capsys):
    """Greedy, on the toy model: what 01 samples and 05 grades does not depend on the engine."""
    subprocess.run([sys.executable, ROOT / "toy/world.py", "--out", tmp_path, "--n-queries", "1", "--n-eval", "24"],
                   check=True)
    problems, got = tmp_path / "id.jsonl", {}
    for engine in ("hf", "vllm"):
        same = ["--model", str(ROOT / "toy/base"), "--temperature", "0", "--max-tokens", "120", "--n", "1", "--engine",
                engine]
        importlib.import_module("01_sample").main(
            ["model", *same, "--problems", str(problems), "--max-prompt-tokens", "300", "--out",
             str(tmp_path / f"{engine}.jsonl")])
        importlib.import_module("05_eval").main([*same, "--problems", str(problems), "--out", str(tmp_path / engine)])
        samples, graded = (list(common.read_jsonl(path)) for path in (tmp_path / f"{engine}.jsonl",
                                                                      tmp_path / engine / "id.jsonl"))
        got[engine] = [(r["response"], r["finish"], r["n_tokens"]) for r in samples], [
            (r["response"], r["predicted"], r["correct"], r["status"]) for r in graded]
    assert got["hf"] == got["vllm"]
    assert len(got["vllm"][1]) == 24 and len({row[1] for row in got["vllm"][1]}) > 1


@pytest.mark.slow
@vllm_only
def test_two_ranks_one_engine_each(model_path, tmp_path):
    """torchrun: the group is made first, each rank builds an engine, DDP trains on unequal batches, weights are synced
    and the collectives still work afterwards."""
    script = tmp_path / "ranks.py"
    script.write_text(textwrap.dedent(f"""
        import sys
        sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]
        import torch
        import common, engines
        from model import load_model, pack_sequences
        from test_engine import draw, ids, logp_gap
        dist = common.init_distributed()
        model = load_model({str(model_path)!r}, trainable=True)
        trained = torch.nn.parallel.DistributedDataParallel(model)
        engine = engines.make_engine("vllm", {str(model_path)!r}, 200)
        prompts = [list(range(1, 150 + 7 * dist.rank + i)) for i in range(2 + dist.rank)]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for step in range(2):
            seeds = [common.request_seed(step, dist.rank, i) for i in range(len(prompts))]
            drawn = draw(engine, prompts, n_new=20, seeds=seeds)
            gap = logp_gap(model, prompts, drawn, 1.0)
            print(f"gap {{gap:.2g}}", file=sys.stderr)
            assert gap < 2e-5
            batch = torch.tensor([prompts[-1][:100]])
            optimizer.zero_grad()
            trained(input_ids=batch, position_ids=torch.arange(100)[None], labels=batch, use_cache=False,
                    pack=pack_sequences([(prompts[-1][:100], 1)])).loss.backward()
            optimizer.step()
            engine.sync(model)
        total = common.all_reduce_sum(torch.tensor(float(sum(map(len, ids(drawn))))))
        assert total > 0
        same = common.all_reduce_sum(torch.cat([w.detach().flatten() for w in model.parameters()])[:1000].clone()) / 2
        assert torch.equal(same, torch.cat([w.detach().flatten() for w in model.parameters()])[:1000])
        sys.stdout.write(f"rank {{dist.rank}} fine\\n")
    """))
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--",
                           script],
                          capture_output=True, text=True, timeout=900, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-3000:]
    assert "rank 0 fine" in done.stdout and "rank 1 fine" in done.stdout
