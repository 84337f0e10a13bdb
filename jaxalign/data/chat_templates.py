"""Chat templates by name: the tokenizer's own, built-in ones, files."""

import os
import pathlib
from typing import Any

from etils import epath

from jaxalign.core.errors import ConfigError

_KNOB = "set config.data.template"
PLAIN = ("dialogue", "none")  # the record's own text, no template
_FOLDER = pathlib.Path(__file__).with_name("templates")
BUILT_IN = {
  path.stem: path.read_text("utf-8").removesuffix("\n")
  for path in sorted(_FOLDER.glob("*.jinja"))
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
    tok: the tokenizer.
    conversational: whether the rows hold turns.

  Raises:
    ConfigError: an unknown name, an unreadable file, or tokens that the
      tokenizer lacks.
  """
  if template == "auto":
    return tok.template if conversational else None
  if template in PLAIN:
    return None
  if template not in BUILT_IN:
    return read_template(template).decode("utf-8", "replace")
  lacking = [t for t in _WANTS.get(template, ()) if t not in tok.added]
  if lacking:
    raise ConfigError(
      f"the tokenizer has no {', '.join(lacking)}, which the template "
      f"{template!r} writes; {_KNOB}"
    )
  return BUILT_IN[template]


def check_template(template: str) -> None:
  """Raises ConfigError where no template can come of the knob's value."""
  if template not in ("auto", *PLAIN, *BUILT_IN):
    read_template(template)


def read_template(template: str) -> bytes:
  """The bytes of a .jinja file."""
  if not isinstance(template, str) or not template.endswith(".jinja"):
    raise ConfigError(
      f"unknown template {template!r}, wanted auto, "
      f"{', '.join([*PLAIN, *BUILT_IN])} or the path of a .jinja file; {_KNOB}"
    )
  try:
    return epath.Path(os.path.expanduser(template)).read_bytes()
  except OSError as error:
    raise ConfigError(
      f"template {template} cannot be read ({error}); {_KNOB}"
    ) from error
