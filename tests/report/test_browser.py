"""The page in headless Chromium. Skipped where Chromium or chromedriver is not installed."""

import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from ospo_fast.report import write_report

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1360,1000",
)  # fmt: skip


def find(*names):
    return next((path for name in names if (path := shutil.which(name))), None)


@pytest.fixture(scope="module")
def page(make, tmp_path_factory):
    return write_report(make(tmp_path_factory.mktemp("browser") / "run", items=24, steps=60, gallery=6))


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    chromium, chromedriver = find("chromium", "chromium-browser", "google-chrome"), find("chromedriver")
    if chromium is None or chromedriver is None:
        pytest.skip("needs chromium and chromedriver")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(chromedriver))
    yield driver
    driver.quit()


def emulate(driver, scheme):
    features = {"prefers-color-scheme": scheme, "prefers-reduced-motion": "reduce"}
    media = [{"name": name, "value": value} for name, value in features.items()]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})


@pytest.fixture
def opened(driver, page):
    emulate(driver, "light")
    driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    driver.get(page.as_uri())
    return driver


def css(driver, selector):
    return driver.find_elements("css selector", selector)


def titles(driver):
    return [element.text for element in css(driver, "#list .title")]


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), dtype=float)


def test_background_follows_the_color_scheme(opened):
    for scheme in ("light", "dark"):
        emulate(opened, scheme)
        screenshot = pixels(opened.get_screenshot_as_png())
        assert screenshot.std() > 15
        background = screenshot[-1, 0]
        assert background.min() > 230 if scheme == "light" else background.max() < 40


def test_no_errors_and_no_requests(opened, page):
    assert [entry for entry in opened.get_log("browser") if entry["level"] in {"SEVERE", "WARNING"}] == []
    loaded = opened.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert all(name.startswith("data:") for name in loaded)
    assert all(opened.execute_script("return [...document.images].map((image) => image.naturalWidth > 0)"))


def test_status_and_search_filter_the_list(opened):
    everything = titles(opened)
    assert len(everything) == 24
    css(opened, "[data-status=dropped]")[0].click()
    dropped = titles(opened)
    assert 0 < len(dropped) < 24
    assert {element.get_attribute("aria-pressed") for element in css(opened, "[data-status=dropped]")} == {"true"}
    assert css(opened, "#detail .judgement")[0].text.startswith("Dropped")
    assert opened.find_element("id", "count").text == f"{len(dropped)} of 24 prompts"
    css(opened, "[data-status='']")[0].click()
    opened.find_element("id", "search").send_keys("left of")
    found = titles(opened)
    assert found == [title for title in everything if "left of" in title]
    opened.find_element("id", "search").send_keys(" zebra")
    assert titles(opened) == []
    assert "No prompt fits these filters." in opened.find_element("id", "detail").text


def test_kind_and_reason_filter_the_list_and_margin_sorts_it(opened):
    from selenium.webdriver.support.select import Select

    def choose(name, index):
        Select(opened.find_element("id", name)).select_by_index(index)

    choose("kind", 1)
    kind = css(opened, "#kind option")[1].text
    assert {element.text.split(",")[0] for element in css(opened, "#list .grow")} == {kind}
    choose("kind", 0)
    choose("reason", 1)
    assert {element.text for element in css(opened, "#list .verdict")} == {"✕"}
    choose("reason", 0)
    choose("sort", 1)
    margins = [float(element.text.replace("\u2212", "-")) for element in css(opened, "#list .num")]
    assert len(margins) > 5
    assert margins == sorted(margins, reverse=True)


def test_attention_and_masks_are_drawn_over_the_images(opened):
    css(opened, "[data-status=kept]")[0].click()
    item = next(
        element
        for element in css(opened, "#list [role=option]")
        if (element.click() or css(opened, "#detail canvas.heat"))
    )
    assert item.get_attribute("aria-selected") == "true"
    assert css(opened, "#detail header h3")[0].text == item.find_element("css selector", ".title").text
    frames = css(opened, "#detail .frame.object")
    assert len(frames) >= 2
    assert len(frames) == len(css(opened, "#detail canvas.heat")) == len(css(opened, "#detail .frame.object .outline"))
    # A canvas of one cell per image token, its brightest cell inside the mask's outline.
    width, height, cells = opened.execute_script(
        "const c = document.querySelector('#detail canvas.heat');"
        "return [c.width, c.height, [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]]"
    )
    assert (width, height) == (6, 6)
    assert np.reshape(cells, (36, 4))[:, 0].std() > 10
    opened.execute_script("arguments[0].scrollIntoView({block: 'center'})", frames[0])
    attention = pixels(frames[0].screenshot_as_png)
    opened.find_element("css selector", "[data-mode=image]").click()
    plain = pixels(frames[0].screenshot_as_png)
    opened.find_element("css selector", "[data-mode=mask]").click()
    mask = pixels(frames[0].screenshot_as_png)
    for one, other in ((attention, plain), (plain, mask), (attention, mask)):
        assert np.abs(one - other).mean() > 10


