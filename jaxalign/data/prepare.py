"""What a config sets of its data: sources, rules, tokenizer, context."""

import ast
import contextlib
import dataclasses
import hashlib
from typing import Any

from jaxalign.core import hub
from jaxalign.core.errors import ConfigError
from jaxalign.data import records, sources, tokens, world
from jaxalign.data.chat_templates import check_template, read_template
from jaxalign.data.source_reader import LoadOptions
from jaxalign.data.tokenizer import load_tokenizer, Tokenizer

_OWN_CONTEXT, _WORLD_CONTEXT = 256, 64  # of a model trained here
CHARACTERS_PER_TOKEN = 3.0  # of a small tokenizer on English
_KNOWN = dict(
  too_long=("", *tokens.TOO_LONG),
  special_tokens=("auto", "text", "tokens"),  # what they are in a text
  system=("turn", "join"),  # what becomes of a system turn
)


def sources_of(c: Any) -> list[str]:
  """The sources of a config: one, or a list (also as the text of one)."""
  value = c.data.source
  if isinstance(value, str) and value.startswith("["):
    with contextlib.suppress(ValueError, SyntaxError):
      value = ast.literal_eval(value)
  if isinstance(value, str):
    return [value]
  names = [*value] if isinstance(value, (list, tuple)) else []
  if not names or not all(isinstance(n, str) and n for n in names):
    raise ConfigError(
      f"data.source={value!r:.80}, wanted a path, a glob, hf:<name>, "
      "tfds:<name>, or a list of these; set config.data.source"
    )
  if len(names) > 1 and "world" in names:
    raise ConfigError(
      "data.source names the built-in world among others; set "
      "config.data.source"
    )
  return names


def is_world(c: Any) -> bool:
  """Whether a config's rows are those of the built-in world."""
  return c.data.source == "world"


def check_source(c: Any) -> None:
  """Raises where the source is of no known kind, or no file is there."""
  check_template(c.data.template)
  for knob, known in _KNOWN.items():
    if c.data[knob] not in known:
      raise ConfigError(
        f"data.{knob}={c.data[knob]!r}, wanted one of {', '.join(known)}; set "
        f"config.data.{knob}"
      )
  names, held_out = sources_of(c), c.data.held_out
  _options(c).check(names)
  if is_world(c):
    world_of(c)
    if held_out:
      raise ConfigError(
        f"data.held_out={held_out!r} with the built-in world, which holds out "
        "rows of its own; set config.data.source"
      )
    return
  for name in names + [held_out] * bool(held_out):
    sources.source_files(name)


def choice_of(c: Any) -> Any:
  """`data.choice` as plain Python."""
  rule = c.data.choice
  return rule.to_dict() if hasattr(rule, "to_dict") else rule or ""


def fingerprint(c: Any) -> str:
  """A digest of what the data stage reads, so that a change is noticed."""
  digest = hashlib.sha256()
  if not is_world(c):
    for name in sources_of(c):
      digest.update(sources.source_digest(name).encode())
    if c.data.held_out:
      digest.update(b"held out")
      digest.update(sources.source_digest(c.data.held_out).encode())
  if (tok := given_tokenizer(c)) is not None:
    for name, data in sorted(tok.files.items()):
      digest.update(f"{name} {len(data)}\n".encode() + data)
  if c.data.template.endswith(".jinja"):
    digest.update(read_template(c.data.template))
  return digest.hexdigest()


def world_of(c: Any) -> world.World | None:
  """The built-in world of a config, None for other sources."""
  if not is_world(c):
    return None
  return world.build_world(c.data.world.to_dict(), c.data.seed)


def split_fractions(c: Any) -> dict[str, float]:
  """The fractions of the splits that a job has use for.

  Where a checkpoint is given nothing trains an SFT model: its rows go to the
  pool. A held-out file of its own leaves all of the source to the pool.
  """
  sizes = c.data.split.to_dict()
  unused = dict(sft=c.model.checkpoint, held_out=c.data.held_out)
  for name in [name for name, given in unused.items() if given]:
    sizes["pool"] = sizes.get("pool", 0.0) + sizes.get(name, 0.0)
    sizes[name] = 0.0
  return sizes


def _options(c: Any, limit: int = 0) -> LoadOptions:
  d = c.data
  return LoadOptions(
    schema=d.schema,
    limit=min(filter(None, (limit, d.limit)), default=0),
    max_bad_fraction=d.max_bad_fraction,
    fields=d.fields.to_dict(),
    answer_pairs=d.answer_pairs,
    skip=tuple(d.skip),
    choice=choice_of(c),
    caps=tuple(d.caps),
    weights=tuple(d.weights),
    seed=d.seed,
  )


def load_sources(
  c: Any, limit: int = 0, held_out: bool = False
) -> records.Loaded:
  """The rows of a config's sources, by the rules of config.data.

  Args:
    c: the config.
    limit: of each source read so many rows, unless the config sets fewer.
    held_out: those of its held-out file instead, without caps and weights.
  """
  options = _options(c, limit)
  if held_out:
    options = dataclasses.replace(options, caps=(), weights=())
  names = [c.data.held_out] if held_out else sources_of(c)
  return records.load_records(names, options)


def given_tokenizer(c: Any) -> Tokenizer | None:
  """The given one or the checkpoint's; None where one is to be trained."""
  given = c.model.tokenizer or c.model.checkpoint
  return load_tokenizer(hub.resolve_settings(given)) if given else None


def too_long(c: Any) -> str:
  """What becomes of a row over the context, where the config leaves it open.

  A pretrained model is given whole rows or none; one trained on the spot what
  fits of them.
  """
  return c.data.too_long or ("drop" if c.model.checkpoint else "cut")


def own_context(c: Any) -> int:
  """The longest row of a model trained here, where no context is given."""
  return _WORLD_CONTEXT if is_world(c) else _OWN_CONTEXT


def requested_context(c: Any) -> int:
  """The longest row that a config sets; 0: the data stage chooses it."""
  return c.model.context or (0 if c.model.checkpoint else own_context(c))


def context_of(c: Any, model_context: int) -> int:
  """`requested_context`, at most what the model was made for."""
  if c.model.checkpoint and c.model.context > model_context:
    raise ConfigError(
      f"model.context={c.model.context} is more than the checkpoint's "
      f"{model_context}; set config.model.context"
    )
  return requested_context(c)
