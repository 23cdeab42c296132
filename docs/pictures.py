"""Makes the pictures of pages that README and docs show: `python docs/pictures.py`. Needs Chromium and Playwright."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from lightning_lowrank import MergeReport

_COMMAND = [sys.executable, "-m", "lightning_lowrank.cli"]
_RUN = "seed0-wd0.005-digits-0-4"


def main() -> None:
    """Run the demo, make its pages, take their pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", type=Path, help="a folder that the demo has written; without it, it is run")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "images")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        demo = options.demo or folder / "demo"
        if options.demo is None:
            subprocess.run([*_COMMAND, "demo", "--output", str(demo)], check=True)
        run, merge = folder / "run.html", folder / "merge.html"
        subprocess.run([*_COMMAND, "report", str(demo / "runs" / _RUN), "-o", str(run)], check=True)
        MergeReport.load(demo / "merges" / "seed0-wd0.005.ckpt.card.json").save(merge)
        with sync_playwright() as playwright:
            arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=arguments)
            for page, name, size, scheme in (
                (run, "page.png", (1280, 1500), "light"),
                (run, "page-phone.png", (390, 1100), "dark"),
                (merge, "merge.png", (1000, 1500), "light"),
            ):
                context = browser.new_context(
                    viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, reduced_motion="reduce"
                )
                tab = context.new_page()
                tab.goto(page.as_uri())
                tab.wait_for_timeout(2000)
                tab.screenshot(path=options.output / name)
                print(f"wrote {options.output / name}")
            browser.close()


if __name__ == "__main__":
    main()
