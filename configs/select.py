r"""Selection alone, of all rows of a source.

  python -m jaxalign.select --config=configs/select.py \
      --config.data.source=pairs.parquet --output=subset.parquet
  python -m jaxalign.select --config=configs/select.py \
      --config.data.source=pairs.parquet --output=subset.parquet \
      --config.embed.checkpoint=<a Hugging Face folder, an encoder for instance>

Without a checkpoint a small model is trained on the better answers first, to
embed with; a sampler that reads no embedding (crossfit_lite, random, length)
trains none.
"""

from configs import common


def get_config(variant=""):
  """`variant`: "" or those of configs/common.py."""
  c = common.base(variant)
  c.data.source = ""  # a path, a glob, hf:<name>, tfds:<name>
  c.data.split.update(sft=0.0, pool=1.0, held_out=0.0)
  c.select.sampler, c.select.budget = "isa", 0.1
  return c
