"""Documents as HTML and PDF: the same bytes each time, in four languages, whatever people are called."""

import base64
import json
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from decimal import Decimal
from hashlib import sha256
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import typst
from babel import Locale
from babel.numbers import get_currency_precision
from fontTools.ttLib import TTFont
from hypothesis import given, settings
from hypothesis import strategies as st

from receipts import render, sheet
from receipts.model import credited_status, published
from receipts.render import FONTS, HTML_POLICY, UNPRINTABLE, FontsError, render_html, render_pdf
from receipts.sheet import LABELS, choose_locale, show_amount, show_money, show_rate, show_time, write_sheet
from schemas.money import EXPONENTS, format_amount
from tests.core import Core, admin, config, purchase, shop

GOLDEN = Path(__file__).parent.parent / "data" / "golden"
LANGUAGES = sorted(LABELS)
Render = Callable[..., bytes]
Document = dict[str, Any]

# Where the locale data and ISO 4217 disagree on how many decimal places a currency has.
DISAGREEING = {
    **dict.fromkeys(("AFN", "ALL", "IRR", "KPW", "LAK", "LBP", "MGA", "MMK", "RSD", "SOS", "SYP", "YER"), 2),
    "IQD": 3,
}
FISCAL = {
    "kind": "sale",
    "fiscal_number": "12345678",
    "authority": "SRC",
    "register_number": "53219876",
    "qr_url": "https://fiscal.example/check?a=1&b=2",
    "fiscal_at": datetime(2026, 3, 1, 12, 1, tzinfo=UTC),
}


def vat_config(**changes: Any) -> dict[str, Any]:
    return config(tax_regime="vat", vat_rates=[{"country": "*", "rate": "20"}]) | changes


def issue(settings: Mapping[str, Any] | None = None, **changes: Any) -> tuple[Core, Document]:
    """Sell one pack; returns the core and the published receipt."""
    core = shop(dict(settings or vat_config()))
    core.applied("Purchase.Settled", **purchase(**changes))
    return core, documents_of(core)[0]


def documents_of(core: Core) -> list[Document]:
    blocks = {block.number: block.block for block in core.buyers}
    return [published(d.body, d.hash, "user-1", blocks.get(d.number)) for d in core.documents]


def texts(html: bytes) -> str:
    """Read what a page shows, without its markup."""
    found: list[str] = []
    parser = HTMLParser()
    parser.handle_data = found.append  # type: ignore[method-assign]
    parser.feed(re.sub(r"<style>.*?</style>", "", html.decode(), flags=re.DOTALL))
    return plain(" ".join(found))


def plain(text: str) -> str:
    """Make any run of spaces, those of typography too, one plain space."""
    return " ".join(text.split())


@pytest.fixture(scope="module")
def receipt() -> Document:
    return issue(buyer={"name": "Ann Ararat", "email": "ann@example.com", "country": "DE", "vat_id": "DE1"})[1]


# The same bytes


@pytest.mark.parametrize("file", sorted(GOLDEN.glob("*.json")), ids=lambda file: file.stem)
def test_golden_documents_keep_their_bytes(file: Path) -> None:
    golden = json.loads(file.read_text(encoding="utf-8"))
    assert {name: version(name) for name in golden["versions"]} == golden["versions"], "render the golden files again"

    for language, digests in golden["sha256"].items():
        arguments = golden["document"], language, golden["fiscal"], golden["status"]
        assert sha256(render_html(*arguments)).hexdigest() == digests["html"], f"{file.stem} {language} html"
        assert sha256(render_pdf(*arguments)).hexdigest() == digests["pdf"], f"{file.stem} {language} pdf"


@pytest.mark.parametrize("rendering", [render_html, render_pdf])
def test_the_same_document_gives_the_same_bytes_in_every_thread(rendering: Render, receipt: Document) -> None:
    with ThreadPoolExecutor(3) as pool:
        renderings = set(pool.map(lambda _: rendering(receipt), range(12)))

    assert renderings == {rendering(json.loads(json.dumps(receipt)))}


def test_members_in_another_order_give_the_same_pdf(receipt: Document) -> None:
    assert render_pdf(dict(reversed(receipt.items()))) == render_pdf(receipt)


