"""What a run carries and is watched for: mean, reference, best, alarms."""

import functools

import flat
import jax
import jax.numpy as jnp
from models import draw, make_mesh, put
import numpy as np
import pools
import pytest
import test_loop
from test_loop import Killed, MODEL, UPDATES

from jaxalign.core import checkpoints
from jaxalign.core.errors import ConfigError, NumericError
from jaxalign.eval import while_training
from jaxalign.model import decoder
from jaxalign.train import feed, log, loop, online
from jaxalign.train import step as steps
from jaxalign.train.batch import Logps
from jaxalign.train.logps import PRODUCERS
from jaxalign.train.losses import bind, LOSSES
from jaxalign.train.metrics import common_metrics, divide, sums_and_counts

pytestmark = pytest.mark.usefixtures("quick_compiles")

DECAY, EVERY, MIX = 0.7, 2, 0.6


def producer():
  return PRODUCERS["chunked"](MODEL, 5)


def extended(mesh):
  """A state and a step with a mean, and a reference that is refreshed."""
  state = online.begin_ema(online.begin_refresh(test_loop.fresh(mesh)))
  step = online.with_refresh(
    test_loop.train_step()[0], producer(), every=EVERY, mix=MIX
  )
  return state, online.with_ema(step, DECAY)


def host(x):
  return jax.device_get(x)


def test_the_mean_and_the_reference_follow_their_equations(mesh):
  state, step = extended(mesh)
  batch_at = test_loop.feed_of(mesh).batch_at
  start = {n: np.float64(x) for n, x in host(state.params).items()}
  mean, ref = dict(start), dict(start)
  for k in range(4):
    state, totals = step(state, batch_at(k))
    now = {n: np.float64(x) for n, x in host(state.params).items()}
    mean = {n: DECAY * mean[n] + (1 - DECAY) * now[n] for n in now}
    if (k + 1) % EVERY == 0:
      ref = {n: MIX * now[n] + (1 - MIX) * ref[n] for n in now}
    for got, wanted in ((state.ema, mean), (state.ref, ref)):
      for n in now:
        assert got[n].sharding == state.params[n].sharding
        np.testing.assert_allclose(got[n], wanted[n], rtol=0, atol=1e-6)
    if not k:  # against itself
      assert divide(host(totals))["rewards/margins"] == 0
      assert divide(host(totals))["preference_loss"] == pytest.approx(
        np.log(2), abs=1e-6
      )
  assert all(np.abs(mean[n] - now[n]).max() > 1e-4 for n in ("embed", "norm"))


def test_a_whole_refresh_starts_the_loss_anew(alone):
  state = online.begin_refresh(test_loop.fresh(alone))
  step = online.with_refresh(
    test_loop.train_step()[0], producer(), every=2, mix=1.0
  )
  batch_at = test_loop.feed_of(alone).batch_at
  seen = []
  for k in range(5):
    state, totals = step(state, batch_at(k))
    seen.append(divide(host(totals))["rewards/margins"])
  assert [x == 0 for x in seen] == [True, False, True, False, True]


def shared_rows():
  """Eleven pairs that share their prompts, as those that are packed do."""
  rng = np.random.default_rng(1)
  tokens = pools.pairs_of_tokens(rng, 11, 16, (2, 6), (1, 6))
  counts = np.float32(np.diff(tokens.offsets) - tokens.start)
  return flat.train_rows(tokens, 2, 0 * counts, counts)


