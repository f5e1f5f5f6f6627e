"""The page in a browser: what is drawn, what a click opens, what the search finds, and that it can be read."""

from __future__ import annotations

import itertools
import json
import re

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from llmc.compiler.reports.picture import page
from llmc.compiler.reports.times import read_times

GRAPHS = {
    "910B": ("llama2-13b", {}),
    "910B, 8 ranks": ("llama2-13b", {"world_size": 8}),
    "910B, flash": ("llama2-7b", {"attention": "flash"}),
    "310P, 2 ranks": ("llama2-7b", {"device": "atlas-300i-duo", "world_size": 2}),
    "310P, flash": ("llama2-7b", {"device": "atlas-300i-duo", "world_size": 1, "attention": "flash"}),
    "80 layers": ("llama2-70b", {"world_size": 8}),
}

TWO_BLOCKS = """
name: two-blocks
sizes: {vocab: 96, hidden: 64, lower: 3, upper: 2, max_positions: 64}
dtype: float16
inputs: [token_ids]
graph:
  embed: {op: embedding, ids: token_ids, rows: vocab, width: hidden, weight: e}
  first:
    repeat: lower
    carry: {x: embed}
    nodes:
      up: {op: linear, x: x, out: hidden, weight: "a.{i}.w"}
      sum: {op: add, a: x, b: up}
    next: {x: sum}
  middle: {op: rms_norm, x: first.x, eps: 1.0e-5, weight: m}
  second:
    repeat: upper
    carry: {x: middle}
    nodes:
      up: {op: linear, x: x, out: hidden, weight: "b.{i}.w"}
    next: {x: up}
  last: {op: last_token, x: second.x}
  lm_head: {op: linear, x: last, out: vocab, weight: h}
outputs: {logits: lm_head}
"""
NO_BLOCK = """
name: no-block
sizes: {vocab: 96, hidden: 64, max_positions: 64}
dtype: float16
inputs: [token_ids]
graph:
  embed: {op: embedding, ids: token_ids, rows: vocab, width: hidden, weight: e}
  last: {op: last_token, x: embed}
  lm_head: {op: linear, x: last, out: vocab, weight: h}
outputs: {logits: lm_head}
"""


@pytest.fixture(params=GRAPHS)
def drawn(request, picture, open_page):
    model, options = GRAPHS[request.param]
    compiled, text = picture(model, **options)
    return compiled, read(open_page(text))


@pytest.fixture
def ranks8(picture, open_page):
    compiled, text = picture("llama2-13b", world_size=8)
    return compiled, read(open_page(text))


def read(browser):
    """From the whole drawing in the window, which a page begins with, to boxes that tell all."""
    browser.find_element(By.ID, "fit").click()
    return browser


