"""One policy on the held-out split: generation, win rate, accuracy, KL."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxalign.core import intervals, progress
from jaxalign.data import prepare
from jaxalign.data import tokens as tokens_lib
from jaxalign.data import world as world_lib
from jaxalign.embed import passes
from jaxalign.eval import winrate
from jaxalign.model import decode
from jaxalign.model.job import Job


class EvalOptions(NamedTuple):
  """How answers are generated and scored."""

  new_tokens: int  # at most, of an answer
  temperature: float  # of the sampling; 0 is greedy
  tile: int  # rows a device runs at once
  chunk: int  # positions of the head at once


class EvalSet(NamedTuple):
  """The held-out split, tokenized, and how policies are measured on it."""

  rows: list[dict[str, Any]]  # n records, with "prompt" and "target"
  tokens: tokens_lib.TokenRows  # n * R rows
  prompt_rows: np.ndarray  # [p] numbers of the rows that are generated from
  tokenizer: Any
  world: world_lib.World | None
  mesh: Any = None
  options: EvalOptions | None = None


class PolicyOutputs(NamedTuple):
  """Raw numbers of one policy; metrics are computed from these."""

  logp: np.ndarray  # [n, R] float32 nats of the held-out responses
  answers: list[np.ndarray]  # p answers, as ids
  texts: list[str]  # p answers, as text
  answer_logp: np.ndarray  # [p] nats of the answers under this policy
  reward: np.ndarray | None  # [p] true reward, where the world is known
  flops: int
  tokens: int


def choose_prompts(
  rows: list[dict[str, Any]], tokens: tokens_lib.TokenRows, most: int, room: int
) -> np.ndarray:
  """The first `most` of n rows with different prompts, in id order.

  A prompt of more than `room` tokens is never cut but left out, and a line
  counts them.
  """
  first, chosen, long = {}, [], 0
  for i, row in enumerate(rows):
    first.setdefault(row["prompt"], i)
  responses = len(tokens.start) // max(1, len(rows))
  for i in first.values():
    if len(chosen) == most:
      break
    if tokens.start[responses * i] > room:
      long += 1
    else:
      chosen.append(i)
  if long:
    progress.say(
      f"  {long:,} held-out prompts of over {room:,} tokens leave "
      "no room for an answer and are not generated from; raise "
      "config.model.context or lower config.eval.new_tokens"
    )
  return np.array(chosen, np.int64)


def prompts_of(data: EvalSet) -> list[np.ndarray]:
  """Token ids of the prompts generated from, each with its BOS."""
  index = data.prompt_rows * (len(data.tokens.start) // len(data.rows))
  starts = zip(data.tokens.offsets[index], data.tokens.start[index])
  return [np.asarray(data.tokens.ids[a : a + s]) for a, s in starts]


def answer_rows(
  prompts: list[np.ndarray], answers: list[np.ndarray]
) -> tokens_lib.TokenRows:
  """Prompts with generated answers, as rows to be scored."""
  ids = [
    np.concatenate([p, a]).astype(np.int32) for p, a in zip(prompts, answers)
  ]
  return tokens_lib.join_rows(ids, [len(p) for p in prompts])


def score_answers(
  data: EvalSet, params: Any, m: Any, answers: list[np.ndarray]
) -> np.ndarray:
  """[p] nats of given answers to the prompts of `data`, under `params`.

  The prompts are cut as generation cut them to make room for new tokens.
  """
  new, _, tile, chunk = data.options
  prompts = [decode.fitting(p, m, new) for p in prompts_of(data)]
  rows = answer_rows(prompts, answers)
  how = passes.PassOptions(tile, chunk, label="score answers")
  return passes.score_rows(data.mesh, params, m, rows, how).logp


def true_rewards(data: EvalSet, texts: Sequence[str]) -> np.ndarray:
  """[p] rewards of answers to the prompts of a world's eval set."""
  prompts = [data.rows[i]["prompt"] for i in data.prompt_rows]
  reward = world_lib.reward
  return np.array([reward(data.world, p, t) for p, t in zip(prompts, texts)])


def answer_texts(tokenizer: Any, answers: list[np.ndarray]) -> list[str]:
  """Answers as texts, without the token that ends them."""
  stops = tokenizer.stops
  ended = lambda a: len(a) and a[-1] in stops
  return [tokenizer.decode_response(a[:-1] if ended(a) else a) for a in answers]


def write_answers(
  data: EvalSet, params: Any, m: Any, **more: Any
) -> list[np.ndarray]:
  """p answers, as ids, that a policy gives to the prompts of `data`; `more` is
  of `decode.GenerateOptions`, such as the seed of the noise."""
  tok, k = data.tokenizer, data.options
  generation = decode.GenerateOptions(
    k.new_tokens,
    tok.stops,
    min(tok.vocab_size, m.vocab),
    decode.Sampling(k.temperature),
    tile=k.tile,
    **more,
  )
  return decode.generate(data.mesh, params, m, prompts_of(data), generation)


def run_policy(
  data: EvalSet, params: Any, m: Any, seed: int = 0
) -> PolicyOutputs:
  """Scores the held-out responses, generates answers, and scores those.

  Policies of one seed meet the same noise: their answers are paired.
  """
  tile, chunk = data.options.tile, data.options.chunk
  how = passes.PassOptions(tile, chunk, label="score held-out")
  scored = passes.score_rows(data.mesh, params, m, data.tokens, how)
  answers = write_answers(data, params, m, seed=seed)
  texts = answer_texts(data.tokenizer, answers)
  rows = answer_rows(prompts_of(data), answers)
  return PolicyOutputs(
    scored.logp.reshape(len(data.rows), -1),
    answers,
    texts,
    score_answers(data, params, m, answers),
    None if data.world is None else true_rewards(data, texts),
    passes.pass_flops(m, data.tokens) + 2 * passes.pass_flops(m, rows),
    len(data.tokens.ids) + 2 * len(rows.ids),
  )


