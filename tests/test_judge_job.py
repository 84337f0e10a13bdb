"""Whole tiny jobs whose win rates a judge gave: by hand from its verdicts."""

import json
import pathlib
import types
import zlib

import jobs
import numpy as np
import pytest
from test_judges import fenced, KEY, server, verdict_on  # noqa: F401, a fixture

from configs import common
from jaxalign.core import artifacts, disk
from jaxalign.core.errors import ConfigError, DataError
from jaxalign.eval import judge_kinds
from jaxalign.model.job import Arm
from jaxalign.study.arms import grouped
from jaxalign.study.outcomes import Outcomes, read_outcomes
from jaxalign.study.stats import verdicts

ISA, RANDOM = "isa-0.1-seed0", "random-0.1-seed0"


def draw(text, levels):
  return zlib.crc32(text.encode()) % levels


def quality(question, answer):
  """What the scripted judge thinks of an answer: five levels, any text."""
  return draw(f"{question.strip()}|{answer.strip()}", 5)


def silent(question, a, b):
  """Whether nothing that can be read comes of A before B."""
  return draw(f"{question.strip()}|{a.strip()}/{b.strip()}", 6) == 0


def by_quality(messages):
  question, *answers = fenced(messages)
  if "Note to the evaluator" in str(answers) or "good and" in str(answers):
    return verdict_on(*("Note" not in t and "good" not in t for t in answers))
  if silent(question, *answers):
    return "<script>alert(1)</script> Both have merits."
  return verdict_on(*(quality(question, t) for t in answers))


def known(question, ours, theirs):
  """The outcome of `ours` in both orders, NaN where one cannot be read."""
  if silent(question, ours, theirs) or silent(question, theirs, ours):
    return np.nan
  x, y = quality(question, ours), quality(question, theirs)
  return 1.0 if x > y else 0.5 if x == y else 0.0


def samples(work, arm=""):
  """The answers of an arm, or of the reference."""
  folder = f"runs/{arm}" if arm else "shared/baseline"
  return jobs.lines(work / folder / "samples.jsonl")


def outcomes(work, arm, side="target"):
  """[P] outcomes of an arm or the reference, from its answers."""
  pairs = zip(samples(work, arm), samples(work))
  theirs = lambda s, b: s["target"] if side == "target" else b["answer"]
  known_of = lambda s, b: known(s["prompt"], s["answer"], theirs(s, b))
  return np.array([known_of(s, b) for s, b in pairs])


def answering(tmp_path, name="work"):
  """A copy of the finished job in which every arm answers something else.

  So little training leaves all of them with the answers of the reference.
  """
  work = jobs.copy(tmp_path / name)
  for k, arm in enumerate((ISA, RANDOM)):
    path, rows = work / "runs" / arm / "samples.jsonl", samples(work, arm)
    for i, row in enumerate(rows):
      words = row["target"].split()
      row["answer"] = " ".join(words[(i + k) % 3 :] + words[:k])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    record = artifacts.read_record(path.parent, "evaluate")
    record.outputs["samples.jsonl"] = disk.digest(path)
    artifacts._write_record(path.parent, record)
  return work


def with_endpoint(monkeypatch, **settings):
  """Changes what no config sets of an endpoint."""
  real = judge_kinds.endpoint_of
  changed = lambda c: real(c)._replace(**settings)
  monkeypatch.setattr(judge_kinds, "endpoint_of", changed)


@pytest.fixture(autouse=True)
def soon(monkeypatch):
  """No pause before a request is sent again."""
  with_endpoint(monkeypatch, backoff_s=0.01)


def run(work, server, *more):  # noqa: F811
  """Runs a job whose judge is the scripted server, or knobs."""
  if server is not None:
    more = (
      "judge.kind=endpoint",
      f"judge.endpoint={server.url}",
      "judge.model=m",
      "judge.key_env=JUDGE_KEY",
      "judge.per_minute=60000.0",
      *more,
    )
  return jobs.run(work, *more)


def judged(work, server, *more):  # noqa: F811
  """The summary of a job that ends well, and how it ended."""
  ended = run(work, server, *more)
  assert ended.code == 0, ended
  return json.loads((work / "summary.json").read_text()), ended


def metric(summary, arm, name="win_vs_target"):
  (one,) = (a for a in summary["arms"] if a["name"] == arm)
  return one["metrics"][name]