def complaints(browser):
    """What the page said on the console, and what it asked for beside itself."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requests = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    asked = [url for url in requests if url != browser.current_url]
    return [entry["message"] for entry in browser.get_log("browser")], asked


def names(browser, where, also=""):
    return [e.get_attribute("data-name") for e in browser.find_elements(By.CSS_SELECTOR, f"#{where} .node{also}")]


def box(browser, where, name):
    return browser.find_element(By.CSS_SELECTOR, f'#{where} .node[data-name="{name}"]')


def click(browser, element):
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', inline: 'center'})", element)
    element.click()


def go_to(browser, place):
    browser.execute_script(
        "const s = document.getElementById('view'); s.value = arguments[0]; s.dispatchEvent(new Event('change'))", place
    )


def places(browser):
    """The values of the selector: every layer, and what stands outside layers."""
    return [o.get_attribute("value") for o in browser.find_elements(By.CSS_SELECTOR, "#view option")]


def type_in(browser, text):
    search = browser.find_element(By.ID, "search")
    search.send_keys(Keys.ESCAPE)
    search.send_keys(text)
    return search


# ---- loading


def test_the_page_loads_without_a_word_and_without_a_request(drawn):
    compiled, browser = drawn
    assert browser.current_url.startswith("file://")
    assert complaints(browser) == ([], [])
    assert browser.find_element(By.ID, "head").text.startswith(f"{compiled.model.name} on {compiled.options.device}")


def test_a_page_that_complains_or_asks_is_noticed(picture, open_page):
    _, text = picture("llama2-7b")
    policy = text[text.index('<meta http-equiv="Content-Security-Policy"') : text.index("<title>")]
    asking = text.replace("<noscript>", '<img src="http://127.0.0.1:9/x.png"><noscript>')
    said, asked = complaints(open_page(asking.replace(policy, "")))
    assert asked == ["http://127.0.0.1:9/x.png"]
    said, asked = complaints(open_page(asking))  # the page's own policy forbids it
    assert "Content Security Policy" in said[0]
    said, _ = complaints(open_page(text.replace("\nstart();", "\nstart(); undefined_name;")))
    assert "undefined_name is not defined" in said[0]


def test_80_layers_are_there_in_seconds(picture, open_page):
    _, text = picture("llama2-70b", world_size=8)
    browser = open_page(text)
    timing = "const [n] = performance.getEntriesByType('navigation'); return n.loadEventEnd - n.startTime"
    assert browser.execute_script(timing) < 5000
    assert len(text) < 400_000
    assert len(browser.find_elements(By.CSS_SELECTOR, "#prefill .node, #decode .node")) < 60  # one layer, not eighty


def test_names_of_a_model_cannot_leave_the_data(picture, open_page, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(NO_BLOCK.replace("weight: h}", "weight: \"h</script><script>document.title='x'</script><!--\"}"))
    _, text = picture(path, device="host")
    browser = open_page(text)
    assert browser.title.startswith("llmc: no-block on host")
    type_in(browser, "</script>")
    assert names(browser, "model", ".hit") == ["lm_head"]
    assert complaints(browser) == ([], [])


# ---- what is drawn


def test_every_operator_is_drawn_with_type_and_letters(drawn):
    compiled, browser = drawn
    graph = compiled.graph
    for layer in (0, graph.sizes["layers"] - 1):
        go_to(browser, f"layers {layer}")
        shown = [n for n in graph.nodes if not n.name.startswith("layers.") or n.name.startswith(f"layers.{layer}.")]
        ends = [f"{name}:in" for name in graph.inputs] + [f"{name}:out" for name in graph.outputs]
        assert sorted(names(browser, "model")) == sorted([*(n.name for n in shown), *ends])
        boxes = browser.find_elements(By.CSS_SELECTOR, "#model .operator")
        texts = {e.get_attribute("data-name"): e.get_attribute("innerText") for e in boxes}
        for node in shown:
            words = texts[node.name].split()
            assert words[0] == node.op
            types = [graph.types[value] for value in node.values]
            assert {str(t.shard) for t in types} <= set(words)
            assert all(str(list(t.shape)).replace("'", "") in texts[node.name] for t in types)
    frame = browser.find_element(By.CSS_SELECTOR, "#model .block button")
    assert frame.text == f"layers × {graph.sizes['layers']}"


def test_every_atb_operation_is_drawn_once_and_only_in_its_layer(drawn):
    compiled, browser = drawn
    count = compiled.graph.sizes["layers"]
    rows = {place: rows_of(browser, place) for place in places(browser)}
    assert [place for place in rows if place.startswith("layers ")] == [f"layers {i}" for i in range(count)]
    for phase, low in compiled.lowered.items():
        assert sorted(name for row in rows.values() for name in row[phase]) == sorted(node.name for node in low.nodes)
        for place, row in rows.items():
            view, _, layer = place.rpartition(" ")
            assert all(name.startswith(f"{view}.{layer}.") == (view == "layers") for name in row[phase])
    for place in ("before layers 0", "layers 0", "layers 1", f"layers {count - 1}", "after layers 0"):
        go_to(browser, place)
        for phase in compiled.lowered:
            assert names(browser, phase, ".operation") == rows[place][phase] != []


def rows_of(browser, place):
    """What the page would draw there: full names of the operations of each phase."""
    view, _, layer = place.rpartition(" ")
    return browser.execute_script(
        "const [view, layer] = arguments; return Object.fromEntries(phases.map(phase => [phase,"
        "drawingOf(phase, view, layer).nodes.filter(n => n.kind === 'operation').map(n => at(n.id, layer))]))",
        view,
        int(layer),
    )


def test_edges_are_those_of_the_graph(ranks8):
    compiled, browser = ranks8
    for phase, low in compiled.lowered.items():
        last, expected = {}, set()
        for node in low.nodes:
            if node.name.startswith("layers.3."):
                expected |= {(last[name], node.name) for name in node.ins if name in last}
                last |= dict.fromkeys(node.outs, node.name)
        go_to(browser, "layers 3")
        drawn = browser.execute_script(
            "return panes[arguments[0]].paths.map(({edge}) => [at(edge.from, 3), at(edge.to, 3)])", phase
        )
        assert {(a, b) for a, b in drawn if not a.endswith(":in") and not b.endswith(":out")} == expected
        assert expected


def test_edges_of_the_model_are_what_operators_read(ranks8):
    """One layer is drawn, with what the first reads from outside and what is read of the last."""
    compiled, browser = ranks8
    graph = compiled.graph
    ends = {value: f"{value}:in" for value in graph.inputs}
    makers = {**{value: node.name for value, node in graph.producer.items()}, **ends}
    pairs = {(makers[value], node.name) for node in graph.nodes for value in node.inputs.values()}
    pairs |= {(makers[value], f"{name}:out") for name, value in graph.outputs.items()}
    layer = re.compile(r"^layers\.(\d+)\.")
    kept = {
        (a, b) for a, b in pairs if not (layer.match(a) and layer.match(b)) or layer.match(a)[1] == layer.match(b)[1]
    }
    expected = {(layer.sub("layers.{i}.", a), layer.sub("layers.{i}.", b)) for a, b in kept}
    for number in (0, 20):
        go_to(browser, f"layers {number}")
        drawn = browser.execute_script("return panes.model.paths.map(({edge}) => [edge.from, edge.to])")
        assert sorted(map(tuple, drawn)) == sorted(expected)


FIRST, SECOND = ["first 0", "first 1", "first 2"], ["second 0", "second 1"]


@pytest.mark.parametrize(
    ("text", "views"),
    [
        (TWO_BLOCKS, ["before first 0", *FIRST, "after first 0", *SECOND, "after second 0"]),
        (NO_BLOCK, ["model 0"]),
    ],
    ids=["two blocks", "no block"],
)
def test_any_number_of_blocks_can_be_drawn(text, views, picture, open_page, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    compiled, page = picture(path, device="host")
    browser = open_page(page)
    assert places(browser) == views
    found = []
    for place in views:
        go_to(browser, place)
        found += names(browser, "prefill", ".operation")
        assert overlaps(browser, "model") == overlaps(browser, "prefill") == []
    assert sorted(found) == sorted(node.name for node in compiled.lowered["prefill"].nodes)
    assert complaints(browser) == ([], [])


def test_segments_are_told_with_the_limit_that_ends_each(ranks8):
    compiled, browser = ranks8
    strips = browser.find_elements(By.CSS_SELECTOR, "#segments .strip")
    for strip, parts in zip(strips, compiled.segments.values(), strict=True):
        told = [p.text for p in strip.find_elements(By.TAG_NAME, "p")]
        number = len(parts)
        assert number > 1
        # 11 or 13 operations a layer: nodes run out before tensors do
        assert told[:-1] == [f"segment {i} of {number}: one more exceeds 256 nodes" for i in range(1, number)]
        assert told[-1] == f"segment {number} of {number}: the model ends"
        counts = strip.find_element(By.CSS_SELECTOR, ".segment").get_attribute("title")
        assert f"{len(parts[0].graph.nodes)} of 256 nodes" in counts
        cells = [cell.text for cell in strip.find_elements(By.CSS_SELECTOR, ".cell")]
        assert [c for c in cells if c.isdecimal()] == [str(i) for i in range(40)]


# ---- click


def test_a_click_on_the_block_opens_the_lowered_layer_in_both_phases(ranks8):
    compiled, browser = ranks8
    for part in ("button", ""):  # its title, and its ground
        go_to(browser, "after layers 0")
        target = browser.find_element(By.CSS_SELECTOR, f"#model .block {part}")
        browser.execute_script("arguments[0].scrollIntoView(); arguments[0].click()", target)
        for phase, low in compiled.lowered.items():
            expected = [node.name for node in low.nodes if node.name.startswith("layers.0.")]
            assert sorted(names(browser, phase, ".operation")) == sorted(expected)
        assert browser.execute_script("return document.getElementById('view').value") == "layers 0"


def test_a_lowered_operation_says_shapes_letters_parameters_bytes_and_place(ranks8):
    _, browser = ranks8
    go_to(browser, "layers 7")
    said = {phase: box(browser, phase, "layers.7.attn.qkv").text for phase in ("prefill", "decode")}
    for phase, rows in (("prefill", "T"), ("decode", "B")):
        # 13B over 8 ranks: q, k, v of 5120 columns each, an eighth of the rows, 2 bytes a number
        assert "attn.qkv.weight float16 [1920, 5120], 18.75 MiB" in said[phase]
        assert f"out float16 [{rows}, 1920], 3.8 KiB a token" in said[phase]
        assert "hasBias=False" in said[phase]
        assert "graphs/families/llama.yaml:36:7" in said[phase]
        assert {"S(0)", "S(1)"} <= set(said[phase].split())
    assert "backend=lcoc" in box(browser, "prefill", "layers.7.attn.o.all_reduce").text
    attention = box(browser, "decode", "layers.7.attn.core").text
    assert "headNum=5" in attention
    assert "cache attn.core.k_cache float16 [N, 128, 5, 128], 1.2 KiB a token" in attention  # 5 heads of 128


def test_a_click_on_an_operator_shows_what_computes_it_in_both_phases(ranks8):
    _, browser = ranks8
    click(browser, box(browser, "model", "layers.0.mlp.gated"))
    assert names(browser, "model", ".chosen") == ["layers.0.mlp.gated"]
    assert names(browser, "prefill", ".linked") == names(browser, "decode", ".linked") == ["layers.0.mlp.gated"]
    click(browser, box(browser, "model", "layers.0.mlp.act"))  # the fusion took it
    assert names(browser, "prefill", ".linked") == ["layers.0.mlp.gated"]
    details = browser.find_element(By.ID, "details").text
    assert "layers.0.mlp.gated takes it in: split, silu, mul in one operation" in details
    click(browser, box(browser, "model", "lm_head"))
    assert "lm_head" in names(browser, "prefill", ".operation")
    assert names(browser, "prefill", ".linked") == ["lm_head"]


def test_a_click_on_an_operation_tells_all_of_it_and_marks_its_operator(ranks8):
    _, browser = ranks8
    click(browser, box(browser, "decode", "layers.0.attn.o"))
    assert names(browser, "decode", ".chosen") == names(browser, "model", ".linked") == ["layers.0.attn.o"]
    details = browser.find_element(By.ID, "details").text
    assert "atb.LinearParam(has_bias=False)" in details
    assert "layers.0.attn.core internal: float16 [B, 5, 128] as [B, 640], 1.2 KiB a token" in " ".join(details.split())
    assert "segment 1 of 3" in " ".join(details.split())


def test_a_click_on_what_comes_from_another_layer_goes_there(ranks8):
    _, browser = ranks8
    go_to(browser, "layers 4")
    click(browser, box(browser, "decode", "layers.3.mlp.down.all_reduce:in"))
    assert browser.execute_script("return document.getElementById('view').value") == "layers 3"
    assert names(browser, "decode", ".chosen") == ["layers.3.mlp.down.all_reduce"]
    assert "layers.3.mlp.down.all_reduce" in names(browser, "model", ".linked")


# ---- search


def test_the_search_marks_all_that_fits_and_nothing_else(ranks8):
    compiled, browser = ranks8
    type_in(browser, "ranksize")
    for phase, low in compiled.lowered.items():
        collective = [n.name for n in low.nodes if n.name.startswith("layers.0.") and "rankSize" in n.param]
        assert sorted(names(browser, phase, ".hit")) == sorted(collective)
        assert len(names(browser, phase, ".dim")) == len(names(browser, phase)) - len(collective)
    assert names(browser, "model", ".hit") == []


@pytest.mark.parametrize(("query", "where", "name", "place"), [
    ("layers.5.attn.core", "model", "layers.5.attn.core", "layers 5"),  # name
    ("PagedAttention", "decode", "layers.0.attn.core", "layers 0"),  # operation
    ("hasbias=false lm_head", "prefill", "lm_head", "after layers 0"),  # parameter, and a second word
    ("model.layers.12.self_attn.o_proj", "model", "layers.12.attn.o", "layers 12"),  # tensor of the checkpoint
    ("layers.39.mlp.down.weight", "prefill", "layers.39.mlp.down.all_reduce", "layers 39"),  # tensor of the graph
    ("block_tables", "decode", "layers.0.attn.core", "layers 0"),  # input of the step
    ("llama.yaml:84", "prefill", "norm", "after layers 0"),  # place
])  # fmt: skip
def test_enter_goes_to_what_was_searched(query, where, name, place, ranks8):
    _, browser = ranks8
    search = type_in(browser, query)
    hits = [e.text for e in browser.find_elements(By.CSS_SELECTOR, "#hits li")]
    wanted = next(i for i, text in enumerate(hits) if text.startswith(where) and name in text.split())
    for _ in range(wanted):
        search.send_keys(Keys.ARROW_DOWN)
    search.send_keys(Keys.ENTER)
    assert names(browser, where, ".chosen") == [name]
    assert box(browser, where, name).is_displayed()
    assert in_sight(browser, box(browser, where, name))
    assert browser.execute_script("return document.getElementById('view').value") == place


def test_the_search_says_when_there_is_nothing_and_escape_ends_it(ranks8):
    _, browser = ranks8
    search = type_in(browser, "layers.40.attn")  # there are 0 to 39
    assert browser.find_element(By.ID, "hits").text == "nothing is called or says so"
    assert names(browser, "model", ".hit") == []
    search.send_keys(Keys.ESCAPE)
    assert not browser.find_element(By.ID, "hits").is_displayed()
    assert names(browser, "model", ".dim") == []


def test_the_keyboard_is_enough(ranks8):
    _, browser = ranks8
    body = browser.find_element(By.TAG_NAME, "body")
    body.send_keys("]]]")
    assert browser.execute_script("return document.getElementById('view').value") == "layers 3"
    body.send_keys("[")
    assert browser.execute_script("return document.getElementById('view').value") == "layers 2"
    body.send_keys("/")
    assert browser.switch_to.active_element.get_attribute("id") == "search"
    browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    box(browser, "decode", "layers.2.mlp.down").send_keys(Keys.ENTER)
    assert names(browser, "decode", ".chosen") == ["layers.2.mlp.down"]


def test_using_the_page_asks_for_nothing_and_says_nothing(ranks8):
    _, browser = ranks8
    click(browser, box(browser, "model", "layers.0.attn.core"))
    click(browser, box(browser, "prefill", "layers.0.mlp.down.all_reduce"))
    for query in ("attn", "layers.9.mlp.down", "no such thing"):
        type_in(browser, query).send_keys(Keys.ENTER)
    for place in ("before layers 0", "layers 39", "after layers 0"):
        go_to(browser, place)
    browser.find_element(By.ID, "larger").click()
    browser.find_element(By.ID, "previous").click()
    assert complaints(browser) == ([], [])


# ---- the whole drawing in the window


@pytest.fixture
def window(browser):
    """Sets the size of the window's inside; the size that other tests have comes back."""

    def resize(width, height):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    yield resize
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


