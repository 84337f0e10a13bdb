"""Small models of tests: their sizes, drawn parameters, and where these lie."""

import jax
import numpy as np

from jaxalign.core import sharding
from jaxalign.model import decoder


def sized(
  layers, width, heads, kv_heads, head_size, ff, vocab, context, **more
):
  """A ModelConfig by its sizes, in their order."""
  sizes = layers, width, heads, kv_heads, head_size, ff, vocab, context
  return decoder.ModelConfig(*sizes, **more)


def draw(m, seed=0, scale=0.3):
  """float32 parameters on the host, around 0; norms around 1."""
  rng = np.random.default_rng(seed)
  centre = lambda p: 0.0 if p.scale else p.constant
  return {
    n: np.float32(rng.normal(centre(p), scale, p.shape))
    for n, p in decoder.table(m).items()
  }


def put(mesh, m, params):
  """Parameters, or some of them, on the mesh by their axes."""
  rows = decoder.table(m)
  return {n: sharding.put(mesh, w, *rows[n].axes) for n, w in params.items()}


def make_mesh(fsdp=1, tensor=1):
  """A mesh over the first devices."""
  sizes = dict(fsdp=fsdp, tensor=tensor)
  return sharding.make_mesh(sizes, jax.devices()[: fsdp * tensor])


def joining(tok, folder=None):
  """A tokenizer, [CLS] 2 and [SEP] 3, made to join two texts; saved."""
  from tokenizers import processors

  tok.post_processor = processors.TemplateProcessing(
    single="[CLS] $A [SEP]",
    pair="[CLS] $A [SEP] $B:1 [SEP]:1",
    special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
  )
  if folder is not None:
    tok.save(str(folder / "tokenizer.json"))
  return tok


def word_pieces(words, folder=None):
  """A BERT tokenizer of a vocabulary."""
  import tokenizers

  ids = {w: i for i, w in enumerate(words)}
  model = tokenizers.models.WordPiece(ids, unk_token="[UNK]")
  tok = tokenizers.Tokenizer(model)
  tok.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
  return joining(tok, folder)


def save_drawn(folder, model, scale=0.3):
  """A model of transformers with every number drawn, saved."""
  import torch

  with torch.no_grad():
    for name, p in model.eval().named_parameters():
      p.normal_(0.0, scale)
      if "norm" in name.lower() and name.endswith("weight"):
        p += 1.0
  model.save_pretrained(folder)
  return model