@pytest.mark.parametrize(
  "name,layout",
  [
    ("dpo", "packed"),
    pytest.param("ld_dpo", "packed", marks=pytest.mark.slow),
    pytest.param("ld_dpo", "padded", marks=pytest.mark.slow),
  ],
)
def test_an_online_reference_is_the_stored_one(mesh, layout, name):
  """Within 1e-5 nat a step: one was computed alone, one in the batch."""
  rows = shared_rows()
  reference = put(mesh, MODEL, draw(MODEL, 8))
  ones = feed.Feed(mesh, rows, feed.Batching(8, 0, context=12))
  total, prefix = np.zeros((2, 11, 2), np.float32)
  for step in range(4):
    batch = ones.batch_at(step)
    one = jax.tree.map(lambda x: x[0], (batch.tokens, batch.mask))
    found = jax.jit(producer())(reference, *one)
    for k, i in enumerate(ones.ids_at(step)):
      i = int(i[1:])
      total[i], prefix[i] = host(found.sum)[k], host(found.common_prefix)[k]
  assert (total < 0).all()
  given = lambda total, prefix: rows._replace(
    ref_sum=total, columns=dict(common_prefix=prefix)
  )
  stored, blank = given(total, prefix), given(0 * total, 0 * prefix)
  loss = bind(LOSSES[name], name, {})
  logs = []
  for given, reads in ((stored, None), (blank, reference)):
    train_step = steps.make_train_step(
      producer(), loss, test_loop.train_step()[1]
    )
    if reads is not None:
      train_step = online.with_reference(train_step, producer(), reads)
    batching = feed.Batching(4, 3, context=12, layout=layout)
    batch_at = feed.Feed(mesh, given, batching, lambda step: 0.01).batch_at
    state = test_loop.fresh(mesh)
    logs.append([])
    for k in range(3):
      state, totals = train_step(state, batch_at(k))
      logs[-1].append(divide(host(totals)))
  for a, b in zip(*logs):
    for n in ("loss", "rewards/chosen", "rewards/margins", "drift/chosen"):
      assert a[n] == pytest.approx(b[n], abs=1e-5), n
  assert abs(logs[0][0]["rewards/margins"]) > 0.01


def test_kto_s_mismatched_rows_are_filled_too(alone):
  logps_fn = lambda params, tokens, mask: Logps(
    params * jnp.sum(tokens * mask, -1, dtype=jnp.float32),
    jnp.sum(mask, -1, dtype=jnp.float32),
  )
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, 9, (3, 2, 1, 5))
  batch = flat.batch_of(
    tokens=tokens,
    mask=tokens > 2,
    kl_tokens=tokens + 1,
    kl_mask=tokens > 4,
    ref_sum=None,
    kl_ref_sum=None,
    lr=0.5,
  )
  got = online.make_fill(logps_fn)(jnp.float32(0.5), batch)
  got = flat.arrays_of(got)
  for name, x, mask in (
    ("ref_sum", tokens, tokens > 2),
    ("kl_ref_sum", tokens + 1, tokens > 4),
  ):
    np.testing.assert_array_equal(got[name], 0.5 * (x * mask).sum(-1))
  np.testing.assert_array_equal(got["ref_count"], (tokens > 2).sum(-1))
  assert "ref_common_prefix" not in got and got["lr"] == 0.5


# Killed with all of it on.


def by_norm(params):
  """A pure function of the weights, with a best one midway."""
  x = float(np.float64(host(params["norm"])).sum())
  return dict(accuracy=-abs(x - 8.2), loss=x)


def valued(values, seen=None):
  """Evaluations whose accuracies are these, one after the other; `seen` gets
  the weights."""
  values = iter(values)

  def measure(params):
    if seen is not None:
      seen.append(host(params))
    return dict(accuracy=next(values))

  return dict(evaluations=dict(held_out=measure), best="held_out/accuracy")


def everything(mesh, folder, killed_at=None, **changes):
  """(the last state, the steps whose batches were made)."""
  fed, steps = test_loop.feed_of(mesh), []
  batch_at, at = fed.batch_at, test_loop.kill(killed_at)

  def watched(step):
    at(step, None)
    steps.append(step)
    return batch_at(step)

  fed.batch_at = watched
  more = dict(eval_every=1, best="held_out/loss", keep=3, explode=50.0)
  more |= dict(evaluations=dict(held_out=by_norm))
  options = test_loop.options_of(folder, **more | changes)
  return host(loop.run_updates(*extended(mesh), fed, options)), steps


