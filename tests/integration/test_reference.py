"""/openapi.json and /docs: complete, and without any other host."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from outwake.app.api.openapi import document
from tests.support.api import Api
from tests.support.waits import awaiting


async def test_document_is_served(api: Api) -> None:
    response = await api.client.get("/openapi.json")
    assert response.json() == document()


async def test_page_takes_everything_from_here(api: Api) -> None:
    page = await api.client.get("/docs")
    assert page.status_code == 200
    assert "default-src 'none'" in page.headers["content-security-policy"]
    named = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert "/docs/swagger.js" in named
    for path in named:
        if path != "data:,":
            assert path.startswith("/")
            assert (await api.client.get(path)).status_code == 200
    assert (await api.client.get("/docs/nonsense")).status_code == 404


async def test_page_shows_every_operation_in_a_browser(api: Api, tmp_path: Path) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium here")
    import asyncio

    process = await asyncio.create_subprocess_exec(
        chromium,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        f"--user-data-dir={tmp_path}",
        "--virtual-time-budget=20000",
        "--dump-dom",
        f"{api.url}/docs",
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    async with awaiting("the program's end", timeout=120):
        output, _ = await process.communicate()
    page = output.decode()
    for methods in document()["paths"].values():
        for operation in methods.values():
            assert f"operations-{operation['tags'][0]}-{operation['operationId']}" in page
    assert "Failed to load" not in page
