"""The data stage: a source becomes splits, a tokenizer and tokens."""

import ast
import collections
from collections.abc import Mapping
import contextlib
import hashlib
import itertools
import json
from typing import Any, NamedTuple

from etils import epath
import numpy as np

from jaxalign import artifacts, hub, progress
from jaxalign.data import chat as chats
from jaxalign.data import reading, records, sources, special, tables
from jaxalign.data import tokens as tokens_lib
from jaxalign.data import words as words_lib
from jaxalign.data import world as world_lib
from jaxalign.data.schemas import choices
from jaxalign.data.schemas.fields import check_fields
from jaxalign.data.schemas.pairs import Refused
from jaxalign.data.tokenizer import load_tokenizer, Tokenizer, train
from jaxalign.errors import ConfigError, DataError

SPLITS = ("sft", "pool", "held_out")
SPECIAL = ("auto", "text", "tokens")  # what special tokens in a text are
SYSTEM = ("turn", "join")  # what becomes of a system turn
PEEKED, TOKENIZED = 10_000, 300  # rows that a dry run reads; and tokenizes
_OWN_CONTEXT, _WORLD_CONTEXT = 256, 64  # of a model trained here


class Rows(NamedTuple):
  """The rows of a config, split, before any of them is tokenized."""

  splits: dict[str, list[dict]]
  summary: dict[str, Any]
  kind: str  # "pairs" or "unpaired"
  refused: list[dict]
  where: Mapping[str, sources.Where] = {}  # id -> where a row stands


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
      f"data.source={value!r:.80}, wanted a path, a glob, "
      "hf:<name>, tfds:<name>, or a list of these; set "
      "config.data.source"
    )
  if len(names) > 1 and "world" in names:
    raise ConfigError(
      "data.source names the built-in world beside others; set "
      "config.data.source"
    )
  return names


def is_world(c: Any) -> bool:
  """Whether a config's rows are those of the built-in world."""
  return c.data.source == "world"


def check_source(c: Any) -> None:
  """Raises where the source is of no known kind, or no file is there."""
  chats.check(c.data.template)
  choices.check(choice_of(c))
  check_fields(c.data.fields.to_dict())
  for knob, known in (
    ("too_long", ("", *tokens_lib.TOO_LONG)),
    ("special_tokens", SPECIAL),
    ("system", SYSTEM),
  ):
    if c.data[knob] not in known:
      raise ConfigError(
        f"data.{knob}={c.data[knob]!r}, wanted one of "
        f"{', '.join(known)}; set config.data.{knob}"
      )
  names = sources_of(c)
  records.check_shares(names, c.data.caps, c.data.weights)
  if is_world(c):
    world_of(c)
    if c.data.held_out:
      raise ConfigError(
        "data.held_out beside the built-in world, which holds "
        "out rows of its own; set config.data.source"
      )
    return
  for name in names + [c.data.held_out] * bool(c.data.held_out):
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
    digest.update(chats.read_file(c.data.template))
  return digest.hexdigest()


def world_of(c: Any) -> world_lib.World | None:
  """The built-in world of a config, None for other sources."""
  if not is_world(c):
    return None
  return world_lib.build(c.data.world.to_dict(), c.data.seed)


def _from_world(c: Any, folder: epath.Path) -> Rows:
  """The world's rows, written as text and read back like any other source."""
  world = world_of(c)
  made = world_lib.generate(world, c.data.seed)
  targets = {
    (r["prompt"], r["chosen"], r["rejected"]): r["target"]
    for r in made["held_out"]
  }
  loaded = {}
  for name in ("pool", "held_out"):
    path = folder / f"world_{name}.jsonl"
    artifacts.write_bytes(
      path,
      "".join(
        json.dumps({k: r[k] for k in ("prompt", "chosen", "rejected")}) + "\n"
        for r in made[name]
      ).encode(),
    )
    loaded[name] = records.load(str(path))
  splits = {name: one.rows for name, one in loaded.items()}
  for row in splits["held_out"]:
    row["target"] = targets[row["prompt"], row["chosen"], row["rejected"]]
  splits["sft"] = [
    dict(r, id=f"sft-{i:06d}", group=r["prompt"])
    for i, r in enumerate(made["sft"])
  ]
  refused = [*loaded["pool"].refused, *loaded["held_out"].refused]
  seen = {r["prompt"] for r in splits["pool"]}
  for name in ("held_out", "sft"):  # no prompt is in two splits
    refused += [
      dict(
        file="world",
        line=None,
        id=r["id"],
        split=name,
        reason="prompt of another split",
        detail="",
      )
      for r in splits[name]
      if r["prompt"] in seen
    ]
    splits[name] = [r for r in splits[name] if r["prompt"] not in seen]
    seen |= {r["prompt"] for r in splits[name]}
  summary = records.data_summary(loaded["pool"], splits)
  summary |= dict(
    seen=sum(len(rows) for rows in made.values()), source="world", readings=[]
  )
  return Rows(splits, summary, "pairs", refused)


