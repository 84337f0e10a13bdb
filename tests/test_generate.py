"""The command line over generation: real model, files, refusals."""

import json
import shutil

import pytest

from jaxalign.cli import generate


def run(*flags):
  return generate.main(["generate", *flags])


@pytest.fixture
def stories(shared):
  return f"--checkpoint={shared / 'models/stories260K'}"


def test_the_published_story_is_told(stories, shared, tmp_path):
  out = tmp_path / "out.jsonl"
  assert (
    run(
      stories,
      "--prompt=",
      "--temperature=0",
      "--new_tokens=256",
      "--fsdp=2",
      "--tensor=4",
      "--tile=1",
      f"--output={out}",
    )
    == 0
  )
  row = json.loads(out.read_text())
  wanted = shared / "models/stories260K/greedy_257_tokens.txt"
  assert row["answer"] == " " + wanted.read_text()  # as after a prompt
  assert (row["tokens"], row["ended"]) == (256, False)


def test_a_file_of_prompts_and_one_answer_a_prompt(stories, tmp_path, capsys):
  rows = tmp_path / "in.jsonl"
  rows.write_text(
    '{"prompt": "One day"}\n\n{"messages": [{"role": "user", '
    '"content": "Lily"}]}\n'
  )
  lines = tmp_path / "in.txt"
  lines.write_text("One day\n\nLily\n")
  said = []
  for source, mesh in (
    (rows, ("--fsdp=8",)),
    (lines, ("--fsdp=2", "--tensor=4")),
  ):
    out = tmp_path / f"{source.name}.out"
    assert (
      run(
        stories,
        f"--input={source}",
        f"--output={out}",
        "--tile=1",
        "--new_tokens=12",
        "--top_k=40",
        "--top_p=0.9",
        *mesh,
      )
      == 0
    )
    said.append(
      [json.loads(line)["answer"] for line in out.read_text().splitlines()]
    )
  assert said[0] == said[1] and len(said[0]) == 2
  assert said[0][0] != said[0][1]
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
  said = capsys.readouterr().err
  assert words in said and said.count("\n") == 1


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
  said = capsys.readouterr().err
  assert words in said and "in.jsonl" in said


def answers(tmp_path, *flags):
  out = tmp_path / "said.jsonl"
  assert (
    run(*flags, f"--output={out}", "--tile=1", "--new_tokens=12", "--fsdp=8")
    == 0
  )
  return [json.loads(line) for line in out.read_text().splitlines()]


def test_several_answers_to_a_prompt_are_those_of_its_copies(stories, tmp_path):
  rows = answers(
    tmp_path, stories, "--prompt=One day", "--prompt=Lily", "--answers=3"
  )
  copies = answers(
    tmp_path, stories, *["--prompt=One day"] * 3, *["--prompt=Lily"] * 3
  )
  assert [r["sample"] for r in rows] == [0, 1, 2, 0, 1, 2]
  assert [r["answer"] for r in rows] == [r["answer"] for r in copies]
  assert len({r["answer"] for r in rows}) == 6
  assert all("sample" not in r for r in copies)


def test_the_template_is_the_tokenizers_own_unless_told(shared, tmp_path):
  folder = tmp_path / "model"
  shutil.copytree(shared / "models/stories260K", folder)
  (folder / "chat_template.jinja").write_text(
    "{{ bos_token }}{% for m in messages %}{{ m['role'] + ': ' + m['content']"
    " }}{{ eos_token if m['role'] == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
  )
  ask = lambda *flags: answers(
    tmp_path, f"--checkpoint={folder}", "--temperature=0", *flags
  )[0]["answer"]
  asked = ask("--prompt=Lily")
  assert asked == ask(
    f"--template={folder}/chat_template.jinja", "--prompt=Lily"
  )
  assert asked != ask("--template=none", "--prompt=Lily")


def test_a_prompt_that_does_not_fit_is_named(stories, capsys):
  assert run(stories, "--prompt=a", "--prompt=" + "long " * 600) == 65
  assert "prompt 2 has" in capsys.readouterr().err
