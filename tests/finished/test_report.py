"""The page of a run: what a reader sees in a browser, and that it is what the run's files say."""

import hashlib
import io
import json
import math
import re
import shutil
from dataclasses import asdict, replace
from itertools import product

import numpy as np
import pytest
from PIL import Image
from sealed import write_checkpoint

from sora_hw import cli
from sora_hw.analysis.figures import COLOURS
from sora_hw.errors import HIDDEN, without_secrets
from sora_hw.finished import scores, spectra
from sora_hw.finished.report import write_report
from sora_hw.finished.report.charts import Chart, Line, plain, thin
from sora_hw.finished.run import read_run
from sora_hw.recipes import commonsense, glue
from sora_hw.training.run_folder import LATER

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
QUIET = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
HOSTILE = '</style></script><script>document.title="taken"</script><img src=x onerror="document.title=1">&amp;'
TOKEN = "hf_AbCdEfGhIjKlMnOpQrStUvWxYz012345"
STEPS = 40
CONFIG = b"{}"  # all that was trained here; a spectrum is shown beside it only with its checksum
TRAINED = hashlib.sha256(f"adapter_config.json {hashlib.sha256(CONFIG).hexdigest()}\n".encode()).hexdigest()


def history(steps=STEPS, height=2.0):
    """A log with everything in it: a loss that falls from about `height` with ripples, and a validation at the middle
    and at the end."""
    entries = []
    for step in range(1, steps + 1):
        loss = height * math.exp(-step / 12) + 0.3 + 0.05 * math.sin(step)
        speed, memory = 1500 * height + 500 * math.cos(step), 0.375 * height + 0.001 * step
        entry = {"step": step, "loss": loss, "learning_rate": 1e-3 * (1 - step / steps), "grad_norm": 1 + 1 / step}
        entries.append({**entry, "tokens_per_second": speed, "peak_memory_gib": memory})
        if step % (steps // 2) == 0:
            entries.append({"step": step, "eval_loss": loss + 0.1})
    return entries


def make(folder, recipe, entries=None, status="finished", **changes):
    """A run's folder as the launcher leaves it."""
    folder.mkdir(parents=True)
    results = {
        **{"steps": STEPS, "final_loss": 0.40712345, "validation_loss": 0.45612345, "validation": {}, "test": {}},
        **{"seconds": 93.4, "tokens_per_second": 3456.78, "peak_memory_bytes": 858993459, "trainable_percent": 1.2345},
        **{"adapter": str(folder / "adapter"), "embedded_questions": None},
    }
    manifest = {
        **{"started": "2026-01-02T03:04:05+00:00", "finished": "2026-01-02T03:06:05+00:00", "git_commit": "0a" * 20},
        **{"versions": {"torch": "2.13.0", "peft": "0.21.2"}, "device_name": "AMD EPYC", "device": "cpu"},
        **{"kernels": "sora_hw_kernels.reference", "recipe": asdict(recipe), "deepspeed": {"train_batch_size": 32}},
        "profile": {"name": "cpu", "micro_batch": 8, "zero_stage": 2, "dtype": "float32", "environment": {}},
        "batch": {"global_batch": 32, "world_size": 2, "micro_batch": 8, "accumulation": 2},
        "data": {"checksum": "c0ffee" * 10 + "beef", "training_samples": 1048, "truncated": 0, "steps": STEPS},
        **{"argv": ["--backend", "cpu"], "environment": {"DS_ACCELERATOR": "cpu"}, "device_settings": {}},
        **{"resumed_from": None, "status": status},
    }
    if status == "finished":
        manifest["results"] = results | changes.pop("results", {})
    (folder / "run.json").write_text(json.dumps(manifest | changes))
    log = {"log_history": history() if entries is None else entries}
    (folder / "trainer_state.json").write_text(json.dumps(log))
    return folder


def add_spectrum(folder, method, low):
    layers = []
    for number in range(6):
        sigma = [0.5 ** (index * (1 + number / 6)) for index in range(8)]
        numbers = {"entropy": low + number / 10, "stable_rank": 1.0 + number, "norm": 1.5}
        name = f"model.layers.{number // 2}.{'qk'[number % 2]}_proj"
        layers.append({"name": name, "shape": [64, 64], "computed": "core", **numbers, "singular_values": sigma})
    content = {"version": 1, "method": method, "recipe": "commonsense", "seed": 42, "layers": layers}
    (folder / "spectrum.json").write_text(json.dumps(content | {"trained": TRAINED}))
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_bytes(CONFIG)


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    return tmp_path_factory.mktemp("report")


@pytest.fixture(scope="module")
def full(room):
    """A run of which everything is known."""
    demo = {"questions": 360, "chance": 0.4, "before": 0.428, "after": 0.889}
    folder = make(room / "full", commonsense.embedded(), results={"embedded_questions": demo})
    add_spectrum(folder, "sora", 2.0)
    (folder / "scores").mkdir()
    found = [
        scores.Score(scores.LIKELIHOOD, task, scores.ACCURACY, value, 200)
        for task, value in (("boolq", 0.6155), ("piqa", 0.7711))
    ]
    scores.write_scores(folder / "scores", found, {})
    return folder


@pytest.fixture(scope="module")
def several(room):
    """Three methods on one task, one of which diverged."""
    folders = []
    for number, method in enumerate(("lora", "dora", "sora")):
        recipe = replace(glue.recipe("cola"), method=method, learning_rate=1e-3 * (number + 1))
        given = {"results": {"test": {"matthews": 0.5 + number / 100}}} if method != "dora" else {"status": "diverged"}
        folders.append(make(room / "several" / method, recipe, history(height=2.0 + number), **given))
        if method != "dora":
            add_spectrum(folders[-1], method, 1.0 + number)
    return folders


@pytest.fixture(scope="module")
def pages(full, several, room):
    """The files of the two pages."""
    return {
        "one": write_report([read_run(full)]),
        "several": write_report([read_run(folder) for folder in several], room / "several.html"),
    }


@pytest.fixture(scope="module")
def chromium():
    if CHROMIUM is None:
        pytest.skip("needs Chromium (`ci/browser` installs it on Debian)")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def show(chromium):
    """`show(file, width, scheme)` opens it; whatever the page complains of or asks for fails the test."""
    contexts, complaints, requests = [], [], []

    def open_page(file, width=1280, scheme="light"):
        context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(file.resolve().as_uri())
        assert requests.pop() == file.resolve().as_uri()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == [] and requests == []


# What is seen, in a browser

RGB = """colour => { const c = document.createElement("canvas").getContext("2d");
  c.fillStyle = colour; c.fillRect(0, 0, 1, 1); return [...c.getImageData(0, 0, 1, 1).data]; }"""

TEXTS = f"""() => {{
  const rgb = {RGB}, found = [];
  for (const each of document.querySelectorAll("body *")) {{
    const text = [...each.childNodes].filter(n => n.nodeType == 3).map(n => n.data.trim()).join("");
    if (!text || each.closest(".reading") || !each.checkVisibility()) continue;
    const svg = each.namespaceURI.endsWith("svg"), style = getComputedStyle(each);
    let behind = each, back = [0, 0, 0, 0];
    for (; behind && back[3] == 0; behind = behind.parentElement) back = rgb(getComputedStyle(behind).backgroundColor);
    found.push([text, rgb(svg ? style.fill : style.color), back, parseFloat(style.fontSize)]);
  }}
  return found;
}}"""


def luminance(rgb):
    """WCAG 2's relative luminance."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (value / 255 for value in rgb[:3])]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


# Every page in both widths and both schemes; the other combinations of the three follow in `make test-full`.
SHOWN = [("one", 1280, "light"), ("one", 390, "dark"), ("several", 1280, "dark"), ("several", 390, "light")]
ALL_SHOWN = [*product(("one", "several"), (1280, 390), ("light", "dark"))]


@pytest.mark.parametrize(
    ("which", "width", "scheme"),
    [case if case in SHOWN else pytest.param(*case, marks=pytest.mark.full) for case in ALL_SHOWN],
)
def test_the_page_is_readable(pages, show, which, width, scheme):
    page = show(pages[which], width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    texts = page.evaluate(TEXTS)
    assert len(texts) > 60
    for text, ink, back, size in texts:
        assert contrast(ink, back) >= 4.5, (text, ink, back)
        assert size >= 12, text
    outside = "[...document.querySelectorAll('.plot > svg > text, h1, h2, h3, dd, dt, figcaption, .legend li')]"
    edges = page.evaluate(f"{outside}.map(e => e.getBoundingClientRect()).map(box => [box.left, box.right])")
    assert min(left for left, _ in edges) >= 0 and max(right for _, right in edges) <= width
    page_colour = page.evaluate(f"({RGB})(getComputedStyle(document.documentElement).backgroundColor)")
    assert luminance(page_colour) > 0.8 if scheme == "light" else luminance(page_colour) < 0.05
    _check_charts(page, 6 if which == "one" else 5)


def _check_charts(page, least):
    """Every chart shows each of its lines, over its width, in a colour that stands out from the page."""
    charts = page.locator(".plot > svg")
    assert charts.count() >= least
    panel = page.evaluate(f"({RGB})(getComputedStyle(document.querySelector('.panel')).backgroundColor)")
    for index in range(charts.count()):
        chart = charts.nth(index)
        pixels = np.asarray(Image.open(io.BytesIO(chart.screenshot())).convert("RGB")).astype(int)
        drawn = f"""each => [
          ...[...each.querySelectorAll(".line")].map(line => [true, ({RGB})(getComputedStyle(line).stroke)]),
          ...[...each.querySelectorAll(".dot circle")].map(dot => [false, ({RGB})(getComputedStyle(dot).fill)])]"""
        marks = chart.evaluate(drawn)
        assert marks
        for is_line, colour in marks:
            assert contrast(colour, panel) >= 3, colour
            near = np.abs(pixels - colour[:3]).max(axis=2) < 40
            columns = near.any(axis=0)
            assert near.sum() > 40
            assert columns.mean() > 0.6 if is_line else columns.sum() > 5


def test_charts_show_the_values_of_the_log(full, pages, show):
    """The line is read back by the labels of the axes: two of them give the scale."""
    page = show(pages["one"])
    logged = [entry for entry in history() if "loss" in entry]
    drawn = {"Loss": "loss", "Throughput": "tokens_per_second", "Peak memory so far": "peak_memory_gib"}
    for title, key in drawn.items():
        chart = page.locator("figure.chart").filter(has=page.locator("figcaption", has_text=re.compile(rf"^{title}\b")))
        data = chart.locator("path.line").first.get_attribute("d")
        points = np.array([list(map(float, point.split())) for point in data[1:].split("L")]) / 10
        ticks = "all => all.map(e => [e.textContent, e.getAttribute('x'), e.getAttribute('y')])"
        marks = [
            (float(text.replace(",", "")), float(x.rstrip("%")), float(y.rstrip("%")))
            for text, x, y in chart.locator(".plot > svg > text:not(.across)").evaluate_all(ticks)
        ]
        xs, ys = [mark for mark in marks if mark[2] == 100 and mark[1] > 0], [mark for mark in marks if mark[1] == 0]
        assert len(xs) >= 3 and len(ys) >= 3
        steps = xs[0][0] + (points[:, 0] - xs[0][1]) * (xs[-1][0] - xs[0][0]) / (xs[-1][1] - xs[0][1])
        values = ys[0][0] + (points[:, 1] - ys[0][2]) * (ys[-1][0] - ys[0][0]) / (ys[-1][2] - ys[0][2])
        assert steps == pytest.approx([entry["step"] for entry in logged], abs=0.02)
        spread = max(entry[key] for entry in logged)
        assert values == pytest.approx([entry[key] for entry in logged], abs=2e-3 * spread)


def test_the_values_stand_where_the_pointer_is(pages, show):
    page = show(pages["one"])
    chart = page.locator("figure.chart").first
    chart.scroll_into_view_if_needed()
    box = chart.locator(".plot > svg").bounding_box()
    seen = "all => all.filter(e => e.checkVisibility({visibilityProperty: true})).map(e => e.textContent)"
    assert chart.locator(".reading > g").evaluate_all(seen) == []
    page.mouse.move(box["x"] + box["width"] * (19.3 / 39), box["y"] + box["height"] / 2)  # nearer to step 20 than to 21
    (shown,) = chart.locator(".reading > g").evaluate_all(seen)
    logged = {key: value for entry in history() if entry["step"] == 20 for key, value in entry.items()}
    wanted = f"optimiser step 20● training {logged['loss']:#.4g}● validation {logged['eval_loss']:#.4g}"
    assert re.sub(r"\s+", " ", shown) == wanted


def test_key_figures_are_those_of_run_json(full, pages, show):
    page = show(pages["one"])
    cards = dict(page.locator(".card").evaluate_all("all => all.map(e => [e.firstChild.innerText, e.innerText])"))
    found = {label: re.sub(r"\s+", " ", text.removeprefix(label)).strip() for label, text in cards.items()}
    assert found == {
        "final loss": "0.4071 step 40 of 40",
        "validation loss": "0.4561 on records held out",
        "questions right": "88.9 % 42.8 before, 40.0 by chance",
        "speed": "3,457 tokens/s",
        "peak memory": "0.80 GiB on rank 0",
        "trainable": "1.234 % of the parameters",
        "time": "1:33 of training",
        "entropy": "2.25 nats mean over layers",
    }


def test_scores_stand_beside_the_paper_s(pages, show):
    page = show(pages["one"])
    rows = (
        page.locator("table.figures")
        .first.locator("tr")
        .evaluate_all("all => all.map(row => [...row.children].map(cell => cell.innerText.trim()))")
    )
    assert ["BoolQ", "61.55", "71.56", "-10.01"] in rows, "Table 3, LLaMA3-8B, SORA, rank 16"
    assert ["PIQA", "77.11", "76.71", "+0.40"] in rows
    several = show(pages["several"]).locator("table.figures").nth(1).inner_text()
    assert re.search(r"LoRA\s+50\.00\s+paper 69\.71 ± 0\.51, -19\.71", several)
    assert re.search(r"SORA\s+52\.00\s+paper 70\.80 ± 1\.18, -18\.80", several)


def test_hostile_text_stays_text(tmp_path, show):
    recipe = replace(commonsense.embedded(), model=f"some/{HOSTILE}")
    folder = make(
        tmp_path / "run",
        recipe,
        argv=["--model", HOSTILE, f"https://user:{TOKEN}@host/x", "--token", TOKEN],
        device_name=HOSTILE,
        environment={HOSTILE: HOSTILE, "HF_TOKEN": "notlikeatoken", "NCCL_DEBUG": TOKEN},
        deepspeed={HOSTILE: TOKEN},
    )
    add_spectrum(folder, HOSTILE, 1.0)
    text = (folder / "spectrum.json").read_text().replace("q_proj", json.dumps(HOSTILE)[1:-1])
    (folder / "spectrum.json").write_text(text)
    source = write_report([read_run(folder)]).read_text()
    assert TOKEN not in source and "notlikeatoken" not in source and source.count(HIDDEN) >= 5
    page = show(folder / "report.html")
    assert page.title().startswith("SORA on ")
    assert page.locator("script, img").count() == 0
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    words = page.locator("body").inner_text()
    assert HOSTILE.rpartition("/")[2] in page.locator("h1").inner_text()
    assert HOSTILE in page.locator("header p").first.inner_text() and HOSTILE in words
    assert words.count("<script>document.title") >= 7


def test_prints_without_what_is_cut(pages, show):
    page = show(pages["one"])
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.querySelector('.panel')).breakInside") == "avoid"
    assert page.pdf()[:4] == b"%PDF"


# What is written, without a browser


def test_the_page_asks_for_nothing(pages):
    for file in pages.values():
        source = file.read_text()
        assert "default-src 'none'" in source
        assert re.findall(r"(?:src=|href=|url\()[\"']?([^\"'\s>)]+)", source) == ["data:,"]
        assert "<script" not in source and "@import" not in source
        assert file.stat().st_size < 250_000


def test_what_is_missing_is_named_with_its_command(tmp_path):
    entries = [{"step": 1, "loss": 1.0, "learning_rate": 1e-3}]
    folder = make(tmp_path / "my run", commonsense.embedded(), entries)
    source = write_report([read_run(folder)]).read_text()
    for words in ("launchers/score.py --adapter", "sora-hw spectrum", "holds no throughput and no memory"):
        assert source.count(words) == 1
    assert source.count(f"&#39;{folder}&#39;</code>") == 2, "quoted for the shell"


def test_a_run_that_diverged(tmp_path):
    entries = [*history()[:10], {"step": 11, "loss": math.nan, "learning_rate": 1e-3}]
    folder = make(tmp_path / "run", commonsense.embedded(), entries, status="diverged")
    source = write_report([read_run(folder)]).read_text()
    assert "diverged: its loss was no longer finite at step 11" in source
    assert "not finite" in source and "nan" not in re.sub(r"<style>.*</style>", "", source, flags=re.DOTALL)
    assert "launchers/score.py" not in source and "sora-hw spectrum" not in source


def test_a_run_that_has_not_finished(tmp_path):
    folder = make(tmp_path / "run", commonsense.embedded(), status="started")
    (folder / "trainer_state.json").unlink()
    assert "No losses yet" in write_report([read_run(folder)]).read_text()
    checkpoint = folder / "checkpoint-20"
    write_checkpoint(checkpoint, history()[:20])
    run = read_run(folder)
    assert len(run.history) == 20
    source = write_report([run]).read_text()
    assert "has not finished" in source and "(step 20 of 40)" in source and ">unfinished<" in source


def test_several_runs_show_what_they_differ_in(several, pages):
    source = pages["several"].read_text()
    table = source[source.index("What they differ in") :]
    header = re.findall(r'<th scope="col">(.*?)</th>', table)
    assert header == ["run", "method", "learning rate"]
    rows = re.findall(r"</i>(.*?)</th><td>(.*?)</td><td>(.*?)</td>", table)
    assert rows == [("LoRA", "lora", "0.001"), ("DoRA", "dora", "0.002"), ("SORA", "sora", "0.003")]
    colours = re.findall(r'class="line series" style="--raw: (#\w+)"', source)
    assert colours[:3] == [COLOURS[name] for name in ("lora", "dora", "sora")]
    assert "No spectra yet of 1 of these runs" in source and "diverged" in source
    bars = re.findall(r'<span class="of">(.*?)</span>.*?width: ([\d.]+)%.*?<b>(.*?)</b>', source, re.DOTALL)
    assert bars == [("LoRA", f"{100 * 1.25 / 3.25:.1f}", "1.25"), ("SORA", "100.0", "3.25")], "entropy by method"


def test_runs_are_named_by_what_tells_them_apart(tmp_path):
    recipe = glue.recipe("cola")
    seeds = [make(tmp_path / f"seed{seed}", replace(recipe, seed=seed)) for seed in (0, 1)]
    source = write_report([read_run(folder) for folder in seeds], tmp_path / "page.html").read_text()
    assert re.findall(r"<li>.*?</i>(.*?)</li>", source)[:2] == ["SORA, seed 0", "SORA, seed 1"]
    again = make(tmp_path / "again", replace(recipe, seed=0))
    source = write_report([read_run(folder) for folder in (*seeds, again)], tmp_path / "page.html").read_text()
    assert re.findall(r"<li>.*?</i>(.*?)</li>", source)[:3] == [str(folder) for folder in (*seeds, again)]
    assert len(set(re.findall(r'class="line series" style="--raw: (#\w+)"', source)[:3])) == 3
    same = write_report([read_run(seeds[0]), read_run(again)], tmp_path / "page.html").read_text()
    assert "Nothing: recipe, data, hardware and versions are the same." in same


def test_the_command(several, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    alone, output = several[0], tmp_path / "other.html"
    assert cli.main(["report", str(alone)]) == 0
    assert capsys.readouterr().out == f"{alone / 'report.html'}\n"
    assert cli.main(["report", str(alone.parent)]) == 0, "as a sweep"
    assert (tmp_path / "report.html").read_text().count("<title>3 runs</title>") == 1
    assert cli.main(["report", str(alone), str(alone), "--output", str(output)]) == 0
    assert "<title>2 runs</title>" in output.read_text()
    capsys.readouterr()
    assert cli.main(["report", str(alone), "--output", str(tmp_path / "gone" / "page.html")]) == 2
    assert "gone/page.html cannot be written (No such file or directory)" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.html", "report.html"]


def test_a_long_run_makes_a_small_page(tmp_path):
    folder = make(tmp_path / "run", commonsense.embedded(), history(10_000))
    file = write_report([read_run(folder)])
    assert file.stat().st_size < 600_000
    assert max(map(len, re.findall(r' d="(.*?)"', file.read_text()))) < 600 * 15


def test_overwriting_a_run_deletes_what_was_made_of_it():
    assert {scores.FOLDER, spectra.FILE} < set(LATER)


# From numbers to geometry


def test_thinning_keeps_ends_and_extremes():
    rng = np.random.default_rng(0)
    points = [(float(step), float(value)) for step, value in enumerate(rng.standard_normal(10_001))]
    points[777], points[9_000] = (777.0, 50.0), (9_000.0, -50.0)
    kept = thin(points, 600)
    assert len(kept) <= 610
    assert kept == sorted(kept) and set(kept) <= set(points)
    assert {points[0], points[-1], points[777], points[9_000]} <= set(kept)
    heights = np.full(len(points), np.nan)
    for x, y in kept:
        heights[int(x)] = y
    for x, y in points:  # whatever is left out lies between what is drawn near it
        near = heights[max(int(x) - 34, 0) : int(x) + 35]
        assert np.nanmin(near) <= y <= np.nanmax(near)
    assert thin(points[:600], 600) == points[:600]


def chart(points, **options):
    return Chart("Loss", "nats", "step", [Line("training", points, "#000000")], **options)


def test_places_are_shares_of_the_plot():
    drawn = chart([(0.0, 1.0), (5.0, 2.0), (10.0, 3.0)])
    assert [drawn.left(x) for x in (0, 5, 10)] == [0, 50, 100]
    assert [drawn.top(y) for y in (1, 2, 3)] == pytest.approx([100 * 1.04 / 1.08, 50, 100 * 0.04 / 1.08])
    assert drawn.path(drawn.lines[0]) == "M0.0 963.0L500.0 500.0L1000.0 37.0"
    zero = chart([(0.0, 1.0), (1.0, 3.0)], from_zero=True)
    assert zero.top(0.0) == 100 and zero.top(3.0) == pytest.approx(100 * 0.12 / 3.12)


def test_a_wide_span_of_values_is_logarithmic():
    narrow, wide = chart([(0.0, 1.0), (1.0, 9.0)], may_log=True), chart([(0.0, 0.1), (1.0, 10.0)], may_log=True)
    assert not narrow.log and wide.log and not chart([(0.0, 0.1), (1.0, 10.0)]).log
    assert not chart([(0.0, 0.0), (1.0, 10.0)], may_log=True).log
    assert wide.top(1.0) == pytest.approx(50)
    assert [(tick.text, round(tick.at, 1)) for tick in wide.y_ticks] == [("0.1", 96.3), ("1", 50.0), ("10", 3.7)]


def test_values_that_cannot_be_drawn_are_left_out():
    drawn = chart([(1.0, 2.0), (2.0, math.nan), (3.0, math.inf), (4.0, 3.0)])
    assert drawn.path(drawn.lines[0]).count("L") == 1
    assert [reading.title for reading in drawn.readings] == ["step 1", "step 4"]


def test_a_run_whose_first_loss_is_no_number(tmp_path):
    entries = [{"step": 1, "loss": math.nan, "learning_rate": 1e-3, "grad_norm": None}]
    source = write_report([read_run(make(tmp_path / "run", commonsense.embedded(), entries, "diverged"))]).read_text()
    assert source.count('<figure class="panel chart') == 1, "the learning rate"
    assert "no longer finite at step 1," in source


def test_many_runs_on_one_page(tmp_path):
    recipes = [replace(commonsense.embedded(), seed=seed) for seed in range(40)]
    runs = [read_run(make(tmp_path / str(recipe.seed), recipe, history(200))) for recipe in recipes]
    assert write_report(runs, tmp_path / "page.html").stat().st_size < 1_500_000


@pytest.mark.parametrize("points", [[(7.0, 3.0)], [(7.0, 0.0)], [(1.0, 2.0), (2.0, 2.0)]])
def test_one_value_is_drawn_in_the_middle(points):
    drawn = chart(points)
    assert drawn.top(points[0][1]) == pytest.approx(50)
    assert all(0 <= tick.at <= 100 for tick in (*drawn.x_ticks, *drawn.y_ticks))


def test_readings_fill_the_width_and_include_every_dot():
    lines = [
        Line("training", [(float(step), 1.0) for step in range(1000)], "#000000"),
        Line("validation", [(333.0, 2.0), (999.0, 3.0)], "#111111", dots=True),
    ]
    readings = Chart("Loss", "nats", "step", lines).readings
    assert len(readings) < 100
    assert [r.left for r in readings[1:]] == pytest.approx([r.left + r.width for r in readings[:-1]])
    assert readings[0].left == 0 and readings[-1].left + readings[-1].width == pytest.approx(100)
    dotted = [reading for reading in readings if len(reading.values) == 2]
    assert [reading.title for reading in dotted] == ["step 333", "step 999"]
    assert dotted[0].values == [("training", "1.000", "#000000"), ("validation", "2.000", "#111111")]


def test_numbers_on_an_axis():
    numbers = {0: "0", 20.0: "20", 1200: "1,200", 25000: "25,000", 0.0004: "0.0004", 2.5: "2.5", 5e-6: "5e-06"}
    assert {value: plain(value) for value in numbers} == numbers


NAMES = (
    "meta-llama/Meta-Llama-3-8B-hf_x",
    "data/hf_commonsense_170k/train.jsonl",
    "cross-encoder/ms-marco-MiniLM-L-6-v2",
    "models/sk-learn-of-my-own-making",
    "--max-new-tokens 128 --tokenizer x",
    "https://example.org/@someone/x",
)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        (TOKEN, HIDDEN),
        ("--token=ghp_0123456789abcdef0123 --rank 4", f"--token={HIDDEN} --rank 4"),
        ("https://me:pass@mirror.example/x", f"https://{HIDDEN}@mirror.example/x"),
        ("https://me:p@ss:w@mirror.example/@x", f"https://{HIDDEN}@mirror.example/@x"),
        ("--hub-token canary --rank 4 --api_key=x", f"--hub-token {HIDDEN} --rank 4 --api_key={HIDDEN}"),
        ("ms-01234567-89ab-cdef-0123-456789abcdef", HIDDEN),
        ("sk-proj-Ab0123456789abcdefgh", HIDDEN),
        ("Authorization: Bearer abc.def", f"Authorization: Bearer {HIDDEN}"),
        ("c0ffee" * 10 + "beef", "c0ffee" * 10 + "beef"),
        *[(name, name) for name in NAMES],
    ],
)
def test_secrets_are_taken_out_of_text(text, clean):
    assert without_secrets(text) == clean
