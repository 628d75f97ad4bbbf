"""The service's page in headless Chromium: upload, progress, both views drawn, comparison, download, keys, errors."""

import base64
import gzip
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path

import nibabel
import numpy as np
import pytest
from browser import PATIENCE_MS, opened
from PIL import Image
from playwright.sync_api import Browser, Page, expect
from service import RunningService


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Headless Chromium with WebGL in software."""
    with opened() as browser:
        yield browser


@pytest.fixture
def page(browser: Browser, service: RunningService) -> Iterator[Page]:
    """The page, freshly opened; at its end nothing was fetched elsewhere and the console is empty."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    page = context.new_page()
    foreign: list[str] = []
    said: list[str] = []
    own = (service.url, "blob:", "data:")
    page.on("request", lambda request: None if request.url.startswith(own) else foreign.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.set_default_timeout(PATIENCE_MS)
    page.goto(service.url)
    expect(page.locator("#targets input")).to_have_count(3)
    yield page
    context.close()
    assert foreign == []
    assert [text for text in said if "the server responded with a status of 4" not in text] == []


def picture(page: Page, selector: str) -> np.ndarray:
    """What is seen at a place of the page, as numbers 0 to 255 (rows, columns, RGB)."""
    page.wait_for_timeout(300)  # a frame or two
    with Image.open(io.BytesIO(page.locator(selector).screenshot())) as image:
        return np.asarray(image.convert("RGB"), float)


def is_drawn(pixels: np.ndarray) -> bool:
    """Whether a view shows a volume: many grey values, which neither text nor cross-hair has."""
    grey = pixels[np.ptp(pixels, axis=2) < 4].mean(axis=1)
    return len(np.unique(np.round(grey[grey > 20]))) > 40


def translate(page: Page) -> None:
    page.get_by_role("button", name="Translate").click()
    expect(page.locator("#status")).to_contain_text("Done in", timeout=PATIENCE_MS)


@pytest.mark.slow
@pytest.mark.smoke
def test_a_file_goes_up_and_its_translation_is_seen_and_fetched(
    page: Page, service: RunningService, tmp_path: Path
) -> None:
    scan = tmp_path / "sub-01_T1w.nii.gz"
    scan.write_bytes(service.client.get("/v1/example").content)
    page.set_input_files("#file", scan)
    expect(page.locator("#file-name")).to_contain_text("sub-01_T1w.nii.gz")
    page.get_by_text("Sampling and format").click()
    page.select_option("#sampler", "ddim")
    page.fill("#steps", "40")
    page.get_by_role("button", name="Translate").click()
    expect(page.locator("#progress-text")).to_contain_text("Translating", timeout=PATIENCE_MS)
    expect(page.locator("#status")).to_contain_text("The volume is a t1, by its name")
    expect(page.locator("#status")).to_contain_text("Done in", timeout=PATIENCE_MS)
    covered = re.compile("in [0-9]+ boxes of the model's size; nothing of the foreground lies outside")
    expect(page.locator("#status")).to_contain_text(covered)
    assert is_drawn(picture(page, "#source-view"))
    assert is_drawn(picture(page, "#result-view"))
    expect(page.locator("#result-caption")).to_have_text("t2: synthetic, research use only")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download result").click()
    assert download.value.suggested_filename == "synthetic-t2.nii.gz"
    content = Path(download.value.path()).read_bytes()
    answer = service.post("/v1/translate", scan, source="t1", target="t2", sampler="ddim", num_inference_steps=40)
    got, wanted = (nibabel.Nifti1Image.from_bytes(gzip.decompress(one)) for one in (content, answer.content))
    np.testing.assert_array_equal(got.affine, nibabel.load(scan).affine)
    np.testing.assert_array_equal(got.get_fdata(), wanted.get_fdata())
    curl = page.locator("#curl").inner_text()
    assert "-F volume=@sub-01_T1w.nii.gz" in curl
    assert curl.endswith(f"{service.url}/v1/translate")
    made = os.popen(f"cd {tmp_path} && {curl} -s -w '%{{http_code}}'").read()  # as the page says
    assert made == "200"
    assert gzip.decompress((tmp_path / "synthetic-t2.nii.gz").read_bytes()) == gzip.decompress(content)


DROP = """async (files) => {
    const data = new DataTransfer();
    for (let i = 0; i < files.length; i += 2) {
        const bytes = Uint8Array.from(atob(files[i + 1]), (letter) => letter.charCodeAt(0));
        data.items.add(new File([bytes], files[i]));
    }
    for (const kind of ["dragenter", "dragover"]) {
        document.body.dispatchEvent(new DragEvent(kind, {dataTransfer: data, bubbles: true, cancelable: true}));
    }
    const over = document.getElementById("drop").classList.contains("over");
    const event = new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true});
    document.body.dispatchEvent(event);
    return [over, event.defaultPrevented];
}"""
"""Drop files (name, content in base64, and so on) on the page as a browser does.

Returns whether the place was marked, and whether the page took it."""


def test_a_model_of_pairs_says_before_it_is_sent_that_it_takes_one(page: Page) -> None:
    sent: list[str] = []
    page.on("request", lambda request: sent.append(request.method))
    page.evaluate(DROP, ["dropped_T1w.nii.gz", "", "dropped_T2w.nii.gz", ""])
    expect(page.locator("#problem")).to_contain_text("This model takes one volume, and 2 are chosen: remove the others")
    page.get_by_role("button", name="Translate").click()
    expect(page.locator("#problem")).to_contain_text("This model takes one volume")
    assert "POST" not in sent
    page.get_by_role("button", name="Remove dropped_T1w.nii.gz").click()
    expect(page.locator("#problem")).to_have_text("")
    expect(page.locator("#file-name")).to_contain_text("dropped_T2w.nii.gz")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Remove dropped_T2w.nii.gz"


def test_a_file_is_dropped_on_the_page(page: Page, service: RunningService) -> None:
    content = base64.b64encode(service.client.get("/v1/example").content).decode()
    assert page.evaluate(DROP, ["dropped_T1w.nii.gz", content]) == [True, True]
    expect(page.locator("#file-name")).to_contain_text("dropped_T1w.nii.gz")
    expect(page.locator("#drop")).not_to_have_class(re.compile("over"))
    translate(page)
    assert is_drawn(picture(page, "#result-view"))


@pytest.mark.parametrize(("samplers", "offered"), [(["dpm-solver++", "one-step"], True), (["one-step"], False)])
def test_where_a_model_has_one_answer_no_samples_are_offered(
    page: Page, service: RunningService, samplers: list[str], offered: bool
) -> None:
    answer = service.client.get("/v1/models").json()
    answer["models"][0]["samplers"] = [{"name": name} for name in samplers]
    page.route("**/v1/models", lambda route: route.fulfill(json=answer))
    page.reload()
    expect(page.locator("#targets input")).to_have_count(3)
    page.get_by_text("Sampling and format").click()
    expect(page.locator("#samples")).to_be_enabled(enabled=offered)
    expect(page.locator("#steps")).to_be_enabled(enabled=offered)


@pytest.mark.slow
def test_targets_uncertainty_and_the_three_comparisons(page: Page) -> None:
    page.get_by_role("button", name="Take the example").click()
    expect(page.locator("#file-name")).to_contain_text("example_t1.nii.gz")
    page.get_by_text("Sampling and format").click()
    page.fill("#samples", "2")
    page.check("#targets input[value=pd]")
    translate(page)
    t2 = float(page.input_value("#result-high"))
    page.select_option("#shown", "pd")
    expect(page.locator("#result-caption")).to_have_text("pd: synthetic, research use only")
    assert float(page.input_value("#result-high")) < t2 / 10  # in the units of another modality
    plain = picture(page, "#result-view")
    expect(page.locator("#map-name")).to_have_text("Sample spread (not calibrated)")
    expect(page.locator("#position")).to_contain_text(", sample spread ")
    expect(page.locator("#map-scale")).to_be_hidden()
    page.check("#map")
    expect(page.locator("#map-scale")).to_contain_text("in the result's units")
    over = picture(page, "#result-view")
    colourful = (np.ptp(over, axis=2) > 30).mean()
    assert colourful > (np.ptp(plain, axis=2) > 30).mean() + 0.02
    page.keyboard.press("Escape")  # nothing is running: nothing happens
    page.locator("h1").click()
    page.keyboard.press("u")
    again = picture(page, "#result-view")
    assert abs((np.ptp(again, axis=2) > 30).mean() - (np.ptp(plain, axis=2) > 30).mean()) < 1e-3, "no colour is left"
    assert (np.abs(again - plain) > 8).mean() < 5e-3  # but for the edges of letters, which are not always drawn alike
    source = picture(page, "#source-view")

    page.keyboard.press("3")
    expect(page.locator("#divider")).to_be_visible()
    page.locator("#divider").fill("100")
    all_source = picture(page, "#views .canvas >> nth=0")
    page.locator("#divider").fill("0")
    all_result = picture(page, "#views .canvas >> nth=0")
    page.locator("#divider").fill("50")
    half = picture(page, "#views .canvas >> nth=0")
    middle = half.shape[1] // 2
    np.testing.assert_allclose(half[:, : middle - 4], all_source[:, : middle - 4], atol=10)
    np.testing.assert_allclose(half[:, middle + 4 :], all_result[:, middle + 4 :], atol=10)
    assert np.abs(all_source - all_result).mean() > 1
    expect(page.locator("#result-caption")).to_be_visible()

    page.keyboard.press("2")
    expect(page.locator("#views")).to_have_attribute("data-shown", "source")
    expect(page.locator("#result-caption")).to_be_hidden()  # the source is not synthetic
    expect(page.locator("#views")).to_have_attribute("data-shown", "result")
    expect(page.locator("#result-caption")).to_be_visible()
    page.keyboard.press("1")
    page.wait_for_timeout(300)

    before = page.locator("#position").inner_text()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("PageUp")
    assert page.locator("#position").inner_text() != before
    assert np.abs(picture(page, "#source-view") - source).mean() > 0.1
    page.fill("#source-high", "200")
    page.keyboard.press("Enter")
    brighter = picture(page, "#source-view")
    assert brighter.mean() > source.mean() + 3
    page.locator("h1").click()
    page.keyboard.press("r")
    assert picture(page, "#source-view").mean() < brighter.mean() - 3


def test_by_keyboard_alone(page: Page) -> None:
    page.locator("#example").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_contain_text("The example is chosen")
    for _ in range(12):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "translate":
            break
    assert page.evaluate("document.activeElement.id") == "translate"
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_contain_text("Done in", timeout=PATIENCE_MS)
    with page.expect_download() as download:
        page.locator("[data-file=provenance]").focus()
        page.keyboard.press("Enter")
    assert '"synthetic": true' in Path(download.value.path()).read_text()


def test_the_model_s_measured_quality_is_shown(page: Page) -> None:
    page.locator("#card-area summary").click()
    expect(page.locator("#card tr")).to_have_count(2)
    cells = page.locator("#card td").all_inner_texts()
    assert cells == ["aldm (ddim, 4 steps)", "brain", "21.50", "0.125", "0.750", "0.25"]


def test_cancelling_by_escape(page: Page, service: RunningService) -> None:
    page.get_by_role("button", name="Take the example").click()
    expect(page.locator("#status")).to_contain_text("The example is chosen")
    page.get_by_text("Sampling and format").click()
    page.select_option("#sampler", "ddpm")
    page.fill("#steps", "200")  # of several boxes each: below the limit on evaluations
    page.fill("#samples", "2")
    page.get_by_role("button", name="Translate").click()
    expect(page.locator("#progress-text")).to_contain_text("Translating", timeout=PATIENCE_MS)
    page.keyboard.press("Escape")
    expect(page.locator("#status")).to_have_text("Cancelled.")
    page.fill("#steps", "2")
    page.fill("#samples", "1")
    translate(page)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("notes.txt", b"hello", "wanted a file named .nii"),
        ("t1.nii", b"hello world", "not a NIfTI"),
        ("scan.nii.gz", gzip.compress(nibabel.Nifti1Image(np.random.rand(9, 9, 9), np.eye(4)).to_bytes()), "modality"),
        ("t1.zip", b"PK", "not a zip"),
    ],
)
def test_a_wrong_file_gives_one_clear_message(
    page: Page, tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    (tmp_path / name).write_bytes(content)
    page.set_input_files("#file", tmp_path / name)
    page.get_by_role("button", name="Translate").click()
    expect(page.locator("#problem")).to_contain_text(words)
    assert page.locator("#problem").get_attribute("role") == "alert"
    expect(page.get_by_role("button", name="Translate")).to_be_enabled()


def test_the_interface_has_its_own_page(browser: Browser, service: RunningService) -> None:
    page = browser.new_page()
    page.goto(f"{service.url}/docs")
    expect(page.locator("#operations-translations-translate_v1_translate_post")).to_be_visible(timeout=PATIENCE_MS)
    page.close()
