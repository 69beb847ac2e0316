"""The page in a headless Chromium, against the Python runtime; the files and errors of `write_page`.

`PAGE_PICTURE=docs/images/page.png pytest tests/export/test_page.py -k readmes_picture` makes the README's picture,
`TABLE_BUNDLE=diamonds-onnx TABLE_PICTURE=docs/images/page_table.png … -k tables_picture` that of a table, and
`BACKENDS_TABLE=docs/backends.txt … -k backend` the table of all backends' differences.
"""

import base64
import contextlib
import csv
import datetime
import functools
import hashlib
import http.server
import io
import itertools
import json
import math
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from diffusers import DDPMScheduler
from helpers import ROOT, assert_one_line_error, random_weights, serving
from PIL import Image
from tabulate import tabulate
from test_asking import draw_with_torch

from ddpm_mlp_pipeline import DDPMMLPPipeline, MLPModel, OnnxSampler, export_bundle, load_checkpoint, pretrained
from ddpm_mlp_pipeline.errors import BundleError, ConfigurationError, OutputExistsError
from ddpm_mlp_pipeline.export import page as page_module
from ddpm_mlp_pipeline.export.compile import compile_scheduler, make_scheduler
from ddpm_mlp_pipeline.export.page import BINARIES, NEEDED, PAGE_FILES, SCRIPTS, VERSION, write_page
from ddpm_mlp_pipeline.export.sampler_graph import build_sampler
from ddpm_mlp_pipeline.runtime import noise
from ddpm_mlp_pipeline.runtime.bundle import seal
from ddpm_mlp_pipeline.runtime.pictures import image_grid
from ddpm_mlp_pipeline.table_scheduler import StepTableScheduler
from ddpm_mlp_pipeline.training.options import FittingArguments
from ddpm_mlp_pipeline.training.table_parameters import TableParameters

LOADED = "document.getElementById('draw').disabled === false || document.getElementById('error').hidden === false"
ENDED = """
    ['done', 'stopped', 'failed'].includes(document.getElementById('status').dataset.state)
    && document.getElementById('draw').textContent === 'Draw'
"""
SOFTWARE_WEBGPU = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan")
WIDE, PHONE = {"width": 1280, "height": 800}, {"width": 360, "height": 640}


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


class Isolated(Quiet):
    """A server that sends the two headers without which browsers allow no shared memory, and so no threads."""

    def end_headers(self):
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()


@pytest.fixture
def serve():
    """Serve a folder, like `python -m http.server`, and return its address."""
    with contextlib.ExitStack() as servers:
        yield lambda folder, handler=Quiet: servers.enter_context(
            serving(functools.partial(handler, directory=folder))
        )


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -e '.[dev]'")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    path = next(filter(None, map(shutil.which, names)), None) or pytest.skip(
        "needs Chromium: apt-get install chromium"
    )
    with playwright.sync_playwright() as context:
        browser = context.chromium.launch(executable_path=path, args=["--no-sandbox", *SOFTWARE_WEBGPU])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, serve):
    """Open a page's folder in the browser, and wait until it is ready or shows an error."""
    contexts = []

    def visit(folder, viewport=WIDE, as_file=False, handler=Quiet, query="", **options):
        options = {"viewport": viewport, "reduced_motion": "reduce", **options}  # no delay between steps
        contexts.append(context := chromium.new_context(**options))
        tab = context.new_page()
        tab.set_default_timeout(120_000)
        tab.requests = []
        tab.on("request", lambda request: tab.requests.append(request.url))
        tab.address = folder.as_uri() + "/index.html" if as_file else serve(folder, handler)
        tab.goto(tab.address + query)
        tab.wait_for_function(LOADED)
        return tab

    yield visit
    for context in contexts:
        context.close()


def draw(tab, seed, count):
    """Fill in the form, click, and wait for the end. Return the error that the page shows."""
    tab.fill("#seed", str(seed))
    tab.fill("#count", str(count))
    tab.click("#draw")
    tab.wait_for_function(f"({ENDED}) || document.getElementById('error').hidden === false")
    return tab.inner_text("#error")


def pixels_of(tab):
    """Return the canvas, `[height, width, 4]`."""
    address = tab.eval_on_selector("#canvas", "(canvas) => canvas.toDataURL('image/png')")
    png = base64.b64decode(address.partition(",")[2])
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))


def saved(tab):
    """Click the save button, and return the file's bytes and name."""
    with tab.expect_download() as download:
        tab.click("#save")
    with open(download.value.path(), "rb") as file:
        return file.read(), download.value.suggested_filename


@pytest.fixture(scope="module")
def pages(tmp_path_factory, onnxruntime_web):
    """Make a bundle's page, once per bundle."""
    made = {}

    def pages(bundle):
        if bundle not in made:
            made[bundle] = tmp_path_factory.mktemp("pages") / bundle.name
            write_page(bundle, made[bundle], onnxruntime_web)
        return made[bundle]

    return pages


@pytest.fixture(scope="module", params=[1, 3])
def image_bundle(request, tmp_path_factory):
    """A bundle of an untrained network for images that are not square, grey or in colour."""
    folder = tmp_path_factory.mktemp("images")
    scheduler = DDPMMLPPipeline.from_pretrained(pretrained("heart")).scheduler
    pipeline = DDPMMLPPipeline(MLPModel(request.param, (6, 9), hidden_dim=32), scheduler)
    pipeline.save_pretrained(folder / "checkpoint")
    export_bundle(folder / "checkpoint", folder / "bundle", "ddpm", 5)
    return folder / "bundle"


@pytest.mark.parametrize("seed", [0, 2**32 + 5, 2**63 - 1])
@pytest.mark.parametrize("bundle", ["ddim_bundle", "ddpm_bundle"])
def test_the_points_are_pythons(visit, pages, request, bundle, seed):
    bundle = request.getfixturevalue(bundle)
    tab = visit(pages(bundle))
    assert draw(tab, seed, 300) == ""
    content, name = saved(tab)
    assert name == f"heart-seed-{seed}.csv"
    assert content.startswith(b"x,y\n")
    points = np.loadtxt(io.BytesIO(content), delimiter=",", skiprows=1)
    np.testing.assert_allclose(points, OnnxSampler(bundle).sample(300, seed), atol=1e-4)


