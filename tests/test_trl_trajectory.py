"""Steps on real pairs with a real model, TRL 1.16 and ours, in float32."""

import os

import pytest
from test_parity_trl_losses import trl as trl_fixture
import trl_runs as runs

from jaxalign.data import records, tokenizer
from jaxalign.data import tokens as tokens_lib
from jaxalign.data.encode import encode_texts
from jaxalign.model import hf
from jaxalign.train.losses import bind, LOSSES

# torch, transformers and trl warn of their own futures.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

trl = trl_fixture
# Ten minutes of the hundred steps are for a person who wants them.
STEPS = int(os.environ.get("JAXALIGN_TRL_STEPS", "10"))


def real_pairs(shared, tok, most):
  """Pairs of two rows of `most` tokens at most, and (read, refused, longer)
  of what went."""
  path = shared / "data/hh-harmless/pairs.jsonl.gz"
  read = records.load_records(str(path)).rows
  tokens, _, refused = encode_texts(
    tok,
    [r["prompt"] for r in read],
    {k: [r[k] for r in read] for k in ("chosen", "rejected")},
    1 << 14,
  )
  left = [r for i, r in enumerate(read) if i not in refused]
  size = tokens_lib.row_lengths(tokens).reshape(-1, 2).max(1)
  kept = [r for r, s in zip(left, size, strict=True) if s <= most]
  return kept, (len(read), len(refused), int((size > most).sum()))


@pytest.mark.parametrize(
  "name,run,most",
  [("dpo", runs.on_pairs, 512), ("kto", runs.on_unpaired, 256)],
  ids=["dpo", "kto"],
)
def test_steps_on_real_pairs(trl, alone, shared, tmp_path, name, run, most):
  """stories260K on hh-harmless, 1,794 pairs; of KTO any prompt and any answer
  must fit. JAXALIGN_TRL_STEPS=100 runs the hundred steps of these figures.

  Pairs: 1,260 of at most 512 tokens; over the 100 steps 1.1e-5 of a loss,
  2.3e-5 of a reward, 2.4e-4 nat of a mean sum of log-probabilities (200 to
  900, in float32 on both sides), 7.5e-4 of a gradient's norm. Unpaired: 615 of
  at most 256 tokens; 2.3e-6, 1.9e-5 and 1.9e-4, and 1.4e-4 of z0.
  """
  folder = shared / "models" / "stories260K"
  m = hf.read_config(folder, "float32", "none")._replace(attention="tiles")
  tok = tokenizer.load_tokenizer(folder)
  load = lambda: hf.load_folder(folder, m, alone)
  hf.export_folder(tmp_path / "export", load(), m, tok)
  pairs, counts = real_pairs(shared, tok, most)
  print(len(pairs), counts)
  how = runs.Run(batch=2, updates=STEPS, lr=1e-4, beta=0.1)
  s = runs.Setting(alone, tmp_path, m, load, tok, pairs[:150], chunk=64)
  found, log = run(trl, s, bind(LOSSES[name], name, dict(beta=how.beta)), how)
  runs.within(found, dict(learning_rate=1e-8), 1e-3)
  runs.learnt(log, 0.005 * STEPS / 100)
