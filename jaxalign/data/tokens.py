"""Text to token rows and response masks: the one place where it happens.

A row is [BOS] + prompt + response + [EOS]. Prompt and response are tokenised
apart, so the mask's boundary is the text's boundary and a token's. A row over
the context is left out, or its answer is cut on the right and carries no EOS: a
cut answer must not be taught to stop there. A question is cut, on the left, for
a small model trained on the spot alone ("cut"). `audit` checks every row.
"""

from __future__ import annotations  # a tokenizer is only named here

from collections.abc import Iterable, Mapping, Sequence
import io
from typing import Any, NamedTuple, TYPE_CHECKING

from etils import epath
import numpy as np

from jaxalign import artifacts, progress
from jaxalign.data.chat import Chat
from jaxalign.data.schemas.pairs import Refused
from jaxalign.errors import ConfigError, CorruptError, DataError

if TYPE_CHECKING:  # rows of tokens are read where no tokenizer is installed
  from jaxalign.data.tokenizer import Tokenizer

LEAST_CONTEXT = 10  # BOS, a short question and a token of the answer
TOO_LONG = ("drop", "cut_answer", "cut", "error")  # what becomes of such a row
KEEP_PROMPT = 8  # prompt tokens that a long response cannot push out, by "cut"
_KEPT = 0.99  # the share of rows that a context chosen from the rows keeps
_CHUNK = 1024  # texts tokenised between two ticks of the bar
_FIELDS = dict(ids=np.int32, offsets=np.int64, start=np.int32, cut=np.int32)


class TokenRows(NamedTuple):
  """n rows of tokens, end to end."""

  ids: np.ndarray  # int32 [total]
  offsets: np.ndarray  # int64 [n + 1]: row i is ids[offsets[i]:offsets[i + 1]]
  start: np.ndarray  # int32 [n]: where in the row the response begins
  cut: np.ndarray  # int32 [n]: tokens of the row that did not fit


class Parts(NamedTuple):
  """A row before it is known what fits: ids without a BOS."""

  prompt: np.ndarray  # int32
  answers: list[np.ndarray]  # int32, each ended by the EOS


def encode_rows(
  tok: Tokenizer,
  prompts: Sequence[str],
  responses: Sequence[str],
  context: int,
  too_long: str = "cut_answer",
) -> tuple[TokenRows, dict[str, Any]]:
  """n rows of one prompt and one response each.

  Args:
    tok: the tokenizer; its BOS and EOS are written here and nowhere else.
    prompts, responses: n texts each; a row's text is prompt + response.
    context: the most tokens a row may have, BOS and EOS included.
    too_long: "cut_answer" or "drop".

  Returns:
    TokenRows of n rows, and a report of what was cut.

  Raises:
    ConfigError: the context has no room for a prompt and a response.
    DataError: a row that was left out.
  """
  rows, report, refused = encode_texts(
    tok, prompts, dict(response=responses), context, too_long
  )
  if refused:
    first = min(refused)
    raise DataError(f"row {first}: {refused[first]}; remove the row")
  return rows, report


def encode_pairs(
  tok: Tokenizer,
  prompts: Sequence[str],
  chosen: Sequence[str],
  rejected: Sequence[str],
  context: int,
  too_long: str = "drop",
) -> tuple[TokenRows, dict[str, Any], dict[int, Refused]]:
  """Two rows per pair, of one and the same prompt.

  Args:
    tok, prompts, context, too_long: as in `encode_rows`.
    chosen, rejected: n texts each.

  Returns:
    TokenRows of the m pairs kept, 2m rows in the order [chosen 0, rejected 0,
    chosen 1, ...]; the report; and for each of the n - m pairs left out its
    number and why.
  """
  return encode_texts(
    tok, prompts, dict(chosen=chosen, rejected=rejected), context, too_long
  )


def encode_texts(
  tok: Tokenizer,
  prompts: Sequence[str],
  sides: Mapping[str, Sequence[str]],
  context: int,
  too_long: str = "drop",
) -> tuple[TokenRows, dict[str, Any], dict[int, Refused]]:
  """R rows per prompt, one of each side; see `encode_pairs`."""
  return place(
    tok,
    parts_of_texts(tok, prompts, list(sides.values())),
    list(sides),
    context,
    too_long,
  )


