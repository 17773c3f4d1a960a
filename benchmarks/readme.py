"""Put what was measured into the documents: every figure comes from ``benchmarks/results/``.

``python -m benchmarks.readme`` fills the pages from the result files. With ``--run`` it first runs
their own commands again and keeps what they print: the demo, and training, scoring and
steering on real images where the data folder is beside the checkout.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # a bare checkout works, too

from benchmarks._measured import measured

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
COMMAND = Path(sys.executable).with_name("vision-plugin")

DEMO = "vision-plugin demo"
NOTO = (
    "vision-plugin train --model-name ../shared/models/emoji-clip "
    "--images ../shared/data/noto.parquet --hook-name blocks.4.hook_resid_post "
    "--architecture batchtopk --d-sae 768 --k 16 --training-tokens 400_000 "
    "--output-path runs/noto",
    "vision-plugin eval --sae runs/noto --images ../shared/data/noto.parquet "
    "--concepts column:name --concept-template 'a picture of {}'",
    "vision-plugin steer --sae runs/noto --images ../shared/data/noto.parquet "
    "--concepts column:name --concept-template 'a picture of {}' --n-images 6 --latents LATENT",
    "vision-plugin report --sae runs/noto --images ../shared/data/noto.parquet "
    "--output-path runs/noto-report",
)
WRAP = 96


def main() -> None:
    """Run the commands if asked to, then fill the README."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", choices=("demo", "noto", "all"), help="run the commands first")
    run = parser.parse_args().run
    if run in ("demo", "all"):
        keep("demo.txt", {DEMO: execute(DEMO)})
        take_image(ROOT / "demo-results" / "report" / "index.html", RESULTS / "demo-report.png")
    if run in ("noto", "all"):
        shutil.rmtree(ROOT / "runs" / "noto", ignore_errors=True)
        keep("noto.txt", noto())
    for page, found in sections().items():
        fill(ROOT / page, found)
    fill(ROOT / "CONTRIBUTING.md", {"family": worked_example()})


def noto() -> dict[str, str]:
    """The commands on real images with what they print; the most steerable latent is steered."""
    printed = {command: execute(command) for command in NOTO[:2]}
    scores = json.loads((ROOT / "runs" / "noto" / "evaluation.json").read_text())
    steerability = scores["per_latent"]["steerability"]["sae"]["score"]
    latent = max(range(len(steerability)), key=lambda i: steerability[i] or 0.0)
    rest = [command.replace("LATENT", str(latent)) for command in NOTO[2:]]
    return printed | {command: execute(command) for command in rest}


def keep(file: str, printed: dict[str, str]) -> None:
    """Write commands and what they printed."""
    parts = [f"$ {folded(command)}\n{lines}".strip() for command, lines in printed.items()]
    RESULTS.joinpath(file).write_text("\n\n".join(parts) + "\n")


def execute(command: str) -> str:
    """What a command prints."""
    words = [str(COMMAND), *shlex.split(command)[1:]]
    environment = {**os.environ, "COLUMNS": str(WRAP), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return "\n".join(line.rstrip() for line in done.stdout.splitlines())


def folded(command: str) -> str:
    """A command on lines that fit a page."""
    lines, line = [], ""
    for word in re.findall(r"(?:'[^']*'|\S)+", command):
        if len(line) + len(word) > WRAP - 8 and word.startswith("--"):
            lines.append(line.rstrip())
            line = "    "
        line += word + " "
    return " \\\n".join([*lines, line.rstrip()])


PRINTED = {"demo": "demo.txt", "noto": "noto.txt"}
"""Sections with what a command printed."""
SECTIONS = {
    "docs/getting-started.md": ("demo", "noto"),
    "docs/models.md": ("families",),
    "docs/training.md": ("sparsity",),
    "docs/measured.md": ("measured", "pages"),
}
"""Generated sections, by page."""


def sections() -> dict[str, dict[str, str]]:
    """The generated sections of each page, of the result files that are there."""
    found = {page: {name: section(name) for name in names} for page, names in SECTIONS.items()}
    return {page: {n: text for n, text in of.items() if text} for page, of in found.items()}


def section(name: str) -> str:
    """One generated section; empty where its result file is not there."""
    if name == "measured":
        return measured(RESULTS)
    if name == "pages":
        pages = sorted(RESULTS.glob("*.md"))
        return "\n".join(f"- [{page.stem}](measured/{page.name})" for page in pages)
    path = RESULTS / PRINTED.get(name, f"{name}.md")
    if not path.is_file():
        return ""
    text = path.read_text().strip()
    return f"```\n{text}\n```" if name in PRINTED else text


def worked_example() -> str:
    """The code of "add a model family", which a test runs."""
    code = (ROOT / "tests" / "hooks" / "test_contributing_family.py").read_text()
    shown = code.split("# --8<-- the family\n")[1].replace("  # isort: skip", "").strip()
    return f"```python\n{shown}\n```"


def take_image(page: Path, image: Path) -> None:
    """A screenshot of a page in a headless Chromium, 16 to 10."""
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        window = browser.new_page(viewport={"width": 1280, "height": 800})
        window.goto(page.as_uri())
        window.wait_for_selector("html[data-ready]")
        window.wait_for_timeout(1000)
        window.screenshot(path=image)
        browser.close()


def fill(page: Path, found: dict[str, str]) -> None:
    """Replace what stands between ``<!-- name -->`` and ``<!-- /name -->``."""
    text = page.read_text()
    for name, content in found.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text = pattern.sub(lambda match, c=content: f"{match[1]}{c}\n{match[2]}", text)
    page.write_text(text)


if __name__ == "__main__":
    main()
