"""The page in a real browser: it loads from a file, its filters and points work, and it asks for nothing."""

import shutil

import pytest
from test_page import NEEDS_CHARTS, everything, sound

from audiopress.benchmarks.page.writing import write_page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def browser():
    pytest.importorskip("altair", reason=NEEDS_CHARTS)
    pytest.importorskip("vl_convert", reason=NEEDS_CHARTS)
    api = pytest.importorskip("playwright.sync_api", reason="needs a browser's driver: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("needs a browser: apt-get install chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    pytest.importorskip("altair", reason=NEEDS_CHARTS)
    folder = tmp_path_factory.mktemp("page")
    return write_page(everything(folder / "rows"), folder / "page.html", sound)


@pytest.fixture
def page(browser, file):
    """The page at a desktop's width; whatever it complains of or asks for fails the test."""
    with browser.new_context(viewport={"width": 1400, "height": 900}) as context:
        page = context.new_page()
        page.set_default_timeout(10_000)
        wrong = []
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: request.url.startswith(("file:", "data:")) or wrong.append(request.url))
        page.goto(file.as_uri())
        page.wait_for_selector("#chart-cost svg")
        yield page
        assert wrong == []


POINTS = "#chart-cost svg .mark-symbol path"


def drawn(page, count):
    """Waits for so many points, one for each row that is drawn."""
    page.wait_for_function("([points, n]) => document.querySelectorAll(points).length === n", arg=[POINTS, count])


def test_rows_are_drawn_and_listed(page):
    drawn(page, 9)
    assert page.locator("#rows tbody tr").count() == 10  # and one that failed
    assert "9 of 10 rows are drawn" in page.inner_text("#shown")
    assert "1 failed" in page.inner_text("#shown")
    assert "broke </script>" in page.inner_text("#rows .failed")


def test_filters_leave_fewer_points(page):
    page.select_option("#trained", "true")
    drawn(page, 2)
    page.select_option("#trained", "any")
    page.select_option("#rate", "6.25")
    drawn(page, 4)
    page.select_option("#stage", "none")
    page.wait_for_selector("#chart-cost.empty")
    page.select_option("#rate", "any")
    drawn(page, 1)
    page.select_option("#stage", "any")
    page.click("#no")
    page.wait_for_selector("#chart-cost.empty")
    page.check("#methods input[value=ward]")
    drawn(page, 3)


def test_a_language_has_its_own_scores(page):
    page.select_option("#stage", "none")
    assert "1.5 [" in page.inner_text("#rows tbody")
    page.select_option("#part", "fr")
    assert "4.5" in page.inner_text("#rows tbody")


def test_the_other_testbed_and_score(page):
    page.check("#testbeds input[value=time]", force=True)
    drawn(page, 2)
    assert "Mean IoU" in page.inner_text("figcaption >> nth=0")
    page.check("#testbeds input[value=speech]", force=True)
    page.select_option("#metric", "cer")
    assert "Character error rate" in page.inner_text("figcaption >> nth=0")
    drawn(page, 9)


def test_a_point_opens_its_row_and_command(page):
    drawn(page, 9)
    page.click("#no")
    page.check("#methods input[value=pooling]")
    page.select_option("#rate", "6.25")
    drawn(page, 1)
    page.click(POINTS)
    page.wait_for_selector("dialog[open]")
    assert page.inner_text("#dialog-title") == "pooling"
    command = page.inner_text("#command")
    assert command.startswith("python benchmarks/speech.py")
    assert "--methods pooling --rates 6.25" in command
    assert "100 values, in the row's file" in page.inner_text("#fields")
    page.click("#copy")
    page.wait_for_function("['copied', 'selected'].includes(document.getElementById('copy').textContent)")
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog:not([open])", state="attached")


def test_the_keyboard_reaches_a_row(page):
    page.focus("#rows tbody tr:first-child button")
    page.keyboard.press("Enter")
    page.wait_for_selector("dialog[open]")


def test_a_column_sorts(page):
    def first():
        return page.inner_text("#rows tbody tr:first-child")

    assert "uncompressed" in first()  # the least errors
    page.click("#rows th:nth-child(2) button")
    assert "pooling" in first()  # the most
    assert page.get_attribute("#rows th:nth-child(2)", "aria-sort") == "descending"


def test_clips_are_heard_and_compared(page):
    assert page.locator("#transcripts article").count() == 3  # said, uncompressed, ward
    assert page.locator("#transcripts del").all_inner_texts() == ["two"]
    assert page.locator("#transcripts ins").all_inner_texts() == ["indeed"]
    assert "CC-BY-SA-3.0" in page.inner_text("#licence")
    page.select_option("#clip-rate", "3.125")
    assert "<b>bold</b>" in page.inner_text("#transcripts")
    assert page.locator("#transcripts b").count() == 0
    page.wait_for_function("document.getElementById('audio').duration > 2.9")
    page.click("#chart-tokens svg", position={"x": 700, "y": 60})
    page.wait_for_function("document.getElementById('audio').currentTime > 1")


def test_it_fits_a_phone(page):
    page.set_viewport_size({"width": 390, "height": 844})
    page.reload()
    page.wait_for_selector("#chart-cost svg")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
