"""Text to token rows and response masks: the one place where it happens.

A row is [BOS] + prompt + response + [EOS]. Prompt and response are tokenised
apart, so the mask's boundary is the text's boundary and a token's. A row over
the context loses prompt tokens on the left, never its BOS; if its response
still does not fit it is cut on the right and carries no EOS: a cut answer must
not be taught to stop there. `audit` checks every row that is made.
"""

from __future__ import annotations  # a tokenizer is only named here

import io
from typing import TYPE_CHECKING, Any, Iterable, Iterator, Mapping, NamedTuple
from typing import Sequence

import numpy as np
from etils import epath

from jaxalign import artifacts
from jaxalign import progress
from jaxalign.data.chat import Chat
from jaxalign.data.schemas.pairs import Refused
from jaxalign.errors import ConfigError, CorruptError, DataError

if TYPE_CHECKING:  # rows of tokens are read where no tokenizer is installed
  from jaxalign.data.tokenizer import Tokenizer

KEEP_PROMPT = 8  # prompt tokens that a long response cannot push out
_CHUNK = 1024  # texts tokenised between two ticks of the bar
_FIELDS = dict(ids=np.int32, offsets=np.int64, start=np.int32, cut=np.int32)


class TokenRows(NamedTuple):
  """n rows of tokens, end to end."""
  ids: np.ndarray  # int32 [total]
  offsets: np.ndarray  # int64 [n + 1]: row i is ids[offsets[i]:offsets[i + 1]]
  start: np.ndarray  # int32 [n]: where in the row the response begins
  cut: np.ndarray  # int32 [n]: tokens of the row that did not fit


def encode_rows(tok: Tokenizer, prompts: Sequence[str],
                responses: Sequence[str], context: int
                ) -> tuple[TokenRows, dict[str, Any]]:
  """n rows of one prompt and one response each.

  Args:
    tok: the tokenizer; its BOS and EOS are written here and nowhere else.
    prompts, responses: n texts each; a row's text is prompt + response.
    context: the most tokens a row may have, BOS and EOS included.

  Returns:
    TokenRows of n rows, and a report of what was cut.

  Raises:
    ConfigError: the context has no room for a prompt and a response.
  """
  rows, report, refused = encode_texts(tok, prompts, dict(response=responses),
                                       context)
  if refused:
    raise DataError(f"row {min(refused)} has an {refused[min(refused)]} and "
                    "the tokenizer no BOS: nothing to predict its first token "
                    "from; remove the row")
  return rows, report


def encode_pairs(tok: Tokenizer, prompts: Sequence[str],
                 chosen: Sequence[str], rejected: Sequence[str], context: int
                 ) -> tuple[TokenRows, dict[str, Any], dict[int, str]]:
  """Two rows per pair, with one and the same cut prompt.

  Args:
    tok, prompts, context: as in `encode_rows`.
    chosen, rejected: n texts each.

  Returns:
    TokenRows of the m pairs kept, 2m rows in the order [chosen 0, rejected 0,
    chosen 1, ...]; the report; and for each of the n - m pairs left out its
    number and why.
  """
  return encode_texts(tok, prompts, dict(chosen=chosen, rejected=rejected),
                      context)


def encode_texts(tok: Tokenizer, prompts: Sequence[str],
                 sides: Mapping[str, Sequence[str]], context: int
                 ) -> tuple[TokenRows, dict[str, Any], dict[int, str]]:
  """R rows per prompt, one of each side; see `encode_pairs`."""
  rows, cuts, refused = _place(tok, _texts(tok, prompts, list(sides.values())),
                               context)
  audit(tok, rows, cuts, context)
  report = _report(rows, cuts, list(sides))
  report["prompts_refused"] = len(refused)
  return rows, report, refused


def encode_dialogues(chat: Chat, turns: Sequence[list[dict[str, str]]],
                     answers: Sequence[Sequence[str]], names: Sequence[str],
                     context: int
                     ) -> tuple[TokenRows, dict[str, Any], dict[int, str]]:
  """R rows per dialogue, in the words of a chat template.

  Args:
    chat: the tokenizer and its template.
    turns: of n prompts, {"role", "content"} each.
    answers: R answers to each prompt; of two, alike ones are left out.
    names: what the R answers are called in the report.
    context: as in `encode_rows`.

  Returns:
    TokenRows of the m dialogues kept, R rows each; the report; and for each
    dialogue left out its number and why.
  """
  def parts():
    with progress.bar("tokenize", len(turns)) as tick:
      for i, (asked, said) in enumerate(zip(turns, answers, strict=True)):
        try:
          yield chat.encode(asked, said)
        except Refused as error:
          yield error
        if i % _CHUNK == _CHUNK - 1:
          tick(_CHUNK)

  rows, cuts, refused = _place(chat.tok, parts(), context)
  audit(chat.tok, rows, cuts, context, history=True)
  report = _report(rows, cuts, list(names))
  report["prompts_refused"] = len(refused)
  return rows, report, refused


