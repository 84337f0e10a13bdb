"""TRL 1.16: every loss it has, on the same token log-probs, in float64.

Value and gradient by every token's log-prob, against TRL's own loss code. The
lists of losses are read from TRL, so one that we miss fails a test. Where TRL
is wrong, or ambiguous, the difference is asserted.
"""

import ast
import collections
import contextlib
import dataclasses
import importlib
import inspect
import textwrap
import types

import flat
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.core.lookup import keywords
from jaxalign.train import statistics
from jaxalign.train.batch import Logps
from jaxalign.train.logps import common_prefix_sums
from jaxalign.train.losses import find, LOSSES

# torch, transformers and trl warn of their own futures.
pytestmark = [
  pytest.mark.filterwarnings("ignore"),
  pytest.mark.usefixtures("quick_compiles"),
]

PROMPT, LENGTH, PAIRS = 2, 9, 6
SIDES = ("chosen", "rejected")
EXACT, SINGLE = 1e-10, 2e-6  # where TRL computes in float64, and where not


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


@pytest.fixture
def trl():
  pytest.importorskip("torch")
  return pytest.importorskip("trl")


class Rows(types.SimpleNamespace):
  """Token log-probs [B, R, L] of policy and reference, and the mask."""


def rows_of(responses=2, spread=2.0, lengths=None, pairs=PAIRS):
  """Responses of 1 to 7 tokens after a prompt of two."""
  rng = np.random.default_rng(responses)
  shape = (pairs, responses, LENGTH)
  each = -rng.exponential(1.0, shape) - 0.05
  ref = -np.abs(each + rng.normal(0, spread, shape))
  n = rng.integers(1, LENGTH - PROMPT + 1, shape[:2])
  if lengths is not None:
    n[:] = lengths
  at = np.arange(LENGTH)[None, None, :]
  mask = ((at >= PROMPT) & (at < PROMPT + n[..., None])).astype(np.int32)
  return Rows(
    each=each * mask, ref=ref * mask, mask=mask, label=rng.random(pairs) < 0.5
  )


def logps(each, mask):
  mask = jnp.asarray(mask)
  return Logps(
    jnp.sum(each * mask, -1),
    jnp.sum(mask, -1).astype(each.dtype),
    common_prefix_sums(each, mask),
  )


def ours(name, rows, stats=(), **kwargs):
  """(mean loss, its gradient by every token's log-prob, metrics)."""
  fn, ref = find(name), logps(jnp.asarray(rows.ref), rows.mask)
  stats = dict(stats, mean_count=rows.mask[:, 0].sum() / len(rows.mask))
  if rows.mask.shape[1] == 2:
    sums = logps(jnp.asarray(rows.each), rows.mask).sum
    names = ("matched_margins", "matched_ratios")
    stats |= {n: flat.matched(n, sums, ref.sum) for n in names}

  def mean(each):
    loss, metrics = fn(logps(each, rows.mask), ref, stats, **kwargs)
    return jnp.mean(loss), metrics

  (value, metrics), grad = jax.value_and_grad(mean, has_aux=True)(
    jnp.asarray(rows.each)
  )
  return float(value), np.asarray(grad), metrics


def trainer_of(**more):
  """What TRL's loss code reads of its trainer; one process, no model."""
  import torch

  same = lambda x: x
  return types.SimpleNamespace(
    **dict(
      model=types.SimpleNamespace(training=True),
      accelerator=types.SimpleNamespace(
        device=torch.device("cpu"), gather=same, gather_for_metrics=same
      ),
      aux_loss_enabled=False,
      precompute_ref_logps=False,
      _tp_size=1,
      _total_train_tokens=0,
      use_weighting=False,
      is_encoder_decoder=False,
      pad_token_id=0,
      padding_value=0,
      _metrics={"train": collections.defaultdict(list)},
    )
    | more
  )


def model_of(each, mask):
  """A "model" that answers with these token log-probs [B, L]; TRL's are 0 on
  prompt and padding, and lack the first token's."""
  import torch

  def call(**kwargs):
    x = (each * mask)[:, 1:]
    zero = torch.zeros_like(x)
    more = dict(entropy=zero, mean_logits=zero, is_top1=zero.bool())
    return types.SimpleNamespace(log_probs=x, **more)

  return call


