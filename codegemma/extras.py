"""Optional libraries: importing one, or naming the command that installs it for this copy of the package."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

PACKAGE = "codegemma"
CHECKOUT = Path(__file__).parent.parent  # the repository; in an installed copy, site-packages


def require(module: str, feature: str, extra: str) -> Any:
    """Imports an optional library. Raises ValueError, with the command that installs it, where it is missing.

    `feature` (a plural, for the message) needs it; `extra` is the extra of codegemma that has it.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ValueError(f"{feature} need the package {module}: {install_command(extra)}") from None


def install_command(*extras: str) -> str:
    """The command that adds extras to this copy of codegemma, from the source that it was installed from."""
    return f"{installer()} {_requirement(','.join(extras))}"


def installer() -> str:
    """`pip install`, or a longer command that installs into the Python that runs this."""
    try:
        tool = metadata.distribution(PACKAGE).read_text("INSTALLER") or ""
    except metadata.PackageNotFoundError:
        tool = ""
    python = f'"{sys.executable}"' if " " in sys.executable else sys.executable
    if tool.strip() == "uv":
        return f"uv pip install --python {python}"
    pip = shutil.which("pip")
    is_ours = pip is not None and Path(pip).parent == Path(sys.executable).parent
    return "pip install" if is_ours else f"{python} -m pip install"


def _requirement(extras: str) -> str:
    """What to pass to the installer, with the extras.

    It is the checkout, wheel or address that this copy came from (PEP 610), or the package's name if it came
    from an index. If that checkout or wheel is gone, it is the libraries of the extras themselves.
    """
    try:
        distribution = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError:  # a checkout that runs without having been installed
        return f'"{CHECKOUT}[{extras}]"'
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    url, repository = origin.get("url", ""), origin.get("vcs_info")
    name = f"{PACKAGE}[{extras}]"
    if not url:
        return f'"{name}"'
    if repository:
        folder = f"#subdirectory={origin['subdirectory']}" if origin.get("subdirectory") else ""
        return f'"{name} @ {repository["vcs"]}+{url}@{repository["commit_id"]}{folder}"'
    if not url.startswith("file:"):
        return f'"{name} @ {url}"'
    path = Path(url2pathname(urlsplit(url).path))
    if not path.exists():
        libraries = dict.fromkeys(_libraries(distribution.requires or [], set(extras.split(","))))
        return " ".join(f'"{library}"' for library in libraries)
    editable = "-e " if origin.get("dir_info", {}).get("editable") else ""
    return f'{editable}"{path}[{extras}]"'


def _libraries(requirements: list[str], extras: set[str]) -> list[str]:
    """The libraries that extras require, directly or through other extras that they include."""
    libraries = []
    for requirement in requirements:
        library, _, condition = (part.strip() for part in requirement.partition(";"))
        named = re.fullmatch(r"""extra\s*==\s*["']([\w-]+)["']""", condition)
        if not named or named[1] not in extras:
            continue
        if nested := re.fullmatch(rf"{PACKAGE}\[([\w,-]+)\]", library):
            libraries += _libraries(requirements, set(nested[1].split(",")))
        else:
            libraries.append(library)
    return libraries
