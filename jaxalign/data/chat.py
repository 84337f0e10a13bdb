"""Conversations to tokens by a chat template, as transformers has them.

A row is `apply_chat_template` of transformers 5.24, token for token, up to the
token that ends the answer: what it renders, encoded as one string. Where a
content holds text that looks like a special token the dialogue is rendered a
second time with that text in disguise (`marks.py`): what is still there was
written by the template, all else stays text. Unless the template itself parses
it: a template that takes "</think>" out of a content would write something
else, and then the content's tokens are read as transformers reads them; of
turn markers and of the tokenizer's BOS and EOS each is still tried alone.
"""

from collections.abc import Mapping, Sequence
import contextlib
import os
import re
from typing import Any

from jaxalign.core.errors import ConfigError
from jaxalign.data.json_rows import lone_surrogate
from jaxalign.data.marks import HALF, Marks
from jaxalign.data.render import Renderer
from jaxalign.data.schemas.schema import Refused
from jaxalign.data.special import any_of

_KNOB = "set config.data.template"
_NO_TOOLS = "tool calls are not supported"
_ROLES = ("user", "assistant", "system")  # templates have others at will
_TOOL_ROLES = ("tool", "function", "ipython", "observation")
# Contents of turns to learn a template by: no two begin or end alike.
_WORDS = ("quince", "medlar", "damson", "rowan")
_THOUGHTS = ("reasoning_content", "thinking", "reasoning")


