"""The data stage: a source becomes splits, a tokenizer, tokens and a card."""

import collections
import contextlib
import hashlib
import json
from typing import Any

from etils import epath
import numpy as np

from jaxalign import artifacts
from jaxalign import hub
from jaxalign import progress
from jaxalign.data import chat as chats
from jaxalign.data import records
from jaxalign.data import sources
from jaxalign.data import special
from jaxalign.data import tokens as tokens_lib
from jaxalign.data import world as world_lib
from jaxalign.data.tokenizer import Tokenizer, load_tokenizer, train
from jaxalign.errors import ConfigError, DataError

SPLITS = ("sft", "pool", "held_out")


def check_source(c: Any) -> None:
  """Raises where the source is of no known kind, or no file is there."""
  chats.check(c.data.template)
  if c.data.source == "world":
    world_of(c)
  else:
    sources.source_files(c.data.source)


def fingerprint(c: Any) -> str:
  """A digest of what the data stage reads, so that a change is noticed."""
  digest = hashlib.sha256()
  if c.data.source != "world":
    digest.update(sources.source_digest(c.data.source).encode())
  if (tok := given_tokenizer(c)) is not None:
    for name, data in sorted(tok.files.items()):
      digest.update(f"{name} {len(data)}\n".encode() + data)
  if c.data.template.endswith(".jinja"):
    digest.update(chats.read_file(c.data.template))
  return digest.hexdigest()


def world_of(c: Any) -> world_lib.World | None:
  """The built-in world of a config, None for other sources."""
  if c.data.source != "world":
    return None
  return world_lib.build(c.data.world.to_dict(), c.data.seed)


def _from_world(c: Any, folder: epath.Path
                ) -> tuple[dict, dict, str, list[dict]]:
  """The world's rows, written as text and read back like any other source."""
  world = world_of(c)
  made = world_lib.generate(world, c.data.seed)
  targets = {(r["prompt"], r["chosen"], r["rejected"]): r["target"]
             for r in made["held_out"]}
  loaded = {}
  for name in ("pool", "held_out"):
    path = folder / f"world_{name}.jsonl"
    artifacts.write_bytes(path, "".join(
        json.dumps({k: r[k] for k in ("prompt", "chosen", "rejected")}) + "\n"
        for r in made[name]).encode())
    loaded[name] = records.load(str(path))
  splits = {name: one.rows for name, one in loaded.items()}
  for row in splits["held_out"]:
    row["target"] = targets[row["prompt"], row["chosen"], row["rejected"]]
  splits["sft"] = [dict(r, id=f"sft-{i:06d}", group=r["prompt"])
                   for i, r in enumerate(made["sft"])]
  refused = [*loaded["pool"].refused, *loaded["held_out"].refused]
  seen = {r["prompt"] for r in splits["pool"]}
  for name in ("held_out", "sft"):  # no prompt is in two splits
    refused += [dict(file="world", line=None, id=r["id"], split=name,
                     reason="prompt of another split", detail="")
                for r in splits[name] if r["prompt"] in seen]
    splits[name] = [r for r in splits[name] if r["prompt"] not in seen]
    seen |= {r["prompt"] for r in splits[name]}
  card = records.data_card(loaded["pool"], splits)
  card["seen"] = sum(len(rows) for rows in made.values())
  return splits, card, "pairs", refused


def _from_source(c: Any, folder: epath.Path
                 ) -> tuple[dict, dict, str, list[dict]]:
  """Rows of files or of a hub, checked, refused with reasons, and split."""
  try:
    loaded = records.load(
        c.data.source, schema=c.data.schema, limit=c.data.limit,
        on_bad_rows=c.data.on_bad_rows,
        max_bad_fraction=c.data.max_bad_fraction,
        fields=c.data.fields.to_dict(), tree_pairs=c.data.tree_pairs,
        on_tied_scores=c.data.on_tied_scores)
  except records.TooManyRefused as error:
    path = folder / "rejected.jsonl"
    records.write_refused(path, error.refused)
    raise DataError(f"{error}; {path} names them all") from error
  progress.say(f"  {c.data.source}: {loaded.seen:,} rows, schema "
               f"{loaded.schema} ({loaded.kind}), {len(loaded.refused):,} "
               "refused" + (f" ({_counts(loaded.counts)})"
                            if loaded.refused else ""))
  splits = records.split(loaded.rows, c.data.split.to_dict(), c.data.seed)
  sft = []
  for row in splits["sft"]:
    if loaded.kind == "thumbs" and not row["label"]:
      continue  # a disliked answer is nothing to imitate
    answer = row["chosen" if loaded.kind == "pairs" else "completion"]
    sft.append(dict(id=row["id"], prompt=row["prompt"], response=answer,
                    group=row["group"]) |
               {k: row[k] for k in ("turns",) if k in row})
  for row in splits["held_out"]:
    row["target"] = row.get("chosen") or row["completion"]
  card = records.data_card(loaded, splits)
  return splits | dict(sft=sft), card, loaded.kind, loaded.refused