def select_two_objects(driver):
    """Select an item with two objects, in the mode without overlays, and return the words of its prompt."""
    driver.execute_script("document.querySelector('#pairs').scrollIntoView()")
    css(driver, "[data-status=kept]")[0].click()
    for option in css(driver, "#list [role=option]"):
        option.click()
        words = css(driver, "#detail h3 .word")
        if len(words) == 2:
            css(driver, "[data-mode=image]")[0].click()
            return words
    raise AssertionError("no item has two words")


def layers(driver):
    """Of the image's own frame of each side: the layers that can be seen, and the cells of the heat map."""
    return driver.execute_script("""
        return [...document.querySelectorAll('#detail .frame.plain')].map((frame) => {
          const seen = [...frame.children].filter((node) => getComputedStyle(node).opacity > 0);
          const heat = frame.querySelector('.heat');
          const data = heat && [...heat.getContext('2d').getImageData(0, 0, heat.width, heat.height).data];
          const path = frame.querySelector('.outline .edge');
          const name = (node) => [...node.classList][0];
          return {seen: seen.map(name), heat: data, outline: path && path.getAttribute('d')};
        });""")


def own_layers(driver, index):
    """The heat map and outline of an object in its own column, chosen and rejected."""
    return driver.execute_script(
        """
        return [...document.querySelectorAll(`#detail .frame.object[data-object="${arguments[0]}"]`)].map((frame) => {
          const heat = frame.querySelector('.heat');
          const data = [...heat.getContext('2d').getImageData(0, 0, heat.width, heat.height).data];
          return [data, frame.querySelector('.outline .edge').getAttribute('d')];
        });""",
        index,
    )


def pressed(driver):
    return [word.text for word in css(driver, "#detail .word[aria-pressed=true]")]


def boxes(driver):
    return driver.execute_script(
        "return [...document.querySelectorAll('#detail *')].filter((n) => !n.closest('.frame > *'))"
        ".map((n) => { const b = n.getBoundingClientRect(); return [b.x, b.y, b.width, b.height]; })"
    )


NOTHING = [{"seen": ["pic"], "heat": None, "outline": None}] * 2


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_hovering_a_word_shows_attention_and_mask_over_both_images(opened, scheme):
    from selenium.webdriver.common.action_chains import ActionChains

    emulate(opened, scheme)
    words = select_two_objects(opened)
    before, status = boxes(opened), opened.find_element("id", "word-status").text
    assert layers(opened) == NOTHING
    plain = [pixels(frame.screenshot_as_png) for frame in css(opened, "#detail .frame.plain")]
    shown = []
    for index, word in enumerate(words):
        ActionChains(opened).move_to_element(word).perform()
        shown.append(layers(opened))
        assert [side["seen"] for side in shown[-1]] == [["pic", "heat", "outline"]] * 2
        assert [[side["heat"], side["outline"]] for side in shown[-1]] == own_layers(opened, index)
        assert set(pressed(opened)) == {word.text}
        assert boxes(opened) == before  # nothing moves
        assert opened.find_element("id", "word-status").text.startswith(f"Mask of \u201c{word.text}\u201d: ")
        frames = css(opened, "#detail .frame.plain")
        assert all(np.abs(pixels(f.screenshot_as_png) - p).mean() > 10 for f, p in zip(frames, plain, strict=True))
    assert shown[0] != shown[1]
    ActionChains(opened).move_to_element(css(opened, "#detail h4")[0]).perform()
    assert layers(opened) == NOTHING
    assert pressed(opened) == []
    assert opened.find_element("id", "word-status").text == status


def test_no_transition_where_reduced_motion_is_preferred(opened):
    select_two_objects(opened)
    duration = "return getComputedStyle(document.querySelector(arguments[0])).transitionDuration"
    for motion, expected in (("reduce", "0s"), ("no-preference", "0.12s")):
        features = [{"name": "prefers-reduced-motion", "value": motion}]
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        for selector in ("#detail canvas.heat", "#detail .frame.object"):
            assert opened.execute_script(duration, selector) == expected


