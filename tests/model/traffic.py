"""Makes up traffic for the model and the product: commands of the whole catalogue, good, bad, late and repeated."""

import itertools
from collections.abc import Callable, Iterable
from datetime import datetime, timedelta
from random import Random
from typing import Any

from tests.model.ledger import Ledger

USERS = ("ani", "bardo", "care")
SOURCE = "/model"
PRODUCTS = ("P100", "P7", "PX", "PY")
GRANTS = ("W5", "M20")
TYPES = ("chat", "image", "later")
PRICES = {
    "P100": [("*", "USD", "10.00"), ("AM", "AMD", "4000.00"), ("DE", "EUR", "9.99"), ("DE", "USD", "11.00")],
    "P7": [("*", "USD", "3.33"), ("*", "JPY", "500")],
}
WAITS = (0, 0, 1, 60, 16 * 60, 3600, 86_400, 5 * 86_400, 31 * 86_400)
CATALOGUE = ("Product", "ProductPrice", "OperationType")
MINUTE = timedelta(minutes=1)
# A member of commands without an actor that can be any text.
FREE = {
    "Purchase.Settled": "payment_method",
    "User.SignedUp": "locale",
    "Operation.Open": "workflow_id",
    "Operation.RecordAndClose": "workflow_id",
    "Operation.Cancel": "reason",
}


def wire(at: datetime) -> str:
    return at.isoformat(timespec="microseconds")


def admin(**members: Any) -> dict[str, Any]:
    return members | {"justification": "because", "actor": "admin"}


def first_catalogue() -> list[tuple[str, dict[str, Any]]]:
    """List the commands that every history begins with."""
    commands = []
    for code, credits, days in (("P100", 100, 30), ("P7", 7, 5)):
        prices = [{"country": c, "currency": k, "amount": a} for c, k, a in PRICES[code]]
        commands.append(("Product.Create", sellable(code, credits, days, prices)))
    for code, credits, policy in (("W5", 5, "apply_on_signup"), ("M20", 20, "manual_grant")):
        grant = {"product_code": code, "title": code, "credits": credits, "access_period_days": 1}
        commands.append(("Product.Create", grant | {"distribution": "grant", "grant_policy": policy, "actor": "admin"}))
    for code, unit, rate, minimum in (("chat", "token", "0.5", 1), ("image", "image", "2.25", 3)):
        commands.append(("OperationType.CreateWithArchival", version(code, unit, rate, minimum)))
    return commands


def sellable(code: str, credits: int, days: int, prices: list[dict[str, str]]) -> dict[str, Any]:
    terms = {"product_code": code, "title": code, "credits": credits, "access_period_days": days}
    return terms | {"distribution": "sellable", "prices": prices, "actor": "admin"}


def version(code: str, unit: str, rate: str, minimum: int) -> dict[str, Any]:
    terms = {"operation_code": code, "display_name": code, "resource_unit": unit, "credits_per_unit": rate}
    return terms | {"minimum_charge": minimum, "actor": "admin"}


