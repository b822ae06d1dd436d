"""The page as a reader's browser shows it: every figure drawn, nothing fetched, nothing cut off, nothing injected."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page

from ranksure.report import write_report
from ranksure.report.page import LARGEST
from tests.processes import PATIENCE
from tests.report import records
from tests.report.chromium import chromium

SIZES = [(400, "light"), (400, "dark"), (1400, "light"), (1400, "dark")]
EVIL = "<script>window.pwned=1</script>\"'><img src=http://evil.test/x onerror=window.pwned=1></svg>{{7*7}}$x^2$&amp;"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def page_of_all(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(records.write_all(tmp_path_factory.mktemp("all")))


@dataclass
class Seen:
    """A page, and what happened while it was open."""

    page: Page
    context: BrowserContext
    messages: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


def opened(browser: Browser, path: Path, width: int = 1400, scheme: Any = "light", **settings: Any) -> Seen:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, **settings)
    context.set_default_timeout(1000 * PATIENCE)
    page = context.new_page()
    seen = Seen(page, context)
    page.on("console", lambda message: seen.messages.append(message.text))
    page.on("pageerror", lambda error: seen.messages.append(str(error)))
    page.on("request", lambda request: seen.requests.append(request.url))
    page.goto(path.as_uri(), wait_until="load")
    return seen


@pytest.mark.parametrize(("width", "scheme"), SIZES)
def test_a_page_of_every_kind_is_whole(browser: Browser, page_of_all: Path, width: int, scheme: str) -> None:
    seen = opened(browser, page_of_all, width, scheme)
    page = seen.page
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")

    assert seen.messages == []
    assert [url for url in seen.requests if url not in (page_of_all.as_uri(), "data:,")] == []

    # Every figure is drawn once, in the drawing for this width, and no text leaves its drawing.
    figures = page.evaluate(
        """() => [...document.querySelectorAll('figure')].map(figure => {
            const shown = [...figure.querySelectorAll('[role=img]')].filter(d => d.getClientRects().length);
            const svg = shown[0]?.querySelector('svg'), box = svg?.getBoundingClientRect();
            const marks = svg ? [...svg.querySelectorAll('path, use')].map(m => m.getBoundingClientRect()) : [];
            const cut = svg ? [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()])
                .filter(([, r]) => r.left < box.left - 2 || r.right > box.right + 2 || r.top < box.top - 2
                                   || r.bottom > box.bottom + 2).map(([t]) => t) : [];
            return {count: shown.length, wide: shown[0]?.classList.contains('wide'), label: shown[0]?.ariaLabel,
                    width: box?.width, height: box?.height, cut,
                    marks: marks.filter(r => r.width + r.height > 0).length,
                    font: svg ? Math.min(...[...svg.querySelectorAll('text')].map(
                        t => parseFloat(getComputedStyle(t).fontSize) * box.width / svg.viewBox.baseVal.width)) : 0};
        })"""
    )
    assert len(figures) >= 20
    for figure in figures:
        assert figure["count"] == 1 and figure["wide"] == (width > 720)
        assert figure["width"] > 250 and figure["height"] > 60 and figure["marks"] > 0
        assert len(figure["label"]) > 40
        assert figure["cut"] == []
        assert figure["font"] > 8.5  # pixels: readable

    # The page never scrolls sideways; tables do, in a region of their own.
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    wide_children = page.evaluate(
        """w => [...document.body.querySelectorAll('*')].filter(e => e.getBoundingClientRect().right > w + 1
            && !e.closest('.scroll, pre, .skip, svg')).map(e => e.outerHTML.slice(0, 80))""",
        width,
    )
    assert wide_children == []

    tables = page.evaluate(
        """() => [...document.querySelectorAll('table')].map(t => ({
            caption: t.caption?.textContent.trim().length, rows: t.tBodies[0].rows.length,
            heads: [...t.querySelectorAll('thead th')].every(h => h.scope === 'col'),
            sides: [...t.tBodies[0].rows].every(r => r.cells[0].tagName === 'TH' && r.cells[0].scope === 'row'),
            even: [...t.rows].every(r => r.cells.length === t.rows[0].cells.length)}))"""
    )
    assert len(tables) >= len(figures)
    assert all(t["caption"] and t["rows"] and t["heads"] and t["sides"] and t["even"] for t in tables)

    # Dark is dark, and light is light.
    colours = page.evaluate(
        """() => [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]
            .map(c => c.match(/[0-9]+/g).slice(0, 3).reduce((a, b) => a + Number(b), 0) / 765)"""
    )
    assert (colours[0] < 0.2 < 0.8 < colours[1]) if scheme == "dark" else (colours[0] > 0.8 > 0.2 > colours[1])
    seen.context.close()


def test_a_page_is_small_and_its_parts_are_named_once(browser: Browser, page_of_all: Path) -> None:
    assert page_of_all.stat().st_size < LARGEST <= 2_000_000
    seen = opened(browser, page_of_all)
    broken = seen.page.evaluate(
        """() => {
            const ids = [...document.querySelectorAll('[id]')].map(e => e.id);
            const links = [...document.querySelectorAll('a[href], use[href]')].map(a => a.getAttribute('href'));
            const clips = [...document.querySelectorAll('[clip-path]')].map(
                e => e.getAttribute('clip-path').slice(4, -1));
            return {twice: ids.filter((id, n) => ids.indexOf(id) !== n),
                    dead: [...links, ...clips].filter(l => !l.startsWith('#') || !document.getElementById(l.slice(1)))};
        }"""
    )
    assert broken == {"twice": [], "dead": []}
    levels = seen.page.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map(h => Number(h.tagName[1]))")
    assert levels.count(1) == 1 and levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    landmarks = seen.page.evaluate("['main', 'nav', 'header', 'footer'].map(n => document.querySelectorAll(n).length)")
    assert landmarks == [1, 1, 1, 1]
    seen.context.close()


def test_the_answer_comes_first_and_worth_is_labelled(browser: Browser, tmp_path: Path) -> None:
    path = write_report(records.write(tmp_path, "plan.json", records.plan()))
    seen = opened(browser, path)
    page = seen.page
    assert page.title() == "Rank 4 is enough in every target. – ranksure"
    assert page.inner_text("h1") == "Rank 4 is enough in every target."
    assert page.inner_text(".answer p:nth-of-type(2)").startswith("It captures at least 99%")
    first = page.evaluate(
        "document.querySelector('h1').compareDocumentPosition(document.querySelector('.badge')) & 4"  # follows
    )
    assert first
    badges = {
        card.query_selector("h2").inner_text(): [b.inner_text() for b in card.query_selector_all(".head .badge")]
        for card in page.query_selector_all(".card")
        if card.query_selector("figure")
    }
    assert badges["How much of the possible gain does each rank capture?"] == ["Certified"]
    assert badges["How far is the real network from the linearised one?"] == ["Measured"]
    assert all(len(found) == 1 for found in badges.values())
    seen.context.close()


def test_text_of_a_record_never_becomes_markup(browser: Browser, tmp_path: Path) -> None:
    for where, name, record in (
        ("plan", "plan.json", records.plan()),
        ("adapter", "certificate.json", records.certificate()),
        ("lab", "some-claim.json", records.lab()),
        ("reproduce", "training-curves.json", records.reproduce()),
    ):
        for old in ("model.layers.1.self_attn", "train.csv", "someone/some-model", "torch", "rank 1", "setting 0"):
            record = records.renamed(records.renamed(record, old, old + EVIL), "q_proj", "<i>q</i>")
        record |= {"notes": [EVIL], "command": EVIL}
        records.write(tmp_path / where, name, records.renamed(record, "so.", "so. " + EVIL))
    path = write_report(tmp_path)
    for scripts in (True, False):
        seen = opened(browser, path, 400, bypass_csp=True, java_script_enabled=scripts)
        page = seen.page
        assert [url for url in seen.requests if not url.startswith(("file:", "data:"))] == []
        if not scripts:
            assert page.locator("button.copy:visible").count() == 0
            assert "LoraConfig" in page.inner_text("#s1-config")
        else:
            assert seen.messages == []
            assert page.evaluate("window.pwned") is None
            assert page.evaluate("document.scripts.length") == 1
            assert page.evaluate("document.querySelectorAll('[onerror], img[src^=http]').length") == 0
            text = page.evaluate("document.body.textContent")
            assert text.count("<script>window.pwned=1</script>") > 10 and "{{7*7}}" in text
            drawn = page.evaluate("[...document.querySelectorAll('svg text')].map(t => t.textContent).join()")
            assert "<i>q</i>" in drawn and "$x^2$&amp;" in drawn  # as letters
        seen.context.close()


def test_the_keyboard_reaches_and_copies_the_configuration(browser: Browser, tmp_path: Path) -> None:
    path = write_report(records.write(tmp_path, "plan.json", records.plan()))
    seen = opened(browser, path, permissions=["clipboard-read", "clipboard-write"])
    page = seen.page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.evaluate("document.activeElement.getBoundingClientRect().left") >= 0
    page.keyboard.press("Enter")
    reached: list[str] = []
    for _ in range(80):
        page.keyboard.press("Tab")
        focus = page.evaluate(
            """() => { const e = document.activeElement, s = getComputedStyle(e);
                const name = e.dataset.copy ? 'button ' + e.dataset.copy : e.id;
                return [name, s.outlineStyle, parseFloat(s.outlineWidth)]; }"""
        )
        assert focus[1] == "solid" and focus[2] >= 2  # what has the focus shows it
        reached.append(focus[0])
        if focus[0] == "button s1-config":
            page.evaluate("window.setTimeout = () => 0")  # after a time the label would go back
            page.keyboard.press("Enter")
            page.wait_for_function("document.activeElement.textContent === 'Copied'")
        if focus[0] == "s1-config":
            break
    assert "button s1-config" in reached and reached[-1] == "s1-config"
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == page.evaluate("document.getElementById('s1-config').textContent")
    scope: dict[str, Any] = {}
    exec(compile(copied, "copied", "exec"), scope)
    assert scope["lora_config"].r == 4 and scope["lora_config"].rank_pattern == {"^a": 3}
    # Without any script one click marks the block.
    assert page.evaluate("getComputedStyle(document.getElementById('s1-config')).userSelect") == "all"
    seen.context.close()


def test_print_shows_the_wide_drawings_on_white(browser: Browser, page_of_all: Path) -> None:
    seen = opened(browser, page_of_all, 400)
    seen.page.emulate_media(media="print")
    shown = seen.page.evaluate(
        """() => [...document.querySelectorAll('.drawing')].filter(d => d.getClientRects().length)
            .every(d => d.classList.contains('wide'))"""
    )
    assert shown
    assert not seen.page.is_visible("nav") and not seen.page.is_visible("button.copy")
    assert seen.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    seen.context.close()
