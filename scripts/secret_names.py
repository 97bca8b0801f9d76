"""Writes the file names of codegemma/safety/secrets.py into the VS Code extension."""

import json
from pathlib import Path

from codegemma.safety import secrets

TARGET = Path(__file__).parents[1] / "editors/vscode/src/secretNames.ts"
TABLES = {
    "SECRET_FOLDERS": secrets.SECRET_FOLDERS,
    "SECRET_PATHS": secrets.SECRET_PATHS,
    "SECRET_FILES": secrets.SECRET_FILES,
    "SECRET_FILES_UNLESS_CODE": secrets.SECRET_FILES_UNLESS_CODE,
    "TEMPLATE_WORDS": secrets.TEMPLATE_WORDS,
    "CODE_EXTENSIONS": secrets.CODE_EXTENSIONS,
    "CODE_LANGUAGES": secrets.CODE_LANGUAGES,
}


def document() -> str:
    """The TypeScript file, which a test keeps equal to the one in the extension."""
    lines = ["// Written by scripts/secret_names.py from codegemma/safety/secrets.py. Do not edit."]
    lines += [f"export const BACKUP_MARKS = {json.dumps(secrets.BACKUP_MARKS)};"]
    lines += [f"export const {name}: string[] = {json.dumps(names)};" for name, names in TABLES.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    TARGET.write_text(document(), "utf-8")
