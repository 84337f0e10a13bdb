r"""What bfloat16 costs: each family beside its own float32, and transformers.

  python tools/bfloat16.py [--checkpoint=../shared/models/stories260K]

Prints, as lines of Markdown, the root mean square and the largest difference
of a logit to transformers' float32, and of a row's summed log-probability, for
our bfloat16 and for transformers' own. Random weights of one scale say how
rounding adds up, not what a trained model loses: for that give a checkpoint.
"""

import argparse
import os
import pathlib
import sys
import tempfile

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

# pylint: disable=wrong-import-position
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from jaxalign.core import sharding
from jaxalign.model import decoder, families, hf, logprob

ROWS, LENGTH = 8, 128
SIZES = dict(
  hidden_size=256,
  intermediate_size=704,
  num_hidden_layers=6,
  num_attention_heads=8,
  num_key_value_heads=4,
  vocab_size=2048,
  max_position_embeddings=256,
)
MORE = {
  "gpt_neox": dict(num_key_value_heads=None),
  "gemma2": dict(head_dim=32, sliding_window=64),
  "gemma3_text": dict(head_dim=32, sliding_window=64),
  "qwen3": dict(head_dim=32),
  "mistral": dict(sliding_window=64),
}


def save(family: str, folder: str) -> None:
  """A random model of a family, as transformers saves it."""
  sizes = {
    n: v for n, v in (SIZES | MORE.get(family, {})).items() if v is not None
  }
  torch.manual_seed(0)
  model = transformers.AutoModelForCausalLM.from_config(
    transformers.AutoConfig.for_model(family, **sizes)
  )
  with torch.no_grad():
    for _, p in model.named_parameters():
      if p.ndim > 1:  # as large as trained weights are
        p.normal_(0.0, 0.5 * p.shape[-1] ** -0.5)
  model.save_pretrained(folder)


def theirs(folder: str, tokens: np.ndarray, dtype: torch.dtype) -> np.ndarray:
  """Logits [B, L, V] by transformers, as float64."""
  model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=dtype, attn_implementation="eager"
  ).eval()
  with torch.no_grad():
    return model(torch.tensor(tokens, dtype=torch.long)).logits.double().numpy()


def ours(
  folder: str, tokens: np.ndarray, dtype: str
) -> tuple[np.ndarray, np.ndarray]:
  """Logits [B, L, V] and summed log-probabilities [B]."""
  m = hf.read_config(folder, dtype, "none")
  mesh = sharding.make_mesh(dict(fsdp=1, tensor=1), jax.devices()[:1])
  with jax.set_mesh(mesh):
    params = hf.load_folder(folder, m, mesh)

    @jax.jit
    def run(params, tokens):
      x, head = decoder.forward(params, tokens, m), decoder.head(params, m)
      each = logprob.token_logps(x, head, tokens, 64, m.final_softcap)
      return decoder.logits(x, head, m.final_softcap), jnp.sum(each, axis=1)

    return tuple(
      np.float64(x) for x in run(params, sharding.put(mesh, tokens, "batch"))
    )


def sums(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
  """[B] log-probabilities of the rows, float64."""
  x = logits[:, :-1]
  x = x - x.max(-1, keepdims=True)
  x = x - np.log(np.exp(x).sum(-1, keepdims=True))
  return np.take_along_axis(x, tokens[:, 1:, None], 2)[..., 0].sum(1)


def row(name: str, folder: str, vocab: int) -> None:
  """Measures one model and prints its line."""
  tokens = (
    np.random.default_rng(0).integers(3, vocab, (ROWS, LENGTH)).astype(np.int32)
  )
  exact = theirs(folder, tokens, torch.float32)
  total = sums(exact, tokens)
  peer = theirs(folder, tokens, torch.bfloat16)
  logits, logps = ours(folder, tokens, "bfloat16")
  single = ours(folder, tokens, "float32")[0]
  rms = lambda x: np.sqrt(np.mean(np.square(x)))
  print(
    f"| {name} | {abs(single - exact).max():.1e} | {rms(logits - exact):.4f}"
    f" ({abs(logits - exact).max():.3f}) | {rms(peer - exact):.4f} "
    f"({abs(peer - exact).max():.3f}) | {rms(logps - total):.3f} | "
    f"{rms(sums(peer, tokens) - total):.3f} |",
    flush=True,
  )


def main() -> None:
  """Prints the table."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--checkpoint", default="")
  args = parser.parse_args()
  print(
    "| model | float32, largest gap of a logit | bfloat16 logits, rms "
    "(largest): ours | transformers | summed log-prob of "
    f"{LENGTH} tokens, rms, nats: ours | transformers |\n"
    "|---|---|---|---|---|---|"
  )
  for family in families.FAMILIES:
    with tempfile.TemporaryDirectory() as folder:
      save(family, folder)
      row(family, folder, SIZES["vocab_size"])
  if args.checkpoint:
    m = hf.read_config(args.checkpoint, "float32", "none")
    row(pathlib.Path(args.checkpoint).name, args.checkpoint, m.vocab)


if __name__ == "__main__":
  main()
