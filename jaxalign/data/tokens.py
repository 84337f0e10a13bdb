"""Token rows and response masks: what a row is made of, cut and checked.

A row is [BOS] + prompt + response + [EOS]. Prompt and response are tokenised
apart, so the mask's boundary is the text's boundary and a token's. A row over
the context is left out, or its answer is cut on the right and carries no EOS: a
cut answer must not be taught to stop there. A question is cut, on the left, for
a small model trained on the spot alone ("cut"). `audit` checks every row.
"""

import array
from collections.abc import Iterable, Iterator, Sequence
import itertools
import tempfile
from typing import Any, NamedTuple

from etils import epath
import numpy as np

from jaxalign.core import disk
from jaxalign.core.errors import ConfigError, CorruptError, DataError
from jaxalign.data.schemas.schema import Refused

LEAST_CONTEXT = 10  # BOS, a short question and a token of the answer
TOO_LONG = ("drop", "cut_answer", "cut", "error")  # what becomes of such a row
_AUDITED = 65536  # rows that `audit` holds numbers of at once
KEEP_PROMPT = 8  # prompt tokens that a long response cannot push out, by "cut"
_FIELDS = dict(ids=np.int32, offsets=np.int64, start=np.int32, cut=np.int32)


class TokenRows(NamedTuple):
  """n rows of tokens, end to end."""

  ids: np.ndarray  # int32 [total]
  offsets: np.ndarray  # int64 [n + 1]: row i is ids[offsets[i]:offsets[i + 1]]
  start: np.ndarray  # int32 [n]: where in the row the response begins
  cut: np.ndarray  # int32 [n]: tokens of the row that did not fit


class Encoded(NamedTuple):
  """A row before it is known what fits: ids without a BOS."""

  prompt: np.ndarray  # int32
  answers: list[np.ndarray]  # int32, each ended by the EOS


class TokenFile:
  """Token ids written one after the other to a file of no name.

  A class because rows are added and then read, and memory holds neither.
  """

  def __init__(self):
    self._file = tempfile.TemporaryFile()

  def __del__(self):
    self._file.close()

  def extend(self, arrays: Iterable[np.ndarray]) -> None:
    """Adds int32 arrays."""
    self._file.write(b"".join(array.tobytes() for array in arrays))

  def mapped(self) -> np.ndarray:
    """All ids so far, int32, mapped from the file."""
    self._file.flush()
    if not self._file.tell():
      return np.zeros(0, np.int32)
    return np.memmap(self._file, np.int32, "r").view(np.ndarray)


class EncodedRows:
  """n rows before it is known what fits, their ids in a file."""

  def __init__(self):
    self._ids, self._refused = TokenFile(), {}
    self._sizes, self._parts = array.array("i"), array.array("i")

  def extend(self, rows: Iterable[Encoded | Refused]) -> None:
    """Adds rows."""
    for row in rows:
      parts = []
      if isinstance(row, Refused):
        self._refused[len(self)] = row
      else:
        parts = [row.prompt, *row.answers]
      self._ids.extend(parts)
      self._sizes.extend(map(len, parts))
      self._parts.append(len(parts))

  def __len__(self) -> int:
    return len(self._parts)

  def __iter__(self) -> Iterator[Encoded | Refused]:
    ids, at, sizes = self._ids.mapped(), 0, iter(self._sizes)
    for i, n in enumerate(self._parts):
      parts = []
      for size in itertools.islice(sizes, n):
        parts.append(ids[at : at + size])
        at += size
      yield Encoded(parts[0], parts[1:]) if parts else self._refused[i]


class Fitted(NamedTuple):
  """What `fit_rows` made: R rows of each of the m that were kept."""

  rows: TokenRows  # m * R rows: [chosen 0, rejected 0, chosen 1, ...]
  report: dict[str, Any]  # counts of what was cut and left out
  refused: dict[int, Refused]  # number of a row left out -> why


def whole_lengths(tok: Any, encoded: Iterable[Encoded | Refused]) -> np.ndarray:
  """Tokens that every row takes whole, its longest answer; int64 [n]."""
  rows = (row for row in encoded if not isinstance(row, Refused))
  sizes = (len(row.prompt) + max(map(len, row.answers)) for row in rows)
  return np.fromiter(sizes, np.int64) + (tok.bos >= 0)