WINDOWS = [(1280, 800), (1920, 1080)]
FITTED = {"llama2-70b": {"world_size": 8}, "smollm2-135m": {}}


@pytest.mark.parametrize("size", WINDOWS, ids=str)
@pytest.mark.parametrize("model", FITTED)
def test_a_page_begins_with_all_of_a_layer_in_the_window(model, size, window, picture, open_page):
    compiled, text = picture(model, **FITTED[model])
    window(*size)
    browser = open_page(text)
    for place in ("layers 0", "before layers 0", "after layers 0", "layers 7"):
        go_to(browser, place)
        assert [name for where in ("model", "prefill", "decode") for name in out_of_sight(browser, where)] == []
        assert [pair for where in ("model", "prefill", "decode") for pair in overlaps(browser, where)] == []
        assert [name for where in ("model", "prefill", "decode") for name in cut(browser, where)] == []
    shown = [e.text.split() for e in browser.find_elements(By.CSS_SELECTOR, "#decode .operation")]
    assert ["PagedAttention", "S(1)" if compiled.options.world_size > 1 else "R", "attn.core"] in shown
    assert text_height(browser, "#decode .operation b") >= 9
    click(browser, box(browser, "decode", "layers.7.attn.o"))  # the column of details takes room
    assert out_of_sight(browser, "decode") == out_of_sight(browser, "prefill") == []
    assert names(browser, "decode", ".chosen") == ["layers.7.attn.o"]
    assert text_height(browser, "#decode .operation b") >= 8.5
    assert complaints(browser) == ([], [])


