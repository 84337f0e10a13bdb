"""One policy on the held-out split: generation, win rate, accuracy, KL."""

from typing import Any, NamedTuple

import numpy as np

from jaxalign import progress
from jaxalign.data import tokens as tokens_lib
from jaxalign.data import world as world_lib
from jaxalign.eval import held_out, winrate
from jaxalign.eval.judges import verdicts
from jaxalign.model import decode
from jaxalign.select import embed


class Examined(NamedTuple):
  """What is measured on: the held-out split, tokenized."""

  rows: list[dict[str, Any]]  # n records, with "prompt" and "target"
  tokens: tokens_lib.TokenRows  # n * R rows
  asked: np.ndarray  # [p] row numbers whose prompts are generated from
  tokenizer: Any
  world: world_lib.World | None


class Outcome(NamedTuple):
  """Raw numbers of one policy; metrics are made from these."""

  logp: np.ndarray  # [n, R] float32 nats of the held-out responses
  said: list[np.ndarray]  # p answers, as ids
  texts: list[str]  # p answers, as text
  own_logp: np.ndarray  # [p] nats of the answers under this policy
  reward: np.ndarray | None  # [p] true reward, where the world is known
  flops: int
  tokens: int


def choose_prompts(
  rows: list[dict[str, Any]], tokens: tokens_lib.TokenRows, most: int, room: int
) -> np.ndarray:
  """The first `most` rows with different prompts, in id order.

  Args:
    rows: n records.
    tokens: n * R rows.
    most: prompts at most.
    room: tokens that a prompt may take; a longer one is never cut but left
      out, and a line says how many were.
  """
  seen, asked, long = set(), [], 0
  each = len(tokens.start) // max(1, len(rows))
  for i, row in enumerate(rows):
    if row["prompt"] in seen or len(asked) == most:
      continue
    seen.add(row["prompt"])
    if tokens.start[each * i] > room:
      long += 1
    else:
      asked.append(i)
  if long:
    progress.say(
      f"  {long:,} held-out prompts of over {room:,} tokens leave "
      "no room for an answer and are not generated from; raise "
      "config.model.context or lower config.eval.new_tokens"
    )
  return np.array(asked, np.int64)


def prompts_of(what: Examined) -> list[np.ndarray]:
  """Token ids of the prompts asked, each with its BOS."""
  responses = len(what.tokens.start) // len(what.rows)
  index = what.asked * responses
  first = what.tokens.offsets[index]
  return [
    np.asarray(what.tokens.ids[a : a + s])
    for a, s in zip(first, what.tokens.start[index])
  ]


def answer_rows(
  prompts: list[np.ndarray], said: list[np.ndarray]
) -> tokens_lib.TokenRows:
  """Prompts with generated answers, as rows to be scored."""
  ids = [np.concatenate([p, s]).astype(np.int32) for p, s in zip(prompts, said)]
  return tokens_lib.TokenRows(
    np.concatenate(ids),
    np.cumsum([0] + [len(x) for x in ids]),
    np.array([len(p) for p in prompts], np.int32),
    np.zeros(len(ids), np.int32),
  )


def score_answers(
  mesh: Any,
  params: Any,
  m: Any,
  what: Examined,
  said: list[np.ndarray],
  *,
  new: int,
  tile: int,
  chunk: int,
) -> np.ndarray:
  """[p] nats of given answers to the prompts asked, under `params`.

  The prompts are cut as generation cut them to make room for `new` tokens.
  """
  prompts = [decode.fitting(p, m, new) for p in prompts_of(what)]
  return embed.score_rows(
    mesh,
    params,
    m,
    answer_rows(prompts, said),
    tile=tile,
    chunk=chunk,
    label="score answers",
  ).logp


