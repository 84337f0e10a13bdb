"""The command line: flags, exit codes, one line of error, launchers."""

import errno
import os
import signal
import subprocess
import sys

import jax
import jobs
import pytest

from jaxalign.cli import command, main, parse
from jaxalign.core import exits
from jaxalign.core.errors import ConfigError
from jaxalign.data import build_data
from jaxalign.study import arms

KTO = "kto_sub.py:tiny"


def refused(tmp_path, *flags, config="dpo_sub.py:tiny", words=()):
  """A job that must end with 64 before any stage, its error with the words."""
  ended = jobs.run(tmp_path / "work", *flags, config=config)
  assert ended.code == 64, ended
  assert not jobs.did(ended)
  assert ended.err.startswith("error: ") and ended.err.count("\n") == 1
  for word in words:
    assert word in ended.err, ended.err


@pytest.mark.parametrize(
  "flag, said",
  [
    ("trian.lr=1", ("'trian'", "'train'", "configs/common.py")),
    ("train.lrr=1", ("'lrr'", "'lr'")),
    ("train.lr=fast", ("config.train.lr", "'fast'")),
    ("--workdri=x", ("workdri",)),
    ("--distributed=maybe", ("distributed", "maybe")),
    ("bare", ("bare", "--")),
    ("data={}", ("config.data is a section", "one of its knobs")),
    ("select.mixture={'starts': 3}", ("config.select.mixture is a section",)),
    ("mesh={}", ("config.mesh is a section",)),
  ],
)
def test_unknown_knobs_and_flags(tmp_path, flag, said):
  refused(tmp_path, flag, words=said)


@pytest.mark.parametrize(
  "config, said",
  [
    ("nothing_here.py", "does not exist"),
    ("dpo_sub.py:huge", "unknown variant 'huge'; known: smoke"),
  ],
)
def test_config_files_that_cannot_be_read(tmp_path, config, said):
  refused(tmp_path, config=config, words=[said])


@pytest.mark.filterwarnings("ignore:the load_module")
@pytest.mark.parametrize(
  "flags, said",
  [([], "--config"), (["--config={root}/configs/dpo_sub.py"], "--workdir")],
)
def test_missing_flags(capsys, flags, said):
  assert main.main(["main", *(f.format(root=jobs.ROOT) for f in flags)]) == 64
  assert said in capsys.readouterr().err


