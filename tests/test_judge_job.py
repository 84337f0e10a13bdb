"""Whole tiny jobs whose win rates a judge gave: by hand from its verdicts."""

import json
import pathlib
import types
import zlib

import jobs
import numpy as np
import pytest
from test_judges import fenced, KEY, server  # noqa: F401, a fixture

from jaxalign.core import artifacts, disk
from jaxalign.core.errors import ConfigError, DataError
from jaxalign.eval import judge_kinds as judges
from jaxalign.model.job import Arm
from jaxalign.study import evidence

ISA, RANDOM = "isa-0.1-seed0", "random-0.1-seed0"


def quality(question, answer):
  """What the scripted judge thinks of an answer: five levels, any text."""
  return zlib.crc32(f"{question.strip()}|{answer.strip()}".encode()) % 5


def silent(question, a, b):
  """Whether it says nothing that can be read of A before B."""
  return (
    zlib.crc32(f"{question.strip()}|{a.strip()}/{b.strip()}".encode()) % 6 == 0
  )


def by_quality(messages):
  question, a, b = fenced(messages)
  if "Note to the evaluator" in a + b or "good and complete" in a + b:
    good = ["Note" not in t and "complete" not in t for t in (a, b)]
    return "VERDICT: " + ("A" if good[0] else "B")
  if silent(question, a, b):
    return "<script>alert(1)</script> Both have merits."
  x, y = quality(question, a), quality(question, b)
  return "I weighed both.\nVERDICT: " + (
    "TIE" if x == y else "A" if x > y else "B"
  )


def known(question, ours, theirs):
  """The outcome of `ours` in both orders, NaN where one says nothing."""
  if silent(question, ours, theirs) or silent(question, theirs, ours):
    return np.nan
  x, y = quality(question, ours), quality(question, theirs)
  return 1.0 if x > y else 0.5 if x == y else 0.0


def outcomes(work, arm, side="target"):
  """[P] outcomes of an arm ("": the start), from what it said."""
  read = lambda folder: jobs.lines(work / folder / "samples.jsonl")
  start = read("shared/baseline")
  mine = read(f"runs/{arm}") if arm else start
  return np.array(
    [
      known(
        s["prompt"],
        s["said"],
        {"target": s["target"], "reference": b["said"]}[side],
      )
      for s, b in zip(mine, start)
    ]
  )


def spoken(tmp_path, name="work"):
  """A copy of the finished job in which every arm says something else.

  So little training leaves all of them with the answers of the start.
  """
  work = jobs.copy(tmp_path / name)
  for k, arm in enumerate((ISA, RANDOM)):
    folder = work / "runs" / arm
    rows = jobs.lines(folder / "samples.jsonl")
    for i, row in enumerate(rows):
      words = row["target"].split()
      row["said"] = " ".join(words[(i + k) % 3 :] + words[:k])
    (folder / "samples.jsonl").write_text(
      "".join(json.dumps(row) + "\n" for row in rows)
    )
    card = artifacts.read_record(folder, "evaluate")
    card.outputs["samples.jsonl"] = disk.digest(folder / "samples.jsonl")
    artifacts._write_record(folder, card)
  return work


def asked_with(monkeypatch, **settings):
  """Changes what no config sets of how an endpoint is asked."""
  real = judges.endpoint_of
  monkeypatch.setattr(
    judges, "endpoint_of", lambda c: real(c)._replace(**settings)
  )


@pytest.fixture(autouse=True)
def soon(monkeypatch):
  """No pause before a request is sent again."""
  asked_with(monkeypatch, backoff_s=0.01)


def asking(server, *more):
  """The knobs of a job whose judge is the scripted server."""
  return (
    "judge.kind=endpoint",
    f"judge.endpoint={server.url}",
    "judge.model=m",
    "judge.key_env=JUDGE_KEY",
    "judge.per_minute=60000.0",
    *more,
  )


def load(path):
  return json.loads(path.read_text())


def summary_of(work):
  return load(work / "summary.json")


def metrics(summary, arm, name="win_vs_target"):
  (one,) = (a for a in summary["arms"] if a["name"] == arm)
  return one["metrics"][name]


