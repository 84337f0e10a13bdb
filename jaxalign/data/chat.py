"""Conversations to tokens by a chat template, as transformers has them.

A row is `apply_chat_template` of transformers 5.24, token for token, up to the
token that ends the answer: what it renders, encoded as one string. Where a
content holds text that looks like a special token the dialogue is rendered a
second time with that text in disguise (`marks.py`): what is still found was
written by the template, all else stays text. Unless the template itself parses
it: a template that takes "</think>" out of a content would write something
else, and then the content's tokens are read as transformers reads them; of
turn markers and of the tokenizer's BOS and EOS each is still tried alone.
"""

from collections.abc import Mapping, Sequence
import itertools
import os
import re
from typing import Any

from etils import epath

from jaxalign.core.errors import ConfigError
from jaxalign.data.marks import HALF, Marks
from jaxalign.data.render import Renderer
from jaxalign.data.schemas.schema import Refused
from jaxalign.data.special import any_of

_KNOB = "set config.data.template"
PLAIN = ("dialogue", "none")  # the record's own text, no template
_NO_TOOLS = "tool calls are not supported"
_ROLES = ("user", "assistant", "system")  # templates have others at will
_TOOL_ROLES = ("tool", "function", "ipython", "observation")
# What is asked and said to learn a template: they share no letter at an end.
_WORDS = ("quince", "medlar", "damson", "rowan")

BUILT_IN = {
  "chatml": (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + "
    "m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}"
  ),
  "llama3": (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + "
    "m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + "
    "'<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
  ),
  "gemma": (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else "
    "m['role']) + '\n' + m['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<start_of_turn>model\n' }}{% endif %}"
  ),
  "mistral": (
    "{% if messages[0]['role'] == 'system' %}{% set before = "
    "messages[0]['content'] + '\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set before = '' %}{% set rest = messages %}{% endif %}"
    "{{ bos_token }}{% for m in rest %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + (before if loop.first else "
    "'') + m['content'] + ' [/INST]' }}{% else %}"
    "{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
  ),
  "zephyr": (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + "
    "eos_token + '\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|assistant|>\n' }}{% endif %}"
  ),
}
# Tokens without which a built-in would be so much text, and forgeable.
_WANTS = {
  "chatml": ("<|im_start|>", "<|im_end|>"),
  "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
  "gemma": ("<start_of_turn>", "<end_of_turn>"),
}


def template_source(
  template: str, tok: Any, conversational: bool
) -> str | None:
  """The source of the template to use; None for the record's own text.

  Args:
    template: `config.data.template`: "auto" (the tokenizer's own, where it
      has one and the rows are conversations), a key of BUILT_IN, "dialogue"
      or "none", or the path of a .jinja file.
    tok: the tokenizer. conversational: whether the rows hold turns.

  Raises:
    ConfigError: an unknown name, an unreadable file, or tokens that the
      tokenizer lacks.
  """
  if template == "auto":
    return tok.template if conversational else None
  if template in PLAIN:
    return None
  if template in BUILT_IN:
    lacking = [t for t in _WANTS.get(template, ()) if t not in tok.added]
    if lacking:
      raise ConfigError(
        f"the tokenizer has no {', '.join(lacking)}, which the "
        f"template {template!r} writes; {_KNOB}"
      )
    return BUILT_IN[template]
  return read_template(template).decode("utf-8", "replace")


def check_template(template: str) -> None:
  """Raises ConfigError where no template can come of the knob's value."""
  if template != "auto" and template not in PLAIN + tuple(BUILT_IN):
    read_template(template)


def read_template(template: str) -> bytes:
  """The bytes of a .jinja file."""
  if not isinstance(template, str) or not template.endswith(".jinja"):
    raise ConfigError(
      f"unknown template {template!r}, wanted auto, "
      f"{', '.join([*PLAIN, *BUILT_IN])} or the path of a "
      f".jinja file; {_KNOB}"
    )
  try:
    return epath.Path(os.path.expanduser(template)).read_bytes()
  except OSError as error:
    raise ConfigError(
      f"template {template} cannot be read ({error}); {_KNOB}"
    ) from error


