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
wins. A code whose meaning is not certain is never guessed: --choice says it.
Of a config (--config=...), data.source, data.choice and data.fields are read as
for selecting. Exit codes as of jaxalign.main.
"""

import collections
from collections.abc import Sequence
import re
from typing import Any

from jaxalign import main as main_lib
from jaxalign import progress
from jaxalign.errors import ConfigError, WriteError

# What a pair's fields are called here: there, first and second are texts.
_FIELDS = dict(
  id="item",
  prompt="prompt",
  first="first_text",
  second="second_text",
  choice="verdict",
)
_RATERS = 100  # told one by one, those with most verdicts


def parse(argv: list[str]) -> Any:
  """The flags; a wrong one raises ConfigError."""
  from absl import flags

  values = flags.FlagValues()
  flags.DEFINE_multi_string(
    "data",
    [],
    "A file or a glob; may be repeated: files are joined by item.",
    flag_values=values,
  )
  text = dict(
    output="A page (.html), or the numbers (.json); none by default.",
    choice="What codes mean: a dict with first, second and tie; `labels`: "
    "compare labels as they stand; `names`: a verdict is the winner's "
    "name.",
    fields="Columns of other names: a dict of item, prompt, first, second, "
    "first_text, second_text, rater and verdict.",
  )
  for name, words in text.items():
    flags.DEFINE_string(name, None, words, flag_values=values)
  for name, words in dict(
    raters="Columns that hold verdicts, one for each rater.",
    judges="Raters to be held against the humans, or files of theirs.",
    humans="Raters whose majority is the truth, or files of theirs.",
  ).items():
    flags.DEFINE_list(name, [], words, flag_values=values)
  flags.DEFINE_bool("help", False, "Show the flags.", flag_values=values)
  argv = _with_config(argv)
  main_lib.parse_plain(values, argv, __doc__)
  if values.output and not values.output.endswith((".html", ".json")):
    raise ConfigError(f"--output={values.output}, wanted a .html or a .json")
  return values


def _with_config(argv: list[str]) -> list[str]:
  """The flags with those of a config put in this command's own words."""
  config = [a for a in argv[1:] if re.match("--?config[.=]", a)]
  if not config:
    return argv
  d = main_lib._parse([argv[0], *config], __doc__).config.data
  own = [a for a in argv if a not in config]
  has = lambda name: any(re.match(f"--?{name}(=|$)", a) for a in own)
  if d.source != "world" and not has("data"):
    names = [d.source] if isinstance(d.source, str) else list(d.source)
    own += [f"--data={name}" for name in names]
  if d.get("choice") and not has("choice"):
    choice = (
      d.choice
      if isinstance(d.choice, str)
      else {
        k: list(v) if isinstance(v, (list, tuple)) else v
        for k, v in dict(d.choice).items()
      }
    )
    own.append(f"--choice={choice}")
  fields = {_FIELDS[k]: v for k, v in dict(d.fields).items() if k in _FIELDS}
  if fields and not has("fields"):
    own.append(f"--fields={fields}")
  return own


def _files(values: Any) -> dict[str, list[str]]:
  """The files of each flag; what --judges and --humans name beside raters."""
  from jaxalign.data import sources

  found = dict(data=list(values.data))
  for flag in ("judges", "humans"):
    found[flag] = [
      n for n in values[flag].value if n.endswith(sources.EXTENSIONS)
    ]
  if not any(found.values()):
    raise ConfigError("no table; say --data=votes.jsonl")
  return found