def test_a_font_that_is_not_the_pinned_one_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for file in FONTS.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "NotoSans-Bold.ttf").write_bytes(b"another font")
    monkeypatch.setattr(render, "FONTS", tmp_path)

    with pytest.raises(FontsError, match=r"NotoSans-Bold\.ttf"):
        render.check_fonts.__wrapped__()


def test_the_list_of_printable_characters_is_that_of_the_fonts() -> None:
    manifest = json.loads((FONTS / "fonts.json").read_text(encoding="utf-8"))
    files = {file.name for file in FONTS.glob("*.ttf")}
    assert set(manifest["files"]) == files
    available = {code for name in files for code in TTFont(FONTS / name).getBestCmap() if code >= 0x20} | {0x0A}
    listed = {code for code in range(0x110000) if render._is_printable(chr(code))}

    assert listed == available
    assert sum(file.stat().st_size for file in FONTS.iterdir()) < 4_000_000
    assert {file.name for file in FONTS.glob("LICENSE-*")} == {"LICENSE-Noto.txt", "LICENSE-DejaVu.txt"}


# Languages


def test_every_language_has_every_label() -> None:
    for language in LANGUAGES:
        assert set(LABELS[language]) == set(LABELS["en"]), language
        assert all(LABELS[language].values()), language


def test_the_locale_is_the_one_asked_for_else_the_buyers_else_the_merchants(receipt: Document) -> None:
    merchant = receipt | {"merchant": receipt["merchant"] | {"locale": "hy-AM"}}
    buyer = merchant | {"buyer": {"locale": "de-AT"}}

    assert str(choose_locale(buyer, "ru")) == "ru"
    assert str(choose_locale(buyer)) == "de_AT"
    assert str(choose_locale(merchant)) == "hy_AM"
    for nonsense in ("", "tlh", "fr", "x" * 100, "../../etc", "en_ZZ_ZZ", "日本"):
        assert str(choose_locale(merchant, nonsense)) == "hy_AM", nonsense
    assert str(choose_locale(receipt | {"merchant": receipt["merchant"] | {"locale": "fr"}})) == "en"


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_receipt_says_all_that_is_on_it(language: str, receipt: Document) -> None:
    locale = Locale(language)
    shown = texts(render_html(receipt, language, [FISCAL], "partially_credited"))

    labels = LABELS[language]
    for label in ("receipt", "seller", "buyer", "vat_id", "payment_reference", "total_receipt", "partially_credited"):
        assert labels[label] in shown, label
    for text in ("Ararat LLC", "1 Abovyan Street", "Yerevan", "office@ararat.example", "Ann Ararat", "DE1", "pay-1"):
        assert text in shown, text
    assert receipt["number"] in shown
    assert receipt["hash"] in shown
    assert plain(show_time(receipt["product"]["expires_at"], "Asia/Yerevan", locale)) in shown
    assert plain(show_money("10.00", "USD", locale)) in shown
    assert show_amount("1.67", "USD", locale) in shown
    assert plain(show_rate("20", locale)) in shown
    for text in ("12345678", "53219876", "SRC", FISCAL["qr_url"]):
        assert str(text) in shown, text


@pytest.mark.parametrize("language", LANGUAGES)
def test_credit_notes_and_corrections_refer_to_what_they_are_about(language: str) -> None:
    policy = {"shortfall": "debit", "credit_note": "on_apply"}
    core, _ = issue(vat_config(chargeback_policy=policy))
    core.applied("Chargeback.Apply", **admin(dispute_id="d-1", external_ref="pay-1"))
    core.applied("Chargeback.Reverse", **admin(dispute_id="d-1"))
    receipt, note, correction = documents_of(core)
    labels = LABELS[language]

    shown = texts(render_html(note, language))
    assert all(text in shown for text in (note["number"], receipt["number"], "d-1", labels["total_credit_note"]))
    shown = texts(render_html(correction, language))
    for text in (correction["number"], note["number"], receipt["number"], labels["credits_restored"]):
        assert text in shown, text
    for document in (note, correction):
        assert render_pdf(document, language).startswith(b"%PDF")
    assert credited_status(core.document_bodies()) == "paid"


