"""Rows of the pool as a judge or a reward model reads them, in its tokens.

A row's texts come from strangers. In a question each stands between fences
with a nonce that it does not hold, a hash of the row itself, so that the same
row has the same question on every run.
"""

from collections.abc import Callable, Sequence
import contextlib
import hashlib
from typing import Any, NamedTuple

import numpy as np

from jaxalign.core.errors import ConfigError
from jaxalign.data.chat import Chat
from jaxalign.data.encode import answers_of, dialogues_to_ids, encode_texts
from jaxalign.data.schemas.schema import turns_of
from jaxalign.data.tokenizer import load_tokenizer
from jaxalign.data.tokens import fit_rows, join_rows, TokenRows
from jaxalign.embed.texts import read_tokenizer

FIELDS = ("{prompt}", "{response}")
_CHUNK = 1024  # texts tokenized at once
_LEAST = 4  # tokens of a text that a question leaves of it, if it had them
ANSWERS = ("yes", "no")  # the good one first


class Questions(NamedTuple):
  """A question about each of n answers."""

  rows: TokenRows  # n rows; the next token is the verdict
  yes: int  # the tokens that distinguish the two verdicts
  no: int
  shortened: int  # rows whose texts did not fit whole


def check_question(question: str) -> None:
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
  """A question about every answer, in the judge's own tokens and chat template.

  A text that does not fit loses: the prompt its beginning, then the answer
  its end; the question itself stays whole.

  Args:
    tok: the judge's tokenizer, whose template is used where it has one.
    texts: n (id, prompt, response).
    question: see `fenced`.
    answers: the word of a good answer, and that of a bad one.
    context: most tokens of a question.

  Raises:
    ConfigError: the question alone does not fit, or the two words begin with
      the same tokens and one ends there.
  """
  with contextlib.ExitStack() as stack:
    if tok.template:
      chat = stack.enter_context(Chat(tok, tok.template))
      ask = lambda text: chat.encode([dict(role="user", content=text)], answers)
      words, heads_of = ask("?")[1], lambda whole: [ask(x)[0] for x in whole]
    else:  # a text goes on with a space and the word
      words = tok.encode_responses([f" {word}" for word in answers])
      heads_of = tok.encode_many
    differ = [i for i, (a, b) in enumerate(zip(*words)) if a != b]
    if not differ:
      raise ConfigError(
        f"the judge's tokens of {answers[0]!r} and {answers[1]!r}"
        " are alike up to where one ends; set config.ask.checkpoint"
      )
    yes, no = (word[differ[0]] for word in words)
    bos, tail = [tok.bos] if tok.bos >= 0 else [], words[0][: differ[0]]

    def encode(some):
      heads = heads_of([fenced(question, *text) for text in some])
      return [bos + head + tail for head in heads]

    ids, shortened = [], 0
    for at in range(0, len(texts), _CHUNK):
      some = texts[at : at + _CHUNK]
      for text, own in zip(some, encode(some)):
        shortened += len(own) > context
        if len(own) > context:
          own = _shortened(tok, encode, text, own, context)
        ids.append(np.array(own, np.int32))
  return Questions(join_rows(ids, [len(i) for i in ids]), yes, no, shortened)


def _shortened(
  tok: Any, encode: Callable, text: tuple, own: list[int], context: int
) -> list[int]:
  """The tokens of a question that fits; see `build`."""
  name, prompt, response = text
  p, r = tok.encode_many([prompt])[0], tok.encode_responses([response])[0]
  while (over := len(own) - context) > 0:
    least = min(_LEAST, len(p)), min(_LEAST, len(r))
    if (len(p), len(r)) == least:
      raise ConfigError(
        f"a question about row {name} takes {len(own)} tokens, the judge "
        f"reads {context}; set config.ask.context or config.ask.question"
      )
    cut = min(over, len(p) - least[0])  # the prompt first
    p, r = p[cut:], r[: max(least[1], len(r) - over + cut)]
    own = encode([(name, tok.decode(p), tok.decode_response(r))])[0]
  return own


def encode_chats(
  folder: Any, m: Any, texts: Sequence[tuple[dict, str]]
) -> TokenRows:
  """Rows for a decoder that gives rewards, as `readable` has them.

  Raises:
    ConfigError: a record that the template will not have.
  """
  rows, refused = readable(folder, m, texts)
  if refused:
    i = min(refused)
    raise ConfigError(
      f"the reward model cannot read {len(refused)} of {len(texts)} answers, "
      f"{texts[i][0]['id']} ({texts[i][1]}) for one ({refused[i]}); set "
      "config.rewards.checkpoint"
    )
  return rows


def readable(
  folder: Any, m: Any, texts: Sequence[tuple[dict, str]]
) -> tuple[TokenRows, dict[int, str]]:
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
  if not tok.template:
    prompts = [row["prompt"] for row, _ in texts]
    answers = dict(response=[row[side] for row, side in texts])
    fitted = encode_texts(tok, prompts, answers, m.context, "cut_answer")
    return fitted.rows, fitted.refused
  turns = [
    row.get("turns")
    or turns_of(row["prompt"])
    or [dict(role="user", content=row["prompt"])]
    for row, _ in texts
  ]
  answers = [
    answers_of(row | dict(answers=None), (side,)) for row, side in texts
  ]
  with Chat(tok, tok.template) as chat:
    ids = dialogues_to_ids(chat, turns, answers)
  names = ("response",)
  fitted = fit_rows(tok, ids, names, m.context, "cut_answer", history=True)
  return fitted.rows, fitted.refused


def encode_two(
  folder: Any, m: Any, texts: Sequence[tuple[dict, str]]
) -> TokenRows:
  """Rows for an encoder that gives rewards: prompt and answer as two texts.

  `start` is where the tokens have type 1, as of the second text; the end where
  none has. A long prompt loses its beginning; an answer that does not fit
  behind half a context of it, its end.
  """
  tok = read_tokenizer(folder, m)
  tok.no_truncation()
  room = m.context - tok.num_special_tokens_to_add(True)
  ids, start, cut = [], [], []
  for at in range(0, len(texts), _CHUNK):
    some = texts[at : at + _CHUNK]
    firsts, seconds = (
      tok.encode_batch(list(column), add_special_tokens=False)
      for column in zip(*((row["prompt"], row[side]) for row, side in some))
    )
    for a, b in zip(firsts, seconds):
      whole = len(a.ids) + len(b.ids)
      keep = min(len(a.ids), max(room - len(b.ids), room // 2))
      a.truncate(keep, direction="left")
      b.truncate(room - keep)
      both = tok.post_process(a, b)
      ids.append(np.array(both.ids, np.int32))
      start.append((both.type_ids + [1]).index(1))
      cut.append(whole - len(a.ids) - len(b.ids))
  return join_rows(ids, start, cut)
