"""The live page in a real browser: headless Chromium over a real stack."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from baton.ports import free_port
from tests.deploy.tools import program
from tests.e2e.conftest import HANDS_OFF, SMALL, random_prompt
from tests.e2e.stack import Stack, running_stack
from tests.e2e.test_two_models import two_models

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

KEY = "open sesame"
_FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
_FLAGS += ["--disable-background-networking", "--disable-component-update"]
_WAIT_MS = 20_000
_REFUSED = ("status of 401 (Unauthorized)", "status of 400 (Bad Request)")  # the browser's own remark

OpenPage = Callable[..., Any]


@pytest.fixture(scope="module")
def watched(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Two prefill workers, one decode worker, an admin key."""
    environment = {"BATON_ROUTER_ADMIN_KEY": KEY}
    directory = tmp_path_factory.mktemp("watched")
    options = [*SMALL, *HANDS_OFF, "--prefill", "2"]
    with running_stack(tiny_model, directory, *options, environment=environment) as stack:
        yield stack


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    executable = program("chromium", "chromium")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=executable, args=_FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(watched: Stack, browser: Any) -> Iterator[OpenPage]:
    """A page of /ui; at its end nothing may have gone wrong in it or left this router."""
    with _watched_pages(browser, watched.url) as open_one:
        yield open_one