def policy_metrics(
  data: EvalSet,
  policy: PolicyOutputs,
  reference: PolicyOutputs,
  answers_under_reference: np.ndarray,
) -> dict[str, Any]:
  """The metrics of one policy, as `eval.json` holds them.

  Args:
    data: the held-out split.
    policy: outputs of the policy.
    reference: outputs of the frozen reference on the same prompts.
    answers_under_reference: [p] nats of the policy's answers under it.

  Returns:
    {name: {"value", "low", "high", "n"}}; where the truth is known also
    "details": the win rate's outcomes apart, by topic, and at equal length.
  """
  malformed, out = None, {}
  if data.world is not None:
    malformed = policy.reward == world_lib.MALFORMED
    rows = [data.rows[i] for i in data.prompt_rows]
    topics = [world_lib.topic(data.world, row["prompt"]) for row in rows]
    targets = [row["target"] for row in rows]
    outcomes = winrate.wins(policy.reward, true_rewards(data, targets))
    out, out["details"] = winrate.win_metrics(
      "target", outcomes, policy.texts, targets, np.array(topics)
    )
    out["win_vs_sft"] = winrate.win_rate(
      winrate.wins(policy.reward, reference.reward)
    )
  out |= generation_health(policy.answers, data.tokenizer.stops, malformed)
  out["accuracy"] = accuracy(*as_pairs(data, policy.logp, reference.logp))
  count = tokens_lib.row_lengths(data.tokens) - data.tokens.start
  out["likelihood_accuracy"] = likelihood_accuracy(
    *as_pairs(data, policy.logp, count.reshape(policy.logp.shape))
  )
  out["kl"] = sampled_kl(policy.answer_logp, answers_under_reference)
  return out


def as_pairs(data: EvalSet, policy: np.ndarray, ref: np.ndarray):
  """Pairs as they are; unpaired rows as the i-th good and the i-th bad."""
  if policy.shape[1] == 2:
    return policy, ref
  label = np.array([r["label"] for r in data.rows])
  good, bad = np.flatnonzero(label), np.flatnonzero(~label)
  n = min(len(good), len(bad))
  rows = np.stack([good[:n], bad[:n]], axis=1)
  return policy[rows, 0], ref[rows, 0]


def accuracy(policy: np.ndarray, ref: np.ndarray) -> dict[str, Any]:
  """How often the implicit reward prefers the chosen answer; ties apart.

  Both are [n, 2] summed log-probabilities, chosen then rejected.

  Returns:
    {"value", "low", "high", "n"} over the untied pairs, and "ties", the
    fraction of pairs with equal rewards (all of them before the first update).
  """
  margin = np.asarray(policy, np.float64) - np.asarray(ref, np.float64)
  margin = margin[:, 0] - margin[:, 1]
  ties = margin == 0
  fraction = float(ties.mean()) if len(ties) else 0.0
  return intervals.proportion(margin[~ties] > 0) | dict(ties=fraction)


def likelihood_accuracy(
  policy: np.ndarray, count: np.ndarray
) -> dict[str, Any]:
  """How often the chosen answer is likelier per token, no reference at all.

  The bar for `accuracy`: a model that has seen no preference reaches 62 % of
  real dialogues this way. Both [n, 2]: summed log-probabilities, chosen then
  rejected, and response tokens.
  """
  mean = np.asarray(policy, np.float64) / np.asarray(count, np.float64)
  untied = mean[mean[:, 0] != mean[:, 1]]
  return intervals.proportion(untied[:, 0] > untied[:, 1])


def sampled_kl(policy: np.ndarray, ref: np.ndarray) -> dict[str, Any]:
  """KL(policy || reference) a response, nats, from the policy's own samples,
  by their [n] summed log-probabilities."""
  return intervals.normal_mean(np.asarray(policy, np.float64) - np.asarray(ref))


def generation_health(
  answers: list[np.ndarray],
  eos: int | Sequence[int],
  malformed: np.ndarray | None,
) -> dict[str, Any]:
  """Malformed, unended and empty answers, and their length.

  Args:
    answers: n arrays of generated ids.
    eos: the id that ends an answer, or several.
    malformed: [n] bool where the data's own grammar can tell, else None: then
      an answer counts as malformed when it is empty or has no end.
  """
  stops = set(np.atleast_1d(eos).tolist())
  ended = np.array([len(a) > 0 and a[-1] in stops for a in answers])
  empty = np.array([len(a) == 0 or a[0] in stops for a in answers])
  bad = (empty | ~ended) if malformed is None else malformed
  return dict(
    malformed=intervals.proportion(bad),
    ended=intervals.proportion(ended),
    empty=intervals.proportion(empty),
    length=intervals.normal_mean(np.array([len(a) for a in answers])),
  )


def eval_set(job: Job) -> EvalSet:
  """The held-out split, ready to be measured on; made once a job."""
  if "eval_set" not in job.kept:
    c, rows, tokens = job.c, job.rows("held_out"), job.tokens("held_out")
    room = job.model.context - c.eval.new_tokens
    if prepare.too_long(c) == "cut":
      room = job.model.context  # as the rows are cut, so are the prompts
    index = choose_prompts(rows, tokens, c.eval.prompts, room)
    new, temperature = c.eval.new_tokens, c.eval.temperature
    options = EvalOptions(new, temperature, c.embed.tile, c.model.head_chunk)
    what = (rows, tokens, index, job.tokenizer, prepare.world_of(c))
    job.kept["eval_set"] = EvalSet(*what, job.mesh, options)
  return job.kept["eval_set"]