def fractions(c: Any) -> dict[str, float]:
  """The shares of the splits that a job has use for.

  Where a checkpoint is given nothing trains an SFT model: its share goes to
  the pool. A held-out file of its own leaves all of the source to the pool.
  """
  shares = c.data.split.to_dict()
  unused = [
    name
    for name, not_here in (
      ("sft", c.model.checkpoint),
      ("held_out", c.data.held_out),
    )
    if not_here
  ]
  for name in unused:
    shares["pool"] = shares.get("pool", 0.0) + shares.get(name, 0.0)
    shares[name] = 0.0
  return shares


def load(c: Any, limit: int = 0) -> records.Loaded:
  """The rows of a config's sources, by the rules of config.data.

  Args:
    c: the config.
    limit: of each source read so many rows, where the config says no less.
  """
  return _load(c, sources_of(c), limit, c.data.caps, c.data.weights)


def _load(
  c: Any, names: list[str], limit: int = 0, caps: Any = (), weights: Any = ()
) -> records.Loaded:
  most = min(filter(None, (limit, c.data.limit)), default=0)
  return records.load(
    names,
    schema=c.data.schema,
    limit=most,
    on_bad_rows="skip" if c.data.max_bad_fraction else "error",
    max_bad_fraction=c.data.max_bad_fraction,
    fields=c.data.fields.to_dict(),
    answer_pairs=c.data.answer_pairs,
    on_tied_scores="skip" if "tied" in c.data.skip else "keep",
    on_contradicting_scores=(
      "skip" if "contradicting" in c.data.skip else "keep"
    ),
    choice=choice_of(c),
    caps=tuple(caps),
    weights=tuple(weights),
    seed=c.data.seed,
  )


def read(c: Any, limit: int = 0) -> Rows:
  """Rows of files or of a hub, checked, refused with reasons, and split."""
  loaded = load(c, limit)
  splits = records.split(loaded.rows, fractions(c), c.data.seed)
  refused, where = list(loaded.refused), dict(loaded.where)
  readings = list(loaded.readings)
  if c.data.held_out:
    found = _load(c, [c.data.held_out], limit)
    if found.kind != loaded.kind:
      raise DataError(
        f"{c.data.held_out} holds {found.kind}, {loaded.source} "
        f"holds {loaded.kind}; set config.data.held_out"
      )
    held = {row["id"]: row for row in found.rows}
    groups = {row["group"] for row in found.rows}
    for name in ("pool", "sft"):  # what is measured on is not trained on
      refused += [
        _refusal(row, Refused("prompt of the held-out file"), name, where)
        for row in splits[name]
        if row["group"] in groups
      ]
      splits[name] = [r for r in splits[name] if r["group"] not in groups]
    names = {i: f"held-{i}" for i in held}
    where |= {names[i]: found.where[i] for i in held}
    splits["held_out"] = [dict(row, id=names[i]) for i, row in held.items()]
    refused += found.refused
    readings += found.readings
    loaded = loaded._replace(seen=loaded.seen + found.seen)
  sft = []
  for row in splits["sft"]:
    if loaded.kind == "unpaired" and not row["label"]:
      continue  # a disliked answer is nothing to imitate
    answer = row["chosen" if loaded.kind == "pairs" else "completion"]
    sft.append(
      dict(
        id=row["id"], prompt=row["prompt"], response=answer, group=row["group"]
      )
      | {k: row[k] for k in ("turns", "tools") if k in row}
      | {k: row[k] and row[k][:1] for k in ("answers",) if k in row}
    )
  for row in splits["held_out"]:
    row["target"] = row.get("chosen") or row["completion"]
  summary = records.data_summary(
    loaded._replace(readings=tuple(readings)), splits
  )
  return Rows(splits | dict(sft=sft), summary, loaded.kind, refused, where)