def test_words_are_reached_and_left_with_the_keyboard(opened):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    words = select_two_objects(opened)
    assert {(w.get_attribute("role"), w.get_attribute("tabindex")) for w in words} == {("button", "0")}
    assert {w.get_attribute("aria-describedby") for w in words} == {"word-status"}
    opened.execute_script("document.querySelectorAll('#detail .round:not(:disabled)')[0].focus()")
    for _ in range(2):
        ActionChains(opened).send_keys(Keys.TAB).perform()
        if opened.switch_to.active_element == words[0]:
            break
    assert opened.switch_to.active_element == words[0]
    assert pressed(opened)[0] == words[0].text
    ActionChains(opened).send_keys(Keys.TAB).perform()
    assert pressed(opened)[0] == words[1].text
    assert layers(opened)[1]["seen"] == ["pic", "heat", "outline"]
    for key, seen in ((Keys.ESCAPE, 0), (Keys.ENTER, 2), (Keys.SPACE, 0), (Keys.SPACE, 2)):
        ActionChains(opened).send_keys(key).perform()
        assert opened.switch_to.active_element == words[1]
        assert sum(side["seen"] == ["pic", "heat", "outline"] for side in layers(opened)) == seen
    opened.execute_script("document.activeElement.blur()")
    assert layers(opened) == NOTHING


def test_a_tap_shows_a_word_and_the_next_tap_ends_it(opened):
    words = select_two_objects(opened)
    size = {"width": 390, "height": 1400, "deviceScaleFactor": 1, "mobile": True}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    opened.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
    try:
        opened.execute_script("document.querySelector('#detail').scrollIntoView()")

        def tap(element):
            box = opened.execute_script("return arguments[0].getBoundingClientRect().toJSON()", element)
            point = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
            opened.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [point]})
            opened.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
            return set(pressed(opened))

        judgement = css(opened, "#detail .judgement")[0]
        assert tap(words[0]) == {words[0].text}
        assert [side["seen"] for side in layers(opened)] == [["pic", "heat", "outline"]] * 2
        assert tap(words[1]) == {words[1].text}
        assert tap(words[1]) == set()
        assert tap(words[0]) == {words[0].text}
        assert tap(judgement) == set()
        opened.execute_script("arguments[0].click()", words[0])  # without focus, as in browsers where a tap gives none
        assert set(pressed(opened)) == {words[0].text}
        assert tap(judgement) == set()
        assert layers(opened) == NOTHING
    finally:
        opened.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})


def test_only_words_with_maps_are_controls(opened):
    css(opened, "[data-status=kept]")[0].click()
    without = 0
    for option in css(opened, "#list [role=option]"):
        option.click()
        if not css(opened, "#detail canvas.heat"):
            without += 1
            assert css(opened, "#detail .word") == []
            assert css(opened, "#detail .guide") == []
    assert without
    css(opened, "[data-status=dropped]")[0].click()
    assert css(opened, "#detail .word") == []


def test_the_guide_is_with_the_pair_and_stays_closed(opened):
    select_two_objects(opened)
    guide = css(opened, "#detail .pair .guide")[0]
    assert "How to read a mask" in guide.text
    assert "covers background where it fails" in guide.text
    guide.find_element("css selector", "summary").click()
    css(opened, "#detail .round:not(:disabled)")[0].click()
    select_two_objects(opened)
    assert css(opened, "#detail .pair .guide")[0].get_attribute("open") is None


def test_keys_and_buttons_select_the_item(opened):
    from selenium.webdriver.common.keys import Keys

    names = titles(opened)

    def heading():
        return css(opened, "#detail header h3")[0].text

    box = opened.find_element("id", "list")
    box.send_keys(Keys.ARROW_DOWN, Keys.ARROW_DOWN)
    assert heading() == names[2]
    assert box.get_attribute("aria-activedescendant") == "item-2"
    box.send_keys(Keys.ARROW_UP)
    assert heading() == names[1]
    box.send_keys(Keys.END)
    assert heading() == names[-1]
    last = css(opened, "#list [aria-selected=true]")[0]
    assert last.location["y"] + last.size["height"] <= box.location["y"] + box.size["height"] + 1  # scrolled into view
    box.send_keys(Keys.ARROW_DOWN)
    assert heading() == names[-1]
    previous = css(opened, "#detail .round")[0]
    opened.execute_script("arguments[0].scrollIntoView({block: 'center'})", previous)
    previous.click()
    assert heading() == names[-2]


