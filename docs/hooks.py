"""What the site has besides docs/: the pictures of results/, and CONTRIBUTING.md as a page.

On the forge a page of docs/ names a picture as ../results/NAME; a site has nothing above its root.
"""

from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add them to the files of docs/."""
    root = Path(config.config_file_path).parent
    for picture in sorted(root.glob("results/**/*.png")):
        name = picture.relative_to(root).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(picture)))
    contributing = (root / "CONTRIBUTING.md").read_text().replace("](docs/", "](")
    files.append(File.generated(config, "contributing.md", content=contributing))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to pictures, from the root of the site."""
    return markdown.replace("](../results/", "](results/").replace("](../../results/", "](../results/")