@contextmanager
def _watched_pages(browser: Any, url: str) -> Iterator[OpenPage]:
    complaints: list[str] = []
    contexts = []

    def open_one(key: str | None = KEY, **options: Any) -> Any:
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(_WAIT_MS)
        page.on("console", lambda m: m.type in ("error", "warning") and complaints.append(m.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda r: r.url.startswith(f"{url}/") or complaints.append(f"asked {r.url}"))
        if key:
            page.add_init_script(f"sessionStorage.setItem('baton.adminKey', {key!r})")
        page.goto(f"{url}/ui")
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert [text for text in complaints if not text.endswith(_REFUSED)] == []


def _wait_live(page: Any) -> None:
    sync_api.expect(page.locator("#connection")).to_have_text("live", timeout=_WAIT_MS)
    sync_api.expect(page.locator(".card.decode")).to_have_count(1, timeout=_WAIT_MS)


def _ask(page: Any, text: str) -> Any:
    """The answer, when it is complete."""
    page.locator("#message").fill(text)
    page.locator("#message").press("Enter")
    answer = page.locator(".message.assistant").last
    sync_api.expect(answer.locator("dl.facts")).to_be_visible(timeout=_WAIT_MS)
    return answer


def _save(page: Any, name: str, tmp_path: Path) -> bytes:
    """Also under $SCREENSHOT_DIR, for whoever wants to look."""
    picture = page.screenshot(path=tmp_path / f"{name}.png", full_page=True)
    if directory := os.environ.get("SCREENSHOT_DIR"):
        (Path(directory) / f"{name}.png").write_bytes(picture)
    return picture


def _facts(answer: Any) -> dict[str, str]:
    names, values = answer.locator("dt").all_inner_texts(), answer.locator("dd").all_inner_texts()
    return dict(zip(names, values, strict=True))


@pytest.fixture(scope="module")
def apart(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Two models behind one router with an admin port: its address, and that of the public port."""
    port = free_port()
    environment = {"BATON_ROUTER_ADMIN_PORT": str(port)}
    with two_models(tiny_model, tmp_path_factory.mktemp("apart"), environment) as stack:
        yield f"http://127.0.0.1:{port}", stack.url


def test_the_page_on_an_admin_port_chats_with_the_model_that_is_chosen(
    apart: tuple[str, str], browser: Any, tmp_path: Path
) -> None:
    url, public_url = apart
    assert httpx.get(f"{public_url}/ui").status_code == 404
    with _watched_pages(browser, url) as open_page:
        page = open_page(key=None, viewport={"width": 1280, "height": 900})
        for model in ("tiny", "llama"):
            _wait_live(page)
            choice = page.locator("#models")
            assert choice.locator("option").all_inner_texts() == ["tiny", "llama"]
            assert choice.input_value() == model
            page.locator("summary").click()
            page.locator("#max-tokens").fill("8")
            facts = _facts(_ask(page, f"Which way does {model} run?"))
            assert facts["tokens"] == "8"
            [worker] = page.locator(".card.decode h3").all_inner_texts()
            assert worker in facts["route"]
            sync_api.expect(page.locator("#ways")).to_contain_text(worker, timeout=_WAIT_MS)
            _save(page, f"admin-port-{model}", tmp_path)
            if model == "tiny":
                choice.select_option("llama")
                page.wait_for_url("**/ui?model=llama")


def test_a_wrong_key_shows_nothing_and_the_right_one_everything(open_page: OpenPage) -> None:
    page = open_page(key=None)
    page.locator("#login").wait_for(state="visible")
    assert page.locator(".card.decode").count() == 0
    page.locator("#admin-key").fill("wrong")
    page.locator("#admin-key").press("Enter")
    sync_api.expect(page.locator("#login-reason")).to_have_text("That key was not right.", timeout=_WAIT_MS)
    page.locator("#admin-key").fill(KEY)
    page.get_by_role("button", name="Show").click()
    _wait_live(page)
    assert page.locator("#login").is_hidden()
    page.reload()
    _wait_live(page)  # the tab remembers


def test_workers_are_shown_with_role_load_and_cache(open_page: OpenPage) -> None:
    page = open_page()
    _wait_live(page)
    assert page.locator(".card.prefill").count() == 2
    assert page.locator(".card h3").all_inner_texts() == ["router", "prefill-0", "prefill-1", "decode-0"]
    card = page.locator(".card.decode")
    sync_api.expect(card).to_contain_text("0 running, 0 waiting", timeout=_WAIT_MS)
    sync_api.expect(card.locator(".numbers")).to_contain_text("/600", timeout=_WAIT_MS)
    assert "of 600" in card.locator(".bar").first.get_attribute("aria-label")


def test_a_chat_says_its_route_its_prefix_hits_and_its_times(open_page: OpenPage) -> None:
    page = open_page()
    _wait_live(page)
    page.locator("summary").click()
    page.locator("#max-tokens").fill("24")
    page.locator("#temperature").fill("0")
    question = "Where does a relay race begin and where does it end? " * 4
    first = _facts(_ask(page, question))
    assert first["route"].startswith("prefill-") and first["route"].endswith("\u2192 decode-0")
    assert re.fullmatch(r"[\d.]+ m?s, [\d.]+ m?s expected", first["TTFT"]), first["TTFT"]
    assert first["TPOT"].endswith("ms")
    assert first["tokens"] == "24"
    page.get_by_role("button", name="New chat").click()
    second = _facts(_ask(page, question))
    assert int(second["cached"].split()[0]) > 0
    sync_api.expect(page.locator("#ways")).to_contain_text("decode-0", timeout=_WAIT_MS)


def test_text_stays_text(open_page: OpenPage) -> None:
    page = open_page()
    _wait_live(page)
    page.locator("summary").click()
    page.locator("#max-tokens").fill("2")
    attack = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    _ask(page, attack)
    assert page.locator(".message.user .text").inner_text() == attack
    assert page.locator("#messages img, #messages script").count() == 0


def test_a_refused_chat_says_why(open_page: OpenPage) -> None:
    page = open_page()
    _wait_live(page)
    page.locator("#message").fill("word " * 6000)
    page.locator("#message").press("Enter")
    failed = page.locator(".message.failed")
    failed.wait_for()
    assert "tokens" in failed.inner_text()
    assert page.locator("#send").is_enabled()


def test_an_answer_can_be_stopped_with_the_keyboard_alone(open_page: OpenPage, watched: Stack) -> None:
    page = open_page()
    _wait_live(page)
    page.locator("#max-tokens").evaluate("box => { box.value = '2000'; }")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # the skip link
    page.keyboard.press("Tab")
    page.locator("#message").focus()
    page.keyboard.type("Run.")
    page.keyboard.press("Enter")
    sync_api.expect(page.locator(".message.assistant .text")).not_to_have_text("", timeout=_WAIT_MS)
    page.locator("#stop").focus()
    page.keyboard.press("Enter")
    sync_api.expect(page.locator("#stop")).to_be_hidden(timeout=_WAIT_MS)
    sync_api.expect(page.locator("#num-in-flight")).to_have_text("0", timeout=_WAIT_MS)
    watched.assert_no_block_is_lost()


@contextmanager
def _traffic(stack: Stack, seed: int) -> Iterator[None]:
    """Prompts that no cache holds as a whole, with a common beginning."""
    prompts = [random_prompt(1, 100) + random_prompt(100 * seed + i, 60) for i in range(12)]
    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(stack.output_ids, prompt, 24) for prompt in prompts]
        yield
        for each in running:
            assert len(each.result()) == 24


def test_traffic_is_seen_as_hand_offs_latencies_and_expert_load(
    open_page: OpenPage, watched: Stack, tmp_path: Path
) -> None:
    page = open_page(viewport={"width": 1280, "height": 900})
    _wait_live(page)
    with _traffic(watched, 1):
        sync_api.expect(page.locator("#links path.handoff.used").first).to_be_attached(timeout=_WAIT_MS)
        page.locator("#links .baton, #links .prompt-dot").first.wait_for(state="attached")
        sync_api.expect(page.locator("#heat-map")).to_be_visible(timeout=_WAIT_MS)
        sync_api.expect(page.locator(".chart .now").first).to_contain_text("p50", timeout=_WAIT_MS)
    assert "times the mean" in page.locator("#expert-summary").inner_text()
    assert float(page.locator("#tokens-per-s").inner_text()) > 0
    assert len(page.locator(".chart path.p50").first.get_attribute("d")) > 5
    chart = page.locator(".chart svg").first
    chart.focus()
    page.keyboard.press("ArrowLeft")
    sync_api.expect(page.locator(".chart .now").first).to_contain_text("ago", timeout=_WAIT_MS)
    _save(page, "desktop", tmp_path)


def test_a_phone_in_the_dark_shows_everything_in_its_width(
    open_page: OpenPage, watched: Stack, tmp_path: Path
) -> None:
    page = open_page(viewport={"width": 360, "height": 740}, color_scheme="dark", is_mobile=True)
    _wait_live(page)
    with _traffic(watched, 2):
        sync_api.expect(page.locator("#heat-map")).to_be_visible(timeout=_WAIT_MS)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    buttons = page.locator("button:visible").all()
    assert buttons and all(button.bounding_box()["height"] >= 32 for button in buttons)
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert sum(map(int, dark.removeprefix("rgb(").removesuffix(")").split(","))) < 120
    assert len(_save(page, "phone-dark", tmp_path)) > 10_000


def test_who_asked_for_less_motion_gets_none(open_page: OpenPage, watched: Stack) -> None:
    page = open_page(reduced_motion="reduce")
    _wait_live(page)
    with _traffic(watched, 3):
        sync_api.expect(page.locator("#links path.handoff.used").first).to_be_attached(timeout=_WAIT_MS)
        assert page.locator("#links .baton, #links .prompt-dot, #links .local-dot").count() == 0


_CONTRASTS = """() => {
  const rgb = (text) => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
  const light = (color) => {
    const linear = (v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = color.map((v) => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const color = getComputedStyle(node).backgroundColor;
      if (color !== "rgba(0, 0, 0, 0)") return rgb(color);
    }
    return [255, 255, 255];
  };
  const nodes = [...document.querySelectorAll("body *")].filter((node) => node.checkVisibility()
    && !node.closest("svg, dialog, .skip") && !node.disabled
    && [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim()));
  return nodes.map((node) => {
    const [a, b] = [light(rgb(getComputedStyle(node).color)), light(behind(node))];
    return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), node.outerHTML.slice(0, 80)];
  });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_from_what_is_behind_it(open_page: OpenPage, scheme: str) -> None:
    page = open_page(color_scheme=scheme)
    _wait_live(page)
    contrasts = page.evaluate(_CONTRASTS)
    assert len(contrasts) > 20
    assert [pair for pair in contrasts if pair[0] < 4.5] == []


def test_every_control_has_a_name(open_page: OpenPage) -> None:
    page = open_page()
    _wait_live(page)
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input, textarea, [role=img], [tabindex='0']")]
          .filter((node) => node.checkVisibility() && !node.labels?.length && !node.textContent.trim()
            && !node.getAttribute("aria-label") && !node.getAttribute("aria-labelledby"))
          .map((node) => node.outerHTML)"""
    )
    assert nameless == []