def _counts(counts: dict[str, int]) -> str:
  return ", ".join(f"{n} {reason}" for reason, n in sorted(counts.items()))


def given_tokenizer(c: Any) -> Tokenizer | None:
  """The given one or the checkpoint's; None where one is to be trained."""
  given = c.model.tokenizer or c.model.checkpoint
  return load_tokenizer(hub.resolve_settings(given)) if given else None


def _tokenizer(c: Any, splits: dict) -> Tokenizer:
  """The given one, or one trained on sft and pool text."""
  if (given := given_tokenizer(c)) is not None:
    return given
  texts = [r["prompt"] + r["response"] for r in splits["sft"]]
  texts += [r["prompt"] + r[side] for r in splits["pool"]
            for side in ("chosen", "completion") if side in r]
  return Tokenizer.from_bytes(train(texts, c.model.vocab_size))


def _as_thumbs(splits: dict) -> dict:
  """Pool pairs become two thumbs each; held-out pairs stay pairs."""
  return splits | dict(pool=records.pairs_to_thumbs(splits["pool"]))


def make(c: Any, folder: epath.Path, *, context: int, wanted: str, writes: bool
         ) -> tuple[list[str], artifacts.Cost, dict[str, Any]]:
  """Builds the data artifact.

  Args:
    c: the config.
    folder: gets sft, pool and held_out as parquet and as tokens, the
      tokenizer, `rejected.jsonl` and `data_card.json`.
    context: longest row, in tokens.
    wanted: "pairs" or "thumbs", what the loss eats.
    writes: false on all processes but the first.

  Raises:
    DataError: an empty split, or thumbs where a loss eats pairs.
  """
  if not writes:
    return [], artifacts.Cost(), {}
  world = c.data.source == "world"
  splits, card, kind, refused = (
      _from_world if world else _from_source)(c, folder)
  if kind == "thumbs" and wanted == "pairs":
    raise DataError(f"{c.data.source} holds single answers with thumbs, but "
                    f"the loss {c.loss.name!r} compares two answers; set "
                    "config.loss.name, to 'kto' for instance")
  if kind == "pairs" and wanted == "thumbs":
    splits = _as_thumbs(splits)
    progress.say(f"  pairs split into {len(splits['pool']):,} thumbs for "
                 f"{c.loss.name}")
  needed = [name for name in SPLITS if world or c.data.split[name] > 0]
  if c.model.checkpoint and "sft" in needed:
    needed.remove("sft")
  for name in needed:
    if not splits[name]:
      hint = (", and disliked answers are not imitated; more rows are needed, "
              "or set config.model.checkpoint"
              if name == "sft" and kind == "thumbs" else
              "; more rows are needed, or set config.data.split")
      raise DataError(f"the {name} split of {c.data.source} is empty "
                      f"({card['kept']} rows kept of {card['seen']}){hint}")
  if wanted == "thumbs":
    labels = {r["label"] for r in splits["pool"]}
    if len(labels) == 1:
      progress.say(f"  warning: all {len(splits['pool']):,} rows of the pool "
                   f"are {'liked' if labels.pop() else 'disliked'}; "
                   f"{c.loss.name} will only push one way")
  tok = _tokenizer(c, splits)
  source = chats.choose(c.data.template, tok,
                        any(r.get("turns") for r in splits["pool"]))
  truncation = {}
  with contextlib.ExitStack() as stack:
    chat = source and stack.enter_context(chats.Chat(tok, source))
    _write_tokenizer(folder, tok, chat)
    for name in SPLITS:
      splits[name], rows, truncation[name], late = _encode(
          tok, splits[name], context, chat)
      refused = refused + [dict(file=c.data.source, line=None, split=name, **r)
                           for r in late]
      tokens_lib.save(folder, name, rows)
      if not splits[name] and name in needed:
        why = collections.Counter(r["reason"] for r in late).most_common(1)
        raise DataError(f"no row of the {name} split is left after truncation "
                        f"to {context} tokens (most were refused: "
                        f"{why[0][0] if why else 'none'}); raise "
                        "config.model.context, or set config.data.template")
      progress.say(f"  {tokens_lib.summary(name, truncation[name])}")
      if name == "pool":
        card["tokens"] = _token_card(rows)
  records.write_refused(folder / "rejected.jsonl", refused)
  card |= dict(refused=len(refused), kept=card["seen"] - len(refused),
               refused_by_reason=dict(sorted(collections.Counter(
                   r["reason"] for r in refused).items())))
  for name in SPLITS:
    records.write_rows(folder / f"{name}.parquet", splits[name])
  card |= dict(kind=wanted, source_kind=kind, truncation=truncation,
               rows_by_split={n: len(splits[n]) for n in SPLITS},
               vocab=tok.vocab_size, source=c.data.source)
  artifacts.write_json(folder / "data_card.json", card)
  names = [p.name for p in folder.iterdir()
           if p.name != "cards" and ".tmp-" not in p.name
           and (world or not p.name.startswith("world_"))]  # of a failed try
  counts = ", ".join(f"{len(splits[n]):,} {n}" for n in SPLITS)
  return names, artifacts.Cost(), dict(kind=wanted, say=counts)