def context_for(sizes: np.ndarray, most: int) -> int:
  """The least context, in steps of 8 tokens, that keeps 99 % of the rows.

  Args:
    sizes: [n] tokens, see `whole_lengths`.
    most: what the model was made for.
  """
  if not len(sizes):
    return min(LEAST_CONTEXT, most)
  at = max(0, int(np.ceil(0.99 * len(sizes))) - 1)
  return int(min(most, max(16, -(-int(np.sort(sizes)[at]) // 8) * 8)))


def fit_rows(
  tok: Any,
  encoded: Iterable[Encoded | Refused],
  names: Sequence[str],
  context: int,
  too_long: str = "drop",
  *,
  history: bool = False,
  special: bool = False,
) -> Fitted:
  """Rows of ids: the BOS, the prompt, an answer and its EOS.

  Args:
    tok: for its BOS and EOS, which are written here and nowhere else.
    encoded: n rows, read twice.
    names: what the R answers are called in the report.
    context: most tokens of a row.
    too_long: "cut_answer" cuts an answer on the right, "cut" before that the
      question on the left, for both sides alike; else the row is left out, and
      so is, but for "cut", one whose question leaves no room for an answer.
    history, special: see `audit`.

  Raises:
    ConfigError: the context has no room for a prompt and a response.
  """
  if context < LEAST_CONTEXT:
    raise ConfigError(
      f"a context of {context} tokens holds no prompt and response, wanted "
      f"{LEAST_CONTEXT} or more; set config.model.context"
    )
  bos = np.array([tok.bos] * (tok.bos >= 0), np.int32)
  ids, refused = TokenFile(), {}
  size, start, cut = (array.array("i") for _ in range(3))
  for i, row in enumerate(encoded):
    try:
      keep, room = _room(row, context, len(bos), too_long)
    except Refused as error:
      refused[i] = error
      continue
    dropped = len(row.prompt) - keep
    prompt = np.concatenate([bos, row.prompt[dropped:]])
    for answer in row.answers:
      ids.extend([prompt, answer[:room]])
      size.append(len(prompt) + len(answer[:room]))
      start.append(len(prompt))
      cut.extend([dropped, max(0, len(answer) - room)])
  cuts = np.array(cut, np.int32).reshape(-1, 2)
  rows = TokenRows(
    ids.mapped(),
    np.append(0, np.cumsum(size, dtype=np.int64)),
    np.array(start, np.int32),
    cuts.sum(1, dtype=np.int32),
  )
  audit(tok, rows, context, cut=cuts[:, 1], history=history, special=special)
  r = len(names)  # the prompt of R answers counts once
  by_side = dict(prompt=cuts[::r, 0])
  by_side |= {side: cuts[k::r, 1] for k, side in enumerate(names)}
  report = dict(
    rows=len(rows.start),
    tokens=len(rows.ids),
    context=context,
    rows_cut=int((rows.cut > 0).sum()),
    rows_cut_by_side={side: int((x > 0).sum()) for side, x in by_side.items()},
    tokens_cut_by_side={side: int(x.sum()) for side, x in by_side.items()},
    prompts_refused=len(refused),
    too_long=sum(r.reason.endswith("too long") for r in refused.values()),
    fits=context_for(whole_lengths(tok, encoded), 1 << 40),
  )
  return Fitted(rows, report, refused)


def _room(
  row: Encoded | Refused, context: int, bos: int, too_long: str
) -> tuple[int, int]:
  """How many tokens of the prompt stay, and how many of each answer."""
  if isinstance(row, Refused):
    raise row
  head, longest = len(row.prompt), max(map(len, row.answers))
  least = min(head, KEEP_PROMPT) if too_long == "cut" else head
  keep = min(head, max(context - bos - longest, least))
  room = context - bos - keep
  if longest > room and (too_long not in ("cut", "cut_answer") or room < 1):
    reason = "question too long" if too_long == "cut_answer" else "too long"
    raise Refused(
      reason,
      f"{bos + head + longest:,} tokens, {bos + head:,} of them the question; "
      f"the context has {context:,}",
    )
  sides = [answer[:room] for answer in row.answers]
  if len(sides) == 2 and np.array_equal(*sides):
    how = "after truncation" if longest > room else "tokens"
    raise Refused(f"identical {how}", "chosen and rejected")
  if not bos and not head:
    raise Refused(
      "empty prompt",
      "and the tokenizer has no BOS: nothing to predict the first token from",
    )
  return keep, room


def audit(
  tok: Any,
  rows: TokenRows,
  context: int,
  *,
  cut: np.ndarray | None = None,
  history: bool = False,
  special: bool = False,
) -> None:
  """Raises DataError unless every row is what this module promises.

  One BOS, in front; one EOS, at the end, unless the response was cut: then
  none; a token to predict from and one to predict; no more than the context.

  Args:
    tok, rows, context: as above.
    cut: [n] tokens cut of each answer; None: `rows.cut`, no question was cut.
    history: the prompts may hold the ends of earlier turns, and a BOS of each
      (SmolLM2's begins every turn).
    special: the texts themselves may hold a BOS and an EOS.
  """
  cut = rows.cut if cut is None else cut
  apart = tok.bos != tok.eos and not special and not history
  for first in range(0, len(rows.start), _AUDITED):
    last = min(first + _AUDITED, len(rows.start))
    low, high = rows.offsets[[first, last]]
    n, ids, start = last - first, rows.ids[low:high], rows.start[first:last]
    offsets = rows.offsets[first : last + 1] - low
    size, whole = np.diff(offsets), cut[first:last] <= 0
    row = np.repeat(np.arange(n), size)
    place = np.arange(len(ids)) - offsets[row]
    answer, is_eos, is_bos = place >= start[row], ids == tok.eos, ids == tok.bos
    ended = is_eos[offsets[1:] - 1]
    count = lambda where: np.bincount(row[where], minlength=n)
    wrong = {
      "empty": (start < 1) | (start >= size),
      "over the context": size > context,
    }
    if not special:
      wrong["ended though cut, or not though whole"] = ended != whole
      wrong["an EOS inside"] = count(is_eos & answer) != ended
    if tok.bos >= 0:
      wrong["without a BOS"] = ~is_bos[offsets[:-1]]
    if tok.bos >= 0 and apart:
      wrong["a BOS inside"] = count(is_bos & (place > 0)) > 0
    if apart:
      wrong["an EOS in the prompt"] = count(is_eos & ~answer) > 0
    for what, where in wrong.items():
      if where.any():
        i = int(np.flatnonzero(where)[0])
        raise DataError(
          f"token row {first + i}: {what} ({int(where.sum())} rows; "
          f"{ids[offsets[i] :][:8].tolist()}...); set config.data.template or "
          "config.model.tokenizer"
        )


def truncation_line(name: str, report: dict[str, Any]) -> str:
  """One line of a report: what of a split was too long for the context."""
  parts = [f"{name}: {report['rows']:,} rows of {report['tokens']:,} tokens"]
  cut = report["rows_cut_by_side"]
  if report["rows_cut"]:
    tokens = report["tokens_cut_by_side"].items()
    sides = [f"{side} {cut[side]:,} ({n:,} tokens)" for side, n in tokens if n]
    parts.append(f"cut: {', '.join(sides)}")
  if report["too_long"]:
    parts.append(
      f"{report['too_long']:,} too long for the context of "
      f"{report['context']:,} and left out"
    )
  if len(parts) > 1:
    parts.append(f"a context of {report['fits']:,} keeps 99 % whole")
  return ", ".join(parts)


def row_lengths(rows: TokenRows) -> np.ndarray:
  """Tokens in each row, int64 [n]."""
  return np.diff(rows.offsets)


def pad_rows(
  rows: TokenRows, index: np.ndarray, length: int, pad_id: int = 0
) -> tuple[np.ndarray, np.ndarray]:
  """Rows `index` side by side, padded on the right.

  Args:
    rows: the token rows.
    index: int [m], row numbers.
    length: columns; at least the longest of these rows.
    pad_id: what fills the rest; the mask does not depend on it.

  Returns:
    tokens int32 [m, length]; mask bool [m, length], true exactly on the
    response's tokens and its EOS.
  """
  index = np.asarray(index, np.int64)
  first = rows.offsets[index][:, None]
  size = (rows.offsets[index + 1] - rows.offsets[index])[:, None]
  if index.size and size.max() > length:
    raise ValueError(f"a row of {size.max()} tokens does not fit {length}")
  column = np.arange(length)[None, :]
  valid = column < size
  tokens = np.full((len(index), length), pad_id, np.int32)
  tokens[valid] = rows.ids[(first + column)[valid]]
  return tokens, valid & (column >= rows.start[index][:, None])


def join_rows(
  ids: Sequence[np.ndarray], start: Sequence[int], cut: Any = 0
) -> TokenRows:
  """Rows of ids [n] with where each response begins, and what was cut."""
  offsets = np.cumsum([0] + [len(i) for i in ids])
  cut = np.broadcast_to(np.int32(cut), len(ids))
  return TokenRows(np.concatenate(ids), offsets, np.int32(start), cut)


def take_rows(rows: TokenRows, index: np.ndarray) -> TokenRows:
  """Rows `index` [m] alone, in that order."""
  index = np.asarray(index, np.int64)
  offsets = np.append(0, np.cumsum(row_lengths(rows)[index]))
  ids = [rows.ids[rows.offsets[i] : rows.offsets[i + 1]] for i in index]
  ids = np.concatenate([np.zeros(0, np.int32), *ids])
  return TokenRows(ids, offsets, rows.start[index], rows.cut[index])


def cut_rows(rows: TokenRows, sizes: np.ndarray) -> TokenRows:
  """The first `sizes` [n] tokens of every row, at most all of them."""
  size = row_lengths(rows)
  kept = np.minimum(sizes, size)
  row = np.repeat(np.arange(len(kept)), size)
  place = np.arange(len(rows.ids)) - rows.offsets[row]
  ids, offsets = rows.ids[place < kept[row]], np.append(0, np.cumsum(kept))
  return TokenRows(ids, offsets, rows.start, rows.cut + size - kept)


def padded_length(length: int, context: int) -> int:
  """The padded length: 16, 24, 32, 48, 64, 96, ... but never over `context`.

  Two sizes per doubling: at most half a row is padding, and few shapes are
  compiled.
  """
  if length > context:
    raise ValueError(f"{length} tokens in a context of {context}")
  size = 16
  while size < length:
    size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
  return min(size, context)


def longest_row(lengths: np.ndarray, context: int) -> int:
  """The cap for `padded_length`: the longest row, rounded up to 4 tokens."""
  return min(context, -(-int(lengths.max(initial=1)) // 4) * 4)


def save_rows(folder: epath.PathLike, name: str, rows: TokenRows) -> None:
  """Writes `rows` as four .npy files, `<name>.ids.npy` and so on."""
  for field, kind in _FIELDS.items():
    array = np.ascontiguousarray(getattr(rows, field), kind)
    disk.write_array(epath.Path(folder) / f"{name}.{field}.npy", array)


def load_rows(folder: epath.PathLike, name: str) -> TokenRows:
  """What `save_rows` wrote; memory-mapped where the folder is local.

  Raises:
    CorruptError: a file is missing, damaged, or does not fit the others.
  """
  again, arrays = "and run the data stage again", {}
  for field, kind in _FIELDS.items():
    path = epath.Path(folder) / f"{name}.{field}.npy"
    try:
      array = disk.read_array(path)
    except (OSError, ValueError, EOFError) as error:
      raise CorruptError(
        f"token file {path} cannot be read: {error}; delete it {again}"
      ) from error
    if array.ndim != 1 or array.dtype != kind:
      raise CorruptError(
        f"token file {path} is {array.dtype}{list(array.shape)}, wanted "
        f"{kind.__name__} [n]; delete it {again}"
      )
    arrays[field] = array
  rows = TokenRows(**arrays)
  n, ends = len(rows.start), rows.offsets[[0, -1]].tolist()
  sizes = [len(rows.offsets) - 1, len(rows.cut)]
  if sizes != [n, n] or ends != [0, len(rows.ids)]:
    raise CorruptError(
      f"token files {folder}/{name}.*.npy do not fit each other ({n} rows, "
      f"{len(rows.ids)} tokens); delete them {again}"
    )
  return rows