class Chat(contextlib.AbstractContextManager):
  """A tokenizer with a template: `encode`; a context manager, it has a process.

  Making one settles how rows begin and end: `tok.eos` becomes the token that
  the template ends an answer with, `tok.bos` the one it begins with, or -1.

  Attributes:
    warnings: sentences about the template, for a person to read once.
  """

  def __init__(
    self,
    tok: Any,
    source: str,
    renderer: Renderer | None = None,
    *,
    reads_tokens: bool = False,
  ):
    """Learns how the template begins a row, asks for an answer and ends one.

    Args:
      tok: the tokenizer; what the template marks turns with is reserved in it.
      source: the template.
      renderer: one to share.
      reads_tokens: special tokens that are spelt out in a content are those
        tokens, as for transformers and TRL; else they stay text.

    Raises:
      ConfigError: it does not render a question and its answer.
    """
    self.tok, self.source, self.warnings = tok, source, []
    self._reads_tokens = reads_tokens
    # Of several named templates transformers takes this one for tools.
    own = tok.tool_template if source == tok.template else None
    self._tool_source = own or source
    self.renderer = renderer or Renderer()
    try:
      self._learn()
    except BaseException as error:
      self.renderer.close()
      if not isinstance(error, Refused):
        raise
      raise ConfigError(
        "the chat template does not even render one question and its answer "
        f"({error}); {_KNOB}"
      ) from error

  def __exit__(self, *error: Any) -> None:
    self.renderer.close()

  def _learn(self) -> None:
    tok, turn = self.tok, lambda role, text: dict(role=role, content=text)
    added = re.compile(any_of(t for t in tok.added if len(t) > 1 and t.strip()))
    quince, medlar, damson, rowan = _WORDS
    ask, answer = [turn("user", "a")], turn("assistant", quince)
    asking, plain = self._render(ask, True), self._render(ask, False)
    whole = self._render([*ask, answer], False)
    other = self._render([*ask, turn("assistant", medlar)], False)
    if whole == other:
      raise Refused(
        "template drops the answer",
        "two answers give one text; it may want contents in parts, as of "
        "images",
      )
    start = _shared(whole, other)
    tail = whole[start:].removeprefix(quince)
    later = self._tried([*ask, answer, turn("user", damson)])
    later = later.rpartition(quince)[2]
    system = self._tried([turn("system", rowan), *ask])
    # Where the prompt proper ends, and the tokens that ask for the answer.
    base = _shared(plain, asking)
    self._opener, self._header = asking[base:], ""
    opens = [m[0] for m in added.finditer(asking) if m.end() > base]
    if asking == plain and whole[:start].startswith(asking):
      # A space there belongs to the word that follows it.
      self._header = whole[len(asking) : start].rstrip(" ")
      opens = added.findall(self._header) or added.findall(asking)[-1:]
    # An answer ends as one in the middle does; what follows only at the end of
    # a conversation (Phi-3's EOS) is no part of it.
    ends = added.findall(tail[: _shared(tail, later)]) or added.findall(tail)
    self._end = ends[0] if ends else None
    for text in ends[1:]:
      if text in (*opens[:1], self._end):
        break
      self._end = text
    self._times = added.findall(tail).count(self._end)
    # What marks a turn is the template's alone.
    user, known, after = later.rpartition(damson)
    turns = [*added.findall(user), *added.findall(after)[:1]]
    turns = turns if known else added.findall(plain)
    before = added.findall(system.rpartition(rowan)[0])
    turns += [*opens[:1], *before[-1:], *filter(None, [self._end])]
    tok.reserve(sorted(set(turns)))
    self._settle(turns, plain, system)

  def _settle(self, turns: list[str], plain: str, system: str) -> None:
    """What text must not write, and how rows begin and end from now on."""
    tok = self.tok
    self._marks = Marks(list(tok.specials))
    self._specials = set(tok.specials.values()) - {tok.unk}
    stops = (*tok.stops, tok.pad)
    stopping = [text for text, i in tok.specials.items() if i in stops]
    self._guarded = {HALF, *turns, *tok.names.values(), *stopping}
    text_of = {i: text for text, i in reversed(tok.specials.items())}
    bos = text_of.get(tok.own_bos)
    begins = [text.startswith(bos or "") for text in (plain, system) if text]
    tok.bos = tok.own_bos if bos and all(begins) else -1
    if system and _WORDS[-1] not in system:
      self.warnings.append(
        "the chat template leaves out what a system turn says: put it into the "
        "first question"
      )
    if self._end:
      tok.ends_with(tok.specials[self._end])
    else:
      self.warnings.append(
        "the chat template writes no token after an answer; rows end with "
        f"{text_of.get(tok.eos, '')!r}, the tokenizer's own"
      )
    if self._header:
      self.warnings.append(
        "the chat template ignores add_generation_prompt: it writes "
        f"{self._header!r} only in front of an answer; here that counts to "
        "the prompt, in training and in generation; other programs would let "
        "the model write it: end the template with "
        f"{{% if add_generation_prompt %}}{{{{ {self._header!r} }}}}"
        "{% endif %}"
      )

  def _render(self, turns: list[dict], opens: bool, tools: Any = None) -> str:
    source = self.source if tools is None else self._tool_source
    values = dict(self.tok.names, tools=tools, documents=None)
    return self.renderer.render(
      source, turns, add_generation_prompt=opens, **values
    )

  def _tried(self, turns: list[dict]) -> str:
    """What a template makes of turns that it need not have: "" at worst."""
    try:
      return self._render(turns, False)
    except Refused:
      return ""

  def _texts(
    self, turns: list[dict], answers: list[dict], tools: Any
  ) -> list[str]:
    """The rendered prompt, and the whole dialogue with each answer."""
    whole = [self._render([*turns, one], False, tools) for one in answers]
    return [self._render(turns, True, tools), *whole]

  def encode(
    self,
    turns: Sequence[Mapping[str, Any]],
    answers: Sequence[str | Mapping[str, Any]],
    tools: list[dict] | None = None,
  ) -> tuple[list[int], list[list[int]]]:
    """Ids of a prompt, without BOS, and of each answer, without its end.

    BOS, prompt, answer and end are what transformers makes of the dialogue.
    The prompt is what it makes of the question, as far as all answers share
    it: where a token spans the seam, it is the answer's.

    Args:
      turns: messages of the prompt: "role", "content" and what else the
        template reads (tool_calls, name, reasoning_content ...).
      answers: contents of the assistant's message that follows, or messages.
      tools: JSON schemas, for the template.

    Raises:
      Refused: the template will not have it, does not write the tools, or
        writes the prompt otherwise once an answer follows.
    """
    turns = [_message(turn) for turn in turns]
    answers = [dict(content=x) if isinstance(x, str) else x for x in answers]
    answers = [_message(dict(role="assistant") | x) for x in answers]
    if not turns:
      raise Refused("no turns", "a chat template needs a question")
    plain = self._plain(turns, answers, tools)
    self._check_tools(turns, answers, tools)
    shown, back = self._disguised(plain, turns, answers, tools)
    plain[0], shown[0] = plain[0] + self._header, shown[0] + self._header
    ends = [len(plain[0])]
    for answer, whole, other in zip(answers, plain[1:], shown[1:]):
      start = self._start_of(turns, tools, plain[0], whole)
      ends.append(self._end_of(answer, other, start))
    texts = [(p[:end], s[:end]) for p, s, end in zip(plain, shown, ends)]
    ids, eos, bos = self._whole(texts, bool(back)), self.tok.eos, self.tok.bos
    if ids is None or self._end and any(x[-1:] != [eos] for x in ids[1:]):
      ids = [self._parts(text, back) for _, text in texts]
    head, *rest = ids
    rest = [one[:-1] if self._end else one for one in rest]
    start = min((_shared(head, one) for one in rest), default=len(head))
    rest = [one[start:] for one in rest]
    if not self._reads_tokens and any(eos in one for one in rest):
      raise Refused(
        "answer ends twice",
        "in what the chat template makes of it there is "
        f"{self._end or 'the EOS'} before its end",
      )
    if bos >= 0 and head[:1] != [bos]:
      raise Refused(
        "template begins otherwise", f"{plain[0][:30]!r}, without the BOS"
      )
    return head[bos >= 0 : start], rest

  def _plain(
    self, turns: list[dict], answers: list[dict], tools: Any
  ) -> list[str]:
    """`_texts`, and in which words they are refused."""
    try:
      texts = self._texts(turns, answers, tools)
    except Refused as error:
      uses = tools or any(map(_uses_tools, [*turns, *answers]))
      if error.reason != "template failed" or not uses:
        raise
      raise Refused(
        _NO_TOOLS, f"the chat template fails on them: {error.detail}"
      ) from error
    if wrong := lone_surrogate("".join(texts)):
      raise Refused("lone surrogate", f"{wrong!a} is no character")
    return texts

  def _whole(
    self, texts: list[tuple[str, str]], check: bool
  ) -> list[list[int]] | None:
    """Ids of rendered texts, each as one string; None where text forges."""
    # What they begin with alike is encoded once, up to a special token: there
    # the tokenizer begins anew in any case.
    known = lambda ids: [i for i in ids if i in self._specials]
    out, shared, at, k = [], None, 0, 0
    for text, shown in texts:
      same = shared is not None and shown.startswith(shared)
      first = at if same else 0
      ids = self.tok.encode_rendered(text[first:])
      written = self._written(shown, first)
      wanted = [self.tok.specials[m[0]] for m in written]
      if check and known(ids) != known(wanted):
        return None
      last = wanted[-1] if wanted and not out else None
      if last is not None and ids.count(last) == wanted.count(last):
        at, shared = written[-1].start(), shown[: written[-1].end()]
        k = len(ids) - 1 - ids[::-1].index(last)
      out.append(out[0][:k] + ids if same else ids)
    return out

  def _written(self, text: str, start: int = 0) -> list[re.Match]:
    """The special tokens that stand in a text."""
    return list(self._marks.written.finditer(text, start))

  def _start_of(
    self, turns: list[dict], tools: Any, prompt: str, whole: str
  ) -> int:
    """Where an answer begins: where the whole is no longer the prompt."""
    same, opener = _shared(prompt, whole), self._header or self._opener
    if same == len(prompt):
      return same
    # What asks for the answer may differ from what an answer begins with.
    base = len(prompt) - len(opener)
    if not prompt.endswith(opener):
      base = _shared(self._render(turns, False, tools), prompt)
    if same < base:
      a, b = prompt[same : same + 30], whole[same : same + 30]
      raise Refused(
        "template rewrites the prompt", f"from character {same}: {a!r}, {b!r}"
      )
    return same

  def _end_of(self, answer: dict, text: str, start: int) -> int:
    """Where the answer that begins at `start` has ended, its end included."""
    if not self._end:
      return len(text)
    written = self._written(text, start)
    ends = [m.end() for m in written if m[0] == self._end]
    if len(ends) < self._times:
      raise Refused(
        _NO_TOOLS if "tool_calls" in answer else "answer without an end",
        f"the chat template ends other answers with {self._end}, this one in "
        f"{text[-30:]!r}",
      )
    return ends[-self._times]

  def _check_tools(
    self, turns: list[dict], answers: list[dict], tools: Any
  ) -> None:
    """Refused where the template drops a tool, a call, or what a role says."""
    in_answers = any(map(_uses_tools, answers))
    if not tools and not in_answers and not any(map(_uses_tools, turns)):
      return
    wanted = {}  # other names and results: each has to show
    tools = tools and [_renamed(tool, "the tool", wanted) for tool in tools]
    turns = [_reworded(turn, wanted) for turn in turns]
    for one in (answers if in_answers else answers[:1]) or [None]:
      words = dict(wanted)
      more = [] if one is None else [_reworded(one, words)]
      try:
        text = self._render([*turns, *more], one is None, tools)
      except Refused:
        continue  # it does look at them
      for word, (reason, what) in words.items():
        if word not in text:
          raise Refused(reason, f"the chat template does not write {what}")

  def _disguised(
    self, plain: list[str], turns: list[dict], answers: list[dict], tools: Any
  ) -> tuple[list[str], dict[int, str]]:
    """`plain` with stand-ins for all that the template does not parse, and a
    table that takes them out."""
    parts = [turns, answers, tools]
    looks = set() if self._reads_tokens else self._marks.found(parts)
    if not looks:
      return list(plain), {}
    stand_ins = self._marks.stand_ins([self.source, self._tool_source, *parts])
    back = {ord(stand): c for c, stand in stand_ins.items()}

    def attempt(names):
      hide = lambda part: self._marks.disguised(part, names, stand_ins)
      try:
        texts = self._texts(*map(hide, parts))
      except Refused:
        return None
      for stand in stand_ins.values():  # as JSON in ASCII has it
        texts = [text.replace(f"\\u{ord(stand):04x}", stand) for text in texts]
      return texts if [t.translate(back) for t in texts] == plain else None

    guarded = looks & self._guarded
    texts = attempt(looks)
    if texts is None and guarded != looks:
      texts = attempt(guarded)
    if texts is None:
      names, texts = set(), list(plain)
      for one in sorted(guarded):
        if (more := attempt(names | {one})) is not None:
          names, texts = names | {one}, more
    return texts, back

  def _parts(self, text: str, back: dict[int, str]) -> list[int]:
    """Ids of a rendered text, its special tokens apart from all the rest."""
    tok, ids, at, strip = self.tok, [], 0, False
    for m in [*self._written(text), None]:
      part = text[at : m.start() if m else len(text)].translate(back)
      before, after = tok.strips.get(m[0], (False, False)) if m else (0, 0)
      part = part.lstrip() if strip else part
      part = part.rstrip() if before else part
      if part:
        starts = not ids or at and tok.prefixes_each
        ids += (tok.encode_many if starts else tok.encode_responses)([part])[0]
      if m:
        ids.append(tok.specials[m[0]])
        at, strip = m.end(), after
    return ids


