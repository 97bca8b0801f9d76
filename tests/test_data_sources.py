"""What the files of a source become: encodings, line ends, notebooks, licences, linguist's attributes."""

import io
import json
import subprocess
import tarfile
import zipfile

import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("tree_sitter")

from typer.testing import CliRunner
from vocabularies import small

from codegemma.cli.main import app
from codegemma.data import licences
from codegemma.data.documents import Document, Outcome
from codegemma.data.encodings import decode
from codegemma.data.notebooks import script_of
from codegemma.data.sources import Source, expand, read


def read_folder(root):
    """The documents by path, and the reasons of what is left out."""
    results = list(read(Source(root, "folder")))
    kept = {each.path: each for each in results if isinstance(each, Document)}
    return kept, {each.path: each.reason for each in results if isinstance(each, Outcome)}


def write(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


# ------------------------------------------------------------------------------------------------- encodings
RUSSIAN = "# Вычисляет площадь круга по радиусу\nimport math\n"
TEXTS = [
    ("cp1251", "# -*- coding: cp1251 -*-\n# да\n"),
    ("koi8-r", "#!/usr/bin/python\n# vim: set fileencoding=koi8-r :\n# да\n"),
    ("gbk", "# -*- coding: gbk -*-\n# 谢谢\n"),  # its bytes are UTF-8 as well, and then mean something else
    ("euc-jp", ";; -*- coding: euc-jp-unix -*-\n;; 半径\n"),
    ("iso2022_jp", "# coding=iso-2022-jp\n# 半径\n"),
    ("iso-8859-2", "<?xml version='1.0' encoding='ISO-8859-2'?>\n<a>żółw</a>\n"),
    ("cp1250", '<html><head><meta charset="windows-1250"></head>żółw</html>\n'),
    ("cp1252", "# coding: latin-1\n# a “quoted” – dash\n"),
    ("latin-1", "# coding: ascii\n# größer\n"),
    ("utf-8", "# coding: latin-1\n# größer, written by an editor that ignores the line above\n"),
    ("utf-8", "# coding: rot13\n# größer\n"),
    ("utf-8", "data = open(path, encoding='gbk')  # größer\n"),
    ("cp1251", RUSSIAN),
    ("koi8-r", RUSSIAN),
    ("cp866", RUSSIAN),
    ("cp1251", RUSSIAN + 'print("\\nПлощадь круга: %sсм")  # и PDFы\n'),
    ("cp1252", "# Müller schrieb das – für alle\nx = 1\n"),
    ("latin-1", "// temperatura en °C, año y corazón\nint x;\n"),
    ("cp1250", "# Zażółć gęślą jaźń, funkcja oblicza powierzchnię koła\nx = 1\n"),
    ("shift_jis", "# 半径から円の面積を計算します\n"),
    ("euc-jp", "# 半径から円の面積を計算します\n"),
    ("iso2022_jp", "# 半径から円の面積\n"),
    ("gb2312", "// 读取配置文件并返回结果\n"),
    ("big5", "# 讀取設定檔案，傳回結果，計算圓的面積\n"),
    ("euc-kr", "# 원의 넓이를 계산합니다\n"),
    ("utf-8-sig", "x = 'é'\n"),
    ("utf-16", "x = 'é'\n"),
    ("utf-16-le", "x = 'é'\n"),
    ("utf-16-be", "x = 'é'\n"),
    ("utf-32", "x = 'é'\n"),
    ("utf-32-be", "x = 'é'\n"),
]


@pytest.mark.parametrize(("encoding", "text"), TEXTS)
def test_a_text_is_read_in_the_encoding_it_was_written_in(encoding, text):
    assert decode(text.encode(encoding))[0] == text


def test_byte_order_marks_of_either_order():
    for mark, name in ((b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be")):
        assert decode(mark + "é = 1\n".encode(name)) == ("é = 1\n", "utf-16 with BOM")
    for mark, name in ((b"\xff\xfe\0\0", "utf-32-le"), (b"\0\0\xfe\xff", "utf-32-be")):
        assert decode(mark + "é = 1\n".encode(name)) == ("é = 1\n", "utf-32 with BOM")


@pytest.mark.parametrize(
    "encoding", ["cp1251", "cp1253", "cp1254", "cp1255", "cp1256", "tis-620", "euc-kr", "cp1250"]
)
def test_what_is_not_sure_is_refused_and_never_mojibake(encoding):
    """Short words that charset-normalizer cannot tell: each is read right or not at all."""
    words = {
        **{"cp1251": "# привет", "cp1253": "# κύκλος", "cp1255": "# שלום", "cp1256": "# مرحبا"},
        **{"tis-620": "# สวัสดี", "euc-kr": "# 오류", "cp1250": "# żółw"},
        "cp1254": "# dairenin alanını hesaplar, yarıçap şöyle verilir",
    }
    text = f"{words[encoding]}\nx = 1\n"
    try:
        assert decode(text.encode(encoding))[0] == text
    except ValueError as error:
        assert str(error) in ("unknown encoding", "binary")


TURKISH = (
    "# Bu fonksiyon verilen dizinin toplamını hesaplar ve sonucu döndürür\ndef topla(dizi):\n"
    "    # Önce değişkeni sıfırlıyoruz\n    return s  # işlem başarıyla tamamlandı, çıktı gönderildi\n"
)
LITHUANIAN = (
    "# Ši funkcija apskaičiuoja visų sąrašo elementų sumą ir grąžina rezultatą\ndef f(a):\n"
    "    # Pirmiausia inicijuojame kintamąjį\n    return sum(a)  # grąžiname rezultatą naudotojui\n"
)


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("cp1254", TURKISH),
        ("iso8859-9", "# Değişken adı: öğrenci sayısı\nx = 'İstanbul şehri'\n"),
        ("cp1257", LITHUANIAN),
        ("cp852", "# Tato funkce vypočítá součet všech prvků a vrátí výsledek\n"),
    ],
)
def test_words_that_mix_scripts_or_hold_lone_accents_speak_against_an_encoding(encoding, text):
    try:
        assert decode(text.encode(encoding))[0] == text
    except ValueError as error:
        assert str(error) in ("unknown encoding", "binary")


def test_rows_have_one_line_end_and_what_cannot_be_read_a_reason(tmp_path):
    root = write(
        tmp_path / "r",
        {
            "dos.py": "import os\r\n\r\nx = 1\r\n",
            "mac.py": "import os\rx = 1\r",
            "wide.py": "x = 1\r\ny = 2\r\n".encode("utf-16"),
            "odd.py": "# żółw\n".encode("cp1250"),
            "cut.py": b"\xff\xfex",
            "image.py": b"\x89PNG\r\n\x1a\n\0",
        },
    )
    kept, reasons = read_folder(root)
    assert {path: each.text for path, each in kept.items()} == {
        "dos.py": "import os\n\nx = 1\n",
        "mac.py": "import os\nx = 1\n",
        "wide.py": "x = 1\ny = 2\n",
    }
    unknown = "unknown encoding"
    assert reasons == {"odd.py": unknown, "cut.py": unknown, "image.py": "binary"}
    lines = tmp_path / "rows.jsonl"
    lines.write_text(json.dumps({"content": "a = 1\r\nb = 2\r", "path": "a.py", "repo": "r"}) + "\n")
    assert [each.text for each in read(Source(lines, "lines"))] == ["a = 1\nb = 2\n"]
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("p/a.py", "a = 1\r\n")
    assert [each.text for each in read(Source(tmp_path / "a.zip", "zip"))] == ["a = 1\n"]


# ------------------------------------------------------------------------------------------------- notebooks
def notebook(*cells, language="python", **metadata):
    made = [{"cell_type": kind, "source": source, "metadata": {}, "outputs": []} for kind, source in cells]
    return json.dumps(
        {"cells": made, "metadata": {"language_info": {"name": language}, **metadata}, "nbformat": 4}
    )


def test_code_cells_are_a_script():
    cells = (
        ("markdown", ["# Title\n"]),
        ("code", ["%matplotlib inline\n", "import os\n", "!pip install x\n", "files = !ls\n", "os.walk?\n"]),
        ("code", "%%bash\necho hi\n"),
        ("code", "%%time\nx = 1\n"),
        ("code", "sql = '''\n%d rows\n'''\n\n"),
        ("code", "\n"),
        ("raw", "raw"),
    )
    assert script_of(notebook(*cells)) == (
        "# %matplotlib inline\nimport os\n# !pip install x\n# files = !ls\n# os.walk?\n\n"
        "# %%time\nx = 1\n\nsql = '''\n%d rows\n'''\n",
        "python",
    )
    assert script_of(notebook(("code", "x <- 1"), language="R")) == ("x <- 1\n", "r")
    assert script_of(notebook(("code", "%d"), language="C++")) == ("%d\n", "cpp")
    old = {"worksheets": [{"cells": [{"cell_type": "code", "input": ["a = 1"], "language": "python"}]}]}
    assert script_of(json.dumps(old)) == ("a = 1\n", "python")
    assert script_of(json.dumps({"cells": []})) == ("", "python")


@pytest.mark.parametrize("text", ["", "{}", "[1]", "null", "not json", '{"cells": [{}]}', '{"cells": 3}'])
def test_a_damaged_notebook_has_a_reason(text, tmp_path):
    with pytest.raises(ValueError, match="no notebook"):
        script_of(text)
    assert read_folder(write(tmp_path / "r", {"a.ipynb": text or "x"}))[1] == {"a.ipynb": "no notebook"}


def test_notebooks_are_documents_of_every_kind_of_source(tmp_path):
    text = notebook(("code", "def add(a, b):\r\n    return a + b\r\n"))
    root = write(tmp_path / "r", {"a.ipynb": text})
    (tmp_path / "rows.jsonl").write_text(json.dumps({"content": text, "path": "a.ipynb", "repo": "r"}) + "\n")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("p/a.ipynb", text)
    sources = [
        Source(root, "folder"),
        Source(tmp_path / "rows.jsonl", "lines"),
        Source(tmp_path / "a.zip", "zip"),
    ]
    for source in sources:
        (document,) = read(source)
        assert (document.text, document.language) == ("def add(a, b):\n    return a + b\n", "python")


# -------------------------------------------------------------------------------------------------- licences
@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("# SPDX-License-Identifier: BSD-2-Clause\nx = 1\n", "BSD-2-Clause"),
        ("#!/bin/sh\n#\n# Copyright 2020 Jo. SPDX-License-Identifier: 0BSD\n", "0BSD"),
        ("/*\n * SPDX-License-Identifier: GPL-2.0-only WITH Linux-syscall-note\n */\nint x;\n", None),
        ("/* SPDX-License-Identifier: ISC */\n", "ISC"),
        ("<!-- SPDX-License-Identifier: CC0-1.0 -->\n<html>\n", "CC0-1.0"),
        ("<?php\n// SPDX-License-Identifier: ISC\n", "ISC"),
        ("--[[\n  SPDX-License-Identifier: ISC\n]]\nlocal x\n", "ISC"),
        ("{-\nSPDX-License-Identifier: ISC\n-}\nmodule X where\n", "ISC"),
        ("// SPDX-License-Identifier: MIT\n// SPDX-License-Identifier: Apache-2.0\n", "Apache-2.0 AND MIT"),
        ("#=====\n# a banner\n#=====\n# SPDX-License-Identifier: ISC\n", "ISC"),
        ('def f():\n    """Such as\n\n    SPDX-License-Identifier: GPL-3.0-only\n    """\n', "MIT"),
        ('"""A module.\n\nSPDX-License-Identifier: GPL-3.0-only\n"""\n', "MIT"),
        ("'''\nSPDX-License-Identifier: GPL-3.0-only\n'''\n", "MIT"),
        ("#=====\n'''\nSPDX-License-Identifier: GPL-3.0-only\n'''\n", "MIT"),
        ("int x;\n// SPDX-License-Identifier: GPL-3.0-only\n", "MIT"),
        ("/* a */\nconst t = `\n// SPDX-License-Identifier: GPL-3.0-only\n`\n", "MIT"),
        ("# Write a line such as SPDX-License-Identifier: GPL-3.0-only\nx = 1\n", "MIT"),
        ("x = '# SPDX-License-Identifier: GPL-3.0-only'\n", "MIT"),
    ],
)
def test_the_header_alone_states_a_files_licence(text, licence):
    stated = licences.of_document(text, "src/a.py", {"": "MIT"})
    assert stated == (licence or "GPL-2.0-only WITH Linux-syscall-note")