@pytest.mark.parametrize(
  "flag, said",
  [
    (
      "select.sampler=isaa",
      ("unknown sampler 'isaa'", "did you mean 'isa'", "config.select.sampler"),
    ),
    ("select.sampler=os:nothing", ("cannot be imported", "select.sampler")),
    ("compare=('foo',)", ("unknown sampler 'foo'", "config.compare")),
    ("loss.name=dpoo", ("unknown loss 'dpoo'", "'dpo'", "config.loss.name")),
    ("select.order=up", ("'up'", "literal", "config.select.order")),
    ("select.pair_score=x", ("'x'", "sum", "config.select.pair_score")),
    ("select.mixture.covariance=x", ("'x'", "full, tied, diag")),
    ("select.mixture.components=0", ("=0", "wanted 1 or more")),
    ("embed.pooling=x", ("'x'", "mean or last", "config.embed.pooling")),
    ("model.remat=x", ("'x'", "none, full, dots")),
    ("model.dtype=int8", ("'int8'", "float32")),
    ("model.context=4", ("=4", "wanted 10 or more", "model.context")),
    ("eval.new_tokens=64", ("=64", "wanted 23 or less", "model.context=32")),
    ("train.schedule=x", ("'x'", "linear", "config.train.schedule")),
    ("train.lr=-1", ("lr=-1.0", "more than 0")),
    ("train.lr=nan", ("lr=nan", "more than 0")),
    ("train.epochs=0", ("epochs=0", "more than 0")),
    ("train.max_updates=-1", ("=-1", "0 or more")),
    ("sft.save_every=0", ("sft.save_every=0", "wanted 1 or more")),
    ("train.batch_size=12", ("12 rows", "fsdp=8", "config.mesh")),
    ("train.accumulation=3", ("accumulation=3", "batch_size=8")),
    ("data.world.topics=400", ("words", "980", "config.data.world")),
    ("data.world.argument_words=1", ("argument_words=1", "wanted 2 or more")),
    ("data.max_bad_fraction=2", ("=2", "from 0 to 1")),
    ("data.skip=('x',)", ("data.skip has x", "tied or contradicting")),
    ("data.assume=(5,)", ("data.assume=(5,)", "rows, tokens")),
    ("data.limit=-1", ("=-1", "0 or more")),
    *(
      (f"{part}.b2={value}", (f"{part}.b2={value}", "in [0, 1)"))
      for part, value in (("train", 1.0), ("train", -0.1), ("train", "nan"))
    ),
    ("train.weight_decay=-0.1", ("train.weight_decay=-0.1", "0 or more")),
    ("seeds=2147483648", ("seeds=2147483648", "10,000 or fewer")),
    ("seed=-1", ("seed=-1", "from 0 to")),
    ("data.seed=1180591620717411303424", ("data.seed=118", "at most 9,007")),
    ("train.epochs=inf", ("train.epochs=inf", "finite number")),
    ("train.lr=inf", ("train.lr=inf", "finite number")),
    ("compare=(1,)", ("compare=[1]", "a list of names")),
    ("budgets=('x',)", ("budgets=['x']", "a list of numbers")),
    ("profile.steps=('a','b')", ("['a', 'b']", "a list of whole numbers")),
    ("data.world.flips=-0.1", ("data.world.flips=-0.1", "from 0 to 1")),
    ("model.width=33", ("width=33", "multiple of model.heads=2")),
    ("select.mixture.pca=x", ("select.mixture.pca='x'", "auto or a number")),
    ("profile.steps=(6,2)", ("(6, 2)", "config.profile.steps")),
    ("profile.steps=(3,3)", ("(3, 3)", "config.profile.steps")),
    ("profile.steps=(3,)", ("(3,)", "config.profile.steps")),
  ],
)
def test_values_that_can_never_work(tmp_path, flag, said):
  refused(tmp_path, flag, words=said)


def test_the_first_checks_start_no_backend():
  """Once one is started, a process can no longer join others."""
  code = (
    "from configs import common\n"
    "from jaxalign.cli import checks\n"
    "from jax._src import xla_bridge\n"
    "checks.validate(common.base('tiny'))\n"
    "assert not xla_bridge.backends_are_initialized()\n"
    "import jax; jax.devices()\n"
    "assert xla_bridge.backends_are_initialized()\n"
  )
  subprocess.run([sys.executable, "-c", code], cwd=jobs.ROOT, check=True)


@pytest.mark.parametrize("budget", ["0", "-3", "1.5", "nan", "inf"])
def test_budgets_that_are_no_fraction_and_no_count(tmp_path, budget):
  wanted = f"the fraction {float(budget)}, wanted above 0 and at most 1"
  flag = f"select.budget={budget}"
  refused(tmp_path, flag, words=[wanted, "config.select.budget"])


@pytest.mark.parametrize(
  "budget, said",
  [
    ("161", ("161 rows", "1 to 160")),
    ("7", ("7 rows", "below one batch of 8", "config.train.batch_size")),
    ("0.01", ("2 rows", "below one batch of 8")),
  ],
)
def test_budgets_that_do_not_fit_the_pool(tmp_path, budget, said):
  ended = jobs.run(tmp_path, f"select.budget={budget}")
  assert ended.code == 64 and jobs.did(ended) == ["data"]
  for word in (*said, "config.select.budget"):
    assert word in ended.err


@pytest.mark.parametrize(
  "sizes, said",
  [
    (("mesh.fsdp=3",), "needs 3 devices, found 8"),
    (("mesh.fsdp=0",), "does not divide 8 devices"),
    (("mesh.fsdp=4", "mesh.tensor=4"), "needs 16 devices, found 8"),
    (("mesh.tensor=3",), "does not divide 8 devices"),
    (("mesh.tensor=-1",), "one size may be -1"),
    (("mesh.fsdp=2", "mesh.tensor=4"), "'heads' of 2 does not divide into 4"),
  ],
)
def test_a_mesh_that_does_not_fit(tmp_path, sizes, said):
  refused(tmp_path, *sizes, words=[said, "config.mesh"])


