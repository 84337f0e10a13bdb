"""A headless Chromium over the DevTools protocol, with nothing installed.

The browser reads commands from file descriptor 3 and answers on 4, one JSON
text after the other with a zero byte between: no socket, no other library.
"""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
# Puts the two pipes where the browser looks for them, then becomes it.
LAUNCH = """
import fcntl, os, sys
high = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 10) for fd in sys.argv[1:3]]
for fd, wanted in zip(high, (3, 4)):
  os.dup2(fd, wanted)
os.execv(sys.argv[3], sys.argv[3:])
"""


def find():
  """The path of a Chromium, or None."""
  return next(filter(None, map(shutil.which, NAMES)), None)


class Page:
  """One tab; `run` evaluates JavaScript and gives back what it makes."""

  def __init__(self, write, read):
    self.write, self.read = write, read
    self.number, self.rest, self.messages = 0, b"", []
    target = self.call("Target.createTarget", url="about:blank")["targetId"]
    self.session = self.call(
      "Target.attachToTarget", targetId=target, flatten=True
    )["sessionId"]
    self.call("Page.enable")
    self.call("Runtime.enable")
    self.call("Log.enable")

  session = None

  def call(self, method, **params):
    """Sends a command and waits for its answer; notes what the page says."""
    self.number += 1
    message = dict(id=self.number, method=method, params=params)
    if self.session:
      message["sessionId"] = self.session
    os.write(self.write, json.dumps(message).encode() + b"\0")
    end = time.monotonic() + 60
    while True:
      while b"\0" not in self.rest:
        left = end - time.monotonic()
        ready = select.select([self.read], [], [], max(0, left))[0]
        if not ready:
          raise TimeoutError(f"Chromium has not answered {method}")
        part = os.read(self.read, 1 << 20)
        if not part:
          raise ConnectionError("Chromium has ended")
        self.rest += part
      one, self.rest = self.rest.split(b"\0", 1)
      answer = json.loads(one)
      if answer.get("method") in (
        "Runtime.exceptionThrown",
        "Log.entryAdded",
        "Page.javascriptDialogOpening",
      ):
        self.messages.append(answer)
      if answer.get("id") == self.number:
        if "error" in answer:
          raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

  def run(self, code):
    """The value of an expression; a promise is waited for."""
    found = self.call(
      "Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True
    )
    if "exceptionDetails" in found:
      raise RuntimeError(str(found["exceptionDetails"])[:500])
    return found["result"].get("value")

  def wait(self, code, seconds=30):
    """Until an expression is true."""
    end = time.monotonic() + seconds
    while not self.run(code):
      if time.monotonic() > end:
        raise TimeoutError(f"{code} is not true after {seconds} s")
      time.sleep(0.02)

  def open(self, path, width=1280, height=900, dark=False):
    """Loads a file and waits until its script is done."""
    self.call(
      "Emulation.setDeviceMetricsOverride",
      width=width,
      height=height,
      deviceScaleFactor=1,
      mobile=False,
    )
    self.call(
      "Emulation.setEmulatedMedia",
      features=[
        dict(name="prefers-color-scheme", value="dark" if dark else "light")
      ],
    )
    self.call("Page.navigate", url=f"file://{path}")
    self.wait("document.documentElement?.dataset.ready === '1'")

  def click(self, x, y, to=None):
    """A mouse's click at a place in the window, or a drag to another."""

    def send(kind, at, buttons):
      self.call(
        "Input.dispatchMouseEvent",
        type=kind,
        x=at[0],
        y=at[1],
        button="left",
        buttons=buttons,
        clickCount=1,
      )

    send("mouseMoved", (x, y), 0)
    send("mousePressed", (x, y), 1)
    if to:
      send("mouseMoved", to, 1)
    send("mouseReleased", to or (x, y), 0)

  def type(self, selector, words):
    """Puts words into a field as if they were typed."""
    self.run(
      f"document.querySelector({json.dumps(selector)}).focus();"
      f"document.querySelector({json.dumps(selector)}).select()"
    )
    if words:
      self.call("Input.insertText", text=words)
    else:
      for kind in ("keyDown", "keyUp"):
        self.call(
          "Input.dispatchKeyEvent",
          type=kind,
          key="Backspace",
          code="Backspace",
          windowsVirtualKeyCode=8,
        )

  def screenshot(self, path, whole=False):
    """Writes a PNG of the window, or of the whole page."""
    data = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
    with open(path, "wb") as f:
      f.write(base64.b64decode(data["data"]))


@contextlib.contextmanager
def page(path=None):
  """A tab of a Chromium of its own; ended with the block."""
  path = path or find()
  profile = tempfile.mkdtemp(prefix="jaxalign_browser_")
  to_read, to_write = os.pipe()
  from_read, from_write = os.pipe()
  process = subprocess.Popen(
    [
      sys.executable,
      "-c",
      LAUNCH,
      str(to_read),
      str(from_write),
      path,
      "--headless",
      "--no-sandbox",
      "--disable-gpu",
      "--no-first-run",
      "--disable-dev-shm-usage",
      "--hide-scrollbars",
      f"--user-data-dir={profile}",
      "--remote-debugging-pipe",
    ],
    pass_fds=(to_read, from_write),
    stdin=subprocess.DEVNULL,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  os.close(to_read)
  os.close(from_write)
  try:
    yield Page(to_write, from_read)
  finally:
    process.terminate()
    try:
      process.wait(20)
    except subprocess.TimeoutExpired:
      process.kill()
      process.wait()
    os.close(to_write)
    os.close(from_read)
    shutil.rmtree(profile, ignore_errors=True)