def test_the_whole_sampler_runs_in_a_browser(visit, pages, ddpm_bundle, tmp_path):
    """sampler.onnx with onnxruntime-web alone, without the page's code."""
    folder = tmp_path / "page"
    shutil.copytree(pages(ddpm_bundle), folder)
    onnx.save(build_sampler(ddpm_bundle), folder / "sampler.onnx")
    points = visit(folder).evaluate("""async () => {
        const ort = await import("./onnxruntime/ort.wasm.bundle.min.js");
        const packed = await fetch("./onnxruntime/ort-wasm-simd-threaded.wasm.gz");
        const wasm = new Response(packed.body.pipeThrough(new DecompressionStream("gzip")));
        Object.assign(ort.env.wasm, { numThreads: 1, wasmBinary: await wasm.arrayBuffer() });
        const session = await ort.InferenceSession.create("./sampler.onnx");
        const scalar = (number) => new ort.Tensor("int64", BigInt64Array.of(number), []);
        const { samples } = await session.run({ seed: scalar(2n ** 40n + 7n), num_samples: scalar(500n) });
        return Array.from(samples.data);
    }""")
    expected = OnnxSampler(ddpm_bundle).sample(500, seed=2**40 + 7)
    np.testing.assert_allclose(np.reshape(points, expected.shape), expected, atol=1e-4)


ON_WEBGPU = """async ([numSamples, numCalls]) => {
    const worker = new Worker("./worker.js", { type: "module" });
    const ask = (name, argument) => new Promise((resolve, reject) => {
        worker.onmessage = ({ data }) => (data.error === undefined ? resolve(data.result) : reject(Error(data.error)));
        worker.postMessage({ id: 0, name, argument });
    });
    await ask("open", { provider: "webgpu", numThreads: 1 });
    await ask("start", { numSamples, seed: 2n ** 40n + 7n, asked: {} });
    let step;
    for (let k = 0; k < numCalls; k++) step = await ask("step");
    worker.terminate();
    return Array.from(step.sample);
}"""


def test_webgpu_draws_the_same_images(visit, pages, tiny_bundle):
    """On a device of software."""
    sampler = OnnxSampler(tiny_bundle)
    expected = sampler.sample(2, seed=2**40 + 7)
    samples = visit(pages(tiny_bundle)).evaluate(ON_WEBGPU, [2, len(sampler)])
    np.testing.assert_allclose(np.reshape(samples, expected.shape), expected, atol=1e-4)


def test_a_slow_draw_takes_the_fastest_of_what_the_browser_has(visit, pages, ddim_bundle, heart, tmp_path):
    bundle = shutil.copytree(ddim_bundle, tmp_path / "slow")
    compile_scheduler(heart.scheduler, 1000).save(bundle / "step_table.json")
    seal(bundle)
    tab = visit(pages(bundle), handler=Isolated)
    rows = [row.split(": ") for row in tab.inner_text("#status").split("; ")]
    names = [name for name, _ in rows]
    threads = min(4, tab.evaluate("navigator.hardwareConcurrency"))
    # WebGPU's device is of software: it isn't tried.
    assert sorted(names) == sorted(["one thread", *([f"{threads} threads"] if threads > 1 else [])])
    times = [float(time.removesuffix(" ms a step").replace(",", "")) for _, time in rows]
    assert times == sorted(times)
    assert tab.get_attribute("#status", "data-backend") == ("wasm" if names[0] == "one thread" else "threads")


@pytest.mark.parametrize(("query", "name"), [("threads", "threads"), ("webgpu", "WebGPU")])
def test_the_address_chooses_the_backend(visit, pages, ddim_bundle, query, name):
    """All draw the same. Of points, WebGPU's own sines would be off by 7e-3."""
    tab = visit(pages(ddim_bundle), handler=Isolated, query=f"?backend={query}")
    if query == "threads" and tab.evaluate("navigator.hardwareConcurrency") == 1:
        assert_one_line(tab.inner_text("#error"), "two headers")
        return
    assert draw(tab, 3, 50) == ""
    assert tab.inner_text("#status").endswith(name)
    points = np.loadtxt(io.BytesIO(saved(tab)[0]), delimiter=",", skiprows=1)
    np.testing.assert_allclose(points, OnnxSampler(ddim_bundle).sample(50, 3), atol=1e-4)


def test_a_backend_that_is_not_there_is_told(visit, pages, ddim_bundle):
    for query, message in (("opengl", "must be one of wasm"), ("threads", "Threads need two headers")):
        assert_one_line(visit(pages(ddim_bundle), query=f"?backend={query}").inner_text("#error"), message)


def ink_of(tab):
    """Return where the canvas has the points' colour, bool `[height, width]`, and a function from point to pixel."""
    pixels = pixels_of(tab).astype(int)
    canvas = tab.locator("#canvas")
    axes, (left, top, size) = (json.loads(canvas.get_attribute(f"data-{name}")) for name in ("axes", "plot"))

    def place(points):
        low, high = np.transpose([axes["x"], axes["y"]])
        return (points - low) / (high - low) * (1, -1) * size + (left, top + size)

    return (pixels[..., 0] - pixels[..., 2] > 60) & (pixels[..., 3] > 60), place


@pytest.mark.parametrize(("viewport", "scheme"), [(WIDE, "light"), (PHONE, "dark")])
def test_the_canvas_shows_each_point_at_its_place(visit, pages, ddim_bundle, viewport, scheme):
    tab = visit(pages(ddim_bundle), viewport, color_scheme=scheme)
    assert not ink_of(tab)[0].any()
    assert draw(tab, 11, 40) == ""
    ink, place = ink_of(tab)
    expected = place(OnnxSampler(ddim_bundle).sample(40, seed=11))
    assert all(ink[round(y), round(x)] for x, y in expected)
    rows, columns = np.nonzero(ink)
    distances = np.linalg.norm(np.stack([columns, rows], axis=1)[:, None] + 0.5 - expected, axis=2)
    assert distances.min(axis=1).max() < 5  # no pixel elsewhere has their colour
    assert "40 points" in tab.locator("#canvas").get_attribute("aria-label")


def test_the_images_are_pythons(visit, pages, image_bundle):
    tab = visit(pages(image_bundle))
    assert draw(tab, 5, 7) == ""
    grid = np.asarray(image_grid([OnnxSampler(image_bundle).sample(7, seed=5)], 7).convert("RGB")).astype(int)
    pixels = pixels_of(tab)
    assert (pixels[:6, :, 3] == 255).all()
    np.testing.assert_allclose(pixels[..., :3].astype(int), grid, atol=1)
    content, name = saved(tab)
    assert name == "checkpoint-seed-5.png"
    np.testing.assert_allclose(np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int), grid, atol=1)


