"""Conversations to tokens by a chat template, safe from what they contain.

A content may hold "<|im_end|>" or the half of it. Before rendering, a
private-use character that occurs nowhere else is put inside everything in a
content that is, begins or ends a special token; a special token found in the
rendered text was then written by the template, and the character is taken out
again. (Placeholders instead of contents would not do: templates trim, split
and compare contents.) A dialogue without such text, nearly every one, is
encoded as one string, exactly as transformers does it.
"""

import os
import re
from typing import Any, Sequence

from etils import epath

from jaxalign.data.render import Renderer
from jaxalign.data.schemas.pairs import Refused
from jaxalign.errors import ConfigError

_KNOB = "set config.data.template"
PLAIN = ("dialogue", "none")  # the record's own text, no template

BUILT_IN = {
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + "
        "m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
        "{% endif %}"),
    "llama3": (
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + "
        "m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + "
        "'<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"),
    "gemma": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
        "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
        "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else "
        "m['role']) + '\n' + m['content'] | trim + '<end_of_turn>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}"
        "{{ '<start_of_turn>model\n' }}{% endif %}"),
    "mistral": (
        "{% if messages[0]['role'] == 'system' %}{% set before = "
        "messages[0]['content'] + '\n\n' %}{% set rest = messages[1:] %}"
        "{% else %}{% set before = '' %}{% set rest = messages %}{% endif %}"
        "{{ bos_token }}{% for m in rest %}"
        "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
        "{% if m['role'] == 'user' %}{{ '[INST] ' + (before if loop.first else "
        "'') + m['content'] + ' [/INST]' }}{% else %}"
        "{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"),
    "zephyr": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + "
        "eos_token + '\n' }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|assistant|>\n' }}{% endif %}"),
}
# Tokens without which a built-in would be so much text, and forgeable.
_WANTS = {"chatml": ("<|im_start|>", "<|im_end|>"),
          "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
          "gemma": ("<start_of_turn>", "<end_of_turn>")}


def choose(template: str, tok: Any, conversational: bool) -> str | None:
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
      raise ConfigError(f"the tokenizer has no {', '.join(lacking)}, which the "
                        f"template {template!r} writes; {_KNOB}")
    return BUILT_IN[template]
  return read_file(template).decode("utf-8", "replace")


def check(template: str) -> None:
  """Raises ConfigError where no template can come of the knob's value."""
  if template != "auto" and template not in PLAIN + tuple(BUILT_IN):
    read_file(template)


def read_file(template: str) -> bytes:
  """The bytes of a .jinja file."""
  if not isinstance(template, str) or not template.endswith(".jinja"):
    raise ConfigError(f"unknown template {template!r}, wanted auto, "
                      f"{', '.join([*PLAIN, *BUILT_IN])} or the path of a "
                      f".jinja file; {_KNOB}")
  try:
    return epath.Path(os.path.expanduser(template)).read_bytes()
  except OSError as error:
    raise ConfigError(f"template {template} cannot be read ({error}); {_KNOB}"
                      ) from error


