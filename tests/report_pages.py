"""Pages of reports as a browser reads them, and what holds for all of them."""

from base64 import b64decode
from html.parser import HTMLParser
from pathlib import Path


class Read(HTMLParser):
    """A page as a browser reads it: its text, its attributes, and whether each element ends where it should."""

    EMPTY = ("meta", "img", "br")

    def __init__(self, path: Path):
        super().__init__()
        self.open, self.text, self.style, self.attributes, self.names = [], "", "", [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.attributes += [(tag, *each) for each in attrs]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.names.append(tag)
        self.attributes += [(tag, *each) for each in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["style"]:
            self.style += data
        else:
            self.text += data


def check_alone(read: Read) -> None:
    """Nothing is fetched and nothing runs; every picture says what it shows."""
    assert "url(" not in read.style
    assert "@import" not in read.style
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(read.names)
    for tag, name, value in read.attributes:
        assert not name.startswith("on")
        assert name not in ("href", "srcset", "action")
        if name == "src":
            assert tag == "img"
            assert b64decode(value.removeprefix("data:image/png;base64,"), validate=True).startswith(b"\x89PNG")
        else:
            assert "http" not in (value or "").replace("http-equiv", "")
            assert "url(" not in (value or "")
    assert all(alt for tag, name, alt in read.attributes if (tag, name) == ("img", "alt"))
    assert sum(name == "alt" for _, name, _ in read.attributes) == read.names.count("img")