def test_the_absence_of_an_erased_buyer_is_told_and_of_one_never_known_is_not(receipt: Document) -> None:
    erased = {name: value for name, value in receipt.items() if name != "buyer"}
    never = {name: value for name, value in erased.items() if name != "buyer_digest"}

    assert LABELS["en"]["buyer_erased"] in texts(render_html(erased))
    assert LABELS["en"]["buyer"] not in texts(render_html(never))
    assert b"Ann Ararat" not in render_html(erased) + render_pdf(erased)


def test_a_simulated_merchants_documents_are_marked(receipt: Document) -> None:
    simulated = receipt | {"simulation": "SIMULATION"}

    assert "SIMULATION" in texts(render_html(simulated))
    assert LABELS["en"]["simulation"] in texts(render_html(simulated))
    assert "SIMULATION" not in texts(render_html(receipt))
    assert render_pdf(simulated) != render_pdf(receipt)


@pytest.mark.parametrize("regime", ["turnover", "none"])
def test_regimes_without_tax_lines_show_their_note_and_no_tax_table(regime: str) -> None:
    _, document = issue(config(tax_regime=regime, tax_status_note="No VAT is charged: §19."))
    shown = texts(render_html(document))

    assert "No VAT is charged: §19." in shown
    assert LABELS["en"]["tax_summary"] not in shown
    assert write_sheet(document, Locale("en"))["totals"] == [(LABELS["en"]["total_receipt"], "$10.00")]


@pytest.mark.parametrize("category", ["Z", "E", "AE", "O"])
def test_untaxed_categories_are_told_apart(category: str) -> None:
    rates = [{"country": "*", "rate": "0", "category": category}]
    _, document = issue(vat_config(vat_rates=rates))

    assert LABELS["en"][category] in texts(render_html(document))


@pytest.mark.parametrize(("country", "paper"), [("AM", "a4"), ("DE", "a4"), ("US", "us-letter"), ("CA", "us-letter")])
def test_the_paper_is_that_of_the_merchants_country(country: str, paper: str) -> None:
    address = {"lines": ["1 Main St"], "city": "Springfield", "postal_code": "12345", "country": country}
    _, document = issue(config(registered_address=address))

    assert write_sheet(document, Locale("en"))["paper"] == paper
    place = "Springfield 12345" if paper == "us-letter" else "12345 Springfield"
    assert place in texts(render_html(document))


def test_a_logo_takes_the_place_of_the_initial(receipt: Document) -> None:
    logo = typst.compile(b"#set page(width: 3cm, height: 1cm, fill: teal)\n= Logo", format="png")

    assert b'src="data:image/png;base64,' in render_html(receipt, logo=logo)
    assert render_pdf(receipt, logo=logo) != render_pdf(receipt)
    for rendering in (render_html, render_pdf):
        with pytest.raises(ValueError, match="PNG or a JPEG"):
            rendering(receipt, logo=b"<svg onload='x'>")


# Money


def test_the_currencies_that_locale_data_get_wrong_are_the_known_ones() -> None:
    differing = {code for code, digits in EXPONENTS.items() if get_currency_precision(code) != digits}

    assert set(DISAGREEING) <= differing
    assert {code: EXPONENTS[code] for code in DISAGREEING} == DISAGREEING


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("currency", sorted(EXPONENTS))
def test_every_currency_is_printed_with_its_own_digits(currency: str, language: str) -> None:
    locale = Locale(language)
    amount = format_amount(Decimal(1234567).scaleb(-EXPONENTS[currency]), currency)
    decimal = locale.number_symbols["latn"]["decimal"]
    _, _, digits = amount.partition(".")

    for shown in (show_money(amount, currency, locale), show_amount(amount, currency, locale)):
        figures = re.sub(r"[^0-9]", "", shown)
        assert figures == amount.replace(".", ""), shown
        assert (f"{decimal}{digits}" in shown) == bool(digits), shown


def test_a_currency_of_letters_stands_apart_from_the_number() -> None:
    assert show_money("12000.00", "AMD", Locale("en")) == "AMD\xa012,000.00"
    assert show_money("12000.00", "AMD", Locale("hy")) == "12\xa0000,00\xa0֏"
    assert show_money("1234.50", "EUR", Locale("de")) == "1.234,50\xa0€"
    assert show_money("1234.50", "USD", Locale("en")) == "$1,234.50"