def test_known_verdicts_become_the_win_rates_of_a_job(server, tmp_path):  # noqa: F811
  server.reply = by_quality
  work = spoken(tmp_path)
  ended = jobs.run(work, *asking(server))
  assert ended.code == 0, ended
  assert jobs.did(ended) == (
    ["judged_reference", *["judge", "report"] * 2, "report"]
  )
  summary = summary_of(work)
  won = {arm: outcomes(work, arm) for arm in (ISA, RANDOM, "")}
  for arm in (ISA, RANDOM):
    read = won[arm][~np.isnan(won[arm])]
    found = metrics(summary, arm)
    assert 0 < len(read) < 16 == len(won[arm])  # some could not be read
    assert found["value"] == pytest.approx(read.mean())
    assert found["n"] == len(read)
    assert found["ties"] == pytest.approx((read == 0.5).mean())
    assert metrics(summary, arm, "win_vs_target_true")["n"] == 16
  start = won[""][~np.isnan(won[""])]
  assert summary["baseline"]["win_vs_target"]["value"] == pytest.approx(
    start.mean()
  )
  # Only prompts that were read of both are compared.
  first = summary["comparisons"][0]
  gap = won[ISA] - won[RANDOM]
  assert first["difference"]["value"] == pytest.approx(np.nanmean(gap))
  assert first["difference"]["n"] == int((~np.isnan(gap)).sum())
  assert "No verdict: it needs at least 30 prompts" in first["words"]
  lines = {x["name"]: x for x in summary["judge"]["arms"]}
  assert lines[ISA]["bias"]["value"] == 0
  assert lines[ISA]["consistent"]["value"] == 1
  lost = [
    f(s["prompt"], *pair)
    for s in jobs.lines(work / f"runs/{ISA}/samples.jsonl")
    for f in (silent,)
    for pair in ((s["said"], s["target"]), (s["target"], s["said"]))
  ]
  assert lines[ISA]["unparsable"]["value"] == pytest.approx(np.mean(lost))
  assert any("could not be read" in w for w in summary["warnings"])
  (control,) = summary["judge"]["controls"].values()
  assert control["null"]["value"] == control["injected"]["value"] == 0
  assert summary["judge"]["agreement"]["judges"].keys() == {"m", "labels"}
  # Every request was sent once, and the cost is all of them.
  assert summary["judge"]["cost"]["requests"] == len(server.seen)
  html = (work / "report.html").read_text()
  for words in (
    "Controls: an empty phrase",
    "Verdicts not read",
    "Samples",
    "What the judge wrote",
    "Same verdict in both orders",
  ):
    assert words in html, words
  assert "<script>alert" not in html and "&lt;script&gt;alert" in html
  # The key is nowhere.
  for path in work.rglob("*"):
    assert not path.is_file() or KEY.encode() not in path.read_bytes(), path
  assert KEY not in ended.out + ended.err


def test_a_finished_job_needs_neither_key_nor_server(
  server, tmp_path, monkeypatch
):  # noqa: F811
  server.reply = by_quality
  work = spoken(tmp_path)
  assert jobs.run(work, *asking(server)).code == 0
  asked = len(server.seen)
  monkeypatch.delenv("JUDGE_KEY")
  again = jobs.run(work, *asking(server))
  assert again.code == 0 and not jobs.did(again), again
  assert len(server.seen) == asked
  # Another question asks only what is new, and is refused without --redo.
  monkeypatch.setenv("JUDGE_KEY", KEY)
  more = asking(server, "judge.labels=12")
  assert "judge.labels was 8, now 12" in jobs.run(work, *more).err
  ended = jobs.run(work, *more, "--redo")
  assert ended.code == 0, ended
  assert len(server.seen) == asked + 8  # four pairs in two orders


def test_a_job_that_was_cut_off_goes_on(  # noqa: F811
  server, tmp_path, monkeypatch
):
  server.reply = by_quality
  work = spoken(tmp_path)
  cut = jobs.run(work, *asking(server, "judge.max_requests=60"))
  assert cut.code == 64 and "judge.max_requests" in cut.err, cut
  assert not server.seen  # known before anything was asked
  busy = (500, {}, json.dumps(dict(error=dict(message="busy", type="t"))))
  server.script = [None] * 40 + [busy] * 500
  with monkeypatch.context() as patched:
    asked_with(patched, retries=1, workers=1)
    cut = jobs.run(work, *asking(server))
  assert cut.code == 75, cut
  server.script = []
  ended = jobs.run(work, *asking(server))
  assert ended.code == 0, ended
  good = len(server.seen) - 2  # two attempts had failed
  assert summary_of(work)["judge"]["cost"]["requests"] == good + 2
  whole = spoken(tmp_path, "whole")
  before = len(server.seen)
  assert jobs.run(whole, *asking(server)).code == 0
  assert len(server.seen) - before == good
  for arm in (ISA, RANDOM):
    assert (work / f"runs/{arm}/judge.json").read_bytes() == (
      whole / f"runs/{arm}/judge.json"
    ).read_bytes()