def theirs(
  trl,
  losses,
  rows,
  *,
  ld_alpha=None,
  f="reverse_kl",
  label_smoothing=0.0,
  weights=None,
  beta=0.1,
  dtype="float64",
  **more,
):
  """(loss, gradient by every token, metrics) of TRL's DPOTrainer."""
  import torch

  dtype = getattr(torch, dtype)
  flat = lambda x: torch.tensor(np.concatenate([x[:, 0], x[:, 1]]))
  each = flat(rows.each).to(dtype).requires_grad_()
  mask = flat(rows.mask)
  trainer = trainer_of(
    beta=beta,
    ld_alpha=ld_alpha,
    f_divergence_type=f,
    loss_types=losses,
    loss_weights=weights or [1.0] * len(losses),
    label_smoothing=label_smoothing,
    args=types.SimpleNamespace(discopop_tau=more.pop("tau", 0.05)),
    ref_model=model_of(flat(rows.ref).to(dtype), mask),
    **more,
  )
  trainer.args.gradient_checkpointing_kwargs = None
  # Only the switch that stops the gradient of the reference's pass.
  trainer.args.gradient_checkpointing = False
  ids = torch.ones_like(mask, dtype=torch.long)
  given = dict(input_ids=ids, attention_mask=ids, completion_mask=mask)
  module = importlib.import_module("trl.trainer.dpo_trainer")
  held = module.disable_gradient_checkpointing, module.is_peft_model
  module.disable_gradient_checkpointing = lambda *_: contextlib.nullcontext()
  module.is_peft_model = lambda model: False
  try:
    loss = trl.DPOTrainer._compute_loss(
      trainer, model_of(each, mask), given, False
    )
  finally:
    module.disable_gradient_checkpointing, module.is_peft_model = held
  loss.backward()
  grad = each.grad.double().numpy().reshape(2, len(rows.each), LENGTH)
  return (
    loss.item(),
    grad.swapaxes(0, 1),
    {n: v[0] for n, v in trainer._metrics["train"].items()},
  )


def agree(a, b, tolerance):
  np.testing.assert_allclose(a[0], b[0], rtol=tolerance, atol=tolerance)
  np.testing.assert_allclose(a[1], b[1], rtol=tolerance, atol=tolerance)


def compared_with(fn, name):
  """The strings that a function compares a name or attribute with."""
  found = set()
  for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(fn)))):
    if isinstance(node, ast.Compare) and name == getattr(
      node.left, "id", getattr(node.left, "attr", "")
    ):
      found |= {
        c.value for c in node.comparators if isinstance(c, ast.Constant)
      }
  return found


def fields_of(config):
  return {f.name: f for f in dataclasses.fields(config)}


# TRL's name: (ours, keywords of TRL's, keywords of ours).
SMOOTH = dict(label_smoothing=0.2)
DPO = {
  "sigmoid": ("dpo", {}, {}),
  "hinge": ("hinge", {}, {}),
  "ipo": ("ipo", {}, {}),
  "exo_pair": ("exo", dict(label_smoothing=1e-3), dict(epsilon=1e-3)),
  "nca_pair": ("nca", {}, {}),
  "robust": ("robust", SMOOTH, SMOOTH),
  "bco_pair": ("bco_pair", {}, {}),
  "sppo_hard": ("sppo", {}, {}),
  "aot": ("aot", SMOOTH, SMOOTH),
  "aot_unpaired": ("aot_unpaired", SMOOTH, SMOOTH),
  "apo_zero": ("apo_zero", {}, {}),
  "apo_down": ("apo_down", {}, {}),
  "discopop": ("discopop", {}, {}),
  "sft": ("sft_tokens", {}, {}),
  "sigmoid_norm": ("dpo_norm", {}, {}),
}
DIVERGENCES = {
  "reverse_kl": "dpo",
  "forward_kl": "dpo_forward_kl",
  "js_divergence": "dpo_js",
  "alpha_divergence": "dpo_alpha",
}
KTO = {"kto": "kto", "apo_zero_unpaired": "apo_zero_unpaired"}
CPO = dict(
  sigmoid="cpo", simpo="simpo", alphapo="alphapo", hinge="hinge", ipo="ipo"
)
UNPAIRED = tuple(
  f"{of}/{side}" for of in ("rewards", "logps") for side in SIDES
)
REWARDS = tuple(f"rewards/{n}" for n in (*SIDES, "margins", "accuracies"))


