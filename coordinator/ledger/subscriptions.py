"""What clients have subscribed to, filed by topic, and the notifications that follow from what the bank does.

Account, program, logs, signature, slot and root. Changes are pushed as each transaction executes.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from solders.account import Account
from solders.pubkey import Pubkey
from solders.signature import Signature

from coordinator.ledger.bank import SYSTEM_PROGRAM, Bank
from coordinator.ledger.dispatch import COMMITMENTS
from coordinator.ledger.encoding import Json, UnsupportedEncoding, account_json, keyed_account_json
from coordinator.ledger.faults import Chance
from coordinator.ledger.params import (
    INVALID_REQUEST,
    METHOD_NOT_FOUND,
    RpcError,
    encoding_of,
    invalid,
    number,
    options_at,
    parse_filters,
    parse_pubkey,
    parse_signature,
    pubkey_at,
    text_at,
    window_of,
)
from coordinator.ledger.sockets import Client
from coordinator.ledger.state import Record

MAX_SUBSCRIPTIONS: Final = 1024
_GONE: Final = Account(0, b"", SYSTEM_PROGRAM)

Topic = tuple[str, Pubkey | Signature | None]
"""(kind, key); key is None where everything of the kind is taken."""


@dataclass(slots=True, eq=False)
class Subscription:
    """Who wants what, and in which form; `topic` is where it is filed."""

    identity: int
    client: Client
    topic: Topic
    encoding: str = "base64"
    window: tuple[int, int] | None = None
    filters: list[Callable[[Account], bool]] = field(default_factory=list)


class Subscriptions:
    """The subscriptions to one bank.

    Args:
        bank: whose changes are pushed.
        chance: which notifications are lost.
    """

    def __init__(self, bank: Bank, chance: Chance) -> None:
        self._bank = bank
        self._chance = chance
        self._topics: dict[Topic, dict[int, Subscription]] = {}
        self._kinds: dict[str, int] = {}
        self._of_client: dict[Client, dict[int, Subscription]] = {}
        self._identities = itertools.count(1)
        bank.on_record.append(self._record)
        bank.on_slot.append(self._slot)

    def subscribe(self, client: Client, name: str, params: list[Any]) -> Subscription:
        """Carry out a `...Subscribe` request. Raises RpcError or UnsupportedEncoding where it cannot be met."""
        if len(self._of_client.get(client, ())) >= MAX_SUBSCRIPTIONS:
            raise RpcError(INVALID_REQUEST, f"at most {MAX_SUBSCRIPTIONS} subscriptions per connection")
        options = options_at(params, 1) if name != "logsSubscribe" else {}
        commitment = options.get("commitment")
        if commitment is not None and (not isinstance(commitment, str) or commitment not in COMMITMENTS):
            raise invalid(f"unknown commitment {str(commitment)[:64]!r}.")
        subscription = Subscription(next(self._identities), client, self._topic(name, params))
        if name in ("accountSubscribe", "programSubscribe"):
            subscription.encoding = encoding_of(options, "binary")
            subscription.window = window_of(options)
            account_json(_GONE, subscription.encoding)  # an encoding that cannot be given is refused now
        if name == "programSubscribe":
            subscription.filters = parse_filters(options)
        self._topics.setdefault(subscription.topic, {})[subscription.identity] = subscription
        kind = subscription.topic[0]
        self._kinds[kind] = self._kinds.get(kind, 0) + 1
        self._of_client.setdefault(client, {})[subscription.identity] = subscription
        return subscription

    @staticmethod
    def _topic(name: str, params: list[Any]) -> Topic:
        if name in ("accountSubscribe", "programSubscribe"):
            return name.removesuffix("Subscribe"), pubkey_at(params, 0)
        if name == "signatureSubscribe":
            return "signature", parse_signature(text_at(params, 0, "a signature"))
        if name in ("slotSubscribe", "rootSubscribe"):
            return name.removesuffix("Subscribe"), None
        if name == "logsSubscribe":
            wanted = params[0] if params else None
            if wanted in ("all", "allWithVotes"):
                return "logs", None
            mentions = wanted.get("mentions") if isinstance(wanted, dict) else None
            if not isinstance(mentions, list) or len(mentions) != 1:
                raise invalid('logsSubscribe takes "all" or {"mentions": [one address]}.')
            return "logs", parse_pubkey(mentions[0])
        raise RpcError(METHOD_NOT_FOUND, "Method not found")

    def catch_up(self, subscription: Subscription) -> None:
        """Push what it asks for and is known already: a signature that landed before it was subscribed to."""
        kind, key = subscription.topic
        if kind == "signature" and isinstance(key, Signature) and (record := self._bank.history.get(key)) is not None:
            self._signature(record)

    def unsubscribe(self, client: Client, params: list[Any]) -> bool:
        """Carry out an `...Unsubscribe` request. Raises RpcError for a subscription that is not this client's."""
        identity = number(params[0] if params else None, "the subscription")
        subscription = self._of_client.get(client, {}).get(identity)
        if subscription is None:
            raise invalid("Invalid subscription id.")
        self._remove(subscription)
        return True

    def leave(self, client: Client) -> None:
        """Forget everything of a client that is gone."""
        for subscription in tuple(self._of_client.get(client, {}).values()):
            self._remove(subscription)

    def _remove(self, subscription: Subscription) -> None:
        topic = self._topics.get(subscription.topic)
        if topic is None or topic.pop(subscription.identity, None) is None:
            return
        if not topic:
            del self._topics[subscription.topic]
        self._kinds[subscription.topic[0]] -= 1
        own = self._of_client[subscription.client]
        del own[subscription.identity]
        if not own:
            del self._of_client[subscription.client]

    # ------------------------------------------------------------------ notifications

    def _send(self, kind: str, subscription: Subscription, result: str) -> None:
        if self._chance.hits("mute", self._chance.faults.mute) or subscription.client.dropped:
            return
        subscription.client.push(
            f'{{"jsonrpc":"2.0","method":"{kind}Notification","params":'
            f'{{"result":{result},"subscription":{subscription.identity}}}}}'
        )

    def _value(self, value: Json) -> str:
        return json.dumps({"context": {"slot": self._bank.slot}, "value": value}, separators=(",", ":"))

    def _slot(self, parent: int, slot: int) -> None:
        if self._kinds.get("slot"):
            # One bank, so no fork: a frozen slot is rooted.
            result = json.dumps({"parent": parent, "root": parent, "slot": slot})
            for subscription in tuple(self._topics[("slot", None)].values()):
                self._send("slot", subscription, result)
        if self._kinds.get("root"):
            for subscription in tuple(self._topics[("root", None)].values()):
                self._send("root", subscription, str(parent))

    def _record(self, record: Record) -> None:
        if self._kinds.get("signature"):
            self._signature(record)
        if self._kinds.get("logs"):
            self._logs(record)
        if self._kinds.get("account") or self._kinds.get("program"):
            for key in record.writable:
                self._account(key)

    def _signature(self, record: Record) -> None:
        waiting = self._topics.get(("signature", record.signature))
        if waiting is None:
            return
        result = self._value({"err": record.error})
        for subscription in tuple(waiting.values()):
            self._send("signature", subscription, result)
            self._remove(subscription)

    def _logs(self, record: Record) -> None:
        wanted = [self._topics.get(("logs", key)) for key in (None, *record.keys)]
        if not any(wanted):
            return
        value = {"signature": str(record.signature), "err": record.error, "logs": record.meta.logs()}
        result = self._value(value)
        for subscriptions in wanted:
            for subscription in tuple((subscriptions or {}).values()):
                self._send("logs", subscription, result)

    def _account(self, key: Pubkey) -> None:
        watchers = self._topics.get(("account", key))
        if watchers is None and not self._kinds.get("program"):
            return
        account = self._bank.account(key) or _GONE
        owners = self._topics.get(("program", account.owner)) if self._kinds.get("program") else None
        # Watchers of one account mostly ask for the same form of it: encode each form once, and hold one at a time.
        forms: dict[tuple[str, tuple[int, int] | None], list[Subscription]] = {}
        for subscription in (*(watchers or {}).values(), *(owners or {}).values()):
            if all(test(account) for test in subscription.filters):
                forms.setdefault((subscription.encoding, subscription.window), []).append(subscription)
        for (encoding, window), subscriptions in forms.items():
            self._send_account(key, account, encoding, window, subscriptions)

    def _send_account(
        self,
        key: Pubkey,
        account: Account,
        encoding: str,
        window: tuple[int, int] | None,
        subscriptions: list[Subscription],
    ) -> None:
        wanted = [subscription for subscription in subscriptions if not subscription.client.dropped]
        if not wanted:
            return
        try:
            shape = account_json(account, encoding, window)
        except UnsupportedEncoding:
            # base58 of an account that is now too long for it: base64 says so itself.
            shape = account_json(account, "base64", window)
        for kind, value in (("account", shape), ("program", keyed_account_json(key, shape))):
            alike = [subscription for subscription in wanted if subscription.topic[0] == kind]
            if alike:
                result = self._value(value)
                for subscription in alike:
                    self._send(kind, subscription, result)
