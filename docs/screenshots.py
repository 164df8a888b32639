"""Takes the pictures of /ui in docs/images from a running stack, with some traffic to see.

baton up &    # without BATON_ROUTER_ADMIN_KEY
python docs/screenshots.py http://127.0.0.1:8000 --question "What is a relay race?" --name chat
"""

from __future__ import annotations

import argparse
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from PIL import Image
from playwright.sync_api import Browser, sync_playwright

IMAGES = Path(__file__).resolve().parent / "images"
_FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
_SYSTEM = "You are a patient teacher. Answer in two short sentences, in plain words, without lists."
_QUESTION = "Tell me where {} come from, who first thought about them, and why they matter to us today."
_TOPICS = ("rivers", "bridges", "clocks", "maps", "bees", "tides", "bread", "kites", "glass", "comets")
_VIEWS = {
    "": {"viewport": {"width": 1280, "height": 860}},
    "-dark": {"viewport": {"width": 1280, "height": 860}, "color_scheme": "dark"},
    "-phone": {"viewport": {"width": 360, "height": 740}, "is_mobile": True},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--question", default="What is a relay race?")
    parser.add_argument("--name", default="ui", help="beginning of the file names")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--full", action="store_true", help="the whole page, not one screen of it")
    arguments = parser.parse_args()
    IMAGES.mkdir(exist_ok=True)
    with traffic(arguments.url), sync_playwright() as playwright:
        path = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=path, args=_FLAGS)
        for suffix, options in _VIEWS.items():
            take(browser, arguments, options, IMAGES / f"{arguments.name}{suffix}.png")
        browser.close()
    return 0


def take(browser: Browser, arguments: argparse.Namespace, options: dict, path: Path) -> None:
    page = browser.new_page(**options)
    page.goto(f"{arguments.url}/ui")
    page.locator(".card.decode").first.wait_for()
    page.locator("#max-tokens").evaluate("(box, value) => { box.value = value; }", str(arguments.max_tokens))
    page.locator("#temperature").evaluate("box => { box.value = 0; }")
    page.locator("#message").fill(arguments.question)
    page.locator("#message").press("Enter")
    page.locator(".facts").wait_for(timeout=120_000)
    page.evaluate("document.activeElement.blur()")
    time.sleep(12)  # for lines to draw themselves
    page.locator("#links .baton").first.wait_for(state="attached", timeout=60_000)
    time.sleep(0.3)
    page.screenshot(path=path, full_page=arguments.full)
    Image.open(path).convert("RGB").quantize(160).save(path, optimize=True)  # a third of the bytes
    page.close()


@contextmanager
def traffic(url: str) -> Iterator[None]:
    """Three people who ask one after the other."""
    over = threading.Event()

    def ask(number: int) -> None:
        with httpx.Client(base_url=url, timeout=120) as client:
            turn = number
            while not over.is_set():
                topics = [_TOPICS[(turn * step) % len(_TOPICS)] for step in (1, 3, 7)]
                content = f"It is {time.time():.0f}. " + " ".join(_QUESTION.format(each) for each in topics)
                messages = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": content}]
                client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 24})
                turn += 3
                over.wait(0.4 * number)

    people = [threading.Thread(target=ask, args=(number,)) for number in range(1, 4)]
    for person in people:
        person.start()
    try:
        yield
    finally:
        over.set()
        for person in people:
            person.join()


if __name__ == "__main__":
    sys.exit(main())
