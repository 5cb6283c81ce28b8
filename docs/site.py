"""Build the site: the README, the guide, the results and the library's reference; strict, so a dead link fails.

    python docs/site.py                # -> site/index.html
    python docs/site.py --out FOLDER

What is built starts from the README and the pages of docs/ and follows their links, so that a table or a picture that a
page shows is part of the site. The library's docstrings make the reference, a page a module. The kernel explorer of a
net in results/weights is built anew and shown where a page says `<!-- explorer -->`.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import logging
import re
import shutil
import sys
import tempfile
from pathlib import Path

from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort, ConfigurationError

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")
EXPLORED = "repmlpnet_small_both"
EXPLORER = f"explorer/{EXPLORED}.html"
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
# rooms that only the commands use; the others are the library
WINGS = ("data", "training", "runs")


def gather(folder: Path) -> list[str]:
    """Copy the pages and all that they link to, at the places that they have in the repository; returns the pages."""
    waiting = [*(ROOT / name for name in PAGES), *sorted((ROOT / "docs").glob("*.md"))]
    seen: set[Path] = set()
    pages = []
    while waiting:
        file = waiting.pop(0).resolve()
        if file in seen or not file.is_file() or not file.is_relative_to(ROOT):
            continue  # a link to nothing stays dead, and fails the build
        seen.add(file)
        name = file.relative_to(ROOT)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if file.suffix != ".md":
            shutil.copy(file, folder / name)
            continue
        pages.append(name.as_posix())
        text = re.sub(r"\A## ", "# ", file.read_text(encoding="utf-8"))  # a table's heading is its page's title
        waiting += [file.parent / target for target in LINK.findall(re.sub(r"```.*?```", "", text, flags=re.DOTALL))]
        (folder / name).write_text(text.replace("<!-- explorer -->", frame(name)), encoding="utf-8")
    return pages


def frame(page: Path) -> str:
    """Return what shows the explorer within a page."""
    place = "../" * (len(page.parts) - 1) + EXPLORER
    return (
        f'<iframe class="explorer" src="{place}" title="Kernel explorer of {EXPLORED}" loading="lazy"></iframe>\n\n'
        f'<a href="{place}">The same in a page of its own.</a>\n'
    )


def explore(path: Path) -> None:
    """Write the kernel explorer of a net that is part of the repository."""
    sys.path.insert(0, str(ROOT / "analysis"))
    explorer = importlib.import_module("explore_kernels")
    explorer.main([str(ROOT / "results/weights" / EXPLORED / "model.safetensors"), "--output", str(path)])


def modules() -> list[str]:
    """Name the modules of the library that have public functions or classes."""
    names = []
    for file in sorted((ROOT / "repmlp").rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        if parts[1] in WINGS or parts[-1] == "__init__":
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        if any(isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith("_") for n in tree.body):
            names.append(".".join(parts))
    return names


def reference(folder: Path) -> list[str]:
    """Write a page for every module of the library; returns the pages."""
    (folder / "reference").mkdir()
    pages = []
    for name in modules():
        pages.append(f"reference/{name}.md")
        (folder / pages[-1]).write_text(f"# {name}\n\n::: {name}\n", encoding="utf-8")
    return pages


def navigation(pages: list[str], modules: list[str]) -> list[dict]:
    """Order the pages: those of the guide as its list has them, then any that it lacks; the results; the reference."""
    listed = [f"docs/{name}" for name in LINK.findall((ROOT / "docs/README.md").read_text(encoding="utf-8"))]
    guide = [page for page in listed if page in pages]
    guide += [page for page in pages if page.startswith("docs/") and page not in guide and page != "docs/README.md"]
    results: list = [page for page in pages if page == "results/README.md"]
    folders: dict[str, list] = {}
    for page in sorted(page for page in pages if page.startswith("results/") and page not in results):
        inner = page.split("/")[1:]
        (folders.setdefault(inner[0], []) if len(inner) > 1 else results).append({title_of(page): page})
    return [
        {"Start": [page for page in PAGES if page in pages]},
        {"Guide": ["docs/README.md", *guide]},
        {"Results": [*results, *({name: inside} for name, inside in folders.items())]},
        {"Reference": [{Path(page).stem: page} for page in modules]},
    ]


def title_of(page: str) -> str:
    """Name a page of results by its first heading."""
    found = re.search(r"^#+ (.*)$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
    return found[1].removeprefix("Study ") if found else page


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "site", help="folder of the site")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder)
        pages = gather(source)
        shutil.copy(ROOT / "docs/site.css", source / "site.css")
        explore(source / EXPLORER)
        nav = navigation(pages, reference(source))
        places = {"docs_dir": str(source), "site_dir": str(options.out.resolve())}
        try:
            build(load_config(str(ROOT / "mkdocs.yml"), nav=nav, strict=True, **places))
        except (Abort, ConfigurationError) as error:
            sys.exit(f"error: {error}")
    print(f"{options.out / 'index.html'}")


if __name__ == "__main__":
    main()
