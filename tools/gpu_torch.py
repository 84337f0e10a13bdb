"""The other side of tools/gpu.py: torch and transformers, by requests.

Reads one JSON request a line and answers with one line, so that the process
that asks can take turns with it on one card. What a request builds is kept
until another one comes. Seconds are of one call, waited for; a first call
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
  """A LlamaForCausalLM of the request's sizes, random, with SDPA."""
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
    shape = r["rows"], heads, r["length"], r["head_size"]
    x = torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16)
    return x.requires_grad_(r["backward"])

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


def hello(_):
  import transformers

  name = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
  return dict(
    torch=torch.__version__, transformers=transformers.__version__, device=name
  )


DO = dict(
  hello=hello,
  release=release,
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