# -------------------------------------------------------------------------------------------------- linguist
ATTRIBUTED = {
    ".gitattributes": "api/** linguist-generated\next/** linguist-vendored\n*.pb.py linguist-generated=true\n"
    "[attr]theirs linguist-vendored -diff\nlib/*.py theirs\n"
    '"with blank/*.py" linguist-generated\nfolder/ linguist-generated\n*.py text eol=lf\n',
    **dict.fromkeys(
        ("api/x.py", "api/sub/y.py", "ext/y.py", "a.pb.py", "lib/z.py", "with blank/a.py"), "x = 1\n"
    ),
    "api/own/.gitattributes": "*.py -linguist-generated\nback.py linguist-generated=false\n",
    **dict.fromkeys(("api/own/a.py", "main.py", "folder/b.py", "lib/deep/c.py", "ext/own.py"), "x = 1\n"),
    "ext/.gitattributes": "own.py !linguist-vendored\n",
}
KEPT = {"api/own/a.py", "main.py", "folder/b.py", "lib/deep/c.py", "ext/own.py", ".gitattributes"}
LEFT_OUT = {
    **dict.fromkeys(("api/x.py", "api/sub/y.py", "a.pb.py", "with blank/a.py"), "generated"),
    **{"ext/y.py": "vendored", "lib/z.py": "vendored"},
    **{"api/own/.gitattributes": "generated", "ext/.gitattributes": "vendored"},
}


