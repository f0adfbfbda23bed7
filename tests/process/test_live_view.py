"""The live view: its events over HTTP, and its page in a browser where there is one."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import socket
import threading
import time
from contextlib import contextmanager

import httpx
import pytest
import uvicorn
from fake_server import VOCAB, WAIT_MS

from fastserve_mega.client import AsyncClient, Client
from fastserve_mega.server.app import create_app
from fastserve_mega.system.config import SwapConfig
from fastserve_mega.text.tokenizer import Tokenizer
from fastserve_mega.types import SamplingParams

WAIT_S = WAIT_MS / 1000
ENDLESS = SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_dir):
    return Tokenizer(tiny_tokenizer_dir)


@contextmanager
def serving(endpoint, tokenizer, **options):
    """Address of an HTTP server in front of a coordinator, and the server."""
    client = AsyncClient(endpoint, tokenizer, timeout_s=WAIT_S)
    listening = socket.create_server(("127.0.0.1", 0))
    app = create_app(client, tokenizer, stopping=lambda: server.should_exit, **options)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(WAIT_S)
        listening.close()
        assert not thread.is_alive(), "an open event stream holds up the end of the server"


def snapshots(lines):
    for line in lines:
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))


def test_events_show_what_the_scheduler_does(start_server, tokenizer):
    with (
        start_server(max_batch_size=2) as server,
        Client(server.endpoint) as client,
        serving(server.endpoint, tokenizer) as url,
        httpx.Client(timeout=WAIT_S) as http,
    ):
        running = [client.submit([1 + i, 2, 3], ENDLESS) for i in range(4)]
        ids = {generation.request_id for generation in running}
        next(iter(running[0]))
        with http.stream("GET", f"{url}/live") as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            events = snapshots(response.iter_lines())
            first = next(events)
            assert first["policy"] == "skip_join_mlfq"
            (replica,) = first["replicas"]
            assert {view["request_id"] for view in replica["requests"]} == ids
            assert replica["device"]["owned"] > 0
            for generation in running:
                generation.cancel()
            idle = next(each for each in events if not each["replicas"][0]["requests"])
            assert idle["finished_requests"] == 4
            assert idle["clock_s"] > first["clock_s"]


def test_all_viewers_share_one_question_and_nobody_asks_when_they_are_gone(
    start_server, tokenizer, monkeypatch
):
    asked = []
    ask = AsyncClient.snapshot

    async def counted(client, *arguments):
        asked.append(time.monotonic())
        return await ask(client, *arguments)

    monkeypatch.setattr(AsyncClient, "snapshot", counted)

    async def watch(url, viewers):
        async with httpx.AsyncClient(timeout=WAIT_S) as http:

            async def see(count):
                async with http.stream("GET", f"{url}/live") as response:
                    async for line in response.aiter_lines():
                        count -= line.startswith("data: ")
                        if not count:
                            return

            await asyncio.gather(*(see(3) for _ in range(viewers)))

    with start_server() as server, serving(server.endpoint, tokenizer) as url:
        asyncio.run(watch(url, 5))
        assert 3 <= len(asked) <= 6
        before = len(asked)
        assert httpx.get(f"{url}/v1/models", timeout=WAIT_S).status_code == 200
        assert len(asked) <= before + 1


def test_the_page_asks_nobody_else(start_server, tokenizer):
    with start_server() as server, serving(server.endpoint, tokenizer) as url:
        page = httpx.get(f"{url}/", timeout=WAIT_S)
        parts = re.findall(r'(?:href|src)="([^"]+)"', page.text)
        files = [page, *(httpx.get(f"{url}/{part}", timeout=WAIT_S) for part in parts)]
        assert httpx.get(f"{url}/live/live.py", timeout=WAIT_S).status_code == 404
    assert {part.rpartition(".")[2] for part in parts} == {"css", "js"}
    for file in files:
        assert file.status_code == 200
        assert "http://" not in file.text.replace("http://www.w3.org/2000/svg", "")
        assert "https://" not in file.text
        assert "default-src 'none'" in file.headers["content-security-policy"]


def test_it_can_be_switched_off(start_server, tokenizer):
    with start_server() as server, serving(server.endpoint, tokenizer, live_view=False) as url:
        for path in ("/", "/live"):
            assert httpx.get(f"{url}{path}", timeout=WAIT_S).status_code == 404


@pytest.fixture
def browser():
    webdriver = pytest.importorskip(
        "selenium.webdriver", reason="no selenium: pip install selenium"
    )
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not chromedriver:
        pytest.skip("no Chromium: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (
        "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", "--window-size=1280,900",
    ):  # fmt: skip
        options.add_argument(argument)
    service = webdriver.ChromeService(chromedriver)
    driver = webdriver.Chrome(options=options, service=service)
    driver.implicitly_wait(10)
    yield driver
    driver.quit()


def wait_for(browser, condition):
    from selenium.webdriver.support.wait import WebDriverWait

    return WebDriverWait(browser, WAIT_S).until(condition)


def test_the_page_in_a_browser(start_server, tokenizer, browser):
    swap = SwapConfig(strategy="reactive")
    with (
        start_server(
            device_blocks=130, host_blocks=200, swap=swap, max_batch_size=2
        ) as server,
        Client(server.endpoint) as client,
        serving(server.endpoint, tokenizer) as url,
    ):  # fmt: skip
        browser.get(url)
        find = lambda selector: browser.find_elements("css selector", selector)  # noqa: E731
        wait_for(browser, lambda _: len(find(".lane")) == 10)
        server.runner.open_gate.clear()  # a browser is slower than the answers
        running = [client.submit([1 + i % (VOCAB - 1), 2, 3], ENDLESS) for i in range(6)]
        wait_for(browser, lambda _: len(find(".request[title]")) == 6)
        wait_for(browser, lambda _: find(".request.running[title]"))
        # In which level depends on how long a step of this machine was measured to take.
        wait_for(browser, lambda _: find("#moves")[0].text.count("arrived in Q") == 6)
        assert "in use" in find(".pool.device")[0].text
        server.runner.open_gate.set()
        find("#max-tokens")[0].clear()
        find("#max-tokens")[0].send_keys("5")
        find("#send")[0].click()
        wait_for(browser, lambda _: "finished" in find("#path")[0].text)
        for generation in running:
            generation.cancel()
        wait_for(browser, lambda _: not find(".request[title]"))
        assert "skip_join_mlfq: " in find("#policy")[0].text
        assert len(find(".chart polygon[points]")) == 7
        told = browser.execute_script("return [0.00022, 0.22].map(seconds)")
        assert told == ["0.22 ms", "220 ms"]
        find("#mixed")[0].click()
        wait_for(browser, lambda _: "20 of 20 finished" in find("#mixed-state")[0].text)
        # A path relative to the page, and nothing that the page's own rules forbid.
        assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_a_second_prompt_ends_the_first(start_server, tokenizer, browser):
    """Of the first answer nothing is shown any more, and nothing computed."""
    with (
        start_server() as server,
        Client(server.endpoint) as client,
        serving(server.endpoint, tokenizer) as url,
    ):
        browser.get(url)
        find = lambda selector: browser.find_elements("css selector", selector)  # noqa: E731
        find("#max-tokens")[0].clear()
        find("#max-tokens")[0].send_keys("400")
        server.runner.open_gate.clear()
        find("#send")[0].click()
        wait_for(browser, lambda _: client.snapshot().replicas[0].requests)
        find("#max-tokens")[0].clear()
        find("#max-tokens")[0].send_keys("7")
        find("#send")[0].click()
        wait_for(browser, lambda _: client.snapshot().finished_requests == 1)
        server.runner.open_gate.set()
        wait_for(browser, lambda _: "finished" in find("#path")[0].text)
        wait_for(browser, lambda _: not client.snapshot().replicas[0].requests)
        assert client.snapshot().generation_tokens < 400