def test_known_verdicts_become_the_win_rates_of_a_job(server, tmp_path):  # noqa: F811
  server.reply = by_quality
  work = answering(tmp_path)
  summary, ended = judged(work, server)
  stages = ["judged_reference", *["judge", "report"] * 2, "report"]
  assert jobs.did(ended) == stages
  wins = {arm: outcomes(work, arm) for arm in (ISA, RANDOM, "")}
  for arm in (ISA, RANDOM):
    read = wins[arm][~np.isnan(wins[arm])]
    got = metric(summary, arm)
    assert 0 < len(read) < 16 == len(wins[arm])  # some could not be read
    assert got["value"] == pytest.approx(read.mean())
    assert got["n"] == len(read)
    assert got["ties"] == pytest.approx((read == 0.5).mean())
    assert metric(summary, arm, "win_vs_target_true")["n"] == 16
  of_reference = summary["baseline"]["win_vs_target"]["value"]
  assert of_reference == pytest.approx(np.nanmean(wins[""]))
  # Only prompts that were read of both are compared.
  first = summary["comparisons"][0]
  gap = wins[ISA] - wins[RANDOM]
  assert first["difference"]["value"] == pytest.approx(np.nanmean(gap))
  assert first["difference"]["n"] == int((~np.isnan(gap)).sum())
  assert "No verdict: it needs at least 30 prompts" in first["words"]
  line = {x["name"]: x for x in summary["judge"]["arms"]}[ISA]
  assert line["bias"]["value"] == 0 and line["consistent"]["value"] == 1
  unread = [
    silent(s["prompt"], *pair)
    for s in samples(work, ISA)
    for pair in ((s["answer"], s["target"]), (s["target"], s["answer"]))
  ]
  assert line["unparsable"]["value"] == pytest.approx(np.mean(unread))
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
  work = answering(tmp_path)
  judged(work, server)
  requests = len(server.seen)
  monkeypatch.delenv("JUDGE_KEY")
  _, again = judged(work, server)
  assert not jobs.did(again) and len(server.seen) == requests
  # Another question sends only what is new, and is refused without --redo.
  monkeypatch.setenv("JUDGE_KEY", KEY)
  more = "judge.labels=12"
  assert "judge.labels was 8, now 12" in run(work, server, more).err
  judged(work, server, more, "--redo")
  assert len(server.seen) == requests + 8  # four pairs in two orders


def test_a_job_that_was_cut_off_is_resumed(  # noqa: F811
  server, tmp_path, monkeypatch
):
  server.reply = by_quality
  work = answering(tmp_path)
  cut = run(work, server, "judge.max_requests=60")
  assert cut.code == 64 and "judge.max_requests" in cut.err, cut
  assert not server.seen  # known before anything was sent
  busy = (500, {}, json.dumps(dict(error=dict(message="busy", type="t"))))
  server.script = [None] * 40 + [busy] * 500
  with monkeypatch.context() as patched:
    with_endpoint(patched, retries=1, workers=1)
    assert run(work, server).code == 75
  server.script = []
  summary, _ = judged(work, server)
  good = len(server.seen) - 2  # two attempts had failed
  assert summary["judge"]["cost"]["requests"] == good + 2
  whole = answering(tmp_path, "whole")
  judged(whole, server)
  assert len(server.seen) - good - 2 == good
  for arm in (ISA, RANDOM):
    name = f"runs/{arm}/judge.json"
    assert (work / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize(
  "reply, words, metric_name",
  [
    ("VERDICT: A", "leans to the answer shown first", "win_vs_target"),
    ("Both have merits.", "none is guessed", "accuracy"),
  ],
  ids=["always A", "never parses"],
)
def test_a_judge_that_is_none(server, tmp_path, reply, words, metric_name):  # noqa: F811
  server.reply = lambda _: reply
  work = answering(tmp_path)
  summary, _ = judged(work, server)
  assert any(words in w for w in summary["warnings"]), summary["warnings"]
  assert any("do not believe" in w for w in summary["warnings"])
  assert {x["metric"] for x in summary["comparisons"]} == {metric_name}
  got = metric(summary, ISA)
  if metric_name == "accuracy":
    assert got["value"] is None and got["n"] == 0
  else:
    assert got["value"] == 0.5 and got["ties"] == 1
    assert summary["judge"]["arms"][0]["bias"]["value"] == 0.5
  assert (work / "report.html").exists()


def test_against_the_reference_it_ties_with_itself(server, tmp_path):  # noqa: F811
  server.reply = by_quality
  work = answering(tmp_path)
  summary, _ = judged(work, server, "judge.baseline=reference")
  wins = np.nanmean(outcomes(work, ISA, "sft"))
  assert metric(summary, ISA, "win_vs_sft")["value"] == pytest.approx(wins)
  assert summary["baseline"]["win_vs_sft"]["value"] == 0.5
  (against,) = (
    x for x in summary["comparisons"] if (x["a"], x["b"]) == (ISA, "SFT model")
  )
  assert against["difference"]["value"] == pytest.approx(wins - 0.5)


def test_no_judge_is_a_choice_too(tmp_path):
  summary, ended = judged(answering(tmp_path), None, "judge.kind=none")
  assert set(jobs.did(ended)) == {"report"}
  assert {x["metric"] for x in summary["comparisons"]} == {"accuracy"}
  assert any("config.judge.kind" in w for w in summary["warnings"])
  assert "win_vs_target" not in summary["arms"][0]["metrics"]


@pytest.mark.usefixtures("quick_compiles")
def test_a_reward_model_judges_as_transformers_has_it(tmp_path):
  torch = pytest.importorskip("torch")
  pytest.importorskip("transformers")
  from models import joining
  from test_reward_model import save
  import tokenizers

  work = answering(tmp_path)
  words = {
    w
    for arm in ("", ISA, RANDOM)
    for row in samples(work, arm)
    for text in ("prompt", "target", "answer")
    for w in row[text].split()
  }
  vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted(words)]
  numbers = {w: i for i, w in enumerate(vocab)}
  level = tokenizers.models.WordLevel(numbers, unk_token="[UNK]")
  tok = tokenizers.Tokenizer(level)
  tok.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  model = save(tmp_path, "bert", vocab_size=len(vocab))
  joining(tok, tmp_path)
  knobs = ("judge.kind=reward_model", f"judge.checkpoint={tmp_path}")
  summary, _ = judged(work, None, *knobs)

  def reward(prompt, answer):
    both = tok.encode(prompt, answer)
    with torch.no_grad():
      ids, types = torch.tensor([both.ids]), torch.tensor([both.type_ids])
      return float(model(input_ids=ids, token_type_ids=types).logits[0, 0])

  for side, name in (("target", "win_vs_target"), ("answer", "win_vs_sft")):
    theirs = samples(work)  # the reference's; it has the same targets
    gap = np.array(
      [
        reward(s["prompt"], s["answer"]) - reward(s["prompt"], b[side])
        for s, b in zip(samples(work, ISA), theirs, strict=True)
      ]
    )
    gap = np.where(np.abs(gap) < 1e-5, 0, gap)
    assert np.ptp(gap) > 0.5
    wins = np.mean((gap > 0) + 0.5 * (gap == 0))
    assert metric(summary, ISA, name)["value"] == pytest.approx(wins)
  assert summary["judge"]["arms"][0]["bias"] is None
  assert summary["judge"]["controls"] and summary["judge"]["agreement"]
  record = artifacts.read_record(work / "runs" / ISA, "judge")
  assert record.cost.flops > 0 and record.fields["checkpoint"]
  assert not jobs.did(judged(work, None, *knobs)[1])


