"""TRL 1.16: the same steps of a little model, in float32 and in float64.

In float64 every loss of TRL's trainers takes twenty. Transformers keeps its
norms and its rotary tables in float32 whatever the model's dtype, and TRL some
of its sums; ours are wide. What is left is their rounding: at most 9e-6 nat of
a sum of log-probabilities and 9e-6 of a loss, but for DiscoPOP.
"""

import importlib

import jax
import pytest
import test_parity_trl_losses as tables
import trl_runs as runs

from jaxalign.train.losses import bind, find, LOSSES

# torch, transformers and trl warn of their own futures.
pytestmark = [
  pytest.mark.filterwarnings("ignore"),
  pytest.mark.usefixtures("quick_compiles"),
]
trl = tables.trl  # a fixture
# A gradient's norm is of 2 to 80, and no nat.
LIMITS = dict(learning_rate=1e-8, grad_norm=1e-3)
KINDS = dict(dpo=runs.on_pairs, kto=runs.on_unpaired)


@pytest.mark.parametrize(
  "how",
  [
    pytest.param(runs.Run(updates=5, lr=5e-3), id="five"),
    pytest.param(runs.Run(), id="twenty", marks=pytest.mark.slow),
  ],
)
@pytest.mark.parametrize("name", KINDS)
def test_steps_in_float32(trl, alone, tmp_path, name, how):
  """Measured 8e-6 at most, of a summed log-probability, and 1e-6 of a loss."""
  s, loss = runs.little(alone, tmp_path), bind(find(name), name, dict(beta=0.5))
  found, log = KINDS[name](trl, s, loss, how)
  runs.within(found, dict(learning_rate=1e-8), 1e-4)
  runs.learnt(log)


def loss_of(mine, own):
  """Our loss, of TRL's options."""
  bound = bind(LOSSES[mine], mine, own)
  if mine != "bco_pair":
    return bound
  # TRL's has no running mean.
  still = lambda policy, ref, given: bound(policy, ref, dict(delta=0.0))
  still.__dict__.update(bound.__dict__, stats=())
  return still


@pytest.mark.slow
@pytest.mark.parametrize("name", tables.DPO)
def test_every_loss_of_dpo_trainer(trl, alone, tmp_path, name):
  mine, options, own = tables.DPO[name]
  own = own | ({} if name == "sft" else dict(beta=0.5))
  # A likelihood has no rewards, which need a reference.
  names = () if name == "sft" else runs.PAIR
  with jax.enable_x64(True):
    found, _ = runs.on_pairs(
      trl,
      runs.little(alone, tmp_path, "float64"),
      loss_of(mine, own),
      runs.Run(),
      names,
      loss_type=[name],
      **options,
    )
  if name == "discopop":  # its gate is 20 times as steep as a sigmoid, so the
    # rounding of transformers' norms grows from step to step: 3e-4 measured
    runs.within(found, LIMITS | dict(grad_norm=3e-2), 1e-3)
  else:
    runs.within(found, LIMITS, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", tables.KTO)
def test_every_loss_of_kto_trainer(trl, alone, tmp_path, name):
  loss = loss_of(tables.KTO[name], dict(beta=0.5))
  with jax.enable_x64(True):
    s = runs.little(alone, tmp_path, "float64")
    found, _ = runs.on_unpaired(trl, s, loss, runs.Run(), loss_type=name)
  runs.within(found, LIMITS, 1e-5)


# TRL's experimental trainers: (module, our loss, batch, options, metrics).
# Their likelihood term is a mean over the batch's chosen tokens, `sft_tokens`
# here; ORPO's counts the prompt too, so its pairs have none, and one makes a
# batch, where both means agree. Others than these log means a token.
REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins")
CASES = {
  "sigmoid": (
    "CPO",
    "cpo(nll_weight=0)+sft_tokens",
    4,
    {},
    (*REWARDS, "logps/chosen"),
  ),
  "simpo": ("CPO", "simpo+sft_tokens", 4, dict(simpo_gamma=0.5), REWARDS),
  "orpo": ("ORPO", "orpo", 1, {}, REWARDS),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_experimental_trainers(trl, alone, tmp_path, case):
  trainer, name, batch, options, names = CASES[case]
  module = importlib.import_module(f"trl.experimental.{trainer.lower()}")
  options = options | (dict(loss_type=case) if trainer == "CPO" else {})
  loss = bind(find(name), name, dict(beta=0.5))
  with jax.enable_x64(True):
    s = runs.little(alone, tmp_path, "float64")
    if case == "orpo":
      s = s._replace(pool=[row | dict(prompt="") for row in s.pool])
    found, log = runs.on_pairs(
      module, s, loss, runs.Run(batch), names, trainer, **options
    )
  runs.within(found, LIMITS, 1e-5)
  runs.learnt(log)