def _write_tokenizer(folder: epath.Path, tok: Tokenizer,
                     chat: chats.Chat | None) -> None:
  """The tokenizer's own files, and what was decided about its rows."""
  tok.save(folder)
  decided = dict(bos=tok.bos, eos=tok.eos, stops=list(tok.stops))
  if chat:
    decided |= dict(reserved=sorted(tok.specials), now=chat.renderer.now)
    if chat.source != tok.template:  # the export is to be asked in this way
      artifacts.write_bytes(folder / "chat_template.jinja",
                            chat.source.encode())
  artifacts.write_json(folder / special.ROW_FORMAT, decided)


def _encode(tok: Tokenizer, rows: list[dict], context: int,
            chat: chats.Chat | None):
  """Tokens of pairs (two rows each) or single answers; the rows left out."""
  names = next((names for names in (("chosen", "rejected"), ("completion",),
                                    ("response",))
                if rows and names[0] in rows[0]), ("response",))
  if chat:
    pairs = [_dialogue(r, names) for r in rows]
    encoded, report, refused = tokens_lib.encode_dialogues(
        chat, [turns for turns, _ in pairs], [said for _, said in pairs],
        names, context)
  else:
    encoded, report, refused = tokens_lib.encode_texts(
        tok, [r["prompt"] for r in rows],
        {name: [r[name] for r in rows] for name in names}, context)
  out = [dict(id=rows[i]["id"], reason=why, detail="")
         for i, why in refused.items()]
  return [r for i, r in enumerate(rows) if i not in refused], encoded, report, out


def _dialogue(row: dict, names: tuple[str, ...]
              ) -> tuple[list[dict[str, str]], list[str]]:
  """(turns, answers) for a template; a plain prompt is the user's turn.

  The space in front of a dialogue's answer belongs to its text marker.
  """
  turns = row.get("turns")
  if not turns:
    return [dict(role="user", content=row["prompt"])], [row[n] for n in names]
  return turns, [row[name].removeprefix(" ") for name in names]


def _token_card(rows: tokens_lib.TokenRows) -> dict[str, list[float]]:
  answer = tokens_lib.lengths(rows) - rows.start
  return {name: [float(q) for q in np.quantile(x, (0.05, 0.5, 0.95))]
          for name, x in (("prompt", rows.start), ("response", answer))}


def checked_context(c: Any, model_context: int) -> int:
  """The row length to use, at most what the model was made for."""
  if c.model.checkpoint and c.model.context > model_context:
    raise ConfigError(f"model.context={c.model.context} is more than the "
                      f"checkpoint's {model_context}; set config.model.context")
  return c.model.context