def test_the_denoising_is_shown_step_by_step(visit, pages, ddpm_bundle):
    sampler = OnnxSampler(ddpm_bundle)
    steps = list(sampler.steps(40, seed=3))
    tab = visit(pages(ddpm_bundle), reduced_motion="no-preference")
    # While sampling: record each label of the page, and count the pictures on the canvas.
    tab.evaluate("""
        window.labels = new Set(); window.pictures = new Set();
        new MutationObserver(() => {
          labels.add(document.getElementById('status').textContent);
          pictures.add(document.getElementById('canvas').toDataURL());
        }).observe(document.getElementById('status'), { childList: true });
    """)
    assert draw(tab, 3, 40) == ""
    labels = tab.evaluate("Array.from(labels)")
    for k, step in enumerate(steps):
        assert any(label.startswith(f"step {k + 1} of 100, t = {step.timestep:g}") for label in labels)
    assert tab.evaluate("pictures.size") > 10
    assert tab.evaluate("document.getElementById('progress').value / document.getElementById('progress').max") == 1
    assert tab.inner_text("#status").startswith("40 points in ")

    # Afterwards: any step can be shown, including the initial noise.
    slider = tab.locator("#step")
    assert (slider.get_attribute("max"), slider.input_value()) == ("100", "100")
    for k in (50, 99):
        slider.fill(str(k + 1))
        assert tab.inner_text("#status") == f"step {k + 1} of 100, t = {steps[k].timestep:g}"
        ink, place = ink_of(tab)
        points = sampler.to_data_units(steps[k].sample)
        shown = place(points[np.abs(points).max(axis=1) < 1.4])  # noise can lie outside the axes
        assert len(shown) > 25
        assert all(ink[round(y), round(x)] for x, y in shown)
    slider.fill("0")
    assert tab.inner_text("#status").startswith("noise")


def test_a_drawing_can_be_stopped_and_begun_again(visit, pages, ddpm_bundle):
    tab = visit(pages(ddpm_bundle), reduced_motion="no-preference")
    tab.fill("#count", "10")
    tab.click("#draw")
    tab.wait_for_function("document.getElementById('progress').value >= 3")
    assert tab.inner_text("#draw") == "Stop"
    tab.click("#draw")
    tab.wait_for_function(ENDED)
    assert tab.inner_text("#status").startswith("Stopped: step ")
    assert tab.locator("#save").is_disabled()
    assert draw(tab, 1, 10) == ""
    points = np.loadtxt(io.BytesIO(saved(tab)[0]), delimiter=",", skiprows=1)
    np.testing.assert_allclose(points, OnnxSampler(ddpm_bundle).sample(10, seed=1), atol=1e-4)


def choose(tab, label, guidance_scale=None, **condition):
    """Fill in what the page offers to ask for."""
    tab.get_by_role("radio", name=label, exact=True).check(force=True)  # its text lies over it
    if guidance_scale is not None:
        tab.get_by_role("slider", name="Guidance").fill(str(guidance_scale))
    for name, value in condition.items():
        tab.get_by_role("textbox", name=name, exact=True).fill(value)


@pytest.mark.parametrize(
    ("label", "guidance_scale", "condition", "asked"),
    [
        ("any", None, {"c": "", "d": ""}, {}),
        ("3", None, {}, {"class_labels": "3", "condition": [10, 0]}),  # the condition's means
        ("b b", 2.5, {"c": "12", "d": "-1.5"}, {"class_labels": 1, "condition": [12, -1.5], "guidance_scale": 2.5}),
    ],
)
def test_points_of_a_class_are_pythons(visit, pages, labelled_points, label, guidance_scale, condition, asked):
    tab = visit(pages(labelled_points))
    assert tab.locator("#guidance-value").inner_text() == "1"
    assert tab.get_by_role("radio", name="any", exact=True).is_checked()
    choose(tab, label, guidance_scale, **condition)
    assert draw(tab, 8, 50) == ""
    points = np.loadtxt(io.BytesIO(saved(tab)[0]), delimiter=",", skiprows=1)
    np.testing.assert_allclose(points, OnnxSampler(labelled_points).sample(50, seed=8, **asked), atol=1e-4)
    assert tab.locator("#paint").is_hidden()


def test_any_class_is_drawn_from_the_shares(visit, pages, moons_bundle):
    tab, sampler = visit(pages(moons_bundle)), OnnxSampler(moons_bundle)
    for label, guidance_scale, asked in (
        ("any", None, {}),
        ("any", 2, {"guidance_scale": 2}),
        ("upper", 1, {"class_labels": 1}),
    ):
        choose(tab, label, guidance_scale)
        assert draw(tab, 8, 50) == ""
        points = np.loadtxt(io.BytesIO(saved(tab)[0]), delimiter=",", skiprows=1)
        np.testing.assert_allclose(points, sampler.sample(50, seed=8, **asked), atol=1e-4)


def test_wrong_conditions_are_refused_in_one_line(visit, pages, labelled_points):
    tab = visit(pages(labelled_points))
    for value in ("warm", ""):
        choose(tab, "a", c="9", d=value)
        assert_one_line(draw(tab, 0, 10), f'd must be a finite number, not "{value}"')
        assert tab.get_by_role("textbox", name="d", exact=True).get_attribute("aria-invalid") == "true"


def test_many_classes_are_a_list(visit, pages, labelled_images, tmp_path):
    folder = shutil.copytree(pages(labelled_images), tmp_path / "page")
    edit_info(class_names=[f"kind {i}" for i in range(13)], null_label=3)(folder)
    tab = visit(folder)
    classes = tab.get_by_role("combobox", name="Class", exact=True)
    assert classes.locator("option").all_inner_texts() == ["any", *(f"kind {i}" for i in range(13) if i != 3)]
    assert tab.locator("#labels").is_hidden()
    classes.select_option("kind 2")
    assert draw(tab, 1, 4) == ""
    expected = image_grid([OnnxSampler(labelled_images).sample(4, seed=1, class_labels=2)], 4).convert("RGB")
    np.testing.assert_allclose(pixels_of(tab)[..., :3].astype(int), np.asarray(expected).astype(int), atol=1)


def test_points_of_a_learned_variance_are_pythons(visit, pages, learned_bundle):
    tab = visit(pages(learned_bundle))
    assert draw(tab, 3, 40) == ""
    points = np.loadtxt(io.BytesIO(saved(tab)[0]), delimiter=",", skiprows=1)
    np.testing.assert_allclose(points, OnnxSampler(learned_bundle).sample(40, seed=3), atol=1e-4)
    for name in ("labels", "label-field", "conditions", "guidance-field", "paint"):
        assert tab.locator(f"#{name}").is_hidden()