def _refusal(
  row: dict, error: Refused, split: str, where: Mapping[str, sources.Where]
) -> dict[str, Any]:
  """A row left out after it was read, with the file and line it stands at."""
  at = (
    where.get(row["id"])
    or where.get(row["id"].rpartition("/")[0])
    or sources.Where("", None)
  )
  return dict(
    file=at.file,
    line=at.line,
    id=row["id"],
    split=split,
    reason=error.reason,
    detail=error.detail,
  )


def first_kind(c: Any) -> str:
  """ "pairs" or "unpaired": what the first rows of the source are."""
  return "pairs" if is_world(c) else load(c, limit=20).kind


def given_tokenizer(c: Any) -> Tokenizer | None:
  """The given one or the checkpoint's; None where one is to be trained."""
  given = c.model.tokenizer or c.model.checkpoint
  return load_tokenizer(hub.resolve_settings(given)) if given else None


def _tokenizer(c: Any, splits: dict) -> Tokenizer:
  """The given one, or one trained on sft and pool text."""
  if (given := given_tokenizer(c)) is not None:
    return given
  texts = [r["prompt"] + r["response"] for r in splits["sft"]]
  texts += [
    r["prompt"] + r[side]
    for r in splits["pool"]
    for side in ("chosen", "completion")
    if side in r
  ]
  return Tokenizer.from_bytes(train(texts, c.model.vocab_size))


def _as_unpaired(splits: dict) -> dict:
  """Pool pairs become two unpaired rows each; held-out pairs stay pairs."""
  return splits | dict(pool=records.pairs_to_unpaired(splits["pool"]))


def make(
  c: Any, folder: epath.Path, *, most: int, wanted: str, writes: bool
) -> tuple[list[str], artifacts.Cost, dict[str, Any]]:
  """Builds the data artifact.

  Args:
    c: the config.
    folder: gets sft, pool and held_out as parquet and as tokens, the
      tokenizer, `rejected.jsonl` and `data_summary.json`.
    most: longest row that the model can take, in tokens.
    wanted: "pairs" or "unpaired", what the loss compares.
    writes: false on all processes but the first.

  Raises:
    DataError: an empty split, or single answers where a loss compares two.
  """
  if not writes:
    return [], artifacts.Cost(), {}
  world = is_world(c)
  try:
    splits, summary, kind, refused, where = (
      _from_world(c, folder) if world else read(c)
    )
  except records.TooManyRefused as error:
    raise _named(error, folder) from error
  if kind == "unpaired" and wanted == "pairs":
    raise DataError(
      f"{summary['source']} holds single answers (unpaired), but "
      f"the loss {c.loss.name!r} compares two answers; set "
      "config.loss.name, to 'kto' for instance"
    )
  if kind == "pairs" and wanted == "unpaired":
    splits = _as_unpaired(splits)
    progress.say(
      f"  pairs split into {len(splits['pool']):,} answers for {c.loss.name}"
    )
  shares = fractions(c)
  needed = [
    name
    for name in SPLITS
    if world or shares[name] > 0 or name == "held_out" and c.data.held_out
  ]
  if c.model.checkpoint and "sft" in needed:
    needed.remove("sft")
  for name in needed:
    if not splits[name]:
      hint = (
        ", and disliked answers are not imitated; more rows are needed, "
        "or set config.model.checkpoint"
        if name == "sft" and kind == "unpaired"
        else "; more rows are needed, or set config.data.split"
      )
      raise DataError(
        f"the {name} split of {summary['source']} is empty "
        f"({summary['kept']} rows kept of {summary['seen']}){hint}"
      )
  if wanted == "unpaired":
    labels = {r["label"] for r in splits["pool"]}
    if len(labels) == 1:
      progress.say(
        f"  warning: all {len(splits['pool']):,} rows of the pool "
        f"are {'liked' if labels.pop() else 'disliked'}; "
        f"{c.loss.name} will only push one way"
      )
  tok = _tokenizer(c, splits)
  with contextlib.ExitStack() as stack:
    words = words_lib.Words(c, tok, splits, stack)
    _write_tokenizer(folder, tok, words.chat)
    parts = {name: words.parts(splits[name]) for name in SPLITS}
    context = c.model.context or (
      tokens_lib.context_for(
        tokens_lib.needed(tok, itertools.chain(*parts.values())), most
      )
      if c.model.checkpoint
      else min(most, own_context(c))
    )
    truncation, late = {}, []
    for name in SPLITS:
      rows, truncation[name], lost = tokens_lib.place(
        tok,
        parts[name],
        words.names(splits[name]),
        context,
        too_long(c),
        history=words.chat is not None,
        special=words.special,
      )
      late += [
        _refusal(splits[name][i], why, name, where) for i, why in lost.items()
      ]
      tokens_lib.save(folder, name, rows)
      splits[name] = [r for i, r in enumerate(splits[name]) if i not in lost]
      if name == "pool":
        summary["tokens"] = _token_card(rows)
        summary["shown"] = reading.shown(tok, splits[name], rows)
    refused = refused + late
    _check_late(
      c,
      summary,
      late,
      refused,
      folder,
      sum(map(len, parts.values())),
      max(t["fits"] for t in truncation.values()),
    )
    for name in needed:
      if not splits[name]:
        why = collections.Counter(
          r["reason"] for r in late if r["split"] == name
        ).most_common(1)
        raise DataError(
          f"no row of the {name} split is left after truncation to {context} "
          f"tokens (most were refused: {why[0][0] if why else 'none'}; a "
          f"context of {truncation[name]['fits']:,} keeps 99 % of them); "
          "raise config.model.context, or set config.data.template"
        )
  for name in SPLITS:
    if truncation[name]["rows"] or truncation[name]["too_long"]:
      progress.say(f"  {tokens_lib.summary(name, truncation[name])}")
  tables.write_refused(folder / "rejected.jsonl", refused)
  counts = dict(
    sorted(collections.Counter(r["reason"] for r in refused).items())
  )
  summary |= dict(
    refused=len(refused),
    kept=summary["seen"] - len(refused),
    refused_by_reason=counts,
    first_refused=_firsts(refused),
  )
  for name in SPLITS:
    tables.write_rows(folder / f"{name}.parquet", splits[name])
  summary |= dict(
    kind=wanted,
    source_kind=kind,
    truncation=truncation,
    rows_by_split={n: len(splits[n]) for n in SPLITS},
    vocab=tok.vocab_size,
    context=context,
    template=words.said,
    warnings=words.warnings,
  )
  artifacts.write_json(folder / "data_summary.json", summary)
  names = [
    p.name
    for p in folder.iterdir()
    if p.name != "records"
    and ".tmp-" not in p.name
    and (world or not p.name.startswith("world_"))
  ]  # of a failed try
  counts = ", ".join(f"{len(splits[n]):,} {n}" for n in SPLITS)
  return names, artifacts.Cost(), dict(kind=wanted, say=counts, context=context)


