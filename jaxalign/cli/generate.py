r"""Text from a model: `python -m jaxalign.generate`.

  python -m jaxalign.generate --checkpoint=runs/dpo_sub/runs/<arm>/export \
    --prompt="first question" --prompt="second question"
  python -m jaxalign.generate --checkpoint=hf:Qwen/Qwen3-8B --dtype=bfloat16 \
    --input=prompts.jsonl --output=answers.jsonl --answers=4

Prompts are texts (--prompt, or the lines of a .txt), or rows of a .jsonl with
`prompt` or `messages`. They are asked through the tokenizer's chat template
where it has one, and an answer ends where the template ends a turn. An answer
is a row {"prompt", "answer", "tokens", "ended"}, of several with "sample". The
same seed gives the same answers on any number of devices. Exit codes as of
jaxalign.main.
"""

import json
from typing import Any

from jaxalign.cli import main as main_lib
from jaxalign.core import disk
from jaxalign.core.errors import ConfigError, DataError


def parse(argv: list[str]) -> Any:
  """The flags; a wrong one raises ConfigError."""
  from absl import flags

  values = flags.FlagValues()
  text = dict(
    checkpoint=(None, "A Hugging Face folder, or hf:<repo>[@revision]."),
    input=(None, "A .txt (one prompt a line) or .jsonl of prompts."),
    output=(None, "A .jsonl to write; without it, answers are printed."),
    template=(
      "auto",
      "auto (the tokenizer's own where it has one), none "
      "(the bare text), a built-in's name or the path of a .jinja "
      "file.",
    ),
    dtype=("float32", "Of the matrix products: float32 or bfloat16."),
  )
  number = dict(
    new_tokens=(128, "Of one answer, at most."),
    answers=(1, "Of each prompt, which is computed once."),
    top_k=(0, "Only the k likeliest tokens; 0: all."),
    seed=(0, "Of the sampling."),
    tile=(16, "Rows a device runs at once."),
    fsdp=(-1, "Mesh; -1: all devices left."),
    tensor=(1, "Mesh; -1: all devices left."),
  )
  for name, (default, help_text) in text.items():
    flags.DEFINE_string(name, default, help_text, flag_values=values)
  for name, (default, help_text) in number.items():
    flags.DEFINE_integer(name, default, help_text, flag_values=values)
  flags.DEFINE_float(
    "temperature", 1.0, "0: the likeliest token.", flag_values=values
  )
  flags.DEFINE_float(
    "top_p",
    1.0,
    "Only the likeliest tokens that together reach p.",
    flag_values=values,
  )
  flags.DEFINE_multi_string(
    "prompt", [], "A prompt; may be repeated.", flag_values=values
  )
  flags.DEFINE_bool("help", False, "Show the flags.", flag_values=values)
  main_lib.parse_plain(values, argv, __doc__)
  if not values.checkpoint:
    raise ConfigError("no model; say --checkpoint=<folder>")
  if bool(values.prompt) == bool(values.input):
    raise ConfigError("say either --prompt=... or --input=<file>")
  for name in ("new_tokens", "tile", "answers"):
    if values[name].value < 1:
      raise ConfigError(f"--{name}={values[name].value}, wanted 1 or more")
  return values


def read_prompts(path: str) -> list[Any]:
  """Prompts of a file: texts, or lists of {"role", "content"}.

  Raises:
    DataError: a line that is no prompt; names the file and the line.
  """
  from etils import epath

  try:
    lines = epath.Path(path).read_text().splitlines()
  except (OSError, UnicodeDecodeError) as error:
    raise DataError(f"{path} cannot be read ({error}); set --input") from error
  if not path.endswith(".jsonl"):
    return [line for line in lines if line.strip()]
  out = []
  for i, line in enumerate(lines, 1):
    if not line.strip():
      continue
    try:
      row = json.loads(line)
      found = row.get("messages", row.get("prompt"))
    except (ValueError, AttributeError) as error:
      raise DataError(f"{path}, line {i}: no JSON object ({error})") from error
    good = (
      isinstance(found, str)
      and found
      or (
        isinstance(found, list)
        and found
        and all(
          isinstance(m, dict)
          and isinstance(m.get("role"), str)
          and isinstance(m.get("content"), str)
          for m in found
        )
      )
    )
    if not good:
      raise DataError(
        f"{path}, line {i}: wanted `prompt`, a text, or "
        "`messages`, a list of role and content"
      )
    out.append(found)
  return out


