"""The page at /, the interface's own page at /docs, what both need, and the built-in example."""

from importlib import resources
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse, HTMLResponse

from serve.models import Model
from serve.problems import Problem

EXAMPLE_SPACING_MM = 3.0


def add_pages(app: FastAPI) -> None:
    """Add the pages; everything that they load is served from here."""
    web = Path(str(resources.files("serve"))) / "web"
    borrowed = {
        "niivue.js": Path(str(resources.files("nilearn"))) / "_assets/js/niivue.umd.js",
        "swagger-ui.js": Path(str(resources.files("fastapi_offline"))) / "static/swagger-ui-bundle.js",
        "swagger-ui.css": Path(str(resources.files("fastapi_offline"))) / "static/swagger-ui.css",
    }
    pages = {file.name: file for file in web.iterdir() if file.is_file()} | borrowed

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(pages["index.html"], media_type="text/html")

    @app.get("/docs", response_class=HTMLResponse, include_in_schema=False)
    async def docs() -> FileResponse:
        return FileResponse(pages["docs.html"], media_type="text/html")

    @app.get("/web/{name}", include_in_schema=False)
    async def file(name: str) -> FileResponse:
        if name not in pages:
            raise Problem(404, "there is no such page")
        return FileResponse(pages[name], headers={"Cache-Control": "max-age=3600"})


def example_of(folder: Path, model: Model) -> tuple[str, Path]:
    """Return modality and file of the example, simulated at the first call."""
    from aldm.data.nifti_header import source_of
    from aldm.data.phantom import MODALITIES_OF_LAYOUT, simulate_subject
    from aldm.data.volume import save_nifti

    names = model.config.modalities
    layout = max(MODALITIES_OF_LAYOUT, key=lambda one: len(set(MODALITIES_OF_LAYOUT[one]) & set(names)))
    source = next(name for name in names if name in MODALITIES_OF_LAYOUT[layout])
    path = folder / f"example_{source}.nii.gz"
    if not path.exists():
        volume = simulate_subject(20_261, 0, layout, EXAMPLE_SPACING_MM)[source]
        grid = source_of(volume.affine, volume.data.shape, path)
        save_nifti(path, volume.data, grid, description="simulated head", overwrite=True)
    return source, path