def _named(error: records.TooManyRefused, folder: epath.Path) -> DataError:
  path = folder / "rejected.jsonl"
  tables.write_refused(path, error.refused)
  return DataError(f"{error}; {path} names them all")


def _firsts(refused: list[dict]) -> dict[str, str]:
  """reason -> where it was met first, and its words."""
  out = {}
  for row in refused:
    line = f" line {row['line']}" if row.get("line") else ""
    out.setdefault(
      row["reason"],
      f"first{line}, {row['detail'] or 'id ' + str(row['id'])}"[:200],
    )
  return out


def _check_late(
  c: Any,
  summary: dict,
  late: list[dict],
  refused: list[dict],
  folder: epath.Path,
  rows: int,
  fits: int,
) -> None:
  """Rows that a template or the context refused count as any others do.

  Args:
    c, summary, refused, folder: of the data stage.
    late: those of `refused` that were left out of the last `rows` rows.
    rows: of all splits; two for a pair that was split into single answers.
    fits: the context that keeps 99 % of them.
  """
  if not late:
    return
  too_long = [r for r in late if r["reason"].endswith("too long")]
  first = (
    (too_long if c.data.too_long == "error" else [])
    + (late if not c.data.max_bad_fraction else [])
  )[:1]
  for row in first:
    knob = (
      "config.data.too_long"
      if row in too_long and c.data.max_bad_fraction
      else "config.data.max_bad_fraction"
    )
    raise DataError(
      f"{row['file']}:{row['line']}: id {row['id']}: "
      f"{row['reason']}: {row['detail']}; repair the row, or set "
      f"{knob}"
    )
  counts = collections.Counter(r["reason"] for r in refused)
  before = (len(refused) - len(late)) / summary["seen"]
  share = before + (1 - before) * len(late) / rows
  if share > c.data.max_bad_fraction and not is_world(c):
    one = late[0]
    longer = (
      f" (now {c.model.context:,}; {fits:,} keep 99 % of the rows)"
      if too_long and c.model.context
      else ""
    )
    raise _named(
      records.TooManyRefused(
        f"{summary['source']}: {share:.0%} of {summary['seen']} rows refused, "
        f"more than the share {c.data.max_bad_fraction} allowed: "
        f"{reading.counted(counts)}; {one['file']}:{one['line']}: "
        f"{one['reason']}: {one['detail']}; set config.data.max_bad_fraction, "
        f"config.data.template or config.model.context{longer}",
        refused,
      ),
      folder,
    )


