"""The other side of tools/gpu.py: torch, transformers and TRL, by requests.

Reads one JSON request a line and answers with one line, so that the process
that asks can take turns with it on one card. What a request builds is kept
until another is asked for. Seconds are of one call, waited for; a first call
(and torch.compile's work) lies outside the clock.
"""

import gc
import json
import os
import sys
import time

# Answers go out on the real stdout; what libraries print goes to the log.
ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")

import torch  # noqa: E402

DEVICE = "cpu" if "--toy" in sys.argv else "cuda"
if DEVICE == "cpu":
  torch.set_num_threads(1)  # more of them spin while others hold the cores
HELD = {}  # the one thing that was built, by its request


def sync() -> None:
  if DEVICE == "cuda":
    torch.cuda.synchronize()


def llama(r, dtype):
  """A LlamaForCausalLM of the sizes asked for, random, with SDPA."""
  import transformers

  config = transformers.LlamaConfig(
    hidden_size=r["width"],
    intermediate_size=r["ff"],
    num_hidden_layers=r["layers"],
    num_attention_heads=r["heads"],
    num_key_value_heads=r["kv_heads"],
    head_dim=r["head_size"],
    vocab_size=r["vocab"],
    max_position_embeddings=r["length"],
    tie_word_embeddings=False,
    attention_dropout=0.0,
  )
  with torch.device(DEVICE):
    model = transformers.AutoModelForCausalLM.from_config(
      config, attn_implementation="sdpa"
    )
  assert model.config._attn_implementation == "sdpa"
  return model.to(dtype)


def ids_of(r):
  return torch.randint(0, r["vocab"], (r["rows"], r["length"]), device=DEVICE)


def train(r):
  """Forward, backward, a clip and AdamW.

  "autocast": float32 weights and moments, bfloat16 products, as ours;
  "bfloat16": weights and moments in bfloat16.
  """
  mixed = r["precision"] == "autocast"
  model = llama(r, torch.float32 if mixed else torch.bfloat16).train()
  ids = ids_of(r)
  if r["compile"]:
    model.compile()
  optimizer = torch.optim.AdamW(
    model.parameters(), lr=1e-5, weight_decay=0.0, fused=DEVICE == "cuda"
  )

  def run():
    with torch.autocast(DEVICE, torch.bfloat16, enabled=mixed):
      loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss

  return run


def attention(r):
  """Causal scaled_dot_product_attention with grouped queries, bfloat16."""

  def draw(heads):
    return torch.randn(
      r["rows"],
      heads,
      r["length"],
      r["head_size"],
      device=DEVICE,
      dtype=torch.bfloat16,
      requires_grad=r["backward"],
    )

  q, k, v = draw(r["heads"]), draw(r["kv_heads"]), draw(r["kv_heads"])
  g = torch.randn_like(q)

  def run():
    y = torch.nn.functional.scaled_dot_product_attention(
      q, k, v, is_causal=True, enable_gqa=True
    )
    if r["backward"]:
      q.grad = k.grad = v.grad = None
      y.backward(g)
    return y

  return run


def timed(r, build):
  """{"seconds": a mean over `calls` calls} of what `build(r)` runs."""
  key = json.dumps({k: v for k, v in r.items() if k != "calls"}, sort_keys=True)
  if key not in HELD:
    release()
    HELD[key] = build(r)
    for _ in range(3 if r.get("compile") else 1):
      HELD[key]()
  run = HELD[key]
  sync()
  start = time.perf_counter()
  for _ in range(r["calls"]):
    run()
  sync()
  return dict(seconds=(time.perf_counter() - start) / r["calls"])


def release(_=None):
  HELD.clear()
  gc.collect()
  if DEVICE == "cuda":
    torch.cuda.empty_cache()
  return {}


def trl_dpo(r):
  """Seconds of each step of TRL's DPOTrainer, reference sums precomputed."""
  release()
  import datasets
  import tokenizers
  import transformers
  import trl

  class Ready(trl.DPOTrainer):
    """The rows are token ids already."""

    def _prepare_dataset(self, dataset, *args, **kwargs):
      return dataset

  class Clock(transformers.TrainerCallback):
    def __init__(self):
      self.seconds = []

    def on_step_begin(self, *args, **kwargs):
      sync()
      self.start = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
      sync()
      self.seconds.append(time.perf_counter() - self.start)

  words = tokenizers.Tokenizer(
    tokenizers.models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>")
  )
  tok = transformers.PreTrainedTokenizerFast(
    tokenizer_object=words,
    unk_token="<unk>",
    eos_token="</s>",
    pad_token="</s>",
  )
  draw = lambda n: torch.randint(2, r["vocab"], (n,)).tolist()
  half = r["length"] // 2
  rows = [
    dict(
      prompt_ids=draw(half),
      chosen_ids=draw(r["length"] - half),
      rejected_ids=draw(r["length"] - half),
    )
    for _ in range(r["pairs"] * r["steps"])
  ]
  clock, folder = Clock(), r["folder"]
  Ready(
    model=llama(r, torch.float32),
    processing_class=tok,
    train_dataset=datasets.Dataset.from_list(rows),
    callbacks=[clock],
    args=trl.DPOConfig(
      output_dir=folder,
      per_device_train_batch_size=r["pairs"],
      max_steps=r["steps"],
      max_length=None,
      bf16=True,
      precompute_ref_log_probs=True,
      gradient_checkpointing=False,
      optim="adamw_torch_fused" if DEVICE == "cuda" else "adamw_torch",
      logging_steps=10**6,
      save_strategy="no",
      report_to=[],
      disable_tqdm=True,
      use_cpu=DEVICE == "cpu",
    ),
  ).train()
  gc.collect()
  return dict(seconds=clock.seconds[r["skip"] :], trl=trl.__version__)


def hello(_):
  import transformers

  name = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
  return dict(
    torch=torch.__version__, transformers=transformers.__version__, device=name
  )


DO = dict(
  hello=hello,
  release=release,
  trl_dpo=trl_dpo,
  train=lambda r: timed(r, train),
  attention=lambda r: timed(r, attention),
)


def main() -> None:
  for line in sys.stdin:
    request = json.loads(line)
    try:
      answer = DO[request["do"]](request)
    except Exception as error:  # the asker decides what to do without it
      first = (str(error).strip() or "no message").splitlines()[0]
      answer = dict(error=f"{type(error).__name__}: {first}")
    if "error" in answer:  # only now does no traceback hold the tensors
      release()
    print(json.dumps(answer), file=ANSWERS, flush=True)


if __name__ == "__main__":
  main()
