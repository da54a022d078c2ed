"""The vLLM engine against the Hugging Face one, on a CPU with the real vLLM. Skipped, by name,
without it.

One vLLM engine serves the whole file (its import and start take some twenty seconds); two more run
under torchrun.
"""

import importlib
import importlib.util
import io
import os
import random
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from conftest import ROOT, make_model
from tqdm import tqdm

import common
from model import pack_sequences, render_prompt, settle_dtype, stop_ids, token_logprobs
import engines

HAS_VLLM = importlib.util.find_spec("vllm") is not None
vllm_only = pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed")
MAX_LEN = 400                                   # of prompt and response together


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    """Tied weights: the case in which syncs went stale."""
    return make_model(tmp_path_factory.mktemp("engine"), tie=True)


@pytest.fixture(scope="module")
def vllm_engine(model_path):
    return engines.make_engine("vllm", model_path, MAX_LEN)


@pytest.fixture
def hf_engine(model_path):
    return engines.make_engine("hf", model_path, MAX_LEN)


@pytest.fixture
def vllm(vllm_engine, hf_engine):
    """The engine of the file with the weights of `hf_engine`, whatever the last test left in it."""
    vllm_engine.sync(hf_engine.model)
    return vllm_engine


@pytest.fixture
def prompts(tiny_tokenizer):
    """Eight, of 70 to 300 tokens: from 128 on, vLLM's prefix cache keeps blocks."""
    rendered = []
    for i in range(8):
        problem = f"{i} + {i} = ?" * (1 + 4 * i)
        rendered.append(render_prompt(tiny_tokenizer, problem)[-300:])
    return rendered


# ------------------------------------------------------------------------ drawing and its log-probs


def seeds_of(prompts):
    """0, 1, 2, ...: another seed for each prompt."""
    return list(range(len(prompts)))


def draw(engine, prompts, temperature=1.0, top_p=1.0, n_new=40, seeds=None):
    """The completion of each prompt, in their order."""
    seeds = seeds or seeds_of(prompts)
    completions = dict(engine.generate(prompts, seeds, temperature, top_p, n_new))
    return [completions[i] for i in range(len(prompts))]


def start_drawing(engine, prompts, **options):
    """The generator behind `draw(engine, prompts)`, which has done nothing yet."""
    return engine.generate(prompts, seeds_of(prompts), 1.0, 1.0, 40, **options)


def ids(completions):
    return [completion.ids for completion in completions]


def engine_logp(completions):
    """[N] log-probs of all sampled tokens, as the engine reports them."""
    logp = []
    for completion in completions:
        logp += completion.logp
    return torch.tensor(logp)


def trainer_logp(model, prompts, completions, temperature=1.0):
    """[N] log-probs of the same tokens, as the trainer computes them."""
    sequences = []
    for prompt, completion in zip(prompts, completions, strict=True):
        sequences.append((prompt + completion.ids, len(prompt)))
    logp, _ = token_logprobs(model, pack_sequences(sequences), temperature=temperature)
    return logp


def logp_gap(model, prompts, completions, temperature):
    """Largest |trainer - engine| over all sampled tokens."""
    gap = trainer_logp(model, prompts, completions, temperature) - engine_logp(completions)
    return float(gap.detach().abs().max())


def gap_of_a_new_draw(engine, model, prompts, temperature=1.0):
    return logp_gap(model, prompts, draw(engine, prompts, temperature), temperature)


