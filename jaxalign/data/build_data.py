"""The data stage: a source becomes splits, a tokenizer and tokens."""

import collections
from collections.abc import Mapping
import dataclasses
import itertools
import json
from typing import Any

from etils import epath
import numpy as np

from jaxalign.core import artifacts, disk, progress
from jaxalign.core.errors import ConfigError, DataError
from jaxalign.data import prepare, records, refusals, tables, tokens, world
from jaxalign.data.chat import Chat
from jaxalign.data.encode import ANSWERS, NO_TEMPLATE, RowEncoder
from jaxalign.data.json_rows import Where
from jaxalign.data.row_table import RowTable
from jaxalign.data.schemas.schema import Refused
from jaxalign.data.special import ROW_FORMAT
from jaxalign.data.summary import (
  data_summary,
  decoded_rows,
  SHOWN,
  summary_lines,
)
from jaxalign.data.tokenizer import Tokenizer, train_tokenizer

SPLITS = ("sft", "pool", "held_out")
_LEARNT = 200_000  # rows of the pool that a tokenizer is trained on
PEEKED, TOKENIZED = 10_000, 300  # rows that a dry run reads; and tokenizes


@dataclasses.dataclass(frozen=True)
class SplitRows:
  """The rows of a config, split, before any of them is tokenized."""

  splits: dict[str, RowTable]
  summary: dict[str, Any]
  kind: str  # "pairs" or "unpaired"
  refused: list[dict]
  where: Mapping[str, Where]  # id -> where a row stands


def _from_world(c: Any, folder: epath.Path) -> SplitRows:
  """The world's rows, written as text and read back like any other source."""
  made = world.generate_rows(prepare.world_of(c), c.data.seed)
  names, loaded = ("prompt", "chosen", "rejected"), {}
  key = lambda row: tuple(row[name] for name in names)
  for split in ("pool", "held_out"):
    path = folder / f"world_{split}.jsonl"
    lines = [json.dumps({k: r[k] for k in names}) + "\n" for r in made[split]]
    disk.write_bytes(path, "".join(lines).encode())
    loaded[split] = records.load_records(str(path))
  targets = {key(row): row["target"] for row in made["held_out"]}
  with_target = lambda row: row | dict(target=targets[key(row)])
  splits = dict(
    pool=loaded["pool"].rows,
    held_out=loaded["held_out"].rows.map(with_target),
    sft=RowTable.of(
      dict(row, id=f"sft-{i:06d}", group=row["prompt"])
      for i, row in enumerate(made["sft"])
    ),
  )
  refused = [*loaded["pool"].refused, *loaded["held_out"].refused]
  ids = itertools.chain(*(rows.column("id") for rows in splits.values()))
  where = dict.fromkeys(ids, Where("world", None))
  seen, why = set(), Refused("prompt of another split")
  for name, rows in splits.items():
    prompts = rows.column("prompt")
    twice = {i: why for i, prompt in enumerate(prompts) if prompt in seen}
    splits[name], more = _without(rows, twice, name, where)
    refused += more
    seen |= {*prompts}
  summary = data_summary(loaded["pool"], splits)
  summary |= dict(source="world", readings=[])
  summary["seen"] = sum(len(rows) for rows in made.values())
  return SplitRows(splits, summary, "pairs", refused, {})


def _without(
  rows: RowTable,
  refused: Mapping[int, Refused],
  split: str,
  where: Mapping[str, Where],
) -> tuple[RowTable, list[dict]]:
  """The rows of a split without those refused, and these as they are listed."""
  kept = np.ones(len(rows), bool)
  kept[[*refused]] = False
  left_out = zip(rows.where(~kept) if refused else (), refused.values())
  listed = [refusals.refused_later(*row, split, where) for row in left_out]
  return rows.where(kept), listed


def read_splits(c: Any, limit: int = 0) -> SplitRows:
  """Rows of files or of a hub, checked, refused with reasons, and split."""
  loaded = prepare.load_sources(c, limit)
  sizes = prepare.split_fractions(c)
  splits = records.split_rows(loaded.rows, sizes, c.data.seed)
  refused, where = list(loaded.refused), loaded.where
  if c.data.held_out:
    held = prepare.load_sources(c, limit, held_out=True)
    if held.kind != loaded.kind:
      raise DataError(
        f"{c.data.held_out} holds {held.kind}, {loaded.source} holds "
        f"{loaded.kind}; set config.data.held_out"
      )
    groups = {*held.rows.column("group")}
    why = Refused("prompt of the held-out file")
    for name in ("pool", "sft"):  # what is measured on is not trained on
      own = enumerate(splits[name].column("group"))
      both = {i: why for i, group in own if group in groups}
      splits[name], more = _without(splits[name], both, name, where)
      refused += more
    named = {f"held-{name}": at for name, at in held.where.items()}
    where = collections.ChainMap(named, where)
    splits["held_out"] = held.rows.map(lambda r: dict(r, id=f"held-{r['id']}"))
    refused += held.refused
    seen = loaded.seen + held.seen
    readings = loaded.readings + held.readings
    loaded = dataclasses.replace(loaded, seen=seen, readings=readings)
  answer = "chosen" if loaded.kind == "pairs" else "completion"
  # A disliked answer is nothing to imitate.
  liked = (row for row in splits["sft"] if row.get("label", True))
  sft = RowTable.of(_imitated(row, answer) for row in liked)
  target = lambda row: dict(target=row.get("chosen") or row["completion"])
  held_out = splits["held_out"].map(lambda row: row | target(row))
  summary = data_summary(loaded, splits)
  splits = splits | dict(sft=sft, held_out=held_out)
  return SplitRows(splits, summary, loaded.kind, refused, where)


