"""Rows of chats, token for token as transformers has them: a table."""

import json
import pathlib
import re

import pytest
from tokenizers import AddedToken, Tokenizer as Fast

from jaxalign.data.chat import Chat
from jaxalign.data.render import Renderer
from jaxalign.data.schemas.pairs import Refused
from jaxalign.data.tokenizer import load_tokenizer
from test_chat import train_bytes

trl = pytest.importorskip("trl")
transformers = pytest.importorskip("transformers")
FOLDER = pathlib.Path(trl.__file__).parent / "chat_templates"
# Public families, the names of their BOS and EOS, and how many of the dialogues
# below they take; the others they refuse, there and here.
FAMILIES = {
    "cohere": ("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"),
    "cohere2": ("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"),
    "deepseek_r1_distill": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "deepseekv3": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "gemma": ("<bos>", "<eos>"), "gemma3": ("<bos>", "<eos>"),
    "gemma4": ("<bos>", "<turn|>"), "gemma4_v5": ("<bos>", "<turn|>"),
    "glm4moe": (None, "<|endoftext|>"),
    "gptoss": ("<|startoftext|>", "<|return|>"),
    "lfm2": ("<|startoftext|>", "<|im_end|>"),
    "lfm2_2_5": ("<|startoftext|>", "<|im_end|>"),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>"),
    "llama3_1": ("<|begin_of_text|>", "<|eot_id|>"),
    "llama3_2": ("<|begin_of_text|>", "<|eot_id|>"),
    "muse_glimmer": ("<|begin_of_text|>", "<|eot|>"),
    "nemotron_3_nano": ("<s>", "<|im_end|>"),
    "nemotron_3_super": ("<s>", "<|im_end|>"),
    "nemotron_3_5_lightning": ("<s>", "<|im_end|>"),
    "phi3": ("<s>", "<|endoftext|>"), "phi3_5": ("<s>", "<|endoftext|>"),
    "qwen2_5": (None, "<|im_end|>"), "qwen3": (None, "<|im_end|>"),
    "qwen3_5_think": (None, "<|im_end|>"),
    "qwen3_5_nothink": (None, "<|im_end|>"), "qwen3_6": (None, "<|im_end|>"),
    "qwen3_8": (None, "<|im_end|>"),
    "qwen3_instruct_2507": (None, "<|im_end|>"),
    "smolvlm": ("<|im_start|>", "<end_of_utterance>")}
WEATHER = dict(type="function", function=dict(
    name="get_weather", description="The weather of a city.",
    parameters=dict(type="object", required=["city"], properties=dict(
        city=dict(type="string", description="Name of the city.")))))


def call(arguments):
  return [dict(id="call00001", type="function", function=dict(
      name="get_weather", arguments=arguments))]


def said(content, role="assistant", **more):
  return dict(role=role, content=content, **more)


HI, MORE = said(" Hi there, 2+2?\n", "user"), said("And 3\n\nplus 3?", "user")
CALL = said(None, tool_calls=call(dict(city="Oslo")))
RESULT = said('{"degrees": 3}', "tool", name="get_weather",
              tool_call_id="call00001")
THOUGHT = "<think>\nTwo and two\n\nis four.\n</think>\n\nIt is 4."
# name -> (turns, two answers, tools)
DIALOGUES = {
    "single": ([HI], ["Four.", "\n\n 5, I\tguess \n"], None),
    "multi": ([HI, said("Four > 3 <b>"), MORE], ["Six.", "ü 七 👩‍💻"], None),
    "system": ([said("Be short.", "system"), HI], ["4", "It is four"], None),
    "thought": ([HI], [THOUGHT, "Five."], None),
    "two thoughts": ([HI], [THOUGHT, "<think>\n\n</think>\n\nFive."], None),
    "an earlier thought": ([HI, said(THOUGHT), MORE], ["Six.", THOUGHT], None),
    "reasoning key": ([HI, said("4", reasoning_content="Easy."), MORE], [
        said("6", reasoning_content="Harder."), said("7", thinking="Hm")], None),
    "tools": ([HI], ["4", "5"], [WEATHER]),
    "call": ([HI], [CALL, "Five."], [WEATHER]),
    "call as text": ([HI], [said(None, tool_calls=call('{"city": "Oslo"}')),
                            "Five."], [WEATHER]),
    "result": ([HI, CALL, RESULT], ["3 degrees.", "Warm."], [WEATHER]),
    "result without tools": ([HI, CALL, RESULT], ["3.", "Warm."], None),
    "thought, call and result": (
        [HI, dict(CALL, reasoning_content="Look."), RESULT],
        [said("Cold", reasoning_content="3 is cold."), "Warm."], [WEATHER]),
    "call again": ([HI, CALL, RESULT, said("Cold."), MORE], [CALL, "6"],
                   [WEATHER]),
    "two users": ([HI, MORE], ["4, 6", "no"], None),
}
TOKENS = re.compile(
    r"<[|｜/]?[\w▁:-]+[|｜]?>|<\|\"\|>|\[/?[A-Z_]+\]|\[gMASK\]")