def images_on(tab, number, height, width):
    """Return the images on the canvas, which lie in rows of three, in [0, 1]."""
    grid = pixels_of(tab)[..., :3].reshape(-1, height, 3, width, 3).swapaxes(1, 2)
    return grid.reshape(-1, height, width, 3)[:number] / 255


@pytest.mark.parametrize("by", ["mouse", "finger"])
def test_a_painted_part_is_drawn_anew(visit, pages, labelled_images, by):
    phone = {"viewport": PHONE, "is_mobile": True, "has_touch": True} if by == "finger" else {}
    tab = visit(pages(labelled_images), **phone)
    redraw = tab.get_by_role("button", name="Draw the painted part anew")
    choose(tab, "b b", 2)
    assert draw(tab, 6, 7) == ""
    before = images_on(tab, 7, 6, 9)
    assert redraw.is_disabled()
    canvas = tab.locator("#canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    pixel = box["width"] / 27

    def place(image, row, column):
        return (
            box["x"] + (image % 3 * 9 + column + 0.5) * pixel,
            box["y"] + (image // 3 * 6 + row + 0.5) * pixel,
        )

    mask = np.ones((7, 6, 9), dtype=bool)
    if by == "finger":
        for column in (2, 3):
            tab.touchscreen.tap(*place(4, 1, column))
    else:
        tab.mouse.move(*place(4, 1, 2))
        tab.mouse.down()
        tab.mouse.move(*place(4, 1, 3))
        tab.mouse.up()
        tab.mouse.move(*place(0, 3, 3))  # without a button
    mask[4, 1, 2:4] = False
    is_painted = np.abs(images_on(tab, 7, 6, 9) - before).max(axis=-1) > 0.02
    np.testing.assert_array_equal(is_painted, ~mask)

    def drawn_anew(before, mask, seed, name):
        redraw.click()
        tab.wait_for_function(ENDED)
        assert tab.inner_text("#error") == ""
        images = ~mask.all(axis=(1, 2))
        expected = before.copy()
        expected[images] = OnnxSampler(labelled_images).sample(
            images.sum(),
            seed,
            class_labels=1,
            guidance_scale=2,
            known=before[images],
            mask=mask[images],
            resample=5,
        )
        found = images_on(tab, 7, 6, 9)
        np.testing.assert_allclose(found, expected, atol=1.6 / 255)
        np.testing.assert_allclose(found[mask], before[mask], atol=0.6 / 255)
        assert np.abs(found - before)[~mask].max() > 0.01
        assert saved(tab)[1] == f"checkpoint-seed-6-{name}.png"
        return found

    before = drawn_anew(before, mask, 7, "anew-1")
    tab.get_by_role("button", name="Upper half").click()
    tab.get_by_role("button", name="Clear").click()
    np.testing.assert_allclose(images_on(tab, 7, 6, 9), before)
    tab.get_by_role("button", name="Lower half").click()
    mask = np.broadcast_to(np.arange(6)[:, None] < 3, (7, 6, 9))
    drawn_anew(before, mask, 8, "anew-2")


def test_the_page_says_what_the_model_is(visit, pages, ddim_bundle):
    tab = visit(pages(ddim_bundle))
    assert tab.inner_text("h1") == tab.title() == "heart"
    assert (
        tab.inner_text("#model")
        == "Points (x, y) · MLPModel with 39,426 parameters · DDIM with 20 network evaluations"
    )
    assert "Exported on 20" in tab.inner_text("footer")


def test_the_page_makes_no_request_to_other_servers(visit, pages, ddim_bundle):
    tab = visit(pages(ddim_bundle))
    assert draw(tab, 0, 10) == ""
    assert len(tab.requests) > 8
    assert all(url.startswith((tab.address, "data:", "blob:")) for url in tab.requests), tab.requests


def test_the_page_fits_a_phone(visit, pages, ddim_bundle, image_bundle, labelled_points, labelled_images):
    for bundle in (ddim_bundle, image_bundle, labelled_points, labelled_images):
        tab = visit(pages(bundle), PHONE, is_mobile=True, has_touch=True, device_scale_factor=3)
        assert draw(tab, 0, 50) == ""
        assert tab.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
        for name in ("seed", "count", "draw", "step", "save", "canvas"):
            box = tab.locator(f"#{name}").bounding_box()
            assert box["x"] >= 0, name
            assert box["x"] + box["width"] <= PHONE["width"], name
            assert box["height"] >= (28 if name == "step" else 44), name  # large enough for a finger
        for control in tab.locator("button, input, select, .choice").all():
            if control.is_visible():
                box = control.bounding_box()
                assert box["x"] >= 0
                assert box["x"] + box["width"] <= PHONE["width"]
                assert box["height"] >= (28 if control.get_attribute("type") == "range" else 44)


def test_every_control_has_a_name(visit, pages, ddim_bundle):
    tab = visit(pages(ddim_bundle))
    for role, names in {
        "textbox": ["Seed", "Samples"],
        "button": ["Draw", "Save as CSV"],
        "slider": ["Show step"],
        "progressbar": ["Progress"],
        "img": ["No samples yet"],
    }.items():
        for name in names:
            assert tab.get_by_role(role, name=name, exact=True).count() == 1, name


def assert_one_line(message, *fragments):
    assert message
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message, message


def test_wrong_numbers_are_refused_in_one_line(visit, pages, ddim_bundle):
    tab = visit(pages(ddim_bundle))
    for seed in ("", "-1", "1.5", "1e3", "seven", str(2**63)):
        assert_one_line(draw(tab, seed, 10), "The seed must be a whole number from 0 to 9223372036854775807")
        assert tab.locator("#seed").get_attribute("aria-invalid") == "true"
    for count in ("", "0", "-1", "2.5", "many", "10001"):
        assert_one_line(draw(tab, 0, count), "The number of samples must be a whole number from 1 to 10000")
        assert tab.locator("#count").get_attribute("aria-invalid") == "true"
    assert not ink_of(tab)[0].any()
    assert draw(tab, 0, 10) == ""  # the error goes once the values are valid
    assert tab.locator("[aria-invalid]").count() == 0


def delete(name):
    return lambda folder: (folder / name).unlink()


def cut(name, sealed=False):
    def damage(folder):
        (folder / name).write_bytes((folder / name).read_bytes()[:300])
        if sealed:
            seal(folder / "bundle")  # otherwise the checksum would fail first

    return damage


def edit_step(**changes):
    def damage(folder):
        table = json.loads((folder / "bundle" / "step_table.json").read_text())
        table["steps"][1] |= changes
        (folder / "bundle" / "step_table.json").write_text(json.dumps(table))
        seal(folder / "bundle")

    return damage


def edit_info(**changes):
    def damage(folder):
        path = folder / "bundle" / "bundle.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def rename_output(folder):
    path = folder / "bundle" / "unet.onnx"
    model = onnx.load(path)
    model.graph.output[0].name = model.graph.node[-1].output[0] = "noise"
    onnx.save(model, path)
    seal(folder / "bundle")


DAMAGES = [
    (delete("bundle/unet.onnx"), "bundle/unet.onnx can't be fetched: the server answers 404"),
    (delete("bundle/step_table.json"), "bundle/step_table.json can't be fetched"),
    (delete("bundle/bundle.json"), "bundle/bundle.json can't be fetched"),
    (cut("bundle/unet.onnx"), "unet.onnx is damaged or from another bundle"),
    (cut("bundle/step_table.json"), "step_table.json is damaged or from another bundle"),
    (cut("bundle/unet.onnx", sealed=True), "unet.onnx can't be loaded"),
    (cut("bundle/step_table.json", sealed=True), "step_table.json is not valid JSON"),
    (edit_step(timestep=float("nan")), "step_table.json is not valid JSON"),
    (edit_step(to_next=[[1, 2, 3]]), "step 1's to_next must hold rows of 4 finite numbers"),
    (edit_info(version=3), "bundle.json is not of the format ddpm-bundle, version 1 or 2"),
    (
        edit_info(sample_shape=[3], data_mean=[0] * 3, data_std=[1] * 3, data_columns=[*"xyz"]),
        "the bundle's network must have the shape [3] for each sample, but has [2]",
    ),
    (
        rename_output,
        "must have the inputs sample, timestep and the output out_sample, but has sample, timestep, noise",
    ),
    (delete("onnxruntime/ort.wasm.bundle.min.js"), "ort.wasm.bundle.min.js can't be loaded"),
    (delete("onnxruntime/ort-wasm-simd-threaded.wasm.gz"), "ort-wasm-simd-threaded.wasm.gz can't be fetched"),
    (cut("onnxruntime/ort-wasm-simd-threaded.wasm.gz"), "ort-wasm-simd-threaded.wasm.gz can't be unpacked"),
    (delete("worker.js"), "worker.js can't be run"),
    (delete("draw.js"), "page.js, draw.js, table.js, columns.js and ddpm.js, can't be loaded"),
    (delete("page.js"), "page.js, draw.js, table.js, columns.js and ddpm.js, can't be loaded"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_a_damaged_page_says_so_in_one_line(visit, pages, ddim_bundle, tmp_path, damage, message):
    folder = shutil.copytree(pages(ddim_bundle), tmp_path / "page")
    damage(folder)
    tab = visit(folder)
    assert_one_line(tab.inner_text("#error"), message)
    assert tab.get_by_role("alert").is_visible()
    assert tab.locator("#draw").is_disabled()


def test_weights_that_give_nan_are_told(visit, pages, ddim_bundle, tmp_path):
    folder = shutil.copytree(pages(ddim_bundle), tmp_path / "page")
    model = onnx.load(folder / "bundle" / "unet.onnx")
    (bias,) = (tensor for tensor in model.graph.initializer if tensor.name.endswith("proj_out.bias"))
    bias.CopyFrom(onnx.numpy_helper.from_array(np.full(2, np.nan, dtype=np.float32), bias.name))
    onnx.save(model, folder / "bundle" / "unet.onnx")
    seal(folder / "bundle")
    tab = visit(folder)
    assert_one_line(draw(tab, 0, 10), "unet.onnx returns non-finite numbers at t = 950")


def test_opened_as_a_file_the_page_says_how_to_serve_it(visit, pages, ddim_bundle):
    tab = visit(pages(ddim_bundle), as_file=True)
    assert_one_line(tab.inner_text("#error"), "python -m http.server")


def test_a_bundle_of_one_coordinate_without_provenance(visit, onnxruntime_web, heart, tmp_path):
    pipeline = DDPMMLPPipeline(MLPModel(1, hidden_dim=32), heart.scheduler, data_mean=[5.0], data_std=[2.0])
    pipeline.save_pretrained(tmp_path / "checkpoint")
    bundle = tmp_path / "bundle"
    export_bundle(tmp_path / "checkpoint", bundle, "ddim", 5)
    info = json.loads((bundle / "bundle.json").read_text())
    del info["provenance"]
    (bundle / "bundle.json").write_text(json.dumps(info))
    write_page(bundle, tmp_path / "page", onnxruntime_web)
    tab = visit(tmp_path / "page")
    assert tab.inner_text("#model") == "Points (x0) · DDIM with 5 network evaluations"
    assert draw(tab, 4, 20) == ""
    points = np.loadtxt(io.BytesIO(saved(tab)[0]), skiprows=1)
    np.testing.assert_allclose(points, OnnxSampler(bundle).sample(20, seed=4)[:, 0], atol=1e-4)


def test_the_readmes_picture(visit, onnxruntime_web, tmp_path):
    """A heart of 2,000 points, as the page shows it."""
    export_bundle(pretrained("heart"), tmp_path / "bundle", "ddim", 50)
    write_page(tmp_path / "bundle", tmp_path / "page", onnxruntime_web)
    tab = visit(tmp_path / "page", {"width": 1080, "height": 800})
    assert draw(tab, 0, 2000) == ""
    path = os.environ.get("PAGE_PICTURE") or tmp_path / "page.png"
    tab.locator("#draw").blur()
    tab.screenshot(path=path, full_page=True)
    assert os.path.getsize(path) < 150_000
    picture = np.asarray(Image.open(path).convert("RGB")).astype(int)
    box = tab.locator("#canvas").bounding_box()
    rows, columns = (slice(round(box[a]), round(box[a] + box[size])) for a, size in (("y", "height"), ("x", "width")))
    plot = picture[rows, columns]
    ink = plot[..., 0] - plot[..., 2] > 60
    assert 0.02 < ink.mean() < 0.2
    height, width = ink.shape
    assert not ink[
        int(0.42 * height) : int(0.5 * height), int(0.48 * width) : int(0.58 * width)
    ].any()  # the heart's inside is empty


def cells_of(tab):
    """Return the rows of the page's table, as text."""
    rows = "(rows) => rows.map((row) => Array.from(row.cells, (cell) => cell.textContent))"
    return tab.locator("#rows tbody tr").evaluate_all(rows)


def sort_by(tab, name):
    """Sort the page's table with the keyboard. Return how it says to be sorted, and the column's cells."""
    tab.get_by_role("button", name=name, exact=True).focus()
    tab.keyboard.press("Enter")
    header = tab.get_by_role("columnheader", name=name, exact=True)
    assert tab.locator("[aria-sort]").count() == (header.get_attribute("aria-sort") is not None)
    names = tab.locator("#rows th").all_inner_texts()
    return header.get_attribute("aria-sort"), [row[names.index(name)] for row in cells_of(tab)]


def test_a_table_is_shown_sorted_and_saved(visit, pages, table_bundle):
    sampler = OnnxSampler(table_bundle)
    codec = sampler.codec

    def rows_of(points):
        return list(codec.format(codec.decode(points)))

    tab = visit(pages(table_bundle))
    assert tab.inner_text("#model").startswith("Table of 10 columns · MLPModel with ")
    assert tab.locator("canvas").is_hidden()
    assert tab.locator("#rows th").all_inner_texts() == codec.names
    assert (cells_of(tab), tab.inner_text("#summary")) == ([], "No rows yet")
    assert draw(tab, 3, 250) == ""
    assert tab.inner_text("#status").startswith("250 rows in ")
    rows = rows_of(sampler.sample(250, seed=3))
    assert (cells_of(tab), tab.inner_text("#summary")) == (rows[:200], "The first 200 of 250 rows")

    # Numbers and dates are sorted as such, not as text. Missing cells come last in both directions.
    columns = dict(zip(codec.names, zip(*rows, strict=True), strict=True))
    keys = {
        "age": int,
        "weight, kg": float,
        "born": lambda text: datetime.datetime.strptime(text, "%b %d, %Y"),
        "seen": lambda text: datetime.datetime.strptime(text, "%d/%m/%y %H:%M:%S"),
        "city": str,
        "member": ["no", "yes"].index,
    }
    for name, key in keys.items():
        known = [cell for cell in columns[name] if cell]
        missing = [""] * (250 - len(known))
        assert len(set(known)) > 1
        assert sort_by(tab, name) == ("ascending", [*sorted(known, key=key), *missing][:200])
        assert tab.inner_text("#summary") == f"The first 200 of 250 rows, by {name}"
        assert sort_by(tab, name) == ("descending", [*sorted(known, key=key, reverse=True), *missing][:200])
        assert tab.inner_text("#summary").endswith(f"by {name}, descending")
    assert sort_by(tab, "member") == (None, list(columns["member"][:200]))

    content, name = saved(tab)
    assert name == "people-seed-3.csv"
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([codec.names, *rows])
    assert content.decode() == file.getvalue()

    for k, step in enumerate(sampler.steps(250, seed=3)):
        tab.locator("#step").fill(str(k + 1))
        assert cells_of(tab) == rows_of(sampler.to_data_units(step.sample))[:200]

    # Known cells, in the page's fields
    tab.get_by_text("Known cells").click()
    assert tab.get_by_label("age").get_attribute("placeholder") == "18 to 65"
    for name, text in {"country": "NL", "age": "30", "born": "1970-01-03"}.items():
        tab.get_by_role("combobox", name=name, exact=True).fill(text)
    assert draw(tab, 4, 20) == ""
    known = codec.encode({"country": ["NL"], "age": [30], "born": ["Jan 03, 1970"]}, empty="unknown")
    assert cells_of(tab) == rows_of(sampler.sample(20, seed=4, known=known))
    assert tab.inner_text("#summary") == "20 rows"

    # The page fits a phone: the table scrolls, not the page.
    tab.set_viewport_size(PHONE)
    assert tab.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    assert tab.evaluate("document.querySelector('#rows').scrollWidth") > PHONE["width"]
    for control in tab.locator("button, input, summary").all():
        if control.is_visible() and control.get_attribute("type") != "range":
            assert control.bounding_box()["height"] >= 44

    tab.get_by_role("combobox", name="country", exact=True).fill("FR")
    tab.get_by_text("Known cells").click()
    assert_one_line(draw(tab, 4, 20), 'column "country": "FR" is not one of its values, "DE", "NL"')
    assert tab.get_by_role("combobox", name="country", exact=True).get_attribute("aria-invalid") == "true"
    assert tab.evaluate("document.activeElement.labels[0].textContent") == "country"
    assert not [name for name in ("labels", "conditions", "guidance-field", "paint") if tab.is_visible(f"#{name}")]


def test_the_tables_picture(visit, pages, table_bundle, tmp_path):
    """Rows by price, as the page shows them."""
    tab = visit(pages(Path(os.environ.get("TABLE_BUNDLE") or table_bundle)), {"width": 1240, "height": 800})
    assert draw(tab, 0, 500) == ""
    tab.get_by_role("button", name="price", exact=True).click()
    tab.get_by_role("button", name="price", exact=True).blur()
    path = os.environ.get("TABLE_PICTURE") or tmp_path / "page_table.png"
    tab.screenshot(path=path, full_page=True)
    Image.open(path).quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)  # text needs few colours
    assert os.path.getsize(path) < 120_000


def test_a_policy_walks_in_the_browser(visit, onnxruntime_web, tmp_path, monkeypatch):
    """The walks of the policy example's film are those of its run.py, from the same starts."""
    pytest.importorskip("gymnasium", reason="needs gymnasium: pip install 'ddpm-mlp-pipeline[policy]'")
    policy = ROOT / "examples" / "policy"
    monkeypatch.syspath_prepend(policy)
    from run import bundle_policy, run_episode
    from tasks import TASKS, ReachAround

    task = TASKS["reach"]
    torch.manual_seed(3)
    pipe = DDPMMLPPipeline(
        random_weights(MLPModel(2 * task.chunk, hidden_dim=32, condition_dim=2)),
        DDPMScheduler(prediction_type="sample"),
        data_columns=[f"a{i}" for i in range(2 * task.chunk)],
        data_mean=[0.0, 0.05] * task.chunk,  # up, and some of the steps longer than one may be
        data_std=[0.1] * 2 * task.chunk,
        condition_columns=["o0", "o1"],
        condition_mean=[0.0, -0.5],
        condition_std=[0.1, 0.4],
    )
    pipe.save_pretrained(tmp_path / "policy")
    bundle = tmp_path / "bundle"
    export_bundle(tmp_path / "policy", bundle, num_inference_steps=4)
    page = tmp_path / "page"
    write_page(bundle, page, onnxruntime_web)
    shutil.copyfile(policy / "film.html", page / "film.html")
    tab = visit(page)
    tab.goto(f"{tab.address}/film.html?walks=4")
    tab.wait_for_function("/ of 4 passed|Error/.test(document.querySelector('#status').textContent)")
    walks = tab.evaluate("window.walks")
    passed = sum(shown["passed"] for shown in walks)
    assert tab.inner_text("#status").startswith(f"{passed} of 4 passed, ")

    def start_as_there(env, *, seed, **options):
        x = 0.02 * noise.normal(0, range(seed, seed + 1), 1, range(1)).item()
        env.steps, env.position = 0, np.array([x, -1.0])
        return env.position.copy(), {}

    monkeypatch.setattr(ReachAround, "reset", start_as_there)
    sampler = OnnxSampler(bundle, num_threads=1)
    for seed, shown in enumerate(walks):
        expected = run_episode(task, bundle_policy(sampler, task, seed), seed)
        np.testing.assert_allclose(shown["path"], expected["path"], atol=1e-4)
        assert shown["passed"] == expected["passed"]
    lengths = [np.hypot(*np.diff(shown["path"], axis=0).T) for shown in walks]
    assert np.concatenate(lengths).max() == pytest.approx(ReachAround.SPEED)
    assert len({len(shown["path"]) for shown in walks}) > 1


# `write_page`, without a browser


@pytest.fixture
def package(tmp_path):
    """A stand-in for an unpacked onnxruntime-web."""
    folder = tmp_path / "package"
    (folder / "dist").mkdir(parents=True)
    (folder / "package.json").write_text(json.dumps({"name": "onnxruntime-web", "version": VERSION}))
    for name in SCRIPTS:
        (folder / name).write_text("export {};\n")
    for name in BINARIES:
        (folder / name).write_bytes(b"\0asm" * 1000)
    return folder


def test_a_page_is_written_whole_and_replaced(ddim_bundle, package, tmp_path):
    folder = tmp_path / "page"
    write_page(ddim_bundle, folder, package)
    with pytest.raises(OutputExistsError, match="page exists and isn't empty"):
        write_page(ddim_bundle, folder, package)
    write_page(ddim_bundle, folder, package, overwrite=True)
    assert {path.name for path in folder.iterdir()} == {*PAGE_FILES, "bundle", "onnxruntime"}
    for name in ("unet.onnx", "step_table.json", "bundle.json"):
        assert (folder / "bundle" / name).read_bytes() == (ddim_bundle / name).read_bytes()
    assert {path.name for path in (folder / "onnxruntime").iterdir()} == {
        *("ort.wasm.bundle.min.js", "ort-wasm-simd-threaded.wasm.gz", "package.json"),
        *("ort.webgpu.bundle.min.js", "ort-wasm-simd-threaded.asyncify.wasm.gz"),
    }
    for path in folder.rglob("*"):
        if path.suffix in (".html", ".js") and path.parent == folder:
            assert "https://" not in path.read_text(encoding="utf-8"), path  # no file from elsewhere


def test_other_folders_are_left_alone(ddim_bundle, package, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").touch()
    write_page(ddim_bundle, tmp_path / "page", package)
    (tmp_path / "page" / "bundle" / "thesis.tex").touch()
    for folder in (tmp_path / "precious", tmp_path / "page", ddim_bundle):
        with pytest.raises(OutputExistsError, match="left alone"):
            write_page(ddim_bundle, folder, package, overwrite=True)
    assert (tmp_path / "precious" / "thesis.tex").exists()
    assert (tmp_path / "page" / "bundle" / "thesis.tex").exists()


def test_a_damaged_bundle_gets_no_page(ddim_bundle, package, tmp_path):
    bundle = shutil.copytree(ddim_bundle, tmp_path / "bundle")
    (bundle / "step_table.json").write_text("{}")
    with pytest.raises(BundleError, match=r"step_table\.json"):
        write_page(bundle, tmp_path / "page", package)
    assert not (tmp_path / "page").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "is not the npm package onnxruntime-web"),
        (lambda folder: (folder / "package.json").write_text('{"name": "left-pad"}'), "is not the npm package"),
        (lambda folder: (folder / "package.json").write_text("[]"), "is not the npm package"),
        (lambda folder: (folder / BINARIES[0]).unlink(), "lacks dist/ort-wasm-simd-threaded.wasm"),
    ],
)
def test_another_package_is_refused(ddim_bundle, package, tmp_path, damage, message):
    damage(package)
    with pytest.raises(ConfigurationError, match=message):
        write_page(ddim_bundle, tmp_path / "page", package)
    assert not (tmp_path / "page").exists()


@pytest.fixture
def registry(package, serve, tmp_path, monkeypatch):
    """Serve the package from a local registry, to an empty cache, and return its archive."""
    archive = tmp_path / "registry" / "onnxruntime-web" / "-" / f"onnxruntime-web-{VERSION}.tgz"
    archive.parent.mkdir(parents=True)
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(package, "package")
    integrity = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    monkeypatch.setattr(page_module, "INTEGRITY", integrity)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("npm_config_registry", serve(tmp_path / "registry") + "/")
    return archive


def test_the_package_is_downloaded_once(ddim_bundle, registry, package, tmp_path, monkeypatch):
    write_page(ddim_bundle, tmp_path / "page", None)
    assert (tmp_path / "page" / "onnxruntime" / "ort.wasm.bundle.min.js").read_bytes() == (
        package / SCRIPTS[0]
    ).read_bytes()
    cached = tmp_path / "cache" / "ddpm-mlp-pipeline" / f"onnxruntime-web-{VERSION}"
    files = {path.relative_to(cached).as_posix() for path in cached.rglob("*") if path.is_file()}
    assert files == set(NEEDED)
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:1")  # the server is gone, and no request is made
    write_page(ddim_bundle, tmp_path / "again")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda archive: archive.write_bytes(archive.read_bytes() + b"\0"),
            "the SHA-512 of the archive differs from the published package's",
        ),
        (lambda archive: archive.unlink(), "404"),
    ],
)
def test_a_wrong_download_leaves_nothing(ddim_bundle, registry, tmp_path, damage, message):
    damage(registry)
    with pytest.raises(ConfigurationError, match=f"127.0.0.1.*{message}.*--onnxruntime_web"):
        write_page(ddim_bundle, tmp_path / "page")
    assert not (tmp_path / "page").exists()
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    "address",
    [
        "http://user:secret@127.0.0.1:1",
        "http://user:secret@127.0.0.1",
        "https://127.0.0.1:secret/",
        "user:secret@127.0.0.1",
        "http://[secret",
        "file:///etc",
        "nonsense",
    ],
)
def test_an_unusable_registry_is_one_error_without_secrets(ddim_bundle, registry, tmp_path, monkeypatch, address):
    monkeypatch.setenv("npm_config_registry", address)
    with pytest.raises(ConfigurationError, match="can't download onnxruntime-web") as error:
        write_page(ddim_bundle, tmp_path / "page")
    assert "secret" not in str(error.value)


