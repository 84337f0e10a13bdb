"""Rows of the pool as a judge or a reward model reads them, in its tokens.

A row's texts come from strangers. In a question each stands between fences
with a nonce that it does not hold, a hash of the row itself, so that the same
row is asked the same on every run.
"""

from collections.abc import Sequence
import hashlib
from typing import Any, NamedTuple

import numpy as np

from jaxalign.core.errors import ConfigError
from jaxalign.data import chat as chats
from jaxalign.data import tokens
from jaxalign.data.encode import answers_of, dialogues_to_ids, encode_texts
from jaxalign.data.schemas.schema import turns_of
from jaxalign.data.tokenizer import load_tokenizer
from jaxalign.data.tokens import fit_rows

FIELDS = ("{prompt}", "{response}")
_CHUNK = 1024  # texts tokenized at once
_LEAST = 4  # tokens of a text that a question leaves of it, if it had them
ANSWERS = ("yes", "no")  # the good one first


class Questions(NamedTuple):
  """What a judge is asked about n answers."""

  rows: tokens.TokenRows  # n rows; the next token is the verdict
  yes: int  # the tokens that tell the two verdicts apart
  no: int
  shortened: int  # rows whose texts did not fit whole


def check(question: str) -> None:
  """Raises ConfigError for a question that cannot work."""
  wrong = [f for f in FIELDS if question.count(f) != 1]
  if wrong:
    raise ConfigError(
      f"ask.question holds {' and '.join(wrong)} not once; "
      "set config.ask.question"
    )


def fenced(question: str, name: str, prompt: str, response: str) -> str:
  """The question with a row's two texts between fences.

  Args:
    question: holds each of FIELDS once.
    name: of the row; with its texts it makes the nonce.
    prompt, response: the texts, which no fence of theirs can close.
  """
  count, nonce = 0, ""
  while not nonce or nonce in prompt or nonce in response:
    text = "\0".join([str(count), name, prompt, response])
    nonce = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:12]
    count += 1
  put = {
    f: f"<{nonce}>\n{text}\n</{nonce}>"
    for f, text in zip(FIELDS, (prompt, response))
  }
  first, second = sorted(FIELDS, key=question.index)
  before, _, rest = question.partition(first)
  between, _, after = rest.partition(second)
  return before + put[first] + between + put[second] + after


def build(
  tok: Any,
  texts: Sequence[tuple[str, str, str]],
  question: str,
  answers: tuple[str, str],
  context: int,
) -> Questions:
  """Asks about every answer, in the judge's own tokens and chat template.

  A text that does not fit loses: the prompt its beginning, then the answer
  its end; the question itself stays whole.

  Args:
    tok: the judge's tokenizer; its template asks, where it has one.
    texts: n (id, prompt, response).
    question: see `fenced`.
    answers: the word of a good answer, and that of a bad one.
    context: most tokens of a question.

  Raises:
    ConfigError: the question alone does not fit, or the two words begin with
      the same tokens and one ends there.
  """
  if not tok.template:
    return _build(tok, None, texts, question, answers, context)
  with chats.Chat(tok, tok.template) as chat:
    return _build(tok, chat, texts, question, answers, context)


def _build(tok, chat, texts, question, answers, context) -> Questions:
  bos = [tok.bos] if tok.bos >= 0 else []

  def encode(*asked):
    """Ids of whole questions, up to where the two words differ."""
    whole = [fenced(question, *one) for one in asked]
    if chat is None:
      heads = tok.encode_many(whole)
    else:
      heads = [
        chat.encode([dict(role="user", content=one)], answers)[0]
        for one in whole
      ]
    return [bos + head + said[0][:k] for head in heads]

  if chat is None:  # a text goes on with a space and the word
    said = tok.encode_responses([f" {word}" for word in answers])
  else:
    said = chat.encode([dict(role="user", content="?")], answers)[1]
  k, least = 0, min(map(len, said))
  while k < least and said[0][k] == said[1][k]:
    k += 1
  if k == least:
    raise ConfigError(
      f"the judge's tokens of {answers[0]!r} and {answers[1]!r}"
      " are alike up to where one ends; set config.ask.checkpoint"
    )
  ids, short = [], 0
  for at in range(0, len(texts), _CHUNK):
    part = texts[at : at + _CHUNK]
    for (name, prompt, response), own in zip(part, encode(*part)):
      short += len(own) > context
      p = tok.encode_many([prompt])[0] if len(own) > context else []
      r = tok.encode_responses([response])[0] if len(own) > context else []
      while len(own) > context:
        over = len(own) - context
        ends = min(_LEAST, len(p)), min(_LEAST, len(r))
        if (len(p), len(r)) == ends:
          raise ConfigError(
            f"a question about row {name} takes {len(own)} tokens, the judge "
            f"reads {context}; set config.ask.context or config.ask.question"
          )
        keep = max(ends[0], len(p) - over)  # the prompt first
        over -= len(p) - keep
        p = p[len(p) - keep :]
        r = r[: max(ends[1], len(r) - over)]
        own = encode((name, tok.decode(p), tok.decode_response(r)))[0]
      ids.append(np.array(own, np.int32))
  return Questions(
    _rows(ids, [len(i) for i in ids]), said[0][k], said[1][k], short
  )


