"""A command's exit code is its own, whatever becomes of threads and output."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile

import jobs
import pytest

from jaxalign.core import disk
from tools import job_checks

CALL = (
  "import sys\nfrom jaxalign.core.exits import start\n"
  "def run(argv):\n  {body}\nstart(run)\n"
)


def shelled(words, shell="{}", env={}):
  """Runs Python with these words through a shell; (code, output, error)."""
  done = subprocess.run(
    ["bash", "-c", shell.format('"$@"'), "-", sys.executable, *words],
    cwd=jobs.ROOT,
    env=os.environ | env,
    text=True,
    capture_output=True,
    timeout=120,
  )
  return done.returncode, done.stdout, done.stderr


def call(body, shell="{}", **env):
  """Runs a command whose body is Python; (code, output, error)."""
  code = CALL.format(body=body.replace("\n", "\n  "))
  return shelled(["-c", code], shell, env)


# Four threads that never end, inside a library that calls Python back: the
# interpreter cannot be taken apart under them.
BUSY = """
import io, threading, time
import pyarrow as pa, pyarrow.parquet as pq
class Slow(io.BytesIO):
  def read(self, n=-1):
    time.sleep(0.001)
    return super().read(n)
made = io.BytesIO()
pq.write_table(pa.table({str(i): list(range(2000)) for i in range(20)}), made)
def work():
  while True:
    pq.ParquetFile(Slow(made.getvalue()), pre_buffer=True).read()
for _ in range(3):
  threading.Thread(target=work, daemon=True).start()
time.sleep(0.5)
"""


def test_threads_of_a_library_do_not_take_the_code_away():
  """With `sys.exit(65)` for an end this is an abort, 134, every time."""
  assert call(f"{BUSY}return 65") == (65, "", "")


def test_what_is_left_to_do_is_done(tmp_path):
  """Threads that were begun, exit functions, buffers of logs and output."""
  code, out, err = call(f"""
import atexit, logging, logging.handlers, shutil, tempfile, threading, time
folder = {str(tmp_path)!r}
scratch = tempfile.mkdtemp(dir=folder)
atexit.register(shutil.rmtree, scratch)
held = logging.handlers.MemoryHandler(99, target=logging.FileHandler(
    folder + "/log"))
logging.getLogger("x").addHandler(held)
logging.getLogger("x").error("kept")
def late():
  time.sleep(0.3)
  open(folder + "/late", "w").write("whole")
threading.Thread(target=late).start()
print("no line", end="")
return 65
""")
  assert (code, out, err) == (65, "no line", "")
  assert (tmp_path / "log").read_text() == "kept\n"
  assert (tmp_path / "late").read_text() == "whole"
  assert {p.name for p in tmp_path.iterdir()} == {"log", "late"}


@pytest.mark.parametrize(
  "body, code, said",
  [
    ("raise SystemExit", 0, ""),
    ("sys.exit(3)", 3, ""),
    ("sys.exit('why')", 1, ""),
    ("raise KeyboardInterrupt", 130, "error: "),
    ("1 / 0", 1, "ZeroDivisionError"),
    (
      "import jaxalign.core.errors as e\nraise e.RestartError('again')",
      75,
      "error: again\n",
    ),
    ("raise OSError(28, 'No space left', '/x')", 73, "error: cannot write /x"),
    ("import atexit\natexit.register(lambda: 1 / 0)\nreturn 65", 65, "Zero"),
    (
      "import os, atexit, time\n"
      "atexit.register(lambda: (os.kill(os.getpid(), 15), time.sleep(9)))\n"
      "return 65",
      65,
      "",
    ),
  ],
)
def test_every_end_has_its_code(body, code, said):
  found, _, err = call(body)
  assert found == code and said in err


LINES = "for i in range(20_000): print('line', i)\nreturn 65"


SAID = """from jaxalign.core import errors, progress
for i in range(9999):
  progress.say(f'line {i}')
with progress.bar('x', 9) as tick: tick()
raise errors.DataError('bad')"""


@pytest.mark.parametrize(
  "shell, out",
  [
    ("{} | head -1; exit ${{PIPESTATUS[0]}}", "line 0\n"),
    ("{} >&-", ""),
    ("{} >&- 2>&-", ""),
    ("{} <&- >&- 2>&-", ""),
    ("{} >/dev/full", ""),
    ("{} 2>/dev/full >/dev/full", ""),
  ],
)
@pytest.mark.parametrize("body", [LINES, LINES.replace("20_000", "3"), SAID])
def test_output_that_nobody_reads(shell, out, body):
  code, said, err = call(body, shell)
  assert (code, said) == (65, out)
  assert err in ("", "error: bad\n")


def test_a_closed_stream_is_not_the_next_file_opened(tmp_path):
  """What a library prints must not land in it."""
  code, _, _ = call(
    f"""
import os
with open({str(tmp_path / "x")!r}, "w") as file:
  os.write(1, b"printed")
  print("printed too")
  sys.stderr.write("and this")
  file.write("mine")