def change(model, scale=0.05, seed=1):
    """Another policy: noise on every weight."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=noise) * scale)


# --------------------------------------------------------------------------------- nucleus sampling


def by_a_full_sort(logits, u, temperature, top_p):
    """Nucleus sampling as a textbook has it: the whole vocabulary sorted."""
    p, ids = (logits.float() / temperature).softmax(dim=1).sort(dim=1, descending=True)
    mass_before = p.cumsum(dim=1) - p
    p = p * (mass_before < top_p)
    p = p / p.sum(dim=1, keepdim=True)
    cdf = p.double().cumsum(dim=1)
    pick = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True)
    return ids.gather(1, pick)[:, 0], p.gather(1, pick)[:, 0].log()


def two_tokens(z):
    """Two tokens of equal probability; all others are impossible."""
    is_possible = torch.arange(5000) % 2500 == 7
    return torch.where(is_possible, 0.0, -torch.inf).expand(len(z), -1)


# Logits made of noise z [200, 5000].
SHAPES = {
    "flat": lambda z: z * 0.01,                 # the set goes on far behind the tokens looked at
    "spread": lambda z: z * 3,
    "peaked": lambda z: z * 12,
    "ties": lambda z: z.round(),                # a dozen values over 5,000 tokens
    "peaked ties": lambda z: (z * 12).round(),
    "bfloat16": lambda z: (z * 3).bfloat16(),
    "all alike": lambda z: z * 0,
    "two tokens": two_tokens,
}


@pytest.mark.parametrize("top_p", [1e-6, 0.5, 0.95, 0.999])
@pytest.mark.parametrize("shape", SHAPES)
def test_nucleus_samples_are_those_of_a_full_sort(shape, top_p):
    """Looking at the likeliest tokens only is faster, and changes neither tokens nor log-probs."""
    noise = torch.Generator().manual_seed(0)
    logits = SHAPES[shape](torch.randn(200, 5000, generator=noise))
    u = torch.rand(200, generator=noise, dtype=torch.float64)
    for temperature in (0.6, 1.0):
        token, logp = engines.sample(logits, u, temperature, top_p)
        full_token, full_logp = by_a_full_sort(logits, u, temperature, top_p)
        assert torch.equal(token, full_token)
        assert torch.allclose(logp, full_logp, atol=1e-6)


def test_a_peaked_vocabulary_is_not_sorted(monkeypatch):
    """The point of it: where the set lies within the likeliest few, no row is done again with
    everything."""
    calls = []
    sample_nucleus = engines.sample_nucleus

    def noted_sample_nucleus(p, u, top_p, width):
        calls.append((len(p), width))
        return sample_nucleus(p, u, top_p, width)

    monkeypatch.setattr(engines, "sample_nucleus", noted_sample_nucleus)
    logits = torch.randn(64, 49152, generator=torch.Generator().manual_seed(0)) * 5
    logits[:3] *= 0.01                          # three flat rows among them
    u = torch.rand(64, dtype=torch.float64)

    engines.sample(logits, u, 0.6, 0.95)
    assert calls == [(64, engines.NUCLEUS_WIDTH), (3, 49152)]


# ------------------------------------------------------------------------------- dtype and progress


def test_bfloat16_on_a_cpu(model_path, hf_engine, prompts):
    """Weights and cache in bfloat16: half the memory, log-probs within its rounding of the float32
    model's."""
    engine = engines.make_engine("hf", model_path, MAX_LEN, dtype="bfloat16")
    drawn = draw(engine, prompts)
    assert engine.model.dtype == torch.bfloat16
    assert engine.slots.keys[0].dtype == torch.bfloat16
    assert engine.slots.values[0].dtype == torch.bfloat16
    assert 0 < logp_gap(hf_engine.model, prompts, drawn, 1.0) < 0.05

    change(hf_engine.model)
    engine.sync(hf_engine.model)                # float32 masters into bfloat16 weights
    assert 0 < gap_of_a_new_draw(engine, hf_engine.model, prompts) < 0.05


def shows_progress(engine, prompts):
    """A postfix stands before anything has ended, and counts what is drawn, running or done."""
    screen = io.StringIO()
    with tqdm(total=len(prompts), file=screen, mininterval=0) as bar:
        completions = start_drawing(engine, prompts, progress=bar)
        next(completions)
        first = screen.getvalue()
        assert "0/8" in first
        assert "running, longest" in first
        assert "tokens/s" in first
        list(completions)
        assert bar.n == 8

        meter = engines.Meter(bar)
        meter.finished(92)
        meter.begin -= 10                       # it began ten seconds ago
        meter.show([3, 5])
        assert bar.postfix == "10 tokens/s, 2 running, longest 5"
    assert not engines.Meter(None).due()
    assert not engines.Meter(tqdm(disable=True)).due()


def test_progress_is_shown_from_the_first_step(hf_engine, prompts):
    shows_progress(hf_engine, prompts)


@vllm_only
def test_vllm_shows_the_same_progress(vllm, prompts):
    shows_progress(vllm, prompts)


# ------------------------------------------------------------------------ which engine, which dtype


def test_vllm_without_vllm_is_refused_in_one_sentence(model_path, monkeypatch, capsys):
    def find_nothing(name):
        return None

    monkeypatch.setattr(importlib.util, "find_spec", find_nothing)
    with pytest.raises(SystemExit) as stop:
        engines.make_engine("vllm", model_path, MAX_LEN)
    assert stop.value.code == 2
    assert "--engine vllm needs vLLM" in capsys.readouterr().err