def _rows(
  ids: list[np.ndarray], start: list[int], cut: Any = None
) -> tokens.TokenRows:
  cut = np.zeros(len(ids), np.int32) if cut is None else np.int32(cut)
  return tokens.TokenRows(
    np.concatenate(ids),
    np.cumsum([0] + [len(i) for i in ids]),
    np.array(start, np.int32),
    cut,
  )


def encode_chats(
  folder: Any, m: Any, texts: Sequence[tuple[dict, str]]
) -> tokens.TokenRows:
  """Rows for a decoder that gives rewards, as `readable` has them.

  Raises:
    ConfigError: a record that the template will not have.
  """
  rows, refused = readable(folder, m, texts)
  if refused:
    i = min(refused)
    name = f"{texts[i][0]['id']} ({texts[i][1]})"
    raise ConfigError(
      f"the reward model cannot read {len(refused)} of "
      f"{len(texts)} answers, {name} for one "
      f"({refused[i]}); set config.rewards.checkpoint"
    )
  return rows


def readable(
  folder: Any, m: Any, texts: Sequence[tuple[dict, str]]
) -> tuple[tokens.TokenRows, dict[int, str]]:
  """Rows for a decoder that gives rewards, each ended by its EOS.

  Its tokenizer's template where it has one, else prompt and answer as text.

  Args:
    folder: of the reward model.
    m: its sizes; `m.context` is the longest row.
    texts: n (record, which of its answers).

  Returns:
    The rows that can be read, and why each of the others cannot.
  """
  tok = load_tokenizer(folder)
  if tok.template:
    turns = [
      row.get("turns")
      or turns_of(row["prompt"])
      or [dict(role="user", content=row["prompt"])]
      for row, _ in texts
    ]
    said = [
      answers_of(row | dict(answers=None), (side,)) for row, side in texts
    ]
    with chats.Chat(tok, tok.template) as chat:
      ids = dialogues_to_ids(chat, turns, said)
    rows, _, refused = fit_rows(
      tok, ids, ("response",), m.context, "cut_answer", history=True
    )
  else:
    rows, _, refused = encode_texts(
      tok,
      [row["prompt"] for row, _ in texts],
      dict(response=[row[side] for row, side in texts]),
      m.context,
      "cut_answer",
    )
  return rows, refused


def encode_two(
  folder: Any, m: Any, texts: Sequence[tuple[dict, str]]
) -> tokens.TokenRows:
  """Rows for an encoder that gives rewards: prompt and answer as two texts.

  `start` is where the tokens have type 1, as of the second text; the end where
  none has. A long prompt loses its beginning;
  an answer that does not fit beside half a context of it, its end.
  """
  from jaxalign.embed import texts as texts_lib  # needs `tokenizers`

  tok = texts_lib.read_tokenizer(folder, m)
  tok.no_truncation()
  own = tok.num_special_tokens_to_add(True)
  room, ids, start, cut = m.context - own, [], [], []
  for at in range(0, len(texts), 1024):
    part = texts[at : at + 1024]
    firsts = tok.encode_batch(
      [row["prompt"] for row, _ in part], add_special_tokens=False
    )
    seconds = tok.encode_batch(
      [row[side] for row, side in part], add_special_tokens=False
    )
    for a, b in zip(firsts, seconds):
      lost = len(a.ids) + len(b.ids)
      keep = min(len(a.ids), max(room - len(b.ids), room // 2))
      a.truncate(keep, direction="left")
      b.truncate(room - keep)
      both = tok.post_process(a, b)
      ids.append(np.array(both.ids, np.int32))
      start.append((both.type_ids + [1]).index(1))
      cut.append(lost - len(a.ids) - len(b.ids))
  return _rows(ids, start, cut)