return 0""",
    "{} >&- 2>&-",
  )
  assert code == 0 and (tmp_path / "x").read_text() == "mine"


def test_a_character_that_the_terminal_lacks():
  code, out, _ = call(
    "from jaxalign.core import progress\n"
    "progress.say('caf\\u00e9 \\U0001f600 \\ud800')\n"
    "return 0",
    PYTHONIOENCODING="ascii",
  )
  assert (code, out) == (0, "caf\\xe9 \\U0001f600 \\ud800\n")


@pytest.mark.parametrize(
  "shell", ["{} | head -1; exit ${{PIPESTATUS[0]}}", "{} >&- 2>&-"]
)
def test_a_job_ends_with_its_code_though_nobody_listens(tmp_path, shell):
  """An error right after the data stage."""
  source = jobs.write_pairs(tmp_path / "x.jsonl", 40)
  flags = [
    f"--config={jobs.ROOT}/configs/select.py",
    f"--config.data.source={source}",
    "--config.select.sampler=random",
    "--config.select.budget=1000",
    f"--output={tmp_path}/subset.parquet",
  ]
  code, _, err = shelled(["-m", "jaxalign.select", *flags], shell)
  assert code == 64
  assert "1000 rows" in err or "2>&-" in shell
  assert (tmp_path / "subset.jaxalign/shared/data/data_summary.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", job_checks.KINDS)
def test_every_kind_of_end_of_a_real_job(tmp_path, kind):
  paths = job_checks.prepare(tmp_path)
  wanted = job_checks.KINDS[kind]
  code, out = job_checks.end(tmp_path / "job", paths, wanted, True)
  assert code == wanted.code, out
  assert out.count("error: ") == (code not in (0, 1))


def left(*folders):
  """What a job should have removed."""
  return [
    p
    for folder in folders
    for p in pathlib.Path(folder).rglob("*")
    if ".tmp-" in p.name or p.name.startswith(("tmp", "jaxalign_"))
  ]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, MemoryError, OSError])
def test_a_write_that_is_stopped_leaves_nothing(tmp_path, stop):
  disk.write_bytes(tmp_path / "x", b"old")

  def half(file):
    file.write(b"n")
    raise stop

  with pytest.raises((stop, disk.WriteError)):
    disk.write_through(tmp_path / "x", half)
  assert [p.name for p in tmp_path.iterdir()] == ["x"]
  assert (tmp_path / "x").read_bytes() == b"old"


@pytest.mark.parametrize(
  "number, code",
  [(signal.SIGTERM, 75), (signal.SIGINT, 130), (signal.SIGHUP, 75)],
)
def test_a_signal_leaves_no_temporary_file(tmp_path, monkeypatch, number, code):
  """It comes in the middle of a write, inside a scratch folder."""
  jobs.folder()  # the tests' own
  (tmp_path / "tmp").mkdir()
  monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
  seen = []

  def stop(job):

    def half(file):
      file.write(b"w")
      seen.append(file.name)
      os.kill(os.getpid(), number)
      for _ in range(1000):  # the handler runs between two bytecodes
        pass
      raise AssertionError("the signal was lost")

    with tempfile.TemporaryDirectory() as scratch:
      pathlib.Path(scratch, "part").write_bytes(b"x")
      disk.write_through(job.workdir / "x", half)

  jobs.in_place_of(monkeypatch, "sft", stop)
  work = tmp_path / "work"
  ended = jobs.run(work)
  assert ended.code == code and "run the same command" in ended.err
  assert ".tmp-" in seen[0] and not left(tmp_path / "tmp", work)
  if number == signal.SIGHUP:
    assert "stopped by SIGHUP" in ended.err


def test_a_stopped_job_takes_its_template_process_with_it(tmp_path):
  (tmp_path / "t.jinja").write_text(
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
  )
  (tmp_path / "tmp").mkdir()
  hook = """from jaxalign.data import chat, render
real = render.Renderer._start
def start(self):
  real(self)
  print('worker', self._process.pid, flush=True)
render.Renderer._start = start
def encode(self, *_):
  os.kill(os.getpid(), signal.SIGTERM)
  for _ in range(1000): pass
  raise AssertionError('the signal was lost')
chat.Chat.encode = encode
"""
  flags = (
    f"data.source={jobs.write_pairs(tmp_path / 'x.jsonl', 40)}",
    f"data.template={tmp_path}/t.jinja",
  )
  env = dict(TMPDIR=str(tmp_path / "tmp"))
  ended = jobs.wait(jobs.start(tmp_path / "work", *flags, hook=hook, env=env))
  assert ended.code == 75, ended
  workers = re.findall(r"^worker (\d+)", ended.out, re.MULTILINE)
  assert workers
  for worker in workers:
    with pytest.raises(ProcessLookupError):
      os.kill(int(worker), 0)
  assert not left(tmp_path / "tmp", tmp_path / "work")


def test_what_a_killed_job_left_is_removed_by_the_next(tmp_path, monkeypatch):
  jobs.only_data(monkeypatch)
  half = tmp_path / "work/shared/data/.pool.parquet.tmp-1"
  half.parent.mkdir(parents=True)
  half.write_bytes(b"half")
  assert jobs.run(tmp_path / "work").code is None
  assert not left(tmp_path / "work")
