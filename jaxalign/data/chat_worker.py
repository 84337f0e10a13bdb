"""The process that renders chat templates; it is killed when one runs away.

Run as a script, never imported: it reads one JSON request a line and answers
each with one JSON line. It holds no secret, may take a fixed amount of memory,
and can write no file and (unless it is root) start nothing.
"""

import datetime
import json
import resource
import signal
import sys

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox


class Generation(jinja2.ext.Extension):
  """{% generation %} ... {% endgeneration %}: the text between, as it is."""

  tags = {"generation"}

  def parse(self, parser):
    """The block's own statements, as a call that returns their text."""
    line = next(parser.stream).lineno
    body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
    return jinja2.nodes.CallBlock(
      self.call_method("_same"), [], [], body
    ).set_lineno(line)

  def _same(self, caller):
    return caller()


class Namespace(jinja2.utils.Namespace):
  """namespace() that stores no name with an underscore in front."""

  def __init__(*args, **kwargs):  # so that namespace(self=...) works
    self, args = args[0], args[1:]
    values = dict(*args, **kwargs)
    for name in values:
      _plain_name(name)
    jinja2.utils.Namespace.__init__(self, values)

  def __setitem__(self, name, value):
    _plain_name(name)
    jinja2.utils.Namespace.__setitem__(self, name, value)


def _plain_name(name):
  if isinstance(name, str) and name.startswith("_"):
    raise jinja2.exceptions.SecurityError(f"namespace attribute {name!r}")


class Dict:
  """dict() and dict.fromkeys(), and none of the class's attributes."""

  def __call__(self, *args, **kwargs):
    return dict(*args, **kwargs)

  def fromkeys(self, *args, **kwargs):
    """A dict of these keys."""
    return dict.fromkeys(*args, **kwargs)


class Raised(jinja2.exceptions.TemplateError):
  """What a template's own raise_exception raises."""


class TooLong(Exception):
  """More output than the request allows."""


def _raise(message=""):
  raise Raised(str(message)[:300])


def _tojson(value, ensure_ascii=False, **options):
  return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def environment(now):
  """Jinja as transformers sets it up, with `now` for its clock."""
  env = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[Generation, jinja2.ext.loopcontrols],
  )
  env.filters["tojson"] = _tojson
  env.globals.update(
    raise_exception=_raise,
    strftime_now=lambda form: now.strftime(form),
    dict=Dict(),
    namespace=Namespace,
  )
  return env


def render(compiled, request):
  """The text, of at most `cap` characters."""
  parts, size = [], 0
  for part in compiled.generate(**request["values"]):
    size += len(part)
    if size > request["cap"]:
      raise TooLong
    parts.append(part)
  return "".join(parts)


def failure(error):
  """What an error of a template means; a template can raise anything."""
  line = getattr(error, "lineno", 0)
  rows = (
    (MemoryError, "memory", "it wants more memory"),
    (RecursionError, "memory", "it calls itself without end"),
    (TooLong, "length", ""),
    (Raised, "raised", str(error)),
    (jinja2.exceptions.SecurityError, "unsafe", str(error)),
    (jinja2.exceptions.TemplateSyntaxError, "syntax", f"line {line}: {error}"),
    (Exception, "failed", f"{type(error).__name__}: {error}"),
  )
  kind, detail = next(row[1:] for row in rows if isinstance(error, row[0]))
  return dict(kind=kind, detail=detail[:300])


def main():
  """Answers requests until standard input ends."""
  memory, seconds = int(sys.argv[1]), int(sys.argv[3])
  env = environment(datetime.datetime.fromisoformat(sys.argv[2]))
  compiled = {}
  resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
  for what in ("CORE", "FSIZE", "NPROC"):
    resource.setrlimit(getattr(resource, f"RLIMIT_{what}"), (0, 0))
  print('{"ready": true}', flush=True)
  for line in sys.stdin:
    signal.alarm(seconds)  # should nobody be left to kill it
    try:
      request = json.loads(line)
      source = request["source"]
      if source not in compiled:
        compiled = dict(list(compiled.items())[-1:])  # one for tools, too
        compiled[source] = env.from_string(source)
      answer = dict(text=render(compiled[source], request))
    except Exception as error:
      answer = failure(error)
    signal.alarm(0)
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
  main()