@pytest.mark.filterwarnings("ignore:the load_module")  # of ml_collections
def test_keywords_of_a_sampler_and_a_loss_are_flags():
  values = parse.parse_config(
    [
      "main",
      f"--config={jobs.ROOT}/configs/dpo_sub.py",
      "--workdir=x",
      "--config.select.kwargs.direction=low",
      "--config.select.kwargs.shares=(0.5, 1)",
      "--config.loss.kwargs.label_smoothing=0.1",
    ],
    "",
  )
  assert values.config.select.kwargs.to_dict() == dict(
    direction="low", shares=(0.5, 1)
  )
  assert values.config.loss.kwargs.to_dict() == dict(label_smoothing=0.1)


@pytest.mark.parametrize(
  "config, flags, said",
  [
    ("", ["loss.kwargs.gamma=1"], "'gamma'"),
    ("", ["select.kwargs.tau=1"], "'tau'"),
    ("", ["loss.name=kto(gamma=1)"], "beta, desirable"),
    ("", ["loss.name=dpo(beta=0)+sft"], "beta=0,"),
    ("", ["loss.name=sft"], "prefers nothing"),
    (KTO, ["train.batch_size=1", "sft.batch_size=8"], "train.batch_size"),
    (KTO, ["select.sampler=real"], "compares the two answers"),
    ("", ["seeds=0"], "config.seeds"),
    ("", ["budgets=(0.0,)"], "budget"),
    ("", ["select.sampler=length_matched"], "config.compare"),
    (
      "",
      ["train.min_updates=300", "train.max_updates=250"],
      "train.min_updates",
    ),
  ],
)
def test_losses_samplers_and_arms_that_cannot_be(tmp_path, config, flags, said):
  config = config or "dpo_sub.py:tiny"
  refused(tmp_path, *flags, config=config, words=[said])


@pytest.mark.parametrize(
  "error, code, said",
  [
    (OSError(errno.ENOSPC, "No space left", "/full/file"), 73, "/full/file"),
    (OSError(errno.EROFS, "Read-only", "/ro/file"), 73, "/ro/file"),
    (NotADirectoryError(errno.ENOTDIR, "Not a directory", "/f/x"), 73, "/f/x"),
    (KeyboardInterrupt(), 130, "run the same command"),
    (ConfigError("found, wanted, knob"), 64, "found, wanted, knob"),
  ],
)
def test_exit_codes(tmp_path, monkeypatch, error, code, said):
  def fail(*_):
    raise error

  monkeypatch.setattr(main, "run_study", fail)
  ended = jobs.run(tmp_path)
  assert ended.code == code
  assert said in ended.err and ended.err.count("\n") == 1


