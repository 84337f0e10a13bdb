r"""Text from a model: `python -m jaxalign.generate`.

  python -m jaxalign.generate --checkpoint=runs/dpo_sub/runs/<arm>/export \
    --prompt="first question" --prompt="second question"
  python -m jaxalign.generate --checkpoint=hf:Qwen/Qwen3-8B --dtype=bfloat16 \
    --input=prompts.jsonl --output=answers.jsonl --answers=4

Prompts are texts (--prompt, or the lines of a .txt), or rows of a .jsonl with
`prompt` or `messages`. They are written by the tokenizer's chat template
where it has one, and an answer ends where the template ends a turn. An answer
is a row {"prompt", "answer", "tokens", "ended"}, of several with "sample". The
same seed gives the same answers on any number of devices. Exit codes as of
jaxalign.main.
"""

import json
from typing import Any

from etils import epath
import jax
import numpy as np

from jaxalign.cli.parse import parse_flags
from jaxalign.core import disk, sharding
from jaxalign.core.errors import ConfigError, DataError
from jaxalign.core.exits import guarded
from jaxalign.core.hub import resolve
from jaxalign.data.chat import Chat
from jaxalign.data.chat_templates import template_source
from jaxalign.data.schemas.schema import Refused
from jaxalign.data.tokenizer import load_tokenizer
from jaxalign.model import decode, decoder, hf

FLAGS = (
  ("string", "checkpoint", None, "A Hugging Face folder, or hf:<repo>[@rev]."),
  ("string", "input", None, "A .txt (one prompt a line) or .jsonl of prompts."),
  ("multi_string", "prompt", [], "A prompt; may be repeated."),
  ("string", "output", None, "A .jsonl; without it, answers are printed."),
  (
    "string",
    "template",
    "auto",
    "auto (the tokenizer's own where it has one), none (the bare text), a "
    "built-in's name or the path of a .jinja file.",
  ),
  ("string", "dtype", "float32", "Of the matrix products; or bfloat16."),
  ("integer", "new_tokens", 128, "Of one answer, at most."),
  ("integer", "answers", 1, "Of each prompt, which is computed once."),
  ("float", "temperature", 1.0, "0: the likeliest token."),
  ("integer", "top_k", 0, "Only the k likeliest tokens; 0: all."),
  ("float", "top_p", 1.0, "Only the likeliest tokens that together reach p."),
  ("integer", "seed", 0, "Of the sampling."),
  ("integer", "tile", 16, "Rows a device runs at once."),
  ("integer", "fsdp", -1, "Mesh; -1: all devices left."),
  ("integer", "tensor", 1, "Mesh; -1: all devices left."),
)


def parse_generate(argv: list[str]) -> Any:
  """The flags; a wrong one raises ConfigError."""
  values = parse_flags(argv, __doc__, FLAGS)
  if not values.checkpoint:
    raise ConfigError("no model; set --checkpoint=<folder>")
  if bool(values.prompt) == bool(values.input):
    raise ConfigError("set either --prompt=... or --input=<file>")
  for name in ("new_tokens", "tile", "answers"):
    if values[name].value < 1:
      raise ConfigError(f"--{name}={values[name].value}, wanted 1 or more")
  return values


def read_prompts(path: str) -> list[Any]:
  """Prompts of a file: texts, or lists of {"role", "content"}.

  Raises:
    DataError: a line that is no prompt; names the file and the line.
  """
  try:
    lines = epath.Path(path).read_text().splitlines()
  except (OSError, UnicodeDecodeError) as error:
    raise DataError(f"{path} cannot be read ({error}); set --input") from error
  numbered = [(i, line) for i, line in enumerate(lines, 1) if line.strip()]
  if not path.endswith(".jsonl"):
    return [line for _, line in numbered]
  out = []
  for i, line in numbered:
    try:
      row = json.loads(line)
      prompt = row.get("messages", row.get("prompt"))
    except (ValueError, AttributeError) as error:
      raise DataError(f"{path}, line {i}: no JSON object ({error})") from error
    if not prompt or not (isinstance(prompt, str) or _is_turns(prompt)):
      raise DataError(
        f"{path}, line {i}: wanted `prompt`, a text, or "
        "`messages`, a list of role and content"
      )
    out.append(prompt)
  return out