@pytest.mark.parametrize("size", WINDOWS, ids=str)
def test_the_header_of_80_layers_leaves_the_window_to_the_drawing(size, window, picture, open_page):
    _, text = picture("llama2-70b", world_size=8)
    window(*size)
    browser = open_page(text)
    assert browser.execute_script("return document.querySelector('header').offsetHeight") <= 0.18 * size[1]
    for place in ("layers 0", "layers 10", "layers 79", "after layers 0"):
        browser.find_element(By.CSS_SELECTOR, f'.cell[data-place="{place}"]').click()
        assert browser.execute_script("return document.getElementById('view').value") == place
        assert browser.execute_script("return document.documentElement.scrollWidth") <= size[0]
    crowded = browser.execute_script(
        "return [...document.querySelectorAll('.cell:not(.named)')].filter(c =>"
        "c.clientWidth < 6 * c.innerText.length && getComputedStyle(c).color != 'rgba(0, 0, 0, 0)' &&"
        "!c.matches('.tenth, .current')).map(c => c.innerText)"
    )
    assert crowded == []


def test_fit_is_a_button_and_a_key(picture, open_page):
    _, text = picture("llama2-13b", world_size=8)
    browser = open_page(text)
    button, body = browser.find_element(By.ID, "fit"), browser.find_element(By.TAG_NAME, "body")

    def fitted():
        shapes = browser.find_elements(By.CSS_SELECTOR, "#decode .line")
        assert all(e.is_displayed() for e in shapes) or not any(e.is_displayed() for e in shapes)
        assert button.get_attribute("aria-pressed") == str(not shapes[0].is_displayed()).lower()
        return not shapes[0].is_displayed()

    assert fitted()
    for go in (lambda: body.send_keys("f"), button.click):
        go()
        assert not fitted()
        go()
        assert fitted()
    click(browser, box(browser, "decode", "layers.0.attn.o"))
    body.send_keys("f")  # what was chosen stays chosen, and in sight
    assert names(browser, "decode", ".chosen") == ["layers.0.attn.o"]
    assert in_sight(browser, box(browser, "decode", "layers.0.attn.o"))
    body.send_keys("f")
    browser.find_element(By.ID, "larger").click()
    assert not fitted()
    type_in(browser, "f")
    assert not fitted(), "in the search it is a letter"


