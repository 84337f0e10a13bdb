"""Rows become tokens: by a chat template, or as the texts they are."""

import contextlib
from typing import Any

from jaxalign import progress
from jaxalign.data import chat as chats
from jaxalign.data import special
from jaxalign.data import tokens as tokens_lib
from jaxalign.data.reading import ANSWERS
from jaxalign.data.schemas.messages import uses_tools
from jaxalign.data.schemas.pairs import ASSISTANT, Refused, turns_of
from jaxalign.data.tokenizer import Tokenizer
from jaxalign.errors import DataError


class Words:
  """How rows become tokens: by a template, or as the texts they are.

  A class because what it found in the rows decides and is said. `chat` is the
  template or None, `special` whether special tokens in a text are read as
  such, `said` and `warnings` sentences for a person.
  """

  def __init__(
    self,
    c: Any,
    tok: Tokenizer,
    splits: dict[str, list[dict]],
    stack: contextlib.ExitStack,
  ):
    self.c, self.tok, self.warnings, self.chat = c, tok, [], None
    self.special = c.data.special_tokens == "tokens"
    source = chats.choose(c.data.template, tok, True)
    every = [row for rows in splits.values() for row in rows]
    texts = [row for row in every if not row.get("turns")]
    if (
      self.special
      and source is not None
      and texts
      and (2 * len(self._spelt(texts)) > len(texts))
    ):
      source = None  # the texts hold the template already
    # A tokenizer that is trained here makes nothing of "<s>" in a text.
    if c.data.special_tokens == "auto" and (
      c.model.tokenizer or c.model.checkpoint
    ):
      self._warn(self._spelt(every), len(every), bool(source and texts))
    if source is None:
      self._spaces(texts)
    self.said = "no template: rows are tokenized as the texts they are"
    if source is not None:
      more = dict(special_tokens="tokens") if self.special else {}
      self.chat = stack.enter_context(chats.Chat(tok, source, **more))
      self.warnings += self.chat.warnings
      name = (
        c.data.template if c.data.template != "auto" else "the tokenizer's own"
      )
      self.said = f"chat template: {name}"
      if texts:
        self.said += (
          f"; {len(texts):,} rows of plain text are wrapped as "
          "turns (data.template='none' leaves them alone)"
        )
      for rows in splits.values():
        for row in rows:
          if not row.get("turns"):
            row["turns"] = turns_of(row["prompt"]) or [
              dict(role="user", content=row["prompt"])
            ]
    for text in self.warnings:
      progress.say(f"  warning: {text}")

  def names(self, rows: list[dict]) -> tuple[str, ...]:
    """What the answers of these rows are called."""
    return tuple(n for n in ANSWERS if n in rows[0]) if rows else ("response",)

  def parts(self, rows: list[dict]) -> list:
    """Ids of every row, or why there are none."""
    names = self.names(rows)
    if self.chat:
      return tokens_lib.parts_of_dialogues(
        self.chat,
        [self._turns(r) for r in rows],
        [answers_of(r, names) for r in rows],
        [r.get("tools") for r in rows],
      )
    found = tokens_lib.parts_of_texts(
      self.tok,
      [r["prompt"] for r in rows],
      [[r[name] for r in rows] for name in names],
      self.special,
    )
    return [
      Refused(
        "tool calls are not supported",
        "without a chat template; "
        "set config.model.checkpoint or config.data.template",
      )
      if uses_tools(row)
      else part
      for row, part in zip(rows, found)
    ]

  def _turns(self, row: dict) -> list[dict]:
    """The prompt's turns, a system turn joined to the user's if so wished."""
    turns = row["turns"]
    if self.c.data.system != "join" or turns[0]["role"] != "system":
      return turns
    system, *rest = turns
    for i, turn in enumerate(rest):
      if turn["role"] == "user":
        rest[i] = turn | dict(
          content=f"{system['content']}\n\n{turn['content']}"
        )
        return rest
    return turns

  def _spelt(self, rows: list[dict]) -> list[tuple[dict, list[str]]]:
    """The rows in whose texts special tokens are written out, and which."""
    return [
      (row, names)
      for row in rows
      if (
        names := special.found(
          self.tok,
          "\n".join([row["prompt"], *(row[n] for n in ANSWERS if n in row)]),
        )
      )
    ]

  def _warn(self, spelt: list, rows: int, wraps: bool) -> None:
    """Names special tokens that are spelt out.

    Raises:
      DataError: in most of the rows, so that their text is not what is meant.
    """
    if not spelt:
      return
    names = sorted({name for _, found in spelt for name in found})
    twice = (
      ", and the template would be written around them a second time"
      if wraps
      else ""
    )
    what = (
      f"{len(spelt):,} of {rows:,} rows have special tokens of the "
      f"tokenizer in their text ({', '.join(names[:6])}), id "
      f"{spelt[0][0]['id']} for one; as text they are spelt in pieces"
      f"{twice}. Give messages without them (a list of role and "
      "content), or read them as tokens as TRL does, "
      "config.data.special_tokens='tokens'"
    )
    if len(spelt) * 2 > rows:
      raise DataError(f"{what}; 'text' takes them as they are")
    self.warnings.append(what)

  def _spaces(self, texts: list[dict]) -> None:
    """A space at a prompt's end is a token of its own, which no model saw."""
    ends = [row for row in texts if row["prompt"][-1:] in (" ", "\t")]
    if ends:
      self.warnings.append(
        f"{len(ends):,} prompts end in a space (id {ends[0]['id']} for one), "
        "which most tokenizers put before the next word: move it to the "
        "beginning of the answers"
      )


def answers_of(row: dict, names: tuple[str, ...]) -> list[Any]:
  """The answers of a row for a template: texts, or messages with calls.

  The space in front of a dialogue's answer belongs to its text marker.
  """
  if row.get("answers"):
    return list(row["answers"])
  marked = row["prompt"].endswith(ASSISTANT)
  return [
    row[name].removeprefix(" ") if marked else row[name] for name in names
  ]