def test_no_loss_of_trl_is_missing(trl):
  """Each list as TRL's own code and its options have it."""
  cpo = importlib.import_module("trl.experimental.cpo")
  of = lambda config: fields_of(config)["loss_type"].metadata
  compute, help_text = trl.DPOTrainer._compute_loss, of(trl.DPOConfig)["help"]
  assert compared_with(compute, "loss_type") == set(DPO)
  assert all(f"`'{name}'`" in help_text for name in DPO)
  assert help_text.count("`'") == len(DPO)
  assert compared_with(compute, "f_divergence_type") == set(DIVERGENCES)
  assert set(of(trl.KTOConfig)["choices"]) == set(KTO)
  assert set(of(cpo.CPOConfig)["choices"]) == set(CPO)
  named = [mine for mine, *_ in DPO.values()]
  for table in (DIVERGENCES, KTO, CPO):
    named += table.values()
  assert set(named) <= set(LOSSES)


def test_defaults_are_trl_s_or_differ_for_a_reason(trl):
  """TRL's one beta, 0.1, is wrong for means a token (dpo_norm, SimPO); its
  label_smoothing of 0 makes robust plain DPO and EXO infinite, and its alpha
  of 0 makes AlphaPO SimPO."""
  cpo, orpo = (
    importlib.import_module(f"trl.experimental.{n}") for n in ("cpo", "orpo")
  )
  dpo, kto, cpo, orpo = (
    {n: f.default for n, f in fields_of(config).items()}
    for config in (trl.DPOConfig, trl.KTOConfig, cpo.CPOConfig, orpo.ORPOConfig)
  )
  own = lambda name, key: keywords(LOSSES[name])[key].default
  for mine in {mine for mine, *_ in DPO.values()} - {"sft_tokens", "dpo_norm"}:
    assert own(mine, "beta") == dpo["beta"], mine
  assert own("dpo_norm", "beta") == 50 * dpo["beta"]
  assert dpo["label_smoothing"] == 0 != own("robust", "label_smoothing") == 0.1
  assert own("discopop", "tau") == dpo["discopop_tau"]
  assert own("dpo_alpha", "alpha") == dpo["f_alpha_divergence_coef"]
  for mine in KTO:
    assert own(mine, "beta") == kto["beta"]
    for side in ("desirable", "undesirable"):
      assert own(mine, side) == kto[f"{side}_weight"]
  assert own("cpo", "beta") == cpo["beta"]
  assert own("cpo", "nll_weight") == cpo["cpo_alpha"]
  assert own("orpo", "beta") == orpo["beta"]
  assert own("simpo", "gamma") == cpo["simpo_gamma"]
  assert own("simpo", "beta") == 20 * cpo["beta"]
  assert cpo["alpha"] == 0 != own("alphapo", "alpha")


@pytest.mark.parametrize("name", DPO)
def test_losses_of_dpo_trainer(trl, name):
  """TRL rounds EXO's epsilon to float32."""
  mine, both, alone = DPO[name]
  beta = {} if name == "sft" else dict(beta=0.3)
  stats = dict(delta=0.0)  # TRL's bco_pair has no running mean
  tolerance = SINGLE if name == "exo_pair" else EXACT
  for spread in (0.0, 2.0, 40.0):
    rows = rows_of(spread=spread)
    got = ours(mine, rows, stats, **beta, **alone)
    wanted = theirs(trl, [name], rows, beta=0.3, **both)
    agree(got, wanted, tolerance * (1 + abs(wanted[0])))
    for key in () if name == "sft" else {*REWARDS, *UNPAIRED}:
      mean, close = np.mean(got[2][key]), dict(rtol=1e-6, atol=1e-9)
      np.testing.assert_allclose(mean, wanted[2][key], **close, err_msg=key)


