"""A running service of a model of any sources: `aldm translate --server` with several files, the page, hang-ups."""

import json
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import nibabel
import numpy as np
import pytest
from browser import PATIENCE_MS, opened
from playwright.sync_api import Browser, Page, expect
from scans import image_of, same_image, write
from series import in_the_head, make_series
from service import RunningService
from test_any_sources import ANY, head
from test_serve_page import is_drawn, picture
from test_serve_sources import FIELDS, by_hand, form_of
from test_translate_several import run
from untrained import save_untrained

from aldm.presets import small


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    folder = tmp_path_factory.mktemp("several")
    save_untrained(folder / "model", config=replace(ANY, codec=small().codec))
    with RunningService(folder / "model", folder / "work") as service:
        yield service


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """A file and a series of one head."""
    make_series(tmp_path / "t2", edit=in_the_head)
    volume = head(0)
    return {"t1": write(tmp_path / "scan_t1.nii.gz", volume.data, volume.affine), "t2": tmp_path / "t2"}


def jobs(service: RunningService) -> set[Path]:
    return set((service.work_dir / "jobs").iterdir())


def test_the_client_sends_several_and_writes_what_is_made_here(
    several: RunningService, files: dict[str, Path], tmp_path: Path
) -> None:
    before = jobs(several)
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    wanted = by_hand(several.folder, files, tmp_path / "here" / "pd.nii.gz")
    named = [f"--source={name}={path}" for name, path in files.items()]
    assert run(tmp_path / "there" / "pd.nii.gz", *named, "--target", "pd", "--server", several.url) == 0
    got = nibabel.load(tmp_path / "there" / "pd.nii.gz")
    same_image(got, wanted)
    np.testing.assert_array_equal(got.get_fdata(), wanted.get_fdata())
    made, here = (json.loads((tmp_path / place / "pd.json").read_text()) for place in ("there", "here"))
    assert made.pop("server") == several.url
    assert made == here
    assert made["inputs"] == {"t1": "scan_t1.nii.gz", "t2": "t2"}
    assert run(tmp_path / "all", *named, "--target", "all", "--server", several.url) == 0
    assert [path.name for path in (tmp_path / "all").glob("*.nii.gz")] == ["scan_t1_synthetic-pd.nii.gz"]
    assert jobs(several) == before


def test_a_client_that_hangs_up_between_two_volumes_leaves_nothing(
    several: RunningService, files: dict[str, Path], tmp_path: Path
) -> None:
    both = {"t1": files["t1"], "t2": write(tmp_path / "t2.nii", head(1).data, head(1).affine)}
    before = jobs(several)
    request = httpx.Request("POST", f"{several.url}/v1/translations", files=form_of(both), data=FIELDS)
    body = request.read()
    lines = [f"{name}: {value}" for name, value in request.headers.items()]
    line = socket.create_connection(("127.0.0.1", several.port))
    line.sendall("\r\n".join(["POST /v1/translations HTTP/1.1", *lines, "", ""]).encode() + body[: len(body) // 2])
    time.sleep(0.5)
    line.close()
    until = time.monotonic() + 60
    while "uploads_open 0" not in several.client.get("/metrics").text:
        assert time.monotonic() < until
        time.sleep(0.2)
    assert jobs(several) == before
    assert list((several.work_dir / "incoming").iterdir()) == []


# ------------------------------------------------------------------------------------------------------------ the page


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with opened() as browser:
        yield browser


@pytest.fixture
def page(browser: Browser, several: RunningService) -> Iterator[Page]:
    page = browser.new_page(viewport={"width": 1280, "height": 980})
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.set_default_timeout(PATIENCE_MS)
    page.goto(several.url)
    expect(page.locator("#targets input")).to_have_count(3)
    yield page
    page.close()
    assert [text for text in said if "the server responded with a status of 4" not in text] == []


@pytest.mark.slow
def test_several_files_are_chosen_named_and_translated_together(
    page: Page, several: RunningService, tmp_path: Path
) -> None:
    files = {name: tmp_path / name for name in ("a_t1.nii.gz", "b.nii.gz", "c.nii.gz")}
    for seed, path in enumerate(files.values()):
        write(path, head(seed).data, head(seed).affine)
    page.set_input_files("#file", [files["a_t1.nii.gz"], files["c.nii.gz"]])
    expect(page.locator("#status")).to_have_text("Chosen: a_t1.nii.gz, c.nii.gz.")
    page.get_by_role("button", name="Remove c.nii.gz").click()
    page.set_input_files("#file", [files["b.nii.gz"], files["a_t1.nii.gz"]])  # the second is there already
    expect(page.locator("#volumes li")).to_have_count(2)
    expect(page.locator("#file-name")).to_contain_text("2 volumes")
    page.get_by_label("b.nii.gz is a").select_option("t2")
    page.check("#targets input[value=pd]")
    page.get_by_role("button", name="Translate").click()
    expect(page.locator("#problem")).to_contain_text("The target t2 is among the sources")
    page.uncheck("#targets input[value=t2]")
    page.get_by_role("button", name="Translate").click()
    expect(page.locator("#status")).to_contain_text("pd from t1 + t2", timeout=PATIENCE_MS)
    expect(page.locator("#source-caption")).to_have_text("t1: the volume as it came")
    first = picture(page, "#source-view")
    assert is_drawn(first)
    page.select_option("#shown-source", "t2")
    expect(page.locator("#source-caption")).to_have_text("t2: the volume as it came")
    other = picture(page, "#source-view")
    assert is_drawn(other)
    assert np.abs(other - first).mean() > 0.1
    assert is_drawn(picture(page, "#result-view"))
    curl = " ".join(page.locator("#curl").inner_text().replace("\\\n", "").split())
    assert "-F volume=@a_t1.nii.gz -F volume_t2=@b.nii.gz -F target=pd" in curl
    with page.expect_download() as download:
        page.get_by_role("button", name="Download result").click()
    wanted = by_hand(several.folder, {"t1": files["a_t1.nii.gz"], "t2": files["b.nii.gz"]}, tmp_path / "pd.nii.gz")
    got = image_of(Path(download.value.path()).read_bytes())
    np.testing.assert_array_equal(got.get_fdata(), wanted.get_fdata())
