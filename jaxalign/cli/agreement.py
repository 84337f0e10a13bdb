r"""Agreement of raters and judges: `python -m jaxalign.agreement`.

  python -m jaxalign.agreement --data=votes.csv --output=page.html
  python -m jaxalign.agreement --data=humans.json --data=judge.json \
    --judges=gpt-4 --humans=annotator1,annotator2
  python -m jaxalign.agreement --data=votes.csv --raters=ann,ben \
    --choice="{'first': [1], 'second': [0]}"

Reads any table (.jsonl, .json, .csv, .parquet, .gz) with one verdict a row
(item, first, second, rater, verdict), one row an item (a column for each
rater), or a judge's file with both orders; prints how each column was read,
Cohen's kappa, Scott's pi and Krippendorff's alpha with 95 % intervals, how
often a verdict outlives a change of order, and how often the longer answer
wins. A code whose meaning is not certain is never guessed: set --choice.
Of a config (--config=...), data.source, data.choice and data.fields are read as
for selecting. Exit codes as of jaxalign.main.
"""

import collections
from collections.abc import Sequence
import re
from typing import Any

from jaxalign.cli.parse import parse_config, parse_flags
from jaxalign.core import disk, progress
from jaxalign.core.errors import ConfigError, WriteError
from jaxalign.core.exits import guarded
from jaxalign.data import sources
from jaxalign.eval import interrater, rating_codes, rating_layouts
from jaxalign.eval.rating_tables import RatingTable, read_ratings
from jaxalign.report import raters_page, terminal

# What a pair's fields are called here: there, first and second are texts.
_FIELDS = dict(
  id="item",
  prompt="prompt",
  first="first_text",
  second="second_text",
  choice="verdict",
)
_TEXT = dict(
  output="A page (.html), or the numbers (.json); none by default.",
  choice="What codes mean: a dict with first, second and tie; `labels`: "
  "compare labels as they stand; `names`: a verdict is the winner's name.",
  fields="Columns of other names: a dict of item, prompt, first, second, "
  "first_text, second_text, rater and verdict.",
)
_LISTS = dict(
  raters="Columns that hold verdicts, one for each rater.",
  judges="Raters to be compared with the humans, or files of theirs.",
  humans="Raters whose majority is the truth, or files of theirs.",
)
_FILES = "A file or a glob; may be repeated: files are joined by item."
_RATERS = 100  # shown one by one, those with most verdicts


def parse(argv: list[str]) -> Any:
  """The flags; a wrong one raises ConfigError."""
  rows = [("multi_string", "data", [], _FILES)]
  rows += [("string", name, None, words) for name, words in _TEXT.items()]
  rows += [("list", name, [], words) for name, words in _LISTS.items()]
  config = [a for a in argv[1:] if re.match("--?config[.=]", a)]
  values = parse_flags([a for a in argv if a not in config], __doc__, rows)
  if config:  # what no flag sets
    data = parse_config([argv[0], *config], __doc__).config.data.to_dict()
    source = data["source"]
    if source != "world" and not values.data:
      values.data = [source] if isinstance(source, str) else list(source)
    if data["choice"] and not values.choice:
      values.choice = str(data["choice"])
    fields = {_FIELDS[k]: v for k, v in data["fields"].items() if k in _FIELDS}
    if fields and not values.fields:
      values.fields = str(fields)
  if values.output and not values.output.endswith((".html", ".json")):
    raise ConfigError(f"--output={values.output}, wanted a .html or a .json")
  return values


def _named(values: Any, flag: str, table: RatingTable, known: list[str]):
  """The raters that --judges or --humans names, those of its files as well."""
  given = [name for name in values[flag].value if name]
  files = [name for name in given if name.endswith(sources.EXTENSIONS)]
  names = [name for name in given if name not in files]
  for name in names:
    if name not in known:
      raise ConfigError(
        f"--{flag}={name}: no such rater; the tables have "
        f"{', '.join(known[:20])}"
      )
  other = {"judges": "human", "humans": "judge"}[flag]
  paths = {p for name in files for p in sources.source_files(name) or [name]}
  for file in table.files:
    if file["name"] in paths:
      names += [r for r in file["raters"] if table.roles.get(r) != other]
  return list(dict.fromkeys(names))