def _imitated(row: dict, answer: str) -> dict[str, Any]:
  """A row of the sft split: one answer to imitate."""
  out = dict(id=row["id"], prompt=row["prompt"], response=row[answer])
  out |= {k: row[k] for k in ("group", "turns", "tools") if k in row}
  if "answers" in row:
    out["answers"] = row["answers"] and row["answers"][:1]
  return out


def _tokenizer(c: Any, splits: dict) -> Tokenizer:
  """The given one, or one trained on sft and pool text."""
  if (given := prepare.given_tokenizer(c)) is not None:
    return given
  texts = [r["prompt"] + r["response"] for r in splits["sft"]]
  for row in itertools.islice(splits["pool"], _LEARNT):
    answers = [row[n] for n in ("chosen", "completion") if n in row]
    texts += [row["prompt"] + answer for answer in answers]
  return Tokenizer(train_tokenizer(texts, c.model.vocab_size))


def make_data(
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
  is_world = prepare.is_world(c)
  try:
    read = _from_world(c, folder) if is_world else read_splits(c)
  except refusals.TooManyRefused as error:
    raise refusals.named_in(error, folder) from error
  splits, summary = _as_wanted(c, read, wanted), read.summary
  needed = _needed_splits(c)
  for name in needed:
    if not splits[name]:
      raise _empty(name, read)
  tok = _tokenizer(c, splits)
  with RowEncoder(c, tok, splits) as encoder:
    _write_tokenizer(folder, tok, encoder.chat)
    encoded = {name: encoder.encode(encoder.splits[name]) for name in SPLITS}
  context = prepare.requested_context(c) or tokens.context_for(
    tokens.whole_lengths(tok, itertools.chain(*encoded.values())), most
  )
  context = c.model.context or min(most, context)
  truncation, late = {}, []
  for name in SPLITS:
    whole = encoder.splits[name]
    rows, truncation[name], out = encoder.fit(
      whole, encoded[name], context, prepare.too_long(c)
    )
    splits[name], more = _without(whole, out, name, read.where)
    late += more
    tokens.save_rows(folder, name, rows)
    if name == "pool":
      summary["tokens"] = _token_counts(rows)
      summary["shown"] = decoded_rows(tok, splits[name], rows)
  refused = read.refused + late
  n = sum(map(len, encoded.values()))
  fits = max(report["fits"] for report in truncation.values())
  refusals.check_late(c, summary, late, refused, folder, rows=n, fits=fits)
  for name in needed:
    if not splits[name]:
      raise _empty_after_truncation(name, late, truncation[name])
  for name in SPLITS:
    if truncation[name]["rows"] or truncation[name]["too_long"]:
      progress.say(f"  {tokens.truncation_line(name, truncation[name])}")
    tables.write_rows(folder / f"{name}.parquet", splits[name])
  tables.write_refused(folder / "rejected.jsonl", refused)
  summary |= dict(
    refused=len(refused),
    kept=summary["seen"] - len(refused),
    refused_by_reason=refusals.count_reasons(refused),
    first_refused=refusals.first_by_reason(refused),
    kind=wanted,
    source_kind=read.kind,
    truncation=truncation,
    rows_by_split={n: len(splits[n]) for n in SPLITS},
    vocab=tok.vocab_size,
    context=context,
    template=encoder.description,
    warnings=encoder.warnings,
  )
  disk.write_json(folder / "data_summary.json", summary)
  # Not what a failed try left.
  names = [path.name for path in folder.iterdir()]
  names = [n for n in names if n != "records" and ".tmp-" not in n]
  names = [n for n in names if is_world or not n.startswith("world_")]
  counts = ", ".join(f"{len(splits[n]):,} {n}" for n in SPLITS)
  return names, artifacts.Cost(), dict(kind=wanted, say=counts, context=context)


def _as_wanted(c: Any, read: SplitRows, wanted: str) -> dict[str, RowTable]:
  """The splits as the loss compares them: a pool's pair may become two rows."""
  splits = dict(read.splits)
  if read.kind == "unpaired" and wanted == "pairs":
    raise DataError(
      f"{read.summary['source']} holds single answers (unpaired), but the "
      f"loss {c.loss.name!r} compares two answers; set config.loss.name, to "
      "'kto' for instance"
    )
  if read.kind == "pairs" and wanted == "unpaired":
    splits["pool"] = records.pairs_to_unpaired(splits["pool"])
    n = len(splits["pool"])
    progress.say(f"  pairs split into {n:,} answers for {c.loss.name}")
  labels = {*splits["pool"].column("label")}
  if wanted == "unpaired" and len(labels) == 1:
    progress.say(
      f"  warning: all {len(splits['pool']):,} rows of the pool are "
      f"{'liked' if labels.pop() else 'disliked'}; {c.loss.name} will only "
      "push one way"
    )
  return splits


def _needed_splits(c: Any) -> list[str]:
  """The splits that must not be empty."""
  sizes = dict.fromkeys(SPLITS, 1.0)
  if not prepare.is_world(c):
    sizes = prepare.split_fractions(c)
  needed = [n for n in SPLITS if sizes[n] > 0]
  needed += ["held_out"] if c.data.held_out else []
  return [n for n in needed if n != "sft" or not c.model.checkpoint]


def _empty(name: str, read: SplitRows) -> DataError:
  hint = "; more rows are needed, or set config.data.split"
  if name == "sft" and read.kind == "unpaired":
    hint = (
      ", and disliked answers are not imitated; more rows are needed, or set "
      "config.model.checkpoint"
    )
  summary = read.summary
  return DataError(
    f"the {name} split of {summary['source']} is empty ({summary['kept']} "
    f"rows kept of {summary['seen']}){hint}"
  )


def _empty_after_truncation(
  name: str, late: list[dict], report: dict[str, Any]
) -> DataError:
  reasons = collections.Counter(r["reason"] for r in late if r["split"] == name)
  most = reasons.most_common(1)
  return DataError(
    f"no row of the {name} split is left after truncation to "
    f"{report['context']} tokens (most were refused: "
    f"{most[0][0] if most else 'none'}; a context of {report['fits']:,} keeps "
    "99 % of them); raise config.model.context, or set config.data.template"
  )


def _write_tokenizer(
  folder: epath.Path, tok: Tokenizer, chat: Chat | None
) -> None:
  """The tokenizer's own files, and what was decided about its rows."""
  tok.save(folder)
  decided = dict(bos=tok.bos, eos=tok.eos, stops=list(tok.stops))
  if chat:
    decided |= dict(reserved=sorted(tok.specials), now=chat.renderer.now)
    if chat.source != tok.template:  # the export is to ask in this way
      path = folder / "chat_template.jinja"
      disk.write_bytes(path, chat.source.encode())
  disk.write_json(folder / ROW_FORMAT, decided)


def preview(c: Any, most: int) -> tuple[SplitRows, list[str]]:
  """The first rows of a config's sources, and how they are read.

  Nothing is trained: without a tokenizer the rows are shown as their texts.

  Args:
    c: the config.
    most: longest row that the model can take, in tokens.
  """
  if prepare.is_world(c):
    raise ConfigError("the built-in world is not read from a file")
  read = read_splits(c, PEEKED)
  first = refusals.first_by_reason(read.refused)
  summary = read.summary | dict(first_refused=first)
  name = next(
    (n for n in ("pool", "held_out", "sft") if read.splits[n]), "pool"
  )
  tok = prepare.given_tokenizer(c)
  if tok is None:
    names = ("id", "prompt", *ANSWERS)
    few = read.splits[name][:SHOWN]
    texts = [{k: row[k] for k in names if k in row} for row in few]
    summary |= dict(template=NO_TEMPLATE, shown=texts)
    return read, summary_lines(summary)
  with RowEncoder(c, tok, read.splits) as encoder:
    few = encoder.splits[name][:TOKENIZED]
    encoded = encoder.encode(few)
  fits = tokens.context_for(tokens.whole_lengths(tok, encoded), most)
  context = prepare.requested_context(c) or fits
  rows, _, refused = encoder.fit(few, encoded, context, prepare.too_long(c))
  kept, late = _without(few, refused, name, read.where)
  summary["template"] = encoder.description
  summary["sample"] = dict(
    rows=len(few),
    fits=fits,
    first_refused=refusals.first_by_reason(late),
    refused_by_reason=collections.Counter(r["reason"] for r in late),
  )
  summary["shown"] = decoded_rows(tok, kept, rows)
  return read, summary_lines(summary)


def _token_counts(rows: tokens.TokenRows) -> dict[str, list[float]]:
  """Quantiles (0.05, 0.5, 0.95) of the tokens of prompts and responses."""
  response = tokens.row_lengths(rows) - rows.start
  counts, at = dict(prompt=rows.start, response=response), (0.05, 0.5, 0.95)
  return {
    name: np.quantile(x, at).tolist() if len(x) else []
    for name, x in counts.items()
  }