class Chat:
  """A tokenizer with a template: `encode`; a context manager, it has a process.

  Making one settles how rows begin and end: `tok.eos` becomes the token that
  the template ends an answer with, `tok.bos` the one it begins with.
  """

  def __init__(self, tok: Any, source: str, now: str = "",
               renderer: Renderer | None = None):
    self.tok, self.source = tok, source
    self.renderer = renderer or Renderer(now)
    try:
      probe = [dict(role="user", content="a"),
               dict(role="assistant", content="b"),
               dict(role="user", content="c")]
      self._learn([])
      history = self._render(probe[:2], False)
      self._learn([text for text in tok.added if text.strip() and
                   text in history])
      self._settle(probe[:1], history)
    except Refused as error:
      self.renderer.close()
      raise ConfigError(f"the chat template does not even render one question "
                        f"and its answer ({error}); {_KNOB}") from error
    except BaseException:
      self.renderer.close()
      raise

  def __enter__(self) -> "Chat":
    return self

  def __exit__(self, *error: Any) -> None:
    self.renderer.close()

  def _learn(self, texts: Sequence[str]) -> None:
    """Tokens the template marks turns with are reserved to it."""
    self.tok.reserve(texts)
    special = [text for text in self.tok.specials if len(text) > 1]
    special.sort(key=len, reverse=True)
    self._special = re.compile("|".join(map(re.escape, special)) or r"(?!)")
    self._whole = re.compile("|".join(sorted(
        {f"{re.escape(t[0])}(?={re.escape(t[1:])})" for t in special},
        key=len, reverse=True)) or r"(?!)")
    self._starts = tuple({t[:k] for t in special for k in range(1, len(t))})
    self._ends = tuple({t[k:] for t in special for k in range(1, len(t))})
    self._inside = "\0".join(special)

  def _settle(self, asked: list[dict], history: str) -> None:
    tok = self.tok
    found = list(self._special.finditer(history))
    if found and tok.specials[found[0][0]] == tok.own_bos and (
        found[0].start() == 0):
      tok.bos = tok.own_bos
    asks = os.path.commonprefix([self._render(asked, True), history])
    after = [m for m in found if m.start() >= len(asks)]
    if after:
      tok.ends_with(tok.specials[after[-1][0]])
    self._end = next(text for text, i in tok.specials.items() if i == tok.eos)

  def _render(self, turns: list[dict], asks: bool) -> str:
    return self.renderer.render(self.source, turns, add_generation_prompt=asks,
                                tools=None, documents=None, **self.tok.names)

  def encode(self, turns: Sequence[dict[str, str]], answers: Sequence[str]
             ) -> tuple[list[int], list[list[int]]]:
    """Ids of a prompt, without BOS, and of each answer, without its end.

    Args:
      turns: {"role", "content"} of the prompt.
      answers: the contents of the assistant's turn that follows.

    Raises:
      Refused: the template will not have it, or writes the prompt otherwise
        once an answer follows.
    """
    mark = _unused([self.source, *answers, *(t["content"] for t in turns)])
    turns = [dict(role=t["role"], content=self._marked(t["content"], mark))
             for t in turns]
    prompt = self._render(turns, True)
    before, rest = None, []
    for answer in answers:
      said = dict(role="assistant", content=self._marked(answer, mark))
      whole = self._render([*turns, said], False)
      cut = len(prompt)
      if not whole.startswith(prompt):
        cut = self._common(turns, prompt, whole)
      if before not in (None, cut):
        raise Refused("template rewrites the prompt", "for one answer only")
      before = cut
      rest.append(whole[cut:])
    prompt = prompt[:before]
    head = self._ids(prompt, mark)
    if head[:1] == [self.tok.bos]:
      head = head[1:]
    return head, [self._answer(text, mark) for text in rest]

  def _common(self, turns: list[dict], prompt: str, whole: str) -> int:
    """Where the answer begins though the prompt is not as it was asked.

    Some templates open a thought in the prompt and leave it out of history:
    the boundary is then the last special token that both share.
    """
    base = len(os.path.commonprefix([self._render(turns, False), prompt]))
    same = len(os.path.commonprefix([prompt, whole]))
    ends = [m.end() for m in self._special.finditer(prompt)
            if base < m.end() <= same]
    if not ends:
      raise Refused("template rewrites the prompt", f"from character {same}: "
                    f"{prompt[same:same + 30]!r}, {whole[same:same + 30]!r}")
    return ends[-1]

  def _marked(self, text: str, mark: str) -> str:
    """The text with `mark` inside whatever could pass for a special token."""
    core = text.strip()
    if not core:
      return text
    at = text.index(core)
    left, right = text[:at], text[at + len(core):]
    alone = core in self._inside
    first = mark if alone or core.startswith(self._ends) else ""
    last = mark if alone or core.endswith(self._starts) else ""
    core = self._whole.sub(lambda m: m[0] + mark, core)
    return left + first + core + last + right

  def _answer(self, text: str, mark: str) -> list[int]:
    """Ids of an answer up to the token that ends it."""
    ends = [m.start() for m in self._special.finditer(text)
            if m[0] == self._end]
    return self._parts(text[:ends[0]] if ends else text, mark, False)

  def _ids(self, text: str, mark: str) -> list[int]:
    if mark not in text:
      ids = self.tok.encode_rendered(text)
      wanted = [self.tok.specials[m[0]] for m in self._special.finditer(text)]
      known = set(self.tok.specials.values()) - {self.tok.unk}
      if [i for i in ids if i in known] == [i for i in wanted if i in known]:
        return ids
    return self._parts(text, mark, True)

  def _parts(self, text: str, mark: str, first: bool) -> list[int]:
    """Ids of a rendered text, its special tokens apart from all the rest."""
    tok, ids, at, strip = self.tok, [], 0, False
    for m in [*self._special.finditer(text), None]:
      part = text[at:m.start() if m else len(text)].replace(mark, "")
      before, after = tok.strips.get(m[0], (False, False)) if m else (0, 0)
      part = part.lstrip() if strip else part
      part = part.rstrip() if before else part
      if part:
        starts = first and not ids or at and tok.prefixes_each
        ids += (tok.encode_many if starts else tok.encode_responses)([part])[0]
      if m:
        ids.append(tok.specials[m[0]])
        at, strip = m.end(), after
    return ids


def _unused(texts: Sequence[str]) -> str:
  """A private-use character that is in none of the texts."""
  used = set().union(*texts)
  for code in range(0xE000, 0xF900):
    if chr(code) not in used:
      return chr(code)
  raise Refused("too many private-use characters", "all 6,400 of them")
