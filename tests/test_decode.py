"""Generation: the published text, the softmax's frequencies, any mesh."""

import functools

from flat import rows_of
import jax
import jax.numpy as jnp
from models import draw, make_mesh, put, sized
import numpy as np
import pytest

from jaxalign.core import sharding
from jaxalign.core.errors import ConfigError
from jaxalign.data import tokenizer
from jaxalign.embed import passes
from jaxalign.eval import held_out
from jaxalign.model import decode, decoder, hf

BOS, EOS = 1, 2
GREEDY = decode.Sampling(0)


pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.mark.parametrize(
  "shape",
  [(1, 1), pytest.param((4, 2), marks=pytest.mark.slow)],
  ids=["1x1", "4x2"],
)
def test_a_real_model_generates_the_published_tokens(shape, shared):
  """256 tokens after BOS; the 257th would be a quotation mark."""
  fsdp, tensor = shape
  mesh = make_mesh(fsdp, tensor)
  folder = shared / "models/stories260K"
  m = hf.read_config(folder, "float32", "none")
  tok = tokenizer.load_tokenizer(folder)
  wanted = (folder / "greedy_257_tokens.txt").read_text()
  with jax.set_mesh(mesh):
    params = hf.load_folder(folder, m, mesh)
    options = decode.GenerateOptions(
      256, tok.eos, tok.vocab_size, GREEDY, tile=1
    )
    prompts = [np.array([tok.bos])]
    (answer,) = decode.generate(mesh, params, m, prompts, options)
  assert len(answer) == 256
  assert tok.decode(answer) == wanted
  assert answer.tolist() == tok.encode(wanted)


# A model whose layers add nothing: a chain, its odds known in closed form.

CHAIN = sized(1, 4, 2, 2, 2, 2, 10, 40, norm_eps=1e-5, tied=False)
KNOWN = 8  # ids 8 and 9 only round the table up, and would win


def chain_params():
  out = draw(CHAIN, 0, 0.5)
  for name in ("layers/wo", "layers/w_down"):
    out[name] = 0 * out[name]
  out["head"] = out["head"] * 2
  out["head"][8:] = 50.0
  return out


def chain_odds(temperature):
  """[token, next token] probabilities over the known ids, float64."""
  p = {n: np.float64(w) for n, w in chain_params().items()}
  x = p["embed"] / np.sqrt((p["embed"] ** 2).mean(1, keepdims=True) + 1e-5)
  scores = ((x * p["norm"]) @ p["head"].T)[:, :KNOWN] / temperature
  e = np.exp(scores - scores.max(1, keepdims=True))
  return e / e.sum(1, keepdims=True)


def run_chain(mesh, count, *sampling, **changes):
  sampling = decode.Sampling(*sampling or [2.0])
  options = decode.GenerateOptions(6, EOS, KNOWN, sampling, tile=512)
  params, prompts = put(mesh, CHAIN, chain_params()), [np.array([BOS])]
  options = options._replace(**changes)
  return decode.generate(mesh, params, CHAIN, prompts * count, options)


@pytest.mark.parametrize("temperature", [0.7, 2.0])
def test_frequencies_are_the_softmax_s(alone, temperature):
  """Chi-square of both tokens: the second given the first."""
  answers = run_chain(alone, 8192, temperature)
  odds = chain_odds(temperature)
  first = np.array([s[0] for s in answers])
  count = np.bincount(first, minlength=10)
  assert count[KNOWN:].sum() == 0
  wanted = 8192 * odds[BOS]
  total, freedom = ((count[:KNOWN] - wanted) ** 2 / wanted).sum(), KNOWN - 1
  for token in np.flatnonzero(count > 400):
    if token != EOS:
      after = np.bincount(
        [s[1] for s in answers if s[0] == token], minlength=10
      )
      wanted = count[token] * odds[token]
      kept = wanted > 3
      total += ((after[:KNOWN] - wanted) ** 2 / wanted)[kept].sum()
      freedom += kept.sum() - 1
  assert freedom > 12
  # Mean and deviation of chi-square; four deviations.
  assert total < freedom + 4 * np.sqrt(2 * freedom), (total, freedom)
  assert all(len(s) == 1 for s in answers if s[0] == EOS)


def test_nothing_is_generated_after_the_end(alone):
  """Every answer ends at its first EOS, or has the full length."""
  answers = run_chain(alone, 512)
  lengths = np.bincount([len(s) for s in answers], minlength=7)
  assert (lengths[1:] > 0).all()
  for s in answers:
    assert EOS not in s[:-1]
    assert s[-1] == EOS or len(s) == 6
  # Which tokens: the length's odds are the chain's. P(EOS first) = odds[BOS].
  assert lengths[1] / 512 == pytest.approx(chain_odds(2.0)[BOS, EOS], abs=0.07)