def _sides(
  values: Any, files: dict[str, list[str]], table: Any
) -> tuple[list[str], list[str]]:
  """Judges and humans: as told, else as the layouts have it."""
  from jaxalign.data import sources

  known = list(dict.fromkeys([*(r.rater for r in table.rows), *table.votes]))
  out = {}
  for flag, role in (("judges", "judge"), ("humans", "human")):
    mine = {
      where
      for name in files[flag]
      for where in sources.source_files(name) or [name]
    }
    other = "human" if role == "judge" else "judge"
    told = [n for n in values[flag].value if n and n not in files[flag]]
    for name in told:
      if name not in known:
        raise ConfigError(
          f"--{flag}={name}: no such rater; the tables have "
          f"{', '.join(known[:20])}"
        )
    out[role] = list(
      dict.fromkeys(
        told
        + [
          rater
          for file in table.files
          if file["name"] in mine
          for rater in file["raters"]
          if table.roles.get(rater) != other
        ]
      )
    )
  judges, humans = out["judge"], out["human"]
  twice = set(judges) & set(humans)
  if twice:
    raise ConfigError(
      f"{', '.join(sorted(twice))}: a judge and a human; set "
      "--judges or --humans"
    )
  if (judges or humans) and table.votes:
    raise ConfigError(
      "--judges and --humans compare verdicts, and "
      "--choice=labels reads none; give what the codes mean"
    )
  told = judges or humans
  rest = [r for r in known if r not in told]
  of = lambda role: [r for r in rest if table.roles.get(r) == role]
  judges = judges or of("judge") or (rest if told else [])
  humans = humans or of("human") or (rest if told else [])
  if not told:  # nobody asked for a comparison: only where there can be one
    pair = lambda r: (r.item, *sorted((r.first, r.second)))
    truth = {pair(r) for r in table.rows if r.rater in humans}
    shared = {r.rater for r in table.rows if pair(r) in truth}
    judges = [j for j in judges if j in shared]
  return (judges, humans) if judges and humans else ([], [])


def measure(
  table: Any, judges: Sequence[str], humans: Sequence[str]
) -> dict[str, Any]:
  """All numbers of a table.

  Args:
    table: as from `eval.rating_tables.read_ratings`.
    judges: raters held against the majority of the humans; may be none.
    humans: may be none.

  Returns:
    {"files", "raters": one dict each, "more": raters left out of it, "among":
    `eval.interrater.among` of all, "judged": `eval.interrater.judged` or None,
    "labels": whether labels were compared as they stand}.
  """
  from jaxalign.eval import interrater

  rows = collections.defaultdict(list)
  for row in table.rows:
    rows[row.rater].append(row)
  winners = {r: interrater.settle_orders(rows[r], r) for r in rows}
  votes = table.votes or {
    r: interrater.labels(w, "drop") for r, w in winners.items()
  }
  count = lambda r: len(rows[r]) if r in rows else len(votes[r])
  kept = set(sorted(votes, key=lambda r: -count(r))[:_RATERS])
  raters = []
  for name in votes:
    if name not in kept:
      continue
    one = dict(
      name=name,
      verdicts=count(name),
      pairs=len(votes[name]),
      role=("judge" if name in judges else "human" if name in humans else ""),
    )
    if name in rows:
      one |= dict(
        unparsable=sum(r.verdict is None for r in rows[name]),
        ties=sum(r.verdict == "tie" for r in rows[name]),
        orders=interrater.order_effects(rows[name], name),
        lengths=interrater.length_bias(winners[name], table.sizes)
        if table.sizes
        else None,
      )
    raters.append(one)
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
  """Everything after the first line of output."""
  values = parse(argv)
  from jaxalign import artifacts
  from jaxalign.eval import rating_codes, rating_layouts, rating_tables
  from jaxalign.report import raters_page, terminal

  choice = rating_codes.parse_choice(values.choice)
  fields = rating_layouts.parse_fields(values.fields)
  files = _files(values)
  names = list(dict.fromkeys(n for some in files.values() for n in some))
  table = rating_tables.read_ratings(
    names, choice, list(filter(None, values.raters)), fields
  )
  progress.say(terminal.reading_text(table.files))
  found = measure(table, *_sides(values, files, table))
  progress.say(terminal.agreement_text(found))
  if values.output:
    try:
      if values.output.endswith(".json"):
        artifacts.write_json(values.output, found)
      else:
        artifacts.write_bytes(
          values.output, raters_page.agreement_html(found).encode()
        )
    except WriteError as error:
      raise WriteError(str(error).replace("--workdir", "--output")) from error
    progress.say(f"\npage: {values.output}")


def main(argv: list[str]) -> int:
  """Returns the exit code; one line on stderr says what went wrong."""
  return main_lib.guarded(lambda: run(argv))


if __name__ == "__main__":
  main_lib.start(main)