def test_the_command_writes_a_page(run, onnxruntime_web, tmp_path):
    argv = ("ddpm-export", pretrained("heart"), tmp_path / "bundle", "--num_inference_steps", 4)
    assert_one_line_error(run(*argv, "--onnxruntime_web", onnxruntime_web), "--web DIR")
    result = run(*argv, "--web", tmp_path / "page", "--onnxruntime_web", onnxruntime_web)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "page" / "index.html").is_file()
    assert (tmp_path / "page" / "bundle" / "unet.onnx").read_bytes() == (
        tmp_path / "bundle" / "unet.onnx"
    ).read_bytes()


# All backends, whatever is asked of the shipped moons

NUMBER, SEED, STEPS = 50, 2**40 + 3, 20
SCHEDULERS = {
    "DDPM": ("ddpm", {}),
    "DDIM": ("ddim", {}),
    "DPM-Solver++": ("dpmsolver_multistep", {}),
    "SDE-DPM-Solver++": ("dpmsolver_multistep", {"algorithm_type": "sde-dpmsolver++"}),
}
IN_BROWSER = """async ([asked, number, seed]) => {
    const { openBundle } = await import("./ddpm.js");
    const ort = await import("./onnxruntime/ort.wasm.bundle.min.js");
    const packed = await fetch("./onnxruntime/ort-wasm-simd-threaded.wasm.gz");
    const wasm = new Response(packed.body.pipeThrough(new DecompressionStream("gzip")));
    Object.assign(ort.env.wasm, { numThreads: 1, wasmBinary: await wasm.arrayBuffer() });
    const read = async (name) => new Uint8Array(await (await fetch(`./bundle/${name}`)).arrayBuffer());
    const sampler = await openBundle(ort, read);
    const results = [];
    for (const each of asked) {
      const samples = [];
      for await (const batch of sampler.batches(number, BigInt(seed), 512, each)) samples.push(...batch);
      results.push(samples);
    }
    return results;
}"""


