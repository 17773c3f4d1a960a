"""Pages of the site that follow from the tree: the reference, and what was measured.

MkDocs calls :func:`on_files` before it builds; nothing is written into the tree.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FOLDERS = (
    "activations", "demo", "evaluation", "formats", "images", "kernels", "lens", "metrics",
    "models", "report", "sae", "scale", "steering", "tasks",
)  # fmt: skip
"""Folders with a page of the reference."""
EXAMPLES = """\
import torch
import vision_plugin as vp
from sae_lens import SAE, TopKTrainingSAEConfig

hook = "blocks.2.hook_resid_post"
model = vp.load_model("demo")  # the packaged CLIP: 4 blocks, 128 dimensions, 65 tokens
world = vp.demo.draw(8, seed=0)  # 8 drawn images: .images, .captions, .scenes, .masks
pixels = model.preprocess(world.images)  # [8, 3, 64, 64]
embeddings = model.encode_image(pixels)  # [8, 64], unit norm
acts = model.run_with_cache(pixels)[1][hook]  # [8, 65, 128]
cfg = vp.VisionSAERunnerConfig(
    model_name="demo",
    images="demo:40",
    hook_name=hook,
    sae=TopKTrainingSAEConfig(d_in=128, d_sae=256, k=8),
    training_tokens=2048,
    output_path="runs/sae",
)
vp.train(cfg)  # a second of training: enough to show what comes out, too little to mean much
sae = SAE.load_from_disk("runs/sae")  # a stock SAELens SAE
latents = sae.encode(acts).amax(1).detach()  # [8, 256], the largest value over the tokens
store = vp.extract(
    vp.activations.ExtractionConfig(
        model_name="demo", images="demo:40", hook_names=[hook], output_path="acts"
    )
)
vlm = vp.load_vlm("demo")  # the packaged LLaVA over the same images
"""
"""What the examples of the reference start from; a test runs this, and then each of them."""


def reference() -> dict[str, dict[str, str]]:
    """Return where each public name is defined, by folder."""
    return {folder: names(f"vision_plugin.{folder}") for folder in FOLDERS}


def names(package: str) -> dict[str, str]:
    """Return where each public name of a package is defined, modules left out."""
    folder = ROOT.joinpath(*package.split("."))
    stub = folder / "__init__.pyi"
    tree = ast.parse((stub if stub.is_file() else folder / "__init__.py").read_text())
    found = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            found[node.name] = f"{package}.{node.name}"
        if not isinstance(node, ast.ImportFrom) or node.module in (None, "__future__"):
            continue
        module = f"{package}.{node.module}" if node.level else str(node.module)
        for name in node.names:
            public = name.asname == name.name or (not stub.is_file() and name.asname is None)
            if public and not name.name.startswith("_") and module.startswith("vision_plugin"):
                found[name.name] = _definition(module, name.name)
    return found


def _definition(module: str, name: str) -> str:
    """Return the path of a name, through the stub of the folder that it comes from."""
    path = ROOT.joinpath(*module.split("."))
    return names(module).get(name, f"{module}.{name}") if path.is_dir() else f"{module}.{name}"


def pages() -> dict[str, str]:
    """Return the generated pages by their address."""
    found = {"reference/index.md": _index()}
    for folder, defined in reference().items():
        parts = [f"# vision_plugin.{folder}\n"]
        for name, path in sorted(defined.items()):
            heading = f"vision_plugin.{folder}.{name}"
            parts.append(f"::: {path}\n    options:\n      heading: {heading}\n")
        found[f"reference/{folder}.md"] = "\n".join(parts)
    for result in sorted(RESULTS.glob("*.md")):
        found[f"measured/{result.name}"] = _result(result)
    return found


def _index() -> str:
    """Return a page with the names of the package itself, and the folders."""
    lines = ["# Reference", "", "`import vision_plugin as vp` gives:", ""]
    lines += [f"- [`vp.{name}`][{path}]" for name, path in sorted(names("vision_plugin").items())]
    lines += ["", "Every name has an example. The examples start from these lines, which need no"]
    lines += ["network, and write into the current folder:", "", "```python", EXAMPLES + "```"]
    lines += ["", "Each folder has its own page:", ""]
    lines += [f"- [`vision_plugin.{folder}`]({folder}.md)" for folder in FOLDERS]
    return "\n".join(lines) + "\n"


def _result(path: Path) -> str:
    """Return a page of results; its pictures come from the folder of the results."""
    text = path.read_text()
    if not text.startswith("#"):
        text = f"# {path.stem}\n\n{text}"
    return text


def pictures() -> list[Path]:
    """Return the pictures that pages of results show."""
    return sorted(path for path in RESULTS.iterdir() if path.suffix in (".png", ".webp"))


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages and the pictures of the results."""
    for address, content in pages().items():
        files.append(File.generated(config, address, content=content))
    for picture in pictures():
        files.append(File.generated(config, f"measured/{picture.name}", abs_src_path=str(picture)))
    return files