class Traffic:
    """Draws messages with ``random`` (which Hypothesis may steer), looking at the model for what there is to hit."""

    def __init__(self, model: Ledger, config: dict[str, Any]) -> None:
        self.model = model
        self.config = config
        self.sent: list[dict[str, Any]] = []
        self._ids = itertools.count(1)
        self._kinds: list[Callable[[], tuple[str, dict[str, Any]]]] = [
            *[self.purchase] * 6,
            *[self.opening] * 8,
            *[self.closing] * 8,
            *[self.refund] * 4,
            *[self.chargeback] * 3,
            *[self.winning] * 3,
            *[self.adjustment] * 5,
            *[self.grant] * 2,
            *[self.attachment] * 2,
            *[self.catalogue] * 4,
            *[self.job] * 3,
            self.cancelling,
            self.sign_up,
            self.locking,
            self.role,
            self.configuration,
        ]

    def batch(self, random: Random, now: datetime, size: int) -> list[dict[str, Any]]:
        """Draw the messages of a batch. At most one changes the catalogue, so that all moments differ."""
        self.random, self.now = random, now
        found: list[dict[str, Any]] = []
        for _ in range(size):
            if self.sent and self.chance(5):
                made = self.again(random.choice(self.sent))
            else:
                made = self.message(*(self.erasure if self.chance(150) else random.choice(self._kinds))())
            types = {m["type"] for m in found}
            # What waits for a receipt is released at the end of a batch, when the receipt has its number.
            early = made["type"] == "Command.Resolve" and "Purchase.Settled" in types
            if early or made["type"].split(".")[0] in {t.split(".")[0] for t in types} & set(CATALOGUE):
                made = self.message(*self.adjustment())
            found.append(made)
        self.sent += found
        return found

    def message(self, command_type: str, payload: dict[str, Any]) -> dict[str, Any]:
        made: dict[str, Any] = {
            "type": command_type,
            "id": f"m-{next(self._ids)}",
            "source": SOURCE,
            "payload": payload,
        }
        if command_type == "Operation.RecordAndClose" and self.chance(3):
            made["late_by"] = self.random.choice([1, 20, 24 * 60]) * MINUTE
        return made

    def again(self, message: dict[str, Any]) -> dict[str, Any]:
        """Repeat a message: as it was, as a new message, or with other content under the same identity or key."""
        payload = dict(message["payload"])
        how = self.random.choice(["same", "same", "new", "new", "other content", "other content of the key"])
        if "other" in how and (member := "actor" if "actor" in payload else FREE.get(message["type"])):
            payload[member] = "another"
        if how in ("same", "other content"):
            return message | {"payload": payload}
        return message | {"payload": payload, "id": f"m-{next(self._ids)}"}

    def chance(self, one_in: int) -> bool:
        return self.random.randrange(one_in) == one_in // 2  # no end of the range: those are drawn too often

    # Commands of users

    def purchase(self) -> tuple[str, dict[str, Any]]:
        code = self.random.choice(PRODUCTS if self.chance(4) else PRODUCTS[:2])
        country, currency, amount = self.random.choice(PRICES.get(code, PRICES["P100"]))
        if self.chance(8):
            amount = "9.00"
        if self.chance(8):
            # The row for everywhere does not count where the country has rows of its own.
            country, currency, amount = self.random.choice([("AM", "USD", "10.00"), ("DE", "AMD", "4000.00")])
        ordered = self.now - self.random.choice([0, 0, 0, 1, 60, 3 * 24 * 60]) * MINUTE
        if self.chance(10):
            ordered = self.now + self.random.choice([4, 6]) * MINUTE
        snapshot = {"country": "US" if country == "*" else country, "currency": currency, "amount": amount}
        return "Purchase.Settled", {
            "user_id": self.random.choice(USERS),
            "external_ref": self.reference(),
            "product_code": code,
            "payment_method": "card",
            "order_placed_at": wire(ordered),
            "settled_at": wire(self.now),
            "pricing_snapshot": snapshot,
        }

    def reference(self) -> str:
        """Name a payment: mostly one that is there or comes next, so that reversals meet their purchases."""
        return f"pay-{self.random.randrange(len(self.model.purchases) + 3)}"

    def sign_up(self) -> tuple[str, dict[str, Any]]:
        return "User.SignedUp", {"user_id": self.random.choice(USERS)}

    def operation(self) -> tuple[str, str]:
        """Choose a user, and an operation of his: the open one mostly, else one before or after."""
        user_id = self.random.choice(USERS)
        user = self.model.users.get(user_id)
        if user and user["open"] and not self.chance(5):
            return user_id, user["open"]
        known = sum(operation["user_id"] == user_id for operation in self.model.operations.values())
        return user_id, f"{user_id}-{self.random.randrange(known + 2)}"

    def opening(self) -> tuple[str, dict[str, Any]]:
        user_id = self.random.choice(USERS)
        known = sum(operation["user_id"] == user_id for operation in self.model.operations.values())
        number = self.random.randrange(known + 1) if self.chance(6) else known
        workflow = {"workflow_id": "w"} if self.chance(3) else {}
        members = {"user_id": user_id, "operation_id": f"{user_id}-{number}"} | workflow
        return "Operation.Open", members | {
            "operation_code": self.random.choice(TYPES if self.chance(4) else TYPES[:2])
        }

    def closing(self) -> tuple[str, dict[str, Any]]:
        user_id, operation_id = self.operation()
        unit = self.model.operations.get(operation_id, {}).get("unit", "token")
        workflow = {"workflow_id": self.random.choice(["w", "x"])} if self.chance(4) else {}
        return "Operation.RecordAndClose", workflow | {
            "user_id": self.random.choice(USERS) if self.chance(15) else user_id,
            "operation_id": operation_id,
            "resource_amount": self.random.choice(["1", "0.000001", "12.25", "40", "150.000001"]),
            "resource_unit": "page" if self.chance(10) else unit,
            "completed_at": wire(self.now),
        }

    def cancelling(self) -> tuple[str, dict[str, Any]]:
        user_id, operation_id = self.operation()
        return "Operation.Cancel", {"user_id": user_id, "operation_id": operation_id}

    # Commands of the control app

    def amount(self) -> dict[str, Any]:
        return {} if self.chance(4) else {"amount": self.random.choice(["1.00", "3.33", "3.34", "0.01", "5", "1000"])}

    def refund(self) -> tuple[str, dict[str, Any]]:
        refund_id = f"refund-{self.random.randrange(len(self.model.reversals) + 4)}"
        return "Refund.Apply", admin(refund_id=refund_id, external_ref=self.reference(), **self.amount())

    def chargeback(self) -> tuple[str, dict[str, Any]]:
        members = admin(dispute_id=self.dispute(), external_ref=self.reference(), **self.amount())
        return "Chargeback.Apply", members

    def winning(self) -> tuple[str, dict[str, Any]]:
        return "Chargeback.Reverse", admin(dispute_id=self.dispute())

    def dispute(self) -> str:
        return f"dispute-{self.random.randrange(len(self.model.reversals) + 2)}"

    def adjustment(self) -> tuple[str, dict[str, Any]]:
        delta = self.random.choice([1, 10, 60, -1, -5, -40, -200])
        key = f"adjustment-{next(self._ids)}"
        days = {"access_period_days": self.random.choice([1, 5, 30])}
        members = {"adjustment_id": key, "user_id": self.random.choice(USERS), "credits_delta": delta} | days
        return "Adjustment.Apply", admin(**members)

    def grant(self) -> tuple[str, dict[str, Any]]:
        what: dict[str, Any] = {"credits": 3, "access_period_days": 2}
        if self.chance(2):
            what = {"product_code": self.random.choice([*GRANTS, "P7", "nothing"])}
        key = f"grant-{self.random.randrange(30)}"
        return "Grant.Apply", admin(grant_id=key, user_id=self.random.choice(USERS), **what)

    def attachment(self) -> tuple[str, dict[str, Any]]:
        number = self.random.randrange(1, len(self.model.documents) + 3)
        return "Receipt.AttachFiscal", {
            "receipt_number": f"R-{self.now.year}-{number:04d}",
            "kind": "sale",
            "fiscal_number": str(self.random.randrange(3)),
            "authority": "SRC",
            "fiscal_at": wire(self.now),
            "actor": "admin",
        }

    def locking(self) -> tuple[str, dict[str, Any]]:
        user_id = self.random.choice(USERS)
        if self.chance(2):
            return "Account.Unlock", admin(user_id=user_id)
        until = {"until": wire(self.now + self.random.choice([-10, 10, 600]) * MINUTE)} if self.chance(2) else {}
        return "Account.Lock", admin(user_id=user_id, **until)

    def role(self) -> tuple[str, dict[str, Any]]:
        kind = self.random.choice(["UserRole.Assign", "UserRole.Revoke"])
        subject, role = self.random.choice(["sona", "tigran"]), self.random.choice(["support", "admin"])
        return kind, {"subject": subject, "role": role, "actor": "admin"}

    def erasure(self) -> tuple[str, dict[str, Any]]:
        return "User.Erase", admin(request_id=f"erase-{self.random.randrange(3)}", user_id=self.random.choice(USERS))

    def configuration(self) -> tuple[str, dict[str, Any]]:
        choose = self.random.choice
        config = self.config | {
            "operation_timeout_minutes": choose([15, 60]),
            "late_close": choose(["refuse", "debit"]),
            "refund_policy": {"shortfall": choose(["debit", "forgive"])},
            "chargeback_policy": {
                "shortfall": choose(["debit", "forgive"]),
                "credit_note": choose(["never", "on_apply"]),
            },
        }
        expected = {"expected_version": self.model.version + choose([0, 0, 1])} if self.chance(2) else {}
        return "Merchant.Configure", expected | {"config": config, "actor": "admin"}

    # The catalogue

    def moment(self, name: str) -> dict[str, Any]:
        minutes = self.random.choice([None, None, None, -1, -6, 10, 24 * 60, 60 * 24 * 60])
        return {} if minutes is None else {name: wire(self.now + minutes * MINUTE)}

    def start_of(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Name a row by its start, sometimes."""
        return {"effective_at": wire(self.random.choice(rows)["start"])} if rows and self.chance(2) else {}

    def catalogue(self) -> tuple[str, dict[str, Any]]:
        kinds = (self.new_product, self.old_product, self.new_price, self.old_price, self.new_type, self.old_type)
        return self.random.choice((*kinds, self.new_type, self.old_type))()

    def new_product(self) -> tuple[str, dict[str, Any]]:
        prices = [{"country": c, "currency": k, "amount": a} for c, k, a in PRICES["P100"]]
        code = self.random.choice(PRODUCTS[2:])
        return "Product.Create", sellable(code, 50, 5, prices) | self.moment("effective_at")

    def old_product(self) -> tuple[str, dict[str, Any]]:
        code = self.random.choice([*PRODUCTS[1:], "W5", "nothing"])
        return "Product.Archive", {"product_code": code, "actor": "admin"} | self.moment("archived_at")

    def price(self) -> dict[str, Any]:
        country, currency, amount = self.random.choice(PRICES["P100"][2:])
        code = self.random.choice(["P100", "P100", "PX", "W5"])
        return {"product_code": code, "country": country, "currency": currency, "amount": amount, "actor": "admin"}

    def new_price(self) -> tuple[str, dict[str, Any]]:
        return "ProductPrice.Create", self.price() | self.moment("effective_at")

    def old_price(self) -> tuple[str, dict[str, Any]]:
        members = {name: value for name, value in self.price().items() if name != "amount"}
        names = {"product": members["product_code"], "country": members["country"], "currency": members["currency"]}
        rows = [row for row in self.model.catalogue.prices if names.items() <= row.items()]
        return "ProductPrice.Archive", members | self.start_of(rows) | self.moment("archived_at")

    def new_type(self) -> tuple[str, dict[str, Any]]:
        rate, minimum = self.random.choice([("0.5", 1), ("1.333333", 1), ("2", 7)])
        members = version(self.random.choice(TYPES), "token", rate, minimum) | self.moment("effective_at")
        return "OperationType.CreateWithArchival", members

    def old_type(self) -> tuple[str, dict[str, Any]]:
        code = self.random.choice(TYPES)
        rows = [row for row in self.model.catalogue.types if row["code"] == code]
        members = {"operation_code": code, "actor": "admin"}
        return "OperationType.Archive", members | self.start_of(rows) | self.moment("archived_at")

    # Jobs

    def job(self) -> tuple[str, dict[str, Any]]:
        return self.random.choice([self.lot_expiry, self.lot_expiry, self.operation_expiry, self.resolution])()

    def lot_expiry(self) -> tuple[str, dict[str, Any]]:
        users = [user for user in self.model.users.values() if user["lots"]]
        if not users:
            return "Lot.Expire", {"user_id": "ani", "lot_id": "nothing"}
        user = self.random.choice(users)
        lot_id = self.model.name_entry(user["id"], self.random.choice(user["lots"])["seq"])
        return "Lot.Expire", {"user_id": self.random.choice(USERS) if self.chance(9) else user["id"], "lot_id": lot_id}

    def operation_expiry(self) -> tuple[str, dict[str, Any]]:
        user_id, operation_id = self.operation()
        return "Operation.Expire", {"user_id": user_id, "operation_id": operation_id}

    def resolution(self) -> tuple[str, dict[str, Any]]:
        waiting = self.model.parked
        known = [w["of"] for w in waiting] or [(SOURCE, "nothing")]
        source, id_ = self.random.choice(known)
        return "Command.Resolve", {"source": source, "id": id_}


def by_answer(results: Iterable[dict[str, Any]]) -> dict[Any, list[dict[str, Any]]]:
    """Group results by the message and by whether it is its own or that of another content under the same identity.

    The order of the two is left open: what waits for a receipt of its batch is answered after a conflict with it.
    """
    found: dict[Any, list[dict[str, Any]]] = {}
    for result in results:
        of = result.get("of") or (result["command_source"], result["command_id"])
        code = result.get("code") or result.get("error", {}).get("code")
        found.setdefault((*of, code == "idempotency_conflict"), []).append(result)
    return found


def compare(expected: dict[str, Any], found: dict[str, Any]) -> None:
    """Compare a result of the model with one that was published."""
    assert found["outcome"] == expected["outcome"], (expected, found)
    assert found.get("error", {}).get("code") == expected.get("code"), (expected, found)
    # Nothing moved by a conflict; whether its result shows the account's figures is left open.
    for name in ("user_seq", "balance", "debt") if expected.get("code") != "idempotency_conflict" else ():
        assert found.get(name) == expected.get(name), (name, expected, found)
    if "replay_of" in expected or "replay_of" in found:
        of = found["replay_of"]
        assert (of["command_source"], of["command_id"]) == expected["replay_of"]
    assert found.get("time_effects", {}) == expected.get("time_effects", {}), (expected, found)
    if expected.get("applied_at") is not None:
        assert datetime.fromisoformat(found["applied_at"]) == expected["applied_at"], (expected, found)
    compare_effects(expected["effects"], found["effects"])


def compare_effects(expected: dict[str, Any], found: dict[str, Any]) -> None:
    for name, value in expected.items():
        assert name in found, (expected, found)
        if isinstance(value, datetime):
            assert datetime.fromisoformat(found[name]) == value, (name, expected, found)
        elif isinstance(value, list | dict | int | str):
            assert found[name] == value, (name, expected, found)
        else:
            assert type(value)(found[name]) == value, (name, expected, found)
    for name in ("entry_id", "lot_id", "credit_note_number", "archived_at"):
        assert (name in expected) == (name in found), (name, expected, found)
