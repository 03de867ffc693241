"""Writes the generated parts of README.md: ``python tools/readme.py``; with ``--check`` it only says whether they are up to date."""

import contextlib
import io
import re
import sys
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def render(text: str) -> str:
    """The README with its example run anew and its table made anew."""
    code = re.search(r"<!-- example: .*?-->\n```python\n(.*?)```\n", text, re.DOTALL)
    if code is None:
        raise ValueError("README.md has no example")
    text = _between(text, "output", f"\n```\n{run(code.group(1))}```\n")
    return _between(text, "operators", f"\n{operators()}\n")


def run(code: str) -> str:
    """What the example prints, with its seconds rounded away."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    return re.sub(r"\d+\.\d s\b", "0.5 s", out.getvalue())


def operators() -> str:
    """The catalogue as a table."""
    from refimpl.show import parts

    rows = ["| part | operators, with their forms, the first being the definition |", "|---|---|"]
    for part, ops in parts().items():
        listed = "; ".join(f"`{op.name}` {', '.join(op.forms)}" for op in ops)
        rows.append(f"| {part.replace('_', ' ')} | {listed} |")
    return "\n".join(rows)


def _between(text: str, name: str, new: str) -> str:
    found, count = re.subn(rf"(<!-- {name}: [^>]*-->).*?(<!-- end -->)", lambda m: m.group(1) + new + m.group(2), text, count=1, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"README.md has no part {name!r}")
    return found


def main() -> int:
    text = README.read_text(encoding="utf-8")
    fresh = render(text)
    if fresh == text:
        return 0
    if "--check" in sys.argv:
        print("README.md is not up to date: python tools/readme.py", file=sys.stderr)
        return 1
    README.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