def examine(
  mesh: Any,
  params: Any,
  m: Any,
  what: Examined,
  *,
  new: int,
  temperature: float,
  seed: int,
  tile: int,
  chunk: int,
) -> Outcome:
  """Runs one policy over the held-out split.

  Args:
    mesh: the mesh.
    params: the policy, on the mesh.
    m: its sizes.
    what: the held-out split.
    new: most tokens of a generated answer.
    temperature: of the sampling; 0 is greedy.
    seed: of the sampling: the same for every policy, so that prompts and
      noise are paired.
    tile: rows a device runs at once.
    chunk: positions of the head at once.
  """
  tok = what.tokenizer
  scored = embed.score_rows(
    mesh, params, m, what.tokens, tile=tile, chunk=chunk, label="score held-out"
  )
  prompts = prompts_of(what)
  said = decode.generate(
    mesh,
    params,
    m,
    prompts,
    new=new,
    eos=tok.stops,
    known=min(tok.vocab_size, m.vocab),
    temperature=temperature,
    seed=seed,
    tile=tile,
  )
  own = score_answers(
    mesh, params, m, what, said, new=new, tile=tile, chunk=chunk
  )
  texts = [
    tok.decode_response(s[:-1] if len(s) and s[-1] in tok.stops else s)
    for s in said
  ]
  reward = None
  if what.world is not None:
    reward = np.array(
      [
        world_lib.reward(what.world, what.rows[i]["prompt"], t)
        for i, t in zip(what.asked, texts)
      ]
    )
  rows = answer_rows(prompts, said)
  return Outcome(
    scored.logp.reshape(len(what.rows), -1),
    said,
    texts,
    own,
    reward,
    embed.flops(m, what.tokens) + 2 * embed.flops(m, rows),
    len(what.tokens.ids) + 2 * len(rows.ids),
  )


def measure(
  what: Examined,
  policy: Outcome,
  reference: Outcome,
  answers_under_reference: np.ndarray,
) -> dict[str, Any]:
  """The metrics of one policy, as `eval.json` holds them.

  Args:
    what: the held-out split.
    policy: its outcome.
    reference: the frozen reference's outcome on the same prompts.
    answers_under_reference: [p] nats of the policy's answers under it.

  Returns:
    {name: {"value", "low", "high", "n"}}; where the truth is known also
    "details": the win rate's outcomes apart, by topic, and at equal length.
  """
  malformed, out = None, {}
  if what.world is not None:
    malformed = policy.reward == world_lib.MALFORMED
    prompts = [what.rows[i]["prompt"] for i in what.asked]
    topics = np.array([world_lib.topic(what.world, p) for p in prompts])
    target = np.array(
      [
        world_lib.reward(what.world, p, what.rows[i]["target"])
        for p, i in zip(prompts, what.asked)
      ]
    )
    out, out["details"] = verdicts.measured(
      "target",
      winrate.wins(policy.reward, target),
      policy.texts,
      [what.rows[i]["target"] for i in what.asked],
      topics,
    )
    out["win_vs_sft"] = winrate.rates(policy.reward, reference.reward, None)[
      "micro"
    ]
  out |= winrate.generation_health(policy.said, what.tokenizer.stops, malformed)
  out["accuracy"] = held_out.accuracy(
    *as_pairs(what, policy.logp, reference.logp)
  )
  count = (tokens_lib.lengths(what.tokens) - what.tokens.start).reshape(
    policy.logp.shape
  )
  out["likelihood_accuracy"] = held_out.likelihood_accuracy(
    *as_pairs(what, policy.logp, count)
  )
  out["kl"] = held_out.sampled_kl(policy.own_logp, answers_under_reference)
  return out


def as_pairs(what: Examined, policy: np.ndarray, ref: np.ndarray):
  """Pairs as they are; unpaired as the i-th liked beside the i-th disliked."""
  if policy.shape[1] == 2:
    return policy, ref
  label = np.array([r["label"] for r in what.rows])
  up, down = np.flatnonzero(label), np.flatnonzero(~label)
  n = min(len(up), len(down))
  rows = np.stack([up[:n], down[:n]], axis=1)
  return policy[rows, 0], ref[rows, 0]