def test_attributes_of_a_checkout_are_those_that_git_gives(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    root = write(tmp_path / "r", ATTRIBUTED)
    subprocess.run(["git", "init", "-q", root], check=True)
    kept, reasons = read_folder(root)
    assert (set(kept), reasons) == (KEPT, LEFT_OUT)
    names = "\0".join(ATTRIBUTED).encode()
    command = ["git", "check-attr", "-z", "--stdin", "linguist-generated", "linguist-vendored"]
    fields = subprocess.run(command, cwd=root, input=names, capture_output=True, check=True).stdout.decode()
    path_name_value = fields.split("\0")
    set_by_git = {
        path
        for path, value in zip(path_name_value[::3], path_name_value[2::3], strict=False)
        if value in ("set", "true")
    }
    assert set_by_git == set(LEFT_OUT)
    (root / ".git/info/attributes").write_text("main.py linguist-generated\nx.py -linguist-generated\n")
    write(tmp_path, {"git/attributes": "b.py linguist-vendored\n"})
    kept, reasons = read_folder(root)
    assert reasons["main.py"] == "generated" and reasons["folder/b.py"] == "vendored" and "api/x.py" in kept


def test_attributes_of_an_archive(tmp_path):
    with tarfile.open(tmp_path / "p-1.tar.gz", "w:gz") as archive:
        for name, text in ATTRIBUTED.items():
            info = tarfile.TarInfo(f"p-1/{name}")
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
    results = list(read(Source(tmp_path / "p-1.tar.gz", "tar")))
    assert {each.path for each in results if isinstance(each, Document)} == KEPT


# --------------------------------------------------------------------------------------------------- nothing
def test_a_folder_without_files_is_no_source(tmp_path):
    (tmp_path / "empty/sub").mkdir(parents=True)
    subprocess.run(["git", "init", "-q", tmp_path / "new"], check=True)
    for name in ("empty", "new"):
        with pytest.raises(ValueError, match=f"{name} holds no files: give a checkout"):
            expand(str(tmp_path / name))
    (tmp_path / "empty/sub/a.py").write_text("x = 1\n")
    assert expand(str(tmp_path / "empty")) == [Source(tmp_path / "empty", "folder")]


def test_a_build_without_rows_says_so_and_fails(tmp_path):
    (tmp_path / "code").mkdir()
    (tmp_path / "code/notes.unknown").write_text("nothing that is code\n")
    (tmp_path / "m.model").write_bytes(small())
    arguments = [
        "data",
        "build",
        tmp_path / "code",
        "--out",
        tmp_path / "rows",
        "--tokenizer",
        tmp_path / "m.model",
    ]
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert isinstance(result.exception, ValueError) and "has no rows" in str(result.exception)
    assert "language not wanted" in result.output
