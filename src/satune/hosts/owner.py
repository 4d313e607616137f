"""The owner's side: the learner and the engine of one agent, and the verbs that a run may ask.

Steps, scores and decoding are what they are in one process; what is asked is put together from
texts and handles here, and only sums, figures and digests go back. One question is answered at a
time.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from satune.agents.anchor import Snapshot
from satune.agents.ports import Learner
from satune.agents.weights import weights_digest
from satune.engines.local import LocalEngine
from satune.hosts.speaker import Speaker
from satune.hosts.vault import Vault, unplaced
from satune.hosts.visits import Visits
from satune.hosts.wire import (
    FORMAT,
    Estranged,
    Plain,
    episodes_from,
    experience_from,
    key_from,
    numbers,
    reading,
)
from satune.training.change import log_ratios_of
from satune.training.own_steps import turn_sums
from satune.training.self_check import held_against
from satune.training.settings import UpdateSettings
from satune.training.state_file import flat_snapshot, snapshot_of
from satune.training.sweep import gain_of
from satune.training.update import improve
from satune.types import Episode, Renderer, UserError

_STEPS = "steps"
"""The name under which a flat snapshot has its number of steps."""


class Owner:
    """The agent ``name`` with its learner, its engine (which serves no other) and its renderer.

    ``settings`` are those of its steps, δ included. ``facts`` is what a run has to agree on beside
    the agent (``hosts.agent.Facts`` as plain values). ``visits`` are of those who ask the agent and
    do not train it. ``save`` writes the agent for good. ``lock`` is that of all agents of a
    process: they may share a base.
    """

    def __init__(
        self,
        name: str,
        learner: Learner,
        engine: LocalEngine,
        renderer: Renderer,
        settings: UpdateSettings,
        vault: Vault,
        facts: Mapping[str, str],
        visits: Visits,
        save: Callable[[], None],
        lock: threading.Lock,
    ) -> None:
        self.name = name
        self.learner = learner
        self.engine = engine
        self.settings = settings
        self.vault = vault
        self.facts = dict(facts)
        self.visits = visits
        self._save = save
        self._lock = lock
        self._run = ""
        self._version = 0
        self._in_place: str | None = None
        self._speaker = Speaker(name, engine, renderer, settings.max_new_tokens)
        self._kept: dict[str, Snapshot | Mapping[str, Tensor]] = {}
        self._forget_all()

    def answer(self, verb: str, message: Mapping[str, Any]) -> Plain:
        """What comes of a verb. Raises UserError, one line, for one that there is not, and for what
        it cannot do; Malformed for a message that has not its form."""
        with self._lock:
            if verb not in _STILL:
                self._in_place = None
            if verb in _OPEN:
                return _OPEN[verb](self, message)
            if verb not in _VERBS:
                raise UserError(f"there is no verb {verb!r}")
            with reading():
                if not self._run or message["run"] != self._run:
                    raise Estranged(
                        "stands nowhere in this run: it was started anew, or another took it"
                    )
                for name in message["forget"]:
                    self._kept.pop(name, None)
            return {**_VERBS[verb](self, message), "steps": self.learner.steps}

    def _forget_all(self) -> None:
        """Begin with nothing but the learner."""
        self._epoch, self._count = secrets.token_hex(4), 0
        self._speaker.forget()
        self._kept.clear()

    def _name(self, kept: Snapshot | Mapping[str, Tensor]) -> str:
        self._count += 1
        name = f"{self._epoch}-{self._count}"
        self._kept[name] = kept
        return name

    def _weights(self, name: Any) -> Mapping[str, Tensor]:
        kept = self._kept.get(str(name))
        if kept is None:
            raise UserError("has none of the weights that it is asked about; resume the run")
        return kept.weights if isinstance(kept, Snapshot) else kept

    def _snapshot(self, name: Any) -> Snapshot:
        kept = self._kept.get(str(name))
        if not isinstance(kept, Snapshot):
            raise UserError("has no such snapshot of the agent; resume the run")
        return kept

    @property
    def in_place(self) -> str:
        """The digest of the weights that the agent has now."""
        if self._in_place is None:
            self._in_place = weights_digest(self.learner.export())
        return self._in_place

    def _episodes(self, message: Mapping[str, Any]) -> list[Episode]:
        return self._speaker.written.fill(self.name, episodes_from(message["episodes"]))

    # -- who it is -------------------------------------------------------------------------------

    def _hello(self, message: Mapping[str, Any]) -> Plain:
        return {
            "format": FORMAT,
            "agent": self.name,
            **self.facts,
            "frozen": self.learner.frozen,
            "steps": self.learner.steps,
            "device": self.learner.device,
            "region": asdict(self.settings.trust_region),
        }

    def _begin(self, message: Mapping[str, Any]) -> Plain:
        """A new run, for which the agent has to be as it was loaded."""
        if self.learner.steps:
            raise UserError("has trained since it was started; start the host again for a new run")
        with reading():
            run = str(message["run"])
        self.vault.begin(run)
        self._run = run
        self._forget_all()
        return {}

    def _stand(self, message: Mapping[str, Any]) -> Plain:
        """A run goes on from a checkpoint."""
        with reading():
            run, name, digest = (str(message[part]) for part in ("run", "name", "digest"))
        stored = self.vault.read(name, digest)
        self.vault.adopt(run)
        self._run = run
        self._forget_all()
        learner, parts = self.learner, stored.parts
        learner.load_weights(parts["weights"])
        learner.load_optimizer_state(parts.get("optimizer", {}), stored.plain["steps"])
        if learner.critic is not None:
            learner.critic.load(parts["critic"])
        if "reference" in parts:
            learner.keep_reference(parts["reference"])
        self._version = stored.plain["version"]
        self._speaker.written.take(stored.rows)
        held: Plain | None = None
        if stored.held:
            steps = int(stored.held.pop(_STEPS))
            snapshot = snapshot_of(stored.held, steps)
            held = {"name": self._name(snapshot), "steps": snapshot.steps}
        return {"held": held, "steps": learner.steps}

    # -- its engine ------------------------------------------------------------------------------

    def _publish(self, message: Mapping[str, Any]) -> Plain:
        with reading():
            self._version = int(message["version"])
        self.engine.publish(self.name, self._version, {})
        return {}

    def _decode(self, message: Mapping[str, Any]) -> Plain:
        with reading():
            news, requests = message["news"], message["requests"]
            decode = bool(message["decode"])
        return {"answers": self._speaker.decode(news, requests, decode=decode)}

    # -- visitors, who are no run ----------------------------------------------------------------

    def _visit(self, message: Mapping[str, Any]) -> Plain:
        """Who comes to ask the agent as it is, for its seats in a team."""
        with reading():
            seats = [str(seat) for seat in message["seats"]]
        return {
            "format": FORMAT,
            "agent": self.name,
            **self.facts,
            **self.visits.facts,
            "digest": self.in_place,
            "visit": self.visits.enter(seats),
        }

    def _speak(self, message: Mapping[str, Any]) -> Plain:
        with reading():
            speaker, digest = self.visits.speaker(message["visit"]), message["digest"]
            news, requests = message["news"], message["requests"]
            decode = bool(message["decode"])
        if digest != self.in_place:
            raise UserError(
                "has other weights than when it was first asked: a run trains the agent; ask again "
                "when that is over"
            )
        return {"answers": speaker.decode(news, requests, decode=decode)}

    def _leave(self, message: Mapping[str, Any]) -> Plain:
        with reading():
            self.visits.leave(message["visit"])
        return {}

    # -- its learner -----------------------------------------------------------------------------

    def _improve(self, message: Mapping[str, Any]) -> Plain:
        self.visits.end_idle()
        with reading():
            told, key = message["experience"], key_from(message["key"])
            experience = experience_from(told, self._episodes(told))
            beta, cap = message["beta"], message["cap"]
        outcome = improve(
            self.learner,
            self.name,
            experience,
            self.settings,
            beta=beta,
            cap=cap,
            key=key,
        )
        before: Plain | None = None
        if outcome.before is not None:
            outcome.before.rest()
            before = {"name": self._name(outcome.before), "steps": outcome.before.steps}
        return {
            "accepted": outcome.accepted,
            "beta": outcome.beta,
            "log_ratio_E": numbers(outcome.log_ratio_E),
            "log_ratio_H": numbers(outcome.log_ratio_H),
            "event": outcome.event,
            "before": before,
        }

    def _check(self, message: Mapping[str, Any]) -> Plain:
        with reading():
            episodes = self._episodes(message)
        return {"figures": held_against(self.learner, self.name, episodes)}

    def _gain(self, message: Mapping[str, Any]) -> Plain:
        with reading():
            episodes, key = self._episodes(message), key_from(message["key"])
        return {"gain": gain_of(self.learner, self.name, episodes, self.settings, key)}

    def _log_ratios(self, message: Mapping[str, Any]) -> Plain:
        with reading():
            before, episodes = self._snapshot(message["before"]), self._episodes(message)
        return {"log_ratio_E": numbers(log_ratios_of(self.learner, before, self.name, episodes))}

    def _turn_sums(self, message: Mapping[str, Any]) -> Plain:
        with reading():
            before, episodes = self._snapshot(message["before"]), self._episodes(message)
        sums = turn_sums(self.learner, before, self.name, episodes)
        return {
            "log_ratio_K": numbers(sums.log_ratio_K),
            "kl_K": numbers(sums.kl_K),
            "largest_token_kl": sums.largest_token_kl,
        }

    # -- its weights -----------------------------------------------------------------------------

    def _hold(self, message: Mapping[str, Any]) -> Plain:
        return {"name": self._name(self.learner.export())}

    def _place(self, message: Mapping[str, Any]) -> Plain:
        """Put weights in place, or what lies a share of the way to them; beyond them no region has
        looked."""
        with reading():
            target = self._weights(message["name"])
            anchor = self._weights(message["anchor"]) if "anchor" in message else None
            scale = 1.0 if anchor is None else float(message["scale"])
        if not 0 <= scale <= 1:
            raise UserError("scale: give a share from 0 to 1")
        if anchor is None:
            self.learner.load_weights(target)
        else:
            self.learner.interpolate(anchor, target, scale)
        return {}

    def _revert(self, message: Mapping[str, Any]) -> Plain:
        with reading():
            snapshot = self._snapshot(message["name"])
        self.learner.restore(snapshot)
        return {}

    def _digest(self, message: Mapping[str, Any]) -> Plain:
        with reading():
            weights = self._weights(message["name"])
        return {"digest": weights_digest(weights)}

    def _keep_reference(self, message: Mapping[str, Any]) -> Plain:
        self.learner.keep_reference()
        return {}

    # -- checkpoints -----------------------------------------------------------------------------

    def _keep(self, message: Mapping[str, Any]) -> Plain:
        with reading():
            name, held = str(message["name"]), message["held"]
            snapshot = None if held is None else self._snapshot(held)
        learner, critic = self.learner, self.learner.critic
        digest = self.vault.write(
            name,
            {
                "weights": learner.export,
                "optimizer": learner.optimizer_state,
                "critic": lambda: None if critic is None else critic.state(),
                "reference": lambda: learner.reference_weights,
            },
            {} if snapshot is None else _flat(snapshot),
            self._speaker.written.rows(),
            {"version": self._version, "steps": learner.steps},
        )
        return {"digest": digest}

    def _commit(self, message: Mapping[str, Any]) -> Plain:
        with reading():
            names = [str(name) for name in message["names"]]
        self.vault.commit(self._run, names)
        return {}

    def _keep_for_good(self, message: Mapping[str, Any]) -> Plain:
        with unplaced():
            self._save()
        return {"digest": weights_digest(self.learner.export())}


def _flat(snapshot: Snapshot) -> dict[str, Tensor]:
    return {**flat_snapshot(snapshot), _STEPS: torch.tensor(snapshot.steps)}


Verb = Callable[[Owner, Mapping[str, Any]], Plain]
_OPEN: dict[str, Verb] = {
    "hello": Owner._hello,
    "begin": Owner._begin,
    "stand": Owner._stand,
    "visit": Owner._visit,
    "speak": Owner._speak,
    "leave": Owner._leave,
}
"""What a run asks before the agent is its own, and what visitors ask."""
_STILL = {"hello", "publish", "decode", "visit", "speak", "leave", "hold", "digest", "keep"}
"""Verbs that leave the weights in place as they are, for certain."""
_VERBS: dict[str, Verb] = {
    "publish": Owner._publish,
    "decode": Owner._decode,
    "improve": Owner._improve,
    "check": Owner._check,
    "gain": Owner._gain,
    "log_ratios": Owner._log_ratios,
    "turn_sums": Owner._turn_sums,
    "hold": Owner._hold,
    "place": Owner._place,
    "revert": Owner._revert,
    "digest": Owner._digest,
    "keep_reference": Owner._keep_reference,
    "keep": Owner._keep,
    "commit": Owner._commit,
    "save": Owner._keep_for_good,
}