def _is_turns(found: Any) -> bool:
  return isinstance(found, list) and all(
    isinstance(turn, dict)
    and isinstance(turn.get("role"), str)
    and isinstance(turn.get("content"), str)
    for turn in found
  )


def encode_prompts(tok: Any, prompts: list[Any], template: str) -> list[Any]:
  """Token ids of every prompt, BOS in front, the answer to follow.

  Raises:
    DataError: a prompt that the template refuses.
  """
  source, out = template_source(template, tok, conversational=True), []
  if source is None:
    for p in prompts:
      bare = isinstance(p, str)
      text = p if bare else "\n\n".join(turn["content"] for turn in p)
      out.append(np.array(tok.encode(text, begins=True), np.int32))
    return out
  with Chat(tok, source) as chat:
    for text in chat.warnings:
      print(f"warning: {text}")
    for i, p in enumerate(prompts, 1):
      turns = [dict(role="user", content=p)] if isinstance(p, str) else p
      try:
        ids = chat.encode(turns, [])[0]
      except Refused as error:
        raise DataError(
          f"prompt {i}: the chat template will not have it "
          f"({error}); change it, or set --template"
        ) from error
      bos = [tok.bos] if tok.bos >= 0 else []
      out.append(np.array(bos + ids, np.int32))
  return out


def _generate(values: Any, prompts: list[Any]) -> list[dict[str, Any]]:
  """A row for every answer."""
  sampling = decode.Sampling(values.temperature, values.top_k, values.top_p)
  new, n = values.new_tokens, values.answers
  m = hf.read_config(values.checkpoint, values.dtype, "none")
  decode.check_sampling(sampling, m.vocab)
  if new >= m.context:
    raise ConfigError(
      f"--new_tokens={new} leaves no room for a prompt in a context of "
      f"{m.context}"
    )
  folder = resolve(values.checkpoint)
  tok = load_tokenizer(folder)
  encoded = encode_prompts(tok, prompts, values.template)
  for i, ids in enumerate(encoded, 1):
    if len(ids) + new > m.context:
      raise DataError(
        f"prompt {i} has {len(ids):,} tokens, which with {new} new ones do "
        f"not fit a context of {m.context:,}; shorten it, or set --new_tokens"
      )
  mesh = sharding.make_mesh(dict(fsdp=values.fsdp, tensor=values.tensor))
  decoder.check_model(m, mesh)
  with jax.set_mesh(mesh):
    options = decode.GenerateOptions(
      new,
      tok.stops,
      min(tok.vocab_size, m.vocab),
      sampling,
      seed=values.seed,
      tile=values.tile,
      answers=n,
    )
    params = hf.load_folder(folder, m, mesh)
    answers = decode.generate(mesh, params, m, encoded, options)
  rows = []
  for i, ids in enumerate(answers):
    ended = bool(len(ids)) and int(ids[-1]) in tok.stops
    row = dict(prompt=prompts[i // n]) | (dict(sample=i % n) if n > 1 else {})
    text = tok.decode_response(ids[: len(ids) - ended])
    rows.append(row | dict(tokens=len(ids), ended=ended, answer=text))
  return rows


def _run(argv: list[str]) -> None:
  values = parse_generate(argv)
  prompts = list(values.prompt) or read_prompts(values.input)
  if not prompts:
    raise DataError(f"{values.input} holds no prompt")
  rows = _generate(values, prompts)
  if values.output:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    disk.write_bytes(values.output, "".join(lines).encode())
    print(f"{len(rows):,} answers: {values.output}")
    return
  for row in rows:
    prompt = row["prompt"]
    last = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    print(f"--- {last}")
    print(row["answer"])


def main(argv: list[str]) -> int:
  """Returns the exit code; one line on stderr says what went wrong."""
  return guarded(lambda: _run(argv))
