"""hf:<repo>: a small Hub on this machine, its cache, and its refusals."""

import http.server
import json
import os
import pathlib
import subprocess
import sys
import threading

from conftest import ROOT
from etils import epath
import pytest

from jaxalign.core import hub
from jaxalign.core.errors import ConfigError
from jaxalign.model import safetensors_io

pytest.importorskip("huggingface_hub")
SHA = "0123456789abcdef0123456789abcdef01234567"
FILES = {  # of owner/model
  "config.json": b'{"model_type": "llama"}',
  "model.safetensors": b"\x02\0\0\0\0\0\0\0{}",
  "tokenizer.model": b"pieces",
  "chat_template.jinja": b"{{ messages }}",
  "pytorch_model.bin": b"\x80\x04.",
  "modeling_evil.py": b"import os",
  "training_args.bin": b"\x80\x04.",
  "onnx/config.json": b"{}",
}
SETTINGS = {"config.json", "tokenizer.model", "chat_template.jinja"}
SECRET = "hf_SecretOfThisTest"
JSON = {"Content-Type": "application/json"}


class Hub(http.server.BaseHTTPRequestHandler):
  """The few replies of the Hub that a download needs."""

  def do_HEAD(self):
    self.do_GET()

  def do_GET(self):
    token = self.headers.get("authorization")
    self.server.seen.append((self.path, token))
    path, files = self.path.split("?")[0], self.server.files
    error = lambda code, name: self.reply(code, b"{}", {"X-Error-Code": name})
    if "/owner/gated" in path and token != f"Bearer {SECRET}":
      return error(403, "GatedRepo")
    name = "owner/gated" if "/owner/gated" in path else "owner/model"
    if name not in path:
      return error(401, "RepoNotFound")
    numbered = {n: f"{i:040x}" for i, n in enumerate(files)}
    if path.startswith(f"/api/models/{name}/tree/"):
      row = lambda n: dict(type="file", path=n, size=len(files[n]))
      tree = [row(n) | dict(oid=oid) for n, oid in numbered.items()]
      return self.reply(200, json.dumps(tree).encode())
    if path.startswith(f"/api/models/{name}"):
      if path.endswith("/revision/gone"):
        return error(404, "RevisionNotFound")
      siblings = [dict(rfilename=n) for n in files]
      about = dict(id=name, sha=SHA, siblings=siblings)
      return self.reply(200, json.dumps(about).encode())
    file = path.split(f"/resolve/{SHA}/")[-1]
    if file not in files:
      return error(404, "EntryNotFound")
    headers = {"ETag": f'"{numbered[file]}"', "X-Repo-Commit": SHA}
    return self.reply(200, files[file], headers)

  def reply(self, code, body, headers=()):
    self.send_response(code)
    sized = {"Content-Length": str(len(body))}
    for name, value in {**dict(headers), **JSON, **sized}.items():
      self.send_header(name, value)
    self.end_headers()
    if self.command == "GET":
      self.wfile.write(body)

  def log_message(self, *args):
    pass


@pytest.fixture
def server():
  found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
  found.seen, found.files = [], FILES
  threading.Thread(target=found.serve_forever, daemon=True).start()
  yield found
  found.shutdown()
  found.server_close()


CALL = """
import sys
from jaxalign.core.errors import ConfigError
from jaxalign.core import hub
try:
  for name in sys.argv[2:]:
    print(getattr(hub, sys.argv[1])(name))
except ConfigError as error:
  print("ConfigError:", error)
"""


def call(cache, server, function, *names, **env):
  """What the function prints in a process of its own, where the Hub is ours."""
  ended = python(cache, server, "-c", CALL, function, *names, **env)
  assert ended.returncode == 0, ended.stderr
  return ended.stdout.strip()


def python(cache, server, *arguments, **env):
  """A Python process for which the Hub is ours."""
  port = server.server_address[1] if server else 9  # nobody listens there
  foreign = lambda n: (
    n.startswith(("HF_", "TRANSFORMERS_")) or n.lower().endswith("_proxy")
  )
  env = dict(
    {n: v for n, v in os.environ.items() if not foreign(n)},
    HF_HOME=str(cache),
    HF_ENDPOINT=f"http://127.0.0.1:{port}",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_XET="1",
    **env,
  )
  return subprocess.run(
    [sys.executable, *arguments],
    env=env,
    text=True,
    capture_output=True,
    timeout=300,
    cwd=ROOT,
  )


