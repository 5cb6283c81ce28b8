"""`make docs`: the site is built, holds the explorer and the reference, and a dead link fails it."""

import importlib.util
import re

import pytest
from conftest import ROOT

pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install 'repmlp[docs]'")
pytest.importorskip("material", reason="mkdocs-material is not installed: pip install 'repmlp[docs]'")
pytest.importorskip("mkdocstrings_handlers.python", reason="mkdocstrings-python is not installed")

spec = importlib.util.spec_from_file_location("repmlp_site", ROOT / "docs/site.py")  # `site` is a module of Python's
site = importlib.util.module_from_spec(spec)
spec.loader.exec_module(site)


def test_the_site_is_whole(tmp_path, monkeypatch):
    assert {"repmlp.layers", "repmlp.models.repmlpnet"} < set(site.modules())
    monkeypatch.setattr(site, "modules", lambda: ["repmlp.layers"])  # all of them take long
    site.main(["--out", str(tmp_path)])
    kernels = (tmp_path / "docs/kernels.html").read_text()
    frame = re.search(r'<iframe class="explorer" src="([^"]+)"', kernels)[1]
    explorer = (tmp_path / "docs" / frame).resolve()
    assert "repmlpnet_small" in explorer.read_text() and explorer.stat().st_size < 20e6
    for page in (ROOT / "docs").glob("*.md"):
        assert (tmp_path / "docs" / ("index.html" if page.stem == "README" else f"{page.stem}.html")).is_file(), page
    layers = (tmp_path / "reference/repmlp.layers.html").read_text()
    assert "SetSharingFC" in layers and "has to divide the channels" in layers
    assert "(S, h*w, h*w)" in layers, "products in docstrings stay products"
    table = (tmp_path / "results/small_table4_cifar100/table.html").read_text()
    assert re.findall(r"<h[12][^>]*>([^<]*)", table) == ["Study small_table4_cifar100"], "one heading"
    home = (tmp_path / "index.html").read_text()
    picture = re.search(r'src="(results/[^"]+\.png)"', home)[1]
    assert (tmp_path / picture).is_file() and 'href="docs/kernels.html"' in home
    assert not re.search(r'(src|href)="https?://[^"]*\.(js|css|woff2?)', home)  # read without network


def test_a_dead_link_fails(tmp_path, monkeypatch, caplog):
    pages = {
        "README.md": "# Start\n\n[a](docs/a.md)\n",
        "docs/README.md": "# Guide\n",
        "docs/a.md": "# A\n\n[b](b.md#x)\n",
    }
    for name, text in {**pages, "docs/site.css": "", "mkdocs.yml": (ROOT / "mkdocs.yml").read_text()}.items():
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_text(text)
    monkeypatch.setattr(site, "ROOT", tmp_path / "tree")
    monkeypatch.setattr(site, "explore", lambda path: None)
    monkeypatch.setattr(site, "modules", lambda: [])
    with pytest.raises(SystemExit, match="error: "):
        site.main(["--out", str(tmp_path / "site")])
    assert "b.md" in caplog.text
    (tmp_path / "tree/docs/b.md").write_text("# B\n\n## X\n")
    site.main(["--out", str(tmp_path / "site")])
    assert (tmp_path / "site/docs/b.html").is_file()
    (tmp_path / "tree/docs/b.md").write_text("# B\n\n## Y\n")  # a place in a page may be gone too
    with pytest.raises(SystemExit, match="error: "):
        site.main(["--out", str(tmp_path / "site")])