def files(folder):
  """The log, and the weights that are kept as best."""
  abstract = decoder.abstract(MODEL, make_mesh())
  best = checkpoints.restore_params(folder / "best", abstract)
  return test_loop.log_of(folder), host(best)


def equal(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(x, y)


@pytest.fixture
def whole(mesh, once_a_mesh):
  return once_a_mesh(
    mesh, lambda folder: (everything(mesh, folder)[0], files(folder))
  )


@pytest.mark.parametrize(
  "k", [3, *(pytest.param(k, marks=pytest.mark.slow) for k in (1, 5))]
)
def test_a_killed_run_with_everything_on_is_resumed_bit_for_bit(
  mesh, whole, tmp_path, k
):
  with pytest.raises(Killed):
    everything(mesh, tmp_path, k)
  state, steps = everything(mesh, tmp_path)
  assert steps == list(range(steps[0], UPDATES)) and steps[0] >= k // 2 * 2
  equal(state, whole[0])
  log, best = files(tmp_path)
  assert log == whole[1][0]
  equal(best, whole[1][1])


def test_the_best_weights_are_the_mean_of_their_step(alone, tmp_path):
  values, seen = [0.2, 0.6, 0.6, 0.5, 0.1, 0.3], []
  state, _ = everything(alone, tmp_path, **valued(values, seen))
  log, best = files(tmp_path)
  equal(best, seen[1])  # the first of equals
  equal(state.ema, seen[-1])
  assert [x["eval/held_out/accuracy"] for x in log] == values


def test_a_run_ends_where_nothing_gets_better(alone, tmp_path, capsys):
  more = valued([0.2, 0.6, 0.6, 0.5, 0.9, 0.9]) | dict(stop_after=2)
  state, steps = everything(alone, tmp_path, **more)
  assert steps == [0, 1, 2, 3] and state.step == 4
  assert (
    "align: held_out/accuracy was best at step 2 (0.6) and not in 2 "
    "evaluations since; ended at step 4"
  ) in capsys.readouterr().out
  again, steps = everything(alone, tmp_path, **more)  # it stays ended
  assert steps == []
  equal(again, state)


def test_a_best_whose_weights_are_gone_counts_no_more(alone, tmp_path, capsys):
  with pytest.raises(Killed):
    everything(alone, tmp_path, 5, **valued([0.9, 0.3, 0.2, 0.2, 0.1]))
  for path in (tmp_path / "best").rglob("*"):
    if path.is_file() and path.stat().st_size > 200:
      test_loop.flip(path)
  state, steps = everything(alone, tmp_path, **valued([0.4, 0.5]))
  out = capsys.readouterr().out
  assert "the weights of the best held_out/accuracy, of step 1, are gone" in out
  assert steps == [4, 5]
  equal(files(tmp_path)[1], state.ema)  # of 0.5, the last


def test_a_measure_that_nothing_has_is_named(alone, tmp_path):
  with pytest.raises(ConfigError, match="'held_out/win'.*held_out/accuracy"):
    everything(alone, tmp_path, best="held_out/win")


# An exploding loss.


def test_an_exploding_loss_stops_with_its_rows(alone, tmp_path):
  fed = test_loop.feed_of(alone)
  batch_at, ids_at = fed.batch_at, fed.ids_at

  def worse(sums):
    sums[0, 0] += [500, -500]

  def at(step):
    batch = batch_at(step)
    return test_loop.reference_of(batch, worse) if step == 13 else batch

  fed.batch_at = at

  def run(folder, **more):
    options = test_loop.options_of(folder, updates=16, save_every=1, **more)
    state, step = test_loop.fresh(alone), test_loop.train_step()[0]
    return loop.run_updates(state, step, fed, options)

  with pytest.raises(NumericError) as caught:
    run(tmp_path / "a", explode=4.0)
  text = str(caught.value)
  assert "at step 13 is over " in text and "train.explode=4 times" in text
  assert "nothing after step 13 is saved" in text
  assert ", ".join(ids_at(13)) in text
  assert max(test_loop.saved(tmp_path / "a")) == 13
  assert len(test_loop.log_of(tmp_path / "a")) == 13
  with pytest.raises(NumericError, match="at step 13 is over"):
    run(tmp_path / "a", explode=4.0)  # resumed, it knows what was before
  assert run(tmp_path / "b").step == 16  # off


def lines_of(name, values, **more):
  return [
    {"step": k, name: v} | {n: x[k] for n, x in more.items()}
    for k, v in enumerate(values)
  ]


RISEN = [0.7] * 5 + [4.0] * 60  # only the newest fifty count


@pytest.mark.parametrize(
  "losses,loss,factor,bound",
  [
    ([1.7] * 9, 1e9, 3.0, None),  # too few
    ([1.7] * 10, 5.2, 3.0, 5.1),
    ([1.7] * 10, 5.0, 3.0, None),
    ([1.7] * 10, 5.2, 0.0, None),
    ([1.7] + [0.001] * 60, 5.0, 3.0, None),
    ([1.7] + [0.001] * 60, 5.2, 3.0, 5.1),
    *(  # losses about 0, and below it
      ([value] * 60, loss, 3.0, bound)
      for value in (0.0, 1e-9, -0.3)
      for loss, bound in ((2.9, None), (3.1, 3.0))
    ),
    ([-9.0] * 60, 26.9, 3.0, None),
    ([-9.0] * 60, -500.0, 3.0, None),  # it got better
    (RISEN, 11.9, 3.0, None),
    (RISEN, 12.1, 3.0, 12.0),
  ],
)
def test_explosion_is_against_the_first_and_the_recent_median(
  losses, loss, factor, bound
):
  found = log.exploded(lines_of("train/loss", losses), loss, factor)
  assert found == (bound and pytest.approx(bound))


def test_a_long_log_is_not_read_at_every_update():
  class Lines(list):
    def __getitem__(self, key):
      read.append(key)
      return super().__getitem__(key)

    def __iter__(self):
      raise AssertionError("all lines were read")

  read = []
  lines = Lines(lines_of("train/loss", [2.0] * 100))
  assert log.exploded(lines, 41.0, 20.0) == 40.0
  assert read == [slice(-50, None), 0] or read == [0, slice(-50, None)]
  assert log.exploded(lines, 41.0, 0.0) is None and len(read) == 2


def test_the_default_lets_hard_batches_pass_and_ends_what_runs_away():
  from configs import common

  factor = common.base().train.explode
  of = functools.partial(lines_of, "train/loss")
  for start in (np.log(2), 0.5, 1.0, 7.0, 25.0, 0.0, -2.0):
    lines = of([start] * 12)
    assert log.exploded(lines, abs(start) * 8 + 5, factor) is None
    assert log.exploded(lines, 1e4, factor)


# Alarms.


def drifting(chosen, rejected, length=10.0, n=20):
  return lines_of(
    "drift/chosen",
    [chosen] * n,
    **{"drift/rejected": [rejected] * n, "lengths/chosen": [length] * n},
  )


def test_likelihood_displacement_is_explained():
  text = log.displaced(drifting(-12.0, -30.0))
  assert "12.0 nats less likely than under the reference (1.20 a token)" in text
  assert "margin grows to 18.0" in text and "displacement" in text
  for quiet in (
    drifting(-0.9, -30.0),
    drifting(12.0, -3.0),
    drifting(-12.0, -3.0),
    drifting(-12.0, -30.0, n=19),
    drifting(-12.0, -30.0, length=200.0),
    [],
  ):
    assert log.displaced(quiet) == ""
  assert log.displaced(drifting(5.0, -30.0, n=9) + drifting(-12.0, -30.0)) != ""


def test_a_collapse_is_explained():
  of = lambda *ended: [
    {"step": k, "eval/generations/ended": x, "eval/generations/empty": 0.0}
    for k, x in enumerate(ended)
  ]
  assert log.collapsed(of(0.9, 0.85)) == "" == log.collapsed(of(0.1))
  text = log.collapsed(of(0.9, 0.9, 0.5))
  assert text.startswith("50% of the generated answers") and "(10% at" in text


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
  "values,name,best",
  [
    # The first of equals; of a loss less is better.
    ((None, 0.5, None, 0.7, 0.7, 0.6), "rest/accuracy", (4, 0.7, 2)),
    ((None, 0.5, None, 0.7, 0.7, 0.6), "rest/loss", (2, 0.5, 3)),
    ((0.5, 0.7), "kept/loss", (0, 0.0, 0)),
    *(
      case
      for bad in (NAN, INF, -INF)
      for case in (
        ((bad, 0.5, 0.9), "rest/accuracy", (3, 0.9, 0)),
        ((bad, 0.5, 0.9), "rest/loss", (2, 0.5, 1)),
        # Behind a best one it is an evaluation without a better one.
        ((0.5, bad, 0.4), "rest/accuracy", (1, 0.5, 2)),
        ((bad, bad), "rest/loss", (0, 0.0, 0)),
      )
    ),
  ],
)
def test_the_best_evaluation(values, name, best):
  of = lambda v: {"eval/rest/accuracy": v, "eval/rest/loss": v}
  lines = [
    {"step": k} | ({} if v is None else of(v)) for k, v in enumerate(values)
  ]
  assert log.best_of(lines, name) == best


