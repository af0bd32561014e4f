"""The report in a real browser, opened from a folder: it draws, searches, sorts and stays quiet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from made_up_report import HOSTILE, made_up_data

from sae_ext.report import browser, build_report

pytestmark = pytest.mark.slow

PLOTS = 12  # six training curves, L0, tuning, density, cosine, lift, own against control


@contextmanager
def opened(
    chromium: Any, folder: Path, *, width: int = 1400, fragment: str = "", **options: Any
) -> Iterator[Any]:
    """The page, loaded; on leaving, it must not have complained or looked outside its folder."""
    page = chromium.new_page(viewport={"width": width, "height": 900}, **options)
    complaints: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
    page.on("request", lambda request: requests.append(request.url))
    page.goto((folder / "report.html").as_uri() + fragment)
    yield page
    page.close()
    assert complaints == []
    assert [url for url in requests if not url.startswith(("file:", "data:", "blob:"))] == []


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("report"), made_up_data())


def written(folder: Path, data: Any) -> Path:
    for name, content in build_report(data).items():
        (folder / name).write_bytes(content)
    return folder


def visible_ids(page: Any) -> list[int]:
    cells = page.locator("#feature-table tbody tr:visible td:first-child")
    return [int(text) for text in cells.all_inner_texts()]


@pytest.mark.parametrize("width", [1400, 800])
@pytest.mark.parametrize("color_scheme", ["light", "dark"])
def test_it_draws_every_chart_within_the_page(chromium, report, tmp_path, width, color_scheme):
    with opened(chromium, report, width=width, color_scheme=color_scheme) as page:
        page.wait_for_function(f"document.querySelectorAll('.plot .main-svg').length >= {PLOTS}")
        assert page.locator(".js-plotly-plot").count() == PLOTS
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        shot = page.screenshot(path=str(tmp_path / "report.png"), full_page=True)
        assert len(shot) > 50_000


def test_charts_follow_the_appearance(chromium, report):
    with opened(chromium, report, color_scheme="light") as page:
        bar = page.locator("#plot-cosine .point path").first
        light = bar.evaluate("e => getComputedStyle(e).fill")
        page.emulate_media(color_scheme="dark")
        page.wait_for_function(
            "was => getComputedStyle(document.querySelector('#plot-cosine .point path')).fill"
            " !== was",
            arg=light,
        )


def test_search_narrows_the_table(chromium, report):
    with opened(chromium, report) as page:
        everything = visible_ids(page)
        page.fill("#search", "SOCKET host")
        some = visible_ids(page)
        assert 0 < len(some) < len(everything)
        texts = page.locator("#feature-table tbody tr:visible .text").all_inner_texts()
        assert all("socket" in text for text in texts)
        assert page.inner_text("#matches") == f"{len(some)} of {len(everything)}"
        page.fill("#search", "no such feature")
        assert visible_ids(page) == []
        page.fill("#search", "")
        assert visible_ids(page) == everything


def test_columns_sort_both_ways_with_missing_values_last(chromium, report):
    unscored = made_up_data().explanations["feature"].to_pylist()[-1]
    with opened(chromium, report) as page:
        page.click("#feature-table button[data-key=id]")
        assert visible_ids(page) == sorted(visible_ids(page))
        page.click("#feature-table button[data-key=control]")
        falling = visible_ids(page)
        page.click("#feature-table button[data-key=control]")
        rising = visible_ids(page)
        assert falling[-1] == rising[-1] == unscored
        assert falling[:-1] == rising[-2::-1]


@pytest.mark.parametrize("how", ["click", "keyboard", "link"])
def test_a_chosen_feature_shows_its_evidence(chromium, report, how):
    linked = browser.choose(made_up_data().completed(), 60)[3]
    with opened(chromium, report, fragment=f"#feature-{linked}" if how == "link" else "") as page:
        row = page.locator("#feature-table tbody tr").nth(3)
        number = row.locator("td").first.inner_text()
        if how == "click":
            row.click()
        elif how == "keyboard":
            row.focus()
            page.keyboard.press("Enter")
        assert page.inner_text("#detail h3") == f"Feature {number}"
        assert page.locator("#detail .example").count() == 8
        assert page.locator("#detail .bars i").count() > 10
        hottest = page.locator("#detail [data-hot]").first
        hottest.hover()
        assert page.locator("#tip").is_visible()
        token, value = page.inner_text("#tip").split()
        assert hottest.inner_text() == token
        assert float(value) > 0


def test_text_from_the_corpus_is_shown_and_never_run(chromium, tmp_path):
    folder = written(tmp_path, made_up_data(shown=4, hostile=True))
    with opened(chromium, folder) as page:
        rows = page.locator("#feature-table tbody tr")
        assert rows.count() == 4
        for number in range(4):
            rows.nth(number).click()
            assert HOSTILE in page.locator("#detail .example").first.inner_text()
        assert rows.locator(".text", has_text=HOSTILE).count() == 3  # one has no explanation
        assert page.title() != "owned"
        assert page.locator("img").count() == 0


def test_the_content_policy_stops_what_an_escaping_mistake_would_let_through(chromium, tmp_path):
    folder = written(tmp_path, made_up_data(shown=2))
    page_file = folder / "report.html"
    broken = page_file.read_text("utf-8").replace(
        "<main>", "<main><script>window.ran = true</script><b onclick='window.ran = true'>x</b>"
    )
    page_file.write_text(broken, "utf-8")
    page = chromium.new_page()
    refusals: list[str] = []
    page.on("console", lambda message: refusals.append(message.text))
    page.on("pageerror", lambda error: refusals.append(str(error)))
    page.goto(page_file.as_uri())
    page.click("main b")
    assert page.evaluate("window.ran") is None
    assert any("Content Security Policy" in text for text in refusals)
    assert page.locator("#detail h3").count() == 1  # the page's own script still runs
    page.close()


def test_it_prints_in_light_colours_within_a_sheet_of_paper(chromium, report):
    widest = "Math.max(...Array.from(document.querySelectorAll('.main-svg'), e => e.clientWidth))"
    ink = "getComputedStyle(document.querySelector('#plot-cosine .point path')).fill"
    with opened(chromium, report, color_scheme="dark") as page:
        on_screen, dark = page.evaluate(widest), page.evaluate(ink)
        page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
        assert page.evaluate(widest) <= 700
        assert page.evaluate(ink) != dark
        page.evaluate("window.dispatchEvent(new Event('afterprint'))")
        page.wait_for_function(f"{widest} === {on_screen}")
        assert page.evaluate(ink) == dark
        assert page.pdf(format="A4").startswith(b"%PDF")
