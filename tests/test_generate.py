"""The command line over generation: real model, files, refusals."""

import json
import shutil

import pytest

from jaxalign.cli import generate


def run(*flags):
  return generate.main(["generate", *flags])


def answers(tmp_path, *flags):
  out = tmp_path / "answers.jsonl"
  assert run(*flags, f"--output={out}", "--tile=1") == 0
  return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.fixture
def stories(shared):
  return f"--checkpoint={shared / 'models/stories260K'}"


ON_8, ON_4X2 = ("--fsdp=8",), ("--fsdp=2", "--tensor=4")
SHORT = ("--new_tokens=12", *ON_8)


def test_the_published_story(stories, shared, tmp_path):
  flags = ("--prompt=", "--temperature=0", "--new_tokens=256", *ON_4X2)
  (row,) = answers(tmp_path, stories, *flags)
  wanted = shared / "models/stories260K/greedy_257_tokens.txt"
  assert row["answer"] == " " + wanted.read_text()  # as after a prompt
  assert (row["tokens"], row["ended"]) == (256, False)


def test_a_file_of_prompts_and_one_answer_a_prompt(stories, tmp_path, capsys):
  rows, lines = tmp_path / "in.jsonl", tmp_path / "in.txt"
  rows.write_text(
    '{"prompt": "One day"}\n\n{"messages": [{"role": "user", '
    '"content": "Lily"}]}\n'
  )
  lines.write_text("One day\n\nLily\n")
  flags = (stories, "--new_tokens=12", "--top_k=40", "--top_p=0.9")
  of_rows = answers(tmp_path, f"--input={rows}", *flags, *ON_8)
  of_lines = answers(tmp_path, f"--input={lines}", *flags, *ON_4X2)
  texts = [row["answer"] for row in of_rows]
  assert texts == [row["answer"] for row in of_lines]
  assert len(texts) == 2 and texts[0] != texts[1]
  assert "2 answers" in capsys.readouterr().out


@pytest.mark.parametrize(
  "flags,code,words",
  [
    ([], 64, "no model; set --checkpoint"),
    (["--checkpoint=x"], 64, "set either --prompt"),
    (["--checkpoint=x", "--prompt=a", "--input=b"], 64, "set either --prompt"),
    (["--checkpoint=nowhere", "--prompt=a"], 64, "has no config.json"),
    (["--checkpoint=x", "--prompt=a", "--tile=0"], 64, "--tile=0, wanted 1"),
    (["--chekpoint=x"], 64, "Unknown command line flag 'chekpoint'"),
    (["--checkpoint=x", "--prompt=a", "b"], 64, "unexpected argument 'b'"),
    (["--checkpoint=x", "--input=nowhere.jsonl"], 65, "cannot be read"),
  ],
)
def test_a_wrong_flag_is_one_line(flags, code, words, capsys):
  assert run(*flags) == code
  text = capsys.readouterr().err
  assert words in text and text.count("\n") == 1


@pytest.mark.parametrize(
  "flags,words",
  [
    (["--prompt=a", "--new_tokens=512"], "leaves no room"),
    (["--prompt=a", "--top_p=0"], "top_p=0.0, wanted above 0"),
    (["--prompt=a", "--template=llama3"], "the tokenizer has no"),
    (["--prompt=a", "--fsdp=3"], "mesh fsdp=3"),
    (["--prompt=a", "--tensor=3"], "mesh"),
  ],
)
def test_what_cannot_be_generated_is_refused(stories, flags, words, capsys):
  assert run(stories, *flags) == 64
  assert words in capsys.readouterr().err


@pytest.mark.parametrize(
  "line,words",
  [
    ("{", "line 2: no JSON object"),
    ("[]", "line 2: no JSON object"),
    ('{"text": "a"}', "line 2: wanted `prompt`"),
    ('{"messages": [{"role": "user"}]}', "line 2: wanted `prompt`"),
  ],
)
def test_a_bad_line_is_named(stories, tmp_path, line, words, capsys):
  source = tmp_path / "in.jsonl"
  source.write_text('{"prompt": "a"}\n' + line + "\n")
  assert run(stories, f"--input={source}") == 65
  text = capsys.readouterr().err
  assert words in text and "in.jsonl" in text


def test_several_answers_to_a_prompt_are_those_of_its_copies(stories, tmp_path):
  prompts = ("--prompt=One day", "--prompt=Lily")
  rows = answers(tmp_path, stories, *SHORT, *prompts, "--answers=3")
  copies = [prompt for prompt in prompts for _ in range(3)]
  copies = answers(tmp_path, stories, *SHORT, *copies)
  assert [r["sample"] for r in rows] == [0, 1, 2, 0, 1, 2]
  assert [r["answer"] for r in rows] == [r["answer"] for r in copies]
  assert len({r["answer"] for r in rows}) == 6
  assert all("sample" not in r for r in copies)


def test_the_template_is_the_tokenizers_own_by_default(shared, tmp_path):
  folder = tmp_path / "model"
  shutil.copytree(shared / "models/stories260K", folder)
  (folder / "chat_template.jinja").write_text(
    "{{ bos_token }}{% for m in messages %}{{ m['role'] + ': ' + m['content']"
    " }}{{ eos_token if m['role'] == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
  )
  greedy = (f"--checkpoint={folder}", "--temperature=0", "--prompt=Lily")
  answer = lambda *more: answers(tmp_path, *SHORT, *greedy, *more)[0]["answer"]
  own = answer()
  assert own == answer(f"--template={folder}/chat_template.jinja")
  assert own != answer("--template=none")


def test_a_prompt_that_does_not_fit_is_named(stories, capsys):
  assert run(stories, "--prompt=a", "--prompt=" + "long " * 600) == 65
  assert "prompt 2 has" in capsys.readouterr().err