def test_times_are_the_merchants_with_their_offset() -> None:
    new_year = "2026-12-31T20:30:00.000000Z"

    assert show_time(new_year, "Asia/Yerevan", Locale("en")) == "January 1, 2027, 00:30 (UTC+04:00)"
    assert show_time(new_year, "America/Los_Angeles", Locale("de")) == "31. Dezember 2026, 12:30 (UTC-08:00)"
    assert show_time(new_year, "Asia/Kathmandu", Locale("en")).endswith("02:15 (UTC+05:45)")


# Hostile and odd content

NASTY = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    '#strong[hi] #eval("1") $x$ */ // `raw` @ref <label> \\',
    "{{ 7*7 }}{% raw %}",
    "=HYPERLINK(1)",
    "日本 한국 العربية שלום ქართული 😀",
    "a\nb\tc\x0b\x07\u200e\u202e\ue000\u0378",
    "Donaudampfschifffahrtselektrizitätenhauptbetriebswerk" * 6,
)


@pytest.mark.parametrize("text", NASTY)
def test_no_text_of_a_document_is_read_as_markup(text: str, receipt: Document) -> None:
    document = receipt | {"buyer": {"name": text, "email": text}, "external_ref": text, "payment_method": text}
    document["product"] = receipt["product"] | {"title": text}
    html = render_html(document, None, [FISCAL | {"authority": text}])

    assert b"<script" not in html
    assert b"<img" not in html
    assert plain(text) in texts(html)
    assert f"<style>{style_of(html)}</style>" in html.decode()
    render_pdf(document, None, [FISCAL | {"authority": text}])


def style_of(html: bytes) -> str:
    found = re.search(r"<style>(.*?)</style>", html.decode(), re.DOTALL)
    assert found is not None
    return found[1]


def test_the_pages_policy_allows_its_own_style_and_nothing_else(receipt: Document) -> None:
    html = render_html(receipt)
    digest = sha256(style_of(html).encode()).digest()

    assert HTML_POLICY.startswith("default-src 'none'; style-src 'sha256-")
    assert base64.b64encode(digest).decode() in HTML_POLICY
    assert HTML_POLICY.replace("'", "&#39;") in html.decode()
    assert re.findall(r'\b(?:style|on[a-z]+|src|srcset|action)\s*=\s*"', html.decode()) == []


def test_a_link_is_made_of_web_addresses_only(receipt: Document) -> None:
    html = render_html(receipt, None, [FISCAL])

    assert re.findall(rb'href="([^"]*)"', html) == [b"https://fiscal.example/check?a=1&amp;b=2"]


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=60), st.text(st.characters(min_codepoint=0x20, exclude_categories=["Cs"]), max_size=200))
def test_any_text_can_be_printed(name: str, title: str) -> None:
    _, document = _RECEIPT
    document = document | {"buyer": {"name": name}, "product": document["product"] | {"title": title}}

    assert render_pdf(document).startswith(b"%PDF-1.7")
    assert render_html(document)


_RECEIPT = issue()


def test_what_no_font_has_becomes_a_square_in_the_pdf_alone(receipt: Document) -> None:
    document = receipt | {"buyer": {"name": "日本"}}

    assert "日本" in texts(render_html(document))
    assert render._printable({"name": ["日本a"]}) == {"name": [UNPRINTABLE * 2 + "a"]}


def test_many_lines_run_over_pages(receipt: Document) -> None:
    short, long = render_pdf(receipt), render_pdf(receipt, None, [FISCAL] * 60)

    assert len(re.findall(rb"/Type\s*/Page\b", short)) == 1
    assert len(re.findall(rb"/Type\s*/Page\b", long)) > 2


def test_the_pdf_is_for_archives_and_carries_the_record(receipt: Document) -> None:
    pdf = render_pdf(receipt)

    assert b"pdfaid:part>3<" in pdf
    assert b"pdfaid:conformance>B<" in pdf
    assert b"/EmbeddedFile" in pdf
    assert f"{receipt['number']}.json".encode() in pdf or b"/EF" in pdf


def test_sheets_hold_nothing_but_texts(receipt: Document) -> None:
    def check(value: Any) -> None:
        if isinstance(value, dict):
            for item in value.values():
                check(item)
        elif isinstance(value, list | tuple):
            for item in value:
                check(item)
        else:
            assert value is None or isinstance(value, str), value

    check(write_sheet(receipt, Locale("en"), [FISCAL], "paid"))
    assert sheet.TEMPLATES.is_dir()