@pytest.mark.parametrize("f", DIVERGENCES)
def test_divergences(trl, f):
  """TRL's alpha divergence knows 16- and 32-bit floats only: a KeyError."""
  single = f == "alpha_divergence"
  for alpha in (0.5, 1.0, 1.7) if single else (None,):
    kwargs = dict(alpha=alpha) if single else {}
    rows = rows_of(spread=0.7)
    agree(
      ours(DIVERGENCES[f], rows, beta=0.3, **kwargs),
      theirs(
        trl,
        ["sigmoid"],
        rows,
        f=f,
        beta=0.3,
        f_alpha_divergence_coef=alpha,
        dtype="float32" if single else "float64",
      ),
      5 * SINGLE if single else EXACT,
    )
  if single:
    with pytest.raises(KeyError):
      theirs(trl, ["sigmoid"], rows_of(), f=f, f_alpha_divergence_coef=0.5)


@pytest.mark.parametrize(
  "name,losses,more",
  [
    *(
      (f"ld_dpo(tail_weight={weight})", ["sigmoid"], dict(ld_alpha=weight))
      for weight in (0.0, 0.3, 1.0)  # of policy and reference
    ),
    # RPO and MPO as TRL's docs write them.
    ("dpo+0.2*sft_tokens", ["sigmoid", "sft"], dict(weights=[1.0, 0.2])),
    (
      "0.8*dpo+0.2*bco_pair+sft_tokens",
      ["sigmoid", "bco_pair", "sft"],
      dict(weights=[0.8, 0.2, 1.0]),
    ),
  ],
)
def test_options_and_sums_of_losses(trl, name, losses, more):
  rows = rows_of()
  wanted = theirs(trl, losses, rows, beta=0.3, **more)
  agree(ours(name, rows, dict(delta=0.0), beta=0.3), wanted, EXACT)


# Where TRL is wrong or ambiguous.


def test_trl_s_sigmoid_ignores_its_label_smoothing(trl):
  rows = rows_of()
  value = theirs(trl, ["sigmoid"], rows, label_smoothing=0.2)[0]
  assert value == pytest.approx(ours("dpo", rows)[0], rel=EXACT)
  assert abs(value - ours("dpo", rows, label_smoothing=0.2)[0]) > 1e-2


def test_trl_s_sft_weighs_tokens_and_sft_weighs_answers(trl):
  """The same where all chosen answers are of one length."""
  uneven, even = rows_of(), rows_of(lengths=4)
  assert abs(ours("sft", uneven)[0] - theirs(trl, ["sft"], uneven)[0]) > 1e-2
  agree(ours("sft", even), theirs(trl, ["sft"], even), EXACT)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_trl_s_aot_depends_on_how_the_batch_is_cut(trl, name):
  """Two halves, each sorted alone, are not the whole; ours stays the same
  with the ranks of the whole batch (test_losses_batch.py)."""
  rows = rows_of(spread=4.0)
  half = lambda at: Rows(**{n: x[at] for n, x in vars(rows).items()})
  cut = [theirs(trl, [name], half(at))[0] for at in (slice(0, 3), slice(3, 6))]
  whole = theirs(trl, [name], rows)[0]
  assert abs(np.mean(cut) - whole) > 1e-4
  assert ours(name, rows)[0] == pytest.approx(whole, rel=EXACT)


@pytest.mark.parametrize(
  "name,mine,f",
  [
    ("discopop", "discopop", "reverse_kl"),
    ("sigmoid", "dpo_forward_kl", "forward_kl"),
  ],
)
def test_trl_overflows(trl, name, mine, f):
  """0 * e^2400 in DiscoPOP's blend, e^8000 in the forward KL's score of a
  chosen answer that has become impossible."""
  rows = rows_of(lengths=1)
  rows.each[0, 0] = rows.mask[0, 0] * -8e3
  assert not np.isfinite(theirs(trl, [name], rows, f=f, beta=0.3)[0])
  value, grad, metrics = ours(mine, rows, beta=0.3)
  assert np.isfinite(value) and np.isfinite(grad).all()
  assert all(np.isfinite(x).all() for x in metrics.values())