def _texts(tok: Tokenizer, prompts: Sequence[str],
           sides: Sequence[Sequence[str]]) -> Iterator[tuple]:
  """(prompt ids, ids of each side) of every row of texts."""
  if any(len(side) != len(prompts) for side in sides):
    raise ValueError(f"{len(prompts)} prompts, but "
                     f"{[len(side) for side in sides]} responses")
  with progress.bar("tokenize", len(prompts)) as tick:
    for first in range(0, len(prompts), _CHUNK):
      part = slice(first, first + _CHUNK)
      heads = tok.encode_many(prompts[part])
      tails = [tok.encode_responses(side[part]) for side in sides]
      yield from zip(heads, zip(*tails))
      tick(len(heads))


def _place(tok: Tokenizer, parts: Iterable, context: int
           ) -> tuple[TokenRows, np.ndarray, dict[int, str]]:
  """Rows of ids: the BOS, what fits of the prompt and answers, the EOS.

  Args:
    tok: for its BOS and EOS.
    parts: (prompt ids, [answer ids]) without either, or a Refused.
    context: most tokens of a row.

  Returns:
    The rows; int64 [rows, 2] tokens cut of prompt and answer; the reasons of
    those left out.
  """
  bos = [tok.bos] if tok.bos >= 0 else []
  least = KEEP_PROMPT + 2  # BOS, and one response token
  if context < least:
    raise ConfigError(f"a context of {context} tokens holds no prompt and "
                      f"response, wanted {least} or more; set model.context")
  ids, start, cut, cuts, refused = [], [], [], [], {}
  for i, part in enumerate(parts):
    if isinstance(part, Refused):
      refused[i] = part.reason
      continue
    head, answers = part[0], [[*answer, tok.eos] for answer in part[1]]
    longest = max(map(len, answers))
    keep = min(len(head), max(context - len(bos) - longest,
                              min(KEEP_PROMPT, len(head))))
    room = context - len(bos) - keep
    if len(answers) == 2 and answers[0][:room] == answers[1][:room]:
      refused[i] = ("identical after truncation" if longest > room
                    else "identical tokens")
      continue
    if not bos and not keep:
      refused[i] = "empty prompt"  # nothing to predict the first token from
      continue
    prompt = bos + head[len(head) - keep:]
    for answer in answers:
      lost = max(0, len(answer) - room)
      ids.append(np.array(prompt + answer[:room], np.int32))
      start.append(len(prompt))
      cut.append(len(head) - keep + lost)
      cuts.append((len(head) - keep, lost))
  offsets = np.cumsum([0] + [len(row) for row in ids], dtype=np.int64)
  rows = TokenRows(np.concatenate(ids) if ids else np.zeros(0, np.int32),
                   offsets, np.array(start, np.int32), np.array(cut, np.int32))
  return rows, np.array(cuts, np.int64).reshape(-1, 2), refused


def audit(tok: Tokenizer, rows: TokenRows, cuts: np.ndarray, context: int,
          history: bool = False) -> None:
  """Raises DataError unless every row is what this module promises.

  One BOS, in front; one EOS, at the end, unless the response was cut: then
  none; a token to predict from and one to predict; no more than the context.

  Args:
    tok, rows, context: as above.
    cuts: [n, 2] tokens cut of prompt and response.
    history: the prompts may hold the ends of earlier turns, and a BOS of each.
  """
  n, size = len(rows.start), lengths(rows)
  if not n:
    return
  row = np.repeat(np.arange(n), size)
  place = np.arange(len(rows.ids)) - rows.offsets[row]
  answer = place >= rows.start[row]
  ended = rows.ids[rows.offsets[1:] - 1] == tok.eos
  is_eos = rows.ids == tok.eos
  count = lambda what: np.bincount(row[what], minlength=n)
  wrong = {
      "empty": (rows.start < 1) | (rows.start >= size),
      "over the context": size > context,
      "ended though cut, or not though whole": ended == (cuts[:, 1] > 0),
      "an EOS inside": count(is_eos & answer) != ended}
  if tok.bos >= 0:
    is_bos = rows.ids == tok.bos
    wrong["without a BOS"] = ~is_bos[rows.offsets[:-1]]
    if tok.bos != tok.eos:
      wrong["a BOS inside"] = count(is_bos & (
          answer | (place == 1) if history else place > 0)) > 0
  if not history and tok.bos != tok.eos:
    wrong["an EOS in the prompt"] = count(is_eos & ~answer) > 0
  for what, where in wrong.items():
    if where.any():
      i = int(np.flatnonzero(where)[0])
      raise DataError(f"token row {i}: {what} ({int(where.sum())} rows; "
                      f"{rows.ids[rows.offsets[i]:][:8].tolist()}...); set "
                      "config.data.template or config.model.tokenizer")


