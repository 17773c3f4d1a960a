"""Put what was measured into the README: every figure there comes from ``benchmarks/results/``.

``python -m benchmarks.readme`` fills the README from the result files. With ``--run`` it first runs
the README's own commands again and keeps what they print: the demo, and training, scoring and
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", choices=("demo", "noto", "all"), help="run the commands first")
    run = parser.parse_args().run
    if run in ("demo", "all"):
        keep("demo.txt", {DEMO: execute(DEMO)})
        take_image(ROOT / "demo-results" / "report" / "index.html", RESULTS / "demo-report.png")
    if run in ("noto", "all"):
        shutil.rmtree(ROOT / "runs" / "noto", ignore_errors=True)
        keep("noto.txt", noto())
    fill(ROOT / "README.md", sections())
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


def sections() -> dict[str, str]:
    """The README's generated sections, of the result files that are there."""
    found = {}
    for name, file in (("demo", "demo.txt"), ("noto", "noto.txt")):
        if (RESULTS / file).is_file():
            found[name] = "```\n" + (RESULTS / file).read_text().strip() + "\n```"
    if (RESULTS / "families.md").is_file():
        found["families"] = (RESULTS / "families.md").read_text().strip()
    if (RESULTS / "sparsity.md").is_file():
        found["sparsity"] = (RESULTS / "sparsity.md").read_text().strip()
    found["measured"] = measured(RESULTS)
    return found


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


def fill(readme: Path, found: dict[str, str]) -> None:
    """Replace what stands between ``<!-- name -->`` and ``<!-- /name -->``."""
    text = readme.read_text()
    for name, content in found.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text = pattern.sub(lambda match, c=content: f"{match[1]}{c}\n{match[2]}", text)
    readme.write_text(text)


if __name__ == "__main__":
    main()