def _sides(values: Any, table: RatingTable) -> tuple[list[str], list[str]]:
  """Judges and humans: as the flags have it, else as the layouts do."""
  known = list(dict.fromkeys([*(r.rater for r in table.rows), *table.votes]))
  judges, humans = (
    _named(values, flag, table, known) for flag in ("judges", "humans")
  )
  if twice := set(judges) & set(humans):
    raise ConfigError(
      f"{', '.join(sorted(twice))}: a judge and a human; set "
      "--judges or --humans"
    )
  given = [*judges, *humans]
  if given and table.votes:
    raise ConfigError(
      "--judges and --humans compare verdicts, and "
      "--choice=labels reads none; set --choice to what the codes mean"
    )
  rest = [r for r in known if r not in given]
  others = rest if given else []
  of = lambda role: [r for r in rest if table.roles.get(r) == role] or others
  judges, humans = judges or of("judge"), humans or of("human")
  if not given:  # only judges that can be compared
    pair = lambda r: (r.item, *sorted((r.first, r.second)))
    truth = {pair(r) for r in table.rows if r.rater in humans}
    shared = {r.rater for r in table.rows if pair(r) in truth}
    judges = [j for j in judges if j in shared]
  return (judges, humans) if judges and humans else ([], [])


def measure(
  table: RatingTable, judges: Sequence[str], humans: Sequence[str]
) -> dict[str, Any]:
  """All numbers of a table.

  Args:
    table: as from `rating_tables.read_ratings`.
    judges: raters compared with the majority of the humans; may be none.
    humans: may be none.

  Returns:
    {"files", "raters": one dict each, "more": raters left out of it, "among":
    `interrater.among` of all, "judged": `interrater.judged` or None, "labels":
    whether labels were compared as they stand}.
  """
  rows = collections.defaultdict(list)
  for row in table.rows:
    rows[row.rater].append(row)
  winners = {r: interrater.settle_orders(rows[r], r) for r in rows}
  votes = table.votes or {
    r: interrater.labels(w, "drop") for r, w in winners.items()
  }
  count = lambda r: len(rows[r]) if r in rows else len(votes[r])
  kept = sorted(votes, key=lambda r: -count(r))[:_RATERS]
  raters = []
  for name in sorted(kept, key=list(votes).index):
    role = "judge" if name in judges else "human" if name in humans else ""
    one = dict(name=name, verdicts=count(name), pairs=len(votes[name]))
    raters.append(one | dict(role=role))
    if name in rows:
      verdicts, lengths = [row.verdict for row in rows[name]], None
      if table.sizes:
        lengths = interrater.length_bias(winners[name], table.sizes)
      raters[-1] |= dict(
        unparsable=verdicts.count(None),
        ties=verdicts.count("tie"),
        orders=interrater.order_effects(rows[name], name),
        lengths=lengths,
      )
  judged = None
  if judges and humans and table.rows:
    judged = interrater.judged(table.rows, judges, humans, table.sizes or None)
  return dict(
    files=table.files,
    raters=raters,
    more=len(votes) - len(kept),
    among=interrater.among(votes),
    judged=judged,
    labels=bool(table.votes),
  )


def run(argv: list[str]) -> None:
  """Reads the tables, prints the numbers, and writes the page."""
  values = parse(argv)
  choice = rating_codes.parse_choice(values.choice)
  fields = rating_layouts.parse_fields(values.fields)
  files = list(values.data)
  for flag in ("judges", "humans"):
    names = values[flag].value
    files += [n for n in names if n.endswith(sources.EXTENSIONS)]
  if not files:
    raise ConfigError("no table; set --data=votes.jsonl")
  raters = list(filter(None, values.raters))
  table = read_ratings(list(dict.fromkeys(files)), choice, raters, fields)
  progress.say(terminal.reading_text(table.files))
  numbers = measure(table, *_sides(values, table))
  progress.say(terminal.agreement_text(numbers))
  if path := values.output:
    try:
      if path.endswith(".json"):
        disk.write_json(path, numbers)
      else:
        page = raters_page.agreement_html(numbers)
        disk.write_bytes(path, page.encode())
    except WriteError as error:
      message = str(error).replace("--workdir", "--output")
      raise WriteError(message) from error
    progress.say(f"\npage: {path}")


def main(argv: list[str]) -> int:
  """Returns the exit code; one line on stderr names the mistake."""
  return guarded(lambda: run(argv))