def test_the_machine_repeats_eos_after_the_end(alone):
  """What leaves the compiled function: only EOS after an EOS."""
  lay = lambda x: sharding.put(alone, np.int32(x), "pool")
  weights, number = put(alone, CHAIN, chain_params()), lay(np.arange(512))
  rows = dict(tokens=lay(np.full((512, 4), BOS)), pad=lay(np.full(512, 3)))
  done = decode._prefill_fn(alone, CHAIN)(weights, rows, {})
  done |= dict(pad=rows["pad"], index=number, owner=number)
  fn = decode._answer_fn(alone, CHAIN, 6, (EOS,), KNOWN, decode.Sampling(2.0))
  answers = np.asarray(fn(weights, done, dict(key=jax.random.key(0))))
  ended = np.cumsum(answers == EOS, axis=1) > 0
  assert 100 < ended[:, -1].sum() < 512
  assert (answers[ended] == EOS).all()


def test_noise_belongs_to_seed_row_and_position(alone):
  base = run_chain(alone, 40)
  fewer = run_chain(alone, 24)
  assert [s.tolist() for s in fewer] == [s.tolist() for s in base[:24]]
  other = run_chain(alone, 40, seed=1)
  assert [s.tolist() for s in other] != [s.tolist() for s in base]
  assert len({tuple(s) for s in base}) > 10  # rows differ


# A model that attends.

MODEL = sized(2, 16, 4, 2, 4, 24, 32, 24)


@functools.lru_cache
def params():
  return draw(MODEL, 5, 0.4)


@functools.lru_cache
def prompts():
  rng = np.random.default_rng(1)
  return [
    np.append(BOS, rng.integers(3, 32, n))
    for n in (2, 11, 5, 0, 7, 15, 3, 11, 9, 1, 14, 8, 22, 40)
  ]


@functools.lru_cache
def generated(shape, temperature):
  fsdp, tensor = shape
  mesh = make_mesh(fsdp, tensor)
  with jax.set_mesh(mesh):
    how = decode.Sampling(temperature)
    options = decode.GenerateOptions(8, EOS, 30, how, seed=3, tile=4)
    where = put(mesh, MODEL, params())
    return decode.generate(mesh, where, MODEL, prompts(), options)


@pytest.mark.parametrize(
  "shape,temperature", [((8, 1), 0.8), ((4, 2), 0.8), ((4, 2), 0)]
)
def test_the_same_tokens_on_any_mesh(shape, temperature):
  for a, b in zip(
    generated(shape, temperature), generated((1, 1), temperature)
  ):
    np.testing.assert_array_equal(a, b)


def test_padding_on_the_left_moves_no_greedy_token(alone):
  """Each answer is the argmax of a plain forward pass over its own row."""
  where = put(alone, MODEL, params())

  @jax.jit
  def best(tokens):
    scores = decoder.logits(
      decoder.forward(where, tokens, MODEL), decoder.head(where, MODEL)
    )
    return jnp.argmax(scores[..., :30], -1)

  answers = generated((1, 1), 0)
  rows = np.zeros((len(answers), 24), np.int32)
  cut = [decode.fitting(p, MODEL, 8) for p in prompts()]
  for i, (p, s) in enumerate(zip(cut, answers)):
    rows[i, : len(p) + len(s)] = np.concatenate([p, s])
  found = np.asarray(best(rows))
  for i, (p, s) in enumerate(zip(cut, answers)):
    np.testing.assert_array_equal(
      found[i, len(p) - 1 : len(p) + len(s) - 1], s, err_msg=f"row {i}"
    )
  assert len({tuple(s) for s in answers}) > 8


def test_long_prompts_keep_bos_and_their_end():
  p = np.arange(100, 140)
  assert decode.fitting(p, MODEL, 8).tolist() == [100, *range(125, 140)]
  assert decode.fitting(p[:16], MODEL, 8).tolist() == list(range(100, 116))
  assert decode.fitting(p[:17], MODEL, 8).tolist() == [100, *range(102, 117)]
  assert decode.fitting(p, MODEL, 22).tolist() == [100, 139]
  assert decode.fitting(p, MODEL, 23).tolist() == [100]


@pytest.mark.parametrize("new", [0, 24, 30])
def test_new_tokens_that_leave_no_room(alone, new):
  with pytest.raises(ConfigError, match="set config.eval.new_tokens"):
    options = decode.GenerateOptions(new, EOS, 30)
    decode.generate(alone, {}, MODEL, prompts(), options)


