"""What `--config=<file>:<variants>` changes of the defaults, by name.

"smoke" and "tiny" are smaller; "hh" reads real pairs; "kto" trains on single
answers; the others are worlds with trouble in them.
"""

from ml_collections import ConfigDict


def _smoke(c: ConfigDict) -> None:
  """A smaller world and model: the whole idea in a minute."""
  w = c.data.world
  w.topics, w.argument_words, w.arguments = 32, 10, 3
  w.sft_rows, w.pool_rows, w.held_out_rows = 12000, 4000, 500
  c.model.layers, c.model.width, c.model.ff = 2, 96, 288
  c.sft.updates, c.train.max_updates, c.eval.prompts = 500, 125, 256
  c.train.lr = 1e-3
  c.select.mixture.starts, c.select.stability_seeds = 5, 2


def _tiny(c: ConfigDict) -> None:
  """A whole job in seconds: every stage runs, nothing is learnt (tests)."""
  _smoke(c)
  w = c.data.world
  w.sft_rows, w.pool_rows, w.held_out_rows = 200, 160, 40
  w.arguments = 2  # rows of one length bucket: one shape to compile
  m = c.model
  m.layers, m.width, m.heads, m.ff = 1, 32, 2, 64
  m.vocab_size, m.context = 512, 32
  c.sft.updates, c.sft.batch_size, c.sft.save_every = 6, 8, 2
  c.train.batch_size, c.train.max_updates, c.train.save_every = 8, 4, 2
  c.embed.tile, c.ask.context, c.judge.labels = 8, 384, 8
  c.proxy.updates, c.proxy.models = 4, 2
  c.eval.prompts, c.eval.new_tokens = 16, 8
  c.select.mixture.starts, c.select.stability_seeds = 1, 1
  c.compare = ("random",)


def _hh(c: ConfigDict) -> None:
  """Anthropic/hh-rlhf: real dialogues, a small model trained on the spot.

  It shows that the machinery runs on real pairs; it is too small to rank
  samplers (see BENCHMARKS.md).
  """
  c.data.source = "hf:Anthropic/hh-rlhf"
  m = c.model
  m.vocab_size, m.context, m.layers, m.width, m.ff = 2048, 256, 4, 128, 384
  c.sft.updates, c.sft.batch_size, c.sft.save_every = 200, 16, 50
  c.embed.tile = 16
  c.train.batch_size, c.train.max_updates, c.train.save_every = 16, 60, 20
  c.loss.name = "dpo(beta=0.1)+0.2*sft"
  c.eval.prompts, c.eval.new_tokens = 64, 48


def _kto(c: ConfigDict) -> None:
  """Pairs split into single answers, liked or not: unpaired feedback, KTO."""
  c.loss.name = "kto(beta=0.3)"
  c.train.batch_size = 64  # rows, as many answers as 32 pairs


def _world(**knobs: float):
  return lambda c: c.data.world.update(**knobs)


VARIANTS = {
  "smoke": _smoke,
  "tiny": _tiny,
  "hh": _hh,
  "kto": _kto,
  # Worlds with trouble in them.
  "redundant": _world(redundancy=0.6),
  "flips": _world(flips=0.25),
  "junk": _world(junk=0.15),
  "mixed": _world(redundancy=0.4, flips=0.1, junk=0.1),
}
