"""Twenty steps beside TRL's experimental trainers: CPO, SimPO and ORPO.

Float64 on both sides, as in test_trl_float64. TRL's likelihood term is a mean
over the batch's chosen tokens, `sft_tokens` here; ORPO's counts the prompt too,
so its pairs have none, and one makes a batch, where both means agree.
"""

import importlib

import flat
import pytest
import test_parity_trl as harness
import test_trl_float64 as wide
import test_trl_trajectory as runs

from jaxalign.data.encode import encode_texts
from jaxalign.model import hf
from jaxalign.train.losses import bind, find

pytestmark = wide.pytestmark
trl, alone, float64 = harness.trl, harness.alone, wide.float64  # fixtures

REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins")
CASES = {
  "cpo": (
    "CPO",
    "cpo(nll_weight=0)+sft_tokens",
    4,
    dict(loss_type="sigmoid"),
    (*REWARDS, "logps/chosen"),
  ),
  "simpo": (
    "CPO",
    "simpo(gamma=0.5)+sft_tokens",
    4,
    dict(loss_type="simpo", simpo_gamma=0.5),
    REWARDS,
  ),
  "orpo": ("ORPO", "orpo", 1, {}, REWARDS),
}  # others log means a token


@pytest.mark.parametrize("case", CASES)
def test_twenty_steps(trl, alone, tmp_path, case):
  name, loss, batch, options, names = CASES[case]
  pool, tok = harness.data()
  if case == "orpo":
    pool = [row | dict(prompt="") for row in pool]
  hf.export_folder(
    tmp_path / "export", harness.fresh(alone), harness.MODEL, tok
  )
  tokens, _, refused = encode_texts(
    tok,
    [r["prompt"] for r in pool],
    {k: [r[k] for r in pool] for k in ("chosen", "rejected")},
    wide.MODEL.context,
  )
  assert not refused
  n, how = len(pool), wide.HOW | dict(batch=batch)
  rows = flat.train_rows(tokens, 2)  # of a reference that none reads
  taken = runs.order(n, batch, how["updates"])
  theirs, prepared = runs.theirs(
    importlib.import_module(f"trl.experimental.{name.lower()}"),
    tmp_path,
    name,
    [pool[i] for i in taken],
    dtype="float64",
    **how,
    **options,
  )
  for i, row in zip(taken, prepared, strict=True):
    for k, side in enumerate(("chosen", "rejected")):
      at = tokens.offsets[2 * i + k : 2 * i + k + 2]
      assert tokens.ids[at[0] : at[1]].tolist() == row[f"{side}_input_ids"]
  bound = bind(find(loss), loss, dict(beta=how["beta"]))
  found = runs.gaps(wide.ours(alone, rows, bound, batch=batch), theirs, names)
  runs.within(found, wide.LIMITS, 1e-5)
  assert abs(float(theirs[-1]["loss"]) - float(theirs[0]["loss"])) > 0.02
