r"""The paper's recipe: KTO of Mistral 7B on the tenth that ISA keeps.

  python -m jaxalign.main --config=configs/mistral_7b_kto_isa.py --workdir=...

Rows are embedded by the last hidden state of Llama-3-8B-Instruct; a mixture of
two full covariances, no PCA, no quota of labels; KTO with HALOs' settings and
a warm-up that is a ratio. Two gated models: set HF_TOKEN, or give folders
with --config.model.checkpoint and --config.embed.checkpoint.

  configs/mistral_7b_kto_isa.py:early    embeds with the policy's first 4 layers
  configs/mistral_7b_kto_isa.py:encoder  embeds with all-MiniLM-L6-v2

The batch of 32 fills at most fsdp=32: on more chips raise config.mesh.tensor.
Either brings the cost of selecting under 3 % of a full run (--dry_run).
"""

from configs import common


def get_config(variant=""):
  """The production job on a mesh of accelerators; see the module."""
  common.only(variant, "early", "encoder")
  c = common.production()
  c.model.checkpoint = "hf:mistralai/Mistral-7B-v0.1"
  c.embed.checkpoint = "hf:meta-llama/Meta-Llama-3-8B-Instruct"
  c.embed.pooling = "last"
  c.select.sampler, c.select.budget = "isa", 0.1
  c.select.mixture.pca = "0"  # none
  c.loss.name = "kto"
  c.train.batch_size, c.train.lr = 32, 5e-6
  c.train.clip, c.train.weight_decay = 1.0, 0.01
  if variant == "early":
    c.embed.checkpoint, c.embed.layers = c.model.checkpoint, 4
  if variant == "encoder":
    c.embed.checkpoint = "hf:sentence-transformers/all-MiniLM-L6-v2"
    c.embed.pooling, c.embed.tile = "auto", 64
  return c