def settled(monkeypatch, has_gpu, has_vllm):
    """(engine, dtype) that `--engine auto --dtype float32` comes to on such a machine."""
    def is_available():
        return has_gpu

    def find_spec(name):
        return "a package" if has_vllm else None

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    args = types.SimpleNamespace(engine="auto", dtype="float32")
    engines.settle_engine(args)
    settle_dtype(args, "cuda:0" if has_gpu else "cpu")
    return args.engine, args.dtype


def test_auto_is_settled_before_anything_is_recorded(monkeypatch):
    """On a GPU vLLM, if it is there, and bfloat16 whatever --dtype says."""
    assert settled(monkeypatch, has_gpu=False, has_vllm=True) == ("hf", "float32")
    assert settled(monkeypatch, has_gpu=True, has_vllm=False) == ("hf", "bfloat16")
    assert settled(monkeypatch, has_gpu=True, has_vllm=True) == ("vllm", "bfloat16")


# ------------------------------------------------------------------------- vLLM's tokens, log-probs


@vllm_only
def test_vllm_greedy_tokens_are_those_of_hugging_face(vllm, hf_engine, prompts):
    lengths = [len(prompt) for prompt in prompts]
    assert max(lengths) >= 256
    assert min(lengths) < 128
    assert ids(draw(vllm, prompts, 0)) == ids(draw(hf_engine, prompts, 0))


@vllm_only
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_vllm_logp_is_that_of_the_distribution_it_sampled_from(vllm, hf_engine, prompts,
                                                               temperature):
    drawn = draw(vllm, prompts, temperature)
    assert logp_gap(hf_engine.model, prompts, drawn, temperature) < 2e-5
    at_another = logp_gap(hf_engine.model, prompts, drawn, temperature * 0.8)
    assert at_another > 0.05, "the temperature is not in it"


@vllm_only
def test_vllm_top_p_logp_is_renormalised_like_hugging_face(vllm, hf_engine, prompts):
    """With top-p both engines report the log-prob under the truncated distribution: at least that
    of the full one."""
    drawn = draw(vllm, prompts, 1.0, top_p=0.5)
    full = trainer_logp(hf_engine.model, prompts, drawn)
    lifted = engine_logp(drawn) - full
    assert float(lifted.min()) > 0
    assert float(lifted.max()) < -np.log(0.5) + 1e-4        # divided by a mass of at least 0.5


# ----------------------------------------------------------------------------------- vLLM's weights


@vllm_only
def test_vllm_weights_follow_the_trainer(vllm, hf_engine, prompts):
    """After each sync greedy tokens and log-probs are the new weights', for prompts in the prefix
    cache too."""
    model = hf_engine.model
    before = ids(draw(vllm, prompts, 0))
    for update in (1, 2, 3):
        change(model, seed=update)
        assert gap_of_a_new_draw(vllm, model, prompts, 0.85) > 0.01, "not synced: no gap is seen"

        vllm.sync(model)
        assert gap_of_a_new_draw(vllm, model, prompts, 0.85) < 2e-5
        after = ids(draw(vllm, prompts, 0))
        assert after == ids(draw(hf_engine, prompts, 0))
        assert after != before
        before = after


@vllm_only
def test_vllm_without_the_cache_reset_would_be_stale(vllm, hf_engine, prompts):
    """The check of the check: the same sync without the reset is off on long prompts, and only on
    those."""
    model = hf_engine.model
    long_prompts = [prompt for prompt in prompts if len(prompt) > 256]
    short_prompts = prompts[:1]

    def load(engine_model):
        engine_model.load_weights(engines.whole_weights(model))

    draw(vllm, prompts, 0)                      # their prefixes are in the cache now
    change(model)
    vllm.llm.apply_model(load)
    assert gap_of_a_new_draw(vllm, model, long_prompts) > 0.01
    assert gap_of_a_new_draw(vllm, model, short_prompts) < 2e-5
    vllm.sync(model)
    assert gap_of_a_new_draw(vllm, model, long_prompts) < 2e-5


# --------------------------------------------------------------------------- requests and their end


@vllm_only
def test_vllm_seeds_belong_to_requests(vllm, prompts):
    """A request's sample does not depend on its neighbours; equal seeds repeat, different seeds
    differ."""
    together = ids(draw(vllm, prompts, 1.0))
    assert together == ids(draw(vllm, prompts, 1.0))

    alone = []
    for seed, prompt in enumerate(prompts):
        alone += ids(draw(vllm, [prompt], 1.0, seeds=[seed]))
    assert alone == together

    of_one_prompt = ids(draw(vllm, prompts[:1] * 8, 1.0, seeds=list(range(8))))
    assert len({tuple(tokens) for tokens in of_one_prompt}) == 8


