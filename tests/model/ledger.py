"""The model's ledger: users with entries, lots and allocations; operations; purchases; delivery."""

import math
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any
from zoneinfo import ZoneInfo

from tests.model.catalogue import Catalogue, Refused, time

MINOR_UNITS = {"USD": 2, "EUR": 2, "AMD": 2, "JPY": 0, "KWD": 3}
KEYS = {
    "Purchase.Settled": ("external_ref",),
    "User.SignedUp": ("user_id",),
    "Operation.Open": ("operation_id",),
    "Operation.RecordAndClose": ("operation_id",),
    "Operation.Cancel": ("operation_id",),
    "Grant.Apply": ("grant_id",),
    "Adjustment.Apply": ("adjustment_id",),
    "Refund.Apply": ("refund_id",),
    "Chargeback.Apply": ("dispute_id",),
    "Chargeback.Reverse": ("dispute_id",),
    "Product.Create": ("product_code",),
    "User.Erase": ("request_id",),
    "Receipt.AttachFiscal": ("receipt_number", "kind", "fiscal_number"),
}
WAITS = {
    "Operation.RecordAndClose": ("operation", "operation_id"),
    "Operation.Cancel": ("operation", "operation_id"),
    "Refund.Apply": ("purchase", "external_ref"),
    "Chargeback.Apply": ("purchase", "external_ref"),
    "Chargeback.Reverse": ("dispute", "dispute_id"),
    "Receipt.AttachFiscal": ("receipt", "receipt_number"),
}
ALLOWS = {
    "Operation.Open": ("operation", "operation_id"),
    "Purchase.Settled": ("purchase", "external_ref"),
    "Chargeback.Apply": ("dispute", "dispute_id"),
}
DECIMALS = {"amount", "resource_amount", "credits_per_unit", "rate"}

Dict = dict[str, Any]


def content(value: Any, name: str = "") -> Any:
    """Reduce a payload to what counts: no nulls and defaults, numbers and times by value."""
    if isinstance(value, Mapping):
        members = {key: content(member, key) for key, member in value.items() if member not in (None, [])}
        return {key: member for key, member in members.items() if (key, member) != ("minimum_charge", 1)}
    if isinstance(value, list):
        return [content(member) for member in value]
    if name in DECIMALS:
        return Fraction(value)
    if name.endswith("_at") or name == "until":
        return time(value)
    return value