# KTO.


def their_kto(trl, rows, loss_type, kl=0.0, beta=0.3):
  import torch

  each = torch.tensor(rows.each[:, 0]).requires_grad_()
  mask = torch.tensor(rows.mask[:, 0])
  ids = torch.ones_like(mask, dtype=torch.long)
  trainer = trainer_of(
    beta=beta,
    calculate_KL=loss_type == "kto",
    loss_type=loss_type,
    desirable_weight=1.3,
    undesirable_weight=0.7,
    precompute_ref_logps=True,
    _compute_kl_logps=lambda model, batch: torch.full(
      (PAIRS,), kl, dtype=torch.float64
    ),
  )
  loss = trl.KTOTrainer._compute_loss(
    trainer,
    model_of(each, mask),
    dict(
      input_ids=ids,
      attention_mask=ids,
      completion_mask=mask,
      label=torch.tensor(rows.label),
      ref_logps=torch.tensor(rows.ref.sum(-1)[:, 0]),
      ref_KL_logps=torch.zeros(PAIRS, dtype=torch.float64),
    ),
    False,
  )
  loss.backward()
  return (
    loss.item(),
    each.grad.numpy()[:, None],
    {n: v[0] for n, v in trainer._metrics["train"].items()},
  )


@pytest.mark.parametrize("labels", ["mixed", "liked", "disliked"])
@pytest.mark.parametrize("name", KTO)
def test_losses_of_kto_trainer(trl, name, labels):
  for spread, kl in ((0.0, 0.0), (2.0, 1.7), (40.0, -2.0)):
    rows = rows_of(1, spread)
    if labels != "mixed":
      rows.label = np.full(PAIRS, labels == "liked")
    got = ours(
      KTO[name],
      rows,
      dict(label=jnp.asarray(rows.label), z0=max(0.0, kl)),
      beta=0.3,
      desirable=1.3,
      undesirable=0.7,
    )
    wanted = their_kto(trl, rows, name, kl)
    agree(got, wanted, EXACT)
    for key in UNPAIRED:
      value, weight = (np.sum(x) for x in got[2][key])
      assert (weight > 0) == (key in wanted[2])
      if weight:
        mean, close = value / weight, dict(rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(mean, wanted[2][key], **close)
    if name == "kto":
      np.testing.assert_allclose(got[2]["kl"], wanted[2]["kl"], rtol=1e-6)


# CPO, SimPO, AlphaPO and ORPO: on logits, likelihood term included.


def logits_of(rows, vocab=11):
  """(logits, ids, labels) [2 B, L] of a batch, and rows with their log-probs;
  no reference, so its log-probs are 0."""
  import torch

  rng = np.random.default_rng(4)
  n = 2 * len(rows.mask)
  mask = np.concatenate([rows.mask[:, 0], rows.mask[:, 1]])
  ids = rng.integers(0, vocab, (n, LENGTH))
  logits = rng.normal(0, 2, (n, LENGTH, vocab))
  total = np.log(np.exp(logits).sum(-1))
  each = np.zeros((n, LENGTH))
  each[:, 1:] = (
    np.take_along_axis(logits[:, :-1], ids[:, 1:, None], -1)[..., 0]
    - total[:, :-1]
  )
  read = mask.cumsum(-1)[:, -1:] + PROMPT > np.arange(LENGTH)[None, :]
  halves = lambda x: np.stack(np.split(x, 2), 1)
  batch = {}
  for at, side in ((0, "chosen"), (1, "rejected")):
    part = lambda x: torch.tensor(np.split(x, 2)[at])
    batch |= {
      f"{side}_input_ids": part(ids),
      f"{side}_attention_mask": part(read.astype(np.int64)),
      f"{side}_labels": part(np.where(mask == 1, ids, -100)),
    }
  return (
    torch.tensor(logits),
    batch,
    halves(each * read),
    Rows(each=halves(each * mask), ref=0 * rows.each, mask=rows.mask),
  )


def their_total(name, logits, batch, **more):
  """(loss, metrics) of TRL's CPO or ORPO trainer on a whole batch."""
  module = importlib.import_module(f"trl.experimental.{name.lower()}")
  cls = getattr(module, f"{name}Trainer")
  trainer = trainer_of(
    **dict(
      beta=0.3,
      cpo_alpha=1.0,
      alpha=0.0,
      label_smoothing=0.0,
      simpo_gamma=0.5,
      concatenated_inputs=cls.concatenated_inputs,
      get_batch_logps=cls.get_batch_logps,
    )
    | more
  )
  for method in ("concatenated_forward", "cpo_loss", "odds_ratio_loss"):
    if hasattr(cls, method):
      setattr(trainer, method, types.MethodType(getattr(cls, method), trainer))
  model = lambda ids, **kwargs: types.SimpleNamespace(logits=logits)
  loss, metrics = cls.get_batch_loss_metrics(trainer, model, batch)
  return loss.item(), metrics


def metrics_agree(got, wanted):
  for key in REWARDS:
    np.testing.assert_allclose(np.mean(got[key]), wanted[key], rtol=1e-6)


@pytest.mark.parametrize("name", CPO)
def test_losses_of_cpo_trainer(trl, name):
  """Its likelihood term is a mean over the batch's tokens: `sft_tokens`, which
  is CPO's own, a mean over each answer's, where lengths agree. "simpo" keeps
  the term too unless cpo_alpha is 0, which "alphapo" sets. Its hinge and IPO
  are ours with a reference of 0."""
  logits, batch, _, rows = logits_of(rows_of())
  nll = ours("sft_tokens", rows)[0]
  # What CPOConfig makes of "alphapo": `simpo` without a likelihood term.
  shape = dict(alpha=0.25, cpo_alpha=0.0) if name == "alphapo" else {}
  loss, metrics = their_total(
    "CPO", logits, batch, **shape, loss_type=name.replace("alphapo", "simpo")
  )
  kwargs = dict(beta=0.3)
  kwargs |= dict(nll_weight=0.0) if name == "sigmoid" else {}
  value, _, got = ours(CPO[name], rows, **kwargs)
  nll = 0.0 if name == "alphapo" else nll
  assert value + nll == pytest.approx(loss, rel=EXACT)
  if name != "ipo":  # TRL logs its means a token; ours logs sums
    metrics_agree(got, metrics)
  if name == "sigmoid":
    assert abs(ours("cpo", rows, beta=0.3)[0] - loss) > 1e-3
    logits, batch, _, rows = logits_of(rows_of(lengths=4))
    assert ours("cpo", rows, beta=0.3)[0] == pytest.approx(
      their_total("CPO", logits, batch, loss_type=name)[0], rel=EXACT
    )


def test_what_cpo_config_makes_of_alphapo(trl, tmp_path):
  cpo = importlib.import_module("trl.experimental.cpo")
  config = cpo.CPOConfig(
    output_dir=str(tmp_path),
    loss_type="alphapo",
    bf16=False,
    use_cpu=True,
    report_to=[],
  )
  assert (config.loss_type, config.cpo_alpha) == ("simpo", 0.0)


def test_trl_s_alphapo_of_unlikely_answers_is_not_a_number(trl):
  """p^-alpha of a p that has underflown; the exponent, held, has not."""
  import torch

  cpo = importlib.import_module("trl.experimental.cpo")
  trainer = trainer_of(
    beta=0.3,
    alpha=0.25,
    loss_type="simpo",
    simpo_gamma=0.5,
    label_smoothing=0.0,
  )
  low = torch.tensor([-800.0], dtype=torch.float64)
  assert torch.isnan(cpo.CPOTrainer.cpo_loss(trainer, low, low * 2)[0]).all()
  policy = Logps(jnp.array([[-800.0, -1600.0]]), jnp.ones((1, 2)))
  assert np.isfinite(LOSSES["alphapo"](policy, None, {}, alpha=0.25)[0]).all()


def test_orpo_up_to_the_tokens_of_its_likelihood(trl):
  """TRL's likelihood is a mean over prompts and chosen answers together, ours
  over each answer; its odds are in float32."""
  logits, batch, read, rows = logits_of(rows_of())
  loss, metrics = their_total("ORPO", logits, batch)
  value, _, got = ours("orpo", rows, beta=0.3)
  tokens = batch["chosen_attention_mask"][:, 1:].sum().item()
  with_prompt = -read[:, 0].sum() / tokens
  np.testing.assert_allclose(metrics["nll_loss"], with_prompt, rtol=EXACT)
  assert value - ours("sft", rows)[0] + with_prompt == pytest.approx(
    loss, rel=SINGLE
  )
  assert abs(value - loss) > 1e-2
  np.testing.assert_allclose(
    np.mean(got["log_odds"]), metrics["log_odds_chosen"], rtol=SINGLE
  )
  metrics_agree(got, metrics)


def test_trl_s_orpo_of_certain_answers_is_not_a_number(trl):
  import torch

  orpo = importlib.import_module("trl.experimental.orpo")
  sure = torch.zeros(1)
  theirs = orpo.ORPOTrainer.odds_ratio_loss(trainer_of(beta=0.1), sure, sure)
  assert torch.isnan(theirs[0]).all()
  policy = Logps(jnp.zeros((1, 2)), jnp.ones((1, 2)))
  np.testing.assert_allclose(
    LOSSES["orpo"](policy, None, {})[0], 0.1 * np.log(2)
  )


# BCO.


def test_bco_without_a_delta_is_bco_pair_s_two_halves(trl):
  """TRL 1.16 has BCO for pairs only; each answer is a row with a label."""
  rows = rows_of()
  apart = lambda x: x.reshape(-1, 1, LENGTH)
  split = Rows(**{n: apart(getattr(rows, n)) for n in ("each", "ref", "mask")})
  label = jnp.tile(jnp.array([True, False]), PAIRS)
  value, grad, _ = ours("bco", split, dict(label=label, delta=0.0), beta=0.3)
  agree(
    (2 * value, 2 * grad.reshape(rows.each.shape)),
    theirs(trl, ["bco_pair"], rows, beta=0.3),
    EXACT,
  )


def test_losses_of_bco_trainer(trl):
  """The TRL versions that have one (1.0 does, 1.16 not): the running mean over
  three batches, and the loss, with weights and without. TRL's running mean is
  in float32 and starts with a count of 1e-24."""
  import torch

  bco = pytest.importorskip("trl.experimental.bco.bco_trainer")
  accelerator = trainer_of().accelerator
  accelerator.use_distributed = False
  running = bco.RunningMoments(accelerator)
  delta = statistics.init_mean()
  for step in range(3):
    rng = np.random.default_rng(step)
    label = rng.random(8) < 0.5
    policy = rng.normal(-30, 5, (8, 1))
    ref = policy + rng.normal(step, 4, (8, 1))
    weights = rng.uniform(0.5, 10, 8)
    delta = statistics.update_mean(delta, jnp.asarray(0.3 * (policy - ref)))
    stats = dict(
      label=jnp.asarray(label), delta=delta.mean, weights=jnp.asarray(weights)
    )
    as_logps = lambda x: Logps(jnp.asarray(x), jnp.ones((8, 1)))
    for name, matched in (("bco", False), ("bco_udm", True)):
      trainer = trainer_of(
        beta=0.3,
        running=running,
        match_underlying_distribution=matched,
        _get_udm_weight=lambda x: torch.tensor(weights[~label]),
      )
      of = lambda x, rows: torch.tensor(x[rows, 0])
      wanted = bco.BCOTrainer.bco_loss(
        trainer,
        of(policy, label),
        of(policy, ~label),
        of(ref, label),
        of(ref, ~label),
        None,
        None,
        do_train=not matched,
      )
      loss, _ = LOSSES[name](as_logps(policy), as_logps(ref), stats, beta=0.3)
      np.testing.assert_allclose(
        np.concatenate([loss[label], loss[~label]]),
        wanted[0].numpy(),
        rtol=SINGLE,
      )
      np.testing.assert_allclose(delta.mean, wanted[3].item(), rtol=SINGLE)