@vllm_only
def test_vllm_stops_and_limits(vllm, hf_engine, prompts, tiny_tokenizer):
    """A response ends with its first stop token or at its limit, and a prompt that leaves no room
    is refused."""
    stops = set(stop_ids(tiny_tokenizer))
    many = prompts * 8
    drawn = draw(vllm, many, 2.0, n_new=100)    # hot: stop tokens among the random ones
    assert {completion.finish for completion in drawn} == {"stop", "length"}
    for prompt, completion in zip(many, drawn, strict=True):
        limit = min(100, MAX_LEN - len(prompt))
        *before, last = completion.ids
        assert not stops & set(before)
        assert len(completion.ids) == len(completion.logp)
        assert len(completion.ids) <= limit
        if completion.finish == "stop":
            assert last in stops
        else:
            assert last not in stops
            assert len(completion.ids) == limit

    too_long = prompts[0] * 20
    for engine in (vllm, hf_engine):
        with pytest.raises(SystemExit) as stop:
            draw(engine, [too_long])
        assert stop.value.code == 2


@vllm_only
def test_vllm_forgets_what_the_caller_did_not_wait_for(vllm, prompts):
    completions = start_drawing(vllm, prompts)
    next(completions)
    completions.close()
    assert not vllm.llm.llm_engine.has_unfinished_requests()
    assert len(draw(vllm, prompts[:2])) == 2


def stops_early(engine, prompts):
    """Told to stop at its 15th step: fewer responses come, all of them whole, and the next call is
    as if nothing was."""
    everything = draw(engine, prompts)
    n_asked = 0

    def stop_at_the_15th():
        nonlocal n_asked
        n_asked += 1
        return n_asked >= 15

    early = dict(start_drawing(engine, prompts, stop=stop_at_the_15th))
    assert n_asked == 15
    assert len(early) < len(prompts)
    for i, completion in early.items():
        assert completion.ids == everything[i].ids
    assert ids(draw(engine, prompts)) == ids(everything)

    def stop_at_once():
        return True

    assert dict(start_drawing(engine, prompts, stop=stop_at_once)) == {}
    backwards = draw(engine, prompts[::-1], seeds=seeds_of(prompts)[::-1])
    assert ids(backwards) == ids(everything)[::-1]


def test_hugging_face_ends_early_when_told_to(hf_engine, prompts):
    stops_early(hf_engine, prompts)


@vllm_only
def test_vllm_ends_early_when_told_to(vllm, prompts):
    stops_early(vllm, prompts)
    assert not vllm.llm.llm_engine.has_unfinished_requests()


# -------------------------------------------------------------------------- the process around vLLM


def random_states():
    """The states of the generators of torch, Python and NumPy, as values to compare."""
    numpy_state = np.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), numpy_state[1].tolist()


@vllm_only
def test_vllm_leaves_the_process_as_it_was(vllm, prompts):
    """Drawing moves no random generator of ours and leaves no variable or stub behind."""
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    before = random_states()
    draw(vllm, prompts, 1.0)
    assert random_states() == before
    assert torch.set_num_threads.__module__ != "vllm.utils"
    assert "vllm" not in repr(torch.set_num_threads)
    assert "LOCAL_WORLD_SIZE" not in os.environ
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in os.environ


@vllm_only
def test_vllm_sleep_and_wake_order(vllm, hf_engine, prompts, monkeypatch):
    """sleep -> train -> wake weights -> load -> reset -> wake the cache; nothing is generated in
    between. On a CPU there is no memory to give back, so the real calls are recorded, and `sleep`
    itself is not made."""
    calls = []

    def recorded(name):
        """vLLM's own function of that name, its calls noted."""
        function = getattr(vllm.llm, name)

        def noted(*args, **options):
            calls.append((name, options))
            return function(*args, **options)

        return noted

    def noted_sleep(level):
        calls.append(("sleep", {"level": level}))

    for name in ("wake_up", "apply_model", "reset_prefix_cache"):
        monkeypatch.setattr(vllm.llm, name, recorded(name))
    monkeypatch.setattr(vllm, "may_sleep", True)
    monkeypatch.setattr(vllm.llm, "sleep", noted_sleep)

    vllm.sleep()
    with pytest.raises(RuntimeError, match="sleeps"):
        draw(vllm, prompts)
    change(hf_engine.model)
    vllm.sync(hf_engine.model)
    assert calls == [
        ("sleep", {"level": 2}),
        ("wake_up", {"tags": ["weights"]}),
        ("apply_model", {}),
        ("reset_prefix_cache", {}),
        ("wake_up", {"tags": ["kv_cache"]})]
    assert ids(draw(vllm, prompts, 0)) == ids(draw(hf_engine, prompts, 0))