def _uses_tools(message: dict) -> bool:
  return "tool_calls" in message or message.get("role") not in _ROLES


def _message(turn: Mapping[str, Any]) -> dict[str, Any]:
  """A message as transformers hands it to a template.

  What is None is left out, and a thought goes by all of its names.
  """
  out = {k: v for k, v in turn.items() if v is not None}
  thought = next((out[k] for k in _THOUGHTS if k in out), None)
  if thought is not None:
    out = {"thinking": thought, **out, "reasoning_content": thought}
  return out


def _reworded(turn: dict, wanted: dict[str, tuple[str, str]]) -> dict:
  """A message with other tool calls and results; `wanted` gets their words."""
  calls, role = turn.get("tool_calls"), turn.get("role")
  if isinstance(calls, list):
    calls = [_renamed(call, "the call of", wanted) for call in calls]
    turn = dict(turn, tool_calls=calls)
  if role not in _ROLES and isinstance(turn.get("content"), str):
    word = f"jaxalign{len(wanted)}word"
    reason = _NO_TOOLS if role in _TOOL_ROLES else "unknown role"
    wanted[word] = reason, f"what the role {role!r} says"
    turn = dict(turn, content=word)
  return turn


def _renamed(tool: Any, what: str, wanted: dict[str, tuple[str, str]]) -> Any:
  """A tool, or a call of one, by another name."""
  inner = tool.get("function", tool) if isinstance(tool, dict) else None
  if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
    return tool
  word = f"jaxalign{len(wanted)}word"
  wanted[word] = _NO_TOOLS, f"{what} {inner['name']!r}"
  renamed = dict(inner, name=word)
  return renamed if inner is tool else dict(tool, function=renamed)


def _shared(a: Sequence, b: Sequence) -> int:
  """How many items two sequences begin with alike."""
  return len(os.path.commonprefix([a, b]))