def test_text_of_lowered_blocks_is_large_enough_to_read(window, picture, open_page):
    _, text = picture("llama2-70b", world_size=8)
    for size, least in zip(WINDOWS, (11, 12), strict=True):
        window(*size)
        browser = read(open_page(text))
        assert text_height(browser, "#prefill .operation .line") >= least
        assert text_height(browser, "#decode .operation .place") >= least


def text_height(browser, selector):
    """The font's size as it is seen, in pixels."""
    return browser.execute_script(
        "const e = document.querySelector(arguments[0]);"
        "return parseFloat(getComputedStyle(e).fontSize) * parseFloat(e.closest('.canvas').style.zoom)",
        selector,
    )


def out_of_sight(browser, where):
    return browser.execute_script(
        "const p = document.querySelector(`#${arguments[0]} .pane`).getBoundingClientRect();"
        "return [...document.querySelectorAll(`#${arguments[0]} .node`)].filter(e => {"
        "const r = e.getBoundingClientRect(); return r.left < p.left - 1 || r.right > p.right + 1 ||"
        "r.top < p.top - 1 || r.bottom > p.bottom + 1 || r.bottom > innerHeight + 1}).map(e => e.dataset.name)",
        where,
    )


# ---- it can be read


def test_nothing_overlaps_and_no_text_is_cut(drawn):
    compiled, browser = drawn
    for place in ("before layers 0", "layers 0", f"layers {compiled.graph.sizes['layers'] - 1}", "after layers 0"):
        go_to(browser, place)
        for where in ("model", "prefill", "decode"):
            assert overlaps(browser, where) == []
            assert cut(browser, where) == []


