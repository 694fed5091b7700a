"""The core against the reference model: the same traffic into both, the same results and state out of both."""

import os
import random
from datetime import timedelta
from typing import Any

from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from tests.core import Core, config
from tests.model.ledger import Ledger
from tests.model.traffic import WAITS, Traffic, by_answer, compare, first_catalogue

STEPS = int(os.environ.get("HYPOTHESIS_STEPS", "2000"))
STEPS_A_HISTORY = 50
SEED = int(os.environ.get("HYPOTHESIS_SEED", random.SystemRandom().randrange(2**32)))


class CoreAndModel(RuleBasedStateMachine):
    """Sends the same batches to the core and to the model."""

    def __init__(self) -> None:
        super().__init__()
        self.core = Core(config())
        self.model = Ledger(config(), self.core.name_entry)
        self.traffic = Traffic(self.model, config())

    @initialize()
    def begin(self) -> None:
        self.traffic.now = self.core.now
        self.traffic.random = random.Random(0)
        self.send([self.traffic.message(*command) for command in first_catalogue()])

    @rule(chosen=st.randoms(use_true_random=False), size=st.integers(1, 4), wait=st.sampled_from(WAITS))
    def batch(self, chosen: random.Random, size: int, wait: int) -> None:
        self.core.wait(seconds=wait, milliseconds=1)
        self.send(self.traffic.batch(chosen, self.core.now, size))

    @rule(chosen=st.randoms(use_true_random=False), size=st.integers(1, 4))
    def batch_when_something_is_due(self, chosen: random.Random, size: int) -> None:
        """Wait for the very instant at which a lot expires or an operation times out."""
        lots = [lot["expires"] for user in self.model.users.values() for lot in user["lots"]]
        operations = [o["expires"] for o in self.model.operations.values() if o["state"] == "open"]
        due = sorted(at for at in (*lots, *operations) if at > self.core.now)
        if due:
            self.core.now = due[0]
            self.send(self.traffic.batch(chosen, self.core.now, size))

    def send(self, messages: list[dict[str, Any]]) -> None:
        for message in messages:
            message.setdefault("record_time", self.core.now - message.get("late_by", timedelta(0)))
        expected = by_answer(result for message in messages for result in self.model.deliver(message, self.core.now))
        found = by_answer(self.core.batch(messages))
        assert found.keys() == expected.keys()
        for which, results in expected.items():
            assert len(found[which]) == len(results), which
            for wanted, result in zip(results, found[which], strict=True):
                compare(wanted, result)
        self.compare_state()

    def compare_state(self) -> None:
        core, model = self.core, self.model
        assert {core.account_id(name) for name in model.users} == core.books.accounts.keys()
        for name, user in model.users.items():
            compare_user(core, model, name, user)
        states = {key: operation["state"] for key, operation in model.operations.items()}
        assert {key: operation.state for key, operation in core.books.operations.items()} == states
        assert [document["number"] for document in model.documents] == [d.number for d in core.documents]
        assert {core.account_id(name): role for name, role in model.roles.items()} == core.roles
        assert (model.version, len(model.parked)) == (core.config_version, len(core.parked))
        check_documents(core)


def compare_user(core: Core, model: Ledger, name: str, user: dict[str, Any]) -> None:
    account = core.account(name)
    user["tombstone"] = account.user_id if user["erased"] else ""
    assert (account.balance, account.debt, account.open_operation) == (
        model.balance(user),
        model.debt(user),
        user["open"],
    )
    assert (account.erased_at is not None) == user["erased"]
    told = [(e.amount, e.reason, e.created_at, e.effective_at) for e in core.history(name)]
    assert told == [(e["amount"], e["reason"], e["at"], e.get("effective", e["at"])) for e in user["entries"]]
    lots = [(lot.user_seq, lot.credits, lot.remaining, lot.expires_at, lot.purchase) for lot in core.lots(name)]
    assert lots == [
        (lot["seq"], lot["credits"], model.remaining(user, lot), lot["expires"], lot["purchase"])
        for lot in user["lots"]
    ]
    found = {(a.entry_seq, a.lot_seq, a.at_seq, a.credits) for a in core.allocations.get(core.account_id(name), [])}
    assert found == {(a["entry"], a["lot"], a["at"], a["credits"]) for a in user["allocations"]}


def check_documents(core: Core) -> None:
    """One receipt a purchase and none else; credit notes never above the receipt; no user's id in any body."""
    receipts = [document.external_ref for document in core.documents if document.kind == "receipt"]
    assert sorted(receipts) == sorted(core.books.purchases)
    for row in core.inbox.values():
        assert not any(f'"{name}"' in (row.result or "") for name in ("ani", "bardo", "care"))


def test_the_core_and_the_model_agree_on_every_result_and_all_state() -> None:
    print(f"HYPOTHESIS_SEED={SEED} HYPOTHESIS_STEPS={STEPS}")
    run_state_machine_as_test(
        seed(SEED)(CoreAndModel),
        settings=settings(
            max_examples=max(1, STEPS // STEPS_A_HISTORY),
            stateful_step_count=STEPS_A_HISTORY,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
