"""Open reports of llmq in headless Chromium: no console errors, contrast and labels by axe-core, and screenshots.

    python scripts/check_report.py REPORT.html [REPORT.html ...] --pictures FOLDER

Each page is opened on a wide screen in light and dark colors, on a phone, and as it is printed. All folded parts are
open. The exit code is 1 if anything is wrong. scripts/check_report.sh makes the environment and the reports.
"""

import argparse
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, sync_playwright

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDE, PHONE, A4 = (1100, 900), (390, 844), (794, 1123)  # width and height in CSS pixels
NO_BROWSER = 77  # the exit code of skipped tests in other tools


@dataclass(frozen=True)
class View:
    name: str
    size: tuple[int, int]
    scheme: str = "light"
    media: str = "screen"


VIEWS = (
    View("light", WIDE),
    View("dark", WIDE, scheme="dark"),
    View("phone", PHONE),
    View("phone-dark", PHONE, scheme="dark"),
    View("print", A4, media="print"),
    View("print-dark", A4, scheme="dark", media="print"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", type=Path, nargs="+")
    parser.add_argument("--browser", help=f"the path of Chromium; default: {', '.join(BROWSERS)} on the PATH")
    parser.add_argument("--pictures", type=Path, help="a folder for screenshots and a PDF; default: none are written")
    given = parser.parse_args()
    program = given.browser or next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        print("skipped: no Chromium on this machine (Debian: apt-get install chromium)", file=sys.stderr)
        return NO_BROWSER
    wrong = 0
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        print(f"Chromium {browser.version}")
        for report in given.reports:
            for view in VIEWS:
                faults = check(browser, report.resolve(), view, given.pictures)
                print(f"{report}, {view.name}: {len(faults)} faults", *faults, sep="\n  ")
                wrong += len(faults)
        browser.close()
    return 1 if wrong else 0


def check(browser: Browser, report: Path, view: View, pictures: Path | None) -> list[str]:
    """What is wrong with the report in this view, one line each."""
    width, height = view.size
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=view.scheme)
    page.emulate_media(media=view.media)
    faults: list[str] = []
    page.on("console", lambda message: faults.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: faults.append(f"error: {error}"))
    page.on("request", lambda request: faults.extend(foreign(request.url, report)))
    page.goto(report.as_uri())
    if pictures is not None:
        pictures.mkdir(parents=True, exist_ok=True)
        stem = f"{report.parent.name.removeprefix('.')}-{view.name}"
        page.screenshot(path=pictures / f"{stem}.png")
        if view.media == "print":
            page.pdf(path=pictures / f"{stem}.pdf", format="A4")
    page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    if pictures is not None:
        page.screenshot(path=pictures / f"{stem}-whole.png", full_page=True)
    faults += overflow(page, view)
    for fault in Axe().run(page).response["violations"]:
        places = [" ".join(map(str, node["target"])) for node in fault["nodes"]]
        faults.append(f"axe-core {fault['id']}: {fault['help']}: {len(places)} places, such as {places[0]}")
    page.close()
    return faults


def foreign(address: str, report: Path) -> list[str]:
    """A report is one file: it reads nothing else."""
    return [] if address == report.as_uri() or address.startswith("data:") else [f"it reads {address}"]


def overflow(page: Page, view: View) -> list[str]:
    """What is too wide: on a screen, wide tables and figures scroll in their own boxes; on paper nothing scrolls."""
    boxes = "html, main *:not(svg *)" if view.media == "print" else "html"
    names = page.evaluate(f"""[...document.querySelectorAll('{boxes}')]
        .filter(part => part.clientWidth > 0 && part.scrollWidth > part.clientWidth + 1)
        .map(part => `<${{part.tagName.toLowerCase()}}>: ${{part.scrollWidth}} pixels in ${{part.clientWidth}}`)""")
    return [f"too wide: {name}" for name in names]


if __name__ == "__main__":
    raise SystemExit(main())