def test_the_weights_after_a_measure_that_is_not_finite(alone, tmp_path):
  seen = []
  more = valued([NAN, 0.5, 0.9, 0.1, INF, 0.2], seen)
  everything(alone, tmp_path, **more)
  equal(files(tmp_path)[1], seen[2])
  with pytest.raises(NumericError, match="held_out/accuracy was finite at no"):
    everything(alone, tmp_path / "none", **valued([NAN] * UPDATES))


def test_an_alarm_is_printed_once_and_marked_at_every_step(
  alone, tmp_path, capsys
):
  real = test_loop.train_step()[0]

  def falling(state, batch):
    state, totals = real(state, batch)
    return state, totals | {
      "drift/chosen": np.array([-20.0, 2.0]),
      "drift/rejected": np.array([-40.0, 2.0]),
      "lengths/chosen": np.array([8.0, 2.0]),
    }

  options = test_loop.options_of(tmp_path, updates=23, save_every=100)
  loop.run_updates(
    test_loop.fresh(alone), falling, test_loop.feed_of(alone), options
  )
  out = capsys.readouterr().out
  assert out.count("likelihood displacement") == 1
  assert "align, step 19: the chosen answers are 10.0 nats" in out
  assert [
    x["step"] for x in test_loop.log_of(tmp_path) if x.get("alarm/displacement")
  ] == [19, 20, 21, 22]


