"""The pages of asv, with the scripts that they would fetch when opened beside them: ``python asv_benchmarks/site_of_asv.py``, after ``asv publish``.

The scripts come from the npm registry by npm's own client, once, and stay in ``.asv/scripts``. Without npm or a network the pages
are as asv made them, and need a network when they are opened.
"""

import re
import subprocess
import tarfile
from pathlib import Path

HOME = Path(__file__).parent / ".asv"
SCRIPTS = {  # what a page asks for by its file name: package, and the file in it
    "jquery-3.3.1.min.js": ("jquery@3.3.1", "dist/jquery.min.js"),
    "jquery.flot.min.js": ("flot@0.8.3", "jquery.flot.js"),
    "jquery.flot.time.min.js": ("flot@0.8.3", "jquery.flot.time.js"),
    "jquery.flot.selection.min.js": ("flot@0.8.3", "jquery.flot.selection.js"),
    "jquery.flot.categories.min.js": ("flot@0.8.3", "jquery.flot.categories.js"),
    "jquery.flot.orderBars.js": ("flot-orderbars@1.0.0", "js/jquery.flot.orderBars.js"),
    "stupidtable.min.js": ("stupid-table-plugin@1.1.3", "stupidtable.min.js"),
    "md5.min.js": ("blueimp-md5@2.19.0", "js/md5.min.js"),
    "bootstrap.min.js": ("bootstrap@3.1.1", "dist/js/bootstrap.min.js"),
    "bootstrap.min.css": ("bootstrap@3.1.1", "dist/css/bootstrap.min.css"),
}
LINK = re.compile(r'(src|href)="https://[^"]*/([^"/]+\.(?:js|css))"([^>]*)')


def local(page: str) -> str:
    """A page that finds its scripts beside it; integrity was that of other builds of the same releases.

    Examples
    --------
    >>> local('<script src="https://cdn.example/1/md5.min.js" integrity="x" onerror="f()"></script>')
    '<script src="scripts/md5.min.js"></script>'
    """
    return LINK.sub(lambda found: f'{found[1]}="scripts/{found[2]}"' if found[2] in SCRIPTS else found[0], page)


def fetch(folder: Path) -> bool:
    """Whether all scripts are there; what is not, is fetched."""
    for name, (package, path) in SCRIPTS.items():
        if (folder / name).is_file():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        try:
            packed = subprocess.run(["npm", "pack", "--silent", package], cwd=folder, capture_output=True, text=True, check=True, timeout=60)
        except (OSError, subprocess.SubprocessError):
            return False
        with tarfile.open(folder / packed.stdout.split()[-1]) as archive:
            content = archive.extractfile(f"package/{path}")
            if content is None:
                return False
            (folder / name).write_bytes(content.read())
    return True


def main() -> None:
    if not fetch(HOME / "scripts"):
        print("npm or a network is missing: the pages in asv_benchmarks/.asv/html fetch their scripts when they are opened")
        return
    (HOME / "html" / "scripts").mkdir(exist_ok=True)
    for name in SCRIPTS:
        (HOME / "html" / "scripts" / name).write_bytes((HOME / "scripts" / name).read_bytes())
    page = HOME / "html" / "index.html"
    page.write_text(local(page.read_text(encoding="utf-8")), encoding="utf-8")
    print("asv_benchmarks/.asv/html needs no network; a browser wants it from a server: python -m http.server -d asv_benchmarks/.asv/html")


if __name__ == "__main__":
    main()