def too_long(c: Any) -> str:
  """What becomes of a row over the context, where the config leaves it open.

  A pretrained model is given whole rows or none; one trained on the spot what
  fits of them.
  """
  return c.data.too_long or ("drop" if c.model.checkpoint else "cut")


def own_context(c: Any) -> int:
  """The longest row of a model trained here, where no context is given."""
  return _WORLD_CONTEXT if is_world(c) else _OWN_CONTEXT


def asked_context(c: Any) -> int:
  """The longest row that a config asks for; 0: the data stage chooses it."""
  return c.model.context or (0 if c.model.checkpoint else own_context(c))


def _write_tokenizer(
  folder: epath.Path, tok: Tokenizer, chat: chats.Chat | None
) -> None:
  """The tokenizer's own files, and what was decided about its rows."""
  tok.save(folder)
  decided = dict(bos=tok.bos, eos=tok.eos, stops=list(tok.stops))
  if chat:
    decided |= dict(reserved=sorted(tok.specials), now=chat.renderer.now)
    if chat.source != tok.template:  # the export is to be asked in this way
      artifacts.write_bytes(
        folder / "chat_template.jinja", chat.source.encode()
      )
  artifacts.write_json(folder / special.ROW_FORMAT, decided)


def peek(c: Any, most: int) -> tuple[Rows, list[str]]:
  """The first rows of a config's sources, and how they are read.

  Nothing is trained: without a tokenizer the rows are shown as their texts.

  Args:
    c: the config.
    most: longest row that the model can take, in tokens.
  """
  if is_world(c):
    raise ConfigError("the built-in world is not read from a file")
  found = read(c, PEEKED)
  splits = found.splits
  summary = found.summary | dict(first_refused=_firsts(found.refused))
  name = next((n for n in ("pool", "held_out", "sft") if splits[n]), "pool")
  few = splits[name][:TOKENIZED]
  tok = given_tokenizer(c)
  if tok is None:
    summary["template"] = (
      "no template: rows are tokenized as the texts they are"
    )
    names = ("id", "prompt", *reading.ANSWERS)
    summary["shown"] = [
      {k: row[k] for k in names if k in row} for row in few[: reading.SHOWN]
    ]
  else:
    with contextlib.ExitStack() as stack:
      words = words_lib.Words(c, tok, splits, stack)
      parts = words.parts(few)
      fits = tokens_lib.context_for(tokens_lib.needed(tok, parts), most)
      rows, _, lost = tokens_lib.place(
        tok,
        parts,
        words.names(few),
        asked_context(c) or fits,
        too_long(c),
        history=bool(words.chat),
        special=words.special,
      )
      summary["template"] = words.said
      late = [
        _refusal(few[i], why, name, found.where) for i, why in lost.items()
      ]
      summary["sample"] = dict(
        rows=len(few),
        fits=fits,
        first_refused=_firsts(late),
        refused_by_reason=collections.Counter(r["reason"] for r in late),
      )
      summary["shown"] = reading.shown(
        tok, [r for i, r in enumerate(few) if i not in lost], rows
      )
  return found, reading.lines(summary)


def _token_card(rows: tokens_lib.TokenRows) -> dict[str, list[float]]:
  answer = tokens_lib.lengths(rows) - rows.start
  return {
    name: [float(q) for q in np.quantile(x, (0.05, 0.5, 0.95))]
    if len(x)
    else []
    for name, x in (("prompt", rows.start), ("response", answer))
  }


def context_of(c: Any, model_context: int) -> int:
  """`asked_context`, at most what the model was made for."""
  if c.model.checkpoint and c.model.context > model_context:
    raise ConfigError(
      f"model.context={c.model.context} is more than the "
      f"checkpoint's {model_context}; set config.model.context"
    )
  return asked_context(c)