# Metrics.


def test_drift_and_lengths_are_sums_and_counts():
  policy = Logps(
    jnp.array([[-3.0, -9.0], [-5.0, -4.0]]), jnp.array([[2.0, 3.0], [4.0, 1.0]])
  )
  ref = Logps(jnp.array([[-4.0, -7.0], [-4.5, -4.0]]), policy.count)

  def totals(*of):
    found = sums_and_counts(common_metrics(*of))
    return {n: x.tolist() for n, x in found.items()}

  assert totals(policy, ref, None, True) == {
    "drift/chosen": [0.5, 2],
    "drift/rejected": [-2, 2],
    "lengths/chosen": [6, 2],
    "lengths/rejected": [4, 2],
  }
  second = [Logps(x.sum[:, 1:], x.count[:, 1:]) for x in (policy, ref)]
  assert totals(*second, jnp.array([False, True]), True) == {
    "drift/chosen": [0, 1],
    "drift/rejected": [-2, 1],
    "lengths/chosen": [1, 1],
    "lengths/rejected": [3, 1],
  }
  assert "drift/chosen" not in totals(policy, ref, None, False)


# Knobs.


@pytest.mark.parametrize(
  "changes,words",
  [
    (dict(ref_sync=8), "config.train.reference=online"),
    (dict(reference="online", loss="simpo"), "'simpo' does not read"),
    (dict(ref_sync=8, reference="online", rank=4), "config.train.ref_sync=0"),
    (dict(ref_mix=0.0), "config.train.ref_mix"),
    (dict(ema=1.0), "config.train.ema"),
    (dict(keep=1), "config.train.keep"),
    (dict(explode=0.5), "config.train.explode"),
    (dict(eval_sets=("held",)), "config.train.eval_sets"),
    (dict(best="held_out/accuracy"), "config.train.eval_every"),
    (dict(best="rest/accuracy", eval_every=2), "train.eval_sets"),
    (
      dict(best="held_out/acuracy", eval_every=2),
      "measured by nothing; of 'held_out' there are accuracy, ties, margin, "
      "chosen_drift, loss; set config.train.best",
    ),
    (
      dict(best="generations/loss", eval_every=2, eval_sets=("generations",)),
      "kl, win_vs_target; set config.train.best",
    ),
    (
      dict(
        best="generations/win_vs_target",
        eval_every=2,
        eval_sets=("generations",),
        source="pairs.jsonl",
      ),
      "entropy, kl; set",
    ),
    *(
      (
        dict(best="held_out/loss", eval_every=2, loss=name),
        f"the loss {name!r} has no value on a set alone",
      )
      for name in ("kto", "bco", "bco_pair", "aot", "ld_dpo")
    ),
    (
      dict(eval_every=2, source="pairs.jsonl", held_out=0.0),
      "the set 'held_out' has no rows: data.split.held_out=0; set",
    ),
    (
      dict(best="rest/margin", eval_every=2, eval_sets=("rest",)),
      "'all' in config.compare leaves out none",
    ),
    (dict(stop_after=2), "config.train.best"),
    (dict(trackers=("tb",)), "config.train.trackers"),
  ],
)
def test_knobs_that_cannot_work_are_named(changes, words):
  from configs import common

  c = common.base()
  while_training.check_evaluations(c)
  changes = dict(changes)
  c.lora.rank = changes.pop("rank", 0)
  c.data.source = changes.pop("source", "world")
  c.data.split.held_out = changes.pop("held_out", 0.15)
  c.loss.name, c.loss.kwargs = changes.pop("loss", "dpo"), {}
  c.train.update(changes)
  with pytest.raises(ConfigError) as caught:
    while_training.check_evaluations(c)
  assert words in str(caught.value)