class Ledger:
    """``name_entry(user_id, seq)`` is how entries and lots are called on the wire."""

    def __init__(self, config: Dict, name_entry: Callable[[str, int], str]) -> None:
        self.config, self.version = config, 1
        self.name_entry = name_entry
        self.catalogue = Catalogue()
        self.users: dict[str, Dict] = {}
        self.operations: dict[str, Dict] = {}
        self.purchases: dict[str, Dict] = {}
        self.reversals: list[Dict] = []
        self.roles: dict[str, str] = {}
        self.series: dict[str, list[int]] = {}
        self.documents: list[Dict] = []
        self.seen: dict[Any, Dict] = {}
        self.keys: dict[Any, Dict] = {}
        self.parked: list[Dict] = []
        self.now = datetime.min

    # Delivery

    def deliver(self, message: Dict, now: datetime) -> list[Dict]:
        """Take one message at ``now``; returns all results this brings, each with ``of``: (source, id)."""
        self.now = now
        kind, payload = message["type"], content(message["payload"])
        case = {
            "of": (message["source"], message["id"]),
            "type": kind,
            "payload": message["payload"],
            "content": payload,
            "record_time": message.get("record_time", now),
            "key": (kind, *(payload[name] for name in KEYS[kind])) if kind in KEYS else None,
            "deliveries": 1,
            "result": None,
        }
        seen = self.seen.get(case["of"])
        if seen is not None and (seen["type"], seen["content"]) != (kind, payload):
            return [self._answer(case, {"outcome": "rejected", "code": "idempotency_conflict", "effects": {}})]
        if seen is not None:
            if seen["result"] is None:
                seen["deliveries"] += 1
                return []
            return [seen["result"]]
        self.seen[case["of"]] = case
        first = self.keys.get(case["key"])
        if first is not None:
            return [self._repeat(case, first)]
        user = self.users.get(self._user_of(kind, payload) or "") if "user_id" in payload else None
        is_erased = user is not None and user["erased"]
        if kind in WAITS and not is_erased and not self._there(*self._waits_for(case)):
            user_id = payload.get("user_id")
            self.parked.append(case | {"since": now, "case": case, "user_id": user_id})
            return []
        results = [self._decide(case)]
        if case["result"]["outcome"] == "applied" and kind == "Command.Resolve":
            results += self._resolved
        return results + self._release_after(case)

    def _answer(self, case: Dict, result: Dict) -> Dict:
        answered: Dict = result | {"of": case["of"]}
        case["result"] = answered
        return answered

    def _repeat(self, case: Dict, first: Dict) -> Dict:
        if first["content"] != case["content"]:
            return self._answer(case, {"outcome": "rejected", "code": "idempotency_conflict", "effects": {}})
        kept = ("outcome", "code", "effects", "user_seq", "balance", "debt", "applied_at")
        result = {name: first["result"][name] for name in kept if name in first["result"]}
        return self._answer(case, result | {"replay_of": first["of"]})

    def _waits_for(self, case: Dict) -> tuple[str, str]:
        kind, member = WAITS[case["type"]]
        return kind, case["payload"][member]

    def _there(self, kind: str, key: str) -> bool:
        found = {
            "operation": self.operations.keys(),
            "purchase": self.purchases.keys(),
            "dispute": {r["key"] for r in self.reversals if r["kind"] == "chargeback"},
            "receipt": {d["number"] for d in self.documents},
        }
        return key in found[kind]

    def _release_after(self, case: Dict) -> list[Dict]:
        applied = case["result"]["outcome"] == "applied"
        if case["type"] == "User.Erase" and applied:
            return self._release(lambda waiting: waiting["user_id"] == case["payload"]["user_id"])
        results = []
        if case["type"] in ALLOWS and (applied or case["type"] == "Operation.Open"):
            kind, member = ALLOWS[case["type"]]
            target = (kind, case["payload"][member])
            results = self._release(lambda waiting: self._waits_for(waiting) == target)
        numbers = {document["number"] for document in self.documents}
        return results + self._release(
            lambda w: w["type"] == "Receipt.AttachFiscal" and self._waits_for(w)[1] in numbers
        )

    def _release(self, chosen: Callable[[Dict], bool]) -> list[Dict]:
        results: list[Dict] = []
        for waiting in [w for w in self.parked if chosen(w)]:
            if waiting in self.parked:
                self.parked.remove(waiting)
                results += self._decide_parked(waiting["case"])
        return results

    def _decide_parked(self, case: Dict) -> list[Dict]:
        first = self.keys.get(case["key"])
        result = self._repeat(case, first) if first is not None else self._decide(case)
        released = self._release_after(case) if first is None else []
        return [result] * case["deliveries"] + released

    # Deciding

    def _decide(self, case: Dict) -> Dict:
        payload, kind = case["payload"], case["type"]
        user_id = self._user_of(kind, payload)
        user = self.users.get(user_id) if user_id is not None else None
        passed = self._let_time_pass(user, kind) if user else {}
        if kind == "Operation.Open":
            # Until it is applied; a refusal is final, whatever the reason.
            refused = {"user_id": payload["user_id"], "state": "refused", "code": payload["operation_code"]}
            self.operations[payload["operation_id"]] = refused
        try:
            if user and user["erased"] and "user_id" in payload and kind not in ("Lot.Expire", "Operation.Expire"):
                raise Refused("account_erased")
            effects = getattr(self, HANDLERS[kind])(payload, case)
            result: Dict = {"outcome": "applied", "effects": effects}
        except Refused as refusal:
            result = {"outcome": "rejected", "code": refusal.code, "effects": {}}
        if case["key"] is not None and (result["outcome"] == "applied" or kind == "Operation.Open"):
            self.keys[case["key"]] = case
        if passed and kind == "Lot.Expire" and result["outcome"] == "applied":
            # What the job was for is told by its effects.
            passed["expired"] = [lot for lot in passed.get("expired", []) if lot["lot_id"] != payload["lot_id"]]
        passed = {name: value for name, value in passed.items() if value}
        if passed:
            result["time_effects"] = passed
        return self._answer(case, result | self._figures(user_id) | {"applied_at": self.now})

    def _user_of(self, kind: str, payload: Dict) -> str | None:
        if kind in ("Refund.Apply", "Chargeback.Apply"):
            return str(self.purchases[payload["external_ref"]]["user_id"])
        if kind == "Chargeback.Reverse":
            return str(self._dispute(payload["dispute_id"])["user_id"])
        user_id = payload.get("user_id")
        known = (name for name, user in self.users.items() if user["tombstone"] == user_id)
        return next(known, user_id) if user_id is not None else None

    def _figures(self, user_id: str | None) -> Dict:
        user = self.users.get(user_id) if user_id is not None else None
        if user is None:
            return {}
        return {"user_seq": len(user["entries"]), "balance": self.balance(user), "debt": self.debt(user)}

    def _user(self, user_id: str) -> Dict:
        fresh: Dict = {"id": user_id, "entries": [], "lots": [], "allocations": [], "open": None}
        return self.users.setdefault(
            user_id, fresh | {"locked": False, "until": None, "erased": False, "tombstone": ""}
        )

    # Credits: everything is computed from entries, lots and allocations

    def balance(self, user: Dict) -> int:
        return sum(int(entry["amount"]) for entry in user["entries"])

    def debt(self, user: Dict) -> int:
        return sum(self.uncovered(user, entry) for entry in user["entries"] if entry["amount"] < 0)

    def uncovered(self, user: Dict, entry: Dict) -> int:
        return -int(entry["amount"]) - sum(int(a["credits"]) for a in user["allocations"] if a["entry"] == entry["seq"])

    def remaining(self, user: Dict, lot: Dict) -> int:
        return int(lot["credits"]) - sum(int(a["credits"]) for a in user["allocations"] if a["lot"] == lot["seq"])

    def _entry(self, user: Dict, amount: int, reason: str, **context: Any) -> Dict:
        entry = {"seq": len(user["entries"]) + 1, "amount": amount, "reason": reason, "at": self.now} | context
        user["entries"].append(entry)
        return entry

    def _credit(self, user: Dict, credits: int, reason: str, expires: datetime, **terms: Any) -> Dict:
        seq = self._entry(user, credits, reason)["seq"]
        lot = {"seq": seq, "credits": credits, "expires": expires, "purchase": None, "expired": None} | terms
        user["lots"].append(lot)
        for entry in user["entries"]:
            if entry["amount"] < 0:
                self._allocate(user, entry, lot, self.uncovered(user, entry), seq)
        return lot

    def _debit(self, user: Dict, credits: int, reason: str, first: list[Dict], **context: Any) -> int:
        entry = self._entry(user, -credits, reason, **context)
        usable = [lot for lot in user["lots"] if lot["expires"] > self.now and lot not in first]
        for lot in [*first, *usable]:
            self._allocate(user, entry, lot, self.uncovered(user, entry), entry["seq"])
        return int(entry["seq"])

    def _allocate(self, user: Dict, entry: Dict, lot: Dict, wanted: int, at: int) -> None:
        credits = min(wanted, self.remaining(user, lot))
        if credits:
            user["allocations"].append({"entry": entry["seq"], "lot": lot["seq"], "at": at, "credits": credits})

    def _lot_shown(self, user: Dict, lot: Dict) -> Dict:
        name = self.name_entry(user["id"], lot["seq"])
        return {"lot_id": name, "entry_id": name, "credits": lot["credits"]}

    def _days(self, count: int) -> datetime:
        return self.now + timedelta(hours=24 * count)

    def _let_time_pass(self, user: Dict, kind: str) -> Dict:
        effects: Dict = {"expired": [], "timed_out": []}
        for lot in sorted(user["lots"], key=lambda lot: (lot["expires"], lot["seq"])):
            left = self.remaining(user, lot)
            if lot["expires"] <= self.now and left:
                seq = self._debit(user, left, "expiry", [lot], effective=lot["expires"])
                lot["expired"] = (seq, left)
                names = self.name_entry(user["id"], lot["seq"]), self.name_entry(user["id"], seq)
                effects["expired"].append({"lot_id": names[0], "entry_id": names[1], "credits": left})
        if kind == "Operation.Open" and user["open"] and self.operations[user["open"]]["expires"] <= self.now:
            effects["timed_out"].append(user["open"])
            self._end(user["open"], "timed_out")
        return effects

    # Purchases and reversals

    def purchase(self, p: Dict, case: Dict) -> Dict:
        placed, snapshot = time(p["order_placed_at"]), p["pricing_snapshot"]
        assert placed is not None
        if placed > self.now + timedelta(minutes=5):
            raise Refused("malformed")
        placed = min(placed, self.now)
        product = self.catalogue.for_sale(p["product_code"], placed)
        amount = self.catalogue.price(p["product_code"], snapshot["country"], snapshot["currency"], placed)
        if amount != Decimal(snapshot["amount"]):
            raise Refused("price_mismatch")
        user, expires = self._user(p["user_id"]), self._days(product["days"])
        lot = self._credit(user, product["credits"], "purchase", expires, purchase=p["external_ref"])
        bought = {
            "user_id": p["user_id"],
            "lot": lot,
            "lots": [lot],
            "amount": amount,
            "currency": snapshot["currency"],
        }
        self.purchases[p["external_ref"]] = bought
        number = self._document("receipt", amount, p["external_ref"])
        return self._lot_shown(user, lot) | {"expires_at": expires, "receipt_number": number}

    def _document(self, kind: str, amount: Decimal, external_ref: str) -> str:
        prefix = self.config["receipt_series_prefix" if kind == "receipt" else "credit_note_series_prefix"]
        series = self.series.setdefault(prefix, [0, 0])
        year = max(self.now.astimezone(ZoneInfo(self.config["time_zone"])).year, series[0])
        series[:] = [year, series[1] + 1 if year == series[0] else 1]
        number = f"{prefix}-{year}-{series[1]:04d}"
        self.documents.append({"number": number, "kind": kind, "amount": amount, "external_ref": external_ref})
        return number

    def refund(self, p: Dict, case: Dict) -> Dict:
        return self._reverse("refund", p["refund_id"], p, self.config["refund_policy"]["shortfall"], True)

    def chargeback(self, p: Dict, case: Dict) -> Dict:
        policy = self.config["chargeback_policy"]
        return self._reverse("chargeback", p["dispute_id"], p, policy["shortfall"], policy["credit_note"] == "on_apply")

    def _reverse(self, kind: str, key: str, p: Dict, shortfall: str, with_note: bool) -> Dict:
        bought = self.purchases[p["external_ref"]]
        user, whole = self.users[bought["user_id"]], bought["amount"]
        standing = [r for r in self.reversals if r["of"] == p["external_ref"] and not r["won"]]
        left = whole - sum(r["amount"] for r in standing)
        amount = Decimal(p["amount"]) if p.get("amount") is not None else left
        if amount != round(amount, MINOR_UNITS[bought["currency"]]):
            raise Refused("malformed")
        if left <= 0:
            raise Refused("already_reversed")
        if amount > left:
            raise Refused("amount_exceeds_purchase")
        share = math.floor(Fraction(bought["lot"]["credits"]) * Fraction(whole - left + amount) / Fraction(whole))
        expired = sum(lot["expired"][1] for lot in bought["lots"] if lot["expired"])
        due = max(0, share - sum(r["due"] for r in standing) - expired)
        own = sum(self.remaining(user, lot) for lot in bought["lots"])
        taken = min(due, own) if shortfall == "forgive" else due
        effects: Dict = {"credits_taken": taken, "credits_due": due}
        if taken:
            effects["entry_id"] = self.name_entry(user["id"], self._debit(user, taken, kind, bought["lots"]))
        if with_note:
            effects["credit_note_number"] = self._document("credit_note", amount, p["external_ref"])
        reversal = {"kind": kind, "key": key, "of": p["external_ref"], "user_id": user["id"], "amount": amount}
        self.reversals.append(reversal | {"due": due, "taken": taken, "at": self.now, "won": False, "note": with_note})
        return effects

    def _dispute(self, key: str) -> Dict:
        return next(r for r in self.reversals if (r["kind"], r["key"]) == ("chargeback", key))

    def win(self, p: Dict, case: Dict) -> Dict:
        dispute = self._dispute(p["dispute_id"])
        if dispute["won"]:
            raise Refused("already_reversed")
        bought, user = self.purchases[dispute["of"]], self.users[dispute["user_id"]]
        dispute["won"] = True
        effects: Dict = {"credits": dispute["taken"]}
        if dispute["taken"]:
            access = max(bought["lot"]["expires"] - dispute["at"], self.now - dispute["at"])
            expires = self.now + max(access, timedelta(microseconds=1))
            lot = self._credit(user, dispute["taken"], "chargeback", expires, purchase=dispute["of"])
            bought["lots"].append(lot)
            effects = self._lot_shown(user, lot)
        if dispute["note"]:
            self._document("correction", dispute["amount"], dispute["of"])
        return effects

    # Grants and adjustments

    def sign_up(self, p: Dict, case: Dict) -> Dict:
        user, grants = self._user(p["user_id"]), []
        for product in self.catalogue.welcome(self.now):
            lot = self._credit(user, product["credits"], "welcome", self._days(product["days"]))
            grants.append({"product_code": product["code"]} | self._lot_shown(user, lot))
        return {"grants": grants}

    def grant(self, p: Dict, case: Dict) -> Dict:
        credits, days = p.get("credits"), p.get("access_period_days")
        if p.get("product_code") is not None:
            product = self.catalogue.product(p["product_code"])
            if product["grant_policy"] != "manual_grant":
                raise Refused("unknown_product")
            if not self.catalogue.product(p["product_code"])["start"] <= self.now or (
                product["end"] is not None and product["end"] <= self.now
            ):
                raise Refused("product_not_active")
            credits, days = product["credits"], product["days"]
        assert credits is not None
        assert days is not None
        user = self._user(p["user_id"])
        return self._lot_shown(user, self._credit(user, credits, "promo", self._days(days)))

    def adjust(self, p: Dict, case: Dict) -> Dict:
        user, delta = self._user(p["user_id"]), p["credits_delta"]
        if delta > 0:
            lot = self._credit(user, delta, "adjustment", self._days(p["access_period_days"]))
            return self._lot_shown(user, lot)
        seq = self._debit(user, -delta, "adjustment", [])
        return {"entry_id": self.name_entry(user["id"], seq), "credits": -delta}

    # Operations

    def open(self, p: Dict, case: Dict) -> Dict:
        rate = self.catalogue.rate(p["operation_code"], self.now)
        user = self.users.get(p["user_id"])
        if user and user["locked"] and (user["until"] is None or self.now < user["until"]):
            raise Refused("account_locked")
        if user and user["open"]:
            raise Refused("operation_already_open")
        if user and self.balance(user) < 0:
            raise Refused("insufficient_balance")
        self._user(p["user_id"])["open"] = p["operation_id"]
        expires = self.now + timedelta(minutes=self.config["operation_timeout_minutes"])
        captured = {name: rate[name] for name in ("unit", "rate", "minimum")}
        self.operations[p["operation_id"]] |= captured | {
            "state": "open",
            "expires": expires,
            "workflow_id": p.get("workflow_id"),
        }
        shown = {"operation_id": p["operation_id"], "expires_at": expires, "resource_unit": rate["unit"]}
        return shown | {"credits_per_unit": rate["rate"]}

    def _end(self, operation_id: str, state: str) -> None:
        operation = self.operations[operation_id]
        operation["state"] = state
        user = self.users[operation["user_id"]]
        if user["open"] == operation_id:
            user["open"] = None

    def _to_end(self, p: Dict) -> Dict:
        operation = self.operations[p["operation_id"]]
        if operation["user_id"] != p["user_id"]:
            raise Refused("operation_not_found")
        if operation["state"] not in ("open", "timed_out"):
            raise Refused("operation_not_open")
        return operation

    def close(self, p: Dict, case: Dict) -> Dict:
        operation = self._to_end(p)
        in_time = case["record_time"] <= operation["expires"]
        if operation["state"] == "timed_out" and not in_time and self.config["late_close"] == "refuse":
            raise Refused("operation_timed_out")
        if p["resource_unit"] != operation["unit"]:
            raise Refused("resource_unit_mismatch")
        workflows = [w for w in (operation["workflow_id"], p.get("workflow_id")) if w is not None]
        if len(set(workflows)) > 1:
            raise Refused("workflow_mismatch")
        cost = Fraction(p["resource_amount"]) * Fraction(operation["rate"])
        credits = max(operation["minimum"], math.ceil(cost))
        user = self.users[p["user_id"]]
        seq = self._debit(user, credits, "debit", [], operation=p["operation_id"], workflow=(workflows or [None])[0])
        self._end(p["operation_id"], "closed")
        return {"operation_id": p["operation_id"], "entry_id": self.name_entry(user["id"], seq), "credits": credits}

    def cancel(self, p: Dict, case: Dict) -> Dict:
        if self._to_end(p)["state"] == "timed_out":
            raise Refused("operation_timed_out")
        self._end(p["operation_id"], "cancelled")
        return {"operation_id": p["operation_id"]}

    # Accounts, configuration, roles

    def lock(self, p: Dict, case: Dict) -> Dict:
        until = time(p.get("until"))
        if until is not None and until <= self.now:
            raise Refused("effective_in_past")
        self._user(p["user_id"]).update(locked=True, until=until)
        return {"locked": True}

    def unlock(self, p: Dict, case: Dict) -> Dict:
        if p["user_id"] in self.users:
            self.users[p["user_id"]].update(locked=False, until=None)
        return {"locked": False}

    def erase(self, p: Dict, case: Dict) -> Dict:
        self._user(p["user_id"])["erased"] = True
        self.roles.pop(p["user_id"], None)
        return {}

    def configure(self, p: Dict, case: Dict) -> Dict:
        if p.get("expected_version") not in (None, self.version):
            raise Refused("version_conflict")
        if p["config"] != self.config:
            self.config, self.version = p["config"], self.version + 1
        return {"version": self.version}

    def assign(self, p: Dict, case: Dict) -> Dict:
        self.roles[p["subject"]] = p["role"]
        return {"role": p["role"]}

    def revoke(self, p: Dict, case: Dict) -> Dict:
        if self.roles.get(p["subject"]) == p["role"]:
            del self.roles[p["subject"]]
        return {}

    def attach(self, p: Dict, case: Dict) -> Dict:
        return {name: p[name] for name in ("receipt_number", "kind", "fiscal_number")}

    # Catalogue

    def change_catalogue(self, p: Dict, case: Dict) -> Dict:
        change = {
            "Product.Create": self.catalogue.create_product,
            "Product.Archive": self.catalogue.archive_product,
            "ProductPrice.Create": self.catalogue.create_price,
            "ProductPrice.Archive": self.catalogue.archive_price,
            "OperationType.CreateWithArchival": self.catalogue.create_type,
            "OperationType.Archive": self.catalogue.archive_type,
        }[case["type"]]
        row = change(p, self.now)
        ends = {} if row["end"] is None else {"archived_at": row["end"]}
        return {"effective_at": row["start"]} | ends

    # Jobs

    def expire_lot(self, p: Dict, case: Dict) -> Dict:
        user_id = self._user_of("Lot.Expire", p)
        user = self.users.get(user_id) if user_id is not None else None
        for lot in user["lots"] if user else []:
            if user and self.name_entry(user["id"], lot["seq"]) == p["lot_id"]:
                if lot["expires"] > self.now:
                    raise Refused("not_due")
                shown = {"lot_id": p["lot_id"], "credits": lot["expired"][1] if lot["expired"] else 0}
                return shown | ({"entry_id": self.name_entry(user["id"], lot["expired"][0])} if lot["expired"] else {})
        raise Refused("unknown_lot")

    def expire_operation(self, p: Dict, case: Dict) -> Dict:
        operation = self.operations.get(p["operation_id"])
        if operation is None or operation["user_id"] != self._user_of("Operation.Expire", p):
            raise Refused("operation_not_found")
        if operation["state"] == "open" and operation["expires"] > self.now:
            raise Refused("not_due")
        if operation["state"] not in ("open", "timed_out"):
            raise Refused("operation_not_open")
        self._end(p["operation_id"], "timed_out")
        return {"operation_id": p["operation_id"]}

    def resolve(self, p: Dict, case: Dict) -> Dict:
        self._resolved: list[Dict] = []
        names = (p["source"], p["id"])
        waiting = next((w for w in self.parked if w["of"] == names), None)
        found = self.seen.get(names)
        if waiting is not None and found is not None:
            kind, _ = self._waits_for(waiting)
            patience = timedelta(minutes=15) if kind in ("operation", "receipt") else timedelta(days=7)
            if waiting["since"] + patience > self.now:
                raise Refused("not_due")
            self.parked.remove(waiting)
            user_id = waiting["user_id"]
            user = self.users.get(user_id)
            passed = self._let_time_pass(user, waiting["type"]) if user else {}
            passed = {name: value for name, value in passed.items() if value}
            refused: Dict = {"outcome": "rejected", "code": "dependency_timeout", "effects": {}, "applied_at": self.now}
            refused |= {"time_effects": passed} if passed else {}
            result = self._answer(found, refused | self._figures(user_id))
            self._resolved = [result] * found["deliveries"]
        if found is None or found["result"] is None:
            raise Refused("not_due")
        return {"outcome": found["result"]["outcome"]}


HANDLERS = {
    "Purchase.Settled": "purchase",
    "User.SignedUp": "sign_up",
    "Operation.Open": "open",
    "Operation.RecordAndClose": "close",
    "Operation.Cancel": "cancel",
    "Grant.Apply": "grant",
    "Adjustment.Apply": "adjust",
    "Refund.Apply": "refund",
    "Chargeback.Apply": "chargeback",
    "Chargeback.Reverse": "win",
    "Product.Create": "change_catalogue",
    "Product.Archive": "change_catalogue",
    "ProductPrice.Create": "change_catalogue",
    "ProductPrice.Archive": "change_catalogue",
    "OperationType.CreateWithArchival": "change_catalogue",
    "OperationType.Archive": "change_catalogue",
    "Merchant.Configure": "configure",
    "UserRole.Assign": "assign",
    "UserRole.Revoke": "revoke",
    "Account.Lock": "lock",
    "Account.Unlock": "unlock",
    "User.Erase": "erase",
    "Receipt.AttachFiscal": "attach",
    "Lot.Expire": "expire_lot",
    "Operation.Expire": "expire_operation",
    "Command.Resolve": "resolve",
}