@pytest.mark.parametrize(
  "reply, words, told",
  [
    ("VERDICT: A", "leans to the answer shown first", "win_vs_target"),
    ("Both have merits.", "none is guessed", "accuracy"),
  ],
  ids=["always A", "never parses"],
)
def test_a_judge_that_is_none(server, tmp_path, reply, words, told):  # noqa: F811
  server.reply = lambda _: reply
  work = spoken(tmp_path)
  ended = jobs.run(work, *asking(server))
  assert ended.code == 0, ended
  summary = summary_of(work)
  assert any(words in w for w in summary["warnings"]), summary["warnings"]
  assert any("do not believe" in w for w in summary["warnings"])
  assert {x["metric"] for x in summary["comparisons"]} == {told}
  found = metrics(summary, ISA)
  if told == "accuracy":
    assert found["value"] is None and found["n"] == 0
  else:
    assert found["value"] == 0.5 and found["ties"] == 1
    assert summary["judge"]["arms"][0]["bias"]["value"] == 0.5
  assert (work / "report.html").exists()


def test_against_the_reference_the_start_ties_with_itself(server, tmp_path):  # noqa: F811
  server.reply = by_quality
  work = spoken(tmp_path)
  ended = jobs.run(work, *asking(server, "judge.baseline=reference"))
  assert ended.code == 0, ended
  summary = summary_of(work)
  won = outcomes(work, ISA, "reference")
  assert metrics(summary, ISA, "win_vs_sft")["value"] == pytest.approx(
    np.nanmean(won)
  )
  assert summary["baseline"]["win_vs_sft"]["value"] == 0.5
  (against,) = (
    x for x in summary["comparisons"] if (x["a"], x["b"]) == (ISA, "SFT model")
  )
  assert against["difference"]["value"] == pytest.approx(np.nanmean(won) - 0.5)


def test_no_judge_is_a_choice_too(tmp_path):
  work = spoken(tmp_path)
  ended = jobs.run(work, "judge.kind=none")
  assert ended.code == 0 and set(jobs.did(ended)) == {"report"}, ended
  summary = summary_of(work)
  assert {x["metric"] for x in summary["comparisons"]} == {"accuracy"}
  assert any("config.judge.kind" in w for w in summary["warnings"])
  assert "win_vs_target" not in summary["arms"][0]["metrics"]


# A reward model.


@pytest.mark.usefixtures("quick_compiles")
def test_a_reward_model_judges_as_transformers_has_it(tmp_path):
  torch = pytest.importorskip("torch")
  pytest.importorskip("transformers")
  from models import joining
  from test_reward_model import save
  import tokenizers

  work = spoken(tmp_path)
  words = {
    w
    for folder in ("shared/baseline", f"runs/{ISA}", f"runs/{RANDOM}")
    for row in jobs.lines(work / folder / "samples.jsonl")
    for text in ("prompt", "target", "said")
    for w in row[text].split()
  }
  vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted(words)]
  tok = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(
      {w: i for i, w in enumerate(vocab)}, unk_token="[UNK]"
    )
  )
  tok.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  model = save(tmp_path, "bert", vocab_size=len(vocab))
  joining(tok, tmp_path)
  ended = jobs.run(
    work, "judge.kind=reward_model", f"judge.checkpoint={tmp_path}"
  )
  assert ended.code == 0, ended
  summary = summary_of(work)

  def reward(prompt, answer):
    both = tok.encode(prompt, answer)
    with torch.no_grad():
      return float(
        model(
          input_ids=torch.tensor([both.ids]),
          token_type_ids=torch.tensor([both.type_ids]),
        ).logits[0, 0]
      )

  start = jobs.lines(work / "shared/baseline/samples.jsonl")
  mine = jobs.lines(work / f"runs/{ISA}/samples.jsonl")
  gap = {
    side: np.array(
      [
        reward(s["prompt"], s["said"])
        - reward(s["prompt"], s["target"] if side == "target" else b["said"])
        for s, b in zip(mine, start)
      ]
    )
    for side in ("target", "sft")
  }
  for side, name in (("target", "win_vs_target"), ("sft", "win_vs_sft")):
    g = np.where(np.abs(gap[side]) < 1e-5, 0, gap[side])
    assert np.ptp(g) > 0.5
    assert metrics(summary, ISA, name)["value"] == pytest.approx(
      np.mean((g > 0) + 0.5 * (g == 0))
    )
  assert summary["judge"]["arms"][0]["bias"] is None
  assert summary["judge"]["controls"] and summary["judge"]["agreement"]
  cards = load(work / f"runs/{ISA}/records/judge.json")
  assert cards["cost"]["flops"] > 0 and cards["fields"]["checkpoint"]
  again = jobs.run(
    work, "judge.kind=reward_model", f"judge.checkpoint={tmp_path}"
  )
  assert again.code == 0 and not jobs.did(again)