def test_answers_are_scored_after_the_prompt_that_was_cut(alone):
  """The sampled answers' log-probs are those of the sampling policy."""
  longs = [p for p in prompts() if len(p) > 16]
  tokens, n = rows_of([(p[:23], [EOS]) for p in longs]), len(longs)
  more = None, None, alone, held_out.EvalOptions(8, 1.0, 4, 64)
  what = held_out.EvalSet([{}] * n, tokens, np.arange(n), *more)
  where = put(alone, MODEL, params())
  answers = [np.array([5, EOS]), np.array([4, 5, 6, 7, 8, 9, 10, EOS])]
  got = held_out.score_answers(what, where, MODEL, answers)
  cut = [np.concatenate([p[:1], p[:23][-15:]]) for p in longs]
  rows, how = held_out.answer_rows(cut, answers), passes.PassOptions(4, 64)
  wanted = passes.score_rows(alone, where, MODEL, rows, how).logp
  np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize(
  "top_k,top_p", [(3, 1.0), (0, 0.6), (4, 0.8), (1, 1.0), (0, 1e-6), (12, 1.0)]
)
def test_top_k_and_top_p_keep_what_transformers_keeps(top_k, top_p):
  torch = pytest.importorskip("torch")
  from transformers.generation import logits_process

  scores = np.float32(np.random.default_rng(0).normal(0, 2, (7, 12)))
  scores[0, :6] = 1.5  # ties
  wanted = torch.tensor(scores)
  if top_k:
    wanted = logits_process.TopKLogitsWarper(top_k)(None, wanted)
  if top_p < 1:
    wanted = logits_process.TopPLogitsWarper(top_p)(None, wanted)
  sampling = decode.Sampling(1.0, top_k, top_p)
  mine = np.asarray(decode.keep_likely(jnp.asarray(scores), sampling))
  # Among ties transformers sorts the other way, so only their number counts.
  for got, want, row in zip(mine > -1e29, np.isfinite(wanted.numpy()), scores):
    assert sorted(row[got]) == sorted(row[want])
  np.testing.assert_array_equal(mine[mine > -1e29], scores[mine > -1e29])


def test_only_the_kept_tokens_are_drawn(alone):
  answers = run_chain(alone, 4096, 0.9, 3, new=1)
  odds = chain_odds(0.9)[BOS]
  best = np.argsort(-odds)[:3]
  count = np.bincount([s[0] for s in answers], minlength=10)
  assert count[best].sum() == 4096
  wanted = 4096 * odds[best] / odds[best].sum()
  assert ((count[best] - wanted) ** 2 / wanted).sum() < 2 + 4 * 2


def test_any_of_several_stops_ends_an_answer(alone):
  both = run_chain(alone, 512, eos=(EOS, 5))
  for s in both:
    assert not np.isin(s[:-1], (EOS, 5)).any()
    assert s[-1] in (EOS, 5) or len(s) == 6
  assert {int(s[-1]) for s in both} >= {EOS, 5}


@pytest.mark.parametrize(
  "change,words",
  [
    (dict(temperature=-1.0), "temperature=-1.0, wanted 0 or more"),
    (dict(temperature=float("nan")), "temperature=nan"),
    (dict(top_k=11), r"top_k=11, wanted 0 \(all\) to 10"),
    (dict(top_p=0.0), "top_p=0.0, wanted above 0"),
  ],
)
def test_sampling_with_no_sense_is_refused(alone, change, words):
  with pytest.raises(ConfigError, match=words):
    run_chain(alone, 1, *decode.Sampling()._replace(**change))


def test_answers_to_one_prompt_are_those_of_as_many_rows(mesh, monkeypatch):
  """And the prompt is computed once, on any mesh and in any tile."""
  rng = np.random.default_rng(1)
  prompts = [
    np.array([1, *rng.integers(4, 30, n)], np.int32) for n in (3, 3, 7, 2)
  ] + [np.array([1, 9], np.int32)] * 2
  prefill, seen = decode._prefill_fn, []

  def counted(*key):
    fn = prefill(*key)

    def call(params, rows, shared):
      seen.append(np.asarray(rows["tokens"]))
      return fn(params, rows, shared)

    return call

  monkeypatch.setattr(decode, "_prefill_fn", counted)
  weights = put(mesh, MODEL, params())

  def run(prompts, **more):
    options = decode.GenerateOptions(6, 2, 30, seed=4, **more)
    answers = decode.generate(mesh, weights, MODEL, prompts, options)
    return [x.tolist() for x in answers]

  apart = run([p for p in prompts for _ in range(5)], tile=3)
  assert len({tuple(x) for x in apart[:5]}) > 1  # the noise is each row's own
  for tile in (1, 3, 8):
    seen.clear()
    assert run(prompts, tile=tile, answers=5) == apart
    calls = sum(len(x) for x in seen) / (tile * mesh.size)
    # Five prompts that differ, of one or two padded lengths.
    most = 2 * -(-5 // (tile * mesh.size)) + (mesh.size > 1)
    assert calls <= most, (calls, tile)