def test_a_repository_is_fetched_once_without_its_pickles(tmp_path, server):
  folder = pathlib.Path(call(tmp_path, server, "resolve", "hf:owner/model"))
  wanted = SETTINGS | {"model.safetensors"}
  assert {p.name for p in folder.rglob("*") if p.is_file()} == wanted
  for name in wanted:
    assert (folder / name).read_bytes() == FILES[name]
  assert folder.name == SHA
  fetched = [path for path, _ in server.seen if "/resolve/" in path]
  assert not any("bin" in path or ".py" in path for path in fetched)
  # Now without the Hub; and the same by its revision.
  names = "hf:owner/model", f"hf:owner/model@{SHA}"
  again = call(tmp_path, None, "resolve", *names, HF_HUB_OFFLINE="1")
  assert again.split() == [str(folder)] * 2
  # What was fetched passes the check of links.
  assert safetensors_io.Checkpoint(epath.Path(folder)).tensors == {}


def test_settings_come_without_weights(tmp_path, server):
  name = "hf:owner/model@main"
  folder = pathlib.Path(call(tmp_path, server, "resolve_settings", name))
  assert {p.name for p in folder.iterdir()} == SETTINGS
  words = "is not whole in the local cache, and HF_HUB_OFFLINE is set"
  name = "hf:owner/model"
  assert words in call(tmp_path, None, "resolve", name, HF_HUB_OFFLINE="1")


def test_a_token_is_sent_and_never_stored(tmp_path, server):
  error = call(tmp_path, server, "resolve", "hf:owner/gated")
  assert error.startswith("ConfigError: hf:owner/gated is gated: accept")
  assert "HF_TOKEN" in error
  assert {token for _, token in server.seen} == {None}
  folder = call(tmp_path, server, "resolve", "hf:owner/gated", HF_TOKEN=SECRET)
  assert (pathlib.Path(folder) / "config.json").exists()
  assert (f"Bearer {SECRET}") in {token for _, token in server.seen}
  for path in tmp_path.rglob("*"):
    if path.is_file():
      assert SECRET.encode() not in path.read_bytes(), path


@pytest.mark.parametrize(
  "name,up,env,words",
  [
    ("nothing", True, {}, "nothing is not on the Hub, or is private"),
    ("model@gone", True, {}, "the repository has no revision 'gone'"),
    ("model", False, {}, "local cache, and the Hub cannot be reached"),
    (
      *("model", False, dict(HF_HUB_OFFLINE="1")),
      "cache, and HF_HUB_OFFLINE is set; set config.model.checkpoint",
    ),
  ],
)
def test_what_cannot_be_had(tmp_path, server, name, up, env, words):
  hub = server if up else None
  assert words in call(tmp_path, hub, "resolve", f"hf:owner/{name}", **env)


NO_NAMES = ["", "a/b/c", "/etc", "../x", "a/b@", "a/b@../x", "a/b@/x", "a b"]


@pytest.mark.parametrize("name", [f"hf:{n}" for n in (*NO_NAMES, "a/b\n")])
def test_names_that_are_none(name):
  with pytest.raises(ConfigError, match="names no repository, wanted hf:<own"):
    hub.resolve(name)


def test_a_folder_is_itself(tmp_path):
  assert str(hub.resolve(tmp_path)) == str(tmp_path)
  assert str(hub.resolve_settings("gs://a/b")) == "gs://a/b"


def test_an_encoder_comes_with_its_pooling(tmp_path, server):
  more = "1_Pooling/config.json", "2_Normalize/config.json"
  server.files = FILES | {"modules.json": b"[]", **dict.fromkeys(more, b"{}")}
  name = "hf:owner/model"
  folder = pathlib.Path(call(tmp_path, server, "resolve_settings", name))
  assert (folder / "1_Pooling/config.json").exists()
  assert not (folder / "2_Normalize").exists()


@pytest.mark.slow
def test_a_whole_job_from_a_repository(tmp_path, server):
  """The tokenizer, the config and the weights of `hf:owner/model`."""
  import jobs

  export = jobs.finished() / "runs/isa-0.1-seed0/export"
  server.files = {p.name: p.read_bytes() for p in export.iterdir()}
  flags = [
    "-m",
    "jaxalign.main",
    *jobs.flags(tmp_path / "work", "model.checkpoint=hf:owner/model"),
  ]
  ended = python(tmp_path / "cache", server, *flags)
  assert ended.returncode == 0, ended.stderr
  assert "sft: ..." not in ended.stdout
  again = python(tmp_path / "cache", None, *flags, HF_HUB_OFFLINE="1")
  assert again.returncode == 0, again.stderr
  assert "nothing was computed" in again.stdout