def test_an_overlap_and_a_cut_text_are_noticed(ranks8):
    _, browser = ranks8
    browser.execute_script(
        "const [a, b] = document.querySelectorAll('#prefill .operation');"
        "b.style.top = a.style.top; b.style.left = a.style.left;"
        "const c = document.querySelector('#decode .operation'); c.style.height = '20px'; c.style.overflow = 'hidden'"
    )
    first, second = browser.execute_script(
        "return [...document.querySelectorAll('#prefill .operation')].slice(0, 2).map(e => e.dataset.name)"
    )
    assert [first, second] in overlaps(browser, "prefill")
    assert len(cut(browser, "decode")) == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(scheme, picture, open_page, browser):
    _, text = picture("llama2-13b", world_size=8)
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    try:
        read(open_page(text))
        page = luminance(color(browser, "body", "backgroundColor"))
        assert (page > 0.5) == (scheme == "light")
        type_in(browser, "linear")
        click(browser, box(browser, "decode", "layers.0.attn.o"))
        selectors = ("header h1", "dt", "#search", ".cell", ".cell.current", ".segment p", ".operator .line", "#alike",
                     "#decode .operation.hit .line", ".letter.R", ".letter.S", ".letter.P", ".in .line", "#details th",
                     ".carries > span", "#details td button", ".block > button", ".phase h2 span")  # fmt: skip
        poor = {s: round(contrast(browser, s), 2) for s in selectors if contrast(browser, s) < 4.5}
        assert poor == {}
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def overlaps(browser, where):
    """Pairs of boxes, labels of edges included, that share more than a pixel."""
    rows = browser.execute_script(
        "return [...document.querySelectorAll(`#${arguments[0]} .node, #${arguments[0]} .carries`)].map(e => {"
        "const r = e.getBoundingClientRect();"
        "return [e.dataset.name || e.innerText, r.left, r.top, r.right, r.bottom]})",
        where,
    )
    assert rows
    return [
        [a[0], b[0]]
        for a, b in itertools.combinations(rows, 2)
        if min(a[3], b[3]) - max(a[1], b[1]) > 1 and min(a[4], b[4]) - max(a[2], b[2]) > 1
    ]


