"""The page of TRL's options: no name, default or option of TRL is missing.

`jaxalign/train/README.md` is read as a person reads it, against TRL's own
dataclasses, our config and our losses.
"""

import ast
import dataclasses
import functools
import inspect
import re

from conftest import ROOT
import ml_collections
import pytest

from configs import common
from jaxalign.train.losses import find, LOSSES

# torch, transformers and trl warn of their own futures.
pytestmark = pytest.mark.filterwarnings("ignore")

PAGE = ROOT / "jaxalign" / "train" / "README.md"
MAPPED = ["TRL", "its default", "ours", "our default", "what differs"]
ALONE = ["TRL", "its default", "why"]
NAMES = ["TRL's loss", "ours"]


@functools.lru_cache
def tables():
  """{head of the columns: rows of cells}, tables of one head joined."""
  found, head = {}, None
  for line in PAGE.read_text().splitlines():
    if not line.startswith("|"):
      head = None
      continue
    cells = [x.strip() for x in line.strip().strip("|").split("|")]
    if head is None:
      head = tuple(cells)
      found.setdefault(head, [])
    elif set("".join(cells)) != {"-"}:
      assert len(cells) == len(head), line
      found[head].append(cells)
  return found


def code(cell):
  """`x` -> x; an empty cell stays one."""
  assert cell == "" or re.fullmatch(r"`[^`]+`", cell), cell
  return cell.strip("`")


@functools.lru_cache
def options():
  """{config's name: {field: default}} of TRL's two configs, and of their
  parent's."""
  pytest.importorskip("torch")
  trl = pytest.importorskip("trl")
  import transformers

  def of(cls):
    return {
      f.name: f.default
      if f.default_factory is dataclasses.MISSING
      else f.default_factory()
      for f in dataclasses.fields(cls)
    }

  return {
    c.__name__: of(c)
    for c in (trl.DPOConfig, trl.KTOConfig, transformers.TrainingArguments)
  }


def own(config):
  """What TRL adds, or gives another default than transformers does."""
  base = options()["TrainingArguments"]
  return {
    n
    for n, v in options()[config].items()
    if n not in base or repr(base[n]) != repr(v)
  }


def rows():
  """(name of a config or "", option, its default) of every row."""
  for head in (MAPPED, ALONE):
    for cells in tables()[tuple(head)]:
      config, _, name = code(cells[0]).rpartition(".")
      yield config, name, code(cells[1])


def test_the_page_has_these_tables_and_no_others():
  assert set(tables()) == {tuple(x) for x in (MAPPED, ALONE, NAMES)}
  named = [(c, n) for c, n, _ in rows()]
  assert len(named) == len(set(named))


def test_every_row_is_an_option_of_trl_with_its_default():
  both = {n: options()[n] for n in ("DPOConfig", "KTOConfig")}
  for config, name, default in rows():
    having = [x for n, x in both.items() if name in x and config in ("", n)]
    assert having, f"TRL has no {config or 'option'} {name}"
    other = [n for n, _, _ in rows() if n and n != config and _ == name]
    for fields in having:
      if config or not any(n == name and c for c, n, _ in rows()):
        assert ast.literal_eval(default) == fields[name], (config, name, other)


@pytest.mark.parametrize("config", ["DPOConfig", "KTOConfig"])
def test_no_option_that_trl_adds_is_missing(config):
  """One that both have with the same default needs one row."""
  missing = own(config) - {n for c, n, _ in rows() if c in ("", config)}
  assert not missing


def knob_of(c, name):
  """The default of a knob; a KeyError where there is none."""
  for part in name.split("."):
    c = c[part]
  return tuple(c) if isinstance(c, list) else c


def test_every_knob_of_ours_is_in_the_config():
  """One of `loss.kwargs` is a keyword of a loss."""
  c = common.base()
  keywords = {
    p.name
    for fn in LOSSES.values()
    for p in inspect.signature(fn).parameters.values()
    if p.kind == p.KEYWORD_ONLY
  }
  for _, _, ours, default, words in tables()[tuple(MAPPED)]:
    name, default = code(ours), code(default)
    if not name:
      assert words and not default  # no knob: what happens is explained
      continue
    section, _, last = name.rpartition(".")
    if section == "loss.kwargs" and not default:
      assert last in keywords, name
      continue
    value = knob_of(c, name)
    assert not isinstance(value, ml_collections.ConfigDict), name
    assert value == ast.literal_eval(default), name
  text = re.sub(r"^\|.*$", "", PAGE.read_text(), flags=re.M)
  named = re.findall(
    r"(?:--config\.|`)((?:%s)\.\w[\w.]*)"
    % "|".join(
      n for n, v in c.items() if isinstance(v, ml_collections.ConfigDict)
    ),
    PAGE.read_text(),
  )
  assert len(named) > 40 and "train.ema" in text
  for name in named:
    if (
      not name.startswith("loss.kwargs.")
      or knob_of(c, "loss.kwargs").get(name.split(".")[-1]) is not None
    ):
      knob_of(c, name)
    else:
      assert name.split(".")[-1] in keywords, name


def test_every_loss_of_trl_has_a_name_of_ours():
  """TRL's own lists, as its help and its choices have them."""
  trl = pytest.importorskip("trl")
  fields = lambda c: {f.name: f.metadata for f in dataclasses.fields(c)}
  named = re.findall(r"`'(\w+)'`", fields(trl.DPOConfig)["loss_type"]["help"])
  wanted = {*named, *fields(trl.KTOConfig)["loss_type"]["choices"]}
  found = {code(a): code(b) for a, b in tables()[tuple(NAMES)]}
  assert len(named) >= 15 and set(found) == wanted
  assert set(found.values()) <= set(LOSSES)
  find("0.8*dpo+0.2*bco_pair+sft_tokens")  # as the page writes it


def test_a_row_too_many_or_too_few_is_seen(monkeypatch):
  """The checks above, on a page that is wrong."""
  page = PAGE.read_text()
  for old, put, check in (
    (
      "| `ld_alpha` |",
      "| `ld_beta` |",
      test_every_row_is_an_option_of_trl_with_its_default,
    ),
    (
      "| `discopop_tau` | `0.05` |",
      "| `discopop_tau` | `0.06` |",
      test_every_row_is_an_option_of_trl_with_its_default,
    ),
    (
      "| `use_weighting` |",
      "| `seed` |",
      functools.partial(test_no_option_that_trl_adds_is_missing, "DPOConfig"),
    ),
    (
      "`train.ref_mix`",
      "`train.ref_mixed`",
      test_every_knob_of_ours_is_in_the_config,
    ),
    (
      "| `nca_pair` | `nca` |",
      "| `nca_pair` | `nce` |",
      test_every_loss_of_trl_has_a_name_of_ours,
    ),
  ):
    assert page.count(old) == 1, old

    class Changed:
      read_text = staticmethod(lambda: page.replace(old, put))

    with monkeypatch.context() as m:
      m.setitem(globals(), "PAGE", Changed)
      tables.cache_clear()
      with pytest.raises((AssertionError, KeyError)):
        check()
  tables.cache_clear()