@pytest.fixture(scope="module")
def renderer():
  with Renderer() as one:
    yield one


@pytest.fixture(scope="module")
def base():
  """A byte-level BPE that joins blanks and lines, as JSON."""
  return train_bytes(
      ["Hello there, how are you? user assistant model system\n\n It is \n\n\n"
       "<think>\n\n</think>\n\n .\n\n  {\"city\": \"Oslo\"}}\n"] * 9).to_str()


def family(folder, base, name, source, bos, eos, think_special=False):
  """The tokenizer of a template: every token that it writes is one."""
  fast = Fast.from_str(base)
  texts = dict.fromkeys([t for t in (bos, eos) if t] + ["<|endoftext|>"] +
                        TOKENS.findall(source) + ["<think>", "</think>"])
  for text in texts:
    soft = re.fullmatch(r"</?[a-z_]+>", text) and text not in (
        bos, eos, "<start_of_turn>", "<end_of_turn>")
    if soft and think_special and "think" in text:
      soft = False
    fast.add_tokens([AddedToken(text, special=not soft, normalized=False,
                                rstrip=name == "phi3" and text == "<|end|>")])
  folder.mkdir()
  fast.save(str(folder / "tokenizer.json"))
  (folder / "chat_template.jinja").write_text(source, encoding="utf-8")
  (folder / "tokenizer_config.json").write_text(json.dumps(dict(
      tokenizer_class="PreTrainedTokenizerFast", eos_token=eos,
      pad_token="<|endoftext|>", **({"bos_token": bos} if bos else {}))))
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
    assert refused.value.reason in ("template refused it", "template failed")
    assert str(error).split("\n")[0][:200] in refused.value.detail
    return False
  try:
    head, rest = one.encode(turns, answers, tools)
  except Refused as error:
    return error
  bos = [tok.bos] * (tok.bos >= 0)
  for want, ids in zip(wants, rest):
    row = bos + head + ids + [tok.eos] * bool(one._end)
    assert row == want[:len(row)], (peer.decode(row), peer.decode(want))
    left = peer.decode(want[len(row):])
    assert left.strip() in ("", "<|endoftext|>") and (one._end or not left)
    assert peer.decode(ids).strip() or not left
  if not one._header:
    assert bos + one.encode(turns, [], tools)[0] == asks
    assert bos + head == asks[:len(bos + head)]
  return True


@pytest.mark.parametrize("name", FAMILIES)
def test_families(tmp_path, base, renderer, name):
  source = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
  for special in (False, True):
    folder = family(tmp_path / str(special), base, name, source,
                    *FAMILIES[name], special)
    peer = transformers.AutoTokenizer.from_pretrained(folder)
    one = Chat(load_tokenizer(folder), source, renderer=renderer,
               special_tokens="tokens" if special else "text")
    assert len(peer) == one.tok.vocab_size
    out = {}
    for what, dialogue in DIALOGUES.items():
      out[what] = compare(one, peer, *dialogue)
    print(name, special, repr(one._end), one._times, one.tok.bos, one.warnings, sorted(one._guarded))
    for k,v in out.items():
      if v is not True: print("    ", k, v)