def encode_dialogues(
  chat: Chat,
  turns: Sequence[list[dict[str, Any]]],
  answers: Sequence[Sequence[Any]],
  names: Sequence[str],
  context: int,
  too_long: str = "drop",
) -> tuple[TokenRows, dict[str, Any], dict[int, Refused]]:
  """R rows per dialogue, in the words of a chat template.

  Args:
    chat: the tokenizer and its template.
    turns: of n prompts, messages.
    answers: R answers to each prompt; of two, alike ones are left out.
    names: what the R answers are called in the report.
    context, too_long: as in `encode_rows`.

  Returns:
    TokenRows of the m dialogues kept, R rows each; the report; and for each
    dialogue left out its number and why.
  """
  return place(
    chat.tok,
    parts_of_dialogues(chat, turns, answers),
    names,
    context,
    too_long,
    history=True,
  )


def parts_of_dialogues(
  chat: Chat,
  turns: Sequence[list[dict[str, Any]]],
  answers: Sequence[Sequence[Any]],
  tools: Sequence[Any] | None = None,
) -> list[Parts | Refused]:
  """Ids of every dialogue, or why the template will not have it.

  Args:
    chat, turns, answers: as in `encode_dialogues`; an answer is a text or a
      message.
    tools: of each dialogue, or None.
  """
  out: list[Parts | Refused] = []
  with progress.bar("tokenize", len(turns)) as tick:
    for i, (asked, said) in enumerate(zip(turns, answers, strict=True)):
      more = {} if not tools or not tools[i] else dict(tools=tools[i])
      try:
        out.append(_parts(chat.tok, *chat.encode(asked, said, **more)))
      except Refused as error:
        out.append(error)
      if i % _CHUNK == _CHUNK - 1:
        tick(_CHUNK)
  return out


def parts_of_texts(
  tok: Tokenizer,
  prompts: Sequence[str],
  sides: Sequence[Sequence[str]],
  special: bool = False,
) -> list[Parts | Refused]:
  """Ids of every row of texts.

  Args:
    tok: the tokenizer.
    prompts: n texts.
    sides: R lists of n answers.
    special: special tokens that are spelt out in a text are those tokens.
  """
  if any(len(side) != len(prompts) for side in sides):
    raise ValueError(
      f"{len(prompts)} prompts, but {[len(side) for side in sides]} responses"
    )
  heads_of, tails_of = tok.encode_many, tok.encode_responses
  if special:
    heads_of = tails_of = lambda texts: [tok.encode_rendered(t) for t in texts]
  out: list[Parts | Refused] = []
  with progress.bar("tokenize", len(prompts)) as tick:
    for first in range(0, len(prompts), _CHUNK):
      part = slice(first, first + _CHUNK)
      heads = heads_of(prompts[part])
      tails = [tails_of(side[part]) for side in sides]
      out += [
        _parts(tok, head[head[:1] == [tok.bos] :] if special else head, answers)
        for head, answers in zip(heads, zip(*tails))
      ]
      tick(len(heads))
  return out


def _parts(
  tok: Tokenizer, prompt: Sequence[int], answers: Sequence[Sequence[int]]
) -> Parts:
  return Parts(
    np.array(prompt, np.int32),
    [
      np.array(
        [*answer, *[tok.eos] * (not len(answer) or answer[-1] != tok.eos)],
        np.int32,
      )
      for answer in answers
    ],
  )


def needed(tok: Tokenizer, parts: Iterable[Parts | Refused]) -> np.ndarray:
  """Tokens that every row takes whole, its longest answer; int64 [n]."""
  bos = tok.bos >= 0
  return np.array(
    [
      bos + len(p.prompt) + max(map(len, p.answers))
      for p in parts
      if not isinstance(p, Refused)
    ],
    np.int64,
  )