def test_what_is_off_is_on_no_record():
  from configs import common
  from jaxalign.core.settings import pick

  c = common.base()
  idle = {"keep", "trackers", "explode", "ref_mix"}
  idle |= {"eval_sets", "eval_rows", "eval_prompts"}
  old = {f"train.{n}" for n in c.train if n not in idle}
  assert set(while_training.record_fields(c.train, pick(c, "train"))) == old
  assert while_training.reads(c.train) == ()
  c.train.update(best="generations/kl", eval_sets=("generations",))
  assert while_training.reads(c.train) == ()  # never measured
  c.train.eval_every = 2
  assert while_training.reads(c.train) == ("eval",)
  c.train.update(best="held_out/loss", eval_sets=("held_out", "generations"))
  assert while_training.reads(c.train) == ()
  c.train.update(best="", eval_sets=("held_out",), eval_every=0)
  c.train.update(keep=5, trackers=("wandb",), explode=9.0)
  assert set(while_training.record_fields(c.train, pick(c, "train"))) == old
  c.train.update(
    ema=0.9, reference="online", ref_sync=4, eval_every=2, best="rest/loss"
  )
  more = set(while_training.record_fields(c.train, pick(c, "train"))) - old
  more = {x.split(".")[1] for x in more}
  assert more == {"ref_mix", "eval_sets", "eval_rows", "eval_prompts"}