class Chat:
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
    now: str = "",
    renderer: Renderer | None = None,
    *,
    special_tokens: str = "text",
  ):
    """Args:
    tok: the tokenizer; what the template marks turns with is reserved in it.
    source: the template. now: see Renderer. renderer: one to share.
    special_tokens: "text", or "tokens": special tokens that are spelt out in
      a content are read as those tokens, as transformers and TRL do.
    """
    if special_tokens not in ("text", "tokens"):
      raise ConfigError(
        f"special tokens in a text are read as 'text' or as "
        f"'tokens', found {special_tokens!r}"
      )
    self.tok, self.source = tok, source
    self._reads_tokens = special_tokens == "tokens"
    # Of several named templates transformers takes this one for tools.
    self._tool_source = (
      tok.tool_template if source == tok.template else None
    ) or source
    self.warnings = []
    self.renderer = renderer or Renderer(now)
    try:
      self._learn()
    except Refused as error:
      self.renderer.close()
      raise ConfigError(
        f"the chat template does not even render one question "
        f"and its answer ({error}); {_KNOB}"
      ) from error
    except BaseException:
      self.renderer.close()
      raise

  def __enter__(self) -> "Chat":
    return self

  def __exit__(self, *error: Any) -> None:
    self.renderer.close()

  def _learn(self) -> None:
    """How the template begins a row, asks for an answer, and ends one."""
    tok = self.tok
    added = re.compile(any_of(t for t in tok.added if len(t) > 1 and t.strip()))
    tokens = lambda text: [m[0] for m in added.finditer(text)]
    ask = [dict(role="user", content="a")]
    says = [dict(role="assistant", content=word) for word in _WORDS[:2]]
    asked, plain = self._render(ask, True), self._render(ask, False)
    wholes = [self._render([*ask, one], False) for one in says]
    at = len(os.path.commonprefix(wholes))
    if wholes[0] == wholes[1]:
      raise Refused(
        "template drops the answer",
        "two answers give one text; "
        "it may want contents in parts, as of images",
      )
    head, tail = wholes[0][:at], wholes[0][at:].removeprefix(_WORDS[0])
    more = self._tried([*ask, says[0], dict(role="user", content=_WORDS[2])])
    system = self._tried([dict(role="system", content=_WORDS[3]), *ask])
    # Where the prompt proper ends, and what then asks for the answer.
    base = len(os.path.commonprefix([plain, asked]))
    self._asks, self._header = asked[base:], ""
    opens = [m[0] for m in added.finditer(asked) if m.end() > base]
    if asked == plain and head.startswith(asked):
      # A space there belongs to the word that follows it.
      self._header = head[len(asked) :].rstrip(" ")
      opens = tokens(self._header) or tokens(asked)[-1:]
    # An answer ends as one in the middle does; what follows only at the end of
    # a conversation (Phi-3's EOS) is no part of it.
    _, _, later = more.rpartition(_WORDS[0])
    ends = tokens(os.path.commonprefix([tail, later])) or tokens(tail)
    self._end, self._times = (ends[0] if ends else None), 0
    for text in ends[1:]:
      if text in (*opens[:1], self._end):
        break
      self._end = text
    # What marks a turn is the template's alone.
    user, known, after = later.rpartition(_WORDS[2])
    before, _, _ = system.rpartition(_WORDS[3])
    turns = [*tokens(user), *tokens(after)[:1]] if known else tokens(plain)
    turns += [*opens[:1], *tokens(before)[-1:], *([self._end] if ends else [])]
    tok.reserve(sorted(set(turns)))
    self._marks = Marks(list(tok.specials))
    self._specials = set(tok.specials.values()) - {tok.unk}
    self._guarded = {
      HALF,
      *turns,
      *tok.names.values(),
      *(text for text, i in tok.specials.items() if i in (*tok.stops, tok.pad)),
    }
    bos = next((t for t, i in tok.specials.items() if i == tok.own_bos), None)
    tok.bos = (
      tok.own_bos
      if bos
      and plain.startswith(bos)
      and (not system or system.startswith(bos))
      else -1
    )
    if system and _WORDS[3] not in system:
      self.warnings.append(
        "the chat template leaves out what a system turn "
        "says: put it into the first question"
      )
    if self._end:
      tok.ends_with(tok.specials[self._end])
      self._times = tokens(tail).count(self._end)
    else:
      self.warnings.append(
        "the chat template writes no token after an answer; rows end with "
        f"{next((t for t, i in tok.specials.items() if i == tok.eos), '')!r},"
        " the tokenizer's own"
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

  def _render(self, turns: list[dict], asks: bool, tools: Any = None) -> str:
    return self.renderer.render(
      self.source if tools is None else self._tool_source,
      turns,
      add_generation_prompt=asks,
      tools=tools,
      documents=None,
      **self.tok.names,
    )

  def _tried(self, turns: list[dict]) -> str:
    """What a template makes of turns that it need not have: "" at worst."""
    try:
      return self._render(turns, False)
    except Refused:
      return ""

  def _texts(
    self, turns: list[dict], said: list[dict], tools: Any
  ) -> list[str]:
    """The rendered prompt, and the whole dialogue with each answer."""
    return [
      self._render(turns, True, tools),
      *(self._render([*turns, one], False, tools) for one in said),
    ]

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
    said = [
      _message(
        dict(role="assistant", content=one)
        if isinstance(one, str)
        else dict(role="assistant") | dict(one)
      )
      for one in answers
    ]
    if not turns:
      raise Refused("no turns", "a chat template needs a question")
    try:
      plain = self._texts(turns, said, tools)
    except Refused as error:
      if error.reason == "template failed" and (
        tools
        or any(
          "tool_calls" in one or one.get("role") not in _ROLES
          for one in (*turns, *said)
        )
      ):
        raise Refused(
          "tool calls are not supported",
          f"the chat template fails on them: {error.detail}",
        ) from error
      raise
    try:
      "".join(plain).encode()
    except UnicodeEncodeError as error:
      raise Refused(
        "lone surrogate", f"{error.object[error.start]!a} is no character"
      ) from error
    self._check_tools(turns, said, tools)
    shown, back = self._shown(plain, turns, said, tools)
    if self._header:
      plain[0], shown[0] = plain[0] + self._header, shown[0] + self._header
    ends = [len(plain[0])]
    for one, whole, other in zip(said, plain[1:], shown[1:]):
      start = self._start_of(turns, tools, plain[0], whole)
      ends.append(self._end_of(one, other, start))
    texts = [(p[:end], s[:end]) for p, s, end in zip(plain, shown, ends)]
    ids = self._whole(texts, bool(back))
    if (
      ids is None
      or self._end
      and any(one[-1:] != [self.tok.eos] for one in ids[1:])
    ):
      ids = [self._parts(text, back) for _, text in texts]
    head, rest = ids[0], [one[:-1] if self._end else one for one in ids[1:]]
    start = min(map(_shared, itertools.repeat(head), rest), default=len(head))
    rest = [one[start:] for one in rest]
    if not self._reads_tokens and any(self.tok.eos in one for one in rest):
      raise Refused(
        "answer ends twice",
        "in what the chat template makes of "
        f"it there is {self._end or 'the EOS'} before its end",
      )
    if self.tok.bos >= 0 and head[:1] != [self.tok.bos]:
      raise Refused(
        "template begins otherwise", f"{plain[0][:30]!r}, without the BOS"
      )
    return head[self.tok.bos >= 0 : start], rest

  def _whole(
    self, texts: list[tuple[str, str]], check: bool
  ) -> list[list[int]] | None:
    """Ids of rendered texts, each as one string; None where text forges.

    What the texts share is encoded once, up to a special token: there the
    tokenizer begins anew in any case.
    """
    (prompt, shown), *wholes = texts
    head = self._ids(prompt, shown, check)
    if head is None:
      return None
    out, at, k, shared = [head], 0, 0, ""
    written = [(m[0], m.start()) for m in self._marks.written.finditer(shown)]
    if written:
      text, start = written[-1]
      last = self.tok.specials[text]
      if head.count(last) == sum(text == other for other, _ in written):
        at, shared = start, shown[: start + len(text)]
        k = len(head) - 1 - head[::-1].index(last)
    for text, other in wholes:
      same = bool(shared) and other.startswith(shared)
      first = at if same else 0
      ids = self._ids(text[first:], other[first:], check)
      if ids is None:
        return None
      out.append(head[:k] + ids if same else ids)
    return out

  def _start_of(
    self, turns: list[dict], tools: Any, prompt: str, whole: str
  ) -> int:
    """Where an answer begins: where the whole is no longer the prompt.

    Some templates ask in other words than those they answer in; that much may
    differ, and no more.
    """
    if whole.startswith(prompt):
      return len(prompt)
    same = len(os.path.commonprefix([prompt, whole]))
    asks = self._header or self._asks
    base = len(prompt) - len(asks)
    if not prompt.endswith(asks):
      base = len(
        os.path.commonprefix([self._render(turns, False, tools), prompt])
      )
    if same < base:
      raise Refused(
        "template rewrites the prompt",
        f"from character {same}: "
        f"{prompt[same : same + 30]!r}, {whole[same : same + 30]!r}",
      )
    return same

  def _end_of(self, said: dict, text: str, start: int) -> int:
    """Where the answer that begins at `start` has ended, its end included."""
    if not self._end:
      return len(text)
    ends = [
      m.end()
      for m in self._marks.written.finditer(text, start)
      if m[0] == self._end
    ]
    if len(ends) < self._times:
      raise Refused(
        _NO_TOOLS if "tool_calls" in said else "answer without an end",
        "the chat template ends other "
        f"answers with {self._end}, this one in {text[-30:]!r}",
      )
    return ends[-self._times]

  def _check_tools(
    self, turns: list[dict], said: list[dict], tools: Any
  ) -> None:
    """Refused where the template drops a tool, a call, or what a role says.

    The row is rendered with other names and results: each has to show.
    """
    uses = [
      any("tool_calls" in one or one.get("role") not in _ROLES for one in part)
      for part in (turns, said)
    ]
    if not tools and not any(uses):
      return
    wanted = {}
    tools = tools and [_renamed(tool, "the tool", wanted) for tool in tools]
    turns = [_reworded(turn, wanted) for turn in turns]
    for one in (said if uses[1] else said[:1]) or [None]:
      words = dict(wanted)
      more = [] if one is None else [_reworded(one, words)]
      try:
        text = self._render([*turns, *more], one is None, tools)
      except Refused:
        continue  # it does look at them
      for word, what in words.items():
        if word not in text:
          raise Refused(what[0], f"the chat template does not write {what[1]}")

  def _shown(
    self, plain: list[str], turns: list[dict], said: list[dict], tools: Any
  ) -> tuple[list[str], dict[int, str]]:
    """The texts with all in disguise that the template does not parse.

    Returns:
      `plain` with stand-ins, and a table that takes them out.
    """
    parts = [turns, said, tools]
    found = set() if self._reads_tokens else self._marks.found(parts)
    if not found:
      return list(plain), {}
    stand_ins = self._marks.stand_ins([self.source, self._tool_source, *parts])
    back = {ord(stand): c for c, stand in stand_ins.items()}

    def attempt(names: set[str]) -> list[str] | None:
      try:
        texts = self._texts(
          *(self._marks.disguised(part, names, stand_ins) for part in parts)
        )
      except Refused:
        return None
      for stand in stand_ins.values():  # as JSON in ASCII has it
        texts = [text.replace(f"\\u{ord(stand):04x}", stand) for text in texts]
      return texts if [t.translate(back) for t in texts] == plain else None

    texts = attempt(found)
    guarded = sorted(found & self._guarded)
    if texts is None and guarded != sorted(found):
      texts = attempt(set(guarded))
    if texts is None:
      names, texts = set(), list(plain)
      for one in guarded:
        if (more := attempt(names | {one})) is not None:
          names, texts = names | {one}, more
    return texts, back

  def _ids(self, text: str, shown: str, check: bool) -> list[int] | None:
    """Ids of a rendered text as one string; None if text forges a token."""
    ids = self.tok.encode_rendered(text)
    if check:
      wanted = [
        self.tok.specials[m[0]] for m in self._marks.written.finditer(shown)
      ]
      known = self._specials
      if [i for i in ids if i in known] != [i for i in wanted if i in known]:
        return None
    return ids

  def _parts(self, text: str, back: dict[int, str]) -> list[int]:
    """Ids of a rendered text, its special tokens apart from all the rest."""
    tok, ids, at, strip = self.tok, [], 0, False
    for m in [*self._marks.written.finditer(text), None]:
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


def _message(turn: Mapping[str, Any]) -> dict[str, Any]:
  """A message as transformers hands it to a template.

  What is None is left out, and a thought goes by all of its names.
  """
  out = {k: v for k, v in turn.items() if v is not None}
  thought = next(
    (
      out[k] for k in ("reasoning_content", "thinking", "reasoning") if k in out
    ),
    None,
  )
  if thought is not None:
    out = {"thinking": thought, **out, "reasoning_content": thought}
  return out


def _reworded(turn: dict, wanted: dict[str, tuple[str, str]]) -> dict:
  """A message with other tool calls and results; `wanted` gets their words."""
  if isinstance(turn.get("tool_calls"), list):
    turn = dict(
      turn,
      tool_calls=[
        _renamed(call, "the call of", wanted) for call in turn["tool_calls"]
      ],
    )
  role = turn.get("role")
  if role not in _ROLES and isinstance(turn.get("content"), str):
    word = f"jaxalign{len(wanted)}word"
    wanted[word] = (
      _NO_TOOLS if role in _TOOL_ROLES else "unknown role",
      f"what the role {role!r} says",
    )
    turn = dict(turn, content=word)
  return turn


def _renamed(tool: Any, what: str, wanted: dict[str, tuple[str, str]]) -> Any:
  """A tool, or a call of one, by another name."""
  inner = tool.get("function", tool) if isinstance(tool, dict) else None
  if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
    return tool
  word = f"jaxalign{len(wanted)}word"
  wanted[word] = _NO_TOOLS, f"{what} {inner['name']!r}"
  return (
    dict(tool, function=dict(inner, name=word))
    if inner is not tool
    else dict(inner, name=word)
  )


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
  """How many items two sequences begin with alike."""
  if a[: len(b)] == b[: len(a)]:
    return min(len(a), len(b))
  return next(
    (i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b))
  )