def _report(rows: TokenRows, cuts: np.ndarray, sides: list[str]
            ) -> dict[str, Any]:
  """Rows and tokens cut; the prompt that two sides share counts once."""
  n, r = len(rows.start), len(sides)
  tokens_cut = dict(prompt=int(cuts[::r, 0].sum()))
  rows_cut = dict(prompt=int((cuts[::r, 0] > 0).sum()))
  for k, side in enumerate(sides):
    tokens_cut[side] = int(cuts[k::r, 1].sum())
    rows_cut[side] = int((cuts[k::r, 1] > 0).sum())
  any_cut = int((rows.cut > 0).sum())
  return dict(rows=n, rows_cut=any_cut, share=any_cut / n if n else 0.0,
              tokens=len(rows.ids), rows_cut_by_side=rows_cut,
              tokens_cut_by_side=tokens_cut)


def summary(name: str, report: dict[str, Any]) -> str:
  """One line of a report: what of a split was cut, by side."""
  sides = ", ".join(
      f"{side} {report['rows_cut_by_side'][side]:,} ({lost:,} tokens)"
      for side, lost in report["tokens_cut_by_side"].items() if lost)
  return (f"{name}: {report['rows']:,} rows of {report['tokens']:,} tokens, "
          f"{report['rows_cut']:,} cut" + (f": {sides}" if sides else ""))


def lengths(rows: TokenRows) -> np.ndarray:
  """Tokens in each row, int64 [n]."""
  return np.diff(rows.offsets)


def pad(rows: TokenRows, index: np.ndarray, length: int, pad_id: int = 0
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


def take(rows: TokenRows, index: np.ndarray) -> TokenRows:
  """Rows `index` [m] alone, in that order."""
  index = np.asarray(index, np.int64)
  sizes = lengths(rows)[index]
  offsets = np.concatenate([[0], np.cumsum(sizes)])
  ids = [rows.ids[rows.offsets[i]:rows.offsets[i + 1]] for i in index]
  return TokenRows(np.concatenate(ids) if ids else np.zeros(0, np.int32),
                   offsets, rows.start[index], rows.cut[index])


def shorten(rows: TokenRows, sizes: np.ndarray) -> TokenRows:
  """The first `sizes` [n] tokens of every row, at most all of them."""
  kept = np.minimum(sizes, lengths(rows))
  row = np.repeat(np.arange(len(kept)), lengths(rows))
  place = np.arange(len(rows.ids)) - rows.offsets[row]
  return TokenRows(
      rows.ids[place < kept[row]], np.concatenate([[0], np.cumsum(kept)]),
      rows.start, rows.cut + lengths(rows) - kept)


def bucket(length: int, context: int) -> int:
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


def longest(lengths: np.ndarray, context: int) -> int:
  """The cap for `bucket`: the longest row there is, rounded up to 4 tokens."""
  return min(context, -(-int(lengths.max(initial=1)) // 4) * 4)


def save(folder: epath.PathLike, name: str, rows: TokenRows) -> None:
  """Writes `rows` as four .npy files, `<name>.ids.npy` and so on."""
  for field, kind in _FIELDS.items():
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(getattr(rows, field), kind),
            allow_pickle=False)
    artifacts.write_bytes(epath.Path(folder) / f"{name}.{field}.npy",
                          buffer.getvalue())


def load_rows(folder: epath.PathLike, name: str) -> TokenRows:
  """What `save` wrote; memory-mapped where the folder is local.

  Raises:
    CorruptError: a file is missing, damaged, or does not fit the others.
  """
  arrays = {}
  for field, kind in _FIELDS.items():
    path = epath.Path(folder) / f"{name}.{field}.npy"
    try:
      if "://" in str(path):
        array = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
      else:
        array = np.load(str(path), mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
      raise CorruptError(f"token file {path} cannot be read: {error}; delete "
                         "it and run the data stage again") from error
    if array.ndim != 1 or array.dtype != kind:
      raise CorruptError(f"token file {path} is {array.dtype}"
                         f"{list(array.shape)}, wanted {kind.__name__} [n]; "
                         "delete it and run the data stage again")
    arrays[field] = array
  rows = TokenRows(**arrays)
  n = len(rows.start)
  if (len(rows.offsets) != n + 1 or len(rows.cut) != n or rows.offsets[0] or
      rows.offsets[-1] != len(rows.ids)):
    raise CorruptError(f"token files {folder}/{name}.*.npy do not fit each "
                       f"other ({n} rows, {len(rows.ids)} tokens); delete "
                       "them and run the data stage again")
  return rows