def test_a_bug_keeps_its_traceback(tmp_path, monkeypatch):
  monkeypatch.setattr(main, "run_study", lambda *_: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    jobs.run(tmp_path)


def test_a_lost_peer_is_75_only_with_several_processes(monkeypatch):
  gone = jax.errors.JaxRuntimeError(
    "UNKNOWN: Gloo AllGather failed: Connection closed by peer"
  )
  assert not exits._lost_peer(gone)
  monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
  assert exits._lost_peer(gone)
  wrapped = ValueError("orbax says so")
  wrapped.__cause__ = gone
  assert exits._lost_peer(wrapped)
  assert not exits._lost_peer(jax.errors.JaxRuntimeError("INTERNAL: a bug"))
  assert not exits._lost_peer(ValueError("Gloo"))


@pytest.mark.parametrize(
  "environment, launcher",
  [
    ({}, ""),
    (dict(JAXALIGN_NUM_PROCESSES="1"), ""),
    (dict(JAXALIGN_NUM_PROCESSES=""), ""),
    (dict(JAXALIGN_NUM_PROCESSES="2"), "jaxalign"),
    (dict(SLURM_NTASKS="4"), ""),  # inside sbatch, outside srun
    (dict(SLURM_NTASKS="4", SLURM_STEP_NODELIST="n[1-2]"), "slurm"),
    (dict(OMPI_COMM_WORLD_SIZE="2"), "openmpi"),
    (dict(TPU_WORKER_HOSTNAMES="a"), ""),
    (dict(TPU_WORKER_HOSTNAMES="a,b"), "tpu"),
  ],
)
def test_launchers(environment, launcher):
  assert command.announced(environment) == launcher


def test_a_launcher_that_announces_nonsense():
  with pytest.raises(ConfigError, match="JAXALIGN_NUM_PROCESSES='two'"):
    command.announced(dict(JAXALIGN_NUM_PROCESSES="two"))


def test_dry_run_refuses_what_the_job_would(tmp_path):
  ended = jobs.run(tmp_path / "work", "--dry_run", "select.budget=161")
  assert ended.code == 64 and "1 to 160" in ended.err


def test_a_process_of_its_own_says_it_in_one_line(tmp_path):
  ended = jobs.wait(jobs.start(tmp_path / "work", "select.sampler=isaa"))
  assert ended.code == 64
  assert ended.err.splitlines() == [
    "error: unknown sampler 'isaa' (did you mean 'isa'?); known: "
    + ended.err.split("known: ")[1].strip()
  ]
  assert not (tmp_path / "work").exists()


def test_sigterm_between_stages_is_75_and_sigint_130(tmp_path, monkeypatch):
  for number, code in ((signal.SIGTERM, 75), (signal.SIGINT, 130)):

    def stop(job, number=number):
      os.kill(os.getpid(), number)
      for _ in range(1000):  # the handler runs between two bytecodes
        pass
      raise AssertionError("the signal was lost")

    jobs.in_place_of(monkeypatch, "sft", stop)
    ended = jobs.run(tmp_path)
    assert ended.code == code
    assert "run the same command" in ended.err and ended.err.count("\n") == 1


def test_a_swallowed_signal_stops_the_next_stage(tmp_path, monkeypatch):
  real = build_data.make_data

  def swallow(*args, **kwargs):
    made = real(*args, **kwargs)
    try:
      os.kill(os.getpid(), signal.SIGTERM)
      for _ in range(1000):
        pass
    except Exception:  # as a library's callback may
      pass
    return made

  monkeypatch.setattr(build_data, "make_data", swallow)
  ended = jobs.run(tmp_path)
  assert ended.code == 75 and jobs.did(ended) == ["data"]


def test_the_report_holds_the_command_given():
  argv = ["main.py", "--config=configs/a b.py", "--workdir=w"]
  assert arms.command_line(argv) == (
    "python -m jaxalign.main '--config=configs/a b.py' --workdir=w"
  )


def test_leave_does_not_wait_for_other_processes(monkeypatch):
  done = []
  monkeypatch.setattr(os, "_exit", lambda code: done.append(code))
  monkeypatch.setattr(exits.signal, "signal", lambda *_: None)
  monkeypatch.setattr(exits.threading, "_shutdown", lambda: done.append("wait"))
  monkeypatch.setattr(
    exits.atexit, "_run_exitfuncs", lambda: done.append("clean")
  )
  exits._leave(65)
  assert done == ["wait", "clean", 65]
  monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
  exits._leave(65)
  assert done[3:] == [65]
  exits._leave(0)  # a good end is one of all processes
  assert done[4:] == ["wait", "clean", 0]


@pytest.mark.parametrize(
  "flags,said",
  [
    (["select.sampler=quota(by=source)|isa"], "reads source, which no stage"),
    (["select.sampler=perplexity", "embed.checkpoint=x"], "the reference must"),
    (["compare=('deita',)", "data.source=rows.jsonl"], "only the built-in"),
  ],
)
def test_a_sampler_that_reads_what_no_stage_makes(
  tmp_path, monkeypatch, flags, said
):
  (tmp_path / "rows.jsonl").write_text("{}\n")
  monkeypatch.chdir(tmp_path)
  refused(tmp_path / "w", *flags, words=[said])


@pytest.mark.slow
def test_perplexity_reads_the_embedding_pass(tmp_path):
  ended = jobs.run(tmp_path, "select.sampler=perplexity", "compare=()")
  assert ended.code == 0, ended.err