def encode(tok: Any, prompts: list[Any], template: str) -> list[Any]:
  """Token ids of every prompt, BOS in front, the answer to follow.

  Raises:
    DataError: a prompt that the template refuses.
  """
  import numpy as np

  from jaxalign.data import chat
  from jaxalign.data.chat_templates import template_source
  from jaxalign.data.schemas.schema import Refused

  turns = [
    p if isinstance(p, list) else [dict(role="user", content=p)]
    for p in prompts
  ]
  source = template_source(template, tok, conversational=True)
  if source is None:
    return [
      np.array(
        tok.encode(
          p if isinstance(p, str) else "\n\n".join(m["content"] for m in p),
          begins=True,
        ),
        np.int32,
      )
      for p in prompts
    ]
  out = []
  with chat.Chat(tok, source) as said:
    for text in said.warnings:
      print(f"warning: {text}")
    for i, asked in enumerate(turns, 1):
      try:
        ids = said.encode(asked, [])[0]
      except Refused as error:
        raise DataError(
          f"prompt {i}: the chat template will not have it "
          f"({error}); change it, or set --template"
        ) from error
      bos = [tok.bos] if tok.bos >= 0 else []
      out.append(np.array(bos + ids, np.int32))
  return out


def shown(prompt: Any) -> str:
  """A prompt on the terminal: its text, or the last turn's."""
  return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def run(argv: list[str]) -> None:
  """Everything after the first line of output."""
  values = parse(argv)
  import jax

  from jaxalign.core import sharding
  from jaxalign.core.hub import resolve
  from jaxalign.data import tokenizer
  from jaxalign.model import decode, decoder, hf

  prompts = list(values.prompt) or read_prompts(values.input)
  if not prompts:
    raise DataError(f"{values.input} holds no prompt")
  sampling = decode.Sampling(values.temperature, values.top_k, values.top_p)
  m = hf.read_config(values.checkpoint, values.dtype, "none")
  decode.check_sampling(sampling, m.vocab)
  if values.new_tokens >= m.context:
    raise ConfigError(
      f"--new_tokens={values.new_tokens} leaves no room for a "
      f"prompt in a context of {m.context}"
    )
  folder = resolve(values.checkpoint)
  tok = tokenizer.load_tokenizer(folder)
  asked = encode(tok, prompts, values.template)
  for i, ids in enumerate(asked, 1):
    if len(ids) + values.new_tokens > m.context:
      raise DataError(
        f"prompt {i} has {len(ids):,} tokens, which with "
        f"{values.new_tokens} new ones do not fit a context of "
        f"{m.context:,}; shorten it, or set --new_tokens"
      )
  mesh = sharding.make_mesh(dict(fsdp=values.fsdp, tensor=values.tensor))
  decoder.check_model(m, mesh)
  with jax.set_mesh(mesh):
    options = decode.GenerateOptions(
      values.new_tokens,
      tok.stops,
      min(tok.vocab_size, m.vocab),
      sampling,
      seed=values.seed,
      tile=values.tile,
      answers=values.answers,
    )
    params = hf.load_folder(folder, m, mesh)
    said = decode.generate(mesh, params, m, asked, options)
  rows, n = [], values.answers
  for i, ids in enumerate(said):
    ended = bool(len(ids)) and int(ids[-1]) in tok.stops
    rows.append(
      dict(prompt=prompts[i // n])
      | (dict(sample=i % n) if n > 1 else {})
      | dict(
        tokens=len(ids),
        ended=ended,
        answer=tok.decode_response(ids[: len(ids) - ended]),
      )
    )
  if values.output:
    disk.write_bytes(
      values.output,
      "".join(
        json.dumps(row, ensure_ascii=False) + "\n" for row in rows
      ).encode(),
    )
    print(f"{len(rows):,} answers: {values.output}")
    return
  for row in rows:
    print(f"--- {shown(row['prompt'])}")
    print(row["answer"])


def main(argv: list[str]) -> int:
  """Returns the exit code; one line on stderr says what went wrong."""
  return main_lib.guarded(lambda: run(argv))