def cut(browser, where):
    return browser.execute_script(
        "return [...document.querySelectorAll(`#${arguments[0]} .node`)].filter(e =>"
        "e.scrollWidth > e.clientWidth + 1 || e.scrollHeight > e.clientHeight + 1).map(e => e.dataset.name)",
        where,
    )


def in_sight(browser, element):
    return browser.execute_script(
        "const r = arguments[0].getBoundingClientRect(), p = arguments[0].closest('.pane').getBoundingClientRect();"
        "return r.left < p.right && r.right > p.left && r.top < p.bottom && r.bottom > p.top",
        element,
    )


def color(browser, selector, key):
    """The computed colour; a background is that of the nearest ancestor that has an opaque one."""
    text = browser.execute_script(
        "let e = document.querySelector(arguments[0]); const key = arguments[1];"
        "while (key == 'backgroundColor' && !/^rgb\\(/.test(getComputedStyle(e)[key])) e = e.parentElement;"
        "return getComputedStyle(e)[key]",
        selector,
        key,
    )
    return [float(part) / 255 for part in text[text.index("(") + 1 : text.index(")")].split(",")[:3]]


def luminance(rgb):
    """Relative luminance (WCAG 2.2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(browser, selector):
    """Contrast ratio of WCAG 2.2: 4.5 is enough for text."""
    a, b = (luminance(color(browser, selector, key)) for key in ("color", "backgroundColor"))
    return (max(a, b) + 0.05) / (min(a, b) + 0.05)


# ---- measured times


def measured(compiled):
    """A profile as `llmc bench --profile --json` has it: of each layer gate_up takes longest, and has one time with
    what follows it."""
    phases = []
    for phase, low in compiled.lowered.items():
        entries, nodes = [], list(low.nodes)
        while nodes:
            node = nodes.pop(0)
            joined = [node.name]
            if node.name.endswith(".mlp.gate_up"):
                joined.append(nodes.pop(0).name)
            entries.append({"operations": joined, "us": {"median": 40.0 if len(joined) > 1 else 2.5}})
        phases.append({"phase": phase, "operations": entries, "step_ms": 1.5})
    return {
        "ok": True,
        "model": compiled.model.name,
        "device": compiled.options.device,
        "dtype": compiled.dtype,
        "attention": compiled.options.attention,
        "world_size": compiled.options.world_size,
        "profiles": [{"batch": 2, "prompt": 64, "answer": 16, "threads": 2, "phases": phases}],
    }


@pytest.fixture
def timed(picture, open_page, tmp_path):
    compiled, _ = picture("llama2-7b", device="host")
    file = tmp_path / "times.json"
    file.write_text(json.dumps(measured(compiled)))
    return compiled, read(open_page(page(compiled, read_times(file, compiled))))


def test_measured_times_stand_in_the_boxes_and_mark_what_takes_long(timed):
    _, browser = timed
    assert complaints(browser) == ([], [])
    assert "measured" in browser.find_element(By.ID, "facts").text
    assert "batch 2, [64,16], 2 threads: a step takes 1.50 ms in prefill, 1.50 ms in decode" in (
        browser.find_element(By.ID, "facts").text
    )
    for where in ("prefill", "decode"):
        slow, fast = (box(browser, where, f"layers.0.{name}") for name in ("mlp.gate_up", "attn.o"))
        assert slow.find_element(By.CSS_SELECTOR, ".time").text == "40.0 µs joined"
        assert fast.find_element(By.CSS_SELECTOR, ".time").text == "2.5 µs"
        bar = "return parseFloat(getComputedStyle(arguments[0], '::before').width)"
        assert browser.execute_script(bar, slow) == pytest.approx(10)
        assert browser.execute_script(bar, fast) == pytest.approx(2 + 8 * 2.5 / 40, abs=0.1)
        assert overlaps(browser, where) == []
        assert cut(browser, where) == []
    operator = box(browser, "model", "layers.0.mlp.gate_up")
    assert operator.find_element(By.CSS_SELECTOR, ".time").text == "prefill 40.0 µs joined, decode 40.0 µs joined"
    go_to(browser, "layers 31")
    assert (
        box(browser, "decode", "layers.31.mlp.gate_up").find_element(By.CSS_SELECTOR, ".time").text == "40.0 µs joined"
    )


def test_the_details_say_the_share_and_what_a_time_is_joined_with(timed):
    compiled, browser = timed
    click(browser, box(browser, "decode", "layers.0.mlp.gate_up"))
    said = browser.find_element(By.ID, "details").text
    rest = len(compiled.lowered["decode"].nodes) - 2 * 32
    share = 40 / (32 * 40 + rest * 2.5)
    assert f"40.0 µs, {100 * share:.2f} % of the operations' time; one time with layers.0.mlp.gated" in said


def test_a_page_without_times_has_no_mark(picture, open_page):
    _, text = picture("llama2-7b", device="host")
    assert open_page(text).find_elements(By.CSS_SELECTOR, ".timed, .time") == []