def context_for(sizes: np.ndarray, most: int, share: float = _KEPT) -> int:
  """The least context, in steps of 8 tokens, that keeps a share of the rows.

  Args:
    sizes: [n] tokens, see `needed`.
    most: what the model was made for.
    share: of the rows, at least.
  """
  if not len(sizes):
    return min(LEAST_CONTEXT, most)
  at = max(0, int(np.ceil(share * len(sizes))) - 1)
  return int(min(most, max(16, -(-int(np.sort(sizes)[at]) // 8) * 8)))


def place(
  tok: Tokenizer,
  parts: Sequence[Parts | Refused],
  names: Sequence[str],
  context: int,
  too_long: str = "drop",
  *,
  history: bool = False,
  special: bool = False,
) -> tuple[TokenRows, dict[str, Any], dict[int, Refused]]:
  """Rows of ids: the BOS, the prompt, an answer and its EOS.

  Args:
    tok: for its BOS and EOS.
    parts: n rows.
    names: what the R answers are called in the report.
    context: most tokens of a row.
    too_long: "cut_answer" cuts an answer on the right, "cut" before that the
      question on the left, for both sides alike; else the row is left out, and
      so is, but for "cut", one whose question leaves no room for an answer.
    history, special: see `audit`.

  Returns:
    The rows; the report; and why each of those left out was.
  """
  bos = [tok.bos] if tok.bos >= 0 else []
  if context < LEAST_CONTEXT:
    raise ConfigError(
      f"a context of {context} tokens holds no prompt and "
      f"response, wanted {LEAST_CONTEXT} or more; set "
      "config.model.context"
    )
  ids, start, cut, refused = [], [], [], {}
  least = KEEP_PROMPT if too_long == "cut" else 1 << 40
  for i, part in enumerate(parts):
    if isinstance(part, Refused):
      refused[i] = part
      continue
    head, answers = part
    longest = max(map(len, answers))
    keep = min(
      len(head), max(context - len(bos) - longest, min(least, len(head)))
    )
    room = context - len(bos) - keep
    if longest > room and (too_long not in ("cut", "cut_answer") or room < 1):
      refused[i] = Refused(
        "too long" if too_long != "cut_answer" else "question too long",
        f"{len(bos) + len(head) + longest:,} tokens, "
        f"{len(bos) + len(head):,} of them the question; the context has "
        f"{context:,}",
      )
      continue
    if len(answers) == 2 and np.array_equal(
      answers[0][:room], answers[1][:room]
    ):
      refused[i] = Refused(
        "identical after truncation" if longest > room else "identical tokens",
        "chosen and rejected",
      )
      continue
    if not bos and not len(head):
      refused[i] = Refused(
        "empty prompt",
        "and the tokenizer has no BOS: nothing to predict the first token from",
      )
      continue
    prompt = np.concatenate([np.array(bos, np.int32), head[len(head) - keep :]])
    for answer in answers:
      ids.append(np.concatenate([prompt, answer[:room]]))
      start.append(len(prompt))
      cut.append((len(head) - keep, max(0, len(answer) - room)))
  offsets = np.cumsum([0] + [len(row) for row in ids], dtype=np.int64)
  cuts = np.array(cut, np.int64).reshape(-1, 2)
  rows = TokenRows(
    np.concatenate(ids) if ids else np.zeros(0, np.int32),
    offsets,
    np.array(start, np.int32),
    cuts.sum(1).astype(np.int32),
  )
  audit(tok, rows, context, cut=cuts[:, 1], history=history, special=special)
  report = _report(rows, cuts, list(names), context)
  report["prompts_refused"] = len(refused)
  report["too_long"] = sum(
    r.reason in ("too long", "question too long") for r in refused.values()
  )
  report["fits"] = context_for(needed(tok, parts), 1 << 40)
  return rows, report, refused


def audit(
  tok: Tokenizer,
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
  }
  if not special:
    wrong["ended though cut, or not though whole"] = ended == (
      (rows.cut if cut is None else cut) > 0
    )
    wrong["an EOS inside"] = count(is_eos & answer) != ended
  if tok.bos >= 0:
    is_bos = rows.ids == tok.bos
    wrong["without a BOS"] = ~is_bos[rows.offsets[:-1]]
    if tok.bos != tok.eos and not special and not history:
      wrong["a BOS inside"] = count(is_bos & (place > 0)) > 0
  if not history and not special and tok.bos != tok.eos:
    wrong["an EOS in the prompt"] = count(is_eos & ~answer) > 0
  for what, where in wrong.items():
    if where.any():
      i = int(np.flatnonzero(where)[0])
      raise DataError(
        f"token row {i}: {what} ({int(where.sum())} rows; "
        f"{rows.ids[rows.offsets[i] :][:8].tolist()}...); set "
        "config.data.template or config.model.tokenizer"
      )


def _report(
  rows: TokenRows, cuts: np.ndarray, sides: list[str], context: int
) -> dict[str, Any]:
  """Rows and tokens cut; the prompt that two sides share counts once."""
  n, r = len(rows.start), len(sides)
  by_side = dict(prompt=cuts[::r, 0]) | {
    side: cuts[k::r, 1] for k, side in enumerate(sides)
  }
  return dict(
    rows=n,
    tokens=len(rows.ids),
    context=context,
    rows_cut=int((rows.cut > 0).sum()),
    rows_cut_by_side={side: int((x > 0).sum()) for side, x in by_side.items()},
    tokens_cut_by_side={side: int(x.sum()) for side, x in by_side.items()},
  )


def summary(name: str, report: dict[str, Any]) -> str:
  """One line of a report: what of a split was too long for the context."""
  parts = [f"{name}: {report['rows']:,} rows of {report['tokens']:,} tokens"]
  if report["rows_cut"]:
    sides = ", ".join(
      f"{side} {report['rows_cut_by_side'][side]:,} ({lost:,} tokens)"
      for side, lost in report["tokens_cut_by_side"].items()
      if lost
    )
    parts.append(f"cut: {sides}")
  if report["too_long"]:
    parts.append(
      f"{report['too_long']:,} too long for the context of "
      f"{report['context']:,} and left out"
    )
  if report["rows_cut"] or report["too_long"]:
    parts.append(f"a context of {report['fits']:,} keeps 99 % whole")
  return ", ".join(parts)


def lengths(rows: TokenRows) -> np.ndarray:
  """Tokens in each row, int64 [n]."""
  return np.diff(rows.offsets)


def pad(
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


def take(rows: TokenRows, index: np.ndarray) -> TokenRows:
  """Rows `index` [m] alone, in that order."""
  index = np.asarray(index, np.int64)
  sizes = lengths(rows)[index]
  offsets = np.concatenate([[0], np.cumsum(sizes)])
  ids = [rows.ids[rows.offsets[i] : rows.offsets[i + 1]] for i in index]
  return TokenRows(
    np.concatenate(ids) if ids else np.zeros(0, np.int32),
    offsets,
    rows.start[index],
    rows.cut[index],
  )


def shorten(rows: TokenRows, sizes: np.ndarray) -> TokenRows:
  """The first `sizes` [n] tokens of every row, at most all of them."""
  kept = np.minimum(sizes, lengths(rows))
  row = np.repeat(np.arange(len(kept)), lengths(rows))
  place = np.arange(len(rows.ids)) - rows.offsets[row]
  return TokenRows(
    rows.ids[place < kept[row]],
    np.concatenate([[0], np.cumsum(kept)]),
    rows.start,
    rows.cut + lengths(rows) - kept,
  )


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
    np.save(
      buffer,
      np.ascontiguousarray(getattr(rows, field), kind),
      allow_pickle=False,
    )
    artifacts.write_bytes(
      epath.Path(folder) / f"{name}.{field}.npy", buffer.getvalue()
    )


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
      raise CorruptError(
        f"token file {path} cannot be read: {error}; delete "
        "it and run the data stage again"
      ) from error
    if array.ndim != 1 or array.dtype != kind:
      raise CorruptError(
        f"token file {path} is {array.dtype}"
        f"{list(array.shape)}, wanted {kind.__name__} [n]; "
        "delete it and run the data stage again"
      )
    arrays[field] = array
  rows = TokenRows(**arrays)
  n = len(rows.start)
  if (
    len(rows.offsets) != n + 1
    or len(rows.cut) != n
    or rows.offsets[0]
    or rows.offsets[-1] != len(rows.ids)
  ):
    raise CorruptError(
      f"token files {folder}/{name}.*.npy do not fit each "
      f"other ({n} rows, {len(rows.ids)} tokens); delete "
      "them and run the data stage again"
    )
  return rows