# --------------------------------------------------------------------------- with the stages, ranks


def sample_and_grade(engine, problems, out):
    """Greedy responses of the toy base to the problems, through 01 and through 05.

    -> (what 01 samples, what 05 samples and grades)
    """
    stage_01 = importlib.import_module("01_sample")
    stage_05 = importlib.import_module("05_eval")
    samples = out / f"{engine}.jsonl"
    graded = out / engine
    flags = ["--model", str(ROOT / "toy/base"), "--problems", str(problems), "--engine", engine,
             "--temperature", "0", "--max-tokens", "120", "--n", "1"]
    stage_01.main(["model", *flags, "--max-prompt-tokens", "300", "--out", str(samples)])
    stage_05.main([*flags, "--out", str(graded)])

    sampled_rows = []
    for row in common.read_jsonl(samples):
        sampled_rows.append((row["response"], row["finish"], row["n_tokens"]))
    graded_rows = []
    for row in common.read_jsonl(graded / "id.jsonl"):
        graded_rows.append((row["response"], row["predicted"], row["correct"], row["status"]))
    return sampled_rows, graded_rows


@pytest.mark.slow
@vllm_only
def test_vllm_gives_the_same_samples_and_grades_through_01_and_05(tmp_path):
    """Greedy, on the toy model: what 01 samples and 05 grades does not depend on the engine."""
    make_world = [sys.executable, ROOT / "toy/world.py", "--out", tmp_path,
                  "--n-queries", "1", "--n-eval", "24"]
    subprocess.run(make_world, check=True)
    problems = tmp_path / "id.jsonl"

    by_hf = sample_and_grade("hf", problems, tmp_path)
    by_vllm = sample_and_grade("vllm", problems, tmp_path)

    assert by_hf == by_vllm
    _, graded = by_vllm
    assert len(graded) == 24
    predicted = {answer for _, answer, _, _ in graded}
    assert len(predicted) > 1, "one answer to all problems: the comparison would show little"


# What each rank runs: arguments are the repository and the model.
RANK = """
import sys
root, model_path = sys.argv[1:]
sys.path[:0] = [root, root + "/tests"]
import torch
import common, engines
from model import load_model, pack_sequences
from test_engine import draw, logp_gap

dist = common.init_distributed()
model = load_model(model_path, trainable=True)
trained = torch.nn.parallel.DistributedDataParallel(model)
engine = engines.make_engine("vllm", model_path, 200)
optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
prompts = [list(range(1, 150 + 7 * dist.rank + i)) for i in range(2 + dist.rank)]
learnt = prompts[-1][:100]
batch = torch.tensor([learnt])

for step in range(2):
    seeds = [common.request_seed(step, dist.rank, i) for i in range(len(prompts))]
    drawn = draw(engine, prompts, n_new=20, seeds=seeds)
    gap = logp_gap(model, prompts, drawn, 1.0)
    print(f"gap {gap:.2g}", file=sys.stderr)
    assert gap < 2e-5
    optimizer.zero_grad()
    output = trained(input_ids=batch, position_ids=torch.arange(100)[None], labels=batch,
                     use_cache=False, pack=pack_sequences([(learnt, 1)]))
    output.loss.backward()
    optimizer.step()
    engine.sync(model)

n_drawn = sum(len(completion.ids) for completion in drawn)
assert common.all_reduce_sum(torch.tensor(float(n_drawn))) > 0

weights = torch.cat([weight.detach().flatten() for weight in model.parameters()])[:1000]
mean = common.all_reduce_sum(weights.clone()) / 2
assert torch.equal(mean, weights)               # of all ranks alike
sys.stdout.write(f"rank {dist.rank} fine\\n")
"""


@pytest.mark.slow
@vllm_only
def test_two_ranks_one_engine_each(model_path, tmp_path):
    """torchrun: the group is made first, each rank builds an engine, DDP trains on unequal batches,
    weights are synced and the collectives still work afterwards."""
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               "--", script, ROOT, model_path]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    assert "rank 0 fine" in done.stdout
    assert "rank 1 fine" in done.stdout
