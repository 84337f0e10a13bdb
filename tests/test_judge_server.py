"""An endpoint judge against a real server of a real model: the plumbing.

`transformers serve` with stories260K, which tells stories whatever the
question: no verdict of it can be read, and every one is counted.
"""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import jax
import numpy as np
import pytest

from jaxalign.core import sharding
from jaxalign.data import tokenizer
from jaxalign.eval import judge_endpoint
from jaxalign.eval.judge_endpoint import Pair
from jaxalign.eval.verdict_cache import VerdictCache
from jaxalign.model import hf

pytestmark = pytest.mark.slow

KEY = "sk-test-0123456789abcdef"
TEMPLATE = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"


def export(shared, folder):
  """stories260K as a folder of transformers', with a template for chats."""
  source = shared / "models" / "stories260K"
  m = hf.read_config(source, "float32", "none")
  mesh = sharding.make_mesh(dict(fsdp=1, tensor=1), jax.devices()[:1])
  tok = tokenizer.load_tokenizer(source)
  with jax.set_mesh(mesh):
    hf.export_folder(folder, hf.load_folder(source, m, mesh), m, tok)
  (folder / "chat_template.jinja").write_text(TEMPLATE)


@pytest.fixture
def served(shared, tmp_path, monkeypatch):
  """(address, model) of a server that is up; it ends with the test."""
  for name in ("fastapi", "uvicorn", "openai", "torch"):
    pytest.importorskip(name)
  command = pathlib.Path(sys.executable).parent / "transformers"
  if not command.exists():
    pytest.skip("the command transformers is not installed")
  monkeypatch.setenv("JUDGE_KEY", KEY)
  folder = tmp_path / "export"
  export(shared, folder)
  with socket.socket() as s:
    s.bind(("localhost", 0))
    port = s.getsockname()[1]
  command = [command, "serve", str(folder), "--host", "localhost"]
  command += ["--port", str(port), "--device", "cpu"]
  own = dict(start_new_session=True, env=os.environ | dict(HF_HUB_OFFLINE="1"))
  log = tmp_path / "server.txt"
  with open(log, "w") as out:
    process = subprocess.Popen(command, stdout=out, stderr=out, **own)
  try:
    end = time.monotonic() + 240
    while True:
      try:
        urllib.request.urlopen(f"http://localhost:{port}/health", timeout=5)
        break
      except OSError:
        running = process.poll() is None and time.monotonic() < end
        assert running, log.read_text()
        time.sleep(0.2)
    yield f"http://localhost:{port}/v1", str(folder)
  finally:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_what_a_real_server_writes_is_counted_and_kept(served, tmp_path):
  url, model = served
  how = dict(timeout_s=120.0, per_minute=60_000.0, workers=2, max_tokens=8)
  e = judge_endpoint.Endpoint(model, url, key_env="JUDGE_KEY", **how)
  pairs = [
    Pair("Tell me of a dog.", f"A dog ran {n} miles.", "No.")
    for n in ("two", "ten")
  ]
  path = tmp_path / "verdicts.jsonl"
  for _ in range(2):  # the second time nothing is new
    out = judge_endpoint.judge_both_orders(e, pairs, VerdictCache(path))
    cache = VerdictCache(path)
    assert cache.requests == len(cache.verdicts) == 4
    assert out["unparsable"]["value"] == 1
    assert np.isnan(out["outcomes"]).all()  # counted, never guessed
    assert cache.tokens > 4 * 100  # as the server counted them
  assert KEY not in path.read_text()