def fitted_scheduler(trained_with, calls):
    """Return a scheduler with a table as `ddpm-fit` finds them: fresh noise, corrections, the x̂_0 before."""
    parameters = TableParameters.start(calls, FittingArguments.of_points(noise=0.4), trained_with)
    parameters.numbers[[2, 3, 5]] = torch.tensor([0.05, -0.1, 0.1])[:, None]
    return StepTableScheduler.from_config(trained_with.config, tables=[parameters.to_table().to_dict()])


@pytest.mark.slow
def test_every_backend_draws_the_same(draw_in_node, visit, pages, moons_bundle, tmp_path):
    rows = []
    null = 2  # where nothing is asked, each backend would draw labels
    asks = list(itertools.product([null, "upper"], [1.0, 2.0], [False, True]))
    # The table that is published has every scheduler; the rest are those with noise, memory and everything.
    names = [*SCHEDULERS, "fitted"] if "BACKENDS_TABLE" in os.environ else ["SDE-DPM-Solver++", "fitted"]
    for name in names:
        pipeline = load_checkpoint(pretrained("moons"))
        if name == "fitted":
            pipeline.scheduler = fitted_scheduler(pipeline.scheduler, STEPS)
        else:
            scheduler, options = SCHEDULERS[name]
            pipeline.scheduler = make_scheduler(scheduler, pipeline.scheduler, **options)
        bundle = shutil.copytree(moons_bundle, tmp_path / name)  # the network is the same
        compile_scheduler(pipeline.scheduler, STEPS).save(bundle / "step_table.json")
        seal(bundle)
        sampler = OnnxSampler(bundle, num_threads=1)
        graph = onnxruntime.InferenceSession(build_sampler(bundle, takes_known=True).SerializeToString())
        in_js = [
            {"classLabels": label, "guidanceScale": w} | ({"known": {"x": 0.5}} if is_known else {})
            for label, w, is_known in asks
        ]
        node = draw_in_node(bundle, in_js, NUMBER, SEED)
        browser = visit(pages(bundle)).evaluate(IN_BROWSER, [in_js, NUMBER, str(SEED)])
        for (label, w, is_known), *from_js in zip(asks, node, browser, strict=True):
            asked = {"class_labels": label, "guidance_scale": w, "known": [0.5, math.nan] if is_known else None}
            expected = draw_with_torch(pipeline, NUMBER, STEPS, SEED, **asked)
            known = np.tile(np.array([0.5 if is_known else 0, 0], dtype=np.float32), (NUMBER, 1))
            feeds = {
                "seed": np.array(SEED),
                "num_samples": np.array(NUMBER),
                "class_labels": np.full(NUMBER, 2 if label == null else 1),
                "guidance_scale": np.array(w, dtype=np.float32),
                "known": known,
                "mask": np.tile(np.array([is_known, 0], dtype=np.float32), (NUMBER, 1)),
            }
            drawn = [sampler.sample(NUMBER, SEED, **asked), graph.run(None, feeds)[0]]
            drawn += [np.reshape(samples, (NUMBER, 2)) for samples in from_js]
            rows.append(
                (
                    name,
                    "any" if label == null else label,
                    w,
                    "x" if is_known else "",
                    *(np.abs(x - expected).max() for x in drawn),
                )
            )
    headers = ("scheduler", "label", "w", "known", "runtime", "sampler.onnx", "Node", "Chromium")
    table = tabulate(rows, headers, "github", floatfmt=("", "", "g", "", *[".0e"] * 4))
    if path := os.environ.get("BACKENDS_TABLE"):
        Path(path).write_text(table + "\n")
    assert np.max([row[4:] for row in rows]) < 1e-4, table