# What cannot work.


@pytest.mark.parametrize(
  "knobs, words",
  [
    (("judge.kind=gpt",), "judge.kind='gpt' is unknown"),
    (("judge.baseline=best",), "config.judge.baseline"),
    (("judge.kind=reward_model",), "config.judge.checkpoint"),
    (("judge.kind=endpoint",), "config.judge.model"),
    (("judge.model=m",), "config.judge.kind=endpoint"),
    (("judge.baseline=chosen",), "config.judge.baseline"),
    (("judge.labels=-1",), "config.judge.labels"),
    (
      ("judge.kind=endpoint", "judge.model=m", "judge.key_env=NOT_SET_AT_ALL"),
      "NOT_SET_AT_ALL, found none",
    ),
    (
      (
        "judge.kind=endpoint",
        "judge.model=m",
        "judge.key_env=",
        "judge.endpoint=http://127.0.0.1:9/v1",
      ),
      "cannot be reached",
    ),
    (
      (
        "judge.kind=endpoint",
        "judge.model=m",
        "judge.endpoint=https://u:p@x/v1",
      ),
      "holds a user",
    ),
  ],
)
def test_what_cannot_work_is_refused_first(tmp_path, knobs, words):
  pytest.importorskip("openai")
  ended = jobs.run(tmp_path, *knobs)
  assert ended.code == 64 and words in ended.err, ended
  assert not jobs.did(ended) and "u:p" not in ended.err


def test_the_true_reward_is_only_of_the_world():
  from configs import common

  c = common.base("tiny")
  c.data.source, c.judge.kind = "x.jsonl", "world"
  with pytest.raises(ConfigError, match="reward_model, endpoint or none"):
    judges.check(c)
  c.judge.kind = "auto"
  judges.check(c)
  assert judges.kind_of(c) == "none"


def verdict_files(root, prompts):
  """Arms with verdicts on these prompts: name -> [(id, won)]."""
  for name, rows in prompts.items():
    folder = root / ("shared/judged_reference" if not name else f"runs/{name}")
    folder.mkdir(parents=True)
    (folder / "verdicts.jsonl").write_text(
      "".join(json.dumps(dict(id=i, outcome=w)) + "\n" for i, w in rows)
    )
  from configs import common

  c = common.base("tiny")
  c.judge.kind, c.judge.model = "endpoint", "m"
  return types.SimpleNamespace(c=c, workdir=root, shared=root / "shared")


def test_arms_on_different_prompts_are_refused(tmp_path):
  arms = [Arm("isa", 0.1, 0), Arm("random", 0.1, 0)]
  job = verdict_files(
    pathlib.Path(tmp_path),
    {
      "": [("a", 0.0), ("b", 1.0)],
      ISA: [("a", 1.0), ("b", 1.0)],
      RANDOM: [("a", 1.0), ("c", 1.0)],
    },
  )
  with pytest.raises(DataError, match=f"{RANDOM} was judged on other prompts"):
    evidence.outcomes(job, arms)


def test_seeds_are_compared_where_every_verdict_was_read():
  """By NumPy, of outcomes with holes; a hole is no tie and no loss."""
  rng = np.random.default_rng(0)
  won = {
    f"{s}-0.1-seed{k}": rng.choice([0.0, 0.5, 1.0], 200)
    for s in ("isa", "random")
    for k in range(5)
  }
  for x in won.values():
    x[rng.random(200) < 0.02] = np.nan
  told = evidence.Told(
    "win_vs_target", "win rate", [str(i) for i in range(200)], won
  )
  arms = [Arm(s, 0.1, k) for s in ("isa", "random") for k in range(5)]
  (one,) = evidence.verdicts(told, evidence.grouped(arms), "isa", "")[0]
  both = np.stack([won[a.name] for a in arms])
  read = ~np.isnan(both).any(axis=0)
  assert 100 < read.sum() < 200
  assert one["difference"]["prompts"] == read.sum()
  assert one["difference"]["value"] == pytest.approx(
    both[:5, read].mean() - both[5:, read].mean()
  )
