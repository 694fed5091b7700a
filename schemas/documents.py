"""The shapes of the documents on the receipts topic. Identifiers, times, money and rates are strings."""

from typing import NotRequired, TypedDict


class TaxLine(TypedDict):
    """The tax of one category and rate."""

    category: str
    rate: str
    net: str
    tax: str
    gross: str
    note: NotRequired[str]


class TaxArithmetic(TypedDict):
    """What upstream's own rate gives, where its amount differs."""

    rate_gives: str


class TaxDiscrepancy(TypedDict):
    """What is odd about upstream's figures, which are used all the same."""

    arithmetic: NotRequired[TaxArithmetic]
    merchant_tax: NotRequired[str]


class DocumentTax(TypedDict):
    """A document's tax: none of its lines for the regimes without tax."""

    regime: str
    source: str
    lines: list[TaxLine]
    net: str
    tax: str
    gross: str
    note: NotRequired[str]
    discrepancy: NotRequired[TaxDiscrepancy]


class DocumentAddress(TypedDict):
    """A postal address."""

    lines: list[str]
    city: str
    postal_code: NotRequired[str]
    country: str


class DocumentMerchant(TypedDict):
    """The merchant's legal block as it was when the document was issued."""

    legal_name: str
    registered_address: DocumentAddress
    country: str
    contact_email: str
    time_zone: str
    locale: str
    tax_status_note: NotRequired[str]


class DocumentBuyer(TypedDict):
    """The buyer; gone once the user is erased."""

    name: NotRequired[str]
    email: NotRequired[str]
    country: NotRequired[str]
    vat_id: NotRequired[str]
    locale: NotRequired[str]


class DocumentProduct(TypedDict):
    """What was bought."""

    product_code: str
    title: str
    credits: int
    expires_at: NotRequired[str]


class DocumentPrice(TypedDict):
    """What it cost."""

    country: str
    currency: str
    amount: str


class DocumentBase(TypedDict):
    """What every document says."""

    kind: str
    number: str
    receipt_number: str
    issued_at: str
    simulation: NotRequired[str]
    external_ref: str
    user_id: str
    account_id: NotRequired[str]
    lot_id: str
    amount: str
    currency: str
    country: NotRequired[str]
    payment_method: NotRequired[str]
    tax: DocumentTax
    merchant: DocumentMerchant
    config_version: int
    buyer: NotRequired[DocumentBuyer]
    buyer_digest: NotRequired[str]
    hash: NotRequired[str]


class ReceiptIssued(DocumentBase):
    """A receipt: one for each purchase."""

    product: DocumentProduct
    price: NotRequired[DocumentPrice]
    order_placed_at: NotRequired[str]
    settled_at: NotRequired[str]


class CreditNoteIssued(DocumentBase):
    """A credit note, or the correction that takes one back; `receipt_number` is the receipt it belongs to."""

    credit_note_number: NotRequired[str]
    correction_number: NotRequired[str]
    corrects: NotRequired[str]
    reversal: NotRequired[str]
    reversal_key: NotRequired[str]
    refund_id: NotRequired[str]
    dispute_id: NotRequired[str]
    credits_taken: NotRequired[int]
    credits_due: NotRequired[int]