# What cannot work.


ENDPOINT = ("judge.kind=endpoint", "judge.model=m")


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
    ((*ENDPOINT, "judge.key_env=NOT_SET"), "NOT_SET, found none"),
    (
      (*ENDPOINT, "judge.key_env=", "judge.endpoint=http://127.0.0.1:9/v1"),
      "cannot be reached",
    ),
    ((*ENDPOINT, "judge.endpoint=https://u:p@x/v1"), "holds a user"),
  ],
)
def test_what_cannot_work_is_refused_first(tmp_path, knobs, words):
  pytest.importorskip("openai")
  ended = jobs.run(tmp_path, *knobs)
  assert ended.code == 64 and words in ended.err, ended
  assert not jobs.did(ended) and "u:p" not in ended.err


def test_the_true_reward_is_only_of_the_world():
  c = common.base("tiny")
  c.data.source, c.judge.kind = "x.jsonl", "world"
  with pytest.raises(ConfigError, match="reward_model, endpoint or none"):
    judge_kinds.check_judge(c)
  c.judge.kind = "auto"
  judge_kinds.check_judge(c)
  assert judge_kinds.kind_of(c) == "none"


def test_arms_on_different_prompts_are_refused(tmp_path):
  for folder, prompts in (
    ("shared/judged_reference", "ab"),
    (f"runs/{ISA}", "ab"),
    (f"runs/{RANDOM}", "ac"),
  ):
    (tmp_path / folder).mkdir(parents=True)
    lines = [json.dumps(dict(id=i, outcome=1.0)) for i in prompts]
    (tmp_path / folder / "verdicts.jsonl").write_text("\n".join(lines))
  c, root = common.base("tiny"), pathlib.Path(tmp_path)
  c.judge.kind, c.judge.model = "endpoint", "m"
  job = types.SimpleNamespace(c=c, workdir=root, shared=root / "shared")
  arms = [Arm("isa", 0.1, 0), Arm("random", 0.1, 0)]
  with pytest.raises(DataError, match=f"{RANDOM} was judged on other prompts"):
    read_outcomes(job, arms)


def test_seeds_are_compared_where_every_verdict_was_read():
  """By NumPy, of outcomes with holes; a hole is no tie and no loss."""
  rng = np.random.default_rng(0)
  wins = {
    f"{s}-0.1-seed{k}": rng.choice([0.0, 0.5, 1.0], 200)
    for s in ("isa", "random")
    for k in range(5)
  }
  for x in wins.values():
    x[rng.random(200) < 0.02] = np.nan
  outcomes = Outcomes(
    "win_vs_target", "win rate", [str(i) for i in range(200)], wins
  )
  arms = [Arm(s, 0.1, k) for s in ("isa", "random") for k in range(5)]
  (one,) = verdicts(outcomes, grouped(arms), "isa", "")[0]
  both = np.stack([wins[a.name] for a in arms])
  read = ~np.isnan(both).any(axis=0)
  assert 100 < read.sum() < 200
  assert one["difference"]["prompts"] == read.sum()
  assert one["difference"]["value"] == pytest.approx(
    both[:5, read].mean() - both[5:, read].mean()
  )
