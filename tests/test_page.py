"""Pages: what is in them, and what a browser makes of it."""

import base64
import io
import re

import pytest
from PIL import Image

from browser import open_browser
from dia_diffusion.page import folded, heading, markdown, picture, prose, write_page

TABLE = """
| variant | parameters | loss | difference |
| --- | ---: | ---: | ---: |
| plain | 1,200 | 0.0310 ± 0.001 | - |
| dia <b> | 900 | 0.0295 ± 0.001 | -0.0015 [-0.002, +0.001] |
| se | 10,000 | 0.0300 | +0.0010 |

Differences are to `plain`, with **care**.
"""


def test_what_stands_in_a_report_is_text_and_not_markup():
    assert "<td>dia &lt;b&gt;</td>" in markdown(TABLE)
    assert markdown(TABLE).count("<tr>") == 4
    assert prose("`a<b>` **c** & d") == "<p><code>a&lt;b&gt;</code> <b>c</b> &amp; d</p>"
    assert heading("<i>") == "<h2>&lt;i&gt;</h2>"
    assert "<script>" not in folded("<script>", "</pre><script>")
    assert "data-sorts" in markdown(TABLE)
    assert "data-sorts" not in markdown(TABLE, sortable=False)


def test_pictures_lie_in_the_page(tmp_path):
    image = Image.new("RGB", (3, 2), "red")
    image.save(tmp_path / "red.png")
    for one in (image, tmp_path / "red.png"):
        data = re.search("base64,(.*?)'", picture(one, "it's red", pixels=True)).group(1)
        assert Image.open(io.BytesIO(base64.b64decode(data))).tobytes() == image.tobytes()
    assert "alt='it&#x27;s red'" in picture(image, "it's red")


def test_links_to_the_raw_figures_lead_there(tmp_path):
    for name in ("a b/figures.json", "figures #1.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    write_page(tmp_path / "page.html", "<Run>", [], [tmp_path / "a b/figures.json", tmp_path / "figures #1.json"])
    page = (tmp_path / "page.html").read_text()
    assert re.findall("href='(.*?)'", page) == ["a%20b/figures.json", "figures%20%231.json"]
    assert "<title>&lt;Run&gt;</title>" in page


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    write_page(path, "Study", [markdown(TABLE), picture(Image.new("RGB", (2000, 100)), "wide")])
    with open_browser() as browser:
        page = browser.new_page(viewport={"width": 360, "height": 640})
        page.goto(path.as_uri())
        yield page


def test_a_click_sorts_by_the_numbers_of_a_column(opened):
    def order(column):
        opened.get_by_role("columnheader", name=column).click()
        return opened.locator("tbody tr td:first-child").all_inner_texts()

    assert order("parameters") == ["dia <b>", "plain", "se"]
    assert order("parameters") == ["se", "plain", "dia <b>"]
    assert order("loss") == ["dia <b>", "se", "plain"]
    assert order("difference") == ["dia <b>", "se", "plain"]  # What has no number comes last.
    assert order("difference") == ["se", "dia <b>", "plain"]
    assert order("variant") == ["dia <b>", "plain", "se"]
    assert opened.locator("th[aria-sort]").all_inner_texts() == ["variant"]


def test_a_phone_shows_it_without_scrolling_sideways_and_without_a_network(opened):
    assert opened.evaluate("document.documentElement.scrollWidth") <= 360
    # A navigation and nothing else.
    assert (
        opened.evaluate("performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length") == 0
    )


def test_a_phone_breaks_names_between_their_words_alone(opened, tmp_path):
    columns = ["variant", *(f"held-out loss of seed {number}" for number in range(9))]
    rows = [columns, ["---"] * 10, ["lstm-zero-state-scale-shift", *["+0.000275 [+0.000001, +0.000549]"] * 9]]
    write_page(tmp_path / "page.html", "Wide", [markdown("\n".join("| " + " | ".join(row) + " |" for row in rows))])
    opened.goto((tmp_path / "page.html").as_uri())
    lines = "td => { const r = document.createRange(); r.selectNodeContents(td); return r.getClientRects().length }"
    assert 1 < opened.locator("td").first.evaluate(lines) <= 5