def test_outcome_filters_the_gallery(opened):
    cards = css(opened, "#gallery .cards li")
    css(opened, "#gallery [data-outcome=fixed]")[0].click()
    shown = [card for card in cards if card.is_displayed()]
    assert 0 < len(shown) < len(cards)
    assert {card.get_attribute("data-outcome") for card in shown} == {"fixed"}


def test_no_horizontal_overflow(opened):
    overflow = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    for width in (1360, 768, 360):
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        assert opened.execute_script(overflow) <= 0


def test_hostile_prompt_runs_nothing(driver, run_dir):
    path = run_dir / "select.jsonl"
    hostile = "</script><img src=x onerror=\\\"document.title='owned'\\\"><script>document.title='owned'</script>"
    lines = path.read_text().splitlines()
    path.write_text(
        "\n".join([lines[0][:-1] + f', "prompt": "{hostile}", "reason": "{hostile}"' + "}", *lines[1:]]) + "\n"
    )
    (run_dir / "masks.jsonl").unlink()
    driver.get(write_report(run_dir).as_uri())
    assert css(driver, "#detail header h3")[0].text.startswith("</script><img")
    assert driver.title == "run \u2013 OSPO report"
    assert css(driver, "#detail img[src='x']") == []


def select_all(driver):
    """Select every item of the list, hover its words, use every filter, and return how many items there are."""
    return driver.execute_script("""
        const options = document.querySelectorAll('#list [role=option]').length;
        for (let index = 0; index < options; index++) {
          document.querySelectorAll('#list [role=option]')[index].click();
          for (const word of document.querySelectorAll('#detail .word')) word.click();
          for (const button of document.querySelectorAll('#detail [data-mode]')) button.click();
        }
        for (const select of document.querySelectorAll('select')) {
          for (const option of select.options) {
            select.value = option.value;
            select.dispatchEvent(new Event('change'));
          }
          select.selectedIndex = 0;
          select.dispatchEvent(new Event('change'));
        }
        for (const chart of document.querySelectorAll('.chart')) {
          chart.dispatchEvent(new PointerEvent('pointermove', {clientX: 300}));
        }
        return options;""")


def errors(driver):
    return [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.mark.parametrize("store", ["select", "masks"])
def test_the_script_survives_every_record(driver, make, tmp_path, hostile, store):
    run = make(tmp_path / "run", items=2, steps=6, side=8, grid=2, gallery=1)
    path = run / f"{store}.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines) + "\n" + hostile.hostile_store(json.loads(lines[0])), encoding="utf-8")
    errors(driver)
    driver.get(write_report(run, limit=10_000).as_uri())
    count = select_all(driver)
    assert count > 100
    assert errors(driver) == []
    assert driver.find_element("id", "count").text == f"{count} prompts"
    assert driver.title == "run \u2013 OSPO report"


def test_names_that_every_object_has_are_no_images(driver, run_dir):
    lines = [json.loads(line) for line in (run_dir / "masks.jsonl").read_text().splitlines()]
    for line, name in zip(lines, ("__proto__", "constructor", "toString", "base_999999999999"), strict=False):
        line |= {"chosen": name, "rejected": name, "unmatched_objects": {"__proto__": "x"}, "base_metadata": {}}
    (run_dir / "masks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    errors(driver)
    driver.get(write_report(run_dir).as_uri())
    select_all(driver)
    assert errors(driver) == []
    assert css(driver, "#pairs img:not([src])") == []


@pytest.mark.parametrize("text", ["!" * 100_000 + "x", "a b " * 25_000, " " * 100_000 + "x", "word " * 20_000])
def test_prompts_of_100_kb_are_compared_in_linear_time(driver, run_dir, text):
    """The driver ends a script that takes more than 30 s, which linear time does not reach on a slow machine."""
    record = json.loads((run_dir / "masks.jsonl").read_text().splitlines()[0])
    record |= dict.fromkeys(("negative_prompt", "negative_long_prompt"), [text + " other"] * 3)
    record |= {"prompt": text, "long_prompt": [text] * 3}
    for path in run_dir.glob("*.jsonl"):
        path.unlink()
    (run_dir / "masks.jsonl").write_text(json.dumps(record))
    driver.set_page_load_timeout(30)
    errors(driver)
    driver.get(write_report(run_dir).as_uri())
    assert errors(driver) == []
    assert [mark.text for mark in css(driver, "#detail .variant mark")] == ["other"] * 6
